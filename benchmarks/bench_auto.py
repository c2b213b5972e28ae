"""`auto`: what auto mode saves of what the best fixed score saves, on streams that train in seconds.

Nothing is timed: a step is charged by its matrix products, so that the same commit gives the same figures anywhere.
"""

import itertools
import math
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from statistics import geometric_mean, mean
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor, nn
from torch.nn.functional import cross_entropy

import measuring
import streams
from earlysift import Sifter, exit_probe, selectors
from earlysift.control import Control
from earlysift.families import Family
from earlysift.seeds import seeded
from streams import Stream

LAYERS, WIDTH, BATCH, KEEP = 12, 64, 32, 0.25
RATE, WARMUP = 2e-3, 0.05
STEPS, EVALUATIONS, SEEDS = 1500, 60, 3
HELD_OUT = 4000
EXITS = (1, 2, 3)
LAYER = 8 * WIDTH**2  # weights
LESSON = exit_probe.HIDDEN * (WIDTH + streams.CLASSES) / (LAYERS * LAYER)  # of one probe on one batch, of a step
SELECT_AFTER = 0.15  # of the budget, in arms with a fixed score
MARGIN = 1.1  # the target: so many times the best loss of uniform training
FAMILY = Family("blocks", (("norm", "head"),), "sequence_classification")

TITLE = "What auto mode collects"
ABOUT = f"""A residual network of {LAYERS} layers on generated streams (benchmarks/streams.py), {SEEDS} seeds, a budget
of {STEPS} uniform steps, the learning rate decayed to zero in every arm. Scoring, probes and training are charged by
matrix products, exact losses that are for free are not. Speed-up: budget spent to {MARGIN} times uniform training's
best held-out loss, uniform's over the arm's, geometric mean; 0 if an arm never gets there. End: held-out loss at the
end over uniform's."""
TABLES: dict[str, measuring.Columns] = {
    "arms": {
        "arm": ("arm", "{}"),
        "speed_up": ("speed-up", "{:.2f}"),
        "end": ("loss at the end", "{:.3f}"),
        "accuracy": ("accuracy at the end", "{:.2%}"),
        "selecting": ("steps that select", "{:.0%}"),
    }
}


class Residual(nn.Module):
    """Twelve residual layers between a linear stem and a normalised head."""

    def __init__(self, convex: bool) -> None:
        super().__init__()
        self.stem = nn.Identity() if convex else nn.Linear(streams.INPUTS, WIDTH)
        self.blocks = nn.Sequential(*(nn.Identity() if convex else Block() for _ in range(LAYERS)))
        self.norm: nn.Module = nn.Identity() if convex else nn.LayerNorm(WIDTH)
        self.head = nn.Linear(streams.INPUTS if convex else WIDTH, streams.CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(n, CLASSES)`` of inputs."""
        logits: Tensor = self.head(self.norm(self.blocks(self.stem(x))))
        return logits


class Block(nn.Module):
    """``x + W2 gelu(W1 norm(x))``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """States of the same shape."""
        out: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return out


class Arm(NamedTuple):
    """Options of its sifter, and whether scoring is charged."""

    options: dict[str, Any]
    charged: bool = True


def arms(stored: bool, steps: int = STEPS) -> dict[str, Arm]:
    """The arms of a case whose budget is so many uniform steps; remembered losses where samples return."""
    ids = {"sample_id": "id"} if stored else {}
    fixed: dict[str, Any] = {"keep": KEEP, "schedule": lambda step: float(step >= SELECT_AFTER * steps)}
    control = Control(depths=EXITS, keeps=(KEEP, 0.5), total_steps=steps, reference_costs=prices())
    unbiased = {"select": selectors.proportional}
    probe, memory = fixed | {"depth": 2, "score": "probe"}, fixed | ids | {"score": "memory"}
    return {
        "uniform": Arm({"keep": 1.0}),
        "exit 1": Arm(fixed | {"depth": 1}),
        "probe 2": Arm(probe),
        "probe 2, unbiased": Arm(probe | unbiased),
        **({"memory": Arm(memory), "memory, unbiased": Arm(memory | unbiased)} if stored else {}),
        "exact, free": Arm(fixed | {"score": "exact"}, charged=False),
        "auto": Arm(ids | {"keep": KEEP, "mode": "auto", "depth": EXITS[0], "control": control}),
    }


def prices() -> dict[str, float]:
    """Charges in steps of uniform training: a pass forward is a third of one, and a head a quarter of a layer.

    Auto mode reads exits by probes, which learn from every pool.
    """
    pool = 1 / KEEP / 3
    return {
        "train": 1.0,
        "probe": pool * (1 + 0.25 * (len(EXITS) + 2) / LAYERS),
        "score_0": 0.0,
        **{f"score_{depth}": pool * (depth + 0.25) / LAYERS + LESSON / KEEP for depth in EXITS},
    }


def plan(given: Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Entries of this benchmark, by name, and how to measure them."""
    groups = {"confirmed on": streams.CONFIRMED, "tuned on": streams.TUNED}
    return {
        f"{group}: {name}": partial(measure, name, case, given.smoke)
        for group, cases in groups.items()
        for name, case in cases.items()
        if not (given.smoke and name != "copies")
    }


def measure(name: str, case: Callable[[Generator], Stream], smoke: bool = False) -> dict[str, Any]:
    """All arms on all seeds of a case."""
    torch.set_num_threads(1)  # products as small as these
    seeds, steps, evaluations = (1, 20, 4) if smoke else (SEEDS, STEPS, EVALUATIONS)
    stored = case(seeded(0, name)).stored is not None
    return {"arms": compared(case, arms(stored, steps), name, seeds, steps, evaluations)}


def compared(
    case: Callable[[Generator], Stream], tried: dict[str, Arm], name: str, seeds: int, steps: int, evaluations: int
) -> list[dict[str, Any]]:
    """A row for every arm, beside uniform training on the same seeds."""
    curves = {
        label: [train(case, arm, seed, steps, name, evaluations) for seed in range(seeds)]
        for label, arm in tried.items()
    }
    return [_summary(label, runs, curves["uniform"]) for label, runs in curves.items()]


class Curve(NamedTuple):
    """Of one run: budget spent in uniform steps and held-out loss at every evaluation, and how it ended.

    ``worst_class`` is the lowest accuracy of a class, ``selecting`` the share of steps that select.
    """

    spent: list[float]
    losses: list[float]
    accuracy: float
    worst_class: float
    selecting: float


def train(case: Callable[[Generator], Stream], arm: Arm, seed: int, steps: int, name: str, evaluations: int) -> Curve:
    """One arm on one seed, until its budget is spent; evaluated so often, and at the end."""
    draws = seeded(seed, name)
    stream = case(draws)
    held_out = stream.draw(HELD_OUT, draws)
    data = _pools(stream, draws)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Residual(stream.convex)
    options, charged = arm
    sifter = Sifter(model, family=FAMILY, kept=BATCH, seed=seed, probe_every=0, **options)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, fused=True)
    spent, due, selecting, taken, curve = 0.0, 0.0, 0, 0, []
    while spent < steps:
        if spent >= due:
            curve.append((spent, *evaluate(model, held_out)))
            due += steps / evaluations
        share = spent / steps
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, share / WARMUP + 0.01, (1 - share) / (1 - WARMUP))
        pool = data(sifter.wanted)
        if sifter.config.sample_id is None:
            pool.pop("id", None)
        batch = sifter.sift(pool)
        loss = sifter.loss(batch, weights=None if sifter.config.keep == 1 else sifter.weights)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        cost, selects = _charge(sifter, charged)
        spent, selecting, taken = spent + cost, selecting + selects, taken + 1
    curve.append((spent, *evaluate(model, held_out)))
    times, losses, accuracies, worst = map(list, zip(*curve, strict=True))
    return Curve(times, losses, accuracies[-1], worst[-1], selecting / taken)


def _charge(sifter: Sifter, charged: bool) -> tuple[float, bool]:
    """What the latest step cost, and whether it selected."""
    row = sifter.ledger.end()
    cost = 1.0
    if charged and "scored" in row:
        by_depth = prices()[f"score_{0 if sifter.config.score == 'memory' else row['depth']}"]
        learns = sifter.config.score == "probe" or sifter.config.mode == "auto"
        cost += (by_depth if learns else max(0.0, by_depth - LESSON / KEEP)) * row["scored"] * KEEP / BATCH
    if "rank_correlation" in row:  # a probe, and not a look at what is free
        cost += prices()["probe"]
    if "lesson_ms" in row:
        cost += LESSON * len(EXITS)
    return cost, "scored" in row


def _pools(stream: Stream, generator: Generator) -> Callable[[int], dict[str, Tensor]]:
    """Hands out so many candidates, new ones or epoch by epoch."""

    def spoilt(count: int) -> tuple[Tensor, Tensor]:
        inputs, labels = stream.draw(count, generator)
        return inputs, labels if stream.spoil is None else stream.spoil(labels, generator)

    if stream.stored is None:

        def fresh(count: int) -> dict[str, Tensor]:
            inputs, labels = spoilt(count)
            return {"x": inputs, "labels": labels}

        return fresh
    inputs, labels = spoilt(stream.stored)
    order: Iterator[int] = itertools.chain.from_iterable(
        torch.randperm(len(labels), generator=generator).tolist() for _ in itertools.count()
    )

    def stored(count: int) -> dict[str, Tensor]:
        ids = torch.tensor(list(itertools.islice(order, count)))
        return {"x": inputs[ids], "labels": labels[ids], "id": ids}

    return stored


def evaluate(model: nn.Module, samples: tuple[Tensor, Tensor]) -> tuple[float, float, float]:
    """Mean loss, accuracy, and the lowest accuracy of a class."""
    inputs, labels = samples
    with torch.no_grad():
        logits = model(inputs)
    right = (logits.argmax(dim=1) == labels).float()
    by_class = [right[labels == label].mean().item() for label in set(labels.tolist())]
    return cross_entropy(logits, labels).item(), right.mean().item(), min(by_class)


def _summary(arm: str, runs: list[Curve], uniform: list[Curve]) -> dict[str, Any]:
    ratios, ends = [], []
    for run, plain in zip(runs, uniform, strict=True):
        target = MARGIN * min(plain.losses)
        ends.append(run.losses[-1] / plain.losses[-1])
        if target < plain.losses[0]:
            ratios.append(_first(plain, target) / _first(run, target))
    return {
        "arm": arm,
        "speed_up": geometric_mean(ratios) if ratios and min(ratios) > 0 else 0.0,
        "ratios": ratios,
        "end": geometric_mean(ends),
        "accuracy": mean(run.accuracy for run in runs),
        "worst_class": mean(run.worst_class for run in runs),
        "selecting": mean(run.selecting for run in runs),
    }


def _first(run: Curve, target: float) -> float:
    """Budget spent when the loss first fell to the target, between two evaluations in proportion; inf if never."""
    for i, loss in enumerate(run.losses):
        if loss <= target:
            if i == 0:
                return run.spent[0]
            before = run.losses[i - 1]
            return run.spent[i - 1] + (before - target) / (before - loss) * (run.spent[i] - run.spent[i - 1])
    return math.inf
