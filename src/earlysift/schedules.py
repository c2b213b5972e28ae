"""Schedules: from the step to the intensity of selection, between 0 (uniform training) and 1 (every step selects).

A schedule is any callable ``int -> float``. It has no state, so nothing has to be saved to resume a run. At intensity x
a step selects with probability x, drawn from the seed of the step; a step that does not select keeps a uniform subset
of the pool without scoring it, at no extra cost. Steps are optimizer steps: all pools accumulated into one step select,
or none does.
"""

from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


# Objects instead of closures, so that a sifter with a schedule can be pickled.
@dataclass(frozen=True)
class _Constant:
    value: float

    def __call__(self, _step: int) -> float:
        return self.value


@dataclass(frozen=True)
class _Warmup:
    steps: int
    then: Schedule

    def __call__(self, step: int) -> float:
        return 0.0 if step < self.steps else self.then(step)


@dataclass(frozen=True)
class _Anneal:
    start: int
    end: int
    before: Schedule

    def __call__(self, step: int) -> float:
        return self.before(step) * min(1.0, max(0.0, (self.end - step) / (self.end - self.start)))


def constant(value: float = 1.0) -> Schedule:
    """The same intensity at every step.

    Raises:
        ValueError: If the value is nan or infinite.

    Example:
        >>> constant(1.0)(10)
        1.0
    """
    _require_numbers(value=value)
    return _Constant(value)


def warmup(steps: int, then: Schedule | None = None) -> Schedule:
    """Uniform training for the first ``steps`` steps, then another schedule of the absolute step (None: always select).

    Greedy selection from the first step can leave a model at chance, because early scores carry no signal.

    Args:
        steps: Number of uniform steps.
        then: Schedule for the steps after them.

    Example:
        >>> [warmup(2)(step) for step in range(4)]
        [0.0, 0.0, 1.0, 1.0]
    """
    _require_numbers(steps=steps)
    return _Warmup(steps, then or constant())


def anneal(start: int, end: int, before: Schedule | None = None) -> Schedule:
    """Another schedule (None: always select) until ``start``, then a linear fall to uniform training at ``end``.

    Greedy selection stalls at a loss above the minimum (theorem T1), so selection must end before it gets there.

    Args:
        start: Step at which the fall begins.
        end: First step of uniform training.
        before: Schedule whose intensity is scaled down.

    Raises:
        ValueError: If ``end`` is not after ``start``, or one of them is nan or infinite.

    Example:
        >>> [anneal(2, 4)(step) for step in range(6)]
        [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]
    """
    _require_numbers(start=start, end=end)
    if end <= start:
        raise ValueError(f"Annealing must end after it starts, got start = {start} and end = {end}.")
    return _Anneal(start, end, before or constant())


def _require_numbers(**values: float) -> None:
    bad = [f"{name} must be a finite number, got {value!r}." for name, value in values.items() if value - value != 0]
    if bad:
        raise ValueError(" ".join(bad))
