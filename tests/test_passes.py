"""Forward passes: no cache, no captured states, and logits in whatever a model returns."""

import pytest
import torch

import models
from earlysift import Family, exits, passes, scorers
from earlysift.anatomy import find_anatomy
from earlysift.checks import check
from models import (
    BUILDERS,
    LAYERS,
    WIDTH,
    WITH_HEAD,
    batch_of,
    build,
    inputs_of,
    logits_of,
    row_of,
    sample_losses,
    shorter,
)


def test_scoring_a_model_whose_config_asks_for_hidden_states_captures_none():
    model = build("llama", "causal_lm", output_hidden_states=True)
    outputs = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    scorers.early_exit_loss(model, batch_of(model), dtype=None)
    assert [output.hidden_states for output in outputs] == [None]
    assert len(model(**inputs_of(model)).hidden_states) == LAYERS + 1


@pytest.mark.parametrize(
    ("family", "task"), [("gpt2", "causal_lm"), ("llama", "causal_lm"), ("llama", "sequence_classification")]
)
def test_scoring_allocates_no_cache(family, task):
    model = build(family, task)
    outputs = []
    model.register_forward_hook(lambda module, args, output: outputs.append(output))
    model.eval()(**inputs_of(model))
    assert outputs.pop().past_key_values is not None  # as it would be without care
    model.train()
    scorers.early_exit_loss(model, batch_of(model), dtype=None)
    scorers.exact_loss(model, batch_of(model), dtype=None)
    check(model, inputs=inputs_of(model))
    assert len(outputs) >= 3
    assert all(output.past_key_values is None for output in outputs)


def test_what_the_pool_says_itself_is_not_said_twice():
    model = build("gpt2", "causal_lm")
    pool = batch_of(model)
    expected = scorers.early_exit_loss(model, pool, dtype=None)
    assert torch.equal(scorers.early_exit_loss(model, {**pool, "use_cache": False}, dtype=None), expected)


@pytest.mark.parametrize(
    "container", [lambda logits: (logits, None), lambda logits: [logits], lambda logits: {"logits": logits}]
)
def test_models_that_return_tuples_or_dicts_are_scored_alike(container):
    class Contained(models.PlainTransformer):
        def forward(self, input_ids, attention_mask=None):
            return container(super().forward(input_ids, attention_mask))

    model, contained = build("plain", "masked_lm"), Contained("masked_lm")
    contained.load_state_dict(model.state_dict())
    expected = scorers.early_exit_loss(model, batch_of(model), family=row_of(model), dtype=None)
    assert torch.equal(scorers.early_exit_loss(contained, batch_of(model), family=row_of(model), dtype=None), expected)


def test_a_cap_behind_the_head_is_part_of_the_loss():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(**models._COMMON | models._ROTARY | {"head_dim": 8, "final_logit_softcapping": 2.0})
    with torch.random.fork_rng(devices=[]):
        model = models.widen(Gemma2ForCausalLM(config))
    row = Family("model.layers", (("lm_head",),))
    batch = batch_of(model)
    scores = scorers.early_exit_loss(model, batch, depth=2, family=row, dtype=None)
    torch.testing.assert_close(scores, sample_losses(shorter(model, 2).eval(), batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "task"), WITH_HEAD)
def test_states_through_the_head_are_the_logits(family, task):
    model = build(family, task)
    anatomy = find_anatomy(model, row_of(model))
    assert anatomy.head
    assert anatomy.task == task
    logits = logits_of(model(**inputs_of(model)))
    with exits.headless(anatomy):
        states = passes.call(model, inputs_of(model))
    assert states.shape[:2] == logits.shape[:2]
    assert states.shape != logits.shape
    torch.testing.assert_close(passes.head_of(anatomy)(states), logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        passes.head_of(anatomy)(states.flatten(0, 1)), logits.flatten(0, 1), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("family", "task"), [key for key in BUILDERS if key[1] == "sequence_classification"])
def test_heads_that_pool_over_positions_are_left_in_place_but_known(family, task):
    model = build(family, task)
    anatomy = find_anatomy(model, row_of(model))
    assert anatomy.head == ()
    logits = logits_of(model(**inputs_of(model)))
    classifier = anatomy._replace(head=anatomy.classifier)
    with exits.headless(classifier):
        states = passes.call(model, inputs_of(model))
    assert states.size(-1) == WIDTH
    torch.testing.assert_close(passes.head_of(classifier)(states), logits, rtol=1e-5, atol=1e-5)


def test_a_row_without_heads_uses_the_logits_of_the_model():
    model = build("plain", "causal_lm")
    batch = batch_of(model)
    bare = scorers.early_exit_loss(model, batch, family=Family("blocks", (), "causal_lm"), dtype=None)
    torch.testing.assert_close(bare, scorers.early_exit_loss(model, batch, family=row_of(model), dtype=None))
