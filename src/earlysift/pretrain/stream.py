"""The order of candidates: an endless, seeded stream of masked blocks that any batch size reads alike."""

from functools import lru_cache

import torch
from torch import Generator, Tensor

from earlysift.pretrain.masking import mask_tokens
from earlysift.pretrain.tokens import Blocks
from earlysift.seeds import seeded

_UNIT = 16  # blocks masked together; a fixed number, so that masks do not depend on how many rows a step reads


class Stream:
    """Masked training blocks in an order that depends on the seed alone, epoch after epoch.

    Candidate number n has the same tokens and the same mask whoever reads it, in whatever portions: arms with different
    pool sizes see the same data in the same order, and a resumed run needs only a position.

    Args:
        blocks: Tokenised corpus.
        seed: Seed of order and masks.
    """

    def __init__(self, blocks: Blocks, *, seed: int) -> None:
        self._blocks = blocks
        self._seed = seed
        self._order = lru_cache(maxsize=2)(self._make_order)
        self._unit = lru_cache(maxsize=64)(self._make_unit)

    def read(self, start: int, count: int) -> dict[str, Tensor]:
        """Candidates ``start`` to ``start + count``: ``input_ids`` and ``labels``, int64 ``(count, length)``."""
        first, last = start // _UNIT, (start + count - 1) // _UNIT
        units = [self._unit(number) for number in range(first, last + 1)]
        offset = start - first * _UNIT
        return {name: torch.cat([u[name] for u in units])[offset : offset + count] for name in units[0]}

    def _make_order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self._blocks.train), generator=seeded(self._seed, "order", epoch))

    def _make_unit(self, number: int) -> dict[str, Tensor]:
        size = len(self._blocks.train)
        positions = range(number * _UNIT, (number + 1) * _UNIT)
        rows = torch.stack([self._order(p // size)[p % size] for p in positions])
        return mask(self._blocks, self._blocks.train[rows], seeded(self._seed, "mask", number))


def mask(blocks: Blocks, rows: Tensor, generator: Generator) -> dict[str, Tensor]:
    """Mask rows of token ids ``(R, T)`` with the special tokens of ``blocks``."""
    return mask_tokens(
        rows,
        mask_id=blocks.special["[MASK]"],
        vocab_size=blocks.vocab_size,
        first_ordinary_id=max(blocks.special.values()) + 1,
        generator=generator,
    )
