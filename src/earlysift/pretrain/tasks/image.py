"""Classification of images: a ViT on scikit-learn's handwritten digits."""

import torch

from earlysift.pretrain.models import build_vit
from earlysift.pretrain.optional import optional_package
from earlysift.pretrain.workload_settings import WorkloadSettings
from earlysift.pretrain.workloads import TaskData
from earlysift.seeds import seeded

TAKES = ("flipped",)

_VALIDATION_SAMPLES = 360  # of 1,797
_PATCH_PIXELS = 2  # images of 8 x 8 pixels have 16 patches


def read(settings: WorkloadSettings) -> TaskData:
    """Read the digits; the settings give the size of the model alone."""
    digits = optional_package("sklearn.datasets", extra="data").load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32).unsqueeze(1)  # 0 .. 16 becomes -1 .. 1
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=seeded("digits"))
    train, validation = order[_VALIDATION_SAMPLES:], order[:_VALIDATION_SAMPLES]
    size, classes = images.size(-1), len(digits.target_names)
    return TaskData(
        name="handwritten digits, image classification",
        train={"pixel_values": images[train], "labels": labels[train]},
        validation={"pixel_values": images[validation], "labels": labels[validation]},
        outputs=classes,
        make_model=lambda seed: build_vit(
            size=size,
            channels=1,
            patch=_PATCH_PIXELS,
            classes=classes,
            layers=settings.layers,
            width=settings.width,
            seed=seed,
        ),
        facts={"pixels": f"{size} x {size}", "patch": _PATCH_PIXELS, "classes": classes},
    )
