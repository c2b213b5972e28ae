"""Corpora read in passing: documents and rows of stored ones, in an order that is the same for whoever reads."""

import gzip
import json
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from earlysift.pretrain.corpus import Corpus, _in_parts, _read_documents, _splits_of, held_out, read_corpus, sources_of
from earlysift.pretrain.masking import mask_tokens
from earlysift.pretrain.stream import Samples, Stream
from earlysift.pretrain.streaming import StreamingCorpus, _documents, first_part, training_documents
from earlysift.pretrain.tokens import load_blocks, packed_rows
from earlysift.pretrain.trainer import Candidates, unchanged

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
zstandard = pytest.importorskip("zstandard")

ALL = 10**9
TEXTS = [
    f"document {n} has the {n % 7}th [MASK] colour\nand a second line, with {'many ' * (n % 30)}words"
    for n in range(400)
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def write_plain(path):
    path.write_bytes(pack_as(path, ("\n\n".join(text * 40 for text in TEXTS)).encode()))


def write_lines(path):
    rows = [{"id": str(n), "text": text} for n, text in enumerate(TEXTS)] + [{"id": "no text", "text": None}]
    path.write_bytes(pack_as(path, "".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_csv(path):
    columns = {"words": TEXTS, "number": list(range(400)), "empty": [None] * 400}
    datasets.Dataset.from_dict(columns).to_csv(path, index=False)


def write_parquet(path):
    datasets.Dataset.from_dict({"words": TEXTS, "number": list(range(400))}).to_parquet(path)


def write_arrow(path):
    table = pyarrow.table({"number": list(range(400)), "words": TEXTS})
    with pyarrow.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)


def write_saved(path):
    """A data set in two shards, whose format shows its numbers only, as tensors."""
    columns = {"words": TEXTS, "number": list(range(400))}
    data_set = datasets.Dataset.from_dict(columns).with_format("torch", columns=["number"])
    data_set.save_to_disk(path, num_shards=2)


def pack_as(path, raw):
    half = len(raw) // 2
    packed = {
        ".gz": lambda: gzip.compress(raw),
        ".zst": lambda: zstandard.compress(raw[:half]) + zstandard.compress(raw[half:]),  # in two frames
    }
    return packed.get(path.suffix, lambda: raw)()


FILES = {
    "plain.txt": write_plain,
    "plain.md.gz": write_plain,
    "plain.txt.zst": write_plain,
    "lines.jsonl": write_lines,
    "lines.jsonl.gz": write_lines,
    "lines.json.zst": write_lines,
    "od[d] *name.jsonl": write_lines,
    "table.csv": write_csv,
    "table.parquet": write_parquet,
    "table.arrow": write_arrow,
    "saved": write_saved,
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_in_passing_gives_the_documents_of_a_stored_one(name, tmp_path):
    path = tmp_path / name
    FILES[name](path)
    stored, passing = read_corpus(path), first_part(path, ALL)
    assert (passing.train, passing.validation) == (stored.train, stored.validation)
    assert list(training_documents([path])) == stored.train
    assert len(stored.train) > 100
    assert passing.name == f"{name} in passing"


def test_byte_order_mark_and_line_ends_of_windows_are_no_text(tmp_path):
    text = "\n\n".join(text * 40 for text in TEXTS)
    (tmp_path / "windows.txt").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    stored, passing = read_corpus(tmp_path / "windows.txt"), first_part(tmp_path / "windows.txt", ALL)
    assert (passing.train, passing.validation) == (stored.train, stored.validation)
    assert stored.train[0].startswith(TEXTS[0])


def test_a_folder_in_passing_has_the_parts_of_a_stored_one(tmp_path):
    for name, texts in (("train-1", TEXTS[:200]), ("train-2", TEXTS[200:300]), ("dev", TEXTS[300:]), ("test", TEXTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    stored, passing = read_corpus(tmp_path), first_part(tmp_path, ALL)
    assert (passing.train, passing.validation) == (stored.train, stored.validation) == (TEXTS[:300], TEXTS[300:])
    assert list(training_documents([tmp_path])) == TEXTS[:300]


def test_a_saved_data_set_in_passing_has_the_parts_of_a_stored_one(tmp_path):
    parts = {"train": TEXTS[:300], "validation": TEXTS[300:], "test": TEXTS}
    sets = {name: datasets.Dataset.from_dict({"text": texts}) for name, texts in parts.items()}
    datasets.DatasetDict(sets).save_to_disk(tmp_path / "saved")
    stored, passing = read_corpus(tmp_path / "saved"), first_part(tmp_path / "saved", ALL)
    assert (passing.train, passing.validation) == (stored.train, stored.validation) == (TEXTS[:300], TEXTS[300:])
    assert list(training_documents([tmp_path / "saved"])) == TEXTS[:300]


@pytest.mark.parametrize("write", ["to_csv", "to_json", "to_parquet", "save_to_disk"])
def test_the_named_column_is_the_text_in_passing_as_stored(write, tmp_path):
    path = tmp_path / {"to_csv": "a.csv", "to_json": "a.jsonl", "to_parquet": "a.parquet", "save_to_disk": "a"}[write]
    getattr(datasets.Dataset.from_dict({"text": ["no"] * 400, "body": TEXTS}), write)(path)
    assert first_part(path, ALL, "body").train == read_corpus(path, text_column="body").train
    assert list(training_documents([path], "body")) == [text for text in TEXTS if not held_out(text)]
    with pytest.raises(
        ValueError, match=r"named 'words', .*found the columns text \(string\), body \(string\)"
    ) as caught:
        first_part(path, ALL, "words")
    assert str(path) in str(caught.value)


def test_only_the_first_part_is_read_and_held_out_documents_are_never_trained_on(tmp_path):
    write_lines(tmp_path / "a.jsonl")
    characters = sum(map(len, TEXTS[:150]))
    part = first_part(tmp_path / "a.jsonl", characters)
    assert sorted(part.train + part.validation) == sorted(TEXTS[:150])
    trained = list(training_documents([tmp_path / "a.jsonl"]))
    assert part.validation
    assert set(trained) == {text for text in TEXTS if not held_out(text)}
    assert set(trained).isdisjoint(part.validation)


def test_sources_take_turns_until_all_have_ended(tmp_path):
    for name, texts in (("a", ["1", "2", "3"]), ("b", ["x"]), ("c", ["p", "q"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        (tmp_path / name / "dev.jsonl").write_text('{"text": "held out"}\n')
    assert list(training_documents([tmp_path / name for name in "abc"])) == ["1", "x", "p", "2", "q", "3"]


BROKEN = {
    "bytes.txt": (b"good\n" * 3000 + b"\xff\xfe", "UnicodeDecodeError"),
    "cut.txt.gz": (gzip.compress("\n\n".join(TEXTS).encode())[:-20], "EOFError"),
    "cut.jsonl": (b'{"text": "a"}\n{"text": "b', "cut.jsonl: "),
    "columns.csv": (b"a,b\nx,y\n", r"found the columns a \(string\), b \(string\); rename"),
    "empty.txt": (b"", "too little text"),
    "unknown.bin": (b"", "got one of unknown format"),
    "cut.arrow": (b"ARROW1\0\0 but no more", "cut.arrow: "),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_source_that_cannot_be_read_is_named(name, tmp_path):
    content, message = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        first_part(tmp_path / name, ALL)
    assert str(tmp_path / name) in str(caught.value)


# Rows


@pytest.fixture
def blocks():
    return load_blocks(Corpus("texts", TEXTS, TEXTS[:20]), vocab_size=300, length=16)


def test_documents_in_passing_are_packed_as_stored_ones(blocks):
    rows = torch.stack(list(packed_rows(iter(TEXTS), blocks.tokenizer_json, 16)))
    assert torch.equal(rows, blocks.train)


@given(texts=st.lists(st.text("ab \n", max_size=40), max_size=30), portion=st.integers(1, 60))
def test_packing_does_not_depend_on_how_much_is_encoded_at_once(texts, portion):
    from earlysift.pretrain import tokens

    tokenizer = tokens.train_tokenizer(["ab a b " * 30], 100)
    special = {name: tokenizer.token_to_id(name) for name in tokens.SPECIAL_TOKENS}
    whole = tokens._pack(texts, tokenizer, special, 8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "_BATCH_CHARACTERS", portion)
        assert torch.equal(tokens._pack(texts, tokenizer, special, 8), whole)
    ids = [encoding.ids for encoding in map(tokenizer.encode, texts)]
    joined = [i for document in ids if document for i in (special["[SEP]"], *document)][1:]
    expected = [[2, *joined[start : start + 6], 3] for start in range(0, len(joined) - 5, 6)]
    assert whole.tolist() == expected


# Candidates

ROWS = torch.arange(5, 105).repeat_interleave(20).reshape(100, 20).int()


def prepare(rows, generator):
    batch = mask_tokens(rows["input_ids"], mask_id=4, vocab_size=200, first_ordinary_id=5, generator=generator)
    return {**batch, "number": rows["input_ids"][:, 0]}


def passing(seed=0, buffer=30):
    return StreamingCorpus(lambda: iter(ROWS), prepare, seed=seed, buffer=buffer)


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("buffer", [1, 30, 99, 100, 1000])
def test_every_pass_shows_every_row_once_in_another_order(buffer):
    numbers = passing(buffer=buffer).take(torch.arange(300))["number"].reshape(3, 100)
    assert all(sorted(epoch) == list(range(5, 105)) for epoch in numbers.tolist())
    assert len(set(map(tuple, numbers.tolist()))) == 3
    other = passing(seed=1, buffer=buffer).take(torch.arange(100))["number"]
    assert not torch.equal(other, numbers[0])


def test_no_row_comes_earlier_than_the_buffer_allows():
    places = passing(buffer=30).take(torch.arange(100))["number"] - 5
    assert (places <= torch.arange(100) + 30).all()
    assert (places - torch.arange(100)).abs().double().mean() > 10  # shuffled, it is


def test_numbers_give_the_same_candidates_in_whatever_order_and_portions():
    whole = passing().take(torch.arange(400))
    stream = passing()
    for numbers in ([7], [399, 0, 64, 65, 3], [5, 5], list(range(0, 400, 3)), [0], list(range(100, 130))):
        positions = torch.tensor(numbers)
        assert equal(stream.take(positions), {name: values[positions] for name, values in whole.items()})


def test_masks_are_those_of_a_stored_stream():
    """Of the same seed and candidate number; only the order of rows is another."""
    same = torch.full((100, 20), 9, dtype=torch.int32)
    stored = Stream(Samples({"input_ids": same}, {}, prepare), seed=3)
    in_passing = StreamingCorpus(lambda: iter(same), prepare, seed=3)
    assert equal(in_passing.take(torch.arange(250)), stored.take(torch.arange(250)))


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_candidates_do_not_depend_on_workers(workers, tmp_path, blocks):
    for number in range(3):  # several files are what `datasets` would share out among workers
        rows = TEXTS[100 * number : 100 * number + 100]
        (tmp_path / f"{number}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    stream = StreamingCorpus(
        lambda: packed_rows(training_documents([tmp_path]), blocks.tokenizer_json, 16), prepare, seed=0, buffer=50
    )
    context = {"multiprocessing_context": "fork"} if workers else {}
    loader = DataLoader(
        Candidates(stream.take, 960), batch_size=24, num_workers=workers, collate_fn=unchanged, **context
    )
    read = list(loader)
    whole = StreamingCorpus(stream._rows, prepare, seed=0, buffer=50).take(torch.arange(960))
    assert equal({name: torch.cat([batch[name] for batch in read]) for name in whole}, whole)


# The hub


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A folder that is laid out as a repository of the hub, and may be loaded without a network."""
    folder = tmp_path / "repository"
    folder.mkdir()
    for name, texts in (("train-0", TEXTS[:200]), ("train-1", TEXTS[200:300]), ("dev", TEXTS[300:]), ("other", TEXTS)):
        datasets.Dataset.from_dict({"words": texts, "n": list(range(len(texts)))}).to_parquet(
            folder / f"{name}.parquet"
        )
    (folder / "README.md").write_text("""---
configs:
- config_name: parts
  data_files:
  - {split: train, path: train-*.parquet}
  - {split: validation, path: dev.parquet}
  - {split: test, path: other.parquet}
- config_name: whole
  data_files: other.parquet
---
""")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return str(folder)


@pytest.mark.parametrize("streaming", [False, True])
def test_splits_of_a_data_set_are_parts_by_their_names(streaming, repository):
    def documents(split):
        return list(_documents([split])) if streaming else _read_documents(split)

    splits = _splits_of(Path("owner/name:parts"), repository, "parts", streaming)
    train, validation = _in_parts(splits, Path("owner/name:parts"))
    assert [str(split) for split in train] == ["owner/name:parts, split train"]
    assert [documents(*part) for part in (train, validation)] == [TEXTS[:300], TEXTS[300:]]
    ((whole,), none) = _in_parts(_splits_of(Path("name"), repository, "whole", streaming), Path("name"))
    assert documents(whole) == TEXTS
    assert none == []


def test_a_configuration_that_is_missing_is_named_with_those_there_are(repository):
    with pytest.raises(FileNotFoundError, match=r"^owner/name: there is no .*parts.*whole"):
        _splits_of(Path("owner/name"), repository, None, streaming=True)


@pytest.mark.parametrize("name", ["nobody-0-nothing", "nobody-0/nothing.1", "nobody-0/nothing:plain-v1"])
def test_a_data_set_that_cannot_be_fetched_is_refused_in_one_message(name, record_property):
    began_s = time.perf_counter()
    with pytest.raises(
        FileNotFoundError, match=rf"^{name}: there is no such file or folder, and no data set"
    ) as caught:
        sources_of(Path(name))
    assert "\n" not in str(caught.value)
    record_property("seconds", time.perf_counter() - began_s)


@pytest.mark.parametrize("name", ["missing.txt", "missing/train.jsonl.gz", "/missing", "a/b/c", "a b", "../missing"])
def test_what_is_neither_path_nor_name_is_a_missing_file(name):
    with pytest.raises(FileNotFoundError, match="expected a file or folder with data, but nothing is there"):
        sources_of(Path(name))


def test_a_path_that_exists_is_no_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("owner/name").mkdir(parents=True)
    Path("owner/name/a.txt").write_text("here")
    assert sources_of(Path("owner/name"), streaming=True) == ([Path("owner/name/a.txt")], [])
