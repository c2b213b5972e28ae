import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from earlysift.pretrain.masking import begins_word, mask_tokens
from earlysift.pretrain.models import build_bert, build_bert_classifier, build_llama, build_vit
from earlysift.pretrain.stream import Samples, Stream
from earlysift.pretrain.tokens import Blocks
from earlysift.seeds import seeded

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


# Whole words


def slowly_masked(rows, begins, *, seed, first, stop, share):
    """`mask_tokens` with whole words, token by token."""
    generator = torch.Generator().manual_seed(seed)
    priority, fate = (torch.rand(rows.shape, generator=generator) for _ in range(2))
    other = torch.randint(first, stop, rows.shape, generator=generator)
    inputs, labels = rows.clone(), torch.full_like(rows, -100)
    count = max(1, round(share * rows.size(1)))
    for r, row in enumerate(rows.tolist()):
        words = []
        for t, token in enumerate(row):
            ordinary = first <= token < stop
            if ordinary and not begins[token] and words and words[-1][-1] == t - 1:
                words[-1].append(t)
            elif ordinary:
                words.append([t])
        hidden = []
        for word in sorted(words, key=lambda word: -priority[r, word[0]]):
            if len(hidden) + len(word) <= count:
                hidden += word
        for t in hidden:
            labels[r, t] = row[t]
            if fate[r, t] < 0.8:
                inputs[r, t] = 99
            elif fate[r, t] >= 0.9:
                inputs[r, t] = other[r, t]
    return {"input_ids": inputs, "labels": labels}


@given(
    seed=st.integers(0, 2**32),
    shape=st.tuples(st.integers(1, 6), st.integers(1, 40)),
    special=st.tuples(st.integers(0, 4), st.integers(16, 20)),
    inside=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    share=st.sampled_from([0.15, 0.4, 1.0]),
)
def test_whole_words_are_chosen_as_a_loop_over_words_would(seed, shape, special, inside, share):
    first, stop = special
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(20, shape, generator=generator)
    begins = torch.rand(20, generator=generator) >= inside
    batch = mask_tokens(
        rows,
        mask_id=99,
        vocab_size=stop,
        first_ordinary_id=first,
        generator=torch.Generator().manual_seed(seed),
        share=share,
        word_begins=begins,
    )
    assert equal(batch, slowly_masked(rows, begins, seed=seed, first=first, stop=stop, share=share))


@pytest.fixture
def text():
    """Rows of 128 tokens, of which 40 % continue a word, and where words begin."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randint(5, 100, (2000, 128), generator=generator)
    rows[:, 0] = 2
    rows[:, -1] = 3
    return rows, torch.arange(100) < 62


def hide_words(rows, begins):
    return mask_tokens(
        rows,
        mask_id=4,
        vocab_size=100,
        first_ordinary_id=5,
        generator=torch.Generator().manual_seed(0),
        word_begins=begins,
    )


def test_pieces_of_a_word_are_hidden_together_and_their_number_is_near_the_bound(text):
    rows, begins = text
    labelled = hide_words(*text)["labels"] != -100
    inside = ~begins[rows[:, 2:-1]]
    assert inside.double().mean().item() == pytest.approx(0.4, abs=0.01)
    assert torch.equal(labelled[:, 2:-1][inside], labelled[:, 1:-2][inside])
    counts = labelled.sum(dim=1)
    assert counts.max() == 19  # 15 % of 128
    assert counts.double().mean() > 18.9
    assert not labelled[:, [0, -1]].any()


def test_hidden_pieces_meet_their_fates_one_by_one(text):
    rows, begins = text
    batch = hide_words(*text)
    labelled = batch["labels"] != -100
    masked = batch["input_ids"] == 4
    assert masked[labelled].double().mean().item() == pytest.approx(0.8, abs=0.01)
    second = labelled[:, 1:] & ~begins[rows[:, 1:]] & labelled[:, :-1]
    both = (masked[:, 1:] & masked[:, :-1])[second].double().mean().item()
    assert both == pytest.approx(0.64, abs=0.02)  # 0.8 if words met it as a whole


def test_words_of_one_token_are_masked_as_tokens_are():
    rows = blocks(rows=300).train
    whole = hide_words(rows, torch.ones(100, dtype=torch.bool))
    assert equal(whole, masked(rows))


def test_special_tokens_behind_the_ordinary_ones_are_never_chosen():
    rows = blocks(rows=300).train
    rows[:, 5:9] = 97  # as [SEP] of a vocabulary that ends with special tokens
    batch = mask_tokens(rows, mask_id=99, vocab_size=95, first_ordinary_id=0, generator=seeded(0))
    assert not (batch["labels"] >= 95).any()
    assert (batch["labels"] != -100).any()
    assert batch["input_ids"][:, 5:9].unique().tolist() == [97]


def test_words_begin_where_the_vocabulary_says():
    wordpiece = {"[CLS]": 0, "play": 1, "##ing": 2, "##ed": 4, "Ġ": 5}
    assert begins_word(wordpiece).tolist() == [True, True, False, False, False, True]
    bytes_bpe = {"Ġplay": 0, "ing": 1, "Ċ": 2, "ĉif": 3, ".": 4, "##": 5}
    assert begins_word(bytes_bpe).tolist() == [True, False, True, True, False, False]
    with pytest.raises(ValueError, match=r"expected WordPiece .* byte-level BPE .* found neither"):
        begins_word({"▁play": 0, "ing": 1})


def samples(rows=37):
    ids = blocks(rows=rows).train
    return Samples({"input_ids": ids, "number": torch.arange(rows)}, {}, prepare)


def prepare(rows, generator):
    """Masks, and beside them the number of each row within the training part."""
    batch = mask_tokens(rows["input_ids"], mask_id=4, vocab_size=100, first_ordinary_id=5, generator=generator)
    return {**batch, "number": rows["number"]}


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_candidates_do_not_depend_on_the_portions_they_are_read_in():
    whole = Stream(samples(), seed=3).read(0, 100)
    portions = Stream(samples(), seed=3)
    for size in (1, 7, 16, 33):
        for start in range(0, 96 - size, size):
            part = portions.read(start, size)
            for name in whole:
                assert torch.equal(part[name], whole[name][start : start + size])


@pytest.mark.parametrize("subset", [1.0, 0.4])
def test_candidates_are_these_rows_with_these_masks(subset):
    data, stream = samples(), Stream(samples(), seed=3, subset=subset)
    epoch = round(subset * 37)
    for unit in (0, 5):
        rows = []
        for n in range(16 * unit, 16 * unit + 16):
            order = torch.randperm(37, generator=seeded(3, "order", n // epoch))
            rows.append(int(order[n % epoch]))
        expected = prepare({name: value[rows] for name, value in data.train.items()}, seeded(3, "mask", unit))
        assert equal(stream.read(16 * unit, 16), expected)


def test_taking_candidates_by_number_gives_what_reading_gives():
    whole = Stream(samples(), seed=3).read(0, 200)
    stream = Stream(samples(), seed=3)
    for numbers in ([7], [199, 0, 64, 65, 3], [5, 5], list(range(0, 200, 3))):
        positions = torch.tensor(numbers)
        assert equal(stream.take(positions), {name: values[positions] for name, values in whole.items()})


@pytest.mark.parametrize("subset", [1.0, 0.3])
def test_ids_say_which_training_sample_each_candidate_is(subset):
    stream = Stream(samples(), seed=2, subset=subset)
    for start, count in ((0, 37), (30, 20), (1000, 1)):
        assert torch.equal(stream.ids(start, count), stream.read(start, count)["number"])


def test_an_epoch_shows_every_sample_once_and_the_next_in_another_order():
    stream = Stream(samples(), seed=0)
    first, second = stream.ids(0, 37).tolist(), stream.ids(37, 37).tolist()
    assert sorted(first) == sorted(second) == list(range(37))
    assert first != second


def test_every_epoch_of_a_subset_is_a_fresh_share_of_the_samples():
    stream = Stream(samples(rows=100), seed=0, subset=0.3)
    assert stream.epoch == 30
    epochs = [set(stream.ids(30 * number, 30).tolist()) for number in range(20)]
    assert all(len(epoch) == 30 for epoch in epochs)
    assert len(set(map(frozenset, epochs))) == 20
    # After 20 epochs a sample was left out with odds of 0.7 ** 20 = 0.0008.
    assert len(set.union(*epochs)) >= 97


@pytest.mark.parametrize("subset", [0.0, -0.5, 1.5, 0.01])
def test_a_subset_that_is_no_share_or_holds_no_sample_is_refused(subset):
    with pytest.raises(ValueError, match=rf"subset must be a share in \(0, 1\].*37 training samples, got {subset}"):
        Stream(samples(), seed=0, subset=subset)


def test_seeds_give_different_orders_and_equal_seeds_the_same():
    first, again, other = (Stream(samples(), seed=seed).read(5, 9) for seed in (1, 1, 2))
    assert equal(first, again)
    assert not torch.equal(first["input_ids"], other["input_ids"])


def test_a_stream_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    Stream(samples(), seed=1, subset=0.5).read(0, 50)
    assert torch.equal(torch.get_rng_state(), before)


BUILDERS = {
    "bert": lambda seed: build_bert(vocab_size=50, length=16, layers=2, width=32, seed=seed),
    "llama": lambda seed: build_llama(vocab_size=50, length=16, layers=2, width=32, seed=seed),
    "classifier": lambda seed: build_bert_classifier(
        classes=3, vocab_size=50, length=16, layers=2, width=32, seed=seed
    ),
    "vit": lambda seed: build_vit(size=8, channels=1, patch=2, classes=10, layers=2, width=32, seed=seed),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_building_a_model_leaves_the_global_generator_alone_and_depends_on_the_seed_alone(name):
    before = torch.get_rng_state()
    first, second, other = (BUILDERS[name](seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not equal(dict(first.state_dict()), dict(other.state_dict()))
    assert first.training
    # Nothing is dropped: training mode is as deterministic as evaluation mode.
    assert not [module for module in first.modules() if isinstance(module, torch.nn.Dropout) and module.p]


@pytest.mark.parametrize("build", [build_bert, build_llama])
def test_width_that_does_not_divide_into_heads_is_refused(build):
    with pytest.raises(ValueError, match="multiple of 32"):
        build(vocab_size=50, length=16, layers=2, width=40, seed=0)


def test_bert_base_shape_has_110_million_parameters():
    with torch.device("meta"):
        model = build_bert(vocab_size=30_522, length=512, layers=12, width=768, seed=0)
    assert 109e6 < sum(parameter.numel() for parameter in model.parameters()) < 111e6
