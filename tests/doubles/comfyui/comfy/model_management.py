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


total_memory = 64 << 30


def get_total_memory(device: torch.device) -> int:
    return total_memory


calls: list[tuple[str, int]] = []
loaded: list[object] = []


def load_models_gpu(models: list[object], memory_required: int = 0, force_full_load: bool = False) -> None:
    calls.append(("load", int(memory_required)))
    for model in models:
        model.move(model.load_device)  # type: ignore[attr-defined]
        if not any(model is other for other in loaded):
            loaded.append(model)


def free_memory(memory_required: int, device: torch.device) -> None:
    calls.append(("free", int(memory_required)))
    unload_all_models()


def unload_all_models() -> None:
    """What /free does."""
    while loaded:
        model = loaded.pop()
        model.move(model.offload_device)  # type: ignore[attr-defined]
