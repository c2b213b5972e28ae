"""Lightning's Trainer: a small BERT learns whether the first token of a row is larger than the second.

``--devices 2`` trains by two processes. The run saves checkpoints. Run it again in the same folder with more steps, and
it goes on from the last one.
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

BATCH = 8
CHECKPOINT = Path("checkpoint.ckpt")


def make_data():
    """Rows of random tokens, each with its label."""
    ids = torch.randint(5, 100, (380, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row[0] > row[1]).long()} for row in ids]


class Classifier(LightningModule):
    """What is trained, and how."""

    def __init__(self):
        super().__init__()
        sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
        # Lightning does not save the random state: without dropout, a resumed run is equal to one that was not cut.
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.model = BertForSequenceClassification(BertConfig(vocab_size=100, **sizes, **dropout))

    def training_step(self, batch):
        """The loss of a batch."""
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        """AdamW at a constant rate, so that a run can be prolonged."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main():
    """Train, from the checkpoint if there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--devices", type=int, default=1)
    args = parser.parse_args()

    seed_everything(0)
    module = Classifier()
    order = torch.Generator().manual_seed(0)
    loader = DataLoader(make_data(), batch_size=BATCH, shuffle=True, generator=order)
    saving = ModelCheckpoint(".", CHECKPOINT.stem, every_n_train_steps=1, enable_version_counter=False)
    trainer = Trainer(
        accelerator="cpu",
        devices=args.devices,
        precision="bf16-mixed" if args.bf16 else "32-true",
        accumulate_grad_batches=args.accumulate,
        max_steps=args.steps,
        log_every_n_steps=1,
        logger=False,
        callbacks=[saving],
    )
    trainer.fit(module, loader, ckpt_path=CHECKPOINT if CHECKPOINT.exists() else None)


if __name__ == "__main__":
    main()
