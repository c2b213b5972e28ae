"""Structure: imports go down only, few public names, no inheritance games, randomness only from given generators."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import earlysift

SOURCE = Path(earlysift.__file__).parent
TESTS = Path(__file__).parent

# A module or package of the library, and the floor it stands on. A new one is entered here.
FLOORS = {
    "presets": -4,
    "measures": -3,  # what even the ground takes names from; knows no torch
    "helps": -3,
    "versions": -3,
    "pools": -3,
    "families": -3,
    "anatomy": -2,
    "passes": -1,
    "losses": 0,
    "packing": 0,
    "exits": 0,
    "selectors": 0,
    "schedules": 0,
    "files": 0,
    "loss_memory": 0,
    "blend": 0,
    "recent": 0,
    "seeds": 0,
    "options": 0,
    "config_files": 0,
    "coverage": 0,
    "datasets": 0,
    "pending": 0,
    "checks": 1,
    "exit_probe": 1,
    "control": 1,
    "costs": 1,
    "fidelity": 1,
    "ranks": 1,
    "ledger": 1,
    "trained_pool": 1,
    "payoffs": 2,
    "scorers": 2,
    "probes": 3,
    "controller": 4,
    "config": 5,
    "judging": 5,
    "progress": 5,
    "steering": 5,
    "runner": 6,
    "planning": 7,
    "stepping": 8,
    "sifter": 9,
    "adapters": 10,
    "checkup": 10,
    "environment": 10,
    "folders": 10,
    "report": 10,
    "schema": 10,
    "pretrain": 11,
    "compare": 12,
    "theory": 12,
    "cli": 13,
    "__main__": 14,
}
CORE = [name for name, floor in FLOORS.items() if floor <= FLOORS["sifter"] and name != "files"]
PUBLIC = [
    "ExitHead",
    "Family",
    "Ledger",
    "Selection",
    "SiftConfig",
    "Sifter",
    "anneal",
    "check",
    "constant",
    "truncated",
    "warmup",
]
FILES = sorted(SOURCE.rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))


def room_of(path):
    """The first part of a file's name within the library: a module, a package, or the root itself."""
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


def imported_rooms(source):
    """What a module imports of the library, anywhere in it: in functions and for type hints, too."""
    rooms = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            if node.module == "earlysift":
                rooms |= {alias.name for alias in node.names}
            elif node.module and node.module.startswith("earlysift."):
                rooms.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            rooms |= {
                [*alias.name.split("."), "earlysift"][1]
                for alias in node.names
                if alias.name.split(".")[0] == "earlysift"
            }
    return rooms


def upward(room, source):
    """Imports of a module that do not go down."""
    return {other for other in imported_rooms(source) - {room} if FLOORS.get(other, 99) >= FLOORS[room]}


@every_file
def test_imports_go_down_only(path):
    if room_of(path) == "__init__":
        assert all(FLOORS[room] <= FLOORS["sifter"] for room in imported_rooms(path.read_text()))
    else:
        assert upward(room_of(path), path.read_text()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "from earlysift.sifter import Sifter",
        "from earlysift import losses, compare",
        "import earlysift.exits",
        "import earlysift",
        "from earlysift import Sifter",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from earlysift.ledger import Ledger",
        "def late():\n    from earlysift.costs import payoff",
    ],
)
def test_the_check_of_imports_finds_an_upward_one(source):
    assert upward("pools", source)
    assert not upward("cli", "from earlysift import losses\nfrom earlysift.compare.run import compare\nimport torch")


def test_every_module_has_a_floor_and_every_core_module_is_there():
    assert {room_of(path) for path in FILES} - {"__init__"} <= set(FLOORS)
    assert {room_of(path) for path in FILES} >= set(CORE)


def test_public_names_are_these():
    assert earlysift.__all__ == PUBLIC == sorted(PUBLIC)
    assert len(PUBLIC) <= 12
    assert all(hasattr(earlysift, name) for name in PUBLIC)


def test_root_has_no_logic():
    docstring, typing, public, homes, names = ast.parse((SOURCE / "__init__.py").read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert isinstance(typing, ast.ImportFrom)
    assert ast.unparse(public.test) == "TYPE_CHECKING"
    assert all(isinstance(node, ast.ImportFrom) for node in public.body)
    assert [node.name for node in public.orelse] == ["__getattr__", "__dir__"]
    assert [node.targets[0].id for node in (homes, names)] == ["_HOMES", "__all__"]
    # What type checkers see is what is looked up.
    seen = {node.module.removeprefix("earlysift."): {alias.name for alias in node.names} for node in public.body}
    assert {home: set(found) for home, found in earlysift._HOMES.items()} == seen


def test_importing_the_root_imports_no_torch_and_every_name_is_found_when_it_is_asked_for():
    program = """
import sys, earlysift
assert "torch" not in sys.modules
assert set(earlysift.__all__) <= set(dir(earlysift))
from earlysift import Sifter, check
assert earlysift.Sifter is sys.modules["earlysift.sifter"].Sifter
try:
    earlysift.sieve
except AttributeError as error:
    assert "sieve" in str(error)
else:
    raise SystemExit("found what is not there")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def name_of(node):
    """A dotted name as it is written, or nothing."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def games(source):
    """Inheritance beyond what torch demands, abstract classes, registries."""
    found = set()
    tree = ast.parse(source)
    allowed = set()
    for owner in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        if {name_of(base).split(".")[-1] for base in owner.bases} & {"ABC", "ABCMeta"}:
            found.add("abstract class")
        if any(name_of(base) in ("nn.Module", "torch.nn.Module") for base in owner.bases):
            for method in owner.body:
                if isinstance(method, ast.FunctionDef) and method.name in ("__init__", "__getattr__"):
                    allowed |= {id(node) for node in ast.walk(method)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and name_of(node.func) == "super" and id(node) not in allowed:
            found.add("super()")
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and "regist" in node.name.lower():
            found.add("registry")
        if isinstance(node, ast.Import | ast.ImportFrom) and "abc" in {
            getattr(node, "module", None),
            *(a.name for a in node.names),
        }:
            found.add("abstract class")
    return found


@every_file
def test_no_super_no_abstract_classes_no_registries(path):
    # Other people's trainers are extended by nothing else.
    demanded = {"super()"} if room_of(path) == "adapters" or path.name == "trainer.py" else set()
    assert games(path.read_text()) - demanded == set()


def test_the_check_of_inheritance_finds_each_game():
    assert games("class A(B):\n    def __init__(self):\n        super().__init__()") == {"super()"}
    assert games("class A(nn.Module):\n    def forward(self):\n        super().forward()") == {"super()"}
    assert games("class A(nn.Module):\n    def __init__(self):\n        super().__init__()") == set()
    assert games("from abc import ABC\nclass A(ABC): ...") == {"abstract class"}
    assert games("def register_scorer(f): ...") == {"registry"}


DRAWS = {"rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"}
DRAWS_WITHOUT_GENERATOR = {"rand_like", "randn_like", "randint_like", "seed", "set_rng_state", "dropout"}
DRAWS_IN_PLACE = {
    "normal_",
    "uniform_",
    "random_",
    "bernoulli_",
    "exponential_",
    "cauchy_",
    "geometric_",
    "log_normal_",
}
INITIALISERS = {
    "xavier_uniform_",
    "xavier_normal_",
    "kaiming_uniform_",
    "kaiming_normal_",
    "trunc_normal_",
    "orthogonal_",
}


def draws(source):
    """Calls that draw from, or set, a global random state."""
    tree = ast.parse(source)
    forked = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With) and any("fork_rng" in ast.unparse(item.context_expr) for item in node.items)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            modules = {getattr(node, "module", None), *(alias.name for alias in node.names)}
            if "random" in modules and not (isinstance(node, ast.ImportFrom) and node.module == "torch"):
                found.add("random")
        if isinstance(node, ast.Attribute) and name_of(node).startswith(("np.random.", "numpy.random.")):
            found.add(name_of(node))
        if not isinstance(node, ast.Call):
            continue
        owner, _, last = name_of(node.func).rpartition(".")
        generator = any(keyword.arg == "generator" for keyword in node.keywords)
        if owner in ("torch", "torch.nn.functional", "F") and last in DRAWS and not generator:
            found.add(f"torch.{last}")
        if owner in ("torch", "torch.nn.functional", "F", "torch.random") and last in DRAWS_WITHOUT_GENERATOR:
            found.add(f"torch.{last}")
        if last in DRAWS_IN_PLACE | INITIALISERS and not generator:
            found.add(last)
        if (
            owner in ("torch", "torch.random", "torch.cuda")
            and last.startswith("manual_seed")
            and id(node) not in forked
        ):
            found.add("torch.manual_seed")
    return found


@every_file
def test_randomness_comes_from_a_given_generator(path):
    restored = {  # what these put back as it was: after a model's dry run, and after a user's scorer
        "checks.py": {"torch.set_rng_state"},
        "seeds.py": {"random", *(f"numpy.random.{name}" for name in ("seed", "get_state", "set_state"))},
    }
    assert draws(path.read_text()) - restored.get(path.name, set()) == set()


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.rand(3)", {"torch.rand"}),
        ("torch.randperm(3, generator=g)", set()),
        ("torch.rand_like(x)", {"torch.rand_like"}),
        ("np.random.choice(3)", {"np.random.choice"}),
        ("import random", {"random"}),
        ("x.uniform_()", {"uniform_"}),
        ("nn.init.normal_(w, generator=g)", set()),
        ("torch.manual_seed(0)", {"torch.manual_seed"}),
        ("with torch.random.fork_rng():\n    torch.manual_seed(0)", set()),
    ],
)
def test_the_check_of_randomness_finds_each_draw(source, found):
    assert draws(source) == found


@every_file
def test_no_unsafe_or_poisoning_calls(path):
    tree = ast.parse(path.read_text())
    names = {name_of(node).split(".")[-1] for node in ast.walk(tree) if isinstance(node, ast.Attribute | ast.Name)}
    # inference_mode: its tensors poison caches that models build lazily.
    assert names.isdisjoint({"inference_mode", "eval_js", "exec", "yaml", "set_default_dtype", "trust_remote_code"})
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    modules = {getattr(node, "module", None) for node in imports} | {
        alias.name for node in imports for alias in node.names
    }
    assert modules.isdisjoint({"pickle", "cloudpickle", "dill", "marshal", "shelve"})
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert keywords.get("shell") in (None, "False")
            assert name_of(node.func) not in ("eval", "exec", "os.system")
            if name_of(node.func) == "torch.load":
                assert keywords.get("weights_only") == "True"


@pytest.mark.parametrize("name", CORE)
def test_core_needs_torch_and_the_standard_library_only(name):
    tree = ast.parse((SOURCE / f"{name}.py").read_text())
    tops = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            tops |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            tops.add(node.module.split(".")[0])
    assert tops - set(sys.stdlib_module_names) <= {"torch", "earlysift"}


def test_every_core_module_has_a_test_file():
    assert [name for name in CORE if not (TESTS / f"test_{name}.py").exists()] == []


def test_no_script_or_test_file_shadows_the_standard_library():
    folders = [TESTS, SOURCE.parents[1] / "benchmarks", SOURCE.parents[1] / "scripts"]
    names = {path.stem for folder in folders if folder.exists() for path in folder.glob("*.py")}
    assert "test_structure" in names
    assert names.isdisjoint(sys.stdlib_module_names)
    assert names.isdisjoint({"torch", "transformers", "numpy", "earlysift"})


def test_no_test_is_expected_to_fail_or_mocked():
    marks = ("x" + "fail", "unittest." + "mock", "monkey" + "patch.setattr(torch")
    core_tests = [TESTS / f"test_{name}.py" for name in [*CORE, "guests", "structure"]]
    for path in core_tests:
        assert not any(mark in path.read_text() for mark in marks), path.name
