"""Steering by auto mode: what may be chosen on a model, what it costs, and what a step does from here on.

Functions of numbers: the model passes that measure them are handed in, and made only when they are due.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from earlysift import controller, probes
from earlysift.control import Choice, Control
from earlysift.controller import State
from earlysift.recent import MEMORY


class Measured(NamedTuple):
    """What all ranks know: numbers of a probe or of trained samples, and whether every loop reads the weights."""

    numbers: dict[str, float]
    weighted: bool


def candidates(
    control: Control, *, depth: int, keep: float, layers: int, one_depth: bool, remembers: bool = False
) -> Control:
    """What can be chosen on a model: depths that it has, pools that are large enough, the configured depth and keep.

    Args:
        control: What may be chosen in general.
        depth: The configured depth.
        keep: The configured keep; pools are this large, so no smaller keep is possible.
        layers: Layers that the model has.
        one_depth: Whether only the configured depth is possible, as an exit head belongs to one.
        remembers: Whether losses are remembered, so that they can be chosen by, too.

    Raises:
        ValueError: If reference costs lack one of these depths.
    """
    depths = {depth} if one_depth else {depth, *(d for d in control.depths if d < layers)}
    keeps = {keep, *(k for k in control.keeps if k > keep)}
    needed = {"train", "probe", *(f"score_{d}" for d in depths)}
    if control.reference_costs is not None and not needed <= control.reference_costs.keys():
        raise ValueError(
            f"Expected reference_costs of {', '.join(sorted(needed))}, got {sorted(control.reference_costs)}. "
            "Give a time for each, or None to measure them."
        )
    return dataclasses.replace(control, depths=tuple(sorted(depths)), memory=remembers, keeps=tuple(sorted(keeps)))


def start(control: Control | None) -> State | None:
    """The state before the first step; None where there is no control, or where prices need a pool first."""
    if control is None or not control.reference_costs:
        return None
    return State(next_probe=controller.next_probe(0, control, control.reference_costs))


def prices(flops: Mapping[str, float], times_ms: Mapping[str, float]) -> dict[str, float]:
    """Prices of operations in one unit: measured times, and FLOPs for what has not been timed yet.

    Args:
        flops: Of ``train``, ``probe`` and ``score_{depth}``.
        times_ms: Measured times by the same names, as far as there are any; without ``train`` they are of no use.

    Example:
        >>> prices({"train": 6e9, "score_1": 1e9}, {"train": 60.0})
        {'train': 60.0, 'score_1': 10.0}
    """
    if "train" not in times_ms:
        return dict(flops)
    unit = times_ms["train"] / flops["train"]
    return {name: times_ms.get(name, unit * count) for name, count in flops.items()}


def steer(
    state: State | None,
    control: Control,
    step: int,
    *,
    first: bool,
    pools_per_step: int,
    depth: int,
    keep: float,
    prices_of: Callable[[], dict[str, float]],
    probe: Callable[[], Measured] | None,
    trained: Callable[[], Measured | None] | None = None,
    free: Callable[[], Measured],
) -> tuple[State, dict[str, Any]]:
    """Probe if a probe is due, and decide what steps do from here on.

    Args:
        state: Before the step; None before the first pool.
        control: What may be chosen.
        step: The optimizer step.
        first: Whether the pool is the first of its step.
        pools_per_step: Pools that a step trains on, as far as is known.
        depth: The configured depth.
        keep: b / R.
        prices_of: Finds the prices of operations.
        probe: Probes the pool; None if this pool cannot be probed.
        trained: Finds the record of what was just trained on uniformly, None while there is too little of it; itself
            None where no training pass is looked into.
        free: Finds what the losses of trained samples say; nothing where no loop hands them over.

    Returns:
        The state from here on, and what the ledger is to note: ``mode``; ``control`` (the numbers that the choice rests
        on) if there was a new record or the choice changed; ``rank_correlation`` and ``gain`` if the pool was probed;
        ``event`` if the choice changed.
    """
    if state is None or (step == 1 and first and pools_per_step > 1):  # only now is known how many pools share a step
        due = controller.next_probe(0 if step == 1 else step, control, prices_of(), pools_per_step)
        state = dataclasses.replace(state or State(), next_probe=due)
    row: dict[str, Any] = {}
    before, reason = state.choice, ""
    due = first and probe is not None and step >= state.next_probe
    looks = first and step % controller.FREE_EVERY == 0
    seen = free() if due or looks else Measured({}, weighted=False)
    measured = None
    # What was trained on stands in for a probe where the losses of later on are those of training passes, too.
    if trained is not None and before is None and "loss" in seen.numbers:
        measured = trained()
    probed = due and measured is None
    if probed and probe is not None:
        measured = probe()
    if measured is not None:
        state, row["control"], reason = controller.advance(
            state,
            measured.numbers,
            prices_of(),
            control,
            keep,
            step,
            measured.weighted,
            pools_per_step,
            seen.numbers,
        )
    elif seen.numbers:
        state, numbers, reason = controller.look(state, prices_of(), control, keep, step, seen.weighted, seen.numbers)
        if state.choice != before:
            row["control"] = numbers
    if probed and measured is not None:
        chosen = state.choice or before
        seen_depth = depth if chosen is None else chosen.depth
        row["rank_correlation"] = measured.numbers[f"correlation.{seen_depth}"]
        row["gain"] = measured.numbers[f"gain.{seen_depth}.{keep:g}"]
    if state.choice is not None:
        state, _, end = controller.end(state, control, step)
        reason = reason if state.choice else end
    if state.choice != before:
        row["event"] = {"from": _words(before), "to": _words(state.choice), "reason": reason}
    return state, row | {"mode": state.choice.rule if state.choice else "off"}


def _words(choice: Choice | None) -> str:
    return "uniform" if choice is None else str(choice)


def free_of(numbers: Mapping[str, float], control: Control) -> dict[str, float]:
    """Free signals with every name that they may have, nan where one is missing: the same names on every rank."""
    gains = [f"gain.{MEMORY}.{keep:g}" for keep in control.keeps]
    names = ("concentration", "loss", "loss_error", f"correlation.{MEMORY}", *gains, "retention", "epochs")
    return {name: numbers.get(name, math.nan) for name in names}


def record_of(numbers: Mapping[str, float], control: Control) -> dict[str, float]:
    """A record with every name that it must have, nan where a number is missing: the same names on every rank."""
    return {name: numbers.get(name, math.nan) for name in probes.record_names(control)}
