"""Docstrings as the site shows them; griffe calls it while it reads the sources, which are not imported."""

import re
from typing import Any

import griffe

OPTIONS = {"option", "one_of"}  # of `earlysift.options`: a default and its rule


class Readable(griffe.Extension):
    """Show examples as code, and the default of an option without its rule."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the sections of one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Replace the rule of an option by its default."""
        value = attr.value
        if isinstance(value, griffe.ExprCall) and str(value.function) in OPTIONS:
            attr.value = value.arguments[0]
