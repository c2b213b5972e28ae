"""Coverage: which groups of samples (classes, sources, languages) selection keeps, and which it starves."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def counts(groups: Sequence[int], kept: Iterable[int]) -> dict[str, list[int]]:
    """Candidates that were offered and kept of every group, by its number as text: ``groups`` of a ledger's row.

    Args:
        groups: The group of each of the R candidates of a pool.
        kept: Positions of those that were kept.

    Example:
        >>> counts([0, 7, 7, 0], kept=[1, 2])
        {'0': [2, 0], '7': [2, 2]}
    """
    found = {str(group): [0, 0] for group in sorted(set(groups))}
    for group in groups:
        found[str(group)][0] += 1
    for position in kept:
        found[str(groups[position])][1] += 1
    return found


def coverage(rows: Iterable[Mapping[str, Any]], window: int = 100) -> dict[int, dict[int, float]]:
    """Share of every group among the kept samples over its share among the candidates, in windows of steps.

    1 is what uniform batches give, 0 is a group that is never trained on.

    Args:
        rows: Rows of a ledger (`earlysift.ledger.read_rows`); those without ``groups`` are left out.
        window: Optimizer steps that are counted together.

    Returns:
        First step of each window to coverage by group; of the groups that were offered in it.

    Raises:
        ValueError: If the window has no step.

    Example:
        >>> rows = [{"step": step, "groups": {"0": [12, 1], "1": [4, 3]}} for step in range(200)]
        >>> coverage(rows)
        {0: {0: 0.3333333333333333, 1: 3.0}, 100: {0: 0.3333333333333333, 1: 3.0}}
    """
    if window < 1:
        raise ValueError(f"Expected a window of at least 1 step, got {window}.")
    totals: dict[int, dict[int, list[int]]] = {}
    for row in rows:
        if "groups" not in row:
            continue
        of_window = totals.setdefault(row["step"] // window * window, {})
        for name, (offered, kept) in row["groups"].items():
            total = of_window.setdefault(int(name), [0, 0])
            total[0] += offered
            total[1] += kept
    return {start: _shares(totals[start]) for start in sorted(totals)}


def _shares(totals: Mapping[int, Sequence[int]]) -> dict[int, float]:
    all_offered, all_kept = (sum(numbers) for numbers in zip(*totals.values(), strict=True))
    return {group: (kept / all_kept) / (offered / all_offered) for group, (offered, kept) in sorted(totals.items())}
