"""One arm on one seed: trains until the budget is spent, and hands out its record at every evaluation."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from earlysift import environment, passes, scorers
from earlysift.compare.arm import Arm, uniform_ms
from earlysift.compare.arms import ARMS
from earlysift.compare.bench import Bench
from earlysift.compare.calibrate import operations_of
from earlysift.compare.predictions import per_sample
from earlysift.compare.prices import Prices, Table, charges_ms, step_times_ms
from earlysift.compare.settings import Settings
from earlysift.fidelity import fidelity
from earlysift.ledger import plain
from earlysift.losses import IGNORED_LABEL
from earlysift.pretrain.stream import Stream
from earlysift.pretrain.workload_settings import MASKED
from earlysift.pretrain.workloads import Workload

Point = dict[str, float]
Run = dict[str, Any]
_KINDS = ("read", "score", "probe", "lesson", "train", "reference model")
_MIDWAY = 0.5  # of the budget, where arms select that do not at its ends
_ROUNDING = 1e-9  # of the budget: what shares of equal steps may miss of 1


def rehearse(settings: Settings, workload: Workload, *, choose_threads: bool) -> None:
    """Take one step of every arm and an evaluation, on a model of their own, to refuse early what cannot run.

    Args:
        settings: The comparison.
        workload: Samples and model.
        choose_threads: Whether to choose the number of threads by this model's steps.

    Raises:
        ValueError: If a step cannot be taken by these settings, or on this device.
    """
    if settings.pool > len(workload.samples):
        raise ValueError(
            f"Expected a pool's worth of samples to train on, {settings.pool:,} (batch / keep) or more, got "
            f"{len(workload.samples):,}. Give more data, a larger keep, or a smaller batch."
        )
    brief = replace(settings, budget=1e-6, steps=None)  # for which a reference model takes no step
    try:
        bench = Bench(workload, brief, 0, dict.fromkeys(operations_of(settings.arms, settings), 1.0))
        bench.set_rate(1.0)  # a learning rate of zero costs the same and cannot diverge
        batch = bench.read(settings.batch)
        bench.update(bench.loss(batch))
        if choose_threads:
            environment.choose_threads(lambda: bench.update(bench.loss(batch)))
        for arm in (ARMS[name] for name in settings.arms):
            bench.stream = Stream(workload.samples, seed=0)
            arm.steps(bench)(max(_MIDWAY, settings.select_after))
        validation = workload.samples.validation.items()
        evaluate(bench, {name: rows[: settings.batch].to(bench.device) for name, rows in validation})
    except (RuntimeError, ArithmeticError) as error:
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(
            f"A training step by these settings failed on {settings.device}: {first.removesuffix('.')}. Check the size "
            "of model and batch."
        ) from error


def run_trial(
    bench: Bench, arm: Arm, prices: Prices, on_share: Callable[[float], None] = lambda _: None
) -> Iterator[Run]:
    """Train one arm on one seed until its budget is spent.

    Every step is charged for what its row of the ledger says that it did, by the prices that hold between its
    evaluations. The learning rate follows the share of the budget that is spent, so it has decayed whatever the steps
    cost. The step that crosses the budget is the last; so is one after which the loss is no longer finite.

    Args:
        bench: Model, data and ledger.
        arm: The arm.
        prices: What operations cost; takes in what the steps took.
        on_share: Called with the share of the budget that is spent, for progress.

    Yields:
        The record of the run at every evaluation: one ``runs`` entry of results.json, complete at the last.
    """
    settings, ledger = bench.settings, bench.ledger
    validation = {name: rows.to(bench.device) for name, rows in bench.workload.samples.validation.items()}
    spent_ms = dict.fromkeys(_KINDS, 0.0)
    counts = {"trained": 0, "scored": 0}
    run: Run = {"seed": bench.seed, "finished": False, "steps": 0, "wall_s": 0.0, "spent_s": {}}
    run |= {name: [] for name in ("curve", "fidelity", "control", "events")}
    spent = advanced = 0.0  # of the budget

    def evaluated() -> Run:
        quality, ranking = evaluate(bench, validation)
        at = {"step": run["steps"], "reference_s": sum(spent_ms.values()) / 1e3}
        samples = {f"{name}_samples": count for name, count in counts.items()}
        run["curve"].append(plain({**at, "share": min(spent, 1.0), "wall_s": run["wall_s"], **samples, **quality}))
        run["fidelity"].append(plain({**at, **ranking}))
        run["spent_s"] = plain({kind: ms / 1e3 for kind, ms in spent_ms.items()})
        run.update(plain({f"final_{name}": value for name, value in quality.items()}))
        return run

    def charge(charges: Mapping[str, float], table: Table) -> None:
        nonlocal spent, advanced
        whole_ms = budget_ms(settings, table)
        for kind, ms in charges.items():
            spent_ms[kind] += ms
            spent += ms / whole_ms
            # Probes and lessons advance neither schedule nor evaluations: until auto switches on, its steps are those
            # of uniform training, bit for bit, and so are the steps after which it is evaluated. Their share of the
            # budget (1 to 2 %) is missing at its end.
            advanced += 0.0 if kind in ("probe", "lesson") else ms / whole_ms

    @contextmanager
    def wall_time() -> Iterator[None]:
        started = time.perf_counter()
        yield
        run["wall_s"] += time.perf_counter() - started

    on_share(0.0)
    yield evaluated()
    evaluations = 1
    with wall_time():
        step = arm.steps(bench)
    charge(bench.upfront_ms, prices.at(bench.seed, 0))
    upfront = advanced
    while not run["finished"]:
        share = (advanced - upfront) / (1 - upfront)
        bench.set_rate(share)
        try:
            with wall_time():
                ledger.begin(run["steps"])
                ledger.note(share=share, prices=evaluations - 1)
                step(share)
                row = ledger.end()
        except ValueError:
            if evaluated()["final_loss"] is not None:
                raise
            run["finished"] = True  # the model has diverged, and scores that are nan were refused
            on_share(1.0)
            yield run
            return
        run["steps"] += 1
        table = prices.at(bench.seed, evaluations - 1)
        charge(charges_ms(row, arm, settings, table), table)
        prices.note(step_times_ms(row, arm, settings))
        for name in counts:
            counts[name] += row.get(name, 0)
        for name, record in (("control", "control"), ("event", "events")):
            if row.get(name):
                run[record].append(
                    plain({"step": row["step"], "reference_s": sum(spent_ms.values()) / 1e3, **row[name]})
                )
        diverged = not math.isfinite(row["loss"])
        over = spent >= 1 - _ROUNDING
        ends = over or diverged
        on_share(1.0 if ends else spent)
        due = settings.evaluations if over else math.floor((advanced + _ROUNDING) * (settings.evaluations - 1)) + 1
        if due > evaluations or ends:
            evaluations = due
            evaluated()
            run["finished"] = ends  # only now: a stop may come during the evaluation
            yield run


def budget_ms(settings: Settings, table: Table) -> float:
    """What every arm may spend, in reference time by these prices."""
    return settings.budget * 1e3 if settings.steps is None else settings.steps * uniform_ms(table)


def evaluate(bench: Bench, validation: dict[str, Tensor]) -> tuple[Point, Point]:
    """Accuracy and loss on the validation set, and fidelity of the exit on the same samples.

    Returns:
        ``accuracy`` and ``loss``, means over all labelled predictions, in masked language modelling
        ``hidden_accuracy`` and ``hidden_loss`` over those whose token the model does not see (BERT leaves a tenth in
        place); and what `earlysift.fidelity.fidelity` returns.
    """
    settings = bench.settings
    parts = []
    with torch.no_grad(), passes.scoring_mode(bench.model):
        for start in range(0, len(validation["labels"]), settings.batch):
            predicted = bench.predict({name: rows[start : start + settings.batch] for name, rows in validation.items()})
            correct = predicted.logits.argmax(dim=-1) == predicted.targets
            losses = F.cross_entropy(predicted.logits, predicted.targets, reduction="none")
            parts.append((correct, losses, predicted.counts))
    correct, losses, counts = map(torch.cat, zip(*parts, strict=True))
    sums = per_sample(losses, counts)
    scores = scorers.early_exit_loss(bench.model, validation, depth=settings.depth, chunk_rows=settings.batch)
    ranking = fidelity(scores, sums / counts, max(1, round(settings.keep * len(scores))))
    quality = {"accuracy": correct.double().mean().item(), "loss": (sums.sum() / counts.sum()).item()}
    if bench.workload.task in MASKED:
        labelled = validation["labels"] != IGNORED_LABEL
        hidden = (validation["input_ids"] != validation["labels"])[labelled]
        quality["hidden_accuracy"] = correct[hidden].double().mean().item()
        quality["hidden_loss"] = losses[hidden].mean().item()
    return quality, ranking
