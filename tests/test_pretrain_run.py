"""`earlysift pretrain` as real processes: resumes bit-equal wherever it is killed, and says what is wrong with what."""

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import earlysift
import ranked
from earlysift import pending
from earlysift.anatomy import find_anatomy
from earlysift.checkup import build_model
from earlysift.files import write_json
from earlysift.ledger import read_rows
from earlysift.measures import MEASURES, sift_arm
from earlysift.presets import BUILT_IN
from earlysift.pretrain import checkpoints, run
from earlysift.pretrain.settings import ARMS, PretrainSettings
from earlysift.pretrain.trainer import NotFinite, Pretrainer
from earlysift.report.page import write_report
from faults import DISK_FULL, faulty
from pretraining import (
    ACCUMULATE,
    EVERY,
    KILLED_RANK,
    STEPS,
    arguments_for,
    assert_bit_equal,
    curve,
    kill,
    ledger,
    log,
    torchrun,
    weights,
)
from processes import IN_THE_BACKGROUND, started, wait_until

# Resuming


def test_a_run_killed_again_and_again_is_bit_equal_to_one_that_was_not(start, uncut, tmp_path):
    out = tmp_path / "run"
    cuts = [
        ("before anything is saved, within accumulation", kill("compute_loss", 2), 0, None),
        ("within accumulation, with workers", kill("compute_loss", 10), 2, None),
        ("while a checkpoint is written", kill("_save_rng_state", 1), 0, None),
        ("before its manifest", kill("write_json", 3), 2, "checkpoint-6 is not used: incomplete"),
        ("before older ones are deleted", kill("prune", 2), 0, "checkpoint-6 is not used: incomplete"),
        ("in the last evaluation", kill("evaluate", 1), 2, None),
    ]
    for i, (where, at, workers, told) in enumerate(cuts):
        resume = ["--resume"] if i else []
        code, _, err = start(out, *resume, "--workers", workers, at=at)
        assert code == -signal.SIGKILL, (where, err)
        assert (told in err) if told else ("is not used" not in err), (where, err)
        assert ("no valid checkpoint: the run starts over" in err) == (i == 1), (where, err)
    assert [path.name for path in sorted(out.glob("checkpoint-*"))] == ["checkpoint-3", "checkpoint-6", "checkpoint-9"]
    code, _, err = start(out, "--resume")
    assert code == 0, err
    assert_bit_equal(out, uncut)
    assert {path.name for path in out.glob("checkpoint-*")} == {"checkpoint-9", "checkpoint-12"}


def test_a_run_that_hides_whole_words_resumes_bit_equal(start, tmp_path):
    tokens, whole, cut = tmp_path / "tokens", tmp_path / "whole", tmp_path / "cut"
    options = ["--vocab-size", 100]  # few, so that words have pieces
    assert start(tokens, *options)[0] == 0
    assert start(whole, *options, "--whole-word")[0] == 0
    assert start(cut, *options, "--whole-word", at=kill("compute_loss", 14))[0] == -signal.SIGKILL
    assert start(cut, *options, "--whole-word", "--resume")[0] == 0
    assert_bit_equal(cut, whole)
    assert ledger(whole)[0]["picks"] != ledger(tokens)[0]["picks"]
    assert curve(whole)[0]["loss"] != curve(tokens)[0]["loss"]


@pytest.fixture(scope="module")
def streamed(start, tmp_path_factory):
    """The folder of a run on text that is read in passing, which nothing disturbed."""
    out = tmp_path_factory.mktemp("streamed") / "run"
    code, _, err = start(out, "--stream")
    assert code == 0, err
    return out


def test_a_run_on_text_in_passing_resumes_bit_equal_with_any_number_of_workers(start, streamed, uncut, tmp_path):
    out = tmp_path / "run"
    for i, (count, workers) in enumerate([(2, 1), (14, 2), (8, 0)]):
        resume = ["--resume"] if i else []
        code, _, err = start(out, "--stream", *resume, "--workers", workers, at=kill("compute_loss", count))
        assert code == -signal.SIGKILL, err
    code, _, err = start(out, "--stream", "--resume", "--workers", 2)
    assert code == 0, err
    assert "Traceback" not in err
    assert_bit_equal(out, streamed)
    assert_bit_equal(out, uncut)  # as all of this text is shuffled at a time


def test_a_run_on_text_in_passing_and_one_on_stored_text_are_two_trainings(start, streamed, tmp_path):
    out = Path(shutil.copytree(streamed, tmp_path / "run"))
    code, _, err = start(out, "--resume")
    assert (code, "another training (stream: was True, is False)" in err) == (2, True)


@pytest.mark.parametrize("arm", ["uniform", "sift-entropy", "exact", "sift-memory", "auto"])
def test_every_arm_resumes_bit_equal_within_accumulation(arm, start, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole, "--arm", arm)[0] == 0
    assert start(cut, "--arm", arm, at=kill("compute_loss", 14))[0] == -signal.SIGKILL
    assert start(cut, "--arm", arm, "--resume")[0] == 0
    if arm == "auto":  # whose decisions rest on measured times
        assert [row["picks"] for row in ledger(cut)] == [row["picks"] for row in ledger(whole)]
    else:
        assert_bit_equal(cut, whole)
    kept = {row["trained"] / row["candidates"] for row in ledger(whole)}
    assert kept == {1.0 if arm == "uniform" else 0.5}
    assert any("scored" in row for row in ledger(whole)) == (arm not in ("uniform", "auto"))


@pytest.fixture(scope="module")
def few(data):
    """Text of so few samples that a run sees each several times."""
    folder, text = data / "few", (data / "text.txt").read_text()
    folder.mkdir()
    (folder / "train.txt").write_text(text[:6000])
    (folder / "validation.txt").write_text(text[6000:9000])
    return folder


def test_a_run_that_remembers_losses_resumes_bit_equal_wherever_it_is_killed(start, few, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ["--arm", "sift-memory", "--data", few, "--validation-samples", 8]
    assert start(whole, *options)[0] == 0
    for i, at in enumerate([kill("compute_loss", 2), kill("compute_loss", 14), kill("_save_rng_state", 1)]):
        resume = ["--resume"] if i else []
        assert start(cut, *options, *resume, "--workers", i, at=at)[0] == -signal.SIGKILL
    code, _, err = start(cut, *options, "--resume")
    assert code == 0, err
    assert_bit_equal(cut, whole)
    ours, theirs = (load_file(out / "checkpoint-12" / "sifter_0.safetensors") for out in (cut, whole))
    names = {f"sifter.memory.{name}" for name in ("losses", "steps", "new", "ranks")}
    assert set(theirs) == {*names, "sifter.recent.rows"}
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, equal_nan=True)
    known = theirs["sifter.memory.losses"]
    known = known[~known.isnan()]
    assert theirs["sifter.memory.new"] == -1  # samples came back
    assert 20 < len(known) < 12 * ACCUMULATE * 4
    assert known.isfinite().any()


def test_a_training_that_sees_no_sample_twice_is_told_that_nothing_is_gained_by_memory(start, tmp_path):
    code, _, err = start(tmp_path / "run", "--arm", "sift-memory", "--steps", 3)
    assert code == 0
    assert "The training reads 48 candidates of" in err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_saves_at_the_end_of_the_step_and_the_run_goes_on_bit_equal(number, start, uncut, tmp_path):
    out = tmp_path / "run"
    code, _, err = start(out, at=["compute_loss", 7, number])
    assert code == 130
    assert "Stopped by a signal and saved at step 4. Continue with --resume." in err
    assert checkpoints.latest(out)[0].name == "checkpoint-4"
    assert not json.loads((out / "results.json").read_text())["complete"]
    assert start(out, "--resume")[0] == 0
    assert ledger(out) == ledger(uncut)
    assert curve(out) == curve(uncut)
    assert all(map(torch.equal, weights(out), weights(uncut)))


def test_a_signal_from_outside_stops_the_command_line_and_saves_also_in_the_background(data, environment, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "earlysift", "pretrain", *arguments_for(data, out), "--steps", "100000"]
    process = started(command, IN_THE_BACKGROUND, env=environment)
    rows = out / "ledgers" / "process0.jsonl"
    try:
        wait_until(process, lambda: rows.is_file() and rows.read_text().count("\n") > 4)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
    finally:
        process.kill()
    assert process.returncode == 130, err
    folder, _ = checkpoints.latest(out)
    assert f"saved at step {folder.name.removeprefix('checkpoint-')}" in err
    assert (out / "report.html").is_file()


# Damaged checkpoints


def damage_flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def damage_truncate(path):
    path.write_bytes(path.read_bytes()[:-2])  # the last byte of a JSON file is the end of its line


def damage_delete(path):
    path.unlink()


@pytest.mark.parametrize("damage", [damage_flip, damage_truncate, damage_delete])
def test_damage_to_any_file_is_named_and_the_checkpoint_before_is_used(damage, uncut, tmp_path, caplog):
    names = sorted(path.name for path in (uncut / "checkpoint-12").iterdir())
    assert {"manifest.json", "model.safetensors", "optimizer.pt", "sifter_0.json", "trainer_state.json"} <= set(names)
    for name in names:
        out = Path(shutil.copytree(uncut, tmp_path / name))
        damage(out / "checkpoint-12" / name)
        caplog.clear()
        folder, _ = checkpoints.latest(out)
        assert folder.name == "checkpoint-9"
        assert "checkpoint-12 is not used" in caplog.text
        assert name in caplog.text


def test_a_run_with_a_damaged_checkpoint_resumes_from_the_one_before_bit_equal(start, uncut, copy):
    damage_flip(copy / "checkpoint-12" / "model.safetensors")
    code, _, err = start(copy, "--resume")
    assert code == 0
    assert "checkpoint-12 is not used: model.safetensors is damaged" in err
    assert_bit_equal(copy, uncut)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (self.canary,)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_nothing_in_a_checkpoint_is_executed(name, start, copy, tmp_path):
    shutil.rmtree(copy / "checkpoint-12")
    canary = tmp_path / "canary"
    torch.save(Hostile(str(canary)), copy / "checkpoint-9" / name)
    checkpoints.seal(copy / "checkpoint-9", manifest_of(copy / "checkpoint-9"))
    code, _, err = start(copy, "--resume")
    if name == "training_args.bin":  # which nobody reads
        assert code == 0
    else:
        assert code == 2
        assert f"earlysift: {name} of {copy / 'checkpoint-9'} cannot be loaded, although they match the manifest" in err
        assert "Traceback" not in err
    assert not canary.exists()
    torch.load(copy / "checkpoint-9" / name, weights_only=False)
    assert canary.exists()  # it would have been


@pytest.mark.parametrize("name", ["model.safetensors", "trainer_state.json"])
def test_a_file_that_was_cut_before_it_was_sealed_is_named(name, start, copy):
    damage_truncate(copy / "checkpoint-12" / name)
    checkpoints.seal(copy / "checkpoint-12", manifest_of(copy / "checkpoint-12"))
    shutil.rmtree(copy / "checkpoint-9")
    code, _, err = start(copy, "--resume", "--target-accuracy", 0.999)
    assert (code, f"earlysift: {name} of {copy / 'checkpoint-12'} cannot be loaded" in err) == (2, True), err
    assert "Traceback" not in err


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())["about"]


# Endings


def test_a_target_ends_the_run_when_it_is_reached_and_is_reported_when_it_is_not(start, tmp_path):
    out = tmp_path / "run"
    code, said, err = start(out, "--steps", 200, "--target-accuracy", 0.02, "--arm", "uniform")
    assert code == 0, err
    step = int(re.search(r"target 2.00%\) at step (\d+), after [\d.,]+ s of training", said)[1])
    assert step < 200
    points = curve(out)
    assert [point["accuracy"] >= 0.02 for point in points] == [False] * (len(points) - 1) + [True]
    assert points[-1]["step"] == step
    arm = json.loads((out / "results.json").read_text())["arms"]["uniform"]["runs"][0]
    assert arm["reference_s_to_target"] == arm["curve"][-1]["wall_s"] > 0
    rows = ledger(out)
    code, said, _ = start(out, "--steps", 200, "--target-accuracy", 0.02, "--arm", "uniform", "--resume")
    assert (code, f"at step {step}" in said) == (0, True)
    assert ledger(out) == rows  # there was nothing left to do


def test_a_target_that_is_not_reached_is_a_clear_end(start, copy):
    code, _, err = start(copy, "--resume", "--target-accuracy", 0.999)
    assert code == 1
    assert "The target accuracy of 99.90% was not reached in 12 steps; the best was" in err


@pytest.mark.parametrize("arm", ["uniform", "sift"])
def test_a_loss_that_is_not_finite_ends_the_run_at_the_last_good_checkpoint(arm, start, tmp_path):
    out = tmp_path / "run"
    options = ["--arm", arm, "--learning-rate", 1e30, "--warmup", 0.5, "--every", 1]  # the first step has rate zero
    code, _, err = start(out, *options)
    assert code == 3
    assert re.search(r"Stopped, as .* is not finite|Stopped, as .* loss .* (nan|inf)", err)
    assert f"the last good checkpoint is {out / 'checkpoint-1'}" in err
    assert checkpoints.latest(out)[0].name == "checkpoint-1"
    assert all(value.isfinite().all() for value in weights(out, 1))
    assert not json.loads((out / "results.json").read_text())["complete"]
    assert (out / "report.html").is_file()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_broken_scores_end_the_run_before_the_update_even_if_they_come_late(accumulated, tmp_path, monkeypatch):
    monkeypatch.setattr(pending, "_AT_ONCE", set())  # as on an accelerator
    options = {"max_steps": 5, "gradient_accumulation_steps": accumulated, "max_grad_norm": 1.0}
    trainer = ranked.built(faulty(Pretrainer, "score", "nan", 3), tmp_path, **options)
    with pytest.raises(NotFinite, match="at step 3 the loss is nan"):
        trainer.train()
    assert all(torch.equal(held, trainer.before[name]) for name, held in trainer.model.state_dict().items())


def test_a_full_disk_ends_the_run_at_the_checkpoint_before_from_which_it_goes_on(start, uncut, tmp_path):
    out = tmp_path / "run"
    code, _, err = start(out, at=["_save_checkpoint", 3, DISK_FULL])
    assert code == 4, err
    assert re.search(r"Stopped, as the checkpoint of step 9 could not be written \(.+\); the last good", err)
    assert f"checkpoint is {out / 'checkpoint-6'}. Free some space, and continue with --resume." in err
    assert "Traceback" not in err
    assert checkpoints.latest(out)[0].name == "checkpoint-6"
    assert start(out, "--resume")[0] == 0
    assert_bit_equal(out, uncut)


def test_a_second_run_in_a_folder_is_refused_while_the_first_one_trains(start, copy):
    # This process holds the folder as a run does.
    with run._locked(PretrainSettings(out=copy, resume=True)):
        code, _, err = start(copy, "--resume")
        assert (code, f"Another process trains in {copy}. Wait until it has ended, or choose" in err) == (2, True), err
        assert "Traceback" not in err
    assert start(copy, "--resume")[0] == 0


def test_what_a_killed_run_left_half_written_is_gone_after_the_next_start(start, uncut, copy):
    (copy / "checkpoint-12" / "manifest.json").unlink()
    for name in ("", "ledgers"):
        (copy / name / ".something.json.part").write_text("{")
    assert start(copy, "--resume")[0] == 0
    assert names_of(copy) == names_of(uncut)


def names_of(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_time_budget_ends_the_run_with_a_decayed_rate(start, tmp_path):
    for minutes in (0.04, 0.4, 4):  # on a busy machine, the first may be over before the second step
        out = tmp_path / f"{minutes}"
        code, said, err = start(out, "--steps", 100000, "--minutes", minutes, "--schedule", "cosine", "--warmup", 0)
        assert code == 0, err
        rates = [row["learning_rate"] for row in ledger(out) if "learning_rate" in row]
        if len(rates) > 1:
            break
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == 0.01
    assert rates[-1] < rates[0]
    assert len(rates) < 100000
    assert f"Trained {len(rates)} steps" in said


# What is computed


def test_accumulated_micro_batches_are_one_large_batch(start, tmp_path):
    small, large = tmp_path / "small", tmp_path / "large"
    start(small, "--arm", "uniform", model="plain.json")
    start(large, "--arm", "uniform", "--batch", 8, "--accumulate", 1, model="plain.json")
    losses = [[row["loss"] for row in ledger(out) if "loss" in row] for out in (small, large)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == STEPS
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("arm", ["uniform", "sift"])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_row_of_the_ledger_says_how_long_data_was_waited_for(arm, workers, start, tmp_path):
    assert start(tmp_path / "run", "--arm", arm, "--workers", workers)[0] == 0
    rows = read_rows(tmp_path / "run" / "ledgers" / "process0.jsonl")
    assert [row["step"] for row in rows] == [number // ACCUMULATE for number in range(STEPS * ACCUMULATE)]
    assert all(0 < row["wait_ms"] < row["step_ms"] for row in rows)


def test_rates_are_those_of_the_schedule(uncut):
    rates = [row["learning_rate"] for row in ledger(uncut) if "learning_rate" in row]
    assert rates == pytest.approx([0.01 * (STEPS - step) / STEPS for step in range(STEPS)], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "millions", "task", "layers"),
    [
        ("bert-base", 110, "ForMaskedLM", 12),
        ("bert-small", 54, "ForMaskedLM", 12),
        ("bert-mini", 17.5, "ForMaskedLM", 12),
        ("bert-tiny", 6.4, "ForMaskedLM", 12),
        ("modernbert-base", 149.7, "ForMaskedLM", 22),
        ("gpt2-small", 124.4, "LMHeadModel", 12),
    ],
)
def test_presets_are_the_models_of_that_name(name, millions, task, layers):
    assert name in BUILT_IN
    with torch.device("meta"):
        model = build_model(name)
    assert type(model).__name__.endswith(task)
    assert len(find_anatomy(model).layers) == layers
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)
    assert earlysift.check(model) == []


def test_runs_of_several_arms_make_one_page(start, uncut, tmp_path):
    assert start(tmp_path / "run", "--arm", "uniform")[0] == 0
    page = write_report(uncut, tmp_path / "run", out=tmp_path / "page.html").read_text()
    assert all(word in page for word in (*("sift", "uniform"), "Trained 12 steps", "text.txt, masked LM"))
    assert "Wall time, without evaluations" in page
    assert "Noise of the machine therefore cannot favour an arm" not in page


def test_the_page_of_a_finished_run_shows_what_its_time_went_into_and_nothing_empty(uncut):
    results = json.loads((uncut / "results.json").read_text())
    ((arm,),) = [list(results["arms"].values())]
    (run,) = arm["runs"]
    rows = read_rows(uncut / "ledgers" / "process0.jsonl")
    assert list(run["spent_s"]) == ["train", "score", "probe", "read"]
    assert run["spent_s"]["read"] == pytest.approx(sum(row["wait_ms"] for row in rows) / 1e3)
    assert sum(run["spent_s"].values()) == pytest.approx(sum(row["step_ms"] for row in rows) / 1e3)
    page = (uncut / "report.html").read_text().partition("<h1>")[2]
    assert "Where the time went" in page
    assert "nothing measured yet" not in page
    assert "–" not in page
    assert "arget" not in page.partition("How it was measured")[0]


def test_a_model_whose_config_brings_its_family_along_trains(start, data, tmp_path):
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    row = {"layers": "model.layers", "heads": [["lm_head"]], "positionwise": [["mlp"]]}
    config = {"model_type": "mistral", "intermediate_size": 64, "vocab_size": 300, "earlysift_family": row, **shape}
    (data / "mistral.json").write_text(json.dumps(config))
    code, _, err = start(tmp_path / "run", model="mistral.json")
    assert code == 0, err
    points = curve(tmp_path / "run")
    assert points[-1]["loss"] < points[0]["loss"]
    assert all("scored_flops" in row for row in ledger(tmp_path / "run"))


@pytest.mark.parametrize("reading", ["stored", "stream"])
def test_a_saved_data_set_trains_like_its_text_by_the_column_that_is_named(reading, start, data, tmp_path):
    datasets = pytest.importorskip("datasets")
    documents = [text for text in (data / "text.txt").read_text().split("\n\n") if text]
    for name, columns in (
        ("body", {"title": ["no"] * len(documents), "body": documents}),
        ("text", {"text": documents}),
    ):
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / name)
    short = ["--steps", 2, "--every", 2, *(["--stream"] if reading == "stream" else [])]
    for name, option in (("body", ["--text-column", "body"]), ("text", [])):
        code, _, err = start(tmp_path / f"run-{name}", *short, *option, "--data", tmp_path / name)
        assert code == 0, err
    assert ledger(tmp_path / "run-body") == ledger(tmp_path / "run-text")


def test_a_smaller_vocabulary_than_the_special_tokens_of_a_preset_is_fine():
    model = run._shape(PretrainSettings(preset="modernbert-base", vocab_size=300))
    assert model.config.vocab_size == 300


def test_a_causal_model_trains_too(start, data, tmp_path):
    config = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": 300}
    (data / "gpt2.json").write_text(json.dumps(config))
    code, _, err = start(tmp_path / "run", model="gpt2.json")
    assert code == 0, err
    points = curve(tmp_path / "run")
    assert points[-1]["loss"] < points[0]["loss"]


def test_tensorboard_reads_loss_and_accuracy_from_the_run_folder(start, uncut, tmp_path):
    reader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed"
    )
    out = tmp_path / "run"
    code, _, err = start(out, "--track", "tensorboard")
    assert code == 0, err
    (file,) = out.rglob("events.out.tfevents.*")
    events = reader.EventAccumulator(str(file.parent)).Reload()
    read = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    assert read["eval/accuracy"] == pytest.approx({point["step"]: point["accuracy"] for point in curve(uncut)})
    assert read["train/loss"] == pytest.approx({entry["step"]: entry["loss"] for entry in log(uncut)})
    assert len(read["train/loss"]) == STEPS // EVERY


# Bad input


BAD = {  # options, and what the message says
    "preset": (["--preset", "bert-huge"], r"Unknown preset 'bert-huge'; known are bert-base, bert-small, "),
    "arm": (["--arm", "best"], rf"Unknown arm 'best'; known are {', '.join(ARMS)}"),
    "memory of a stream": (
        ["--arm", "sift-memory", "--stream"],
        r"and those of --stream never return\. Drop --stream, or",
    ),
    "depth": (["--depth", "2"], r"Expected depth in 1\.\.1.*got 2"),
    "length": (["--length", "64"], r"length must be at most 32 for .*model\.json, got 64"),
    "tokenizer": (["--tokenizer", "{tmp}/vocab.txt"], r"has 1005 tokens, but .* has 300\. Give --vocab-size 1005"),
    "no text": (["--data", "{tmp}/none.jsonl"], r"found the columns first \(string\), second \(string\)"),
    "empty": (["--data", "{tmp}/empty.txt"], r"expected text, found none"),
    "empty documents": (["--data", "{tmp}/blank.jsonl"], r"expected text, found none"),
    "cuda": (["--device", "cuda"], r"Expected a CUDA device for device='cuda', found none\. Use --device cpu"),
    "local tracker": (["--track", "trackio"], r"trackio is not installed: pip install trackio, or use --track none"),
    "tracker": (["--track", "wandb"], r"wandb is not installed: pip install wandb, or use --track none"),
    "ranges": (
        ["--keep", "0", "--steps", "0"],
        r"keep must be in \(0, 1\], got 0\.0\. steps must be in \[1, 1000000000000\], got 0",
    ),
    "no choice": (["--keep", "0.9"], r"keep=0\.9 leaves no choice with batches of 4"),
    "whole words": (
        ["--preset", "gpt2-small", "--whole-word"],
        r"task causal_lm does not take whole_word; leave that out",
    ),
    "no data set": (
        ["--data", "nobody-0/nothing:plain"],
        r"nobody-0/nothing:plain: there is no such file or folder, and",
    ),
    "no data set in passing": (
        ["--stream", "--data", "nobody-0/nothing"],
        r"could be fetched from the Hugging Face hub",
    ),
    "nothing in passing": (
        ["--stream", "--data", "{tmp}/missing.txt"],
        r"expected a file or folder .* nothing is there",
    ),
    "little in passing": (["--stream", "--data", "{tmp}/empty.txt"], r"too little text to hold out"),
    "resume": (["--resume"], r"There is no run to resume in"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_refused_in_one_message_and_leaves_nothing(name, start, tmp_path):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    tracker = BAD[name][0][1] if "--track" in BAD[name][0] else None
    if tracker and importlib.util.find_spec(tracker):
        pytest.skip(f"{tracker} is installed")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    (tmp_path / "vocab.txt").write_text("\n".join([*special, *(f"word{i}" for i in range(1000))]))
    rows = [{"first": f"a {i}", "second": f"b {i}"} for i in range(300)]
    (tmp_path / "none.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "blank.jsonl").write_text("\n".join(json.dumps({"text": " "}) for _ in range(300)))
    (tmp_path / "empty.txt").write_text("")
    options, message = BAD[name]
    code, _, err = start(tmp_path / "run", *(option.format(tmp=tmp_path) for option in options))
    assert code == 2
    assert re.search(message, " ".join(err.replace("│", "").split())), err
    assert "Traceback" not in err
    assert not list((tmp_path / "run").glob("*"))


def test_a_folder_in_use_and_a_checkpoint_of_another_training_are_refused(start, copy, data, tmp_path):
    before = sorted(path.name for path in copy.iterdir())
    code, _, err = start(copy)
    assert (code, "Continue its run with --resume, or choose another --out" in err) == (2, True)
    code, _, err = start(copy, "--resume", "--learning-rate", 0.02, "--arm", "exact", "--whole-word")
    assert code == 2
    changed = "arm: was 'sift', is 'exact'; learning_rate: was 0.01, is 0.02; whole_word: was False, is True"
    assert f"another training ({changed})" in err
    other = json.loads((data / "model.json").read_text()) | {"intermediate_size": 32}
    (tmp_path / "other.json").write_text(json.dumps(other))
    code, _, err = start(copy, "--resume", "--preset", tmp_path / "other.json")
    assert (code, "model: was" in err, "preset: was" in err) == (2, True, True)
    (data / "more.txt").write_text((data / "text.txt").read_text() * 2)
    code, _, err = start(copy, "--resume", "--data", data / "more.txt")
    assert (code, "training data: was" in err) == (2, True)
    path = copy / "checkpoint-12" / "manifest.json"
    content = json.loads(path.read_text()) | {"version": 99}
    del content["sha256"]
    write_json(path, {"sha256": checkpoints._digest_of(content), **content})
    code, _, err = start(copy, "--resume")
    assert (code, "Expected a checkpoint of version 2 in" in err, "got 99" in err) == (2, True, True)
    assert sorted(path.name for path in copy.iterdir()) == before


def test_settings_are_the_command_line_and_the_config_file(start, uncut, tmp_path, copy):
    named = {f"--{name.replace('_', '-')}" for name in PretrainSettings.__dataclass_fields__}
    code, shown, _ = start(tmp_path / "none", "--help")
    assert code == 0
    assert named <= {word.rstrip(",") for word in shown.split()}
    for number in ("0 done", "1 target not reached", "2 bad input", "3 loss not finite", "130 stopped"):
        assert number in " ".join(shown.replace("│", "").split())
    config = json.loads((uncut / "config.json").read_text())
    assert set(config) == set(PretrainSettings.__dataclass_fields__)
    code, said, err = start(copy, "--config", uncut / "config.json", "--resume")
    assert (code, "Trained 12 steps" in said) == (0, True), err
    assert set(ARMS) == {"uniform", *map(sift_arm, MEASURES), "exact", "sift-memory", "auto"}


# Several processes


def test_two_processes_train_as_one_that_accumulates_and_torchrun_begins_a_killed_one_again_bit_equal(
    data, environment, start, tmp_path
):
    out, one, killed = (tmp_path / name for name in ("two", "one", "killed"))
    done = torchrun(data, environment, out, "--arm", "uniform")
    assert done.returncode == 0, done.stderr
    assert start(one, "--arm", "uniform", model="plain.json")[0] == 0
    losses = [[row["loss"] for row in ledger(out, process)] for process in range(2)]
    single = [row["loss"] for row in ledger(one) if "loss" in row]
    assert [(a + b) / 2 for a, b in zip(*losses, strict=True)] == pytest.approx(single, rel=1e-4)
    ours, theirs = curve(out), curve(one)
    assert [p["loss"] for p in ours] == pytest.approx([p["loss"] for p in theirs], rel=1e-4)
    script = tmp_path / "killed.py"
    script.write_text(KILLED_RANK)
    environment = environment | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # see docs/pretrain.md
    restarts = ["--max-restarts", 1, "--monitor-interval", 1]
    restarted = torchrun(data, environment, killed, "--arm", "uniform", launched=[*restarts, script])
    assert restarted.returncode == 0, restarted.stderr
    assert "exitcode: -9" in restarted.stderr
    assert all(ledger(killed, process) == ledger(out, process) for process in range(2))
    assert curve(killed) == curve(out)
    assert all(map(torch.equal, weights(killed), weights(out)))
    code, _, err = start(killed, "--arm", "uniform", "--accumulate", 1, "--resume", model="plain.json")
    assert (code, "processes: was 2, is 1" in err) == (2, True)


def test_two_processes_see_the_candidates_of_one_on_text_in_passing(data, environment, start, tmp_path):
    out, one = tmp_path / "two", tmp_path / "one"
    done = torchrun(data, environment, out, "--arm", "uniform", "--stream", "--workers", "1")
    assert done.returncode == 0, done.stderr
    assert start(one, "--arm", "uniform", "--stream", model="plain.json")[0] == 0
    picks = [[row["picks"] for row in ledger(out, process)] for process in range(2)]
    assert [pick for step in zip(*picks, strict=True) for pick in step] == [row["picks"] for row in ledger(one)]
