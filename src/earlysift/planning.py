"""Planning a step: whether it selects, by what, and from which candidates, before anything is scored."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator

from earlysift import controller, ranks, selectors, steering
from earlysift.config import SiftConfig
from earlysift.control import Control
from earlysift.pools import Pool
from earlysift.progress import Progress
from earlysift.runner import Runner
from earlysift.scorers import Approximation
from earlysift.seeds import seeded
from earlysift.selectors import Selector

RULES: dict[str, Selector] = {"greedy": selectors.greedy, "unbiased": selectors.proportional}
"""The selectors that auto mode chooses from."""


@dataclass(frozen=True)
class Draws:
    """Random numbers of a pool: this rank's ``own`` generator, one ``shared`` by all, and whether its step selects."""

    own: Generator
    shared: Generator
    selects: bool


@dataclass(frozen=True)
class Plan:
    """What a step does.

    Attributes:
        step: The optimizer step.
        micro_step: Number of the pool within it.
        kept: b.
        is_partial: Whether the pool holds fewer than b candidates: all are trained on.
        draws: Where random numbers come from.
        selects: Whether the step selects; if not, it trains uniformly.
        select: The selector.
        approximation: What scores the candidates; None if nothing needs scores.
        depth: The exit that it uses, if it uses one.
        considered: Candidates that are scored, counted from the first.
        rows: Rows that every rank scores.
        probes: Whether scores are compared with exact losses.
        everywhere: Whether the candidates of all ranks are selected from together.
        steering: What auto mode remembers after this step.
        row: What the ledger is to note of steering.
    """

    step: int
    micro_step: int
    kept: int
    is_partial: bool
    draws: Draws
    selects: bool
    select: Selector
    approximation: Approximation | None
    depth: int
    considered: int
    rows: int
    probes: bool
    everywhere: bool
    steering: controller.State | None = None
    row: dict[str, Any] = field(default_factory=dict)


def draw(config: SiftConfig, step: int, micro_step: int) -> Draws:
    """The generators of a pool, and what they decide: derived from seed, step, micro-step and rank alone."""

    def generator_of(rank: int) -> Generator:
        return seeded(config.seed, "sift", step, rank, *([micro_step] if micro_step else []))

    of_step = seeded(config.seed, "sift", step, 0)
    # All ranks use the same number: a rank that scored alone would wait for the others forever (FSDP).
    selects = torch.rand((), generator=of_step).item() < config.share(step)
    shared = generator_of(0) if micro_step else of_step
    return Draws(generator_of(ranks.rank()) if ranks.rank() else shared, shared, selects)


def plan(pool: Pool, kept: int, micro_step: int, progress: Progress, control: Control | None, runner: Runner) -> Plan:
    """Plan the step of a pool; in auto mode this may probe it.

    Args:
        pool: Pool of R candidates.
        kept: b.
        micro_step: Number of the pool within its step.
        progress: What was before.
        control: What auto mode may choose from; None in fixed mode.
        runner: Runs the model.
    """
    config = runner.config
    step, first = progress.place(micro_step)
    draws = draw(config, step, micro_step)
    state, row = (None, {}) if control is None else steer(pool, kept, step, first, progress, control, runner)
    memory = runner.learnt.memory
    selects = draws.selects and not (config.score == "memory" and memory is not None and memory.is_useless)
    select, depth, approximation = config.select, config.depth, runner.approximation
    rows, considered = max(progress.largest, pool.size), pool.size
    if config.keep_schedule is not None:
        rows = round(kept / config.keep_at(step))
        considered = min(pool.size, rows)
    if state is not None:
        selects = selects and state.choice is not None
    if state is not None and state.choice is not None:
        select, depth, keep = RULES[state.choice.rule], state.choice.depth, state.choice.keep
        approximation = runner.at(depth)
        rows = min(rows, round(kept / keep))
        considered = min(pool.size, rows)
    due = config.mode == "fixed" and config.probe_every > 0 and step % config.probe_every == 0
    probes = first and due and runner.has_labels(pool.data)
    is_partial = pool.size < kept
    everywhere = selects and config.scope == "global" and approximation is not None and ranks.world() > 1
    # A partial pool is kept whole, so do only the work that other ranks wait for.
    recalls = memory is not None and memory.ranks > 1 and approximation is not None and approximation.recalls
    together = everywhere or ranks.sharded(runner.model) or recalls
    must_score = (selects or probes) and (not is_partial or together)
    return Plan(
        step=step,
        micro_step=micro_step,
        kept=kept,
        is_partial=is_partial,
        draws=draws,
        selects=selects,
        select=select,
        approximation=approximation if must_score else None,
        depth=depth,
        considered=considered,
        rows=rows,
        probes=probes,
        everywhere=everywhere,
        steering=state,
        row=row,
    )


def steer(
    pool: Pool, kept: int, step: int, first: bool, progress: Progress, control: Control, runner: Runner
) -> tuple[controller.State, dict[str, Any]]:
    """What auto mode decides about a step, alike on all ranks: see `earlysift.steering.steer`."""

    def prices() -> dict[str, float]:
        if control.reference_costs is not None:
            return ranks.mean(control.reference_costs, runner.device)
        # Times of the ledger first: the loop may time its training itself.
        times_ms = runner.times_between_ms() | runner.ledger.medians_ms()
        return ranks.mean(steering.prices(runner.flops(whole(), control, kept), times_ms), runner.device)

    def whole() -> Pool:
        """As many candidates as a step that selects scores, though a loop offers b to steps that do not."""
        rows = round(kept / runner.config.keep)
        return runner.filled_up(pool if pool.size >= rows else pool.take(torch.arange(rows) % pool.size), rows)

    def together(numbers: dict[str, float]) -> steering.Measured:
        numbers = ranks.mean({**numbers, "weighted": float(progress.weights_read)}, runner.device)
        return steering.Measured(numbers, weighted=numbers.pop("weighted") == 1)

    def probe() -> steering.Measured:
        record = runner.steering_record(runner.filled_up(pool, progress.largest), control, kept)
        # A partial pool is too small to learn from: the controller forgets it, on all ranks.
        return together(steering.record_of({} if pool.size < kept else record, control))

    def trained() -> steering.Measured | None:
        record = runner.trained_record(control, kept, step)
        measured = together(steering.record_of(record, control))
        if not all(map(math.isfinite, measured.numbers.values())):
            return None
        runner.time_scoring(whole(), control, kept)
        return measured

    def free() -> steering.Measured:
        signals = runner.recent.signals(control.keeps)
        memory = runner.learnt.memory
        if memory is not None and memory.seen and control.total_steps is not None and "retention" in signals:
            # Epochs of the whole training, at the rate at which candidates have come so far.
            signals["epochs"] = progress.counts["candidates"] / memory.seen * control.total_steps / max(1, step)
        numbers, weighted = together(steering.free_of(signals, control))
        return steering.Measured({name: x for name, x in numbers.items() if math.isfinite(x)}, weighted)

    state, row = steering.steer(
        progress.steering,
        control,
        step,
        first=first,
        pools_per_step=progress.pools_per_step,
        depth=runner.config.depth,
        keep=runner.config.keep,
        prices_of=prices,
        probe=probe if runner.has_labels(pool.data) else None,
        trained=trained if runner.learnt.trained is not None else None,
        free=free,
    )
    return state, row | ({"probed": pool.size} if "rank_correlation" in row else {})
