"""FLOPs of forward passes, and when selection pays: C1 and C2 as plain functions.

The statements are derived for this project (the paper's text was not at hand); see docs/design.md.
"""

from typing import Any

from torch import nn

from earlysift import losses, pools
from earlysift.exits import Anatomy


def forward_flops(anatomy: Anatomy, *, rows: int, length: int, labelled: int, depth: int | None = None) -> float:
    """FLOPs of one forward pass with the head on labelled positions only.

    ``2 * weights * positions`` for every matrix of the layers and the head, ``4 * rows * length^2 * width`` for the
    attention of a layer. Embeddings, norms, biases and activations are left out (a few per cent).

    Args:
        anatomy: Where layers and head are (`earlysift.exits.find_anatomy`).
        rows: Samples.
        length: Positions per sample.
        labelled: Labelled positions of all samples together (samples, where the head pools over positions).
        depth: Layers that run; None runs all.

    Returns:
        FLOPs (a multiply-add counts two). A training step costs about three times this.

    Example:
        >>> from earlysift.exits import Family, find_anatomy
        >>> model = nn.Module()
        >>> model.blocks, model.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 10)
        >>> anatomy = find_anatomy(model, Family("blocks", (("head",),), task="masked_lm"))
        >>> forward_flops(anatomy, rows=1, length=8, labelled=2, depth=1)
        1440.0
    """
    layers = list(anatomy.layers)[:depth]
    matrices = [_matrix_weights(layer) for layer in layers]
    attention = sum(4.0 * rows * length**2 * _attention_width(anatomy, layer) for layer in layers)
    head = sum(_matrix_weights(anatomy.core.get_submodule(name)) for name in anatomy.head)
    return 2.0 * sum(matrices) * rows * length + attention + 2.0 * head * labelled


def batch_work(
    anatomy: Anatomy, batch: Any, name: str, *, depth: int | None = None, passes: int = 1
) -> dict[str, float]:
    """Positions and FLOPs of running a labelled batch, as entries for the ledger.

    Args:
        anatomy: Where layers and head are.
        batch: Batch or pool with labels.
        name: What is done with it: the entries are ``{name}_tokens`` and ``{name}_flops``.
        depth: Layers that run; None runs all.
        passes: Forward passes that the work amounts to: 1 for scoring, 3 for training.
    """
    inputs, labels = pools.inputs_and_labels(batch)
    rows = len(labels)
    if anatomy.task == "sequence_classification":
        length, labelled = pools.length(inputs), rows
    else:
        length = labels.size(1)
        labelled = int(losses.labelled_positions(labels, causal=anatomy.task == "causal_lm").sum())
    flops = forward_flops(anatomy, rows=rows, length=length, labelled=labelled, depth=depth)
    return {f"{name}_tokens": rows * length, f"{name}_flops": passes * flops}


def relative_cost(forward_share: float, score_share: float, keep: float) -> float:
    """Cost per trained sample, relative to uniform training (C1).

    ``c = 1 + f p / keep``

    Args:
        forward_share: f, the forward pass's share of a training step's cost (about 1/3 by FLOPs).
        score_share: p, cost of scoring a candidate relative to its full forward pass.
        keep: b / R.

    Returns:
        c, at least 1.

    Example:
        >>> round(relative_cost(1 / 3, 0.15, 0.5), 3)
        1.1
    """
    return 1.0 + forward_share * score_share / keep


def payoff(gain: float, cost: float) -> float:
    """Predicted progress per unit of cost (C2); sift only while it exceeds 1.

    ``payoff = rho / c``

    Args:
        gain: rho, mean exact loss of the kept over mean exact loss of the pool.
        cost: c, from `relative_cost`, or measured.

    Example:
        >>> payoff(1.21, 1.1) > 1
        True
    """
    return gain / cost


def _matrix_weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.ndim == 2)


def _attention_width(anatomy: Anatomy, layer: nn.Module) -> int:
    config: Any = getattr(anatomy.core, "config", None)
    heads: int | None = getattr(config, "num_attention_heads", None)
    if heads:
        head_dim: int | None = getattr(config, "head_dim", None)
        return heads * head_dim if head_dim else int(config.hidden_size)
    # The narrowest side of a layer's matrices is the width of its states (feed-forward layers are wider).
    return min((min(p.shape) for p in layer.parameters() if p.ndim == 2), default=0)
