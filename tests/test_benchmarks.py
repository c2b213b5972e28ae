"""Benchmarks run at smoke size, go on where they were cut, and measure what they say."""

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from earlysift import Sifter, costs, exits, pending, pools, scorers
from earlysift.anatomy import find_anatomy

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
SHAPES = ["bert-mini-128", "gpt2-small-512", "vit-small-224"]  # one of each task


@pytest.fixture(scope="module")
def modules():
    """Modules of benchmarks/, by name."""
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module
    sys.path.remove(str(BENCHMARKS))


def run(out, *arguments):
    command = [sys.executable, str(BENCHMARKS / "run.py"), *arguments, "--smoke", "--out", str(out)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(out / "cache")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder with results of all shapes that one process measures."""
    out = tmp_path_factory.mktemp("results")
    run(out, "step", "score", "select", "memory", "--shape", *SHAPES, "--dtype", "float32")
    return out


def result(folder, name):
    return json.loads(next(folder.glob(f"{name}_*.json")).read_text())


def test_every_entry_says_where_with_what_and_when_it_was_measured(measured):
    for name in ("step", "score", "select", "memory"):
        entries = result(measured, name)["entries"]
        assert list(entries) == [f"{shape}, b 4, float32" for shape in SHAPES]
        for entry in entries.values():
            assert {"date", "hardware", "threads", "versions", "commit", "rows"} <= entry.keys()


def test_what_is_in_the_file_is_not_measured_again_and_the_rest_is(measured, tmp_path):
    path = tmp_path / next(measured.glob("step_*.json")).name
    kept = result(measured, "step")
    del kept["entries"][f"{SHAPES[1]}, b 4, float32"]
    path.write_text(json.dumps(kept))
    said = run(tmp_path, "step", "--shape", *SHAPES[:2], "--dtype", "float32")
    assert said.count("already") == 1
    entries = json.loads(path.read_text())["entries"]
    assert entries.keys() == result(measured, "step")["entries"].keys()
    assert entries.items() > kept["entries"].items()


def test_our_loss_is_the_models_own_to_rounding(measured):
    for entry in result(measured, "step")["entries"].values():
        assert entry["rows"][0]["loss_difference"] < 1e-5


def test_scoring_stands_beside_its_roof_and_what_others_do(measured):
    for entry in result(measured, "score")["entries"].values():
        rows = {row["operation"]: row for row in entry["rows"]}
        assert rows["train step"]["to_step"] == 1
        for depth in (1, 2, 3):
            ours = rows[f"score, depth {depth}"]
            assert {"to_roof", "stock_ratio", "dense_exact_ratio"} <= ours.keys()
            assert ours["predicted"] == rows[f"roof, depth {depth}"]["predicted"] < rows["exact loss"]["predicted"]


def test_scores_that_learn_are_timed_with_what_they_learn(measured):
    for entry in result(measured, "score")["entries"].values():
        rows = {row["operation"]: row for row in entry["rows"]}
        probe, blend, memory = (rows[f"score, {name}"] for name in ("depth 1, probe", "depth 1, blend", "memory"))
        assert (
            probe["predicted"] == blend["predicted"] == rows["score, depth 1"]["predicted"] > memory["predicted"] == 0
        )
        assert probe["training"] > 0
        assert "above_exit" in blend
    for name in ("select", "memory"):
        for entry in result(measured, name)["entries"].values():
            assert [row["score"] for row in entry["rows"]] == ["loss", "probe", "memory", "blend"]
    for entry in result(measured, "select")["entries"].values():
        assert [row["exit_ms"] > 0 for row in entry["rows"]] == [False, True, False, True]
        for row in entry["rows"]:
            assert row["selection_ms"] < row["sift_ms"]


@pytest.mark.parametrize("name", SHAPES)
def test_a_timed_probe_learns_what_a_probe_learns(modules, name):
    shapes, bench = modules("shapes"), modules("bench_score")
    shape = shapes.tiny(shapes.SHAPES[name])
    model = shapes.build(shape)
    pool = shapes.pool(model, shape, 8, torch.device("cpu"))
    timed = bench.Learning(model, scorers.probe(1), pool, 4, {"dtype": None})
    sifter = Sifter(model, keep=0.5, score="probe", probe_every=0, dtype=None)
    for number in range(2):
        spent_ms = bench.measuring.timed_ms(timed)
        sifter.sift(pool)
        ours, theirs = timed.probe.state_dict()["module"], sifter.state_dict()["probe_1"]["module"]
        assert all(torch.equal(ours[part], theirs[part]) for part in theirs)
        assert len(timed.training_ms) == number + 1
        assert 0 < timed.training_ms[-1] < spent_ms


def test_targets_are_judged_by_every_result_that_has_their_number(modules, measured, tmp_path):
    targets = modules("targets")
    section = targets.targets_section(measured)
    assert section.count("\n| blend above its exit, of a step | cpu | at most 0.01 | ") == 1
    older = result(measured, "score")
    for entry in older["entries"].values():
        entry["rows"] = [row for row in entry["rows"] if not row["operation"].endswith(("probe", "blend", "memory"))]
    (tmp_path / "score_cpu.json").write_text(json.dumps(older))
    assert [line for line in targets.targets_section(tmp_path).splitlines() if "blend" in line] == []
    assert "scoring 2b at depth 1" not in section  # of bert-base alone, which was not measured


def test_a_table_has_no_column_that_nothing_was_measured_for(modules):
    tables = modules("measuring").tables
    columns = {"rows": {"score": ("score", "{}"), "ms": ("ms", "{:.1f}")}}
    older, newer = {"rows": [{"ms": 1.0}]}, {"rows": [{"score": "blend", "ms": 2.0}]}
    assert tables(columns, {"old": older}).splitlines() == ["| shape | ms |", "| --- | --- |", "| old | 1.0 |"]
    assert tables(columns, {"old": older, "new": newer}).splitlines()[2:] == [
        "| old |  | 1.0 |",
        "| new | blend | 2.0 |",
    ]


def test_every_result_becomes_a_section_with_its_picture(modules, measured, tmp_path):
    sections = modules("sections").benchmark_sections(measured, tmp_path)
    assert len(sections) == 4
    score = next(text for text in sections if "## Cost of scoring" in text)
    assert score.count("| score, depth 1 |") == len(SHAPES)
    assert [path.name for path in tmp_path.iterdir()] == [f"bench_{next(measured.glob('score_*')).stem}.png"]
    assert f"]({next(tmp_path.iterdir()).name})" in score


def test_results_of_a_gpu_have_sections_of_their_own_with_their_arguments(modules, measured, tmp_path):
    (entry,) = list(result(measured, "step")["entries"].values())[:1]
    for device, arguments in (("cpu", []), ("cuda", ["--tokenizer", "/tmp/vocab.txt", "--every", "300"])):
        entries = {"one": entry | ({"arguments": arguments} if arguments else {})}
        (tmp_path / f"step_{device}.json").write_text(json.dumps({"benchmark": "step", "entries": entries}))
    cpu, gpu = modules("sections").benchmark_sections(tmp_path, tmp_path)
    assert "## Training step, ours and the model's own\n" in cpu
    assert "## Training step, ours and the model's own, on a GPU\n" in gpu
    assert gpu.endswith("; `--tokenizer vocab.txt --every 300`.\n")
    assert "`." not in cpu.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch keeps a GPU's memory by itself")
def test_memory_is_measured_as_it_comes_and_kept_in_processes_of_their_own(tmp_path):
    run(tmp_path, "pages", "--shape", "bert-mini-128", "--dtype", "float32")
    (entry,) = result(tmp_path, "pages")["entries"].values()
    first, *others = entry["rows"]
    assert [first["step_ratio"], first["sift_ratio"], first["peak_ratio"]] == [1, 1, 1]
    assert [row["memory"] for row in others] == ["huge pages", "huge pages, kept"]
    assert all(row["step_ms"] > 0 and row["sift_ms"] > 0 and row["peak_mib"] > 100 for row in entry["rows"])


def test_overhead_is_measured_and_predicted_at_every_point(modules, tmp_path):
    run(tmp_path, "scale", "--shape", "bert-mini-128", "--dtype", "float32")
    (entry,) = result(tmp_path, "scale")["entries"].values()
    assert {row["varied"] for row in entry["rows"]} == {
        *("depth", "keep", "pool", "length", "vocabulary", "batch", "processes")
    }
    assert {"1", "2, local", "2, global"} <= {row["value"] for row in entry["rows"]}
    several = [row for row in entry["rows"] if row["value"] in ("2, local", "2, global")]
    assert all(row["gb_per_s"] > 0 and row["latency_us"] > 0 for row in several)
    assert all("gb_per_s" not in row for row in entry["rows"] if row not in several)
    by_depth = [row["predicted"] for row in entry["rows"] if row["varied"] == "depth"]
    assert by_depth == sorted(by_depth)
    docs = tmp_path / "docs"
    docs.mkdir()
    (section,) = modules("sections").benchmark_sections(tmp_path, docs)
    assert "| processes | 2, global |" in section
    assert len(list(docs.iterdir())) == 1


@pytest.mark.parametrize("scope", ["local", "global"])
def test_overhead_on_several_processes_is_predicted_by_one_and_their_link(modules, scope):
    shapes, bench = modules("shapes"), modules("bench_scale")
    shape = shapes.tiny(shapes.SHAPES["bert-mini-128"])
    point = bench.Point(shape, 2 * shape.batch, "float32", rounds=1, processes=2)
    alone = {"step_ms": 100.0, "overhead": 0.07}

    def foretold(gb_per_s, latency_us):
        return bench._predicted(point, scope, alone, bench.Link(gb_per_s, latency_us))

    assert foretold(1e9, 0.0) == pytest.approx(0.07)
    assert (foretold(1e9, 1e3) > foretold(1e9, 0.0)) == (scope == "global")  # scores and rows
    assert foretold(1e-4, 0.0) < 0.07  # gradients are waited for, with selection and without


def test_training_is_killed_resumed_and_put_into_one_table(tmp_path):
    run(tmp_path, "train")
    (entry,) = result(tmp_path, "train")["entries"].values()
    assert [row["arm"] for row in entry["arms"]] == ["uniform", "sift"]
    assert all(row["peak_mib"] > 0 and 0 < row["wait_share"] < 1 for row in entry["arms"])
    sift = entry["arms"][1]
    assert 0 < sift["resumed_from_step"] <= sift["killed_at_step"] < sift["steps"]
    assert {f"score, depth {depth}" for depth in (1, 2, 3)} < {row["operation"] for row in entry["scoring"]}


@pytest.mark.parametrize("name", SHAPES)
def test_the_roof_makes_the_products_of_scoring_and_no_other(modules, name):
    shapes, bench = modules("shapes"), modules("bench_score")
    shape = shapes.tiny(shapes.SHAPES[name])
    model = shapes.build(shape)
    pool = shapes.pool(model, shape, 8, torch.device("cpu"))
    again = bench.roof(model, pool, None, depth=2)
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # which torch does not count
    counts = {attention: lambda query, key, value, *_, **__: sdpa_flop_count(query, key, value)}
    with FlopCounterMode(display=False, custom_mapping=counts) as counted:
        again()
    anatomy = find_anatomy(model)
    law = costs.flops_law(anatomy, 2, skips_unlabelled=exits.skips_unlabelled(model, anatomy, None))
    predicted = costs.batch_work(anatomy, pool, "score", law)["score_flops"]
    class_tokens = 2 * 8 * 3 * 16**2 * 32 if name == "vit-small-224" else 0  # costs takes them for patches
    assert counted.get_total_flops() == predicted - class_tokens


@pytest.mark.parametrize("name", SHAPES)
def test_scores_by_all_logits_are_the_exact_losses(modules, name):
    shapes, bench = modules("shapes"), modules("bench_score")
    shape = shapes.tiny(shapes.SHAPES[name])
    model = shapes.build(shape)
    anatomy, pool = find_anatomy(model), shapes.pool(model, shape, 8, torch.device("cpu"))
    options = {"chunk_rows": 3, "dtype": None}
    dense = bench._dense_scores(model, anatomy, pool, logits_of=bench._own_logits, **options)
    torch.testing.assert_close(dense, scorers.exact_loss(model, pool, **options))


def test_waits_are_what_the_host_asks_of_the_device(modules):
    bench = modules("bench_select")
    place, values = torch.device("cpu"), torch.arange(4.0)
    with bench.Waits(place) as waits, bench.Lists(waits):
        values.sum().item()
        bool((values > 1).any())
        values[values > 1]
        values.tolist()
        values[torch.tensor([0, 1])] + values.sum()  # none of these
        torch.rand((), generator=torch.Generator()).item()
    counts = {}
    for (operation, *_), count in waits.found.items():
        counts[operation] = counts.get(operation, 0) + count
    assert counts == {"aten::_local_scalar_dense": 2, "aten::index.Tensor": 1, "tolist": 1}


def test_copies_between_devices_wait_unless_they_are_told_not_to(modules):
    bench = modules("bench_select")
    values, elsewhere = torch.arange(4.0), torch.empty(4, device="meta")
    with bench.Waits(elsewhere.device) as waits:
        values.to("meta")
        elsewhere.copy_(values)
    assert sorted(operation for operation, *_ in waits.found) == ["aten::_to_copy", "aten::copy_"]
    with bench.Waits(elsewhere.device) as waits:
        values.to("meta", non_blocking=True)
        elsewhere.copy_(values, non_blocking=True)
    assert not waits.found


@pytest.mark.parametrize("max_positions", [None, 2])
@pytest.mark.parametrize("name", SHAPES)
def test_sifting_makes_the_host_wait_for_nothing_but_the_places_of_all_labels(
    modules, monkeypatch, name, max_positions
):
    shapes, bench = modules("shapes"), modules("bench_select")
    shape = shapes.tiny(shapes.SHAPES[name])
    model = shapes.build(shape)
    pool = shapes.pool(model, shape, 8, torch.device("cpu"))
    sifter = Sifter(model, keep=0.5, probe_every=0, max_positions=max_positions, dtype=None)
    sifter.sift(pool)  # which takes the model's layers one by one, once
    monkeypatch.setattr(pending, "_AT_ONCE", set())  # as on an accelerator

    def lines():
        with bench.Waits(torch.device("cpu")) as waits, bench.Lists(waits):
            sifter.sift(pool)
        asked = {place for _, _, place in waits.found}
        return {line.partition(":")[0] for line in asked if not line.startswith("transformers")}

    left = set() if name == "vit-small-224" or max_positions else {"earlysift/losses.py"}
    assert lines() <= left
    assert lines() <= left | {"earlysift/pending.py"}  # what the step before left is read


def test_waits_name_the_line_of_ours(modules):
    bench = modules("bench_select")
    mask = torch.ones(2, 3)
    mask[:, 2] = 0
    with bench.Waits(torch.device("cpu")) as waits, bench.Lists(waits):
        pools.trim_padding({"attention_mask": mask})
    assert {line.partition(":")[0] for _, line, _ in waits.found} == {"earlysift/pools.py"}


def test_training_is_skipped_with_a_reason_where_there_is_no_text(modules, monkeypatch, tmp_path, capsys):
    bench = modules("bench_train")
    elsewhere = dataclasses.replace(bench.SIZES["cpu"], texts=(tmp_path / "text.zst",))
    monkeypatch.setitem(bench.SIZES, "cpu", elsewhere)
    assert bench.plan(Namespace(size="cpu", minutes=None)) == {}
    assert f"skipped, as there is no {tmp_path / 'text.zst'}" in capsys.readouterr().out


def test_the_command_line_measures_no_shape_that_it_was_not_asked_for(modules):
    shapes = modules("shapes")
    asked = Namespace(shape=["vit-small-224"], batch=64, smoke=False)
    (shape,) = shapes.chosen(asked).values()
    assert (shape.batch, shape.length) == (64, None)


# Starting


def test_starting_is_timed_beside_python_and_torch(modules, tmp_path):
    run(tmp_path, "start")
    (entry,) = result(tmp_path, "start")["entries"].values()
    rows = {row["program"]: row for row in entry["rows"]}
    assert rows["python -c pass"]["to_python"] == rows["import torch"]["cpu_to_torch"] == 1
    assert rows.keys() == modules("bench_start").PROGRAMS.keys()
    assert all(row["ms"] > 0 and row["cpu_ms"] > 0 for row in rows.values())
    assert [row["clock"] for row in entry["above_torch"]] == ["importtime", "processor time"]
    assert all(row["above_ms"] > 0 for row in entry["above_torch"])


def test_the_clock_of_imports_counts_what_is_within_others_once(modules):
    said = """import time: self [us] | cumulative | imported package
import time:       100 |       2000 |   torch.nn
import time:      1000 |       3000 | torch
import time:        10 |         10 |   earlysift.pools
import time:       300 |        400 |   statistics
import time:       200 |        610 | earlysift.exits
import time:         5 |         50 | earlysift.sifter
import time:         5 |        900 | earlysiftish
"""
    assert modules("bench_start").imports_ms(said) == (3.0, 0.66)


# Auto on generated streams


def test_auto_is_compared_with_fixed_scores_on_the_same_stream(tmp_path):
    run(tmp_path, "auto")
    entries = result(tmp_path, "auto")["entries"]
    assert list(entries) == ["tuned on: copies"]
    rows = {row["arm"]: row for row in entries["tuned on: copies"]["arms"]}
    assert {"uniform", "probe 2, unbiased", "exact, free", "auto"} <= set(rows)
    assert (rows["uniform"]["end"], rows["uniform"]["selecting"]) == (1.0, 0.0)
    assert rows["exit 1"]["selecting"] > 0.5


def test_hazards_are_met_by_every_arm_and_drawn(modules, tmp_path):
    run(tmp_path, "hazards")
    entries = result(tmp_path, "hazards")["entries"]
    assert {entry["hazard"] for entry in entries.values()} == modules("bench_hazards").HAZARDS.keys()
    for entry in entries.values():
        rows = {row["arm"]: row for row in entry["arms"]}
        assert list(rows) == ["uniform", "greedy", "greedy, guarded", "unbiased", "auto"]
        assert (rows["uniform"]["end"], rows["uniform"]["selecting"]) == (1.0, 0.0)
        assert all(rows[name]["selecting"] > 0.5 for name in ("greedy", "greedy, guarded", "unbiased"))
        assert all(0 <= row["worst_class"] <= row["accuracy"] <= 1 for row in rows.values())
    modules("pictures").hazard_picture(entries, tmp_path / "hazards.png")
    assert (tmp_path / "hazards.png").stat().st_size > 5000


def test_a_step_is_charged_for_what_it_scored_and_probed(modules):
    bench = modules("bench_auto")
    prices = bench.prices()

    def charge(arm, **row):
        options, charged = bench.arms(stored=True)[arm]
        config = Namespace(score=options.get("score", "loss"), mode=options.get("mode", "fixed"))
        sifter = Namespace(ledger=Namespace(end=lambda: row), config=config)
        return bench._charge(sifter, charged)

    assert charge("uniform") == (1.0, False)
    exit_1 = prices["score_1"] - 4 * bench.LESSON  # without a probe that learns from four batches
    assert charge("exit 1", scored=128, depth=1) == (pytest.approx(1 + exit_1), True)
    assert charge("exit 1", scored=64, depth=1) == (pytest.approx(1 + exit_1 / 2), True)
    assert charge("probe 2", scored=128, depth=2) == (1 + prices["score_2"], True)
    assert charge("memory", scored=128, depth=1) == (1.0, True)
    assert charge("exact, free", scored=128, depth=1) == (1.0, True)
    assert charge("auto", control={}, rank_correlation=0.5) == (1 + prices["probe"], False)
    assert charge("auto", control={}) == (1.0, False)  # a look at what is free
    assert charge("auto", lesson_ms=2.0) == (1 + 3 * bench.LESSON, False)


def test_the_budget_to_a_target_is_read_between_evaluations(modules):
    bench = modules("bench_auto")
    curve = bench.Curve([0.0, 10.0, 20.0], [2.0, 1.0, 0.5], 0.0, 0.0, 0.0)
    assert [bench._first(curve, target) for target in (3.0, 1.5, 0.75)] == [0.0, 5.0, 15.0]
    assert bench._first(curve, 0.4) == float("inf")


@pytest.mark.parametrize("name", ["copies", "flipped", "imbalanced"])
def test_streams_are_what_they_are_called(modules, name):
    streams = modules("streams")
    generator = torch.Generator().manual_seed(0)
    stream = (streams.TUNED | streams.CONFIRMED)[name](generator)
    inputs, labels = stream.draw(4000, generator)
    assert (inputs.shape, labels.shape) == ((4000, streams.INPUTS), (4000,))
    if name == "copies":
        counts = inputs.unique(dim=0, return_counts=True)[1]
        assert int((counts > 1).sum()) == 64
        assert counts[counts > 1].sum() / 4000 == pytest.approx(0.9, abs=0.02)
    elif name == "flipped":
        assert (stream.spoil(labels, generator) != labels).float().mean() == pytest.approx(0.2 * 0.9, abs=0.02)
    else:
        drawn = [int((labels == label).sum()) for label in range(streams.CLASSES)]
        assert drawn[0] > 2 * drawn[5] > 0


# Workloads of the suite


def test_the_plateau_is_left_by_what_uniform_training_makes_up_of_the_way_to_a_longer_one(tmp_path):
    run(tmp_path, "plateau")
    ((name, entry),) = result(tmp_path, "plateau")["entries"].items()
    (row,) = entry["rows"]
    assert (name, row["steps"]) == ("digits", 10)
    way = row["longer"] - row["ignoring"]
    assert row["of_the_way"] == pytest.approx((row["accuracy"] - row["ignoring"]) / way if way > 0 else 0.0)
    assert 0 < row["ignoring"] < 0.5


# Soak


def test_growth_is_the_slope_behind_the_start_and_rates_are_those_of_its_beginning_and_end(modules):
    soak = modules("bench_soak")
    windows = [
        soak._Window(steps=100 * i, mib=500 + (0.2 * i if i > 10 else 40 * i), rate=900 - i) for i in range(1, 51)
    ]
    found = soak._summary(windows)
    assert found["slope"] == pytest.approx(2 * 1024)  # KiB per 1,000 steps
    assert found["error"] == pytest.approx(0, abs=1e-3)
    assert (found["steps"], found["mib"]) == (5000, 510)
    assert (found["early_rate"], found["late_rate"]) == (900 - 15.5, 900 - 45.5)
    noisy = [window._replace(mib=window.mib + i % 2) for i, window in enumerate(windows)]
    assert soak._summary(noisy)["error"] > 10


@pytest.mark.parametrize("score", ["loss", "blend", "auto"])
def test_a_soak_counts_steps_and_what_the_ledger_takes(score, modules):
    ((row,),) = modules("bench_soak").measure(score, minutes=0).values()
    assert row["steps"] == 50  # at least one in every window
    assert 50 < row["ledger_mib"] * 2**20 / row["steps"] < 1000
    assert row["mib"] > 50


# Endurance


def test_what_a_process_holds_is_compared_behind_its_start_and_at_its_end(modules):
    bench = modules("bench_endurance")
    found = bench.many_steps(200, 20)
    (row,) = found["long"]
    assert (row["steps"], row["checkpoints"]) == (200, 2)
    assert row["early_mib"] > 50
    assert abs(row["growth"]) < 0.5
    assert 50 < row["log_mib"] * 2**20 / row["steps"] < 1000
    assert "200" in modules("measuring").tables(bench.TABLES, {"many steps": found})
