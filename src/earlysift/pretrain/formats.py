"""File formats: plain text and tables, compressed or not, and folders that `datasets.save_to_disk` wrote."""

import csv
import gzip
import io
import json
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from earlysift.pretrain.optional import optional_package

DOCUMENT_CHARACTERS = 2_000
"""A document of plain text ends at the first blank line after so many characters."""
# Text with hardly a blank line is cut at a line end instead: else a novel would be one document.
_DOCUMENT_CHARACTERS_WITHOUT_BLANK_LINE = 20_000

_TEXT_SUFFIXES = frozenset({".txt", ".text", ".md", ".rst", ".tex", ".py"})
# An empty field is a missing one, but the words "NA", "null" and "None" are text.
_CSV = {"keep_default_na": False, "na_values": [""]}
TABLES: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".jsonl": ("json", {}),
    ".csv": ("csv", _CSV),
    ".tsv": ("csv", {**_CSV, "sep": "\t", "quoting": csv.QUOTE_NONE}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
"""Suffix to format and options of `datasets.load_dataset`. Tab-separated files have no quotes: in SST-2 and its like a
lone quote mark would silently swallow every line up to the next one."""
_EXPECTED_CONTENT = {
    "json": "one JSON object a line",
    "csv": "a table with a header line",
    "parquet": "a complete Parquet file",
    "arrow": "a complete Arrow file",
}
_BINARY = frozenset({"parquet", "arrow"})
SAVED_FILES = ("state.json", "dataset_info.json")
"""What `datasets.save_to_disk` writes beside the rows."""
# Text takes 3 to 30 times its compressed size, gzip may reach 1,000 times, and Zstandard 30,000.
_MOST_TIMES = 200
_ALWAYS_PLAUSIBLE_BYTES = 1 << 27
_CHUNK_BYTES = 1 << 10  # 32 MiB, unpacked by the most that Zstandard can


def is_saved(path: Path) -> bool:
    """Whether a path is the folder of a data set that `datasets.save_to_disk` wrote."""
    return all((path / name).is_file() for name in SAVED_FILES)


def is_table(path: Path) -> bool:
    """Whether a path is a table, and not plain text.

    Raises:
        ValueError: If it is neither.
    """
    if is_saved(path):
        return True
    suffix = format_of(path)
    if not suffix:
        raise ValueError(f"{path}: expected a file of text, got one of unknown format; {supported()}")
    return suffix in TABLES


def format_of(path: Path) -> str:
    """The suffix of a file's format, without that of its compression; empty if the format is unknown."""
    name = path.with_suffix("") if path.suffix.lower() in _DECOMPRESS else path
    suffix = name.suffix.lower()
    return suffix if suffix in _TEXT_SUFFIXES or suffix in TABLES else ""


def supported() -> str:
    """The formats that can be read, for messages."""
    formats = " ".join(sorted(_TEXT_SUFFIXES) + list(TABLES))
    compressed = f"each also compressed ({' '.join(_DECOMPRESS)})"
    return f"supported are {formats}, {compressed}, and folders that datasets.save_to_disk wrote"


def read_text(path: Path) -> str:
    """The content of a text file, compressed or not.

    Raises:
        ValueError: If it is not UTF-8, or the archive is damaged.
    """
    return decode(_decompressed(path), path)


def decode(raw: bytes, path: Path) -> str:
    """UTF-8 as text, without byte order mark and with the line ends of Unix.

    Raises:
        ValueError: If it is not UTF-8.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected UTF-8 text, but byte {error.start} ({raw[error.start]:#04x}) is not; convert "
            f"the file, for instance: iconv -f latin1 -t utf-8 {path.name}"
        ) from error
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def require_plausible(unpacked_bytes: int, packed_bytes: int, path: Path, remedy: str) -> None:
    """Raise where a file unpacks to far more than text or images do, before memory runs out.

    Args:
        unpacked_bytes: What it is known to unpack to, at least.
        packed_bytes: Its own size.
        path: What the message calls it.
        remedy: What to do if that is meant.

    Raises:
        ValueError: If that is over 128 MiB and over 200 times its size.
    """
    if unpacked_bytes > max(_ALWAYS_PLAUSIBLE_BYTES, _MOST_TIMES * packed_bytes):
        raise ValueError(
            f"{path}: expected at most {_MOST_TIMES} times its {packed_bytes:,} bytes in it, found "
            f"{unpacked_bytes:,} bytes or more; if that is meant, {remedy}"
        )


def split_documents(lines: Iterable[str]) -> Iterator[str]:
    """Split the lines of a plain text into documents."""
    document: list[str] = []
    characters = 0
    for line in lines:
        document.append(line)
        characters += len(line) + 1
        blank = not line.strip()
        if characters >= (DOCUMENT_CHARACTERS if blank else _DOCUMENT_CHARACTERS_WITHOUT_BLANK_LINE):
            yield "\n".join(document).strip()
            document, characters = [], 0
    yield "\n".join(document).strip()


def read_table(path: Path) -> Any:
    """Read a table into memory, as a `datasets.Dataset`; None if the file is empty.

    Raises:
        ValueError: If the table or its archive is damaged.
    """
    if is_saved(path):
        return open_saved(path)
    suffix = format_of(path)
    kind, options = TABLES[suffix]
    raw = _decompressed(path)
    text = "" if kind in _BINARY else decode(raw, path)
    if kind not in _BINARY and not text.strip():
        return None
    datasets = optional_package("datasets", extra="data")
    if kind == "parquet":
        require_plausible(_least_bytes_of_parquet(raw), len(raw), path, "write it without compression, or as .jsonl")
    # A copy under a plain name: `datasets` does not read .zst, takes [ and * in a path for a pattern, and its own cache
    # would keep every corpus ever read.
    with tempfile.TemporaryDirectory(prefix="earlysift-") as folder, _silent(datasets):
        copy = Path(folder) / f"table{suffix}"
        copy.write_bytes(raw)
        try:
            return datasets.load_dataset(
                kind, data_files=str(copy), split="train", cache_dir=folder, keep_in_memory=True, **options
            )
        except Exception as error:  # `datasets` raises nearly anything, StopIteration included
            cause = error.__cause__ or error
            reason = (kind == "json" and _bad_json_line(text)) or f"{type(cause).__name__}: {cause}".splitlines()[0]
            raise ValueError(
                f"{path}: expected {_EXPECTED_CONTENT[kind]}, but {reason}; repair it or leave out what is broken"
            ) from error


def open_saved(path: Path) -> Any:
    """Open a folder that `datasets.save_to_disk` wrote; its rows stay on disk until they are read.

    Raises:
        ValueError: If it is damaged.
    """
    datasets = optional_package("datasets", extra="data")
    try:
        return datasets.load_from_disk(str(path)).with_format(None)
    except Exception as error:  # `datasets` raises nearly anything
        raise ValueError(
            f"{path}: expected a data set that save_to_disk wrote, but {type(error).__name__}: {error}; save it again"
        ) from error


def find_text_column(features: Any, path: Any, named: str | None = None) -> str:
    """Find the column of texts: the named one, else `text`, else the only one of strings.

    Args:
        features: The columns of the table and their types.
        path: What messages call the table.
        named: Name of the column; None to find it.

    Raises:
        ValueError: If there is no such column of strings.
    """
    types = {name: getattr(feature, "dtype", "nested") for name, feature in features.items()}
    strings = [name for name, dtype in types.items() if dtype in ("string", "large_string")]
    candidates = [named] if named else ["text"] if "text" in types else strings
    if len(candidates) == 1 and candidates[0] in strings:
        return candidates[0]
    found = ", ".join(f"{name} ({dtype})" for name, dtype in types.items())
    if named:
        wanted, remedy = f"named {named!r}, as text_column says", "name the one that holds the text"
    else:
        wanted = "named 'text', or just one column of strings"
        remedy = "rename the column that holds the text to 'text', or name it by text_column (--text-column)"
    raise ValueError(f"{path}: expected a column of strings {wanted}; found the columns {found}; {remedy}")


def _least_bytes_of_parquet(raw: bytes) -> int:
    """What a Parquet file unpacks to at least: its pages, and four bytes for the place of each text; 0 if damaged.

    A text that many rows share counts once: what they take is known only when they are read.
    """
    parquet, arrow = (optional_package(f"pyarrow{part}", extra="data") for part in (".parquet", ""))
    try:
        facts = parquet.ParquetFile(arrow.BufferReader(raw)).metadata
        pages_bytes = sum(facts.row_group(number).total_byte_size for number in range(facts.num_row_groups))
        return int(max(pages_bytes, 4 * facts.num_rows))
    except (arrow.ArrowException, OSError):
        return 0  # reading it tells what is wrong


def _decompressed(path: Path) -> bytes:
    raw = path.read_bytes()
    decompress = _DECOMPRESS.get(path.suffix.lower())
    if decompress is None:
        return raw
    pieces, found_bytes = [], 0
    try:
        for piece in decompress(raw):
            pieces.append(piece)
            found_bytes += len(piece)
            require_plausible(found_bytes, len(raw), path, "unpack it and give what is in it")
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(
            f"{path}: the archive ends too early or is damaged ({error}); download or compress it again"
        ) from error
    return b"".join(pieces)


def _gunzip(raw: bytes) -> Iterator[bytes]:
    """The pieces of a .gz file, unpacked."""
    with gzip.open(io.BytesIO(raw)) as file:
        while piece := file.read(1 << 20):
            yield piece


def _unzstd(raw: bytes) -> Iterator[bytes]:
    """The pieces of all frames of a .zst file, unpacked.

    The package's own readers take a truncated file for a complete one, so each frame is checked to have ended.
    """
    zstandard = optional_package("zstandard", extra="data")
    decompressor = zstandard.ZstdDecompressor()
    frame = None
    for start in range(0, len(raw), _CHUNK_BYTES):
        rest = raw[start : start + _CHUNK_BYTES]
        while rest:
            frame = frame or decompressor.decompressobj()
            try:
                yield frame.decompress(rest)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("the last frame is not complete")


_DECOMPRESS: dict[str, Callable[[bytes], Iterator[bytes]]] = {".gz": _gunzip, ".zst": _unzstd}


def _bad_json_line(text: str) -> str:
    """Where JSON lines, or one JSON list, are malformed; empty if they are not."""
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
