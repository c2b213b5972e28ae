"""The command line: ``earlysift check``, ``compare``, ``pretrain``, ``report`` and ``theory``.

Exit codes: 0 done; 1 unexpected error, or the target of ``pretrain`` not reached; 2 bad input (one line per problem
with the expected value, the given value and a remedy); 3 loss not finite; 4 disk full; 130 stopped by a signal, with a
readable partial result.

Torch takes seconds to import, so a command is validated without it: modules that need torch are imported by the
function that runs the command.
"""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from earlysift import helps, schema
from earlysift.compare.arms import ARMS
from earlysift.compare.settings import Settings
from earlysift.config_files import read_settings
from earlysift.files import write_whole
from earlysift.folders import require_writable
from earlysift.presets import BUILT_IN, Task, read_config, require_preset
from earlysift.pretrain.corpus import require_data
from earlysift.pretrain.settings import PretrainSettings
from earlysift.report.page import read_results, write_report
from earlysift.schema import Count
from earlysift.theory.experiments import EXPERIMENTS, require_known

if TYPE_CHECKING:
    from earlysift.compare.suite import Outcome
    from earlysift.theory.findings import Finding

EXIT_OK, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 2, 130


@dataclass(frozen=True)
class Check:
    """The model to measure, and the shape of its inputs."""

    model: tyro.conf.Positional[str]
    """A transformers config.json, a folder that holds one, or a built-in name."""
    task: Task | None = None
    """Task of the model. None: of the class named in the config, else the model's usual language modelling."""
    seq_length: Annotated[int, Field(ge=2)] | None = None
    """Tokens per sample. None: 128, or the model's maximum if that is less."""
    batch: Count = 32
    """Samples per training step; the pool is batch / keep."""
    labelled_fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the tokens with a label. None: 0.15 in masked language modelling, else 1."""
    max_positions: Count | None = None
    """Upper limit of labelled tokens that an exit reads of a sample. None: all."""
    keep: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the pool that is trained on."""
    depths: tuple[Count, ...] = ()
    """Layers that run for an early-exit score. None given: 1, 2, 3 and 6. The full model (exact loss) follows."""
    seconds: Annotated[float, Field(ge=0)] = 10.0
    """Approximate duration of the timing; every operation is measured at least three times."""
    json: Path | None = None
    """Where to write the numbers. None: nowhere."""

    def __post_init__(self) -> None:
        schema.validate(self, (schema.POOL_FITS,))


@dataclass(frozen=True)
class Report:
    """The run folders to report on."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Folders that `earlysift compare` or `earlysift pretrain` wrote; several make one page."""
    out: Path | None = None
    """Where to write the page. None: report.html in the folder, or in the common parent of several."""

    def __post_init__(self) -> None:
        schema.validate(self)


@dataclass(frozen=True)
class Theory:
    """The experiments to run."""

    experiments: tyro.conf.Positional[tuple[str, ...]] = ()
    """Names of experiments. None given: all."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of all randomness: the same seed gives the same digits on the same machine."""
    out: Path = Path("runs/theory")
    """Folder for the page, the pictures and the numbers; replaces those of an earlier run."""
    results: Path | None = None
    """Folder with results of comparisons (`compare_*.json`) to draw into the payoff map."""

    def __post_init__(self) -> None:
        schema.validate(self)


Command = Settings | Report | Check | PretrainSettings | Theory


def main(arguments: Sequence[str] | None = None, prepare: Callable[[], None] = lambda: None) -> int:
    """Run the command line.

    Args:
        arguments: The arguments after ``earlysift``; None takes those of the process.
        prepare: Called after the command is validated and before it runs.

    Returns:
        The exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        command = _parse(given)
        _require_inputs(command)
        prepare()
        if isinstance(command, Settings) and command.suite:
            return _suite(command, given)
        return _RUN[type(command)](command)
    except (ValueError, OSError, ImportError) as error:
        print(f"earlysift: {_printable(str(error))}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not _out_of_memory(error):
            raise
        reason = str(error).split("\n")[0] or "no more memory"
        print(f"earlysift: {reason} Give a smaller model, batch or keep closer to 1.", file=sys.stderr)
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("earlysift: stopped before anything was measured.", file=sys.stderr)
        return EXIT_INTERRUPTED


def _printable(message: str) -> str:
    """A message with control characters, which names of files may hold, as escapes: a terminal would obey them."""
    return "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter).strip("'") for letter in message)


def _out_of_memory(error: Exception) -> bool:
    """Whether memory has run out; torch reports that only in the message."""
    messages = ("can't allocate memory", "out of memory")
    return isinstance(error, MemoryError) or any(message in str(error) for message in messages)


def _parse(given: list[str]) -> Command:
    config = _value_of("--config", given)
    pretraining = given[:1] == ["pretrain"]
    compared = read_settings(Path(config), Settings) if config and not pretraining else Settings()
    pretrained = read_settings(Path(config), PretrainSettings) if config and pretraining else PretrainSettings()
    texts = {"built_in": ", ".join(BUILT_IN), "experiments": ", ".join(EXPERIMENTS)}
    described = {name: text.format(**texts) for name, text in helps.COMMANDS.items()}

    def subcommand(name: str, **default: Any) -> Any:
        return tyro.conf.subcommand(name, description=described[name], **default)

    compare_command = Annotated[Settings, subcommand("compare", default=compared)]
    pretrain_command = Annotated[PretrainSettings, subcommand("pretrain", default=pretrained)]
    report_command = Annotated[Report, subcommand("report")]
    check_command = Annotated[Check, subcommand("check")]
    theory_command = Annotated[Theory, subcommand("theory")]
    errors = io.StringIO()
    try:
        with redirect_stderr(errors):
            command: Command = tyro.cli(
                compare_command | pretrain_command | report_command | check_command | theory_command,
                prog="earlysift",
                description=helps.SUMMARY,
                args=_completion(given),
            )
    except SystemExit as stop:
        # Invalid settings are reported in the same way as those of a config file, not in a box.
        cause: BaseException | None = stop
        while cause is not None:
            if isinstance(cause, schema.InvalidSettings):
                raise cause from None
            cause = cause.__context__
        print(errors.getvalue(), end="", file=sys.stderr)
        raise
    return command


def _completion(given: list[str]) -> list[str]:
    """The arguments as tyro knows them: it prints completions by a flag with its own name.

    Raises:
        ValueError: If the shell is missing or unknown.
    """
    flag, *rest = given or [""]
    if flag != "--print-completion":
        return given
    if len(rest) != 1 or rest[0] not in helps.SHELLS:
        got = " ".join(rest) or "nothing"
        raise ValueError(f"Expected one of {', '.join(helps.SHELLS)} after --print-completion, got {got}.")
    return ["--tyro-write-completion", *rest, "-"]


def _require_inputs(command: Command) -> None:
    """Check the files and names in a command, as far as that is possible without torch.

    Raises:
        ValueError: If a value is invalid.
        OSError: If a file is missing, or cannot be written.
    """
    if isinstance(command, Report):
        if command.out:
            _require_writable_file(command.out, "--out")
        if not command.runs:
            raise ValueError("Expected at least one run folder, got none; give folders that a command wrote.")
        for folder in command.runs:
            read_results(folder)
        return
    if isinstance(command, Check):
        if command.json:
            _require_writable_file(command.json, "--json")
        read_config(command.model)
        return
    require_writable(command.out, "--out")
    if isinstance(command, Theory):
        require_known(command.experiments, command.results)
        return
    if isinstance(command, PretrainSettings):
        require_preset(command.preset)
        if command.tokenizer and not command.tokenizer.is_file():
            raise FileNotFoundError(f"Expected a vocab.txt or tokenizer.json at {command.tokenizer}, found none.")
    elif command.suite:
        from earlysift.compare.suite import names_of

        names_of(command)
        return  # a workload without data is skipped
    else:
        _require_memory(command)
    if isinstance(command, Settings) and command.checkpoint and not command.checkpoint.is_dir():
        raise FileNotFoundError(f"Expected the folder of a saved encoder at {command.checkpoint}, found none.")
    for path in command.data:
        require_data(path)


def _require_writable_file(file: Path, flag: str) -> None:
    if file.is_dir():
        raise IsADirectoryError(f"Expected a file at {file}, found a folder. Choose another {flag}.")
    require_writable(file.parent, flag)


def _require_memory(settings: Settings) -> None:
    """Raise if the models of all arms cannot fit into the memory of a machine that trains on the CPU."""
    if settings.device != "cpu" or not hasattr(os, "sysconf"):
        return
    parameters = 12 * settings.layers * settings.width**2
    needed = 16 * parameters * len(settings.arms)  # weight, gradient and two moments of AdamW, in float32
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise ValueError(
            f"{settings.layers} layers of width {settings.width} have {parameters / 1e9:,.1f} billion weights; one "
            f"such model for each of {len(settings.arms)} arms needs {needed / 2**30:,.0f} GiB to train, and this "
            f"machine has {available / 2**30:,.0f}. Give fewer --layers or --arms, or a smaller --width."
        )


def _value_of(flag: str, given: list[str]) -> str | None:
    # The values of the file become the defaults of the other flags, so it is read before they are parsed.
    for position, argument in enumerate(given):
        if argument == flag and position + 1 < len(given):
            return given[position + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return None


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[str, float], None]]:
    if not console.is_terminal:
        yield _print_shares(console)
        return
    # No column of elapsed time: arms take turns, so each would show the time of all.
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, TaskID] = {}

        def show(name: str, share: float) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=1.0)
            progress.update(tasks[name], completed=share)

        yield show


def _print_shares(console: Console) -> Callable[[str, float], None]:
    """Without a terminal: a line for each quarter of a task."""
    quarters: dict[str, int] = {}

    def show(name: str, share: float) -> None:
        quarter = int(4 * share)
        if quarter > quarters.get(name, -1):
            quarters[name] = quarter
            _print_line(console, f"{name}: {share:.0%}")

    return show


def _print_line(console: Console, line: str) -> None:
    console.print(_printable(line), markup=False, highlight=False, soft_wrap=True)
    console.file.flush()  # a log is read while the program runs


def _compare(settings: Settings) -> int:
    from earlysift.compare.run import compare, has_finished

    console = Console()
    with _progress(console) as show:
        if console.is_terminal:
            results = compare(settings, show)
        else:
            labels = {ARMS[name].label for name in settings.arms}
            results = compare(
                settings,
                lambda name, share: None if name in labels else show(name, share),
                lambda name, run: _print_line(console, _evaluation(name, run)),
            )
    stopped = not has_finished(results, settings.arms, settings.seeds)
    _print_results(console, results, settings.out, stopped=stopped)
    return EXIT_INTERRUPTED if stopped else EXIT_OK


def _evaluation(name: str, run: dict[str, Any]) -> str:
    point = run["curve"][-1]
    accuracy = "–" if point["accuracy"] is None else f"{point['accuracy']:.2%}"
    return f"{ARMS[name].label}, seed {run['seed']}: {point['share']:.0%} of the budget, validation accuracy {accuracy}"


def _print_results(console: Console, results: dict[str, Any], out: Path, *, stopped: bool) -> None:
    table = _table(("arm", "steps", "accuracy", "loss", "to target (s)", "speed-up", "interval"))
    for name, arm in results["arms"].items():
        runs = [run for run in arm["runs"] if run["finished"]]
        entry = results["comparison"].get(name, {})
        table.add_row(
            arm["label"],
            _mean([run["steps"] for run in runs], "{:.0f}"),
            _mean([run["final_accuracy"] for run in runs], "{:.2%}"),
            _mean([run["final_loss"] for run in runs], "{:.3f}"),
            _mean([run["reference_s_to_target"] for run in runs], "{:.1f}"),
            _mean([1.0 if name == "uniform" else entry.get("speedup")], "{:.2f}"),
            "–" if entry.get("low") is None else f"{entry['low']:.2f} to {entry['high']:.2f}",
        )
    console.print(table)
    if stopped:
        console.print("Stopped early: the following is partial. Continue with --resume.")
    elif not results["complete"]:
        _print_line(
            console,
            "Some arms lack seeds, so the following is partial: --resume with all --arms and the largest --seeds.",
        )
    console.print(results["verdict"])
    _print_line(console, f"Report: {out / 'report.html'}")


def _suite(settings: Settings, given: list[str]) -> int:
    from earlysift.compare.suite import run_suite

    console = Console()
    flags = {argument[2:].partition("=")[0].replace("-", "_") for argument in given if argument.startswith("--")}
    with _progress(console) as show:
        outcomes = run_suite(settings, flags, show)
    _print_suite(console, outcomes)
    folders = [settings.out / name for name, outcome in outcomes.items() if outcome.results]
    if folders:
        page = write_report(*folders, out=settings.out / "report.html")
        _print_line(console, f"Report of all: {page}; of each: in the folders beside it.")
    reasons = [outcome.reason for outcome in outcomes.values() if outcome.reason]
    if "stopped" in reasons:
        console.print("Stopped early: continue with --resume.")
        return EXIT_INTERRUPTED
    return EXIT_OK if all(reason.startswith("skipped") for reason in reasons) else EXIT_BAD_INPUT


def _print_suite(console: Console, outcomes: "dict[str, Outcome]") -> None:
    table = _table(("workload", "arm", "speed-up", "by wall time", "accuracy", "verdict"))
    for name, outcome in outcomes.items():
        table.add_section()
        results = outcome.results or {"comparison": {}}
        for arm, entry in results["comparison"].items():
            change, low, high = (entry[f"final_accuracy_{part}"] for part in ("difference", "low", "high"))
            table.add_row(
                name,
                results["arms"][arm]["label"],
                _interval(entry["speedup"], entry["low"], entry["high"], "{:.2f}"),
                _interval(entry["wall_speedup"], entry["wall_low"], entry["wall_high"], "{:.2f}"),
                _interval(change, low, high, "{:+.2%}"),
                entry["verdict"].partition(":")[0],
            )
    console.print(table)
    for name, outcome in outcomes.items():
        sentence = outcome.reason or (outcome.results and _headline(outcome.results))
        if sentence:
            _print_line(console, f"{name}: {sentence}")


def _headline(results: dict[str, Any]) -> str:
    """The verdict on the fastest arm that is charged, if it is faster than uniform training; else the overall one."""
    entries = [entry for arm, entry in results["comparison"].items() if results["arms"][arm]["charged"]]
    fastest: dict[str, Any] = max(entries, key=lambda entry: entry["speedup"] or 0.0, default={})
    return str(fastest["verdict"] if (fastest.get("speedup") or 0.0) > 1 else results["verdict"])


def _table(headings: Sequence[str], **options: Any) -> Table:
    """A table whose columns are right-aligned, except for the first one and those of text."""
    table = Table(**options)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="left" if i == 0 or heading in ("arm", "verdict") else "right")
    return table


def _interval(middle: float | None, low: float | None, high: float | None, form: str) -> str:
    if middle is None:
        return "–"
    ends = "" if low is None or high is None else f" ({form.format(low)} to {form.format(high)})"
    return form.format(middle) + ends


def _mean(values: list[float | None], form: str) -> str:
    numbers = [value for value in values if value is not None]
    return form.format(sum(numbers) / len(numbers)) if numbers and len(numbers) == len(values) else "–"


def _check(command: Check) -> int:
    from earlysift.checkup import checkup

    console = Console()
    options = {name: value for name, value in vars(command).items() if name not in ("model", "json")}
    with _progress(console) as show:
        numbers = checkup(command.model, **options, on_progress=show)
    _print_check(console, numbers)
    if command.json is not None:
        command.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(numbers, indent=2) + "\n"
        write_whole(command.json, lambda part: part.write_text(text, encoding="utf-8"))
    return EXIT_OK


def _print_check(console: Console, numbers: dict[str, Any]) -> None:
    model, shape, machine = numbers["model"], numbers["shape"], numbers["machine"]
    console.print(
        f"{model['class']} ({model['task']}): {model['layers']} layers, {model['parameters'] / 1e6:,.1f} M parameters, "
        f"{shape['seq_length']} positions and {shape['labels_per_sample']:g} labels per sample.\n"
        f"{machine['device']}, threads: {machine['threads']}; training in {machine['training_dtype']}, scoring in "
        f"{machine['scoring_dtype']}; median ms of {numbers['rounds']} rounds."
    )
    table = Table(
        title=f"A training step on {shape['batch']} samples, and scoring a pool of {shape['pool']}",
        title_justify="left",
        caption=f"Cost c of selection, by FLOPs and by time; by time it is the break-even gain. Memory: growth at the "
        f"peak, by {machine['memory_measure']}.",
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for heading in ("break-even\ngain", "c by\nFLOPs", "of a\nstep", "ms", "GFLOPs", "MiB"):
        table.add_column(heading, justify="right")

    def add(title: str, entry: dict[str, Any], *ratios: str) -> None:
        memory = f"{entry['memory_bytes'] / 2**20:,.1f}"
        table.add_row(title, *ratios, f"{entry['ms']:,.1f}", f"{entry['flops'] / 1e9:,.2f}", memory)

    add("train", numbers["train"], "1", "1", "100.0%")
    table.add_section()
    for score in numbers["scores"]:
        exit_name = "full model" if score["exact"] else f"depth {score['depth']}"
        add(
            exit_name,
            score,
            f"{score['break_even_gain']:.3f}",
            f"{score['cost_by_flops']:.3f}",
            f"{score['ratio']:.1%}",
        )
    console.print(table)
    console.print(
        "Selection pays only while the measured gain (mean exact loss of the kept samples over that of the pool; "
        "sift/gain in Sifter.stats()) exceeds the break-even gain of its depth."
    )


def _pretrain(settings: PretrainSettings) -> int:
    try:
        from earlysift.pretrain.run import pretrain  # transformers takes seconds that other commands do not need
    except ImportError as error:
        raise ImportError(
            f"Pre-training needs transformers and accelerate: pip install 'earlysift[hf]' ({error})."
        ) from error
    code, message = pretrain(settings)
    if os.environ.get("RANK", "0") == "0":  # the first process of torchrun, or the only one
        print(f"earlysift: {_printable(message)}", file=sys.stderr if code else sys.stdout)
        if (settings.out / "report.html").is_file():
            print(_printable(f"Report: {settings.out / 'report.html'}"))
    return code


def _report(command: Report) -> int:
    if command.out is not None:
        command.out.parent.mkdir(parents=True, exist_ok=True)
    print(_printable(str(write_report(*command.runs, out=command.out))))
    return EXIT_OK


def _theory(command: Theory) -> int:
    from earlysift.theory import page
    from earlysift.theory.experiments import run_experiments

    page.require_own(command.out)
    console = Console()
    with _progress(console) as show:
        findings = run_experiments(command.experiments, show, seed=command.seed, results=command.results)
    for finding in findings:
        _print_finding(console, finding)
    names = [finding.name for finding in findings]
    settings = {"seed": command.seed, "experiments": names, "results": command.results and str(command.results)}
    facts = f"seed {command.seed}, float64 on the CPU; experiments: {', '.join(names)}"
    _print_line(console, f"Report: {page.write(findings, command.out, settings, facts)}")
    return EXIT_OK


def _print_finding(console: Console, finding: "Finding") -> None:
    from earlysift.theory.findings import show_cell

    console.print(f"\n{finding.title}. {finding.summary}", highlight=False)
    for content in finding.tables:
        table = _table(content.headers, title=content.title, title_justify="left")
        for cells in content.rows:
            table.add_row(*map(show_cell, cells))
        console.print(table)


_RUN: dict[type, Callable[[Any], int]] = {
    Settings: _compare,
    Report: _report,
    Check: _check,
    PretrainSettings: _pretrain,
    Theory: _theory,
}
