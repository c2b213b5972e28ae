"""The environment of a process (memory, threads, device) and the machine of a result."""

import ctypes
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"
"""Environment variable that torch reads when it first allocates a large tensor."""
# Variable that glibc reads at process start: (value, parameter and value of `mallopt`). No mmap, no trimming.
_MALLOC = {"MALLOC_MMAP_MAX_": ("0", -4, 0), "MALLOC_TRIM_THRESHOLD_": (str(2**63 - 1), -1, -1)}
_USER_MALLOC = {*_MALLOC, "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"}  # choices of the user
STEADY_MEMORY: dict[str, str] = {HUGE_PAGES: "1"} | {name: value for name, (value, *_) in _MALLOC.items()}
"""Environment variables with the effect of `keep_memory`, for programs that are started with them."""

# On two idle cores the second thread makes the demo's model 1.4 times faster. On busy ones it makes it fourteen times
# slower than one thread, because every operation waits for the thread that has no core.
_CLEARLY_FASTER = 1.7
_MEASURED_STEPS, _MEASURED_S = 5, 3.0
_INITIAL_THREADS = torch.get_num_threads()


def keep_memory() -> None:
    """Make torch use huge pages on the CPU and glibc keep freed memory, unless the user has set other values.

    For programs, not for libraries: it affects the whole process. Call it before large tensors are allocated. Otherwise
    large tensors that every step allocates and frees get new, cleared memory each time, in pages of 4 KiB. The price is
    that the process never shrinks and is somewhat larger than necessary.
    """
    os.environ.setdefault(HUGE_PAGES, "1")
    if _USER_MALLOC & os.environ.keys() or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    for name, (value, parameter, number) in _MALLOC.items():
        libc.mallopt(parameter, number)
        os.environ[name] = value  # for child processes


@contextmanager
def same_threads_after() -> Iterator[None]:
    """Restore the number of torch's threads at the end."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def choose_threads(step: Callable[[], object]) -> int:
    """Make torch compute on one thread, unless all of its threads are clearly faster or the user has chosen a number.

    The user chooses by OMP_NUM_THREADS or MKL_NUM_THREADS, or by `torch.set_num_threads`. For programs, not for
    libraries: it affects the whole process. Call it before any result that must be reproducible to the last digit.

    Args:
        step: A step of the training that follows; called a few times on one thread and on all threads, in turns.

    Returns:
        The number of threads.
    """
    threads = torch.get_num_threads()
    if threads == 1 or _user_chose_threads():
        return threads
    times_s: dict[int, list[float]] = {1: [], threads: []}
    began_s = time.perf_counter()
    for steps in range(1 + _MEASURED_STEPS):  # the first is a warm-up
        if steps > 1 and time.perf_counter() - began_s > _MEASURED_S:
            break
        for count, spent_s in times_s.items():
            torch.set_num_threads(count)
            started_s = time.perf_counter()
            step()
            spent_s.append(time.perf_counter() - started_s)
    one_thread_s, all_threads_s = (statistics.median(spent_s[1:]) for spent_s in times_s.values())
    chosen = threads if one_thread_s > _CLEARLY_FASTER * all_threads_s else 1
    torch.set_num_threads(chosen)
    return chosen


def _user_chose_threads() -> bool:
    """Whether the number of threads differs from torch's own choice: one per processor, or one per core."""
    if {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys() or torch.get_num_threads() != _INITIAL_THREADS:
        return True
    processors = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = (Path(f"/sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list") for n in processors)
    cores = {path.read_text() for path in siblings if path.is_file()}
    return _INITIAL_THREADS not in (len(processors), len(cores))


def work_clock(device: torch.device) -> Callable[[], float]:
    """The clock to measure work with, in seconds.

    With one thread on the CPU that is the time of the process, which other work on the machine does not affect.
    """
    single = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time if single else time.perf_counter


def usable_device(name: str) -> torch.device:
    """The device of this name.

    Raises:
        ValueError: If this machine has no such device.
    """
    counts = {"cpu": 1}
    if torch.accelerator.is_available() and (present := torch.accelerator.current_accelerator()) is not None:
        counts[present.type] = torch.accelerator.device_count()
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.index or 0) >= counts.get(device.type, 0):
        found = ", ".join(f"{count} of {kind}" for kind, count in counts.items() if kind != "cpu") or "none"
        raise ValueError(
            f"Expected an accelerator of this machine, or cpu, for device={name!r}; accelerators found: {found}. Use "
            f"--device {' or '.join(counts)}."
        )
    return device


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, cores, threads, memory and operating system; the accelerator if the device is one."""
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
