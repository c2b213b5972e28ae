"""Dataclasses held against the annotations of their fields: all problems at once, one line each.

Command line, config file and API are checked alike, as all three build the dataclass. A field says what it takes by its
type and `pydantic.Field`: ``batch: Annotated[int, Field(ge=1)] = 32``. Nothing is converted, but for what JSON and TOML
cannot say: lists become tuples, texts paths.
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
"""Names of the fields that it reads, and what is wrong with them together: "" if nothing is."""

Count = Annotated[int, Field(ge=1)]
Above0 = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]
Keep = Annotated[float, Field(gt=0, le=1)]
Accuracy = Annotated[float, Field(gt=0, lt=1)]

LARGEST_POOL = 2**20
"""Most candidates of a step: more is a mistake in ``keep``, and fills the memory."""

_KINDS: dict[Any, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "a path"}
_OF_KIND = ("greater_than", "less_than", "multiple_of", "string_pattern", "literal")


class Unfit(ValueError):
    """Settings that do not fit, with a line for every problem."""


def hold(settings: Any, rules: Iterable[Rule] = ()) -> None:
    """Hold the fields of a dataclass against their annotations, and against rules; for its ``__post_init__``.

    Args:
        settings: The instance, frozen or not; its lists become tuples and its texts paths where fields want those.
        rules: What fields must be together; a rule is left out if a field that it reads has a problem of its own.

    Raises:
        Unfit: With one line for every problem: the field, what was expected, what came.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Training:
        ...     batch: Count = 32
        ...     keep: Keep = 0.5
        ...     __post_init__ = hold
        >>> Training(batch=8).batch
        8
        >>> Training(batch="many", keep=2.0)
        Traceback (most recent call last):
            ...
        earlysift.schema.Unfit: batch must be a whole number, at least 1, got 'many'.
        keep must be in (0, 1], got 2.0.
    """
    problems: list[str] = []
    bad = set()
    kind: type = type(settings)
    for name, (hint, adapter) in _adapters(kind).items():
        try:
            value = adapter.validate_python(_as(hint, getattr(settings, name)))
        except ValidationError as error:
            bad.add(name)
            problems += _sentences(name, hint, error)
        else:
            object.__setattr__(settings, name, value)
    problems += [said for names, rule in rules if bad.isdisjoint(names) and (said := rule(settings))]
    if problems:
        raise Unfit("\n".join(problems))


def fits(settings: Any) -> str:
    """The rule that a pool of ``batch / keep`` fits into memory."""
    rows = settings.batch / settings.keep
    if rows <= LARGEST_POOL:
        return ""
    return f"batch / keep is a pool of {rows:.3g} samples; expected at most {LARGEST_POOL}: give a larger keep."


POOL_FITS: Rule = (("batch", "keep"), fits)


@functools.cache
def _adapters(kind: type) -> dict[str, tuple[Any, TypeAdapter[Any]]]:
    strict = ConfigDict(strict=True, allow_inf_nan=False)
    hints = get_type_hints(kind, include_extras=True)
    return {name: (hint, TypeAdapter(hint, config=strict)) for name, hint in hints.items()}


def _as(hint: Any, value: Any) -> Any:
    """A value of JSON or TOML, which know neither paths nor tuples, as its field wants it."""
    kind = _kind(hint)
    if get_origin(kind) is tuple and isinstance(value, list | tuple | str):
        return tuple(_as(get_args(kind)[0], item) for item in ([value] if isinstance(value, str) else value))
    if kind is Path and isinstance(value, str | Path):
        return str(value) if "\0" in str(value) else Path(value)  # no path of any system, so not one for the schema
    return value


def _kind(hint: Any) -> Any:
    """What a hint says without what bounds it, and without that it may be None."""
    while get_origin(hint) in (Annotated, Union, types.UnionType):
        hint = next(each for each in get_args(hint) if each is not type(None))
    return hint


def _bounds(hint: Any) -> str:
    """The bounds that a hint gives, in words: "at least 1", "in (0, 1]", "a multiple of 32"."""
    found: dict[str, Any] = {}
    while get_origin(hint) in (Annotated, Union, types.UnionType):
        first, *others = get_args(hint)
        for field in (each for each in others if isinstance(each, FieldInfo)):
            if field.description:
                return field.description
            found |= {slot: value for part in field.metadata for slot, value in _limits(part).items()}
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


def _limits(part: Any) -> dict[str, Any]:
    """The bounds of one piece of metadata by their names."""
    return {slot: getattr(part, slot) for slot in ("ge", "gt", "le", "lt", "multiple_of") if hasattr(part, slot)}


def _sentences(name: str, hint: Any, error: ValidationError) -> list[str]:
    """One line for each problem of a field."""
    sentences = []
    for problem in error.errors(include_url=False, include_context=False):
        place, at = hint, name
        for step in problem["loc"]:
            place, at = get_args(_kind(place))[0], f"{at}[{step}]"
        came = problem["input"]
        bounds, kind = _bounds(place), _kind(place)
        if isinstance(came, float) and not math.isfinite(came):
            what = "not a number (nan)" if math.isnan(came) else f"infinite ({came})"
            sentences.append(f"{at} is {what}; give a finite number{f', {bounds}' * bool(bounds)}.")
            continue
        if not (bounds and problem["type"].startswith(_OF_KIND)):
            bounds = ", ".join(filter(None, (_name(kind), bounds)))
        sentences.append(f"{at} must be {bounds}, got {reprlib.repr(came)}.")
    return sentences


def _name(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if get_origin(kind) is tuple:
        return f"a list, each of it {_name(_kind(get_args(kind)[0]))}"
    return _KINDS.get(kind, str(kind))
