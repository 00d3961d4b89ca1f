# SPDX-License-Identifier: Apache-2.0
"""Choosing the device, and what is free on it: the one place that knows their names."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from pidecode.errors import SettingError


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


def usual_dtype(device: torch.device) -> torch.dtype:
    """The number format that suits a device, where none is named."""
    return torch.float32 if device.type in ("cpu", "mps") else torch.bfloat16


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
