"""What describes a workload: task, data, alterations and the size of the model. A comparison has these as flags."""

import pkgutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from earlysift import schema
from earlysift.pretrain import tasks
from earlysift.schema import Count, Share

TASKS = tuple(module.name for module in pkgutil.iter_modules(tasks.__path__))
"""Names of the tasks: the files of `earlysift.pretrain.tasks`, listed without importing them, as they need torch."""

MASKED = tuple(task for task in TASKS if task.startswith("masked_"))
"""Those that predict hidden tokens."""

if TYPE_CHECKING:
    TaskName = str
else:
    TaskName = Literal[TASKS]


@dataclass(frozen=True, kw_only=True)
class WorkloadSettings:
    """What to train on which data.

    Every task reads the size of the model, ``train_samples``, ``validation_samples`` and ``repeated``; its file says in
    ``TAKES`` which other settings it reads.
    """

    task: TaskName = "masked_lm"
    """What is trained: a BERT (or ModernBERT) for masked, a Llama for causal language modelling, a ModernBERT on masked
    characters, a BERT to classify texts, or a ViT."""
    data: tuple[Path, ...] = ()
    """Files or folders of text, JSON lines, CSV/TSV, parquet or Arrow, plain, .gz or .zst, or folders that
    datasets.save_to_disk wrote; for classification tables with a column of labels and one of texts; for images one
    .npz file of images and labels, or one folder with train/<class>/ and validation/<class>/, or <class>/ alone, of
    .png or .jpg. Without it: the standard library of the running Python (language models), scikit-learn's handwritten
    digits (images). For a suite: the folder that holds the corpora."""
    text_column: str | None = None
    """Column of tables that holds the text. Without it: text, else the only column of strings."""
    label_column: str | None = None
    """Column of tables that holds the label (classification). Without it: label."""
    flipped: Share = 0.0
    """Share of the training labels that are replaced by another class (classification, image)."""
    augmented: bool = False
    """Shift training images at random whenever they are read, by up to an eighth of their side, and mirror half of
    those with colour (image)."""
    repeated: Share = 0.0
    """Share of the samples that are copies of a few: boilerplate."""
    train_samples: Count | None = None
    """Training samples to use; without it all."""
    max_characters: Count | None = None
    """Cut the text to documents of about so many characters before anything else."""
    architecture: Literal["bert", "modernbert"] = "bert"
    """The model of masked_lm. A small ModernBERT, whose positions are rotary, learned in 1,200 steps what a small BERT
    had not learned in 6,000 (each at its own learning rate)."""
    checkpoint: Path | None = None
    """Folder of a saved encoder that classification starts from (`encoder` in the run folder that saved it)."""
    layers: Annotated[int, Field(ge=1, le=1024)] = 12
    """Layers of the model."""
    width: Annotated[int, Field(ge=32, le=16_384, multiple_of=32)] = 64
    """Width of the model, a multiple of 32."""
    length: Annotated[int, Field(ge=1, le=65_536)] = 64
    """Tokens per sample."""
    vocab_size: Annotated[int, Field(ge=1, le=2**24)] = 4096
    """Size of the WordPiece vocabulary trained on the training part; of masked characters the most that are known."""
    validation_samples: Count = 512
    """Held-out samples that every evaluation uses."""

    def __post_init__(self) -> None:
        schema.validate(self)
