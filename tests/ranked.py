"""What single processes and ranks do in tests of gradients and of numbers that turn bad; called by their scripts."""

import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from torch import distributed

import models
from earlysift.adapters.huggingface import SiftTrainer
from earlysift.pretrain.settings import PretrainSettings
from earlysift.pretrain.trainer import NotFinite, Pretrainer
from faults import PLACES, faulty
from scorecard import cases
from test_huggingface import samples, trainer_for

SCRIPT = "import ranked; ranked.run()"
BAD_STEP = 3


def run():
    """What follows, in a process group if there is more than one rank; prints what it finds."""
    rank, store, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    if count > 1:
        told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
        os.environ |= {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "localhost"}
        distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    folder = Path(store).parent
    print(json.dumps({"gradients": gradients(folder), "stops": stops(folder) if count > 1 else []}))
    if count > 1:
        distributed.destroy_process_group()


def built(cls, folder, *, family=("bert", "masked_lm"), **options):
    """A Trainer of a small model in float64, which selects half of its candidates."""
    extra = {}
    if issubclass(cls, Pretrainer):
        settings = PretrainSettings(out=Path(folder), steps=options["max_steps"])
        rows = samples(8, *family)
        validation = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        extra = {"settings": settings, "validation": validation, "about": {}, "signals": []}
    if distributed.is_initialized():
        options |= {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}
    model = models.build(*family, layers=2).double()
    return trainer_for(folder, cls, model=model, data=samples(160, *family), trainer=extra, **options)


class Caught(transformers.TrainerCallback):
    """Keeps the gradient of the first step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradient = {name: value.grad.clone() for name, value in model.named_parameters()}


def gradients(folder):
    """By trainer and accumulation: how far the gradient of a step is from that of all its rows in one batch."""
    errors = {}
    # A plain Trainer counts the labels of a step for models whose loss takes the count, and BERT's does not.
    families = {SiftTrainer: ("llama", "causal_lm"), Pretrainer: ("bert", "masked_lm")}
    for (cls, family), accumulated in itertools.product(families.items(), (1, 2, 4, 8)):

        class Noting(cls):
            def get_batch_samples(self, *args):
                self.taken, items = super().get_batch_samples(*args)
                return self.taken, items

        options = {"max_steps": 1, "gradient_accumulation_steps": accumulated, "max_grad_norm": 0.0}
        trainer = built(Noting, shared_folder(folder), family=family, **options)
        caught = Caught()
        trainer.add_callback(caught)
        trainer.train()
        parts = [trainer.taken]
        if distributed.is_initialized():
            parts = [None] * distributed.get_world_size()
            distributed.all_gather_object(parts, trainer.taken)
        batches = list(itertools.chain.from_iterable(parts))
        batch = {name: torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "attention_mask")}
        labels = torch.cat([batch["labels"] for batch in batches])
        model = models.build(*family, layers=2).double()
        logits = model(**batch).logits
        if cls is SiftTrainer:  # the next token's
            logits, labels = logits[:, :-1], labels[:, 1:]
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        exact = {name: value.grad for name, value in model.named_parameters()}
        ours = {name.removeprefix("module."): value for name, value in caught.gradient.items()}
        assert ours.keys() == exact.keys()
        largest = max(value.abs().max() for value in exact.values())
        error = max((ours[name] - value).abs().max() for name, value in exact.items()) / largest
        errors[f"{cls.__name__} {accumulated}"] = [error.item(), len(batches)]
    return errors


def stops(folder):
    """For every number that turns bad on every rank: what is said, at which step, and whether weights are as before."""
    told = []
    for place, value, rank in faults_of(distributed.get_world_size()):
        options = {"max_steps": 5, "gradient_accumulation_steps": 2, "max_grad_norm": 1.0}
        trainer = built(faulty(Pretrainer, place, value, BAD_STEP, rank), shared_folder(folder), **options)
        try:
            trainer.train()
            said = "nothing"
        except NotFinite as error:
            said = str(error)
        weights = trainer.model.state_dict()
        kept = all(torch.equal(weights[name].nan_to_num(), held.nan_to_num()) for name, held in trainer.before.items())
        told.append([place, value, rank, said, trainer.state.global_step, kept])
    return told


def faults_of(ranks):
    """Every number that turns bad, on every rank."""
    return cases(itertools.product(PLACES, ("nan", "inf"), range(ranks)), 5)


def shared_folder(folder):
    """A new folder that all ranks know."""
    made = [tempfile.mkdtemp(dir=folder)]
    if distributed.is_initialized():
        distributed.broadcast_object_list(made)
    return made[0]
