"""Data, tokenizer, masking and models of the workloads, on datasets, tokenizers and transformers."""
