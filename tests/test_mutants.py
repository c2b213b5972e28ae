"""S30: every line of code that keeps a promise is taken out once, and a test notices.

A mutant is a copy of the library with one text replaced. The tests that are to notice run on it in a process of their
own; on the library itself they pass, as `make test` runs them.
"""

import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest

import earlysift
from scorecard import FULL, cases

SOURCE = Path(earlysift.__file__).parent
TESTS = Path(__file__).parent
TIMEOUT_S = 600  # no mutant hangs


class Mutant(NamedTuple):
    """What is taken out of which file, and the test that notices: its file and words of its name."""

    file: str
    old: str
    new: str
    noticed_by: str
    named: str


MUTANTS = {
    "files are written in place": Mutant(
        "files.py", 'part = path.with_name(f".{path.name}.part")', "part = path", "files", "previous_file_whole"
    ),
    "files are not synced": Mutant(
        "files.py", "os.fsync(file.fileno())", "pass", "faults", "s03_pretrain and results and fsync"
    ),
    "digests are not compared": Mutant(
        "pretrain/checkpoints.py", "if _digest(path) != digest:", "if False:", "scorecard", "s04"
    ),
    "random states are not saved": Mutant(
        "adapters/huggingface.py",
        "super()._save_rng_state(output_dir)",
        "pass",
        "huggingface",
        "test_a_run_resumed_from_a_checkpoint_is_bit_equal",
    ),
    "the state of selection is not loaded": Mutant(
        "adapters/huggingface.py",
        'self.sifter.load_state_dict(state["sifter"])',
        "pass",
        "huggingface_memory",
        "test_a_run_resumed_from_a_checkpoint_makes_the_same_picks",
    ),
    "the stream does not go on where it was": Mutant(
        "pretrain/stream.py",
        "rows = index * UNIT + positions % UNIT",
        "rows = positions % UNIT",
        "workloads",
        "candidates_do_not_depend_on_portions",
    ),
    "ranks remember apart": Mutant(
        "ranks.py", "distributed.all_reduce(found)", "pass", "ranks", "ranks_recall_what_one_memory"
    ),
    "ranks do not compare their pools": Mutant(
        "ranks.py", "if len(set(layouts)) > 1:", "if False:", "ranks", "rows_cannot_change_places"
    ),
    "losses are in sixteen bits": Mutant("losses.py", "head(h).float(), y)", "head(h), y)", "losses", "bfloat16"),
    "ties change places": Mutant(
        "selectors.py",
        "return torch.sort(keys, descending=True, stable=True).indices",
        "return len(keys) - 1 - torch.sort(keys.flip(0), descending=True, stable=True).indices",
        "selectors",
        "ties_keep_the_order",
    ),
    "modules are left in evaluation mode": Mutant(
        "passes.py", "module.training = training", "pass", "guests", "sift_leaves_everything_as_it_found_it"
    ),
    "layers are not put back after an exception": Mutant(
        "exits.py",
        "    try:\n        yield\n    finally:\n        all_layers._modules = modules",
        "    yield\n    all_layers._modules = modules",
        "exits",
        "put_back_when_scoring_fails",
    ),
    "candidates without labels are numbers": Mutant(
        "selectors.py",
        "keys = torch.where(torch.isfinite(keys), keys, -torch.inf)",
        "keys = keys.nan_to_num()",
        "selectors",
        "ranking_and_greedy_equal_their_twins",
    ),
}


@pytest.mark.parametrize("name", cases(MUTANTS, 2))
def test_s30_a_line_that_keeps_a_promise_is_missed_when_it_is_gone(name, tmp_path):
    mutant = MUTANTS[name]
    shutil.copytree(SOURCE, tmp_path / "earlysift", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "earlysift" / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    paths = os.pathsep.join(map(str, (tmp_path, TESTS)))
    environment = os.environ | {"EARLYSIFT_SCORECARD": "1", "PYTHONPATH": paths}  # 1: all cases of a line
    environment.pop("EARLYSIFT_OUTCOMES", None)  # they are no cases of this line
    chosen = [str(TESTS / f"test_{mutant.noticed_by}.py"), "-k", mutant.named]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen]
    run = partial(subprocess.run, command, cwd=TESTS.parent, capture_output=True, text=True, timeout=TIMEOUT_S)
    done = run(env=environment, check=False)
    assert done.returncode == 1, done.stdout[-2000:]
    if FULL:  # else `make test` has run them
        run(env=environment | {"PYTHONPATH": os.pathsep.join(map(str, (SOURCE.parent, TESTS)))}, check=True)
    assert str(tmp_path / "earlysift") in where(environment)


def where(environment):
    """The library that a process with this environment imports."""
    command = [sys.executable, "-c", "import earlysift; print(earlysift.__file__)"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
