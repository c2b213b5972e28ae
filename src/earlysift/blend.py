"""`Blend`: an online prediction of the exact loss from what is cheap. It puts exits and remembered losses on one scale.

A ridge regression, fitted to the exact losses of the samples that were just trained on, so it costs no pass of its own.
Candidates that were drawn uniformly (`earlysift.selectors.explored`) stand for all that were not chosen, so that it
fits the whole pool and not only what selection prefers.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

INPUTS = ("one", "exit_loss", "exit_entropy", "seen", "remembered", "age")
"""Columns that the prediction is linear in: losses as ``log(1 + x)``, age as the log of steps; 0 where nothing is
known."""
_DECAY = 0.99  # per batch, so that the last hundred or so count: a model changes as it trains
_RIDGE = 0.1  # in samples


class Blend:
    r"""Predicts ``log(1 + exact loss)`` as ``w x``, with ``w`` that minimises the squared error over recent samples.

    ``w = (A + l I)^-1 (c + l w_0)``, ``A = sum p x x^T`` and ``c = sum p x y`` decayed by batch, p the number of
    candidates that a sample stands for. ``w_0`` predicts the loss at the exit itself, so a blend begins as that.

    Example:
        >>> blend = Blend()
        >>> x = blend.inputs(torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.5]))
        >>> blend.predict(x)
        tensor([1., 2.])
        >>> for _ in range(50):
        ...     blend.fit(x, torch.tensor([3.0, 1.0]), torch.ones(2))
        >>> blend.predict(x).argmax()
        tensor(0)
    """

    def __init__(self) -> None:
        width = len(INPUTS)
        self._moments = torch.zeros(width, width + 1, dtype=torch.float64)  # A, and c as the last column
        self.latest: Tensor | None = None  # inputs of the latest pool, until its kept samples are trained on

    def inputs(
        self, exit_losses: Tensor, exit_entropies: Tensor, remembered: Tensor | None = None, ages: Tensor | None = None
    ) -> Tensor:
        """The columns of `INPUTS` for R candidates.

        Args:
            exit_losses: ``(R,)``.
            exit_entropies: ``(R,)``.
            remembered: Losses when the samples were last trained on, ``(R,)``, nan where never; None knows none.
            ages: Steps since, ``(R,)``, nan where never.

        Returns:
            float64 ``(R, 6)``; a row is nan where the loss at the exit is.
        """
        nothing = torch.zeros_like(exit_losses)
        seen, known, age = nothing, nothing, nothing
        if remembered is not None and ages is not None:
            is_seen = torch.isfinite(remembered)  # -inf is an unlabelled sample
            seen = is_seen.to(exit_losses)
            known = torch.where(is_seen, remembered.clamp(min=0).log1p(), 0.0).to(exit_losses)
            age = torch.where(is_seen, ages.clamp(min=0).log1p(), 0.0).to(exit_losses)
        columns = [nothing + 1, exit_losses.clamp(min=0).log1p(), exit_entropies.log1p(), seen, known, age]
        return torch.stack(columns, dim=1).double()

    def predict(self, inputs: Tensor) -> Tensor:
        """Predicted losses, float32 ``(R,)``, not negative; the inputs are kept as ``latest``."""
        self.latest = inputs
        predicted: Tensor = inputs @ self._weights(inputs.device)
        return predicted.clamp(min=0).expm1().float()

    def fit(self, inputs: Tensor, losses: Tensor, stands_for: Tensor) -> None:
        """Take in the exact losses of a batch.

        Args:
            inputs: ``(b, 6)``, as the batch was scored by.
            losses: ``(b,)``; those that are not finite are left out.
            stands_for: Candidates of the pool that each sample stands for, ``(b,)``.
        """
        targets = losses.double().clamp(min=0).log1p()
        usable = torch.isfinite(losses) & torch.isfinite(inputs).all(dim=1)
        rows = torch.where(usable[:, None], inputs, 0.0)
        both = torch.cat([rows, torch.where(usable, targets, 0.0)[:, None]], dim=1)
        weights = stands_for.double() / stands_for.double().mean()
        self._moments = _DECAY * self._moments.to(inputs.device) + (rows * weights[:, None]).T @ both

    def state_dict(self) -> dict[str, Tensor]:
        """The moments, as a copy."""
        return {"moments": self._moments.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned; `state_problems` has found nothing wrong with it."""
        self._moments = state["moments"].clone()

    def state_problems(self, state: Any) -> list[str]:
        """What keeps `load_state_dict` from using something that was saved."""
        moments = state.get("moments") if isinstance(state, Mapping) and len(state) == 1 else None
        if isinstance(moments, Tensor) and moments.dtype == torch.float64 and moments.shape == self._moments.shape:
            return [] if bool(moments.isfinite().all()) else ["blend.moments must be finite"]
        return [f"blend must hold moments, float64 {tuple(self._moments.shape)}"]

    def _weights(self, device: torch.device) -> Tensor:
        prior = torch.zeros(len(INPUTS), dtype=torch.float64, device=device)
        prior[INPUTS.index("exit_loss")] = 1.0
        moments = self._moments.to(device)
        ridge = _RIDGE * torch.eye(len(INPUTS), dtype=torch.float64, device=device)
        # Without a look at what it did, which would make an accelerator wait.
        weights: Tensor = torch.linalg.solve_ex(moments[:, :-1] + ridge, moments[:, -1] + _RIDGE * prior).result
        return weights
