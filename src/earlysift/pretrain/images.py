"""Labelled images in two parts: scikit-learn's digits, NumPy archives, and a folder for every class."""

import zipfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from earlysift.pretrain.classes import class_ids
from earlysift.pretrain.formats import require_plausible
from earlysift.pretrain.optional import optional_package
from earlysift.pretrain.stream import Rows
from earlysift.seeds import seeded

Part = tuple[Tensor, list[str]]
"""Images ``(N, channels, height, width)``, and the name of the class of each."""

# Pairs of arrays in an archive: images and their labels. The first pair that is there counts.
_TRAINING = (("train_images", "train_labels"), ("x_train", "y_train"), ("images", "labels"))
_HELD_OUT = (
    ("validation_images", "validation_labels"),
    ("val_images", "val_labels"),
    ("test_images", "test_labels"),
    ("x_test", "y_test"),
)
_HELD_OUT_FOLDERS = ("validation", "val", "test")  # beside "train"
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})
_GREY = frozenset({"1", "L"})  # Pillow's modes of images without colour
_CHANNELS = (1, 3)
_VALIDATION_ONE_IN = 5
_LAYOUTS = "(N, height, width), (N, height, width, channels) or (N, channels, height, width) with 1 or 3 channels"


@dataclass(frozen=True)
class LabelledImages:
    """Images in two parts, of one size.

    Attributes:
        name: What reports call them.
        classes: Names of the classes, in the order of their ids.
        train: ``pixel_values`` ``(N, channels, height, width)``, uint8 or float32 within -1 .. 1, and ``labels``, int64
            ``(N,)`` from 0 on.
        validation: The same of the held-out part, ``(M, ...)``.
    """

    name: str
    classes: list[str]
    train: Rows
    validation: Rows


def read_digits() -> LabelledImages:
    """Read scikit-learn's 1,797 handwritten digits of 8 x 8 pixels; one in five is held out.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    digits = optional_package("sklearn.datasets", extra="data").load_digits()
    images = torch.tensor(digits.images / 8 - 1, dtype=torch.float32).unsqueeze(1)  # 0 .. 16 becomes -1 .. 1
    return _labelled("handwritten digits", (images, [str(label) for label in digits.target]), None)


def read_images(path: Path) -> LabelledImages:
    """Read a NumPy archive (.npz) of images and labels, or a folder that has a folder of images for every class.

    An archive holds ``train_images`` and ``train_labels``, ``x_train`` and ``y_train``, or ``images`` and ``labels``;
    held-out images are named validation, val or test in place of train. A folder holds ``train/<class>/*.png`` (or
    .jpg) and the same below validation, val or test; or the classes alone. Without a held-out part one image in five,
    chosen by a fixed seed, is held out.

    Args:
        path: The archive or folder.

    Returns:
        The images, named like the path.

    Raises:
        FileNotFoundError: If nothing is there.
        ValueError: If images or labels are missing, damaged or do not fit each other.
        ImportError: If the package that reads them is not installed.
    """
    if path.is_dir():
        train, validation = _read_folder(path)
    elif not path.exists():
        raise FileNotFoundError(
            f"{path}: expected a .npz file or a folder of images, but nothing is there; check the path (without one "
            "the task uses scikit-learn's digits)"
        )
    elif path.suffix.lower() == ".npz":
        train, validation = _read_archive(path)
    else:
        raise ValueError(
            f"{path}: expected a .npz file with images and labels, or a folder that has a folder of images for every "
            "class, got another file; save the arrays with numpy.savez(path, images=..., labels=...)"
        )
    return _labelled(path.resolve().name, train, validation)


def _labelled(name: str, train: Part, validation: Part | None) -> LabelledImages:
    """Both parts with class ids for names; without a validation part one is held out."""
    (train_images, train_labels), (images, labels) = (train, validation) if validation else _hold_out(*train)
    classes, train_ids, ids = class_ids(name, train_labels, labels)
    return LabelledImages(
        name,
        classes,
        train={"pixel_values": train_images, "labels": train_ids},
        validation={"pixel_values": images, "labels": ids},
    )


def _hold_out(images: Tensor, labels: list[str]) -> tuple[Part, Part]:
    # The key is that of the digits, which came first: another one would change their committed results.
    order = torch.randperm(len(labels), generator=seeded("digits"))
    count = -(-len(labels) // _VALIDATION_ONE_IN)  # rounded up
    train, validation = (
        (images[chosen], [labels[number] for number in chosen.tolist()]) for chosen in (order[count:], order[:count])
    )
    return train, validation


def _read_archive(path: Path) -> tuple[Part, Part | None]:
    numpy = optional_package("numpy", extra="data")
    known = {name for pair in (*_TRAINING, *_HELD_OUT) for name in pair}
    arrays: dict[str, Any] = {}
    place = ""
    require_plausible(_unpacked_bytes(path, known), path.stat().st_size, path, "save the arrays with numpy.savez")
    try:
        # Not numpy.load, which takes any file that is no archive for pickled objects.
        with numpy.lib.npyio.NpzFile(path, allow_pickle=False) as archive:
            found = archive.files
            for name in filter(known.__contains__, found):
                place = f" ({name})"
                arrays[name] = archive[name]
    except Exception as error:  # zipfile, zlib and NumPy raise nearly anything
        raise ValueError(
            f"{path}: expected an archive of arrays without Python objects, but {type(error).__name__}: {error}{place}"
            "; save numbers in arrays of one shape each, with numpy.savez"
        ) from error

    def first_present(pairs: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
        return next((pair for pair in pairs if not arrays.keys().isdisjoint(pair)), None)

    training, held_out = first_present(_TRAINING) or _TRAINING[0], first_present(_HELD_OUT)
    missing = [name for name in (*training, *(held_out or ())) if name not in arrays]
    if missing:
        raise ValueError(
            f"{path}: expected {' and '.join(missing)}, found the arrays {', '.join(found) or 'none'}; the names that "
            f"are read are {'; '.join(' and '.join(pair) for pair in (*_TRAINING, *_HELD_OUT))}"
        )
    train = _part_of(arrays, training, path)
    if held_out is None:
        return train, None
    validation = _part_of(arrays, held_out, path)
    shapes = [
        f"{str(images.dtype).removeprefix('torch.')} of {tuple(images.shape[1:])}" for images, _ in (train, validation)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{path}: expected {training[0]} and {held_out[0]} of one type and shape, got {shapes[0]} and {shapes[1]} "
            "(channels, height, width); save both alike"
        )
    return train, validation


def _unpacked_bytes(path: Path, names: Collection[str]) -> int:
    """What these arrays of an archive unpack to, as it says itself; 0 if it is damaged."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            return sum(entry.file_size for entry in entries if entry.filename.removesuffix(".npy") in names)
    except Exception:  # it raises nearly anything, and reading the arrays tells what is wrong
        return 0


def _part_of(arrays: dict[str, Any], pair: tuple[str, str], path: Path) -> Part:
    """The images of a pair of arrays, channels first, and their labels."""
    images, labels = (arrays[name] for name in pair)
    where = f"{path}: expected {pair[0]}"
    shape = images.shape
    if len(shape) == 3:
        images = images[:, None]
    elif len(shape) == 4 and shape[3] in _CHANNELS:
        images = images.transpose(0, 3, 1, 2)
    elif len(shape) != 4 or shape[1] not in _CHANNELS:
        raise ValueError(f"{where} of shape {_LAYOUTS}, got {shape}; reshape them")
    if not images.size:
        raise ValueError(f"{where} to hold images, got an array of shape {shape}; save at least one")
    if images.dtype.kind == "f":
        lowest, highest = images.min(), images.max()
        if not (lowest >= -1 and highest <= 1):  # so written, nan is refused too
            raise ValueError(
                f"{where} as floats from -1 to 1, got {lowest} to {highest}; scale them, or save 0 to 255 as uint8"
            )
        images = images.astype("float32")
    elif images.dtype != "uint8":
        raise ValueError(f"{where} as uint8 from 0 to 255 or as floats from -1 to 1, got {images.dtype}; convert them")
    if labels.dtype.kind not in "iu" or labels.size != len(images):
        raise ValueError(
            f"{path}: expected {pair[1]} as one integer for each of {len(images):,} images, got {labels.dtype} of "
            f"shape {labels.shape}; save the number of every image's class"
        )
    return torch.tensor(images).contiguous(), [str(label) for label in labels.flatten().tolist()]


def _read_folder(folder: Path) -> tuple[Part, Part | None]:
    in_parts = (folder / "train").is_dir()
    held_out = next((folder / name for name in _HELD_OUT_FOLDERS if in_parts and (folder / name).is_dir()), None)
    train = _files_of(folder / "train" if in_parts else folder)
    validation = _files_of(held_out) if held_out else []
    images = _decode([*train, *validation])
    labels = [file.parent.name for file in (*train, *validation)]
    count = len(train)
    return (images[:count], labels[:count]), (images[count:], labels[count:]) if held_out else None


def _files_of(folder: Path) -> list[Path]:
    """The image files in the folders of a folder, without hidden ones."""
    files = [
        file
        for file in sorted(folder.glob("*/*"))
        if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and not file.parent.name.startswith(".")
    ]
    if not files:
        raise ValueError(
            f"{folder}: expected a folder for every class with images ({' '.join(sorted(_SUFFIXES))}), found none; "
            "arrange them as train/<class>/ and validation/<class>/, or as <class>/ alone"
        )
    classes = {file.parent for file in files}
    others = [inner for inner in sorted(folder.iterdir()) if inner.is_dir() and not inner.name.startswith(".")]
    if unread := [inner for inner in others if inner not in classes and any(inner.iterdir())]:
        raise ValueError(
            f"{unread[0]}: expected images of this class ({' '.join(sorted(_SUFFIXES))}), found other files alone; "
            "convert them, or remove the folder"
        )
    return files


def _decode(files: Sequence[Path]) -> Tensor:
    """The pixels of image files, uint8 ``(N, channels, height, width)``: one channel if no file has colour."""
    pillow = optional_package("PIL.Image", extra="data")
    sizes_and_modes = [_read(pillow, file, lambda image: (image.size, image.mode)) for file in files]
    (width, height), _ = sizes_and_modes[0]
    for file, (size, mode) in zip(files, sizes_and_modes, strict=True):
        if size != (width, height) or mode[0] in "IF":
            raise ValueError(
                f"{file}: expected an image of {width} x {height} pixels, as {files[0]} is, with 8 bits a channel, got "
                f"{size[0]} x {size[1]} (mode {mode}); convert it"
            )
    mode = "L" if all(mode in _GREY for _, mode in sizes_and_modes) else "RGB"
    pixels = torch.empty(len(files), height, width, len(mode), dtype=torch.uint8)
    for row, file in zip(pixels, files, strict=True):
        content = _read(pillow, file, lambda image: image.convert(mode).tobytes())
        row.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8).view_as(row))
    return pixels.permute(0, 3, 1, 2).contiguous()


def _read(pillow: Any, file: Path, look: Callable[[Any], Any]) -> Any:
    try:
        with pillow.open(file) as image:
            return look(image)
    except Exception as error:  # a damaged image makes Pillow raise nearly anything
        is_empty = file.is_file() and not file.stat().st_size
        reason = "the file is empty" if is_empty else f"{type(error).__name__}: {error}"
        raise ValueError(f"{file}: expected an image, but {reason}; repair it or leave it out") from error
