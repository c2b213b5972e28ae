"""A loop on FSDP2, as torchtitan has it: a small Llama, sharded by layers, learns to count on from where a row begins.

Start it by ``torchrun --nproc-per-node 2``, again in the same folder with more steps to go on from where it ended.
"""

import argparse
from itertools import count, islice
from pathlib import Path

import torch
from torch import distributed
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

BATCH = 8
CHECKPOINT = Path("checkpoint")


def batches(size, start, rank):
    """All batches of a process from one on; what is in them depends on their number and the process alone."""
    for number in count(start):
        drawn = torch.Generator().manual_seed(1_000_000 * rank + number)
        ids = 5 + (torch.randint(90, (size, 1), generator=drawn) + torch.arange(16)) % 90
        yield {"input_ids": ids, "labels": ids}


def main():
    """Train, from the checkpoint if there is one."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1, help="batches per step")
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    distributed.init_process_group("gloo")
    rank, mesh = distributed.get_rank(), init_device_mesh("cpu", (distributed.get_world_size(),))
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=4, num_attention_heads=2, intermediate_size=64)
    )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16 if args.bf16 else None, reduce_dtype=torch.float32)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)  # of the shards
    model.train()
    begin = 0
    if CHECKPOINT.exists():
        weights, moments = get_state_dict(model, optimizer)
        state = {"model": weights, "optimizer": moments, "step": 0}
        checkpoint.load(state, checkpoint_id=CHECKPOINT)
        set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
        begin = state["step"]

    stream = batches(BATCH, begin * args.accumulate, rank)
    for step in range(begin, args.steps):
        for micro_step, batch in enumerate(islice(stream, args.accumulate)):
            model.set_requires_gradient_sync(micro_step == args.accumulate - 1)
            loss = model(**batch).loss
            (loss / args.accumulate).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.4f}")
    weights, moments = get_state_dict(model, optimizer)
    writer = checkpoint.FileSystemWriter(CHECKPOINT, overwrite=True)
    checkpoint.save({"model": weights, "optimizer": moments, "step": args.steps}, storage_writer=writer)
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
