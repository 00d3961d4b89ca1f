# SPDX-License-Identifier: Apache-2.0
"""Choosing the device, and what suits it: the one place that knows their names."""

from __future__ import annotations

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


def records_graphs(device: torch.device) -> bool:
    """Whether work on the device can be recorded and replayed as a graph: on CUDA, and ROCm under the same name."""
    return device.type == "cuda"


def default_dtype(device: torch.device) -> torch.dtype:
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
