"""A plain PyTorch loop: a small BERT learns whether the first token of a row is larger than the second.

The run saves a checkpoint at its end. Run it again in the same folder with more steps, and it goes on from there.
"""

import argparse
from itertools import count, islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

BATCH = 8
CHECKPOINT = Path("checkpoint.pt")


def make_data():
    """Rows of random tokens, each with its label."""
    ids = torch.randint(5, 100, (380, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row[0] > row[1]).long()} for row in ids]


def batches(data, size, start):
    """All batches from one on, epoch after epoch; the order of an epoch depends on its number alone."""
    per_epoch = -(-len(data) // size)
    for epoch in count(start // per_epoch):
        order = torch.Generator().manual_seed(epoch)
        loader = DataLoader(data, batch_size=size, shuffle=True, generator=order)
        yield from islice(loader, start % per_epoch, None)
        start = 0


def main():
    """Train, from the checkpoint if there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()

    torch.manual_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    begin = 0
    if CHECKPOINT.exists():
        saved = torch.load(CHECKPOINT)
        begin = saved["step"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["random"])  # dropout goes on as if nothing had happened

    stream = batches(make_data(), BATCH, begin * args.accumulate)
    for step in range(begin, args.steps):
        for batch in islice(stream, args.accumulate):
            with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
                loss = model(**batch).loss
            (loss / args.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss.item():.4f}")

    state = {"step": args.steps, "random": torch.get_rng_state()}
    state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, CHECKPOINT)


if __name__ == "__main__":
    main()
