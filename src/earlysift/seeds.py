"""Random generators seeded by a key, one per use: global random state is never touched, and none has to be saved."""

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Generator


def seeded(*key: int | str) -> Generator:
    """A generator whose state depends only on a key, such as ``(seed, "mask", 7)``.

    Example:
        >>> seeded(0, "mask", 7).initial_seed() == seeded(0, "mask", 7).initial_seed()
        True
    """
    return Generator().manual_seed(_number(key))


@contextmanager
def reseeded(*key: int | str, device: torch.device) -> Iterator[None]:
    """Seed the global generators of torch, Python and NumPy by a key within this context; restore them afterwards.

    For callables of the user, which may draw from them. NumPy is included if it has been imported.

    Args:
        key: As in `seeded`.
        device: An accelerator whose generator is seeded and restored too; or the CPU.

    Example:
        >>> before = torch.get_rng_state()
        >>> with reseeded(0, "score", 7, device=torch.device("cpu")):
        ...     _ = torch.rand(3), random.random()
        >>> torch.equal(before, torch.get_rng_state())
        True
    """
    number, numpy = _number(key), sys.modules.get("numpy")
    python_state, numpy_state = random.getstate(), numpy and numpy.random.get_state()
    on_accelerator = [] if device.type == "cpu" else [device]
    try:
        with torch.random.fork_rng(on_accelerator, device_type=device.type if on_accelerator else "cuda"):
            torch.manual_seed(number)
            random.seed(number)
            if numpy:
                numpy.random.seed(number % 2**32)
            yield
    finally:
        random.setstate(python_state)
        if numpy:
            numpy.random.set_state(numpy_state)


def _number(key: tuple[int | str, ...]) -> int:
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big", signed=True)
