"""`start`: how long a program waits for `import earlysift` and for the command line, beside Python and torch."""

import os
import re
import resource
import subprocess
import sys
import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import earlysift
import measuring

TITLE = "Time to start"
ABOUT = """Processes of their own that take turns: Python doing nothing, torch, the library with every public name, and
the command line; by the clock, and by processor time, which other work on the machine disturbs less. Ratios are those
of a turn. "Above torch" is what the library adds to `import torch` in the same process, by Python's own clock of
imports (`-X importtime`) and by processor time. All modules are compiled before."""
TABLES: dict[str, measuring.Columns] = {
    "rows": {
        "program": ("program", "`{}`"),
        "ms": ("ms", "{:,.0f}"),
        "low_ms": ("20 %", "{:,.0f}"),
        "high_ms": ("80 %", "{:,.0f}"),
        "to_python": ("of Python", "{:.2f}"),
        "to_torch": ("of torch", "{:.3f}"),
        "cpu_ms": ("processor, ms", "{:,.0f}"),
        "cpu_to_python": ("of Python", "{:.2f}"),
        "cpu_to_torch": ("of torch", "{:.3f}"),
    },
    "above_torch": {
        "clock": ("earlysift above torch, by", "{}"),
        "torch_ms": ("torch, ms", "{:,.0f}"),
        "above_ms": ("above it, ms", "{:.1f}"),
        "ratio": ("of torch", "{:.4f}"),
    },
}
# Modules by name: those that `earlysift.Sifter` and its like bring are unknown to the clock of imports.
_MODULES = ", ".join(f"earlysift.{home}" for home in earlysift._HOMES)
_EVERY_NAME = f"""
import sys, time
began = time.process_time()
import torch
between = time.process_time()
import {_MODULES}
ended = time.process_time()
print("processor", (between - began) * 1e3, (ended - between) * 1e3, file=sys.stderr)
"""
PROGRAMS: dict[str, tuple[str, ...]] = {
    "python -c pass": ("-c", "pass"),
    "import torch": ("-c", "import torch"),
    "import earlysift": ("-c", "import earlysift"),
    "import torch, and all of earlysift": ("-c", _EVERY_NAME),
    "earlysift --help": ("-m", "earlysift", "--help"),
    "earlysift --version": ("-m", "earlysift", "--version"),
    "earlysift compare --help": ("-m", "earlysift", "compare", "--help"),
}
"""What is timed, and the arguments of Python that start it."""
# As installed: compiled by the warm-up round, whatever the environment says of writing bytecode beside the source.
_BYTECODE = Path(tempfile.gettempdir(), "earlysift-bench-start")
_IMPORTED = re.compile(r"import time: +\d+ \| +(\d+) \| (torch|earlysift)(?:\.\S+)?$", flags=re.MULTILINE)
_PROCESSOR = re.compile(r"processor (\S+) (\S+)$", flags=re.MULTILINE)


def plan(given: Namespace) -> dict[str, partial[dict[str, Any]]]:
    """One entry: it has no shape."""
    return {"start": partial(measure, given.rounds)}


def measure(rounds: int) -> dict[str, Any]:
    """Times of all programs, and what the library adds to torch."""
    cpu_ms: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    programs = {name: partial(_run_timed, arguments, cpu_ms[name]) for name, arguments in PROGRAMS.items()}
    times_ms = measuring.interleaved(programs, rounds, "start")
    cpu_ms = {name: spent[1:] for name, spent in cpu_ms.items()}  # without the warm-up
    rows = []
    for name in PROGRAMS:
        found = measuring.spread(times_ms[name])
        rows.append(
            {
                "program": name,
                "ms": found.pop("median_ms"),
                **found,
                "cpu_ms": median(cpu_ms[name]),
                **{
                    f"{kind}to_{base}": measuring.ratio(spent[name], spent[program])
                    for kind, spent in (("", times_ms), ("cpu_", cpu_ms))
                    for base, program in (("python", "python -c pass"), ("torch", "import torch"))
                },
            }
        )
    said = [_run(("-X", "importtime", "-c", _EVERY_NAME)) for _ in range(rounds)]
    above = []
    for clock, parts_ms in {"importtime": imports_ms, "processor time": _processor_ms}.items():
        torch_ms, above_ms = zip(*map(parts_ms, said), strict=True)
        ratio = measuring.ratio(above_ms, torch_ms)
        above.append({"clock": clock, "torch_ms": median(torch_ms), "above_ms": median(above_ms), "ratio": ratio})
    return {"rows": rows, "above_torch": above}


def imports_ms(said: str) -> tuple[float, float]:
    """What Python's clock of imports says of torch and of earlysift, with all that only they bring, in ms.

    Args:
        said: What ``-X importtime`` printed; lines of imports within others are indented, and included in theirs.
    """
    spent_ms = {"torch": 0.0, "earlysift": 0.0}
    for microseconds, package in _IMPORTED.findall(said):
        spent_ms[package] += int(microseconds) / 1e3
    return spent_ms["torch"], spent_ms["earlysift"]


def _processor_ms(said: str) -> tuple[float, float]:
    (parts,) = _PROCESSOR.findall(said)
    return float(parts[0]), float(parts[1])


def _run_timed(arguments: tuple[str, ...], cpu_ms: list[float]) -> None:
    """Run a Python of its own, and note its processor time."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    _run(arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_ms.append((after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3)


def _run(arguments: tuple[str, ...]) -> str:
    """What a Python of its own prints to stderr."""
    variables = os.environ | {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(_BYTECODE)}
    done = subprocess.run([sys.executable, *arguments], env=variables, capture_output=True, text=True, check=True)
    return done.stderr
