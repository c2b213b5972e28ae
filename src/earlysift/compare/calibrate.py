"""Calibration: the time of every operation on this machine, measured interleaved before any arm starts."""

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from earlysift import environment
from earlysift.compare.arm import READ_BATCH, TRAIN, Operation
from earlysift.compare.arms import ARMS
from earlysift.compare.bench import Bench
from earlysift.compare.settings import Settings
from earlysift.ledger import Ledger
from earlysift.pretrain.workloads import Workload

_WARMUP_ROUNDS = 3
_FEWEST_ROUNDS = 24
_LEAST_S, _LEAST_SHARE = 10.0, 0.4  # or this share of the budget, if that is less
_MOST_S = 40.0

Timing = dict[str, float]


def operations_of(arms: Iterable[str], settings: Settings) -> dict[str, Operation]:
    """The operations that steps of these arms are charged for, by name.

    Example:
        >>> list(operations_of(["uniform", "sift"], Settings()))
        ['read_batch', 'train', 'read_pool', 'score_1']
    """
    operations = [READ_BATCH, TRAIN, *(each for name in arms for each in ARMS[name].operations(settings))]
    return {operation.name: operation for operation in operations}


def work_ledger(settings: Settings, path: Path | None = None) -> Ledger:
    """A ledger by the clock that all times of a comparison are measured by."""
    device = torch.device(settings.device)
    return Ledger(path, device=device, clock=environment.work_clock(device))


def measure_operations(
    operations: Iterable[Operation], settings: Settings, workload: Workload, on_share: Callable[[float], None]
) -> dict[str, Timing]:
    """Time operations, one after the other in every round, so that drift hits all alike.

    They are those that the arms really do, on a model and data of their own.

    Args:
        operations: What to time.
        settings: The comparison.
        workload: Samples and model.
        on_share: Called after every round with the share that is done, for progress.

    Returns:
        For every operation ``median``, ``low`` and ``high`` (20 and 80 per cent) in ms, and ``count``.
    """
    ledger = work_ledger(settings)
    bench = Bench(workload, settings, seed=0, medians_ms={}, ledger=ledger)
    bench.set_rate(1.0)  # a learning rate of zero costs the same and cannot diverge
    prepared = {operation.name: operation.prepare(bench) for operation in operations}
    started, rounds, done = time.perf_counter(), 0, 0.0
    while done < 1:
        for name, run in prepared.items():
            with ledger.timed(name):
                run()
        rounds += 1
        budget_s = settings.budget
        if settings.steps is not None:
            budget_s = settings.steps * statistics.median(ledger.times_ms(TRAIN.name)) / 1e3
        least_s = min(_LEAST_S, _LEAST_SHARE * budget_s)
        measured, elapsed_s = rounds - _WARMUP_ROUNDS, time.perf_counter() - started
        enough = min(measured / _FEWEST_ROUNDS, elapsed_s / least_s)
        done = max(enough, elapsed_s / _MOST_S) if measured >= _WARMUP_ROUNDS else 0.0
        on_share(min(1.0, done))
    return {name: summary(ledger.times_ms(name)[_WARMUP_ROUNDS:]) for name in prepared}


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
