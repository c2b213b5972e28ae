"""Remembered losses: those of a dictionary, unseen samples first, the same after every resume, at no cost."""

import copy
import io
import math

import pytest
import torch

import models
from earlysift import SiftConfig, Sifter, scorers
from earlysift.loss_memory import LossMemory
from models import build, row_of

NAN = float("nan")
SAMPLES, R, B = 40, 16, 4


class Twin:
    """The slow twin: a dictionary."""

    def __init__(self):
        self.losses = {}

    def recall(self, ids):
        known = [self.losses[i] for i in ids.tolist() if math.isfinite(self.losses.get(i, NAN))]
        first = max(known) + 1 if known else 1.0
        return torch.tensor([self.losses.get(i, first) for i in ids.tolist()])

    def observe(self, ids, losses):
        self.losses |= {
            i: loss
            for i, loss in zip(ids.tolist(), losses.tolist(), strict=True)
            if math.isfinite(loss) or loss == -math.inf
        }


def data():
    ids = torch.randint(3, models.VOCABULARY, (SAMPLES, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": torch.where(ids % 3 == 0, ids, -100), "number": torch.arange(SAMPLES)}


def pools(count, start=0):
    for step in range(start, start + count):
        chosen = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(step))[:R]
        yield {name: rows[chosen] for name, rows in data().items()}


def remembering(model, **options):
    return Sifter(model, keep=B / R, score="memory", sample_id="number", **options)


def trained(model, sifter, pools):
    """Ids of the batches, in a loop that trains."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    chosen = []
    for pool in pools:
        batch = sifter.sift(pool)
        sifter.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        chosen.append(sifter.ids.tolist())
    return chosen


def seen(sifter):
    """Samples whose loss is known."""
    return int(sifter.state_dict()["memory"]["losses"].isfinite().sum())


def test_recall_and_observe_are_those_of_a_dictionary():
    memory, twin = LossMemory(), Twin()
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randperm(200, generator=generator)[:12]
        torch.testing.assert_close(memory.recall(ids), twin.recall(ids))
        losses = torch.rand(5, generator=generator)
        losses[step % 5] = [NAN, math.inf, 0.5, -math.inf][step % 4]
        memory.observe(ids[:5], losses, step)
        twin.observe(ids[:5], losses)
    assert memory.seen == len(twin.losses)


def test_copies_of_a_sample_share_the_mean_of_their_losses():
    memory = LossMemory()
    memory.observe(torch.tensor([5, 2, 5]), torch.tensor([1.0, 4.0, 2.0]), step=0)
    assert memory.recall(torch.tensor([2, 5, 5])).tolist() == [4.0, 1.5, 1.5]


def test_ages_are_steps_since_the_loss_was_observed():
    memory = LossMemory()
    memory.observe(torch.tensor([2, 0]), torch.tensor([1.0, 2.0]), step=3)
    memory.observe(torch.tensor([0]), torch.tensor([1.0]), step=5)
    _, ages = memory.look(torch.tensor([0, 1, 2, 9]), step=9)
    torch.testing.assert_close(ages, torch.tensor([4.0, NAN, 6.0, NAN]), equal_nan=True)


def test_batches_are_the_unseen_first_and_then_the_largest_remembered_losses():
    model = build("bert", "masked_lm").train()
    sifter, twin = remembering(model), Twin()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for pool in pools(12):
        expected = twin.recall(pool["number"]).argsort(descending=True, stable=True)[:B].sort().values
        batch = sifter.sift(pool)
        assert sifter.ids.tolist() == pool["number"][expected].tolist()
        assert "number" not in batch
        assert torch.equal(batch["input_ids"], pool["input_ids"][expected])
        sums, counts = scorers.sample_losses(model, batch)
        twin.observe(sifter.ids, torch.where(counts > 0, sums / counts, -math.inf))
        sifter.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert seen(sifter) > 2 * B


def test_its_loss_is_the_training_loss_bit_for_bit():
    model = build("bert", "masked_lm").eval()
    (pool,) = pools(1)
    sifter = remembering(model.train())
    batch = sifter.sift(pool)
    model.eval()  # no dropout between the two
    weights = torch.tensor([1.0, 2.0, 0.5, 1.0])
    for options in ({}, {"weights": weights}, {"items": 7.0}):
        ours, theirs = sifter.loss(batch, **options), scorers.training_loss(model, batch, **options)
        assert torch.equal(ours, theirs)
        gradients = [torch.autograd.grad(loss, list(model.parameters()), allow_unused=True) for loss in (ours, theirs)]
        assert all(a is b or torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_observing_by_hand_is_what_the_loss_does():
    model = build("bert", "masked_lm").train()
    by_loss, by_hand = remembering(model), remembering(model)
    for pool in pools(6):
        batch, same = by_loss.sift(pool), by_hand.sift(pool)
        assert torch.equal(batch["input_ids"], same["input_ids"])
        with torch.random.fork_rng():
            by_loss.loss(batch)
        sums, counts = scorers.sample_losses(model, same)
        by_hand.observe(sums / counts)
    assert by_loss.ids.tolist() == by_hand.ids.tolist()


@pytest.mark.parametrize("cut", [1, 5])
def test_a_resumed_run_makes_the_same_picks(cut):
    model = build("bert", "masked_lm").train()
    sifter = remembering(model)
    trained(model, sifter, pools(cut))
    saved = io.BytesIO()
    torch.save({"model": model.state_dict(), "sifter": sifter.state_dict()}, saved)
    saved.seek(0)
    state = torch.load(saved, weights_only=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        expected = trained(model, sifter, pools(6, cut))
    other = build("bert", "masked_lm").train()
    other.load_state_dict(state["model"])
    resumed = remembering(other)
    resumed.load_state_dict(state["sifter"])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert trained(other, resumed, pools(6, cut)) == expected


def test_uniform_steps_feed_the_memory_and_score_nothing():
    model = build("bert", "masked_lm").train()
    sifter = remembering(model, schedule=lambda step: float(step >= 4))
    chosen = trained(model, sifter, pools(4))
    assert seen(sifter) == len({i for ids in chosen for i in ids})
    whole = Sifter(model, keep=1.0, score="memory", sample_id="number")
    batch = whole.sift(next(pools(1)))
    assert "number" not in batch
    whole.loss(batch)
    assert seen(whole) == R


def test_scoring_runs_no_layer():
    model = build("bert", "masked_lm").train()
    sifter = remembering(model, probe_every=0)
    calls = []
    with model.register_forward_pre_hook(lambda module, inputs: calls.append(1)):
        sifter.sift(next(pools(1)))
    assert calls == []
    assert "scored_flops" not in sifter.ledger.end()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"number": None}, r"Expected the samples' ids, int64 \(16,\), under 'number' in the pool, got NoneType"),
        ({"number": torch.arange(R).float()}, r"got torch.float32 \(16,\)"),
        ({"number": torch.arange(R)[:, None]}, r"got torch.int64 \(16, 1\)"),
        ({"number": torch.arange(R) - 1}, r"Expected ids in 0\.\.268435455, got -1 to 14"),
        ({"number": torch.arange(R) + 2**40}, r"Expected ids in 0\.\.268435455"),
    ],
)
def test_ids_that_cannot_tell_samples_apart_are_refused_and_nothing_changes(change, message):
    sifter = remembering(build("bert", "masked_lm").train())
    pool = next(pools(1)) | change
    pool = {name: rows for name, rows in pool.items() if rows is not None}
    before = copy.deepcopy(sifter.state_dict())
    with pytest.raises(ValueError, match=message):
        sifter.sift(pool)
    after = sifter.state_dict()
    for name in ("memory", "recent"):
        parts = [state.pop(name) for state in (before, after)]
        assert all(torch.equal(parts[0][part], parts[1][part]) for part in parts[0])
    assert after == before


def test_what_memory_cannot_do_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match=r"score='memory' needs the samples' ids\. Give sample_id"):
        SiftConfig(score="memory")
    with pytest.raises(ValueError, match=r"each rank's own candidates\. Use scope='local'"):
        SiftConfig(score="memory", sample_id="number", scope="global")
    with pytest.raises(ValueError, match=r"sample_id works on each rank's own candidates"):
        SiftConfig(sample_id="number", scope="global")
    with pytest.raises(ValueError, match="Auto mode chooses among early exits"):
        SiftConfig(score="memory", sample_id="number", mode="auto")
    model = build("bert", "masked_lm").train()
    sifter = remembering(model)
    with pytest.raises(ValueError, match=r"no batch yet that these could be the losses of\. Call sift first"):
        sifter.observe(torch.zeros(4))
    sifter.sift(next(pools(1)))
    with pytest.raises(ValueError, match=r"one loss per sample of the latest batch, a tensor \(4,\), got \(\) of"):
        sifter.observe(torch.tensor(1.0))


@pytest.mark.parametrize(
    "broken", [None, {}, {"losses": torch.zeros(3)}, {"losses": torch.zeros(3), "steps": torch.zeros(2).int()}, "x"]
)
def test_a_broken_memory_is_refused_and_nothing_is_loaded(broken):
    model = build("bert", "masked_lm").train()
    sifter = remembering(model)
    trained(model, sifter, pools(2))
    state = sifter.state_dict()
    assert LossMemory().state_problems(state["memory"]) == []
    before = seen(sifter)
    with pytest.raises(ValueError, match="memory must hold losses"):
        sifter.load_state_dict(state | {"memory": broken, "step": 0})
    assert (sifter.step, seen(sifter)) == (2, before)


def test_a_loaded_sifter_remembers_nothing_by_the_ids_of_a_pool_before_the_load():
    model = build("bert", "masked_lm").train()
    sifter = remembering(model)
    saved = sifter.state_dict()
    sifter.sift(next(pools(1)))
    sifter.load_state_dict(saved)
    assert sifter.ids is None
    with pytest.raises(ValueError, match="Call sift first"):
        sifter.observe(torch.zeros(B))


def test_a_probe_takes_the_ids_out_too():
    model = build("plain", "masked_lm").train()  # its forward knows no other keys
    pool, row = next(pools(1)), row_of(model)
    without = {name: rows for name, rows in pool.items() if name != "number"}
    assert Sifter(model, sample_id="number", family=row).probe(pool) == Sifter(model, family=row).probe(without)


def test_ids_are_taken_out_for_every_score():
    model = build("bert", "masked_lm").train()
    sifter = Sifter(model, keep=B / R, sample_id="number")
    pool = next(pools(1))
    assert "number" not in sifter.sift(pool)
    assert sifter.ids.tolist() == pool["number"][sifter.selection.indices].tolist()
