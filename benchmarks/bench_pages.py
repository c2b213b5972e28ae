"""`pages`: what a step and scoring gain on a CPU where memory that was freed is kept, and what that costs in memory.

Started by itself, this file measures one setting in a process of its own (see `_in_turn`).
"""

import dataclasses
import json
import os
import resource
import subprocess
import sys
from argparse import Namespace
from functools import partial
from statistics import median
from typing import Any

from rich.progress import track

import bench_scale
import measuring
import shapes
from earlysift import environment
from shapes import Shape

TITLE = "Memory that is kept, on a CPU"
ABOUT = """A training step of b and sifting a pool of 2b in processes of their own that take turns, three each: with
memory as torch and glibc hand it out, with huge pages (`THP_MEM_ALLOC_ENABLE=1`), and with huge pages and freed memory
kept (`earlysift.environment.STEADY_MEMORY`, as the command line and the other benchmarks run). Ratios are those of a
turn; the peak is that of the whole process."""
TABLES: dict[str, measuring.Columns] = {
    "rows": {
        "memory": ("memory", "{}"),
        "step_ms": ("step, ms", "{:.1f}"),
        "step_ratio": ("of the first", "{:.3f}"),
        "sift_ms": ("sift, ms", "{:.1f}"),
        "sift_ratio": ("of the first", "{:.3f}"),
        "overhead": ("sift / step", "{:.4f}"),
        "peak_mib": ("peak, MiB", "{:,.0f}"),
        "peak_ratio": ("of the first", "{:.3f}"),
    }
}
_RATIOS = {"step_ms": "step_ratio", "sift_ms": "sift_ratio", "peak_mib": "peak_ratio"}
_SETTINGS: dict[str, dict[str, str]] = {
    "as it comes": {},
    "huge pages": {environment.HUGE_PAGES: "1"},
    "huge pages, kept": environment.STEADY_MEMORY,
}
_TURNS = 3


def plan(given: Namespace) -> dict[str, partial[dict[str, Any]]]:
    """What is to be measured, by name of the entry; nothing on a GPU, whose memory torch keeps by itself."""
    turns = 1 if given.smoke else _TURNS
    return shapes.entries(partial(measure, turns=turns), given) if measuring.device().type == "cpu" else {}


def measure(shape: Shape, dtype: str, rounds: int, turns: int) -> dict[str, Any]:
    """Times and peak memory under every setting."""
    told = json.dumps({"shape": dataclasses.asdict(shape), "dtype": dtype, "rounds": rounds})
    undecided = {name: value for name, value in os.environ.items() if name not in environment.STEADY_MEMORY}
    seen: dict[str, list[dict[str, float]]] = {name: [] for name in _SETTINGS}
    for _ in track(range(turns), description="pages"):
        for name, variables in _SETTINGS.items():
            seen[name].append(_in_turn(told, undecided | variables))
    first = next(iter(seen.values()))
    return {"rows": [{"memory": name, **_compared(turns, first)} for name, turns in seen.items()]}


def _compared(turns: list[dict[str, float]], first: list[dict[str, float]]) -> dict[str, float]:
    """Medians over the turns of a setting, and over ratios to those of the first setting."""
    row = {"overhead": median(turn["sift_ms"] / turn["step_ms"] for turn in turns)}
    for key, ratio in _RATIOS.items():
        values, others = ([turn[key] for turn in side] for side in (turns, first))
        row |= {key: median(values), ratio: measuring.ratio(values, others)}
    return row


def _in_turn(told: str, variables: dict[str, str]) -> dict[str, float]:
    """What a process with these environment variables measures."""
    done = subprocess.run([sys.executable, __file__, told], env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Measuring in a process of its own failed:\n{done.stderr[-4000:]}")
    seen: dict[str, float] = json.loads(done.stdout)
    return seen


def _times(shape: Shape, dtype: str, rounds: int) -> dict[str, float]:
    """Median times of a step and of sifting, and the most memory that this process has had."""
    seen = bench_scale.times(bench_scale.Point(shape, round(shape.batch / measuring.KEEP), dtype, rounds))["local"]
    return {**seen, "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10}


if __name__ == "__main__":
    told = json.loads(sys.argv[1])
    print(json.dumps(_times(**{**told, "shape": Shape(**told["shape"])})))
