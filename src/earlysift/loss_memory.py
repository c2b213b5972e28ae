"""`LossMemory`: the loss that every sample had when it was last trained on. An approximate loss that costs nothing.

Losses come from the training forward pass of the kept samples, so remembering them needs no pass of its own. They are
stale: a sample that has not been trained on for long may have been learnt, or forgotten, since.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class LossMemory:
    """The last exact loss of every sample, by its id, and the optimizer step that it is from; 8 bytes a sample.

    Example:
        >>> memory = LossMemory()
        >>> memory.observe(torch.tensor([3, 1]), torch.tensor([0.5, 2.0]), step=7)
        >>> memory.recall(torch.tensor([0, 1, 3]))
        tensor([3.0000, 2.0000, 0.5000])

    Reference:
        Stale losses: Jiang et al., 2019, arXiv 1910.00762 (Stale-SB). The greedy form, and unseen samples first, are
        ours.
    """

    def __init__(self) -> None:
        self._losses = torch.empty(0)  # nan where nothing is known
        self._steps = torch.empty(0, dtype=torch.int32)

    @property
    def seen(self) -> int:
        """Number of samples whose loss is known."""
        return int((~self._losses.isnan()).sum())

    def recall(self, ids: Tensor) -> Tensor:
        """The remembered losses; a sample that was never trained on goes before all others, ties in the order given.

        Args:
            ids: int64 ``(R,)``, on any device.

        Returns:
            float32 ``(R,)``, on the device of the ids; unseen samples get the largest remembered loss of the pool
            plus 1, unlabelled ones ``-inf``.
        """
        losses = self.look(ids, 0)[0].cpu()
        unseen = losses.isnan()
        finite = losses[torch.isfinite(losses)]
        first = finite.max() + 1 if len(finite) else torch.tensor(1.0)
        return torch.where(unseen, first, losses).to(ids.device)

    def observe(self, ids: Tensor, losses: Tensor, step: int) -> None:
        """Remember losses of samples that were just trained on; nan and inf leave a sample as it was.

        Args:
            ids: int64 ``(b,)``; copies of a sample (augmented ones, say) have one id, whose loss is their mean.
            losses: Mean loss of each sample, ``(b,)``; ``-inf`` for unlabelled ones.
            step: The optimizer step.

        Raises:
            ValueError: If there is not one loss per sample.
        """
        if losses.shape != ids.shape:
            raise ValueError(
                f"Expected one loss per sample of the latest batch, ({len(ids)},), got {tuple(losses.shape)}. "
                "Average over a sample's positions, not over samples."
            )
        rows, values = ids.cpu(), losses.detach().float().cpu()
        usable = torch.isfinite(values) | (values == -torch.inf)
        rows, copies = torch.unique(rows[usable], return_inverse=True)
        if len(rows) == 0:
            return
        values = torch.zeros(len(rows)).scatter_reduce(0, copies, values[usable], "mean", include_self=False)
        missing = int(rows.max()) + 1 - len(self._losses)
        if missing > 0:  # grow by at least a half, so that growing stays cheap
            missing = max(missing, len(self._losses) // 2)
            self._losses = torch.cat([self._losses, torch.full((missing,), torch.nan)])
            self._steps = torch.cat([self._steps, torch.zeros(missing, dtype=torch.int32)])
        self._losses[rows] = values
        self._steps[rows] = step

    def look(self, ids: Tensor, step: int) -> tuple[Tensor, Tensor]:
        """What is known of samples, nan where they were never trained on.

        Args:
            ids: int64 ``(R,)``, on any device.
            step: The present optimizer step.

        Returns:
            Losses, ``(R,)``, and optimizer steps since each was observed, ``(R,)``.
        """
        rows = ids.cpu()
        losses, ages = torch.full((2, len(rows)), torch.nan)
        known = rows < len(self._losses)
        losses[known] = self._losses[rows[known]]
        ages[known] = torch.where(losses[known].isnan(), torch.nan, float(step) - self._steps[rows[known]])
        return losses.to(ids.device), ages.to(ids.device)

    def state_dict(self) -> dict[str, Tensor]:
        """Losses and steps, as copies."""
        return {"losses": self._losses.clone(), "steps": self._steps.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned; `state_problems` has found nothing wrong with it."""
        self._losses, self._steps = state["losses"].clone(), state["steps"].clone()

    def state_problems(self, state: Any) -> list[str]:
        """What keeps `load_state_dict` from using something that was saved."""
        return _problems(state)


def _problems(state: Any) -> list[str]:
    kinds = {"losses": torch.float32, "steps": torch.int32}
    if not isinstance(state, Mapping) or state.keys() != kinds.keys():
        return ["memory must hold losses and steps"]
    sound = all(
        isinstance(state[name], Tensor) and state[name].dtype == kind and state[name].ndim == 1
        for name, kind in kinds.items()
    )
    if not sound or len(state["losses"]) != len(state["steps"]):
        return ["memory must hold losses (float32) and steps (int32) of equal length"]
    return []
