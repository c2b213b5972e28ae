"""Approximate losses: (model, pool) to one score per candidate, shape ``(R,)``, larger meaning more worth training on.

An `Approximation` is one value: `at_exit` and `exact` make them of an `earlysift.measures.Measure`, `custom` of a
callable ``(model, pool) -> (R,)``. All run under ``no_grad`` (never ``inference_mode``, whose tensors poison caches
that models build lazily), in evaluation mode with every module's own flag restored, a chunk of rows at a time, in
bfloat16 where the hardware has it, and draw from no global generator.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlysift import checks, exits, losses, passes, pools, ranks
from earlysift.anatomy import Anatomy, find_anatomy, is_compiled, wrapping
from earlysift.blend import Blend
from earlysift.exit_probe import ADAPTER_SHARE, ExitProbe, features
from earlysift.exits import Recorder
from earlysift.families import Family
from earlysift.ledger import Ledger
from earlysift.loss_memory import LossMemory
from earlysift.losses import Reduction
from earlysift.measures import ENTROPY, LOSS, MEASURES, Measure
from earlysift.pools import Pool
from earlysift.seeds import reseeded
from earlysift.trained_pool import EXACT, INPUTS, SLOPES, TrainedPool

Scorer = Callable[[nn.Module, Any], Tensor]

AUTO_DTYPE = "auto"
_HEAD = 0  # beside the depths of exits
SCORES = (*MEASURES, "probe", "memory", "blend", "exact", "uniform")
"""Scores by name."""


@dataclass(frozen=True)
class Learnt:
    """What a sifter learns as it goes; None where its score needs none of it.

    Attributes:
        memory: Losses that samples had when they were last trained on.
        probes: Models of their own at exits, by depth.
        blend: Predicts exact losses from what is cheap.
        trained: What uniform batches have shown as they were trained on.
    """

    memory: LossMemory | None = None
    probes: Mapping[int, ExitProbe] = field(default_factory=dict)
    blend: Blend | None = None
    trained: TrainedPool | None = None

    def parts(self) -> dict[str, LossMemory | ExitProbe | Blend | TrainedPool]:
        """Those that there are, by name."""
        probes = {f"probe_{depth}": probe for depth, probe in self.probes.items()}
        parts = {"memory": self.memory, **probes, "blend": self.blend, "trained": self.trained}
        return {name: part for name, part in parts.items() if part is not None}


@dataclass(frozen=True)
class Scoring:
    """How pools are scored, whatever the approximation.

    Attributes:
        family: A row for a model that `earlysift.families.FAMILIES` does not know.
        exit_head: Module after the exit, if any.
        reduction: Mean or sum over the labelled positions of a sample.
        max_positions: Labelled positions of a sample that an exit reads at most, see
            `earlysift.losses.positions_to_read`.
        chunk_rows: Candidates that run at once; bounds memory. None runs the whole pool at once.
        trim: Whether candidates of similar length run together, without the padding that none of them needs.
        dtype: Autocast dtype while scoring; ``"auto"`` is bfloat16 where the hardware computes in it, None leaves
            autocast as it is.
        key: What the random numbers depend on that a scorer of the user's own may draw.
        learnt: What `probe`, `memory` and `blend` know.
        step: The optimizer step, by which remembered losses have an age.
    """

    family: Family | None = None
    exit_head: nn.Module | None = None
    reduction: Reduction = "mean"
    max_positions: int | None = None
    chunk_rows: int | None = None
    trim: bool = False
    dtype: torch.dtype | str | None = AUTO_DTYPE
    key: tuple[int | str, ...] = ()
    learnt: Learnt = Learnt()
    step: int = 0

    def __post_init__(self) -> None:
        if self.chunk_rows is not None and self.chunk_rows < 1:
            raise ValueError(f"chunk_rows must be at least 1 or None, got {self.chunk_rows}.")


@dataclass(frozen=True)
class Approximation:
    """An approximate loss: how to score a pool, and what scoring runs.

    Attributes:
        name: What settings and checkpoints call it.
        score: From this value, a model, a pool of R candidates and how it is scored to float32 ``(R,)``; ``-inf`` for
            unlabelled samples.
        measure: What it reads off the predictions; None if that is unknown, and so is what scoring costs.
        depth: Layers that run, counted from the first; None runs all of them.
        recalls: Whether it looks at remembered losses, which several ranks do together.
    """

    name: str
    score: Callable[["Approximation", nn.Module, Pool, Scoring], Tensor]
    measure: Measure | None = None
    depth: int | None = None
    recalls: bool = False

    def __call__(self, model: nn.Module, pool: Any, **options: Any) -> Tensor:
        """Score a pool, with options of `Scoring`."""
        return self.score(self, model, pools.checked(pool), Scoring(**options))


def at_exit(measure: Measure, depth: int) -> Approximation:
    """A measure at the exit after ``depth`` layers, after which the model's own final norm and head follow: SIFT.

    Example:
        >>> from earlysift.measures import ENTROPY
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 3))
        >>> pool = (torch.zeros(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> at_exit(ENTROPY, 1)(model, pool, family=Family("0", task="sequence_classification")).shape
        torch.Size([5])

    Reference:
        Das et al., SIFT, ICML 2024, arXiv 2402.07052 (loss-based and entropy-based early exit).
    """
    return Approximation(measure.name, _measured, measure, depth)


def exact(measure: Measure = LOSS) -> Approximation:
    """A measure of the full model: what an early exit approximates, at full forward cost."""
    return Approximation("exact", _measured, measure)


def memory() -> Approximation:
    """The loss that each sample had when it was last trained on, unseen samples first: no pass at all.

    Reference:
        Stale losses: Jiang et al., 2019, arXiv 1910.00762.
    """
    return Approximation("memory", _remembered, recalls=True)


def probe(depth: int) -> Approximation:
    """The loss by a small model of its own at the exit, which learns from every pool: see `earlysift.exit_probe`."""
    return Approximation("probe", _probed, LOSS, depth)


def blend(depth: int) -> Approximation:
    """The exact loss as predicted from the probe at an exit and, where samples have ids, from remembered losses.

    See `earlysift.blend`.
    """
    return Approximation("blend", _blended, LOSS, depth, recalls=True)


def custom(scorer: Scorer) -> Approximation:
    """A scorer of the user's own, run as the others are: no gradients, evaluation mode, no global random state touched.

    It is called with the model and the pool as the loader gave it, documents of a flattened row as padded rows.
    """
    return Approximation(name_of(scorer), partial(_guarded, scorer))


def named(score: str | Scorer, depth: int) -> Approximation | None:
    """The approximation that `SiftConfig.score` and ``depth`` stand for; None for ``"uniform"``, which scores nothing.

    Example:
        >>> named("margin", 2).depth, named("exact", 2).depth, named("uniform", 2)
        (2, None, None)
    """
    if callable(score):
        return custom(score)
    if score in MEASURES:
        return at_exit(MEASURES[score], depth)
    at_any_depth = {"probe": probe, "blend": blend}
    if score in at_any_depth:
        return at_any_depth[score](depth)
    return {"exact": exact, "memory": memory}.get(score, lambda: None)()


def early_exit_loss(model: nn.Module, pool: Any, *, depth: int = 1, **options: Any) -> Tensor:
    """Loss of every candidate at the exit after ``depth`` layers: loss-based SIFT.

    Args:
        model: The model, wrapped or not; left as it was.
        pool: Pool of R candidates with labels.
        depth: Layers that run.
        options: Those of `Scoring`.

    Returns:
        float32 ``(R,)``, ``-inf`` for unlabelled samples.

    Example:
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 3))
        >>> pool = (torch.zeros(5, 4), torch.tensor([0, 1, 2, 0, 1]))
        >>> early_exit_loss(model, pool, family=Family("0", task="sequence_classification")).shape
        torch.Size([5])

    Reference:
        Das et al., SIFT, ICML 2024, arXiv 2402.07052 (loss-based early exit).
    """
    return at_exit(LOSS, depth)(model, pool, **options)


def exact_loss(model: nn.Module, pool: Any, **options: Any) -> Tensor:
    """Loss of every candidate under the full model: what early exit approximates, at full forward cost.

    Arguments and returns as in `early_exit_loss`.
    """
    return exact()(model, pool, **options)


def training_loss(
    model: nn.Module,
    batch: Any,
    *,
    weights: Tensor | None = None,
    items: Tensor | float | None = None,
    observe: Callable[[Tensor], None] | None = None,
    **options: Any,
) -> Tensor:
    """Differentiable loss of a batch, through the head on labelled positions only.

    Equal to the model's own loss (the mean over all labelled positions, or over samples in classification) to rounding,
    without the logits of positions that carry no label. The first call compares it with the model's own loss on two
    rows (`earlysift.checks.verified`).

    Args:
        model: The model, wrapped or not, in training mode.
        batch: Batch of b samples with labels.
        weights: Weight of every sample, ``(b,)`` (unbiased selection); None weighs every labelled position equally.
        items: What to divide the sum by, where a step has more batches than this one (accumulation, several processes);
            None is the number of labelled positions of this batch (1 for a CTC model whose losses are summed up).
        observe: Takes the mean loss of every sample, ``(b,)``, detached; ``-inf`` for unlabelled samples.
        options: Those of `sample_losses`; with ``depth`` it is the loss of the early exit, to be trained jointly.

    Returns:
        A float32 scalar.

    Raises:
        ValueError: If labels are no class ids of this model, or the model's own loss differs.
    """
    anatomy = checks.verified(model, batch, options.pop("family", None))
    sums, counts = _sample_losses(anatomy, model, batch, **options)
    if observe is not None:
        observe(torch.where(counts > 0, sums / counts, losses.UNLABELLED).detach())
    if weights is not None:
        sums = sums * weights
    if items is None:
        items = 1.0 if checks.adds_up(anatomy) else counts.sum().clamp(min=1)
    return sums.sum() / items


def sample_losses(
    model: nn.Module,
    batch: Any,
    *,
    family: Family | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Differentiable losses of the samples of a batch: what `training_loss` sums up.

    Args:
        model: The model, wrapped or not, in training mode.
        batch: Batch of b samples with labels.
        family: A row for a model that `earlysift.families.FAMILIES` does not know.
        options: ``depth`` (exit after this many layers; None is the full model), ``exit_head`` (module after the exit),
            ``detach_exit`` (whether gradients of the exit stop there), and ``chunk_tokens`` (positions that pass
            through the head at once).

    Returns:
        The sum of every sample's losses over its labelled positions, float32 ``(b,)``, 0 for unlabelled samples; and
        the number of these positions, float32 ``(b,)`` (1 in classification and CTC).
    """
    return _sample_losses(checks.verified(model, batch, family), model, batch, **options)


def _sample_losses(
    anatomy: Anatomy,
    model: nn.Module,
    batch: Any,
    *,
    depth: int | None = None,
    exit_head: nn.Module | None = None,
    detach_exit: bool = False,
    chunk_tokens: int = 1 << 30,
) -> tuple[Tensor, Tensor]:
    inputs, labels = passes.inputs_and_labels(anatomy, batch)
    with ExitStack() as stack:
        if depth is not None:
            stack.enter_context(exits.shortened(anatomy, depth, exit_head=exit_head, detach_exit=detach_exit))
        with exits.headless(anatomy):
            states = passes.states(model, anatomy, inputs, labels, synchronized=depth is None)
        head, problem = passes.head_of(anatomy), checks.problem_of(anatomy)
        return losses.sample_sums(anatomy.task, states, labels, head, problem=problem, chunk_tokens=chunk_tokens)


class Predictions(NamedTuple):
    """The labelled predictions of a batch of R samples, sample by sample: n predictions among V tokens or classes.

    ``logits`` float32 ``(n, V)``, ``targets`` int64 ``(n,)``, and ``counts`` int64 ``(R,)``: how many each sample has.
    """

    logits: Tensor
    targets: Tensor
    counts: Tensor


def predictions(model: nn.Module, batch: Any, *, family: Family | None = None) -> Predictions:
    """Run the model on a batch, its head on labelled positions only.

    Args:
        model: The model, wrapped or not, in the mode that it is to run in.
        batch: Batch of R samples with labels; classes, not indicators or numbers.
        family: A row for a model that `earlysift.families.FAMILIES` does not know.
    """
    anatomy = checks.verified(model, batch, family)
    inputs, labels = passes.inputs_and_labels(anatomy, batch)
    if not anatomy.by_token:
        logits = passes.call(model, inputs, synchronized=True)
        return Predictions(logits.float(), labels, torch.ones_like(labels))
    with exits.headless(anatomy):
        hidden = passes.call(model, inputs, synchronized=True)
    if anatomy.task == "causal_lm":
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    labelled = losses.labelled_positions(labels)
    logits = passes.head_of(anatomy)(hidden[labelled]).float()
    return Predictions(logits, labels[labelled], labelled.sum(dim=1))


def scoring_dtype(device: torch.device) -> torch.dtype | None:
    """bfloat16 where the device computes in it natively, else None (autocast left as it is)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else None
    return None


class _Chunk(NamedTuple):
    """Rows of a pool that ran at once.

    Attributes:
        begin: Number of the first of them in the pool, as it is run.
        inputs: What the model was called with.
        labels: Their labels.
        states: What entered the head; in classification the logits.
        positions: Labelled positions that are read; None in classification.
        at_exit: The output of the layer at the exit, where it was asked for.
    """

    begin: int
    inputs: Any
    labels: Tensor
    states: Tensor
    positions: Tensor | None
    at_exit: Tensor | None


def _run(
    anatomy: Anatomy,
    depth: int | None,
    model: nn.Module,
    pool: Pool,
    scoring: Scoring,
    read: Callable[[_Chunk], Tensor],
    recorder: Recorder | None = None,
) -> Tensor:
    """Run a pool to an exit, a chunk of rows at a time.

    Args:
        anatomy: The model's.
        depth: Layers that run; None runs all.
        model: The model.
        pool: R candidates.
        scoring: How they run.
        read: From a chunk to what is wanted of each of its rows, ``(rows, ...)``.
        recorder: Takes the output of the layer at the exit.

    Returns:
        ``(R, ...)``, in the order of the pool.
    """
    max_positions = None if depth is None else scoring.max_positions
    skips = anatomy.by_token and depth is not None and exits.skips_unlabelled(model, anatomy, max_positions)
    rows = scoring.chunk_rows or pool.size
    if scoring.trim:
        checks.require_trimmable(anatomy)
    order = pools.by_length(pool.data) if scoring.trim else None
    if order is not None:
        pool = pool.take(order)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(precision(anatomy, scoring.dtype))
        if depth is not None:
            stack.enter_context(exits.shortened(anatomy, depth, exit_head=recorder or scoring.exit_head))
        stack.enter_context(passes.scoring_mode(model))  # of the short model: walking the other layers takes time
        parts = []
        for start in range(0, pool.size, rows):
            chunk = pool.take(slice(start, start + rows)).data
            inputs, labels = passes.inputs_and_labels(anatomy, chunk if order is None else pools.trim_padding(chunk))
            positions = None
            with ExitStack() as at_head:
                if anatomy.by_token:
                    causal = anatomy.task == "causal_lm"
                    positions = losses.positions_to_read(labels, causal=causal, max_positions=max_positions)
                    at_head.enter_context(exits.headless(anatomy))
                if depth is not None and positions is not None and skips:
                    at_head.enter_context(exits.at_positions(anatomy, depth, positions, labels.shape))
                states = passes.states(model, anatomy, inputs, labels)
            at_exit = None if recorder is None else recorder.states
            parts.append(read(_Chunk(start, inputs, labels, states, positions, at_exit)))
        found = torch.cat(parts)
        return found if order is None else torch.empty_like(found).index_copy(0, order, found)


def _measured(approximation: Approximation, model: nn.Module, pool: Pool, scoring: Scoring) -> Tensor:
    measure = approximation.measure
    assert measure is not None
    anatomy = checks.usable(model, pool.data, scoring.family)
    score = partial(
        losses.sample_scores,
        measure,
        anatomy.task,
        head=passes.head_of(anatomy),
        problem=checks.problem_of(anatomy),
        reduction=scoring.reduction,
    )

    def read(chunk: _Chunk) -> Tensor:
        return score(chunk.states, chunk.labels, positions=chunk.positions)

    return _run(anatomy, approximation.depth, model, pool, scoring, read)


def _probed(approximation: Approximation, model: nn.Module, pool: Pool, scoring: Scoring) -> Tensor:
    return _read_by_probe(approximation, model, pool, scoring)[:, 0]


def _blended(approximation: Approximation, model: nn.Module, pool: Pool, scoring: Scoring) -> Tensor:
    learnt = scoring.learnt
    if learnt.blend is None:
        raise ValueError("A blend belongs to a Sifter with score='blend'. Score by it.")
    known: tuple[Tensor, ...] = ()
    if learnt.memory is not None and pool.ids is not None:
        device = next(model.parameters()).device
        known = ranks.look(learnt.memory, pool.ids, scoring.step, device).to(device).unbind()
    exit_losses, entropies = _read_by_probe(approximation, model, pool, scoring).unbind(dim=1)
    predicted = learnt.blend.predict(learnt.blend.inputs(exit_losses, entropies, *known))
    return torch.where(torch.isfinite(exit_losses), predicted, exit_losses)


def _read_by_probe(approximation: Approximation, model: nn.Module, pool: Pool, scoring: Scoring) -> Tensor:
    """Loss and entropy of the probe's predictions, ``(R, 2)``, from whose loss it is to learn; entropy 0 if unknown."""
    exit_probe = scoring.learnt.probes.get(approximation.depth or 0)
    if exit_probe is None:
        raise ValueError(
            "A probe belongs to a Sifter with score='probe' or score='blend' that scores at its depth, "
            f"{approximation.depth}. Score by it."
        )
    anatomy = checks.usable(model, pool.data, scoring.family)
    run = partial(_run, anatomy, approximation.depth, model, pool, scoring)
    if anatomy.task == "sequence_classification":
        assert approximation.depth is not None
        inputs, labels = pools.inputs_and_labels(pool.data, anatomy.labels)
        recorder = checks.recorder(model, anatomy, approximation.depth, inputs)
        return _read_by_classifier(run, recorder, labels, exit_probe, checks.problem_of(anatomy))
    if ranks.sharded(model):
        raise ValueError(
            "A probe of a language model learns through the head, whose weights are sharded here. Use score='loss', or "
            "give the Sifter an exit_head."
        )
    return _read_by_adapter(run, anatomy, exit_probe, scoring.reduction, math.ceil(pool.size / ADAPTER_SHARE))


def _read_by_classifier(
    run: Callable[..., Tensor],
    recorder: Recorder,
    labels: Tensor,
    exit_probe: ExitProbe,
    problem: losses.Problem | None,
) -> Tensor:
    classes = 0

    def read(chunk: _Chunk) -> Tensor:
        nonlocal classes
        classes = chunk.states.size(-1)
        assert chunk.at_exit is not None
        return _features_of(chunk.at_exit, chunk.inputs)

    inputs = run(read, recorder)
    with torch.enable_grad():
        values = _by_classifier(exit_probe, inputs, labels, classes, problem, (LOSS, ENTROPY))
        exit_probe.propose(values[:, 0])
    return values.detach()


def _features_of(states: Tensor, inputs: Any) -> Tensor:
    mask = pools.mask_of(inputs)
    # Models may put positions of their own before those of the mask; then all count.
    return features(states, mask if mask is not None and mask.shape == states.shape[:2] else None)


def _by_classifier(
    exit_probe: ExitProbe,
    inputs: Tensor,
    labels: Tensor,
    classes: int,
    problem: losses.Problem | None,
    measures: Sequence[Measure],
) -> Tensor:
    """Measures of a probe's predictions from features ``(R, F)``, ``(R, measures)``; nan where features are."""
    sound = torch.isfinite(inputs).all(dim=1)
    with torch.autocast(inputs.device.type, enabled=False):
        logits = exit_probe.classify(torch.where(sound[:, None], inputs, 0.0), classes=classes)
        problem = problem or losses.classification_problem(logits, labels)
        values = [
            # A regression predicts no distribution, whose entropy could be told.
            torch.zeros_like(logits[:, 0])
            if problem == "regression" and each.of_numbers is None
            else torch.where(sound, losses.class_scores(each, logits, labels, problem=problem), torch.nan)
            for each in measures
        ]
    return torch.stack(values, dim=1)


def losses_by_probe(anatomy: Anatomy, exit_probe: ExitProbe, output: Any, pool: Any, classes: int) -> Tensor:
    """Losses ``(R,)`` that a probe tells a pool from the output of the layer at its exit, in classification.

    Args:
        anatomy: The model's.
        exit_probe: The probe at that exit.
        output: Of the layer there.
        pool: The pool that ran.
        classes: Number of the model's outputs.
    """
    inputs, labels = pools.inputs_and_labels(pool, anatomy.labels)
    at_exit = _features_of(exits.states_of(output).detach(), inputs)
    return _by_classifier(exit_probe, at_exit, labels, classes, checks.problem_of(anatomy), (LOSS,))[:, 0]


@contextmanager
def lesson(
    model: nn.Module, batch: Any, probes: Mapping[int, ExitProbe], family: Family | None, ledger: Ledger
) -> Iterator[dict[str, Tensor]]:
    """Teach probes of a classifier by the forward pass within this context: no pass of their own.

    Compiled models are left alone: to look into them would compile them once more.

    Args:
        model: The model, wrapped or not.
        batch: What it is run on, drawn uniformly.
        probes: By depth.
        family: A row for a model that `earlysift.families.FAMILIES` does not know.
        ledger: Where its time goes.

    Yields:
        What `earlysift.trained_pool.TrainedPool.add` takes, filled when the context ends: exact losses, what the probes
        told of them before they learnt, and where the loss slopes. Empty where nothing was taught.
    """
    anatomy = find_anatomy(model, family)
    seen: dict[str, Tensor] = {}
    if is_compiled([*wrapping(model), *itertools.chain.from_iterable(anatomy.lists)]):
        yield seen
        return
    layers = list(anatomy.layers)
    modules: dict[int, nn.Module] = {depth: layers[depth - 1] for depth in probes}
    modules[_HEAD] = last = anatomy.core.get_submodule((anatomy.head or anatomy.classifier)[-1])
    with exits.latest_outputs(modules) as outputs, exits.latest_inputs({_HEAD: last}) as inputs:
        yield seen
    logits, labels = outputs.pop(_HEAD, None), pools.inputs_and_labels(batch, anatomy.labels)[1]
    if not isinstance(logits, Tensor):
        return  # the loop did something else
    with ledger.timed("lesson"), torch.enable_grad():
        for depth, output in outputs.items():
            if len(exits.states_of(output)) == len(labels):
                told = losses_by_probe(anatomy, probes[depth], output, batch, classes=logits.size(-1))
                probes[depth].propose(told)
                probes[depth].learn()
                seen[str(depth)] = told.detach()
        entering = next(iter(inputs.get(_HEAD, ())), None)
        complete = len(seen) == len(probes) and len(logits) == len(labels)
        if not complete or not isinstance(entering, Tensor) or not _is_linear(last, entering, logits):
            seen.clear()
            return
        seen |= _slopes(logits, labels.to(logits.device), checks.problem_of(anatomy)) | {INPUTS: entering.detach()}


def _is_linear(module: nn.Module, entering: Tensor, logits: Tensor) -> bool:
    """Whether these logits are a matrix of weights times one state a sample, and perhaps a bias."""
    weight = getattr(module, "weight", None)
    one_each = entering.ndim == logits.ndim == 2
    return one_each and isinstance(weight, Tensor) and weight.shape == (logits.size(1), entering.size(1))


def _slopes(logits: Tensor, labels: Tensor, problem: losses.Problem | None) -> dict[str, Tensor]:
    """Exact losses of logits, and their derivatives by them."""
    leaf = logits.detach().float().requires_grad_()
    problem = problem or losses.classification_problem(leaf, labels)
    exact = losses.class_scores(LOSS, leaf, labels, problem=problem)
    (slopes,) = torch.autograd.grad(torch.where(torch.isfinite(exact), exact, 0.0).sum(), leaf)
    return {EXACT: exact.detach(), SLOPES: slopes}


def _read_by_adapter(
    run: Callable[..., Tensor], anatomy: Anatomy, exit_probe: ExitProbe, reduction: Reduction, teachers: int
) -> Tensor:
    """Scores by an adapter, which learns from the first ``teachers`` rows, whatever the size of the chunks."""
    shared = passes.head_of(anatomy)
    trained: list[Tensor] = []

    def score(chunk: _Chunk, rows: slice, positions: Tensor) -> Tensor:
        return losses.sample_scores(
            LOSS,
            anatomy.task,
            chunk.states[rows],
            chunk.labels[rows],
            lambda states: shared(exit_probe.adapt(states)),
            reduction=reduction,
            positions=positions,
        )

    def read(chunk: _Chunk) -> Tensor:
        assert chunk.positions is not None
        first, positions = min(teachers - chunk.begin, len(chunk.labels)), chunk.positions.sort().values
        if first <= 0:
            return score(chunk, slice(None), positions)
        begin = first * chunk.labels.size(1)
        teaching = int(torch.searchsorted(positions, begin))
        with torch.enable_grad():
            trained.append(score(chunk, slice(0, first), positions[:teaching]))
        others = score(chunk, slice(first, None), positions[teaching:] - begin)
        return torch.cat([trained[-1].detach(), others])

    values = run(read)
    exit_probe.propose(torch.cat(trained))
    # The entropy over a vocabulary costs nearly as much as the loss itself.
    return torch.stack([values, torch.zeros_like(values)], dim=1)


def _remembered(_: Approximation, model: nn.Module, pool: Pool, scoring: Scoring) -> Tensor:
    memory = scoring.learnt.memory
    if memory is None or pool.ids is None:
        raise ValueError("Remembered losses belong to a Sifter with score='memory' and sample_id. Score by it.")
    device = next(model.parameters()).device
    return ranks.recall(memory, pool.ids, device).to(device)


def _guarded(scorer: Scorer, _: Approximation, model: nn.Module, pool: Pool, scoring: Scoring) -> Tensor:
    device = next(model.parameters(), torch.empty(0)).device
    with torch.no_grad(), passes.scoring_mode(model), reseeded(*scoring.key, device=device):
        return scorer(model, pool.data)


def precision(anatomy: Anatomy, dtype: torch.dtype | str | None) -> AbstractContextManager[Any]:
    """Autocast as scoring wants it on the model's device."""
    device = next(anatomy.core.parameters()).device
    chosen = scoring_dtype(device) if dtype == AUTO_DTYPE else dtype
    if chosen is None:
        return nullcontext()
    if not isinstance(chosen, torch.dtype):
        raise ValueError(f"dtype must be a torch.dtype, 'auto' or None, got {dtype!r}.")
    return torch.autocast(device.type, dtype=chosen)


def name_of(function: str | Callable[..., Any]) -> str:
    """What a checkpoint calls a function, which has no value to save; a partial with its arguments.

    Example:
        >>> name_of(partial(pools.take, indices=3))
        'take(indices=3)'
    """
    if isinstance(function, partial):
        options = [*map(repr, function.args), *(f"{key}={value!r}" for key, value in function.keywords.items())]
        return f"{name_of(function.func)}({', '.join(options)})"
    return function if isinstance(function, str) else getattr(function, "__qualname__", type(function).__qualname__)
