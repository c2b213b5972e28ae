"""How much of the scorecard runs: all for ``make scorecard``, more for ``make torture``, little for ``make test``."""

import math
import os

LONG = os.environ.get("EARLYSIFT_SCORECARD") == "long"
FULL = LONG or os.environ.get("EARLYSIFT_SCORECARD") == "1"
_GOLDEN = (math.sqrt(5) - 1) / 2


def cases(everything, few):
    """All cases of a line, or a few, spread evenly; all in an order of which any beginning is of every kind."""
    everything = list(everything)
    if not FULL:
        return everything[:: math.ceil(len(everything) / few)]
    return [everything[i] for i in sorted(range(len(everything)), key=lambda i: i * _GOLDEN % 1)]
