"""What a process runs with, and what a result was measured on: memory, machine, versions, commit."""

import ctypes
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Environment variable that torch reads when it first makes a large tensor."""
# glibc's names in the environment, read when a process starts; what `mallopt` calls the same; no mmap, no trimming.
_KEEPING = {"MALLOC_MMAP_MAX_": ("0", -4, 0), "MALLOC_TRIM_THRESHOLD_": (str(2**63 - 1), -1, -1)}
_DECIDING = {*_KEEPING, "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"}  # of the same matter
STEADY_MEMORY: dict[str, str] = {HUGE_PAGES: "1"} | {name: value for name, (value, *_) in _KEEPING.items()}
"""Environment variables that do for any program, set before it starts, what `keep_memory` does from within."""

# On two cores the model of the demo gains 1.4 by the second thread while nothing else runs, and takes fourteen times as
# long as on one while something does: a thread that has no core is waited for in every operation.
_CLEARLY_FASTER = 1.7
_MEASURED_STEPS, _MEASURED_S = 5, 3.0
_FOUND_THREADS = torch.get_num_threads()


def keep_memory() -> None:
    """Have torch ask for huge pages on the CPU, and glibc keep freed memory, unless the user has said otherwise.

    For programs, not for libraries, as it holds for the whole process; to be called before large tensors are made.
    Large tensors that come and go in every step otherwise get their memory anew, 4 KiB at a time, and cleared. The
    price is a process that stays as large as it once was, and somewhat larger than it had to be.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
    if _DECIDING & os.environ.keys() or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for name, (value, parameter, number) in _KEEPING.items():
        libc.mallopt(parameter, number)
        os.environ[name] = value  # for processes that this one starts


@contextmanager
def same_threads_after() -> Iterator[None]:
    """Put the number of torch's threads back at the end."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_threads(step: Callable[[], object]) -> int:
    """Have torch compute on one thread, unless all that it has are clearly faster, or the user has chosen.

    A choice is OMP_NUM_THREADS or MKL_NUM_THREADS in the environment, or a call of `torch.set_num_threads`. For
    programs, as it holds for the whole process; to be called before anything whose last digits matter.

    Args:
        step: A step of the very training that is to follow; taken a few times on one thread and on all, in turns.

    Returns:
        The number of threads.
    """
    threads = torch.get_num_threads()
    if threads == 1 or _user_chose_threads():
        return threads
    times_s: dict[int, list[float]] = {1: [], threads: []}
    began_s = time.perf_counter()
    for taken in range(1 + _MEASURED_STEPS):  # the first is to warm up
        if taken > 1 and time.perf_counter() - began_s > _MEASURED_S:
            break
        for count, spent_s in times_s.items():
            torch.set_num_threads(count)
            started_s = time.perf_counter()
            step()
            spent_s.append(time.perf_counter() - started_s)
    alone_s, together_s = (statistics.median(spent_s[1:]) for spent_s in times_s.values())
    chosen = threads if alone_s > _CLEARLY_FASTER * together_s else 1
    torch.set_num_threads(chosen)
    return chosen


def _user_chose_threads() -> bool:
    """Whether the number of threads is other than what torch itself takes: a thread per processor, or per core."""
    if {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys() or torch.get_num_threads() != _FOUND_THREADS:
        return True
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = (Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in processors)
    cores = {path.read_text() for path in siblings if path.is_file()}
    return _FOUND_THREADS not in (len(processors), len(cores))


def work_clock(device: torch.device) -> Callable[[], float]:
    """The clock that measures work, in seconds.

    Where one thread computes, that is its own time, which other work on the machine does not move.
    """
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if alone else time.perf_counter


def usable_device(name: str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: If there is no such device on this machine.
    """
    counts = {"cpu": 1}
    if torch.accelerator.is_available() and (found := torch.accelerator.current_accelerator()) is not None:
        counts[found.type] = torch.accelerator.device_count()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= counts.get(device.type, 0):
        word = ", ".join(f"{count} of {kind}" for kind, count in counts.items() if kind != "cpu") or "none"
        raise ValueError(
            f"Expected an accelerator of this machine, or cpu, for device={name!r}; accelerators found: {word}. Use "
            f"--device {' or '.join(counts)}."
        )
    return device


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, memory and system; the accelerator, if the device is one."""
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else None
    capabilities = torch.cpu.get_capabilities()
    return {
        "cpu": str(capabilities.get("cpu_name", platform.processor())),
        "bfloat16": bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": memory_gib and round(memory_gib, 1),
        "huge_pages": os.environ.get(HUGE_PAGES) == "1",
        "keeps_memory": all(os.environ.get(name) == value for name, value in STEADY_MEMORY.items()),
        "system": platform.platform(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    packages = ("earlysift", "torch", "transformers", "tokenizers")
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in packages}}


def commit() -> str | None:
    """The commit of the source tree, with ``-dirty`` if it was changed; None outside of a git checkout."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
