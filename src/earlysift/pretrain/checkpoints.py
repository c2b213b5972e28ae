"""Checkpoints with a manifest: the digest of every file, written last.

The Trainer writes a checkpoint file by file. The manifest seals it once it is complete. A checkpoint without a matching
manifest is incomplete or damaged, and the previous one is used.
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
_VERSION = 2  # of the manifest; increment when older ones can no longer be read
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
    """The folder in which the Trainer saves the checkpoint of a step."""
    return run / f"{_PREFIX}{step}"


def seal(folder: Path, about: Mapping[str, Any]) -> None:
    """Write the manifest of a complete checkpoint; it contains the step, so that a renamed folder is detected.

    Args:
        folder: The checkpoint.
        about: Facts that must be the same in a run that resumes from it.
    """
    files = {path.name: _digest(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}
    content = {"version": _VERSION, "step": _step(folder), "about": dict(about), "files": files}
    write_json(folder / MANIFEST, {"sha256": _digest_of(content), **content})


def latest(run: Path) -> tuple[Path, dict[str, Any]] | None:
    """The latest valid checkpoint of a run and the facts in its manifest; None if there is none.

    A warning names each later one that is incomplete or damaged.

    Raises:
        ValueError: If the manifest has another version.
    """
    for folder in reversed(_folders(run)):
        problem, about = _verified(folder)
        if not problem:
            return folder, about
        _LOG.warning("%s is not used: %s.", folder, problem)
    return None


def prune(run: Path) -> None:
    """Delete all checkpoints except the latest two sealed ones; a link, and what it leads to, stays."""
    own = _own(run)
    sealed = [folder for folder in own if (folder / MANIFEST).is_file()]
    for folder in own:
        if folder not in sealed[-_KEPT:]:
            # First, so that `tidy` finds what a killed run had not deleted.
            (folder / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(folder)


def make_room(folder: Path) -> None:
    """Remove what a killed run left where a checkpoint is about to be saved; of a link, only the link."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)


def tidy(run: Path) -> None:
    """Delete incomplete output of a killed run: checkpoints without a manifest, and temporary files; links stay."""
    for folder in _own(run):
        if not (folder / MANIFEST).is_file():
            shutil.rmtree(folder)
    for folder in (run, run / "ledgers"):
        remove_parts(folder)


def unloadable(folder: Path) -> list[str]:
    """Files of a checkpoint that cannot be read, or not without executing code in them."""
    names = []
    for path in sorted(folder.iterdir()):
        try:
            with safe_globals():  # type: ignore[no-untyped-call]  # the Trainer's, for random states of NumPy
                _READERS.get(path.suffix, Path.stat)(path)
        except Exception:  # readers may fail in any way on damaged files
            names.append(path.name)
    return names


def require_same(folder: Path, saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Raise if a checkpoint belongs to another training.

    Raises:
        ValueError: With all differences.
    """
    differing = [f"{key}: was {was!r}, is {value!r}" for key, was, value in differences(saved, current)]
    if differing:
        raise ValueError(
            f"{folder} is a checkpoint of another training ({'; '.join(differing)}). Resume with the same settings, or "
            "start over in another --out."
        )


def _folders(run: Path) -> list[Path]:
    """Folders of checkpoints, by step."""
    paths = [path for path in run.glob(f"{_PREFIX}*") if path.is_dir() and path.name[len(_PREFIX) :].isdecimal()]
    return sorted(paths, key=_step)


def _own(run: Path) -> list[Path]:
    """Folders of checkpoints that may be deleted."""
    return [folder for folder in _folders(run) if not folder.is_symlink()]


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _verified(folder: Path) -> tuple[str, dict[str, Any]]:
    """The problem of a checkpoint ("" if it is valid), and the facts in its manifest."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"incomplete, it has no {MANIFEST}", {}
    try:
        content = json.loads(manifest.read_bytes())
        # The bytes are compared too, because 1e-05 and 1E-05 are the same number.
        intact = json_text(content).encode() == manifest.read_bytes()
        intact = content.pop("sha256") == _digest_of(content) and intact
    except (ValueError, AttributeError, KeyError, TypeError):
        intact = False
    if not intact:
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
