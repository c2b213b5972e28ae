"""The experiments of `earlysift theory`, by name."""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from earlysift.report.series import Results, number, section, sections
from earlysift.report.shape import read_json, require_shape

if TYPE_CHECKING:
    from earlysift.theory.findings import Finding

EXPERIMENTS = {
    "statements": "statements",
    "greedy": "convex",
    "floor": "convex",
    "errors": "convex",
    "crossing": "crossing",
    "linear": "linear",
    "payoff": "payoff",
}
"""Names of experiments, and the module of this package with the function of that name. It is imported only to be run,
so that the command line knows the names without torch."""


def require_known(names: Sequence[str], results: Path | None) -> None:
    """Raise ValueError if a name is unknown, or the folder for the payoff map has no results that it can read."""
    if unknown := [name for name in names if name not in EXPERIMENTS]:
        raise ValueError(f"Expected experiments among {', '.join(EXPERIMENTS)}, got {', '.join(unknown)}.")
    if results is not None:
        read_workloads(results)


def read_workloads(folder: Path) -> dict[str, Results]:
    """Results of comparisons by workload; ValueError if there are none, or they lack what the payoff map needs."""
    found = {path: read_json(path) for path in sorted(folder.glob("compare_*.json"))}
    if not found:
        raise ValueError(f"Expected compare_*.json in {folder}, found none; give the folder of a comparison's results.")
    for path, results in found.items():
        require_shape(results, path)
        prices = sections(results, "operations_ms")
        if prices and not number(section(prices, "train").get("median")):
            raise ValueError(f"Expected the time of a training step (operations_ms, train) in {path}, found none.")
    return {path.stem.removeprefix("compare_"): results for path, results in found.items()}


def run_experiments(
    names: Sequence[str],
    show: Callable[[str, float], None],
    *,
    seed: int = 0,
    results: Path | None = None,
    effort: float = 1.0,
) -> "list[Finding]":
    """Run experiments (all, if ``names`` is empty) on one thread, so that sums are the same to the last digit.

    ``show`` is called with an experiment and the share of it that is done; the other options are those of
    `earlysift.theory.findings.Options`. Raises as `require_known`.
    """
    require_known(names, results)
    import torch

    from earlysift.theory.findings import Options

    options = Options(seed, results, effort)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            getattr(import_module(f"earlysift.theory.{module}"), name)(options, partial(show, name))
            for name, module in EXPERIMENTS.items()
            if name in (names or EXPERIMENTS)
        ]
    finally:
        torch.set_num_threads(threads)
