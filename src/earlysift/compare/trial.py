"""One arm on one seed: a generator that trains and hands out a point of its curves at every evaluation."""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from earlysift import exits, losses, scorers
from earlysift.compare.arms import Arm
from earlysift.compare.settings import Settings
from earlysift.fidelity import fidelity
from earlysift.ledger import Ledger
from earlysift.pretrain.models import build_bert
from earlysift.pretrain.stream import Stream, mask
from earlysift.pretrain.tokens import Blocks
from earlysift.seeds import seeded
from earlysift.sifter import Sifter

Point = dict[str, float]
_CLIP = 1.0


def make_model(settings: Settings, vocab_size: int, seed: int) -> nn.Module:
    """The model that every arm of a seed starts from."""
    return build_bert(
        vocab_size=vocab_size, length=settings.length, layers=settings.layers, width=settings.width, seed=seed
    )


def make_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """AdamW as BERT reproductions use it."""
    return torch.optim.AdamW(
        model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )


def make_sifter(model: nn.Module, arm: Arm, settings: Settings, seed: int, ledger: Ledger) -> Sifter:
    """The arm's sifter. Its probes are off: fidelity is measured at the evaluations, alike for all arms."""
    shared: dict[str, Any] = {"keep": settings.keep, "depth": settings.depth, "probe_every": 0}
    return Sifter(model, seed=seed, ledger=ledger, **{**shared, **arm.sifter})


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> float:
    """Forward, backward, clip, update; the head runs on labelled positions only, in every arm."""
    loss = scorers.training_loss(model, batch)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def learning_rate_factor(step: int, steps: int, warmup: float) -> float:
    """Linear rise over the first ``warmup`` share of the steps, then linear fall to zero at the last.

    Example:
        >>> [round(learning_rate_factor(step, 10, 0.2), 2) for step in (0, 1, 5, 9, 10)]
        [0.5, 1.0, 0.62, 0.12, 0.0]
    """
    rising = max(1, math.ceil(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return (steps - step) / max(1, steps - rising)


def run_trial(
    arm: Arm,
    *,
    blocks: Blocks,
    settings: Settings,
    seed: int,
    steps: int,
    step_cost_ms: float,
    ledger_path: Path,
    on_step: Callable[[int], None],
) -> Iterator[tuple[Point, Point]]:
    """Train one arm on one seed to the end of its budget.

    Args:
        arm: The arm.
        blocks: Tokenised corpus.
        settings: The comparison.
        seed: Seed of weights, data order and selection.
        steps: Steps that the budget buys; the learning rate decays to zero at the last.
        step_cost_ms: Reference time of a step.
        ledger_path: Where the ledger's rows go.
        on_step: Called with the number of steps done, for progress.

    Yields:
        At every evaluation a point of the curve and a point of fidelity.
    """
    model = make_model(settings, blocks.vocab_size, seed)
    optimizer = make_optimizer(model, settings)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_factor(step, steps, settings.warmup)
    )
    ledger = Ledger(ledger_path)
    sifter = make_sifter(model, arm, settings, seed, ledger)
    stream = Stream(blocks, seed=seed)
    rows = settings.batch if sifter.keep == 1 else settings.pool
    validation = validation_set(blocks, settings)
    evaluate_at = {round(i * steps / (settings.evaluations - 1)) for i in range(settings.evaluations)}
    wall_s = 0.0
    for step in range(steps + 1):
        if step in evaluate_at:
            shared = {"step": step, "reference_s": step * step_cost_ms / 1e3}
            quality, ranking = evaluate(model, validation, settings)
            progress = {
                "wall_s": wall_s,
                "trained_samples": step * settings.batch,
                "scored_samples": sifter.stats()["sift/scored"],
            }
            yield {**shared, **progress, **quality}, {**shared, **ranking}
        if step == steps:
            return
        started = time.perf_counter()
        ledger.begin(step)
        with ledger.timed("wait"):
            pool = stream.read(step * rows, rows)
        batch = sifter.sift(pool)
        with ledger.timed("train"):
            loss = train_step(model, optimizer, batch)
            scheduler.step()
        ledger.note(loss=loss)
        ledger.end()
        wall_s += time.perf_counter() - started
        on_step(step + 1)


def validation_set(blocks: Blocks, settings: Settings) -> dict[str, Tensor]:
    """Held-out blocks with one fixed mask, spread over the validation part."""
    count = min(settings.validation_blocks, len(blocks.validation))
    rows = torch.linspace(0, len(blocks.validation) - 1, count).long()
    return mask(blocks, blocks.validation[rows], seeded("validation mask"))


def evaluate(model: nn.Module, validation: dict[str, Tensor], settings: Settings) -> tuple[Point, Point]:
    """Masked-token accuracy and loss on the untouched distribution, and fidelity of the exit on the same samples.

    Returns:
        ``accuracy`` and ``loss``, means over all masked tokens; and what `earlysift.fidelity.fidelity` returns.
    """
    anatomy = exits.find_anatomy(model)
    head = exits.head_of(anatomy)
    correct = torch.zeros(())
    per_sample = []
    with torch.no_grad(), exits.scoring_mode(model), exits.headless(anatomy):
        for start in range(0, len(validation["labels"]), settings.batch):
            rows = slice(start, start + settings.batch)
            labels = validation["labels"][rows]
            hidden = exits.call(model, {"input_ids": validation["input_ids"][rows]})
            labelled = losses.labelled_positions(labels)
            correct += (head(hidden[labelled]).argmax(dim=-1) == labels[labelled]).sum()
            per_sample.append(losses.token_losses(hidden, labels, head))
    exact = torch.cat(per_sample)
    tokens = losses.labelled_positions(validation["labels"]).sum()
    scores = scorers.early_exit_loss(model, validation, depth=settings.depth, chunk_rows=settings.batch)
    ranking = fidelity(scores, exact, max(1, round(settings.keep * len(scores))))
    return {"accuracy": (correct / tokens).item(), "loss": exact.mean().item()}, ranking


def unigram_plateau(blocks: Blocks, validation: dict[str, Tensor]) -> Point:
    """Accuracy and loss of a model that ignores context and predicts the training part's token frequencies."""
    counts = torch.bincount(blocks.train.flatten().long(), minlength=blocks.vocab_size).double() + 1
    counts[: max(blocks.special.values()) + 1] = 1  # special tokens are never masked
    probabilities = counts / counts.sum()
    labels = validation["labels"][losses.labelled_positions(validation["labels"])]
    return {
        "accuracy": (labels == probabilities.argmax()).double().mean().item(),
        "loss": -probabilities[labels].log().mean().item(),
    }
