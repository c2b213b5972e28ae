"""Predictions of what ranks tell each other: limits that must hold, and a count of rows that really move."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from earlysift import costs, ranks, scaling
from earlysift.scaling import Link
from earlysift.seeds import seeded

FAST = Link(gb_per_s=450, latency_us=2)
SLOW = Link(gb_per_s=1.25, latency_us=50)
STEP = {"kept": 32, "keep": 0.5, "row_bytes": 2048.0}
worlds = st.integers(1, 2048)


@pytest.mark.parametrize(("world", "kept", "keep"), [(2, 4, 0.5), (8, 32, 0.5), (16, 8, 0.125), (64, 16, 0.25)])
def test_as_many_rows_move_as_random_pools_let(world, kept, keep):
    generator, candidates, repeats = seeded("scaling"), round(kept / keep), 400
    moved = 0
    for _ in range(repeats):
        chosen = torch.randperm(world * candidates, generator=generator)[: world * kept]
        holders = chosen // candidates
        moved += int((ranks.assign_rows(holders, kept, world) != holders).sum())
    assert scaling.moved_rows(kept, keep, world) == pytest.approx(moved / repeats / world, rel=0.1)


def test_gathering_moves_what_others_hold_and_a_sum_moves_it_twice():
    assert scaling.all_gather_ms(8e9, 4, Link(gb_per_s=1, latency_us=0)) == pytest.approx(6000)
    assert scaling.all_gather_ms(0, 1024, Link(gb_per_s=1, latency_us=1000)) == pytest.approx(10)
    assert scaling.all_reduce_ms(8e9, 4, SLOW) == 2 * scaling.all_gather_ms(8e9, 4, SLOW)


@given(worlds)
def test_local_selection_of_replicated_models_tells_nothing(world):
    assert sum(scaling.selection_ms(ranks=world, link=SLOW, scope="local", **STEP).values()) == 0


def test_one_rank_tells_nothing_and_its_overhead_is_the_scoring_share_of_the_step():
    told = scaling.selection_ms(ranks=1, link=SLOW, scope="global", scored_bytes=1e9, **STEP)
    assert set(told.values()) == {0.0}
    share = scaling.overhead(step_ms=90, score_ms=6, communication_ms=0, gradient_bytes=1e9, ranks=1, link=SLOW)
    assert share == pytest.approx(costs.relative_cost(1 / 3, 0.1, 0.5) - 1)  # C1: 1/3 * 0.1 / 0.5 = 6 / 90


@given(worlds, st.sampled_from(["local", "global"]), st.sampled_from([0.0, 1e8]))
def test_more_ranks_and_slower_links_never_tell_faster(world, scope, scored_bytes):
    def told(world, link):
        spent = scaling.selection_ms(ranks=world, link=link, scope=scope, scored_bytes=scored_bytes, **STEP)
        return sum(spent.values())

    assert 0 <= told(world, FAST) <= told(world + 1, FAST) <= told(world + 1, SLOW)


@given(worlds)
def test_gradients_that_wait_make_the_share_of_selection_smaller(world):
    def share(gradient_bytes):
        return scaling.overhead(
            step_ms=100, score_ms=7, communication_ms=1, gradient_bytes=gradient_bytes, ranks=world, link=SLOW
        )

    assert share(1e12) <= share(0) == pytest.approx(0.08)
    assert (share(1e12) < share(0)) == (world > 1)
