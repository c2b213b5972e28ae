"""Atomic writing of files: a file is either complete or absent."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Replace a file atomically: afterwards it holds either all of the new content or all of the old.

    This holds on a full disk, when ``write`` raises, and when the process is killed while writing.

    Args:
        path: The file.
        write: Called with the path of a temporary file, which it fills.

    Raises:
        OSError: If writing fails; the previous file is unchanged.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "note.txt"
        >>> write_whole(path, lambda part: part.write_text("new"))
        >>> path.read_text()
        'new'
    """
    part = path.with_name(f".{path.name}.part")
    try:
        write(part)
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a JSON file atomically."""
    write_whole(path, lambda part: part.write_text(json_text(content), encoding="utf-8"))


def json_text(content: Mapping[str, Any]) -> str:
    """The text that `write_json` writes."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def remove_parts(folder: Path) -> None:
    """Delete the temporary files that killed calls of `write_whole` left in a folder."""
    for part in folder.glob(".*.part"):
        part.unlink()
