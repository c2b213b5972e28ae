"""What a process runs with, and what a result was measured on: memory, machine, versions, commit."""

import ctypes
import os
import platform
import subprocess
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
