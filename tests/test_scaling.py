"""Predictions of time and communication: limits that must hold, a count of moved rows, the table of docs/scaling.md."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from earlysift import costs, ranks
from earlysift.seeds import seeded

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks" / "scaling.py"
spec = importlib.util.spec_from_file_location("scaling", SCRIPT)
scaling = importlib.util.module_from_spec(spec)
spec.loader.exec_module(scaling)

FAST = scaling.Link(gb_per_s=450, latency_us=2)
SLOW = scaling.Link(gb_per_s=1.25, latency_us=50)
STEP = {"kept": 32, "keep": 0.5, "row_bytes": 2048.0}
worlds = st.integers(1, 2048)


@pytest.mark.parametrize(("world", "kept", "keep"), [(2, 4, 0.5), (8, 32, 0.5), (16, 8, 0.125), (64, 16, 0.25)])
def test_predicted_rows_move_when_pools_are_random(world, kept, keep):
    generator, candidates, repeats = seeded("scaling"), round(kept / keep), 400
    moved = 0
    for _ in range(repeats):
        chosen = torch.randperm(world * candidates, generator=generator)[: world * kept]
        holders = chosen // candidates
        moved += int((ranks.assign_rows(holders, kept, world) != holders).sum())
    assert scaling.moved_rows(kept, keep, world) == pytest.approx(moved / repeats / world, rel=0.1)


def test_an_all_gather_moves_what_others_hold_and_an_all_reduce_moves_it_twice():
    assert scaling.all_gather_ms(8e9, 4, scaling.Link(gb_per_s=1, latency_us=0)) == pytest.approx(6000)
    assert scaling.all_gather_ms(0, 1024, scaling.Link(gb_per_s=1, latency_us=1000)) == pytest.approx(10)
    assert scaling.all_reduce_ms(8e9, 4, SLOW) == 2 * scaling.all_gather_ms(8e9, 4, SLOW)


@given(worlds)
def test_local_selection_of_replicated_models_communicates_nothing(world):
    assert sum(scaling.selection_ms(ranks=world, link=SLOW, scope="local", **STEP).values()) == 0


def test_one_rank_communicates_nothing_and_its_overhead_is_the_scoring_share_of_the_step():
    spent = scaling.selection_ms(ranks=1, link=SLOW, scope="global", scored_bytes=1e9, **STEP)
    assert set(spent.values()) == {0.0}
    share = scaling.overhead(step_ms=90, score_ms=6, communication_ms=0, gradient_bytes=1e9, ranks=1, link=SLOW)
    assert share == pytest.approx(costs.relative_cost(1 / 3, 0.1, 0.5) - 1)  # C1: 1/3 * 0.1 / 0.5 = 6 / 90


@given(worlds, st.sampled_from(["local", "global"]), st.sampled_from([0.0, 1e8]))
def test_more_ranks_and_slower_links_never_communicate_faster(world, scope, scored_bytes):
    def total_ms(world, link):
        spent = scaling.selection_ms(ranks=world, link=link, scope=scope, scored_bytes=scored_bytes, **STEP)
        return sum(spent.values())

    assert 0 <= total_ms(world, FAST) <= total_ms(world + 1, FAST) <= total_ms(world + 1, SLOW)


@given(worlds)
def test_waiting_for_gradients_makes_the_share_of_selection_smaller(world):
    def share(gradient_bytes):
        return scaling.overhead(
            step_ms=100, score_ms=7, communication_ms=1, gradient_bytes=gradient_bytes, ranks=world, link=SLOW
        )

    assert share(1e12) <= share(0) == pytest.approx(0.08)
    assert (share(1e12) < share(0)) == (world > 1)


@given(per_flop=st.floats(1e-9, 1e-6), per_pass=st.floats(0, 1e3), small=st.floats(1e6, 1e9), times=st.floats(1.5, 100))
def test_two_timings_give_the_time_of_a_flop_and_of_a_pass(per_flop, per_pass, small, times):
    truth = scaling.TimeLaw(per_flop, per_pass)
    found = scaling.time_law(*((flops, truth.ms(flops)) for flops in (small, times * small)))
    for flops, passes in ((small, 1), (7 * small, 1), (small, 3)):
        assert found.ms(flops, passes) == pytest.approx(truth.ms(flops, passes), rel=1e-6)


@pytest.mark.parametrize(("small_ms", "expected"), [(50.0, (0.0, 40.0)), (5.0, (1e-8, 0.0))], ids=["no rise", "steep"])
def test_noise_makes_no_part_of_a_time_negative(small_ms, expected):
    assert scaling.time_law((1e9, small_ms), (4e9, 40.0)) == pytest.approx(expected)


def test_one_size_is_no_calibration():
    with pytest.raises(ValueError, match=r"two sizes, the smaller one first, got 1e\+09 and 1e\+09"):
        scaling.time_law((1e9, 1.0), (1e9, 2.0))


def test_the_script_prints_the_table_of_the_document_and_its_examples_run():
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shown = re.findall(r"```text\n(.*?)```", (ROOT / "docs" / "scaling.md").read_text(), flags=re.DOTALL)
    assert shown == [done.stdout]
    examples = subprocess.run(
        [sys.executable, "-m", "doctest", "-v", SCRIPT], capture_output=True, text=True, check=True
    )
    assert int(re.search(r"^(\d+) passed and 0 failed", examples.stdout, flags=re.MULTILINE)[1]) > 5
