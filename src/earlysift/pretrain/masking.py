"""Masked language modelling: which tokens are hidden, reproducibly from a generator."""

import torch
from torch import Generator, Tensor

from earlysift.losses import IGNORED_LABEL


def mask_tokens(
    blocks: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    first_ordinary_id: int,
    generator: Generator,
    share: float = 0.15,
) -> dict[str, Tensor]:
    """Hide a fixed number of tokens in every block and make their ids the labels.

    Of the chosen positions 80 % become the mask token, 10 % a random token and 10 % stay. The number is the same in
    every block, so shapes and the noise of per-sample losses do not vary with the draw.

    Args:
        blocks: Token ids ``(R, T)``; ids below ``first_ordinary_id`` are special and never chosen.
        mask_id: Id of the mask token.
        vocab_size: Random tokens are drawn from ``first_ordinary_id`` to this, exclusive.
        first_ordinary_id: The smallest id that is not special.
        generator: The only source of randomness.
        share: Share of the T positions to choose.

    Returns:
        ``input_ids`` and ``labels``, int64 ``(R, T)``; labels are -100 where nothing is predicted.

    Example:
        >>> batch = mask_tokens(torch.full((2, 20), 9), mask_id=4, vocab_size=10, first_ordinary_id=5,
        ...                     generator=torch.Generator().manual_seed(0))
        >>> (batch["labels"] != -100).sum(dim=1)
        tensor([3, 3])

    Reference:
        Devlin et al., BERT, 2019, arXiv 1810.04805, section 3.1.
    """
    blocks = blocks.long()
    count = max(1, round(share * blocks.size(1)))
    priority = torch.rand(blocks.shape, generator=generator)
    priority[blocks < first_ordinary_id] = -1.0
    chosen = torch.zeros_like(blocks, dtype=torch.bool).scatter_(1, priority.topk(count, dim=1).indices, True)
    chosen &= blocks >= first_ordinary_id
    fate = torch.rand(blocks.shape, generator=generator)
    random_ids = torch.randint(first_ordinary_id, vocab_size, blocks.shape, generator=generator)
    inputs = torch.where(chosen & (fate < 0.8), mask_id, blocks)
    inputs = torch.where(chosen & (fate >= 0.9), random_ids, inputs)
    return {"input_ids": inputs, "labels": torch.where(chosen, blocks, IGNORED_LABEL)}
