# SPDX-License-Identifier: Apache-2.0
"""Choosing the device, what suits it and what is free on it: the one place that knows their names."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

from pidecode.errors import MissingDependencyError, SettingError

COMPILERS = ("g++", "clang++", "c++")
"""What torch looks for to compile for a processor where the environment names no CXX."""


def pick_device(wanted: str | torch.device | None = None) -> torch.device:
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


def records_graphs(device: torch.device) -> bool:
    """Whether work on the device can be recorded and replayed as a graph: on CUDA, and ROCm under the same name."""
    return device.type == "cuda"


def trains_in_half(device: torch.device) -> bool:
    """Whether training multiplies in bfloat16 there: on CUDA (and ROCm); elsewhere it is slow, or was not tried."""
    return device.type == "cuda"


def usual_dtype(device: torch.device) -> torch.dtype:
    """The number format of weights where none is named: bfloat16 where it pays, float32 elsewhere.

    It pays on accelerators, Apple's excepted, and on processors with matrix units for it (Intel's AMX). Others compute
    it in wider steps, many times slower than float32, or were never tried.
    """
    if device.type == "cpu":
        return torch.bfloat16 if processor_has_matrix_units() else torch.float32
    return torch.float32 if device.type == "mps" else torch.bfloat16


def processor_has_matrix_units() -> bool:
    """Whether the processor multiplies matrices of bfloat16 in units of their own, as far as torch can tell."""
    tell = getattr(torch.cpu, "_is_amx_tile_supported", None)  # newer versions only
    return bool(tell is not None and tell())


def require_compiler(device: torch.device) -> None:
    """Raise MissingDependencyError if torch cannot compile for the device on this machine; says what would mend it.

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
