"""Masked language modelling of single characters, by a ModernBERT: a task that small models can get far in.

Learned positions and norms behind the layers, as BERT has them, hold small masked models back on their plateau.
"""

from earlysift.pretrain.language import read_blocks
from earlysift.pretrain.models import build_modernbert
from earlysift.pretrain.tasks.masked_lm import masked_data
from earlysift.pretrain.workload_settings import WorkloadSettings
from earlysift.pretrain.workloads import TaskData

TAKES = ("data", "text_column", "max_characters")


def read(settings: WorkloadSettings) -> TaskData:
    """Read text as `read_blocks` does, a character a token."""
    name, blocks = read_blocks(settings, characters=True)
    return masked_data(f"{name}, masked characters", blocks, settings, build_modernbert)
