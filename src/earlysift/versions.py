"""Versions and commit of a result and of ``earlysift --version``, without importing what they are of."""

import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("earlysift", "torch", "transformers", "tokenizers")
"""What results depend on."""


def installed() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of the source tree, with ``-dirty`` if it has changes.

    Args:
        folder: Where the package lies.

    Returns:
        None outside a git checkout of earlysift; an environment within another project's checkout is none.
    """
    tracked = _git(folder, "ls-files", "__init__.py")
    return tracked and _git(folder, "describe", "--always", "--dirty", "--exclude", "*")


def line() -> str:
    """Versions and commit in one line, earlysift's first."""
    named = {**installed(), "commit": commit()}
    own = named.pop("earlysift", "of unknown version")
    return f"earlysift {own} ({', '.join(f'{name} {value}' for name, value in named.items() if value)})"


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None if it fails, or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (done.returncode == 0 and done.stdout.strip()) or None
