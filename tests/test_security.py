"""Lines S26 and S28 of the scorecard: files that carry programs are read as data, and secrets are written nowhere."""

import json
import os
import pickle
import signal

import pytest
import torch

import pretraining
from earlysift.adapters import states
from earlysift.pretrain import tokens
from scorecard import cases


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
