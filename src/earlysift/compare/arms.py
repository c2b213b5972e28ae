"""All arms by name: uniform training, SIFT and its variants, and its peers."""

import pkgutil
from functools import partial
from importlib import import_module
from typing import Any

from earlysift.compare import peers
from earlysift.compare.arm import TRAIN, Arm, Operation
from earlysift.compare.sifted import (
    AUTO_DEPTHS,
    AUTO_SCORING,
    BLEND,
    EXACT,
    EXIT_HEAD_WIDTH,
    EXIT_PROBE,
    HEAD,
    JOINT_WEIGHT,
    LESSON,
    LOOK,
    MEMORY,
    PROBE,
    SCORING,
    TRAIN_JOINTLY,
    auto,
    learning,
    sifted,
)
from earlysift.measures import MEASURES, sift_arm

_SIFT = "Das et al., 2024, arXiv 2402.07052"
_STALE = "Stale losses: Jiang et al., 2019, arXiv 1910.00762"
_WARM = 1 / 3  # share of the budget that warmed-up arms train uniformly for
_DROPPED = 0.2  # of the candidates, by the guard against outliers


def _sift(
    label: str,
    description: str,
    *,
    scoring: Operation,
    depth: int | None = None,
    training: Operation = TRAIN,
    charged: bool = True,
    **options: Any,
) -> Arm:
    depths = () if depth is None else (depth,)
    steps = partial(sifted, depth=depth, **options)
    return Arm(label, description, steps, _SIFT, training, scoring, depths=depths, charged=charged)


def _by_score(score: str) -> dict[str, Arm]:
    """SIFT by one score: at the comparison's exit, after a warm-up, and at other exits."""
    is_loss = score == "loss"
    label, by = ("SIFT", "SIFT") if is_loss else (f"SIFT, {score}", f"SIFT by {score}")
    keeps = f"keeps the candidates with {MEASURES[score].keeps}"
    name, arm = sift_arm(score), partial(_sift, scoring=SCORING[score], score=score)
    return {
        name: arm(label, f"{keeps} at the early exit"),
        f"{name}-warm": arm(
            f"{label}, warmed up",
            f"{by} after a first third of the budget with uniform training",
            select_after=_WARM,
        ),
        **{
            f"{name}-{depth}": arm(
                f"{label}, exit {depth}", f"{keeps} at an early exit after {depth} layers", depth=depth
            )
            for depth in ((2, 3, 6) if is_loss else (3,))
        },
    }


def _learning(name: str, label: str, what: str, **parts: Any) -> dict[str, Arm]:
    """Selection by a score that learns: the candidates with the largest, and drawn in proportion to it."""
    options = {key: parts.pop(key) for key in ("score", "depth") if key in parts}
    return {
        name: Arm(label, f"keeps the candidates with the largest {what}", partial(learning, **options), **parts),
        f"{name}-unbiased": Arm(
            f"{label}, unbiased",
            f"draws candidates in proportion to the {what}, with weights that keep the mean gradient unbiased (T7)",
            partial(learning, select="proportional", explore=0.0, **options),
            **parts,
        ),
    }


ARMS: dict[str, Arm] = {
    "uniform": Arm("uniform", "plain training: every candidate is trained on", partial(sifted, keep=1.0)),
    **{name: arm for score in MEASURES for name, arm in _by_score(score).items()},
    **{
        f"sift-joint-{depth}": _sift(
            f"SIFT, exit {depth} trained",
            f"SIFT at an early exit after {depth} layers whose loss is trained along with the model's, by a weight of "
            f"{JOINT_WEIGHT}",
            scoring=SCORING["loss"],
            depth=depth,
            training=TRAIN_JOINTLY,
            joint=JOINT_WEIGHT,
        )
        for depth in (1, 2)
    },
    **{
        f"sift-head-{depth}": _sift(
            f"SIFT, exit {depth} with a head",
            f"SIFT at an early exit after {depth} layers with a head of its own, trained on detached features",
            scoring=HEAD,
            depth=depth,
            own_head=EXIT_HEAD_WIDTH,
        )
        for depth in (1, 2)
    },
    "sift-unbiased": _sift(
        "SIFT, unbiased",
        "draws candidates in proportion to their loss at an early exit after 3 layers, with weights that keep the mean "
        "gradient unbiased (T7)",
        scoring=SCORING["loss"],
        depth=3,
        select="proportional",
    ),
    "exact": _sift(
        "exact loss",
        "keeps the candidates with the largest loss under the full model: what SIFT approximates",
        scoring=EXACT,
        score="exact",
    ),
    "free": _sift(
        "exact loss, free",
        "exact loss whose scoring is not charged: an upper bound, not a way to train",
        scoring=EXACT,
        score="exact",
        charged=False,
    ),
    **_learning(
        "memory",
        "memory",
        "loss when they were last trained on, those never trained on first",
        score="memory",
        source=_STALE,
        scoring=MEMORY,
    ),
    "memory-guarded": Arm(
        "memory, guarded",
        f"memory that leaves out the largest {_DROPPED:.0%} of a pool's losses and draws a tenth of a batch uniformly",
        partial(learning, score="memory", drop_outliers=_DROPPED, explore=0.1),
        source=_STALE,
        scoring=MEMORY,
    ),
    **{
        name: arm
        for score, operation, what in (
            ("probe", EXIT_PROBE, "loss by a small model of its own at an early exit"),
            ("blend", BLEND, "loss as predicted from such a probe and from remembered losses, at an early exit"),
        )
        for depth in (1, 2, 3)
        for name, arm in _learning(
            f"{score}-{depth}",
            f"{score}, exit {depth}",
            f"{what} after {depth} layers",
            score=score,
            depth=depth,
            source=_SIFT,
            scoring=operation,
            depths=(depth,),
        ).items()
    },
    "auto": Arm(
        "auto",
        "measures cost and gain as it trains, and chooses greedy, unbiased or uniform training, remembered losses or "
        "an exit, and keep by them",
        auto,
        scoring=AUTO_SCORING,
        probing=PROBE,
        teaching=LESSON,
        looking=LOOK,
        depths=AUTO_DEPTHS,
    ),
    **{
        file.name.replace("_", "-"): import_module(f"{peers.__name__}.{file.name}").ARM
        for file in pkgutil.iter_modules(peers.__path__)
    },
}
"""Name to arm, on the command line and in results.json. Every file of `earlysift.compare.peers` adds one."""
