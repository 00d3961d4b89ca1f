# SPDX-License-Identifier: Apache-2.0
"""The device, and the interrupt, which is raised once."""

from __future__ import annotations

import torch

_interrupted = False


class InterruptProcessingException(Exception):  # noqa: N818 - its published name
    """The user pressed Cancel."""


def interrupt_current_processing(value: bool = True) -> None:
    global _interrupted  # noqa: PLW0603 - as in ComfyUI
    _interrupted = value


def throw_exception_if_processing_interrupted() -> None:
    global _interrupted  # noqa: PLW0603 - as in ComfyUI
    if _interrupted:
        _interrupted = False
        raise InterruptProcessingException


def get_torch_device() -> torch.device:
    return torch.device("cpu")
