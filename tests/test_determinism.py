"""A line of the scorecard: the same picks again, with workers, on two threads, compiled, and in other chunks."""

import itertools

import pytest
import torch
from torch import Generator
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForMaskedLM

from earlysift import Sifter
from earlysift.control import Control
from earlysift.datasets import WithIds
from scorecard import FULL, cases

STEPS, POOL, LENGTH, VOCABULARY = (8 if FULL else 4), 24, 32, 500
IDS = {"sample_id": "number"}
SCORES = {
    **{name: {"score": name} for name in ("loss", "entropy", "margin", "exact", "probe")},
    "memory": {"score": "memory", **IDS},
    "blend": {"score": "blend", **IDS},
    "auto": {"mode": "auto", "control": Control(reference_costs={"train": 100.0, "probe": 60.0, "score_1": 10.0})},
}


def picks(name, *, workers=0, threads=1, compiled=False, **options):
    """The rows that are trained on, step by step, and the losses; large enough for operations to use two threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _picks(name, workers, compiled, options)
    finally:
        torch.set_num_threads(before)


def _picks(name, workers, compiled, options):
    shape = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **shape)).train()
        trained = torch.compile(model, backend="aot_eager") if compiled else model
        ids = torch.randint(5, VOCABULARY, (4 * POOL, LENGTH), generator=Generator().manual_seed(1))
        labels = torch.where(torch.rand(ids.shape, generator=Generator().manual_seed(2)) < 0.2, ids, -100)
        rows = [{"input_ids": ids[i], "labels": labels[i]} for i in range(len(ids))]
        sifter = Sifter(trained, keep=0.5, seed=3, **SCORES[name] | options)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        forked = {"num_workers": workers, "multiprocessing_context": "fork" if workers else None}
        numbers, losses = [], []
        for pool in itertools.islice(_again(WithIds(rows, "number"), forked), STEPS):
            number = pool["number"]
            batch = sifter.sift(pool if sifter.config.sample_id else {key: pool[key] for key in rows[0]})
            loss = sifter.loss({key: batch[key] for key in rows[0]})
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            numbers.append(number[sifter.selection.indices].tolist())
            losses.append(loss.item())
    return numbers, losses


def _again(data, forked):
    while True:
        yield from DataLoader(data, batch_size=POOL, **forked)


@pytest.fixture(scope="module")
def once():
    """The picks of each score, made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = picks(name)
        return made[name]

    return get


SAME = {"again": {}, "two workers": {"workers": 2}}
ROUNDED = {"two threads": {"threads": 2}, "compiled": {"compiled": True}, "chunks of 5": {"chunk_rows": 5}}


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # where there are fewer cores than workers
@pytest.mark.parametrize(("name", "how"), cases(itertools.product(SCORES, SAME), 2))
def test_picks_repeat_bit_for_bit(name, how, once):
    assert picks(name, **SAME[how]) == once(name)


@pytest.mark.parametrize(
    ("name", "how"),
    [*cases(itertools.product(SCORES, ROUNDED), 2), *([] if FULL else [("probe", "chunks of 5")])],
)
def test_picks_repeat_where_only_rounding_differs(name, how, once, record_property):
    numbers, losses = once(name)
    again, losses_again = picks(name, **ROUNDED[how])
    assert again == numbers
    torch.testing.assert_close(torch.tensor(losses_again), torch.tensor(losses), rtol=1e-4, atol=0)
    record_property("worst", max(abs(a / b - 1) for a, b in zip(losses_again, losses, strict=True)))
