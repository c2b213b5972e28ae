"""Masked language modelling: a BERT, or a ModernBERT, predicts the hidden tokens of packed text."""

from collections.abc import Callable
from pathlib import Path

from torch import Generator, Tensor, nn

from earlysift.pretrain.language import language_data, read_blocks
from earlysift.pretrain.masking import begins_word, mask_tokens
from earlysift.pretrain.models import build_bert, build_modernbert
from earlysift.pretrain.optional import optional_package
from earlysift.pretrain.stream import Rows
from earlysift.pretrain.tokens import Blocks
from earlysift.pretrain.workload_settings import WorkloadSettings
from earlysift.pretrain.workloads import TaskData

TAKES = ("data", "text_column", "max_characters", "architecture", "tokenizer_file", "stream", "whole_word")
_BUILDERS: dict[str, Callable[..., nn.Module]] = {"bert": build_bert, "modernbert": build_modernbert}


def read(
    settings: WorkloadSettings, *, tokenizer_file: Path | None = None, stream: bool = False, whole_word: bool = False
) -> TaskData:
    """Read text as `read_blocks` does; with ``whole_word`` all tokens of a word are hidden together."""
    name, blocks = read_blocks(settings, tokenizer_file, stream=stream)
    word_begins = None
    if whole_word:
        tokenizer = optional_package("tokenizers", extra="hf").Tokenizer.from_str(blocks.tokenizer_json)
        word_begins = begins_word(tokenizer.get_vocab())
    return masked_data(f"{name}, masked LM", blocks, settings, _BUILDERS[settings.architecture], word_begins)


def masked_data(
    name: str,
    blocks: Blocks,
    settings: WorkloadSettings,
    build: Callable[..., nn.Module],
    word_begins: Tensor | None = None,
) -> TaskData:
    """Blocks whose tokens are hidden as BERT's are; arguments as in `language_data` and `mask_tokens`."""
    ordinary = _ordinary_ids(blocks)

    def prepare(rows: Rows, generator: Generator) -> Rows:
        return mask_tokens(
            rows["input_ids"],
            mask_id=blocks.special["[MASK]"],
            vocab_size=ordinary.stop,
            first_ordinary_id=ordinary.start,
            generator=generator,
            word_begins=word_begins,
        )

    def targets(rows: Rows) -> Tensor:
        ids = rows["input_ids"]
        return ids[(ids >= ordinary.start) & (ids < ordinary.stop)]

    return language_data(name, blocks, settings, build, prepare=prepare, targets=targets)


def _ordinary_ids(blocks: Blocks) -> range:
    """The ids of ordinary tokens: those behind the special ones, or before them where a vocabulary ends with these."""
    special = blocks.special.values()
    return max(range(max(special) + 1, blocks.vocab_size), range(min(special)), key=len)
