"""What peers of SIFT need: each piece against a slow twin that loops over samples, and the steps built from them."""

import collections
import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Generator

from earlysift import scorers, selectors
from earlysift.compare import peers, predictions
from earlysift.compare.arms import ARMS
from earlysift.compare.bench import Bench
from earlysift.compare.peers import (
    evolved_sampling,
    grad_norm,
    infobatch,
    ordered_sgd,
    predictive_batch,
    selective_backprop,
)
from earlysift.compare.prices import charges_ms, step_times_ms
from earlysift.compare.settings import Settings
from earlysift.pretrain.stream import Samples
from earlysift.pretrain.workloads import Workload
from earlysift.scorers import Predictions
from models import BUILDERS, TASKS, batch_for, build, row_of, sample_losses

every_task = pytest.mark.parametrize(
    ("family", "task"), [("plain", task) for task in TASKS] + [key for key in BUILDERS if key[0] in ("bert", "llama")]
)


def example(family, task, rows=6):
    model = BUILDERS[family, task]()
    return model, batch_for(model, task, rows, 12, Generator().manual_seed(3))


def by_sample(predicted):
    """Logits and targets, one sample at a time."""
    counts = predicted.counts.tolist()
    return zip(predicted.logits.split(counts), predicted.targets.split(counts), strict=True)


def gradient_norms_by_autograd(predicted):
    norms = []
    for logits, targets in by_sample(predicted):
        leaf = logits.detach().clone().requires_grad_()
        F.cross_entropy(leaf, targets, reduction="sum").backward()
        norms.append(leaf.grad.norm())
    return torch.stack(norms)


def top_loss_by_sorting(predicted, q):
    samples = sorted(by_sample(predicted), key=lambda sample: -F.cross_entropy(*sample).item())[:q]
    return sum(F.cross_entropy(*s, reduction="sum") for s in samples) / sum(len(targets) for _, targets in samples)


@every_task
def test_losses_of_the_predictions_are_those_of_the_full_logits(family, task):
    model, batch = example(family, task)
    predicted = scorers.predictions(model, batch, family=row_of(model))
    losses = (predictions.sample_losses(predicted) / predicted.counts).detach()
    assert torch.allclose(losses, sample_losses(model, batch), atol=1e-5)


@every_task
def test_weighted_loss_and_its_gradients_are_those_of_the_training_loss(family, task):
    model, batch = example(family, task)
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0, 3.0, 1.0])
    gradients = []
    for use_predictions in (True, False):
        model.zero_grad()
        if use_predictions:
            predicted = scorers.predictions(model, batch, family=row_of(model))
            loss = predictions.weighted_loss(predictions.sample_losses(predicted), predicted.counts, weights)
        else:
            loss = scorers.training_loss(model, batch, family=row_of(model), weights=weights)
        loss.backward()
        gradients.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    assert len(gradients[0]) == len(gradients[1]) > 1
    assert all(torch.allclose(ours, theirs, atol=1e-5) for ours, theirs in zip(*gradients, strict=True))


@every_task
def test_gradient_norms_are_those_of_autograd_sample_by_sample(family, task):
    model, batch = example(family, task)
    predicted = scorers.predictions(model, batch, family=row_of(model))
    assert torch.allclose(grad_norm.gradient_norms(predicted), gradient_norms_by_autograd(predicted), atol=1e-5)


@pytest.mark.parametrize("chunk_rows", [None, 1, 4])
def test_gradient_norm_scores_do_not_depend_on_chunks_and_leave_the_model_as_it_was(chunk_rows):
    model, batch = example("bert", "masked_lm")
    predicted = scorers.predictions(model, batch)
    scores = grad_norm.gradient_norm_scores(model, batch, chunk_rows=chunk_rows)
    assert torch.allclose(scores, grad_norm.gradient_norms(predicted), rtol=0.05)  # scores may be in bfloat16
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


@every_task
@pytest.mark.parametrize("q", [1, 3, 6])
def test_top_loss_is_the_mean_over_the_hardest_samples(family, task, q):
    model, batch = example(family, task)
    predicted = scorers.predictions(model, batch, family=row_of(model))
    ours = ordered_sgd.top_loss(predictions.sample_losses(predicted), predicted.counts, q)
    assert torch.allclose(ours, top_loss_by_sorting(predicted, q), atol=1e-5)


def test_top_loss_of_the_whole_batch_is_the_training_loss():
    model, batch = example("bert", "masked_lm")
    predicted = scorers.predictions(model, batch)
    whole = ordered_sgd.top_loss(predictions.sample_losses(predicted), predicted.counts, 6)
    assert torch.allclose(whole, scorers.training_loss(model, batch), atol=1e-6)


def test_accuracy_counts_right_predictions():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [0.0, 3.0], [1.0, 0.0]])
    assert predictions.accuracy(Predictions(logits, torch.tensor([0, 1, 0, 1]), torch.tensor([3, 1]))) == 0.5


def test_variance_reduction_is_the_ratio_of_standard_deviations_that_sampling_gives():
    """1 / tau^2 is the mean square of gradients under weighted proportional draws over that under uniform ones."""
    norms = torch.tensor([1.0, 1.0, 2.0, 8.0])
    likely = norms / norms.sum()
    weighted = (likely * (norms / (len(norms) * likely)) ** 2).sum()
    uniform = norms.square().mean()
    assert grad_norm.variance_reduction(norms) == pytest.approx((uniform / weighted).sqrt().item())


def test_variance_reduction_does_not_depend_on_the_scale_and_survives_zeros():
    norms = torch.tensor([0.2, 0.4, 0.1])
    assert grad_norm.variance_reduction(norms) == pytest.approx(grad_norm.variance_reduction(1e-6 * norms))
    assert grad_norm.variance_reduction(torch.zeros(3)) == 1.0


def test_q_of_ordered_sgd_never_grows_with_accuracy_and_never_reaches_zero():
    for batch in (1, 8, 32):
        qs = [ordered_sgd.ordered_sgd_q(batch, accuracy / 1000) for accuracy in range(1001)]
        assert qs == sorted(qs, reverse=True)
        assert qs[0] == batch
        assert qs[-1] >= 1


def test_pruning_skips_half_of_the_easy_and_keeps_the_expected_gradient():
    losses = torch.cat([torch.full((600,), 1.0), torch.full((300,), 4.0), torch.full((100,), torch.nan)])
    kept, weights = infobatch.prune(losses, 0.5, Generator().manual_seed(0))
    assert kept[600:].all()
    assert (weights[600:] == 1).all()
    assert (weights[:600] == 2).all()
    assert 0.42 < kept[:600].double().mean() < 0.58
    values = torch.randn(1000, generator=Generator().manual_seed(1))
    totals = []
    for seed in range(300):
        kept, weights = infobatch.prune(losses, 0.5, Generator().manual_seed(seed))
        totals.append((values * weights * kept).sum().item())
    error = statistics.stdev(totals) / len(totals) ** 0.5
    assert abs(statistics.fmean(totals) - values.sum().item()) < 4 * error


def test_nothing_is_pruned_before_losses_are_known_or_when_all_are_equal():
    for losses in (torch.full((50,), torch.nan), torch.full((50,), 2.0)):
        kept, weights = infobatch.prune(losses, 0.5, Generator().manual_seed(0))
        assert kept.all()
        assert (weights == 1).all()


# Steps of peers, on a classification of 60 samples that a small model learns.


@pytest.fixture(scope="module")
def workload():
    generator = Generator().manual_seed(0)
    inputs = torch.randint(3, 100, (80, 8), generator=generator)
    labels = (inputs[:, 0] > 50).long()
    rows = {"input_ids": inputs, "labels": labels}
    train, validation = ({name: values[part] for name, values in rows.items()} for part in (slice(60), slice(60, 80)))
    return Workload(
        name="sixty",
        task="classification",
        samples=Samples(train, validation, prepare=lambda rows, _: rows),
        make_model=lambda seed: build("bert", "sequence_classification", layers=2, seed=seed % 1000),
        baseline={"accuracy": 0.5, "loss": 0.69},
        facts={},
    )


MEDIANS_MS = {"read_batch": 1.0, "train": 9.0, "read_pool": 2.0, "exact": 5.0, "grad_norm": 6.0, "rho_loss": 25.0}
MEDIANS_MS |= {"predictive": 0.5}


def bench_of(workload, arm, **settings):
    values = {"task": "classification", "batch": 8, "layers": 2, "budget": 1.0, "learning_rate": 1e-4}
    bench = Bench(workload, Settings(**{**values, **settings}), 0, MEDIANS_MS)
    bench.set_rate(0.5)
    return bench, ARMS[arm].steps(bench)


def rows_of(bench, step, steps, share=0.5):
    rows = []
    for number in range(steps):
        bench.ledger.begin(number)
        step(share)
        rows.append(bench.ledger.end())
    return rows


def test_ordered_sgd_trains_on_fewer_samples_once_it_is_accurate(workload):
    bench, step = bench_of(workload, "ordered-sgd", learning_rate=1e-2)
    trained = [row["trained"] for row in rows_of(bench, step, 400)]
    assert trained[:100] == [8] * 100
    assert trained == sorted(trained, reverse=True)
    assert trained[-1] < 8


def ids_of_an_epoch(bench, step, share):
    """Ids of what is trained on from here to the end of the epoch, as the stream tells them."""
    epoch = bench.position // bench.stream.epoch
    seen = []
    take = bench.stream.take

    def spy(positions):
        seen.extend(positions.tolist())
        return take(positions)

    bench.stream.take = spy
    try:
        while bench.position // bench.stream.epoch == epoch:
            rows_of(bench, step, 1, share)
    finally:
        bench.stream.take = take
    return [int(bench.stream.ids(n, 1)) for n in seen if n // bench.stream.epoch == epoch]


def test_selective_backprop_draws_by_the_share_of_past_losses_that_are_not_above():
    """Twin: count, one candidate at a time."""
    generator = Generator().manual_seed(0)
    past, losses = torch.rand(200, generator=generator).round(decimals=1), torch.rand(20, generator=generator)
    for beta in (0.0, 0.5, 1.0, 3.0):
        slow = [(sum(other <= loss for other in past.tolist()) / 200) ** beta for loss in losses.tolist()]
        assert selective_backprop.selection_probabilities(losses, past, beta).tolist() == pytest.approx(slow, abs=1e-6)


def test_selective_backprop_takes_equal_losses_all_and_broken_ones_as_the_hardest():
    equal = torch.full((4,), 2.0)
    assert selective_backprop.selection_probabilities(equal, equal, 1.0).tolist() == [1.0] * 4
    broken = torch.tensor([torch.nan, 1.0, -torch.inf, torch.inf])
    assert selective_backprop.selection_probabilities(broken, broken, 1.0).tolist() == [1.0, 0.5, 0.25, 1.0]


HARDEST = slice(-128, None)  # an eighth of 1,024 losses in rising order: 15/16 of the others' lie below on average


def test_selective_backprop_keeps_the_hardest_eighth_as_in_its_paper_and_the_librarys_own_rule_less_often():
    losses = torch.rand(1024, generator=Generator().manual_seed(0)).sort().values
    likely = selective_backprop.selection_probabilities(losses, losses, 1.0)
    assert likely[HARDEST].mean().item() == pytest.approx(15 / 16, abs=1e-3)
    assert likely.mean().item() == pytest.approx(0.5, abs=1e-3)
    kept = torch.zeros(1024)
    for seed in range(100):
        kept[selectors.percentile(losses, 512, Generator().manual_seed(seed), beta=1.0).indices] += 1
    assert 0.74 < (kept[HARDEST].mean() / 100).item() < 0.80


def test_selective_backprop_trains_on_full_batches_of_what_is_hard_and_notes_all_that_it_looked_at(workload):
    bench, step = bench_of(workload, "selective-backprop")
    bench.set_rate(0.0)  # so that losses stay, and with them the probability of every sample
    losses = scorers.exact_loss(bench.model, workload.samples.train)
    taken, loss = [], bench.loss
    bench.loss = lambda batch, weights=None: taken.append(batch["input_ids"]) or loss(batch, weights)
    rows = rows_of(bench, step, 150)
    seen, kept = torch.zeros(60), torch.zeros(60)
    for ids in bench.stream.ids(0, bench.position).split(1):
        seen[ids] += 1
    for inputs in torch.cat(taken):
        kept[(workload.samples.train["input_ids"] == inputs).all(dim=1)] += 1
    assert {row["trained"] for row in rows} == {8}
    assert all(row["candidates"] == row["scored"] >= 8 for row in rows)
    assert sum(row["candidates"] for row in rows) == bench.position
    assert kept.sum() == 150 * 8
    assert 0.45 < (kept.sum() / seen.sum()).item() < 0.55
    shares = (kept / seen)[losses.argsort()]
    assert shares[-8:].mean().item() == pytest.approx(15 / 16, abs=0.05)
    assert shares[:8].mean().item() == pytest.approx(1 / 16, abs=0.05)


def test_what_selective_backprop_drew_beyond_a_batch_is_trained_on_next(workload):
    bench, _ = bench_of(workload, "selective-backprop")
    taken, loss = [], bench.loss
    bench.loss = lambda batch, weights=None: taken.append(batch["input_ids"]) or loss(batch, weights)
    step = selective_backprop.steps(bench, beta=0.0)  # everything is drawn
    assert [row["candidates"] for row in rows_of(bench, step, 7)] == [8] * 7
    in_order = bench.stream.take(torch.arange(56))["input_ids"]
    assert torch.equal(torch.cat(taken), in_order)


def test_selective_backprop_trains_uniformly_and_scores_nothing_before_its_share_of_the_budget(workload):
    uniform, peer = (bench_of(workload, name, select_after=0.5) for name in ("uniform", "selective-backprop"))
    rows_of(*uniform, 3, 0.4)
    assert [row["scored"] for row in rows_of(*peer, 3, 0.4)] == [0, 0, 0]
    for ours, theirs in zip(uniform[0].model.parameters(), peer[0].model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert rows_of(*peer, 1, 0.5)[0]["scored"] >= 8


def count_forward_passes(monkeypatch):
    """Rows of every call of `scorers.exact_loss` from here on."""
    rows, exact_loss = [], scorers.exact_loss

    def spy(model, pool, **options):
        rows.append(len(pool["labels"]))
        return exact_loss(model, pool, **options)

    monkeypatch.setattr(scorers, "exact_loss", spy)
    return rows


def test_stale_selective_backprop_runs_its_forward_pass_in_every_second_epoch_and_is_charged_for_it_alone(
    workload, monkeypatch
):
    """Twin: a dict of the epoch in which each sample was last scored, one candidate at a time."""
    forward = count_forward_passes(monkeypatch)
    bench, step = bench_of(workload, "stale-selective-backprop", batch=4)
    rows = rows_of(bench, step, 120)
    scored_in, expected = {}, []
    for start in range(0, bench.position, 4):
        of_chunk = [(int(bench.stream.ids(number, 1)), number // 60) for number in range(start, start + 4)]
        due = any(epoch - scored_in.get(sample, -2) >= 2 for sample, epoch in of_chunk)
        scored_in |= dict(of_chunk) if due else {}
        expected.append((start // 60, due))
    assert all(due == (epoch % 2 == 0) for epoch, due in expected)  # 60 is a multiple of 4: no chunk is of two epochs
    assert forward == [4] * sum(due for _, due in expected)
    assert sum(row["scored"] for row in rows) == sum(forward)
    assert 0.4 < sum(forward) / bench.position < 0.6
    arm = ARMS["stale-selective-backprop"]
    for row in rows:
        charges = charges_ms(row, arm, bench.settings, MEDIANS_MS)
        assert charges.get("score", 0.0) == pytest.approx(5.0 * row["scored"] / bench.settings.pool)
        assert ("exact" in step_times_ms(row, arm, bench.settings)) == (row["scored"] > 0)


def test_stale_selective_backprop_draws_by_the_losses_of_the_epoch_before_although_the_model_has_changed(workload):
    bench, _ = bench_of(workload, "stale-selective-backprop", batch=4)
    step = selective_backprop.steps(bench, beta=3.0, staleness=2)
    bench.set_rate(0.0)
    while bench.position < 60:
        rows_of(bench, step, 1)
    known = scorers.exact_loss(bench.model, workload.samples.train)
    with torch.no_grad():
        for parameter in bench.model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=Generator().manual_seed(1)))
    taken, loss, offered = [], bench.loss, bench.stream.ids(bench.position, 120 - bench.position)
    bench.loss = lambda batch, weights=None: taken.append(batch["input_ids"]) or loss(batch, weights)
    while bench.position < 120:
        rows_of(bench, step, 1)
    drawn = (workload.samples.train["input_ids"][offered][:, None] == torch.cat(taken)).all(dim=2).any(dim=1)
    by_loss = drawn[known[offered].argsort()].double()
    assert by_loss[-16:].mean() > 0.5 > 0.1 > by_loss[:16].mean()  # (7/8) ** 3 and (1/8) ** 3 are to be expected


def test_fresh_losses_make_selective_backprop_what_it_is_without_a_memory(workload):
    fresh, stale = (bench_of(workload, "selective-backprop") for _ in range(2))
    step = selective_backprop.steps(stale[0], staleness=2)
    assert rows_of(*fresh, 3)[-1]["candidates"] == rows_of(stale[0], step, 3)[-1]["candidates"]  # the first epoch
    assert all(row["scored"] == row["candidates"] for row in rows_of(*fresh, 30))
    assert any(row["scored"] == 0 for row in rows_of(stale[0], step, 30))


def test_weights_of_evolved_sampling_are_those_of_the_whole_history():
    """Twin: sums over the past, and the smoothed loss plus a share of its smoothed rise."""
    losses = torch.rand(9, 6, generator=Generator().manual_seed(0), dtype=torch.float64)
    for beta1, beta2 in ((0.2, 0.9), (0.0, 0.5), (0.9, 0.9)):
        first = scores = torch.full((6,), 1 / 6, dtype=torch.float64)
        for now, loss in enumerate(losses):
            past = [(1 - beta2) * beta2 ** (now - 1 - then) * losses[then] for then in range(now)]
            before = beta2**now * first + sum(past)
            weights, scores = evolved_sampling.evolve(scores, loss, beta1, beta2)
            assert torch.allclose(weights, beta1 * before + (1 - beta1) * loss)
            assert torch.allclose(scores, beta2 * before + (1 - beta2) * loss)
            assert torch.allclose(weights, scores + (beta2 - beta1) * (loss - before))


def test_evolved_sampling_trains_uniformly_first_and_last_and_charges_a_pass_over_the_pool_between(workload):
    uniform, peer = (bench_of(workload, name) for name in ("uniform", "evolved-sampling"))
    for share in (0.0, 0.049, 0.95, 1.0):
        rows_of(*uniform, 1, share)
        (row,) = rows_of(*peer, 1, share)
        assert (row["candidates"], row["scored"], row["trained"]) == (8, 0, 8)
    for ours, theirs in zip(uniform[0].model.parameters(), peer[0].model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    (row,) = rows_of(*peer, 1, 0.05)
    assert (row["candidates"], row["scored"], row["trained"]) == (16, 16, 8)
    assert charges_ms(row, ARMS["evolved-sampling"], peer[0].settings, MEDIANS_MS)["score"] == 5.0
    late = bench_of(workload, "evolved-sampling", select_after=0.5)
    assert [rows_of(*late, 1, share)[0]["scored"] for share in (0.1, 0.49, 0.5)] == [0, 0, 16]


def test_evolved_sampling_remembers_the_score_of_every_sample_from_one_pool_that_holds_it_to_the_next(
    workload, monkeypatch
):
    """Twin: a dict of scores."""
    remembered, evolve = dict.fromkeys(range(60), 1 / 60), evolved_sampling.evolve
    bench, step = bench_of(workload, "evolved-sampling", batch=2)  # 60 is a multiple of a pool's 4

    def spy(scores, losses, *betas):
        assert betas == (0.2, 0.9)
        ids = bench.stream.ids(bench.position - 4, 4).tolist()
        assert scores.tolist() == pytest.approx([remembered[sample] for sample in ids])
        remembered.update({i: 0.9 * remembered[i] + 0.1 * loss for i, loss in zip(ids, losses.tolist(), strict=True)})
        return evolve(scores, losses, *betas)

    monkeypatch.setattr(evolved_sampling, "evolve", spy)
    rows_of(bench, step, 40)
    assert min(remembered.values()) > 1 / 60


def test_evolved_sampling_draws_in_proportion_to_the_losses_of_a_model_that_stays(workload):
    """Scores then grow towards the losses, and weights from 0.8 of the losses to all of them."""
    bench, step = bench_of(workload, "evolved-sampling", learning_rate=1e-9, keep=0.25)
    with torch.no_grad():  # losses that differ much
        for parameter in bench.model.parameters():
            parameter.mul_(3)
    losses = scorers.exact_loss(bench.model, workload.samples.train)
    taken, loss = [], bench.loss
    bench.loss = lambda batch, weights=None: taken.append((batch["input_ids"], weights)) or loss(batch, weights)
    rows_of(bench, step, 400)
    seen = torch.bincount(bench.stream.ids(0, bench.position), minlength=60)
    kept = torch.zeros(60)
    for inputs, weights in taken:
        assert weights is None
        assert len(inputs) == 8
        for row in inputs:
            kept[(workload.samples.train["input_ids"] == row).all(dim=1)] += 1
    expected = torch.zeros(60)
    for ids in bench.stream.ids(0, bench.position).split(32):
        expected.index_add_(0, ids, selectors.inclusion_probabilities(losses[ids], 8, 1e-3).float())
    assert losses.max() > 3 * losses.min()
    assert torch.corrcoef(torch.stack([kept / seen, expected / seen]))[0, 1] > 0.95
    assert torch.allclose(kept / seen, expected / seen, atol=0.15)


def features_by_counting(samples, length, text):
    """One sample at a time, with Python's own counts; rare are tokens that with all rarer ones make up a tenth."""
    counts = collections.Counter(token for sample in text for token in sample)
    total, rare, so_far = sum(counts.values()), set(), 0
    for token in sorted(counts, key=lambda token: (counts[token], token)):
        so_far += counts[token]
        if so_far <= total / 10:
            rare.add(token)
    return [
        [
            1.0,
            statistics.fmean(math.log(counts[token] / total) for token in sample),
            len(sample) / length,
            len(set(sample)) / len(sample),
            sum(token in rare for token in sample) / len(sample),
        ]
        for sample in samples
    ]


def test_token_features_are_those_of_counting_and_know_no_padding():
    """The padding has the largest id, which no text holds."""
    generator = Generator().manual_seed(0)
    text = [[int(40 * u**3) for u in torch.rand(3 + n % 10, generator=generator)] for n in range(50)]
    tokens = torch.tensor([sample + [40] * (12 - len(sample)) for sample in text])
    real = torch.tensor([[1] * len(sample) + [0] * (12 - len(sample)) for sample in text])
    train = {"input_ids": tokens, "attention_mask": real}
    vocabulary = predictive_batch.vocabulary_of(*predictive_batch.tokens_of(train))
    ids = torch.tensor([7, 3, 49])
    ours = predictive_batch.token_features(*predictive_batch.tokens_of(train, ids), vocabulary)
    slow = torch.tensor(features_by_counting([text[n] for n in ids], 12, text), dtype=torch.float64)
    assert torch.allclose(ours, slow)
    assert 0 < slow[:, 4].max() < 1
    whole = predictive_batch.tokens_of({"input_ids": tokens.short()}, ids)
    assert whole[0].dtype == torch.int64
    assert whole[1].all()


@pytest.mark.parametrize("batches", [1, 2, 40])
def test_predicted_losses_are_those_of_weighted_least_squares_over_all_batches(batches):
    """Twin: all rows so far, each weighted by its age, with the ridge as five more rows."""
    generator = Generator().manual_seed(0)
    moments, rows, losses = predictive_batch.no_moments(), [], []
    for _ in range(batches):
        features = torch.rand(8, 5, generator=generator, dtype=torch.float64)
        features[:, 2] = features[:, 0] = 1.0  # samples of one length
        loss = torch.rand(8, generator=generator)
        moments = predictive_batch.learn(moments, features, loss)
        rows, losses = [*rows, features], [*losses, loss.double()]
    weights = [0.99 ** ((batches - 1 - n) / 2) for n in range(batches)]
    stacked = torch.cat([*(w * x for w, x in zip(weights, rows, strict=True)), 1e-3**0.5 * torch.eye(5).double()])
    targets = torch.cat([*(w * y for w, y in zip(weights, losses, strict=True)), torch.zeros(5).double()])
    slow = rows[0] @ torch.linalg.lstsq(stacked, targets[:, None]).solution.squeeze(1)
    assert torch.allclose(predictive_batch.predict(rows[0], moments), slow, atol=1e-6)


def test_predictive_batches_know_nothing_at_first_and_learn_which_samples_are_hard(workload):
    """Labels that no model can learn go with long samples; the labels of the short ones are all alike."""
    generator = Generator().manual_seed(0)
    inputs, lengths = torch.randint(3, 100, (600, 8), generator=generator), torch.tensor([3, 8]).repeat(300)
    real = (torch.arange(8) < lengths[:, None]).long()
    labels = torch.randint(2, (600,), generator=generator) * (lengths == 8)
    rows = {"input_ids": inputs * real, "attention_mask": real, "labels": labels}
    mixed = replace(workload, samples=Samples(rows, workload.samples.validation, workload.samples.prepare))
    bench, step = bench_of(mixed, "predictive-batch", learning_rate=1e-3, select_after=0.5)
    taken, predict = [], bench.predict
    bench.predict = lambda batch: taken.append(batch) or predict(batch)
    (first,) = rows_of(bench, step, 1)
    assert torch.equal(taken[0]["input_ids"], bench.stream.take(torch.arange(8))["input_ids"])
    rows_of(bench, step, 60, share=0.4)
    taken.clear()
    last = rows_of(bench, step, 10)
    assert {(row["candidates"], row["scored"], row["trained"]) for row in last} == {(16, 16, 8)}
    assert first["scored"] == 16
    assert torch.cat([batch["attention_mask"] for batch in taken]).sum(dim=1).double().mean() > 7
    charges = charges_ms(last[0], ARMS["predictive-batch"], bench.settings, MEDIANS_MS)
    assert charges == {"train": 9.0, "read": 2.0, "score": 0.5}


def test_predictive_batches_train_uniformly_and_score_nothing_before_their_share_of_the_budget(workload):
    uniform, peer = (bench_of(workload, name, select_after=0.5) for name in ("uniform", "predictive-batch"))
    rows_of(*uniform, 3, 0.4)
    assert [row["scored"] for row in rows_of(*peer, 3, 0.4)] == [0, 0, 0]
    for ours, theirs in zip(uniform[0].model.parameters(), peer[0].model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("name", ["stale-selective-backprop", "evolved-sampling", "predictive-batch"])
def test_two_runs_of_a_peer_are_equal_and_leave_the_global_generator_alone(name, workload):
    before, models = torch.get_rng_state(), []
    for _ in range(2):
        bench, step = bench_of(workload, name)
        bench.model.eval()  # dropout draws from the global generator
        rows_of(bench, step, 20)
        models.append(bench.model.state_dict())
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(models[0][key], models[1][key]) for key in models[0])


@pytest.mark.parametrize(
    ("arm", "task", "runs"),
    [("predictive-batch", "image", False), ("predictive-batch", "causal_lm", True), ("visible", "causal_lm", False)],
)
def test_an_arm_of_some_tasks_is_refused_on_others_by_its_name(arm, task, runs):
    if runs:
        assert Settings(arms=("uniform", arm), task=task).arms == ("uniform", arm)
    else:
        with pytest.raises(ValueError, match=f"The arm '{arm}' runs on masked_lm.* only.*the task is {task}"):
            Settings(arms=("uniform", arm), task=task)


def test_infobatch_shows_everything_once_then_skips_samples_and_at_last_none(workload):
    bench, step = bench_of(workload, "infobatch")
    assert sorted(ids_of_an_epoch(bench, step, 0.1)) == list(range(60))
    second = ids_of_an_epoch(bench, step, 0.2)
    assert len(second) == len(set(second))
    assert 30 < len(second) + 8 < 60  # some of its first samples were taken together with the last of the epoch before
    ids_of_an_epoch(bench, step, 0.9)
    assert len(ids_of_an_epoch(bench, step, 0.9)) >= 52


def test_importance_sampling_reads_a_pool_only_while_the_variance_reduction_is_large(workload):
    for threshold, pools in ((0.0, True), (1e9, False)):
        bench, _ = bench_of(workload, "grad-norm")
        rows = rows_of(bench, grad_norm.steps(bench, threshold=threshold), 5)[1:]
        assert {row["candidates"] for row in rows} == {24 if pools else 8}
        assert [row.get("scored", 0) for row in rows] == [24 * pools] * 4
        assert all(row["trained"] == 8 for row in rows)
        assert all(row["tau"] > 0 for row in rows)


def test_importance_sampling_starts_as_uniform_training(workload):
    uniform, peer = (bench_of(workload, name) for name in ("uniform", "grad-norm"))
    rows_of(*uniform, 3)
    rows_of(*peer, 3)
    for ours, theirs in zip(uniform[0].model.parameters(), peer[0].model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-6)


def test_reference_of_rho_loss_is_charged_and_sees_what_the_arm_does_not(workload):
    bench, step = bench_of(workload, "rho-loss", batch=4)
    assert bench.upfront_ms == {"reference model": pytest.approx(200.0)}
    assert bench.stream.epoch == 48  # a fifth of the 60 is held out
    first, second, third = rows_of(bench, step, 3)
    assert first["candidates"] == first["scored"] == 40
    assert first["reference_scored"] == 40
    assert 8 <= second["reference_scored"] <= 16  # the other 8, which may come twice, in two epochs
    assert third["reference_scored"] == 0
    assert first["trained"] == 4


def test_rho_loss_scores_augmented_samples_by_the_reference_each_time_they_are_read(workload):
    bench, step = bench_of(workload, "rho-loss", task="image", augmented=True, batch=4)
    assert [row["reference_scored"] for row in rows_of(bench, step, 4)] == [40] * 4


def test_rho_loss_keeps_what_can_be_learned_where_exact_losses_keep_wrong_labels(workload):
    """A third of the labels is wrong. What the reference has learned tells them apart, a large loss alone does not."""
    generator = Generator().manual_seed(1)
    words = torch.randint(3, 13, (600, 1), generator=generator)
    wrong = torch.rand(600, generator=generator) < 0.33
    rows = {"input_ids": words.expand(-1, 4).contiguous(), "labels": ((words[:, 0] > 7) ^ wrong).long()}
    noisy = replace(workload, samples=Samples(rows, workload.samples.validation, workload.samples.prepare))
    share_wrong = {}
    for arm in ("exact", "rho-loss"):
        bench, step = bench_of(noisy, arm, batch=8, budget=10.0, learning_rate=1e-3)
        taken = []
        loss = bench.loss
        bench.loss = lambda batch, weights=None, loss=loss, taken=taken: taken.append(batch) or loss(batch, weights)
        rows_of(bench, step, 10)
        labels = torch.cat([batch["labels"] for batch in taken])
        words_of = torch.cat([batch["input_ids"][:, 0] for batch in taken])
        share_wrong[arm] = ((words_of > 7) != labels.bool()).double().mean().item()
    assert share_wrong["rho-loss"] < 0.1 < 0.25 < share_wrong["exact"]


def test_the_price_of_rho_loss_is_for_its_own_pool_of_ten_batches(workload):
    bench, step = bench_of(workload, "rho-loss", batch=4)
    scoring = ARMS["rho-loss"].scoring
    assert scoring.pool(bench.settings) == 40
    assert ARMS["exact"].scoring.pool(bench.settings) == 8
    (row,) = rows_of(bench, step, 1)
    assert charges_ms(row, ARMS["rho-loss"], bench.settings, MEDIANS_MS) == {
        "train": 9.0,
        "read": 10.0,
        "score": 25.0,
        "reference model": 25.0,
    }
    assert step_times_ms(row, ARMS["rho-loss"], bench.settings)["rho_loss"] == row["score_ms"]
    position = bench.position
    scoring.prepare(bench)()
    assert bench.position - position == 40


def test_every_arm_names_its_paper_and_its_operations_by_their_own_names():
    assert all(arm.source is None or "arXiv" in arm.source for arm in ARMS.values())
    settings = Settings(layers=12)
    operations = {operation.name: operation for arm in ARMS.values() for operation in arm.operations(settings)}
    for arm in ARMS.values():
        for operation in arm.operations(settings):
            assert operation.kind == operations[operation.name].kind
            assert operation.pool(settings) == operations[operation.name].pool(settings)


# What docs/extending.md tells: one file adds a peer.

EASIEST = '''
"""Keeps the easiest candidates, as self-paced learning does."""

from earlysift.compare.arm import Arm, Operation


def select(bench, pool):
    """The batch of the smallest losses."""
    from earlysift import pools, scorers, selectors  # here: they import torch, for which --help should not wait

    losses = scorers.exact_loss(bench.model, pool, chunk_rows=bench.settings.batch)
    return pools.take(pool, selectors.greedy(-losses, bench.settings.batch).indices)


def steps(bench):
    """Called once per seed; what it returns is called for every step, with the share of the budget that is spent."""

    def step(share):
        pool = bench.read(bench.settings.pool)
        with bench.ledger.timed("score"):
            batch = select(bench, pool)
        with bench.ledger.timed("train"):
            bench.update(bench.loss(batch))
        bench.ledger.note(candidates=bench.settings.pool, scored=bench.settings.pool, trained=bench.settings.batch)

    return step


def scoring(bench):
    """What is timed before the run: scoring one pool."""
    pool = bench.read(bench.settings.pool)
    return lambda: select(bench, pool)


ARM = Arm(
    "easiest",
    "keeps the candidates with the smallest loss under the full model",
    steps,
    scoring=Operation("easiest", "score", scoring),
)
'''
PROGRAM = """
import sys
from earlysift.compare import peers
peers.__path__.append(sys.argv.pop(1))
from earlysift.compare.arms import ARMS
assert "torch" not in sys.modules, "help must not wait for torch"
from earlysift.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_one_file_adds_a_peer(tmp_path):
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "easiest_first.py").write_text(EASIEST)
    command = [sys.executable, "-c", PROGRAM, str(tmp_path / "peers"), "compare", "--arms", "uniform,easiest-first"]
    command += ["--task", "image", "--out", str(tmp_path / "out"), "--evaluations", "2", "--validation-samples", "16"]
    command += ["--batch", "4", "--layers", "2", "--width", "32", "--budget", "0.1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["operations_ms"]) == {"read_batch", "train", "read_pool", "easiest"}
    (run,) = results["arms"]["easiest-first"]["runs"]
    assert run["finished"]
    assert run["spent_s"]["score"] > 0
    assert results["operations_ms"]["easiest"]["count"] == run["steps"]
    assert len(EASIEST.strip().splitlines()) <= 40


def test_every_file_of_peers_is_an_arm_of_its_name():
    files = {path.stem.replace("_", "-") for path in Path(peers.__file__).parent.glob("*.py")} - {"--init--"}
    assert {"rho-loss", "rs2", "visible"} < files <= ARMS.keys()


def test_the_page_compares_every_peer_with_its_claim_in_numbers_that_the_results_page_has():
    docs = Path(__file__).parents[1] / "docs"
    section = (docs / "compare.md").read_text(encoding="utf-8").split("## What peers claim")[1]
    rows = {row.split("`")[1]: row.split("|")[1:-1] for row in section.splitlines() if "arXiv" in row}
    papers = {path.stem.replace("_", "-") for path in Path(peers.__file__).parent.glob("*.py")} - {
        "--init--",
        "visible",
    }
    assert rows.keys() == papers | {"sift"}
    results = (docs / "results.md").read_text(encoding="utf-8")
    for name, (peer, _, here, _) in rows.items():
        assert ARMS[name].source.split(", ")[-1] in peer
        assert ("not run yet" in here) == (f"\n| {ARMS[name].label} |" not in results)
        for number in re.findall(r"[-+]?\d+\.\d+ \([^)]* to [^)]*\)", here):
            assert any(
                line.startswith(f"| {ARMS[name].label} |") and number in line for line in results.splitlines()
            ), number


def test_candidates_that_an_arm_scores_without_a_price_are_refused():
    row = {"candidates": 8, "scored": 8, "train_ms": 1.0}
    with pytest.raises(ValueError, match="'InfoBatch' scores candidates, but its row has no scoring"):
        charges_ms(row, ARMS["infobatch"], Settings(batch=8), MEDIANS_MS)
