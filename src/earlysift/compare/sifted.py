"""Steps and operations of the arms that put pools through a `Sifter`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from earlysift.compare.arm import Operation, Step, usable_exits
from earlysift.measures import MEASURES

if TYPE_CHECKING:
    from torch import Tensor

    from earlysift.compare.bench import Bench
    from earlysift.pretrain.stream import Rows
    from earlysift.sifter import Sifter

EXIT_HEAD_WIDTH = 64  # of the residual layer of an exit's own head
JOINT_WEIGHT = 0.3  # of the exit's loss, where it is trained along with the model's
AUTO_EXITS, AUTO_KEEP = (1, 2, 3), 0.25
AUTO_DEPTHS = (0, *AUTO_EXITS)  # depth 0 are remembered losses
_SAMPLE_ID = "sample_id"


def sifted(
    bench: Bench,
    *,
    depth: int | None = None,
    subset: float = 1.0,
    joint: float = 0.0,
    select_after: float | None = None,
    **options: Any,
) -> Step:
    """Pools through a `Sifter`; keep = 1 is uniform training.

    Args:
        bench: What to train.
        depth: The exit to score at; None is the comparison's.
        subset: Share of the data that an epoch shows.
        joint: Weight of the early exit's loss in the training loss.
        select_after: Share of the budget with uniform training; None is the comparison's.
        options: Further arguments of `Bench.sifter`.
    """
    if subset < 1:
        from earlysift.pretrain.stream import Stream

        bench.stream = Stream(bench.workload.samples, seed=bench.seed, subset=subset)
    plain, selecting = bench.sifter(depth, keep=1.0), bench.sifter(depth, **options)
    start = bench.settings.select_after if select_after is None else select_after

    def loss_of(batch: Rows, weights: Tensor | None) -> Tensor:
        return bench.joint_loss(batch, selecting, joint) if joint else bench.loss(batch, weights)

    return lambda share: _sift_and_train(bench, selecting if share >= start else plain, loss_of)


def learning(bench: Bench, *, depth: int | None = None, **options: Any) -> Step:
    """Pools through one `Sifter` whose score learns from the training losses, from the first uniform step on.

    Args:
        bench: What to train.
        depth: The exit to score at; None is the comparison's.
        options: Further arguments of `Bench.sifter`.
    """
    start, spent = bench.settings.select_after, 0.0
    sifter = bench.sifter(depth, sample_id=_SAMPLE_ID, schedule=lambda _: float(spent >= start), **options)

    def step(share: float) -> None:
        nonlocal spent
        spent = share
        _sift_and_train(bench, sifter, lambda batch, weights: bench.observed_loss(batch, sifter, weights))

    return step


def auto(bench: Bench) -> Step:
    """Pools through a `Sifter` in auto mode, which trains uniformly until selecting pays."""
    sifter = _auto_sifter(bench)
    return lambda _: _sift_and_train(bench, sifter, lambda batch, weights: bench.observed_loss(batch, sifter, weights))


def _sift_and_train(bench: Bench, sifter: Sifter, loss_of: Callable[[Rows, Tensor | None], Tensor]) -> None:
    pool = _pool(bench, sifter.wanted, sifter)
    with bench.ledger.timed("sift"):
        batch = sifter.sift(pool)
    with bench.ledger.timed("train"):
        bench.update(loss_of(batch, None if sifter.config.keep == 1 else sifter.weights))
    row = sifter.ledger.end()
    if row.get("mode") == "off":
        bench.position -= row["candidates"] - row["trained"]  # read for a probe only; offered again
    bench.ledger.note(**{name: value for name, value in row.items() if name not in ("step", "step_ms")})


def _auto_sifter(bench: Bench) -> Sifter:
    exits = usable_exits(AUTO_EXITS, bench.settings)
    control = bench.control(exits, AUTO_KEEP, AUTO_SCORING)
    return bench.sifter(exits[0], mode="auto", keep=AUTO_KEEP, sample_id=_SAMPLE_ID, control=control)


def _auto_scoring(bench: Bench, *, depth: int) -> Callable[[], object]:
    """Sifting as auto mode does it by one of its choices; depth 0 are remembered losses."""
    from earlysift.anatomy import find_anatomy

    if depth == 0:
        return sifting(bench, score="memory", sample_id=_SAMPLE_ID)
    by_probe = find_anatomy(bench.model).task == "sequence_classification"
    return sifting(bench, score="probe" if by_probe else "loss", depth=depth)


def sifting(bench: Bench, **options: Any) -> Callable[[], object]:
    """Score a pool, select and gather: what a sifter does. Options are those of `Bench.sifter`."""
    sifter = bench.sifter(**options)
    pool = _pool(bench, bench.settings.pool, sifter)
    return lambda: sifter.sift(pool)


def _pool(bench: Bench, size: int, sifter: Sifter) -> Rows:
    """The next candidates, with their ids if the sifter needs them."""
    pool = bench.read(size)
    if sifter.config.sample_id is not None:
        pool[sifter.config.sample_id] = bench.stream.ids(bench.position - size, size)
    return pool


def _training_jointly(bench: Bench, *, depth: int) -> Callable[[], object]:
    sifter, batch = bench.sifter(depth), bench.read(bench.settings.batch)
    return lambda: bench.update(bench.joint_loss(batch, sifter, JOINT_WEIGHT))


def _teaching(bench: Bench) -> Callable[[], object]:
    """A lesson for the probes at the exits of auto mode, as `earlysift.scorers.lesson` gives it."""
    import torch
    from torch.nn.functional import cross_entropy

    from earlysift.exit_probe import ExitProbe, features

    settings = bench.settings
    probes = [ExitProbe() for _ in usable_exits(AUTO_EXITS, settings)]
    states = torch.zeros(settings.batch, settings.length, settings.width, device=bench.device)
    labels = torch.arange(settings.batch, device=bench.device) % 2

    def teach() -> None:
        for probe in probes:
            logits = probe.classify(features(states), classes=10)
            probe.propose(cross_entropy(logits, labels, reduction="none"))
            probe.learn()

    return teach


def _looking(bench: Bench) -> Callable[[], object]:
    """A look of auto mode at a pool that was trained on."""
    import torch

    from earlysift import probes
    from earlysift.control import scored_depths
    from earlysift.trained_pool import EXACT, INPUTS, SLOPES, TrainedPool

    settings, batches = bench.settings, round(1 / AUTO_KEEP)
    control = replace(bench.control(usable_exits(AUTO_EXITS, settings), AUTO_KEEP, AUTO_SCORING), memory=True)
    pool, rows = TrainedPool(batches), torch.arange(1.0, settings.batch + 1, device=bench.device)
    scores = {str(depth): rows for depth in scored_depths(control)}
    for step in range(batches):
        slopes, inputs = rows[:, None].expand(-1, 10), rows[:, None].expand(-1, settings.width)
        pool.add(step, {EXACT: rows, SLOPES: slopes, INPUTS: inputs, **scores})
    return lambda: probes.record(probes.of_trained(pool), settings.batch, control)


def _probing(bench: Bench) -> Callable[[], object]:
    sifter = _auto_sifter(bench)
    sifter.loss(sifter.sift(_pool(bench, sifter.wanted, sifter)))  # a lesson, so that exits are read as later on
    pool = _pool(bench, bench.settings.pool, sifter)
    return lambda: sifter.probe(pool)


SCORING = {
    name: Operation("score" if name == "loss" else name, "score", partial(sifting, score=name), at_exit=True)
    for name in MEASURES
}
MEMORY = Operation("memory", "score", partial(sifting, score="memory", sample_id=_SAMPLE_ID))
EXIT_PROBE = Operation("exit_probe", "score", partial(sifting, score="probe"), at_exit=True)
BLEND = Operation("blend", "score", partial(sifting, score="blend", sample_id=_SAMPLE_ID), at_exit=True)
AUTO_SCORING = Operation("auto", "score", _auto_scoring, at_exit=True)
EXACT = Operation("exact", "score", partial(sifting, score="exact"))
HEAD = Operation("head", "score", partial(sifting, own_head=EXIT_HEAD_WIDTH), at_exit=True)
TRAIN_JOINTLY = Operation("train_joint", "train", _training_jointly, at_exit=True)
PROBE = Operation("probe", "probe", _probing)
LESSON = Operation("lesson", "lesson", _teaching)
LOOK = Operation("look", "lesson", _looking)
