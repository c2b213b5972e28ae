"""What language models of every kind share: text as blocks of tokens, and a model of their vocabulary."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from earlysift.pretrain.corpus import Corpus, joined, read_corpus
from earlysift.pretrain.stream import Rows
from earlysift.pretrain.streaming import FIRST_CHARACTERS, first_part
from earlysift.pretrain.tokens import Blocks, load_blocks
from earlysift.pretrain.workload_settings import WorkloadSettings
from earlysift.pretrain.workloads import TaskData
from earlysift.seeds import seeded


def read_blocks(
    settings: WorkloadSettings, tokenizer_file: Path | None = None, *, stream: bool = False, characters: bool = False
) -> tuple[str, Blocks]:
    """Read the text of a workload, without ``data`` the standard library, and pack it into blocks.

    Args:
        settings: The workload.
        tokenizer_file: BERT's vocab.txt or a tokenizer.json, in place of a trained tokenizer.
        stream: Read only the first part of the data.
        characters: Whether a token is a single character.

    Returns:
        The name of the text, and its blocks.

    Raises:
        ValueError: If settings do not fit together, or the text cannot be used.
        FileNotFoundError: If a path leads nowhere.
    """
    paths, column = settings.data, settings.text_column
    idle = [name for name, given in (("text_column", column), ("stream", stream)) if given and not paths]
    if idle:
        raise ValueError(f"Expected data to go with {' and '.join(idle)}, got none. Give data, or leave that out.")
    if stream:
        corpora = [first_part(path, FIRST_CHARACTERS // len(paths), column) for path in paths]
    else:
        corpora = [read_corpus(path, text_column=column) for path in paths or (None,)]
    corpus = joined(corpora)
    if settings.max_characters is not None:
        parts = (_shortened(part, settings.max_characters) for part in (corpus.train, corpus.validation))
        corpus = Corpus(corpus.name, *parts)
    blocks = load_blocks(
        corpus,
        vocab_size=settings.vocab_size,
        length=settings.length,
        characters=characters,
        tokenizer_file=tokenizer_file,
    )
    return corpus.name, blocks


def language_data(
    name: str,
    blocks: Blocks,
    settings: WorkloadSettings,
    build: Callable[..., nn.Module],
    *,
    prepare: Callable[[Rows, Generator], Rows],
    targets: Callable[[Rows], Tensor],
) -> TaskData:
    """The data of a language model, which ``build`` makes for the vocabulary of the blocks."""
    shape = {"length": settings.length, "vocab_size": blocks.vocab_size}
    return TaskData(
        name=name,
        train={"input_ids": blocks.train},
        validation={"input_ids": blocks.validation},
        prepare=prepare,
        targets=targets,
        outputs=blocks.vocab_size,
        make_model=lambda seed: build(**shape, layers=settings.layers, width=settings.width, seed=seed),
        facts=shape,
        tokenizer_json=blocks.tokenizer_json,
    )


def _shortened(documents: list[str], characters: int) -> list[str]:
    """Documents drawn at random until they have that many characters, in their old order."""
    chosen = []
    for number in torch.randperm(len(documents), generator=seeded("documents")).tolist():
        if characters <= 0:
            break
        chosen.append(number)
        characters -= len(documents[number])
    return [documents[number] for number in sorted(chosen)]
