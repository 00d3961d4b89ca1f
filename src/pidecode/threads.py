# SPDX-License-Identifier: Apache-2.0
"""How many threads suit a processor: no more than its free cores, and never other than the user said.

Only tells; the commands set what it says when they start (`--threads` overrules it), the library never does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
"""What a user may have set; the framework reads them when it starts."""


@dataclass(frozen=True, slots=True)
class Threads:
    """A number of threads and where it comes from, in words."""

    count: int
    because: str


def suitable_threads(present: int, environment: Mapping[str, str] = os.environ, system: Path = Path("/")) -> Threads:
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
