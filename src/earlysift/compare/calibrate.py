"""Calibration: the time of every operation on this machine, measured interleaved before any arm starts."""

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from earlysift import environment
from earlysift.compare import peers
from earlysift.compare.arms import ARMS, EXIT_HEAD_WIDTH
from earlysift.compare.settings import Settings
from earlysift.compare.steps import Bench, draw_by_gradient_norm, exit_head_options, exits_of, joint_loss, make_sifter
from earlysift.ledger import Ledger
from earlysift.pretrain.stream import Rows
from earlysift.pretrain.workloads import Workload
from earlysift.scorers import Scorer
from earlysift.seeds import seeded

_WARMUP_ROUNDS = 3
_FEWEST_ROUNDS = 24
_LEAST_S, _LEAST_SHARE = 10.0, 0.4  # or this share of the budget, if that is less
_MOST_S = 40.0
_SCORES: dict[str, str | Scorer] = {  # operation to the sifter's score
    "score": "loss",
    "entropy": "entropy",
    "exact": "exact",
    "head": "loss",
    "visible": peers.visible_labels,
}

Timing = dict[str, float]


def operations_of(arms: Iterable[str], settings: Settings) -> list[str]:
    """The operations that steps of these arms are charged for.

    Example:
        >>> operations_of(["uniform", "sift"], Settings())
        ['read_batch', 'train', 'read_pool', 'score_1']
    """
    names = {"read_batch": None, "train": None}  # in the order of first use
    for arm in (ARMS[name] for name in arms):
        names |= {arm.training.format(depth=d): None for d in exits_of(arm, settings)}
        if arm.scoring:
            names |= {"read_pool": None} | {arm.scoring.format(depth=d): None for d in exits_of(arm, settings)}
        if arm.options.get("mode") == "auto":
            names |= {"probe": None}
    return list(names)


def work_ledger(settings: Settings, path: Path | None = None) -> Ledger:
    """A ledger by the clock that all times of a comparison are measured by."""
    device = torch.device(settings.device)
    return Ledger(path, device=device, clock=environment.work_clock(device))


def measure_operations(
    names: list[str], settings: Settings, workload: Workload, on_share: Callable[[float], None]
) -> dict[str, Timing]:
    """Time operations, one after the other in every round, so that drift hits all alike.

    They are those the arms really do, on a model and data of their own: ``train`` (a step on b samples), ``score_1``,
    ``entropy_1``, ``exact`` and the like (scoring, selecting and gathering b of R candidates), ``read_batch``,
    ``read_pool`` and ``probe``.

    Args:
        names: Which.
        settings: The comparison.
        workload: Samples and model.
        on_share: Called after every round with the share that is done, for progress.

    Returns:
        For every operation ``median``, ``low`` and ``high`` (20 and 80 per cent) in ms, and ``count``.
    """
    ledger = work_ledger(settings)
    bench = Bench(workload, settings, seed=0, medians_ms={}, ledger=ledger)
    bench.set_rate(1.0)  # a learning rate of zero costs the same and cannot diverge
    batch, pool = bench.read(settings.batch), bench.read(settings.pool)
    operations = {name: _operation(name, bench, batch, pool) for name in names}
    least_s = min(_LEAST_S, _LEAST_SHARE * settings.budget)
    began, rounds, done = time.perf_counter(), 0, 0.0
    while done < 1:
        for name, operation in operations.items():
            with ledger.timed(name):
                operation()
        rounds += 1
        measured, elapsed_s = rounds - _WARMUP_ROUNDS, time.perf_counter() - began
        enough = min(measured / _FEWEST_ROUNDS, elapsed_s / least_s)
        done = max(enough, elapsed_s / _MOST_S) if measured >= _WARMUP_ROUNDS else 0.0
        on_share(min(1.0, done))
    return {name: summary(ledger.times_ms(name)[_WARMUP_ROUNDS:]) for name in names}


def _operation(name: str, bench: Bench, batch: Rows, pool: Rows) -> Callable[[], object]:
    settings = bench.settings
    simple: dict[str, Callable[[], object]] = {
        "read_batch": lambda: bench.read(settings.batch),
        "read_pool": lambda: bench.read(settings.pool),
        "train": lambda: bench.update(bench.loss(batch)),
        "grad_norm": lambda: draw_by_gradient_norm(bench, pool, seeded(0)),
    }
    if name in simple:
        return simple[name]
    if name == "probe":
        sifter = make_sifter(bench, ARMS["auto"], **ARMS["auto"].options)
        candidates = bench.read(sifter.wanted)
        return lambda: sifter.probe(candidates)
    if name.startswith("train_joint_"):
        arm = ARMS[f"sift-joint-{name.removeprefix('train_joint_')}"]
        sifter = make_sifter(bench, arm, score="loss")
        return lambda: bench.update(joint_loss(bench, sifter, batch, arm.options["joint"]))
    score, _, depth = name.partition("_")
    head = exit_head_options(bench, EXIT_HEAD_WIDTH) if score == "head" else {}
    sifter = make_sifter(bench, ARMS["sift"], score=_SCORES[score], depth=int(depth or settings.depth), **head)
    return lambda: sifter.sift(pool)


def summary(times_ms: list[float]) -> Timing:
    """Median, 20 and 80 per cent, and count.

    Example:
        >>> summary([1.0, 2.0, 3.0, 4.0, 5.0])
        {'median': 3.0, 'low': 1.8, 'high': 4.2, 'count': 5}
    """
    quantiles = statistics.quantiles(times_ms, n=5, method="inclusive")
    return {
        "median": round(statistics.median(times_ms), 4),
        "low": round(quantiles[0], 4),
        "high": round(quantiles[3], 4),
        "count": len(times_ms),
    }
