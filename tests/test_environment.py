"""What a process runs with: memory is kept unless the user has decided, and results say so."""

import json
import os
import platform
import subprocess
import sys

import pytest

from earlysift import environment

PROBE = """
import json, resource, sys, torch
from earlysift import environment
if "keep" in sys.argv:
    environment.keep_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(1 << 24)
before = faults()
for _ in range(20):
    torch.ones(1 << 24)
print(json.dumps([faults() - before, environment.machine(torch.device("cpu"))["keeps_memory"]]))
"""


def probed(*arguments, **variables):
    """Page faults of making and freeing 64 MiB twenty times in a process of its own; whether it keeps memory."""
    undecided = {
        name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "THP_", "GLIBC_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *arguments],
        env=undecided | variables,
        stdout=subprocess.PIPE,
        check=True,
        timeout=120,
    )
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
@pytest.mark.parametrize(
    ("arguments", "variables"), [(("keep",), {}), ((), environment.STEADY_MEMORY)], ids=["from within", "from without"]
)
def test_memory_that_is_kept_is_not_given_page_by_page_again(arguments, variables):
    assert probed()[1] is False
    faults, keeps = probed(*arguments, **variables)
    assert keeps is True
    assert faults < 20  # not one for every tensor


def test_memory_is_left_to_what_the_user_has_decided():
    asked = {"THP_MEM_ALLOC_ENABLE": "0", "MALLOC_MMAP_THRESHOLD_": "131072"}
    faults, keeps = probed("keep", **asked)
    assert keeps is False
    assert faults >= 20


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_what_the_user_says_of_other_matters_decides_nothing():
    assert probed("keep", MALLOC_ARENA_MAX="2")[1] is True
