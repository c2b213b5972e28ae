"""`earlysift compare` end to end, on tiny models and real text, through the real command line."""

import dataclasses
import html
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
import torch

from earlysift import cli
from earlysift.compare import calibrate, suite
from earlysift.compare.arm import uniform_ms
from earlysift.compare.arms import ARMS
from earlysift.compare.bench import Bench, learning_rate_factor
from earlysift.compare.prices import Prices, charges_ms, step_times_ms
from earlysift.compare.run import compare
from earlysift.compare.settings import Settings
from earlysift.compare.trial import evaluate
from earlysift.config_files import read_settings
from earlysift.measures import MEASURES
from earlysift.pretrain.workload_settings import TASKS
from earlysift.pretrain.workloads import load_workload
from processes import IN_THE_BACKGROUND, started, wait_until

SIZE = [
    *("--evaluations", "3", "--validation-samples", "32", "--batch", "8", "--layers", "3", "--width", "32"),
    *("--length", "32", "--vocab-size", "300"),
]
TINY = [*SIZE, "--budget", "0.5", "--arms", "uniform,sift,exact"]
THREE = ("uniform", "sift", "exact")
ROUNDS = calibrate._FEWEST_ROUNDS


@pytest.fixture(scope="module", autouse=True)
def few_rounds():
    """Calibrations that are good enough where no time is asserted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrate, "_FEWEST_ROUNDS", 3)
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = ["the", "model", "reads", "a", "pool", "of", "samples", "and", "keeps", "those", "that", "matter", "most"]
    paragraphs = (" ".join(words[(i * j) % len(words)] for j in range(60)) for i in range(1, 900))
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "reviews.tsv"
    words = ["the", "film", "has", "a", "plot", "and", "some", "actors", "who", "walk", "through", "it", "slowly"]
    opinions = (("dull", "cold", "awful", "stale"), ("fine", "warm", "lovely", "fresh"))
    rows = []
    for i in range(800):
        phrase = [words[(i * j) % len(words)] for j in range(1, 9)]
        phrase[i % 8] = opinions[i % 2][(i // 2) % 4]
        rows.append(f"{i % 2}\t{' '.join(phrase)} {i}")
    path.write_text("label\ttext\n" + "\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "one"
    assert cli.main(["compare", "--data", str(text), "--out", str(out), "--seeds", "2", *TINY]) == 0
    return out


def results_of(out):
    return json.loads((out / "results.json").read_text())


def ledger_of(out, arm, seed=0):
    return [json.loads(line) for line in (out / "ledgers" / f"{arm}-seed{seed}.jsonl").read_text().splitlines()]


def test_run_folder_holds_results_ledgers_figure_and_page(finished):
    names = {path.name for path in finished.iterdir()}
    assert names == {"config.json", "results.json", "ledgers", "curves.png", "report.html", ".earlysift.json", ".lock"}
    marker = json.loads((finished / ".earlysift.json").read_text())
    assert marker == {"program": "compare", "version": results_of(finished)["versions"]["earlysift"]}
    assert {path.name for path in (finished / "ledgers").iterdir()} == {
        f"{arm}-seed{seed}.jsonl" for arm in THREE for seed in range(2)
    }
    assert results_of(finished)["complete"] is True
    assert html.escape(results_of(finished)["verdict"]) in (finished / "report.html").read_text()


def test_every_arm_spends_the_budget_of_reference_time_and_at_most_one_step_more(finished):
    results = results_of(finished)
    for name, arm in results["arms"].items():
        for run in arm["runs"]:
            last = run["curve"][-1]
            step_s = run["curve"][1]["reference_s"] / run["curve"][1]["step"]
            assert 0.5 <= last["reference_s"] <= 0.5 + 1.01 * step_s, name
            assert sum(run["spent_s"].values()) == pytest.approx(last["reference_s"], rel=1e-4)
            assert run["steps"] == last["step"]


def test_a_budget_in_steps_is_as_many_of_uniform_training_and_the_same_for_other_arms(text, tmp_path):
    out = tmp_path / "out"
    command = ["compare", "--data", str(text), "--out", str(out), *SIZE, "--steps", "10"]
    assert cli.main([*command, "--arms", "uniform", "sift", "rho-loss"]) == 0
    results = results_of(out)
    settings, tables = read_settings(out / "config.json", Settings), results["charged_ms"][0]
    for name, arm in results["arms"].items():
        (run,) = arm["runs"]
        charged = [
            (charges_ms(row, ARMS[name], settings, tables[row["prices"]]), tables[row["prices"]])
            for row in ledger_of(out, name)
        ]
        shares = [sum(charges.values()) / uniform_ms(table) / 10 for charges, table in charged]
        upfront = 2 / 10 if name == "rho-loss" else 0.0  # its reference model trains for a fifth
        assert upfront + sum(shares[:-1]) < 1 <= upfront + sum(shares) + 1e-9, name
        assert run["curve"][-1]["share"] == pytest.approx(1.0)
    assert results["arms"]["uniform"]["runs"][0]["steps"] == 10
    assert ledger_of(out, "uniform")[-1]["share"] == pytest.approx(9 / 10)
    assert [point["step"] for point in results["arms"]["uniform"]["runs"][0]["curve"]] == [0, 5, 10]
    assert cli.main([*command, "--arms", "uniform", "sift", "rho-loss", "--resume"]) == 0
    assert results_of(out)["arms"] == results["arms"]


def test_charges_of_the_ledgers_rows_add_up_to_the_reference_time(finished):
    results = results_of(finished)
    settings = read_settings(finished / "config.json", Settings)
    for name, arm in results["arms"].items():
        for seed, run in enumerate(arm["runs"]):
            tables = results["charged_ms"][seed]
            rows = ledger_of(finished, name, seed)
            charges = [charges_ms(row, ARMS[name], settings, tables[row["prices"]]) for row in rows]
            for kind, spent_s in run["spent_s"].items():
                assert sum(charge.get(kind, 0.0) for charge in charges) / 1e3 == pytest.approx(spent_s, rel=1e-4)


def measured(out, until=None):
    """Times of every operation in the steps of all arms, before the prices of a seed and an evaluation are fixed."""
    settings = read_settings(out / "config.json", Settings)
    times_ms = {}
    for name, arm in results_of(out)["arms"].items():
        for run in arm["runs"]:
            for row in ledger_of(out, name, run["seed"]):
                if until is None or (run["seed"], row["prices"]) < until:
                    for operation, ms in step_times_ms(row, ARMS[name], settings).items():
                        times_ms.setdefault(operation, []).append(ms)
    return times_ms


def test_a_step_is_charged_the_median_of_the_steps_so_far_and_calibration_counts_as_ten(finished):
    results = results_of(finished)
    calibrated = {name: timing["median"] for name, timing in results["calibrated_ms"].items()}
    assert [len(tables) for tables in results["charged_ms"]] == [2, 2]  # one from each evaluation to the next
    assert results["charged_ms"][0][0] == calibrated
    for seed, tables in enumerate(results["charged_ms"]):
        for evaluation, table in enumerate(tables):
            times_ms = measured(finished, until=(seed, evaluation))
            for name, ms in calibrated.items():
                assert table[name] == pytest.approx(median([*[ms] * 10, *times_ms.get(name, [])]), rel=1e-3)


def test_results_tell_what_was_calibrated_and_what_the_arms_own_steps_took(finished):
    results = results_of(finished)
    times_ms = measured(finished)
    assert results["operations_ms"].keys() == results["calibrated_ms"].keys() == times_ms.keys()
    for name, timing in results["operations_ms"].items():
        assert timing["count"] == len(times_ms[name]) > 0
        assert timing["low"] <= timing["median"] <= timing["high"]
    for name in ("score_1", "exact"):  # neither more nor less than what scoring, selecting and gathering took
        assert min(times_ms[name]) <= results["operations_ms"][name]["median"] <= max(times_ms[name])


def test_arms_pay_the_same_prices_from_one_evaluation_to_the_next_whatever_is_measured_meanwhile():
    calibrated = {name: {"median": 10.0} for name in ("train", "score_1")}
    tables = []
    prices = Prices(calibrated, tables)
    assert prices.at(0, 0) == {"train": 10.0, "score_1": 10.0}
    for _ in range(30):
        prices.note({"train": 20.0})
    assert prices.at(0, 0) == {"train": 10.0, "score_1": 10.0}
    assert prices.at(0, 2) == {"train": 20.0, "score_1": 10.0}  # a long step may skip an evaluation
    for _ in range(90):
        prices.note({"train": 40.0, "score_1": 2.0})
    assert prices.at(0, 1) == prices.at(0, 2)
    assert prices.at(1, 0) == {"train": 40.0, "score_1": 2.0}
    again = Prices(calibrated, json.loads(json.dumps(tables)))  # as a resumed run reads them
    assert [again.at(0, 1), again.at(1, 0)] == [prices.at(0, 1), prices.at(1, 0)]


def test_an_operation_that_is_added_costs_as_much_of_a_training_step_as_it_does_now():
    tables = [[{"train": 100.0}]]
    prices = Prices({"train": {"median": 10.0}, "score_1": {"median": 4.0}}, tables)
    assert prices.at(0, 0) == tables[0][0] == {"train": 100.0, "score_1": 40.0}
    for _ in range(30):
        prices.note({"score_1": 2.0})
    assert prices.at(0, 0) == {"train": 100.0, "score_1": 40.0}
    assert prices.at(0, 1) == {"train": 10.0, "score_1": 2.0}


def test_scoring_is_all_that_a_sifter_takes_but_for_probes_and_is_measured_for_a_whole_pool():
    settings = Settings(batch=8, keep=0.5)
    row = {"candidates": 16, "scored": 8, "depth": 2, "wait_ms": 3.0, "train_ms": 20.0, "probe_ms": 30.0}
    assert step_times_ms(row | {"sift_ms": 37.0, "score_ms": 5.0}, ARMS["auto"], settings) == {
        "train": 20.0,
        "read_pool": 3.0,
        "auto_2": 14.0,
        "probe": 30.0,
    }
    row = {"candidates": 8, "wait_ms": 3.0, "train_ms": 20.0, "sift_ms": 1.0}  # before it selects
    assert step_times_ms(row, ARMS["sift-joint-1"], settings) == {"train_joint_1": 20.0, "read_batch": 3.0}
    row = {"candidates": 32, "scored": 32, "wait_ms": 3.0, "train_ms": 20.0, "score_ms": 8.0}
    assert step_times_ms(row, ARMS["rho-loss"], settings) == {"train": 20.0, "read_pool": 1.5, "rho_loss": 20.0}
    row = {"candidates": 0, "scored": 0, "train_ms": 20.0}  # what was drawn before is enough
    assert step_times_ms(row, ARMS["selective-backprop"], settings) == {"train": 20.0}


def test_part_of_a_pool_is_charged_its_part_and_an_uncharged_arm_like_uniform():
    settings = Settings(batch=8, keep=0.5)
    medians_ms = {"read_batch": 1.0, "read_pool": 2.0, "train": 20.0, "score_1": 4.0, "score_2": 6.0, "exact": 10.0}
    medians_ms["rho_loss"] = 40.0  # of its pool of ten batches
    medians_ms |= {"probe": 30.0, "auto_2": 6.0}
    row = {"candidates": 16, "scored": 12, "depth": 2, "probe_ms": 99.0}
    assert charges_ms(row, ARMS["auto"], settings, medians_ms) == {
        "read": 2.0,
        "train": 20.0,
        "score": 4.5,
        "probe": 30.0,
    }
    lesson = {"candidates": 8, "train_ms": 21.0, "lesson_ms": 2.0}  # which was given within training
    assert charges_ms(lesson, ARMS["auto"], settings, medians_ms | {"lesson": 1.5}) == {
        "read": 1.0,
        "train": 20.0,
        "lesson": 1.5,
    }
    assert step_times_ms(lesson, ARMS["auto"], settings) == {"train": 19.0, "lesson": 2.0}
    look = lesson | {"sift_ms": 9.0, "look_ms": 5.0, "mode": "off"}  # at what was trained on before
    assert charges_ms(look, ARMS["auto"], settings, medians_ms | {"lesson": 1.5, "look": 4.0}) == {
        "read": 1.0,
        "train": 20.0,
        "lesson": 5.5,
    }
    assert step_times_ms(look, ARMS["auto"], settings) == {"train": 19.0, "lesson": 2.0, "look": 5.0}
    row = {"candidates": 16, "mode": "off", "probe_ms": 99.0}  # a uniform step whose pool was read for the probe
    assert charges_ms(row, ARMS["auto"], settings, medians_ms) == {"read": 1.0, "train": 20.0, "probe": 31.0}
    assert charges_ms({"candidates": 8}, ARMS["auto"], settings, medians_ms) == {"read": 1.0, "train": 20.0}
    row = {"candidates": 16, "scored": 16}
    assert charges_ms(row, ARMS["free"], settings, medians_ms) == {"read": 1.0, "train": 20.0}
    row = {"candidates": 80, "scored": 80, "reference_scored": 40}
    assert charges_ms(row, ARMS["rho-loss"], settings, medians_ms) == {
        "read": 10.0,
        "train": 20.0,
        "score": 40.0,
        "reference model": 20.0,
    }


def test_arms_of_a_seed_start_from_the_same_weights(finished):
    arms = results_of(finished)["arms"].values()
    for seed in range(2):
        assert len({arm["runs"][seed]["curve"][0]["loss"] for arm in arms}) == 1
    assert len({arm["runs"][seed]["curve"][0]["loss"] for arm in arms for seed in range(2)}) == 2


def test_ledger_counts_what_each_arm_read_scored_and_trained(finished):
    for name, pool in (("uniform", 8), ("sift", 16), ("exact", 16)):
        rows = ledger_of(finished, name)
        assert [row["step"] for row in rows] == list(range(results_of(finished)["arms"][name]["runs"][0]["steps"]))
        assert {row["candidates"] for row in rows} == {pool}
        assert {row["trained"] for row in rows} == {8}
        assert sum(row.get("scored", 0) for row in rows) == (0 if name == "uniform" else 16 * len(rows))
        assert all(
            row["step_ms"] > row["train_ms"] > 0 and row["wait_ms"] > 0 and row["trained_flops"] > 0 for row in rows
        )


def test_exit_scoring_is_charged_fewer_flops_than_exact_scoring(finished):
    sift, exact = ledger_of(finished, "sift")[0], ledger_of(finished, "exact")[0]
    assert 0 < sift["scored_flops"] < exact["scored_flops"]
    assert sift["trained_flops"] == exact["trained_flops"]


def test_first_step_of_uniform_trains_on_the_stream_and_sift_on_harder_samples(finished):
    assert ledger_of(finished, "sift")[0]["loss"] > ledger_of(finished, "uniform")[0]["loss"]


def test_fidelity_is_measured_for_every_arm_at_every_evaluation(finished):
    for arm in results_of(finished)["arms"].values():
        for run in arm["runs"]:
            assert len(run["fidelity"]) == len(run["curve"]) == 3
            assert all(-1 <= point["rank_correlation"] <= 1 for point in run["fidelity"])


def test_learning_rate_rises_then_decays_to_zero_at_the_end_of_the_budget():
    for warmup in (0.0, 0.1, 0.5):
        factors = [learning_rate_factor(share / 100, warmup) for share in range(101)]
        peak = factors.index(max(factors))
        assert max(factors) == pytest.approx(1.0)
        assert peak == round(100 * warmup)
        assert factors[:peak] == sorted(factors[:peak])
        assert factors[peak:] == sorted(factors[peak:], reverse=True)
        assert factors[-1] == 0.0


def test_every_arm_ends_with_its_rate_decayed_whatever_its_steps_cost(finished):
    for name in THREE:
        shares = [row["share"] for row in ledger_of(finished, name)]
        assert shares == sorted(shares)
        assert shares[0] == 0.0
        assert 1 - shares[-1] <= 1.01 * (shares[-1] - shares[-2])
        assert learning_rate_factor(shares[-1], 0.1) < 2.5 / len(shares)


def test_same_seed_and_costs_give_the_same_curves(finished, text, tmp_path):
    # Calibration differs between runs, so the second run is resumed from the first one's calibration.
    again = tmp_path / "again"
    again.mkdir()
    results = results_of(finished)
    for arm in results["arms"].values():
        arm["runs"] = []
    (again / "results.json").write_text(json.dumps(results))
    (again / "config.json").write_text(json.dumps(results["config"]))
    code = cli.main(["compare", "--data", str(text), "--out", str(again), "--seeds", "2", "--resume", *TINY])
    assert code == 0
    for name, arm in results_of(again)["arms"].items():
        for ours, theirs in zip(arm["runs"], results_of(finished)["arms"][name]["runs"], strict=True):
            assert [p["loss"] for p in ours["curve"]] == [p["loss"] for p in theirs["curve"]]


def test_folder_with_another_run_is_refused_and_left_as_it_was(finished, text, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert cli.main(["compare", "--data", str(text), "--out", str(finished), *TINY]) == 2
    message = capsys.readouterr().err
    assert "holds another run" in message
    assert "--resume" in message
    assert "--force" in message
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_folder_with_foreign_files_is_refused_even_by_force(tmp_path, text, capsys):
    (tmp_path / "thesis.tex").write_text("precious")
    assert cli.main(["compare", "--data", str(text), "--out", str(tmp_path), "--force", *TINY]) == 2
    assert "no comparison wrote" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_resume_with_other_settings_is_refused_and_lists_them(finished, text, capsys):
    arguments = ["compare", "--data", str(text), "--out", str(finished), "--seeds", "2", *TINY, "--keep", "0.25"]
    assert cli.main([*arguments, "--resume"]) == 2
    assert "keep: was 0.5, is 0.25" in capsys.readouterr().err


def test_a_run_that_is_older_than_a_setting_goes_on_with_its_default(finished, text, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    results = results_of(copy)
    del results["config"]["augmented"]
    (copy / "results.json").write_text(json.dumps(results))
    (copy / "config.json").write_text(json.dumps(results["config"]))
    command = ["compare", "--data", str(text), "--out", str(copy), "--seeds", "2", "--resume", *TINY]
    assert cli.main([*command, "--augmented"]) == 2
    assert "augmented: was False, is True" in capsys.readouterr().err
    assert cli.main(command) == 0


def test_resume_of_a_finished_run_adds_seeds_and_keeps_the_finished_ones(finished, text, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(finished), str(copy)], check=True)
    before = results_of(copy)
    assert cli.main(["compare", "--data", str(text), "--out", str(copy), "--seeds", "3", "--resume", *TINY]) == 0
    after = results_of(copy)
    assert after["comparison"]["sift"]["seeds"] == 3
    assert after["config"]["seeds"] == 3
    for name, arm in before["arms"].items():
        assert [run["curve"] for run in after["arms"][name]["runs"][:2]] == [run["curve"] for run in arm["runs"]]


def test_a_run_is_complete_only_with_all_its_seeds_however_few_a_resume_asks_for(finished, text, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    results = results_of(copy)
    results["config"]["seeds"] = 3  # as a run of three seeds that was stopped after the second
    (copy / "results.json").write_text(json.dumps(results))
    assert cli.main(["compare", "--data", str(text), "--out", str(copy), "--seeds", "2", "--resume", *TINY]) == 0
    assert "Some arms lack seeds" in capsys.readouterr().out
    assert results_of(copy)["complete"] is False
    assert "Partial run" in (copy / "report.html").read_text()


@pytest.mark.parametrize(("stop", "ignored"), [(signal.SIGINT, ()), (signal.SIGTERM, IN_THE_BACKGROUND)])
def test_a_stop_leaves_a_readable_partial_result_and_resume_finishes_it(text, tmp_path, stop, ignored):
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "earlysift", "compare", "--data", str(text), "--out", str(out), *TINY]
    command[command.index("--budget") + 1] = "2"
    process = started(command, ignored, stderr=subprocess.STDOUT)
    wait_until(process, (out / "ledgers" / "exact-seed0.jsonl").exists)
    process.send_signal(stop)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "partial" in output
    partial = results_of(out)
    assert partial["complete"] is False
    assert partial["verdict"].startswith("No verdict")
    assert partial["arms"]["uniform"]["runs"][0]["curve"]
    assert "report.html" in {path.name for path in out.iterdir()}
    assert cli.main([*command[3:], "--resume"]) == 0
    assert results_of(out)["complete"] is True


def contents(folder):
    """All that is in a folder, links as links, to see that nothing of it was touched."""
    return {
        path: (
            path.readlink() if path.is_symlink() else path.read_bytes() if path.is_file() else None,
            path.lstat().st_mode,
        )
        for path in folder.rglob("*")
    }


REFUSED = {  # what is found at different times: by the settings, by the data, by the model, by a step of it
    "data": ["--data", "typo.txt"],
    "width 7": ["--width", "7"],
    "width 0": ["--width", "0"],
    "learning rate": ["--learning-rate", "nan"],
    "pool": ["--keep", "1e-7"],
    "device": ["--device", "foo"],
    "subset": ["--train-samples", "2", "--batch", "1", "--arms", "uniform,rs2"],
}


@pytest.mark.parametrize("reason", REFUSED)
def test_a_refused_force_leaves_the_earlier_run_as_it_was(reason, finished, text, capsys):
    before = contents(finished)
    assert cli.main(["compare", "--data", str(text), "--out", str(finished), "--force", *TINY, *REFUSED[reason]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("earlysift: ")
    assert "Traceback" not in error
    assert contents(finished) == before


def test_a_refused_command_makes_no_folder_so_that_the_corrected_one_runs(text, tmp_path):
    out = tmp_path / "runs" / "new"
    command = ["compare", "--data", str(text), "--out", str(out), *TINY, "--budget", "0.1"]
    for reason in REFUSED.values():
        assert cli.main([*command, *reason]) == 2
        assert list(tmp_path.iterdir()) == []
    assert cli.main(command) == 0


def test_a_run_that_has_measured_nothing_yet_is_not_another_run(finished, text, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    results = results_of(out)
    for arm in results["arms"].values():
        arm["runs"] = []
    (out / "results.json").write_text(json.dumps(results))
    assert (
        cli.main(["compare", "--data", str(text), "--out", str(out), *TINY, "--keep", "0.25", "--budget", "0.1"]) == 0
    )


@pytest.mark.parametrize("flag", ["--force", "--resume"])
def test_a_folder_of_pretrain_is_refused_and_left_as_it_was(flag, copy, text, capsys):
    before = contents(copy)
    assert cli.main(["compare", "--data", str(text), "--out", str(copy), flag, *TINY]) == 2
    assert "belongs to earlysift pretrain" in capsys.readouterr().err
    (copy / ".earlysift.json").unlink()  # as of before there were markers
    assert cli.main(["compare", "--data", str(text), "--out", str(copy), flag, *TINY]) == 2
    assert "no comparison wrote" in capsys.readouterr().err
    assert contents(copy) == {path: content for path, content in before.items() if path.name != ".earlysift.json"}


def test_pretrain_refuses_the_folder_of_a_comparison_and_leaves_it_as_it_was(finished, start):
    before = contents(finished)
    code, _, err = start(finished, "--resume")
    assert (code, "belongs to earlysift compare" in err) == (2, True), err
    assert contents(finished) == before


@pytest.mark.parametrize("flag", ["--force", "--resume"])
@pytest.mark.parametrize("results", ["{}", '{"version": 2, "config": {}, "arms": {}}', "[[[", "5"])
def test_a_folder_that_merely_holds_a_results_json_is_refused_and_left_as_it_was(flag, results, text, tmp_path, capsys):
    for name in ("results.json", "config.json", "encoder/thesis.bin", "ledgers/2024.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(results)
    before = contents(tmp_path)
    assert cli.main(["compare", "--data", str(text), "--out", str(tmp_path), flag, *TINY]) == 2
    assert "no comparison wrote" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_force_replaces_the_earlier_run_and_leaves_other_files(finished, text, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(finished), str(copy)], check=True)
    foreign = ("notes.txt", "encoder/thesis.bin", "ledgers/2024.csv", "ledgers/mine-seed0.jsonl")
    for name in foreign:
        (copy / name).parent.mkdir(exist_ok=True)
        (copy / name).write_text("mine")
    arguments = ["compare", "--data", str(text), "--out", str(copy), "--force", *TINY]
    assert cli.main([*arguments, "--arms", "uniform", "sift"]) == 0
    assert set(results_of(copy)["arms"]) == {"uniform", "sift"}
    assert {path.name for path in (copy / "ledgers").iterdir()} == {
        *("uniform-seed0.jsonl", "sift-seed0.jsonl", "2024.csv", "mine-seed0.jsonl")
    }
    assert {(copy / name).read_text() for name in foreign} == {"mine"}


def test_a_run_from_before_there_were_markers_is_resumed_but_not_deleted(finished, text, tmp_path, capsys):
    out = Path(shutil.copytree(finished, tmp_path / "old"))
    (out / ".earlysift.json").unlink()
    results = results_of(out)
    del results["charged_ms"], results["calibrated_ms"]  # all was charged as it was calibrated
    (out / "results.json").write_text(json.dumps(results))
    command = ["compare", "--data", str(text), "--out", str(out), "--seeds", "2", *TINY]
    before = contents(out)
    assert cli.main([*command, "--force"]) == 2
    assert "has no .earlysift.json, without which nothing is deleted" in capsys.readouterr().err
    assert cli.main(command) == 2
    assert "holds another run" in capsys.readouterr().err
    assert contents(out) == before
    assert cli.main([*command, "--resume", "--arms", "uniform,sift,exact,sift-entropy"]) == 0
    grown = results_of(out)
    for name, arm in results["arms"].items():
        assert grown["arms"][name]["runs"] == arm["runs"]
    charged = {name: timing["median"] for name, timing in results["operations_ms"].items()}
    for table in (table for tables in grown["charged_ms"] for table in tables):
        assert {name: table[name] for name in charged} == charged
    assert (out / ".earlysift.json").is_file()


@pytest.mark.parametrize("flag", ["--force", "--resume"])
@pytest.mark.parametrize("name", ["ledgers", "encoder", "results.json", "ledgers/sift-seed0.jsonl", ".lock"])
def test_a_link_in_the_run_folder_is_refused_and_where_it_leads_to_left_as_it_was(
    name, flag, finished, text, tmp_path, capsys
):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    target = tmp_path / "elsewhere"
    if (out / name).exists():
        (out / name).rename(target)
    else:
        target.mkdir()
    (out / name).symlink_to(target)
    before = contents(tmp_path)
    assert cli.main(["compare", "--data", str(text), "--out", str(out), "--seeds", "2", flag, *TINY]) == 2
    assert f"{out / name} is a link to {target}" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_an_out_that_is_no_folder_is_one_clear_line(finished, text, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(finished)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    before, run = contents(tmp_path), contents(finished)
    for name, message in (
        ("file", "found a file"),
        ("file/run", f"Expected a folder at {tmp_path / 'file'}, found a file"),
        ("link", f"found a link to {finished}"),
        ("dangling", "found a link to"),
    ):
        for flags in ([], ["--force"], ["--resume"]):
            assert cli.main(["compare", "--data", str(text), "--out", str(tmp_path / name), *TINY, *flags]) == 2
            assert message in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert contents(finished) == run


def test_a_second_comparison_in_a_folder_is_refused_while_the_first_one_runs(text, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["compare", "--data", str(text), "--out", str(out), *TINY, "--budget", "2"]
    first = started([sys.executable, "-m", "earlysift", *arguments], stderr=subprocess.STDOUT)
    wait_until(first, (out / "ledgers" / "exact-seed0.jsonl").exists)
    for flags in ([], ["--force"], ["--resume"]):
        assert cli.main([*arguments, *flags]) == 2
        assert f"Another process trains in {out}. Wait until" in capsys.readouterr().err
    output, _ = first.communicate()
    assert first.returncode == 0, output
    assert results_of(out)["complete"] is True


@pytest.mark.parametrize("damage", ['{"step": 0}\n', "5\n", "{\n", '{"candidates": "many", "wait_ms": 1}\n'])
def test_a_damaged_ledger_of_a_finished_run_is_named_before_anything_is_written(
    damage, finished, text, tmp_path, capsys
):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    path = out / "ledgers" / "sift-seed0.jsonl"
    path.write_text(damage)
    before = contents(out)
    assert cli.main(["compare", "--data", str(text), "--out", str(out), "--seeds", "3", *TINY, "--resume"]) == 2
    assert f"The ledger {path} of a finished run is damaged" in capsys.readouterr().err
    assert contents(out) == before


@pytest.mark.parametrize(
    "key", ["config", "machine", "arms", "operations_ms", "calibrated_ms", "charged_ms", "complete"]
)
def test_results_of_the_wrong_shape_are_refused_by_a_resume(key, finished, text, tmp_path, capsys):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    (out / "results.json").write_text(json.dumps(results_of(out) | {key: [1]}))
    before = contents(out)
    assert cli.main(["compare", "--data", str(text), "--out", str(out), "--seeds", "2", *TINY, "--resume"]) == 2
    assert "the results of a comparison" in capsys.readouterr().err
    assert contents(out) == before


def test_a_resumed_comparison_computes_on_the_threads_of_the_run_it_goes_on_with(finished, tmp_path):
    out = Path(shutil.copytree(finished, tmp_path / "run"))
    results = results_of(out)
    results["machine"]["threads"] = 2
    (out / "results.json").write_text(json.dumps(results))
    settings = read_settings(out / "config.json", Settings)
    threads, before = set(), torch.get_num_threads()

    def note(*_):
        threads.add(torch.get_num_threads())

    results = compare(dataclasses.replace(settings, out=out, resume=True), note)  # only rehearsed: all is there
    assert threads == {2}
    assert results["machine"]["threads"] == 2
    assert torch.get_num_threads() == before


def test_progress_is_told_at_every_evaluation_as_the_share_of_the_arm_over_all_seeds(text, tmp_path):
    settings = {"data": (text,), "arms": ("uniform", "sift"), "layers": 3, "width": 32, "length": 32, "batch": 8}
    settings |= {"vocab_size": 300, "budget": 0.2, "evaluations": 3, "validation_samples": 32, "seeds": 2}
    progress = {}

    def note(name, share):
        progress.setdefault(name, []).append(share)

    results = compare(Settings(**settings, out=tmp_path / "run"), note)
    for arm in results["arms"].values():
        shares = progress[arm["label"]]
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0.0, 1.0)
        for seed, run in enumerate(arm["runs"]):
            for point in run["curve"]:
                share = (seed + min(1.0, point["reference_s"] / 0.2)) / 2
                assert any(one == pytest.approx(share, abs=1e-4) for one in shares)
    settings["seeds"] = 3
    progress.clear()
    compare(Settings(**settings, out=tmp_path / "run", resume=True), note)
    assert all(progress[arm["label"]][:2] == [1 / 3, 2 / 3] for arm in results["arms"].values())  # finished before


def test_missing_data_is_one_clear_line_and_exit_code_2(tmp_path, capsys):
    code = cli.main(["compare", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), *TINY])
    error = capsys.readouterr().err
    assert code == 2
    assert "nowhere" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("device", ["cuda", "foo", "cuda:99", "meta", "cpu:3", ""])
def test_an_accelerator_that_is_not_there_is_one_clear_line(device, text, tmp_path, capsys):
    if torch.accelerator.is_available() and device == "cuda":
        pytest.skip("this machine has an accelerator")
    code = cli.main(["compare", "--data", str(text), "--out", str(tmp_path / "out"), "--device", device, *TINY])
    assert code == 2
    assert not (tmp_path / "out").exists()
    expected = "Expected an accelerator" if device == "cuda" else f"device must be cpu, cuda .*, got {device!r}"
    assert re.search(expected, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0.0}, "keep must be in (0, 1]"),
        ({"keep": 1.5}, "keep must be in (0, 1]"),
        ({"arms": ("uniform", "sift-6"), "layers": 6}, "['sift-6'] exit after more layers than a model of 6 layers"),
        ({"arms": ("uniform", "visible"), "task": "causal_lm"}, "the task is causal_lm"),
        ({"flipped": 1.0}, "flipped must be in [0, 1)"),
        ({"select_after": -0.1}, "select_after must be in [0, 1)"),
        ({"target_share": 0.0}, "target_share must be in (0, 1]"),
        ({"jobs": 0}, "jobs must be at least 1"),
        ({"only": ("digits",)}, "give --suite, too"),
        ({"depth": 12}, "depth must be in 1..11"),
        ({"depth": 0}, "depth must be in 1..11"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"budget": 0.0}, "budget must be more than 0"),
        ({"target": 1.5}, "target must be in (0, 1), got 1.5"),
        ({"arms": ("uniform", "magic")}, "Unknown arms ['magic']"),
        ({"arms": ("sift",)}, "'uniform' is needed"),
        ({"evaluations": 1}, "evaluations must be at least 2"),
        ({"resume": True, "force": True}, "Choose one of resume and force"),
        ({"budget": 30.0, "steps": 100}, "give one of them"),
    ],
)
def test_settings_out_of_range_are_refused_with_what_was_expected(values, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Settings(**values)


def test_all_problems_of_the_settings_come_at_once():
    with pytest.raises(ValueError, match=r"(?s)seeds.*keep"):
        Settings(seeds=0, keep=7.0)


def test_config_file_gives_defaults_and_the_command_line_has_the_last_word(tmp_path):
    path = tmp_path / "settings.toml"
    path.write_text('keep = 0.25\ndepth = 2\narms = ["uniform", "sift"]\ndata = "corpus"\n')
    assert (read_settings(path, Settings).keep, read_settings(path, Settings).depth) == (0.25, 2)
    command = cli._parse(["compare", "--config", str(path), "--depth", "3"])
    assert (command.keep, command.depth, command.arms) == (0.25, 3, ("uniform", "sift"))
    assert command.data == (Path("corpus"),)


def test_arms_may_be_separated_by_commas_or_spaces():
    both = (["--arms", "uniform,sift"], ["--arms", "uniform", "sift"])
    assert {cli._parse(["compare", *given]).arms for given in both} == {("uniform", "sift")}


def test_config_of_a_run_folder_gives_the_same_settings_again(finished):
    again = read_settings(finished / "config.json", Settings)
    assert json.loads(json.dumps(again.identity())) == results_of(finished)["config"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("keep = ", "is not a TOML file"), ("keeep = 0.5", "unknown settings ['keeep']")],
)
def test_bad_config_files_are_refused_with_a_way_out(tmp_path, content, message):
    path = tmp_path / "settings.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        read_settings(path, Settings)
    with pytest.raises(FileNotFoundError, match="found none"):
        read_settings(tmp_path / "none.toml", Settings)


@pytest.mark.parametrize("arguments", [["--help"], ["compare", "--help"], ["report", "--help"]])
def test_help_is_there_and_shows_examples(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 0
    if arguments != ["--help"]:
        assert f"earlysift {arguments[0]}" in capsys.readouterr().out


def test_report_draws_the_page_of_a_finished_run_again(finished, capsys):
    page = finished / "report.html"
    before = page.read_text()
    page.unlink()
    assert cli.main(["report", str(finished)]) == 0
    assert page.read_text() == before
    assert str(page) in capsys.readouterr().out


def test_without_a_terminal_every_evaluation_of_every_arm_is_a_line(text, tmp_path, capsys):
    arms = ["--arms", "uniform", "sift"]
    command = ["compare", "--data", str(text), "--out", str(tmp_path / "out"), *SIZE, "--budget", "0.2", "--seeds", "2"]
    assert cli.main([*command, *arms]) == 0
    printed = capsys.readouterr().out
    lines = re.findall(
        r"^(uniform|SIFT), seed (\d): (\d+)% of the budget, validation accuracy ([\d.]+)%$", printed, re.M
    )
    results = results_of(tmp_path / "out")
    wanted = [
        (arm["label"], str(run["seed"]), f"{100 * point['accuracy']:.2f}")
        for arm in results["arms"].values()
        for run in arm["runs"]
        for point in run["curve"]
    ]
    assert sorted((arm, seed, accuracy) for arm, seed, _, accuracy in lines) == sorted(wanted)
    shares = [int(share) for arm, seed, share, _ in lines if (arm, seed) == ("uniform", "0")]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 100)
    assert printed.index("read data: 100%") < printed.index("calibrate: ") < printed.index("uniform, seed 0: 0%")


def test_flags_of_the_command_line_are_a_frozen_list(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    shown = {word.rstrip(",") for word in capsys.readouterr().out.split() if word.startswith("--") and len(word) > 2}
    named = {f"--{name.replace('_', '-')}" for name in Settings.__dataclass_fields__}
    assert named == {
        *("--task", "--data", "--flipped", "--repeated", "--train-samples", "--max-characters", "--checkpoint"),
        *("--save-encoder", "--out", "--arms", "--seeds", "--budget", "--target", "--target-share", "--keep"),
        *("--depth", "--select-after", "--batch", "--layers", "--width", "--length", "--vocab-size", "--warmup"),
        *("--learning-rate", "--validation-samples", "--evaluations", "--device", "--suite", "--only", "--jobs"),
        *("--resume", "--force", "--config", "--text-column", "--label-column", "--steps"),
        "--architecture",
        "--augmented",
    }
    assert named <= shown


@pytest.mark.parametrize("task", TASKS)
def test_every_arm_runs_on_every_task(task, text, table, tmp_path):
    data = {"classification": ["--data", str(table)], "image": []}.get(task, ["--data", str(text)])
    able = [name for name, arm in ARMS.items() if not arm.tasks or task in arm.tasks]
    first = {re.sub(r"-\d+", "", name): name for name in reversed(able)}  # other exits of an arm run on one task
    arms = able if task == "masked_lm" else [name for name in able if name in first.values()]
    size = [*SIZE, "--layers", "7", "--budget", "0.2", "--arms", *arms]
    assert cli.main(["compare", "--task", task, *data, "--out", str(tmp_path / "out"), *size]) == 0
    results = results_of(tmp_path / "out")
    assert set(results["arms"]) == set(arms)
    assert results["data"]["task"] == task
    assert results["data"]["train_samples"] > 0
    assert set(results["baseline"]) == {"accuracy", "loss"}
    for name, arm in results["arms"].items():
        (run,) = arm["runs"]
        assert run["finished"], name
        assert run["steps"] >= 1
        assert run["curve"][0]["reference_s"] == 0.0
        assert run["curve"][-1]["reference_s"] == pytest.approx(sum(run["spent_s"].values()), rel=1e-4)
        assert run["curve"][-1]["reference_s"] >= 0.2
        assert arm["source"] is None or "arXiv" in arm["source"]
        assert (name == "uniform") == ("verdict" not in results["comparison"].get(name, {}))
    assert len({arm["runs"][0]["curve"][0]["loss"] for arm in results["arms"].values()}) == 1
    assert results["arms"]["free"]["charged"] is False
    assert results["arms"]["free"]["runs"][0]["steps"] == results["arms"]["uniform"]["runs"][0]["steps"]
    assert results["arms"]["rho-loss"]["runs"][0]["spent_s"]["reference model"] >= 0.04
    auto, uniform = ledger_of(tmp_path / "out", "auto"), ledger_of(tmp_path / "out", "uniform")
    off = next((i for i, row in enumerate(auto) if row["mode"] != "off"), len(auto))
    assert {row["candidates"] for row in auto[:off] if "probe_ms" not in row} <= {8}
    common = min(off, len(uniform))
    assert [row["loss"] for row in auto[:common]] == [
        row["loss"] for row in uniform[:common]
    ]  # off is uniform training
    if off == len(auto):  # evaluated after the same steps, too, as long as the budget lasts
        curves = [results["arms"][name]["runs"][0]["curve"] for name in ("auto", "uniform")]
        seen = [[(point["step"], point["accuracy"]) for point in curve] for curve in curves]
        assert seen[0][:-1] == seen[1][: len(seen[0]) - 1]
    if task != "masked_lm":
        return
    expected = {
        "read_batch",
        "read_pool",
        "train",
        "train_joint_1",
        "train_joint_2",
        "probe",
        "exact",
        "grad_norm",
        "rho_loss",
        "memory",
        *(f"auto_{depth}" for depth in (0, 1, 2, 3)),
        "lesson",
        "look",
        *(f"{score}_{depth}" for score in ("exit_probe", "blend") for depth in (1, 2, 3)),
    }
    expected |= {"score_1", "score_2", "score_3", "score_6", "head_1", "head_2"}
    expected |= {f"{name}_{depth}" for name in MEASURES if name != "loss" for depth in (1, 3)}
    assert set(results["operations_ms"]) == expected | {"visible", "predictive"}


def test_hidden_accuracy_is_that_of_labelled_tokens_the_model_does_not_see():
    size = {"layers": 2, "width": 32, "length": 16, "vocab_size": 300, "validation_samples": 40}
    settings = Settings(batch=8, max_characters=100_000, **size)
    workload = load_workload(settings)
    bench = Bench(workload, settings, seed=0, medians_ms={})
    bench.set_rate(0.1)
    for _ in range(20):
        bench.update(bench.loss(bench.read(8)))
    rows = workload.samples.validation
    quality, _ = evaluate(bench, rows)
    with torch.no_grad():
        logits = bench.model.eval()(input_ids=rows["input_ids"]).logits
    hidden = (rows["labels"] != -100) & (rows["input_ids"] != rows["labels"])
    assert 0 < hidden.sum() < (rows["labels"] != -100).sum()
    right = (logits.argmax(dim=-1) == rows["labels"])[hidden]
    assert quality["hidden_accuracy"] == pytest.approx(right.double().mean().item())
    losses = torch.nn.functional.cross_entropy(logits[hidden], rows["labels"][hidden])
    assert quality["hidden_loss"] == pytest.approx(losses.item(), rel=1e-4)
    assert quality["hidden_loss"] != quality["loss"]


def test_only_operations_that_the_arms_need_are_measured(finished):
    assert set(results_of(finished)["operations_ms"]) == {"read_batch", "read_pool", "train", "score_1", "exact"}


def test_arms_train_uniformly_and_unscored_until_they_select(text, tmp_path):
    out = tmp_path / "late"
    arguments = ["compare", "--data", str(text), "--out", str(out), *TINY, "--select-after", "0.4"]
    assert cli.main(arguments) == 0
    uniform = ledger_of(out, "uniform")
    for name in ("sift", "exact"):
        rows = ledger_of(out, name)
        early = [row for row in rows if row["share"] < 0.4]
        assert {(row["candidates"], row.get("scored", 0)) for row in early} == {(8, 0)}
        assert {(row["candidates"], row["scored"]) for row in rows[len(early) :]} == {(16, 16)}
        assert [row["loss"] for row in early] == [row["loss"] for row in uniform[: len(early)]]


def emptied(finished, folder, arms):
    """A copy of a run with its calibration and none of its runs."""
    folder.mkdir()
    results = results_of(finished)
    results["config"]["arms"] = arms
    results["arms"] = {}
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "config.json").write_text(json.dumps(results["config"]))


def test_arms_added_by_a_resume_give_the_curves_of_a_run_at_once_and_repeat_nothing(finished, text, tmp_path):
    out = tmp_path / "grown"
    emptied(finished, out, ["uniform"])
    command = ["compare", "--data", str(text), "--out", str(out), "--seeds", "2", "--resume", *TINY]
    assert cli.main([*command, "--arms", "uniform"]) == 0
    first = results_of(out)
    assert set(first["arms"]) == {"uniform"}
    assert cli.main([*command, "--arms", "uniform", "exact", "sift"]) == 0
    grown, whole = results_of(out), results_of(finished)
    assert grown["arms"]["uniform"]["runs"] == first["arms"]["uniform"]["runs"]
    assert grown["config"]["arms"] == ["uniform", "exact", "sift"]
    for name in THREE:
        for ours, theirs in zip(grown["arms"][name]["runs"], whole["arms"][name]["runs"], strict=True):
            for measure in ("step", "loss", "accuracy", "reference_s"):
                assert [p[measure] for p in ours["curve"]] == [p[measure] for p in theirs["curve"]]


def test_resume_with_fewer_arms_keeps_those_that_are_there(finished, text, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(finished), str(copy)], check=True)
    command = ["compare", "--data", str(text), "--out", str(copy), "--seeds", "1", "--resume", *TINY]
    assert cli.main([*command, "--arms", "uniform"]) == 0
    before, after = results_of(finished), results_of(copy)
    assert after["config"] == before["config"]
    assert after["arms"] == before["arms"]
    assert after["comparison"] == before["comparison"]


def test_an_added_operation_is_scaled_to_the_speed_that_the_others_were_measured_at(
    finished, text, tmp_path, monkeypatch
):
    monkeypatch.setattr(calibrate, "_FEWEST_ROUNDS", ROUNDS)
    out = tmp_path / "slower"
    emptied(finished, out, ["uniform"])
    results = results_of(out)
    results["charged_ms"] = []
    for timing in results["calibrated_ms"].values():
        timing["median"] *= 50  # a machine fifty times slower
    (out / "results.json").write_text(json.dumps(results))
    command = ["compare", "--data", str(text), "--out", str(out), "--resume", *TINY, "--arms", "uniform,sift-2"]
    assert cli.main(command) == 0
    medians_ms = {name: timing["median"] for name, timing in results_of(out)["calibrated_ms"].items()}
    assert medians_ms["train"] == results["calibrated_ms"]["train"]["median"]
    assert 0.1 < medians_ms["score_2"] / medians_ms["train"] < 3


# Suites


@pytest.fixture
def tiny_suite(monkeypatch, text):
    tiny = {"arms": ("uniform", "sift"), "layers": 3, "width": 32, "length": 32, "vocab_size": 300, "batch": 8}
    tiny |= {"budget": 0.5, "evaluations": 3, "validation_samples": 32}
    rows = {
        "reviews": {**tiny, "task": "classification", "data": ("reviews.tsv",), "checkpoint": "words"},  # waits for it
        "words": {**tiny, "data": (text.name,), "save_encoder": True},
        "digits": {**tiny, "task": "image"},
        "absent": {**tiny, "data": ("nowhere",)},
    }
    monkeypatch.setitem(suite.SUITES, "cpu", rows)


@pytest.mark.usefixtures("tiny_suite")
def test_suite_runs_each_workload_in_a_folder_of_its_own_and_skips_what_has_no_data(text, table, tmp_path, capsys):
    corpora = tmp_path / "corpora"
    corpora.mkdir()
    (corpora / text.name).symlink_to(text)
    (corpora / "reviews.tsv").symlink_to(table)
    out = tmp_path / "cpu"
    command = ["compare", "--suite", "cpu", "--data", str(corpora), "--out", str(out), "--jobs", "2"]
    assert cli.main(command) == 0
    said = capsys.readouterr().out
    assert "absent: skipped: needs nowhere" in said
    for name in ("words", "digits", "reviews"):
        results = results_of(out / name)
        assert results["complete"] is True
        assert results["machine"]["threads"] == max(1, os.cpu_count() // 2)
        assert results["comparison"]["sift"]["verdict"].partition(":")[0] in said
        assert (out / name / "report.html").is_file()
    assert results_of(out / "reviews")["config"]["checkpoint"] == str(out / "words" / "encoder")
    assert (out / "report.html").is_file()
    before = results_of(out / "digits")["arms"]
    assert cli.main([*command, "--resume", "--only", "digits", "--arms", "uniform,sift,infobatch"]) == 0
    after = results_of(out / "digits")["arms"]
    assert set(after) == {"uniform", "sift", "infobatch"}
    assert all(after[arm] == before[arm] for arm in before)
    assert cli.main([*command, "--only", "digits"]) == 2
    assert "digits: did not run: The folder" in capsys.readouterr().out
    shutil.rmtree(out / "words" / "encoder")  # as if the run had been stopped before it saved that
    assert cli.main([*command, "--resume", "--only", "words"]) == 0
    assert (out / "words" / "encoder" / "model.safetensors").is_file()


@pytest.mark.usefixtures("tiny_suite")
def test_suite_in_a_folder_that_it_does_not_own_is_refused_and_leaves_it_as_it_was(finished, tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name, content in (("foreign", "logs/digits.log"), ("notes", "notes.txt"), ("linked", None)):
        out = tmp_path / name
        out.mkdir()
        if content is None:
            (out / "logs").symlink_to(elsewhere)
            (out / ".earlysift.json").write_text('{"program": "compare --suite"}')
        else:
            (out / content).parent.mkdir(exist_ok=True)
            (out / content).write_text("mine")
    Path(shutil.copytree(finished, tmp_path / "comparison"))
    before = contents(tmp_path)
    for name, message in (
        ("foreign", "no suite wrote"),
        ("notes", "no suite wrote"),
        ("comparison", "no suite wrote"),
        ("linked", "is a link to"),
    ):
        for flags in ([], ["--force"], ["--resume"]):
            command = ["compare", "--suite", "cpu", "--only", "digits", "--out", str(tmp_path / name), *flags]
            assert cli.main(command) == 2
            assert message in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_suite_refuses_unknown_workloads_and_names_the_known(tmp_path, capsys):
    assert cli.main(["compare", "--suite", "cpu", "--only", "imagenet", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "imagenet" in error
    assert "digits" in error


def test_ctrl_c_stops_a_suite_and_leaves_partial_results_that_a_resume_finishes(tmp_path):
    out = tmp_path / "cpu"
    command = [sys.executable, "-m", "earlysift", "compare", "--suite", "cpu", "--only", "digits", "--out", str(out)]
    command += [*SIZE, "--seeds", "1", "--budget", "2", "--jobs", "2", "--arms", "uniform", "exact"]
    process = started(command, stderr=subprocess.STDOUT)
    wait_until(process, (out / "digits" / "ledgers" / "exact-seed0.jsonl").exists)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130, output
    assert "digits: stopped" in output
    assert results_of(out / "digits")["complete"] is False
    assert cli.main([*command[3:], "--resume"]) == 0
    assert results_of(out / "digits")["complete"] is True


@pytest.mark.parametrize("name", suite.SUITES)
def test_workloads_of_a_suite_are_settings_that_hold_and_what_is_asked_for_has_the_last_word(name):
    asked = Settings(suite=name, seeds=7, data=(Path("corpora"),), out=Path("runs"), arms=("uniform", "rs2"))
    for workload in suite.names_of(asked):
        settings = suite.workload_settings(workload, asked, {"jobs", "learning_rate"})
        assert (settings.seeds, settings.arms, settings.suite) == (7, ("uniform", "rs2"), None)
        assert settings.learning_rate == Settings().learning_rate
        assert all(Path("corpora") in path.parents for path in settings.data)
        assert settings.out == Path("runs") / workload


def test_suites_have_the_same_workloads_at_both_sizes():
    assert set(suite.SUITES["cpu"]) == set(suite.SUITES["gpu"])


def test_shared_wikitext_runs_through_the_command_line(tmp_path):
    data = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext-2"
    if not data.is_dir():
        pytest.skip("needs ../shared/data/wikitext-2")
    arguments = ["compare", "--data", str(data), "--out", str(tmp_path / "out"), *TINY]
    assert cli.main(arguments) == 0
    assert results_of(tmp_path / "out")["data"]["train_samples"] > 10_000


def test_results_page_tells_verdict_costs_and_decisions_of_committed_results(text, tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[1]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    page = importlib.import_module("results_page")
    out = tmp_path / "run"
    arguments = ["compare", "--data", str(text), "--out", str(out), *TINY, "--arms", "uniform", "sift", "free", "auto"]
    assert cli.main(arguments) == 0
    results = tmp_path / "results"
    results.mkdir()
    (results / page.README_RESULTS).write_bytes((out / "results.json").read_bytes())
    (results / "compare_old.json").write_text('{"version": 1}')
    (tmp_path / "docs").mkdir()
    (tmp_path / "README.md").write_text("before\n<!-- verdicts -->\nold\n<!-- /verdicts -->\nafter\n")
    monkeypatch.setattr(page, "ROOT", tmp_path)
    monkeypatch.setattr(page, "RESULTS", results)
    assert page.main() == 0
    told, readme = (tmp_path / "docs" / "results.md").read_text(), (tmp_path / "README.md").read_text()
    verdict = results_of(out)["verdict"]
    assert verdict in told
    assert [line.split("|")[1].strip() for line in readme.splitlines() if line.startswith("| ")][2:] == [
        "uniform",
        "auto",
    ]
    assert "old" not in readme
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    for arm in ("uniform", "SIFT", "exact loss, free (not charged)", "auto"):
        assert f"| {arm} |" in told
    assert "--layers 3 --width 32 --length 32 --vocab-size 300 --validation-samples 32 --arms uniform sift" in told
    assert " auto --budget 0.5 --batch 8 --evaluations 3" in told
    assert "read_pool" in told
    assert "seed 0 (" in told
    for line in told.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_a_diverging_comparison_ends_with_a_readable_result(tmp_path):
    out = tmp_path / "diverged"
    arguments = ["--task", "image", "--layers", "3", "--width", "32", "--budget", "0.5", "--evaluations", "3"]
    arms = ["--arms", "uniform", "sift", "auto", "ordered-sgd"]
    assert cli.main(["compare", "--out", str(out), "--learning-rate", "1e20", *arguments, *arms]) == 0
    for arm in results_of(out)["arms"].values():
        assert arm["runs"][0]["finished"] is True
        assert arm["runs"][0]["final_loss"] is None
