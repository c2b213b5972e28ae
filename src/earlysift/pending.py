"""Numbers being copied from an accelerator to the host: reading one waits for it, not for work queued after it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_AT_ONCE = {"cpu"}  # devices whose numbers can be read without waiting; tests empty this set


class Pending:
    """A number, or a list of them, that the device has yet to compute, while the host continues.

    Args:
        value: Tensor of one number, or of several.
        then: Applied to the number, or to the list, when it is read.
    """

    def __init__(self, value: Tensor, then: Callable[[Any], Any]) -> None:
        self._copy = value.to("cpu", non_blocking=True)  # into pinned memory, queued after the work that computes it
        self._then = then
        self._ready: torch.Event | None = None
        if value.device.type != "cpu":
            self._ready = torch.Event(value.device)
            self._ready.record(torch.accelerator.current_stream(value.device))

    def read(self) -> Any:
        """The number, or what was made of it; waits until it is available."""
        if self._ready is not None:
            self._ready.synchronize()  # does not wait for work queued later
        return self._then(self._copy.tolist())


def number(value: Tensor, then: Callable[[Any], Any] = lambda value: value) -> Any:
    """The number in a tensor: read at once on a CPU, pending on an accelerator.

    Args:
        value: Tensor of one number; of several, these as a list.
        then: Applied to the number, or to the list.

    Example:
        >>> number(torch.tensor([1, 2]).sum(), lambda value: 2 * value)
        6
    """
    return then(value.tolist()) if value.device.type in _AT_ONCE else Pending(value, then)


def arrived(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries, the pending ones replaced by their numbers.

    Example:
        >>> arrived({"step": 3, "trained": Pending(torch.tensor(8), float)})
        {'step': 3, 'trained': 8.0}
    """
    return {name: value.read() if isinstance(value, Pending) else value for name, value in row.items()}
