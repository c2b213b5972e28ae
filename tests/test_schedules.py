"""Schedules: functions of the step, nothing else, between 0 and 1."""

import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from earlysift import schedules
from earlysift.schedules import anneal, constant, warmup

laws = settings(deadline=None, derandomize=True, database=None, max_examples=200)
steps = st.integers(0, 10**7)


@st.composite
def any_schedule(draw):
    """A schedule put together from those of the module."""
    base = constant(draw(st.floats(0, 1)))
    start = draw(st.integers(0, 10**4))
    falling = anneal(start, start + draw(st.integers(1, 10**4)), draw(st.sampled_from([None, base])))
    return draw(st.sampled_from([base, falling, warmup(start, falling), warmup(start, base), warmup(start)]))


def test_module_has_the_schedules_tested_here():
    functions = inspect.getmembers(schedules, inspect.isfunction)
    public = {n for n, f in functions if f.__module__ == schedules.__name__ and not n.startswith("_")}
    assert public == {"constant", "warmup", "anneal"}


@laws
@given(schedule=any_schedule(), step=steps)
def test_intensity_lies_between_nothing_and_everything_and_has_no_memory(schedule, step):
    first = schedule(step)
    schedule(step + 1)
    schedule(0)
    assert 0 <= first <= 1
    assert schedule(step) == first


@laws
@given(value=st.floats(0, 1), step=steps)
def test_constant_is_constant(value, step):
    assert constant(value)(step) == value
    assert constant()(step) == 1.0


@laws
@given(count=st.integers(0, 10**5), step=steps, value=st.floats(0, 1))
def test_warmup_is_uniform_then_the_other_schedule_at_the_absolute_step(count, step, value):
    assert warmup(count)(step) == (0.0 if step < count else 1.0)
    assert warmup(count, lambda at: value if at >= count else 7.0)(step) == (0.0 if step < count else value)


@laws
@given(start=st.integers(0, 10**4), span=st.integers(1, 10**4), step=steps)
def test_anneal_falls_in_a_line_from_start_to_end(start, span, step):
    schedule = anneal(start, start + span)
    assert schedule(step) >= schedule(step + 1)
    if step <= start:
        assert schedule(step) == 1.0
    elif step >= start + span:
        assert schedule(step) == 0.0
    else:
        assert schedule(step) == pytest.approx(1 - (step - start) / span)


def test_anneal_scales_the_schedule_before_it():
    schedule = anneal(10, 20, before=warmup(5, constant(0.8)))
    assert [schedule(step) for step in (0, 5, 10, 20)] == [0.0, 0.8, 0.8, 0.0]
    assert schedule(15) == pytest.approx(0.4)


@pytest.mark.parametrize(("start", "end"), [(5, 5), (5, 4)])
def test_anneal_that_ends_before_it_starts_is_refused(start, end):
    with pytest.raises(ValueError, match=rf"must end after it starts, got start = {start} and end = {end}\."):
        anneal(start, end)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    for made in (lambda: constant(value), lambda: warmup(value), lambda: anneal(value, 5), lambda: anneal(0, value)):
        with pytest.raises(ValueError, match="must be a finite number"):
            made()
