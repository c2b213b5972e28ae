"""`endurance`: `earlysift pretrain` over very many steps, and under torchrun with a process killed again and again."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil  # type: ignore[import-untyped]
import torch
from safetensors.torch import load_file
from torch import Tensor

import measuring
from earlysift.ledger import read_rows
from earlysift.pretrain import checkpoints

TITLE = "Endurance"
ABOUT = """`earlysift pretrain --arm sift` of a tiny BERT (two layers of width 16, 8 rows of 16 tokens) as processes of
its own. *Many steps*: what the process holds behind step 1,000 and at the end, looked at every 50 ms; times of a step
are medians of the second fifth of the steps and of the last. *Killed*: two processes under torchrun. One of
them, drawn by a seed, is killed (SIGKILL) at a random time, and torchrun begins both again, which resume from the
latest checkpoint. Lost is the time from the kill until the step that was under way has been done again. Effective at
twenty kills an hour: the share of an hour that is left by twenty such losses. Bit-equal: weights at the end, with those
of a run that nobody killed."""
TABLES: dict[str, measuring.Columns] = {
    "long": {
        "steps": ("many steps", "{:,}"),
        "minutes": ("minutes", "{:.1f}"),
        "early_mib": ("MiB at step 1,000", "{:,.1f}"),
        "late_mib": ("at the end", "{:,.1f}"),
        "growth": ("growth", "{:+.2%}"),
        "more_files": ("more open files", "{:+d}"),
        "more_threads": ("threads", "{:+d}"),
        "more_temporary": ("temporary files", "{:+d}"),
        "early_ms": ("ms a step, early", "{:.2f}"),
        "late_ms": ("late", "{:.2f}"),
        "log_mib": ("ledger, MiB", "{:.1f}"),
        "checkpoints": ("checkpoints left", "{}"),
    },
    "killed": {
        "steps": ("killed, steps", "{:,}"),
        "kills": ("kills", "{}"),
        "minutes": ("minutes", "{:.1f}"),
        "lost_s": ("lost a kill, s (median)", "{:.1f}"),
        "worst_s": ("worst", "{:.1f}"),
        "effective": ("effective here", "{:.1%}"),
        "effective_hour": ("at twenty kills an hour", "{:.1%}"),
        "equal": ("bit-equal", "{}"),
    },
}
_MODEL = {
    "model_type": "bert",
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
}
_EVERY = 100  # steps from one checkpoint to the next
_LOOK_S = 0.05
_HOUR_S, _KILLS_AN_HOUR = 3600, 20
_PATIENCE_S = 600.0  # for a step, before a run counts as stuck


class _Look(NamedTuple):
    """What a process holds at a step."""

    step: int
    mib: float
    files: int
    threads: int
    temporary: int


class _Stuck(RuntimeError):
    pass


def plan(given: Namespace) -> dict[str, partial[dict[str, Any]]]:
    """What is to be measured, by name of the entry."""
    steps, begins, killed_steps, kills = (200, 50, 300, 1) if given.smoke else (20_000, 1000, 4000, 20)
    return {"many steps": partial(many_steps, steps, begins), "killed": partial(killed, killed_steps, kills)}


def many_steps(steps: int, begins: int) -> dict[str, Any]:
    """Train for so long, and compare what the process holds behind this step and at the end."""
    with _run(steps) as (folder, start):
        began_s = time.monotonic()
        process = start()
        looks = [*_looks(process, folder)]
        _must_end(process, folder)
        minutes = (time.monotonic() - began_s) / 60
        rows = [row for row in read_rows(folder / "run" / "ledgers" / "process0.jsonl") if "step_ms" in row]
        left = len([*(folder / "run").glob("checkpoint-*")])
        log_mib = sum(path.stat().st_size for path in (folder / "run" / "ledgers").iterdir()) / 2**20
    times_ms, fifth = [row["step_ms"] for row in rows], len(rows) // 5
    early = next(look for look in looks if look.step >= begins)
    late = [look for look in looks if look.step < looks[-1].step][-1]  # behind the last step the report is written
    row = {
        "steps": len(rows),
        "minutes": minutes,
        "early_mib": early.mib,
        "late_mib": late.mib,
        "growth": late.mib / early.mib - 1,
        **{f"more_{name}": getattr(late, name) - getattr(early, name) for name in ("files", "threads", "temporary")},
        "early_ms": median(times_ms[fifth : 2 * fifth]),
        "late_ms": median(times_ms[-fifth:]),
        "log_mib": log_mib,
        "checkpoints": left,
    }
    return {"long": [row], "killed": []}


def killed(steps: int, kills: int) -> dict[str, Any]:
    """Kill a process of two so many times, at random times spread over a run of so many steps."""
    restarts = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", str(kills))
    with _run(steps, *restarts) as (folder, start):
        _must_end(start(), folder)
        undisturbed = _weights(folder, steps)
    dice = random.Random(0)
    with _run(steps, *restarts) as (folder, start):
        began_s = time.monotonic()
        process = start()
        lost_s = []
        for number in range(kills):
            # Kills beyond the last step would hit nothing, so they are spread over the steps, a little early.
            _wait_for(process, folder, 1 + int(steps * (number + dice.uniform(0.1, 0.9)) / (kills + 1)))
            lost_s.append(_loss_of_a_kill(process, folder, dice))
        _must_end(process, folder)
        total_s = time.monotonic() - began_s
        ended = _weights(folder, steps)
    row = {
        "steps": steps,
        "kills": kills,
        "minutes": total_s / 60,
        "lost_s": median(lost_s),
        "worst_s": max(lost_s),
        "effective": 1 - sum(lost_s) / total_s,
        "effective_hour": 1 - _KILLS_AN_HOUR * sum(lost_s) / len(lost_s) / _HOUR_S,
        "equal": ended.keys() == undisturbed.keys()
        and all(torch.equal(ended[name], undisturbed[name]) for name in ended),
    }
    return {"long": [], "killed": [row]}


@contextmanager
def _run(steps: int, *launcher: str) -> Iterator[tuple[Path, Callable[[], subprocess.Popen[bytes]]]]:
    """A folder with text and a model, and what starts a training of so many steps there."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "tmp").mkdir()
        (folder / "model.json").write_text(json.dumps(_MODEL), encoding="utf-8")
        sources = (path.read_text(encoding="utf-8") for path in sorted(Path(json.__file__).parent.glob("*.py")))
        (folder / "text.txt").write_text("\n\n".join(sources), encoding="utf-8")
        options = {
            "preset": folder / "model.json",
            "data": folder / "text.txt",
            "out": folder / "run",
            "vocab-size": 300,
            "length": 16,
            "validation-samples": 32,
            "batch": 8,
            "accumulate": 1,
            "arm": "sift",
            "steps": steps,
            "every": _EVERY,
            "learning-rate": 1e-3,
            "device": "cpu",
            "track": "none",
        }
        arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        environ = os.environ | {
            "TMPDIR": str(folder / "tmp"),
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # or restarted processes wait for each other: docs/pretrain.md
        }

        started = []

        def start() -> subprocess.Popen[bytes]:
            command = [sys.executable, *launcher, "-m", "earlysift", "pretrain", *arguments]
            with (folder / "said").open("wb") as said:
                started.append(subprocess.Popen(command, env=environ, stdout=said, stderr=subprocess.STDOUT))
            return started[-1]

        try:
            yield folder, start
        finally:
            for process in started:
                process.terminate()  # torchrun passes it on
                process.wait(_PATIENCE_S)


def _step(folder: Path) -> int:
    """Steps that the first process has done, by the last whole line of its ledger."""
    path = folder / "run" / "ledgers" / "process0.jsonl"
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1]).get("step", 0)) if lines else 0


def _looks(process: subprocess.Popen[bytes], folder: Path) -> Iterator[_Look]:
    """What a process holds, until it ends."""
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            held = watched.memory_info().rss / 2**20, watched.num_fds(), watched.num_threads()
        except psutil.Error:  # it has just ended
            return
        yield _Look(_step(folder), *held, sum(1 for _ in (folder / "tmp").rglob("*")))
        time.sleep(_LOOK_S)


def _wait_for(process: subprocess.Popen[bytes], folder: Path, step: int) -> None:
    """Wait until this step has been done."""
    latest, since_s = -1, time.monotonic()
    while (done := _step(folder)) < step:
        if done != latest:
            latest, since_s = done, time.monotonic()
        if process.poll() is not None or time.monotonic() - since_s > _PATIENCE_S:
            raise _Stuck(f"Expected step {step} of the run, got no further than {done}.\n{_said(folder)}")
        time.sleep(0.02)


def _loss_of_a_kill(process: subprocess.Popen[bytes], folder: Path, dice: random.Random) -> float:
    """Kill one of the two processes; seconds until the step that was under way has been done again."""
    launcher = psutil.Process(process.pid)
    ranks = launcher.children()
    began_s = time.monotonic()
    dice.choice(ranks).send_signal(signal.SIGKILL)
    while {*ranks} & {*launcher.children()}:  # the other one may still have ended its step
        if process.poll() is not None or time.monotonic() - began_s > _PATIENCE_S:
            raise _Stuck(f"Expected torchrun to end the other process, too.\n{_said(folder)}")
        time.sleep(0.02)
    _wait_for(process, folder, _step(folder) + 1)
    return time.monotonic() - began_s


def _weights(folder: Path, step: int) -> dict[str, Tensor]:
    return load_file(checkpoints.folder_of(folder / "run", step) / "model.safetensors")


def _must_end(process: subprocess.Popen[bytes], folder: Path) -> None:
    if process.wait():
        raise _Stuck(f"Expected a run that ends well, got exit code {process.returncode}.\n{_said(folder)}")


def _said(folder: Path) -> str:
    return (folder / "said").read_text(encoding="utf-8", errors="replace")[-3000:]
