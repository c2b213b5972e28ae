"""Run folders: which program a folder belongs to, and that one process at a time writes into it."""

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
"""Says whose a run folder is: ``program`` and ``version``, and what else that program wants to know again."""
LOCK = ".lock"
_LOG = logging.getLogger("earlysift")


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run folder, which is made if it is not there; the lock ends with the process, whatever ends it.

    Raises:
        FileExistsError: If another process holds it.
        OSError: If the folder cannot be made or written into.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise OSError(
            f"Nothing can be written into {folder} ({error.strerror}). Make it writable, or choose another --out."
        ) from error
    with open(descriptor, "r+b") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock, which workers of the loader would inherit
        except (BlockingIOError, PermissionError) as error:
            raise FileExistsError(
                f"Another process trains in {folder}. Wait until it has ended, or choose another --out."
            ) from error
        except OSError as error:
            _LOG.warning("%s cannot be locked (%s): start no second run in it.", folder, error)
        yield


def require_not_held(folder: Path) -> None:
    """Raise what `locked` does if another process holds a folder; nothing is made or changed."""
    lock = folder / LOCK
    if lock.is_file() and not lock.is_symlink():
        with locked(folder):
            pass


def mark(folder: Path, program: str, **facts: Any) -> None:
    """Write down whose a folder is; only who holds it may."""
    write_json(folder / MARKER, {"program": program, "version": metadata.version("earlysift"), **facts})


def marker(folder: Path) -> dict[str, Any]:
    """What the marker of a folder says; empty if it has none that this library wrote."""
    path = folder / MARKER
    if path.is_symlink() or not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) and isinstance(content.get("program"), str) else {}


def require_room(folder: Path) -> None:
    """See whether a run can have this folder, which may not be there yet; nothing is made or changed.

    Raises:
        FileExistsError: If it is a file or a link.
        NotADirectoryError: If it would lie within a file.
        PermissionError: If nothing can be written there.
    """
    if folder.is_symlink():
        raise FileExistsError(
            f"Expected a folder for the run at {folder}, found a link to {os.readlink(folder)}. Give --out where it "
            "leads to, or another folder."
        )
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"Expected a folder for the run at {folder}, found a file. Choose another --out.")
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise NotADirectoryError(f"{folder} cannot be made, as {nearest} is a file. Choose another --out.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"Nothing can be written into {nearest}. Make it writable, or choose another --out than {folder}."
        )


def require_plain(folder: Path, *, files: Iterable[str] = (), folders: Iterable[str] = ()) -> None:
    """See whether a run can write what it writes without leaving its own folder.

    Args:
        folder: The run folder.
        files: Files that a run writes, as paths within it. They need not be there.
        folders: Likewise.

    Raises:
        FileExistsError: If one of them is a link, or a folder where a file is written, or the other way round.
    """
    for names, right in ((folders, Path.is_dir), (files, Path.is_file)):
        for path in (folder / name for name in names):
            if path.is_symlink():
                raise FileExistsError(
                    f"{path} is a link to {os.readlink(path)}, and a run writes within its own folder only. Remove "
                    "the link, or choose another --out."
                )
            if path.exists() and not right(path):
                kind = "file" if right == Path.is_file else "folder"
                raise FileExistsError(f"{path} is not the {kind} that a run writes there. Choose another --out.")


def remove_known(folder: Path, names: Iterable[str]) -> None:
    """Delete plain files by name, and nothing else: no links, no folders, no files that are not named."""
    for name in names:
        path = folder / name
        if path.is_file() and not path.is_symlink():
            path.unlink()
