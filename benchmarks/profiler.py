# SPDX-License-Identifier: Apache-2.0
"""Where the time of a decode goes: shares by kind of work, and the operations one by one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.speed import Benchmark, Trial

KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("attention", "flash", "sdpa", "fmha"),
    "convolutions": ("conv",),
    "matrix products": ("::mm", "_mm", "addmm", "bmm", "linear", "matmul"),
    "copies": ("copy", "::cat", "contiguous", "clone"),
}
"""Kinds of work by what names of operations contain, tried in this order."""
REST = "elementwise"


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Where the time of one decode goes."""

    network: str
    size: tuple[int, int]
    dtype: str
    shares: dict[str, float]
    """Of the device's time, by kind of work; they add up to 1."""
    table: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    def as_text(self) -> str:
        """The shares and the table."""
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in sorted(self.shares.items(), key=lambda s: -s[1]))
        return f"{self.network} {self.size[0]}x{self.size[1]} {self.dtype}: {shares}\n{self.table}"


def kind_of(operation: str) -> str:
    """The kind of work an operation is, by its name."""
    name = operation.lower()
    return next((kind for kind, signs in KINDS.items() if any(sign in name for sign in signs)), REST)


def profile(trial: Trial, rows: int = 15) -> Profile:
    """Run a decode to warm up and one under torch's profiler."""
    bench = Benchmark(trial)
    bench.decode()
    with torch.profiler.profile() as record:
        bench.decode()
    on_host = trial.device.type == "cpu"
    times = dict.fromkeys((*KINDS, REST), 0.0)
    averages = record.key_averages()
    for row in averages:
        if row.device_type.name == "CPU":  # kernels have rows of their own, and their time is their operation's too
            times[kind_of(row.key)] += row.self_cpu_time_total if on_host else row.self_device_time_total
    whole = sum(times.values()) or 1.0
    order = "self_cpu_time_total" if on_host else "self_device_time_total"
    return Profile(
        network=trial.network,
        size=trial.size,
        dtype=str(trial.dtype).removeprefix("torch."),
        shares={kind: time / whole for kind, time in times.items()},
        table=str(averages.table(sort_by=order, row_limit=rows)),
    )
