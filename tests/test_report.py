"""The report: figures and one HTML page out of a results.json."""

from __future__ import annotations

import itertools
import json
import math
import re
import resource
import shutil
from contextlib import contextmanager
from html.parser import HTMLParser

import pytest

pytest.importorskip("matplotlib")

import matplotlib

from earlysift.report.figures import arm_colors, cost_figure, curves_figure, fidelity_figure, to_svg
from earlysift.report.page import render, write_report

HOSTILE = "</script></style><img src=x onerror=alert(1)> & \"'$x^2$"
STEP_COSTS_MS = {"uniform": 200.0, "sift": 226.5, "exact": 371.2}
BUDGET_S = 240.0


def make_results(evaluations: int = 30) -> dict:
    """Three arms and three seeds as `earlysift compare` writes them, with curves of a believable shape."""
    speeds = {"uniform": 1.0, "sift": 1.28, "exact": 1.35}
    arms = {name: make_arm(name, cost, speeds[name], evaluations) for name, cost in STEP_COSTS_MS.items()}
    return {
        "version": 1,
        "complete": True,
        "created": "2026-11-22T10:00:00",
        "config": {"data": "wikitext-2", "seeds": 3, "budget": BUDGET_S, "batch": 32, "keep": 0.5, "depth": 1},
        "machine": {"cpu": "Intel Xeon Platinum 8481C", "cores": 2, "memory_gib": 15.6},
        "versions": {"python": "3.11.2", "torch": "2.13.0", "transformers": "5.19.0", "earlysift": "0.1.0"},
        "commit": "abc1234",
        "data": {
            "name": "wikitext-2",
            "train_blocks": 18420,
            "validation_blocks": 512,
            "length": 128,
            "vocab_size": 8192,
        },
        "operations_ms": {
            "train": {"median": 200.0, "low": 195.1, "high": 212.7, "count": 3600},
            "score": {"median": 26.5, "low": 25.9, "high": 28.8, "count": 1060},
            "exact": {"median": 171.2, "low": 168.0, "high": 181.3, "count": 640},
            "probe": {"median": 198.4, "low": 196.2, "high": 209.9, "count": 90},
        },
        "target": {"accuracy": 0.31, "source": "uniform at the end of its budget"},
        "arms": arms,
        "comparison": {
            "sift": {
                "speedup": 1.13,
                "low": 1.09,
                "high": 1.16,
                "reached": 3,
                "seeds": 3,
                "final_accuracy_difference": 0.0102,
                "final_accuracy_low": 0.0081,
                "final_accuracy_high": 0.0127,
                "final_loss_difference": -0.06,
            },
            "exact": {"speedup": None, "low": None, "high": None, "reached": 0, "seeds": 3},
        },
        "unigram": {"accuracy": 0.068, "loss": 6.71},
        "verdict": "SIFT at depth 1 reached uniform's final accuracy 1.13× sooner (1.09× to 1.16×, 3 of 3 seeds).",
    }


def make_arm(name: str, cost_ms: float, speed: float, evaluations: int) -> dict:
    steps = int(1000 * BUDGET_S / cost_ms)
    runs = []
    for seed in range(3):
        curve, fidelity = [], []
        for i in range(evaluations + 1):
            step = steps * i // evaluations
            wobble = 0.004 * math.sin(5 * seed + 0.9 * i)
            learnt = 1 - math.exp(-2.2 * speed * step / 1200)
            curve.append(
                {
                    "step": step,
                    "reference_s": step * cost_ms / 1000,
                    "wall_s": step * cost_ms / 1000 * (1.05 + 0.04 * seed),
                    "trained_samples": 16 * step,
                    "scored_samples": 0 if name == "uniform" else 32 * step,
                    "accuracy": 0.35 * learnt + wobble,
                    "loss": 9.0 - 5.4 * learnt - 3 * wobble,
                }
            )
            if name == "sift" and i % 3 == 0:
                correlation = 0.9 * learnt + wobble
                fidelity.append(
                    {
                        "step": step,
                        "reference_s": step * cost_ms / 1000,
                        "rank_correlation": correlation,
                        "overlap": 0.5 + 0.42 * correlation,
                        "gain": 1 + 0.14 * correlation,
                    }
                )
        runs.append(
            {
                "seed": seed,
                "curve": curve,
                "fidelity": fidelity,
                "reference_s_to_target": None if name == "exact" else 236.0 / speed + seed,
                "wall_s_to_target": None if name == "exact" else 250.0 / speed + seed,
                "final_accuracy": curve[-1]["accuracy"],
                "final_loss": curve[-1]["loss"],
                "wall_s": curve[-1]["wall_s"],
            }
        )
    descriptions = {
        "uniform": "every sample is trained on",
        "sift": "score the pool through one layer, train on the harder half",
        "exact": "score the pool through the whole model, train on the harder half",
    }
    label = {"sift": "sift, depth 1"}.get(name, name)
    return {
        "label": label,
        "description": descriptions[name],
        "step_cost_ms": cost_ms,
        "steps": steps,
        "runs": runs,
    }


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


def write_results(folder, results) -> None:
    (folder / "results.json").write_text(json.dumps(results), encoding="utf-8")


def test_page_fetches_nothing_and_runs_nothing():
    html = render(make_results())
    page = Page(html)
    assert "script" not in page.tags()
    assert "<script" not in html
    assert "default-src 'none'" in html
    assert not {"link", "iframe", "object", "embed", "base", "form", "img"} & set(page.tags())
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    references = [*page.values("href"), *page.values("xlink:href"), *re.findall(r"url\((.*?)\)", html)]
    assert references
    assert all(reference.startswith("#") for reference in references)
    assert "@import" not in html
    assert set(re.findall(r'(\S+)="https?://', html)) <= {"xmlns", "xmlns:xlink"}
    assert html.count("http") == len(re.findall(r'xmlns(:xlink)?="http', html)) + html.count("http-equiv")


def test_hostile_strings_appear_as_text_and_create_no_elements():
    strings = []

    def make_string() -> str:
        strings.append(f"{HOSTILE} no. {len(strings)};")
        return strings[-1]

    hostile = with_strings_replaced(make_results(), make_string)
    hostile["config"][HOSTILE] = 1
    benign = make_results()
    benign["config"]["plain"] = 1
    page = Page(render(hostile))
    assert len(strings) > 10
    assert [string for string in strings if string not in page.text] == []
    assert page.text.count(HOSTILE) > len(strings)  # the key, and the labels in the figures
    assert "img" not in page.tags()
    # A second line in a cell or a label would be a new element; everything else must be the same page.
    assert page.tags() == Page(render(benign)).tags()


def test_dollar_signs_in_labels_stay_dollar_signs():
    results = make_results()
    results["arms"]["sift"]["label"] = "$\\frac{1}{2}$ & <b>\x00"
    for figure in (curves_figure(results), fidelity_figure(results), cost_figure(results)):
        assert ">$\\frac{1}{2}$ &amp; &lt;b&gt;\ufffd<" in to_svg(figure)


def test_undecodable_path_in_config_does_not_cost_the_page(tmp_path):
    results = make_results()
    results["config"]["out"] = "runs/\udcff"
    write_results(tmp_path, results)
    assert "runs/" in write_report(tmp_path).read_text(encoding="utf-8")


@pytest.mark.parametrize("part", sorted(make_results(1)))
def test_any_part_may_be_absent(part):
    results = make_results(4)
    del results[part]
    assert "<h1>" in render(results)


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


def test_partial_run_says_so_and_complete_run_does_not():
    results = make_results()
    assert "Partial run" not in render(results)
    page = render({"version": 1, "complete": False})
    assert "Partial run" in page
    assert "nothing measured yet" in page
    assert "No verdict yet" in page


@pytest.mark.parametrize("nothing", [None, math.nan, math.inf])
def test_missing_numbers_are_shown_as_dashes(nothing):
    results = make_results()
    arm = results["arms"]["exact"]
    arm["steps"] = arm["step_cost_ms"] = nothing
    for run in arm["runs"]:
        run["final_accuracy"] = run["final_loss"] = run["reference_s_to_target"] = nothing
    results["comparison"]["exact"] = dict.fromkeys(results["comparison"]["sift"], nothing)
    html = render(results)
    row = next(row for row in re.findall(r"<tr>.*?</tr>", html, re.DOTALL) if ">exact<small>" in row)
    cells = [re.sub(r"<.*?>", " ", cell).split() for cell in re.findall(r"<td>(.*?)</td>", row)]
    assert cells == [["–"], ["–", "–"], ["–"], ["–"], ["–"], ["–"], ["–"], ["0", "of", "3"]]
    assert not re.search(r"\b(nan|inf|None)\b", html)


def test_table_shows_the_numbers_of_the_results():
    html = render(make_results())
    row = next(row for row in re.findall(r"<tr>.*?</tr>", html, re.DOTALL) if "sift, depth 1<small>" in row)
    text = " ".join(re.sub(r"<.*?>", " ", row).split())
    for expected in (
        "1,059",
        "226.50 ms 1.13× uniform",
        "32.20% 31.83% … 32.47%",
        "+1.02 points +0.81 … +1.27",
        "1.13× 1.09× … 1.16×",
        "185.4 s",
        "3 of 3",
    ):
        assert expected in text


def test_equal_results_give_equal_bytes(tmp_path):
    write_results(tmp_path, make_results())
    first = [write_report(tmp_path).read_bytes(), (tmp_path / "curves.png").read_bytes()]
    second = [write_report(tmp_path).read_bytes(), (tmp_path / "curves.png").read_bytes()]
    assert first == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["curves.png", "report.html", "results.json"]


def test_page_is_accessible_in_its_structure():
    page = Page(render(make_results()))
    levels = [int(tag[1]) for tag in page.tags() if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert dict(page.elements)["html"] == {"lang": "en"}
    assert "title" in page.tags()
    assert all(attributes.get("scope") in {"row", "col"} for tag, attributes in page.elements if tag == "th")
    assert page.tags().count("figure") == page.tags().count("figcaption") == page.tags().count("svg") == 3


def test_references_inside_the_figures_resolve_to_one_element_each():
    html = render(make_results())
    names = Page(html).values("id")
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:url\(|href=")#([^")]+)', html)) <= set(names)


def test_order_of_the_page_is_answer_first():
    html = render(make_results())
    parts = ["<h1>", "Speed-up over uniform", "Learning curves", "Fidelity", "Cost of a step</h2>"]
    parts += ["How it was measured", "Configuration", "Machine", "Versions", "abc1234"]
    positions = [html.index(part) for part in parts]
    assert positions == sorted(positions)


def test_curves_have_eight_panels_that_share_the_vertical_axis_in_a_row():
    grid = curves_figure(make_results()).axes
    assert len(grid) == 8
    for row in (grid[:4], grid[4:]):
        assert len({axes.get_ylim() for axes in row}) == 1
    assert grid[0].get_ylim() != grid[4].get_ylim()


def test_bold_line_is_the_mean_over_seeds():
    results = make_results()
    (bold,) = [line for line in curves_figure(results).axes[3].lines if line.get_label() == "uniform"]
    curves = [run["curve"] for run in results["arms"]["uniform"]["runs"]]
    assert list(bold.get_xdata()) == [point["step"] for point in curves[0]]
    means = [sum(point["accuracy"] for point in points) / 3 for points in zip(*curves, strict=True)]
    assert list(bold.get_ydata()) == pytest.approx(means)


def test_mean_stops_where_the_first_seed_stops():
    results = make_results()
    runs = results["arms"]["sift"]["runs"]
    runs[1]["curve"] = runs[1]["curve"][:12]
    (bold,) = [line for line in curves_figure(results).axes[1].lines if line.get_label() == "sift, depth 1"]
    assert max(bold.get_xdata()) <= runs[1]["curve"][-1]["wall_s"]


def test_an_arm_keeps_its_color_whatever_runs_beside_it():
    arms = make_results(1)["arms"]
    alone = arm_colors({"arms": {"sift": arms["sift"]}})
    crowd = arm_colors({"arms": {"mine": arms["exact"], **arms, "yours": arms["exact"]}})
    assert alone["sift"] == crowd["sift"]
    assert len(set(crowd.values())) == 5


def test_cost_bars_add_up_to_the_measured_cost():
    bars = cost_figure(make_results()).axes[0].patches
    lengths = [train.get_width() + score.get_width() for train, score in zip(bars[::2], bars[1::2], strict=True)]
    assert lengths == pytest.approx([cost / STEP_COSTS_MS["uniform"] for cost in STEP_COSTS_MS.values()])
    assert [bar.get_width() for bar in bars[::2]] == pytest.approx([1, 1, 1])


def test_drawing_changes_no_global_setting():
    def settings():  # reading the backend would choose one
        return {name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}

    before = settings()
    render(make_results(4))
    assert settings() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "expected JSON in .*results.json, found damaged or cut text .*repeat the comparison"),
        (json.dumps(make_results(1)).encode()[:500], "found damaged or cut text"),
        (b"\xff\xfe\x00\x01", "found damaged or cut text"),
        (b"[1, 2]", "expected results of version 1 in .*, found version None; upgrade earlysift"),
        (b'{"version": 2}', "expected results of version 1 in .*, found version 2; upgrade earlysift"),
    ],
    ids=["empty", "truncated", "binary", "no object", "newer"],
)
def test_unreadable_results_give_one_clear_error(tmp_path, content, message):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        write_report(tmp_path)
    assert "\n" not in str(raised.value)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


@pytest.mark.parametrize("folder", ["", "no such folder"])
def test_folder_without_results_gives_one_clear_error(tmp_path, folder):
    message = "expected the results of a comparison in .*results.json, found no such file; give the folder"
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
    with pytest.raises(AttributeError):
        write_report(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


@pytest.mark.parametrize("width", [390, 1200])
def test_browser_shows_headline_and_figures_without_sideways_scrolling(tmp_path, width):
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on this machine")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    results = make_results()
    write_results(tmp_path, results)
    address = write_report(tmp_path).as_uri()
    troubles, requests = [], []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": width, "height": 800}, offline=True)
        page = context.new_page()
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("console", lambda message: troubles.append(message.text))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(address)
        assert page.locator("h1").inner_text() == results["verdict"]
        assert page.locator("h1").is_visible()
        assert page.locator("figure svg").count() == 3
        for figure in page.locator("figure svg").all():
            assert figure.is_visible()
            assert figure.bounding_box()["height"] > 100
        assert page.evaluate("document.documentElement.scrollWidth") == width
        browser.close()
    assert troubles == []
    assert requests == [address]
