"""`select`: what a real `Sifter` step costs beside scoring, and where it makes the host wait for an accelerator."""

import sys
import tempfile
from argparse import Namespace
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import earlysift
import measuring
import shapes
from earlysift import Ledger, Sifter, pools, scorers
from shapes import Shape

TITLE = "Cost of selecting"
ABOUT = """One call of `Sifter.sift` on a pool of 2b, its row of the ledger written to a file, less the scoring in it,
over a training step of b: ranking, gathering rows, counting and bookkeeping. For every score that learns likewise, with
what it learns: "training" its probe, and, in the rest, taking in the losses of the batch before (of a million samples,
where they are remembered). Then every operation in one such call by `score="loss"` whose answer the host needs (or, as
an index by a mask, whose size it needs): on an accelerator each makes the host wait."""
TABLES: dict[str, measuring.Columns] = {
    "rows": {
        "score": ("score", "{}"),
        "sift_ms": ("sift, ms", "{:.2f}"),
        "score_ms": ("of it scoring", "{:.2f}"),
        "exit_ms": ("training", "{:.3f}"),
        "selection_ms": ("the rest", "{:.2f}"),
        "select_ms": ("ranking", "{:.3f}"),
        "gather_ms": ("gathering", "{:.3f}"),
        "step_ms": ("step, ms", "{:.1f}"),
        "to_step": ("rest / step", "{:.5f}"),
        "sift_to_step": ("sift / step", "{:.5f}"),
        "waits": ("waits per call", "{}"),
    },
    "waits": {
        "op": ("operation", "`{}`"),
        "line": ("line", "{}"),
        "asked_by": ("asked by", "{}"),
        "count": ("per call", "{}"),
    },
}
# Their results, or the sizes of their results, have to reach the host.
_WAITING = {
    "aten::_local_scalar_dense",  # item, int, float, bool
    "aten::nonzero",
    "aten::masked_select",
    "aten::equal",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::unique_consecutive",
    "aten::repeat_interleave.Tensor",
}
SCORES = ("loss", "probe", "memory", "blend")
_INDEXING = {"aten::index", "aten::index_put", "aten::index_put_"}  # by a mask they look for its true entries
_SOURCES = {Path(str(package.__file__)).parent: package.__name__ for package in (earlysift, transformers)}


def plan(given: Namespace) -> dict[str, partial[dict[str, Any]]]:
    """What is to be measured, by name of the entry."""
    return shapes.entries(measure, given)


def measure(shape: Shape, dtype: str, rounds: int) -> dict[str, Any]:
    """Times of sifting and of its parts, and what waits."""
    place, precision = measuring.device(), measuring.DTYPES[dtype]
    model = shapes.build(shape).to(place)
    pool = shapes.pool(model, shape, round(shape.batch / measuring.KEEP), place)
    rows = pools.take(pool, slice(0, shape.batch))
    with tempfile.TemporaryDirectory() as folder:
        sifts = {score: Sift(model, score, pool, precision.score, Path(folder, score)) for score in SCORES}
        step = measuring.step(model, lambda: scorers.training_loss(model, rows), precision.train)
        times_ms = measuring.interleaved({"step": step, **sifts}, rounds, "select")
        with Waits(place) as waits, Lists(waits):
            sifts[SCORES[0]]()
    # Numbers that a CPU reads at once come from an accelerator without a wait, and are read a step later.
    asked = {key: n for key, n in waits.found.items() if not key[1].startswith("earlysift/pending.py")}
    row_of = {score: _row(sift, times_ms[score], times_ms["step"]) for score, sift in sifts.items()}
    row_of[SCORES[0]]["waits"] = sum(asked.values())
    found = [dict(zip(("op", "line", "asked_by"), key, strict=True), count=n) for key, n in asked.items()]
    return {"rows": list(row_of.values()), "waits": found}


class Sift:
    """Sifting a pool by a score; every call leaves a row of the ledger, and losses that the next one learns from.

    Args:
        model: The model.
        score: What scores.
        pool: A pool of R candidates.
        dtype: Autocast dtype of scoring.
        path: Where the ledger goes.
    """

    def __init__(self, model: nn.Module, score: str, pool: dict[str, Tensor], dtype: Any, path: Path) -> None:
        self.ledger = Ledger(path, device=measuring.device())
        options: dict[str, Any] = {"probe_every": 0, "dtype": dtype, "ledger": self.ledger}
        self.pool = pool
        if score in ("memory", "blend"):
            self.pool = measuring.with_ids(pool)
            options |= {"sample_id": measuring.SAMPLE_ID, "samples": measuring.SAMPLES}
        self.sifter = Sifter(model, keep=measuring.KEEP, score=score, **options)
        self.losses = torch.ones(round(measuring.KEEP * len(pool["labels"])), device=measuring.device())
        self.rows: list[dict[str, Any]] = []

    def __call__(self) -> None:
        """One pool."""
        self.sifter.sift(self.pool)
        self.sifter.observe(self.losses)
        self.rows.append({"score": self.sifter.config.score, "exit_ms": 0.0, **self.ledger.end()})


def _row(sift: Sift, sift_ms: list[float], step_ms: list[float]) -> dict[str, Any]:
    """Medians over the timed calls, the warm-up and the watched one left out."""
    parts = sift.rows[1 : 1 + len(sift_ms)]
    # Of the same call: scoring times of two calls differ by more than selecting takes.
    rest_ms = [ms - part["score_ms"] - part["exit_ms"] for ms, part in zip(sift_ms, parts, strict=True)]
    return {
        "score": parts[0]["score"],
        "sift_ms": median(sift_ms),
        "step_ms": median(step_ms),
        "selection_ms": median(rest_ms),
        **{name: median(part[name] for part in parts) for name in ("score_ms", "exit_ms", "select_ms", "gather_ms")},
        "to_step": measuring.ratio(rest_ms, step_ms),
        "sift_to_step": measuring.ratio(sift_ms, step_ms),
    }


class Waits(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that make the host wait for a device, by operation, our line, and the line that asked.

    On a CPU, where nothing waits, it counts what would wait if the tensors were on an accelerator: all but the draws of
    generators, which stay on the host.
    """

    def __init__(self, place: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = place
        self.found: Counter[tuple[str, str, str]] = Counter()
        self._drawn: dict[int, Tensor] = {}  # by address; held, so that no other tensor comes to lie there

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make the operation, and note it if it waits."""
        given = kwargs or {}
        result = func(*args, **given)
        if given.get("generator") is not None:
            self._drawn[result.data_ptr()] = result
        tensors = [value for value in (*args, result) if isinstance(value, Tensor)]
        if any(self.is_here(tensor) for tensor in tensors) and _waits(func, args, given, tensors):
            self.note(func.name())
        return result

    def is_here(self, tensor: Tensor) -> bool:
        """Whether a tensor is (or would be) on the device."""
        return tensor.device.type == self.place.type and tensor.data_ptr() not in self._drawn

    def note(self, name: str) -> None:
        """Count an operation where it is called from."""
        ours, any_of_them = "", ""
        frame = sys._getframe(1)
        while frame is not None and not ours:
            line = _line(frame.f_code.co_filename, frame.f_lineno)
            any_of_them = any_of_them or line
            ours = line if line.startswith("earlysift") else ""
            frame = frame.f_back  # type: ignore[assignment]
        self.found[name, ours, any_of_them] += 1


class Lists(TorchFunctionMode):
    """Notes `tolist` and `numpy`, which on a CPU are no operations; on an accelerator they begin with a copy."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, and note it."""
        if func in (Tensor.tolist, Tensor.numpy) and args[0].device.type == "cpu" and self.waits.is_here(args[0]):
            self.waits.note(func.__name__)
        return func(*args, **(kwargs or {}))


def _waits(func: Any, args: tuple[Any, ...], given: dict[str, Any], tensors: list[Tensor]) -> bool:
    packet = func.name().partition(".")[0]
    if packet in _INDEXING:
        return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
    if packet in ("aten::_to_copy", "aten::copy_"):
        devices = {tensor.device.type for tensor in tensors}
        behind = given.get("non_blocking") or args[2:] == (True,)  # in its turn, while the host goes on
        return "cpu" in devices and len(devices) > 1 and not behind
    return func.name() in _WAITING


def _line(file: str, number: int) -> str:
    """A line of a file of ours or of transformers, from its package on; else nothing."""
    for folder, name in _SOURCES.items():
        if Path(file).is_relative_to(folder):
            return f"{name}/{Path(file).relative_to(folder)}:{number}"
    return ""
