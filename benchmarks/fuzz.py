"""Try what should be refused, and see that it is: ``python benchmarks/fuzz.py [KIND ...] [--every N]``.

Calls of the command line, settings, inputs of the library and saved states, each in a process and a folder of its own
that holds good runs and files of others. Counts what came of them (`fuzz_trying.OUTCOMES`), and writes every case with
its exit code and the first line of its error into benchmarks/results/fuzz.json. The same seed gives the same cases.

Exit code 1 if any case ended in a traceback, lost data, left something behind, had no end, or took nonsense.
"""

import argparse
import os
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch

import fuzz_calls
import fuzz_objects
import fuzz_world
import measuring
from earlysift.files import write_json
from fuzz_trying import BAD, OUTCOMES, Case, Tried, try_all

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
REAL = 20
"""Calls that are made again as real processes."""


def cases(seed: int) -> list[Case]:
    """Everything that is tried."""
    calls = fuzz_calls.cases(seed)
    return [*calls, *(_real(case) for case in calls[:: len(calls) // REAL][:REAL]), *fuzz_objects.cases()]


def _real(case: Case) -> Case:
    """A call again, as a process that starts from nothing."""

    def act() -> None:
        captured = case.act.__closure__ or ()
        (arguments,) = (cell.cell_contents for cell in captured)
        os.execv(sys.executable, [sys.executable, "-m", "earlysift", *arguments])

    return Case(**{**vars(case), "kind": "command line, real process", "act": act})


def main() -> int:
    """Try everything that is asked for, print the counts, and write the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", nargs="*", help="kinds to try, by a part of their name (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of cases (default: 0)")
    parser.add_argument(
        "--every", type=int, default=1, help="try every Nth case of a kind only (then nothing is written without --out)"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cases at a time (default: one per core)")
    parser.add_argument("--out", type=Path, help="where to write (default: benchmarks/results/fuzz.json)")
    given = parser.parse_args()
    chosen = [case for case in cases(given.seed) if not given.kind or any(part in case.kind for part in given.kind)]
    kinds = dict.fromkeys(case.kind for case in chosen)
    some = [case for kind in kinds for case in [each for each in chosen if each.kind == kind][:: given.every]]
    tried = run(some, jobs=given.jobs)
    show(tried)
    whole = not given.kind and given.every == 1
    if given.out or whole:
        out = given.out or RESULTS
        write_json(out, {**measuring.about(), "seed": given.seed, "counts": counts(tried), "cases": listed(tried)})
        print(out)
    return 1 if any(result.outcome in BAD for _, result in tried) else 0


def run(chosen: list[Case], *, jobs: int) -> list[tuple[Case, Tried]]:
    """Try cases; gives them in their order."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        world = Path(scratch) / "world"
        world.mkdir()
        fuzz_world.build(world)
        found = {}
        for number, (case, tried) in enumerate(try_all(chosen, world, jobs=jobs), start=1):
            found[id(case)] = tried
            if tried.outcome in BAD:
                print(f"{number}/{len(chosen)} {tried.outcome}: {case.kind}: {case.name}\n    {tried.said}", flush=True)
    return [(case, found[id(case)]) for case in chosen]


def counts(tried: list[tuple[Case, Tried]]) -> dict[str, dict[str, int]]:
    """By kind: how many were tried, and what came of them."""
    table: dict[str, dict[str, int]] = {}
    for kind in dict.fromkeys(case.kind for case, _ in tried):
        found = Counter(result.outcome for case, result in tried if case.kind == kind)
        table[kind] = {"tried": found.total(), **{outcome: found[outcome] for outcome in OUTCOMES}}
    return table


def listed(tried: list[tuple[Case, Tried]]) -> list[dict[str, Any]]:
    """Every case as a row."""
    return [{"kind": case.kind, "case": case.name, **result._asdict()} for case, result in tried]


def show(tried: list[tuple[Case, Tried]]) -> None:
    """Print the counts."""
    columns = ("tried", *OUTCOMES)
    print(f"{'':28}" + "".join(f"{name:>13}" for name in columns))
    for kind, row in counts(tried).items():
        print(f"{kind:28}" + "".join(f"{row[name]:13}" for name in columns))


if __name__ == "__main__":
    sys.exit(main())
