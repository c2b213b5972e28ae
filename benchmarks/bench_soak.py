"""`soak`: many steps on a tiny model by every approximation, whose memory and speed should stay as they are."""

import os
import tempfile
import time
from argparse import Namespace
from functools import partial
from pathlib import Path
from statistics import linear_regression, mean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import BertConfig, BertForMaskedLM

import measuring
from earlysift import Ledger, Sifter, pools
from earlysift.control import Control

TITLE = "Soak"
ABOUT = """Steps of a tiny BERT (two layers of width 16, a pool of 8 rows of 8 tokens, SGD) by every approximation, each
as long as `--minutes` says. Memory is the resident memory of the process; its slope is fitted to all windows but the
first fifth, with twice its standard error, as if windows were independent. Steps per second are those of the second
fifth of the windows and of the last. The ledger has a row a step, in at most two files of 1 MiB, and keeps the latest
10,000 times of every operation: about 0.1 KiB a step until then, which shows in the entry that is measured first, as
later ones use the memory that it frees."""
TABLES: dict[str, measuring.Columns] = {
    "rows": {
        "score": ("score", "{}"),
        "steps": ("steps", "{:,}"),
        "minutes": ("minutes", "{:.1f}"),
        "mib": ("MiB", "{:,.0f}"),
        "slope": ("growth, KiB per 1,000 steps", "{:+.2f}"),
        "error": ("±", "{:.2f}"),
        "early_rate": ("steps/s, early", "{:,.0f}"),
        "late_rate": ("late", "{:,.0f}"),
        "ledger_mib": ("ledger, MiB", "{:.2f}"),
    }
}
SCORES: dict[str, dict[str, Any]] = {
    **{name: {"score": name} for name in ("loss", "entropy", "margin", "exact", "probe")},
    "memory": {"score": "memory", "sample_id": measuring.SAMPLE_ID},
    "blend": {"score": "blend", "sample_id": measuring.SAMPLE_ID},
    "auto": {"mode": "auto", "control": Control(reference_costs={"train": 100.0, "probe": 60.0, "score_1": 10.0})},
}
"""Entries, and how each selects."""
_SAMPLES, _POOL, _LENGTH, _VOCABULARY = 4096, 8, 8, 64
_WINDOWS, _LEDGER_MIB = 50, 1.0
_SMOKE_MINUTES, _MINUTES = 0.02, 0.5


class _Window(NamedTuple):
    steps: int
    mib: float
    rate: float


def plan(given: Namespace) -> dict[str, partial[dict[str, Any]]]:
    """What is to be measured, by name of the entry."""
    minutes = given.minutes or (_SMOKE_MINUTES if given.smoke else _MINUTES)
    return {name: partial(measure, name, minutes) for name in SCORES}


def measure(name: str, minutes: float) -> dict[str, Any]:
    """Train for so long, and look at memory and speed at the end of every window."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    model = BertForMaskedLM(BertConfig(vocab_size=_VOCABULARY, max_position_embeddings=_LENGTH, **shape))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    ids = torch.randint(_VOCABULARY, (_SAMPLES, _LENGTH))
    data = {"input_ids": ids, "labels": ids, measuring.SAMPLE_ID: torch.arange(_SAMPLES)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ledger.jsonl")
        sifter = Sifter(model.train(), keep=0.5, ledger=Ledger(path, max_mib=_LEDGER_MIB), **SCORES[name])
        began_s = time.monotonic()
        ends_s = [began_s + 60 * minutes * number / _WINDOWS for number in range(1, _WINDOWS + 1)]
        windows = [_window(sifter, optimizer, data, until_s) for until_s in ends_s]
        sifter.ledger.end()
        ledger_mib = sum(file.stat().st_size for file in Path(folder).iterdir()) / 2**20
    return {"rows": [{"score": name, "minutes": minutes, **_summary(windows), "ledger_mib": ledger_mib}]}


def _window(sifter: Sifter, optimizer: torch.optim.Optimizer, data: dict[str, Tensor], until_s: float) -> _Window:
    """Train until this time, at least a step."""
    began_s, first = time.monotonic(), sifter.step
    while sifter.step == first or time.monotonic() < until_s:
        rows = torch.arange(_POOL) + sifter.step * _POOL % _SAMPLES
        pool = pools.take(data, rows)
        if sifter.config.sample_id is None:
            del pool[measuring.SAMPLE_ID]
        sifter.loss(_inputs(sifter.sift(pool))).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    steps = sifter.step - first
    return _Window(sifter.step, _resident_mib(), steps / (time.monotonic() - began_s))


def _inputs(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: rows for name, rows in batch.items() if name != measuring.SAMPLE_ID}


def _summary(windows: list[_Window]) -> dict[str, float]:
    fifth = len(windows) // 5
    steady = windows[fifth:]
    steps, mib = [window.steps / 1000 for window in steady], [window.mib for window in steady]
    slope, start = linear_regression(steps, mib)
    residual = sum((y - slope * x - start) ** 2 for x, y in zip(steps, mib, strict=True)) / (len(steady) - 2)
    spread = sum((x - mean(steps)) ** 2 for x in steps)
    return {
        "steps": windows[-1].steps,
        "mib": windows[-1].mib,
        "slope": 1024 * slope,
        "error": 1024 * 2 * (residual / spread) ** 0.5,
        "early_rate": mean(window.rate for window in steady[:fifth]),
        "late_rate": mean(window.rate for window in steady[-fifth:]),
    }


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
