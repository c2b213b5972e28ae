"""`earlysift compare`: data, calibration, arms x seeds, results. Start reading here."""

import json
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from earlysift.compare import environment, folder
from earlysift.compare.arms import ARMS
from earlysift.compare.calibrate import ROUNDS, measure_operations, step_cost_ms, summary
from earlysift.compare.settings import Settings
from earlysift.compare.trial import Point, run_trial, unigram_plateau, validation_set
from earlysift.compare.verdict import compare_arms, verdict
from earlysift.files import write_whole
from earlysift.ledger import read_rows
from earlysift.pretrain.corpus import read_corpus
from earlysift.pretrain.tokens import Blocks, load_blocks
from earlysift.report.page import RESULTS, RESULTS_VERSION, write_report

OnProgress = Callable[[str, int, int], None]
"""Called with the name of a piece of work, how much of it is done, and how much there is."""


def compare(settings: Settings, on_progress: OnProgress = lambda name, done, total: None) -> dict[str, Any]:
    """Run every arm on every seed at an equal budget of reference time, and write the run folder.

    The arms of a seed take turns between evaluations, so that a noisy machine disturbs them alike and an interruption
    leaves curves that can be compared. After every turn results.json is written, whole or not at all.

    Args:
        settings: The comparison.
        on_progress: Called as work proceeds.

    Returns:
        The content of results.json; ``complete`` is false if Ctrl-C ended the run early.

    Raises:
        ValueError: If settings, data or the run to resume do not fit.
        FileExistsError: If the run folder holds another run.
    """
    previous = folder.open_folder(settings.out, settings.identity(), resume=settings.resume, force=settings.force)
    on_progress("read text", 0, 2)
    corpus = read_corpus(settings.data)
    on_progress("read text", 1, 2)
    blocks = load_blocks(corpus, vocab_size=settings.vocab_size, length=settings.length)
    on_progress("read text", 2, 2)
    results = previous or _new_results(settings, corpus.name, blocks)
    if previous is None:
        folder.clear(settings.out)  # only now: an unreadable text must not cost the run that --force replaces
    results["complete"] = False
    results["config"]["seeds"] = settings.seeds
    _save(settings.out, results, settings)  # first of all, as it marks the folder as a comparison's
    _write_json(settings.out / folder.CONFIG, results["config"])
    try:
        if not results["operations_ms"]:
            results["operations_ms"] = _calibrate(settings, blocks, on_progress)
            _plan(results, settings)
            _save(settings.out, results, settings)
        for seed in range(settings.seeds):
            _run_seed(results, settings, blocks, seed, on_progress)
        results["complete"] = True
    except KeyboardInterrupt:
        results["complete"] = False
    results["measured_ms"] = _measured_ms(settings.out)
    _save(settings.out, results, settings)
    write_report(settings.out)
    return results


def _new_results(settings: Settings, data_name: str, blocks: Blocks) -> dict[str, Any]:
    return {
        "version": RESULTS_VERSION,
        "complete": False,
        "created": datetime.now().isoformat(timespec="seconds"),
        "config": json.loads(json.dumps(settings.identity())),
        "machine": environment.machine(),
        "versions": environment.versions(),
        "commit": environment.commit(),
        "data": {
            "name": data_name,
            "train_blocks": len(blocks.train),
            "validation_blocks": len(blocks.validation),
            "length": settings.length,
            "vocab_size": blocks.vocab_size,
        },
        "unigram": unigram_plateau(blocks, validation_set(blocks, settings)),
        "operations_ms": {},
        "arms": {},
    }


def _calibrate(settings: Settings, blocks: Blocks, on_progress: OnProgress) -> dict[str, dict[str, float]]:
    rounds = iter(range(1, ROUNDS + 1))
    return measure_operations(settings, blocks, lambda: on_progress("calibrate", next(rounds), ROUNDS))


def _plan(results: dict[str, Any], settings: Settings) -> None:
    """How many steps the budget buys each arm."""
    for name in settings.arms:
        cost_ms = step_cost_ms(name, results["operations_ms"])
        results["arms"][name] = {
            "label": ARMS[name].label,
            "description": ARMS[name].description,
            "step_cost_ms": cost_ms,
            "steps": max(settings.evaluations, int(settings.budget * 1e3 / cost_ms)),
            "runs": [],
        }


def _run_seed(results: dict[str, Any], settings: Settings, blocks: Blocks, seed: int, on_progress: OnProgress) -> None:
    arms = results["arms"]
    if all(any(run["seed"] == seed and run["finished"] for run in arm["runs"]) for arm in arms.values()):
        return  # finished before a resume
    (settings.out / folder.LEDGERS).mkdir(exist_ok=True)
    turns: dict[str, Iterator[tuple[Point, Point]]] = {}
    for name, arm in arms.items():
        arm["runs"] = [run for run in arm["runs"] if run["seed"] != seed]
        arm["runs"].append({"seed": seed, "finished": False, "curve": [], "fidelity": []})
        ledger_path = settings.out / folder.LEDGERS / f"{name}-seed{seed}.jsonl"
        ledger_path.unlink(missing_ok=True)
        turns[name] = run_trial(
            ARMS[name],
            blocks=blocks,
            settings=settings,
            seed=seed,
            steps=arm["steps"],
            step_cost_ms=arm["step_cost_ms"],
            ledger_path=ledger_path,
            on_step=_progress_of(f"seed {seed} {arm['label']}", arm["steps"], on_progress),
        )
    while turns:
        for name in list(turns):
            run = arms[name]["runs"][-1]
            point = next(turns[name], None)
            if point is None:
                run["finished"] = True
                del turns[name]
                continue
            run["curve"].append(point[0])
            run["fidelity"].append(point[1])
            last = run["curve"][-1]
            run.update(final_accuracy=last["accuracy"], final_loss=last["loss"], wall_s=last["wall_s"])
        _save(settings.out, results, settings)


def _progress_of(name: str, total: int, on_progress: OnProgress) -> Callable[[int], None]:
    return lambda done: on_progress(name, done, total)


def _save(out: Path, results: dict[str, Any], settings: Settings) -> None:
    finished = {
        name: {**arm, "runs": [r for r in arm["runs"] if r["finished"]]} for name, arm in results["arms"].items()
    }
    if finished.get("uniform", {}).get("runs"):
        results.update(compare_arms(finished, settings.target))
    results["verdict"] = verdict(results)
    _write_json(out / RESULTS, results)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _measured_ms(out: Path) -> dict[str, dict[str, float]]:
    """Times of the operations in the arms' own steps, beside the calibration that they were charged by."""
    times_ms: dict[str, list[float]] = {}
    for path in sorted((out / folder.LEDGERS).glob("*.jsonl")):
        for row in read_rows(path):
            for key, value in row.items():
                if key.endswith("_ms"):
                    times_ms.setdefault(f"{path.stem.split('-')[0]}: {key[:-3]}", []).append(value)
    return {name: summary(values) for name, values in times_ms.items() if len(values) > 1}
