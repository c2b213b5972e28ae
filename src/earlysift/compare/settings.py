"""The settings of a comparison: one dataclass for the command line, the config file and the API."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from earlysift import schema
from earlysift.compare.arms import ARMS
from earlysift.pretrain.workload_settings import WorkloadSettings
from earlysift.schema import Above0, Accuracy, Count, Keep, Share


def _separated(arms: Any) -> Any:
    """`--arms uniform,sift` is `--arms uniform sift`."""
    if not (isinstance(arms, tuple) and all(isinstance(arm, str) for arm in arms)):
        return arms
    return tuple(name for arm in arms for name in arm.split(",") if name)


@dataclass(frozen=True, kw_only=True)
class Settings(WorkloadSettings):
    """A comparison of arms on a workload."""

    save_encoder: bool = False
    """Save the encoder that uniform training ends with on the first seed (masked LM), to fine-tune from."""
    out: Path = Path("runs/compare")
    """Run folder: config.json, ledgers, results.json, curves.png, report.html; for a suite a folder of these."""
    arms: Annotated[tuple[str, ...], BeforeValidator(_separated)] = ("uniform", "sift", "sift-entropy", "exact", "auto")
    """Arms to compare; uniform is always needed."""
    seeds: Count = 1
    """Number of seeds; each gives every arm the same initial weights and data order. Three or more make evidence."""
    budget: Above0 = 60.0
    """Seconds of reference time that every arm may spend per seed; its learning rate decays to zero at the end."""
    steps: Count | None = None
    """The same budget as so many steps of uniform training, in place of seconds: a fast and a slow machine then train
    alike."""
    target: Accuracy | None = None
    """Validation accuracy (0 to 1) to reach. Without it: a share of what uniform reaches at the end of its budget."""
    target_share: Keep = 0.95
    """That share, so that noise at the very end does not decide."""
    keep: Keep = 0.5
    """Share of the pool that is trained on."""
    depth: int = 1
    """Layers that run for an early-exit score."""
    select_after: Share = 0.0
    """Share of the budget for which arms that select by a score, auto excepted, first train uniformly, without
    scoring."""
    batch: Count = 32
    """Samples per training step, in every arm; the pool is batch / keep."""
    learning_rate: Above0 = 1.5e-3
    """Peak learning rate, in every arm."""
    warmup: Share = 0.1
    """Share of an arm's budget with rising learning rate."""
    evaluations: Annotated[int, Field(ge=2)] = 16
    """Evaluations per arm and seed, evenly over its budget (not charged, the same for all arms)."""
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d)?)$", description="cpu, cuda or cuda:0 to cuda:9")] = "cpu"
    """Where to train: cpu, or an accelerator (cuda), which computes in bfloat16."""
    suite: Literal["demo", "cpu", "gpu"] | None = None
    """Run this suite of workloads, each a comparison in a folder of its own; other flags then hold for all of them."""
    only: tuple[str, ...] = ()
    """Workloads of the suite to run; without it all."""
    jobs: Count = 1
    """Workloads of the suite to run at a time, each on its share of the cores."""
    resume: bool = False
    """Go on in the run folder: finished arms and seeds are kept, others are run."""
    force: bool = False
    """Delete what an earlier comparison left in the run folder."""
    config: Path | None = None
    """TOML or JSON file with any of these settings (the config.json of a run folder, say); the command line has the
    last word."""

    def __post_init__(self) -> None:
        schema.validate(self, _RULES)

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


def _unknown_arms(settings: Settings) -> str:
    unknown = [arm for arm in settings.arms if arm not in ARMS]
    return f"Unknown arms {unknown}; known are {', '.join(ARMS)}." if unknown else ""


def _no_encoder(settings: Settings) -> str:
    if not settings.save_encoder or settings.task == "masked_lm":
        return ""
    return f"save_encoder saves the encoder of a masked language model; the task is {settings.task}."


def _no_uniform(settings: Settings) -> str:
    missing = "uniform" not in settings.arms
    return "The arm 'uniform' is needed: every other arm is compared with it." if missing else ""


def _too_deep(settings: Settings) -> str:
    exits = {name: ARMS[name].depths for name in settings.arms if name in ARMS}
    arms = sorted(name for name, depths in exits.items() if depths and min(depths) >= settings.layers)
    if not arms:
        return ""
    return (
        f"The arms {arms} exit after more layers than a model of {settings.layers} layers has before its last. Leave "
        "them out, or give more --layers."
    )


def _wrong_task(settings: Settings) -> str:
    arms = {name: ARMS[name].tasks for name in settings.arms if name in ARMS}
    wrong = {name: tasks for name, tasks in arms.items() if tasks and settings.task not in tasks}
    if not wrong:
        return ""
    able = " ".join(f"The arm {name!r} runs on {', '.join(tasks)} only." for name, tasks in wrong.items())
    return f"{able} Leave it out; the task is {settings.task}."


def _no_such_depth(settings: Settings) -> str:
    fine = 1 <= settings.depth < settings.layers
    return "" if fine else f"depth must be in 1..{settings.layers - 1}, got {settings.depth}."


def _no_such_width(settings: Settings) -> str:
    fine = settings.width < 512 or settings.width % 64 == 0
    return "" if fine else f"width must be a multiple of 64 from 512 on, got {settings.width}."


def _no_suite(settings: Settings) -> str:
    missing = settings.only and settings.suite is None
    return "only names workloads of a suite: give --suite, too." if missing else ""


def _two_budgets(settings: Settings) -> str:
    both = settings.steps is not None and settings.budget != Settings.budget
    return (
        "The budget is in seconds (budget) or in steps of uniform training (steps); give one of them." if both else ""
    )


def _both(settings: Settings) -> str:
    return "Choose one of resume and force." if settings.resume and settings.force else ""


_RULES: tuple[schema.Rule, ...] = (
    (("arms",), _unknown_arms),
    (("arms",), _no_uniform),
    (("arms", "layers"), _too_deep),
    (("arms", "task"), _wrong_task),
    (("save_encoder", "task"), _no_encoder),
    (("depth", "layers"), _no_such_depth),
    (("width",), _no_such_width),
    schema.POOL_FITS,
    (("budget", "steps"), _two_budgets),
    (("only", "suite"), _no_suite),
    (("resume", "force"), _both),
)
