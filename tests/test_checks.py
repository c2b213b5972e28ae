"""Losses are the model's own: what the library computes is compared with what the model returns, on the first pool."""

import copy
import logging
import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Generator, nn
from torch.nn.functional import cross_entropy

import models
from earlysift import Family, Sifter, checks, exits, passes, scorers
from earlysift.anatomy import find_anatomy
from earlysift.checks import check
from models import ALL, LAYERS, WIDTH, build, inputs_of, loss_of, row_of, structure

TINY = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


def drawn(*shape, low=5, high=50, seed=0):
    return torch.randint(low, high, shape, generator=Generator().manual_seed(seed))


def made(name, **config):
    """A transformers model with weights wide enough that a wrong loss shows."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        cls = getattr(transformers, name)
        return models.widen(cls(cls.config_class(**config))).train()


def bart():
    sizes = {
        f"{part}_{what}": size
        for part in ("encoder", "decoder")
        for what, size in (("layers", 3), ("attention_heads", 2), ("ffn_dim", 32))
    }
    return made(
        "BartForConditionalGeneration", vocab_size=50, d_model=32, dropout=0.0, max_position_embeddings=32, **sizes
    )


def t5():
    return made(
        "T5ForConditionalGeneration",
        vocab_size=50,
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=3,
        num_heads=4,
        num_decoder_layers=3,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )


class Capped(models.PlainTransformer):
    """A language model that caps its logits behind the head, and returns its loss."""

    def forward(self, input_ids, labels=None):
        logits = 15 * torch.tanh(super().forward(input_ids) / 15)
        loss = None if labels is None else cross_entropy(logits.flatten(0, 1), labels.flatten())
        return {"loss": loss, "logits": logits}


CAPPED_ROW = Family("blocks", (("head",),), "masked_lm")


def capped():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.widen(Capped("masked_lm")).train()


def labelled_pool(rows=8, length=8):
    ids = drawn(rows, length)
    return {"input_ids": ids, "labels": torch.where(drawn(rows, length, low=0, high=3, seed=1) == 0, ids, -100)}


def own_loss(model, pool):
    with torch.no_grad(), passes.scoring_mode(model):
        output = model(**pool)
    return (output["loss"] if isinstance(output, dict) else output.loss).item()


def our_loss(model, pool, family):
    with torch.no_grad(), passes.scoring_mode(model):
        return scorers.training_loss(model, pool, family=family).item()


@pytest.mark.parametrize(("family", "task"), ALL)
def test_every_known_family_makes_its_own_logits_and_loss(family, task):
    model = build(family, task)
    batch = models.batch_for(model, task, 6, 12, Generator().manual_seed(1))
    assert check(model, family=row_of(model), inputs=batch) == []
    anatomy = find_anatomy(model, row_of(model))
    assert checks.verified(model, batch, row_of(model)) == anatomy


@pytest.mark.parametrize(("family", "task"), ALL[::4])
@pytest.mark.parametrize("how", ["bfloat16 weights", "autocast", "autocast inside"])
def test_rounding_in_sixteen_bits_is_no_difference(family, task, how):
    model = build(family, task)
    batch = models.batch_for(model, task, 6, 12, Generator().manual_seed(1))
    if how == "bfloat16 weights":
        model = model.bfloat16()
        batch = {name: value.bfloat16() if value.is_floating_point() else value for name, value in batch.items()}
    if how == "autocast inside":  # as accelerate and Fabric do it
        model.forward = torch.autocast("cpu", dtype=torch.bfloat16)(model.forward)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
        assert check(model, family=row_of(model), inputs=batch) == []


def test_a_cap_behind_the_head_is_found_and_the_own_logits_are_used(caplog):
    model, pool = capped(), labelled_pool()
    (problem,) = check(model, family=CAPPED_ROW, inputs=pool)
    assert "soft cap" in problem.reason
    assert "heads=()" in problem.remedy
    assert check(model, family=Family("blocks", (), "masked_lm"), inputs=pool) == []
    with caplog.at_level(logging.WARNING, "earlysift"):
        for _ in range(2):
            assert our_loss(model, pool, CAPPED_ROW) == pytest.approx(own_loss(model, pool), rel=1e-5)
    assert len(caplog.records) == 1
    wrong = find_anatomy(model, CAPPED_ROW)
    with torch.no_grad(), exits.headless(wrong):
        states = model(pool["input_ids"])["logits"]
    without_cap = cross_entropy(passes.head_of(wrong)(states).flatten(0, 1), pool["labels"].flatten()).item()
    assert abs(without_cap - own_loss(model, pool)) > 0.01  # what would have been trained on


@pytest.mark.parametrize("score", ["loss", "exact"])
def test_the_first_pool_shows_a_sifter_the_cap(score):
    model, pool = capped(), labelled_pool()
    sifter = Sifter(model, keep=0.5, score=score, family=CAPPED_ROW, probe_every=1)
    sifter.sift(pool)
    row = Family("blocks", (), "masked_lm")
    assert torch.equal(
        scorers.exact_loss(model, pool, family=CAPPED_ROW), scorers.exact_loss(copy.deepcopy(model), pool, family=row)
    )


def test_a_row_with_the_wrong_task_is_refused_with_the_right_one():
    model = build("llama", "causal_lm")
    pool = models.batch_for(model, "causal_lm", 6, 12, Generator().manual_seed(1))
    row = Family("model.layers", (("lm_head",),), "token_classification")
    (problem,) = check(model, family=row, inputs=pool)
    assert "causal_lm shifts the labels" in problem.remedy
    for refused in (
        lambda: Sifter(model, keep=0.5, family=row).sift(pool),
        lambda: Sifter(model, keep=0.5, score="exact", family=row).sift(pool),
        lambda: scorers.training_loss(model, pool, family=row),
    ):
        with pytest.raises(ValueError, match="The loss that the model returns"):
            refused()
    assert check(model, family=Family("model.layers", (("lm_head",),), "causal_lm"), inputs=pool) == []


def test_an_encoder_decoder_is_no_causal_language_model():
    with pytest.raises(ValueError, match="seq2seq_lm"):
        Sifter(t5(), family=Family("decoder.block", (("lm_head",),), "causal_lm"))


@pytest.mark.parametrize("build_model", [t5, bart])
@pytest.mark.parametrize("heads", [(("lm_head",),), ()])
def test_an_encoder_decoder_has_its_own_loss(build_model, heads):
    model = build_model()
    layers = "decoder.block" if build_model is t5 else "model.decoder.layers"
    row = Family(layers, heads, "token_classification")
    pool = {"input_ids": drawn(6, 10), "labels": drawn(6, 10, seed=1)}
    pool["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(pool["labels"])
    assert our_loss(model, pool, row) == pytest.approx(own_loss(model, pool), rel=1e-5)
    batch = Sifter(model, keep=0.5, family=row).sift(pool)
    assert len(batch["labels"]) == 3


def test_a_pool_without_decoder_input_ids_is_refused_with_the_way_out():
    model, row = bart(), Family("model.decoder.layers", (), "token_classification")
    pool = {"input_ids": drawn(6, 10), "labels": drawn(6, 10, seed=1)}
    sifter = Sifter(model, keep=0.5, family=row)
    with pytest.raises(ValueError, match=r"Set task='seq2seq_lm' in the family row, .* or put them into the pool"):
        sifter.sift(pool)
    assert sifter.step == 0
    pool["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(pool["labels"])
    sifter.sift(pool)
    with pytest.raises(ValueError, match="decoder_input_ids"):
        Sifter(t5(), keep=0.5, family=Family("decoder.block", (), "token_classification")).sift(
            {"input_ids": drawn(6, 10), "labels": drawn(6, 10, seed=1)}
        )


@pytest.mark.parametrize(
    ("name", "layers", "config"),
    [
        ("MambaForCausalLM", "backbone.layers", {"state_size": 4}),
        (
            "xLSTMForCausalLM",
            "backbone.blocks",
            {"num_heads": 2, "num_blocks": 3, "qk_dim_factor": 1.0, "v_dim_factor": 1.0, "chunk_size": 8},
        ),
    ],
)
def test_a_forward_that_reads_its_heads_attributes_has_its_own_loss(name, layers, config):
    model = made(name, vocab_size=50, hidden_size=64, num_hidden_layers=3, **config)
    ids = drawn(6, 8)
    pool, row = {"input_ids": ids, "labels": ids}, Family(layers, (("lm_head",),), "causal_lm")
    assert our_loss(model, pool, row) == pytest.approx(own_loss(model, pool), rel=1e-5)
    assert check(model, family=row, inputs=pool) == []  # xLSTM's cap behind its head is known from its config
    assert len(Sifter(model, keep=0.5, family=row).sift(pool)["labels"]) == 3


def test_debertas_distances_are_counted_without_buckets():
    model = made("DebertaV2ForMaskedLM", **TINY, relative_attention=True, pos_att_type=["p2c", "c2p"])
    sifter = Sifter(model, keep=0.5)
    sifter.sift(labelled_pool())
    assert sifter.ledger.end()["trained_flops"] > 0


def test_counting_flops_stops_no_training(caplog):
    model = build("plain", "masked_lm")
    model.config = SimpleNamespace(num_attention_heads=2, head_dim="wide")  # nothing that FLOPs can be counted with
    sifter = Sifter(model, keep=0.5, family=row_of(model))
    with caplog.at_level(logging.WARNING, "earlysift"):
        for _ in range(2):
            assert len(sifter.sift(labelled_pool())["labels"]) == 4
    assert "trained_flops" not in sifter.ledger.end()
    assert ["FLOPs" in record.message for record in caplog.records] == [True]


def test_wrappers_that_cannot_be_shortened_are_refused_with_a_remedy():
    model = build("bert", "masked_lm")
    for wrapped, remedy in (
        (nn.DataParallel(model), "DistributedDataParallel"),
        (torch.optim.swa_utils.AveragedModel(model), "Pass the model that is trained"),
        (torch.compile(nn.DataParallel(model), backend="eager"), "DistributedDataParallel"),
    ):
        with pytest.raises(ValueError, match=remedy):
            Sifter(wrapped)
        (problem,) = check(wrapped)
        assert remedy in problem.remedy


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_model_set_up_by_fabric_is_sifted_with_and_picks_the_same(precision):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fabric = pytest.importorskip("lightning.fabric", reason="lightning is not installed").Fabric(
            accelerator="cpu", devices=1, precision=precision
        )
    plain = build("bert", "masked_lm")
    pool = models.batch_for(plain, "masked_lm", 8, 12, Generator().manual_seed(1))
    wrapped = fabric.setup(copy.deepcopy(plain))
    assert check(wrapped, inputs=pool) == []
    picked = Sifter(wrapped, keep=0.5, probe_every=1).sift(pool)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16-mixed"):
        expected = Sifter(plain, keep=0.5, probe_every=1).sift(pool)
    assert all(torch.equal(picked[name], expected[name]) for name in pool)
    loss = scorers.training_loss(wrapped, picked)
    fabric.backward(loss)
    assert all(p.grad is not None for p in wrapped.bert.encoder.layer.parameters())


def test_a_model_is_compared_once_on_rows_that_have_labels(caplog):
    model, pool = capped(), labelled_pool()
    pool["labels"][:6] = -100  # only the last two rows have labels
    row = Family("blocks", (("head",),), "causal_lm")  # wrong, which only labels show
    with pytest.raises(ValueError, match="The loss that the model returns"):
        checks.verified(model, pool, row)
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for _ in range(3):
        checks.verified(model, pool, CAPPED_ROW)
    once = len(calls)
    scorers.training_loss(model, pool, family=CAPPED_ROW)
    assert once > 0
    assert len(calls) == once + 1


@pytest.mark.parametrize(("family", "task"), ALL)
def test_comparing_leaves_the_model_and_random_states_as_they_were(family, task):
    model = build(family, task, dropout=0.2)
    batch = models.batch_for(model, task, 6, 12, Generator().manual_seed(1))
    loss_of(model, batch).backward()
    next(iter(model.children())).eval()
    config = copy.deepcopy(getattr(model, "config", None))
    if config is not None:
        model.config.problem_type = config.problem_type = None

    def everything():
        gradients = [p.grad for p in model.parameters()]
        return [*model.state_dict().values(), *(g for g in gradients if g is not None), torch.get_rng_state()]

    before = copy.deepcopy(everything())
    modes = [module.training for module in model.modules()]
    checks.verified(model, batch, row_of(model))
    assert all(torch.equal(was, now) for was, now in zip(before, everything(), strict=True))
    assert modes == [module.training for module in model.modules()]
    assert str(getattr(model, "config", None)) == str(config)


def test_inputs_without_labels_have_their_logits_compared_only():
    model, pool = capped(), labelled_pool()
    assert len(check(model, family=CAPPED_ROW, inputs=pool["input_ids"])) == 1
    row = Family("blocks", (), "causal_lm")
    assert check(model, family=row, inputs=pool["input_ids"]) == []
    assert len(check(model, family=row, inputs=pool)) == 1


class Returning(models.PlainTransformer):
    """A model that returns something else than logits."""

    def __init__(self, what):
        super().__init__("token_classification")
        self.what = what

    def forward(self, input_ids):
        logits = super().forward(input_ids)
        return self.what(logits)


@pytest.mark.parametrize("score", ["loss", "exact"])
@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda logits: None, "Expected the model to return logits .* got NoneType"),
        (lambda logits: {"loss": 1.0}, "Expected the model to return logits .* got dict"),
        (lambda logits: (), "Expected the model to return logits .* got tuple"),
        (lambda logits: 1 / 0, "The model fails on two rows of the pool .*: ZeroDivisionError"),
        (lambda logits: logits[:, 0], r"Expected logits \(R, T, V\) of two rows for token_classification"),
    ],
)
def test_what_a_model_cannot_be_scored_by_is_named(what, message, score):
    sifter = Sifter(
        Returning(what), keep=0.5, score=score, family=Family("blocks", (("head",),), "token_classification")
    )
    labels = drawn(8, 8, low=0, high=models.CLASSES)
    with pytest.raises(ValueError, match=message):
        sifter.sift({"input_ids": drawn(8, 8), "labels": labels})
    assert sifter.step == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": drawn(8, 8) + 10_000}, "The model fails on two rows of the pool"),
        ({"labels": drawn(8)}, r"Expected labels .* one per position"),
        ({"labels": drawn(8, 7)}, r"Expected labels .* one per position"),
    ],
)
@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("llama", "causal_lm")])
def test_a_pool_that_does_not_fit_the_model_is_told_from_a_model_that_does_not_fit_its_row(
    family, task, change, message
):
    model = build(family, task)
    sifter = Sifter(model, keep=0.5)
    with pytest.raises(ValueError, match=message):
        sifter.sift(labelled_pool() | change)
    assert sifter.step == 0
    sifter.sift(labelled_pool())


# Problems of a dry run


class Looping(nn.Module):
    """Shares weights: runs its few blocks as often as its config says, as ALBERT does."""

    def __init__(self, blocks=2, runs=6):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(blocks))
        self.runs = runs

    def forward(self, states):
        for run in range(self.runs):
            states = self.blocks[run % len(self.blocks)](states)
        return states


def test_shared_layers_are_refused_by_their_calls():
    problems = check(Looping(), family=Family("blocks", task="token_classification"), inputs=torch.zeros(2, 3, WIDTH))
    assert len(problems) == 1
    assert problems[0].reason == "Expected each of the first 1 layers to run once and no other, got calls [6, 0]."
    assert "the list that it loops over, or score with your own callable" in problems[0].remedy


class Troubled(nn.Module):
    """Loops over its blocks too often, draws random numbers in evaluation mode, and melts rows together."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, states):
        for _ in range(2):
            for block in self.blocks:
                states = block(states)
        return nn.functional.dropout(states, 0.5, training=True).reshape(1, -1, WIDTH)


def test_check_returns_all_problems_of_a_dry_run_at_once():
    model = Troubled()
    before, state = structure(model), torch.get_rng_state()
    problems = check(model, depth=2, family=Family("blocks", task="masked_lm"), inputs=torch.zeros(2, 3, WIDTH))
    assert len(problems) == 3
    assert problems[0].reason == "Expected each of the first 2 layers to run once and no other, got calls [2, 2, 0]."
    assert problems[1].reason == "Expected one row of output per candidate, got 1 rows for 2 candidates."
    assert problems[2].reason.startswith("The model draws from the global random generator in evaluation mode")
    assert structure(model) == before
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("depth", [0, LAYERS, LAYERS + 1])
def test_check_refuses_an_exit_that_is_none(depth):
    (problem,) = check(build("bert", "masked_lm"), depth=depth)
    assert problem.reason == f"Expected depth in 1..3 (an exit before the last of 4 layers), got {depth}."
    assert "score='exact'" in problem.remedy


@pytest.mark.parametrize(("family", "task"), ALL)
def test_check_finds_no_problem_and_changes_nothing(family, task):
    model = build(family, task, dropout=0.1)
    before, state = structure(model), torch.get_rng_state()
    assert check(model, depth=2, family=row_of(model), inputs=inputs_of(model, rows=2)) == []
    assert structure(model) == before
    assert torch.equal(torch.get_rng_state(), state)


def test_check_with_a_shared_number_among_the_inputs_finds_no_problem():
    class Tempered(models.PlainTransformer):
        def forward(self, temperature, input_ids, attention_mask=None):
            return super().forward(input_ids, attention_mask) / temperature

    model = Tempered("masked_lm")
    inputs = {"temperature": torch.tensor(2.0), **inputs_of(build("plain", "masked_lm"), rows=2)}
    assert check(model, family=Family("blocks", (), "masked_lm"), inputs=inputs) == []


def test_check_with_inputs_in_a_tuple_finds_no_problem_and_leaves_no_hooks():
    class Paired(models.PlainTransformer):
        def forward(self, pair):
            return super().forward(*pair)

    model = Paired("masked_lm")
    inputs = inputs_of(build("plain", "masked_lm"), rows=2)
    before = structure(model)
    problems = []
    try:
        problems = check(
            model, family=Family("blocks", (), "masked_lm"), inputs=(inputs["input_ids"], inputs["attention_mask"])
        )
    finally:
        assert structure(model) == before
    assert problems == []
