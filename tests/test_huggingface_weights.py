"""Weights of samples within the Trainer: the loss is that of a slow loop, and where nothing can weigh it is refused."""

import dataclasses

import pytest
import torch
import transformers
from torch import Generator
from torch.nn.functional import cross_entropy
from transformers import DataCollatorWithFlattening, MixtralConfig, MixtralForCausalLM

import models
from earlysift import SiftConfig, Sifter, selectors
from earlysift.adapters.huggingface import SiftTrainer
from test_huggingface import (
    BATCH,
    HALF,
    RATE,
    Recorded,
    assert_equal_runs,
    fine_tuned,
    llama,
    logged,
    samples,
    trained,
)

DRAWN = dataclasses.replace(HALF, select=selectors.proportional)
TASKS = [("llama", "causal_lm"), ("bert", "sequence_classification"), ("bert", "masked_lm")]


def sums_of(model, batch):
    """The sum of every sample's losses over its labelled positions, and how many these are."""
    labels, logits = batch["labels"], model(**{name: rows for name, rows in batch.items() if name != "labels"}).logits
    if labels.ndim == 1:
        return cross_entropy(logits, labels, reduction="none"), torch.ones(len(labels))
    if type(model).__name__.endswith("CausalLM"):
        labels, logits = labels[:, 1:], logits[:, :-1]
    losses = cross_entropy(logits.transpose(1, 2), labels, reduction="none")  # 0 where there is no label
    return losses.sum(dim=1), (labels != -100).sum(dim=1).float()


def slow_loop(model, data, config, micro_batches, steps=5):
    """Losses of a training by hand: every sample's loss times its weight, over the labels of the step."""
    sifter = Sifter(model, config, kept=BATCH)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    per_step = type(model).__name__.endswith("CausalLM")  # divides by the labels of a step; BERT by those of a batch
    losses, chosen = [], []
    for step in range(steps):
        parts = []
        for i in range(micro_batches):
            start = 2 * BATCH * (step * micro_batches + i)
            pool = {name: torch.stack([row[name] for row in data[start : start + 2 * BATCH]]) for name in data[0]}
            parts.append((sifter.sift(pool, micro_step=i), sifter.weights))
        chosen += [batch["input_ids"].tolist() for batch, _ in parts]
        found = [(*sums_of(model, batch), weights) for batch, weights in parts]
        labels = sum(counts.sum() for _, counts, _ in found)
        loss = sum((sums * weights).sum() / (labels if per_step else counts.sum()) for sums, counts, weights in found)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, chosen


@pytest.mark.parametrize("accumulated", [1, 3])
@pytest.mark.parametrize(("family", "task"), TASKS)
def test_a_training_by_weights_is_that_of_a_slow_loop(family, task, accumulated, tmp_path):
    data = samples(5 * 3 * 2 * BATCH, family, task)
    options = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": accumulated}
    run = trained(tmp_path, model=models.build(family, task), data=data, sift=DRAWN, **options)
    model = models.build(family, task)
    losses, chosen = slow_loop(model, data, DRAWN, accumulated)
    assert run.batches == chosen
    torch.testing.assert_close(torch.tensor(logged(run)), torch.tensor(losses), rtol=1e-4, atol=1e-4)
    for (name, ours), theirs in zip(run.model.state_dict().items(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    plain = trained(tmp_path / "greedy", model=models.build(family, task), data=data, **options)
    assert logged(plain) != logged(run)


def test_a_run_by_weights_resumes_bit_equal(tmp_path):
    options = {"sift": DRAWN, "gradient_accumulation_steps": 2}
    whole = trained(tmp_path, save_strategy="steps", save_steps=2, **options)
    resumed = trained(tmp_path, resume=str(tmp_path / "checkpoint-2"), model=llama(seed=1), **options)
    assert_equal_runs(resumed, whole)
    assert resumed.batches == whole.batches[4:]


def test_losses_are_remembered_without_their_weights(tmp_path):
    data = [row | {"number": i} for i, row in enumerate(samples(24))]
    config = SiftConfig(
        keep=0.5, score="memory", sample_id="number", select=selectors.proportional, probe_every=0, dtype=None
    )
    options = {"data": data, "sift": config, "learning_rate": 0.0, "max_steps": 12}  # weights stay as they are
    memory = trained(tmp_path, **options).sifter.state_dict()["memory"]
    model = llama()
    pool = {name: torch.stack([row[name] for row in data]) for name in data[0] if name != "number"}
    sums, counts = sums_of(model, pool)
    seen = ~memory["losses"][: len(data)].isnan()
    assert seen.sum() > BATCH
    torch.testing.assert_close(
        memory["losses"][: len(data)][seen], (sums / counts).detach()[seen], rtol=1e-4, atol=1e-4
    )


def test_what_a_model_adds_to_its_loss_is_not_weighed(tmp_path):
    settings = models._COMMON | models._ROTARY | {"num_local_experts": 2, "num_experts_per_tok": 1}
    config = MixtralConfig(**settings, output_router_logits=True, router_aux_loss_coef=0.5)

    def build():
        with torch.random.fork_rng(devices=[]):
            return models.widen(MixtralForCausalLM(config))

    data = samples(4 * BATCH)
    options = {"train_sampling_strategy": "sequential", "max_steps": 1, "gradient_accumulation_steps": 2}
    run = trained(tmp_path, model=build(), data=data, sift=DRAWN, **options)
    model = build()
    sifter = Sifter(model, DRAWN, kept=BATCH)
    sums, counts, added = torch.zeros(()), torch.zeros(()), 0.0
    for i in range(2):
        rows = data[2 * BATCH * i : 2 * BATCH * (i + 1)]
        batch = sifter.sift({name: torch.stack([row[name] for row in rows]) for name in data[0]}, micro_step=i)
        found, labels = sums_of(model, batch)
        sums, counts = sums + (found * sifter.weights).sum(), counts + labels.sum()
        added += 0.5 * model(**batch).aux_loss.item()
    assert added > 0.1
    assert logged(run)[0] == pytest.approx((sums / counts).item() + added, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"loss_type": "dft"}], ids=["nll", "dft"])
def test_supervised_fine_tuning_weighs_what_it_sums_up_and_refuses_another_loss(trl, options, tmp_path):
    options = {"train_sampling_strategy": "sequential", "max_steps": 1, "gradient_accumulation_steps": 2} | options
    if options.get("loss_type"):
        with pytest.raises(ValueError, match="SiftSFTTrainer computes a loss of its own"):
            fine_tuned(trl, tmp_path, DRAWN, **options)
        return
    run = fine_tuned(trl, tmp_path, DRAWN, **options)
    model = llama().train()
    sifter = Sifter(model, DRAWN, kept=BATCH)
    weighed = plain = counts = torch.zeros(())
    for i, pool in zip(range(2), run.get_train_dataloader(), strict=False):
        batch = sifter.sift(dict(pool), micro_step=i)
        assert run.batches[i] == batch["input_ids"].tolist()
        sums, labels = sums_of(model, batch)
        weighed, plain = weighed + (sums * sifter.weights).sum(), plain + sums.sum()
        counts = counts + labels.sum()
    assert logged(run)[0] == pytest.approx((weighed / counts).item(), rel=1e-4)
    assert logged(run)[0] != pytest.approx((plain / counts).item(), rel=1e-2)


class OwnLoss(Recorded):
    """Computes its loss itself, so that nothing can be weighed in it."""

    def compute_loss(self, model, inputs, *arguments, **options):
        return super().compute_loss(model, inputs, *arguments, **options)


@pytest.mark.parametrize(
    ("cls", "options", "reason"),
    [
        (Recorded, {"label_smoothing_factor": 0.1}, "label smoothing computes a loss of its own"),
        (OwnLoss, {}, "OwnLoss computes a loss of its own"),
        (
            SiftTrainer,
            {"trainer": {"compute_loss_func": lambda *_, **__: None}},
            "compute_loss_func computes a loss of its own",
        ),
    ],
)
def test_where_nothing_can_be_weighed_only_the_greedy_rule_is_taken(cls, options, reason, tmp_path):
    with pytest.raises(ValueError, match=rf"Only select=greedy is possible, as {reason}.*Leave select out"):
        trained(tmp_path, cls, sift=DRAWN, **options)


def test_a_run_that_weighed_is_not_resumed_by_one_that_cannot(tmp_path):
    auto = dataclasses.replace(HALF, mode="auto")
    trained(tmp_path, sift=auto, save_strategy="steps", save_steps=3)
    resume = str(tmp_path / "checkpoint-3")
    with pytest.raises(ValueError, match=r"weighed samples in its loss, and this one cannot, as label smoothing"):
        trained(tmp_path, sift=auto, resume=resume, label_smoothing_factor=0.1)
    trained(tmp_path, sift=auto, resume=resume)


def test_a_selector_without_weights_needs_none(tmp_path):
    config = dataclasses.replace(HALF, select=selectors.percentile)
    run = trained(tmp_path, sift=config, label_smoothing_factor=0.1)
    assert [len(batch) for batch in run.batches] == [BATCH] * 5


def test_answers_are_not_weighed(tmp_path):
    model = models.transformers.BertForQuestionAnswering(models.transformers.BertConfig(**models._COMMON))
    rows = [{"input_ids": row["input_ids"], "start_positions": 1, "end_positions": 2} for row in samples(40)]
    with pytest.raises(ValueError, match="the task is CTC or question answering"):
        trained(tmp_path, model=model, data=rows, sift=DRAWN)


def test_documents_of_one_row_are_not_weighed(tmp_path):
    generator = Generator().manual_seed(0)
    data = [{"input_ids": torch.randint(3, 90, (6,), generator=generator).tolist()} for _ in range(4 * BATCH)]
    options = {"data": data, "trainer": {"data_collator": DataCollatorWithFlattening()}}
    with pytest.raises(ValueError, match="remembered or weighed, and cannot be read off batches that are one row"):
        trained(tmp_path, sift=DRAWN, **options)


def test_a_model_that_returns_no_logits_is_refused_with_the_way_out(tmp_path):
    def silenced(module, arguments, output):
        return {"loss": output.loss} if module.training else output

    model = llama()
    model.register_forward_hook(silenced)
    with pytest.raises(ValueError, match=r"Weights of samples need the loss and the logits .* Use select=greedy"):
        trained(tmp_path, model=model, sift=DRAWN)


def test_a_loss_that_comes_without_the_models_forward_pass_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.Trainer, "compute_loss", bypassing)
    with pytest.raises(ValueError, match=r"Weights of samples need the loss and the logits"):
        trained(tmp_path, sift=DRAWN)


def bypassing(self, model, inputs, *arguments, **options):
    """A loss for which no hook of the model runs."""
    return model.forward(**inputs).loss


bypassing.__module__ = transformers.Trainer.__module__
