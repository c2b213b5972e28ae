"""Pools: any structure of a batch, rows taken out alike, and clear words where rows are none."""

from collections import OrderedDict, UserDict, namedtuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BatchEncoding

import models
from earlysift import pools
from earlysift.pools import has_labels, inputs_and_labels, length, pad, pool_size, take, trim_padding

R = 6
ROWS = torch.tensor([1, 3, 4])
Pair = namedtuple("Pair", ["inputs", "labels"])
laws = settings(deadline=None, derandomize=True, database=None, max_examples=100)


def rows_of(*shape):
    """Row i is filled with i."""
    return torch.arange(R).reshape(R, *[1] * len(shape)).expand(R, *shape).clone()


STRUCTURES = {
    "tensor": lambda rows: rows(3),
    "dict": lambda rows: {"input_ids": rows(3), "labels": rows()},
    "ordered dict": lambda rows: OrderedDict(b=rows(3), a=rows(2, 2)),
    "user dict": lambda rows: UserDict({"input_ids": rows(3)}),
    "batch encoding": lambda rows: BatchEncoding({"input_ids": rows(3), "attention_mask": rows(3)}),
    "tuple": lambda rows: (rows(3), rows()),
    "list": lambda rows: [rows(3), rows()],
    "named tuple": lambda rows: Pair(rows(3), rows()),
    "nested": lambda rows: {"views": [rows(2), {"deep": (rows(1, 2), rows())}], "labels": rows()},
    "nested named tuple": lambda rows: {"pair": Pair({"x": rows(3)}, rows())},
}


def leaves(structure):
    return [tensor for _, tensor in pools._tensors(structure)]


@pytest.mark.parametrize("name", STRUCTURES)
def test_rows_are_taken_from_every_structure(name):
    pool = STRUCTURES[name](rows_of)
    before = [tensor.clone() for tensor in leaves(pool)]
    assert pool_size(pool) == R
    for indices, wanted in (
        (ROWS, [1, 3, 4]),
        (slice(2, 5), [2, 3, 4]),
        (torch.tensor([5]), [5]),
        (slice(4, 99), [4, 5]),
    ):
        batch = take(pool, indices)
        assert type(batch) is type(pool)
        assert len(leaves(batch)) == len(before)
        for tensor, whole in zip(leaves(batch), before, strict=True):
            assert torch.equal(tensor, whole[wanted])
    assert all(torch.equal(tensor, whole) for tensor, whole in zip(leaves(pool), before, strict=True))


@pytest.mark.parametrize("name", STRUCTURES)
def test_keys_and_their_order_stay(name):
    pool = STRUCTURES[name](rows_of)
    batch = take(pool, ROWS)
    if hasattr(pool, "keys"):
        assert list(batch.keys()) == list(pool.keys())
    if hasattr(pool, "_fields"):
        assert batch._fields == pool._fields
        assert torch.equal(batch.labels, ROWS)


def test_default_dicts_are_mappings_too():
    from collections import defaultdict

    pool = defaultdict(list, {"input_ids": rows_of(3)})
    assert torch.equal(take(pool, ROWS)["input_ids"], rows_of(3)[ROWS])


def test_what_has_no_rows_is_passed_through():
    shared = {"name": "train", "step": 7, "share": 0.5, "none": None, "flag": True, "scalar": torch.tensor(3.0)}
    batch = take({"input_ids": rows_of(3), **shared}, ROWS)
    assert {key: batch[key] for key in shared} == shared
    assert batch["input_ids"].shape == (3, 3)


def test_lists_of_objects_are_rows_where_they_are_as_long_as_the_pool():
    texts, ids, config = [f"text {i}" for i in range(R)], tuple(range(100, 100 + R)), ["left", "right"]
    batch = take({"input_ids": rows_of(3), "text": texts, "id": ids, "sides": config}, ROWS)
    assert batch["text"] == ["text 1", "text 3", "text 4"]
    assert batch["id"] == (101, 103, 104)
    assert batch["sides"] == config
    assert take({"input_ids": rows_of(3), "text": texts}, slice(1, 3))["text"] == ["text 1", "text 2"]


def test_named_tuples_of_settings_stay_whole_whatever_the_size_of_the_pool():
    Size = namedtuple("Size", ["height", "width"])
    pool = {"pixels": torch.zeros(2, 3), "size": Size(224, 196)}
    assert take(pool, torch.tensor([1]))["size"] == Size(224, 196)


def test_nested_tensors_are_taken_by_component():
    parts = [torch.full((i + 1, 2), float(i)) for i in range(R)]
    nested = torch.nested.nested_tensor(parts, layout=torch.jagged)
    assert pool_size(nested) == R
    for indices, wanted in ((ROWS, [1, 3, 4]), (slice(4, 6), [4, 5])):
        batch = take({"input_ids": nested, "labels": rows_of()}, indices)
        assert batch["input_ids"].is_nested
        assert batch["input_ids"].layout == torch.jagged
        taken = batch["input_ids"].unbind()
        assert len(taken) == len(wanted)
        assert all(torch.equal(part, parts[i]) for part, i in zip(taken, wanted, strict=True))
        assert batch["labels"].tolist() == wanted


@laws
@given(st.data())
def test_taking_twice_is_taking_once(data):
    count = data.draw(st.integers(1, 9))
    first = torch.tensor(data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=9)))
    second = torch.tensor(data.draw(st.lists(st.integers(0, len(first) - 1), min_size=1, max_size=9)))
    pool = {"x": torch.arange(count * 2).reshape(count, 2), "names": ["n"] * count, "flat": torch.arange(count)}
    twice, once = take(take(pool, first), second), take(pool, first[second])
    assert torch.equal(twice["x"], once["x"])
    assert torch.equal(twice["flat"], once["flat"])


def test_gradients_flow_through_what_is_taken():
    features = torch.ones(R, 2, requires_grad=True)
    take((features, rows_of()), ROWS)[0].sum().backward()
    assert features.grad.sum(dim=1).tolist() == [0, 2, 0, 2, 2, 0]


# Pools that are none


@pytest.mark.parametrize("pool", [{}, [], {"text": ["a", "b"]}, "text", None, {"scalar": torch.tensor(1)}])
def test_pools_without_rows_are_refused(pool):
    with pytest.raises(
        ValueError, match=rf"first dimension, got {type(pool).__name__} without any\. Collate the samples"
    ):
        pool_size(pool)


def test_differing_first_dimensions_are_listed_by_name():
    pool = {"input_ids": torch.zeros(6, 3), "views": [torch.zeros(5, 2)], "labels": torch.zeros(6)}
    message = (
        r"got pool\['input_ids'\]: 6, pool\['views'\]\[0\]: 5, pool\['labels'\]: 6\. Give the model what is shared"
    )
    for function in (pool_size, lambda pool: take(pool, ROWS)):
        with pytest.raises(ValueError, match=message):
            function(pool)


@pytest.mark.parametrize(
    "pool",
    [
        {"input_ids": torch.zeros(1, 9), "position_ids": torch.zeros(1, 9), "labels": torch.zeros(1, 9)},
        {"input_ids": torch.zeros(1, 9), "cu_seq_lens_q": torch.tensor([0, 4, 9])},
        {"input_ids": torch.zeros(1, 9), "seq_idx": torch.zeros(1, 9)},
        {"input_ids": torch.zeros(9), "cu_seqlens": torch.tensor([0, 4, 9])},
    ],
)
def test_packed_rows_are_refused(pool):
    with pytest.raises(
        ValueError, match=r"one packed \(padding-free\) row.*Turn padding-free collation or packing off"
    ):
        pool_size(pool)


def test_one_padded_row_and_many_rows_with_positions_are_no_packing():
    one = {"input_ids": torch.zeros(1, 9), "position_ids": torch.zeros(1, 9), "attention_mask": torch.zeros(1, 9)}
    assert pool_size(one) == 1
    assert pool_size({"input_ids": torch.zeros(4, 9), "position_ids": torch.zeros(4, 9)}) == 4


# Labels


def test_labels_are_found_in_mappings_and_pairs():
    inputs, labels = inputs_and_labels({"input_ids": rows_of(3), "labels": rows_of(), "mask": rows_of(3)})
    assert list(inputs) == ["input_ids", "mask"]
    assert torch.equal(labels, rows_of())
    encoding, _ = inputs_and_labels(BatchEncoding({"input_ids": rows_of(3), "labels": rows_of()}))
    assert list(encoding) == ["input_ids"]
    for pair in ((rows_of(3), rows_of()), [{"x": rows_of(3)}, rows_of()], Pair(rows_of(3), rows_of())):
        inputs, labels = inputs_and_labels(pair)
        assert inputs is pair[0]
        assert labels is pair[1]


@pytest.mark.parametrize(
    ("pool", "came"),
    [
        ({"input_ids": torch.zeros(2, 3), "id": 1}, r"keys \['id', 'input_ids'\]"),
        ({"input_ids": torch.zeros(2, 3), "labels": None}, r"keys \['input_ids', 'labels'\]"),
        (torch.zeros(2, 3), "Tensor"),
        ((torch.zeros(2), torch.zeros(2), torch.zeros(2)), "tuple"),
    ],
)
def test_absent_labels_are_refused_with_both_ways_out(pool, came):
    message = rf"Expected a mapping with 'labels' or a pair \(inputs, labels\), got {came}\. Add 'labels' to the batch"
    with pytest.raises(ValueError, match=message):
        inputs_and_labels(pool)
    assert not has_labels(pool)


@pytest.mark.parametrize(
    ("inputs", "positions"),
    [
        ({"input_ids": torch.zeros(8, 4)}, 4),
        (torch.zeros(8, 5, 2), 5),
        (torch.zeros(8), 1),
        ([torch.zeros(8), torch.zeros(8, 3)], 3),
    ],
)
def test_length_is_the_number_of_positions(inputs, positions):
    assert length(inputs) == positions


# Padding


@pytest.mark.parametrize("side", ["right", "left", "both"])
def test_padding_that_no_row_needs_is_cut(side):
    mask = {
        "right": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
        "left": [[0, 0, 1, 1, 1], [0, 0, 0, 0, 1]],
        "both": [[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]],
    }[side]
    mask = torch.tensor(mask)
    ids = torch.arange(10).reshape(2, 5)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": ids,
        "states": ids[..., None].expand(2, 5, 3),
        "class": ids[:, 0],
    }
    trimmed = trim_padding(batch)
    cut = {"right": slice(0, 3), "left": slice(2, 5), "both": slice(1, 4)}[side]
    for key in ("input_ids", "attention_mask", "labels", "states"):
        assert torch.equal(trimmed[key], batch[key][:, cut])
    assert torch.equal(trimmed["class"], ids[:, 0])


def test_gaps_between_positions_in_use_are_no_padding():
    batch = {"input_ids": torch.ones(1, 5).long(), "attention_mask": torch.tensor([[1, 0, 0, 1, 0]])}
    assert trim_padding(batch)["input_ids"].shape == (1, 4)


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.ones(2, 4)},
        (torch.ones(2, 4), torch.ones(2)),
        {"input_ids": torch.ones(2, 4), "attention_mask": None},
        {"input_ids": torch.ones(2, 4), "attention_mask": torch.zeros(2, 4)},
        {"input_ids": torch.ones(2, 4), "attention_mask": torch.zeros(2, 1, 4, 4)},
    ],
)
def test_batches_without_a_mask_of_positions_come_back_as_they_are(batch):
    assert trim_padding(batch) is batch


def test_trimmed_encodings_stay_encodings():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    trimmed = trim_padding(BatchEncoding({"input_ids": torch.ones(2, 3), "attention_mask": mask, "text": ["a", "b"]}))
    assert isinstance(trimmed, BatchEncoding)
    assert trimmed["attention_mask"].tolist() == [[1, 1], [1, 0]]
    assert trimmed["text"] == ["a", "b"]


@pytest.mark.parametrize("key", [key for key in models.BUILDERS if key[1] != "sequence_classification"], ids="-".join)
def test_models_take_trimmed_batches_and_their_loss_is_the_same(key):
    model = models.BUILDERS[key]()
    batch = models.batch_for(model, key[1], 6, 12, torch.Generator().manual_seed(0))
    batch = take(batch, batch["attention_mask"].sum(dim=1).argsort()[:3])
    trimmed = trim_padding(batch)
    assert trimmed["input_ids"].size(1) < 12
    expected = models.loss_of(model, batch)
    torch.testing.assert_close(models.loss_of(model, trimmed), expected, rtol=1e-5, atol=1e-5)


def test_multi_label_targets_as_wide_as_the_text_is_long_are_not_cut():
    mask = torch.tensor([[1, 1, 0, 0]])
    batch = {"input_ids": torch.ones(1, 4).long(), "attention_mask": mask, "labels": torch.ones(1, 4)}
    trimmed = trim_padding(batch)
    assert trimmed["input_ids"].shape == (1, 2)
    assert trimmed["labels"].shape == (1, 4)


@pytest.mark.parametrize("left", [False, True])
def test_padding_goes_to_what_has_positions_on_the_side_asked_for(left):
    ids = torch.arange(1, 7).reshape(2, 3)
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones(2, 3, dtype=torch.bool),
        "labels": ids,
        "token_type_ids": ids,
        "states": ids[..., None].expand(2, 3, 4).float(),
        "class": ids[:, 0],
        "targets": torch.ones(2, 3),  # as many classes as positions
        "text": ["a", "b"],
        "nested": {"ids": ids},
    }
    padded = pad(BatchEncoding(batch), 5, {"labels": -100, "input_ids": 9}, left=left)
    assert isinstance(padded, BatchEncoding)
    new, old = (slice(0, 2), slice(2, 5)) if left else (slice(3, 5), slice(0, 3))
    fills = {"input_ids": 9, "attention_mask": False, "labels": -100, "token_type_ids": 0, "states": 0.0}
    for name, fill in fills.items():
        assert padded[name].dtype == batch[name].dtype
        assert torch.equal(padded[name][:, old], batch[name])
        assert (padded[name][:, new] == fill).all()
    assert padded["nested"]["ids"].shape == (2, 5)
    assert torch.equal(padded["class"], batch["class"])
    assert torch.equal(padded["targets"], batch["targets"])
    assert padded["text"] == ["a", "b"]
    assert pad(batch, 3, {}) is batch


@pytest.mark.parametrize("key", [key for key in models.BUILDERS if key[1] != "sequence_classification"], ids="-".join)
def test_the_loss_of_a_model_does_not_depend_on_padding(key):
    model = models.BUILDERS[key]()
    batch = models.batch_for(model, key[1], 4, 10, torch.Generator().manual_seed(0))
    padded = pad(batch, 13, {"labels": -100, "input_ids": models.PAD})
    assert padded["input_ids"].shape == (4, 13)
    torch.testing.assert_close(models.loss_of(model, padded), models.loss_of(model, batch), rtol=1e-5, atol=1e-5)
