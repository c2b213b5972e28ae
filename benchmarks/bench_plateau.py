"""`plateau`: how far uniform training gets on every workload of the suite, and how far with three times the budget."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
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
SMOKE: dict[str, Any] = {"steps": 10, "validation_samples": 32, "layers": 2, "width": 32}

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
    suite = Settings(suite="cpu", data=(given.data,), arms=("uniform",), seeds=1, evaluations=2)
    smaller = SMOKE if given.smoke else {}
    rows = {
        name: replace(workload_settings(name, suite, ("arms", "seeds", "evaluations")), save_encoder=False, **smaller)
        for name in (["digits"] if given.smoke else SUITES["cpu"])
    }
    return {
        name: partial(measure, row)
        for name, row in rows.items()
        if missing_data(row) is None and row.checkpoint is None
    }


def measure(workload: Settings) -> dict[str, Any]:
    """Accuracy with the budget of a workload, and with three times that."""
    assert workload.steps is not None
    with TemporaryDirectory() as folder:
        short, long = (
            compare(replace(workload, steps=times * workload.steps, out=Path(folder, str(times))))
            for times in (1, TIMES)
        )
    ignoring = short["baseline"]["accuracy"]
    reached, longer = (results["arms"]["uniform"]["runs"][0]["final_accuracy"] for results in (short, long))
    return {
        "rows": [
            {
                "steps": workload.steps,
                "ignoring": ignoring,
                "accuracy": reached,
                "longer": longer,
                "of_the_way": (reached - ignoring) / (longer - ignoring) if longer > ignoring else 0.0,
            }
        ]
    }
