"""Majority of bits: a BERT tells whether a row of bits holds more ones than zeros."""

import torch

from earlysift.pretrain.models import build_bert_classifier
from earlysift.pretrain.workload_settings import WorkloadSettings
from earlysift.pretrain.workloads import TaskData
from earlysift.seeds import seeded

TAKES = ("flipped",)


def read(settings: WorkloadSettings) -> TaskData:
    """Draw 1,000 rows to train on and 200 to validate on."""
    bits = torch.randint(2, (1_200, settings.length), generator=seeded("majority"))
    rows = {"input_ids": bits, "labels": (2 * bits.sum(dim=1) > settings.length).long()}
    return TaskData(
        name="majority of bits",
        train={name: values[:1_000] for name, values in rows.items()},
        validation={name: values[1_000:] for name, values in rows.items()},
        outputs=2,
        make_model=lambda seed: build_bert_classifier(
            classes=2, vocab_size=2, length=settings.length, layers=settings.layers, width=settings.width, seed=seed
        ),
        facts={"length": settings.length, "classes": 2},
    )
