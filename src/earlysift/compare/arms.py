"""Arms as rows of data: how each trains, where it comes from, and what its steps are charged for.

Functions go by their names in `earlysift.compare.steps.FUNCTIONS`, so that settings know the arms without torch.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        label: Name in plots and tables.
        description: One line for the report; says where it departs from its paper.
        source: Author, year, arXiv number; None for what has no paper.
        kind: Which steps it takes, a key of `earlysift.compare.steps.STEPS`.
        options: Arguments of that kind.
        training: The operation that a training step is charged as.
        scoring: The operation that scoring a pool is charged as, by the names that `earlysift.compare.calibrate`
            measures; ``{depth}`` stands for the exit. None: nothing is scored.
        depths: Exits that it uses; without any the comparison's depth.
        charged: False only for an upper bound: then a step is charged like a uniform one, whatever it did.
        idle: Why all of its steps may have been uniform training's own, in words.
    """

    label: str
    description: str
    source: str | None = None
    kind: str = "sifted"
    options: dict[str, Any] = field(default_factory=dict)
    training: str = "train"
    scoring: str | None = None
    depths: tuple[int, ...] = ()
    charged: bool = True
    idle: str = ""


EXIT_HEAD_WIDTH = 64  # of the residual layer of an exit's own head
_SIFT = "Das et al., 2024, arXiv 2402.07052"


def _sift(
    label: str,
    description: str,
    *,
    score: str = "loss",
    depth: int | None = None,
    training: str = "train",
    scoring: str | None = None,
    **options: Any,
) -> Arm:
    scoring = scoring or {"loss": "score_{depth}", "entropy": "entropy_{depth}", "exact": "exact"}[score]
    return Arm(
        label,
        description,
        _SIFT,
        options={"score": score, **options},
        training=training,
        scoring=scoring,
        depths=() if depth is None else (depth,),
    )


ARMS: dict[str, Arm] = {
    "uniform": Arm("uniform", "plain training: every candidate is trained on", options={"keep": 1.0}),
    "sift": _sift("SIFT", "keeps the candidates with the largest loss at the early exit"),
    **{
        f"sift-{depth}": _sift(
            f"SIFT, exit {depth}",
            f"keeps the candidates with the largest loss at an early exit after {depth} layers",
            depth=depth,
        )
        for depth in (2, 3, 6)
    },
    "sift-warm": _sift(
        "SIFT, warmed up", "SIFT after a first third of the budget with uniform training", select_after=1 / 3
    ),
    **{
        f"sift-joint-{depth}": _sift(
            f"SIFT, exit {depth} trained",
            f"SIFT at an early exit after {depth} layers whose loss is trained along with the model's, by a weight of "
            "0.3",
            depth=depth,
            training="train_joint_{depth}",
            joint=0.3,
        )
        for depth in (1, 2)
    },
    **{
        f"sift-head-{depth}": _sift(
            f"SIFT, exit {depth} with a head",
            f"SIFT at an early exit after {depth} layers with a head of its own, trained on detached features",
            scoring="head_{depth}",
            depth=depth,
            own_head=EXIT_HEAD_WIDTH,
        )
        for depth in (1, 2)
    },
    "sift-entropy": _sift(
        "SIFT, entropy",
        "keeps the candidates whose prediction at the early exit has the largest entropy",
        score="entropy",
    ),
    "sift-entropy-warm": _sift(
        "SIFT, entropy, warmed up",
        "SIFT by entropy after a first third of the budget with uniform training",
        score="entropy",
        select_after=1 / 3,
    ),
    "sift-entropy-3": _sift(
        "SIFT, entropy, exit 3",
        "keeps the candidates whose prediction at an early exit after 3 layers has the largest entropy",
        score="entropy",
        depth=3,
    ),
    "sift-unbiased": _sift(
        "SIFT, unbiased",
        "draws candidates in proportion to their loss at an early exit after 3 layers, with weights that keep the mean "
        "gradient unbiased (T7)",
        depth=3,
        select="proportional",
    ),
    "exact": _sift(
        "exact loss",
        "keeps the candidates with the largest loss under the full model: what SIFT approximates",
        score="exact",
    ),
    "free": Arm(
        "exact loss, free",
        "exact loss whose scoring is not charged: an upper bound, not a way to train",
        _SIFT,
        options={"score": "exact"},
        scoring="exact",
        charged=False,
    ),
    "selective-backprop": Arm(
        "selective backprop",
        "looks at candidates until a batch is full, and draws each with the probability that one of the last 1,024 "
        "exact losses does not exceed its own (beta 1); the first epoch without selection of the authors' code is left "
        "out",
        "Jiang et al., 2019, arXiv 1910.00762",
        kind="selective",
        scoring="exact",
    ),
    "ordered-sgd": Arm(
        "ordered SGD",
        "averages the q largest losses of the batch itself; q halves when training accuracy (mean of the last 100 "
        "batches) first reaches 80, 90, 95 and 99.5 %",
        "Kawaguchi and Lu, 2020, arXiv 1907.04371",
        kind="ordered",
        idle="training accuracy never reached 80 %",
    ),
    "rho-loss": Arm(
        "RHO-loss",
        "keeps the tenth of a pool whose loss exceeds a reference model's most; the reference is the same model, "
        "trained on a fifth of the training part, held out for it, for a fifth of the budget, which is charged (the "
        "paper shares one among many runs)",
        "Mindermann et al., 2022, arXiv 2206.07137",
        kind="reducible",
        scoring="exact",
    ),
    "infobatch": Arm(
        "InfoBatch",
        "skips half of the samples whose last loss was below the mean, anew every epoch, and doubles the gradients of "
        "the other half; the last 12.5 % of training skips nothing. Needs several epochs",
        "Qin et al., 2024, arXiv 2303.04947",
        kind="infobatch",
        idle="the first epoch, which skips nothing, did not end",
    ),
    "grad-norm": Arm(
        "gradient norm",
        "draws from a pool of 3 b in proportion to a bound on the gradient norm, with unbiased weights, without "
        "replacement, while the variance reduction tau exceeds 1.5 (smoothed by 0.9); measuring tau on uniform batches "
        "meanwhile is not charged",
        "Katharopoulos and Fleuret, 2018, arXiv 1803.00942",
        kind="importance",
        scoring="grad_norm",
        idle="the variance reduction never exceeded 1.5",
    ),
    "visible": Arm(
        "visible labels",
        "keeps the candidates with the most labelled tokens left in place: a control that needs no model (masked LM "
        "only). An arm that is not ahead of it may owe its gain to copying",
        options={"score": "visible_labels"},
        scoring="visible",
    ),
    "rs2": Arm(
        "random subsets",
        "trains on a fresh random tenth of the data each epoch",
        "Okanovic et al., 2023, arXiv 2305.18424",
        options={"keep": 1.0, "subset": 0.1},
        idle="the first subset did not end",
    ),
    "auto": Arm(
        "auto",
        "measures cost and gain as it trains, and chooses greedy, unbiased or uniform training, exit and keep by them",
        options={"mode": "auto", "keep": 0.25},
        scoring="score_{depth}",
        depths=(1, 2, 3),
    ),
}
