"""`score`: what scoring a pool of 2b costs beside a training step of b, beside what others do, and beside its roof.

The roof of a depth is a lower bound on this machine: the matrix products and attentions that scoring the whole pool at
that depth makes, and nothing else. They are recorded while scoring runs, and made again on the very same tensors.
"""

import dataclasses
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import measuring
import shapes
from earlysift import exits, families, losses, passes, pools, scorers
from earlysift.anatomy import Anatomy, find_anatomy
from earlysift.blend import Blend
from earlysift.exit_probe import ExitProbe
from earlysift.loss_memory import LossMemory
from earlysift.measures import LOSS
from earlysift.scorers import Approximation, Learnt
from shapes import Shape

TITLE = "Cost of scoring"
ABOUT = """Scoring a pool of 2b beside a training step of b (labelled-tokens-only head), interleaved. "By FLOPs" is
the ratio that `costs.py` predicts. "Roof": the matrix products and attentions of scoring alone, made again without
the model, its norms and activations. "Stock, hidden states": the model's own forward with `output_hidden_states`, and
its head on all positions of one hidden state; it costs the same for every depth. "Stock / ours" and "dense exact /
ours" are the times of that and of "exact loss, dense head" over ours. "Compiled": through `torch.compile(model)`.
"Whole layer": the layer at the exit at all positions, as others run it.
"N positions": no more labelled positions of a sample (`max_positions`). FLOP/s count what `costs.py` counts, without
the probe's own. "Probe", "blend" and "memory" (of a million samples) are timed with what they learn: the probe's
training on the pool, and taking in the losses of b. "Above its exit" is that time less the one of "score, depth 1";
"training" the probe's training over its scoring, of the same calls."""
TABLES: dict[str, measuring.Columns] = {
    "rows": {
        "operation": ("operation", "{}"),
        "median_ms": ("median ms", "{:.1f}"),
        "low_ms": ("20 %", "{:.1f}"),
        "high_ms": ("80 %", "{:.1f}"),
        "to_step": ("of a step", "{:.3f}"),
        "predicted": ("by FLOPs", "{:.3f}"),
        "gflops_per_s": ("GFLOP/s", "{:,.0f}"),
        "to_roof": ("over its roof", "{:.2f}"),
        "stock_ratio": ("stock / ours", "{:.2f}"),
        "dense_exact_ratio": ("dense exact / ours", "{:.2f}"),
        "above_exit": ("above its exit, of a step", "{:.4f}"),
        "training": ("training", "{:.3f}"),
    }
}
# What torch's own FLOP counter counts; it does not know attention on a CPU.
_PRODUCTS = {*flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu}
_WHOLE = "depth 1, whole layer"
_OF_POSITIONS = 16  # one in so many is labelled where few are read
STEP, STOCK, DENSE_EXACT = "train step", "stock, hidden states", "exact loss, dense head"
EXIT, PROBE, BLEND, MEMORY = "score, depth 1", "score, depth 1, probe", "score, depth 1, blend", "score, memory"


def plan(given: Namespace) -> dict[str, partial[dict[str, Any]]]:
    """What is to be measured, by name of the entry."""
    return shapes.entries(measure, given)


def measure(shape: Shape, dtype: str, rounds: int) -> dict[str, Any]:
    """Times, ratios and achieved FLOP/s of every operation."""
    place, precision = measuring.device(), measuring.DTYPES[dtype]
    model = shapes.build(shape).to(place)
    anatomy = find_anatomy(model)
    pool = shapes.pool(model, shape, round(shape.batch / measuring.KEEP), place)
    rows = pools.take(pool, slice(0, shape.batch))
    depths = [depth for depth in measuring.DEPTHS if depth < len(anatomy.layers)]
    options: dict[str, Any] = {"chunk_rows": 2 * shape.batch, "dtype": precision.score}  # as the Sifter does
    flops = partial(measuring.flops, anatomy, pool)
    dense = partial(_dense_scores, model, anatomy, pool, **(options | {"chunk_rows": shape.batch}))
    unlabelled = {**pool, "labels": torch.full_like(pool["labels"], losses.IGNORED_LABEL)}
    every_head = flops(dense=True) - measuring.flops(anatomy, unlabelled)  # on all positions
    torch.compiler.reset()  # Dynamo compiles a function of transformers eight times in a process, then no more
    compiled: Any = torch.compile(model, dynamic=False)

    exits_scored: dict[str, dict[str, Any]] = {f"depth {depth}": {"depth": depth} for depth in depths}
    if anatomy.positionwise:
        whole = dataclasses.replace(families.FAMILIES[shape.config["model_type"]], positionwise=())
        exits_scored[_WHOLE] = {"depth": 1, "family": whole}
    if shape.length is not None:
        few = max(1, shape.length // _OF_POSITIONS)
        exits_scored[f"depth 1, {few} positions"] = {"depth": 1, "max_positions": few}
    timed: dict[str, tuple[Callable[[], Any], float]] = {  # operation and its FLOPs
        STEP: (
            measuring.step(model, lambda: scorers.training_loss(model, rows), precision.train),
            3 * measuring.flops(anatomy, rows),
        )
    }
    roof_of = {}
    for name, how in exits_scored.items():
        seen_as, most = find_anatomy(model, how.get("family")), how.get("max_positions")
        skips = exits.skips_unlabelled(model, seen_as, most)
        count = flops(depth=how["depth"], max_positions=most, skips_unlabelled=skips)
        lowest = f"roof, {name}"
        timed[f"score, {name}"] = (partial(scorers.early_exit_loss, model, pool, **how, **options), count)
        if how["depth"] == 1 and "family" not in how:
            skips = exits.skips_unlabelled(compiled, anatomy, most)
            operation = partial(scorers.early_exit_loss, compiled, pool, **how, **options)
            timed[f"score, {name}, compiled"] = (operation, flops(**how, skips_unlabelled=skips))
            roof_of[f"score, {name}, compiled"] = lowest if skips or not anatomy.positionwise else f"roof, {_WHOLE}"
        timed[lowest] = (roof(model, pool, precision.score, **how), count)
        roof_of[f"score, {name}"] = lowest
    timed |= {
        "score, depth 1, dense head": (
            partial(dense, logits_of=partial(_exit_logits, anatomy, 1)),
            flops(depth=1, dense=True),
        ),
        STOCK: (partial(dense, logits_of=partial(_hidden_state_logits, anatomy, 1)), flops(dense=True) + every_head),
        "exact loss": (partial(scorers.exact_loss, model, pool, **options), flops()),
        DENSE_EXACT: (partial(dense, logits_of=_own_logits), flops(dense=True)),
    }
    scorings = {
        PROBE: Learning(model, scorers.probe(1), pool, shape.batch, options),
        BLEND: Learning(model, scorers.blend(1), pool, shape.batch, options),
        MEMORY: Learning(model, scorers.memory(), pool, shape.batch, options),
    }
    at_first = timed[EXIT][1]
    timed |= {name: (scoring, 0.0 if name == MEMORY else at_first) for name, scoring in scorings.items()}
    times_ms = measuring.interleaved({name: operation for name, (operation, _) in timed.items()}, rounds, "score")
    results: list[dict[str, Any]] = []
    for name, (_, count) in timed.items():
        spread = measuring.spread(times_ms[name])
        row = {
            "operation": name,
            **spread,
            "to_step": measuring.ratio(times_ms[name], times_ms[STEP]),
            "predicted": count / timed[STEP][1],
            "gflops_per_s": count / spread["median_ms"] / 1e6,
        }
        if name in roof_of:
            row["to_roof"] = measuring.ratio(times_ms[name], times_ms[roof_of[name]])
            row["stock_ratio"] = measuring.ratio(times_ms[STOCK], times_ms[name])
            row["dense_exact_ratio"] = measuring.ratio(times_ms[DENSE_EXACT], times_ms[name])
        if name in (PROBE, BLEND):
            above_ms = [ms - exit_ms for ms, exit_ms in zip(times_ms[name], times_ms[EXIT], strict=True)]
            row["above_exit"] = measuring.ratio(above_ms, times_ms[STEP])
        if name == PROBE:
            training_ms = scorings[name].training_ms[1:]  # without the warm-up
            scoring_ms = [ms - trained_ms for ms, trained_ms in zip(times_ms[name], training_ms, strict=True)]
            row["training"] = measuring.ratio(training_ms, scoring_ms)
        results.append(row)
    return {"rows": results}


class Learning:
    """Scoring a pool by what learns, and its learning, as a `Sifter` does both; notes how long its probe trains.

    Args:
        model: The model.
        approximation: What scores.
        pool: R candidates.
        kept: b, of which losses are taken in.
        options: How the pool runs.
    """

    def __init__(
        self, model: nn.Module, approximation: Approximation, pool: Mapping[str, Tensor], kept: int, options: Any
    ) -> None:
        self.model, self.approximation, self.options = model, approximation, options
        self.pool = pools.checked(measuring.with_ids(pool), measuring.SAMPLE_ID)
        self.losses = torch.rand(kept, device=measuring.device(), generator=torch.Generator(measuring.device()))
        self.probe, self.memory = TimedProbe(), LossMemory(measuring.SAMPLES)
        self.memory.observe(torch.arange(measuring.SAMPLES), torch.ones(measuring.SAMPLES), 0)
        self.learnt = Learnt(self.memory, {approximation.depth or 0: self.probe}, Blend())
        self.training_ms: list[float] = []

    def __call__(self) -> None:
        """One pool."""
        self.probe.training_ms, kept = 0.0, slice(0, len(self.losses))
        self.approximation(self.model, self.pool, **self.options, learnt=self.learnt, step=1)
        self.probe.learn()
        if self.approximation.recalls:
            assert self.pool.ids is not None
            self.memory.observe(self.pool.ids[kept], self.losses, 1)
        if self.learnt.blend is not None and self.learnt.blend.latest is not None:
            self.learnt.blend.fit(self.learnt.blend.latest[kept], self.losses, torch.ones_like(self.losses))
        self.training_ms.append(self.probe.training_ms)


class TimedProbe(ExitProbe):
    """Notes how long it trains: its gradient and its step, and of an adapter the pass that has a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.training_ms = 0.0
        self._began_ms: float | None = None

    def adapt(self, states: Tensor) -> Tensor:
        """As `ExitProbe`; the pass with a gradient lasts from its call to that of the next pass, which scores."""
        now_ms = measuring.now_ms()
        if self._began_ms is not None:
            self.training_ms += now_ms - self._began_ms
        self._began_ms = now_ms if torch.is_grad_enabled() else None
        return super().adapt(states)

    def propose(self, losses: Tensor) -> None:
        """As `ExitProbe`."""
        self.training_ms += measuring.timed_ms(partial(super().propose, losses))

    def learn(self) -> None:
        """As `ExitProbe`."""
        self.training_ms += measuring.timed_ms(super().learn)


class Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps matrix products, convolutions and attentions, with their tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[partial[Any]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note a product, and make it."""
        made = partial(func, *args, **(kwargs or {}))
        if func.overloadpacket in _PRODUCTS:
            self.made.append(made)
        return made()


def roof(
    model: nn.Module, pool: Mapping[str, Tensor], dtype: torch.dtype | str | None, **how: Any
) -> Callable[[], None]:
    """The products of scoring the whole pool at an exit, to be made again: no norms, no activations, no modules."""
    with Products() as products:
        scorers.early_exit_loss(model, pool, dtype=dtype, **how)

    def again() -> None:
        with torch.no_grad():
            for product in products.made:
                product()

    return again


def _dense_scores(
    model: nn.Module,
    anatomy: Anatomy,
    pool: Mapping[str, Tensor],
    *,
    logits_of: Callable[[nn.Module, Mapping[str, Tensor]], Tensor],
    chunk_rows: int,
    dtype: torch.dtype | str | None,
) -> Tensor:
    """Scores as most scripts make them: logits of every position, then a mean over the labelled ones."""
    scores = []
    with torch.no_grad(), passes.scoring_mode(model), scorers.precision(anatomy, dtype):
        for start in range(0, pools.pool_size(pool), chunk_rows):
            inputs, labels = pools.inputs_and_labels(pools.take(pool, slice(start, start + chunk_rows)))
            logits = logits_of(model, inputs)
            if anatomy.task == "sequence_classification":
                scores.append(losses.class_scores(LOSS, logits, labels))
                continue
            if anatomy.task == "causal_lm":
                logits, labels = logits[:, :-1], labels[:, 1:]
            each = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
            scores.append(each.sum(dim=1) / losses.labelled_positions(labels).sum(dim=1))
    return torch.cat(scores)


def _own_logits(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    logits: Tensor = model(**inputs).logits
    return logits


def _exit_logits(anatomy: Anatomy, depth: int, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    with exits.shortened(anatomy, depth):
        return _own_logits(model, inputs)


def _hidden_state_logits(anatomy: Anatomy, depth: int, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    states: Tensor = model(**inputs, output_hidden_states=True).hidden_states[depth]
    if anatomy.task == "sequence_classification":
        return passes.head_of(anatomy._replace(head=anatomy.classifier))(states[:, 0])
    return passes.head_of(anatomy)(states)
