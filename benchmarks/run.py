"""The one entry to all benchmarks: ``python benchmarks/run.py NAME ... [--smoke]``.

- step: our training step beside the model's own
- score: scoring beside a training step, beside what others do, and beside its roof
- positions: what a score loses, and saves, that reads only a few labelled positions of every sample
- select: ranking, gathering and bookkeeping beside scoring; what makes the host wait
- pages: what a step and scoring gain on a CPU where freed memory is kept
- memory: peak memory of sifting and training beside a plain step
- scale: how the overhead of scoring grows with depth, keep, pool, length, vocabulary, batch and processes
- start: `import earlysift` and `earlysift --help` beside Python and torch
- auto: what auto mode saves of what the best fixed score saves, on streams that train in seconds, charged by FLOPs
- hazards: what selection does to the end of training with wrong labels, copies and rare classes, guarded and not
- families: what early exits make of tiny models of many families
- plateau: how far uniform training gets on every workload of the suite, and how far with three times the budget
- soak: whether memory grows and steps become slower, by every approximation; `--minutes 60` for a long run
- endurance: what 20,000 steps of `earlysift pretrain` hold, and what twenty kills under torchrun cost
- train: `earlysift pretrain` uniformly, sifting and with exact losses, on the same data and budget

Results go into benchmarks/results/NAME_DEVICE.json, an entry per shape with hardware, versions and commit. An entry
that is there is not measured again: a run that was cut goes on, and to measure anew, remove the file. `make docs` puts
them into docs/results.md.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import bench_auto
import bench_endurance
import bench_families
import bench_hazards
import bench_memory
import bench_pages
import bench_plateau
import bench_positions
import bench_scale
import bench_score
import bench_select
import bench_soak
import bench_start
import bench_step
import bench_train
import measuring
from earlysift import environment
from earlysift.files import write_json
from shapes import SHAPES

BENCHMARKS: dict[str, tuple[Any, list[str]]] = {
    "step": (bench_step, list(SHAPES)),
    "score": (bench_score, list(SHAPES)),
    "positions": (bench_positions, []),
    "select": (bench_select, list(SHAPES)),
    "pages": (bench_pages, ["bert-base-128", "gpt2-small-512"]),
    "memory": (bench_memory, list(SHAPES)),
    "scale": (bench_scale, ["bert-mini-128"]),
    "start": (bench_start, []),
    "auto": (bench_auto, []),
    "hazards": (bench_hazards, []),
    "families": (bench_families, []),
    "plateau": (bench_plateau, []),
    "soak": (bench_soak, []),
    "endurance": (bench_endurance, []),
    "train": (bench_train, []),
}
"""Name to module and the shapes that are measured unless others are asked for; the last ones have their own."""
RESULTS = Path(__file__).parent / "results"


def main() -> int:
    """Run the benchmarks named on the command line, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benchmark", nargs="+", choices=BENCHMARKS)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="models (default: the benchmark's own)")
    parser.add_argument(
        "--dtype", nargs="+", choices=measuring.DTYPES, default=["float32", "bfloat16"], help="precision"
    )
    parser.add_argument("--batch", type=int, help="b (default: the shape's own, which is for two CPU cores)")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (a warm-up round comes before)")
    parser.add_argument("--size", choices=bench_train.SIZES, default="cpu", help="what to train")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="folder of the corpora, for plateau")
    parser.add_argument("--minutes", type=float, help="budget of an arm of train or a score of soak")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing kept: does it run?")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    given = parser.parse_args()
    if given.smoke:
        given.rounds, given.size = 2, "smoke"
    environment.keep_memory()  # as the command line does
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.out or (Path(scratch) if given.smoke else RESULTS)
        folder.mkdir(parents=True, exist_ok=True)
        for name in given.benchmark:
            run(name, given, folder)
    return 0


def run(name: str, given: argparse.Namespace, folder: Path) -> None:
    """Measure what is not in the file yet, entry by entry, and show the whole file."""
    benchmark, usual_shapes = BENCHMARKS[name]
    path = folder / f"{name}_{measuring.device().type}.json"
    result: dict[str, Any] = {"benchmark": name, "entries": {}}
    if path.is_file():
        result = json.loads(path.read_text(encoding="utf-8"))
    asked = argparse.Namespace(**{**vars(given), "shape": given.shape or usual_shapes})
    for entry, measure in benchmark.plan(asked).items():
        if entry in result["entries"]:
            print(f"{name}: {entry} is in {path} already")
            continue
        print(f"{name}: {entry}", flush=True)
        result["entries"][entry] = {**measuring.about(), **measure()}
        write_json(path, result)
    print(f"\n{measuring.tables(benchmark.TABLES, result['entries'])}\n\n{path}\n")


if __name__ == "__main__":
    sys.exit(main())
