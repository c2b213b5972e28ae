"""RS2: a fresh random subset of the data in every epoch."""

from functools import partial

from earlysift.compare.arm import Arm
from earlysift.compare.sifted import sifted

ARM = Arm(
    "random subsets",
    "trains on a fresh random tenth of the data each epoch",
    steps=partial(sifted, keep=1.0, subset=0.1),
    source="Okanovic et al., 2023, arXiv 2305.18424",
    idle="the first subset did not end",
)
