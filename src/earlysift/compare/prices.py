"""Prices: what every operation costs, by calibration at first, then by the arms' own steps; and what a step pays.

Reference time charges every operation its price, whenever it was done. Two arms measured on a noisy machine then differ
by what they did, not by when they ran (Kaddour et al., No Train No Gain, 2023, arXiv 2307.06440).
"""

from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from typing import Any, NamedTuple

from earlysift.compare.arm import READ_BATCH, READ_POOL, TRAIN, Arm, Operation
from earlysift.compare.calibrate import Timing, summary
from earlysift.compare.settings import Settings

_CALIBRATION_COUNTS = 10  # as so many steps, few beside those of a run

Table = dict[str, float]
"""Milliseconds by operation, or by kind of operation."""
Row = dict[str, Any]
"""A step in the ledger."""


class Prices:
    """The running median of every operation, over the steps of all arms so far, fixed between evaluations.

    The first arm of a seed that reaches an evaluation fixes a table of prices. Every arm of the seed pays by it from
    this evaluation to the next, so the same work costs all of them the same.

    Args:
        calibrated: Times of every operation from before the run.
        tables: For every seed the tables made so far; new tables are added to it.
    """

    def __init__(self, calibrated: Mapping[str, Timing], tables: list[list[Table]]) -> None:
        self._calibrated = calibrated
        self._tables = tables
        self._measured: dict[str, list[float]] = {}

    def note(self, times_ms: Mapping[str, float]) -> None:
        """Add the times that the operations of a step took."""
        for name, ms in times_ms.items():
            self._measured.setdefault(name, []).append(ms)

    def at(self, seed: int, evaluations: int) -> Table:
        """The table of a seed after so many evaluations.

        An operation that it lacks (its arm was added later) gets its present price, scaled as that of a training step.
        """
        while len(self._tables) <= seed:
            self._tables.append([])
        tables = self._tables[seed]
        while len(tables) <= evaluations:
            tables.append(self._now())
        table = tables[evaluations]
        if missing := self._calibrated.keys() - table.keys():
            now = self._now()
            table |= {name: round(now[name] * table[TRAIN.name] / now[TRAIN.name], 4) for name in sorted(missing)}
        return table

    def timings(self) -> dict[str, Timing]:
        """Median, 20 and 80 per cent so far, and how many steps they come from."""
        timings = {name: dict(timing) for name, timing in self._calibrated.items()}
        for name in timings.keys() & self._measured.keys():
            timings[name] = summary(self._samples(name)) | {"count": len(self._measured[name])}
        return timings

    def _now(self) -> Table:
        return {name: round(median(self._samples(name)), 4) for name in self._calibrated}

    def _samples(self, name: str) -> list[float]:
        return [*[self._calibrated[name]["median"]] * _CALIBRATION_COUNTS, *self._measured.get(name, ())]


class Work(NamedTuple):
    """An operation that a step did: how much of it (1 is a whole one), and how long it took where that was measured."""

    operation: Operation
    amount: float
    took_ms: float | None = None


def work_of(row: Row, arm: Arm, settings: Settings) -> list[Work]:
    """What a step did, by its row of the ledger.

    Args:
        row: ``candidates`` read; ``scored`` and ``depth`` of the exit, if any; ``reference_scored``. What was measured
            of ``wait_ms``, ``train_ms``, ``sift_ms`` (else ``score_ms``), ``probe_ms``, ``look_ms`` and ``lesson_ms``.
        arm: The arm.
        settings: The comparison.
    """
    depth = int(row.get("depth", (arm.depths or (settings.depth,))[0]))
    candidates, scored, reference_scored = row["candidates"], row.get("scored"), row.get("reference_scored")
    pools_read = candidates / settings.pool
    read, amount = (READ_POOL, pools_read) if candidates > settings.batch else (READ_BATCH, 1.0)
    lesson_ms = row.get("lesson_ms", 0.0)  # given while the batch is trained on
    training_ms = row["train_ms"] - lesson_ms if "train_ms" in row else None
    work = [Work(arm.training.at(depth), 1.0, training_ms), Work(read, amount, row.get("wait_ms"))]
    if scored and arm.scoring is None:
        raise ValueError(f"The arm {arm.label!r} scores candidates, but its row has no scoring to charge them as.")
    if arm.scoring and scored:
        scoring_ms = row.get("score_ms")
        if "sift_ms" in row:  # all that a sifter does but probe: selecting and gathering are part of it
            scoring_ms = row["sift_ms"] - row.get("probe_ms", 0.0) - row.get("look_ms", 0.0)
        work.append(Work(arm.scoring.at(depth), scored / arm.scoring.pool(settings), scoring_ms))
    if arm.scoring and reference_scored:
        scoring = replace(arm.scoring, kind="reference model")
        work.append(Work(scoring, reference_scored / scoring.pool(settings)))
    if arm.probing and "probe_ms" in row:
        work.append(Work(arm.probing, 1.0, row["probe_ms"]))
    if arm.teaching and "lesson_ms" in row:
        work.append(Work(arm.teaching, 1.0, row["lesson_ms"]))
    if arm.looking and "look_ms" in row:
        work.append(Work(arm.looking, 1.0, row["look_ms"]))
    return work


def step_times_ms(row: Row, arm: Arm, settings: Settings) -> Table:
    """What the operations of a step took, of a whole pool where it scored or read another number of candidates.

    Example:
        >>> from earlysift.compare.arms import ARMS
        >>> row = {"candidates": 64, "scored": 64, "wait_ms": 1.0, "sift_ms": 9.0, "train_ms": 50.0}
        >>> step_times_ms(row, ARMS["sift"], Settings())
        {'train': 50.0, 'read_pool': 1.0, 'score_1': 9.0}
    """
    work = work_of(row, arm, settings)
    return {operation.name: took_ms / amount for operation, amount, took_ms in work if took_ms is not None}


def charges_ms(row: Row, arm: Arm, settings: Settings, prices_ms: Mapping[str, float]) -> Table:
    """What a step costs in reference time, by kind.

    Args:
        row: As in `work_of`.
        arm: The arm; one that is not charged pays for a uniform step.
        settings: The comparison.
        prices_ms: Reference time of every operation.

    Returns:
        Milliseconds of ``read``, ``train`` and whatever else was done.

    Example:
        >>> from earlysift.compare.arms import ARMS
        >>> prices_ms = {"read_batch": 1.0, "read_pool": 2.0, "score_1": 8.0, "train": 100.0}
        >>> charges_ms({"candidates": 64, "scored": 64}, ARMS["sift"], Settings(), prices_ms)
        {'train': 100.0, 'read': 2.0, 'score': 8.0}
    """
    charges: Table = {}
    for operation, amount, _ in work_of(row, arm, settings):
        charges[operation.kind] = charges.get(operation.kind, 0.0) + prices_ms[operation.name] * amount
    uniform_ms = prices_ms[READ_BATCH.name]
    if not arm.charged:
        return {"train": charges["train"], "read": uniform_ms}
    if row.get("mode") == "off" and charges["read"] != uniform_ms:  # auto trains uniformly, and reads more to probe
        charges["probe"] = charges.get("probe", 0.0) + charges["read"] - uniform_ms
        charges["read"] = uniform_ms
    return charges
