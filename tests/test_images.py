import os
import pickle
from pathlib import Path

import pytest
import torch

import reference
from earlysift import cli
from earlysift.pretrain.augmentation import augment_images
from earlysift.pretrain.stream import Stream
from earlysift.pretrain.workload_settings import WorkloadSettings
from earlysift.pretrain.workloads import load_workload
from earlysift.seeds import seeded

numpy = pytest.importorskip("numpy")
pillow = pytest.importorskip("PIL.Image")

MNIST = Path(__file__).resolve().parents[2] / "shared" / "data" / "mnist" / "mnist.npz"
CLASSES = ("cat", "dog", "emu")


def load(*paths, **given):
    given = {"layers": 2, "width": 32, "validation_samples": 10**9, **given}
    return load_workload(WorkloadSettings(task="image", data=paths, **given))


def images_of(shape, seed=0):
    return numpy.random.default_rng(seed).integers(0, 256, shape, dtype="uint8")


def saved(path, **arrays):
    numpy.savez(path, **arrays)
    return path


def labels_of(count, classes=3):
    return numpy.arange(count) % classes


def write_images(folder, counts, *, size=(8, 8), mode="RGB", suffix=".png", seed=0):
    """Random images in one folder for every class; their pixels by file."""
    written = {}
    for number, (name, count) in enumerate(counts.items()):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for index in range(count):
            shape = (*size[::-1], 3) if mode == "RGB" else size[::-1]
            pixels = images_of(shape, seed=1000 * seed + 100 * number + index)
            file = folder / name / f"{index:02}{suffix}"
            pillow.fromarray(pixels).save(file)
            written[file] = pixels
    return written


# Archives


@pytest.mark.parametrize(
    ("training", "held_out"),
    [
        (("train_images", "train_labels"), ("test_images", "test_labels")),
        (("train_images", "train_labels"), ("val_images", "val_labels")),
        (("train_images", "train_labels"), ("validation_images", "validation_labels")),
        (("x_train", "y_train"), ("x_test", "y_test")),
        (("images", "labels"), ("test_images", "test_labels")),
    ],
)
def test_arrays_of_the_usual_names_are_the_two_parts(training, held_out, tmp_path):
    train, test = images_of((20, 12, 12)), images_of((7, 12, 12), seed=1)
    parts = {training[0]: train, training[1]: labels_of(20), held_out[0]: test, held_out[1]: labels_of(7)}
    workload = load(saved(tmp_path / "a.npz", **parts, other=numpy.zeros(3)))
    stored, validation = workload.samples.train, workload.samples.validation
    assert numpy.array_equal(stored["pixel_values"].squeeze(1), train)
    assert stored["labels"].tolist() == labels_of(20).tolist()
    assert torch.equal(validation["pixel_values"], (torch.tensor(test) / 127.5 - 1).unsqueeze(1))
    assert validation["labels"].tolist() == labels_of(7).tolist()
    assert workload.name == "a.npz, image classification"
    assert workload.facts["pixels"] == "12 x 12"


def test_validation_images_go_before_test_images(tmp_path):
    parts = {f"{part}_images": images_of((count, 8, 8)) for part, count in (("train", 9), ("test", 5), ("val", 4))}
    parts |= {f"{part}_labels": labels_of(count) for part, count in (("train", 9), ("test", 5), ("val", 4))}
    assert len(load(saved(tmp_path / "a.npz", **parts)).samples.validation["labels"]) == 4


def test_without_held_out_arrays_one_image_in_five_is_held_out_the_same_ones_every_time(tmp_path):
    images = images_of((52, 8, 8))
    path = saved(tmp_path / "a.npz", images=images, labels=labels_of(52))
    first, second = load(path).samples, load(path).samples
    assert (len(first), len(first.validation["labels"])) == (41, 11)
    assert torch.equal(first.train["pixel_values"], second.train["pixel_values"])
    class_of = {image.tobytes(): label for image, label in zip(images, labels_of(52).tolist(), strict=True)}
    held_out = ((first.validation["pixel_values"] + 1) * 127.5).round().to(torch.uint8)
    found = [
        (image.numpy().tobytes(), label)
        for part, labels in (
            (first.train["pixel_values"], first.train["labels"]),
            (held_out, first.validation["labels"]),
        )
        for image, label in zip(part, labels.tolist(), strict=True)
    ]
    assert sorted(found) == sorted(class_of.items())


def test_bytes_stay_bytes_in_memory_and_are_scaled_when_they_are_read(tmp_path):
    images = images_of((40, 8, 8))
    images[:, 0, 0], images[:, 0, 1] = 0, 255
    samples = load(saved(tmp_path / "a.npz", images=images, labels=labels_of(40))).samples
    assert samples.train["pixel_values"].dtype == torch.uint8
    stream = Stream(samples, seed=0)
    batch, ids = stream.read(0, 20), stream.ids(0, 20)
    for pixels in (batch["pixel_values"], samples.validation["pixel_values"]):
        assert pixels.dtype == torch.float32
        assert (pixels.min(), pixels.max()) == (-1, 1)
    assert torch.equal(batch["pixel_values"], samples.train["pixel_values"][ids] / 127.5 - 1)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_floats_are_taken_as_they_are(dtype, tmp_path):
    images = (images_of((30, 8, 8)) / 127.5 - 1).astype(dtype)
    samples = load(saved(tmp_path / "a.npz", x_train=images, y_train=labels_of(30), x_test=images, y_test=[0] * 30))
    for part in (samples.samples.train, samples.samples.validation):
        assert torch.equal(part["pixel_values"].squeeze(1), torch.tensor(images.astype("float32")))


@pytest.mark.parametrize("channels", [1, 3])
def test_channels_may_come_first_or_last(channels, tmp_path):
    images = images_of((20, 12, 12, channels))
    last = load(saved(tmp_path / "last.npz", images=images, labels=labels_of(20)))
    first = load(saved(tmp_path / "first.npz", images=images.transpose(0, 3, 1, 2), labels=labels_of(20)))
    pixels = first.samples.train["pixel_values"]
    assert pixels.shape == (16, channels, 12, 12)
    assert torch.equal(pixels, last.samples.train["pixel_values"])
    assert last.samples.train["pixel_values"].is_contiguous()
    assert first.make_model(0)(**Stream(first.samples, seed=0).read(0, 4)).logits.shape == (4, 3)


def test_labels_are_numbered_from_0_in_rising_order_and_may_be_a_column(tmp_path):
    labels = numpy.array([10, 1, 2, 10, 2, 1] * 5)
    parts = {"x_train": images_of((30, 8, 8)), "x_test": images_of((2, 8, 8))}
    path = saved(tmp_path / "a.npz", y_train=labels[:, None], y_test=numpy.uint8([10, 2]), **parts)
    workload = load(path)
    assert workload.samples.train["labels"].tolist() == [2, 0, 1, 2, 1, 0] * 5
    assert workload.samples.validation["labels"].tolist() == [2, 1]
    assert workload.facts["classes"] == 3


def test_the_digits_are_split_as_in_the_committed_results():
    pytest.importorskip("sklearn")
    samples = load().samples
    assert samples.train["labels"][:8].tolist() == [5, 5, 7, 3, 9, 8, 4, 2]
    assert samples.validation["labels"][:8].tolist() == [1, 3, 3, 2, 9, 9, 4, 9]


# Folders


@pytest.mark.parametrize("held_out", ["validation", "val", "test"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_folders_named_by_part_and_class_are_read_with_the_colours_they_have(held_out, mode, tmp_path):
    train = write_images(tmp_path / "train", dict.fromkeys(CLASSES, 4), mode=mode)
    validation = write_images(tmp_path / held_out, dict.fromkeys(CLASSES, 2), mode=mode, seed=1)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "cat" / ".hidden.png").write_text("not an image")
    workload = load(tmp_path)
    assert workload.facts["classes"] == 3
    samples = workload.samples
    assert samples.train["labels"].tolist() == [CLASSES.index(file.parent.name) for file in train]
    assert samples.validation["labels"].tolist() == [CLASSES.index(file.parent.name) for file in validation]
    pixels = torch.tensor(numpy.stack(list(train.values())))
    pixels = pixels.permute(0, 3, 1, 2) if mode == "RGB" else pixels.unsqueeze(1)
    assert torch.equal(samples.train["pixel_values"], pixels)
    assert samples.validation["pixel_values"].shape == (6, len(mode), 8, 8)


def test_without_folders_of_parts_one_image_in_five_is_held_out(tmp_path):
    for suffix, count, seed in ((".PNG", 6, 0), (".jpg", 3, 1), (".jpeg", 3, 2)):
        write_images(tmp_path, dict.fromkeys(CLASSES, count), suffix=suffix, seed=seed)
    samples = load(tmp_path).samples
    assert (len(samples), len(samples.validation["labels"])) == (28, 8)
    (tmp_path / "in-train").mkdir()
    for name in CLASSES:
        (tmp_path / name).rename(tmp_path / "in-train" / name)
    (tmp_path / "in-train").rename(tmp_path / "train")
    assert torch.equal(load(tmp_path).samples.train["pixel_values"], samples.train["pixel_values"])


def test_grey_images_among_coloured_ones_are_read_as_colours(tmp_path):
    write_images(tmp_path / "train", {"cat": 2})
    grey = write_images(tmp_path / "train", {"dog": 2}, mode="L")
    write_images(tmp_path / "test", {"cat": 1}, mode="L")
    samples = load(tmp_path).samples
    expected = torch.tensor(numpy.stack(list(grey.values()))).unsqueeze(1).expand(-1, 3, -1, -1)
    assert torch.equal(samples.train["pixel_values"][2:], expected)
    assert samples.validation["pixel_values"].shape == (1, 3, 8, 8)


# Patches and alterations


@pytest.mark.parametrize(("side", "patch"), [(8, 2), (28, 7), (32, 8), (25, 5), (27, 3), (13, 1), (224, 56)])
def test_a_patch_is_the_largest_that_leaves_sixteen_or_more(side, patch, tmp_path):
    images = images_of((3, side, side))
    workload = load(saved(tmp_path / "a.npz", x_train=images, y_train=[0, 1, 2], x_test=images, y_test=[0, 1, 2]))
    assert workload.facts["patch"] == patch
    assert workload.make_model(0).config.patch_size == patch


def test_alterations_apply_to_images_of_ones_own(tmp_path):
    path = saved(tmp_path / "a.npz", images=images_of((500, 8, 8)), labels=labels_of(500))
    plain, altered = load(path, train_samples=200), load(path, train_samples=200, repeated=0.5, flipped=0.2)
    assert len(altered.samples) == len(plain.samples) == 200
    before, after = plain.samples.train["pixel_values"], altered.samples.train["pixel_values"]
    assert after.dtype == torch.uint8
    assert (before != after).flatten(1).any(dim=1).double().mean() == pytest.approx(0.5, abs=0.03)
    assert altered.samples.validation["pixel_values"].dtype == torch.float32
    assert altered.name == "a.npz, image classification, 20% of labels flipped, 50% repeated"


# Augmentation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "shape", [(40, 1, 8, 8), (40, 3, 8, 8), (30, 3, 32, 32), (9, 3, 16, 24), (9, 3, 4, 4), (1, 1, 28, 28)]
)
def test_images_move_and_are_mirrored_as_in_a_loop_over_images(shape, dtype):
    images = torch.tensor(images_of(shape)).to(dtype)
    fast, slow = (augment(images, seeded(7)) for augment in (augment_images, reference.augment_images))
    assert fast.dtype == dtype
    assert torch.equal(fast, slow)


def test_every_shift_up_to_an_eighth_is_drawn_and_only_colours_are_mirrored():
    steps = torch.arange(24.0)
    images = (100 * steps[:, None] + steps).expand(4000, 3, 24, 24)
    moved = augment_images(images, seeded(0))
    assert torch.equal(moved[:, 0], moved[:, 2])
    centres = moved[:, 0, 12, 11:13]
    mirrored = centres[:, 0] > centres[:, 1]
    assert mirrored.double().mean() == pytest.approx(0.5, abs=0.04)
    down = 12 - centres[~mirrored, 0] // 100
    right = 11 - centres[~mirrored, 0] % 100
    shares = torch.stack([torch.bincount(shifts.long() + 3, minlength=7) for shifts in (down, right)]) / len(down)
    assert shares.shape == (2, 7)
    assert torch.allclose(shares, torch.full((2, 7), 1 / 7), atol=0.04)
    grey = augment_images(images[:, :1], seeded(0))[:, 0, 12, 11:13]
    assert (grey[:, 0] < grey[:, 1]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_fresh_draw_in_every_epoch_the_same_in_every_run_and_none_for_validation(channels, tmp_path):
    path = saved(tmp_path / "a.npz", images=images_of((120, 8, 8, channels)), labels=labels_of(120))
    plain, workload = load(path), load(path, augmented=True)
    assert workload.name == "a.npz, image classification, augmented"
    assert (plain.facts["augmented"], workload.facts["augmented"]) == (False, True)
    for part in ("train", "validation"):
        before, after = getattr(plain.samples, part), getattr(workload.samples, part)
        assert all(torch.equal(before[name], after[name]) for name in before)
    stream = Stream(workload.samples, seed=3)
    epochs = [stream.read(start, 96) for start in (0, 96, 192)]
    ids = [stream.ids(start, 96) for start in (0, 96, 192)]
    again = Stream(workload.samples, seed=3)
    pieces = [again.read(start, 12) for start in range(96, 192, 12)]
    assert torch.equal(torch.cat([piece["pixel_values"] for piece in pieces]), epochs[1]["pixel_values"])
    for batch, numbers in zip(epochs, ids, strict=True):  # the sample keeps its label and its id
        assert torch.equal(batch["labels"], workload.samples.train["labels"][numbers])
    stored = workload.samples.train["pixel_values"][ids[0]] / 127.5 - 1
    first, second = (
        batch["pixel_values"][numbers.argsort()] for batch, numbers in zip(epochs[:2], ids[:2], strict=True)
    )
    assert (epochs[0]["pixel_values"] != stored).flatten(1).any(1).double().mean() > 0.7
    assert (first != second).flatten(1).any(1).double().mean() > 0.7


def test_no_two_stretches_of_the_stream_are_augmented_alike(tmp_path):
    images = numpy.repeat(images_of((1, 8, 8, 3)), 100, axis=0)
    stream = Stream(
        load(saved(tmp_path / "a.npz", images=images, labels=labels_of(100)), augmented=True).samples, seed=0
    )
    stretches = stream.read(0, 320)["pixel_values"].unflatten(0, (20, 16))
    assert len({tuple(stretch.flatten().tolist()) for stretch in stretches}) == 20


def test_augmentation_goes_with_the_other_alterations(tmp_path):
    path = saved(tmp_path / "a.npz", images=images_of((500, 8, 8)), labels=labels_of(500))
    workload = load(path, train_samples=200, flipped=0.2, repeated=0.5, augmented=True)
    assert workload.name == "a.npz, image classification, 20% of labels flipped, 50% repeated, augmented"


# What cannot be read

GOOD = {
    "x_train": images_of((9, 8, 8)),
    "y_train": labels_of(9),
    "x_test": images_of((3, 8, 8)),
    "y_test": labels_of(3),
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_train": None, "y_train": None}, "expected train_images and train_labels, found the arrays x_test, y_test"),
        ({"y_train": None}, "expected y_train, found the arrays x_train, x_test, y_test; the names that are read are"),
        ({"x_test": None}, "expected x_test, found the arrays x_train, y_train, y_test"),
        ({"y_train": labels_of(8)}, r"expected y_train as one integer for each of 9 images, got int64 of shape \(8,\)"),
        ({"y_test": labels_of(3) / 1}, "expected y_test as one integer for each of 3 images, got float64"),
        ({"y_test": numpy.array(["a", "b", "c"])}, "expected y_test as one integer for each of 3 images, got <U1"),
        ({"y_train": numpy.eye(9, dtype=int)}, r"expected y_train as one integer .* got int64 of shape \(9, 9\)"),
        (
            {"y_train": numpy.zeros(9, int)},
            "two classes or more in training, found only '0'; add samples of another class",
        ),
        ({"y_test": numpy.array([0, 7, 8])}, "the held-out part has classes that training does not have: 7, 8;"),
        ({"x_train": images_of((9, 8, 8)) / 255 * 2}, "expected x_train as floats from -1 to 1, got 0.0 to 2.0; scale"),
        ({"x_train": numpy.full((9, 8, 8), numpy.nan)}, "expected x_train as floats from -1 to 1, got nan to nan"),
        ({"x_train": numpy.zeros((9, 8, 8), int)}, "expected x_train as uint8 from 0 to 255 or .* got int64; convert"),
        ({"x_train": numpy.full((9, 8, 8), "a")}, "expected x_train as uint8 from 0 to 255 or .* got <U1; convert"),
        ({"x_train": images_of((9, 64))}, r"expected x_train of shape \(N, height, width\), .* got \(9, 64\); reshape"),
        ({"x_train": images_of((9, 8, 8, 4))}, r"expected x_train of shape .* got \(9, 8, 8, 4\); reshape them"),
        ({"x_train": numpy.uint8(3)}, r"expected x_train of shape .* got \(\); reshape them"),
        ({"x_test": images_of((0, 8, 8))}, r"expected x_test to hold images, got an array of shape \(0, 8, 8\)"),
        ({"x_test": images_of((3, 9, 9))}, r"of one type and shape, got uint8 of \(1, 8, 8\) and uint8 of \(1, 9, 9\)"),
        ({"x_test": numpy.zeros((3, 8, 8))}, r"of one type and shape, got uint8 of .* and float32 of \(1, 8, 8\)"),
        (
            {"x_train": numpy.array([None] * 9)},
            r"without Python objects, but ValueError: .* \(x_train\); save numbers in arrays of one shape each",
        ),
        (
            {"x_train": images_of((9, 8, 12)), "x_test": images_of((3, 8, 12))},
            "expected square images, got 12 x 8 pixels; crop or pad them to squares",
        ),
        (
            {"x_train": images_of((9, 34, 34)), "x_test": images_of((3, 34, 34))},
            "whose side 4 to 16 patches divide evenly, got 34 x 34 pixels; crop or pad them, for instance to 32 x 32",
        ),
        (
            {"x_train": images_of((9, 2, 2)), "x_test": images_of((3, 2, 2))},
            "got 2 x 2 pixels; crop or pad them, for instance to 4 x 4",
        ),
    ],
)
def test_arrays_that_do_not_serve_are_refused_in_one_line(changes, message, tmp_path):
    arrays = {name: values for name, values in (GOOD | changes).items() if values is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load(saved(tmp_path / "a.npz", **arrays))
    assert "\n" not in str(caught.value)
    assert "a.npz" in str(caught.value)


@pytest.mark.parametrize("damage", ["empty", "text", "cut", "bit", "npy"])
def test_a_damaged_archive_is_refused_by_name(damage, tmp_path):
    content = bytearray(saved(tmp_path / "a.npz", **GOOD).read_bytes())
    if damage == "bit":
        content[300] ^= 1
    if damage == "npy":
        numpy.save(tmp_path / "a.npy", GOOD["x_train"])
        content = (tmp_path / "a.npy").read_bytes()
    damaged = {"empty": b"", "text": b"no archive", "cut": content[: len(content) // 2]}.get(damage, content)
    (tmp_path / "a.npz").write_bytes(damaged)
    with pytest.raises(ValueError, match=r"a\.npz: expected an archive of arrays without Python objects, but \w+:"):
        load(tmp_path / "a.npz")


class Program:
    """Runs when it is unpickled."""

    def __init__(self, made):
        self.made = made

    def __reduce__(self):
        return Path.touch, (self.made,)


@pytest.mark.parametrize("place", ["x_train", "y_train", "beside", "the file"])
def test_a_pickle_in_an_archive_never_runs(place, tmp_path):
    made, path = tmp_path / "made", tmp_path / "a.npz"
    program = numpy.array([Program(made)] * 9, dtype=object)
    if place == "the file":
        path.write_bytes(pickle.dumps(program))
    else:
        saved(path, **GOOD | {place: program})
    if place == "beside":  # arrays of other names are not read
        assert len(load(path).samples) == 9
    else:
        with pytest.raises(ValueError, match=r"a\.npz: expected an archive of arrays without Python objects, but \w+:"):
            load(path)
    assert not made.exists()
    pickle.loads(pickle.dumps(program))
    assert made.exists()


def test_too_few_images_to_hold_any_out_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected samples of two classes or more in training, found none"):
        load(saved(tmp_path / "a.npz", images=images_of((1, 8, 8)), labels=[0]))


def test_a_path_that_is_neither_archive_nor_folder_is_refused(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere\.npz: expected a \.npz file or a folder of images, but nothing"
    ):
        load(tmp_path / "nowhere.npz")
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match=r"a\.txt: expected a \.npz file with images and labels, or a folder"):
        load(tmp_path / "a.txt")
    with pytest.raises(ValueError, match=r"The task image reads one \.npz file or folder, got 2; give one"):
        load(tmp_path, tmp_path)


def test_a_class_whose_images_cannot_be_read_is_no_silent_gap(tmp_path):
    write_images(tmp_path / "train", dict.fromkeys(CLASSES, 1))
    (tmp_path / "train" / "zebra").mkdir()
    (tmp_path / "train" / "zebra" / "one.gif").write_bytes(b"GIF89a")
    with pytest.raises(ValueError, match=r"train/zebra: expected images of this class .*, found other files alone"):
        load(tmp_path)


@pytest.mark.parametrize("parts", [[], ["train"], ["train", "test"]])
def test_a_folder_without_images_is_refused_with_the_layout(parts, tmp_path):
    for part in parts[:-1]:
        write_images(tmp_path / part, dict.fromkeys(CLASSES, 1))
    for part in parts[-1:]:
        (tmp_path / part / "cat").mkdir(parents=True)
    with pytest.raises(
        ValueError, match=r"expected a folder for every class with images .* found none; arrange them as"
    ):
        load(tmp_path)


def test_the_first_odd_image_is_named(tmp_path):
    write_images(tmp_path / "train", dict.fromkeys(CLASSES, 3))
    write_images(tmp_path / "test", {"cat": 1, "dog": 2}, size=(8, 9))
    with pytest.raises(
        ValueError, match=r"test/cat/00\.png: expected an image of 8 x 8 pixels.* got 8 x 9 \(mode RGB\)"
    ):
        load(tmp_path)
    deep = pillow.fromarray(numpy.zeros((8, 8), "uint16"))
    deep.save(tmp_path / "train" / "cat" / "02.png")
    with pytest.raises(ValueError, match=r"train/cat/02\.png: expected .* 8 bits a channel, got 8 x 8 \(mode I;16\)"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("empty", "the file is empty"),
        ("text", "UnidentifiedImageError: .*"),
        ("cut", "OSError: .*"),
        ("folder", "IsADirectoryError: .*"),
        ("link", "FileNotFoundError: .*"),
        ("unreadable", "PermissionError: .*"),
    ],
)
def test_a_damaged_image_is_named(damage, reason, tmp_path):
    write_images(tmp_path, dict.fromkeys(CLASSES, 3))
    file = tmp_path / "dog" / "01.png"
    content = file.read_bytes()
    file.unlink()
    if damage == "folder":
        file.mkdir()
    elif damage == "link":
        file.symlink_to("nowhere")
    else:
        file.write_bytes({"empty": b"", "text": b"no image", "cut": content[:-60]}.get(damage, content))
    if damage == "unreadable":
        file.chmod(0)
        if os.access(file, os.R_OK):
            pytest.skip("root reads every file")
    with pytest.raises(
        ValueError, match=rf"dog/01\.png: expected an image, but {reason}; repair it or leave it out"
    ) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_images_of_one_class_alone_are_refused_with_the_way_out(tmp_path):
    write_images(tmp_path / "train", {"cat": 3})
    write_images(tmp_path / "test", {"cat": 1})
    (tmp_path / "train" / "dog").mkdir()  # a folder without images is no class
    with pytest.raises(ValueError, match="two classes or more in training, found only 'cat'; add samples of another"):
        load(tmp_path)


def test_fewer_images_than_a_pool_are_refused_before_anything_is_written(tmp_path, capsys):
    path = saved(tmp_path / "a.npz", images=images_of((79, 8, 8)), labels=labels_of(79))
    command = ["compare", "--task", "image", "--data", str(path), "--layers", "2", "--out", str(tmp_path / "out")]
    command += ["--budget", "0.1", "--arms", "uniform"]
    assert cli.main(command) == 2
    error = capsys.readouterr().err
    assert "Expected a pool's worth of samples to train on, 64 (batch / keep) or more, got 63. Give more data," in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


# Real data


@pytest.mark.skipif(not MNIST.is_file(), reason=f"{MNIST} is not here")
def test_mnist_has_its_published_sizes_and_sixteen_patches():
    workload = load(MNIST)
    samples = workload.samples
    assert samples.train["pixel_values"].shape == (60_000, 1, 28, 28)
    assert samples.train["pixel_values"].dtype == torch.uint8
    assert torch.bincount(samples.train["labels"])[[0, 1, 9]].tolist() == [5923, 6742, 5949]
    assert samples.validation["pixel_values"].shape == (10_000, 1, 28, 28)
    assert workload.facts == {
        **{"train_samples": 60_000, "validation_samples": 10_000, "pixels": "28 x 28", "patch": 7, "classes": 10},
        **{"flipped": 0.0, "repeated": 0.0, "augmented": False},
    }
    assert workload.baseline["accuracy"] == pytest.approx(0.1135)  # 1, the most frequent digit of training
