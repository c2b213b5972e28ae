"""A control for masked language modelling: candidates whose labels can be copied from their input."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from earlysift.compare.arm import Arm, Operation
from earlysift.compare.sifted import sifted, sifting

if TYPE_CHECKING:
    from torch import Tensor, nn


def visible_labels(_model: nn.Module, pool: Any) -> Tensor:
    """How many labelled positions of a candidate still show their own token: a score that needs no model, ``(R,)``.

    BERT leaves a tenth of the chosen tokens in place. They are predicted by copying, which is learnt first and counts
    in the accuracy, so a score that happens to prefer them looks better than it is. This one prefers nothing else.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[-100, 8, 9], [7, 8, -100]])
        >>> pool = {"input_ids": torch.tensor([[7, 4, 9], [7, 8, 9]]), "labels": labels}
        >>> visible_labels(torch.nn.Identity(), pool)
        tensor([1., 2.])
    """
    from earlysift import pools

    inputs, labels = pools.inputs_and_labels(pool)
    visible: Tensor = inputs["input_ids"] == labels
    return visible.sum(dim=1).float()


ARM = Arm(
    "visible labels",
    "keeps the candidates with the most labelled tokens left in place: a control that needs no model (masked LM "
    "only). An arm that is not ahead of it may owe its gain to copying",
    steps=partial(sifted, score=visible_labels),
    scoring=Operation("visible", "score", partial(sifting, score=visible_labels)),
    tasks=("masked_lm", "masked_characters"),
)
