"""`earlysift compare`: data, calibration, arms x seeds, results. Start reading here."""

from collections.abc import Callable, Iterator
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from earlysift import environment
from earlysift.compare import folder
from earlysift.compare.arms import ARMS
from earlysift.compare.calibrate import Timing, measure_operations, operations_of, summary
from earlysift.compare.settings import Settings
from earlysift.compare.steps import Bench
from earlysift.compare.trial import Run, run_trial
from earlysift.compare.verdict import judged
from earlysift.files import write_json
from earlysift.ledger import Ledger, read_rows
from earlysift.pretrain.models import save_encoder
from earlysift.pretrain.workloads import Workload, load_workload
from earlysift.report.page import RESULTS, RESULTS_VERSION, write_report

OnProgress = Callable[[str, float], None]
"""Called with the name of a piece of work and the share of it that is done."""

OnEvaluation = Callable[[str, Run], None]
"""Called with the name of an arm and its record so far, whose curve ends with the evaluation just made."""


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
    previous = folder.open_folder(settings.out, settings.identity(), resume=settings.resume, force=settings.force)
    if torch.device(settings.device).type != "cpu" and not torch.accelerator.is_available():
        raise ValueError(f"Expected an accelerator for device={settings.device!r}, found none. Use --device cpu.")
    on_progress("read data", 0.0)
    workload = read_workload(settings)
    on_progress("read data", 1.0)
    if previous is None:
        folder.clear(settings.out)  # only now: unreadable data must not cost the run that --force replaces
    results = previous or _new_results(settings, workload)
    results["complete"] = False
    results["config"]["seeds"] = max(settings.seeds, results["config"]["seeds"])
    results["config"]["arms"] = [*dict.fromkeys((*results["config"]["arms"], *settings.arms))]
    for name in settings.arms:
        results["arms"].setdefault(name, _new_arm(name))
    _save(settings.out, results, settings)  # first of all, as it marks the folder as a comparison's
    write_json(settings.out / folder.CONFIG, results["config"])
    try:
        _calibrate(results, settings, workload, partial(on_progress, "calibrate"))
        _save(settings.out, results, settings)
        for seed in range(settings.seeds):
            _run_seed(results, settings, workload, seed, on_progress, on_evaluation)
        results["complete"] = True
    except KeyboardInterrupt:
        results["complete"] = False
    results["measured_ms"] = _measured_ms(settings.out)
    _save(settings.out, results, settings)
    write_report(settings.out)
    return results


def read_workload(settings: Settings) -> Workload:
    """The data and model that the settings ask for."""
    return load_workload(
        task=settings.task,
        data=settings.data or None,
        layers=settings.layers,
        width=settings.width,
        length=settings.length,
        vocab_size=settings.vocab_size,
        validation_samples=settings.validation_samples,
        train_samples=settings.train_samples,
        max_characters=settings.max_characters,
        flipped=settings.flipped,
        repeated=settings.repeated,
        checkpoint=settings.checkpoint,
        text_column=settings.text_column,
        label_column=settings.label_column,
    )


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
        "operations_ms": {},
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
    known: dict[str, Timing] = results["operations_ms"]
    missing = [name for name in operations_of(settings.arms, settings) if name not in known]
    if not missing:
        return
    fresh = measure_operations([*dict.fromkeys((*missing, "train"))], settings, workload, on_share)
    scale = known["train"]["median"] / fresh["train"]["median"] if known else 1.0
    for name in missing:
        known[name] = {key: value if key == "count" else round(value * scale, 4) for key, value in fresh[name].items()}


def _run_seed(
    results: dict[str, Any],
    settings: Settings,
    workload: Workload,
    seed: int,
    on_progress: OnProgress,
    on_evaluation: OnEvaluation,
) -> None:
    (settings.out / folder.LEDGERS).mkdir(exist_ok=True)
    commit = environment.commit()
    medians_ms = {name: timing["median"] for name, timing in results["operations_ms"].items()}
    benches: dict[str, Bench] = {}
    turns: dict[str, Iterator[Run]] = {}
    for name in settings.arms:
        runs: list[Run] = results["arms"][name]["runs"]
        if any(run["seed"] == seed and run["finished"] for run in runs):
            continue  # finished before a resume
        ledger_path = settings.out / folder.LEDGERS / f"{name}-seed{seed}.jsonl"
        ledger_path.unlink(missing_ok=True)
        ledger = Ledger(ledger_path, device=torch.device(settings.device))
        benches[name] = Bench(workload, settings, seed, medians_ms, ledger)
        on_share = partial(_show_seed, on_progress, ARMS[name].label, seed, settings.seeds)
        turns[name] = run_trial(benches[name], ARMS[name], on_share)
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
        _save(settings.out, results, settings)


def _show_seed(on_progress: OnProgress, name: str, seed: int, seeds: int, share: float) -> None:
    on_progress(name, (seed + share) / seeds)


def _save(out: Path, results: dict[str, Any], settings: Settings) -> None:
    results.update(judged(results))
    write_json(out / RESULTS, results)


def _measured_ms(out: Path) -> dict[str, Timing]:
    """Times of the operations in the arms' own steps, beside the calibration that they were charged by."""
    times_ms: dict[str, list[float]] = {}
    for path in sorted((out / folder.LEDGERS).glob("*.jsonl")):
        arm = path.stem.rpartition("-seed")[0]
        for row in read_rows(path):
            for key, value in row.items():
                if key.endswith("_ms") and isinstance(value, float):
                    times_ms.setdefault(f"{arm}: {key[:-3]}", []).append(value)
    return {name: summary(values) for name, values in times_ms.items() if len(values) > 1}
