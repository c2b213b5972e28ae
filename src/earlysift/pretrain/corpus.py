"""Texts in, labelled or not, split documents out: files, folders, data sets on the hub, Python's standard library."""

import hashlib
import os
import platform
import re
import sysconfig
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from earlysift.pretrain import formats
from earlysift.pretrain.optional import optional_package

_VALIDATION_ONE_IN = 20
_ENOUGH_DOCUMENTS = 100  # one in 20 misses validation altogether with odds of 0.95 ** 100, under 1 in 150

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
_HUB_TIMEOUT_S = 10

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
class LabelledCorpus:
    """Texts in two parts, and the name of the class of each."""

    texts: Corpus
    train_labels: list[str]
    validation_labels: list[str]


@dataclass(frozen=True)
class Split:
    """A split of a data set on the Hugging Face hub: a `datasets.Dataset`, or IterableDataset, and its name."""

    name: str
    table: Any

    def __str__(self) -> str:
        return self.name


Source = Path | Split
"""What documents are read from: a file, a folder that `datasets.save_to_disk` wrote, or a split on the hub."""


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """Several corpora as one, named after all of them."""
    return Corpus(
        " + ".join(corpus.name for corpus in corpora),
        [document for corpus in corpora for document in corpus.train],
        [document for corpus in corpora for document in corpus.validation],
    )


def read_corpus(path: Path | None, *, text_column: str | None = None) -> Corpus:
    """Read the documents of a file, folder or data set and split them into a training and a validation part.

    Files are plain text (.txt .text .md .rst .tex .py), JSON lines, CSV, TSV, Parquet or Arrow, each also as .gz or
    .zst; a folder that `datasets.save_to_disk` wrote counts as a file. The text of a table is the named column, else
    its column `text`, else its only column of strings. Plain text is cut at blank lines into documents of about two
    thousand characters.

    In a folder, read with all its subfolders, the training part is every file or folder whose name begins with train,
    and the validation part those that begin with validation, valid, val or dev; other files are ignored. Without a
    validation file, one document in twenty, chosen by the hash of its text, is held out of the training files or, if
    no file is named so, of all files. README, LICENSE and hidden files are ignored.

    A path that does not exist may be `owner/name:configuration` (owner and configuration are optional), a data set on
    the Hugging Face hub; the names of its splits decide on their parts as those of files do.

    Args:
        path: The file, folder or name; None for the standard library of the running Python.
        text_column: The column of tables that holds the text.

    Returns:
        The corpus, named like the path; the same text gives the same split everywhere.

    Raises:
        FileNotFoundError: If nothing is there, or the data set cannot be fetched.
        ValueError: If there is no text, no such column or nothing left for validation, or if a file is not UTF-8 or is
            damaged.
    """
    if path is None:
        return stdlib_corpus()
    train, validation = _read_parts(path, partial(_read_documents, text_column=text_column), str)
    return Corpus(path.resolve().name, train, validation)


def read_labelled(path: Path, *, text_column: str | None = None, label_column: str | None = None) -> LabelledCorpus:
    """Read the labelled texts of tables and split them into a training and a validation part, as `read_corpus` does.

    Rows without text or label are skipped.

    Args:
        path: The file or folder.
        text_column: The column that holds the text; without it `text`, else the only other column of strings.
        label_column: The column that holds the label; without it `label`.

    Returns:
        The labelled texts, named like the path.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If there is no table, no such column or nothing left for validation, or if a file is damaged.
    """
    read = partial(_read_pairs, text_column=text_column, label_column=label_column or _LABEL)
    train, validation = _read_parts(path, read, lambda pair: pair[0])
    texts = Corpus(path.resolve().name, [text for text, _ in train], [text for text, _ in validation])
    return LabelledCorpus(texts, [label for _, label in train], [label for _, label in validation])


def stdlib_corpus() -> Corpus:
    """Read the standard library of the running Python: text that every machine has, some 12 MB.

    Returns:
        One document per .py, .txt and .rst file without the tests, in the order of the paths. One file in twenty,
        chosen by the hash of its path, is held out for validation.

    Raises:
        FileNotFoundError: If this Python came without the source of its standard library.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: dict[bool, list[str]] = {True: [], False: []}
    for name in _stdlib_files(root):
        try:
            document = formats.decode((root / name).read_bytes(), root / name)
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
        # Not descending is what makes this fast: site-packages may hold far more than the library itself.
        subfolders[:] = [name for name in subfolders if name not in _NOT_STDLIB]
        files += [Path(folder, name) for name in names if Path(name).suffix in _STDLIB_SUFFIXES]
    return sorted(file.relative_to(root).as_posix() for file in files)


def held_out(key: str) -> bool:
    """Whether a document belongs to the validation part, by the hash of its text."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) % _VALIDATION_ONE_IN == 0


def split_by_content(
    documents: list[Item], text_of: Callable[[Item], str], *, where: Path
) -> tuple[list[Item], list[Item]]:
    """Split documents by their text alone, so that a copy of a document never sits in both parts.

    Raises:
        ValueError: If a part is empty.
    """
    train: list[Item] = []
    validation: list[Item] = []
    for document in documents:
        (validation if held_out(text_of(document)) else train).append(document)
    if not train or not validation:
        empty = "validation" if train else "training"
        raise ValueError(
            f"{where}: too little text to hold out one document in {_VALIDATION_ONE_IN}: of {len(documents)} "
            f"found, none fell to {empty}; give {_ENOUGH_DOCUMENTS} documents or more (of plain text some "
            f"{_ENOUGH_DOCUMENTS * formats.DOCUMENT_CHARACTERS:,} characters), or a folder with a train.* and a "
            "validation.* file"
        )
    return train, validation


def sources_of(path: Path, *, streaming: bool = False) -> tuple[list[Source], list[Source]]:
    """Find what the documents of a path are read from.

    Args:
        path: A file, a folder, or the name of a data set on the hub; a path that exists is never such a name.
        streaming: Whether to stream a data set from the hub, or to fetch it first.

    Returns:
        The sources of the training and of the validation part; the second list may be empty.

    Raises:
        FileNotFoundError: If nothing is there, or the data set cannot be fetched.
        ValueError: If a folder has no text, or a validation part alone.
    """
    if path.is_dir():
        return _in_parts(_files_of(path), path)
    name = require_data(path)
    if name is None:
        return [path], []
    return _in_parts(_splits_of(path, name["repository"], name["configuration"], streaming), path)


def require_data(path: Path) -> "re.Match[str] | None":
    """Check that data are at a path, or that it can be the name of a data set on the hub.

    Returns:
        The parts of the name; None if the path exists.

    Raises:
        FileNotFoundError: If it is neither.
    """
    if path.exists():
        return None
    name = _HUB_NAME.fullmatch(path.as_posix())
    if name is None or formats.format_of(path):
        raise FileNotFoundError(
            f"{path}: expected a file or folder with data, but nothing is there; check the path (language modelling "
            "without one uses the standard library of this Python)"
        )
    return name


def _files_of(folder: Path) -> list[tuple[Path, Source]]:
    """The files of text and the saved data sets in a folder, each behind its path within it."""
    found: list[tuple[Path, Source]] = []
    saved = {state.parent for state in folder.rglob(formats.SAVED_FILES[0]) if formats.is_saved(state.parent)}
    for path in [folder, *sorted(folder.rglob("*"))]:
        relative = path.relative_to(folder)
        hidden = any(name.startswith(".") for name in relative.parts)
        is_file = path.is_file() and not _ABOUT_THE_DATA.match(path.name) and saved.isdisjoint(path.parents)
        if not hidden and (path in saved or (is_file and formats.format_of(path))):
            found.append((relative, path))
    if not found:
        raise ValueError(f"{folder}: expected files of text, found none; {formats.supported()}")
    return found


def _splits_of(path: Path, repository: str, configuration: str | None, streaming: bool) -> list[tuple[Path, Source]]:
    """The splits of a data set on the hub, each behind its name."""
    datasets = optional_package("datasets", extra="data")
    hub = optional_package("huggingface_hub", extra="data")
    try:
        if not datasets.config.HF_HUB_OFFLINE:  # `datasets` itself would retry for half a minute
            hub.HfApi().dataset_info(repository, timeout=_HUB_TIMEOUT_S)
        splits = datasets.load_dataset(repository, configuration, streaming=streaming)
    except Exception as error:  # the network raises nearly anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"{path}: there is no such file or folder, and no data set of this name could be fetched from the Hugging "
            f"Face hub ({reason}); check the spelling and the network, or set HF_HUB_OFFLINE=1 if it was fetched before"
        ) from error
    return [(Path(name), Split(f"{path}, split {name}", table)) for name, table in splits.items()]


def _in_parts(named: Sequence[tuple[Path, Source]], where: Path) -> tuple[list[Source], list[Source]]:
    """The sources of the training and of the validation part; the second list may be empty."""
    parts = [(_part_of(name), source) for name, source in named]
    train = [source for part, source in parts if part == "train"]
    validation = [source for part, source in parts if part == "validation"]
    if validation and not train:
        raise ValueError(
            f"{where}: found a validation file ({validation[0].name}), but no file named train*; name the "
            "training files so"
        )
    return train or [source for _, source in parts], validation


def _part_of(relative: Path) -> str:
    """The part that a file belongs to: by its own name, else by that of the nearest folder."""
    matches = (part for name in reversed(relative.parts) for part, named in _PART_NAMES.items() if named.match(name))
    return next(matches, "unnamed")


def _read_parts(
    path: Path, read: Callable[[Source], list[Item]], text_of: Callable[[Item], str]
) -> tuple[list[Item], list[Item]]:
    def read_all(sources: Sequence[Source]) -> list[Item]:
        documents = [document for source in sources for document in read(source) if text_of(document).strip()]
        if not documents:
            names = ", ".join(source.name for source in sources[:3])
            raise ValueError(f"{path}: expected text, found none in {names}; is the file empty?")
        return documents

    train_sources, validation_sources = sources_of(path)
    train = read_all(train_sources)
    return (train, read_all(validation_sources)) if validation_sources else split_by_content(train, text_of, where=path)


def _read_documents(source: Source, *, text_column: str | None = None) -> list[str]:
    if isinstance(source, Path) and not formats.is_table(source):
        return list(formats.split_documents(formats.read_text(source).split("\n")))
    table = _table_of(source)
    if table is None:
        return []
    column = formats.find_text_column(table.features, source, text_column)
    return [text for text in table.select_columns(column)[:][column] if text is not None]


def _read_pairs(source: Source, *, text_column: str | None, label_column: str) -> list[tuple[str, str]]:
    """The texts of a table and their labels."""
    if isinstance(source, Path) and formats.format_of(source) not in formats.TABLES and not formats.is_saved(source):
        raise ValueError(
            f"{source}: expected a table with a column of labels ({' '.join(formats.TABLES)}, each also compressed), "
            "got a file of another format; for text without labels choose the task masked_lm or causal_lm"
        )
    table = _table_of(source)
    if table is None:
        return []
    if label_column not in table.features:
        raise ValueError(
            f"{source}: expected a column named {label_column!r}, found the columns {', '.join(table.features)}; "
            "rename the column that holds the label, or name it by label_column (--label-column)"
        )
    others = {name: feature for name, feature in table.features.items() if name != label_column}
    text = formats.find_text_column(others, source, text_column)
    rows = table.select_columns([text, label_column])[:]
    pairs = zip(rows[text], rows[label_column], strict=True)
    return [(text, _label_name(label)) for text, label in pairs if text is not None and label is not None]


def _table_of(source: Source) -> Any:
    return source.table if isinstance(source, Split) else formats.read_table(source)


def _label_name(label: Any) -> str:
    """A label as text; 1.0, as a column of whole numbers with gaps is read, is 1."""
    whole = isinstance(label, float) and label.is_integer()
    return str(int(label) if whole else label)
