"""Scorers: equal to a really shorter model, to the model's own loss, and without a trace in training."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn
from transformers import BatchEncoding

import models
from earlysift import Sifter, scorers
from earlysift.anatomy import find_anatomy
from earlysift.exits import ExitHead
from earlysift.families import Family
from earlysift.measures import ENTROPY, MEASURES
from models import ALL, BUILDERS, build, loss_of, row_of, sample_losses, shorter

SCORERS = [*(scorers.at_exit(measure, 1) for measure in MEASURES.values()), scorers.exact()]

TOKENS = [pytest.param(*key, id="-".join(key)) for key in BUILDERS if key[1] != "sequence_classification"]
FEW = [
    pytest.param("bert", "masked_lm", id="bert-masked_lm"),
    pytest.param("llama", "causal_lm", id="llama-causal_lm"),
    pytest.param("roberta", "token_classification", id="roberta-token_classification"),
    pytest.param("gpt2", "sequence_classification", id="gpt2-sequence_classification"),
    pytest.param("plain", "causal_lm", id="plain-causal_lm"),
]
INF, NAN = float("inf"), float("nan")


def pool_for(model, rows=7, length=12, seed=1):
    return models.batch_for(model, models.task_of(model), rows, length, Generator().manual_seed(seed))


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("family", "task"), ALL)
def test_early_exit_loss_is_the_loss_of_a_really_shorter_model(family, task):
    model = build(family, task)
    pool = pool_for(model)
    for depth in (1, 3):
        scores = scorers.early_exit_loss(model, pool, depth=depth, family=row_of(model), dtype=None)
        assert scores.dtype == torch.float32
        assert not scores.requires_grad
        close(scores, sample_losses(shorter(model, depth).eval(), pool), 1e-5)


@pytest.mark.parametrize(("family", "task"), ALL)
def test_mean_of_the_exact_losses_is_the_loss_of_the_model(family, task):
    model = build(family, task).eval()
    pool = pool_for(model)
    scores = scorers.exact_loss(model, pool, family=row_of(model), dtype=None)
    close(scores, sample_losses(model, pool), 1e-5)
    if task == "sequence_classification":
        counts = torch.ones(len(scores))
    else:
        counts = (pool["labels"][:, 1:] if task == "causal_lm" else pool["labels"]).ne(-100).sum(dim=1).float()
    close((scores * counts).sum() / counts.sum(), loss_of(model, pool).detach(), 1e-5)
    total = scorers.exact_loss(model, pool, family=row_of(model), dtype=None, reduction="sum")
    close(total, scores if task == "sequence_classification" else scores * counts, 1e-5)


@pytest.mark.parametrize(("family", "task"), ALL)
def test_training_loss_is_the_loss_of_the_model_with_its_gradients(family, task):
    model = build(family, task)
    batch = pool_for(model)
    own = loss_of(model, batch)
    own.backward()
    expected = {
        name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()
    ours = scorers.training_loss(model, batch, family=row_of(model))
    ours.backward()
    assert ours.dtype == torch.float32
    assert ours.shape == ()
    close(ours, own, 1e-6)
    assert expected
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        close(gradient, expected.get(name, torch.zeros_like(parameter)), 1e-5)


@pytest.mark.parametrize(("family", "task"), FEW)
def test_training_loss_of_an_exit_is_the_loss_of_a_really_shorter_model(family, task):
    model = build(family, task)
    batch = pool_for(model)
    close(scorers.training_loss(model, batch, depth=2, family=row_of(model)), loss_of(shorter(model, 2), batch), 1e-5)


@pytest.mark.parametrize(("family", "task"), FEW)
def test_chunks_of_positions_change_no_gradient(family, task):
    model = build(family, task)
    batch = pool_for(model)
    parameters = list(model.parameters())
    whole, chunked = (
        torch.autograd.grad(
            scorers.training_loss(model, batch, family=row_of(model), chunk_tokens=size), parameters, allow_unused=True
        )
        for size in (1 << 30, 3)
    )
    for one, other in zip(whole, chunked, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            close(one, other, 1e-5)


@pytest.mark.parametrize(("family", "task"), FEW)
def test_weights_multiply_what_a_sample_adds_to_the_loss(family, task):
    model = build(family, task).eval()
    batch = pool_for(model)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 3.0, 1.0])
    sums = scorers.exact_loss(model, batch, family=row_of(model), dtype=None, reduction="sum")
    if task == "sequence_classification":
        count = 7
    else:
        count = int((batch["labels"][:, 1:] if task == "causal_lm" else batch["labels"]).ne(-100).sum())
    weighted = scorers.training_loss(model, batch, family=row_of(model), weights=weights)
    close(weighted, (weights * sums).sum() / count, 1e-5)
    plain = scorers.training_loss(model, batch, family=row_of(model))
    assert torch.equal(scorers.training_loss(model, batch, family=row_of(model), weights=torch.ones(7)), plain)


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: scorer.name)
@pytest.mark.parametrize(("family", "task"), FEW)
def test_rows_at_once_change_no_score(family, task, scorer):
    model = build(family, task)
    pool = pool_for(model)
    whole = scorer(model, pool, family=row_of(model), dtype=None)
    for chunk_rows in (1, 2, 3, 7, 100):
        close(scorer(model, pool, family=row_of(model), dtype=None, chunk_rows=chunk_rows), whole, 1e-5)


@pytest.mark.parametrize(("family", "task"), FEW)
def test_scores_do_not_depend_on_the_company_or_on_padding(family, task):
    model = build(family, task)
    pool = pool_for(model)
    scores = scorers.early_exit_loss(model, pool, depth=2, family=row_of(model), dtype=None)
    order = torch.tensor([3, 0, 6, 5, 1, 2, 4])
    shuffled = {key: value[order] for key, value in pool.items()}
    close(scorers.early_exit_loss(model, shuffled, depth=2, family=row_of(model), dtype=None), scores[order], 1e-5)
    filler = {"input_ids": models.PAD, "attention_mask": 0, "labels": -100}
    padded = {key: F.pad(value, (0, 5), value=filler[key]) if value.ndim == 2 else value for key, value in pool.items()}
    close(scorers.early_exit_loss(model, padded, depth=2, family=row_of(model), dtype=None), scores, 1e-5)


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: scorer.name)
@pytest.mark.parametrize("length", [11, 24])
@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("llama", "causal_lm"), ("plain", "causal_lm")])
def test_labels_that_are_not_one_per_position_are_refused_with_what_came(family, task, length, scorer):
    model = build(family, task)
    pool = pool_for(model)
    pool["labels"] = pool["labels"].repeat(1, 2)[:, :length]
    with pytest.raises(ValueError, match=rf"\(7, {length}\)\. Give one label per position, -100 where there is none"):
        scorer(model, pool, family=row_of(model), dtype=None)


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: scorer.name)
@pytest.mark.parametrize(("family", "task"), FEW)
def test_trimmed_chunks_of_like_length_give_the_same_scores_from_fewer_positions(family, task, scorer):
    model = build(family, task)
    pool = pool_for(model)
    lengths = torch.tensor([12, 3, 12, 5, 4, 11, 5])
    padding = torch.arange(12) >= lengths[:, None]
    pool["attention_mask"] = (~padding).long()
    pool["input_ids"] = pool["input_ids"].masked_fill(padding, models.PAD)
    if pool["labels"].ndim == 2:
        pool["labels"] = pool["labels"].masked_fill(padding, -100)
    before = {name: rows.clone() for name, rows in pool.items()}
    shapes = []
    first = find_anatomy(model, row_of(model)).layers[0]
    handle = first.register_forward_pre_hook(lambda module, inputs: shapes.append(tuple(inputs[0].shape[:2])))
    options = {"family": row_of(model), "dtype": None, "chunk_rows": 3}
    close(scorer(model, pool, trim=True, **options), scorer(model, pool, **options), 1e-5)
    handle.remove()
    assert shapes == [(3, 5), (3, 12), (1, 12), (3, 12), (3, 12), (1, 12)]
    assert all(torch.equal(pool[name], rows) for name, rows in before.items())


@pytest.mark.parametrize(("family", "task"), ALL)
def test_entropy_is_that_of_the_distribution_a_really_shorter_model_predicts(family, task):
    model = build(family, task)
    pool = pool_for(model)
    scores = scorers.at_exit(ENTROPY, 2)(model, pool, family=row_of(model), dtype=None)
    labels = pool["labels"]
    with torch.no_grad():
        logits = models.logits_of(shorter(model, 2).eval()(**{k: v for k, v in pool.items() if k != "labels"}))
    if task == "causal_lm":
        logits, labels = logits[:, :-1], labels[:, 1:]
    entropies = torch.distributions.Categorical(logits=logits).entropy()
    if task != "sequence_classification":
        labelled = labels != -100
        entropies = (entropies * labelled).sum(dim=1) / labelled.sum(dim=1)
    close(scores, entropies, 1e-5)


@pytest.mark.parametrize("scorer", SCORERS, ids=lambda scorer: scorer.name)
@pytest.mark.parametrize(("family", "task"), TOKENS)
def test_sample_without_labels_is_minus_infinity(family, task, scorer):
    model = build(family, task)
    pool = pool_for(model)
    pool["labels"][3] = -100
    scores = scorer(model, pool, family=row_of(model), dtype=None)
    assert (scores == -INF).tolist() == [row == 3 for row in range(7)]
    assert torch.isfinite(scores[[0, 1, 2, 4, 5, 6]]).all()


@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("bert", "sequence_classification")])
def test_nan_among_the_inputs_stays_with_its_sample(family, task):
    model = build(family, task)
    pool = pool_for(model)
    pool["inputs_embeds"] = torch.randn(7, 12, models.WIDTH, generator=Generator().manual_seed(0))
    del pool["input_ids"]
    clean = scorers.early_exit_loss(model, pool, dtype=None)
    pool["inputs_embeds"][2, 1] = NAN
    scores = scorers.early_exit_loss(model, pool, dtype=None)
    others = [0, 1, 3, 4, 5, 6]
    assert torch.isnan(scores[2])
    assert torch.equal(scores[others], clean[others])


@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("bert", "sequence_classification")])
def test_nan_loss_of_a_sample_shows_in_the_training_loss(family, task):
    model = build(family, task)
    batch = pool_for(model)
    batch["inputs_embeds"] = torch.randn(7, 12, models.WIDTH, generator=Generator().manual_seed(0))
    del batch["input_ids"]
    batch["inputs_embeds"][2, 1] = NAN
    assert torch.isnan(loss_of(model, batch))
    assert torch.isnan(scorers.training_loss(model, batch))


def test_unlabelled_samples_are_no_part_of_the_training_loss():
    for family, task in (("bert", "masked_lm"), ("bert", "sequence_classification"), ("gpt2", "causal_lm")):
        model = build(family, task)
        batch = pool_for(model)
        batch["labels"][3] = -100
        close(scorers.training_loss(model, batch), loss_of(model, batch), 1e-6)
        others = [0, 1, 2, 4, 5, 6]
        rest = {key: value[others] for key, value in batch.items()}
        close(scorers.training_loss(model, rest), scorers.training_loss(model, batch), 1e-5)
        batch["labels"][:] = -100
        empty = scorers.training_loss(model, batch)
        empty.backward()
        assert empty == 0
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("problem", "outputs", "labels"),
    [
        ("regression", 1, torch.linspace(-1, 1, 7)),
        ("regression", 3, torch.linspace(-1, 1, 21).reshape(7, 3)),
        ("multi_label_classification", 3, torch.arange(21).reshape(7, 3).remainder(2).float()),
        (None, 3, torch.arange(21).reshape(7, 3).remainder(2).float()),
        (None, 3, torch.arange(7).remainder(3)),
        (None, 1, torch.linspace(-1, 1, 7)),
    ],
)
def test_every_kind_of_classification_has_the_loss_of_the_model(problem, outputs, labels):
    model = build("bert", "sequence_classification", problem_type=problem, num_labels=outputs)
    pool = {**pool_for(model), "labels": labels}
    own = copy.deepcopy(model)(**pool).loss
    close(scorers.training_loss(model, pool), own, 1e-6)
    scores = scorers.exact_loss(model, pool, dtype=None)
    alone = [model.eval()(**{key: value[i : i + 1] for key, value in pool.items()}).loss.detach() for i in range(7)]
    close(scores, torch.stack(alone), 1e-5)


# Precision


@pytest.mark.parametrize(("family", "task"), FEW)
def test_bfloat16_scores_are_float32_and_near(family, task):
    model = build(family, task)
    pool = pool_for(model)
    exact = scorers.early_exit_loss(model, pool, family=row_of(model), dtype=None)
    scores = scorers.early_exit_loss(model, pool, family=row_of(model), dtype=torch.bfloat16)
    assert scores.dtype == torch.float32
    assert not torch.equal(scores, exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = sample_losses(shorter(model, 1).eval(), pool)
    assert (scores - exact).abs().max() <= 2 * (plain - exact).abs().max() + 1e-2


def test_automatic_precision_is_bfloat16_only_where_the_hardware_has_it():
    model = build("bert", "masked_lm")
    pool = pool_for(model)
    able = torch.cpu.get_capabilities()
    native = bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    chosen = scorers.scoring_dtype(torch.device("cpu"))
    assert chosen == (torch.bfloat16 if native else None)
    assert scorers.scoring_dtype(torch.device("meta")) is None
    automatic = scorers.early_exit_loss(model, pool)
    assert torch.equal(automatic, scorers.early_exit_loss(model, pool, dtype=chosen))


def test_a_precision_by_an_unknown_name_is_refused():
    model = build("bert", "masked_lm")
    with pytest.raises(ValueError, match="bf16"):
        scorers.early_exit_loss(model, pool_for(model), dtype="bf16")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize(("family", "task"), FEW)
def test_scoring_within_the_autocast_of_the_user_leaves_gradients_as_without(family, task, dtype):
    def gradients(score):
        model = build(family, task)
        batch = pool_for(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if score:
                scorers.early_exit_loss(model, batch, depth=2, family=row_of(model), dtype=dtype)
                scorers.exact_loss(model, batch, family=row_of(model), dtype=dtype)
            loss = loss_of(model, batch)
        loss.backward()
        return loss.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}

    (loss, with_scoring), (same_loss, without) = gradients(True), gradients(False)
    assert torch.equal(loss, same_loss)
    assert sum(gradient is not None for gradient in without.values()) > 20
    for name, gradient in without.items():
        assert (with_scoring[name] is None) == (gradient is None), name
        assert gradient is None or torch.equal(with_scoring[name], gradient), name


def test_buffers_that_a_model_builds_while_scoring_serve_training_later():
    class Lazy(nn.Module):
        """Caches a table at its first forward pass, as rotary embeddings do."""

        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
            self.head = nn.Linear(8, 5)
            self.table = None

        def forward(self, states):
            if self.table is None:
                self.table = torch.arange(states.size(1)).float()[:, None].cos() * torch.ones(8)
            for block in self.blocks:
                states = block(states * self.table)
            return self.head(states)

    model = Lazy()
    row = Family("blocks", (("head",),), "token_classification")
    pool = torch.randn(4, 6, 8), torch.zeros(4, 6, dtype=torch.long)
    scorers.early_exit_loss(model, pool, family=row)
    scorers.training_loss(model, pool, family=row).backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters())


# Containers


def test_dict_batch_encoding_and_pair_are_scored_alike():
    model = build("plain", "masked_lm")
    pool = pool_for(model)
    row = row_of(model)
    expected = scorers.early_exit_loss(model, pool, family=row, dtype=None, chunk_rows=3)
    encoding = BatchEncoding(dict(pool))
    assert torch.equal(scorers.early_exit_loss(model, encoding, family=row, dtype=None, chunk_rows=3), expected)
    inputs = {key: value for key, value in pool.items() if key != "labels"}
    for pair in ((inputs, pool["labels"]), [BatchEncoding(inputs), pool["labels"]]):
        assert torch.equal(scorers.early_exit_loss(model, pair, family=row, dtype=None, chunk_rows=3), expected)


def test_pair_of_tensors_is_scored_like_a_call_with_one_argument():
    model = build("plain", "sequence_classification")
    features = torch.randn(5, 6, models.WIDTH, generator=Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 3, 4])
    scores = scorers.early_exit_loss(model, (features, labels), depth=2, family=row_of(model), dtype=None)
    expected = F.cross_entropy(shorter(model, 2).eval()(features).detach(), labels, reduction="none")
    close(scores, expected, 1e-6)


def test_labels_never_reach_the_model_while_scoring():
    model = build("bert", "masked_lm")
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs.get("labels")), with_kwargs=True)
    scorers.early_exit_loss(model, pool_for(model))
    assert seen == [None]


def test_scorers_leave_the_pool_as_it_was():
    model = build("bert", "masked_lm")
    pool = pool_for(model)
    before = {key: value.clone() for key, value in pool.items()}
    scorers.early_exit_loss(model, pool, exit_head=ExitHead(models.WIDTH), chunk_rows=2)
    assert list(pool) == list(before)
    assert all(torch.equal(value, before[key]) for key, value in pool.items())


def test_a_scorer_of_ones_own_runs_without_gradients_in_evaluation_mode_and_on_its_own_random_numbers():
    model = build("bert", "masked_lm", dropout=0.3)
    model.bert.encoder.layer[1].eval()  # frozen by the user
    modes = [module.training for module in model.modules()]
    pool = models.batch_for(model, "masked_lm", 8, 10, Generator().manual_seed(1))
    seen = []

    def score(model, pool):
        seen.append((torch.is_grad_enabled(), any(module.training for module in model.modules())))
        model.bert.embeddings.train()  # and forgets to put it back
        drawn = torch.rand(8) + random.random() + np.random.rand()  # noqa: NPY002, as a user may
        return drawn * model(**pool).logits.mean()

    def states():
        kind, keys, *rest = np.random.get_state()  # noqa: NPY002
        return random.getstate(), kind, keys.tolist(), rest, torch.get_rng_state().tolist()

    def picks():
        sifter = Sifter(model, keep=0.5, score=score, probe_every=0)
        sifter.sift(pool)
        first = sifter.selection.indices.tolist()
        before = states()
        sifter.sift(pool)
        assert states() == before
        return first, sifter.selection.indices.tolist()

    first, second = picks()
    assert [module.training for module in model.modules()] == modes
    assert seen == [(False, False)] * 2
    assert first != second  # each step draws its own numbers
    torch.rand(5)  # whatever is drawn elsewhere
    assert picks() == (first, second)


@pytest.mark.parametrize("scores", [[1.0] * 8, None, np.ones(8), torch.zeros(8, dtype=torch.complex64), torch.zeros(7)])
def test_what_is_no_score_is_refused_with_what_was_expected(scores):
    model = build("bert", "masked_lm")
    pool = models.batch_for(model, "masked_lm", 8, 10, Generator().manual_seed(1))
    sifter = Sifter(model, keep=0.5, score=lambda model, pool: scores)
    with pytest.raises(ValueError, match=r"Expected scores of shape \(8,\), .* one real number per row"):
        sifter.sift(pool)
    assert sifter.step == 0
