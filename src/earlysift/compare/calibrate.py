"""Calibration: the time of every operation on this machine, measured interleaved before any arm starts."""

import statistics
import time
from collections.abc import Callable
from typing import Any

from earlysift.compare.arms import ARMS
from earlysift.compare.settings import Settings
from earlysift.compare.trial import make_model, make_optimizer, make_sifter, train_step
from earlysift.ledger import Ledger, reference_ms
from earlysift.pretrain.stream import Stream
from earlysift.pretrain.tokens import Blocks

_WARMUP_ROUNDS = 3
ROUNDS = 24 + _WARMUP_ROUNDS


def measure_operations(settings: Settings, blocks: Blocks, on_round: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Time each operation that arms are charged for, one after the other in every round, so that drift hits all alike.

    The operations are those the arms really do, on a model and data of their own: ``train`` (a step on b samples),
    ``score`` and ``exact`` (scoring, selecting and gathering b of R candidates), ``read_batch`` and ``read_pool``.

    Args:
        settings: The comparison.
        blocks: Tokenised corpus.
        on_round: Called after every round, for progress.

    Returns:
        For every operation ``median``, ``low`` and ``high`` (20 and 80 per cent) in ms, and ``count``.
    """
    model = make_model(settings, blocks.vocab_size, seed=0)
    optimizer = make_optimizer(model, settings)
    stream = Stream(blocks, seed=-1)
    state: dict[str, Any] = {
        "position": 0,
        "pool": stream.read(0, settings.pool),
        "batch": stream.read(0, settings.batch),
    }

    def read(name: str, rows: int) -> Callable[[], None]:
        def operation() -> None:
            state[name] = stream.read(state["position"], rows)
            state["position"] += rows

        return operation

    def sift(arm: str) -> Callable[[], None]:
        sifter = make_sifter(model, ARMS[arm], settings, 0, Ledger())

        def operation() -> None:
            sifter.sift(state["pool"])

        return operation

    def train() -> None:
        train_step(model, optimizer, state["batch"])

    operations: dict[str, Callable[[], None]] = {
        "read_batch": read("batch", settings.batch),
        "read_pool": read("pool", settings.pool),
        "score": sift("sift"),
        "exact": sift("exact"),
        "train": train,
    }
    times_ms: dict[str, list[float]] = {name: [] for name in operations}
    for number in range(ROUNDS):
        for name, operation in operations.items():
            started = time.perf_counter()
            operation()
            if number >= _WARMUP_ROUNDS:
                times_ms[name].append((time.perf_counter() - started) * 1e3)
        on_round()
    return {name: summary(times) for name, times in times_ms.items()}


def summary(times_ms: list[float]) -> dict[str, float]:
    """Median, 20 and 80 per cent, and count.

    Example:
        >>> summary([1.0, 2.0, 3.0, 4.0, 5.0])
        {'median': 3.0, 'low': 1.8, 'high': 4.2, 'count': 5}
    """
    quantiles = statistics.quantiles(times_ms, n=5, method="inclusive")
    return {
        "median": statistics.median(times_ms),
        "low": round(quantiles[0], 4),
        "high": round(quantiles[3], 4),
        "count": len(times_ms),
    }


def step_cost_ms(arm: str, operations_ms: dict[str, dict[str, float]]) -> float:
    """Reference time of one step of an arm: its operations at their medians."""
    return reference_ms(ARMS[arm].operations, {name: entry["median"] for name, entry in operations_ms.items()})
