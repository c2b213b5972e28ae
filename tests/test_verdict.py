import itertools
import json
import math
import random
import re
import statistics
from pathlib import Path

import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.isotonic import IsotonicRegression

from earlysift.compare.arms import ARMS
from earlysift.compare.verdict import (
    budget_to_decide,
    budget_to_learn,
    compare_arms,
    judged,
    overall_verdict,
    paired_interval,
    ratio_interval,
    rising,
    t_quantile,
    time_to_target,
)
from earlysift.control import Control
from earlysift.controller import ENOUGH, next_probe
from earlysift.report.tables import outcome


def curve(*accuracies):
    return [
        {"step": 5 * i, "reference_s": 10.0 * i, "wall_s": 11.0 * i, "accuracy": accuracy, "loss": 5 - accuracy}
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


def covered(interval, values_of, count, truth, repetitions):
    """Share of repeated experiments whose interval holds the truth."""
    generator = random.Random(0)
    held = 0
    for _ in range(repetitions):
        low, high = interval(values_of(generator, count))
        held += low <= truth <= high
    return held / repetitions


def normal(generator, count):
    return [generator.gauss(0.5, 2.0) for _ in range(count)]


def log_normal(generator, count):
    return [math.exp(generator.gauss(0.1, 0.2)) for _ in range(count)]


@pytest.mark.parametrize("count", [3, 5])
def test_interval_over_few_seeds_covers_what_it_claims(count):
    assert 0.94 < covered(paired_interval, normal, count, 0.5, 20_000) < 0.96
    assert 0.94 < covered(ratio_interval, log_normal, count, math.exp(0.1), 20_000) < 0.96


def percentile_bootstrap(values):
    """What stood here before: the middle 95 % of the means of all resamples."""
    means = [statistics.fmean(sample) for sample in itertools.product(values, repeat=len(values))]
    cuts = statistics.quantiles(means, n=40, method="inclusive")
    return cuts[0], cuts[-1]


def test_the_check_of_coverage_finds_an_interval_that_is_too_short():
    assert covered(percentile_bootstrap, normal, 3, 0.5, 2_000) < 0.75


def test_quantiles_of_student_are_those_of_scipy():
    for degrees in (1, 2, 3, 4, 5, 6, 9, 10, 31, 100, 1001):
        assert t_quantile(degrees) == pytest.approx(scipy.stats.t.ppf(0.975, degrees), rel=1e-9)


@given(st.lists(st.floats(-10, 10), min_size=3, max_size=8))
def test_interval_of_the_mean_is_that_of_scipy(values):
    assume(statistics.stdev(values) > 1e-6)
    error = scipy.stats.sem(values)
    theirs = scipy.stats.t.interval(0.95, len(values) - 1, loc=statistics.fmean(values), scale=error)
    assert paired_interval(values) == pytest.approx(theirs, rel=1e-9, abs=1e-9)


def test_interval_of_a_ratio_treats_twice_and_half_as_fast_alike():
    ratios = [0.8, 1.1, 1.3]
    low, high = ratio_interval(ratios)
    assert low < statistics.geometric_mean(ratios) < high
    assert ratio_interval([1 / ratio for ratio in ratios]) == pytest.approx((1 / high, 1 / low))


@pytest.mark.parametrize("count", [3, 5, 20])
def test_equal_values_have_an_interval_without_width(count):
    low, high = paired_interval([0.1] * count)
    assert low == high == pytest.approx(0.1)
    assert ratio_interval([1.0] * count) == (1.0, 1.0)
    low, high = ratio_interval([0.99] * count)
    assert low == high == pytest.approx(0.99)


def test_fewer_than_three_seeds_have_no_interval():
    assert paired_interval([1.0, 2.0]) is None
    assert ratio_interval([1.0, 2.0]) is None


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
    assert sentence.startswith(
        "Harm: SIFT ended 5.00 points below uniform training at equal cost (95 % interval -5.00 points to -5.00 points "
        "over 3 seeds; it "
    )
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


# Arms that are not judged, and why.

LEARNT = (0.0, 0.1, 0.3, 0.4)


def with_arm(name, runs, uniform=None, **given):
    """What is said of an arm beside uniform training that learnt, on three seeds."""
    arms = {
        "uniform": {"label": "uniform", "runs": uniform or [run(seed, *LEARNT) for seed in range(3)]},
        name: {"label": f"the {name}", "runs": runs},
    }
    return compare_arms(arms, None, 0.95, **given)["comparison"][name]


def test_an_arm_whose_curves_are_uniforms_on_every_seed_never_acted():
    entry = with_arm("mine", [run(seed, *LEARNT) for seed in range(3)])
    assert outcome(entry).word == "never acted"
    assert entry["verdict"] == "Never acted: the mine took the same steps as uniform training on 3 seeds."


@pytest.mark.parametrize("quantity", ["step", "accuracy", "loss"])
def test_an_arm_whose_curve_differs_from_uniforms_in_one_number_on_one_seed_has_acted(quantity):
    runs = [run(seed, *LEARNT) for seed in range(3)]
    runs[1]["curve"][2][quantity] += 1e-6
    assert outcome(with_arm("mine", runs)).word != "never acted"


@pytest.mark.parametrize("name", [name for name, arm in ARMS.items() if arm.idle])
def test_a_known_arm_that_never_acted_says_why(name):
    assert with_arm(name, [run(seed, *LEARNT) for seed in range(3)])["verdict"].endswith(f"3 seeds: {ARMS[name].idle}.")


def test_the_overall_verdict_is_not_that_of_an_arm_that_never_acted_if_another_did():
    idle, acted = with_arm("mine", [run(0, *LEARNT)]), with_arm("other", [run(0, 0.0, 0.2, 0.35, 0.41)])
    assert overall_verdict({"comparison": {"mine": idle, "other": acted}}) == acted["verdict"]
    assert overall_verdict({"comparison": {"mine": idle}}) == idle["verdict"]


def test_uniform_training_alone_is_no_comparison():
    assert overall_verdict({"comparison": {}}) == "No verdict: no arm beside uniform training has finished."


def auto_run(seed, *steps_of_probes, switched=False):
    """Of 15 steps."""
    control = [{"step": step, "reference_s": 2.0 * step} for step in steps_of_probes]
    return run(seed, *LEARNT) | {"control": control, "events": [{"step": 5}] if switched else []}


def test_auto_with_fewer_probes_than_a_decision_needs_could_not_decide():
    entry = with_arm("auto", [auto_run(seed, 3) for seed in range(3)], probe_ms=50.0)
    assert outcome(entry).word == "could not decide"
    assert entry["verdict"] == (
        f"Could not decide: the auto trained uniformly on 3 seeds, with 1 of the {ENOUGH} probes that a decision "
        f"needs; give at least {budget_to_decide(50.0):g} s."
    )
    assert "at least" not in with_arm("auto", [auto_run(seed) for seed in range(3)])["verdict"]


def test_advice_on_a_budget_in_steps_is_in_steps():
    half_as_many_as_seconds = [run(seed, 0.0, 0.02) for seed in range(3)]
    for each in half_as_many_as_seconds:
        each["steps"] = each["curve"][-1]["reference_s"] / 2
    told = with_arm("mine", half_as_many_as_seconds, half_as_many_as_seconds, baseline=0.06, in_steps=True)["verdict"]
    seconds = budget_to_learn(half_as_many_as_seconds[0]["curve"], 0.06)
    assert told.endswith(f"give at least {seconds / 2:g} steps.")


def test_auto_that_had_the_probes_on_a_seed_or_switched_on_one_is_judged():
    few = [auto_run(seed, 3) for seed in range(2)]
    for third in (auto_run(2, 3, 6, 9), auto_run(2, 3, switched=True)):
        assert outcome(with_arm("auto", [*few, third])).word == "no gain"


@pytest.mark.parametrize("probe_ms", [20.0, 100.0, 700.0])
def test_the_budget_that_is_asked_for_lets_auto_decide_and_one_much_smaller_does_not(probe_ms):
    step_ms = 10.0

    def probes(budget_s):
        control = Control(total_steps=round(budget_s * 1e3 / step_ms))
        step, count = 0, 0
        while (step := next_probe(step, control, {"train": step_ms, "probe": probe_ms})) < (
            control.end_share * control.total_steps
        ):
            count += 1
        return count

    assert probes(budget_to_decide(probe_ms)) >= ENOUGH > probes(0.8 * budget_to_decide(probe_ms))


def test_where_uniform_training_learnt_nothing_there_is_no_verdict_on_any_arm():
    plateau = [run(seed, 0.0, 0.02, 0.05, 0.04) for seed in range(3)]
    better = [run(seed, 0.0, 0.2, 0.3, 0.4) for seed in range(3)]
    for name in ("auto", "sift"):
        for runs in (better, plateau):
            entry = with_arm(name, runs, plateau, baseline=0.05)
            assert outcome(entry).word == "no verdict"
            assert entry["speedup"] is entry["low"] is None
            assert entry["verdict"] == (
                "No verdict: nothing was learnt in this budget, as uniform training did not beat a model that ignores "
                "its input (5.0% accuracy) on 3 of 3 seeds; give at least 60 s."
            )


def test_one_seed_without_learning_is_enough_for_no_verdict_as_its_target_means_nothing():
    uniform = [run(0, *LEARNT), run(1, *LEARNT), run(2, 0.0, 0.01, 0.01, 0.02)]
    entry = with_arm("sift", [run(seed, *LEARNT) for seed in range(3)], uniform, baseline=0.05)
    assert "on 1 of 3 seeds" in entry["verdict"]
    assert outcome(with_arm("sift", [run(0, 0.0, 0.01, 0.01, 0.02)], baseline=0.05)).word != "no verdict"


def test_where_uniform_training_diverged_the_learning_rate_is_named_and_no_budget():
    uniform = [run(seed, *LEARNT) for seed in range(2)]
    uniform[1]["final_loss"] = None
    entry = with_arm("sift", [run(seed, 0.0, 0.2, 0.4, 0.5) for seed in range(2)], uniform)
    assert outcome(entry).word == "no verdict"
    assert "on 1 of 2 seeds; give a smaller learning rate" in entry["verdict"]


def test_the_budget_to_learn_grows_with_what_is_lacking_and_stays_between_two_and_ten_budgets():
    assert budget_to_learn(curve(0.0, 0.02), 0.02) == 20.0
    assert budget_to_learn(curve(0.0, 0.02), 0.06) == 30.0
    assert budget_to_learn(curve(0.0, 0.02), 0.9) == 100.0
    assert budget_to_learn(curve(0.02, 0.02), 0.05) == 100.0
    assert budget_to_learn(curve(0.0, 0.9, 0.02), 0.4) is None  # the rising fit ends above
    assert budget_to_learn(curve(0.0, 0.02), 0.01) is None


@pytest.mark.parametrize(
    ("accuracies", "words"),
    [
        ((0.0, 0.4, 0.41), "was as fast as uniform training to the target accuracy of 40.0%"),
        ((0.0, 0.396, 0.44), "was 8 % slower than uniform training to the target"),
        ((0.0, 0.44, 0.44), "was 10 % faster than uniform training to the target"),
        ((0.0, 0.84, 0.84), "reached the target accuracy of 40.0% 2.1 times as fast as uniform training"),
        ((0.0, 0.2, 0.4), "took 2.0 times as long as uniform training to the target accuracy of 40.0%"),
    ],
)
def test_how_fast_an_arm_was_is_said_in_plain_words(accuracies, words):
    sentence = verdict(results_of([(0.0, 0.4, 0.4)], [accuracies], 0.4))
    assert words in sentence
    assert not re.search("sooner|later|[01]\\.[0-9][0-9] times", sentence)


def test_committed_results_are_judged_by_the_present_rules_and_nothing_else_changes():
    folder = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
    for path in folder.glob("compare_*.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        stored = results["comparison"]
        fresh = judged(results)
        assert set(fresh["comparison"]) == set(stored)
        for name, entry in fresh["comparison"].items():
            same = [
                [(point["step"], point["accuracy"], point["loss"]) for point in run["curve"]]
                for arm in (name, "uniform")
                for run in results["arms"][arm]["runs"]
            ]
            count = len(same) // 2
            assert (outcome(entry).word == "never acted") == (name != "auto" and same[:count] == same[count:])
            assert entry["final_accuracy_difference"] == pytest.approx(stored[name]["final_accuracy_difference"])
            if entry["withheld"] != "no verdict":
                assert entry["speedup"] == pytest.approx(stored[name]["speedup"])
