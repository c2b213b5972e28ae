import itertools
import statistics

import pytest

from earlysift.compare.verdict import compare_arms, paired_interval, time_to_target, verdict


def curve(*accuracies):
    return [
        {"reference_s": 10.0 * i, "wall_s": 11.0 * i, "accuracy": accuracy, "loss": 5 - accuracy}
        for i, accuracy in enumerate(accuracies)
    ]


def run(seed, *accuracies):
    points = curve(*accuracies)
    return {
        "seed": seed,
        "curve": points,
        "final_accuracy": points[-1]["accuracy"],
        "final_loss": points[-1]["loss"],
        "finished": True,
    }


def results_of(uniform, sift, target=None):
    arms = {
        "uniform": {"label": "uniform", "runs": [run(i, *a) for i, a in enumerate(uniform)]},
        "sift": {"label": "SIFT", "runs": [run(i, *a) for i, a in enumerate(sift)]},
    }
    return {"arms": arms, **compare_arms(arms, target)}


def test_time_to_target_interpolates_between_the_evaluations_around_it():
    assert time_to_target(curve(0.0, 0.2, 0.4), 0.3) == pytest.approx(15.0)
    assert time_to_target(curve(0.0, 0.2, 0.4), 0.3, "wall_s") == pytest.approx(16.5)


def test_target_never_reached_has_no_time():
    assert time_to_target(curve(0.0, 0.2), 0.3) is None


def test_target_reached_at_the_first_evaluation_costs_its_time():
    assert time_to_target(curve(0.5, 0.6), 0.3) == 0.0


def test_target_is_what_uniform_reaches_on_the_same_seed():
    results = results_of([(0.0, 0.2), (0.0, 0.4)], [(0.0, 0.4), (0.0, 0.4)])
    assert results["target"]["accuracy"] == pytest.approx(0.3)
    assert [r["reference_s_to_target"] for r in results["arms"]["sift"]["runs"]] == pytest.approx([5.0, 10.0])


def test_given_target_is_used_for_every_seed():
    results = results_of([(0.0, 0.2)], [(0.0, 0.4)], target=0.1)
    assert results["target"] == {"accuracy": 0.1, "source": "given"}
    assert results["comparison"]["sift"]["speedup"] == pytest.approx(2.0)


def test_interval_over_three_seeds_enumerates_all_27_resamples():
    values = [1.0, 2.0, 4.0]
    means = sorted(statistics.fmean(s) for s in itertools.product(values, repeat=3))
    assert len(means) == 27
    low, high = paired_interval(values, statistics.fmean)
    assert means[0] <= low < statistics.fmean(values) < high <= means[-1]


def test_fewer_than_three_seeds_have_no_interval():
    assert paired_interval([1.0, 2.0], statistics.fmean) is None


def test_interval_over_many_seeds_is_the_same_twice_and_covers_the_mean():
    values = [1.0 + 0.01 * i for i in range(8)]
    first = paired_interval(values, statistics.fmean)
    assert first == paired_interval(values, statistics.fmean)
    assert first[0] < statistics.fmean(values) < first[1]


def test_gain_needs_three_seeds_and_an_interval_above_one():
    uniform = [(0.0, 0.2)] * 3
    assert verdict(results_of(uniform, [(0.0, 0.4)] * 3)).startswith("Gain:")
    assert verdict(results_of(uniform[:2], [(0.0, 0.4)] * 2)).startswith("Not proved:")
    mixed = [(0.0, 0.2), (0.0, 0.2, 0.2), (0.1, 0.2)]
    assert verdict(results_of(uniform, mixed)).startswith("No gain shown:")


def test_a_seed_that_misses_the_target_makes_it_no_gain():
    sentence = verdict(results_of([(0.0, 0.2)] * 3, [(0.0, 0.4), (0.0, 0.4), (0.0, 0.1)]))
    assert sentence.startswith("No gain:")
    assert "2 of 3 seeds" in sentence


def test_no_speedup_is_given_unless_every_seed_reached_the_target():
    results = results_of([(0.0, 0.2)] * 3, [(0.0, 0.4), (0.0, 0.4), (0.0, 0.1)])
    assert results["comparison"]["sift"]["speedup"] is None
    assert results["comparison"]["sift"]["reached"] == 2


def test_verdict_of_a_run_stopped_early_says_so():
    assert verdict({"arms": {}}).startswith("No verdict")
