"""The command line: ``earlysift compare`` and ``earlysift report``.

Exit codes: 0 done; 1 unexpected error; 2 bad input (one line says what was expected, what came, and the way out);
130 stopped by Ctrl-C, with a readable partial result.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from earlysift.compare.run import compare
from earlysift.compare.settings import Settings, from_file
from earlysift.report.page import write_report

EXIT_OK, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 2, 130

_COMPARE_HELP = """Train the same model under several arms on equal budgets, and say which reached the target first.

Examples:

  earlysift compare                                # a 12-layer BERT on the standard library's own text

  earlysift compare --seeds 3 --out runs/three     # evidence needs three seeds or more

  earlysift compare --data wikitext-2/ --budget 200 --seeds 3 --out runs/wikitext

  earlysift compare --config my.toml --resume"""
_REPORT_HELP = """Draw the figures and the self-contained HTML page of a run folder again.

Example:

  earlysift report runs/compare"""


@dataclass(frozen=True)
class Report:
    """Which run folder to report on."""

    run: tyro.conf.Positional[Path]
    """Folder that `earlysift compare` wrote."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: What follows ``earlysift``; None reads the process's own.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = _parse(given)
        return _report(command.run) if isinstance(command, Report) else _compare(command)
    except (ValueError, OSError, ImportError) as error:
        print(f"earlysift: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("earlysift: stopped before anything was measured.", file=sys.stderr)
        return EXIT_INTERRUPTED


def _parse(given: list[str]) -> Settings | Report:
    config = _value_of("--config", given)
    defaults = from_file(Path(config)) if config else Settings()
    compare_command = Annotated[Settings, tyro.conf.subcommand("compare", description=_COMPARE_HELP, default=defaults)]
    report_command = Annotated[Report, tyro.conf.subcommand("report", description=_REPORT_HELP)]
    command: Settings | Report = tyro.cli(
        compare_command | report_command,
        prog="earlysift",
        description="Train faster by back-propagating only the samples that matter, and prove that it paid.",
        args=given,
    )
    return command


def _value_of(flag: str, given: list[str]) -> str | None:
    # The file's values become the defaults of the other flags, so it is read before they are parsed.
    for position, argument in enumerate(given):
        if argument == flag and position + 1 < len(given):
            return given[position + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


def _compare(settings: Settings) -> int:
    console = Console()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done)

        results = compare(settings, show)
    _print_results(console, results, settings.out)
    return EXIT_OK if results["complete"] else EXIT_INTERRUPTED


def _print_results(console: Console, results: dict[str, Any], out: Path) -> None:
    table = Table()
    for heading in ("arm", "steps", "ms per step", "accuracy", "loss", "to target (s)", "speed-up"):
        table.add_column(heading, justify="left" if heading == "arm" else "right")
    for name, arm in results["arms"].items():
        runs = [run for run in arm["runs"] if run["finished"]]
        entry = results.get("comparison", {}).get(name, {})
        table.add_row(
            arm["label"],
            str(arm["steps"]),
            f"{arm['step_cost_ms']:.1f}",
            _mean([run["final_accuracy"] for run in runs], "{:.2%}"),
            _mean([run["final_loss"] for run in runs], "{:.3f}"),
            _mean([run.get("reference_s_to_target") for run in runs], "{:.1f}"),
            _mean([1.0 if name == "uniform" else entry.get("speedup")], "{:.2f}"),
        )
    console.print(table)
    if not results["complete"]:
        console.print("Stopped early: what follows is partial. Go on with --resume.")
    console.print(results["verdict"])
    console.print(f"Report: {out / 'report.html'}", soft_wrap=True)


def _mean(values: list[float | None], form: str) -> str:
    numbers = [value for value in values if value is not None]
    return form.format(sum(numbers) / len(numbers)) if numbers and len(numbers) == len(values) else "–"


def _report(run: Path) -> int:
    print(write_report(run))
    return EXIT_OK
