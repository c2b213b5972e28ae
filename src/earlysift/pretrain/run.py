"""`earlysift pretrain`: data, model, training, results. Start reading here."""

import dataclasses
import hashlib
import importlib.util
import json
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from earlysift import checks, environment, folders, pools, scorers, versions
from earlysift.adapters.huggingface import SiftConfig
from earlysift.anatomy import find_anatomy, problem_report
from earlysift.checkup import build_model
from earlysift.files import write_json, write_whole
from earlysift.presets import require_preset
from earlysift.pretrain import checkpoints
from earlysift.pretrain.models import CONFIG, TOKENIZER, build_preset
from earlysift.pretrain.optional import optional_package
from earlysift.pretrain.settings import ARMS, MEMORY_ARM, PretrainSettings
from earlysift.pretrain.stream import Rows, Stream
from earlysift.pretrain.streaming import StreamingCorpus, training_documents
from earlysift.pretrain.tokens import packed_rows
from earlysift.pretrain.trainer import Candidates, NotFinite, NotSaved, Pretrainer, unchanged
from earlysift.pretrain.workload_settings import WorkloadSettings
from earlysift.pretrain.workloads import Workload, load_workload
from earlysift.report.page import RESULTS, RESULTS_VERSION, write_report

PROGRAM = "pretrain"
"""The program in the marker of a run folder."""
DONE, MISSED, DIVERGED, UNSAVED, INTERRUPTED = 0, 1, 3, 4, 130
"""Exit codes: target reached (or none given), target not reached, loss not finite, disk full, saved after a signal."""
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
"""Signals that end a run after the current step and save it; SLURM can send SIGUSR1 before the time is up."""

METHOD = {
    "Time": "Wall time, without evaluations and checkpoints. It is noisy: compare only runs on the same "
    "machine with nothing else running. The first process measured what it was spent on.",
    "Learning rate": "It decays to zero at the end of the given steps or minutes. A run that ended earlier, by a "
    "target or a signal, ended with a higher rate.",
    "Evaluation": "Accuracy and loss are measured on all labelled tokens of held-out rows in their original "
    "distribution; masks are the same at every evaluation.",
    "Costs": "The time includes reading candidates, scoring, selecting and, where there are any, probes.",
    "One run": "One seed and one arm, so there is no interval and no verdict against uniform training.",
}
"""How a run is measured, for its report."""

_PARTS_MS = {
    "score": ("score_ms", "select_ms", "gather_ms"),
    "probe": ("probe_ms",),
    "read": ("wait_ms",),
}
_SPECIAL_IDS = {
    "pad_token_id": "[PAD]",
    "cls_token_id": "[CLS]",
    "bos_token_id": "[CLS]",
    "sep_token_id": "[SEP]",
    "eos_token_id": "[SEP]",
}
"""Special tokens that a config names, and what they are called in the tokenizer."""
_LOG = logging.getLogger("earlysift")
_RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # how often torchrun has restarted its processes
_DIGEST_ROWS = 1000  # rows of the training set in its digest


@environment.same_threads_after()
def pretrain(settings: PretrainSettings) -> tuple[int, str]:
    """Train a model from random weights on selected samples, and write the run folder.

    Under torchrun every process calls this; only the first one writes.

    Args:
        settings: The training.

    Returns:
        The exit code, and one sentence on how the training ended.

    Raises:
        ValueError: If settings, data, or the checkpoint to resume from are invalid.
        FileNotFoundError: If a file is missing.
        FileExistsError: If the run folder holds another run.
        ImportError: If an optional package is missing.
    """
    optional_package("matplotlib", extra="report")  # needed at the end, but a missing package is reported now
    if int(os.environ.get(_RESTARTS, "0")) and (settings.out / CONFIG).is_file():
        settings = dataclasses.replace(settings, resume=True)
    shape = _shape(settings)
    _require_free(settings)
    args = _arguments(settings)
    with args.main_process_first():  # the others find the prepared data in the cache
        workload = _workload(settings, shape)
    model = _model(settings, workload)
    _require_sound(settings, model, workload)
    _set_threads(settings, args, model, workload)
    about = {
        **settings.identity(),
        "processes": args.world_size,
        "training data": _digest(workload),
        "model": hashlib.sha256(model.config.to_json_string().encode()).hexdigest()[:16],
    }
    first = args.process_index == 0
    with _signals() as signals:
        trainer = _trainer(settings, args, workload, model, about, signals)
        with _locked(settings) if first else nullcontext():  # only now, so that a refused run leaves no folder
            checkpoint = _checkpoint(settings, about)
            args.distributed_state.wait_for_everyone()
            if first:
                checkpoints.tidy(settings.out)
                _write_setup(settings, workload)
            args.distributed_state.wait_for_everyone()
            code, message = _train(trainer, checkpoint)
            if first and code != UNSAVED:
                write_json(settings.out / RESULTS, _results(trainer, workload, code, message))
                write_report(settings.out)
    return code, message


def _shape(settings: PretrainSettings) -> Any:
    """The model without its weights."""
    require_preset(settings.preset)
    with torch.device("meta"):
        model: Any = build_model(settings.preset, changes=_sized(settings.vocab_size))
    anatomy = find_anatomy(model)
    longest = getattr(model.config, "max_position_embeddings", settings.length)
    problems = (
        [str(problem) for problem in checks.check(model, depth=settings.depth)] if settings.arm != "uniform" else []
    )
    if anatomy.task not in ("masked_lm", "causal_lm"):
        problems.append(
            f"A model for {anatomy.task} cannot be pre-trained; expected a masked or causal language model."
        )
    if settings.length > longest:
        problems.append(f"length must be at most {longest} for {settings.preset}, got {settings.length}.")
    if problems:
        raise ValueError(" ".join(problems))
    return model


def _require_sound(settings: PretrainSettings, model: nn.Module, workload: Workload) -> None:
    """Run the model on two rows before a folder is created, to find its problems early."""
    rows = {name: values[:2] for name, values in workload.samples.validation.items()}
    if settings.arm not in ("uniform", "exact", MEMORY_ARM):
        inputs, _ = pools.inputs_and_labels(rows)
        problems = checks.dry_run(model, find_anatomy(model), settings.depth, inputs)
        if problems:
            raise ValueError(problem_report(model, problems))
    checks.verified(model, rows)


def _sized(vocab_size: int | None) -> dict[str, int | None]:
    """Changes for another vocabulary, in which the special tokens of the preset's own would not exist."""
    return {} if vocab_size is None else {"vocab_size": vocab_size, **dict.fromkeys(_SPECIAL_IDS)}


def _require_free(settings: PretrainSettings) -> None:
    """Raise if the folder holds another run; nothing is ever deleted."""
    out = settings.out
    # Hidden files are the lock, and temporary files of a run that was killed early.
    occupied = out.exists() and (not out.is_dir() or any(not path.name.startswith(".") for path in out.iterdir()))
    program = folders.marker(out).get("program", PROGRAM)
    if program != PROGRAM:
        raise FileExistsError(f"{out} belongs to earlysift {program}. Choose another --out.")
    if occupied and not settings.resume:
        raise FileExistsError(f"{out} is not an empty folder. Continue its run with --resume, or choose another --out.")
    if settings.resume and not occupied:
        raise FileNotFoundError(f"There is no run to resume in {out}. Check --out, or omit --resume.")
    if settings.resume and not _is_run(out):
        raise FileExistsError(f"{out} holds files that earlysift pretrain did not write. Choose another --out.")


def _is_run(out: Path) -> bool:
    """Whether `pretrain` wrote a folder: by its marker or, in folders older than markers, by its config."""
    path = out / CONFIG
    if not path.is_file():
        return False
    if folders.marker(out):
        return True
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(config, dict) and "preset" in config


@contextmanager
def _locked(settings: PretrainSettings) -> Iterator[None]:
    """Lock the run folder; the lock ends with the process, however that ends.

    Raises:
        FileExistsError: If another process holds the lock, or has begun a run in the folder.
    """
    with folders.locked(settings.out):
        _require_free(settings)
        yield


def _set_threads(settings: PretrainSettings, args: TrainingArguments, model: nn.Module, workload: Workload) -> None:
    """Set the threads on a CPU: as in the run to resume, whose last digits depend on them, or the faster number."""
    if args.device.type != "cpu":
        return
    threads = folders.marker(settings.out).get("threads") if settings.resume else None
    if isinstance(threads, int) and threads > 0:
        torch.set_num_threads(threads)
    elif not settings.resume and args.world_size == 1:
        batch = {name: rows[: settings.batch] for name, rows in workload.samples.validation.items()}
        with torch.random.fork_rng(devices=[]):
            environment.choose_threads(partial(_step_without_update, model.train(), batch))


def _step_without_update(model: nn.Module, batch: Rows) -> None:
    scorers.training_loss(model, batch).backward()  # type: ignore[no-untyped-call]
    model.zero_grad()


def _checkpoint(settings: PretrainSettings, about: dict[str, Any]) -> Path | None:
    """The checkpoint to resume from; None to begin."""
    if not settings.resume:
        return None
    latest = checkpoints.latest(settings.out)
    if latest is None:
        _LOG.warning("%s has no valid checkpoint: the run starts over.", settings.out)
        return None
    folder, saved = latest
    checkpoints.require_same(folder, saved, about)
    return folder


def _arguments(settings: PretrainSettings) -> TrainingArguments:
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("Expected a CUDA device for device='cuda', found none. Use --device cpu.")
    on_cpu = settings.device == "cpu" or not torch.cuda.is_available()
    launched = "LOCAL_RANK" in os.environ  # by torchrun
    if not on_cpu and not launched and torch.cuda.device_count() > 1:
        count = torch.cuda.device_count()
        raise ValueError(
            f"This process sees {count} devices and would train on one. Start it as torchrun --nproc-per-node {count} "
            "-m earlysift pretrain ..., or set CUDA_VISIBLE_DEVICES to one of them."
        )
    return TrainingArguments(
        output_dir=str(settings.out),
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=settings.accumulate,
        max_steps=settings.steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.schedule,
        warmup_steps=round(settings.warmup * settings.steps),
        weight_decay=settings.weight_decay,
        optim="adamw_torch_fused",
        max_grad_norm=1.0,
        bf16=not on_cpu and scorers.scoring_dtype(torch.device("cuda")) is not None,
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and launched else None,
        ddp_find_unused_parameters=False,  # the head runs outside the wrapped forward, and so would count as unused
        torch_compile=settings.compile,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataloader_num_workers=settings.workers,
        dataloader_multiprocessing_context="fork" if settings.workers else None,
        dataloader_pin_memory=not on_cpu,
        eval_strategy="no",  # the trainer's own callback decides when to evaluate and save
        save_strategy="no",
        logging_steps=settings.log_every,
        logging_nan_inf_filter=False,
        report_to=_tracker(settings),
        disable_tqdm=not sys.stderr.isatty(),
        seed=settings.seed,
    )


def _tracker(settings: PretrainSettings) -> str:
    if settings.track == "auto":
        return "tensorboard" if importlib.util.find_spec("tensorboard") else "none"
    if settings.track != "none" and importlib.util.find_spec(settings.track) is None:
        raise ValueError(f"{settings.track} is not installed: pip install {settings.track}, or use --track none.")
    return settings.track


def _workload(settings: PretrainSettings, shape: Any) -> Workload:
    described = WorkloadSettings(
        task=find_anatomy(shape).task,
        data=settings.data,
        text_column=settings.text_column,
        length=settings.length,
        vocab_size=shape.config.vocab_size,
        validation_samples=settings.validation_samples,
    )
    workload = load_workload(
        described, tokenizer_file=settings.tokenizer, stream=settings.stream, whole_word=settings.whole_word
    )
    available, needed = shape.config.vocab_size, workload.facts["vocab_size"]
    if needed > available:
        raise ValueError(
            f"The tokenizer {settings.tokenizer} has {needed} tokens, but {settings.preset} has {available}. Give "
            f"--vocab-size {needed}, or another tokenizer."
        )
    return workload


def _model(settings: PretrainSettings, workload: Workload) -> Any:
    """The model with its weights, configured with the special tokens of the tokenizer."""
    tokenizer = optional_package("tokenizers", extra="hf").Tokenizer.from_str(workload.tokenizer_json)
    special = {name: tokenizer.token_to_id(token) for name, token in _SPECIAL_IDS.items()}
    return build_preset(settings.preset, changes=_sized(settings.vocab_size) | special, seed=settings.seed)


def _digest(workload: Workload) -> str:
    """A digest of the training data: its size and a sample of its rows."""
    ids = workload.samples.train["input_ids"]
    sample = ids[torch.linspace(0, len(ids) - 1, min(_DIGEST_ROWS, len(ids))).long()]
    return hashlib.sha256(repr(tuple(ids.shape)).encode() + sample.numpy().tobytes()).hexdigest()[:16]


def _write_setup(settings: PretrainSettings, workload: Workload) -> None:
    folders.mark(settings.out, PROGRAM, threads=torch.get_num_threads())
    write_json(
        settings.out / CONFIG, json.loads(json.dumps(vars(settings) | {"resume": False, "config": None}, default=str))
    )
    write_whole(settings.out / TOKENIZER, lambda part: part.write_text(workload.tokenizer_json, encoding="utf-8"))


def _trainer(
    settings: PretrainSettings,
    args: TrainingArguments,
    workload: Workload,
    model: nn.Module,
    about: dict[str, Any],
    signals: list[int],
) -> Pretrainer:
    given = {name: getattr(settings, name) for name in ("keep", "depth", "max_positions", "seed")}
    options = given | ARMS[settings.arm]
    if settings.stream:
        options.pop("sample_id", None)  # samples of a stream never return
    pool = round(settings.batch / options["keep"])
    if settings.stream:
        stream: Stream | StreamingCorpus = StreamingCorpus(
            lambda: packed_rows(
                training_documents(settings.data, settings.text_column), workload.tokenizer_json, settings.length
            ),
            workload.samples.prepare,
            seed=settings.seed,
        )
    else:
        stream = Stream(workload.samples, seed=settings.seed)
    candidates = settings.steps * settings.accumulate * pool * args.world_size
    train_dataset = Candidates(stream.take, candidates)
    if isinstance(stream, Stream) and "sample_id" in options:
        take = partial(_with_ids, stream, options["sample_id"])
        train_dataset = Candidates(take, candidates, len(workload.samples))
    return Pretrainer(
        settings=settings,
        validation=workload.samples.validation,
        about=about,
        signals=signals,
        model=model,
        args=args,
        train_dataset=train_dataset,
        data_collator=unchanged,
        sift=SiftConfig(**options),
    )


def _with_ids(stream: Stream, key: str, positions: Tensor) -> Rows:
    return {**stream.take(positions), key: stream.ids_of(positions)}


def _train(trainer: Pretrainer, checkpoint: Path | None) -> tuple[int, str]:
    """Train until it ends for any reason; returns the exit code and one sentence."""
    settings = trainer.settings
    try:
        if checkpoint is not None:
            trainer.state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if _reached(settings, _points(trainer)) is None:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except NotFinite as error:
        return DIVERGED, f"Stopped, as {error}; {_last_good(settings)}. Try a lower learning rate, or a longer warm-up."
    except NotSaved as error:
        return UNSAVED, f"Stopped, as {error}; {_last_good(settings)}. Free some space, and continue with --resume."
    except Exception as error:
        unloadable = [] if checkpoint is None or not checkpoint.is_dir() else checkpoints.unloadable(checkpoint)
        if not unloadable:
            raise
        raise ValueError(
            f"{', '.join(unloadable)} of {checkpoint} cannot be loaded, although they match the manifest: earlysift "
            "did not write them, or can no longer read them. Delete this checkpoint to resume from the previous one."
        ) from error
    points = _points(trainer)
    if (reached := _reached(settings, points)) is not None:
        return DONE, (
            f"Accuracy {reached['accuracy']:.2%} (target {settings.target_accuracy:.2%}) at step {reached['step']}, "
            f"after {reached['wall_s']:,.1f} s of training."
        )
    step = trainer.state.global_step
    if trainer.signals:
        return INTERRUPTED, f"Stopped by a signal and saved at step {step}. Continue with --resume."
    best = max(point["accuracy"] for point in points)
    if settings.target_accuracy is not None:
        return MISSED, (
            f"The target accuracy of {settings.target_accuracy:.2%} was not reached in {step} steps; the best was "
            f"{best:.2%}."
        )
    last = points[-1]
    return DONE, f"Trained {step} steps: accuracy {last['accuracy']:.2%}, loss {last['loss']:.4f}."


def _last_good(settings: PretrainSettings) -> str:
    good = checkpoints.latest(settings.out)
    return f"the last good checkpoint is {good[0]}" if good else "there is no checkpoint yet"


def _points(trainer: Pretrainer) -> list[dict[str, Any]]:
    """The learning curve, including the runs that this one resumed."""
    return [
        {
            "step": entry["step"],
            "wall_s": entry["train_s"],
            "trained_samples": entry["samples_trained"],
            "scored_samples": int(entry["sift/scored"]) * trainer.args.world_size,
            "accuracy": entry["eval_accuracy"],
            "loss": entry["eval_loss"],
        }
        for entry in trainer.state.log_history
        if "eval_accuracy" in entry
    ]


def _spent_s(trainer: Pretrainer) -> dict[str, float]:
    """Seconds of training by kind, from the ledger of this process.

    All time that is not scoring, probing or waiting for candidates counts as training, including the optimizer step.
    """
    spent = dict.fromkeys(("train", *_PARTS_MS), 0.0)
    lines = trainer.ledger_path.open(encoding="utf-8") if trainer.ledger_path.is_file() else nullcontext(())
    with lines as rows:  # one at a time, because a long run has millions
        for line in rows:
            row = json.loads(line) if line.endswith("\n") else {}  # a full disk may cut off the last line
            spent["train"] += row.get("step_ms", 0.0) / 1e3
            for kind, parts in _PARTS_MS.items():
                seconds = sum(row.get(part, 0.0) for part in parts) / 1e3
                spent[kind] += seconds
                spent["train"] -= seconds
    return {kind: seconds for kind, seconds in spent.items() if seconds > 0}


def _reached(settings: PretrainSettings, points: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The first point of the curve at or above the target."""
    target = settings.target_accuracy
    return next((point for point in points if target is not None and point["accuracy"] >= target), None)


def _results(trainer: Pretrainer, workload: Workload, code: int, message: str) -> dict[str, Any]:
    """The content of results.json: a comparison with one arm and one seed, charged by wall time."""
    settings = trainer.settings
    points = _points(trainer)
    reached = _reached(settings, points)
    names = ("rank_correlation", "overlap", "gain")
    fidelity = [
        {"step": entry["step"], "wall_s": entry["train_s"], **{name: entry[f"sift/{name}"] for name in names}}
        for entry in trainer.state.log_history
        if "eval_accuracy" in entry and all(f"sift/{name}" in entry for name in names)
    ]
    run = {
        "seed": settings.seed,
        "finished": code in (DONE, MISSED),
        "steps": trainer.state.global_step,
        "wall_s": points[-1]["wall_s"] if points else 0.0,
        "spent_s": _spent_s(trainer),
        "curve": points,
        "fidelity": fidelity,
        "control": [],
        "events": [],
        "final_accuracy": points[-1]["accuracy"] if points else None,
        "final_loss": points[-1]["loss"] if points else None,
        "reference_s_to_target": reached and reached["wall_s"],
        "exit_code": code,
    }
    arm = {"label": settings.arm, "description": None, "source": None}
    return {
        "version": RESULTS_VERSION,
        "complete": run["finished"],
        "created": datetime.now().isoformat(timespec="seconds"),
        "config": settings.identity(),
        "machine": environment.machine(trainer.args.device),
        "versions": versions.installed(),
        "commit": versions.commit(),
        "data": {"name": f"{settings.preset} on {workload.name}", "task": workload.task, **workload.facts},
        "baseline": workload.baseline,
        "operations_ms": {},
        "measured_ms": {},
        "arms": {settings.arm: {**arm, "charged": True, "runs": [run]}},
        "comparison": {},
        "target": {"accuracy": settings.target_accuracy, "source": "given"},
        "verdict": message,
        "method": METHOD,
    }


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Record signals within this context; a second one interrupts at once. Ignored signals (nohup) stay ignored."""
    process = os.getpid()
    received: list[int] = []

    def record(number: int, _frame: Any) -> None:
        if os.getpid() != process:
            return  # a worker of the loader, which is still needed for saving
        if received:
            raise KeyboardInterrupt
        received.append(number)

    handled = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, record) for number in handled}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
