"""The scorecard of docs/reliability.md. ``make scorecard`` runs every case of a line, ``make test`` a few of each."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from contextlib import ExitStack

import numpy
import pytest
import torch
from torch import Generator

import golden
import ranked
from earlysift import Sifter, selectors
from earlysift.adapters.huggingface import SiftConfig
from earlysift.control import Control
from earlysift.pretrain import checkpoints, run
from earlysift.seeds import seeded
from faults import PLACES, SIGNALS
from pretraining import ACCUMULATE, STEPS, arguments_for, assert_same, kill, tensors, weights
from processes import on_ranks
from scorecard import FULL, LONG, cases
from test_huggingface import ALL, HALF, Recorded, llama, logged, samples, trainer_for


def names_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# S1: kills


@pytest.fixture(scope="module")
def every_step(start, tmp_path_factory):
    """The folder of a run that saves at every step, and that nothing disturbed."""
    out = tmp_path_factory.mktemp("every") / "run"
    assert start(out, "--every", 1, "--log-every", 1)[0] == 0
    return out


@pytest.mark.parametrize("number", cases(range(500 if LONG else 50), 1))
def test_s01_a_run_killed_at_a_random_time_loses_nothing_that_was_saved(
    number, start, every_step, tmp_path, record_property
):
    out, generator = tmp_path / "run", seeded("kill", number)
    place, calls = ("compute_loss", 22) if number % 5 == 4 else ("_save_checkpoint", 11)
    call = 1 + int(torch.randint(calls, (), generator=generator))
    after_s = 0.001 + 0.05 * float(torch.rand((), generator=generator))
    code, said, err = start(out, "--every", 1, "--log-every", 1, at=[place, call, signal.SIGKILL, after_s])
    assert code == -signal.SIGKILL, err
    saved = said.count("saved\n")
    found = checkpoints.latest(out)
    assert saved <= (int(found[0].name.partition("-")[2]) if found else 0)
    if place == "_save_checkpoint" and saved == call - 1:
        record_property("within a save", 1)
    code, _, err = start(out, "--every", 1, "--log-every", 1, "--resume")
    assert code == 0, err
    assert_same(out, every_step)
    assert names_of(out) == names_of(every_step)


# S6: killed again and again


@pytest.mark.parametrize("number", cases(range(5), 1))
def test_s06_a_run_killed_twenty_times_ends_bit_equal_to_one_that_was_not(number, start, every_step, tmp_path):
    out, generator = tmp_path / "run", seeded("kills", number)
    saved = 0
    for kills in range(20 if FULL else 4):
        # Within the first step after resuming, or while it is saved, or in the second one: two of three lose all.
        place, call = [("compute_loss", 2), ("_save_checkpoint", 1), ("compute_loss", ACCUMULATE + 1)][
            int(torch.randint(3, (), generator=generator)) if saved < STEPS - 2 else 0
        ]
        resume = ["--resume"] if kills else []
        code, _, err = start(out, "--every", 1, "--log-every", 1, *resume, at=kill(place, call))
        assert code == -signal.SIGKILL, err
        found = checkpoints.latest(out)
        now = int(found[0].name.partition("-")[2]) if found else 0
        assert saved <= now <= saved + 1
        saved = now
    code, _, err = start(out, "--every", 1, "--log-every", 1, "--resume")
    assert code == 0, err
    assert_same(out, every_step)
    assert names_of(out) == names_of(every_step)


# Runs at once


def test_runs_at_once_end_as_one_alone(data, environment, uncut, tmp_path, record_property):
    environment = environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")}  # which all of them fill
    folders = [tmp_path / str(number) for number in range(10 if FULL else 2)]
    commands = [[sys.executable, "-m", "earlysift", "pretrain", *arguments_for(data, out)] for out in folders]
    with ExitStack() as stack:
        processes = [stack.enter_context(subprocess.Popen(each, env=environment)) for each in commands]
    assert [process.returncode for process in processes] == [0] * len(processes)
    for out in folders:
        assert_same(out, uncut)
        assert names_of(out) == names_of(uncut)
    record_property("cases", len(folders))


# S4: damage


@pytest.fixture(scope="module")
def foreign(start, tmp_path_factory):
    """The folder of a run with another seed."""
    out = tmp_path_factory.mktemp("foreign") / "run"
    assert start(out, "--seed", 1)[0] == 0
    return out


def flip(path, generator):
    content = bytearray(path.read_bytes())
    content[int(torch.randint(len(content), (), generator=generator))] ^= 1 << int(
        torch.randint(8, (), generator=generator)
    )
    path.write_bytes(content)


def truncate(path, generator):
    content = path.read_bytes()
    path.write_bytes(content[: int(torch.randint(len(content), (), generator=generator))])


def delete(path, generator):
    path.unlink()


def empty(path, generator):
    path.write_bytes(b"")


def swap(path, generator):
    other = path.with_name("optimizer.pt" if path.name != "optimizer.pt" else "model.safetensors")
    ours, theirs = path.read_bytes(), other.read_bytes()
    path.write_bytes(theirs)
    other.write_bytes(ours)


DAMAGES = [
    (damage, i)
    for damage, count in ((flip, 200), (truncate, 50), (delete, 20), (empty, 10), (swap, 10))
    for i in range(count)
]


@pytest.fixture
def saved(uncut, tmp_path):
    """The checkpoints of a run."""
    for step in (9, 12):
        shutil.copytree(uncut / f"checkpoint-{step}", tmp_path / "run" / f"checkpoint-{step}")
    return tmp_path / "run"


@pytest.mark.parametrize(("damage", "number"), cases(DAMAGES, 8))
def test_s04_damage_is_noticed_and_the_checkpoint_before_used(damage, number, saved, caplog):
    files = sorted((saved / "checkpoint-12").iterdir())
    path = files[number % len(files)]
    damage(path, seeded("damage", damage.__name__, number))
    folder, _ = checkpoints.latest(saved)
    assert folder.name == "checkpoint-9"
    assert "checkpoint-12 is not used" in caplog.text
    if damage is not swap:
        assert path.name in caplog.text


@pytest.mark.parametrize("number", cases(range(10), 4))
def test_s04_checkpoints_of_other_steps_and_runs_are_noticed(number, saved, uncut, foreign, caplog):
    _, about = checkpoints.latest(saved)
    if number < 5:  # ours, by another name
        (saved / "checkpoint-12").rename(saved / f"checkpoint-{13 + number}")
    elif number < 8:  # another run's, by another name
        shutil.copytree(foreign / "checkpoint-9", saved / f"checkpoint-{8 + number}")
    else:  # another run's
        shutil.rmtree(saved / "checkpoint-12")
        shutil.copytree(foreign / f"checkpoint-{(9, 12)[number - 8]}", saved / "checkpoint-12", dirs_exist_ok=True)
    found, seen = checkpoints.latest(saved)
    if number == 9:
        with pytest.raises(
            ValueError, match=r"checkpoint-12 is a checkpoint of another training \(seed: was 1, is 0\)"
        ):
            checkpoints.require_same(found, seen, about)
    else:
        assert found.name == ("checkpoint-12" if 5 <= number < 8 else "checkpoint-9")
        assert "is not used: it is the checkpoint of step" in caplog.text


# S5: resuming

FURTHER = 50 if FULL else 4
CUTS = {"mid-epoch": 4, "epoch edge": 6, "mid-pool": 4, "mid-accumulation": 4}  # by the checkpoint that is gone on from
GUARDED = SiftConfig(
    mode="auto",
    dtype=None,
    control=Control(probe_share=0.2, reference_costs={"train": 100.0, "probe": 60.0, "score_1": 10.0}),
)
RULES = {"uniform": ALL, "greedy": HALF, "guarded": GUARDED}


class Cut(Exception):
    """As if the process were gone."""


class Cutting(Recorded):
    """Saves after the fourth step and the sixth, the last one of an epoch; may be cut within the sixth."""

    cut = None

    def training_step(self, *args, **kwargs):
        sixth = self.state.global_step == 5
        if sixth and self.cut == "mid-pool":
            raise Cut  # selected, not trained on
        loss = super().training_step(*args, **kwargs)
        if sixth and self.cut == "mid-accumulation":
            raise Cut  # one micro-batch of two
        return loss

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        self.control.should_save = self.state.global_step in CUTS.values()
        return super()._maybe_log_save_evaluate(*args, **kwargs)


def run_of(folder, dtype, dropout, workers, rule, *, cut=None, resume=None, seed=0):
    options = {
        "bf16": dtype == "bfloat16",
        "gradient_accumulation_steps": 2,
        "max_steps": 6 + FURTHER,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
        "dataloader_num_workers": workers,
        "dataloader_multiprocessing_context": "fork" if workers else None,
    }
    model = llama(layers=2, dropout=dropout, seed=seed)
    trainer = trainer_for(folder, Cutting, model=model, data=samples(83), sift=RULES[rule], **options)
    trainer.cut = cut
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Cut:
        return trainer, None
    others = (random.getstate()[1], numpy.random.get_state()[1].copy())  # noqa: NPY002
    state = [torch.get_rng_state(), *map(torch.as_tensor, others)]
    return trainer, [*tensors(trainer.optimizer.state_dict()), *trainer.model.state_dict().values(), *state]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Runs that nothing cuts, each made once."""
    made = {}

    def get(*options):
        if options not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[options] = (folder, *run_of(folder, *options))
        return made[options]

    return get


@pytest.mark.parametrize(
    ("dtype", "dropout", "workers", "rule", "cut"),
    cases(itertools.product(("float32", "bfloat16"), (0.0, 0.1), (0, 2), RULES, CUTS), 4),
)
def test_s05_a_resumed_run_is_bit_equal(dtype, dropout, workers, rule, cut, whole_run, tmp_path):
    options = (dtype, dropout, workers, rule)
    folder, whole, state = whole_run(*options)
    if cut in ("mid-pool", "mid-accumulation"):
        folder = tmp_path / "cut"
        assert run_of(folder, *options, cut=cut)[1] is None
    checkpoint = folder / f"checkpoint-{CUTS[cut]}"
    resumed, resumed_state = run_of(tmp_path / "resumed", *options, resume=str(checkpoint), seed=1)
    assert resumed.batches == whole.batches[-len(resumed.batches) :]
    assert len(resumed.items) == 6 + FURTHER - CUTS[cut]
    assert resumed.items == whole.items[CUTS[cut] :]
    for name in (
        "loss",
        "grad_norm",
        "learning_rate",
        "candidates_seen",
        "samples_trained",
        "sift/step",
    ):
        assert logged(resumed, name) == logged(whole, name), name
    assert resumed.scored == whole.scored[CUTS[cut] :]
    assert len(state) == len(resumed_state) > 40
    assert all(map(torch.equal, state, resumed_state))


# S8: golden losses


@pytest.mark.parametrize("rule", golden.RULES)
def test_s08_losses_are_those_of_the_golden_file(rule, tmp_path, record_property):
    known = json.loads(golden.PATH.read_text())
    expected = known["losses"][rule]
    steps = len(expected) if FULL else 20
    losses = golden.losses(rule, tmp_path, steps)
    same = known["where"] == golden.where()
    assert losses == (expected[:steps] if same else pytest.approx(expected[:steps], rel=1e-5))
    record_property("cases", steps)
    record_property("detail", "bit-equal, same machine and versions" if same else "within 1e-5, another machine")
    assert len(set(losses)) == steps == len(expected[:steps])


# S11: gradients


@pytest.fixture(scope="module")
def by_ranks(tmp_path_factory):
    """What one process and two find (ranked.py); each number of them made once."""
    made = {}

    def get(count):
        if count not in made:
            made[count] = on_ranks(count, ranked.SCRIPT, tmp_path_factory.mktemp("ranks"))
        return made[count]

    return get


@pytest.mark.parametrize("count", [2, 1] if FULL else [2])
@pytest.mark.parametrize("accumulated", [1, 2, 4, 8])
def test_s11_the_gradient_is_that_of_one_large_batch(count, accumulated, by_ranks, record_property):
    for told in by_ranks(count):
        for name in ("SiftTrainer", "Pretrainer"):
            error, batches = told["gradients"][f"{name} {accumulated}"]
            assert batches == accumulated * count
            assert error <= 1e-6
            record_property("worst", error)


# S12: numbers that are not finite


@pytest.mark.parametrize(("place", "value"), cases(itertools.product(PLACES, ("nan", "inf")), 2))
def test_s12_a_number_that_is_not_finite_ends_the_run_before_the_update(place, value, start, tmp_path):
    out = tmp_path / "run"
    code, _, err = start(out, "--every", 1, fault=[place, value, 5])
    assert code == 3, err
    assert "Stopped, as at step 5 the loss is" in err
    assert f"the last good checkpoint is {out / 'checkpoint-4'}" in err
    assert checkpoints.latest(out)[0].name == "checkpoint-4"
    assert all(held.isfinite().all() for held in weights(out, 4))
    assert "Traceback" not in err


def test_s12_all_ranks_stop_at_the_same_step_wherever_a_number_is_not_finite(by_ranks, record_property):
    first, second = (told["stops"] for told in by_ranks(2))
    assert [tuple(entry[:3]) for entry in first] == ranked.faults_of(2)
    for ours, theirs in zip(first, second, strict=True):
        assert ours == theirs
        place, value, rank, said, step, kept = ours
        assert said.startswith(f"at step {ranked.BAD_STEP} the loss is"), (place, value, rank, said)
        assert (step, kept) == (ranked.BAD_STEP - 1, True), (place, value, rank)
    record_property("cases", len(first))


@pytest.mark.filterwarnings("ignore:.*are nan or inf at step", "ignore:Only .* have a labelled position")
@pytest.mark.parametrize("select", [selectors.greedy, selectors.proportional])
def test_s12_no_bad_candidate_is_picked_while_finite_ones_suffice(select, record_property):
    pools, kept, size = 500_000 if LONG else 5_000 if FULL else 200, 8, 16
    sifter = Sifter(torch.nn.Linear(1, 1), kept=kept, keep=0.5, score=lambda _, pool: pool["score"], select=select)
    generator = Generator().manual_seed(0)
    bad_values = torch.tensor([torch.nan, torch.inf, -torch.inf])
    for _ in range(pools):
        scores = torch.rand(size, generator=generator)
        bad = int(torch.randint(1, size - kept + 1, (), generator=generator))
        places = torch.randperm(size, generator=generator)[:bad]
        scores[places] = bad_values[torch.randint(3, (bad,), generator=generator)]
        assert sifter.sift({"score": scores})["score"].isfinite().all()
    record_property("cases", pools)


# S18: signals

ENDINGS = {**{number.name: [number, 0.0, 1] for number in SIGNALS}, "SIGTERM twice": [signal.SIGTERM, 0.0, 2]}
MOMENTS = {
    "scoring": ["_measured", 7],
    "backward": ["backward", 7],
    "save": ["_save_rng_state", 1],
    "evaluation": ["evaluate", 2],
    "data wait": ["_next_data", 7],
}


@pytest.mark.parametrize(("moment", "ending"), cases(itertools.product(MOMENTS, ENDINGS), 3))
def test_s18_a_signal_ends_the_run_saved_and_soon(moment, ending, start, tmp_path, record_property):
    out = tmp_path / "run"
    code, said, err = start(out, "--workers", 2, at=[*MOMENTS[moment], *ENDINGS[ending]])  # 99 if handlers changed
    assert code == 130, err
    assert "Traceback" not in err
    record_property("worst", float(said.rpartition("struck ")[2].partition(" s ago")[0]))
    found = checkpoints.latest(out)
    if ending != "SIGTERM twice":
        assert f"Stopped by a signal and saved at step {found[0].name.partition('-')[2]}." in err
    else:
        assert "saved" not in err
    assert "is not used" not in err


def test_s18_signals_that_the_caller_ignores_stay_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with run._signals() as came:
            os.kill(os.getpid(), signal.SIGHUP)
            assert came == []
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
