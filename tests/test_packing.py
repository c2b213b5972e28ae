"""Flattened rows: each document is scored as alone, and the kept ones are what the collator makes of them alone."""

import pytest
import torch
import torch.nn.functional as F
from torch import Generator
from transformers import DataCollatorWithFlattening

import models
from earlysift import SiftConfig, Sifter, packing, scorers, selectors
from earlysift.seeds import seeded
from models import build, shorter
from processes import on_ranks

DEPTH, LENGTHS = 2, (5, 9, 3, 7, 2, 6)
COLLATE = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)


def samples(lengths=LENGTHS):
    generator = Generator().manual_seed(1)
    return [{"input_ids": torch.randint(3, models.VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


def model_of(family="llama", **config):
    return build(family, "causal_lm", use_cache=False, **config)


def alone(model, depth):
    """The loss of each document by a stock model of fewer layers that sees nothing else."""
    stock = shorter(model, depth).eval()
    with torch.no_grad():
        ids = [torch.tensor([sample["input_ids"]]) for sample in samples()]
        return torch.stack([stock(input_ids=each, labels=each).loss for each in ids])


def same(one, other):
    assert one.keys() == other.keys()
    for key, value in one.items():
        assert type(value) is type(other[key])
        if isinstance(value, torch.Tensor):
            assert value.dtype == other[key].dtype
            assert torch.equal(value, other[key]), key
        else:
            assert value == other[key], key


def test_documents_that_are_set_apart_and_joined_are_the_row_again():
    pool = COLLATE(samples())
    rows = packing.apart(pool)
    assert packing.size(pool) == len(rows["input_ids"]) == len(LENGTHS)
    for row, sample in enumerate(samples()):
        assert rows["input_ids"][row][rows["attention_mask"][row] == 1].tolist() == sample["input_ids"]
        assert (rows["labels"][row][rows["attention_mask"][row] == 0] == -100).all()
    same(packing.joined(rows, pool), pool)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_documents_with_the_largest_losses_at_the_exit_are_kept_as_a_shorter_row(family):
    model = model_of(family)
    pool = COLLATE(samples())
    scores = scorers.early_exit_loss(model, packing.apart(pool), depth=DEPTH, dtype=None)
    torch.testing.assert_close(scores, alone(model, DEPTH), rtol=1e-4, atol=1e-4)
    sifter = Sifter(model, keep=0.5, depth=DEPTH, dtype=None)
    batch = sifter.sift(pool)
    kept = alone(model, DEPTH).topk(3).indices.sort().values.tolist()
    same(batch, COLLATE([samples()[row] for row in kept]))
    assert sifter.latest.size == 3
    model.eval()
    torch.testing.assert_close(sifter.loss(batch), model(**batch).loss, rtol=1e-4, atol=1e-4)


def test_keep_one_hands_the_row_out_as_it_is():
    pool = COLLATE(samples())
    same(Sifter(model_of(), keep=1.0).sift(pool), pool)


def test_ids_belong_to_documents_and_losses_are_remembered_by_them():
    model = model_of()
    pool = COLLATE(samples()) | {"id": torch.arange(10, 16)}
    sifter = Sifter(model, keep=0.5, score="memory", sample_id="id")
    batch = sifter.sift(pool)
    assert "id" not in batch
    sifter.loss(batch)
    sifter.stats()
    remembered = sifter._runner.learnt.memory.look(sifter.ids, 1)[0]
    expected = torch.stack(
        [F.cross_entropy(model.eval()(input_ids=d).logits[0, :-1], d[0, 1:]) for d in documents_of(batch)]
    )
    torch.testing.assert_close(remembered, expected.detach(), rtol=1e-4, atol=1e-4)


def documents_of(batch):
    rows = packing.apart(batch)
    return [ids[mask == 1][None] for ids, mask in zip(rows["input_ids"], rows["attention_mask"], strict=True)]


class Blind(models.PlainTransformer):
    """Takes position_ids, and does not look at them."""

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return super().forward(input_ids, attention_mask)


def test_a_model_that_mixes_the_documents_of_a_row_is_refused():
    pool = COLLATE(samples())
    with pytest.raises(
        ValueError, match=r"does not keep the documents of a flattened row apart(?s:.*)use_cache = False"
    ):
        Sifter(build("llama", "causal_lm"), keep=0.5).sift(pool)
    blind = build("plain", "causal_lm")
    blind.__class__ = Blind
    row = {key: pool[key] for key in ("input_ids", "labels", "position_ids")}
    with pytest.raises(ValueError, match=r"apart(?s:.*)Use an attention that looks at position_ids"):
        Sifter(blind, keep=0.5, family=models.row_of(blind)).sift(row)


def test_a_document_that_is_to_predict_the_next_one_is_refused():
    pool = COLLATE(samples())
    pool["labels"] = pool["input_ids"].clone()
    with pytest.raises(ValueError, match="predict the first token of the next one"):
        Sifter(model_of(), keep=0.5).sift(pool)


def test_what_belongs_neither_to_positions_nor_to_documents_is_refused_by_name():
    pool = COLLATE(samples()) | {"strange": torch.zeros(4)}
    with pytest.raises(ValueError, match=r"6 documents of a flattened pool, got 'strange' \(4,\)"):
        Sifter(model_of(), keep=0.5).sift(pool)


def test_one_document_is_a_pool_of_one():
    pool = COLLATE(samples((4,)))
    same(packing.joined(packing.apart(pool), pool), pool)
    sifter = Sifter(model_of(), SiftConfig(kept=1, keep=0.5, probe_every=0))
    same(sifter.sift(pool), pool)


def rows_of_documents(rows):
    """Rows that hold three documents each, as packing before batching makes them."""
    places = torch.cat([torch.arange(n) for n in (4, 6, 6)])
    ids = torch.randint(3, models.VOCABULARY, (rows, 16), generator=Generator().manual_seed(rows))
    labels = torch.where(places == 0, -100, ids)
    return {"input_ids": ids, "position_ids": places.expand(rows, -1).clone(), "labels": labels}


def test_the_first_pool_decides_whether_documents_or_rows_are_selected_and_a_resumed_run_knows():
    model = model_of()
    of_rows = Sifter(model, keep=0.5)
    kept = of_rows.sift(rows_of_documents(2))
    assert kept["input_ids"].shape == (1, 16)
    model.eval()
    torch.testing.assert_close(of_rows.loss(kept), model(**kept).loss)  # one row, and not three documents
    model.train()
    resumed = Sifter(model, keep=0.5)
    resumed.load_state_dict(of_rows.state_dict())
    for sifter in (of_rows, resumed):
        with pytest.raises(ValueError, match="one packed"):
            sifter.sift(rows_of_documents(1))
    assert Sifter(model, keep=0.5).sift(rows_of_documents(1))["input_ids"].shape[1] < 16


def test_a_state_from_before_there_were_documents_goes_on():
    of_documents, resumed = (Sifter(model_of(), keep=0.5) for _ in range(2))
    of_documents.sift(COLLATE(samples()))
    older = {name: part for name, part in of_documents.state_dict().items() if name != "flattened"}
    resumed.load_state_dict(older)
    same(resumed.sift(COLLATE(samples())), of_documents.sift(COLLATE(samples())))


def test_padding_is_no_document():
    pool = COLLATE(samples())
    padded = {key: F.pad(pool[key], (0, 4)) for key in ("input_ids", "labels", "position_ids")}
    with pytest.raises(ValueError, match="Collate without pad_to_multiple_of"):
        Sifter(model_of(), keep=0.5).sift(padded)


def test_documents_are_samples_of_tasks_over_tokens_alone():
    pool = COLLATE(samples())
    row = {key: pool[key] for key in ("input_ids", "position_ids")} | {"labels": torch.arange(len(LENGTHS)) % 2}
    with pytest.raises(ValueError, match="the task is sequence_classification"):
        Sifter(build("bert", "sequence_classification"), keep=0.5).sift(row)


def test_rows_that_share_their_positions_are_no_documents():
    rows = {"input_ids": torch.ones(4, 6, dtype=torch.int64), "position_ids": torch.arange(6)[None]}
    assert not packing.is_flattened(rows)
    with pytest.raises(ValueError, match="Give the model what is shared between samples by other means"):
        Sifter(model_of(), keep=0.5).sift(rows | {"labels": rows["input_ids"]})


def documents_of_rank(rank, step):
    """Four to seven documents of any length: ranks differ in both."""
    generator = Generator().manual_seed(2 * step + rank)
    lengths = torch.randint(2, 12, (4 + (rank + step) % 2 + 2 * rank,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, models.VOCABULARY, (n,), generator=generator).tolist()} for n in lengths]


RANKS = """
import json, sys
import torch
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from earlysift import Sifter, selectors
from test_packing import COLLATE, DEPTH, documents_of_rank, model_of
rank, store, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)

def built(kind):
    model = model_of()
    if kind == "ddp":
        return DistributedDataParallel(model)
    for part in (*model.model.layers, model):
        fully_shard(part, mesh=torch.distributed.init_device_mesh("cpu", (count,)))
    return model
"""

KEPT = (
    RANKS
    + """
told = []
for kind, scope, name in CASES:
    options = {"depth": DEPTH, "dtype": None, "probe_every": 2, "scope": scope, "select": getattr(selectors, name)}
    sifter = Sifter(built(kind), kept=KEEP, **options)
    for step in range(3):
        batch = sifter.sift(COLLATE(documents_of_rank(rank, step)))
        places, weights = sifter.selection.indices.tolist(), sifter.weights
        sifter.loss(batch, weights=weights).backward()
        row = {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        told.append([places, weights.tolist(), row])
print(json.dumps(told))
torch.distributed.destroy_process_group()
"""
)
CASES = [
    ("ddp", "local", "greedy"),
    ("ddp", "local", "proportional"),
    ("ddp", "global", "greedy"),
    ("ddp", "global", "proportional"),
    ("fsdp", "local", "greedy"),
    ("fsdp", "global", "greedy"),
]


def test_ranks_keep_the_documents_that_one_process_would_by_either_scope(tmp_path):
    """Ranks differ in the number of their documents, and by more than one chunk of them."""
    script = KEPT.replace("CASES", repr(CASES)).replace("KEEP", "1")
    by_rank = on_ranks(2, script, tmp_path)
    moved = 0
    for number, (case, step) in enumerate((case, step) for case in CASES for step in range(3)):
        of_ranks = [documents_of_rank(rank, step) for rank in range(2)]
        joint = of_ranks[0] + of_ranks[1]
        for rank, (places, weights, row) in enumerate(told[number] for told in by_rank):
            documents = joint if case[1] == "global" else of_ranks[rank]
            indices, expected = kept_by_one(documents, 2 if case[1] == "global" else 1, rank, step, *case[1:])
            assert set(places) <= set(indices)
            assert weights == pytest.approx([expected[indices.index(place)] for place in places], rel=1e-5)
            batch = COLLATE([documents[place] for place in places])
            assert row == {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
            moved += case[1] == "global" and (places[0] >= len(of_ranks[0])) != (rank == 1)
        both = [place for told in by_rank for place in told[number][0]]
        assert case[1] == "local" or sorted(both) == sorted(indices)
    assert moved > 0


def kept_by_one(documents, kept, rank, step, scope, name):
    """Indices and weights of one process that has these documents, and the random numbers of this rank."""
    pool = packing.apart(COLLATE(documents))
    scores = scorers.early_exit_loss(model_of(), pool, depth=DEPTH, dtype=None)
    generator = seeded(0, "sift", step, rank if scope == "local" else 0)
    if scope == "global" or rank == 0:
        torch.rand((), generator=generator)  # by which all ranks decide whether the step selects
    indices, weights = getattr(selectors, name)(scores, kept, generator)
    return indices.tolist(), weights.tolist()


SHARES = (
    RANKS
    + """
told = []
for kind, scope, options in (
    ("ddp", "local", {"keep": 0.5}),
    ("ddp", "global", {"keep": 0.5}),
    ("fsdp", "local", {"keep": 0.5}),
    ("fsdp", "local", {"kept": 2 + rank}),
    ("ddp", "global", {"kept": 2} if rank else {"keep": 0.5, "kept": None}),
    ("ddp", "global", {"kept": 5}),
):
    sifter = Sifter(built(kind), scope=scope, **options)
    try:
        sifter.sift(COLLATE(documents_of_rank(rank, 0)))
        told.append(len(sifter.selection.indices))
    except ValueError as error:
        told.append(str(error))
print(json.dumps(told))
torch.distributed.destroy_process_group()
"""
)


def test_first_rows_of_which_ranks_would_keep_different_numbers_are_refused_on_all_where_they_need_the_same(tmp_path):
    """Four documents on one rank, seven on the other."""
    differ = "Expected all ranks to keep the same number of candidates, got {} of first pools of 4, 7. Pass the same "
    expected = [
        *[differ.format("2, 4") + "number to all, as kept=."] * 2,
        differ.format("2, 3") + "number to all, as kept=.",
        "alike",
        "Expected at least 5 candidates (the number kept) in the first pool of every rank, got 4, 7. Use larger pools, "
        "or keep fewer.",
    ]
    first, second = on_ranks(2, SHARES, tmp_path)
    assert [told if isinstance(told, str) else "alike" for told in first[1:]] == expected
    assert second[1:] == first[1:]
    assert (first[0], second[0]) == (2, 4)
