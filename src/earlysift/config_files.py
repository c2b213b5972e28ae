"""Settings from a TOML or JSON file, as a dataclass; and the differences between two sets of settings."""

import dataclasses
import json
import reprlib
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

Settings = TypeVar("Settings")


def read_settings(path: Path, kind: type[Settings]) -> Settings:
    """Read settings from a TOML or JSON file.

    Args:
        path: The file.
        kind: The dataclass to build, which validates its own fields (`earlysift.schema`).

    Raises:
        ValueError: If the file cannot be parsed, or has an unknown key or an invalid value.
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


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The settings that differ, as (name, saved, current), sorted by name; None stands for a missing one.

    Example:
        >>> differences({"keep": 0.5, "seed": 0}, {"keep": 0.25, "seed": 0, "trim": True})
        [('keep', 0.5, 0.25), ('trim', None, True)]
    """
    names = sorted(saved.keys() | current.keys())
    return [(name, saved.get(name), current.get(name)) for name in names if saved.get(name) != current.get(name)]
