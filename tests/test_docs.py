"""What the documents say is true: blocks run, the file map is complete, numbers come from committed results."""

import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("README.md", "sift/rank_correlation"),
        ("docs/when-it-helps.md", "sift/step"),
        ("docs/trainer.md", "'samples_trained': 32"),
        ("docs/speed.md", "16 positions: "),
    ],
)
def test_a_document_has_one_python_block_and_it_runs(name, printed, tmp_path):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len(blocks) == 1
    command = [sys.executable, "-c", blocks[0]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert printed in done.stdout
    shown = re.findall(r"```text\n(.*?)```", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert all(text == done.stdout for text in shown if printed in text)


def test_file_map_names_every_source_file_and_no_other():
    named = set(re.findall(r"^((?:src|benchmarks)/\S+\.py)  ", README, flags=re.MULTILINE))
    files = {str(path.relative_to(ROOT)) for folder in ("src", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    packages = {name for name in files if name.endswith("__init__.py")} - {"src/earlysift/__init__.py"}
    assert named == files - packages


def test_results_page_is_what_the_committed_results_give(results_page, tmp_path, monkeypatch):
    monkeypatch.setattr(results_page, "ROOT", tmp_path)  # write elsewhere; results are still read from the repository
    (tmp_path / "docs").mkdir()
    results_page.main()
    assert (tmp_path / "docs" / "results.md").read_text() == (ROOT / "docs" / "results.md").read_text()


def test_readme_shows_the_committed_demo_result(results_page):
    assert results_page.demo_section() in README


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


def test_links_between_documents_lead_somewhere():
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "docs/design.md",
        "docs/log.md",
        "docs/pretrain.md",
        "docs/reliability.md",
        "docs/results.md",
        "docs/scaling.md",
        "docs/speed.md",
        "docs/theory.md",
        "docs/trainer.md",
        "docs/when-it-helps.md",
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", text):
            assert ((ROOT / name).parent / target).exists(), f"{name} links to {target}"


def test_contributing_is_short_and_names_the_three_commands():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 50
    assert all(f"make {target}" in text for target in ("test", "lint", "demo"))
