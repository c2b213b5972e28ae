"""Options of a dataclass with a rule each, so that all wrong ones are refused at once, in one sentence each.

For the core, which needs torch alone; `earlysift.schema` does the same for the settings of commands, by pydantic.
"""

import dataclasses
import math
import reprlib
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any


def option(default: Any, sound: Callable[[Any], bool], expected: str, meaning: str = "") -> Any:
    """A field with a rule.

    Args:
        default: Its default.
        sound: Whether a value can be used.
        expected: What a value must be, to go on from "keep must be".
        meaning: A sentence on what the option is, for whoever got it wrong.
    """
    return dataclasses.field(default=default, metadata={"sound": sound, "expected": expected, "meaning": meaning})


def one_of(default: str, *names: str) -> Any:
    """A field that takes one of these names."""
    return option(default, lambda value: isinstance(value, str) and value in names, " or ".join(names))


def problems(settings: Any) -> dict[str, str]:
    """What is wrong with the options of a dataclass, by name: a sentence for each that breaks its rule.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Settings:
        ...     keep: float = option(0.5, lambda keep: finite(keep) and 0 < keep <= 1, "in (0, 1]", "It is a share.")
        >>> problems(Settings(keep=2))
        {'keep': 'keep must be in (0, 1], got 2. It is a share.'}
    """
    found = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.metadata and not field.metadata["sound"](value):
            sentence = f"{field.name} must be {field.metadata['expected']}, got {reprlib.repr(value)}."
            found[field.name] = f"{sentence} {field.metadata['meaning']}".strip()
    return found


def whole(value: Any, least: int) -> bool:
    """Whether a value is a whole number of at least this, and none that only a typing error makes.

    Example:
        >>> whole(3, 1), whole(0, 1), whole(True, 1), whole(1.5, 1)
        (True, False, False, False)
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and least <= int(value) < 1 << 63


def finite(value: Any) -> bool:
    """Whether a value is a number, and neither nan nor infinite.

    Example:
        >>> finite(0.5), finite(2), finite(float("nan")), finite("0.5")
        (True, True, False, False)
    """
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number too large for a float
        return False


def several(values: Any, sound: Callable[[Any], bool]) -> bool:
    """Whether a value is a list or tuple with something in it, and all of it is sound."""
    return isinstance(values, list | tuple) and len(values) > 0 and all(map(sound, values))
