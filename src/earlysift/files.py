"""Files that are whole or not there."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Put a file in place so that it is either the new one, whole, or the previous one, untouched.

    Holds when the disk is full, when ``write`` raises, and when the process is killed in between.

    Args:
        path: The file.
        write: Writes the new content to the path that it is given.

    Raises:
        OSError: If writing fails; the previous file is then as it was.

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
    """Put a JSON file in place, whole or not at all."""
    write_whole(path, lambda part: part.write_text(json_text(content), encoding="utf-8"))


def json_text(content: Mapping[str, Any]) -> str:
    """What `write_json` writes."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def remove_parts(folder: Path) -> None:
    """Delete the parts of files that killed calls of `write_whole` left in a folder."""
    for part in folder.glob(".*.part"):
        part.unlink()
