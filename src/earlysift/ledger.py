"""The ledger: the costs and results of every step, as JSON lines."""

import json
import math
import reprlib
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from earlysift import pending

_KEPT_TIMES = 10_000


class Ledger:
    """Times and counts of a run, a row per step; with gradient accumulation, a row per micro-step.

    A copied or unpickled ledger has the times but not the open row, and appends to the same file.

    Args:
        path: JSON-lines file to append to; None keeps only the statistics.
        device: Device to synchronise before reading the clock. With None, times on an accelerator measure kernel
            launches instead of work.
        clock: Clock to read, in seconds.
        max_mib: Largest size of the file. A file that a row would make larger becomes ``<path>.1``, in place of an
            older one, so that there are at most two of this size; for a file that one process writes. None keeps every
            row, a few hundred bytes a step.

    Raises:
        ValueError: If ``max_mib`` is not above 0.

    Example:
        >>> ledger = Ledger()
        >>> ledger.begin(0)
        >>> with ledger.timed("train"):
        ...     pass
        >>> ledger.note(trained=8)
        >>> sorted(ledger.end())
        ['step', 'step_ms', 'train_ms', 'trained']
    """

    def __init__(
        self,
        path: Path | str | None = None,
        *,
        device: torch.device | None = None,
        clock: Callable[[], float] = time.perf_counter,
        max_mib: float | None = None,
    ) -> None:
        if max_mib is not None and not max_mib > 0:
            raise ValueError(f"max_mib must be above 0 or None, got {max_mib!r}.")
        self._path = Path(path) if path is not None else None
        self._device = device
        self._clock = clock
        self._max_bytes = math.inf if max_mib is None else max_mib * 2**20
        self._row: dict[str, Any] = {}
        self._began_ms = 0.0
        self._times_ms: dict[str, deque[float]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_row": {}}  # else two ledgers would write it, timed by clocks that may differ

    def begin(self, step: int, micro_step: int = 0) -> None:
        """Open the row of a step unless it is open already; ends the row of another step first.

        Args:
            step: The optimizer step.
            micro_step: Number of the pool within the step; written to the row unless 0.
        """
        if (self._row.get("step"), self._row.get("micro_step", 0)) != (step, micro_step):
            self.end()
            self._row = {"step": step} | ({"micro_step": micro_step} if micro_step else {})
            self._began_ms = self.now_ms()

    def note(self, **values: Any) -> None:
        """Add values to the open row; `earlysift.pending.Pending` ones are read when the row ends."""
        self._row.update(values)

    @contextmanager
    def timed(self, operation: str) -> Iterator[None]:
        """Add the time spent within this context to ``{operation}_ms`` of the open row, unless an exception ends it."""
        started = self.now_ms()
        yield
        spent_ms = self.now_ms() - started
        name = f"{operation}_ms"
        self._row[name] = self._row.get(name, 0.0) + spent_ms
        self._times_ms.setdefault(operation, deque(maxlen=_KEPT_TIMES)).append(spent_ms)

    def end(self) -> dict[str, Any]:
        """Write the open row, if any, and return it; ``step_ms`` is the time since `begin`."""
        row, self._row = pending.arrived(self._row), {}
        if row:
            row["step_ms"] = self.now_ms() - self._began_ms
        if row and self._path is not None:
            line = json.dumps(plain(row), allow_nan=False) + "\n"
            try:
                if self._is_full(self._path, line):
                    self._path.replace(self._path.with_name(f"{self._path.name}.1"))
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(line)
            except OSError as error:
                # A full disk must not end a training run, so it continues without the rows.
                warnings.warn(f"The ledger {self._path} cannot be written ({error}); it ends here.", stacklevel=2)
                self._path = None
        return row

    def _is_full(self, path: Path, line: str) -> bool:
        limited = self._max_bytes < math.inf and path.exists()
        return limited and path.stat().st_size > max(0, self._max_bytes - len(line))

    def medians_ms(self) -> dict[str, float]:
        """Median time of each operation, in ms."""
        return {operation: median(times) for operation, times in self._times_ms.items()}

    def times_ms(self, operation: str) -> list[float]:
        """The measured times of an operation (the latest 10,000), in ms."""
        return list(self._times_ms.get(operation, ()))

    def now_ms(self) -> float:
        """The clock in ms, after the device (if given) has finished its queued work."""
        if self._device is not None and self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return self._clock() * 1e3


def read_rows(path: Path) -> list[dict[str, Any]]:
    r"""The rows of a ledger file, without a last line that is cut off.

    Raises:
        ValueError: If another line is damaged or has no step.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "ledger.jsonl"
        >>> _ = path.write_text('{"step": 0}\n{"st')
        >>> read_rows(path)
        [{'step': 0}]
    """
    *lines, _ = path.read_bytes().split(b"\n")
    return [_row(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]


def _row(line: bytes, name: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"Expected a step as JSON in {name}, found damaged text: {error}.") from error
    if not isinstance(row, dict) or not isinstance(row.get("step"), int):
        raise ValueError(f'Expected {{"step": number, ...}} in {name}, found {reprlib.repr(row)}.')
    return row


def plain(value: Any) -> Any:
    """A number, or a dictionary of numbers, for JSON: rounded to six digits, None for nan and inf.

    Example:
        >>> plain({"loss": 1.23456789, "gain": float("nan"), "step": 3})
        {'loss': 1.23457, 'gain': None, 'step': 3}
    """
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if value - value == 0 else None
