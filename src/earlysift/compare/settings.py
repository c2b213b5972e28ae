"""What a comparison is made of. One dataclass is the command line, the config file and the API."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from earlysift.compare.arms import ARMS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A comparison of arms."""

    task: Literal["masked_lm", "causal_lm", "classification", "image"] = "masked_lm"
    """What is trained: a BERT for masked, a Llama for causal language modelling, a BERT to classify texts, or a ViT."""
    data: tuple[Path, ...] = ()
    """Files or folders of text, JSON lines, CSV/TSV, parquet or Arrow, plain, .gz or .zst, or folders that
    datasets.save_to_disk wrote; for classification tables with a column of labels and one of texts. Without it: the
    standard library of the running Python (language models), scikit-learn's handwritten digits (images). For a suite:
    the folder that holds the corpora."""
    text_column: str | None = None
    """Column of tables that holds the text. Without it: text, else the only column of strings."""
    label_column: str | None = None
    """Column of tables that holds the label (classification). Without it: label."""
    flipped: float = 0.0
    """Share of the training labels that are replaced by another class (classification, image)."""
    repeated: float = 0.0
    """Share of the samples that are copies of a few: boilerplate."""
    train_samples: int | None = None
    """Training samples to use; without it all."""
    max_characters: int | None = None
    """Cut the text to documents of about so many characters before anything else."""
    checkpoint: Path | None = None
    """Folder of a saved encoder that classification starts from (`encoder` in the run folder that saved it)."""
    save_encoder: bool = False
    """Save the encoder that uniform training ends with on the first seed (masked LM), to fine-tune from."""
    out: Path = Path("runs/compare")
    """Run folder: config.json, ledgers, results.json, curves.png, report.html; for a suite a folder of these."""
    arms: tuple[str, ...] = ("uniform", "sift", "sift-entropy", "exact", "auto")
    """Arms to compare; uniform is always needed."""
    seeds: int = 1
    """Number of seeds; each gives every arm the same initial weights and data order. Three or more make evidence."""
    budget: float = 60.0
    """Seconds of reference time that every arm may spend per seed; its learning rate decays to zero at the end."""
    target: float | None = None
    """Validation accuracy (0 to 1) to reach. Without it: a share of what uniform reaches at the end of its budget."""
    target_share: float = 0.95
    """That share, so that noise at the very end does not decide."""
    keep: float = 0.5
    """Share of the pool that is trained on."""
    depth: int = 1
    """Layers that run for an early-exit score."""
    select_after: float = 0.0
    """Share of the budget for which arms that select by loss or entropy alone (SIFT, exact, selective backprop) first
    train uniformly, without scoring."""
    batch: int = 32
    """Samples per training step, in every arm; the pool is batch / keep."""
    layers: int = 12
    """Layers of the model."""
    width: int = 64
    """Width of the model, a multiple of 32."""
    length: int = 64
    """Tokens per sample."""
    vocab_size: int = 4096
    """Size of the WordPiece vocabulary trained on the training part."""
    learning_rate: float = 1.5e-3
    """Peak learning rate, in every arm."""
    warmup: float = 0.1
    """Share of an arm's budget with rising learning rate."""
    validation_samples: int = 512
    """Held-out samples that every evaluation uses."""
    evaluations: int = 16
    """Evaluations per arm and seed, evenly over its budget (not charged, the same for all arms)."""
    device: str = "cpu"
    """Where to train: cpu, or an accelerator (cuda), which computes in bfloat16."""
    suite: Literal["cpu", "gpu"] | None = None
    """Run this suite of workloads, each a comparison in a folder of its own; other flags then hold for all of them."""
    only: tuple[str, ...] = ()
    """Workloads of the suite to run; without it all."""
    jobs: int = 1
    """Workloads of the suite to run at a time, each on its share of the cores."""
    resume: bool = False
    """Go on in the run folder: finished arms and seeds are kept, others are run."""
    force: bool = False
    """Delete what an earlier comparison left in the run folder."""
    config: Path | None = None
    """TOML or JSON file with any of these settings (the config.json of a run folder, say); the command line has the
    last word."""

    def __post_init__(self) -> None:
        # `--arms uniform,sift` is `--arms uniform sift`
        object.__setattr__(self, "arms", tuple(name for given in self.arms for name in given.split(",") if name))
        problems = [message for bad, message in self._rules() if bad]
        if problems:
            raise ValueError(" ".join(problems))

    def _rules(self) -> list[tuple[bool, str]]:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        depths = {name: min(ARMS[name].depths, default=self.depth) for name in self.arms if name in ARMS}
        too_deep = sorted(name for name, depth in depths.items() if depth >= self.layers and ARMS[name].depths)
        shares = {name: getattr(self, name) for name in ("flipped", "repeated", "warmup", "select_after")}
        outside = {name: value for name, value in shares.items() if not 0 <= value < 1}
        return [
            (bool(unknown), f"Unknown arms {unknown}; known are {', '.join(ARMS)}."),
            ("uniform" not in self.arms, "The arm 'uniform' is needed: every other arm is compared with it."),
            (
                bool(too_deep),
                f"The arms {too_deep} exit after more layers than a model of {self.layers} layers has before its last. "
                "Leave them out, or give more --layers.",
            ),
            (
                "visible" in self.arms and self.task != "masked_lm",
                f"The arm 'visible' counts visible labels of masked language modelling; the task is {self.task}.",
            ),
            (self.seeds < 1, f"seeds must be at least 1, got {self.seeds}."),
            (not self.budget > 0, f"budget must be more than 0 seconds, got {self.budget}."),
            (not 0 < self.keep <= 1, f"keep must be in (0, 1], got {self.keep}."),
            (not 1 <= self.depth < self.layers, f"depth must be in 1..{self.layers - 1}, got {self.depth}."),
            (
                self.target is not None and not 0 < self.target < 1,
                f"target must be an accuracy between 0 and 1, got {self.target}.",
            ),
            (not 0 < self.target_share <= 1, f"target_share must be in (0, 1], got {self.target_share}."),
            *((True, f"{name} must be in [0, 1), got {value}.") for name, value in outside.items()),
            (self.batch < 1, f"batch must be at least 1, got {self.batch}."),
            (self.evaluations < 2, f"evaluations must be at least 2, got {self.evaluations}."),
            (self.jobs < 1, f"jobs must be at least 1, got {self.jobs}."),
            (bool(self.only) and self.suite is None, "only names workloads of a suite: give --suite, too."),
            (self.resume and self.force, "Choose one of resume and force."),
        ]

    @property
    def pool(self) -> int:
        """R, the number of candidates per step of the arms that select."""
        return round(self.batch / self.keep)

    def identity(self) -> dict[str, object]:
        """The settings that make two runs the same comparison: all but where and how to start it."""
        values = dataclasses.asdict(self)
        for name in ("out", "suite", "only", "jobs", "resume", "force", "config"):
            del values[name]
        plain: dict[str, object] = json.loads(json.dumps(values, default=str))
        return plain
