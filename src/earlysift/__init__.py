"""Train faster by back-propagating only the samples that matter, chosen by an early exit of the model itself."""

from earlysift.checks import check
from earlysift.exits import ExitHead, Family, truncated
from earlysift.ledger import Ledger
from earlysift.schedules import anneal, constant, warmup
from earlysift.selectors import Selection
from earlysift.sifter import Sifter

__all__ = [
    "ExitHead",
    "Family",
    "Ledger",
    "Selection",
    "Sifter",
    "anneal",
    "check",
    "constant",
    "truncated",
    "warmup",
]
