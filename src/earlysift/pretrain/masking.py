"""Masked language modelling: hide tokens, reproducibly from a generator."""

from collections.abc import Mapping

import torch
from torch import Generator, Tensor

from earlysift.losses import IGNORED_LABEL

_WHITE_SPACE = ("Ġ", "Ċ", "č", "ĉ")  # blank, line feed, carriage return, tab, as byte-level BPE writes them


def mask_tokens(
    blocks: Tensor,
    *,
    mask_id: int,
    vocab_size: int,
    first_ordinary_id: int,
    generator: Generator,
    share: float = 0.15,
    word_begins: Tensor | None = None,
) -> dict[str, Tensor]:
    """Hide a fixed number of tokens in every block and make their ids the labels.

    Of the chosen positions 80 % become the mask token, 10 % a random token and 10 % stay. Every block has the same
    number of labels, so that shapes and the noise of per-sample losses do not vary with the draw. With whole words that
    number is an upper bound: a word that would exceed it is skipped, and the next one is tried.

    Args:
        blocks: Token ids ``(R, T)``; ids outside ``first_ordinary_id`` to ``vocab_size`` are special and never chosen.
        mask_id: Id of the mask token.
        vocab_size: Random tokens are drawn from ``first_ordinary_id`` to this, exclusive.
        first_ordinary_id: The smallest id that is not special.
        generator: The only source of randomness.
        share: Share of the T positions to choose.
        word_begins: For whole words: whether the token of every id begins a word, bool ``(ids,)``, from `begins_word`.
            Without it tokens are chosen one by one.

    Returns:
        ``input_ids`` and ``labels``, int64 ``(R, T)``; labels are -100 where nothing is predicted.

    Example:
        >>> batch = mask_tokens(torch.full((2, 20), 9), mask_id=4, vocab_size=10, first_ordinary_id=5,
        ...                     generator=torch.Generator().manual_seed(0))
        >>> (batch["labels"] != -100).sum(dim=1)
        tensor([3, 3])

    Reference:
        Devlin et al., BERT, 2019, arXiv 1810.04805, section 3.1; whole words: github.com/google-research/bert, 2019.
    """
    blocks = blocks.long()
    count = max(1, round(share * blocks.size(1)))
    ordinary = (blocks >= first_ordinary_id) & (blocks < vocab_size)
    priority = torch.rand(blocks.shape, generator=generator)
    priority[~ordinary] = -1.0
    if word_begins is None:
        chosen = torch.zeros_like(ordinary).scatter_(1, priority.topk(count, dim=1).indices, True)
    else:
        chosen = _whole_words(_first_of_words(blocks, ordinary, word_begins), ordinary, priority, count)
    chosen &= ordinary
    fate = torch.rand(blocks.shape, generator=generator)
    random_ids = torch.randint(first_ordinary_id, vocab_size, blocks.shape, generator=generator)
    inputs = torch.where(chosen & (fate < 0.8), mask_id, blocks)
    inputs = torch.where(chosen & (fate >= 0.9), random_ids, inputs)
    return {"input_ids": inputs, "labels": torch.where(chosen, blocks, IGNORED_LABEL)}


def begins_word(vocabulary: Mapping[str, int]) -> Tensor:
    """Which tokens begin a word, from the way the tokenizer writes them.

    Args:
        vocabulary: Tokens and their ids: WordPiece, where pieces inside a word begin with ``##``, or byte-level BPE,
            where a token at the start of a word begins with white space, written as Ġ (blank), Ċ, č (line end) or ĉ
            (tab).

    Returns:
        Bool ``(largest id + 1,)``.

    Raises:
        ValueError: If the vocabulary is neither.

    Example:
        >>> begins_word({"play": 0, "##ing": 1})
        tensor([ True, False])
    """
    inside = torch.tensor([token.startswith("##") for token in vocabulary])
    before = torch.tensor([token.startswith(_WHITE_SPACE) for token in vocabulary])
    if not (inside | before).any():
        raise ValueError(
            "Whole words cannot be found in this tokenizer's vocabulary: expected WordPiece ('##' inside words) or "
            "byte-level BPE ('Ġ' before words), found neither. Use another tokenizer, or leave whole_word out."
        )
    begins = torch.zeros(1 + max(vocabulary.values()), dtype=torch.bool)
    # The more frequent mark decides: GPT-2 has a token "##", and Ġ is a letter of Maltese.
    begins[list(vocabulary.values())] = before if before.sum() > inside.sum() else ~inside
    return begins


def _first_of_words(blocks: Tensor, ordinary: Tensor, word_begins: Tensor) -> Tensor:
    """The first token of every word; a special token is a word of its own."""
    first = word_begins[blocks] | ~ordinary
    first[:, 1:] |= ~ordinary[:, :-1]
    first[:, 0] = True
    return first


def _whole_words(first: Tensor, ordinary: Tensor, priority: Tensor, count: int) -> Tensor:
    """Choose words by the priority of their first token, each if the chosen tokens stay at most ``count``."""
    words = first.cumsum(dim=1) - 1
    sizes = torch.zeros_like(words).scatter_add_(1, words, ordinary.long())
    order = torch.zeros_like(priority).scatter_add_(1, words, priority * first)
    chosen = torch.zeros_like(first)
    left = torch.full((len(words), 1), count)
    for word in order.argsort(dim=1, descending=True, stable=True).unsqueeze(2).unbind(dim=1):
        size = sizes.gather(1, word)
        fits = size <= left
        chosen.scatter_(1, word, fits)
        left -= size * fits
        if not left.any():
            break
    return chosen.gather(1, words)
