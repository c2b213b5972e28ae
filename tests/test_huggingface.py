"""`SiftTrainer` in the real Trainer and TRL's, and `Sifter` in accelerate's loop: picks and losses of a slow loop."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import Generator, nn

import earlysift
import models
from earlysift import Family, SiftConfig, Sifter
from earlysift.control import Control
from earlysift.ledger import read_rows
from processes import on_ranks

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # third-party imports may warn; tests are about what happens after them
    import accelerate
    import transformers
    from transformers import Trainer, TrainingArguments

    from earlysift.adapters.huggingface import SiftTrainer, SiftTrainerMixin

BATCH, LENGTH, RATE = 4, 8, 0.05
CHECKPOINTING = next(  # by its new name, or that of transformers 5.19
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
HALF = SiftConfig(keep=0.5, depth=1, probe_every=0, dtype=None)
ALL = SiftConfig(keep=1.0)


class Counting:
    """Notes how many candidates were scored by the time of each log of training."""

    def log(self, logs, *arguments):
        if "loss" in logs:
            self.scored = [*getattr(self, "scored", []), self.sifter.stats()["sift/scored"]]
        super().log(logs, *arguments)


class Recording(Counting):
    """Notes the micro-batches of every optimizer step, and what the Trainer counted in them."""

    def get_batch_samples(self, *arguments):
        batches, items = super().get_batch_samples(*arguments)
        self.batches = [*getattr(self, "batches", []), *(batch["input_ids"].tolist() for batch in batches)]
        self.items = [*getattr(self, "items", []), None if items is None else int(items)]
        return batches, items


class Recorded(Recording, SiftTrainerMixin, Trainer):
    pass


class Counted(Counting, SiftTrainerMixin, Trainer):
    pass


def llama(**options):
    return models.build("llama", "causal_lm", **options)


def samples(count, family="llama", task="causal_lm"):
    """Rows of one length, with padding and with labels of which a part is ignored."""
    batch = models.batch_for(models.build(family, task), task, count, LENGTH, Generator().manual_seed(3))
    return [{key: rows[i] for key, rows in batch.items()} for i in range(count)]


def ragged_samples(count):
    """Rows of many lengths; every other pool has longer ones."""
    generator = Generator().manual_seed(9)
    drawn = torch.randint(4, 10, (count,), generator=generator).tolist()
    lengths = [length + 3 * (number // (2 * BATCH) % 2) for number, length in enumerate(drawn)]
    return [{"input_ids": torch.randint(3, models.VOCABULARY, (length,), generator=generator)} for length in lengths]


def padded(rows):
    """A collator that pads to the longest row of its batch."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [row["input_ids"] for row in rows], batch_first=True, padding_value=models.PAD
    )
    used = ids != models.PAD
    return {"input_ids": ids, "attention_mask": used.long(), "labels": torch.where(used, ids, -100)}


def trainer_for(folder, cls=Recorded, *, model=None, data=None, sift=HALF, trainer=None, **arguments):
    defaults = {
        "per_device_train_batch_size": BATCH,
        "max_steps": 5,
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
    }
    return cls(
        model=llama() if model is None else model,
        args=TrainingArguments(str(folder), **(defaults | arguments)),
        train_dataset=samples(80) if data is None else data,
        **(trainer or {}),
        **({} if sift is None else {"sift": sift}),
    )


def trained(folder, *arguments, resume=None, **options):
    trainer = trainer_for(folder, *arguments, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer, name="loss"):
    return [entry[name] for entry in trainer.state.log_history if "loss" in entry]


def assert_equal_runs(one, other):
    """Bit for bit: losses, lengths of gradients, rates, and what was learnt."""
    for name in ("loss", "grad_norm", "learning_rate", "epoch"):
        assert logged(one, name) == logged(other, name), name
    assert len(logged(one)) > 1
    ours, theirs = one.model.state_dict(), other.model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def reference(model, data, steps, micro_batches, smoothing=0.0):
    """The training that selection is to give, step by step: exact picks, and a loss over all labelled positions.

    Pools of 2 b come in the order of the data; the b with the largest loss of a model that really has one layer are
    kept; the loss of a step is the sum over its micro-batches (of all processes) over their labelled positions.
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    picks, counts, losses = [], [], []
    for step in range(steps):
        batches = []
        for i in range(micro_batches):
            start = 2 * BATCH * (step * micro_batches + i)
            rows = data[start : start + 2 * BATCH]
            pool = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
            scores = models.sample_losses(models.shorter(model, 1).eval(), pool)
            kept = scores.argsort(descending=True)[:BATCH].sort().values
            batches.append({key: values[kept] for key, values in pool.items()})
        count = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
            total = total + nn.functional.cross_entropy(
                logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), label_smoothing=smoothing, reduction="sum"
            )
        (total / count).backward()
        optimizer.step()
        optimizer.zero_grad()
        picks += [batch["input_ids"].tolist() for batch in batches]
        counts.append(count)
        losses.append(float(total.detach()) / count)
    return picks, counts, losses


# Nothing is changed by keep = 1


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 3, "max_grad_norm": 0.1},
        {"label_smoothing_factor": 0.1},
        {"bf16": True, "optim": "adamw_torch"},
        {CHECKPOINTING: True},
        {"torch_compile": True, "torch_compile_backend": "eager"},
    ],
    ids=["epochs of accumulated ragged batches", "label smoothing", "bf16", "checkpointing", "compiled"],
)
def test_keep_one_equals_the_plain_trainer_bit_for_bit(tmp_path, arguments):
    runs = [
        trained(tmp_path, cls, sift=sift, model=llama(dropout=0.1), data=samples(43), **arguments)
        for cls, sift in ((Trainer, None), (SiftTrainer, ALL))
    ]
    assert_equal_runs(*runs)


# What is trained on, and how it counts


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_losses_picks_and_item_counts_are_those_of_a_slow_loop(tmp_path, accumulated, smoothing):
    run = trained(
        tmp_path,
        train_sampling_strategy="sequential",
        gradient_accumulation_steps=accumulated,
        label_smoothing_factor=smoothing,
        max_grad_norm=0.0,
    )
    model = llama()
    picks, counts, losses = reference(model, samples(80), 5, accumulated, smoothing)
    assert run.batches == picks
    assert run.items == counts
    assert logged(run) == pytest.approx(losses, rel=1e-5)
    weights = model.state_dict()
    for name, value in run.model.state_dict().items():
        torch.testing.assert_close(value, weights[name], rtol=1e-4, atol=1e-5)


def test_masked_language_models_count_every_label_of_the_selected_rows(tmp_path):
    data = samples(80, "bert", "masked_lm")
    run = trained(tmp_path, model=models.build("bert", "masked_lm"), data=data, gradient_accumulation_steps=2)
    labels = {tuple(row["input_ids"].tolist()): int((row["labels"] != -100).sum()) for row in data}
    by_batch = [sum(labels[tuple(ids)] for ids in batch) for batch in run.batches]
    assert run.items == [a + b for a, b in zip(by_batch[::2], by_batch[1::2], strict=True)]


@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        ({"bf16": True}, 0.03),
        ({CHECKPOINTING: True}, 0.0),
        ({"torch_compile": True, "torch_compile_backend": "eager"}, 0.0),
    ],
    ids=["bf16", "checkpointing", "compiled"],
)
def test_picks_and_losses_stay_with_what_changes_only_how_the_model_computes(tmp_path, arguments, tolerance):
    plain = trained(tmp_path, max_steps=3, train_sampling_strategy="sequential")
    other = trained(tmp_path, max_steps=3, train_sampling_strategy="sequential", **arguments)
    assert other.batches == plain.batches
    assert logged(other) == pytest.approx(logged(plain), rel=tolerance or 1e-6)
    assert tolerance == 0 or logged(other) != logged(plain)  # it did compute otherwise


def test_scoring_a_compiled_model_adds_one_graph(tmp_path):
    graphs = {}
    for name, cls, sift in (("plain", Trainer, None), ("all", Recorded, ALL), ("half", Recorded, HALF)):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trained(tmp_path, cls, sift=sift, torch_compile=True, torch_compile_backend="eager")
        graphs[name] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs["all"] == graphs["plain"] > 0
    assert graphs["half"] == graphs["plain"] + 1


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
def test_only_the_first_layers_run_for_a_score(tmp_path, precision):
    trainer = trainer_for(tmp_path, **precision)
    calls = [0] * models.LAYERS

    def count(position):
        return lambda *_: calls.__setitem__(position, calls[position] + 1)

    for position, layer in enumerate(trainer.model.model.layers):
        layer.register_forward_hook(count(position))
    trainer.train()
    trained_on, scored, checked, compared = 5, 5, 1, 4  # the last two on two rows of the first pool
    assert calls == [trained_on + compared + scored + checked, *[trained_on + compared] * (models.LAYERS - 1)]


def test_an_iterable_dataset_gives_the_pools_of_a_sequential_one(tmp_path):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(samples(80))

    listed = trained(tmp_path, train_sampling_strategy="sequential")
    streamed = trained(tmp_path, data=Stream())
    assert streamed.batches == listed.batches
    assert logged(streamed) == logged(listed)


def test_training_twice_with_one_trainer_begins_selection_anew(tmp_path):
    def make():
        return llama()

    uniform = dataclasses.replace(HALF, schedule=lambda step: step % 2)
    args = trainer_for(tmp_path).args
    trainer = Recorded(model_init=make, args=args, train_dataset=samples(80), sift=uniform)
    trainer.train()
    first, losses, totals = trainer.batches, logged(trainer), trainer.state.log_history[-1]
    trainer.batches = []
    trainer.train()
    assert trainer.batches == first
    assert logged(trainer) == losses
    for name in ("candidates_seen", "samples_trained", "sift/step"):
        assert trainer.state.log_history[-1][name] == totals[name] > 0


# What else a Trainer does


EVALUATING = {"eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}


def test_evaluation_leaves_selection_alone_and_sees_all_samples(tmp_path):
    held_out = samples(19)
    uniform = dataclasses.replace(HALF, schedule=lambda step: step % 2)
    plain = trained(tmp_path, sift=uniform)
    with_evaluation = trained(tmp_path, sift=uniform, trainer={"eval_dataset": held_out}, **EVALUATING)
    assert with_evaluation.batches == plain.batches
    assert logged(with_evaluation) == logged(plain)
    entries = [entry for entry in with_evaluation.state.log_history if "eval_loss" in entry]
    assert len(entries) == 6
    assert not any("samples_trained" in entry or "sift/step" in entry for entry in entries)
    untouched = Trainer(model=with_evaluation.model, args=with_evaluation.args, eval_dataset=held_out)
    assert entries[-1]["eval_loss"] == untouched.evaluate()["eval_loss"]


class Averaging(torch.optim.SGD):
    """Like schedule-free optimizers it has other weights for evaluation than for training."""

    evaluating = False

    def eval(self):
        self.scale(not self.evaluating and 0.5)
        self.evaluating = True

    def train(self):
        self.scale(self.evaluating and 2.0)
        self.evaluating = False

    def scale(self, factor):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(factor or 1.0)


def test_scores_come_from_the_weights_of_training_where_evaluation_has_others(tmp_path):
    def run(**arguments):
        model = llama()
        optimizer = Averaging(model.parameters(), lr=RATE)
        trainer = {"eval_dataset": samples(8), "optimizers": (optimizer, None)}
        return trained(tmp_path, model=model, trainer=trainer, **arguments)

    plain, with_evaluation = run(), run(**EVALUATING)
    assert with_evaluation.batches == plain.batches
    assert logged(with_evaluation) == logged(plain)


class Steps(transformers.TrainerCallback):
    """What callbacks are told, and when."""

    def __init__(self):
        self.seen = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append(("begin", state.global_step, state.epoch, state.max_steps))

    def on_substep_end(self, args, state, control, **kwargs):
        self.seen.append(("substep", state.global_step))

    def on_step_end(self, args, state, control, **kwargs):
        self.seen.append(("end", state.global_step, state.epoch))

    def on_epoch_end(self, args, state, control, **kwargs):
        self.seen.append(("epoch", state.global_step, state.epoch, state.num_train_epochs))


def test_callbacks_see_the_steps_of_a_trainer_whose_batches_are_pools(tmp_path):
    schedule = {"max_steps": -1, "num_train_epochs": 2, "gradient_accumulation_steps": 2}
    sifting, plain = Steps(), Steps()
    trained(tmp_path, data=samples(43), trainer={"callbacks": [sifting]}, **schedule)
    plain_arguments = {"per_device_train_batch_size": 2 * BATCH, **schedule}
    trained(tmp_path, Trainer, sift=None, data=samples(43), trainer={"callbacks": [plain]}, **plain_arguments)
    assert sifting.seen == plain.seen
    assert [event[0] for event in sifting.seen].count("epoch") == 2


def test_candidates_and_trained_samples_are_counted_apart(tmp_path):
    # Five pools of 8 and a last one of 3, fewer than a batch: it is trained on whole.
    run = trained(tmp_path, data=samples(43), max_steps=-1, num_train_epochs=2)
    per_step = [(8, 4)] * 5 + [(3, 3)]
    seen = [sum(offered for offered, _ in (per_step * 2)[: step + 1]) for step in range(12)]
    kept = [sum(trained_on for _, trained_on in (per_step * 2)[: step + 1]) for step in range(12)]
    assert logged(run, "candidates_seen") == seen
    assert logged(run, "samples_trained") == kept
    assert [len(batch) for batch in run.batches] == [trained_on for _, trained_on in per_step * 2]
    assert run.scored[-1] == 10 * 8  # a pool of which all is kept is not scored
    assert all(value > 0 for value in logged(run, "sift/score_ms") + logged(run, "sift/train_ms"))
    summary = run.state.log_history[-1]
    assert (summary["candidates_seen"], summary["samples_trained"]) == (86, 46)
    assert summary["train_samples_per_second"] == pytest.approx(46 / summary["train_runtime"], abs=1e-3)


def test_waiting_for_a_slow_loader_is_part_of_the_step_that_needs_its_pool(tmp_path):
    slow_ms = 30.0

    def collate(rows):
        time.sleep(slow_ms / 1e3)
        return transformers.default_data_collator(rows)

    class Noting(SiftTrainer):
        ledger_path = tmp_path / "ledger.jsonl"

    run = trained(tmp_path, Noting, trainer={"data_collator": collate})
    rows = read_rows(Noting.ledger_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert all(row["wait_ms"] >= slow_ms for row in rows)
    assert all(row["step_ms"] > row["wait_ms"] + row["score_ms"] + row["train_ms"] for row in rows)
    assert sum(run.sifter.ledger.times_ms("wait")) == pytest.approx(sum(row["wait_ms"] for row in rows), rel=1e-4)


# Steps


def test_schedules_probes_and_logs_count_optimizer_steps(tmp_path):
    told = []

    def schedule(step):
        told.append(step)
        return 1.0

    class Noting(Recorded):
        ledger_path = tmp_path / "ledger.jsonl"

    sift = dataclasses.replace(HALF, schedule=schedule, probe_every=2)
    run = trained(tmp_path, Noting, sift=sift, gradient_accumulation_steps=2)
    rows = read_rows(Noting.ledger_path)
    assert logged(run, "sift/step") == [1, 2, 3, 4, 5]
    assert max(told) == 4
    assert [(row["step"], row.get("micro_step", 0)) for row in rows] == [divmod(number, 2) for number in range(10)]
    assert [number for number, row in enumerate(rows) if "probe_ms" in row] == [0, 4, 8]
    assert all("wait_ms" in row for row in rows)


def test_auto_mode_knows_the_length_of_the_training_in_optimizer_steps(tmp_path):
    config = dataclasses.replace(HALF, mode="auto")
    run = trainer_for(tmp_path, sift=config, gradient_accumulation_steps=4)
    run.train()
    assert run.sifter.state_dict()["config"]["control"]["total_steps"] == 5 == run.state.global_step


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_exits_of_a_classifier_learn_from_the_trainers_own_pass_and_from_no_evaluation(tmp_path, smoothing):
    def classifier():
        return models.build("bert", "sequence_classification")

    data = samples(40, "bert", "sequence_classification")
    config = dataclasses.replace(HALF, mode="auto")
    options = {"model": classifier(), "data": data, "sift": config, "label_smoothing_factor": smoothing}
    options |= {"max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
    run = trained(tmp_path, **options)

    # The same steps by hand.
    model, pools = classifier().train(), [data[first : first + 2 * BATCH] for first in range(0, 40, 2 * BATCH)]
    sifter = Sifter(model, config, kept=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for pool in pools[: run.state.global_step]:
        batch = sifter.sift({key: torch.stack([row[key] for row in pool]) for key in pool[0]})
        with sifter.lesson(batch):
            outputs = model(**batch)
        loss = outputs.loss
        if smoothing:
            loss = nn.functional.cross_entropy(outputs.logits, batch["labels"], label_smoothing=smoothing)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    ours, theirs = (sifter.state_dict()["probe_1"]["module"] for sifter in (run.sifter, sifter))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)
    before = json.dumps({name: weight.tolist() for name, weight in ours.items()})
    run.evaluate(data[:BATCH])
    after = run.sifter.state_dict()["probe_1"]["module"]
    assert json.dumps({name: weight.tolist() for name, weight in after.items()}) == before


@pytest.mark.parametrize("config", [{"mode": "auto"}, {"score": "probe"}], ids=["auto", "probe"])
def test_a_classifier_with_probes_resumes_bit_equal(tmp_path, config):
    options = {"data": samples(80, "bert", "sequence_classification"), "max_grad_norm": 0.0, "max_steps": 6}
    options |= {"sift": dataclasses.replace(HALF, **config), "train_sampling_strategy": "sequential"}

    def classifier():
        return models.build("bert", "sequence_classification")

    run = trained(tmp_path, model=classifier(), save_strategy="steps", save_steps=3, **options)
    resumed = trained(tmp_path, model=classifier(), resume=str(tmp_path / "checkpoint-3"), **options)
    ours, theirs = (each.sifter.state_dict()["probe_1"]["module"] for each in (resumed, run))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert_equal_runs(resumed, run)


def test_logs_carry_five_numbers_of_selection_and_the_sifter_has_the_rest(tmp_path):
    run = trained(tmp_path, sift=dataclasses.replace(HALF, probe_every=2))
    numbers = {"sift/step", "sift/gain", "sift/rank_correlation", "sift/score_ms", "sift/train_ms"}
    for entry in run.state.log_history:
        assert {name for name in entry if name.startswith("sift/")} == numbers
        assert {"candidates_seen", "samples_trained"} <= set(entry)
    assert len(run.state.log_history) == 6
    assert {"sift/scored", "sift/non_finite", "sift/overlap", "sift/wait_ms"} <= set(run.sifter.stats())


# Resuming


SCHEDULED = dataclasses.replace(HALF, schedule=lambda step: step % 3 % 2, probe_every=2)  # a few steps are uniform


@pytest.mark.parametrize(
    ("accumulated", "cut"),
    [(2, 2), (2, 3), (2, 4), (4, 1), (4, 3)],  # with four, an epoch has a step of four pools and one of two
    ids=["within the first epoch", "at its end", "within the second", "before a partial step", "in the second, before"],
)
def test_a_run_resumed_from_a_checkpoint_is_bit_equal(tmp_path, accumulated, cut):
    options = {
        "sift": SCHEDULED,
        "data": samples(43),
        "gradient_accumulation_steps": accumulated,
        "max_steps": 6,
        "optim": "adamw_torch",
        "learning_rate": 1e-3,
    }
    whole = trained(tmp_path / "whole", model=llama(dropout=0.1), save_strategy="steps", save_steps=cut, **options)
    checkpoint = str(tmp_path / "whole" / f"checkpoint-{cut}")
    resumed = trained(tmp_path / "resumed", model=llama(dropout=0.1, seed=1), resume=checkpoint, **options)
    assert_equal_runs(resumed, whole)  # the log of what was before is part of the checkpoint
    assert resumed.batches == whole.batches[-len(resumed.batches) :]
    assert resumed.items == whole.items[cut:]
    names = ("candidates_seen", "samples_trained", "sift/step", "sift/rank_correlation")
    assert all(logged(resumed, name) == logged(whole, name) for name in names)
    assert resumed.scored == whole.scored[cut:]
    assert logged(whole, "sift/step") == [1, 2, 3, 4, 5, 6]
    ours, theirs = (trainer.state.log_history[-1] for trainer in (resumed, whole))
    assert ours["train_samples_per_second"] * ours["train_runtime"] < theirs["samples_trained"]  # of this call only


def saved(folder, **options):
    trained(folder, max_steps=2, save_strategy="steps", save_steps=2, **options)
    return str(folder / "checkpoint-2")


def test_a_checkpoint_of_another_selection_or_batch_size_is_refused(tmp_path):
    checkpoint = saved(tmp_path)
    with pytest.raises(ValueError, match=r"configured otherwise \(depth: saved 1, now 2\)"):
        trained(tmp_path, sift=dataclasses.replace(HALF, depth=2), resume=checkpoint)
    with pytest.raises(
        ValueError, match=r"batches held 4 samples, now they hold 6\. Resume with per_device_train_batc"
    ):
        trained(tmp_path, per_device_train_batch_size=6, resume=checkpoint)


def changed(text, **values):
    return json.dumps(json.loads(text) | values)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:-20],
        lambda text: "",
        lambda text: "[" * 100_000,
        lambda text: "null",
        lambda text: "[1, 2]",
        lambda text: "{}",
        lambda text: changed(text, batch_size="4"),
        lambda text: changed(text, samples_trained=-1),
        lambda text: changed(text, sifter=None),
        lambda text: changed(text, sifter={**json.loads(text)["sifter"], "step": "x"}),
    ],
    ids=["cut off", "empty", "deep", "null", "list", "no keys", "batch size", "count", "no sifter", "sifter's step"],
)
def test_a_damaged_state_of_selection_is_refused_by_its_name_and_changes_nothing(damage, two_steps, tmp_path):
    checkpoint = Path(shutil.copytree(two_steps, tmp_path / "checkpoint-2"))
    path = checkpoint / "sifter_0.json"
    path.write_text(damage(path.read_text()))
    trainer = trainer_for(tmp_path)
    before = trainer.sifter.state_dict()
    with pytest.raises(ValueError, match=re.escape(str(path))) as caught:
        trainer.train(resume_from_checkpoint=str(checkpoint))
    assert str(caught.value).count("\n") <= 2
    assert trainer.sifter.state_dict() == before
    assert trainer.sifter.step == 0


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """The checkpoint of a run of two steps."""
    return saved(tmp_path_factory.mktemp("two"))


def test_a_plain_trainers_checkpoint_begins_selection_anew_and_says_so(tmp_path, caplog):
    checkpoint = saved(tmp_path, cls=Trainer, sift=None)
    run = trained(tmp_path, resume=checkpoint)
    assert "checkpoint-2 holds no state of selection" in caplog.text
    assert run.sifter.step == 3
    assert run.state.log_history[-1]["samples_trained"] == 3 * BATCH
    caplog.clear()
    trained(tmp_path, resume=saved(tmp_path))
    assert caplog.text == ""


# Auto


class WithLoss(nn.Module):
    """A ladder that gives its loss, as the Trainer expects."""

    def __init__(self):
        super().__init__()
        ladder = models.ladder()
        self.rungs, self.head = ladder.rungs, ladder.head

    def forward(self, states, labels=None):
        logits = models.Ladder.forward(self, states)
        return {"loss": None if labels is None else nn.functional.cross_entropy(logits, labels), "logits": logits}


class OwnLoss(Counted):
    """Computes its loss itself, so that nothing can be weighed in it."""

    def compute_loss(self, *arguments, **options):
        return super().compute_loss(*arguments, **options)


class WithoutLogits(WithLoss):
    """Gives its loss alone while it is trained, as fused losses do."""

    def forward(self, states, labels=None):
        output = super().forward(states, labels)
        return {"loss": output["loss"]} if self.training and labels is not None else output


@pytest.mark.parametrize(
    ("cls", "model", "rule"),
    [(Counted, WithLoss, "unbiased"), (OwnLoss, WithLoss, "greedy"), (Counted, WithoutLogits, "greedy")],
)
def test_auto_switches_on_where_it_pays_by_a_rule_that_the_loss_allows_and_off_before_the_end(
    cls, model, rule, tmp_path, caplog
):
    pools = [models.mostly_learnt(Generator().manual_seed(step)) for step in range(40)]
    data = [{"states": x, "labels": y} for inputs, labels in pools for x, y in zip(inputs, labels, strict=True)]
    costs = {"train": 100.0, "probe": 60.0, "score_1": 1.0, "score_2": 2.0, "score_3": 3.0}
    config = SiftConfig(
        mode="auto",
        score="entropy",  # by the model's own head, which knows at once
        family=models.LADDER,
        control=Control(probe_share=0.2, reference_costs=costs),
        dtype=None,
    )
    options = {
        "model": model(),
        "data": data,
        "sift": config,
        "per_device_train_batch_size": 32,
        "gradient_accumulation_steps": 2,
        "max_steps": 20,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
    }
    run = trained(tmp_path, cls, save_strategy="steps", save_steps=10, **options)
    events = [record.getMessage() for record in caplog.records if record.name == "earlysift"]
    assert f"uniform -> {rule}" in events[0]
    scored = run.scored
    assert scored[0] == 0
    assert scored[-1] > 10 * 64
    if rule == "greedy":  # what is unbiased need not end before the training does
        assert "greedy" in events[-1].split("->")[0]
        assert "-> uniform" in events[-1]
        assert scored[-1] == scored[-2]  # as the length of the training is known
    resumed = trained(tmp_path, cls, resume=str(tmp_path / "checkpoint-10"), **(options | {"model": model()}))
    assert_equal_runs(resumed, run)
    assert resumed.scored == scored[10:]


class Large(WithLoss):
    """Runs out of memory when it trains on more than three samples."""

    def forward(self, states, labels=None):
        if labels is not None and len(states) > 3:
            raise RuntimeError("CUDA out of memory.")
        return super().forward(states, labels)


def test_a_batch_size_that_is_searched_for_keeps_its_share_of_the_pool(tmp_path):
    inputs, labels = models.mostly_learnt(Generator().manual_seed(0))
    data = [{"states": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]
    config = dataclasses.replace(HALF, family=models.LADDER)
    run = trained(tmp_path, SiftTrainer, model=Large(), data=data, sift=config, auto_find_batch_size=True)
    assert logged(run, "samples_trained") == [3, 6, 9, 12, 15]
    assert logged(run, "candidates_seen") == [6, 12, 18, 24, 30]


# What cannot work


def test_what_cannot_work_is_refused_at_construction_all_at_once(tmp_path):
    with pytest.raises(
        ValueError, match=r"(?s)batch_rebalance.*Use another strategy.*keep=0\.9 leaves no choice"
    ) as error:
        trainer_for(
            tmp_path,
            sift=SiftConfig(keep=0.9),
            per_device_train_batch_size=2,
            train_sampling_strategy="batch_rebalance",
        )
    assert "parallelism" not in str(error.value)
    sharded = WithLoss()
    sharded._tp_size = 2  # as loading a model in shards sets it
    with pytest.raises(ValueError, match=r"share a batch between processes, which select on their own"):
        trainer_for(tmp_path, model=sharded, sift=dataclasses.replace(HALF, family=models.LADDER))
    with pytest.raises(ValueError, match=r"Expected depth in 1\.\.3"):
        trainer_for(tmp_path, sift=SiftConfig(depth=4))
    with pytest.raises(ValueError, match=r"kept=4 is given, .*Leave kept out"):
        trainer_for(tmp_path, sift=SiftConfig(kept=4))
    trainer_for(tmp_path, sift=ALL, per_device_train_batch_size=1)


def test_batch_norm_is_refused_as_the_trainer_would_train_it_on_selected_samples(tmp_path):
    row = Family("blocks", task="masked_lm")
    for mode in (True, False):  # the Trainer ends evaluation mode, in which saved models are loaded
        model = models.build("plain", "masked_lm", norm=nn.BatchNorm1d).train(mode)
        with pytest.raises(ValueError, match=r"statistics of the selected samples \(norm\)\. Use another norm"):
            trainer_for(tmp_path, model=model, sift=dataclasses.replace(HALF, family=row))
        trainer_for(tmp_path, model=model, sift=dataclasses.replace(ALL, family=row))


def test_several_devices_in_one_process_are_refused_with_the_way_out(tmp_path):
    model = llama()
    for devices in (1, 2):
        arguments = TrainingArguments(str(tmp_path), per_device_train_batch_size=BATCH, report_to="none", use_cpu=True)
        arguments._n_gpu = devices  # as on a machine with as many
        given = {"model": model, "args": arguments, "train_dataset": samples(8), "sift": HALF}
        if devices == 1:
            SiftTrainer(**given)
        else:
            with pytest.raises(ValueError, match=r"2 devices by nn\.DataParallel.*torchrun --nproc-per-node 2, or set"):
                SiftTrainer(**given)


def test_documents_of_flattened_batches_are_selected_but_their_losses_are_not_remembered(tmp_path):
    flat = transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    rows = [{"input_ids": list(range(3, 9)), "labels": list(range(3, 9))} for _ in range(80)]
    trainer = trainer_for(tmp_path, data=rows, model=llama(), max_steps=2)
    trainer.data_collator = flat
    metrics = trainer.train().metrics
    assert (metrics["candidates_seen"], metrics["samples_trained"]) == (4 * BATCH, 2 * BATCH)
    remembering = trainer_for(
        tmp_path, data=rows, model=llama(), sift=dataclasses.replace(HALF, score="memory", sample_id="id")
    )
    remembering.data_collator = flat
    with pytest.raises(ValueError, match="cannot be read off batches that are one row of documents"):
        remembering.train()


FLATTENED = """
import json, os, sys
import torch
rank, store, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
os.environ |= {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "localhost"}
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
from test_huggingface import BATCH, flattened
trainer = flattened(".", BATCH, scope="global", ddp_backend="gloo", ddp_find_unused_parameters=False)
weights = {name: value.tolist() for name, value in trainer.model.state_dict().items()}
print(json.dumps([trainer.batches, weights, trainer.state.log_history[-1]["samples_trained"]]))
torch.distributed.destroy_process_group()
"""


def flattened(folder, rows, *, scope="local", **options):
    """A training of three steps on the documents of flattened rows."""
    trainer = trainer_for(
        folder,
        data=ragged_samples(48),
        sift=dataclasses.replace(HALF, scope=scope),
        trainer={"data_collator": transformers.DataCollatorWithFlattening(return_flash_attn_kwargs=True)},
        per_device_train_batch_size=rows,
        max_steps=3,
        train_sampling_strategy="sequential",
        **options,
    )
    trainer.train()
    return trainer


def test_two_processes_select_the_documents_of_flattened_rows_as_one_does(tmp_path):
    ranks = on_ranks(2, FLATTENED, tmp_path)
    one = flattened(tmp_path / "one", 2 * BATCH)
    for step, (batch,) in enumerate(one.batches):
        documents = [batch_of_rank for batches, _, _ in ranks for batch_of_rank in batches[step]]
        assert sorted(token for row in documents for token in row) == sorted(batch)
    for _, weights, documents in ranks:
        assert documents == 3 * 2 * BATCH
        for name, value in one.model.state_dict().items():
            torch.testing.assert_close(torch.tensor(weights[name]), value, rtol=1e-4, atol=1e-5)


def test_a_first_pool_smaller_than_a_batch_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"at least 4 candidates .* got 3"):
        trained(tmp_path, data=samples(3))


def test_a_config_and_its_options_by_name_make_the_same_sifter():
    model = models.build("bert", "masked_lm")
    options = {"keep": 0.25, "depth": 2, "score": "margin", "trim": True, "seed": 3}
    by_name, by_config = Sifter(model, **options), Sifter(model, SiftConfig(**options))
    assert by_name.config == by_config.config == Sifter(model, SiftConfig(keep=0.25), **options).config
    assert by_name.state_dict() == by_config.state_dict()
    with pytest.raises(TypeError, match="unexpected keyword argument 'kep'"):
        Sifter(model, kep=0.5)


# Several processes


RANK = """
import json, os, sys
import torch, models
import test_huggingface as tests
from earlysift import selectors


def correlations(trainer):  # what this process saw; the log of what was before the checkpoint is that of the first one
    return tests.logged(trainer, "sift/rank_correlation")[3:]


class Weighed(tests.Recorded):
    def _selected(self, pool, micro_step):
        batch = super()._selected(pool, micro_step)
        rows = {name: batch[name].tolist() for name in ("input_ids", "attention_mask", "labels")}
        self.noted = [*getattr(self, "noted", []), [rows, self._waiting[-1].weights.tolist()]]
        return batch


torch.distributed.init_process_group("gloo")
rank, folder = torch.distributed.get_rank(), sys.argv[1]
options = {"ddp_backend": "gloo", "train_sampling_strategy": "sequential", "max_grad_norm": 0.0}
plain = tests.trained(folder, **options)
checkpointed = {"sift": tests.SCHEDULED, "ddp_backend": "gloo", "max_steps": 6}
whole = tests.trained(folder, model=tests.llama(dropout=0.1), save_strategy="steps", save_steps=3, **checkpointed)
checkpoint = os.path.join(folder, "checkpoint-3")
resumed = tests.trained(folder, model=tests.llama(dropout=0.1, seed=1), resume=checkpoint, **checkpointed)
torch.distributed.barrier()
if rank == 1:
    os.remove(os.path.join(checkpoint, "sifter_1.json"))  # as if one process had saved it
grown = tests.trained(folder, resume=checkpoint, **checkpointed)
compiled = tests.trained(folder, torch_compile=True, torch_compile_backend="eager", **options)
uneven = []
for size in (33, 39, 40, 47):  # behind two pools of eight on each process too few candidates for two more
    run = tests.trained(folder, data=tests.samples(size), num_train_epochs=1, **options | {"max_steps": -1})
    uneven.append([size, [len(batch) for batch in run.batches], tests.logged(run, "candidates_seen")[-1]])
together = tests.dataclasses.replace(tests.HALF, scope="global")
collator = {"trainer": {"data_collator": tests.padded}, "data": tests.ragged_samples(80)}
ragged = tests.trained(folder, sift=together, **collator, **options)
drawn = tests.dataclasses.replace(tests.HALF, select=selectors.proportional)
accumulating = {"data": tests.samples(160), "gradient_accumulation_steps": 2, **options}
weighed = tests.trained(folder, Weighed, sift=drawn, **accumulating)
told = {
    "ragged": ragged.batches,
    "weighed": [weighed.noted, tests.logged(weighed)],
    "losses": tests.logged(plain), "batches": plain.batches, "items": plain.items,
    "seen": tests.logged(plain, "candidates_seen"), "trained": tests.logged(plain, "samples_trained"),
    "whole": [tests.logged(whole), whole.batches[3:], whole.items[3:], correlations(whole)],
    "resumed": [tests.logged(resumed), resumed.batches, resumed.items, correlations(resumed)],
    "grown": [grown.sifter.step, tests.logged(grown, "samples_trained")],
    "weights equal": all(map(torch.equal, resumed.model.state_dict().values(), whole.model.state_dict().values())),
    "compiled": [compiled.batches, tests.logged(compiled)],
    "uneven": uneven,
}
with open(os.path.join(folder, f"{rank}.json"), "w") as file:
    json.dump(told, file)
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What two processes under torchrun found."""
    folder = tmp_path_factory.mktemp("ranks")
    (folder / "rank.py").write_text(RANK)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = run([*torchrun, str(folder / "rank.py"), str(folder)])
    assert done.returncode == 0, done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def run(arguments):
    source, tests = Path(earlysift.__file__).parents[1], Path(models.__file__).parent
    path = os.pathsep.join([str(source), str(tests), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def test_two_processes_train_as_one_that_accumulates_their_batches(two_ranks):
    first, second = two_ranks
    picks, counts, losses = reference(llama(), samples(80), 5, 2)
    assert first["batches"] == picks[::2]
    assert second["batches"] == picks[1::2]
    assert first["items"] == second["items"] == counts
    assert first["losses"] == second["losses"] == pytest.approx(losses, rel=1e-5)
    assert first["seen"] == second["seen"] == [16, 32, 48, 64, 80]
    assert first["trained"] == second["trained"] == [8, 16, 24, 32, 40]


def test_two_processes_weigh_their_samples_over_the_labels_of_all(two_ranks):
    model = llama()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    expected = []
    for step in range(5):
        parts = [part for told in two_ranks for part in told["weighed"][0][2 * step : 2 * step + 2]]
        sums, labels = [], 0
        for rows, weights in parts:
            ids, mask, targets = (torch.tensor(rows[name]) for name in ("input_ids", "attention_mask", "labels"))
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].transpose(1, 2)
            losses = nn.functional.cross_entropy(logits, targets[:, 1:], reduction="none").sum(dim=1)
            sums.append((losses * torch.tensor(weights)).sum())
            labels += int((targets[:, 1:] != -100).sum())
        loss = torch.stack(sums).sum() / labels
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    for told in two_ranks:
        assert told["weighed"][1] == pytest.approx(expected, rel=1e-4)
    assert two_ranks[0]["weighed"][0] != two_ranks[1]["weighed"][0]


def test_two_processes_resume_bit_equal_each_with_picks_of_its_own(two_ranks):
    for told in two_ranks:
        assert told["resumed"] == told["whole"]
        assert told["weights equal"]
        assert told["grown"] == [6, [8, 16, 24, 32, 40, 48]]
    assert two_ranks[0]["whole"][1] != two_ranks[1]["whole"][1]
    assert two_ranks[0]["whole"][3] != two_ranks[1]["whole"][3]


def test_two_processes_select_together_from_batches_that_each_padded_for_itself(two_ranks):
    first, second = (told["ragged"] for told in two_ranks)
    assert [len(batch) for batch in first + second] == [BATCH] * 10
    rows = ragged_samples(80)
    pools = [padded(rows[start : start + 2 * BATCH]) for start in (0, 2 * BATCH)]
    assert pools[0]["input_ids"].size(1) != pools[1]["input_ids"].size(1)
    pool = padded(rows[: 4 * BATCH])
    scores = models.sample_losses(models.shorter(llama(), 1).eval(), pool)
    best = pool["input_ids"][scores.argsort(descending=True)[: 2 * BATCH]].tolist()
    assert sorted(first[0] + second[0]) == sorted(best)


def test_the_last_pools_of_an_epoch_are_filled_up_on_both_processes(two_ranks):
    first, second = (told["uneven"] for told in two_ranks)
    assert first == second
    for size, batches, seen in first:
        assert batches == [BATCH] * 3
        assert seen == 48 > size  # accelerate fills up with candidates from the beginning


def test_two_processes_with_a_compiled_model_pick_and_learn_the_same(two_ranks):
    for told in two_ranks:
        batches, losses = told["compiled"]
        assert batches == told["batches"]
        assert losses == pytest.approx(told["losses"], rel=1e-6)


def test_without_transformers_the_import_names_the_way_out():
    done = run(["-c", "import sys; sys.modules['transformers'] = None; import earlysift.adapters.huggingface"])
    assert done.returncode == 1
    assert "pip install 'earlysift[hf]'" in done.stderr


# Accelerate's loop needs no adapter


@pytest.mark.parametrize("cut", [0, 2, 5, 7])
def test_an_accelerate_loop_resumes_bit_equal_with_the_sifter_registered(tmp_path, cut):
    def loop(begin, end, folder, *, save=None, seed=0):
        accelerator = accelerate.Accelerator(cpu=True)
        model = llama(seed=seed)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        loader = torch.utils.data.DataLoader(samples(80), batch_size=2 * BATCH)  # ten pools
        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        sifter = Sifter(model, keep=0.5, schedule=lambda step: step % 3 % 2, probe_every=0, dtype=None)
        accelerator.register_for_checkpointing(sifter)
        losses, picks = [], []
        if begin:
            accelerator.load_state(folder)
            loader = accelerator.skip_first_batches(loader, begin)
        for step, pool in enumerate(loader, begin):
            if step == save:
                accelerator.save_state(folder)
            if step == end:
                break
            batch = sifter.sift(pool)
            loss = model(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            picks.append(sifter.selection.indices.tolist())
        return losses, picks, accelerator.unwrap_model(model).state_dict()

    folder = str(tmp_path / "state")
    losses, picks, weights = loop(0, 9, folder, save=cut + 1)
    resumed_losses, resumed_picks, resumed_weights = loop(cut + 1, 9, folder, seed=1)
    assert resumed_losses == losses[cut + 1 :]
    assert resumed_picks == picks[cut + 1 :]
    assert all(torch.equal(resumed_weights[name], weights[name]) for name in weights)


# TRL


def fine_tuned(trl, folder, sift=HALF, resume=None, seed=0, noting=Recording, **arguments):
    """A run of TRL's SFTTrainer on documents of several lengths."""
    import datasets
    import tokenizers

    class SiftSFTTrainer(noting, SiftTrainerMixin, trl.SFTTrainer):
        pass

    words = tokenizers.models.WordLevel({str(i): i for i in range(models.VOCABULARY)}, unk_token="0")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), pad_token="0", eos_token="2", unk_token="0"
    )
    generator = Generator().manual_seed(5)
    lengths = torch.randint(4, 12, (160,), generator=generator).tolist()
    rows = [torch.randint(3, models.VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
    defaults = {
        "per_device_train_batch_size": BATCH,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": True,  # TRL's default, by its new name
        "dataloader_pin_memory": False,
        "report_to": "none",
        "max_length": 12,
    }
    trainer = (trl.SFTTrainer if sift is None else SiftSFTTrainer)(
        model=llama(seed=seed),
        args=trl.SFTConfig(str(folder), **(defaults | arguments)),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows}),
        processing_class=tokenizer,
        **({} if sift is None else {"sift": sift}),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


LAYOUTS = pytest.mark.parametrize(
    "layout", [{}, {"packing": True, "packing_strategy": "wrapped"}], ids=["padded", "packed"]
)


@LAYOUTS
def test_keep_one_equals_plain_supervised_fine_tuning_bit_for_bit(trl, tmp_path, layout):
    plain, sifting = (fine_tuned(trl, tmp_path, sift, **layout) for sift in (None, ALL))
    assert_equal_runs(sifting, plain)
    assert logged(sifting, "mean_token_accuracy") == logged(plain, "mean_token_accuracy")


@LAYOUTS
def test_supervised_fine_tuning_keeps_the_largest_exit_losses_and_resumes_bit_equal(trl, tmp_path, layout):
    options = {"gradient_accumulation_steps": 2, **layout}
    whole = fine_tuned(trl, tmp_path, SCHEDULED, save_strategy="steps", save_steps=2, **options)
    resumed = fine_tuned(trl, tmp_path, SCHEDULED, resume=str(tmp_path / "checkpoint-2"), seed=1, **options)
    assert_equal_runs(resumed, whole)
    assert resumed.batches == whole.batches[4:]
    assert [len(batch) for batch in whole.batches] == [BATCH] * 8
    assert logged(whole, "samples_trained") == [8, 16, 24, 32]
    assert all(value > 0 for value in logged(whole, "num_tokens"))
    first = fine_tuned(trl, tmp_path, train_sampling_strategy="sequential", max_steps=1, **layout)
    pool = next(iter(first.get_train_dataloader()))
    scores = models.sample_losses(models.shorter(llama(), 1).eval(), dict(pool))
    kept = scores.argsort(descending=True)[:BATCH].sort().values
    assert first.batches[0] == pool["input_ids"][kept].tolist()
    assert first.items == [int((pool["labels"][kept][:, 1:] != -100).sum())]


def test_packing_of_varying_numbers_of_documents_is_refused_with_the_way_out(trl, tmp_path):
    with pytest.raises(
        ValueError, match=r"varying number of documents .* Use packing_strategy='wrapped', or packing=False"
    ):
        fine_tuned(trl, tmp_path, packing=True)


def test_padding_free_fine_tuning_keeps_the_documents_that_padded_fine_tuning_keeps(trl, tmp_path):
    padded = fine_tuned(trl, tmp_path)
    flat = fine_tuned(trl, tmp_path, padding_free=True, max_length=None)
    kept = [[token for sample in batch for token in sample if token] for batch in padded.batches]
    assert [batch[0] for batch in flat.batches] == kept  # token 0 is the padding
    assert flat.items == padded.items
    torch.testing.assert_close(
        torch.tensor(logged(flat, "loss")), torch.tensor(logged(padded, "loss")), rtol=1e-3, atol=1e-3
    )
