"""One arm on one seed: the model, the data and everything else that its steps work with."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from earlysift import environment, scorers, selectors
from earlysift.compare.arm import Operation, uniform_ms
from earlysift.compare.settings import Settings
from earlysift.control import Control
from earlysift.exits import ExitHead
from earlysift.ledger import Ledger
from earlysift.pretrain.stream import Rows, Stream
from earlysift.pretrain.workloads import Workload
from earlysift.recent import MEMORY
from earlysift.scorers import Predictions
from earlysift.sifter import Sifter

_CLIP = 1.0


@dataclass
class Bench:
    """One arm on one seed.

    Attributes:
        workload: Samples and model.
        settings: The comparison.
        seed: Seed of weights, data order and selection.
        medians_ms: Reference time of every operation; empty while they are being measured.
        ledger: Where steps note what they did.
        position: Candidates passed so far.
        upfront_ms: Reference time spent before the first step, by kind.
    """

    workload: Workload
    settings: Settings
    seed: int
    medians_ms: dict[str, float]
    ledger: Ledger = field(default_factory=Ledger)
    position: int = 0
    upfront_ms: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.device = torch.device(self.settings.device)
        self.model = self.workload.make_model(self.seed).to(self.device)
        self.stream = Stream(self.workload.samples, seed=self.seed)
        self.optimizer = torch.optim.AdamW(  # as BERT reproductions use it
            self.model.parameters(), lr=self.settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
        )

    def read(self, rows: int) -> Rows:
        """The next candidates of the stream."""
        self.position += rows
        return self.take(torch.arange(self.position - rows, self.position))

    def take(self, positions: Tensor) -> Rows:
        """The candidates with these numbers."""
        with self.ledger.timed("wait"):
            rows = self.stream.take(positions)
            return {name: values.to(self.device, non_blocking=True) for name, values in rows.items()}

    def precision(self) -> AbstractContextManager[Any]:
        """Accelerators train and evaluate in bfloat16, the processor in float32."""
        return nullcontext() if self.device.type == "cpu" else torch.autocast(self.device.type, dtype=torch.bfloat16)

    def loss(self, batch: Rows, weights: Tensor | None = None) -> Tensor:
        """Training loss; the head runs on labelled positions only, in every arm."""
        with self.precision():
            return scorers.training_loss(self.model, batch, weights=weights)

    def observed_loss(self, batch: Rows, sifter: Sifter, weights: Tensor | None = None) -> Tensor:
        """Training loss, from which the sifter learns."""
        with self.precision():
            return sifter.loss(batch, weights=weights)

    def joint_loss(self, batch: Rows, sifter: Sifter, weight: float) -> Tensor:
        """Training loss plus a share of the early exit's."""
        with self.precision():
            return self.loss(batch) + weight * sifter.exit_loss(batch)

    def predict(self, batch: Rows) -> Predictions:
        """The same forward pass, for arms that need more than the loss."""
        with self.precision():
            return scorers.predictions(self.model, batch)

    def update(self, loss: Tensor) -> None:
        """Backward, clip, update."""
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), _CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ledger.note(loss=loss.item())

    def set_rate(self, share: float) -> None:
        """Learning rate at a share of the budget."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * learning_rate_factor(share, self.settings.warmup)

    def step_ms(self) -> float:
        """Reference time of a step of uniform training."""
        return uniform_ms(self.medians_ms)

    def budget_steps(self) -> float:
        """Steps of uniform training that the budget is worth."""
        return self.settings.steps or self.settings.budget * 1e3 / self.step_ms()

    def sifter(self, depth: int | None = None, *, own_head: int | None = None, **options: Any) -> Sifter:
        """A sifter with a ledger of its own, as it counts its own steps; only auto mode probes.

        Fidelity is measured at the evaluations, alike for all arms.

        Args:
            depth: The exit; None is the comparison's.
            own_head: Width of the residual layer of an `ExitHead` that is trained on detached features by an optimizer
                like the model's, but with a constant learning rate. None has no such head.
            options: Other arguments of the sifter; ``select`` is the name of a selector.
        """
        settings = self.settings
        shared: dict[str, Any] = {
            "keep": settings.keep,
            "kept": settings.batch,
            "seed": self.seed,
            "ledger": Ledger(device=self.device, clock=environment.work_clock(self.device)),
        }
        if options.get("mode") != "auto":
            shared["probe_every"] = 0
        if "select" in options:
            options["select"] = getattr(selectors, options["select"])
        if own_head is not None:
            head = ExitHead(settings.width, hidden=own_head, seed=self.seed).to(self.device)
            optimizer = torch.optim.AdamW(head.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), fused=True)
            shared |= {"exit_head": head, "exit_optimizer": optimizer}
        return Sifter(self.model, depth=depth or settings.depth, **{**shared, **options})

    def control(self, exits: tuple[int, ...], keep: float, scoring: Operation) -> Control:
        """What auto may choose from, and the measured costs that make its decisions reproducible.

        Args:
            exits: Where it may score.
            keep: Its smallest keep; a half and the comparison's are the others.
            scoring: What its scoring is charged as.
        """
        control = Control(depths=exits, keeps=tuple(sorted({keep, 0.5, self.settings.keep})))
        if not self.medians_ms:
            return control
        larger = self.settings.keep / keep  # scoring was timed on pools of the comparison's keep
        costs = {f"score_{depth}": self.medians_ms[scoring.at(depth).name] * larger for depth in (MEMORY, *exits)}
        costs |= {name: self.medians_ms[name] for name in ("train", "probe")}
        return replace(control, total_steps=max(1, round(self.budget_steps())), reference_costs=costs)


def learning_rate_factor(share: float, warmup: float) -> float:
    """Linear rise over the first ``warmup`` share of the budget, then linear fall to zero at its end.

    Example:
        >>> [round(learning_rate_factor(share, 0.2), 2) for share in (0.0, 0.1, 0.2, 0.6, 1.0)]
        [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    return share / warmup if share < warmup else max(0.0, (1 - share) / (1 - warmup))
