# SPDX-License-Identifier: Apache-2.0
"""Nodes that ComfyUI loads in the test in the application: small random models in place of files of gigabytes.

A MODEL is ComfyUI's own: class of the family's configuration, latent format, sampling and patcher; only the network
inside is small. The outputs are those of the loader that the node stands in for.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from comfy import model_base, supported_models
from torch import Tensor

FAMILIES = {
    "flux1": ("Flux", "FLUX"), "flux2": ("Flux2", "FLUX"), "sd3": ("SD3", "FLOW"), "sd_xl": ("SDXL", "EPS"),
    "qwen": ("QwenImage", "FLOW"), "z_image": ("ZImage", "FLOW"),
}  # fmt: skip
"""Beginning of a file's name -> class in supported_models, and how it samples."""


class SmallNetwork(torch.nn.Module):
    """Takes what any network of ComfyUI takes, and pulls the image towards stripes."""

    def __init__(self, dtype: torch.dtype | None = None, **_shape: Any) -> None:
        super().__init__()
        self.dtype = dtype
        self.weight = torch.nn.Parameter(torch.full((1,), 0.5, dtype=dtype), requires_grad=False)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor | None = None, **_others: Any) -> Tensor:
        """A prediction of the noise, which flow matching reads as a velocity."""
        columns = torch.arange(x.shape[-1], device=x.device, dtype=torch.float32)
        return x - self.weight.float() * torch.sin(columns * 0.7).to(x.dtype)


class SmallCLIP:
    """Encodes any text to states of a fixed width."""

    def __init__(self, width: int, tokens: int) -> None:
        self.width, self.tokens = width, tokens

    def tokenize(self, text: str, **_options: Any) -> str:
        """The text itself."""
        return text

    def encode_from_tokens_scheduled(self, tokens: str, **_options: Any) -> list[Any]:
        """A CONDITIONING that depends on the text's length."""
        generator = torch.Generator().manual_seed(len(tokens))
        states = torch.randn(1, self.tokens, self.width, generator=generator)
        return [[states, {"pooled_output": torch.zeros(1, 2816)}]]


def small_model(name: str) -> Any:
    """A MODEL of the family that a file's name begins with."""
    config_name, kind = next(value for start, value in FAMILIES.items() if name.startswith(start))
    config = getattr(supported_models, config_name)({"image_model": name, "adm_in_channels": 0, "hidden_size": 64})
    config.set_inference_dtype(torch.float32, None)
    model = model_base.BaseModel(config, model_base.ModelType[kind], unet_model=SmallNetwork)
    return comfy.model_patcher.ModelPatcher(
        model, comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    )


class StandIn:
    """A loader's inputs: the name of the file that it stands in for, and the width of prompt states."""

    CATEGORY, FUNCTION = "test", "load"
    RETURN_TYPES: tuple[str, ...] = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802 - its published name
        """As the node API V1 asks for them."""
        width = ("INT", {"default": 64, "min": 1, "max": 4096})
        return {"required": {"name": ("STRING", {})}, "optional": {"width": width, "tokens": width}}

    def load(self, name: str, width: int = 64, tokens: int = 16) -> tuple[Any, ...]:
        """One output for each of RETURN_TYPES."""
        clip = SmallCLIP(width, tokens)
        return tuple(clip if kind == "CLIP" else small_model(name) for kind in self.RETURN_TYPES)


class StandInClip(StandIn):
    """For CLIPLoader and DualCLIPLoader."""

    RETURN_TYPES = ("CLIP",)


class StandInCheckpoint(StandIn):
    """For CheckpointLoaderSimple."""

    RETURN_TYPES = ("MODEL", "CLIP")


NODE_CLASS_MAPPINGS = {
    "UNETLoaderStandIn": StandIn,
    "CLIPLoaderStandIn": StandInClip,
    "DualCLIPLoaderStandIn": StandInClip,
    "CheckpointLoaderSimpleStandIn": StandInCheckpoint,
}
