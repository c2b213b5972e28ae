"""Remembered losses: those of a dictionary, unseen samples first, the same after every resume, at no cost."""

import copy
import io
import math
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import models
from earlysift import SiftConfig, Sifter, loss_memory, scorers, selectors
from earlysift.loss_memory import LossMemory
from earlysift.pools import LARGEST_ID
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


def memory_of(sifter):
    sifter.state_dict()  # which takes in what was observed
    return sifter._runner.learnt.memory


def seen(sifter):
    """Samples whose loss is known."""
    return int((~sifter.state_dict()["memory"]["losses"].isnan()).sum())


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


# Bounds


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="the system does not tell what is mapped")
def test_a_large_memory_lies_in_a_file_without_a_name_and_is_otherwise_the_same(monkeypatch, tmp_path):
    monkeypatch.setattr(loss_memory, "MAPPED_BYTES", 8 * 50)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    memory, twin = LossMemory(), Twin()
    for step in range(30):
        generator = torch.Generator().manual_seed(step)
        ids = torch.randperm(10 * (step + 1), generator=generator)[:8]
        torch.testing.assert_close(memory.recall(ids), twin.recall(ids))
        losses = torch.rand(8, generator=generator)
        memory.observe(ids, losses, step)
        twin.observe(ids, losses)
        mapped = str(tmp_path) in Path("/proc/self/maps").read_text()
        assert mapped == (len(memory.state_dict()["losses"]) > 50)
    assert mapped
    assert list(tmp_path.iterdir()) == []  # nothing to be left behind, however the process ends
    other, ids = LossMemory(), torch.arange(300)
    other.load_state_dict(memory.state_dict())
    for found in (other, copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        torch.testing.assert_close(found.look(ids, 0)[0], memory.look(ids, 0)[0], equal_nan=True)
    memory.observe(torch.tensor([1]), torch.tensor([77.0]), 1)
    assert other.recall(torch.tensor([1])) != 77
    saved = memory.state_dict()
    del memory, other, found
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert saved["losses"][1] == 77


FULL = """
import resource, signal, torch
from earlysift import loss_memory
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
memory = loss_memory.LossMemory()
memory.observe(torch.tensor([3]), torch.tensor([0.5]), 0)
try:
    memory.observe(torch.tensor([2**26]), torch.tensor([0.5]), 1)
except OSError as error:
    print(error)
print(memory.recall(torch.tensor([3])).tolist())
"""


def test_a_disk_without_room_is_an_error_that_names_the_way_out_and_keeps_what_was_known():
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "losses of 67108865 samples takes two files of 256 MiB" in done.stdout
    assert "Set TMPDIR to a folder that has room" in done.stdout
    assert done.stdout.endswith("[0.5]\n")


def test_where_the_number_of_samples_is_known_larger_ids_are_refused_and_nothing_changes():
    sifter = remembering(build("bert", "masked_lm").train(), samples=SAMPLES)
    (pool,) = pools(1)
    sifter.sift(pool)
    wrong = pool["number"].clone()
    wrong[3] = SAMPLES
    with pytest.raises(ValueError, match=r"Expected ids in 0\.\.39, got \d to 40\. Number the samples"):
        sifter.sift(pool | {"number": wrong})
    assert sifter.step == 1


def test_numbers_that_go_on_rising_in_the_second_epoch_are_refused_with_the_way_out():
    sifter = remembering(build("bert", "masked_lm").train(), samples=R)
    (pool,) = pools(1)
    sifter.sift(pool | {"number": torch.arange(R)})
    with pytest.raises(ValueError, match=r"^Expected ids in 0\.\.15, got 16 to 31\. .*, and alike in every epoch\.$"):
        sifter.sift(pool | {"number": R + torch.arange(R)})
    assert sifter.step == 1
    unknown = remembering(build("bert", "masked_lm").train())  # which grows with the ids, up to 2 GiB
    with pytest.raises(ValueError, match=r"^Expected ids in 0\.\.268435455, got 268435455 to 268435470\. .* epoch\.$"):
        unknown.sift(pool | {"number": LARGEST_ID + torch.arange(R)})
    assert unknown.step == 0


def test_a_state_of_another_memory_is_refused_with_the_way_out_and_nothing_is_loaded():
    model = build("bert", "masked_lm").train()
    sifter = remembering(model)
    trained(model, sifter, pools(3))
    state = sifter.state_dict()
    largest = int((~state["memory"]["losses"].isnan()).nonzero().max())
    for memory, message in (
        (LossMemory(largest), rf"reach to sample {largest}, and the data set has {largest} samples now\. Resume with"),
        (
            LossMemory(ranks=3),
            r"ranks was 1 when they were saved, and is 3 now\. Resume with 1\. Nothing was loaded",
        ),
    ):
        other = remembering(model)
        other._runner.learnt = scorers.Learnt(memory=memory)
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert (other.step, memory.seen) == (0, 0)
    of_second = LossMemory(rank=1, ranks=2)
    assert "are those of rank 0, and this is rank 1. Load this" in of_second.misfit(LossMemory(ranks=2).state_dict())
    fitting = remembering(model, samples=largest + 1)
    fitting.load_state_dict(state)
    assert fitting.step == 3


def new_samples(count, start=0):
    for number, pool in enumerate(pools(count)):
        yield pool | {"number": torch.arange(R) + R * (start + number)}


def test_where_no_sample_ever_returns_it_says_so_once_and_selects_uniformly_from_then_on(monkeypatch, caplog):
    monkeypatch.setattr(loss_memory, "NEVER_RETURNED", 3 * R)
    model = build("bert", "masked_lm").train()
    sifter = remembering(model, probe_every=0)
    chosen = [[i % R for i in ids] for ids in trained(model, sifter, new_samples(3))]
    assert chosen == [[0, 1, 2, 3]] * 3  # all are new: the first ones
    assert caplog.text.count("None of 48 candidates had been trained on before") == 1
    before = memory_of(sifter).seen
    later = [[i % R for i in ids] for ids in trained(model, sifter, new_samples(20, start=3))]
    assert len({i for ids in later for i in ids}) == R
    assert memory_of(sifter).seen == before
    assert "scored" not in sifter.ledger.end()
    assert caplog.text.count("None of") == 1
    resumed = remembering(model, probe_every=0)
    resumed.load_state_dict(sifter.state_dict())
    assert memory_of(resumed).is_useless
    # Two epochs are waited for, where their length is known.
    patient = remembering(model, probe_every=0, samples=4 * R)
    trained(model, patient, new_samples(3))
    assert not memory_of(patient).is_useless


def test_one_sample_that_returns_is_enough_to_go_on(monkeypatch, caplog):
    monkeypatch.setattr(loss_memory, "NEVER_RETURNED", 3 * R)
    model = build("bert", "masked_lm").train()
    sifter = remembering(model, probe_every=0)
    trained(model, sifter, new_samples(2))
    trained(model, sifter, new_samples(1))
    trained(model, sifter, new_samples(9, start=2))
    assert "None of" not in caplog.text
    assert not memory_of(sifter).is_useless


# Uses


def test_a_pool_may_hold_copies_of_a_sample():
    model = build("bert", "masked_lm").train()
    sifter = remembering(model, probe_every=0)
    (pool,) = pools(1)
    pool |= {"number": torch.tensor([5, 5, 5, 5, *range(6, 18)])}
    sifter.sift(pool)
    sifter.observe(torch.tensor([1.0, 2.0, 3.0, 6.0]))
    assert memory_of(sifter).recall(torch.tensor([5])).tolist() == [3.0]


def test_a_loop_that_sifts_ahead_remembers_by_the_batches_it_kept():
    model = build("bert", "masked_lm").train()
    sifter = remembering(model, probe_every=0)
    kept = []
    for micro_step, pool in enumerate(pools(2)):
        sifter.sift(pool, micro_step=micro_step)
        kept.append(sifter.latest)
    for number, batch in enumerate(kept):
        sifter.observe(torch.full((B,), float(number)), batch)
    kept = [batch.ids for batch in kept]
    both = set(kept[0].tolist()) & set(kept[1].tolist())
    expected = [0.0 if i not in both else 1.0 for i in kept[0].tolist()]
    assert memory_of(sifter).look(kept[0], 0)[0].tolist() == expected
    assert memory_of(sifter).look(kept[1], 0)[0].tolist() == [1.0] * B


def test_weights_of_the_unbiased_rule_are_right_for_stale_losses():
    memory, losses = LossMemory(), torch.rand(R, generator=torch.Generator().manual_seed(1)) * 5
    memory.observe(torch.arange(R), losses, 0)
    model, means = build("plain", "masked_lm").train(), []
    for seed in range(400):
        options = {"select": selectors.proportional, "family": row_of(model), "seed": seed}
        sifter = remembering(model, probe_every=0, **options)
        sifter._runner.learnt.memory.load_state_dict(memory.state_dict())
        sifter.sift(next(pools(1)) | {"number": torch.arange(R)})
        kept = losses[sifter.selection.indices]
        means.append([float((sifter.weights * kept).mean()), float(kept.mean())])
    weighted, plain = torch.tensor(means).mean(dim=0).tolist()
    assert weighted == pytest.approx(float(losses.mean()), rel=0.03)
    assert plain > 1.1 * float(losses.mean())
