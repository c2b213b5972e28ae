"""How much of the scorecard runs: all for ``make scorecard``, more for ``make torture``, little for ``make test``."""

import math
import os

LONG = os.environ.get("EARLYSIFT_SCORECARD") == "long"
FULL = LONG or os.environ.get("EARLYSIFT_SCORECARD") == "1"


def cases(everything, few):
    """All cases of a line, or a few, spread evenly."""
    everything = list(everything)
    return everything if FULL else everything[:: math.ceil(len(everything) / few)]
