"""On a GPU: scores, losses and picks are those of the CPU, auto mode steers, runs resume, and the commands run."""

import json
import re

import pytest
import torch
from torch import Generator

import models
from earlysift import Sifter, scorers
from earlysift.control import Control
from earlysift.fidelity import fidelity
from earlysift.measures import MEASURES
from models import ALL, build, row_of
from pretraining import ACCUMULATE, STEPS, curve, kill, ledger

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FEW = [pytest.param(family, task, id=family) for family, task in (("bert", "masked_lm"), ("llama", "causal_lm"))]
SCORES = [*(scorers.at_exit(measure, 1) for measure in MEASURES.values()), scorers.exact()]


def pool_of(model, rows=16, seed=0):
    return models.batch_for(model, models.task_of(model), rows, 12, Generator().manual_seed(seed))


def moved(batch):
    return {name: values.cuda() for name, values in batch.items()}


@pytest.mark.parametrize(("family", "task"), ALL)
def test_scores_and_gradients_are_those_of_the_cpu(family, task):
    model = build(family, task)
    pool, row = pool_of(model), row_of(model)

    def found(batch):
        scores = [score(model, batch, family=row, dtype=None) for score in SCORES]
        loss = scorers.training_loss(model, batch, family=row)
        loss.backward()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        model.zero_grad(set_to_none=True)
        length = torch.stack([gradient.norm() for gradient in gradients]).norm()
        return torch.stack(scores).cpu(), torch.stack([loss.detach(), length]).cpu()

    expected = found(pool)
    model.cuda()
    for ours, theirs in zip(found(moved(pool)), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(("family", "task"), FEW)
def test_bfloat16_ranks_as_float32_does(family, task):
    model = build(family, task).cuda()
    assert scorers.scoring_dtype(torch.device("cuda")) is torch.bfloat16
    pool = moved(pool_of(model, rows=64))
    scores = scorers.early_exit_loss(model, pool)
    assert scores.dtype is torch.float32
    seen = fidelity(scores, scorers.early_exit_loss(model, pool, dtype=None), 32)
    assert seen["rank_correlation"] > 0.99
    assert seen["overlap"] > 0.9


@pytest.mark.parametrize(
    "options", [{}, {"score": "entropy"}, {"score": "exact"}, {"max_positions": 2}, {"trim": True}]
)
@pytest.mark.parametrize(("family", "task"), FEW)
def test_picks_are_those_of_the_cpu(family, task, options):
    picks = []
    for place in ("cpu", "cuda"):
        model = build(family, task).to(place)
        sifter = Sifter(model, keep=0.5, dtype=None, probe_every=2, **options)
        batches = [
            sifter.sift({name: values.to(place) for name, values in pool_of(model, seed=seed).items()})
            for seed in range(4)
        ]
        assert all(values.device.type == place for batch in batches for values in batch.values())
        picks.append([{name: values.cpu() for name, values in batch.items()} for batch in batches])
    for ours, theirs in zip(*picks, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize(("family", "task"), FEW)
def test_auto_mode_probes_and_decides(family, task):
    model = build(family, task).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    costs = {"train": 100.0, "probe": 1.0, **{f"score_{depth}": 1.0 for depth in (1, 2, 3)}}
    sifter = Sifter(model, mode="auto", control=Control(probe_share=0.5, reference_costs=costs))
    for seed in range(24):
        scorers.training_loss(model, sifter.sift(moved(pool_of(model, seed=seed)))).backward()
        optimizer.step()
        optimizer.zero_grad()
    stats = sifter.stats()
    assert stats["sift/trained"] == 24 * 8
    assert stats["sift/probe_ms"] > 0
    assert -1 <= stats["sift/rank_correlation"] <= 1
    again = Sifter(model, mode="auto", control=Control(probe_share=0.5, reference_costs=costs))
    again.load_state_dict(json.loads(json.dumps(sifter.state_dict())))
    assert again.state_dict() == sifter.state_dict()


@pytest.mark.parametrize("arm", ["uniform", "sift", "exact", "auto"])
def test_a_run_on_a_gpu_resumes_where_it_was_killed(arm, start, tmp_path):
    options = ("--device", "cuda", "--arm", arm, "--workers", 2)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(whole, *options)[0] == 0
    assert start(cut, *options, at=kill("compute_loss", 15))[0] == -9
    code, _, err = start(cut, *options, "--resume")
    assert code == 0, err
    ours, theirs = ledger(cut), ledger(whole)
    assert len(ours) == len(theirs) == STEPS * ACCUMULATE
    assert [row["picks"] for row in ours] == [row["picks"] for row in theirs]
    # Attention sums its gradients in any order on a GPU: the last digits may differ.
    for one, other in zip(curve(cut), curve(whole), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_compare_runs_on_a_gpu(data, tmp_path, capsys):
    from earlysift import cli

    options = {"budget": 1, "seeds": 1, "layers": 4, "width": 64, "length": 16, "vocab-size": 300, "evaluations": 3}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    arms = ("uniform", "sift-entropy", "exact", "auto", "selective-backprop", "grad-norm")
    out = tmp_path / "out"
    command = ["compare", "--data", str(data / "text.txt"), "--device", "cuda", "--out", str(out), "--arms", *arms]
    assert cli.main([*command, *arguments]) == 0, capsys.readouterr().err
    results = json.loads((out / "results.json").read_text())
    assert results["complete"]
    assert results["machine"]["accelerator"] == torch.cuda.get_device_name()
    assert all(arm["runs"][0]["steps"] > 3 for arm in results["arms"].values())


def test_the_checkup_measures_the_gpu(capsys):
    from earlysift import cli

    assert cli.main(["check", "demo", "--batch", "4", "--depths", "1", "--seconds", "0"]) == 0
    said = capsys.readouterr().out
    assert torch.cuda.get_device_name() in said
    assert re.search(r"bfloat16", said)
