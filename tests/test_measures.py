"""A measure is one value in one file: it works in every place that takes a score."""

import json
import subprocess
import sys

import pytest
import torch

import models
from earlysift import Sifter, costs, scorers
from earlysift.anatomy import find_anatomy
from earlysift.control import Control
from earlysift.measures import MEASURES, Measure
from models import build


def test_names_are_those_of_the_table_and_scores_by_name_are_the_measures_at_an_exit():
    assert list(MEASURES) == [measure.name for measure in MEASURES.values()]
    for name, measure in MEASURES.items():
        approximation = scorers.named(name, 2)
        assert (approximation.name, approximation.measure, approximation.depth) == (name, measure, 2)


def test_measures_are_listed_without_torch():
    code = "import sys; from earlysift.measures import MEASURES; print(list(MEASURES), 'torch' in sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == f"{list(MEASURES)} False"


def unlikely(logits, targets):
    return 1 - logits.softmax(dim=-1).amax(dim=-1)


CONFIDENCE = Measure("confidence", "the smallest probability of the likeliest class", unlikely, unlikely)
"""A measure of a newcomer."""


def pools_of(count):
    for seed in range(count):
        ids = torch.randint(3, models.VOCABULARY, (16, 12), generator=torch.Generator().manual_seed(seed))
        yield {"input_ids": ids, "labels": torch.where(ids % 3 == 0, ids, -100)}


@pytest.mark.parametrize("measure", [*MEASURES.values(), CONFIDENCE], ids=lambda measure: measure.name)
def test_a_measure_needs_its_entry_alone_to_select_count_probe_resume_and_steer(measure, monkeypatch):
    monkeypatch.setitem(MEASURES, measure.name, measure)
    name = measure.name
    model = build("bert", "masked_lm")
    pools = list(pools_of(6))
    sifter = Sifter(model, score=name, depth=2, probe_every=2, dtype=None)
    whole = []
    for pool in pools[:4]:
        batch = sifter.sift(pool)
        scores = scorers.at_exit(measure, 2)(model, pool, dtype=None)
        expected = scores.argsort(descending=True, stable=True)[:8].sort().values
        assert torch.equal(sifter.selection.indices, expected)
        assert torch.equal(batch["input_ids"], pool["input_ids"][expected])
        whole.append(sifter.ledger.end())
    anatomy = find_anatomy(model)
    law = costs.flops_law(anatomy, 2, skips_unlabelled=True)
    labelled = int((pools[3]["labels"] != -100).sum())
    assert whole[3]["scored_flops"] == law.flops(rows=16, length=12, labelled=labelled)
    assert {"rank_correlation", "gain"} <= whole[2].keys()
    resumed = Sifter(model, score=name, depth=2, probe_every=2, dtype=None)
    resumed.load_state_dict(json.loads(json.dumps(sifter.state_dict())))
    for pool in pools[4:]:
        assert torch.equal(sifter.sift(pool)["input_ids"], resumed.sift(pool)["input_ids"])
    auto = Sifter(model, score=name, mode="auto", control=Control(probe_share=0.5), dtype=None)
    for pool in pools:
        auto.sift(pool)
    assert auto.ledger.times_ms("probe")
