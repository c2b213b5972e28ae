"""Probes made by hand, of samples that are learnt, noisy or misleading, and the controller's verdicts on them."""

import math

import pytest
import torch
from torch import Generator

from earlysift.control import Choice, Control
from earlysift.controller import State, advance
from earlysift.probes import Probe, record

ONE = Control(depths=(1,), keeps=(0.5,))
GREEDY = Control(depths=(1,), keeps=(0.5,), rules=("greedy",))
BOTH = Control(depths=(1,), memory=True, keeps=(0.5,))
GREEDY_BOTH = Control(depths=(1,), memory=True, keeps=(0.5,), rules=("greedy",))
CHEAP = {"train": 100.0, "probe": 60.0, "score_1": 5.0, "score_2": 8.0, "score_3": 11.0}
FREE = {**CHEAP, "score_1": 0.0}
CHOICE = Choice("greedy", 1, 0.5)
UNBIASED = Choice("unbiased", 1, 0.5)
REMEMBERED = Choice("greedy", 0, 0.5)


def seeded(seed):
    return Generator().manual_seed(seed)


def probe_of(gradients, losses, *scores):
    """A probe that saw these gradients ``(R, D)`` and losses; scores at depths 1, 2, ..., the losses if none."""
    depths = dict(enumerate(scores or (losses,), start=1))
    return Probe(losses.float(), {depth: s.float() for depth, s in depths.items()}, gradients @ gradients.T)


def noisy(rows, generator, *, along=1.0, width=64, noise=4.0):
    """Gradients of a length ``along`` in one direction, with noise of length ``noise`` in all."""
    gradients = torch.randn(rows, width, generator=generator, dtype=torch.float64) * noise / math.sqrt(width)
    gradients[:, 0] += along
    return gradients


def easy_heavy(seed, rows=64):
    """Seven samples of eight are learnt: hardly a loss, no gradient."""
    generator = seeded(seed)
    gradients, losses = noisy(rows, generator, noise=6.0), 1 + torch.rand(rows, generator=generator)
    easy = torch.randperm(rows, generator=generator)[: 7 * rows // 8]
    gradients[easy] = 0
    losses[easy] *= 0.01
    return probe_of(gradients, losses)


def pure_noise(seed, rows=64):
    """Gradients that agree on nothing, losses that differ."""
    generator = seeded(seed)
    gradients = noisy(rows, generator, along=0.0, width=1000)
    return probe_of(gradients, 0.5 + torch.rand(rows, generator=generator))


def plateau(seed, rows=64, *, size=1.0):
    """The larger half of the losses, which are of that size, pulls away from where the mean gradient leads."""
    generator = seeded(seed)
    hard = torch.arange(rows) % 2 == 1
    gradients = noisy(rows, generator, along=0.0, noise=1.0)
    gradients[:, 0] += torch.where(hard, -1.0, 3.0)
    return probe_of(gradients, size * (torch.where(hard, 2.0, 1.0) + 0.1 * torch.rand(rows, generator=generator)))


def forgotten(_):
    """A loss that has risen everywhere, and gradients that agree on nothing."""
    return probe_of(torch.eye(64, dtype=torch.float64), easy_heavy(99).exact + 1)


def run(make, probes=8, *, control=ONE, prices=CHEAP, state=None, first=0):
    """The verdicts on that many probes in a row."""
    state, verdicts = state or State(), []
    for step in range(first, first + probes):
        seen = make(step)
        verdicts.append(advance(state, record(seen, len(seen.exact) // 2, control), prices, control, 0.5, step))
        state = verdicts[-1].state
    return verdicts


def close(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert other[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
