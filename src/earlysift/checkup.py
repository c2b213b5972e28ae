"""`earlysift check`: the cost of scoring and training on this machine, for a model with random weights."""

import importlib.metadata
import itertools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from earlysift import checks, costs, exits, losses, pools, scorers
from earlysift.anatomy import Anatomy, find_anatomy, problem_report
from earlysift.presets import Task, read_config
from earlysift.seeds import seeded
from earlysift.sifter import Sifter

DEPTHS = (1, 2, 3, 6)
LENGTH = 128
LABELLED_FRACTION: dict[Task, float] = {
    "masked_lm": 0.15,
    "causal_lm": 1.0,
    "seq2seq_lm": 1.0,
    "token_classification": 1.0,
}
MIN_ROUNDS, MAX_ROUNDS = 3, 20

_CLASSES_OF_TASK: dict[Task, str] = {
    "masked_lm": "MODEL_FOR_MASKED_LM_MAPPING",
    "causal_lm": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "seq2seq_lm": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "token_classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "sequence_classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "question_answering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "ctc": "MODEL_FOR_CTC_MAPPING",
}
_MEMORY_MEASURE = {"cuda": "torch.cuda.max_memory_allocated", "cpu": "torch.profiler on torch's CPU allocator"}

OnProgress = Callable[[str, float], None]
"""Called with the name of a task and the share of it that is done."""


def checkup(
    source: str,
    *,
    task: Task | None = None,
    seq_length: int | None = None,
    batch: int = 32,
    labelled_fraction: float | None = None,
    keep: float = 0.5,
    depths: tuple[int, ...] = (),
    max_positions: int | None = None,
    seconds: float = 10.0,
    on_progress: OnProgress = lambda *_: None,
) -> dict[str, Any]:
    """FLOPs, time and memory of scoring a pool at every depth and of a training step, on random weights and inputs.

    The operations are timed in turns, so that noise on the machine affects all of them alike. Scoring is all of
    `Sifter.sift`: score, select, gather. A training step is forward, backward, clipping and AdamW, with the head on
    labelled positions only; in bfloat16 (autocast) on a GPU and in float32 on a CPU.

    Args:
        source: A transformers config.json, a folder that holds one, or a name in `BUILT_IN`. The config of an unknown
            family contains its row (`earlysift.families.IN_CONFIG`).
        task: The task of the model; None: of the class named in the config, else the model's usual language modelling.
        seq_length: Positions per sample; None is 128, or the model's maximum if that is less.
        batch: b, samples per training step.
        labelled_fraction: Share of the positions with a label; None is `LABELLED_FRACTION` of the task.
        keep: b / R, in (0, 1).
        depths: Exits to measure; by default those of `DEPTHS` that the model has. The full model comes last.
        max_positions: Upper limit of labelled positions that an exit reads of a sample, as in `earlysift.Sifter`.
        seconds: Approximate duration of the timing; at least three rounds are run.
        on_progress: Called as work proceeds.

    Returns:
        Plain data: ``model``, ``shape``, ``machine``, ``rounds``, ``train`` with ``flops``, ``ms`` (median) and
        ``memory_bytes`` (peak growth), and ``scores``: the same for every depth, with ``depth``, ``exact`` (the full
        model), ``ratio`` (time of scoring over that of a step), ``cost`` (of a step with selection over one without,
        by time), ``cost_by_flops`` and ``break_even_gain``.

    Raises:
        ValueError: If an argument is invalid, or with all problems of a model that cannot be used.
        FileNotFoundError: If there is no such config.
        ImportError: If transformers is not installed.

    Example:
        >>> report = checkup("demo", batch=2, depths=(1,), seconds=0.0)
        >>> [score["depth"] for score in report["scores"]], report["shape"]["pool"]
        ([1, 12], 4)
    """
    _require(0 < keep < 1, f"keep must be more than 0 and less than 1, got {keep}. 0.5 is usual.")
    _require(batch >= 1, f"batch must be at least 1, got {batch}.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # Initial weights and dropout draw from the global generators.
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        on_progress("build the model", 0.0)
        model = build_model(source, task).to(device)
        anatomy = find_anatomy(model)
        layers = len(anatomy.layers)
        depths = depths or tuple(depth for depth in DEPTHS if depth < layers) or DEPTHS[:1]
        size = round(batch / keep)
        pool = random_pool(model, size, length=seq_length, labelled_fraction=labelled_fraction, device=device)
        whole = _flops_law(anatomy)
        _require_sound(model, depths, pool)
        on_progress("build the model", 1.0)
        trained = pools.take(pool, slice(0, batch))
        operations = _operations(model, pool, trained, keep, depths, max_positions)
        memory_bytes = _memory_bytes(operations, device, on_progress)
        times_ms = _times_ms(operations, device, seconds, on_progress)
    work = costs.batch_work(anatomy, trained, "step", whole, passes=3)
    step = {
        "flops": work["step_flops"],
        "ms": statistics.median(times_ms["train"]),
        "memory_bytes": memory_bytes["train"],
    }

    def score(depth: int, name: str) -> dict[str, Any]:
        positions = max_positions if depth < layers else None
        skips = depth < layers and exits.skips_unlabelled(model, anatomy, positions)
        law = costs.flops_law(anatomy, depth, skips_unlabelled=skips)
        flops = costs.batch_work(anatomy, pool, "pool", law, max_positions=positions)["pool_flops"]
        ms = statistics.median(times_ms[name])
        cost = 1.0 + ms / step["ms"]  # C1, the cost of selection: a step with it over a step without
        return {
            "depth": depth,
            "exact": depth == layers,
            "flops": flops,
            "ms": ms,
            "memory_bytes": memory_bytes[name],
            "ratio": ms / step["ms"],
            "cost": cost,
            "cost_by_flops": 1.0 + flops / step["flops"],
            "break_even_gain": costs.break_even_gain(cost),
        }

    return {
        "model": {
            "source": source,
            "class": type(model).__name__,
            "task": anatomy.task,
            "layers": layers,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "shape": {
            "seq_length": round(work["step_tokens"] / batch / len(anatomy.lists)),  # inputs are as long as labels
            "batch": batch,
            "pool": size,
            "labels_per_sample": _labels_per_sample(pool, anatomy),
        },
        "machine": _machine(device),
        "rounds": len(times_ms["train"]),
        "train": step,
        "scores": [score(depth, f"depth {depth}") for depth in depths] + [score(layers, "exact")],
    }


def build_model(source: str, task: Task | None = None, changes: Mapping[str, Any] | None = None) -> nn.Module:
    """A model in training mode with random weights from the global generator; downloads nothing.

    Args:
        source: A transformers config.json, a folder that holds one, or a name in `BUILT_IN`.
        task: The task of the model; None: of the class named in the config, else the model's usual language modelling.
        changes: Values that replace those of the config.

    Raises:
        ValueError: If the file is no config, or transformers has no such model.
        FileNotFoundError: If there is no such config.
        ImportError: If transformers is not installed.
    """
    values = {**read_config(source), **(changes or {})}
    try:
        import transformers
    except ImportError as error:
        raise ImportError("Building models needs transformers: pip install 'earlysift[hf]'.") from error
    model_type: Any = values.get("model_type")
    remedy = "Correct it, or update transformers."
    if "auto_map" in values:
        remedy = "Code that a config names (auto_map) is not run. Build the model in Python, and call earlysift.check."
    _require(
        isinstance(model_type, str) and model_type in transformers.CONFIG_MAPPING,
        f"Expected a model_type that transformers {transformers.__version__} knows in the config of {source}, "
        f"got {model_type!r}. {remedy}",
    )
    try:
        config = transformers.CONFIG_MAPPING[model_type].from_dict(values)
        model = _model_class(transformers, config, task)(config)
    except Exception as error:  # transformers may fail in any way on values from a file
        raise ValueError(
            f"transformers {transformers.__version__} cannot build a model from the config of {source}: {error} "
            "Correct the config, or choose another --task."
        ) from error
    return cast(nn.Module, model).train()


def random_pool(
    model: nn.Module, rows: int, *, length: int | None, labelled_fraction: float | None, device: torch.device
) -> dict[str, Tensor]:
    """Random inputs and labels for a transformers model; every sample has the same number of labels.

    Args:
        model: The model.
        rows: R.
        length: Positions per sample; None is 128, or the model's maximum if that is less. Not used for images.
        labelled_fraction: Share of the positions with a label; None is `LABELLED_FRACTION` of the task.
        device: Device of the tensors.

    Raises:
        ValueError: If the length exceeds the model's maximum, or the share is not in (0, 1].
    """
    anatomy = find_anatomy(model)
    _require(
        anatomy.task != "ctc", "Random pools are token ids or images, and CTC needs sounds. Choose another --task."
    )
    config: Any = anatomy.core.config
    generator = seeded("check")
    if hasattr(config, "image_size"):
        size = (config.image_size,) * 2 if isinstance(config.image_size, int) else tuple(config.image_size)
        inputs = {"pixel_values": torch.rand(rows, config.num_channels, *size, generator=generator)}
    else:
        longest: int | None = getattr(config, "max_position_embeddings", None)  # T5 has no table of positions
        length = min(LENGTH, longest or LENGTH) if length is None else length
        allowed = f"in 2..{longest} for this model" if longest else "at least 2"
        _require(1 < length <= (longest or length), f"seq_length must be {allowed}, got {length}.")
        inputs = {"input_ids": torch.randint(config.vocab_size, (rows, length), generator=generator)}
    if anatomy.task == "sequence_classification":
        if getattr(config, "pad_token_id", None) is None:
            config.pad_token_id = 0  # decoders look for the last position before the padding
        if config.num_labels == 1 or config.problem_type in ("regression", "multi_label_classification"):
            labels = torch.rand(rows, config.num_labels, generator=generator).round()
        else:
            labels = torch.randint(config.num_labels, (rows,), generator=generator)
    elif anatomy.task == "question_answering":
        labels = torch.randint(inputs["input_ids"].size(1), (rows, 2), generator=generator)
    else:
        fraction = LABELLED_FRACTION[anatomy.task] if labelled_fraction is None else labelled_fraction
        _require(0 < fraction <= 1, f"labelled_fraction must be in (0, 1], got {fraction}.")
        classes = config.num_labels if anatomy.task == "token_classification" else config.vocab_size
        shape = inputs["input_ids"].shape
        labels = torch.randint(classes, shape, generator=generator)
        rank = torch.rand(shape, generator=generator).argsort(dim=1).argsort(dim=1)
        labels[rank >= max(1, round(fraction * shape[1]))] = losses.IGNORED_LABEL
    return {name: tensor.to(device) for name, tensor in pools.with_labels(inputs, labels, anatomy.labels).items()}


def _flops_law(anatomy: Anatomy) -> costs.FlopsLaw:
    try:
        return costs.flops_law(anatomy)
    except ValueError as error:
        name = type(anatomy.core).__name__
        raise ValueError(f"FLOPs of {name} cannot be counted: {error}. Time it in your own loop.") from None


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _model_class(transformers: Any, config: Any, task: Task | None) -> Any:
    if task is None and config.architectures:
        return getattr(transformers, config.architectures[0])
    masked = type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING
    task = task or ("seq2seq_lm" if config.is_encoder_decoder else "masked_lm" if masked else "causal_lm")
    classes = getattr(transformers, _CLASSES_OF_TASK[task])
    _require(type(config) in classes, f"There is no {config.model_type} model for {task}.")
    return classes[type(config)]


def _require_sound(model: nn.Module, depths: tuple[int, ...], pool: dict[str, Tensor]) -> None:
    rows = pools.take(pool, slice(0, 2))
    problems = dict.fromkeys(p for depth in depths for p in checks.check(model, depth=depth, inputs=rows))
    _require(not problems, problem_report(model, list(problems)))


def _operations(
    model: nn.Module,
    pool: dict[str, Tensor],
    trained: dict[str, Tensor],
    keep: float,
    depths: tuple[int, ...],
    max_positions: int | None,
) -> dict[str, Callable[[], object]]:
    """A training step, then scoring, selecting and gathering at every depth and with the full model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    options: dict[str, Any] = {"keep": keep, "max_positions": max_positions, "probe_every": 0}
    sifters = {f"depth {depth}": Sifter(model, depth=depth, **options) for depth in depths}
    sifters["exact"] = Sifter(model, keep=keep, score="exact", probe_every=0)
    device = next(iter(pool.values())).device
    dtype = _training_dtype(device)
    precision = torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()

    def train() -> None:
        with precision:
            loss = scorers.training_loss(model, trained)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return {"train": train, **{name: partial(sifter.sift, pool) for name, sifter in sifters.items()}}


def _training_dtype(device: torch.device) -> torch.dtype | None:
    """The usual precision of training: autocast on a GPU that computes in bfloat16, plain float32 (None) on a CPU."""
    return scorers.scoring_dtype(device) if device.type == "cuda" else None


def _memory_bytes(
    operations: dict[str, Callable[[], object]], device: torch.device, on_progress: OnProgress
) -> dict[str, int]:
    operations["train"]()  # creates the optimizer states, which are no growth of a later step
    growth = {}
    for number, (name, operation) in enumerate(operations.items(), 1):
        growth[name] = peak_growth_bytes(operation, device)
        on_progress("measure memory", number / len(operations))
    return growth


def _times_ms(
    operations: dict[str, Callable[[], object]], device: torch.device, seconds: float, on_progress: OnProgress
) -> dict[str, list[float]]:
    def timed_ms(operation: Callable[[], object]) -> float:
        _wait_for(device)
        started = time.perf_counter()
        operation()
        _wait_for(device)
        return (time.perf_counter() - started) * 1e3

    times_ms = {name: [timed_ms(operation)] for name, operation in operations.items()}
    round_s = sum(first for (first,) in times_ms.values()) / 1e3
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / round_s)))
    for number in range(1, rounds):
        on_progress("measure time", number / rounds)
        for name, operation in operations.items():
            times_ms[name].append(timed_ms(operation))
    on_progress("measure time", 1.0)
    return times_ms


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_growth_bytes(operation: Callable[[], object], device: torch.device) -> int:
    """Memory at the peak of an operation, less the memory before it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        operation()
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # otherwise the profiler prints a line at every start and stop
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        operation()
    events = [event for event in record.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    sizes: list[int] = [event.nbytes() for event in events]  # negative for freed memory
    return max(itertools.accumulate(sizes, initial=0))


def _labels_per_sample(pool: dict[str, Tensor], anatomy: Anatomy) -> float:
    if not anatomy.by_token:
        return float(len(anatomy.labels))
    _, labels = pools.inputs_and_labels(pool, anatomy.labels)
    return losses.labelled_positions(labels, causal=anatomy.task == "causal_lm").sum().item() / len(labels)


def _machine(device: torch.device) -> dict[str, Any]:
    cpu_name = torch.cpu.get_capabilities().get("cpu_name", "CPU")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name,
        "threads": torch.get_num_threads(),
        "training_dtype": str(_training_dtype(device) or torch.float32).removeprefix("torch."),
        "scoring_dtype": str(scorers.scoring_dtype(device) or torch.float32).removeprefix("torch."),
        "memory_measure": _MEMORY_MEASURE[device.type],
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
    }
