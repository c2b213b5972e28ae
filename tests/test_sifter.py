"""The sifter: same picks wherever a run is cut, clear words about bad input, and no state changed by it."""

import copy
import functools
import io
import json
import logging
import math
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn

import earlysift
import models
from earlysift import (
    ExitHead,
    Family,
    Ledger,
    Sifter,
    anneal,
    constant,
    costs,
    pending,
    probes,
    scorers,
    selectors,
    warmup,
)
from earlysift.anatomy import find_anatomy
from earlysift.control import Control
from earlysift.fidelity import fidelity
from earlysift.judging import Unusable
from earlysift.losses import labelled_positions
from earlysift.measures import ENTROPY, MARGIN
from earlysift.progress import STATE_VERSION
from earlysift.selectors import Selection, greedy, percentile, proportional
from models import LAYERS, WIDTH, build, loss_of, row_of
from processes import on_ranks

INF, NAN = float("inf"), float("nan")
COSTS = {"train": 100.0, "probe": 60.0, "score_1": 1.0, "score_2": 2.0, "score_3": 3.0}


def pools_for(model, count, rows=8, length=10, seed=7):
    generator = Generator().manual_seed(seed)
    return [models.batch_for(model, models.task_of(model), rows, length, generator) for _ in range(count)]


def features(rows=8, seed=0):
    """A pool of features in which single candidates can be broken."""
    generator = Generator().manual_seed(seed)
    return torch.randn(rows, 6, WIDTH, generator=generator), torch.randint(models.CLASSES, (rows,), generator=generator)


def classifier(**options):
    model = build("plain", "sequence_classification", **options)
    return model, row_of(model)


def sifter_of(model, **options):
    return Sifter(model, **{"keep": 0.5, "family": row_of(model), "dtype": None, "probe_every": 0} | options)


def values(state):
    """A state dict as comparable values."""
    if isinstance(state, torch.Tensor):
        return repr(state.tolist())  # nan is nan
    if isinstance(state, dict):
        return {key: values(value) for key, value in state.items()}
    return [values(value) for value in state] if isinstance(state, list | tuple) else state


def picks(sifter, pools):
    chosen = []
    for pool in pools:
        sifter.sift(pool)
        chosen.append(sifter.selection.indices.tolist())
    return chosen


# What comes out


def test_kept_are_those_with_the_largest_exit_losses():
    for family, task in (("bert", "masked_lm"), ("llama", "causal_lm"), ("gpt2", "sequence_classification")):
        model = build(family, task)
        (pool,) = pools_for(model, 1)
        sifter = sifter_of(model, depth=2)
        batch = sifter.sift(pool)
        scores = scorers.early_exit_loss(model, pool, depth=2, dtype=None)
        kept = scores.argsort(descending=True)[:4].sort().values
        assert torch.equal(sifter.selection.indices, kept)
        assert list(batch) == list(pool)
        assert all(torch.equal(batch[key], pool[key][kept]) for key in pool)
        assert sifter.weights.tolist() == [1.0] * 4


@pytest.mark.parametrize("kept", [1, 3, 8])
def test_the_number_kept_may_be_given(kept):
    model, _ = classifier()
    sifter = sifter_of(model, kept=kept)
    assert [len(sifter.sift(features(rows))[1]) for rows in (8, 20)] == [kept] * 2
    with pytest.raises(
        ValueError, match=r"at least 9 candidates \(the number kept\) in the first pool, got 8\. Use a l"
    ):
        sifter_of(model, kept=9).sift(features(8))
    with pytest.raises(ValueError, match=r"kept must be at least 1, got 0\. It is the number of candidates trained on"):
        sifter_of(model, kept=0)


@pytest.mark.parametrize(("keep", "kept"), [(0.5, 4), (0.1, 1), (0.01, 1), (0.74, 6), (0.999, 8), (1.0, 8), (1, 8)])
def test_the_number_kept_is_the_share_of_the_first_pool(keep, kept):
    model, _ = classifier()
    sifter = sifter_of(model, keep=keep)
    assert len(sifter.sift(features(8))[1]) == kept
    if keep < 1:
        assert len(sifter.sift(features(11))[1]) == kept  # static shapes, whatever comes later


@pytest.mark.parametrize("reads", [False, True])
def test_a_loop_that_draws_in_proportion_and_reads_no_weights_is_warned_once(reads, caplog):
    caplog.set_level(logging.WARNING, logger="earlysift")
    model, _ = classifier()
    sifter = sifter_of(model, select=proportional)
    for number in range(6):
        sifter.sift(features(16), micro_step=number % 2)
        if reads:
            assert len(sifter.weights) == 8
    assert caplog.text.count("nobody has read their weights") == (not reads)


def test_weights_are_those_of_the_latest_batch():
    model, _ = classifier()
    sifter = sifter_of(model, select=proportional)
    with pytest.raises(ValueError, match="no weights before the first call of sift"):
        _ = sifter.weights
    pool = features(16)
    batch = sifter.sift(pool)
    assert sifter.weights.shape == (8,)
    assert sifter.weights.dtype == torch.float32
    assert len(set(sifter.weights.tolist())) > 1
    assert 0.5 - 1e-6 <= sifter.weights.min() <= sifter.weights.max() <= 5 + 1e-6
    scorers.training_loss(model, batch, family=row_of(model), weights=sifter.weights).backward()
    everything = sifter_of(model, keep=1.0)
    everything.sift(pool)
    assert everything.weights.tolist() == [1.0] * 16


def test_weighted_batches_are_unbiased_over_steps():
    model, row = classifier()
    pool = features(12)
    exact = scorers.exact_loss(model, pool, family=row, dtype=None)
    sifter = sifter_of(model, select=proportional, keep=0.34, score=lambda model, pool: exact)
    values = torch.linspace(-1, 2, 12)
    means = []
    for _ in range(400):
        sifter.sift(pool)
        means.append((sifter.weights * values[sifter.selection.indices]).mean())
    means = torch.stack(means)
    assert (means.mean() - values.mean()).abs() <= 4 * means.std() / 20


def test_trimmed_batches_are_as_long_as_their_longest_row_and_train():
    model = build("bert", "masked_lm")
    (pool,) = pools_for(model, 1, length=12)
    pool["attention_mask"][:, 9:] = 0
    pool["labels"][:, 9:] = -100
    batch = sifter_of(model, trim=True).sift(pool)
    assert batch["input_ids"].shape == batch["labels"].shape == (4, int(batch["attention_mask"].sum(dim=1).max()))
    assert batch["input_ids"].size(1) <= 9
    loss_of(model, batch).backward()


def test_outliers_are_taken_out_of_candidacy():
    model, row = classifier()
    pool = features(16)
    order = scorers.early_exit_loss(model, pool, family=row, dtype=None).argsort(descending=True)
    sifter = sifter_of(model, keep=0.25, drop_outliers=0.125)
    sifter.sift(pool)
    assert set(sifter.selection.indices.tolist()) == set(order[2:6].tolist())


# Scores


@pytest.mark.parametrize(
    ("score", "scorer"),
    [
        ("loss", lambda model, pool: scorers.early_exit_loss(model, pool, depth=2, family=row_of(model), dtype=None)),
        (
            "entropy",
            lambda model, pool: scorers.at_exit(ENTROPY, 2)(model, pool, family=row_of(model), dtype=None),
        ),
        ("margin", lambda model, pool: scorers.at_exit(MARGIN, 2)(model, pool, family=row_of(model), dtype=None)),
        ("exact", lambda model, pool: scorers.exact_loss(model, pool, family=row_of(model), dtype=None)),
    ],
)
@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("plain", "causal_lm")])
def test_scores_by_name_and_by_callable_pick_alike(family, task, score, scorer):
    model = build(family, task)
    pools = pools_for(model, 3, rows=20)
    by_name = picks(sifter_of(model, depth=2, score=score), pools)
    assert by_name == picks(sifter_of(model, depth=2, score=scorer), pools)
    assert by_name != picks(sifter_of(model, score="uniform"), pools)


def test_a_lambda_is_a_full_citizen_with_any_model_and_without_labels():
    model = nn.Linear(3, 1)
    pool = {"x": torch.arange(24.0).reshape(8, 3)}
    sifter = Sifter(model, keep=0.5, score=lambda model, pool: -pool["x"][:, 0])
    assert sifter.sift(pool)["x"][:, 0].tolist() == [0, 3, 6, 9]
    known = build("bert", "masked_lm")
    tokens = {"input_ids": torch.randint(3, 100, (8, 6), generator=Generator().manual_seed(0))}
    sifter = Sifter(known, keep=0.5, score=lambda model, pool: pool["input_ids"][:, 0].float(), probe_every=1)
    kept = sifter.sift(tokens)["input_ids"][:, 0]
    assert sorted(kept.tolist()) == sorted(tokens["input_ids"][:, 0].tolist())[4:]


def test_a_lambda_may_return_whole_numbers_and_scores_with_gradients():
    model = nn.Linear(3, 1)
    pool = {"x": torch.arange(24.0).reshape(8, 3), "labels": torch.arange(8)}
    sifter = Sifter(model, score=lambda model, pool: model(pool["x"])[:, 0] * 0 + pool["labels"])
    assert sifter.sift(pool)["labels"].tolist() == [4, 5, 6, 7]
    assert not sifter.weights.requires_grad
    sifter = Sifter(model, score=lambda model, pool: pool["labels"])
    assert sifter.sift(pool)["labels"].tolist() == [4, 5, 6, 7]


def test_a_lambda_selector_is_a_full_citizen():
    model, _ = classifier()
    last = lambda scores, kept, generator: Selection(  # noqa: E731
        torch.arange(len(scores) - kept, len(scores)), torch.full((kept,), 0.5)
    )
    sifter = sifter_of(model, select=last)
    sifter.sift(features(8))
    assert sifter.selection.indices.tolist() == [4, 5, 6, 7]
    assert sifter.weights.tolist() == [0.5] * 4


@pytest.mark.parametrize("seed", [0, 1])
def test_scores_in_chunks_of_any_size_pick_alike(seed):
    model = build("bert", "masked_lm")
    pools = pools_for(model, 2, rows=12, seed=seed)
    chosen = [picks(sifter_of(model, chunk_rows=rows), pools) for rows in (None, 1, 5, 100)]
    assert chosen == [chosen[0]] * 4


class Full(nn.Module):
    """A layer with memory for few rows at once, while it scores."""

    def __init__(self, layer, rows):
        super().__init__()
        self.layer, self.rows, self.failed = layer, rows, []

    def forward(self, states, *inputs, **options):
        if not self.training and len(states) > self.rows:
            self.failed.append(len(states))
            raise torch.OutOfMemoryError(f"Tried to allocate {len(states)} rows")
        return self.layer(states, *inputs, **options)


def with_memory_for(rows, family=("bert", "masked_lm")):
    model = build(*family)
    layers = find_anatomy(model).layers
    layers[0] = Full(layers[0], rows)
    return model


SCORED = {
    "loss": {"probe_every": 2},
    "exact": {},
    "entropy": {"trim": True},
    "probe": {},
    "blend": {},
}


@pytest.mark.parametrize("score", SCORED)
def test_s22_where_memory_does_not_suffice_scoring_halves_its_chunks_says_so_and_goes_on(score, caplog):
    options = {"score": score} | SCORED[score]
    pools = pools_for(build("bert", "masked_lm"), 3, rows=12)
    model = with_memory_for(3)
    sifter = sifter_of(model, **options)
    chosen = picks(sifter, pools)
    halved = [6] if score == "exact" else [12, 6]  # once each, of three pools
    assert find_anatomy(model).layers[0].failed == halved
    assert [record.getMessage() for record in caplog.records] == [
        f"Scoring {rows} candidates at once runs out of memory; from now on {rows // 2} run at once. Set "
        f"chunk_rows={rows // 2} to begin so."
        for rows in halved
    ]
    begun_so = sifter_of(with_memory_for(12), chunk_rows=3, **options)
    assert picks(begun_so, pools) == chosen
    assert values(begun_so.state_dict()) == values(sifter.state_dict())
    if score not in ("probe", "blend"):  # which learn from the first rows of a chunk
        assert picks(sifter_of(with_memory_for(12), **options), pools) == chosen


def test_s22_a_probe_of_auto_mode_halves_its_chunks():
    options = {"mode": "auto", "control": Control(probe_share=0.2, reference_costs=COSTS)}
    model = with_memory_for(3)
    (pool,) = pools_for(model, 1, rows=12)
    found = sifter_of(model, **options).probe(pool)
    assert find_anatomy(model).layers[0].failed == [6]
    assert found == sifter_of(with_memory_for(12), chunk_rows=3, **options).probe(pool)


def test_s22_what_does_not_fit_even_alone_is_an_error_and_leaves_the_sifter_as_it_was():
    model = with_memory_for(2)
    sifter = sifter_of(model)
    (pool,) = pools_for(model, 1)
    sifter.sift(pool)
    find_anatomy(model).layers[0].rows = 0
    before = values(sifter.state_dict())
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate 1 rows"):
        sifter.sift(pool)
    assert values(sifter.state_dict()) == before
    find_anatomy(model).layers[0].rows = 1
    sifter.sift(pool)
    assert sifter.step == 2


def test_s22_a_scorer_of_the_users_own_is_not_tried_again():
    model, calls = build("bert", "masked_lm"), []

    def scorer(model, pool):
        calls.append(1)
        raise torch.OutOfMemoryError("Tried to allocate 1 GiB")

    with pytest.raises(torch.OutOfMemoryError):
        sifter_of(model, score=scorer).sift(*pools_for(model, 1))
    assert len(calls) == 1


@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("llama", "causal_lm")])
def test_few_positions_pick_by_a_cheaper_score_and_the_ledger_says_so(family, task):
    model = build(family, task)
    (pool,) = pools_for(model, 1)
    pool["labels"] = torch.where(pool["labels"] == -100, 5, pool["labels"])  # all of them
    sifters = {most: sifter_of(model, max_positions=most, probe_every=0, ledger=Ledger()) for most in (None, 2)}
    flops = {}
    for most, sifter in sifters.items():
        sifter.sift(pool)
        scores = scorers.early_exit_loss(model, pool, max_positions=most, chunk_rows=4, dtype=None)
        assert sorted(sifter.selection.indices.tolist()) == sorted(scores.topk(4).indices.tolist())
        flops[most] = sifter.ledger.end()["scored_flops"]
    positions = labelled_positions(pool["labels"], causal=task == "causal_lm").size(1)
    head = costs.flops_law(find_anatomy(model), 1, skips_unlabelled=True).head
    assert flops[None] - flops[2] == pytest.approx(2 * head * 8 * (positions - 2))


# Schedules


def test_uniform_steps_of_a_warm_up_score_nothing():
    model = build("bert", "masked_lm")
    calls = []
    handle = model.bert.encoder.layer[0].register_forward_hook(lambda *_: calls.append(1))
    ledger = Ledger()
    sifter = sifter_of(model, schedule=warmup(3), ledger=ledger, exit_head=ExitHead(WIDTH))
    pools = pools_for(model, 5, rows=20)
    sifter.sift(pools[0])
    calls.clear()  # the first pool also runs the check of the model
    for pool in pools[1:3]:
        sifter.sift(pool)
    assert calls == []
    assert sifter.stats()["sift/scored"] == 0
    assert ledger.times_ms("score") == []
    for pool in pools[3:]:
        sifter.sift(pool)
    assert len(calls) == 2  # two steps, twice the number kept at a time
    assert sifter.stats()["sift/scored"] == 40
    assert len(ledger.times_ms("score")) == 2
    handle.remove()


def test_steps_that_do_not_select_are_uniform_and_differ_from_each_other():
    model, _ = classifier()
    pool = features(40)
    chosen = picks(sifter_of(model, schedule=constant(0.0)), [pool] * 200)
    counts = torch.zeros(40)
    for indices in chosen:
        assert len(set(indices)) == 20
        counts[indices] += 1
    assert len({tuple(indices) for indices in chosen}) == 200
    assert (counts / 200 - 0.5).abs().max() < 4 * (0.25 / 200) ** 0.5


@pytest.mark.parametrize("intensity", [0.0, 0.3, 1.0])
def test_intensity_is_the_share_of_steps_that_select(intensity):
    model, row = classifier()
    pool = features(20)
    greedily = greedy(scorers.early_exit_loss(model, pool, family=row, dtype=None), 10).indices.tolist()
    chosen = picks(sifter_of(model, schedule=constant(intensity)), [pool] * 300)
    share = sum(indices == greedily for indices in chosen) / 300
    assert abs(share - intensity) <= 4 * (0.25 / 300) ** 0.5 * (0 < intensity < 1)


# Probes


def test_probes_measure_fidelity_when_due():
    model = build("bert", "masked_lm")
    ledger = Ledger()
    sifter = sifter_of(model, probe_every=2, ledger=ledger)
    pools = pools_for(model, 4, rows=20)
    seen = []
    for pool in pools:
        sifter.sift(pool)
        seen.append(
            {
                key[5:]: sifter.stats()[key]
                for key in sifter.stats()
                if key[5:] in ("rank_correlation", "overlap", "gain")
            }
        )
    for step in (0, 2):
        scores = scorers.early_exit_loss(model, pools[step], dtype=None)
        exact = scorers.exact_loss(model, pools[step], dtype=None)
        assert seen[step] == pytest.approx(fidelity(scores, exact, 10), abs=1e-6)
        assert seen[step + 1] == seen[step]
        assert -1 < seen[step]["rank_correlation"] < 1
        assert 0 < seen[step]["overlap"] <= 1
        assert seen[step]["gain"] > 0
    assert len(ledger.times_ms("probe")) == 2


def test_probes_of_exact_scores_are_perfect_and_of_reversed_ones_the_opposite():
    model, row = classifier()
    perfect, reversed_ = (
        sifter_of(
            model,
            probe_every=1,
            score=lambda model, pool, sign=sign: sign * scorers.exact_loss(model, pool, family=row, dtype=None),
        )
        for sign in (1, -1)
    )
    for sifter in (perfect, reversed_):
        sifter.sift(features(16))
    assert perfect.stats()["sift/rank_correlation"] == pytest.approx(1)
    assert perfect.stats()["sift/overlap"] == 1
    assert perfect.stats()["sift/gain"] > 1
    assert reversed_.stats()["sift/rank_correlation"] == pytest.approx(-1)
    assert reversed_.stats()["sift/overlap"] == 0
    assert reversed_.stats()["sift/gain"] < 1


def test_a_breakdown_of_fidelity_is_warned_about_once_each_time(caplog):
    model, row = classifier()
    signs = iter([1, -1, -1, 1, -1, -1, -1])

    def score(model, pool):
        return next(signs) * scorers.exact_loss(model, pool, family=row, dtype=None)

    sifter = sifter_of(model, probe_every=1, score=score)
    warned_at = []
    for step in range(7):
        before = len(caplog.records)
        sifter.sift(features(16))
        warned_at += [step] * (len(caplog.records) - before)
    assert warned_at == [2, 5]  # once is chance
    assert {record.name for record in caplog.records} == {"earlysift"}
    message = caplog.records[0].getMessage()
    assert message.startswith("step 2: the exit at depth 1 ranks at random or backwards (rank correlation -1.00)")
    assert message.endswith("Use mode='auto', train an ExitHead, or end selection by a schedule.")


@pytest.mark.parametrize("signs", [[-1, -1, 1, 1], [1, -1, 1, -1], [-1, 1, -1, 1]])
def test_neither_the_first_step_nor_a_single_probe_is_a_breakdown(signs, caplog):
    model, row = classifier()
    left = iter(signs)

    def score(model, pool):
        return next(left) * scorers.exact_loss(model, pool, family=row, dtype=None)

    sifter = sifter_of(model, probe_every=1, score=score)
    picks(sifter, [features(16)] * 4)
    assert sifter.stats()["sift/rank_correlation"] == pytest.approx(signs[-1])
    assert caplog.records == []


def test_no_probes_no_fidelity():
    model, _ = classifier()
    sifter = sifter_of(model, probe_every=0)
    picks(sifter, [features()] * 3)
    assert not any("gain" in key or "probe" in key for key in sifter.stats())


def test_stats_are_numbers_by_name():
    model = build("bert", "masked_lm")
    sifter = sifter_of(model, probe_every=1)
    picks(sifter, pools_for(model, 3))
    stats = sifter.stats()
    assert all(isinstance(value, float) and key.startswith("sift/") for key, value in stats.items())
    assert stats["sift/step"] == 3
    assert (stats["sift/candidates"], stats["sift/scored"], stats["sift/trained"]) == (24, 24, 12)
    assert (stats["sift/unlabelled"], stats["sift/non_finite"]) == (0, 0)
    assert {"sift/score_ms", "sift/select_ms", "sift/gather_ms", "sift/probe_ms"} <= set(stats)


def test_ledger_has_a_row_for_every_step_with_its_work(tmp_path):
    model = build("bert", "masked_lm")
    path = tmp_path / "steps.jsonl"
    sifter = sifter_of(model, ledger=Ledger(path), schedule=lambda step: step % 2, probe_every=0)
    pools = pools_for(model, 4)
    batches = [sifter.sift(pool) for pool in pools]
    sifter.ledger.end()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row, batch, scored in zip(rows, batches, (False, True, False, True), strict=True):
        assert (row["candidates"], row["trained"], row["trained_tokens"]) == (8, 4, batch["input_ids"].numel())
        assert ("scored_flops" in row) == ("score_ms" in row) == scored
        assert row["trained_flops"] > (row["scored_flops"] if scored else 0)


# Determinism and resuming


@pytest.mark.parametrize("select", [greedy, proportional, percentile])
def test_picks_are_the_same_for_a_seed_and_differ_between_seeds(select):
    model, _ = classifier()
    pools = [features(20, seed) for seed in range(6)]
    chosen = {
        seed: picks(sifter_of(model, select=select, seed=seed, schedule=constant(0.5)), pools) for seed in range(4)
    }
    for seed, indices in chosen.items():
        assert picks(sifter_of(model, select=select, seed=seed, schedule=constant(0.5)), pools) == indices
        assert all(indices != other for at, other in chosen.items() if at != seed)


def test_picks_of_a_step_do_not_depend_on_the_steps_before():
    model, _ = classifier()
    pools = [features(20, seed) for seed in range(4)]
    whole = sifter_of(model, select=proportional)
    all_picks = picks(whole, pools)
    late = sifter_of(model, select=proportional)
    state = late.state_dict()
    late.load_state_dict({**state, "step": 3, "kept": 10})
    assert picks(late, pools[3:]) == all_picks[3:]


def through_json(state):
    return json.loads(json.dumps(state))


def through_torch(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def rising(step):
    return min(1.0, 0.5 + 0.2 * step)


RUNS = {
    "greedy": {},
    "proportional": {"select": proportional},
    "schedule": {"schedule": anneal(2, 7, before=warmup(1)), "select": percentile},
    "warned": {"probe_every": 3, "drop_outliers": 0.1},
    "exit head": {"exit": True, "select": proportional, "probe_every": 2},
    "probe": {"score": "probe", "depth": 2},
    "blend": {"score": "blend", "explore": 0.3, "probe_every": 3},
    "keep": {"keep_schedule": rising, "explore": 0.5},
    "auto": {"mode": "auto", "control": Control(probe_share=0.5, reference_costs=COSTS)},
}


JSON = ("greedy", "proportional", "schedule", "warned")  # the others learn tensors


class Run:
    """A training run with dropout that can be saved and built anew from what was saved."""

    def __init__(self, exit=False, **options):
        self.model = build("bert", "masked_lm", dropout=0.1)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        if exit:
            head = ExitHead(WIDTH, hidden=8)
            options |= {"exit_head": head, "exit_optimizer": torch.optim.AdamW(head.parameters(), lr=1e-2)}
        self.sifter = sifter_of(self.model, **options)
        torch.manual_seed(11)
        self.trace = []

    def go(self, pools):
        for pool in pools:
            batch = self.sifter.sift(pool)
            loss = self.sifter.loss(batch)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.trace.append((self.sifter.selection.indices.tolist(), self.sifter.weights.tolist(), loss.item()))
        return self

    def save(self, through):
        users = copy.deepcopy((self.model.state_dict(), self.optimizer.state_dict(), torch.get_rng_state()))
        return through(self.sifter.state_dict()), users

    def load(self, saved):
        state, (weights, optimizer, random_state) = saved
        self.sifter.load_state_dict(state)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
        torch.set_rng_state(random_state)
        return self


@pytest.mark.parametrize("name", RUNS)
def test_a_run_cut_anywhere_goes_on_as_if_it_had_not_been(name):
    pools = pools_for(build("bert", "masked_lm"), 8, rows=12)
    pools[1]["labels"][0] = -100
    unbroken = Run(**RUNS[name]).go(pools)
    for cut in (0, 1, 3, 7):
        through = through_torch if cut % 2 or name not in JSON else through_json
        first = Run(**RUNS[name]).go(pools[:cut])
        saved = first.save(through)
        second = Run(**RUNS[name]).load(saved).go(pools[cut:])
        assert first.trace + second.trace == unbroken.trace
        assert values(second.sifter.state_dict()) == values(unbroken.sifter.state_dict())
        assert values(second.model.state_dict()) == values(unbroken.model.state_dict())


def test_state_is_small_and_json_without_an_exit_head():
    model, _ = classifier()
    sifter = sifter_of(model, probe_every=1)
    picks(sifter, [features()] * 3)
    state = sifter.state_dict()
    assert through_json(state) == state
    assert len(json.dumps(state)) < 2000
    assert state["version"] == STATE_VERSION
    assert state["step"] == 3


def test_saved_state_is_not_changed_by_going_on():
    model, _ = classifier()
    sifter = sifter_of(model, probe_every=1)
    sifter.sift(features())
    state = sifter.state_dict()
    before = copy.deepcopy(state)
    sifter.sift(features(seed=1))
    assert state == before
    sifter.load_state_dict(state)
    sifter.sift(features(seed=1))
    assert state == before


def with_exit_head():
    head = ExitHead(WIDTH, hidden=4)
    return {"exit_head": head, "exit_optimizer": torch.optim.AdamW(head.parameters(), lr=0.1)}


BROKEN_STATES = {
    "step is text": ({"step": "x"}, "step must be a whole number of at least 0, got 'x'"),
    "step is negative": ({"step": -1}, "step must be a whole number of at least 0, got -1"),
    "step is a fraction": ({"step": 1.5}, "step must be"),
    "step is true": ({"step": True}, "step must be"),
    "step is huge": ({"step": 10**400}, "step must be"),
    "step is a tensor": ({"step": torch.tensor([1, 2])}, "step must be"),
    "step is absent": ({"step": ...}, "it has no step"),
    "micro-step": ({"micro_step": -1}, "micro_step must be a whole number of at least 0, got -1"),
    "pools per step": ({"pools_per_step": 0}, "pools_per_step must be a whole number of at least 1, got 0"),
    "largest": ({"largest": None}, "largest must be a whole number of at least 0, got None"),
    "kept is text": ({"kept": "x"}, "kept must be at least 1 or None, got 'x'"),
    "kept is nothing": ({"kept": 0}, "kept must be"),
    "kept is a fraction": ({"kept": 2.0}, "kept must be"),
    "counts are absent": ({"counts": ...}, "it has no counts"),
    "counts are a list": ({"counts": [1, 2]}, "counts must be whole numbers of candidates, scored"),
    "a count is absent": ({"counts": {"candidates": 8}}, "counts must be"),
    "a count is negative": (
        {"counts": dict.fromkeys(("candidates", "scored", "trained", "unlabelled", "non_finite"), -1)},
        "counts must be",
    ),
    "fidelity is a number": ({"fidelity": 0.5}, "fidelity must be finite numbers of rank_correlation, overlap, gain"),
    "fidelity is nan": ({"fidelity": {"gain": NAN}}, "fidelity must be"),
    "fidelity of another name": ({"fidelity": {"accuracy": 0.5}}, "fidelity must be"),
    "weights read": ({"weights_read": 1}, "weights_read must be True or False, got 1"),
    "steering without auto": ({"steering": {}}, "steering must be None in fixed mode"),
    "no config": ({"config": ...}, "it has no config"),
    "config is text": ({"config": "keep"}, "config must be the settings of a Sifter"),
    "config holds what is no setting": ({"config": {"keep": torch.ones(3)}}, "config must be"),
    "exit head is absent": ({"exit_head": ...}, "it has no exit_head"),
    "exit head is a list": ({"exit_head": []}, "exit_head must hold norm.weight"),
    "exit head lacks a tensor": ({"exit_head": {"norm.weight": torch.ones(WIDTH)}}, "exit_head must hold"),
    "exit head of other shapes": ("narrow", r"exit_head's norm.weight must be a tensor of torch.float32 \(32,\)"),
    "exit optimizer is absent": ({"exit_optimizer": ...}, "it has no exit_optimizer"),
    "exit optimizer is text": ({"exit_optimizer": "adam"}, "exit_optimizer cannot be loaded"),
    "exit optimizer of another kind": ("sgd", "exit_optimizer cannot be loaded"),
    "exit optimizer of another size": ("moments", "exit_optimizer cannot be loaded"),
    "all at once": ({"step": -1, "kept": "x", "counts": ...}, r"(?s)it has no counts; step must.*; kept must"),
}


def broken_state(state, change):
    state = copy.deepcopy(state)
    if change == "narrow":
        state["exit_head"] = {name: value[:1] for name, value in state["exit_head"].items()}
    elif change == "sgd":
        parameters = ExitHead(WIDTH, hidden=4).parameters()
        state["exit_optimizer"] = torch.optim.SGD(parameters, lr=0.1, momentum=0.9).state_dict()
    elif change == "moments":
        for entry in state["exit_optimizer"]["state"].values():
            entry["exp_avg"] = torch.zeros(3, 3, 3)
    else:
        state |= change
    return {name: value for name, value in state.items() if value is not ...}


@pytest.mark.parametrize("name", BROKEN_STATES)
def test_a_broken_state_is_refused_with_what_is_wrong_and_nothing_is_loaded(name):
    change, message = BROKEN_STATES[name]
    model, _ = classifier()
    saved = sifter_of(model, probe_every=1, **with_exit_head())
    picks(saved, [features(seed=seed) for seed in range(3)])
    broken = broken_state(saved.state_dict(), change)
    kept, sifter, other = values(broken), *(sifter_of(model, probe_every=1, **with_exit_head()) for _ in range(2))
    for each in (sifter, other):
        each.sift(features(seed=7))
    before = copy.deepcopy(values(sifter.state_dict()))
    with pytest.raises(ValueError, match=message) as caught:
        sifter.load_state_dict(broken)
    assert str(caught.value).count("\n") <= 2
    assert values(sifter.state_dict()) == before
    assert values(broken) == kept
    later = [features(seed=seed) for seed in range(3)]
    assert picks(sifter, later) == picks(other, later)
    assert values(sifter.state_dict()) == values(other.state_dict())


@pytest.mark.parametrize("state", [None, 5, "state", [], [("step", 1)], (1, 2), torch.ones(3)])
def test_a_state_that_is_no_mapping_is_refused(state):
    model, _ = classifier()
    with pytest.raises(ValueError, match=r"what Sifter\.state_dict\(\) returned, a mapping, got \w+\. Load the file"):
        sifter_of(model).load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"choice": ["lazy", 1, 0.5]}, "steering.choice must be None or one of what may be chosen, got "),
        ({"choice": ["greedy", 9, 0.5]}, "steering.choice must"),
        ({"choice": ["greedy", True, 0.5]}, "steering.choice must"),
        ({"choice": ["greedy", torch.ones(2), 0.5]}, "steering.choice must"),
        ({"choice": "greedy"}, "steering.choice must"),
        ({"records": None}, "steering.records must be at most 6 records"),
        ({"records": [{"loss": 1.0}]}, "steering.records must"),
        ({"records": "nan"}, "steering.records must"),
        ({"next_probe": "soon"}, "steering.next_probe must be a whole number of at least 0, got 'soon'"),
        ({"next_probe": -1}, "steering.next_probe must"),
        ({"before": [1.0]}, "steering.before must be two finite numbers, got "),
        ({"before": [NAN, 1.0]}, "steering.before must"),
        (None, "steering must be a mapping, got 'off'"),
    ],
)
def test_a_broken_state_of_auto_mode_is_refused_and_nothing_is_loaded(change, message):
    run = Auto().go(sequence("l" * 8))
    before = run.save()[0]
    broken = copy.deepcopy(before) | {"step": 3}
    if change is None:
        broken["steering"] = "off"
    elif change.get("records") == "nan":
        broken["steering"]["records"][0]["loss"] = NAN
    else:
        broken["steering"] |= change
    with pytest.raises(ValueError, match=message):
        run.sifter.load_state_dict(broken)
    assert values(run.save()[0]) == values(before)


def test_loading_a_state_never_writes_into_it():
    model, _ = classifier()
    sifter = sifter_of(model, **with_exit_head())
    sifter.sift(features())
    state = copy.deepcopy(sifter.state_dict())
    before = copy.deepcopy(values(state))
    other = sifter_of(model, **with_exit_head())
    other.load_state_dict(state)
    other.sift(features(seed=1))
    assert values(state) == before


# What learns


def learning_sifter(model, score):
    ids = {} if score == "probe" else {"sample_id": "number"}
    return sifter_of(model, score=score, explore=0.25, **ids)


def numbered(model, count, samples=20, rows=12):
    """Pools of samples that come back, with their numbers."""
    (data,) = pools_for(model, 1, rows=samples)
    for step in range(count):
        chosen = torch.randperm(samples, generator=Generator().manual_seed(step))[:rows]
        yield {name: values[chosen] for name, values in data.items()} | {"number": chosen}


def train_on(sifter, pools):
    chosen = []
    for pool in pools:
        pool = pool if sifter.config.sample_id else {name: pool[name] for name in pool if name != "number"}
        sifter.loss(sifter.sift(pool))
        chosen.append(sifter.selection.indices.tolist())
    return chosen


@pytest.mark.parametrize("task", ["sequence_classification", "masked_lm"])
@pytest.mark.parametrize("score", ["probe", "blend"])
def test_what_was_learnt_is_saved_with_the_sifter_and_determines_its_picks(score, task):
    model = build("bert", task)
    pools = list(numbered(model, 12))
    unbroken = learning_sifter(model, score)
    expected = train_on(unbroken, pools)
    first = learning_sifter(model, score)
    assert train_on(first, pools[:7]) == expected[:7]
    state = through_torch(first.state_dict())
    second = learning_sifter(build("bert", task), score)
    second.load_state_dict(state)
    assert train_on(second, pools[7:]) == expected[7:]
    assert values(second.state_dict()) == values(unbroken.state_dict())
    forgetful = learning_sifter(model, score)
    forgetful.load_state_dict(
        state | {name: part for name, part in forgetful.state_dict().items() if name == "probe_1"}
    )
    assert train_on(forgetful, pools[7:]) != expected[7:]
    other = sifter_of(model, score=score, explore=0.25, sample_id=unbroken.config.sample_id, seed=1)
    assert train_on(other, pools) != expected


BROKEN_LEARNERS = {
    "probe is absent": ("probe_1", ..., "it has no probe_1"),
    "probe is text": ("probe_1", "x", "probe must hold shape, module and optimizer"),
    "probe has other weights": (
        "probe_1",
        {"shape": ["classifier", 3, 3], "module": {}, "optimizer": {}},
        "probe cannot",
    ),
    "blend is absent": ("blend", ..., "it has no blend; blend must hold moments"),
    "blend is of other columns": (
        "blend",
        {"moments": torch.zeros(3, 4)},
        r"blend must hold moments, float64 \(6, 7\)",
    ),
    "blend is nan": (
        "blend",
        {"moments": torch.full((6, 7), NAN, dtype=torch.float64)},
        "blend.moments must be finite",
    ),
    "recent is absent": ("recent", ..., "it has no recent; recent must hold rows"),
    "recent is of other columns": ("recent", {"rows": torch.zeros(3, 9)}, "recent must hold rows, float32"),
    "memory is text": ("memory", "x", "memory must hold losses"),
}


@pytest.mark.parametrize("name", BROKEN_LEARNERS)
def test_a_broken_state_of_what_learns_is_refused_and_nothing_is_loaded(name):
    part, change, message = BROKEN_LEARNERS[name]
    model = build("bert", "sequence_classification")
    pools = list(numbered(model, 6))
    saved, sifter = learning_sifter(model, "blend"), learning_sifter(model, "blend")
    train_on(saved, pools[:4])
    broken = {key: value for key, value in (saved.state_dict() | {part: change}).items() if value is not ...}
    train_on(sifter, pools[:2])
    before = copy.deepcopy(values(sifter.state_dict()))
    with pytest.raises(ValueError, match=message):
        sifter.load_state_dict(broken)
    assert values(sifter.state_dict()) == before


def test_losses_of_another_number_of_samples_are_refused():
    model, _ = classifier()
    sifter = sifter_of(model, score="probe", explore=0.25)
    sifter.sift(features())
    for losses, received in [
        (torch.zeros(3), r"\(3,\) of torch.float32"),
        (torch.zeros(4, 1), r"\(4, 1\)"),
        (torch.zeros(4, dtype=torch.long), r"\(4,\) of torch.int64"),
        ([0.0] * 4, "list"),
    ]:
        with pytest.raises(ValueError, match=rf"one loss per sample .*, a tensor \(4,\), got {received}"):
            sifter.observe(losses)
    assert "sift/pool_loss" not in sifter.stats()
    sifter.observe(torch.arange(4.0))
    assert sifter.stats()["sift/pool_loss"] > 0


# A share that is drawn, and keep by a schedule


def test_a_share_of_the_batch_is_drawn_and_the_rest_are_the_first_by_score():
    model, row = classifier()
    drawn = []
    sifter = sifter_of(model, explore=0.5)
    for seed in range(40):
        pool = features(16, seed)
        first = set(scorers.early_exit_loss(model, pool, family=row, dtype=None).topk(4).indices.tolist())
        assert len(sifter.sift(pool)[1]) == 8
        chosen = set(sifter.selection.indices.tolist())
        assert first <= chosen
        assert sifter.weights.tolist() == [1.0] * 8
        drawn.append(tuple(chosen - first))
    assert len(set(drawn)) > 30
    assert picks(sifter_of(model, explore=0.0), [features(16)]) == picks(sifter_of(model), [features(16)])


def test_drawn_samples_show_the_loss_of_whole_pools():
    model, row = classifier()
    sifter, whole, batches = sifter_of(model, explore=0.25), [], []
    for seed in range(60):
        pool = features(16, seed)
        whole.append(scorers.exact_loss(model, pool, family=row, dtype=None).mean().item())
        batches.append(sifter.loss(sifter.sift(pool)).item())
    stats = sifter.stats()
    assert stats["sift/pool_loss"] == pytest.approx(sum(whole) / 60, rel=0.05)
    assert stats["sift/live_gain"] == pytest.approx(sum(batches) / sum(whole), rel=0.05)
    assert stats["sift/live_gain"] > 1.1


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_where_nothing_is_left_out_or_scored_batches_show_the_loss_of_pools_too(keep):
    model, row = classifier()
    sifter = sifter_of(model, keep=keep, explore=0.5, schedule=constant(0.0))
    pool = features(16)
    losses = scorers.exact_loss(model, pool, family=row, dtype=None)
    sifter.loss(sifter.sift(pool))
    expected = losses if keep == 1 else losses[sifter.selection.indices]
    assert sifter.stats()["sift/pool_loss"] == pytest.approx(expected.mean().item(), rel=1e-5)
    assert sifter.stats()["sift/live_gain"] == pytest.approx(1)


def test_keep_by_a_schedule_considers_the_first_part_of_the_pool_for_the_same_batch():
    model, row = classifier()
    sifter = sifter_of(model, keep=0.25, keep_schedule=lambda step: (0.25, 0.4, 0.5, 1.0)[step])
    considered = []
    for step in range(4):
        pool = features(16, step)
        scores = scorers.early_exit_loss(model, pool, family=row, dtype=None)
        first = (16, 10, 8, 4)[step]
        if step:
            assert sifter.wanted == first
        assert len(sifter.sift(pool)[1]) == 4
        assert sifter.selection.indices.tolist() == sorted(scores[:first].topk(4).indices.tolist())
        considered.append(sifter.ledger.end()["scored"])
    assert considered == [16, 10, 8, 4]


@pytest.mark.parametrize("keep", [0.2, 1.5, NAN, "much", None])
def test_a_keep_that_pools_are_too_small_for_is_refused_and_nothing_changes(keep):
    model, _ = classifier()
    sifter = sifter_of(model, keep=0.25, keep_schedule=lambda step: keep if step == 1 else 0.5)
    sifter.sift(features(16))
    with pytest.raises(ValueError, match=rf"keep_schedule to return a number in \[0.25, 1\], got {keep!r} at step 1"):
        sifter.sift(features(16))
    assert sifter.step == 1


# Copies


@pytest.mark.parametrize("through", [copy.deepcopy, lambda sifter: pickle.loads(pickle.dumps(sifter))])
@pytest.mark.parametrize("name", RUNS)
def test_a_copied_sifter_makes_the_same_picks(name, through, tmp_path):
    pools = pools_for(build("bert", "masked_lm"), 8, rows=12)
    run = Run(**RUNS[name], ledger=Ledger(tmp_path / "steps.jsonl")).go(pools[:3])
    sifter = through(run.sifter)
    assert sifter.model is not run.sifter.model
    assert values(sifter.state_dict()) == values(run.sifter.state_dict())
    later = picks(sifter, pools[3:])
    assert sifter.ledger.medians_ms().keys() == run.sifter.ledger.medians_ms().keys()
    assert picks(run.sifter, pools[3:]) == later
    assert values(sifter.state_dict()) == values(run.sifter.state_dict())


def test_a_copied_sifter_still_refuses_scores_that_come_late(late):
    model, _ = classifier()
    broken = broken_features()
    late()
    sifter = sifter_of(model)
    sifter.sift(broken)
    copied = pickle.loads(pickle.dumps(sifter))
    for each in (sifter, copied):
        with pytest.raises(Unusable, match=r"got 2 of 8 at step 0"):
            each.judge()
        each.judge()


# Gradient accumulation


def accumulated(sifter, pools, count):
    """Picks of pools of which as many share an optimizer step."""
    chosen = []
    for number, pool in enumerate(pools):
        sifter.sift(pool, micro_step=number % count)
        chosen.append(sifter.selection.indices.tolist())
    return chosen


def test_steps_are_those_of_the_optimizer_and_the_ledger_has_a_row_for_every_pool(tmp_path):
    model, _ = classifier()
    sifter = sifter_of(model, probe_every=2, ledger=Ledger(tmp_path / "steps.jsonl"))
    accumulated(sifter, [features(seed=seed) for seed in range(10)], 4)  # the last step has two
    assert sifter.step == sifter.stats()["sift/step"] == 3
    sifter.ledger.end()
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [(row["step"], row.get("micro_step", 0)) for row in rows] == [divmod(number, 4) for number in range(10)]
    assert [number for number, row in enumerate(rows) if "probe_ms" in row] == [0, 8]
    assert all(row["candidates"] == 8 for row in rows)


@pytest.mark.parametrize("count", [2, 3])
def test_a_schedule_tells_what_whole_optimizer_steps_do(count):
    model, _ = classifier()
    told = []

    def schedule(step):
        told.append(step)
        return 0.5

    sifter = sifter_of(model, schedule=schedule)
    sifter.state_dict()
    told.clear()
    scored = []
    for number in range(40 * count):
        sifter.sift(features(20, number), micro_step=number % count)
        scored.append("scored" in sifter.ledger.end())
    assert set(told) == set(range(40))
    by_step = [set(scored[start : start + count]) for start in range(0, len(scored), count)]
    assert {True} in by_step
    assert {False} in by_step
    assert {True, False} not in by_step
    alone = sifter_of(model, schedule=constant(0.5))
    chosen = []
    for number in range(40):
        alone.sift(features(20, number))
        chosen.append("scored" in alone.ledger.end())
    assert [step == {True} for step in by_step] == chosen


def test_micro_steps_draw_differently_and_the_first_one_as_without_accumulation():
    model, _ = classifier()
    pool = features(40)
    chosen = accumulated(sifter_of(model, schedule=constant(0.0)), [pool] * 60, 3)
    assert len({tuple(indices) for indices in chosen}) == 60
    assert chosen[::3] == picks(sifter_of(model, schedule=constant(0.0)), [pool] * 20)
    proportionally = accumulated(sifter_of(model, select=proportional), [pool] * 6, 2)
    assert proportionally[::2] == picks(sifter_of(model, select=proportional), [pool] * 3)
    assert len({tuple(indices) for indices in proportionally}) == 6


@pytest.mark.parametrize("cut", range(9))
@pytest.mark.parametrize("mode", ["fixed", "auto", "blend"])
def test_a_run_cut_within_accumulation_goes_on_as_if_it_had_not_been(mode, cut):
    pools = pools_for(build("bert", "masked_lm"), 10, rows=12)
    places = [0, 1, 2, 3, 0, 1, 0, 1, 2, 3]  # the second step is the last of an epoch
    options = {"schedule": constant(0.6), "select": proportional, "probe_every": 2}
    if mode == "auto":
        options = {"mode": "auto", "control": Control(probe_share=0.5, reference_costs=COSTS)}
    elif mode == "blend":
        options = {"score": "blend", "schedule": constant(0.6)}

    def go(sifter, begin, end):
        told = []
        for pool, place in zip(pools[begin:end], places[begin:end], strict=True):
            sifter.loss(sifter.sift(pool, micro_step=place))
            row = {name: value for name, value in sifter.ledger.end().items() if not name.endswith("_ms")}
            told.append((sifter.selection.indices.tolist(), row))
        return told

    model = build("bert", "masked_lm")
    unbroken = sifter_of(model, **options)
    expected = go(unbroken, 0, 10)
    first, second = (sifter_of(model, **options) for _ in range(2))
    told = go(first, 0, cut)
    second.load_state_dict(through_torch(first.state_dict()))
    assert told + go(second, cut, 10) == expected
    assert values(second.state_dict()) == values(unbroken.state_dict())
    assert unbroken.step == 3


def test_a_pool_after_a_refused_one_begins_the_step_that_was_refused():
    model, _ = classifier()
    sifter, alone = sifter_of(model), sifter_of(model)
    sifter.sift(features(seed=0), micro_step=0)
    sifter.sift(features(seed=1), micro_step=1)
    with pytest.raises(Unusable):
        sifter.sift(broken_features(), micro_step=0)
    sifter.sift(features(seed=2), micro_step=1)
    assert sifter.step == 2
    with pytest.raises(Unusable):
        alone.sift(broken_features(), micro_step=0)
    alone.sift(features(seed=2), micro_step=1)
    assert alone.step == 1


def test_numbers_of_numpy_are_as_good_as_those_of_python():
    model, _ = classifier()
    pools = [features(20, seed) for seed in range(4)]
    options = {"schedule": constant(0.0), "probe_every": 2}
    plain = sifter_of(model, seed=3, kept=4, depth=2, **options)
    other = sifter_of(model, seed=np.int64(3), kept=np.int32(4), depth=np.int64(2), keep=np.float32(0.5), **options)
    expected = accumulated(plain, pools, 2)
    assert [
        other.sift(pool, micro_step=np.int64(i % 2)) and other.selection.indices.tolist()
        for i, pool in enumerate(pools)
    ] == expected
    assert through_json(other.state_dict()) == plain.state_dict()
    state = plain.state_dict()
    other.load_state_dict({**state, "step": np.int64(state["step"]), "kept": np.int64(4)})
    assert picks(other, pools) == picks(plain, pools)
    assert through_json(other.state_dict()) == plain.state_dict()


@pytest.mark.parametrize("micro_step", [-1, 1.0, "0", None, True])
def test_a_micro_step_that_is_no_number_is_refused(micro_step):
    model, _ = classifier()
    sifter = sifter_of(model)
    with pytest.raises(ValueError, match="micro_step must be a whole number of at least 0, got"):
        sifter.sift(features(), micro_step=micro_step)
    assert sifter.step == 0


@pytest.mark.parametrize("count", [1, 2, 4])
def test_probes_cost_their_share_whatever_is_accumulated(count):
    ledger = Ledger()
    control = Control(reference_costs=COSTS, probe_share=0.1)
    sifter = sifter_of(models.ladder(), mode="auto", family=models.LADDER, control=control, ledger=ledger)
    (pool,) = sequence("n")
    for number in range(240):
        sifter.sift(pool, micro_step=number % count)
    assert sifter.step == 240 // count
    assert 0.6 <= len(ledger.times_ms("probe")) * COSTS["probe"] / (240 * COSTS["train"]) / 0.1 <= 1


def test_selection_ends_at_its_share_of_the_training_though_no_probe_is_due(caplog):
    run = told_to(Auto(total_steps=20, end_share=0.5, sifter={"probe_every": 0}).go(sequence("l")), "greedy", 1, 0.5)
    caplog.clear()
    run.go(sequence("l" * 15)[1:])
    assert run.probes == []
    assert run.modes == ["off", *["greedy"] * 9, *["off"] * 5]
    reason = "the training nears its end, and greedy selection has a floor"
    assert run.events == [(10, {"from": "greedy, depth 1, keep 0.5", "to": "uniform", "reason": reason})]
    assert [record.getMessage() for record in caplog.records] == [
        f"step 10: greedy, depth 1, keep 0.5 -> uniform: {reason}"
    ]


# What is left of an epoch


@pytest.mark.parametrize("options", [{}, {"schedule": constant(0.0)}, {"select": proportional}, {"trim": True}])
def test_a_plain_loop_over_a_loader_trains_on_what_is_left_of_an_epoch_and_says_so_once(options, caplog):
    model = build("bert", "masked_lm")
    (rows,) = pools_for(model, 1, rows=19)
    data = [{name: values[number] for name, values in rows.items()} for number in range(19)]
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    sifter = sifter_of(model, probe_every=1, **options)
    sizes = []
    for _ in range(2):
        for pool in loader:
            batch = sifter.sift(pool)
            assert sifter.weights.shape == (len(batch["input_ids"]),)
            loss_of(model, batch).backward()
            sizes.append(len(batch["input_ids"]))
    assert sizes == [4, 4, 3] * 2
    assert torch.equal(batch["labels"], pool["labels"][:, : batch["labels"].size(1)])
    assert sifter.weights.tolist() == [1.0] * 3
    assert (sifter.step, sifter.stats()["sift/trained"], sifter.stats()["sift/candidates"]) == (6, 22, 38)
    assert sifter.stats()["sift/scored"] == 32
    said = [record.getMessage() for record in caplog.records]
    assert said == ["step 2: the 3 candidates of a pool are fewer than the 4 kept: all are trained on. Said once."]


def test_a_rest_in_auto_mode_is_trained_on_whole_and_nothing_is_learnt_from_it():
    run = Auto().go(sequence("l" * 3))
    assert run.sifter.state_dict()["steering"]["next_probe"] == 3
    inputs, labels = sequence("llll")[3]
    run.go([(inputs[:5], labels[:5])])
    assert run.picks[-1] == (inputs[:5].tolist(), labels[:5].tolist())
    assert run.sifter.state_dict()["steering"]["records"] == []
    assert run.sifter.state_dict()["steering"]["next_probe"] == 6
    run = told_to(run, "greedy", 1, 0.5).go([(inputs[:5], labels[:5])])
    assert run.picks[-1] == (inputs[:5].tolist(), labels[:5].tolist())
    assert "scored" not in run.rows[-1]


OTHERWISE = {
    "keep": {"keep": 0.25},
    "depth": {"depth": 2},
    "score": {"score": "entropy"},
    "select": {"select": percentile},
    "schedule": {"schedule": warmup(50)},
    "reduction": {"reduction": "sum"},
    "max_positions": {"max_positions": 1},
    "drop_outliers": {"drop_outliers": 0.1},
    "probe_every": {"probe_every": 7},
    "trim": {"trim": True},
    "seed": {"seed": 1},
    "dtype": {"dtype": torch.bfloat16},
    "exit_head": {"exit_head": ExitHead(WIDTH)},
}


@pytest.mark.parametrize("key", OTHERWISE)
def test_state_of_another_configuration_is_refused_with_the_difference(key):
    model, _ = classifier()
    saved = sifter_of(model)
    saved.sift(features())
    other = sifter_of(model, **OTHERWISE[key])
    before = copy.deepcopy(values(other.state_dict()))
    with pytest.raises(
        ValueError, match=rf"configured otherwise \({key}: saved .*, now .*\)\. Build the Sifter as it was"
    ):
        other.load_state_dict(saved.state_dict())
    assert values(other.state_dict()) == before


def test_all_differences_of_a_configuration_are_listed_at_once():
    model, _ = classifier()
    state = sifter_of(model, keep=0.25, seed=3).state_dict()
    with pytest.raises(ValueError, match=r"\(keep: saved 0\.25, now 0\.5; seed: saved 3, now 0\)"):
        sifter_of(model).load_state_dict(state)


@pytest.mark.parametrize("version", [0, 1, 2, 3, 4, 5, None, "6", 6.0, True, [6], torch.tensor([6, 6])])
def test_state_of_another_version_is_refused(version):
    model, _ = classifier()
    sifter = sifter_of(model)
    before = copy.deepcopy(sifter.state_dict())
    said = re.escape(f"Expected a Sifter state of version 6, got {version!r}. Use the release that wrote it.")
    with pytest.raises(ValueError, match=said):
        sifter.load_state_dict({**before, "version": version, "step": 9})
    assert sifter.state_dict() == before


def test_options_given_to_a_selector_are_part_of_the_configuration():
    model, _ = classifier()
    saved = sifter_of(model, select=functools.partial(proportional, uniform_share=0.2)).state_dict()
    sifter_of(model, select=functools.partial(proportional, uniform_share=0.2)).load_state_dict(saved)
    for select in (functools.partial(proportional, uniform_share=0.9), functools.partial(percentile, beta=3.0)):
        with pytest.raises(ValueError, match="select: saved"):
            sifter_of(model, select=select).load_state_dict(saved)


def test_state_with_an_exit_head_of_another_shape_is_refused_and_nothing_loaded():
    model, _ = classifier()
    saved = sifter_of(model, exit_head=ExitHead(WIDTH, hidden=8))
    models.widen(saved.exit_head)
    saved.sift(features())
    other = sifter_of(model, exit_head=ExitHead(WIDTH, hidden=16))
    before = copy.deepcopy(values(other.state_dict()))
    with pytest.raises((ValueError, RuntimeError)):
        other.load_state_dict(saved.state_dict())
    assert values(other.state_dict()) == before


# Bad input


@pytest.mark.parametrize("keep", [0, 0.0, -0.5, 1.0001, 2, NAN, INF])
def test_keep_out_of_range_is_refused(keep):
    model, row = classifier()
    with pytest.raises(ValueError, match=rf"keep must be in \(0, 1\], got {keep}\. It is the share of the pool"):
        Sifter(model, keep=keep, family=row)


@pytest.mark.parametrize("score", ["loss", "entropy"])
@pytest.mark.parametrize("depth", [0, -1, LAYERS, LAYERS + 3])
def test_depth_out_of_range_is_refused(depth, score):
    model, row = classifier()
    message = rf"PlainTransformer cannot be sifted with:\n- Expected depth in 1\.\.3 .* got {depth}\. Choose a smaller"
    with pytest.raises(ValueError, match=message):
        Sifter(model, depth=depth, family=row, score=score)


@pytest.mark.parametrize("drop", [-0.1, 1.0, NAN])
def test_outlier_share_out_of_range_is_refused(drop):
    model, row = classifier()
    with pytest.raises(ValueError, match=rf"drop_outliers must be in \[0, 1\), got {drop}\."):
        Sifter(model, drop_outliers=drop, family=row)


def test_unknown_score_is_refused_with_the_known_ones():
    model, row = classifier()
    known = ", ".join(scorers.SCORES)
    with pytest.raises(ValueError, match=f"score must be one of {known} or a callable, got 'los'"):
        Sifter(model, score="los", family=row)


@pytest.mark.parametrize("score", ["loss", "entropy", "exact"])
def test_unknown_family_is_refused_with_the_way_out(score):
    with pytest.raises(
        ValueError, match=r"Linear cannot be sifted with:\n- .* is unknown, and .*\. Pass a row: family=Family\("
    ):
        Sifter(nn.Linear(2, 2), score=score)


def test_all_problems_of_a_model_come_at_once():
    model, _ = classifier()
    with pytest.raises(ValueError, match=r"(?s)- Expected a ModuleList.*\n- What the labels.*\n- .* none of the heads"):
        Sifter(model, family=Family("layers", (("decoder",),)))


def test_exit_optimizer_without_exit_head_is_refused():
    model, row = classifier()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="exit_optimizer was given without exit_head"):
        Sifter(model, family=row, exit_optimizer=optimizer)


def broken_pools():
    """Pools that must be refused, with the message and options of the sifter."""
    inputs, labels = features()
    nan = inputs.clone()
    nan[:5] = NAN
    infinite = inputs.clone()
    infinite[2:] = INF
    wide = {"input_ids": inputs, "attention_mask": torch.ones(8, 6), "labels": labels}
    return {
        "empty": (features(0), r"at least one candidate, got 0\. Leave empty batches out", {}),
        "first dimensions differ": (
            {**wide, "attention_mask": torch.ones(7, 6)},
            r"pool\['input_ids'\]: 8, pool\['attention_mask'\]: 7, pool\['labels'\]: 8\.",
            {},
        ),
        "no tensors": ({"text": ["a"] * 8}, "Collate the samples into tensors", {}),
        "packed": ({**wide, "cu_seq_lens_q": torch.arange(9)}, "packed", {}),
        "labels absent": ({"input_ids": inputs}, r"'labels' or a pair .* got keys \['input_ids'\]\. Add 'labels'", {}),
        "no labels at all": (inputs, "Add 'labels' to the batch, .* pass a scorer of your own", {}),
        "labels all ignored": (
            (inputs, torch.full_like(labels, -100)),
            r"None of the 8 candidates has a labelled position \(all labels are -100\)\. Check the collator",
            {},
        ),
        "too many nan": (
            (nan, labels),
            r"Expected at least 4 candidates with a finite score, got 3 of 8 at step 1: 5 are nan or inf\. Look",
            {},
        ),
        "too many infinite": ((infinite, labels), r"got 2 of 8 at step 1: 6 are nan or inf", {}),
        "scores of another shape": (
            (inputs, labels),
            r"Expected scores of shape \(8,\), one per candidate, got \(8, 1\) .* A scorer returns a tensor with one",
            {"score": lambda model, pool: torch.zeros(8, 1) if pool[0] is inputs else torch.zeros(8)},
        ),
        "one score for all": (
            (inputs, labels),
            r"Expected scores of shape \(8,\), one per candidate, got \(\) ",
            {"score": lambda model, pool: torch.tensor(0.0) if pool[0] is inputs else torch.zeros(8)},
        ),
        "negative scores for proportional selection": (
            (inputs, labels),
            r"Proportional selection needs scores >= 0, got -1\.",
            {"select": proportional, "score": lambda model, pool: torch.full((8,), -float(pool[0] is inputs))},
        ),
        "a selector that keeps another number": (
            (inputs, labels),
            r"Expected the selector to keep 4 candidates, got indices of shape \(3,\)\.",
            {
                "select": lambda scores, kept, generator: greedy(scores, kept - int(scores[0])),
                "score": lambda model, pool: torch.full((8,), float(pool[0] is inputs)),
            },
        ),
    }


@pytest.mark.parametrize("name", broken_pools())
def test_bad_pools_are_refused_and_change_nothing(name):
    pool, message, options = broken_pools()[name]
    model, _ = classifier()
    good = [features(seed=9), features(seed=10)]

    def new():
        head = ExitHead(WIDTH, hidden=4)
        optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
        return sifter_of(model, probe_every=1, exit_head=head, exit_optimizer=optimizer, **options)

    sifter, untouched = new(), new()
    sifter.sift(good[0])
    before, selection = copy.deepcopy(values(sifter.state_dict())), sifter.selection
    untouched.load_state_dict(copy.deepcopy(sifter.state_dict()))
    with pytest.raises(ValueError, match=message):
        sifter.sift(pool)
    assert values(sifter.state_dict()) == before
    assert sifter.selection is selection
    assert model.training
    assert picks(sifter, good[1:]) == picks(untouched, good[1:])
    assert values(sifter.state_dict()) == values(untouched.state_dict())


def test_bad_first_pools_are_refused_and_change_nothing():
    model, _ = classifier()
    for name in ("first dimensions differ", "labels absent", "labels all ignored", "no tensors", "packed"):
        pool, message, options = broken_pools()[name]
        sifter = sifter_of(model, **options)
        before = sifter.state_dict()
        with pytest.raises(ValueError, match=message):
            sifter.sift(pool)
        assert sifter.state_dict() == before
        assert len(sifter.sift(features(12))[1]) == 6  # the number kept was not fixed by what was refused


def test_model_in_evaluation_mode_is_refused_and_nothing_changed():
    model, _ = classifier()
    sifter = sifter_of(model)
    sifter.sift(features())
    before = sifter.state_dict()
    model.eval()
    with pytest.raises(ValueError, match=r"The model is in evaluation mode.*Call model\.train\(\) before the loop"):
        sifter.sift(features())
    assert sifter.state_dict() == before
    assert not model.training
    model.train()
    sifter.sift(features())
    assert sifter.step == 2


def test_model_that_does_not_loop_over_its_list_is_refused_at_the_first_pool():
    class Shared(models.PlainTransformer):
        def forward(self, input_ids):
            for _ in range(3):
                input_ids = self.blocks[0](input_ids, None, None)
            return self.head(input_ids.mean(dim=1))

    model = Shared("sequence_classification")
    sifter = sifter_of(model)
    before = sifter.state_dict()
    with pytest.raises(ValueError, match=r"Shared cannot be sifted with:\n- .* got calls \[3, 0, 0, 0\]\."):
        sifter.sift(features())
    assert sifter.state_dict() == before


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
@pytest.mark.parametrize("select", [greedy, proportional, percentile])
def test_broken_candidates_are_never_selected_but_counted_and_warned_about_once(select, broken):
    model, _ = classifier()
    sifter = sifter_of(model, select=select)
    pools = [features(16, seed=step) for step in range(5)]
    for step, (inputs, _) in enumerate(pools):
        inputs[step, 2] = inputs[15 - step, 0] = broken
    with pytest.warns(
        UserWarning, match=r"2 of 16 scores are nan or inf at step 0; such candidates are never"
    ) as caught:
        batches = [sifter.sift(pool)[0] for pool in pools]
    assert all(torch.isfinite(batch).all() and len(batch) == 8 for batch in batches)
    assert len(caught) == 1
    assert sifter.stats()["sift/non_finite"] == 10


def test_broken_scores_of_a_lambda_are_never_selected():
    model = nn.Linear(3, 1)
    scores = torch.tensor([NAN, 1.0, INF, 2.0, -INF, 3.0, 0.5, NAN])
    sifter = Sifter(model, score=lambda model, pool: scores)
    with pytest.warns(UserWarning, match="3 of 8 scores are nan or inf"):
        sifter.sift({"x": torch.zeros(8, 3)})
    assert sifter.selection.indices.tolist() == [1, 3, 5, 6]
    assert (sifter.stats()["sift/non_finite"], sifter.stats()["sift/unlabelled"]) == (3, 1)


def test_exit_head_is_not_trained_on_broken_candidates():
    model, _ = classifier()
    head = ExitHead(WIDTH, hidden=4)
    sifter = sifter_of(model, exit_head=head, exit_optimizer=torch.optim.SGD(head.parameters(), lr=0.1))
    inputs, labels = features(16)
    inputs[1] = NAN
    with pytest.warns(UserWarning, match="1 of 16 scores are nan or inf"):
        sifter.sift((inputs, labels))
    assert all(torch.isfinite(parameter).all() for parameter in head.parameters())
    assert torch.isfinite(sifter.sift(features(16, seed=1))[0]).all()


def test_batches_are_filled_up_with_unlabelled_candidates_only_in_need_with_one_warning():
    model = build("bert", "masked_lm")
    sifter = sifter_of(model)
    few, enough = pools_for(model, 2)
    few["labels"][:6] = -100
    enough["labels"][:4] = -100
    message = r"Only 2 of 8 candidates have a labelled position, fewer than the 4 kept"
    with pytest.warns(UserWarning, match=message) as caught:
        chosen = picks(sifter, [few] * 3)
    assert all({6, 7} < set(indices) for indices in chosen)
    assert len(caught) == 1
    sifter.sift(enough)
    assert sifter.selection.indices.tolist() == [4, 5, 6, 7]
    assert sifter.stats()["sift/unlabelled"] == 22


def test_misspelt_options_are_refused():
    model, row = classifier()
    with pytest.raises(ValueError, match="reduction"):
        Sifter(model, family=row, reduction="average")
    with pytest.raises(ValueError, match="bf16"):
        Sifter(model, family=row, dtype="bf16")
    with pytest.raises(ValueError, match="max_positions must be at least 1 or None, got 0"):
        Sifter(model, family=row, max_positions=0)


REFUSED_ARGUMENTS = {
    "chunk_rows": [(0, "at least 1 or None, got 0"), (-1, "at least"), (1.5, "at least"), ("8", "at least")],
    "probe_every": [(-1, "a whole number of at least 0, got -1"), (2.5, "a whole"), (None, "a whole"), (NAN, "a wh")],
    "depth": [
        (1.5, "a whole number, got 1.5"),
        (True, "a whole"),
        ("1", "a whole"),
        (None, "a whole"),
        (NAN, "a whole"),
    ],
    "kept": [(2.5, r"at least 1, got 2\.5"), (True, "at least"), ("4", "at least"), (0, "at least"), (INF, "at least")],
    "keep": [(NAN, r"in \(0, 1\], got nan"), ("half", "in"), (None, "in"), (True, "in"), ([0.5], "in")],
    "seed": [("x", "a whole number, got 'x'"), (0.5, "a whole"), (None, "a whole"), (NAN, "a whole")],
    "drop_outliers": [("x", r"in \[0, 1\), got 'x'"), (None, "in"), (-1, "in")],
    "max_positions": [(1.5, "at least 1 or None"), ("x", "at least")],
    "select": [("greedy", r"a callable \(scores, kept, generator\) -> Selection, got 'greedy'"), (None, "a callable")],
    "schedule": [(0.5, "a callable from steps to shares .* got 0.5"), ("warmup", "a callable")],
    "score": [(None, "one of loss"), (1.0, "one of loss"), ([], "one of loss")],
    "mode": [(None, "fixed or auto, got None"), (1, "fixed")],
    "scope": [(None, "local or global, got None"), (["local"], "local")],
    "reduction": [(None, "mean or sum, got None")],
    "control": [({"total_steps": 5}, "a Control or None"), (5, "a Control")],
    "family": [("bert", "a Family or None, got 'bert'")],
    "trim": [("yes", "True or False, got 'yes'"), (1, "True")],
    "dtype": [(16, "a torch.dtype"), (["auto"], "a torch.dtype")],
    "exit_head": [("head", "an ExitHead or None")],
    "exit_optimizer": [("adam", "an optimizer or None")],
    "ledger": [("steps.jsonl", "a Ledger or None, got 'steps.jsonl'")],
}


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
def test_arguments_that_cannot_work_are_refused_with_what_is_expected(name):
    model, row = classifier()
    for value, expected in REFUSED_ARGUMENTS[name]:
        with pytest.raises(ValueError, match=rf"{name} must be {expected}"):
            Sifter(model, **{"family": row, name: value})


def test_all_arguments_that_cannot_work_are_refused_at_once():
    model, row = classifier()
    with pytest.raises(ValueError, match=r"(?s)keep must.*\n.*kept must.*\n.*depth must.*\n.*seed must") as caught:
        Sifter(model, family=row, keep=NAN, kept=2.5, depth=1.5, seed="x")
    assert str(caught.value).count("\n") == 3
    with pytest.raises(ValueError, match=r"model must be a torch\.nn\.Module, got None"):
        Sifter(None)


# The exit head


def test_joint_exit_loss_trains_trunk_and_exit_head_and_nothing_above_the_exit():
    for family, task in (("bert", "masked_lm"), ("plain", "sequence_classification")):
        model = build(family, task)
        head = ExitHead(WIDTH, hidden=4)
        sifter = sifter_of(model, depth=2, exit_head=head)
        batch = sifter.sift(pools_for(model, 1)[0])
        loss = sifter.exit_loss(batch)
        assert loss.shape == ()
        assert loss.dtype == torch.float32
        loss.backward()
        layers = find_anatomy(model, row_of(model)).layers
        assert all(parameter.grad is not None for parameter in layers[:2].parameters())
        assert all(parameter.grad is None for parameter in layers[2:].parameters())
        assert all(parameter.grad is not None for parameter in head.parameters())
        assert sum(p.grad.abs().sum() for p in layers[:2].parameters()) > 0


def test_exit_loss_without_an_exit_head_is_the_loss_of_the_cut_model():
    model = build("bert", "masked_lm")
    sifter = sifter_of(model, depth=2)
    batch = sifter.sift(pools_for(model, 1)[0])
    with earlysift.truncated(model, 2):
        expected = loss_of(model, batch)
    torch.testing.assert_close(sifter.exit_loss(batch), expected, rtol=1e-6, atol=1e-6)


def test_trained_exit_head_learns_and_never_touches_the_model():
    model, _ = classifier()
    head = ExitHead(WIDTH, hidden=16)
    sifter = sifter_of(model, exit_head=head, exit_optimizer=torch.optim.AdamW(head.parameters(), lr=3e-2))
    weights = copy.deepcopy(model.state_dict())
    pool = features(32)
    before = sifter.exit_loss(pool).item()
    for _ in range(40):
        sifter.sift(pool)
    assert sifter.exit_loss(pool).item() < 0.7 * before
    assert values(model.state_dict()) == values(weights)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert len(sifter.ledger.times_ms("exit")) == 40


def test_frozen_parts_of_the_exit_head_stay_frozen():
    model, _ = classifier()
    head = ExitHead(WIDTH, hidden=4)
    head.norm.requires_grad_(False)
    sifter = sifter_of(model, exit_head=head, exit_optimizer=torch.optim.SGD(head.down.parameters(), lr=1.0))
    before = copy.deepcopy(head.state_dict())
    sifter.sift(features())
    changed = {name for name, value in head.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"down.weight", "down.bias"}


# Auto mode


def sequence(kinds, rank=0):
    """Pools, one per kind: (l)earnt mostly, or of (n)oise; every step has its own."""
    made = {"l": models.mostly_learnt, "n": models.unlearnable}
    return [made[kind](Generator().manual_seed(1000 * rank + step)) for step, kind in enumerate(kinds)]


class Auto:
    """A training run in auto mode that notes what was picked and why."""

    def __init__(self, *, weights=False, lr=1e-2, sifter=None, **control):
        self.model = models.ladder()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=lr)
        options = {"probe_share": 0.2, "reference_costs": COSTS} | control
        settings = {"mode": "auto", "family": models.LADDER, "control": Control(**options), "explore": 0.0}
        self.sifter = sifter_of(self.model, **settings | (sifter or {}))
        self.weights = weights
        self.rows = []
        self.picks = []

    def go(self, pools, offered=lambda sifter, pool: pool):
        for pool in pools:
            batch = inputs, labels = self.sifter.sift(offered(self.sifter, pool))
            losses = nn.functional.cross_entropy(self.model(inputs), labels, reduction="none")
            (losses * self.sifter.weights if self.weights else losses).mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.picks.append((batch[0].tolist(), batch[1].tolist()))
            self.rows.append(self.sifter.ledger.end())
        return self

    def save(self):
        state = through_torch(self.sifter.state_dict())
        return state, copy.deepcopy(self.model.state_dict()), copy.deepcopy(self.optimizer.state_dict())

    def load(self, saved):
        state, weights, optimizer = saved
        self.sifter.load_state_dict(state)
        self.model.load_state_dict(weights)
        self.optimizer.load_state_dict(optimizer)
        return self

    @property
    def modes(self):
        return [row["mode"] for row in self.rows]

    @property
    def events(self):
        return [(row["step"], row["event"]) for row in self.rows if "event" in row]

    @property
    def probes(self):
        return [row["step"] for row in self.rows if "control" in row]


TURNING = "l" * 20 + "n" * 10 + "l" * 25  # goes on, off when what is known is gone, and on again


def test_auto_begins_with_uniform_batches_that_are_not_scored():
    pools = sequence("l" * 6)
    run = Auto().go(pools)
    assert run.modes == ["off"] * 6
    assert run.probes == [3]
    assert not any("scored" in row for row in run.rows)
    assert run.picks == [(inputs[:32].tolist(), labels[:32].tolist()) for inputs, labels in pools]
    assert run.sifter.weights.tolist() == [1.0] * 32
    assert all(row["candidates"] == 64 and row["trained"] == 32 for row in run.rows)


def test_auto_off_runs_the_model_for_probes_only():
    run = Auto(depths=(1,))
    calls = []
    run.model.rungs[0].register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    run.go(sequence("n"))
    calls.clear()  # the first pool also runs the check of the model
    run.go(sequence("n" * 8))
    assert len(run.probes) == 2
    assert calls == [32] * 2 + [32, 32, 32] + [32] * 2 + [32, 32, 32] + [32] * 2  # a probe: two chunks of b


def test_auto_switches_on_by_itself_where_most_samples_are_learnt_and_says_so_once(caplog):
    pools = sequence("l" * 25)
    run = Auto(rules=("greedy",)).go(pools)
    on = run.modes.index("greedy")
    assert on in run.probes
    assert len([step for step in run.probes if step <= on]) <= 6
    assert run.modes == ["off"] * on + ["greedy"] * (25 - on)
    ((step, event),) = run.events
    assert step == on
    assert set(event) == {"from", "to", "reason"}
    assert event["from"] == "uniform"
    assert event["to"].startswith("greedy, depth ")
    assert event["reason"].startswith("selection pays (batches have ")
    (record,) = caplog.records
    assert record.name == "earlysift"
    assert record.getMessage() == f"step {on}: uniform -> {event['to']}: {event['reason']}"
    # What is known already (its last feature is not 0) is picked only where there is too little else.
    picked = [sum(row[-1] == 0 for row in inputs) for inputs, _ in run.picks]
    offered = [int((inputs[:, -1] == 0).sum()) for inputs, _ in pools]
    assert picked[on:] == [min(32, new) for new in offered[on:]]
    assert picked[:on] != [min(32, new) for new in offered[:on]]


def test_auto_picks_what_its_choice_says():
    run = Auto(depths=(2,), keeps=(0.5,), rules=("greedy",), lr=0.0).go(sequence("l" * 20))
    choice = run.sifter.state_dict()["steering"]["choice"]
    assert choice[0] == "greedy"
    pool = sequence("l" * 21)[20]
    scores = scorers.early_exit_loss(run.model, pool, depth=choice[1], family=models.LADDER, dtype=None)
    run.go([pool])
    assert run.sifter.selection.indices.tolist() == greedy(scores, 32).indices.tolist()
    assert (run.rows[-1]["depth"], run.rows[-1]["scored"]) == (choice[1], 64)


@pytest.mark.parametrize("lr", [1e-3, 1e-1])
def test_auto_stays_uniform_where_nothing_can_be_learnt(lr, caplog):
    run = Auto(lr=lr, weights=True).go(sequence("n" * 60))
    assert len(run.probes) == 19
    assert set(run.modes) == {"off"}
    assert run.events == caplog.records == []


def test_auto_goes_off_when_selection_stops_to_pay_and_on_again_when_it_pays():
    run = Auto().go(sequence(TURNING))
    assert [(event["from"], event["to"]) for _, event in run.events][:3] == [
        ("uniform", run.events[0][1]["to"]),
        (run.events[0][1]["to"], "uniform"),
        ("uniform", run.events[2][1]["to"]),
    ]
    steps = [step for step, _ in run.events]
    assert steps[0] < 20 <= steps[1] <= 23  # at the first probe of the noise
    assert run.modes[steps[1] : steps[2]] == ["off"] * (steps[2] - steps[1])
    assert run.modes[steps[2]] == "greedy"


def test_auto_with_reference_costs_makes_the_same_choices_and_picks_in_every_run():
    first, second = Auto().go(sequence(TURNING)), Auto().go(sequence(TURNING))
    assert first.events == second.events != []
    assert first.picks == second.picks
    assert [row.get("control") for row in first.rows] == [row.get("control") for row in second.rows]
    assert values(first.save()[0]) == values(second.save()[0])


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("cut", [0, 5, 9, 10, 15, 25, 45])
def test_an_auto_run_cut_anywhere_goes_on_as_if_it_had_not_been(cut, weights):
    pools = sequence(TURNING)
    rules = ("unbiased",) if weights else ("greedy", "unbiased")
    unbroken = Auto(weights=weights, rules=rules).go(pools)
    assert len(unbroken.events) >= (1 if weights else 3)  # drawing in proportion pays on noise, too
    first = Auto(weights=weights, rules=rules).go(pools[:cut])
    second = Auto(weights=weights, rules=rules).load(first.save()).go(pools[cut:])
    assert first.picks + second.picks == unbroken.picks
    assert first.events + second.events == unbroken.events
    assert first.probes + second.probes == unbroken.probes
    assert values(second.save()[0]) == values(unbroken.save()[0])


def told_to(run, *choice):
    """A run that selects by this choice, as if it had come to it by itself."""
    state = run.save()[0]
    state["steering"] = {
        "choice": list(choice),
        "records": [],
        "next_probe": 10_000,
        "before": [1.0, 0.1],
        "harmed": 0,
        "by_heart": 0,
    }
    run.sifter.load_state_dict(state)
    return run


@pytest.mark.parametrize(("keep", "scored"), [(0.5, 64), (0.67, 48), (0.8, 40), (0.99, 32)])
def test_a_larger_keep_scores_only_the_first_part_of_the_pool_for_the_same_batch(keep, scored):
    run = told_to(Auto(keeps=(keep,)).go(sequence("l")), "greedy", 1, keep)
    pool = sequence("ll")[1]
    scores = scorers.early_exit_loss(run.model, (pool[0][:scored], pool[1][:scored]), family=models.LADDER, dtype=None)
    run.go([pool])
    assert run.sifter.selection.indices.tolist() == greedy(scores, 32).indices.tolist()
    assert run.rows[-1]["scored"] == scored
    assert run.rows[-1]["candidates"] == 64
    assert len(run.picks[-1][1]) == 32


def test_a_loop_that_does_not_read_the_weights_is_never_given_the_unbiased_rule():
    pools = sequence("l" * 25)
    blind = Auto(rules=("unbiased",)).go(pools)
    assert set(blind.modes) == {"off"}
    assert "unbiased" not in Auto(rules=("greedy", "unbiased")).go(pools).modes
    weighing = Auto(rules=("unbiased",), weights=True).go(pools)
    assert "unbiased" in weighing.modes
    assert len(set(weighing.sifter.weights.tolist())) > 1


def test_weights_of_the_unbiased_rule_are_those_of_proportional_selection():
    run = told_to(Auto(weights=True).go(sequence("l")), "unbiased", 2, 0.5)
    pool = sequence("ll")[1]
    scores = scorers.early_exit_loss(run.model, pool, depth=2, family=models.LADDER, dtype=None)
    run.go([pool])
    included = selectors.inclusion_probabilities(scores, 32)[run.sifter.selection.indices]
    torch.testing.assert_close(run.sifter.weights.double(), 32 / (64 * included), rtol=1e-6, atol=0)


@pytest.mark.parametrize("total_steps", [None, 1500])
def test_probes_of_a_long_run_cost_at_most_one_percent(total_steps):
    ledger = Ledger()
    control = Control(total_steps=total_steps, reference_costs=COSTS)
    sifter = sifter_of(models.ladder(), mode="auto", family=models.LADDER, control=control, ledger=ledger)
    (pool,) = sequence("n")
    for _ in range(1500):
        sifter.sift(pool)
    probes = len(ledger.times_ms("probe"))
    assert 0.8 <= probes * COSTS["probe"] / (1500 * COSTS["train"]) / 0.01 <= 1


def test_without_reference_costs_prices_are_the_times_that_were_measured():
    now = [0.0]
    ledger = Ledger(clock=lambda: now[0])
    run = Auto(reference_costs=None, sifter={"ledger": ledger}, depths=(1, 2, 3), lr=0.0)

    def spend(module, args, output):
        now[0] += len(args[0]) * 1e-3  # a layer takes a millisecond per row

    for rung in run.model.rungs:
        rung.register_forward_hook(spend)
    # A backward pass takes twice as long.
    run.model.head.weight.register_hook(lambda gradient: now.__setitem__(0, now[0] + 32 * 8e-3))
    run.go(sequence("l" * 40))
    assert ledger.medians_ms()["probe"] == pytest.approx(64 * 4 + 64 * 2, rel=0.4)  # and scoring at a depth in turn
    told = [row["control"] for row in run.rows if "control" in row][-1]
    for depth in (1, 2, 3):
        assert told[f"cost.{depth}.0.5"] == pytest.approx(1 + 64 * depth / (32 * 12))
    timed = [name for name in ledger.medians_ms() if name.startswith("score_")]
    assert sorted(timed) == ["score_1", "score_2", "score_3"]
    counts = [len(ledger.times_ms(name)) for name in timed]
    assert max(counts) - min(counts) <= 1


def test_a_loop_that_times_its_training_is_charged_that_and_not_what_else_it_does():
    now = [0.0]
    ledger = Ledger(clock=lambda: now[0])
    control = Control(probe_share=0.2)
    sifter = sifter_of(models.ladder(), mode="auto", family=models.LADDER, control=control, ledger=ledger)

    def work(module, args, output):
        now[0] += len(args[0]) * 1e-3  # a layer takes a millisecond per row

    for rung in sifter.model.rungs:
        rung.register_forward_hook(work)
    rows = []
    for pool in sequence("l" * 10):
        sifter.sift(pool)
        with ledger.timed("train"):
            now[0] += 100e-3
        now[0] += 5.0  # an evaluation, say
        rows.append(ledger.end())
    told = [row["control"] for row in rows if "control" in row][-1]
    assert told["cost.1.0.5"] == pytest.approx(1 + 64 / 100)


def test_a_loop_that_reads_only_what_is_wanted_trains_on_the_same_batches():
    def first_rows(sifter, pool):
        return pool[0][: sifter.wanted], pool[1][: sifter.wanted]

    pools = sequence(TURNING)
    whole = Auto(sifter={"kept": 32}).go(pools)
    lean = Auto(sifter={"kept": 32}).go(pools, offered=first_rows)
    assert lean.picks == whole.picks
    assert lean.events == whole.events != []
    for row in lean.rows:
        expected = 64 if "control" in row else row.get("scored", 32)
        assert row["candidates"] == expected
    assert {row["candidates"] for row in lean.rows} == {32, 64}


def test_wanted_is_the_whole_pool_in_fixed_mode_and_unknown_before_the_number_kept_is():
    model, _ = classifier()
    sifter = sifter_of(model, keep=0.25)
    with pytest.raises(ValueError, match=r"known after the first pool\. Pass kept= to know it before"):
        _ = sifter.wanted
    sifter.sift(features(16))
    assert sifter.wanted == 16
    assert sifter_of(model, keep=0.25, kept=3).wanted == 12


def test_candidates_of_auto_are_what_the_model_and_the_pool_allow():
    def allowed(**options):
        sifter = sifter_of(models.ladder(), **{"mode": "auto", "family": models.LADDER} | options)
        control = sifter.state_dict()["config"]["control"]
        return control["depths"], control["keeps"]

    assert allowed() == ([1, 2, 3], [0.5, 0.67])
    assert allowed(depth=2, keep=0.4) == ([1, 2, 3], [0.4, 0.5, 0.67])
    assert allowed(keep=0.6) == ([1, 2, 3], [0.6, 0.67])  # the pool is no larger than b / keep
    assert allowed(control=Control(depths=(2, 3, 4, 12))) == ([1, 2, 3], [0.5, 0.67])
    assert allowed(depth=3, exit_head=ExitHead(16)) == ([3], [0.5, 0.67])  # an exit head belongs to one depth


def test_a_probe_outside_of_steps_tells_what_a_record_tells_and_changes_nothing():
    run = Auto().go(sequence("l" * 4))
    pool = sequence("l" * 5)[4]
    before = run.save()
    numbers = run.sifter.probe(pool)
    assert values(run.save()) == values(before)
    assert run.sifter.ledger.end() == {}
    control = Control(depths=(1, 2, 3), keeps=(0.5, 0.67))
    assert set(numbers) == set(probes.record_names(control))
    assert numbers == run.sifter.probe(pool)
    fixed = sifter_of(run.model, family=models.LADDER)
    assert fixed.probe(pool) == numbers
    exact = scorers.exact_loss(run.model, pool, family=models.LADDER, dtype=None)
    for measure in (ENTROPY, MARGIN):
        sifter = sifter_of(run.model, family=models.LADDER, score=measure.name)
        scores = scorers.at_exit(measure, 2)(run.model, pool, family=models.LADDER, dtype=None)
        assert sifter.probe(pool)["gain.2.0.5"] == pytest.approx(fidelity(scores, exact, 32)["gain"])


@pytest.mark.parametrize("at_probe", [True, False])
def test_a_pool_refused_in_auto_mode_changes_nothing(at_probe, caplog):
    pools = sequence("l" * 16)
    run, untouched = (told_to(Auto().go(pools[:4]), "greedy", 1, 0.5) for _ in range(2))
    for each in (run, untouched):
        state = each.save()[0]
        state["steering"]["next_probe"] = 4 if at_probe else 10
        each.sifter.load_state_dict(state)
    before = run.save()[0]
    caplog.clear()
    inputs, labels = pools[4]
    for pool, message in (
        ((inputs, torch.full_like(labels, -100)), "None of the 64 candidates has a labelled position"),
        ((torch.full_like(inputs, NAN), labels), "Expected at least 32 candidates with a finite score"),
    ):
        with pytest.raises(ValueError, match=message):
            run.sifter.sift(pool)
        assert values(run.save()[0]) == values(before)
    assert caplog.records == []
    run.go(pools[4:])
    untouched.go(pools[4:])
    assert run.picks == untouched.picks
    assert values(run.save()[0]) == values(untouched.save()[0])


def test_a_probe_of_a_broken_pool_is_forgotten_and_training_goes_on(tmp_path):
    pools = sequence("l" * 7)
    pools[3] = (pools[3][0], torch.full_like(pools[3][1], -100))
    run = Auto(sifter={"ledger": Ledger(tmp_path / "steps.jsonl")}).go(pools[:4])
    assert run.rows[3]["control"] == {}
    assert all(math.isfinite(value) for value in run.sifter.stats().values())
    run = run.load(run.save()).go(pools[4:])
    assert run.probes == [3, 6]
    assert len(run.sifter.state_dict()["steering"]["records"]) == 1
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert rows[6]["control"]["noise_scale"] is not None


def test_a_row_of_an_auto_step_tells_its_work():
    run = Auto().go(sequence("l" * 12))
    by_step = {row["step"]: row for row in run.rows}
    probed, plain, selected = by_step[3], by_step[4], by_step[11]
    assert {"probe_ms", "probed", "probed_flops", "rank_correlation", "gain", "control"} <= set(probed)
    assert not {"probe_ms", "probed", "control", "event", "scored", "score_ms", "depth"} & set(plain)
    assert {"scored", "score_ms", "scored_flops", "depth"} <= set(selected)
    assert (probed["mode"], plain["mode"], selected["mode"]) == ("off", "off", "greedy")
    assert run.sifter.stats()["sift/rank_correlation"] == by_step[9]["rank_correlation"]
    assert run.sifter.stats()["sift/scored"] == sum(row.get("scored", 0) for row in run.rows)


def test_a_schedule_still_tells_when_auto_may_select():
    run = told_to(Auto(sifter={"schedule": warmup(3)}).go(sequence("l")), "greedy", 1, 0.5)
    run.go(sequence("l" * 5)[1:])
    assert [row.get("scored", 0) for row in run.rows[1:]] == [0, 0, 64, 64]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "manual"}, r"mode must be fixed or auto, got 'manual'\."),
        (
            {"keep": 1.0},
            r"needs keep below 1, got score='loss', keep=1\.0\. Use score='loss', 'entropy'.*, or mode=",
        ),
        ({"score": "exact"}, r"chooses among early exits .* got score='exact', keep=0\.5\."),
        ({"score": "uniform"}, r"chooses among early exits .* got score='uniform'"),
        ({"score": lambda model, pool: torch.zeros(8)}, r"chooses among early exits .* got score='.*<lambda>'"),
        ({"family": Family("rungs", (), "sequence_classification")}, r"family row that names the head of Ladder"),
        ({"control": Control(reference_costs={"train": 1.0, "score_1": 1.0})}, r"reference_costs of probe, score_1"),
    ],
)
def test_what_auto_mode_cannot_do_is_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        sifter_of(models.ladder(), **{"mode": "auto", "family": models.LADDER} | options)


def test_a_control_without_auto_mode_is_refused():
    with pytest.raises(ValueError, match=r"control was given, but mode='fixed' ignores it\. Set mode='auto'\."):
        sifter_of(models.ladder(), family=models.LADDER, control=Control())


def test_the_state_of_another_mode_or_control_is_refused():
    def state(**options):
        return sifter_of(models.ladder(), family=models.LADDER, **options).state_dict()

    sifter = sifter_of(models.ladder(), family=models.LADDER, mode="auto")
    sifter.load_state_dict(state(mode="auto"))
    with pytest.raises(ValueError, match=r"control: .*; mode: saved 'fixed', now 'auto'"):
        sifter.load_state_dict(state())
    with pytest.raises(ValueError, match=r"\(control: saved .*'total_steps': 100,.*, now .*'total_steps': None"):
        sifter.load_state_dict(state(mode="auto", control=Control(total_steps=100)))


# Several processes


RANK = """
import hashlib, json, sys, warnings
import torch, models
from torch import nn
from earlysift import Sifter
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=int(sys.argv[3]))
model = models.build("bert", "masked_lm")
wrapped = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
generator = torch.Generator().manual_seed(100 + rank)
sifter = Sifter(wrapped, keep=0.5, schedule=lambda step: step % 2, probe_every=3)
picks = []
for _ in range(6):
    pool = models.batch_for(model, "masked_lm", 12, 8, generator)
    batch = sifter.sift(pool)
    picks.append(sifter.selection.indices.tolist())
    wrapped(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
weights = hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()
print(json.dumps({"picks": picks, "weights": weights, "state": sifter.state_dict()}))
torch.distributed.destroy_process_group()
"""


def test_two_ranks_keep_the_same_number_pick_their_own_and_stay_in_step(tmp_path):
    first, second = on_ranks(2, RANK, tmp_path)
    assert {len(indices) for indices in first["picks"] + second["picks"]} == {6}
    # Every other step is uniform: there, ranks must not draw alike.
    assert all(mine != other for mine, other in zip(first["picks"][::2], second["picks"][::2], strict=True))
    assert first["weights"] == second["weights"]
    assert first["state"]["config"] == second["state"]["config"]


AUTO_RANK = """
import json, sys, time
import torch, models
from torch import nn
from earlysift import Sifter
from earlysift.control import Control
rank, store = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=int(sys.argv[3]))


def run(costs):
    model = nn.parallel.DistributedDataParallel(models.ladder())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    control = Control(probe_share=0.2, reference_costs=costs)
    sifter = Sifter(model, family=models.LADDER, mode="auto", control=control, dtype=None)
    rows = []
    for step in range(60):
        generator = torch.Generator().manual_seed(1000 * (1 + rank) + step)
        pool = models.unlearnable if 20 <= step < 30 else models.mostly_learnt
        inputs, labels = sifter.sift(pool(generator))
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            sifter.weights  # looked at for a log, on one rank only
        else:
            time.sleep(0.002)  # ranks differ in their times
        row = sifter.ledger.end()
        rows.append({key: row.get(key) for key in ("step", "mode", "event", "control", "scored")})
    return {"rows": rows, "steering": sifter.state_dict()["steering"], "batch": inputs.tolist()}


given = run({"train": 100.0, "probe": 60.0, "score_1": 1.0, "score_2": 2.0, "score_3": 3.0})
measured = run(None)
print(json.dumps([given, measured]))
torch.distributed.destroy_process_group()
"""


def test_two_ranks_with_data_of_their_own_decide_alike_at_the_same_steps(tmp_path):
    one, other = on_ranks(2, AUTO_RANK, tmp_path)
    for first, second in zip(one, other, strict=True):  # with costs that are given, and with measured ones
        assert first["rows"] == second["rows"]
        assert first["steering"] == second["steering"]
        assert first["batch"] != second["batch"]
        assert any(row["control"] for row in first["rows"])
    given = one[0]["rows"]
    assert {row["mode"] for row in given} == {"off", "greedy"}
    assert len([row for row in given if row["event"]]) >= 3


# Devices


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_weights_and_batch_are_on_the_device_of_the_pool():
    model = build("plain", "sequence_classification").cuda()
    pool = tuple(tensor.cuda() for tensor in features())
    for select in (greedy, proportional, percentile):
        for intensity in (1.0, 0.0):
            sifter = sifter_of(model, select=select, schedule=constant(intensity))
            batch = sifter.sift(pool)
            assert {tensor.device for tensor in batch} == {pool[0].device}
            assert sifter.weights.device == pool[0].device, (select, intensity)
            scorers.training_loss(model, batch, family=row_of(model), weights=sifter.weights).backward()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"score": "entropy"}, {"schedule": constant(0.5)}, {"keep": 1.0}])
@pytest.mark.parametrize("task", ["masked_lm", "sequence_classification"])
def test_steps_make_the_host_wait_for_nothing_on_a_gpu(task, options, tmp_path, no_waiting):
    # Attention masks are left out, as transformers asks whether they hide anything.
    family = "bert" if task == "masked_lm" else "plain"
    model = build(family, task).cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    pools = [tuple(tensor.cuda() for tensor in features(seed=seed)) for seed in range(8)]
    if task == "masked_lm":
        pools = [{name: pool[name].cuda() for name in ("input_ids", "labels")} for pool in pools_for(model, 8)]
        options = {"max_positions": 2, **options}
    sifter = sifter_of(model, ledger=Ledger(tmp_path / "steps.jsonl"), **options)

    def train(pool):
        batch = sifter.sift(pool)
        loss = model(**batch).loss if task == "masked_lm" else F.cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for pool in pools[:3]:
        train(pool)
    with no_waiting():
        for pool in pools[3:]:
            train(pool)
        sifter.ledger.end()
    rows = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(8))
    assert all(isinstance(row["trained_flops"], float) for row in rows)
    assert all(row["non_finite"] == row["unlabelled"] == 0 for row in rows if "scored" in row)


def broken_features(seed=0):
    """Candidates of which too few have a finite score."""
    inputs, labels = features(seed=seed)
    inputs[2:] = NAN
    return inputs, labels


@pytest.fixture
def late(monkeypatch):
    """From its call on it is as on an accelerator: no number is there before somebody reads it."""
    return lambda: monkeypatch.setattr(pending, "_AT_ONCE", set())


@pytest.mark.parametrize("task", ["masked_lm", "causal_lm", "sequence_classification"])
@pytest.mark.parametrize("options", [{}, {"probe_every": 2}, {"schedule": constant(0.5)}, {"mode": "auto"}], ids=list)
def test_picks_rows_and_counts_are_the_same_whenever_their_numbers_come(task, options, late, tmp_path):
    model = build("bert" if task != "causal_lm" else "gpt2", task)
    pools = pools_for(model, 4)
    for pool in pools[1:3]:
        pool["labels"][:6] = -100

    def run(name):
        sifter = sifter_of(model, ledger=Ledger(tmp_path / name), **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            chosen = picks(sifter, pools)
        stats, state = sifter.stats(), values(sifter.state_dict())
        sifter.ledger.end()
        rows = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        times = [numbers.pop(name) for numbers in (*rows, stats) for name in list(numbers) if name.endswith("_ms")]
        assert len(times) > len(rows)
        return chosen, rows, stats, state, [str(warning.message) for warning in caught]

    at_once = run("at once")
    late()
    assert run("late") == at_once


def test_scores_that_come_late_are_refused_by_the_next_call_which_names_their_step(late):
    model, _ = classifier()
    usable, broken, label_less = features(), broken_features(seed=1), features(seed=2)
    label_less[1][:] = -100
    expected = picks(sifter_of(model), [usable])
    late()
    sifter = sifter_of(model)
    assert picks(sifter, [usable]) == expected
    assert len(sifter.sift(broken)[1]) == 4  # handed out, as nobody has looked yet
    assert sifter.stats()["sift/non_finite"] == 6  # which refuses nothing
    before = values(sifter.state_dict())
    with pytest.raises(Unusable, match=r"at least 4 candidates with a finite score, got 2 of 8 at step 1: 6 are nan"):
        sifter.sift(usable)
    assert values(sifter.state_dict()) == before
    assert picks(sifter, [usable]) == expected  # refused once
    sifter.judge()
    sifter.sift(label_less)
    with pytest.raises(ValueError, match=r"None of the 8 candidates at step 3 has a labelled position"):
        sifter.sift(usable)
    assert sifter.step == 4
    assert sifter.stats()["sift/unlabelled"] == 8


def test_a_warning_of_scores_that_come_late_is_given_once_and_points_to_the_loop(late):
    model, _ = classifier()
    pool = features()
    pool[0][0] = INF
    late()
    sifter = sifter_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sifter.sift(pool)
        sifter.stats()
    with pytest.warns(UserWarning, match=r"1 of 8 scores are nan or inf at step 0") as caught:
        sifter.sift(pool)
    assert [warning.filename for warning in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sifter.sift(pool)
    assert sifter.stats()["sift/non_finite"] == 3


def test_a_loop_may_ask_for_the_refusal_before_it_updates(late):
    model, _ = classifier()
    broken = broken_features()
    late()
    sifter = sifter_of(model)
    sifter.sift(broken)
    with pytest.raises(Unusable, match=r"got 2 of 8 at step 0"):
        sifter.judge()
    sifter.sift(features())
    sifter.judge()
    assert (sifter.step, sifter.stats()["sift/non_finite"]) == (2, 6)


@pytest.mark.parametrize("kind", ["probe", "exit head"])
def test_steps_that_wait_anyway_refuse_at_once(kind, late):
    model, _ = classifier()
    broken = broken_features()
    options = {"probe_every": 1}
    if kind == "exit head":
        head = ExitHead(WIDTH)
        options = {"exit_head": head, "exit_optimizer": torch.optim.SGD(head.parameters(), lr=0.1)}
    late()
    sifter = sifter_of(model, **options)
    before = values(sifter.state_dict())
    with pytest.raises(Unusable, match=r"got 2 of 8 at step 0"):
        sifter.sift(broken)
    assert values(sifter.state_dict()) == before


def test_a_loaded_state_is_not_judged_by_what_came_before_it(late):
    model, _ = classifier()
    broken = broken_features()
    late()
    sifter = sifter_of(model)
    state = sifter.state_dict()
    sifter.sift(broken)
    sifter.load_state_dict(state)
    sifter.sift(features())
    assert sifter.stats()["sift/non_finite"] == 0


def test_no_warning_is_given_without_a_reason():
    model = build("bert", "masked_lm")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sifter = sifter_of(model, probe_every=1, drop_outliers=0.1, select=selectors.proportional)
        assert len(picks(sifter, pools_for(model, 3))) == 3


def test_flops_of_a_scorer_of_ones_own_are_not_guessed():
    model = build("bert", "masked_lm").train()
    ids = torch.randint(5, 90, (8, 12), generator=Generator().manual_seed(0))
    pool = {"input_ids": ids, "labels": ids}
    ledger = Ledger()
    sifter = Sifter(model, score=lambda model, pool: torch.arange(8.0), probe_every=0, ledger=ledger)
    sifter.sift(pool)
    row = ledger.end()
    assert row["scored"] == 8
    assert "scored_flops" not in row
    assert row["trained_flops"] > 0
