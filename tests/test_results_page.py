"""docs/results.md: its picture, what it shows and folds away, and what it says of arms, charges and decisions."""

import copy
import importlib
import re
import sys
from pathlib import Path

import pytest

from earlysift.pretrain.workload_settings import TASKS

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


@pytest.fixture(scope="module")
def page(results_page):
    """A function that gives the modules which the page is made by, by name."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    yield importlib.import_module
    sys.path.remove(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def committed(page):
    """Every committed comparison."""
    return page("workloads").read_all(ROOT / "benchmarks" / "results")


@pytest.fixture
def results(page):
    """Three seeds; InfoBatch never acts, exact loss scores 100 pools of 100 steps, auto has a probe."""
    made = {
        "config": {
            **{"budget": 10.0, "seeds": 3, "target": None, "target_share": 0.95},
            **{"layers": 2, "batch": 8, "keep": 0.5, "learning_rate": 0.001},
        },
        "data": {"name": "letters, images", "task": "image", "train_samples": 400},
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
    return made | page("workloads").judged(made)


def again(page, results):
    """Judged anew, after a change of runs or settings."""
    return results | page("workloads").judged(results)


def line_of(page, results):
    """The only row of an overview."""
    name = page("workloads").spelled([results])[0]
    workload = page("workloads").Workload(name, "compare_letters.json", results, {})
    return page("comparisons").overview([workload], short=True).splitlines()[2]


def unfolded(text):
    """Markdown without what is folded away, nested or not."""
    while (less := re.sub(r"<details>(?:(?!<details>).)*?</details>", "", text, flags=re.DOTALL)) != text:
        text = less
    return text


def tables_in(text):
    return len(re.findall(r"^\| --- ", text, flags=re.MULTILINE))


def sections_of(text):
    """Text under each heading of the second level, by heading."""
    return {part.partition("\n")[0]: part.partition("\n")[2] for part in text.split("\n## ")[1:]}


@pytest.fixture(scope="module")
def text():
    return (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_an_arm_that_never_acted_is_not_the_fastest(page, results):
    assert results["comparison"]["infobatch"]["speedup"] > results["comparison"]["exact"]["speedup"]
    row = line_of(page, results)
    assert "infobatch" not in row
    assert "exact: " in row
    lines = page("arm_tables").verdict_table(results).splitlines()
    (row,) = [line for line in lines if line.startswith("| infobatch")]
    assert row.endswith("| Never acted |")


def test_nothing_is_fastest_where_no_other_arm_acted(page, results):
    del results["comparison"]["exact"]
    assert line_of(page, results).split("|")[4].strip() == "–"


def test_a_control_is_not_the_best_arm(page, results):
    results["arms"]["visible"] = {
        "label": "visible labels",
        "charged": True,
        "runs": [run(seed, (0.0, 0.5, 0.6)) for seed in range(3)],
    }
    results = again(page, results)
    assert results["comparison"]["visible"]["verdict"].startswith("Gain")
    assert "visible" not in line_of(page, results)
    assert page("workloads").proven_speedup(results) == 0
    assert page("workloads").rows(results)[0].label == "visible labels (control)"


def test_auto_with_too_few_probes_is_said_to_have_had_too_few(page, results):
    decisions = page("arm_tables").decisions
    assert decisions(results).splitlines()[0] == (
        "- seed 0 (1 look, 1.0 % of the time for probes): uniform throughout, as a decision needs 2 looks"
    )
    for one in results["arms"]["auto"]["runs"]:
        one["control"] = [{"step": step, "reference_s": step / 10} for step in (10, 20, 30)]
    assert decisions(results).splitlines()[0].endswith("(3 looks, 1.0 % of the time for probes): uniform throughout")


def test_what_scoring_was_charged_stands_beside_what_it_took(page, results):
    charges_table = page("arm_tables").charges_table
    header, _, *rows = charges_table(results).strip().splitlines()
    assert header.count("|") == rows[0].count("|")
    assert rows == ["| exact | 30.0 | 25.0 | 60.0 | 50.0 | 0.500 | 0.500 | +0 % |"]
    results["measured_ms"]["exact: score"]["median"] = 19.0
    assert charges_table(results).strip().endswith("| 0.500 | 0.400 | +25 % |")


def test_results_without_scoring_have_no_table_of_charges(page, results):
    del results["arms"]["exact"]
    assert page("arm_tables").charges_table(results) == ""


def test_the_easier_target_has_a_column_where_it_is_another(page, results):
    workloads, verdict_table = page("workloads"), page("arm_tables").verdict_table
    assert workloads.against_easier_target(results) == {}
    assert " to 95%" not in verdict_table(results, {})
    easy = results["comparison"]
    results["config"] |= {"target_share": 1.0}
    hard = again(page, results)
    before = copy.deepcopy(hard)
    easier = workloads.against_easier_target(hard)
    assert hard == before  # times to the workload's own target stay
    assert easier["exact"]["speedup"] == easy["exact"]["speedup"] != hard["comparison"]["exact"]["speedup"]
    header, _, *rows = verdict_table(hard, easier).splitlines()
    assert "| speed-up to 100% | to 95% |" in header
    assert [row.count("|") for row in rows] == [header.count("|")] * len(ACCURACIES)
    assert f"| {easy['exact']['speedup']:.2f} (" in next(row for row in rows if row.startswith("| exact"))


@pytest.mark.parametrize("task", TASKS)
def test_workloads_of_every_task_are_named_and_told_apart_if_augmented_or_longer(page, results, task):
    every = [copy.deepcopy(results) for _ in range(3)]
    for each in every:
        each["data"] |= {"task": task}
    every[1]["data"] |= {"augmented": True}
    every[2]["config"] |= {"steps": 100}
    names = page("workloads").spelled(every)
    assert len(set(names)) == 3
    assert "(augmented)" in names[1]
    assert names[2].endswith("steps 100")


def test_a_workload_is_named_after_data_model_and_length(page, results):
    (name,) = page("workloads").spelled([results])
    assert name == "letters, ViT 2 layers, 2 epochs"
    others = [copy.deepcopy(results) for _ in range(3)]
    others[0]["data"] |= {"name": "mnist.npz, image classification", "flipped": 0.2}
    others[1]["data"] |= {"name": "Python 3.11.7 standard library, causal LM", "task": "causal_lm"}
    others[1]["data"] |= {"train_samples": 10_000}
    others[2]["config"] |= {"learning_rate": 0.002}
    assert page("workloads").spelled([results, *others]) == [
        "letters, ViT 2 layers, 2 epochs, learning rate 0.001",
        "MNIST (20% of labels flipped), ViT 2 layers, 2 epochs",
        "Python code next tokens, Llama 2 layers, 100 steps",
        "letters, ViT 2 layers, 2 epochs, learning rate 0.002",
    ]


def test_workloads_that_were_measured_again_are_told_apart_by_their_commits(page, results):
    every = [copy.deepcopy(results) | {"commit": commit} for commit in ("0123456", "abcdef0")]
    name = "letters, ViT 2 layers, 2 epochs, commit"
    assert page("workloads").spelled(every) == [f"{name} 0123456", f"{name} abcdef0"]


@pytest.mark.parametrize(
    ("constant", "reached", "hidden", "leaves"),
    [
        (0.1, 0.5, None, True),
        (0.1, 0.15, None, False),
        (0.5, 0.7, None, True),  # of two classes, where no accuracy is twice the constant one's
        (0.5, 0.65, None, False),
        (0.05, 0.15, 0.06, False),  # visible tokens were copied
        (0.05, 0.25, 0.15, True),
    ],
)
def test_a_plateau_is_left_by_twice_the_odds_on_hidden_tokens(page, results, constant, reached, hidden, leaves):
    results["baseline"]["accuracy"] = constant
    for one in results["arms"]["uniform"]["runs"]:
        one |= {"final_accuracy": reached} | ({} if hidden is None else {"final_hidden_accuracy": hidden})
    workloads = page("workloads")
    assert workloads.leaves_plateau(results) is leaves
    assert workloads.pictured(workloads.Workload("letters", "", results, {})) is leaves
    results["arms"]["uniform"]["runs"].pop()  # two seeds give no interval
    assert not workloads.pictured(workloads.Workload("letters", "", results, {}))


def test_picture_has_the_fastest_first_and_those_that_missed_the_target_last(page, results):
    def arm(accuracies, **more):
        return {"label": "", "charged": True, "runs": [run(seed, accuracies) for seed in range(3)]} | more

    results["arms"] |= {
        "free": arm((0.0, 0.6, 0.6), label="free", charged=False),
        "memory": arm((0.0, 0.6, 0.6), label="memory"),
        "sift": arm((0.0, 0.2, 0.3), label="SIFT"),
        "late": arm((0.0, 0.2, 0.05), label="late"),
    }
    results["arms"]["late"]["runs"][0] = run(0, (0.0, 0.4, 0.7))
    rows = page("workloads").rows(again(page, results))
    assert [row.label for row in rows] == ["memory", "auto", "exact", "late", "SIFT"]
    assert [row.note for row in rows] == ["", "", "", "1 of 3 seeds arrived", "\N{MINUS SIGN}20.0 points"]
    assert [row.outcome.word for row in rows] == ["gain", "could not decide", "no gain", "no gain", "harm"]


def test_verdicts_differ_in_shape_and_missed_targets_are_hollow_at_the_edge(page):
    from matplotlib.figure import Figure

    pictures, workloads = page("pictures"), page("workloads")
    outcomes = [workloads.GAIN, workloads.HARM, workloads.NEVER_ACTED]
    arrived = [workloads.Row(each.word, each, 1.2, 1.1, 1.3, "") for each in outcomes]
    missed = [workloads.Row(f"missed, {each.word}", each, None, None, None, "note") for each in outcomes]
    axes = Figure().subplots()
    heights, labels = pictures._draw_rows(axes, {"data, model": [*arrived, *missed]}, pictures.THEMES["light"])
    assert heights == [1, 2, 3, 4, 5, 6]
    assert labels == [row.label for row in (*arrived, *missed)]
    marks = [line for line in axes.lines if line.get_marker() != "None"]
    assert len({line.get_marker() for line in marks[:3]}) == len({line.get_color() for line in marks[:3]}) == 3
    assert [line.get_marker() for line in marks[3:]] == [line.get_marker() for line in marks[:3]]
    assert [line.get_fillstyle() for line in marks] == ["full"] * 3 + ["none"] * 3
    assert [line.get_xdata()[0] for line in marks] == [1.2] * 3 + [0.02] * 3
    assert [words.get_text() for words in axes.texts] == ["data", "model", *["note"] * 3]


def test_columns_of_the_picture_hold_every_workload_in_order(page):
    row = page("workloads").Row("", page("workloads").GAIN, 1.0, 1.0, 1.0, "")
    sizes = {"a": 7, "b": 3, "c": 5, "d": 9}
    left, right = page("pictures")._two_columns({name: [row] * size for name, size in sizes.items()})
    assert (left, right) == (["a", "b"], ["c", "d"])


def test_page_opens_with_the_picture_and_six_sentences_at_most(text):
    head = unfolded(text.partition("\n## ")[0])
    assert re.match(r"# Results\n\n<picture>.*?</picture>\n\n\*[^*]+\*\n", head, flags=re.DOTALL)
    assert set(re.findall(r'(?:srcset|src)="([^"]+)"', head)) == {"speed-ups-dark.svg", "speed-ups-light.svg"}
    introduction = head.partition("*\n\n")[2].partition("| workload")[0]
    assert 0 < len(re.findall(r"\.(?:\s|$)", introduction)) <= 6
    assert tables_in(head) == 1


def test_every_workload_has_one_verdict_and_one_table_and_folds_the_rest(text, page, committed):
    sections = sections_of(text)
    enough = [workload for workload in committed if page("workloads").leaves_plateau(workload.results)]
    short = [workload for workload in committed if workload not in enough]
    assert list(sections)[: len(enough) + 1] == [*(workload.name for workload in enough), "Too short to say anything"]
    for workload in enough:
        shown = unfolded(sections[workload.name])
        assert tables_in(shown) == 1
        assert shown.startswith(f"\n**{workload.results['verdict']}**\n")
        for told in ("| % of reference time |", "| time to target |", "- Command: ", workload.file):
            assert told in sections[workload.name]
            assert told not in shown
    last = sections["Too short to say anything"]
    assert short
    assert tables_in(unfolded(last)) == 1
    for workload in short:
        assert f"<summary>{workload.name}</summary>" in last
        assert f"| {workload.name} |" in unfolded(last)
    for workload in committed:
        assert text.count(f"[{workload.file}](") == 1


def test_links_within_the_page_and_to_it_lead_to_headings(text, page):
    slug = page("comparisons").slug
    assert slug("MNIST (20% flipped), 4.6 epochs") == "mnist-20-flipped-46-epochs"
    headings = [slug(heading) for heading in re.findall(r"^##+ (.*)$", text, flags=re.MULTILINE)]
    assert len(set(headings)) == len(headings)
    linked = re.findall(r"\]\(#([^)]+)\)", text)
    for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        linked += re.findall(r"results\.md#([\w-]+)", path.read_text(encoding="utf-8"))
    assert len(linked) > 10
    assert set(linked) <= set(headings)


def test_folds_are_closed(text):
    assert text.count("<details>") == text.count("</details>") == text.count("<summary>")
    assert "details>" not in unfolded(text)
    assert not re.search(r"</summary>\n[^\n]", text)  # GitHub reads Markdown only after an empty line


def test_sentences_that_are_not_counted_hold_for_the_committed_results(page, committed, text):
    workloads = page("workloads")
    enough = [workload for workload in committed if workloads.leaves_plateau(workload.results)]
    for _, _, results, _ in enough:
        assert (results["config"]["device"], results["machine"]["threads"]) == ("cpu", 1)
        if results["data"]["task"] == "masked_lm":
            entries = results["comparison"]
            assert entries["visible"]["speedup"] > workloads.proven_speedup(results)
            assert all(entry["final_hidden_accuracy_low"] <= 0 for entry in entries.values())
        elif workloads.proven_speedup(results):
            steps = results["arms"]["uniform"]["runs"][0]["steps"]
            assert steps * results["config"]["batch"] > 4 * results["data"]["train_samples"]
            assert workloads.uniform_accuracy(results)[0] > 0.8
