"""Rows that are derived from the structure of a model, tried on the zoo of `benchmarks/zoo.py`."""

import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import models
from earlysift import Family, Sifter, check, exits, families, pools, probes, scorers
from models import BUILDERS

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_families
import zoo

REFUSED = {
    "albert": "there is no list of like modules",
    "bart": "there are several lists of them, model.encoder.layers (4 layers), model.decoder.layers (4 layers)",
    "t5": "there are several lists of them, encoder.block (4 layers), decoder.block (4 layers)",
    "swin": "an exit before the last of 2 layers",
}
DERIVED = sorted(set(zoo.ZOO) - set(REFUSED) - set(families.FAMILIES))


@pytest.mark.parametrize("name", DERIVED)
def test_an_exit_by_a_derived_row_is_a_stock_model_of_fewer_layers_with_the_same_weights(name):
    model, pool = zoo.build(name), zoo.batch(name)
    assert check(model, depth=bench_families.DEPTH, inputs=pool) == []
    assert torch.equal(*bench_families.exit_and_stock(name))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    sifter = Sifter(model.train(), keep=0.5, depth=bench_families.DEPTH, dtype=None)
    batch = sifter.sift(pool)
    kept = scorers.exact_loss(zoo.stock(name, bench_families.DEPTH), pool, dtype=None).topk(2).indices.sort().values
    assert all(torch.equal(batch[key], pool[key][kept]) for key in pool)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(exits.find_anatomy(model).layers) == zoo.LAYERS


@pytest.mark.parametrize("name", REFUSED)
def test_a_structure_that_is_not_plain_is_refused_and_says_what_was_found(name):
    (problem,) = check(zoo.build(name), depth=bench_families.DEPTH, inputs=zoo.batch(name))
    assert REFUSED[name] in problem.reason


@pytest.mark.parametrize(("family", "task"), [key for key in BUILDERS if key[0] in families.FAMILIES])
def test_a_known_row_names_the_layers_that_would_be_derived(family, task):
    row = families.derived(exits.unwrap(models.build(family, task)))
    assert row is not None
    assert row.layers == families.FAMILIES[family].layers


class Stacked(nn.Module):
    """Experts within layers, a stem in front of them, and what follows."""

    def __init__(self, lists=1):
        super().__init__()
        self.stem = nn.ModuleList([nn.Linear(2, 2)])  # a list of one is no list of layers
        self.blocks = nn.ModuleList([nn.Module() for _ in range(3)])
        for block in self.blocks:
            block.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.drops = nn.ModuleList([nn.Dropout(), nn.Dropout()])  # without weights
        self.norm, self.head = nn.LayerNorm(2), nn.Linear(2, 9)
        if lists > 1:
            self.others = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def test_lists_within_layers_and_lists_without_weights_are_not_taken_for_layers():
    assert families.derived(Stacked()) == Family("blocks", (("head",),))
    assert families.derived(Stacked(lists=2)) is None
    assert families.found(Stacked(lists=2)) == "there are several lists of them, blocks (3 layers), others (2 layers)"


def test_layers_of_several_classes_are_not_plain_nor_is_what_lies_within_one_of_them():
    model = Stacked()
    model.blocks.append(nn.Linear(2, 2))
    assert families.derived(model) is None
    assert families.found(model) == "there is no list of like modules"


def test_a_model_that_is_a_list_or_has_an_empty_place_is_a_problem_and_no_crash():
    assert len(check(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == 1
    model = Stacked()
    model.register_module("auxiliary", None)
    assert families.derived(model) == families.derived(Stacked())


def test_a_row_that_was_derived_holds_while_the_model_is_shortened_to_one_layer():
    model = zoo.build("mistral")
    anatomy = exits.find_anatomy(model)
    with exits.truncated(model, 1):
        assert exits.find_anatomy(model)[:5] == anatomy[:5]
    assert exits.find_anatomy(model) == anatomy


class Pooled(nn.Module):
    """What names its head behind something else than layers: a norm, pooling, or a scale behind it."""

    def __init__(self, bias=False):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)
        self.bias = bias
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        logits = self.head(self.norm(x).mean(dim=1))
        return 2 * logits if self.bias else logits


PooledForSequenceClassification = type("PooledForSequenceClassification", (Pooled,), {})


def labelled(rows=8):
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(rows, 4, 8, generator=generator), "labels": torch.arange(rows) % 5}


def test_auto_sees_the_losses_of_a_derived_classifier_or_refuses_it():
    model, pool = PooledForSequenceClassification(), labelled()
    exact = nn.functional.cross_entropy(model(pool["x"]), pool["labels"], reduction="none")
    found = probes.probe(model, pool, depths=[1], dtype=None)
    torch.testing.assert_close(found.exact, exact)
    with pytest.raises(ValueError, match="names the head"):
        probes.probe(PooledForSequenceClassification(bias=True), pool, depths=[1], dtype=None)


@pytest.mark.parametrize("depth", [None, 1])
def test_a_guess_is_compared_before_the_first_score_without_a_sifter(depth):
    model, pool = zoo.build("cohere"), zoo.batch("cohere")
    model.lm_head.bias = nn.Parameter(torch.ones(zoo.VOCABULARY))  # the model scales what the head returns
    score = scorers.exact_loss if depth is None else partial(scorers.early_exit_loss, depth=depth)
    with torch.no_grad(), exits.truncated(model, depth or zoo.LAYERS):
        logits = exits.call(model, pools.inputs_and_labels(pool)[0])
    slow = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), pool["labels"][:, 1:], reduction="none")
    torch.testing.assert_close(score(model, pool, dtype=None), slow.mean(dim=1), rtol=1e-4, atol=1e-4)


def test_a_derived_head_that_is_not_the_models_is_left_for_the_models_own_logits(caplog):
    model = zoo.build("cohere")
    model.lm_head.bias = nn.Parameter(torch.ones(zoo.VOCABULARY))  # the model scales what the head returns
    pool = zoo.batch("cohere")
    Sifter(model.train(), keep=0.5, dtype=None).sift(pool)
    assert "The model's own logits are used" in caplog.text
    scores = scorers.early_exit_loss(model, pool, depth=1, dtype=None)
    with torch.no_grad(), exits.truncated(model, 1):
        logits = exits.call(model.eval(), pools.inputs_and_labels(pool)[0])
    slow = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), pool["labels"][:, 1:], reduction="none")
    torch.testing.assert_close(scores, slow.mean(dim=1), rtol=1e-4, atol=1e-4)
