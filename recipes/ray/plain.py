"""Ray Train: two workers teach a small BERT whether the first token of a row is larger than the second.

Every fifth step and the last one are saved. If a worker is lost, Ray restarts both from the latest checkpoint.
"""

import argparse
import tempfile
from itertools import count, islice
from pathlib import Path

import torch
from ray import train
from ray.train.torch import TorchTrainer, prepare_model
from transformers import BertConfig, BertForSequenceClassification

BATCH, SAVE_EVERY = 8, 5


def make_data():
    """Rows of random tokens, each with its label."""
    ids = torch.randint(5, 100, (384, 16), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": (ids[:, 0] > ids[:, 1]).long()}


def batches(data, size, start):
    """All batches of this worker from one on; the order of an epoch depends on its number alone."""
    rank, workers = train.get_context().get_world_rank(), train.get_context().get_world_size()
    for epoch, place in (divmod(number, 384 // workers // size) for number in count(start)):
        order = torch.randperm(384, generator=torch.Generator().manual_seed(epoch))[rank::workers]
        yield {name: values[order[place * size :][:size]] for name, values in data.items()}


def work(args):
    """What every worker does: train, from the checkpoint if there is one."""
    mine = f"worker_{train.get_context().get_world_rank()}.pt"
    torch.manual_seed(0)
    bert = BertConfig(vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    model = prepare_model(BertForSequenceClassification(bert)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    parts, saved = {"model": model, "optimizer": optimizer}, {"step": 0}
    if checkpoint := train.get_checkpoint():
        with checkpoint.as_directory() as folder:
            saved = torch.load(Path(folder, mine))
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(saved["random"])  # dropout goes on as if nothing had happened
    stream = batches(make_data(), BATCH, saved["step"] * args["accumulate"])
    for step in range(saved["step"], args["steps"]):
        for batch in islice(stream, args["accumulate"]):
            with torch.autocast("cpu", torch.bfloat16, enabled=args["bf16"]):
                loss = model(**batch).loss
            (loss / args["accumulate"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % SAVE_EVERY == 0 or step + 1 == args["steps"]:
            states = {name: part.state_dict() for name, part in parts.items()}
            with tempfile.TemporaryDirectory() as folder:
                torch.save({**states, "step": step + 1, "random": torch.get_rng_state()}, Path(folder, mine))
                train.report({"loss": loss.item()}, checkpoint=train.Checkpoint.from_directory(folder))


def main():
    """Train on two workers of this machine."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--bf16", action="store_true")
    kept, failures = train.CheckpointConfig(num_to_keep=2), train.FailureConfig(max_failures=3)
    given, home = vars(parser.parse_args()), str(Path.cwd())
    run = train.RunConfig(name="run", storage_path=home, checkpoint_config=kept, failure_config=failures)
    TorchTrainer(work, train_loop_config=given, scaling_config=train.ScalingConfig(num_workers=2), run_config=run).fit()


if __name__ == "__main__":
    main()
