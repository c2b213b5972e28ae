"""What one step of each kind of arm does: read, choose, train, and note in the ledger what that was."""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from earlysift import environment, pools, scorers, selectors
from earlysift.compare import peers
from earlysift.compare.arms import Arm
from earlysift.compare.settings import Settings
from earlysift.controller import Control
from earlysift.exits import ExitHead
from earlysift.ledger import Ledger
from earlysift.pretrain.stream import Rows, Samples, Stream
from earlysift.pretrain.workloads import Workload
from earlysift.scorers import Predictions
from earlysift.seeds import seeded
from earlysift.sifter import Sifter

_CLIP = 1.0
_ACCURACY_BATCHES = 100  # training accuracy is the mean over so many batches
_REFERENCE_SEED = 1_000_000  # added to the seed, so that the reference model starts from other weights
_SMALLEST_SHARE = 1e-3  # of uniform sampling, which keeps the weights of importance sampling finite

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "proportional": selectors.proportional,
    "visible_labels": peers.visible_labels,
}
"""What rows of `earlysift.compare.arms` name."""

Step = Callable[[float], None]
"""Takes a step, given the share of the budget that is spent."""


@dataclass
class Bench:
    """One arm on one seed: everything that its steps work with.

    Attributes:
        workload: Samples and model.
        settings: The comparison.
        seed: Seed of weights, data order and selection.
        medians_ms: Reference time of every operation; empty while they are being measured.
        ledger: Where steps note what they did.
        position: Candidates passed so far.
        upfront_ms: Reference time spent before the first step, by kind.
    """

    workload: Workload
    settings: Settings
    seed: int
    medians_ms: dict[str, float]
    ledger: Ledger = field(default_factory=Ledger)
    position: int = 0
    upfront_ms: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = torch.device(self.settings.device)
        self.model = self.workload.make_model(self.seed).to(self.device)
        self.stream = Stream(self.workload.samples, seed=self.seed)
        self.optimizer = torch.optim.AdamW(  # as BERT reproductions use it
            self.model.parameters(), lr=self.settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )

    def read(self, rows: int) -> Rows:
        """The next candidates of the stream."""
        self.position += rows
        return self.take(torch.arange(self.position - rows, self.position))

    def take(self, positions: Tensor) -> Rows:
        """The candidates with these numbers."""
        with self.ledger.timed("wait"):
            rows = self.stream.take(positions)
            return {name: values.to(self.device, non_blocking=True) for name, values in rows.items()}

    def loss(self, batch: Rows, weights: Tensor | None = None) -> Tensor:
        """Training loss; the head runs on labelled positions only, in every arm."""
        with training_precision(self.device):
            return scorers.training_loss(self.model, batch, weights=weights)

    def predict(self, batch: Rows) -> Predictions:
        """The same forward pass, for arms that want to know more than the loss."""
        with training_precision(self.device):
            return scorers.predictions(self.model, batch)

    def update(self, loss: Tensor) -> None:
        """Backward, clip, update."""
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ledger.note(loss=loss.item())

    def set_rate(self, share: float) -> None:
        """Learning rate at a share of the budget."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * learning_rate_factor(share, self.settings.warmup)


def learning_rate_factor(share: float, warmup: float) -> float:
    """Linear rise over the first ``warmup`` share of the budget, then linear fall to zero at its end.

    Example:
        >>> [round(learning_rate_factor(share, 0.2), 2) for share in (0.0, 0.1, 0.2, 0.6, 1.0)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    return share / warmup if share < warmup else max(0.0, (1 - share) / (1 - warmup))


def training_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Accelerators train and evaluate in bfloat16, the processor in float32."""
    return nullcontext() if device.type == "cpu" else torch.autocast(device.type, dtype=torch.bfloat16)


def exits_of(arm: Arm, settings: Settings) -> tuple[int, ...]:
    """The exits that an arm uses, as far as the model has them."""
    return tuple(depth for depth in arm.depths or (settings.depth,) if depth < settings.layers)


def make_sifter(bench: Bench, arm: Arm, **options: Any) -> Sifter:
    """A sifter with a ledger of its own, as it counts its own steps; without probes, unless it decides by them.

    Fidelity is measured at the evaluations, alike for all arms.
    """
    shared: dict[str, Any] = {
        "keep": bench.settings.keep,
        "kept": bench.settings.batch,
        "depth": exits_of(arm, bench.settings)[0],
        "seed": bench.seed,
        "ledger": Ledger(device=bench.device, clock=environment.work_clock(bench.device)),
    }
    auto = options.get("mode") == "auto"
    probes = {"control": make_control(bench, arm, options["keep"])} if auto else {"probe_every": 0}
    named = {name: FUNCTIONS[value] for name, value in options.items() if isinstance(value, str) and value in FUNCTIONS}
    return Sifter(bench.model, **{**shared, **probes, **options, **named})


def make_control(bench: Bench, arm: Arm, keep: float) -> Control:
    """What `auto` may choose from, and the measured costs that it decides by: reproducible, as they are given."""
    medians_ms = bench.medians_ms
    larger = bench.settings.keep / keep  # scoring was timed on pools of the comparison's keep
    costs = {name: ms * larger for name, ms in medians_ms.items() if name.startswith("score_")}
    costs |= {name: ms for name, ms in medians_ms.items() if name in ("train", "probe")}
    step_ms = medians_ms.get("read_batch", 0.0) + medians_ms.get("train", 1.0)
    return Control(
        depths=exits_of(arm, bench.settings),
        keeps=(keep, bench.settings.keep),
        total_steps=max(1, round(bench.settings.budget * 1e3 / step_ms)),
        reference_costs=costs or None,
    )


def exit_head_options(bench: Bench, hidden: int) -> dict[str, Any]:
    """An exit head for a sifter, and its optimizer, like the model's but with a constant learning rate."""
    head = ExitHead(bench.settings.width, hidden=hidden, seed=bench.seed).to(bench.device)
    optimizer = torch.optim.AdamW(head.parameters(), lr=bench.settings.learning_rate, betas=(0.9, 0.98), fused=True)
    return {"exit_head": head, "exit_optimizer": optimizer}


def joint_loss(bench: Bench, sifter: Sifter, batch: Rows, weight: float) -> Tensor:
    """The model's loss and a share of its early exit's."""
    with training_precision(bench.device):
        return bench.loss(batch) + weight * sifter.exit_loss(batch)


def sifted(
    bench: Bench,
    arm: Arm,
    *,
    subset: float = 1.0,
    joint: float = 0.0,
    select_after: float | None = None,
    own_head: int | None = None,
    **options: Any,
) -> Step:
    """Pools through a `Sifter`; keep = 1 is uniform training.

    Args:
        bench: What to train.
        arm: The arm.
        subset: Share of the data that an epoch shows.
        joint: Weight of the early exit's loss in the training loss.
        select_after: Share of the budget with uniform training; None is the comparison's.
        own_head: Width of the residual layer of an `ExitHead` that is trained on detached features; None has none.
        options: Arguments of the sifter.
    """
    bench.stream = Stream(bench.workload.samples, seed=bench.seed, subset=subset)
    if own_head is not None:
        options |= exit_head_options(bench, own_head)
    plain, selecting = make_sifter(bench, arm, keep=1.0), make_sifter(bench, arm, **options)
    if select_after is None:  # auto warms up by itself
        select_after = 0.0 if options.get("mode") == "auto" else bench.settings.select_after

    def step(share: float) -> None:
        sifter = selecting if share >= select_after else plain
        pool = bench.read(sifter.wanted)
        with bench.ledger.timed("sift"):
            batch = sifter.sift(pool)
        row = sifter.ledger.end()
        if row.get("mode") == "off":
            bench.position -= row["candidates"] - row["trained"]  # read for a probe only; offered again
        bench.ledger.note(**{name: value for name, value in row.items() if name not in ("step", "step_ms")})
        with bench.ledger.timed("train"):
            if joint:
                loss = joint_loss(bench, selecting, batch, joint)
            else:
                loss = bench.loss(batch, None if sifter.config.keep == 1 else sifter.weights)
            bench.update(loss)

    return step


def ordered(bench: Bench, arm: Arm) -> Step:
    """Ordered SGD: the largest losses of the batch itself."""
    size = bench.settings.batch
    accuracies: deque[float] = deque(maxlen=_ACCURACY_BATCHES)
    best = 0.0

    def step(share: float) -> None:
        nonlocal best
        batch = bench.read(size)
        q = peers.ordered_sgd_q(size, best)
        with bench.ledger.timed("train"):
            predicted = bench.predict(batch)
            bench.update(peers.top_loss(peers.sample_losses(predicted), predicted.counts, q))
        accuracies.append(peers.accuracy(predicted))
        if len(accuracies) == _ACCURACY_BATCHES:
            best = max(best, fmean(accuracies))
        bench.ledger.note(candidates=size, trained=q)

    return step


def selective(bench: Bench, arm: Arm, *, beta: float = 1.0, history: int = peers.SELECTIVE_BACKPROP_HISTORY) -> Step:
    """Selective backprop: candidates are looked at b at a time, and each drawn or not, until a batch is full.

    What is drawn beyond b waits for the next batch. Every forward pass is charged.

    Args:
        bench: What to train.
        arm: The arm.
        beta: Selectivity.
        history: How many of the last losses a loss is compared with.
    """
    size = bench.settings.batch
    past: deque[float] = deque(maxlen=history)
    waiting: list[Rows] = []

    def step(share: float) -> None:
        nonlocal waiting
        selecting = share >= bench.settings.select_after
        began = bench.position
        if not selecting:
            waiting = [bench.read(size)]
        while sum(map(pools.pool_size, waiting)) < size:
            chunk = bench.read(size)
            with bench.ledger.timed("score"):
                losses = scorers.exact_loss(bench.model, chunk, chunk_rows=size).cpu()
                past.extend(losses.tolist())
                likely = peers.selection_probabilities(losses, torch.tensor(past), beta)
                chance = torch.rand(size, generator=seeded(bench.seed, "selective", bench.position))
                waiting.append(pools.take(chunk, (chance < likely).nonzero().squeeze(1)))
        drawn = {name: torch.cat([rows[name] for rows in waiting]) for name in waiting[0]}
        batch, waiting = pools.take(drawn, slice(size)), [pools.take(drawn, slice(size, None))]
        with bench.ledger.timed("train"):
            bench.update(bench.loss(batch))
        looked_at = bench.position - began
        bench.ledger.note(candidates=looked_at, scored=looked_at * selecting, trained=size)

    return step


def infobatch(bench: Bench, arm: Arm, *, ratio: float = 0.5, full_from: float = 0.875) -> Step:
    """InfoBatch: every epoch skips some samples that were easy when last seen, and reweights the others like them.

    Args:
        bench: What to train.
        arm: The arm.
        ratio: Share of the easy samples that is skipped.
        full_from: Share of the budget from which nothing is skipped.
    """
    size, stream = bench.settings.batch, bench.stream
    last_losses = torch.full((len(bench.workload.samples),), torch.nan)
    kept, weights = peers.prune(last_losses, 0.0, seeded(bench.seed, "infobatch"))

    def step(share: float) -> None:
        nonlocal kept, weights
        found = torch.empty(0, dtype=torch.int64)
        while len(found) < size:
            epoch, within = divmod(bench.position, stream.epoch)
            if share >= full_from:
                kept, weights = torch.ones_like(kept), torch.ones_like(weights)
            elif within == 0:
                kept, weights = peers.prune(last_losses, ratio, seeded(bench.seed, "infobatch", epoch))
            count = min(size - len(found), stream.epoch - within)
            stays = kept[stream.ids(bench.position, count)]
            found = torch.cat([found, bench.position + stays.nonzero().squeeze(1)])
            bench.position += count
        ids = torch.cat([stream.ids(position, 1) for position in found.tolist()])
        batch = bench.take(found)
        with bench.ledger.timed("train"):
            predicted = bench.predict(batch)
            sums = peers.sample_losses(predicted)
            bench.update(peers.weighted_loss(sums, predicted.counts, weights[ids].to(bench.device)))
        last_losses[ids] = (sums.detach() / predicted.counts.clamp(min=1)).cpu()
        bench.ledger.note(candidates=size, trained=size)

    return step


def importance(bench: Bench, arm: Arm, *, presample: int = 3, threshold: float = 1.5, smoothing: float = 0.9) -> Step:
    """Importance sampling by a bound on the gradient norm, while it reduces the variance enough.

    Args:
        bench: What to train.
        arm: The arm.
        presample: Size of the pool, in batches.
        threshold: The smoothed variance reduction tau above which pools are scored.
        smoothing: Weight of the past in tau.
    """
    size = bench.settings.batch
    tau, steps = 0.0, 0

    def step(share: float) -> None:
        nonlocal tau, steps
        if tau > threshold:
            pool = bench.read(presample * size)
            with bench.ledger.timed("score"):
                batch, weights, norms = draw_by_gradient_norm(bench, pool, seeded(bench.seed, "importance", steps))
            with bench.ledger.timed("train"):
                bench.update(bench.loss(batch, weights))
            bench.ledger.note(candidates=len(norms), scored=len(norms))
        else:
            batch = bench.read(size)
            with bench.ledger.timed("train"):
                predicted = bench.predict(batch)
                sums = peers.sample_losses(predicted)
                bench.update(peers.weighted_loss(sums, predicted.counts, torch.ones_like(sums)))
            norms = peers.gradient_norms(predicted)
            bench.ledger.note(candidates=size)
        tau = smoothing * tau + (1 - smoothing) * peers.variance_reduction(norms)
        steps += 1
        bench.ledger.note(trained=size, tau=tau)

    return step


def draw_by_gradient_norm(bench: Bench, pool: Rows, generator: torch.Generator) -> tuple[Rows, Tensor, Tensor]:
    """Draw a batch from a pool in proportion to gradient norms; returns it with its weights and all norms."""
    size = bench.settings.batch
    norms = peers.gradient_norm_scores(bench.model, pool, chunk_rows=size)
    selection = selectors.proportional(norms, size, generator, uniform_share=_SMALLEST_SHARE)
    return pools.take(pool, selection.indices), selection.weights, norms


def reducible(bench: Bench, arm: Arm, *, keep: float = 0.1, holdout: float = 0.2, budget_share: float = 0.2) -> Step:
    """RHO-loss: the candidates whose loss exceeds that of a reference model most.

    The reference is trained here, before the first step, and charged. Its losses are remembered where a sample is the
    same each time it is read, so that later epochs need no forward pass of it.

    Args:
        bench: What to train.
        arm: The arm.
        keep: Share of the pool that is trained on.
        holdout: Share of the training part that only the reference model sees.
        budget_share: Share of the budget that it is trained for.
    """
    settings, samples = bench.settings, bench.workload.samples
    order = torch.randperm(len(samples), generator=seeded(bench.seed, "holdout"))
    held_out, rest = (part_of(samples, ids) for ids in order.tensor_split([round(holdout * len(samples))]))
    reference = Bench(
        replace(bench.workload, samples=held_out), settings, bench.seed + _REFERENCE_SEED, bench.medians_ms
    )
    step_ms = bench.medians_ms["read_batch"] + bench.medians_ms["train"]
    steps = round(budget_share * settings.budget * 1e3 / step_ms)
    for number in range(steps):
        reference.set_rate(number / steps)
        reference.update(reference.loss(reference.read(settings.batch)))
    bench.upfront_ms = {"reference model": steps * step_ms}
    bench.stream = Stream(rest, seed=bench.seed)
    irreducible = torch.full((len(rest),), torch.nan)

    def step(share: float) -> None:
        rows = round(settings.batch / keep)
        pool = bench.read(rows)
        ids = bench.stream.ids(bench.position - rows, rows)
        with bench.ledger.timed("reference"):
            again = bench.workload.task == "masked_lm"  # the next epoch has other masks
            unknown = (torch.isnan(irreducible[ids]) | again).nonzero().squeeze(1)
            if len(unknown):
                irreducible[ids[unknown]] = scorers.exact_loss(
                    reference.model, pools.take(pool, unknown), chunk_rows=settings.batch
                ).cpu()
        with bench.ledger.timed("score"):
            scores = scorers.exact_loss(bench.model, pool, chunk_rows=settings.batch).cpu() - irreducible[ids]
            batch = pools.take(pool, selectors.greedy(scores, settings.batch).indices)
        with bench.ledger.timed("train"):
            bench.update(bench.loss(batch))
        bench.ledger.note(candidates=rows, scored=rows, reference_scored=len(unknown), trained=settings.batch)

    return step


def part_of(samples: Samples, ids: Tensor) -> Samples:
    """The same samples with only some of the training part."""
    return replace(samples, train={name: values[ids] for name, values in samples.train.items()})


STEPS: dict[str, Callable[..., Step]] = {
    "sifted": sifted,
    "selective": selective,
    "ordered": ordered,
    "infobatch": infobatch,
    "importance": importance,
    "reducible": reducible,
}
