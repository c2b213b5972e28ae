"""Whether the library works with other versions of torch and transformers: ``python release/matrix.py [CELL ...]``.

A cell is a pair such as ``oldest-newest``: torch and transformers, each by the lower bound of pyproject.toml, by the
exact version of constraints.txt (``pinned``), or the newest that pip finds. Every cell has an environment of its own
below .matrix/, which is kept, and in which a part of the tests runs: those that look most closely at what torch and
transformers do inside. It prints a line per cell, and ends with exit code 1 if one failed.
"""

import argparse
import itertools
import sys
import venv

import check

AGES = ("oldest", "pinned", "newest")
CELLS = {f"{torch}-{transformers}": (torch, transformers) for torch, transformers in itertools.product(AGES, AGES)}
"""Name of a cell to the ages of torch and of transformers."""
CORNERS = ("oldest-oldest", "oldest-newest", "newest-oldest", "newest-newest")
FREE = ("torch", "transformers", "accelerate", "tokenizers", "huggingface_hub", "safetensors")
"""Packages that constraints.txt does not pin in a cell: the two, and those that transformers wants in some versions."""
TESTS = (
    "tests/test_exits.py::test_cut_model_equals_a_really_shorter_one",
    "tests/test_exits.py::test_scoring_runs_exactly_depth_layers_of_a_sharded_model_and_leaves_its_gradients_exact",
    "tests/test_exits.py::test_hidden_states_first_asked_for_in_a_cut_model_are_complete_later",
    "tests/test_exits.py::test_compiled_scoring_and_training_make_no_new_graphs_after_the_first_step",
    "tests/test_families.py::test_an_exit_by_a_derived_row_is_a_stock_model_of_fewer_layers_with_the_same_weights",
    "tests/test_huggingface.py::test_keep_one_equals_the_plain_trainer_bit_for_bit",
    "tests/test_huggingface.py::test_losses_picks_and_item_counts_are_those_of_a_slow_loop",
    "tests/test_huggingface.py::test_a_run_resumed_from_a_checkpoint_is_bit_equal",
)


def main() -> int:
    """Run the cells that are named, or the corners."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", default=CORNERS, help=f"torch-transformers (default: {' '.join(CORNERS)})")
    cells = parser.parse_args().cells
    if unknown := [cell for cell in cells if cell not in CELLS]:
        parser.error(f"unknown cells {', '.join(unknown)}; known are {', '.join(CELLS)}")
    return max(run(cell) for cell in cells)


def run(cell: str) -> int:
    """Make a cell's environment unless it is there, run the tests in it, and print what came of it.

    Returns:
        1 if they failed, or could not be run.
    """
    environment = check.ROOT / ".matrix" / cell
    python = str(environment / "bin" / "python")
    if not environment.exists():
        venv.create(environment, with_pip=True)
    constraints = environment / "constraints.txt"
    constraints.write_text("\n".join(constraints_of(cell)) + "\n", encoding="utf-8")
    install = [python, "-m", "pip", "install", "--quiet", "--upgrade", "--constraint", str(constraints)]
    # torch comes first: what depends on it would otherwise bring another one.
    for wanted in (["pip"], ["torch"], ["--editable", ".[hf]", "transformers", "--group", "test"]):
        done = check.run([*install, *wanted], check=False, cwd=check.ROOT)
        if done.returncode:
            print(f"{cell}: cannot be installed\n{done.stderr[-2000:]}", flush=True)
            return 1
    # Newer versions deprecate what older ones need, so that warnings are no errors here.
    done = check.run([python, "-m", "pytest", "-W", "default", "--quiet", *TESTS], check=False, cwd=check.ROOT)
    versions = ", ".join(line for line in check.installed(environment) if line.split()[0] in ("torch", "transformers"))
    print(f"{cell} ({versions}): {done.stdout.strip().splitlines()[-1]}", flush=True)
    if done.returncode:
        print(done.stdout[-6000:], flush=True)
    return int(done.returncode != 0)


def constraints_of(cell: str) -> list[str]:
    """Lines of a constraint file: constraints.txt, but for what is free and the versions of the cell."""
    lines = {age: {_name(line): line for line in check.VERSIONS[age]()} for age in ("pinned", "oldest")}
    rest = [line for name, line in lines["pinned"].items() if name not in FREE]
    ages = zip(("torch", "transformers"), CELLS[cell], strict=True)
    return rest + [lines[age][name] for name, age in ages if age != "newest"]


def _name(line: str) -> str:
    return line.partition("==")[0]


if __name__ == "__main__":
    sys.exit(main())
