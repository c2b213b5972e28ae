"""Arms as rows of data: how each selects, and which operations one of its steps is charged for."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        label: Name in plots and tables.
        description: One line for the report.
        operations: Operations per step and their number, by the names that `earlysift.compare.calibrate` measures.
        sifter: Arguments for `Sifter` beyond those that all arms share.
    """

    label: str
    description: str
    operations: dict[str, int]
    sifter: dict[str, Any]


ARMS: dict[str, Arm] = {
    "uniform": Arm(
        "uniform",
        "plain training: every candidate is trained on",
        {"read_batch": 1, "train": 1},
        {"keep": 1.0},
    ),
    "sift": Arm(
        "SIFT",
        "keeps the candidates with the largest loss at the early exit",
        {"read_pool": 1, "score": 1, "train": 1},
        {"score": "loss"},
    ),
    "exact": Arm(
        "exact loss",
        "keeps the candidates with the largest loss under the full model",
        {"read_pool": 1, "exact": 1, "train": 1},
        {"score": "exact"},
    ),
}
