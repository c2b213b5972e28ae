"""What a comparison is made of. One dataclass is the command line, the config file and the API."""

import dataclasses
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path

from earlysift.compare.arms import ARMS


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A comparison of arms."""

    data: Path | None = None
    """Text to train on: a file or folder of text, JSON lines, CSV/TSV or parquet, plain, .gz or .zst.
    Without it: the standard library of the running Python, which every machine has."""
    out: Path = Path("runs/compare")
    """Run folder: config.json, ledgers, results.json, curves.png, report.html."""
    arms: tuple[str, ...] = ("uniform", "sift", "exact")
    """Arms to compare; uniform is always needed."""
    seeds: int = 1
    """Number of seeds; each gives every arm the same initial weights and data order. Three or more make evidence."""
    budget: float = 100.0
    """Seconds of reference time that every arm may spend per seed; its learning rate decays to zero at the end."""
    target: float | None = None
    """Validation accuracy (0 to 1) to reach. Without it: what uniform reaches at the end of its budget."""
    keep: float = 0.5
    """Share of the pool that is trained on."""
    depth: int = 1
    """Layers that run for an early-exit score."""
    batch: int = 32
    """Samples per training step, in every arm; the pool is batch / keep."""
    layers: int = 12
    """Layers of the BERT."""
    width: int = 64
    """Width of the BERT, a multiple of 32."""
    length: int = 64
    """Tokens per sample."""
    vocab_size: int = 4096
    """Size of the WordPiece vocabulary trained on the training part."""
    learning_rate: float = 1.5e-3
    """Peak learning rate, in every arm."""
    warmup: float = 0.1
    """Share of an arm's steps with rising learning rate."""
    validation_blocks: int = 512
    """Held-out samples that every evaluation uses, with one fixed mask."""
    evaluations: int = 16
    """Evaluations per arm and seed, evenly over its budget (not charged, the same for all arms)."""
    resume: bool = False
    """Go on in the run folder: finished seeds are kept."""
    force: bool = False
    """Delete what an earlier comparison left in the run folder."""
    config: Path | None = None
    """TOML or JSON file with any of these settings (the config.json of a run folder, say); the command line has the
    last word."""

    def __post_init__(self) -> None:
        problems = [message for bad, message in self._rules() if bad]
        if problems:
            raise ValueError(" ".join(problems))

    def _rules(self) -> list[tuple[bool, str]]:
        unknown = [arm for arm in self.arms if arm not in ARMS]
        return [
            (bool(unknown), f"Unknown arms {unknown}; known are {', '.join(ARMS)}."),
            ("uniform" not in self.arms, "The arm 'uniform' is needed: every other arm is compared with it."),
            (self.seeds < 1, f"seeds must be at least 1, got {self.seeds}."),
            (not self.budget > 0, f"budget must be more than 0 seconds, got {self.budget}."),
            (not 0 < self.keep <= 1, f"keep must be in (0, 1], got {self.keep}."),
            (not 1 <= self.depth < self.layers, f"depth must be in 1..{self.layers - 1}, got {self.depth}."),
            (
                self.target is not None and not 0 < self.target < 1,
                f"target must be an accuracy between 0 and 1, got {self.target}.",
            ),
            (not 0 <= self.warmup < 1, f"warmup must be in [0, 1), got {self.warmup}."),
            (self.batch < 1, f"batch must be at least 1, got {self.batch}."),
            (self.evaluations < 2, f"evaluations must be at least 2, got {self.evaluations}."),
            (self.resume and self.force, "Choose one of resume and force."),
        ]

    @property
    def pool(self) -> int:
        """R, the number of candidates per step of the arms that select."""
        return round(self.batch / self.keep)

    def identity(self) -> dict[str, object]:
        """The settings that make two runs the same comparison: all but where and how to start it."""
        values = dataclasses.asdict(self)
        for name in ("out", "resume", "force", "config"):
            del values[name]
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def from_file(path: Path) -> Settings:
    """Settings from a TOML or JSON file.

    Raises:
        ValueError: If the file is neither or has a key that is not a setting.
        FileNotFoundError: If there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"Expected a TOML or JSON file with settings at {path}, found none.")
    kind, parse = ("JSON", json.loads) if path.suffix == ".json" else ("TOML", tomllib.loads)
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a {kind} file: {error}.") from error
    fields = {field.name for field in dataclasses.fields(Settings)}
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ValueError(f"{path} has unknown settings {unknown}; known are {', '.join(sorted(fields))}.")
    for name in ("data", "out"):
        if values.get(name) is not None:
            values[name] = Path(values[name])
    if "arms" in values:
        values["arms"] = tuple(values["arms"])
    return Settings(**values)
