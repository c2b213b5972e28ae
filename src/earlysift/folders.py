"""Run folders: the program that a folder belongs to, and a lock for the one process that writes into it."""

import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from earlysift.files import write_json

MARKER = ".earlysift.json"
"""Names the owner of a run folder: ``program``, ``version``, and further facts of that program."""
LOCK = ".lock"
_LOG = logging.getLogger("earlysift")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Create a run folder if needed, and lock it; the lock ends with the process, however that ends.

    Raises:
        FileExistsError: If another process holds the lock.
        OSError: If the folder cannot be created or written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OSError(
            f"Nothing can be written into {folder} ({error.strerror}). Make it writable, or choose another --out."
        ) from error
    with os.fdopen(descriptor, "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers of the loader would inherit a flock
        except (BlockingIOError, PermissionError) as error:
            raise FileExistsError(
                f"Another process trains in {folder}. Wait until it has ended, or choose another --out."
            ) from error
        except OSError as error:
            _LOG.warning("%s cannot be locked (%s): do not start a second run in it.", folder, error)
        yield


def require_unlocked(folder: Path) -> None:
    """Raise `FileExistsError` if another process holds the lock of a folder; changes nothing."""
    lock = folder / LOCK
    if lock.is_file() and not lock.is_symlink():
        with locked(folder):
            pass


def mark(folder: Path, program: str, **facts: Any) -> None:
    """Write the marker of a folder; only for the process that holds its lock."""
    write_json(folder / MARKER, {"program": program, "version": metadata.version("earlysift"), **facts})


def marker(folder: Path) -> dict[str, Any]:
    """The content of the marker of a folder; empty if there is none that this library wrote."""
    path = folder / MARKER
    if path.is_symlink() or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("program"), str) else {}


def require_writable(folder: Path, flag: str = "--out") -> None:
    """Raise unless files can be written into this folder, which need not exist yet; changes nothing.

    Args:
        folder: The folder.
        flag: The command-line flag that names it, for the message.

    Raises:
        FileExistsError: If it is a file, or would lie within one.
        PermissionError: If it is not writable.
    """
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise FileExistsError(f"Expected a folder at {nearest}, found a file. Choose another {flag}.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(f"Nothing can be written into {nearest}. Make it writable, or choose another {flag}.")


def require_available(folder: Path) -> None:
    """`require_writable` for a run folder, which must not be a link.

    Raises:
        FileExistsError: If it is a file or a link, or would lie within a file.
        PermissionError: If it is not writable.
    """
    if folder.is_symlink():
        raise FileExistsError(
            f"Expected a folder for the run at {folder}, found a link to {folder.readlink()}. Give --out where it "
            "leads to, or another folder."
        )
    require_writable(folder)


def require_plain(folder: Path, *, files: Iterable[str] = (), folders: Iterable[str] = ()) -> None:
    """Raise unless everything that a run writes stays within its own folder.

    Args:
        folder: The run folder.
        files: Files that a run writes, as paths within the folder. They need not exist.
        folders: Folders that it writes, likewise.

    Raises:
        FileExistsError: If one of them is a link, or is a folder instead of a file or a file instead of a folder.
    """
    for kind, names, is_kind in (("folder", folders, Path.is_dir), ("file", files, Path.is_file)):
        for path in (folder / name for name in names):
            if path.is_symlink():
                raise FileExistsError(
                    f"{path} is a link to {path.readlink()}, and a run writes only within its own folder. Remove "
                    "the link, or choose another --out."
                )
            if path.exists() and not is_kind(path):
                raise FileExistsError(f"{path} is not the {kind} that a run writes there. Choose another --out.")


def remove_known(folder: Path, names: Iterable[str]) -> None:
    """Delete plain files by name; links, folders and other files stay."""
    for name in names:
        path = folder / name
        if path.is_file() and not path.is_symlink():
            path.unlink()
