"""Pools: batches of R candidates in any structure that training loops use, and rows taken out of them.

A pool is a tensor, a mapping (dict, BatchEncoding), a tuple or list, or a nesting of these. Every tensor in it has the
candidates in its first dimension; strings, numbers, None and zero-dimensional tensors are passed through; a list of
plain objects (texts, ids) of length R is indexed like a tensor. torch nested tensors are indexed by component.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

LABELS_KEY = "labels"
LARGEST_ID = 2**28 - 1
"""A memory of so many samples takes 2 GiB; larger ids are taken for a mistake."""
LARGEST_GROUP = 999
"""Every row of the ledger names the groups of its pool; larger numbers are taken for a mistake."""
_PACKED_KEYS = ("cu_seq_lens_q", "cu_seqlens", "cu_seqlens_q", "seq_idx")


def pool_size(pool: Any) -> int:
    """The number of candidates R.

    Raises:
        ValueError: If the pool holds no tensor, its tensors disagree on the first dimension, or it is one packed row.

    Example:
        >>> import torch
        >>> pool_size({"input_ids": torch.zeros(8, 4), "labels": torch.zeros(8)})
        8
    """
    sizes = {path: tensor.size(0) for path, tensor in _tensors(pool) if tensor.ndim > 0}
    if not sizes:
        raise ValueError(
            f"Expected tensors with the candidates in the first dimension, got {type(pool).__name__} without any. "
            "Collate the samples into tensors before sifting."
        )
    packed = isinstance(pool, Mapping) and (
        any(key in pool for key in _PACKED_KEYS)
        or (set(sizes.values()) == {1} and "position_ids" in pool and "attention_mask" not in pool)
    )
    if packed:
        raise ValueError(
            "The pool is one packed (padding-free) row, so its samples cannot be told apart by row. "
            "Turn padding-free collation or packing off, pad to a fixed length, or give `Sifter.sift` position_ids "
            "(1, T) and no attention_mask: it sets the documents apart."
        )
    if len(set(sizes.values())) > 1:
        listing = ", ".join(f"{path}: {size}" for path, size in sizes.items())
        raise ValueError(
            f"Expected all tensors of the pool to have the same first dimension (candidates), got {listing}. "
            "Give the model what is shared between samples by other means than the pool."
        )
    return next(iter(sizes.values()))


@dataclass(frozen=True)
class Pool:
    """A pool whose structure was checked once, by `checked`: its data, and how many candidates it has.

    Attributes:
        data: What the loader gave, without the samples' ids and groups.
        size: R.
        ids: Ids of the samples, int64 ``(R,)``, on the CPU; None where none were asked for.
        groups: Numbers of their groups, likewise.
    """

    data: Any
    size: int
    ids: Tensor | None = None
    groups: Tensor | None = None

    def take(self, indices: Tensor | slice) -> "Pool":
        """The rows ``indices`` of every tensor, in the same structure."""
        count = len(range(self.size)[indices]) if isinstance(indices, slice) else len(indices)
        ids, groups = (None if each is None else _take_rows(each, indices) for each in (self.ids, self.groups))
        return Pool(map_rows(self.data, lambda rows: _take_rows(rows, indices), self.size), count, ids, groups)


def checked(pool: Any, id_key: str | None = None, samples: int | None = None, group_key: str | None = None) -> Pool:
    """Check a pool's structure; a `Pool` has been checked and comes back as it is.

    Args:
        pool: A pool of R candidates.
        id_key: Key of the samples' ids, which are taken out of the data: models do not know it. Several candidates may
            have one id.
        samples: Number of samples, where ids are their indices; None is unknown.
        group_key: Key of the numbers of the samples' groups, which are taken out, too.

    Raises:
        ValueError: As `pool_size`, and if there is no id, or no group, for every candidate under its key.

    Example:
        >>> import torch
        >>> checked({"input_ids": torch.zeros(8, 4)}).take(slice(0, 3)).size
        3
    """
    if isinstance(pool, Pool):
        return pool
    size = pool_size(pool)
    keys = {key for key in (id_key, group_key) if key is not None}
    if not keys:
        return Pool(pool, size)
    ids, groups = (pool.get(key) if isinstance(pool, Mapping) else None for key in (id_key, group_key))
    if id_key is not None:
        ids = require_ids(ids, size, samples, f"under {id_key!r} in the pool")
    if group_key is not None:
        groups = require_groups(groups, size, f"under {group_key!r} in the pool")
    return Pool(like(pool, {key: value for key, value in pool.items() if key not in keys}), size, ids, groups)


def require_ids(ids: object, size: int, samples: int | None, place: str) -> Tensor:
    """The ids on the CPU; refuses what cannot tell samples apart.

    Args:
        ids: What is to be int64 ``(size,)``.
        size: Number of samples.
        samples: Number of samples of the data set, where ids are their indices; None is unknown.
        place: Where the ids are from, for the message.
    """
    largest = LARGEST_ID if samples is None else min(LARGEST_ID, samples - 1)
    return _require_numbers(ids, "ids", size, largest, place, "samples")


def require_groups(groups: object, size: int, place: str) -> Tensor:
    """The groups' numbers on the CPU; refuses what tells no groups apart, as `require_ids` does of ids."""
    return _require_numbers(groups, "groups", size, LARGEST_GROUP, place, "groups")


def _require_numbers(numbers: object, name: str, size: int, largest: int, place: str, counted: str) -> Tensor:
    if not isinstance(numbers, Tensor) or numbers.dtype != torch.int64 or numbers.shape != (size,):
        received = f"{numbers.dtype} {tuple(numbers.shape)}" if isinstance(numbers, Tensor) else type(numbers).__name__
        raise ValueError(
            f"Expected the samples' {name}, int64 ({size},), {place}, got {received}. Number the "
            f"{counted} of the data set (0, 1, ...) and have the loader hand out the numbers."
        )
    numbers = numbers.cpu()
    if size and not 0 <= int(numbers.min()) <= int(numbers.max()) <= largest:
        raise ValueError(
            f"Expected {name} in 0..{largest}, got {int(numbers.min())} to {int(numbers.max())}. Number the {counted} "
            "0, 1, ..., and alike in every epoch."
        )
    return numbers


def take(pool: Any, indices: Tensor | slice) -> Any:
    """The rows ``indices`` of every tensor, in the same structure; checks the pool.

    Args:
        pool: A pool of R candidates.
        indices: int64 ``(b,)``, or a slice.

    Returns:
        The same structure with ``(b, ...)`` tensors.

    Example:
        >>> import torch
        >>> take({"x": torch.arange(4), "text": ["a", "b", "c", "d"]}, torch.tensor([1, 3]))
        {'x': tensor([1, 3]), 'text': ['b', 'd']}
    """
    return checked(pool).take(indices).data


def mask_of(batch: Any) -> Tensor | None:
    """The ``attention_mask`` ``(R, T)`` of a pool, batch or inputs; None without a two-dimensional one.

    Example:
        >>> import torch
        >>> mask_of({"attention_mask": torch.ones(2, 3)}).shape, mask_of(torch.ones(2, 3))
        (torch.Size([2, 3]), None)
    """
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None


def inputs_and_labels(pool: Any, keys: tuple[str, ...] = (LABELS_KEY,)) -> tuple[Any, Tensor]:
    """Split a pool into what the model is called with and the labels.

    Args:
        pool: A mapping, or a pair ``(inputs, labels)``.
        keys: Keys of the labels in a mapping.

    Returns:
        The inputs, and the labels ``(R, ...)``; those of several keys, each ``(R,)``, side by side.

    Raises:
        ValueError: If there are no labels, or a single one for all candidates.

    Example:
        >>> import torch
        >>> inputs, labels = inputs_and_labels((torch.zeros(2, 3), torch.tensor([0, 1])))
        >>> labels
        tensor([0, 1])
    """
    if has_labels(pool, keys):
        if isinstance(pool, Mapping):
            inputs, found = {key: value for key, value in pool.items() if key not in keys}, [pool[key] for key in keys]
        else:
            inputs, found = pool[0], [pool[1]]
        if any(labels.ndim == 0 for labels in found):
            raise ValueError("Expected labels with one row per candidate, got a single number.")
        return inputs, found[0] if len(found) == 1 else torch.cat([each.reshape(len(each), 1) for each in found], dim=1)
    received = f"keys {sorted(map(str, pool))}" if isinstance(pool, Mapping) else type(pool).__name__
    names = " and ".join(map(repr, keys))
    raise ValueError(
        f"Expected a mapping with {names} or a pair (inputs, labels), got {received}. Add {names} to the batch, or "
        "name the key that has them: family=Family(labels='...'). Without labels pass a scorer of your own: "
        "score=lambda model, pool: ..."
    )


def with_labels(inputs: Mapping[str, Any], labels: Tensor, keys: tuple[str, ...]) -> dict[str, Any]:
    """The mapping that `inputs_and_labels` splits.

    Example:
        >>> import torch
        >>> with_labels({}, torch.tensor([[0, 1]]), ("start_positions", "end_positions"))
        {'start_positions': tensor([0]), 'end_positions': tensor([1])}
    """
    return {**inputs, **dict(zip(keys, labels.unbind(1) if len(keys) > 1 else [labels], strict=True))}


def has_labels(pool: Any, keys: tuple[str, ...] = (LABELS_KEY,)) -> bool:
    """Whether `inputs_and_labels` can split the pool.

    Example:
        >>> import torch
        >>> has_labels({"input_ids": torch.zeros(8, 4)})
        False
    """
    if isinstance(pool, Mapping):
        return all(isinstance(pool.get(key), Tensor) for key in keys)
    return isinstance(pool, tuple | list) and len(pool) == 2 and isinstance(pool[1], Tensor)


def length(inputs: Any) -> int:
    """Positions per sample: the second dimension of the first tensor that has one, else 1.

    Example:
        >>> import torch
        >>> length({"input_ids": torch.zeros(8, 4)})
        4
    """
    return next((tensor.size(1) for _, tensor in _tensors(inputs) if tensor.ndim > 1), 1)


def by_length(pool: Any) -> Tensor | None:
    """The candidates in the order of their length by ``attention_mask``, ``(R,)``; None for a pool without one.

    Example:
        >>> import torch
        >>> by_length({"attention_mask": torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]])})
        tensor([1, 2, 0])
    """
    mask = mask_of(pool)
    return None if mask is None else mask.sum(dim=1).argsort(stable=True)


def trim_padding(batch: Any) -> Any:
    """Cut the positions that ``attention_mask`` marks as padding in every row, at the end or the start.

    After selection the longest row may be gone; then what is left of the padding is dead weight. Tensors whose second
    dimension equals the mask's are cut; everything else stays. A batch without a mask comes back as it is.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
        >>> trim_padding({"input_ids": torch.ones(2, 4).long(), "attention_mask": mask})["input_ids"].shape
        torch.Size([2, 2])
    """
    mask = mask_of(batch)
    if mask is None:
        return batch
    used = mask.any(dim=0).nonzero()
    if len(used) == 0:
        return batch
    start, stop = int(used[0]), int(used[-1]) + 1

    def cut(rows: Any) -> Any:
        return rows[:, start:stop].contiguous() if _has_positions(rows, mask) else rows  # models call view on labels

    return map_rows(batch, cut, mask.size(0))


def pad(batch: Any, length: int, fills: Mapping[str, int], *, left: bool = False) -> Any:
    """Lengthen the tensors whose second dimension is that of ``attention_mask``, as a collator pads.

    Args:
        batch: A mapping with a two-dimensional ``attention_mask``.
        length: Positions that rows are to have, no fewer than now.
        fills: Padding values by key; 0 for keys that are missing.
        left: Whether padding goes in front of the samples.

    Example:
        >>> import torch
        >>> rows = {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 2).long()}
        >>> pad(rows, 3, {"input_ids": 9})
        {'input_ids': tensor([[1, 1, 9]]), 'attention_mask': tensor([[1, 1, 0]])}
    """
    mask = batch["attention_mask"]
    size, now = mask.shape
    if now == length:
        return batch

    def lengthened(rows: Any, fill: int) -> Any:
        if not _has_positions(rows, mask):
            return rows
        padding = rows.new_full((size, length - now, *rows.shape[2:]), fill)
        return torch.cat([padding, rows] if left else [rows, padding], dim=1)

    items = {key: map_rows(value, partial(lengthened, fill=fills.get(key, 0)), size) for key, value in batch.items()}
    return like(batch, items)


def _has_positions(rows: Any, mask: Tensor) -> bool:
    # Real numbers in two dimensions are multi-label targets, whose classes may happen to be as many as positions.
    targets = isinstance(rows, Tensor) and rows.ndim == 2 and rows.is_floating_point() and rows is not mask
    return isinstance(rows, Tensor) and rows.ndim > 1 and rows.size(1) == mask.size(1) and not targets


def _tensors(pool: Any, path: str = "pool") -> Iterator[tuple[str, Tensor]]:
    if isinstance(pool, Tensor):
        yield path, pool
    elif isinstance(pool, Mapping):
        for key, value in pool.items():
            yield from _tensors(value, f"{path}[{key!r}]")
    elif isinstance(pool, tuple | list):
        for position, value in enumerate(pool):
            yield from _tensors(value, f"{path}[{position}]")


def map_rows(pool: Any, function: Callable[[Any], Any], size: int) -> Any:
    """The same structure with a function applied to everything that has a row per candidate.

    Args:
        pool: A pool of R candidates.
        function: Takes a tensor ``(R, ...)``, or a list or tuple of R plain objects.
        size: R.
    """
    if isinstance(pool, Tensor):
        return pool if pool.ndim == 0 else function(pool)
    if isinstance(pool, Mapping):
        return like(pool, {key: map_rows(value, function, size) for key, value in pool.items()})
    if isinstance(pool, tuple | list):
        if len(pool) == size and not hasattr(pool, "_fields") and not any(True for _ in _tensors(pool)):
            return function(pool)  # a column of plain objects, one a candidate
        items_in_order = [map_rows(value, function, size) for value in pool]
        return type(pool)(*items_in_order) if hasattr(pool, "_fields") else type(pool)(items_in_order)
    return pool


def like(pool: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """Items in a mapping of the type of another one."""
    if isinstance(pool, defaultdict):
        return defaultdict(pool.default_factory, items)
    return items if type(pool) is dict else type(pool)(items)  # type: ignore[call-arg]


def _take_rows(rows: Any, indices: Tensor | slice) -> Any:
    if isinstance(rows, Tensor):
        if rows.is_nested:
            parts = rows.unbind()
            chosen = parts[indices] if isinstance(indices, slice) else [parts[i] for i in indices.tolist()]
            return torch.nested.nested_tensor(list(chosen), layout=rows.layout)
        return rows[indices] if isinstance(indices, slice) else rows.index_select(0, indices.to(rows.device))
    positions = range(len(rows))[indices] if isinstance(indices, slice) else indices.tolist()
    return type(rows)(rows[i] for i in positions)
