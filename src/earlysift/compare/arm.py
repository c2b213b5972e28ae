"""What an arm is made of: its steps, and the operations that they are charged for.

No module that describes arms imports torch before a step is made, so that settings and ``--help`` know the arms fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from earlysift.compare.bench import Bench
    from earlysift.compare.settings import Settings

Step = Callable[[float], None]
"""Takes one step, given the share of the budget that is spent."""


@dataclass(frozen=True)
class Operation:
    """Work that has a price.

    Attributes:
        name: Its name in results.json; at an exit, the exit's depth is appended.
        kind: What its time adds to: ``"read"``, ``"train"``, ``"score"``, ``"probe"``, ``"lesson"`` or ``"reference
            model"``.
        prepare: Gets it ready on a bench; calling what it returns does the work once. At an exit it also takes
            ``depth``.
        at_exit: Whether its price depends on the exit.
        keep: Share of its pool that is kept; None is the comparison's.
    """

    name: str
    kind: str
    prepare: Callable[..., Callable[[], object]]
    at_exit: bool = False
    keep: float | None = None

    def at(self, depth: int) -> Operation:
        """The operation at an exit; itself, if its price depends on no exit.

        Example:
            >>> TRAIN.at(2).name, Operation("score", "score", lambda bench, depth: print, at_exit=True).at(2).name
            ('train', 'score_2')
        """
        if not self.at_exit:
            return self
        return replace(self, name=f"{self.name}_{depth}", prepare=partial(self.prepare, depth=depth), at_exit=False)

    def pool(self, settings: Settings) -> int:
        """Candidates in the pool that its price is for."""
        return round(settings.batch / (self.keep or settings.keep))


READ_BATCH = Operation("read_batch", "read", lambda bench: lambda: bench.read(bench.settings.batch))
READ_POOL = Operation("read_pool", "read", lambda bench: lambda: bench.read(bench.settings.pool))


def _training(bench: Bench) -> Callable[[], object]:
    batch = bench.read(bench.settings.batch)
    return lambda: bench.update(bench.loss(batch))


TRAIN = Operation("train", "train", _training)


def uniform_ms(prices_ms: Mapping[str, float]) -> float:
    """Reference time of a step of uniform training.

    Example:
        >>> uniform_ms({"read_batch": 1.0, "train": 100.0, "score_1": 8.0})
        101.0
    """
    return prices_ms[READ_BATCH.name] + prices_ms[TRAIN.name]


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        label: Name in plots and tables.
        description: One line for the report; says where it departs from its paper.
        steps: Gets it ready on a bench, and returns the function that takes a step.
        source: Author, year, arXiv number; None for what has no paper.
        training: What a training step is charged as.
        scoring: What scoring a pool is charged as; None if nothing is scored.
        probing: What a probe is charged as; None if nothing is probed.
        teaching: What a lesson for the probes at exits is charged as; None if there are none.
        looking: What a look at what training has shown is charged as; None if there are none.
        depths: Exits that it uses; without any the comparison's depth.
        charged: False only for an upper bound: then a step is charged like a uniform one, whatever it did.
        idle: Why all of its steps may have been those of uniform training, in words.
        tasks: Tasks that it can be run on; empty for all.
    """

    label: str
    description: str
    steps: Callable[[Bench], Step]
    source: str | None = None
    training: Operation = TRAIN
    scoring: Operation | None = None
    probing: Operation | None = None
    teaching: Operation | None = None
    looking: Operation | None = None
    depths: tuple[int, ...] = ()
    charged: bool = True
    idle: str = ""
    tasks: tuple[str, ...] = ()

    def operations(self, settings: Settings) -> list[Operation]:
        """All that its steps may be charged for, beyond what every arm is."""
        exits = usable_exits(self.depths, settings)
        operations = [self.training.at(depth) for depth in exits]
        if self.scoring:
            operations += [READ_POOL, *(self.scoring.at(depth) for depth in exits)]
        return operations + [operation for operation in (self.probing, self.teaching, self.looking) if operation]


def usable_exits(depths: Iterable[int], settings: Settings) -> tuple[int, ...]:
    """Those of the depths that the model has an exit at; without any depths the comparison's."""
    return tuple(depth for depth in depths or (settings.depth,) if depth < settings.layers)
