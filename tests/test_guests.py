"""Guests behave: a sift leaves nothing behind but its picks, and importing the library changes nothing."""

import copy
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Generator, nn

import earlysift
import models
from earlysift import Family, Sifter
from earlysift.anatomy import find_anatomy
from earlysift.control import Control
from earlysift.exits import ExitHead
from earlysift.probes import probe
from earlysift.selectors import proportional
from models import build, loss_of, row_of

MODELS = [
    ("bert", "masked_lm"),
    ("roberta", "token_classification"),
    ("distilbert", "sequence_classification"),
    ("electra", "masked_lm"),
    ("modernbert", "masked_lm"),
    ("deberta-v2", "token_classification"),
    ("gpt2", "causal_lm"),
    ("llama", "sequence_classification"),
    ("qwen3", "causal_lm"),
    ("plain", "masked_lm"),
    ("plain with batch norm", "masked_lm"),
    ("vit", "sequence_classification"),
]
ALL = [pytest.param(*key, id="-".join(key)) for key in MODELS]
SCORES = ["loss", "entropy", "probe", "blend", "exact", "uniform"]


def dropping(family, task):
    """A model with dropout."""
    if family == "plain with batch norm":
        return build("plain", task, dropout=0.2, norm=nn.BatchNorm1d)
    return build(family, task, dropout=0.2)


def pools_for(model, count, rows=8, length=10):
    generator = Generator().manual_seed(7)
    return [models.batch_for(model, models.task_of(model), rows, length, generator) for _ in range(count)]


def random_states():
    python, (kind, keys, *rest) = random.getstate(), np.random.get_state()  # noqa: NPY002, the state of others
    return python, kind, keys.tolist(), rest, torch.get_rng_state().tolist()


def everything(model):
    """All that a guest must leave as it found it, as comparable values."""
    return {
        "random states": random_states(),
        "training flags": [(name, module.training) for name, module in model.named_modules()],
        "modules": [(name, id(module)) for name, module in model.named_modules()],
        "attributes": [(name, sorted(vars(module))) for name, module in model.named_modules()],
        "hooks": [
            (name, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._state_dict_hooks))
            for name, m in model.named_modules()
        ],
        "tensors": [(name, value.dtype, value.tolist()) for name, value in model.state_dict().items()],
        "versions": [(name, value._version) for name, value in (*model.named_parameters(), *model.named_buffers())],
        "buffers": [(name, value.tolist()) for name, value in model.named_buffers()],
        "parameters": [(name, id(p), p.requires_grad) for name, p in model.named_parameters()],
        "gradients": [(name, None if p.grad is None else p.grad.tolist()) for name, p in model.named_parameters()],
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda")]
        + [torch.is_autocast_cache_enabled()],
        "modes": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()),
        "config": None if not hasattr(model, "config") else model.config.to_dict(),
    }


def assert_same(before, after):
    assert before.keys() == after.keys()
    for what, value in before.items():
        assert after[what] == value, what


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("family", "task"), ALL)
def test_sift_leaves_everything_as_it_found_it(family, task, score):
    model = dropping(family, task)
    options = {"score": score, "family": row_of(model), "select": proportional, "explore": 0.0}
    sifter = Sifter(model, keep=0.5, depth=2, probe_every=1, **options)
    warm, *pools = pools_for(model, 3)
    loss_of(model, warm).backward()  # gradients of the user's step, and caches that models build themselves
    next(iter(model.parameters())).requires_grad_(False)
    frozen = find_anatomy(model, row_of(model)).layers[1]
    frozen.eval()
    next(frozen.children()).train()
    before = copy.deepcopy(everything(model))
    assert any(gradient is not None for _, gradient in before["gradients"])
    for pool in pools:
        sifter.sift(pool)
    assert_same(before, everything(model))


@pytest.mark.parametrize(("family", "task"), [MODELS[0], MODELS[6], MODELS[10]])
def test_training_an_exit_head_leaves_everything_as_it_found_it(family, task):
    model = dropping(family, task)
    exit_head = ExitHead(models.WIDTH, hidden=8)
    optimizer = torch.optim.AdamW(exit_head.parameters(), lr=1e-2)
    sifter = Sifter(model, keep=0.5, family=row_of(model), exit_head=exit_head, exit_optimizer=optimizer, probe_every=1)
    warm, *pools = pools_for(model, 3)
    loss_of(model, warm).backward()
    weights = copy.deepcopy(exit_head.state_dict())
    before = copy.deepcopy(everything(model))
    for pool in pools:
        sifter.sift(pool)
    assert_same(before, everything(model))
    assert any(not torch.equal(value, weights[name]) for name, value in exit_head.state_dict().items())


def test_sift_that_fails_leaves_everything_as_it_found_it():
    model = dropping("bert", "masked_lm")
    sifter = Sifter(model, keep=0.5, probe_every=1)
    pool, broken = pools_for(model, 2)
    sifter.sift(pool)
    broken["labels"][3, 3] = models.VOCABULARY + 5  # found deep inside
    before = copy.deepcopy(everything(model))
    with pytest.raises(ValueError, match="Expected labels in 0"):
        sifter.sift(broken)
    assert_same(before, everything(model))


def test_sift_within_autocast_leaves_the_autocast_of_the_user():
    model = dropping("bert", "masked_lm")
    sifter = Sifter(model, keep=0.5, dtype=torch.bfloat16)
    (pool,) = pools_for(model, 1)
    with torch.autocast("cpu", dtype=torch.float16, cache_enabled=False):
        before = everything(model)
        sifter.sift(pool)
        assert_same(before, everything(model))


@pytest.mark.parametrize(("family", "task"), ALL)
def test_a_probe_leaves_everything_as_it_found_it(family, task):
    model = dropping(family, task)
    warm, *pools = pools_for(model, 3)
    loss_of(model, warm).backward()
    next(iter(model.parameters())).requires_grad_(False)
    frozen = find_anatomy(model, row_of(model)).layers[1]
    frozen.eval()
    exit_head = nn.Sequential(nn.LayerNorm(models.WIDTH), nn.Dropout(0.5))
    before, head_before = copy.deepcopy(everything(model)), copy.deepcopy(everything(exit_head))
    for pool in pools:
        for dtype in (None, torch.bfloat16):
            probe(model, pool, depths=(1, 3), family=row_of(model), exit_head=exit_head, chunk_rows=3, dtype=dtype)
    assert_same(before, everything(model))
    assert_same(head_before, everything(exit_head))


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("where", ["layer", "head", "exit head", "labels"])
@pytest.mark.parametrize(("family", "task"), [MODELS[0], MODELS[2], MODELS[7], MODELS[9]])
def test_a_probe_that_fails_midway_leaves_everything_as_it_found_it(family, task, where):
    model = dropping(family, task)
    warm, pool = pools_for(model, 2)
    loss_of(model, warm).backward()
    anatomy = find_anatomy(model, row_of(model))
    exit_head = ExitHead(models.WIDTH)
    head = anatomy.core.get_submodule((anatomy.head or anatomy.classifier)[-1])
    part = {"layer": anatomy.layers[2], "head": head, "exit head": exit_head, "labels": None}[where]
    calls = []

    def fail_later(*_):
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted

    if part is None:
        pool["labels"][-1] = models.VOCABULARY + 5
    else:
        part.register_forward_hook(fail_later)
    before = copy.deepcopy(everything(model))
    with (
        pytest.raises(ValueError if part is None else Interrupted, match="Expected labels" if part is None else None),
        torch.autocast("cpu", dtype=torch.float16, cache_enabled=False),
    ):
        probe(model, pool, depths=(1, 2), family=row_of(model), exit_head=exit_head, chunk_rows=4, dtype=torch.bfloat16)
    assert_same(before, everything(model))


def test_auto_mode_leaves_everything_as_it_found_it():
    model = dropping("bert", "masked_lm")
    sifter = Sifter(model, mode="auto", control=Control(depths=(1, 2), probe_share=0.99))
    warm, *pools = pools_for(model, 5, rows=12)
    sifter.sift(warm)
    loss_of(model, warm).backward()
    before = copy.deepcopy(everything(model))
    for pool in pools:
        sifter.sift(pool)
    assert len(sifter.ledger.times_ms("probe")) >= 2
    assert_same(before, everything(model))


@pytest.mark.parametrize(("family", "task"), [MODELS[0], MODELS[10]])
def test_this_file_notices_a_guest_that_scores_in_training_mode(family, task):
    model = dropping(family, task)
    (pool,) = pools_for(model, 1)
    before = copy.deepcopy(everything(model))
    with torch.no_grad():
        loss_of(model, pool)
    changed = {what for what, value in everything(model).items() if value != before[what]}
    assert "random states" in changed
    assert ("buffers" in changed) == (family == "plain with batch norm")


# Training with and without the guest


def train(model, pools, sift=None, between=None, steps=20):
    """The plain loop; gives back the losses and the weights."""
    torch.manual_seed(3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for pool in pools[:steps]:
        batch = sift(pool) if sift else pool
        loss = loss_of(model, batch)
        loss.backward()
        if between:
            between(pool)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, [value.tolist() for value in model.state_dict().values()]


@pytest.mark.parametrize(("family", "task"), [MODELS[0], MODELS[2], MODELS[4], MODELS[6], MODELS[8], MODELS[10]])
def test_keep_one_equals_the_plain_loop_bit_for_bit(family, task):
    pools = pools_for(dropping(family, task), 20, rows=4, length=8)
    plain = train(dropping(family, task), pools)
    model = dropping(family, task)
    sifter = Sifter(model, keep=1.0, depth=2, family=row_of(model))
    assert train(model, pools, sift=sifter.sift) == plain
    assert sifter.step == 20
    other = train(dropping(family, task), [{k: v.flip(0) for k, v in pool.items()} for pool in pools])
    assert other != plain  # training is sensitive to what it is given


def test_keep_one_hands_the_pool_itself_through():
    model = build("bert", "masked_lm")
    (pool,) = pools_for(model, 1)
    assert Sifter(model, keep=1).sift(pool) is pool


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("family", "task"), [MODELS[0], MODELS[6], MODELS[10]])
def test_sifting_between_two_passes_leaves_their_dropout_as_without(family, task, score):
    pools = pools_for(dropping(family, task), 3)
    plain = train(dropping(family, task), pools)
    model = dropping(family, task)
    options = {"score": score, "family": row_of(model), "select": proportional, "explore": 0.0}
    sifter = Sifter(model, keep=0.5, depth=2, probe_every=2, **options)
    assert train(model, pools, sift=lambda pool: sifter.sift(pool) and pool, between=sifter.sift) == plain
    assert sifter.step == 6


def test_training_picks_of_one_step_does_not_depend_on_probes():
    def picks(probe_every):
        model = dropping("bert", "masked_lm")
        sifter = Sifter(model, keep=0.5, probe_every=probe_every)
        return train(model, pools_for(model, 4), sift=sifter.sift)

    assert picks(1) == picks(0)


# Importing


SNAPSHOT = """
import importlib, json, logging, os, random, signal, sys, threading, warnings

import torch
import torch.utils.data, torch.nn.functional, torch.optim, torch.distributed

try:
    import numpy
except ImportError:
    numpy = None


def attributes(*owners):
    # Submodules appear in their packages as they are imported; that is not a change of the package.
    return {
        f"{owner.__name__}.{name}": id(value)
        for owner in owners
        for name, value in list(vars(owner).items())
        if not isinstance(value, type(sys)) and name not in ("__builtins__", "__warningregistry__")
    }


def snapshot():
    python_state, numpy_state = random.getstate(), None if numpy is None else str(numpy.random.get_state())
    loggers = {"root": logging.root, **logging.Logger.manager.loggerDict}
    return {
        "environment": dict(os.environ),
        "warnings filters": list(map(str, warnings.filters)),
        "logging": [
            (name, list(map(repr, getattr(logger, "handlers", []))), getattr(logger, "level", None))
            for name, logger in loggers.items()
            if getattr(logger, "handlers", None)
        ],
        "root level": logging.root.level,
        "default dtype": str(torch.get_default_dtype()),
        "default device": str(torch.get_default_device()),
        "threads": torch.get_num_threads(),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "random states": (str(python_state), numpy_state, torch.get_rng_state().tolist()),
        "signal handlers": [str(signal.getsignal(number)) for number in sorted(signal.valid_signals())],
        "excepthook": (id(sys.excepthook), id(threading.excepthook)),
        "path": list(sys.path),
        "live threads": threading.active_count(),
        "attributes": attributes(
            torch, torch.Tensor, torch.nn.Module, torch.nn.functional, torch.nn.Linear,
            torch.optim, torch.optim.Optimizer, torch.utils.data,
            torch.utils.data.DataLoader, torch.utils.data.dataloader._BaseDataLoaderIter,
            torch.distributed, random, warnings, logging, os,
        ),
    }


before, loaded = snapshot(), set(sys.modules)
importlib.import_module(sys.argv[1])
after = snapshot()
changed = [what for what in before if before[what] != after[what]]
new = sorted({name.split(".")[0] for name in set(sys.modules) - loaded} - set(sys.stdlib_module_names))
print(json.dumps({"changed": changed, "new": new, "all": sorted({name.split(".")[0] for name in sys.modules})}))
"""


def run(script, *arguments, path=()):
    source = str(Path(earlysift.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, *map(str, path)])}
    done = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def imported(name, *path):
    import json

    return json.loads(run(SNAPSHOT, name, path=path).splitlines()[-1])


def test_import_changes_nothing_global_and_loads_nothing_optional():
    seen = imported("earlysift")
    assert seen["changed"] == []
    assert seen["new"] == ["earlysift"]
    optional = {
        "transformers",
        "datasets",
        "tokenizers",
        "accelerate",
        "matplotlib",
        "rich",
        "tyro",
        "pandas",
        "zstandard",
    }
    assert optional.isdisjoint(seen["all"])
    assert "torch" in seen["all"]


# One thing that a bad guest does, and what the check calls it.
BAD_MANNERS = {
    "environment": "import os; os.environ['EARLYSIFT'] = '1'",
    "warnings filters": "import warnings; warnings.simplefilter('ignore')",
    "logging": "import logging; logging.basicConfig()",
    "default dtype": "import torch; torch.set_default_dtype(torch.float64)",
    "random states": "import torch; torch.manual_seed(1)",
    "signal handlers": "import signal; signal.signal(signal.SIGTERM, lambda *_: None)",
    "attributes": "import torch.utils.data as d; d.dataloader._BaseDataLoaderIter.__next__ = lambda self: None",
}


def test_the_check_of_imports_can_fail(tmp_path):
    (tmp_path / "bad_guest.py").write_text("\n".join([*BAD_MANNERS.values(), "import accelerate.utils.constants"]))
    seen = imported("bad_guest", tmp_path)
    assert set(BAD_MANNERS) <= set(seen["changed"])
    assert "accelerate" in seen["new"]


def test_library_works_without_numpy():
    script = """
import sys, warnings
sys.modules["numpy"] = None
warnings.simplefilter("ignore")  # torch says that it is missing
import torch
from torch import nn
from earlysift import Family, Sifter
model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 3))
sifter = Sifter(model, family=Family("0", task="sequence_classification"), probe_every=1)
inputs, labels = sifter.sift((torch.randn(8, 4), torch.zeros(8, dtype=torch.long)))
print(len(labels), sifter.state_dict()["step"])
"""
    assert run(script).split() == ["4", "1"]


def test_use_adds_no_logging_handlers_and_no_environment():
    before = dict(os.environ), list(logging.root.handlers), list(logging.getLogger("earlysift").handlers)
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 3))
    sifter = Sifter(model, family=Family("0", task="sequence_classification"), probe_every=1)
    sifter.sift((torch.zeros(8, 4), torch.arange(8).remainder(3)))
    assert (dict(os.environ), list(logging.root.handlers), list(logging.getLogger("earlysift").handlers)) == before
