"""Losses of a hundred steps, selection off and on, as they were: ``python tests/golden.py`` writes golden.json anew."""

import tempfile
from pathlib import Path

import torch

from earlysift import versions
from earlysift.files import write_json
from test_huggingface import ALL, HALF, SiftTrainer, llama, samples, trainer_for

PATH = Path(__file__).with_name("golden.json")
STEPS = 100
RULES = {"off": ALL, "on": HALF}


class Noted(SiftTrainer):
    """Keeps the losses of its micro-batches, to the last bit."""

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def losses(rule, folder, steps=STEPS):
    """The losses of a training."""
    options = {"max_steps": steps, "learning_rate": 1e-3, "train_sampling_strategy": "sequential"}
    trainer = trainer_for(folder, Noted, model=llama(layers=2), data=samples(400), sift=RULES[rule], **options)
    trainer.train()
    return trainer.losses


def where():
    """What losses depend on, to the last bit."""
    capabilities = {name: str(value) for name, value in torch.cpu.get_capabilities().items()}
    return {"processor": capabilities, "threads": torch.get_num_threads(), "versions": versions.installed()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        write_json(PATH, {"where": where(), "losses": {rule: losses(rule, folder) for rule in RULES}})
