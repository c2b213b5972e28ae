"""The payoff controller: from what was measured, whether to select, by which score and rule, from how large a pool.

Pure functions of records and costs: the same records give the same choice, on every rank and after every resume. A
choice of None is uniform training, where every run begins and where it returns to when selection does not pay.

Three sources feed it. Probes compare scores with exact losses and gradients on a whole pool, and are rare because they
cost. Uniform batches of a classifier show the same as they are trained on (`earlysift.trained_pool`), for nothing. The
losses of trained samples (`earlysift.recent.Recent`) are free, too, and always fresh, in loops that hand them over.
"""

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from earlysift.control import Choice, Control, Rule, choices, score_name
from earlysift.options import finite, whole
from earlysift.payoffs import estimates, known
from earlysift.probes import Record, record_names
from earlysift.recent import MEMORY

WINDOW = 6  # records that a choice looks back on
ENOUGH = 2  # records before the first choice
SURE = 3.0  # standard errors
BY_HEART = 0.25  # where less is left of large losses when their samples come back, these are memorised
LEAST_CORRELATION = 0.1  # a score that ranks worse than this ranks at random
EARLY_SHARE, EARLY_PROBES = 0.1, 0.4  # this part of the training gets this part of the probes
FREE_EVERY = 50  # steps between looks at what is free, which take some milliseconds
LONGER = 4  # times the steps so far without selection once samples are learnt by heart; later visits add to that
MOVE = 1.05  # a better choice must pay so many times as much as the present one
LEAST_EPOCHS = 4  # in fewer, what is learnt of large losses is too little to be told from what is memorised
_BY_HEART = "samples were learnt by heart at step {}, and nothing is selected before step {}"
_UNWEIGHTED = "the loop reads no weights, which the unbiased rule needs"
_FEW_EPOCHS = "samples come back too seldom to learn from ({:.1f} epochs in all; at least {})"
_NEAR_END = "the training nears its end, and greedy selection has a floor"
_HAS_RISEN = "the loss of whole pools has risen by {:.2g} since: what is not trained on is forgotten"
_HARMED = "greedy selection made the loss of whole pools rise at step {}, and is not tried again before twice that step"


class Bounds(NamedTuple):
    """What the numbers of a choice must be for it to be taken, or to be kept.

    Attributes:
        correlation: Least rank correlation of its score with exact losses.
        payoff: Least payoff of a greedy choice by C2: the batch holds the loss.
        variance: How many times less noisy an unbiased choice must make steps at least, by T7; where large losses may
            be of what cannot be learnt, so must a greedy one by an exit.
        promise: How many times what it costs must be covered by that, where large losses may be of what cannot be
            learnt; else once.
        progress: Least progress along the mean gradient, relative to uniform training's, of a greedy choice by an exit
            where large losses may be of what cannot be learnt.
        retention: Most that is left of a large loss when its sample comes back: of noise, nearly all.
        room: Least room that a batch has for the samples that carry the loss: keep times concentration. Before that,
            all losses fall, and retention says nothing.
    """

    correlation: float
    payoff: float
    variance: float
    promise: float
    progress: float
    retention: float
    room: float


TAKE = Bounds(correlation=0.3, payoff=1.2, variance=1.04, promise=2.0, progress=0.75, retention=0.75, room=1.0)
KEEP = Bounds(
    correlation=LEAST_CORRELATION, payoff=1.0, variance=0.98, promise=1.0, progress=0.75, retention=0.9, room=0.7
)
"""The gap between both is a hysteresis."""


@dataclass(frozen=True)
class State:
    """All that the controller remembers, JSON-like.

    Attributes:
        choice: What steps do now; None is uniform.
        records: The latest records; after a choice failed, the one that showed it and those since.
        next_probe: Step of the next probe.
        before: Mean loss of whole pools when the choice was made, and its standard error.
        harmed: Step at which greedy selection has made that loss rise, 0 if it has not; it is not tried again before
            twice that step.
        by_heart: Step at which so little was left of large losses when their samples came back that these must have
            been memorised, 0 if there was none; nothing is selected before `LONGER` times that step.
    """

    choice: Choice | None = None
    records: tuple[Record, ...] = ()
    next_probe: int = 0
    before: tuple[float, float] = (0.0, 0.0)
    harmed: int = 0
    by_heart: int = 0


class Verdict(NamedTuple):
    """What a probe led to: the state from here on, the numbers it rests on, and the reason in words."""

    state: State
    numbers: dict[str, float]
    reason: str


def advance(
    state: State,
    entry: Record,
    prices: Mapping[str, float],
    control: Control,
    pool_keep: float,
    step: int,
    weighted: bool = True,
    pools_per_step: int = 1,
    free: Mapping[str, float] | None = None,
) -> Verdict:
    """One probe further: remember its record, choose, and say when the next probe is due.

    Args:
        state: Before the probe.
        entry: What `record` returned; one with numbers that are not finite is forgotten.
        prices: ``train``, ``probe`` and ``score_{depth}`` (scoring the whole pool), in one unit.
        control: What may be chosen.
        pool_keep: b / R, so what a keep as large as the pool allows costs.
        step: The present step.
        weighted: Whether the loop weighs samples, as the unbiased rule needs.
        pools_per_step: Pools that an optimizer step trains on.
        free: What the losses of trained samples say, see `earlysift.recent.Recent.signals`.
    """
    usable = all(math.isfinite(value) for value in entry.values())
    records = (*state.records, entry)[-WINDOW:] if usable else state.records
    state = replace(state, records=records, next_probe=next_probe(step, control, prices, pools_per_step))
    return look(state, prices, control, pool_keep, step, weighted, free)


def look(
    state: State,
    prices: Mapping[str, float],
    control: Control,
    pool_keep: float,
    step: int,
    weighted: bool = True,
    free: Mapping[str, float] | None = None,
) -> Verdict:
    """Choose by the records so far and by what is free; arguments as in `advance`."""
    if not state.records:
        return Verdict(state, {}, "no probe has seen finite losses yet")
    numbers = estimates(state.records, control, prices, pool_keep) | known(free or {}, control, prices, pool_keep)
    if numbers.get("retention", 1.0) < BY_HEART:
        state = replace(state, by_heart=step)
    choice, reason = decide(state, numbers, control, step, weighted)
    risen = _has_risen(state, numbers)
    after = _switched(state, choice, numbers)
    if risen:
        after = replace(after, records=after.records[-1:])
    return Verdict(replace(after, harmed=step if risen else state.harmed), numbers, reason)


def end(state: State, control: Control, step: int) -> Verdict:
    """End greedy selection if the training is near its own end, whether or not a probe is due.

    Nothing failed, so the records stay, and may speak for an unbiased choice at the next look.
    """
    ended = state.choice is not None and state.choice.rule == "greedy" and _near_end(control, step)
    return Verdict(replace(state, choice=None) if ended else state, {}, _NEAR_END)


def _switched(state: State, choice: Choice | None, numbers: Mapping[str, float]) -> State:
    if choice == state.choice:
        return state
    # What spoke for a choice that failed must not bring it back at once; else records stay, as probes are rare.
    records = state.records if choice else state.records[-1:]
    before = (numbers["loss"], numbers["loss_error"]) if numbers else state.before
    return replace(state, choice=choice, records=records, before=before)


def _near_end(control: Control, step: int) -> bool:
    return control.total_steps is not None and step >= control.end_share * control.total_steps


def decide(
    state: State, numbers: Mapping[str, float], control: Control, step: int, weighted: bool = True
) -> tuple[Choice | None, str]:
    """The choice from this step on, and why.

    An unbiased choice is fit if it makes steps less noisy than it costs (T7): its mean is that of uniform training, so
    that it cannot lead astray. A greedy one is fit if its score ranks, if the batch holds the loss of the pool (C2),
    and if large losses are known to be of what can be learnt: they shrink when their samples are trained on, and a
    batch has room for those that carry the loss. By an exit it is also fit without knowing that, if gradients bear the
    payoff out (T7) and steps on the largest losses go along the mean gradient. All this by `TAKE`; a choice is kept by
    the milder `KEEP`, a greedy one until the training nears its end, or the loss of whole pools has risen since (greedy
    selection forgets what it does not train on): then no greedy one is taken until the training is twice as long. Where
    samples are learnt by heart in one visit, no choice is taken until it is `LONGER` times as long: to select would
    only speed that up. Nor is any taken where samples come back, but the whole training has fewer than `LEAST_EPOCHS`
    epochs, as fine-tuning mostly has.

    Greedy choices go first where it is known that large losses are of what can be learnt, as they gain most there, and
    of these remembered losses, which are for nothing; else unbiased ones do. Among those the one that pays most is
    taken, and while on, it moves to a clearly better one.

    Args:
        state: The choice now, and how it began.
        numbers: What `estimates` and `known` returned.
        control: What may be chosen.
        step: The present step.
        weighted: Whether the loop weighs samples; the unbiased rule is never chosen in one that does not.

    Returns:
        The choice, and the reason in words.
    """
    now = state.choice
    if now is not None and now.depth != MEMORY:  # a breakdown of ranking shows in the latest probe, not in the median
        latest = state.records[-1][f"correlation.{now.depth}"]
        numbers = {**numbers, f"correlation.{now.depth}": min(latest, numbers[f"correlation.{now.depth}"])}
    risen = _has_risen(state, numbers)
    vetoes = {
        _NEAR_END: _near_end(control, step),
        _HAS_RISEN.format(numbers["loss"] - state.before[0]): risen,
        _HARMED.format(state.harmed): step < 2 * state.harmed,
    }
    veto = next((reason for reason, applies in vetoes.items() if applies), "")
    again = LONGER * state.by_heart
    by_heart = _BY_HEART.format(state.by_heart, again) if step < again else ""
    epochs = numbers.get("epochs", math.inf)
    few = _FEW_EPOCHS.format(epochs, LEAST_EPOCHS) if epochs < LEAST_EPOCHS else ""
    vetoed = {"greedy": few or by_heart or veto, "unbiased": few or by_heart}
    objections = {
        choice: vetoed[choice.rule] or objection(choice, numbers, KEEP if choice == now else TAKE)
        for choice in choices(control)
        if weighted or choice.rule == "greedy"
    }
    fit = [choice for choice, reason in objections.items() if not reason]
    first: Rule = "greedy" if "retention" in numbers else "unbiased"
    rank = partial(_preference, first=first, numbers=numbers)
    best = max(fit, key=rank, default=None)
    if now is None:
        if numbers["records"] < ENOUGH:
            return None, "too few probes"
        return best, _praise(best, numbers) if best else _first_objection(objections, numbers)
    if now not in fit:
        return best, _praise(best, numbers) if best else objections.get(now, _UNWEIGHTED)
    better = max((choice for choice in fit if _is_better(choice, now, first, numbers)), key=rank, default=None)
    return (better, _praise(better, numbers)) if better else (now, "selection pays")


def _has_risen(state: State, numbers: Mapping[str, float]) -> bool:
    """Whether the loss of whole pools has surely risen since a greedy choice was made."""
    loss, error = state.before
    sure = SURE * math.hypot(numbers["loss_error"], error)
    return state.choice is not None and state.choice.rule == "greedy" and numbers["loss"] - loss > sure


def objection(choice: Choice, numbers: Mapping[str, float], bounds: Bounds) -> str:
    """Why a choice should not be made, in words; empty if it is fit."""
    pair, name = f"{choice.depth}.{choice.keep:g}", score_name(choice.depth)
    correlation, cost = numbers[f"correlation.{choice.depth}"], numbers[f"cost.{pair}"]
    more_loss, less_noise = (numbers[f"payoff_{by}.{pair}"] * cost for by in ("C2", "T7"))
    doubt = _doubt(choice.keep, numbers, bounds)
    needed = bounds.variance + (bounds.promise if doubt else 1.0) * (cost - 1)
    noisy = f"drawing by {name} makes steps {less_noise:.2f} times less noisy, at cost {cost:.2f} (T7)"
    if choice.rule == "unbiased":
        return "" if less_noise >= needed else noisy
    if correlation < bounds.correlation:
        ranks = "at random or backwards" if correlation < LEAST_CORRELATION else "poorly"
        return f"{name} ranks {ranks} (rank correlation {correlation:.2f})"
    if more_loss < bounds.payoff * cost:
        return f"selection does not pay (batches have {more_loss:.2f} times the pools' loss, at cost {cost:.2f})"
    if not doubt or choice.depth == MEMORY or numbers.get("retention", 0.0) > bounds.retention:
        return doubt
    if less_noise < needed:
        return noisy
    progress = numbers[f"progress.{pair}"]
    if progress < bounds.progress:
        return f"steps on the largest losses do not go along the mean gradient (progress {progress:.2f})"
    return ""


def _doubt(keep: float, numbers: Mapping[str, float], bounds: Bounds) -> str:
    """Why the largest losses may not be of what can be learnt, in words; empty where it is known that they are."""
    if (retention := numbers.get("retention")) is None:
        return "too few samples have come back to know what becomes of large losses"
    if retention > bounds.retention:
        return f"large losses shrink too little when trained on ({retention:.0%} is left; of noise nearly all)"
    if keep * numbers["concentration"] < bounds.room:
        return f"too many samples carry the loss (concentration {numbers['concentration']:.1f})"
    return ""


def _payoff(choice: Choice, numbers: Mapping[str, float]) -> float:
    by = "payoff_C2" if choice.rule == "greedy" else "payoff_T7"
    return numbers[f"{by}.{choice.depth}.{choice.keep:g}"]


def _preference(choice: Choice, first: Rule, numbers: Mapping[str, float]) -> tuple[bool, bool, float]:
    """Larger is better: the rule that goes first, of greedy choices what is for nothing, then what pays most."""
    return choice.rule == first, _is_for_nothing(choice), _payoff(choice, numbers)


def _is_better(choice: Choice, now: Choice, first: Rule, numbers: Mapping[str, float]) -> bool:
    """Whether to move to another fit choice."""
    if choice.rule != now.rule:
        return choice.rule == first
    would_cost = _is_for_nothing(now) and not _is_for_nothing(choice)
    return not would_cost and _payoff(choice, numbers) > MOVE * _payoff(now, numbers)


def _is_for_nothing(choice: Choice) -> bool:
    return choice.rule == "greedy" and choice.depth == MEMORY


def _praise(choice: Choice, numbers: Mapping[str, float]) -> str:
    cost = numbers[f"cost.{choice.depth}.{choice.keep:g}"]
    times = _payoff(choice, numbers) * cost
    if choice.rule == "unbiased":
        return (
            f"unbiased selection pays (drawing by {score_name(choice.depth)} makes steps {times:.2f} times less noisy, "
            f"at cost {cost:.2f})"
        )
    correlation = numbers[f"correlation.{choice.depth}"]
    return (
        f"selection pays (batches have {times:.2f} times the pools' loss, at cost {cost:.2f}, and "
        f"{score_name(choice.depth)} ranks with correlation {correlation:.2f})"
    )


def _first_objection(objections: Mapping[Choice, str], numbers: Mapping[str, float]) -> str:
    """The objection to the choice that would pay most."""
    first = max(objections, key=lambda choice: _payoff(choice, numbers), default=None)
    return _UNWEIGHTED if first is None else objections[first]


def next_probe(step: int, control: Control, prices: Mapping[str, float], pools_per_step: int = 1) -> int:
    """Step of the next probe, so that all probes together cost at most ``probe_share`` of the training.

    A probe is due when the training since the last one has earned it. Where the length of the training is known, its
    first tenth gets two fifths of the probes: what is found early pays longest.
    """
    interval = prices["probe"] / (pools_per_step * prices["train"]) / control.probe_share
    if control.total_steps is not None:
        early, late = EARLY_SHARE / EARLY_PROBES * interval, (1 - EARLY_SHARE) / (1 - EARLY_PROBES) * interval
        ahead = max(0.0, EARLY_SHARE * control.total_steps - step)  # early steps to come
        interval = early if ahead >= early else ahead + (1 - ahead / early) * late
    return step + max(1, math.ceil(interval))


def to_json(state: State) -> dict[str, Any]:
    """The state as plain data."""
    return {
        "choice": state.choice and list(state.choice),
        "records": list(state.records),
        "next_probe": state.next_probe,
        "before": list(state.before),
        "harmed": state.harmed,
        "by_heart": state.by_heart,
    }


def from_json(saved: Mapping[str, Any]) -> State:
    """The state that `to_json` saved."""
    choice, (loss, error) = saved["choice"], saved["before"]
    records, due = tuple(saved["records"]), int(saved["next_probe"])
    return State(choice and Choice(*choice), records, due, (loss, error), saved["harmed"], saved["by_heart"])


def state_problems(saved: Any, control: Control) -> list[str]:
    """What keeps `from_json` from making a state of this control from something that was saved."""
    if not isinstance(saved, Mapping):
        return [f"steering must be a mapping, got {reprlib.repr(saved)}"]
    choice, records, before = saved.get("choice", "nothing"), saved.get("records"), saved.get("before")
    names = set(record_names(control))
    rows = [
        (
            choice is None
            or (
                isinstance(choice, list | tuple)
                and [type(part) for part in choice] == [str, int, float]
                and Choice(*choice) in choices(control)
            ),
            f"steering.choice must be None or one of what may be chosen, got {reprlib.repr(choice)}",
        ),
        (
            isinstance(records, list | tuple)
            and len(records) <= WINDOW
            and all(
                isinstance(entry, Mapping) and entry.keys() == names and all(map(finite, entry.values()))
                for entry in records
            ),
            f"steering.records must be at most {WINDOW} records of this control, got {reprlib.repr(records)}",
        ),
        (
            whole(saved.get("next_probe"), 0),
            f"steering.next_probe must be a whole number of at least 0, got {reprlib.repr(saved.get('next_probe'))}",
        ),
        (
            isinstance(before, list | tuple) and len(before) == 2 and all(map(finite, before)),
            f"steering.before must be two finite numbers, got {reprlib.repr(before)}",
        ),
        *(
            (
                whole(saved.get(name), 0),
                f"steering.{name} must be a whole number of at least 0, got {reprlib.repr(saved.get(name))}",
            )
            for name in ("harmed", "by_heart")
        ),
    ]
    return [message for sound, message in rows if not sound]
