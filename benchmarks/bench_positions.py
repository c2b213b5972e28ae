"""`positions`: what a score loses, and saves, that reads only a few labelled positions of every sample.

Models are trained uniformly for a while, as scores of random weights rank nothing, and then score held-out samples.
"""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from statistics import mean, median
from typing import Any

from rich.progress import track
from torch import Tensor

import measuring
from earlysift import exits, scorers
from earlysift.anatomy import find_anatomy
from earlysift.compare.bench import Bench
from earlysift.compare.settings import Settings
from earlysift.fidelity import fidelity
from earlysift.pretrain.workloads import load_workload

TITLE = "Scores that read fewer positions"
ABOUT = """Exit at depth 1 of a small model (12 layers, the standard library's text), after uniform training; b of
every two held-out samples are kept. Rank correlations are Spearman's, with the exact loss and with the exit's loss over
all labelled positions; gain: mean exact loss of the kept over that of all. Means over seeds, the smallest and largest
in brackets; costs are medians, over the training step of b in the same round."""
TABLES: dict[str, measuring.Columns] = {
    "rows": {
        "positions": ("positions read", "{}"),
        "correlation": ("with exact loss", "{}"),
        "agreement": ("with all positions", "{}"),
        "gain": ("gain", "{}"),
        "to_step": ("cost, of a step", "{:.3f}"),
        "predicted": ("by FLOPs", "{:.3f}"),
    }
}
_SEEDS, _STEPS = 3, 400
_OF_LENGTH = (4, 8, 16, 32, 64)
_SIZE: dict[str, Any] = {"length": 256, "batch": 16, "validation_samples": 512}
_SMOKE: dict[str, Any] = {"length": 64, "layers": 3, "vocab_size": 300, "batch": 4, "validation_samples": 16}


def plan(given: Namespace) -> dict[str, partial[dict[str, Any]]]:
    """What is to be measured, by name of the entry."""
    seeds, steps, size = (1, 2, _SMOKE) if given.smoke else (_SEEDS, _STEPS, _SIZE)
    return {
        f"{task}, {steps} steps, seeds: {seeds}": partial(
            measure, Settings(task=task, **size), seeds, steps, given.rounds
        )
        for task in ("masked_lm", "causal_lm")
    }


def measure(settings: Settings, seeds: int, steps: int, rounds: int) -> dict[str, Any]:
    """Fidelity and cost for every number of positions."""
    workload = load_workload(settings)
    found: dict[int | None, list[dict[str, float]]] = {}
    for seed in range(seeds):
        bench = Bench(workload, settings, seed, {})
        for step in track(range(steps), description=f"{settings.task}, seed {seed}"):
            bench.set_rate(step / steps)
            bench.update(bench.loss(bench.read(settings.batch)))
        for positions, numbers in _seen(bench, rounds).items():
            found.setdefault(positions, []).append(numbers)
    rows = []
    for positions, seen in found.items():
        spreads = {name: _spread([numbers[name] for numbers in seen]) for name in ("correlation", "agreement", "gain")}
        costs = {name: median(numbers[name] for numbers in seen) for name in ("to_step", "predicted")}
        rows.append({"positions": positions or "all", **spreads, **costs})
    return {"rows": rows}


def _seen(bench: Bench, rounds: int) -> dict[int | None, dict[str, float]]:
    settings, batch = bench.settings, bench.settings.batch
    validation = {name: rows.to(bench.device) for name, rows in bench.workload.samples.validation.items()}
    pool, rows = bench.read(settings.pool), bench.read(batch)
    score: Callable[..., Tensor] = partial(scorers.early_exit_loss, bench.model, depth=settings.depth, chunk_rows=batch)
    numbers = [None, *(settings.length // share for share in _OF_LENGTH)]
    exact, every = scorers.exact_loss(bench.model, validation, chunk_rows=batch), score(validation)
    kept = len(exact) // 2
    seen: dict[int | None, dict[str, float]] = {}
    for number in numbers:
        scores = score(validation, max_positions=number)
        ranking = fidelity(scores, exact, kept)
        agreement = fidelity(scores, every, kept)["rank_correlation"]
        seen[number] = {"correlation": ranking["rank_correlation"], "agreement": agreement, "gain": ranking["gain"]}
    operations: dict[str, Callable[[], Any]] = {f"{n}": partial(score, pool, max_positions=n) for n in numbers}
    operations["step"] = lambda: bench.update(bench.loss(rows))  # after all else: it changes the model
    times_ms = measuring.interleaved(operations, rounds, "")
    anatomy = find_anatomy(bench.model)
    for number in numbers:
        skips = exits.skips_unlabelled(bench.model, anatomy, number)
        flops = measuring.flops(anatomy, pool, depth=settings.depth, max_positions=number, skips_unlabelled=skips)
        seen[number]["predicted"] = flops / (3 * measuring.flops(anatomy, rows))
        seen[number]["to_step"] = measuring.ratio(times_ms[f"{number}"], times_ms["step"])
    return seen


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"
