"""What the records of probes promise of every choice: gain, cost, progress and payoff; pure functions of numbers."""

import math
from collections.abc import Mapping, Sequence
from statistics import median

from earlysift import costs
from earlysift.control import Control, scored_depths
from earlysift.recent import MEMORY

LATEST = 3  # records that medians are taken of, as training goes on; sums need all


def estimates(
    records: Sequence[Mapping[str, float]], control: Control, prices: Mapping[str, float], pool_keep: float
) -> dict[str, float]:
    r"""What the records say, in their medians, for the ledger and for `earlysift.controller.decide`.

    For greedy selection ``payoff_C2 = rho_r / c`` and ``progress = (signal / sqrt(length2)) / (uniform's)``: how much
    farther a step of the same length goes along the mean gradient than a uniform one's. Loss-based gain (rho) takes for
    granted that samples with a larger loss lead downhill (T1's convexity), and near a plateau, on noise, or with many
    classes, they do not.

    For unbiased selection ``payoff_T7 = 1 / (V c)``, V the length2 of its steps over uniform's: the second moment of
    the gradients themselves, and not what losses would let one expect of it. Noise has large losses, too.

    Args:
        records: Of the latest probes, at least one.
        control: What may be chosen.
        prices: ``train`` and ``score_{depth}`` (scoring the whole pool), in one unit.
        pool_keep: b / R.

    Returns:
        For each depth ``correlation``, for each depth and keep ``gain``, ``cost``, ``progress``, ``payoff_C2`` and
        ``payoff_T7``; ``concentration``, ``floor``, ``loss`` and ``loss_error``;
        ``signal`` (squared length of the mean gradient over the mean squared length) and ``noise_scale`` (in samples,
        McCandlish et al. 2018, arXiv 1812.06162); ``records``, their number.
    """
    fresh, latest = records[-LATEST:], records[-1]
    middle = {name: median(entry[name] for entry in fresh) for name in latest}
    numbers = {name: value for name, value in middle.items() if name.startswith(("correlation.", "gain.", "floor"))}
    numbers |= {name: latest[name] for name in ("loss", "loss_error")} | {"concentration": middle["concentration"]}
    numbers["records"] = len(records)
    numbers["signal"] = signal = middle["uniform.signal"]
    numbers["noise_scale"] = (1 - signal) / signal if signal > 0 else math.inf
    for depth in scored_depths(control):
        for keep in control.keeps:
            cost, pair = cost_of(depth, keep, prices, pool_keep), f"{depth}.{keep:g}"
            moment = median(_ratio(entry[f"unbiased.{pair}.length2"], entry["uniform.length2"]) for entry in fresh)
            numbers[f"cost.{pair}"] = cost
            numbers[f"payoff_C2.{pair}"] = costs.payoff(middle[f"gain.{pair}"], cost)
            numbers[f"payoff_T7.{pair}"] = costs.unbiased_payoff(moment, cost)
            numbers[f"progress.{pair}"] = _progress(records, pair)
    return numbers


def known(
    free: Mapping[str, float], control: Control, prices: Mapping[str, float], pool_keep: float
) -> dict[str, float]:
    """What is known for nothing, in the names of `estimates`, which it replaces: it is fresher, and of more samples."""
    numbers = dict(free)
    for keep in control.keeps:
        if (times := free.get(f"gain.{MEMORY}.{keep:g}")) is not None:
            cost = cost_of(MEMORY, keep, prices, pool_keep)
            numbers[f"payoff_C2.{MEMORY}.{keep:g}"] = costs.payoff(times, cost)
    return numbers


def cost_of(depth: int, keep: float, prices: Mapping[str, float], pool_keep: float) -> float:
    """c: what a step that selects costs, relative to a uniform one. Prices are of scoring whole pools.

    What has no price, as remembering may, is free.
    """
    return 1 + prices.get(f"score_{depth}", 0.0) / prices["train"] * pool_keep / keep


def _ratio(length2: float, uniform: float) -> float:
    """The former over the latter; inf where steps of either have no length, so that nothing is promised."""
    return length2 / uniform if length2 > 0 and uniform > 0 else math.inf


def _progress(records: Sequence[Mapping[str, float]], pair: str) -> float:
    """Ratio of sums: a single probe's ratio has a denominator near zero where gradients are noisy."""

    def along(name: str) -> float:
        return sum(entry[f"{name}.signal"] / math.sqrt(max(entry[f"{name}.length2"], 1e-12)) for entry in records)

    uniform = along("uniform")
    # Where uniform's own signal drowns in noise, nothing can be called better.
    return along(f"greedy.{pair}") / uniform if uniform > 0 else 0.0
