"""Calls of the command line: every flag with bad values, config files, damaged and foreign folders, contradictions."""

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

from earlysift.cli import Check, Theory
from earlysift.compare.settings import Settings
from earlysift.pretrain.settings import PretrainSettings
from fuzz_trying import Case, call
from fuzz_world import CHECK, COMPARE, MODEL, PRETRAIN

KIND = "command line"
_BASES = {
    "compare": ("compare", *COMPARE),
    "pretrain": ("pretrain", *PRETRAIN),
    "check": CHECK,
    "theory": ("theory", "errors"),
}
_FIELDS: dict[str, type] = {"compare": Settings, "pretrain": PretrainSettings, "check": Check, "theory": Theory}
_HUGE = "9" * 30
# By the type of a flag: values that hardly any flag can take. What a flag of the type may well mean stands in _SENSE.
_VALUES = {
    "int": ("nan", "1.5", "many", "", "0", "-1", _HUGE),
    "float": ("nan", "inf", "-1", "0", "many", "1e308", "1e-300"),
    "str": ("", "nonsense", "../..", "UNIFORM"),
    "Path": ("", "missing/folder", "precious.txt", "foreign", "/dev/null", "x" * 300),
    "bool": ("maybe",),
}
_ENDLESS = {
    *(("compare", name, _HUGE) for name in ("seeds", "evaluations")),
    *(("compare", "budget", "1e308"), ("check", "seconds", "1e308"), ("pretrain", "workers", _HUGE)),
}
"""What may be meant, and does not end."""
_NEVER = ("nan", "inf", "-inf", "many", "maybe", "1,5", "x" * 300)
"""Refused whatever the flag is."""


def cases(seed: int) -> list[Case]:
    """All calls; equal seeds give equal calls."""
    draw = random.Random(seed)
    return [*_flags(draw), *_several(draw), *_files(), *_typed(draw), *_folders(), *_results(), *_checkpoints()]


def _case(
    *arguments: str,
    out: tuple[str, ...] = (),
    refused: bool = False,
    prepare: Callable[[], None] | None = None,
    made: str = "",
) -> Case:
    return Case(
        kind=KIND,
        name=" ".join(argument if argument else "''" for argument in arguments) + (f"   [{made}]" if made else ""),
        act=call(*arguments),
        prepare=prepare,
        out=out,
        refused=refused,
        command=True,
    )


def kind_of(hint: Any) -> str:
    """The type of a flag, of those that have values."""
    text = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
    for name in ("bool", "int", "float", "Path"):
        if name in text:
            return name
    return "str"


def _where(command: str, draw: random.Random) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Into a new folder, or over a good run that must survive a refusal."""
    if command == "compare":
        folder, how = draw.choice(
            (("good", ("--force",)), ("good", ("--force",)), ("new", ()), ("good", ("--resume",)))
        )
    elif command == "pretrain":
        folder, how = draw.choice((("new", ()), ("trained", ("--resume",))))
    else:
        folder, how = "new", ()
    return (*how, *(("--out", folder) if command != "check" else ())), (folder,)


def _flags(draw: random.Random) -> Iterator[Case]:
    """One bad value each."""
    for command, settings in _FIELDS.items():
        for name, hint in get_type_hints(settings).items():
            for value in _VALUES[kind_of(hint)]:
                if (command, name, value) in _ENDLESS or name in ("force", "resume"):
                    continue
                if (name, value) == ("json", "precious.txt"):
                    continue  # the very file that is asked for
                where, out = _where(command, draw)
                if name == "out":
                    where, out = ((), (value,)) if command != "compare" else (("--force",), (value,))
                base = _BASES[command]
                if name in ("model", "experiments"):
                    given = (base[0], value, *base[2:])
                else:
                    given = (*base, f"--{name.replace('_', '-')}={value}")
                yield _case(*given, *where, out=out, refused=value in _NEVER and kind_of(hint) != "str")
        yield _case(*_BASES[command], "--no-such-flag", "1", refused=True)
        yield _case(command, "--help")
    yield from (_case(*given, refused=True) for given in ((), ("",), ("train",), ("compare", "report"), ("--out", "x")))


def _several(draw: random.Random) -> Iterator[Case]:
    """Two or three bad values at once, and contradictions."""
    for command, settings in _FIELDS.items():
        hints = {
            name: hint
            for name, hint in get_type_hints(settings).items()
            if name not in ("model", "experiments", "force", "resume", "out", "config")
        }
        if len(hints) < 3:
            continue
        for _ in range(20):
            where, out = _where(command, draw)
            names = draw.sample(sorted(hints), draw.choice((2, 3)))
            values = {name: draw.choice(_VALUES[kind_of(hints[name])]) for name in names}
            if any((command, name, value) in _ENDLESS for name, value in values.items()):
                continue
            bad = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
            yield _case(*_BASES[command], *bad, *where, out=out)
    contradictions: tuple[tuple[str, ...], ...] = (
        ("--resume", "--force"),
        ("--arms", "sift"),
        ("--arms", "uniform", "sift-3", "--layers", "2"),
        ("--arms", "uniform", "visible"),
        ("--depth", "2"),
        ("--depth", "7"),
        ("--width", "7"),
        ("--width", "33"),
        ("--keep", "1e-9"),
        ("--keep", "1"),
        ("--batch", "1", "--keep", "0.9"),
        ("--only", "digits"),
        ("--suite", "cpu", "--only", "nothing"),
        ("--task", "classification"),
        ("--task", "classification", "--data", "text.txt"),
        ("--task", "masked_lm", "--data", "table.tsv", "missing.txt"),
        ("--task", "masked_lm", "--data", "text.txt", "--length", "2"),
        ("--task", "masked_lm", "--data", "text.txt", "--vocab-size", "3"),
        ("--task", "image", "--data", "text.txt"),
        ("--checkpoint", "good"),
        ("--task", "classification", "--data", "table.tsv", "--checkpoint", "foreign"),
        ("--save-encoder",),
        ("--device", "foo"),
        ("--device", "cuda"),
        ("--device", "meta"),
        ("--device", "mps"),
        ("--repeated", "0.999"),
        ("--flipped", "0.5", "--task", "masked_lm"),
        ("--train-samples", "1"),
        ("--validation-samples", "100000"),
    )
    for given in contradictions:
        yield _case(*_BASES["compare"], *given, "--out", "good", "--force", out=("good",))
    for given in (
        ("--preset", "foreign"),
        ("--preset", "foreign/config.json"),
        ("--preset", "good"),
        ("--data", "foreign"),
        ("--data", "empty"),
        ("--data", "model.json"),
        ("--data", "owner/name:configuration"),
        ("--tokenizer", "text.txt"),
        ("--tokenizer", "model.json"),
        ("--stream", "--data", "missing"),
        ("--length", "33"),
        ("--depth", "2"),
        ("--arm", "exact", "--depth", "9"),
        ("--keep", "1e-9"),
        ("--batch", "1", "--keep", "0.9"),
        ("--device", "cuda"),
        ("--track", "wandb"),
        ("--minutes", "1e-9"),
        ("--target-accuracy", "0.999"),
        ("--vocab-size", "2"),
        ("--whole-word", "--preset", "bert-tiny"),
    ):
        yield _case(*_BASES["pretrain"], *given, "--out", "new", out=("new",))


# Content of a settings file: what it is, its name, its bytes.
_CONTENTS: tuple[tuple[str, str, bytes], ...] = (
    ("empty", "c.json", b""),
    ("five", "c.json", b"5"),
    ("null", "c.json", b"null"),
    ("text", "c.json", b'"batch"'),
    ("a list", "c.json", b"[]"),
    ("a list of pairs", "c.json", b'[["batch", 4]]'),
    ("true", "c.json", b"true"),
    ("NaN", "c.json", b"NaN"),
    ("cut", "c.json", b'{"batch": 4'),
    ("deep lists", "c.json", b"[" * 100_000 + b"]" * 100_000),
    ("deep objects", "c.json", b'{"data":' * 5_000 + b"1" + b"}" * 5_000),
    ("deep value", "c.json", b'{"data": ' + b"[" * 500 + b"]" * 500 + b"}"),
    ("UTF-16", "c.json", '{"batch": 4}'.encode("utf-16")),
    ("BOM", "c.json", b'\xef\xbb\xbf{"batch": 4}'),
    ("Latin-1", "c.json", '{"out": "Prüfung"}'.encode("latin-1")),
    ("binary", "c.json", bytes(range(256))),
    ("NUL", "c.json", b"\0" * 1000),
    ("twice", "c.json", b'{"batch": 4, "batch": 5}'),
    ("unknown", "c.json", b'{"bacth": 4}'),
    ("empty name", "c.json", b'{"": 4}'),
    ("infinite", "c.json", b'{"learning_rate": Infinity}'),
    ("not a number", "c.json", b'{"learning_rate": NaN}'),
    ("beyond floats", "c.json", b'{"learning_rate": 1e999}'),
    ("many digits", "c.json", b'{"batch": ' + b"9" * 5_000 + b"}"),
    ("nested", "c.json", b'{"settings": {"batch": 4}}'),
    ("NUL in a path", "c.json", b'{"data": ["a\\u0000b"]}'),
    ("lone surrogate", "c.json", b'{"out": "\\ud800"}'),
    ("empty TOML", "c.toml", b""),
    ("JSON as TOML", "c.toml", b'{"batch": 4}'),
    ("table", "c.toml", b"[batch]\nof = 4\n"),
    ("date", "c.toml", b"batch = 2024-01-01\n"),
    ("time", "c.toml", b"learning_rate = 07:32:00\n"),
    ("nan", "c.toml", b"learning_rate = nan\n"),
    ("no quotes", "c.toml", b"out = runs\n"),
    ("binary TOML", "c.toml", bytes(range(256))),
    ("deep TOML", "c.toml", b"data = " + b"[" * 3_000 + b"]" * 3_000),
    ("YAML", "c.yaml", b"batch: 4\n"),
)


def _written(path: str, content: bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content)


def _files() -> Iterator[Case]:
    """Settings files that are none, and odd ones."""
    for command in ("compare", "pretrain"):
        base = _BASES[command]
        over = ("--out", "good", "--force") if command == "compare" else ("--out", "new")
        out = ("good",) if command == "compare" else ("new",)
        for made, name, content in _CONTENTS:
            yield _case(*base, "--config", name, *over, out=out, prepare=partial(_written, name, content), made=made)
        for path in ("missing.json", "good", "empty", "precious.txt", "/dev/null", "", "foreign/config.json"):
            yield _case(*base, "--config", path, *over, out=out)
        yield _case(*base, *over, "--config", out=out, refused=True)
        yield _case(*base, *over, "--config", "good/config.json", "--config=trained/config.json", out=out)
        yield _case(command, "--config", "good/config.json", *over, out=out)
        yield _case(command, "--config", "trained/config.json", *over, out=out)


_JSON_VALUES: tuple[Any, ...] = (
    "many",
    "",
    0,
    -1,
    1.5,
    1e300,
    True,
    None,
    [],
    [1],
    ["a"],
    [[]],
    {},
    {"a": 1},
    [None],
    _HUGE,
)


def _typed(draw: random.Random) -> Iterator[Case]:
    """Every setting with values of JSON of another type."""
    for command in ("compare", "pretrain"):
        over = ("--out", "good", "--force") if command == "compare" else ("--out", "new")
        out = ("good",) if command == "compare" else ("new",)
        for name, hint in get_type_hints(_FIELDS[command]).items():
            if name in ("out", "config"):
                continue
            for value in draw.sample(_JSON_VALUES, 3):
                content = json.dumps({**_plain(command), name: value})
                refused = isinstance(value, dict) or (isinstance(value, str) and kind_of(hint) in ("int", "float"))
                yield _case(
                    *(command, "--config", "c.json", *over),
                    out=out,
                    refused=refused,
                    prepare=partial(_written, "c.json", content.encode()),
                    made=f"{name}: {json.dumps(value)[:40]}",
                )


def _plain(command: str) -> dict[str, Any]:
    """The small settings of a command as its file has them."""
    given = list(COMPARE if command == "compare" else PRETRAIN)
    values: dict[str, Any] = {}
    fields = {field.name: field.default for field in dataclasses.fields(_FIELDS[command])}
    name = ""
    for part in given:
        if part.startswith("--"):
            name = part[2:].replace("-", "_")
            values[name] = []
        else:
            values[name].append(part)
    hints = get_type_hints(_FIELDS[command])
    convert = {"int": int, "float": float}
    return {
        name: parts if isinstance(fields[name], tuple) else convert.get(kind_of(hints[name]), str)(parts[0])
        for name, parts in values.items()
    }


def _folders() -> Iterator[Case]:
    """Folders that are another's, links, files, and those that cannot be written."""

    def copied(*gone: str) -> None:
        """A good run without some of its files."""
        shutil.copytree("good", "new")
        for name in gone:
            shutil.rmtree(f"new/{name}") if Path(f"new/{name}").is_dir() else Path(f"new/{name}").unlink()

    def without(name: str, make: Callable[[], object]) -> Callable[[], None]:
        def prepare() -> None:
            copied(*((name,) if Path("good", name).exists() else ()))
            make()

        return prepare

    def locked() -> None:
        copied()
        for path in (Path("new/ledgers"), Path("new")):
            path.chmod(0o555)

    makes: dict[str, Callable[[], None]] = {
        "link to good": partial(os.symlink, "good", "new"),
        "link to foreign": partial(os.symlink, "foreign", "new"),
        "link to nothing": partial(os.symlink, "nowhere", "new"),
        "link to itself": partial(os.symlink, "new", "new"),
        "link to a file": partial(os.symlink, "precious.txt", "new"),
        "a pipe": partial(os.mkfifo, "new"),
        "results.json is a folder": partial(os.makedirs, "new/results.json"),
        "ledgers is a file": without("ledgers", partial(_written, "new/ledgers", b"x")),
        "config.json is a link": without("config.json", partial(os.symlink, "../precious.txt", "new/config.json")),
        "results.json is a link": without(
            "results.json", partial(os.symlink, "../good/results.json", "new/results.json")
        ),
        "encoder is a link": without("encoder", partial(os.symlink, "../outside", "new/encoder")),
        "read-only": locked,
    }
    kinds: tuple[tuple[str, tuple[str, ...]], ...] = (
        ("compare", ()),
        ("compare", ("--force",)),
        ("compare", ("--resume",)),
        ("pretrain", ()),
        ("pretrain", ("--resume",)),
    )
    for command, how in kinds:
        base = _BASES[command]
        for folder in (
            "good",
            "trained",
            "mixed",
            "linked",
            "foreign",
            "empty",
            "outside",
            "precious.txt",
            "text.txt/x",
            ".",
            "/",
            "/proc/new",
            "",
        ):
            yield _case(
                *base, *how, "--out", folder, out=(folder,) if folder in ("good", "trained", "mixed", "linked") else ()
            )
        for made, make in makes.items():
            if made == "read-only" and os.geteuid() == 0:
                continue  # root may write
            yield _case(*base, *how, "--out", "new", out=("new", "good"), prepare=make, made=made)
    for how in (("--force",), ("--resume",)):
        yield _case("compare", *COMPARE, "--seeds", "2", "--out", "good", *how, out=("good",))
        yield _case("compare", *COMPARE, "--depth", "1", "--keep", "0.25", "--out", "good", *how, out=("good",))
        yield _case("compare", "--suite", "cpu", "--only", "nothing", "--out", "foreign", *how)
    for given in (
        ("--out", "good"),
        ("--out", "foreign"),
        ("--out", "precious.txt"),
        ("--out", "precious.txt/x"),
        ("--results", "foreign", "--out", "new"),
        ("--results", "missing", "--out", "new"),
        ("--seed", "many"),
    ):
        yield _case("theory", "nothing", *given)
    for json_path in ("precious.txt/x.json", "good", "/proc/x.json", ""):
        yield _case(*CHECK, "--json", json_path, refused=True)


Change = Callable[[dict[str, Any]], Any]


def _instead(content: Any) -> Change:
    return lambda results: content


def _with(name: str, value: Any) -> Change:
    return lambda results: {**results, name: value}


def _without(name: str) -> Change:
    return lambda results: {key: value for key, value in results.items() if key != name}


def _with_runs(value: Any) -> Change:
    return lambda results: {**results, "arms": {"uniform": {**results["arms"]["uniform"], "runs": value}}}


def _with_curve(value: Any) -> Change:
    def change(results: dict[str, Any]) -> Any:
        arm = results["arms"]["sift"]
        return {**results, "arms": {**results["arms"], "sift": {**arm, "runs": [{**arm["runs"][0], "curve": value}]}}}

    return change


_PARTS = (
    *("arms", "config", "data", "comparison", "target", "machine", "baseline", "verdict", "measured_ms", "versions"),
    *("operations_ms", "created"),
)
_RUNS: tuple[Any, ...] = (None, "x", [1], [{}], {}, [None])
_CURVES: tuple[Any, ...] = (None, [], [1], [{}], "x", [{"reference_s": "x", "accuracy": None, "loss": []}])
_DAMAGED: tuple[tuple[str, Change], ...] = (
    ("an object", _instead({})),
    ("a list", _instead([])),
    ("five", _instead(5)),
    ("null", _instead(None)),
    ("version only", lambda results: {"version": results["version"]}),
    ("version of later", _with("version", 10**6)),
    ("version is text", lambda results: {**results, "version": str(results["version"])}),
    ("version is a list", _with("version", [1])),
    *((f"{name} is {value!r}", _with(name, value)) for name in _PARTS for value in (None, "x", [1])),
    *((f"no {name}", _without(name)) for name in _PARTS),
    *((f"runs are {value!r}", _with_runs(value)) for value in _RUNS),
    *((f"the curve is {value!r}", _with_curve(value)) for value in _CURVES),
    ("another arm", lambda results: {**results, "arms": {**results["arms"], "<b>new</b>": results["arms"]["sift"]}}),
)


def _results() -> Iterator[Case]:
    """Results, ledgers and inputs of theory that are damaged, or none."""

    def damaged(change: Change, path: str = "good/results.json") -> None:
        _written(path, json.dumps(change(json.loads(Path("good/results.json").read_text()))).encode())

    for made, change in _DAMAGED:
        yield _case("report", "good", out=("good",), prepare=partial(damaged, change), made=made)
    resumed = ("compare", *COMPARE, "--out", "good", "--resume", "--seeds", "2")
    for made, change in _DAMAGED[::3]:
        yield _case(*resumed, out=("good",), prepare=partial(damaged, change), made=made)
    for made, content in (("cut", b'{"version'), ("empty", b""), ("binary", bytes(range(256))), ("deep", b"[" * 10**5)):
        yield _case("report", "good", prepare=partial(_written, "good/results.json", content), made=made)
        yield _case(*resumed, prepare=partial(_written, "good/results.json", content), made=made)
        yield _case(
            *("theory", "payoff", "--results", "given", "--out", "new"),
            prepare=partial(_written, "given/compare_x.json", content),
            made=made,
        )
    for made, content in (
        *(
            ("five", b"5\n"),
            ("null", b"null\n"),
            ("a list", b"[1]\n"),
            ("text", b"hello\n"),
            ("binary", bytes(range(256))),
        ),
        *(("times are text", b'{"step": 0, "train_ms": "x"}\n'), ("cut", b'{"step": 0}\n{"st'), ("empty", b"")),
    ):
        for arm in ("sift", "uniform"):
            path = f"good/ledgers/{arm}-seed0.jsonl"
            yield _case(*resumed, out=("good",), prepare=partial(_written, path, content), made=f"{arm} ledger: {made}")
    folders: tuple[tuple[str, ...], ...] = (
        (),
        ("missing",),
        ("foreign",),
        ("empty",),
        ("precious.txt",),
        ("good/results.json",),
        ("good", "foreign"),
        ("good", "good"),
        ("good", "trained"),
        ("",),
        (".",),
        ("good", "--no-such-flag"),
    )
    for given in folders:
        yield _case("report", *given, out=("good", "trained", "."))
    for made, change in _DAMAGED[::2]:
        yield _case(
            *("theory", "payoff", "--results", "given", "--out", "new"),
            prepare=partial(damaged, change, "given/compare_x.json"),
            out=("new",),
            made=made,
        )
    for made, model in _MODELS:
        yield _case(*CHECK, prepare=partial(_written, "model.json", model), made=f"config: {made}")
        yield _case(
            *_BASES["pretrain"],
            "--out",
            "new",
            out=("new",),
            prepare=partial(_written, "model.json", model),
            made=f"config: {made}",
        )


_MODELS: tuple[tuple[str, bytes], ...] = (
    ("empty", b""),
    ("five", b"5"),
    ("a list", b"[]"),
    ("null", b"null"),
    ("binary", bytes(range(256))),
    ("an object", b"{}"),
    ("unknown type", b'{"model_type": "nothing"}'),
    ("type is a list", b'{"model_type": ["bert"]}'),
    *(
        (f"{name} is {json.dumps(value)}", json.dumps({**MODEL, name: value}).encode())
        for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "max_position_embeddings")
        for value in (0, -1, "x", None, 1.5)
    ),
    ("architectures are text", json.dumps({**MODEL, "architectures": "x"}).encode()),
    ("architectures are unknown", json.dumps({**MODEL, "architectures": ["BertForNothing"]}).encode()),
    ("no language model", json.dumps({**MODEL, "architectures": ["BertForSequenceClassification"]}).encode()),
    ("not a text model", b'{"model_type": "vit"}'),
    ("an encoder and decoder", b'{"model_type": "t5"}'),
)


def _checkpoints() -> Iterator[Case]:
    """Checkpoints of a training that are cut, flipped, swapped, gone or another's."""

    def cut(path: str) -> None:
        content = Path(path).read_bytes()
        Path(path).write_bytes(content[: len(content) // 2])

    def flipped(path: str) -> None:
        content = bytearray(Path(path).read_bytes())
        content[len(content) // 2] ^= 1
        Path(path).write_bytes(content)

    def swapped(path: str) -> None:
        other = path.replace("checkpoint-4", "checkpoint-2")
        ours, theirs = Path(path).read_bytes(), Path(other).read_bytes()
        Path(path).write_bytes(theirs)
        Path(other).write_bytes(ours)

    def folder(path: str) -> None:
        Path(path).unlink()
        Path(path).mkdir()

    def linked(path: str) -> None:
        Path(path).replace("moved")
        Path(path).symlink_to(Path("moved").absolute())

    damages = {
        "cut": cut,
        "flipped": flipped,
        "swapped": swapped,
        "gone": os.remove,
        "a folder": folder,
        "a link": linked,
    }
    names = (
        "model.safetensors",
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "trainer_state.json",
        "sifter_0.json",
        "manifest.json",
        "training_args.bin",
    )
    resumed = ("pretrain", *PRETRAIN, "--out", "trained", "--resume")
    for made, damage in damages.items():
        for name in names:
            path = f"trained/checkpoint-4/{name}"
            yield _case(*resumed, out=("trained",), prepare=partial(damage, path), made=f"{name}: {made}")
    for name in ("config.json", "results.json", "ledgers/process0.jsonl", "tokenizer.json"):
        for made, damage in damages.items():
            if made != "swapped":
                yield _case(
                    *resumed, out=("trained",), prepare=partial(damage, f"trained/{name}"), made=f"{name}: {made}"
                )
