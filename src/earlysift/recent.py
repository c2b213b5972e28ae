"""`Recent`: the samples trained on lately, with their exact losses: what is known of a pool without any pass for it.

Training computes the exact loss of every kept sample. Where batches are uniform, or hold a share that was drawn
uniformly (`earlysift.selectors.explored`), these losses say what the loss of whole pools is, what selection gains, and
how well scores rank, for nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

MEMORY = 0
"""The depth by which remembered losses stand beside the exits: no layer runs."""

COLUMNS = ("loss", "score", "remembered", "stands_for")
LENGTH = 2048
_MOSTLY = 0.5  # share of the samples that must have been seen before, for remembered losses to be of use
_ENOUGH = 512  # samples to draw conclusions from


class Kept(NamedTuple):
    """What is known of a batch when it is handed out, before its losses are.

    Attributes:
        step: Its optimizer step.
        size: b.
        ids: Of its samples, int64 ``(b,)``, on the CPU; None without `SiftConfig.sample_id`.
        scores: That it was chosen by, ``(b,)``; None where nothing was scored.
        stands_for: Candidates that each sample stands for, ``(b,)``; None where that is unknown.
        inputs: What `earlysift.blend.Blend` predicts from, ``(b, 6)``; None without a blend.
        weights: Of its samples, ``(b,)``; None where all are 1.
    """

    step: int
    size: int
    ids: Tensor | None
    scores: Tensor | None
    stands_for: Tensor | None
    inputs: Tensor | None
    weights: Tensor | None = None


class Recent:
    """The latest samples that were trained on, oldest first: a row of `COLUMNS` each, nan where nothing is known.

    Example:
        >>> recent = Recent()
        >>> recent.add(torch.tensor([1.0, 3.0]), stands_for=torch.tensor([1.0, 3.0]))
        >>> recent.estimates()["pool_loss"]
        2.5
    """

    def __init__(self) -> None:
        self._rows = torch.empty(0, len(COLUMNS))

    def __len__(self) -> int:
        return len(self._rows)

    def add(self, losses: Tensor, **columns: Tensor | None) -> None:
        """Append a batch.

        Args:
            losses: Exact losses, ``(b,)``; samples without a finite one are left out.
            columns: Others of `COLUMNS`, ``(b,)`` each; None leaves one unknown.
        """
        known = {"loss": losses, **columns}
        parts = [known.get(name) for name in COLUMNS]
        rows = torch.stack(
            [torch.full(losses.shape, torch.nan) if part is None else part.detach().float().cpu() for part in parts],
            dim=1,
        )
        self._rows = torch.cat([self._rows, rows[torch.isfinite(rows[:, 0])]])[-LENGTH:]

    def column(self, name: str) -> Tensor:
        """One of `COLUMNS`, float64 ``(n,)``."""
        return self._rows[:, COLUMNS.index(name)].double()

    def estimates(self) -> dict[str, float]:
        """Mean loss of whole pools, gain of the batches, and how well their scores rank, as far as they are known.

        Returns:
            ``pool_loss`` and ``live_gain`` (mean exact loss of the kept over the pool's), where it is known what
            samples stand for; ``live_correlation`` of ``log(1 + score)`` and ``log(1 + loss)`` over the pool.
        """
        loss, score, stands_for = (self.column(name) for name in ("loss", "score", "stands_for"))
        known = torch.isfinite(stands_for)
        if not bool(known.any()):
            return {}
        pool_loss = weighted_mean(loss[known], stands_for[known])
        numbers = {"pool_loss": pool_loss.item()}
        if pool_loss > 0:
            numbers["live_gain"] = (loss[known].mean() / pool_loss).item()
        scored = known & torch.isfinite(score)
        if int(scored.sum()) > 1:
            scores, losses = (values[scored].clamp(min=0).log1p() for values in (score, loss))
            numbers["live_correlation"] = _correlation(scores, losses, stands_for[scored]).item()
        return numbers

    def signals(self, keeps: Sequence[float]) -> dict[str, float]:
        """What these samples tell the controller (`earlysift.controller.decide`) about the pools they come from.

        Args:
            keeps: Values of keep to look at.

        Returns:
            ``concentration`` (mean square of the losses over their squared mean), ``loss`` and ``loss_error``; where
            most samples have a remembered loss ``correlation.0`` of it with the exact loss, ``gain.0.{keep}`` (mean
            loss of those that it ranks first over that of all, unseen samples first), and ``retention`` (what is left
            of the largest remembered quarter). Nothing while too few samples are known.
        """
        stands_for = self.column("stands_for")
        usable = torch.isfinite(stands_for) & (stands_for > 0)
        if int(usable.sum()) < _ENOUGH:
            return {}
        loss, remembered, share = (x[usable] for x in (self.column("loss"), self.column("remembered"), stands_for))
        loss, share = loss.clamp(min=0), share / share.sum()
        mean = weighted_mean(loss, share)
        variance = weighted_mean((loss - mean).square(), share)
        effective = 1 / share.square().sum()
        if not mean > 0:
            return {}
        numbers = {
            "concentration": (1 + variance / mean.square()).item(),
            "loss": mean.item(),
            "loss_error": (variance / effective).sqrt().item(),
        }
        seen = torch.isfinite(remembered)
        if not share[seen].sum() > _MOSTLY:
            return numbers
        old, new, weight = remembered[seen].clamp(min=0), loss[seen], share[seen]
        numbers[f"correlation.{MEMORY}"] = _correlation(old.log1p(), new.log1p(), weight).item()
        first = torch.where(seen, remembered, torch.inf).argsort(descending=True, stable=True)
        for keep in keeps:
            kept = first[share[first].cumsum(0) <= keep]
            if len(kept):
                numbers[f"gain.{MEMORY}.{keep:g}"] = (weighted_mean(loss[kept], share[kept]) / mean).item()
        largest = old.argsort(descending=True, stable=True)
        largest = largest[weight[largest].cumsum(0) <= weight.sum() / 4]
        if len(largest) and old[largest].sum() > 0:
            left = weighted_mean(new[largest], weight[largest]) / weighted_mean(old[largest], weight[largest])
            numbers["retention"] = left.item()
        return numbers

    def state_dict(self) -> dict[str, Tensor]:
        """The rows, as a copy."""
        return {"rows": self._rows.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from what `state_dict` returned; `state_problems` has found nothing wrong with it."""
        self._rows = state["rows"].clone()

    def state_problems(self, state: Any) -> list[str]:
        """What keeps `load_state_dict` from using something that was saved."""
        rows = state.get("rows") if isinstance(state, Mapping) and len(state) == 1 else None
        sound = isinstance(rows, Tensor) and rows.dtype == torch.float32 and rows.shape[1:] == (len(COLUMNS),)
        if sound and isinstance(rows, Tensor) and len(rows) <= LENGTH:
            return []
        return [f"recent must hold rows, float32 (at most {LENGTH}, {len(COLUMNS)})"]


def weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    """``sum w x / sum w``, a scalar."""
    return (values * weights).sum() / weights.sum()


def _correlation(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    x, y = x - weighted_mean(x, weights), y - weighted_mean(y, weights)
    scale = ((weights * x.square()).sum() * (weights * y.square()).sum()).sqrt()
    return (weights * x * y).sum() / scale if scale > 0 else torch.zeros((), dtype=x.dtype)
