"""`train`: `earlysift pretrain` uniformly, sifting and with exact losses, on the same data, for as many minutes each.

Each arm is a process of its own, as a user would start it. Where a size says so, it is killed half-way (SIGKILL) and
resumed. An arm that was finished before this benchmark was cut is not trained again.
"""

import json
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

import bench_score
import measuring
import shapes
from earlysift.compare.verdict import rising, time_to_target
from earlysift.ledger import read_rows
from earlysift.pretrain import checkpoints

_ARMS = ("uniform", "sift", "exact")
TITLE = "Pre-training"
ABOUT = """`earlysift pretrain` on the same data, seed and minutes of training (evaluations left out) in every arm.
Data wait: training stands still until the loader gives a pool. MFU: FLOPs by `costs.py` over what a bare square matrix
product achieves on this machine in the same precision. Times to accuracies are read off the rising fit of the curve;
the accuracies are shares of the highest that every arm reached. One seed: no proof."""
TABLES: dict[str, measuring.Columns] = {
    "arms": {
        "arm": ("arm", "{}"),
        "steps": ("steps", "{}"),
        "step_ms": ("step, ms", "{:.1f}"),
        "wait_share": ("data wait, of the time", "{:.2%}"),
        "tokens_per_s": ("trained tokens / s", "{:,.0f}"),
        "mfu": ("MFU, training", "{:.3f}"),
        "mfu_with_scoring": ("MFU, with scoring", "{:.3f}"),
        "peak_mib": ("peak memory, MiB", "{:,.0f}"),
        "final_accuracy": ("final accuracy", "{:.2%}"),
        "final_loss": ("final loss", "{:.4f}"),
        "killed_at_step": ("killed at step", "{}"),
        "resumed_from_step": ("resumed from step", "{}"),
    },
    "times": {
        "accuracy": ("accuracy reached after, s", "{:.2%}"),
        **{arm: (arm, "{:,.0f}") for arm in _ARMS},
    },
    "scoring": {
        "operation": ("operation", "{}"),
        "median_ms": ("median ms", "{:.1f}"),
        "to_step": ("of a plain step", "{:.3f}"),
        "predicted": ("by FLOPs", "{:.3f}"),
    },
}
_ROOT = Path(__file__).resolve().parents[1]
_SHARED = _ROOT.parent / "shared" / "data"
_SHARES = (0.5, 0.75, 0.9, 1.0)
# `earlysift` itself, and then how much memory the process had at its peak.
_COMMAND = """
import json, resource, sys, torch
from earlysift.__main__ import main
code = main()
if torch.cuda.is_available():
    peak = torch.cuda.max_memory_allocated() / 2**20
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
print(json.dumps({"peak_mib": peak}))
sys.exit(code)
"""


@dataclass(frozen=True)
class Size:
    """What is trained: arguments of `earlysift pretrain`, text, and the shape and dtype that scoring is timed on."""

    arguments: tuple[str, ...]
    texts: tuple[Path, ...]
    characters: int | None
    """Read from each text; None reads it whole."""
    shape: str | None
    """None times no scoring."""
    dtype: str
    batch: int
    minutes: float
    arms: tuple[str, ...]
    killed: tuple[str, ...]
    """Arms that are killed half-way and resumed."""


_CORPORA = (_SHARED / "wikipedia-en" / "train.txt.zst", _SHARED / "books-litbank" / "train.txt.zst")
_VOCABULARY = ("--tokenizer", str(_SHARED / "bert-uncased-vocab" / "vocab.txt"), "--accumulate", "1")
SIZES = {
    "cpu": Size(
        arguments=(
            *_VOCABULARY,
            *("--preset", "bert-mini", "--length", "128", "--learning-rate", "5e-4"),
            *("--every", "50", "--validation-samples", "256"),
        ),
        texts=_CORPORA,
        characters=10_000_000,
        shape="bert-mini-128",
        dtype="mixed",
        batch=16,
        minutes=10,
        arms=("uniform", "sift"),
        killed=("uniform", "sift"),
    ),
    "gpu": Size(
        arguments=(
            *_VOCABULARY,
            *("--preset", "bert-base", "--length", "128", "--learning-rate", "2e-4", "--compile"),
            *("--every", "500", "--workers", "8"),
        ),
        texts=_CORPORA,
        characters=None,
        shape="bert-base-128",
        dtype="bfloat16",
        batch=256,
        minutes=60,
        arms=_ARMS,
        killed=(),
    ),
    "gpu-minutes": Size(  # as long as a lent GPU allows; ModernBERT, as a BERT learns nothing but frequencies so soon
        arguments=(
            *_VOCABULARY,
            *("--preset", "modernbert-base", "--length", "128", "--learning-rate", "5e-4", "--warmup", "0.05"),
            *("--every", "300", "--workers", "8"),
        ),
        texts=_CORPORA,
        characters=None,
        shape=None,
        dtype="bfloat16",
        batch=256,
        minutes=2.5,
        arms=("uniform", "sift"),
        killed=(),
    ),
    "smoke": Size(
        arguments=(
            *("--preset", "demo", "--vocab-size", "300", "--length", "16", "--accumulate", "1", "--every", "10"),
            *("--validation-samples", "8"),
        ),
        texts=(_ROOT / "src",),
        characters=None,
        shape="bert-mini-128",
        dtype="mixed",
        batch=4,
        minutes=0.05,
        arms=("uniform", "sift"),
        killed=("sift",),
    ),
}


def plan(given: Namespace) -> dict[str, partial[dict[str, Any]]]:
    """What is to be measured, by name of the entry; nothing where the text is not at hand."""
    size = replace(SIZES[given.size], minutes=given.minutes or SIZES[given.size].minutes)
    missing = [str(path) for path in size.texts if not path.exists()]
    if missing:
        print(f"train: skipped, as there is no {' and no '.join(missing)}")
        return {}
    return {f"{given.size}, {size.minutes:g} min": partial(measure, size, given)}


def measure(size: Size, given: Namespace) -> dict[str, Any]:
    """Train every arm, and put together what its ledger and results say."""
    place = tempfile.TemporaryDirectory() if given.smoke else nullcontext(_ROOT / "runs" / "benchmark")
    with place as folder:
        home = Path(folder) / f"{given.size}-{size.minutes:g}-minutes"
        home.mkdir(parents=True, exist_ok=True)
        data = [str(_excerpt(path, size.characters, home)) for path in size.texts]
        seen = {arm: _trained(arm, size, data, home / arm) for arm in size.arms}
    rate = _product_flops_per_s(256 if given.smoke else 4096, size.dtype, given.rounds)
    arms = [{"arm": arm, **_numbers(*found, rate)} for arm, found in seen.items()]
    timed = [] if size.shape is None else [size.shape]
    chosen = shapes.chosen(Namespace(shape=timed, smoke=given.smoke, batch=size.batch)).values()
    scoring = [row for shape in chosen for row in bench_score.measure(shape, size.dtype, given.rounds)["rows"]]
    return {
        "arguments": list(size.arguments),
        "product_flops_per_s": rate,
        "arms": arms,
        "times": _times({arm: results["curve"] for arm, (results, *_) in seen.items()}),
        "scoring": [row for row in scoring if "to_roof" in row],
        "curves": {arm: results["curve"] for arm, (results, *_) in seen.items()},
    }


def _excerpt(path: Path, characters: int | None, home: Path) -> Path:
    """The beginning of a text in a file of its own, up to the end of a paragraph; or the text itself."""
    if characters is None:
        return path
    import zstandard

    out = home / f"{path.parent.name}.txt"
    opened = zstandard.open(path, "rt", encoding="utf-8") if path.suffix == ".zst" else path.open(encoding="utf-8")
    with opened as file:
        out.write_text(file.read(characters).rpartition("\n")[0] + "\n", encoding="utf-8")
    return out


def _trained(
    arm: str, size: Size, data: list[str], out: Path
) -> tuple[dict[str, Any], list[dict[str, Any]], dict[str, Any]]:
    """One arm: its run in results.json, the rows of its ledger, and what the process said of itself."""
    command = [sys.executable, "-c", _COMMAND, "pretrain", "--arm", arm, "--data", *data, "--out", str(out)]
    command += [*size.arguments, "--batch", str(size.batch), "--minutes", str(size.minutes), "--track", "none"]
    notes_file, results_file = out.with_suffix(".json"), out / "results.json"
    if not notes_file.is_file():
        notes: dict[str, Any] = {}
        if arm in size.killed and not out.is_dir():
            notes = _kill_half_way(command, out, size.minutes)
        resume = ["--resume"] if out.is_dir() else []
        print(f"train: {arm}{' (resumed)' if resume else ''}", flush=True)
        done = subprocess.run([*command, *resume], stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"The arm {arm} ended with exit code {done.returncode}; its output is above.")
        notes |= json.loads(done.stdout.splitlines()[-1])
        notes_file.write_text(json.dumps(notes), encoding="utf-8")
    results = json.loads(results_file.read_text(encoding="utf-8"))
    told = json.loads(notes_file.read_text(encoding="utf-8")) | {"commit": results["commit"]}
    return results["arms"][arm]["runs"][0], read_rows(out / "ledgers" / "process0.jsonl"), told


def _kill_half_way(command: list[str], out: Path, minutes: float) -> dict[str, Any]:
    """Start an arm, and kill it when half of its minutes are over and there is a checkpoint to go on from."""
    print(f"train: {out.name}, to be killed half-way", flush=True)
    ledger = out / "ledgers" / "process0.jsonl"
    spent_s = 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while spent_s < 30 * minutes or not any(out.glob(f"checkpoint-*/{checkpoints.MANIFEST}")):
            if process.poll() is not None:
                raise RuntimeError(f"{out.name} ended with {process.returncode} before it was killed.")
            time.sleep(min(1.0, 3 * minutes))
            spent_s = sum(row["step_ms"] for row in read_rows(ledger)) / 1e3 if ledger.is_file() else 0.0
    finally:
        process.kill()
        process.wait()
    found = checkpoints.latest(out)
    assert found is not None
    return {
        "killed_at_step": len(read_rows(ledger)),
        "resumed_from_step": int(found[0].name.rpartition("-")[2]),
    }


def _numbers(
    results: dict[str, Any], rows: list[dict[str, Any]], notes: dict[str, Any], product_flops_per_s: float
) -> dict[str, Any]:
    """One arm in a row: how fast, how much memory, how good."""

    def total(*names: str) -> float:
        return float(sum(row.get(name, 0) for row in rows for name in names))

    return {
        "steps": results["steps"],
        "step_ms": median(row["step_ms"] for row in rows),
        "wait_share": total("wait_ms") / 1e3 / results["wall_s"],
        "tokens_per_s": total("trained_tokens") / results["wall_s"],
        "mfu": total("trained_flops") / results["wall_s"] / product_flops_per_s,
        "mfu_with_scoring": total("trained_flops", "scored_flops", "probed_flops")
        / results["wall_s"]
        / product_flops_per_s,
        "final_accuracy": results["final_accuracy"],
        "final_loss": results["final_loss"],
        **notes,
    }


def _times(curves: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """When each arm reached accuracies that all arms reached."""
    common = min(rising([point["accuracy"] for point in curve])[-1] for curve in curves.values())
    return [
        {"accuracy": target, **{arm: time_to_target(curve, target, "wall_s") for arm, curve in curves.items()}}
        for target in (share * common for share in _SHARES)
    ]


def _product_flops_per_s(size: int, dtype: str, rounds: int) -> float:
    """What a bare square matrix product achieves."""
    place, precision = measuring.device(), measuring.DTYPES[dtype].train or torch.float32
    # Random: products of constants run faster on some devices than those of real numbers.
    matrix = torch.randn(size, size, generator=torch.Generator().manual_seed(0)).to(place, precision)
    times_ms = measuring.interleaved({"product": lambda: matrix @ matrix}, rounds, "product")
    flops = 2.0 * size * size * size
    return flops / (median(times_ms["product"]) / 1e3)
