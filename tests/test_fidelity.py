"""Fidelity: rank correlation, overlap and gain as the theory defines them."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

import reference
from earlysift.fidelity import fidelity

INF, NAN = float("inf"), float("nan")
laws = settings(deadline=None, derandomize=True, database=None, max_examples=200)
numbers = st.floats(0.125, 1e3, width=32) | st.sampled_from([1.0, 2.0, 4.0])
anything = numbers | st.sampled_from([NAN, INF, -INF])


@st.composite
def scored(draw, score=anything):
    """Scores and exact losses of the same candidates, and a number to keep."""
    pairs = draw(st.lists(st.tuples(score, score), min_size=1, max_size=16))
    g, f = zip(*pairs, strict=True)
    return torch.tensor(g), torch.tensor(f), draw(st.integers(1, len(pairs)))


@laws
@given(pool=scored())
def test_fidelity_equals_its_twin(pool):
    fast, slow = fidelity(*pool), reference.fidelity(*pool)
    assert fast.keys() == slow.keys()
    assert fast == pytest.approx(slow, rel=1e-6, abs=1e-6)


@laws
@given(pool=scored(numbers))
def test_fidelity_lies_within_its_bounds(pool):
    scores, exact, kept = pool
    measured = fidelity(scores, exact, kept)
    assert -1 <= measured["rank_correlation"] <= 1
    assert max(0, 2 * kept - len(scores)) / kept - 1e-9 <= measured["overlap"] <= 1
    best = fidelity(exact, exact, kept)["gain"]
    assert best >= 1 - 1e-6
    assert measured["gain"] <= best + 1e-6


@laws
@given(pool=scored(numbers))
def test_only_the_order_of_the_scores_counts(pool):
    scores, exact, kept = pool
    assert fidelity(scores.double() ** 3 + 5, exact, kept) == pytest.approx(fidelity(scores.double(), exact, kept))


def test_perfect_and_reversed_scores():
    exact = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert fidelity(exact * 10, exact, 2) == {"rank_correlation": 1.0, "overlap": 1.0, "gain": 1.5}
    assert fidelity(-exact, exact, 2) == {"rank_correlation": -1.0, "overlap": 0.0, "gain": 0.5}


def test_scores_that_are_all_alike_have_no_correlation():
    measured = fidelity(torch.ones(4), torch.tensor([1.0, 2.0, 3.0, 6.0]), 2)
    assert measured == {"rank_correlation": 0.0, "overlap": 0.0, "gain": 0.5}


def test_rank_correlation_is_that_of_normal_variables():
    generator = Generator().manual_seed(0)
    x, noise = torch.randn(2, 20_000, generator=generator)
    r = 0.6
    measured = fidelity(x, r * x + math.sqrt(1 - r * r) * noise + 10, 100)["rank_correlation"]
    assert measured == pytest.approx(6 / math.pi * math.asin(r / 2), abs=0.02)  # Spearman's of a Gaussian pair


def test_candidates_without_a_finite_pair_do_not_count():
    scores = torch.tensor([1.0, NAN, 2.0, 3.0, -INF, 9.0])
    exact = torch.tensor([2.0, 5.0, 1.0, 4.0, 7.0, INF])
    assert fidelity(scores, exact, 2) == fidelity(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 1.0, 4.0]), 2)
    assert fidelity(torch.tensor([NAN, 1.0]), torch.tensor([1.0, NAN]), 1) == {}
