"""Real processes: with the signals of a terminal, whatever the tests were started by; and several, as ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import earlysift

# Without the interpreter's own end, in which a thread of gloo now and then aborts a process that has done its work.
_LEAVE = "\nimport os, sys\nsys.stdout.flush()\nsys.stderr.flush()\nos._exit(0)\n"
# What ``nohup`` and ``&`` ignore stays ignored in all processes that are started from there, unless it is set anew.
_BEGIN = """
import os, signal, sys
ignored = set(map(int, sys.argv[1].split()))
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, signal.SIG_IGN if number in ignored else signal.SIG_DFL)
os.execv(sys.argv[2], sys.argv[2:])
"""
IN_THE_BACKGROUND = (signal.SIGINT, signal.SIGHUP)
"""Signals that a process ignores which ``nohup ... &`` started."""


def started(command, ignored=(), **options):
    """A process that ignores these signals and no other, whatever this one ignores; what it prints can be read."""
    begin = [sys.executable, "-c", _BEGIN, " ".join(str(int(number)) for number in ignored)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*begin, *command], **(pipes | options))


def wait_until(process, happened):
    """Wait until something has happened, however busy the machine is; not for a process that has ended."""
    while not happened() and process.poll() is None:
        time.sleep(0.05)


def on_ranks(count, script, tmp_path):
    """What processes print last, as JSON; a script gets its rank, a file to meet in, and the number of ranks."""
    source, tests = Path(earlysift.__file__).parents[1], Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", script + _LEAVE, str(rank), str(tmp_path / "store"), str(count)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        outputs = [rank.communicate() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * count, outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]
