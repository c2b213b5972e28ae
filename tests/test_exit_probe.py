"""Probes: scores and steps of slow twins, whatever is chunked, wrapped or compiled; and the model is left alone."""

import copy
import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Generator, nn

import models
import reference
from earlysift import Family, Sifter, exits, passes, probes, scorers
from earlysift.anatomy import find_anatomy
from earlysift.exit_probe import ADAPTER_SHARE, LEARNING_RATE, ExitProbe, features
from earlysift.fidelity import fidelity
from earlysift.ledger import Ledger
from earlysift.measures import LOSS
from earlysift.scorers import Learnt
from models import WIDTH, build, row_of, shorter

INF, NAN = float("inf"), float("nan")
CLASSIFIERS = ["bert", "distilbert", "llama", "vit"]
LANGUAGE = [
    ("bert", "masked_lm"),
    ("llama", "causal_lm"),
    ("gpt2", "causal_lm"),
    ("roberta", "token_classification"),
]
BOTH = [("bert", "sequence_classification"), ("bert", "masked_lm"), ("llama", "causal_lm")]
PROBLEMS = [
    ("single_label", 5, torch.arange(7).remainder(5)),
    ("multi_label", 3, torch.arange(21).reshape(7, 3).remainder(2).float()),
    ("regression", 1, torch.linspace(-1, 1, 7)),
    ("regression", 3, torch.linspace(-1, 1, 21).reshape(7, 3)),
]


def pool_for(model, rows=7, length=12, seed=1):
    return models.batch_for(model, models.task_of(model), rows, length, Generator().manual_seed(seed))


def scores_of(model, pool, probe, depth=2, **options):
    options = {"family": row_of(model), "dtype": None} | options
    return scorers.probe(depth)(model, pool, learnt=Learnt(probes={depth: probe}), **options)


def taught(model, *pools, **options):
    """A probe that has learnt from pools."""
    probe = ExitProbe()
    for pool in pools:
        scores_of(model, pool, probe, **options)
        probe.learn()
    return probe


def weights_of(probe):
    return probe.state_dict()["module"]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def values(state):
    """A state dict as comparable values."""
    if isinstance(state, torch.Tensor):
        return state.tolist()
    return {key: values(value) for key, value in state.items()} if isinstance(state, dict) else state


def inputs_of(pool):
    return {name: rows for name, rows in pool.items() if name != "labels"}


# Slow twins


def twin_features(states, mask=None):
    """Of every sample its first state, and the mean of its others, a position at a time."""
    rows = []
    for i in range(len(states)):
        seen = [states[i, t] for t in range(states.size(1)) if mask is None or mask[i, t]]
        total = sum(seen[1:], start=torch.zeros_like(seen[0]))
        rows.append(torch.cat([seen[0], total / max(len(seen) - 1, 1)]))
    return torch.stack(rows)


def twin_classifier(weights, inputs):
    """Logits of a LayerNorm and two layers, a sample at a time."""
    logits = []
    for x in inputs:
        normed = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weights["0.weight"] + weights["0.bias"]
        hidden = F.gelu(weights["1.weight"] @ normed + weights["1.bias"])
        logits.append(weights["3.weight"] @ hidden + weights["3.bias"])
    return torch.stack(logits)


def twin_adapter(weights, state):
    """A state as the shared head reads it better."""
    x = (
        state
        + weights["down.weight"] @ F.gelu(weights["up.weight"] @ state + weights["up.bias"])
        + weights["down.bias"]
    )
    return (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * weights["norm.weight"] + weights["norm.bias"]


def twin_token_losses(model, pool, weights, depth=2):
    """The loss of every sample, a labelled position at a time, through the head of a really shorter model."""
    short = shorter(model, depth).eval()
    with torch.no_grad():
        states = getattr(short, short.base_model_prefix)(**inputs_of(pool))[0]
    head, shift = passes.head_of(find_anatomy(short)), int(models.task_of(model) == "causal_lm")
    losses = []
    for i, labels in enumerate(pool["labels"].tolist()):
        places = [t for t in range(len(labels) - shift) if labels[t + shift] != -100]
        terms = [
            F.cross_entropy(head(twin_adapter(weights, states[i, t])), torch.tensor(labels[t + shift])) for t in places
        ]
        losses.append(sum(terms) / len(terms))
    return torch.stack(losses)


def states_at(model, pool, depth=2):
    """The output of a layer, as the plain transformers model gives it."""
    with torch.no_grad():
        return copy.deepcopy(model).eval()(**inputs_of(pool), output_hidden_states=True).hidden_states[depth]


def twin_step(weights, loss_of, steps):
    """Weights after steps of AdamW down a loss."""
    leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=LEARNING_RATE, foreach=False)
    for step in range(steps):
        loss_of(leaves, step).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: value.detach() for name, value in leaves.items()}


# Scores


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_scores_of_a_classifier_are_those_of_its_twin_on_the_hidden_states_of_the_plain_model(family):
    model = build(family, "sequence_classification")
    pool = pool_for(model)
    probe = taught(model, pool_for(model, seed=2), pool_for(model, seed=3))
    scores = scores_of(model, pool, probe)
    logits = twin_classifier(weights_of(probe), twin_features(states_at(model, pool), pool.get("attention_mask")))
    close(scores, F.cross_entropy(logits, pool["labels"], reduction="none"))
    assert scores.dtype == torch.float32
    assert not scores.requires_grad


@pytest.mark.parametrize(("problem", "outputs", "labels"), PROBLEMS)
def test_every_kind_of_classification_is_scored_by_its_own_loss(problem, outputs, labels):
    names = {"multi_label": "multi_label_classification", "regression": "regression"}
    model = build("bert", "sequence_classification", num_labels=outputs, problem_type=names.get(problem))
    pool = pool_for(model) | {"labels": labels}
    probe = taught(model, pool)
    scores = scores_of(model, pool, probe)
    logits = twin_classifier(weights_of(probe), twin_features(states_at(model, pool), pool["attention_mask"]))
    close(scores, reference.class_scores(LOSS, logits, labels, problem=problem))


@pytest.mark.parametrize(("family", "task"), LANGUAGE)
def test_scores_of_a_language_model_are_those_of_its_twin_in_front_of_the_shared_head(family, task):
    model = build(family, task)
    pool = pool_for(model)
    probe = taught(model, *(pool_for(model, seed=seed) for seed in range(2, 6)))
    assert weights_of(probe)["down.weight"].abs().max() > 1e-4
    close(scores_of(model, pool, probe), twin_token_losses(model, pool, weights_of(probe)).detach())


def test_a_new_probe_of_a_language_model_only_norms_the_states():
    model = build("bert", "masked_lm")
    pool = pool_for(model)
    norm = exits.ExitHead(WIDTH)
    expected = scorers.early_exit_loss(model, pool, depth=2, exit_head=norm, dtype=None)
    close(scores_of(model, pool, ExitProbe()), expected)


def test_states_without_positions_and_states_of_images_are_features_too():
    vectors, images = torch.randn(3, 4, generator=Generator().manual_seed(0)), torch.arange(24.0).view(1, 2, 3, 4)
    assert torch.equal(features(vectors), vectors)
    assert torch.equal(features(images), torch.tensor([[5.5, 17.5]]))
    assert features(vectors.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("side", ["left", "right"])
def test_features_do_not_depend_on_padding(side):
    states = torch.randn(2, 3, 4, generator=Generator().manual_seed(0))
    junk, ones = torch.full((2, 2, 4), 7.0), torch.ones(2, 3)
    padded = torch.cat([junk, states] if side == "left" else [states, junk], dim=1)
    mask = F.pad(ones, (2, 0) if side == "left" else (0, 2))
    close(features(padded, mask), twin_features(states))
    close(features(padded, mask.long()), features(states))
    single = features(states, torch.tensor([[1, 0, 0], [1, 1, 1]]))
    close(single[0], torch.cat([states[0, 0], torch.zeros(4)]))  # a sample of one position has no others


def sequential(seed=0):
    """A plain model on vectors: features through two layers to three classes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        return nn.Sequential(layers, nn.Linear(6, 3))


VECTORS = Family("0", task="sequence_classification")


def test_a_plain_model_on_vectors_needs_its_row_alone():
    model = sequential()
    pool = torch.randn(7, 6, generator=Generator().manual_seed(0)), torch.arange(7).remainder(3)
    probe = ExitProbe()
    scorers.probe(1)(model, pool, family=VECTORS, dtype=None, learnt=Learnt(probes={1: probe}))
    probe.learn()
    scores = scorers.probe(1)(model, pool, family=VECTORS, dtype=None, learnt=Learnt(probes={1: probe}))
    logits = twin_classifier(weights_of(probe), model[0][0](pool[0]))
    close(scores, F.cross_entropy(logits, pool[1], reduction="none").detach())


@pytest.mark.parametrize(("family", "task"), BOTH)
def test_neither_chunks_nor_trimming_change_scores(family, task):
    model = build(family, task)
    pool = pool_for(model)
    probe = taught(model, pool_for(model, seed=2))
    whole = scores_of(model, pool, probe)
    for options in ({"chunk_rows": 1}, {"chunk_rows": 3}, {"chunk_rows": 3, "trim": True}, {"trim": True}):
        close(scores_of(model, pool, probe, **options), whole)


@pytest.mark.parametrize("options", [{"chunk_rows": 1}, {"chunk_rows": 3, "trim": True}])
def test_a_classifier_learns_the_same_in_chunks(options):
    model = build("bert", "sequence_classification")
    pools = [pool_for(model, seed=seed) for seed in range(3)]
    close(weights_of(taught(model, *pools, **options)), weights_of(taught(model, *pools)), 1e-4)


@pytest.mark.parametrize(("family", "task"), BOTH)
def test_bfloat16_scores_are_float32_and_near(family, task):
    model = build(family, task)
    pools = [pool_for(model, seed=seed) for seed in range(3)]
    exact, near = (scores_of(model, pools[0], taught(model, *pools, dtype=t), dtype=t) for t in (None, torch.bfloat16))
    assert near.dtype == torch.float32
    assert not torch.equal(near, exact)
    close(near, exact, 0.1)


# Learning


@pytest.mark.parametrize("steps", [1, 3])
def test_steps_of_a_classifier_are_those_of_adamw_on_the_features(steps):
    model = build("bert", "sequence_classification")
    pools = [pool_for(model, seed=seed) for seed in range(steps)]
    new = ExitProbe()
    scores_of(model, pools[0], new)
    inputs = [twin_features(states_at(model, pool), pool["attention_mask"]) for pool in pools]

    def loss_of(weights, step):
        return F.cross_entropy(twin_classifier(weights, inputs[step]), pools[step]["labels"])

    close(weights_of(taught(model, *pools)), twin_step(weights_of(new), loss_of, steps), 1e-4)


@pytest.mark.parametrize(("family", "task"), LANGUAGE)
def test_steps_of_a_language_models_probe_are_those_of_adamw_on_one_row_of_thirty_two(family, task):
    model = build(family, task)
    pools = [pool_for(model, rows=20, length=6, seed=seed) for seed in range(2)]
    new = ExitProbe()
    scores_of(model, pools[0], new)

    def loss_of(weights, step):
        first = {name: rows[: -(-20 // ADAPTER_SHARE)] for name, rows in pools[step].items()}
        return twin_token_losses(model, first, weights).mean()

    close(weights_of(taught(model, *pools)), twin_step(weights_of(new), loss_of, 2), 1e-4)


def scrambled():
    """A model whose first layer knows the label, in a place where its head does not look for it."""
    model = sequential()
    with torch.no_grad():
        for layer, shift in zip(model[0], (0, 3), strict=True):
            layer.weight.copy_(torch.eye(6).roll(shift, dims=0))
            layer.bias.zero_()
        model[1].weight.copy_(torch.cat([torch.zeros(3, 3), 4 * torch.eye(3)], dim=1))
        model[1].bias.zero_()
    return model.train()


def told_apart(seed, rows=64):
    """The first three features tell the class, and labels of some samples are wrong."""
    generator = Generator().manual_seed(seed)
    inputs = torch.randn(rows, 6, generator=generator)
    wrong = torch.rand(rows, generator=generator) < 0.2
    labels = inputs[:, :3].argmax(dim=1)
    return inputs, torch.where(wrong, (labels + 1) % 3, labels)


def test_a_probe_ranks_better_than_the_shared_head_once_it_has_learnt():
    model = scrambled()
    sifter = Sifter(model, keep=0.5, score="probe", family=VECTORS, probe_every=1, dtype=None)
    for seed in range(150):
        sifter.sift(told_apart(seed))
    pool = told_apart(1000)
    exact = scorers.exact_loss(model, pool, family=VECTORS, dtype=None)
    shared = fidelity(scorers.early_exit_loss(model, pool, family=VECTORS, dtype=None), exact, 32)
    assert shared["rank_correlation"] < 0.3
    assert sifter.stats()["sift/rank_correlation"] > 0.8
    assert sifter.stats()["sift/gain"] > shared["gain"]


@pytest.mark.parametrize("labels", ["single", "several"])
def test_unlabelled_samples_come_last_and_teach_nothing(labels):
    outputs = {"single": {}, "several": {"num_labels": 3, "problem_type": "multi_label_classification"}}[labels]
    model = build("bert", "sequence_classification", **outputs)
    pool = pool_for(model)
    if labels == "several":
        pool["labels"] = torch.arange(21).reshape(7, 3).remainder(2).float()
    pool["labels"][3] = -100
    others = [0, 1, 2, 4, 5, 6]
    scores = scores_of(model, pool, ExitProbe())
    assert (scores == -INF).tolist() == [row == 3 for row in range(7)]
    rest = {name: rows[others] for name, rows in pool.items()}
    close(weights_of(taught(model, pool)), weights_of(taught(model, rest)))


@pytest.mark.parametrize(("family", "task"), BOTH)
def test_a_sample_whose_loss_is_not_finite_stays_alone_with_it(family, task):
    model = build(family, task)
    pool = pool_for(model)
    del pool["input_ids"]
    pool["inputs_embeds"] = torch.randn(7, 12, WIDTH, generator=Generator().manual_seed(0))
    clean = scores_of(model, pool, ExitProbe())
    pool["inputs_embeds"][2, 1] = NAN
    probe = taught(model, pool)
    scores = scores_of(model, pool, ExitProbe())
    others = [0, 1, 3, 4, 5, 6]
    assert torch.isnan(scores[2])
    close(scores[others], clean[others])
    rest = {name: rows[others] for name, rows in pool.items()}
    close(weights_of(probe), weights_of(taught(model, rest)), 1e-4)


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
def test_losses_that_are_not_finite_teach_nothing(broken):
    def learnt(losses_of):
        probe = ExitProbe()
        for step in range(3):
            inputs = torch.randn(5, 4, generator=Generator().manual_seed(step))
            losses = F.cross_entropy(probe.classify(inputs, classes=3), torch.arange(5) % 3, reduction="none")
            probe.propose(losses_of(losses))
            probe.learn()
        return weights_of(probe)

    index = torch.tensor([1, 4])
    filled = learnt(lambda losses: losses.index_fill(0, index, broken))
    close(filled, learnt(lambda losses: losses[[0, 2, 3]]))
    before = weights_of(built())
    nothing = learnt(lambda losses: losses * broken)
    close(nothing, before, 1e-4)  # but for the decay of the weights


def built():
    """A probe that has yet to learn."""
    probe = ExitProbe()
    probe.classify(torch.randn(5, 4, generator=Generator().manual_seed(0)), classes=3)
    return probe


def test_a_probe_begins_anew_when_its_states_change_their_width():
    probe = ExitProbe()
    for width in (4, 6):
        losses = probe.classify(torch.ones(2, width), classes=3).square().mean(dim=1)
        probe.propose(losses)
        probe.learn()
    assert probe.state_dict()["shape"] == ["classifier", 6, 3]


# Guests


def test_the_gradients_of_the_model_stay_absent_and_its_layers_run_once():
    for family, task in BOTH:
        model = build(family, task)
        calls = []
        layer = find_anatomy(model).layers[0]
        with layer.register_forward_hook(lambda *_, calls=calls: calls.append(1)):
            taught(model, pool_for(model), pool_for(model, seed=2))
        assert len(calls) == 2
        assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize(("family", "task"), BOTH)
def test_scoring_within_the_autocast_of_the_user_leaves_gradients_as_without(family, task):
    def gradients(score):
        model = build(family, task)
        batch = pool_for(model)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            if score:
                taught(model, batch)
            loss = models.loss_of(model, batch)
        loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    with_scoring, without = gradients(True), gradients(False)
    for name, gradient in without.items():
        assert (with_scoring[name] is None) == (gradient is None), name
        assert gradient is None or torch.equal(with_scoring[name], gradient), name


def test_a_probe_belongs_to_a_sifter():
    model = build("bert", "masked_lm")
    with pytest.raises(ValueError, match=r"A probe belongs to a Sifter with score='probe' or score='blend'"):
        scorers.probe(1)(model, pool_for(model))


def test_a_seed_gives_the_same_probe_whatever_is_drawn_elsewhere():
    def weights(seed, kind):
        torch.rand(3)
        probe = ExitProbe(seed)
        probe.adapt(torch.zeros(2, 4)) if kind == "adapter" else probe.classify(torch.zeros(2, 4), classes=3)
        return torch.cat([value.flatten() for value in weights_of(probe).values()])

    for kind in ("classifier", "adapter"):
        assert torch.equal(weights(1, kind), weights(1, kind))
        assert not torch.equal(weights(1, kind), weights(2, kind))


# Wrapped models


@pytest.mark.parametrize(("family", "task"), BOTH)
def test_a_compiled_model_scores_alike_and_compiles_once(family, task, recorded):
    backend, graphs = recorded
    model = build(family, task)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    plain, by_compiled, made = ExitProbe(), ExitProbe(), []
    for seed in range(3):
        pool = pool_for(model, seed=seed)
        close(scores_of(compiled, pool, by_compiled), scores_of(model, pool, plain))
        by_compiled.learn()
        plain.learn()
        made.append(len(graphs))
    assert made == [made[0]] * 3
    assert made[0] > 0


@pytest.mark.parametrize(("family", "task"), BOTH)
@pytest.mark.usefixtures("process_group")
def test_a_model_in_data_parallel_scores_alike(family, task):
    model = build(family, task)
    pool = pool_for(model)
    wrapped = nn.parallel.DistributedDataParallel(model)
    assert torch.equal(scores_of(wrapped, pool, ExitProbe()), scores_of(model, pool, ExitProbe()))
    sifter = Sifter(wrapped, keep=0.5, score="probe", dtype=None)
    for seed in range(2):
        sifter.loss(sifter.sift(pool_for(model, rows=8, seed=seed))).backward()
    assert all(p.grad is not None for p in find_anatomy(model).layers[3].parameters())


# State


def trained_probe(kind="classifier", steps=2):
    probe = ExitProbe()
    for step in range(steps):
        inputs = torch.randn(6, 4, generator=Generator().manual_seed(step))
        output = probe.classify(inputs, classes=3) if kind == "classifier" else probe.adapt(inputs)
        probe.propose(output.square().mean(dim=1) + output[:, 0])
        probe.learn()
    return probe


@pytest.mark.parametrize("kind", ["classifier", "adapter"])
def test_a_loaded_probe_goes_on_as_the_saved_one(kind):
    saved, loaded = trained_probe(kind), ExitProbe(5)
    state = saved.state_dict()
    before = copy.deepcopy(values(state))
    assert ExitProbe().state_problems(state) == ExitProbe().state_problems({}) == []
    loaded.load_state_dict(state)
    assert values(loaded.state_dict()) == before
    for probe in (saved, loaded):
        inputs = torch.ones(2, 4)
        output = probe.classify(inputs, classes=3) if kind == "classifier" else probe.adapt(inputs)
        probe.propose(output.exp().mean(dim=1))
        probe.learn()
    assert values(loaded.state_dict()) == values(saved.state_dict()) != before
    assert values(state) == before


def test_loading_the_state_before_the_first_pool_begins_anew():
    probe = trained_probe()
    probe.load_state_dict(ExitProbe().state_dict())
    assert probe.state_dict() == {}
    probe.classify(torch.zeros(2, 4), classes=3)
    close(weights_of(probe), weights_of(built()))


def broken(change):
    state = trained_probe().state_dict()
    optimizer = state["optimizer"]
    if change == "moments":
        optimizer["state"][1]["exp_avg"] = torch.zeros(3)
    elif change == "step":
        optimizer["state"][1]["step"] = "soon"
    elif change == "hyperparameters":
        optimizer["param_groups"][0]["betas"] = "x"
    elif change == "weights":
        state["module"]["1.weight"] = torch.zeros(2, 2)
    elif change == "huge":
        state["shape"] = ["classifier", 10**12, 3]
    return state


BROKEN = {
    "nothing": (None, "probe must hold shape, module and optimizer"),
    "text": ("x", "probe must hold"),
    "another key": ({"shape": ["classifier", 4, 3]}, "probe must hold"),
    "another kind": (
        lambda: trained_probe().state_dict() | {"shape": ["lazy", 4, 3]},
        "probe.shape must be a kind and",
    ),
    "no size": (lambda: trained_probe().state_dict() | {"shape": ["classifier", 0, 3]}, "probe.shape must be a kind"),
    "another size": (lambda: trained_probe().state_dict() | {"shape": ["classifier", 5, 3]}, "that of its module"),
    "huge": (lambda: broken("huge"), "that of its module"),
    "no weights": (lambda: trained_probe().state_dict() | {"module": {}}, "probe cannot be loaded"),
    "weights of text": (lambda: trained_probe().state_dict() | {"module": "x"}, "probe cannot be loaded"),
    "other weights": (lambda: broken("weights"), "probe cannot be loaded"),
    "no optimizer": (lambda: trained_probe().state_dict() | {"optimizer": {}}, "probe cannot be loaded"),
    "other moments": (lambda: broken("moments"), "moments of the shape of the module's weights"),
    "step is text": (lambda: broken("step"), "moments of the shape|probe cannot be loaded"),
    "hyperparameters": (lambda: broken("hyperparameters"), "probe cannot be loaded"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_state_is_refused_in_one_sentence(name):
    state, message = BROKEN[name]
    problems = ExitProbe().state_problems(state() if callable(state) else state)
    assert len(problems) == 1
    assert re.search(message, problems[0])
    assert "\n" not in problems[0]


# Lessons: learning from the forward pass of training


def lessons(model, probes, batch, ledger=None):
    """Losses of a training pass, within a lesson."""
    with scorers.lesson(model, batch, probes, row_of(model), ledger or Ledger()):
        return scorers.training_loss(model, batch, family=row_of(model))


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_a_lesson_teaches_what_scoring_the_batch_would_have_taught_at_every_depth(family):
    model = build(family, "sequence_classification")
    batches = [pool_for(model, seed=seed) for seed in range(3)]
    probes = {depth: ExitProbe() for depth in (1, 2)}
    for batch in batches:
        lessons(model, probes, batch)
    for depth, probe in probes.items():
        expected = weights_of(taught(model, *batches, depth=depth))
        for name, weight in weights_of(probe).items():
            close(weight, expected[name])


def test_a_lesson_changes_nothing_about_training_and_leaves_no_hook():
    model, twin = (build("bert", "sequence_classification", dropout=0.1) for _ in range(2))
    batch = pool_for(model)
    torch.manual_seed(3)
    loss = scorers.training_loss(twin, batch)
    loss.backward()
    torch.manual_seed(3)
    within = lessons(model, {1: ExitProbe(), 2: ExitProbe()}, batch)
    within.backward()
    assert torch.equal(within, loss)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)
    assert not any(module._forward_hooks for module in model.modules())


def test_a_compiled_model_is_not_looked_into(recorded):
    backend, graphs = recorded
    model = torch.compile(build("bert", "sequence_classification"), backend=backend, dynamic=False)
    probe, batch = ExitProbe(), pool_for(model._orig_mod)
    scorers.training_loss(model, batch)
    before = len(graphs)
    with scorers.lesson(model, batch, {1: probe}, None, Ledger()):
        scorers.training_loss(model, batch)
    assert not probe.is_taught
    assert len(graphs) == before


def test_a_forward_pass_that_fails_teaches_nothing_and_its_error_is_the_users():
    model, probe = build("bert", "sequence_classification"), ExitProbe()
    batch = pool_for(model)
    with pytest.raises(RuntimeError, match="of the loop"), scorers.lesson(model, batch, {1: probe}, None, Ledger()):
        raise RuntimeError("of the loop")
    assert not probe.is_taught
    assert not any(module._forward_hooks for module in model.modules())


def test_other_passes_within_a_lesson_do_not_mix_up_the_layers():
    model, batch = build("bert", "sequence_classification"), pool_for(build("bert", "sequence_classification"))
    plain, disturbed = ({depth: ExitProbe() for depth in (1, 2, 3)} for _ in range(2))
    lessons(model, plain, batch)
    with scorers.lesson(model, batch, disturbed, None, Ledger()):
        scorers.training_loss(model, batch)
        scorers.training_loss(model, batch, depth=1)  # as a joint loss of an exit would
    for depth in plain:
        for name, weight in weights_of(plain[depth]).items():
            assert torch.equal(weights_of(disturbed[depth])[name], weight)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_leaves_a_lesson_as_it_is(reentrant):
    model, batch = build("bert", "sequence_classification"), pool_for(build("bert", "sequence_classification"))
    plain, checkpointed = ({depth: ExitProbe() for depth in (1, 2)} for _ in range(2))
    lessons(model, plain, batch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it will have another name
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    with scorers.lesson(model, batch, checkpointed, None, Ledger()):
        scorers.training_loss(model, batch).backward()
    for depth in plain:
        for name, weight in weights_of(plain[depth]).items():
            close(weights_of(checkpointed[depth])[name], weight)


def test_a_model_that_returns_a_tuple_and_a_pass_of_other_rows_do_no_harm():
    model, batch = build("bert", "sequence_classification"), pool_for(build("bert", "sequence_classification"))
    by_tuple, by_rows = ExitProbe(), ExitProbe()
    with scorers.lesson(model, batch, {1: by_tuple}, None, Ledger()):
        model(**batch, return_dict=False)
    assert by_tuple.is_taught
    with scorers.lesson(model, batch, {1: by_rows}, None, Ledger()):
        model(**{name: rows[:3] for name, rows in batch.items()})
    assert not by_rows.is_taught


def test_held_out_samples_teach_nothing():
    model = build("bert", "sequence_classification")
    sifter = Sifter(model, keep=0.5, mode="auto", dtype=None)
    batch = sifter.sift(pool_for(model, rows=8))
    model.eval()
    sifter.loss(batch)
    with torch.no_grad():
        model.train()
        sifter.loss(batch)
    assert sifter.state_dict()["probe_1"] == {}
    sifter.loss(batch)
    assert sifter.state_dict()["probe_1"] != {}


def test_probes_of_auto_mode_learn_at_every_second_step_at_first_and_only_from_uniform_batches():
    model = build("bert", "sequence_classification")
    sifter = Sifter(model, keep=0.5, mode="auto", dtype=None)
    taught_at, before = [], {}
    for step in range(6):
        sifter.loss(sifter.sift(pool_for(model, rows=8, seed=step)))
        state = values({name: part for name, part in sifter.state_dict().items() if name.startswith("probe_")})
        taught_at += [step] if state != before else []
        before = state
    assert taught_at == [0, 2, 4]
    assert set(before) == {"probe_1", "probe_2", "probe_3"} & {
        f"probe_{d}" for d in range(1, len(find_anatomy(model).layers))
    }
    sifter.sift(pool_for(model, rows=8, seed=9))
    sifter.latest = sifter.latest._replace(scores=torch.ones(4))  # as if it had been chosen by scores
    sifter.loss(pool_for(model, rows=4))
    assert values({name: part for name, part in sifter.state_dict().items() if name.startswith("probe_")}) == before


def test_a_loop_of_ones_own_teaches_by_its_own_forward_pass():
    model = build("bert", "sequence_classification")
    by_loss, by_hand = (Sifter(model, keep=0.5, mode="auto", dtype=None) for _ in range(2))
    for step in range(3):
        pool = pool_for(model, rows=8, seed=step)
        by_loss.loss(by_loss.sift(pool))
        batch = by_hand.sift(pool)
        with by_hand.lesson(batch):
            model(**batch)
    assert values(by_loss.state_dict()["probe_1"]) == values(by_hand.state_dict()["probe_1"])


def test_language_models_and_other_scores_have_exits_read_by_their_own_head():
    for model, options in (
        (build("bert", "masked_lm"), {}),
        (build("bert", "sequence_classification"), {"score": "entropy"}),
    ):
        sifter = Sifter(model, keep=0.5, mode="auto", dtype=None, **options)
        sifter.loss(sifter.sift(pool_for(model, rows=8)))
        assert not any(name.startswith("probe_") for name in sifter.state_dict())


def test_a_probe_of_auto_mode_tells_what_the_taught_probes_tell_and_the_head_where_none_is_taught():
    model = build("bert", "sequence_classification")
    pool = pool_for(model, rows=8)
    learnt = Learnt(probes={1: taught(model, pool, depth=1), 2: ExitProbe()})
    seen = probes.probe(model, pool, depths=[1, 2], learnt=learnt, dtype=None)
    close(seen.scores[1], scores_of(model, pool, learnt.probes[1], depth=1))
    close(seen.scores[2], scorers.early_exit_loss(model, pool, depth=2, dtype=None))
    assert not learnt.probes[2].is_taught
