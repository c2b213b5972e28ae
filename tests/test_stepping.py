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


def test_candidates_that_the_kept_stand_for_are_known_for_every_way_to_choose():
    for options, expected in [
        ({"explore": 0.5}, [1.0, 1.0, 3.0, 3.0]),  # two are chosen, and two of the six others drawn
        ({"score": "uniform"}, [2.0] * 4),
        ({}, None),  # of others than the kept nothing is known
    ]:
        pool, plan, runner = prepared(probe_every=0, **options)
        chosen = stepping.select(pool, stepping.score(pool, plan, runner), plan, runner)
        assert chosen.stands_for is expected or sorted(chosen.stands_for.tolist()) == expected
    pool, plan, runner = prepared(probe_every=0, select=selectors.proportional)
    scored = stepping.score(pool, plan, runner)
    chosen = stepping.select(pool, scored, plan, runner)
    included = selectors.inclusion_probabilities(scored.own, 4)[chosen.selection.indices]
    torch.testing.assert_close(chosen.stands_for.double(), 1 / included, rtol=1e-5, atol=0)
    rest, rest_plan, rest_runner = prepared(rows=3, step=5)
    assert stepping.select(rest, None, rest_plan, rest_runner).stands_for.tolist() == [1.0] * 3


def test_a_batch_is_remembered_with_its_scores_and_ids():
    pool, plan, runner = prepared(probe_every=0, score="blend")
    pool = dataclasses.replace(pool, ids=torch.arange(100, 108))
    scored = stepping.score(pool, plan, runner)
    chosen = stepping.select(pool, scored, plan, runner)
    kept, indices = stepping.remember(pool, scored, chosen, 7, runner), chosen.selection.indices
    assert (kept.step, kept.ids.tolist()) == (7, (indices + 100).tolist())
    assert torch.equal(kept.scores, scored.own[indices])
    assert torch.equal(kept.stands_for, chosen.stands_for)
    assert torch.equal(kept.inputs, runner.learnt.blend.latest[indices])
    unscored = stepping.remember(pool, None, chosen, 7, runner)
    assert (unscored.scores, unscored.inputs) == (None, None)


def test_a_probe_learns_once_a_step_from_a_batch_that_was_chosen():
    pool, plan, runner = prepared(probe_every=0, score="probe")
    scored = stepping.score(pool, plan, runner)
    before = runner.learnt.probes[1].state_dict()["module"]["norm.weight"]
    stepping.learn(pool, scored, plan, runner)
    after = runner.learnt.probes[1].state_dict()
    assert not torch.equal(after["module"]["norm.weight"], before)
    stepping.learn(pool, scored, plan, runner)  # nothing was scored since
    assert torch.equal(runner.learnt.probes[1].state_dict()["module"]["norm.weight"], after["module"]["norm.weight"])
