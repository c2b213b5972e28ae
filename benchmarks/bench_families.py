"""`families`: what early exits make of tiny models of many families, with a known row and with one that is derived."""

import logging
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, distributed, nn
from torch.distributed import HashStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import measuring
import zoo
from earlysift import checks, exits, families, passes
from earlysift.anatomy import find_anatomy

DEPTH = 2
REFUSED = {"row": "none", "layers": "–", "head": "–"}

TITLE = "Model families"
ABOUT = f"""Tiny models of transformers with random weights, {zoo.LAYERS} layers, an exit after {DEPTH}. "Row": known to
earlysift, or derived from the structure of the model and compared with the model itself. "Exit": whether the logits at
the exit are those of a stock model of that many layers with the same weights, bit for bit. "Compiled": the same of
`torch.compile(model)`, traced and run eagerly; "sharded": of model and layers under `fully_shard`, in one process.
"By a probe": the model's own head cannot read an exit, and `score="probe"` can. What is refused says why; a row of
your own may help."""
TABLES: dict[str, measuring.Columns] = {
    "rows": {
        "model": ("model", "{}"),
        "row": ("row", "{}"),
        "layers": ("layers", "`{}`"),
        "head": ("head", "{}"),
        "exit": ("exit", "{}"),
        "compiled": ("compiled", "{}"),
        "sharded": ("sharded", "{}"),
    }
}


def plan(given: Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Families, and how to try them."""
    return {name: partial(measure, name) for name in (["mistral"] if given.smoke else zoo.ZOO)}


def measure(name: str) -> dict[str, Any]:
    """What an exit of this family is."""
    logging.disable(logging.WARNING)
    try:
        model, pool = zoo.build(name), zoo.batch(name)
        known = str(getattr(model, "config").model_type) in families.FAMILIES  # noqa: B009
        row: dict[str, Any] = {"model": type(model).__name__, "row": "known" if known else "derived"}
        problems = checks.check(model, depth=DEPTH, inputs=pool)
        by_probe = any("score='probe'" in problem.remedy for problem in problems)
        if problems and not by_probe:
            return {"rows": [row | REFUSED | {"exit": f"refused: {problems[0].reason}"}]}
        found = {"exit": f"by a probe: {problems[0].reason}"} if by_probe else laws(name)
        anatomy = find_anatomy(model)
        paths = {module: path for path, module in anatomy.core.named_modules()}
        layers = "`, `".join(paths[layers] for layers in anatomy.lists)
        head = ", ".join(anatomy.head or anatomy.classifier) or "the model's own logits"
        return {"rows": [row | {"layers": layers, "head": head} | found]}
    finally:
        logging.disable(logging.NOTSET)


def laws(name: str) -> dict[str, str]:
    """Whether an exit of this family, wrapped or not, is a stock model of as many layers with the same weights."""
    batch = zoo.batch(name)
    expected = logits(zoo.stock(name, DEPTH), batch)
    compiled = cast(nn.Module, torch.compile(zoo.build(name), backend="eager"))
    found = {
        "exit": at_exit(zoo.build(name), batch),
        "compiled": at_exit(compiled, batch),
        "sharded": at_exit_of_sharded(zoo.build(name), batch),
    }
    torch.compiler.reset()
    return {law: likeness(values, expected) for law, values in found.items()}


def likeness(found: Tensor, expected: Tensor) -> str:
    """Whether two tensors are alike, in words."""
    if torch.equal(found, expected):
        return "equal"
    return "equal but for rounding" if torch.allclose(found, expected, rtol=1e-4, atol=1e-5) else "differs"


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """What the model makes of a batch with labels, which are more than it is scored with."""
    with torch.no_grad():
        found: Tensor = passes.run(model, batch).logits
    return found


def at_exit(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits at an exit."""
    with exits.truncated(model, DEPTH):
        return logits(model, batch)


def at_exit_of_sharded(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits at an exit of a model that is sharded over this process alone."""
    distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    try:
        return at_exit(sharded(model), batch)
    finally:
        distributed.destroy_process_group()


def sharded(model: nn.Module) -> nn.Module:
    """The model, and each of its layers, under ``fully_shard`` over all ranks."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for layers in find_anatomy(model).lists:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model
