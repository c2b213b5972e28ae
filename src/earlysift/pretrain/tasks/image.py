"""Classification of images: a ViT on images of one's own, or on scikit-learn's handwritten digits."""

import torch
from torch import Generator

from earlysift.pretrain.augmentation import augment_images
from earlysift.pretrain.images import LabelledImages, read_digits, read_images
from earlysift.pretrain.models import build_vit
from earlysift.pretrain.stream import Rows
from earlysift.pretrain.workload_settings import WorkloadSettings
from earlysift.pretrain.workloads import TaskData

TAKES = ("data", "flipped", "augmented")

# Patches a side: with fewer than 4 attention has little to relate, and with more than 16 (256 in all) steps are slow.
_FEWEST_PATCHES, _MOST_PATCHES = 4, 16


def read(settings: WorkloadSettings) -> TaskData:
    """Read the images of an archive or a folder, without ``data`` the digits."""
    if len(settings.data) > 1:
        raise ValueError(f"The task image reads one .npz file or folder, got {len(settings.data)}; give one.")
    images = read_images(settings.data[0]) if settings.data else read_digits()
    side, classes = images.train["pixel_values"].size(-1), len(images.classes)
    patch = _patch_pixels(images)
    return TaskData(
        name=f"{images.name}, image classification",
        train=images.train,
        validation=images.validation,
        outputs=classes,
        make_model=lambda seed: build_vit(
            size=side,
            channels=images.train["pixel_values"].size(1),
            patch=patch,
            classes=classes,
            layers=settings.layers,
            width=settings.width,
            seed=seed,
        ),
        prepare=_scaled,
        augment=_augmented,
        facts={"pixels": f"{side} x {side}", "patch": patch, "classes": classes},
    )


def _patch_pixels(images: LabelledImages) -> int:
    """Side of a patch: the largest that divides the image's and leaves 4 patches a side or more.

    So digits of 8 x 8 pixels have patches of 2, MNIST's 28 x 28 of 7 and CIFAR's 32 x 32 of 8, 16 patches each: the
    cost of a step grows with the number of patches, and a comparison must take many steps on a CPU.
    """
    height, width = images.train["pixel_values"].shape[-2:]
    if height != width:
        raise ValueError(
            f"{images.name}: expected square images, got {width} x {height} pixels; crop or pad them to squares"
        )
    for patches in range(_FEWEST_PATCHES, _MOST_PATCHES + 1):
        if width % patches == 0:
            return width // patches
    nearest = max(_FEWEST_PATCHES, width - width % _FEWEST_PATCHES)
    raise ValueError(
        f"{images.name}: expected images whose side {_FEWEST_PATCHES} to {_MOST_PATCHES} patches divide evenly, got "
        f"{width} x {width} pixels; crop or pad them, for instance to {nearest} x {nearest}"
    )


def _augmented(rows: Rows, generator: Generator) -> Rows:
    return {**rows, "pixel_values": augment_images(rows["pixel_values"], generator)}


def _scaled(rows: Rows, _: Generator) -> Rows:
    """Pixels as floats from -1 to 1; stored as bytes they take a quarter of the memory."""
    pixels = rows["pixel_values"]
    return {**rows, "pixel_values": pixels / 127.5 - 1} if pixels.dtype == torch.uint8 else rows
