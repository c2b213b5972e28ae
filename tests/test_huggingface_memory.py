"""Remembered losses in the Trainer: those of the pass that is trained on, by the right ids; nothing else changes."""

import dataclasses
import math
import re
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import models
from earlysift import SiftConfig
from earlysift.datasets import WithIds
from processes import on_ranks
from test_huggingface import (
    BATCH,
    CHECKPOINTING,
    LAYOUTS,
    Recording,
    assert_equal_runs,
    fine_tuned,
    llama,
    samples,
    trained,
    trainer_for,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import Trainer

    from earlysift.adapters.huggingface import SiftTrainer, SiftTrainerMixin

MEMORY = SiftConfig(keep=0.5, score="memory", sample_id="number", probe_every=0, dtype=None)
ALL = dataclasses.replace(MEMORY, keep=1.0)


def memory_of(sifter):
    sifter.state_dict()  # which takes in what was observed
    return sifter._runner.learnt.memory


class Watching:
    """Notes for every micro-batch what it holds, its losses by a pass of their own, and what is remembered of it."""

    def compute_loss(self, model, inputs, *arguments, **options):
        if self._trained is not None:
            with torch.random.fork_rng():
                exact = models.sample_losses(self.accelerator.unwrap_model(self.model), dict(inputs))
            self.exact = [*getattr(self, "exact", []), (inputs["input_ids"].tolist(), exact)]
        return super().compute_loss(model, inputs, *arguments, **options)

    def _remember(self, losses):
        self.told = [*getattr(self, "told", []), (self._trained.ids.tolist(), losses)]
        super()._remember(losses)


class Noting(Watching, Recording):
    pass


class Watched(Noting, SiftTrainerMixin, Trainer):
    pass


def remembered(trainer, count):
    """What a trainer remembers, as a list."""
    return memory_of(trainer.sifter).look(torch.arange(count), 0)[0].tolist()


def assert_tells_the_losses_of_what_is_trained_on(run, rows, tolerance=1e-5):
    assert len(run.told) == len(run.exact) == len(run.batches)
    for (ids, losses), (inputs, exact), batch in zip(run.told, run.exact, run.batches, strict=True):
        assert inputs == batch
        assert [row[: len(rows[i])] for i, row in zip(ids, batch, strict=True)] == [rows[i] for i in ids]
        assert losses.dtype == torch.float32
        assert not losses.requires_grad
        torch.testing.assert_close(losses, exact.nan_to_num(nan=-math.inf), rtol=tolerance, atol=tolerance)
    expected = {i: float(loss) for ids, losses in run.told for i, loss in zip(ids, losses, strict=True)}
    found = remembered(run, len(rows))
    assert {i: loss for i, loss in enumerate(found) if not math.isnan(loss)} == pytest.approx(expected)
    assert max(map(len, run.batches)) < len(expected) <= len(rows)


# What is remembered


@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        ({"gradient_accumulation_steps": 3}, 1e-5),
        ({"label_smoothing_factor": 0.1, "gradient_accumulation_steps": 2}, 1e-5),
        ({"bf16": True}, 0.05),
        ({CHECKPOINTING: True}, 1e-5),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, 1e-5),
        ({"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}, 1e-5),
        ({"dataloader_num_workers": 1, "remove_unused_columns": False}, 1e-5),
    ],
    ids=["accumulation", "label smoothing", "bf16", "checkpointing", "compiled", "evaluation", "workers"],
)
def test_losses_are_those_of_the_samples_that_are_trained_on(tmp_path, arguments, tolerance):
    data = samples(43)
    options = {"data": data, "sift": MEMORY, "max_steps": 13, "max_grad_norm": 1.0, **arguments}
    run = trained(tmp_path, Watched, trainer={"eval_dataset": samples(5)}, **options)
    assert_tells_the_losses_of_what_is_trained_on(run, [row["input_ids"].tolist() for row in data], tolerance)


@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("bert", "sequence_classification")])
def test_every_task_has_losses_of_samples(tmp_path, family, task):
    data = samples(24, family, task)
    run = trained(tmp_path, Watched, model=models.build(family, task), data=data, sift=MEMORY, max_steps=8)
    assert_tells_the_losses_of_what_is_trained_on(run, [row["input_ids"].tolist() for row in data])


def test_unlabelled_samples_are_remembered_as_such(tmp_path):
    data = samples(8, "bert", "masked_lm")
    data[3] = data[3] | {"labels": torch.full_like(data[3]["labels"], -100)}
    run = trained(tmp_path, Watched, model=models.build("bert", "masked_lm"), data=data, sift=ALL, max_steps=2)
    assert remembered(run, 8)[3] == -math.inf
    assert sum(map(math.isfinite, remembered(run, 8))) == 7


def test_the_largest_remembered_losses_are_trained_on(tmp_path):
    data = samples(16)
    run = trained(tmp_path, Watched, data=data, sift=MEMORY, max_steps=12, train_sampling_strategy="sequential")
    known = {}
    for step, (ids, losses) in enumerate(run.told):
        pool = [step % 2 * 8 + place for place in range(8)]
        best = sorted(pool, key=lambda i: -known.get(i, math.inf))[:BATCH]
        assert ids == sorted(best)
        known |= dict(zip(ids, losses.tolist(), strict=True))


# Nothing else changes


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
        {"label_smoothing_factor": 0.1},
        {"bf16": True, "optim": "adamw_torch"},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["epochs of accumulated ragged batches", "label smoothing", "bf16", "compiled"],
)
def test_keep_one_with_memory_equals_the_plain_trainer_bit_for_bit(tmp_path, arguments):
    runs = [
        trained(tmp_path, cls, sift=sift, model=llama(dropout=0.1), data=samples(43), **arguments)
        for cls, sift in ((Trainer, None), (SiftTrainer, ALL))
    ]
    assert_equal_runs(*runs)
    assert memory_of(runs[1].sifter).seen > BATCH


def test_no_second_pass_is_made_and_other_scores_read_no_losses(tmp_path):
    calls = {}
    for name, sift in (("memory", MEMORY), ("uniform", dataclasses.replace(MEMORY, score="uniform"))):
        trainer = trainer_for(tmp_path, sift=sift)
        counted = []
        trainer.model.lm_head.register_forward_hook(lambda *_, counted=counted: counted.append(1))
        trainer.train()
        calls[name] = len(counted)
        assert trainer.sifter.observes == (name == "memory")
    assert calls["memory"] == calls["uniform"] == 5


@LAYOUTS
def test_supervised_fine_tuning_remembers_without_logits_and_changes_nothing(trl, tmp_path, layout):
    plain, sifting = (fine_tuned(trl, tmp_path, sift, **layout) for sift in (None, ALL))
    assert_equal_runs(sifting, plain)
    options = {"gradient_accumulation_steps": 2, "max_steps": 11, "noting": Noting, **layout}
    whole = fine_tuned(trl, tmp_path, MEMORY, save_strategy="steps", save_steps=4, **options)
    assert_tells_the_losses_of_what_is_trained_on(whole, whole.train_dataset["input_ids"])
    assert "number" not in whole.train_dataset.column_names
    resumed = fine_tuned(trl, tmp_path, MEMORY, resume=str(tmp_path / "checkpoint-4"), seed=1, **options)
    assert_equal_runs(resumed, whole)
    assert [ids for ids, _ in resumed.told] == [ids for ids, _ in whole.told[8:]]
    assert str(remembered(resumed, 160)) == str(remembered(whole, 160))


# Ids


def test_samples_with_ids_of_their_own_keep_them(tmp_path):
    data = [row | {"number": 100 + 2 * number} for number, row in enumerate(samples(16))]
    run = trained(tmp_path, Watched, data=data, sift=MEMORY)
    assert {i for ids, _ in run.told for i in ids} <= {100 + 2 * number for number in range(16)}
    assert memory_of(run.sifter).samples is None
    wrapped = trained(tmp_path, Watched, data=WithIds(samples(16), "number"), sift=MEMORY)
    assert memory_of(wrapped.sifter).samples == 16
    bare = trained(tmp_path, Watched, data=samples(16), sift=MEMORY)
    assert bare.told[0][0] == wrapped.told[0][0]
    assert_equal_runs(wrapped, bare)


@pytest.mark.parametrize("own", [False, True])
def test_data_sets_of_the_hub_keep_or_get_a_column(tmp_path, own):
    import datasets

    rows = samples(16)
    columns = {name: [row[name].tolist() for row in rows] for name in rows[0]} | {"text": ["unused"] * 16}
    columns |= {"number": list(range(16))} if own else {}
    options = {"sift": MEMORY, "max_steps": 4}
    run = trained(tmp_path, Watched, data=datasets.Dataset.from_dict(columns), **options)
    listed = trained(tmp_path, Watched, data=rows, **options)
    assert [ids for ids, _ in run.told] == [ids for ids, _ in listed.told]
    assert_equal_runs(run, listed)


def test_evaluation_drops_a_column_of_ids_as_ever(tmp_path):
    import datasets

    rows = samples(8)
    columns = {name: [row[name].tolist() for row in rows] for name in rows[0]} | {"number": list(range(8))}
    data = datasets.Dataset.from_dict(columns)
    run = trained(tmp_path, data=data, sift=MEMORY, trainer={"eval_dataset": data}, eval_strategy="epoch")
    assert any("eval_loss" in entry for entry in run.state.log_history)
    assert "number" in next(iter(run.get_train_dataloader()))
    assert set(next(iter(run.get_eval_dataloader()))) == set(rows[0])


class Stream(torch.utils.data.IterableDataset):
    """Samples in passing, with ids or without."""

    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows * 4)


def test_a_stream_needs_ids_of_its_own(tmp_path):
    import datasets

    rows = samples(16)
    trainer = trainer_for(tmp_path, data=Stream(rows), sift=MEMORY)
    with pytest.raises(ValueError, match=r"no ids under sample_id='number', and those of a stream get none"):
        trainer.train()
    stream = datasets.Dataset.from_dict({"input_ids": [[3, 4]] * 8, "labels": [[3, 4]] * 8}).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"they never return, .* Use a map-style data set"):
        trainer_for(tmp_path, data=stream, sift=MEMORY)
    with_ids = Stream([row | {"number": number} for number, row in enumerate(rows)])
    run = trained(tmp_path, Watched, data=with_ids, sift=MEMORY, max_steps=6)
    assert memory_of(run.sifter).seen == 16  # of which all have come twice, and unseen ones go first


def test_ids_that_are_no_numbers_are_refused(tmp_path):
    data = [row | {"number": f"sample {number}"} for number, row in enumerate(samples(16))]
    with pytest.raises(ValueError, match=r"Expected the samples' ids, int64 \(8,\), under 'number' in the pool, got"):
        trained(tmp_path, data=data, sift=MEMORY)


def test_a_model_without_logits_or_labels_is_refused(tmp_path):
    class Headless(SiftTrainer):
        def compute_loss(self, model, inputs, *arguments, **options):
            return super().compute_loss(model, dict(inputs) | {"labels": None}, *arguments, **options)

    class Around(Trainer):
        def compute_loss(self, model, inputs, *arguments, **options):
            return model.forward(**inputs).loss  # past what is seen of the model's calls

    class SiftAround(SiftTrainerMixin, Around):
        pass

    for cls in (Headless, SiftAround):
        with pytest.raises(ValueError, match=r"read off the logits that the model returns and the batch's labels"):
            trained(tmp_path, cls, sift=MEMORY)


def test_a_training_in_which_no_sample_returns_is_warned_of(tmp_path, caplog):
    trained(tmp_path, data=samples(40), sift=MEMORY, max_steps=5)
    assert "reads 40 candidates of 40 samples: none of them comes back" in caplog.text
    caplog.clear()
    trained(tmp_path, data=samples(39), sift=MEMORY, max_steps=5)
    assert caplog.text == ""


# Resuming


@pytest.mark.parametrize("cut", [3, 7])
def test_a_run_resumed_from_a_checkpoint_makes_the_same_picks_and_remembers_the_same(tmp_path, cut):
    options = {"sift": MEMORY, "data": samples(43), "gradient_accumulation_steps": 2, "max_steps": 9}
    whole = trained(tmp_path / "whole", model=llama(dropout=0.1), save_strategy="steps", save_steps=cut, **options)
    checkpoint = tmp_path / "whole" / f"checkpoint-{cut}"
    assert {"sifter_0.json", "sifter_0.safetensors"} <= {path.name for path in checkpoint.iterdir()}
    resumed = trained(tmp_path / "resumed", model=llama(dropout=0.1, seed=1), resume=str(checkpoint), **options)
    assert_equal_runs(resumed, whole)
    assert resumed.batches == whole.batches[-len(resumed.batches) :]
    ours, theirs = (run.sifter.state_dict()["memory"] for run in (resumed, whole))
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=0, equal_nan=True)
    assert int((~theirs["losses"].isnan()).sum()) > 30


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The checkpoint of a run of two steps."""
    folder = tmp_path_factory.mktemp("two")
    trained(folder, sift=MEMORY, data=samples(24), max_steps=2, save_strategy="steps", save_steps=2)
    return folder / "checkpoint-2"


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-9])


def emptied(path):
    path.write_bytes(b"")


def of_another(path):
    from safetensors.torch import save_file

    save_file({"sifter.memory.losses": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage", [cut_off, emptied, Path.unlink, of_another])
def test_damaged_tensors_are_refused_by_the_name_of_their_file_and_nothing_is_loaded(damage, two_steps, tmp_path):
    checkpoint = Path(shutil.copytree(two_steps, tmp_path / "checkpoint-2"))
    path = checkpoint / "sifter_0.safetensors"
    damage(path)
    trainer = trainer_for(tmp_path, sift=MEMORY, data=samples(24))
    message = (
        rf"Expected {re.escape(str(checkpoint / 'sifter_0.safetensors'))} as saved.*delete sifter_0\.json to start"
    )
    with pytest.raises(ValueError, match=message):
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert (trainer.sifter.step, memory_of(trainer.sifter).seen) == (0, 0)


def test_a_data_set_that_has_shrunk_is_refused_and_nothing_is_loaded(two_steps, tmp_path):
    trainer = trainer_for(tmp_path, sift=MEMORY, data=samples(9))
    with pytest.raises(ValueError, match=r"reach to sample \d+, and the data set has 9 samples now\. Resume"):
        trainer.train(resume_from_checkpoint=str(two_steps))
    assert (trainer.sifter.step, memory_of(trainer.sifter).seen) == (0, 0)
    grown = trained(tmp_path, sift=MEMORY, data=samples(30), max_steps=4, resume=str(two_steps))
    assert grown.sifter.step == 4


# Several processes


RANKS = """
import json, os, sys
rank, store, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
os.environ |= {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "localhost"}
import torch
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
import test_huggingface_memory as tests

folder = os.path.dirname(store)
options = {"sift": tests.MEMORY, "data": tests.samples(43), "ddp_backend": "gloo", "max_steps": 10}
whole = tests.trained(folder, tests.Watched, save_strategy="steps", save_steps=5, **options)
checkpoint = os.path.join(folder, "checkpoint-5")
resumed = tests.trained(folder, tests.Watched, model=tests.llama(seed=1), resume=checkpoint, **options)
torch.distributed.barrier()
print(json.dumps({
    "told": [[ids, losses.tolist()] for ids, losses in whole.told],
    "sizes": [len(ids) for ids, _ in whole.told],
    "resumed": [[ids, losses.tolist()] for ids, losses in resumed.told],
    "known": tests.remembered(whole, 43), "known, resumed": tests.remembered(resumed, 43),
    "bytes": tests.memory_of(whole.sifter).state_dict()["losses"].numel(),
}))
torch.distributed.destroy_process_group()
"""


def test_two_processes_share_one_memory_and_resume_only_as_two(tmp_path):
    both = on_ranks(2, RANKS, tmp_path)
    expected = {}
    for step in zip(*(told["told"] for told in both), strict=True):
        ids, losses = ([value for part in step for value in part[place]] for place in (0, 1))
        for i in set(ids):  # of copies, with which the last pools are filled up, the mean
            own = [loss for number, loss in zip(ids, losses, strict=True) if number == i]
            expected[i] = sum(own) / len(own)
    assert len(expected) > 35
    for rank, told in enumerate(both):
        known = {i: loss for i, loss in enumerate(told["known"]) if not math.isnan(loss) and i % 2 == rank}
        assert known == pytest.approx({i: loss for i, loss in expected.items() if i % 2 == rank})
        assert told["bytes"] <= 33  # about half of 43, and a half more to grow
        assert told["resumed"] == told["told"][5:]
        assert str(told["known, resumed"]) == str(told["known"])
    assert both[0]["told"] != both[1]["told"]
    with pytest.raises(ValueError, match=r"number of ranks was 2 when they were saved, and is 1 now\. Resume with 2\."):
        trained(tmp_path, sift=MEMORY, data=samples(43), max_steps=10, resume=str(tmp_path / "checkpoint-5"))
