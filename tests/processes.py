"""Several real processes, for tests of what ranks do together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import earlysift

# Without the interpreter's own end, in which a thread of gloo now and then aborts a process that has done its work.
_LEAVE = "\nimport os, sys\nsys.stdout.flush()\nsys.stderr.flush()\nos._exit(0)\n"


def on_ranks(count, script, tmp_path, timeout_s=120):
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
        outputs = [rank.communicate(timeout=timeout_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0] * count, outputs
    return [json.loads(out.splitlines()[-1]) for out, _ in outputs]
