"""Streams of generated samples that train in seconds: where selection pays, where it cannot, where it does harm.

A case draws training samples, one pool after the other, and held-out ones from the same distribution. Inputs are
Gaussian, labels come from a teacher, and each case spoils or enriches that in its own way.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

INPUTS, CLASSES = 32, 10
Samples = tuple[Tensor, Tensor]
"""Inputs float32 ``(n, INPUTS)`` and labels int64 ``(n,)``."""
Draw = Callable[[int, Generator], Samples]


@dataclass(frozen=True)
class Stream:
    """What a case hands out.

    Attributes:
        draw: New samples of the distribution; held-out ones come from it, too.
        stored: Samples that a finite data set has, seen in epochs; None where every sample is new.
        spoil: What is done to the labels of training samples alone.
        convex: Whether a linear model is trained on it, whose layers do nothing: every exit is exact.
    """

    draw: Draw
    stored: int | None = None
    spoil: Callable[[Tensor, Generator], Tensor] | None = None
    convex: bool = False


def linear(generator: Generator) -> Draw:
    """Labels by the largest of ten linear functions."""
    matrix = torch.randn(INPUTS, CLASSES, generator=generator)

    def draw(count: int, generator: Generator) -> Samples:
        inputs = torch.randn(count, INPUTS, generator=generator)
        return inputs, (inputs @ matrix).argmax(dim=1)

    return draw


def curved(generator: Generator, scale: float = 1.0) -> Draw:
    """Labels by a random network with one hidden layer of 64."""
    first, last = (torch.randn(*shape, generator=generator) for shape in ((INPUTS, 64), (64, CLASSES)))

    def draw(count: int, generator: Generator) -> Samples:
        inputs = torch.randn(count, INPUTS, generator=generator)
        return inputs, ((scale * inputs @ first / INPUTS**0.5).sin() @ last).argmax(dim=1)

    return draw


def mixed(common: Draw, rare: Draw, share: float) -> Draw:
    """A share of the samples from one distribution, the rest from another."""

    def draw(count: int, generator: Generator) -> Samples:
        is_rare = torch.rand(count, generator=generator) < share
        (x, y), (rare_x, rare_y) = common(count, generator), rare(count, generator)
        return torch.where(is_rare[:, None], rare_x, x), torch.where(is_rare, rare_y, y)

    return draw


def few(draw: Draw, count: int, generator: Generator) -> Draw:
    """Copies of a few samples."""
    inputs, labels = draw(count, generator)

    def again(count: int, generator: Generator) -> Samples:
        chosen = torch.randint(len(labels), (count,), generator=generator)
        return inputs[chosen], labels[chosen]

    return again


def random_labels(count: int, generator: Generator) -> Samples:
    """Labels without any rule."""
    return torch.randn(count, INPUTS, generator=generator), torch.randint(CLASSES, (count,), generator=generator)


def flipped(share: float) -> Callable[[Tensor, Generator], Tensor]:
    """A share of the labels drawn anew."""

    def spoil(labels: Tensor, generator: Generator) -> Tensor:
        wrong = torch.rand(len(labels), generator=generator) < share
        return torch.where(wrong, torch.randint(CLASSES, labels.shape, generator=generator), labels)

    return spoil


def imbalanced(draw: Draw, thinning: float = 1.0) -> Draw:
    """Class k is kept with probability ``1 / (1 + thinning k)``."""

    def thinned(count: int, generator: Generator) -> Samples:
        inputs, labels = draw(round(8 * thinning) * count, generator)
        kept = torch.rand(len(labels), generator=generator) < 1 / (1 + thinning * labels)
        return inputs[kept][:count], labels[kept][:count]

    return thinned


def blurred(draw: Draw, noise: float) -> Draw:
    """Inputs with noise that the label does not know of."""

    def noisy(count: int, generator: Generator) -> Samples:
        inputs, labels = draw(count, generator)
        return inputs + noise * torch.randn(inputs.shape, generator=generator), labels

    return noisy


def _copies(generator: Generator) -> Stream:
    return Stream(mixed(few(linear(generator), 64, generator), linear(generator), 0.1))


def _memorise(generator: Generator) -> Stream:
    return Stream(mixed(linear(generator), few(random_labels, 512, generator), 0.1))


TUNED: dict[str, Callable[[Generator], Stream]] = {
    "convex": lambda g: Stream(linear(g), convex=True),
    "copies": _copies,
    "memorise": _memorise,
    "linear": lambda g: Stream(linear(g)),
    "flipped": lambda g: Stream(linear(g), spoil=flipped(0.2)),
    "random teacher": lambda g: Stream(curved(g, 2.0)),
}
"""The rule of auto mode was made while looking at these."""

CONFIRMED: dict[str, Callable[[Generator], Stream]] = {
    "epochs": lambda g: Stream(linear(g), stored=4000),
    "epochs, flipped": lambda g: Stream(linear(g), stored=4000, spoil=flipped(0.2)),
    "epochs, curved": lambda g: Stream(curved(g, 0.5), stored=4000),
    "imbalanced": lambda g: Stream(imbalanced(linear(g))),
    "easy and curved": lambda g: Stream(mixed(linear(g), curved(g, 0.5), 0.2)),
    "blurred": lambda g: Stream(blurred(linear(g), 0.5)),
    "boilerplate": lambda g: Stream(mixed(few(curved(g, 0.5), 200, g), curved(g, 0.5), 0.3)),
}
"""It was tried on these afterwards."""
