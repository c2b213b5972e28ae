"""What all benchmarks share: timing in turns, what a time was measured on, tables."""

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import date
from typing import Any, NamedTuple

import torch
from rich.progress import track
from torch import Tensor, nn

from earlysift import costs, environment, scorers, versions
from earlysift.anatomy import Anatomy
from earlysift.compare.calibrate import summary

KEEP = 0.5
SAMPLE_ID = "sample_id"
SAMPLES = 1_000_000  # of a data set whose losses are remembered: too many for the processor's caches
DEPTHS = (1, 2, 3, 6)


class Precision(NamedTuple):
    """Autocast dtypes of training and of scoring; None is plain float32, "auto" what `scorers` makes of it."""

    train: torch.dtype | None
    score: torch.dtype | str | None


DTYPES = {
    "float32": Precision(None, None),
    "bfloat16": Precision(torch.bfloat16, torch.bfloat16),
    "mixed": Precision(None, scorers.AUTO_DTYPE),  # what `earlysift pretrain` does on a CPU
}

Operations = Mapping[str, Callable[[], Any]]
Columns = Mapping[str, tuple[str, str]]
"""Key of a row to the heading of its column and the format of its values."""


def device() -> torch.device:
    """Where benchmarks run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def about() -> dict[str, Any]:
    """What every result carries: date, hardware, threads, versions, commit."""
    machine = environment.machine(device())
    return {
        "date": date.today().isoformat(),
        "hardware": machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores",
        "threads": machine["threads"],
        "huge_pages": machine["huge_pages"],
        "keeps_memory": machine["keeps_memory"],
        "versions": versions.installed(),
        "commit": versions.commit(),
    }


def with_ids(pool: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The pool with ids of samples from anywhere in a large data set, no two alike."""
    rows = len(pool["labels"])
    return {**pool, SAMPLE_ID: torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(0))[:rows]}


def autocast(dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast as a training loop would have it."""
    return torch.autocast(device().type, dtype=dtype) if dtype else nullcontext()


def step(model: nn.Module, loss_of: Callable[[], Tensor], dtype: torch.dtype | None) -> Callable[[], None]:
    """A training step of fused AdamW on a loss."""
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def operation() -> None:
        with autocast(dtype):
            loss = loss_of()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    return operation


def interleaved(
    operations: Operations, rounds: int, label: str, together: Callable[[], object] = lambda: None
) -> dict[str, list[float]]:
    """Time operations in turns, so that a noisy machine disturbs them alike; one warm-up round comes before.

    Every round begins with another operation: one that always followed the same other would be timed on its caches.

    Args:
        operations: What to time, by name.
        rounds: Timed rounds.
        label: Shown beside the progress bar; empty shows none.
        together: Called before every clock is started (a barrier, where several processes measure).

    Returns:
        Times in ms, a number per round.
    """
    times_ms: dict[str, list[float]] = {name: [] for name in operations}
    numbers, order = range(rounds + 1), deque(operations)
    for number in track(numbers, description=label) if label else numbers:
        for name in order:
            together()
            spent_ms = timed_ms(operations[name])
            if number > 0:
                times_ms[name].append(spent_ms)
        order.rotate(-1)
    return times_ms


def timed_ms(operation: Callable[[], Any]) -> float:
    """Time of one call, the accelerator waited for."""
    started_ms = now_ms()
    operation()
    return now_ms() - started_ms


def now_ms() -> float:
    """The clock, after the accelerator has finished its work."""
    _synchronize()
    return time.perf_counter() * 1e3


def spread(times_ms: list[float]) -> dict[str, float]:
    """Median, 20 and 80 per cent, as entries of a row."""
    found = summary(times_ms)
    return {f"{name}_ms": found[name] for name in ("median", "low", "high")}


def ratio(times_ms: Sequence[float], base_ms: Sequence[float]) -> float:
    """Median over rounds of one time over another of the same round."""
    return statistics.median(time / base for time, base in zip(times_ms, base_ms, strict=True))


def flops(
    anatomy: Anatomy,
    batch: Mapping[str, Tensor],
    *,
    depth: int | None = None,
    max_positions: int | None = None,
    skips_unlabelled: bool = False,
    dense: bool = False,
) -> float:
    """FLOPs of a forward pass; dense: with the head on every position; skips_unlabelled: as `exits` has it."""
    if dense and anatomy.task != "sequence_classification":
        labels = batch["labels"]
        rows, length = labels.shape
        return costs.forward_flops(anatomy, rows=rows, length=length, labelled=labels.numel(), depth=depth)
    law = costs.flops_law(anatomy, depth, skips_unlabelled=skips_unlabelled)
    return costs.batch_work(anatomy, batch, "pass", law, max_positions=max_positions)["pass_flops"]


def markdown(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    headings = list(headings)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def folded(summary: str, text: str) -> str:
    """Markdown behind a summary, which GitHub shows until it is clicked."""
    return f"<details>\n<summary>{summary}</summary>\n\n{text.strip()}\n\n</details>\n"


def tables(columns_of: Mapping[str, Columns], entries: Mapping[str, Mapping[str, Any]]) -> str:
    """A result as Markdown: one table of all entries where each has one row, else a table per entry.

    Args:
        columns_of: The lists of rows that an entry holds, by key, with their columns.
        entries: What was measured, by name.
    """
    parts = []
    for key, columns in columns_of.items():
        found = {name for entry in entries.values() for row in entry[key] for name in row}
        columns = {name: column for name, column in columns.items() if name in found}  # of older results, too
        headings = [heading for heading, _ in columns.values()]
        rows_of = {name: [_cells(row, columns) for row in entry[key]] for name, entry in entries.items() if entry[key]}
        if not rows_of:
            continue
        if all(len(rows) == 1 for rows in rows_of.values()):
            parts.append(
                markdown(["shape", *headings], [[name, *row] for name, rows in rows_of.items() for row in rows])
            )
        else:
            names_of: dict[str, list[str]] = {}  # entries whose tables are the same share one
            for name, rows in rows_of.items():
                names_of.setdefault(markdown(headings, rows), []).append(name)
            parts += [f"{'; '.join(names)}:\n\n{table}" for table, names in names_of.items()]
    return "\n\n".join(parts)


def _cells(row: Mapping[str, Any], columns: Columns) -> list[str]:
    return ["" if row.get(key) is None else form.format(row[key]) for key, (_, form) in columns.items()]


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
