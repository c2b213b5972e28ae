"""Real processes: with the signals of a terminal, whatever the tests were started by; and several, as ranks."""

import atexit
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import earlysift

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


# Forks ranks from a process that has imported what they need, and waits for them; where one fails, the others are
# killed (unless told otherwise), as they would wait for it. Without the interpreter's own end, in which a thread of
# gloo now and then aborts a process that has done its work.
_FORKER = """
import json, os, signal, sys, traceback
import ranked

for line in sys.stdin:
    told = json.loads(line)
    ranks, codes = [], {}
    for rank in range(told["count"]):
        child = os.fork()
        if child == 0:
            os.chdir(told["folder"])
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            for stream, name in ((1, "out"), (2, "err")):
                os.dup2(os.open(f"{told['folder']}/{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.argv = ["-c", str(rank), told["store"], str(told["count"])]
            code = 1
            try:
                exec(compile(told["script"], "<script of a rank>", "exec"), {"__name__": "__main__"})
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks.append(child)
    while len(codes) < len(ranks):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        for other in ranks:
            if codes[child] != 0 and other not in codes and not told["apart"]:
                os.kill(other, signal.SIGKILL)
    print(json.dumps([codes[child] for child in ranks]), flush=True)
"""


@functools.cache
def _forker():
    source, tests = Path(earlysift.__file__).parents[1], Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"}
    forker = started([sys.executable, "-c", _FORKER], env=environment, stdin=subprocess.PIPE, stderr=None)
    atexit.register(_end, forker)
    return forker


def _end(forker):
    forker.stdin.close()
    forker.wait()
    forker.stdout.close()


def on_ranks(count, script, tmp_path):
    """What processes in this folder print last, as JSON; a script gets its rank, a file to meet in, their number."""
    ended = ends_of_ranks(count, script, tmp_path, apart=False)
    assert [code for code, _, _ in ended] == [0] * count, ended
    return [json.loads(out.splitlines()[-1]) for _, out, _ in ended]


def ends_of_ranks(count, script, tmp_path, *, apart=True):
    """Exit code of every process, what it printed, and what it printed as errors; ``apart``: none ends another."""
    forker = _forker()
    told = {"count": count, "script": script, "folder": str(tmp_path), "store": str(tmp_path / "store")}
    forker.stdin.write(json.dumps(told | {"apart": apart}) + "\n")
    forker.stdin.flush()
    codes = json.loads(forker.stdout.readline())
    said = [[(tmp_path / f"{name}{rank}").read_text() for name in ("out", "err")] for rank in range(count)]
    return [(code, out, err) for code, (out, err) in zip(codes, said, strict=True)]
