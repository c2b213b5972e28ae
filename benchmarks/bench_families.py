"""`families`: what early exits make of tiny models of many families, with a known row and with one that is derived."""

import logging
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import measuring
import zoo
from earlysift import checks, exits, families, pools

DEPTH = 2
REFUSED = {"row": "none", "layers": "–", "head": "–"}

TITLE = "Model families"
ABOUT = f"""Tiny models of transformers with random weights, {zoo.LAYERS} layers, an exit after {DEPTH}. "Row": known to
earlysift, or derived from the structure of the model and compared with the model itself. "Exit": whether the logits at
the exit are those of a stock model of that many layers with the same weights, bit for bit. What is refused says why;
a row of your own may help."""
TABLES: dict[str, measuring.Columns] = {
    "rows": {
        "model": ("model", "{}"),
        "row": ("row", "{}"),
        "layers": ("layers", "`{}`"),
        "head": ("head", "{}"),
        "exit": ("exit", "{}"),
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
        if problems:
            return {
                "rows": [row | {"row": "none", "layers": "–", "head": "–", "exit": f"refused: {problems[0].reason}"}]
            }
        anatomy = exits.find_anatomy(model)
        path = next(path for path, module in anatomy.core.named_modules() if module is anatomy.layers)
        head = ", ".join(anatomy.head or anatomy.classifier) or "the model's own logits"
        same = torch.equal(*exit_and_stock(name))
        return {"rows": [row | {"layers": path, "head": head, "exit": "equal" if same else "differs"}]}
    finally:
        logging.disable(logging.NOTSET)


def exit_and_stock(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits at an exit, and those of a stock model of as many layers that holds the same weights."""
    model, stock = zoo.build(name), zoo.stock(name, DEPTH)
    inputs, _ = pools.inputs_and_labels(zoo.batch(name))
    with torch.no_grad():
        with exits.truncated(model, DEPTH):
            at_exit = exits.call(model, inputs)
        return at_exit, exits.call(stock, inputs)
