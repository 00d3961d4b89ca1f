# SPDX-License-Identifier: Apache-2.0
"""Device, dtype, free memory and CPU threads.

Only tells; the commands set what it says when they start (`--threads` overrules it), the library never does.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from pidecode.errors import MissingDependencyError, SettingError

COMPILERS = ("g++", "clang++", "c++")
"""What torch looks for to compile for a processor where the environment names no CXX."""


def select_device(wanted: str | torch.device | None = None) -> torch.device:
    """The device asked for, or the best there is: CUDA (also ROCm), then Apple's MPS, then the processor.

    Raises SettingError when the one asked for is not there.
    """
    if wanted is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).splitlines() or [""])[0]
        raise SettingError(
            f"The device {str(wanted)!r} cannot be used here: {first}. `pidecode doctor` lists those that can."
        ) from None
    return device


def supports_cuda_graphs(device: torch.device) -> bool:
    """Whether work on the device can be recorded and replayed as a graph: on CUDA, and ROCm under the same name."""
    return device.type == "cuda"


def supports_bfloat16_training(device: torch.device) -> bool:
    """Whether training multiplies in bfloat16 there: on CUDA (and ROCm); elsewhere it is slow, or was not tried."""
    return device.type == "cuda"


def default_dtype(device: torch.device) -> torch.dtype:
    """The number format of weights where none is named: bfloat16 where it pays, float32 elsewhere.

    It pays on accelerators, Apple's excepted, and on processors with matrix units for it (Intel's AMX). Others compute
    it in wider steps, many times slower than float32, or were never tried.
    """
    if device.type == "cpu":
        return torch.bfloat16 if has_amx() else torch.float32
    return torch.float32 if device.type == "mps" else torch.bfloat16


def has_amx() -> bool:
    """Whether the processor multiplies matrices of bfloat16 in units of their own, as far as torch can tell."""
    tell = getattr(torch.cpu, "_is_amx_tile_supported", None)  # newer versions only
    return bool(tell is not None and tell())


def require_compiler(device: torch.device) -> None:
    """Raise MissingDependencyError if torch cannot compile for the device on this machine; says what would fix it.

    Looks for the tools only; what else can go wrong is told when the first sum is compiled.
    """
    if device.type == "cpu":
        wanted = [os.environ["CXX"]] if "CXX" in os.environ else ["cl"] if sys.platform == "win32" else COMPILERS
        if not any(shutil.which(name) for name in wanted):
            raise MissingDependencyError(
                f"Compiling for a processor needs a C++ compiler, and {' or '.join(wanted)} is not on this machine. "
                "Install one (g++ on Linux, the command line tools of Xcode on a Mac), or run without compiling."
            )
    elif device.type != "mps" and find_spec("triton") is None:
        raise MissingDependencyError(
            f"Compiling for {device.type} needs triton, which comes with GPU builds of torch on Linux (on Windows: "
            "pip install triton-windows). Install it, or run without compiling."
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes that a new job may take on the device; None where neither it nor the system tells.

    What this process's own allocator holds in reserve counts as free, and so does what the system would give back.
    """
    if device.type == "cpu":
        return _free_main_memory()
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        free, _total = module.mem_get_info(device)
        return int(free) + int(module.memory_reserved(device) - module.memory_allocated(device))
    if hasattr(module, "recommended_max_memory"):  # memory shared with the processor: most of it, not all
        return int(module.recommended_max_memory() - module.driver_allocated_memory())
    return _free_main_memory()


def _free_main_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""What a user may have set; the framework reads them when it starts."""


@dataclass(frozen=True, slots=True)
class Threads:
    """A number of threads and where it comes from, in words."""

    count: int
    because: str


def recommended_threads(present: int, environment: Mapping[str, str] = os.environ, system: Path = Path("/")) -> Threads:
    """The number of threads for sums on the processor.

    present: what the framework would use by itself; it is never exceeded.
    system: root of the file system that tells of cores and quotas.
    """
    for name in VARIABLES:
        if environment.get(name):
            return Threads(present, f"{name} is set")
    limits = [Threads(present, "the framework's own choice")]
    if allowed := _allowed():
        cores = physical_cores(allowed, system)
        limits.append(Threads(cores, f"this process may use {cores} cores"))
    if (quota := container_quota(system)) is not None:
        limits.append(Threads(max(1, math.ceil(quota)), f"the container's quota is {quota:g} cores"))
    return min(limits, key=lambda limit: limit.count)


def _allowed() -> list[int]:
    """Logical processors this process may run on; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def physical_cores(logical: Iterable[int], system: Path = Path("/")) -> int:
    """Cores behind some logical processors: two that share one core gain little from two threads of matrix products."""
    cores = set()
    for number in logical:
        file = system / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list"
        cores.add(_read(file) or str(number))
    return max(1, len(cores))


def container_quota(system: Path = Path("/")) -> float | None:
    """Cores' worth of time that the control group grants this process (Linux); None without a limit."""
    group = next(
        (line[3:] for line in (_read(system / "proc/self/cgroup") or "").splitlines() if line[:3] == "0::"), ""
    )
    top = system / "sys/fs/cgroup"
    folder = top / group.strip("/")
    found = []
    for place in (folder, *folder.parents):
        if not place.is_relative_to(top):
            break
        quota, _, period = (_read(place / "cpu.max") or "max").partition(" ")
        if quota != "max":
            found.append(int(quota) / int(period))
    older = _read(top / "cpu/cpu.cfs_quota_us"), _read(top / "cpu/cpu.cfs_period_us")
    if older[0] and older[1] and int(older[0]) > 0:
        found.append(int(older[0]) / int(older[1]))
    return min(found, default=None)


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
