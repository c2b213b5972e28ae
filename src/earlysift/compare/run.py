"""`earlysift compare`: data, calibration, arms x seeds, results. Start reading here."""

from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from earlysift import environment, folders
from earlysift.compare import folder
from earlysift.compare.arms import ARMS
from earlysift.compare.calibrate import Timing, measure_operations, operations_of, summary, work_ledger
from earlysift.compare.prices import Prices, Table, step_times_ms
from earlysift.compare.settings import Settings
from earlysift.compare.steps import Bench
from earlysift.compare.trial import Run, rehearse, run_trial
from earlysift.compare.verdict import judged
from earlysift.files import write_json
from earlysift.ledger import read_rows
from earlysift.pretrain.models import save_encoder
from earlysift.pretrain.workloads import Workload, load_workload
from earlysift.report.page import RESULTS, RESULTS_VERSION, write_report

OnProgress = Callable[[str, float], None]
"""Called with the name of a piece of work and the share of it that is done."""

OnEvaluation = Callable[[str, Run], None]
"""Called with the name of an arm and its record so far, whose curve ends with the evaluation just made."""


@environment.same_threads_after()
def compare(
    settings: Settings,
    on_progress: OnProgress = lambda name, share: None,
    on_evaluation: OnEvaluation = lambda name, run: None,
) -> dict[str, Any]:
    """Run every arm on every seed at an equal budget of reference time, and write the run folder.

    The arms of a seed take turns between evaluations, so that a noisy machine disturbs them alike and an interruption
    leaves curves that can be compared. After every turn results.json is written, whole or not at all.

    Args:
        settings: The comparison.
        on_progress: Called as work proceeds.
        on_evaluation: Called after every evaluation of an arm.

    Returns:
        The content of results.json; ``complete`` is false if Ctrl-C ended the run early.

    Raises:
        ValueError: If settings, data or the run to resume do not fit.
        FileExistsError: If the run folder holds another run.
    """
    device = environment.usable_device(settings.device)
    inspect = partial(folder.inspect, settings.out, settings.identity(), resume=settings.resume, force=settings.force)
    folders.require_unlocked(settings.out)
    previous = inspect()
    earlier = _earlier_times(previous, settings)
    if previous is not None and device.type == "cpu":
        torch.set_num_threads(previous["machine"].get("threads") or torch.get_num_threads())
    on_progress("read data", 0.0)
    workload = load_workload(settings)
    on_progress("read data", 1.0)
    rehearse(settings, workload, choose_threads=previous is None and device.type == "cpu")
    with folders.locked(settings.out):  # only now: what is refused leaves everything as it was
        previous = inspect()
        if previous is None:
            folder.clear(settings.out)
        folders.mark(settings.out, folder.PROGRAM)
        results = previous or _new_results(settings, workload)
        return _run(results, settings, workload, earlier, on_progress, on_evaluation)


def _run(
    results: dict[str, Any],
    settings: Settings,
    workload: Workload,
    earlier: list[Table],
    on_progress: OnProgress,
    on_evaluation: OnEvaluation,
) -> dict[str, Any]:
    """Whatever is missing in these results."""
    results["complete"] = False
    results["config"]["seeds"] = max(settings.seeds, results["config"]["seeds"])
    results["config"]["arms"] = [*dict.fromkeys((*results["config"]["arms"], *settings.arms))]
    for name in settings.arms:
        results["arms"].setdefault(name, _new_arm(name))
    _save(settings.out, results, settings)
    write_json(settings.out / folder.CONFIG, results["config"])
    try:
        _calibrate(results, settings, workload, partial(on_progress, "calibrate"))
        prices = _prices(results, settings, earlier)
        _save(settings.out, results, settings)
        for seed in range(settings.seeds):
            _run_seed(results, settings, workload, seed, prices, on_progress, on_evaluation)
        results["complete"] = True
    except KeyboardInterrupt:
        results["complete"] = False
    results["measured_ms"] = _measured_ms(results, settings)
    _save(settings.out, results, settings)
    write_report(settings.out)
    return results


def _new_results(settings: Settings, workload: Workload) -> dict[str, Any]:
    return {
        "version": RESULTS_VERSION,
        "complete": False,
        "created": datetime.now().isoformat(timespec="seconds"),
        "config": settings.identity(),
        "machine": environment.machine(torch.device(settings.device)),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "data": {"name": workload.name, "task": workload.task, **workload.facts},
        "baseline": workload.baseline,
        "calibrated_ms": {},
        "operations_ms": {},
        "charged_ms": [],
        "measured_ms": {},
        "arms": {},
    }


def _new_arm(name: str) -> dict[str, Any]:
    arm = ARMS[name]
    about = {"label": arm.label, "description": arm.description, "source": arm.source, "charged": arm.charged}
    return {**about, "runs": []}


def _calibrate(
    results: dict[str, Any], settings: Settings, workload: Workload, on_share: Callable[[float], None]
) -> None:
    """Measure the operations that are not known yet.

    Those that an added arm needs are measured beside a training step again, and scaled by what has become of it: the
    machine may be busier, or another one, than when the others were measured.
    """
    # In runs of before prices followed the steps, all was charged as it was calibrated.
    known: dict[str, Timing] = results.setdefault("calibrated_ms", dict(results["operations_ms"]))
    missing = [name for name in operations_of(settings.arms, settings) if name not in known]
    if not missing:
        return
    fresh = measure_operations([*dict.fromkeys((*missing, "train"))], settings, workload, on_share)
    scale = known["train"]["median"] / fresh["train"]["median"] if known else 1.0
    for name in missing:
        known[name] = {key: value if key == "count" else round(value * scale, 4) for key, value in fresh[name].items()}


def _earlier_times(previous: dict[str, Any] | None, settings: Settings) -> list[Table]:
    """What the operations took in the steps of the runs that are finished."""
    if previous is None or "charged_ms" not in previous:
        return []  # none, or by another clock
    times_ms = []
    for name, arm in previous["arms"].items():
        for path in (_ledger_path(settings, name, run["seed"]) for run in arm["runs"] if run["finished"]):
            try:
                times_ms += [step_times_ms(row, ARMS[name], settings) for row in _rows(path)]
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"The ledger {path} of a finished run is damaged ({type(error).__name__}: {error}). Restore it, "
                    "start anew by --force, or choose another --out."
                ) from error
    return times_ms


def _rows(path: Path) -> list[dict[str, Any]]:
    return read_rows(path) if path.is_file() else []


def _prices(results: dict[str, Any], settings: Settings, earlier: list[Table]) -> Prices:
    """What operations cost: by calibration, by the tables so far, and by steps that were taken earlier."""
    calibrated: dict[str, Timing] = results["calibrated_ms"]
    if "charged_ms" not in results:  # of a run before prices followed the steps: its seeds stay as they were charged
        table = {name: timing["median"] for name, timing in calibrated.items()}
        seeds = {run["seed"] for arm in results["arms"].values() for run in arm["runs"] if run["finished"]}
        tables = [[dict(table) for _ in range(settings.evaluations)] for _ in range(max(seeds, default=-1) + 1)]
        results["charged_ms"] = tables
    prices = Prices(calibrated, results["charged_ms"])
    for times_ms in earlier:
        prices.note(times_ms)
    results["operations_ms"] = prices.timings()
    return prices


def _ledger_path(settings: Settings, arm: str, seed: int) -> Path:
    return settings.out / folder.LEDGERS / f"{arm}-seed{seed}.jsonl"


def _run_seed(
    results: dict[str, Any],
    settings: Settings,
    workload: Workload,
    seed: int,
    prices: Prices,
    on_progress: OnProgress,
    on_evaluation: OnEvaluation,
) -> None:
    (settings.out / folder.LEDGERS).mkdir(exist_ok=True)
    commit = environment.commit()
    benches: dict[str, Bench] = {}
    turns: dict[str, Iterator[Run]] = {}
    for name in settings.arms:
        runs: list[Run] = results["arms"][name]["runs"]
        show = partial(_show_seed, on_progress, ARMS[name].label, seed, settings.seeds)
        if any(run["seed"] == seed and run["finished"] for run in runs):
            show(1.0)
            continue  # finished before a resume
        path = _ledger_path(settings, name, seed)
        path.unlink(missing_ok=True)
        benches[name] = Bench(workload, settings, seed, prices.at(seed, 0), work_ledger(settings, path))
        turns[name] = run_trial(benches[name], ARMS[name], prices, show)
    while turns:
        for name in list(turns):
            run = next(turns[name], None)
            if run is None:
                del turns[name]
                continue
            on_evaluation(name, run)
            if run["finished"] and settings.save_encoder and (name, seed) == ("uniform", 0):
                save_encoder(benches[name].model, workload.tokenizer_json, settings.out / folder.ENCODER)
            run["commit"] = commit  # arms may be added by a later one
            others = [other for other in results["arms"][name]["runs"] if other["seed"] != seed]
            results["arms"][name]["runs"] = sorted([*others, run], key=lambda run: run["seed"])
        results["operations_ms"] = prices.timings()
        _save(settings.out, results, settings)


def _show_seed(on_progress: OnProgress, name: str, seed: int, seeds: int, share: float) -> None:
    on_progress(name, (seed + share) / seeds)


def _save(out: Path, results: dict[str, Any], settings: Settings) -> None:
    results.update(judged(results))
    write_json(out / RESULTS, results)


def _measured_ms(results: dict[str, Any], settings: Settings) -> dict[str, Timing]:
    """Times of the operations in every arm's own steps, beside the prices that all arms pay."""
    times_ms: dict[str, list[float]] = {}
    for name, arm in sorted(results["arms"].items()):
        for run in arm["runs"]:
            for row in _rows(_ledger_path(settings, name, run["seed"])):
                for key, value in row.items():
                    if key.endswith("_ms") and isinstance(value, float):
                        times_ms.setdefault(f"{name}: {key[:-3]}", []).append(value)
    return {name: summary(values) for name, values in times_ms.items() if len(values) > 1}
