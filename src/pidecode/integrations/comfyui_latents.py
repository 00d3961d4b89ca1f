# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's LATENT, IMAGE and CONDITIONING as pidecode's latents, images and text states, and back; MODEL of a decoder.

Everything is read from the objects themselves, so this module is importable without ComfyUI.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from pidecode.decoder import PixelDecoder
from pidecode.encoders.text import load_prompt_embeds
from pidecode.engine.machine import Chunks
from pidecode.engine.plan import Plan
from pidecode.engine.runner import Runner
from pidecode.errors import DoesNotFitError, LatentError, MissingDependencyError, SettingError
from pidecode.latents.latent import Latent
from pidecode.models.pid.network import PiDNet
from pidecode.options import MAX_SIGMA, SIGMA_ROUNDING
from pidecode.registry.checkpoints import STUDENT_TIMES
from pidecode.registry.configs import PiDConfig
from pidecode.registry.spaces import LatentSpace, get_space, recommended_stop
from pidecode.sampling import TIMESCALE, shifted
from pidecode.units import format_bytes

DEFAULT = "default"  # choice of a combo that leaves an option to the decoder
SMALL_CHUNKS = Chunks(tokens=1024, tile_tokens=512, tile_rows=1)
WINDOW = 1024
"""Side in pixels of the windows that memory="windows" cuts an image into."""

SPACE_BY_FORMAT = {"Flux": "flux", "SD3": "sd3", "SDXL": "sdxl", "Flux2": "flux2", "Wan21": "qwenimage"}
"""Name of ComfyUI's latent format -> latent space; Wan 2.1 and Qwen-Image have VAEs with the same statistics."""


def model_space(model: Any) -> LatentSpace:
    """The latent space of a MODEL, by its latent format; SettingError for one that PiD has no decoder for."""
    name = type(model.model.latent_format).__name__
    if name not in SPACE_BY_FORMAT:
        raise SettingError(
            f"The connected MODEL works in ComfyUI's latent format {name}, for which there is no decoder; there are "
            f"decoders for {', '.join(SPACE_BY_FORMAT)}."
        )
    return get_space(SPACE_BY_FORMAT[name])


def check_space(space: LatentSpace, model: Any) -> None:
    """Raise SettingError for a MODEL of another latent space than a decoder's."""
    found = model_space(model)
    if found.name != space.name:
        raise SettingError(
            f"The decoder is for space {space.name}, and the connected MODEL works in {found.name}; load the decoder "
            f"for {found.name}."
        )


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
    channels = space.channels if space.name == "flux2" else space.raw_channels
    if model is None:
        if tensor.ndim == 4 and tensor.shape[1] != channels:
            raise SettingError(
                f"The LATENT has {tensor.shape[1]} channels, and those of the decoder's space {space.name} have "
                f"{channels}; load the decoder for the model that made it."
            )
        if sigma:
            raise SettingError(
                f"latent_sigma is {sigma:g}: to decode a latent that holds noise, connect the MODEL that made it."
            )
        # ComfyUI's LATENT of FLUX.2 is normalized already; all others are raw.
        return Latent(tensor, space.name) if space.name == "flux2" else Latent.from_raw(tensor, space.name)
    check_space(space, model)
    if space.name == "qwenimage":  # its latent format has an axis for the frames of a video
        tensor = tensor.unsqueeze(2)
    normalized = _drop_frame_axis(model.model.process_latent_in(tensor)).float()
    if not sigma:
        return Latent(normalized, space.name)
    level, flow = noise_level(model, space, sigma), _is_flow(model)
    # What the sampler held when it stopped: where ComfyUI's sampling ends at sigma > 0, it divides a flow-matching
    # model's latent by (1 - sigma). Adding no noise at that sigma, as the next sampler would begin, undoes that.
    scale = model.get_model_object("model_sampling").noise_scaling
    state = scale(torch.tensor([sigma], device=normalized.device), torch.zeros_like(normalized), normalized).float()
    # `(1 - s) z + s e` or `z + s e`: both are the space's own form up to a factor.
    if space.noise_parametrization == "flow":
        return Latent(state if flow else state * (1 - level), space.name, level)
    kept = 1 - sigma if flow else 1.0  # of the image
    return Latent.from_euler(state / kept, sigma / kept, space.name)


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
    """A sigma of the MODEL's sampler as the decoder has it, in [0, 1]; SettingError for one it does not have."""
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


def alpha_of(image: Tensor, mask: Tensor | None) -> Tensor:
    """The alpha channel `[B, H, W]` in [0, 1] of an IMAGE `[B, H, W, 3 or 4]`, or of its MASK, which is 1 - alpha."""
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
    """IMAGE `[B, H, W, 3 or 4]` in [0, 1] to `[B, 3, H, W]` in [-1, 1], its colors alone."""
    if image.ndim != 4 or image.shape[-1] not in (3, 4):
        raise SettingError(f"An IMAGE is [B, H, W, 3]; got {list(image.shape)}.")
    pixels = image[..., :3].float().movedim(-1, 1)
    return (pixels * 2 - 1).clamp(-1, 1)


def image_from_tensor(pixels: Tensor) -> Tensor:
    """`[B, 3, H, W]` in [-1, 1] to IMAGE: `[B, H, W, 3]` in [0, 1], float32, on the CPU."""
    return (pixels.float() / 2 + 0.5).clamp(0, 1).movedim(1, -1).contiguous().cpu()


def prompt_embeds_from_conditioning(conditioning: Sequence[Any], decoder: PixelDecoder) -> Tensor:
    """The text states `[B, tokens, text_dim]` in a CONDITIONING of Gemma-2; SettingError for any other."""
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


def target_size(images: Tensor, scale: int, width: int, height: int) -> tuple[int, int] | None:
    """Height and width that an upscaled image is to have, at most `scale` times its own; None for the decoder's."""
    rows, columns = images.shape[-2:]
    if not (width or height):
        return None
    width, height = width or round(height * columns / rows), height or round(width * rows / columns)
    if width > columns * scale or height > rows * scale:
        raise SettingError(
            f"{width}x{height} is more than {scale} times the image of {columns}x{rows}; set width and height to "
            f"{columns * scale}x{rows * scale} or less."
        )
    return height, width


def vae_encoder(vae: Any, decoder: PixelDecoder) -> Callable[[Tensor], Tensor]:
    """Images `[B, 3, H, W]` to normalized latents by a VAE of ComfyUI, which must be of the decoder's space."""
    if decoder.space.fixed_input is not None:
        raise SettingError(f"A decoder of {decoder.space.name} takes latents of its own encoder; disconnect the VAE.")

    def encode(images: Tensor) -> Tensor:
        raw = vae.encode(image_from_tensor(images))
        channels = decoder.space.channels if decoder.space.name == "flux2" else decoder.space.raw_channels
        if raw.shape[1] != channels:
            raise SettingError(
                f"The VAE's latents have {raw.shape[1]} channels, and those of space {decoder.space.name} {channels}; "
                "connect the VAE of that space."
            )
        latent: Tensor = to_latent({"samples": raw}, decoder.space).tensor
        return latent.to(decoder.device)

    return encode


def early_stop_step(sigmas: Tensor, model: Any, steps_left: int | None = None, max_sigma: float = MAX_SIGMA) -> int:
    """The step of a schedule, counted from 1, to end a MODEL's sampling after.

    Raises:
        SettingError: `steps_left`, by default in proportion what PiD's authors recommend for the model, leaves no step
            or more noise than `max_sigma`; or PiD has no decoder or recommendation for the model.
    """
    num_steps, space = len(sigmas) - 1, model_space(model)
    if num_steps < 1:
        raise SettingError("There are no sigmas to cut; connect a scheduler.")
    if steps_left is None:
        config = getattr(model.model, "model_config", None) or model.model  # Z-Image has the latent format of FLUX
        stop = recommended_stop([kind.__name__ for kind in type(config).__mro__], num_steps)
    elif 0 <= steps_left < num_steps:
        stop = num_steps - steps_left
    else:
        raise SettingError(f"steps_left is {steps_left}, and there are {num_steps} steps; leave 0 to {num_steps - 1}.")
    levels = [noise_level(model, space, float(sigma)) for sigma in sigmas]
    if levels[stop] > max_sigma + SIGMA_ROUNDING:
        earliest = next(
            (step for step in range(stop, num_steps) if levels[step] <= max_sigma + SIGMA_ROUNDING), num_steps
        )
        raise SettingError(
            f"After step {stop} of {num_steps} the latent's noise level is {levels[stop]:.2f}; PiD was trained up to "
            f"{max_sigma:g}. Set steps_left to {num_steps - earliest} or less."
        )
    return stop


@contextmanager
def in_less_memory(decoder: PixelDecoder, memory: str, size: tuple[int, int]) -> Iterator[None]:
    """Decode in smaller pieces where a node's `memory` says so."""
    runner = decoder.runner
    if memory == DEFAULT:
        yield
        return
    if not isinstance(runner, Runner):
        raise SettingError(f"memory acts on student and teacher decoders only; set it to {DEFAULT} for {decoder.name}.")
    kept, dtype = (runner.plan, runner.chunks), str(decoder.dtype).removeprefix("torch.")
    window = WINDOW if memory == "windows" and max(size) > WINDOW else None
    runner.plan = Plan(size=size, dtype=dtype, chunks=SMALL_CHUNKS, keep_tokens=False, window=window)
    runner.chunks = SMALL_CHUNKS
    try:
        yield
    finally:
        runner.plan, runner.chunks = kept


def require_memory(decoder: PixelDecoder, samples: Mapping[str, Any], total: int) -> None:
    """Raise DoesNotFitError for a LATENT that a device of `total` bytes cannot decode, even with the least memory."""
    # ComfyUI's sampler makes an empty latent of another scale fit the model.
    pixels = int(samples.get("downscale_ratio_spatial") or decoder.space.down) * decoder.scale
    height, width = (side * pixels for side in samples["samples"].shape[-2:])
    least = "windows" if isinstance(decoder.runner, Runner) else DEFAULT
    with in_less_memory(decoder, least, (width, height)):
        needed = decoder.runner.plan_for((width, height), 1).peak
    if needed > total:
        raise DoesNotFitError(
            f"A result of {width}x{height} pixels needs about {format_bytes(needed)} of memory at the least, and the "
            f"device has {format_bytes(total)}. Make a smaller image."
        )


def flow_times(share: Tensor, shift: float | None) -> Tensor:
    """Flow times by the share of the steps still to come, 1 to 0; equal parts of it give the reference's times.

    `shift` is a teacher's flow shift, or None for a student, whose listed times are interpolated linearly.
    """
    if shift is not None:
        return shifted(STUDENT_TIMES[0] * share, shift)  # sampling in several steps begins at 0.999
    times = torch.tensor(STUDENT_TIMES[::-1], dtype=share.dtype, device=share.device)
    place = share * (len(times) - 1)
    below = place.floor().clamp(0, len(times) - 2).long()
    return torch.lerp(times[below], times[below + 1], place - below)


def core_model(decoder: PixelDecoder) -> Any:
    """A decoder as a MODEL of ComfyUI's own PiD, sharing the weights, so that its samplers and MODEL nodes act on it.

    In place of ComfyUI's approximation it has the reference's times (a student's with the scheduler `simple` and 1, 2
    or 4 steps) and begins from unit noise.

    Raises:
        SettingError: The decoder is no network that ComfyUI has.
        MissingDependencyError: This ComfyUI has no PiD.
    """
    net = decoder.net
    if not isinstance(net, PiDNet) or not net.config.has_text or net.config.adapter_image_channels:
        raise SettingError(f"{decoder.name} is no PiD network of ComfyUI's; connect the decoder to PiD Decode instead.")
    if find_spec("comfy.ldm") is None or find_spec("comfy.ldm.pixeldit") is None:
        raise MissingDependencyError(
            "This ComfyUI has no PiD of its own; update it, or connect the decoder to PiD Decode instead."
        )
    from comfy import model_management as management
    from comfy import model_patcher, supported_models

    about = supported_models.PiD({"image_model": "pid", **_core_config(net.config)})
    device, offload = management.get_torch_device(), management.unet_offload_device()
    cast = management.unet_manual_cast(decoder.dtype, device, about.supported_inference_dtypes)
    about.set_inference_dtype(decoder.dtype, cast)
    try:
        model = about.get_model({}, "")
    except TypeError:
        raise MissingDependencyError(
            f"The PiD of this ComfyUI is older than {decoder.name}; update it, or connect the decoder to PiD Decode."
        ) from None
    weights = about.process_unet_state_dict(dict(net.state_dict()))
    model.diffusion_model.load_state_dict(weights, assign=True)
    model.model_sampling = _reference_sampling(decoder)
    patcher = getattr(model_patcher, "CoreModelPatcher", model_patcher.ModelPatcher)
    return patcher(model.eval(), load_device=device, offload_device=offload)


def _core_config(config: PiDConfig) -> dict[str, Any]:
    """A network's shape by the names that ComfyUI's PidNet takes; the first PidNet knew none of v1.5."""
    later = {
        "lq_latent_unpatchify_factor": config.latent_unpatchify, "lq_conv_padding_mode": config.adapter_padding,
        "lq_gate_per_token": config.gate == "per_token", "pit_lq_inject": config.inject_pixels,
    }  # fmt: skip
    v1 = {"lq_latent_unpatchify_factor": 1, "lq_conv_padding_mode": "zeros"}
    return {name: value for name, value in later.items() if value != v1.get(name, False)} | {
        "hidden_size": config.hidden_size, "num_groups": config.num_heads, "patch_depth": config.patch_depth,
        "patch_size": config.patch_size, "pixel_hidden_size": config.pixel_hidden_size,
        "pixel_depth": config.pixel_depth, "pixel_attn_hidden_size": config.pixel_attn_hidden_size,
        "pixel_num_groups": config.pixel_num_heads, "txt_embed_dim": config.text_dim,
        "txt_max_length": config.text_length, "use_text_rope": config.text_rope,
        "text_rope_theta": config.text_rope_theta, "lq_latent_channels": config.latent_channels,
        "lq_hidden_dim": config.adapter_width, "lq_num_res_blocks": config.adapter_blocks,
        "lq_interval": config.inject_interval, "sr_scale": config.scale,
        "latent_spatial_down_factor": config.latent_down, "rope_ref_h": config.rope_reference[0],
        "rope_ref_w": config.rope_reference[1],
    }  # fmt: skip


def _reference_sampling(decoder: PixelDecoder) -> Any:
    """ComfyUI's flow sampling with the reference's times and its unit noise at the first of them."""
    import comfy.model_sampling

    core: Any = comfy.model_sampling

    shift = None if decoder.kind == "student" else decoder.flow_shift(2048, 2048)
    velocity = not isinstance(decoder.net.config, PiDConfig) or decoder.net.config.prediction == "velocity"

    class ReferenceFlow(core.ModelSamplingDiscreteFlow, core.CONST):  # type: ignore[misc]
        """Flow sampling of a PiD network."""

        def sigma(self, timestep: Tensor | float) -> Tensor:
            return flow_times(torch.as_tensor(timestep) / TIMESCALE, shift)

        def percent_to_sigma(self, percent: float) -> float:
            return 1.0 if percent <= 0 else float(self.sigma(TIMESCALE * (1 - min(percent, 1.0))))

        def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
            return noise if max_denoise else super().noise_scaling(sigma, noise, latent)

        def calculate_denoised(self, sigma: Tensor, output: Tensor, noisy: Tensor) -> Tensor:
            return super().calculate_denoised(sigma, output, noisy) if velocity else output

    return ReferenceFlow()
