"""Trainings by SiftTrainer and by Lightning's Trainer, for processes that are killed: saved at every step, resumed from
the newest checkpoint that is complete, and told at the end in a file."""

import hashlib
import json
import sys
import tempfile
from pathlib import Path

import torch

from earlysift import SiftConfig
from earlysift.datasets import WithIds

STEPS = 6
MEMORY = SiftConfig(keep=0.5, score="memory", sample_id="number", probe_every=0)


def by_transformers():
    """``transformers FOLDER``."""
    from test_huggingface import llama, logged, samples, trainer_for

    folder = Path(sys.argv[2])
    # The Trainer writes this file last.
    whole = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json") if _is_json(path)]
    options = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS, "optim": "adamw_torch"}
    trainer = trainer_for(folder, model=llama(dropout=0.1), data=samples(20), sift=MEMORY, **options)
    trainer.train(resume_from_checkpoint=str(max(whole, key=_step)) if whole else None)
    return _tell(folder, trainer.model, trainer.sifter, {"losses": logged(trainer), "batches": trainer.batches})


def by_lightning():
    """``lightning FOLDER``, or ``lightning FOLDER STEPS`` to end earlier."""
    from test_lightning import loader, rows, trained

    folder, steps = Path(sys.argv[2]), int([*sys.argv, STEPS][3])
    # fsspec writes a checkpoint here before it renames it.
    unfinished = folder / "unfinished"
    unfinished.mkdir(exist_ok=True)
    tempfile.tempdir = str(unfinished)
    saved = max(folder.glob("step=*.ckpt"), key=_step, default=None)
    data = loader(WithIds(rows(20), "number"))
    module, callback = trained(folder, MEMORY, data=data, resume=saved, save=True, max_epochs=-1, max_steps=steps)
    return _tell(folder, module, callback.sifter, {"batches": module.batches})


# Each gives its exit code.
TRAININGS = {"transformers": by_transformers, "lightning": by_lightning}


def _tell(folder, model, sifter, seen):
    weights = [value.numpy().tobytes() for value in model.state_dict().values()]
    told = {"weights": hashlib.sha256(b"".join(weights)).hexdigest(), "sifter": repr(_values(sifter.state_dict()))}
    (folder / "end.json").write_text(json.dumps(told | seen))
    return 0


def _values(state):
    if isinstance(state, dict):
        return {key: _values(value) for key, value in state.items()}
    return state.tolist() if isinstance(state, torch.Tensor) else state


def _step(path):
    return int(path.stem.rpartition("=" if path.suffix else "-")[2])


def _is_json(path):
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True
