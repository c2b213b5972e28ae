"""Selection over all ranks: scores are gathered, chosen rows exchanged, so that every rank trains on b rows.

Letters in shapes: W ranks, R candidates of a rank, b kept per rank.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from earlysift import pools
from earlysift.losses import IGNORED_LABEL
from earlysift.selectors import Selection


class Gathered(NamedTuple):
    """The scores of all ranks, one rank after the other, and how many candidates each rank has."""

    scores: Tensor
    sizes: list[int]


def world() -> int:
    """Number of ranks; 1 without a process group."""
    return distributed.get_world_size() if _initialized() else 1


def rank() -> int:
    """Number of this rank; 0 without a process group."""
    return distributed.get_rank() if _initialized() else 0


def mean(numbers: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Mean over the ranks of numbers that all of them have, by name: the same on every rank.

    Args:
        numbers: The same names in the same order on every rank.
        device: Where the backend of the process group works.
    """
    if world() == 1:
        return dict(numbers)
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(values)
    return dict(zip(numbers, (values / world()).tolist(), strict=True))


def sharded(model: nn.Module) -> bool:
    """Whether ranks hold parts of the weights (FSDP2), so that a pass is something that all of them do together."""
    return world() > 1 and any(hasattr(module, "_get_fsdp_state") for module in model.modules())


def pad_together(pool: Any, token: int, device: torch.device) -> Any:
    """Pad to the longest pool of all ranks, on the side on which pools are padded already (right if none is).

    Args:
        pool: This rank's pool.
        token: The padding token.
        device: Where the backend of the process group works.

    Returns:
        The padded pool; as it came, if a rank's pool is no mapping with a two-dimensional ``attention_mask``.
    """
    mask = pool.get("attention_mask") if isinstance(pool, Mapping) else None
    seen = torch.zeros(3, dtype=torch.int64, device=device)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.size(1) > 0:
        left, right = ((mask[:, end] == 0).any().long().to(device) for end in (0, -1))
        seen = torch.stack([torch.tensor(mask.size(1), device=device), left, right])
    lengths, lefts, rights = _all(seen).reshape(-1, 3).T.tolist()
    if min(lengths) == 0:
        return pool
    fills = {pools.LABELS_KEY: IGNORED_LABEL, "input_ids": token}
    return pools.pad(pool, max(lengths), fills, left=any(lefts) and not any(rights))


def gather(scores: Tensor, pool: Any) -> Gathered:
    """Gather the scores of all ranks; their numbers of candidates may differ.

    Args:
        scores: ``(R,)``.
        pool: What was scored; its tensors must have the same shapes behind the first dimension on all ranks
            (`pad_together`).

    Returns:
        The same on every rank.

    Raises:
        ValueError: On every rank, if shapes or types differ between ranks, so that rows cannot change places.
    """
    head = torch.tensor([len(scores), _layout(pool)], device=scores.device)
    heads = _all(head).reshape(-1, 2).tolist()
    sizes = [size for size, _ in heads]
    if len({layout for _, layout in heads}) > 1:
        raise ValueError(
            "Expected pools of the same keys, dtypes and lengths on all ranks, got different ones, so that rows cannot "
            "change places. Pad to a fixed length (and leave out lists of plain objects), or use scope='local'."
        )
    most = max(sizes)
    parts = _all(F.pad(scores, (0, most - len(scores)))).reshape(-1, most)
    return Gathered(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sizes)


def assign_rows(holders: Tensor, kept: int, ranks: int) -> Tensor:
    """Assign every selected row to the rank that trains on it: a rank keeps its own, and gives away only its surplus.

    Args:
        holders: The rank that holds the candidate at every place of the selection, int64 ``(W b,)``.
        kept: b, the rows that every rank trains on.
        ranks: W.

    Returns:
        A rank for every place, ``(W b,)``, each b times; no more rows move than must.

    Example:
        >>> assign_rows(torch.tensor([0, 0, 0, 1]), kept=2, ranks=2)
        tensor([0, 0, 1, 1])
    """
    by_holder = holders.argsort(stable=True)
    held = torch.bincount(holders, minlength=ranks)
    before = (held.cumsum(0) - held).repeat_interleave(held)
    over = by_holder[torch.arange(len(holders)) - before >= kept]
    taken = holders.clone()
    taken[over] = torch.arange(ranks).repeat_interleave((kept - held).clamp(min=0))
    return taken


def exchange(pool: Any, selection: Selection, sizes: Sequence[int], kept: int) -> tuple[Any, Selection]:
    """Take this rank's b rows of a selection over all ranks, from other ranks where they hold them.

    Args:
        pool: This rank's pool of R candidates.
        selection: Over the candidates of all ranks, one rank after the other; W b of them, the same on every rank.
        sizes: R of every rank.
        kept: b.

    Returns:
        The batch, in the structure of the pool, and its selection; indices still count through all ranks.
    """
    me, chosen = rank(), selection.indices.cpu()
    ends = torch.tensor(sizes).cumsum(0)
    holders = torch.searchsorted(ends, chosen, right=True)
    taken = assign_rows(holders, kept, len(sizes))
    rows_of_holder = chosen - (ends - torch.tensor(sizes))[holders]
    held, mine = holders == me, taken == me
    own = rows_of_holder[held & mine]
    sent = {taker: rows_of_holder[held & (taken == taker)] for taker in torch.unique(taken[held & ~mine]).tolist()}
    from_whom, counts = torch.unique(holders[mine & ~held], return_counts=True)
    due = dict(zip(from_whom.tolist(), counts.tolist(), strict=True))

    def swap(rows: Tensor) -> Tensor:
        def picked(indices: Tensor) -> Tensor:
            return rows.index_select(0, indices.to(rows.device))

        come = {holder: rows.new_empty((count, *rows.shape[1:])) for holder, count in due.items()}
        messages = [
            *(distributed.P2POp(distributed.isend, _bytes(picked(indices)), taker) for taker, indices in sent.items()),
            *(distributed.P2POp(distributed.irecv, _bytes(buffer), holder) for holder, buffer in come.items()),
        ]
        for work in distributed.batch_isend_irecv(messages) if messages else []:
            work.wait()
        return torch.cat([picked(own), *come.values()])

    batch = pools.map_rows(pool, swap, sizes[me])
    places = mine.nonzero().squeeze(1)
    places = places[torch.where(held, -1, holders)[places].argsort(stable=True)]  # as `swap` puts them together
    places = places.to(selection.indices.device)
    return batch, Selection(selection.indices[places], selection.weights[places])


def _layout(pool: Any) -> int:
    """A number that is the same on ranks whose pools differ in their number of candidates only."""
    seen = []

    def see(rows: Any) -> Any:
        movable = isinstance(rows, Tensor) and not rows.is_nested
        seen.append(f"{rows.dtype} {tuple(rows.shape[1:])}" if movable else f"of rank {rank()} alone")
        return rows

    pools.map_rows(pool, see, pools.pool_size(pool))
    return zlib.crc32(repr(seen).encode())


def _all(values: Tensor) -> Tensor:
    everyone = values.new_empty((world() * len(values), *values.shape[1:]))
    distributed.all_gather_into_tensor(everyone, values.contiguous())
    return everyone


def _bytes(rows: Tensor) -> Tensor:
    # Not every backend sends every dtype.
    return rows.reshape(-1).view(torch.uint8)


def _initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
