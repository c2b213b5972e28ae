"""The report: figures and one HTML page out of the results of one run or several."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
import resource
from contextlib import contextmanager
from html.parser import HTMLParser
from statistics import fmean
from typing import NamedTuple

import pytest

from browsing import opened
from scorecard import cases

pytest.importorskip("matplotlib")

import matplotlib

from earlysift.report.chart import ticks
from earlysift.report.figures import curves_figure
from earlysift.report.page import render, write_report
from earlysift.report.series import FURTHER_STYLES, STYLES, band, frame, prominent, styles
from earlysift.report.tables import GAIN, HARM, NO_GAIN, NOT_PROVED, WITHHELD, outcome

# Ways out of an element, of an attribute, of a script, of a comment, of text, and what could run there.
HOSTILE = [
    f"{way_out}{active}"
    for way_out in ("", "</script></style>", "'\"> & $x^2$ ", "--> ]]> </title></textarea>", "{{7*7}}${7*7}<%= 7 %>")
    for active in (
        "<img src=x onerror=alert(1)>",
        "<svg/onload=alert(1)>",
        "<script>alert(1)</script>",
        "<iframe srcdoc='<script>alert(1)</script>'></iframe>",
        "<a href='javascript:alert(1)'>x</a>",
        "<style>@import 'https://example.org'</style>",
        "<form action=https://example.org><button>",
        "<meta http-equiv=refresh content='0;url=https://example.org'>",
    )
]
BUDGET_S = 240.0
TARGET = 0.295
TRAIN_MS = 200.0


class Fake(NamedTuple):
    """An arm of believable behaviour."""

    label: str
    score_ms: float  # per step, beyond training
    speed: float  # of learning per step, uniform is 1
    floor: float  # accuracy lost at the end, as greedy selection does
    source: str | None = None
    other: str = "score"  # what the time beyond training went into


DAS = "Das et al., 2024, arXiv 2402.07052"
FAKES = {
    "uniform": Fake("uniform", 0, 1, 0),
    "sift": Fake("SIFT", 26.5, 1.32, 0.004, DAS),
    "exact": Fake("exact loss", 171.2, 1.42, 0.004, DAS),
    "sift-2": Fake("SIFT, exit 2", 41.0, 1.34, 0.004, DAS),
    "sift-3": Fake("SIFT, exit 3", 55.2, 1.35, 0.004, DAS),
    "sift-6": Fake("SIFT, exit 6", 98.8, 1.37, 0.004, DAS),
    "sift-entropy": Fake("SIFT, entropy", 27.1, 1.08, 0.012, DAS),
    "free": Fake("exact loss, free", 0, 1.42, 0.004, DAS),
    "selective-backprop": Fake("selective backprop", 171.2, 1.25, 0.001, "Jiang et al., 2019, arXiv 1910.00762"),
    "ordered-sgd": Fake("ordered SGD", 2.0, 0.93, 0.0, "Kawaguchi and Lu, 2020, arXiv 1907.04371"),
    "rho-loss": Fake("RHO-loss", 230.0, 1.5, 0.0, "Mindermann et al., 2022, arXiv 2206.07137", "reference model"),
    "infobatch": Fake("InfoBatch", 4.0, 1.02, 0.0, "Qin et al., 2024, arXiv 2303.04947"),
    "grad-norm": Fake("gradient norm", 180.0, 1.2, 0.0, "Katharopoulos and Fleuret, 2018, arXiv 1803.00942"),
    "rs2": Fake("random subsets", 0.5, 0.99, 0.0, "Okanovic et al., 2023, arXiv 2305.18424", "read"),
    "auto": Fake("auto", 23.0, 1.33, 0.0),
}


def make_results(evaluations: int = 30, arms=("uniform", "sift", "exact", "auto"), seeds: int = 3) -> dict:
    """Results as `earlysift compare` writes them, with curves of a believable shape."""
    made = {name: make_arm(name, FAKES[name], evaluations, seeds) for name in arms}
    return {
        "version": 2,
        "complete": True,
        "created": "2026-11-22T10:00:00",
        "config": {"data": "wikitext-2", "seeds": seeds, "budget": BUDGET_S, "batch": 32, "keep": 0.5, "depth": 1},
        "machine": {"cpu": "Intel Xeon Platinum 8481C", "cores": 2, "memory_gib": 15.6},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.19.0", "earlysift": "0.1.0"},
        "commit": "abc1234",
        "data": {
            "name": "WikiText-2, masked LM",
            "task": "masked_lm",
            "train_samples": 18420,
            "validation_samples": 512,
            "length": 128,
        },
        "baseline": {"accuracy": 0.068, "loss": 6.71},
        "operations_ms": {
            "train": {"median": 200.0, "low": 195.1, "high": 212.7, "count": 36},
            "score_1": {"median": 26.5, "low": 25.9, "high": 28.8, "count": 36},
            "exact": {"median": 171.2, "low": 168.0, "high": 181.3, "count": 36},
        },
        "measured_ms": {"sift: train": {"median": 203.0, "low": 198.1, "high": 222.7, "count": 1060}},
        "arms": made,
        "target": {"accuracy": TARGET, "source": "95 % of what uniform reaches at the end of its budget, seed by seed"},
        "comparison": {name: make_comparison(made, name) for name in made if name != "uniform"},
        "verdict": "Gain: auto reached the target accuracy of 31.0% 1.13 times as fast as uniform training (95 % "
        "interval 1.09 to 1.16 over 5 seeds; final accuracy +1.02 points, at equal cost).",
    }


def make_arm(name: str, fake: Fake, evaluations: int, seeds: int) -> dict:
    runs = []
    for seed in range(seeds):
        noise = random.Random(f"{name} {seed}")
        step_ms = TRAIN_MS + fake.score_ms
        steps = int(1000 * BUDGET_S / step_ms) - (7 * seed if name == "auto" else 0)
        slow, luck = 1.03 + 0.05 * noise.random(), 0.004 * noise.gauss(0, 1)
        curve, points = [], []
        for i in range(evaluations + 1):
            share = i / evaluations
            step = round(steps * share)
            learnt = 1 - math.exp(-2.2 * fake.speed * step / 1200)
            accuracy = (0.35 + luck) * learnt - fake.floor * share**2 + 0.0015 * noise.gauss(0, 1)
            where = {"step": step, "reference_s": BUDGET_S * share}
            curve.append(
                where
                | {
                    "wall_s": BUDGET_S * share * slow,
                    "trained_samples": 32 * step,
                    "scored_samples": 64 * step * (fake.score_ms > 5),
                    "accuracy": accuracy,
                    "loss": 9.0 - 5.4 * learnt - luck * 4 + 0.03 * noise.gauss(0, 1),
                }
            )
            correlation = 0.9 * learnt + 0.02 * noise.gauss(0, 1)
            points.append(
                where
                | {
                    "rank_correlation": correlation,
                    "overlap": 0.5 + 0.42 * correlation,
                    "gain": 1 + 0.14 * correlation,
                }
            )
        run = {
            "seed": seed,
            "finished": True,
            "steps": steps,
            "curve": curve,
            "fidelity": points[1:] if fake.source == DAS or name == "auto" else [],
            "control": [],
            "events": [],
            "spent_s": {
                "read": 0.004 * BUDGET_S,
                fake.other: BUDGET_S * fake.score_ms / step_ms,
                "train": BUDGET_S * (TRAIN_MS / step_ms - 0.004),
            },
            "final_accuracy": curve[-1]["accuracy"],
            "final_loss": curve[-1]["loss"],
            "wall_s": curve[-1]["wall_s"],
        }
        for clock in ("reference_s", "wall_s"):
            run[f"{clock}_to_target"] = next((point[clock] for point in curve if point["accuracy"] >= TARGET), None)
        if name == "auto":
            run["control"] = [make_estimates(point) for point in points[1:]]
            run["events"] = make_events(seed, steps)
            run["spent_s"]["probe"] = 0.01 * BUDGET_S
            run["spent_s"]["train"] -= 0.01 * BUDGET_S
        runs.append(run)
    return {
        "label": fake.label,
        "description": "keeps the candidates with the largest loss at the early exit" if fake.source else "our own",
        "source": fake.source,
        "charged": name != "free",
        "runs": runs,
    }


def make_estimates(point: dict) -> dict:
    correlation = point["rank_correlation"]
    estimates = {"step": point["step"], "reference_s": point["reference_s"], "floor": 0.1, "noise_scale": 90.0}
    for depth in (1, 2, 3):
        estimates[f"correlation.{depth}"] = correlation * (0.85 + 0.05 * depth)
        for keep in (0.5, 0.67):
            name, cost = f"{depth}.{keep:g}", 1 + 0.1 * depth * (1 - keep)
            estimates[f"payoff.greedy.{name}"] = (1 + 0.5 * correlation * (1 - keep)) / cost
            estimates[f"payoff_error.greedy.{name}"] = 0.02
            estimates[f"payoff.unbiased.{name}"] = (0.98 + 0.1 * correlation) / cost
            estimates[f"payoff_C2.{name}"] = estimates[f"gain.{name}"] = point["gain"] + 0.2 - 0.2 * keep
            estimates[f"payoff_T7.{name}"] = 1.02 / cost
    return estimates


def make_events(seed: int, steps: int) -> list[dict]:
    """Off at first, greedy, and unbiased towards the end."""
    begins, ends = 110 + 13 * seed, steps - 120 - 9 * seed
    seconds = BUDGET_S / steps
    return [
        {
            "step": begins,
            "reference_s": begins * seconds,
            "from": "off",
            "to": {"mode": "greedy", "depth": 1, "keep": 0.5},
            "reason": "predicted payoff 1.08 above 1.02 at three probes running",
            "payoff": 1.08,
        },
        {
            "step": ends,
            "reference_s": ends * seconds,
            "from": {"mode": "greedy", "depth": 1, "keep": 0.5},
            "to": "off",
            "reason": "end of the schedule: greedy selection has a floor",
            "payoff": 1.01,
        },
    ]


def make_comparison(arms: dict, name: str) -> dict:
    pairs = list(zip(arms[name]["runs"], arms["uniform"]["runs"], strict=True))
    entry = {"seeds": len(pairs), "reached": sum(run["reference_s_to_target"] is not None for run, _ in pairs)}
    for prefix, key in (("", "reference_s_to_target"), ("wall_", "wall_s_to_target")):
        ratios = [uniform[key] / run[key] for run, uniform in pairs if run[key] and uniform[key]]
        complete = len(ratios) == len(pairs)
        whole = (fmean(ratios), min(ratios), max(ratios)) if complete else (None, None, None)
        entry |= dict(zip((f"{prefix}speedup", f"{prefix}low", f"{prefix}high"), whole, strict=True))
    for key in ("final_accuracy", "final_loss"):
        differences = [run[key] - uniform[key] for run, uniform in pairs]
        entry |= {
            f"{key}_difference": fmean(differences),
            f"{key}_low": min(differences),
            f"{key}_high": max(differences),
        }
    label = arms[name]["label"]
    if entry["speedup"] is None:
        return entry | {
            "verdict": f"No gain: {label} reached the target accuracy of {TARGET:.1%} within the same budget in "
            f"{entry['reached']} of {entry['seeds']} seeds."
        }
    return entry | {
        "verdict": f"{'Gain' if entry['low'] > 1 else 'No gain shown'}: {label} reached the target accuracy of "
        f"{TARGET:.1%} {entry['speedup']:.2f} times as fast as uniform training in reference time, all costs charged "
        f"(95 % interval {entry['low']:.2f} to {entry['high']:.2f} over {entry['seeds']} seeds)."
    }


def make_alone(name: str, evaluations: int = 6) -> dict:
    """Results as `earlysift pretrain` writes them: one arm, one seed, time by the clock, compared with nothing."""
    results = make_results(evaluations, arms=tuple({"uniform": None, name: None}), seeds=1)
    results["arms"] = {name: results["arms"][name]}
    (run,) = results["arms"][name]["runs"]
    for point in (*run["curve"], *run["fidelity"]):
        point["wall_s"] = point.pop("reference_s")
    run |= {"curve": run["curve"][1:], "spent_s": {}, "reference_s_to_target": None}
    results["config"] = {"preset": "bert-tiny", "tokenizer": None, "keep": 0.5}
    nothing = {"comparison": {}, "operations_ms": {}, "measured_ms": {}}
    return results | nothing | {"target": {"accuracy": None, "source": "given"}, "verdict": "Trained 1200 steps."}


class Page(HTMLParser):
    """What a browser would find: elements in order, their attributes, and the text between them."""

    def __init__(self, html: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def tags(self) -> list[str]:
        return [tag for tag, _ in self.elements]

    def values(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def with_strings_replaced(node, make_string):
    """A copy in which every string value (no key) is a new one."""
    if isinstance(node, dict):
        return {key: with_strings_replaced(value, make_string) for key, value in node.items()}
    if isinstance(node, list):
        return [with_strings_replaced(value, make_string) for value in node]
    return make_string() if isinstance(node, str) else node


def write_results(folder, results):
    folder.mkdir(exist_ok=True)
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")
    return folder


def row_of(html: str, header: str) -> str:
    """The text of the first table row whose header cell holds this text."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.DOTALL)
    return next(spaced(row) for row in rows if header in spaced(row.partition("</th>")[0]))


def spaced(html: str) -> str:
    return " ".join(re.sub(r"<.*?>", " ", html).split())


def test_page_fetches_nothing_and_runs_nothing():
    html = render(make_results(), make_results())
    page = Page(html)
    assert "<script" not in html
    assert "default-src 'none'" in html
    assert not {"link", "iframe", "object", "embed", "base", "form", "img"} & set(page.tags())
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.values("href") == ["#run0", "#run1"]
    for forbidden in ("url(", "@import", "http:", "https:", "xlink"):
        assert forbidden not in html


@pytest.mark.parametrize("text", cases(HOSTILE, 3))
def test_s27_hostile_strings_appear_as_text_and_create_no_elements(text):
    strings = []

    def make_string() -> str:
        strings.append(f"{text} no. {len(strings)};")
        return strings[-1]

    hostile = with_strings_replaced(make_results(4, seeds=1), make_string)
    benign = make_results(4, seeds=1)
    for results, key in ((hostile, text), (benign, "plain")):
        # names that are shown: settings, an arm without a label, kinds of time, estimates
        results["config"][key] = 1
        results["arms"][f"other {key}"] = {**results["arms"].pop("exact"), "label": None}
        results["comparison"][f"other {key}"] = results["comparison"].pop("exact")
        for run in results["arms"]["auto"]["runs"]:
            run["spent_s"][key] = 1.0
            for point in run["control"]:
                point[f"payoff.{key}"] = 1.0
    page = Page(render(hostile, hostile))
    assert len(strings) > 30
    assert len([string for string in strings if string not in page.text]) == 1  # the label that was taken away
    assert page.text.count(text) > len(strings)
    assert page.tags() == Page(render(benign, benign)).tags()


def test_names_and_labels_are_shown_as_they_are_but_for_control_characters():
    results = make_results(4)
    results["arms"]["sift"]["label"] = "$\\frac{1}{2}$ & <b>\x00 \udcff\n"
    results["config"]["out"] = "runs/\udcff"
    results["config"] |= {"arms": ["uniform", "<b>"], "data": []}
    html = render(results)
    assert "<td>uniform, &lt;b&gt;</td>" in html
    assert "$\\frac{1}{2}$ &amp; &lt;b&gt;\ufffd \ufffd<" in html
    assert "runs/\ufffd<" in html
    labels = [text.get_text() for text in curves_figure(results).legends[0].get_texts()]
    assert "$\\frac{1}{2}$ & <b>\ufffd \ufffd" in labels


@pytest.mark.parametrize("part", sorted(make_results(1)))
def test_any_part_may_be_absent(part):
    results = make_results(4)
    del results[part]
    assert "<h1>" in render(results)
    assert "<h1>" in render(results, make_results(4))
    curves_figure(results)


@pytest.mark.parametrize("part", sorted(make_arm("auto", FAKES["auto"], 1, 1)["runs"][0]))
def test_any_part_of_a_run_may_be_absent(part):
    results = make_results(4)
    for arm in results["arms"].values():
        del arm["runs"][0][part]
    assert "<h1>" in render(results)
    curves_figure(results)


def with_nulls_at(depth: int, node):
    """A copy in which every value that lies `depth` dictionaries deep is null."""
    if isinstance(node, dict):
        return {key: with_nulls_at(depth - 1, value) if depth > 1 else None for key, value in node.items()}
    if isinstance(node, list):
        return [with_nulls_at(depth, value) for value in node]
    return node


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5])
def test_values_at_any_depth_may_be_null(depth):
    results = with_nulls_at(depth, make_results(4))
    assert results != make_results(4)
    assert "<h1>" in render(results)
    assert "<h1>" in render(results, results)
    curves_figure(results)


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_missing_numbers_are_shown_as_dashes(nothing):
    results = make_results()
    for run in results["arms"]["exact"]["runs"]:
        run["final_accuracy"] = run["final_loss"] = run["reference_s_to_target"] = nothing
        for point in run["curve"]:
            point["accuracy"] = nothing
    results["comparison"]["exact"] = dict.fromkeys(results["comparison"]["sift"], nothing)
    results["comparison"]["exact"]["verdict"] = None
    html = render(results)
    assert row_of(html, "exact loss") == "exact loss ■ no gain – – 0 of 3 – – – –"
    assert not re.search(r"\b(nan|inf|None)\b", html.partition("</style>")[2])


def test_partial_run_says_so_and_complete_run_does_not():
    results = make_results()
    assert "Partial run" not in render(results)
    page = render({"version": 2, "complete": False})
    assert "Partial run" in page
    assert "nothing measured yet" in page
    assert "No verdict yet" in page


def test_a_finished_run_shows_no_empty_section_column_or_row():
    html = render(make_alone("uniform"))
    assert "nothing measured yet" not in html
    assert "Where the time went" not in html
    assert "Fidelity" not in html
    assert "tokenizer" not in html
    assert "–" not in spaced(html[html.index("<h1>") :])
    headers = re.findall(r'<th scope="col">(.*?)</th>', html)
    assert headers == ["Arm", "Final accuracy", "Final loss"]


def test_target_is_spoken_of_only_where_there_is_one():
    results = make_alone("sift")
    assert "arget" not in spaced(render(results).partition("How it was measured")[0].partition("<h1>")[2])
    results["target"]["accuracy"] = 0.2
    results["arms"]["sift"]["runs"][0]["reference_s_to_target"] = 12.5
    page = spaced(render(results))
    assert "Target: 20.00% validation accuracy (given). A model" in page
    assert "1 of 1 mean 12.5 s" in page


def test_axes_begin_at_zero_and_only_those_that_were_measured_are_offered():
    results = make_alone("sift")
    drawn = results["arms"]["sift"]["runs"][0]["curve"]
    assert drawn[0]["step"] > 0
    html = render(results)
    assert "reference time" not in html.partition("How it was measured")[0]
    section = html[html.index("Learning curves") : html.index("Fidelity")]
    steps = section[section.index('aria-label="validation accuracy against steps"') :].partition("</div>")[0]
    assert '<span class="x" style="left:0.00%">0</span>' in steps
    start = float(re.search(r'class="line" d="M(\d+)', steps)[1]) / 2000
    assert start == pytest.approx(drawn[0]["step"] / drawn[-1]["step"], abs=1e-3)
    axes = curves_figure(results).axes
    assert [panel.get_xlabel() for panel in axes[3:]] == ["wall time (s)", "trained samples", "steps"]
    assert {panel.get_xlim()[0] for panel in axes} == {0}


def test_the_frame_of_a_lone_run_holds_its_whole_curve():
    results = make_alone("sift")
    for x, panel in zip(("wall_s", "trained_samples", "step"), curves_figure(results).axes, strict=False):
        bottom, top = panel.get_ylim()
        assert all(bottom < y < top for y in band(results["arms"]["sift"]["runs"], "curve", x, "accuracy").mean)


def test_lines_of_equal_course_are_drawn_so_that_uniform_training_stays_visible():
    results = make_results(4, arms=("sift", "auto", "rs2", "uniform"))
    for name in ("auto", "rs2"):
        for run, other in zip(results["arms"][name]["runs"], results["arms"]["uniform"]["runs"], strict=True):
            run["curve"] = other["curve"]
    drawn = {line.get_label(): line for line in curves_figure(results).axes[0].lines}
    assert list(drawn["auto"].get_ydata()) == list(drawn["uniform"].get_ydata())
    for label in ("auto", "random subsets"):  # narrower, dashed, and on top
        assert drawn[label].get_linewidth() < drawn["uniform"].get_linewidth()
        assert drawn[label].get_zorder() > drawn["uniform"].get_zorder()
        assert drawn[label].is_dashed()
    assert not drawn["uniform"].is_dashed()
    panel = render(results).partition('class="panel')[2].partition("</svg>")[0]
    found = re.findall(r'<g class="t\d(.*?)" style="(.*?)"', panel)
    assert [(css, "dashes" in look) for css, look in found] == [
        (" beneath", False),
        (" thin", True),
        ("", False),
        ("", True),
    ]


def test_browser_draws_uniform_training_wider_than_what_lies_on_top(browser, addresses):
    with opened(browser, addresses[1]) as page:
        widths = page.locator(".panel:visible path.line:visible").evaluate_all(
            "lines => lines.map(line => parseFloat(getComputedStyle(line).strokeWidth))"
        )
        assert widths[0] > max(widths[1:])


def test_unfinished_seeds_count_only_as_long_as_none_has_finished():
    results = make_results()
    whole = row_of(render(results), "SIFT")
    runs = results["arms"]["sift"]["runs"]
    runs.append({"seed": 3, "finished": False, "curve": runs[0]["curve"][:2], "final_accuracy": 0.01})
    assert row_of(render(results), "SIFT") == whole
    results["arms"]["sift"]["runs"] = runs[3:]
    assert "1.00%" in row_of(render(results), "SIFT")


def test_a_whole_frame_holds_the_steep_beginning_and_another_need_not():
    steep = band([{"curve": [{"x": x, "y": y} for x, y in enumerate((100, 5, 4, 3, 2, 1, 1, 1))]}], "curve", "x", "y")
    assert frame([(steep, True)], whole=True)[1] > 100 > frame([(steep, True)])[1]


def test_verdict_table_shows_the_numbers_of_the_results():
    results = make_results()
    accuracies = [run["final_accuracy"] for run in results["arms"]["sift"]["runs"]]
    times = [run["reference_s_to_target"] for run in results["arms"]["sift"]["runs"]]
    losses = [run["final_loss"] for run in results["arms"]["sift"]["runs"]]
    entry = results["comparison"]["sift"] = {
        "seeds": 3,
        "reached": 3,
        **{"speedup": 1.13, "low": 1.09, "high": 1.16, "wall_speedup": 1.12, "wall_low": 1.05, "wall_high": 1.19},
        **{"final_accuracy_difference": 0.0102, "final_accuracy_low": 0.0081, "final_accuracy_high": 0.0127},
        **{"final_loss_difference": -0.06, "final_loss_low": -0.07, "final_loss_high": -0.05},
        "verdict": "Gain: it did.",
    }
    html = render(results)
    assert row_of(html, "SIFT") == (
        f"SIFT ▲ gain 1.13× 1.09 … 1.16 1.12× 1.05 … 1.19 3 of 3 mean {fmean(times):.1f} s "
        f"{fmean(accuracies):.2%} {min(accuracies):.2%} … {max(accuracies):.2%} +1.02 points +0.81 … +1.27 "
        f"{fmean(losses):.3f} {min(losses):.3f} … {max(losses):.3f} -0.060 -0.070 … -0.050"
    )
    assert f"{entry['verdict']} · keeps the candidates" in spaced(html)
    assert DAS in spaced(html)


def test_what_is_not_charged_is_marked_wherever_it_is_compared():
    results = make_results(4, arms=("uniform", "sift", "free"))
    assert "upper bound, not charged" in row_of(render(results), "exact loss, free")
    assert row_of(render(results, results), "exact loss, free").startswith("exact loss, free (not charged)")
    assert "not charged" not in row_of(render(results), "SIFT")


@pytest.mark.parametrize(
    ("entry", "word"),
    [
        ({"speedup": 1.2, "low": 1.1, "final_accuracy_high": 0.01}, "gain"),
        ({"speedup": 1.2, "low": 0.99, "final_accuracy_high": 0.01}, "no gain"),
        ({"speedup": 1.2, "low": 1.1, "final_accuracy_high": -0.001}, "harm"),
        ({"speedup": None, "low": None, "final_accuracy_high": 0.01}, "no gain"),
        ({"speedup": 1.2, "low": None, "final_accuracy_high": None}, "not proved"),
    ],
)
def test_outcome_needs_a_whole_interval(entry, word):
    assert outcome(entry).word == word


def test_every_outcome_has_its_own_symbol():
    outcomes = {outcome(entry) for entry in ({}, {"low": 2.0}, {"speedup": 2.0}, {"final_accuracy_high": -1.0})}
    assert len({each.symbol for each in outcomes}) == len({each.word for each in outcomes}) == 4


@pytest.mark.parametrize("word", [each.word for each in WITHHELD])
def test_what_withholds_a_verdict_comes_before_the_numbers_in_every_table(word):
    results = make_results(4)
    results["comparison"]["sift"] |= {"withheld": word, "low": 1.3, "final_accuracy_high": -0.1}
    assert outcome(results["comparison"]["sift"]).word == word
    html = render(results, results)
    symbol = outcome(results["comparison"]["sift"]).symbol
    assert f"SIFT {symbol} {word}" in row_of(html[html.index('<article id="run0">') :], "SIFT")
    overview = html[html.index("Overview") : html.index('<article id="run0">')]
    assert row_of(overview, "SIFT").startswith(f"SIFT {symbol} ")
    assert f'title="{word}"' in overview
    results["comparison"]["auto"] |= {"withheld": word}
    assert f"auto: {word} on 2 of 2 comparisons</h1>" in render(results, results)


def test_a_withheld_verdict_of_unknown_kind_changes_nothing():
    for kind in (None, "", [], {"never acted": 1}, 3):
        assert outcome({"withheld": kind, "speedup": 1.2, "low": 1.1}).word == "gain"


def test_all_outcomes_differ_in_word_and_symbol():
    outcomes = (GAIN, HARM, NO_GAIN, NOT_PROVED, *WITHHELD)
    assert len({each.symbol for each in outcomes}) == len({each.word for each in outcomes}) == 7


def test_bars_show_the_share_of_the_budget_by_kind():
    results = make_results(4, arms=("uniform", "exact"))
    results["arms"]["exact"]["runs"] = [
        {"finished": True, "spent_s": {"read": 0, "score": 100.0, "train": 116.0, "dreaming": 24.0}},
        {"finished": True, "spent_s": {"read": 0, "score": 120.0, "train": 120.0}},
    ]
    html = render(results)
    table = html[html.index("Where the time went") :]
    assert row_of(table, "exact loss") == "exact loss 49.2% 45.8% – 5.0%"
    bar = re.search(r"exact loss.*?(<div class=\"bar\">.*?</div>)", table, re.DOTALL)[1]
    assert [float(width) for width in re.findall(r"width:([\d.]+)%", bar)] == [49.17, 45.83, 0, 5]


def test_decisions_are_listed_with_when_and_why():
    row = row_of(render(make_results()), "seed 2")
    reason = "predicted payoff 1.08 above 1.02 at three probes running"
    assert row == f"seed 2 136 30.7 s off mode greedy, depth 1, keep 0.5 {reason}"
    still = make_results()
    for run in still["arms"]["auto"]["runs"]:
        run["events"] = []
    assert "It never switched." in render(still)


def test_estimates_of_the_controller_are_drawn_with_its_switches():
    html = render(make_results())
    section = html[html.index("Estimates and decisions of auto") :]
    for line in ("payoff", "greedy, exit 1, keep 0.5", "unbiased, exit 3, keep 0.67", "rank correlation", "exit 2"):
        assert f"<span>{line}</span>" in section
    assert "error" not in section.partition("How it was measured")[0]
    marks = re.findall(r'class="mark" d="(.*?)"', section)
    assert [path.count("M") for path in marks] == [6] * 12  # two switches of three seeds, in every chart


def test_arms_that_decide_nothing_have_no_such_section():
    assert "Estimates and decisions" not in render(make_results(4, arms=("uniform", "sift")))


def test_equal_results_give_equal_bytes(tmp_path):
    write_results(tmp_path, make_results())
    first = [write_report(tmp_path).read_bytes(), (tmp_path / "curves.png").read_bytes()]
    second = [write_report(tmp_path).read_bytes(), (tmp_path / "curves.png").read_bytes()]
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "report.html", "results.json"]


def test_several_runs_give_one_page_in_their_common_parent(tmp_path):
    folders = [write_results(tmp_path / name, make_results(4)) for name in ("a", "b", "c")]
    assert write_report(*folders) == tmp_path / "report.html"
    assert [path.name for path in folders[0].iterdir()] == ["results.json"]
    (tmp_path / "report.html").unlink()
    # A run inside another's folder: the page must not replace that run's own.
    assert write_report(folders[0], write_results(folders[0] / "suite", make_results(4))) == tmp_path / "report.html"


@pytest.mark.parametrize("count", [1, 2])
def test_page_goes_where_it_is_told(tmp_path, count):
    folders = [write_results(tmp_path / str(i), make_results(4)) for i in range(count)]
    out = tmp_path / "elsewhere.html"
    assert write_report(*folders, out=out) == out
    assert out.is_file()
    assert not any((folder / "report.html").exists() for folder in (tmp_path, *folders))


def test_no_run_gives_one_clear_error():
    with pytest.raises(ValueError, match="Expected at least one run folder, got none"):
        write_report()


def test_overview_compares_workloads_and_links_to_them():
    flipped = make_results(4, arms=("uniform", "sift", "rs2"))
    flipped["data"]["name"] = "SST-2, 20 % flipped"
    flipped["comparison"]["sift"] = {"speedup": 0.9, "low": 0.8, "high": 0.96, "final_accuracy_difference": -0.01}
    plain = make_results(4)
    for name in ("sift", "auto"):
        plain["comparison"][name] = {"speedup": 1.2, "low": 1.1, "high": 1.3, "final_accuracy_difference": 0.01}
    html = render(plain, flipped)
    assert "240 s" in html[html.index("Overview") :].partition("</thead>")[0]
    overview = html[html.index("Overview") : html.index('<article id="run0">')]
    assert re.findall(r'<a href="#(run\d)">(.*?)</a>', overview) == [
        ("run0", "WikiText-2, masked LM"),
        ("run1", "SST-2, 20 % flipped"),
    ]
    assert {"run0", "run1"} <= set(Page(html).values("id"))
    assert row_of(overview, "SIFT").endswith("■ 0.90× 0.80 … 0.96 -1.00 points")
    assert row_of(overview, "auto") == "auto ▲ 1.20× 1.10 … 1.30 +1.00 points –"
    assert row_of(overview, "random subsets").startswith("random subsets – ")
    assert "<h1>SIFT: gain on 1, no gain on 1 of 2 comparisons; auto: gain on 1 of 1 comparison</h1>" in html
    accuracy = fmean(run["final_accuracy"] for run in flipped["arms"]["uniform"]["runs"])
    assert f"{accuracy:.2%}" in row_of(overview, "uniform").split()
    assert overview.partition("</table>")[2].count("▲ gain") == 1
    assert "not proved" not in overview


def test_overview_of_runs_without_comparison_has_their_final_accuracies_and_no_empty_row():
    runs = [make_alone(name) for name in ("sift", "uniform")]
    html = render(*runs)
    overview = html[html.index("<h1>") : html.index('<article id="run0">')]
    assert "<h1>2 runs</h1>" in overview
    assert "Speed-up" not in overview
    for name, results in zip(("SIFT", "uniform"), runs, strict=True):
        (arm,) = results["arms"].values()
        assert f"{arm['runs'][0]['final_accuracy']:.2%}" in row_of(overview, name).split()
    del runs[1]["arms"]["uniform"]["runs"][:]
    assert "uniform" not in spaced(render(*runs).partition("<article")[0].partition("<tbody>")[2])


@pytest.mark.parametrize("count", [1, 2])
def test_page_is_accessible_in_its_structure(count):
    page = Page(render(*[make_results(4)] * count))
    levels = [int(tag[1]) for tag in page.tags() if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert dict(page.elements)["html"] == {"lang": "en"}
    assert "title" in page.tags()
    assert all(attributes.get("scope") in {"row", "col"} for tag, attributes in page.elements if tag == "th")
    drawings = [attributes for tag, attributes in page.elements if tag == "svg"]
    assert all(drawing.get("aria-hidden") or drawing.get("aria-label") for drawing in drawings)
    names = page.values("id")
    assert len(names) == len(set(names)) == count
    # Radio buttons of one name are one choice: exactly one of them is made.
    radios = [attributes for _, attributes in page.elements if attributes.get("type") == "radio"]
    choices = {radio.get("name") for radio in radios}
    assert len(choices) == 6 * count
    for name in choices:
        assert sum("checked" in radio for radio in radios if radio.get("name") == name) == 1


def test_order_of_the_page_is_answer_first():
    html = render(make_results())
    parts = [
        "<h1>",
        "Speed-up, reference",
        "Learning curves",
        "Where the time went",
        "Fidelity",
        "Estimates and decisions of auto",
    ]
    parts += ["Configuration", "Machine", "Versions", "abc1234", "How it was measured"]
    positions = [html.index(part) for part in parts]
    assert positions == sorted(positions)


def test_results_that_say_how_they_were_measured_are_believed_and_others_were_compared():
    compared, timed = make_results(4, seeds=1), make_results(4, seeds=1) | {"method": {"Time": "by <b> the clock"}}
    assert "by &lt;b&gt; the clock" in render(timed)
    assert "Equal budgets" not in render(timed)
    assert all(word in render(compared, timed) for word in ("by &lt;b&gt; the clock", "Equal budgets"))
    assert "by &lt;b&gt; the clock" not in render(compared)


def test_picture_has_eight_panels_that_share_the_vertical_axis_in_a_row():
    grid = curves_figure(make_results()).axes
    assert len(grid) == 8
    for row in (grid[:4], grid[4:]):
        assert len({axes.get_ylim() for axes in row}) == 1
    assert grid[0].get_ylim() != grid[4].get_ylim()


def test_band_is_mean_lowest_and_highest_of_the_seeds():
    runs = make_results()["arms"]["uniform"]["runs"]
    drawn = band(runs, "curve", "step", "accuracy")
    assert drawn.x == [point["step"] for point in runs[0]["curve"]]
    columns = [[point["accuracy"] for point in points] for points in zip(*(r["curve"] for r in runs), strict=True)]
    assert drawn.mean == pytest.approx([fmean(column) for column in columns])
    assert drawn.low == pytest.approx([min(column) for column in columns])
    assert drawn.high == pytest.approx([max(column) for column in columns])


def test_band_stops_where_the_first_seed_stops():
    runs = make_results()["arms"]["sift"]["runs"]
    runs[1]["curve"] = runs[1]["curve"][:12]
    assert band(runs, "curve", "wall_s", "accuracy").x[-1] == runs[1]["curve"][-1]["wall_s"]


def test_one_arm_that_went_astray_does_not_flatten_the_others():
    runs = make_results()["arms"]["uniform"]["runs"]
    good = band(runs, "curve", "step", "loss")
    for run in runs:
        for point in run["curve"]:
            point["loss"] = 1e9
    bottom, top = frame([(good, True)])
    assert frame([(good, True), (band(runs, "curve", "step", "loss"), False)])[1] < top + 1.1 * (top - bottom)


def test_shown_at_first_are_the_main_arms_and_the_best_that_is_charged():
    assert prominent(make_results(arms=tuple(FAKES))) == {"uniform", "sift", "exact", "auto", "sift-2"}


def test_an_arm_keeps_its_look_whatever_runs_beside_it_and_all_looks_differ():
    assert styles(["sift"])["sift"] == styles(["mine", "uniform", "sift", "yours"])["sift"]
    looks = styles([*FAKES, "mine", "yours"]).values()
    assert len(set(looks)) == len(FAKES) + 2


def contrast(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Contrast ratio of two colours (W3C, WCAG 2.1); 3 is asked of lines, 4.5 of text."""

    def luminance(color: tuple[float, ...]) -> float:
        parts = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("card", ["#ffffff", "#191d23"])
def test_colors_of_all_arms_can_be_seen_on_light_and_dark(card):
    for style in (*STYLES.values(), *FURTHER_STYLES):
        assert contrast(matplotlib.colors.to_rgb(style.color), matplotlib.colors.to_rgb(card)) > 3


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1, 0.13), (-3, 4e6), (6.2, 6.9), (0, 38400)])
def test_ticks_are_few_and_lie_within(low, high):
    found = ticks(low, high, 4)
    assert 2 <= len(found) <= 7
    assert low <= found[0] < found[-1] <= high
    steps = [after - before for before, after in itertools.pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps))


def test_drawing_changes_no_global_setting():
    def settings():  # reading the backend would choose one
        return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}

    before = settings()
    curves_figure(make_results(4))
    assert settings() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "Expected JSON in .*results.json, found damaged text .*repeat the comparison"),
        (json.dumps(make_results(1)).encode()[:500], "found damaged text"),
        (b"\xff\xfe\x00\x01", "found damaged text"),
        (b"[1, 2]", "Expected results of version 2 in .*, found version None\\. "),
        (b'{"version": 1}', "Expected results of version 2 in .*, found version 1\\. Read them with the version"),
        (b'{"version": 3}', "Expected results of version 2 in .*, found version 3\\. "),
    ],
    ids=["empty", "truncated", "binary", "no object", "older", "newer"],
)
def test_unreadable_results_give_one_clear_error(tmp_path, content, message):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        write_report(tmp_path)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("folder", ["", "no such folder"])
def test_folder_without_results_gives_one_clear_error(tmp_path, folder):
    message = "Expected the results of a comparison in .*results.json, found no such file\\. Give the folder"
    with pytest.raises(FileNotFoundError, match=message):
        write_report(tmp_path / folder)


@contextmanager
def files_limited_to(size: int):
    """Writing beyond this size fails, as on a full disk; the operating system enforces it, for root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("fails_at", ["curves.png", "report.html"])
def test_previous_files_survive_a_failed_write(tmp_path, fails_at):
    write_results(tmp_path, make_results(4))
    write_report(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    changed = make_results(4)
    # A long verdict makes the page the larger file, so that the limit can let the picture through.
    changed["verdict"] = "never mind " * 100_000
    write_results(tmp_path, changed)
    before["results.json"] = (tmp_path / "results.json").read_bytes()
    limit = {"curves.png": 1000, "report.html": 1_000_000}[fails_at]
    with files_limited_to(limit), pytest.raises(OSError, match="File too large"):
        write_report(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_previous_files_survive_results_that_cannot_be_drawn(tmp_path):
    write_results(tmp_path, make_results(4))
    write_report(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in ("curves.png", "report.html")}
    write_results(tmp_path, {**make_results(4), "operations_ms": {"train": 5}})
    with pytest.raises(ValueError, match=r"operations_ms\.train should be a mapping"):
        write_report(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.fixture(scope="module")
def addresses(tmp_path_factory):
    """A page of one large run, and a page of two."""
    parent = tmp_path_factory.mktemp("runs")
    folders = [write_results(parent / name, make_results(16, arms=tuple(FAKES), seeds=5)) for name in ("a", "b")]
    return {1: write_report(folders[0]).as_uri(), 2: write_report(*folders).as_uri()}


def visible_charts(explorer) -> list[str]:
    """What the charts show that can be seen, by their names for screen readers."""
    return [chart.get_attribute("aria-label") for chart in explorer.locator(".chart > svg:visible").all()]


def visible_lines(explorer) -> int:
    return explorer.locator(".panel:visible path.line:visible").count()


@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("runs", [1, 2])
def test_browser_shows_one_readable_chart_each_without_sideways_scrolling(browser, addresses, runs, width):
    with opened(browser, addresses[runs], width) as page:
        assert page.locator("h1").is_visible()
        explorers = page.locator(".explorer").all()
        assert len(explorers) == 3 * runs
        for explorer in explorers:
            assert len(visible_charts(explorer)) == 1
            box = explorer.locator(".chart > svg:visible").bounding_box()
            assert box["width"] > 0.6 * min(width, 1100)
            assert box["height"] > 200
        assert page.evaluate("document.documentElement.scrollWidth") == width
        for text in page.locator(".chart:visible span").all():
            assert float(text.evaluate("e => getComputedStyle(e).fontSize").removesuffix("px")) >= 12
            box = text.bounding_box()
            assert box["x"] >= 0
            assert box["x"] + box["width"] <= width


def test_browser_switches_the_chart_by_click_and_by_keyboard(browser, addresses):
    with opened(browser, addresses[2]) as page:
        first, _, third, *_ = page.locator(".explorer").all()
        assert visible_charts(first) == ["validation accuracy against reference time (s)"]
        first.get_by_text("wall time (s)", exact=True).and_(first.locator("label span")).click()
        assert visible_charts(first) == ["validation accuracy against wall time (s)"]
        first.get_by_text("validation loss").and_(first.locator("label span")).click()
        assert visible_charts(first) == ["validation loss against wall time (s)"]
        page.keyboard.press("Tab")  # from the measures on to the axes
        page.keyboard.press("ArrowRight")
        assert visible_charts(first) == ["validation loss against trained samples"]
        page.keyboard.press("Shift+Tab")
        page.keyboard.press("ArrowLeft")
        assert visible_charts(first) == ["validation accuracy against trained samples"]
        # Neither the other charts of the run nor the other run have moved.
        assert visible_charts(third) == ["payoff against reference time (s)"]
        assert visible_charts(page.locator(".explorer").nth(3)) == ["validation accuracy against reference time (s)"]


def test_browser_shows_and_hides_lines(browser, addresses):
    with opened(browser, addresses[1]) as page:
        curves, _, control = page.locator(".explorer").all()
        assert visible_lines(curves) == 5
        curves.locator("label.chip", has_text="RHO-loss").click()
        assert visible_lines(curves) == 6
        page.keyboard.press("Space")
        assert visible_lines(curves) == 5
        curves.locator("label.chip", has_text="all").last.click()
        assert visible_lines(curves) == len(FAKES)
        # What only one measure draws is offered only there.
        assert control.locator(".chip:visible").count() == 12 + 1
        control.get_by_text("rank correlation").and_(control.locator("label span")).click()
        assert control.locator(".chip:visible").all_inner_texts() == ["exit 1", "exit 2", "exit 3", "all"]


def test_browser_follows_the_link_from_the_overview(browser, addresses):
    context = browser.new_context(viewport={"width": 1200, "height": 800}, offline=True)
    page = context.new_page()
    page.goto(addresses[2])
    page.locator(".overview a").nth(1).click()
    assert page.locator("#run1 header").bounding_box()["y"] < 200
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_shows_readable_text_in_light_and_dark(browser, addresses, scheme):
    def color(element, name: str) -> tuple[float, ...]:
        found = element.evaluate(f"e => getComputedStyle(e).{name}")
        return tuple(int(part) / 255 for part in re.findall(r"\d+", found)[:3])

    with opened(browser, addresses[1], color_scheme=scheme) as page:
        ground = color(page.locator("body"), "backgroundColor")
        assert max(ground) < 0.15 if scheme == "dark" else min(ground) > 0.9
        for card in page.locator(".explorer .card").all():
            ground = color(card, "backgroundColor")
            for text in card.locator("span:visible, p:visible").all():
                assert contrast(color(text, "color"), ground) > 4.5
            for line in card.locator("path.line:visible").all():
                assert contrast(color(line, "stroke"), ground) > 3
        for chosen in page.locator(".pick input:checked + span").all():
            assert contrast(color(chosen, "color"), color(chosen, "backgroundColor")) > 4.5
        for selector in (".gain", ".harm", ".none", "td small", ".eyebrow", ".words"):
            assert contrast(color(page.locator(selector).first, "color"), ground) > 4.5
