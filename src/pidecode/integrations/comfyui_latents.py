# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's LATENT, IMAGE and CONDITIONING as pidecode's latents, images and text states, and back.

Everything is read from the objects themselves, so this module is importable without ComfyUI.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pidecode.decoder import PixelDecoder
from pidecode.encoders.text import load_prompt_embeds
from pidecode.errors import LatentError, SettingError
from pidecode.latents.latent import Latent
from pidecode.options import MAX_SIGMA
from pidecode.registry.configs import PiDConfig
from pidecode.registry.spaces import LatentSpace, get_space, recommended_stop

ROUNDING = 1e-6
"""What a noise level may exceed its bound by: sigmas are float32."""

SPACE_BY_FORMAT: Mapping[str, str] = {
    "Flux": "flux",
    "SD3": "sd3",
    "SDXL": "sdxl",
    "Flux2": "flux2",
    "Wan21": "qwenimage",  # Qwen-Image's VAE has the same statistics, and ComfyUI has one class for both
}
"""Name of ComfyUI's latent format -> latent space."""


def model_space(model: Any) -> LatentSpace:
    """The latent space of a MODEL, by its latent format.

    Raises:
        SettingError: PiD has no decoder for that format.
    """
    name = type(model.model.latent_format).__name__
    if name not in SPACE_BY_FORMAT:
        raise SettingError(
            f"The connected MODEL works in ComfyUI's latent format {name}, for which there is no decoder; there are "
            f"decoders for {', '.join(SPACE_BY_FORMAT)}."
        )
    return get_space(SPACE_BY_FORMAT[name])


def to_latent(samples: Mapping[str, Any], space: LatentSpace, *, model: Any = None, sigma: float = 0.0) -> Latent:
    """A LATENT as a normalized `Latent` of `space`.

    Args:
        samples: ComfyUI's LATENT; its tensor `[B, C, h, w]` (or `[B, C, 1, h, w]`) is scaled as the VAE has it.
        space: The decoder's latent space.
        model: The MODEL that made it, whose `process_latent_in` normalizes; without one the registry's constants do.
        sigma: Noise that an early stop left in it, in the model's own units (0 to 1 for flow matching, 0 to about 14.6
            for SDXL); needs the model.

    Raises:
        SettingError: Model, space and sigma do not fit each other.
        LatentError: The tensor has a wrong shape or type.
    """
    tensor = _drop_frame_axis(samples["samples"]).float()
    if model is None:
        if sigma:
            raise SettingError(
                f"latent_sigma is {sigma:g}: to decode a latent that holds noise, connect the MODEL that made it."
            )
        # ComfyUI's LATENT of FLUX.2 is normalized already; all others are raw.
        return Latent(tensor, space.name) if space.name == "flux2" else Latent.from_raw(tensor, space.name)
    found = model_space(model)
    if found.name != space.name:
        raise SettingError(
            f"The decoder is for space {space.name}, and the connected MODEL works in {found.name}; load the decoder "
            f"for {found.name}."
        )
    if space.name == "qwenimage":  # its latent format has an axis for the frames of a video
        tensor = tensor.unsqueeze(2)
    normalized = _drop_frame_axis(model.model.process_latent_in(tensor)).float()
    if not sigma:
        return Latent(normalized, space.name)
    level = noise_level(model, space, sigma)
    state = _sampler_state(normalized, model, sigma)
    flow = _is_flow(model)
    # `(1 - s) z + s e` or `z + s e`: both are the space's own form up to a factor.
    if space.noise_parametrization == "flow":
        return Latent(state if flow else state * (1 - level), space.name, level)
    return (
        Latent.from_euler(state / (1 - sigma), sigma / (1 - sigma), space.name)
        if flow
        else Latent.from_euler(state, sigma, space.name)
    )


def _is_flow(model: Any) -> bool:
    """Whether the MODEL samples by flow matching; else noise is added on top, as in Stable Diffusion."""
    sampling = model.get_model_object("model_sampling")
    names = {kind.__name__ for kind in type(sampling).__mro__}
    if "CONST" in names:
        return True
    if "EPS" in names:
        return False
    raise SettingError(
        f"The connected MODEL samples as {type(sampling).__name__}, whose noise is not known here; let its sampler "
        "run to the end, and set latent_sigma to 0."
    )


def noise_level(model: Any, space: LatentSpace, sigma: float) -> float:
    """A sigma of the MODEL's sampler as the decoder has it, in [0, 1].

    Raises:
        SettingError: The sampler's noise is not known, or sigma is not one of it.
    """
    if sigma <= 0:
        return 0.0
    ratio = sigma  # of noise to image
    if _is_flow(model):
        if sigma > 1:
            raise SettingError(f"latent_sigma is {sigma:g}; a flow-matching MODEL stops between 0 and 1.")
        ratio = math.inf if sigma == 1 else sigma / (1 - sigma)
    if math.isinf(ratio):
        return 1.0
    return ratio / (1 + ratio) if space.noise_parametrization == "flow" else ratio / math.sqrt(1 + ratio * ratio)


def _drop_frame_axis(tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise LatentError(f"The LATENT holds {type(tensor).__name__} instead of a tensor.")
    if tensor.ndim == 5:
        if tensor.shape[2] != 1:
            raise LatentError(f"The LATENT is a video of {tensor.shape[2]} frames; pick one, PiD decodes images.")
        return tensor[:, :, 0]
    return tensor


def _sampler_state(normalized: Tensor, model: Any, sigma: float) -> Tensor:
    """What the sampler held when it stopped.

    Where ComfyUI's sampling ends at sigma > 0, it divides a flow-matching model's latent by (1 - sigma). Adding no
    noise at that sigma, as the next sampler would begin, undoes exactly that.
    """
    sampling = model.get_model_object("model_sampling")
    state: Tensor = sampling.noise_scaling(
        torch.tensor([sigma], device=normalized.device), torch.zeros_like(normalized), normalized
    )
    return state.float()


def alpha_of(image: Tensor, mask: Tensor | None) -> Tensor:
    """The alpha channel `[B, H, W]` in [0, 1] of an IMAGE `[B, H, W, 3 or 4]`, or of its MASK, which is 1 - alpha.

    Raises:
        SettingError: The MASK is not of the IMAGE's size.
    """
    batch, height, width = image.shape[:3]
    if mask is None:
        return image[..., 3].float() if image.shape[-1] == 4 else torch.ones(batch, height, width)
    mask = mask if mask.ndim == 3 else mask[None]
    if mask.shape[1:] == (64, 64) and (height, width) != (64, 64) and not mask.any():
        return torch.ones(batch, height, width)  # what Load Image gives for an image without transparency
    if mask.shape[1:] != (height, width) or len(mask) not in (1, batch):
        raise SettingError(f"The MASK is {list(mask.shape)} for an IMAGE of {[batch, height, width]}; connect its own.")
    return (1 - mask.float()).expand(batch, -1, -1)


def tensor_from_image(image: Tensor) -> Tensor:
    """IMAGE `[B, H, W, 3 or 4]` in [0, 1] to `[B, 3, H, W]` in [-1, 1], its colors alone.

    Raises:
        SettingError: The tensor has another shape.
    """
    if image.ndim != 4 or image.shape[-1] not in (3, 4):
        raise SettingError(f"An IMAGE is [B, H, W, 3]; got {list(image.shape)}.")
    pixels = image[..., :3].float().movedim(-1, 1)
    return (pixels * 2 - 1).clamp(-1, 1)


def image_from_tensor(pixels: Tensor) -> Tensor:
    """`[B, 3, H, W]` in [-1, 1] to IMAGE: `[B, H, W, 3]` in [0, 1], float32, on the CPU."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1).movedim(1, -1).contiguous().cpu()


def prompt_embeds_from_conditioning(conditioning: Sequence[Any], decoder: PixelDecoder) -> Tensor:
    """The text states `[B, tokens, text_dim]` in a CONDITIONING of Gemma-2.

    Raises:
        SettingError: The decoder reads no text, or the CONDITIONING is combined or of another text encoder.
    """
    config = decoder.net.config
    if not decoder.reads_text or not isinstance(config, PiDConfig):
        raise SettingError(f"{decoder.name} reads no text, so CONDITIONING cannot act; disconnect it.")
    if len(conditioning) != 1:
        raise SettingError(f"The CONDITIONING has {len(conditioning)} parts; connect a plain one, not combined.")
    states = conditioning[0][0]
    if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[-1] != config.text_dim:
        shape = list(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise SettingError(
            f"The CONDITIONING is {shape}; this decoder reads Gemma-2's states, {config.text_dim} wide. Encode the "
            "prompt with that text encoder (CLIP type pixeldit), or write it as text."
        )
    return load_prompt_embeds(states.float(), length=config.text_length, width=config.text_dim)


def early_stop_step(sigmas: Tensor, model: Any, steps_left: int | None = None) -> int:
    """The step, counted from 1, to end sampling after.

    Args:
        sigmas: The whole schedule.
        model: The MODEL that samples.
        steps_left: Steps to leave out; by default what PiD's authors recommend for the model, in proportion.

    Raises:
        SettingError: No step would be left, more noise would be left than PiD was trained on, no recommendation is
            known, or PiD has no decoder for the model.
    """
    num_steps, space = len(sigmas) - 1, model_space(model)
    if num_steps < 1:
        raise SettingError("There are no sigmas to cut; connect a scheduler.")
    if steps_left is None:
        stop = recommended_stop(_model_classes(model), num_steps)
    elif 0 <= steps_left < num_steps:
        stop = num_steps - steps_left
    else:
        raise SettingError(f"steps_left is {steps_left}, and there are {num_steps} steps; leave 0 to {num_steps - 1}.")
    levels = [noise_level(model, space, float(sigma)) for sigma in sigmas]
    if levels[stop] > MAX_SIGMA + ROUNDING:
        earliest = next((step for step in range(stop, num_steps) if levels[step] <= MAX_SIGMA + ROUNDING), num_steps)
        raise SettingError(
            f"After step {stop} of {num_steps} the latent's noise level is {levels[stop]:.2f}; PiD was trained up to "
            f"{MAX_SIGMA}. Set steps_left to {num_steps - earliest} or less."
        )
    return stop


def _model_classes(model: Any) -> list[str]:
    """Names of the classes of a MODEL's configuration, its own first: Z-Image has FLUX's latent format."""
    config = getattr(model.model, "model_config", None)
    names = [kind.__name__ for kind in type(config).__mro__ if kind is not object]
    return names if config is not None else [type(model.model).__name__]
