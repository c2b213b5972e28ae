"""`scale`: how the overhead of scoring grows, and whether FLOPs predict it after one calibration.

When torchrun starts this file, it measures one point on several processes (see `_launched`).
"""

import dataclasses
import json
import math
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
from rich.progress import track
from torch import distributed, nn

import measuring
import scaling
import shapes
from earlysift import Sifter, exits, pools, scorers
from earlysift.anatomy import find_anatomy, unwrap
from earlysift.files import write_json
from scaling import Link
from shapes import Shape

TITLE = "Overhead of scoring as one thing changes"
ABOUT = """Overhead is the time of `Sifter.sift` over that of a training step of b. Each quantity is varied alone
around the base point; "keep" changes b within the same pool, "pool" the pool for the same b, "processes" (one thread
each where they share a CPU, DistributedDataParallel, gloo or NCCL) the ranks, both scopes in turns. Predicted: FLOPs
by `costs.py`, turned into times by `scaling.time_law`, once for steps and once for sifting, calibrated on the base
point and on a point with a quarter of its b. On several processes it is `scaling.overhead`, from the times of one
process and the measured link between them."""
TABLES: dict[str, measuring.Columns] = {
    "rows": {
        "varied": ("varied", "{}"),
        "value": ("to", "{}"),
        "step_ms": ("step, ms", "{:.1f}"),
        "sift_ms": ("sift, ms", "{:.1f}"),
        "overhead": ("overhead", "{:.4f}"),
        "predicted": ("predicted", "{:.4f}"),
        "error_percent": ("error, %", "{:+.1f}"),
    }
}


_SMALL_BYTES, _LARGE_BYTES = 16, 1 << 24  # per rank, gathered to measure the link between ranks
_LINK_ROUNDS = 20
_MORE_ROUNDS = 3  # factor for calibrations and for several processes, whose ranks wait for each other's noise
_SMALLER = 4  # factor between the batches of the two calibration points


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement: shape (with b and length), rows of the pool, exit, and how it is run."""

    shape: Shape
    pool: int
    dtype: str
    rounds: int
    depth: int = 1
    processes: int = 0
    """Number of processes to launch; 0 measures in this one."""


def plan(given: Namespace) -> dict[str, partial[dict[str, Any]]]:
    """The measurements to make, by name of the entry."""
    return shapes.entries(measure, given)


def measure(shape: Shape, dtype: str, rounds: int) -> dict[str, Any]:
    """Overhead, measured and predicted, at every point."""
    base = _at_batch(Point(shape, 0, dtype, rounds), shape.batch)
    laws = _calibrated(base)
    rows: list[dict[str, Any]] = []
    alone: dict[str, float] = {}  # times of one launched process
    for varied, value, point in track(_points(base), description="scale"):
        measured = _launched(point) if point.processes else times(point)
        for scope, entry in measured.items():
            if point.processes > 1:
                predicted = _predicted(point, scope, alone, Link(entry["gb_per_s"], entry["latency_us"]))
            else:
                predicted = _sift_ms(laws["sift"], point, entry) / laws["step"].ms(entry["step_flops"])
            rows.append(
                {
                    "varied": varied,
                    "value": f"{value}, {scope}" if len(measured) > 1 else value,
                    "predicted": predicted,
                    "error_percent": 100 * (predicted / entry["overhead"] - 1),
                    **entry,
                }
            )
        if point.processes == 1:
            alone = measured["local"]
    return {"laws": {name: law._asdict() for name, law in laws.items()}, "rows": rows}


def _calibrated(base: Point) -> dict[str, scaling.TimeLaw]:
    """Time laws of steps and of sifting, each from two sizes."""
    base = dataclasses.replace(base, rounds=_MORE_ROUNDS * base.rounds)
    small, large = (times(_at_batch(base, base.shape.batch // part))["local"] for part in (_SMALLER, 1))
    return {
        name: scaling.time_law(*((entry[f"{name}_flops"], entry[f"{name}_ms"]) for entry in (small, large)))
        for name in ("step", "sift")
    }


def _sift_ms(law: scaling.TimeLaw, point: Point, entry: dict[str, float]) -> float:
    rows_at_once = 2 * point.shape.batch  # as `Sifter.chunk_rows` says
    return law.ms(entry["sift_flops"], passes=math.ceil(point.pool / rows_at_once))


def _at_batch(point: Point, batch: int) -> Point:
    """The point with another b and the same keep."""
    shape = dataclasses.replace(point.shape, batch=max(1, batch))
    return dataclasses.replace(point, shape=shape, pool=round(shape.batch / measuring.KEEP))


def _points(base: Point) -> list[tuple[str, str, Point]]:
    """Varied quantity, its value, and the point; every series contains the base point."""
    shape, change = base.shape, dataclasses.replace
    batch, pool, length = shape.batch, base.pool, shape.length
    model: Any = _built(base)
    layers, vocabulary = len(find_anatomy(model).layers), model.config.vocab_size if length else 0

    def of_shape(**changes: Any) -> Point:
        return change(base, shape=change(shape, **changes))

    def of_config(length: int | None, **config: int) -> Point:
        return of_shape(config=shape.config | config, length=length)

    depths = [depth for depth in measuring.DEPTHS if depth < layers]
    batches = [max(1, batch // _SMALLER), batch // 2, batch, 2 * batch]
    keeps = [kept for kept in (3 * pool // 4, pool // 2, pool // 4, pool // 8) if kept]
    lengths = [length // 2, length, 2 * length, 4 * length] if length else []
    points = [
        *(("depth", f"{depth}", change(base, depth=depth)) for depth in depths),
        *(("keep", f"{kept / pool:.3g}", of_shape(batch=kept)) for kept in keeps),
        *(("pool", f"{times} b", change(base, pool=times * batch)) for times in (2, 4, 8)),
        *(("batch", f"{b}", _at_batch(base, b)) for b in batches),
        *(("length", f"{t}", of_config(t, max_position_embeddings=max(512, t))) for t in lengths),
        *(
            ("vocabulary", f"{size:,}", of_config(length, vocab_size=size))
            for size in (vocabulary // 4, vocabulary, 2 * vocabulary)
            if size
        ),
    ]
    ranks = torch.cuda.device_count() if torch.cuda.is_available() else 2
    launched = change(base, rounds=_MORE_ROUNDS * base.rounds)
    points += [("processes", f"{count}", change(launched, processes=count)) for count in sorted({1, ranks})]
    return points


def _predicted(point: Point, scope: str, alone: dict[str, float], link: Link) -> float:
    """Overhead on several processes, from the times of one and the link between them."""
    model = _built(point)
    pool = shapes.pool(model, point.shape, point.pool, torch.device("cpu"))
    spent = scaling.selection_ms(
        ranks=point.processes,
        link=link,
        kept=point.shape.batch,
        keep=point.shape.batch / point.pool,
        scope=scope,  # type: ignore[arg-type]
        row_bytes=sum(values.nbytes for values in pool.values()) / point.pool,
        tensors=len(pool),
    )
    return scaling.overhead(
        step_ms=alone["step_ms"],
        score_ms=alone["overhead"] * alone["step_ms"],
        communication_ms=sum(spent.values()),
        gradient_bytes=sum(weight.nbytes for weight in model.parameters()),
        ranks=point.processes,
        link=link,
    )


def _built(point: Point) -> nn.Module:
    with torch.device("meta"):
        return shapes.build(point.shape)


def times(
    point: Point,
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    together: Callable[[], object] = lambda: None,
) -> dict[str, dict[str, float]]:
    """Median times of a step and of sifting, their ratio, and the FLOPs of both, by scope."""
    place, precision = measuring.device(), measuring.DTYPES[point.dtype]
    model = wrap(shapes.build(point.shape).to(place))
    anatomy = find_anatomy(model)
    pool = shapes.pool(unwrap(model), point.shape, point.pool, place)
    rows = pools.take(pool, slice(0, point.shape.batch))
    scopes: tuple[Literal["local", "global"], ...] = ("local", "global") if point.processes > 1 else ("local",)
    operations: dict[str, Callable[[], Any]] = {
        "step": measuring.step(model, lambda: scorers.training_loss(model, rows), precision.train),
    }
    for scope in scopes:
        sifter = Sifter(
            model,
            kept=point.shape.batch,
            keep=point.shape.batch / point.pool,
            depth=point.depth,
            scope=scope,
            probe_every=0,
            dtype=precision.score,
        )
        operations[scope] = partial(sifter.sift, pool)
    times_ms = measuring.interleaved(operations, point.rounds, "", together)
    skips = exits.skips_unlabelled(model, anatomy, None)
    sift_flops = measuring.flops(anatomy, pool, depth=point.depth, skips_unlabelled=skips)
    return {
        scope: {
            "step_ms": median(times_ms["step"]),
            "sift_ms": median(times_ms[scope]),
            "overhead": measuring.ratio(times_ms[scope], times_ms["step"]),
            "step_flops": 3 * measuring.flops(anatomy, rows),
            "sift_flops": sift_flops,
        }
        for scope in scopes
    }


def _launched(point: Point) -> dict[str, dict[str, float]]:
    """`times` on several processes, as measured by the first."""
    with tempfile.TemporaryDirectory() as folder:
        request, result = Path(folder) / "point.json", Path(folder) / "result.json"
        write_json(request, dataclasses.asdict(point))
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(point.processes)]
        done = subprocess.run(
            [sys.executable, *launch, __file__, str(request), str(result)],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise RuntimeError(f"Measuring on {point.processes} processes failed:\n{done.stderr[-4000:]}")
        measured: dict[str, dict[str, float]] = json.loads(result.read_text(encoding="utf-8"))
        return measured


def _link(point: Point) -> Link:
    """The link between the processes: `scaling.all_gather_ms`, solved for latency and bandwidth by two measurements."""
    ranks, place = point.processes, measuring.device()

    def gathering(own_bytes: int) -> Callable[[], None]:
        own = torch.zeros(own_bytes, dtype=torch.uint8, device=place)
        everyone = own.new_empty(ranks * own_bytes)
        return lambda: distributed.all_gather_into_tensor(everyone, own)

    operations = {"small": gathering(_SMALL_BYTES), "large": gathering(_LARGE_BYTES)}
    times_ms = measuring.interleaved(operations, _LINK_ROUNDS, "", distributed.barrier)
    small_ms, large_ms = (median(times_ms[name]) for name in operations)
    moved_bytes = (ranks - 1) * (_LARGE_BYTES - _SMALL_BYTES)
    return Link(
        gb_per_s=moved_bytes / (large_ms - small_ms) * 1e-6,
        latency_us=small_ms / math.ceil(math.log2(ranks)) * 1e3,
    )


def _as_rank(request: Path, result: Path) -> None:
    """Run one process of `_launched`."""
    values = json.loads(request.read_text(encoding="utf-8"))
    point = Point(**{**values, "shape": Shape(**values["shape"])})
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    measured = times(point, wrap=nn.parallel.DistributedDataParallel, together=distributed.barrier)
    if point.processes > 1:
        link = _link(point)._asdict()
        measured = {scope: entry | link for scope, entry in measured.items()}
    if distributed.get_rank() == 0:
        write_json(result, measured)
    distributed.barrier()
    os._exit(0)  # skips interpreter shutdown, where a gloo thread sometimes aborts


if __name__ == "__main__":
    _as_rank(Path(sys.argv[1]), Path(sys.argv[2]))
