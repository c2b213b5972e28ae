"""Suites: workloads as rows of data, each run as a comparison in a process and a folder of its own."""

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from earlysift.compare.folder import ENCODER, LOGS, suite_folder
from earlysift.compare.settings import Settings
from earlysift.files import write_json
from earlysift.report.page import RESULTS, read_results

# Rows are settings. Data are folders below --data; a checkpoint names the workload whose encoder is fine-tuned. Budgets
# are in steps, so that a slow machine trains what a fast one does. Every workload is meant to be long enough for
# uniform training to leave its plateau (`benchmarks/run.py plateau` measures it), and has the arms that can act on it.
_SIFT = ("uniform", "sift", "sift-entropy", "free", "auto")
# Samples return, and most are learnt: where approximate losses can pay. Every approximation runs, with a small keep.
_SCORES = ("uniform", "memory", "memory-unbiased", "probe-2", "probe-2-unbiased", "blend-2", "sift-2", "free", "auto")
_PEERS = (
    *("selective-backprop", "stale-selective-backprop", "ordered-sgd", "rho-loss", "infobatch", "grad-norm", "rs2"),
    "evolved-sampling",
)
_FEW = ("uniform", "memory", "memory-unbiased", "probe-2-unbiased", "free", "auto")
_NOISY = ("uniform", "memory", "memory-guarded", "memory-unbiased", "auto")
_MODEL: dict[str, Any] = {"seeds": 5, "evaluations": 21, "validation_samples": 2000, "layers": 12}
# The target is what uniform training ends with: at less of it, most of the time is before selection begins.
_EPOCHS = _MODEL | {"arms": _SCORES, "keep": 0.25, "target_share": 1.0, "select_after": 0.3}
_MNIST = _EPOCHS | {
    "task": "image",
    "data": ("mnist/mnist.npz",),
    "layers": 8,
    "train_samples": 10_000,
    "steps": 1500,  # five epochs
    "learning_rate": 1.5e-3,
}
_ENCODER = "encoder"

_CPU: dict[str, dict[str, Any]] = {
    # The paper's headline at 1:170, its model's depth and exit: steps and time to 64 % masked accuracy. Requests to an
    # assistant, by character: short, so that a processor gets there.
    "paper": {
        **_MODEL,
        "data": ("clinc150",),
        "text_column": "text",
        "task": "masked_characters",
        "arms": (*_SIFT, "visible"),
        "seeds": 3,
        "evaluations": 16,
        "batch": 16,
        "length": 32,
        "steps": 3000,
        "target": 0.64,
        "vocab_size": 64,
        "learning_rate": 3e-3,
    },
    "mnist": {**_MNIST, "arms": (*_SCORES, *_PEERS)},
    "mnist-augmented": {**_MNIST, "arms": _FEW, "augmented": True},
    "mnist-flipped-20": {**_MNIST, "arms": _NOISY, "flipped": 0.2},
    "mnist-flipped-40": {**_MNIST, "arms": _NOISY, "flipped": 0.4},
    "digits": {
        **_EPOCHS,
        "task": "image",
        "layers": 6,
        "length": 32,
        "steps": 1400,
        "learning_rate": 7e-4,
        "select_after": 0.2,
        "target_share": 0.98,  # beyond it single samples of few decide
        "validation_samples": 360,
    },
    "clinc": {
        **_EPOCHS,
        "task": "classification",
        "data": ("clinc150",),
        "train_samples": 5000,
        "length": 20,
        "vocab_size": 2000,
        "steps": 1600,  # ten epochs
        "learning_rate": 1e-3,
        "select_after": 0.4,
    },
    "redundant-text": {
        **_EPOCHS,
        "arms": (*_FEW, "infobatch", "predictive-batch"),
        "task": "causal_lm",
        "data": ("redundant-text",),  # benchmarks/redundant_text.py --characters 1500000 writes it
        "layers": 6,
        "batch": 16,
        "length": 32,
        "vocab_size": 512,
        "steps": 1500,
        "learning_rate": 4e-3,
        "select_after": 0.2,
    },
    _ENCODER: {
        **_MODEL,
        "data": ("wikipedia-en", "books-litbank"),
        "max_characters": 10_000_000,
        "arms": ("uniform",),
        "seeds": 1,
        "architecture": "modernbert",
        "layers": 6,
        "vocab_size": 2000,
        "length": 32,
        "steps": 6000,
        "learning_rate": 3e-3,
        "save_encoder": True,
    },
    "sst2-finetuned": {
        **_EPOCHS,
        "task": "classification",
        "data": ("sst2",),
        "checkpoint": _ENCODER,
        "layers": 6,
        "vocab_size": 2000,
        "length": 32,
        "train_samples": 10_000,
        "steps": 950,  # three epochs
        "learning_rate": 1e-3,
        "validation_samples": 872,
    },
}
_BERT_BASE = {"layers": 12, "width": 768, "length": 128, "vocab_size": 30_522}
_GPU = _BERT_BASE | {"device": "cuda", "batch": 256, "learning_rate": 2e-4, "validation_samples": 2048}

# Both faces in a few minutes, on data that every machine has: one seed, so a demonstration and no evidence.
_ONE_SEED = {"seeds": 1, "evaluations": 16}
_DEMO: dict[str, dict[str, Any]] = {
    "digits": {**_CPU["digits"], **_ONE_SEED, "steps": 1000, "arms": ("uniform", "sift-2", "probe-2", "auto")},
    "mlm-stdlib": {
        **_ONE_SEED,
        "arms": ("uniform", "sift", "probe-1", "auto"),
        "validation_samples": 384,
        "layers": 6,
        "length": 32,
        "vocab_size": 1024,
        "architecture": "modernbert",  # which leaves its plateau in 700 steps
        "steps": 700,
        "learning_rate": 3e-3,
    },
}

SUITES: dict[str, dict[str, dict[str, Any]]] = {
    "demo": _DEMO,
    "cpu": _CPU,
    "gpu": {name: {**row, **_GPU, "max_characters": None} for name, row in _CPU.items()},
}

_POLL_S = 1.0  # reading results more often would disturb the measurements
OnProgress = Callable[[str, float], None]


@dataclass
class Outcome:
    """The results of a workload, if it wrote any, and the reason why it did not finish, if it did not."""

    results: dict[str, Any] | None
    reason: str | None


def run_suite(
    settings: Settings, given: Collection[str] = (), on_progress: OnProgress = lambda *_: None
) -> dict[str, Outcome]:
    """Run the workloads of a suite, ``jobs`` at a time, each on its share of the cores.

    Ctrl-C stops all of them; a resumed suite goes on from the results on disk.

    Args:
        settings: ``suite``, ``only``, ``jobs`` and ``out``; ``data`` is the folder of the corpora.
        given: Names of settings that apply to every workload, beside those that differ from their defaults.
        on_progress: Called with a workload's name and the share of it that is done.

    Returns:
        Workload to outcome, in the suite's order.

    Raises:
        ValueError: If a workload is unknown.
    """
    names = names_of(settings)
    workloads = {name: workload_settings(name, settings, given) for name in names}
    reasons: dict[str, str | None] = {name: missing_data(workload) for name, workload in workloads.items()}
    waiting = [name for name in names if reasons[name] is None]
    if waiting:
        with suite_folder(settings.out, SUITES[str(settings.suite)]):
            _run_workloads(workloads, waiting, reasons, settings, on_progress)
    return {name: Outcome(_results(workloads[name].out), reasons[name]) for name in names}


def _run_workloads(
    workloads: dict[str, Settings],
    waiting: list[str],
    reasons: dict[str, str | None],
    settings: Settings,
    on_progress: OnProgress,
) -> None:
    """Run the waiting workloads, and enter the reason for each that did not finish."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        while waiting or running:
            for name in [name for name in waiting if _ready(workloads[name], waiting, running, settings)]:
                if len(running) < settings.jobs:
                    waiting.remove(name)
                    running[name] = _start(name, workloads[name], settings)
            time.sleep(_POLL_S)
            for name, process in list(running.items()):
                on_progress(name, share_done(workloads[name]))
                if process.poll() is not None:
                    del running[name]
                    reasons[name] = _reason(process.returncode, _log(settings, name))
    except KeyboardInterrupt:
        reasons |= dict.fromkeys((*waiting, *running), "stopped")
    finally:
        for process in running.values():
            process.terminate()  # ends them as Ctrl-C does, even where Ctrl-C is ignored
        for process in running.values():
            process.wait()


def names_of(settings: Settings) -> list[str]:
    """Names of the workloads to run."""
    assert settings.suite is not None
    known = SUITES[settings.suite]
    unknown = [name for name in settings.only if name not in known]
    if unknown:
        raise ValueError(f"Unknown workloads {unknown}; the suite {settings.suite} has {', '.join(known)}.")
    return [name for name in known if name in (settings.only or known)]


def workload_settings(name: str, settings: Settings, given: Collection[str] = ()) -> Settings:
    """The settings of one workload: its row replaces defaults, and settings of the suite replace both.

    Example:
        >>> settings = Settings(suite="cpu", seeds=2, data=(Path("corpora"),), out=Path("runs/cpu"))
        >>> workload = workload_settings("clinc", settings)
        >>> workload.seeds, str(workload.data[0]), str(workload.out)
        (2, 'corpora/clinc150', 'runs/cpu/clinc')
    """
    assert settings.suite is not None
    row = dict(SUITES[settings.suite][name])
    folder = settings.data[0] if settings.data else Path()
    row["data"] = tuple(folder / part for part in row.get("data", ()))
    if "checkpoint" in row:
        row["checkpoint"] = settings.out / row["checkpoint"] / ENCODER
    own = ("data", "out", "suite", "only", "jobs", "config")
    requested = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(Settings)
        if field.name not in own and (field.name in given or getattr(settings, field.name) != field.default)
    }
    if "budget" in requested and "steps" not in requested:
        row.pop("steps", None)
    return Settings(**{**row, **requested, "out": settings.out / name})


def missing_data(workload: Settings) -> str | None:
    """Why a workload cannot start, if its data are missing."""
    missing = [path for path in workload.data if not path.exists()]
    if not missing:
        return None
    return f"skipped: needs {' and '.join(path.name for path in missing)} in the folder that --data gives"


def share_done(workload: Settings) -> float:
    """The finished share of a workload, from its results so far."""
    results = _results(workload.out)
    if results is None:
        return 0.0
    shares: list[float] = [
        1.0 if run["finished"] else run["curve"][-1].get("share", 0.0)
        for name in workload.arms
        for run in results["arms"].get(name, {}).get("runs", [])
        if run["seed"] < workload.seeds
    ]
    return sum(shares) / (workload.seeds * len(workload.arms))


def _ready(workload: Settings, waiting: list[str], running: dict[str, Any], settings: Settings) -> bool:
    # A workload that fine-tunes another one's encoder waits for it.
    return not workload.checkpoint or all(
        workload.checkpoint != settings.out / name / ENCODER for name in (*waiting, *running)
    )


def _start(name: str, workload: Settings, settings: Settings) -> "subprocess.Popen[bytes]":
    log = _log(settings, name)
    log.parent.mkdir(parents=True, exist_ok=True)
    config = log.with_suffix(".json")
    write_json(config, json.loads(json.dumps(dataclasses.asdict(workload), default=str)))
    threads = str(max(1, (os.cpu_count() or 1) // settings.jobs))
    # A workload that runs alone chooses its threads itself.
    share = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads} if settings.jobs > 1 else {}
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "earlysift", "compare", "--config", str(config)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **share},
            start_new_session=True,  # Ctrl-C reaches it once, through this process
        )


def _log(settings: Settings, name: str) -> Path:
    return settings.out / LOGS / f"{name}.log"


def _reason(code: int, log: Path) -> str | None:
    if code == 0:
        return None
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    messages = [line.removeprefix("earlysift: ") for line in lines if line.startswith("earlysift: ")]
    return f"did not run: {messages[-1]}" if messages else f"failed, see {log}"


def _results(folder: Path) -> dict[str, Any] | None:
    return read_results(folder) if (folder / RESULTS).is_file() else None
