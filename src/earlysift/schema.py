"""Validation of dataclasses by the annotations of their fields: all problems at once, one line each.

Command line, config file and API share the checks, because all three build the dataclass. A field declares its values
by type and `pydantic.Field`: ``batch: Annotated[int, Field(ge=1)] = 32``. Only what JSON and TOML lack is converted:
lists to tuples, strings to paths.
"""

import functools
import math
import reprlib
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

Rule = tuple[tuple[str, ...], Callable[[Any], str]]
"""The fields that a rule reads, and a function that returns the problem of their combination, or ""."""

Count = Annotated[int, Field(ge=1)]
Above0 = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Keep = Annotated[float, Field(gt=0, le=1)]
Accuracy = Annotated[float, Field(gt=0, lt=1)]

LARGEST_POOL = 2**20
"""Upper limit of candidates per step: a larger pool points to a mistake in ``keep`` and would fill the memory."""

_KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_LIMITS = ("ge", "gt", "le", "lt", "multiple_of")
_OF_KIND = ("greater_than", "less_than", "multiple_of", "string_pattern", "literal")


class InvalidSettings(ValueError):
    """Invalid settings; the message has one line per problem."""


def validate(settings: Any, rules: Iterable[Rule] = ()) -> None:
    """Check the fields of a dataclass by their annotations and by rules; serves as its ``__post_init__``.

    Args:
        settings: The instance, frozen or not; lists become tuples and strings paths where the annotation says so.
        rules: Conditions on several fields; a rule is skipped if one of its fields is invalid by itself.

    Raises:
        InvalidSettings: With one line per problem: the field, the expected and the given value.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Training:
        ...     batch: Count = 32
        ...     keep: Keep = 0.5
        ...     __post_init__ = validate
        >>> Training(batch=8).batch
        8
        >>> Training(batch="many", keep=2.0)
        Traceback (most recent call last):
            ...
        earlysift.schema.InvalidSettings: batch must be a whole number, at least 1, got 'many'.
        keep must be in (0, 1], got 2.0.
    """
    problems: list[str] = []
    invalid = set()
    kind: type = type(settings)
    for name, (hint, adapter) in _adapters(kind).items():
        try:
            value = adapter.validate_python(_converted(hint, getattr(settings, name)))
        except ValidationError as error:
            invalid.add(name)
            problems += _sentences(name, hint, error)
        else:
            object.__setattr__(settings, name, value)
    problems += [message for names, rule in rules if invalid.isdisjoint(names) and (message := rule(settings))]
    if problems:
        raise InvalidSettings("\n".join(problems))


def _pool_size_problem(settings: Any) -> str:
    rows = settings.batch / settings.keep
    if rows <= LARGEST_POOL:
        return ""
    return f"batch / keep is a pool of {rows:.3g} samples; expected at most {LARGEST_POOL}: give a larger keep."


POOL_FITS: Rule = (("batch", "keep"), _pool_size_problem)
"""A pool of ``batch / keep`` samples fits into memory."""


@functools.cache
def _adapters(kind: type) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    hints = get_type_hints(kind, include_extras=True)
    return {name: (hint, TypeAdapter(hint, config=strict)) for name, hint in hints.items()}


def _converted(hint: Any, value: Any) -> Any:
    """A value of JSON or TOML, which have neither paths nor tuples, in the type of its field."""
    kind = _kind(hint)
    if get_origin(kind) is tuple and isinstance(value, list | tuple | str):
        return tuple(_converted(get_args(kind)[0], item) for item in ([value] if isinstance(value, str) else value))
    if kind is Path and isinstance(value, str | Path):
        return str(value) if "\0" in str(value) else Path(value)  # no valid path: the schema rejects the string
    return value


def _kind(hint: Any) -> Any:
    """The type in a hint, without its bounds and without None."""
    while get_origin(hint) in (Annotated, Union, types.UnionType):
        hint = next(each for each in get_args(hint) if each is not type(None))
    return hint


def _bounds(hint: Any) -> str:
    """The bounds in a hint, in words: "at least 1", "in (0, 1]", "a multiple of 32"."""
    found: dict[str, Any] = {}
    while get_origin(hint) in (Annotated, Union, types.UnionType):
        first, *others = get_args(hint)
        for field in (each for each in others if isinstance(each, FieldInfo)):
            if field.description:
                return field.description
            found |= {slot: getattr(part, slot) for part in field.metadata for slot in _LIMITS if hasattr(part, slot)}
        hint = first
    low, high = found.get("ge", found.get("gt")), found.get("le", found.get("lt"))
    words = [f"a multiple of {found['multiple_of']}"] if "multiple_of" in found else []
    if low is not None and high is not None:
        words.append(f"in {'[' if 'ge' in found else '('}{low}, {high}{']' if 'le' in found else ')'}")
    elif low is not None:
        words.append(f"{'at least' if 'ge' in found else 'more than'} {low}")
    elif high is not None:
        words.append(f"{'at most' if 'le' in found else 'less than'} {high}")
    return " ".join(words)


def _sentences(name: str, hint: Any, error: ValidationError) -> list[str]:
    """One line per problem of a field."""
    sentences = []
    for problem in error.errors(include_url=False, include_context=False):
        item_hint, item_name = hint, name
        for index in problem["loc"]:
            item_hint, item_name = get_args(_kind(item_hint))[0], f"{item_name}[{index}]"
        value = problem["input"]
        bounds, kind = _bounds(item_hint), _kind(item_hint)
        if isinstance(value, float) and not math.isfinite(value):
            description = "not a number (nan)" if math.isnan(value) else f"infinite ({value})"
            sentences.append(f"{item_name} is {description}; give a finite number{f', {bounds}' * bool(bounds)}.")
            continue
        if not (bounds and problem["type"].startswith(_OF_KIND)):
            bounds = ", ".join(filter(None, (_name(kind), bounds)))
        sentences.append(f"{item_name} must be {bounds}, got {reprlib.repr(value)}.")
    return sentences


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"a list, each item {_name(_kind(get_args(kind)[0]))}"
    return _KINDS.get(kind, str(kind))
