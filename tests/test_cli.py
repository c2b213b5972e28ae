"""The command line: bad input is refused at once, whole and in words; what it prints can be read and followed."""

import io
import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from rich.console import Console

from earlysift import cli, helps
from earlysift.compare.settings import Settings
from earlysift.ledger import read_rows
from earlysift.pretrain.settings import PretrainSettings
from earlysift.report.page import read_results, write_report
from earlysift.theory.experiments import EXPERIMENTS

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
MANY = "9" * 30

BAD_FLAGS = [
    (["compare", "--width", "0"], "width must be a multiple of 32 in [32, 16384], got 0."),
    (["compare", "--width", "7"], "width must be a multiple of 32 in [32, 16384], got 7."),
    (["compare", "--width", "544"], "width must be a multiple of 64 from 512 on, got 544."),
    (["compare", "--width", MANY], "width must be a multiple of 32 in [32, 16384], got 999"),
    (["compare", "--width", "16384", "--layers", "1024"], "of width 16384 have 3,298.5 billion weights"),
    (["compare", "--layers", "0"], "layers must be in [1, 1024], got 0."),
    (["compare", "--length", "0"], "length must be in [1, 65536], got 0."),
    (["compare", "--vocab-size", "0"], "vocab_size must be in [1, 16777216], got 0."),
    (["compare", "--device", "foo"], "device must be cpu, cuda or cuda:0 to cuda:9, got 'foo'."),
    (["compare", "--device", ""], "device must be cpu, cuda or cuda:0 to cuda:9, got ''."),
    (["compare", "--keep", "1e-9"], "batch / keep is a pool of 3.2e+10 samples; expected at most 1048576"),
    (["compare", "--batch", MANY], "batch / keep is a pool of 2e+30 samples; expected at most 1048576"),
    (["compare", "--learning-rate", "nan"], "learning_rate is not a number (nan); give a finite number, more than 0."),
    (["compare", "--learning-rate", "inf"], "learning_rate is infinite (inf); give a finite number, more than 0."),
    (["compare", "--learning-rate", "0"], "learning_rate must be more than 0, got 0.0."),
    (["compare", "--budget", "nan"], "budget is not a number (nan); give a finite number, more than 0."),
    (["compare", "--target", "inf"], "target is infinite (inf); give a finite number, in (0, 1)."),
    (["compare", "--train-samples", "0"], "train_samples must be at least 1, got 0."),
    (["compare", "--max-characters", "-1"], "max_characters must be at least 1, got -1."),
    (["compare", "--validation-samples", "0"], "validation_samples must be at least 1, got 0."),
    (["compare", "--out", "a\0b"], r"out must be a path, got 'a\x00b'."),
    (["compare", "--data", "nowhere.txt"], "nowhere.txt: expected a file or folder with data"),
    (["compare", "--task", "classification", "--checkpoint", "nowhere"], "saved encoder at nowhere, found none."),
    (["compare", "--out", "note.txt"], "Expected a folder at note.txt, found a file. Choose another --out."),
    (["compare", "--out", "note.txt/run"], "note.txt, found a file. Choose another --out."),
    (["compare", "--config", "nowhere.toml"], "Expected a TOML or JSON file with settings at nowhere.toml"),
    (["compare", "--suite", "cpu", "--only", "imagenet"], "Unknown workloads ['imagenet']"),
    (["pretrain", "--steps", MANY], "steps must be in [1, 1000000000000], got 999"),
    (["pretrain", "--accumulate", MANY], "accumulate must be in [1, 1048576], got 999"),
    (["pretrain", "--seed", "-1"], "seed must be in [0, 4294967296), got -1."),
    (["pretrain", "--weight-decay", "nan"], "weight_decay is not a number (nan); give a finite number, at least 0."),
    (["pretrain", "--minutes", "nan"], "minutes is not a number (nan); give a finite number, more than 0."),
    (["pretrain", "--keep", "1e-9"], "batch / keep is a pool of 3.2e+10 samples"),
    (["pretrain", "--preset", "bert-huge"], "Unknown preset 'bert-huge'; known are bert-base"),
    (["pretrain", "--preset", "note.txt"], "Expected JSON in note.txt"),
    (["pretrain", "--tokenizer", "nowhere.txt"], "Expected a vocab.txt or tokenizer.json at nowhere.txt, found none."),
    (["pretrain", "--data", "nowhere.txt"], "nowhere.txt: expected a file or folder with data"),
    (["pretrain", "--out", "note.txt"], "Expected a folder at note.txt, found a file."),
    (["check", "nothing.json"], "found nothing at nothing.json. Download the config.json"),
    (["check", "note.txt"], "Expected JSON in note.txt"),
    (["check", "demo", "--batch", "0"], "batch must be at least 1, got 0."),
    (["check", "demo", "--keep", "1"], "keep must be in (0, 1), got 1.0."),
    (["check", "demo", "--keep", "1e-9"], "batch / keep is a pool of 3.2e+10 samples"),
    (["check", "demo", "--depths", "1", "0"], "depths[1] must be at least 1, got 0."),
    (["check", "demo", "--seconds", "nan"], "seconds is not a number (nan); give a finite number, at least 0."),
    (["check", "demo", "--labelled-fraction", "2"], "labelled_fraction must be in (0, 1], got 2.0."),
    (["check", "demo", "--seq-length", "1"], "seq_length must be at least 2, got 1."),
    (["check", "demo", "--json", "."], "Expected a file at ., found a folder. Choose another --json."),
    (["check", "demo", "--json", "note.txt/check.json"], "Expected a folder at note.txt, found a file."),
    (["report"], "Expected at least one run folder"),
    (["report", "nowhere"], "Expected the results of a comparison in nowhere/results.json"),
    (["report", ".", "--out", "."], "Expected a file at ., found a folder. Choose another --out."),
    (["theory", "nothing"], "Expected experiments among statements, greedy"),
    (["theory", "--seed", "-1"], "seed must be at least 0, got -1."),
    (["theory", "--results", "nowhere"], "Expected compare_*.json in nowhere, found none"),
    (["theory", "--out", "note.txt"], "Expected a folder at note.txt, found a file."),
]

BAD_CONFIGS = [
    ("5", "Expected settings by name in {path}, got 5."),
    ("null", "Expected settings by name in {path}, got None."),
    ("[1]", "Expected settings by name in {path}, got [1]."),
    ('"batch"', "Expected settings by name in {path}, got 'batch'."),
    ("[" * 100_000, "{path} is not a JSON file of settings: it is nested too deeply."),
    ('{"batch": ' * 100_000, "{path} is not a JSON file of settings: it is nested too deeply."),
    ("", "{path} is not a JSON file"),
    ('{"batch": "many"}', "{path}: batch must be a whole number, at least 1, got 'many'."),
    ('{"batch": 1.5}', "{path}: batch must be a whole number, at least 1, got 1.5."),
    ('{"batch": true}', "{path}: batch must be a whole number, at least 1, got True."),
    ('{"batch": []}', "{path}: batch must be a whole number, at least 1, got []."),
    ('{"batch": null}', "{path}: batch must be a whole number, at least 1, got None."),
    ('{"batch": 0, "keep": {}, "resume": "yes"}', "batch must be at least 1, got 0.\n"),
    ('{"learning_rate": NaN}', "{path}: learning_rate is not a number (nan)"),
    ('{"learning_rate": 1e999}', "{path}: learning_rate is infinite (inf)"),
    ('{"data": 5}', "{path}: data must be a list, each item a path, got 5."),
    ('{"data": ["a", 5]}', "{path}: data[1] must be a path, got 5."),
    ('{"data": {"a": 1}}', "{path}: data must be a list, each item a path, got {{'a': 1}}."),
    ('{"out": []}', "{path}: out must be a path, got []."),
    ('{"device": {}}', "{path}: device must be "),
    ('{"length": "128"}', "{path}: length must be a whole number, in [1, 65536], got '128'."),
    ('{"sed": 0}', "{path} has unknown settings ['sed']; known are "),
]


def refused(arguments, capsys):
    """What a command says that is refused."""
    assert cli.main(arguments) == cli.EXIT_BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith("earlysift: ")
    assert "Traceback" not in said
    return said


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, but for a note."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "note.txt").write_text("mine")
    yield tmp_path
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".json"] == ["note.txt"]  # refused: nothing made
    assert (tmp_path / "note.txt").read_text() == "mine"


@pytest.mark.parametrize(("arguments", "said"), BAD_FLAGS, ids=lambda case: " ".join(case)[:60])
def test_a_bad_command_line_is_refused_in_words_and_leaves_the_folder_as_it_was(arguments, said, here, capsys):
    assert said in refused(arguments, capsys)


@pytest.mark.parametrize("command", ["compare", "pretrain"])
@pytest.mark.parametrize(("content", "said"), BAD_CONFIGS, ids=lambda case: case[:30])
def test_a_config_of_another_shape_is_refused_by_its_name(command, content, said, here, capsys):
    Path("given.json").write_text(content)
    assert said.format(path="given.json") in refused([command, "--config", "given.json"], capsys)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("[1]", "Expected a mapping in bad.json, got [1]."),
        ("[" * 100_000, "Expected JSON in bad.json"),
        ('{"model_type": []}', "Expected a model_type that transformers"),
        ('{"model_type": {"a": 1}}', "Expected a model_type that transformers"),
        ('{"model_type": "bert", "hidden_size": "wide"}', "cannot build a model from the config of bad.json"),
        ('{"model_type": "bert", "architectures": 5}', "cannot build a model from the config of bad.json"),
    ],
)
@pytest.mark.parametrize("command", [["check", "bad.json"], ["pretrain", "--preset", "bad.json"]], ids=lambda c: c[0])
def test_a_model_config_of_another_shape_is_refused(command, config, said, here, capsys):
    pytest.importorskip("transformers")
    Path("bad.json").write_text(config)
    assert said in refused(command, capsys)


def test_all_problems_come_at_once_a_line_each(here, capsys):
    said = refused(["compare", "--width", "7", "--keep", "nan", "--arms", "uniform", "sfit", "--seeds", "0"], capsys)
    assert [line.removeprefix("earlysift: ").split(" ")[0] for line in said.splitlines()] == [
        *("width", "seeds", "keep", "Unknown")
    ]


@pytest.mark.parametrize("kind", [Settings, PretrainSettings, cli.Check, cli.Report, cli.Theory])
def test_every_field_of_every_command_is_held_against_its_type(kind):
    for field in fields(kind):
        needed = {"model": "demo"} if kind is cli.Check else {"runs": ()} if kind is cli.Report else {}
        with pytest.raises(ValueError, match=rf"^{field.name} must be .*, got <object"):
            kind(**{**needed, field.name: object()})


def test_a_value_that_is_no_number_is_refused_by_the_parser(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["compare", "--batch", "many"])
    assert stop.value.code == cli.EXIT_BAD_INPUT
    assert "--batch" in capsys.readouterr().err


def child(program, *arguments, folder):
    return subprocess.run(
        [sys.executable, *program, *arguments], capture_output=True, text=True, cwd=folder, check=False, timeout=120
    )


# A suite's rows are beside what runs them; the rest is refused before torch is there.
LIGHT = [
    arguments for arguments, _ in BAD_FLAGS if "--suite" not in arguments and not any("\0" in a for a in arguments)
]
WITHOUT_TORCH = """
import json, sys
from earlysift.__main__ import main
for arguments in json.load(sys.stdin):
    sys.argv[1:] = arguments
    try:
        code = main()
    except SystemExit as stop:
        code = stop.code
    heavy = {"torch", "transformers", "numpy", "matplotlib", "datasets"} & set(sys.modules)
    assert not heavy, (arguments, heavy)
    assert (code or 0) == (0 if {"--help", "--print-completion"} & set(arguments) else 2), (arguments, code)
"""
WITHOUT_PACKAGES = """
import sys
before = set(sys.modules)
from earlysift.__main__ import main
code = main()
tops = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(tops - set(sys.stdlib_module_names) - {"earlysift"}), file=sys.stderr)
sys.exit(code)
"""


def test_help_and_refusals_need_no_torch(tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    helps = [["--help"], *([name, "--help"] for name in ("compare", "pretrain", "check", "report", "theory"))]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input=json.dumps([*helps, ["--print-completion", "zsh"], *LIGHT, ["compare", "--batch", "many"], ["nothing"]]),
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("flag", ["--help", "-h", "--version"])
def test_overview_and_versions_need_no_package_at_all(flag, tmp_path):
    done = child(["-c", WITHOUT_PACKAGES], flag, folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "[]\n")
    assert done.stdout


COMPLETES = """
source <("$0" -m earlysift --print-completion bash)
COMP_WORDS=(earlysift "$@") COMP_CWORD=$#
_tyro_earlysift
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("words", "proposed"),
    [(["com"], {"compare"}), ([""], set(helps.COMMANDS)), (["check", "--max-p"], {"--max-positions"})],
)
def test_bash_completes_commands_and_flags(words, proposed):
    command = ["bash", "-c", COMPLETES, sys.executable, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - {"-h", "--help"} == proposed


REGISTERED = {"bash": "complete -F _tyro_earlysift", "zsh": "#compdef earlysift"}


@pytest.mark.parametrize("shell", helps.SHELLS)
def test_a_completion_is_printed_for_every_shell_that_the_help_names(shell, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--print-completion", shell])
    assert not stop.value.code
    script = capsys.readouterr().out
    assert REGISTERED[shell] in script
    assert all(name in script for name in helps.COMMANDS)


@pytest.mark.parametrize("rest", [[], ["ksh"], ["bash", "zsh"]])
def test_a_shell_without_completion_is_refused(rest, capsys):
    assert cli.main(["--print-completion", *rest]) == cli.EXIT_BAD_INPUT
    assert "Expected one of bash, zsh after --print-completion, got" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["compare", "--width", "7", "--force"], ["pretrain", "--seed", "-1"]])
def test_a_real_process_is_refused_in_one_line(arguments, tmp_path):
    done = child(["-m", "earlysift"], *arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (cli.EXIT_BAD_INPUT, "")
    assert re.fullmatch(r"earlysift: (width|seed) must be .*\n", done.stderr)
    assert list(tmp_path.iterdir()) == []


def test_an_unexpected_error_shows_its_traceback_asks_for_an_issue_and_exits_with_1(tmp_path):
    program = "from earlysift import cli, __main__ as m; cli._require_inputs = lambda command: 1 / 0; exit(m.main())"
    done = child(["-c", program], "report", folder=tmp_path)
    assert done.returncode == 1
    *traceback, last = done.stderr.strip().splitlines()
    assert traceback[0].startswith("Traceback")
    assert traceback[-1].startswith("ZeroDivisionError")
    assert last == (
        "earlysift: unexpected ZeroDivisionError. This is a bug: please open an issue with the lines above."
    )


def test_memory_that_runs_out_is_told_from_a_bug():
    with pytest.raises(RuntimeError) as refusal:
        torch.empty(2**55, dtype=torch.int64)
    assert cli._out_of_memory(refusal.value)
    assert cli._out_of_memory(MemoryError())
    assert not cli._out_of_memory(RuntimeError("shapes do not match"))


# What is read back


@pytest.fixture
def run_folder(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    results = json.loads((RESULTS / "compare_demo.json").read_text())
    return folder, results


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("arms",), 5, "arms should be a mapping, not 5."),
        (("arms",), [], "arms should be a mapping, not []."),
        (("arms", "sift"), [5], "arms.sift should be a mapping, not [5]."),
        (("arms", "sift", "runs"), 5, "arms.sift.runs should be a list, not 5."),
        (("arms", "sift", "runs", 0), 5, "arms.sift.runs.0 should be a mapping, not 5."),
        (("arms", "sift", "runs", 0, "seed"), "one", "arms.sift.runs.0.seed should be a whole number, not 'one'."),
        (("arms", "sift", "runs", 0, "curve"), {}, "arms.sift.runs.0.curve should be a list, not {}."),
        (("arms", "sift", "runs", 0, "curve", 0, "loss"), "low", "curve.0.loss should be a number, not 'low'."),
        (("operations_ms",), [[]], "operations_ms should be a mapping, not [[]]."),
        (("operations_ms", "train", "median"), [], "operations_ms.train.median should be a number, not []."),
        (("comparison", "sift"), 5, "comparison.sift should be a mapping, not 5."),
        (("config",), "small", "config should be a mapping, not 'small'."),
        (("verdict",), 5, "verdict should be text, not 5."),
        (("complete",), "yes", "complete should be true or false, not 'yes'."),
    ],
)
def test_results_of_another_shape_are_refused_by_file_and_place(path, value, said, run_folder, capsys):
    folder, results = run_folder
    *above, last = path
    place = results
    for step in above:
        place = place[step]
    place[last] = value
    for name in ("results.json", "compare_demo.json"):
        (folder / name).write_text(json.dumps(results))
    for arguments in (["report", str(folder)], ["theory", "payoff", "--results", str(folder)]):
        words = refused(arguments, capsys)
        assert said in words
        assert str(folder) in words
    assert {path.name for path in folder.iterdir()} == {"results.json", "compare_demo.json"}


@pytest.mark.parametrize("content", ["5", "null", "[]", '"x"', "[" * 100_000, "{", '{"version": 2, "arms": {"a": 1}}'])
def test_a_file_that_holds_no_results_is_refused_by_its_name(content, tmp_path, capsys):
    for name in ("results.json", "compare_x.json"):
        (tmp_path / name).write_text(content)
    for arguments, name in (
        (["report", str(tmp_path)], "results.json"),
        (["theory", "payoff", "--results", str(tmp_path)], "compare_x.json"),
    ):
        assert str(tmp_path / name) in refused(arguments, capsys)


def test_results_without_the_time_of_a_training_step_are_refused_before_anything_runs(run_folder, capsys):
    folder, results = run_folder
    results["operations_ms"]["train"]["median"] = 0
    (folder / "compare_x.json").write_text(json.dumps(results))
    assert "Expected the time of a training step" in refused(["theory", "--results", str(folder)], capsys)


def test_numbers_that_no_axis_holds_are_left_out(run_folder):
    folder, results = run_folder
    results["arms"]["sift"]["runs"][0]["curve"][0]["loss"] = 1e308
    results["comparison"]["sift"]["speedup"] = 10**400
    (folder / "results.json").write_text(json.dumps(results))
    assert write_report(folder).is_file()
    assert read_results(folder)["comparison"]["sift"]["speedup"] == 10**400


@pytest.mark.parametrize("line", ["5", "null", "[]", "{}", '{"step": "x"}', '{"step"', "[" * 100_000, "\udcff"])
def test_a_ledger_of_another_shape_is_refused_by_file_and_line(line, tmp_path):
    path = tmp_path / "ledger.jsonl"
    path.write_text(f'{{"step": 0}}\n{line}\n{{"step": 1}}\n', errors="surrogateescape")
    with pytest.raises(ValueError, match="Expected") as refusal:
        read_rows(path)
    assert f"line 2 of {path}" in str(refusal.value)


# What is printed


def test_report_goes_where_it_is_told(run_folder, tmp_path, capsys):
    folder, results = run_folder
    (folder / "results.json").write_text(json.dumps(results))
    assert cli.main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_bytes()
    (folder / "report.html").unlink()
    out = tmp_path / "new" / "page.html"
    assert cli.main(["report", str(folder), "--out", str(out)]) == 0
    assert out.read_bytes() == page
    assert not (folder / "report.html").exists()
    assert capsys.readouterr().out.splitlines()[-1] == str(out)


def check_numbers():
    entry = {"flops": 4.2e11, "ms": 12345.6, "memory_bytes": 2**33}
    score = {**entry, "ratio": 0.153, "cost_by_flops": 1.131, "break_even_gain": 1.153, "exact": False, "depth": 12}
    return {
        "model": {"class": "BertForMaskedLM", "task": "masked_lm", "layers": 12, "parameters": 110_000_000},
        "shape": {"batch": 32, "pool": 64, "seq_length": 128, "labels_per_sample": 19.0},
        "machine": {
            "device": "Some Processor of 3.1 GHz",
            "threads": 2,
            "training_dtype": "float32",
            "scoring_dtype": "float32",
            "memory_measure": "torch.profiler on torch's CPU allocator",
        },
        "rounds": 3,
        "train": entry,
        "scores": [score, {**score, "exact": True}],
    }


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_of_check_is_whole_at_this_width(width):
    file = io.StringIO()
    cli._print_check(Console(file=file, width=width), check_numbers())
    printed = file.getvalue()
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= width
    (row,) = [line for line in printed.splitlines() if "full model" in line]
    assert re.findall(r"[\d.,]+%?", row) == ["1.153", "1.131", "15.3%", "12,345.6", "420.00", "8,192.0"]
    heads = printed[: printed.index("full model")]
    assert all(word in heads for word in ("break-even", "gain", "FLOPs", "GFLOPs", "MiB"))


def test_without_a_terminal_a_line_tells_of_every_quarter(capsys):
    with cli._progress(Console()) as show:
        for share in (0.0, 0.1, 0.25, 0.3, 0.9, 1.0, 1.0):
            show("read [data]", share)
    assert capsys.readouterr().out.splitlines() == [
        *("read [data]: 0%", "read [data]: 25%", "read [data]: 90%", "read [data]: 100%")
    ]


def test_on_a_terminal_bars_show_no_time_of_another_arm():
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100, color_system=None)
    with cli._progress(console) as show:
        show("uniform", 0.5)
        show("SIFT", 0.25)
    last = file.getvalue().split("uniform")[-1]
    assert "SIFT" in last
    assert "25%" in last
    bars = [line for line in last.splitlines() if "%" in line]
    assert [len(re.findall(r"[\d-]:[\d-]{2}:[\d-]{2}", bar)) for bar in bars] == [1, 1]  # the time that remains


@pytest.mark.parametrize("command", ["compare", "pretrain", "check", "report", "theory"])
def test_help_of_every_command_has_examples(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "Examples:" in printed
    assert printed.count(f"earlysift {command}") >= 3
    assert "Annotated" not in printed
    assert "FieldInfo" not in printed


def test_experiments_are_functions_of_their_modules():
    from importlib import import_module

    for name, module in EXPERIMENTS.items():
        assert callable(getattr(import_module(f"earlysift.theory.{module}"), name))


def test_a_suite_ends_with_a_sentence_on_the_fastest_arm_that_is_charged_or_the_overall_one():
    def results(**speedups):
        comparison = {arm: {"speedup": speedup, "verdict": f"on {arm}"} for arm, speedup in speedups.items()}
        arms = {arm: {"charged": arm != "free"} for arm in comparison}
        return {"comparison": comparison, "arms": arms, "verdict": "overall"}

    assert cli._headline(results(sift=0.9, memory=1.3, auto=1.1, free=2.0)) == "on memory"
    assert cli._headline(results(sift=0.9, auto=1.0, free=2.0)) == cli._headline(results(sift=None)) == "overall"
