# SPDX-License-Identifier: Apache-2.0
"""ModelPatcher: a module with a device to run on and a device to wait on."""

from __future__ import annotations

from typing import Any

import torch


class ModelPatcher:
    """Sets attributes on what it moves, as the real one does."""

    def __init__(self, model: Any, load_device: torch.device, offload_device: torch.device, size: int = 0) -> None:
        self.model, self.load_device, self.offload_device, self.size = model, load_device, offload_device, size
        model.device, model.model_loaded_weight_memory = offload_device, 0

    def move(self, device: torch.device) -> None:
        self.model.to(device)
        self.model.device = device
