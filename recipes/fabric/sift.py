"""A loop on Lightning Fabric: a small BERT learns whether the first token of a row is larger than the second.

``--devices 2`` trains by two processes. The run saves a checkpoint at its end. Run it again in the same folder with
more steps, and it goes on from there.
"""

import argparse
from itertools import count, islice
from pathlib import Path

import torch
from lightning.fabric import Fabric
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from earlysift import Sifter

BATCH = 8
CHECKPOINT = Path("checkpoint.ckpt")


def make_data():
    """Rows of random tokens, each with its label."""
    ids = torch.randint(5, 100, (380, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row[0] > row[1]).long()} for row in ids]


def batches(fabric, data, size, start):
    """All batches from one on, epoch after epoch; the order of an epoch depends on its number alone."""
    per_epoch = -(-len(data) // (size * fabric.world_size))  # each process gets its share
    for epoch in count(start // per_epoch):
        order = torch.Generator().manual_seed(epoch)
        shuffled = [data[i] for i in torch.randperm(len(data), generator=order)]
        loader = fabric.setup_dataloaders(DataLoader(shuffled, batch_size=size, generator=order))
        yield from islice(loader, start % per_epoch, None)
        start = 0


def main():
    """Train, from the checkpoint if there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--keep", type=float, default=0.5, help="share of a pool that is trained on")
    args = parser.parse_args()
    fabric = Fabric(accelerator="cpu", devices=args.devices, precision="bf16-mixed" if args.bf16 else "32-true")
    fabric.launch()
    fabric.seed_everything(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model, optimizer = fabric.setup(model, optimizer)
    model.train()
    sifter = Sifter(model, keep=args.keep, depth=1)
    state = {"step": 0, "random": torch.get_rng_state(), "model": model, "optimizer": optimizer}
    state["sifter"] = sifter
    if CHECKPOINT.exists():
        fabric.load(CHECKPOINT, state)
        torch.set_rng_state(state["random"])  # dropout goes on as if nothing had happened

    stream = batches(fabric, make_data(), round(BATCH / args.keep), state["step"] * args.accumulate)
    for step in range(state["step"], args.steps):
        for micro_step, pool in enumerate(islice(stream, args.accumulate)):
            batch = sifter.sift(pool, micro_step=micro_step)
            with fabric.no_backward_sync(model, enabled=micro_step < args.accumulate - 1):
                loss = model(**batch).loss
                fabric.backward(loss / args.accumulate)
        optimizer.step()
        optimizer.zero_grad()
        fabric.print(f"step {step}: loss {loss.item():.4f}")

    state |= {"step": args.steps, "random": torch.get_rng_state()}
    fabric.save(CHECKPOINT, state)


if __name__ == "__main__":
    main()
