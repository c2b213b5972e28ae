"""SIFT in Lightning's real Trainer: picks of a slow loop, resuming within an epoch, nothing left behind."""

import logging
import re
import subprocess
import sys
import warnings

import pytest
import torch
import transformers
from torch import Generator, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

import models
from earlysift import SiftConfig, warmup
from earlysift.datasets import WithIds
from earlysift.ledger import read_rows
from processes import on_ranks
from test_guests import everything

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch")

    from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import fully_shard

    from earlysift.adapters.lightning import LOGGED, ResumableLoader, SiftCallback, _rules_of

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning warns of few workers, of no loggers, and more

BATCH, RATE = 4, 0.05
HALF = SiftConfig(keep=0.5, depth=1, probe_every=0, dtype=None)
FAMILY = ("bert", "sequence_classification")


def rows(count=52):
    """Candidates of six pools of eight and one of four."""
    batch = models.batch_for(models.build(*FAMILY), FAMILY[1], count, 8, Generator().manual_seed(3))
    return [{key: values[i] for key, values in batch.items()} for i in range(count)]


class Module(lightning.LightningModule):
    """A small model at a constant rate; notes what it is trained on."""

    def __init__(self, seed=0, model=None):
        super().__init__()
        self.model = model or models.build(*FAMILY, seed=seed)
        self.batches = []

    def training_step(self, batch):
        self.batches.append(batch["input_ids"].tolist())
        return self.model(**batch).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


class Plain(Module):
    """The same by SGD, and of batches that are lists."""

    def training_step(self, batch):
        inputs, labels = batch
        self.batches.append(len(labels))
        return nn.functional.cross_entropy(self.model(inputs), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


def loader(data=None, cls=ResumableLoader, **options):
    defaults = {"batch_size": 2 * BATCH, "shuffle": True, "generator": Generator().manual_seed(5)}
    return cls(rows() if data is None else data, **(defaults | options))


def trainer_for(folder, *callbacks, **options):
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "log_every_n_steps": 1,
        "default_root_dir": str(folder),
    }
    return lightning.Trainer(callbacks=list(callbacks), **(defaults | options))


def trained(folder, sift=HALF, *, module=None, data=None, resume=None, save=False, callback=None, **options):
    """A module that was trained, and the callback that selected."""
    module, callback = module or Module(), callback or SiftCallback(sift)
    callbacks = [callback]
    if save:
        every = {"save_top_k": -1, "every_n_train_steps": 1, "filename": "{step}"}
        callbacks.append(lightning.callbacks.ModelCheckpoint(folder, **every))
        options["enable_checkpointing"] = True
    trainer = trainer_for(folder, *callbacks, **options)
    trainer.fit(module, loader() if data is None else data, ckpt_path=resume)
    return module, callback


def equal(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# What is trained on


@pytest.mark.parametrize("accumulated", [1, 3])
def test_picks_and_steps_are_those_of_a_slow_loop(tmp_path, accumulated):
    data = rows()
    module, callback = trained(
        tmp_path, data=loader(data, shuffle=False), accumulate_grad_batches=accumulated, max_epochs=2
    )
    model, micro_step, steps = models.build(*FAMILY), 0, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    picks = []
    for _ in range(2):
        for start in range(0, len(data), 2 * BATCH):
            some = data[start : start + 2 * BATCH]
            pool = {key: torch.stack([row[key] for row in some]) for key in some[0]}
            scores = models.sample_losses(models.shorter(model, 1).eval(), pool)
            kept = scores.argsort(descending=True)[:BATCH].sort().values
            batch = {key: values[kept] for key, values in pool.items()}
            (model(**batch).loss / accumulated).backward()
            picks.append(batch["input_ids"].tolist())
            micro_step += 1
            if micro_step % accumulated == 0 or start + 2 * BATCH >= len(data):  # Lightning steps at an epoch's end
                optimizer.step()
                optimizer.zero_grad()
                micro_step, steps = 0, steps + 1
    assert module.batches == picks
    assert equal(module.model, model)
    assert callback.sifter.step == steps
    assert callback.sifter.state_dict()["counts"]["candidates"] == 2 * len(data)


def test_every_step_has_its_row_in_the_ledger_the_last_one_too(tmp_path):
    path = tmp_path / "ledger.jsonl"
    module, _ = trained(tmp_path, callback=SiftCallback(HALF, ledger_path=path), max_epochs=1)
    steps = read_rows(path)
    assert [row["step"] for row in steps] == list(range(len(module.batches)))
    assert sum(row["trained"] for row in steps) == sum(map(len, module.batches))
    assert all(row["train_ms"] > 0 for row in steps)


def test_a_batch_that_is_a_list_is_selected_in_place(tmp_path):
    pool = models.mostly_learnt(Generator().manual_seed(0))
    data = list(zip(*pool, strict=True))
    module = Plain(model=models.ladder())
    sift = SiftConfig(keep=0.25, family=models.LADDER, dtype=None)
    _, callback = trained(tmp_path, sift, module=module, data=DataLoader(data, batch_size=16), max_epochs=1)
    assert module.batches == [4] * (len(data) // 16)
    assert callback.sifter.step == len(data) // 16


def test_evaluation_between_steps_is_left_alone(tmp_path):
    seen = []

    class Validated(Module):
        def validation_step(self, batch):
            seen.append(len(batch["labels"]))

    module = Validated()
    trainer = trainer_for(tmp_path, SiftCallback(HALF), max_epochs=1, val_check_interval=2)
    trainer.fit(module, loader(), DataLoader(rows(8), batch_size=8))
    assert set(seen) == {8}
    assert len(seen) > 3
    assert module.batches == trained(tmp_path, max_epochs=1)[0].batches


def test_schedules_may_be_in_epochs(tmp_path):
    sift = SiftConfig(keep=0.5, schedule=warmup(1), probe_every=0, dtype=None)
    runs = {
        unit: trained(tmp_path, sift, callback=SiftCallback(sift, schedules_in=unit))[1].sifter
        for unit in ("steps", "epochs")
    }
    scored = {unit: sifter.state_dict()["counts"]["scored"] for unit, sifter in runs.items()}
    assert scored == {"steps": 2 * 52 - 8, "epochs": 52}


def test_auto_mode_knows_the_length_of_the_training(tmp_path):
    sift = SiftConfig(keep=0.5, mode="auto", dtype=None)
    _, callback = trained(tmp_path, sift, accumulate_grad_batches=2)
    assert callback.sifter.step == callback.sifter.config.control.total_steps == 8
    stream = loader(Stream(), DataLoader, shuffle=False)
    _, callback = trained(tmp_path, sift, data=stream, max_epochs=1)
    assert callback.sifter.step == 7
    assert callback.sifter.config.control.total_steps is None


def test_a_step_without_a_loss_leaves_no_hook_behind(tmp_path):
    class Skipping(Noting):
        def training_step(self, batch):
            assert len(self.model._forward_hooks) == 1
            return None if self.trainer.fit_loop.batch_idx % 2 else super().training_step(batch)

    module, callback = trained(tmp_path, MEMORY, module=Skipping(), data=loader(WithIds(rows(), "number")))
    assert not module.model._forward_hooks
    assert callback.sifter.state_dict()["counts"]["trained"] == 2 * 7 * BATCH


def test_the_trainers_log_has_the_numbers_of_selection(tmp_path):
    logger = lightning.loggers.CSVLogger(tmp_path, name="", version="")
    sift = SiftConfig(keep=0.5, probe_every=2, dtype=None)
    trained(tmp_path, sift, max_steps=6, accumulate_grad_batches=2, log_every_n_steps=2, logger=logger)
    header, *lines = (tmp_path / "metrics.csv").read_text().splitlines()
    assert set(LOGGED) <= set(header.split(","))
    table = [dict(zip(header.split(","), line.split(","), strict=True)) for line in lines]
    assert [float(row["sift/step"]) for row in table if row["sift/step"]] == [2, 4, 6]


class Noting(Module):
    """Notes the exact losses of the samples that it is trained on, by their ids."""

    def training_step(self, batch):
        sifter = next(each.sifter for each in self.trainer.callbacks if isinstance(each, SiftCallback))
        output = self.model(**batch)
        losses = nn.functional.cross_entropy(output.logits, batch["labels"], reduction="none")
        self.known = {**getattr(self, "known", {}), **dict(zip(sifter.ids.tolist(), losses.tolist(), strict=True))}
        return output.loss


def test_losses_of_trained_samples_are_remembered(tmp_path):
    module, callback = trained(tmp_path, MEMORY, module=Noting(), data=loader(WithIds(rows(), "number")))
    remembered = callback.sifter.state_dict()["memory"]["losses"]
    assert len(module.known) > 40
    assert remembered[list(module.known)].tolist() == pytest.approx(list(module.known.values()), rel=1e-5)


def test_rows_of_documents_are_refused_where_their_losses_would_be_remembered(tmp_path):
    documents = [{"input_ids": list(range(3, 9)), "number": i} for i in range(52)]
    flatten = transformers.DataCollatorWithFlattening()

    def collate(some):
        numbers = torch.tensor([each["number"] for each in some])
        return flatten([{"input_ids": each["input_ids"]} for each in some]) | {"number": numbers}

    llama = models.build("llama", "causal_lm", use_cache=False)
    with pytest.raises(ValueError, match="cannot be read off batches that are one row of documents"):
        trained(tmp_path, MEMORY, module=Module(model=llama), data=loader(documents, collate_fn=collate))


# Resuming


MEMORY = SiftConfig(keep=0.5, score="memory", sample_id="number", dtype=None)
BLEND = SiftConfig(keep=0.5, score="blend", dtype=None)


@pytest.mark.parametrize(
    ("sift", "options", "cuts"),
    [
        (SiftConfig(keep=0.5, schedule=lambda step: step % 3 % 2, probe_every=2, dtype=None), {}, (1, 4, 7, 9)),
        (HALF, {"accumulate_grad_batches": 2}, (2, 4, 5)),  # the fourth is the last of an epoch
        (MEMORY, {}, (5, 9)),
        (BLEND, {}, (3,)),
    ],
    ids=["schedule", "accumulated", "memory", "blend"],
)
def test_a_run_that_resumes_within_an_epoch_is_as_if_never_cut(tmp_path, sift, options, cuts):
    def data():
        return loader(WithIds(rows(), "number") if sift.sample_id else None)

    whole, selecting = trained(tmp_path, sift, data=data(), save=True, **options)
    assert equal(whole, trained(tmp_path / "twin", sift, data=data(), **options)[0])  # saving changes nothing
    for cut in cuts:
        resumed, again = trained(
            tmp_path / str(cut),
            sift,
            module=Module(seed=1),
            data=data(),
            resume=tmp_path / f"step={cut}.ckpt",
            **options,
        )
        assert resumed.batches == whole.batches[len(whole.batches) - len(resumed.batches) :]
        assert 0 < len(resumed.batches) < len(whole.batches)
        assert equal(resumed, whole)
        states = [callback.sifter.state_dict() for callback in (again, selecting)]
        tensors = [{name: str(value) for name, value in state.items()} for state in states]
        assert tensors[0] == tensors[1]


def test_a_plain_checkpoint_begins_selection_anew_and_says_so(tmp_path, caplog):
    trainer = trainer_for(tmp_path, max_steps=2)
    trainer.fit(Module(), loader())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with caplog.at_level(logging.WARNING, "earlysift"):
        _, callback = trained(tmp_path, resume=tmp_path / "plain.ckpt", max_steps=5, max_epochs=-1)
    assert "plain.ckpt holds no state of selection" in caplog.text
    assert callback.sifter.step == 3


def test_other_options_and_another_number_of_processes_are_refused(tmp_path):
    trained(tmp_path, save=True, max_steps=2)
    checkpoint = tmp_path / "step=2.ckpt"
    with pytest.raises(ValueError, match="depth"):
        trained(tmp_path, SiftConfig(keep=0.5, depth=2, probe_every=0, dtype=None), resume=checkpoint)
    saved = torch.load(checkpoint)
    saved["callbacks"]["SiftCallback"]["processes"] *= 2
    torch.save(saved, checkpoint)
    with pytest.raises(ValueError, match=r"state of selection of 1 processes, got that of 2\. Resume with 2"):
        trained(tmp_path, resume=checkpoint)


def batches_of(some):
    return [batch.tolist() for batch in some]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shuffle", [True, False])
def test_a_loader_goes_on_anywhere_with_the_same_order_also_of_later_epochs(shuffle, workers):
    def make():
        return loader(range(19), shuffle=shuffle, num_workers=workers, batch_size=4)

    plain = loader(range(19), DataLoader, shuffle=shuffle, num_workers=workers, batch_size=4)
    epochs = [batches_of(plain) for _ in range(3)]
    assert (epochs[0] != epochs[1]) == shuffle
    whole = [batch for epoch in epochs for batch in epoch]
    first = make()
    for epoch in range(2):
        batches = iter(first)
        for count in range(6):
            if count:
                next(batches)
            if workers and count != 3:  # they take their time
                continue
            other = make()
            list(other)  # its own first epoch is of no account
            other.load_state_dict(first.state_dict())
            ahead = [batch for _ in range(3 - epoch) for batch in batches_of(other)]
            assert ahead[: 15 - 5 * epoch - count] == whole[5 * epoch + count :]
        list(batches)


# A guest


def test_nothing_is_left_behind_in_the_module(tmp_path):
    modules = {"plain": Module(), "sifting": Module()}
    for name, module in modules.items():
        callbacks = [SiftCallback(SiftConfig(keep=1.0, depth=1))] if name == "sifting" else []
        trainer_for(tmp_path, *callbacks).fit(module, loader())
    plain, sifting = (everything(module.model) for module in modules.values())
    same = set(plain) - {"modules", "parameters"}  # ids of objects
    assert {name: plain[name] for name in same} == {name: sifting[name] for name in same}


def test_what_fails_within_a_step_leaves_no_hook_behind(tmp_path):
    class Failing(Module):
        def training_step(self, batch):
            self.model(**batch)
            raise ArithmeticError

    module = Failing()
    with pytest.raises(ArithmeticError):
        trained(tmp_path, BLEND, module=module)
    assert not any(part._forward_hooks for part in module.modules())


# What cannot work


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class Stream(IterableDataset):
    def __iter__(self):
        return iter(rows())


def unlabelled():
    return [{name: value for name, value in row.items() if name != "labels"} for row in rows()]


IN_EPOCHS = SiftCallback(SiftConfig(keep=0.5, schedule=warmup(1)), schedules_in="epochs")
BAD = {
    "manual optimization": ({"module": Manual}, r"got automatic_optimization=False.*Sifter\.sift\(batch, micro_step"),
    "data parallel": (
        {"module": lambda: Module(model=nn.DataParallel(models.build(*FAMILY)))},
        r"DataParallel copies the model.*Use DistributedDataParallel",
    ),
    "batch norm": (
        {"module": lambda: Module(model=models.build("plain", "masked_lm", norm=nn.BatchNorm1d))},
        r"no BatchNorm in training mode, got model\.\S+.*Call \.eval\(\)",
    ),
    "evaluation mode": ({"module": lambda: Module().eval()}, r"in evaluation mode.*Call model\.train\(\)"),
    "no such module": ({"callback": SiftCallback(HALF, module="network")}, r"'network' of Module, found only: model\."),
    "stream in epochs": (
        {"data": lambda: loader(Stream(), DataLoader, shuffle=False), "callback": IN_EPOCHS},
        r"data of known length.*__len__.*schedules_in='steps'",
    ),
    "no labels": ({"data": lambda: loader(unlabelled())}, r"labels"),
    "tuples": (
        {"data": lambda: DataLoader(rows(), batch_size=8, collate_fn=tuple)},
        r"a dictionary or a list.*got tuple.*collate_fn",
    ),
    "resumable stream": ({"data": lambda: loader(Stream(), shuffle=False)}, r"map-style.*got Stream.*loop of your own"),
    "no generator": ({"data": lambda: loader(generator=None)}, r"generator for RandomSampler, got None.*manual_seed"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_work_is_one_clear_error(tmp_path, case):
    options, message = BAD[case]
    made = {name: option() if name in ("module", "data") else option for name, option in options.items()}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        trained(tmp_path, **made)


def test_spawned_processes_are_refused(tmp_path):
    trainer = trainer_for(tmp_path, strategy="ddp_spawn")
    with pytest.raises(ValueError, match=r"ddp_spawn.*Use strategy='ddp'"):
        SiftCallback(HALF).setup(trainer, Module(), "fit")
    SiftCallback(HALF).setup(trainer_for(tmp_path, strategy="ddp"), Module(), "fit")


# Weights that are sharded over processes (FSDP2)


class Sharded(Module):
    """The same, sharded as Lightning asks for, by SGD, whose steps are as near as the gradients."""

    def configure_model(self):
        for part in (*self.model.bert.encoder.layer, self.model):
            fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=RATE)


def sharded(data=2, tensor=1):
    return ModelParallelStrategy(data_parallel_size=data, tensor_parallel_size=tensor, process_group_backend="gloo")


SHARDED = """
import json, os, sys
import torch
rank, store, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "GROUP_RANK": 0}
told |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "as if by torchrun"}
os.environ |= {name: str(value) for name, value in told.items()}
torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
import dataclasses
from pathlib import Path
from test_lightning import *

def run(name, callbacks, **options):
    module, resume = Sharded(), options.pop("resume", None)
    trainer = trainer_for(name, *callbacks, devices=count, **({"strategy": sharded()} | options))
    trainer.fit(module, loader(rows(48)), ckpt_path=resume)
    parts = {name: value.to_local().tolist() for name, value in module.model.state_dict().items()}
    whole = {name: value.full_tensor().tolist() for name, value in module.model.state_dict().items()}
    return [module.batches, parts, whole]

plain = run("plain", [])
untouched = run("untouched", [SiftCallback(dataclasses.replace(HALF, keep=1.0))])
half = dataclasses.replace(HALF, probe_every=2, scope="global")
every = {"save_top_k": -1, "every_n_train_steps": 1, "filename": "{step}"}
saving = lightning.callbacks.ModelCheckpoint(Path("saved"), **every)
selected = run("selected", [SiftCallback(half), saving], enable_checkpointing=True)
resumed = run("resumed", [SiftCallback(half)], resume="saved/step=4.ckpt")
try:
    said = run("tensor", [SiftCallback(half)], strategy=sharded(data=1, tensor=2))
except ValueError as error:
    said = str(error)
print(json.dumps([plain == untouched, selected[0], selected[2], resumed == [selected[0][4:], *selected[1:]], said]))
torch.distributed.destroy_process_group()
"""


def test_sharded_weights_train_like_one_process_resume_and_are_left_alone_by_keep_1(tmp_path):
    """Picks are those of one process that has all candidates, and weights are nearly its weights."""
    ranks = on_ranks(2, SHARDED, tmp_path)
    model, data, numbers = models.build(*FAMILY), rows(48), []
    for epoch in range(2):  # Lightning shuffles whatever it splits for training
        samplers = [DistributedSampler(data, num_replicas=2, rank=rank) for rank in range(2)]
        for sampler in samplers:
            sampler.set_epoch(epoch)
        orders = [list(sampler) for sampler in samplers]
        numbers += [[n for order in orders for n in order[at : at + 2 * BATCH]] for at in range(0, 24, 2 * BATCH)]
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(6):
        pool = {key: torch.stack([data[number][key] for number in numbers[step]]) for key in data[0]}
        scores = models.sample_losses(models.shorter(model, 1).eval(), pool)
        kept = scores.argsort(descending=True)[: 2 * BATCH].sort().values
        batch = {key: values[kept] for key, values in pool.items()}
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        picked = [row for _, batches, *_ in ranks for row in batches[step]]
        assert sorted(picked) == sorted(batch["input_ids"].tolist())
    for is_plain, batches, weights, resumes, said in ranks:
        assert is_plain
        assert [len(batch) for batch in batches] == [BATCH] * 6
        for name, value in model.state_dict().items():
            torch.testing.assert_close(torch.tensor(weights[name]), value, rtol=1e-4, atol=1e-5)
        assert resumes
        assert "got tensor parallelism, where 2 share theirs" in said


def test_fsdp1_is_refused_with_the_way_out():
    assert [message for wrong, message in _rules_of(FSDPStrategy()) if wrong] == [
        "Expected a module whose parts can be called, got FSDPStrategy (FSDP1), whose weights are whole only within a "
        "pass of the whole module. Use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1) with "
        "fully_shard in configure_model (FSDP2), or strategy='ddp'."
    ]


def test_an_unknown_unit_of_schedules_is_refused():
    with pytest.raises(ValueError, match=r"schedules_in must be 'steps' or 'epochs', got 'days'"):
        SiftCallback(HALF, schedules_in="days")


def test_without_lightning_the_import_names_the_way_out():
    command = [sys.executable, "-c", "import sys; sys.modules['lightning'] = None; import earlysift.adapters.lightning"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"pip install 'earlysift\[lightning\]'", done.stderr)
