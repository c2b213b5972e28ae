import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from earlysift.pretrain.corpus import Corpus, read_corpus
from earlysift.pretrain.tokens import SPECIAL_TOKENS, Blocks, character_tokenizer, load_blocks, train_tokenizer

tokenizers = pytest.importorskip("tokenizers")

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the corpora of {SHARED} are not here")

PAD, UNK, CLS, SEP, MASK = range(5)
SENTENCE = "the cat sat on a mat and saw the dog run over the hill to the old mill by the sea"
WORDS = SENTENCE.split()


def sentences(count: int) -> list[str]:
    """Return sentences with many words, and pieces of words, that are equally frequent."""
    return [
        " ".join(f"{WORDS[(number * step) % len(WORDS)]}{number % 97 * step:x}" for step in range(1, 20))
        for number in range(count)
    ]


CORPUS = Corpus("sentences", train=sentences(400), validation=sentences(60)[40:])


def blocks_of(corpus: Corpus, cache: Path, *, length: int = 16, vocab_size: int = 300) -> Blocks:
    return load_blocks(corpus, vocab_size=vocab_size, length=length, cache=cache)


def same(left: Blocks, right: Blocks) -> bool:
    tensors = torch.equal(left.train, right.train) and torch.equal(left.validation, right.validation)
    return tensors and (left.vocab_size, left.special, left.tokenizer_json) == (
        right.vocab_size,
        right.special,
        right.tokenizer_json,
    )


# The tokenizer


@pytest.mark.parametrize("vocab_size", [150, 777, 1_500])
def test_training_twice_gives_the_same_tokenizer(vocab_size: int) -> None:
    first, *others = (train_tokenizer(CORPUS.train, vocab_size).to_str() for _ in range(4))
    assert all(other == first for other in others)


def test_special_tokens_come_first_in_berts_order() -> None:
    tokenizer = train_tokenizer(CORPUS.train, 200)
    assert [tokenizer.id_to_token(index) for index in range(5)] == list(SPECIAL_TOKENS)
    assert not any(token.startswith("##") for token in map(str, tokenizer.get_added_tokens_decoder().values()))


def test_the_vocabulary_is_never_larger_than_asked_even_with_many_scripts() -> None:
    many = ["".join(map(chr, range(start, start + 50))) for start in range(0x400, 0x9000, 50)]
    for vocab_size in (100, 500, 4_096):
        vocabulary = train_tokenizer(CORPUS.train + many, vocab_size).get_vocab()
        assert len(vocabulary) <= vocab_size
        assert sorted(vocabulary.values()) == list(range(len(vocabulary)))


def test_a_token_of_characters_is_one_character_of_the_most_frequent() -> None:
    tokenizer = character_tokenizer(["aaa bb", "Éb\nc"], 9)  # é is e
    known = sorted(tokenizer.get_vocab(), key=tokenizer.token_to_id)
    assert known == [*SPECIAL_TOKENS, "a", "b", " ", "c"]
    text = "[MASK]\tAb, c"
    tokenizer.encode_special_tokens = True
    expected = [c if c in "ab c" else "[UNK]" for c in text.lower().replace("\t", " ")]
    assert tokenizer.encode(text, add_special_tokens=False).tokens == expected


def test_blocks_of_characters_hold_the_text_and_have_a_cache_entry_of_their_own(tmp_path: Path) -> None:
    words, letters = (
        load_blocks(CORPUS, vocab_size=100, length=16, characters=characters, cache=tmp_path)
        for characters in (False, True)
    )
    again = load_blocks(CORPUS, vocab_size=100, length=16, characters=True, cache=tmp_path)
    assert same(letters, again)
    assert not same(words, letters)
    tokenizer = tokenizers.Tokenizer.from_str(letters.tokenizer_json)
    body = "".join(tokenizer.decode(row[1:-1].tolist(), skip_special_tokens=False) for row in letters.train)
    assert "[SEP]".join(CORPUS.train).startswith(body)


def test_text_is_lowercased_and_pieces_join_to_the_words_again() -> None:
    tokenizer = train_tokenizer(CORPUS.train, 300)
    encoding = tokenizer.encode("The CAT sat", add_special_tokens=False)
    assert UNK not in encoding.ids
    assert tokenizer.decode(encoding.ids) == "the cat sat"


def test_training_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    train_tokenizer(CORPUS.train, 300)
    assert capfd.readouterr() == ("", "")


# The blocks


def test_blocks_have_the_length_and_their_special_tokens_in_place(tmp_path: Path) -> None:
    blocks = blocks_of(CORPUS, tmp_path)
    for part in (blocks.train, blocks.validation):
        assert part.dtype == torch.int32
        assert part.shape[1] == 16
        assert (part[:, 0] == CLS).all()
        assert (part[:, -1] == SEP).all()
        assert not torch.isin(part, torch.tensor([PAD, UNK, MASK])).any()
        assert int(part.max()) < blocks.vocab_size <= 300
    assert blocks.special == dict(zip(SPECIAL_TOKENS, range(5), strict=True))


def test_blocks_hold_the_documents_in_order_with_separators_and_drop_only_the_rest(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    blocks = blocks_of(CORPUS, tmp_path)
    tokenizer = tokenizers.Tokenizer.from_str(blocks.tokenizer_json)
    expected: list[int] = []
    for document in CORPUS.validation:
        expected += ([SEP] if expected else []) + tokenizer.encode(document, add_special_tokens=False).ids
    got = blocks.validation[:, 1:-1].flatten().tolist()
    assert got == expected[: len(got)]
    assert len(expected) - len(got) < 14


def test_a_document_that_spells_a_special_token_does_not_get_its_id(tmp_path: Path) -> None:
    loud = [f"{sentence} [MASK] [PAD]" for sentence in CORPUS.train]
    blocks = blocks_of(Corpus("loud", loud, loud), tmp_path)
    assert not torch.isin(blocks.train, torch.tensor([MASK, PAD])).any()


def test_documents_without_a_token_leave_no_separator(tmp_path: Path) -> None:
    between = [document for sentence in CORPUS.train for document in (sentence, "\u200b\u0301")]
    with_them = blocks_of(Corpus("between", between, between), tmp_path)
    without = blocks_of(Corpus("plain", CORPUS.train, CORPUS.train), tmp_path)
    assert torch.equal(with_them.train, without.train)


def test_neither_environment_nor_random_state_is_touched(tmp_path: Path) -> None:
    environment, state = dict(os.environ), torch.get_rng_state()
    blocks_of(CORPUS, tmp_path)
    blocks_of(CORPUS, tmp_path)
    assert dict(os.environ) == environment
    assert torch.equal(torch.get_rng_state(), state)


def test_data_loader_workers_forked_afterwards_print_no_warning(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "from torch.utils.data import DataLoader\n"
        "from earlysift.pretrain.corpus import Corpus\n"
        "from earlysift.pretrain.tokens import load_blocks\n"
        "text = ['so much depends upon a red wheel barrow'] * 300\n"
        f"blocks = load_blocks(Corpus('x', text, text), vocab_size=100, length=8, cache=Path({str(tmp_path)!r}))\n"
        "list(DataLoader(blocks.train, batch_size=64, num_workers=1, multiprocessing_context='fork'))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


# The cache


def test_the_second_call_reads_the_cache_and_trains_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = blocks_of(CORPUS, tmp_path)
    monkeypatch.setattr("earlysift.pretrain.tokens.train_tokenizer", None)
    assert same(blocks_of(CORPUS, tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 1


def test_corpus_vocabulary_size_and_length_have_entries_of_their_own(tmp_path: Path) -> None:
    other = Corpus("other", CORPUS.train, CORPUS.validation[1:])
    blocks_of(CORPUS, tmp_path)
    blocks_of(other, tmp_path)
    blocks_of(CORPUS, tmp_path, length=17)
    blocks_of(CORPUS, tmp_path, vocab_size=301)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("damage", ["emptied", "cut in half", "cut by a byte", "one bit flipped"])
def test_a_damaged_cache_entry_is_said_and_made_anew(tmp_path: Path, damage: str) -> None:
    first = blocks_of(CORPUS, tmp_path)
    (entry,) = tmp_path.iterdir()
    sound = entry.read_bytes()
    middle = len(sound) // 2
    flipped = bytes([sound[middle] ^ 1])
    entry.write_bytes(
        {
            "emptied": b"",
            "cut in half": sound[:middle],
            "cut by a byte": sound[:-1],
            "one bit flipped": sound[:middle] + flipped + sound[middle + 1 :],
        }[damage]
    )
    with pytest.warns(UserWarning, match=f"{entry.name}: this cache entry is damaged; encoding the text again"):
        again = blocks_of(CORPUS, tmp_path)
    assert same(again, first)
    assert same(blocks_of(CORPUS, tmp_path), first)  # and no warning any more


def test_a_cache_folder_that_cannot_be_written_is_said_once_and_not_fatal(tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("not a folder")
    with pytest.warns(UserWarning, match="cannot write to this cache folder") as caught:
        blocks = blocks_of(CORPUS, in_the_way / "cache")
    assert len(caught) == 1
    assert "XDG_CACHE_HOME" in str(caught[0].message)
    assert caught[0].filename == __file__
    assert len(blocks.train)


def test_a_run_that_dies_while_writing_leaves_no_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        blocks_of(CORPUS, tmp_path)
    assert not list(tmp_path.iterdir())


def test_runs_that_write_the_same_entry_at_once_all_succeed(tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: blocks_of(CORPUS, tmp_path), range(8)))
    assert all(same(result, results[0]) for result in results)
    assert len(list(tmp_path.iterdir())) == 1


def test_the_default_cache_is_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    load_blocks(CORPUS, vocab_size=300, length=16)
    assert len(list((tmp_path / "xdg" / "earlysift" / "blocks").iterdir())) == 1
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    load_blocks(CORPUS, vocab_size=300, length=16)
    assert len(list((tmp_path / ".cache" / "earlysift" / "blocks").iterdir())) == 1


# A given tokenizer


def vocab_txt(path: Path, *words: str) -> Path:
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    tokens = [*SPECIAL_TOKENS[::-1], *letters, *(f"##{letter}" for letter in letters), *words]
    path.write_text("\n".join(tokens) + "\n", encoding="utf-8")
    return path


def test_a_vocab_txt_keeps_its_own_ids(tmp_path: Path) -> None:
    file = vocab_txt(tmp_path / "vocab.txt", "cat")
    blocks = load_blocks(CORPUS, vocab_size=300, length=16, cache=tmp_path / "c", tokenizer_file=file)
    assert blocks.special == {"[MASK]": 0, "[SEP]": 1, "[CLS]": 2, "[UNK]": 3, "[PAD]": 4}
    assert blocks.vocab_size == 5 + 2 * 36 + 1
    assert (blocks.train[:, 0] == 2).all()


def test_a_cased_vocabulary_keeps_capitals(tmp_path: Path) -> None:
    text = ["Cat cat"] * 50
    corpus = Corpus("cased", text, text)
    cased = vocab_txt(tmp_path / "cased.txt", "Cat", "cat")
    blocks = load_blocks(corpus, vocab_size=300, length=8, cache=tmp_path / "c", tokenizer_file=cased)
    upper, lower = blocks.vocab_size - 2, blocks.vocab_size - 1
    assert blocks.train[0].tolist() == [2, upper, lower, 1, upper, lower, 1, 1]


def test_a_tokenizer_json_gives_the_blocks_of_its_origin_even_if_it_cuts_and_pads(tmp_path: Path) -> None:
    own = blocks_of(CORPUS, tmp_path / "c")
    tokenizer = train_tokenizer(CORPUS.train, 300)
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=50)
    file = tmp_path / "tokenizer.json"
    tokenizer.save(str(file))
    given = load_blocks(CORPUS, vocab_size=100, length=16, cache=tmp_path / "c", tokenizer_file=file)
    assert same(given, own)


def test_an_edited_tokenizer_file_is_not_mistaken_for_the_old_one(tmp_path: Path) -> None:
    file = vocab_txt(tmp_path / "vocab.txt")
    before = load_blocks(CORPUS, vocab_size=300, length=16, cache=tmp_path / "c", tokenizer_file=file)
    vocab_txt(file, "cat")
    after = load_blocks(CORPUS, vocab_size=300, length=16, cache=tmp_path / "c", tokenizer_file=file)
    assert after.vocab_size == before.vocab_size + 1


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"hello\nworld\n", r"\[PAD\] \[UNK\] \[CLS\] \[SEP\] \[MASK\] is missing"),
        (b'{"version": "1.0"}', r"expected a tokenizer\.json of the tokenizers library"),
        (b"\xff\xfe", "byte 0 is not UTF-8"),
    ],
)
def test_a_tokenizer_file_that_does_not_serve_is_refused_by_name(tmp_path: Path, content: bytes, expected: str) -> None:
    file = tmp_path / "vocab.txt"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=f"vocab.txt: .*{expected}"):
        load_blocks(CORPUS, vocab_size=300, length=16, cache=tmp_path / "c", tokenizer_file=file)


def test_a_missing_tokenizer_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.json: .*or give none to train a tokenizer"):
        load_blocks(CORPUS, vocab_size=300, length=16, cache=tmp_path, tokenizer_file=tmp_path / "no.json")


# What cannot be done


def test_a_length_without_room_for_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"blocks of 8 tokens or more, got length=7.*64 or 128 is usual"):
        blocks_of(CORPUS, tmp_path, length=7)


def test_a_vocabulary_without_room_for_characters_is_refused() -> None:
    with pytest.raises(ValueError, match=r"7 entries or more, got vocab_size=6; 64 suits"):
        character_tokenizer(CORPUS.train, 6)


def test_a_vocabulary_without_room_for_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"100 entries or more, got vocab_size=99.*4096 suits"):
        blocks_of(CORPUS, tmp_path, vocab_size=99)


@pytest.mark.parametrize("part", ["training", "validation"])
def test_a_text_too_short_for_one_block_is_refused_by_part(tmp_path: Path, part: str) -> None:
    texts = {"training": CORPUS.train, "validation": CORPUS.train, part: ["the cat"]}
    with pytest.raises(ValueError, match=rf"short: expected a {part} text of 126 tokens or more.*than 128"):
        blocks_of(Corpus("short", texts["training"], texts["validation"]), tmp_path, length=128)
    assert not list(tmp_path.iterdir())


def test_a_machine_without_tokenizers_is_told_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"'tokenizers'.*earlysift\[hf\]"):
        blocks_of(CORPUS, tmp_path)


# Real corpora


@needs_shared_data
def test_bert_reads_sst2_with_its_published_vocabulary(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    sst2 = read_corpus(SHARED / "sst2")
    blocks = load_blocks(
        Corpus("sst2", sst2.train[:1_000], sst2.validation),
        vocab_size=30_522,
        length=64,
        cache=tmp_path,
        tokenizer_file=SHARED / "bert-uncased-vocab" / "vocab.txt",
    )
    assert blocks.vocab_size == 30_522
    assert blocks.special == {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103}
    # "hide new secretions from the parental units [SEP]", as BERT's own tokenizer has it
    assert blocks.train[0, 1:10].tolist() == [5342, 2047, 3595, 8496, 2013, 1996, 18643, 3197, 102]
