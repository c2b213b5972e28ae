"""`transformers.Trainer`: a small BERT learns whether the first token of a row is larger than the second.

The run saves checkpoints. Run it again in the same folder with more steps, and it goes on from the last one.
"""

import argparse
from pathlib import Path

import torch
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint


def make_data():
    """Rows of random tokens, each with its label."""
    ids = torch.randint(5, 100, (380, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row[0] > row[1]).long()} for row in ids]


def main():
    """Train, from the last checkpoint if there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()

    set_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    )
    arguments = TrainingArguments(
        "run",
        per_device_train_batch_size=8,
        gradient_accumulation_steps=args.accumulate,
        max_steps=args.steps,
        learning_rate=1e-3,
        lr_scheduler_type="constant",  # of no other number of steps, so that a run can be prolonged
        bf16=args.bf16,
        logging_steps=1,
        save_steps=5,
        report_to="none",
        use_cpu=True,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=make_data())
    trainer.train(resume_from_checkpoint=get_last_checkpoint("run") if Path("run").exists() else None)


if __name__ == "__main__":
    main()
