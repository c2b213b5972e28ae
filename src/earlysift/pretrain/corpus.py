"""Texts in, labelled or not, split documents out: files, folders, data sets on the hub, Python's standard library."""

import csv
import gzip
import hashlib
import importlib
import json
import os
import platform
import re
import sysconfig
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

_VALIDATION_ONE_IN = 20
# A plain text document ends at the first blank line after the first number of characters, or, in a text
# with hardly a blank line, at the first line end after the second: else a novel would be one document.
_DOCUMENT_CHARACTERS = 2_000
_DOCUMENT_CHARACTERS_WITHOUT_BLANK_LINE = 20_000
_ENOUGH_DOCUMENTS = 100  # one in 20 misses validation altogether with odds of 0.95 ** 100, under 1 in 150

_TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".tex", ".py"})
# An empty field is a missing one, but the words "NA", "null" and "None" are text.
_CSV = {"keep_default_na": False, "na_values": [""]}
# Suffix -> what `datasets.load_dataset` is to be told. Tab-separated files know no quotes: in SST-2 and its
# like a lone quote mark would silently swallow every line up to the next one.
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
_BINARY = frozenset({"parquet", "arrow"})
# What `datasets.save_to_disk` writes beside the rows: files of no text.
_SAVED = ("state.json", "dataset_info.json")
_STDLIB_SUFFIXES = frozenset({".py", ".txt", ".rst"})
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_ABOUT_THE_DATA = re.compile(r"(readme|licen[cs]e)(?![a-z])|dataset_(dict|infos?)\.json$", re.IGNORECASE)
# "train.txt", "train-00000-of-00002.parquet", "dev/a.txt"; but not "trainspotting.txt" or "developers.md".
_PART_NAMES = {
    "train": re.compile(r"train(ing)?(?![a-z])", re.IGNORECASE),
    "validation": re.compile(r"(valid|validation|val|dev)(?![a-z])", re.IGNORECASE),
    "test": re.compile(r"test(ing)?(?![a-z])", re.IGNORECASE),
}

_LABEL = "label"
_HUB_NAME = re.compile(r"(?P<repository>\w[\w.-]*(/\w[\w.-]*)?)(:(?P<configuration>\w[\w.-]*))?")
_HUB_PATIENCE_S = 10

Item = TypeVar("Item")


@dataclass(frozen=True)
class Corpus:
    """Documents in two parts.

    >>> corpus = Corpus("two lines", train=["To be, or not to be"], validation=["that is the question"])
    >>> len(corpus.fingerprint)
    64
    """

    name: str
    train: list[str]
    validation: list[str]

    @cached_property
    def fingerprint(self) -> str:
        """The sha256, in hex, of the documents, their borders and their split; the name does not count."""
        digest = hashlib.sha256()
        for part in (self.train, self.validation):
            digest.update(len(part).to_bytes(8))
            for document in part:
                encoded = document.encode()
                digest.update(len(encoded).to_bytes(8))
                digest.update(encoded)
        return digest.hexdigest()


@dataclass(frozen=True)
class Split:
    """A split of a data set on the Hugging Face hub: a `datasets.Dataset`, or IterableDataset, and its name."""

    name: str
    table: Any

    def __str__(self) -> str:
        return self.name


Source = Path | Split
"""What documents are read from: a file, a folder that `datasets.save_to_disk` wrote, or a split on the hub."""


@dataclass(frozen=True)
class LabelledCorpus:
    """Texts in two parts, and the name of the class of each."""

    texts: Corpus
    train_labels: list[str]
    validation_labels: list[str]


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """Several corpora as one, named after all of them."""
    return Corpus(
        " + ".join(corpus.name for corpus in corpora),
        [document for corpus in corpora for document in corpus.train],
        [document for corpus in corpora for document in corpus.validation],
    )


def optional_package(name: str, *, extra: str) -> Any:
    """Import a package that only some uses need.

    Args:
        name: the package, as it is imported.
        extra: the extra of earlysift that installs it.

    Returns:
        The module.

    Raises:
        ImportError: the package is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"this needs the package {name!r}, which is not installed: pip install 'earlysift[{extra}]'"
        ) from error


def read_corpus(path: Path | None, *, text_column: str | None = None) -> Corpus:
    """Read the documents of a file, folder or data set and split them into training and validation part.

    Files may be plain text (.txt .text .md .rst .tex .py), JSON lines, CSV, TSV, Parquet or Arrow, each also as
    .gz or .zst; a folder that `datasets.save_to_disk` wrote counts as one. A table's text is the column that is
    named, else its column `text`, else its only column of strings. Plain text is cut at blank lines into documents
    of about two thousand characters.

    In a folder, read with all below it, files or folders whose name begins with the word train, and with
    validation, valid, val or dev, are the two parts, and nothing else counts. Without a validation file, one
    document in twenty, chosen by the hash of its text, is held out of the training files or, if no file is
    named so, of all files. README and LICENSE files, and hidden ones, are passed over.

    Where no such file is, `owner/name:configuration` (owner and configuration may be missing) is a data set on the
    Hugging Face hub; its splits belong to the parts by their names, as files do.

    Args:
        path: the file, folder or name; None for the standard library of the running Python.
        text_column: the column of tables that holds the text.

    Returns:
        The corpus, named like the path; the same text gives the same split everywhere.

    Raises:
        FileNotFoundError: nothing is there, or the data set cannot be fetched.
        ValueError: no text, not UTF-8, no such column, a damaged archive or table, or nothing left for validation.
    """
    if path is None:
        return stdlib_corpus()
    train, validation = _read_parts(path, partial(_read_file, text_column=text_column), _itself)
    return Corpus(path.resolve().name, train, validation)


def read_labelled(path: Path, *, text_column: str | None = None, label_column: str | None = None) -> LabelledCorpus:
    """Read the labelled texts of a table, or a folder of tables, and split them into training and validation part.

    Tables are JSON lines, CSV, TSV, Parquet or Arrow, each also as .gz or .zst, and folders that
    `datasets.save_to_disk` wrote. Rows that miss text or label are passed over. Files belong to the parts as in
    `read_corpus`; without a validation file one row in twenty, chosen by the hash of its text, is held out.

    Args:
        path: the file or folder.
        text_column: the column that holds the text; without it `text`, else the only other column of strings.
        label_column: the column that holds the label; without it `label`.

    Returns:
        The labelled texts, named like the path.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: no table, no such columns, a damaged file, or nothing left for validation.
    """
    read = partial(_read_labelled_file, text_column=text_column, label_column=label_column or _LABEL)
    train, validation = _read_parts(path, read, _first)
    texts = Corpus(path.resolve().name, [text for text, _ in train], [text for text, _ in validation])
    return LabelledCorpus(texts, [label for _, label in train], [label for _, label in validation])


def _itself(text: str) -> str:
    return text


def _first(pair: tuple[str, str]) -> str:
    return pair[0]


def _read_parts(
    path: Path, read: Callable[[Source], list[Item]], text_of: Callable[[Item], str]
) -> tuple[list[Item], list[Item]]:
    train_sources, validation_sources = sources_of(path)
    train = _read_items(train_sources, read, text_of, where=path)
    if validation_sources:
        return train, _read_items(validation_sources, read, text_of, where=path)
    return split_by_content(train, text_of, where=path)


def sources_of(path: Path, *, streaming: bool = False) -> tuple[list[Source], list[Source]]:
    """Find what the documents of a path are read from.

    Args:
        path: a file, a folder, or the name of a data set on the hub; what exists is no name.
        streaming: whether a data set is read from the hub in passing, or fetched first.

    Returns:
        The sources of the training and of the validation part; the second list may be empty.

    Raises:
        FileNotFoundError: nothing is there, or the data set cannot be fetched.
        ValueError: a folder without text, or with a validation part alone.
    """
    if path.is_dir():
        return _in_parts(_files_of(path), path)
    name = require_data(path)
    if name is None:
        return [path], []
    return _in_parts(_splits_of(path, name["repository"], name["configuration"], streaming), path)


def require_data(path: Path) -> "re.Match[str] | None":
    """See whether there are data at a path, or whether it can be the name of a data set on the hub; None: it exists.

    Raises:
        FileNotFoundError: neither.
    """
    if path.exists():
        return None
    name = _HUB_NAME.fullmatch(path.as_posix())
    if name is None or format_of(path):
        raise FileNotFoundError(
            f"{path}: expected a file or folder with data, but nothing is there; check the path (language modelling "
            "without one uses the standard library of this Python)"
        )
    return name


def _splits_of(path: Path, repository: str, configuration: str | None, streaming: bool) -> list[tuple[Path, Source]]:
    datasets = optional_package("datasets", extra="data")
    hub = optional_package("huggingface_hub", extra="data")
    try:
        if not datasets.config.HF_HUB_OFFLINE:  # asked for once, as `datasets` would try for half a minute
            hub.HfApi().dataset_info(repository, timeout=_HUB_PATIENCE_S)
        splits = datasets.load_dataset(repository, configuration, streaming=streaming)
    except Exception as error:  # the network raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"{path}: there is no such file or folder, and no data set of this name could be fetched from the Hugging "
            f"Face hub ({reason}); check the spelling and the network, or set HF_HUB_OFFLINE=1 if it was fetched before"
        ) from error
    return [(Path(name), Split(f"{path}, split {name}", table)) for name, table in splits.items()]


def stdlib_corpus() -> Corpus:
    """Read the standard library of the running Python: text that every machine has, some 12 MB.

    Returns:
        One document per .py, .txt and .rst file, tests left out, in the order of the paths. One file in
        twenty, chosen by the hash of its path, is held out for validation.

    Raises:
        FileNotFoundError: this Python came without the source of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[str]] = {True: [], False: []}
    for name in _stdlib_files(root):
        try:
            document = _decode((root / name).read_bytes(), root / name)
        except ValueError:  # a few sources declare another encoding
            continue
        if document.strip():
            parts[held_out(name)].append(document)
    if not all(parts.values()):
        raise FileNotFoundError(
            f"{root}: expected the source files of Python's standard library, found too few of them; give "
            "the path of a text file or folder instead"
        )
    name = f"Python {platform.python_version()} standard library"
    return Corpus(name, train=parts[False], validation=parts[True])


def _stdlib_files(root: Path) -> list[str]:
    files = []
    for folder, subfolders, names in os.walk(root):
        # Not to descend is what makes this fast: site-packages may hold far more than the library itself.
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        files += [Path(folder, name) for name in names if Path(name).suffix in _STDLIB_SUFFIXES]
    return sorted(file.relative_to(root).as_posix() for file in files)


def held_out(key: str) -> bool:
    """Tell whether a document belongs to the validation part, by the hash of its text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % _VALIDATION_ONE_IN == 0


def split_by_content(
    documents: list[Item], text_of: Callable[[Item], str], *, where: Path
) -> tuple[list[Item], list[Item]]:
    """Split documents by their text alone, so that a copy of a document never sits in both parts."""
    train: list[Item] = []
    validation: list[Item] = []
    for document in documents:
        (validation if held_out(text_of(document)) else train).append(document)
    if not train or not validation:
        empty = "validation" if train else "training"
        raise ValueError(
            f"{where}: too little text to hold out one document in {_VALIDATION_ONE_IN}: of {len(documents)} "
            f"found, none fell to {empty}; give {_ENOUGH_DOCUMENTS} documents or more (of plain text some "
            f"{_ENOUGH_DOCUMENTS * _DOCUMENT_CHARACTERS:,} characters), or a folder with a train.* and a "
            "validation.* file"
        )
    return train, validation


def _files_of(folder: Path) -> list[tuple[Path, Source]]:
    """Return the files of text and the saved data sets in a folder, behind their paths within it."""
    found: list[tuple[Path, Source]] = []
    saved = {state.parent for state in folder.rglob(_SAVED[0]) if is_saved(state.parent)}
    for path in [folder, *sorted(folder.rglob("*"))]:
        relative = path.relative_to(folder)
        hidden = any(name.startswith(".") for name in relative.parts)
        is_file = path.is_file() and not _ABOUT_THE_DATA.match(path.name) and saved.isdisjoint(path.parents)
        if not hidden and (path in saved or (is_file and format_of(path))):
            found.append((relative, path))
    if not found:
        raise ValueError(f"{folder}: expected files of text, found none; {_supported()}")
    return found


def _in_parts(named: Sequence[tuple[Path, Source]], where: Path) -> tuple[list[Source], list[Source]]:
    """Return the sources of the training and of the validation part; the second list may be empty."""
    parts = [(_part(name), source) for name, source in named]
    train = [source for part, source in parts if part == "train"]
    validation = [source for part, source in parts if part == "validation"]
    if validation and not train:
        raise ValueError(
            f"{where}: found a validation file ({validation[0].name}), but no file named train*; name the "
            "training files so"
        )
    return train or [source for _, source in parts], validation


def _part(relative: Path) -> str:
    """Return the part that a file belongs to: by its own name, else by that of the nearest folder."""
    for name in reversed(relative.parts):
        for part, pattern in _PART_NAMES.items():
            if pattern.match(name):
                return part
    return "unnamed"


def is_saved(path: Path) -> bool:
    """Tell whether a path is the folder of a data set that `datasets.save_to_disk` wrote."""
    return all((path / name).is_file() for name in _SAVED)


def open_saved(path: Path) -> Any:
    """Open the data set of such a folder; its rows stay on disk until they are read.

    Raises:
        ValueError: it is damaged.
    """
    datasets = optional_package("datasets", extra="data")
    try:
        return datasets.load_from_disk(str(path)).with_format(None)
    except Exception as error:  # it raises nearly anything
        raise ValueError(
            f"{path}: expected a data set that save_to_disk wrote, but {type(error).__name__}: {error}; save it again"
        ) from error


def is_table(path: Path) -> bool:
    """Tell whether a source is a table, and not plain text.

    Raises:
        ValueError: it is neither.
    """
    if is_saved(path):
        return True
    suffix = format_of(path)
    if not suffix:
        raise ValueError(f"{path}: expected a file of text, got one of unknown format; {_supported()}")
    return suffix in TABLES


def format_of(path: Path) -> str:
    """Return the suffix that tells a file's format, that of its compression set aside; empty if unknown."""
    name = path.with_suffix("") if path.suffix.lower() in _DECOMPRESS else path
    suffix = name.suffix.lower()
    return suffix if suffix in _TEXT_SUFFIXES or suffix in TABLES else ""


def _supported() -> str:
    formats = " ".join(sorted(_TEXT_SUFFIXES) + list(TABLES))
    compressed = f"each also compressed ({' '.join(_DECOMPRESS)})"
    return f"supported are {formats}, {compressed}, and folders that datasets.save_to_disk wrote"


def _read_items(
    sources: Sequence[Source], read: Callable[[Source], list[Item]], text_of: Callable[[Item], str], *, where: Path
) -> list[Item]:
    documents = [document for source in sources for document in read(source) if text_of(document).strip()]
    if not documents:
        names = ", ".join(source.name for source in sources[:3])
        raise ValueError(f"{where}: expected text, found none in {names}; is the file empty?")
    return documents


def _read_file(source: Source, *, text_column: str | None = None) -> list[str]:
    if isinstance(source, Path) and not is_table(source):
        return list(plain_documents(_decode(_decompressed(source), source).split("\n")))
    table = _read_table(source)
    if table is None:
        return []
    column = find_text_column(table.features, source, text_column)
    return [text for text in table.select_columns(column)[:][column] if text is not None]


def _read_labelled_file(path: Source, *, text_column: str | None, label_column: str) -> list[tuple[str, str]]:
    """Return the texts and labels of a table."""
    if isinstance(path, Path) and format_of(path) not in TABLES and not is_saved(path):
        raise ValueError(
            f"{path}: expected a table with a column of labels ({' '.join(TABLES)}, each also compressed), got a file "
            "of another format; for text without labels choose the task masked_lm or causal_lm"
        )
    table = _read_table(path)
    if table is None:
        return []
    if label_column not in table.features:
        raise ValueError(
            f"{path}: expected a column named {label_column!r}, found the columns {', '.join(table.features)}; rename "
            "the column that holds the label, or name it by label_column (--label-column)"
        )
    others = {name: feature for name, feature in table.features.items() if name != label_column}
    text = find_text_column(others, path, text_column)
    rows = table.select_columns([text, label_column])[:]
    pairs = zip(rows[text], rows[label_column], strict=True)
    return [(text, _label_name(label)) for text, label in pairs if text is not None and label is not None]


def _label_name(label: Any) -> str:
    """Return a label as text; whole numbers that a table holds as 1.0, for want of some labels, are 1."""
    whole = isinstance(label, float) and label.is_integer()
    return str(int(label) if whole else label)


def plain_documents(lines: Iterable[str]) -> Iterator[str]:
    """Cut a plain text, given by its lines, into documents."""
    document: list[str] = []
    characters = 0
    for line in lines:
        document.append(line)
        characters += len(line) + 1
        blank = not line.strip()
        if characters >= (_DOCUMENT_CHARACTERS if blank else _DOCUMENT_CHARACTERS_WITHOUT_BLANK_LINE):
            yield "\n".join(document).strip()
            document, characters = [], 0
    yield "\n".join(document).strip()


def _decode(raw: bytes, path: Path) -> str:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, but byte {error.start} ({raw[error.start]:#04x}) is not; convert "
            f"the file, for instance: iconv -f latin1 -t utf-8 {path.name}"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _decompressed(path: Path) -> bytes:
    raw = path.read_bytes()
    decompress = _DECOMPRESS.get(path.suffix.lower())
    if decompress is None:
        return raw
    try:
        return decompress(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path}: the archive ends too early or is damaged ({error}); download or compress it again"
        ) from error


def _unzstd(raw: bytes) -> bytes:
    """Decompress all frames of a .zst file.

    The package's own readers take a file that breaks off for one that ends, so each frame is asked.
    """
    zstandard = optional_package("zstandard", extra="data")
    decompressor = zstandard.ZstdDecompressor()
    chunk_bytes = 1 << 20  # a finished frame hands its rest back as a copy: keep that small
    pieces: list[bytes] = []
    frame = None
    for start in range(0, len(raw), chunk_bytes):
        rest = raw[start : start + chunk_bytes]
        while rest:
            frame = frame or decompressor.decompressobj()
            try:
                pieces.append(frame.decompress(rest))
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame is not complete")
    return b"".join(pieces)


_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.decompress, ".zst": _unzstd}


def _read_table(path: Source) -> Any:
    """Return a table as a Dataset; None if the file is empty."""
    if isinstance(path, Split):
        return path.table
    if is_saved(path):
        return open_saved(path)
    suffix = format_of(path)
    raw = _decompressed(path)
    kind, options = TABLES[suffix]
    text = "" if kind in _BINARY else _decode(raw, path)
    if kind not in _BINARY and not text.strip():
        return None
    datasets = optional_package("datasets", extra="data")
    # A copy under a plain name: `datasets` knows no .zst, takes [ and * in a path for a pattern, and its
    # own cache would keep every corpus ever read.
    with tempfile.TemporaryDirectory(prefix="earlysift-") as folder, _silent(datasets):
        copy = Path(folder) / f"table{suffix}"
        copy.write_bytes(raw)
        try:
            return datasets.load_dataset(
                kind,
                data_files=str(copy),
                split="train",
                cache_dir=folder,
                keep_in_memory=True,
                **options,
            )
        except Exception as error:  # it raises nearly anything, StopIteration included
            cause = error.__cause__ or error
            reason = (kind == "json" and _bad_json_line(text)) or f"{type(cause).__name__}: {cause}"
            reason = reason.splitlines()[0]
            raise ValueError(
                f"{path}: expected {_EXPECTED[kind]}, but {reason}; mend or leave out what is broken"
            ) from error


_EXPECTED = {
    "json": "one JSON object a line",
    "csv": "a table with a header line",
    "parquet": "a complete Parquet file",
    "arrow": "a complete Arrow file",
}


def find_text_column(features: Any, path: Source, named: str | None = None) -> str:
    """Return the name of the column of texts: the one that is named, else `text`, else the only one of strings."""
    types = {name: getattr(feature, "dtype", "nested") for name, feature in features.items()}
    strings = [name for name, dtype in types.items() if dtype in ("string", "large_string")]
    candidates = [named] if named else ["text"] if "text" in types else strings
    if len(candidates) != 1 or candidates[0] not in strings:
        found = ", ".join(f"{name} ({dtype})" for name, dtype in types.items())
        if named:
            raise ValueError(
                f"{path}: expected a column of strings named {named!r}, as text_column says; found the columns "
                f"{found}; name the one that holds the text"
            )
        raise ValueError(
            f"{path}: expected a column of strings named 'text', or just one column of strings; found the "
            f"columns {found}; rename the column that holds the text to 'text', or name it by text_column "
            "(--text-column)"
        )
    return candidates[0]


def _bad_json_line(text: str) -> str:
    """Say where JSON lines, or one JSON list, are malformed; empty if they are not."""
    for number, line in enumerate([text] if text.lstrip().startswith("[") else text.split("\n")):
        try:
            json.loads(line if line.strip() else "null")
        except json.JSONDecodeError as error:
            return f"line {number + error.lineno} is malformed ({error.msg}, column {error.colno})"
    return ""


@contextmanager
def _silent(datasets: Any) -> Iterator[None]:
    """Keep `datasets` from printing, and leave its global settings as they were."""
    bars = not datasets.are_progress_bars_disabled()
    verbosity = datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()
