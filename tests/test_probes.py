"""Probes: one forward pass sees exact losses, every exit's scores, and inner products of the samples' gradients."""

import itertools
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Generator, nn

import models
from earlysift import Sifter, scorers, selectors
from earlysift.anatomy import find_anatomy
from earlysift.control import Control
from earlysift.exits import ExitHead
from earlysift.families import Family
from earlysift.fidelity import fidelity
from earlysift.measures import MEASURES
from earlysift.probes import Probe, probe, record, record_names
from models import ALL, LAYERS, WIDTH, build, logits_of, loss_of, row_of
from probing import GREEDY, ONE, close, noisy, probe_of, seeded

FEW = [
    pytest.param("bert", "masked_lm", id="bert"),
    pytest.param("llama", "causal_lm", id="llama"),
    pytest.param("roberta", "sequence_classification", id="roberta"),
    pytest.param("plain", "sequence_classification", id="plain"),
]
DEPTHS = (1, 2, 3)
NAN, INF = float("nan"), float("inf")

laws = settings(deadline=None, derandomize=True, database=None, max_examples=200)


def batch_of(model, rows=6, length=12, seed=1):
    return models.batch_for(model, models.task_of(model), rows, length, Generator().manual_seed(seed))


def seen_by(model, batch, **options):
    return probe(model, batch, **{"depths": DEPTHS, "family": row_of(model), "dtype": None} | options)


def features(rows=6, seed=0):
    """A pool of features in which single candidates can be broken."""
    generator = Generator().manual_seed(seed)
    return torch.randn(rows, 5, WIDTH, generator=generator), torch.randint(models.CLASSES, (rows,), generator=generator)


def counted_calls(model, family):
    calls = [0] * LAYERS

    def count(position):
        def hook(*_):
            calls[position] += 1

        return hook

    for position, layer in enumerate(find_anatomy(model, family).layers):
        layer.register_forward_hook(count(position))
    return calls


def cosines(gram):
    norms = gram.diagonal().sqrt()
    return gram / (norms[:, None] * norms)


def assert_same(one, other, **tolerance):
    torch.testing.assert_close(one.exact, other.exact, **tolerance)
    assert one.scores.keys() == other.scores.keys()
    for depth, scores in one.scores.items():
        torch.testing.assert_close(scores, other.scores[depth], **tolerance)
    torch.testing.assert_close(one.gram.diagonal(), other.gram.diagonal(), **tolerance | {"rtol": 1e-4})
    torch.testing.assert_close(cosines(one.gram), cosines(other.gram), rtol=0, atol=1e-5)


# Losses and scores


@pytest.mark.parametrize(("family", "task"), ALL)
def test_losses_and_scores_are_those_of_the_scorers(family, task):
    model = build(family, task)
    batch, row = batch_of(model), row_of(model)
    for measure in MEASURES.values():
        seen = seen_by(model, batch, measure=measure)
        assert seen.exact.dtype == torch.float32
        torch.testing.assert_close(seen.exact, scorers.exact_loss(model, batch, family=row, dtype=None))
        assert list(seen.scores) == list(DEPTHS)
        for depth in DEPTHS:
            scores = scorers.at_exit(measure, depth)(model, batch, family=row, dtype=None)
            torch.testing.assert_close(seen.scores[depth], scores)


@pytest.mark.parametrize(("family", "task"), FEW)
def test_losses_and_scores_are_those_of_the_scorers_in_bfloat16(family, task):
    model = build(family, task)
    batch, options = batch_of(model), {"family": row_of(model), "dtype": torch.bfloat16}
    seen = seen_by(model, batch, dtype=torch.bfloat16)
    assert seen.gram.dtype == torch.float64
    torch.testing.assert_close(seen.exact, scorers.exact_loss(model, batch, **options), rtol=1e-2, atol=1e-2)
    for depth in DEPTHS:
        scores = scorers.early_exit_loss(model, batch, depth=depth, **options)
        torch.testing.assert_close(seen.scores[depth], scores, rtol=1e-2, atol=1e-2)
    assert not torch.equal(seen.exact, seen_by(model, batch).exact)
    torch.testing.assert_close(cosines(seen.gram), cosines(seen_by(model, batch).gram), rtol=0, atol=0.1)


def test_only_the_depths_asked_for_are_scored_in_any_order():
    model = build("bert", "masked_lm")
    seen = seen_by(model, batch_of(model), depths=(3, 1))
    expected = seen_by(model, batch_of(model))
    assert list(seen.scores) == [3, 1]
    assert all(torch.equal(scores, expected.scores[depth]) for depth, scores in seen.scores.items())


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification"])
def test_what_a_label_means_is_what_the_model_says(problem):
    model = build("bert", "sequence_classification", problem_type=problem)
    batch = batch_of(model)
    draws = torch.rand(6, models.CLASSES, generator=Generator().manual_seed(0))
    batch["labels"] = draws.round() if problem == "multi_label_classification" else draws
    seen = seen_by(model, batch)
    torch.testing.assert_close(seen.exact, scorers.exact_loss(model, batch, dtype=None))
    torch.testing.assert_close(seen.scores[2], scorers.early_exit_loss(model, batch, depth=2, dtype=None))
    assert (seen.gram.diagonal() > 0).all()


@pytest.mark.parametrize(("family", "task"), ALL)
def test_exit_head_stands_behind_every_exit_and_not_before_the_exact_loss(family, task):
    model = build(family, task)
    exit_head = models.widen(ExitHead(WIDTH, hidden=8), seed=5)
    batch, row = batch_of(model), row_of(model)
    seen, bare = seen_by(model, batch, exit_head=exit_head), seen_by(model, batch)
    for depth in DEPTHS:
        scores = scorers.early_exit_loss(model, batch, depth=depth, family=row, exit_head=exit_head, dtype=None)
        torch.testing.assert_close(seen.scores[depth], scores)
        assert not torch.allclose(seen.scores[depth], bare.scores[depth], atol=1e-3)
    assert torch.equal(seen.exact, bare.exact)
    assert torch.equal(seen.gram, bare.gram)


# One forward pass


@pytest.mark.parametrize(("family", "task"), ALL)
@pytest.mark.parametrize(("chunk_rows", "passes"), [(None, 1), (4, 2)])
def test_every_layer_runs_once_per_chunk(family, task, chunk_rows, passes):
    model = build(family, task)
    calls = counted_calls(model, row_of(model))
    seen_by(model, batch_of(model), chunk_rows=chunk_rows, exit_head=ExitHead(WIDTH))
    assert calls == [passes] * LAYERS


@pytest.mark.parametrize(("family", "task"), FEW)
def test_chunks_change_nothing(family, task):
    model = build(family, task)
    batch = batch_of(model)
    whole = seen_by(model, batch)
    for rows in (1, 4, 100):
        assert_same(seen_by(model, batch, chunk_rows=rows), whole, rtol=1e-5, atol=1e-5)


def test_a_probe_of_a_compiled_model_sees_the_same_and_compiles_nothing(recorded):
    backend, graphs = recorded
    model = build("bert", "masked_lm")
    batch = batch_of(model)
    expected = seen_by(model, batch)
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        logits_of(compiled(batch["input_ids"], batch["attention_mask"])).sum().backward()
        made = len(graphs)
        assert_same(seen_by(compiled, batch), expected, rtol=1e-5, atol=1e-5)
        assert len(graphs) == made == 1


# Gradients


def slow_gram(model, batch, anatomy):
    """Inner products of the gradients of each sample's own loss by an identity matrix in front of the head."""
    identity = torch.eye(WIDTH, requires_grad=True)
    first = anatomy.core.get_submodule((anatomy.head or anatomy.classifier)[0])
    handle = first.register_forward_pre_hook(lambda module, args: (args[0] @ identity.T, *args[1:]))
    gradients = []
    for i in range(len(batch["labels"])):
        loss = loss_of(model, {key: value[i : i + 1] for key, value in batch.items()})
        gradients.append(torch.autograd.grad(loss, identity)[0].flatten().double())
    handle.remove()
    stacked = torch.stack(gradients)
    return stacked @ stacked.T


@pytest.mark.parametrize(("family", "task"), ALL)
def test_gram_equals_its_slow_twin(family, task):
    model = build(family, task).eval()
    batch = batch_of(model)
    seen = seen_by(model, batch)
    expected = slow_gram(model, batch, find_anatomy(model, row_of(model)))
    assert seen.gram.shape == (6, 6)
    torch.testing.assert_close(seen.gram.diagonal(), expected.diagonal(), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(cosines(seen.gram), cosines(expected), rtol=0, atol=1e-4)
    off_diagonal = cosines(seen.gram)[~torch.eye(6, dtype=torch.bool)]
    assert off_diagonal.abs().max() > 0.01  # there is something to compare


def test_gradients_of_summed_losses_grow_with_the_labels_of_a_sample():
    model = build("bert", "masked_lm")
    batch = batch_of(model)
    counts = (batch["labels"] != -100).sum(dim=1).double()
    mean, summed = (seen_by(model, batch, reduction=reduction) for reduction in ("mean", "sum"))
    torch.testing.assert_close(summed.exact, mean.exact * counts.float())
    torch.testing.assert_close(summed.gram, mean.gram * counts[:, None] * counts, rtol=1e-4, atol=1e-6)


def test_frozen_models_and_callers_without_gradients_see_the_same():
    model = build("bert", "masked_lm")
    batch = batch_of(model)
    expected = seen_by(model, batch)
    model.requires_grad_(False)
    with torch.no_grad():
        assert_same(seen_by(model, batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
@pytest.mark.parametrize("chunk_rows", [None, 2])
def test_rows_without_a_finite_loss_have_no_gradient_and_spoil_no_others(broken, chunk_rows):
    model = build("plain", "sequence_classification")
    inputs, labels = features()
    whole = seen_by(model, (inputs, labels))
    inputs, labels = inputs.clone(), labels.clone()
    inputs[1, 2] = broken
    labels[4] = -100
    seen = seen_by(model, (inputs, labels), chunk_rows=chunk_rows)
    assert not torch.isfinite(seen.exact[1])
    assert seen.exact[4] == -INF
    assert (seen.gram[[1, 4]] == 0).all()
    assert (seen.gram[:, [1, 4]] == 0).all()
    healthy = torch.tensor([0, 2, 3, 5])
    torch.testing.assert_close(seen.exact[healthy], whole.exact[healthy])
    expected = whole.gram[healthy][:, healthy]
    torch.testing.assert_close(seen.gram[healthy][:, healthy], expected, rtol=1e-4, atol=1e-5)
    for depth in DEPTHS:
        torch.testing.assert_close(seen.scores[depth][healthy], whole.scores[depth][healthy])


@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("llama", "causal_lm")])
def test_rows_without_labels_have_no_gradient_and_spoil_no_others(family, task):
    model = build(family, task)
    batch = batch_of(model)
    whole = seen_by(model, batch)
    batch["labels"][[0, 3]] = -100
    others = torch.tensor([1, 2, 4, 5])
    for chunk_rows in (None, 1):
        seen = seen_by(model, batch, chunk_rows=chunk_rows)
        assert (seen.exact[[0, 3]] == -INF).all()
        assert (seen.gram[[0, 3]] == 0).all()
        torch.testing.assert_close(seen.gram[others][:, others], whole.gram[others][:, others], rtol=1e-4, atol=1e-5)


# Models


def test_a_model_whose_head_has_no_name_is_refused_with_the_way_out():
    model = build("plain", "masked_lm")
    before = [(name, id(module)) for name, module in model.named_modules()]
    message = r"family row that names the head of PlainTransformer, got none.*heads=\(\(\.\.\.\),\)"
    with pytest.raises(ValueError, match=message):
        seen_by(model, batch_of(model), family=Family("blocks", (), "masked_lm"))
    assert [(name, id(module)) for name, module in model.named_modules()] == before


def test_a_model_that_reads_attributes_of_its_layers_is_seen_alike():
    class Reading(models.PlainTransformer):
        def forward(self, input_ids, attention_mask=None):
            assert [block.kind for block in self.blocks] == list(range(len(self.blocks)))
            return super().forward(input_ids, attention_mask)

    plain, reading = build("plain", "masked_lm"), Reading("masked_lm")
    reading.load_state_dict(plain.state_dict())
    for kind, block in enumerate(reading.blocks):
        block.kind = kind
    expected = seen_by(plain, batch_of(plain))
    for exit_head in (None, ExitHead(WIDTH)):
        seen = seen_by(reading, batch_of(plain), exit_head=exit_head)
        assert torch.equal(seen.gram, expected.gram)


def test_a_model_that_does_something_of_its_own_behind_a_layer_is_seen_alike():
    class Rolling(models.PlainTransformer):
        """Mixes positions behind its first layer, as DeBERTa does by a convolution."""

        def forward(self, input_ids, attention_mask=None):
            states = self.embed(input_ids)
            for i, block in enumerate(self.blocks):
                states = block(states, None, None).roll(int(i == 0), dims=1)
            return self.head(self.norm(states))

    model = models.widen(Rolling("masked_lm"))
    batch = batch_of(model)
    seen = seen_by(model, batch)
    for depth in DEPTHS:
        scores = scorers.early_exit_loss(model, batch, depth=depth, family=row_of(model), dtype=None)
        torch.testing.assert_close(seen.scores[depth], scores)


@pytest.mark.parametrize(("family", "task"), [("bert", "masked_lm"), ("llama", "causal_lm")])
def test_hidden_states_first_asked_for_after_a_probe_are_complete(family, task):
    model = build(family, task)
    batch = batch_of(model)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    expected = build(family, task)(**inputs, output_hidden_states=True).hidden_states
    seen_by(model, batch)
    states = model(**inputs, output_hidden_states=True).hidden_states
    assert len(states) == LAYERS + 1
    assert all(torch.equal(state, wanted) for state, wanted in zip(states, expected, strict=True))


def test_a_probe_leaves_the_synchronization_of_gradients_alone(process_group):
    model = build("bert", "masked_lm")
    batch = batch_of(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = nn.parallel.DistributedDataParallel(model)
    reduced = []

    def hook(state, bucket):
        reduced.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    seen_by(wrapped, batch)
    assert reduced == []
    for _ in range(2):
        wrapped(**batch).loss.backward()
        assert_same(seen_by(wrapped, batch), seen_by(model, batch), rtol=1e-5, atol=1e-5)
    assert reduced == [0, 0]


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_a_probe_of_a_sharded_model_sees_the_same_and_leaves_its_gradients_exact(process_group):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, model = build("bert", "masked_lm"), build("bert", "masked_lm")
    batch = batch_of(plain)
    mesh = init_device_mesh("cpu", (1,))
    for layer in find_anatomy(model).layers:
        fully_shard(layer, mesh=mesh)
    model = fully_shard(model, mesh=mesh)
    for _ in range(2):
        assert_same(seen_by(model, batch), seen_by(plain, batch), rtol=1e-5, atol=1e-5)
        model(**batch).loss.backward()
        plain(**batch).loss.backward()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad.full_tensor(), expected.grad)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("family", "task"), FEW)
def test_a_probe_on_a_gpu_sees_what_one_on_the_cpu_sees(family, task):
    model = build(family, task)
    batch = batch_of(model)
    expected = seen_by(model, batch)
    seen = seen_by(model.cuda(), {key: value.cuda() for key, value in batch.items()})
    assert seen.gram.device.type == "cuda"
    torch.testing.assert_close(seen.exact.cpu(), expected.exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(cosines(seen.gram.cpu()), cosines(expected.gram), rtol=0, atol=1e-3)


def test_a_probe_of_a_sifter_that_scores_by_an_adapter_leaves_it_as_it_is():
    model = build("bert", "masked_lm")
    pool = models.batch_for(model, "masked_lm", 8, 12, Generator().manual_seed(0))
    sifter = Sifter(model, keep=0.5, score="probe", probe_every=0, dtype=None)
    sifter.sift(pool)
    before = sifter.state_dict()["probe_1"]
    sifter.probe(pool)
    after = sifter.state_dict()["probe_1"]
    assert after["shape"] == before["shape"]
    assert all(torch.equal(after["module"][name], weight) for name, weight in before["module"].items())


# Records


def slow_record(gradients, losses, scores, kept, keeps):
    """Signal and squared length of uniform and greedy steps, pair by pair."""
    g, size = gradients.tolist(), len(losses)

    def product(i, j):
        return sum(a * b for a, b in zip(g[i], g[j], strict=True))

    unit = sum(product(i, i) for i in range(size)) / size
    others = [sum(product(i, j) for j in range(size) if j != i) / (size - 1) / unit for i in range(size)]

    def step(rows):
        signal = sum(others[i] for i in rows) / len(rows)
        return signal, sum(product(i, j) for i in rows for j in rows) / unit / len(rows) ** 2

    numbers = {"uniform.signal": sum(others) / size, "floor": max(losses) / (sum(losses) / size)}
    subsets = list(itertools.combinations(range(size), kept))
    numbers["uniform.length2"] = sum(step(rows)[1] for rows in subsets) / len(subsets)
    for depth, of_depth in enumerate(scores, start=1):
        for keep in keeps:
            considered = range(min(size, round(kept / keep)))
            best = sorted(considered, key=lambda i: -of_depth[i])[:kept]
            numbers[f"greedy.{depth}.{keep:g}.signal"], numbers[f"greedy.{depth}.{keep:g}.length2"] = step(best)
    return numbers


@pytest.mark.parametrize("seed", range(3))
def test_uniform_and_greedy_steps_are_those_of_a_loop_over_pairs_and_subsets(seed):
    generator = seeded(seed)
    gradients = noisy(10, generator, width=5) * torch.rand(10, 1, generator=generator, dtype=torch.float64)
    losses, *scores = (torch.rand(10, generator=generator) for _ in range(3))
    control = Control(depths=(1, 2), keeps=(0.5, 0.8), rules=("greedy",))
    numbers = record(probe_of(gradients, losses, *scores), 5, control)
    expected = slow_record(gradients, losses.tolist(), [s.tolist() for s in scores], 5, control.keeps)
    close({name: numbers[name] for name in expected}, expected)
    assert numbers["loss"] == pytest.approx(losses.mean().item())
    assert numbers["loss_error"] == pytest.approx(losses.std().item() / math.sqrt(10))
    for depth, of_depth in enumerate(scores, start=1):
        assert numbers[f"correlation.{depth}"] == pytest.approx(fidelity(of_depth, losses, 5)["rank_correlation"])
        for keep, rows in ((0.5, 10), (0.8, 6)):
            gain = fidelity(of_depth[:rows], losses[:rows], 5)["gain"]
            assert numbers[f"gain.{depth}.{keep:g}"] == pytest.approx(gain)


def drawn(gradients, draw, count=2000):
    """Mean signal and squared length of drawn weighted steps, with standard errors."""
    gram = gradients @ gradients.T
    gram = gram / gram.diagonal().mean()
    others = (gram.sum(dim=1) - gram.diagonal()) / (len(gram) - 1)
    signals, lengths = [], []
    for _ in range(count):
        indices, weights = draw()
        weights = weights.double() / len(indices)
        signals.append(weights @ others[indices])
        lengths.append(weights @ gram[indices][:, indices] @ weights)
    return [(torch.stack(v).mean().item(), torch.stack(v).std().item() / math.sqrt(count)) for v in (signals, lengths)]


@pytest.mark.parametrize("along", [0.0, 1.0, 6.0])
def test_uniform_steps_are_those_of_drawn_subsets(along):
    gradients = noisy(32, seeded(0), along=along)
    numbers = record(probe_of(gradients, torch.rand(32, generator=seeded(1))), 16, ONE)
    generator = seeded(2)
    (signal, signal_error), (length2, length_error) = drawn(
        gradients, lambda: selectors.uniform_subset(32, 16, generator)
    )
    assert abs(numbers["uniform.signal"] - signal) <= 4 * signal_error
    assert abs(numbers["uniform.length2"] - length2) <= 4 * length_error


@pytest.mark.parametrize("along", [0.0, 1.0, 6.0])
@pytest.mark.parametrize("kind", ["even", "skewed", "capped"])
def test_unbiased_steps_are_those_of_drawn_batches(kind, along):
    generator = seeded(0)
    gradients = noisy(64, generator, along=along)
    if kind != "even":
        gradients *= torch.rand(64, 1, generator=generator, dtype=torch.float64) + 0.1
    scores = gradients.norm(dim=1).float() ** (4 if kind == "capped" else 1)
    included = selectors.inclusion_probabilities(scores, 32)
    assert bool((included == 1).any()) == (kind == "capped")
    numbers = record(probe_of(gradients, scores), 32, ONE)
    (signal, signal_error), (length2, length_error) = drawn(
        gradients, lambda: selectors.proportional(scores, 32, generator)
    )
    assert abs(numbers["uniform.signal"] - signal) <= 4 * signal_error
    # Joint inclusion is taken as that of independent draws, which is off by little.
    assert abs(numbers["unbiased.1.0.5.length2"] - length2) <= 4 * length_error + 0.015 * length2


def test_drawing_by_scores_that_are_all_alike_is_uniform_training_whatever_the_keep():
    generator = seeded(0)
    gradients = noisy(30, generator) * torch.rand(30, 1, generator=generator, dtype=torch.float64)
    control = Control(depths=(1,), keeps=(0.5, 0.75))
    numbers = record(probe_of(gradients, torch.rand(30, generator=generator), torch.ones(30)), 15, control)
    for keep in control.keeps:
        assert numbers[f"unbiased.1.{keep:g}.length2"] == pytest.approx(numbers["uniform.length2"])


def test_a_larger_keep_looks_at_the_first_part_of_the_pool():
    generator = seeded(0)
    gradients, losses = noisy(30, generator), torch.rand(30, generator=generator)
    control = Control(depths=(1,), keeps=(0.5, 0.75))
    before = record(probe_of(gradients, losses), 15, control)
    later = losses.clone()
    later[20:] = losses[20:].flip(0)  # behind the part that keep = 0.75 scores
    after = record(probe_of(gradients, losses, later), 15, control)
    of_larger = [name for name in before if ".0.75" in name]
    assert len(of_larger) == 4
    assert all(before[name] == after[name] for name in of_larger)
    assert before["greedy.1.0.5.signal"] != after["greedy.1.0.5.signal"]
    assert before["unbiased.1.0.5.length2"] != after["unbiased.1.0.5.length2"]


@laws
@given(seed=st.integers(0, 100), scale=st.floats(1e-3, 1e3))
def test_records_are_free_of_the_scale_of_gradients_and_of_losses(seed, scale):
    generator = seeded(seed)
    gradients, losses = noisy(16, generator), 0.5 + torch.rand(16, generator=generator)
    numbers = record(probe_of(gradients, losses), 8, ONE)
    expected = numbers | {name: 4 * numbers[name] for name in ("loss", "loss_error")}
    close(record(probe_of(gradients * scale, losses * 4), 8, ONE), expected)


def test_candidates_without_a_finite_loss_or_score_count_for_nothing():
    generator = seeded(0)
    gradients, losses, scores = noisy(20, generator), torch.rand(20, generator=generator), torch.rand(2, 20)
    exact, at_1, at_2 = (torch.cat([values, torch.ones(3)]) for values in (losses, *scores))
    exact[20], at_1[21], at_2[22] = NAN, -INF, INF
    broken = torch.cat([gradients, noisy(3, generator)])
    control = Control(depths=(1, 2), keeps=(0.5,))
    close(
        record(probe_of(broken, exact, at_1, at_2), 10, control),
        record(probe_of(gradients, losses, *scores), 10, control),
    )


@pytest.mark.parametrize(
    ("gradients", "losses"),
    [
        (torch.zeros(6, 3), torch.rand(6, generator=seeded(0))),
        (torch.ones(6, 3), torch.full((6,), NAN)),
        (torch.ones(6, 3), torch.tensor([1.0, *[-INF] * 5])),
    ],
    ids=["no gradient", "no loss", "one loss"],
)
def test_pools_that_say_nothing_give_nan(gradients, losses):
    numbers = record(probe_of(gradients.double(), losses), 3, ONE)
    assert all(math.isnan(value) for value in numbers.values())


@pytest.mark.parametrize("kept", [1, 3, 5, 8])
def test_names_of_a_record_are_known_whatever_the_pool(kept):
    losses = torch.rand(8, generator=seeded(0))
    for control in (ONE, Control(), Control(depths=(2,), keeps=(0.3, 0.9), rules=("unbiased",))):
        names = record_names(control)
        assert len(set(names)) == len(names)
        scores = dict.fromkeys(control.depths, losses)
        for seen in (losses, torch.full((8,), NAN)):
            numbers = record(Probe(seen, scores, torch.eye(8, dtype=torch.float64)), kept, control)
            assert sorted(numbers) == sorted(names)
            assert all(isinstance(value, float) for value in numbers.values())
    assert record_names(ONE) == record_names(GREEDY)  # whatever may be chosen


# Estimates


def test_concentration_is_the_mean_square_of_the_losses_over_their_squared_mean():
    numbers = record(probe_of(noisy(4, seeded(0)), torch.tensor([0.0, 0.0, 2.0, 2.0])), 2, ONE)
    assert numbers["concentration"] == pytest.approx(2.0)
