"""`earlysift compare`: data, calibration, arms x seeds, results. Start reading here."""

from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from earlysift import environment, folders, versions
from earlysift.compare import folder
from earlysift.compare.arm import TRAIN
from earlysift.compare.arms import ARMS
from earlysift.compare.bench import Bench
from earlysift.compare.calibrate import Timing, measure_operations, operations_of, summary, work_ledger
from earlysift.compare.prices import Prices, Table, step_times_ms
from earlysift.compare.settings import Settings
from earlysift.compare.trial import Run, rehearse, run_trial
from earlysift.compare.verdict import judged
from earlysift.files import write_json
from earlysift.ledger import read_rows
from earlysift.pretrain import models
from earlysift.pretrain.workloads import Workload, load_workload
from earlysift.report.page import RESULTS, RESULTS_VERSION, write_report

OnProgress = Callable[[str, float], None]
"""Called with the name of a piece of work and the share of it that is done."""

OnEvaluation = Callable[[str, Run], None]
"""Called with the name of an arm and its record so far, whose curve ends with the evaluation just made."""


@environment.same_threads_after()
def compare(
    settings: Settings,
    on_progress: OnProgress = lambda *_: None,
    on_evaluation: OnEvaluation = lambda *_: None,
) -> dict[str, Any]:
    """Run every arm on every seed at an equal budget of reference time, and write the run folder.

    The arms of a seed take turns between evaluations, so that a noisy machine disturbs them alike and an interruption
    leaves curves that can be compared. After every turn results.json is written, whole or not at all.

    Args:
        settings: The comparison.
        on_progress: Called as work proceeds.
        on_evaluation: Called after every evaluation of an arm.

    Returns:
        The content of results.json; ``complete`` is false while a seed of an arm is missing, because Ctrl-C ended the
        run early or fewer were asked for than before.

    Raises:
        ValueError: If settings, data or the run to resume do not fit.
        FileExistsError: If the run folder holds another run.
    """
    on_cpu = environment.usable_device(settings.device).type == "cpu"
    inspect = partial(folder.inspect, settings.out, settings.identity(), resume=settings.resume, force=settings.force)
    folders.require_unlocked(settings.out)
    previous = inspect()
    earlier = _earlier_times(previous, settings)
    if previous is not None and on_cpu:
        torch.set_num_threads(previous["machine"].get("threads") or torch.get_num_threads())
    on_progress("read data", 0.0)
    workload = load_workload(settings)
    on_progress("read data", 1.0)
    rehearse(settings, workload, choose_threads=previous is None and on_cpu)
    with folders.locked(settings.out):  # only now: a refused run leaves everything as it was
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
    """Run what is missing in these results."""
    results["complete"] = False
    results["config"]["seeds"] = max(settings.seeds, results["config"]["seeds"])
    results["config"]["arms"] = [*dict.fromkeys((*results["config"]["arms"], *settings.arms))]
    for name in settings.arms:
        results["arms"].setdefault(name, _new_arm(name))
    _save(settings.out, results)
    write_json(settings.out / folder.CONFIG, results["config"])
    with suppress(KeyboardInterrupt):  # the results so far are a partial run
        _calibrate(results, settings, workload, partial(on_progress, "calibrate"))
        prices = _prices(results, settings, earlier)
        _save(settings.out, results)
        for seed in range(settings.seeds):
            _run_seed(results, settings, workload, seed, prices, on_progress, on_evaluation)
    results["complete"] = has_finished(results, results["config"]["arms"], results["config"]["seeds"])
    results["measured_ms"] = _measured_ms(results, settings)
    _save(settings.out, results)
    write_report(settings.out)
    return results


def has_finished(results: dict[str, Any], arms: Collection[str], seeds: int) -> bool:
    """Whether these arms have a finished run on each of the first seeds.

    Example:
        >>> runs = [{"seed": 0, "finished": True}, {"seed": 1, "finished": False}]
        >>> results = {"arms": {"uniform": {"runs": runs}}}
        >>> has_finished(results, ["uniform"], 1), has_finished(results, ["uniform"], 2)
        (True, False)
    """
    none: dict[str, Any] = {"runs": []}
    runs = {(name, run["seed"]) for name in arms for run in results["arms"].get(name, none)["runs"] if run["finished"]}
    return runs >= {(name, seed) for name in arms for seed in range(seeds)}


def _new_results(settings: Settings, workload: Workload) -> dict[str, Any]:
    return {
        "version": RESULTS_VERSION,
        "complete": False,
        "created": datetime.now().isoformat(timespec="seconds"),
        "config": settings.identity(),
        "machine": environment.machine(torch.device(settings.device)),
        "versions": versions.installed(),
        "commit": versions.commit(),
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

    Those of an added arm are measured together with a training step, and scaled by the change in its time: the machine
    may be busier than when the others were measured, or another one.
    """
    # Runs from before prices followed the steps were charged as calibrated.
    known: dict[str, Timing] = results.setdefault("calibrated_ms", dict(results["operations_ms"]))
    operations = operations_of(settings.arms, settings)
    missing = operations.keys() - known.keys()
    if not missing:
        return
    chosen = [operation for name, operation in operations.items() if name in missing | {TRAIN.name}]
    fresh = measure_operations(chosen, settings, workload, on_share)
    scale = known[TRAIN.name]["median"] / fresh[TRAIN.name]["median"] if known else 1.0
    for name, timing in fresh.items():
        if name in missing:
            known[name] = {key: value if key == "count" else round(value * scale, 4) for key, value in timing.items()}


def _earlier_times(previous: dict[str, Any] | None, settings: Settings) -> list[Table]:
    """What operations took in the steps of finished runs."""
    if previous is None or "charged_ms" not in previous:
        return []  # old runs were measured by another clock
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
    """What operations cost: by calibration, the tables so far, and earlier steps."""
    calibrated: dict[str, Timing] = results["calibrated_ms"]
    if "charged_ms" not in results:  # from before prices followed the steps: finished seeds stay as they were charged
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
    encoder = settings.out / folder.ENCODER
    commit = versions.commit()  # of every run: arms may be added by a later one
    benches: dict[str, Bench] = {}
    turns: dict[str, Iterator[Run]] = {}
    for name in settings.arms:

        def show(share: float, label: str = ARMS[name].label) -> None:
            on_progress(label, (seed + share) / settings.seeds)

        unsaved = _saves_encoder(settings, name, seed) and not (encoder / models.WEIGHTS).is_file()
        if not unsaved and any(run["seed"] == seed and run["finished"] for run in results["arms"][name]["runs"]):
            show(1.0)  # before a resume
            continue
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
            if run["finished"] and _saves_encoder(settings, name, seed):
                models.save_encoder(benches[name].model, workload.tokenizer_json, encoder)
            run["commit"] = commit
            others = [other for other in results["arms"][name]["runs"] if other["seed"] != seed]
            results["arms"][name]["runs"] = sorted([*others, run], key=lambda run: run["seed"])
        results["operations_ms"] = prices.timings()
        _save(settings.out, results)


def _saves_encoder(settings: Settings, arm: str, seed: int) -> bool:
    return settings.save_encoder and (arm, seed) == ("uniform", 0)


def _save(out: Path, results: dict[str, Any]) -> None:
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
