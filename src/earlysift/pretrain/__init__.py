"""Text, tokenizer, masking and models for pretraining, on datasets, tokenizers and transformers."""
