"""Exits: the cut model equals a really shorter one, exactly `depth` layers run, and everything is put back."""

import copy
import itertools
import warnings
from contextlib import nullcontext

import pytest
import torch
from torch import Generator, nn

import models
from earlysift import Sifter, exits, families, losses, passes, scorers
from earlysift.anatomy import find_anatomy, unwrap
from earlysift.checks import check
from earlysift.exits import ExitHead, truncated
from earlysift.families import Family
from layer_calls import expected_calls, layer_calls
from models import (
    ALL,
    BUILDERS,
    FEW,
    LAYERS,
    TRANSFORMERS,
    WIDTH,
    batch_of,
    build,
    inputs_of,
    logits_of,
    loss_of,
    row_of,
    sample_losses,
    shorter,
    structure,
)

# The same model, shorter


@pytest.mark.parametrize(("family", "task"), ALL)
def test_cut_model_equals_a_really_shorter_one(family, task):
    model = build(family, task)
    batch = batch_of(model)
    losses = [loss_of(model, batch)]
    for depth in (1, 2, 3):
        with truncated(model, depth, family=row_of(model)):
            losses.append(loss_of(model, batch))
        assert torch.equal(losses[-1], loss_of(shorter(model, depth), batch))
    losses.append(loss_of(model, batch))
    assert torch.equal(losses[0], losses[-1])
    assert min(abs(a - b) for a, b in itertools.pairwise(losses)) > 1e-3  # weights wide enough to see a difference


@pytest.mark.parametrize(("family", "task"), FEW)
def test_cut_model_has_the_gradients_of_a_really_shorter_one(family, task):
    model = build(family, task)
    batch = batch_of(model)
    short = shorter(model, 2)
    with truncated(model, 2, family=row_of(model)):
        loss_of(model, batch).backward()
    loss_of(short, batch).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, parameter in short.named_parameters():
        assert torch.equal(gradients.pop(name), parameter.grad), name
    assert gradients == {}


def test_all_layers_are_the_full_model():
    model = build("bert", "masked_lm")
    batch = batch_of(model)
    with truncated(model, LAYERS):
        assert torch.equal(loss_of(model, batch), model(**batch).loss)


def test_cuts_nest():
    model = build("plain", "masked_lm")
    with truncated(model, 3, family=row_of(model)):
        with truncated(model, 1, family=row_of(model)):
            assert len(model.blocks) == 1
        assert len(model.blocks) == 3
    assert len(model.blocks) == LAYERS


def captured(model, depth):
    """The outputs of the first layers of a full forward pass."""
    with exits.captured(find_anatomy(model, row_of(model)), depth) as outputs:
        model(**inputs_of(model))
    return list(outputs.values())


@pytest.mark.parametrize(("family", "task"), ALL)
def test_replayed_layers_give_the_cut_model_and_run_no_layer(family, task):
    model = build(family, task)
    anatomy, inputs = find_anatomy(model, row_of(model)), inputs_of(model)
    with layer_calls(model, row_of(model)) as calls:
        outputs = captured(model, 3)
        assert calls == [1] * LAYERS
    assert len(outputs) == 3
    for depth in (1, 2, 3):
        for exit_head in (None, models.widen(ExitHead(WIDTH))):
            with truncated(model, depth, family=row_of(model), exit_head=exit_head):
                expected = logits_of(model(**inputs))
            with (
                layer_calls(model, row_of(model)) as calls,
                exits.replayed(anatomy, outputs[:depth], exit_head=exit_head),
            ):
                assert len(anatomy.layers) == depth
                assert torch.equal(logits_of(model(**inputs)), expected)
            assert calls == [0] * LAYERS


def test_what_stands_in_a_layers_place_has_its_attributes():
    model = build("modernbert", "masked_lm")
    anatomy = find_anatomy(model)
    kinds = [layer.attention_type for layer in anatomy.layers]
    assert len(set(kinds)) > 1
    for exit_head in (None, ExitHead(WIDTH)):
        with exits.replayed(anatomy, captured(model, 3), exit_head=exit_head):
            assert [layer.attention_type for layer in anatomy.layers] == kinds[:3]
            with pytest.raises(AttributeError, match="nonsense"):
                _ = anatomy.layers[0].nonsense


# Exactly `depth` layers run


@pytest.mark.parametrize(("family", "task"), ALL)
def test_scoring_runs_exactly_depth_layers(family, task):
    model = build(family, task)
    for depth in (1, 3):
        with layer_calls(model, row_of(model)) as calls:
            scorers.early_exit_loss(model, batch_of(model), depth=depth, family=row_of(model), dtype=None)
        assert calls == expected_calls(depth)


@pytest.mark.parametrize(("family", "task"), ALL)
def test_scoring_runs_exactly_depth_layers_in_bfloat16_autocast(family, task):
    model = build(family, task)
    batch = batch_of(model)
    exact = scorers.early_exit_loss(model, batch, depth=2, family=row_of(model), dtype=None)
    with layer_calls(model, row_of(model)) as calls:
        scores = scorers.early_exit_loss(model, batch, depth=2, family=row_of(model), dtype=torch.bfloat16)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            users = scorers.early_exit_loss(model, batch, depth=2, family=row_of(model), dtype=None)
    assert calls == expected_calls(2, times=2)
    assert scores.dtype == users.dtype == torch.float32
    assert torch.equal(scores, users)
    assert not torch.equal(scores, exact)
    torch.testing.assert_close(scores, exact, rtol=0.1, atol=0.3)


@pytest.mark.parametrize(
    ("family", "task", "how"),
    [
        ("bert", "masked_lm", "torch.compile(model)"),
        ("bert", "sequence_classification", "model.compile()"),
        ("modernbert", "masked_lm", "torch.compile(model)"),
        ("gpt2", "causal_lm", "model.compile()"),
        ("llama", "causal_lm", "torch.compile(model)"),
        ("llama", "causal_lm", "model.compile()"),
        ("plain", "masked_lm", "torch.compile(model)"),
        ("plain", "masked_lm", "model.compile()"),
    ],
)
def test_scoring_runs_exactly_depth_layers_when_compiled(family, task, how):
    torch.compiler.reset()
    model = build(family, task)
    row, batch = row_of(model), batch_of(model)
    reference = sample_losses(shorter(model, 2).eval(), batch)
    full_logits = logits_of(model(**inputs_of(model)))
    if how == "torch.compile(model)":
        compiled = torch.compile(model, backend="eager")
    else:
        model.compile(backend="eager")
        compiled = model
    with layer_calls(model, row) as calls:
        for _ in range(2):
            assert check(compiled, depth=2, family=row, inputs=inputs_of(model)) == []
            calls[:] = [0] * LAYERS
            scores = scorers.early_exit_loss(compiled, batch, depth=2, family=row, dtype=None)
            assert calls == expected_calls(2)
            torch.testing.assert_close(scores, reference, rtol=1e-5, atol=1e-5)
            calls[:] = [0] * LAYERS
            logits = logits_of(compiled(**inputs_of(model)))  # and all of them when training
            assert calls == [1] * LAYERS
            torch.testing.assert_close(logits, full_logits, rtol=1e-5, atol=1e-5)
            assert logits.requires_grad
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("family", "task", "with_exit_head"),
    [("bert", "masked_lm", False), ("llama", "causal_lm", True), ("plain", "masked_lm", True)],
)
def test_compiled_scoring_and_training_make_no_new_graphs_after_the_first_step(family, task, with_exit_head, recorded):
    backend, graphs = recorded
    model = build(family, task)
    row, batch = row_of(model), batch_of(model)
    compiled = torch.compile(model, backend=backend)
    exit_head = ExitHead(WIDTH, hidden=4) if with_exit_head else None
    made = []
    for _ in range(4):
        scorers.early_exit_loss(compiled, batch, depth=2, family=row, exit_head=exit_head, dtype=None)
        logits_of(compiled(**{key: value for key, value in batch.items() if key != "labels"})).sum().backward()
        made.append(len(graphs))
        assert check(compiled, depth=2, family=row, inputs=inputs_of(model)) == []
        assert len(graphs) == made[-1]  # the check compiles nothing
    assert made[1:] == [made[0]] * 3 != [0] * 3


POSITIONWISE = [
    (family, task)
    for family, task in BUILDERS
    if family in families.FAMILIES and families.FAMILIES[family].positionwise and task != "sequence_classification"
]


@pytest.mark.parametrize("max_positions", [None, 2])
@pytest.mark.parametrize("exit_head", [False, True])
@pytest.mark.parametrize(("family", "task"), POSITIONWISE)
def test_behind_its_attention_the_layer_at_the_exit_runs_at_the_positions_that_are_read(
    family, task, exit_head, max_positions
):
    model = build(family, task)
    anatomy, pool = find_anatomy(model), batch_of(model)
    before = [{name: id(module) for name, module in layer.named_modules()} for layer in anatomy.layers]
    seen = {}
    handles = [
        anatomy.layers[place]
        .get_submodule(name)
        .register_forward_pre_hook(
            lambda module, inputs, key=(place, name): seen.update({key: inputs[0].shape[:-1].numel()})
        )
        for place in (0, 1)
        for chain in anatomy.positionwise
        for name in chain
    ]
    options = {"depth": 2, "dtype": None, "exit_head": ExitHead(WIDTH) if exit_head else None}
    scorers.early_exit_loss(model, pool, max_positions=max_positions, **options)
    for handle in handles:
        handle.remove()
    read = losses.positions_to_read(pool["labels"], causal=task == "causal_lm", max_positions=max_positions)
    assert len(read) < pool["labels"].numel()
    names = [name for chain in anatomy.positionwise for name in chain]
    assert seen == {(0, name): pool["labels"].numel() for name in names} | {(1, name): len(read) for name in names}
    after = [{name: id(module) for name, module in layer.named_modules()} for layer in anatomy.layers]
    assert after == before


@pytest.mark.parametrize(("family", "task"), POSITIONWISE)
def test_states_at_the_positions_that_are_read_are_those_of_the_whole_layer(family, task):
    model = build(family, task).eval()
    anatomy, inputs, labels = find_anatomy(model), inputs_of(model), batch_of(model)["labels"]
    places = losses.positions_to_read(labels, causal=task == "causal_lm")
    with torch.no_grad(), exits.shortened(anatomy, 2), exits.headless(anatomy):
        whole = passes.call(model, inputs)
        with exits.at_positions(anatomy, 2, places, labels.shape):
            few = passes.call(model, inputs)
    assert whole.shape == few.shape
    torch.testing.assert_close(few.flatten(0, 1)[places], whole.flatten(0, 1)[places], rtol=1e-5, atol=1e-5)


def test_a_failure_within_leaves_position_wise_modules_in_their_places():
    model = build("bert", "masked_lm")
    anatomy = find_anatomy(model)
    before = dict(model.named_modules())
    with (
        pytest.raises(RuntimeError, match="within"),
        exits.at_positions(anatomy, 1, torch.tensor([0]), torch.Size([1, 1])),
    ):
        raise RuntimeError("within")
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    ("setting", "thinned"), [({}, True), ({"conv_kernel_size": 3}, False), ({"chunk_size_feed_forward": 4}, False)]
)
def test_no_layer_is_thinned_out_that_needs_all_positions(setting, thinned):
    from transformers import BertConfig, BertForMaskedLM, DebertaV2Config, DebertaV2ForMaskedLM

    chunked = "chunk_size_feed_forward" in setting
    config, cls = (BertConfig, BertForMaskedLM) if chunked else (DebertaV2Config, DebertaV2ForMaskedLM)
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng():
        model = cls(config(**sizes, **setting, num_hidden_layers=3)).train()
    assert bool(find_anatomy(model).positionwise) == thinned
    pool = {"input_ids": torch.arange(16).reshape(2, 8), "labels": torch.full((2, 8), -100)}
    pool["labels"][:, 2] = 7
    expected = sample_losses(shorter(model, 1).eval(), pool)
    torch.testing.assert_close(scorers.early_exit_loss(model, pool, dtype=None), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("max_positions", "thinned"), [(None, False), (3, True)])
def test_compiled_scoring_makes_no_new_graphs_for_other_labels(max_positions, thinned, recorded):
    backend, graphs = recorded
    model = build("bert", "masked_lm")
    compiled = torch.compile(model, backend=backend, dynamic=False)
    anatomy = find_anatomy(model)
    assert exits.skips_unlabelled(compiled, anatomy, max_positions) == thinned
    assert exits.skips_unlabelled(model, anatomy, max_positions)
    made = []
    for seed in range(4):
        pool = batch_of(model, seed=seed)
        options = {"depth": 2, "dtype": None, "max_positions": max_positions}
        scores = scorers.early_exit_loss(compiled, pool, **options)
        torch.testing.assert_close(scores, scorers.early_exit_loss(model, pool, **options), rtol=1e-5, atol=1e-5)
        made.append(len(graphs))
    assert made == [made[0]] * 4
    assert made[0] > 0


def test_a_compiled_scorer_of_a_plain_model_compiles_each_depth_once_whatever_is_kept(recorded):
    backend, graphs = recorded
    model = build("bert", "masked_lm")
    pool = batch_of(model, rows=8)
    compiled = torch.compile(model, backend=backend, dynamic=False)
    made = []
    for _ in range(2):
        for depth in (1, 2):
            for keep in (0.25, 0.5):
                sifter = Sifter(compiled, depth=depth, keep=keep, chunk_rows=4, dtype=None, probe_every=0)
                rows = sifter.sift(pool)
                model(**rows).loss.backward()  # training stays uncompiled
                made.append(len(graphs))
    assert made[:2] == [made[0]] * 2
    assert made[2:] == [made[2]] * 6
    assert 0 < made[0] < made[2]


def test_scoring_runs_exactly_depth_layers_prepared_by_accelerate_in_bfloat16():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    try:
        model = build("llama", "causal_lm")
        batch = batch_of(model)
        reference = sample_losses(shorter(model, 2).eval(), batch)
        prepared = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(model)
        assert "forward" in vars(unwrap(prepared))  # bound to the instance: what a copy would run in full
        with layer_calls(prepared) as calls:
            assert check(prepared, depth=2, inputs=inputs_of(model)) == []
            calls[:] = [0] * LAYERS
            scores = scorers.early_exit_loss(prepared, batch, depth=2, dtype=None)
        assert calls == expected_calls(2)
        assert not torch.equal(scores, reference)  # it was bfloat16
        torch.testing.assert_close(scores, reference, rtol=0.1, atol=0.3)
    finally:
        AcceleratorState._reset_state(True)


def distributed(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.parallel.DistributedDataParallel(model)


def test_scoring_runs_exactly_depth_layers_in_distributed_data_parallel(process_group):
    model = build("bert", "masked_lm")
    batch = batch_of(model)
    reference = sample_losses(shorter(model, 2).eval(), batch)
    wrapped = distributed(model)
    with layer_calls(wrapped) as calls:
        assert check(wrapped, depth=2, inputs=inputs_of(model)) == []
        calls[:] = [0] * LAYERS
        scores = scorers.early_exit_loss(wrapped, batch, depth=2, dtype=None)
    assert calls == expected_calls(2)
    torch.testing.assert_close(scores, reference, rtol=1e-5, atol=1e-5)


def synchronizations(wrapped):
    """A list that grows by one for every bucket of gradients that DistributedDataParallel reduces."""
    seen = []

    def hook(state, bucket):
        seen.append(bucket.index())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    wrapped.register_comm_hook(None, hook)
    return seen


def test_scoring_leaves_the_synchronization_of_gradients_alone(process_group):
    model = build("bert", "masked_lm")
    batch = batch_of(model)
    wrapped = distributed(model)
    seen = synchronizations(wrapped)
    scorers.early_exit_loss(wrapped, batch, depth=2, dtype=None)
    assert seen == []
    for _ in range(2):
        wrapped(**batch).loss.backward()
        scorers.early_exit_loss(wrapped, batch, depth=2, dtype=None)
    assert seen == [0, 0]


def test_training_loss_synchronizes_gradients_in_distributed_data_parallel(process_group):
    model = build("bert", "masked_lm")
    batch = batch_of(model)
    wrapped = distributed(model)
    seen = synchronizations(wrapped)
    scorers.training_loss(wrapped, batch).backward()
    assert seen == [0]


def test_joint_loss_synchronizes_gradients_once_in_distributed_data_parallel(process_group):
    model = build("bert", "masked_lm")
    batch = batch_of(model)
    wrapped = distributed(model)
    seen = synchronizations(wrapped)
    (wrapped(**batch).loss + 0.3 * scorers.training_loss(wrapped, batch, depth=2)).backward()
    assert seen == [0]


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (1,))
    for layer in find_anatomy(model).layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_scoring_runs_exactly_depth_layers_of_a_sharded_model_and_leaves_its_gradients_exact(process_group):
    plain, model = build("bert", "masked_lm"), sharded(build("bert", "masked_lm"))
    batch = batch_of(plain)
    with layer_calls(model) as calls:
        scores = scorers.early_exit_loss(model, batch, depth=2, dtype=None)
    assert calls == expected_calls(2)
    assert torch.equal(scores, scorers.early_exit_loss(plain, batch, depth=2, dtype=None))
    model(**batch).loss.backward()
    plain(**batch).loss.backward()
    for parameter, expected in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter.grad.full_tensor(), expected.grad)


@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
def test_layers_left_out_of_the_first_pass_of_a_sharded_model_stay_part_of_it(process_group):
    def roots(model):
        model(**batch)
        return [
            name
            for name, part in model.named_modules()
            if getattr(part, "_get_fsdp_state", None) and part._get_fsdp_state()._is_root
        ]

    batch = batch_of(build("bert", "masked_lm"))
    assert roots(sharded(build("bert", "masked_lm"))) == [""]
    model = sharded(build("bert", "masked_lm"))
    scorers.early_exit_loss(model, batch, depth=2, dtype=None)
    assert roots(model) == [""]  # else they lose the overlap of communication with computation


# Everything is put back


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("end", ["exception", "normal"])
@pytest.mark.parametrize(
    "part",
    [
        "truncated",
        "truncated with exit head",
        "captured",
        "replayed",
        "replayed with exit head",
        "headless",
        "scoring_mode",
    ],
)
@pytest.mark.parametrize(("family", "task"), [*FEW, pytest.param("distilbert", "masked_lm", id="distilbert")])
def test_model_is_put_back(family, task, part, end):
    model = build(family, task)
    row = row_of(model)
    find_anatomy(model, row).layers[1].eval()  # a frozen part
    outputs = captured(model, 2)
    before, weights = structure(model), copy.deepcopy(model.state_dict())
    context = {
        "captured": lambda: exits.captured(find_anatomy(model, row), 2),
        "replayed": lambda: exits.replayed(find_anatomy(model, row), outputs),
        "replayed with exit head": lambda: exits.replayed(find_anatomy(model, row), outputs, exit_head=ExitHead(WIDTH)),
        "truncated": lambda: truncated(model, 2, family=row),
        "truncated with exit head": lambda: truncated(model, 2, family=row, exit_head=ExitHead(WIDTH)),
        "headless": lambda: exits.headless(find_anatomy(model, row)),
        "scoring_mode": lambda: passes.scoring_mode(model),
    }[part]

    def enter():
        with context():
            assert structure(model) != before
            if end == "exception":
                raise Interrupted

    with pytest.raises(Interrupted) if end == "exception" else nullcontext():
        enter()
    assert structure(model) == before
    assert list(model.state_dict()) == list(weights)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("where", ["layer", "head", "labels"])
def test_model_is_put_back_when_scoring_fails_midway(where):
    model = build("bert", "masked_lm")
    batch = batch_of(model)

    def fail(*_):
        raise Interrupted

    if where == "labels":
        batch["labels"] = torch.full_like(batch["labels"], models.VOCABULARY + 7)  # no such class
    else:
        part = model.cls if where == "head" else find_anatomy(model).layers[0]
        part.register_forward_hook(fail)
    before, weights = structure(model), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError if where == "labels" else Interrupted):
        scorers.early_exit_loss(model, batch, depth=2)
    assert structure(model) == before
    assert list(model.state_dict()) == list(weights)
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("depth", [0, -1, LAYERS + 1])
def test_depth_out_of_range_is_refused_with_the_range(depth):
    model = build("bert", "masked_lm")
    with (
        pytest.raises(ValueError, match=rf"Expected depth in 1\.\.{LAYERS} \(the model's layers\), got {depth}\."),
        truncated(model, depth),
    ):
        pass
    with pytest.raises(ValueError, match="depth"):
        scorers.early_exit_loss(model, batch_of(model), depth=depth)


# Pitfalls of transformers


@pytest.mark.parametrize(("family", "task"), TRANSFORMERS)
def test_hidden_states_first_asked_for_in_a_cut_model_are_complete_later(family, task):
    model, other, same = build(family, task), build(family, task), build(family, task)
    inputs = inputs_of(model)
    expected = model(**inputs, output_hidden_states=True).hidden_states
    assert len(expected) == LAYERS + 1
    for model, exit_head in ((other, None), (same, ExitHead(WIDTH))):
        with truncated(model, 1, exit_head=exit_head):
            assert len(model(**inputs, output_hidden_states=True).hidden_states) == 2
        later = model(**inputs, output_hidden_states=True).hidden_states
        assert len(later) == LAYERS + 1
        assert all(torch.equal(state, wanted) for state, wanted in zip(later, expected, strict=True))


def test_hidden_states_are_captured_through_cuts_before_and_after_and_user_hooks_stay():
    model = build("llama", "causal_lm")
    seen = []
    model.model.layers[3].register_forward_hook(lambda *_: seen.append("user"))
    for _ in range(2):
        assert len(model(**inputs_of(model), output_hidden_states=True).hidden_states) == LAYERS + 1
        with truncated(model, 2):
            assert len(model(**inputs_of(model), output_hidden_states=True).hidden_states) == 3
    assert seen == ["user", "user"]


# The exit head


@pytest.mark.parametrize("hidden", [0, 16])
def test_exit_head_draws_from_no_global_generator(hidden):
    state = torch.get_rng_state()
    one, same, other = (ExitHead(WIDTH, hidden=hidden, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    weights = [head.state_dict() for head in (one, same, other)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert all(torch.equal(value, weights[2][name]) for name, value in weights[0].items()) == (hidden == 0)


@pytest.mark.parametrize("hidden", [0, 16])
def test_exit_head_starts_as_the_identity_up_to_the_norm(hidden):
    states = torch.randn(3, 5, WIDTH, generator=Generator().manual_seed(0))
    expected = nn.functional.layer_norm(states, (WIDTH,))
    assert torch.equal(ExitHead(WIDTH, hidden=hidden)(states), expected)
    assert all(torch.isfinite(parameter).all() for parameter in ExitHead(WIDTH, hidden=hidden).parameters())


@pytest.mark.parametrize("hidden", [0, 16])
def test_every_weight_of_the_exit_head_can_be_trained(hidden):
    head = ExitHead(WIDTH, hidden=hidden)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.1)
    states = torch.randn(64, WIDTH, generator=Generator().manual_seed(0))
    before = copy.deepcopy(head.state_dict())
    for _ in range(3):
        optimizer.zero_grad()
        (head(states) - states.roll(1, dims=1)).square().mean().backward()
        optimizer.step()
    assert all(not torch.equal(value, before[name]) for name, value in head.state_dict().items())


@pytest.mark.parametrize(("family", "task"), ALL)
def test_exit_head_stands_behind_the_last_kept_layer(family, task):
    model = build(family, task)
    batch = batch_of(model)
    row = row_of(model)
    exit_head = ExitHead(WIDTH, hidden=8)
    models.widen(exit_head, seed=5)
    with layer_calls(model, row) as calls:
        scores = scorers.early_exit_loss(model, batch, depth=2, family=row, exit_head=exit_head, dtype=None)
    assert calls == expected_calls(2)
    short = shorter(model, 2).eval()

    def through(module, args, output):
        states, *rest = output if isinstance(output, tuple) else (output,)
        return (exit_head(states), *rest) if isinstance(output, tuple) else exit_head(states)

    find_anatomy(short, row).layers[1].register_forward_hook(through)
    torch.testing.assert_close(scores, sample_losses(short, batch), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scores, scorers.early_exit_loss(model, batch, depth=2, family=row, dtype=None), atol=1e-3)


def test_exit_head_with_dropout_is_quiet_while_scoring():
    model = build("bert", "masked_lm")
    exit_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Dropout(0.5)).train()
    state = torch.get_rng_state()
    first, second = (scorers.early_exit_loss(model, batch_of(model), exit_head=exit_head, dtype=None) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, second)
    assert all(module.training for module in exit_head.modules())


@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize(("family", "task"), FEW)
def test_detached_exit_trains_the_exit_head_and_not_the_trunk(family, task, detach):
    model = build(family, task)
    row = row_of(model)
    exit_head = ExitHead(WIDTH, hidden=8)
    loss = scorers.training_loss(model, batch_of(model), depth=2, family=row, exit_head=exit_head, detach_exit=detach)
    loss.backward()
    assert all(parameter.grad is not None for parameter in exit_head.parameters())
    layers = find_anatomy(model, row).layers
    trunk = [parameter.grad for parameter in layers[:2].parameters()]
    assert all((gradient is None) == detach for gradient in trunk)
    assert all(parameter.grad is None for parameter in layers[2:].parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": 5}, "layers must be a path, such as 'model.layers', or several, got 5"),
        (
            {"layers": "blocks", "heads": ("lm_head",)},
            r"heads must be tuples .* of names within one, got \('lm_head',\)",
        ),
        ({"layers": "blocks", "heads": 5}, "heads must be tuples"),
        ({"layers": "blocks", "positionwise": "mlp"}, "positionwise must be tuples"),
        ({"layers": "blocks", "task": "masked"}, "task must be one of masked_lm, causal_lm, .* got 'masked'"),
    ],
)
def test_a_malformed_row_is_refused_when_it_is_made(arguments, message):
    with pytest.raises(ValueError, match=f"Bad family row: {message}"):
        Family(**arguments)
