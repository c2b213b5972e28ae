"""Blends: the normal equations of a loop over samples; better than what they are made of; of the whole pool."""

import copy
import math
import re

import pytest
import torch
from torch import Generator

from earlysift import Sifter, pools, scorers, selectors
from earlysift.blend import INPUTS, Blend
from earlysift.exit_probe import ExitProbe
from earlysift.loss_memory import LossMemory
from earlysift.scorers import Learnt
from models import build
from test_exit_probe import pool_for, scores_of, states_at, twin_classifier, twin_features

INF, NAN = float("inf"), float("nan")
DECAY, RIDGE = 0.99, 0.1
SAMPLES, R, B = 40, 16, 8
DRAWN = 1  # of B, by default


class Twin:
    """The slow twin: sums over samples, one at a time."""

    def __init__(self):
        self.a = torch.zeros(6, 6, dtype=torch.float64)
        self.c = torch.zeros(6, dtype=torch.float64)

    def fit(self, inputs, losses, stands_for):
        mean = sum(stands_for.tolist()) / len(stands_for)
        self.a, self.c = DECAY * self.a, DECAY * self.c
        for x, loss, share in zip(inputs, losses.tolist(), stands_for.tolist(), strict=True):
            if math.isfinite(loss) and bool(x.isfinite().all()):
                self.a = self.a + share / mean * torch.outer(x, x)
                self.c = self.c + share / mean * x * math.log1p(max(loss, 0))

    def predict(self, inputs):
        start = torch.tensor([0, 1, 0, 0, 0, 0], dtype=torch.float64)  # the loss at the exit
        weights = torch.linalg.inv(self.a + RIDGE * torch.eye(6, dtype=torch.float64)) @ (self.c + RIDGE * start)
        return torch.tensor([math.expm1(max(float(x @ weights), 0)) for x in inputs])


def twin_inputs(exit_losses, entropies, remembered, ages):
    rows = []
    for loss, entropy, old, age in zip(exit_losses, entropies, remembered, ages, strict=True):
        known = math.isfinite(old)
        memory = [1, math.log1p(max(old, 0)), math.log1p(max(age, 0))] if known else [0, 0, 0]
        rows.append([1, math.log1p(max(loss, 0)), math.log1p(entropy), *memory])
    return torch.tensor(rows, dtype=torch.float64)


def drawn(count, seed):
    """What is known of candidates, and their exact losses; half of them are remembered."""
    generator = Generator().manual_seed(seed)
    losses = torch.randn(count, generator=generator).exp()
    exits = losses * torch.randn(count, generator=generator).mul(0.8).exp()
    remembered = losses * torch.randn(count, generator=generator).mul(0.4).exp() * 2
    remembered[torch.rand(count, generator=generator) < 0.5] = NAN
    ages = torch.randint(1, 50, (count,), generator=generator).float().where(~remembered.isnan(), torch.tensor(NAN))
    return losses, exits, torch.rand(count, generator=generator), remembered, ages


def test_inputs_are_those_of_a_loop():
    _, exits, entropies, remembered, ages = drawn(30, 0)
    remembered[3], ages[3] = -INF, 4.0  # an unlabelled sample
    inputs = Blend().inputs(exits, entropies, remembered, ages)
    torch.testing.assert_close(inputs, twin_inputs(*(x.tolist() for x in (exits, entropies, remembered, ages))))
    assert inputs.shape == (30, len(INPUTS))
    nothing = torch.full((30,), NAN)
    torch.testing.assert_close(Blend().inputs(exits, entropies), Blend().inputs(exits, entropies, nothing, nothing))


def test_predictions_are_those_of_normal_equations_summed_up_in_a_loop():
    blend, twin = Blend(), Twin()
    for seed in range(20):
        losses, *known = drawn(12, seed)
        losses[seed % 12] = [NAN, INF, -INF, 0.5][seed % 4]
        known[0][(seed + 3) % 12] = [NAN, 1.0][seed % 2]
        inputs = blend.inputs(*known)
        sound = inputs.isfinite().all(dim=1)
        torch.testing.assert_close(blend.predict(inputs)[sound], twin.predict(inputs[sound]), rtol=1e-4, atol=1e-5)
        stands_for = torch.rand(12, generator=Generator().manual_seed(seed)) + 0.5
        for each in (blend, twin):
            each.fit(inputs, losses, stands_for)


def test_before_any_fit_it_predicts_the_loss_at_the_exit():
    _, exits, *others = drawn(30, 0)
    blend = Blend()
    predicted = blend.predict(blend.inputs(exits, *others))
    torch.testing.assert_close(predicted, exits)
    assert predicted.dtype == torch.float32


def test_samples_without_a_finite_loss_are_not_fitted():
    losses, *known = drawn(12, 0)
    whole, rest = Blend(), Blend()
    inputs, others = whole.inputs(*known), torch.tensor([i for i in range(12) if i not in (2, 5, 7)])
    losses[[2, 5, 7]] = torch.tensor([NAN, INF, -INF])
    whole.fit(inputs, losses, torch.ones(12))
    rest.fit(inputs[others], losses[others], torch.ones(9))
    torch.testing.assert_close(whole.state_dict(), rest.state_dict())


def squared_error(predicted, losses):
    return (predicted.double().log1p() - losses.double().log1p()).square().mean().item()


def test_it_predicts_better_than_the_exit_and_than_memory_on_one_scale():
    blend = Blend()
    for seed in range(100):
        losses, *known = drawn(32, seed)
        blend.fit(blend.inputs(*known), losses, torch.ones(32))
    losses, *known = drawn(4000, 1000)
    remembered = known[2]
    seen = remembered.isfinite()
    predicted = blend.predict(blend.inputs(*known))
    assert squared_error(predicted, losses) < 0.6 * squared_error(known[0], losses)
    assert squared_error(predicted[seen], losses[seen]) < 0.6 * squared_error(remembered[seen], losses[seen])
    assert squared_error(predicted[~seen], losses[~seen]) < squared_error(known[0][~seen], losses[~seen])


def bent(generator, count=64):
    """Exit losses, and exact ones that follow them only where they are large: a line depends on where it is fitted."""
    exits = 3 * torch.rand(count, generator=generator)
    return exits, torch.where(exits > 2, 4 * (exits - 1.5), torch.full_like(exits, 2.0))


def test_what_was_drawn_uniformly_makes_it_a_fit_of_the_whole_pool():
    whole, weighted, unweighted = Blend(), Blend(), Blend()
    generator = Generator().manual_seed(0)
    for _ in range(400):
        exits, losses = bent(generator)
        inputs = whole.inputs(exits, torch.zeros(64))
        chosen = selectors.greedy(exits, 12).indices
        selection, stands_for = selectors.explored(chosen, 4, exits, generator)
        kept = selection.indices
        whole.fit(inputs, losses, torch.ones(64))
        weighted.fit(inputs[kept], losses[kept], stands_for[kept])
        unweighted.fit(inputs[kept], losses[kept], torch.ones(16))
    inputs = whole.inputs(bent(generator)[0], torch.zeros(64))
    of_pool, ours, unaware = (blend.predict(inputs) for blend in (whole, weighted, unweighted))
    assert squared_error(ours, of_pool) < 0.1 * squared_error(unaware, of_pool)
    assert squared_error(unaware, of_pool) > 0.01


# Within a sifter


def test_a_new_blend_scores_by_the_loss_of_the_probe():
    for task in ("sequence_classification", "masked_lm"):
        model = build("bert", task)
        pool = pool_for(model)
        learnt = Learnt(probes={2: ExitProbe()}, blend=Blend())
        scores = scorers.blend(2)(model, pool, learnt=learnt, dtype=None)
        torch.testing.assert_close(scores, scores_of(model, pool, ExitProbe()))


def test_unlabelled_samples_stay_unlabelled():
    model = build("bert", "masked_lm")
    pool = pool_for(model)
    pool["labels"][3] = -100
    scores = scorers.blend(2)(model, pool, learnt=Learnt(probes={2: ExitProbe()}, blend=Blend()), dtype=None)
    assert (scores == -INF).tolist() == [row == 3 for row in range(7)]


def test_a_regression_is_blended_without_an_entropy():
    model = build("bert", "sequence_classification", num_labels=1, problem_type="regression").train()
    pool = pool_for(model, rows=8) | {"labels": torch.linspace(-1, 1, 8)}
    sifter = Sifter(model, score="blend", dtype=None)
    for _ in range(3):
        sifter.loss(sifter.sift(pool))
    moments = sifter.state_dict()["blend"]["moments"]
    assert moments[INPUTS.index("exit_loss"), -1] > 0
    assert torch.equal(moments[INPUTS.index("exit_entropy")], torch.zeros(7, dtype=torch.float64))


def test_a_blend_belongs_to_a_sifter():
    model = build("bert", "masked_lm")
    with pytest.raises(ValueError, match=r"A blend belongs to a Sifter with score='blend'\. Score by it"):
        scorers.blend(1)(model, pool_for(model), learnt=Learnt(probes={1: ExitProbe()}))


def numbered(model, step):
    """A pool of samples that come back, by their number."""
    chosen = torch.randperm(SAMPLES, generator=Generator().manual_seed(step))[:R]
    return {name: rows[chosen] for name, rows in pool_for(model, rows=SAMPLES).items()} | {"number": chosen}


def loaded(empty, state):
    empty.load_state_dict(copy.deepcopy(state))
    return empty


@pytest.mark.parametrize("by_number", [True, False])
def test_a_sifter_scores_and_fits_as_its_twin(by_number):
    model = build("bert", "sequence_classification").train()
    key = "number" if by_number else None
    sifter, twin = Sifter(model, keep=B / R, depth=2, score="blend", sample_id=key, dtype=None, probe_every=0), Twin()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for step in range(8):
        pool = numbered(model, step)
        number = pool["number"]
        data = pool if by_number else {name: rows for name, rows in pool.items() if name != "number"}
        state = sifter.state_dict()
        probe = loaded(ExitProbe(), state["probe_2"])
        candidates = pools.checked(data, key)
        learnt = Learnt(loaded(LossMemory(), state["memory"]) if by_number else None, {2: probe}, Blend())
        learnt.blend.load_state_dict(state["blend"])
        scores = scorers.blend(2)(model, candidates, learnt=learnt, step=step, dtype=None)
        inputs = {name: rows for name, rows in pool.items() if name != "number"}
        states = twin_features(states_at(model, inputs), inputs["attention_mask"])
        logits = twin_classifier(probe.state_dict()["module"], states)
        at_exit = torch.nn.functional.cross_entropy(logits, pool["labels"], reduction="none")
        entropies = torch.distributions.Categorical(logits=logits).entropy()
        unknown = torch.full((2, R), NAN)
        remembered, ages = learnt.memory.look(number, step) if by_number else unknown
        x = twin_inputs(*(column.tolist() for column in (at_exit, entropies, remembered, ages)))
        predicted = twin.predict(x)
        torch.testing.assert_close(scores, predicted, rtol=1e-3, atol=1e-4)

        batch = sifter.sift(data)
        kept = sifter.selection.indices
        assert set(scores.topk(B - DRAWN).indices.tolist()) <= set(kept.tolist())
        losses = scorers.exact_loss(model, batch, dtype=None)
        first = set(scores.topk(B - DRAWN).indices.tolist())
        stands_for = torch.tensor([1.0 if i in first else (R - B + DRAWN) / DRAWN for i in kept.tolist()])
        twin.fit(x[kept], losses, stands_for)
        sifter.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    moments = sifter.state_dict()["blend"]["moments"]
    torch.testing.assert_close(moments, torch.cat([twin.a, twin.c[:, None]], dim=1), rtol=1e-3, atol=1e-3)
    assert (moments[INPUTS.index("remembered")].abs().max() > 0) == by_number


# State


def test_a_loaded_blend_goes_on_as_the_saved_one():
    saved, other = Blend(), Blend()
    losses, *known = drawn(12, 0)
    inputs = saved.inputs(*known)
    saved.fit(inputs, losses, torch.ones(12))
    state = saved.state_dict()
    assert Blend().state_problems(state) == []
    other.load_state_dict(state)
    for each in (saved, other):
        each.fit(inputs, losses, torch.ones(12))
    assert torch.equal(saved.predict(inputs), other.predict(inputs))
    assert not torch.equal(state["moments"], saved.state_dict()["moments"])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (None, r"blend must hold moments, float64 \(6, 7\)"),
        ({}, "blend must hold moments"),
        ({"moments": torch.zeros(6, 7)}, "blend must hold moments"),
        ({"moments": torch.zeros(6, 6, dtype=torch.float64)}, "blend must hold moments"),
        ({"moments": torch.zeros(6, 7, dtype=torch.float64), "more": 1}, "blend must hold moments"),
        ({"moments": torch.full((6, 7), NAN, dtype=torch.float64)}, "blend.moments must be finite"),
    ],
)
def test_a_broken_state_is_refused(state, message):
    (problem,) = Blend().state_problems(state)
    assert re.search(message, problem)
