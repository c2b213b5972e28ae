"""The run folder: what may be written where, what a resumed run finds there, and what a new one may delete."""

import dataclasses
import json
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from earlysift import folders
from earlysift.compare.arms import ARMS
from earlysift.compare.settings import Settings
from earlysift.config_files import differences
from earlysift.pretrain import models
from earlysift.report.page import RESULTS, RESULTS_VERSION, read_results

CONFIG = "config.json"
LEDGERS = "ledgers"
ENCODER = "encoder"
LOGS = "logs"
PROGRAM, SUITE = "compare", "compare --suite"
"""What the markers of run folders say, and of the folder that a suite puts them into."""
_PAGE = "report.html"
_FILES = (RESULTS, CONFIG, _PAGE, "curves.png")
_LEDGER = re.compile(rf"({'|'.join(map(re.escape, ARMS))})-seed\d+\.jsonl")
_OWN = {folders.LOCK, folders.MARKER}
_MAY_GROW = ("seeds", "arms")
_SHAPE: dict[str, type] = {
    **{"complete": bool, "charged_ms": list},
    **dict.fromkeys(("config", "machine", "data", "arms", "operations_ms", "calibrated_ms", "measured_ms"), dict),
}


def inspect(
    folder: Path, identity: dict[str, object], *, resume: bool = False, force: bool = False
) -> dict[str, Any] | None:
    """See whether a run may go into a folder, and read the results so far when a run is resumed; changes nothing.

    A folder is a comparison's if its marker says so. One from before there were markers is known by results and
    config: it can be resumed, but not replaced.

    Raises:
        FileExistsError: If the folder holds another run (or other files) and neither resume nor force is given.
        ValueError: If the run to resume had other settings, or its results cannot be read.
        OSError: If nothing can be written there.
    """
    folders.require_available(folder)
    if not folder.is_dir() or {path.name for path in folder.iterdir()} <= {folders.LOCK}:
        return None
    program = folders.marker(folder).get("program")
    if program not in (None, PROGRAM):
        raise FileExistsError(
            f"The folder {folder} belongs to earlysift {program}. Choose another --out; nothing was touched."
        )
    unmarked = program is None
    if unmarked and not _is_comparison(folder):
        raise FileExistsError(
            f"The folder {folder} holds files that no comparison wrote. Choose another --out; nothing was touched."
        )
    folders.require_plain(folder, files=[*_OWN, *_known_files(folder)], folders=(LEDGERS, ENCODER))
    if unmarked and force:
        raise FileExistsError(
            f"The run in {folder} has no {folders.MARKER}, without which nothing is deleted. Go on with it by "
            "--resume, or choose another --out."
        )
    if not (resume or force) and _has_runs(folder):
        raise FileExistsError(
            f"The folder {folder} holds another run. Go on with it by --resume, replace it by --force, "
            "or choose another --out."
        )
    if not resume or not (folder / RESULTS).is_file():
        return None
    previous = read_results(folder)
    if not _fits(previous):
        raise ValueError(
            f"The file {folder / RESULTS} is JSON, but not the results of a comparison. Restore it, start anew by "
            "--force, or choose another --out."
        )
    _require_same(previous["config"], identity)
    return previous


def clear(folder: Path) -> None:
    """Delete what an earlier comparison left in its folder, by name; other files, and what links lead to, stay."""
    names = _known_files(folder)
    parts = [str(path.with_name(f".{path.name}.part")) for path in map(Path, names)]
    folders.remove_known(folder, [*names, *parts])
    for inner in (folder / LEDGERS, folder / ENCODER):
        if inner.is_dir() and not inner.is_symlink() and not any(inner.iterdir()):
            inner.rmdir()


@contextmanager
def suite_folder(folder: Path, workloads: Iterable[str]) -> Iterator[None]:
    """Hold the folder of a suite, whose runs lie in folders of their own within it.

    Args:
        folder: Where to.
        workloads: Names of all workloads of the suite.

    Raises:
        FileExistsError: If it belongs to something else, or another process holds it.
        OSError: If nothing can be written there.
    """
    _require_suite(folder, set(workloads))  # before anything is made there
    with folders.locked(folder):
        _require_suite(folder, set(workloads))
        folders.mark(folder, SUITE)
        yield


def _require_suite(folder: Path, workloads: set[str]) -> None:
    folders.require_available(folder)
    if not folder.is_dir():
        return
    found = {path.name for path in folder.iterdir()} - _OWN
    program = folders.marker(folder).get("program")
    runs = found & workloads
    older = program is None and found <= {LOGS, _PAGE, *runs} and all(_is_comparison(folder / name) for name in runs)
    if program != SUITE and found and not (runs and older):
        raise FileExistsError(
            f"The folder {folder} holds files that no suite wrote. Choose another --out; nothing was touched."
        )
    logs = [f"{LOGS}/{name}{suffix}" for name in workloads for suffix in (".log", ".json")]
    folders.require_plain(folder, files=[*_OWN, _PAGE, *logs], folders=[LOGS, *workloads])


def _known_files(folder: Path) -> list[str]:
    """What a comparison writes into its folder, with the ledgers that are there."""
    encoder = (models.CONFIG, models.TOKENIZER, models.WEIGHTS)
    ledgers = folder / LEDGERS
    there = sorted(path.name for path in ledgers.iterdir()) if ledgers.is_dir() and not ledgers.is_symlink() else []
    return [
        *_FILES,
        *(f"{ENCODER}/{name}" for name in encoder),
        *(f"{LEDGERS}/{name}" for name in there if _LEDGER.fullmatch(name)),
    ]


def _is_comparison(folder: Path) -> bool:
    """Whether a folder without a marker is one of `earlysift compare`: by what results and config say."""
    paths = (folder / RESULTS, folder / CONFIG)
    if any(path.is_symlink() or not path.is_file() for path in paths):
        return False
    try:
        results, config = (json.loads(path.read_bytes()) for path in paths)
    except (ValueError, RecursionError):
        return False
    return _fits(results) and isinstance(config, dict) and config.keys() == results["config"].keys()


def _fits(results: Any) -> bool:
    """Whether this is what a comparison writes into results.json."""
    if not isinstance(results, dict) or results.get("version") != RESULTS_VERSION:
        return False
    shaped: dict[str, Any] = {
        "calibrated_ms": {},
        "charged_ms": [],
    } | results  # runs have them since prices follow the steps
    if not all(isinstance(shaped.get(name), kind) for name, kind in _SHAPE.items()):
        return False
    settings = {field.name for field in dataclasses.fields(Settings)}
    config, arms = results["config"], results["arms"]
    if not {"arms", "seeds", "budget", "evaluations"} <= config.keys() <= settings or not arms.keys() <= ARMS.keys():
        return False
    runs = [run for arm in arms.values() for run in _runs(arm)]
    timings = [*shaped["operations_ms"].values(), *shaped["calibrated_ms"].values()]
    tables = [table for seed in shaped["charged_ms"] for table in (seed if isinstance(seed, list) else [seed])]
    threads = results["machine"].get("threads")
    return (
        all(isinstance(arm, dict) and isinstance(arm.get("runs"), list) for arm in arms.values())
        and all(isinstance(run, dict) and {"seed", "finished", "curve", "spent_s"} <= run.keys() for run in runs)
        and all(isinstance(timing, dict) and "median" in timing for timing in timings)
        and all(isinstance(table, dict) and "train" in table for table in tables)
        and (threads is None or (isinstance(threads, int) and threads > 0))
    )


def _runs(arm: Any) -> list[Any]:
    runs = arm.get("runs") if isinstance(arm, dict) else None
    return runs if isinstance(runs, list) else []


def _has_runs(folder: Path) -> bool:
    """Whether there is something to lose: results with a run, or that cannot be read."""
    path = folder / RESULTS
    if not path.is_file():
        return False
    try:
        results = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return True
    return not _fits(results) or any(_runs(arm) for arm in results["arms"].values())


def _require_same(saved: dict[str, Any], now: dict[str, object]) -> None:
    differing = [
        f"{key}: was {was!r}, is {value!r}" for key, was, value in differences(saved, now) if key not in _MAY_GROW
    ]
    if differing:
        raise ValueError(
            f"The run to resume had other settings ({'; '.join(differing)}). Give the same, or choose another --out."
        )
