"""The part of docs/results.md that is about comparisons: its picture and its sections, from judged results."""

import re
from pathlib import Path

from arm_tables import (
    charges_table,
    course_table,
    decisions,
    fidelity_line,
    interval,
    spent_table,
    verdict_table,
    word,
)
from earlysift.compare.settings import Settings
from earlysift.report.tables import GAIN, HARM, outcome
from measuring import folded, markdown
from pictures import THEMES, speedup_picture
from workloads import (
    FEWEST_SEEDS,
    LEAST_ODDS,
    Results,
    Workload,
    competitors,
    counted,
    leaves_plateau,
    longest_s,
    missed,
    pictured,
    rows,
    seed_count,
    uniform_accuracy,
)

_MAIN_ARMS = ("auto", "sift", "sift-2")  # the best of the others has a column of its own
_MAIN_COLUMNS = {"auto": ("auto",), "SIFT": ("sift", "sift-2")}  # the first of these arms that was run
_SHORT = "Too short to say anything"

_HOW_TO_READ = """
- **Target:** a share of what uniform training ends with on the same seed. A second column, where there is one, has
  the speed-up to 95 % of it.
- **In brackets:** 95 % intervals of comparisons by Student's t (on logarithms for ratios); the lowest and the highest
  seed of everything else. A speed-up is a geometric mean over seeds, and is given only if every seed arrived.
- **Verdicts:** *gain* if the whole interval of the speed-up is above 1, *harm* if that of the final accuracy is below
  uniform training's, over at least three seeds. *Never acted:* every step was a step of uniform training. *Could not
  decide:* auto had fewer probes than a decision needs. [All verdicts](when-it-helps.md#how-to-read-a-verdict).
- **Reference time:** every operation is charged at its median in the same run, in the arms' own steps. Results without
  calibrated times beside the charged ones used a calibration before the run instead. It charged scoring too much.
  Selective backprop drew by percentiles within the pool in those.
- **Wall time** says little, because the runs shared their cores with other work at different hours. Auto shows how
  little, where it took uniform training's own steps.
- **Arms** start from the same weights, read the same stream, and decay their learning rate to zero at the end of the
  budget. Accuracy is on held-out data: of masked or next tokens, of sentences, of images.
- **Auto** is the controller of the commit named with each result. On workloads of several epochs with keep 0.25 it is
  the present one, or one that differs as [the log](log.md) says. Elsewhere it is an earlier one with other conditions.
- **Masked tokens:** a tenth of the labelled tokens stays visible and is predicted by copying. "On hidden tokens" are
  the points from uniform on the others. The arm "visible labels" is a control without a model, which prefers
  candidates with many visible ones.
- **Source:** `make docs` writes this page from the files in [benchmarks/results](../benchmarks/results); edit those.
  Verdicts are made from the runs when the page is written."""


def comparison_parts(workloads: list[Workload], docs: Path) -> list[str]:
    """Everything that the page says of comparisons; the picture is drawn into ``docs``."""
    enough = [workload for workload in workloads if leaves_plateau(workload.results)]
    short = [workload for workload in workloads if workload not in enough]
    shown = [workload for workload in enough if pictured(workload)]
    parts = [_picture(shown, docs)] if shown else []
    if enough:
        parts += [_introduction(enough), folded("How to read this page", _HOW_TO_READ), overview(enough)]
    parts += map(_section, enough)
    if short:
        parts += [_short_section(short)]
    return parts


def overview(workloads: list[Workload], short: bool = False) -> str:
    """One line per workload: what uniform training reached, and the speed-ups of the arms that matter most.

    ``short`` is for workloads that say nothing: without links, as they have no sections, and without bold gains.
    """
    lines = []
    for name, _, results, _ in workloads:
        reached, hidden = uniform_accuracy(results)
        accuracies = f"{100 * reached:.1f} % ({100 * results['baseline']['accuracy']:.1f} %)"
        lines.append(
            [
                name if short else f"[{name}](#{slug(name)})",
                str(seed_count(results)),
                accuracies + " on hidden tokens" * hidden,
                _best(results, not short),
                *(_first(results, arms, not short) for arms in _MAIN_COLUMNS.values()),
            ]
        )
    headings = ["workload", "seeds", "uniform (a constant answer)", "best other arm", *_MAIN_COLUMNS]
    return f"{markdown(headings, lines)}\n"


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading.

    Example:
        >>> slug("MNIST (20% flipped), 4.6 epochs")
        'mnist-20-flipped-46-epochs'
    """
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def _picture(workloads: list[Workload], docs: Path) -> str:
    shown = {workload.name: rows(workload.results) for workload in workloads}
    for theme in THEMES:
        speedup_picture(shown, theme, docs / f"speed-ups-{theme}.svg")
    copied = any(row.label.endswith("(control)") for made in shown.values() for row in made)
    note = "\nOn masked tokens the gains are copying: the control gains more, and no arm is ahead on hidden tokens."
    return f"""<picture>
  <source media="(prefers-color-scheme: dark)" srcset="speed-ups-dark.svg">
  <img alt="Speed-up of every arm with its interval, by workload" src="speed-ups-light.svg" width="760">
</picture>

*Speed-up to the target with its 95 % interval. Hollow marks did not arrive on every seed; beside them is the loss in
final accuracy, or how many seeds arrived. Shown are workloads of at least {FEWEST_SEEDS} seeds on which uniform
training leaves its plateau: its odds of a right answer are at least {LEAST_ODDS:g} times those of a constant answer
(on hidden tokens, where measured). Arms that never acted or are not charged are in the tables only.{note * copied}*
"""


def _introduction(workloads: list[Workload]) -> str:
    """Six sentences, two of them counted from the results."""
    every = [workload.results for workload in workloads]
    longest = max(map(longest_s, every), default=0)
    gains, harms = (counted(every, verdict) for verdict in (GAIN, HARM))
    auto = [outcome(results["comparison"].get("auto", {})) for results in every]
    return f"""Every arm trains the same model on the same data for the same time, and pays for everything that it does.
A speed-up is the time that uniform training needs to the target accuracy, divided by the time that the arm needs.
The models are small, and train for at most {longest:.0f} seconds on one core of a CPU.
On {gains} of {len(every)} workloads some arm proves a gain, and on {harms} some arm proves harm.
Auto proves a gain on {auto.count(GAIN)} and harm on {auto.count(HARM)}.
Apart from masked tokens, where it is copying, selection gains only in several epochs of data that is mostly learnt.
"""


def _section(workload: Workload) -> str:
    return f"\n## {workload.name}\n\n{_body(workload)}"


def _short_section(workloads: list[Workload]) -> str:
    """Workloads that uniform training learnt too little of: a table, and all else folded away."""
    about = (
        f"Uniform training stays near its plateau here: its odds of a right answer are less than {LEAST_ODDS:g} times\n"
        "those of a constant answer (on hidden tokens, where measured). A speed-up on the plateau says nothing about\n"
        "training that leaves it."
    )
    details = [folded(workload.name, _body(workload)) for workload in workloads]
    return "\n".join([f"\n## {_SHORT}\n\n{about}\n\n{overview(workloads, short=True)}", *details])


def _body(workload: Workload) -> str:
    results = workload.results
    target, baseline, arms = (results[name] for name in ("target", "baseline", "arms"))
    details = {
        "Steps, losses and times": course_table(results),
        "Where the time went": f"{spent_table(results)}\n{charges_table(results)}\n{_costs(results)}",
    }
    if "auto" in arms:
        details["What auto decided"] = decisions(results)
    details["How it was measured"] = _measured(workload)
    return f"""**{results["verdict"]}**

{verdict_table(results, workload.easier)}

{_number(seed_count(results), "seed")}. Target: {100 * target["accuracy"]:.2f} % ({target["source"]}).
A constant answer reaches {100 * baseline["accuracy"]:.2f} % and a loss of {baseline["loss"]:.3f}.

{chr(10).join(folded(summary, text) for summary, text in details.items())}"""


def _measured(workload: Workload) -> str:
    results = workload.results
    machine = results["machine"]
    facts = ", ".join(f"{name} {value}" for name, value in results["data"].items() if name not in ("name", "task"))
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    device = f"{machine['accelerator']}, " if machine.get("accelerator") else ""
    cores = f"{machine['cores']} cores, {machine['threads']} thread(s), {machine['memory_gib']} GiB"
    lines = [
        f"- Command: `{_command(results)}` ([{workload.file}](../benchmarks/results/{workload.file}))",
        f"- Data: {results['data']['name']}; {facts}.",
        f"- Machine: {device}{machine['cpu']}, {cores}. {versions}; commit {results['commit']}.",
    ]
    if "sift" in results["arms"]:
        exit_of = f"Exit {results['config']['depth']} against exact loss, SIFT arm, on the validation set"
        lines.append(f"- {exit_of}: {fidelity_line(results)}.")
    return "\n".join(lines)


def _costs(results: Results) -> str:
    operations = results["operations_ms"]
    step_ms = operations["train"]["median"]
    before = results.get("calibrated_ms", {})  # where prices have followed the steps since
    calibrated = {name: f"; calibrated {timing['median']:.1f} ms" for name, timing in before.items()}
    costs = ", ".join(
        f"{name} {entry['median']:.1f} ms ({entry['median'] / step_ms:.3f}{calibrated.get(name, '')})"
        for name, entry in operations.items()
    )
    return f"Cost of the operations, as charged (and of a training step): {costs}."


def _best(results: Results, bold: bool) -> str:
    """The competitor that the overview has no column for: the fastest with a proven gain, else the fastest."""
    others = {
        name: entry for name, entry in competitors(results).items() if name not in _MAIN_ARMS and entry["speedup"]
    }
    best = max(others, key=lambda name: (outcome(others[name]) is GAIN, others[name]["speedup"]), default=None)
    return "–" if best is None else f"{results['arms'][best]['label']}: {_told(others[best], bold)}"


def _first(results: Results, arms: tuple[str, ...], bold: bool) -> str:
    name = next((name for name in arms if name in results["comparison"]), None)
    return "not run" if name is None else _told(results["comparison"][name], bold)


def _told(entry: Results, bold: bool) -> str:
    """An entry in a cell of the overview: speed-up and verdict; a proven gain may be bold."""
    if not entry["speedup"]:
        return f"{word(entry)} ({missed(entry)})"
    told = f"{interval(entry, '', 'speedup', '{:.2f}')} {word(entry)}"
    return f"**{told}**" if bold and outcome(entry) is GAIN else told


def _command(results: Results) -> str:
    """The command of a comparison: the settings that differ from the defaults."""
    defaults = Settings().identity()
    flags = []
    for name, value in results["config"].items():
        if value != defaults.get(name):
            values = value if isinstance(value, list) else [value]
            words = [] if value is True else values
            flags.append(" ".join([f"--{name.replace('_', '-')}", *map(str, words)]))
    return " ".join([f"OMP_NUM_THREADS={results['machine']['threads']} earlysift compare", *flags])


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"
