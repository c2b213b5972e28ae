"""Data sets with ids: samples carry their index, whatever asks for them, and what cannot carry one is refused."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from earlysift.datasets import WithIds, is_map_style

ROWS = [{"x": torch.tensor([n, n])} for n in range(7)]


class Together:
    """A data set that reads several samples at once, as those of `datasets` do."""

    def __init__(self):
        self.asked = []

    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return ROWS[index]

    def __getitems__(self, indices):
        self.asked.append(indices)
        return [ROWS[index] for index in indices]


@pytest.mark.parametrize("make", [lambda: ROWS, Together])
@pytest.mark.parametrize("workers", [0, 1])
def test_every_sample_carries_its_index_and_is_otherwise_as_before(make, workers):
    loader = DataLoader(WithIds(make(), "number"), batch_size=3, shuffle=True, num_workers=workers)
    seen = []
    for batch in loader:
        assert batch["x"].tolist() == [[n, n] for n in batch["number"].tolist()]
        seen += batch["number"].tolist()
    assert sorted(seen) == list(range(7))
    assert batch["number"].dtype == torch.int64


def test_samples_that_can_be_read_together_are():
    source = Together()
    assert [sample["sample_id"] for sample in WithIds(source).__getitems__([5, 2])] == [5, 2]
    assert source.asked == [[5, 2]]


def test_it_is_a_sequence_like_the_data_set_itself():
    numbered = WithIds(ROWS)
    assert len(numbered) == 7
    assert [sample["sample_id"] for sample in numbered] == list(range(7))
    assert numbered[-1]["sample_id"] == 6
    with pytest.raises(IndexError):
        numbered[7]
    assert "sample_id" not in ROWS[0]


def test_what_cannot_carry_an_index_is_refused_with_the_way_out():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(ROWS)

    assert not is_map_style(Stream())
    with pytest.raises(ValueError, match=r"with a length and an index, got Stream\. Samples that are read in passing"):
        WithIds(Stream())
    with pytest.raises(ValueError, match="with a length and an index, got list_iterator"):
        WithIds(iter(ROWS))
    with pytest.raises(ValueError, match=r"mappings, got tuple\. Give every part of a sample a name"):
        WithIds([(1, 2)])[0]
    with pytest.raises(ValueError, match=r"have 'x' already\. Use them without WithIds"):
        WithIds(ROWS, "x")[0]


class Drawing:
    """A data set whose samples depend on how many were read before, and which can save that."""

    def __init__(self):
        self.read = 0

    def __len__(self):
        return 7

    def __getitem__(self, index):
        self.read += 1
        return {"x": torch.tensor(100 * self.read + index)}

    def state_dict(self):
        return {"read": self.read}

    def load_state_dict(self, state):
        self.read = state["read"]


def test_the_state_of_a_data_set_is_saved_through_it_and_none_is_made_up():
    first, second = WithIds(Drawing()), WithIds(Drawing())
    assert [int(first[3]["x"]) for _ in range(2)] == [103, 203]
    second.load_state_dict(first.state_dict())
    assert second[3] == first[3]
    assert not hasattr(WithIds(ROWS), "state_dict")
    assert pickle.loads(pickle.dumps(first)).state_dict() == {"read": 3}
    with pytest.raises(AttributeError, match="'WithIds' object has no attribute 'column_names'"):
        first.column_names  # noqa: B018
