"""Groups in the Trainer: its ledger counts those of the data set's own column, and training is as it was without."""

import dataclasses
import warnings

import pytest
import torch

from earlysift.coverage import coverage
from earlysift.ledger import read_rows
from test_huggingface import BATCH, HALF, Recorded, assert_equal_runs, samples, trained, trainer_for

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import datasets

GROUPED = dataclasses.replace(HALF, group="source")


def rows_with_groups(count):
    return [row | {"source": number % 3} for number, row in enumerate(samples(count))]


def as_data_set(rows):
    return datasets.Dataset.from_dict(
        {name: [torch.as_tensor(row[name]).tolist() for row in rows] for name in rows[0]} | {"text": ["x"] * len(rows)}
    )


@pytest.mark.parametrize("kind", [list, as_data_set])
@pytest.mark.parametrize("ids", [None, "number"])
def test_every_candidate_is_counted_in_its_group_and_training_is_as_without(tmp_path, monkeypatch, kind, ids):
    monkeypatch.setattr(Recorded, "ledger_path", tmp_path / "ledger.jsonl")
    rows = rows_with_groups(24)
    sift = dataclasses.replace(GROUPED, sample_id=ids)
    options = {"max_steps": 4, "gradient_accumulation_steps": 3}
    run = trained(tmp_path, data=kind(rows), sift=sift, **options)
    group_of = {tuple(row["input_ids"].tolist()): str(row["source"]) for row in rows}
    counted = [row["groups"] for row in read_rows(tmp_path / "ledger.jsonl") if "groups" in row]
    assert len(counted) == len(run.batches) == 12
    for groups, batch in zip(counted, run.batches, strict=True):
        kept = [group_of[tuple(row)] for row in batch]
        assert {name: found for name, (_, found) in groups.items()} == {name: kept.count(name) for name in groups}
        assert sum(found for _, found in groups.values()) == BATCH
    for epoch in (counted[i : i + 3] for i in range(0, 12, 3)):  # every candidate is offered once
        assert [sum(groups.get(name, [0])[0] for groups in epoch) for name in "012"] == [8, 8, 8]
    assert set(coverage(read_rows(tmp_path / "ledger.jsonl"), 2)) == {0, 2}
    assert_equal_runs(run, trained(tmp_path, data=samples(24), sift=HALF, **options))


def test_samples_without_groups_are_refused_with_the_way_out(tmp_path):
    message = r"no groups under group='source'\. Give the data set a column of their numbers"
    with pytest.raises(ValueError, match=message):
        trained(tmp_path, data=samples(16), sift=GROUPED)
    with pytest.raises(ValueError, match=message):
        trainer_for(tmp_path, data=as_data_set(samples(16)), sift=GROUPED)
    with pytest.raises(ValueError, match=r"groups, int64 \(8,\), under 'source' in the pool, got list"):
        trained(tmp_path, data=[row | {"source": "web"} for row in samples(16)], sift=GROUPED)
