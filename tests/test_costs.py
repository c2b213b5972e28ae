"""Costs: FLOPs as torch counts them, and the break-even statements C1 and C2."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BartForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    ViTConfig,
    ViTForImageClassification,
)

import models
from earlysift import Family, checks, scorers
from earlysift.anatomy import find_anatomy
from earlysift.costs import (
    approximate_gain,
    batch_work,
    break_even_gain,
    flops_law,
    forward_flops,
    payoff,
    relative_cost,
    second_moment_ratio,
    unbiased_payoff,
)
from earlysift.exits import skips_unlabelled

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import zoo

laws = settings(deadline=None, derandomize=True, database=None, max_examples=100)
shares = st.floats(0.01, 1)
DEPTHS = [1, 3, None]
SHAPES = [(4, 12), (2, 48)]


@pytest.fixture(autouse=True)
def attention_that_torch_can_count():
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.backends.mha.set_fastpath_enabled(fast)


def counted_flops(model, batch, depth, family=None):
    """FLOPs of scoring a batch through the library's own scorers, as torch counts them."""
    model.requires_grad_(False)  # torch's counter stumbles over DeBERTa's views of parameters
    counter = FlopCounterMode(display=False)
    with counter:
        if depth is None:
            scorers.exact_loss(model, batch, family=family, dtype=None)
        else:
            scorers.early_exit_loss(model, batch, depth=depth, family=family, dtype=None)
    return counter.get_total_flops()


def agree(model, batch, depth, family=None):
    """Whether our FLOPs are those that torch counts: promised within 2 %, held here far closer."""
    anatomy = find_anatomy(model, family)
    law = flops_law(anatomy, depth, skips_unlabelled=depth is not None and skips_unlabelled(model, anatomy, None))
    ours = batch_work(anatomy, batch, "scored", law)["scored_flops"]
    return ours == pytest.approx(counted_flops(model, batch, depth, family), rel=1e-3)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(("family", "task"), models.BUILDERS)
def test_flops_are_those_that_torch_counts(family, task, depth):
    model = models.build(family, task)
    for rows, length in SHAPES:
        batch = models.batch_for(model, task, rows, length, torch.Generator().manual_seed(0))
        assert agree(model, batch, depth, models.row_of(model))


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize(
    ("family", "task", "config"),
    [
        pytest.param("llama", "causal_lm", {"num_key_value_heads": 1}, id="one head of keys"),
        pytest.param("qwen3", "causal_lm", {"num_key_value_heads": 2, "head_dim": 32}, id="wide heads"),
        pytest.param("gpt2", "causal_lm", {"attn_implementation": "eager"}, id="eager attention"),
        pytest.param("deberta-v2", "masked_lm", {"share_att_key": True}, id="shared distance projections"),
        pytest.param("deberta-v2", "masked_lm", {"pos_att_type": "c2p"}, id="one kind of distances"),
        pytest.param("deberta-v2", "masked_lm", {"position_buckets": -1}, id="no buckets"),
        pytest.param("deberta-v2", "masked_lm", {"relative_attention": False}, id="no distances"),
        pytest.param("deberta-v2", "masked_lm", {"conv_kernel_size": 0}, id="no convolution"),
        pytest.param("modernbert", "masked_lm", {"global_attn_every_n_layers": 2}, id="more global layers"),
        pytest.param("modernbert", "sequence_classification", {"classifier_pooling": "mean"}, id="mean pooling"),
        pytest.param("bert", "sequence_classification", {"num_labels": 1}, id="regression"),
    ],
)
def test_flops_of_variants_are_those_that_torch_counts(family, task, config, depth):
    model = models.build(family, task, **config)
    batch = models.batch_for(model, task, 3, 16, torch.Generator().manual_seed(0))
    if config.get("num_labels") == 1:
        batch["labels"] = batch["labels"].float()
    assert agree(model, batch, depth)


@pytest.mark.parametrize("depth", DEPTHS)
@pytest.mark.parametrize("patch", [2, 4])
def test_flops_of_an_image_model_are_those_that_torch_counts(patch, depth):
    config = ViTConfig(
        image_size=8,
        patch_size=patch,
        num_channels=1,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=10,
    )
    with torch.random.fork_rng(devices=[]):
        model = ViTForImageClassification(config)
    batch = {"pixel_values": torch.zeros(3, 1, 8, 8), "labels": torch.zeros(3, dtype=torch.long)}
    anatomy = find_anatomy(model)
    ours = batch_work(anatomy, batch, "scored", flops_law(anatomy, depth))
    assert ours["scored_tokens"] == 3 * ((8 // patch) ** 2 + 1)
    # The patches' kernel runs on all positions but the class token's.
    assert ours["scored_flops"] == pytest.approx(counted_flops(model, batch, depth), rel=0.02)


@pytest.mark.parametrize("depth", [1, 2, None])
@pytest.mark.parametrize("kind", ["t5", "bart", "marian", "mbart", "pegasus", "m2m_100"])
def test_flops_of_an_encoder_decoder_are_those_that_torch_counts(kind, depth):
    model, batch = zoo.build(kind), zoo.batch(kind)
    shorter = {**batch, "labels": batch["labels"][:, :3]}
    longer = {**batch, "labels": batch["labels"].repeat(1, 3)}
    checks.verified(model, batch)  # else the first pass is compared with the model's own, which torch would count, too
    for each in (batch, shorter, longer, {"decoder_input_ids": longer["labels"].clamp(min=0), **longer}):
        assert agree(model, each, depth)


@pytest.mark.parametrize("depth", [1, None])
def test_a_classifier_of_an_encoder_decoder_runs_both_lists_at_its_inputs(depth):
    config = zoo.build("bart").config
    config.num_labels, config.eos_token_id = 5, 2
    with torch.random.fork_rng(devices=[]):
        model = BartForSequenceClassification(config).eval()
    ids = zoo.batch("bart")["input_ids"].clone()
    ids[:, -1] = config.eos_token_id
    batch = {"input_ids": ids, "labels": torch.arange(len(ids)) % 5}
    checks.verified(model, batch)
    assert agree(model, batch, depth)


def test_an_encoder_decoder_whose_matrices_run_at_unknown_positions_is_not_counted():
    whisper = find_anatomy(zoo.build("whisper"))
    with pytest.raises(ValueError, match="weights in front of its decoder and outside of layers"):
        flops_law(whisper)
    model = zoo.build("t5")
    decoder_alone = find_anatomy(model, Family("decoder.block", (("lm_head",),), task="seq2seq_lm"))
    with pytest.raises(ValueError, match="weights in front of its decoder and outside of layers"):
        flops_law(decoder_alone)
    for block in model.decoder.block:
        block.layer[1].attention_of_my_own = block.layer[1]._modules.pop("EncDecAttention")
    with pytest.raises(ValueError, match="attention to the encoder has no name that is known"):
        flops_law(find_anatomy(model))


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


@laws
@given(gain=st.floats(1, 5), correlation=st.floats(-1, 1))
def test_an_approximate_gain_lies_between_the_exact_one_and_its_mirror(gain, correlation):
    approximate = approximate_gain(gain, correlation)
    assert approximate_gain(gain, 1.0) == pytest.approx(gain)
    assert approximate_gain(gain, 0.0) == 1
    assert 2 - gain - 1e-9 <= approximate <= gain + 1e-9
    assert (approximate - 1) == pytest.approx(correlation * (gain - 1))


def test_an_approximate_gain_is_that_of_correlated_gaussian_losses():
    generator = torch.Generator().manual_seed(0)
    exact, noise = torch.randn(2, 400_000, generator=generator, dtype=torch.double)
    for correlation in (0.9, 0.3, -0.5):
        score = correlation * exact + (1 - correlation**2) ** 0.5 * noise
        losses = 5 + exact

        def gain(order, losses=losses):
            return (losses[order.topk(len(losses) // 2).indices].mean() / losses.mean()).item()

        assert gain(score) == pytest.approx(approximate_gain(gain(exact), correlation), abs=0.002)


@laws
@given(scores=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=50), scale=st.floats(1e-3, 1e3))
def test_second_moment_ratio_is_a_share_and_free_of_scale(scores, scale):
    values = torch.tensor(scores, dtype=torch.double)
    ratio = second_moment_ratio(values)
    assert 1 / len(scores) - 1e-9 <= ratio <= 1 + 1e-9
    assert second_moment_ratio(scale * values) == pytest.approx(ratio)
    broken = torch.cat([values, torch.tensor([torch.nan, torch.inf, -torch.inf])])
    assert second_moment_ratio(broken) == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("scores", "ratio"), [([2.0] * 5, 1.0), ([1.0, 0, 0, 0], 0.25), ([0.0, 0.0], 1.0), ([-torch.inf], 1.0), ([], 1.0)]
)
def test_second_moment_ratio_of_known_pools(scores, ratio):
    assert second_moment_ratio(torch.tensor(scores)) == pytest.approx(ratio)


def test_second_moment_ratio_is_what_weighted_draws_leave_of_the_gradients_second_moment():
    norms = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.double) ** 3
    probabilities = norms / norms.sum()
    uniform = norms.square().mean()
    weighted = (probabilities * (norms / (len(norms) * probabilities)).square()).sum()  # exactly, not by drawing
    assert second_moment_ratio(norms) == pytest.approx((weighted / uniform).item())


@laws
@given(cost=st.floats(1, 5), ratio=st.floats(0.01, 1))
def test_break_even_and_unbiased_payoff(cost, ratio):
    assert payoff(break_even_gain(cost), cost) == pytest.approx(1)
    assert payoff(1.01 * break_even_gain(cost), cost) > 1
    assert unbiased_payoff(ratio, cost) == pytest.approx(1 / (ratio * cost))
    assert unbiased_payoff(1.0, cost) <= 1  # without skewed scores nothing is to be had


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
    trained = batch_work(anatomy, batch, "trained", flops_law(anatomy), passes=3)
    scored = batch_work(anatomy, batch, "scored", flops_law(anatomy, 1))
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
