"""docs/results.md: what it says of arms that never acted, of auto without probes, and of what scoring was charged."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ACCURACIES = {
    "uniform": (0.0, 0.4, 0.5),
    "infobatch": (0.0, 0.4, 0.5),
    "exact": (0.0, 0.3, 0.51),
    "auto": (0.0, 0.4, 0.5),
}


def run(seed, accuracies, **more):
    curve = [
        {"step": 50 * i, "reference_s": 5.0 * i, "wall_s": 6.0 * i, "accuracy": value, "loss": 2 - value}
        for i, value in enumerate(accuracies)
    ]
    spent_s = {"read": 0.1, "score": 0.0, "probe": 0.0, "train": 9.9}
    return {
        **{
            "seed": seed,
            "finished": True,
            "steps": 100,
            "curve": curve,
            "spent_s": spent_s,
            "control": [],
            "events": [],
        },
        **{"final_accuracy": accuracies[-1], "final_loss": 2 - accuracies[-1]},
        **more,
    }


@pytest.fixture
def results(results_page):
    """Three seeds; InfoBatch never acts, exact loss scores 100 pools of 100 steps, auto has a probe."""
    made = {
        "config": {"budget": 10.0, "seeds": 3, "target": None, "target_share": 0.95},
        "data": {"name": "letters"},
        "baseline": {"accuracy": 0.1, "loss": 2.0},
        "operations_ms": {"probe": {"median": 150.0}},
        "measured_ms": {},
        "arms": {
            name: {"label": name, "charged": True, "runs": [run(seed, accuracies) for seed in range(3)]}
            for name, accuracies in ACCURACIES.items()
        },
    }
    for one in made["arms"]["auto"]["runs"]:
        one["control"] = [{"step": 30, "reference_s": 3.0}]
        one["spent_s"] = {"read": 0.1, "score": 0.0, "probe": 0.1, "train": 9.8}
    for one in made["arms"]["exact"]["runs"]:
        one["spent_s"] = {"read": 0.1, "score": 3.0, "probe": 0.0, "train": 6.0}
    parts = {"score": 24.0, "select": 0.5, "gather": 0.5, "train": 50.0}
    made["measured_ms"] |= {f"exact: {part}": {"median": ms, "count": 300} for part, ms in parts.items()}
    return made | results_page.judged(made)


def test_an_arm_that_never_acted_is_not_the_fastest(results_page, results):
    assert results["comparison"]["infobatch"]["speedup"] > results["comparison"]["exact"]["speedup"]
    (row,) = [line for line in results_page._overview([results]).splitlines() if line.startswith("| letters")]
    assert "infobatch" not in row
    assert "exact: " in row
    (row,) = [line for line in results_page.verdict_table(results).splitlines() if line.startswith("| infobatch")]
    assert row.endswith("| Never acted |")


def test_nothing_is_fastest_where_no_other_arm_acted(results_page, results):
    del results["comparison"]["exact"]
    (row,) = [line for line in results_page._overview([results]).splitlines() if line.startswith("| letters")]
    assert row.endswith("| – |")


def test_auto_with_too_few_probes_is_said_to_have_had_too_few(results_page, results):
    assert results_page.decisions(results).splitlines()[0] == (
        "  - seed 0 (1 look, 1.0 % of the time for probes): uniform throughout, as a decision needs 2 looks"
    )
    for one in results["arms"]["auto"]["runs"]:
        one["control"] = [{"step": step, "reference_s": step / 10} for step in (10, 20, 30)]
    first = results_page.decisions(results).splitlines()[0]
    assert first.endswith("(3 looks, 1.0 % of the time for probes): uniform throughout")


def test_what_scoring_was_charged_stands_beside_what_it_took(results_page, results):
    header, _, *rows = results_page.charges_table(results).strip().splitlines()
    assert header.count("|") == rows[0].count("|")
    assert rows == ["| exact | 30.0 | 25.0 | 60.0 | 50.0 | 0.500 | 0.500 | +0 % |"]
    results["measured_ms"]["exact: score"]["median"] = 19.0
    assert results_page.charges_table(results).strip().endswith("| 0.500 | 0.400 | +25 % |")


def test_results_without_scoring_have_no_table_of_charges(results_page, results):
    del results["arms"]["exact"]
    assert results_page.charges_table(results) == ""
