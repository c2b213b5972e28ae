"""Pools that were trained on: gradients of a slow twin, the latest batches alone, and records that cost no pass."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Generator

import models
from earlysift import Sifter, controller, scorers
from earlysift.adapters import states
from earlysift.exit_probe import ExitProbe
from earlysift.ledger import Ledger
from earlysift.trained_pool import TrainedPool
from models import build, row_of

NAN, INF = float("nan"), float("inf")


def pool_for(model, rows=8, seed=1):
    return models.batch_for(model, models.task_of(model), rows, 12, Generator().manual_seed(seed))


def columns_of(rows=3, classes=4, width=5, seed=0):
    draw = Generator().manual_seed(seed)
    return {
        "exact": torch.rand(rows, generator=draw),
        "slopes": torch.randn(rows, classes, generator=draw),
        "inputs": torch.randn(rows, width, generator=draw),
        "2": torch.rand(rows, generator=draw),
    }


def seen_of(model, batch, probes=None):
    """What a lesson says of a training pass."""
    with scorers.lesson(model, batch, probes or {1: ExitProbe()}, row_of(model), Ledger()) as seen:
        scorers.training_loss(model, batch, family=row_of(model))
    return seen


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit"])
def test_inner_products_are_those_of_the_gradients_of_the_last_layers_weights(family):
    model = build(family, "sequence_classification")
    batch = pool_for(model)
    pool = TrainedPool(batches=1)
    pool.add(seen_of(model, batch))
    weight = next(p for p in reversed(list(model.parameters())) if p.ndim == 2)
    gradients = []
    for row in range(8):
        one = {name: values[row : row + 1] for name, values in batch.items()}
        model.zero_grad()
        model(**one).loss.backward()
        gradients.append(weight.grad.double().flatten())
    twin = torch.stack(gradients)
    torch.testing.assert_close(pool.gram(), twin @ twin.T, rtol=1e-3, atol=1e-7)


def test_a_head_that_is_run_at_every_position_has_no_gradient_of_one_state_a_sample():
    model = build("llama", "sequence_classification")
    probe = ExitProbe()
    assert seen_of(model, pool_for(model), {1: probe}) == {}
    assert probe.is_taught


def test_a_lesson_tells_exact_losses_and_what_the_probes_told_before_they_learnt():
    model = build("bert", "sequence_classification")
    batch, probes = pool_for(model), {1: ExitProbe(), 2: ExitProbe()}
    seen_of(model, pool_for(model, seed=2), probes)
    before = {depth: probe.state_dict() for depth, probe in probes.items()}
    seen = seen_of(model, batch, probes)
    logits = model(**{name: values for name, values in batch.items() if name != "labels"}).logits
    torch.testing.assert_close(seen["exact"], F.cross_entropy(logits, batch["labels"], reduction="none"))
    for depth, state in before.items():
        twin = ExitProbe()
        twin.load_state_dict(state)
        options = {"family": row_of(model), "dtype": None, "learnt": scorers.Learnt(probes={depth: twin})}
        torch.testing.assert_close(seen[str(depth)], scorers.probe(depth)(model, batch, **options))


def test_the_latest_batches_alone_are_a_pool():
    pool, batches = TrainedPool(batches=2), [columns_of(seed=seed) for seed in range(4)]
    for count, batch in enumerate(batches, start=1):
        pool.add(batch)
        assert pool.is_full == (count >= 2)
    for name, values in pool.columns().items():
        assert torch.equal(values, torch.cat([batches[2][name], batches[3][name]]))
    pool.clear()
    assert (pool.is_full, pool.columns()) == (False, {})


@pytest.mark.parametrize("other", [{"classes": 7}, {"width": 2}], ids=str)
def test_batches_of_another_shape_begin_a_new_pool(other):
    pool = TrainedPool(batches=2)
    pool.add(columns_of())
    pool.add(columns_of(**other))
    assert not pool.is_full
    assert len(pool.columns()["exact"]) == 3
    pool.add({name: values for name, values in columns_of(**other).items() if name != "2"})
    assert not pool.is_full


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_samples_without_a_finite_loss_have_no_gradient(bad):
    columns = columns_of()
    columns["exact"][1], columns["slopes"][1] = bad, NAN
    pool = TrainedPool(batches=1)
    pool.add(columns)
    gram = pool.gram()
    assert gram[1].tolist() == gram[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert (gram.diagonal()[[0, 2]] > 0).all()


def test_a_state_goes_through_the_files_of_a_trainer(tmp_path):
    pool, again = TrainedPool(batches=3), TrainedPool(batches=3)
    for seed, rows in enumerate((3, 2)):
        pool.add(columns_of(rows=rows, seed=seed))
    states.write(tmp_path / "sifter_0.json", {"sifter": {"trained": pool.state_dict()}, "batch_size": 1})
    state = states.read(tmp_path / "sifter_0.json", [])["sifter"]["trained"]
    assert again.state_problems(state) == []
    again.load_state_dict(state)
    for each in (pool, again):
        each.add(columns_of(seed=9))
        each.add(columns_of(seed=10))  # the oldest goes
    for name, values in pool.columns().items():
        assert torch.equal(again.columns()[name], values)
    empty = TrainedPool(batches=3).state_dict()
    assert json.loads(json.dumps(empty)) == empty
    again.load_state_dict(empty)
    assert not again.columns()


BROKEN = {
    "no mapping": (lambda _: None, "must hold rows and columns"),
    "no rows": (lambda state: state | {"rows": None}, "at most 2 batches"),
    "too many": (lambda state: state | {"rows": [1, 1, 1]}, "at most 2 batches"),
    "other rows": (lambda state: state | {"rows": [3, 1]}, r"float32 \(4, ...\)"),
    "other columns": (lambda state: state | {"columns": {"exact": state["columns"]["exact"]}}, "slopes and inputs"),
    "text": (lambda state: state | {"columns": "x"}, r"float32 \(6, ...\)"),
    "whole numbers": (lambda state: state | {"columns": {"exact": torch.ones(6, dtype=torch.int64)}}, "float32"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_state_is_refused_in_one_sentence(name):
    pool = TrainedPool(batches=2)
    for seed in range(2):
        pool.add(columns_of(seed=seed))
    spoil, message = BROKEN[name]
    (problem,) = pool.state_problems(spoil(pool.state_dict()))
    assert re.search(message, problem)


# In auto mode


def auto(model, **options):
    return Sifter(model, kept=4, keep=0.5, mode="auto", dtype=None, **options)


def run(sifter, steps, offered=8):
    """Uniform steps on a model that does not change, and their rows of the ledger."""
    rows = []
    for step in range(steps):
        pool = pool_for(sifter.model, rows=offered, seed=step)
        sifter.loss(sifter.sift(pool))
        rows.append(sifter.ledger.end())
    return rows


def test_while_training_is_uniform_auto_mode_looks_often_and_probes_nothing():
    control = controller.Control(
        reference_costs={"train": 1.0, "probe": 0.5, "score_1": 0.1, "score_2": 0.2, "score_3": 0.3}
    )
    sifter = auto(build("bert", "sequence_classification"), control=control)
    rows = run(sifter, 4 * controller.FREE_EVERY, offered=4)
    assert [row["step"] for row in rows if "control" in row] == [controller.FREE_EVERY * i for i in (1, 2, 3)]
    assert not any("rank_correlation" in row or "probed" in row or "probe_ms" in row for row in rows)
    compiled = auto(build("bert", "sequence_classification"), control=control)
    silent = [compiled.sift(pool_for(compiled.model, seed=step)) and compiled.ledger.end() for step in range(60)]
    assert any("rank_correlation" in row for row in silent)  # whose passes nobody looks into


def test_its_record_is_that_of_a_probe_of_the_same_samples():
    model = build("bert", "sequence_classification")
    sifter = auto(model)
    run(sifter, 9)  # lessons at every second step: 6 and 8 are the latest
    batches = [pool_for(model, seed=seed) for seed in (6, 8)]
    pool = {name: torch.cat([batch[name][:4] for batch in batches]) for name in batches[0]}
    control, runner = sifter._control, sifter._runner
    ours, probed = runner.trained_record(control, 4), sifter.probe(pool)
    assert ours.keys() == probed.keys()
    for name in ("loss", "loss_error", "floor", "concentration"):
        assert ours[name] == pytest.approx(probed[name], rel=1e-4)


def test_a_batch_that_was_selected_ends_the_pool():
    sifter = auto(build("bert", "sequence_classification"))
    run(sifter, 4)
    control, runner = sifter._control, sifter._runner
    assert runner.trained_record(control, 4)
    sifter.sift(batch := pool_for(sifter.model))
    sifter.latest = sifter.latest._replace(scores=torch.ones(4))  # as if it had been chosen by scores
    sifter.loss({name: values[:4] for name, values in batch.items()})
    assert runner.trained_record(control, 4) == {}
