"""Whether a model can be scored at an exit, and whether what is computed there is the model's own loss.

`check` lists all problems of a model. `verified` compares, once for a model, the logits and the loss that the library
computes with those that the model itself returns: a family row names modules, and a row can be wrong about what the
model does around them.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from earlysift import exits, losses, pools
from earlysift.exits import Anatomy, Family, Problem
from earlysift.measures import LOSS

_LOG = logging.getLogger("earlysift")
_ROWS = 2  # samples that a comparison runs
_PRECISE, _COARSE = 1e-4, 2e-2  # relative differences that rounding explains, in float32 and in fewer bits
_PROBLEM_OF_CONFIG: dict[str, losses.Problem] = {
    "regression": "regression",
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
}
# Models that were compared already, and whether the head of an anatomy makes the model's own logits.
_COMPARED: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()


def check(model: nn.Module, *, depth: int = 1, family: Family | None = None, inputs: Any = None) -> list[Problem]:
    """All problems that stand between a model and early-exit scoring, at once, before the first step.

    Looks at the structure. Given inputs, it also runs two rows: through the truncated model, to count how often each
    layer is called and to see whether rows stay apart and the global random state is left alone; and through the full
    model, to compare its own logits, and with labels its own loss, with what the library computes from the family row.

    Args:
        model: The model, wrapped or not.
        depth: Number of layers that should run.
        family: A row for a model that `earlysift.exits.FAMILIES` does not know.
        inputs: What the model is called with (a mapping of keyword arguments, or one argument), at least one row; a
            mapping with ``labels`` has the loss compared, too.

    Returns:
        The problems, each with reason and remedy; empty if there are none.

    Example:
        >>> for problem in check(nn.Linear(2, 2)):
        ...     print(problem.reason)
        The model family of Linear is unknown.
    """
    found = exits.anatomy_or_problems(model, family)
    if not isinstance(found, Anatomy):
        return found
    problems = _depth_problems(found, depth)
    if problems or inputs is None:
        return problems
    labels = None
    if isinstance(inputs, Mapping) and pools.has_labels(inputs):
        inputs, labels = pools.inputs_and_labels(inputs)
    problems = dry_run(model, found, depth, inputs)
    if problems:
        return problems
    return [problem for part in _comparison(model, found, inputs, labels) for problem in part]


def verified(model: nn.Module, batch: Any, family: Family | None = None) -> Anatomy:
    """The anatomy of a model, compared with the model itself the first time that it is asked for.

    Two rows of the batch run through the full model. If the head that the family row names does not make the model's
    own logits, the model's own logits are used from then on, and a warning says so. If the loss still differs from the
    one that the model returns, the row is wrong about the labels.

    Args:
        model: The model, wrapped or not; left as it was.
        batch: Batch or pool with labels.
        family: A row for a model that `earlysift.exits.FAMILIES` does not know.

    Raises:
        ValueError: If the model does not fit its row, or its own loss is another one.
    """
    anatomy = exits.find_anatomy(model, family)
    if (anatomy.head, anatomy.task) not in _COMPARED.get(anatomy.core, {}):
        _compare_and_remember(model, anatomy, batch)
    return as_compared(anatomy)


def as_compared(anatomy: Anatomy) -> Anatomy:
    """The anatomy without its head, if `verified` has found that the head does not make the model's own logits."""
    sound = _COMPARED.get(anatomy.core, {}).get((anatomy.head, anatomy.task), True)
    return anatomy if sound else _headless(anatomy)


def problem_of(anatomy: Anatomy) -> losses.Problem | None:
    """The kind of classification that the model's config names, if it names one."""
    # What the model's config says goes before what labels look like: regression of several outputs looks multi label.
    return _PROBLEM_OF_CONFIG.get(str(getattr(getattr(anatomy.core, "config", None), "problem_type", None)))


def dry_run(
    model: nn.Module, anatomy: Anatomy, depth: int, inputs: Any, *, exit_head: nn.Module | None = None
) -> list[Problem]:
    """Problems that show when the truncated model runs; part of `check`.

    Args:
        model: The model, wrapped or not.
        anatomy: Where its layers are.
        depth: Number of layers that should run.
        inputs: What the model is called with, without labels; two rows are enough.
        exit_head: Module behind the exit, if any.
    """
    calls = [0] * len(anatomy.layers)

    def count_call(position: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[position] += 1

        return hook

    handles = [layer.register_forward_hook(count_call(i)) for i, layer in enumerate(anatomy.layers)]
    random_state = torch.get_rng_state()
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    rows = next((len(value) for value in values if isinstance(value, Tensor) and value.ndim > 0), None)
    try:
        with (
            exits.uncompiled(),  # compiled code would not call hooks added after compilation
            torch.no_grad(),
            exits.scoring_mode(model),
            exits.shortened(anatomy, depth, exit_head=exit_head),
        ):
            logits = exits.call(model, inputs)
    except Exception as error:  # whatever a model does when it misses its layers
        return _comparison(model, anatomy, inputs, None)[1] or [
            Problem(
                f"The model fails when only the first {depth} of its layers are there"
                f"{', with an exit_head behind them' * (exit_head is not None)}: {error!r}.",
                "Give the path of the list that it loops over, or score with a callable of your own.",
            )
        ]
    finally:
        for handle in handles:
            handle.remove()
    problems = []
    expected = [1] * depth + [0] * (len(calls) - depth)
    if calls != expected:
        problems.append(
            Problem(
                f"Expected each of the first {depth} layers to run once and no other, got calls {calls}.",
                "The model does not loop over this list (ALBERT-like weight sharing, say): "
                "give the path of the list that it loops over, or score with a callable of your own.",
            )
        )
    if rows is not None and logits.size(0) != rows:
        problems.append(
            Problem(
                f"Expected one row of output per candidate, got {logits.size(0)} rows for {rows} candidates.",
                "Turn padding-free or packed batches off.",
            )
        )
    if not torch.equal(torch.get_rng_state(), random_state):
        torch.set_rng_state(random_state)
        problems.append(
            Problem(
                "The model draws from the global random generator in evaluation mode: scoring would change training.",
                "Make its evaluation mode deterministic.",
            )
        )
    return problems


def _compare_and_remember(model: nn.Module, anatomy: Anatomy, batch: Any) -> None:
    inputs, labels = pools.inputs_and_labels(batch)
    # Rows with labels, if there are any. All ranks of a sharded model run the same passes, whatever theirs hold.
    labelled = (labels.reshape(len(labels), -1) != losses.IGNORED_LABEL).any(dim=1)
    rows = labelled.int().argsort(descending=True, stable=True)[:_ROWS]
    inputs, labels = pools.inputs_and_labels(pools.take(batch, rows))
    head_problems, others = _comparison(model, anatomy, inputs, labels)
    if others:
        raise ValueError(exits.problem_report(model, [*head_problems, *others]))
    for problem in head_problems:
        _LOG.warning("%s: %s The model's own logits are used.", type(anatomy.core).__name__, problem.reason)
    _COMPARED.setdefault(anatomy.core, {})[anatomy.head, anatomy.task] = not head_problems


def _headless(anatomy: Anatomy) -> Anatomy:
    return anatomy._replace(head=(), positionwise=())


def _comparison(
    model: nn.Module, anatomy: Anatomy, inputs: Any, labels: Tensor | None
) -> tuple[list[Problem], list[Problem]]:
    """Problems of the head, which the model's own logits solve, and others."""
    computed_in = []

    def look(layer: nn.Module, arguments: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple | list) else output
        autocast = torch.is_autocast_enabled(states.device.type)  # also if the model's own forward enters it
        computed_in.append(_COARSE if autocast or states.dtype.itemsize < 4 else _PRECISE)

    handle = anatomy.layers[0].register_forward_hook(look)
    try:
        with torch.no_grad(), exits.uncompiled(), exits.scoring_mode(model):
            own = exits.call(model, inputs)
    except Exception as error:  # whatever a model does with inputs that do not fit
        return [], [
            Problem(
                f"The model fails on two rows of the pool ({_described(inputs)}): {error!r}.",
                _remedy(anatomy, inputs, "See whether the model can be called with a batch of the same loader."),
            )
        ]
    finally:
        handle.remove()
    dimensions, shape = (2, "(R, C)") if anatomy.task == "sequence_classification" else (3, "(R, T, V)")
    if own.ndim != dimensions or (labels is not None and len(own) != len(labels)):
        reason = f"Expected logits {shape} of two rows for {anatomy.task}, got {tuple(own.shape)}."
        return [], [Problem(reason, "Set the task in the family row.")]
    exact = torch.get_float32_matmul_precision() == "highest"
    tolerance = max(computed_in, default=_PRECISE) if exact else _COARSE
    head_problems = _head_problems(model, anatomy, inputs, own, tolerance)
    used = _headless(anatomy) if head_problems else anatomy
    return head_problems, _loss_problems(model, used, inputs, labels, tolerance)


def _described(inputs: Any) -> str:
    tensors = inputs.items() if isinstance(inputs, Mapping) else [("inputs", inputs)]
    return ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in tensors if isinstance(t, Tensor))


def _head_problems(model: nn.Module, anatomy: Anatomy, inputs: Any, own: Tensor, tolerance: float) -> list[Problem]:
    """Whether the head that the row names, on the states that enter it, makes the model's own logits."""
    if not anatomy.head:
        return []
    with torch.no_grad(), exits.uncompiled(), exits.scoring_mode(model):
        try:
            with exits.headless(anatomy):
                states = exits.call(model, inputs)
            made = exits.head_of(anatomy)(states)
            difference = "another shape" if made.shape != own.shape else _difference(made, own, tolerance)
        except Exception as error:  # whatever a model does when it misses its head
            difference = f"{type(error).__name__}: {error}"
    if difference is None:
        return []
    return [
        Problem(
            f"The modules {'.'.join(anatomy.head)!r}, on the states that enter them, do not make the model's own "
            f"logits ({difference}): the model does something else around them (a soft cap, a scale, a bias).",
            "Leave heads empty in the family row, heads=(): then the model's own logits are used.",
        )
    ]


def _loss_problems(
    model: nn.Module, anatomy: Anatomy, inputs: Any, labels: Tensor | None, tolerance: float
) -> list[Problem]:
    """Whether the loss that the library computes is the model's own, if it has one."""
    if labels is None or not isinstance(inputs, Mapping):
        return []
    own = _own_loss(model, anatomy, {**inputs, pools.LABELS_KEY: labels})
    if own is None or not torch.isfinite(own):
        return []
    with torch.no_grad(), exits.uncompiled(), exits.scoring_mode(model):
        ours = _mean_loss(model, anatomy, inputs, labels)
    difference = _difference(ours, own, tolerance)
    if difference is None:
        return []
    remedy = (
        f"Set the task in the family row; it is {anatomy.task!r} now. causal_lm shifts the labels by one position, "
        "masked_lm and token_classification do not."
    )
    return [
        Problem(
            f"The loss that the model returns for these labels is {own.item():.4f}, but by the family row it is "
            f"{ours.item():.4f} ({difference}).",
            _remedy(anatomy, inputs, remedy),
        )
    ]


def _remedy(anatomy: Anatomy, inputs: Any, otherwise: str) -> str:
    """What helps an encoder-decoder whose decoder gets no inputs, or what helps other models."""
    decodes = getattr(getattr(anatomy.core, "config", None), "is_encoder_decoder", False)
    if not decodes or not isinstance(inputs, Mapping) or "decoder_input_ids" in inputs:
        return otherwise
    return (
        "Put decoder_input_ids into the pool: pools are scored without their labels, of which the model makes them. "
        "model.prepare_decoder_input_ids_from_labels(labels) does it."
    )


def _mean_loss(model: nn.Module, anatomy: Anatomy, inputs: Any, labels: Tensor) -> Tensor:
    if anatomy.task == "sequence_classification":
        per_sample = losses.class_scores(LOSS, exits.call(model, inputs), labels, problem=problem_of(anatomy))
        return per_sample[per_sample != losses.UNLABELLED].mean()
    causal = anatomy.task == "causal_lm"
    with exits.headless(anatomy):
        states = exits.call(model, inputs)
    sums = losses.token_scores(LOSS, states, labels, exits.head_of(anatomy), causal=causal, reduction="sum")
    return sums[sums != losses.UNLABELLED].sum() / losses.labelled_positions(labels, causal=causal).sum()


def _own_loss(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> Tensor | None:
    """What the model itself returns as its loss; None if it returns none."""
    if pools.LABELS_KEY not in inspect.signature(anatomy.core.forward).parameters:
        return None
    config: Any = getattr(anatomy.core, "config", None)
    before = getattr(config, "problem_type", None)
    try:
        with torch.no_grad(), exits.uncompiled(), exits.scoring_mode(model):
            output = exits.run(model, batch)
    except Exception:  # a model that cannot compute a loss here has none to compare with
        return None
    finally:
        if hasattr(config, "problem_type"):
            config.problem_type = before  # transformers models note in their config what labels look like
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _difference(ours: Tensor, own: Tensor, tolerance: float) -> str | None:
    """What differs by more than rounding, in words; None if nothing does."""
    ours, own = ours.double(), own.double()
    finite = torch.isfinite(own)
    if not torch.equal(finite, torch.isfinite(ours)):
        return "one of them is not finite"
    if not bool(finite.any()):
        return None
    most = (ours - own)[finite].abs().max().item()
    if most <= tolerance * own[finite].abs().max().item() + 1e-6:
        return None
    return f"they differ by up to {most:.3g}"


def _depth_problems(anatomy: Anatomy, depth: int) -> list[Problem]:
    count = len(anatomy.layers)
    if 1 <= depth < count:
        return []
    return [
        Problem(
            f"Expected depth in 1..{count - 1} (an exit before the last of {count} layers), got {depth}.",
            "Choose a smaller depth, or score='exact' for the loss of the full model.",
        )
    ]
