"""What `earlysift theory` runs, by name."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from earlysift.theory.asked import Asked, Show
from earlysift.theory.convex import errors, floor, greedy
from earlysift.theory.crossing import crossing
from earlysift.theory.depth import linear, payoff
from earlysift.theory.findings import Finding
from earlysift.theory.statements import statements

EXPERIMENTS: dict[str, Callable[[Asked, Show], Finding]] = {
    "statements": statements,
    "greedy": greedy,
    "floor": floor,
    "errors": errors,
    "crossing": crossing,
    "linear": linear,
    "payoff": payoff,
}


def run_experiments(
    names: Sequence[str],
    show: Callable[[str, float], None],
    *,
    seed: int = 0,
    results: Path | None = None,
    effort: float = 1.0,
) -> list[Finding]:
    """Run experiments, one after the other, on one thread, so that sums are the same to the last digit.

    Args:
        names: Of `EXPERIMENTS`; all if empty.
        show: Told an experiment and the share of it that is done.
        seed: Of all randomness.
        results: Folder with ``compare_*.json`` for the payoff map.
        effort: Multiplies seeds and instances.

    Raises:
        ValueError: If a name is unknown, or the folder holds no results.
    """
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        raise ValueError(f"Expected experiments among {', '.join(EXPERIMENTS)}, got {', '.join(unknown)}.")
    if results is not None and not any(results.glob("compare_*.json")):
        raise ValueError(
            f"Expected compare_*.json in {results}, found none; give the folder of a comparison's results."
        )
    asked = Asked(seed, results, effort)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [
            experiment(asked, lambda share, name=name: show(name, share))  # type: ignore[misc]
            for name, experiment in EXPERIMENTS.items()
            if name in (names or EXPERIMENTS)
        ]
    finally:
        torch.set_num_threads(threads)
