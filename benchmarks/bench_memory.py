"""`memory`: peak memory of sifting larger and larger pools and training on b, beside the plain step of b."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

import measuring
import shapes
from earlysift import Sifter, pools, scorers
from earlysift.checkup import peak_growth_bytes
from shapes import Shape

TITLE = "Peak memory of sifting"
ABOUT = """How far memory grows, at its peak, above what is held between steps (weights, optimizer, the pool), in MiB:
in a plain step of b, and in sifting a pool of 2b, 4b, 8b and a step on what is kept. CUDA: `max_memory_allocated`;
CPU: torch's profiler on its allocator. Scoring runs b rows at a time, so the ratio should be 1. Scores that learn do so
on the losses of that step."""
POOLS = (2, 4, 8)
TABLES: dict[str, measuring.Columns] = {
    "rows": {
        "score": ("score", "{}"),
        "held_mib": ("held", "{:,.0f}"),
        "plain_mib": ("plain step", "{:,.0f}"),
        **{f"pool_{times}b_mib": (f"pool of {times}b", "{:,.0f}") for times in POOLS},
        "ratio": ("most / plain", "{:.3f}"),
    }
}
PLAIN = ("plain step", 1)
_WITH_IDS = {"sample_id": measuring.SAMPLE_ID}
SCORES: dict[str, dict[str, Any]] = {"loss": {}, "probe": {}, "memory": _WITH_IDS, "blend": _WITH_IDS}
"""Scores, and the options that each needs."""
_MIB = 2**20


def plan(given: Namespace) -> dict[str, partial[dict[str, Any]]]:
    """What is to be measured, by name of the entry."""
    return shapes.entries(lambda shape, dtype, rounds: measure(shape, dtype), given)


def measure(shape: Shape, dtype: str) -> dict[str, Any]:
    """Growth of memory in a plain step, and in sifting and a step; an allocator's peak needs no rounds."""
    place, precision = measuring.device(), measuring.DTYPES[dtype]
    model = shapes.build(shape).to(place)
    largest = shapes.pool(model, shape, max(POOLS) * shape.batch, place)
    trained = pools.take(largest, slice(0, shape.batch))
    loss_of: Callable[[Any], Tensor] = partial(scorers.training_loss, model)
    step = measuring.step(model, lambda: loss_of(trained), precision.train)

    def sift_and_step(sifter: Sifter, pool: dict[str, Tensor]) -> None:
        nonlocal trained, loss_of
        trained, loss_of = sifter.sift(pool), sifter.loss
        step()

    options: dict[str, Any] = {"kept": shape.batch, "probe_every": 0, "dtype": precision.score}
    operations: dict[tuple[str, int], Callable[[], object]] = {PLAIN: step}
    for score, more in SCORES.items():
        for times in POOLS:
            sifter = Sifter(model, keep=1 / times, score=score, **options, **more)
            candidates = pools.take(largest, slice(0, times * shape.batch))
            candidates |= {name: torch.arange(times * shape.batch) for name in more.values()}
            operations[score, times] = partial(sift_and_step, sifter, candidates)
    for operation in operations.values():  # optimizer states, the model's first check, caches, what a probe holds
        operation()
    growth_mib = {
        name: peak_growth_bytes(operation, place) / _MIB
        for name, operation in track(operations.items(), description="memory")
    }
    held = 3 * sum(p.numel() * p.element_size() for p in model.parameters())  # weights and AdamW's two moments
    return {"rows": [{"score": score, "held_mib": held / _MIB, **_growth(growth_mib, score)} for score in SCORES]}


def _growth(growth_mib: dict[tuple[str, int], float], score: str) -> dict[str, float]:
    """Growth by pool size, and the largest over that of a plain step."""
    of_score = {f"pool_{times}b_mib": growth_mib[score, times] for times in POOLS}
    plain = growth_mib[PLAIN]
    return {"plain_mib": plain, **of_score, "ratio": max(plain, *of_score.values()) / plain}
