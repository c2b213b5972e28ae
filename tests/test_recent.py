"""Recent losses: estimates of plain loops, unbiased where a share was drawn, and silent where little is known."""

import math

import pytest
import torch
from torch import Generator

from earlysift.recent import COLUMNS, LENGTH, MEMORY, Recent, weighted_mean
from earlysift.selectors import explored, greedy

NAN = float("nan")
KEEPS = (0.25, 0.5, 0.75)
ENOUGH = 512


def random_columns(count, seed, unknown=0.2):
    """Losses, and all that may be known of them besides; some of it is not."""
    generator = Generator().manual_seed(seed)
    columns = {"loss": torch.randn(count, generator=generator).exp()}
    for name in ("score", "remembered"):
        columns[name] = columns["loss"] * torch.randn(count, generator=generator).exp()
    columns["stands_for"] = 1 + 7 * torch.rand(count, generator=generator)
    for name in ("score", "remembered", "stands_for"):
        columns[name][torch.rand(count, generator=generator) < unknown] = NAN
    return columns


def recent_of(columns, rows=32):
    recent = Recent()
    for start in range(0, len(columns["loss"]), rows):
        part = {name: values[start : start + rows] for name, values in columns.items()}
        recent.add(part.pop("loss"), **part)
    return recent


# Slow twins


def mean_of(values, weights):
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def correlation_of(x, y, weights):
    mean_x, mean_y = mean_of(x, weights), mean_of(y, weights)
    rows = list(zip(x, y, weights, strict=True))
    xy = sum(w * (a - mean_x) * (b - mean_y) for a, b, w in rows)
    xx, yy = sum(w * (a - mean_x) ** 2 for a, _, w in rows), sum(w * (b - mean_y) ** 2 for _, b, w in rows)
    return xy / math.sqrt(xx * yy) if xx * yy > 0 else 0.0


def log1p(values):
    return [math.log1p(max(value, 0)) for value in values]


def twin_estimates(columns):
    rows = [row for row in zip(*(columns[name].tolist() for name in COLUMNS), strict=True) if not math.isnan(row[3])]
    pool_loss = mean_of([row[0] for row in rows], [row[3] for row in rows])
    scored = [row for row in rows if math.isfinite(row[1])]
    return {
        "pool_loss": pool_loss,
        "live_gain": sum(row[0] for row in rows) / len(rows) / pool_loss,
        "live_correlation": correlation_of(
            log1p(row[1] for row in scored), log1p(row[0] for row in scored), [row[3] for row in scored]
        ),
    }


def first_of(rows, key, share):
    """The rows that a remembered loss puts first, as far as they are no more than a share of all."""
    kept, total = [], 0.0
    for row in sorted(rows, key=key, reverse=True):
        total += row[2]
        if total > share:
            break
        kept.append(row)
    return kept


def twin_signals(columns):
    names = ("loss", "remembered", "stands_for")
    rows = [row for row in zip(*(columns[name].tolist() for name in names), strict=True) if row[2] > 0]
    whole = sum(row[2] for row in rows)
    rows = [(max(loss, 0.0), old, share / whole) for loss, old, share in rows]
    mean = mean_of([row[0] for row in rows], [row[2] for row in rows])
    variance = sum(row[2] * (row[0] - mean) ** 2 for row in rows)
    numbers = {
        "concentration": sum(row[2] * row[0] ** 2 for row in rows) / mean**2,
        "loss": mean,
        "loss_error": math.sqrt(variance * sum(row[2] ** 2 for row in rows)),
    }
    seen = [row for row in rows if math.isfinite(row[1])]
    shares = [row[2] for row in seen]
    if sum(shares) <= 0.5:
        return numbers
    numbers[f"correlation.{MEMORY}"] = correlation_of(
        log1p(row[1] for row in seen), log1p(row[0] for row in seen), shares
    )
    for keep in KEEPS:
        kept = first_of(rows, lambda row: row[1] if math.isfinite(row[1]) else math.inf, keep)
        numbers[f"gain.{MEMORY}.{keep:g}"] = mean_of([row[0] for row in kept], [row[2] for row in kept]) / mean
    largest = first_of(seen, lambda row: max(row[1], 0.0), sum(shares) / 4)
    weights = [row[2] for row in largest]
    numbers["retention"] = mean_of([row[0] for row in largest], weights) / mean_of([row[1] for row in largest], weights)
    return numbers


@pytest.mark.parametrize("seed", range(4))
def test_estimates_and_signals_are_those_of_loops(seed):
    columns = random_columns(1000, seed)
    recent = recent_of(columns)
    assert recent.estimates() == pytest.approx(twin_estimates(columns), rel=1e-5)
    assert recent.signals(KEEPS) == pytest.approx(twin_signals(columns), rel=1e-5)


def test_of_losses_that_are_mostly_not_remembered_nothing_is_concluded():
    columns = random_columns(1000, 0)
    columns["remembered"][torch.arange(1000) % 5 > 0] = NAN
    assert recent_of(columns).signals(KEEPS) == pytest.approx(twin_signals(columns), rel=1e-5)
    assert recent_of(columns).signals(KEEPS).keys() == {"concentration", "loss", "loss_error"}


def test_what_is_not_known_is_not_told():
    recent = Recent()
    assert (recent.estimates(), recent.signals(KEEPS), len(recent)) == ({}, {}, 0)
    recent.add(torch.ones(4), score=torch.ones(4))
    assert recent.estimates() == {}  # of how many they are examples is unknown
    recent.add(torch.tensor([1.0, 3.0]), stands_for=torch.tensor([1.0, 3.0]))
    assert recent.estimates() == {"pool_loss": 2.5, "live_gain": 0.8}
    zeros = Recent()
    zeros.add(torch.zeros(2 * ENOUGH), stands_for=torch.ones(2 * ENOUGH))
    assert (zeros.estimates(), zeros.signals(KEEPS)) == ({"pool_loss": 0.0}, {})


def test_of_too_few_samples_nothing_is_concluded():
    columns = random_columns(ENOUGH, 0, unknown=0)
    one_less = {name: values[1:] for name, values in columns.items()}
    assert recent_of(columns).signals(KEEPS)
    assert recent_of(one_less).signals(KEEPS) == {}
    columns["stands_for"][5] = NAN
    assert recent_of(columns).signals(KEEPS) == {}


def test_the_latest_are_kept_oldest_first_and_those_without_a_finite_loss_are_not():
    recent, added = Recent(), []
    for seed in range(LENGTH // 100 + 5):
        losses = torch.rand(100, generator=Generator().manual_seed(seed))
        losses[seed % 100] = [NAN, math.inf, -math.inf][seed % 3]
        recent.add(losses, score=2 * losses)
        added += [loss for loss in losses.tolist() if math.isfinite(loss)]
    assert len(recent) == LENGTH
    assert recent.column("loss").tolist() == added[-LENGTH:]
    assert torch.equal(recent.column("score"), 2 * recent.column("loss"))


# Estimates that exploration makes unbiased


def pool_losses(losses, scores, drawn, draws=400):
    """Estimates of a pool's mean loss from batches of which some candidates were drawn."""
    estimates = []
    chosen = greedy(scores, 8 - drawn).indices
    for seed in range(draws):
        selection, stands_for = explored(chosen, drawn, scores, Generator().manual_seed(seed))
        recent = Recent()
        recent.add(losses[selection.indices], stands_for=stands_for[selection.indices])
        estimates.append(recent.estimates()["pool_loss"])
    return torch.tensor(estimates, dtype=torch.float64)


@pytest.mark.parametrize("drawn", [1, 3])
def test_the_loss_of_whole_pools_is_estimated_without_bias_from_selected_batches(drawn):
    generator = Generator().manual_seed(0)
    losses = torch.randn(40, generator=generator).exp()
    scores = losses * torch.rand(40, generator=generator)
    estimates = pool_losses(losses, scores, drawn)
    error = (estimates.mean() - losses.mean()).abs()
    assert error <= 4 * estimates.std() / math.sqrt(len(estimates))
    batch = losses[greedy(scores, 8).indices].mean()
    assert batch - losses.mean() > 10 * estimates.std() / math.sqrt(len(estimates))  # what it would be without


def test_correlation_is_that_of_the_pool_and_not_of_what_selection_left():
    generator = Generator().manual_seed(0)
    recent, pool = Recent(), []
    for _ in range(60):
        losses = torch.randn(64, generator=generator).exp()
        scores = losses * torch.randn(64, generator=generator).exp()
        selection, stands_for = explored(greedy(scores, 24).indices, 8, scores, generator)
        kept = selection.indices
        recent.add(losses[kept], score=scores[kept], stands_for=stands_for[kept])
        pool.append(torch.stack([scores, losses]).log1p())
    whole = torch.corrcoef(torch.cat(pool, dim=1))[0, 1].item()
    selected = torch.corrcoef(torch.stack([recent.column("score"), recent.column("loss")]).log1p())[0, 1].item()
    assert recent.estimates()["live_correlation"] == pytest.approx(whole, abs=0.03)
    assert abs(selected - whole) > 0.05


# Retention


@pytest.mark.parametrize(("left", "low", "high"), [(0.1, 0.05, 0.15), (1.0, 0.9, 1.1)])
def test_little_is_left_of_losses_that_are_learnt_and_all_of_noise(left, low, high):
    generator = Generator().manual_seed(0)
    remembered = torch.randn(1000, generator=generator).exp()
    noise = torch.randn(1000, generator=generator).mul(0.1).exp()
    recent = Recent()
    recent.add(left * remembered * noise, remembered=remembered, stands_for=torch.ones(1000))
    assert low < recent.signals(KEEPS)["retention"] < high


# State


def test_a_loaded_one_goes_on_as_the_saved_one():
    saved, loaded = recent_of(random_columns(LENGTH, 0)), Recent()
    state = saved.state_dict()
    assert Recent().state_problems(state) == Recent().state_problems(Recent().state_dict()) == []
    loaded.load_state_dict(state)
    for each in (saved, loaded):
        columns = random_columns(32, 1)
        each.add(columns.pop("loss"), **columns)
    assert torch.equal(saved.column("loss"), loaded.column("loss"))
    assert saved.signals(KEEPS) == loaded.signals(KEEPS)
    assert not torch.equal(state["rows"][:, 0].double(), saved.column("loss"))


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"rows": None},
        {"rows": torch.zeros(3)},
        {"rows": torch.zeros(3, 3)},
        {"rows": torch.zeros(3, 4, dtype=torch.float64)},
        {"rows": torch.zeros(LENGTH + 1, 4)},
        {"rows": torch.zeros(3, 4), "more": 1},
    ],
)
def test_a_broken_state_is_refused(state):
    assert Recent().state_problems(state) == [f"recent must hold rows, float32 (at most {LENGTH}, 4)"]


def test_a_weighted_mean_is_that_of_a_loop():
    values, weights = torch.rand(2, 20, generator=Generator().manual_seed(0))
    assert weighted_mean(values, weights).item() == pytest.approx(mean_of(values.tolist(), weights.tolist()))
