"""`earlysift pretrain` in child processes: run, interrupted, and compared bit for bit."""

import json
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

import earlysift
from earlysift.seeds import seeded

SOURCE = Path(earlysift.__file__).parents[1]
MODEL = {
    "model_type": "bert",
    "architectures": ["BertForMaskedLM"],
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}
SECRETS = {  # in the environment of every process, and to be found nowhere else
    "HF_TOKEN": "hf_planted0secret0of0the0hub",
    "WANDB_API_KEY": "planted0secret0of0a0tracker",
    "AWS_SECRET_ACCESS_KEY": "planted0secret0of0a0cloud",
}
WITHOUT_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
STEPS, EVERY, ACCUMULATE = 12, 3, 2

# Runs commands in child processes, forked from one that has imported what they need. A command is one of ``earlysift``,
# or a training of trainings.py. It may come with a signal for the nth call of a function, with a number that turns bad
# (faults.py), and with a fault of the disk (disk.c).
STARTER = """
import importlib, json, os, signal, sys, traceback
import earlysift.__main__, earlysift.cli, earlysift.pretrain.run as run
import faults

trainings = importlib.import_module(sys.argv[1]).TRAININGS if len(sys.argv) > 1 else {}

HANDLED = dict.fromkeys(faults.SIGNALS, signal.SIG_DFL) | dict.fromkeys(
    (signal.SIGTERM, signal.SIGINT), signal.default_int_handler
)
for line in sys.stdin:
    command = json.loads(line)
    child = os.fork()
    if child == 0:
        for stream, path in ((0, os.devnull), (1, command["out"]), (2, command["err"])):
            os.dup2(os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), stream)
        sys.argv = ["earlysift", *command["arguments"]]
        for number, handler in HANDLED.items():
            signal.signal(number, handler)
        code = 1
        try:
            if command["fault"]:
                run.Pretrainer = faults.faulty(run.Pretrainer, *command["fault"])
            if command["at"]:
                sys.setprofile(faults.watcher(*command["at"]))
            if command["disk"]:
                os.environ["EARLYSIFT_DISK"] = command["disk"]
            code = trainings.get(sys.argv[1], earlysift.__main__.main)()
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            if faults.since_struck_s():
                print(f"struck {faults.since_struck_s():.2f} s ago")
            if {number: signal.getsignal(number) for number in HANDLED} != HANDLED:
                code = 99  # handlers are not as they were
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
"""
# The same under torchrun, which kills the second process once.
KILLED_RANK = """
import os, signal, sys
import earlysift.__main__, faults

if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    sys.setprofile(faults.watcher("compute_loss", 8, signal.SIGKILL))
sys.exit(earlysift.__main__.main())
"""


@contextmanager
def starter(environment, folder, *trainings):
    """A function that runs commands in processes; gives exit code, what was printed, and what was printed as errors."""
    command = [sys.executable, "-c", STARTER, *trainings]
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    out_path, err_path = folder / "out", folder / "err"

    def run(arguments, *, at=None, fault=None, disk=None):
        told = {"arguments": [*map(str, arguments)], "at": at, "fault": fault, "disk": disk}
        process.stdin.write(json.dumps(told | {"out": str(out_path), "err": str(err_path)}) + "\n")
        process.stdin.flush()
        code = int(process.stdout.readline())
        return code, out_path.read_text(), err_path.read_text()

    with process:
        yield run
        process.stdin.close()


def write_data(folder):
    """Text, and models of two layers to train on it."""
    generator = seeded("text")
    words = ["".join("abcdefgh"[i] for i in torch.randint(8, (n,), generator=generator)) for n in (2, 3, 4, 5) * 50]

    def document():
        ids = (torch.rand(400, generator=generator) ** 3 * len(words)).long().tolist()
        return ". ".join(" ".join(words[i] for i in ids[start : start + 10]) for start in range(0, 400, 10))

    (folder / "text.txt").write_text("\n\n".join(document() for _ in range(120)))
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "plain.json").write_text(json.dumps(MODEL | WITHOUT_DROPOUT))


def torchrun(data, environment, out, *options, launched=("-m", "earlysift")):
    """``earlysift pretrain`` by two processes; ``launched`` are the arguments of torchrun beyond its usual options."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *map(str, launched), "pretrain"]
    arguments = [*arguments_for(data, out, "plain.json"), "--accumulate", "1", *options]
    return subprocess.run(
        [sys.executable, *launch, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def arguments_for(data, out, model="model.json"):
    options = {
        "preset": data / model,
        "data": data / "text.txt",
        "out": out,
        "length": 16,
        "validation-samples": 32,
        "batch": 4,
        "accumulate": ACCUMULATE,
        "steps": STEPS,
        "every": EVERY,
        "log-every": EVERY,
        "learning-rate": 0.01,
        "device": "cpu",
        "track": "none",
    }
    return [part for name, value in options.items() for part in (f"--{name}", str(value))]


def kill(name, count):
    return [name, count, signal.SIGKILL]


def ledger(out, process=0):
    """The rows of a ledger, without times."""
    lines = (out / "ledgers" / f"process{process}.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if not key.endswith("_ms")} for line in lines]


def curve(out):
    """The points of the learning curve, without times."""
    results = json.loads((out / "results.json").read_text())
    ((arm,),) = [[arm["runs"][0] for arm in results["arms"].values()]]
    return [{key: value for key, value in point.items() if not key.endswith("_s")} for point in arm["curve"]]


def log(out, step=STEPS):
    """What the Trainer logged of training, without times."""
    state = json.loads((out / f"checkpoint-{step}" / "trainer_state.json").read_text())
    entries = [entry for entry in state["log_history"] if "loss" in entry]
    return [{key: value for key, value in entry.items() if not key.endswith("_ms")} for entry in entries]


def tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict | list | tuple):
        return [found for part in (value.values() if isinstance(value, dict) else value) for found in tensors(part)]
    return []


def weights(out, step=STEPS):
    """Weights, state of the optimizer and of random numbers, in one list."""
    folder = out / f"checkpoint-{step}"
    loaded = [load_file(folder / "model.safetensors"), torch.load(folder / "optimizer.pt", weights_only=True)]
    return tensors(loaded)


def assert_bit_equal(one, other):
    rows = ledger(one)
    assert len(rows) == STEPS * ACCUMULATE
    expected = [divmod(number, ACCUMULATE) for number in range(STEPS * ACCUMULATE)]
    assert [(row["step"], row.get("micro_step", 0)) for row in rows] == expected
    assert len({row["picks"] for row in rows}) == len(rows)
    assert sum("loss" in row and "learning_rate" in row for row in rows) == STEPS
    assert len(curve(one)) == STEPS // EVERY
    assert_same(one, other)


def assert_same(one, other):
    """Two runs to the last step: picks, losses, counts, rates, curves, weights, and states of the optimizer."""
    assert ledger(one) == ledger(other)
    assert curve(one) == curve(other)
    assert log(one) == log(other)
    ours, theirs = weights(one), weights(other)
    assert len(ours) == len(theirs) > 60
    assert all(map(torch.equal, ours, theirs))
