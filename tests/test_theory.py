"""Theory: every bound holds on random problems, every closed form is what is measured, and bad input is refused."""

import _thread
import json
import math
import signal
import threading
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator

from browsing import opened

pytest.importorskip("sklearn")

from earlysift import cli, costs
from earlysift.theory import bounds, checks, crossing, linear, page, problems, runs
from earlysift.theory.experiments import EXPERIMENTS, run_experiments
from earlysift.theory.problems import LOSSES, Loss, Problem, bundled, make_problem, synthetic
from earlysift.theory.runs import run

laws = settings(deadline=None, derandomize=True, database=None, max_examples=25)
many = settings(deadline=None, derandomize=True, database=None, max_examples=100)
seeds_of = st.integers(0, 10**6)
RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"


def seeded(seed):
    return Generator().manual_seed(seed)


@st.composite
def convex(draw):
    """A random smooth convex problem: least squares (interpolating, Gaussian, heavy-tailed, spiked) or logistic."""
    return synthetic(
        seeded(draw(seeds_of)),
        kind=draw(st.sampled_from(["squared", "logistic"])),
        samples=draw(st.integers(5, 80)),
        width=draw(st.integers(1, 6)),
        condition=draw(st.floats(1, 50)),
        noise=draw(st.sampled_from([0.0, 0.3, 2.0])),
        tail=draw(st.sampled_from([0.0, 1.5])),
        spike=draw(st.sampled_from([0.0, 0.1])),
    )


@st.composite
def pools(draw):
    pool = draw(st.integers(1, 12))
    return pool, draw(st.integers(1, pool))


def holds(found):
    return {name: check for name, check in found.items() if not check.holds}


# Problems


@many
@given(problem=convex())
def test_minimum_is_one_and_losses_are_not_negative(problem):
    gradient = problem.gradient(problem.optimum)
    start = problem.gradient(problem.start)
    assert gradient.norm() <= 1e-8 * max(1.0, start.norm().item())
    assert bool((problem.losses(problem.optimum) >= 0).all())
    assert problem.objective(problem.optimum) <= problem.objective(problem.start) + 1e-12


@many
@given(problem=convex(), seed=seeds_of)
def test_gradients_are_those_of_autograd_and_no_steeper_than_smoothness_allows(problem, seed):
    w = torch.randn(3, problem.start.numel(), generator=seeded(seed), dtype=torch.float64).requires_grad_()
    index = torch.randint(len(problem.targets), (3, 4), generator=seeded(seed))
    losses = problem.losses(w, index)
    for i, j in product(range(3), range(4)):
        (expected,) = torch.autograd.grad(losses[i, j], w, retain_graph=True)
        found = problem.gradients(w.detach(), index)[i, j]
        assert torch.allclose(found, expected[i], atol=1e-9)
        assert found.square().sum() <= 2 * problem.smoothness * losses[i, j] * (1 + 1e-9) + 1e-12  # self-bounding


@pytest.mark.parametrize("name", problems.BUNDLED)
def test_bundled_data_has_a_minimum(name):
    found = bundled(name)
    assert found.gradient(found.optimum).norm() < 1e-8


def test_noise_free_regression_interpolates_and_heavier_tails_have_larger_extremes():
    calm = synthetic(seeded(0), noise=0.0)
    assert calm.objective(calm.optimum) < 1e-20
    light, heavy = (synthetic(seeded(1), samples=2000, tail=tail) for tail in (0.0, 1.5))
    tops = [p.losses(p.optimum).max() / p.objective(p.optimum) for p in (light, heavy)]
    assert tops[1] > 5 * tops[0]


# Runs, and what selection expects


@many
@given(shape=pools(), samples=st.integers(1, 40))
def test_rank_shares_are_a_falling_distribution(shape, samples):
    shares = runs.rank_shares(samples, *shape)
    assert shares.sum().item() == pytest.approx(1)
    assert bool((shares.diff() <= 1e-12).all())


@pytest.mark.parametrize(("pool", "kept"), [(1, 1), (4, 1), (6, 2), (5, 5)])
def test_expected_choice_is_what_runs_choose(pool, kept):
    losses = torch.rand(7, generator=seeded(0), dtype=torch.float64)
    index = torch.randint(7, (200_000, pool), generator=seeded(1))
    chosen = losses[index].topk(kept, dim=1).values.mean(dim=1)
    expected = runs.expected_choice(losses, losses, pool, kept).item()
    assert abs(chosen.mean().item() - expected) < 5 * max(chosen.std().item(), 1e-9) / math.sqrt(len(chosen)) + 1e-9
    shares = runs.choice_shares(losses, pool, kept)
    assert (shares @ losses).item() == pytest.approx(expected)


def test_gain_is_one_where_every_sample_is_fitted_exactly():
    problem = make_problem("same", torch.ones(3, 1), torch.full((3,), 2.0), LOSSES["squared"])
    points = torch.tensor([[[2.0]], [[1.0]]], dtype=torch.float64)
    assert checks.gains(problem, points, 4).flatten().tolist() == pytest.approx([1.0, 1.0])
    fitted = run(replace(problem, start=problem.optimum), eta=0.5, steps=3, seeds=2, generator=seeded(0), rule="greedy")
    assert not holds(checks.check_run(fitted))


def plain_sgd(problem, eta, steps, seed):
    """One seed of SGD as one would write it down."""
    generator, w = seeded(seed), problem.start.clone()
    for _ in range(steps):
        i = int(torch.randint(len(problem.targets), (1, 1), generator=generator))
        w = w - eta * (
            problem.loss.slope(problem.features[i] @ w, problem.targets[i]) * problem.features[i] + problem.ridge * w
        )
    return w


@pytest.mark.parametrize("kind", ["squared", "logistic"])
def test_a_run_is_plain_sgd_and_greedy_of_a_pool_of_one_is_the_same(kind):
    problem = synthetic(seeded(0), kind=kind)
    last = plain_sgd(problem, 0.01, 50, seed=3)
    for rule in ("uniform", "greedy", "unbiased"):
        found = run(problem, eta=0.01, steps=50, seeds=1, generator=seeded(3), rule=rule)
        if rule != "unbiased":  # which draws once more per step
            assert torch.allclose(found.iterates[-1, 0], last, atol=1e-12)


def test_a_score_that_keeps_the_order_takes_the_same_steps_bit_for_bit():
    problem = synthetic(seeded(0))
    train = partial(run, problem, eta=0.01, steps=40, seeds=5, pool=8, kept=3, rule="greedy")
    exact, same = train(generator=seeded(1)), train(generator=seeded(1), score=runs.order_kept)
    assert torch.equal(exact.iterates, same.iterates)
    other = train(generator=seeded(1), score=runs.correlated(0.3))
    assert not torch.equal(exact.iterates, other.iterates)


def test_an_exit_that_sees_all_features_is_exact_and_no_greedy_steps_are_uniform():
    problem = synthetic(seeded(0), width=4)
    train = partial(run, problem, eta=0.01, steps=40, seeds=5, pool=8, rule="greedy")
    assert torch.equal(
        train(generator=seeded(1)).iterates, train(generator=seeded(1), score=runs.early_exit(4)).iterates
    )
    off = train(generator=seeded(1), until=0)
    uniform = train(generator=seeded(1), rule="uniform")
    assert torch.equal(off.iterates, uniform.iterates)


@laws
@given(problem=convex(), seed=seeds_of, pool=st.integers(2, 8))
def test_unbiased_rule_steps_along_the_mean_gradient(problem, seed, pool):
    w = problem.start + torch.randn(problem.start.shape, generator=seeded(seed), dtype=torch.float64)
    moved = replace(problem, start=w)
    found = run(
        moved,
        eta=1.0,
        steps=1,
        seeds=20_000,
        generator=seeded(seed),
        pool=pool,
        rule="unbiased",
        score=runs.gradient_norms,
    )
    steps = w - found.iterates[1]
    error = steps.std(dim=0) / math.sqrt(len(steps))
    assert bool(((steps.mean(dim=0) - problem.gradient(w)).abs() <= 6 * error + 1e-9).all())


# The statements


@laws
@given(problem=convex(), shape=pools(), share=st.floats(0.02, 0.98), seed=seeds_of)
def test_t1_and_what_sharpens_it_hold(problem, shape, share, seed):
    pool, kept = shape
    eta = share / problem.smoothness
    found = run(problem, eta=eta, steps=60, seeds=16, generator=seeded(seed), pool=pool, kept=kept, rule="greedy")
    u = checks.greedy_minimum(problem, pool, kept, steps=50)
    checked = checks.check_run(found, comparator=u)
    assert not holds(checked)
    assert checked["sharp"].bound <= checked["T1"].bound


@laws
@given(problem=convex(), share=st.floats(0.02, 0.98), steps=st.integers(1, 80), seed=seeds_of)
def test_t2_holds(problem, share, steps, seed):
    eta = share / problem.smoothness
    found = run(problem, eta=eta, steps=steps, seeds=32, generator=seeded(seed))
    assert not holds(checks.check_run(found))


@laws
@given(problem=convex(), shape=pools(), d=st.floats(0, 0.95), worst=st.booleans(), seed=seeds_of)
def test_t3_holds_in_every_pool_and_run(problem, shape, d, worst, seed):
    pool, kept = shape
    scaled, generator = runs.multiplicative(d, worst=worst), seeded(seed)
    train = partial(run, problem, eta=0.3 / problem.smoothness, steps=40, seeds=16, rule="greedy")
    found = train(generator=generator, pool=pool, kept=kept, score=scaled.score)
    gain = bounds.multiplicative_gain(1.0, d) * checks.gains(problem, found.iterates[:-1], pool, kept)
    assert not holds(checks.check_run(found, gain=gain))
    assert scaled.factor == bounds.multiplicative_gain(1.0, d)
    assert checks.check_pools(problem, found.iterates[-1], scaled, pool, kept, seeded(seed)).holds


@laws
@given(problem=convex(), shape=pools(), e=st.floats(0, 2), worst=st.booleans(), seed=seeds_of)
def test_t4_holds_in_every_pool_and_run(problem, shape, e, worst, seed):
    pool, kept = shape
    shifted = runs.additive(e, worst=worst)
    train = partial(run, problem, eta=0.3 / problem.smoothness, steps=40, seeds=16, rule="greedy")
    found = train(generator=seeded(seed), pool=pool, kept=kept, score=shifted.score)
    assert not holds(checks.check_run(found, lost=2 * e))
    assert shifted.lost == 2 * e
    assert checks.check_pools(problem, found.iterates[-1], shifted, pool, kept, seeded(seed)).holds


def test_t3_and_t4_are_reached_by_the_worst_errors():
    # Two losses whose ranges just touch: the smaller may rank first, and then the bound is an equality.
    for approximation in (runs.multiplicative(0.25, worst=True), runs.additive(0.2, worst=True)):
        low = 0.6
        problem = make_problem(
            "two", torch.ones(2, 1), torch.tensor([math.sqrt(2.0), -math.sqrt(2 * low)]), LOSSES["squared"]
        )
        w = torch.zeros(500, 1, dtype=torch.float64)
        losses = problem.losses(w)
        assert losses[0].tolist() == pytest.approx([1.0, low])
        index = torch.tensor([[0, 1]]).expand(500, 2)
        scores = approximation.score(runs.Candidates(problem, w, index, losses, seeded(0)))
        assert bool((scores.argmax(dim=1) == 1).all())
        assert approximation.factor * 1.0 - approximation.lost == pytest.approx(low)


@many
@given(r=st.floats(-1, 1), shape=pools(), seed=seeds_of)
def test_t5_holds_for_gaussian_losses(r, shape, seed):
    assert checks.check_correlated_gain(r, *shape, 3000, seeded(seed)).holds


@laws
@given(r=st.floats(-0.99, 0.99), pool=st.integers(1, 12), squares=st.booleans(), seed=seeds_of)
def test_t6_holds_for_gaussian_losses_and_their_squares(r, pool, squares, seed):
    assert checks.check_agreement(r, pool, 3000, seeded(seed), squares=squares).holds


@pytest.mark.parametrize("r", [-0.9, -0.3, 0.2, 0.6, 0.95])
def test_t6_for_many_candidates_agrees_with_its_closed_form_for_two(r):
    for squares in (False, True):
        found = bounds._agreement_integral(r, 2, squares)
        assert found == pytest.approx(bounds.agreement(r, 2, squares=squares), abs=2e-4)
    assert bounds.kept_overlap(r, 0.5) == pytest.approx(bounds.agreement(r, 2), abs=1e-6)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_kept_overlap_is_the_overlap_of_large_pools(keep):
    exact, noise = torch.randn(2, 40, 10_000, generator=seeded(0), dtype=torch.float64)
    for r in (-1.0, -0.5, 0.7, 1.0):
        found = checks.agreement_of(r * exact + math.sqrt(1 - r**2) * noise, exact, round(10_000 * keep))
        assert found.overlap == pytest.approx(bounds.kept_overlap(r, keep), abs=0.005)


@many
@given(shape=pools())
def test_a_finite_pool_gains_at_most_what_a_large_one_does(shape):
    pool, kept = shape
    normal = NormalDist()
    # h(keep) = phi(z) / keep of T5: the mean of the upper share of a standard normal.
    large = 0.0 if kept == pool else normal.pdf(normal.inv_cdf(kept / pool)) * pool / kept
    assert bounds.normal_choice(pool, kept) <= large + 1e-9


@laws
@given(problem=convex(), pool=st.integers(1, 10), seed=seeds_of)
def test_t7_holds_for_pools(problem, pool, seed):
    w = problem.start + torch.randn(problem.start.shape, generator=seeded(seed), dtype=torch.float64)
    assert checks.check_second_moment(problem, w, pool, 4000, seeded(seed)).holds


@laws
@given(problem=convex(), pool=st.integers(1, 10), share=st.floats(0.02, 0.98), seed=seeds_of)
def test_t7_holds_in_a_run(problem, pool, share, seed):
    eta = share / problem.smoothness
    found = run(
        problem,
        eta=eta,
        steps=60,
        seeds=32,
        generator=seeded(seed),
        pool=pool,
        rule="unbiased",
        score=runs.gradient_norms,
    )
    assert checks.check_unbiased_run(found).holds


@laws
@given(seed=seeds_of, share=st.floats(0.05, 1.95), pool=st.integers(1, 8))
def test_interpolating_problems_keep_their_bound_at_steps_up_to_twice_as_long(seed, share, pool):
    problem = synthetic(seeded(seed), samples=60, width=4, noise=0.0)
    eta, steps = share / problem.smoothness, 60
    found = run(problem, eta=eta, steps=steps, seeds=32, generator=seeded(seed), pool=pool, rule="greedy")
    rho = checks.gains(problem, found.iterates[:-1], pool).min().item()
    measured = problem.objective(found.iterates[:-1].mean(dim=0)).mean().item()
    assert measured <= problem.distance2 / (2 * eta * steps * rho * min(1, 2 - share))


@laws
@given(problem=convex(), pool=st.integers(2, 8), share=st.floats(0.02, 0.9), seed=seeds_of)
def test_t9_annealing_keeps_the_bound_of_uniform_from_where_greedy_left(problem, pool, share, seed):
    eta, switch, steps = share / problem.smoothness, 30, 80
    train = partial(run, problem, eta=eta, steps=steps, seeds=32, generator=seeded(seed), pool=pool, rule="greedy")
    check = checks.check_annealed_run(train(until=switch))
    assert check.measured <= check.bound + 1e-12


def test_t10_gaussian_data_has_the_same_gain_everywhere_and_no_floor():
    problem = synthetic(seeded(0), samples=20_000, width=4, condition=5, noise=1.0)
    problem = replace(
        problem, features=problem.features * torch.tensor([0.0, 1, 1, 1])
    )  # the constant feature is not Gaussian
    points = torch.randn(5, 4, generator=seeded(1), dtype=torch.float64) * 3
    for pool, kept in ((2, 1), (8, 2)):
        found = checks.gains(problem, points.unsqueeze(0), pool, kept)
        # rho = E[mean of the b largest of R chi-squares], whatever w
        draws = torch.randn(200_000, pool, generator=seeded(2)).square()
        expected = draws.topk(kept, dim=1).values.mean().item()
        assert found.flatten().tolist() == pytest.approx([expected] * 5, rel=0.05)


ABSOLUTE = Loss(lambda z, y: (z - y).abs(), lambda z, y: (z - y).sign(), lambda z, y: torch.zeros(z.shape), math.inf)
SIGMOID = Loss(
    lambda z, y: torch.sigmoid(-y * z),
    lambda z, y: -y * torch.sigmoid(-y * z) * torch.sigmoid(y * z),
    lambda z, y: torch.zeros(z.shape),
    0.1,
    convex=False,
)


def test_a_loss_that_is_not_smooth_breaks_the_bound_and_the_check_finds_it():
    # The check has teeth: what T1 says of the absolute loss, were it 1-smooth, is false.
    features, targets = torch.ones(2, 1).double(), torch.tensor([-1.0, 1.0]).double() * 1e-3
    zero = torch.zeros(1).double()
    problem = Problem("median", features, targets, ABSOLUTE._replace(max_curvature=1.0), 0.0, zero, zero)
    found = run(problem, eta=0.9, steps=40, seeds=8, generator=seeded(0))
    check = checks.check_run(found)["T1"]
    assert not check.holds
    assert check.measured > 5 * bounds.greedy_bound(1e-6, 40, 0.9, 1.0, 1e-3)


# Crossing and switching off


def test_crossing_of_bounds_is_where_they_are_equal():
    distance2, eta, gain, floor, minimum, smoothness = 4.0, 0.01, 1.8, 3.0, 1.0, 2.0
    step = bounds.crossing_step(distance2, eta, gain, floor, minimum)
    greedy = bounds.greedy_bound(distance2, step, eta, smoothness, floor, gain)
    assert greedy == pytest.approx(bounds.greedy_bound(distance2, step, eta, smoothness, minimum))
    assert bounds.crossing_step(distance2, eta, gain, minimum * gain, minimum) == math.inf
    assert bounds.crossing_step(distance2, eta, 0.9, floor, minimum) == 0


@pytest.mark.parametrize(
    ("greedy", "step"),
    [([3.0, 1.0, 1.0, 1.0], 3), ([3.0, 1.0, 1.0, 0.4], None), ([3.0, 2.5, 2.0, 1.0], None)],
    ids=["behind from there", "ahead at the end", "never ahead"],
)
def test_crossing_is_the_step_after_which_greedy_stays_behind(greedy, step):
    assert crossing.crossing_of(torch.tensor(greedy), torch.tensor([3.0, 2.0, 1.0, 0.5])) == step


def skewed(seed=1, condition=1):
    problem = synthetic(seeded(seed), samples=300, width=10, condition=condition, tail=1.0)
    return problem.started_far(seeded(seed))


def test_greedy_starts_ahead_ends_behind_and_the_mean_path_says_when():
    problem = skewed()
    eta, steps, pool = 0.2 / problem.smoothness, 1500, 4
    paths = [
        problem.objective(crossing.mean_path(problem, eta=eta, steps=steps, pool=pool, until=t)) for t in (None, 0)
    ]
    train = partial(run, problem, eta=eta, steps=steps, seeds=24, generator=seeded(0))
    curves = [problem.objective(each.iterates).mean(dim=1) for each in (train(pool=pool, rule="greedy"), train())]
    predicted = crossing.crossing_of(*paths)
    measured = crossing.crossing_of(*map(crossing.smoothed, curves))
    assert curves[0][30] < curves[1][30]
    assert curves[0][-200:].mean() > curves[1][-200:].mean()
    assert predicted == pytest.approx(measured, rel=0.2)


def test_controller_leaves_greedy_near_the_best_time():
    problem = skewed()
    length, steps, pool, kept = math.sqrt(problem.distance2) / 150, 450, 64, 16
    until = list(range(0, steps + 1, 15))
    swept = crossing.switched_runs(problem, length=length, pool=pool, kept=kept, until=until, seeds=8, seed=0)
    best, times = crossing.best_switch(swept, until, crossing.target_between(swept, problem))
    lived = [
        crossing.live_switch(problem, length=length, steps=steps, pool=pool, kept=kept, every=6, seed=1 + i)[0]
        for i in range(5)
    ]
    found = sorted(steps if off is None else off for off in lived)[2]
    assert abs(found / best - 1) <= 0.2
    assert min(time for time in times if time) < times[0]


def test_switching_at_once_is_uniform_and_never_switching_is_greedy():
    problem = skewed()
    swept = crossing.switched_runs(problem, length=0.01, pool=4, kept=2, until=[0, 10, 30], seeds=3, seed=5, unit=False)
    greedy = run(problem, eta=0.01, steps=30, seeds=3, generator=seeded(5), pool=4, kept=2, rule="greedy")
    uniform = run(problem, eta=0.01, steps=30, seeds=3, generator=seeded(5), pool=4, kept=2)
    assert torch.allclose(swept[:, 2], problem.objective(greedy.iterates).mean(dim=1))
    assert torch.allclose(swept[:, 0], problem.objective(uniform.iterates).mean(dim=1))
    switched = run(
        problem,
        eta=0.01,
        steps=30,
        seeds=3,
        generator=seeded(5),
        pool=4,
        kept=2,
        rule="greedy",
        until=10,
    )
    assert torch.allclose(swept[:, 1], problem.objective(switched.iterates).mean(dim=1))


@many
@given(
    gain=st.floats(1.01, 5),
    minimum=st.floats(0.01, 2),
    excess=st.floats(0.01, 5),
    share=st.floats(0.01, 0.99),
    loss=st.floats(0.01, 20),
)
def test_switch_level_is_where_the_guaranteed_decrease_of_greedy_is_uniforms(gain, minimum, excess, share, loss):
    floor = minimum + excess
    level = (floor - minimum) / ((gain - 1) * (1 - share))  # T8, with L eta = share
    greedy = (1 - share) * gain * loss - floor
    uniform = (1 - share) * loss - minimum
    assert (greedy > uniform) == (loss > level) or loss == pytest.approx(level)


# Linear networks


def test_no_spread_passes_inputs_on_and_the_last_exit_is_the_network():
    maps = linear.exit_errors(seeded(0), depth=5, width=8, spread=0.0, outputs=3)
    assert torch.allclose(maps, maps[-1].expand_as(maps), atol=1e-12)
    turned = linear.exit_errors(seeded(0), depth=5, width=8, spread=0.5, outputs=3)
    found = linear.measure_agreement(turned[-1], turned[-1], 8, 4, 50, seeded(1))
    assert (found.argmax, found.overlap) == (1.0, 1.0)


@laws
@given(seed=seeds_of, spread=st.floats(0, 0.6), pool=st.integers(2, 12), depth=st.integers(1, 6))
def test_t6_of_squares_is_exact_for_one_output(seed, spread, pool, depth):
    generator = seeded(seed)
    maps = linear.exit_errors(generator, depth=depth, width=8, spread=spread)
    at = maps[depth // 2]
    found = linear.measure_agreement(at, maps[-1], pool, 1, 2000, generator)
    predicted = bounds.agreement(linear.direction_correlation(at, maps[-1]), pool, squares=True)
    assert checks.equal(found.argmax, predicted, found.argmax_error, slack=1e-3).holds


@laws
@given(seed=seeds_of, outputs=st.integers(1, 12))
def test_loss_correlation_is_that_of_the_losses(seed, outputs):
    maps = linear.exit_errors(seeded(seed), depth=3, width=10, spread=0.3, outputs=outputs)
    x = torch.randn(60_000, 10, generator=seeded(seed), dtype=torch.float64)
    losses = torch.stack([(x @ m.T).square().sum(dim=1) for m in (maps[1], maps[-1])])
    assert torch.corrcoef(losses)[0, 1].item() == pytest.approx(linear.loss_correlation(maps[1], maps[-1]), abs=0.04)


# Bad input


@pytest.mark.parametrize(("loss", "reason"), [(ABSOLUTE, "not smooth"), (SIGMOID, "not convex")])
def test_bounds_refuse_what_is_not_smooth_or_not_convex_with_the_reason(loss, reason):
    with pytest.raises(ValueError, match=reason):
        make_problem("x", torch.ones(3, 1), torch.ones(3), loss, ridge=0.1)


PROBLEM = synthetic(seeded(0))
TRAIN = partial(run, PROBLEM, eta=0.01, steps=2, seeds=1, generator=seeded(0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: TRAIN(pool=0), "R = 0"),
        (lambda: TRAIN(pool=2, kept=3), "b = 3 of R = 2"),
        (lambda: TRAIN(eta=0.0), "eta > 0"),
        (lambda: TRAIN(steps=0), "steps >= 1"),
        (lambda: runs.multiplicative(1.0), r"\[0, 1\)"),
        (lambda: runs.additive(-1.0), "at least 0"),
        (lambda: runs.correlated(1.5), r"\[-1, 1\]"),
        (lambda: runs.early_exit(0), "at least one feature"),
        (lambda: bounds.greedy_bound(1, 10, 1.0, 1.0, 0, 1), "L eta = 1"),
        (lambda: bounds.greedy_bound(1, 10, 0.5, math.inf, 0, 1), "finite smoothness"),
        (lambda: bounds.greedy_bound(-1, 0, 0.5, 1.0, -1, 0), "D.2.*K must.*floor.*gain"),
        (lambda: bounds.multiplicative_gain(2.0, 1.0), r"\[0, 1\)"),
        (lambda: bounds.agreement(1.01, 2), r"\[-1, 1\]"),
        (lambda: bounds.agreement(0.5, 0, squares=True), "R = 0"),
        (lambda: bounds.normal_choice(2, 3), "b = 3 of R = 2"),
        (lambda: bounds.kept_overlap(0.5, 0.0), r"\(0, 1\]"),
        (lambda: checks.check_run(TRAIN(eta=2 / PROBLEM.smoothness)), "eta < 1 / L"),
        (lambda: synthetic(seeded(0), condition=0.5), "condition >= 1"),
        (lambda: synthetic(seeded(0), kind="cubic"), "among"),
        (lambda: bundled("titanic"), "among"),
        (lambda: make_problem("x", torch.ones(3, 1), torch.ones(2), LOSSES["squared"]), r"\(n, d\)"),
        (lambda: make_problem("x", torch.ones(2, 1), torch.tensor([1.0, math.nan]), LOSSES["squared"]), "finite"),
        (lambda: make_problem("x", torch.tensor([[1.0], [-1]]), torch.tensor([1.0, -1]), LOSSES["logistic"]), "ridge"),
        (lambda: linear.exit_errors(seeded(0), depth=0, width=2, spread=0.1), "depth"),
    ],
)
def test_bad_input_is_refused_with_what_was_expected_and_received(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# The command


@pytest.fixture(scope="module")
def findings():
    return run_experiments([], lambda name, share: None, results=RESULTS, effort=0.05)


def test_every_experiment_finds_no_violation_and_has_figures_and_tables(findings):
    assert [each.name for each in findings] == list(EXPERIMENTS)
    instances = findings[0].tables[0]
    assert {row[2] for row in instances.rows} == {0}
    assert {name.partition(":")[0].split(" ")[0].rstrip("+") for name, *_ in instances.rows} >= {
        f"T{i}" for i in range(1, 8)
    }
    for each in findings:
        assert each.traces
        assert all(len(row) == len(table.headers) for table in each.tables for row in table.rows)


def test_command_writes_page_pictures_and_numbers_that_are_the_same_again(tmp_path, capsys):
    for folder in ("first", "second"):
        arguments = ["theory", "payoff", "--results", str(RESULTS), "--out", str(tmp_path / folder)]
        assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "break-even gain" in printed.lower()
    html = (tmp_path / "first" / "theory.html").read_text()
    measured = [json.loads(path.read_text()) for path in RESULTS.glob("compare_*.json")]
    scores = (("sift", "score_1"), ("sift-entropy", "entropy_1"))
    tables = json.loads((tmp_path / "first" / "theory.json").read_text())["findings"]["payoff"]["tables"]
    rows = next(table["rows"] for title, table in tables.items() if title.startswith("Measured workloads"))
    assert len(rows) == sum(
        name in results["arms"] and cost in results["operations_ms"] for results in measured for name, cost in scores
    )
    placed = [row for row in rows if row[4] is not None]  # an exit that ranks at random has no place in the map
    assert html.count('class="dot"') == len(placed) > 10
    assert "<script" not in html
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {".earlysift.json", "theory.html", "theory.json", "curves.json", "payoff.png", "payoff.svg"}
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert json.loads((tmp_path / "first" / "theory.json").read_text())["findings"]["payoff"]["tables"]
    assert cli.main(["theory", "payoff", "--seed", "1", "--out", str(tmp_path / "third")]) == 0
    assert (tmp_path / "first" / "theory.json").read_bytes() != (tmp_path / "third" / "theory.json").read_bytes()


def test_findings_are_not_written_among_files_of_others(tmp_path, capsys):
    (tmp_path / "theory.html").write_text("my thesis")
    assert cli.main(["theory", "payoff", "--out", str(tmp_path)]) == 2
    assert "holds files that earlysift theory did not write" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["my thesis"]


@pytest.mark.parametrize(
    ("arguments", "message"), [(["nothing"], "Expected experiments among"), (["payoff", "--results", "."], "compare_")]
)
def test_command_refuses_bad_input_in_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["theory", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_payoff_of_the_map_is_that_of_costs(findings):
    table = next(
        table for each in findings if each.name == "payoff" for table in each.tables if "Break-even" in table.title
    )
    for keep, depth, cost, *needed in table.rows:
        assert cost == pytest.approx(costs.relative_cost(1 / 3, 0.04 + 0.96 * depth / 12, keep))
        for r, gain in zip((0.5, 0.9, 1.0), needed, strict=True):
            assert costs.payoff(costs.approximate_gain(gain, r), cost) == pytest.approx(1)


@pytest.mark.parametrize("width", [390, 1200])
def test_browser_shows_the_page_whole_without_sideways_scrolling(browser, findings, tmp_path, width):
    page_file = tmp_path / "theory.html"
    page_file.write_text(page.render(findings, "test"), encoding="utf-8")
    with opened(browser, page_file.as_uri(), width) as shown:
        assert shown.locator("h1").is_visible()
        charts = shown.locator(".chart > svg:visible").all()
        assert len(charts) >= len(EXPERIMENTS)
        for chart in charts:
            assert chart.bounding_box()["width"] > 0.6 * min(width, 1100)
        assert shown.evaluate("document.documentElement.scrollWidth") == width


def test_a_stop_ends_the_command_with_130_and_leaves_no_page(tmp_path, capsys):
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # as `python -m earlysift` does
    timer = threading.Timer(2.0, _thread.interrupt_main, [signal.SIGTERM])
    timer.start()
    try:
        assert cli.main(["theory", "--out", str(tmp_path / "out")]) == 130  # it takes minutes
    finally:
        timer.cancel()
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.endswith("stopped before anything was measured.\n")
    assert not (tmp_path / "out").exists()
