"""`earlysift check`: real tiny configs through the command line, into a table and a JSON file."""

import json
import re

import pytest
import torch
import transformers

from earlysift import checks, families, losses, scorers
from earlysift.anatomy import find_anatomy
from earlysift.checkup import build_model, checkup, peak_growth_bytes, random_pool
from earlysift.cli import main
from earlysift.costs import flops_law, relative_cost
from earlysift.presets import BUILT_IN

SMALL = {
    "vocab_size": 200,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
CONFIGS = {
    "bert": {"model_type": "bert", "architectures": ["BertForMaskedLM"], **SMALL},
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 4, "n_head": 2, "n_positions": 64, "vocab_size": 200},
    "llama": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_key_value_heads": 1, **SMALL},
    "classifier": {
        "model_type": "roberta",
        "architectures": ["RobertaForSequenceClassification"],
        "num_labels": 3,
        **SMALL,
    },
}
TASKS = {"bert": "masked_lm", "gpt2": "causal_lm", "llama": "causal_lm", "classifier": "sequence_classification"}
QUICK = ("--batch", "4", "--seq-length", "20", "--seconds", "0")


def written(folder, values):
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return path


def check(*arguments):
    return main(["check", *map(str, arguments)])


@pytest.mark.parametrize("name", CONFIGS)
def test_check_measures_every_depth_and_the_full_model(name, tmp_path, capsys):
    report = tmp_path / "new" / "check.json"
    assert check(written(tmp_path, CONFIGS[name]), *QUICK, "--json", report) == 0
    numbers = json.loads(report.read_text())
    model, shape, train, scores = (numbers[key] for key in ("model", "shape", "train", "scores"))
    assert model["task"] == TASKS[name]
    assert (model["layers"], shape["seq_length"], shape["batch"], shape["pool"]) == (4, 20, 4, 8)
    assert [(score["depth"], score["exact"]) for score in scores] == [(1, False), (2, False), (3, False), (4, True)]
    assert numbers["rounds"] >= 3
    for score in scores:
        assert score["ms"] > 0
        assert score["ratio"] == pytest.approx(score["ms"] / train["ms"])
        assert score["break_even_gain"] == score["cost"] == pytest.approx(1 + score["ratio"])
        assert 0 < score["memory_bytes"] < train["memory_bytes"]
    assert sorted(score["flops"] for score in scores) == [score["flops"] for score in scores]

    shown = capsys.readouterr().out
    assert "A training step on 4 samples, and scoring a pool of 8" in shown
    rows = re.findall(r"^│ (\w[\w ]+?) *│", shown, re.MULTILINE)
    assert rows == ["train", "depth 1", "depth 2", "depth 3", "full model"]
    assert all(f"{score['break_even_gain']:.3f}" in shown for score in scores)
    assert "Selection pays only while the measured gain" in shown


def test_few_positions_make_exits_cheaper_and_nothing_else():
    options = {"batch": 2, "labelled_fraction": 1.0, "depths": (1,), "seconds": 0.0}
    every, few = (checkup("demo", max_positions=most, **options) for most in (None, 4))
    assert few["scores"][0]["flops"] < every["scores"][0]["flops"]
    assert few["scores"][1]["flops"] == every["scores"][1]["flops"]
    assert few["train"]["flops"] == every["train"]["flops"]


@pytest.mark.parametrize("name", CONFIGS)
def test_flops_and_parameters_are_those_of_the_model(name, tmp_path):
    path = written(tmp_path, CONFIGS[name])
    numbers = checkup(str(path), batch=4, seq_length=20, labelled_fraction=0.4, depths=(2,), seconds=0.0)
    with torch.random.fork_rng():
        model = build_model(str(path))
    assert type(model).__name__ == numbers["model"]["class"]
    assert numbers["model"]["parameters"] == sum(p.numel() for p in model.parameters())

    per_sample = numbers["shape"]["labels_per_sample"]
    if TASKS[name] == "sequence_classification":
        assert per_sample == 1
    else:
        assert 6 <= per_sample <= 8  # 0.4 of 20; the first of a causal model's labels is nobody's prediction
    anatomy = find_anatomy(model)

    def flops(rows, depth=None):
        law = flops_law(anatomy, depth, skips_unlabelled=depth is not None and bool(anatomy.positionwise))
        return law.flops(rows=rows, length=20, labelled=round(rows * per_sample))

    if TASKS[name] == "masked_lm":  # otherwise labels fall unevenly on samples
        assert numbers["train"]["flops"] == 3 * flops(4)
    else:
        assert numbers["train"]["flops"] == pytest.approx(3 * flops(4), rel=0.05)
    exit_score, exact = numbers["scores"]
    assert exit_score["flops"] == flops(8, 2)
    assert exact["flops"] == flops(8)
    cost = relative_cost(1 / 3, exit_score["flops"] / 8 / (numbers["train"]["flops"] / 3 / 4), 0.5)
    assert exit_score["cost_by_flops"] == pytest.approx(cost)


def test_time_of_scoring_rises_with_depth_and_stays_below_a_step():
    numbers = checkup("demo", batch=8, depths=(1, 6), seconds=0.5)
    first, sixth, exact = (score["ms"] for score in numbers["scores"])
    assert first < sixth < exact
    assert first < 0.5 * numbers["train"]["ms"]


def test_memory_of_a_step_is_that_of_its_activations_and_gradients():
    def bytes_of(batch):
        return checkup("demo", batch=batch, depths=(1,), seconds=0.0)["train"]["memory_bytes"]

    small, large = bytes_of(4), bytes_of(8)
    with torch.random.fork_rng():
        weights = sum(p.numel() * p.element_size() for p in build_model("demo").parameters())
    assert small > weights  # the gradients alone
    assert 1.5 < large / small < 2.1  # the rest grows with the batch


def test_memory_growth_is_the_peak_of_an_operation():
    def operation():
        first = torch.zeros(1000, 1000)
        second = first + 1
        del first
        return (second @ second).sum()

    assert peak_growth_bytes(operation, torch.device("cpu")) == pytest.approx(8e6, rel=0.01)


def test_a_folder_and_a_built_in_name_do_as_well_as_a_path(tmp_path, capsys):
    written(tmp_path, CONFIGS["bert"])
    assert check(tmp_path, *QUICK, "--depths", "1") == 0
    assert check("demo", *QUICK, "--depths", "1") == 0
    shown = capsys.readouterr().out
    assert "4 layers" in shown
    assert "12 layers, 0.9 M parameters" in shown


@pytest.mark.parametrize(("name", "millions"), [("bert-base", 109.5), ("gpt2-small", 124.4), ("demo", 0.9)])
def test_built_in_names_are_the_models_of_that_name(name, millions):
    with torch.device("meta"):
        model = build_model(name)
    assert find_anatomy(model).task in ("masked_lm", "causal_lm")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    assert name in BUILT_IN


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_task_decides_over_the_class_that_the_config_names(name, tmp_path):
    path = str(written(tmp_path, CONFIGS[name]))
    for task in ("causal_lm", "sequence_classification", "token_classification"):
        assert checkup(path, task=task, batch=2, depths=(1,), seconds=0.0)["model"]["task"] == task


@pytest.mark.parametrize(
    ("name", "classes"), [("bert", "BertForMaskedLM"), ("gpt2", "GPT2LMHeadModel"), ("llama", "LlamaForCausalLM")]
)
def test_without_a_named_class_it_is_the_usual_language_modelling(name, classes, tmp_path):
    values = {key: value for key, value in CONFIGS[name].items() if key != "architectures"}
    with torch.random.fork_rng():
        assert type(build_model(str(written(tmp_path, values)))).__name__ == classes


@pytest.mark.parametrize("values", [{"problem_type": "multi_label_classification"}, {"num_labels": 1}])
def test_every_kind_of_classification_has_labels(values, tmp_path):
    path = written(tmp_path, CONFIGS["classifier"] | values)
    assert checkup(str(path), batch=2, seq_length=8, depths=(1,), seconds=0.0)["train"]["ms"] > 0


def test_images_have_a_position_per_patch_and_one_for_the_class(tmp_path):
    vit = {"model_type": "vit", "architectures": ["ViTForImageClassification"], "image_size": 8, "patch_size": 2}
    numbers = checkup(str(written(tmp_path, SMALL | vit | {"num_channels": 1})), batch=2, depths=(1,), seconds=0.0)
    assert numbers["model"]["task"] == "sequence_classification"
    assert numbers["shape"]["seq_length"] == 4 * 4 + 1


@pytest.mark.parametrize("name", CONFIGS)
def test_random_pools_are_what_the_model_is_trained_on(name, tmp_path):
    with torch.random.fork_rng():
        model = build_model(str(written(tmp_path, CONFIGS[name])))
    arguments = {"length": 20, "labelled_fraction": 0.25, "device": torch.device("cpu")}
    pool = random_pool(model, 6, **arguments)
    again = random_pool(model, 6, **arguments)
    assert all(torch.equal(pool[key], again[key]) for key in pool)
    scores = scorers.exact_loss(model, pool)
    assert scores.shape == (6,)
    assert torch.isfinite(scores).all()
    if TASKS[name] != "sequence_classification":
        assert (losses.labelled_positions(pool["labels"]).sum(dim=1) == 5).all()
        assert len({tuple(row) for row in losses.labelled_positions(pool["labels"]).tolist()}) > 1


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    checkup("demo", batch=2, depths=(1,), seconds=0.0)
    assert torch.equal(torch.get_rng_state(), before)


def test_length_defaults_to_what_the_model_can_take(tmp_path):
    path = str(written(tmp_path, CONFIGS["bert"]))
    assert checkup(path, batch=2, depths=(1,), seconds=0.0)["shape"]["seq_length"] == 64


def test_a_model_that_cannot_be_sifted_with_is_refused_with_its_problems(tmp_path, capsys):
    albert = {"model_type": "albert", "architectures": ["AlbertForMaskedLM"], "embedding_size": 16, **SMALL}
    assert check(written(tmp_path, albert), *QUICK) == 2
    error = capsys.readouterr().err
    with torch.random.fork_rng():
        problems = checks.check(build_model(str(tmp_path)))
    assert problems
    assert all(str(problem) in error for problem in problems)


def test_an_encoder_decoder_is_measured_if_it_reads_tokens(tmp_path, capsys):
    t5 = {"model_type": "t5", "vocab_size": 100, "num_layers": 2}
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "decoder_start_token_id": 0}
    report = checkup(written(tmp_path, t5 | sizes), batch=2, seq_length=160, seconds=0.0)
    assert report["shape"] == {"seq_length": 160, "batch": 2, "pool": 4, "labels_per_sample": 160}
    model = build_model(written(tmp_path, t5 | sizes))
    law = flops_law(find_anatomy(model), 1)
    assert report["scores"][0]["flops"] == law.flops(rows=4, length=160, labelled=640, inputs=160)
    whisper = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"], "d_model": 16}
    layers = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    }
    assert check(written(tmp_path, whisper | layers), *QUICK) == 2
    assert "FLOPs of WhisperForConditionalGeneration cannot be counted: it has weights" in capsys.readouterr().err


def test_all_problems_come_at_once(tmp_path, capsys):
    assert check(written(tmp_path, CONFIGS["bert"]), *QUICK, "--depths", "1", "4", "9") == 2
    error = capsys.readouterr().err
    assert "got 4." in error
    assert "got 9." in error
    assert error.count("\n- ") == 2


def test_a_model_of_one_layer_has_no_exit(tmp_path, capsys):
    assert check(written(tmp_path, CONFIGS["bert"] | {"num_hidden_layers": 1}), *QUICK) == 2
    assert "Choose a smaller depth" in capsys.readouterr().err


BROKEN = {
    "no JSON": ("{", "Expected JSON in"),
    "no mapping": ("[]", "Expected a mapping in"),
    "no type": ("{}", "Expected a model_type that transformers"),
    "unknown type": ('{"model_type": "nonesuch"}', "got 'nonesuch'"),
    "remote code": (
        '{"model_type": "own", "auto_map": {"AutoModel": "own.Own"}}',
        "Code that a config names (auto_map) is not run",
    ),
    "unknown class": ('{"model_type": "bert", "architectures": ["BertForNothing"]}', "BertForNothing"),
    "wrong value": ('{"model_type": "bert", "hidden_size": "wide"}', "cannot build a model"),
    "heads that do not divide": (json.dumps(CONFIGS["bert"] | {"num_attention_heads": 5}), "cannot build a model"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_config_gives_one_clear_sentence(name, tmp_path, capsys):
    text, expected = BROKEN[name]
    (tmp_path / "config.json").write_text(text)
    assert check(tmp_path, *QUICK) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error


MISTRAL = {
    "model_type": "mistral",
    "architectures": ["MistralForCausalLM"],
    "num_key_value_heads": 1,
    **SMALL,
}
ROW = {
    "layers": "model.layers",
    "heads": [["lm_head"]],
    "task": "causal_lm",
    "positionwise": [["self_attn.o_proj"], ["mlp"]],
}


def test_a_config_brings_a_row_of_its_own_along(tmp_path, capsys):
    report = tmp_path / "check.json"
    albert = {"model_type": "albert", "architectures": ["AlbertForMaskedLM"], "hidden_size": 32, "vocab_size": 100}
    one_layer = {"num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}  # is no list
    assert check(written(tmp_path, albert | one_layer), *QUICK) == 2
    assert "put one under 'earlysift_family' into the model's config.json" in capsys.readouterr().err
    assert check(written(tmp_path, MISTRAL | {"earlysift_family": ROW}), *QUICK, "--json", report) == 0
    numbers = json.loads(report.read_text())
    assert (numbers["model"]["task"], numbers["model"]["layers"]) == ("causal_lm", 4)
    torch.manual_seed(0)
    model = build_model(str(tmp_path))
    expected = families.Family("model.layers", (("lm_head",),), "causal_lm", (("self_attn.o_proj",), ("mlp",)))
    assert find_anatomy(model) == find_anatomy(model, expected)
    pool = random_pool(model, 4, length=16, labelled_fraction=None, device=torch.device("cpu"))
    scores = scorers.early_exit_loss(model, pool, depth=2)
    assert torch.equal(scores, scorers.early_exit_loss(model, pool, depth=2, family=expected))


def test_a_row_in_the_config_is_saved_with_the_model_and_goes_before_the_known_ones(tmp_path):
    model = build_model(str(written(tmp_path, CONFIGS["llama"] | {"earlysift_family": {"layers": "model.layers"}})))
    assert find_anatomy(model).head == ()
    assert find_anatomy(model, families.FAMILIES["llama"]).head == ("lm_head",)
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert find_anatomy(again).head == ()


BAD_ROWS = {
    "a string": ("model.layers", "got 'model.layers'"),
    "a list": (["model.layers"], "got ['model.layers']"),
    "layers of another type": (ROW | {"layers": 5}, "layers must be a path"),
    "a misspelt key": (ROW | {"head": [["lm_head"]]}, "unexpected keyword argument 'head'"),
    "heads in one list": (
        ROW | {"heads": ["lm_head"]},
        "heads must be tuples (lists, in a config) of names within one",
    ),
    "an empty alternative": (ROW | {"heads": [[]]}, "heads must be"),
    "heads of another type": (ROW | {"heads": "lm_head"}, "heads must be"),
    "numbers for names": (ROW | {"positionwise": [[1]]}, "positionwise must be"),
    "an unknown task": (ROW | {"task": "translation"}, "task must be one of masked_lm, causal_lm"),
    "a task of another type": (ROW | {"task": ["causal_lm"]}, "task must be"),
    "a path that leads nowhere": (ROW | {"layers": "model.blocks"}, "at 'model.blocks'"),
    "a head that is not there": (ROW | {"heads": [["cls"]]}, "none of the heads"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_malformed_row_in_the_config_gives_one_clear_problem(name, tmp_path, capsys):
    row, expected = BAD_ROWS[name]
    assert check(written(tmp_path, MISTRAL | {"earlysift_family": row}), *QUICK) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert "Traceback" not in error
    assert error.count("\n- ") == 1


def test_a_missing_file_says_what_was_expected_and_the_way_out(tmp_path, capsys):
    assert check(tmp_path / "nothing.json") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert all(part in error for part in ("Expected a transformers config.json", "nothing.json", *BUILT_IN, "Download"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--keep", "1"), "keep must be"),
        (("--keep", "0"), "keep must be"),
        (("--batch", "0"), "batch must be"),
        (("--seq-length", "65"), "seq_length must be in 2..64"),
        (("--labelled-fraction", "0"), "labelled_fraction must be"),
        (("--task", "token_classification", "--labelled-fraction", "1.5"), "labelled_fraction must be"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, expected, tmp_path, capsys):
    assert check(written(tmp_path, CONFIGS["bert"]), *arguments) == 2
    assert expected in capsys.readouterr().err


def test_a_task_that_a_model_does_not_have_is_named(tmp_path, capsys):
    assert check(written(tmp_path, CONFIGS["gpt2"]), "--task", "masked_lm") == 2
    assert "There is no gpt2 model for masked_lm. " in capsys.readouterr().err


def test_progress_ends_at_one():
    shares = {}

    def note(name, share):
        assert share >= shares.get(name, 0.0)
        shares[name] = share

    checkup("demo", batch=2, depths=(1,), seconds=0.0, on_progress=note)
    assert len(shares) == 3
    assert set(shares.values()) == {1.0}


def test_config_of_a_saved_model_is_read(tmp_path):
    config = transformers.GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=32, vocab_size=100)
    config.save_pretrained(tmp_path)
    numbers = checkup(str(tmp_path), batch=2, seconds=0.0)
    assert numbers["model"]["layers"] == 2
    assert [score["depth"] for score in numbers["scores"]] == [1, 2]
