"""Checks that a model can be scored at an exit, and that the loss computed there is the model's own.

`check` lists all problems of a model. `verified` compares, once per model, the logits and the loss that the library
computes with those that the model itself returns: a family row only names modules, and the model may do something else
around them.
"""

import inspect
import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from earlysift import exits, families, losses, packing, passes, pools
from earlysift.anatomy import Anatomy, Problem, anatomy_or_problems, find_anatomy, problem_report
from earlysift.exits import ExitHead, Recorder
from earlysift.families import Family

_LOG = logging.getLogger("earlysift")
_ROWS = 2  # samples per comparison
_SUMS_TO_ONE = 1e-2  # probabilities in 16 bits
_PRECISE, _COARSE = 1e-4, 2e-2  # relative rounding errors in float32, and in shorter dtypes
_PROBLEM_OF_CONFIG: dict[str, losses.Problem] = {
    "regression": "regression",
    "single_label_classification": "single_label",
    "multi_label_classification": "multi_label",
}
_NO_MEAN = (
    "The loss that the model returns for two samples lies outside of the losses of each alone, so it is no mean over "
    "samples: it is a sum, or depends on the other samples of the batch, as that of contrastive pairs does.",
    "Score with your own callable, score=lambda model, pool: ..., or train on whole pools.",
)
_CACHED = (
    "Set model.config.use_cache = False: with a cache the model does not look whether position_ids begin anew within a "
    "row, and lets the documents of a row attend to one another."
)
_LOGITS: dict[str, tuple[int, str]] = {
    "sequence_classification": (2, "(R, C)"),
    "question_answering": (3, "(R, 2, T) of starts and ends"),
}
# Models compared so far, and whether the head of an anatomy yields the model's own logits.
_COMPARED: WeakKeyDictionary[nn.Module, dict[Any, bool]] = WeakKeyDictionary()
# Depths asked for so far, and what `unlike_the_last` found there.
_UNLIKE: WeakKeyDictionary[nn.Module, dict[int, tuple[torch.Size, torch.Size] | None]] = WeakKeyDictionary()


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
            With labels in the mapping, the loss is compared too.

    Returns:
        The problems, each with reason and remedy; empty if there are none.

    Example:
        >>> for problem in check(nn.Linear(2, 2)):
        ...     print(problem.reason)
        The model family of Linear is unknown, and its layers cannot be told: there is no list of like modules.
    """
    anatomy = anatomy_or_problems(model, family)
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
    if isinstance(inputs, Mapping) and pools.has_labels(inputs, anatomy.labels):
        inputs, labels = pools.inputs_and_labels(inputs, anatomy.labels)
    problems = dry_run(model, anatomy, depth, passes.model_inputs(anatomy, inputs, labels))
    if problems:
        return problems
    head_problems, other_problems = _comparison(model, anatomy, inputs, labels)
    return head_problems + other_problems + ([] if labels is None else _undecided(anatomy, labels))


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
    anatomy = find_anatomy(model, family)
    if _key(anatomy) not in _COMPARED.get(anatomy.core, {}):
        _compare_and_remember(model, anatomy, batch)
    return as_compared(anatomy)


def require_apart(model: nn.Module, rows: Any, flattened: Any, family: Family | None = None) -> None:
    """Refuse documents of a flattened row that depend on one another: they would be scored as what they are not.

    Args:
        model: The model, wrapped or not; unchanged afterwards.
        rows: Documents, a row each (`earlysift.packing.apart`).
        flattened: The same documents in one row, as the model is trained on them.
        family: A row for a model that `earlysift.families.FAMILIES` does not know.

    Raises:
        ValueError: If the model's logits differ, or a document is to predict the first token of the next one.
    """
    anatomy = find_anatomy(model, family)
    if not anatomy.by_token:
        raise ValueError(
            f"Documents of a flattened row are samples in tasks over tokens; the task is {anatomy.task}. Turn "
            "padding-free collation off."
        )
    (inputs, _), (together, labels) = (pools.inputs_and_labels(each, anatomy.labels) for each in (rows, flattened))
    with torch.no_grad(), passes.uncompiled(), passes.scoring_mode(model), _noted_tolerances(anatomy) as tolerances:
        alone = passes.call(model, inputs)
        own = passes.logits_of(passes.run(model, together, cache=True))
    alone = alone[inputs[packing.MASK].bool()][None]
    difference = "another shape" if alone.shape != own.shape else _difference(alone, own, max(tolerances))
    cached = getattr(getattr(anatomy.core, "config", None), "use_cache", False)
    begins = inputs[packing.MASK].sum(dim=1).cumsum(0)[:-1]
    crossing = anatomy.task == "causal_lm" and bool((labels[0, begins] != losses.IGNORED_LABEL).any())
    rules = [
        (
            difference is not None,
            f"The model does not keep the documents of a flattened row apart: their logits are others than alone "
            f"({difference}).",
            _CACHED if cached else "Use an attention that looks at position_ids, or turn padding-free collation off.",
        ),
        (
            crossing,
            "A document of the flattened row is to predict the first token of the next one.",
            f"Give the first token of every document the label {losses.IGNORED_LABEL}.",
        ),
    ]
    problems = [Problem(reason, remedy) for wrong, reason, remedy in rules if wrong]
    if problems:
        raise ValueError(problem_report(model, problems))


def as_compared(anatomy: Anatomy) -> Anatomy:
    """The anatomy, without its head if `verified` found that the head does not yield the model's own logits."""
    head_is_right = _COMPARED.get(anatomy.core, {}).get(_key(anatomy), True)
    return anatomy if head_is_right else _headless(anatomy)


def _key(anatomy: Anatomy) -> tuple[Any, ...]:
    return anatomy.head or anatomy.classifier, anatomy.task, anatomy.derived, anatomy.labels, anatomy.problem


def usable(model: nn.Module, batch: Any, family: Family | None = None) -> Anatomy:
    """The anatomy to score by: as compared so far, and compared now where its row is a guess.

    Args:
        model: The model, wrapped or not; unchanged afterwards.
        batch: Batch or pool with labels.
        family: A row for a model that `earlysift.families.FAMILIES` does not know.

    Raises:
        ValueError: As `verified`.
    """
    anatomy = find_anatomy(model, family)
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
    """The kind of classification that the row or the model's config names, if one does."""
    # The config takes precedence over the look of the labels: those of several regression outputs look multi-label.
    return anatomy.problem or _PROBLEM_OF_CONFIG.get(
        str(getattr(getattr(anatomy.core, "config", None), "problem_type", None))
    )


def require_trimmable(anatomy: Anatomy) -> None:
    """Raise where padding cannot be cut from inputs and labels alike."""
    if families.is_encoder_decoder(anatomy.core):
        raise ValueError(
            "trim=True cuts padding from inputs and labels alike, and those of an encoder-decoder "
            f"({type(anatomy.core).__name__}) have lengths of their own. Use trim=False."
        )


def unlike_the_last(
    model: nn.Module, anatomy: Anatomy, depth: int, inputs: Any
) -> tuple[torch.Size, torch.Size] | None:
    """Shapes of the states of a sample at an exit and behind the last layer, where they differ, as those of stages do.

    Found by a full pass of one row, once a model and depth, and without one where layers are of the same sizes.

    Args:
        model: The model, wrapped or not; left as it was.
        anatomy: Where its layers are.
        depth: The exit.
        inputs: Inputs of the model, at least one row.
    """
    known = _UNLIKE.setdefault(anatomy.core, {})
    if depth not in known:
        sizes = [[weight.shape for weight in layer.parameters()] for layer in list(anatomy.layers)[depth - 1 :]]
        found = None
        if any(each != sizes[0] for each in sizes):
            shapes = exits.shapes_of_states(model, anatomy, pools.take(inputs, slice(0, 1)))
            found = (shapes[depth - 1], shapes[-1]) if shapes[depth - 1] != shapes[-1] else None
        known[depth] = found
    return known[depth]


def recorder(model: nn.Module, anatomy: Anatomy, depth: int, inputs: Any) -> Recorder:
    """What reads the states at an exit for a probe of classes; arguments as in `unlike_the_last`."""
    unlike = unlike_the_last(model, anatomy, depth, inputs)
    return Recorder(unlike and unlike[1])


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
    lists = [list(layers) for layers in anatomy.lists]
    calls = [0] * sum(map(len, lists))

    def count_call(position: int) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            calls[position] += 1

        return hook

    handles = [layer.register_forward_hook(count_call(i)) for i, layer in enumerate(itertools.chain(*lists))]
    random_state = torch.get_rng_state()
    values = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    rows = next((len(value) for value in values if isinstance(value, Tensor) and value.ndim > 0), None)
    try:
        with (
            passes.uncompiled(),  # compiled code does not call hooks that are added later
            torch.no_grad(),
            passes.scoring_mode(model),
            exits.shortened(anatomy, depth, exit_head=exit_head),
        ):
            logits = passes.call(model, inputs)
    except Exception as error:  # models without some of their layers may fail in any way
        problems = _comparison(model, anatomy, inputs, None)[1]
        if not problems and (unlike := unlike_the_last(model, anatomy, depth, inputs)):
            problems = [
                Problem(
                    f"States of a sample behind layer {depth} have shape {tuple(unlike[0])}, and those that the head "
                    f"reads have {tuple(unlike[1])}.",
                    "Use score='probe', which learns to read them.",
                )
            ]
        return problems or [
            Problem(
                f"The model fails with only the first {depth} of its layers"
                f"{' and an exit_head after them' * isinstance(exit_head, ExitHead)}: {error!r}.",
                "Give the path of the list that it loops over, or score with your own callable.",
            )
        ]
    finally:
        for handle in handles:
            handle.remove()
    expected = [int(place < depth) for layers in lists for place in range(len(layers))]
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
    _, labels = pools.inputs_and_labels(batch, anatomy.labels)
    undecided = _undecided(anatomy, labels)
    inputs, labels = pools.inputs_and_labels(few_rows(anatomy, batch), anatomy.labels)
    head_problems, other_problems = _comparison(model, anatomy, inputs, labels)
    if other_problems or undecided:
        raise ValueError(problem_report(model, head_problems + other_problems + undecided))
    for problem in head_problems:
        _LOG.warning("%s: %s The model's own logits are used.", type(anatomy.core).__name__, problem.reason)
    _COMPARED.setdefault(anatomy.core, {})[_key(anatomy)] = not head_problems


def few_rows(anatomy: Anatomy, batch: Any) -> Any:
    """Two rows of a batch with labels, to try something on.

    Preferably labelled ones; but all ranks of a sharded model must run the same passes, so any rows will do.
    """
    inputs, labels = pools.inputs_and_labels(batch, anatomy.labels)
    if anatomy.task == "question_answering":
        labelled = (labels < pools.length(inputs)).all(dim=1)
    else:
        labelled = (labels.reshape(len(labels), -1) != losses.IGNORED_LABEL).any(dim=1)
    return pools.take(batch, labelled.int().argsort(descending=True, stable=True)[:_ROWS])


def _undecided(anatomy: Anatomy, labels: Tensor) -> list[Problem]:
    """Whether labels may be probabilities of classes, where neither row nor config nor the model's own loss tell."""
    if anatomy.task != "sequence_classification" or problem_of(anatomy) or not losses.is_soft(labels):
        return []
    distributions = bool((labels >= 0).all() and ((labels.sum(dim=1) - 1).abs() < _SUMS_TO_ONE).all())
    if labels.size(1) == 1 or not distributions:
        return []
    reason = f"The labels {tuple(labels.shape)} of every sample add up to 1, as probabilities of classes do"
    if _takes_labels(anatomy):
        _LOG.warning(
            "%s. %s takes them for indicators of several classes, and so do the scores. For cross entropy set "
            "config.problem_type = 'single_label_classification', and compute the loss in the loop.",
            reason,
            type(anatomy.core).__name__,
        )
        return []
    return [
        Problem(
            f"{reason}, and may be indicators of several classes as well.",
            "Say what the loop computes: family=Family(problem='single_label') for cross entropy, 'multi_label' for "
            "binary cross entropy.",
        )
    ]


def _headless(anatomy: Anatomy) -> Anatomy:
    return anatomy._replace(head=(), classifier=(), positionwise=())


@contextmanager
def _noted_tolerances(anatomy: Anatomy) -> Iterator[list[float]]:
    """Note which rounding errors the precision of the passes within this context explains."""
    tolerances = [_PRECISE if torch.get_float32_matmul_precision() == "highest" else _COARSE]

    def note(_layer: nn.Module, _arguments: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple | list) else output
        autocast = torch.is_autocast_enabled(states.device.type)  # also if entered by the model's own forward
        tolerances.append(_COARSE if autocast or states.dtype.itemsize < 4 else _PRECISE)

    handle = anatomy.layers[0].register_forward_hook(note)
    try:
        yield tolerances
    finally:
        handle.remove()


def _comparison(
    model: nn.Module, anatomy: Anatomy, inputs: Any, labels: Tensor | None
) -> tuple[list[Problem], list[Problem]]:
    """Problems of the head, which using the model's own logits solves, and other problems."""
    complete = passes.model_inputs(anatomy, inputs, labels)
    try:
        with torch.no_grad(), passes.uncompiled(), passes.scoring_mode(model), _noted_tolerances(anatomy) as tolerances:
            own = passes.call(model, complete)
    except Exception as error:  # models may fail in any way on inputs that do not fit
        return [], [
            Problem(
                f"The model fails on two rows of the pool ({_described(inputs)}): {error!r}.",
                _remedy(anatomy, inputs, "Check that the model can be called with a batch of the same loader."),
            )
        ]
    dimensions, shape = _LOGITS.get(anatomy.task, (3, "(R, T, V)"))
    if own.ndim != dimensions or (labels is not None and len(own) != len(labels)):
        reason = f"Expected logits {shape} of two rows for {anatomy.task}, got {tuple(own.shape)}."
        return [], [Problem(reason, "Set the task in the family row.")]
    tolerance = max(tolerances)
    # Auto mode takes what is named behind the pooling of a classifier for its head.
    named = anatomy._replace(head=anatomy.head or anatomy.classifier) if anatomy.derived else anatomy
    head_problems = _head_problems(model, named, complete, own, tolerance)
    used = _headless(anatomy) if head_problems else anatomy
    return head_problems, _loss_problems(model, used, inputs, labels, tolerance)


def _described(inputs: Any) -> str:
    tensors = inputs.items() if isinstance(inputs, Mapping) else [("inputs", inputs)]
    return ", ".join(f"{name} {t.dtype} {tuple(t.shape)}" for name, t in tensors if isinstance(t, Tensor))


def _head_problems(model: nn.Module, anatomy: Anatomy, inputs: Any, own: Tensor, tolerance: float) -> list[Problem]:
    """Whether the head named by the row yields the model's own logits from the states that enter it."""
    if not anatomy.head:
        return []
    with torch.no_grad(), passes.uncompiled(), passes.scoring_mode(model):
        try:
            with exits.headless(anatomy):
                states = passes.call(model, inputs)
            logits = passes.head_of(anatomy)(states)
            difference = "another shape" if logits.shape != own.shape else _difference(logits, own, tolerance)
        except Exception as error:  # models without their head may fail in any way
            difference = f"{type(error).__name__}: {error}"
    if difference is None:
        return []
    return [
        Problem(
            f"The modules {'.'.join(anatomy.head)!r} do not yield the model's own logits from the states that enter "
            f"them ({difference}): the model does something else around them (a soft cap, a scale, a bias).",
            "Use the model's own logits: a full family row without heads, Family(layers=..., heads=(), task=...).",
        )
    ]


def _loss_problems(
    model: nn.Module, anatomy: Anatomy, inputs: Any, labels: Tensor | None, tolerance: float
) -> list[Problem]:
    """Whether the loss that the library computes is the model's own, if it has one."""
    if labels is None or not isinstance(inputs, Mapping):
        return []
    batch = pools.with_labels(inputs, labels, anatomy.labels)
    own = _own_loss(model, anatomy, batch)
    if own is None or not torch.isfinite(own):
        return []
    with torch.no_grad(), passes.uncompiled(), passes.scoring_mode(model):
        computed = _mean_loss(model, anatomy, inputs, labels)
    difference = _difference(computed, own, tolerance)
    if difference is None:
        return []
    # Ranks of a sharded model must all make the same passes.
    if not hasattr(anatomy.core, "_get_fsdp_state") and _is_no_mean(model, anatomy, batch, tolerance):
        return [Problem(*_NO_MEAN)]
    return [
        Problem(
            f"The loss that the model returns for these labels is {own.item():.4f}, but by the family row it is "
            f"{computed.item():.4f} ({difference}).",
            _remedy(anatomy, inputs, _other_loss(anatomy, inputs, labels)),
        )
    ]


def _is_no_mean(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any], tolerance: float) -> bool:
    """Whether the model's loss of two samples lies outside of those of each, where no weighted mean of them can be."""
    if pools.pool_size(batch) < _ROWS:
        return False
    parts = (slice(0, _ROWS), *(slice(row, row + 1) for row in range(_ROWS)))
    found = [_own_loss(model, anatomy, pools.take(batch, part)) for part in parts]
    if not all(loss is not None and torch.isfinite(loss) for loss in found):
        return False
    together, *alone = (loss.item() for loss in found if loss is not None)
    margin = tolerance * abs(together) + 1e-6
    return not min(alone) - margin <= together <= max(alone) + margin


def _other_loss(anatomy: Anatomy, inputs: Mapping[str, Any], labels: Tensor) -> str:
    """The way out where the model computes another loss than the row says."""
    if packing.PLACES in inputs and getattr(getattr(anatomy.core, "config", None), "use_cache", False):
        return _CACHED
    if anatomy.task == "question_answering":
        return "Have both of start and end within the sequence, or neither: the model averages the mean of each."
    if anatomy.task != "sequence_classification":
        return (
            f"Set the task in the family row; it is now {anatomy.task!r}. causal_lm shifts the labels by one position, "
            "masked_lm and token_classification do not."
        )
    return (
        f"For labels {tuple(labels.shape)} of {labels.dtype} say what the model computes, "
        "family=Family(problem='single_label' (cross entropy), 'multi_label' or 'regression'). If the loop computes "
        "the loss, put the labels under a key that the model does not take, and name it: Family(labels='...')."
    )


def _remedy(anatomy: Anatomy, inputs: Any, otherwise: str) -> str:
    """The remedy for an encoder-decoder whose decoder gets no inputs, otherwise the given one."""
    if not (anatomy.by_token and families.is_encoder_decoder(anatomy.core)) or "decoder_input_ids" in inputs:
        return otherwise
    made_of = "decoder_input_ids are made of the labels"
    made = {"seq2seq_lm": f"Set decoder_start_token_id and pad_token_id in the model's config, by which {made_of}"}
    remedy = made.get(anatomy.task, f"Set task='seq2seq_lm' in the family row, by which {made_of}")
    return f"{remedy}, or put them into the pool: it is scored without labels."


def _mean_loss(model: nn.Module, anatomy: Anatomy, inputs: Any, labels: Tensor) -> Tensor:
    inputs = passes.model_inputs(anatomy, inputs, labels)
    with exits.headless(anatomy):
        states = passes.states(model, anatomy, inputs, labels)
    head, problem = passes.head_of(anatomy), problem_of(anatomy)
    sums, counts = losses.sample_sums(anatomy.task, states, labels, head, problem=problem)
    return sums.sum() / (1 if adds_up(anatomy) else counts.sum())


def adds_up(anatomy: Anatomy) -> bool:
    """Whether the model's loss of a batch is the sum of its samples' losses, and not their mean."""
    return anatomy.task == "ctc" and getattr(anatomy.core.config, "ctc_loss_reduction", "mean") == "sum"


def _takes_labels(anatomy: Anatomy) -> bool:
    return set(anatomy.labels) <= inspect.signature(anatomy.core.forward).parameters.keys()


def _own_loss(model: nn.Module, anatomy: Anatomy, batch: Mapping[str, Any]) -> Tensor | None:
    """The loss that the model itself returns; None if it returns none."""
    if not _takes_labels(anatomy):
        return None
    config: Any = getattr(anatomy.core, "config", None)
    before = getattr(config, "problem_type", None)
    try:
        with torch.no_grad(), passes.uncompiled(), passes.scoring_mode(model):
            output = passes.run(model, batch, cache=packing.PLACES in batch)
    except Exception:  # then there is no loss to compare with
        return None
    finally:
        if hasattr(config, "problem_type"):
            config.problem_type = before  # transformers models write the kind of labels into their config
    loss = passes.named_output(output, "loss")
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
