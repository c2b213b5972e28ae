"""The ledger: a valid JSON line per step, whatever happens."""

import copy
import json
import math
import pickle
import time
import warnings
from statistics import median

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from earlysift import Ledger, Sifter

laws = settings(deadline=None, derandomize=True, database=None, max_examples=100)


def rows_of(path):
    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_step_is_a_row(tmp_path):
    path = tmp_path / "steps.jsonl"
    ledger = Ledger(path)
    for step in range(3):
        ledger.begin(step)
        with ledger.timed("train"):
            pass
        ledger.note(trained=8, note="a \u2028 line\nbreak and \u00fc")
    assert len(rows_of(path)) == 2  # the last one is still open
    last = ledger.end()
    rows = rows_of(path)
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert all(row["trained"] == 8 and row["note"] == "a \u2028 line\nbreak and \u00fc" for row in rows)
    assert all(row["train_ms"] >= 0 and row["step_ms"] >= row["train_ms"] - 1e-3 for row in rows)
    assert last["step"] == 2
    assert ledger.end() == {}
    assert len(rows_of(path)) == 3


def test_a_step_begun_twice_is_one_row(tmp_path):
    path = tmp_path / "steps.jsonl"
    ledger = Ledger(path)
    ledger.begin(0)
    ledger.note(first=1)
    ledger.begin(0)
    ledger.note(second=2)
    ledger.begin(1)
    (row,) = rows_of(path)
    assert (row["step"], row["first"], row["second"]) == (0, 1, 2)


values = st.floats() | st.integers(-(2**60), 2**60) | st.text() | st.booleans() | st.none()


@laws
@given(row=st.dictionaries(st.text(), values))
def test_any_number_or_text_gives_a_valid_row(tmp_path_factory, row):
    path = tmp_path_factory.mktemp("ledger") / "steps.jsonl"
    ledger = Ledger(path)
    ledger.begin(0)
    ledger.note(**row)
    ledger.end()
    (written,) = rows_of(path)
    for key, value in row.items():
        if key in ("step", "step_ms"):
            continue
        if isinstance(value, float):
            assert written[key] == (pytest.approx(value, rel=1e-5, abs=1e-300) if math.isfinite(value) else None)
        else:
            assert written[key] == value


def expected_in_json(value):
    if isinstance(value, dict):
        return {key: expected_in_json(entry) for key, entry in value.items()}
    if not isinstance(value, float):
        return value
    return pytest.approx(value, rel=1e-5, abs=1e-300) if math.isfinite(value) else None


nested = st.recursive(values, lambda inner: st.dictionaries(st.text(max_size=3), inner, max_size=3), max_leaves=8)


@laws
@given(entry=st.dictionaries(st.text(max_size=3), nested))
def test_numbers_within_an_entry_are_rounded_and_valid_like_all_others(tmp_path_factory, entry):
    path = tmp_path_factory.mktemp("ledger") / "steps.jsonl"
    ledger = Ledger(path)
    ledger.begin(0)
    ledger.note(control=entry)
    assert ledger.end()["control"] is entry  # what is not written stays exact
    (written,) = rows_of(path)
    assert written["control"] == expected_in_json(entry)


def test_numbers_within_an_entry_have_six_digits(tmp_path):
    ledger = Ledger(tmp_path / "steps.jsonl")
    ledger.begin(0)
    ledger.note(event={"from": "uniform", "numbers": {"payoff": 1.23456789, "scale": math.inf}})
    ledger.end()
    (row,) = rows_of(tmp_path / "steps.jsonl")
    assert row["event"] == {"from": "uniform", "numbers": {"payoff": 1.23457, "scale": None}}


def test_the_clock_is_in_milliseconds_and_never_goes_back():
    for device in (None, torch.device("cpu")):
        ledger = Ledger(device=device)
        before = time.perf_counter()
        times = [ledger.now_ms() for _ in range(10)]
        after = time.perf_counter()
        assert times == sorted(times)
        assert before * 1e3 <= times[0] <= times[-1] <= after * 1e3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_clock_waits_for_the_device():
    device = torch.device("cuda")
    big = torch.randn(8192, 8192, device=device)
    waiting, launching = Ledger(device=device), Ledger()
    big @ big
    spent_ms = {}
    for name, ledger in (("waiting", waiting), ("launching", launching)):
        waiting.now_ms()
        started = ledger.now_ms()
        for _ in range(20):
            big @ big
        spent_ms[name] = ledger.now_ms() - started
    assert spent_ms["waiting"] > 2 * spent_ms["launching"]


def test_rows_are_appended_to_those_of_an_earlier_run(tmp_path):
    path = tmp_path / "steps.jsonl"
    for _ in range(2):
        ledger = Ledger(str(path))
        ledger.begin(0)
        ledger.end()
    assert len(rows_of(path)) == 2


@pytest.mark.parametrize("path", ["/dev/full", "/dev/null/steps.jsonl"])
def test_a_ledger_that_cannot_be_written_warns_once_and_goes_on(path):
    ledger = Ledger(path)
    ledger.begin(0)
    ledger.note(trained=8)
    with pytest.warns(UserWarning, match=f"The ledger {path} cannot be written .*; it ends here") as caught:
        assert ledger.end()["trained"] == 8
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(1, 4):
            ledger.begin(step)
            with ledger.timed("train"):
                pass
            assert ledger.end()["step"] == step
    assert len(ledger.times_ms("train")) == 3


@pytest.mark.parametrize("max_mib", [1e-6, 200 / 2**20, 1.0, None])
def test_a_limit_keeps_the_latest_rows_in_two_files_of_at_most_its_size(tmp_path, max_mib):
    path, older = tmp_path / "steps.jsonl", tmp_path / "steps.jsonl.1"
    ledger = Ledger(path, max_mib=max_mib, clock=lambda: 0.0)
    for step in range(50):
        ledger.begin(step)
        ledger.end()
    kept = [row["step"] for file in (older, path) if file.exists() for row in rows_of(file)]
    assert kept == list(range(kept[0], 50))
    row = len('{"step": 10, "step_ms": 0.0}\n')
    of_each = 25 if max_mib is None or max_mib == 1.0 else max(1, int(max_mib * 2**20) // row)
    assert len(kept) >= min(50, of_each + 1)
    assert all(file.stat().st_size <= max(row, (max_mib or 1) * 2**20) for file in tmp_path.iterdir())
    assert older.exists() == (max_mib not in (1.0, None))


@pytest.mark.parametrize("max_mib", [0, -1.0, float("nan")])
def test_a_limit_that_is_no_size_is_refused(tmp_path, max_mib):
    with pytest.raises(ValueError, match="max_mib must be above 0 or None, got"):
        Ledger(tmp_path / "steps.jsonl", max_mib=max_mib)


def test_a_full_disk_does_not_end_a_training_run():
    model = torch.nn.Sequential(
        torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)), torch.nn.Linear(4, 3)
    )
    from earlysift import Family

    sifter = Sifter(model, family=Family("0", task="sequence_classification"), ledger=Ledger("/dev/full"))
    pool = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8).remainder(3)
    with pytest.warns(UserWarning, match="cannot be written") as caught:
        batches = [sifter.sift(pool) for _ in range(4)]
    assert len(caught) == 1
    assert len(batches[3][1]) == 4
    assert sifter.step == 4


def test_micro_steps_of_a_step_have_rows_of_their_own():
    ledger = Ledger()
    rows = []
    for step, micro_step in ((0, 0), (0, 1), (1, 0), (1, 1)):
        ledger.begin(step, micro_step)
        ledger.begin(step, micro_step)  # which is open
        ledger.note(trained=10 * step + micro_step)
        rows.append({name: value for name, value in ledger.end().items() if name != "step_ms"})
    assert rows == [
        {"step": 0, "trained": 0},
        {"step": 0, "micro_step": 1, "trained": 1},
        {"step": 1, "trained": 10},
        {"step": 1, "micro_step": 1, "trained": 11},
    ]


def test_a_copy_has_the_times_and_writes_no_row_twice(tmp_path):
    path = tmp_path / "steps.jsonl"
    ledger = Ledger(path)
    ledger.begin(0)
    with ledger.timed("train"):
        pass
    for copied in (copy.deepcopy(ledger), pickle.loads(pickle.dumps(ledger))):
        assert copied.times_ms("train") == ledger.times_ms("train")
        assert copied.end() == {}
    ledger.end()
    copied.begin(1)
    copied.end()
    assert [row["step"] for row in rows_of(path)] == [0, 1]


def test_times_add_up_within_a_step_and_medians_go_over_all():
    ledger = Ledger()
    for step in range(5):
        ledger.begin(step)
        for _ in range(2):
            with ledger.timed("score"):
                pass
        row = ledger.end()
        assert row["score_ms"] == pytest.approx(sum(ledger.times_ms("score")[-2:]))
    times = ledger.times_ms("score")
    assert len(times) == 10
    assert min(times) >= 0
    assert ledger.medians_ms() == {"score": median(times)}
    assert ledger.times_ms("never") == []


def test_operations_that_fail_are_not_measured():
    ledger = Ledger()
    ledger.begin(0)
    with pytest.raises(ZeroDivisionError), ledger.timed("train"):
        _ = 1 / 0
    assert ledger.medians_ms() == {}
    assert "train_ms" not in ledger.end()


def test_memory_of_times_is_bounded():
    ledger = Ledger()
    ledger.begin(0)
    for _ in range(10_050):
        with ledger.timed("train"):
            pass
    assert len(ledger.times_ms("train")) == 10_000
