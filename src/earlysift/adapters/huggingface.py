"""SIFT inside `transformers.Trainer` and its subclasses: pools from the Trainer's own loader, selected on the device.

Needs ``pip install earlysift[hf]``. For TRL put the mixin in front: ``class MySift(SiftTrainerMixin, SFTTrainer)``.
"""

import dataclasses
import itertools
import logging
from collections import deque
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from earlysift import checks, packing, pools, selectors
from earlysift.anatomy import Anatomy, find_anatomy, unwrap
from earlysift.config import SiftConfig as SiftConfig
from earlysift.control import Control
from earlysift.datasets import WithIds, is_map_style
from earlysift.ledger import Ledger
from earlysift.recent import Kept
from earlysift.sifter import Sifter

try:
    from transformers import Trainer

    from earlysift.adapters import samples, states
except ImportError as error:
    raise ImportError(
        "earlysift.adapters.huggingface needs transformers and accelerate. Install them: pip install 'earlysift[hf]'"
    ) from error

_LOG = logging.getLogger("earlysift")
LOGGED = ("sift/step", "sift/gain", "sift/rank_correlation", "sift/score_ms", "sift/train_ms")
"""What logs of training carry of `earlysift.Sifter.stats`; gain and rank correlation from the first probe on."""
_KNOWN_LOSSES = (Trainer.__module__, "trl.trainer.sft_trainer")
"""Where `compute_loss` is defined that sums up what the model returns."""
_Base = Trainer if TYPE_CHECKING else object


class SiftTrainerMixin(_Base):  # type: ignore[misc, valid-type]
    """To be put in front of `transformers.Trainer` or a subclass: it then trains on the samples that `sift` selects.

    A micro-batch is b of b / keep candidates, chosen before the Trainer counts the batch's items, so that losses,
    accumulation and metrics are those of what is trained on. An epoch is one pass over the candidates. A last pool with
    fewer than b candidates is trained on whole, as the Trainer does with a last batch. Evaluation is left alone.

    Steps are the Trainer's optimizer steps. Logs of training carry ``candidates_seen`` and ``samples_trained`` (all
    processes), and of this process ``sift/step``, ``sift/gain`` and ``sift/rank_correlation`` (of the latest probe),
    ``sift/score_ms`` and ``sift/train_ms`` (median times of a micro-batch); the rest is in the ledger and in
    ``sifter.stats()``. Checkpoints carry the state of selection, in files of each process.

    With ``score="memory"`` the losses of single samples are read off the Trainer's own forward pass. Training samples
    that carry no id under ``sift.sample_id`` get their index. A group under ``sift.group`` they must bring.

    Args:
        sift: What to keep, and how to score; the other arguments are the Trainer's.

    Raises:
        ValueError: If the model, the configuration, or what the Trainer does with its data cannot be selected from.
    """

    ledger_path: Path | None = None
    """Where the rows of the ledger go, to be set before construction; None keeps only their statistics."""
    _train_batch_size: int  # the Trainer's, which changes while it searches for one that fits
    train_dataset: Any
    data_collator: Any
    _signature_columns: Any

    def __init__(self, *args: Any, sift: SiftConfig, **kwargs: Any) -> None:
        self.sift = sift
        super().__init__(*args, **kwargs)
        self._refuse_what_cannot_work()
        self._waiting: deque[Kept] = deque()  # micro-batches that were selected and not yet trained on
        self._trained: Kept | None = None  # the one that is trained on
        self._anatomy: Anatomy | None = None
        self._wants_losses = False
        self._weighs: bool | None = False  # the samples in the loss; None is yet to be seen
        self._divides_by_items: bool | None = None  # the model, a sum of losses by the labels of the whole step
        self._totals = {"candidates_seen": 0, "samples_trained": 0}
        self._trained_before = 0
        self.sifter = self._new_sifter(total_steps=None)

    def get_train_dataloader(self) -> Any:
        """The Trainer's own loader, with pools for batches."""
        names = ("_train_batch_size", "train_dataset", "data_collator", "_signature_columns")
        before = {name: getattr(self, name) for name in names}
        self._train_batch_size = round(self._train_batch_size / self.sift.keep)
        try:
            if problems := samples.problems_of(self.sift):
                self._set_signature_columns_if_needed()
                self._signature_columns = [*self._signature_columns, *problems]
                if is_map_style(self.train_dataset) and hasattr(self.train_dataset, "remove_columns"):
                    # Before they are read, as the Trainer does.
                    self.train_dataset = self._remove_unused_columns(self.train_dataset, "training")
                if (key := self.sift.sample_id) is not None:
                    self.train_dataset = samples.numbered(self.train_dataset, key)
                self.data_collator = partial(samples.collated, self.data_collator, problems)
            return super().get_train_dataloader()
        finally:
            for name, value in before.items():
                setattr(self, name, value)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """Selected micro-batches of one optimizer step, and the number of items in them."""
        # As the Trainer's training_step does later; an evaluation may have ended just now.
        self.model_wrapped.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        batches = (self._selected(pool, micro_step) for micro_step, pool in self._awaited(epoch_iterator))
        return super().get_batch_samples(batches, num_batches, device)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """One micro-batch, timed: the ledger's price of training."""
        self._trained = self._waiting.popleft() if self._waiting else None
        try:
            with self.sifter.ledger.timed("train"):
                return super().training_step(*args, **kwargs)
        finally:
            self._trained = None  # what follows may be an evaluation

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """The Trainer's own loss; where samples have weights or are remembered, their losses are of the same pass.

        By a hook, as TRL computes no logits for its loss, and makes a second pass to return some.
        """
        if self._trained is None:
            return super().compute_loss(model, inputs, *args, **kwargs)
        weights = self._trained.weights
        with self.sifter.lesson(dict(inputs), self._trained):  # a copy, as label smoothing takes the labels out
            if self._wants_losses or weights is not None or self._weighs is None:
                return self._loss_of_samples(weights, model, inputs, *args, **kwargs)
            return super().compute_loss(model, inputs, *args, **kwargs)

    def _loss_of_samples(self, weights: Tensor | None, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        found: list[Tensor] = []
        anatomy = self._anatomy
        keys = anatomy.labels if anatomy else ()
        labels = pools.inputs_and_labels(inputs, keys)[1] if keys and pools.has_labels(inputs, keys) else None

        def read(_model: nn.Module, _inputs: Any, arguments: dict[str, Any], outputs: Any) -> None:
            assert anatomy is not None
            if self._weighs is None:
                self._weighs = samples.can_weigh(outputs, labels, anatomy)
            if found:  # TRL may run the model again for its metrics
                return
            if weights is not None:
                items = arguments.get("num_items_in_batch") if self._divides_by_items else None
                found.append(samples.weigh(outputs, labels, anatomy, weights, items))
            elif self._wants_losses:
                found.append(samples.losses_of(outputs, labels, anatomy))

        if weights is not None and anatomy is not None:
            checks.verified(self.sifter.model, inputs, self.sift.family)  # else its loss is not ours; looks once
            sums_itself = super().compute_loss.__module__ != Trainer.__module__
            if self._divides_by_items is None and self.model_accepts_loss_kwargs and not sums_itself:
                self._divides_by_items = samples.divides_by_items(model, inputs, anatomy)
        with model.register_forward_hook(read, with_kwargs=True):
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        if not found and (self._wants_losses or weights is not None):
            raise ValueError(samples.NO_LOSSES if weights is None else samples.NO_WEIGHTS)
        if self._wants_losses:
            self._remember(found[0])
        return loss

    def _remember(self, losses: Tensor) -> None:
        """Take in the losses of the micro-batch that is trained on, ``(b,)``."""
        self.sifter.observe(losses, self._trained)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Logs of training, with what was seen, what was trained on, and the sifter's numbers."""
        if "train_runtime" in logs:
            self.sifter.ledger.end()  # no further step ends the row of the last one
        if "loss" in logs or "train_runtime" in logs:
            stats = self.sifter.stats()
            logs.update(self._totals | {name: stats[name] for name in LOGGED if name in stats})
        if seconds := logs.get("train_runtime"):
            trained = self._totals["samples_trained"] - self._trained_before
            logs["train_samples_per_second"] = round(trained / seconds, 3)  # not candidates
        super().log(logs, *args, **kwargs)

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        prepared = super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        self._totals = dict.fromkeys(self._totals, 0)
        self.sifter = self._new_sifter(total_steps=max_steps)
        candidates = round(self._train_batch_size / self.sift.keep) * self.args.gradient_accumulation_steps * max_steps
        self._warn_of_samples_seen_once(candidates * self.args.world_size)
        if resume_from_checkpoint is not None:
            self._load_selection(Path(resume_from_checkpoint))
        self._trained_before = self._totals["samples_trained"]
        return prepared

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        state = {"batch_size": self._train_batch_size, "sifter": self.sifter.state_dict(), **self._totals}
        states.write(Path(output_dir, states.name_of(self.args.process_index)), state)

    def _load_selection(self, checkpoint: Path) -> None:
        path = checkpoint / states.name_of(self.args.process_index)
        if not path.exists():  # more processes than before; steps and decisions are common to all
            path = checkpoint / states.name_of(0)
        if not path.exists():
            _LOG.warning("%s holds no state of selection (a plain Trainer's?): selection starts anew.", checkpoint)
            return
        state = states.read(path, self._totals)
        if state["batch_size"] != self._train_batch_size:
            raise ValueError(
                f"The checkpoint's batches held {state['batch_size']} samples, now they hold {self._train_batch_size}. "
                f"Resume with per_device_train_batch_size={state['batch_size']}, or delete {path.name} from "
                f"{checkpoint} to start selection anew."
            )
        try:
            self.sifter.load_state_dict(state["sifter"])
        except ValueError as error:
            raise ValueError(f"{path} cannot be used. {error}") from error
        if self.sifter.weights_read and self._weighs is False:
            reason = self._keeps_from_weighing() or "this run is not to weigh any"
            raise ValueError(
                f"The run of {checkpoint} weighed samples in its loss, and this one cannot, as {reason}. Resume with "
                f"the loss of before, or delete {path.name} from {checkpoint} to start selection anew."
            )
        if self.sifter.weights_read:
            self._weighs = True  # as was seen before
        self._totals = {name: state[name] for name in self._totals}

    def _new_sifter(self, total_steps: int | None) -> Sifter:
        config, ledger = self.sift, Ledger(self.ledger_path)
        if config.mode == "auto":
            control = config.control or Control()
            control = dataclasses.replace(control, total_steps=control.total_steps or total_steps)
            config = dataclasses.replace(config, control=control)
            # Decisions rest on its times, which are then worth waiting for.
            ledger = Ledger(self.ledger_path, device=self.args.device)
        # Scoring enters from outside what it knows (compiled code is then used), and goes around other wrappers.
        known = unwrap(self.model_wrapped) is unwrap(self.model)
        model = self.model_wrapped if known else self.model
        config = dataclasses.replace(config, kept=self._train_batch_size)
        sifter = Sifter(model, config, ledger=ledger, samples=self._sample_count())
        # In auto mode they are of use, but not worth a refusal of models whose losses cannot be read.
        self._wants_losses = sifter.observes and (config.mode == "fixed" or config.sample_id is not None)
        wants_weights = (config.mode == "auto" or config.select not in selectors.UNWEIGHTED) and config.keep < 1
        self._weighs = wants_weights and not self._keeps_from_weighing()
        needs_anatomy = self._wants_losses or self._weighs
        if self._weighs and config.mode == "auto":
            self._weighs = None  # not worth a refusal of models that return no logits, either
        self._anatomy = find_anatomy(model, config.family) if needs_anatomy else None
        self._divides_by_items = None
        self._waiting.clear()
        return sifter

    def _sample_count(self) -> int | None:
        """Number of training samples, where their ids are their indices."""
        key = self.sift.sample_id
        numbered = None if key is None else samples.numbered(self.train_dataset, key)
        return len(numbered) if isinstance(numbered, WithIds) else None

    def _warn_of_samples_seen_once(self, candidates: int) -> None:
        """Warn of a training in which no sample comes back, as far as that is known beforehand."""
        count = self._sample_count()
        if self._wants_losses and count is not None and candidates <= count:
            _LOG.warning(
                "The training reads %d candidates of %d samples: none of them comes back, and no loss that is "
                "remembered is used. Train for more epochs, or use score='loss'.",
                candidates,
                count,
            )

    def _awaited(self, epoch_iterator: Iterator[Any]) -> Iterator[tuple[int, Any]]:
        """Pools of an optimizer step, numbered, and each timed: how long training stands still for data."""
        for micro_step in itertools.count():
            self.sifter.begin(micro_step)  # sift opens the row too late for what comes before it
            with self.sifter.ledger.timed("wait"):
                pool = next(epoch_iterator, None)
            if pool is None:
                return
            yield micro_step, pool

    def _selected(self, pool: Any, micro_step: int) -> Any:
        pool = self._prepare_inputs(pool)
        if packing.is_flattened(pool) and (self._wants_losses or self.sift.select not in selectors.UNWEIGHTED):
            raise ValueError(samples.NO_DOCUMENTS)
        batch = self.sifter.sift(pool, micro_step=micro_step)
        reads = self._weighs and not packing.is_flattened(pool)
        weights = self.sifter.weights if reads else None  # which tells auto mode that they are read
        if (kept := self.sifter.latest) is not None:
            self._waiting.append(kept._replace(weights=None if kept.weights is None else weights))
        # Pools are equally large on all processes: accelerate evens them out.
        self._totals["candidates_seen"] += packing.size(pool) * self.args.world_size
        self._totals["samples_trained"] += packing.size(batch) * self.args.world_size
        return batch

    def _refuse_what_cannot_work(self) -> None:
        batch_size, keep = self._train_batch_size, self.sift.keep
        norms = checks.batch_norms(self.model)
        problems = [
            (
                self.args.train_sampling_strategy == "batch_rebalance",
                "train_sampling_strategy='batch_rebalance' builds batches of its own, not pools. Use another strategy.",
            ),
            (
                getattr(self, "padding_free", False) and getattr(self.args, "packing", False),
                "packing_strategy='bfd' packs a varying number of documents into a sample, of which a fixed number "
                "cannot be kept. Use packing_strategy='wrapped', or packing=False.",
            ),
            (
                self.get_tp_size() * self.get_cp_size() * self.get_sp_size() > 1,
                "Tensor, context and sequence parallelism share a batch between processes, which select on their own. "
                "Use data parallelism.",
            ),
            (
                self.args.n_gpu > 1 and keep < 1,
                f"The Trainer would train on {self.args.n_gpu} devices by nn.DataParallel, and score on one of them. "
                f"Start the script by torchrun --nproc-per-node {self.args.n_gpu}, or set CUDA_VISIBLE_DEVICES to one "
                "device.",
            ),
            (
                bool(norms) and keep < 1,
                f"BatchNorm would evaluate with the statistics of the selected samples ({', '.join(norms)}). Use "
                "another norm, or a loop of your own that calls .eval() on these modules after model.train().",
            ),
            (
                0 < keep < 1 and round(batch_size / keep) == batch_size,
                f"keep={keep} leaves no choice with batches of {batch_size}: a pool would hold {batch_size}, too. "
                "Use larger batches or a smaller keep.",
            ),
            (
                # Other streams tell their columns only as they are read: see samples.collated.
                bool(samples.columns(self.train_dataset))
                and not is_map_style(self.train_dataset)
                and self.sift.sample_id not in (None, *samples.columns(self.train_dataset)),
                samples.NO_IDS.format(key=self.sift.sample_id),
            ),
            (
                bool(samples.columns(self.train_dataset))
                and self.sift.group not in (None, *samples.columns(self.train_dataset)),
                samples.NO_GROUPS.format(key=self.sift.group),
            ),
            (
                self.sift.kept is not None,
                f"kept={self.sift.kept} is given, but the number kept is the Trainer's per_device_train_batch_size. "
                "Leave kept out.",
            ),
            (
                self.sift.select not in selectors.UNWEIGHTED and bool(self._keeps_from_weighing()),
                f"Only select=greedy is possible, as {self._keeps_from_weighing()}. Leave select out.",
            ),
        ]
        found = [message for bad, message in problems if bad]
        if found:
            raise ValueError("SIFT cannot work in this Trainer:\n" + "\n".join(f"- {message}" for message in found))

    def _keeps_from_weighing(self) -> str:
        """What keeps samples from being weighed in the loss, which is then not the one that the model returns."""
        if self.args.label_smoothing_factor:
            return "label smoothing computes a loss of its own, in which samples have no weights"
        if self.compute_loss_func is not None:
            return "compute_loss_func computes a loss of its own, in which samples have no weights"
        known = super().compute_loss.__module__ in _KNOWN_LOSSES and getattr(self.args, "loss_type", "nll") == "nll"
        if not known or type(self).compute_loss is not SiftTrainerMixin.compute_loss:
            return f"{type(self).__name__} computes a loss of its own, in which samples have no weights"
        return ""


class SiftTrainer(SiftTrainerMixin, Trainer):
    """`transformers.Trainer` that trains on the samples that `sift` selects.

    Example:
        >>> import tempfile
        >>> from transformers import BertConfig, BertForMaskedLM, TrainingArguments
        >>> config = BertConfig(vocab_size=50, hidden_size=16, num_attention_heads=2, intermediate_size=16)
        >>> ids = torch.arange(16 * 8).reshape(16, 8) % 50
        >>> trainer = SiftTrainer(
        ...     model=BertForMaskedLM(config),
        ...     args=TrainingArguments(tempfile.mkdtemp(), per_device_train_batch_size=4, max_steps=2, use_cpu=True,
        ...                            disable_tqdm=True, save_strategy="no"),
        ...     train_dataset=[{"input_ids": row, "labels": row} for row in ids],
        ...     sift=SiftConfig(keep=0.5, depth=1),
        ... )
        >>> metrics = trainer.train().metrics  # doctest: +ELLIPSIS
        {'train_runtime': ...}
        >>> metrics["candidates_seen"], metrics["samples_trained"]
        (16, 8)

    Reference:
        Das et al., SIFT, ICML 2024, arXiv 2402.07052.
    """
