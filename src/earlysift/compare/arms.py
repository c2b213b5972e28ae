"""All arms by name: uniform training, SIFT and its variants, and its peers."""

import pkgutil
from functools import partial
from importlib import import_module
from typing import Any

from earlysift.compare import peers
from earlysift.compare.arm import TRAIN, Arm, Operation
from earlysift.compare.sifted import AUTO_DEPTHS as _AUTO_DEPTHS
from earlysift.compare.sifted import (
    EXACT,
    EXIT_HEAD_WIDTH,
    HEAD,
    JOINT_WEIGHT,
    PROBE,
    SCORING,
    TRAIN_JOINTLY,
    auto,
    sifted,
)

_SIFT = "Das et al., 2024, arXiv 2402.07052"
_WARM = 1 / 3  # share of the budget that warmed-up arms train uniformly for


def _sift(
    label: str,
    description: str,
    scoring: Operation,
    *,
    depth: int | None = None,
    training: Operation = TRAIN,
    charged: bool = True,
    **options: Any,
) -> Arm:
    depths = () if depth is None else (depth,)
    steps = partial(sifted, depths=depths, **options)
    return Arm(label, description, steps, _SIFT, training, scoring, depths=depths, charged=charged)


def _by_score(score: str) -> dict[str, Arm]:
    """SIFT by one score: at the comparison's exit, after a warm-up, at the third layer."""
    name, label = ("sift", "SIFT") if score == "loss" else (f"sift-{score}", f"SIFT, {score}")
    keeps = f"keeps the candidates with the largest {score}"
    by = "SIFT" if score == "loss" else f"SIFT by {score}"
    scoring = SCORING[score]
    return {
        name: _sift(label, f"{keeps} at the early exit", scoring, score=score),
        f"{name}-warm": _sift(
            f"{label}, warmed up",
            f"{by} after a first third of the budget with uniform training",
            scoring,
            score=score,
            select_after=_WARM,
        ),
        f"{name}-3": _at(3, label, keeps, score),
    }


def _at(depth: int, label: str, keeps: str, score: str) -> Arm:
    description = f"{keeps} at an early exit after {depth} layers"
    return _sift(f"{label}, exit {depth}", description, SCORING[score], depth=depth, score=score)


ARMS: dict[str, Arm] = {
    "uniform": Arm("uniform", "plain training: every candidate is trained on", partial(sifted, keep=1.0)),
    **{name: arm for score in SCORING for name, arm in _by_score(score).items()},
    **{f"sift-{depth}": _at(depth, "SIFT", "keeps the candidates with the largest loss", "loss") for depth in (2, 6)},
    **{
        f"sift-joint-{depth}": _sift(
            f"SIFT, exit {depth} trained",
            f"SIFT at an early exit after {depth} layers whose loss is trained along with the model's, by a weight of "
            f"{JOINT_WEIGHT}",
            SCORING["loss"],
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
            HEAD,
            depth=depth,
            own_head=EXIT_HEAD_WIDTH,
        )
        for depth in (1, 2)
    },
    "sift-unbiased": _sift(
        "SIFT, unbiased",
        "draws candidates in proportion to their loss at an early exit after 3 layers, with weights that keep the mean "
        "gradient unbiased (T7)",
        SCORING["loss"],
        depth=3,
        select="proportional",
    ),
    "exact": _sift(
        "exact loss",
        "keeps the candidates with the largest loss under the full model: what SIFT approximates",
        EXACT,
        score="exact",
    ),
    "free": _sift(
        "exact loss, free",
        "exact loss whose scoring is not charged: an upper bound, not a way to train",
        EXACT,
        score="exact",
        charged=False,
    ),
    "auto": Arm(
        "auto",
        "measures cost and gain as it trains, and chooses greedy, unbiased or uniform training, exit and keep by them",
        auto,
        scoring=SCORING["loss"],
        probing=PROBE,
        depths=_AUTO_DEPTHS,
    ),
    **{
        file.name.replace("_", "-"): import_module(f"{peers.__name__}.{file.name}").ARM
        for file in pkgutil.iter_modules(peers.__path__)
    },
}
"""Name to arm, on the command line and in results.json. Every file of `earlysift.compare.peers` adds one."""
