"""What the documents say is true: examples run, the map is complete, numbers come from committed results."""

import ast
import importlib
import importlib.util
import re
from pathlib import Path

import pytest

from processes import ends_of_ranks
from test_peers import EASIEST
from test_structure import FLOORS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [
    *("README.md", "CONTRIBUTING.md", "SECURITY.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]

# Code that an example of the page relies on: the README shows the loop alone.
SETUP = {
    "README.md": """
import torch
from transformers import BertConfig, BertForMaskedLM

model = BertForMaskedLM(BertConfig(vocab_size=100, hidden_size=64, num_attention_heads=2, intermediate_size=128))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
ids = torch.randint(5, 100, (256, 32))
loader = torch.utils.data.DataLoader([{"input_ids": row, "labels": row} for row in ids], batch_size=16)
"""
}
PRINTED = {
    "README.md": "sift/rank_correlation",
    "docs/when-it-helps.md": "sift/step",
    "docs/trainer.md": "'samples_trained': 32",
    "docs/speed.md": "16 positions: ",
}
EXAMPLE = re.compile(r"```python\n(.*?)```(?:(?:(?!```).)*```text\n(.*?)```)?", flags=re.DOTALL)
EXAMPLES = [
    pytest.param(page, code, output, id=f"{page}-{number}")
    for page in PAGES
    for number, (code, output) in enumerate(EXAMPLE.findall((ROOT / page).read_text(encoding="utf-8")))
]


@pytest.mark.parametrize(("page", "code", "output"), EXAMPLES)
def test_an_example_runs_and_prints_what_the_page_shows(page, code, output, tmp_path):
    ((status, printed, errors),) = ends_of_ranks(1, SETUP.get(page, "") + code, tmp_path)
    assert status == 0, errors
    assert PRINTED.get(page, "") in printed
    assert output in ("", printed)


def test_every_page_that_must_print_something_has_one_example():
    pages = [example.values[0] for example in EXAMPLES]
    assert {page: pages.count(page) for page in PRINTED} == dict.fromkeys(PRINTED, 1)


def floor_of(name):
    """The floor that a file of the library stands on; None for a benchmark, which stands on none."""
    first, *_, room = Path(name).parts[:3]
    return None if first == "benchmarks" else {**FLOORS, "__init__": 10}[room.removesuffix(".py")]


def purpose_of(name):
    """The first line of a file's docstring: a first draft of its line in the map."""
    return ast.get_docstring(ast.parse((ROOT / name).read_text(encoding="utf-8"))).partition("\n")[0]


def test_map_names_every_file_once_under_its_floor():
    lines, floors = [], set()
    for line in (ROOT / "docs" / "map.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("## "):
            numbers = [int(number) for number in re.findall(r"-?\d+", line)]
            floors = range(min(numbers), max(numbers) + 1) if numbers else {None}
        elif named := re.match(r"- `((?:src|benchmarks)/\S+\.py)`: ", line):
            lines.append((named[1], floors, line))
    named = [name for name, _, _ in lines]
    files = {str(path.relative_to(ROOT)) for folder in ("src", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    files -= {name for name in files if name.endswith("/__init__.py")} - {"src/earlysift/__init__.py"}
    problems = [f"remove, there is no such file: {line}" for name, _, line in lines if name not in files]
    problems += [f"remove, it is there twice: {line}" for name, _, line in lines if named.count(name) > 1]
    problems += [
        f"move to floor {floor_of(name)}: {line}"
        for name, under, line in lines
        if name in files and floor_of(name) not in under
    ]
    problems += [
        f"add under floor {floor_of(name)}:\n- `{name}`: {purpose_of(name)}" for name in sorted(files.difference(named))
    ]
    assert not problems, "\n".join(["docs/map.md is not true:", *problems])


def test_results_page_is_what_the_committed_results_give(results_page, tmp_path, monkeypatch):
    monkeypatch.setattr(results_page, "ROOT", tmp_path)  # write elsewhere; results are still read from the repository
    (tmp_path / "docs").mkdir()
    results_page.main()
    for name in (
        "results.md",
        *(f"{picture}-{theme}.svg" for picture in ("verdict", "speed-ups") for theme in ("light", "dark")),
    ):
        assert (tmp_path / "docs" / name).read_bytes() == (ROOT / "docs" / name).read_bytes(), name


def test_readme_is_short_and_shows_a_committed_result(results_page):
    assert len(README.splitlines()) <= 90
    assert results_page.readme_section() in README
    assert re.findall(r'(?:srcset|src)="([^"]+)"', README) == ["docs/verdict-dark.svg", "docs/verdict-light.svg"]


def test_caption_of_the_picture_says_what_the_result_shows(results_page):
    results = results_page.read(results_page.RESULTS / results_page.README_RESULTS)
    entries = results["comparison"]
    assert f"final accuracy {entries['memory']['speedup']:.2f} times as fast; `auto` finds them" in README
    assert entries["sift-2"]["verdict"].startswith("Harm")
    runs = results["arms"]["auto"]["runs"]
    assert all(any("memory" in event["to"] for event in run["events"]) for run in runs)


def test_theory_page_shows_the_committed_measurements(results_page):
    assert results_page.theory_section() in (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")


def test_reliability_page_shows_the_committed_scorecard(results_page):
    assert results_page.scorecard_section() in (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


def test_theory_page_links_statements_to_functions_and_tests_that_exist():
    text = (ROOT / "docs" / "theory.md").read_text(encoding="utf-8")
    functions = re.findall(r"`((?:theory\.)?\w+\.\w+)`", text.partition("## Where each statement is")[2])
    tests = set(re.findall(r"`(test_\w+)`", text))
    assert len(functions) > 20
    for name in functions:
        module, function = name.rsplit(".", 1)
        assert hasattr(importlib.import_module(f"earlysift.{module}"), function), name
    source = "".join((ROOT / "tests" / name).read_text() for name in ("test_theory.py", "test_costs.py"))
    assert len(tests) > 10
    assert [name for name in tests if f"def {name}(" not in source] == []


def anchors(text):
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_between_documents_lead_somewhere():
    for name in PAGES:
        text = (ROOT / name).read_text(encoding="utf-8")
        for file, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#?([^)]*)\)", text):
            target = (ROOT / name).parent / file if file else ROOT / name
            assert target.exists(), f"{name} links to {file}"
            assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{name}: no {file}#{anchor}"


def test_contributing_is_short_and_names_the_three_commands():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 50
    assert all(f"make {target}" in text for target in ("test", "lint", "demo"))


def test_examples_of_new_files_are_the_files_that_tests_run_as_a_user_would():
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    assert f"```python\n{EASIEST.strip()}\n```" in page
    assert f"```python\n{(ROOT / 'tests' / 'new_tasks' / 'majority.py').read_text().strip()}\n```" in page
