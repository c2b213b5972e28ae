"""Selective backprop: draws candidates by how their loss compares with recent losses, until a batch is full."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from earlysift.compare.arm import Arm, Step
from earlysift.compare.sifted import EXACT

if TYPE_CHECKING:
    from torch import Tensor

    from earlysift.compare.bench import Bench
    from earlysift.pretrain.stream import Rows

_HISTORY = 1024  # losses to compare with, as in the authors' code


def steps(bench: Bench, *, beta: float = 1.0, staleness: int = 1) -> Step:
    """Steps that look at b candidates at a time, and draw each or not, until a batch is full.

    What is drawn beyond b waits for the next batch. Every forward pass is charged.

    Args:
        bench: What to train.
        beta: Selectivity, see `selection_probabilities`.
        staleness: Epochs that the loss of a sample is used for; with 1 it is always fresh. The b candidates are scored
            together as soon as one of their losses is older.
    """
    import torch

    from earlysift import pools, scorers
    from earlysift.seeds import seeded

    size = bench.settings.batch
    past: deque[float] = deque(maxlen=_HISTORY)
    waiting: list[Rows] = []
    last_losses = torch.full((len(bench.workload.samples),), torch.nan)
    scored_in = torch.full((len(bench.workload.samples),), -staleness)  # epoch of every last loss

    def step(share: float) -> None:
        nonlocal waiting
        selecting = share >= bench.settings.select_after
        start, scored = bench.position, 0
        if not selecting:
            waiting = [bench.read(size)]
        while sum(map(pools.pool_size, waiting)) < size:
            positions = torch.arange(bench.position, bench.position + size)
            ids, epochs = bench.stream.ids_of(positions), positions // bench.stream.epoch
            chunk = bench.read(size)
            with bench.ledger.timed("score"):
                # All or none: a pass over a few rows costs more per row, which would distort the price of exact losses.
                if (epochs - scored_in[ids] >= staleness).any():
                    losses = scorers.exact_loss(bench.model, chunk, chunk_rows=size).cpu()
                    last_losses[ids], scored_in[ids] = losses, epochs
                    scored += size
                else:
                    losses = last_losses[ids]
                past.extend(losses.tolist())
                probabilities = selection_probabilities(losses, torch.tensor(past), beta)
                draws = torch.rand(size, generator=seeded(bench.seed, "selective", bench.position))
                waiting.append(pools.take(chunk, (draws < probabilities).nonzero().squeeze(1)))
        drawn = {name: torch.cat([rows[name] for rows in waiting]) for name in waiting[0]}
        batch, waiting = pools.take(drawn, slice(size)), [pools.take(drawn, slice(size, None))]
        with bench.ledger.timed("train"):
            bench.update(bench.loss(batch))
        bench.ledger.note(candidates=bench.position - start, scored=scored, trained=size)

    return step


def selection_probabilities(losses: Tensor, past: Tensor, beta: float) -> Tensor:
    r"""Probability of every candidate to be trained on, ``(R,)``.

    ``P_i = CDF(loss_i) ** beta``, with the CDF of recent losses: the share of them that is not above.

    Args:
        losses: Of the candidates, ``(R,)``; nan counts as the largest.
        past: The last losses, theirs included, ``(H,)``.
        beta: Selectivity; 0 keeps all, 1 half on average.

    Example:
        >>> import torch
        >>> selection_probabilities(torch.tensor([1.0, 4.0]), torch.tensor([4.0, 1.0, 2.0, 3.0]), 1.0)
        tensor([0.2500, 1.0000])
    """
    import torch

    past, losses = (values.nan_to_num(nan=torch.inf, posinf=torch.inf) for values in (past, losses))
    return (torch.searchsorted(past.sort().values, losses, right=True) / len(past)) ** beta


ARM = Arm(
    "selective backprop",
    "looks at candidates until a batch is full, and draws each with the probability that one of the last 1,024 "
    "exact losses does not exceed its own (beta 1); the first epoch without selection of the authors' code is left "
    "out",
    steps,
    source="Jiang et al., 2019, arXiv 1910.00762",
    scoring=EXACT,
)
