"""Measures: what a score computes from the predictions of a model. A new named score is one entry of `MEASURES`.

A measure serves early exits at every depth, the full model, probes, auto mode, the comparison and the command line; all
of them look it up here. torch is imported inside the functions, because command lines list the names without it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

IGNORED_LABEL = -100

Function = Callable[[Any, Any], Any]
"""(logits, targets) to values; tensors, so that this module needs no torch."""


@dataclass(frozen=True)
class Measure:
    """One number per prediction, larger meaning more worth training on.

    Attributes:
        name: What settings, checkpoints and reports call it.
        keeps: Which candidates a greedy rule keeps by it, in words.
        of_classes: From logits ``(N, V)`` and class ids int64 ``(N,)``, or probabilities of classes ``(N, V)``, to
            ``(N,)``; for tokens and single labels.
        of_indicators: From logits ``(R, C)`` and 0/1 indicators ``(R, C)`` to ``(R, C)``; for several labels at once.
        of_numbers: From outputs ``(R, C)`` and targets ``(R, C)`` to ``(R, C)``; None where a measure needs a predicted
            distribution, which a regression does not have.
        reads_targets: Whether it depends on the labels. If not, all classes count, those without a label too.
    """

    name: str
    keeps: str
    of_classes: Function
    of_indicators: Function
    of_numbers: Function | None = None
    reads_targets: bool = False


def _cross_entropy(logits: "Tensor", targets: "Tensor") -> "Tensor":
    from torch.nn.functional import cross_entropy

    try:
        return cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="none")
    except IndexError as error:  # on a CPU; to look first would make an accelerator wait
        classes = logits.size(-1)
        wrong = targets[(targets != IGNORED_LABEL) & ((targets < 0) | (targets >= classes))]
        raise ValueError(
            f"Expected labels in 0..{classes - 1}, or {IGNORED_LABEL} where there is none, got {int(wrong[0])}. "
            "Check that the model has as many outputs as the tokenizer has tokens, or the data has classes."
        ) from error


def _binary_cross_entropy(logits: "Tensor", targets: "Tensor") -> "Tensor":
    from torch.nn.functional import binary_cross_entropy_with_logits

    return binary_cross_entropy_with_logits(logits, targets, reduction="none")


def _squared_error(outputs: "Tensor", targets: "Tensor") -> "Tensor":
    return (outputs - targets).square()


def _entropy(logits: "Tensor", _: "Tensor") -> "Tensor":
    from torch.special import entr

    terms: Tensor = entr(logits.softmax(dim=-1))  # 0 log 0 = 0: classes of logit -inf add nothing
    return terms.sum(dim=-1)


def _binary_entropy(logits: "Tensor", _: "Tensor") -> "Tensor":
    from torch.nn.functional import softplus

    return softplus(logits) - logits * logits.sigmoid()


def _small_margin(logits: "Tensor", _: "Tensor") -> "Tensor":
    first, second = logits.softmax(dim=-1).topk(2, dim=-1).values.unbind(dim=-1)
    return 1 - (first - second)


def _binary_small_margin(logits: "Tensor", _: "Tensor") -> "Tensor":
    return 1 - (2 * logits.sigmoid() - 1).abs()


LOSS = Measure("loss", "the largest loss", _cross_entropy, _binary_cross_entropy, _squared_error, reads_targets=True)
"""Cross entropy ``-log p_y`` in nats; for numbers the squared error."""
ENTROPY = Measure("entropy", "the largest entropy of the prediction", _entropy, _binary_entropy)
"""``-sum_v p_v log p_v`` in nats."""
MARGIN = Measure("margin", "the smallest margin between the two likeliest classes", _small_margin, _binary_small_margin)
"""``1 - (p_1 - p_2)`` for the two largest probabilities. Scheffer et al., Active Hidden Markov Models, 2001."""

MEASURES = {measure.name: measure for measure in (LOSS, ENTROPY, MARGIN)}
"""All measures by name."""


def sift_arm(name: str) -> str:
    """The arm of pre-training and of comparisons that selects by a measure at an early exit.

    Example:
        >>> sift_arm("loss"), sift_arm("margin")
        ('sift', 'sift-margin')
    """
    return "sift" if name == LOSS.name else f"sift-{name}"
