"""`step`: our plain training step beside the model's own, on the same rows."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import measuring
import shapes
from earlysift import scorers
from earlysift.anatomy import find_anatomy
from shapes import Shape

TITLE = "Training step, ours and the model's own"
ABOUT = """A step on b rows with the head on labelled positions only (`scorers.training_loss`) beside the model's own
loss, which computes the logits of every position; fused AdamW in both, interleaved. The losses are those of the same
weights and rows."""
TABLES: dict[str, measuring.Columns] = {
    "rows": {
        "median_ms": ("ours, ms", "{:.1f}"),
        "low_ms": ("20 %", "{:.1f}"),
        "high_ms": ("80 %", "{:.1f}"),
        "stock_ms": ("the model's own, ms", "{:.1f}"),
        "stock_ratio": ("own / ours", "{:.3f}"),
        "predicted": ("by FLOPs", "{:.3f}"),
        "loss_difference": ("losses differ by (relative)", "{:.1e}"),
    }
}
_ROUNDING = {None: 1e-5, torch.bfloat16: 1e-2}


def plan(given: Namespace) -> dict[str, partial[dict[str, Any]]]:
    """What is to be measured, by name of the entry."""
    return shapes.entries(measure, given)


def measure(shape: Shape, dtype: str, rounds: int) -> dict[str, Any]:
    """Times of both steps, and by how much their losses differ.

    Raises:
        RuntimeError: If the losses differ by more than rounding.
    """
    place, precision = measuring.device(), measuring.DTYPES[dtype].train
    model: Any = shapes.build(shape).to(place)
    rows = shapes.pool(model, shape, shape.batch, place)
    anatomy = find_anatomy(model)
    loss_of: dict[str, Callable[[], Any]] = {
        "ours": lambda: scorers.training_loss(model, rows),
        "stock": lambda: model(**rows).loss,
    }
    with torch.no_grad(), measuring.autocast(precision):
        ours, stock = (float(loss()) for loss in loss_of.values())
    difference = abs(ours - stock) / abs(stock)
    if difference > _ROUNDING[precision]:
        raise RuntimeError(f"Our loss is {ours} and the model's own {stock}, which is no rounding in {dtype}.")
    steps = {name: measuring.step(model, loss, precision) for name, loss in loss_of.items()}
    times_ms = measuring.interleaved(steps, rounds, "step")
    row = {
        **measuring.spread(times_ms["ours"]),
        "stock_ms": measuring.spread(times_ms["stock"])["median_ms"],
        "stock_ratio": measuring.ratio(times_ms["stock"], times_ms["ours"]),
        "predicted": measuring.flops(anatomy, rows, dense=True) / measuring.flops(anatomy, rows),
        "loss_difference": difference,
    }
    return {"rows": [row]}
