"""Prices: what a step is charged for every operation, by calibration at first, then by the arms' own steps."""

from collections.abc import Mapping
from statistics import median
from typing import Any

from earlysift.compare.arms import Arm
from earlysift.compare.calibrate import Timing, summary
from earlysift.compare.settings import Settings

_CALIBRATION_COUNTS = 10  # as so many steps, which is little beside what a run takes

Table = dict[str, float]
"""Milliseconds of every operation."""


class Prices:
    """The running median of every operation, over the steps of all arms so far, frozen where arms must agree.

    A table of prices is made when the first arm has spent the share of its budget that an evaluation is due at, and
    every arm of the seed pays by it from that share to the next: the same work costs all of them the same.

    Args:
        calibrated: Times of every operation from before the run.
        tables: For every seed the tables made so far; those that are missing are added to it.
    """

    def __init__(self, calibrated: Mapping[str, Timing], tables: list[list[Table]]) -> None:
        self._calibrated = calibrated
        self._tables = tables
        self._measured: dict[str, list[float]] = {}

    def note(self, times_ms: Mapping[str, float]) -> None:
        """Take in what the operations of a step cost."""
        for name, ms in times_ms.items():
            self._measured.setdefault(name, []).append(ms)

    def at(self, seed: int, evaluations: int) -> Table:
        """The table of a seed after so many evaluations.

        An operation that it lacks, as an arm was added, gets the price that it has now beside a training step.
        """
        while len(self._tables) <= seed:
            self._tables.append([])
        tables = self._tables[seed]
        while len(tables) <= evaluations:
            tables.append(self._now())
        table = tables[evaluations]
        if missing := self._calibrated.keys() - table.keys():
            now = self._now()
            table |= {name: round(now[name] * table["train"] / now["train"], 4) for name in sorted(missing)}
        return table

    def timings(self) -> dict[str, Timing]:
        """Median, 20 and 80 per cent by now, and how many steps they come from."""
        return {
            name: summary(self._samples(name)) | {"count": len(self._measured[name])}
            if name in self._measured
            else dict(timing)
            for name, timing in self._calibrated.items()
        }

    def _now(self) -> Table:
        return {name: round(median(self._samples(name)), 4) for name in self._calibrated}

    def _samples(self, name: str) -> list[float]:
        return [*[self._calibrated[name]["median"]] * _CALIBRATION_COUNTS, *self._measured.get(name, ())]


def step_times_ms(row: dict[str, Any], arm: Arm, settings: Settings) -> Table:
    """What the operations of a step took by its row of the ledger, as `charges_ms` charges them.

    Scoring is all that a sifter does but probe: selecting and gathering are part of it.

    Args:
        row: ``candidates``, ``wait_ms``, ``train_ms``; if there are any ``scored``, ``depth``, ``sift_ms`` (else
            ``score_ms``) and ``probe_ms``.
        arm: The arm.
        settings: The comparison.

    Returns:
        Milliseconds by operation, of a whole pool where it scored or read another number of candidates.

    Example:
        >>> from earlysift.compare.arms import ARMS
        >>> row = {"candidates": 64, "scored": 64, "wait_ms": 1.0, "sift_ms": 9.0, "train_ms": 50.0}
        >>> step_times_ms(row, ARMS["sift"], Settings())
        {'train': 50.0, 'read_pool': 1.0, 'score_1': 9.0}
    """
    depth = depth_of(row, arm, settings)
    candidates, probe_ms = row["candidates"], row.get("probe_ms", 0.0)
    times_ms = {arm.training.format(depth=depth): row["train_ms"]}
    if candidates == settings.batch:
        times_ms["read_batch"] = row["wait_ms"]
    elif candidates:
        times_ms["read_pool"] = row["wait_ms"] * settings.pool / candidates
    if row.get("scored"):
        scoring_ms = row["sift_ms"] - probe_ms if "sift_ms" in row else row["score_ms"]
        times_ms[str(arm.scoring).format(depth=depth)] = scoring_ms * settings.pool / row["scored"]
    if probe_ms:
        times_ms["probe"] = probe_ms
    return times_ms


def charges_ms(row: dict[str, Any], arm: Arm, settings: Settings, prices_ms: Mapping[str, float]) -> Table:
    """What a step costs in reference time, by kind, from what its row of the ledger says that it did.

    Args:
        row: ``candidates`` read; ``scored`` and ``depth`` of the exit, if any; ``reference_scored``; ``probe_ms``.
        arm: The arm; one that is not charged pays for a uniform step.
        settings: The comparison.
        prices_ms: Reference time of every operation.

    Returns:
        Milliseconds of ``read``, ``train`` and whatever else was done.

    Example:
        >>> from earlysift.compare.arms import ARMS
        >>> prices_ms = {"read_batch": 1.0, "read_pool": 2.0, "score_1": 8.0, "train": 100.0}
        >>> charges_ms({"candidates": 64, "scored": 64}, ARMS["sift"], Settings(), prices_ms)
        {'read': 2.0, 'train': 100.0, 'score': 8.0}
    """
    depth = depth_of(row, arm, settings)
    uniform = {"read": prices_ms["read_batch"], "train": prices_ms[arm.training.format(depth=depth)]}
    if not arm.charged:
        return uniform
    candidates = row["candidates"]
    read_ms = prices_ms["read_pool"] * candidates / settings.pool if candidates > settings.batch else uniform["read"]
    probing_ms = prices_ms["probe"] if "probe_ms" in row else 0.0
    if row.get("mode") == "off":  # auto's uniform steps are uniform's own; what it reads beyond them, it reads to probe
        probing_ms += read_ms - uniform["read"]
    else:
        uniform["read"] = read_ms
    extra = {}
    if row.get("scored"):
        extra["score"] = prices_ms[str(arm.scoring).format(depth=depth)] * row["scored"] / settings.pool
    if row.get("reference_scored"):
        extra["reference model"] = prices_ms["exact"] * row["reference_scored"] / settings.pool
    if probing_ms:
        extra["probe"] = probing_ms
    return {**uniform, **extra}


def depth_of(row: dict[str, Any], arm: Arm, settings: Settings) -> int:
    """The exit that a step used, or the arm's first."""
    return int(row.get("depth", (arm.depths or (settings.depth,))[0]))
