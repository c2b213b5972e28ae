"""Whether what `make dist` built can be released: ``python release/check.py [--versions oldest|pinned|newest ...]``.

It reads the metadata, holds the wheel against the source tree and against a wheel built from the tree itself, and then
installs the wheel into clean environments, with torch alone, with the command line's packages, with the extras that
recipes name, and with all extras, and runs what a user would run first: commands, and every file of recipes/, copied
into an empty folder. It prints a line per check and ends with exit code 1 if one failed.

- pinned: the versions of constraints.txt
- oldest: the lower bounds of pyproject.toml
- newest: what pip finds, but for torch, which stays as in constraints.txt
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from packaging.metadata import Metadata
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
BASE, CLI, HF, TRL, LIGHTNING, RAY, ALL = "torch alone", "cli", "hf", "trl", "hf and lightning", "hf and Ray", "all"
EXTRAS = {BASE: "", CLI: "[cli]", HF: "[hf]", TRL: "[trl]", LIGHTNING: "[hf,lightning]", RAY: "[hf]", ALL: "[all]"}
"""Environment to the extras that are installed with the wheel."""
BESIDES = {RAY: ("ray[train]",)}
"""Environment to what is installed beside the wheel, as no extra brings it."""
RECIPES = {
    "pytorch": HF,
    "trainer": HF,
    "trl": TRL,
    "accelerate": HF,
    "lightning": LIGHTNING,
    "fabric": LIGHTNING,
    "fsdp": HF,
    "ray": RAY,
}
"""Folder of recipes/ to the environment that has what its files need, and no more (docs/loops.md)."""
FIELDS = (
    *("name", "version", "summary", "description", "description_content_type", "keywords", "classifiers"),
    *("author", "license_expression", "license_files", "requires_python", "requires_dist", "provides_extra"),
)
"""Fields of the metadata that must not be empty."""

NAMES = """
import sys, earlysift
assert "torch" not in sys.modules
assert all(getattr(earlysift, name) for name in earlysift.__all__)
"""
LOOP = """
import warnings
with warnings.catch_warnings(action="ignore"):  # torch's own, where there is no NumPy
    import torch
from torch import nn
from earlysift import Family, Sifter

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(16, 16)
    def forward(self, hidden):
        return hidden + self.linear(hidden).relu()

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(50, 16), nn.LayerNorm(16), nn.Linear(16, 50)
        self.blocks = nn.ModuleList([Residual() for _ in range(3)])
    def forward(self, input_ids):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))

model = Language()
row = Family(layers="blocks", heads=(("norm", "head"),), task="causal_lm")
sifter = Sifter(model, keep=0.5, depth=1, family=row)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for _ in range(3):
    ids = torch.randint(50, (8, 12))
    batch = sifter.sift({"input_ids": ids, "labels": ids})
    assert len(batch["labels"]) == 4
    logits = model(batch["input_ids"])[:, :-1]
    nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten()).backward()
    optimizer.step()
    optimizer.zero_grad()
assert sifter.stats()["sift/step"] == 3
"""
TRAINER = "import earlysift.adapters.huggingface"
COMPARISON = (
    *("compare", "--task", "image", "--steps", "20", "--arms", "uniform", "sift", "--layers", "4", "--width", "32"),
    *("--evaluations", "2", "--out", "run"),
)


@dataclass(frozen=True)
class Check:
    """Something that a user does, and what comes of it.

    Attributes:
        name: What is checked.
        command: The command; the first word is a program of the environment.
        where: Environments in which it is run.
        code: The exit code.
        says: A pattern that matches all of what is printed to stderr, if the command is to fail, else part of stdout.
        copied: A file of the repository that is copied into an empty folder first, where the command then runs.
    """

    name: str
    command: tuple[str, ...]
    where: tuple[str, ...] = (BASE, CLI, ALL)
    code: int = 0
    says: str = ""
    copied: str = ""


def _of_recipe(name: str) -> list[Check]:
    """Both files of a recipe, as its user starts them."""
    start = ("torchrun", "--standalone", "--nproc-per-node", "2") if name == "fsdp" else ("python",)
    files = [f"recipes/{name}/{kind}.py" for kind in ("plain", "sift")]
    return [Check(file, (*start, Path(file).name, "--steps", "3"), (RECIPES[name],), copied=file) for file in files]


VERSION = rf"\Aearlysift {re.escape(PROJECT['version'])} \(python \S+, torch \S+[^\n]*\)\n\Z"
CHECKS = (
    Check("import, and every public name", ("python", "-c", NAMES)),
    Check("a loop over pools", ("python", "-W", "error", "-c", LOOP)),
    Check("earlysift --version", ("earlysift", "--version"), says=VERSION),
    Check("python -m earlysift --version", ("python", "-m", "earlysift", "--version"), says=VERSION),
    Check("earlysift --help", ("earlysift", "--help"), says=r"(?m)^usage: [^$]*^  compare "),
    Check("help of a command", ("earlysift", "compare", "--help"), (CLI, ALL), says="Examples:"),
    Check("completion", ("earlysift", "--print-completion", "bash"), (CLI, ALL), says="complete -F"),
    Check(
        "a command without its extra is one sentence",
        ("earlysift", "check", "bert-tiny"),
        (BASE,),
        code=2,
        says=r"\Aearlysift: [^\n]*'tyro'[^\n]*pip install 'earlysift\[all\]'[^\n]*\n\Z",
    ),
    Check(
        "a model without its extra is one sentence",
        ("earlysift", "check", "bert-tiny", "--seconds", "0"),
        (CLI,),
        code=2,
        says=r"(?m)^earlysift: [^\n]*transformers[^\n]*pip install 'earlysift\[hf\]'[^\n]*\n\Z",
    ),
    Check(
        "data without its extra is one sentence",
        ("earlysift", *COMPARISON),
        (CLI,),
        code=2,
        says=r"(?m)^earlysift: [^\n]*pip install 'earlysift\[data\]'[^\n]*\n\Z",
    ),
    Check(
        "the Trainer without its extra is one sentence",
        ("python", "-c", TRAINER),
        (BASE, CLI),
        code=1,
        says=r"\nImportError: [^\n]*pip install 'earlysift\[hf\]'\n\Z",
    ),
    Check("the Trainer", ("python", "-c", TRAINER), (ALL,)),
    Check(
        "earlysift check",
        ("earlysift", "check", "bert-tiny", "--batch", "4", "--seq-length", "16", "--seconds", "0"),
        (ALL,),
        says="break-even",
    ),
    Check("earlysift compare", ("earlysift", *COMPARISON), (ALL,), says="Report: "),
    Check("earlysift report", ("earlysift", "report", "run", "--out", "page.html"), (ALL,)),
    *(check for name in RECIPES for check in _of_recipe(name)),
)


def main() -> int:
    """Check what lies in dist/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder with one wheel (default: dist)")
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=["pinned"])
    parser.add_argument("--extras", nargs="+", choices=EXTRAS, default=list(EXTRAS))
    given = parser.parse_args()
    wheels = list(given.dist.glob("*.whl"))
    if len(wheels) != 1:
        parser.error(f"expected one wheel in {given.dist}, found {len(wheels)}: run make dist")
    problems = [*metadata_problems(wheels[0]), *content_problems(wheels[0])]
    print("\n".join(problems) or "metadata and contents: good", flush=True)
    for versions in given.versions:
        for extras in given.extras:
            problems += environment_problems(wheels[0], versions, extras)
    print(f"{len(problems)} problems")
    return bool(problems)


def metadata_problems(wheel: Path) -> list[str]:
    """What the metadata lack; `packaging` raises if a field breaks the standard."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Metadata.from_email(archive.read(name))
    problems = [f"metadata: {field} is empty" for field in FIELDS if not getattr(metadata, field)]
    if str(metadata.version) != PROJECT["version"]:
        problems.append(f"metadata: version {metadata.version}, expected {PROJECT['version']}")
    return problems


def content_problems(wheel: Path) -> list[str]:
    """Files of the package that the wheel lacks or adds; whether the tree gives the wheel that the sdist gave."""
    source = {
        str(path.relative_to(ROOT / "src"))
        for path in (ROOT / "src" / "earlysift").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with tempfile.TemporaryDirectory() as folder:
        run([sys.executable, "-m", "build", "--wheel", "--outdir", folder, str(ROOT)])
        (other,) = Path(folder).glob("*.whl")
        ours, theirs = _contents(wheel), _contents(other)
    packed = {name for name in ours if ".dist-info/" not in name}
    problems = [f"wheel: lacks {name}" for name in sorted(source - packed)]
    problems += [f"wheel: should not hold {name}" for name in sorted(packed - source)]
    differing = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
    return problems + [f"wheel from the sdist and wheel from the tree differ in {name}" for name in differing]


def _contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def environment_problems(wheel: Path, versions: str, extras: str) -> list[str]:
    """Install the wheel into a clean environment, and run the checks there.

    Args:
        wheel: The wheel.
        versions: Which versions of its dependencies.
        extras: Which environment of `EXTRAS`.
    """
    print(f"\n{versions} versions, {extras}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        constraints = folder / "constraints.txt"
        constraints.write_text("\n".join(VERSIONS[versions]()) + "\n", encoding="utf-8")
        venv.create(folder / "env", with_pip=True)
        install = [str(folder / "env/bin/python"), "-m", "pip", "install", "--quiet", "--constraint", str(constraints)]
        # torch comes first and under the constraint: what depends on it would otherwise bring the newest one.
        for requirement in ("torch", f"{wheel}{EXTRAS[extras]}", *BESIDES.get(extras, ())):
            done = run([*install, requirement], check=False)
            if done.returncode:
                return [_failed(f"install {requirement}", done)]
        print(f"  {', '.join(installed(folder / 'env'))}", flush=True)
        work = folder / "work"
        work.mkdir()
        return [
            problem for check in CHECKS if extras in check.where for problem in _problem(check, folder / "env", work)
        ]


def _problem(check: Check, environment: Path, work: Path) -> Iterable[str]:
    program, *arguments = check.command
    if check.copied:
        work = Path(tempfile.mkdtemp(dir=work))
        shutil.copy(ROOT / check.copied, work)
    done = run([str(environment / "bin" / program), *arguments], check=False, cwd=work)
    printed = done.stderr if check.code else done.stdout
    if done.returncode == check.code and re.search(check.says, printed):
        print(f"  good: {check.name}", flush=True)
    else:
        yield _failed(check.name, done)


def _failed(name: str, done: subprocess.CompletedProcess[str]) -> str:
    problem = f"FAILED: {name} (exit code {done.returncode})\n{done.stdout[-1500:]}\n{done.stderr[-3000:]}"
    print(problem, flush=True)
    return problem


def installed(environment: Path) -> list[str]:
    """The direct dependencies in an environment, with their versions."""
    listed = run([str(environment / "bin/python"), "-m", "pip", "list", "--format", "json"]).stdout
    return [f"{each['name']} {each['version']}" for each in json.loads(listed) if each["name"] in lower_bounds()]


def run(command: list[str], *, check: bool = True, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a command without the source tree on its path."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, env=variables, cwd=cwd, check=check)


def requirements() -> list[Requirement]:
    """Everything that pyproject.toml asks for, with and without extras; not earlysift itself."""
    lists = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = [Requirement(line) for lines in lists for line in lines]
    return [requirement for requirement in found if requirement.name != PROJECT["name"]]


def lower_bounds() -> dict[str, str]:
    """The oldest version of every direct dependency that pyproject.toml allows."""
    bounds = {}
    for requirement in requirements():
        (bound,) = (each.version for each in requirement.specifier if each.operator == ">=")
        bounds[requirement.name] = bound
    return bounds


def _pinned() -> list[str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def _oldest() -> list[str]:
    return [f"{name}=={version}" for name, version in lower_bounds().items()]


def _newest() -> list[str]:
    return [line for line in _pinned() if line.startswith("torch==")]


VERSIONS = {"pinned": _pinned, "oldest": _oldest, "newest": _newest}
"""Versions of dependencies that are checked, as lines of a constraint file."""


if __name__ == "__main__":
    sys.exit(main())
