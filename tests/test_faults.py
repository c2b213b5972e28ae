"""Lines S2 to S4 of the scorecard: runs killed at named points, disks that fail, damaged states of selection."""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

import pretraining
from earlysift.adapters import states
from earlysift.pretrain import checkpoints
from earlysift.report.page import read_results
from earlysift.seeds import seeded
from pretraining import assert_same, curve, ledger, log, weights
from scorecard import cases
from test_huggingface import samples, trained
from test_scorecard import delete, empty, flip, truncate
from trainings import MEMORY
from trainings import STEPS as TRAINED

KILLED = -signal.SIGKILL
DISK = Path(__file__).with_name("disk.c")
CAN_FAIL = sys.platform == "linux" and shutil.which("cc") is not None


def names_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# S2: kills of `earlysift pretrain`

PRETRAIN = {  # a function, and the call of it
    "lock": ("folders.py:locked", 1),
    "setup": ("run.py:_write_setup", 1),
    "scoring": ("scorers.py:_measured", 7),
    "selecting": ("selectors.py:greedy", 7),
    "forward pass": ("trainer.py:compute_loss", 7),
    "backward pass": ("accelerator.py:backward", 8),
    "update": ("earlysift/pretrain/trainer.py:_clip_grad_norm", 5),
    "row of the ledger": ("ledger.py:end", 12),
    "evaluation": ("earlysift/pretrain/trainer.py:evaluate", 3),
    "checkpoint: before": ("earlysift/pretrain/trainer.py:_save_checkpoint", 3),
    "checkpoint: weights": ("transformers/trainer.py:_save", 3),
    "checkpoint: optimizer": ("transformers/trainer.py:_save_optimizer_and_scheduler", 3),
    "checkpoint: selection": ("states.py:write", 3),
    "checkpoint: state of the Trainer": ("trainer_callback.py:save_to_json", 3),
    "checkpoint: manifest": ("checkpoints.py:seal", 3),
    "checkpoint: within the manifest": ("checkpoints.py:_digest", 30),
    "checkpoint: pruning": ("checkpoints.py:prune", 3),
    "checkpoint: within pruning": ("shutil.py:_rmtree_safe_fd", 2),
    "results": ("run.py:_results", 1),
    "within the results": ("files.py:json_text", 7),
    "report": ("page.py:write_report", 1),
    "picture": ("figures.py:save_png", 1),
}


@pytest.mark.parametrize("point", cases(PRETRAIN, 1))
def test_s02_pretrain_killed_at_a_named_point_goes_on_bit_equal(point, start, uncut, tmp_path):
    out = tmp_path / "run"
    code, _, err = start(out, at=[*PRETRAIN[point], signal.SIGKILL])
    assert code == KILLED, err
    code, _, err = start(out, *(["--resume"] if (out / "config.json").is_file() else []))
    assert code == 0, err
    assert_same(out, uncut)
    assert names_of(out) == names_of(uncut)


# S2: kills of trainings by SiftTrainer and Lightning


@pytest.fixture(scope="module")
def train(environment, tmp_path_factory):
    """Run commands and trainings in processes, whose disk can be told to fail if there is a C compiler."""
    folder = tmp_path_factory.mktemp("trained")
    if CAN_FAIL:
        library = folder / "disk.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, DISK, "-ldl"], check=True)
        environment = environment | {"LD_PRELOAD": str(library)}
    with pretraining.starter(environment, folder, "trainings") as run:
        yield run


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """What a training that nothing cuts tells at its end; each made once."""
    made = {}

    def get(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp("whole")
            code, _, err = train([kind, folder])
            assert code == 0, err
            made[kind] = json.loads((folder / "end.json").read_text())
        return made[kind]

    return get


TRAININGS = {
    ("transformers", "scoring"): ("scorers.py:_remembered", 4),
    ("transformers", "observing"): ("sifter.py:observe", 4),
    ("transformers", "backward pass"): ("accelerator.py:backward", 4),
    ("transformers", "checkpoint: weights"): ("transformers/trainer.py:_save", 3),
    ("transformers", "checkpoint: optimizer"): ("transformers/trainer.py:_save_optimizer_and_scheduler", 3),
    ("transformers", "checkpoint: selection"): ("states.py:write", 3),
    ("transformers", "checkpoint: within selection"): ("files.py:write_whole", 6),
    ("transformers", "checkpoint: state of the Trainer"): ("trainer_callback.py:save_to_json", 3),
    ("lightning", "scoring"): ("scorers.py:_remembered", 4),
    ("lightning", "observing"): ("sifter.py:observe", 4),
    ("lightning", "backward pass"): ("adapters/lightning.py:on_before_backward", 4),
    ("lightning", "checkpoint: selection"): ("adapters/lightning.py:state_dict", 5),
    ("lightning", "checkpoint: file"): ("cloud_io.py:_atomic_save", 3),
}


@pytest.mark.parametrize(("kind", "point"), cases(TRAININGS, 2))
def test_s02_trainings_killed_at_a_named_point_go_on_bit_equal(kind, point, train, whole, tmp_path):
    code, _, err = train([kind, tmp_path], at=[*TRAININGS[kind, point], signal.SIGKILL])
    assert code == KILLED, err
    assert not (tmp_path / "end.json").exists()
    code, _, err = train([kind, tmp_path])
    assert code == 0, err
    ours, theirs = json.loads((tmp_path / "end.json").read_text()), whole(kind)
    batches = ours.pop("batches")
    assert batches == theirs["batches"][-len(batches) :]
    assert 0 < len(batches) < TRAINED
    assert ours == {name: value for name, value in theirs.items() if name != "batches"}


# S4: damage to the state of selection in a Trainer's checkpoint

STATE_DAMAGES = {flip: 60, truncate: 20, delete: 2, empty: 2}


@pytest.fixture(scope="module")
def trainers_states(tmp_path_factory):
    """Folders with the states of selection after one step and after two."""
    folder = tmp_path_factory.mktemp("states")
    options = {"sift": MEMORY, "data": samples(20), "save_strategy": "steps", "save_steps": 1}
    trained(folder, max_steps=2, **options)
    return [folder / f"checkpoint-{step}" for step in (1, 2)]


def refused(folder):
    """What is said of a state of selection that cannot be used; None if it is used."""
    try:
        states.read(folder / states.name_of(0), ())
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return None


@pytest.mark.parametrize(
    ("damage", "number"), cases([(damage, i) for damage, count in STATE_DAMAGES.items() for i in range(count)], 3)
)
def test_s04_damage_to_a_trainers_state_of_selection_is_noticed(damage, number, trainers_states, tmp_path):
    path = tmp_path / ("sifter_0.json", "sifter_0.safetensors")[number % 2]
    for name in ("sifter_0.json", "sifter_0.safetensors"):
        shutil.copy(trainers_states[1] / name, tmp_path)
    assert refused(tmp_path) is None
    damage(path, seeded("damage to a state", damage.__name__, number))
    said = refused(tmp_path)
    if said is None:  # a flipped bit may leave JSON that says the same
        assert damage is flip
        kept, now = (json.loads((each / path.name).read_text()) for each in (trainers_states[1], tmp_path))
        assert kept["sifter"] == now["sifter"]
    else:
        assert path.name in said


@pytest.mark.parametrize("name", ["sifter_0.json", "sifter_0.safetensors"])
def test_s04_files_of_two_steps_do_not_make_a_state_of_selection(name, trainers_states, tmp_path):
    for each in ("sifter_0.json", "sifter_0.safetensors"):
        shutil.copy(trainers_states[each == name] / each, tmp_path)
    assert "sifter_0.safetensors" in refused(tmp_path)


# S2: kills of `earlysift compare`

COMPARE = {
    "reading": ("workloads.py:load_workload", 1),
    "rehearsal": ("trial.py:rehearse", 1),
    "first results": ("compare/run.py:_save", 1),
    "calibration": ("calibrate.py:measure_operations", 1),
    "scoring": ("scorers.py:_measured", 30),
    "evaluation": ("trial.py:evaluate", 4),
    "row of the ledger": ("ledger.py:end", 60),
    "results": ("compare/run.py:_save", 4),
    "within the results": ("files.py:json_text", 7),
    "report": ("page.py:write_report", 1),
}


def comparison(data, out, *options):
    size = ["--layers", 2, "--width", 32, "--length", 16, "--vocab-size", 300, "--batch", 4, "--validation-samples", 16]
    much = ["--evaluations", 2, "--steps", 12, "--arms", "uniform,sift", "--seeds", 2]
    return ["compare", "--data", data / "text.txt", "--out", out, *size, *much, *options]


@pytest.mark.parametrize("point", cases(COMPARE, 1))
def test_s02_compare_killed_at_a_named_point_keeps_what_was_finished_and_goes_on(point, launch, data, tmp_path):
    out = tmp_path / "run"
    code, _, err = launch(comparison(data, out), at=[*COMPARE[point], signal.SIGKILL])
    assert code == KILLED, err
    kept = finished_runs(out)
    code, _, err = launch(comparison(data, out, "--resume"))
    assert code == 0, err
    assert "Traceback" not in err
    after = finished_runs(out)
    assert len(after) == 4
    assert {name: after[name] for name in kept} == kept
    assert read_results(out)["complete"]
    assert not [name for name in names_of(out) if name.endswith(".part")]


def finished_runs(out):
    """The runs of a comparison that are finished, by arm and seed; results that are there can be read."""
    if not (out / "results.json").is_file():
        return {}
    arms = read_results(out)["arms"]
    return {(name, run["seed"]): run for name, arm in arms.items() for run in arm["runs"] if run["finished"]}


# S3: disks that fail

FAULTS = ("full", "read-only", "fsync", "error", "short", "slow")
HARMLESS = ("short", "slow")
PLACES = {  # of a run of pretrain, by part of a path
    "config": "/.config.json",
    "ledger": "/ledgers/process0",
    "weights": "/checkpoint-9/.tmp",  # safetensors renames it
    "optimizer": "/checkpoint-9/optimizer",
    "random states": "/checkpoint-9/rng_state",
    "selection": "/checkpoint-9/.sifter_0",
    "state of the Trainer": "/checkpoint-9/trainer_state",
    "manifest": "/checkpoint-9/.manifest",
    "results": "/.results.json",
    "report": "/.report.html",
}
CHECKPOINT = [place for place, part in PLACES.items() if "checkpoint" in part]


@pytest.fixture
def on_faulty_disk(train):
    """The same, where there is one."""
    if not CAN_FAIL:
        pytest.skip("no C compiler on this machine, or no Linux")
    return train


def test_a_clock_of_the_day_that_jumps_changes_nothing_but_dates(on_faulty_disk, data, uncut, tmp_path):
    out, began = tmp_path / "run", datetime.now()
    code, _, err = on_faulty_disk(["pretrain", *pretraining.arguments_for(data, out)], disk="clock:")
    assert code == 0, err
    assert_same(out, uncut)
    created = datetime.fromisoformat(json.loads((out / "results.json").read_text())["created"])
    assert abs((created - began).total_seconds()) > 1800  # it did jump


@pytest.mark.parametrize(("place", "fault"), cases(itertools.product(PLACES, FAULTS), 2))
def test_s03_pretrain_on_a_disk_that_fails_loses_nothing_that_was_finished(
    place, fault, on_faulty_disk, data, uncut, tmp_path
):
    out = tmp_path / "run"
    arguments = ["pretrain", *pretraining.arguments_for(data, out)]
    code, _, err = on_faulty_disk(arguments, disk=f"{fault}:{PLACES[place]}")
    assert "Traceback" not in err
    found = checkpoints.latest(out)
    if fault in HARMLESS:
        assert code == 0, err
    elif place == "ledger":
        assert code == 0, err
        assert fault == "fsync" or re.search(r"The ledger .* cannot be written \(.+\); it ends here", err)
    elif place in CHECKPOINT:
        # Not all files are forced to disk, see the end of docs/reliability.md.
        assert code == 4 or (code, fault) == (0, "fsync"), err
        assert code == 0 or f"checkpoint is {out / 'checkpoint-6'}. Free some space, and continue with --resume" in err
    else:
        assert code == 2, err
        (line,) = [line for line in err.splitlines() if line.startswith("earlysift: ")]
        assert re.search("No space|Read-only|Input/output", line), line
    assert place == "config" or found is not None
    code, _, err = on_faulty_disk([*arguments, *(["--resume"] if found else [])])
    assert code == 0, err
    if place != "ledger" or fault in HARMLESS:
        assert ledger(out) == ledger(uncut)
    assert curve(out) == curve(uncut)
    assert log(out) == log(uncut)
    assert all(ours.equal(theirs) for ours, theirs in zip(weights(out), weights(uncut), strict=True))
    assert not [name for name in names_of(out) if name.endswith(".part") or ".tmp" in name]


COMPARED = {  # of a run of compare
    "config": "/.config.json",
    "results": "/.results.json",
    "ledger": "/ledgers/",
    "report": "/.report.html",
}


@pytest.mark.parametrize(("place", "fault"), cases(itertools.product(COMPARED, FAULTS), 1))
def test_s03_compare_on_a_disk_that_fails_says_so_once_and_goes_on(place, fault, on_faulty_disk, data, tmp_path):
    out = tmp_path / "run"
    code, _, err = on_faulty_disk(comparison(data, out), disk=f"{fault}:{COMPARED[place]}")
    assert "Traceback" not in err
    # A ledger that breaks off is told; one that cannot be begun ends the run, before any training.
    if fault in HARMLESS or (place == "ledger" and fault != "read-only"):
        assert code == 0, err
        assert fault in ("fsync", *HARMLESS) or re.search(r"The ledger .* cannot be written \(.+\); it ends here", err)
    else:
        assert code == 2, err
        (line,) = [line for line in err.splitlines() if line.startswith("earlysift: ")]
        assert re.search("No space|Read-only|Input/output", line), line
    kept = finished_runs(out)
    assert len(kept) == (4 if code == 0 or place == "report" else 0)
    code, _, err = on_faulty_disk(comparison(data, out, "--resume"))
    assert code == 0, err
    after = finished_runs(out)
    assert len(after) == 4
    assert {name: after[name] for name in kept} == kept
    assert not [name for name in names_of(out) if name.endswith(".part")]


SAVED = {  # of a training's third checkpoint
    ("transformers", "weights"): "/checkpoint-3/.tmp",
    ("transformers", "optimizer"): "/checkpoint-3/optimizer",
    ("transformers", "selection"): "/checkpoint-3/.sifter_0.json",
    ("transformers", "its tensors"): "/checkpoint-3/.tmp",
    ("transformers", "state of the Trainer"): "/checkpoint-3/trainer_state",
    ("lightning", "checkpoint"): "/unfinished/",
}


@pytest.mark.parametrize(
    ("saved", "fault"), cases(itertools.product(SAVED, ("full", "read-only", "fsync", "error")), 1)
)
def test_s03_trainings_on_a_disk_that_fails_go_on_from_the_checkpoint_before(
    saved, fault, on_faulty_disk, whole, tmp_path
):
    kind = saved[0]
    if kind == "lightning":  # its files have no telling names while they are written
        code, _, err = on_faulty_disk([kind, tmp_path, 2])
        assert code == 0, err
    code, _, err = on_faulty_disk([kind, tmp_path], disk=f"{fault}:{SAVED[saved]}")
    assert code != 0 or fault == "fsync"  # which the libraries do not ask for
    if code != 0:
        assert re.search("No space|Read-only|Input/output|inline_container", err.splitlines()[-1]), err
        code, _, err = on_faulty_disk([kind, tmp_path])
        assert code == 0, err
    ours, theirs = json.loads((tmp_path / "end.json").read_text()), dict(whole(kind))
    batches = ours.pop("batches")
    assert batches == theirs.pop("batches")[-len(batches) :]
    assert ours == theirs
