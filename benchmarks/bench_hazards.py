"""`hazards`: what selection does where large losses mislead, with its guards and without them.

Like `auto`, on generated streams and charged by matrix products: the same commit gives the same figures anywhere.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator

import bench_auto
import measuring
import streams
from bench_auto import KEEP, SELECT_AFTER, Arm
from earlysift import selectors
from streams import Stream

STEPS, SEEDS = 600, 3
GUARDS: dict[str, Any] = {"drop_outliers": 0.2, "explore": 0.1}

TITLE = "Hazards of selection"
ABOUT = f"""The network of [auto](#{bench_auto.TITLE.lower().replace(" ", "-")}), {STEPS} steps, {SEEDS} seeds. A share
of the labels is drawn anew, a share of the samples are copies of 64 of them, or classes become rarer and rarer.
Held-out samples are of the same kind, with right labels; the rarest class has some fifty of them. Greedy selection
takes the largest exact losses, which are for free; guarded, it leaves out the largest {GUARDS["drop_outliers"]:.0%} and
draws {GUARDS["explore"]:.0%} of every batch uniformly. Unbiased draws in proportion to them, with weights. Auto pays
for its exits. Loss: held-out, at the end, over uniform training's."""
TABLES: dict[str, measuring.Columns] = {
    "arms": {
        "arm": ("arm", "{}"),
        "end": ("loss at the end", "{:.3f}"),
        "accuracy": ("accuracy", "{:.2%}"),
        "worst_class": ("of the worst class", "{:.2%}"),
        "selecting": ("steps that select", "{:.0%}"),
    }
}


def wrong_labels(share: float, generator: Generator) -> Stream:
    """A share of the training labels drawn anew."""
    return Stream(streams.linear(generator), spoil=streams.flipped(share))


def copies(share: float, generator: Generator) -> Stream:
    """A share of the samples are copies of 64."""
    draw = streams.linear(generator)
    return Stream(streams.mixed(draw, streams.few(draw, 64, generator), share))


def rare_classes(thinning: float, generator: Generator) -> Stream:
    """Class k is kept with probability ``1 / (1 + thinning k)``."""
    return Stream(streams.imbalanced(streams.linear(generator), thinning))


HAZARDS: dict[str, tuple[Callable[[float, Generator], Stream], tuple[float, ...]]] = {
    "wrong labels": (wrong_labels, (0.01, 0.05, 0.1, 0.2, 0.4)),
    "copies": (copies, (0.5, 0.9)),
    "rare classes": (rare_classes, (1.0, 4.0)),
}
"""Name to what it does with a size, and the sizes."""


def arms(steps: int) -> dict[str, Arm]:
    """The arms, on a budget of so many uniform steps."""
    begin = SELECT_AFTER * steps
    exact: dict[str, Any] = {"score": "exact", "keep": KEEP, "schedule": lambda step: float(step >= begin)}
    usual = bench_auto.arms(stored=False, steps=steps)
    return {
        "uniform": usual["uniform"],
        "greedy": Arm(exact, charged=False),
        "greedy, guarded": Arm(exact | GUARDS, charged=False),
        "unbiased": Arm(exact | {"select": selectors.proportional}, charged=False),
        "auto": usual["auto"],
    }


def plan(given: Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Entries of this benchmark, by name, and how to measure them."""
    return {
        f"{name}, {size:g}": partial(measure, name, size, given.smoke)
        for name, (_, sizes) in HAZARDS.items()
        for size in (sizes[-1:] if given.smoke else sizes)
    }


def measure(name: str, size: float, smoke: bool = False) -> dict[str, Any]:
    """All arms on all seeds of one size of a hazard."""
    torch.set_num_threads(1)  # products as small as these
    seeds, steps = (1, 20) if smoke else (SEEDS, STEPS)
    case = partial(HAZARDS[name][0], size)
    rows = bench_auto.compared(case, arms(steps), name, seeds, steps, evaluations=1)
    # Between the beginning and the end nothing is evaluated, so there is no speed-up to tell.
    return {"hazard": name, "size": size, "arms": [{key: row[key] for key in TABLES["arms"]} for row in rows]}
