"""Results of benchmarks/run.py to sections of docs/results.md."""

import json
from pathlib import Path
from typing import Any

import measuring
import pictures
from run import BENCHMARKS

_LONG = 60  # lines of tables that are folded away
_PICTURES = {
    "score": pictures.score_picture,
    "scale": pictures.scale_picture,
    "hazards": pictures.hazard_picture,
}


def benchmark_sections(results: Path, docs: Path) -> list[str]:
    """A section for every result of a benchmark that is there; their pictures are written beside the page."""
    found = [
        (name, path, json.loads(path.read_text(encoding="utf-8")))
        for name in BENCHMARKS
        for path in sorted(results.glob(f"{name}_*.json"))
    ]
    return [_section(name, path, result["entries"], docs) for name, path, result in found]


def _section(name: str, path: Path, entries: dict[str, Any], docs: Path) -> str:
    benchmark, _ = BENCHMARKS[name]
    picture = ""
    if name in _PICTURES:
        file = f"bench_{path.stem}.png"
        _PICTURES[name](entries, docs / file)
        picture = f"\n![{benchmark.TITLE}]({file})\n"
    tables = measuring.tables(benchmark.TABLES, entries)
    if tables.count("\n") > _LONG:
        tables = measuring.folded("Every shape", tables)
    where = ", on a GPU" if path.stem.endswith("_cuda") else ""
    return f"""
## {benchmark.TITLE}{where}

{benchmark.ABOUT} Command: `python benchmarks/run.py {name}` ([{path.name}](../benchmarks/results/{path.name})).
{picture}
{tables}

{_measured_on(entries)}
"""


def _measured_on(entries: dict[str, Any]) -> str:
    """Where and with what the entries were measured: a line for all that share it."""
    names_of: dict[str, list[str]] = {}
    for name, entry in entries.items():
        names_of.setdefault(_facts(entry), []).append(name)
    if len(names_of) == 1:
        return next(iter(names_of)) + "."
    return "\n".join(f"- {'; '.join(names)}: {facts}." for facts, names in names_of.items())


def _facts(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    arguments = " ".join(map(_without_folder, result.get("arguments", ())))
    pages = ", memory kept" if result.get("keeps_memory") else ", huge pages" if result.get("huge_pages") else ""
    facts = f"{result['hardware']}, {result['threads']} threads{pages}; {versions}; commit {result['commit']}"
    return f"{facts}; `{arguments}`" if arguments else facts


def _without_folder(argument: str) -> str:
    return Path(argument).name if "/" in argument else argument
