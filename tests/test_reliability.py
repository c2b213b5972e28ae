"""The scorecard itself: it lists the whole bar, counts what was tried, and goes on behind the case where it was cut."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reliability(results_page):
    """The script, which the one that writes the pages finds beside it."""
    import reliability

    return reliability


def test_every_line_of_the_bar_has_cases_or_says_why_not(reliability, results_page):
    lines = {name.partition(" ")[0] for name in reliability.LINES}
    others = [*reliability.ELSEWHERE, *reliability.NOT_RUN]
    assert {f"S{number}" for number in range(1, 32)} == {name for name in [*lines, *others] if name.startswith("S")}
    assert lines.isdisjoint(others)
    assert len(set(others)) == len(others)
    table = results_page.scorecard_section().splitlines()
    shown = [cells[1].strip() for line in table if len(cells := line.split("|")) > 2][2:]
    assert len(shown) == len(reliability.LINES) + len(others)
    numbers = [int(re.match(r"S(\d+)", name)[1]) for name in shown if name.startswith("S")]
    assert numbers == sorted(numbers)


def test_tests_of_every_line_exist(reliability):
    for name, line in reliability.LINES.items():
        words = re.split(r" or ", line.names)
        texts = [(ROOT / "tests" / f"test_{file}.py").read_text() for file in line.files.split()]
        for word in words:
            assert any(re.search(rf"def test_\w*{word}", text) for text in texts), (name, word)


def row(case, outcome="passed", **properties):
    return json.dumps(
        {"case": f"t.py::{case}", "outcome": outcome, "seconds": 2, "properties": list(properties.items())}
    )


def test_a_case_that_fails_at_its_end_counts_as_failed_and_tests_of_several_cases_as_these(reliability):
    rows = [row("a", worst=0.5), row("b", cases=10, detail="near"), row("c"), row("c", "failed"), row("d", "skipped")]
    found = reliability.summary(rows)
    assert (found["passed"], found["tried"], found["failed"]) == (11, 13, ["c", "d"])
    assert found["detail"] == ["near", "largest 0.5"]
    assert found["seconds"] == 10


@pytest.mark.parametrize(
    ("passed", "tried", "said"),
    [(1200, 1200, "1,200"), (30, 30, "30 of 30 tried"), (30, 31, "30 **missed**"), (0, 2, "0 **missed**")],
)
def test_a_line_that_was_cut_is_told_from_one_that_failed(passed, tried, said, results_page):
    assert results_page._passed({"cases": 1000, "passed": passed, "tried": tried}) == said


CUT = """
import os, signal

def test_a(record_property):
    record_property("cases", 3)

def test_b():
    if not os.path.exists("again"):
        open("again", "w").close()
        os.kill(os.getpid(), signal.SIGKILL)

def test_c():
    assert False
"""


def test_a_killed_run_goes_on_behind_the_case_where_it_was_cut(reliability, tmp_path):
    (tmp_path / "test_cut.py").write_text(CUT)
    outcomes = tmp_path / "outcomes.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), "EARLYSIFT_OUTCOMES": str(outcomes)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "outcomes", "-p", "no:cacheprovider", "test_cut.py"]
    codes, counts = [], []
    for _ in range(3):
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        codes.append(done.returncode)
        counts.append(len(outcomes.read_text().splitlines()))
    assert (codes, counts) == ([-9, 1, 5], [1, 3, 3])
    found = reliability.summary(outcomes.read_text().splitlines())
    assert (found["passed"], found["failed"]) == (4, ["test_c"])
