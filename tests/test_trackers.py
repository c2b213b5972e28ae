"""Trackers, each run for real where it is installed: they store our numbers, and we store no secrets."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pretraining

PAGE = (Path(__file__).resolve().parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
MODULES = {"TensorBoard": "tensorboard", "W&B": "wandb", "trackio": "trackio", "MLflow": "mlflow"}
ENDS = {"TensorBoard": "writer.close()", "MLflow": "mlflow.end_run()"}
SECRET = "0123456789abcdef" * 2 + "-0-secret"
OURS = (".json", ".jsonl", ".html")  # what the run folder holds of the same numbers
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY")
LINES = {
    name: parts
    for name, *parts in re.findall(r"^\| (\S+) \| `([^`]+)` \| `([^`]+)` \|$", PAGE, flags=re.MULTILINE)
    if name in MODULES
}
LOOP = """
import importlib, torch, models
from earlysift import Sifter
{imports}
{once}
model = models.ladder()
sifter = Sifter(model, keep=0.5, family=models.LADDER)
for _ in range(2):
    states, labels = sifter.sift(models.mostly_learnt(torch.Generator().manual_seed(0)))
    torch.nn.functional.cross_entropy(model(states), labels).backward()
    {every}
{end}
"""


@pytest.fixture(params=MODULES)
def tracker(request):
    """The name of a tracker that is installed."""
    module = MODULES[request.param]
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"{module} is not installed: it is heavy, or asks for other versions (docs/extending.md)")
    return request.param


def run(folder, *command):
    """Run Python in a folder, where every tracker writes."""
    path = os.pathsep.join(map(str, (pretraining.SOURCE, Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    environment |= {"WANDB_MODE": "offline", "TRACKIO_DIR": str(folder / "trackio")}
    environment |= {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"} | dict.fromkeys(SECRETS, SECRET)
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def holding(folder, text):
    """The files below a folder that hold a text."""
    return [path for path in folder.rglob("*") if path.is_file() and text.encode() in path.read_bytes()]


def test_the_page_has_lines_for_every_tracker_that_pretrain_knows():
    assert LINES.keys() == MODULES.keys()


def test_the_lines_of_the_page_hand_a_loops_numbers_to_the_tracker(tracker, tmp_path):
    once, every = LINES[tracker]
    imports = (
        "from torch.utils.tensorboard import SummaryWriter"
        if tracker == "TensorBoard"
        else f"import {MODULES[tracker]}"
    )
    code = LOOP.format(imports=imports, once=once, every=every, end=ENDS.get(tracker, "run.finish()"))
    done = run(tmp_path, "-c", code)
    assert done.returncode == 0, done.stderr
    assert holding(tmp_path, "sift/score_ms")


def test_pretraining_logs_to_the_tracker_and_keeps_no_secret(tracker, data, tmp_path):
    out = tmp_path / "run"
    done = run(
        tmp_path,
        "-m",
        "earlysift",
        "pretrain",
        *pretraining.arguments_for(data, out, "model.json"),
        *("--track", MODULES[tracker]),
    )
    assert done.returncode == 0, done.stderr
    for name in ("sift/score_ms", "eval_accuracy" if tracker == "MLflow" else "eval/accuracy"):
        assert any(path.suffix not in OURS for path in holding(tmp_path, name))
    assert (out / "ledgers").is_dir()
    assert holding(tmp_path, SECRET) == []
    assert not any(holding(out, name) for name in SECRETS)
