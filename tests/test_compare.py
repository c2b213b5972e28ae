"""`earlysift compare` end to end, on tiny models and real text, through the real command line."""

import html
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from earlysift import cli
from earlysift.compare.arms import ARMS
from earlysift.compare.settings import Settings, from_file
from earlysift.compare.trial import learning_rate_factor

TINY = [
    *("--budget", "1.5", "--evaluations", "3", "--validation-blocks", "32", "--batch", "8"),
    *("--layers", "3", "--width", "32", "--length", "32", "--vocab-size", "300"),
]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    words = ["the", "model", "reads", "a", "pool", "of", "samples", "and", "keeps", "those", "that", "matter", "most"]
    paragraphs = (" ".join(words[(i * j) % len(words)] for j in range(60)) for i in range(1, 900))
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")
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
    assert names == {"config.json", "results.json", "ledgers", "curves.png", "report.html"}
    assert {path.name for path in (finished / "ledgers").iterdir()} == {
        f"{arm}-seed{seed}.jsonl" for arm in ARMS for seed in range(2)
    }
    assert results_of(finished)["complete"] is True
    assert html.escape(results_of(finished)["verdict"]) in (finished / "report.html").read_text()


def test_every_arm_spends_the_same_budget_of_reference_time(finished):
    for arm in results_of(finished)["arms"].values():
        spent_s = arm["steps"] * arm["step_cost_ms"] / 1e3
        assert 1.5 - arm["step_cost_ms"] / 1e3 <= spent_s <= 1.5
        for run in arm["runs"]:
            assert run["curve"][-1]["step"] == arm["steps"]


def test_step_cost_is_the_sum_of_the_medians_of_its_operations(finished):
    results = results_of(finished)
    for name, arm in results["arms"].items():
        medians = [results["operations_ms"][operation]["median"] for operation in ARMS[name].operations]
        assert arm["step_cost_ms"] == pytest.approx(sum(medians))


def test_arms_of_a_seed_start_from_the_same_weights(finished):
    arms = results_of(finished)["arms"].values()
    for seed in range(2):
        assert len({arm["runs"][seed]["curve"][0]["loss"] for arm in arms}) == 1
    assert len({arm["runs"][seed]["curve"][0]["loss"] for arm in arms for seed in range(2)}) == 2


def test_ledger_counts_what_each_arm_read_scored_and_trained(finished):
    for name, pool in (("uniform", 8), ("sift", 16), ("exact", 16)):
        rows = ledger_of(finished, name)
        assert [row["step"] for row in rows] == list(range(results_of(finished)["arms"][name]["steps"]))
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


def test_learning_rate_decays_to_zero_at_the_last_step_for_any_number_of_steps():
    for steps in (2, 3, 10, 999):
        factors = [learning_rate_factor(step, steps, 0.1) for step in range(steps + 1)]
        assert max(factors) == 1.0
        assert factors[-1] == 0.0
        assert all(0 < factor <= 1 for factor in factors[:-1])


def test_same_seed_and_costs_give_the_same_curves(finished, text, tmp_path):
    # Calibration differs between runs, so the second run is resumed from the first one's calibration.
    again = tmp_path / "again"
    again.mkdir()
    results = results_of(finished)
    for arm in results["arms"].values():
        arm["runs"] = []
    (again / "results.json").write_text(json.dumps(results))
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


def test_ctrl_c_leaves_a_readable_partial_result_and_resume_finishes_it(text, tmp_path):
    out = tmp_path / "cut"
    command = [sys.executable, "-m", "earlysift", "compare", "--data", str(text), "--out", str(out), *TINY]
    command[command.index("--budget") + 1] = "6"
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (out / "ledgers" / "exact-seed0.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "partial" in output
    partial = results_of(out)
    assert partial["complete"] is False
    assert partial["verdict"].startswith("No verdict")
    assert partial["arms"]["uniform"]["runs"][0]["curve"]
    assert "report.html" in {path.name for path in out.iterdir()}
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert results_of(out)["complete"] is True


def test_force_with_data_that_cannot_be_read_keeps_the_earlier_run(finished, tmp_path, capsys):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    missing = str(tmp_path / "typo.txt")
    assert cli.main(["compare", "--data", missing, "--out", str(finished), "--force", *TINY]) == 2
    assert "typo.txt" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_force_replaces_the_earlier_run_and_leaves_other_files(finished, text, tmp_path):
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(finished), str(copy)], check=True)
    (copy / "notes.txt").write_text("mine")
    arguments = ["compare", "--data", str(text), "--out", str(copy), "--force", *TINY]
    assert cli.main([*arguments, "--arms", "uniform", "sift"]) == 0
    assert set(results_of(copy)["arms"]) == {"uniform", "sift"}
    assert {path.name for path in (copy / "ledgers").iterdir()} == {"uniform-seed0.jsonl", "sift-seed0.jsonl"}
    assert (copy / "notes.txt").read_text() == "mine"


def test_missing_data_is_one_clear_line_and_exit_code_2(tmp_path, capsys):
    code = cli.main(["compare", "--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"), *TINY])
    error = capsys.readouterr().err
    assert code == 2
    assert "nowhere" in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep": 0.0}, "keep must be in (0, 1]"),
        ({"keep": 1.5}, "keep must be in (0, 1]"),
        ({"depth": 12}, "depth must be in 1..11"),
        ({"depth": 0}, "depth must be in 1..11"),
        ({"seeds": 0}, "seeds must be at least 1"),
        ({"budget": 0.0}, "budget must be more than 0"),
        ({"target": 1.5}, "between 0 and 1"),
        ({"arms": ("uniform", "magic")}, "Unknown arms ['magic']"),
        ({"arms": ("sift",)}, "'uniform' is needed"),
        ({"evaluations": 1}, "evaluations must be at least 2"),
        ({"resume": True, "force": True}, "Choose one of resume and force"),
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
    path.write_text('keep = 0.25\ndepth = 2\narms = ["uniform", "sift"]\n')
    assert (from_file(path).keep, from_file(path).depth) == (0.25, 2)
    command = cli._parse(["compare", "--config", str(path), "--depth", "3"])
    assert (command.keep, command.depth, command.arms) == (0.25, 3, ("uniform", "sift"))


def test_config_of_a_run_folder_gives_the_same_settings_again(finished):
    again = from_file(finished / "config.json")
    assert json.loads(json.dumps(again.identity())) == results_of(finished)["config"]


@pytest.mark.parametrize(
    ("content", "message"),
    [("keep = ", "is not a TOML file"), ("keeep = 0.5", "unknown settings ['keeep']")],
)
def test_bad_config_files_are_refused_with_a_way_out(tmp_path, content, message):
    path = tmp_path / "settings.toml"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        from_file(path)
    with pytest.raises(FileNotFoundError, match="found none"):
        from_file(tmp_path / "none.toml")


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


def test_flags_of_the_command_line_are_a_frozen_list(capsys):
    with pytest.raises(SystemExit):
        cli.main(["compare", "--help"])
    shown = {word.rstrip(",") for word in capsys.readouterr().out.split() if word.startswith("--") and len(word) > 2}
    named = {f"--{name.replace('_', '-')}" for name in Settings.__dataclass_fields__}
    assert named == {
        *("--data", "--out", "--arms", "--seeds", "--budget", "--target", "--keep", "--depth", "--batch", "--layers"),
        *("--width", "--length", "--vocab-size", "--learning-rate", "--warmup", "--validation-blocks"),
        *("--evaluations", "--resume", "--force", "--config"),
    }
    assert named <= shown


def test_shared_wikitext_runs_through_the_command_line(tmp_path):
    data = Path(__file__).resolve().parents[2] / "shared" / "data" / "wikitext-2"
    if not data.is_dir():
        pytest.skip("needs ../shared/data/wikitext-2")
    arguments = ["compare", "--data", str(data), "--out", str(tmp_path / "out"), *TINY]
    assert cli.main(arguments) == 0
    assert results_of(tmp_path / "out")["data"]["validation_blocks"] > 100
