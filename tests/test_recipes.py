"""The recipes: twins that differ in few lines, run on their real libraries, by one process and by two."""

import contextlib
import difflib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch

import earlysift
import recipes
from recipes import ACCUMULATE, KINDS, LOOPS, RECIPES, SELECTION, WEIGHTS, changed, run_all
from scorecard import cases

ALONE = [loop for loop in LOOPS if loop not in ("fsdp", "ray")]
TOGETHER = ["accelerate", "fsdp", "lightning"]
BATCH, STEPS = 8, 14  # two epochs


@pytest.fixture(scope="module", params=ALONE)
def alone(request, tmp_path_factory):
    """A loop, and the folder of its runs by one process in bfloat16, with accumulation."""
    folder = tmp_path_factory.mktemp(request.param)
    run_all(request.param, folder, "--bf16")
    return request.param, folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """The folder of all loops' runs by two processes that torchrun has started."""
    folder = tmp_path_factory.mktemp("ranks")
    path = os.pathsep.join(map(str, (Path(earlysift.__file__).parents[1], Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [recipes.__file__, str(folder), *TOGETHER]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(params=TOGETHER)
def together(request, two_ranks):
    return request.param, two_ranks / request.param


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def assert_twins_agree(loop, folder):
    weights = WEIGHTS[loop]
    plain = weights(folder / "plain", 5)
    assert len(plain) > 10
    assert equal(weights(folder / "all", 5), plain)
    assert not equal(weights(folder / "whole", 10), plain)


def assert_resumed_as_if_never_cut(loop, folder, ranks):
    weights, selection = WEIGHTS[loop], SELECTION[loop]
    assert equal(weights(folder / "resumed", 10), weights(folder / "whole", 10))
    states = selection(folder / "whole", 10)
    assert selection(folder / "resumed", 10) == states
    assert len(states) == (1 if loop == "accelerate" else ranks)  # it saves what the first process has
    for state in states:
        assert (state["step"], state["pools_per_step"], state["kept"]) == (10, ACCUMULATE, BATCH)
        trained, counts = 10 * ACCUMULATE * BATCH, state["counts"]
        assert (counts["trained"], counts["scored"]) == (trained, counts["candidates"])
        assert 2 * trained - BATCH < counts["candidates"] <= 2 * trained  # the last pool of an epoch is smaller


def test_every_recipe_is_a_pair_that_is_run_here():
    assert sorted(path.parent.name for path in RECIPES.glob("*/plain.py")) == LOOPS
    assert sorted(str(path.relative_to(RECIPES)) for path in RECIPES.rglob("*.py")) == [
        f"{loop}/{kind}.py" for loop in LOOPS for kind in KINDS
    ]


@pytest.mark.parametrize("loop", LOOPS)
def test_twins_are_short_and_differ_in_at_most_fifteen_lines(loop):
    plain, sift = ((RECIPES / loop / f"{kind}.py").read_text().splitlines() for kind in KINDS)
    lines = changed(loop)
    assert 5 <= len(lines) <= 15, "\n".join(lines)
    assert 40 <= len(plain) < len(sift) <= 80


@pytest.mark.parametrize("loop", LOOPS)
def test_the_page_shows_what_differs_and_counts_it(loop):
    page = (RECIPES.parent / "docs" / "loops.md").read_text()
    lines = changed(loop, partial(difflib.unified_diff, n=0, lineterm=""))
    shown = "\n".join(line for line in lines if line[1:].strip())
    assert f"```diff\n{shown}\n```" in page, f"docs/loops.md must show:\n{shown}"
    section = page.partition(f"```diff\n{shown}")[0].rpartition("\n## ")[2].partition("\n")[0]
    assert re.search(rf"^\| \[{re.escape(section)}\]\(#\w+\) \| {len(changed(loop))} \|", page, flags=re.MULTILINE)


def test_keeping_all_candidates_gives_the_plain_recipes_weights_bit_for_bit(alone):
    assert_twins_agree(*alone)


def test_a_recipe_that_is_run_again_goes_on_as_if_never_cut(alone):
    assert_resumed_as_if_never_cut(*alone, ranks=1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A loop to the folder of its run that was never cut."""
    folder = tmp_path_factory.mktemp("whole")

    def ran(loop):
        if not (folder / loop).exists():
            recipes.run(loop, "sift", folder / loop, "--steps", STEPS, "--accumulate", ACCUMULATE)
        return folder / loop

    return ran


POINTS = [  # an epoch has 12 steps
    (loop, point) for point in (12, 1, 3, 5, 7, 9, 11, 13) for loop in ("lightning", "accelerate", "trainer")
]


@pytest.mark.parametrize(("loop", "point"), cases(POINTS, 1))
def test_s07_a_recipe_that_is_cut_at_any_step_goes_on_as_if_it_were_not(loop, point, whole, tmp_path):
    for steps in (point, STEPS):
        recipes.run(loop, "sift", tmp_path / loop, "--steps", steps, "--accumulate", ACCUMULATE)
        assert [state["step"] for state in SELECTION[loop](tmp_path / loop, steps)] == [steps]
    assert equal(WEIGHTS[loop](tmp_path / loop, STEPS), WEIGHTS[loop](whole(loop), STEPS))
    assert SELECTION[loop](tmp_path / loop, STEPS) == SELECTION[loop](whole(loop), STEPS)


def test_two_processes_that_keep_all_candidates_give_the_plain_recipes_weights_bit_for_bit(together):
    assert_twins_agree(*together)


def test_two_processes_go_on_as_if_never_cut(together):
    assert_resumed_as_if_never_cut(*together, ranks=2)


# Ray starts a cluster on this machine, and two workers in it: minutes on a slow one, so that CI leaves it out.
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="no Ray here: pip install 'ray[train]'")


def start_on_ray(kind, folder, *arguments):
    """Copy a recipe into a folder, and start it there."""
    folder.mkdir(parents=True, exist_ok=True)
    script = shutil.copy(RECIPES / "ray" / f"{kind}.py", folder)
    path = os.pathsep.join([str(Path(earlysift.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["RAY_DEDUP_LOGS"] = "0"  # every checkpoint has a line
    command = [sys.executable, script, *map(str, arguments)]
    with (folder / "said").open("a") as said:
        return subprocess.Popen(command, env=environment, cwd=folder, stdout=said, stderr=subprocess.STDOUT)


def must_end(process, folder):
    assert process.wait() == 0, (folder / "said").read_text()[-3000:]


@pytest.fixture(scope="module")
def on_ray(tmp_path_factory):
    """The folder of a loop's runs on a cluster of Ray, one after the other."""
    folder = tmp_path_factory.mktemp("ray")
    for name, (kind, rounds) in recipes.runs("--bf16").items():
        for arguments in rounds:
            must_end(start_on_ray(kind, folder / name, *arguments), folder / name)
    return folder


def saved_on_ray(folder):
    """How many checkpoints both workers have saved in all runs."""
    return (folder / "said").read_text().count("Checkpoint successfully created") // 2


def ray_workers(process):
    for one in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # helpers of Ray come and go
            if "RayTrainWorker" in " ".join(one.cmdline()):
                yield one


@needs_ray
def test_two_workers_of_ray_that_keep_all_candidates_give_the_plain_recipes_weights_bit_for_bit(on_ray):
    assert_twins_agree("ray", on_ray)


@needs_ray
def test_two_workers_of_ray_go_on_as_if_never_cut_and_share_what_is_remembered(on_ray):
    assert_resumed_as_if_never_cut("ray", on_ray, ranks=2)
    assert (saved_on_ray(on_ray / "resumed"), saved_on_ray(on_ray / "whole")) == (2, 2)  # after five steps, and ten


@needs_ray
def test_ray_begins_both_workers_again_where_one_is_killed_and_ends_bit_equal(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    must_end(start_on_ray("sift", whole, "--steps", 200), whole)
    process = start_on_ray("sift", killed, "--steps", 200)
    try:
        while saved_on_ray(killed) < 10 and process.poll() is None:
            time.sleep(0.01)
        _, second = ray_workers(process)
        second.send_signal(signal.SIGKILL)
        must_end(process, killed)
    finally:
        process.terminate()
    assert "Worker died" in (killed / "said").read_text() or "ActorDiedError" in (killed / "said").read_text()
    assert 40 <= saved_on_ray(killed) < 50  # a run that began anew would have saved the first ten again
    assert equal(WEIGHTS["ray"](killed, 200), WEIGHTS["ray"](whole, 200))
    assert SELECTION["ray"](killed, 200) == SELECTION["ray"](whole, 200)
