import gzip
import json
import random
import sys
from pathlib import Path

import pytest

from earlysift.pretrain.corpus import Corpus, read_corpus, stdlib_corpus
from earlysift.pretrain.optional import optional_package

SHARED = Path(__file__).parents[2] / "shared" / "data"
needs_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the corpora of {SHARED} are not here")


def prose(documents: int, *, first: int = 0) -> str:
    """Return plain text that is cut into so many documents, each different."""
    paragraphs = (f"Paragraph {number}. " + "It says no more. " * 120 for number in range(first, first + documents))
    return "\n\n".join(paragraphs) + "\n"


def rows(count: int) -> list[dict[str, object]]:
    return [{"label": number % 2, "text": f"sentence number {number}"} for number in range(count)]


def json_lines(count: int) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows(count))


def zst(data: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    compressed: bytes = zstandard.ZstdCompressor().compress(data)
    return compressed


def message(path: Path) -> str:
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read_corpus(path)
    text = str(caught.value)
    assert "\n" not in text
    return text


# The corpus itself


def test_fingerprint_depends_on_borders_order_and_split_but_not_on_the_name() -> None:
    corpora = [
        Corpus("a", ["xy", "z"], ["v"]),
        Corpus("a", ["x", "yz"], ["v"]),
        Corpus("a", ["z", "xy"], ["v"]),
        Corpus("a", ["xy"], ["z", "v"]),
        Corpus("a", ["xyz"], ["v"]),
    ]
    assert len({corpus.fingerprint for corpus in corpora}) == len(corpora)
    assert Corpus("b", ["xy", "z"], ["v"]).fingerprint == corpora[0].fingerprint


def test_a_missing_package_is_named_with_the_extra_that_brings_it() -> None:
    with pytest.raises(ImportError, match=r"'no_such_package'.*pip install 'earlysift\[data\]'"):
        optional_package("no_such_package", extra="data")


# The standard library


def test_no_path_reads_the_standard_library_the_same_each_time() -> None:
    corpus = read_corpus(None)
    assert corpus.fingerprint == stdlib_corpus().fingerprint
    assert corpus.name == "Python {}.{}.{} standard library".format(*sys.version_info)
    assert sum(map(len, corpus.train)) > 5_000_000
    assert sum(map(len, corpus.validation)) > 50_000
    assert not set(corpus.train) & set(corpus.validation)


def test_the_standard_library_holds_neither_tests_nor_installed_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(200):
        (tmp_path / f"module{number}.py").write_text(f"kept = {number}\n")
    for folder in ("site-packages", "dist-packages", "__pycache__", "test", "email/tests", "idlelib/idle_test"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "left_out.py").write_text("left out")
    (tmp_path / "latin.py").write_bytes("# -*- coding: latin-1 -*- left out \xe9".encode("latin-1"))
    (tmp_path / "code.so").write_text("left out")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    corpus = stdlib_corpus()
    documents = corpus.train + corpus.validation
    assert len(documents) == 200
    assert all(document.startswith("kept") for document in documents)


def test_a_python_without_library_sources_is_refused_with_the_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(FileNotFoundError, match="give the path of a text file or folder instead"):
        stdlib_corpus()


# Plain text


def test_plain_text_is_cut_at_blank_lines_and_loses_no_paragraph(tmp_path: Path) -> None:
    file = tmp_path / "novel.txt"
    file.write_text(prose(200))
    corpus = read_corpus(file)
    documents = corpus.train + corpus.validation
    assert len(documents) == 200
    assert all(document.count("Paragraph") == 1 for document in documents)
    assert 1 <= len(corpus.validation) <= 30
    assert corpus.name == "novel.txt"


def test_short_paragraphs_are_joined_to_documents_of_two_thousand_characters(tmp_path: Path) -> None:
    file = tmp_path / "notes.md"
    file.write_text("\n\n".join(f"note {number} " + "x" * 90 for number in range(5_000)))
    corpus = read_corpus(file)
    sizes = [len(document) for document in corpus.train + corpus.validation]
    assert sorted(sizes)[1] >= 1_998  # the last one alone may be shorter
    assert max(sizes) < 2_200


def test_text_without_blank_lines_is_cut_at_line_ends(tmp_path: Path) -> None:
    file = tmp_path / "lines.txt"
    lines = [f"line {number} " + "x" * 100 for number in range(30_000)]
    file.write_text("\n".join(lines))
    corpus = read_corpus(file)
    documents = corpus.train + corpus.validation
    assert len(documents) > 100
    assert sorted(line for document in documents for line in document.split("\n")) == sorted(lines)


def test_the_split_goes_by_content_so_that_copies_stay_together(tmp_path: Path) -> None:
    file = tmp_path / "twice.txt"
    file.write_text(prose(150) + "\n" + prose(150))
    corpus = read_corpus(file)
    assert len(corpus.train) + len(corpus.validation) == 300
    assert not set(corpus.train) & set(corpus.validation)
    more = tmp_path / "more.txt"
    more.write_text(prose(400))
    assert set(corpus.validation) <= set(read_corpus(more).validation)


def test_windows_line_ends_and_byte_order_mark_change_nothing(tmp_path: Path) -> None:
    unix, windows = tmp_path / "unix.txt", tmp_path / "windows.txt"
    unix.write_bytes(prose(150).encode())
    windows.write_bytes(b"\xef\xbb\xbf" + prose(150).replace("\n", "\r\n").encode())
    assert read_corpus(unix).fingerprint == read_corpus(windows).fingerprint


# Compression


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zst)])
def test_a_compressed_file_reads_like_the_plain_one(tmp_path: Path, suffix: str, compress) -> None:
    plain, packed = tmp_path / "a.txt", tmp_path / f"a.txt{suffix}"
    half = len(prose(150)) // 2
    plain.write_text(prose(150))
    # Two frames (gzip: members) one after the other are one archive.
    packed.write_bytes(compress(prose(150)[:half].encode()) + compress(prose(150)[half:].encode()))
    assert read_corpus(packed).fingerprint == read_corpus(plain).fingerprint


def test_a_zst_frame_larger_than_a_chunk_and_skippable_frames_are_read(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    noise = random.Random(0).randbytes(1_500_000).hex()
    text = "\n".join(noise[start : start + 100] for start in range(0, len(noise), 100))
    skippable = b"\x50\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"index"
    frame = zstandard.ZstdCompressor(level=1, write_content_size=False).compress(text.encode())
    file = tmp_path / "noise.txt.zst"
    file.write_bytes(skippable + frame + frame + skippable)
    assert len(frame) > 1 << 20
    corpus = read_corpus(file)
    characters = sum(len(document.replace("\n", "")) for document in corpus.train + corpus.validation)
    assert characters == 2 * len(noise)


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".zst", zst)])
@pytest.mark.parametrize("cut", ["in the first frame", "in the second frame", "in a header", "last byte"])
def test_a_truncated_archive_is_refused_with_the_files_name(tmp_path: Path, suffix: str, compress, cut: str) -> None:
    frame = compress(prose(150).encode())
    content = {
        "in the first frame": frame[: len(frame) // 2],
        "in the second frame": frame + frame[: len(frame) // 2],
        "in a header": frame + frame[:3],
        "last byte": (frame + frame)[:-1],
    }[cut]
    file = tmp_path / f"broken.txt{suffix}"
    file.write_bytes(content)
    text = message(file)
    assert str(file) in text
    assert "ends too early or is damaged" in text
    assert "download or compress it again" in text


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_file_that_is_no_archive_is_refused_with_the_files_name(tmp_path: Path, suffix: str) -> None:
    if suffix == ".zst":
        pytest.importorskip("zstandard")
    file = tmp_path / f"page.txt{suffix}"
    file.write_text("<html>404 not found</html>")
    text = message(file)
    assert str(file) in text
    assert "damaged" in text


def test_a_file_without_zstandard_installed_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    file = tmp_path / "a.txt.zst"
    file.write_bytes(b"anything")
    with pytest.raises(ImportError, match=r"'zstandard'.*earlysift\[data\]"):
        read_corpus(file)


# Tables


TABLE_FILES = ["rows.jsonl", "rows.json", "rows.csv", "rows.tsv", "rows.parquet", "rows.arrow", "rows.jsonl.gz"]


@pytest.mark.parametrize("name", TABLE_FILES)
def test_every_table_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    datasets = pytest.importorskip("datasets")
    file = tmp_path / "[odd] *name?" / name
    file.parent.mkdir()
    separator = "\t" if ".tsv" in name else ","
    lines = "".join(f"{row['label']}{separator}{row['text']}\n" for row in rows(200))
    if name == "rows.parquet":
        datasets.Dataset.from_list(rows(200)).data.table.to_pandas().to_parquet(file)
    elif name == "rows.arrow":
        write_arrow(file, rows(200))
    elif name == "rows.json":
        file.write_text(json.dumps(rows(200)))  # one list, as many .json files are
    elif "jsonl" in name:
        file.write_bytes(gzip.compress(json_lines(200).encode()) if ".gz" in name else json_lines(200).encode())
    else:
        file.write_text(f"label{separator}text\n{lines}")
    corpus = read_corpus(file)
    assert sorted(corpus.train + corpus.validation) == sorted(str(row["text"]) for row in rows(200))
    assert corpus.validation


def write_arrow(file: Path, table: list[dict[str, object]], *, as_stream: bool = False) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    rows = pyarrow.Table.from_pylist(table)
    begin = pyarrow.ipc.new_stream if as_stream else pyarrow.ipc.new_file
    with begin(file, rows.schema) as writer:
        writer.write_table(rows)


@pytest.mark.parametrize("as_stream", [False, True])
def test_both_formats_of_arrow_files_are_read(tmp_path: Path, as_stream: bool) -> None:
    pytest.importorskip("datasets")
    write_arrow(tmp_path / "train.arrow", rows(20), as_stream=as_stream)
    write_arrow(tmp_path / "validation.arrow", rows(5), as_stream=as_stream)
    corpus = read_corpus(tmp_path)
    assert corpus.train == [row["text"] for row in rows(20)]
    assert corpus.validation == [row["text"] for row in rows(5)]


def test_a_saved_data_set_is_read_as_one_table_and_its_splits_are_the_parts(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    whole = datasets.Dataset.from_list(rows(200))
    whole.save_to_disk(tmp_path / "alone", num_shards=3)
    alone = read_corpus(tmp_path / "alone")
    assert sorted(alone.train + alone.validation) == sorted(str(row["text"]) for row in rows(200))
    parts = {"train": whole.select(range(150)), "validation": whole.select(range(150, 200)), "test": whole}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "splits")
    texts = [row["text"] for row in rows(200)]
    for folder in ("splits", "."):  # also from a folder around it, where nothing is read twice
        corpus = read_corpus(tmp_path / folder)
        assert (corpus.train, corpus.validation) == (texts[:150], texts[150:])


def test_rows_that_an_earlier_save_left_behind_do_not_count(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows(300)).save_to_disk(tmp_path, num_shards=3)
    datasets.Dataset.from_list(rows(150)).save_to_disk(tmp_path, num_shards=1)
    assert len(list(tmp_path.glob("*.arrow"))) == 4
    corpus = read_corpus(tmp_path)
    assert len(corpus.train + corpus.validation) == 150


def test_a_damaged_saved_data_set_is_refused_by_name(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list(rows(200)).save_to_disk(tmp_path / "saved")
    (file,) = (tmp_path / "saved").glob("*.arrow")
    file.write_bytes(file.read_bytes()[:1000])
    assert f"{tmp_path / 'saved'}: expected a data set that save_to_disk wrote, but " in message(tmp_path / "saved")
    file.unlink()
    assert "FileNotFoundError" in message(tmp_path / "saved")


def test_the_named_column_is_the_text(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": "no", "body": f"text {n}", "id": n}) + "\n" for n in range(150)))
    corpus = read_corpus(file, text_column="body")
    assert sorted(corpus.train + corpus.validation) == sorted(f"text {n}" for n in range(150))
    for name in ("title", "id"):  # missing, and of another type
        with pytest.raises(ValueError, match=f"named '{name}', as text_column says; found the columns ") as caught:
            read_corpus(file, text_column=name)
        assert all(part in str(caught.value) for part in (str(file), "text (string), body (string), id (int64)"))


def test_the_only_column_of_strings_is_the_text_whatever_its_name(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / "rows.tsv"
    file.write_text("label\tsentence\n" + "".join(f"1\tsentence {number}\n" for number in range(150)))
    assert "sentence 7" in read_corpus(file).train + read_corpus(file).validation


def test_words_that_look_like_missing_values_or_quotes_stay_text(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    odd = ["NA", "null", "nan", '"a quote that never closes', 'it \'s "quoted" inside']
    filler = [f"sentence {number}" for number in range(150)]
    file = tmp_path / "rows.tsv"
    file.write_text("label\tsentence\n" + "".join(f"1\t{text}\n" for text in odd + filler) + "1\t\n")
    corpus = read_corpus(file)
    assert sorted(corpus.train + corpus.validation) == sorted(odd + filler)


def test_reading_tables_leaves_no_files_and_no_settings_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    datasets = pytest.importorskip("datasets")
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home)
    before = (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity())
    file = tmp_path / "rows.jsonl"
    file.write_text(json_lines(200))
    read_corpus(file)
    file.write_text('{"text": "broken\n')
    message(file)
    assert (datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()) == before
    assert not list(home.iterdir())
    assert not list(temporary.iterdir())
    assert capfd.readouterr() == ("", "")


def test_a_malformed_json_line_is_named_by_its_number(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / "rows.jsonl"
    file.write_text(json_lines(30) + '\n{"text": "no end\n' + json_lines(30))
    text = message(file)
    assert str(file) in text
    assert "expected one JSON object a line" in text
    assert "line 32 is malformed" in text


def test_a_missing_text_column_is_refused_with_the_columns_found(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / "rows.csv"
    file.write_text("id,title,body\n" + "1,a,b\n" * 5)
    text = message(file)
    assert "expected a column of strings named 'text'" in text
    assert all(f"{column} (" in text for column in ("id", "title", "body"))
    assert "rename the column that holds the text to 'text'" in text


def test_a_text_column_that_is_not_text_is_refused_even_if_another_column_is(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / "rows.jsonl"
    file.write_text('{"title": "a", "text": ["b", "c"]}\n')
    assert "title (string), text (nested)" in message(file)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.parquet", b"PAR1 but no more", "a complete Parquet file"),
        ("rows.arrow", b"ARROW1 but no more", "a complete Arrow file"),
        ("rows.arrow", b"", "a complete Arrow file"),
        ("rows.csv", b"label,text\n1,a\n1,b,c,d\n", "a table with a header line"),
        ("rows.csv", b'label,text\n1,"never closed\n1,b\n', "a table with a header line"),
        ("rows.json", b'[{"text": "a"}, {"text": ', "one JSON object a line"),
    ],
)
def test_a_broken_table_is_refused_with_the_files_name(
    tmp_path: Path, name: str, content: bytes, expected: str
) -> None:
    pytest.importorskip("datasets")
    file = tmp_path / name
    file.write_bytes(content)
    text = message(file)
    assert str(file) in text
    assert f"expected {expected}" in text


# Folders


def test_train_and_validation_files_are_the_parts_and_nothing_else_counts(tmp_path: Path) -> None:
    files = {
        "train-00000-of-00002.txt": "one",
        "sub/Train.en.txt": "two",
        "validation.txt": "three",
        "sub/dev_2.md": "four",
        "valid/a.txt": "five",
        "test.txt": "left out",
        "trainspotting.txt": "left out",
        "developers.md": "left out",
        "books.tsv": "left out",
        "README.md": "left out",
        ".hidden/train.txt": "left out",
        "train.bin": "left out",
    }
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    corpus = read_corpus(tmp_path)
    assert sorted(corpus.train) == ["one", "two"]
    assert sorted(corpus.validation) == ["five", "four", "three"]
    assert corpus.name == tmp_path.name


def test_a_folder_without_validation_file_holds_out_training_documents_by_content(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(prose(150))
    (tmp_path / "test.txt").write_text(prose(5, first=1_000))
    corpus = read_corpus(tmp_path)
    assert len(corpus.train) + len(corpus.validation) == 150  # and nothing of test.txt
    alone = read_corpus(tmp_path / "train.txt")
    assert corpus.fingerprint == alone.fingerprint


def test_a_folder_of_any_names_is_split_by_content_test_files_too(tmp_path: Path) -> None:
    for number in range(150):
        (tmp_path / f"letter{number}.txt").write_text(f"Dear reader number {number}")
    (tmp_path / "test.txt").write_text("Dear examiner")
    (tmp_path / "LICENSE.txt").write_text("left out")
    corpus = read_corpus(tmp_path)
    documents = corpus.train + corpus.validation
    assert len(documents) == 151
    assert corpus.validation
    assert "left out" not in documents


def test_validation_files_without_training_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "valid.txt").write_text("text")
    (tmp_path / "corpus.txt").write_text("text")
    assert "found a validation file (valid.txt), but no file named train*" in message(tmp_path)


# What cannot be read


def test_a_missing_path_is_refused_with_the_way_out(tmp_path: Path) -> None:
    text = message(tmp_path / "nowhere.txt")
    assert "nowhere.txt" in text
    assert "check the path (language modelling without one uses the standard library of this Python)" in text


@pytest.mark.parametrize("content", ["", " \n\n\t\n"])
@pytest.mark.parametrize("name", ["empty.txt", "empty.jsonl", "empty.tsv"])
def test_an_empty_file_is_refused(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    assert f"expected text, found none in {name}; is the file empty?" in message(tmp_path / name)


def test_an_empty_training_file_in_a_folder_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("")
    (tmp_path / "validation.txt").write_text("text")
    assert "found none in train.txt" in message(tmp_path)


def test_a_folder_without_text_files_is_refused_with_the_formats(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("about nothing")
    (tmp_path / "image.png").write_bytes(b"")
    text = message(tmp_path)
    assert "expected files of text, found none" in text
    assert ".parquet" in text
    assert ".zst" in text


def test_a_file_of_unknown_format_is_refused_with_the_formats(tmp_path: Path) -> None:
    (tmp_path / "book.pdf.gz").write_bytes(gzip.compress(b"%PDF"))
    assert "one of unknown format; supported are .md" in message(tmp_path / "book.pdf.gz")


@pytest.mark.parametrize("name", ["latin.txt", "latin.jsonl"])
def test_text_that_is_not_utf8_is_refused_with_file_and_byte(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes('{"text": "caf\xe9"}'.encode("latin-1"))
    text = message(file)
    assert str(file) in text
    assert "expected UTF-8 text, but byte 13 (0xe9) is not" in text
    assert "iconv" in text


def test_too_little_text_to_hold_out_is_refused_with_what_is_needed(tmp_path: Path) -> None:
    file = tmp_path / "short.txt"
    file.write_text("One line.\n")
    text = message(file)
    assert "of 1 found, none fell to validation" in text
    assert "give 100 documents or more (of plain text some 200,000 characters)" in text
    assert "a train.* and a validation.* file" in text


# Real corpora


@needs_shared_data
def test_wikitext_is_read_in_its_own_split() -> None:
    corpus = read_corpus(SHARED / "wikitext-2")
    assert sum(map(len, corpus.train)) == pytest.approx(10_780_000, rel=0.01)
    assert sum(map(len, corpus.validation)) == pytest.approx(1_120_000, rel=0.01)


@needs_shared_data
def test_sst2_gives_one_document_a_sentence() -> None:
    pytest.importorskip("datasets")
    corpus = read_corpus(SHARED / "sst2")
    assert (len(corpus.train), len(corpus.validation)) == (67_349, 872)


@needs_shared_data
def test_a_held_out_book_file_is_read_whole_and_cut_at_line_ends() -> None:
    pytest.importorskip("zstandard")
    corpus = read_corpus(SHARED / "books-litbank" / "validation.txt.zst")
    documents = corpus.train + corpus.validation
    assert sum(map(len, documents)) == pytest.approx(2_830_000, rel=0.01)
    assert len(documents) > 100
