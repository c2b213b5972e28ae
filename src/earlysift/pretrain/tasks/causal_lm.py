"""Causal language modelling: a Llama predicts the next token of packed text."""

from pathlib import Path

from torch import Generator, Tensor

from earlysift.losses import IGNORED_LABEL
from earlysift.pretrain.language import language_data, read_blocks
from earlysift.pretrain.models import build_llama
from earlysift.pretrain.stream import Rows
from earlysift.pretrain.workload_settings import WorkloadSettings
from earlysift.pretrain.workloads import TaskData

TAKES = ("data", "text_column", "max_characters", "tokenizer_file", "stream")


def read(settings: WorkloadSettings, *, tokenizer_file: Path | None = None, stream: bool = False) -> TaskData:
    """Read text as `read_blocks` does."""
    name, blocks = read_blocks(settings, tokenizer_file, stream=stream)
    return language_data(f"{name}, causal LM", blocks, settings, build_llama, prepare=_prepare, targets=_targets)


def _prepare(rows: Rows, _: Generator) -> Rows:
    ids = rows["input_ids"].long()
    labels = ids.clone()
    labels[:, [0, -1]] = IGNORED_LABEL  # [CLS] and [SEP] frame every block alike and say nothing about the text
    return {"input_ids": ids, "labels": labels}


def _targets(rows: Rows) -> Tensor:
    return rows["input_ids"][:, 1:-1].flatten()
