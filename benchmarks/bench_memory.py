"""`memory`: peak memory of sifting larger and larger pools and training on b, beside the plain step of b."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.progress import track

import measuring
import shapes
from earlysift import Sifter, pools, scorers
from earlysift.checkup import peak_growth_bytes
from shapes import Shape

TITLE = "Peak memory of sifting"
ABOUT = """How far memory grows, at its peak, above what is held between steps (weights, optimizer, the pool), in MiB:
in a plain step of b, and in sifting a pool of 2b, 4b, 8b and a step on what is kept. CUDA: `max_memory_allocated`;
CPU: torch's profiler on its allocator. Scoring runs b rows at a time, so the ratio should be 1."""
POOLS = (2, 4, 8)
TABLES: dict[str, measuring.Columns] = {
    "rows": {
        "held_mib": ("held", "{:,.0f}"),
        "plain_mib": ("plain step", "{:,.0f}"),
        **{f"pool_{times}b_mib": (f"pool of {times}b", "{:,.0f}") for times in POOLS},
        "ratio": ("most / plain", "{:.3f}"),
    }
}
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
    step = measuring.step(model, lambda: scorers.training_loss(model, trained), precision.train)

    def sift_and_step(times: int) -> None:
        nonlocal trained
        trained = sifters[times].sift(pools.take(largest, slice(0, times * shape.batch)))
        step()

    options: dict[str, Any] = {"kept": shape.batch, "probe_every": 0, "dtype": precision.score}
    sifters = {times: Sifter(model, keep=1 / times, **options) for times in POOLS}
    operations: dict[str, Callable[[], object]] = {"plain": step}
    operations |= {f"pool_{times}b": partial(sift_and_step, times) for times in POOLS}
    for operation in operations.values():  # optimizer states, the model's first check, caches
        operation()
    growth = {
        name: peak_growth_bytes(operation, place) / _MIB
        for name, operation in track(operations.items(), description="memory")
    }
    held = 3 * sum(p.numel() * p.element_size() for p in model.parameters())  # weights and AdamW's two moments
    row = {
        "held_mib": held / _MIB,
        **{f"{name}_mib": value for name, value in growth.items()},
        "ratio": max(growth.values()) / growth["plain"],
    }
    return {"rows": [row]}
