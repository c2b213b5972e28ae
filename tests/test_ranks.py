"""Selection over all ranks equals selection of one process on all candidates, on real gloo processes."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from earlysift import Sifter, ranks, selectors
from earlysift.loss_memory import LossMemory
from processes import on_ranks
from scorecard import FULL

SETUP = """
import json, sys
import torch, models
from earlysift import Family, Sifter, selectors
rank, store, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)

"""

GLOBAL = (
    SETUP
    + """
told = []
for name in ("greedy", "proportional"):
    model = models.build("bert", "masked_lm").train()
    select, score = getattr(selectors, name), models.score_by_labels
    sifter = Sifter(model, kept=3, score=score, select=select, scope="global", schedule=lambda step: 0.6)
    for step in range(8):
        pool = models.pool_of_rank(rank, step, 6 + (rank + step) % 3)  # ranks differ in their candidates
        batch = sifter.sift(pool)
        (extra,) = batch["extra"]
        told.append({
            "ids": batch["input_ids"].tolist(), "labels": batch["labels"].tolist(), "number": extra["number"].tolist(),
            "odd": extra["odd"].tolist(), "half": extra["half"].tolist(),
            "indices": sifter.selection.indices.tolist(), "weights": sifter.weights.tolist(),
            "scored": "scored" in sifter.ledger.end(),
        })
print(json.dumps(told))
torch.distributed.destroy_process_group()
"""
)


@pytest.mark.parametrize("count", [2, 4])
def test_global_scope_keeps_what_one_process_keeps_of_all_candidates(count, tmp_path):
    by_rank = on_ranks(count, GLOBAL, tmp_path)
    selecting = moved = 0
    for number in range(16):
        step, select = number % 8, (selectors.greedy, selectors.proportional)[number // 8]
        pools = [models.pool_of_rank(rank, step, 6 + (rank + step) % 3) for rank in range(count)]
        ids, labels = (torch.cat([pool[key] for pool in pools]) for key in ("input_ids", "labels"))
        numbers = torch.cat([pool["extra"][0]["number"] for pool in pools]).tolist()
        told = [ranks_told[number] for ranks_told in by_rank]
        assert len({entry["scored"] for entry in told}) == 1, "ranks select at the same steps"
        assert {len(entry["ids"]) for entry in told} == {3}
        if told[0]["scored"]:
            selecting += 1
            one = Sifter(
                models.build("bert", "masked_lm").train(),
                kept=3 * count,
                score=models.score_by_labels,
                select=select,
                probe_every=0,
            )
            one.load_state_dict({**one.state_dict(), "step": step})
            one.sift({"input_ids": ids, "labels": labels})
            weight_of = dict(zip(one.selection.indices.tolist(), one.weights.tolist(), strict=True))
            assert sorted(i for entry in told for i in entry["indices"]) == sorted(weight_of)
            for entry in told:
                assert entry["weights"] == [weight_of[i] for i in entry["indices"]]
        for rank, entry in enumerate(told):
            places = entry["indices"] if entry["scored"] else None
            if places is not None:
                assert entry["ids"] == ids[places].tolist()
                assert entry["labels"] == labels[places].tolist()
                assert entry["number"] == [numbers[place] for place in places]
                assert entry["half"] == ids[places][:, :3].bfloat16().tolist()
                moved += sum(value // 100 != rank for value in entry["number"])
            assert entry["odd"] == [value % 100 % 2 == 1 for value in entry["number"]]
    assert 4 <= selecting < 16
    assert moved > 0


REFUSED = (
    SETUP
    + """
model = models.build("bert", "masked_lm").train()
sifter = Sifter(model, kept=3, score=models.score_by_labels, scope="global", probe_every=0)
pool = models.pool_of_rank(rank, 0, 6)
if rank == 1:
    pool = {**pool, "input_ids": pool["input_ids"][:, :10], "labels": pool["labels"][:, :10]}
said = []
for offered in (pool, {**models.pool_of_rank(rank, 0, 6), "text": [str(i) for i in range(6)]}):
    try:
        sifter.sift(offered)
    except ValueError as error:
        said.append(str(error))
print(json.dumps([said, sifter.step]))
torch.distributed.destroy_process_group()
"""
)


def test_pools_whose_rows_cannot_change_places_are_refused_on_every_rank(tmp_path):
    for said, step in on_ranks(2, REFUSED, tmp_path):
        assert len(said) == 2
        assert all("Pad to a fixed length" in message for message in said)
        assert step == 0


PADDED = (
    SETUP
    + """
told = []
for side in ("right", "left"):
    for trim in (False, True):
        model = models.build("llama", "causal_lm", pad_token_id=7).train()
        key = {"right": "labels", "left": "targets"}[side]
        family = Family(labels=key)
        sifter = Sifter(model, kept=3, scope="global", probe_every=2, dtype=None, trim=trim, family=family)
        for step in range(4):
            pool = models.ragged_pool_of_rank(rank, step, side)
            pool[key] = pool.pop("labels")
            batch = sifter.sift(pool)
            batch["labels"] = batch.pop(key)
            model(**batch).loss.backward()
            told.append({
                "indices": sifter.selection.indices.tolist(), "offered": pool["input_ids"].size(1),
                **{name: values.tolist() for name, values in batch.items()},
            })
print(json.dumps(told))
torch.distributed.destroy_process_group()
"""
)


def padded(pools, side):
    """One pool of several: padded as a collator that saw them all would have."""
    length = max(pool["input_ids"].size(1) for pool in pools)
    fills = {"input_ids": 7, "attention_mask": 0, "labels": -100, "position_ids": 0}
    parts = {name: [] for name in pools[0]}
    for pool in pools:
        lack = length - pool["input_ids"].size(1)
        for name, values in pool.items():
            sides = (lack, 0) if side == "left" else (0, lack)
            parts[name].append(torch.nn.functional.pad(values, sides, value=fills[name]) if name in fills else values)
    return {name: torch.cat(values) for name, values in parts.items()}


def test_global_scope_pads_pools_of_different_lengths_as_one_collator_would(tmp_path):
    by_rank = on_ranks(2, PADDED, tmp_path)
    assert len({entry["offered"] for entry in by_rank[0]} ^ {entry["offered"] for entry in by_rank[1]}) > 0
    moved = 0
    for number, told in enumerate(zip(*by_rank, strict=True)):
        step, case = number % 4, number // 4
        side, trim = ("right", "left")[case // 2], case % 2 == 1
        pool = padded([models.ragged_pool_of_rank(rank, step, side) for rank in range(2)], side)
        model = models.build("llama", "causal_lm", pad_token_id=7).train()
        one = Sifter(model, kept=6, probe_every=0, dtype=None, trim=trim)
        one.sift(pool)
        assert sorted(told[0]["indices"] + told[1]["indices"]) == one.selection.indices.tolist()
        for rank, entry in enumerate(told):
            moved += sum(place // 6 != rank for place in entry["indices"])
            expected = {name: values[entry["indices"]] for name, values in pool.items()}
            if trim:
                used = expected["attention_mask"].any(dim=0).nonzero()
                expected = {
                    name: values[:, int(used[0]) : int(used[-1]) + 1] if values.ndim > 1 else values
                    for name, values in expected.items()
                }
            for name, values in expected.items():
                assert entry[name] == values.tolist(), name
    assert moved > 0


SHORT = (
    SETUP
    + """
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
told = {}
for kind in ("ddp", "fsdp"):
    for scope in ("local", "global"):
        inner = model = models.build("bert", "masked_lm").train()
        if kind == "fsdp":
            mesh = torch.distributed.init_device_mesh("cpu", (count,))
            for layer in inner.bert.encoder.layer:
                fully_shard(layer, mesh=mesh)
            fully_shard(inner, mesh=mesh)
        else:
            model = DistributedDataParallel(inner)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        sifter = Sifter(model, keep=0.25, scope=scope, probe_every=1, dtype=None)
        sizes = []
        for step, rows in enumerate(((12, 12), (12, 2), (5, 12), (1, 4), (12, 12))):
            pool = models.pool_of_rank(rank, step, rows[rank])
            pool["labels"][0] = 6
            batch = sifter.sift({name: pool[name] for name in ("input_ids", "labels")})
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            whole = sifter.selection.indices.tolist() == list(range(rows[rank]))
            sizes.append([len(batch["input_ids"]), whole, sifter.weights.tolist() == [1.0] * len(batch["labels"])])
            assert ("rank_correlation" in sifter.ledger.end()) == (rows[rank] >= 3)
        told[f"{kind} {scope}"] = sizes
print(json.dumps(told))
torch.distributed.destroy_process_group()
"""
)


def test_a_short_pool_on_one_rank_keeps_no_other_rank_waiting(tmp_path):
    first, second = on_ranks(2, SHORT, tmp_path)
    for kind in ("ddp", "fsdp"):
        # Fewer than three candidates are trained on whole, without a look at what the other rank has.
        assert first[f"{kind} local"] == [[3, False, True]] * 3 + [[1, True, True], [3, False, True]]
        assert second[f"{kind} local"] == [[3, False, True], [2, True, True], *[[3, False, True]] * 3]
        # Fourteen candidates are enough for both; five are not, and each rank then keeps what it can of its own.
        assert [size for size, _, _ in first[f"{kind} global"]] == [3, 3, 3, 1, 3]
        assert [size for size, _, _ in second[f"{kind} global"]] == [3, 3, 3, 3, 3]
        assert all(weighted for told in (first, second) for _, _, weighted in told[f"{kind} global"])


REMEMBERED = (
    SETUP
    + """
from earlysift import ranks
device, told = torch.device("cpu"), []
memory = ranks.memory()
for step in range(12):
    ids, losses = models.observed_on_rank(rank, step)
    told.append(ranks.recall(memory, ids, device).tolist())
    ranks.observe(memory, ids[: len(losses)], losses, step, device)
print(json.dumps([told, len(memory.state_dict()["losses"])]))
torch.distributed.destroy_process_group()
"""
)


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_recall_what_one_memory_that_saw_everything_would(count, tmp_path):
    by_rank = on_ranks(count, REMEMBERED, tmp_path)
    one, largest = LossMemory(), 0
    for step in range(12):
        parts = [models.observed_on_rank(rank, step) for rank in range(count)]
        for (ids, _), (told, _) in zip(parts, by_rank, strict=True):
            assert told[step] == one.recall(ids).tolist()
            largest = max(largest, int(ids.max()))
        ids, losses = (torch.cat(both) for both in zip(*((i[: len(x)], x) for i, x in parts), strict=True))
        one.observe(ids, losses, step)
    assert one.seen > 30
    for _, rows in by_rank:  # a part each, and a half more to grow
        assert rows <= 1.5 * (largest // count + 1)


SHARED = (
    SETUP
    + """
from torch.nn.parallel import DistributedDataParallel
from earlysift import scorers
model = DistributedDataParallel(models.build("bert", "masked_lm").train())
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
sifter = Sifter(model, keep=0.25, score="memory", sample_id="number", probe_every=3, schedule=lambda step: 0.7)
told = []
for step, rows in enumerate(((12, 12), (12, 2), (5, 12), (1, 1), (12, 1), (12, 12), (2, 2), (12, 12)) * 2):
    pool = models.pool_of_rank(rank, step, rows[rank])
    pool["labels"][0] = 6
    pool = {name: pool[name] for name in ("input_ids", "labels")}
    pool["number"] = torch.randint(0, 30, (rows[rank],), generator=torch.Generator().manual_seed(10 * step + rank))
    batch = sifter.sift(pool)
    losses = []
    scorers.training_loss(model, batch, observe=losses.append).backward()
    sifter.observe(losses[0])
    optimizer.step()
    optimizer.zero_grad()
    scored = "scored" in sifter.ledger.end()
    told.append([pool["number"].tolist(), sifter.ids.tolist(), scored, losses[0].tolist()])
print(json.dumps(told))
torch.distributed.destroy_process_group()
"""
)


def test_a_short_pool_on_one_rank_keeps_no_other_waiting_for_what_is_remembered(tmp_path):
    """Ranks that select by memory recall together, whatever they hold, and choose what one memory would."""
    first, second = on_ranks(2, SHARED, tmp_path)
    one, selecting = LossMemory(), 0
    for step, told in enumerate(zip(first, second, strict=True)):
        assert told[0][2] == told[1][2], "all ranks recall, or none does"
        for numbers, kept, scored, _ in told:
            if scored and len(numbers) >= 3:
                expected = one.recall(torch.tensor(numbers)).argsort(descending=True, stable=True)[:3].sort().values
                selecting += 1
                assert kept == torch.tensor(numbers)[expected].tolist()
            else:
                assert len(kept) == min(3, len(numbers))
        ids, losses = ([value for part in told for value in part[place]] for place in (1, 3))
        one.observe(torch.tensor(ids), torch.tensor(losses), step)
    assert 8 <= selecting < 32


WATCHED = (
    SETUP
    + """
from torch.nn.parallel import DistributedDataParallel
from earlysift.control import Control
model = models.build("bert", "sequence_classification").train()
costs = {"train": 1.0, "probe": 50.0, "score_1": 0.1, "score_2": 0.2, "score_3": 0.3}
parallel = DistributedDataParallel(model, find_unused_parameters=True)
sifter = Sifter(parallel, kept=12, keep=0.5, mode="auto", sample_id="number", control=Control(reference_costs=costs))
told = []
for step in range(66):
    if step == 52:  # as if it had come to it by itself
        state = sifter.state_dict()
        state["steering"]["choice"] = ["greedy", 1, 0.5]
        sifter.load_state_dict(state)
    rows = 5 if rank and step % 5 == 2 else 24
    pool = models.batch_for(model, "sequence_classification", rows, 12, torch.Generator().manual_seed(2 * step + rank))
    pool["number"] = torch.randint(0, 30, (rows,), generator=torch.Generator().manual_seed(2 * step + rank))
    sifter.loss(sifter.sift(pool)).backward()
    model.zero_grad()
    row = sifter.ledger.end()
    told.append([row["mode"], row["trained"], "look_ms" in row, row.get("control")])
print(json.dumps(told))
torch.distributed.destroy_process_group()
"""
)


def test_a_short_pool_on_one_rank_keeps_no_other_waiting_while_auto_watches_training(tmp_path):
    first, second = on_ranks(2, WATCHED, tmp_path)
    modes, trained, _, controls = zip(*second, strict=True)
    assert set(modes) == {"off", "greedy"}
    assert set(trained) == {5, 12}
    assert [told[0] for told in first] == list(modes)
    assert [told[3] for told in first] == list(controls)  # what is decided by is the same on all ranks
    assert [step for step, numbers in enumerate(controls) if numbers] == [50]


UNEVEN = (
    SETUP
    + """
from torch.distributed.fsdp import fully_shard
model = models.build("bert", "sequence_classification").train()
for part in (*model.bert.encoder.layer, model):
    fully_shard(part, mesh=torch.distributed.init_device_mesh("cpu", (count,)))
sifter = Sifter(model, kept=4, keep=0.5, mode="auto")
looked = []
for step in range(160):
    rows = 8 if step == 0 or not rank else 24
    pool = models.batch_for(model, "sequence_classification", rows, 12, torch.Generator().manual_seed(2 * step + rank))
    sifter.loss(sifter.sift(pool)).backward()
    model.zero_grad()
    row = sifter.ledger.end()
    looked += [step] * any(name.startswith("score_") for name in row)
print(json.dumps([looked, sorted(sifter.probe(pool))]))
torch.distributed.destroy_process_group()
"""
)


def test_a_large_pool_on_one_sharded_rank_keeps_no_other_waiting_where_auto_times_scoring(tmp_path):
    first, second = on_ranks(2, UNEVEN, tmp_path)
    assert first == second
    assert len(first[0]) > 0


def assign_rows_slowly(holders, kept, world):
    """Row by row: those that are over go, one rank after the other, to the first rank that lacks some."""
    taken, counts = list(holders), Counter()
    over = []
    for holder in range(world):
        for place in [place for place, owner in enumerate(holders) if owner == holder]:
            counts[holder] += 1
            if counts[holder] > kept:
                over.append(place)
    for taker in range(world):
        for _ in range(kept - counts[taker]):
            taken[over.pop(0)] = taker
    return taken


@given(st.integers(1, 5).flatmap(lambda w: st.tuples(st.just(w), st.integers(1, 6), st.randoms())))
def test_every_rank_gets_b_rows_and_no_more_rows_move_than_must(case):
    world, kept, random = case
    holders = [random.randrange(world) for _ in range(world * kept)]
    taken = ranks.assign_rows(torch.tensor(holders), kept, world).tolist()
    assert taken == assign_rows_slowly(holders, kept, world)
    assert Counter(taken) == dict.fromkeys(range(world), kept)
    moved = sum(taker != holder for taker, holder in zip(taken, holders, strict=True))
    assert moved == sum(max(0, held - kept) for held in Counter(holders).values())


def test_global_scope_of_one_process_is_local_bit_for_bit():
    picks = []
    for scope in ("local", "global"):
        sifter = Sifter(models.build("bert", "masked_lm").train(), keep=0.5, scope=scope, seed=3)
        ids = torch.randint(5, 90, (8, 12), generator=torch.Generator().manual_seed(0))
        batch = sifter.sift({"input_ids": ids, "labels": ids})
        picks.append((sifter.selection.indices.tolist(), batch["input_ids"].tolist()))
    assert picks[0] == picks[1]


def test_unknown_scope_is_refused():
    with pytest.raises(ValueError, match="scope must be local or global, got 'world'"):
        Sifter(models.build("bert", "masked_lm"), scope="world")


TRAINING = (
    SETUP
    + """
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
kind, steps, rate = KIND, STEPS, RATE
model = models.build("bert", "masked_lm").train()
layers, inner = model.bert.encoder.layer, model
called = [0] * len(layers)
for number, layer in enumerate(layers):
    layer.register_forward_pre_hook(lambda *_, number=number: called.__setitem__(number, called[number] + 1))
if kind in ("fsdp", "hybrid"):  # hybrid: whole copies on each half of the ranks, sharded within
    shape = (count,) if kind == "fsdp" else (2, count // 2)
    mesh = torch.distributed.init_device_mesh("cpu", shape, mesh_dim_names=("copies", "shards")[-len(shape):])
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
elif kind == "ddp":
    model = DistributedDataParallel(model)
optimizer = torch.optim.SGD(model.parameters(), lr=rate)
sifter = Sifter(model, kept=8 // count, keep=0.5, scope="global", probe_every=2, dtype=None)
losses, picks, calls = [], [], []
for step in range(steps):
    pools = [models.pool_of_rank(r, step, 8) for r in range(2)]
    ids = torch.cat([pool["input_ids"] for pool in pools]).tensor_split(count)[rank]
    called[:] = [0] * len(layers)
    batch = sifter.sift({"input_ids": ids, "labels": ids})
    calls.append(list(called))
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    picks.append(sifter.selection.indices.tolist())
print(json.dumps([losses, picks, calls]))
torch.distributed.destroy_process_group()
"""
)


def trained(count, kind, steps, rate, tmp_path):
    """Losses of steps, picks of all ranks together, and calls of layers by rank."""
    folder = tmp_path / f"{kind}{count}"
    folder.mkdir()
    script = TRAINING.replace("KIND", repr(kind)).replace("STEPS", str(steps)).replace("RATE", str(rate))
    told = on_ranks(count, script, folder)
    losses = [sum(values) / count for values in zip(*(losses for losses, _, _ in told), strict=True)]
    picks = [
        sorted(place for part in parts for place in part)
        for parts in zip(*(picks for _, picks, _ in told), strict=True)
    ]
    return losses, picks, [calls for _, _, calls in told]


def test_s09_two_ranks_train_like_one_process_on_the_same_candidates_replicated_and_sharded(tmp_path, record_property):
    steps, rate, tolerance = (200, 1e-3, 1e-6) if FULL else (4, 0.05, 1e-4)
    one = trained(1, "one", steps, rate, tmp_path)
    for kind in ("ddp", "fsdp"):
        assert_trains_like_one(one, 2, kind, steps, rate, tolerance, tmp_path, record_property)
    assert len(set(map(tuple, one[1]))) > 1


MANY = [(4, "hybrid"), *([(4, "ddp"), (4, "fsdp"), (8, "ddp"), (8, "fsdp"), (8, "hybrid")] if FULL else [])]


def test_s09_four_and_eight_ranks_train_like_one_process_replicated_sharded_and_both(tmp_path, record_property):
    steps, rate, tolerance = (50, 1e-3, 1e-6) if FULL else (4, 0.05, 1e-4)
    one = trained(1, "one", steps, rate, tmp_path)
    for count, kind in MANY:
        assert_trains_like_one(one, count, kind, steps, rate, tolerance, tmp_path, record_property)
    assert len(set(map(tuple, one[1]))) > 1


def assert_trains_like_one(one, count, kind, steps, rate, tolerance, tmp_path, record_property):
    losses, picks, calls = trained(count, kind, steps, rate, tmp_path)
    apart = max(abs(ours / alone - 1) for ours, alone in zip(losses, one[0], strict=True))
    record_property("detail", f"{kind}, {count} ranks: losses at most {apart:.1e} apart")
    record_property("cases", steps)
    assert apart <= tolerance
    assert picks == one[1]
    assert calls == [calls[0]] * count, "all ranks score and probe at the same steps"
    behind = [called[1:] for called in calls[0]][1::2]
    assert behind == [[0] * (len(calls[0][0]) - 1)] * (steps // 2), "one layer, no probe"
