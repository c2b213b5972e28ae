"""The state of selection in a Trainer's checkpoint: JSON, and what tensors it has beside it; a pair per process.

The JSON holds the digests of both, as a flipped bit in either would otherwise be read as another number.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from earlysift import files
from earlysift.options import whole

_TENSOR = "tensor in the file beside"
_DIGESTS = "sha256"


def name_of(process: int) -> str:
    """The file of a process within a checkpoint; its tensors have the same name with another suffix."""
    return f"sifter_{process}.json"


def write(path: Path, state: Mapping[str, Any]) -> None:
    """Write a state whole or not at all.

    Args:
        path: The JSON file.
        state: Nested mappings of plain data and tensors.
    """
    plain, tensors = _separated(state, "")
    if tensors:  # first: what the JSON names is there
        files.write_whole(_beside(path), lambda part: save_file(tensors, part))
    text = json.dumps({_DIGESTS: _digests(path, plain), **plain})
    files.write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def read(path: Path, totals: Collection[str]) -> dict[str, Any]:
    """What a process saved of selection.

    Raises:
        ValueError: If the file does not hold that; names it.
    """
    remedy = f"Resume from another checkpoint, or delete {path.name} to start selection anew."
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"Expected a state of selection, as JSON, in {path}, got no JSON ({error}). {remedy}"
        ) from error
    saved = state.pop(_DIGESTS, None) if isinstance(state, dict) else None  # older states have none
    if saved is not None and saved != (found := _digests(path, state)):
        names = found.keys() | (saved.keys() if isinstance(saved, dict) else ())
        changed = [name for name in names if not isinstance(saved, dict) or saved.get(name) != found.get(name)]
        damaged = " and ".join(str(path.with_name(name)) for name in sorted(changed))
        raise ValueError(f"Expected {damaged} as saved, found it changed. {remedy}")
    counts = ("batch_size", *totals)
    sound = isinstance(state, dict) and "sifter" in state and all(whole(state.get(name), 0) for name in counts)
    if not sound:
        raise ValueError(
            f"Expected a state of selection with sifter, {', '.join(counts)} in {path}, got other. {remedy}"
        )
    tensors = _beside(path)
    try:
        return dict(_joined(state, load_file(tensors) if tensors.is_file() else {}))
    except (KeyError, SafetensorError) as error:
        raise ValueError(
            f"Expected the tensors that {path.name} names in {tensors}, found {error!r}. Resume from another "
            "checkpoint, or delete both files to start selection anew."
        ) from error


def _digests(path: Path, plain: Mapping[str, Any]) -> dict[str, str]:
    """Digests of what the JSON file holds but for them, and of the file beside it if there is one."""
    content = {path.name: json.dumps(plain).encode()}
    if _beside(path).is_file():
        content[_beside(path).name] = _beside(path).read_bytes()
    return {name: hashlib.sha256(part).hexdigest() for name, part in content.items()}


def _beside(path: Path) -> Path:
    return path.with_suffix(".safetensors")


def _separated(state: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """A state as plain data, with names in the place of its tensors; and the tensors by these names."""
    if isinstance(state, Tensor):
        return {_TENSOR: name}, {name: state.contiguous()}
    if not isinstance(state, Mapping):
        return state, {}
    parts = {key: _separated(value, f"{name}.{key}".removeprefix(".")) for key, value in state.items()}
    tensors = {label: tensor for _, found in parts.values() for label, tensor in found.items()}
    return {key: plain for key, (plain, _) in parts.items()}, tensors


def _joined(plain: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The state that `_separated` took apart."""
    if not isinstance(plain, dict):
        return plain
    if plain.keys() == {_TENSOR}:
        return tensors[plain[_TENSOR]]
    return {key: _joined(value, tensors) for key, value in plain.items()}
