"""The controller: measures what selection would gain, chooses only what pays, and spends little on finding out."""

import copy
import dataclasses
import functools
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlysift import controller
from earlysift.control import Choice, Control, choices
from earlysift.controller import (
    BY_HEART,
    EARLY_PROBES,
    EARLY_SHARE,
    ENOUGH,
    KEEP,
    LEAST_CORRELATION,
    LEAST_EPOCHS,
    MOVE,
    SURE,
    TAKE,
    WINDOW,
    State,
    advance,
    decide,
    next_probe,
)
from earlysift.payoffs import estimates
from earlysift.probes import record
from probing import (
    BOTH,
    CHEAP,
    CHOICE,
    FREE,
    GREEDY,
    GREEDY_BOTH,
    ONE,
    REMEMBERED,
    UNBIASED,
    easy_heavy,
    forgotten,
    plateau,
    pure_noise,
    run,
    seeded,
)

laws = settings(deadline=None, derandomize=True, database=None, max_examples=200)

NAN, INF = float("nan"), float("inf")


def test_the_same_probes_give_the_same_verdicts_and_inputs_stay_as_they_were():
    control = Control(depths=(1,))
    first, second = (run(easy_heavy, 10, control=control) for _ in range(2))
    assert first == second
    state, entry, prices = first[5].state, record(plateau(1), 32, control), dict(CHEAP)
    before = copy.deepcopy((state, entry, prices))
    advance(state, entry, prices, control, 0.5, 6)
    assert (state, entry, prices) == before


@pytest.mark.parametrize(
    ("control", "choice", "reason"),
    [
        (
            GREEDY,
            CHOICE,
            "selection pays (batches have 1.93 times the pools' loss, at cost 1.05, and depth 1 ranks with correlation "
            "1.00)",
        ),
        (
            ONE,
            UNBIASED,
            "unbiased selection pays (drawing by depth 1 makes steps 1.75 times less noisy, at cost 1.05)",
        ),
    ],
)
def test_training_starts_uniform_and_a_workload_of_learnt_samples_switches_selection_on_after_enough_probes(
    control, choice, reason
):
    verdicts = run(easy_heavy, control=control)
    assert [verdict.state.choice for verdict in verdicts[: ENOUGH - 1]] == [None] * (ENOUGH - 1)
    assert {verdict.reason for verdict in verdicts[: ENOUGH - 1]} == {"too few probes"}
    assert {verdict.state.choice for verdict in verdicts[ENOUGH - 1 :]} == {choice}
    assert verdicts[ENOUGH - 1].reason == reason


def test_nothing_is_chosen_before_enough_probes_however_well_it_pays():
    seen = easy_heavy(0)
    for count in range(1, ENOUGH):
        assert run(lambda _: seen, count, prices=FREE)[-1].state.choice is None
    assert run(lambda _: seen, ENOUGH, prices=FREE)[-1].state.choice is not None


@pytest.mark.parametrize("prices", [FREE, CHEAP])
def test_pure_noise_is_left_alone(prices):
    probes_on = sum(
        verdict.state.choice is not None
        for seed in range(12)
        for verdict in run(lambda step, seed=seed: pure_noise(1000 * seed + step), 20, control=GREEDY, prices=prices)
    )
    # Among so many looks at noise one may deceive, but not for long.
    assert probes_on <= 0.05 * 12 * 20


def test_a_plateau_is_left_alone_although_its_gain_in_loss_would_pay():
    for verdict in run(plateau, prices=FREE):
        assert verdict.state.choice is None
        assert verdict.numbers["payoff_C2.1.0.5"] > 1.2
        assert verdict.numbers["progress.1.0.5"] < 0


def test_what_pays_when_it_is_free_is_left_alone_when_scoring_costs_too_much():
    dear = {**CHEAP, "score_1": 100.0}
    assert run(easy_heavy, control=GREEDY, prices=FREE)[-1].state.choice is not None
    verdicts = run(easy_heavy, control=GREEDY, prices=dear)
    assert all(verdict.state.choice is None for verdict in verdicts)
    assert verdicts[-1].reason == "selection does not pay (batches have 1.93 times the pools' loss, at cost 2.00)"


@pytest.mark.parametrize(("rule", "payoff"), [("greedy", "payoff_C2"), ("unbiased", "payoff_T7")])
def test_the_choice_is_the_one_that_pays_most(rule, payoff):
    control = Control(depths=(1, 2, 3), keeps=(0.5, 0.67), rules=(rule,))
    generator = seeded(1)

    def make(seed):
        seen = easy_heavy(seed)
        # Depths 2 and 3 rank as the losses do, depth 1 little better than at random, depth 3 costs more.
        blurred = seen.exact + 8 * torch.rand(64, generator=generator)
        return seen._replace(scores={1: blurred, 2: seen.exact, 3: seen.exact})

    verdicts = run(make, WINDOW, control=control, prices={**CHEAP, "score_3": 60.0})
    switched = next(verdict for verdict in verdicts if verdict.state.choice)
    paying = max(choices(control), key=lambda c: switched.numbers[f"{payoff}.{c.depth}.{c.keep:g}"])
    assert switched.state.choice == paying == Choice(rule, 2, 0.5)


def test_records_outlive_switching_on_as_they_tell_scores_apart_under_any_way_of_training():
    verdicts = run(easy_heavy, WINDOW)
    at = next(i for i, verdict in enumerate(verdicts) if verdict.state.choice)
    assert len(verdicts[at].state.records) == at + 1 == ENOUGH
    assert len(verdicts[at + 1].state.records) == at + 2


def numbers_of(*, gain=2.0, variance=2.0, concentration=5.0, progress=1.0, correlation=0.9, retention=0.5, **more):
    """Numbers of choices that are fit, by memory and at depth 1, but for what is given."""
    names = {"records": ENOUGH, "loss": 1.0, "loss_error": 0.1, "concentration": concentration, "retention": retention}
    for depth in (0, 1):
        pair = f"{depth}.0.5"
        names |= {f"correlation.{depth}": correlation, f"cost.{pair}": 1.0, f"progress.{pair}": progress}
        names |= {f"payoff_C2.{pair}": gain, f"payoff_T7.{pair}": variance}
    return names | more


def without_retention(numbers):
    return {name: value for name, value in numbers.items() if name != "retention"}


def state_of(choice, *, correlation=0.9, harmed=0):
    return State(choice, ({"correlation.1": correlation},), before=(1.0, 0.1), harmed=harmed)


def risen_by(times, **changes):
    """Numbers of a loss of whole pools that has risen by so many times what is sure, since `state_of`."""
    return numbers_of(loss=1 + times * SURE * math.hypot(0.1, 0.1), **changes)


SHRINKS = ("retention", TAKE.retention, KEEP.retention, False, "large losses shrink too little when trained on")
PAYS = ("gain", TAKE.payoff, KEEP.payoff, True, "selection does not pay")


@pytest.mark.parametrize(
    ("greedy", "control", "name", "take", "keep", "falls", "reason"),
    [
        (CHOICE, GREEDY, *PAYS),
        (CHOICE, GREEDY, *SHRINKS),
        (CHOICE, GREEDY, "correlation", TAKE.correlation, KEEP.correlation, True, "depth 1 ranks"),
        (REMEMBERED, GREEDY_BOTH, *PAYS),
        (REMEMBERED, GREEDY_BOTH, *SHRINKS),
        (REMEMBERED, GREEDY_BOTH, "correlation", TAKE.correlation, KEEP.correlation, True, "memory ranks"),
    ],
)
def test_a_greedy_choice_is_taken_by_one_bound_and_kept_by_a_milder_one(
    greedy, control, name, take, keep, falls, reason
):
    better, worse = (1e-6, -1e-6) if falls else (-1e-6, 1e-6)
    for bound, now in ((take, None), (keep, greedy)):
        assert decide(state_of(now), numbers_of(**{name: bound + better}), control, 0)[0] == greedy
        choice, why = decide(state_of(now), numbers_of(**{name: bound + worse}), control, 0)
        assert choice is None
        assert reason in why


UNKNOWN = {"retention": None}
CROWDED = {"concentration": 0.9 * KEEP.room / CHOICE.keep}


@pytest.mark.parametrize("doubt", [UNKNOWN, CROWDED], ids=str)
@pytest.mark.parametrize(
    ("name", "bounds", "reason"),
    [
        ("variance", (TAKE.variance, KEEP.variance), "times less noisy, at cost 1.00 (T7)"),
        ("progress", (TAKE.progress, KEEP.progress), "do not go along the mean gradient"),
    ],
)
def test_a_greedy_choice_by_an_exit_must_be_borne_out_by_gradients_unless_large_losses_are_known_to_be_learnt(
    doubt, name, bounds, reason
):
    for bound, now in zip(bounds, (None, CHOICE), strict=True):
        for by, fit in ((1e-6, True), (-1e-6, False)):
            numbers = numbers_of(**{name: bound + by}, **doubt)
            numbers = without_retention(numbers) if numbers["retention"] is None else numbers
            choice, why = decide(state_of(now), numbers, GREEDY, 0)
            assert choice == (CHOICE if fit else None)
            assert fit or reason in why
        assert decide(state_of(now), numbers_of(**{name: -1.0}), GREEDY, 0)[0] == CHOICE


def test_an_unbiased_choice_is_taken_by_one_bound_of_its_variance_and_kept_by_a_milder_one():
    for bound, now in ((TAKE.variance, None), (KEEP.variance, UNBIASED)):
        better, worse = (without_retention(numbers_of(variance=bound + by)) for by in (1e-6, -1e-6))
        assert decide(state_of(now), better, ONE, 0)[0] == UNBIASED
        choice, why = decide(state_of(now), worse, ONE, 0)
        assert choice is None
        assert "times less noisy, at cost 1.00 (T7)" in why


def test_an_unbiased_choice_that_costs_is_taken_where_twice_its_cost_is_covered_unless_large_losses_are_learnt():
    known, unknown = numbers_of(), without_retention(numbers_of())
    for bounds, times, numbers in ((TAKE, 2.0, unknown), (TAKE, 1.0, known), (KEEP, 1.0, unknown), (KEEP, 1.0, known)):
        needed = bounds.variance + times * 0.25
        for less_noise, fit in ((needed + 1e-6, True), (needed - 1e-6, False)):
            numbers = numbers | {"payoff_T7.1.0.5": less_noise / 1.25, "cost.1.0.5": 1.25}
            assert (controller.objection(UNBIASED, numbers, bounds) == "") == fit


@pytest.mark.parametrize("now", [None, UNBIASED])
@pytest.mark.parametrize("bad", [{"correlation": -0.9}, {"retention": 1.5}, {"gain": 0.5}], ids=str)
def test_an_unbiased_choice_needs_no_correlation_no_retention_and_no_gain(bad, now):
    state, numbers = state_of(now, correlation=bad.get("correlation", 0.9)), numbers_of(**bad)
    assert decide(state, numbers, ONE, 0)[0] == UNBIASED
    assert decide(state_of(None), numbers, GREEDY, 0)[0] is None


def test_the_unbiased_rule_is_taken_and_kept_where_samples_are_weighed_alone():
    stuck = without_retention(numbers_of(progress=0.1))
    for now in (None, UNBIASED):
        assert decide(state_of(now), stuck, ONE, 0)[0] == UNBIASED
        assert decide(state_of(now), stuck, ONE, 0, weighted=False)[0] is None
        assert decide(state_of(now), numbers_of(), ONE, 0, weighted=False)[0] == CHOICE
    reason = decide(state_of(UNBIASED), stuck, ONE, 0, weighted=False)[1]
    assert reason == "the loop reads no weights, which the unbiased rule needs"


@pytest.mark.parametrize("now", [None, CHOICE, UNBIASED])
def test_unbiased_choices_go_first_where_it_is_unknown_what_becomes_of_large_losses(now):
    best = numbers_of(progress=9.0, gain=9.0, variance=TAKE.variance)
    for numbers in map(without_retention, (numbers_of(), best)):
        choice, reason = decide(state_of(now), numbers, ONE, 0)
        assert choice == UNBIASED
        assert reason.startswith("selection pays" if now == UNBIASED else "unbiased selection pays")
        assert decide(state_of(now), numbers, GREEDY, 0)[0] == CHOICE


@pytest.mark.parametrize("now", [None, CHOICE, UNBIASED, REMEMBERED])
def test_greedy_choices_go_first_where_large_losses_are_known_to_shrink_and_of_these_what_is_for_nothing(now):
    by_exit = numbers_of(variance=9.0) | {"payoff_C2.1.0.5": 9.0}
    forgotten = by_exit | {"correlation.0": 0.0}
    kept = CHOICE if now == CHOICE else REMEMBERED  # which pays less than an exit that is on
    for numbers, best in ((numbers_of() | {"payoff_C2.0.0.5": 9.0}, REMEMBERED), (by_exit, kept), (forgotten, CHOICE)):
        assert decide(state_of(now), numbers, BOTH, 0)[0] == best
    noise = numbers_of(retention=KEEP.retention + 0.01)  # but it must be fit
    for numbers in (noise, without_retention(numbers_of())):
        assert decide(state_of(now), numbers, BOTH, 0)[0].rule == "unbiased"


def test_greedy_selection_by_memory_needs_room_in_the_batch_for_the_samples_that_carry_the_loss():
    for bounds in (TAKE, KEEP):
        enough = bounds.room / REMEMBERED.keep
        assert controller.objection(REMEMBERED, numbers_of(concentration=enough), bounds) == ""
        reason = controller.objection(REMEMBERED, numbers_of(concentration=enough - 0.01), bounds)
        assert reason == f"too many samples carry the loss (concentration {enough - 0.01:.1f})"


@pytest.mark.parametrize("now", [None, REMEMBERED])
def test_greedy_selection_by_memory_needs_a_known_retention_but_neither_variance_nor_progress(now):
    control = GREEDY_BOTH
    numbers = numbers_of(variance=0.5, progress=-1.0)
    assert decide(state_of(now), numbers, control, 0)[0] == REMEMBERED
    unknown, reason = decide(state_of(now), without_retention(numbers), control, 0)
    assert unknown is None
    assert "large losses" in reason
    # An exit asks for no memory.
    assert decide(state_of(now), without_retention(numbers_of()), control, 0)[0] == CHOICE


def test_while_on_it_moves_to_what_is_clearly_better_or_what_is_left():
    control = Control(depths=(1, 2), keeps=(0.5,), rules=("greedy",))

    def numbers(gain, **changes):
        second = {"correlation.2": 0.9, "cost.2.0.5": 1.1, "payoff_C2.2.0.5": gain, "progress.2.0.5": 1.0}
        second |= {"payoff_T7.2.0.5": 2.0}
        return numbers_of(**changes) | second

    other = Choice("greedy", 2, 0.5)
    state = State(CHOICE, ({"correlation.1": 0.9, "correlation.2": 0.9},), before=(1.0, 0.1))
    assert decide(state, numbers(2.0 * MOVE - 0.01), control, 0)[0] == CHOICE
    moved, reason = decide(state, numbers(2.0 * MOVE + 0.01), control, 0)
    assert moved == other
    assert reason.startswith("selection pays (batches have 2.32")
    assert decide(state, numbers(1.3, correlation=0.0), control, 0)[0] == other
    assert decide(state, numbers(1.1, correlation=0.0), control, 0)[0] is None


def test_while_on_by_an_exit_it_moves_to_memory_or_another_exit_that_pays_more_and_from_memory_to_no_exit():
    control = Control(depths=(1, 2), memory=True, keeps=(0.5,), rules=("greedy",))
    second = {"correlation.2": 0.9, "cost.2.0.5": 1.0, "payoff_C2.2.0.5": 2.0, "progress.2.0.5": 1.0}
    second |= {"payoff_T7.2.0.5": 2.0}
    state = State(CHOICE, ({"correlation.1": 0.9, "correlation.2": 0.9},), before=(1.0, 0.1))
    by_memory, other = Choice("greedy", 0, 0.5), Choice("greedy", 2, 0.5)
    for memory, moved in ((1.24, other), (1.9, by_memory), (2.1, by_memory)):
        numbers = numbers_of(gain=1.25) | second | {"payoff_C2.0.0.5": memory}
        assert decide(state, numbers, control, 0)[0] == moved
        assert decide(dataclasses.replace(state, choice=by_memory), numbers, control, 0)[0] == by_memory


@pytest.mark.parametrize("correlation", [LEAST_CORRELATION - 0.01, 0.0, -0.9])
def test_a_score_that_ranks_at_random_or_backwards_in_the_latest_probe_switches_off_at_once(correlation):
    choice, reason = decide(state_of(CHOICE, correlation=correlation), numbers_of(), GREEDY, 0)
    assert choice is None
    assert reason == f"depth 1 ranks at random or backwards (rank correlation {correlation:.2f})"


@pytest.mark.parametrize("times", [0.9, 1.1])
def test_a_loss_of_whole_pools_that_has_surely_risen_switches_off_at_once(times):
    choice, reason = decide(state_of(CHOICE), risen_by(times), GREEDY, 0)
    assert (choice is None) == (times > 1)
    assert ("what is not trained on is forgotten" in reason) == (times > 1)
    assert decide(state_of(None), risen_by(times), GREEDY, 0)[0] == CHOICE


@pytest.mark.parametrize(("times", "rule"), [(0.9, "greedy"), (1.1, "unbiased")])
def test_a_loss_that_has_surely_risen_leaves_the_unbiased_rule_where_it_is_fit(times, rule):
    assert decide(state_of(REMEMBERED), risen_by(times), BOTH, 0)[0].rule == rule
    unweighted, _ = decide(state_of(REMEMBERED), risen_by(times), BOTH, 0, weighted=False)
    assert unweighted == (REMEMBERED if rule == "greedy" else None)


def test_an_unbiased_choice_stays_however_far_the_loss_has_risen():
    for times in (1.1, 100):
        assert decide(state_of(UNBIASED), without_retention(risen_by(times)), ONE, 0) == (UNBIASED, "selection pays")


def test_after_greedy_selection_has_done_harm_no_greedy_choice_is_taken_before_the_training_is_twice_as_long():
    harmed = state_of(None, harmed=40)
    reason = "greedy selection made the loss of whole pools rise at step 40, and is not tried again before twice that"
    for step in (41, 79, 80):
        assert decide(harmed, numbers_of(), GREEDY, step)[0] == (CHOICE if step == 80 else None)
    for control in (GREEDY, GREEDY_BOTH):
        choice, why = decide(harmed, numbers_of(), control, 50)
        assert choice is None
        assert why.startswith(reason)
    for state in (harmed, state_of(UNBIASED, harmed=40)):
        for control in (ONE, BOTH):
            assert decide(state, numbers_of(), control, 50)[0].rule == "unbiased"
            assert decide(state, numbers_of(), control, 50, weighted=False)[0] is None


@pytest.mark.parametrize("now", [None, CHOICE, REMEMBERED, UNBIASED], ids=str)
def test_nothing_is_selected_where_samples_come_back_in_fewer_than_four_epochs(now):
    for epochs in (LEAST_EPOCHS - 0.01, LEAST_EPOCHS):
        choice, reason = decide(state_of(now), numbers_of(epochs=epochs), BOTH, 0)
        assert (choice is None) == (epochs < LEAST_EPOCHS)
        assert ("samples come back too seldom to learn from (4.0 epochs in all" in reason) == (choice is None)


def test_where_samples_are_learnt_by_heart_nothing_is_selected_before_the_training_is_four_times_as_long():
    seen = easy_heavy(0)
    entry = record(seen._replace(scores={0: seen.exact, 1: seen.exact}), 32, BOTH)
    on = State(REMEMBERED, (entry, entry), before=(0.0, 9.0))
    free = {"concentration": 5.0, "loss": 0.5, "loss_error": 0.1, "correlation.0": 0.6, "gain.0.0.5": 1.8}

    def look(state, step, left):
        return controller.look(state, CHEAP, BOTH, 0.5, step, free=free | {"retention": left})

    kept = look(on, 40, BY_HEART)
    assert (kept.state.choice, kept.state.by_heart) == (REMEMBERED, 0)
    stopped = look(on, 40, BY_HEART - 0.01)
    assert (stopped.state.choice, stopped.state.by_heart) == (None, 40)
    assert stopped.reason == "samples were learnt by heart at step 40, and nothing is selected before step 160"
    off = dataclasses.replace(stopped.state, records=(entry, entry))
    assert look(off, 159, 0.5).state.choice is None
    assert look(off, 160, 0.5).state.choice == REMEMBERED
    saved = json.loads(json.dumps(controller.to_json(off), allow_nan=False))
    assert controller.from_json(saved) == off
    assert controller.state_problems(saved | {"by_heart": -1}, BOTH) == [
        "steering.by_heart must be a whole number of at least 0, got -1"
    ]


def test_what_is_free_replaces_what_probes_said_and_brings_in_remembered_losses():
    control = Control(depths=(1,), memory=True, keeps=(0.5,), rules=("greedy",))
    seen = easy_heavy(0)
    entry = record(seen._replace(scores={0: seen.exact, 1: torch.rand(64, generator=seeded(1))}), 32, control)
    state = State(None, (entry, entry), before=(0.0, 0.0))
    free = {"concentration": 5.0, "loss": 0.5, "loss_error": 0.1, "correlation.0": 0.6, "gain.0.0.5": 1.8}
    prices = {**CHEAP, "score_0": 2.0}
    taken = controller.look(state, prices, control, 0.5, 7, free=free | {"retention": 0.5})
    assert taken.numbers["payoff_C2.0.0.5"] == pytest.approx(1.8 / 1.02)
    assert (taken.numbers["correlation.0"], taken.numbers["concentration"]) == (0.6, 5.0)
    probed = estimates(state.records, control, prices, 0.5)
    assert taken.numbers["payoff_T7.0.0.5"] == probed["payoff_T7.0.0.5"]  # what losses do not tell
    assert taken.state.choice == Choice("greedy", 0, 0.5)
    assert "memory ranks with correlation 0.60" in taken.reason
    noise = controller.look(state, prices, control, 0.5, 7, free=free | {"retention": 0.95})
    assert noise.state.choice is None
    assert controller.look(State(), prices, control, 0.5, 7, free=free).reason == "no probe has seen finite losses yet"


@pytest.mark.parametrize(("step", "chosen"), [(0, CHOICE), (849, CHOICE), (850, None), (2000, None)])
def test_greedy_selection_ends_with_the_training(step, chosen):
    control = Control(depths=(1,), keeps=(0.5,), rules=("greedy",), total_steps=1000)
    for now in (None, CHOICE):
        choice, reason = decide(state_of(now), numbers_of(), control, step)
        assert choice == chosen
        assert ("nears its end" in reason) == (chosen is None)


@pytest.mark.parametrize(("step", "rule"), [(849, "greedy"), (850, "unbiased"), (2000, "unbiased")])
def test_the_unbiased_rule_is_what_is_left_and_what_stays_when_the_training_nears_its_end(step, rule):
    control = dataclasses.replace(BOTH, total_steps=1000)
    for now in (None, REMEMBERED, UNBIASED):
        assert decide(state_of(now), numbers_of(), control, step)[0].rule == rule
    unknown = without_retention(numbers_of())
    assert decide(state_of(UNBIASED), unknown, dataclasses.replace(ONE, total_steps=1000), step)[0] == UNBIASED


def test_a_run_goes_off_when_its_workload_turns_into_a_plateau_and_on_again_afterwards():
    on = run(easy_heavy, 8, control=GREEDY)
    quiet = functools.partial(plateau, size=0.1)  # its loss has not risen
    off = run(quiet, 8, control=GREEDY, state=on[-1].state, first=8)
    again = run(easy_heavy, 12, control=GREEDY, state=off[-1].state, first=16)
    assert on[-1].state.choice is not None
    assert off[-1].state.choice is None
    assert again[-1].state.choice is not None
    changes = sum(a.state.choice != b.state.choice for a, b in itertools.pairwise([*on, *off, *again]))
    assert changes == 3


def test_forgetting_switches_a_greedy_run_off_within_one_probe_and_for_as_long_as_it_had_run():
    on = run(easy_heavy, 5, control=GREEDY)
    (verdict,) = run(forgotten, 1, control=GREEDY, state=on[-1].state, first=5)
    assert on[-1].state.choice is not None
    assert not any(earlier.state.harmed for earlier in on)
    assert verdict.state.choice is None
    assert "the loss of whole pools has risen by 1" in verdict.reason
    assert verdict.state.harmed == 5
    later = run(easy_heavy, 6, control=GREEDY, state=verdict.state, first=6)
    assert [probe.state.choice for probe in later[:4]] == [None] * 4
    assert later[-1].state.choice == CHOICE
    assert all(probe.state.harmed == 5 for probe in later)
    assert later[0].reason.startswith("greedy selection made the loss of whole pools rise at step 5")
    unbiased = run(easy_heavy, 8, control=ONE, state=verdict.state, first=6)[-1].state
    assert (unbiased.choice, unbiased.harmed) == (UNBIASED, 5)


def test_a_loss_that_rises_under_the_unbiased_rule_is_not_laid_to_greedy_selection():
    on = run(easy_heavy, 5)
    (verdict,) = run(forgotten, 1, state=on[-1].state, first=5)
    assert verdict.numbers["loss"] > on[-1].numbers["loss"] + 1
    for state in (on[-1].state, verdict.state):
        assert (state.choice, state.harmed) == (UNBIASED, 0)


def test_a_breakdown_of_fidelity_switches_a_run_off_within_one_probe():
    on = run(easy_heavy, 8, control=GREEDY)
    backwards = easy_heavy(99)
    backwards = backwards._replace(scores={1: -backwards.exact})
    (verdict,) = run(lambda _: backwards, 1, control=GREEDY, state=on[-1].state, first=8)
    assert verdict.state.choice is None
    assert "ranks at random or backwards (rank correlation -1.00)" in verdict.reason


# What is remembered


def test_only_the_latest_records_are_remembered():
    verdicts = run(plateau, WINDOW + 3)
    assert [len(verdict.state.records) for verdict in verdicts] == [*range(1, WINDOW + 1), WINDOW, WINDOW, WINDOW]
    assert list(verdicts[-1].state.records) == [record(plateau(step), 32, ONE) for step in range(3, WINDOW + 3)]


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_records_that_are_not_finite_are_forgotten(value):
    state = run(easy_heavy, 8)[-1].state
    entry = record(easy_heavy(50), 32, ONE) | {"gain.1.0.5": value}
    verdict = advance(state, entry, CHEAP, ONE, 0.5, 8)
    assert verdict.state.records == state.records
    assert verdict.state.choice == state.choice
    assert verdict.state.next_probe > 8
    nothing = advance(State(), entry, CHEAP, ONE, 0.5, 8)
    assert nothing == (State(None, (), verdict.state.next_probe), {}, "no probe has seen finite losses yet")


@pytest.mark.parametrize("cut", [0, 2, 5, 9])
def test_a_state_goes_on_from_json_as_if_it_had_stayed(cut):
    def make(step):
        return plateau(step) if 6 <= step < 11 else easy_heavy(step)

    whole = run(make, 14, control=GREEDY)
    state = whole[cut - 1].state if cut else State()
    saved = json.loads(json.dumps(controller.to_json(state), allow_nan=False))
    restored = controller.from_json(saved)
    assert restored == state
    assert isinstance(restored.choice, Choice | None)
    assert restored.harmed == (6 if cut > 6 else 0)  # the loss of the plateau is larger
    assert run(make, 14 - cut, control=GREEDY, state=restored, first=cut) == whole[cut:]
    assert len({verdict.state.choice for verdict in whole}) == 2


@pytest.mark.parametrize("harmed", [0, 40])
def test_harm_goes_through_json_and_is_a_step(harmed):
    entry = record(easy_heavy(0), 32, ONE)
    state = State(UNBIASED, (entry,), 7, (1.0, 0.1), harmed)
    saved = json.loads(json.dumps(controller.to_json(state), allow_nan=False))
    assert controller.state_problems(saved, ONE) == []
    assert controller.from_json(saved) == state
    for wrong in (True, -1, "no", None):
        (problem,) = controller.state_problems(saved | {"harmed": wrong}, ONE)
        assert problem == f"steering.harmed must be a whole number of at least 0, got {wrong!r}"
    del saved["harmed"]
    assert controller.state_problems(saved, ONE) == ["steering.harmed must be a whole number of at least 0, got None"]


# What probes cost


@laws
@given(
    probe_price=st.floats(0.01, 30),
    share=st.sampled_from([0.001, 0.01, 0.05, 0.5]),
    total_steps=st.none() | st.integers(1, 20_000),
)
def test_probes_of_a_whole_run_cost_no_more_than_their_share(probe_price, share, total_steps):
    control, prices = Control(total_steps=total_steps, probe_share=share), {"probe": probe_price, "train": 1.0}
    steps, made = total_steps or 20_000, []
    due = next_probe(0, control, prices)
    while due < steps:
        made.append(due)
        due = next_probe(due, control, prices)
        assert due > made[-1]
    assert len(made) * probe_price <= share * steps * (1 + 1e-9)
    if probe_price / share > 5:  # where probes are not so frequent that whole steps are felt, the share is used
        assert len(made) >= math.floor(share * steps / probe_price * 0.75) - 1


def test_the_first_tenth_of_a_training_gets_two_fifths_of_the_probes():
    control, prices = Control(total_steps=100_000), {"probe": 2.0, "train": 1.0}
    made = [due := next_probe(0, control, prices)]
    while (due := next_probe(due, control, prices)) <= 100_000:
        made.append(due)
    assert len(made) == pytest.approx(500, abs=2)
    assert sum(step <= EARLY_SHARE * 100_000 for step in made) / len(made) == pytest.approx(EARLY_PROBES, abs=0.01)
    unknown = Control()
    gaps = {next_probe(step, unknown, prices) - step for step in (0, 100, 5_000)}
    assert gaps == {200}


@pytest.mark.parametrize("pools_per_step", [2, 5])
def test_pools_that_share_a_step_pay_for_its_probes_together(pools_per_step):
    for control in (Control(), Control(total_steps=100_000)):
        alone, together = (next_probe(0, control, CHEAP, count) for count in (1, pools_per_step))
        assert together == math.ceil(alone / pools_per_step)


def test_greedy_selection_ends_at_its_share_of_the_training_and_keeps_its_records():
    control = Control(depths=(1,), keeps=(0.5,), rules=("greedy",), total_steps=100, end_share=0.5)
    records = ({"loss": 1.0, "correlation.1": 0.9}, {"loss": 3.0, "correlation.1": 0.9})
    for harmed in (0, 40):
        state = State(CHOICE, records, next_probe=90, before=(1.0, 0.1), harmed=harmed)
        assert controller.end(state, control, 49).state == state
        ended = controller.end(state, control, 50)
        assert ended.state == State(None, records, 90, (1.0, 0.1), harmed)
        assert ended.reason == decide(state, numbers_of(), control, 50)[1]
    off = State(None, state.records, 90)
    assert controller.end(off, control, 60).state == off
    assert controller.end(state, GREEDY, 10**6).state == state  # of unknown length
    unbiased = state_of(UNBIASED)
    assert controller.end(unbiased, control, 60).state == unbiased
