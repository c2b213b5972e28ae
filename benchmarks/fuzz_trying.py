"""Try one thing in a process and a folder of its own, and judge what came of it.

The process is forked from this one, which has imported everything: a call then takes milliseconds. Every file in its
folder is a canary, whose digest is compared before and after.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

OUTCOMES = ("clear error", "fine", "taken", "traceback", "data lost", "left behind", "hang")
BAD = OUTCOMES[2:]
"""What can come of a case, and what must not.

``clear error``: a sentence that says what is wrong. ``fine``: it was accepted and worked. ``taken``: accepted, though
no reading makes sense of it. ``traceback``: any other error. ``data lost``: a file that the call had no right to is
changed or gone, or a state after it was refused. ``left behind``: a refused call made files. ``hang``: no end.
"""
LIMIT_S, ENOUGH_S, GRACE_S = 180.0, 20.0, 60.0  # to begin; of training; to end when told so
_MOST_MEMORY = 4 << 30
OWN = re.compile(
    r"config\.json|results\.json|report\.html|curves\.png|tokenizer\.json|ledgers/[\w-]+\.jsonl|checkpoint-\d+/.*"
    r"|encoder/(config\.json|model\.safetensors|tokenizer\.json|earlysift\.json)|\.lock|\.earlysift\.json"
)
"""What commands write into a run folder, and may replace when they are asked to."""
_RAW = re.compile(  # what Python and torch say of values, passed on as it is
    r"^earlysift: (Expecting |Extra data|Out of range float|invalid literal|could not convert|Invalid learning"
    r"|'\S+' codec|'\S+' object|'\S+' not supported)"
)
_CLEAR = (ValueError, TypeError, FileNotFoundError, FileExistsError)


class Lost(Exception):
    """A refused call changed what it should have left alone."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to try.

    Attributes:
        kind: Of the table of counts.
        name: What it is, for the list.
        act: Tries it, in the folder; what it returns is the exit code of a command.
        prepare: Makes what it needs in the folder.
        words: The message must have one of them (library).
        out: Folders that it may write to, if it is accepted.
        refused: Whether no reading makes sense of it, so that it must be refused.
        command: Whether it is a command, judged by exit code and output.
    """

    kind: str
    name: str
    act: Callable[[], Any]
    prepare: Callable[[], None] | None = None
    words: tuple[str, ...] = ()
    out: tuple[str, ...] = ()
    refused: bool = False
    command: bool = False


class Tried(NamedTuple):
    """What came of a case: one of `OUTCOMES`, the exit code, and the first line of the error."""

    outcome: str
    code: int | None
    said: str


class _Running(NamedTuple):
    case: Case
    folder: Path
    before: dict[str, str]
    process: int
    ended: int  # a file descriptor, readable when the process has ended
    began_s: float


def try_all(cases: list[Case], world: Path, *, jobs: int = 1) -> Iterator[tuple[Case, Tried]]:
    """Try cases, ``jobs`` at a time, each in a copy of the world; in the order in which they end."""
    waiting, running = list(reversed(cases)), list[_Running]()
    with tempfile.TemporaryDirectory() as scratch:
        while waiting or running:
            while waiting and len(running) < jobs:
                case = waiting.pop()
                running.append(_start(case, world, Path(tempfile.mkdtemp(dir=scratch))))
            select.select([each.ended for each in running], [], [], 0.1)
            for each in list(running):
                tried = _ended(each)
                if tried is not None:
                    running.remove(each)
                    yield each.case, tried


def try_one(case: Case, world: Path) -> Tried:
    """What comes of one case."""
    ((_, tried),) = try_all([case], world)
    return tried


def call(*arguments: str) -> Callable[[], int]:
    """A call of the command line, for `Case.act`."""

    def act() -> int:
        from earlysift import __main__ as program

        sys.argv = ["earlysift", *arguments]
        return program.main()

    return act


def _start(case: Case, world: Path, scratch: Path) -> _Running:
    folder = scratch / "world"
    if case.command:
        shutil.copytree(world, folder, symlinks=True)
    else:
        folder.mkdir()
    if case.prepare is not None:
        with contextlib.chdir(folder):
            case.prepare()
    before = digests(folder)
    ended, held = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(ended)
        _be(case, folder)
    os.close(held)
    return _Running(case, folder, before, process, ended, time.monotonic())


def _be(case: Case, folder: Path) -> NoReturn:
    """The process of a case."""
    code = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (_MOST_MEMORY, _MOST_MEMORY))
        for stream, name in ((0, os.devnull), (1, folder.parent / "out"), (2, folder.parent / "err")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT), stream)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(folder)
        if case.command:
            os.environ["COLUMNS"] = "120"
        code = int(case.act() or 0) if case.command else _judge(case)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _judge(case: Case) -> int:
    """Try a case of the library; prints what is to be said of it."""
    outcome, said = "fine", ""
    try:
        case.act()
        outcome = "taken" if case.refused else "fine"
    except Lost as error:
        outcome, said = "data lost", str(error)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        outcome = "clear error" if _is_clear(error, case.words) else "traceback"
    print(json.dumps([outcome, " ".join(said.split())[:300]]))
    return 0


def _is_clear(error: Exception, words: tuple[str, ...]) -> bool:
    """Whether it is a sentence that this library raised, and names what it is about."""
    message = str(error)
    named = not words or any(word.lower() in message.lower() for word in words)
    if isinstance(error, TypeError) and "got an unexpected keyword argument" in message:
        return named  # Python's own word on it is as good
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = f"{os.sep}earlysift{os.sep}" in last.filename and (last.line or "").startswith("raise ")
    return ours and named and isinstance(error, _CLEAR) and len(message.split()) > 3


def _ended(running: _Running) -> Tried | None:
    """What came of a case; None while it goes on."""
    case, folder, process = running.case, running.folder, running.process
    took_s = time.monotonic() - running.began_s
    done, status = os.waitpid(process, os.WNOHANG)
    hangs = False
    if not done:
        ledgers: list[Path] = []
        for out in case.out:
            with contextlib.suppress(OSError):  # a name that no file system takes
                ledgers += (folder / out / "ledgers").glob("*.jsonl")
        begun = took_s > ENOUGH_S and any(time.time() - path.stat().st_mtime < took_s for path in ledgers)
        if not begun and took_s < LIMIT_S:
            return None
        status = _stop(process)
        hangs = not begun or os.WIFSIGNALED(status)
    os.close(running.ended)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)  # what it may have started
    code = os.waitstatus_to_exitcode(status)
    out, err = ((folder.parent / name).read_text(errors="replace") for name in ("out", "err"))
    tried = _of_command(case, code, out, err) if case.command else _of_library(code, out, err)
    if hangs:
        tried = Tried("hang", code, tried.said)
    ran = tried.outcome in ("fine", "taken") or code in (3, 4)
    lost, new = _changes(case, running.before, folder, ran=ran)
    if lost:
        also = f"{tried.outcome}: " if tried.outcome in BAD else ""
        tried = Tried("data lost", code, f"{', '.join(lost[:4])} changed; {also}{tried.said}")
    elif new and case.command and tried.outcome == "clear error":
        tried = Tried("left behind", code, f"{', '.join(new[:4])}; {tried.said}")
    for path in folder.rglob("*"):
        if path.is_dir() and not path.is_symlink():
            path.chmod(0o755)
    shutil.rmtree(folder.parent)
    return tried


def _stop(process: int) -> int:
    """End a process politely, then not; returns its status."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, signal.SIGTERM)
    until_s = time.monotonic() + GRACE_S
    while time.monotonic() < until_s:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return status
        time.sleep(0.05)
    os.kill(process, signal.SIGKILL)
    return os.waitpid(process, 0)[1]


def _of_command(case: Case, code: int, out: str, err: str) -> Tried:
    lines = [line.strip(" │").strip() for line in (err or out).split("\n")]
    said = [line for line in lines if re.match(r"earlysift: |[\w-]+: (did not run|skipped): ", line)]
    ours = [line for line in said if not _RAW.search(line)]
    parsed = [line for above, line in itertools.pairwise(lines) if above.startswith("╭─ ")]
    raised = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt|Warning)\b", line)]
    if "Traceback (most recent call last)" in err or code < 0:
        return Tried("traceback", code, (raised or ours or lines)[-1] or f"ended by signal {-code}")
    if code == 0 or (code == 130 and case.out) or (code == 1 and ours and case.out):
        return Tried("taken" if case.refused else "fine", code, "".join(ours[:1]))
    if code in (2, 3, 4) and (ours or parsed):
        return Tried("clear error", code, (ours or parsed)[0])
    return Tried("traceback", code, next(filter(None, said + lines), "nothing"))


def _of_library(code: int, out: str, err: str) -> Tried:
    if code != 0 or not out.strip():
        return Tried("traceback", code, err.strip().split("\n")[-1] or f"ended with {code}")
    outcome, said = json.loads(out.strip().split("\n")[-1])
    return Tried(outcome, None, said)


def _changes(case: Case, before: dict[str, str], folder: Path, *, ran: bool) -> tuple[list[str], list[str]]:
    """Files that the call had no right to and that are changed or gone; new ones where it may not have made any."""
    after = digests(folder)

    # A run that was gone on with, and then stopped by an error, may know more than before.
    results = [f"{out}/results.json" for out in case.out if f"{out}/results.json" in before]
    grown = "--resume" in case.name and all(_grown(before[path], after.get(path, "")) for path in results)

    def allowed(path: str) -> bool:
        inner = [path.removeprefix(f"{out}/") for out in case.out if path.startswith(f"{out}/")]
        grows = grown and (path not in before or path.endswith((".json", ".html", ".png")))
        return (ran or grows) and any(OWN.fullmatch(part) for part in inner)

    lost = [path for path in before if after.get(path) != before[path] and not allowed(path)]
    new = [path for path in after if path not in before and Path(path).name != ".lock" and not allowed(path)]
    outside = [path for path in new if path.startswith(("outside/", "foreign/"))]
    return [*lost, *outside], new


def _grown(before: str, after: str) -> bool:
    """Whether results hold all runs that earlier ones held."""
    if before == after:
        return True
    try:
        runs, runs_now = (
            [run for arm in json.loads(text)["arms"].values() for run in arm["runs"] if run["finished"]]
            for text in (before, after)
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return all(run in runs_now for run in runs)


def digests(folder: Path) -> dict[str, str]:
    """Of every file in a folder; of links where they lead, and of results what they say."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"link to {path.readlink()}"
        elif path.name == "results.json" and path.is_file():
            found[name] = path.read_text(errors="replace")
        elif path.is_file():
            readable = os.access(path, os.R_OK)
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if readable else str(path.stat().st_size)
    return found
