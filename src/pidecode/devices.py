# SPDX-License-Identifier: Apache-2.0
"""Choosing the device: the one place that knows their names."""

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
