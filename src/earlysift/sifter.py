"""`Sifter`: the one stateful object. Pools in, smaller batches of the same structure out."""

import copy
import dataclasses
import logging
import reprlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from earlysift import (
    judging,
    loss_memory,
    packing,
    pending,
    planning,
    pools,
    progress,
    ranks,
    scorers,
    steering,
    stepping,
)
from earlysift.config import SiftConfig
from earlysift.exits import ExitHead
from earlysift.judging import Counted
from earlysift.ledger import Ledger
from earlysift.planning import Plan
from earlysift.progress import STATE_VERSION, Progress
from earlysift.recent import Kept
from earlysift.runner import Runner
from earlysift.selectors import Selection, proportional
from earlysift.stepping import Scored

_LOG = logging.getLogger("earlysift")


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
        samples: Number of samples, where their ids are their indices; then larger ids are refused. None is unknown.
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
        samples: int | None = None,
        **options: Any,
    ) -> None:
        parts = {"model": model, "exit_head": exit_head, "exit_optimizer": exit_optimizer}
        self.config = _checked_config(config, options, {**parts, "ledger": ledger})
        self.model = model
        self.exit_head = exit_head
        self.exit_optimizer = exit_optimizer
        self.ledger = ledger or Ledger()
        self.selection: Selection | None = None
        self.latest: Kept | None = None
        self._runner = Runner(model, self.config, exit_head, exit_optimizer, self.ledger, samples)
        self._control = self._runner.control
        self._progress = progress.start(self.config.kept, steering.start(self._control))
        self._unjudged: Counted | None = None  # scores of the pool before that an accelerator has yet to count
        self._broken_probes = 0  # in a row
        self._mentioned_partial = False

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self._unjudged is not None:
            state["_unjudged"] = self._unjudged._replace(counts=pending.arrived(self._unjudged.counts))
        return state

    @property
    def step(self) -> int:
        """Number of optimizer steps begun so far: one per pool, or one per group of accumulated pools."""
        return self._progress.step

    @property
    def wanted(self) -> int:
        """Candidates that the next call of `sift` can use: b on a step that neither selects nor probes.

        Loops that read on demand need not read what nobody looks at. A uniform step of auto mode trains on the first b
        rows, so that candidates after them may be offered again. The next call is taken for the first of its step:
        only that one probes.
        """
        kept, state = self._progress.kept, self._progress.steering
        if kept is None:
            raise ValueError("How many are kept is known after the first pool. Pass kept= to know it before.")
        step = self._progress.step
        pool = round(kept / self.config.keep_at(step)) if self.config.share(step) > 0 else kept
        if state is None or step >= state.next_probe:
            return pool
        return kept if state.choice is None else min(pool, round(kept / state.choice.keep))

    @property
    def weights(self) -> Tensor:
        """Weights ``(b,)`` of the latest batch: 1 unless the selector is unbiased."""
        if self.selection is None:
            raise ValueError("There are no weights before the first call of sift.")
        self._progress = dataclasses.replace(self._progress, weights_read=True)
        return self.selection.weights

    @property
    def weights_read(self) -> bool:
        """Whether the loop has read `weights`, before resuming or since: else auto mode draws nothing in proportion."""
        return self._progress.weights_read

    @property
    def ids(self) -> Tensor | None:
        """Ids of the latest batch's samples, int64 ``(b,)``, on the CPU; None without `SiftConfig.sample_id`."""
        return None if self.latest is None else self.latest.ids

    def begin(self, micro_step: int = 0) -> None:
        """Open the ledger's row of the next call of `sift`; what precedes it, as waiting for data, is part of it."""
        self.ledger.begin(self._progress.place(micro_step)[0], micro_step)

    def sift(self, pool: Any, *, micro_step: int = 0) -> Any:
        """Keep b of the R candidates of a pool.

        A pool with fewer than b candidates, as the last one of an epoch, is trained on whole, unless it is the first.

        Args:
            pool: A batch of R candidates: a mapping (dict, BatchEncoding), tuple, list, tensor, or nesting of these. Or
                a flattened row of R documents (`earlysift.packing`), of which a shorter row is kept.
            micro_step: With gradient accumulation the number of this pool within its optimizer step: 0, 1, ..., so
                ``sift(pool, micro_step=i % accumulate)`` for the pool i of an epoch. A number no larger than
                the last one begins a new step. Schedules, probes and `step` count optimizer steps.

        Returns:
            The same structure with ``(b, ...)`` tensors; `weights` holds its weights.

        Raises:
            ValueError: If the pool is malformed, too small, without labels, or without enough finite scores. The
                sifter's state is then unchanged. An accelerator is not waited for: scores on it are refused, or warned
                of, by the next call (or `judge`), which names their step and returns nothing; call it again to sift the
                same pool. Steps that wait anyway (probes, an exit_optimizer, global scope) refuse at once.
        """
        micro_step = judging.require_micro_step(micro_step)
        before, runner = self._progress, self._runner
        flattened = before.flattened is not False and packing.is_flattened(pool)
        decided = flattened if before.flattened is None else before.flattened  # the first pool decides for all
        rows = packing.apart(pool, runner.label_keys()) if flattened else pool
        candidates = pools.checked(rows, self.config.sample_id, runner.samples, self.config.group)
        if before.step == 0 and self.config.keep < 1 and (self.config.scope == "global" or ranks.sharded(self.model)):
            b = judging.number_kept(candidates.size, self.config.keep, before.kept)
            ranks.require_same_kept(b, candidates.size, runner.device)
        kept = judging.require_kept(candidates.size, self.config.keep, before.kept, first=before.step == 0)
        self.begin(micro_step)
        runner.call_begins()
        runner.absorb()
        self.judge()
        if self.config.keep == 1:
            chosen = stepping.whole_pool(candidates, runner.device)
            step, row = before.place(micro_step)[0], stepping.counted(candidates, chosen)
            self._commit(candidates.data, chosen.selection, step, micro_step, row, flattened=decided)
            self.latest = stepping.remember(candidates, None, chosen, step, runner)
            return packing.joined(candidates.data, pool) if flattened else candidates.data
        judging.require_training(self.model)
        if before.step == 0:
            judging.mention_batch_norms(self.model)
        begins_second = before.place(micro_step) == (1, True)
        if begins_second and self.config.select is proportional and not before.weights_read:
            judging.mention_unread_weights()
        runner.verify(candidates, pool if flattened else None)
        plan = planning.plan(candidates, kept, micro_step, self._progress, self._control, runner)
        if plan.everywhere:
            candidates = stepping.padded(candidates, runner)
        scored = stepping.score(candidates, plan, runner)
        unjudged = stepping.judge(scored, plan, self._progress.counts)
        chosen = stepping.select(candidates, scored, plan, runner)
        fidelity = stepping.learn(candidates, scored, plan, runner)
        batch = stepping.gather(candidates, chosen, runner)
        self._warn(plan, scored, candidates.size, fidelity)
        row = plan.row | (scored.row if scored else {}) | fidelity | stepping.counted(candidates, chosen)
        changes = {"kept": kept, "steering": plan.steering, "flattened": decided}
        self._commit(batch, chosen.selection, plan.step, micro_step, row, **changes)
        runner.note_scoring(candidates, plan.approximation, row)
        self._unjudged, self.latest = unjudged, stepping.remember(candidates, scored, chosen, plan.step, runner)
        return packing.joined(batch, pool) if flattened else batch

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
        """One probe outside of any step, as auto mode makes them: see `earlysift.probes.record`.

        Nothing of the sifter's state changes. Useful to look at a model before choosing a mode, and to time a probe.

        Args:
            pool: A pool of R candidates with labels.

        Returns:
            Signal and length of the step of every rule, rank correlation by depth, gain by depth and keep, floor.
        """
        candidates = pools.checked(pool, self.config.sample_id, group_key=self.config.group)
        kept = judging.number_kept(candidates.size, self.config.keep, self._progress.kept)
        candidates = self._runner.filled_up(candidates, self._progress.largest)
        return self._runner.record(candidates, self._control or self._runner.candidates(), kept)

    def loss(self, batch: Any, **options: Any) -> Tensor:
        """Training loss of the latest batch, from which memory, blend and auto mode learn (`observes`).

        Args:
            batch: What `sift` returned.
            options: Those of `earlysift.scorers.training_loss`, as ``weights`` and ``items``.

        Returns:
            A float32 scalar.
        """
        observe = self.observe if self.observes else None
        # Where a loss for each document is asked for; with keep=1, too, where nothing has checked that they stay apart.
        single = observe is not None or options.get("weights") is not None or self.config.keep == 1
        if single and self._progress.flattened and packing.is_flattened(batch):
            batch = packing.apart(batch, self._runner.label_keys())
        with self.lesson(batch):
            return scorers.training_loss(self.model, batch, family=self.config.family, observe=observe, **options)

    def lesson(self, batch: Any, kept: Kept | None = None) -> AbstractContextManager[None]:
        """Let the probes that auto mode reads a classifier's exits by learn from the forward pass within this context.

        `loss` does it. In loops that compute the loss themselves, run the model within it.

        Args:
            batch: What `sift` returned.
            kept: What `latest` was after that call of `sift`, in loops that sift further pools before they train; None
                is the latest batch.
        """
        return self._runner.lesson(batch, kept or self.latest)

    def observe(self, losses: Tensor, batch: Kept | None = None) -> None:
        """Take in the exact losses of a batch's samples, in loops that compute them themselves.

        With several ranks, all must call it for each of their batches.

        Args:
            losses: Mean loss of every sample of the batch that `sift` returned, in its order, ``(b,)``; ``-inf`` for
                unlabelled ones, nan leaves a sample as it was.
            batch: What `latest` was after that call of `sift`, in loops that sift further pools before they train;
                None is the latest batch.

        Raises:
            ValueError: Before the first pool, or if there is not one loss per sample.
        """
        if (batch := batch or self.latest) is None:
            raise ValueError("There is no batch yet that these could be the losses of. Call sift first.")
        self._runner.observe(batch, loss_memory.require_one_each(losses, batch.size))

    @property
    def observes(self) -> bool:
        """Whether the losses of trained samples are of use: the score learns from them, or a share is drawn."""
        return self._runner.observes

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
        self._runner.absorb()
        numbers = {"step": now.step, **now.counts, **now.fidelity, **self._runner.recent.estimates()}
        times_ms = {f"{name}_ms": value for name, value in self.ledger.medians_ms().items()}
        return {f"sift/{name}": float(value) for name, value in (numbers | times_ms).items()}

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs to make the same picks; JSON-like but for tensors of what learns."""
        self._runner.absorb()
        state = {"version": STATE_VERSION, "config": self._identity(), **progress.to_json(self._with_counts())}
        parts: dict[str, Any] = {"exit_head": self.exit_head, "exit_optimizer": self.exit_optimizer}
        parts = {name: part for name, part in parts.items() if part is not None} | self._runner.learners()
        return state | {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where another sifter of the same configuration was saved.

        Raises:
            ValueError: If the state is of another version or configuration, or not what `state_dict` returned; lists
                what differs or is wrong. Nothing is loaded then.
        """
        state = {"flattened": None, **state} if isinstance(state, Mapping) else state  # older ones know of no documents
        learners = self._runner.learners()
        progress.require_loadable(state, self._identity(), self._control, self.exit_head, self.exit_optimizer, learners)
        if self.exit_head is not None:
            self.exit_head.load_state_dict(state["exit_head"])
        if self.exit_optimizer is not None:
            self.exit_optimizer.load_state_dict(copy.deepcopy(state["exit_optimizer"]))
        self._runner.forget()
        for name, learner in learners.items():
            learner.load_state_dict(state[name])
        self._progress = progress.from_json(state)
        self._unjudged, self.latest, self._broken_probes = None, None, 0

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

    def _warn(self, plan: Plan, scored: Scored | None, size: int, fidelity: Mapping[str, float]) -> None:
        """Warn of exits that rank at random, and once of a pool that is trained on whole."""
        if plan.probes and not plan.is_partial:
            correlation = fidelity.get("rank_correlation", 1.0)
            self._broken_probes = judging.broken_probes(correlation, plan.step, plan.depth, self._broken_probes)
        if plan.is_partial and not (scored and scored.everywhere) and not self._mentioned_partial:
            judging.mention_partial(plan.step, size, plan.kept)
            self._mentioned_partial = True

    def _commit(
        self, batch: Any, selection: Selection, step: int, micro_step: int, row: Mapping[str, Any], **changes: Any
    ) -> None:
        """Note what the step did, and remember it; nothing of the state has changed before."""
        row = {**row, "trained": len(selection.indices)}
        self.ledger.note(**row)
        self._runner.note_work(batch, "trained", passes=3)
        if event := row.get("event"):
            _LOG.warning("step %d: %s -> %s: %s", step, event["from"], event["to"], event["reason"])
        self.selection = selection
        self._progress = progress.after(self._progress, step, micro_step, row, **changes)
        self._runner.call_ends()


def _checked_config(config: SiftConfig | None, options: Mapping[str, Any], parts: Mapping[str, Any]) -> SiftConfig:
    """The configuration of a sifter; refuses at once all arguments that cannot work with any model."""
    kinds = {
        "model": (isinstance(parts["model"], nn.Module), "a torch.nn.Module"),
        "exit_head": (isinstance(parts["exit_head"], nn.Module | None), "an ExitHead or None"),
        "exit_optimizer": (
            parts["exit_optimizer"] is None or callable(getattr(parts["exit_optimizer"], "step", None)),
            "an optimizer or None",
        ),
        "ledger": (isinstance(parts["ledger"], Ledger | None), "a Ledger or None"),
    }
    sentences = [
        f"{name} must be {expected}, got {reprlib.repr(parts[name])}."
        for name, (sound, expected) in kinds.items()
        if not sound
    ]
    if parts["exit_head"] is not None and options.get("score", config and config.score) in ("probe", "blend"):
        sentences.append("A probe is a head of its own: leave exit_head out, or use another score.")
    if parts["exit_optimizer"] is not None and parts["exit_head"] is None:
        sentences.append("exit_optimizer was given without exit_head. Pass both, or neither.")
    try:
        checked = dataclasses.replace(config or SiftConfig(), **options)
    except ValueError as error:
        raise ValueError("\n".join([str(error), *sentences])) from None
    if sentences:
        raise ValueError("\n".join(sentences))
    return checked
