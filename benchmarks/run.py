"""The one entry to all benchmarks: ``python benchmarks/run.py score [--smoke] [--batches 8 16] [--out FILE]``.

`score` measures what scoring a pool of 2b costs beside a training step of b, for BERT base: our early exit at several
depths, the same exit with a dense head, and exact losses; interleaved in every round, medians with 20 and 80 per cent,
ratios within the run, and the FLOP prediction (C1) beside them.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from earlysift import costs, environment, exits, scorers
from earlysift.compare.calibrate import summary
from earlysift.pretrain.masking import mask_tokens
from earlysift.pretrain.models import build_bert
from earlysift.seeds import seeded

Pool = dict[str, Tensor]
_KEEP, _MASKED = 0.5, 0.15
_BERT_BASE = {"vocab_size": 30_522, "length": 128, "layers": 12, "width": 768}
_SMOKE = {"vocab_size": 500, "length": 32, "layers": 4, "width": 64}
_DEPTHS = (1, 2, 3)


def main() -> int:
    """Run the benchmark named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", choices=("score",))
    parser.add_argument("--batches", type=int, nargs="+", default=[8, 16], help="training batch sizes b")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (one warm-up round comes before)")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes and two rounds: does it run?")
    parser.add_argument("--out", type=Path, help="JSON file (default: benchmarks/results/score_<device>_<date>.json)")
    given = parser.parse_args()
    shape = _SMOKE if given.smoke else _BERT_BASE
    batches, rounds = ([4], 2) if given.smoke else (given.batches, given.rounds)
    result = {
        "benchmark": "score",
        "date": date.today().isoformat(),
        **_environment(),
        "shape": shape,
        "keep": _KEEP,
        "masked": _MASKED,
        "batches": {str(batch): measure_score(shape, batch, rounds) for batch in batches},
    }
    device = "cuda" if torch.cuda.is_available() else "cpu"
    out = given.out or Path(__file__).parent / "results" / f"score_{device}_{result['date']}.json"
    if given.smoke and given.out is None:
        out = Path(os.devnull)
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"written: {out}")
    return 0


def measure_score(shape: dict[str, int], batch: int, rounds: int) -> dict[str, Any]:
    """Times, ratios and predictions for one batch size.

    Args:
        shape: Model shape, the arguments of `build_bert`.
        batch: b; the pool is b / keep.
        rounds: Timed rounds.

    Returns:
        For every operation its times in ms, its ratio to our training step, and the predicted ratio where there is one.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_bert(**shape, seed=0).to(device)
    pool = _masked_pool(shape, round(batch / _KEEP), device)
    rows = {name: value[:batch] for name, value in pool.items()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    autocast = torch.autocast(device.type, dtype=torch.bfloat16)

    def step(loss_of: Callable[[], Tensor]) -> Callable[[], None]:
        def operation() -> None:
            with autocast:
                loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        return operation

    def score(depth: int, dtype: torch.dtype | None = torch.bfloat16) -> Callable[[], Any]:
        return lambda: scorers.early_exit_loss(model, pool, depth=depth, chunk_rows=batch, dtype=dtype)

    def stock_loss() -> Tensor:
        loss: Tensor = model(**rows).loss
        return loss

    operations: dict[str, Callable[[], Any]] = {
        "train step": step(lambda: scorers.training_loss(model, rows)),
        "stock train step (dense head)": step(stock_loss),
        **{f"score, depth {depth}": score(depth) for depth in _DEPTHS},
        "score, depth 1, float32": score(1, None),
        "score, depth 1, dense head": lambda: _dense_scores(model, pool, batch, depth=1),
        "exact loss": lambda: scorers.exact_loss(model, pool, chunk_rows=batch, dtype=torch.bfloat16),
        "exact loss, dense head": lambda: _dense_scores(model, pool, batch, depth=None),
    }
    times_ms: dict[str, list[float]] = {name: [] for name in operations}
    for number in track(range(rounds + 1), description=f"b = {batch}"):
        for name, operation in operations.items():
            spent_ms = _timed_ms(operation, device)
            if number > 0:
                times_ms[name].append(spent_ms)
    predicted = _predicted_ratios(model, shape, batch)
    base = times_ms["train step"]
    entries = {}
    for name, times in times_ms.items():
        summarized = summary(times)
        ratios = [time_ms / step_ms for time_ms, step_ms in zip(times, base, strict=True)]
        entries[name] = {
            **{f"{name}_ms": summarized[name] for name in ("median", "low", "high")},
            "ratio_to_train_step": statistics.median(ratios),
            "predicted_ratio": predicted.get(name),
        }
    return entries


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    lines = []
    for batch, entries in result["batches"].items():
        shape = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in result["shape"].items())
        lines += [f"\nb = {batch}, pool {round(int(batch) / result['keep'])}; {shape}\n"]
        lines += ["| operation | median ms | 20-80 % | of a train step | predicted (FLOPs) |", "|---|---|---|---|---|"]
        for name, entry in entries.items():
            predicted = "" if entry["predicted_ratio"] is None else f"{entry['predicted_ratio']:.3f}"
            spread = f"{entry['low_ms']:.0f}-{entry['high_ms']:.0f}"
            lines.append(
                f"| {name} | {entry['median_ms']:.0f} | {spread} | {entry['ratio_to_train_step']:.3f} | {predicted} |"
            )
    return "\n".join(lines)


def _dense_scores(model: nn.Module, pool: Pool, chunk: int, depth: int | None) -> Tensor:
    """Stock scoring: the model's own full logits for every position, then a per-sample mean."""
    anatomy = exits.find_anatomy(model)
    labels = pool["labels"]
    scores = []
    with (
        torch.no_grad(),
        exits.scoring_mode(model),
        torch.autocast(labels.device.type, dtype=torch.bfloat16),
        exits.shortened(anatomy, depth or len(anatomy.layers)),
    ):
        for start in range(0, len(labels), chunk):
            part = labels[start : start + chunk]
            logits = model(input_ids=pool["input_ids"][start : start + chunk]).logits
            per_token = F.cross_entropy(logits.float().flatten(0, 1), part.flatten(), reduction="none").view(part.shape)
            scores.append(per_token.sum(dim=1) / (part != -100).sum(dim=1))
    return torch.cat(scores)


def _predicted_ratios(model: nn.Module, shape: dict[str, int], batch: int) -> dict[str, float]:
    """FLOPs over those of our training step (three forward passes of b)."""
    anatomy = exits.find_anatomy(model)
    length, candidates = shape["length"], round(batch / _KEEP)
    share = round(_MASKED * length) / length

    def flops(rows: int, labelled_share: float, depth: int | None = None) -> float:
        labelled = round(rows * length * labelled_share)
        return costs.forward_flops(anatomy, rows=rows, length=length, labelled=labelled, depth=depth)

    step = 3 * flops(batch, share)
    predicted = {
        "train step": step,
        "stock train step (dense head)": 3 * flops(batch, 1.0),
        "score, depth 1, float32": flops(candidates, share, 1),
        "score, depth 1, dense head": flops(candidates, 1.0, 1),
        "exact loss": flops(candidates, share),
        "exact loss, dense head": flops(candidates, 1.0),
        **{f"score, depth {depth}": flops(candidates, share, depth) for depth in _DEPTHS},
    }
    return {name: value / step for name, value in predicted.items()}


def _masked_pool(shape: dict[str, int], rows: int, device: torch.device) -> Pool:
    generator = seeded("benchmark")
    ids = torch.randint(5, shape["vocab_size"], (rows, shape["length"]), generator=generator)
    pool = mask_tokens(
        ids, mask_id=4, vocab_size=shape["vocab_size"], first_ordinary_id=5, generator=generator, share=_MASKED
    )
    return {name: value.to(device) for name, value in pool.items()}


def _timed_ms(operation: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    operation()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1e3


def _environment() -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    machine = environment.machine(device)
    return {
        "hardware": machine["accelerator"] or f"{machine['cpu']}, {machine['cores']} cores",
        "threads": machine["threads"],
        "versions": environment.versions(),
        "commit": environment.commit(),
    }


if __name__ == "__main__":
    sys.exit(main())
