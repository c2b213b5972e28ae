"""`Runner`: everything of a `Sifter` that runs the model. Scores, probes, exit training, and what they cost."""

import logging
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from earlysift import (
    checks,
    controller,
    costs,
    exits,
    judging,
    losses,
    packing,
    passes,
    pools,
    probes,
    ranks,
    scorers,
    steering,
)
from earlysift.anatomy import Anatomy, Problem, find_anatomy, problem_report, unwrap
from earlysift.blend import Blend
from earlysift.config import SiftConfig
from earlysift.control import Control, scored_depths
from earlysift.exit_probe import ExitProbe
from earlysift.exits import ExitHead
from earlysift.fidelity import fidelity
from earlysift.ledger import Ledger
from earlysift.measures import LOSS
from earlysift.options import whole
from earlysift.pools import Pool
from earlysift.recent import MEMORY, Kept, Recent
from earlysift.scorers import Approximation, Learnt
from earlysift.trained_pool import TrainedPool

Ran = TypeVar("Ran")
_LOG = logging.getLogger("earlysift")
_EARLY_STEPS, _EARLY_EVERY, _LATE_EVERY = 256, 2, 8  # lessons of auto mode's probes, which first have all to learn


class Runner:
    """Runs a model for a `Sifter`, and counts the FLOPs of it.

    Args:
        model: The model, wrapped or not; left as it was.
        config: How pools are scored.
        exit_head: Module after the exit, if any.
        exit_optimizer: Its optimizer, if it is trained here.
        ledger: Where times and FLOPs go.
        samples: Number of samples, where their ids are their indices; None is unknown.

    Raises:
        ValueError: With all problems of the model.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SiftConfig,
        exit_head: ExitHead | None,
        exit_optimizer: torch.optim.Optimizer | None,
        ledger: Ledger,
        samples: int | None = None,
    ) -> None:
        self.model, self.config, self.ledger, self.samples = model, config, ledger, samples
        self.exit_head, self.exit_optimizer = exit_head, exit_optimizer
        self.approximation = scorers.named(config.score, config.depth)
        of_use = config.score == "blend" or config.mode == "auto"
        self.remembers = config.score == "memory" or (of_use and config.sample_id is not None)
        self.recent = Recent()
        self._observed: list[tuple[Kept, Tensor]] = []
        self._remembered: tuple[Kept, Tensor] | None = None  # of the latest batch whose losses were learnt from
        self.anatomy: Anatomy | None = None
        self._exits = exit_head is not None or (self.approximation is not None and self.approximation.depth is not None)
        self._compared = not (self._exits or (self.approximation and self.approximation.measure))
        if self._exits and (problems := checks.check(model, depth=config.depth, family=config.family)):
            raise ValueError(problem_report(model, problems))
        # With a scorer of the user's own, a model that we cannot take apart only lacks probes and FLOPs.
        optional = self._compared and config.family is None
        with suppress(ValueError) if optional else nullcontext():
            self.anatomy = find_anatomy(model, config.family)
        if self.anatomy is not None and (problems := _unfit(config, self.anatomy)):
            raise ValueError(problem_report(model, problems))
        if config.trim and self.anatomy is not None:
            checks.require_trimmable(self.anatomy)
        self.control = self.candidates() if config.mode == "auto" else None
        exit_probes = {depth: ExitProbe(config.seed) for depth in self._probed_depths()}
        self.learnt = Learnt(
            memory=ranks.memory(samples) if self.remembers else None,
            probes=exit_probes,
            blend=Blend() if config.score == "blend" else None,
            trained=TrainedPool(math.ceil(1 / min(self.control.keeps))) if self.control and exit_probes else None,
        )
        self._laws: dict[int | None, costs.FlopsLaw] = {}
        self._flops_failed = False
        self._most_rows: int | None = None  # that can be scored at once, once memory did not suffice for more
        self._left_ms: float | None = None
        self._between_ms: deque[float] = deque(maxlen=100)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_left_ms": None}  # another process may have another clock

    def call_begins(self) -> None:
        """Note that a call of `Sifter.sift` begins: what was between two calls is the loop's training, and reading."""
        if self._left_ms is not None:
            self._between_ms.append(self.ledger.now_ms() - self._left_ms)

    def call_ends(self) -> None:
        """Note that a call of `Sifter.sift` ends."""
        self._left_ms = self.ledger.now_ms()

    def times_between_ms(self) -> dict[str, float]:
        """Median time between calls as ``train``, as far as is known."""
        return {"train": median(self._between_ms)} if self._between_ms else {}

    @property
    def observes(self) -> bool:
        """Whether the losses of trained samples are of use."""
        learnt, config = self.learnt, self.config
        return learnt.memory is not None or learnt.blend is not None or config.explored > 0 or config.mode == "auto"

    def observe(self, kept: Kept, losses: Tensor) -> None:
        """Note the exact losses of a batch, for `absorb`: an accelerator has yet to compute them."""
        if self.observes:
            self._observed.append((kept, losses.detach()))
        if self.learnt.memory is not None and self.learnt.memory.ranks > 1:
            self.absorb()  # while all ranks are here, whatever each does next

    def absorb(self) -> None:
        """Learn from the losses noted so far: remember them, fit the blend, keep them among the recent ones."""
        learnt = self.learnt
        for kept, exact in self._observed:
            remembered = None
            if learnt.memory is not None and kept.ids is not None:
                remembered = ranks.look(learnt.memory, kept.ids, kept.step, self.device)[0]
                self._remembered = kept, remembered
                ranks.observe(learnt.memory, kept.ids, exact, kept.step, self.device)
            if learnt.blend is not None and kept.inputs is not None and kept.stands_for is not None:
                learnt.blend.fit(kept.inputs, exact, kept.stands_for.to(exact.device))
            self.recent.add(exact, score=kept.scores, remembered=remembered, stands_for=kept.stands_for)
        self._observed.clear()

    def forget(self) -> None:
        """Drop losses that were noted and not yet learnt from."""
        self._observed.clear()

    def learners(self) -> dict[str, Any]:
        """What learns as training goes on, by name; each has a state of its own."""
        return self.learnt.parts() | ({"recent": self.recent} if self.observes else {})

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def candidates(self) -> Control:
        """What auto mode can choose on this model.

        Raises:
            ValueError: If its head has no name.
        """
        layers = probes.with_head(find_anatomy(self.model, self.config.family)).layers
        return steering.candidates(
            self.config.control or Control(),
            depth=self.config.depth,
            keep=self.config.keep,
            layers=len(layers),
            one_depth=self.exit_head is not None,
            remembers=self.remembers,
        )

    def _probed_depths(self) -> tuple[int, ...]:
        """Exits that are read by a probe: in auto mode all of a classifier's, whose own head knows little of them.

        Not where ranks select together: their probes differ, and so do the scales of their scores.
        """
        if self.config.score in ("probe", "blend"):
            return (self.config.depth,)
        alone = self.config.scope == "local" and self.exit_head is None
        if self.control is None or self.config.score != "loss" or not alone:
            return ()
        return self.control.depths if self.anatomy and self.anatomy.task == "sequence_classification" else ()

    @contextmanager
    def lesson(self, batch: Any, kept: Kept | None) -> Iterator[None]:
        """Teach the probes of auto mode by the training pass within this context, if its batch was drawn uniformly.

        What the pass shows is kept for `trained_record`.

        Args:
            batch: What is trained on, with labels.
            kept: What is known of it.
        """
        trained = self.learnt.trained
        if trained is None or kept is None:
            yield
            return
        if kept.scores is not None:
            trained.clear()  # what follows on a selected batch is no longer the pool of before
        due = kept.step % (_EARLY_EVERY if kept.step < _EARLY_STEPS else _LATE_EVERY) == 0
        trains = self.model.training and torch.is_grad_enabled()  # held-out samples teach nothing
        if kept.scores is not None or not (due and trains):
            yield
            return
        memory, remembered = self.learnt.memory, None
        if memory is not None and memory.ranks == 1 and kept.ids is not None:  # before the losses of this very pass
            remembered = memory.look(kept.ids, kept.step)[0]
        with scorers.lesson(self.model, batch, self.learnt.probes, self.config.family, self.ledger) as seen:
            yield
        if memory is not None and memory.ranks > 1 and self._remembered is not None and self._remembered[0] is kept:
            remembered = self._remembered[1]  # all ranks looked together as they observed
        if seen and (memory is None or remembered is not None):
            told = {} if remembered is None else {str(MEMORY): remembered.to(self.device)}
            trained.add(kept.step, told | seen)

    def verify(self, pool: Pool, flattened: Any = None) -> None:
        """Compare the model with what is known about it, on the first pool: see `earlysift.checks.verified`.

        Args:
            pool: The first pool.
            flattened: What the loader gave, where the pool is its documents set apart.

        Raises:
            ValueError: With all problems found.
        """
        if self._compared:
            return
        anatomy = find_anatomy(self.model, self.config.family)
        if self._exits:
            inputs, _ = passes.inputs_and_labels(anatomy, pool.take(slice(0, 2)).data)
            behind: nn.Module | None = self.exit_head
            if behind is None and self.config.score in ("probe", "blend") and anatomy.task == "sequence_classification":
                behind = checks.recorder(self.model, anatomy, self.config.depth, inputs)
            problems = checks.dry_run(self.model, anatomy, self.config.depth, inputs, exit_head=behind)
            if problems:
                raise ValueError(problem_report(self.model, problems))
        self.anatomy = checks.verified(self.model, pool.data, self.config.family)
        if flattened is not None:
            documents = pool.take(slice(0, 2)).data
            joined = packing.joined(documents, flattened)
            checks.require_apart(self.model, documents, joined, self.config.family)
        if self.config.mode == "auto":
            probes.with_head(self.anatomy)
        self._compared = True

    def score(
        self, pool: Pool, approximation: Approximation, kept: int, key: tuple[int | str, ...] = (), step: int = 0
    ) -> Tensor:
        """Scores of a pool, ``(R,)``, timed.

        Args:
            pool: Pool of R candidates.
            approximation: What scores them.
            kept: b, which bounds how many run at once.
            key: What random numbers of a user's scorer depend on.
            step: The optimizer step.
        """
        with self.ledger.timed("score"):
            run = partial(approximation, self.model, pool, key=key, step=step)
            scores = self._fitting(approximation, pool, kept, run)
        return judging.require_scores(scores, pool.size)

    def fidelity(self, pool: Pool, scores: Tensor, kept: int) -> dict[str, float]:
        """How well scores rank the first candidates of a pool, by their exact losses."""
        with self.ledger.timed("probe"):
            exact = scorers.exact()
            losses_of_pool = self._fitting(exact, pool, kept, partial(exact, self.model, pool))
            return fidelity(scores, losses_of_pool[: len(scores)], kept)

    def record(self, pool: Pool, control: Control, kept: int) -> probes.Record:
        """The record of one probe of auto mode."""
        measure = (self.approximation and self.approximation.measure) or LOSS

        def run(**options: Any) -> probes.Probe:
            return probes.probe(self.model, pool, depths=control.depths, measure=measure, **options | {"trim": False})

        probe = self._fitting(scorers.exact(), pool, kept, run)
        if control.memory and self.learnt.memory is not None and pool.ids is not None:
            probe.scores[MEMORY] = ranks.recall(self.learnt.memory, pool.ids, self.device).to(probe.exact.device)
        return probes.record(probe, kept, control)

    def trained_record(self, control: Control, kept: int, step: int) -> probes.Record:
        """The record of a pool of batches that were trained on lately, for nothing; empty where there is none."""
        trained = self.learnt.trained
        if trained is None or not trained.is_full(since=step - controller.FREE_EVERY):
            return {}
        with self.ledger.timed("look"):
            record = probes.record(probes.of_trained(trained), kept, control)
        trained.clear()  # so that records have no batch in common
        return record

    def time_scoring(self, pool: Pool, control: Control, kept: int) -> None:
        """Time scoring a pool by whatever has not been timed: choices rest on times, and only probes measure them."""
        if control.reference_costs is not None:
            return
        for depth in scored_depths(control):
            approximation = self.at(depth)
            if approximation is not None and not self.ledger.times_ms(f"score_{depth}"):
                self._time_at(pool, approximation, depth, kept)

    def _time_at(self, pool: Pool, approximation: Approximation, depth: int, kept: int) -> None:
        with self.ledger.timed(f"score_{depth}"):
            self._fitting(approximation, pool, kept, partial(approximation, self.model, pool))

    def steering_record(self, pool: Pool, control: Control, kept: int) -> probes.Record:
        """The record of a probe within a step, timed; times scoring at one of the depths, too, where times decide."""
        depths = scored_depths(control)
        timed_depth = depths[len(self.ledger.times_ms("probe")) % len(depths)]
        with self.ledger.timed("probe"):
            record = self.record(pool, control, kept)
            approximation = self.at(timed_depth)
            if control.reference_costs is None and approximation is not None:  # known before it is spent
                self._time_at(pool, approximation, timed_depth, kept)
        return record

    def at(self, depth: int) -> Approximation | None:
        """The configured approximation with another exit, read by its probe if it has begun to learn; or memory."""
        if depth == MEMORY:
            return scorers.memory()
        if self.approximation is None or self.approximation.depth is None:
            return self.approximation
        if depth in self.learnt.probes and self.learnt.probes[depth].is_taught:
            return scorers.probe(depth)
        return scorers.named(self.approximation.name, depth)

    def train_exit(self, pool: Pool, scores: Tensor, kept: int) -> None:
        """One step of the exit head on the first b healthy candidates: uniform, as pools come shuffled."""
        assert self.exit_head is not None
        assert self.exit_optimizer is not None
        healthy = (torch.isfinite(scores) | (scores == losses.UNLABELLED)).nonzero().squeeze(1)
        with self.ledger.timed("exit"):
            with passes.scoring_mode(self.model), torch.enable_grad():
                loss = scorers.training_loss(
                    self.model,
                    pool.take(healthy[:kept]).data,
                    depth=self.config.depth,
                    family=self.config.family,
                    exit_head=self.exit_head,
                    detach_exit=True,
                )
            parameters = [p for p in self.exit_head.parameters() if p.requires_grad]
            # Only the exit head's gradients: the model's own .grad fields belong to the user's loop.
            for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                parameter.grad = gradient
            self.exit_optimizer.step()
            self.exit_optimizer.zero_grad()

    def label_keys(self) -> tuple[str, ...]:
        """Keys of a pool that hold the labels."""
        return self.anatomy.labels if self.anatomy is not None else (pools.LABELS_KEY,)

    def has_labels(self, rows: Any) -> bool:
        """Whether rows have labels where the model's family has them."""
        return self.anatomy is not None and pools.has_labels(rows, self.anatomy.labels)

    def filled_up(self, pool: Pool, rows: int) -> Pool:
        """A pool as long as those of other ranks, by rows of its own, if it takes all ranks to run the model.

        In chunks of the same size a rank with fewer rows would make fewer passes, and the others would wait forever.
        Ranks may differ in their largest pool, too, as flattened rows do in their documents.
        """
        if not ranks.sharded(self.model):
            return pool
        with self.ledger.timed("gather"):  # waits for an accelerator
            rows = ranks.largest(max(rows, pool.size), self.device)
        return pool if pool.size == rows else pool.take(torch.arange(rows) % pool.size)

    def padding_token(self) -> int:
        """The token that pools are padded with."""
        token: Any = getattr(getattr(unwrap(self.model), "config", None), "pad_token_id", None)
        return int(token) if whole(token, 0) else 0

    def flops(self, pool: Pool, control: Control, kept: int) -> dict[str, float]:
        """FLOPs of training on b candidates, of a probe, and of scoring at each depth; waits for an accelerator."""

        def count(rows: Any, depth: int | None, passes: int = 1) -> float:
            assert self.anatomy is not None
            law, positions = self._law(depth), self._max_positions(depth)
            return costs.batch_work(self.anatomy, rows, "all", law, passes=passes, max_positions=positions)["all_flops"]

        return {
            "train": count(pool.take(slice(0, kept)).data, None, passes=3),
            "probe": count(pool.data, None),
            **{f"score_{depth}": count(pool.data, depth) for depth in control.depths},
            **({f"score_{MEMORY}": 0.0} if control.memory else {}),  # until it is timed
        }

    def note_work(self, rows: Any, name: str, depth: int | None = None, *, passes: int = 1) -> None:
        """Note positions and FLOPs of passes to a depth (None: all layers), if they can be counted."""
        if self.anatomy is None or not pools.has_labels(rows, self.anatomy.labels):
            return
        positions = self._max_positions(depth)
        try:
            law = self._law(depth)
            self.ledger.note(
                **costs.pending_work(self.anatomy, rows, name, law, passes=passes, max_positions=positions)
            )
        except Exception as error:  # a number for the ledger is no reason to stop training
            if not self._flops_failed:
                kind = type(self.model).__name__
                _LOG.warning("FLOPs of %s cannot be counted: %r. They are left out of the ledger.", kind, error)
            self._flops_failed = True

    def note_scoring(self, pool: Pool, approximation: Approximation | None, row: Mapping[str, Any]) -> None:
        """Note the work of a step's scoring and probing, by its row of the ledger.

        What a scorer of the user's own costs is unknown.
        """
        if approximation is not None and approximation.measure is not None:
            scored = pool if row["scored"] == pool.size else pool.take(slice(0, row["scored"]))
            self.note_work(scored.data, "scored", approximation.depth)
        if "rank_correlation" in row:
            self.note_work(pool.data, "probed")

    def _fitting(self, approximation: Approximation, pool: Pool, kept: int, run: Callable[..., Ran]) -> Ran:
        """Run with the options for scoring; where memory does not suffice, again with chunks of half as many rows.

        Not where other ranks would wait for passes or exchanges that this one repeats, and not if rows do not run in
        chunks.
        """
        while True:
            options = self._options(kept, approximation)
            rows = min(options["chunk_rows"], pool.size)
            try:
                return run(**options)
            except torch.OutOfMemoryError:
                together = ranks.sharded(self.model) or (approximation.recalls and ranks.world() > 1)
                if rows == 1 or together or approximation.measure is None:
                    raise
            # Behind the except block, whose exception holds the tensors of the failed pass.
            self._most_rows = rows // 2
            _LOG.warning(
                "Scoring %d candidates at once runs out of memory; from now on %d run at once. Set chunk_rows=%d to "
                "begin so.",
                rows,
                self._most_rows,
                self._most_rows,
            )

    def _options(self, kept: int, approximation: Approximation) -> dict[str, Any]:
        """How this sifter scores: options of `earlysift.scorers.Scoring`."""
        # An exit has few layers and few positions with logits: twice b still needs less memory than a training step.
        rows = self.config.chunk_rows or (kept if approximation.depth is None else 2 * kept)
        return {
            "family": self.config.family,
            "exit_head": self.exit_head,
            "reduction": self.config.reduction,
            "max_positions": self.config.max_positions,
            "chunk_rows": min(rows, self._most_rows or rows),
            "trim": self.config.trim,
            "dtype": self.config.dtype,
            "learnt": self.learnt,
        }

    def _max_positions(self, depth: int | None) -> int | None:
        return None if depth is None else self.config.max_positions

    def _law(self, depth: int | None) -> costs.FlopsLaw:
        """FLOPs to a depth; found once, as walking a model takes longer than many a kernel."""
        assert self.anatomy is not None
        if depth not in self._laws:
            skips = depth is not None and exits.skips_unlabelled(self.model, self.anatomy, self.config.max_positions)
            self._laws[depth] = costs.flops_law(self.anatomy, depth, skips_unlabelled=skips)
        return self._laws[depth]


def _unfit(config: SiftConfig, anatomy: Anatomy) -> list[Problem]:
    """Choices that a task does not allow."""
    if anatomy.by_token or anatomy.task == "sequence_classification":
        return []
    rules = [
        (
            config.mode == "auto" or config.score in ("probe", "blend"),
            f"Probes of exits and auto mode know classes and tokens, not {anatomy.task}.",
            "Use mode='fixed' with score='loss', 'exact' or 'memory'.",
        ),
        (
            anatomy.task == "ctc" and config.score in ("entropy", "margin"),
            f"score={config.score!r} needs a prediction of single labels, and CTC has none.",
            "Use score='loss', 'exact' or 'memory'.",
        ),
        (
            config.trim or config.scope == "global",
            f"trim=True and scope='global' change the padding of samples, and with it their loss in {anatomy.task}.",
            "Use trim=False and scope='local'.",
        ),
    ]
    return [Problem(reason, remedy) for wrong, reason, remedy in rules if wrong]
