"""The run folder: what may be written where, and files that are whole or not there."""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

RESULTS = "results.json"
LEDGERS = "ledgers"


def open_folder(folder: Path, identity: dict[str, object], *, resume: bool, force: bool) -> dict[str, Any] | None:
    """Make the run folder ready; returns the results so far when a run is resumed.

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
    if occupied and force:
        for name in (RESULTS, "report.html", "curves.png"):
            (folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / LEDGERS, ignore_errors=True)
    previous = read_results(folder) if occupied and resume else None
    if previous is not None:
        _require_same(previous.get("config", {}), identity)
    folder.mkdir(parents=True, exist_ok=True)
    return previous


def read_results(folder: Path) -> dict[str, Any]:
    """The results of a run folder.

    Raises:
        ValueError: If they are damaged.
    """
    path = folder / RESULTS
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}). Start again with --force.") from error
    assert isinstance(results, dict)
    return results


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is either the new one, whole, or the previous one, untouched (disk full, killed)."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def _require_same(saved: dict[str, Any], now: dict[str, object]) -> None:
    plain = json.loads(json.dumps(now))
    differing = [
        f"{key}: was {saved.get(key)!r}, is {plain.get(key)!r}"
        for key in sorted(saved.keys() | plain.keys())
        if key != "seeds" and saved.get(key) != plain.get(key)  # seeds may be added
    ]
    if differing:
        raise ValueError(
            f"The run to resume had other settings ({'; '.join(differing)}). Give the same, or choose another --out."
        )
