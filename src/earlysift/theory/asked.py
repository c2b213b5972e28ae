"""What all experiments are given, and share: seed, effort, looks, a start far from the minimum."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Generator, Tensor

from earlysift.report.chart import Axis
from earlysift.report.series import Style
from earlysift.theory.problems import Problem

Show = Callable[[float], None]
"""Told the share that is done."""


@dataclass(frozen=True)
class Asked:
    """What all experiments are given.

    Attributes:
        seed: Of all randomness.
        results: Folder of committed results of `earlysift compare`; None draws no workloads into the payoff map.
        effort: Multiplies seeds and instances; 1 is what documents quote, tests take less.
    """

    seed: int = 0
    results: Path | None = None
    effort: float = 1.0

    def count(self, most: int) -> int:
        """A number of seeds or instances at this effort, at least two."""
        return max(2, round(self.effort * most))


UNIFORM, GREEDY, EXACT = (Style(color, strong=True) for color in ("#737b86", "#d9581f", "#2f7fd6"))
BOUND, SHARP = Style("#9166d6", "7 3"), Style("#159a6c", "7 3")
STEPS = Axis("x", "steps")


def far(given: Problem, generator: Generator, distance: float = 5.0) -> Problem:
    """The same problem, started at a distance from its minimum."""
    direction = torch.randn(given.start.shape, generator=generator, dtype=torch.float64)
    return replace(given, start=given.optimum + distance * direction / direction.norm())


def steps_to(curve: Tensor, goal: float) -> int | None:
    """First step at which a curve ``(K + 1,)`` is at a goal; None if it never is."""
    where = (curve <= goal).nonzero()
    return int(where[0]) if len(where) else None
