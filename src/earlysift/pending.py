"""Numbers on their way from an accelerator to the host: reading one waits for it, and for nothing behind it."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

_AT_ONCE = {"cpu"}  # devices whose numbers are there without waiting; a test of what waits leaves none


class Pending:
    """A number that the device has yet to make, while the host goes on.

    Args:
        value: Tensor of one number.
        then: What is to become of the number.
    """

    def __init__(self, value: Tensor, then: Callable[[Any], float]) -> None:
        self._copy = value.to("cpu", non_blocking=True)  # into pinned memory, behind the work that makes it
        self._then = then
        self._made: torch.Event | None = None
        if value.device.type != "cpu":
            self._made = torch.Event(value.device)
            self._made.record(torch.accelerator.current_stream(value.device))

    def read(self) -> float:
        """The number; waits until it has come."""
        if self._made is not None:
            self._made.synchronize()  # not with what the device was told to do later
        return self._then(self._copy.item())


def number(value: Tensor, then: Callable[[Any], float] = lambda came: came) -> float | Pending:
    """The number in a tensor: at once if it is there, as on a CPU, else pending.

    Args:
        value: Tensor of one number.
        then: What is to become of the number.

    Example:
        >>> number(torch.tensor([1, 2]).sum(), lambda came: 2 * came)
        6
    """
    return then(value.item()) if value.device.type in _AT_ONCE else Pending(value, then)


def arrived(row: Mapping[str, Any]) -> dict[str, Any]:
    """The same entries, with the pending ones read.

    Example:
        >>> arrived({"step": 3, "trained": Pending(torch.tensor(8), float)})
        {'step': 3, 'trained': 8.0}
    """
    return {name: value.read() if isinstance(value, Pending) else value for name, value in row.items()}
