"""Run the scorecard of docs/reliability.md: ``python benchmarks/reliability.py [S4 S9 ...]`` (or ``make scorecard``).

A line is a set of tests, run on all their cases in a process of its own. Its result is written to
benchmarks/results/reliability.json as soon as it is there; lines that have one of this commit are not run again.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from earlysift import environment, versions
from earlysift.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"


class Line(NamedTuple):
    """A line of the scorecard: what it holds, how many cases must pass, and where its tests are."""

    what: str
    cases: int
    file: str
    names: str


LINES = {
    "S4": Line("damaged, stale or foreign checkpoints are noticed, the one before is used", 300, "scorecard", "s04"),
    "S8": Line("losses of 100 steps, selection off and on, equal those on file", 200, "scorecard", "s08"),
    "S9": Line("two ranks (DDP, FSDP2) pick what one process does; losses within 1e-6", 400, "ranks", "s09"),
    "S11": Line("gradients of accumulated steps equal those of one large batch within 1e-6", 8, "scorecard", "s11"),
    "S12": Line("nan or infinite numbers end the run before the update, exit code 3", 14, "scorecard", "s12_a_number"),
    "S12 ranks": Line("all ranks stop at the same step, whichever is hit", 28, "scorecard", "s12_all_ranks"),
    "A1, A2": Line("pools in which no bad candidate is picked", 10_000, "scorecard", "s12_no_bad"),
    "S18": Line("a signal ends the run, saved or clean (worst: seconds)", 25, "scorecard", "s18_a_signal"),
    "S1": Line("SIGKILL at a random time: nothing lost or left over, bit-equal at the end", 50, "scorecard", "s01"),
    "S5": Line("50 further steps after resuming are bit-equal", 96, "scorecard", "s05"),
}


def main() -> int:
    """Run the lines that are named, or all, that have no result of this commit yet."""
    known: dict[str, Any] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}
    commit = versions.commit()
    for name in sys.argv[1:] or LINES:
        if known.get(name, {}).get("commit") == commit:
            print(f"{name}: there is a result of {commit}")
            continue
        print(f"{name}: {LINES[name].what}", flush=True)
        known[name] = {
            **_run(LINES[name]),
            "commit": commit,
            "machine": environment.machine(torch.device("cpu")),
            "versions": versions.installed(),
        }
        write_json(RESULTS, {line: known[line] for line in LINES if line in known})
        print(f"{name}: {known[name]['passed']} of {known[name]['cases']}", flush=True)
    return 0 if all(known.get(name, {}).get("passed") == line.cases for name, line in LINES.items()) else 1


def _run(line: Line) -> dict[str, Any]:
    """Cases of a line that passed, what failed, and seconds."""
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.xml")
        tests = [str(ROOT / "tests" / f"test_{line.file}.py"), "-k", line.names]
        options = ["-p", "no:cacheprovider", "-o", "junit_family=xunit1", f"--junitxml={report}"]
        environ = {**os.environ, "EARLYSIFT_SCORECARD": "1"}
        subprocess.run([sys.executable, "-m", "pytest", "-q", *tests, *options], cwd=ROOT, env=environ, check=False)
        found = list(ElementTree.parse(report).iter("testcase"))
    good = [case for case in found if not {"failure", "error", "skipped"} & {part.tag for part in case}]
    told = [(entry.get("name"), str(entry.get("value"))) for case in good for entry in case.iter("property")]
    counted = sum(int(value) for name, value in told if name == "cases")
    uncounted = sum(not any(entry.get("name") == "cases" for entry in case.iter("property")) for case in good)
    worst = [float(value) for name, value in told if name == "worst"]
    within = sum(name == "within a save" for name, _ in told)
    return {
        "what": line.what,
        "cases": line.cases,
        "passed": counted + uncounted,
        "failed": sorted(case.get("name", "") for case in found if case not in good),
        "detail": [
            *dict.fromkeys(value for name, value in told if name == "detail"),
            *([f"largest {max(worst):.2g}"] if worst else []),
            *([f"{within} within a save"] if within else []),
        ],
        "seconds": round(time.monotonic() - began_s),
    }


if __name__ == "__main__":
    sys.exit(main())
