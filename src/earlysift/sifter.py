"""`Sifter`: the one stateful object. Pools in, smaller batches of the same structure out."""

import copy
import dataclasses
import json
import logging
import math
import reprlib
import warnings
from collections import deque
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext, suppress
from functools import partial
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from earlysift import (
    checks,
    controller,
    costs,
    exits,
    losses,
    pending,
    pools,
    probes,
    ranks,
    schedules,
    scorers,
    selectors,
)
from earlysift.config_files import differences
from earlysift.controller import Control, finite, whole
from earlysift.exits import Anatomy, ExitHead, Family
from earlysift.fidelity import fidelity
from earlysift.ledger import Ledger
from earlysift.losses import Reduction
from earlysift.pending import Pending
from earlysift.schedules import Schedule
from earlysift.scorers import Scorer
from earlysift.seeds import seeded
from earlysift.selectors import Selection, Selector

STATE_VERSION = 3
_LOG = logging.getLogger("earlysift")
_RULES: dict[str, Selector] = {"greedy": selectors.greedy, "unbiased": selectors.proportional}
_SCORES = ("loss", "entropy", "exact", "uniform")
_SCHEDULE_SAMPLES = (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)
_COUNTS = ("candidates", "scored", "trained", "unlabelled", "non_finite")
_FIDELITY = ("rank_correlation", "overlap", "gain")


class _Option(NamedTuple):
    """What a value of an option must be, how to say so, and what the option is."""

    sound: Callable[[Any], bool]
    expected: str
    meaning: str = ""


def _one_of(*names: str) -> _Option:
    return _Option(lambda value: isinstance(value, str) and value in names, " or ".join(names))


_OPTIONS = {
    "model": _Option(lambda value: isinstance(value, nn.Module), "a torch.nn.Module"),
    "keep": _Option(
        lambda value: finite(value) and 0 < value <= 1,
        "in (0, 1]",
        "It is the share of the pool that is trained on; 0.5 is usual.",
    ),
    "kept": _Option(
        lambda value: value is None or whole(value, 1),
        "at least 1",
        "It is the number of candidates trained on per step, a whole number, or None.",
    ),
    "depth": _Option(
        lambda value: whole(value, -(1 << 63)), "a whole number", "It is the number of layers that run for a score."
    ),
    "score": _Option(
        lambda value: callable(value) or (isinstance(value, str) and value in _SCORES),
        f"one of {', '.join(_SCORES)} or a callable",
    ),
    "select": _Option(callable, "a callable (scores, kept, generator) -> Selection"),
    "schedule": _Option(
        lambda value: value is None or callable(value), "a callable from steps to shares of steps that select, or None"
    ),
    "mode": _one_of("fixed", "auto"),
    "control": _Option(lambda value: value is None or isinstance(value, Control), "a Control or None"),
    "family": _Option(lambda value: value is None or isinstance(value, Family), "a Family or None"),
    "reduction": _one_of("mean", "sum"),
    "max_positions": _Option(lambda value: value is None or whole(value, 1), "at least 1 or None"),
    "drop_outliers": _Option(
        lambda value: finite(value) and 0 <= value < 1, "in [0, 1)", "It is a share of the pool; 0 is off."
    ),
    "probe_every": _Option(
        lambda value: whole(value, 0), "a whole number of at least 0", "It is a number of steps; 0 never probes."
    ),
    "trim": _Option(lambda value: isinstance(value, bool), "True or False"),
    "scope": _one_of("local", "global"),
    "seed": _Option(lambda value: whole(value, -(1 << 63)), "a whole number"),
    "chunk_rows": _Option(lambda value: value is None or whole(value, 1), "at least 1 or None"),
    "dtype": _Option(
        lambda value: (
            value is None
            or (isinstance(value, torch.dtype) and value.is_floating_point)
            or (isinstance(value, str) and value == scorers.AUTO_DTYPE)
        ),
        "a torch.dtype of floating point, 'auto' or None",
    ),
    "exit_head": _Option(lambda value: value is None or isinstance(value, nn.Module), "an ExitHead or None"),
    "exit_optimizer": _Option(
        lambda value: value is None or callable(getattr(value, "step", None)), "an optimizer or None"
    ),
    "ledger": _Option(lambda value: value is None or isinstance(value, Ledger), "a Ledger or None"),
}
"""The arguments of `Sifter`, as rows of data."""


def require_sound(options: Mapping[str, Any]) -> None:
    """Refuse arguments of `Sifter` that cannot work with any model, all at once.

    Raises:
        ValueError: With a sentence for each.

    Example:
        >>> require_sound({"keep": 0.5, "score": "loss", "mode": "fixed", "depth": 1.5, "seed": "x"})
        Traceback (most recent call last):
        ValueError: depth must be a whole number, got 1.5. It is the number of layers that run for a score.
        seed must be a whole number, got 'x'.
    """
    wrong = {name: value for name, value in options.items() if not _OPTIONS[name].sound(value)}
    problems = [
        f"{name} must be {_OPTIONS[name].expected}, got {reprlib.repr(value)}. {_OPTIONS[name].meaning}".strip()
        for name, value in wrong.items()
    ]
    score, keep, mode, control = (options.get(name) for name in ("score", "keep", "mode", "control"))
    if not wrong.keys() & {"score", "keep", "mode", "control"}:
        rows = [
            (
                mode == "auto" and (score not in ("loss", "entropy") or keep == 1),
                "Auto mode chooses among early exits and needs keep below 1, got "
                f"score={_name(score or '')!r}, keep={keep}. Use score='loss' or 'entropy', or mode='fixed'.",
            ),
            (
                mode == "fixed" and control is not None,
                "A control came with mode='fixed', which chooses nothing. Set mode='auto'.",
            ),
        ]
        problems += [message for bad, message in rows if bad]
    if options.get("exit_optimizer") is not None and options.get("exit_head") is None:
        problems.append("An exit_optimizer came without an exit_head. Pass both, or neither.")
    if problems:
        raise ValueError("\n".join(problems))


class Unusable(ValueError):
    """Too few of a pool's scores are finite, so that nothing can be selected by them."""


class _Seen(NamedTuple):
    """The scores of a step: how many there are, how many to keep, and how many are ``unlabelled``, ``non_finite``."""

    step: int
    size: int
    kept: int
    counts: dict[str, Any]


class Sifter:
    """Keep the samples of a pool that matter: score through an early exit, select, hand out the smaller batch.

    The model is not modified and the loop stays yours. A step is a step of the optimizer: one call of `sift`, or with
    gradient accumulation one for each micro-step. All randomness is derived from (seed, step, micro-step, rank), so a
    resumed run makes the same picks. A sifter can be pickled and deep-copied, together with its model.

    Args:
        model: Any supported Transformer, or a module with a `Family` row; in training mode.
        keep: b / R, in (0, 1]. The number kept is fixed by the first pool. 1.0 hands pools through untouched.
        kept: b, the number of candidates to keep; None is keep times the rows of the first pool.
        depth: Layers that run for a score, 1 to one less than the model has.
        score: ``"loss"``, ``"entropy"``, ``"exact"``, ``"uniform"``, or a scorer ``(model, pool) -> (R,)``.
        select: Selector ``(scores, kept, generator) -> Selection``.
        schedule: Optimizer step to share of steps that select; None selects at every step.
        mode: ``"fixed"`` selects as told; ``"auto"`` starts uniformly, measures by probes whether selection would pay,
            and chooses rule, depth and keep, or goes back to uniform batches (`earlysift.controller`). The unbiased
            rule is a candidate only in loops that read `weights`.
        control: What auto may choose from and spend; None is `earlysift.controller.Control()`. The sifter's own depth
            and keep are always among the candidates.
        family: A row for a model that `earlysift.exits.FAMILIES` does not know.
        reduction: Mean or sum over a sample's labelled positions.
        max_positions: Labelled positions of a sample that an early exit reads at most, spread over its length: a
            cheaper and noisier score. Worth it where labels are many (causal language models); shapes are then fixed,
            and no accelerator is waited for. None reads all.
        drop_outliers: Share of the largest finite scores taken out of candidacy, in [0, 1).
        probe_every: Optimizer steps between fidelity probes (one exact scoring of a step's first pool, charged as
            ``probe``); 0 never probes.
        trim: Whether to cut padding that no kept row needs, and, in scoring, that none of the candidates needs which
            are scored together: those of like length. Shapes then vary, and an accelerator is waited for.
        scope: With several ranks, ``"local"`` selects b of the R candidates of every rank, ``"global"`` the best of all
            ranks' candidates together: scores are gathered and chosen rows exchanged, so that every rank still trains
            on b rows. Pools that differ in length only are padded to the longest one by their ``attention_mask``; else
            they need the same shapes on all ranks. `selection` counts through all of them.
        seed: Seed of the selection.
        chunk_rows: Candidates scored at once; None is twice the number kept (and that number in exact scoring and
            probes), which without gradients needs no more memory than a training step.
        dtype: Autocast dtype while scoring, see `earlysift.scorers.early_exit_loss`.
        exit_head: An `ExitHead` for models whose shared head ranks badly at the exit.
        exit_optimizer: Its optimizer, for training it on detached features within `sift`. Without one, train it
            jointly: put its parameters into your optimizer and add `exit_loss` to your loss.
        ledger: Where times and counts go; None keeps them in memory. A row lasts from one call of `sift` to the next,
            so ``step_ms`` holds training and waiting for data, too; time them apart with
            ``sifter.ledger.timed("train")`` and ``timed("wait")``.

    Raises:
        ValueError: With all arguments that cannot work, or else with all problems of the model at once.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 3))
        >>> sifter = Sifter(model, keep=0.5, family=Family("0", task="sequence_classification"))
        >>> inputs, labels = sifter.sift((torch.randn(8, 4), torch.zeros(8, dtype=torch.long)))
        >>> inputs.shape, labels.shape
        (torch.Size([4, 4]), torch.Size([4]))

    Reference:
        Das et al., SIFT, ICML 2024, arXiv 2402.07052.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        keep: float = 0.5,
        kept: int | None = None,
        depth: int = 1,
        score: str | Scorer = "loss",
        select: Selector = selectors.greedy,
        schedule: Schedule | None = None,
        mode: Literal["fixed", "auto"] = "fixed",
        control: Control | None = None,
        family: Family | None = None,
        reduction: Reduction = "mean",
        max_positions: int | None = None,
        drop_outliers: float = 0.0,
        probe_every: int = 100,
        trim: bool = False,
        scope: Literal["local", "global"] = "local",
        seed: int = 0,
        chunk_rows: int | None = None,
        dtype: torch.dtype | str | None = scorers.AUTO_DTYPE,
        exit_head: ExitHead | None = None,
        exit_optimizer: torch.optim.Optimizer | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        require_sound({name: value for name, value in locals().items() if name in _OPTIONS})
        needs_exit = score in ("loss", "entropy") or exit_head is not None
        if needs_exit:
            problems = checks.check(model, depth=depth, family=family)
            if problems:
                raise ValueError(exits.problem_report(model, problems))
        self.model = model
        self.keep = float(keep)  # as everything here, no number of another library: it goes into the state
        self.depth = int(depth)
        self.score = score
        self.select = select
        self.schedule = schedule or schedules.constant()
        self.mode = mode
        self.family = family
        self.reduction = reduction
        self.max_positions = None if max_positions is None else int(max_positions)
        self.drop_outliers = float(drop_outliers)
        self.probe_every = int(probe_every)
        self.trim = trim
        self.scope = scope
        self.seed = int(seed)
        self.chunk_rows = chunk_rows
        self.dtype = dtype
        self.exit_head = exit_head
        self.exit_optimizer = exit_optimizer
        self.ledger = ledger or Ledger()
        self.selection: Selection | None = None
        self._checked = not (needs_exit or score == "exact")
        self._anatomy: Anatomy | None = None
        # With a scorer of the user's own, a model that we cannot take apart only lacks probes and FLOPs.
        required = needs_exit or score == "exact" or family is not None
        with nullcontext() if required else suppress(ValueError):
            self._anatomy = exits.find_anatomy(model, family)
        self._laws: dict[int | None, costs.FlopsLaw] = {}
        self._uncounted = False  # whether it was said that FLOPs cannot be counted
        self._step = 0
        self._micro_step = 0  # of the latest pool
        self._pools_per_step = 1  # the most that were seen
        self._kept = None if kept is None else int(kept)
        self._largest = 0  # pool
        self._counts = dict.fromkeys(_COUNTS, 0)
        self._unjudged: _Seen | None = None  # scores of the pool before that an accelerator has yet to count
        self._fidelity: dict[str, float] = {}
        self._broken_probes = 0  # in a row
        self._told_of_rest = False
        self._control = self._candidates(control or Control()) if mode == "auto" else None
        self._steering: controller.State | None = None
        if self._control and self._control.reference_costs:  # else prices need a pool
            due = controller.next_probe(0, self._control, self._control.reference_costs)
            self._steering = controller.State(next_probe=due)
        self._weights_read = False  # a loop that ignores weights must never be given the unbiased rule
        self._left_ms: float | None = None
        self._outside_ms: deque[float] = deque(maxlen=100)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__ | {"_left_ms": None}  # the clock of another process may be another
        if self._unjudged is not None:
            state["_unjudged"] = self._unjudged._replace(counts=pending.arrived(self._unjudged.counts))
        return state

    @property
    def step(self) -> int:
        """Number of optimizer steps begun so far: of pools sifted, but for those that were accumulated."""
        return self._step

    @property
    def wanted(self) -> int:
        """Candidates that the next call of `sift` can use: b on a step of auto mode that neither selects nor probes.

        Loops that read on demand need not read what nobody looks at. A uniform step of auto mode trains on the first b
        rows, so that candidates behind them may be offered again. The next call is taken for the first of its step:
        only that one probes.
        """
        if self._kept is None:
            raise ValueError("How many are kept is known after the first pool. Pass kept= to know it before.")
        pool = round(self._kept / self.keep)
        if self.mode == "fixed" or self._steering is None or self._step >= self._steering.next_probe:
            return pool
        choice = self._steering.choice
        return self._kept if choice is None else min(pool, round(self._kept / choice.keep))

    @property
    def weights(self) -> Tensor:
        """Weights ``(b,)`` of the latest batch: 1 unless the selector is unbiased."""
        if self.selection is None:
            raise ValueError("There are no weights before the first call of sift.")
        self._weights_read = True
        return self.selection.weights

    def begin(self, micro_step: int = 0) -> None:
        """Open the ledger's row of the next call of `sift`: what comes before it, as waiting for data, is part of it.

        Args:
            micro_step: As `sift` will be told.
        """
        self.ledger.begin(self._place(micro_step)[0], micro_step)

    def sift(self, pool: Any, *, micro_step: int = 0) -> Any:
        """Keep b of the R candidates of a pool.

        A pool with fewer than b candidates, as the last one of an epoch, is trained on whole, unless it is the first.

        Args:
            pool: A batch of R candidates: a mapping (dict, BatchEncoding), tuple, list, tensor, or nesting of these.
            micro_step: With gradient accumulation the number of this pool within its optimizer step: 0, 1, ..., so
                ``sift(pool, micro_step=i % accumulate)`` for the pool i of an epoch. A number that does not rise begins
                a new step. Schedules, probes and `step` count optimizer steps.

        Returns:
            The same structure with ``(b, ...)`` tensors; `weights` holds its weights.

        Raises:
            ValueError: If the pool is malformed, too small, without labels, or without enough finite scores. The
                sifter's state is then unchanged. An accelerator is not waited for: scores on it are refused, or warned
                of, by the next call (or `judge`), which names their step and hands out nothing; going on sifts its
                pool. Steps that wait anyway (probes, an exit_optimizer, global scope) refuse at once.
        """
        if not whole(micro_step, 0):
            raise ValueError(
                f"micro_step must be a whole number of at least 0, got {reprlib.repr(micro_step)}. It is the number of "
                "the pool within its optimizer step."
            )
        micro_step = int(micro_step)
        size = pools.pool_size(pool)
        kept = size if self.keep == 1 else self._kept or max(1, round(self.keep * size))
        rest = size < kept
        if rest and self._step == 0:
            raise ValueError(
                f"Expected at least {kept} candidates (the number kept) in the first pool, got {size}. "
                "Use a larger pool, or keep fewer."
            )
        if rest and size == 0:
            raise ValueError("Expected at least one candidate, got 0. Leave empty batches out.")
        step, first = self._place(micro_step)
        self.begin(micro_step)
        if self._left_ms is not None:
            self._outside_ms.append(self.ledger.now_ms() - self._left_ms)
        self.judge()
        if self.keep == 1:
            self._commit(pool, pool, self._everything(size), {}, step, micro_step)
            return pool
        if not self.model.training:
            raise ValueError(
                "The model is in evaluation mode, which a training step does not expect. "
                "Call model.train() before the loop and after every evaluation."
            )
        self._check_on(pool)
        selects, generator, shared = self._draws(step, micro_step)
        select, depth, candidates = self.select, self.depth, size
        target = max(self._largest, size)  # rows that all ranks score
        news: dict[str, Any] = {}
        steering = None
        if self.mode == "auto":
            steering, news = self._steer(pool, kept, step, first)
            choice = steering.choice
            selects = selects and choice is not None
            if choice is not None:
                select, depth = _RULES[choice.rule], choice.depth
                target = min(target, round(kept / choice.keep))
                candidates = min(size, target)
        probes_now = first and self._probes_on(pool, step)
        several = selects and self.scope == "global" and self.score != "uniform" and ranks.world() > 1
        if several:
            with self.ledger.timed("gather"):
                pool = ranks.pad_together(pool, self._padding_token(), next(self.model.parameters()).device)
        # All of a rest is kept, so that only what other ranks cannot do without it is done.
        scores_it = not rest or several or ranks.sharded(self.model)
        scores = unjudged = None
        if (selects or probes_now) and scores_it and self.score != "uniform":
            considered = pool if candidates == size else pools.take(pool, slice(0, candidates))
            place = (step, ranks.rank(), *([micro_step] if micro_step else []))
            scores = self._scores(self._filled(considered, target), kept, depth, place)[:candidates]
            everyone = ranks.Gathered(scores, [candidates])
            if several:
                with self.ledger.timed("gather"):
                    everyone = ranks.gather(scores, considered)
                if sum(everyone.sizes) < kept * len(everyone.sizes):  # too few for all, as every rank knows
                    everyone, several = ranks.Gathered(scores, [candidates]), False
            total = min(kept * len(everyone.sizes), len(everyone.scores))
            counts = _without_loss(everyone.scores)
            if probes_now or several or rest or self.exit_optimizer is not None:
                counts = pending.arrived(counts)  # such a step waits anyway
            seen = _Seen(step, len(everyone.scores), total, counts)
            if any(isinstance(count, Pending) for count in counts.values()):
                unjudged = seen
            elif several or not rest:  # what is trained on whole is not chosen by its scores
                _refuse_unusable(seen, self._counts)
            if several:  # the ledger counts what this rank saw
                counts = pending.arrived(_without_loss(scores))
            news |= {"scored": candidates, "depth": depth, **counts}
        batch = None
        if rest and not several:
            batch, selection = pool, self._everything(size)
        elif selects and scores is not None:
            with self.ledger.timed("select"):
                guarded = selectors.drop_outliers(everyone.scores, self.drop_outliers, total)
                selection = select(guarded, total, shared if several else generator)
            # To look at the numbers themselves waits for an accelerator: only those of a selector of the user's own.
            selectors.require_selection(selection, total, len(guarded), look=select not in _RULES.values())
            if several:
                with self.ledger.timed("gather"):
                    batch, selection = ranks.exchange(considered, selection, everyone.sizes, kept)
        else:
            device = next(self.model.parameters()).device
            # In auto mode the first b, which is as uniform as the pool is shuffled: see `wanted`.
            offered = kept if self.mode == "auto" else size
            chosen = selectors.uniform_subset(offered, kept, generator)
            selection = Selection(*(t.to(device, non_blocking=True) for t in chosen))
        if probes_now and scores is not None:
            seen_by_probe = self._probe(pool, scores, kept, target)
            if not rest:  # which is too little to learn from
                news |= seen_by_probe
                self._warn_of_breakdown(news, step)
        if self.exit_optimizer is not None and scores is not None:
            with self.ledger.timed("exit"):
                # Uniform, as pools come shuffled; without what would poison the head.
                healthy = (torch.isfinite(scores) | (scores == losses.UNLABELLED)).nonzero().squeeze(1)
                self._train_exit(pools.take(pool, healthy[:kept]))
        with self.ledger.timed("gather"):
            batch = pools.take(pool, selection.indices) if batch is None else batch
            if self.trim:
                batch = pools.trim_padding(batch)
        if rest and not several:
            self._tell_of_rest(step, size, kept)
        self._kept = kept
        self._steering = steering
        self._commit(pool, batch, selection, news, step, micro_step)
        self._unjudged = unjudged
        return batch

    def judge(self) -> None:
        """Refuse, or warn of, the latest pool's scores if they were on an accelerator, which `sift` did not wait for.

        The next call of `sift` does it otherwise. Loops that wait before they update can call it there.

        Raises:
            ValueError: As `sift`, once; the step was taken and counts.
        """
        if self._unjudged is not None:
            seen, before = self._unjudged, self._counts
            self._counts, self._unjudged = self._counted(), None
            _refuse_unusable(seen._replace(counts=pending.arrived(seen.counts)), before, late=True)

    def probe(self, pool: Any) -> dict[str, float]:
        """One probe outside of any step, as auto mode makes them: see `earlysift.controller.record`.

        Nothing of the sifter's state changes. Useful to look at a model before choosing a mode, and to time a probe.

        Args:
            pool: A pool of R candidates with labels.

        Returns:
            Signal and length of the step of every rule, rank correlation by depth, gain by depth and keep, floor.
        """
        kept = self._kept or max(1, round(self.keep * pools.pool_size(pool)))
        control = self._control or self._candidates(Control())
        options = self._scoring_options(kept)
        signal: Literal["loss", "entropy"] = "entropy" if self.score == "entropy" else "loss"
        seen = probes.probe(
            self.model,
            pool,
            depths=control.depths,
            signal=signal,
            exit_head=self.exit_head,
            max_positions=self.max_positions,
            **options,
        )
        return controller.record(seen, kept, control)

    def exit_loss(self, batch: Any) -> Tensor:
        """Differentiable loss of the early exit on a batch: add a share of it to your loss to train the exit jointly.

        Costs a forward and backward pass of ``depth`` layers.

        Args:
            batch: What `sift` returned.

        Returns:
            A float32 scalar, mean over the labelled positions (samples, in classification).
        """
        return scorers.training_loss(self.model, batch, depth=self.depth, family=self.family, exit_head=self.exit_head)

    def stats(self) -> dict[str, float]:
        """Numbers for a logger: counts so far, the latest fidelity probe, and median times in ms."""
        times_ms = {f"sift/{name}_ms": value for name, value in self.ledger.medians_ms().items()}
        counts = {f"sift/{name}": float(value) for name, value in self._counted().items()}
        fidelity = {f"sift/{name}": value for name, value in self._fidelity.items()}
        return {"sift/step": float(self._step), **counts, **fidelity, **times_ms}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to make the same picks; JSON-like but for the exit head's tensors."""
        state: dict[str, Any] = {
            "version": STATE_VERSION,
            "config": self._config(),
            "step": self._step,
            "micro_step": self._micro_step,
            "pools_per_step": self._pools_per_step,
            "kept": self._kept,
            "largest": self._largest,
            "counts": self._counted(),
            "fidelity": dict(self._fidelity),
            "steering": self._steering and controller.to_json(self._steering),
            "weights_read": self._weights_read,
        }
        if self.exit_head is not None:
            state["exit_head"] = self.exit_head.state_dict()
        if self.exit_optimizer is not None:
            state["exit_optimizer"] = self.exit_optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another sifter of the same configuration was saved.

        Raises:
            ValueError: If the state is of another version or configuration, or not what `state_dict` returned; lists
                what differs or is wrong. Nothing is loaded then.
        """
        if not isinstance(state, Mapping):
            raise ValueError(
                f"Expected what Sifter.state_dict() returned, a mapping, got {type(state).__name__}. Load the file "
                "that it was saved to."
            )
        version = state.get("version")
        if not whole(version, 0) or version != STATE_VERSION:
            raise ValueError(
                f"Expected a Sifter state of version {STATE_VERSION}, got {reprlib.repr(version)}. Use the release "
                "that wrote it."
            )
        theirs = _plain_settings(state.get("config"))
        if theirs is not None and (differing := differences(theirs, self._config())):
            listed = "; ".join(f"{key}: saved {saved!r}, now {now!r}" for key, saved, now in differing)
            raise ValueError(
                f"The saved Sifter was configured otherwise ({listed}). "
                "Build the Sifter as it was saved, or start a new one."
            )
        problems = [] if theirs is not None else ["config must be the settings of a Sifter"]
        problems += _state_problems(state, required=self.state_dict().keys())
        if self._control is None:
            problems += [] if state.get("steering") is None else ["steering must be None in fixed mode"]
        elif state.get("steering") is not None:
            problems += controller.state_problems(state["steering"], self._control)
        if self.exit_head is not None:
            problems += _tensor_problems(state.get("exit_head"), self.exit_head.state_dict())
        if self.exit_optimizer is not None:
            problems += _optimizer_problems(state.get("exit_optimizer"), self.exit_optimizer)
        if problems:
            raise ValueError(
                f"The Sifter state is damaged: {'; '.join(problems)}. Nothing was loaded. "
                "Load another checkpoint, or start a new Sifter."
            )
        if self.exit_head is not None:
            self.exit_head.load_state_dict(state["exit_head"])
        if self.exit_optimizer is not None:
            self.exit_optimizer.load_state_dict(copy.deepcopy(state["exit_optimizer"]))
        self._step = int(state["step"])  # no number of another library: seeds depend on it
        self._micro_step = int(state["micro_step"])
        self._pools_per_step = int(state["pools_per_step"])
        self._kept = None if state["kept"] is None else int(state["kept"])
        self._largest = int(state["largest"])
        self._counts = {name: int(count) for name, count in state["counts"].items()}
        self._unjudged = None
        self._fidelity = dict(state["fidelity"])
        self._broken_probes = 0
        self._steering = state["steering"] and controller.from_json(state["steering"])
        self._weights_read = state["weights_read"]

    def _counted(self) -> dict[str, int]:
        """Counts of all steps so far; waits for those of the last one."""
        late = {} if self._unjudged is None else pending.arrived(self._unjudged.counts)
        return {name: count + late.get(name, 0) for name, count in self._counts.items()}

    def _config(self) -> dict[str, Any]:
        # Functions have no value to save: a schedule is known by samples, a callable by its name.
        return {
            "keep": self.keep,
            "depth": self.depth,
            "score": _name(self.score),
            "select": _name(self.select),
            "schedule": [self._share(step) for step in _SCHEDULE_SAMPLES],
            "mode": self.mode,
            "control": self._control and json.loads(json.dumps(dataclasses.asdict(self._control))),
            "reduction": self.reduction,
            "max_positions": self.max_positions,
            "drop_outliers": self.drop_outliers,
            "probe_every": self.probe_every,
            "trim": self.trim,
            "scope": self.scope,
            "seed": self.seed,
            "dtype": str(self.dtype),
            "exit_head": self.exit_head and {n: list(v.shape) for n, v in self.exit_head.state_dict().items()},
            "exit_optimizer": self.exit_optimizer is not None,
        }

    def _place(self, micro_step: int) -> tuple[int, bool]:
        """The optimizer step that the next pool belongs to, and whether it is the first pool of that step."""
        first = self._step == 0 or micro_step <= self._micro_step
        return (self._step if first else self._step - 1), first

    def _draws(self, step: int, micro_step: int) -> tuple[bool, Generator, Generator]:
        """Whether a step selects, and generators of a pool: this rank's own, and one that is the same on all ranks."""

        def made(rank: int) -> Generator:
            return seeded(self.seed, "sift", step, rank, *([micro_step] if micro_step else []))

        of_step = seeded(self.seed, "sift", step, 0)
        # By the same number on all ranks: one that scored alone would wait for the others for ever (FSDP).
        selects = torch.rand((), generator=of_step).item() < self._share(step)
        shared = made(0) if micro_step else of_step
        return selects, (made(ranks.rank()) if ranks.rank() else shared), shared

    def _share(self, step: int) -> float:
        """The share of steps that select, by the schedule."""
        share = self.schedule(step)
        if not finite(share):
            raise ValueError(
                f"Expected the schedule to return a number in [0, 1], got {reprlib.repr(share)} at step {step}. It is "
                "the share of steps that select."
            )
        return float(share)

    def _probes_on(self, pool: Any, step: int) -> bool:
        due = self.mode == "fixed" and self.probe_every > 0 and step % self.probe_every == 0
        return due and self._anatomy is not None and pools.has_labels(pool)

    def _everything(self, size: int) -> Selection:
        device = next(self.model.parameters()).device
        return Selection(torch.arange(size, device=device), torch.ones(size, device=device))

    def _filled(self, pool: Any, rows: int) -> Any:
        """A pool as long as those of other ranks, by rows of its own, if it takes all ranks to run the model.

        In chunks of the same size a rank with fewer rows would make fewer passes, and the others wait for ever.
        """
        size = pools.pool_size(pool)
        return pools.take(pool, torch.arange(rows) % size) if size < rows and ranks.sharded(self.model) else pool

    def _padding_token(self) -> int:
        token: Any = getattr(getattr(exits.unwrap(self.model), "config", None), "pad_token_id", None)
        return int(token) if whole(token, 0) else 0

    def _candidates(self, control: Control) -> Control:
        """What can be chosen on this model: an exit head belongs to one depth, and a pool is as large as it is."""
        anatomy = probes.with_head(exits.find_anatomy(self.model, self.family))  # refused now, not at the first probe
        layers = len(anatomy.layers)
        depths = {self.depth} if self.exit_head else {self.depth, *(d for d in control.depths if d < layers)}
        keeps = {self.keep, *(k for k in control.keeps if k > self.keep)}
        needed = {"train", "probe", *(f"score_{depth}" for depth in depths)}
        if control.reference_costs is not None and not needed <= control.reference_costs.keys():
            raise ValueError(
                f"Expected reference_costs of {', '.join(sorted(needed))}, got {sorted(control.reference_costs)}. "
                "Give a time for each, or None to measure them."
            )
        return dataclasses.replace(control, depths=tuple(sorted(depths)), keeps=tuple(sorted(keeps)))

    def _steer(self, pool: Any, kept: int, step: int, first: bool) -> tuple[controller.State, dict[str, Any]]:
        """Probe if a probe is due, and decide what steps do from here on; with what the ledger is to know."""
        control, state, together = self._control, self._steering, self._pools_per_step
        assert control is not None
        if state is None or (step == 1 and first and together > 1):  # only now is known how many pools share a step
            prices = self._mean_over_ranks(self._prices(pool, kept))
            due = controller.next_probe(0 if step == 1 else step, control, prices, together)
            state = dataclasses.replace(state or controller.State(), next_probe=due)
        news: dict[str, Any] = {}
        before, reason = state.choice, ""
        if first and step >= state.next_probe and pools.has_labels(pool):
            timed_depth = control.depths[len(self.ledger.times_ms("probe")) % len(control.depths)]
            with self.ledger.timed("probe"):
                whole_pool = self._filled(pool, self._largest)
                entry = self.probe(whole_pool)
                if control.reference_costs is None:  # times are to be known before they are spent
                    with self.ledger.timed(f"score_{timed_depth}"):
                        self._scorer(kept, timed_depth)(self.model, whole_pool)
            if pools.pool_size(pool) < kept:
                entry = {}  # too few to learn from; the controller forgets it, on all ranks
            numbers = {name: entry.get(name, math.nan) for name in controller.record_names(control)}
            shared = self._mean_over_ranks({**numbers, "weighted": float(self._weights_read)})
            weighted = shared.pop("weighted") == 1  # on every rank
            prices = self._mean_over_ranks(self._prices(pool, kept))
            state, told, reason = controller.advance(
                state, shared, prices, control, self.keep, step, weighted, together
            )
            seen_at = state.choice or before or self
            fidelity = {
                "rank_correlation": shared[f"correlation.{seen_at.depth}"],
                "gain": shared[f"gain.{seen_at.depth}.{self.keep:g}"],
            }
            news = {"control": told, "probed": pools.pool_size(pool), **fidelity}
        if state.choice is not None:
            state, _, ended = controller.end(state, control, step)
            reason = reason if state.choice else ended
        if state.choice != before:
            news["event"] = {"from": _words(before), "to": _words(state.choice), "reason": reason}
        return state, {**news, "mode": state.choice.rule if state.choice else "off"}

    def _mean_over_ranks(self, numbers: Mapping[str, float]) -> dict[str, float]:
        """The same numbers on every rank, so that all ranks decide alike."""
        return ranks.mean(numbers, next(self.model.parameters()).device)

    def _prices(self, pool: Any, kept: int) -> dict[str, float]:
        """Times of a step, a probe and scoring at each depth: given, measured, or by FLOPs until they are measured."""
        control, anatomy = self._control, self._anatomy
        assert control is not None
        assert anatomy is not None
        if control.reference_costs is not None:
            return dict(control.reference_costs)
        batch = pools.take(pool, slice(0, kept))
        flops = {
            "train": costs.batch_work(anatomy, batch, "train", self._flops(None), passes=3)["train_flops"],
            "probe": costs.batch_work(anatomy, pool, "probe", self._flops(None))["probe_flops"],
            **{
                f"score_{depth}": costs.batch_work(
                    anatomy, pool, "score", self._flops(depth), max_positions=self.max_positions
                )["score_flops"]
                for depth in control.depths
            },
        }
        measured = self.ledger.medians_ms()
        if self._outside_ms and "train" not in measured:  # the loop may time its training itself
            measured["train"] = median(self._outside_ms)
        unit = measured.get("train", flops["train"]) / flops["train"]
        return {
            name: measured.get(name, unit * count) if "train" in measured else count for name, count in flops.items()
        }

    def _flops(self, depth: int | None) -> costs.FlopsLaw:
        """FLOPs to a depth; found once, as walking a model takes longer than many a kernel."""
        assert self._anatomy is not None
        if depth not in self._laws:
            skips = depth is not None and exits.skips_unlabelled(self.model, self._anatomy, self.max_positions)
            self._laws[depth] = costs.flops_law(self._anatomy, depth, skips_unlabelled=skips)
        return self._laws[depth]

    def _note_work(self, rows: Any, name: str, depth: int | None, **how: Any) -> None:
        assert self._anatomy is not None
        try:
            self.ledger.note(**costs.pending_work(self._anatomy, rows, name, self._flops(depth), **how))
        except Exception as error:  # a number for the ledger is no reason to stop a training
            if not self._uncounted:
                _LOG.warning(
                    "FLOPs of %s cannot be counted: %r. The ledger goes without.", type(self.model).__name__, error
                )
            self._uncounted = True

    def _warn_of_breakdown(self, seen: Mapping[str, Any], step: int) -> None:
        correlation = seen.get("rank_correlation", 1.0)
        broken = step > 0 and correlation < controller.LEAST_CORRELATION  # an untrained exit says nothing yet
        self._broken_probes = self._broken_probes + 1 if broken else 0
        if self._broken_probes == 2:  # once is chance
            _LOG.warning(
                "step %d: the exit at depth %d ranks at random or backwards (rank correlation %.2f): selection costs "
                "and cannot gain. Use mode='auto', train an ExitHead, or end selection by a schedule.",
                step,
                self.depth,
                correlation,
            )

    def _tell_of_rest(self, step: int, size: int, kept: int) -> None:
        if not self._told_of_rest:
            _LOG.warning(
                "step %d: the %d candidates of a pool are fewer than the %d kept: all are trained on. Said once.",
                step,
                size,
                kept,
            )
        self._told_of_rest = True

    def _check_on(self, pool: Any) -> None:
        if self._checked:
            return
        anatomy = exits.find_anatomy(self.model, self.family)
        if self.score != "exact":
            inputs, _ = pools.inputs_and_labels(pools.take(pool, slice(0, 2)))
            problems = checks.dry_run(self.model, anatomy, self.depth, inputs, exit_head=self.exit_head)
            if problems:
                raise ValueError(exits.problem_report(self.model, problems))
        self._anatomy = checks.verified(self.model, pool, self.family)
        if self.mode == "auto":
            probes.with_head(self._anatomy)
        self._checked = True

    def _scores(self, pool: Any, kept: int, depth: int, place: tuple[int, ...]) -> Tensor:
        scorer = self._scorer(kept, depth)
        if callable(self.score):
            scorer = partial(scorers.guarded, self.score, key=(self.seed, "score", *place))
        with self.ledger.timed("score"):
            scores = scorer(self.model, pool)
        size = pools.pool_size(pool)
        if not isinstance(scores, Tensor) or scores.shape != (size,) or scores.is_complex():
            came = f"{tuple(scores.shape)} of {scores.dtype}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(
                f"Expected scores of shape ({size},), one per candidate, got {came}. "
                "A scorer returns a tensor with one real number per row of the pool."
            )
        return scores.detach()

    def _scorer(self, kept: int, depth: int) -> Scorer:
        if self.score == "exact":
            return self._exact_scorer(kept)
        exit_score = scorers.early_exit_loss if self.score == "loss" else scorers.early_exit_entropy
        return partial(
            exit_score,
            depth=depth,
            exit_head=self.exit_head,
            max_positions=self.max_positions,
            trim=self.trim,
            # Few layers and positions of few logits: still less memory than a training step of b holds.
            **(self._scoring_options(kept) | {"chunk_rows": self.chunk_rows or 2 * kept}),
        )

    def _exact_scorer(self, kept: int) -> Scorer:
        return partial(scorers.exact_loss, trim=self.trim, **self._scoring_options(kept))

    def _scoring_options(self, kept: int) -> dict[str, Any]:
        return {
            "family": self.family,
            "reduction": self.reduction,
            "chunk_rows": self.chunk_rows or kept,
            "dtype": self.dtype,
        }

    def _probe(self, pool: Any, scores: Tensor, kept: int, rows: int) -> dict[str, float]:
        with self.ledger.timed("probe"):
            exact = self._exact_scorer(kept)(self.model, self._filled(pool, rows))
            return fidelity(scores, exact[: len(scores)], kept)

    def _train_exit(self, rows: Any) -> None:
        assert self.exit_head is not None
        assert self.exit_optimizer is not None
        with exits.scoring_mode(self.model), torch.enable_grad():
            loss = scorers.training_loss(
                self.model,
                rows,
                depth=self.depth,
                family=self.family,
                exit_head=self.exit_head,
                detach_exit=True,
            )
        parameters = [p for p in self.exit_head.parameters() if p.requires_grad]
        # Only the exit head's gradients: the model's own .grad fields belong to the user's loop.
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = gradient
        self.exit_optimizer.step()
        self.exit_optimizer.zero_grad()

    def _commit(
        self, pool: Any, batch: Any, selection: Selection, news: dict[str, Any], step: int, micro_step: int
    ) -> None:
        size = pools.pool_size(pool)
        news = {"candidates": size, "trained": len(selection.indices), **news}
        for name in self._counts:
            if not isinstance(count := news.get(name, 0), Pending):  # else counted when it has come
                self._counts[name] += int(count)
        self.ledger.note(**news)
        if self._anatomy is not None and pools.has_labels(batch):
            self._note_work(batch, "trained", None, passes=3)
            if news.get("scored") and not callable(self.score):  # what a scorer of one's own costs is unknown
                depth, most = (None, None) if self.score == "exact" else (news["depth"], self.max_positions)
                scored = pools.take(pool, slice(0, news["scored"])) if news["scored"] < size else pool
                self._note_work(scored, "scored", depth, max_positions=most)
            if "rank_correlation" in news:
                self._note_work(pool, "probed", None)
        if math.isfinite(news.get("rank_correlation", math.nan)):
            self._fidelity = {name: news[name] for name in _FIDELITY if name in news}
        if event := news.get("event"):
            _LOG.warning("step %d: %s -> %s: %s", step, event["from"], event["to"], event["reason"])
        self.selection = selection
        self._step = step + 1
        self._micro_step = micro_step
        self._pools_per_step = max(self._pools_per_step, micro_step + 1)
        self._largest = max(self._largest, size)
        self._left_ms = self.ledger.now_ms()


def _without_loss(scores: Tensor) -> dict[str, Any]:
    """How many scores are unlabelled, and how many broken; pending on an accelerator."""
    unlabelled = scores == losses.UNLABELLED
    broken = ~(torch.isfinite(scores) | unlabelled)
    return {"unlabelled": pending.number(unlabelled.sum()), "non_finite": pending.number(broken.sum())}


def _refuse_unusable(seen: _Seen, before: Mapping[str, int], *, late: bool = False) -> None:
    """Refuse scores that no batch can be chosen by, and warn of those that say that something is wrong.

    Args:
        seen: What was scored.
        before: Counts of the steps before: what was warned of is not warned of again.
        late: Whether other pools may have come since.
    """
    at = f" at step {seen.step}" if late else ""
    level = 4 if late else 3  # the line that called sift
    unlabelled, broken = seen.counts["unlabelled"], seen.counts["non_finite"]
    if unlabelled == seen.size:
        raise ValueError(
            f"None of the {seen.size} candidates{at} has a labelled position (all labels are {losses.IGNORED_LABEL}). "
            "Check the collator: training on this pool would give a loss of nan."
        )
    if seen.size - broken < seen.kept:
        raise Unusable(
            f"Expected at least {seen.kept} candidates with a finite score, got {seen.size - broken} of {seen.size} at "
            f"step {seen.step}: {broken} are nan or inf. Look for nan in the inputs, or for weights that have diverged."
        )
    if broken and not before["non_finite"]:
        warnings.warn(
            f"{broken} of {seen.size} scores are nan or inf at step {seen.step}; such candidates are never selected. "
            "Sifter.stats() goes on counting them.",
            stacklevel=level,
        )
    if seen.size - broken - unlabelled < seen.kept and not before["unlabelled"]:
        warnings.warn(
            f"Only {seen.size - broken - unlabelled} of {seen.size} candidates have a labelled position, fewer than "
            f"the {seen.kept} kept, at step {seen.step}; the batch is filled up with unlabelled ones.",
            stacklevel=level,
        )


def _plain_settings(config: Any) -> dict[str, Any] | None:
    """Settings that can be compared; None if they cannot be those of a sifter."""
    try:
        plain = json.loads(json.dumps(config))
    except (TypeError, ValueError, RecursionError):
        return None
    return plain if isinstance(plain, dict) and plain else None


def _state_problems(state: Mapping[str, Any], required: Collection[str]) -> list[str]:
    """What is missing from a state or wrong in it, but for what belongs to a control or an exit head."""
    missing = sorted(required - state.keys())
    counts, fidelities = state.get("counts"), state.get("fidelity")
    rows = [
        *(
            (name in missing or whole(state[name], least), f"{name} must be a whole number of at least {least}", name)
            for name, least in (("step", 0), ("micro_step", 0), ("pools_per_step", 1), ("largest", 0))
        ),
        (state.get("kept") is None or whole(state["kept"], 1), "kept must be at least 1 or None", "kept"),
        (
            "counts" in missing
            or (
                isinstance(counts, Mapping)
                and set(counts) == set(_COUNTS)
                and all(whole(count, 0) for count in counts.values())
            ),
            f"counts must be whole numbers of {', '.join(_COUNTS)}",
            "counts",
        ),
        (
            "fidelity" in missing
            or (
                isinstance(fidelities, Mapping)
                and set(fidelities) <= set(_FIDELITY)
                and all(map(finite, fidelities.values()))
            ),
            f"fidelity must be finite numbers of {', '.join(_FIDELITY)}",
            "fidelity",
        ),
        (
            "weights_read" in missing or isinstance(state["weights_read"], bool),
            "weights_read must be True or False",
            "weights_read",
        ),
    ]
    found = [f"{message}, got {reprlib.repr(state.get(name))}" for sound, message, name in rows if not sound]
    return [*([f"it has no {', '.join(missing)}"] if missing else []), *found]


def _tensor_problems(saved: Any, ours: Mapping[str, Tensor]) -> list[str]:
    if not isinstance(saved, Mapping) or saved.keys() != ours.keys():
        return [f"exit_head must hold {', '.join(ours)}"]
    return [
        f"exit_head's {name} must be a tensor of {value.dtype} {tuple(value.shape)}"
        for name, value in ours.items()
        if not isinstance(saved[name], Tensor)
        or (saved[name].shape, saved[name].layout) != (value.shape, value.layout)
        or saved[name].is_floating_point() != value.is_floating_point()
    ]


def _optimizer_problems(saved: Any, optimizer: torch.optim.Optimizer) -> list[str]:
    """Whether an optimizer of this kind loads what was saved and makes a step with it, tried on a copy."""
    trial = copy.deepcopy(optimizer)
    try:
        trial.load_state_dict(copy.deepcopy(saved))
        for group in trial.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        trial.step()
    except Exception as error:  # an optimizer refuses in as many ways as there are optimizers
        return [f"exit_optimizer cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0][:100]})"]
    return []


def _words(choice: controller.Choice | None) -> str:
    return "uniform" if choice is None else str(choice)


def _name(function: str | Callable[..., Any]) -> str:
    if isinstance(function, partial):
        options = [*map(repr, function.args), *(f"{key}={value!r}" for key, value in function.keywords.items())]
        return f"{_name(function.func)}({', '.join(options)})"
    return function if isinstance(function, str) else getattr(function, "__qualname__", type(function).__qualname__)
