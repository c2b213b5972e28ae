"""A step by its parts: what is selected, what is judged now or later, what is learnt from."""

import dataclasses

import pytest
import torch

from earlysift import SiftConfig, planning, pools, selectors, stepping
from earlysift.judging import Unusable
from earlysift.ledger import Ledger
from earlysift.progress import COUNTS, Progress
from earlysift.runner import Runner
from models import VOCABULARY, build

NOTHING = dict.fromkeys(COUNTS, 0)


def prepared(rows=8, kept=4, *, step=0, **options):
    runner = Runner(build("bert", "masked_lm"), SiftConfig(**{"dtype": None} | options), None, None, Ledger())
    ids = torch.randint(3, VOCABULARY, (rows, 6), generator=torch.Generator().manual_seed(0))
    pool = pools.checked({"input_ids": ids, "labels": ids})
    before = Progress(step=step, kept=kept, counts=NOTHING, fidelity={}, largest=8)
    return pool, planning.plan(pool, kept, 0, before, None, runner), runner


def test_the_batch_holds_the_rows_with_the_largest_scores():
    pool, plan, runner = prepared(probe_every=0)
    scored = stepping.score(pool, plan, runner)
    chosen = stepping.select(pool, scored, plan, runner)
    assert chosen.batch is None
    assert torch.equal(chosen.selection.indices, selectors.greedy(scored.own, 4).indices)
    rows = stepping.gather(pool, chosen, runner)
    assert torch.equal(rows["input_ids"], pool.data["input_ids"][chosen.selection.indices])


def test_a_step_without_scores_draws_a_uniform_subset_by_its_own_generator():
    pool, plan, runner = prepared(score="uniform")
    assert stepping.score(pool, plan, runner) is None
    assert stepping.judge(None, plan, NOTHING) is None
    selection = stepping.select(pool, None, plan, runner).selection
    again = planning.draw(runner.config, 0, 0).own
    assert torch.equal(selection.indices, selectors.uniform_subset(8, 4, again).indices)
    assert stepping.learn(pool, None, plan, runner) == {}


def test_a_rest_is_handed_out_as_it_came():
    pool, plan, runner = prepared(rows=3, step=5)
    chosen = stepping.select(pool, None, plan, runner)
    assert chosen.batch is pool.data
    assert chosen.selection.indices.tolist() == [0, 1, 2]


def test_scores_are_judged_at_once_unless_all_rows_are_trained_on():
    pool, plan, runner = prepared(score=lambda model, pool: torch.full((8,), float("nan")), probe_every=0)
    scored = stepping.score(pool, plan, runner)
    with pytest.raises(Unusable, match="got 0 of 8 at step 0"):
        stepping.judge(scored, plan, NOTHING)
    assert stepping.judge(scored, dataclasses.replace(plan, is_partial=True), NOTHING) is None


def test_scores_are_compared_with_exact_losses_when_a_probe_is_due():
    pool, plan, runner = prepared(score="exact", probe_every=1)
    scored = stepping.score(pool, plan, runner)
    assert stepping.learn(pool, scored, plan, runner)["rank_correlation"] == 1.0
    assert stepping.learn(pool, scored, dataclasses.replace(plan, probes=False), runner) == {}
