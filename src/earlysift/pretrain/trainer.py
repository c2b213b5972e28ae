"""`Pretrainer`: the Trainer of transformers on a seeded stream of samples, resumable bit for bit."""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from earlysift import passes, pools, ranks, scorers
from earlysift.adapters.huggingface import SiftTrainerMixin
from earlysift.files import write_whole
from earlysift.judging import Unusable
from earlysift.ledger import read_rows
from earlysift.losses import IGNORED_LABEL
from earlysift.pretrain import checkpoints
from earlysift.pretrain.settings import PretrainSettings
from earlysift.pretrain.stream import Rows
from earlysift.recent import Kept

CURVE = ("sift/step", "sift/scored", "sift/rank_correlation", "sift/overlap", "sift/gain")
"""Entries of `earlysift.Sifter.stats` that evaluations log, for the curves."""
_EVALUATED_LABELS = 4096  # labels per batch of an evaluation, whose logits are in memory at once


class NotFinite(Exception):
    """The loss or its gradient norm is nan or infinite; the weights were not updated with it."""


class NotSaved(Exception):
    """A checkpoint could not be written by this process or another one; earlier ones are unchanged."""


class Candidates(Dataset[Rows]):
    """A dataset of candidates by number: the same in every worker, every process and a resumed run.

    Args:
        take: Maps numbers of candidates, int64 ``(n,)``, to a batch of n rows.
        count: Number of candidates that the whole training reads.
        samples: Number of samples that they are of, if these have ids; else None.
    """

    def __init__(self, take: Callable[[Tensor], Rows], count: int, samples: int | None = None) -> None:
        self._take = take
        self._count = count
        self.samples = samples

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, position: int) -> Rows:
        return {name: rows[0] for name, rows in self.__getitems__([position]).items()}

    def __getitems__(self, positions: list[int]) -> Rows:
        """A collated batch of candidates."""
        return self._take(torch.tensor(positions))


def unchanged(batch: Rows) -> Rows:
    """The collator for `Candidates`, whose batches are collated already."""
    return batch


class Pretrainer(SiftTrainerMixin, Trainer):
    """A Trainer that computes logits only for labelled tokens, and can be stopped and resumed at any time.

    The ledger has a row per micro-step, checkpoints are sealed, and a loss that is not finite changes no weights.

    Args:
        settings: The training.
        validation: Rows to evaluate on, ``(M, ...)``, with labels.
        about: Facts that must be the same in a run that resumes from its checkpoints.
        signals: Signals received so far; after the first one the run saves and stops.
        options: Arguments of `transformers.Trainer`, and ``sift``.
    """

    ledger_path: Path
    control: Any
    lr_scheduler: Any
    model: Any
    optimizer: Any

    def __init__(
        self,
        *,
        settings: PretrainSettings,
        validation: Rows,
        about: Mapping[str, Any],
        signals: list[int],
        **options: Any,
    ) -> None:
        self.settings = settings
        self.validation = validation
        self.about = about
        self.signals = signals
        self.ledger_path = settings.out / "ledgers" / f"process{options['args'].process_index}.jsonl"
        super().__init__(**options)
        self.model_accepts_loss_kwargs = True  # the Trainer counts the labelled tokens of a step on all processes
        self.loss_is_scaled_for_ga = True  # the loss is divided by their number
        self._losses: list[Tensor] = []
        self._began_s = 0.0
        self._time_share = 0.0
        self.add_callback(_Steps(self))

    @property
    def train_s(self) -> float:
        """Seconds of training so far, including resumed runs, without evaluations and checkpoints."""
        return time.perf_counter() - self._began_s

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Rows,
        return_outputs: bool = False,  # noqa: ARG002 (the Trainer's signature)
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """The contribution of a batch to the step's mean loss over labelled tokens."""
        with self.accelerator.autocast():
            observe = None if self._trained is None else self._remember
            loss = scorers.training_loss(model, inputs, items=num_items_in_batch, observe=observe)
        processes: int = self.args.world_size
        return loss * processes  # gradients are averaged over processes

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Train on one micro-batch, and record its loss."""
        loss: Tensor = super().training_step(*args, **kwargs)
        self._losses.append(loss)
        return loss

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Accuracy and mean loss on all labelled tokens of the validation samples.

        Raises:
            NotFinite: If the loss is not.
        """
        began_s = time.perf_counter()
        train_s = self.train_s
        own = {name: rows[self.args.process_index :: self.args.world_size] for name, rows in self.validation.items()}
        correct, loss, count = self.accelerator.reduce(self._sums(own), "sum").tolist()
        if not math.isfinite(loss):
            raise NotFinite(f"the validation loss after step {self.state.global_step} is {loss}")
        stats = {name: value for name, value in self.sifter.stats().items() if name in CURVE}
        metrics = {"eval_accuracy": correct / count, "eval_loss": loss / count, "train_s": train_s}
        metrics |= self._totals | stats
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._began_s += time.perf_counter() - began_s
        return metrics

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's schedule; its position is the larger of the share of steps and the share of the time budget."""
        scheduler: Any = super().create_scheduler(num_training_steps, optimizer)
        if self.settings.minutes is not None:
            by_step = scheduler.lr_lambdas[0]
            self.lr_scheduler = LambdaLR(
                self.optimizer, lambda step: by_step(max(step, self._time_share * num_training_steps))
            )
        return self.lr_scheduler

    def end_step(self) -> bool:
        """End the step's row of the ledger; returns whether training ends here, the same on all processes."""
        self.sifter.ledger.end()
        state = torch.tensor([float(bool(self.signals)), self._spent_share()], device=self.args.device)
        if self.args.world_size > 1:
            torch.distributed.all_reduce(state, torch.distributed.ReduceOp.MAX)
        interrupted, self._time_share = state.tolist()
        if interrupted and not self.signals:
            self.signals.append(0)  # another process received one
        return bool(interrupted) or self._time_share >= 1

    def continue_clock(self, train_s: float) -> None:
        """Start the training clock at the time where an earlier run stopped."""
        self._began_s = time.perf_counter() - train_s
        self._time_share = self._spent_share()

    def _sample_count(self) -> int | None:
        data = self.train_dataset
        return data.samples if isinstance(data, Candidates) else super()._sample_count()

    def _spent_share(self) -> float:
        return self.train_s / (60 * self.settings.minutes) if self.settings.minutes else 0.0

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        # The last call before the update. The gradient is the same on all processes and the loss is averaged over
        # them: a process that stopped alone would leave the others waiting.
        norm = super()._clip_grad_norm(model)  # type: ignore[no-untyped-call]
        try:
            self.sifter.judge()  # for the last micro-batch; the accelerator is synchronised here anyway
        except Unusable:
            self._losses.append(torch.tensor(math.nan, device=self.args.device))
        loss, gradient_norm = torch.stack([torch.stack(self._losses).sum(), torch.as_tensor(norm)]).tolist()
        self._losses.clear()
        mean = ranks.mean({"loss": loss}, self.args.device)["loss"]
        if not math.isfinite(mean + gradient_norm):
            step = self.state.global_step + 1
            raise NotFinite(f"at step {step} the loss is {mean} and the gradient norm {gradient_norm}")
        rate = self.lr_scheduler.get_last_lr()[0]
        self.sifter.ledger.note(loss=loss, gradient_norm=gradient_norm, learning_rate=rate)
        return norm

    def _selected(self, pool: Any, micro_step: int) -> Any:
        try:
            batch = super()._selected(pool, micro_step)
        except Unusable:
            # Other processes may have selected, so the step continues, and ends on all of them before the update.
            self._losses.append(torch.tensor(math.nan, device=self.args.device))
            candidates = pools.checked(self._prepare_inputs(pool), self.sift.sample_id)
            batch = candidates.take(slice(0, self._train_batch_size))
            if self._wants_losses:  # as other processes do
                self._waiting.append(Kept(self.sifter.step, batch.size, batch.ids, None, None, None))
            return batch.data
        ids = batch["input_ids"].cpu().contiguous().numpy()
        self.sifter.ledger.note(picks=hashlib.sha256(ids.tobytes()).hexdigest()[:16])
        return batch

    def _prepare_for_training(self, *args: Any) -> Any:
        prepared = super()._prepare_for_training(*args)
        _cut_ledger(self.ledger_path, self.sifter.step)
        return prepared

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        began_s = time.perf_counter()
        self.log({"train_s": self.train_s})  # for the clock of a run that resumes from here
        folder = checkpoints.folder_of(Path(cast(str, self.args.output_dir)), self.state.global_step)
        if self.args.should_save:
            checkpoints.make_room(folder)
        self.accelerator.wait_for_everyone()
        self._write_together(partial(super()._save_checkpoint, model, trial))
        self._write_together(partial(self._seal, folder))
        self._began_s += time.perf_counter() - began_s

    def _seal(self, folder: Path) -> None:
        if self.args.should_save:
            checkpoints.seal(folder, self.about)
            checkpoints.prune(folder.parent)

    def _write_together(self, write: Callable[[], object]) -> None:
        """Write on all processes and wait for all of them; if one fails, all raise."""
        problem = None
        try:
            write()
        except Exception as error:  # every library raises its own error for a full disk
            problem = error
        if ranks.mean({"failed": float(problem is not None)}, self.args.device)["failed"]:
            raise NotSaved(
                f"the checkpoint of step {self.state.global_step} could not be written "
                f"({problem or 'another process reports the reason'})"
            ) from problem

    def _sums(self, rows: Rows) -> Tensor:
        """Correct predictions, sum of losses and labelled tokens of these rows, float64 ``(3,)``."""
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        labels = rows["labels"]
        size = max(1, _EVALUATED_LABELS * len(labels) // max(1, int((labels != IGNORED_LABEL).sum())))
        # Not the wrapped model, because processes may have different numbers of rows.
        with torch.no_grad(), passes.scoring_mode(self.model), self.accelerator.autocast():
            for start in range(0, len(rows["labels"]), size):
                batch = {name: values[start : start + size].to(self.args.device) for name, values in rows.items()}
                logits, targets, _ = scorers.predictions(self.model, batch)
                losses = F.cross_entropy(logits, targets, reduction="sum")
                correct = (logits.argmax(dim=-1) == targets).sum()
                sums += torch.stack([correct.double(), losses.double(), correct.new_tensor(len(targets)).double()])
        return sums


class _Steps(TrainerCallback):
    """Decides when to evaluate, save and stop; the signatures are those of transformers."""

    def __init__(self, trainer: Pretrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        self._trainer.continue_clock(next((e["train_s"] for e in reversed(state.log_history) if "train_s" in e), 0.0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        over = self._trainer.end_step() or state.global_step >= state.max_steps
        due = state.global_step % self._trainer.settings.every == 0
        control.should_training_stop = over
        control.should_save = over or due
        # Only evaluated weights are saved, except after a signal, which must be obeyed at once.
        control.should_evaluate = due or (over and not self._trainer.signals)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:  # noqa: ARG002
        target = self._trainer.settings.target_accuracy
        if target is not None and kwargs["metrics"]["eval_accuracy"] >= target:
            control.should_training_stop = True


def _cut_ledger(path: Path, step: int) -> None:
    """Remove the rows of steps after the checkpoint from which a run resumes."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        return
    lines = path.read_text(encoding="utf-8").split("\n")
    kept = [line for line, row in zip(lines, read_rows(path), strict=False) if row["step"] < step]
    write_whole(path, lambda part: part.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8"))
