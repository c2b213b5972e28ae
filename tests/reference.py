"""Slow twins: the fast functions as plain loops, with the same signatures, in the notation of the theory.

f_i is the exact loss of candidate i, g_i its approximate loss (the score), R the number of candidates, b the number
kept, rho the selection gain: mean f over the kept, over mean f of the pool.
"""

import math

import torch
from torch import Generator, Tensor

from earlysift.losses import Head, Problem, Reduction
from earlysift.measures import Measure
from earlysift.selectors import Selection


def token_scores(
    measure: Measure,
    hidden: Tensor,
    labels: Tensor,
    head: Head,
    *,
    causal: bool = False,
    reduction: Reduction = "mean",
    chunk_tokens: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Mean (or sum) over the labelled t of a measure of the logits at t."""
    return _over_positions(hidden, labels, head, OF_CLASSES[measure.name], causal, reduction, positions)


def positions_to_read(labels: Tensor, *, causal: bool = False, max_positions: int | None = None) -> Tensor:
    """T i + t for the labelled t of every i; with K the K largest of 648055 t mod 2^20, unlabelled t behind them."""
    rows, length = labels.shape
    positions = []
    for i in range(rows):
        targets = [*labels[i, 1:].tolist(), -100] if causal else labels[i].tolist()
        labelled = [t for t in range(length) if targets[t] != -100]
        if max_positions is not None:
            far_apart = sorted(range(length), key=lambda t: 648_055 * t % 2**20, reverse=True)
            labelled = sorted(far_apart, key=lambda t: targets[t] == -100)[:max_positions]
        positions += [length * i + t for t in labelled]
    return torch.tensor(positions, dtype=torch.long)


def class_scores(measure: Measure, logits: Tensor, labels: Tensor, *, problem: Problem | None = None) -> Tensor:
    """A measure of one prediction per sample; of several classes or numbers, their mean."""
    found = []
    for z, y in zip(logits.double().tolist(), labels.tolist(), strict=True):
        kind = problem or _kind(z, labels)
        ys = y if isinstance(y, list) else [y]
        if all(target == -100 for target in ys):
            found.append(-math.inf)
        elif kind == "single_label":
            found.append(OF_CLASSES[measure.name](z, y))
        elif kind == "multi_label":
            found.append(sum(OF_INDICATORS[measure.name](zc, yc) for zc, yc in zip(z, ys, strict=True)) / len(z))
        elif measure.name == "loss":
            found.append(sum((zc - yc) ** 2 for zc, yc in zip(z, ys, strict=True)) / len(z))
        else:
            raise ValueError("No distribution is predicted.")
    return torch.tensor(found)


def ranking(scores: Tensor) -> Tensor:
    """All i, by falling g_i; then the unlabelled; then the non-finite. Ties in the order of the pool."""
    g = scores.tolist()

    def place(i: int) -> tuple[int, float]:
        if math.isfinite(g[i]):
            return 0, -g[i]
        return (1, 0.0) if g[i] == -math.inf else (2, 0.0)

    return torch.tensor(sorted(range(len(g)), key=place), dtype=torch.int64)


def greedy(scores: Tensor, kept: int, generator: Generator | None = None) -> Selection:
    """The b candidates with the largest g_i, weights 1."""
    return Selection(torch.tensor(sorted(ranking(scores).tolist()[:kept])), torch.ones(kept))


def fidelity(scores: Tensor, exact: Tensor, kept: int) -> dict[str, float]:
    """Spearman's r of g and f, the common share of the two kept sets, and rho."""
    both = [
        (g, f) for g, f in zip(scores.tolist(), exact.tolist(), strict=True) if math.isfinite(g) and math.isfinite(f)
    ]
    g, f = [pair[0] for pair in both], [pair[1] for pair in both]
    b = min(kept, len(both))
    if b == 0:
        return {}
    kept_by_g = sorted(range(len(g)), key=lambda i: -g[i])[:b]
    kept_by_f = sorted(range(len(f)), key=lambda i: -f[i])[:b]
    return {
        "rank_correlation": _correlation(_midranks(g), _midranks(f)),
        "overlap": len(set(kept_by_g) & set(kept_by_f)) / b,
        "gain": (sum(f[i] for i in kept_by_g) / b) / (sum(f) / len(f)),
    }


def augment_images(images: Tensor, generator: Generator) -> Tensor:
    """Each image padded with its edge by m = max(1, side / 8) and cropped at a random place; with colour, mirrored."""
    count, channels, height, width = images.shape
    tall, wide = max(1, height // 8), max(1, width // 8)
    down = torch.randint(-tall, tall + 1, (count,), generator=generator).tolist()
    right = torch.randint(-wide, wide + 1, (count,), generator=generator).tolist()
    mirrored = torch.randint(2, (count,), generator=generator).tolist() if channels == 3 else [0] * count
    moved = []
    for i in range(count):
        padded = torch.nn.functional.pad(images[i : i + 1].double(), (wide, wide, tall, tall), mode="replicate")[0]
        top, left = tall - down[i], wide - right[i]
        crop = padded[:, top : top + height, left : left + width]
        moved.append(crop.flip(2) if mirrored[i] else crop)
    return torch.stack(moved).to(images.dtype)


def _over_positions(hidden, labels, head, measure, causal, reduction, positions) -> Tensor:
    f = []
    for i in range(hidden.size(0)):
        values = {}
        for t in range(hidden.size(1)):
            target = t + 1 if causal else t
            if target >= labels.size(1) or int(labels[i, target]) == -100:
                continue
            z = head(hidden[i, t].unsqueeze(0))[0].double().tolist()
            values[t] = measure(z, int(labels[i, target]))
        if not values:
            f.append(-math.inf)
            continue
        read = [t for t in values if positions is None or i * hidden.size(1) + t in positions.tolist()]
        mean = sum(values[t] for t in read) / len(read)
        f.append(mean if reduction == "mean" else mean * len(values))
    return torch.tensor(f)


def _log_partition(z: list[float]) -> float:
    largest = max(z)
    return largest + math.log(sum(math.exp(zv - largest) for zv in z))


def _surprise(z: list[float], y: int) -> float:
    return _log_partition(z) - z[y]


def _shannon(z: list[float]) -> float:
    log_p = [zv - _log_partition(z) for zv in z]
    return -sum(math.exp(lp) * lp for lp in log_p if lp > -math.inf)


def _closeness(z: list[float]) -> float:
    second, first = sorted(math.exp(zv - _log_partition(z)) for zv in z)[-2:]
    return 1 - (first - second)


def _binary(z: float, y: float) -> float:
    # p(1) = 1 / (1 + exp(-z))
    return y * _log_partition([0.0, -z]) + (1 - y) * _log_partition([0.0, z])


def _kind(z: list[float], labels: Tensor) -> Problem:
    if len(z) == 1:
        return "regression"
    return "single_label" if labels.ndim == 1 and not labels.is_floating_point() else "multi_label"


def _midranks(values: list[float]) -> list[float]:
    return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]


def _correlation(x: list[float], y: list[float]) -> float:
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    xy = sum((a - mean_x) * (c - mean_y) for a, c in zip(x, y, strict=True))
    norm = math.sqrt(sum((a - mean_x) ** 2 for a in x) * sum((c - mean_y) ** 2 for c in y))
    return xy / norm if norm > 0 else 0.0


OF_CLASSES = {"loss": _surprise, "entropy": lambda z, y: _shannon(z), "margin": lambda z, y: _closeness(z)}
OF_INDICATORS = {
    "loss": _binary,
    "entropy": lambda z, y: _shannon([z, 0.0]),
    "margin": lambda z, y: _closeness([z, 0.0]),
}
