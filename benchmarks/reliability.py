"""Run the scorecard of docs/reliability.md: ``python benchmarks/reliability.py [--long] [S4 S9 ...]``.

A line is a set of tests, run on all their cases in a process of its own: ``make scorecard``. With ``--long``, lines run
the number of a release: ``make torture``. Every case is noted as it ends, so that a run that was cut goes on behind it.
The result of a line is written to benchmarks/results/reliability.json; lines that have one of this commit, of as many
cases or more, are not run again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch

from earlysift import environment, versions
from earlysift.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "reliability.json"
OUTCOMES = ROOT / ".scorecard"
"""Cases of lines that have not ended, by commit."""
_ENDED = (0, 1, 5)  # of pytest: all passed, some failed, none was left


class Line(NamedTuple):
    """A line of the scorecard.

    Attributes:
        what: What holds.
        cases: How many cases must pass.
        files: Where its tests are.
        names: What pytest selects them by.
        long: Cases for a release, where these are more.
    """

    what: str
    cases: int
    files: str
    names: str
    long: int | None = None


LINES = {
    "S1": Line("SIGKILL at a random time: nothing lost, bit-equal at the end", 50, "scorecard", "s01", 500),
    "S2": Line("SIGKILL at a named point of `pretrain`: bit-equal at the end", 22, "faults", "s02_pretrain"),
    "S2 trainers": Line("the same of `SiftTrainer` and Lightning's Trainer", 13, "faults", "s02_trainings"),
    "S2 compare": Line("the same of `compare`: what was finished is kept", 10, "faults", "s02_compare"),
    "S3": Line("a disk that fails: nothing finished is lost, one clear error, goes on", 60, "faults", "s03_pretrain"),
    "S3 trainers": Line("the same of `SiftTrainer` and Lightning's Trainer", 24, "faults", "s03_trainings"),
    "S3 compare": Line("the same of `compare`", 24, "faults", "s03_compare"),
    "S4": Line("damaged, stale or foreign checkpoints are noticed, the one before is used", 300, "scorecard", "s04"),
    "S4 trainers": Line("damage to the state of selection of a `SiftTrainer` is noticed", 86, "faults", "s04"),
    "S5": Line("50 further steps after resuming are bit-equal", 96, "scorecard", "s05"),
    "S6": Line("killed twenty times in one run: bit-equal at the end", 5, "scorecard", "s06"),
    "S7": Line(
        "Trainer, Accelerate and Lightning resume bit-equal at eight points of two epochs", 24, "recipes", "s07"
    ),
    "S8": Line("losses of 100 steps, selection off and on, equal those on file", 200, "scorecard", "s08"),
    "S9": Line("two ranks (DDP, FSDP2) pick what one process does; losses within 1e-6", 400, "ranks", "s09_two"),
    "S9 many": Line(
        "four and eight ranks (DDP, FSDP2, hybrid sharding) pick what one process does", 300, "ranks", "s09_four"
    ),
    "S11": Line("gradients of accumulated steps equal those of one large batch within 1e-6", 8, "scorecard", "s11"),
    "S12": Line("nan or infinite numbers end the run before the update, exit code 3", 14, "scorecard", "s12_a_number"),
    "S12 ranks": Line("all ranks stop at the same step, whichever is hit", 28, "scorecard", "s12_all_ranks"),
    "A1, A2": Line("pools in which no bad candidate is picked", 10_000, "scorecard", "s12_no_bad", 1_000_000),
    "S14": Line("scores do not depend on padding, company, copies and chunks (worst: of a loss)", 40, "laws", "s14"),
    "S15": Line(
        "scoring and importing leave models, random states and globals as they were",
        111,
        "guests families",
        "leaves_everything_as_it_found_it or leaves_a_model_of_a_derived or import_changes",
    ),
    "S16": Line(
        "a rank killed or standing still ends the others; a slow one changes nothing", 30, "rank_faults", "s16"
    ),
    "S17": Line("uneven pools: no rank waits, no row is trained on twice", 200, "rank_faults", "s17", 10_000),
    "S18": Line("a signal ends the run, saved or clean (worst: seconds)", 25, "scorecard", "s18_a_signal"),
    "S21": Line(
        "data that cannot be read are refused, with the name of the file",
        129,
        "corpus tokens images workloads streaming",
        "refused or damaged or truncated or malformed or broken or is_no_archive or not_utf8 or cannot_be_read",
    ),
    "S24": Line("ten million samples are remembered exactly: pools of 65,536", 1000, "laws", "s24"),
    "S25": Line("rates, updates, samples and tokens of three epochs add up, by ten schedules", 20, "laws", "s25"),
    "S30": Line("a line of code that keeps a promise is missed when it is gone", 13, "mutants", "s30"),
    "at once": Line("ten runs at once on one machine end as one alone", 10, "scorecard", "runs_at_once"),
    "picks": Line(
        "the same picks again, with workers, on two threads, compiled and in other chunks, by every score",
        40,
        "determinism",
        "picks",
    ),
    "S26": Line(
        "a program in place of a file that is read never runs",
        37,
        "security images pretrain_run",
        "s26 or a_pickle_in_an_archive_never_runs or nothing_in_a_checkpoint_is_executed",
    ),
    "S27": Line("hostile text in any field of a report is shown as text", 40, "report", "s27"),
    "S28": Line(
        "hostile names are names, what unpacks to far too much is refused, secrets stay secret", 56, "security", "s28"
    ),
    "S22": Line("out of memory in scoring: chunks halve, the same picks", 8, "sifter", "s22"),
}
ELSEWHERE = {
    "S10": (
        "another number of processes resumes exactly, or is refused",
        "refused where it could not be exact: [below](#what-the-lines-mean-here)",
    ),
    "S13": (
        "what selection does with wrong labels, copies and rare classes",
        "[curves](results.md#hazards-of-selection)",
    ),
    "S19": (
        "20 kills an hour under torchrun: at most 18 s lost by each, 90 % of the time effective, bit-equal",
        "[endurance](results.md#endurance)",
    ),
    "S20": ("bad input ends with a clear error, and nothing is lost", "[what is refused](#what-is-refused)"),
    "S23": (
        "20,000 steps of `pretrain`: memory grows by at most 2 %, steps slow down by at most 5 %, nothing piles up",
        "[endurance](results.md#endurance)",
    ),
}
"""Lines of the bar that are no tests: what holds, and where it stands."""
NOT_RUN = {
    "S29": "tests/test_structure.py in `make test`; `make audit` needs pypi.org, which could not be reached",
    "S31": "nothing has been released yet",
}
"""Lines of the bar that have no cases here, and why, or where what there is of them."""


def main() -> int:
    """Run the lines that are named, or all, that have no result of this commit yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="*", metavar="line", help=f"of {', '.join(LINES)} (default: all)")
    parser.add_argument("--long", action="store_true", help="as many cases as for a release")
    parser.add_argument("--so-far", action="store_true", help="run nothing; note what is known of lines that were cut")
    given = parser.parse_args()
    if unknown := [name for name in given.lines if name not in LINES]:
        parser.error(f"unknown lines: {', '.join(unknown)}")
    commit = versions.commit()
    for name in given.lines or LINES:
        line = LINES[name]
        bar = line.long if given.long and line.long else line.cases
        path = OUTCOMES / str(commit) / f"{name}{' long' if given.long else ''}.jsonl"
        if given.so_far and not path.is_file():
            continue
        result = _results().get(name, {})
        if result.get("commit") == commit and result["cases"] >= bar:
            print(f"{name}: there is a result of {commit}")
            continue
        print(f"{name}: {line.what}", flush=True)
        if not given.so_far:
            _run(name, path, long=given.long)
        found = {
            "what": line.what,
            "cases": bar,
            **summary(path.read_text(encoding="utf-8").splitlines()),
            "commit": commit,
            "machine": environment.machine(torch.device("cpu")),
            "versions": versions.installed(),
        }
        known = _results() | {name: found}  # other lines may have ended meanwhile
        write_json(RESULTS, {each: known[each] for each in LINES if each in known})
        if not given.so_far:
            path.unlink()
        print(f"{name}: {found['passed']} of {bar}", flush=True)
    known = _results()
    return 0 if all(name in known and known[name]["passed"] >= known[name]["cases"] for name in LINES) else 1


def _results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.is_file() else {}


def _run(name: str, path: Path, *, long: bool) -> None:
    """Run the cases of a line that have no outcome in this file yet."""
    if path.parent.name.endswith("-dirty"):
        shutil.rmtree(path.parent, ignore_errors=True)  # the source may have changed since
    path.parent.mkdir(parents=True, exist_ok=True)
    tests = [str(ROOT / "tests" / f"test_{file}.py") for file in LINES[name].files.split()]
    options = ["-p", "outcomes", "-p", "no:cacheprovider", "-k", LINES[name].names]
    environ = os.environ | {"EARLYSIFT_SCORECARD": "long" if long else "1", "EARLYSIFT_OUTCOMES": str(path)}
    environ["PYTHONPATH"] = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "pytest", "-q", *tests, *options]
    code = subprocess.run(command, cwd=ROOT, env=environ, check=False).returncode
    if code not in _ENDED:
        sys.exit(f"{name} was cut (pytest ended with {code}). The same command goes on behind {path}.")


def summary(outcomes: list[str]) -> dict[str, Any]:
    """What came of cases: how many passed, which failed, what they told, and their seconds.

    Args:
        outcomes: Lines of tests/outcomes.py. A test may have tried several cases, which it tells.
    """
    rows = [json.loads(line) for line in outcomes]
    failed = {row["case"] for row in rows if row["outcome"] != "passed"}
    good = [row for row in rows if row["case"] not in failed]
    told = [(str(name), str(value)) for row in good for name, value in row["properties"]]
    counts = [sum(int(value) for name, value in row["properties"] if name == "cases") or 1 for row in good]
    worst = [float(value) for name, value in told if name == "worst"]
    within = sum(name == "within a save" for name, _ in told)
    return {
        "passed": sum(counts),
        "tried": sum(counts) + len(failed),
        "failed": sorted(case.rpartition("::")[2] for case in failed),
        "detail": [
            *dict.fromkeys(value for name, value in told if name == "detail"),
            *([f"largest {max(worst):.2g}"] if worst else []),
            *([f"{within} within a save"] if within else []),
        ],
        "seconds": round(sum(row["seconds"] for row in rows)),
    }


if __name__ == "__main__":
    sys.exit(main())
