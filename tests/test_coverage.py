"""Coverage: every candidate is counted in its group, a starved group shows, and a drawn share ends its starvation."""

import copy
import json
import math

import pytest
import torch
from torch import Generator, nn

import models
from earlysift import Ledger, SiftConfig, Sifter, pending
from earlysift.coverage import counts, coverage
from earlysift.ledger import read_rows
from models import build, row_of

SIZES = (16, 12, 12)  # candidates of each group; the last group's losses are the largest
R, B, STEPS = sum(SIZES), 10, 300


def by_given_loss(_model, pool):
    return pool["loss"]


def pools(count):
    groups = torch.repeat_interleave(torch.arange(len(SIZES)), torch.tensor(SIZES))
    for step in range(count):
        generator = Generator().manual_seed(step)
        order = torch.randperm(R, generator=generator)
        losses = torch.rand(R, generator=generator) + 10.0 * (groups == len(SIZES) - 1)
        yield {"loss": losses[order], "class": groups[order]}


def rows_of(count=STEPS, **options):
    """Rows of the ledger of a run on these pools."""
    sifter = Sifter(nn.Linear(1, 1), keep=B / R, score=by_given_loss, group="class", probe_every=0, **options)
    rows = []
    for pool in pools(count):
        assert set(sifter.sift(pool)) == {"loss"}
        rows.append(sifter.ledger.end())
    return rows


def totals(rows):
    """Kept candidates of every group, over all steps."""
    return [sum(row["groups"][str(group)][1] for row in rows) for group in range(len(SIZES))]


# What the ledger says


def test_without_a_drawn_share_only_the_group_with_the_largest_losses_is_kept():
    rows = rows_of()
    assert totals(rows) == [0, 0, STEPS * B]
    assert coverage(rows, STEPS) == {0: {0: 0.0, 1: 0.0, 2: pytest.approx(R / SIZES[2])}}


def test_a_drawn_share_keeps_every_group_as_often_as_it_is_among_what_is_left():
    rows = rows_of(explore=0.2)
    drawn, chosen = 2, 8
    left = [SIZES[0], SIZES[1], SIZES[2] - chosen]
    kept = totals(rows)
    assert kept[0] + kept[1] + (kept[2] - chosen * STEPS) == drawn * STEPS
    for found, candidates, fixed in zip(kept, left, (0, 0, chosen), strict=True):
        share = candidates / sum(left)
        variance = drawn * share * (1 - share) * (sum(left) - drawn) / (sum(left) - 1)  # without replacement
        assert abs(found - STEPS * (fixed + drawn * share)) < 4 * math.sqrt(STEPS * variance)
    (of_run,) = coverage(rows, STEPS).values()
    assert of_run[0] == pytest.approx(drawn / sum(left) * R / B, rel=0.2)
    assert of_run[1] == pytest.approx(drawn / sum(left) * R / B, rel=0.2)


def test_uniform_steps_cover_all_groups_alike():
    (of_run,) = coverage(rows_of(schedule=lambda step: 0.0), STEPS).values()
    assert of_run == pytest.approx({0: 1.0, 1: 1.0, 2: 1.0}, rel=0.1)


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_every_candidate_and_every_kept_one_is_counted_in_its_group(keep):
    model = build("bert", "masked_lm").train()
    generator = Generator().manual_seed(0)
    sifter = Sifter(model, keep=keep, group="source", probe_every=0)
    for _ in range(3):
        batch = models.batch_for(model, "masked_lm", 8, 6, generator)
        groups = torch.randint(0, 3, (8,), generator=generator)
        kept = sifter.sift(batch | {"source": groups})
        assert kept.keys() == batch.keys()
        row = sifter.ledger.end()
        chosen = groups[sifter.selection.indices]
        expected = {str(g): [int((groups == g).sum()), int((chosen == g).sum())] for g in groups.unique().tolist()}
        assert json.loads(json.dumps(row["groups"])) == expected
        assert row["candidates"] == sum(offered for offered, _ in row["groups"].values())


def test_a_partial_pool_is_counted_whole():
    model = build("bert", "masked_lm").train()
    sifter = Sifter(model, kept=4, keep=0.5, group="source", probe_every=0)
    batch = models.batch_for(model, "masked_lm", 8, 6, Generator().manual_seed(0))
    batch["source"] = torch.tensor([0, 0, 5, 5, 5, 5, 5, 5])
    sifter.sift(batch)
    sifter.sift({name: rows[:3] for name, rows in batch.items()})
    assert sifter.ledger.end()["groups"] == {"0": [2, 2], "5": [1, 1]}


def test_groups_change_no_choice_and_no_number():
    chosen = []
    for options in ({}, {"group": "class"}):
        sifter = Sifter(nn.Linear(1, 1), keep=B / R, score=by_given_loss, explore=0.2, probe_every=0, **options)
        for pool in pools(3):
            sifter.sift(pool if options else {"loss": pool["loss"]})
            chosen.append(sifter.selection.indices.tolist())
        assert not any("group" in name for name in sifter.stats())
    assert chosen[:3] == chosen[3:]
    state = Sifter(nn.Linear(1, 1), keep=0.5, score=by_given_loss).state_dict()
    Sifter(nn.Linear(1, 1), keep=0.5, score=by_given_loss, group="class").load_state_dict(state)  # and back


def test_on_an_accelerator_the_row_takes_the_counts_when_it_ends(monkeypatch):
    expected = [row["groups"] for row in rows_of(3)]
    monkeypatch.setattr(pending, "_AT_ONCE", set())
    assert [row["groups"] for row in rows_of(3)] == expected


def test_a_probe_takes_the_groups_out_too():
    model = build("plain", "masked_lm").train()  # its forward knows no other keys
    pool = models.batch_for(model, "masked_lm", 8, 6, Generator().manual_seed(0))
    with_groups = Sifter(model, group="source", family=row_of(model))
    groups = torch.zeros(8, dtype=torch.long)
    assert with_groups.probe(pool | {"source": groups}) == Sifter(model, family=row_of(model)).probe(pool)


def test_ids_and_groups_may_come_together():
    sifter = Sifter(nn.Linear(1, 1), keep=0.5, score=by_given_loss, sample_id="number", group="class")
    pool = next(pools(1))
    assert set(sifter.sift(pool | {"number": torch.arange(R) + 100})) == {"loss"}
    assert sifter.ids.tolist() == (sifter.selection.indices + 100).tolist()
    assert sum(kept for _, kept in sifter.ledger.end()["groups"].values()) == len(sifter.ids)


# What is refused


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class": None}, r"Expected the samples' groups, int64 \(40,\), under 'class' in the pool, got NoneType"),
        ({"class": torch.zeros(R)}, r"got torch.float32 \(40,\)\. Number the groups of the data set \(0, 1, \.\.\.\)"),
        ({"class": torch.zeros(R, dtype=torch.int32)}, r"got torch.int32 \(40,\)"),
        ({"class": torch.zeros(R, 1, dtype=torch.long)}, r"got torch.int64 \(40, 1\)"),
        ({"class": torch.arange(R) - 1}, r"Expected groups in 0\.\.999, got -1 to 38\. Number the groups"),
        ({"class": torch.arange(R) + 961}, r"Expected groups in 0\.\.999, got 961 to 1000"),
    ],
)
def test_groups_that_cannot_be_counted_are_refused_and_nothing_changes(change, message):
    sifter = Sifter(nn.Linear(1, 1), keep=B / R, score=by_given_loss, group="class", probe_every=0)
    pool = {name: rows for name, rows in (next(pools(1)) | change).items() if rows is not None}
    before = copy.deepcopy(sifter.state_dict())
    with pytest.raises(ValueError, match=message):
        sifter.sift(pool)
    assert sifter.state_dict() == before


def test_what_groups_cannot_do_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"group counts each rank's own candidates\. Use scope='local'"):
        SiftConfig(group="class", scope="global")
    with pytest.raises(ValueError, match="group must be the name of a key, or None, got 3"):
        SiftConfig(group=3)
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        coverage([], 0)


# From rows to coverage


def test_windows_begin_at_multiples_of_their_length_and_take_in_their_own_steps_alone():
    rows = [{"step": step, "groups": {"0": [4, int(step < 3)], "1": [4, 1]}} for step in range(7)]
    found = coverage([*rows, {"step": 9}], window=3)
    assert found == {0: {0: 1.0, 1: 1.0}, 3: {0: 0.0, 1: 2.0}, 6: {0: 0.0, 1: 2.0}}
    assert coverage([{"step": 0}]) == {}


def test_a_group_that_a_window_was_not_offered_has_no_coverage_in_it():
    rows = [{"step": 0, "groups": {"2": [3, 1]}}, {"step": 5, "groups": {"2": [3, 1], "10": [3, 3]}}]
    assert coverage(rows, window=5) == {0: {2: 1.0}, 5: {2: 0.5, 10: 1.5}}


def test_a_ledger_file_gives_the_coverage_of_its_run(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    rows = rows_of(5, ledger=ledger)
    assert coverage(read_rows(tmp_path / "ledger.jsonl"), 2) == coverage(rows, 2)


def test_counting_names_every_group_of_the_pool():
    assert counts([3, 3, 11], [0, 2]) == {"3": [2, 1], "11": [1, 1]}
