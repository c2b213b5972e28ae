"""The run folder: what may be written where, and what a resumed run finds there."""

import shutil
from pathlib import Path
from typing import Any

from earlysift.report.page import RESULTS, read_results
from earlysift.settings import differences

CONFIG = "config.json"
LEDGERS = "ledgers"
ENCODER = "encoder"
_MAY_GROW = ("seeds", "arms")


def open_folder(folder: Path, identity: dict[str, object], *, resume: bool, force: bool) -> dict[str, Any] | None:
    """See whether a run may go into a folder, and make it; returns the results so far when a run is resumed.

    Nothing is deleted; `clear` does that when the new run is sure to start.

    Raises:
        FileExistsError: If the folder holds another run (or other files) and neither resume nor force is given.
        ValueError: If the run to resume had other settings, or its results cannot be read.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"Expected a folder for the run at {folder}, found a file. Choose another --out.")
    results = folder / RESULTS
    occupied = folder.is_dir() and any(folder.iterdir())
    if occupied and not results.is_file():
        raise FileExistsError(
            f"The folder {folder} holds files that no comparison wrote. Choose another --out; nothing was touched."
        )
    if occupied and not (resume or force):
        raise FileExistsError(
            f"The folder {folder} holds another run. Go on with it by --resume, replace it by --force, "
            "or choose another --out."
        )
    previous = read_results(folder) if occupied and resume else None
    if previous is not None:
        _require_same(previous.get("config", {}), identity)
    folder.mkdir(parents=True, exist_ok=True)
    return previous


def clear(folder: Path) -> None:
    """Delete what an earlier comparison left in the folder, and nothing else."""
    for name in (RESULTS, CONFIG, "report.html", "curves.png"):
        (folder / name).unlink(missing_ok=True)
    for name in (LEDGERS, ENCODER):
        shutil.rmtree(folder / name, ignore_errors=True)


def _require_same(saved: dict[str, Any], now: dict[str, object]) -> None:
    differing = [
        f"{key}: was {was!r}, is {value!r}" for key, was, value in differences(saved, now) if key not in _MAY_GROW
    ]
    if differing:
        raise ValueError(
            f"The run to resume had other settings ({'; '.join(differing)}). Give the same, or choose another --out."
        )
