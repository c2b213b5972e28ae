"""Step to intensity: the share of steps that select, between 0 (uniform training) and 1 (every step selects).

A schedule is any callable ``int -> float``; it has no state, so a resumed run needs none. At intensity x a step selects
with probability x, drawn from the step's own seed; a step that does not select keeps a uniform part of the pool and is
not scored, so it costs nothing extra. Steps are optimizer steps: pools that are accumulated into one select or do not
select together.
"""

from collections.abc import Callable
from dataclasses import dataclass

Schedule = Callable[[int], float]


# Objects and not closures, so that a sifter that holds one can be pickled.
@dataclass(frozen=True)
class _Constant:
    value: float

    def __call__(self, step: int) -> float:
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
    """Uniform training for the first ``steps`` steps, then another schedule (always select if None), by absolute step.

    Greedy selection from the first step can leave a model at chance: early scores carry no signal (THEORY, section 6).

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
    """Another schedule up to ``start`` (always select if None), falling linearly to uniform training at ``end``.

    Greedy selection has a floor above the minimum (T1): it must end before the floor binds.

    Args:
        start: First step of the fall.
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
