"""What records promise: medians over the latest, against the same sums by hand and workloads known by construction."""

import math
from statistics import median

import pytest
import torch

from earlysift.control import Control
from earlysift.controller import ENOUGH, TAKE
from earlysift.payoffs import LATEST, estimates
from earlysift.probes import record
from probing import CHEAP, FREE, ONE, UNBIASED, easy_heavy, noisy, plateau, probe_of, run, seeded

INF = float("inf")


def test_identical_gradients_leave_nothing_to_gain():
    gradients = torch.ones(16, 4, dtype=torch.float64)
    numbers = run(lambda seed: probe_of(gradients, torch.rand(16, generator=seeded(seed))), 3, prices=FREE)[-1].numbers
    assert numbers["progress.1.0.5"] == pytest.approx(1)
    assert 0.95 < numbers["payoff_T7.1.0.5"] < 1
    assert numbers["noise_scale"] == pytest.approx(0)


def test_payoffs_are_gains_and_moments_over_cost_in_the_median():
    records = [record(easy_heavy(seed), 32, Control(depths=(1,))) for seed in range(5)]
    control = Control(depths=(1,))
    dear = estimates(records, control, {**CHEAP, "score_1": 40.0}, 0.5)
    for keep in control.keeps:
        cost, pair = dear[f"cost.1.{keep:g}"], f"1.{keep:g}"
        assert cost == pytest.approx(1 + 40 / 100 * 0.5 / keep)  # a larger keep scores a smaller part of the pool
        latest = records[-LATEST:]
        gain = median(entry[f"gain.{pair}"] for entry in latest)
        moment = median(entry[f"unbiased.{pair}.length2"] / entry["uniform.length2"] for entry in latest)
        assert dear[f"payoff_C2.{pair}"] == pytest.approx(gain / cost)
        assert dear[f"payoff_T7.{pair}"] == pytest.approx(1 / (moment * cost))
        along, uniform = (
            sum(entry[f"{of}.signal"] / math.sqrt(entry[f"{of}.length2"]) for entry in records)
            for of in (f"greedy.{pair}", "uniform")
        )
        assert dear[f"progress.{pair}"] == pytest.approx(along / uniform)


def test_of_records_before_the_latest_three_only_progress_and_their_number_are_left():
    latest = [record(easy_heavy(seed), 32, ONE) for seed in range(LATEST)]
    early = [record(plateau(seed), 32, ONE) for seed in range(LATEST)]
    alone, after = (estimates(records, ONE, CHEAP, 0.5) for records in (latest, [*early, *latest]))
    assert LATEST == 3
    assert {name for name in alone if alone[name] != after[name]} == {"progress.1.0.5", "records"}
    assert after["progress.1.0.5"] < alone["progress.1.0.5"]


@pytest.mark.parametrize("prices", [FREE, CHEAP])
def test_payoff_by_variance_is_of_gradients_and_not_of_losses(prices):
    heavy = torch.full((64,), 0.01)
    heavy[::8] = 2.0
    same = torch.eye(64, dtype=torch.float64)  # noise: what is large is the loss, no gradient is
    carrying = same * heavy.unsqueeze(1)
    noise, learnt = (run(lambda _, g=g: probe_of(g, heavy), 3, prices=prices)[-1] for g in (same, carrying))
    assert noise.numbers["concentration"] == learnt.numbers["concentration"] > 7
    assert noise.numbers["payoff_T7.1.0.5"] < 1 < TAKE.variance < learnt.numbers["payoff_T7.1.0.5"]
    assert (noise.state.choice, learnt.state.choice) == (None, UNBIASED)


def test_one_probe_that_deceives_does_not_decide():
    usual, odd = ([record(easy_heavy(seed), 32, ONE) for seed in range(4)], record(easy_heavy(9), 32, ONE))
    numbers = estimates(usual, ONE, CHEAP, 0.5)
    misled = estimates([*usual, {name: 1e6 * value for name, value in odd.items()}], ONE, CHEAP, 0.5)
    for name in ("payoff_C2.1.0.5", "correlation.1", "concentration"):
        assert misled[name] == pytest.approx(numbers[name], rel=0.5)


def test_progress_is_how_far_a_step_of_given_length_goes_along_the_mean_gradient():
    # Known by construction: an eighth of the gradients are a direction of length 1 and noise of length 6, others zero.
    rows, kept = 1024, 512
    numbers = run(lambda seed: easy_heavy(seed, rows), ENOUGH, prices=FREE)[-1].numbers
    hard, share = rows / 8, 1 / 8
    greedy = (hard / kept) / math.sqrt((hard / kept) ** 2 + 36 * hard / kept**2)
    uniform = share / math.sqrt(share**2 + (37 * share - share**2) / kept)
    assert numbers["progress.1.0.5"] == pytest.approx(greedy / uniform, rel=0.05)


def test_noise_scale_is_that_of_the_gradients():
    # Trace of the covariance over the squared mean gradient: 16 / 4.
    numbers = run(lambda seed: probe_of(noisy(512, seeded(seed), along=2.0), torch.ones(512)), 4)[-1].numbers
    assert numbers["noise_scale"] == pytest.approx(4, rel=0.1)


def test_what_a_uniform_step_cannot_see_no_choice_is_said_to_do_better():
    gradients = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)  # the mean of the others points back
    numbers = run(lambda _: probe_of(gradients, torch.tensor([4.0, 1.0, 3.0, 2.0])), 3)[-1].numbers
    assert numbers["progress.1.0.5"] == 0
    assert numbers["noise_scale"] == INF
