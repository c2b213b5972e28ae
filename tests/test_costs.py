"""Costs: FLOPs as torch counts them, and the break-even statements C1 and C2."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM

import models
from earlysift import exits, scorers
from earlysift.costs import batch_work, forward_flops, payoff, relative_cost
from earlysift.exits import find_anatomy

laws = settings(deadline=None, derandomize=True, database=None, max_examples=100)
shares = st.floats(0.01, 1)
SHAPES = [(4, 16), (2, 64)]


def counted_flops(model, rows, length, depth=None):
    """FLOPs of a forward pass as torch counts them, for eager attention: it does not see into the fused one."""
    inputs = torch.ones(rows, length, dtype=torch.long)
    counter = FlopCounterMode(display=False)
    anatomy = find_anatomy(model, models.row_of(model))
    with torch.no_grad(), exits.scoring_mode(model), exits.shortened(anatomy, depth or len(anatomy.layers)), counter:
        exits.call(model, {"input_ids": inputs})
    return counter.get_total_flops()


def wide(family, task, **config):
    return models.build(
        family,
        task,
        attn_implementation="eager",
        hidden_size=64,
        intermediate_size=256,
        max_position_embeddings=128,
        **config,
    )


@pytest.mark.parametrize(("rows", "length"), SHAPES)
@pytest.mark.parametrize("depth", [1, 3, None])
@pytest.mark.parametrize(
    ("family", "task", "config"),
    [
        pytest.param("bert", "masked_lm", {}, id="bert"),
        pytest.param("roberta", "token_classification", {}, id="roberta"),
        pytest.param("distilbert", "masked_lm", {"dim": 64, "hidden_dim": 256}, id="distilbert"),
        pytest.param("gpt2", "causal_lm", {}, id="gpt2"),
        pytest.param("llama", "causal_lm", {"num_key_value_heads": 4}, id="llama"),
        pytest.param("llama", "causal_lm", {"num_key_value_heads": 1}, id="llama-grouped"),
        pytest.param("qwen3", "causal_lm", {"num_key_value_heads": 2, "head_dim": 32}, id="qwen3-wide-heads"),
    ],
)
def test_flops_are_those_that_torch_counts(family, task, config, depth, rows, length):
    model = wide(family, task, **config)
    anatomy = find_anatomy(model)
    ours = forward_flops(anatomy, rows=rows, length=length, labelled=rows * length, depth=depth)
    assert ours == pytest.approx(counted_flops(model, rows, length, depth), rel=0.05)


def test_flops_of_a_sequence_classifier_are_those_that_torch_counts():
    model = wide("bert", "sequence_classification")
    ours = forward_flops(find_anatomy(model), rows=4, length=32, labelled=4)
    assert ours == pytest.approx(counted_flops(model, 4, 32), rel=0.05)


@laws
@given(rows=st.integers(1, 64), length=st.integers(1, 512), share=st.floats(0, 1), depth=st.integers(1, 3))
def test_flops_add_up(rows, length, share, depth):
    anatomy = find_anatomy(MODEL)
    labelled = int(share * rows * length)
    shape = {"rows": rows, "length": length}
    flops = forward_flops(anatomy, **shape, labelled=labelled, depth=depth)
    assert flops < forward_flops(anatomy, **shape, labelled=labelled, depth=depth + 1)
    assert forward_flops(anatomy, **shape, labelled=labelled, depth=models.LAYERS) == forward_flops(
        anatomy, **shape, labelled=labelled
    )
    assert forward_flops(anatomy, rows=2 * rows, length=length, labelled=2 * labelled, depth=depth) == 2 * flops
    head = sum(p.numel() for p in MODEL.cls.parameters() if p.ndim == 2)
    without = forward_flops(anatomy, **shape, labelled=0, depth=depth)
    assert flops - without == pytest.approx(2 * head * labelled)


MODEL = models.build("bert", "masked_lm")


def test_scoring_bert_base_costs_what_the_theory_says():
    with torch.device("meta"):
        anatomy = find_anatomy(BertForMaskedLM(BertConfig()))

    def share(labelled_share, depth=None):
        labelled = round(labelled_share * 32 * 128)
        return forward_flops(anatomy, rows=32, length=128, labelled=labelled, depth=depth)

    whole = share(0.15)
    layer = share(0, 1)
    assert layer / share(0) == pytest.approx(1 / 12)
    assert (whole - share(0)) / whole == pytest.approx(0.04, abs=0.005)  # the masked-only head
    assert (share(1) - share(0)) / share(1) == pytest.approx(0.22, abs=0.01)  # the dense one
    assert share(1) - share(0) > 3 * layer
    # Costs of scoring in full forward passes with the masked-only head, as in section 4 of the theory.
    assert relative_cost(1 / 3, share(0.15, 1) / whole, 0.5) == pytest.approx(1.10, abs=0.025)
    assert relative_cost(1 / 3, share(1, 1) / whole, 0.5) == pytest.approx(1.23, abs=0.01)


@laws
@given(forward_share=shares, score_share=shares, keep=shares, gain=st.floats(0.1, 5))
def test_cost_and_payoff_are_c1_and_c2(forward_share, score_share, keep, gain):
    cost = relative_cost(forward_share, score_share, keep)
    assert cost == pytest.approx(1 + forward_share * score_share / keep)
    assert cost > 1
    assert relative_cost(forward_share, 0.0, keep) == 1
    assert payoff(gain, cost) == pytest.approx(gain / cost)
    assert (payoff(gain, cost) > 1) == (gain > cost)


def test_cost_is_the_time_of_a_step_with_scoring_over_one_without():
    # keep b of R: a step of b samples costs b * (forward + backward), scoring R * p * forward.
    forward, backward, p, b, pool = 2.0, 4.0, 0.2, 8, 24
    with_scoring = b * (forward + backward) + pool * p * forward
    assert relative_cost(forward / (forward + backward), p, b / pool) == pytest.approx(
        with_scoring / (b * (forward + backward))
    )


@pytest.mark.parametrize(
    ("family", "task"), [("bert", "masked_lm"), ("gpt2", "causal_lm"), ("bert", "sequence_classification")]
)
def test_work_of_a_batch_counts_its_positions_and_labels(family, task):
    model = models.build(family, task)
    anatomy = find_anatomy(model)
    batch = models.batch_for(model, task, 5, 12, torch.Generator().manual_seed(0))
    if task == "sequence_classification":
        labelled = 5
    else:
        labelled = int((batch["labels"][:, 1:] if task == "causal_lm" else batch["labels"]).ne(-100).sum())
    trained = batch_work(anatomy, batch, "trained", passes=3)
    scored = batch_work(anatomy, batch, "scored", depth=1)
    flops = forward_flops(anatomy, rows=5, length=12, labelled=labelled)
    assert trained == {"trained_tokens": 60, "trained_flops": 3 * flops}
    assert scored["scored_flops"] == forward_flops(anatomy, rows=5, length=12, labelled=labelled, depth=1)


def test_head_is_asked_exactly_about_the_labelled_positions_it_is_charged_for():
    model = models.build("bert", "masked_lm")
    batch = models.batch_for(model, "masked_lm", 5, 12, torch.Generator().manual_seed(0))
    rows = []
    model.cls.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    scorers.early_exit_loss(model, batch, dtype=None)
    assert sum(rows) == int((batch["labels"] != -100).sum())
