"""Selection over all ranks: scores are gathered and selected rows exchanged, so that every rank trains on b rows.

Letters in shapes: W ranks, R candidates per rank, b kept rows per rank.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn

from earlysift import loss_memory, pools
from earlysift.loss_memory import LossMemory
from earlysift.losses import IGNORED_LABEL
from earlysift.selectors import Selection


class Gathered(NamedTuple):
    """The scores of all ranks in order of rank, and the number of candidates of each rank."""

    scores: Tensor
    sizes: list[int]


def world() -> int:
    """Number of ranks; 1 without a process group."""
    return distributed.get_world_size() if _initialized() else 1


def rank() -> int:
    """Number of this rank; 0 without a process group."""
    return distributed.get_rank() if _initialized() else 0


def mean(numbers: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """Means over the ranks, by name; every rank gets the same.

    Args:
        numbers: Numbers with the same names in the same order on every rank.
        device: Device of the process group's backend.
    """
    if world() == 1:
        return dict(numbers)
    values = torch.tensor(list(numbers.values()), dtype=torch.float64, device=device)
    distributed.all_reduce(values)
    return dict(zip(numbers, (values / world()).tolist(), strict=True))


def sharded(model: nn.Module) -> bool:
    """Whether the weights are sharded over ranks (FSDP2), so that all ranks must run every pass together."""
    return world() > 1 and any(hasattr(module, "_get_fsdp_state") for module in model.modules())


def largest(number: int, device: torch.device) -> int:
    """The largest of the numbers of all ranks; every rank gets the same.

    Args:
        number: A whole number of this rank.
        device: Device of the process group's backend.
    """
    return int(_all_gather(torch.tensor([number], device=device)).max())


def require_same_kept(kept: int, size: int, device: torch.device) -> None:
    """Refuse first pools of which ranks would keep different numbers, or of which one has too few.

    Args:
        kept: b, as this rank was told, or as its first pool gives it.
        size: Candidates in this rank's first pool.
        device: Device of the process group's backend.

    Raises:
        ValueError: On every rank, if b differs between ranks, or a first pool has fewer candidates.
    """
    if world() == 1:
        return
    everyone, sizes = _all_gather(torch.tensor([kept, size], device=device)).reshape(-1, 2).T.tolist()
    if len(set(everyone)) > 1:
        raise ValueError(
            f"Expected all ranks to keep the same number of candidates, got {', '.join(map(str, everyone))} of first "
            f"pools of {', '.join(map(str, sizes))}. Pass the same number to all, as kept=."
        )
    if min(sizes) < kept:
        raise ValueError(
            f"Expected at least {kept} candidates (the number kept) in the first pool of every rank, got "
            f"{', '.join(map(str, sizes))}. Use larger pools, or keep fewer."
        )


def pad_together(pool: Any, token: int, device: torch.device, labels: tuple[str, ...] = (pools.LABELS_KEY,)) -> Any:
    """Pad to the longest pool of all ranks, on the side on which pools are already padded (right if none is).

    Args:
        pool: This rank's pool.
        token: The padding token.
        device: Device of the process group's backend.
        labels: Keys of the labels, which are padded with -100.

    Returns:
        The padded pool; unchanged if the pool of any rank is no mapping with a two-dimensional ``attention_mask``.
    """
    mask = pools.mask_of(pool)
    layout = torch.zeros(3, dtype=torch.int64, device=device)
    if mask is not None and mask.size(1) > 0:
        left, right = ((mask[:, end] == 0).any().long().to(device) for end in (0, -1))
        layout = torch.stack([torch.tensor(mask.size(1), device=device), left, right])
    lengths, lefts, rights = _all_gather(layout).reshape(-1, 3).T.tolist()
    if min(lengths) == 0:
        return pool
    fills = {"input_ids": token, **dict.fromkeys(labels, IGNORED_LABEL)}
    return pools.pad(pool, max(lengths), fills, left=any(lefts) and not any(rights))


def gather(scores: Tensor, pool: Any) -> Gathered:
    """Gather the scores of all ranks; their numbers of candidates may differ.

    Args:
        scores: ``(R,)``.
        pool: The scored pool; after the first dimension its tensors must have the same shapes on all ranks
            (`pad_together`).

    Returns:
        The same on every rank.

    Raises:
        ValueError: On every rank, if shapes or dtypes differ between ranks, so that rows cannot be exchanged.
    """
    own = torch.tensor([len(scores), _layout(pool)], device=scores.device)
    sizes, layouts = _all_gather(own).reshape(-1, 2).T.tolist()
    if len(set(layouts)) > 1:
        raise ValueError(
            "Expected pools of the same keys, dtypes and lengths on all ranks, got different ones, so rows cannot be "
            "exchanged. Pad to a fixed length (and leave out lists of plain objects), or use scope='local'."
        )
    longest = max(sizes)
    parts = _all_gather(F.pad(scores, (0, longest - len(scores)))).reshape(-1, longest)
    return Gathered(torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sizes)


def assign_rows(holders: Tensor, kept: int, ranks: int) -> Tensor:
    """Assign every selected row to a rank: ranks keep their own rows, and surplus rows go to ranks with too few.

    Args:
        holders: The rank that holds each selected row, int64 ``(W b,)``.
        kept: b, the rows that every rank trains on.
        ranks: W.

    Returns:
        The rank that trains on each row, ``(W b,)``, every rank b times; as few rows as possible move.

    Example:
        >>> assign_rows(torch.tensor([0, 0, 0, 1]), kept=2, ranks=2)
        tensor([0, 0, 1, 1])
    """
    by_holder = holders.argsort(stable=True)
    held = torch.bincount(holders, minlength=ranks)
    starts = (held.cumsum(0) - held).repeat_interleave(held)
    surplus = by_holder[torch.arange(len(holders)) - starts >= kept]
    assigned = holders.clone()
    assigned[surplus] = torch.arange(ranks).repeat_interleave((kept - held).clamp(min=0))
    return assigned


def exchange(pool: Any, selection: Selection, sizes: Sequence[int], kept: int) -> tuple[Any, Selection]:
    """Collect this rank's b rows of a selection over all ranks, receiving those that other ranks hold.

    Args:
        pool: This rank's pool of R candidates.
        selection: Over the candidates of all ranks in order of rank; W b of them, the same on every rank.
        sizes: R of each rank.
        kept: b.

    Returns:
        The batch, in the structure of the pool, and its selection; indices still refer to the candidates of all ranks.
    """
    me, chosen = rank(), selection.indices.cpu()
    ends = torch.tensor(sizes).cumsum(0)
    holders = torch.searchsorted(ends, chosen, right=True)
    assigned = assign_rows(holders, kept, len(sizes))
    rows_of_holder = chosen - (ends - torch.tensor(sizes))[holders]
    held, mine = holders == me, assigned == me
    own = rows_of_holder[held & mine]
    receivers = torch.unique(assigned[held & ~mine]).tolist()
    sent = {receiver: rows_of_holder[held & (assigned == receiver)] for receiver in receivers}
    senders, counts = torch.unique(holders[mine & ~held], return_counts=True)

    def swap(rows: Tensor) -> Tensor:
        def picked(indices: Tensor) -> Tensor:
            return rows.index_select(0, indices.to(rows.device))

        received = {
            sender: rows.new_empty((count, *rows.shape[1:]))
            for sender, count in zip(senders.tolist(), counts.tolist(), strict=True)
        }
        messages = [
            *(
                distributed.P2POp(distributed.isend, _bytes(picked(indices)), receiver)
                for receiver, indices in sent.items()
            ),
            *(distributed.P2POp(distributed.irecv, _bytes(buffer), sender) for sender, buffer in received.items()),
        ]
        for work in distributed.batch_isend_irecv(messages) if messages else []:
            work.wait()
        return torch.cat([picked(own), *received.values()])

    batch = pools.map_rows(pool, swap, sizes[me])
    order = mine.nonzero().squeeze(1)
    order = order[torch.where(held, -1, holders)[order].argsort(stable=True)]  # the order in which `swap` concatenates
    order = order.to(selection.indices.device)
    return batch, Selection(selection.indices[order], selection.weights[order])


def memory(samples: int | None = None) -> LossMemory:
    """A memory of which every rank keeps a part.

    Args:
        samples: Number of samples, where ids are their indices; None is unknown.
    """
    return LossMemory(samples, rank=rank(), ranks=world())


def recall(memory: LossMemory, ids: Tensor, device: torch.device) -> Tensor:
    """What `LossMemory.recall` would return of a memory that saw what all ranks observed.

    With a shared memory all ranks must call it together.

    Args:
        memory: This rank's part.
        ids: Of this rank's candidates, int64 ``(R,)``; R may differ between ranks.
        device: Device of the process group's backend.

    Returns:
        float32 ``(R,)``, on the device of the ids.
    """
    if memory.ranks == 1:
        return memory.recall(ids)
    (losses, _), own = _look(memory, ids, 0, device)
    memory.note_candidates(losses)
    return loss_memory.unseen_first(losses[own]).to(ids.device)


def look(memory: LossMemory, ids: Tensor, step: int, device: torch.device) -> Tensor:
    """What `LossMemory.look` would return of a memory that saw what all ranks observed; arguments as in `recall`."""
    if memory.ranks == 1:
        return memory.look(ids, step)
    found, own = _look(memory, ids, step, device)
    return found[:, own]


def _look(memory: LossMemory, ids: Tensor, step: int, device: torch.device) -> tuple[Tensor, slice]:
    """What is known of all ranks' samples, ``(2, all)``, and where this rank's are among them."""
    everyone, sizes = _together(ids[:, None].to(device))
    found = memory.look(everyone[:, 0], step).to(device)
    distributed.all_reduce(found)  # one rank knows each, all others add 0
    start = sum(sizes[: memory.rank])
    return found.cpu(), slice(start, start + sizes[memory.rank])


def observe(memory: LossMemory, ids: Tensor, losses: Tensor, step: int, device: torch.device) -> None:
    """Remember the losses of all ranks' samples, each at its place: see `LossMemory.observe`.

    With a shared memory all ranks must call it together.

    Args:
        memory: This rank's part.
        ids: Of the samples that this rank trained on, int64 ``(b,)``; b may differ between ranks.
        losses: Their mean losses, ``(b,)``.
        step: The optimizer step.
        device: Device of the process group's backend.

    Raises:
        ValueError: If there is not one loss per sample.
    """
    losses = loss_memory.require_one_each(losses, len(ids))
    if memory.ranks > 1:
        # Ids have 28 bits and losses are float32: float64 holds both exactly, for one exchange instead of two.
        pairs = torch.stack([part.detach().to(device, torch.float64) for part in (ids, losses.float())], dim=1)
        ids, losses = _together(pairs)[0].unbind(dim=1)
    memory.observe(ids.long(), losses, step)


def _together(rows: Tensor) -> tuple[Tensor, list[int]]:
    """The rows ``(R, ...)`` of all ranks in order of rank, and how many each has."""
    sizes = _all_gather(torch.tensor([len(rows)], device=rows.device)).tolist()
    padded = rows.new_zeros((max(sizes), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = torch.split(_all_gather(padded), max(sizes))
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)]), sizes


def _layout(pool: Any) -> int:
    """A hash that is equal on ranks whose pools differ only in their number of candidates."""
    layouts = []

    def describe(rows: Any) -> Any:
        movable = isinstance(rows, Tensor) and not rows.is_nested
        layouts.append(f"{rows.dtype} {tuple(rows.shape[1:])}" if movable else f"of rank {rank()} alone")
        return rows

    pools.map_rows(pool, describe, pools.pool_size(pool))
    return zlib.crc32(repr(layouts).encode())


def _all_gather(values: Tensor) -> Tensor:
    gathered = values.new_empty((world(), *values.shape))
    distributed.all_gather(list(gathered.unbind()), values.contiguous())
    return gathered.flatten(0, 1)


def _bytes(rows: Tensor) -> Tensor:
    # Some backends cannot send every dtype.
    return rows.reshape(-1).view(torch.uint8)


def _initialized() -> bool:
    return distributed.is_available() and distributed.is_initialized()
