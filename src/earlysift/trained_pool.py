"""`TrainedPool`: what uniform batches tell about pools as they are trained on, so that no pass has to be made to ask.

A few uniform batches of late are a pool like any other, but for the weights, which moved a little between them. Their
forward passes have shown everything that a probe looks at.
"""

import reprlib
from collections import deque
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

from earlysift.options import whole

EXACT: Final = "exact"
SLOPES: Final = "slopes"
INPUTS: Final = "inputs"


class TrainedPool:
    """The latest uniform batches, by columns: as many as hold the candidates of one pool.

    Args:
        batches: Batches to a pool, R / b.

    Example:
        >>> pool = TrainedPool(batches=2)
        >>> for step, loss in enumerate((1.0, 2.0, 3.0)):
        ...     pool.add(step, {"exact": torch.tensor([loss])})
        >>> pool.is_full(since=1), pool.columns()["exact"]
        (True, tensor([2., 3.]))
    """

    def __init__(self, batches: int) -> None:
        self._batches: deque[dict[str, Tensor]] = deque(maxlen=batches)
        self._steps: deque[int] = deque(maxlen=batches)

    def is_full(self, since: int) -> bool:
        """Whether these are as many as a pool holds, and none is of a step before: the model of then was another."""
        return len(self._batches) == self._batches.maxlen and self._steps[0] >= since

    def add(self, step: int, columns: Mapping[str, Tensor]) -> None:
        """Append a batch.

        Args:
            step: The optimizer step that trained on it.
            columns: By name, a row per sample: ``exact`` losses ``(b,)``, ``slopes`` of the loss by the logits
                ``(b, C)``, ``inputs`` of the layer that returned these ``(b, D)``, and scores ``(b,)`` by the number of
                their depth. Others than before begin a new pool.
        """
        kinds = {name: column.shape[1:] for name, column in columns.items()}
        if self._batches and kinds != {name: column.shape[1:] for name, column in self._batches[-1].items()}:
            self.clear()
        # Copies: what came in may be a view into states that are far larger.
        self._batches.append({name: column.detach().float().clone() for name, column in columns.items()})
        self._steps.append(step)

    def clear(self) -> None:
        """Begin a new pool."""
        self._batches.clear()
        self._steps.clear()

    def columns(self) -> dict[str, Tensor]:
        """All rows, by column, on the device of the latest losses; a saved state may have come from another."""
        latest = self._batches[-1] if self._batches else {}
        return {name: torch.cat([batch[name].to(latest[EXACT].device) for batch in self._batches]) for name in latest}

    def gram(self) -> Tensor:
        r"""Inner products of the samples' gradients of the last layer's weights, float64 ``(n, n)``.

        The gradient of sample i is ``slopes_i inputs_i^T``, so that ``<g_i, g_j> = <slopes_i, slopes_j> <inputs_i,
        inputs_j>``; zero where a loss is not finite.
        """
        columns = self.columns()
        sound = torch.isfinite(columns[EXACT])
        slopes, inputs = (torch.where(sound[:, None], columns[name], 0.0).double() for name in (SLOPES, INPUTS))
        return (slopes @ slopes.T) * (inputs @ inputs.T)

    def state_dict(self) -> dict[str, Any]:
        """Step and rows of every batch, and all columns, as copies."""
        rows = [len(batch[EXACT]) for batch in self._batches]
        return {"steps": list(self._steps), "rows": rows, "columns": self.columns()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned; `state_problems` has found nothing wrong with it."""
        self.clear()
        parts = {name: column.split(list(state["rows"])) for name, column in state["columns"].items()}
        for i in range(len(state["rows"])):
            self.add(state["steps"][i], {name: column[i] for name, column in parts.items()})

    def state_problems(self, state: Any) -> list[str]:
        """What keeps `load_state_dict` from using something that was saved."""
        if not isinstance(state, Mapping) or state.keys() != {"steps", "rows", "columns"}:
            return ["trained must hold steps, rows and columns"]
        steps, rows, columns, limit = state["steps"], state["rows"], state["columns"], self._batches.maxlen or 0
        counted = all(isinstance(numbers, list | tuple) and len(numbers) <= limit for numbers in (steps, rows))
        if not counted or len(steps) != len(rows) or not all(whole(step, 0) for step in steps):
            return [f"trained.steps must be those of at most {limit} batches, got {reprlib.repr(steps)}"]
        if not all(whole(count, 1) for count in rows):
            return [f"trained.rows must be those of at most {limit} batches, got {reprlib.repr(rows)}"]
        sound = isinstance(columns, Mapping) and all(
            isinstance(column, Tensor) and column.dtype == torch.float32 and column.shape[:1] == (sum(rows),)
            for column in columns.values()
        )
        if not sound or (rows and not {EXACT, SLOPES, INPUTS} <= columns.keys()):
            return [f"trained.columns must be float32 ({sum(rows)}, ...), with {EXACT}, {SLOPES} and {INPUTS}"]
        return []
