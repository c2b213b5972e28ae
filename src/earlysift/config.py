"""`SiftConfig`: how samples are selected. `Sifter`, `SiftTrainer`, `pretrain` and `compare` share it."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from earlysift import schedules, scorers, selectors
from earlysift.control import Control
from earlysift.families import Family
from earlysift.losses import Reduction
from earlysift.measures import MEASURES
from earlysift.options import finite, one_of, option, problems, whole
from earlysift.schedules import Schedule
from earlysift.scorers import SCORES, Scorer
from earlysift.selectors import Selector

_PLAIN = ("keep", "depth", "mode", "reduction", "max_positions", "drop_outliers", "probe_every", "trim", "scope")
_EXPLORED = 0.1
_SCHEDULE_SAMPLES = (0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000)


@dataclass(frozen=True)
class SiftConfig:
    """How samples are selected.

    Attributes:
        keep: b / R, in (0, 1]. The number kept is fixed by the first pool. 1.0 hands pools through untouched.
        kept: b, the number of candidates to keep; None is keep times the rows of the first pool.
        depth: Layers that run for a score, 1 to one less than the model has.
        score: ``"loss"``, ``"entropy"`` or ``"margin"`` at the exit (`earlysift.measures.MEASURES`), ``"probe"`` (the
            loss by a small model of its own at the exit, `earlysift.exit_probe`), ``"memory"`` (the loss that a sample
            had when it was last trained on), ``"blend"`` (the exact loss as predicted from both, `earlysift.blend`),
            ``"exact"`` (loss of the full model), ``"uniform"``, or a scorer ``(model, pool) -> (R,)``. Memory and blend
            learn from the training losses: train on `Sifter.loss`, or call `Sifter.observe`.
        sample_id: Key of the pool that holds the samples' ids, int64 ``(R,)``, from 0 on; needed by ``"memory"``, of
            use to ``"blend"``. It is taken out of the batch, as models do not know it; `Sifter.ids` has it.
        group: Key of the pool that holds the samples' groups (a class, a source, a language), int64 ``(R,)``, numbers
            0 to 999. It is taken out of the batch, and the ledger's row says how many candidates of each group were
            offered and kept (`earlysift.coverage`). It changes no choice.
        explore: Share of every batch that is drawn uniformly from the candidates that selection leaves out, in
            [0, 1); None is 0.1 with ``"blend"`` and in auto mode, which learn from it, and 0 else. It keeps easy
            samples from being forgotten, and shows what the loss of whole pools is (`Sifter.stats`).
        select: Selector ``(scores, kept, generator) -> Selection``.
        schedule: Optimizer step to share of steps that select; None selects at every step.
        keep_schedule: Optimizer step to keep, between ``keep`` and 1; the batch stays the same, and only the first
            b / keep candidates of the pool are considered (`Sifter.wanted`). None is ``keep`` at every step.
        mode: ``"fixed"`` selects as configured; ``"auto"`` starts uniformly, measures whether selection would pay, and
            chooses rule, depth and keep, or goes back to uniform batches (`earlysift.controller`). With ``sample_id``
            it may choose by remembered losses, too. The unbiased rule is a candidate only in loops that read
            `Sifter.weights`.
        control: What auto may choose from and spend; None is `earlysift.Control()`. The configured depth and
            keep are always among the candidates.
        family: A row for a model that `earlysift.families.FAMILIES` does not know, or what differs from a known one, as
            ``Family(labels="targets")``, the key of a pool that holds the labels.
        reduction: Mean or sum over a sample's labelled positions.
        max_positions: Labelled positions of a sample that an early exit reads at most, spread over its length: a
            cheaper and noisier score. Worth it where labels are many (causal language models); shapes are then fixed,
            and no accelerator is waited for. None reads all.
        drop_outliers: Share of the largest finite scores taken out of candidacy, in [0, 1). Rare samples
            are among them, beside wrong ones.
        probe_every: Optimizer steps between fidelity probes (one exact scoring of a step's first pool, charged as
            ``probe``); 0 never probes.
        trim: Whether to cut padding that no kept row needs. Scoring then pads within groups of similar length. Shapes
            vary, and an accelerator is waited for.
        scope: With several ranks, ``"local"`` selects b of the R candidates of every rank, ``"global"`` the best of all
            ranks' candidates together: scores are gathered and chosen rows exchanged, so that every rank still trains
            on b rows. Pools that differ in length only are padded to the longest one by their ``attention_mask``; else
            they need the same shapes on all ranks. `Sifter.selection` counts through all of them.
        seed: Seed of the selection.
        chunk_rows: Candidates scored at once; None is twice the number kept (and that number in exact scoring and
            probes), which without gradients needs no more memory than a training step. Where an accelerator runs out
            of it, the number is halved until the sifter is made anew, and a warning says so.
        dtype: Autocast dtype while scoring, see `earlysift.scorers.Scoring`.

    Raises:
        ValueError: With a sentence for every option that cannot work with any model.

    Example:
        >>> SiftConfig(keep=0.25, score="margin").depth
        1
        >>> SiftConfig(depth=1.5, seed="x")
        Traceback (most recent call last):
        ValueError: depth must be a whole number, got 1.5. It is the number of layers that run for a score.
        seed must be a whole number, got 'x'.
    """

    keep: float = option(
        0.5,
        lambda value: finite(value) and 0 < value <= 1,
        "in (0, 1]",
        "It is the share of the pool that is trained on; 0.5 is usual.",
    )
    kept: int | None = option(
        None,
        lambda value: value is None or whole(value, 1),
        "at least 1",
        "It is the number of candidates trained on per step, a whole number, or None.",
    )
    depth: int = option(
        1, lambda value: whole(value, -(1 << 63)), "a whole number", "It is the number of layers that run for a score."
    )
    score: str | Scorer = option(
        "loss",
        lambda value: callable(value) or (isinstance(value, str) and (value in MEASURES or value in SCORES)),
        f"one of {', '.join(SCORES)} or a callable",
    )
    sample_id: str | None = option(
        None, lambda value: value is None or (isinstance(value, str) and value != ""), "the name of a key, or None"
    )
    group: str | None = option(
        None, lambda value: value is None or (isinstance(value, str) and value != ""), "the name of a key, or None"
    )
    explore: float | None = option(
        None,
        lambda value: value is None or (finite(value) and 0 <= value < 1),
        "in [0, 1), or None",
        "It is the share of the batch that is drawn uniformly; 0.1 is usual.",
    )
    select: Selector = option(selectors.greedy, callable, "a callable (scores, kept, generator) -> Selection")
    schedule: Schedule | None = option(
        None,
        lambda value: value is None or callable(value),
        "a callable from steps to shares of steps that select, or None",
    )
    keep_schedule: Schedule | None = option(
        None, lambda value: value is None or callable(value), "a callable from steps to values of keep, or None"
    )
    mode: Literal["fixed", "auto"] = one_of("fixed", "fixed", "auto")
    control: Control | None = option(
        None, lambda value: value is None or isinstance(value, Control), "a Control or None"
    )
    family: Family | None = option(None, lambda value: value is None or isinstance(value, Family), "a Family or None")
    reduction: Reduction = one_of("mean", "mean", "sum")
    max_positions: int | None = option(None, lambda value: value is None or whole(value, 1), "at least 1 or None")
    drop_outliers: float = option(
        0.0, lambda value: finite(value) and 0 <= value < 1, "in [0, 1)", "It is a share of the pool; 0 is off."
    )
    probe_every: int = option(
        100, lambda value: whole(value, 0), "a whole number of at least 0", "It is a number of steps; 0 never probes."
    )
    trim: bool = option(False, lambda value: isinstance(value, bool), "True or False")
    scope: Literal["local", "global"] = one_of("local", "local", "global")
    seed: int = option(0, lambda value: whole(value, -(1 << 63)), "a whole number")
    chunk_rows: int | None = option(None, lambda value: value is None or whole(value, 1), "at least 1 or None")
    dtype: torch.dtype | str | None = option(
        scorers.AUTO_DTYPE,
        lambda value: (
            value is None
            or (isinstance(value, torch.dtype) and value.is_floating_point)
            or (isinstance(value, str) and value == scorers.AUTO_DTYPE)
        ),
        "a torch.dtype of floating point, 'auto' or None",
    )

    def __post_init__(self) -> None:
        wrong = problems(self)
        sentences = [*wrong.values()]
        if not wrong.keys() & {"score", "keep", "mode", "control"}:
            approximation = scorers.named(self.score, 1)
            # Auto mode has probes of its own; a blend learns only while it scores, so it cannot be looked at before.
            fixed = approximation is None or approximation.depth is None or self.score in ("probe", "blend")
            if self.mode == "auto" and (fixed or self.keep == 1):
                sentences.append(
                    "Auto mode chooses among early exits and needs keep below 1, got "
                    f"score={scorers.name_of(self.score)!r}, keep={self.keep}. Use score={_listed(MEASURES)}, or "
                    "mode='fixed'."
                )
            if self.score == "memory" and self.sample_id is None:
                sentences.append(
                    "score='memory' needs the samples' ids. Give sample_id, the key of the pool that has them."
                )
            if self.sample_id is not None and self.scope == "global":
                sentences.append("sample_id works on each rank's own candidates. Use scope='local'.")
            if self.group is not None and self.scope == "global":
                sentences.append("group counts each rank's own candidates. Use scope='local'.")
            if self.score == "blend" and self.scope == "global":
                sentences.append("score='blend' learns on each rank's own candidates. Use scope='local'.")
            unweighted = (selectors.greedy, selectors.percentile)
            if self.mode == "fixed" and self.explored and self.select not in unweighted:
                sentences.append(
                    "explore adds to what greedy or percentile choose, and would lose the weights of "
                    f"select={scorers.name_of(self.select)}. Give explore=0.0."
                )
            if self.mode == "auto" and self.sample_id is not None and self.explore == 0:
                sentences.append(
                    "Auto mode with sample_id needs samples that are drawn uniformly, to know what becomes of large "
                    "losses. Give explore above 0, or leave it out."
                )
            if self.mode == "auto" and self.keep_schedule is not None:
                sentences.append("Auto mode chooses keep itself. Leave keep_schedule out.")
            if self.mode == "fixed" and self.control is not None:
                sentences.append("control was given, but mode='fixed' ignores it. Set mode='auto'.")
        if sentences:
            raise ValueError("\n".join(sentences))
        for name in ("keep", "drop_outliers", "explore"):  # plain Python numbers: they go into checkpoints
            if getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        for name in ("kept", "depth", "max_positions", "probe_every", "seed"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, int(getattr(self, name)))

    def share(self, step: int) -> float:
        """The share of steps that select at an optimizer step, by the schedule.

        Raises:
            ValueError: If the schedule returns something else than a number.
        """
        share = (self.schedule or schedules.constant())(step)
        if not finite(share):
            raise ValueError(
                f"Expected the schedule to return a number in [0, 1], got {share!r} at step {step}. It is the share of "
                "steps that select."
            )
        return float(share)

    @property
    def explored(self) -> float:
        """The share of a batch that is drawn uniformly."""
        learns = self.score == "blend" or self.mode == "auto"
        return (_EXPLORED if learns else 0.0) if self.explore is None else self.explore

    def keep_at(self, step: int) -> float:
        """Keep at an optimizer step, by its schedule.

        Raises:
            ValueError: If the schedule returns something else than a number between ``keep`` and 1.
        """
        if self.keep_schedule is None:
            return self.keep
        keep = self.keep_schedule(step)
        if not (finite(keep) and self.keep <= keep <= 1):
            raise ValueError(
                f"Expected keep_schedule to return a number in [{self.keep:g}, 1], got {keep!r} at step {step}. Pools "
                "are only large enough for these."
            )
        return float(keep)

    def identity(self) -> dict[str, Any]:
        """The options that two runs must share to make the same picks, as JSON; for checkpoints.

        Functions have no value to save: a schedule is known by samples, a callable by its name.
        """
        control = self.control and json.loads(json.dumps(asdict(self.control)))
        return {
            **{name: getattr(self, name) for name in (*_PLAIN, "seed", "sample_id")},
            "score": scorers.name_of(self.score),
            "select": scorers.name_of(self.select),
            "schedule": [self.share(step) for step in _SCHEDULE_SAMPLES],
            "keep_schedule": self.keep_schedule and [self.keep_at(step) for step in _SCHEDULE_SAMPLES],
            "explore": self.explored,
            "control": control,
            "dtype": str(self.dtype),
        }


def _listed(names: Iterable[str]) -> str:
    *others, last = map(repr, names)
    return f"{', '.join(others)} or {last}"
