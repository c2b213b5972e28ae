import pytest
import torch

from earlysift.pretrain.masking import mask_tokens
from earlysift.pretrain.models import build_bert
from earlysift.pretrain.stream import Stream
from earlysift.pretrain.tokens import Blocks

SPECIAL = {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4}


def blocks(rows=37, length=20, vocab_size=100):
    generator = torch.Generator().manual_seed(1)
    train = torch.randint(5, vocab_size, (rows, length), generator=generator, dtype=torch.int32)
    train[:, 0] = 2
    return Blocks(train=train, validation=train[:4].clone(), vocab_size=vocab_size, special=SPECIAL)


def masked(rows, seed=0):
    return mask_tokens(
        rows, mask_id=4, vocab_size=100, first_ordinary_id=5, generator=torch.Generator().manual_seed(seed)
    )


def test_every_row_hides_the_same_number_of_ordinary_tokens():
    rows = blocks(rows=500).train
    batch = masked(rows)
    labelled = batch["labels"] != -100
    assert (labelled.sum(dim=1) == 3).all()  # 15 % of 20
    assert not labelled[:, 0].any()  # [CLS] is never chosen
    assert torch.equal(batch["labels"][labelled], rows.long()[labelled])


def test_unlabelled_positions_keep_their_tokens():
    rows = blocks(rows=500).train.long()
    batch = masked(rows)
    free = batch["labels"] == -100
    assert torch.equal(batch["input_ids"][free], rows[free])


def test_hidden_tokens_are_80_percent_mask_10_random_10_kept():
    rows = blocks(rows=4000).train.long()
    batch = masked(rows)
    labelled = batch["labels"] != -100
    shown, true = batch["input_ids"][labelled], batch["labels"][labelled]
    assert (shown == 4).double().mean().item() == pytest.approx(0.8, abs=0.02)
    kept = (shown == true).double().mean().item()
    assert kept == pytest.approx(0.1 + 0.1 / 95, abs=0.015)
    assert (shown[shown != 4] >= 5).all()


def test_rows_of_special_tokens_only_stay_unlabelled():
    batch = masked(torch.full((2, 20), 3))
    assert (batch["labels"] == -100).all()


def test_candidates_do_not_depend_on_the_portions_they_are_read_in():
    whole = Stream(blocks(), seed=3).read(0, 100)
    portions = Stream(blocks(), seed=3)
    for size in (1, 7, 16, 33):
        for start in range(0, 96 - size, size):
            part = portions.read(start, size)
            for name in whole:
                assert torch.equal(part[name], whole[name][start : start + size])


def test_an_epoch_shows_every_block_once_and_the_next_in_another_order():
    data = blocks()
    stream = Stream(data, seed=0)

    def originals(start):
        batch = stream.read(start, 37)
        return torch.where(batch["labels"] != -100, batch["labels"], batch["input_ids"])

    first, second = originals(0), originals(37)
    assert sorted(first.tolist()) == sorted(data.train.tolist())
    assert sorted(second.tolist()) == sorted(first.tolist())
    assert not torch.equal(first, second)


def test_seeds_give_different_orders_and_equal_seeds_the_same():
    assert torch.equal(Stream(blocks(), seed=1).read(5, 9)["labels"], Stream(blocks(), seed=1).read(5, 9)["labels"])
    assert not torch.equal(
        Stream(blocks(), seed=1).read(5, 9)["input_ids"], Stream(blocks(), seed=2).read(5, 9)["input_ids"]
    )


def test_building_a_model_leaves_the_global_generator_alone_and_is_deterministic():
    before = torch.get_rng_state()
    shape = {"vocab_size": 50, "length": 16, "layers": 2, "width": 32}
    first, second = build_bert(**shape, seed=0), build_bert(**shape, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert first.training


def test_width_that_does_not_divide_into_heads_is_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        build_bert(vocab_size=50, length=16, layers=2, width=40, seed=0)


def test_bert_base_shape_has_110_million_parameters():
    with torch.device("meta"):
        model = build_bert(vocab_size=30_522, length=512, layers=12, width=768, seed=0)
    assert 109e6 < sum(parameter.numel() for parameter in model.parameters()) < 111e6
