"""Settings from a TOML or JSON file, the fields of a dataclass by name; and where two sets of settings differ."""

import dataclasses
import json
import reprlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def read_settings(path: Path, kind: type[Settings]) -> Settings:
    """Settings from a TOML or JSON file.

    Args:
        path: The file.
        kind: The dataclass that the file fills, and that holds its fields against their types (`earlysift.schema`).

    Raises:
        ValueError: If the file is neither, has a key that is not a setting, or a value that does not fit.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a TOML or JSON file with settings at {path}, found none.")
    name, parse = ("JSON", json.loads) if path.suffix == ".json" else ("TOML", tomllib.loads)
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a {name} file: {error}.") from error
    except RecursionError as error:
        raise ValueError(f"{path} is not a {name} file of settings: it is nested too deeply.") from error
    if not isinstance(values, dict):
        raise ValueError(f"Expected settings by name in {path}, got {reprlib.repr(values)}.")
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ValueError(f"{path} has unknown settings {unknown}; known are {', '.join(sorted(fields))}.")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Where two sets of settings differ: name, what was saved, what is now, by name; None stands for what is missing.

    Example:
        >>> differences({"keep": 0.5, "seed": 0}, {"keep": 0.25, "seed": 0, "trim": True})
        [('keep', 0.5, 0.25), ('trim', None, True)]
    """
    names = sorted(saved.keys() | now.keys())
    return [(name, saved.get(name), now.get(name)) for name in names if saved.get(name) != now.get(name)]
