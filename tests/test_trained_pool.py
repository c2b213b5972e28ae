"""Pools that were trained on: gradients of a slow twin, the latest batches alone, and records that cost no pass."""

import json
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Generator

import models
from earlysift import Sifter, controller, probes, scorers
from earlysift.adapters import states
from earlysift.control import Control
from earlysift.exit_probe import ExitProbe
from earlysift.fidelity import fidelity
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
    pool.add(0, seen_of(model, batch))
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
    for step, batch in enumerate(batches):
        pool.add(step, batch)
        assert pool.is_full(since=0) == (step >= 1)
    for name, values in pool.columns().items():
        assert torch.equal(values, torch.cat([batches[2][name], batches[3][name]]))
    assert pool.is_full(since=2)
    assert not pool.is_full(since=3)  # the model has changed since
    pool.clear()
    assert (pool.is_full(since=0), pool.columns()) == (False, {})


def test_a_pool_holds_copies_and_not_the_states_that_its_inputs_are_views_of():
    states, columns = torch.ones(3, 50, 5), columns_of()
    pool = TrainedPool(batches=1)
    pool.add(0, columns | {"inputs": states[:, 0]})
    states.zero_()
    inputs = pool.columns()["inputs"]
    assert inputs.tolist() == torch.ones(3, 5).tolist()
    assert inputs.untyped_storage().nbytes() == inputs.nbytes


@pytest.mark.parametrize("other", [{"classes": 7}, {"width": 2}], ids=str)
def test_batches_of_another_shape_begin_a_new_pool(other):
    pool = TrainedPool(batches=2)
    without = {name: values for name, values in columns_of(**other).items() if name != "2"}
    for step, columns in enumerate((columns_of(), columns_of(**other), without)):
        pool.add(step, columns)
        assert not pool.is_full(since=0)
        assert len(pool.columns()["exact"]) == 3


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_samples_without_a_finite_loss_have_no_gradient(bad):
    columns = columns_of()
    columns["exact"][1], columns["slopes"][1] = bad, NAN
    pool = TrainedPool(batches=1)
    pool.add(0, columns)
    gram = pool.gram()
    assert gram[1].tolist() == gram[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert (gram.diagonal()[[0, 2]] > 0).all()


def test_a_state_goes_through_the_files_of_a_trainer(tmp_path):
    pool, again = TrainedPool(batches=3), TrainedPool(batches=3)
    for seed, rows in enumerate((3, 2)):
        pool.add(seed, columns_of(rows=rows, seed=seed))
    states.write(tmp_path / "sifter_0.json", {"sifter": {"trained": pool.state_dict()}, "batch_size": 1})
    state = states.read(tmp_path / "sifter_0.json", [])["sifter"]["trained"]
    assert again.state_problems(state) == []
    again.load_state_dict(state)
    for each in (pool, again):
        for step in (9, 10):
            each.add(step, columns_of(seed=step))
        assert each.is_full(since=1)  # the oldest is gone
        assert not each.is_full(since=2)
    for name, values in pool.columns().items():
        assert torch.equal(again.columns()[name], values)
    empty = TrainedPool(batches=3).state_dict()
    assert json.loads(json.dumps(empty)) == empty
    again.load_state_dict(empty)
    assert not again.columns()


BROKEN = {
    "no mapping": (lambda _: None, "must hold steps, rows and columns"),
    "no steps": (lambda state: state | {"steps": [0, -1]}, "steps must be those of at most 2 batches"),
    "fewer steps": (lambda state: state | {"steps": [0]}, "steps must be those of at most 2 batches"),
    "no rows": (lambda state: state | {"rows": None}, "at most 2 batches"),
    "an empty batch": (lambda state: state | {"rows": [6, 0]}, "rows must be those of at most 2 batches"),
    "too many": (lambda state: state | {"rows": [1, 1, 1], "steps": [1, 2, 3]}, "at most 2 batches"),
    "other rows": (lambda state: state | {"rows": [3, 1]}, r"float32 \(4, ...\)"),
    "other columns": (lambda state: state | {"columns": {"exact": state["columns"]["exact"]}}, "slopes and inputs"),
    "text": (lambda state: state | {"columns": "x"}, r"float32 \(6, ...\)"),
    "whole numbers": (lambda state: state | {"columns": {"exact": torch.ones(6, dtype=torch.int64)}}, "float32"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_state_is_refused_in_one_sentence(name):
    pool = TrainedPool(batches=2)
    for seed in range(2):
        pool.add(seed, columns_of(seed=seed))
    spoil, message = BROKEN[name]
    (problem,) = pool.state_problems(spoil(pool.state_dict()))
    assert re.search(message, problem)


# In auto mode


def auto(model, **options):
    return Sifter(model, kept=4, keep=0.5, mode="auto", dtype=None, **options)


PRICES = {"train": 1.0, "probe": 0.9, "score_1": 0.1, "score_2": 0.2, "score_3": 0.3}
SEEN = 512 // 4  # steps after which enough losses of training are known


def run(sifter, steps, offered=4, first=0):
    """Uniform steps on a model that does not change, and their rows of the ledger."""
    rows = []
    for step in range(first, first + steps):
        sifter.loss(sifter.sift(pool_for(sifter.model, rows=offered, seed=step)))
        rows.append(sifter.ledger.end())
    return rows


def test_while_training_is_uniform_auto_mode_looks_often_and_probes_nothing_once_enough_losses_are_known():
    control = Control(reference_costs=PRICES)
    rows = run(auto(build("bert", "sequence_classification"), control=control), SEEN + 200)
    probed = [row["step"] for row in rows if "rank_correlation" in row]
    looked = [row["step"] for row in rows if "control" in row and "rank_correlation" not in row]
    assert probed == [90]
    assert looked == [step for step in range(SEEN, SEEN + 200) if step % controller.FREE_EVERY == 0]
    assert all("look_ms" in rows[step] and "probe_ms" not in rows[step] for step in looked)
    assert not any("probed" in row for row in rows if row["step"] in looked)


@pytest.mark.parametrize("total_steps", [300, None])
def test_auto_mode_foresees_the_epochs_of_a_training_of_known_length_once_samples_come_back(total_steps):
    model = build("bert", "sequence_classification")
    sifter, seen = auto(model, sample_id="number", control=Control(reference_costs=PRICES, total_steps=total_steps)), []
    for step in range(SEEN + 51):
        pool = pool_for(model, rows=4, seed=step) | {"number": (4 * step + torch.arange(4)) % 200}  # 50 steps an epoch
        sifter.loss(sifter.sift(pool))
        row = sifter.ledger.end()
        seen += [row["control"].get("epochs")] if "look_ms" in row else []
    assert seen == [pytest.approx(6.0, rel=0.01) if total_steps else None]
    assert row["mode"] == "off"


def test_a_loop_whose_passes_nobody_looks_into_is_probed_as_before():
    control, model = Control(reference_costs=PRICES), build("bert", "sequence_classification")
    sifter, rows = auto(model, control=control), []
    for step in range(200):
        batch = sifter.sift(pool_for(model, seed=step))
        sifter.observe(torch.ones(len(batch["labels"])))
        rows.append(sifter.ledger.end())
    assert [row["step"] for row in rows if "rank_correlation" in row] == [90, 180]
    assert not any("look_ms" in row for row in rows)


def test_its_record_is_that_of_a_probe_of_the_same_samples_but_for_its_gradients():
    model = build("bert", "sequence_classification")
    sifter = auto(model)
    run(sifter, 9)  # lessons at every second step: 6 and 8 are the latest
    batches = [pool_for(model, rows=4, seed=seed) for seed in (6, 8)]
    pool = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    told = sifter._runner.learnt.trained.columns()
    control, runner = sifter._control, sifter._runner
    ours, probed = runner.trained_record(control, 4, step=9), sifter.probe(pool)
    assert ours.keys() == probed.keys()
    for name in ("loss", "loss_error", "floor", "concentration"):
        assert ours[name] == pytest.approx(probed[name], rel=1e-4)
    for depth in control.depths:  # by what its probe told before it learnt
        twin = fidelity(told[str(depth)], told["exact"], 4)
        assert (ours[f"correlation.{depth}"], ours[f"gain.{depth}.0.5"]) == (twin["rank_correlation"], twin["gain"])


def test_a_pool_is_used_once_and_ends_with_a_batch_that_was_selected_or_when_it_is_old():
    sifter = auto(build("bert", "sequence_classification"))
    control, runner = sifter._control, sifter._runner
    run(sifter, 4)
    assert runner.trained_record(control, 4, step=3 + controller.FREE_EVERY) == {}
    assert runner.trained_record(control, 4, step=4)
    assert runner.trained_record(control, 4, step=4) == {}
    run(sifter, 4, first=4)
    batch = sifter.sift(pool_for(sifter.model, rows=4))
    sifter.latest = sifter.latest._replace(scores=torch.ones(4))  # as if it had been chosen by scores
    sifter.loss(batch)
    assert runner.trained_record(control, 4, step=9) == {}


def test_remembered_losses_are_those_before_the_pass_and_unseen_samples_rank_first():
    model = build("bert", "sequence_classification")
    sifter = auto(model, sample_id="id")
    batches = [pool_for(model, rows=4, seed=seed) for seed in range(6)]
    numbers = [[0, 1, 2, 3]] * 5 + [[0, 1, 8, 9]]
    for step, (batch, ids) in enumerate(zip(batches, numbers, strict=True)):
        sifter.loss(sifter.sift(batch | {"id": torch.tensor(ids)}))
        if step == 3:  # the losses of the latest batch are learnt when the next one comes
            sifter._runner.absorb()
            before = sifter._runner.learnt.memory.recall(torch.arange(4))
    sifter._runner.learnt.trained.clear()
    sifter._runner.absorb()
    remembered = sifter._runner.learnt.memory.recall(torch.tensor([0, 1, 8, 9]))
    for step, ids in ((6, [0, 1, 8, 9]), (7, [0, 1, 20, 21]), (8, [20, 0, 1, 22])):
        sifter.loss(sifter.sift(batches[0] | {"id": torch.tensor(ids)}))
        if step == 6:
            first = sifter._runner.learnt.trained.columns()["0"]
    assert torch.equal(first, remembered)
    assert before.isfinite().all()
    scores = probes.of_trained(sifter._runner.learnt.trained).scores[0]
    raw = sifter._runner.learnt.trained.columns()["0"]
    assert raw.isnan().tolist() == [False] * 7 + [True]  # of steps 6 and 8
    assert scores[-1] == raw[:-1].max() + 1
    assert torch.equal(scores[:-1], raw[:-1])


@pytest.mark.parametrize("problem", ["multi_label_classification", "regression"])
def test_slopes_are_derivatives_of_the_loss_whatever_is_classified(problem):
    model = build("bert", "sequence_classification", problem_type=problem, num_labels=3)
    batch = pool_for(model) | {"labels": torch.rand(8, 3, generator=Generator().manual_seed(0)).round()}
    seen = seen_of(model, batch)
    logits = model(**{name: values for name, values in batch.items() if name != "labels"}).logits.detach()
    logits.requires_grad_()
    if problem == "regression":
        losses = F.mse_loss(logits, batch["labels"], reduction="none").mean(dim=1)
    else:
        losses = F.binary_cross_entropy_with_logits(logits, batch["labels"], reduction="none").mean(dim=1)
    (slopes,) = torch.autograd.grad(losses.sum(), logits)
    torch.testing.assert_close(seen["exact"], losses.detach())
    torch.testing.assert_close(seen["slopes"], slopes)
