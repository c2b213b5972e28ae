"""Streamed corpora, for what is larger than memory: only a first part and the shuffle buffer stay in memory."""

import glob
import gzip
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import count, islice, zip_longest
from pathlib import Path
from typing import IO, Any

import torch
from torch import Generator, Tensor

from earlysift.pretrain import formats
from earlysift.pretrain.corpus import Corpus, Source, Split, held_out, sources_of, split_by_content
from earlysift.pretrain.optional import optional_package
from earlysift.pretrain.stream import UNIT, Rows, take
from earlysift.seeds import seeded

FIRST_CHARACTERS = 50_000_000
"""How much of a streamed corpus is read beforehand: some 10 million tokens, of which 4,000 rows of 128 are held out."""

_BUFFER_ROWS = 16_384
_TABLE_ROWS = 1_000  # read at a time


def first_part(path: Path, characters: int, text_column: str | None = None) -> Corpus:
    """Read the first documents of what `read_corpus` would read whole.

    Args:
        path: The file, folder, or name of a data set on the hub.
        characters: How much to read of a part, to the end of the document.
        text_column: The column of tables that holds the text.

    Returns:
        The corpus. Without a validation part of its own, one document in twenty is held out by the hash of its text;
        `training_documents` leaves out every document with such a hash.

    Raises:
        FileNotFoundError: If nothing is there, or a data set cannot be fetched.
        ValueError: If there is too little text, or it cannot be read.
    """
    train_sources, validation_sources = sources_of(path, streaming=True)
    train = list(_first(_documents(train_sources, text_column), characters))
    if validation_sources:
        validation = list(_first(_documents(validation_sources, text_column), characters))
    else:
        train, validation = split_by_content(train, str, where=path)
    return Corpus(f"{path.resolve().name} in passing", train, validation)


def training_documents(paths: Sequence[Path], text_column: str | None = None) -> Iterator[str]:
    """Read the training part of files, folders or data sets on the hub from beginning to end.

    Args:
        paths: Files, folders or names, which give a document each in turn until all have ended.
        text_column: The column of tables that holds the text.

    Yields:
        Documents.

    Raises:
        FileNotFoundError: If nothing is there, or a data set cannot be fetched.
        ValueError: If a source cannot be read.
    """
    for documents in zip_longest(*(_training_documents(path, text_column) for path in paths)):
        yield from (document for document in documents if document is not None)


class StreamingCorpus:
    """Candidates of a streamed corpus: as in `Stream`, candidate number n is the same whoever reads it.

    Rows are shuffled through a buffer, and the corpus begins anew when it ends. Read candidates in rising order: for a
    smaller number the corpus is read again from the beginning.

    Args:
        rows: Begins to read: gives the rows of the corpus in their order, int32 ``(T,)``; at least one.
        prepare: Turns stored rows and a generator into a batch with labels, as in `Samples`.
        seed: Seed of order and masks.
        buffer: Rows of the shuffle buffer; with as many as the corpus has, every order is equally likely.

    Example:
        >>> rows = lambda: iter(torch.arange(5).unsqueeze(1))
        >>> corpus = StreamingCorpus(rows, prepare=lambda rows, generator: rows, seed=0)
        >>> corpus.take(torch.arange(5))["input_ids"].flatten().sort().values
        tensor([0, 1, 2, 3, 4])
    """

    def __init__(
        self,
        rows: Callable[[], Iterator[Tensor]],
        prepare: Callable[[Rows, Generator], Rows],
        *,
        seed: int,
        buffer: int = _BUFFER_ROWS,
    ) -> None:
        self._rows = rows
        self._prepare = prepare
        self._seed = seed
        self._buffer = buffer
        self._reader: Iterator[Tensor] | None = None  # opened on the first read, so that workers share no position
        self._next = 0
        self._unit = lru_cache(maxsize=64)(self._make_unit)

    def take(self, positions: Tensor) -> Rows:
        """The candidates with these numbers, int64 ``(n,)``, in this order: a batch of n rows."""
        return take(self._unit, positions)

    def _make_unit(self, number: int) -> Rows:
        if self._reader is None or number < self._next:
            self._reader, self._next = self._read(), 0
        rows = next(islice(self._reader, number - self._next, None))
        self._next = number + 1
        return self._prepare({"input_ids": rows}, seeded(self._seed, "mask", number))

    def _read(self) -> Iterator[Tensor]:
        """Endless rows, ``UNIT`` at a time."""
        rows = (
            row
            for epoch in count()
            for row in _shuffled(self._rows(), self._buffer, seeded(self._seed, "order", epoch))
        )
        while True:
            yield torch.stack(list(islice(rows, UNIT)))


def _shuffled(rows: Iterable[Tensor], size: int, generator: Generator) -> Iterator[Tensor]:
    """Rows in random order, as far as a buffer of that size allows."""
    buffer: list[Tensor] = []
    for row in rows:
        buffer.append(row)
        if len(buffer) > size:
            drawn = int(torch.randint(len(buffer), (), generator=generator))
            buffer[drawn], buffer[-1] = buffer[-1], buffer[drawn]
            yield buffer.pop()
    for drawn in torch.randperm(len(buffer), generator=generator).tolist():
        yield buffer[drawn]


def _first(documents: Iterable[str], characters: int) -> Iterator[str]:
    for document in documents:
        yield document
        characters -= len(document)
        if characters <= 0:
            return


def _training_documents(path: Path, text_column: str | None) -> Iterator[str]:
    train_sources, validation_sources = sources_of(path, streaming=True)
    for document in _documents(train_sources, text_column):
        if validation_sources or not held_out(document):
            yield document


def _documents(sources: Sequence[Source], text_column: str | None = None) -> Iterator[str]:
    for source in sources:
        try:
            yield from (document for document in _read(source, text_column) if document.strip())
        except Exception as error:  # `datasets` and archives raise nearly anything
            if str(error).startswith(str(source)):
                raise
            cause = error.__cause__ or error
            raise ValueError(f"{source}: cannot be read to its end ({type(cause).__name__}: {cause})") from error


def _read(source: Source, text_column: str | None) -> Iterator[str]:
    if isinstance(source, Path) and not formats.is_table(source):
        with _lines(source) as lines:
            yield from formats.split_documents(line.rstrip("\n") for line in lines)
        return
    table = source.table if isinstance(source, Split) else _table(source)
    column = None
    # In batches: row by row `datasets` would give each worker of a loader another share.
    for batch in table.iter(_TABLE_ROWS):
        column = column or formats.find_text_column(table.features or _features(batch), source, text_column)
        yield from (text for text in batch[column] if text is not None)


def _lines(path: Path) -> IO[str]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8-sig")
    if suffix == ".zst":
        decompressor = optional_package("zstandard", extra="data").ZstdDecompressor()
        reader = decompressor.stream_reader(path.open("rb"), read_across_frames=True, closefd=True)
        return io.TextIOWrapper(reader, encoding="utf-8-sig")
    return path.open(encoding="utf-8-sig")


def _table(path: Path) -> Any:
    if formats.is_saved(path):
        return formats.open_saved(path)
    kind, options = formats.TABLES[formats.format_of(path)]
    datasets = optional_package("datasets", extra="data")
    return datasets.load_dataset(kind, data_files=glob.escape(str(path)), split="train", streaming=True, **options)


def _features(batch: dict[str, list[Any]]) -> Any:
    """The types of columns, which a CSV file shows only in its rows."""
    value = optional_package("datasets", extra="data").Value
    texts = {name: any(isinstance(cell, str) for cell in cells) for name, cells in batch.items()}
    return {name: value("string" if text else "null") for name, text in texts.items()}
