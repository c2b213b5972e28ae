"""SIFT inside Lightning's Trainer: a callback that selects, logs, saves and resumes, and a loader that can be resumed.

Needs ``pip install earlysift[lightning]``. Lightning Fabric needs no adapter.
"""

import dataclasses
import logging
import math
from collections.abc import Iterator, MutableMapping
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader

from earlysift import checks, packing, pools, ranks
from earlysift.adapters import samples
from earlysift.anatomy import find_anatomy
from earlysift.config import SiftConfig as SiftConfig
from earlysift.control import Control
from earlysift.datasets import is_map_style
from earlysift.ledger import Ledger
from earlysift.schedules import Schedule
from earlysift.sifter import Sifter

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError(
        "earlysift.adapters.lightning needs lightning. Install it: pip install 'earlysift[lightning]'"
    ) from error
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, Strategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher  # nothing public tells what spawns

_LOG = logging.getLogger("earlysift")
LOGGED = tuple(
    f"sift/{name}" for name in ("step", "candidates", "trained", "gain", "rank_correlation", "score_ms", "train_ms")
)
"""What is logged of `earlysift.Sifter.stats`, by the first process; gain and rank correlation once there is a probe."""


class SiftCallback(Callback):
    """Train on the samples that `sift` selects: Lightning's Trainer and the module stay as they are.

    The loader gives pools of b / keep candidates, and `training_step` gets batches of b. They are selected on the
    device, in place, just before the step, so a pool is a mapping or a list. Steps are the Trainer's optimizer steps,
    whatever ``accumulate_grad_batches`` is. Checkpoints hold the state of selection of all processes; to resume within
    an epoch, read the data by a `ResumableLoader`.

    Scores that learn from the training losses (``score="memory"``, ``"blend"``, auto mode) read them off the module's
    forward pass within `training_step`.

    Args:
        sift: What to keep, and how to score.
        module: Path from the LightningModule to the module that is scored; empty is the LightningModule itself.
        schedules_in: Whether the schedules of ``sift`` are functions of optimizer steps, or of epochs (as 1.5).
        ledger_path: Where the rows of the ledger go; None keeps only their statistics.

    Example:
        >>> SiftCallback(SiftConfig(keep=0.5, depth=2)).sift.depth
        2

    Reference:
        Das et al., SIFT, ICML 2024, arXiv 2402.07052.
    """

    def __init__(
        self,
        sift: SiftConfig,
        *,
        module: str = "model",
        schedules_in: Literal["steps", "epochs"] = "steps",
        ledger_path: Path | None = None,
    ) -> None:
        if schedules_in not in ("steps", "epochs"):
            raise ValueError(f"schedules_in must be 'steps' or 'epochs', got {schedules_in!r}.")
        self.sift = sift
        self.module = module
        self.schedules_in = schedules_in
        self.ledger_path = ledger_path
        self.sifter: Sifter | None = None
        self._saved: list[dict[str, Any]] | None = None  # by process, to be loaded once there is a sifter
        self._losses: list[Tensor] | None = None  # of the batch's samples, once the forward pass has given them
        self._during_step = ExitStack()
        self._during_forward = ExitStack()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a Trainer in which selection cannot work."""
        rules = [
            (
                not pl_module.automatic_optimization,
                "Expected automatic optimization, got automatic_optimization=False: what a step of the optimizer is "
                "cannot be told from outside. Remove it, or leave the callback out and call "
                "Sifter.sift(batch, micro_step=...) in training_step.",
            ),
            *_rules_of(trainer.strategy),
        ]
        if stage == "fit":
            _refuse([message for wrong, message in rules if wrong])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the sifter, now that model, data and length of the training are known, and load its state."""
        model = self._scored(pl_module)
        trains = [name for name, norm in checks.batch_norms(pl_module).items() if norm.training]
        steps_per_epoch = math.inf
        if math.isfinite(trainer.num_training_batches):
            steps_per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        scheduled = any(schedule is not None for schedule in (self.sift.schedule, self.sift.keep_schedule))
        in_epochs = scheduled and self.schedules_in == "epochs"
        rules = [
            (
                bool(trains) and self.sift.keep < 1,
                f"Expected no BatchNorm in training mode, got {', '.join(trains)}: it would evaluate with the "
                "statistics of the selected samples. Call .eval() on these modules before fit, or use another norm.",
            ),
            (
                in_epochs and not math.isfinite(steps_per_epoch),
                "Expected data of known length with schedules_in='epochs', got a loader without one. Give the data "
                "set a __len__ or the Trainer limit_train_batches=..., or use schedules_in='steps'.",
            ),
        ]
        _refuse([message for wrong, message in rules if wrong])
        if self.sifter is None or self.sifter.model is not model:
            changes: dict[str, Any] = {}
            if in_epochs:
                given = {name: getattr(self.sift, name) for name in ("schedule", "keep_schedule")}
                changes = {name: by and _InEpochs(by, steps_per_epoch) for name, by in given.items()}
            ledger = Ledger(self.ledger_path)
            if self.sift.mode == "auto":
                control, total = self.sift.control or Control(), trainer.estimated_stepping_batches
                known = int(total) if math.isfinite(total) and total > 0 else None
                changes["control"] = dataclasses.replace(control, total_steps=control.total_steps or known)
                # Decisions rest on its times, which are then worth waiting for.
                ledger = Ledger(self.ledger_path, device=pl_module.device)
            self.sifter = Sifter(model, dataclasses.replace(self.sift, **changes), ledger=ledger)
        if self._saved is not None:
            self._load(self.sifter, self._saved)
        elif trainer.ckpt_path:
            _LOG.warning("%s holds no state of selection: it starts anew.", trainer.ckpt_path)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Select: what was a pool becomes a batch, in place."""
        if not isinstance(batch, MutableMapping | list):
            raise ValueError(
                f"Expected a batch that is a dictionary or a list, which can be changed in place, got "
                f"{type(batch).__name__}. Return one from the collate_fn."
            )
        sifter = self._present()
        selected = sifter.sift(batch, micro_step=batch_idx % trainer.accumulate_grad_batches)
        if selected is not batch and isinstance(batch, MutableMapping):
            content = dict(selected)
            batch.clear()
            batch.update(content)
        elif selected is not batch:
            batch[:] = selected
        self._during_step.enter_context(sifter.ledger.timed("train"))
        if sifter.observes and (sifter.config.mode == "fixed" or sifter.config.sample_id is not None):
            self._losses = []
            self._during_forward.enter_context(self._reading(sifter, batch, self._losses))
        self._during_forward.enter_context(sifter.lesson(batch))

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Learn from the forward pass, which has ended."""
        self._during_forward.close()
        if self._losses is not None:
            if not self._losses:
                raise ValueError(samples.NO_LOSSES)
            self._present().observe(self._losses[0])
            self._losses = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, as often as the Trainer does."""
        self._during_forward.close()  # still open where training_step returned no loss
        self._during_step.close()
        self._losses = None
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if every and trainer.global_step % every == 0:
            stats = self._present().stats()
            pl_module.log_dict({name: stats[name] for name in LOGGED if name in stats})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the last row of the ledger, which no further step ends."""
        self._present().ledger.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hook behind in the module."""
        for opened in (self._during_forward, self._during_step):
            opened.__exit__(type(exception), exception, exception.__traceback__)

    def state_dict(self) -> dict[str, Any]:
        """The states of selection of all processes, of which Lightning saves those that the first one has."""
        if self.sifter is None:
            return {} if self._saved is None else {"processes": self._saved}
        states = [self.sifter.state_dict()]
        if ranks.world() > 1:
            states = states * ranks.world()
            distributed.all_gather_object(states, states[0])
        return {"processes": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep what was saved until training starts."""
        self._saved = state_dict["processes"]

    def _scored(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.module)
        except AttributeError:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(
                f"Expected the module to score at {self.module!r} of {type(pl_module).__name__}, found only: {names}. "
                "Give its path, as in SiftCallback(..., module='network'), or module='' for the whole."
            ) from None

    def _present(self) -> Sifter:
        assert self.sifter is not None
        return self.sifter

    def _load(self, sifter: Sifter, saved: list[dict[str, Any]]) -> None:
        if len(saved) != ranks.world():
            raise ValueError(
                f"Expected the state of selection of {ranks.world()} processes, got that of {len(saved)}. Resume with "
                f"{len(saved)} processes, or without this callback."
            )
        sifter.load_state_dict(saved[ranks.rank()])
        self._saved = None

    @staticmethod
    @contextmanager
    def _reading(sifter: Sifter, batch: Any, losses: list[Tensor]) -> Iterator[None]:
        """Read the losses of a batch's samples off the first forward pass within this context."""
        if packing.is_flattened(batch):
            raise ValueError(samples.NO_DOCUMENTS)
        anatomy = find_anatomy(sifter.model, sifter.config.family)
        labels = pools.inputs_and_labels(batch, anatomy.labels)[1]

        def read(_model: nn.Module, _inputs: Any, outputs: Any) -> None:
            if not losses:
                losses.append(samples.losses_of(outputs, labels, anatomy))

        with sifter.model.register_forward_hook(read):
            yield


class ResumableLoader(DataLoader[Any]):
    """A DataLoader that goes on in the middle of an epoch where a checkpoint of Lightning's Trainer was saved.

    The order of the data comes from ``generator``, whose state is saved; under DDP from the sampler that Lightning puts
    in, which knows the epoch. Resuming reads the batches before the checkpoint again and drops them.

    Args: those of `torch.utils.data.DataLoader`.

    Raises:
        ValueError: When it is first read, if the data set has no length, or a sampler has no generator of its own.

    Example:
        >>> def loader():
        ...     return ResumableLoader(range(6), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(0))
        >>> first, second = loader(), loader()
        >>> _ = next(batches := iter(first))
        >>> second.load_state_dict(first.state_dict())
        >>> [batch.tolist() for batch in second] == [batch.tolist() for batch in batches]
        True
    """

    # Set as attributes of the class, as Lightning makes another loader from the arguments of DataLoader.
    _began: Tensor | None = None  # the state of the generator when this epoch began
    _read = 0  # batches of this epoch so far
    _skipped = 0  # batches of the next epoch that were trained on before

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """The batches of an epoch; of the first one after `load_state_dict`, those that are left."""
        self._require_resumable()
        generator = self._drawing()
        self._began = None if generator is None else generator.get_state()
        self._read, self._skipped = self._skipped, 0
        for batch in islice(super().__iter__(), self._read, None):
            self._read += 1  # before it is handed out: a checkpoint may be saved while it is trained on
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the epoch is, or the beginning of the next one if it has been read."""
        generator, ended = self._drawing(), self._read >= len(self)
        now = None if generator is None else generator.get_state()
        return {"read": 0 if ended else self._read, "generator": now if ended or self._read == 0 else self._began}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next epoch be the one that was saved, from there on."""
        generator = self._drawing()
        if generator is not None and state_dict["generator"] is not None:
            generator.set_state(state_dict["generator"])
        self._skipped = self._read = state_dict["read"]
        self._began = state_dict["generator"]

    def _drawing(self) -> torch.Generator | None:
        return getattr(self.sampler, "generator", None)

    def _require_resumable(self) -> None:
        rules = [
            (
                not is_map_style(self.dataset),
                f"Expected a map-style data set, with a length and an index, got {type(self.dataset).__name__}. "
                "Streams go on exactly in a loop of your own (docs/data.md); here an epoch begins again.",
            ),
            (
                getattr(self.sampler, "generator", self) is None,
                f"Expected a generator for {type(self.sampler).__name__}, got None: its order comes from the global "
                "random state, which a resumed run has not. Pass generator=torch.Generator().manual_seed(0).",
            ),
        ]
        _refuse([message for wrong, message in rules if wrong])


@dataclasses.dataclass(frozen=True)
class _InEpochs:
    """A schedule of epochs as one of steps."""

    schedule: Schedule
    steps: float  # per epoch

    def __call__(self, step: int) -> float:
        return self.schedule(step / self.steps)  # type: ignore[arg-type]


def _rules_of(strategy: Strategy) -> list[tuple[bool, str]]:
    """Whether something is wrong with a strategy, and what."""
    sharing = 1
    if isinstance(strategy, ModelParallelStrategy):
        sharing = strategy.device_mesh["tensor_parallel"].size()
    return [
        (
            isinstance(strategy.launcher, _MultiProcessingLauncher),
            "Expected processes that run the whole script, got a strategy that spawns or forks them (ddp_spawn, "
            "ddp_fork, ddp_notebook): what they select and learn is lost when they end. Use strategy='ddp'.",
        ),
        (
            isinstance(strategy, FSDPStrategy),
            "Expected a module whose parts can be called, got FSDPStrategy (FSDP1), whose weights are whole only "
            "within a pass of the whole module. Use ModelParallelStrategy(data_parallel_size=..., "
            "tensor_parallel_size=1) with fully_shard in configure_model (FSDP2), or strategy='ddp'.",
        ),
        (
            sharing > 1,
            f"Expected processes that read data of their own, got tensor parallelism, where {sharing} share theirs and "
            "would select differently. Use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1).",
        ),
    ]


def _refuse(problems: list[str]) -> None:
    if problems:
        raise ValueError("SIFT cannot work in this training:\n" + "\n".join(f"- {problem}" for problem in problems))
