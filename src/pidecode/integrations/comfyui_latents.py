# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's tensors and ours: LATENT to the trained frame, IMAGE to [-1, 1], CONDITIONING to prompt states.

Everything is taken from the objects themselves, so that this file needs nothing of ComfyUI to be imported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pidecode.encoders.text import load_prompt_embeds
from pidecode.errors import LatentError, SettingError
from pidecode.latents.latent import Latent
from pidecode.models.pid.network import PiDNet
from pidecode.registry.spaces import IMAGE_MODELS, LatentSpace, get_space

SPACE_OF_FORMAT: Mapping[str, str] = {
    "Flux": "flux",
    "SD3": "sd3",
    "SDXL": "sdxl",
    "Flux2": "flux2",
    "Wan21": "qwenimage",  # Qwen-Image shares the autoencoder's numbers, and ComfyUI the class
}
"""Name of ComfyUI's latent format -> latent space."""


def space_of_model(model: Any) -> LatentSpace:
    """The latent space of a MODEL, by its latent format. Raises SettingError for families PiD has no decoder for."""
    name = type(model.model.latent_format).__name__
    if name not in SPACE_OF_FORMAT:
        raise SettingError(
            f"The connected MODEL works in ComfyUI's latent format {name}, for which there is no decoder; there are "
            f"decoders for {', '.join(SPACE_OF_FORMAT)}."
        )
    return get_space(SPACE_OF_FORMAT[name])


def to_latent(samples: Mapping[str, Any], space: LatentSpace, *, model: Any = None, sigma: float = 0.0) -> Latent:
    """A LATENT as a typed latent of `space`: normalized, and with its noise in the trained frame.

    samples: ComfyUI's LATENT; its tensor `[B, C, h, w]` (or `[B, C, 1, h, w]`) is in the autoencoder's frame.
    model: the MODEL that made it. Its own `process_in` normalizes; without one the space's facts do.
    sigma: noise that a sampler stopped early left in it, in the model's own terms (0 to 1 for flow matching,
        0 to about 14.6 for SDXL); needs the model.

    Raises SettingError where model, space and sigma do not go together, LatentError for a wrong tensor.
    """
    tensor = _one_frame(samples["samples"]).float()
    if model is None:
        if sigma:
            raise SettingError(
                f"sigma is {sigma:g}: to decode a latent that still holds noise, connect the MODEL that made it."
            )
        # ComfyUI hands FLUX.2's latent around normalized; the others as their autoencoder has them.
        return Latent(tensor, space.name) if space.name == "flux2" else Latent.from_raw(tensor, space.name)
    theirs = space_of_model(model)
    if theirs.name != space.name:
        raise SettingError(
            f"The decoder is for space {space.name}, and the connected MODEL works in {theirs.name}; load the decoder "
            f"for {theirs.name}."
        )
    with_frame = samples["samples"] if space.name == "qwenimage" and samples["samples"].ndim == 5 else tensor
    if space.name == "qwenimage" and with_frame.ndim == 4:
        with_frame = with_frame.unsqueeze(2)  # its format counts frames of a video
    normalized = _one_frame(model.model.process_latent_in(with_frame.float())).float()
    if not sigma:
        return Latent(normalized, space.name)
    state = _sampler_state(normalized, model, sigma)
    if space.noise_parametrization == "variance_preserving":
        return Latent.from_euler(state, sigma, space.name)
    if not 0 < sigma < 1:
        raise SettingError(f"sigma is {sigma:g}; a flow-matching MODEL stops between 0 and 1.")
    return Latent(state, space.name, sigma)


def _one_frame(tensor: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise LatentError(f"The LATENT holds {type(tensor).__name__} instead of a tensor.")
    if tensor.ndim == 5:
        if tensor.shape[2] != 1:
            raise LatentError(f"The LATENT is a video of {tensor.shape[2]} frames; pick one, PiD decodes images.")
        return tensor[:, :, 0]
    return tensor


def _sampler_state(normalized: Tensor, model: Any, sigma: float) -> Tensor:
    """What the sampler held when it stopped.

    When ComfyUI's sampling ends at sigma > 0, a flow-matching model's latent is divided by (1 - sigma) on its way
    out. Adding no noise at that sigma, which is how the next sampler would go on, undoes exactly that.
    """
    sampling = model.get_model_object("model_sampling")
    state: Tensor = sampling.noise_scaling(
        torch.tensor([sigma], device=normalized.device), torch.zeros_like(normalized), normalized
    )
    return state.float()


def to_pixels(image: Tensor) -> Tensor:
    """IMAGE `[B, H, W, 3 or 4]` in [0, 1] to `[B, 3, H, W]` in [-1, 1], transparency laid on white."""
    if image.ndim != 4 or image.shape[-1] not in (3, 4):
        raise SettingError(f"An IMAGE is [B, H, W, 3]; got {list(image.shape)}.")
    pixels = image.float().movedim(-1, 1)
    if pixels.shape[1] == 4:
        color, alpha = pixels[:, :3], pixels[:, 3:]
        pixels = color * alpha + (1 - alpha)
    return (pixels * 2 - 1).clamp(-1, 1)


def to_image(pixels: Tensor) -> Tensor:
    """`[B, 3, H, W]` in [-1, 1] to IMAGE: `[B, H, W, 3]` float32 in [0, 1] on the processor."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1).movedim(1, -1).contiguous().cpu()


def prompt_of(net: PiDNet, text: str, conditioning: Sequence[Any] | None) -> dict[str, Any]:
    """The `prompt` or `prompt_embeds` of a decode, from a text or from CONDITIONING (Gemma-2's states).

    A network without a text stream takes neither. Raises SettingError when both are given, or when the
    CONDITIONING comes from another text encoder.
    """
    text = text.strip()
    if conditioning is None:
        if text and not net.config.has_text:
            raise SettingError("This decoder has no text stream, so a prompt cannot act; leave it empty.")
        return {"prompt": text} if net.config.has_text else {}
    if text:
        raise SettingError("There are a prompt and a CONDITIONING; give one of them.")
    if not net.config.has_text:
        raise SettingError("This decoder has no text stream, so CONDITIONING cannot act; disconnect it.")
    if len(conditioning) != 1:
        raise SettingError(f"The CONDITIONING has {len(conditioning)} parts; connect a plain one, not combined.")
    states = conditioning[0][0]
    if not isinstance(states, Tensor) or states.ndim != 3 or states.shape[-1] != net.config.text_dim:
        shape = list(states.shape) if isinstance(states, Tensor) else type(states).__name__
        raise SettingError(
            f"The CONDITIONING is {shape}; this decoder reads Gemma-2's states, {net.config.text_dim} wide. Encode the "
            "prompt with that text encoder (CLIP type pixeldit), or write it as text."
        )
    return {
        "prompt_embeds": load_prompt_embeds(states.float(), length=net.config.text_length, width=net.config.text_dim)
    }


def stopping_place(total: int, model: Any, steps_left: int | None = None) -> int:
    """After how many of `total` steps to stop: `steps_left` before the end, or where PiD's authors recommend.

    The recommendation is that of the family, in proportion. Raises SettingError for a stop before the first step.
    """
    if steps_left is None:
        space = space_of_model(model)
        family = IMAGE_MODELS[space.name]
        return max(1, min(total, round(total * family.capture_step / family.steps)))
    if not 0 <= steps_left < total:
        raise SettingError(f"steps_left is {steps_left}, and there are {total} steps; leave 0 to {total - 1}.")
    return total - steps_left
