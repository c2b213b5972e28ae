"""The run folder: whether a run may go into it, what a resumed run reads there, and what a new one may delete."""

import dataclasses
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
from earlysift.report.shape import read_json, require_shape

CONFIG = "config.json"
LEDGERS = "ledgers"
ENCODER = "encoder"
LOGS = "logs"
PROGRAM, SUITE = "compare", "compare --suite"
"""The program named by the marker of a run folder, and of the folder of a suite."""
_PAGE = "report.html"
_FILES = (RESULTS, CONFIG, _PAGE, "curves.png")
_LEDGER = re.compile(r"(.+)-seed\d+\.jsonl")
_OWN = {folders.LOCK, folders.MARKER}
_MAY_GROW = ("seeds", "arms")
_TIMED = ("operations_ms", "calibrated_ms")
_NEEDED = ("complete", "config", "machine", "data", "arms", "measured_ms", "charged_ms", *_TIMED)
_CONFIG_NEEDED, _RUN_NEEDED = ("arms", "seeds", "budget", "evaluations"), ("seed", "finished", "curve", "spent_s")


def inspect(
    folder: Path, identity: dict[str, object], *, resume: bool = False, force: bool = False
) -> dict[str, Any] | None:
    """Check that a run may go into a folder, and read the results so far if a run is resumed; changes nothing.

    A folder belongs to a comparison if its marker says so. A folder from before there were markers is recognised by its
    results and config: it can be resumed, but not replaced.

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
    if not _can_resume(previous):
        raise ValueError(
            f"The file {folder / RESULTS} is JSON, but not the results of a comparison. Restore it, start anew by "
            "--force, or choose another --out."
        )
    _require_same(previous["config"], identity)
    return previous


def clear(folder: Path) -> None:
    """Delete the files of an earlier comparison, by name; other files, and what links lead to, stay."""
    names = _known_files(folder)
    parts = [str(path.with_name(f".{path.name}.part")) for path in map(Path, names)]
    folders.remove_known(folder, [*names, *parts])
    for inner in (folder / LEDGERS, folder / ENCODER):
        if inner.is_dir() and not inner.is_symlink() and not any(inner.iterdir()):
            inner.rmdir()


@contextmanager
def suite_folder(folder: Path, workloads: Iterable[str]) -> Iterator[None]:
    """Lock the folder of a suite, which holds a run folder for each workload.

    Args:
        folder: The folder.
        workloads: Names of all workloads of the suite.

    Raises:
        FileExistsError: If it belongs to another program, or another process holds it.
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
    names = sorted(path.name for path in ledgers.iterdir()) if ledgers.is_dir() and not ledgers.is_symlink() else []
    return [
        *_FILES,
        *(f"{ENCODER}/{name}" for name in encoder),
        *(f"{LEDGERS}/{name}" for name in names if (match := _LEDGER.fullmatch(name)) and match[1] in ARMS),
    ]


def _is_comparison(folder: Path) -> bool:
    """Whether a folder without a marker is one of `earlysift compare`, by its results and config."""
    paths = (folder / RESULTS, folder / CONFIG)
    if any(path.is_symlink() or not path.is_file() for path in paths):
        return False
    try:
        results, config = map(read_json, paths)
    except ValueError:
        return False
    return _can_resume(results) and isinstance(config, dict) and config.keys() == results["config"].keys()


def _can_resume(results: Any) -> bool:
    """Whether results have the shape of those of a comparison, and all that a resumed run needs."""
    try:
        require_shape(results, Path(RESULTS))
    except ValueError:
        return False
    results = {"calibrated_ms": {}, "charged_ms": []} | results  # runs have them since prices follow the steps
    if results.get("version") != RESULTS_VERSION or not _has(results, _NEEDED):
        return False
    config, arms = results["config"], results["arms"]
    settings = {field.name for field in dataclasses.fields(Settings)}
    threads = results["machine"].get("threads")
    return (
        _has(config, _CONFIG_NEEDED)
        and config.keys() <= settings
        and arms.keys() <= ARMS.keys()
        and all(_has(arm, ("runs",)) for arm in arms.values())
        and all(_has(run, _RUN_NEEDED) for arm in arms.values() for run in arm["runs"])
        and all(_has(timing, ("median",)) for part in _TIMED for timing in results[part].values())
        and all(_has(table, ("train",)) for tables in results["charged_ms"] for table in tables)
        and (threads is None or (isinstance(threads, int) and threads > 0))
    )


def _has(part: dict[str, Any] | None, names: Iterable[str]) -> bool:
    return part is not None and all(part.get(name) is not None for name in names)


def _has_runs(folder: Path) -> bool:
    """Whether there is something to lose: results with a run, or that cannot be read."""
    path = folder / RESULTS
    if not path.is_file():
        return False
    try:
        results = read_json(path)
    except ValueError:
        return True
    return not _can_resume(results) or any(arm["runs"] for arm in results["arms"].values())


def _require_same(saved: dict[str, Any], now: dict[str, object]) -> None:
    saved = Settings().identity() | saved  # a setting that is newer than the run had its default
    differing = [
        f"{key}: was {was!r}, is {value!r}" for key, was, value in differences(saved, now) if key not in _MAY_GROW
    ]
    if differing:
        raise ValueError(
            f"The run to resume had other settings ({'; '.join(differing)}). Give the same, or choose another --out."
        )
