"""Tasks beside language modelling and classification: an exit scores each sample as a stock model of fewer layers does.

The slow twin is that model with copies of the weights, run on one sample at a time.
"""

import copy
import itertools
import logging
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Generator, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainingArguments

import models
from earlysift import Family, SiftConfig, Sifter, check, checkup, costs, losses, pools, scorers
from earlysift.adapters.huggingface import SiftTrainer
from earlysift.anatomy import find_anatomy
from earlysift.measures import ENTROPY, LOSS
from models import CLASSES, VOCABULARY, build, shorter

ROWS, LENGTH, DEPTH = 6, 10, 2
READERS = ("bert", "roberta", "distilbert", "electra", "modernbert", "deberta-v2", "gpt2", "llama", "qwen3")


def one_at_a_time(model, pool, depth=DEPTH):
    """The loss that a stock model of ``depth`` layers returns for each sample alone."""
    stock = (shorter(model, depth) if depth < models.LAYERS else copy.deepcopy(model)).eval()
    with torch.no_grad():
        return torch.stack(
            [stock(**pools.take(pool, slice(row, row + 1))).loss for row in range(pools.pool_size(pool))]
        )


def assert_exits_are_stock_models(model, pool, family=None):
    """Scores at an exit and of the full model, and what a sifter keeps by them, are those of the slow twin."""
    assert check(model, depth=DEPTH, inputs=pool, family=family) == []
    twin = one_at_a_time(model, pool)
    at_exit = scorers.early_exit_loss(model, pool, depth=DEPTH, dtype=None, chunk_rows=4, family=family)
    torch.testing.assert_close(at_exit, twin, rtol=1e-4, atol=1e-4)
    exact = scorers.exact_loss(model, pool, dtype=None, family=family)
    torch.testing.assert_close(exact, one_at_a_time(model, pool, models.LAYERS), rtol=1e-4, atol=1e-4)
    assert twin.std() > 0.05
    batch = Sifter(model.train(), keep=0.5, depth=DEPTH, dtype=None, family=family).sift(pool)
    kept = twin.topk(ROWS // 2).indices.sort().values
    assert all(torch.equal(batch[key], pool[key][kept]) for key in pool)


def assert_sifted_loss_is_the_models(model, pool, family=None):
    """The training loss and its gradients are those of the model's own loss."""
    model.eval()  # no masks of speech
    model(**pool).loss.backward()
    own = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    loss = scorers.training_loss(model, pool, family=family)
    loss.backward()
    with torch.no_grad():
        torch.testing.assert_close(loss, model(**pool).loss, rtol=1e-4, atol=1e-4)
    for name, parameter in model.named_parameters():
        if name in own:
            torch.testing.assert_close(parameter.grad, own[name], rtol=1e-3, atol=1e-4, msg=name)


# Question answering


def questions(rows=ROWS, length=LENGTH):
    generator = Generator().manual_seed(1)
    lengths = torch.randint(length // 2, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length) < lengths[:, None]).long()
    ids = torch.where(mask == 1, torch.randint(3, VOCABULARY, (rows, length), generator=generator), models.PAD)
    answers = torch.randint(length // 2, (2, rows), generator=generator).sort(dim=0).values
    return {"input_ids": ids, "attention_mask": mask, "start_positions": answers[0], "end_positions": answers[1]}


def reader(family="bert", **config):
    return build(family, "question_answering", num_labels=2, **config)


@pytest.mark.parametrize("family", READERS)
def test_question_answering_at_an_exit_is_a_stock_model_of_fewer_layers(family):
    assert_exits_are_stock_models(reader(family), questions())


def test_the_loss_of_answers_and_its_gradients_are_the_models():
    pool = questions()
    pool["start_positions"][0] = LENGTH  # the comparison with the model takes rows whose answers are there
    Sifter(reader(), keep=0.5).sift(pool)
    assert_sifted_loss_is_the_models(reader(), questions())


def test_answers_behind_the_sequence_are_ignored_and_those_before_it_are_the_first_token():
    model, pool = reader(), questions()
    pool["start_positions"][1], pool["end_positions"][2], pool["start_positions"][3] = LENGTH + 7, LENGTH, -4
    pool["start_positions"][4] = pool["end_positions"][4] = LENGTH
    scores = scorers.early_exit_loss(model, pool, depth=DEPTH, dtype=None)
    stock = shorter(model, DEPTH).eval()
    for row in range(ROWS):
        sample = pools.take(pool, slice(row, row + 1))
        with torch.no_grad():
            logits = stock(**sample)
        starts, ends = (
            F.cross_entropy(predicted, sample[key].clamp(0, LENGTH), ignore_index=LENGTH)
            for predicted, key in ((logits.start_logits, "start_positions"), (logits.end_logits, "end_positions"))
        )
        answered = [loss for loss in (starts, ends) if torch.isfinite(loss)]  # the model's mean over none is nan
        expected = torch.stack(answered).mean() if answered else torch.tensor(-torch.inf)
        torch.testing.assert_close(scores[row], expected, rtol=1e-4, atol=1e-4)
    assert scores[4] == losses.UNLABELLED


def test_other_measures_read_both_ends_of_an_answer():
    model, pool = reader(), questions()
    scores = scorers.at_exit(ENTROPY, DEPTH)(model, pool, dtype=None)
    with torch.no_grad():
        found = shorter(model, DEPTH).eval()(input_ids=pool["input_ids"], attention_mask=pool["attention_mask"])
    entropies = [
        torch.distributions.Categorical(logits=each).entropy() for each in (found.start_logits, found.end_logits)
    ]
    torch.testing.assert_close(scores, torch.stack(entropies).mean(dim=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"mode": "auto"}, "Probes of exits and auto mode know classes and tokens, not question_answering"),
        ({"score": "probe"}, "Probes of exits and auto mode know classes and tokens, not question_answering"),
        ({"trim": True}, "change the padding of samples"),
        ({"scope": "global"}, "change the padding of samples"),
    ],
)
def test_what_answers_do_not_allow_is_refused_before_the_first_pool(options, reason):
    with pytest.raises(ValueError, match=reason):
        Sifter(reader(), keep=0.5, **options)


def test_the_flops_of_reading_answers_are_those_that_torch_counts():
    model = reader()
    anatomy, pool = find_anatomy(model), questions()
    for depth in (None, DEPTH):
        score = scorers.exact_loss if depth is None else partial(scorers.early_exit_loss, depth=depth)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            score(model, pool, dtype=None)
        work = costs.batch_work(anatomy, pool, "scored", costs.flops_law(anatomy, depth))
        assert work == {
            "scored_tokens": ROWS * LENGTH,
            "scored_flops": pytest.approx(counter.get_total_flops(), rel=1e-3),
        }


def test_a_checkup_draws_answers_and_has_no_sounds():
    pool = checkup.random_pool(reader(), 6, length=8, labelled_fraction=None, device=torch.device("cpu"))
    assert check(reader(), inputs=pool) == []
    with pytest.raises(ValueError, match="CTC needs sounds"):
        checkup.random_pool(listener(), 6, length=8, labelled_fraction=None, device=torch.device("cpu"))


@pytest.mark.parametrize("options", [{}, {"score": "memory", "sample_id": "id"}], ids=["loss", "memory"])
def test_a_trainer_selects_questions(tmp_path, options):
    model, pool = reader(), questions(rows=16)
    dataset = [{key: value[row] for key, value in pool.items()} for row in range(16)]
    trainer = trainer_of(model, dataset, tmp_path, **options)
    metrics = trainer.train().metrics
    assert (metrics["candidates_seen"], metrics["samples_trained"]) == (32, 16)
    if options:
        remembered = trainer.sifter.state_dict()["memory"]
        assert remembered


def trainer_of(model, dataset, folder, epochs=2, config=None, **options):
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=epochs,
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
        report_to=[],
    )
    sift = SiftConfig(keep=0.5, depth=DEPTH, dtype=None, **options)
    return SiftTrainer(model=model, args=arguments, train_dataset=dataset, sift=sift, **(config or {}))


# Soft targets


def classifier(**config):
    return build("bert", "sequence_classification", **config)


def mixed(model, rows=ROWS, key="labels"):
    """Probabilities of classes, as mixup makes them: two classes a sample; the last sample is certain."""
    pool = models.batch_for(model, "sequence_classification", rows, LENGTH, Generator().manual_seed(1))
    share = torch.linspace(0.5, 1, rows)[:, None]
    first = F.one_hot(pool.pop("labels"), CLASSES)
    return pool | {key: share * first + (1 - share) * first.roll(1, dims=0)}


def cross_entropies(model, pool, key, depth=DEPTH):
    """Cross entropy with probabilities by a stock model of fewer layers, one sample at a time."""
    stock, found = shorter(model, depth).eval(), []
    for row in range(len(pool[key])):
        sample = pools.take(pool, slice(row, row + 1))
        targets = sample.pop(key)
        with torch.no_grad():
            found.append(F.cross_entropy(models.logits_of(stock(**sample)), targets))
    return torch.stack(found)


def test_a_loop_of_soft_targets_names_their_key_and_is_scored_by_their_cross_entropy():
    model = classifier()
    pool, family = mixed(model, key="soft"), Family(labels="soft", problem="single_label")
    assert check(model, depth=DEPTH, inputs=pool, family=family) == []
    scores = scorers.early_exit_loss(model, pool, depth=DEPTH, dtype=None, family=family)
    torch.testing.assert_close(scores, cross_entropies(model, pool, "soft"), rtol=1e-4, atol=1e-4)
    batch = Sifter(model, keep=0.5, depth=DEPTH, dtype=None, family=family).sift(pool)
    inputs = {key: value for key, value in batch.items() if key != "soft"}
    torch.testing.assert_close(
        scorers.training_loss(model, batch, family=family), F.cross_entropy(model(**inputs).logits, batch["soft"])
    )


def test_a_plain_model_with_soft_targets_is_scored_by_their_cross_entropy():
    model = build("plain", "sequence_classification")
    pool = mixed(model)
    family = Family("blocks", (("head",),), "sequence_classification", problem="single_label")
    scores = scorers.early_exit_loss(model, pool, depth=DEPTH, dtype=None, family=family)
    torch.testing.assert_close(scores, cross_entropies(model, pool, "labels"), rtol=1e-4, atol=1e-4)


def test_probabilities_that_may_be_indicators_are_refused_until_the_user_says_what_they_are():
    model = build("plain", "sequence_classification")
    pool, row = mixed(model), models.row_of(model)
    (problem,) = check(model, inputs=pool, family=row)
    assert "add up to 1" in problem.reason
    with pytest.raises(ValueError, match=r"problem='single_label'"):
        Sifter(model, keep=0.5, family=row).sift(pool)
    for kind in ("single_label", "multi_label"):
        Sifter(model, keep=0.5, family=Family("blocks", (("head",),), row.task, problem=kind)).sift(pool)
    pool["labels"] = pool["labels"] + (torch.arange(ROWS)[:, None] == 1)  # now they can be indicators only
    Sifter(model, keep=0.5, family=row).sift(pool)


def test_a_model_that_takes_probabilities_for_indicators_is_followed_and_says_so(caplog):
    model = classifier()
    pool = mixed(model)
    with caplog.at_level(logging.WARNING, "earlysift"):
        assert_exits_are_stock_models(model, pool)
    assert "takes them for indicators of several classes" in caplog.text


def test_a_model_that_computes_another_loss_of_soft_targets_is_refused_with_the_way_out():
    model = classifier()
    (problem,) = check(model, inputs=mixed(model), family=Family(problem="single_label"))
    assert "The loss that the model returns" in problem.reason
    assert "Family(labels='...')" in problem.remedy


def test_soft_targets_that_are_certain_are_class_ids():
    logits = torch.randn(4, CLASSES, generator=Generator().manual_seed(0))
    ids = torch.tensor([3, 0, -100, 1])
    soft = torch.where(ids[:, None] == -100, -100, F.one_hot(ids.clamp(min=0), CLASSES)).float()
    for measure in (LOSS, ENTROPY):
        torch.testing.assert_close(
            losses.class_scores(measure, logits, soft, problem="single_label"),
            losses.class_scores(measure, logits, ids),
        )


def test_a_trainer_with_a_loss_of_its_own_selects_by_soft_targets(tmp_path):
    model = classifier(problem_type="single_label_classification")
    pool = mixed(model, rows=16)
    dataset = [{key: value[row] for key, value in pool.items()} for row in range(16)]

    def loss(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs.logits, labels)

    trainer = trainer_of(model, dataset, tmp_path, config={"compute_loss_func": loss})
    assert trainer.train().metrics["samples_trained"] == 16


# Regression and several labels


@pytest.mark.parametrize(
    ("problem", "outputs", "labels"),
    [
        ("regression", 1, torch.linspace(-1, 1, ROWS)),
        ("regression", 3, torch.linspace(-1, 1, 3 * ROWS).reshape(ROWS, 3)),
        ("multi_label_classification", 3, torch.arange(3 * ROWS).reshape(ROWS, 3).remainder(2).float()),
        (None, 3, torch.arange(3 * ROWS).reshape(ROWS, 3).remainder(2).float()),
    ],
)
def test_regression_and_several_labels_at_an_exit_are_a_stock_model_of_fewer_layers(problem, outputs, labels):
    model = classifier(problem_type=problem, num_labels=outputs)
    pool = models.batch_for(model, "sequence_classification", ROWS, LENGTH, Generator().manual_seed(1))
    assert_exits_are_stock_models(model, pool | {"labels": labels})


# Keys of labels


def test_labels_under_another_key_are_scored_as_those_under_the_usual_one():
    for model, task in ((build("llama", "causal_lm"), "causal_lm"), (classifier(), "sequence_classification")):
        pool = models.batch_for(model, task, ROWS, LENGTH, Generator().manual_seed(1))
        renamed = {key: value for key, value in pool.items() if key != "labels"} | {"targets": pool["labels"]}
        family = Family(labels="targets")
        assert check(model, depth=DEPTH, inputs=renamed, family=family) == []
        scores = scorers.early_exit_loss(model, renamed, depth=DEPTH, dtype=None, family=family)
        assert torch.equal(scores, scorers.early_exit_loss(model, pool, depth=DEPTH, dtype=None))
        batch = Sifter(model, keep=0.5, depth=DEPTH, dtype=None, family=family).sift(renamed)
        usual = Sifter(model, keep=0.5, depth=DEPTH, dtype=None).sift(pool)
        assert torch.equal(batch["targets"], usual["labels"])


def test_a_key_in_the_config_is_found_as_every_row_is():
    model = build("gpt2", "causal_lm", earlysift_family={"labels": "next_tokens"})
    pool = models.batch_for(model, "causal_lm", ROWS, LENGTH, Generator().manual_seed(1))
    usual = scorers.early_exit_loss(model, pool, depth=DEPTH, dtype=None, family=Family(labels="labels"))
    pool["next_tokens"] = pool.pop("labels")
    assert torch.equal(scorers.early_exit_loss(model, pool, depth=DEPTH, dtype=None), usual)


def test_a_pool_without_labels_names_the_keys_that_it_has_and_how_to_name_one():
    model, pool = classifier(), questions()
    with pytest.raises(ValueError, match=r"\['attention_mask', 'end_positions', .*family=Family\(labels='...'\)"):
        Sifter(model, keep=0.5).sift(pool)
    with pytest.raises(ValueError, match=r"Expected a mapping with 'start_positions' and 'end_positions'"):
        Sifter(reader(), keep=0.5).sift({"input_ids": pool["input_ids"]})


def test_a_row_without_layers_changes_only_what_it_gives():
    model = build("llama", "causal_lm")
    assert find_anatomy(model, Family(labels="y"))[:7] == find_anatomy(model)[:7]
    assert find_anatomy(model, Family(task="masked_lm")).task == "masked_lm"
    for row, reason in (
        (Family(labels=("a", "b")), "Expected 1 keys of labels for causal_lm"),
        (Family(heads=(("nothing",),)), "has none of the heads"),
    ):
        (problem,) = check(model, family=row)
        assert reason in problem.reason
    with pytest.raises(ValueError, match="labels must be the name of a key"):
        Family(labels=3)
    with pytest.raises(ValueError, match="problem must be one of single_label, multi_label, regression"):
        Family(problem="soft")


# CTC

_SPEECH = {
    **{"conv_dim": [8, 8], "conv_stride": [2, 2], "conv_kernel": [3, 3], "num_feat_extract_layers": 2},
    **{"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "hidden_size": 32, "intermediate_size": 48},
    **{"num_attention_heads": 4, "num_hidden_layers": models.LAYERS, "pad_token_id": 0, "vocab_size": 20},
}


def listener(name="Wav2Vec2", **config):
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, f"{name}ForCTC")(getattr(transformers, f"{name}Config")(**_SPEECH, **config))
    return models.widen(model).train()


def speech(rows=ROWS, length=120):
    generator = Generator().manual_seed(1)
    mask = (torch.arange(length) < torch.linspace(60, length, rows).long()[:, None]).long()
    labels = torch.randint(1, 20, (rows, 6), generator=generator)
    labels[1, 4:] = labels[2, 1:] = labels[3, :] = -100  # the fourth says nothing
    return {
        "input_values": torch.randn(rows, length, generator=generator) * mask,
        "attention_mask": mask,
        "labels": labels,
    }


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", ["Wav2Vec2", "Hubert"])
def test_ctc_at_an_exit_is_a_stock_model_of_fewer_layers(name, reduction):
    model = listener(name, ctc_loss_reduction=reduction)
    assert_exits_are_stock_models(model, speech())
    assert model.config.ctc_loss_reduction == reduction
    assert_sifted_loss_is_the_models(model, speech())


def test_a_transcript_longer_than_its_sound_has_the_loss_that_the_model_gives_it():
    pool = speech()
    pool["attention_mask"][4, 8:] = 0
    for zero_infinity, expected in ((False, torch.inf), (True, 0.0)):
        model = listener(ctc_zero_infinity=zero_infinity)
        scores = scorers.early_exit_loss(model, pool, depth=DEPTH, dtype=None)
        assert scores[4] == expected
        torch.testing.assert_close(scores, one_at_a_time(model, pool), rtol=1e-4, atol=1e-4)


def test_ctc_has_no_other_measure_and_no_model_without_a_ctc_loss_of_its_own():
    with pytest.raises(ValueError, match="score='entropy' needs a prediction of single labels"):
        scorers.at_exit(ENTROPY, DEPTH)(listener(), speech())
    (problem,) = check(build("plain", "causal_lm"), family=Family("blocks", task="ctc"))
    assert "no config.ctc_loss_reduction" in problem.reason


def test_a_trainer_selects_speech(tmp_path):
    pool = speech(rows=16)
    dataset = [{key: value[row] for key, value in pool.items()} for row in range(16)]
    trainer = trainer_of(listener(ctc_loss_reduction="mean"), dataset, tmp_path, epochs=1)
    assert trainer.train().metrics["samples_trained"] == 8


# Several documents in a row


def documents(rows=ROWS, length=12, vocabulary=VOCABULARY):
    """Rows of three documents each, which position_ids tell apart; the first token of a document predicts nothing."""
    generator = Generator().manual_seed(1)
    ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
    starts = torch.stack([torch.randperm(length - 1, generator=generator)[:2].sort().values + 1 for _ in range(rows)])
    begins = torch.zeros(rows, length, dtype=torch.bool).scatter(1, starts, True)
    begins[:, 0] = True
    place = torch.arange(length).expand(rows, length)
    positions = place - torch.where(begins, place, 0).cummax(dim=1).values
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(begins, -100)}


def split(row):
    """The documents of a row, each a batch of one."""
    starts = [*(row["position_ids"][0] == 0).nonzero().flatten().tolist(), row["position_ids"].size(1)]
    return [{key: value[:, a:b] for key, value in row.items()} for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3"])
def test_documents_of_a_row_do_not_see_one_another_at_an_exit(family):
    model, pool = build(family, "causal_lm", use_cache=False), documents()
    assert_exits_are_stock_models(model, pool)
    scores, stock = scorers.early_exit_loss(model, pool, depth=DEPTH, dtype=None), shorter(model, DEPTH).eval()
    for row in range(ROWS):
        parts = split(pools.take(pool, slice(row, row + 1)))
        with torch.no_grad():
            sums = [F.cross_entropy(stock(**p).logits[0, :-1], p["labels"][0, 1:], reduction="sum") for p in parts]
        torch.testing.assert_close(scores[row], sum(sums) / (pool["labels"][row] != -100).sum(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_model_whose_cache_makes_it_mix_the_documents_of_a_row_is_refused(family):
    model, pool = build(family, "causal_lm"), documents()
    assert model.config.use_cache
    mixes = model(**pool).loss
    model.config.use_cache = False
    assert (model(**pool).loss - mixes).abs() > 1e-3  # what a plain loop would train on, unnoticed
    model.config.use_cache = True
    with pytest.raises(ValueError, match=r"use_cache = False"):
        Sifter(model, keep=0.5).sift(pool)
    whole = pool | {"position_ids": torch.arange(12).expand(ROWS, 12)}
    Sifter(model, keep=0.5).sift(whole)


# Losses that are no sum over samples


class Pairs(nn.Module):
    """Images and texts whose loss compares every pair of a batch with the others."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x, labels=None):
        for layer in self.layers:
            x = x + layer(x).tanh()
        logits = x @ x.roll(1, dims=-1).T
        return {"logits": x, "loss": None if labels is None else F.cross_entropy(logits, torch.arange(len(x)))}


def test_a_contrastive_loss_is_refused_with_the_reason():
    model = models.widen(Pairs())
    pool = {"x": torch.randn(ROWS, 8, generator=Generator().manual_seed(0)), "labels": torch.arange(ROWS)}
    (problem,) = check(model, family=Family("layers", task="sequence_classification"), inputs=pool)
    assert "depends on the other samples of the batch, as that of contrastive pairs" in problem.reason
    assert "score=lambda model, pool" in problem.remedy
