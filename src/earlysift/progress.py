"""What a `Sifter` remembers from one step to the next, as a checkpoint holds it."""

import copy
import dataclasses
import json
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from earlysift import controller
from earlysift.config_files import differences
from earlysift.control import Control
from earlysift.options import finite, option, problems, whole
from earlysift.pending import Pending

STATE_VERSION = 6
COUNTS = ("candidates", "scored", "trained", "unlabelled", "non_finite")
FIDELITY = ("rank_correlation", "overlap", "gain")
_WHOLE = "a whole number of at least"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Everything that determines later steps, and the counts of those before.

    Attributes:
        step: Optimizer steps begun so far.
        micro_step: Number of the latest pool within its step.
        pools_per_step: The most pools that a step had.
        kept: b, once it is known.
        largest: Candidates of the largest pool.
        counts: Of all steps so far, by name.
        fidelity: The latest probe's.
        flattened: Whether pools are rows of documents set apart (`earlysift.packing`), by the first one.
        weights_read: Whether the loop reads weights; one that ignores them must never be given the unbiased rule.
        steering: What auto mode remembers.
    """

    step: int = option(0, lambda value: whole(value, 0), f"{_WHOLE} 0")
    micro_step: int = option(0, lambda value: whole(value, 0), f"{_WHOLE} 0")
    pools_per_step: int = option(1, lambda value: whole(value, 1), f"{_WHOLE} 1")
    kept: int | None = option(None, lambda value: value is None or whole(value, 1), "at least 1 or None")
    largest: int = option(0, lambda value: whole(value, 0), f"{_WHOLE} 0")
    counts: dict[str, int] = option(
        dataclasses.MISSING,
        lambda value: (
            isinstance(value, Mapping)
            and set(value) == set(COUNTS)
            and all(whole(number, 0) for number in value.values())
        ),
        f"whole numbers of {', '.join(COUNTS)}",
    )
    fidelity: dict[str, float] = option(
        dataclasses.MISSING,
        lambda value: isinstance(value, Mapping) and set(value) <= set(FIDELITY) and all(map(finite, value.values())),
        f"finite numbers of {', '.join(FIDELITY)}",
    )
    flattened: bool | None = option(None, lambda value: isinstance(value, bool | None), "True, False or None")
    weights_read: bool = option(False, lambda value: isinstance(value, bool), "True or False")
    steering: controller.State | None = None

    def place(self, micro_step: int) -> tuple[int, bool]:
        """The optimizer step that the next pool belongs to, and whether it is the first pool of that step."""
        first = self.step == 0 or micro_step <= self.micro_step
        return (self.step if first else self.step - 1), first


def start(kept: int | None, steering: controller.State | None) -> Progress:
    """The progress before the first step."""
    return Progress(kept=kept, counts=dict.fromkeys(COUNTS, 0), fidelity={}, steering=steering)


def after(progress: Progress, step: int, micro_step: int, row: Mapping[str, Any], **changes: Any) -> Progress:
    """The progress after a pool.

    Args:
        progress: Before it.
        step: Its optimizer step.
        micro_step: Its number within the step.
        row: What was noted of it; counts that an accelerator has yet to make are left out.
        changes: Other fields that change.
    """
    counts = {
        name: total + (0 if isinstance(count := row.get(name, 0), Pending) else int(count))
        for name, total in progress.counts.items()
    }
    probed = math.isfinite(row.get("rank_correlation", math.nan))
    return dataclasses.replace(
        progress,
        step=step + 1,
        micro_step=micro_step,
        pools_per_step=max(progress.pools_per_step, micro_step + 1),
        largest=max(progress.largest, row["candidates"]),
        counts=counts,
        fidelity={name: row[name] for name in FIDELITY if name in row} if probed else progress.fidelity,
        **changes,
    )


def to_json(progress: Progress) -> dict[str, Any]:
    """The progress as plain data."""
    plain = {field.name: getattr(progress, field.name) for field in dataclasses.fields(progress)}
    steering = progress.steering and controller.to_json(progress.steering)
    return plain | {"counts": dict(progress.counts), "fidelity": dict(progress.fidelity), "steering": steering}


def from_json(saved: Mapping[str, Any]) -> Progress:
    """The progress that `to_json` saved, as plain Python numbers, because seeds depend on them."""
    names = ("step", "micro_step", "pools_per_step", "largest")
    return Progress(
        **{name: int(saved[name]) for name in names},
        kept=None if saved["kept"] is None else int(saved["kept"]),
        counts={name: int(count) for name, count in saved["counts"].items()},
        fidelity=dict(saved["fidelity"]),
        flattened=saved["flattened"],
        weights_read=saved["weights_read"],
        steering=saved["steering"] and controller.from_json(saved["steering"]),
    )


def require_loadable(
    state: Any,
    identity: Mapping[str, Any],
    control: Control | None,
    exit_head: torch.nn.Module | None,
    exit_optimizer: torch.optim.Optimizer | None,
    learners: Mapping[str, Any],
) -> None:
    """Refuse a state that a `Sifter` of this configuration cannot continue from, before anything is loaded.

    Args:
        state: What `Sifter.state_dict` should have returned.
        identity: The configuration now, see `earlysift.config.SiftConfig.identity`.
        control: Auto mode's; None in fixed mode.
        exit_head: The exit's own head, if any.
        exit_optimizer: Its optimizer, if any.
        learners: What learns as training goes on, by name; each with ``state_problems``.

    Raises:
        ValueError: If the state is of another version or configuration, or damaged; lists all that is wrong.
    """
    if not isinstance(state, Mapping):
        raise ValueError(
            f"Expected what Sifter.state_dict() returned, a mapping, got {type(state).__name__}. Load the file "
            "that it was saved to."
        )
    version = state.get("version")
    if not whole(version, 0) or version != STATE_VERSION:
        raise ValueError(
            f"Expected a Sifter state of version {STATE_VERSION}, got {reprlib.repr(version)}. Use the release "
            "that wrote it."
        )
    saved = _plain_settings(state.get("config"))
    if saved is not None and (differing := differences(saved, identity)):
        listed = "; ".join(f"{key}: saved {before!r}, now {now!r}" for key, before, now in differing)
        raise ValueError(
            f"The saved Sifter was configured otherwise ({listed}). "
            "Build the Sifter as it was saved, or start a new one."
        )
    damage = [] if saved is not None else ["config must be the settings of a Sifter"]
    parts = {"exit_head": exit_head, "exit_optimizer": exit_optimizer, **learners}
    damage += _progress_problems(
        state, {"version", "config", *(name for name, part in parts.items() if part is not None)}
    )
    steering = state.get("steering")
    if control is None:
        damage += [] if steering is None else ["steering must be None in fixed mode"]
    elif steering is not None:
        damage += controller.state_problems(steering, control)
    if exit_head is not None:
        damage += _tensor_problems(state.get("exit_head"), exit_head.state_dict())
    if exit_optimizer is not None:
        damage += _optimizer_problems(state.get("exit_optimizer"), exit_optimizer)
    for name, learner in learners.items():
        damage += learner.state_problems(state.get(name))
    if damage:
        raise ValueError(
            f"The Sifter state is damaged: {'; '.join(damage)}. Nothing was loaded. "
            "Load another checkpoint, or start a new Sifter."
        )
    if "memory" in learners and (misfit := learners["memory"].misfit(state["memory"])):
        raise ValueError(f"{misfit} Nothing was loaded.")


def _plain_settings(config: Any) -> dict[str, Any] | None:
    """Settings that can be compared; None if they cannot be those of a sifter."""
    try:
        plain = json.loads(json.dumps(config))
    except (TypeError, ValueError, RecursionError):
        return None
    return plain if isinstance(plain, dict) and plain else None


def _progress_problems(state: Mapping[str, Any], others: set[str]) -> list[str]:
    names = [field.name for field in dataclasses.fields(Progress)]
    missing = sorted({*others, *names} - state.keys())
    sound = start(None, None)
    present = dataclasses.replace(sound, **{name: state[name] for name in names if name in state})
    wrong = [sentence.removesuffix(".") for sentence in problems(present).values()]
    return [*([f"it has no {', '.join(missing)}"] if missing else []), *wrong]


def _tensor_problems(saved: Any, ours: Mapping[str, Tensor]) -> list[str]:
    if not isinstance(saved, Mapping) or saved.keys() != ours.keys():
        return [f"exit_head must hold {', '.join(ours)}"]
    return [
        f"exit_head's {name} must be a tensor of {value.dtype} {tuple(value.shape)}"
        for name, value in ours.items()
        if not isinstance(saved[name], Tensor)
        or (saved[name].shape, saved[name].layout) != (value.shape, value.layout)
        or saved[name].is_floating_point() != value.is_floating_point()
    ]


def _optimizer_problems(saved: Any, optimizer: torch.optim.Optimizer) -> list[str]:
    """Whether an optimizer of this kind loads what was saved and makes a step with it, tried on a copy."""
    trial = copy.deepcopy(optimizer)
    try:
        trial.load_state_dict(copy.deepcopy(saved))
        for group in trial.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        trial.step()
    except Exception as error:  # an optimizer refuses in as many ways as there are optimizers
        return [f"exit_optimizer cannot be loaded ({type(error).__name__}: {str(error).splitlines()[0][:100]})"]
    return []
