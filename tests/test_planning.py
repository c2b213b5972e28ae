"""Plans: derived from seed, step, micro-step and rank alone, and complete before anything is scored."""

import pytest
import torch

from earlysift import SiftConfig, planning, pools, selectors, warmup
from earlysift.control import Choice, Control
from earlysift.controller import State
from earlysift.ledger import Ledger
from earlysift.progress import Progress
from earlysift.runner import Runner
from models import VOCABULARY, build


def plan_of(rows=8, kept=4, *, step=0, choice=None, **options):
    config = SiftConfig(**options)
    runner = Runner(build("bert", "masked_lm"), config, None, None, Ledger())
    ids = torch.randint(3, VOCABULARY, (rows, 6), generator=torch.Generator().manual_seed(0))
    state = State(choice, next_probe=100) if config.mode == "auto" else None
    before = Progress(step=step, kept=kept, counts={}, fidelity={}, largest=8, steering=state)
    control = Control() if config.mode == "auto" else None
    return planning.plan(pools.checked({"input_ids": ids, "labels": ids}), kept, 0, before, control, runner)


def test_draws_depend_on_seed_step_and_micro_step_alone():
    def numbers(seed, step, micro_step):
        draws = planning.draw(SiftConfig(seed=seed), step, micro_step)
        return torch.rand(3, generator=draws.own).tolist()

    assert numbers(0, 1, 0) == numbers(0, 1, 0)
    assert len({tuple(numbers(*place)) for place in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]}) == 4


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_as_many_steps_select_as_the_schedule_says(share):
    config = SiftConfig(schedule=lambda step: share)
    selects = [planning.draw(config, step, 0).selects for step in range(400)]
    assert sum(selects) / 400 == pytest.approx(share, abs=0.07)


def test_micro_steps_of_a_step_select_together():
    config = SiftConfig(schedule=lambda step: 0.5)
    for step in range(20):
        assert len({planning.draw(config, step, micro_step).selects for micro_step in range(4)}) == 1


def test_a_selecting_step_scores_all_candidates_at_the_configured_exit():
    plan = plan_of(depth=2, probe_every=0)
    assert (plan.selects, plan.select, plan.depth, plan.considered, plan.rows) == (True, selectors.greedy, 2, 8, 8)
    assert plan.approximation.depth == 2
    assert not plan.probes


def test_a_step_that_neither_selects_nor_probes_scores_nothing():
    assert plan_of(schedule=warmup(5), probe_every=0).approximation is None
    assert plan_of(schedule=warmup(5), probe_every=1).approximation is not None


def test_a_rest_is_trained_on_whole_and_not_scored():
    plan = plan_of(rows=3, step=5)
    assert plan.is_partial
    assert plan.approximation is None


def test_auto_mode_replaces_rule_exit_and_keep():
    plan = plan_of(mode="auto", choice=Choice("unbiased", 3, 0.8))
    assert (plan.select, plan.depth, plan.considered, plan.rows) == (selectors.proportional, 3, 5, 5)
    assert plan.approximation.depth == 3
    assert (plan.steering.choice, plan.row) == (Choice("unbiased", 3, 0.8), {"mode": "unbiased"})
    off = plan_of(mode="auto")
    assert (off.selects, off.approximation, off.row) == (False, None, {"mode": "off"})


@pytest.mark.parametrize(("keep", "considered"), [(0.5, 8), (0.65, 6), (0.8, 5), (1.0, 4)])
def test_keep_by_a_schedule_limits_the_candidates_and_never_the_batch(keep, considered):
    plan = plan_of(keep_schedule=lambda step: keep if step == 3 else 0.9, step=3, probe_every=0)
    assert (plan.kept, plan.considered, plan.rows, plan.selects) == (4, considered, considered, True)
    short = plan_of(rows=5, keep_schedule=lambda step: keep, probe_every=0)
    assert short.considered == min(considered, 5)
