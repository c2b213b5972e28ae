"""Flattened pools: documents without padding in one row, told apart by `position_ids` that begin anew.

Collators of padding-free training make them. A document is a sample then: documents are set apart for scoring, a row
each, and those that are kept are joined to a shorter row.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from earlysift import pools
from earlysift.measures import IGNORED_LABEL

MASK, PLACES = "attention_mask", "position_ids"
_BOUNDARIES, _LONGEST, _NUMBERS = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k"), "seq_idx"
_LAYOUT = (*_BOUNDARIES, *_LONGEST, _NUMBERS)


def is_flattened(pool: Any) -> bool:
    """Whether a pool is one row of documents: `position_ids` ``(1, T)`` and more of that shape, no `attention_mask`.

    Example:
        >>> is_flattened({"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": torch.tensor([[0, 1, 0]])})
        True
    """
    places = pool.get(PLACES) if isinstance(pool, Mapping) and MASK not in pool else None
    if not isinstance(places, Tensor) or places.ndim != 2 or len(places) != 1:
        return False
    others = [value for key, value in pool.items() if key != PLACES and isinstance(value, Tensor)]
    return any(value.shape[:2] == places.shape for value in others)  # else rows of a pool share their positions


def size(pool: Any) -> int:
    """The number of candidates of a pool, flattened or not."""
    return len(_lengths(pool)) if is_flattened(pool) else pools.pool_size(pool)


def _lengths(pool: Mapping[str, Any]) -> list[int]:
    """Lengths of the documents, which end where positions do not go on; waits for an accelerator."""
    places = pool[PLACES][0]
    if places[-2:].tolist() == [0, 0]:
        raise ValueError(
            "Expected a flattened pool of documents alone, got one whose position_ids end in several zeros, as padding "
            "does. Collate without pad_to_multiple_of."
        )
    begins = (torch.diff(places) != 1).nonzero().flatten() + 1
    return torch.tensor([0, *begins.tolist(), len(places)]).diff().tolist()


def apart(pool: Mapping[str, Any], labels: tuple[str, ...] = (pools.LABELS_KEY,)) -> dict[str, Any]:
    """The documents of a flattened pool as padded rows, with an `attention_mask`; waits for an accelerator.

    Args:
        pool: A flattened pool of n documents, ``(1, T, ...)``, perhaps with something ``(n, ...)`` of each.
        labels: Keys that are padded with the label -100.

    Raises:
        ValueError: If a tensor belongs neither to the positions nor to the documents.

    Example:
        >>> apart({"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": torch.tensor([[0, 1, 0]])})["input_ids"]
        tensor([[5, 6],
                [7, 0]])
    """
    lengths, shape = _lengths(pool), pool[PLACES].shape
    rows: dict[str, Any] = {}
    for key in [key for key in pool if key not in _LAYOUT]:
        value = pool[key]
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            documents = list(torch.split(value[0], lengths))
            rows[key] = pad_sequence(documents, batch_first=True, padding_value=IGNORED_LABEL if key in labels else 0)
        elif not isinstance(value, Tensor) or value.ndim == 0 or len(value) == len(lengths):
            rows[key] = value
        else:
            raise ValueError(
                f"Expected tensors of the {shape[1]} positions or of the {len(lengths)} documents of a flattened "
                f"pool, got {key!r} {tuple(value.shape)}. Leave it out, or turn padding-free collation off."
            )
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return rows | {MASK: mask.long().to(pool[PLACES].device)}


def joined(rows: Mapping[str, Any], template: Mapping[str, Any]) -> Any:
    """Documents that were set `apart` as one row again, with boundaries and lengths as far as the template has them.

    Example:
        >>> pool = {"input_ids": torch.tensor([[5, 6, 7]]), "position_ids": torch.tensor([[0, 1, 0]])}
        >>> joined(pools.take(apart(pool), torch.tensor([0])), pool)["position_ids"]
        tensor([[0, 1]])
    """
    mask = rows[MASK].bool()
    lengths = mask.sum(dim=1)
    boundaries = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    numbers = torch.repeat_interleave(torch.arange(len(lengths), device=mask.device), lengths)[None]
    layout: dict[str, Any] = dict.fromkeys(_BOUNDARIES, boundaries) | {_NUMBERS: numbers}
    items: dict[str, Any] = {}
    for key, value in template.items():
        if key in layout:
            items[key] = layout[key].to(value)
        elif key in _LONGEST:
            longest = lengths.max()
            items[key] = longest.to(value) if isinstance(value, Tensor) else int(longest)
        elif key in rows:
            whole = isinstance(value, Tensor) and value.shape[:2] == template[PLACES].shape
            items[key] = rows[key][mask][None] if whole else rows[key]
    return pools.like(template, items)
