"""Rows that are derived from the structure of a model, tried on the zoo of `benchmarks/zoo.py`."""

import copy
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

import models
from earlysift import Family, Sifter, check, checks, exits, families, passes, pools, probes, scorers
from earlysift.anatomy import find_anatomy, unwrap
from earlysift.exit_probe import ExitProbe, features
from layer_calls import expected_calls, layer_calls
from models import BUILDERS
from processes import on_ranks
from test_guests import assert_same, everything

sys.path.append(str(Path(__file__).parents[1] / "benchmarks"))
import bench_families
import zoo

REFUSED = {
    "albert": "it calls 1 of them 4 times",
}
STAGED = ["convnext", "resnet", "swin"]  # whose head cannot read the states of earlier stages
DERIVED = sorted(set(zoo.ZOO) - set(REFUSED) - set(STAGED) - set(families.FAMILIES))
DRAWING = ["hubert", "led", "wav2vec2"]  # of transformers 5.19, a random number a layer, in evaluation too
DRAWN = Version(transformers.__version__) < Version("5.23")
SPREAD = ["deit", "hubert", "mamba", "mistral", "opt"]  # of unlike structure


@pytest.mark.skipif(not DRAWN, reason="this version of transformers draws none")
@pytest.mark.parametrize("name", DRAWING)
def test_models_that_draw_random_numbers_in_evaluation_are_refused(name):
    (problem,) = check(zoo.build(name), depth=bench_families.DEPTH, inputs=zoo.batch(name))
    assert "draws from the global random generator in evaluation mode" in problem.reason


@pytest.mark.parametrize("name", [name for name in DERIVED if not (DRAWN and name in DRAWING)])
def test_an_exit_by_a_derived_row_is_a_stock_model_of_fewer_layers_with_the_same_weights(name):
    model, pool = zoo.build(name), zoo.batch(name)
    assert check(model, depth=bench_families.DEPTH, inputs=pool) == []
    assert torch.equal(bench_families.at_exit(model, pool), bench_families.logits(zoo.stock(name, 2), pool))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    sifter = Sifter(model.train(), keep=0.5, depth=bench_families.DEPTH, dtype=None)
    batch = sifter.sift(pool)
    kept = scorers.exact_loss(zoo.stock(name, bench_families.DEPTH), pool, dtype=None).topk(2).indices.sort().values
    assert all(torch.equal(batch[key], pool[key][kept]) for key in pool)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert len(find_anatomy(model).layers) == zoo.LAYERS


@pytest.mark.parametrize("name", ["deit", "mistral", "opt"])  # the whole zoo: `benchmarks/run.py families`
def test_a_compiled_model_of_a_derived_family_runs_as_many_layers_as_the_exit_has(name):
    torch.compiler.reset()
    model, pool = zoo.build(name), zoo.batch(name)
    expected = scorers.exact_loss(zoo.stock(name, 2), pool, dtype=None), bench_families.logits(model, pool)
    compiled = torch.compile(model, backend="eager")
    checks.usable(compiled, pool)  # compares the row with the model, once
    with layer_calls(model) as calls:
        for _ in range(2):
            calls[:] = [0] * zoo.LAYERS
            assert torch.equal(scorers.early_exit_loss(compiled, pool, depth=2, dtype=None), expected[0])
            assert calls == expected_calls(2)
            calls[:] = [0] * zoo.LAYERS
            assert torch.equal(bench_families.logits(compiled, pool), expected[1])
            assert calls == [1] * zoo.LAYERS
    torch.compiler.reset()


@pytest.mark.parametrize("name", SPREAD)
def test_sift_leaves_a_model_of_a_derived_family_as_it_found_it(name):
    model, pool = zoo.build(name).train(), zoo.batch(name)
    model(**pool).loss.backward()  # gradients of the user's step, and caches that models build themselves
    next(iter(model.parameters())).requires_grad_(False)
    frozen = find_anatomy(model).layers[1]
    frozen.eval()
    next(frozen.children()).train()
    before = copy.deepcopy(everything(model))
    for score in ("loss", "probe", "exact"):
        Sifter(model, keep=0.5, depth=2, score=score, probe_every=1).sift(pool)
    assert_same(before, everything(model))


WRAPPED = """
import json, pathlib, sys, warnings
warnings.simplefilter("ignore")
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
import earlysift
sys.path.append(str(pathlib.Path(earlysift.__file__).parents[2] / "benchmarks"))
import bench_families, zoo
from earlysift import Sifter, exits, passes
from earlysift.anatomy import find_anatomy, unwrap

rank, store, count = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
told = {}


def replicated(model):
    return DistributedDataParallel(model, find_unused_parameters=True)  # as some use some only for pre-training


def trained(model, batch):
    torch.manual_seed(0)  # dropout
    model(**batch).loss.backward()


for name in NAMES:
    pool = {key: values[rank::count] for key, values in zoo.batch(name, rows=8).items()}
    plain = zoo.build(name).train()
    for wrap in (replicated, bench_families.sharded):
        model = wrap(zoo.build(name).train())
        sifter = Sifter(model, keep=0.5, depth=2, dtype=None)
        batch = sifter.sift(pool)
        trained(model, batch)
        plain.zero_grad()
        trained(plain, batch)
        apart = 0.0
        for ours, alone in zip(unwrap(model).parameters(), plain.parameters(), strict=True):
            if alone.grad is not None:
                distributed.all_reduce(alone.grad)
                grad = ours.grad.full_tensor() if hasattr(ours.grad, "full_tensor") else ours.grad
                apart = max(apart, (grad - alone.grad / count).abs().max().item())
        told[f"{name} {wrap.__name__}"] = [sifter.selection.indices.tolist(), apart]
print(json.dumps(told))
distributed.destroy_process_group()
"""


def test_ranks_sift_and_train_models_of_derived_families_replicated_and_sharded(tmp_path):
    by_rank = on_ranks(2, WRAPPED.replace("NAMES", repr(SPREAD)), tmp_path)
    for rank, told in enumerate(by_rank):
        for case, (kept, apart) in told.items():
            name = case.split()[0]
            pool = {key: values[rank::2] for key, values in zoo.batch(name, rows=8).items()}
            expected = scorers.exact_loss(zoo.stock(name, 2), pool, dtype=None).topk(2).indices.sort().values
            assert kept == expected.tolist(), case
            assert apart < 1e-5, case
    assert len(by_rank[0]) == 2 * len(SPREAD)


def test_a_model_that_changes_its_weights_for_evaluation_is_refused_with_the_way_out():
    model = zoo.build("rwkv")
    for every, refused in ((0, 0), (2, 1), (zoo.LAYERS, 0)):
        model.config.rescale_every = every
        problems = check(model)
        assert len(problems) == refused
        assert all(problem.remedy == "Set rescale_every=0 in its config." for problem in problems)


@pytest.mark.parametrize("name", REFUSED)
def test_a_structure_that_is_not_plain_is_refused_and_says_what_was_found(name):
    (problem,) = check(zoo.build(name), depth=bench_families.DEPTH, inputs=zoo.batch(name))
    assert REFUSED[name] in problem.reason


def test_a_model_without_exits_is_sifted_by_remembered_losses_as_its_refusal_says():
    sifter = Sifter(zoo.build("albert").train(), keep=0.5, score="memory", sample_id="id")
    pool = zoo.batch("albert") | {"id": torch.arange(4)}
    sifter.sift(pool)
    sifter.observe(torch.tensor([0.1, 0.2]))
    seen = sifter.ids
    sifter.sift(pool)
    assert sorted([*seen.tolist(), *sifter.ids.tolist()]) == [0, 1, 2, 3]  # unseen samples first


@pytest.mark.parametrize(("family", "task"), [key for key in BUILDERS if key[0] in families.FAMILIES])
def test_a_known_row_names_the_layers_that_would_be_derived(family, task):
    row = families.derived(unwrap(models.build(family, task)))
    assert row is not None
    assert row.layers == families.FAMILIES[family].layers


# Encoder-decoders: an exit cuts both lists


SEQ2SEQ = sorted(name for name, animal in zoo.ZOO.items() if "Seq2Seq" in animal.kind)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_an_encoder_decoder_is_scored_with_the_decoder_inputs_that_it_makes_of_its_labels(name):
    model, pool = zoo.build(name), zoo.batch(name)
    anatomy = find_anatomy(model)
    assert (anatomy.task, [len(layers) for layers in anatomy.lists]) == ("seq2seq_lm", [zoo.LAYERS] * 2)
    logits, labels = bench_families.logits(zoo.stock(name, 2), pool), pool["labels"]
    slow = nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none").sum(dim=1)
    slow /= (labels != -100).sum(dim=1)
    torch.testing.assert_close(scorers.early_exit_loss(model, pool, depth=2, dtype=None), slow, rtol=1e-5, atol=1e-5)
    ours, own = scorers.training_loss(model, pool), model(**pool).loss
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)


def test_decoder_inputs_of_the_pool_are_left_as_they_are():
    model, pool = zoo.build("t5"), zoo.batch("t5")
    other = pool | {"decoder_input_ids": pool["labels"].clamp(min=0)}
    scores = [scorers.early_exit_loss(model, each, depth=2, dtype=None) for each in (pool, other)]
    expected = scorers.exact_loss(zoo.stock("t5", 2), other, dtype=None)
    torch.testing.assert_close(scores[1], expected)
    assert not torch.allclose(*scores)


def test_a_row_of_the_decoder_alone_runs_the_encoder_in_full():
    model, pool = zoo.build("bart"), zoo.batch("bart")
    weights, short = model.state_dict(), copy.deepcopy(model.config)
    short.decoder_layers = 2
    with torch.random.fork_rng(devices=[]):
        stock = type(model)(short).eval()
    stock.load_state_dict({key: weights[key] for key in stock.state_dict()})
    row = Family("model.decoder.layers", task="seq2seq_lm")
    scores = scorers.early_exit_loss(model, pool, depth=2, family=row, dtype=None)
    assert torch.equal(scores, scorers.exact_loss(stock, pool, dtype=None))
    assert not torch.equal(scores, scorers.early_exit_loss(model, pool, depth=2, dtype=None))


def test_an_exit_deeper_than_the_encoder_runs_it_whole():
    model, pool = zoo.build("t5"), zoo.batch("t5")
    model.encoder.block = model.encoder.block[:2]
    with exits.truncated(model, 3):
        assert [len(model.encoder.block), len(model.decoder.block)] == [2, 3]
    assert check(model, depth=3, inputs=pool) == []


def test_a_classifier_with_encoder_and_decoder_exits_in_both():
    from transformers import BartForSequenceClassification

    config = zoo.build("bart").config
    with torch.random.fork_rng(devices=[]):
        model = BartForSequenceClassification(config).eval()
    ids = zoo.batch("bart")["input_ids"].clone()
    ids[:, -1] = config.eos_token_id  # whose state it classifies
    pool = {"input_ids": ids, "labels": torch.arange(len(ids)) % 3}
    assert check(model, depth=2, inputs=pool) == []
    with exits.truncated(model, 2):
        slow = nn.functional.cross_entropy(model(ids).logits, pool["labels"], reduction="none")
    torch.testing.assert_close(scorers.early_exit_loss(model, pool, depth=2, dtype=None), slow)


def test_what_cannot_be_done_with_an_encoder_decoder_is_refused_with_the_way_out():
    model, pool = zoo.build("t5"), zoo.batch("t5")
    with pytest.raises(ValueError, match=r"lengths of their own\. Use trim=False"):
        Sifter(model, trim=True)
    with pytest.raises(ValueError, match=r"lengths of their own\. Use trim=False"):
        scorers.early_exit_loss(model, pool, trim=True)
    with pytest.raises(ValueError, match="Use mode='fixed'"):
        Sifter(model, mode="auto")
    model.config.decoder_start_token_id = None
    (problem,) = check(model, inputs=pool)
    assert problem.remedy.startswith("Set decoder_start_token_id and pad_token_id in the model's config")
    with_decoder_inputs = pool | {"decoder_input_ids": pool["labels"].clamp(min=0)}
    assert check(model, inputs=with_decoder_inputs) == []


def test_flops_that_cannot_be_counted_are_left_out_of_the_ledger_once_and_for_all(caplog):
    sifter = Sifter(zoo.build("whisper").train(), keep=0.5)
    for _ in range(2):
        sifter.sift(zoo.batch("whisper"))
    assert caplog.text.count("it has weights in front of its decoder and outside of layers") == 1
    assert not any("flops" in name for name in sifter.ledger.end())


def test_rows_with_several_lists_come_from_configs_and_each_list_is_checked():
    model = zoo.build("t5")
    model.config.earlysift_family = {"layers": ["encoder.block", "decoder.block"], "heads": [["lm_head"]]}
    anatomy = find_anatomy(model)
    assert anatomy.lists == (model.encoder.block, model.decoder.block)
    assert not anatomy.derived
    problems = check(model, family=Family(("encoder.layers", "decoder.block")))
    assert [problem.reason for problem in problems] == [
        "Expected a ModuleList or Sequential of layers at 'encoder.layers' of T5ForConditionalGeneration, got nothing."
    ]
    for wrong in ((), ("",), (3,), ""):
        with pytest.raises(ValueError, match="layers must be a path"):
            Family(wrong)


# Stages: an exit is read by a probe


def probe_scores(model, pool, depth=2):
    learnt = scorers.Learnt(probes={depth: ExitProbe()})
    return scorers.probe(depth)(model, pool, learnt=learnt, dtype=None)


@pytest.mark.parametrize("name", STAGED)
def test_an_exit_behind_a_stage_is_refused_to_the_head_with_the_way_out(name):
    model, pool = zoo.build(name).train(), zoo.batch(name)
    (problem,) = check(model, depth=2, inputs=pool)
    assert problem.reason.startswith("States of a sample behind layer 2 have shape")
    for score in ("loss", "entropy"):
        with pytest.raises(ValueError, match="Use score='probe', which learns to read them"):
            Sifter(model, keep=0.5, depth=2, score=score).sift(pool)
    with pytest.raises(ValueError, match=r"stages, .* Use mode='fixed' with score='probe'"):
        Sifter(model, mode="auto")


@pytest.mark.parametrize("name", STAGED)
def test_a_probe_behind_a_stage_reads_its_states_and_runs_no_later_one(name):
    model, pool = zoo.build(name), zoo.batch(name)
    stages = find_anatomy(model).layers
    with exits.latest_outputs({2: stages[1]}) as outputs:
        bench_families.logits(model, pool)
    logits = ExitProbe().classify(features(exits.states_of(outputs[2])), classes=5)
    slow = nn.functional.cross_entropy(logits, pool["labels"], reduction="none")
    torch.testing.assert_close(probe_scores(model, pool), slow)
    with layer_calls(model) as calls:
        assert torch.equal(probe_scores(model, pool), probe_scores(model, pool))
    assert calls == expected_calls(2, times=2)


@pytest.mark.parametrize("name", STAGED)
def test_sifting_by_a_probe_behind_a_stage_leaves_the_model_and_its_running_statistics_as_they_were(name):
    model, pool = zoo.build(name).train(), zoo.batch(name)
    model(**pool).loss.backward()
    before = copy.deepcopy(everything(model))
    for score in ("probe", "blend"):
        sifter = Sifter(model, keep=0.5, depth=2, score=score, probe_every=1)
        for _ in range(2):
            sifter.sift(pool)
    assert_same(before, everything(model))


def test_compiled_and_sharded_models_are_read_by_a_probe_behind_a_stage(process_group):
    pool = zoo.batch("convnext")
    expected = probe_scores(zoo.build("convnext"), pool)
    compiled = torch.compile(zoo.build("convnext"), backend="eager")
    for model in (compiled, bench_families.sharded(zoo.build("convnext"))):
        torch.testing.assert_close(probe_scores(model, pool), expected)
    torch.compiler.reset()


class Stacked(nn.Module):
    """Experts within layers, a stem in front of them, and what follows."""

    def __init__(self, lists=1):
        super().__init__()
        self.stem = nn.ModuleList([nn.Linear(2, 2)])  # a list of one is no list of layers
        self.blocks = nn.ModuleList([nn.Module() for _ in range(3)])
        for block in self.blocks:
            block.experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.drops = nn.ModuleList([nn.Dropout(), nn.Dropout()])  # without weights
        self.norm, self.head = nn.LayerNorm(2), nn.Linear(2, 9)
        if lists > 1:
            self.others = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


def test_lists_within_layers_and_lists_without_weights_are_not_taken_for_layers():
    assert families.derived(Stacked()) == Family("blocks", (("head",),))
    assert families.derived(Stacked(lists=2)) is None
    assert families.found(Stacked(lists=2)) == "there are several lists of them, blocks (3 layers), others (2 layers)"


def test_layers_of_several_classes_are_not_plain_nor_is_what_lies_within_one_of_them():
    model = Stacked()
    model.blocks.append(nn.Linear(2, 2))
    assert families.derived(model) is None
    assert families.found(model) == "there is no list of like modules"
    model.config = SimpleNamespace(num_hidden_layers=4)  # as many as the list has
    assert families.derived(model) == Family("blocks", (("head",),))


def test_a_model_that_is_a_list_or_has_an_empty_place_is_a_problem_and_no_crash():
    assert len(check(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))) == 1
    model = Stacked()
    model.register_module("auxiliary", None)
    assert families.derived(model) == families.derived(Stacked())


def test_a_row_that_was_derived_holds_while_the_model_is_shortened_to_one_layer():
    model = zoo.build("mistral")
    anatomy = find_anatomy(model)
    with exits.truncated(model, 1):
        assert find_anatomy(model)[:5] == anatomy[:5]
    assert find_anatomy(model) == anatomy


class Pooled(nn.Module):
    """What names its head behind something else than layers: a norm, pooling, or a scale behind it."""

    def __init__(self, bias=False):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)
        self.bias = bias
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x).tanh()
        logits = self.head(self.norm(x).mean(dim=1))
        return 2 * logits if self.bias else logits


PooledForSequenceClassification = type("PooledForSequenceClassification", (Pooled,), {})


def labelled(rows=8):
    generator = torch.Generator().manual_seed(1)
    return {"x": torch.randn(rows, 4, 8, generator=generator), "labels": torch.arange(rows) % 5}


def test_auto_sees_the_losses_of_a_derived_classifier_or_refuses_it():
    model, pool = PooledForSequenceClassification(), labelled()
    exact = nn.functional.cross_entropy(model(pool["x"]), pool["labels"], reduction="none")
    found = probes.probe(model, pool, depths=[1], dtype=None)
    torch.testing.assert_close(found.exact, exact)
    with pytest.raises(ValueError, match="names the head"):
        probes.probe(PooledForSequenceClassification(bias=True), pool, depths=[1], dtype=None)


@pytest.mark.parametrize("depth", [None, 1])
def test_a_guess_is_compared_before_the_first_score_without_a_sifter(depth):
    model, pool = zoo.build("cohere"), zoo.batch("cohere")
    model.lm_head.bias = nn.Parameter(torch.ones(zoo.VOCABULARY))  # the model scales what the head returns
    score = scorers.exact_loss if depth is None else partial(scorers.early_exit_loss, depth=depth)
    with torch.no_grad(), exits.truncated(model, depth or zoo.LAYERS):
        logits = passes.call(model, pools.inputs_and_labels(pool)[0])
    slow = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), pool["labels"][:, 1:], reduction="none")
    torch.testing.assert_close(score(model, pool, dtype=None), slow.mean(dim=1), rtol=1e-4, atol=1e-4)


def test_a_derived_head_that_is_not_the_models_is_left_for_the_models_own_logits(caplog):
    model = zoo.build("cohere")
    model.lm_head.bias = nn.Parameter(torch.ones(zoo.VOCABULARY))  # the model scales what the head returns
    pool = zoo.batch("cohere")
    Sifter(model.train(), keep=0.5, dtype=None).sift(pool)
    assert "The model's own logits are used" in caplog.text
    scores = scorers.early_exit_loss(model, pool, depth=1, dtype=None)
    with torch.no_grad(), exits.truncated(model, 1):
        logits = passes.call(model.eval(), pools.inputs_and_labels(pool)[0])
    slow = nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), pool["labels"][:, 1:], reduction="none")
    torch.testing.assert_close(scores, slow.mean(dim=1), rtol=1e-4, atol=1e-4)


def test_a_known_row_may_have_several_lists(monkeypatch):
    model = zoo.build("t5")
    monkeypatch.setitem(families.FAMILIES, "t5", Family(("encoder.block", "decoder.block"), (("lm_head",),)))
    assert not find_anatomy(model).derived
    monkeypatch.setitem(families.FAMILIES, "t5", Family(("encoder.nothing", "decoder.block"), (("lm_head",),)))
    assert find_anatomy(model).derived  # as where readers call their base another


def test_what_a_failed_pass_would_have_told_of_stages_is_asked_again():
    model, pool = zoo.build("swin"), zoo.batch("swin")
    anatomy, inputs = find_anatomy(model), pools.inputs_and_labels(pool)[0]
    with pytest.raises(AttributeError, match="shape"):
        checks.unlike_the_last(model, anatomy, 1, {"no_argument": inputs["pixel_values"]})
    assert checks.unlike_the_last(model, anatomy, 1, inputs) is not None


def test_flops_of_sounds_are_left_out_as_layers_run_on_frames(caplog):
    sifter = Sifter(zoo.build("hubert").train(), keep=0.5)
    sifter.sift(zoo.batch("hubert"))
    assert "frames" in caplog.text
    assert not any("flops" in name for name in sifter.stats())
