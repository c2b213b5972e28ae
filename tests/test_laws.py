"""Laws of the scorecard: scores know their row alone (S14), large memories (S24), and accounts that add up (S25)."""

import itertools
import math
import time
from statistics import median

import pytest
import torch
from torch import Generator
from transformers import get_scheduler

from earlysift import scorers, selectors
from earlysift.ledger import read_rows
from earlysift.loss_memory import LossMemory
from models import PAD, build, row_of
from scorecard import FULL, cases
from test_huggingface import ALL, BATCH, HALF, RATE, Recorded, llama, logged, samples, trained

# S14: a score depends on its row alone

DRIFT = 1e-6
CAUSAL = [("llama", "causal_lm"), ("gpt2", "causal_lm")]
BOTH_SIDES = [("bert", "masked_lm"), ("modernbert", "masked_lm"), ("distilbert", "masked_lm"), *CAUSAL]
PADDINGS = [(key, side, length) for key in BOTH_SIDES for side in ("right", "left") for length in (2, 3, 7, 16)]


def one_row(length, generator):
    ids = torch.randint(8, 90, (1, length), generator=generator)
    labels = torch.where(torch.rand(1, length, generator=generator) < 0.6, ids, -100)
    labels[0, -1] = ids[0, -1]  # one position at least has a label; the first has none, see models.ragged_pool_of_rank
    labels[0, : length - 1][:1] = -100
    return ids, labels


def padded_to(row, length, side):
    """A row with padding on a side, and positions that begin with its first token."""
    gap = length - row[0].size(1)
    sides = (gap, 0) if side == "left" else (0, gap)
    ids, labels = (
        torch.nn.functional.pad(part, sides, value=value) for part, value in zip(row, (PAD, -100), strict=True)
    )
    used = torch.nn.functional.pad(torch.ones_like(row[0]), sides)
    return {
        "input_ids": ids,
        "attention_mask": used,
        "labels": labels,
        "position_ids": (used.cumsum(dim=1) - 1).clamp(min=0),
    }


@pytest.mark.parametrize(("key", "side", "length"), cases(PADDINGS, 6))
def test_s14_scores_do_not_depend_on_padding_company_copies_or_chunks(key, side, length, record_property):
    if key == ("distilbert", "masked_lm") and side == "left":
        side = "right"  # it has absolute positions, and takes none
    model, generator = build(*key), Generator().manual_seed(length)
    rows = [one_row(length, generator), *(one_row(1 + i, generator) for i in range(12))]

    def scored(rows, longest, **options):
        parts = [padded_to(row, longest, side) for row in rows]
        pool = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        if key[0] == "distilbert":
            del pool["position_ids"]
        return scorers.early_exit_loss(model, pool, depth=2, family=row_of(model), dtype=None, **options).double()

    alone = scored(rows[:1], length)[0]
    drifts = [
        (scored(rows, longest, chunk_rows=chunk)[0] - alone).abs() / alone.abs().clamp(min=1)
        for longest, chunk in itertools.product((16, 24), (1, 2, 5, 64))
    ]
    copies = scored([*rows[:1] * 64, *rows[1:]], 16)[:64]
    drifts += [(copies - alone).abs().max() / alone.abs().clamp(min=1)]
    worst = float(torch.stack(drifts).max())
    record_property("worst", worst)
    assert worst <= DRIFT
    assert alone > 0


# S24: load

SAMPLES, POOL = 10_000_000, 65_536
MIB = 160


def test_s24_ten_million_samples_are_remembered_exactly_in_a_hundred_and_sixty_megabytes(record_property):
    pools = 1000 if FULL else 5
    memory, reference, times_ms = LossMemory(SAMPLES), torch.full((SAMPLES,), torch.nan), []
    generator = Generator().manual_seed(0)
    for step in range(pools):
        start = int(torch.randint(SAMPLES, (), generator=generator))
        ids = (start + 7_919 * torch.arange(POOL)) % SAMPLES  # a prime stride: all different
        started = time.perf_counter()
        scores = memory.recall(ids)
        picks = selectors.greedy(scores, POOL // 4).indices
        times_ms.append((time.perf_counter() - started) * 1e3)
        known = reference[ids]
        expected = torch.where(known.isnan(), known.nan_to_num(-1).max().clamp(min=0) + 1, known)
        assert torch.equal(scores, expected)
        assert torch.equal(picks, expected.argsort(descending=True, stable=True)[: POOL // 4].sort().values)
        losses = torch.rand(len(picks), generator=generator)
        memory.observe(ids[picks], losses, step)
        reference[ids[picks]] = losses
    held = sum(part.nbytes for part in memory.state_dict().values())
    assert held <= MIB * 1e6
    assert memory.seen == int((~reference.isnan()).sum())
    record_property("cases", pools)
    record_property("detail", f"{held / 1e6:.0f} MB; median of recall and choice {median(times_ms):.0f} ms a pool")


# S25: accounts

SCHEDULES = [
    *("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup"),
    *("inverse_sqrt", "cosine_with_min_lr", "warmup_stable_decay", "cosine_warmup_with_min_lr"),
]
OPTIONS = {
    "cosine_with_min_lr": {"min_lr": RATE / 10},
    "cosine_warmup_with_min_lr": {"min_lr": RATE / 10},
    "warmup_stable_decay": {"num_decay_steps": 4},
}
EPOCHS, ROWS, WARMUP = 3, 40, 2


@pytest.mark.parametrize(
    ("schedule", "selects"), cases([*itertools.product(SCHEDULES, (False, True))], 4), ids=lambda value: str(value)
)
def test_s25_rates_updates_samples_and_tokens_add_up_over_three_epochs(schedule, selects, tmp_path):
    options = OPTIONS.get(schedule, {})

    class Noting(Recorded):
        ledger_path = tmp_path / "ledger.jsonl"

    trainer = trained(
        tmp_path,
        Noting,
        model=llama(layers=2),
        data=samples(ROWS),
        sift=HALF if selects else ALL,
        max_steps=-1,
        num_train_epochs=EPOCHS,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=options,
        warmup_steps=WARMUP,
    )
    pool = BATCH * (2 if selects else 1)
    updates = EPOCHS * math.ceil(ROWS / pool)
    assert trainer.state.global_step == updates
    assert logged(trainer, "learning_rate") == rates(schedule, updates, options)
    rows = read_rows(Noting.ledger_path)
    assert len(rows) == updates
    seen = EPOCHS * ROWS
    assert sum(row["candidates"] for row in rows) == seen
    assert sum(row["trained"] for row in rows) == updates * BATCH
    assert sum(row.get("scored", 0) for row in rows) == (seen if selects else 0)
    trained_tokens = sum(len(batch) * len(batch[0]) for batch in trainer.batches)
    assert sum(row["trained_tokens"] for row in rows) == trained_tokens


def rates(schedule, updates, options):
    """The rate at every update, by the schedule alone."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE)
    scheduler = get_scheduler(
        schedule, optimizer, num_warmup_steps=WARMUP, num_training_steps=updates, scheduler_specific_kwargs=options
    )
    found = []
    for _ in range(updates):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found
