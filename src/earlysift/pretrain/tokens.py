"""Documents in, rows of token ids of one length out: encoded once, then read from a cache."""

import hashlib
import io
import json
import os
import tempfile
import warnings
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from earlysift.pretrain.corpus import Corpus
from earlysift.pretrain.optional import optional_package

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_ToRows = Callable[[list[str], "Tokenizer", dict[str, int], int], torch.Tensor]

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # in BERT's order, so with ids 0 to 4

_CACHE_FORMAT = 2  # increase it when the same corpus would give other blocks
_SHORTEST_LENGTH = 8
_SMALLEST_VOCABULARY = 100
_LARGEST_ALPHABET = 1_000  # as BERT's; without a limit, single letters of rare scripts fill a small vocabulary
_BATCH_CHARACTERS = 1_000_000  # an encoding takes some 100 bytes a token
_DIGEST_BYTES = 32


@dataclass(frozen=True)
class Blocks:
    """A corpus as rows of token ids: blocks, each [CLS] text [SEP], or one row a document, padded with [PAD].

    Attributes:
        train: Rows of the training part, int32 ``(N, length)``.
        validation: Rows of the validation part, int32 ``(M, length)``.
        vocab_size: Every id is below it.
        special: Ids of [PAD], [UNK], [CLS], [SEP] and [MASK].
        tokenizer_json: The tokenizer, as the text of a tokenizer.json; empty in blocks that were made by hand.
    """

    train: torch.Tensor
    validation: torch.Tensor
    vocab_size: int
    special: dict[str, int]
    tokenizer_json: str = ""


def load_blocks(
    corpus: Corpus,
    *,
    vocab_size: int,
    length: int,
    packed: bool = True,
    characters: bool = False,
    cache: Path | None = None,
    tokenizer_file: Path | None = None,
) -> Blocks:
    """Turn a corpus into rows of `length` tokens, or read them from the cache.

    Packed, the documents of a part are joined in their order with [SEP] between them and cut into blocks; an incomplete
    last block is dropped. Not packed, every document is a row, cut or padded with [PAD]. Rows are in the order of the
    text.

    Args:
        corpus: The documents.
        vocab_size: Size of the vocabulary that is trained on the training part; the result may be smaller if the text
            is short. Not used with a tokenizer file.
        length: Tokens a row, [CLS] and [SEP] included.
        packed: Whether documents are joined and cut, or each is a row of its own.
        characters: Whether a token is a single character, of the ``vocab_size`` most frequent ones.
        cache: Folder for finished blocks; None for earlysift/blocks in the user's cache folder.
        tokenizer_file: A BERT vocab.txt, or a tokenizer.json that has BERT's special tokens.

    Returns:
        The blocks; the same arguments and version of tokenizers give the same blocks everywhere.

    Raises:
        ValueError: If length or vocabulary is too small, the text too short for one block in each part, or the
            tokenizer file cannot be used.
        FileNotFoundError: If the tokenizer file is missing.
    """
    if length < _SHORTEST_LENGTH:
        raise ValueError(
            f"expected blocks of {_SHORTEST_LENGTH} tokens or more, got length={length}; [CLS] and [SEP] "
            "take two of them: 64 or 128 is usual"
        )
    content = None if tokenizer_file is None else _tokenizer_content(tokenizer_file)
    parts = [_CACHE_FORMAT, corpus.fingerprint, vocab_size if content is None else content, length, packed]
    key = json.dumps([*parts, "characters"] if characters else parts)
    folder = _user_cache() if cache is None else cache
    entry = folder / f"{hashlib.sha256(key.encode()).hexdigest()}.blocks"
    blocks = _read_entry(entry)
    if blocks is None:
        if content is None:
            train = character_tokenizer if characters else train_tokenizer
            tokenizer = train(corpus.train, vocab_size)
        else:
            tokenizer = _given_tokenizer(content, tokenizer_file)
        blocks = _encode(corpus, tokenizer, length, _pack if packed else _fill)
        _write_entry(entry, blocks)
    return blocks


def train_tokenizer(documents: Sequence[str], vocab_size: int) -> "Tokenizer":
    """Train an uncased WordPiece tokenizer like BERT's.

    The same documents give the same tokenizer. The library alone does not guarantee that: it numbers the letters inside
    words (##a, ##b) in the order of a hash table with a new seed each time, even on one thread, and breaks ties between
    equally frequent pieces by these numbers. So these letters get their numbers here.

    Args:
        documents: The texts.
        vocab_size: The largest number of entries, special tokens included; a short text gives fewer.

    Returns:
        The tokenizer, with [PAD] [UNK] [CLS] [SEP] [MASK] as ids 0 to 4.

    Raises:
        ValueError: If the vocabulary is too small.
    """
    if vocab_size < _SMALLEST_VOCABULARY:
        raise ValueError(
            f"expected a vocabulary of {_SMALLEST_VOCABULARY} entries or more, got vocab_size={vocab_size}; "
            "letters alone fill most of that: 4096 suits a small model"
        )
    tokenizers = optional_package("tokenizers", extra="hf")
    draft = _wordpiece({}, lowercase=True)
    # Both forms of every letter, at the start of a word and inside, take at most half of the vocabulary.
    limit = min(_LARGEST_ALPHABET, (vocab_size - len(SPECIAL_TOKENS)) // 4)
    alphabet = _alphabet(documents, draft, limit)
    trainer = tokenizers.trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[
            *SPECIAL_TOKENS,
            *(f"##{letter}" for letter in alphabet if _inside_word(letter, draft)),
        ],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    draft.train_from_iterator(documents, trainer)
    # A new tokenizer, as in the draft the ##letters are special tokens, too.
    return _wordpiece(draft.get_vocab(), lowercase=True)


def character_tokenizer(documents: Sequence[str], vocab_size: int) -> "Tokenizer":
    """A tokenizer whose tokens are single characters, lower case and without accents, blanks among them.

    Args:
        documents: The texts.
        vocab_size: The largest number of entries, special tokens included: the most frequent characters are known.

    Returns:
        The tokenizer, with [PAD] [UNK] [CLS] [SEP] [MASK] as ids 0 to 4.

    Raises:
        ValueError: If the vocabulary has no room for two characters.

    Example:
        >>> character_tokenizer(["a bad cab"], 100).encode("Bad!").tokens
        ['b', 'a', 'd', '[UNK]']
    """
    room = vocab_size - len(SPECIAL_TOKENS)
    if room < 2:
        raise ValueError(f"expected a vocabulary of 7 entries or more, got vocab_size={vocab_size}; 64 suits English")
    tokenizers = optional_package("tokenizers", extra="hf")
    normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    known = _by_frequency(documents, normalizer)[:room]
    vocabulary = {token: number for number, token in enumerate([*SPECIAL_TOKENS, *known])}
    tokenizer: Tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer


def _wordpiece(vocabulary: dict[str, int], *, lowercase: bool) -> "Tokenizer":
    tokenizers = optional_package("tokenizers", extra="hf")
    tokenizer: Tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    if vocabulary:
        tokenizer.decoder = tokenizers.decoders.WordPiece()
        tokenizer.add_special_tokens([token for token in SPECIAL_TOKENS if token in vocabulary])
    return tokenizer


def _alphabet(documents: Sequence[str], tokenizer: "Tokenizer", limit: int) -> list[str]:
    """The most frequent letters of the normalized documents, in order of frequency."""
    return [letter for letter in _by_frequency(documents, tokenizer.normalizer) if not letter.isspace()][:limit]


def _by_frequency(documents: Sequence[str], normalizer: Any) -> list[str]:
    """All characters of the normalized documents, blanks among them, the most frequent first."""
    raw = Counter[str]()
    for document in documents:
        raw.update(document)
    counts = Counter[str]()
    for character, count in raw.items():
        for normalized in normalizer.normalize_str(character):
            counts[normalized] += count
    return sorted(counts, key=lambda character: (-counts[character], character))


def _inside_word(letter: str, tokenizer: "Tokenizer") -> bool:
    """Whether a letter can follow another in a word, unlike punctuation or a Chinese character."""
    word = tokenizer.normalizer.normalize_str(f"a{letter}")
    return len(tokenizer.pre_tokenizer.pre_tokenize_str(word)) == 1


def _tokenizer_content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}: expected a BERT vocab.txt or a tokenizer.json, but nothing is there; check the path, "
            "or give none to train a tokenizer on the corpus"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected a BERT vocab.txt or a tokenizer.json, but byte {error.start} is not UTF-8 text"
        ) from error


def _given_tokenizer(content: str, path: Path | None) -> "Tokenizer":
    if content.lstrip().startswith("{"):
        tokenizer = _from_json(content, path)
    else:
        tokens = [line.rstrip("\r") for line in content.rstrip("\r\n").split("\n")]
        cased = any(token != token.lower() for token in tokens if not token.startswith("["))
        tokenizer = _wordpiece({token: index for index, token in enumerate(tokens)}, lowercase=not cased)
    missing = [token for token in SPECIAL_TOKENS if tokenizer.token_to_id(token) is None]
    if missing:
        raise ValueError(
            f"{path}: expected a vocabulary with BERT's special tokens {' '.join(SPECIAL_TOKENS)}, but "
            f"{' '.join(missing)} is missing; give a BERT vocab.txt or tokenizer.json, or none to train one"
        )
    return tokenizer


def _from_json(content: str, path: Path | None) -> "Tokenizer":
    tokenizers = optional_package("tokenizers", extra="hf")
    try:
        tokenizer: Tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises plain Exception
        raise ValueError(
            f"{path}: expected a tokenizer.json of the tokenizers library, but it cannot be read ({error}); "
            "save it again with tokenizer.save()"
        ) from error
    tokenizer.no_truncation()  # a saved tokenizer may cut and pad what it is given
    tokenizer.no_padding()
    return tokenizer


def _encode(corpus: Corpus, tokenizer: "Tokenizer", length: int, to_rows: _ToRows) -> Blocks:
    # The text "[MASK]" in a document must not get the id of a mask.
    tokenizer.encode_special_tokens = True
    vocabulary = tokenizer.get_vocab()
    special = {token: vocabulary[token] for token in SPECIAL_TOKENS}
    train, validation = (
        to_rows(documents, tokenizer, special, length) for documents in (corpus.train, corpus.validation)
    )
    for part, blocks in (("training", train), ("validation", validation)):
        if not len(blocks):
            raise ValueError(
                f"{corpus.name}: expected a {part} text of {length - 2} tokens or more, enough for one "
                f"block, but it is shorter; give more text, or a shorter length than {length}"
            )
    vocab_size = 1 + max(vocabulary.values())  # a vocab.txt with a line twice has gaps
    return Blocks(train, validation, vocab_size, special, tokenizer.to_str())


def packed_rows(documents: Iterable[str], tokenizer_json: str, length: int) -> Iterator[torch.Tensor]:
    """Pack streamed documents into the same rows as `load_blocks`.

    Args:
        documents: The texts; about a million characters are in memory at a time.
        tokenizer_json: The tokenizer, see `Blocks`.
        length: Tokens a row.

    Yields:
        Rows of token ids, int32 ``(length,)``.
    """
    tokenizer = optional_package("tokenizers", extra="hf").Tokenizer.from_str(tokenizer_json)
    tokenizer.encode_special_tokens = True
    special = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    for blocks in _packed(documents, tokenizer, special, length):
        for row in blocks:
            yield row.clone()  # a view would keep all blocks in memory


def _pack(documents: list[str], tokenizer: "Tokenizer", special: dict[str, int], length: int) -> torch.Tensor:
    """The documents as blocks, int32 ``(N, length)``; N is 0 if they do not fill one."""
    return torch.cat(list(_packed(documents, tokenizer, special, length)))


def _packed(
    documents: Iterable[str], tokenizer: "Tokenizer", special: dict[str, int], length: int
) -> Iterator[torch.Tensor]:
    """The documents as blocks, in portions, int32 ``(N, length)``, that may be empty."""
    body = length - 2
    ids = array("i")
    started = False
    for batch in _batches(documents):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            if started and encoding.ids:
                ids.append(special["[SEP]"])
            ids.extend(encoding.ids)
            started = started or bool(encoding.ids)
        count = len(ids) // body
        blocks = torch.empty(count, length, dtype=torch.int32)
        blocks[:, 0] = special["[CLS]"]
        blocks[:, -1] = special["[SEP]"]
        if count:
            blocks[:, 1:-1] = torch.frombuffer(ids[: count * body], dtype=torch.int32).view(count, body)
            del ids[: count * body]
        yield blocks


def _fill(documents: list[str], tokenizer: "Tokenizer", special: dict[str, int], length: int) -> torch.Tensor:
    """Every document as one row, int32 ``(N, length)``."""
    ids = array("i")
    for batch in _batches(documents):
        for encoding in tokenizer.encode_batch_fast(batch, add_special_tokens=False):
            kept = encoding.ids[: length - 2]
            ids.extend([special["[CLS]"], *kept, special["[SEP]"]])
            ids.extend([special["[PAD]"]] * (length - 2 - len(kept)))
    return torch.frombuffer(ids, dtype=torch.int32).view(-1, length).clone()


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    characters = 0
    for document in documents:
        batch.append(document)
        characters += len(document)
        if characters >= _BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    yield batch


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "earlysift" / "blocks"


def _read_entry(entry: Path) -> Blocks | None:
    """The blocks of a cache entry; None if it is missing or damaged."""
    try:
        raw = entry.read_bytes()
    except OSError:
        return None
    digest, content = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    if hashlib.sha256(content).digest() == digest:  # torch.load alone does not notice a flipped bit
        with suppress(Exception):  # another program's file may fail in any way
            return Blocks(**torch.load(io.BytesIO(content), weights_only=True))
    warnings.warn(f"{entry}: this cache entry is damaged; encoding the text again", stacklevel=3)
    return None


def _write_entry(entry: Path, blocks: Blocks) -> None:
    """Write a cache entry in one step, so that no other process reads half of it."""
    buffer = io.BytesIO()
    torch.save(vars(blocks), buffer)
    content = buffer.getvalue()
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=entry.parent, prefix=".unfinished-") as folder:
            unfinished = Path(folder) / entry.name
            unfinished.write_bytes(hashlib.sha256(content).digest() + content)
            unfinished.replace(entry)
    except OSError as error:
        warnings.warn(
            f"{entry.parent}: cannot write to this cache folder ({error}), so the next run encodes the text again. "
            "Give a folder that can be written to, or set XDG_CACHE_HOME",
            stacklevel=3,
        )
