"""Checks that a model can be scored at an exit, and that the loss computed there is the model's own.

`check` lists all problems of a model. `verified` compares, once per model, the logits and the loss that the library
computes with those that the model itself returns: a family row only names modules, and the model may do something else
around them.
"""

import inspect
import logging
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from earlysift import exits, losses, pools
from earlysift.exits import Anatomy, Problem
from earlysift.families import Family
from earlysift.measures import LOSS

_LOG = logging.getLogger("earlysift")
_ROWS = 2  # samples per comparison
_PRECISE, _COARSE = 1e-4, 2e-2  # relative rounding errors in float32, and in shorter dtypes
_PROBLEM_OF_CONFIG: dict[str, losses.Problem] = {
    "regression": "regression",
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
}
# Models compared so far, and whether the head of an anatomy yields the model's own logits.
_COMPARED: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()


def check(model: nn.Module, *, depth: int = 1, family: Family | None = None, inputs: Any = None) -> list[Problem]:
    """All problems that prevent early-exit scoring of a model, at once, before the first step.

    Checks the structure. Given inputs, it also runs the model on them: truncated, to check that each layer is called
    once, that rows stay separate and that the global random state is unchanged; and in full, to compare its own logits,
    and with labels its own loss, with what the library computes from the family row.

    Args:
        model: The model, wrapped or not.
        depth: Number of layers that should run.
        family: A row for a model that `earlysift.families.FAMILIES` does not know.
        inputs: Inputs of the model (a mapping of keyword arguments, or one argument), at least one row; two are enough.
            With ``labels`` in the mapping, the loss is compared too.

    Returns:
        The problems, each with reason and remedy; empty if there are none.

    Example:
        >>> for problem in check(nn.Linear(2, 2)):
        ...     print(problem.reason)
        The model family of Linear is unknown, and its layers cannot be told: there is no list of like modules.
    """
    anatomy = exits.anatomy_or_problems(model, family)
    if not isinstance(anatomy, Anatomy):
        return anatomy
    count = len(anatomy.layers)
    if not 1 <= depth < count:
        return [
            Problem(
                f"Expected depth in 1..{count - 1} (an exit before the last of {count} layers), got {depth}.",
                "Choose a smaller depth, or score='exact' for the loss of the full model.",
            )
        ]
    if inputs is None:
        return []
    labels = None
    if isinstance(inputs, Mapping) and pools.has_labels(inputs):
        inputs, labels = pools.inputs_and_labels(inputs)
    problems = dry_run(model, anatomy, depth, inputs)
    if problems:
        return problems
    head_problems, other_problems = _comparison(model, anatomy, inputs, labels)
    return head_problems + other_problems


def verified(model: nn.Module, batch: Any, family: Family | None = None) -> Anatomy:
    """The anatomy of a model, compared with the model itself on the first call.

    The full model runs on two rows of the batch. If the head named by the family row does not yield the model's own
    logits, a warning says so and the model's own logits are used from then on. If the loss still differs from the one
    that the model returns, the row is wrong about the labels.

    Args:
        model: The model, wrapped or not; unchanged afterwards.
        batch: Batch or pool with labels.
        family: A row for a model that `earlysift.families.FAMILIES` does not know.

    Raises:
        ValueError: If the model does not fit its row, or returns another loss.
    """
    anatomy = exits.find_anatomy(model, family)
    if _key(anatomy) not in _COMPARED.get(anatomy.core, {}):
        _compare_and_remember(model, anatomy, batch)
    return as_compared(anatomy)


def as_compared(anatomy: Anatomy) -> Anatomy:
    """The anatomy, without its head if `verified` found that the head does not yield the model's own logits."""
    head_is_right = _COMPARED.get(anatomy.core, {}).get(_key(anatomy), True)
    return anatomy if head_is_right else _headless(anatomy)


def _key(anatomy: Anatomy) -> tuple[Any, ...]:
    return anatomy.head or anatomy.classifier, anatomy.task, anatomy.derived


def usable(model: nn.Module, batch: Any, family: Family | None = None) -> Anatomy:
    """The anatomy to score by: as compared so far, and compared now where its row is a guess.

    Args:
        model: The model, wrapped or not; unchanged afterwards.
        batch: Batch or pool with labels.
        family: A row for a model that `earlysift.families.FAMILIES` does not know.

    Raises:
        ValueError: As `verified`.
    """
    anatomy = exits.find_anatomy(model, family)
    return verified(model, batch, family) if anatomy.derived else as_compared(anatomy)


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    """The BatchNorm modules of a model by name, which in training would learn the statistics of selected samples.

    Example:
        >>> list(batch_norms(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))))
        ['1']
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.track_running_stats
    }


def problem_of(anatomy: Anatomy) -> losses.Problem | None:
    """The kind of classification that the model's config names, if it names one."""
    # The config takes precedence over the look of the labels: those of several regression outputs look multi-label.
    return _PROBLEM_OF_CONFIG.get(str(getattr(getattr(anatomy.core, "config", None), "problem_type", None)))


def dry_run(
    model: nn.Module, anatomy: Anatomy, depth: int, inputs: Any, *, exit_head: nn.Module | None = None
) -> list[Problem]:
    """Problems found by running the truncated model; part of `check`.

    Args:
        model: The model, wrapped or not.
        anatomy: Where its layers are.
        depth: Number of layers that should run.
        inputs: Inputs of the model, without labels; two rows are enough.
        exit_head: Module after the exit, if any.
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
            exits.uncompiled(),  # compiled code does not call hooks that are added later
            torch.no_grad(),
            exits.scoring_mode(model),
            exits.shortened(anatomy, depth, exit_head=exit_head),
        ):
            logits = exits.call(model, inputs)
    except Exception as error:  # models without some of their layers may fail in any way
        return _comparison(model, anatomy, inputs, None)[1] or [
            Problem(
                f"The model fails with only the first {depth} of its layers"
                f"{' and an exit_head after them' * (exit_head is not None)}: {error!r}.",
                "Give the path of the list that it loops over, or score with your own callable.",
            )
        ]
    finally:
        for handle in handles:
            handle.remove()
    expected = [1] * depth + [0] * (len(calls) - depth)
    returned = len(logits) if logits.ndim else 0
    draws = not torch.equal(torch.get_rng_state(), random_state)
    torch.set_rng_state(random_state)
    rules = [
        (
            calls != expected,
            f"Expected each of the first {depth} layers to run once and no other, got calls {calls}.",
            "The model does not loop over this list (perhaps it shares weights between layers, as ALBERT does): "
            "give the path of the list that it loops over, or score with your own callable.",
        ),
        (
            rows is not None and returned != rows,
            f"Expected one row of output per candidate, got {returned} rows for {rows} candidates.",
            "Turn padding-free or packed batches off.",
        ),
        (
            draws,
            "The model draws from the global random generator in evaluation mode: scoring would change training.",
            "Make its evaluation mode deterministic.",
        ),
    ]
    return [Problem(reason, remedy) for wrong, reason, remedy in rules if wrong]


def _compare_and_remember(model: nn.Module, anatomy: Anatomy, batch: Any) -> None:
    inputs, labels = pools.inputs_and_labels(batch)
    # Preferably rows with labels; but all ranks of a sharded model must run the same passes, so any rows will do.
    labelled = (labels.reshape(len(labels), -1) != losses.IGNORED_LABEL).any(dim=1)
    rows = labelled.int().argsort(descending=True, stable=True)[:_ROWS]
    inputs, labels = pools.inputs_and_labels(pools.take(batch, rows))
    head_problems, other_problems = _comparison(model, anatomy, inputs, labels)
    if other_problems:
        raise ValueError(exits.problem_report(model, head_problems + other_problems))
    for problem in head_problems:
        _LOG.warning("%s: %s The model's own logits are used.", type(anatomy.core).__name__, problem.reason)
    _COMPARED.setdefault(anatomy.core, {})[_key(anatomy)] = not head_problems


def _headless(anatomy: Anatomy) -> Anatomy:
    return anatomy._replace(head=(), classifier=(), positionwise=())


def _comparison(
    model: nn.Module, anatomy: Anatomy, inputs: Any, labels: Tensor | None
) -> tuple[list[Problem], list[Problem]]:
    """Problems of the head, which using the model's own logits solves, and other problems."""
    tolerances = []

    def note_tolerance(_layer: nn.Module, _arguments: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple | list) else output
        autocast = torch.is_autocast_enabled(states.device.type)  # also if entered by the model's own forward
        tolerances.append(_COARSE if autocast or states.dtype.itemsize < 4 else _PRECISE)

    handle = anatomy.layers[0].register_forward_hook(note_tolerance)
    try:
        with torch.no_grad(), exits.uncompiled(), exits.scoring_mode(model):
            own = exits.call(model, inputs)
    except Exception as error:  # models may fail in any way on inputs that do not fit
        return [], [
            Problem(
                f"The model fails on two rows of the pool ({_described(inputs)}): {error!r}.",
                _remedy(anatomy, inputs, "Check that the model can be called with a batch of the same loader."),
            )
        ]
    finally:
        handle.remove()
    dimensions, shape = (2, "(R, C)") if anatomy.task == "sequence_classification" else (3, "(R, T, V)")
    if own.ndim != dimensions or (labels is not None and len(own) != len(labels)):
        reason = f"Expected logits {shape} of two rows for {anatomy.task}, got {tuple(own.shape)}."
        return [], [Problem(reason, "Set the task in the family row.")]
    exact = torch.get_float32_matmul_precision() == "highest"
    tolerance = max(tolerances, default=_PRECISE) if exact else _COARSE
    # Auto mode takes what is named behind the pooling of a classifier for its head.
    named = anatomy._replace(head=anatomy.head or anatomy.classifier) if anatomy.derived else anatomy
    head_problems = _head_problems(model, named, inputs, own, tolerance)
    used = _headless(anatomy) if head_problems else anatomy
    return head_problems, _loss_problems(model, used, inputs, labels, tolerance)


def _described(inputs: Any) -> str:
    tensors = inputs.items() if isinstance(inputs, Mapping) else [("inputs", inputs)]
    return ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in tensors if isinstance(t, Tensor))


def _head_problems(model: nn.Module, anatomy: Anatomy, inputs: Any, own: Tensor, tolerance: float) -> list[Problem]:
    """Whether the head named by the row yields the model's own logits from the states that enter it."""
    if not anatomy.head:
        return []
    with torch.no_grad(), exits.uncompiled(), exits.scoring_mode(model):
        try:
            with exits.headless(anatomy):
                states = exits.call(model, inputs)
            logits = exits.head_of(anatomy)(states)
            difference = "another shape" if logits.shape != own.shape else _difference(logits, own, tolerance)
        except Exception as error:  # models without their head may fail in any way
            difference = f"{type(error).__name__}: {error}"
    if difference is None:
        return []
    return [
        Problem(
            f"The modules {'.'.join(anatomy.head)!r} do not yield the model's own logits from the states that enter "
            f"them ({difference}): the model does something else around them (a soft cap, a scale, a bias).",
            "Leave heads empty in the family row, heads=(), to use the model's own logits.",
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
        computed = _mean_loss(model, anatomy, inputs, labels)
    difference = _difference(computed, own, tolerance)
    if difference is None:
        return []
    remedy = (
        f"Set the task in the family row; it is now {anatomy.task!r}. causal_lm shifts the labels by one position, "
        "masked_lm and token_classification do not."
    )
    return [
        Problem(
            f"The loss that the model returns for these labels is {own.item():.4f}, but by the family row it is "
            f"{computed.item():.4f} ({difference}).",
            _remedy(anatomy, inputs, remedy),
        )
    ]


def _remedy(anatomy: Anatomy, inputs: Any, otherwise: str) -> str:
    """The remedy for an encoder-decoder whose decoder gets no inputs, otherwise the given one."""
    encoder_decoder = getattr(getattr(anatomy.core, "config", None), "is_encoder_decoder", False)
    if not encoder_decoder or not isinstance(inputs, Mapping) or "decoder_input_ids" in inputs:
        return otherwise
    return (
        "Put decoder_input_ids into the pool: pools are scored without labels, from which the model would make them. "
        "model.prepare_decoder_input_ids_from_labels(labels) returns them."
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
    """The loss that the model itself returns; None if it returns none."""
    if pools.LABELS_KEY not in inspect.signature(anatomy.core.forward).parameters:
        return None
    config: Any = getattr(anatomy.core, "config", None)
    before = getattr(config, "problem_type", None)
    try:
        with torch.no_grad(), exits.uncompiled(), exits.scoring_mode(model):
            output = exits.run(model, batch)
    except Exception:  # then there is no loss to compare with
        return None
    finally:
        if hasattr(config, "problem_type"):
            config.problem_type = before  # transformers models write the kind of labels into their config
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) and loss.numel() == 1 else None


def _difference(computed: Tensor, own: Tensor, tolerance: float) -> str | None:
    """A difference beyond rounding, in words; None if there is none."""
    computed, own = computed.double(), own.double()
    finite = torch.isfinite(own)
    if not torch.equal(finite, torch.isfinite(computed)):
        return "one of them is not finite"
    if not bool(finite.any()):
        return None
    largest = (computed - own)[finite].abs().max().item()
    if largest <= tolerance * own[finite].abs().max().item() + 1e-6:
        return None
    return f"they differ by up to {largest:.3g}"
