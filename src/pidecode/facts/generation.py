# SPDX-License-Identifier: Apache-2.0
"""What each image model is called with by default, where its weights are, and which sizes it draws well."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from pidecode.errors import SizeError
from pidecode.facts.spaces import IMAGE_MODELS, ImageModel, get_image_model, get_space


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """How `pidecode generate` calls one image model.

    repository: hub repository of the diffusers pipeline.
    arguments: of the pipeline's call, beside prompt, size, steps and generator.
    """

    repository: str
    arguments: Mapping[str, float | int | str] = field(default_factory=dict)


_LONG: dict[str, float | int | str] = {"max_sequence_length": 512}
_QWEN: dict[str, float | int | str] = {"true_cfg_scale": 4.0, "negative_prompt": " ", **_LONG}

_GENERATION_ROWS: tuple[tuple[str, str, dict[str, float | int | str]], ...] = (
    ("flux", "black-forest-labs/FLUX.1-dev", {"guidance_scale": 3.5, **_LONG}),
    ("flux2", "black-forest-labs/FLUX.2-dev", {"guidance_scale": 4.0, **_LONG}),
    ("flux2-klein-4b", "black-forest-labs/FLUX.2-klein-4B", {"guidance_scale": 1.0, **_LONG}),
    ("flux2-klein-9b", "black-forest-labs/FLUX.2-klein-9B", {"guidance_scale": 1.0, **_LONG}),
    ("sd3", "stabilityai/stable-diffusion-3-medium-diffusers", {"guidance_scale": 4.0}),
    ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0", {"guidance_scale": 7.5}),
    ("qwenimage", "Qwen/Qwen-Image", _QWEN),
    ("qwenimage-2512", "Qwen/Qwen-Image-2512", _QWEN),
    ("zimage", "Tongyi-MAI/Z-Image", {"guidance_scale": 5.0, **_LONG}),
    ("zimage-turbo", "Tongyi-MAI/Z-Image-Turbo", {"guidance_scale": 0.0, **_LONG}),
)
GENERATION: Mapping[str, GenerationDefaults] = MappingProxyType(
    {
        name: GenerationDefaults(repository=repository, arguments=MappingProxyType(arguments))
        for name, repository, arguments in _GENERATION_ROWS
    }
)
"""Defaults by image model, as the models' own cards and the official demo give them."""

assert set(GENERATION) == set(IMAGE_MODELS)


def diffusion_size(model: str | ImageModel, width: int, height: int) -> tuple[int, int]:
    """Width and height the image model runs at for a picture of `width` x `height` pixels from PiD.

    Raises SizeError, naming the nearest size that fits, unless both sides are multiples of 16 times the scale.
    """
    row = get_image_model(model) if isinstance(model, str) else model
    scale = get_space(row.space).scale
    unit = 16 * scale
    if width < unit or height < unit or width % unit or height % unit:
        near = [max(unit, round(side / unit) * unit) for side in (width, height)]
        raise SizeError(
            f"{row.name} cannot draw what becomes {width}x{height}: both sides must be multiples of {unit}. The "
            f"nearest size that fits is {near[0]}x{near[1]}."
        )
    return width // scale, height // scale
