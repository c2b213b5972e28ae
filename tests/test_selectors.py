"""Selectors: exactly b distinct candidates, broken ones last, unbiased where promised, from the given generator."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

import models
import reference
from earlysift import Sifter, selectors
from earlysift.selectors import (
    Selection,
    drop_outliers,
    explored,
    greedy,
    inclusion_probabilities,
    number_drawn,
    percentile,
    proportional,
    ranking,
    require_selection,
    uniform_subset,
)

INF, NAN = float("inf"), float("nan")
SELECTORS = [greedy, proportional, percentile]
each_selector = pytest.mark.parametrize("select", SELECTORS)
laws = settings(deadline=None, derandomize=True, database=None, max_examples=150)

finite = st.floats(0, 1e6, width=32) | st.sampled_from([0.0, 1.0, 2.5])
anything = finite | st.sampled_from([NAN, INF, -INF])


@st.composite
def pools(draw, score=anything):
    """Scores of a pool, a number to keep, and a seed."""
    scores = draw(st.lists(score, min_size=1, max_size=24))
    return torch.tensor(scores), draw(st.integers(1, len(scores))), draw(st.integers(0, 1000))


def seeded(seed):
    return Generator().manual_seed(seed)


def classes(scores):
    """0 finite, 1 unlabelled, 2 non-finite."""
    return torch.where(torch.isfinite(scores), 0, torch.where(scores == -INF, 1, 2))


def test_every_selector_of_the_module_is_tested():
    public = {f for n, f in inspect.getmembers(selectors, inspect.isfunction) if f.__module__ == selectors.__name__}
    takes_scores = {f for f in public if list(inspect.signature(f).parameters)[:3] == ["scores", "kept", "generator"]}
    assert takes_scores == set(SELECTORS)


@each_selector
@laws
@given(pool=pools())
def test_exactly_b_distinct_candidates_in_rising_order(select, pool):
    scores, kept, seed = pool
    before = scores.clone()
    indices, weights = select(scores, kept, seeded(seed))
    assert indices.dtype == torch.int64
    assert indices.shape == weights.shape == (kept,)
    assert (indices.diff() > 0).all()
    assert indices.min() >= 0
    assert indices.max() < len(scores)
    assert weights.dtype == torch.float32
    assert torch.isfinite(weights).all()
    assert (weights > 0).all()
    assert torch.equal(torch.nan_to_num(scores), torch.nan_to_num(before))


@each_selector
@laws
@given(pool=pools())
def test_a_worse_class_is_kept_only_when_the_better_ones_are_used_up(select, pool):
    scores, kept, seed = pool
    chosen = select(scores, kept, seeded(seed)).indices
    assert classes(scores)[chosen].sort().values.tolist() == classes(scores).sort().values[:kept].tolist()


@each_selector
@laws
@given(pool=pools())
def test_same_generator_state_gives_the_same_picks(select, pool):
    scores, kept, seed = pool
    first, second = select(scores, kept, seeded(seed)), select(scores, kept, seeded(seed))
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first.weights, second.weights)


@each_selector
def test_only_the_given_generator_is_drawn_from(select):
    scores, generator = torch.arange(10.0), seeded(0)
    state, own = torch.get_rng_state(), generator.get_state()
    select(scores, 4, generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(generator.get_state(), own) == (select is greedy)


@pytest.mark.parametrize("select", [proportional, percentile])
def test_other_seeds_give_other_picks(select):
    scores = torch.linspace(1, 2, 40)
    picks = {tuple(select(scores, 10, seeded(seed)).indices.tolist()) for seed in range(20)}
    assert len(picks) == 20


@each_selector
def test_keeping_everything_is_the_identity(select):
    scores = torch.tensor([2.0, NAN, 0.0, INF, -INF, 2.0])
    selection = select(scores, 6, seeded(0))
    assert selection.indices.tolist() == [0, 1, 2, 3, 4, 5]
    assert selection.weights.tolist() == [1.0] * 6


@each_selector
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_scores_of_any_dtype_are_taken(select, dtype):
    scores = torch.tensor([1, 4, 2, 8, 5, 7]).to(dtype)
    selection = select(scores, 3, seeded(0))
    assert len(set(selection.indices.tolist())) == 3
    assert selection.weights.dtype == torch.float32


@each_selector
@pytest.mark.parametrize(
    ("scores", "kept", "message"),
    [
        (
            torch.zeros(4),
            5,
            r"1 <= kept <= R, got scores of shape \(4,\) and kept = 5\. Use a larger pool or a smaller keep",
        ),
        (torch.zeros(4), 0, r"got scores of shape \(4,\) and kept = 0"),
        (torch.zeros(2, 2), 1, r"Expected scores \(R,\) .* got scores of shape \(2, 2\)"),
    ],
)
def test_what_cannot_be_selected_from_is_refused(select, scores, kept, message):
    with pytest.raises(ValueError, match=message):
        select(scores, kept, seeded(0))


# The order of candidates


@laws
@given(pool=pools())
def test_ranking_and_greedy_equal_their_twins(pool):
    scores, kept, _ = pool
    assert torch.equal(ranking(scores), reference.ranking(scores))
    fast, slow = greedy(scores, kept), reference.greedy(scores, kept)
    assert torch.equal(fast.indices, slow.indices)
    assert torch.equal(fast.weights, slow.weights)


def test_ties_keep_the_order_of_the_pool():
    assert ranking(torch.ones(1000)).tolist() == list(range(1000))
    scores = torch.tensor([1.0, NAN, -INF, 1.0, INF, -INF, 1.0, NAN])
    assert ranking(scores).tolist() == [0, 3, 6, 2, 5, 1, 4, 7]
    for seed in range(100):
        tied = torch.randint(3, (257,), generator=seeded(seed)).float()
        assert greedy(tied, 64).indices.tolist() == sorted(reference.ranking(tied).tolist()[:64])


def test_largest_and_smallest_numbers_are_still_finite():
    largest = torch.finfo(torch.float32).max
    assert ranking(torch.tensor([-INF, -largest, NAN, largest, INF])).tolist() == [3, 1, 0, 2, 4]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("broken", [NAN, INF, -INF])
@each_selector
def test_broken_candidates_are_never_kept_while_finite_ones_suffice(select, broken, share):
    scores = torch.rand(200, generator=seeded(1)) + 0.1
    count = max(1, round(share * 200))
    scores[torch.randperm(200, generator=seeded(2))[:count]] = broken
    finite_count = 200 - count
    for seed in range(20):
        selection = select(scores, 20, seeded(seed))
        assert torch.isfinite(scores[selection.indices]).sum() == min(20, finite_count)


# Unbiased selection


def weighted_means(scores, values, kept, draws, **options):
    generator = seeded(0)
    means = []
    for _ in range(draws):
        indices, weights = proportional(scores, kept, generator, **options)
        means.append((weights.double() * values[indices]).mean())
    return torch.stack(means)


SKEWED = {
    "even": torch.ones(12),
    "lognormal": torch.randn(12, generator=Generator().manual_seed(3)).exp(),
    "one large": torch.tensor([50.0, *[1.0] * 11]),
    "three capped": torch.tensor([50.0, 80.0, 1.0, 0.5, 40.0, *[0.3] * 7]),
    "zeros": torch.tensor([1.0, 2.0, 3.0, *[0.0] * 9]),
    "all zero": torch.zeros(12),
}


@pytest.mark.parametrize("kept", [1, 4, 7])
@pytest.mark.parametrize("scores", SKEWED.values(), ids=SKEWED)
def test_proportional_is_unbiased(scores, kept):
    values = torch.linspace(-1, 3, 12, dtype=torch.float64) ** 3 + scores  # related to the scores, but not by a factor
    means = weighted_means(scores, values, kept, draws=1500)
    standard_error = means.std() / math.sqrt(len(means))
    assert (means.mean() - values.mean()).abs() <= 4 * standard_error + 1e-6


@pytest.mark.parametrize("kept", [1, 4])
def test_proportional_has_less_variance_than_uniform_where_values_follow_the_scores(kept):
    scores = SKEWED["lognormal"]
    values = scores.double() * torch.linspace(0.9, 1.1, 12)
    aimed = weighted_means(scores, values, kept, draws=600)
    even = weighted_means(scores, values, kept, draws=600, uniform_share=1.0)
    assert aimed.var() < 0.7 * even.var()


@laws
@given(pool=pools(finite), share=st.floats(0.01, 1.0))
def test_weights_are_bounded_by_one_over_the_uniform_share(pool, share):
    scores, kept, seed = pool
    weights = proportional(scores, kept, seeded(seed), uniform_share=share).weights
    assert weights.max() <= 1 / share * (1 + 1e-5)
    # Inclusion probabilities are at most one.
    assert weights.min() >= kept / len(scores) * (1 - 1e-5)


@laws
@given(pool=pools(finite))
def test_proportional_over_everything_uniform_has_weights_one(pool):
    scores, kept, seed = pool
    assert torch.allclose(proportional(scores, kept, seeded(seed), uniform_share=1.0).weights, torch.ones(kept))


def test_candidates_are_included_as_often_as_their_scores_say():
    scores, kept, share, draws = torch.tensor([4.0, 2.0, 1.0, 1.0, 1.0, 1.0]), 2, 0.2, 4000
    generator = seeded(5)
    counts = torch.zeros(6)
    for _ in range(draws):
        counts[proportional(scores, kept, generator, uniform_share=share).indices] += 1
    wanted = kept * ((1 - share) * scores / scores.sum() + share / 6)
    assert (counts / draws - wanted).abs().max() <= 4 * math.sqrt(0.25 / draws)


@laws
@given(pool=pools(finite), share=st.floats(0.01, 1.0), scale=st.floats(1e-3, 1e3))
def test_inclusion_probabilities_sum_to_b_and_rise_with_the_scores(pool, share, scale):
    scores, kept, seed = pool
    included = inclusion_probabilities(scores, kept, share)
    assert included.dtype == torch.float64
    assert included.shape == scores.shape
    assert included.sum().item() == pytest.approx(kept)
    assert (included > 0).all()
    assert (included <= 1).all()
    assert (included >= kept * share / len(scores) * (1 - 1e-9)).all()
    assert (included[scores.argsort()].diff() >= -1e-12).all()
    order = torch.randperm(len(scores), generator=seeded(seed))
    torch.testing.assert_close(inclusion_probabilities(scores[order], kept, share), included[order])
    torch.testing.assert_close(inclusion_probabilities(scores.double() * scale, kept, share), included)


@pytest.mark.parametrize("kept", [1, 5])
@pytest.mark.parametrize("scores", SKEWED.values(), ids=SKEWED)
def test_inclusion_probabilities_are_how_often_proportional_draws(scores, kept):
    counts, draws, generator = torch.zeros(12), 1500, seeded(4)
    included = inclusion_probabilities(scores, kept)
    for _ in range(draws):
        indices, weights = proportional(scores, kept, generator)
        counts[indices] += 1
        torch.testing.assert_close(weights.double(), kept / (12 * included[indices]), rtol=1e-6, atol=0)
    assert (counts / draws - included).abs().max() <= 4 * math.sqrt(0.25 / draws)


def test_inclusion_probabilities_of_known_pools():
    assert inclusion_probabilities(torch.ones(4), 2).tolist() == pytest.approx([0.5] * 4)
    assert inclusion_probabilities(torch.zeros(4), 1).tolist() == pytest.approx([0.25] * 4)
    assert inclusion_probabilities(torch.arange(5.0), 5).tolist() == pytest.approx([1.0] * 5)
    assert inclusion_probabilities(torch.arange(5.0), 2, uniform_share=1.0).tolist() == pytest.approx([0.4] * 5)
    # Two are capped at one and leave one of b = 3 to the others.
    assert inclusion_probabilities(torch.tensor([9.0, 9.0, 0, 0]), 3).tolist() == pytest.approx([1, 1, 0.5, 0.5])


def test_unlabelled_and_broken_candidates_do_not_shift_the_mean():
    scores = torch.cat([SKEWED["lognormal"], torch.tensor([NAN, INF, -INF])])
    values = torch.cat([torch.linspace(-1, 3, 12, dtype=torch.float64), torch.full((3,), NAN, dtype=torch.float64)])
    means = weighted_means(scores, values, 4, draws=1500)
    assert (means.mean() - values[:12].mean()).abs() <= 4 * means.std() / math.sqrt(1500)


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5, NAN])
def test_uniform_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match=r"uniform_share must be in \(0, 1\], got .*\. The usual value is 0\.2\."):
        proportional(torch.ones(4), 2, seeded(0), uniform_share=share)


def test_negative_scores_are_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"needs scores >= 0, got -2\. Use the greedy selector, or shift the scores"):
        proportional(torch.tensor([1.0, -2.0, 3.0]), 2, seeded(0))


# Selective backprop


def test_percentile_without_selectivity_is_uniform():
    counts, draws = torch.zeros(8), 4000
    generator = seeded(7)
    for _ in range(draws):
        counts[percentile(torch.arange(8.0), 2, generator, beta=0.0).indices] += 1
    assert (counts / draws - 2 / 8).abs().max() <= 4 * math.sqrt(0.25 * 0.75 / draws)


def test_percentile_keeps_one_with_odds_of_its_rank_to_the_power_of_beta():
    counts, draws, scores = torch.zeros(4), 8000, torch.tensor([30.0, 10.0, 20.0, 40.0])
    generator = seeded(8)
    for _ in range(draws):
        counts[percentile(scores, 1, generator, beta=2.0).indices] += 1
    odds = torch.tensor([3.0, 1.0, 2.0, 4.0]) ** 2
    assert (counts / draws - odds / odds.sum()).abs().max() <= 4 * math.sqrt(0.25 / draws)


def test_percentile_with_much_selectivity_is_greedy():
    scores = torch.rand(50, generator=seeded(9))
    for seed in range(10):
        assert torch.equal(percentile(scores, 10, seeded(seed), beta=1e4).indices, greedy(scores, 10).indices)


# The outlier guard


@laws
@given(pool=pools(), fraction=st.floats(0, 0.99))
def test_drop_outliers_takes_the_top_and_leaves_at_least_the_kept(pool, fraction):
    scores, kept, _ = pool
    guarded = drop_outliers(scores, fraction, kept)
    finite_before, finite_after = torch.isfinite(scores), torch.isfinite(guarded)
    count = int(finite_before.sum())
    dropped = finite_before & ~finite_after
    assert int(finite_after.sum()) >= min(kept, count)
    assert int(dropped.sum()) <= fraction * count
    assert int(dropped.sum()) == min(int(fraction * count), max(0, count - kept))
    assert (guarded[dropped] == -INF).all()
    assert torch.equal(torch.nan_to_num(guarded[~dropped]), torch.nan_to_num(scores[~dropped]))
    if dropped.any() and finite_after.any():
        assert scores[dropped].min() >= scores[finite_after].max()


def test_drop_outliers_gives_back_new_scores():
    scores = torch.tensor([1.0, 9.0, 3.0])
    assert drop_outliers(scores, 0.4, 1).tolist() == [1.0, -INF, 3.0]
    assert scores.tolist() == [1.0, 9.0, 3.0]


@pytest.mark.parametrize("fraction", [0.0, 0.4])
def test_drop_outliers_takes_whole_numbers(fraction):
    guarded = drop_outliers(torch.tensor([1, 9, 3]), fraction, 1)
    assert guarded.tolist() == ([1, 9, 3] if fraction == 0 else [1, -INF, 3])


# No selection


def test_uniform_subset_keeps_everyone_equally_often():
    counts, draws, generator = torch.zeros(10), 3000, seeded(11)
    state = torch.get_rng_state()
    for _ in range(draws):
        indices, weights = uniform_subset(10, 4, generator)
        assert (indices.diff() > 0).all()
        assert weights.tolist() == [1.0] * 4
        counts[indices] += 1
    assert (counts / draws - 0.4).abs().max() <= 4 * math.sqrt(0.24 / draws)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "two tensors, got NoneType"),
        (torch.tensor([0, 1]), "two tensors, got Tensor"),
        (Selection([0, 1], [1.0, 1.0]), "two tensors, got Selection"),
        (Selection(torch.tensor([0]), torch.ones(1)), r"keep 2 candidates, got indices of shape \(1,\)"),
        (Selection(torch.tensor([[0], [1]]), torch.ones(2)), r"keep 2 candidates, got indices of shape \(2, 1\)"),
        (Selection(torch.tensor([0.0, 1.0]), torch.ones(2)), "whole numbers as indices"),
        (Selection(torch.tensor([True, False]), torch.ones(2)), "whole numbers as indices"),
        (Selection(torch.tensor([0, 1]), torch.ones(1)), "whole numbers as indices and real ones as weights"),
        (Selection(torch.tensor([0, 4]), torch.ones(2)), r"indices in 0..3 .* got \[0, 4\]"),
        (Selection(torch.tensor([-1, 1]), torch.ones(2)), r"indices in 0..3 .* got \[-1, 1\]"),
        (Selection(torch.tensor([0, 1]), torch.tensor([1.0, float("nan")])), "finite weights"),
    ],
)
def test_what_is_no_selection_is_refused_with_what_was_expected(returned, message):
    with pytest.raises(ValueError, match=message):
        require_selection(returned, 2, 4, look=True)
    sifter = Sifter(models.ladder(), keep=0.5, family=models.LADDER, select=lambda scores, kept, generator: returned)
    with pytest.raises(ValueError, match=message):
        sifter.sift((torch.zeros(4, 16), torch.zeros(4, dtype=torch.int64)))
    assert sifter.step == 0


# A share that is drawn uniformly


@st.composite
def partly_chosen(draw):
    """Scores, the candidates that a greedy rule chose, a number to draw, and a seed."""
    scores, kept, seed = draw(pools())
    drawn = draw(st.integers(0, kept - 1)) if kept > 1 else 0
    return scores, greedy(scores, kept - drawn).indices, drawn, seed


def twin_explored(chosen, drawn, scores, generator):
    """The others in the order of random numbers, finite ones first, then unlabelled, then non-finite ones."""
    keys = torch.rand(len(scores), generator=generator).tolist()
    kinds, taken = classes(scores).tolist(), chosen.tolist()
    others = [i for i in range(len(scores)) if i not in taken]
    others.sort(key=lambda i: (kinds[i], -keys[i] if kinds[i] == 0 else i))
    lucky, finite_others = others[:drawn], sum(kinds[i] == 0 for i in others)
    stands_for = dict.fromkeys(taken, 1.0) | {i: max(finite_others / drawn, 1.0) for i in lucky}
    return sorted(taken + lucky), [stands_for.get(i, 0.0) for i in range(len(scores))]


@laws
@given(pool=partly_chosen())
def test_explored_equals_its_twin_and_keeps_exactly_b_distinct_candidates_with_the_chosen_among_them(pool):
    scores, chosen, drawn, seed = pool
    selection, stands_for = explored(chosen, drawn, scores, seeded(seed))
    indices, shares = twin_explored(chosen, drawn, scores, seeded(seed))
    assert selection.indices.tolist() == indices
    assert stands_for.tolist() == pytest.approx(shares)
    assert (selection.indices.diff() > 0).all()
    assert len(selection.indices) == len(chosen) + drawn
    assert set(chosen.tolist()) <= set(selection.indices.tolist())
    assert selection.weights.tolist() == [1.0] * len(indices)


@laws
@given(pool=partly_chosen())
def test_the_kept_stand_for_all_candidates_with_a_finite_score(pool):
    scores, chosen, drawn, seed = pool
    finite_count = int(torch.isfinite(scores).sum())
    stands_for = explored(chosen, drawn, scores, seeded(seed))[1]
    others = finite_count - int(torch.isfinite(scores[chosen]).sum())
    if drawn and others >= drawn and torch.isfinite(scores[chosen]).all():
        assert stands_for.sum().item() == pytest.approx(finite_count)
    assert (stands_for > 0).sum() == len(chosen) + drawn


def test_what_is_drawn_is_uniform_among_the_others():
    scores = torch.cat([torch.linspace(0, 5, 12), torch.tensor([NAN, INF, -INF])])
    chosen, drawn, draws, counts = torch.tensor([10, 11]), 3, 3000, torch.zeros(15)
    for seed in range(draws):
        counts[explored(chosen, drawn, scores, seeded(seed))[0].indices] += 1
    assert counts[chosen].tolist() == [draws] * 2
    assert counts[12:].tolist() == [0] * 3
    expected = draws * drawn / 10
    # Of each draw three are taken without replacement, so that variances are 7 / 9 of those of independent counts.
    chi_square = ((counts[:10] - expected).square() / expected).sum() * 9 / 7
    assert chi_square < 27.9  # 0.1 % of the chi-square distribution with nine degrees of freedom lies above


def test_unlabelled_and_then_non_finite_candidates_are_drawn_in_need_alone():
    scores = torch.tensor([NAN, 3.0, INF, -INF, 1.0, -INF, 2.0])
    for seed in range(20):
        kept = [explored(torch.tensor([1]), drawn, scores, seeded(seed))[0].indices.tolist() for drawn in range(2, 7)]
        assert kept == [[1, 4, 6], [1, 3, 4, 6], [1, 3, 4, 5, 6], [0, 1, 3, 4, 5, 6], [0, 1, 2, 3, 4, 5, 6]]


def test_the_estimate_of_a_mean_is_unbiased():
    scores = torch.randn(12, generator=seeded(3)).exp()
    x, chosen = scores.double() * torch.linspace(-1, 3, 12, dtype=torch.float64), greedy(scores, 4).indices
    means = []
    for seed in range(1000):
        stands_for = explored(chosen, 2, scores, seeded(seed))[1].double()
        means.append((stands_for * x).sum() / stands_for.sum())
    means = torch.stack(means)
    assert (means.mean() - x.mean()).abs() <= 4 * means.std() / math.sqrt(1000)


def test_exploring_draws_from_the_given_generator_alone_and_takes_whole_numbers():
    generator, state = seeded(0), torch.get_rng_state()
    chosen = torch.tensor([3, 5], dtype=torch.int32)  # as a selector may return
    first = explored(chosen, 2, torch.arange(8), generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert first[0].indices.dtype == torch.int64
    assert not torch.equal(generator.get_state(), seeded(0).get_state())
    assert torch.equal(first[1], explored(chosen, 2, torch.arange(8), seeded(0))[1])


@laws
@given(kept=st.integers(1, 10_000), share=st.floats(0, 0.999))
def test_the_number_drawn_is_the_share_but_neither_none_nor_all(kept, share):
    drawn = number_drawn(kept, share)
    assert 0 <= drawn < kept
    assert (drawn == 0) == (share == 0 or kept == 1)
    assert drawn in {0, 1, kept - 1} or abs(drawn - share * kept) <= 0.5


def test_a_batch_of_one_is_the_chosen_one():
    assert number_drawn(1, 0.9) == 0
    selection, stands_for = explored(torch.tensor([2]), 0, torch.arange(3.0), seeded(0))
    assert selection.indices.tolist() == [2]
    assert stands_for.tolist() == [0, 0, 1]
