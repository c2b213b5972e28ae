"""What a pre-training run is made of. One dataclass is the command line, the config file and the API."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from earlysift import schema
from earlysift.measures import MEASURES, sift_arm
from earlysift.schema import Above0, Accuracy, Count, Keep, Share

MEMORY_ARM = sift_arm("memory")
ARMS: dict[str, dict[str, Any]] = {
    "uniform": {"keep": 1.0},
    **{sift_arm(name): {"score": name} for name in MEASURES},
    "exact": {"score": "exact"},
    MEMORY_ARM: {"score": "memory", "sample_id": "sample_id"},
    "auto": {"mode": "auto", "sample_id": "sample_id"},
}
"""Arms as rows of data: what each changes in `earlysift.SiftConfig`."""


@dataclass(frozen=True, kw_only=True)
class PretrainSettings:
    """One training from random weights."""

    preset: str = "bert-base"
    """The model: a built-in name, a transformers config.json, or a folder that holds one."""
    data: tuple[Path, ...] = ()
    """Files or folders of text, JSON lines, CSV/TSV, parquet or Arrow, plain, .gz or .zst, folders that
    datasets.save_to_disk wrote, or names of data sets on the Hugging Face hub, owner/name:configuration; several are
    one corpus. Without it: the standard library of the running Python."""
    text_column: str | None = None
    """Column of tables that holds the text. Without it: text, else the only column of strings."""
    stream: bool = False
    """Read the data in passing, for what is larger than memory or disk."""
    tokenizer: Path | None = None
    """BERT's vocab.txt or a tokenizer.json; without it a WordPiece tokenizer is trained on the training part."""
    vocab_size: Annotated[int, Field(ge=1, le=2**24)] | None = None
    """Tokens that the model knows, and that a trained tokenizer has at most; without it what the preset says."""
    whole_word: bool = False
    """Hide all tokens of a word together (masked models, WordPiece or byte-level BPE)."""
    length: Annotated[int, Field(ge=1, le=65_536)] = 128
    """Tokens per sample."""
    validation_samples: Count = 2048
    """Held-out samples that every evaluation uses."""
    arm: str = "sift"
    """What is trained on: uniform (all), sift (by the exit's loss), sift-entropy or another measure at the exit, exact
    (full model's loss), sift-memory (the loss that a sample had when it was last trained on), auto."""
    depth: Count = 1
    """Layers that run for an early-exit score."""
    max_positions: Count | None = None
    """Labelled tokens of a sample that an early-exit score reads at most; without it all. Fewer make it cheaper, which
    matters where all tokens are labelled (causal models)."""
    keep: Keep = 0.5
    """Share of the candidates that is trained on, but for the arm uniform."""
    batch: Count = 32
    """Samples trained on per process and micro-step; b / keep candidates are read."""
    accumulate: Annotated[int, Field(ge=1, le=2**20)] = 8
    """Micro-steps per optimizer step."""
    steps: Annotated[int, Field(ge=1, le=10**12)] = 100_000
    """Optimizer steps; the learning rate has decayed at their end."""
    minutes: Above0 | None = None
    """Minutes of training (evaluations not counted) after which the learning rate has decayed and the run ends, if the
    steps are not done before. Such a run depends on the clock: it resumes, but not bit for bit."""
    target_accuracy: Accuracy | None = None
    """Validation accuracy (0 to 1) at which the run ends."""
    learning_rate: Above0 = 1e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the learning rate decays to zero."""
    warmup: Share = 0.01
    """Share of the training with rising learning rate."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Decay of weights, biases and norms excepted."""
    every: Count = 1000
    """Optimizer steps from one evaluation to the next; a checkpoint follows each, and the latest two are kept."""
    log_every: Count = 50
    """Optimizer steps from one line of the log to the next; the ledger has every step."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of weights, order, masks and dropout."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. An accelerator computes in bfloat16 if it can, the processor in float32."""
    compile: bool = False
    """Compile the model by torch.compile."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 0
    """Processes that prepare candidates beside each training process; samples do not depend on it."""
    track: Literal["auto", "none", "tensorboard", "trackio", "wandb", "mlflow"] = "auto"
    """Tracker to log to. auto is TensorBoard if it is installed, which writes into the run folder."""
    out: Path = Path("runs/pretrain")
    """Run folder: config.json, checkpoints, ledgers, results.json, curves.png, report.html."""
    resume: bool = False
    """Go on in the run folder from its latest sound checkpoint."""
    config: Path | None = None
    """TOML or JSON file with any of these settings (the config.json of a run folder, say); the command line has the
    last word."""

    def __post_init__(self) -> None:
        schema.validate(self, _RULES)

    def identity(self) -> dict[str, Any]:
        """The settings that make two runs the same training: all but where and how it is run, and watched."""
        values = dataclasses.asdict(self)
        for name in ("target_accuracy", "workers", "track", "out", "resume", "config"):
            del values[name]
        plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
        return plain


def _unknown_arm(settings: PretrainSettings) -> str:
    return "" if settings.arm in ARMS else f"Unknown arm {settings.arm!r}; known are {', '.join(ARMS)}."


def _memory_of_a_stream(settings: PretrainSettings) -> str:
    if settings.arm != MEMORY_ARM or not settings.stream:
        return ""
    return (
        f"arm={MEMORY_ARM!r} remembers the losses of samples, and those of --stream never return. Drop --stream, or "
        "choose another arm."
    )


_RULES: tuple[schema.Rule, ...] = (
    (("arm",), _unknown_arm),
    (("arm", "stream"), _memory_of_a_stream),
    schema.POOL_FITS,
)
