"""What auto mode may choose from, and what it may spend on finding out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from earlysift.options import finite, option, problems, several, whole
from earlysift.recent import MEMORY

Rule = Literal["greedy", "unbiased"]


@dataclass(frozen=True)
class Control:
    """What `Sifter(mode="auto")` may choose from, and what it may spend on finding out.

    Attributes:
        depths: Exits to choose from.
        memory: Whether remembered losses are chosen from as well; a `Sifter` sets it where samples have ids.
        keeps: Values of keep to choose from, none below the sifter's own; a larger keep scores a smaller part of the
            pool, so that the batch stays the same.
        rules: Rules to choose from.
        total_steps: Optimizer steps of the training, if known: greedy selection ends at ``end_share`` of them, as it
            has a floor.
        end_share: Share of the training after which greedy selection ends, at once and not at the next probe.
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


def scored_depths(control: Control) -> tuple[int, ...]:
    """The exits that may be chosen, behind depth 0 if remembered losses may be."""
    return (MEMORY, *control.depths) if control.memory else control.depths


def choices(control: Control) -> list[Choice]:
    """Everything that may be chosen besides uniform training."""
    depths = scored_depths(control)
    return [Choice(rule, depth, keep) for rule in control.rules for depth in depths for keep in control.keeps]


def score_name(depth: int) -> str:
    """What a choice scores by, in words.

    Example:
        >>> score_name(0), score_name(2)
        ('memory', 'depth 2')
    """
    return "memory" if depth == MEMORY else f"depth {depth}"
