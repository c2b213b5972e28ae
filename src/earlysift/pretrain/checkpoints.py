"""Checkpoints that are whole or not used: a manifest with the digest of every file, written last.

The Trainer writes a folder file by file. Here the folder is sealed when all of it is there; without a seal that fits,
it is cut or damaged, and the one before is used.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers.trainer_pt_utils import safe_globals

from earlysift.config_files import differences
from earlysift.files import json_text, remove_parts, write_json

MANIFEST = "manifest.json"
_VERSION = 2  # of the manifest; count up when older ones cannot be read
_PREFIX = "checkpoint-"  # the Trainer's
_KEPT = 2
_READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_bytes()),
    ".pt": partial(torch.load, map_location="cpu", weights_only=True),
    ".pth": partial(torch.load, map_location="cpu", weights_only=True),
    ".safetensors": partial(safe_open, framework="pt"),
}
_LOG = logging.getLogger("earlysift")


def folder_of(run: Path, step: int) -> Path:
    """Where the Trainer puts the checkpoint of a step."""
    return run / f"{_PREFIX}{step}"


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of a checkpoint that is complete; it holds the step, so that a renamed folder is noticed.

    Args:
        folder: The checkpoint.
        about: What a run must have in common with this one to go on from it.
    """
    files = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    content = {"version": _VERSION, "step": _step(folder), "about": dict(about), "files": files}
    write_json(folder / MANIFEST, {"sha256": _digest_of(content), **content})


def latest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The latest sound checkpoint of a run and what its manifest says it is about; None if there is none.

    Later ones that are cut or damaged are named in a warning.

    Raises:
        ValueError: If the manifest is of another version.
    """
    for folder in reversed(_folders(run)):
        problem, about = _verified(folder)
        if not problem:
            return folder, about
        _LOG.warning("%s is not used: %s.", folder, problem)
    return None


def prune(run: Path) -> None:
    """Delete all checkpoints but the latest two that are sealed."""
    sealed = [folder for folder in _folders(run) if (folder / MANIFEST).is_file()]
    for folder in _folders(run):
        if folder not in sealed[-_KEPT:]:
            shutil.rmtree(folder)


def tidy(run: Path) -> None:
    """Delete what a killed run left half written: checkpoints without a manifest, and parts of files."""
    for folder in _folders(run):
        if not (folder / MANIFEST).is_file():
            shutil.rmtree(folder)
    for folder in (run, run / "ledgers"):
        remove_parts(folder)


def unloadable(folder: Path) -> list[str]:
    """Files of a checkpoint that cannot be read, or not without executing what is in them."""
    found = []
    for path in sorted(folder.iterdir()):
        try:
            with safe_globals():  # the Trainer's: random states of NumPy
                _READERS.get(path.suffix, Path.stat)(path)
        except Exception:  # whatever a reader makes of a file that is no such file
            found.append(path.name)
    return found


def require_same(folder: Path, saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on from the checkpoint of another training.

    Raises:
        ValueError: If anything differs; lists what.
    """
    differing = [f"{key}: was {was!r}, is {value!r}" for key, was, value in differences(saved, now)]
    if differing:
        raise ValueError(
            f"{folder} is a checkpoint of another training ({'; '.join(differing)}). Resume with the same, or start "
            "anew in another --out."
        )


def _folders(run: Path) -> list[Path]:
    """Folders of checkpoints, by step."""
    found = [path for path in run.glob(f"{_PREFIX}*") if path.is_dir() and path.name[len(_PREFIX) :].isdecimal()]
    return sorted(found, key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _verified(folder: Path) -> tuple[str, dict[str, Any]]:
    """What is wrong with a checkpoint (nothing if empty), and what it is about."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"incomplete, it has no {MANIFEST}", {}
    try:
        content = json.loads(manifest.read_bytes())
        # By its bytes, too: 1e-05 and 1E-05 are the same number.
        sound = json_text(content).encode() == manifest.read_bytes()
        sound = content.pop("sha256") == _digest_of(content) and sound
    except (ValueError, AttributeError, KeyError, TypeError):
        sound = False
    if not sound:
        return f"{MANIFEST} is damaged", {}
    if content["version"] != _VERSION:
        raise ValueError(
            f"Expected a checkpoint of version {_VERSION} in {folder}, got {content['version']}. Use the release of "
            "earlysift that wrote it."
        )
    if content["step"] != _step(folder):
        return f"it is the checkpoint of step {content['step']}", {}
    for name, digest in content["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing", {}
        if _digest(path) != digest:
            return f"{name} is damaged", {}
    return "", content["about"]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _digest_of(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
