"""The anatomy: layers, head and labels are found in every family, and what does not fit is told at once."""

import pytest
import torch
from torch import Generator, nn

import models
from earlysift import Family, Sifter, families, scorers
from earlysift.anatomy import find_anatomy, problem_report, unwrap
from earlysift.checks import check
from earlysift.exits import truncated
from models import (
    BUILDERS,
    WIDTH,
    WITH_HEAD,
    batch_of,
    build,
    row_of,
    structure,
)


def albert(groups, layers=4):
    from transformers import AlbertConfig, AlbertForMaskedLM

    config = AlbertConfig(
        vocab_size=models.VOCABULARY,
        embedding_size=16,
        hidden_size=WIDTH,
        num_hidden_layers=layers,
        num_hidden_groups=groups,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng(devices=[]):
        return AlbertForMaskedLM(config).train()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_albert_is_refused_with_a_problem_and_left_as_it_was(groups):
    model = albert(groups, layers=8)
    row = Family("albert.encoder.albert_layer_groups", (("predictions",),))
    before = structure(model)
    inputs = {"input_ids": torch.randint(3, models.VOCABULARY, (2, 8), generator=Generator().manual_seed(0))}
    for given in (row, None):
        (problem,) = check(model, depth=1, family=given, inputs=inputs)
        assert f"it calls {groups} of them 8 times" in problem.reason
        assert "score='memory'" in problem.remedy
    assert structure(model) == before


@pytest.mark.parametrize("known_type", [False, True])
def test_unknown_family_tells_how_to_pass_a_row(known_type):
    model = albert(1, layers=1) if known_type else nn.Linear(2, 2)
    (problem,) = check(model)
    name = "AlbertForMaskedLM is unknown (model_type 'albert')" if known_type else "Linear is unknown"
    assert problem.reason == (
        f"The model family of {name}, and its layers cannot be told: there is no list of like modules."
    )
    row = "Pass a row: family=Family(layers='path.to.its.ModuleList', heads=(('lm_head',),), task='causal_lm'), "
    in_config = "or put one under 'earlysift_family' into the model's config.json."
    assert problem.remedy == f"{row}{in_config}"
    with pytest.raises(ValueError, match="cannot be sifted with:\n- The model family of"), truncated(model, 1):
        pass


def test_check_returns_all_problems_of_a_structure_at_once():
    problems = check(build("plain", "masked_lm"), family=Family("layers", (("decoder",),)))
    assert [problem.reason for problem in problems] == [
        "Expected a ModuleList or Sequential of layers at 'layers' of PlainTransformer, got nothing.",
        "What the labels of PlainTransformer mean is unknown.",
        "PlainTransformer has none of the heads (('decoder',),) named in its family row as direct submodules.",
    ]
    assert all(problem.remedy.endswith(".") for problem in problems)
    message = problem_report(build("plain", "masked_lm"), problems)
    assert message.startswith("PlainTransformer cannot be sifted with:\n- Expected a ModuleList")
    assert message.count("\n- ") == 3


def test_a_path_to_something_else_than_layers_is_refused():
    (problem,) = check(build("plain", "masked_lm"), family=Family("norm", (("head",),), "masked_lm"))
    assert problem.reason.endswith("at 'norm' of PlainTransformer, got LayerNorm.")


def test_wrappers_are_looked_through():
    class Adapted(nn.Module):
        """Wraps a model as PEFT does."""

        def __init__(self, base):
            super().__init__()
            self.base = base

        def get_base_model(self):
            return self.base

        def forward(self, *args, **kwargs):
            return self.base(*args, **kwargs)

    model = build("bert", "masked_lm")
    batch = batch_of(model)
    wrapped = torch.compile(Adapted(model), backend="eager")
    assert unwrap(wrapped) is model
    assert find_anatomy(wrapped).core is model
    expected = scorers.early_exit_loss(model, batch, dtype=None)
    assert torch.equal(scorers.early_exit_loss(Adapted(model), batch, dtype=None), expected)


@pytest.mark.parametrize(("family", "task"), WITH_HEAD)
def test_heads_over_positions_are_no_classifiers(family, task):
    model = build(family, task)
    assert find_anatomy(model, row_of(model)).classifier == ()


def test_every_family_row_is_tested():
    assert {family for family, _ in BUILDERS} - {"plain"} == set(families.FAMILIES)


@pytest.mark.parametrize("family", ["bert", 5, ("layers",)])
def test_what_is_no_row_is_refused(family):
    with pytest.raises(ValueError, match="Expected family to be a Family"):
        find_anatomy(build("bert", "masked_lm"), family)
    with pytest.raises(ValueError, match="family must be a Family or None"):
        Sifter(build("bert", "masked_lm"), family=family)
