# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: put into a network by peft, trained in place of its weights, saved as a small file.

`pidecode.weights.lora` applies such a file without peft.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pidecode.errors import MissingDependencyError, SettingError
from pidecode.model.network import PixelNet
from pidecode.training.settings import Adapt

_PLACES: Mapping[str, str] = {
    "attention": r"patch_blocks\.\d+\.attn\.(qkv_x|proj_x)",
    "mlp": r"patch_blocks\.\d+\.mlp_x\.(w1|w2|w3)",
    "pixel_mlp": r"pixel_blocks\.\d+\.mlp\.(fc1|fc2)",
}
"""Linear layers each part of a network adapts."""

_NAME = "default"  # peft's own name for a sole adapter


def inject(net: PixelNet, settings: Adapt, seed: int) -> None:
    """Add adapters that change nothing yet, and leave only them to be trained.

    Raises MissingDependencyError without peft, SettingError where the network has none of the chosen parts.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise MissingDependencyError(
            "Low-rank adapters need peft; install it with: pip install 'pidecode[train]'."
        ) from None
    pattern = "|".join(_PLACES[part] for part in settings.where)
    if not settings.where:
        raise SettingError("adapt.where is empty; name at least one part to adapt.")
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha or settings.rank, target_modules=f"(.*\\.)?({pattern})"
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, net)
    net.plain = True
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(".lora_" in name)


def adapter_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of an adapted network's tensors, the adapters': `<layer>.lora_A.weight` and `<layer>.lora_B.weight`."""
    middle = f".{_NAME}."
    return {name.replace(middle, "."): tensor for name, tensor in tensors.items() if ".lora_" in name}


def base_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of an adapted network's tensors, the network's own, under their own names."""
    return {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items() if ".lora_" not in name}
