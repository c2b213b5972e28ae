"""Steering: prices from times where there are any, probes only when they are due, the configured choice among all."""

import dataclasses
import math

import pytest

from earlysift import controller, probes, steering
from earlysift.control import Choice, Control, scored_depths
from earlysift.controller import State
from earlysift.steering import Measured

PRICES = {"train": 60.0, "probe": 30.0, "score_1": 6.0}
CONTROL = Control(depths=(1,), keeps=(0.5,), rules=("greedy",))


def nothing():
    return Measured({}, weighted=False)


def steered(state, step, *, record=None, **changes):
    calls = []

    def probe():
        calls.append("probe")
        return Measured(record, weighted=False)

    def prices():
        calls.append("prices")
        return PRICES

    options = {"first": True, "pools_per_step": 1, "depth": 1, "keep": 0.5, "free": nothing} | changes
    found = steering.steer(state, CONTROL, step, prices_of=prices, probe=probe if record else None, **options)
    return *found, calls


RECORD = steering.record_of({}, CONTROL) | {"correlation.1": 0.5, "gain.1.0.5": 1.2}


def test_prices_are_times_or_flops_in_the_unit_of_the_training_time():
    flops = {"train": 6e9, "probe": 3e9, "score_1": 1e9}
    assert steering.prices(flops, {"score_1": 5.0}) == flops  # times of scoring alone compare with nothing
    assert steering.prices(flops, {"train": 60.0, "score_1": 5.0}) == {"train": 60.0, "probe": 30.0, "score_1": 5.0}


def test_the_first_step_finds_out_when_a_probe_is_due_and_steps_before_it_ask_for_nothing():
    state, row, calls = steered(None, 0, record=RECORD)
    assert (state, row) == (State(next_probe=controller.next_probe(0, CONTROL, PRICES)), {"mode": "off"})
    assert calls == ["prices"]
    assert steered(state, state.next_probe - 1, record=RECORD) == (state, {"mode": "off"}, [])


def test_a_due_probe_is_made_at_the_first_pool_of_a_step_alone():
    due = State(next_probe=4)
    for changes in ({"first": False}, {"record": None}):
        state, row, calls = steered(due, 4, **{"record": RECORD} | changes)
        assert (state, row, calls) == (due, {"mode": "off"}, [])
    state, row, calls = steered(due, 4, record=RECORD)
    assert calls == ["probe", "prices"]
    assert state.next_probe > 4
    assert (row["rank_correlation"], row["gain"]) == (0.5, 1.2)


def test_greedy_selection_ends_with_the_training_whether_a_probe_is_due_or_not():
    control = Control(depths=(1,), keeps=(0.5,), total_steps=100)
    on = State(Choice("greedy", 1, 0.5), next_probe=1000)
    options = {"first": True, "pools_per_step": 1, "depth": 1, "keep": 0.5, "probe": None, "free": nothing}
    kept, row = steering.steer(on, control, 84, prices_of=dict, **options)
    assert (kept, row) == (on, {"mode": "greedy"})
    ended, row = steering.steer(on, control, 85, prices_of=dict, **options)
    assert ended.choice is None
    assert row["mode"] == "off"
    assert row["event"]["from"] == "greedy, depth 1, keep 0.5"
    assert row["event"]["to"] == "uniform"
    unbiased = State(Choice("unbiased", 1, 0.5), next_probe=1000)
    assert steering.steer(unbiased, control, 85, prices_of=dict, **options) == (unbiased, {"mode": "unbiased"})


def test_candidates_are_what_the_model_has_and_the_configured_choice():
    options = {"depth": 2, "keep": 0.25, "layers": 4, "one_depth": False}
    control = steering.candidates(Control(depths=(1, 3, 9), keeps=(0.1, 0.5)), **options)
    assert (control.depths, control.keeps) == ((1, 2, 3), (0.25, 0.5))
    assert steering.candidates(Control(), **options | {"one_depth": True}).depths == (2,)
    assert scored_depths(steering.candidates(Control(), **options, remembers=True)) == (0, 1, 2, 3)
    with pytest.raises(ValueError, match=r"reference_costs of probe, score_1, .*, train, got \['train'\]"):
        steering.candidates(Control(reference_costs={"train": 1.0}), **options)


def test_a_record_has_all_names_and_nan_where_nothing_was_seen():
    record = steering.record_of({"loss": 2.0}, CONTROL)
    assert list(record) == probes.record_names(CONTROL)
    assert record.pop("loss") == 2.0
    assert all(map(math.isnan, record.values()))


def test_what_is_free_is_looked_at_now_and_then_between_probes_and_changes_are_noted():
    record = dict.fromkeys(probes.record_names(CONTROL), 1.0) | {"correlation.1": 0.5, "gain.1.0.5": 1.6}
    record |= {
        "unbiased.1.0.5.length2": 0.5,
        "concentration": 5.0,
        "greedy.1.0.5.signal": 1.0,
        "greedy.1.0.5.length2": 1.0,
    }
    state = State(records=(record, record), next_probe=1000)
    asked = []

    def free():
        asked.append("free")
        return Measured({"concentration": 5.0, "loss": 1.0, "loss_error": 0.1, "retention": 0.5}, weighted=False)

    options = {"first": True, "pools_per_step": 1, "depth": 1, "keep": 0.5, "probe": None, "prices_of": lambda: PRICES}
    for step in range(1, 2 * controller.FREE_EVERY):
        found, row = steering.steer(state, CONTROL, step, free=free, **options)
        looked = step == controller.FREE_EVERY
        assert (found.choice is not None) == looked
        assert ("event" in row, "control" in row) == (looked, looked)
        assert "rank_correlation" not in row
    assert asked == ["free"]
    assert steering.steer(state, CONTROL, controller.FREE_EVERY, free=nothing, **options)[0] == state


@pytest.mark.parametrize("weighted", [False, True])
def test_a_free_look_gives_the_unbiased_rule_to_loops_that_weigh_samples_alone(weighted):
    control = Control(depths=(1,), keeps=(0.5,), rules=("unbiased",))
    record = dict.fromkeys(probes.record_names(control), 1.0) | {"unbiased.1.0.5.length2": 0.2}
    state = State(records=(record, record), next_probe=1000)
    options = {"first": True, "pools_per_step": 1, "depth": 1, "keep": 0.5, "probe": None, "prices_of": lambda: PRICES}
    measured = Measured({"concentration": 5.0, "loss": 1.0, "loss_error": 0.1}, weighted)
    found, _ = steering.steer(state, control, controller.FREE_EVERY, free=lambda: measured, **options)
    assert found.choice == (Choice("unbiased", 1, 0.5) if weighted else None)


def test_a_free_look_at_a_loss_that_has_risen_ends_greedy_selection_until_the_training_is_twice_as_long():
    record = dict.fromkeys(probes.record_names(CONTROL), 1.0) | {"gain.1.0.5": 1.6, "unbiased.1.0.5.length2": 0.5}
    on = State(Choice("greedy", 1, 0.5), (record, record), next_probe=1000, before=(1.0, 0.1))
    options = {"first": True, "pools_per_step": 1, "depth": 1, "keep": 0.5, "probe": None, "prices_of": lambda: PRICES}

    def look(state, loss):
        measured = Measured({"loss": loss, "loss_error": 0.1, "retention": 0.5}, weighted=False)
        return steering.steer(state, CONTROL, controller.FREE_EVERY, free=lambda: measured, **options)

    assert look(on, 1.0) == (on, {"mode": "greedy"})
    ended, row = look(on, 2.0)
    assert (ended.choice, ended.harmed) == (None, controller.FREE_EVERY)
    assert row["event"]["reason"].startswith("the loss of whole pools has risen by 1 since")
    again, row = look(dataclasses.replace(ended, records=(record, record)), 1.0)
    assert (again.choice, again.harmed, row) == (None, controller.FREE_EVERY, {"mode": "off"})


RECORDED = dict.fromkeys(probes.record_names(CONTROL), 1.0) | {"gain.1.0.5": 1.6, "unbiased.1.0.5.length2": 0.5}


def known():
    return Measured({"loss": 1.0, "loss_error": 0.1, "concentration": 5.0}, weighted=False)


def watched(state, step, *, record=RECORDED, **changes):
    """A step whose training pass was looked into."""
    asked = []

    def trained():
        asked.append("trained")
        return record and Measured(record, weighted=False)

    def probe():
        asked.append("probe")
        return Measured(RECORDED, weighted=False)

    options = {"first": True, "pools_per_step": 1, "depth": 1, "keep": 0.5, "free": known, "prices_of": lambda: PRICES}
    found = steering.steer(state, CONTROL, step, **options | {"probe": probe, "trained": trained} | changes)
    return *found, asked


def test_what_was_trained_on_uniformly_is_a_record_for_nothing_that_puts_the_next_probe_off():
    every, state = controller.FREE_EVERY, State(next_probe=controller.FREE_EVERY + 5)
    for step in range(1, 2 * every):
        state, row, asked = watched(state, step)
        assert asked == (["trained"] if step == every else [])
        assert ("control" in row) == (step == every)
        assert "rank_correlation" not in row  # no pool was probed
    assert state.records == (RECORDED,)
    assert state.next_probe == controller.next_probe(every, CONTROL, PRICES)
    chosen, row, _ = watched(state, 2 * every)
    assert chosen.choice == Choice("greedy", 1, 0.5)
    assert row["event"]["from"] == "uniform"
    assert "trained" not in watched(chosen, 3 * every)[2]  # batches that were selected tell nothing of pools


def test_a_probe_that_is_due_is_made_only_where_nothing_was_trained_on_that_stands_in_for_it():
    due, too_few = State(next_probe=7), None
    assert watched(due, 7)[2] == ["trained"]
    state, row, asked = watched(due, 7, record=too_few)
    assert asked == ["trained", "probe"]
    assert "rank_correlation" in row
    assert state.records == (RECORDED,)
    # Losses of a probe and of training are not alike, so nothing stands in where only probes will tell of a rise.
    assert watched(due, 7, free=nothing)[2] == ["probe"]
    assert watched(due, 7, first=False)[2] == []
    assert watched(State(), controller.FREE_EVERY, record=too_few, probe=None)[0].records == ()


def test_free_signals_have_all_names_on_every_rank():
    control = steering.candidates(Control(), depth=1, keep=0.5, layers=4, one_depth=False, remembers=True)
    signals = steering.free_of({"loss": 2.0}, control)
    assert list(signals) == [
        *("concentration", "loss", "loss_error", "correlation.0", "gain.0.0.5", "gain.0.0.67", "retention", "epochs")
    ]
    assert [name for name, value in signals.items() if not math.isnan(value)] == ["loss"]
