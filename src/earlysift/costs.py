"""FLOPs of forward passes, and when selection pays: T5, T7, C1 and C2 as plain functions.

The statements are derived for this project (the paper's text was not at hand); see docs/design.md.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlysift import families, losses, pending, pools
from earlysift.anatomy import Anatomy
from earlysift.pending import Pending

# Where a matrix of these names runs, as it differs from what its place in the model tells (see `_outer_weights`).
_BEFORE_POOLING = ("score",)  # decoders classify every position, then pick the last one
_ON_DISTANCES = ("pos_key_proj", "pos_query_proj")  # DeBERTa's, on embeddings of distances: in `_distances`
# Attention of a decoder's layers to the encoder, and what of it runs at the encoder's positions.
_CROSS = ("encoder_attn", "EncDecAttention", "cross_attn", "cross_attention", "crossattention")
_KEYS_AND_VALUES = ("k", "v", "k_proj", "v_proj", "key", "value")


class FlopsLaw(NamedTuple):
    """FLOPs of one forward pass of a model to some depth, by its sizes: what `flops_law` found, once and for all.

    ``2 * everywhere * positions + 2 * head * labelled + 4 * attention * rows * length^2 + fixed``; in an
    encoder-decoder that is the decoder, and ``encoder``, ``encoder_attention`` and ``cross`` tell what is done at the
    positions of inputs: ``rows * (2 * encoder * inputs + 4 * encoder_attention * inputs^2 + 4 * cross * inputs *
    length)``
    """

    everywhere: float
    head: float
    attention: float
    fixed: float
    encoder: float = 0.0
    encoder_attention: float = 0.0
    cross: float = 0.0

    def flops(self, *, rows: int, length: int, labelled: int, inputs: int = 0) -> float:
        """FLOPs (a multiply-add counts two) of a pass.

        Args:
            rows: Samples.
            length: Positions per sample, of the decoder if there are two kinds.
            labelled: Labelled positions of all samples together.
            inputs: Positions per sample of an encoder-decoder's encoder.
        """
        positions = rows * length
        by_position = 2.0 * self.everywhere * positions + 2.0 * self.head * labelled
        own = by_position + 4.0 * self.attention * rows * length**2 + self.fixed
        attended = self.encoder_attention * inputs + self.cross * length
        return own + rows * inputs * (2.0 * self.encoder + 4.0 * attended)


def flops_law(anatomy: Anatomy, depth: int | None = None, *, skips_unlabelled: bool = False) -> FlopsLaw:
    """Walk a model once for the FLOPs of its forward passes with the head on labelled positions only.

    Every matrix (and kernel) of the model counts, the attention of a layer, and DeBERTa's attention to distances. Left
    out, as torch's own counter does: look-ups in embeddings, norms, biases and activations. Local or causal attention
    is counted as if it were full. In an encoder-decoder both lists are cut to the depth, and keys and values of the
    attention from one to the other are made at the encoder's positions.

    Args:
        anatomy: Where layers and head are (`earlysift.anatomy.find_anatomy`).
        depth: Layers that run; None runs all.
        skips_unlabelled: Whether the last of them runs behind its attention at labelled positions only
            (`earlysift.exits.skips_unlabelled`).

    Raises:
        ValueError: If it is unknown how often its matrices run.
    """
    if families.has_stages(anatomy.core):
        raise ValueError("its stages run at several resolutions")
    if getattr(anatomy.core, "main_input_name", None) == "input_values":
        raise ValueError("it reads samples of a sound, and its layers run on frames of them")
    before, behind, head = _outer_weights(anatomy)
    has_encoder, everywhere = _has_encoder(anatomy), before + behind
    if has_encoder and before:
        raise ValueError("it has weights in front of its decoder and outside of layers, at positions of either kind")
    distances = _distances(anatomy)
    attention = fixed = encoder = encoder_attention = cross = 0.0
    for layer in [layer for layers in anatomy.earlier for layer in list(layers)[:depth]]:
        encoder += sum(_own_weights(name, module) for name, module in layer.named_modules())
        encoder_attention += _attention_width(anatomy, layer)
    for layer in list(anatomy.layers)[:depth]:
        everywhere += sum(_own_weights(name, module) for name, module in layer.named_modules())
        width = _attention_width(anatomy, layer)
        attention += width
        # Embeddings of distances are projected once, then multiplied with all states.
        everywhere += distances * width
        fixed += 2.0 * distances * width**2
        if has_encoder:
            at_inputs = _cross_weights(layer)
            everywhere, encoder, cross = everywhere - at_inputs, encoder + at_inputs, cross + width
    if skips_unlabelled:
        exit_layer = list(anatomy.layers)[:depth][-1]
        skipping = [exit_layer.get_submodule(name) for chain in anatomy.positionwise for name in chain]
        thinned = sum(_own_weights(name, module) for part in skipping for name, module in part.named_modules())
        everywhere, head = everywhere - thinned, head + thinned
    return FlopsLaw(everywhere, head, attention, fixed, encoder, encoder_attention, cross)


def forward_flops(
    anatomy: Anatomy, *, rows: int, length: int, labelled: int, depth: int | None = None, inputs: int = 0
) -> float:
    """FLOPs of one forward pass with the head on labelled positions only, by `flops_law`.

    Args:
        anatomy: Where layers and head are (`earlysift.anatomy.find_anatomy`).
        rows: Samples.
        length: Positions per sample.
        labelled: Labelled positions of all samples together (samples, where the head pools over positions).
        depth: Layers that run; None runs all.
        inputs: Positions per sample of the encoder, where ``length`` are those of a decoder.

    Returns:
        FLOPs (a multiply-add counts two). A training step costs about three times this.

    Example:
        >>> from earlysift.anatomy import find_anatomy
        >>> from earlysift.families import Family
        >>> model = nn.Module()
        >>> model.blocks, model.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 10)
        >>> anatomy = find_anatomy(model, Family("blocks", (("head",),), task="masked_lm"))
        >>> forward_flops(anatomy, rows=1, length=8, labelled=2, depth=1)
        1440.0
    """
    return flops_law(anatomy, depth).flops(rows=rows, length=length, labelled=labelled, inputs=inputs)


def batch_work(
    anatomy: Anatomy, batch: Any, name: str, law: FlopsLaw, *, passes: int = 1, max_positions: int | None = None
) -> dict[str, float]:
    """Positions and FLOPs of running a labelled batch; waits for an accelerator that has to count its labels.

    Args:
        anatomy: Where layers and head are.
        batch: Batch or pool with labels.
        name: What is done with it: the entries are ``{name}_tokens`` and ``{name}_flops``.
        law: The model's, to the depth that runs.
        passes: Forward passes that the work amounts to: 1 for scoring, 3 for training.
        max_positions: As in `earlysift.losses.positions_to_read`; with it that many positions are labelled ones.
    """
    return pending.arrived(pending_work(anatomy, batch, name, law, passes=passes, max_positions=max_positions))


def pending_work(
    anatomy: Anatomy, batch: Any, name: str, law: FlopsLaw, *, passes: int = 1, max_positions: int | None = None
) -> dict[str, float | Pending]:
    """What `batch_work` returns, as entries for the ledger that wait for nothing."""
    inputs, labels = pools.inputs_and_labels(batch, anatomy.labels)
    rows = len(labels)
    encoded = 0
    if _has_encoder(anatomy):
        encoded = pools.length({key: value for key, value in inputs.items() if not key.startswith("decoder_")})
    length = labels.size(1) if anatomy.by_token else encoded or _positions(anatomy, inputs)

    def flops(labelled: int) -> float:
        return passes * law.flops(rows=rows, length=length, labelled=labelled, inputs=encoded)

    if not anatomy.by_token:
        work: float | Pending = flops(rows)
    elif max_positions is not None:
        work = flops(rows * min(max_positions, length))
    else:
        labelled = losses.labelled_positions(labels, causal=anatomy.task == "causal_lm")
        work = pending.number(labelled.sum(), flops)
    return {f"{name}_tokens": rows * (encoded + length), f"{name}_flops": work}


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


def approximate_gain(gain: float, correlation: float) -> float:
    """Gain of selecting by an approximate loss (T5, derived for this project).

    ``rho_r = 1 + r (rho - 1)``, for approximate and exact losses that are jointly Gaussian. Below 1, which is worse
    than uniform training, where the approximation ranks backwards.

    Args:
        gain: rho of selecting by the exact loss.
        correlation: r, between approximate and exact loss, in [-1, 1]; the rank correlation is close to it.

    Returns:
        rho_r.

    Example:
        >>> round(approximate_gain(1.2, 0.9), 3)
        1.18
    """
    return 1.0 + correlation * (gain - 1.0)


def second_moment_ratio(scores: Tensor) -> float:
    """What drawing in proportion to scores leaves of the gradient's second moment (T7, derived for this project).

    ``V = (mean s)^2 / mean s^2``, if the scores are the norms of the samples' gradients (or in proportion to them).

    Args:
        scores: Non-negative scores of a pool, ``(R,)``; only finite ones count.

    Returns:
        V in (0, 1]: 1 if all scores are alike, k / R if k of R candidates carry all of them alike, 1 without any score.

    Example:
        >>> second_moment_ratio(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        0.5

    Reference:
        Importance sampling by a bound on the gradient norm: Katharopoulos and Fleuret, ICML 2018, arXiv 1803.00942.
    """
    finite = scores[torch.isfinite(scores)].double()
    second = finite.square().mean().item() if len(finite) else 0.0
    return finite.mean().item() ** 2 / second if second > 0 else 1.0


def unbiased_payoff(second_moment: float, cost: float) -> float:
    """Predicted progress per unit of cost of unbiased selection, where gradient noise limits steps (T7).

    ``payoff = 1 / (V c)``

    Args:
        second_moment: V, from `second_moment_ratio`.
        cost: c, from `relative_cost`, or measured.

    Example:
        >>> round(unbiased_payoff(0.5, 1.25), 3)
        1.6
    """
    return 1.0 / (second_moment * cost)


def break_even_gain(cost: float) -> float:
    """The gain at which selection starts to pay (C2).

    ``rho / c = 1`` where ``rho = c``: selection must find samples whose loss is c times the pool's mean.

    Args:
        cost: c, from `relative_cost`, or measured.

    Returns:
        rho, mean exact loss of the kept over mean exact loss of the pool.

    Example:
        >>> payoff(break_even_gain(1.1), 1.1)
        1.0
    """
    return cost


def _positions(anatomy: Anatomy, inputs: Any) -> int:
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    images = next((value for value in values if isinstance(value, Tensor) and value.ndim == 4), None)
    if images is None:
        return pools.length(inputs)
    # An image (R, channels, height, width) has a position per patch, and one for its class token.
    patches = next((module for module in anatomy.core.modules() if isinstance(module, nn.Conv2d)), None)
    down, right = patches.stride if patches is not None else images.shape[2:]
    return images.size(2) // int(down) * (images.size(3) // int(right)) + 1


def _own_weights(name: str, module: nn.Module) -> int:
    """Number of weights in a module's own matrices and kernels: those that multiply states."""
    if isinstance(module, nn.Embedding) or name.endswith(_ON_DISTANCES):
        return 0
    own = module._parameters.items()
    return sum(p.numel() for kind, p in own if p is not None and kind.endswith("weight") and p.ndim > 1)


def _outer_weights(anatomy: Anatomy) -> tuple[int, int, int]:
    """Weights outside of the layers: at every position before and behind them, and those that run at labelled ones."""
    heads = {module for name in anatomy.head for module in anatomy.core.get_submodule(name).modules()}
    pools_behind = anatomy.task == "sequence_classification"
    everywhere = {False: 0, True: 0}
    head, behind = 0, False
    layers = {layer for each in anatomy.lists for layer in each}
    for name, module in anatomy.core.named_modules(memo=layers):  # all but the layers
        behind = behind or module is anatomy.layers
        pooled = pools_behind and behind and not isinstance(module, nn.Conv1d) and not name.endswith(_BEFORE_POOLING)
        if module in heads or pooled:
            head += _own_weights(name, module)
        else:
            everywhere[behind] += _own_weights(name, module)
    return everywhere[False], everywhere[True], head


def _has_encoder(anatomy: Anatomy) -> bool:
    """Whether positions are of two kinds: of inputs in an encoder, and of labels in a decoder."""
    return bool(anatomy.earlier) or families.is_encoder_decoder(anatomy.core)


def _cross_weights(layer: nn.Module) -> int:
    """Weights of a decoder's layer that run at the encoder's positions: those of keys and values made of its states."""
    parts = ((name.split("."), name, module) for name, module in layer.named_modules())
    weights = sum(
        _own_weights(name, module)
        for path, name, module in parts
        if path[-1] in _KEYS_AND_VALUES and not set(_CROSS).isdisjoint(path)
    )
    if not weights:
        raise ValueError("its decoder's attention to the encoder has no name that is known")
    return weights


def _attention_width(anatomy: Anatomy, layer: nn.Module) -> int:
    config = getattr(anatomy.core, "config", None)
    heads, head_dim, hidden = (  # not every config has all of them
        getattr(config, name, None) for name in ("num_attention_heads", "head_dim", "hidden_size")
    )
    if heads and head_dim:
        return int(heads) * int(head_dim)
    if heads and hidden:
        return int(hidden)
    # The narrowest side of a layer's matrices is the width of its states (feed-forward layers are wider).
    return min((min(p.shape) for p in layer.parameters() if p.ndim == 2), default=0)


def _distances(anatomy: Anatomy) -> int:
    """Distances that DeBERTa's layers attend to, counted for each kind of attention to them; 0 for others."""
    config = getattr(anatomy.core, "config", None)
    if not getattr(config, "relative_attention", False):
        return 0
    reaches = (getattr(config, name, 0) for name in ("position_buckets", "max_relative_positions"))
    longest = getattr(config, "max_position_embeddings", 0)
    reach = next((reach for reach in reaches if reach and reach > 0), longest)
    return len(getattr(config, "pos_att_type", None) or ()) * 2 * int(reach)
