"""Augmentation of images: random shifts, and mirrored copies of those with colour, vectorised over a batch."""

import torch
from torch import Generator, Tensor

_SHIFT = 8  # an image moves by up to one in so many pixels of its side, and small ones by up to one pixel
_COLOURED = 3  # channels; grey images are often signs, which mean something else when they are mirrored


def augment_images(images: Tensor, generator: Generator) -> Tensor:
    """Shift every image by a whole number of pixels each way, and mirror coloured ones with odds of one half.

    Pixels that a shift uncovers repeat the edge: a border of one colour would be what no image to evaluate has.

    Args:
        images: ``(N, channels, height, width)`` of any type.
        generator: Draws the shifts down, those to the right, and which images are mirrored.

    Returns:
        New images of the same shape and type.

    Example:
        >>> images = torch.arange(8.0).expand(2, 1, 8, 8)
        >>> augment_images(images, torch.Generator().manual_seed(1))[:, 0, 0].tolist()
        [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 7.0], [0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0]]
    """
    count, channels, height, width = images.shape
    rows, columns = (_shifted(count, side, generator) for side in (height, width))
    if channels == _COLOURED:
        mirrored = torch.randint(2, (count, 1), generator=generator).bool()
        columns = torch.where(mirrored, columns.flip(1), columns)
    return images.gather(2, rows[:, None, :, None].expand_as(images)).gather(
        3, columns[:, None, None, :].expand_as(images)
    )


def _shifted(count: int, side: int, generator: Generator) -> Tensor:
    """Where the pixels of a side come from in each image, int64 ``(count, side)``."""
    most = max(1, side // _SHIFT)
    shifts = torch.randint(-most, most + 1, (count, 1), generator=generator)
    return (torch.arange(side) - shifts).clamp(0, side - 1)
