"""What a process runs with: memory is kept and threads are chosen unless the user has decided, and results say so."""

import json
import os
import platform
import shutil
import subprocess
import sys

import pytest

import earlysift.environment
from earlysift import folders
from pretraining import arguments_for, assert_bit_equal

PROBE = """
import json, resource, statistics, sys, torch
from earlysift import environment
if "keep" in sys.argv:
    environment.keep_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(1 << 24)
counts = []
for _ in range(21):
    before = faults()
    torch.ones(1 << 24)
    counts.append(faults() - before)
print(json.dumps([statistics.median(counts), environment.machine(torch.device("cpu"))["keeps_memory"]]))
"""


def torch_threads():
    """Threads that torch takes where nobody has decided."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def probed(*arguments, **variables):
    """Page faults of making and freeing 64 MiB in a process of its own, as a rule; whether it keeps memory."""
    undecided = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_", "GLIBC_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        env=undecided | variables,
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(
    ("arguments", "variables"),
    [(("keep",), {}), ((), earlysift.environment.STEADY_MEMORY)],
    ids=["from within", "from without"],
)
def test_memory_that_is_kept_is_not_given_page_by_page_again(arguments, variables):
    assert probed()[1] is False
    faults, keeps = probed(*arguments, **variables)
    assert keeps is True
    assert faults < 1  # not one for every tensor


def test_memory_is_left_to_what_the_user_has_decided():
    asked = {"THP_MEM_ALLOC_ENABLE": "0", "MALLOC_MMAP_THRESHOLD_": "131072"}
    faults, keeps = probed("keep", **asked)
    assert keeps is False
    assert faults >= 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_what_the_user_says_of_other_matters_decides_nothing():
    assert probed("keep", MALLOC_ARENA_MAX="2")[1] is True


THREADS = """
import json, os, sys, time, torch
if "set before" in sys.argv:
    torch.set_num_threads(3)
from earlysift import environment
if "set after" in sys.argv:
    torch.set_num_threads(3)
slow = 1 if "together" in sys.argv else torch.get_num_threads()  # the number of threads on which a step takes long
taken = []
def step():
    taken.append(torch.get_num_threads())
    time.sleep(0.5 if torch.get_num_threads() == slow else 0.001)
with environment.same_threads_after():
    found = torch.get_num_threads()
    chosen = environment.choose_threads(step)
    clock = environment.work_clock(torch.device("cpu"))
    now = torch.get_num_threads()
print(json.dumps([found, chosen, now, torch.get_num_threads(), sorted(set(taken)), clock is time.process_time]))
"""


def chosen(*arguments, **variables):
    """Threads that are found, chosen, in use, in use afterwards, and tried; whether a clock of one thread is used."""
    undecided = {
        name: value for name, value in os.environ.items() if name not in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, "-c", THREADS, *arguments],
        env=undecided | variables,
        stdout=subprocess.PIPE,
        check=True,
        timeout=300,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(torch_threads() == 1, reason="there is nothing to choose from on one core")
def test_one_thread_computes_unless_all_are_clearly_faster_and_both_are_tried():
    found, *others = chosen("alone")
    assert others == [1, 1, found, [1, found], True]
    found, *others = chosen("together")
    assert others == [found, found, found, [1, found], False]


@pytest.mark.parametrize(
    ("arguments", "variables"),
    [
        ((), {"OMP_NUM_THREADS": "2"}),
        ((), {"MKL_NUM_THREADS": "2"}),
        ((), {"OMP_NUM_THREADS": "1"}),
        (("set before",), {}),
        (("set after",), {}),
    ],
    ids=["variable", "variable of MKL", "one", "call before the import", "call after the import"],
)
def test_threads_are_left_to_what_the_user_has_decided_and_nothing_is_tried(arguments, variables):
    found, *others = chosen(*arguments, **variables)
    assert others == [found, found, found, [], found == 1]
    assert found == 3 or not arguments


def test_a_pretraining_chooses_its_threads_and_leaves_no_trace_of_that(data, environment, uncut, tmp_path):
    undecided = {name: value for name, value in environment.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "earlysift", "pretrain", *arguments_for(data, tmp_path / "run")]
    done = subprocess.run(command, env=undecided, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert folders.marker(tmp_path / "run")["threads"] == folders.marker(uncut)["threads"] == 1
    assert_bit_equal(tmp_path / "run", uncut)


def test_a_pretraining_goes_on_with_the_threads_that_it_began_with(start, copy):
    folders.mark(copy, "pretrain", threads=2)
    shutil.rmtree(copy / "checkpoint-12")
    code, _, err = start(copy, "--resume")
    assert code == 0, err
    assert json.loads((copy / "results.json").read_text())["machine"]["threads"] == 2
    assert folders.marker(copy)["threads"] == 2


@pytest.mark.parametrize("name", ["foo", "", "meta", "cpu:1", "cuda:99"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(name):
    with pytest.raises(ValueError, match=f"for device={name!r}; accelerators found: .*Use --device cpu"):
        earlysift.environment.usable_device(name)
    assert earlysift.environment.usable_device("cpu").type == "cpu"
