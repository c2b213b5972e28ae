"""`WithIds`: a data set whose samples carry their numbers, by which losses are remembered."""

import operator
from collections.abc import Mapping
from typing import Any

from torch.utils.data import Dataset, IterableDataset


class WithIds(Dataset[dict[str, Any]]):
    """A map-style data set whose samples carry their index under a key, for ``SiftConfig(sample_id=key)``.

    Args:
        dataset: Anything with a length, whose samples are mappings.
        key: Where the index goes; the samples must not have it.

    Raises:
        ValueError: If the data set has no length or no random access; and from a sample that is no mapping, or has the
            key.

    Example:
        >>> WithIds([{"text": "a"}, {"text": "b"}])[1]
        {'text': 'b', 'sample_id': 1}
    """

    def __init__(self, dataset: Any, key: str = "sample_id") -> None:
        if not is_map_style(dataset):
            raise ValueError(
                f"Expected a map-style data set, with a length and an index, got {type(dataset).__name__}. Samples "
                "that are read in passing have no numbers by which they would be known again."
            )
        self.dataset, self.key = dataset, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._numbered(index, self.dataset[index])

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        """Several samples, read together if the data set can."""
        together = getattr(self.dataset, "__getitems__", None)
        samples = together(indices) if together else [self.dataset[index] for index in indices]
        return [self._numbered(index, sample) for index, sample in zip(indices, samples, strict=True)]

    def __getattr__(self, name: str) -> Any:
        """The state of a data set that has one, which loaders such as torchdata's save."""
        if name in ("state_dict", "load_state_dict"):
            return getattr(self.dataset, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _numbered(self, index: int, sample: Any) -> dict[str, Any]:
        if not isinstance(sample, Mapping):
            raise ValueError(
                f"Expected samples that are mappings, got {type(sample).__name__}. Give every part of a sample a name, "
                "as in {'inputs': ..., 'labels': ...}."
            )
        if self.key in sample:
            raise ValueError(
                f"The samples have {self.key!r} already. Use them without WithIds if these are their ids, or choose "
                "another key."
            )
        return {**sample, self.key: operator.index(index) % len(self)}  # -1 is the last one


def is_map_style(dataset: Any) -> bool:
    """Whether a data set has a length and random access."""
    parts = ("__len__", "__getitem__")
    return not isinstance(dataset, IterableDataset) and all(hasattr(dataset, part) for part in parts)
