"""Lines S16 and S17 of the scorecard: a rank that dies, stands still or is slow, and ranks with uneven data."""

import itertools
import json
import signal

import pytest

import faults
from processes import ends_of_ranks, on_ranks
from scorecard import FULL, LONG, cases

# Six steps of DDP with remembered losses, or with rows that change places. On the struck rank something befalls the
# third call of a function. The other rank waits no longer than its process group does, and then ends the struck one.
STEPS = """
import json, os, signal, sys
from contextlib import suppress
from datetime import timedelta
import torch, faults, models
from earlysift import Sifter

rank, store, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
bound = timedelta(seconds=BOUND_S)
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=bound)
with open(f"{store}{rank}", "w") as file:
    file.write(str(os.getpid()))
torch.distributed.barrier()
torch.manual_seed(0)
model = torch.nn.parallel.DistributedDataParallel(models.build("bert", "masked_lm").train())
optimizer = torch.optim.SGD(model.parameters(), 0.1)
sifter = Sifter(model, kept=3, seed=1, probe_every=0, **OPTIONS)
if rank == STRUCK_RANK:
    sys.setprofile(faults.watcher(*STRUCK))
picks = []
try:
    for step in range(6):
        pool = models.pool_of_rank(rank, step % 3, 6)
        pool = {"input_ids": pool["input_ids"], "labels": pool["labels"], "number": 100 * rank + torch.arange(6)}
        batch = sifter.sift(pool if "sample_id" in OPTIONS else {name: pool[name] for name in ("input_ids", "labels")})
        numbers = batch.pop("number", batch["input_ids"])
        sifter.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        picks.append(numbers.tolist())
    print(json.dumps(picks))
    torch.distributed.barrier()
except RuntimeError as error:
    print(json.dumps([len(picks), str(error)]))
    for other in {0, 1} - {rank}:
        with suppress(ProcessLookupError), open(f"{store}{other}") as file:
            os.kill(int(file.read()), signal.SIGKILL)
"""
WHAT = {"killed": int(signal.SIGKILL), "stopped": int(signal.SIGSTOP), "slow": faults.SLOW}
OPTIONS = {"together": {"scope": "global"}, "remembering": {"score": "memory", "sample_id": "number"}}
PLACES = {
    "gathering scores": ("together", "ranks.py:gather"),
    "exchanging rows": ("together", "ranks.py:exchange"),
    "recalling losses": ("remembering", "ranks.py:recall"),
    "observing losses": ("remembering", "ranks.py:observe"),
    "backward pass": ("together", "_tensor.py:backward"),
}


def script(options, place="", what=faults.SLOW, rank=-1):
    bound_s = 5 if what == WHAT["stopped"] else 60
    values = {"STRUCK_RANK": rank, "STRUCK": [place, 3, what], "BOUND_S": bound_s, "OPTIONS": OPTIONS[options]}
    return "".join(f"{name} = {value!r}\n" for name, value in values.items()) + STEPS


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The picks of both ranks where nothing happens."""
    return {name: on_ranks(2, script(name), tmp_path_factory.mktemp("undisturbed")) for name in OPTIONS}


@pytest.mark.parametrize(("what", "place", "rank"), cases(itertools.product(WHAT, PLACES, (0, 1)), 3))
def test_s16_no_rank_waits_for_ever_for_one_that_is_struck(what, place, rank, undisturbed, tmp_path):
    options, function = PLACES[place]
    ended = ends_of_ranks(2, script(options, function, WHAT[what], rank), tmp_path)
    if what == "slow":
        assert [json.loads(out.splitlines()[-1]) for _, out, _ in ended] == undisturbed[options]
        return
    code, out, err = ended[1 - rank]
    assert (code, ended[rank][0]) == (0, -signal.SIGKILL), err
    steps, said = json.loads(out.splitlines()[-1])
    assert steps in (1, 2, 3)
    assert any(words in said for words in {"killed": ("by peer",), "stopped": ("Timed out", "timeout")}[what]), said


UNEVEN = """
import json, sys
import torch, models
from earlysift import Sifter

rank, store, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
sizes = torch.randint(1, 9, (POOLS, count), generator=torch.Generator().manual_seed(0))
sizes[0] = 8  # the first pool has enough
told = []
for scope in ("local", "global"):
    sifter = Sifter(
        models.build("bert", "masked_lm").train(), kept=3, score=models.score_by_labels, scope=scope, probe_every=0
    )
    for step, size in enumerate(sizes[:, rank].tolist()):
        batch = sifter.sift(models.pool_of_rank(rank, step, size))
        told.append([scope, size, int(sizes[step].sum()), len(batch["labels"]), batch["extra"][0]["number"].tolist()])
print(json.dumps(told))
torch.distributed.destroy_process_group()
"""


def test_s17_ranks_with_uneven_pools_keep_no_other_waiting_and_train_on_no_row_twice(tmp_path, record_property):
    pools = 5_000 if LONG else 100 if FULL else 20
    by_rank = on_ranks(2, f"POOLS = {pools}\n{UNEVEN}", tmp_path)
    for entries in zip(*by_rank, strict=True):
        numbers = [number for entry in entries for number in entry[4]]
        assert len(set(numbers)) == len(numbers)
        for scope, size, together, trained, _ in entries:
            enough = together >= 6 if scope == "global" else size >= 3
            assert trained == (3 if enough else min(size, 3))
    record_property("cases", 2 * pools)
