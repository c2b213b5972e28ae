"""A loop on Accelerate: a small BERT learns whether the first token of a row is larger than the second.

``torchrun`` starts several processes. Run it again in the same folder with more steps, and it goes on from there.
"""

import argparse
from itertools import count, islice
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, GradientAccumulationPlugin, set_seed
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification

from earlysift import Sifter

BATCH = 8


def make_data():
    """Rows of random tokens, each with its label."""
    ids = torch.randint(5, 100, (380, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": (row[0] > row[1]).long()} for row in ids]


def batches(accelerator, loader, start):
    """All batches from one on, epoch after epoch; the order of an epoch depends on its number alone."""
    for epoch in count(start // len(loader)):
        loader.set_epoch(epoch)
        yield from accelerator.skip_first_batches(loader, start % len(loader))
        start = 0


def main():
    """Train, from the last checkpoint if there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--keep", type=float, default=0.5, help="share of a pool that is trained on")
    args = parser.parse_args()
    accelerator = Accelerator(
        cpu=True,
        mixed_precision="bf16" if args.bf16 else "no",
        # A step may take its batches from two epochs, so that steps tell how many batches were read.
        gradient_accumulation_plugin=GradientAccumulationPlugin(args.accumulate, sync_with_dataloader=False),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
    )
    set_seed(0)
    model = BertForSequenceClassification(
        BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    order = torch.Generator().manual_seed(0)  # of its own: reading draws nothing from the state that dropout draws from
    loader = DataLoader(make_data(), batch_size=round(BATCH / args.keep), shuffle=True, generator=order)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    model.train()
    sifter = Sifter(model, keep=args.keep, depth=1)
    accelerator.register_for_checkpointing(sifter)
    step = max((int(folder.name.removeprefix("step_")) for folder in Path().glob("step_*")), default=0)
    if step:
        accelerator.load_state(f"step_{step}")
    ahead = (args.steps - step) * args.accumulate
    for pool in islice(batches(accelerator, loader, step * args.accumulate), ahead):
        batch = sifter.sift(pool, micro_step=accelerator.step % args.accumulate)
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            accelerator.print(f"step {step}: loss {loss.item():.4f}")
            step += 1
    accelerator.save_state(f"step_{step}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
