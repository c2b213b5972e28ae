"""Stale selective backprop: selective backprop that runs its forward pass in every second epoch only."""

from functools import partial

from earlysift.compare.arm import Arm
from earlysift.compare.peers.selective_backprop import steps
from earlysift.compare.sifted import EXACT

ARM = Arm(
    "stale selective backprop",
    "selective backprop that runs its forward pass in every second epoch only, and draws by the losses of the epoch "
    "before in the others; training on a sample does not renew its loss, as it does in the authors' code. Needs "
    "several epochs",
    steps=partial(steps, staleness=2),
    source="Jiang et al., 2019, arXiv 1910.00762",
    scoring=EXACT,
)
