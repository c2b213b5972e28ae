r"""Early exit in deep linear networks: how often a shallow exit keeps the sample with the largest loss.

A network of L square layers maps x to ``H W_L ... W_1 x``; the loss is half the squared distance to a teacher's output
``T x``, the inputs are Gaussian. An exit at depth k applies the model's own head to layer k: ``H W_k ... W_1 x``. So
the error of every exit is one matrix times x, and the correlation of its loss with the exact one has a closed form.
Letters of shapes: o outputs, d width, R candidates, b kept.
"""

import math
from collections import defaultdict

import torch
from torch import Generator, Tensor

from earlysift.report.series import Style
from earlysift.seeds import seeded
from earlysift.theory import bounds, checks
from earlysift.theory.findings import Finding, Lines, Options, Row, Show, Table
from earlysift.theory.problems import normal


def exit_errors(generator: Generator, *, depth: int, width: int, spread: float, outputs: int = 1) -> Tensor:
    r"""Error maps ``H W_k ... W_1 - T`` of a random network at every exit k = 0 ... L: ``(L + 1, o, d)``.

    Every layer is ``Q diag(exp(spread z)) Q^T``, Q a random rotation and z standard normal: at spread 0 it is the
    identity, and the larger the spread of its singular values, the more it changes its input.
    """
    if depth < 1 or width < 1 or outputs < 1 or not 0 <= spread < math.inf:
        raise ValueError(
            f"Expected depth, width and outputs >= 1 and spread >= 0, got {depth}, {width}, {outputs} and {spread}."
        )
    head, teacher = normal(generator, outputs, width), normal(generator, outputs, width)
    product = torch.eye(width, dtype=torch.float64)
    maps = [head - teacher]
    for _ in range(depth):
        rotation = torch.linalg.qr(normal(generator, width, width)).Q
        product = (rotation * torch.exp(spread * normal(generator, width))) @ rotation.T @ product
        maps.append(head @ product - teacher)
    return torch.stack(maps)


def direction_correlation(errors: Tensor, exact: Tensor) -> float:
    """Correlation s of two single outputs' errors before they are squared: the cosine of their maps ``(1, d)``."""
    cosine = (errors * exact).sum() / (errors.norm() * exact.norm())
    return float(cosine.clamp(-1, 1))


def loss_correlation(errors: Tensor, exact: Tensor) -> float:
    r"""Correlation r of the losses ``|A x|^2`` and ``|B x|^2`` for Gaussian x and maps A, B ``(o, d)``.

    ``r = |A B^T|^2 / (|A A^T| |B B^T|)`` in Frobenius norms.
    """
    shared = (errors @ exact.T).square().sum()
    return float((shared / ((errors @ errors.T).norm() * (exact @ exact.T).norm())).clamp(-1, 1))


def measure_agreement(
    errors: Tensor, exact: Tensor, pool: int, kept: int, pools: int, generator: Generator
) -> checks.Agreement:
    """Agreement of an exit with the whole network, both given by their error maps ``(o, d)``, over random pools."""
    inputs = normal(generator, pools, pool, exact.size(1))
    scores, losses = ((inputs @ map_.T).square().sum(dim=-1) for map_ in (errors, exact))
    return checks.agreement_of(scores, losses, kept)


def linear(options: Options, show: Show) -> Finding:
    """Deep linear networks: how often an exit keeps the true argmax and the kept set."""
    depth, width, networks, pools = 8, 32, options.count(6), options.count(2000)
    sizes = (2, 8, 32)
    settings = [(m, spread, outputs) for m in range(3) for spread in (0.05, 0.2, 0.5) for outputs in (1, 16)]
    lines: Lines = defaultdict(dict)
    rows: list[Row] = []
    ratios, hits = [], []
    for done, (m, spread, outputs) in enumerate(settings, start=1):
        pool, one = sizes[m], outputs == 1
        values = []
        for n in range(networks):
            generator = seeded(options.seed, "linear", str(spread), outputs, n)
            *maps, exact = exit_errors(generator, depth=depth, width=width, spread=spread, outputs=outputs)
            for at in maps[1:]:
                found = measure_agreement(at, exact, pool, pool // 2, pools, generator)
                r = (direction_correlation if one else loss_correlation)(at, exact)
                predicted = bounds.agreement(r, pool, squares=one)
                values += [found.argmax, predicted, found.overlap, bounds.kept_overlap(r, 0.5)]
                hits += [checks.equal(found.argmax, predicted, found.argmax_error, slack=2e-4).holds] if one else []
        by_exit = torch.tensor(values, dtype=torch.float64).view(networks, depth - 1, 4)
        columns = [column.contiguous() for column in by_exit.unbind(dim=-1)]
        argmax, prediction, overlap, predicted_overlap = (column.mean(dim=0) for column in columns)
        margin = 1.96 * (columns[0].std(dim=0) / math.sqrt(networks))
        name, depths = f"spread {spread:g}, {outputs} output{'' if one else 's'}", range(1, depth)
        lines[name][m] = (depths, [(argmax - margin).tolist(), (argmax + margin).tolist()])
        lines[f"{name}: {'T6 of squares' if one else 'T6'}"][m] = (depths, [prediction.tolist()])
        for k in (1, 4, 7):
            mean_argmax, ours = argmax[k - 1].item(), prediction[k - 1].item()
            row = (mean_argmax, margin[k - 1].item(), ours, mean_argmax / ours, overlap[k - 1].item())
            rows.append((pool, spread, outputs, k, *row, None if one else predicted_overlap[k - 1].item()))
            ratios += [] if one else [abs(mean_argmax / ours - 1)]
        show(done / len(settings))
    colors = ("#2f7fd6", "#d9581f", "#159a6c", "#9166d6", "#a9713a", "#1493a3")
    return Finding(
        "linear",
        "Linear networks: does an early exit keep the hardest sample?",
        f"With one output the closed form is exact: {hits.count(False)} of {len(hits)} exits (network by network) "
        "outside five standard errors. With 16 outputs losses are near Gaussian, and T6 with the loss correlation is "
        f"off by {max(ratios):.0%} at most.",
        [
            Table(
                f"P(argmax kept) and overlap of the kept half, {depth} layers of width {width}, mean over {networks} "
                "networks",
                (
                    *("R", "spread", "outputs", "exit", "argmax kept", "± 95 %", "predicted"),
                    *("ratio", "overlap", "predicted for R → ∞"),
                ),
                rows,
            )
        ],
        levels={f"P(exit keeps the argmax), R = {pool}": {"random": 1 / pool} for pool in sizes},
        axis_label=f"exit (layers that run, of {depth})",
        lines=lines,
        styles=[Style(color, dashes, strong=True) for color in colors for dashes in ("", "7 3")],
        note="Bands: 95 % intervals of the mean over random networks. Dashed: in closed form from the networks' "
        "matrices.",
        shown="0.2",
    )
