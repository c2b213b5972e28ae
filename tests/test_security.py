"""Lines S26 and S28 of the scorecard: hostile files are read as data, hostile names as names; secrets are kept."""

import gzip
import json
import os
import pickle
import signal
import struct
import zipfile
import zlib
from pathlib import Path

import numpy
import pyarrow.parquet
import pytest
import torch
import zstandard
from PIL import Image

import pretraining
from earlysift.adapters import states
from earlysift.pretrain import checkpoints, tokens
from earlysift.pretrain.corpus import read_corpus
from earlysift.pretrain.images import read_images
from scorecard import cases

SMALLEST = (
    *("--arms", "uniform", "--steps", "2", "--evaluations", "2", "--layers", "2", "--width", "32", "--length", "16"),
    *("--batch", "4", "--vocab-size", "256", "--validation-samples", "32"),
)


class Program:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


def pickled(path, canary):
    path.write_bytes(pickle.dumps(Program(canary)))


def saved_by_torch(path, canary):
    torch.save({"model": Program(canary)}, path)


READ = {  # file, and the command that reads it
    "config": ("run.json", ["pretrain", "--config", "{file}", "--data", "{text}", "--out", "{out}"]),
    "config of a comparison": ("run.toml", ["compare", "--config", "{file}", "--data", "{text}", "--out", "{out}"]),
    "preset": ("model.json", ["pretrain", "--preset", "{file}", "--data", "{text}", "--out", "{out}"]),
    "tokenizer": ("tokenizer.json", ["pretrain", "--tokenizer", "{file}", "--data", "{text}", "--out", "{out}"]),
    "vocabulary": ("vocab.txt", ["pretrain", "--tokenizer", "{file}", "--data", "{text}", "--out", "{out}"]),
    "rows": ("rows.jsonl", ["compare", "--data", "{file}", "--out", "{out}"]),
    "table": ("rows.parquet", ["compare", "--data", "{file}", "--out", "{out}"]),
    "compressed text": ("text.txt.gz", ["compare", "--data", "{file}", "--out", "{out}"]),
    "images": ("images.npz", ["compare", "--task", "image", "--data", "{file}", "--out", "{out}"]),
    "results": ("results.json", ["report", "{folder}"]),
    "model to check": ("model.json", ["check", "{file}"]),
}


@pytest.mark.parametrize(("name", "write"), cases([(name, w) for name in READ for w in (pickled, saved_by_torch)], 3))
def test_s26_a_program_in_place_of_a_file_never_runs(name, write, launch, data, tmp_path):
    file, arguments = READ[name]
    canary, path = tmp_path / "canary", tmp_path / "given" / file
    path.parent.mkdir()
    write(path, canary)
    known = {"file": path, "folder": path.parent, "text": data / "text.txt", "out": tmp_path / "out"}
    code, _, err = launch([part.format(**known) for part in arguments])
    assert code == 2, err
    assert "Traceback" not in err
    assert not canary.exists()
    assert not (tmp_path / "out").exists()
    if write is pickled:
        pickle.loads(path.read_bytes())
        assert canary.exists()  # it would have run


@pytest.mark.parametrize("write", [pickled, saved_by_torch])
@pytest.mark.parametrize("name", ["sifter_0.json", "sifter_0.safetensors"])
def test_s26_a_program_in_place_of_a_state_of_selection_never_runs(name, write, tmp_path):
    canary, path = tmp_path / "canary", tmp_path / "sifter_0.json"
    states.write(path, {"batch_size": 4, "sifter": {"losses": torch.zeros(3)}})
    assert states.read(path, ())["batch_size"] == 4
    write(tmp_path / name, canary)
    with pytest.raises(ValueError, match=name):
        states.read(path, ())
    assert not canary.exists()


def test_s26_a_program_in_place_of_cached_tokens_never_runs(tmp_path):
    canary, entry = tmp_path / "canary", tmp_path / "entry"
    saved_by_torch(entry, canary)
    content = entry.read_bytes()
    entry.write_bytes(tokens.hashlib.sha256(content).digest() + content)
    with pytest.warns(UserWarning, match="this cache entry is damaged; encoding the text again"):
        assert tokens._read_entry(entry) is None
    assert not canary.exists()


@pytest.mark.parametrize("command", [["check", "{folder}"], ["check", "{file}"]])
def test_s26_code_that_a_config_names_is_not_imported(command, launch, tmp_path):
    canary, file = tmp_path / "canary", tmp_path / "config.json"
    (tmp_path / "code.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Model: pass\n")
    mapped = {name: f"code.{name}" for name in ("AutoConfig", "AutoModel", "AutoModelForMaskedLM")}
    file.write_text(json.dumps(pretraining.MODEL | {"model_type": "own", "auto_map": mapped}))
    code, _, err = launch([part.format(folder=tmp_path, file=file) for part in command])
    assert code == 2, err
    assert "Traceback" not in err
    assert not canary.exists()


# Secrets


def held_by(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_s28_secrets_of_the_environment_are_written_and_said_nowhere(start, tmp_path):
    secrets = [value.encode() for value in pretraining.SECRETS.values()]
    out = tmp_path / "run"
    told = [
        start(out, at=["compute_loss", 7, signal.SIGTERM]),
        start(out, "--resume", "--learning-rate", 1e30, "--warmup", 0),  # refused
        start(tmp_path / "broken", fault=["nowhere", "no number", 3]),  # a traceback
    ]
    assert [code for code, _, _ in told] == [130, 2, 1]
    assert "Traceback" in told[-1][2]
    texts = [text.encode() for _, said, err in told for text in (said, err)]
    files = held_by(tmp_path)
    assert {"config.json", "results.json", "report.html", "manifest.json"} <= {path.name for path in files}
    for content in [*texts, *(path.read_bytes() for path in files)]:
        assert not [secret for secret in secrets if secret in content]


# Names

NAMES = [
    *("..", "../up", "a/../../up", ".", "./a", "a//b", "~", "~root", "a/~", " ", "a ", "-x", "--force"),
    *("CON", "aux.txt", "a*b", "[a]", "?", "$HOME", "`id`", "$(id)", "a;b", "a|b", "a&b", "%s", "{out}"),
    *("%(asctime)s", "a'b", 'a"b', "a\nb", "a\tb", "a\x1b[31mb", "a\x7f", "\u00fcn\u00ef", "a\u202eb", "\u0430"),
    *("\U0001f600", "\udcff", "x" * 300, "<script>", "a\\b", "[bold]b[/bold]", "[/b]", "checkpoint-3"),
]


def as_told(path):
    """A path as it is printed."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in str(path))


def found_in(folder):
    return {path for path in folder.rglob("*") if not path.is_dir()}


@pytest.mark.parametrize("name", cases(NAMES, 2), ids=ascii)
def test_s28_a_run_writes_below_the_folder_of_its_name_whatever_that_is(name, launch, data, tmp_path):
    work = tmp_path / "outer" / "work"
    work.mkdir(parents=True)
    out = f"{work}/{name}"  # as it is given: a Path would be tidied
    code, said, err = launch(["compare", "--data", data / "text.txt", f"--out={out}", *SMALLEST])
    assert "Traceback" not in err
    written = found_in(tmp_path)
    if code == 0:
        assert written
        assert f"Report: {as_told(Path(out))}/report.html\n" in said
        assert all(path.resolve().is_relative_to(os.path.realpath(out)) for path in written)
    else:
        assert code == 2, err
        assert len([line for line in err.splitlines() if line.startswith("earlysift: ")]) == 1, err
        assert not written
    assert all(letter.isprintable() or letter == "\n" for letter in said + err)
    # These two hold files of others; and no file system takes a name of 300 letters.
    assert code == 0 or name in (".", "..", "x" * 300), (said, err)


@pytest.mark.parametrize("name", ["a\x1b[31mb.txt", "a\u202eb.txt", "\udcff.txt", "a\x07.csv.gz"], ids=ascii)
def test_s28_a_file_with_a_hostile_name_is_refused_in_letters_alone(name, launch, tmp_path):
    (tmp_path / name).write_bytes(b"\xff\xfe\x00")
    code, _, err = launch(["compare", "--data", tmp_path / name, "--out", tmp_path / "out"])
    assert code == 2
    assert "Traceback" not in err
    assert all(letter.isprintable() or letter == "\n" for letter in err), ascii(err)


@pytest.mark.parametrize("sealed", [True, False])
def test_s28_no_checkpoint_is_deleted_through_a_link(sealed, tmp_path):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    run.mkdir()
    for step in (1, 2, 3, 4):
        folder = checkpoints.folder_of(run, step)
        folder.mkdir()
        (folder / "weights").write_text(str(step))
        checkpoints.seal(folder, {})
    checkpoints.folder_of(run, 1).rename(elsewhere)
    checkpoints.folder_of(run, 1).symlink_to(elsewhere)
    if not sealed:
        (elsewhere / checkpoints.MANIFEST).unlink()
    kept = {path: path.read_bytes() for path in held_by(elsewhere)}
    checkpoints.tidy(run)
    checkpoints.prune(run)
    assert {path: path.read_bytes() for path in held_by(elsewhere)} == kept
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint-1", "checkpoint-3", "checkpoint-4"]
    checkpoints.make_room(checkpoints.folder_of(run, 1))
    assert {path: path.read_bytes() for path in held_by(elsewhere)} == kept
    assert not checkpoints.folder_of(run, 1).is_symlink()


# Files that unpack to far more than they are

MANY_BYTES = 1 << 29  # of nothing
TOO_MUCH = r"expected at most 200 times its [\d,]+ bytes in it"


def bomb_of_gzip(folder):
    part = gzip.compress(bytes(1 << 24))
    (folder / "text.txt.gz").write_bytes(part * (MANY_BYTES >> 24))
    return folder / "text.txt.gz"


def bomb_of_zstandard(folder):
    (folder / "text.txt.zst").write_bytes(zstandard.ZstdCompressor().compress(bytes(MANY_BYTES)))
    return folder / "text.txt.zst"


def bomb_of_parquet(folder):
    rows = pyarrow.table({"text": pyarrow.array(["a"] * 1_000_000).dictionary_encode()})
    with pyarrow.parquet.ParquetWriter(folder / "rows.parquet", rows.schema) as file:
        for _ in range(MANY_BYTES // 4_000_000):
            file.write_table(rows)
    return folder / "rows.parquet"


def bomb_of_arrays(folder):
    with zipfile.ZipFile(folder / "images.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("images.npy", "w") as file:
            numpy.lib.format.write_array_header_1_0(
                file, {"descr": "|u1", "fortran_order": False, "shape": (32, 4096, 4096)}
            )
            for _ in range(MANY_BYTES >> 24):
                file.write(bytes(1 << 24))
        with archive.open("labels.npy", "w") as file:
            numpy.save(file, numpy.arange(32))
    return folder / "images.npz"


def bomb_of_a_picture(folder):
    """A picture of one pixel that says it has 400 million."""
    path = folder / "a" / "0.png"
    path.parent.mkdir()
    Image.new("L", (1, 1)).save(path)
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 20_000, 20_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    path.write_bytes(content)
    return folder


def peak_mib():
    """The largest memory of this process since its peak was forgotten."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no way to forget a peak of memory here")
@pytest.mark.parametrize(
    ("write", "read", "message"),
    [
        (bomb_of_gzip, read_corpus, TOO_MUCH),
        (bomb_of_zstandard, read_corpus, TOO_MUCH),
        (bomb_of_parquet, read_corpus, TOO_MUCH),
        (bomb_of_arrays, read_images, TOO_MUCH),
        (bomb_of_a_picture, read_images, r"400000000 pixels"),
    ],
)
def test_s28_a_file_that_unpacks_to_far_too_much_is_refused_before_memory_is_taken(write, read, message, tmp_path):
    path = write(tmp_path)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before_mib = peak_mib()
    with pytest.raises(ValueError, match=message) as refused:
        read(path)
    assert str(refused.value).startswith(str(path))
    assert peak_mib() - before_mib < 256
