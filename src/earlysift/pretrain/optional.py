"""Packages that only some uses need."""

import importlib
from typing import Any


def optional_package(name: str, *, extra: str) -> Any:
    """Import a package that only some uses need.

    Args:
        name: The package, as it is imported.
        extra: The extra of earlysift that installs it.

    Returns:
        The module.

    Raises:
        ImportError: If the package is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this needs the package {name!r}, which is not installed: pip install 'earlysift[{extra}]'"
        ) from error
