"""The payoff controller: from what was measured, whether to select, by which score and rule, from how large a pool.

Pure functions of records and costs: the same records give the same choice, on every rank and after every resume. A
choice of None is uniform training, where every run begins and where it returns to when selection does not pay.

Two sources feed it. Probes compare scores with exact losses and gradients on a whole pool, and are rare because they
cost. The losses of trained samples (`earlysift.recent.Recent`) are free and always fresh, in loops that hand them over.
"""

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from earlysift import costs, selectors
from earlysift.fidelity import fidelity
from earlysift.options import finite, option, problems, several, whole
from earlysift.probes import Probe
from earlysift.recent import MEMORY

Rule = Literal["greedy", "unbiased"]
Record = dict[str, float]
"""Numbers of one probe, by name; medians over records are what choices are made from."""

WINDOW = 6  # records that a choice looks back on
ENOUGH = 2  # records before the first choice
SURE = 3.0  # standard errors
LEAST_CORRELATION = 0.1  # a score that ranks worse than this ranks at random
EARLY_SHARE, EARLY_PROBES = 0.1, 0.4  # this part of the training gets this part of the probes
FREE_EVERY = 25  # steps between looks at what is free
MOVE = 1.1  # a better choice must pay so many times as much as the present one
_UNWEIGHTED = "the loop reads no weights, which the unbiased rule needs"
_NEAR_END = "the training nears its end, and greedy selection has a floor"


class Bounds(NamedTuple):
    """What the numbers of a choice must be for it to be taken, or to be kept.

    Attributes:
        correlation: Least rank correlation of its score with exact losses.
        payoff: Least payoff of a greedy choice, by T7 (few samples carry the loss) and by C2 (the batch holds them).
        unbiased: Least payoff of an unbiased choice, by T7.
        progress: Least progress along the mean gradient, relative to uniform training's.
        retention: Most that is left of a large loss when its sample comes back: of noise, nearly all.
    """

    correlation: float
    payoff: float
    unbiased: float
    progress: float
    retention: float


TAKE = Bounds(correlation=0.3, payoff=1.2, unbiased=1.3, progress=0.75, retention=0.85)
KEEP = Bounds(correlation=LEAST_CORRELATION, payoff=1.0, unbiased=1.1, progress=0.75, retention=0.92)
"""The gap between both is a hysteresis."""


@dataclass(frozen=True)
class Control:
    """What `Sifter(mode="auto")` may choose from, and what it may spend on finding out.

    Attributes:
        depths: Exits to choose from.
        memory: Whether remembered losses are chosen from as well; a `Sifter` sets it where samples have ids.
        keeps: Values of keep to choose from, none below the sifter's own; a larger keep scores a smaller part of the
            pool, so that the batch stays the same.
        rules: Rules to choose from.
        total_steps: Optimizer steps of the training, if known: selection ends at ``end_share`` of them, as greedy has a
            floor.
        end_share: Share of the training after which selection ends, at once and not at the next probe.
        probe_share: Most that probes may cost, as a share of the time of training.
        reference_costs: Times in any one unit that make choices reproducible, instead of measured ones: ``train``
            (training on b samples), ``probe``, and ``score_1``, ``score_2``, ... (the whole pool, by depth).
    """

    depths: tuple[int, ...] = option(
        (1, 2, 3),
        lambda depths: several(depths, lambda d: whole(d, 1)),
        "positive",
        "They are whole numbers of layers.",
    )
    memory: bool = option(False, lambda value: isinstance(value, bool), "True or False")
    keeps: tuple[float, ...] = option(
        (0.5, 0.67), lambda keeps: several(keeps, lambda k: finite(k) and 0 < k < 1), "in (0, 1)"
    )
    rules: tuple[Rule, ...] = option(
        ("greedy", "unbiased"),
        lambda rules: several(rules, lambda rule: isinstance(rule, str) and rule in get_args(Rule)),
        "of greedy and unbiased",
    )
    total_steps: int | None = option(
        None, lambda steps: steps is None or whole(steps, 1), "a whole number of at least 1 or None"
    )
    end_share: float = option(0.85, lambda share: finite(share) and 0 < share <= 1, "in (0, 1]")
    probe_share: float = option(
        0.01, lambda share: finite(share) and 0 < share < 1, "in (0, 1)", "The usual value is 0.01."
    )
    reference_costs: Mapping[str, float] | None = option(
        None,
        lambda costs: (
            costs is None
            or (
                isinstance(costs, Mapping)
                and all(finite(cost) and cost >= 0 for cost in costs.values())
                and costs.get("train", 1) > 0
            )
        ),
        "finite times, none negative and train above 0",
    )

    def __post_init__(self) -> None:
        if wrong := problems(self):
            raise ValueError("\n".join(wrong.values()))


class Choice(NamedTuple):
    """How a step selects: the rule, the depth of the exit (0: by remembered losses), and keep."""

    rule: Rule
    depth: int
    keep: float

    def __str__(self) -> str:
        return f"{self.rule}, {score_name(self.depth)}, keep {self.keep:g}"


@dataclass(frozen=True)
class State:
    """All that the controller remembers, JSON-like.

    Attributes:
        choice: What steps do now; None is uniform.
        records: The latest records; after a choice failed, the one that showed it and those since.
        next_probe: Step of the next probe.
        before: Mean loss of whole pools when the choice was made, and its standard error.
    """

    choice: Choice | None = None
    records: tuple[Record, ...] = ()
    next_probe: int = 0
    before: tuple[float, float] = (0.0, 0.0)


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
    choice, reason = decide(state, numbers, control, step, weighted)
    return Verdict(_switched(state, choice, numbers), numbers, reason)


def end(state: State, control: Control, step: int) -> Verdict:
    """End selection if the training is near its own end, whether or not a probe is due."""
    ended = state.choice is not None and _near_end(control, step)
    return Verdict(_switched(state, None, {}) if ended else state, {}, _NEAR_END)


def _switched(state: State, choice: Choice | None, numbers: Mapping[str, float]) -> State:
    if choice == state.choice:
        return state
    # What spoke for a choice that failed must not bring it back at once; else records stay, as probes are rare.
    records = state.records if choice else state.records[-1:]
    before = (numbers["loss"], numbers["loss_error"]) if numbers else state.before
    return replace(state, choice=choice, records=records, before=before)


def _near_end(control: Control, step: int) -> bool:
    return control.total_steps is not None and step >= control.end_share * control.total_steps


def scored_depths(control: Control) -> tuple[int, ...]:
    """The exits that may be chosen, behind depth 0 if remembered losses may be."""
    return (MEMORY, *control.depths) if control.memory else control.depths


def choices(control: Control) -> list[Choice]:
    """Everything that may be chosen besides uniform training."""
    depths = scored_depths(control)
    return [Choice(rule, depth, keep) for rule in control.rules for depth in depths for keep in control.keeps]


def record(probe: Probe, kept: int, control: Control) -> Record:
    r"""The numbers of one probe.

    For a rule with weights w over the candidates (sum 1) and gradients g: ``signal = sum_i w_i <g_i, mean of the other
    candidates' g>``, the part of the step that goes along the mean gradient, and ``length2 = |sum_i w_i g_i|^2``; both
    relative to the mean ``|g_i|^2``. Uniform batches have them in closed form, and so has the unbiased rule, whose mean
    is uniform's.

    Args:
        probe: What the probe measured.
        kept: b.
        control: What may be chosen.

    Returns:
        ``uniform.signal``, ``uniform.length2``; for each choice ``{choice}.signal`` and ``.length2``, for each depth
        ``correlation.{depth}``, for each depth and keep ``gain...`` and ``second_moment...``; ``floor``, the largest
        loss over the mean one (an upper estimate of M* / F in T1); ``concentration``, the mean square of the exact
        losses over their squared mean; and ``loss``, the pool's mean exact loss, with its standard error
        ``loss_error``. All are nan if fewer than two candidates have a finite loss, or none has a
        gradient.
    """
    finite = torch.isfinite(probe.exact)
    for scores in probe.scores.values():
        finite &= torch.isfinite(scores)
    exact, gram = probe.exact[finite], probe.gram[finite][:, finite]
    total = len(exact)
    if total < 2 or not float(gram.diagonal().sum()) > 0:
        return dict.fromkeys(record_names(control), math.nan)
    gram = gram / gram.diagonal().mean()
    squares = gram.diagonal()
    others = (gram.sum(dim=1) - squares) / (total - 1)
    signal = others.mean().item()
    numbers = {
        "uniform.signal": signal,
        "uniform.length2": signal * (1 - 1 / kept) + 1 / kept,
        "floor": (exact.max() / exact.mean()).item(),
        "concentration": 1 / costs.second_moment_ratio(exact.clamp(min=0)),
        "loss": exact.mean().item(),
        "loss_error": exact.std().item() / math.sqrt(total),
    }
    for depth, all_scores in probe.scores.items():
        scores = all_scores[finite]
        for keep in control.keeps:
            rows = min(total, round(kept / keep))
            ranking = fidelity(scores[:rows], exact[:rows], kept)
            numbers[f"gain.{depth}.{keep:g}"] = ranking["gain"]
            numbers[f"second_moment.{depth}.{keep:g}"] = costs.second_moment_ratio(scores[:rows].clamp(min=0))
            for rule in control.rules:
                name = _name(Choice(rule, depth, keep))
                numbers[f"{name}.signal"], numbers[f"{name}.length2"] = _signal_and_length2(
                    rule, scores[:rows], min(kept, rows), gram[:rows, :rows], others[:rows], signal
                )
        numbers[f"correlation.{depth}"] = fidelity(scores, exact, kept)["rank_correlation"]
    return numbers


def record_names(control: Control) -> list[str]:
    """The names of a record's numbers: the same on every rank, whatever its pool."""
    depths = scored_depths(control)
    pairs = [f"{depth}.{keep:g}" for depth in depths for keep in control.keeps]
    return [
        "uniform.signal",
        "uniform.length2",
        "floor",
        "concentration",
        "loss",
        "loss_error",
        *(f"correlation.{depth}" for depth in depths),
        *(f"{name}.{pair}" for name in ("gain", "second_moment") for pair in pairs),
        *(f"{_name(choice)}.{part}" for choice in choices(control) for part in ("signal", "length2")),
    ]


def _signal_and_length2(
    rule: Rule, scores: Tensor, kept: int, gram: Tensor, others: Tensor, signal: float
) -> tuple[float, float]:
    if rule == "greedy":
        best = selectors.greedy(scores, kept).indices
        return others[best].mean().item(), gram[best][:, best].mean().item()
    included = selectors.inclusion_probabilities(scores.clamp(min=0), kept)
    noise = (gram.diagonal() / included).sum().item() / len(scores) ** 2
    return signal, signal * (1 - 1 / kept) + noise


def estimates(
    records: Sequence[Record], control: Control, prices: Mapping[str, float], pool_keep: float
) -> dict[str, float]:
    r"""What the records say, in their medians, for the ledger and for `decide`.

    ``progress = (signal / sqrt(length2)) / (uniform's)``: how much farther a step of the same length goes along the
    mean gradient than a uniform one's. Loss-based gain (rho) takes for granted that samples with a larger loss lead
    downhill (T1's convexity), and near a plateau, or with many classes, they do not. Progress tells such workloads
    apart; it cannot order rules, so that ``payoff_C2 = rho_r / c`` and ``payoff_T7 = 1 / (V c)`` do that.

    Args:
        records: Of the latest probes, at least one.
        control: What may be chosen.
        prices: ``train`` and ``score_{depth}`` (scoring the whole pool), in one unit.
        pool_keep: b / R.

    Returns:
        For each choice ``progress.{choice}``, for each depth ``correlation``, for each depth and keep ``gain``,
        ``cost``, ``payoff_C2`` and ``payoff_T7``; ``concentration``, ``floor``, ``loss`` and ``loss_error``;
        ``signal`` (squared length of the mean gradient over the mean squared length) and ``noise_scale`` (in samples,
        McCandlish et al. 2018, arXiv 1812.06162); ``records``, their number.
    """
    middle = {name: median(entry[name] for entry in records) for name in records[0]}
    latest = records[-1]
    numbers = {name: value for name, value in middle.items() if name.startswith(("correlation.", "gain.", "floor"))}
    numbers |= {name: latest[name] for name in ("loss", "loss_error")} | {"concentration": middle["concentration"]}
    numbers["records"] = len(records)
    numbers["signal"] = signal = middle["uniform.signal"]
    numbers["noise_scale"] = (1 - signal) / signal if signal > 0 else math.inf
    for depth in scored_depths(control):
        for keep in control.keeps:
            cost = cost_of(depth, keep, prices, pool_keep)
            numbers[f"cost.{depth}.{keep:g}"] = cost
            numbers[f"payoff_C2.{depth}.{keep:g}"] = costs.payoff(middle[f"gain.{depth}.{keep:g}"], cost)
            numbers[f"payoff_T7.{depth}.{keep:g}"] = costs.unbiased_payoff(
                middle[f"second_moment.{depth}.{keep:g}"], cost
            )
    for choice in choices(control):
        numbers[f"progress.{_name(choice)}"] = _progress(records, choice)
    return numbers


def known(
    free: Mapping[str, float], control: Control, prices: Mapping[str, float], pool_keep: float
) -> dict[str, float]:
    """What is known for nothing, in the names of `estimates`, which it replaces: it is fresher, and of more samples."""
    numbers = dict(free)
    for keep in control.keeps:
        if (gain := free.get(f"gain.{MEMORY}.{keep:g}")) is not None:
            cost = cost_of(MEMORY, keep, prices, pool_keep)
            numbers[f"payoff_C2.{MEMORY}.{keep:g}"] = costs.payoff(gain, cost)
            numbers[f"payoff_T7.{MEMORY}.{keep:g}"] = costs.unbiased_payoff(1 / free["concentration"], cost)
    return numbers


def cost_of(depth: int, keep: float, prices: Mapping[str, float], pool_keep: float) -> float:
    """c: what a step that selects costs, relative to a uniform one. Prices are of scoring whole pools.

    What has no price, as remembering may, is free.
    """
    return 1 + prices.get(f"score_{depth}", 0.0) / prices["train"] * pool_keep / keep


def decide(
    state: State, numbers: Mapping[str, float], control: Control, step: int, weighted: bool = True
) -> tuple[Choice | None, str]:
    """The choice from this step on, and why.

    A choice is taken if its score ranks, if few samples carry the loss of pools (T7) and the batch holds them (C2), if
    steps on them go along the mean gradient, and if large losses shrink when their samples are trained on, as noise's
    do not: by `TAKE`. It is kept by the milder `KEEP`, until the loss of whole pools has risen since (greedy selection
    forgets what it does not train on), or the training nears its end. Among choices the one that pays most by C2 is
    taken; the unbiased rule only where no greedy one is fit, by T7. While on, it moves to a clearly better one.

    Args:
        state: The choice now, and how it began.
        numbers: What `estimates` and `known` returned.
        control: What may be chosen.
        step: The present step.
        weighted: Whether the loop weighs samples; the unbiased rule is never chosen in one that does not.

    Returns:
        The choice, and the reason in words.
    """
    if _near_end(control, step):
        return None, _NEAR_END
    now = state.choice
    if now is not None and now.depth != MEMORY:  # a breakdown of ranking shows in the latest probe, not in the median
        latest = state.records[-1][f"correlation.{now.depth}"]
        numbers = {**numbers, f"correlation.{now.depth}": min(latest, numbers[f"correlation.{now.depth}"])}
    objections = {
        choice: objection(choice, numbers, KEEP if choice == now else TAKE)
        for choice in choices(control)
        if weighted or choice.rule == "greedy"
    }
    fit = [choice for choice, reason in objections.items() if not reason]
    greedy = [choice for choice in fit if choice.rule == "greedy"]
    best = max(greedy or fit, key=lambda choice: _payoff(choice, numbers), default=None)
    if now is None:
        if numbers["records"] < ENOUGH:
            return None, "too few probes"
        return best, _praise(best, numbers) if best else _first_objection(objections, numbers)
    loss, error = state.before
    risen = numbers["loss"] - loss
    if risen > SURE * math.hypot(numbers["loss_error"], error):
        return None, f"the loss of whole pools has risen by {risen:.2g} since: what is not trained on is forgotten"
    if best is not None and (now not in fit or _payoff(best, numbers) > MOVE * _payoff(now, numbers)):
        return best, _praise(best, numbers)
    return (now, "selection pays") if now in fit else (None, objections.get(now, _UNWEIGHTED))


def objection(choice: Choice, numbers: Mapping[str, float], bounds: Bounds) -> str:
    """Why a choice should not be made, in words; empty if it is fit."""
    pair, name = f"{choice.depth}.{choice.keep:g}", score_name(choice.depth)
    correlation, cost = numbers[f"correlation.{choice.depth}"], numbers[f"cost.{pair}"]
    if correlation < bounds.correlation:
        ranks = "at random or backwards" if correlation < LEAST_CORRELATION else "poorly"
        return f"{name} ranks {ranks} (rank correlation {correlation:.2f})"
    if choice.rule == "unbiased":
        payoff = numbers[f"payoff_T7.{pair}"]
        pays = payoff >= bounds.unbiased
        return "" if pays else f"unbiased selection would not pay (T7: {payoff:.2f} at cost {cost:.2f})"
    payoff, by_variance = numbers[f"payoff_C2.{pair}"], numbers[f"payoff_T7.{pair}"]
    if payoff < bounds.payoff:
        return f"selection does not pay (batches have {payoff * cost:.2f} times the pools' loss, at cost {cost:.2f})"
    if by_variance < bounds.payoff:
        return f"the loss is spread over too many samples (T7: {by_variance:.2f} at cost {cost:.2f})"
    progress, retention = numbers[f"progress.{_name(choice)}"], numbers.get("retention", 0.0)
    if progress < bounds.progress:
        return f"steps on the largest losses do not go along the mean gradient (progress {progress:.2f})"
    if retention > bounds.retention:
        return f"large losses stay when trained on, as noise does ({retention:.0%} is left)"
    return ""


def score_name(depth: int) -> str:
    """What a choice scores by, in words.

    Example:
        >>> score_name(0), score_name(2)
        ('memory', 'depth 2')
    """
    return "memory" if depth == MEMORY else f"depth {depth}"


def _payoff(choice: Choice, numbers: Mapping[str, float]) -> float:
    by = "payoff_C2" if choice.rule == "greedy" else "payoff_T7"
    return numbers[f"{by}.{choice.depth}.{choice.keep:g}"]


def _praise(choice: Choice, numbers: Mapping[str, float]) -> str:
    cost = numbers[f"cost.{choice.depth}.{choice.keep:g}"]
    if choice.rule == "unbiased":
        return f"unbiased selection pays (T7: {_payoff(choice, numbers):.2f} at cost {cost:.2f})"
    times = _payoff(choice, numbers) * cost
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
    }


def from_json(saved: Mapping[str, Any]) -> State:
    """The state that `to_json` saved."""
    choice, (loss, error) = saved["choice"], saved["before"]
    return State(choice and Choice(*choice), tuple(saved["records"]), int(saved["next_probe"]), (loss, error))


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
    ]
    return [message for sound, message in rows if not sound]


def _name(choice: Choice) -> str:
    return f"{choice.rule}.{choice.depth}.{choice.keep:g}"


def _progress(records: Sequence[Record], choice: Choice) -> float:
    """Ratio of sums: a single probe's ratio has a denominator near zero where gradients are noisy."""

    def along(name: str) -> float:
        return sum(entry[f"{name}.signal"] / math.sqrt(max(entry[f"{name}.length2"], 1e-12)) for entry in records)

    uniform = along("uniform")
    # Where uniform's own signal drowns in noise, nothing can be called better.
    return along(_name(choice)) / uniform if uniform > 0 else 0.0
