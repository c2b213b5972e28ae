import itertools
import statistics

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from earlysift.compare.verdict import compare_arms, overall_verdict, paired_interval, rising, time_to_target


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


def results_of(uniform, sift, target=None, *, share=1.0, charged=True):
    arms = {
        "uniform": {"label": "uniform", "runs": [run(i, *a) for i, a in enumerate(uniform)]},
        "sift": {"label": "SIFT", "charged": charged, "runs": [run(i, *a) for i, a in enumerate(sift)]},
    }
    return {"arms": arms, **compare_arms(arms, target, share)}


def verdict(results, arm="sift"):
    return results["comparison"][arm]["verdict"]


def test_time_to_target_interpolates_between_the_evaluations_around_it():
    assert time_to_target(curve(0.0, 0.2, 0.4), 0.3) == pytest.approx(15.0)
    assert time_to_target(curve(0.0, 0.2, 0.4), 0.3, "wall_s") == pytest.approx(16.5)


def test_one_lucky_evaluation_does_not_reach_a_target():
    assert time_to_target(curve(0.0, 0.35, 0.1, 0.3), 0.3) == pytest.approx(30.0)
    assert time_to_target(curve(0.0, 0.35, 0.2, 0.1), 0.3) is None


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_rising_fit_is_isotonic_regression(values):
    fitted = rising(values)
    assert fitted == sorted(fitted)
    twin = IsotonicRegression().fit_transform(range(len(values)), values)
    assert fitted == pytest.approx(twin.tolist(), abs=1e-9)


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


def test_target_is_a_share_of_what_uniform_reaches():
    results = results_of([(0.0, 0.2, 0.2)], [(0.0, 0.1, 0.2)], share=0.5)
    assert results["target"]["accuracy"] == pytest.approx(0.1)
    assert "50%" in results["target"]["source"]
    assert results["comparison"]["sift"]["speedup"] == pytest.approx(0.5)


def test_wall_time_has_a_ratio_and_an_interval_of_its_own():
    results = results_of([(0.0, 0.2)] * 3, [(0.0, 0.4), (0.0, 0.3), (0.0, 0.4)])
    for run_of_sift in results["arms"]["sift"]["runs"]:
        for point in run_of_sift["curve"]:
            point["wall_s"] *= 4
    entry = compare_arms(results["arms"], None, 1.0)["comparison"]["sift"]
    for ours, theirs in (("speedup", "wall_speedup"), ("low", "wall_low"), ("high", "wall_high")):
        assert entry[theirs] == pytest.approx(entry[ours] / 4)


def test_harm_is_said_when_the_final_accuracy_is_surely_lower_even_if_the_target_came_sooner():
    uniform = [(0.0, 0.2, 0.3, 0.4)] * 3
    sentence = verdict(results_of(uniform, [(0.0, 0.35, 0.35, 0.35)] * 3, 0.3))
    assert sentence.startswith("Harm:")
    assert "-5.00 points" in sentence
    assert "1.5" in sentence or "2." in sentence
    assert not verdict(results_of(uniform[:2], [(0.0, 0.35)] * 2, 0.3)).startswith("Harm:")
    mixed = [(0.0, 0.35), (0.0, 0.45), (0.0, 0.35)]
    assert not verdict(results_of(uniform, mixed, 0.3)).startswith("Harm:")


def test_verdict_of_an_arm_that_is_not_charged_says_so():
    sentence = verdict(results_of([(0.0, 0.2)] * 3, [(0.0, 0.4)] * 3, charged=False))
    assert "upper bound" in sentence
    assert "all costs charged" not in sentence


def test_a_target_that_untrained_models_meet_gives_no_infinite_ratio():
    entry = results_of([(0.5, 0.6)], [(0.5, 0.6)], 0.4)["comparison"]["sift"]
    assert entry["speedup"] == pytest.approx(1.0)


def test_overall_verdict_is_that_of_auto_then_sift_then_the_first():
    arms = {name: {"verdict": name} for name in ("exact", "sift", "auto")}
    assert overall_verdict({"comparison": arms}) == "auto"
    del arms["auto"]
    assert overall_verdict({"comparison": arms}) == "sift"
    del arms["sift"]
    assert overall_verdict({"comparison": arms}) == "exact"


def test_runs_are_paired_by_seed_and_seeds_that_uniform_lacks_do_not_count():
    arms = {
        "uniform": {"label": "uniform", "runs": [run(1, 0.0, 0.2), run(2, 0.0, 0.4)]},
        "sift": {"label": "SIFT", "runs": [run(0, 0.0, 0.9), run(2, 0.0, 0.4), run(1, 0.0, 0.4)]},
    }
    entry = compare_arms(arms, None, 1.0)["comparison"]["sift"]
    assert entry["seeds"] == 2
    assert entry["final_accuracy_difference"] == pytest.approx(0.1)
    assert entry["speedup"] == pytest.approx(2**0.5)


def test_verdict_of_a_run_stopped_early_says_so():
    assert compare_arms({}, None, 1.0) == {"target": None, "comparison": {}}
    assert overall_verdict({"comparison": {}}).startswith("No verdict")
