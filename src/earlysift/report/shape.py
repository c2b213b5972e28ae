"""The schema of the parts of results.json that the report reads: they may be missing or null, but of no other type."""

import json
import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Strict, TypeAdapter, ValidationError

Number = Annotated[float, Strict()] | None
Whole = Annotated[int, Strict()] | None
Flag = Annotated[bool, Strict()] | None
Numbers = dict[str, Number] | None
Points = list[Numbers] | None
Words = dict[str, Any] | None


@dataclass
class _Run:
    seed: Whole = None
    finished: Flag = None
    steps: Whole = None
    wall_s: Number = None
    spent_s: Numbers = None
    final_accuracy: Number = None
    final_loss: Number = None
    curve: Points = None
    fidelity: Points = None
    control: list[Words] | None = None
    events: list[Words] | None = None


@dataclass
class _Arm:
    label: str | None = None
    description: str | None = None
    source: str | None = None
    charged: Flag = None
    runs: list[_Run | None] | None = None


@dataclass
class _Results:
    complete: Flag = None
    verdict: str | None = None
    config: Words = None
    data: Words = None
    machine: Words = None
    versions: Words = None
    method: Words = None
    target: Words = None
    baseline: Numbers = None
    operations_ms: dict[str, Numbers] | None = None
    calibrated_ms: dict[str, Numbers] | None = None
    charged_ms: list[list[Numbers]] | None = None
    measured_ms: dict[str, Numbers] | None = None
    arms: dict[str, _Arm | None] | None = None
    comparison: dict[str, Words] | None = None


_SHAPE = TypeAdapter(_Results)
_KINDS = {"float": "a number", "int": "a whole number", "bool": "true or false", "string": "text", "list": "a list"}


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: If it is damaged.
    """
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Expected JSON in {path}, found damaged text ({error}). Restore the file or repeat the comparison."
        ) from error


def require_shape(results: Any, path: Path) -> None:
    """Raise unless the content of a file has the schema of results.

    Args:
        results: The content of the file.
        path: The file, for the message.

    Raises:
        ValueError: Names the file and the first part of another type.

    Example:
        >>> require_shape({"arms": {"sift": {"runs": 5}}}, Path("results.json"))
        Traceback (most recent call last):
            ...
        ValueError: Expected the results of a comparison in results.json, but arms.sift.runs should be a list, not 5.
    """
    if not isinstance(results, dict):
        raise ValueError(
            f"Expected the results of a comparison in {path}, found {reprlib.repr(results)}. Give the folder that "
            "`earlysift compare` wrote."
        )
    try:
        _SHAPE.validate_python(results)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_context=False)[0]
        kind = _KINDS.get(problem["type"].partition("_")[0], "a mapping")
        raise ValueError(
            f"Expected the results of a comparison in {path}, but {'.'.join(map(str, problem['loc']))} should be "
            f"{kind}, not {reprlib.repr(problem['input'])}."
        ) from error
