"""The folder in which things are tried: good runs, foreign files, data and models."""

import contextlib
import importlib
import json
import shutil
import sys
from pathlib import Path

from fuzz_trying import Case, call, try_one

COMPARE = (
    *("--task", "image", "--arms", "uniform", "sift", "--layers", "2", "--width", "32", "--batch", "4"),
    *("--budget", "0.05", "--evaluations", "2", "--validation-samples", "32", "--train-samples", "64"),
)
"""A comparison that takes a second."""
PRETRAIN = (
    *("--preset", "model.json", "--data", "text.txt", "--length", "16", "--validation-samples", "16", "--batch", "4"),
    *("--accumulate", "1", "--steps", "4", "--every", "2", "--log-every", "2", "--device", "cpu", "--track", "none"),
)
"""A training that takes a second."""
CHECK = ("check", "model.json", "--seconds", "0", "--batch", "2", "--seq-length", "8", "--depths", "1")
"""A look at a model that takes a second."""
MODEL = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "vocab_size": 200,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
}
FOREIGN = {
    "foreign/results.json": '{"thesis": [1, 2, 3]}',
    "foreign/encoder/thesis.bin": "years of work",
    "foreign/ledgers/2024.csv": "income,expense\n",
    "foreign/config.json": '{"of": "another program"}',
    "outside/uniform-seed0.jsonl": "not of this run\n",
    "outside/thesis.bin": "years of work",
    "precious.txt": "years of work",
}


def build(world: Path) -> None:
    """Make the folder: ``good`` and ``trained`` are runs, ``mixed`` and ``linked`` a run among what is not its own."""
    sentences = (" ".join(f"word{(i * j) % 90}" for j in range(1, 40)) + "." for i in range(1, 160))
    (world / "text.txt").write_text("\n\n".join(sentences), encoding="utf-8")
    (world / "table.tsv").write_text("label\ttext\n" + "".join(f"{i % 2}\tword{i} is {i % 2}\n" for i in range(200)))
    (world / "model.json").write_text(json.dumps(MODEL), encoding="utf-8")
    for path, content in FOREIGN.items():
        (world / path).parent.mkdir(parents=True, exist_ok=True)
        (world / path).write_text(content, encoding="utf-8")
    (world / "empty").mkdir()
    (world / "empty" / ".keep").write_text("")
    for name, arguments in (("good", ("compare", *COMPARE)), ("trained", ("pretrain", *PRETRAIN))):
        _run_well(name, arguments, world)
    _run_well("checked", CHECK, world)
    shutil.copytree(world / "good", world / "mixed")
    for path in ("encoder/thesis.bin", "ledgers/2024.csv", "notes.txt", "checkpoint-1/weights.bin"):
        (world / "mixed" / path).parent.mkdir(exist_ok=True)
        (world / "mixed" / path).write_text("years of work", encoding="utf-8")
    shutil.copytree(world / "good", world / "linked")
    shutil.rmtree(world / "linked" / "ledgers")
    (world / "linked" / "ledgers").symlink_to("../outside")


def _run_well(name: str, arguments: tuple[str, ...], world: Path) -> None:
    """Make a good run, and import here what it imported there: the processes of all cases then need not."""

    def act() -> int:
        code = call(*arguments, *(("--out", name) if name != "checked" else ()))()
        if Path(name).is_dir():
            shutil.copytree(name, world / name)
        (world / "imported").write_text("\n".join(sys.modules))
        return code

    tried = try_one(Case(kind="", name=name, act=act, out=(name,), command=True), world)
    if tried.outcome != "fine":
        raise RuntimeError(f"The good run {name} did not work: {tried}")
    for module in (world / "imported").read_text().split():
        with contextlib.suppress(Exception):
            importlib.import_module(module)
    (world / "imported").unlink()
