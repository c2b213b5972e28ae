import argparse
import json
import math
import subprocess
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from earlysift import checks, scorers
from earlysift.compare.settings import Settings
from earlysift.pretrain.corpus import held_out
from earlysift.pretrain.models import build_bert, build_fine_tuned, save_encoder
from earlysift.pretrain.stream import Stream
from earlysift.pretrain.workload_settings import MASKED, TASKS, WorkloadSettings
from earlysift.pretrain.workloads import load_workload

for package in ("tokenizers", "sklearn"):
    pytest.importorskip(package)
datasets = pytest.importorskip("datasets")

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
NEW_TASKS = Path(__file__).parent / "new_tasks"
needs_shared_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the corpora of {SHARED} are not here")

SMALL = {"layers": 2, "width": 32, "length": 16, "vocab_size": 200, "validation_samples": 40}
KINDS = ("good", "bad", "odd")


def load_small(**given):
    """A small workload, from the fields of its settings and from what else its task takes, by name."""
    names = {field.name for field in fields(WorkloadSettings)}
    settings = {name: value for name, value in {**SMALL, **given}.items() if name in names}
    extras = {name: value for name, value in given.items() if name not in names}
    return load_workload(WorkloadSettings(**settings), **extras)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A folder with labelled texts whose class can be read off their words."""
    folder = tmp_path_factory.mktemp("reviews")
    for part, first, count in (("train", 0, 400), ("validation", 1000, 60)):
        rows = [
            {"label": KINDS[n % 3], "text": f"the {KINDS[n % 3]} film number {n} was seen"}
            for n in range(first, first + count)
        ]
        (folder / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def load(table):
    """A small workload of a task, on data that suits it."""
    data = {
        "masked_lm": {"max_characters": 150_000},
        "causal_lm": {"max_characters": 150_000},
        "masked_characters": {"max_characters": 150_000, "vocab_size": 64},
        "classification": {"data": (table,)},
        "image": {},
    }

    return lambda task, **settings: load_small(task=task, **data[task] | settings)


def equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def equal_samples(left, right):
    return equal(left.train, right.train) and equal(left.validation, right.validation)


every_task = pytest.mark.parametrize("task", TASKS)


# What holds for every task


@every_task
def test_the_same_arguments_give_the_same_workload_and_no_global_generator_is_touched(load, task):
    before = torch.get_rng_state()
    first, second = load(task, train_samples=100, repeated=0.5), load(task, train_samples=100, repeated=0.5)
    assert equal(first.make_model(3).state_dict(), second.make_model(3).state_dict())
    Stream(first.samples, seed=0).read(0, 40)
    assert torch.equal(torch.get_rng_state(), before)
    assert equal_samples(first.samples, second.samples)
    assert (first.name, first.baseline, first.facts) == (second.name, second.baseline, second.facts)


@every_task
def test_candidates_do_not_depend_on_portions_and_ids_point_to_their_rows(load, task):
    samples = load(task).samples
    whole = Stream(samples, seed=5).read(0, 96)
    pieces = [Stream(samples, seed=5).read(start, 24) for start in range(0, 96, 24)]
    assert equal(whole, {name: torch.cat([piece[name] for piece in pieces]) for name in whole})
    scattered = torch.tensor([95, 3, 3, 40])
    assert equal(Stream(samples, seed=5).take(scattered), {name: values[scattered] for name, values in whole.items()})
    stored = {name: values[Stream(samples, seed=5).ids(0, 96)] for name, values in samples.train.items()}
    if task in MASKED:  # a label stands where a token was hidden
        whole = {"input_ids": torch.where(whole["labels"] == -100, whole["input_ids"], whole["labels"])}
    assert all(torch.equal(whole[name], values) for name, values in stored.items())


@every_task
def test_the_model_learns_a_batch_by_heart(load, task):
    workload = load(task)
    model, batch = workload.make_model(0), Stream(workload.samples, seed=0).read(0, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        loss = scorers.training_loss(model, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@every_task
def test_models_fit_early_exit_and_their_loss_is_the_one_transformers_computes(load, task):
    workload = load(task)
    model, batch = workload.make_model(0), Stream(workload.samples, seed=0).read(0, 8)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    assert checks.check(model, inputs=inputs) == []
    assert scorers.early_exit_loss(model, batch).shape == (8,)
    own = scorers.training_loss(model, batch)
    assert own.item() == pytest.approx(model(**batch).loss.item(), rel=1e-5)


@every_task
def test_a_random_choice_of_training_samples_leaves_validation_as_it_is(load, task):
    whole, some, others = (
        load(task),
        load(task, train_samples=50),
        load(task, train_samples=50, seed_of_data=1),
    )
    name = next(iter(whole.samples.train))
    rows = {tuple(row.flatten().tolist()) for row in whole.samples.train[name]}
    assert len(some.samples) == some.facts["train_samples"] == 50
    assert {tuple(row.flatten().tolist()) for row in some.samples.train[name]} <= rows
    assert not equal(some.samples.train, others.samples.train)
    assert equal(some.samples.validation, whole.samples.validation)
    assert len(load(task, train_samples=10**9).samples) == len(whole.samples)


@every_task
def test_that_share_of_both_parts_is_copies_of_64_training_samples(load, task):
    plain, workload = load(task, train_samples=300), load(task, train_samples=300, repeated=0.5)
    name = next(iter(plain.samples.train))

    def changed(part):
        if part == "train":
            before, after = plain.samples.train[name], workload.samples.train[name]
        else:
            before, after = plain.samples.validation[name], workload.samples.validation[name]
        rows = (before != after).flatten(1).any(dim=1)
        return rows.double().mean().item(), {tuple(row.flatten().tolist()) for row in after[rows]}

    share, copies = changed("train")
    # A copy may fall on its own original.
    assert 0.45 <= share <= 0.5
    assert 50 <= len(copies) <= 64
    originals = {tuple(row.flatten().tolist()) for row in plain.samples.train[name]}
    assert copies <= originals
    if task not in MASKED:  # whose validation has masks of its own
        share, copied = changed("validation")
        assert 0.4 <= share <= 0.5
        assert copied <= originals
        assert len(copied & copies) >= 0.8 * len(copied)
    assert workload.facts["repeated"] == 0.5
    assert "50% repeated" in workload.name


@every_task
def test_validation_is_spread_over_the_part_and_at_most_all_of_it(load, task):
    assert len(load(task, validation_samples=7).samples.validation["labels"]) == 7
    workload = load(task, validation_samples=10**9)
    count = workload.facts["validation_samples"]
    assert count == len(workload.samples.validation["labels"])
    assert count == {"classification": 60, "image": 360}.get(task, count)


# Baselines


def slow_baseline(targets, labels, outputs):
    counts = Counter(targets)
    share = {label: (counts[label] + 1) / (len(targets) + outputs) for label in range(outputs)}
    best = max(share, key=lambda label: (share[label], -label))
    return {
        "accuracy": sum(label == best for label in labels) / len(labels),
        "loss": -sum(math.log(share[label]) for label in labels) / len(labels),
    }


@pytest.mark.parametrize("task", ["classification", "image"])
@pytest.mark.parametrize("flipped", [0.0, 0.3])
def test_baseline_of_classification_is_the_class_shares_of_training(load, task, flipped):
    workload = load(task, flipped=flipped)
    samples = workload.samples
    expected = slow_baseline(
        samples.train["labels"].tolist(), samples.validation["labels"].tolist(), workload.facts["classes"]
    )
    assert workload.baseline == pytest.approx(expected)


@pytest.mark.parametrize("task", [*MASKED, "causal_lm"])
def test_baseline_of_language_modelling_is_the_token_frequencies_of_training(load, task):
    workload = load(task)
    samples = workload.samples
    body = samples.train["input_ids"][:, 1:-1].flatten().tolist()
    if task in MASKED:
        body = [token for token in body if token >= 5]  # special tokens are never hidden
    labels = [label for label in samples.validation["labels"].flatten().tolist() if label != -100]
    assert workload.baseline == pytest.approx(slow_baseline(body, labels, workload.facts["vocab_size"]))
    assert 0 < workload.baseline["accuracy"] < 0.5
    assert workload.baseline["loss"] < math.log(workload.facts["vocab_size"])


# Language modelling


@pytest.mark.parametrize("task", MASKED)
def test_masked_tokens_are_evaluated_on_one_fixed_mask(load, task):
    first, second = load(task), load(task, seed_of_data=9)
    assert equal(first.samples.validation, second.samples.validation)
    labelled = (first.samples.validation["labels"] != -100).sum(dim=1)
    assert (labelled == 2).all()  # 15 % of 16


def test_causal_lm_predicts_every_token_but_the_frame_of_the_block(load):
    workload = load("causal_lm")
    for batch in (workload.samples.validation, Stream(workload.samples, seed=0).read(0, 9)):
        assert torch.equal(batch["labels"][:, 1:-1], batch["input_ids"][:, 1:-1])
        assert (batch["labels"][:, [0, -1]] == -100).all()


def test_a_cut_corpus_has_about_so_many_characters_of_whole_documents(load):
    small, large = load("masked_lm", max_characters=60_000), load("masked_lm", max_characters=240_000)
    ratio = len(large.samples) / len(small.samples)
    assert 2 < ratio < 8
    assert equal_samples(small.samples, load("masked_lm", max_characters=60_000).samples)


def test_several_corpora_are_one(load, tmp_path):
    for name in ("one", "two"):
        (tmp_path / f"{name}.txt").write_text(
            "\n\n".join(f"{name} is paragraph {n}. " + f"{name} goes on. " * 150 for n in range(150))
        )
    parts = [load("masked_lm", data=(tmp_path / f"{name}.txt",)) for name in ("one", "two")]
    both = load("masked_lm", data=(tmp_path / "one.txt", tmp_path / "two.txt"), max_characters=None)
    assert both.name == "one.txt + two.txt, masked LM"
    assert len(both.samples) > 1.5 * max(len(part.samples) for part in parts)


# Classification


def test_texts_are_cut_or_filled_up_and_labels_are_class_numbers(load, table):
    workload = load("classification", length=8)
    validation = workload.samples.validation
    assert workload.facts["classes"] == 3
    assert validation["input_ids"].shape == (40, 8)
    assert torch.equal(validation["attention_mask"], (validation["input_ids"] != 0).long())
    assert (validation["input_ids"][:, 0] == 2).all()
    last = validation["attention_mask"].sum(dim=1) - 1
    assert (validation["input_ids"].gather(1, last[:, None]) == 3).all()
    rows = [json.loads(line) for line in (table / "train.jsonl").read_text().splitlines()]
    names = sorted(KINDS, key=lambda name: (len(name), name))
    assert workload.samples.train["labels"].tolist() == [names.index(row["label"]) for row in rows]


@pytest.mark.parametrize("task", ["classification", "image"])
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_that_share_of_training_labels_is_another_class_and_validation_stays_true(load, task, share):
    clean, noisy, other = load(task), load(task, flipped=share), load(task, flipped=share, seed_of_data=1)
    before, after = clean.samples.train["labels"], noisy.samples.train["labels"]
    assert (before != after).double().mean().item() == pytest.approx(share, abs=1e-3)
    assert set(after.tolist()) == set(before.tolist())
    assert equal(noisy.samples.validation, clean.samples.validation)
    inputs = {name: rows for name, rows in clean.samples.train.items() if name != "labels"}
    assert all(torch.equal(rows, noisy.samples.train[name]) for name, rows in inputs.items())
    assert not torch.equal(after, other.samples.train["labels"])
    assert noisy.facts["flipped"] == share


def test_flipped_labels_fall_on_every_other_class_alike(load):
    clean, noisy = load("image"), load("image", flipped=0.9)
    before, after = clean.samples.train["labels"], noisy.samples.train["labels"]
    steps = Counter(((after - before) % 10).tolist())
    assert all(steps[step] == pytest.approx(144, abs=45) for step in range(1, 10))


@pytest.mark.parametrize("labels", [(1, 2, 10), (1.0, 2.0, None), ("1", "2", "10")])
def test_labels_may_be_numbers_or_words_and_rows_without_one_are_passed_over(tmp_path, labels):
    file = tmp_path / "table.jsonl"
    rows = [{"text": f"text number {n}", "label": labels[n % 3]} for n in range(300)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    workload = load_small(task="classification", data=(file,))
    known = [label for label in labels if label is not None]
    assert workload.facts["classes"] == len(known)
    assert workload.facts["train_samples"] == pytest.approx(100 * len(known), rel=0.1)


def test_whole_numbers_are_the_same_class_in_a_file_that_misses_some_labels(tmp_path):
    (tmp_path / "train.tsv").write_text("label\ttext\n" + "1\tx y\n0\ty z\n\tz\n" * 5)  # read as 1.0, 0.0, nan
    (tmp_path / "dev.tsv").write_text("label\ttext\n" + "1\tx y\n0\ty z\n")
    workload = load_small(task="classification", data=(tmp_path,))
    assert workload.samples.train["labels"].tolist() == [1, 0] * 5
    assert workload.samples.validation["labels"].tolist() == [1, 0]


def test_without_a_validation_file_rows_are_held_out_by_their_text(tmp_path):
    file = tmp_path / "table.tsv"
    lines = [f"{n % 2}\tsentence number {n}\n" for n in range(600)]
    file.write_text("label\tsentence\n" + "".join(lines + lines))  # every row twice
    samples = load_small(task="classification", data=(file,), validation_samples=10**9).samples
    assert len(samples) + len(samples.validation["labels"]) == 1200
    assert len(samples) % 2 == len(samples.validation["labels"]) % 2 == 0
    assert 20 < len(samples.validation["labels"]) < 120
    held_out = {tuple(row) for row in samples.validation["input_ids"].tolist()}
    assert not held_out & {tuple(row) for row in samples.train["input_ids"].tolist()}


# Fine-tuning


@pytest.fixture(scope="module")
def checkpoint(table, tmp_path_factory):
    """An encoder from a few steps of masked language modelling on the texts of the table, and its model."""
    folder = tmp_path_factory.mktemp("checkpoint") / "encoder"
    workload = load_small(task="masked_lm", data=(table,), length=24)
    model = workload.make_model(7)
    save_encoder(model, workload.tokenizer_json, folder)
    return folder, model, workload


def test_fine_tuning_starts_with_the_encoders_weights_and_a_head_from_the_seed(load, checkpoint):
    folder, encoder, _ = checkpoint
    workload = load("classification", checkpoint=folder)
    first, second = workload.make_model(0), workload.make_model(1)
    saved, started = encoder.state_dict(), first.state_dict()
    shared = [name for name in saved if name.startswith("bert.")]
    assert len(shared) > 30
    assert all(torch.equal(saved[name], started[name]) for name in shared)
    assert not torch.equal(first.classifier.weight, second.classifier.weight)
    assert torch.equal(first.bert.embeddings.word_embeddings.weight, second.bert.embeddings.word_embeddings.weight)
    assert first.training
    assert "fine-tuning" in workload.name


def test_fine_tuning_reads_with_the_encoders_tokenizer(load, checkpoint):
    folder, _, pretraining = checkpoint
    assert load("classification", checkpoint=folder, vocab_size=150).tokenizer_json == pretraining.tokenizer_json


def test_a_saved_encoder_is_one_that_transformers_reads(checkpoint):
    transformers = pytest.importorskip("transformers")
    folder, encoder, _ = checkpoint
    again = transformers.BertModel.from_pretrained(folder, add_pooling_layer=False)
    saved = {name: rows for name, rows in encoder.state_dict().items() if name.startswith("bert.")}
    assert equal({f"bert.{name}": rows for name, rows in again.state_dict().items()}, saved)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"layers": 3}, "num_hidden_layers is 2 and not 3"),
        ({"width": 64}, "hidden_size is 32 and not 64"),
        ({"length": 32}, "max_position_embeddings is 24 and not 32"),
    ],
)
def test_a_checkpoint_of_another_shape_is_refused(load, checkpoint, settings, message):
    with pytest.raises(ValueError, match=f"another shape: {message}"):
        load("classification", checkpoint=checkpoint[0], **settings).make_model(0)


def test_a_folder_that_is_no_checkpoint_is_refused_before_anything_is_read(load, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"but config\.json, model\.safetensors, tokenizer\.json is not there"):
        load("classification", checkpoint=tmp_path, data=(tmp_path / "nowhere",))


def test_weights_that_are_not_a_berts_are_refused(checkpoint, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    save_encoder(checkpoint[1], "{}", tmp_path)
    safetensors.save_file({"roberta.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"expected the weights of an encoder, named bert\.\*, but bert\.\S+ is missing"
    ):
        build_fine_tuned(tmp_path, classes=2, vocab_size=150, length=16, layers=2, width=32, seed=0)


def test_only_a_masked_language_model_can_be_saved_as_encoder(load, tmp_path):
    with pytest.raises(ValueError, match=r"Expected a masked language model of transformers, got LlamaForCausalLM"):
        save_encoder(load("causal_lm").make_model(0), "{}", tmp_path)


def test_fine_tuning_starts_from_a_modernbert_as_well(load, table, tmp_path):
    workload = load("masked_lm", data=(table,), length=24, architecture="modernbert")
    encoder = workload.make_model(7)
    assert type(encoder).__name__ == "ModernBertForMaskedLM"
    save_encoder(encoder, workload.tokenizer_json, tmp_path)
    started = load("classification", checkpoint=tmp_path).make_model(0)
    assert type(started).__name__ == "ModernBertForSequenceClassification"
    saved = encoder.state_dict()
    shared = [name for name in saved if name.startswith("model.")]
    assert len(shared) > 10
    assert all(torch.equal(saved[name], started.state_dict()[name]) for name in shared)


def test_a_wrapped_model_is_saved_like_the_model(tmp_path):
    model = build_bert(vocab_size=50, length=16, layers=2, width=32, seed=0)
    save_encoder(model, "{}", tmp_path / "plain")
    save_encoder(torch.compile(model, backend="eager"), "{}", tmp_path / "wrapped")
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "wrapped" / name).read_bytes()


# Images


def test_digits_are_split_into_parts_without_common_images(load):
    samples = load("image", validation_samples=10**9).samples
    assert (len(samples), len(samples.validation["labels"])) == (1437, 360)
    assert samples.train["pixel_values"].shape == (1437, 1, 8, 8)
    assert samples.train["pixel_values"].min() == -1
    assert samples.train["pixel_values"].max() == 1
    assert set(samples.validation["labels"].tolist()) == set(range(10))
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    expected = Counter(tuple((image / 8 - 1).flatten().tolist()) for image in digits.images)
    both = torch.cat([samples.train["pixel_values"], samples.validation["pixel_values"]])
    assert Counter(tuple(image.flatten().tolist()) for image in both) == expected


# What cannot be done


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"task": "translation"},
            f"task must be one of {', '.join(TASKS)}, got 'translation'",
        ),
        ({"task": "classification"}, "needs data: a table with the columns 'label' and 'text'"),
        (
            {"task": "image", "checkpoint": Path("x")},
            r"image does not take checkpoint; .* task it takes data, flipped, augmented\.",
        ),
        ({"task": "masked_lm", "text_column": "x"}, "Expected data to go with text_column, got none"),
        ({"task": "causal_lm", "text_column": "x", "stream": True}, "to go with text_column and stream, got none"),
        ({"task": "image", "text_column": "x"}, "image does not take text_column; leave that out"),
        ({"task": "causal_lm", "label_column": "x"}, "causal_lm does not take label_column; leave that out"),
        *(
            ({"task": task, "augmented": True}, f"^The task {task} does not take augmented; leave that out")
            for task in ("masked_lm", "causal_lm", "classification")
        ),
        (
            {"task": "classification", "data": "x", "architecture": "modernbert"},
            "classification does not take architecture; leave that out",
        ),
        ({"task": "masked_lm", "flipped": 0.2}, "masked_lm does not take flipped; leave that out"),
        ({"task": "image", "flipped": 1.0}, r"flipped must be in \[0, 1\), got 1.0"),
        ({"task": "image", "repeated": -0.1}, r"repeated must be in \[0, 1\), got -0.1"),
        ({"task": "image", "max_characters": 5}, "image does not take max_characters; leave that out"),
        ({"task": "causal_lm", "checkpoint": Path("x")}, "causal_lm does not take checkpoint; leave that out"),
        (
            {"task": "classification", "data": "x", "checkpoint": Path("x"), "tokenizer_file": Path("y")},
            "A checkpoint brings its tokenizer; leave tokenizer_file out",
        ),
        ({"task": "image", "train_samples": 0}, "train_samples must be at least 1, got 0"),
        ({"task": "image", "validation_samples": 0}, "validation_samples must be at least 1, got 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused_with_the_way_out(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_small(**settings)
    assert "\n" not in str(caught.value)


def test_all_problems_of_settings_are_said_at_once():
    with pytest.raises(ValueError, match=r"^flipped must.*\ntrain_samples must[^\n]*$"):
        load_small(task="image", train_samples=-1, flipped=7)
    with pytest.raises(ValueError, match="image does not take text_column, label_column, stream, whole_word; leave"):
        load_small(task="image", text_column="x", label_column="y", stream=True, whole_word=True)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.tsv", "kind\ttext\n1\tx\n", "expected a column named 'label', found the columns kind, text; rename"),
        ("a.tsv", "label\tone\ttwo\n1\tx\ty\n", "expected a column of strings named 'text'"),
        ("a.txt", "just text", r"a\.txt: expected a table with a column of labels .* choose the task masked_lm"),
        (
            "train.tsv",
            "label\ttext\n" + "1\tx y\n" * 5,
            "two classes or more in training, found only '1'; add samples of another class",
        ),
        ("train.tsv", "label\ttext\n1\t\n\tx\n", "expected text, found none in"),
    ],
)
def test_a_table_that_does_not_serve_is_refused_by_name(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    (tmp_path / "validation.tsv").write_text("label\ttext\n1\tx y\n" if name == "train.tsv" else "")
    if name != "train.tsv":
        (tmp_path / "validation.tsv").unlink()
    with pytest.raises(ValueError, match=message):
        load_small(task="classification", data=(tmp_path,))


@pytest.fixture(scope="module")
def columns():
    """A table with two columns that might hold the text, and two that might hold the label."""
    count = 120
    return {
        "text": ["no"] * count,
        "body": [f"the {KINDS[n % 3]} film number {n} was seen" for n in range(count)],
        "label": [0] * count,
        "stars": [n % 3 for n in range(count)],
    }


@pytest.mark.parametrize("write", ["to_csv", "to_json", "to_parquet", "save_to_disk"])
def test_named_columns_are_text_and_label_in_every_kind_of_table(columns, write, tmp_path):
    path = tmp_path / {"to_csv": "a.csv", "to_json": "a.jsonl", "to_parquet": "a.parquet", "save_to_disk": "a"}[write]
    getattr(datasets.Dataset.from_dict(columns), write)(path)
    settings = {"task": "classification", "data": (path,)}
    named = {"text_column": "body", "label_column": "stars"}
    workload = load_small(**settings, **named)
    compared = load_workload(Settings(**SMALL, **settings, **named))
    assert torch.equal(compared.samples.validation["labels"], workload.samples.validation["labels"])
    assert workload.facts["classes"] == 3
    held = [n for n in range(120) if held_out(columns["body"][n])]
    assert workload.samples.validation["labels"].tolist() == [n % 3 for n in held]
    ids = [tuple(row) for row in workload.samples.train["input_ids"].tolist()]
    assert len(set(ids)) == len(ids) == 120 - len(held)
    listed = r"found the columns text.*, body.*, label.*, stars"
    with pytest.raises(ValueError, match=rf"expected a column named 'kind', {listed}"):
        load_small(**settings, label_column="kind")
    with pytest.raises(
        ValueError, match=r"named 'title', as text_column says; found the columns text.*, body.*, stars"
    ):
        load_small(**settings, text_column="title")


def test_a_saved_data_set_with_class_names_is_classified_in_its_own_parts(table, load, tmp_path):
    parts = {part: str(table / f"{part}.jsonl") for part in ("train", "validation")}
    saved = datasets.load_dataset("json", data_files=parts, cache_dir=str(tmp_path / "cache")).class_encode_column(
        "label"
    )
    assert saved["train"].features["label"].names == sorted(KINDS)
    saved.save_to_disk(tmp_path / "saved")
    plain, arrow = load("classification"), load("classification", data=(tmp_path / "saved",))
    assert torch.equal(plain.samples.train["input_ids"], arrow.samples.train["input_ids"])
    assert len(arrow.samples.validation["labels"]) == len(plain.samples.validation["labels"])
    pairs = set(zip(plain.samples.train["labels"].tolist(), arrow.samples.train["labels"].tolist(), strict=True))
    assert len(pairs) == 3  # the same classes, numbered in another order


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_text_column_is_what_language_models_read(columns, stream, tmp_path):
    rows = {name: values * 20 for name, values in columns.items()}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "saved")
    settings = {"task": "masked_lm", "data": (tmp_path / "saved",), "stream": stream}
    by_name = load_small(**settings, text_column="body")
    assert "film" in json.loads(by_name.tokenizer_json)["model"]["vocab"]
    with pytest.raises(ValueError, match=r"named 'words', .*found the columns text \(string\), body \(string\)"):
        load_small(**settings, text_column="words")


def test_a_class_that_only_validation_has_is_named(tmp_path):
    (tmp_path / "train.tsv").write_text("label\ttext\n" + "1\tx y\n2\tz\n" * 5)
    (tmp_path / "dev.tsv").write_text("label\ttext\n3\tx y\n")
    with pytest.raises(
        ValueError, match="classes that training does not have: 3; leave their samples out, or add some to training"
    ):
        load_small(task="classification", data=(tmp_path,))


# Real data


@needs_shared_data
def test_sst2_has_its_published_sizes_and_loads_in_seconds_from_the_cache():
    settings = {"length": 32, "vocab_size": 2048, "validation_samples": 10**9}
    workload = load_small(task="classification", data=(SHARED / "sst2",), **settings)
    assert (len(workload.samples), workload.facts["validation_samples"]) == (67_349, 872)
    assert workload.facts["classes"] == 2
    assert workload.baseline["accuracy"] == pytest.approx(444 / 872)  # positive, the larger class of training
    again = load_small(task="classification", data=(SHARED / "sst2",), **settings)
    assert equal_samples(again.samples, workload.samples)


@needs_shared_data
def test_wikipedia_and_books_are_one_corpus_that_loads_cut():
    pytest.importorskip("zstandard")
    paths = (SHARED / "wikipedia-en", SHARED / "books-litbank")
    workload = load_small(task="masked_lm", data=paths, max_characters=400_000)
    assert workload.name == "wikipedia-en + books-litbank, masked LM"
    assert len(workload.samples) > 5_000


# Whole words


def byte_level(path, special_first):
    """A byte-level BPE tokenizer.json trained on this Python's `this` and `argparse`, with BERT's special tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special if special_first else [],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(argparse.__file__).read_text()], trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))
    return tokenizer


@pytest.mark.parametrize("special_first", [True, False])
def test_whole_words_of_byte_level_bpe_are_hidden_together(special_first, load, tmp_path):
    tokenizer = byte_level(tmp_path / "tokenizer.json", special_first)
    workload = load("masked_lm", whole_word=True, length=64, tokenizer_file=tmp_path / "tokenizer.json")
    first = torch.tensor([tokenizer.id_to_token(i)[0] in "ĠĊ" for i in range(tokenizer.get_vocab_size())])
    special = {tokenizer.token_to_id(name) for name in ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")}
    for batch in (workload.samples.validation, Stream(workload.samples, seed=0).read(0, 64)):
        labels = batch["labels"]
        hidden = labels != -100
        assert hidden.any()
        assert special.isdisjoint(labels.unique().tolist())
        inputs = torch.where(hidden, labels, batch["input_ids"])
        inside = ~first[inputs[:, 2:-1]] & ~torch.isin(inputs[:, 1:-2], torch.tensor(sorted(special)))
        inside &= ~torch.isin(inputs[:, 2:-1], torch.tensor(sorted(special)))
        assert inside.double().mean() > 0.3
        assert torch.equal(hidden[:, 2:-1][inside], hidden[:, 1:-2][inside])


def test_validation_hides_whole_words_as_training_does(load):
    workload = load("masked_lm", whole_word=True, length=64)
    vocabulary = json.loads(workload.tokenizer_json)["model"]["vocab"]
    inside = torch.tensor([token.startswith("##") for token in sorted(vocabulary, key=vocabulary.get)])
    for batch in (workload.samples.validation, Stream(workload.samples, seed=0).read(0, 64)):
        hidden = batch["labels"] != -100
        shown = torch.where(hidden, batch["labels"], batch["input_ids"])
        continues = inside[shown[:, 2:-1]] & (shown[:, 1:-2] > 4)
        assert continues.any()
        assert torch.equal(hidden[:, 2:-1][continues], hidden[:, 1:-2][continues])
        assert hidden.sum(dim=1).max() <= 10


def test_whole_words_of_other_tasks_are_refused(load):
    for task in ("causal_lm", "classification", "image"):
        with pytest.raises(ValueError, match=f"{task} does not take whole_word; leave that out"):
            load(task, whole_word=True)


# A task of one's own


PROGRAM = """
import sys
from earlysift.pretrain import tasks
tasks.__path__.append(sys.argv.pop(1))  # where a contributor adds a file
from earlysift.cli import main
sys.exit(main())
"""


def test_a_task_is_one_new_file(tmp_path):
    given = ("--task", "majority", "--layers", "2", "--width", "32", "--length", "9", "--flipped", "0.1")
    given += ("--validation-samples", "50", "--budget", "0.3", "--evaluations", "3", "--arms", "uniform", "sift")
    command = [sys.executable, "-c", PROGRAM, NEW_TASKS, "compare", *given, "--out", tmp_path / "out"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["complete"]
    assert results["config"]["task"] == "majority"
    assert results["data"] == {
        **{"name": "majority of bits, 10% of labels flipped", "task": "majority"},
        **{"train_samples": 1000, "validation_samples": 50, "length": 9, "classes": 2, "flipped": 0.1, "repeated": 0.0},
        "augmented": False,
    }
    assert all(arm["runs"][0]["curve"][-1]["accuracy"] > 0 for arm in results["arms"].values())
    command = [sys.executable, "-c", PROGRAM, NEW_TASKS, "compare", "--task", "majority", "--data", str(tmp_path)]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "The task majority does not take data; leave that out." in done.stderr
