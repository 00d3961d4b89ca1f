# SPDX-License-Identifier: Apache-2.0
"""Latents of diffusers pipelines as `Latent`: which space, which layout, how much noise.

Pipelines are recognized by the names of their classes and read through their attributes, so diffusers is not imported.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal

import torch
from torch import Tensor

from pidecode.encoders.autoencoder_kl import CLASSES, check_constants
from pidecode.errors import CheckpointError, LatentError, SettingError
from pidecode.latents.latent import Latent
from pidecode.latents.layout import LatentStatistics, denormalize, normalize, packed_grid, unpack
from pidecode.registry.spaces import SPACES, LatentSpace, get_space, has_stem, recommended_stop

StopAfter = int | Literal["recommended"] | None
"""Step to end the diffusion after, counted from 1; "recommended" is what PiD's authors recommend."""
SchedulerParametrization = Literal["flow", "euler", "variance_preserving"]
"""What a scheduler's latent is at sigma s: `(1 - s) x + s e`, `x + s e`, or `sqrt(1 - s^2) x + s e`."""

# First part of a pipeline class's name -> the space of its latents. None where its latents are no images of a space,
# although its VAE may be: layers, frames, prompts, channels of a token in another order, tokens with channels last,
# normalized latents in the raw one's shape (FIBO 2), tokens of SDXL's latents (Bria), an inversion's (LEdits++). First
# match counts; what is not listed is known by its VAE.
_SPACE_BY_CLASS: tuple[tuple[str, str | None], ...] = (
    ("QwenImageLayered", None), ("FluxPriorRedux", None), ("Ideogram4", None), ("Kandinsky", None),
    ("VisualCloze", None), ("Bria", None), ("Flux3", None), ("QwenImage21", None), ("AnimateDiff", None),
    ("LEditsPP", None),
    ("Flux2", "flux2"), ("Flux", "flux"), ("Chroma", "flux"), ("StableDiffusion3", "sd3"),
    ("StableDiffusionXL", "sdxl"), ("QwenImage", "qwenimage"), ("ZImage", "flux"),
)  # fmt: skip
_FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")
_EULER_SCHEDULERS = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler")
_DPM_SCHEDULERS = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")


def pipeline_space(pipe: Any) -> LatentSpace:
    """The latent space of a diffusers pipeline, by its class, or by its VAE; SettingError where PiD has no decoder."""
    names = [kind.__name__ for kind in type(pipe).__mro__ if "Pipeline" in kind.__name__]
    matches = (space for kind in names for stem, space in _SPACE_BY_CLASS if has_stem(kind, stem))
    name = next(matches, "")
    space = get_space(name) if name else None if name is None else _space_of_vae(getattr(pipe, "vae", None))
    if space is None:
        known = sorted({f"{start}*Pipeline" for start, name in _SPACE_BY_CLASS if name})
        raise SettingError(
            f"A {type(pipe).__name__} does not work in a latent space that PiD decodes; known are {', '.join(known)}, "
            "and others that use the VAE of one of these."
        )
    config = getattr(getattr(pipe, "vae", None), "config", None)
    if space.statistics == "constants" and config is not None:
        try:
            check_constants(config, space, f"The VAE of this {type(pipe).__name__}")
        except CheckpointError as error:
            raise SettingError(str(error)) from None
    return space


def _space_of_vae(vae: Any) -> LatentSpace | None:
    """The space of a diffusers autoencoder, by its class and the statistics in its configuration."""
    kind, config = type(vae).__name__, getattr(vae, "config", {})
    channels = config.get("latent_channels", config.get("z_dim"))
    for space in SPACES.values():
        if CLASSES.get(space.name, "AutoencoderKL") != kind or channels != space.raw_channels:
            continue
        if space.statistics == "per_channel":
            given = [config.get("latents_mean") or (), config.get("latents_std") or ()]
            known = torch.tensor([space.mean, space.std])
            if {len(row) for row in given} == {channels} and (torch.tensor(given) - known).abs().max() < 1e-3:
                return space
        elif space.statistics == "batch_norm":
            return space
        else:
            with suppress(CheckpointError):
                check_constants(config, space, kind)
                return space
    return None


def recommended_stop_step(pipe: Any, num_steps: int) -> int:
    """The step after which PiD's authors recommend to stop a run of `num_steps` steps, counted from 1."""
    names = [kind.__name__ for kind in type(pipe).__mro__]
    return recommended_stop([name for name in names if name.endswith("Pipeline")], num_steps)


def check_stop_after(stop_after: object) -> None:
    """Raise SettingError for what is no `StopAfter`."""
    if stop_after is not None and stop_after != "recommended" and type(stop_after) is not int:
        raise SettingError(f"stop_after is {stop_after!r}; it must be a step, counted from 1, or 'recommended'.")


def stop_step(
    pipe: Any, stop_after: StopAfter, num_steps: int, max_sigma: float, capture_steps: Sequence[int] = ()
) -> int | None:
    """The step to end a run of `num_steps` after; to be called after its first step, when the schedule is known.

    Raises:
        SettingError: That step, or one of `capture_steps`, does not exist or leaves more noise than `max_sigma`, or the
            scheduler is not known.
    """
    step = recommended_stop_step(pipe, num_steps) if stop_after == "recommended" else stop_after
    requested = [*capture_steps, *([] if step is None else [step])]
    for one in requested:
        if not 1 <= one <= num_steps:
            raise SettingError(f"There is no step {one}: this run has {num_steps}, counted from 1.")
    if all(one == num_steps for one in requested):
        return step
    scheduler, space = pipe.scheduler, pipeline_space(pipe)
    scheduler_parametrization(scheduler, space)
    first = int(getattr(scheduler, "step_index", 1)) - 1
    sigmas = [latent_sigma(scheduler, space, float(sigma)) for sigma in scheduler.sigmas[first + 1 :]]
    if sigmas[min(requested) - 1] > max_sigma:
        earliest = next((i + 1 for i, sigma in enumerate(sigmas) if sigma <= max_sigma), num_steps)
        raise SettingError(
            f"After step {min(requested)} of {num_steps} the latent's sigma is {sigmas[min(requested) - 1]:.2f}; PiD "
            f"was trained up to {max_sigma:g}. Stop after step {earliest} or later."
        )
    return step


def scheduler_parametrization(scheduler: Any, space: LatentSpace) -> SchedulerParametrization:
    """How a scheduler mixes image and noise in the latents between its steps; SettingError for an unknown one."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    flow = name in _FLOW_SCHEDULERS or (name in _DPM_SCHEDULERS and bool(config.get("use_flow_sigmas", False)))
    if space.noise_parametrization == "flow" and flow:
        return "flow"
    if space.noise_parametrization == "variance_preserving" and not flow:
        if name in _EULER_SCHEDULERS:
            return "euler"
        if name in _DPM_SCHEDULERS:
            return "variance_preserving"
    known = _FLOW_SCHEDULERS if space.noise_parametrization == "flow" else _EULER_SCHEDULERS + _DPM_SCHEDULERS
    raise SettingError(
        f"The noise level of {type(scheduler).__name__}'s unfinished latents is not known for space {space.name}. Let "
        f"the pipeline run to its end, or give it one of {', '.join(known)}."
    )


def scheduler_sigma(scheduler: Any) -> float:
    """Sigma, in the scheduler's own units, of the latent that its last step returned; 0 at the end of the schedule."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is None:
        return 0.0
    sigma = float(sigmas[-1 if index is None else min(int(index), len(sigmas) - 1)])
    return 1 - sigma if getattr(scheduler, "config", {}).get("invert_sigmas") else sigma  # OmniGen's tell the image


def latent_sigma(scheduler: Any, space: LatentSpace, sigma: float) -> float:
    """A scheduler's sigma as `Latent` has it, in [0, 1]."""
    if sigma <= 0 or scheduler_parametrization(scheduler, space) == "flow":
        return max(sigma, 0.0)
    return sigma / math.sqrt(sigma * sigma + 1)


def token_grid(call: Mapping[str, Any], num_tokens: int) -> tuple[int, int] | None:
    """Rows and columns of the image's own tokens, if the keywords of a transformer's call tell them.

    Editing pipelines append the tokens of reference images; those come after the image's own and are not counted.
    """
    shapes = call.get("img_shapes")
    if shapes is not None:
        first = shapes[0]
        if isinstance(first, (list, tuple)) and isinstance(first[0], (list, tuple)):
            first = first[0]
        return int(first[-2]), int(first[-1])
    ids = call.get("img_ids")
    if not isinstance(ids, Tensor):
        return None
    own = (ids[0] if ids.ndim == 3 else ids)[:num_tokens, 1:3]
    rows, columns = (int(side) + 1 for side in own.amax(0))
    return rows, columns


def to_latent(
    pipe: Any,
    tensor: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    sigma: float | None = None,
    prompt: Sequence[str] | None = None,
    seed: int | None = None,
) -> Latent:
    """Latents as a pipeline's step callback or `output_type="latent"` gives them, as a float32 `Latent`.

    Args:
        pipe: The pipeline.
        tensor: `[B, C, h, w]`, `[B, C, 1, h, w]`, or packed tokens `[B, N, C]`.
        grid: Rows and columns of the tokens; needed where they are packed.
        sigma: Noise level in the scheduler's units; by default that of the scheduler's present step.
        prompt: One per image.
        seed: Of the diffusion.

    Raises:
        LatentError: The tokens come without a grid, or the shape is not the space's.
    """
    space = pipeline_space(pipe)
    tensor = tensor.detach().float()
    if tensor.ndim == 3:
        if grid is None:
            raise LatentError(
                f"These {space.name} latents are {tensor.shape[1]} packed tokens, which do not tell the image's "
                "shape. Give the height and width the pipeline ran at."
            )
        tensor = unpack(tensor, space, *(tokens * space.pixels_per_token for tokens in grid))
    elif tensor.ndim == 5 and tensor.shape[2] == 1:
        tensor = tensor.squeeze(2)
    elif tensor.ndim == 4 and space.statistics == "batch_norm" and tensor.shape[1] == space.raw_channels:
        tensor = normalize(tensor, space, _batch_norm_statistics(pipe))  # FLUX.2 klein's final latent is raw
    sigma = scheduler_sigma(pipe.scheduler) if sigma is None else sigma
    prompts = None if prompt is None else tuple(prompt)
    if sigma > 0 and scheduler_parametrization(pipe.scheduler, space) == "euler":
        return Latent.from_euler(tensor, sigma, space.name, prompt=prompts, seed=seed)
    return Latent(tensor, space.name, latent_sigma(pipe.scheduler, space, sigma), prompts, seed)


def latent_from_pipeline(
    pipe: Any,
    out: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    prompt: str | Sequence[str] | None = None,
    seed: int | None = None,
) -> Latent:
    """What a diffusers pipeline returned for `output_type="latent"`, as a `Latent`.

    Call it before the pipeline runs again: the noise level of an interrupted run is read from its scheduler.

    Args:
        pipe: The pipeline.
        out: What its call returned, as an output object, a tuple or a tensor.
        height: What the pipeline was called with, in pixels; needed by pipelines that pack their latents to tokens,
            unless they ran at their default size.
        width: Likewise.
        prompt: What the images show; one for all, or one per image.
        seed: Of the diffusion, to be kept with the latent.

    Raises:
        LatentError: `out` holds no latents, or the size does not fit them.
        SettingError: PiD has no decoder for the pipeline's space.
    """
    latents = getattr(out, "latents", None)
    if isinstance(latents, Latent):
        return latents
    tensor = getattr(out, "images", out[0] if isinstance(out, (tuple, list)) and out else out)
    if isinstance(tensor, Latent):
        return tensor
    if not isinstance(tensor, Tensor) or (tensor.ndim == 4 and tensor.shape[1] == 3):
        raise LatentError(
            f'The pipeline returned {type(tensor).__name__}, not latents; call it with output_type="latent".'
        )
    grid = None
    if tensor.ndim == 3:
        default = int(getattr(pipe, "default_sample_size", 0)) * int(getattr(pipe, "vae_scale_factor", 0))
        if height is not None and width is not None:
            grid = packed_grid(pipeline_space(pipe), height, width)
        elif height is None and width is None and default:
            grid = packed_grid(pipeline_space(pipe), default, default)
            grid = grid if math.prod(grid) == tensor.shape[1] else None
    prompts = [prompt] * len(tensor) if isinstance(prompt, str) else prompt
    return to_latent(pipe, tensor, grid=grid, prompt=prompts, seed=seed)


@torch.no_grad()
def vae_decode(pipe: Any, latent: Latent) -> Tensor:
    """Decode a clean latent by the pipeline's own VAE to `[B, 3, h, w]` in [-1, 1], float32, on the CPU."""
    vae = pipe.vae
    raw = denormalize(latent.tensor.float(), latent.latent_space, _batch_norm_statistics(pipe))
    upcast = vae.dtype == torch.float16 and bool(vae.config.get("force_upcast", False))
    if upcast:
        vae.to(torch.float32)
    try:
        device = getattr(pipe, "_execution_device", vae.device)
        images: Tensor = vae.decode(raw.to(device, vae.dtype), return_dict=False)[0]
    finally:
        if upcast:
            vae.to(torch.float16)
    images = images.squeeze(2) if images.ndim == 5 else images
    return images.float().clamp(-1, 1).cpu()


def _batch_norm_statistics(pipe: Any) -> LatentStatistics | None:
    """Running mean and variance of the VAE's batch norm; None for a VAE without one."""
    norm = getattr(getattr(pipe, "vae", None), "bn", None)
    if norm is None:
        return None
    return LatentStatistics(norm.running_mean.detach().float(), norm.running_var.detach().float())
