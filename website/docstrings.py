"""Docstrings as the site shows them; griffe calls it while it reads the sources, which are not imported."""

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Give sections of our docstrings the names that griffe knows, so that examples are shown as code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the sections of one docstring."""
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
