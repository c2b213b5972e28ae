"""A part of `benchmarks/fuzz.py`: what should be refused is refused in words, and nothing is lost by it."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import pretraining

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def fuzz():
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("fuzz")
    sys.path.remove(str(BENCHMARKS))


def test_a_few_cases_of_every_kind_are_refused_in_words_or_work_and_lose_nothing(tmp_path, record_property):
    out = tmp_path / "fuzz.json"
    command = [sys.executable, str(BENCHMARKS / "fuzz.py"), "--every", "45", "--jobs", "1", "--out", str(out)]
    environment = {**os.environ, "PYTHONPATH": str(pretraining.SOURCE), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.count("Traceback")) == (0, 0), done.stdout + done.stderr
    counts = json.loads(out.read_text())["counts"]
    assert set(counts) == {"command line", "command line, real process", "settings", "library", "state"}
    record_property("cases", sum(row["tried"] for row in counts.values()))
    for row in counts.values():
        assert row["tried"] == row["clear error"] + row["fine"] > 0


def test_cases_are_the_same_for_the_same_seed_and_enough(fuzz):
    names, again, others = ([(case.kind, case.name) for case in fuzz.cases(seed)] for seed in (0, 0, 1))
    assert names == again
    assert names != others
    counts = {kind: sum(kind == other for other, _ in names) for kind in dict.fromkeys(kind for kind, _ in names)}
    assert counts["command line"] >= 400
    assert counts["library"] >= 200
    assert counts["command line, real process"] == 20
