# SPDX-License-Identifier: Apache-2.0
"""Selection of device and dtype; free memory; number of CPU threads.

Nothing here changes global state: the commands set the number of threads (`--threads`), the library never does.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from pidecode.errors import MissingDependencyError, SettingError


def select_device(name: str | torch.device | None = None) -> torch.device:
    """A torch device by name; None selects the best one: CUDA (also ROCm), then MPS, then the CPU.

    Raises:
        SettingError: The device is not available.
    """
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = (str(error).splitlines() or [""])[0]
        if first.startswith("Expected one of"):
            first = "names are cpu, cuda, cuda:1, mps, xpu"
        raise SettingError(
            f"The device {str(name)!r} cannot be used here: {first}. `pidecode doctor` lists those that can."
        ) from None
    return device


def supports_cuda_graphs(device: torch.device) -> bool:
    """Whether the device captures and replays CUDA graphs (CUDA and ROCm)."""
    return device.type == "cuda"


def copies_from_pinned_memory(device: torch.device) -> bool:
    """Whether copies to the device run beside other work where they start in pinned memory (CUDA and ROCm)."""
    return device.type == "cuda"


def default_dtype(device: torch.device) -> torch.dtype:
    """Default dtype of weights: bfloat16 on GPUs other than Apple's and on CPUs that multiply it, float32 elsewhere.

    Other CPUs emulate bfloat16, which is many times slower than float32.
    """
    if device.type == "cpu":
        # AMX or AVX512-BF16, as far as torch reports them: newer versions do.
        names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        multiplies = any(getattr(torch.cpu, name, lambda: False)() for name in names)
        return torch.bfloat16 if multiplies else torch.float32
    return torch.float32 if device.type == "mps" else torch.bfloat16


def require_compiler(device: torch.device) -> None:
    """Check that the tools torch.compile needs to compile for a device are installed."""
    if device.type == "cpu":
        usual = ["cl"] if sys.platform == "win32" else ["g++", "clang++", "c++"]  # that torch looks for
        wanted = [os.environ["CXX"]] if "CXX" in os.environ else usual
        if not any(map(shutil.which, wanted)):
            raise MissingDependencyError(
                f"Compiling for the CPU needs a C++ compiler, and {' or '.join(wanted)} is not on this machine. "
                "Install one (g++ on Linux, the command line tools of Xcode on a Mac), or run without compiling."
            )
    elif device.type != "mps" and find_spec("triton") is None:
        raise MissingDependencyError(
            f"Compiling for {device.type} needs triton, which comes with GPU builds of torch on Linux (on Windows: "
            "pip install triton-windows). Install it, or run without compiling."
        )


def free_memory(device: torch.device) -> int | None:
    """Bytes free on a device, including what this process's allocator reserved and did not use; None if unknown."""
    if device.type == "cpu":
        return _free_host_memory()
    module = torch.get_device_module(device)
    if hasattr(module, "mem_get_info"):
        free, _total = module.mem_get_info(device)
        return int(free) + int(module.memory_reserved(device) - module.memory_allocated(device))
    if hasattr(module, "recommended_max_memory"):  # unified memory, most of which may be used
        return int(module.recommended_max_memory() - module.driver_allocated_memory())
    return _free_host_memory()


def empty_cache(device: torch.device) -> None:
    """Give memory that no tensor uses any more back to a device."""
    module = getattr(torch, device.type, None)
    if module is not None and hasattr(module, "empty_cache"):
        module.empty_cache()


def resident_memory() -> int | None:
    """Bytes of main memory this process holds, or None where the system does not report it."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _free_host_memory(system: Path = Path("/")) -> int | None:
    """Main memory that may still be taken: the least of what system, containers and this process's own limit leave."""
    found = _free_in_containers(system)
    if available := re.search(r"^MemAvailable: *(\d+)", _read(system / "proc/meminfo") or "", re.MULTILINE):
        found.append(int(available[1]) * 1024)
    else:
        with suppress(AttributeError, OSError, ValueError):
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with suppress(ImportError, OSError, AttributeError):  # `ulimit -v`, which Windows does not have
        import resource

        limit, _ = resource.getrlimit(resource.RLIMIT_AS)
        pages = _read(system / "proc/self/statm")
        if limit != resource.RLIM_INFINITY and pages:
            found.append(max(0, limit - int(pages.split()[0]) * resource.getpagesize()))
    return min(found, default=None)


def _free_in_containers(system: Path) -> list[int]:
    """What the memory limits of this process's control groups leave; files in the cache make way."""
    found = []
    for place in _control_groups(system, "memory"):
        limit = _read(place / "memory.max") or _read(place / "memory.limit_in_bytes") or "max"
        used = _read(place / "memory.current") or _read(place / "memory.usage_in_bytes")
        if limit != "max" and used:
            cached = re.findall(r"^(?:total_)?inactive_file (\d+)$", _read(place / "memory.stat") or "", re.MULTILINE)
            found.append(max(0, int(limit) - int(used) + max(map(int, cached), default=0)))
    return found


@dataclass(frozen=True, slots=True)
class ThreadCount:
    """A number of threads and the reason for it."""

    count: int
    reason: str


def recommended_threads(
    present: int, environment: Mapping[str, str] = os.environ, system: Path = Path("/")
) -> ThreadCount:
    """Number of CPU threads: the smallest of torch's default, the physical cores and the container's CPU quota.

    Args:
        present: What torch uses by default; never exceeded.
        environment: Environment variables.
        system: Root of the file system with /proc and /sys.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):  # torch reads them at import
        if environment.get(name):
            return ThreadCount(present, f"{name} is set")
    limits = [ThreadCount(present, "the default of torch")]
    if hasattr(os, "sched_getaffinity"):  # not on Macs and Windows
        cores = physical_cores(os.sched_getaffinity(0), system)
        limits.append(ThreadCount(cores, f"this process may use {cores} cores"))
    if (quota := container_quota(system)) is not None:
        limits.append(ThreadCount(max(1, math.ceil(quota)), f"the container's quota is {quota:g} cores"))
    return min(limits, key=lambda limit: limit.count)


def physical_cores(logical: Iterable[int], system: Path = Path("/")) -> int:
    """Number of physical cores behind logical CPUs; hyperthreads add little to matrix products."""
    siblings = "sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    return max(1, len({_read(system / siblings.format(number)) or str(number) for number in logical}))


def container_quota(system: Path = Path("/")) -> float | None:
    """CPU quota of the control groups in cores (Linux); None without a limit."""
    found = []
    for place in _control_groups(system, "cpu"):
        quota, _, period = (_read(place / "cpu.max") or "max").partition(" ")
        older = _read(place / "cpu.cfs_quota_us"), _read(place / "cpu.cfs_period_us")
        if older[0] and older[1] and int(older[0]) > 0:
            quota, period = older[0], older[1]
        if quota != "max":
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _control_groups(system: Path, controller: str) -> Iterator[Path]:
    """Folders of the control group of this process and of those above it, in both forms that Linux has."""
    lines = (line.split(":", 2) for line in (_read(system / "proc/self/cgroup") or "").splitlines())
    groups = {names: group for _, joined, group in lines for names in joined.split(",")}
    top = system / "sys/fs/cgroup"
    for root, name in ((top, ""), (top / controller, controller)):
        folder = root / groups.get(name, "").strip("/")
        yield from (place for place in (folder, *folder.parents) if place.is_relative_to(root))


def _read(file: Path) -> str | None:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return None
