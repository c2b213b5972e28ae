"""`plateau`: how far uniform training gets on every workload of the suite, and how far with three times the budget."""

from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import measuring
from earlysift.compare.run import compare
from earlysift.compare.settings import Settings
from earlysift.compare.suite import SUITES, missing_data, workload_settings

TIMES = 3
ENOUGH = 0.5
SMOKE = {"evaluations": 2, "validation_samples": 32, "layers": 2, "width": 32}

TITLE = "Whether workloads leave their plateau"
ABOUT = f"""Uniform training of every workload of the suite (`earlysift compare --suite cpu`) on one seed, with its own
budget and with {TIMES} times that, each with its learning rate decayed. "Of the way": from a model that ignores its
input to what the longer training reaches. Where that is less than {ENOUGH:.0%} the workload says nothing about
selection."""
TABLES: dict[str, measuring.Columns] = {
    "rows": {
        "steps": ("steps", "{:,}"),
        "ignoring": ("ignoring the input", "{:.2%}"),
        "accuracy": ("accuracy", "{:.2%}"),
        "longer": (f"with {TIMES} times the budget", "{:.2%}"),
        "of_the_way": ("of the way", "{:.0%}"),
    }
}


def plan(given: Namespace) -> dict[str, Callable[[], dict[str, Any]]]:
    """Workloads whose data are there, and how to measure them."""
    names = ["digits"] if given.smoke else list(SUITES["cpu"])
    rows = {name: workload_settings(name, Settings(suite="cpu", data=(given.data,), seeds=1)) for name in names}
    return {
        name: partial(measure, name, given.data, smoke=given.smoke)
        for name, row in rows.items()
        if missing_data(row) is None and row.checkpoint is None
    }


def measure(name: str, data: Path, *, smoke: bool = False) -> dict[str, Any]:
    """Accuracy with the budget of a workload, and with three times that."""
    with TemporaryDirectory() as folder:
        short, long = (_uniform(name, data, Path(folder), times, smoke=smoke) for times in (1, TIMES))
    ignoring = short["baseline"]["accuracy"]
    reached, longer = (results["arms"]["uniform"]["runs"][0]["final_accuracy"] for results in (short, long))
    return {
        "rows": [
            {
                "steps": short["config"]["steps"],
                "ignoring": ignoring,
                "accuracy": reached,
                "longer": longer,
                "of_the_way": (reached - ignoring) / (longer - ignoring) if longer > ignoring else 0.0,
            }
        ]
    }


def _uniform(name: str, data: Path, folder: Path, times: int, *, smoke: bool) -> dict[str, Any]:
    row = SUITES["cpu"][name]
    size: dict[str, Any] = SMOKE if smoke else {"evaluations": 2}
    suite = Settings(suite="cpu", data=(data,), out=folder / str(times), arms=("uniform",), seeds=1)
    steps = times * (10 if smoke else row["steps"])
    workload = workload_settings(name, suite, ("arms", "seeds"))
    return compare(Settings(**{**vars(workload), **size, "steps": steps, "save_encoder": False}))
