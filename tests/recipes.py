"""Runs the recipes as a user would, in folders of their own: in this process, or in ranks that torchrun starts."""

import difflib
import gc
import itertools
import json
import os
import runpy
import shutil
import socket
import sys
import warnings
from pathlib import Path

import torch
from torch import distributed

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
KINDS = ("plain", "sift")
ACCUMULATE = 2
_RUNS = itertools.count()


def changed(loop, differ=difflib.ndiff):
    """The lines of a pair of twins that differ: those taken away (-) and those added (+)."""
    plain, sift = ((RECIPES / loop / f"{kind}.py").read_text().splitlines() for kind in KINDS)
    return [line for line in differ(plain, sift) if line[0] in "+-" and line[:2] not in ("++", "--")]


def run(loop, kind, folder, *arguments):
    """Copy a recipe into a folder, and run it there; nothing of it stays in this process."""
    forget()  # other tests in this process may have left an Accelerator
    folder.mkdir(parents=True, exist_ok=True)
    script = RECIPES / loop / f"{kind}.py"
    before = Path.cwd(), sys.argv, dict(os.environ)
    if distributed.is_torchelastic_launched():
        meet_anew()
    else:
        script = Path(shutil.copy(script, folder))
    os.chdir(folder)
    sys.argv = [str(script), *map(str, arguments)]
    try:
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            runpy.run_path(str(script), run_name="__main__")
    finally:
        os.chdir(before[0])
        sys.argv = before[1]
        os.environ.clear()
        os.environ.update(before[2])
        forget()


def meet_anew():
    """Let the next process group of these ranks meet in a store of its own: torchrun's serves one."""
    agreed = distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    key = f"port of run {next(_RUNS)}"
    if os.environ["RANK"] == "0":
        with socket.socket() as free:
            free.bind(("localhost", 0))
            agreed.set(key, str(free.getsockname()[1]))
    os.environ |= {"MASTER_PORT": agreed.get(key).decode(), "TORCHELASTIC_USE_AGENT_STORE": "False"}


def forget():
    """What libraries remember of a run."""
    if accelerate := sys.modules.get("accelerate"):
        accelerate.state.AcceleratorState._reset_state(True)
        accelerate.state.GradientState._reset_state()
    gc.collect()
    if distributed.is_initialized():
        distributed.destroy_process_group()


def _torch_file(name):
    return lambda folder, _: torch.load(folder / name)["model"]


def _safetensors(name):
    def read(folder, step):
        from safetensors.torch import load_file

        return load_file(folder / name.format(step) / "model.safetensors")

    return read


def _sharded(folder, _):
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_to_torch_save(folder / "checkpoint", folder / "whole.pt")
    return torch.load(folder / "whole.pt", weights_only=False)["model"]


def _ray_workers(folder):
    """What the latest checkpoint of a run by Ray holds of every worker."""
    latest = max(folder.glob("run/*/worker_0.pt")).parent  # their names are times
    return [torch.load(path) for path in sorted(latest.glob("worker_*.pt"))]


def _readable(state):
    """A state whose tensors are lists, so that states can be compared."""
    if isinstance(state, torch.Tensor):
        return state.nan_to_num(-1).tolist()
    return {name: _readable(part) for name, part in state.items()} if isinstance(state, dict) else state


def _ray_weights(folder, _):
    first, *others = (worker["model"] for worker in _ray_workers(folder))
    assert all(torch.equal(first[name], other[name]) for other in others for name in first)
    return first


# How a loop saves weights, and the states of selection of all processes.
WEIGHTS = {
    "pytorch": _torch_file("checkpoint.pt"),
    "trainer": _safetensors("run/checkpoint-{}"),
    "trl": _safetensors("run/checkpoint-{}"),
    "accelerate": _safetensors("step_{}"),
    "lightning": lambda folder, _: torch.load(folder / "checkpoint.ckpt")["state_dict"],
    "fabric": _torch_file("checkpoint.ckpt"),
    "fsdp": _sharded,
    "ray": _ray_weights,
}


def _json_files(folder, step):
    paths = sorted(folder.glob(f"run/checkpoint-{step}/sifter_*.json"))
    return [json.loads(path.read_text())["sifter"] for path in paths]


SELECTION = {
    "pytorch": lambda folder, _: [torch.load(folder / "checkpoint.pt")["sifter"]],
    "trainer": _json_files,
    "trl": _json_files,
    "accelerate": lambda folder, step: [torch.load(folder / f"step_{step}" / "custom_checkpoint_0.pkl")],
    "lightning": lambda folder, _: torch.load(folder / "checkpoint.ckpt")["callbacks"]["SiftCallback"]["processes"],
    "fabric": lambda folder, _: [torch.load(folder / "checkpoint.ckpt")["sifter"]],
    "fsdp": lambda folder, _: [torch.load(path) for path in sorted(folder.glob("checkpoint/sifter_*.pt"))],
    "ray": lambda folder, _: [_readable(worker["sifter"]) for worker in _ray_workers(folder)],
}
LOOPS = sorted(WEIGHTS)


# The runs of a loop: what is run, one after the other in one folder.
def runs(*options):
    """By name: the kind of the recipe, and the arguments of each run."""
    options = ("--accumulate", ACCUMULATE, *options)
    return {
        "plain": ("plain", [("--steps", 5, *options)]),
        "all": ("sift", [("--steps", 5, "--keep", 1, *options)]),
        "whole": ("sift", [("--steps", 10, *options)]),
        "resumed": ("sift", [("--steps", 5, *options), ("--steps", 10, *options)]),
    }


def run_all(loop, folder, *options):
    """Run a loop all ways, each in a folder of its name."""
    for name, (kind, rounds) in runs(*options).items():
        for arguments in rounds:
            run(loop, kind, folder / name, *arguments)


if __name__ == "__main__":  # a rank: folder, loops
    options = {"lightning": ("--devices", 2), "fsdp": ("--bf16",)}
    for name in sys.argv[2:]:
        run_all(name, Path(sys.argv[1], name), *options.get(name, ()))
