"""Classification of texts: a BERT from scratch, or the saved encoder of a masked language model, fine-tuned."""

from functools import partial
from pathlib import Path

from torch import Tensor

from earlysift.pretrain.classes import class_ids
from earlysift.pretrain.corpus import joined, read_labelled
from earlysift.pretrain.models import TOKENIZER, build_bert_classifier, build_fine_tuned, require_checkpoint
from earlysift.pretrain.stream import Rows
from earlysift.pretrain.tokens import load_blocks
from earlysift.pretrain.workload_settings import WorkloadSettings
from earlysift.pretrain.workloads import TaskData

TAKES = ("data", "text_column", "label_column", "checkpoint", "tokenizer_file", "flipped")


def read(settings: WorkloadSettings, *, tokenizer_file: Path | None = None) -> TaskData:
    """Read tables with a label and a text in every row, encoded by a trained, a given or the checkpoint's tokenizer."""
    if not settings.data:
        raise ValueError("The task classification needs data: a table with the columns 'label' and 'text'.")
    checkpoint = settings.checkpoint
    if checkpoint is not None:
        if tokenizer_file is not None:
            raise ValueError("A checkpoint brings its tokenizer; leave tokenizer_file out.")
        require_checkpoint(checkpoint)
        tokenizer_file = checkpoint / TOKENIZER
    columns = {"text_column": settings.text_column, "label_column": settings.label_column}
    tables = [read_labelled(path, **columns) for path in settings.data]
    texts = joined([table.texts for table in tables])
    blocks = load_blocks(
        texts, vocab_size=settings.vocab_size, length=settings.length, packed=False, tokenizer_file=tokenizer_file
    )
    classes, train_labels, validation_labels = class_ids(
        texts.name,
        [label for table in tables for label in table.train_labels],
        [label for table in tables for label in table.validation_labels],
    )
    shape = {"length": settings.length, "vocab_size": blocks.vocab_size, "classes": len(classes)}

    build = build_bert_classifier if checkpoint is None else partial(build_fine_tuned, checkpoint)

    def rows(ids: Tensor, labels: Tensor) -> Rows:
        ids = ids.long()
        return {"input_ids": ids, "attention_mask": (ids != blocks.special["[PAD]"]).long(), "labels": labels}

    return TaskData(
        name=f"{texts.name}, {'fine-tuning' if checkpoint else 'classification'}",
        train=rows(blocks.train, train_labels),
        validation=rows(blocks.validation, validation_labels),
        outputs=len(classes),
        make_model=lambda seed: build(**shape, layers=settings.layers, width=settings.width, seed=seed),
        facts={**shape, "checkpoint": checkpoint and str(checkpoint)},
        tokenizer_json=blocks.tokenizer_json,
    )
