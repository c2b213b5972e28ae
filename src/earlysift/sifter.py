"""`Sifter`: the one stateful object. Pools in, smaller batches of the same structure out."""

import copy
import dataclasses
import logging
import math
import reprlib
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from earlysift import judging, pending, planning, pools, progress, ranks, scorers, selectors, steering
from earlysift.config import SiftConfig
from earlysift.controller import Control
from earlysift.exits import ExitHead
from earlysift.judging import Counted
from earlysift.ledger import Ledger
from earlysift.pending import Pending
from earlysift.planning import Plan
from earlysift.pools import Pool
from earlysift.progress import FIDELITY, STATE_VERSION, Progress
from earlysift.ranks import Gathered
from earlysift.runner import Runner
from earlysift.selectors import Selection
from earlysift.validation import whole

_LOG = logging.getLogger("earlysift")


_PARTS = (
    ("model", lambda part: isinstance(part, nn.Module), "a torch.nn.Module"),
    ("exit_head", lambda part: part is None or isinstance(part, nn.Module), "an ExitHead or None"),
    ("exit_optimizer", lambda part: part is None or callable(getattr(part, "step", None)), "an optimizer or None"),
    ("ledger", lambda part: part is None or isinstance(part, Ledger), "a Ledger or None"),
)
"""Arguments of `Sifter` that are parts of a run, not options: name, rule, and what they must be."""


class Scored(NamedTuple):
    """The scores of a step.

    Attributes:
        own: Of this rank's candidates.
        gathered: Of all that are selected from together, and how many of them each rank has.
        everywhere: Whether that is all ranks' candidates.
        counted: What is judged about them; pending on an accelerator.
        row: What the ledger is to note.
    """

    own: Tensor
    gathered: Gathered
    everywhere: bool
    counted: Counted
    row: dict[str, Any]


class Sifter:
    """Keep the samples of a pool that matter: score through an early exit, select, hand out the smaller batch.

    The model is not modified and the loop stays yours. A step is a step of the optimizer: one call of `sift`, or with
    gradient accumulation one for each micro-step. All randomness is derived from (seed, step, micro-step, rank), so a
    resumed run makes the same picks. A sifter can be pickled and deep-copied, together with its model.

    Args:
        model: Any supported Transformer, or a module with a `Family` row; in training mode.
        config: How samples are selected; None is `SiftConfig()`.
        exit_head: An `ExitHead` for models whose shared head ranks badly at the exit.
        exit_optimizer: Its optimizer, for training it on detached features within `sift`. Without one, train it
            jointly: put its parameters into your optimizer and add `exit_loss` to your loss.
        ledger: Where times and counts go; None keeps them in memory. A row lasts from one call of `sift` to the next,
            so ``step_ms`` holds training and waiting for data, too; time them apart with
            ``sifter.ledger.timed("train")`` and ``timed("wait")``.
        options: Options of `SiftConfig` that differ from ``config``, as ``keep=0.25``.

    Raises:
        ValueError: With all arguments that cannot work, or else with all problems of the model at once.

    Example:
        >>> import torch
        >>> from earlysift import Family
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
        config: SiftConfig | None = None,
        *,
        exit_head: ExitHead | None = None,
        exit_optimizer: torch.optim.Optimizer | None = None,
        ledger: Ledger | None = None,
        **options: Any,
    ) -> None:
        parts = {"model": model, "exit_head": exit_head, "exit_optimizer": exit_optimizer}
        self.config = _checked_config(config, options, {**parts, "ledger": ledger})
        self.model = model
        self.exit_head = exit_head
        self.exit_optimizer = exit_optimizer
        self.ledger = ledger or Ledger()
        self.selection: Selection | None = None
        self._runner = Runner(model, self.config, exit_head, exit_optimizer, self.ledger)
        self._control = self._candidates() if self.config.mode == "auto" else None
        self._progress = progress.start(self.config.kept, steering.start(self._control))
        self._unjudged: Counted | None = None  # scores of the pool before that an accelerator has yet to count
        self._broken_probes = 0  # in a row
        self._mentioned_rest = False
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
        return self._progress.step

    @property
    def wanted(self) -> int:
        """Candidates that the next call of `sift` can use: b on a step of auto mode that neither selects nor probes.

        Loops that read on demand need not read what nobody looks at. A uniform step of auto mode trains on the first b
        rows, so that candidates behind them may be offered again. The next call is taken for the first of its step:
        only that one probes.
        """
        kept, state = self._progress.kept, self._progress.steering
        if kept is None:
            raise ValueError("How many are kept is known after the first pool. Pass kept= to know it before.")
        pool = round(kept / self.config.keep)
        if state is None or self._progress.step >= state.next_probe:
            return pool
        return kept if state.choice is None else min(pool, round(kept / state.choice.keep))

    @property
    def weights(self) -> Tensor:
        """Weights ``(b,)`` of the latest batch: 1 unless the selector is unbiased."""
        if self.selection is None:
            raise ValueError("There are no weights before the first call of sift.")
        self._progress = dataclasses.replace(self._progress, weights_read=True)
        return self.selection.weights

    def begin(self, micro_step: int = 0) -> None:
        """Open the ledger's row of the next call of `sift`: what comes before it, as waiting for data, is part of it.

        Args:
            micro_step: As `sift` will be given it.
        """
        self.ledger.begin(self._progress.place(micro_step)[0], micro_step)

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
        candidates = pools.checked(pool)
        kept = self._kept_of(candidates, micro_step)
        self.begin(micro_step)
        if self._left_ms is not None:
            self._outside_ms.append(self.ledger.now_ms() - self._left_ms)
        self.judge()
        if self.config.keep == 1:
            step, _ = self._progress.place(int(micro_step))
            self._commit(candidates, pool, self._everything(candidates.size), step, int(micro_step), {})
            return pool
        self._require_training()
        self._runner.compare(candidates)
        plan = self._plan(candidates, kept, int(micro_step))
        if plan.everywhere:
            candidates = self._padded(candidates)
        scored = None if plan.approximation is None else self._score(candidates, plan)
        if scored is not None:
            self._judge(scored, plan)
        selection, batch = self._select(candidates, scored, plan)
        learned = {} if scored is None else self._learn(candidates, scored, plan)
        with self.ledger.timed("gather"):
            batch = candidates.take(selection.indices).data if batch is None else batch
            if self.config.trim:
                batch = pools.trim_padding(batch)
        if plan.is_rest and not (scored and scored.everywhere):
            self._mention_rest(plan, candidates.size)
        row = plan.row | ({} if scored is None else scored.row) | learned
        self._commit(candidates, batch, selection, plan.step, plan.micro_step, row, kept=kept, steering=plan.steering)
        if scored is not None and plan.approximation is not None and plan.approximation.measure is not None:
            rows = (
                candidates.data if plan.considered == candidates.size else candidates.take(slice(plan.considered)).data
            )
            self._runner.note_work(rows, "scored", plan.approximation.depth)
        self._unjudged = scored.counted if scored is not None and scored.counted.is_pending() else None
        return batch

    def judge(self) -> None:
        """Refuse, or warn of, the latest pool's scores if they were on an accelerator, which `sift` did not wait for.

        The next call of `sift` does it otherwise. Loops that wait before they update can call it there.

        Raises:
            ValueError: As `sift`, once; the step was taken and counts.
        """
        if self._unjudged is not None:
            counted, before = self._unjudged, self._progress.counts
            self._progress, self._unjudged = self._with_counts(), None
            judging.require_usable(counted._replace(counts=pending.arrived(counted.counts)), before, late=True)

    def probe(self, pool: Any) -> dict[str, float]:
        """One probe outside of any step, as auto mode makes them: see `earlysift.controller.record`.

        Nothing of the sifter's state changes. Useful to look at a model before choosing a mode, and to time a probe.

        Args:
            pool: A pool of R candidates with labels.

        Returns:
            Signal and length of the step of every rule, rank correlation by depth, gain by depth and keep, floor.
        """
        candidates = pools.checked(pool)
        kept = self._progress.kept or max(1, round(self.config.keep * candidates.size))
        return self._runner.record(candidates, self._control or self._candidates(), kept)

    def exit_loss(self, batch: Any) -> Tensor:
        """Differentiable loss of the early exit on a batch: add a share of it to your loss to train the exit jointly.

        Costs a forward and backward pass of ``depth`` layers.

        Args:
            batch: What `sift` returned.

        Returns:
            A float32 scalar, mean over the labelled positions (samples, in classification).
        """
        depth, family = self.config.depth, self.config.family
        return scorers.training_loss(self.model, batch, depth=depth, family=family, exit_head=self.exit_head)

    def stats(self) -> dict[str, float]:
        """Numbers for a logger: counts so far, the latest fidelity probe, and median times in ms."""
        now = self._with_counts()
        numbers = {"step": now.step, **now.counts, **now.fidelity}
        times_ms = {f"{name}_ms": value for name, value in self.ledger.medians_ms().items()}
        return {f"sift/{name}": float(value) for name, value in (numbers | times_ms).items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to make the same picks; JSON-like but for the exit head's tensors."""
        state = {"version": STATE_VERSION, "config": self._identity(), **progress.to_json(self._with_counts())}
        parts = {"exit_head": self.exit_head, "exit_optimizer": self.exit_optimizer}
        return state | {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another sifter of the same configuration was saved.

        Raises:
            ValueError: If the state is of another version or configuration, or not what `state_dict` returned; lists
                what differs or is wrong. Nothing is loaded then.
        """
        progress.require_loadable(state, self._identity(), self._control, self.exit_head, self.exit_optimizer)
        if self.exit_head is not None:
            self.exit_head.load_state_dict(state["exit_head"])
        if self.exit_optimizer is not None:
            self.exit_optimizer.load_state_dict(copy.deepcopy(state["exit_optimizer"]))
        self._progress = progress.from_json(state)
        self._unjudged, self._broken_probes = None, 0

    def _identity(self) -> dict[str, Any]:
        """The configuration as a checkpoint holds it."""
        head = self.exit_head and {name: list(value.shape) for name, value in self.exit_head.state_dict().items()}
        config = dataclasses.replace(self.config, control=self._control)
        return config.identity() | {"exit_head": head, "exit_optimizer": self.exit_optimizer is not None}

    def _with_counts(self) -> Progress:
        """The progress with the counts of all steps so far; waits for those of the last one."""
        if self._unjudged is None:
            return self._progress
        late = pending.arrived(self._unjudged.counts)
        counts = {name: count + late.get(name, 0) for name, count in self._progress.counts.items()}
        return dataclasses.replace(self._progress, counts=counts)

    def _candidates(self) -> Control:
        """What can be chosen on this model."""
        config, control = self.config, self.config.control or Control()
        layers = self._runner.layers()  # refused now, not at the first probe
        one_depth = self.exit_head is not None
        return steering.candidates(control, depth=config.depth, keep=config.keep, layers=layers, one_depth=one_depth)

    def _kept_of(self, pool: Pool, micro_step: object) -> int:
        """b; refuses a call that no step can be made of."""
        if not whole(micro_step, 0):
            raise ValueError(
                f"micro_step must be a whole number of at least 0, got {reprlib.repr(micro_step)}. It is the number of "
                "the pool within its optimizer step."
            )
        kept = (
            pool.size if self.config.keep == 1 else self._progress.kept or max(1, round(self.config.keep * pool.size))
        )
        if pool.size < kept and self._progress.step == 0:
            raise ValueError(
                f"Expected at least {kept} candidates (the number kept) in the first pool, got {pool.size}. "
                "Use a larger pool, or keep fewer."
            )
        if pool.size == 0 and kept > 0:
            raise ValueError("Expected at least one candidate, got 0. Leave empty batches out.")
        return kept

    def _require_training(self) -> None:
        if not self.model.training:
            raise ValueError(
                "The model is in evaluation mode, which a training step does not expect. "
                "Call model.train() before the loop and after every evaluation."
            )

    def _plan(self, pool: Pool, kept: int, micro_step: int) -> Plan:
        steered: tuple[Any, dict[str, Any]] = (None, {})
        if self._control is not None:
            steered = self._steer(pool, kept, micro_step, self._control)
        return planning.plan(self.config, self._progress, self._runner, pool, kept, micro_step, steered)

    def _steer(self, pool: Pool, kept: int, micro_step: int, control: Control) -> tuple[steering.State, dict[str, Any]]:
        """What auto mode decides about this step, alike on all ranks."""
        device, outside_ms = self._runner.device, self._outside_ms

        def prices() -> dict[str, float]:
            if control.reference_costs is not None:
                return ranks.mean(control.reference_costs, device)
            # The loop may time its training itself.
            between = {"train": median(outside_ms)} if outside_ms else {}
            flops = self._runner.flops(pool, control, kept)
            return ranks.mean(steering.prices(flops, between | self.ledger.medians_ms()), device)

        def probe() -> steering.Measured:
            whole_pool = self._runner.filled(pool, self._progress.largest)
            record = self._runner.steering_record(whole_pool, control, kept)
            # A rest is too little to learn from: the controller forgets it, on all ranks.
            numbers = steering.record_of({} if pool.size < kept else record, control)
            numbers = ranks.mean({**numbers, "weighted": float(self._progress.weights_read)}, device)
            return steering.Measured(numbers, weighted=numbers.pop("weighted") == 1)

        step, first = self._progress.place(micro_step)
        state, row = steering.steer(
            self._progress.steering,
            control,
            step,
            first=first,
            pools_per_step=self._progress.pools_per_step,
            depth=self.config.depth,
            keep=self.config.keep,
            prices_of=prices,
            probe=probe if pools.has_labels(pool.data) else None,
        )
        return state, row | ({"probed": pool.size} if "control" in row else {})

    def _padded(self, pool: Pool) -> Pool:
        """The pool as long as the longest of all ranks."""
        with self.ledger.timed("gather"):
            token = self._runner.padding_token()
            return Pool(ranks.pad_together(pool.data, token, self._runner.device), pool.size)

    def _score(self, pool: Pool, plan: Plan) -> Scored:
        """Score the candidates, and gather the scores of all ranks if they are selected from together."""
        assert plan.approximation is not None
        considered = pool if plan.considered == pool.size else pool.take(slice(0, plan.considered))
        key = (self.config.seed, "score", plan.step, ranks.rank(), *([plan.micro_step] if plan.micro_step else []))
        filled = self._runner.filled(considered, plan.rows)
        own = self._runner.score(filled, plan.approximation, plan.kept, key)[: considered.size]
        gathered, everywhere = Gathered(own, [considered.size]), plan.everywhere
        if everywhere:
            with self.ledger.timed("gather"):
                gathered = ranks.gather(own, considered)
            if sum(gathered.sizes) < plan.kept * len(gathered.sizes):  # too few for all, as every rank knows
                gathered, everywhere = Gathered(own, [considered.size]), False
        counts = judging.count(gathered.scores)
        if plan.probes or everywhere or plan.is_rest or self.exit_optimizer is not None:
            counts = pending.arrived(counts)  # such a step waits anyway
        kept = min(plan.kept * len(gathered.sizes), len(gathered.scores))
        counted = Counted(plan.step, len(gathered.scores), kept, counts)
        own_counts = pending.arrived(judging.count(own)) if everywhere else counts
        row = {"scored": considered.size, "depth": plan.depth, **own_counts}
        return Scored(own, gathered, everywhere, counted, row)

    def _judge(self, scored: Scored, plan: Plan) -> None:
        """Refuse scores that no batch can be chosen by; those of an accelerator wait for the next call."""
        chosen_by_scores = scored.everywhere or not plan.is_rest
        if chosen_by_scores and not scored.counted.is_pending():
            judging.require_usable(scored.counted, self._progress.counts)

    def _select(self, pool: Pool, scored: Scored | None, plan: Plan) -> tuple[Selection, Any]:
        """Choose b candidates; with their rows if these are at hand, or come from other ranks, else None."""
        everywhere = scored is not None and scored.everywhere
        if plan.is_rest and not everywhere:
            return self._everything(pool.size), pool.data
        if not plan.selects or scored is None:
            # In auto mode the first b, which is as uniform as the pool is shuffled: see `wanted`.
            offered = plan.kept if self.config.mode == "auto" else pool.size
            chosen = selectors.uniform_subset(offered, plan.kept, plan.draws.own)
            return Selection(*(part.to(self._runner.device, non_blocking=True) for part in chosen)), None
        scores, kept = scored.gathered.scores, scored.counted.kept
        with self.ledger.timed("select"):
            guarded = selectors.drop_outliers(scores, self.config.drop_outliers, kept)
            selection = plan.select(guarded, kept, plan.draws.shared if everywhere else plan.draws.own)
        # To look at the numbers themselves waits for an accelerator: only those of a selector of the user's own.
        ours = plan.select in planning.RULES.values()
        selectors.require_selection(selection, kept, len(guarded), look=not ours)
        if not everywhere:
            return selection, None
        with self.ledger.timed("gather"):
            considered = pool.take(slice(0, plan.considered)) if plan.considered < pool.size else pool
            batch, selection = ranks.exchange(considered, selection, scored.gathered.sizes, plan.kept)
        return selection, batch

    def _learn(self, pool: Pool, scored: Scored, plan: Plan) -> dict[str, float]:
        """Compare scores with exact losses if that is due, and train the exit head if there is one."""
        row: dict[str, float] = {}
        if plan.probes:
            fidelity = self._runner.fidelity(self._runner.filled(pool, plan.rows), scored.own, plan.kept)
            if not plan.is_rest:  # which is too little to learn from
                row = fidelity
                correlation = row.get("rank_correlation", 1.0)
                self._broken_probes = judging.broken_probes(correlation, plan.step, plan.depth, self._broken_probes)
        if self.exit_optimizer is not None:
            self._runner.train_exit(pool, scored.own, plan.kept)
        return row

    def _mention_rest(self, plan: Plan, size: int) -> None:
        if not self._mentioned_rest:
            _LOG.warning(
                "step %d: the %d candidates of a pool are fewer than the %d kept: all are trained on. Said once.",
                plan.step,
                size,
                plan.kept,
            )
        self._mentioned_rest = True

    def _everything(self, size: int) -> Selection:
        return Selection(torch.arange(size, device=self._runner.device), torch.ones(size, device=self._runner.device))

    def _commit(
        self,
        pool: Pool,
        batch: Any,
        selection: Selection,
        step: int,
        micro_step: int,
        row: Mapping[str, Any],
        **changes: Any,
    ) -> None:
        """Note what the step did, and remember it; nothing of the state has changed before."""
        row = {"candidates": pool.size, "trained": len(selection.indices), **row}
        self.ledger.note(**row)
        self._runner.note_work(batch, "trained", passes=3)
        if "rank_correlation" in row:
            self._runner.note_work(pool.data, "probed")
        if event := row.get("event"):
            _LOG.warning("step %d: %s -> %s: %s", step, event["from"], event["to"], event["reason"])
        before, fidelity = self._progress, self._progress.fidelity
        if math.isfinite(row.get("rank_correlation", math.nan)):
            fidelity = {name: row[name] for name in FIDELITY if name in row}
        counts = {
            name: total + (0 if isinstance(count := row.get(name, 0), Pending) else int(count))  # else counted later
            for name, total in before.counts.items()
        }
        self.selection = selection
        self._progress = dataclasses.replace(
            before,
            step=step + 1,
            micro_step=micro_step,
            pools_per_step=max(before.pools_per_step, micro_step + 1),
            largest=max(before.largest, pool.size),
            counts=counts,
            fidelity=fidelity,
            **changes,
        )
        self._left_ms = self.ledger.now_ms()


def _checked_config(config: SiftConfig | None, options: Mapping[str, Any], parts: Mapping[str, Any]) -> SiftConfig:
    """The configuration of a sifter; refuses at once all arguments that cannot work with any model."""
    sentences = [
        f"{name} must be {expected}, got {reprlib.repr(parts[name])}."
        for name, sound, expected in _PARTS
        if not sound(parts[name])
    ]
    if parts["exit_optimizer"] is not None and parts["exit_head"] is None:
        sentences.append("An exit_optimizer came without an exit_head. Pass both, or neither.")
    try:
        checked = dataclasses.replace(config or SiftConfig(), **options)
    except ValueError as error:
        raise ValueError("\n".join([str(error), *sentences])) from None
    if sentences:
        raise ValueError("\n".join(sentences))
    return checked
