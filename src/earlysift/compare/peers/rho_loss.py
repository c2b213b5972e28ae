"""RHO-loss: keeps the candidates whose loss exceeds that of a reference model most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from earlysift.compare.arm import Arm, Operation, Step

if TYPE_CHECKING:
    from torch import Tensor

    from earlysift.compare.bench import Bench
    from earlysift.pretrain.stream import Rows

_KEEP = 0.1
_HOLDOUT = 0.2  # share of the training part that only the reference model sees
_BUDGET_SHARE = 0.2  # share of the budget that it is trained for
_REFERENCE_SEED = 1_000_000  # added to the seed, so that the reference model starts from other weights


def steps(bench: Bench) -> Step:
    """Train the reference model, which is charged, and return the function that takes a step.

    The reference's losses are remembered where a sample is the same each time it is read, so that later epochs need no
    forward pass of it.
    """
    import torch

    from earlysift import pools, scorers
    from earlysift.compare.bench import Bench
    from earlysift.pretrain.stream import Stream
    from earlysift.pretrain.workload_settings import MASKED
    from earlysift.seeds import seeded

    settings, samples = bench.settings, bench.workload.samples
    order = torch.randperm(len(samples), generator=seeded(bench.seed, "holdout"))
    held_out, rest = (
        replace(samples, train={name: values[ids] for name, values in samples.train.items()})
        for ids in order.tensor_split([round(_HOLDOUT * len(samples))])
    )
    reference = Bench(
        replace(bench.workload, samples=held_out), settings, bench.seed + _REFERENCE_SEED, bench.medians_ms
    )
    count = round(_BUDGET_SHARE * bench.budget_steps())
    for number in range(count):
        reference.set_rate(number / count)
        reference.update(reference.loss(reference.read(settings.batch)))
    bench.upfront_ms = {"reference model": count * bench.step_ms()}
    bench.stream = Stream(rest, seed=bench.seed)
    reference_losses = torch.full((len(rest),), torch.nan)
    # Masks and augmented images change from epoch to epoch, and losses with them.
    samples_change = bench.workload.task in MASKED or settings.augmented
    size = SCORING.pool(settings)

    def step(_share: float) -> None:
        pool = bench.read(size)
        ids = bench.stream.ids(bench.position - size, size)
        with bench.ledger.timed("reference"):
            unknown = (torch.isnan(reference_losses[ids]) | samples_change).nonzero().squeeze(1)
            if len(unknown):
                reference_losses[ids[unknown]] = scorers.exact_loss(
                    reference.model, pools.take(pool, unknown), chunk_rows=settings.batch
                ).cpu()
        with bench.ledger.timed("score"):
            batch = select(bench, pool, reference_losses[ids])
        with bench.ledger.timed("train"):
            bench.update(bench.loss(batch))
        bench.ledger.note(candidates=size, scored=size, reference_scored=len(unknown), trained=settings.batch)

    return step


def select(bench: Bench, pool: Rows, reference_losses: Tensor) -> Rows:
    """The batch of those candidates whose loss exceeds the reference's, ``(R,)``, most."""
    from earlysift import pools, scorers, selectors

    size = bench.settings.batch
    scores = scorers.exact_loss(bench.model, pool, chunk_rows=size).cpu() - reference_losses
    batch: Rows = pools.take(pool, selectors.greedy(scores, size).indices)
    return batch


def _scoring(bench: Bench) -> Callable[[], object]:
    import torch

    size = SCORING.pool(bench.settings)
    pool = bench.read(size)
    return lambda: select(bench, pool, torch.zeros(size))


SCORING = Operation("rho_loss", "score", _scoring, keep=_KEEP)
ARM = Arm(
    "RHO-loss",
    "keeps the tenth of a pool whose loss exceeds a reference model's most; the reference is the same model, "
    "trained on a fifth of the training part, held out for it, for a fifth of the budget, which is charged (the "
    "paper shares one among many runs)",
    steps,
    source="Mindermann et al., 2022, arXiv 2206.07137",
    scoring=SCORING,
)
