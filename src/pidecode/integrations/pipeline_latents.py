# SPDX-License-Identifier: Apache-2.0
"""Latents of diffusers pipelines: layout by pipeline class, and a check of the space.

Pipelines are known by their classes' names and read by their attributes; diffusers itself is not imported.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from pidecode.color_fix import fidelity
from pidecode.decoder import PixelDecoder
from pidecode.encoders.autoencoder_kl import check_constants
from pidecode.encoders.base import ImageEncoder, LazyImageEncoder
from pidecode.errors import CheckpointError, LatentError, PidecodeError, SettingError
from pidecode.latents.latent import Latent, NormalizationWarning
from pidecode.latents.layout import LatentStatistics, denormalize, normalize, unpack
from pidecode.registry.checkpoints import REPOSITORY
from pidecode.registry.spaces import GENERATION, IMAGE_MODELS, LatentSpace, get_space
from pidecode.weights.resolve import HubCache

Frame = Literal["flow", "euler", "variance_preserving"]

# Beginning of a pipeline class's name, and the space of its latents; None where PiD has no decoder. First match.
_CLASSES: tuple[tuple[str, str | None], ...] = (
    ("QwenImage21", None),
    ("QwenImageLayered", None),
    ("Flux2", "flux2"),
    ("FluxPriorRedux", None),
    ("Flux", "flux"),
    ("Chroma", "flux"),
    ("StableDiffusion3", "sd3"),
    ("StableDiffusionXL", "sdxl"),
    ("QwenImage", "qwenimage"),
    ("ZImage", "flux"),
)
_EULER = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler")
_PRESERVING = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler")
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler")


def space_of(pipe: Any) -> LatentSpace:
    """The latent space of a diffusers pipeline. Raises SettingError for a pipeline PiD has no decoder for.

    Also raises it when the pipeline's autoencoder says that its latents are scaled in another way than the space's.
    """
    name = None
    for kind in type(pipe).__mro__:
        if kind.__name__.endswith("Pipeline"):
            name = next((space for start, space in _CLASSES if kind.__name__.startswith(start)), None)
        if name is not None:
            break
    if name is None:
        known = sorted({f"{start}*Pipeline" for start, space in _CLASSES if space})
        raise SettingError(
            f"A {type(pipe).__name__} does not work in a latent space that PiD decodes; known are {', '.join(known)}."
        )
    space = get_space(name)
    config = getattr(getattr(pipe, "vae", None), "config", None)
    if space.statistics == "constants" and config is not None:
        try:
            check_constants(config, space, f"The autoencoder of this {type(pipe).__name__}")
        except CheckpointError as fault:
            raise SettingError(str(fault)) from None
    return space


def recommended_stop(pipe: Any, steps: int) -> int:
    """The step to stop after, of `steps` (docs/architecture.md, Latent spaces); `steps` itself for few-step models."""
    names = [kind.__name__ for kind in type(pipe).__mro__]
    rows = [row for row in IMAGE_MODELS.values() if row.pipeline in names]
    if not rows:
        rows = [row for row in IMAGE_MODELS.values() if row.space == space_of(pipe).name]
    row = max(rows, key=lambda row: row.steps)
    return steps if steps < 12 else max(1, round(steps * row.capture_step / row.steps))


def frame_of(scheduler: Any, space: LatentSpace) -> Frame:
    """The frame a scheduler keeps its latents in between steps. Raises SettingError for one that is not known."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    flow = name in _FLOW or (name in _PRESERVING and bool(config.get("use_flow_sigmas", False)))
    if space.noise_parametrization == "flow" and flow:
        return "flow"
    if space.noise_parametrization == "variance_preserving" and not flow:
        if name in _EULER:
            return "euler"
        if name in _PRESERVING:
            return "variance_preserving"
    known = _FLOW if space.noise_parametrization == "flow" else _EULER + _PRESERVING
    raise SettingError(
        f"The noise in a latent of {name} cannot be told for space {space.name}. Let the pipeline run to its end, or "
        f"give it one of {', '.join(known)}."
    )


def noise_level(scheduler: Any) -> float:
    """The sigma of the latent that the scheduler put out last, in the scheduler's own measure; 0 at the end."""
    sigmas, index = getattr(scheduler, "sigmas", None), getattr(scheduler, "step_index", None)
    if sigmas is None or index is None:
        return 0.0 if sigmas is None else float(sigmas[-1])
    return float(sigmas[min(int(index), len(sigmas) - 1)])


def trained_sigma(scheduler: Any, space: LatentSpace, level: float) -> float:
    """A scheduler's sigma as the networks know it, in [0, 1]."""
    if level <= 0 or frame_of(scheduler, space) == "flow":
        return max(level, 0.0)
    return level / math.sqrt(level * level + 1)


def grid_of_call(given: Mapping[str, Any], tokens: int) -> tuple[int, int] | None:
    """Rows and columns of the image's own tokens, read from what a transformer is called with.

    Editing pipelines append the tokens of reference images; those come later and are not counted. None where the
    call does not say.
    """
    shapes = given.get("img_shapes")
    if shapes is not None:
        first = (
            shapes[0][0]
            if isinstance(shapes[0], (list, tuple)) and isinstance(shapes[0][0], (list, tuple))
            else shapes[0]
        )
        return int(first[-2]), int(first[-1])
    ids = given.get("img_ids")
    if not isinstance(ids, Tensor):
        return None
    own = (ids[0] if ids.ndim == 3 else ids)[:tokens, 1:3]
    rows, columns = (int(side) + 1 for side in own.amax(0))
    return rows, columns


def latent_of(
    pipe: Any,
    tensor: Tensor,
    *,
    grid: tuple[int, int] | None = None,
    level: float | None = None,
    prompt: Sequence[str] | None = None,
    seed: int | None = None,
) -> Latent:
    """A pipeline's latents, as its callback or `output_type="latent"` hands them out, as a float32 Latent.

    grid: rows and columns of tokens, where they are packed.
    level: the scheduler's sigma; default that of the scheduler's present step.
    """
    space = space_of(pipe)
    tensor = tensor.detach().float()
    if tensor.ndim == 3:
        tensor = _unpacked(tensor, space, grid)
    elif tensor.ndim == 5 and tensor.shape[2] == 1:
        tensor = tensor.squeeze(2)
    elif tensor.ndim == 4 and space.statistics == "batch_norm" and tensor.shape[1] == space.raw_channels:
        tensor = normalize(tensor, space, statistics_of(pipe))  # FLUX.2 klein's final latent is raw
    level = noise_level(pipe.scheduler) if level is None else level
    texts = None if prompt is None else tuple(prompt)
    if level > 0 and frame_of(pipe.scheduler, space) == "euler":
        return Latent.from_euler(tensor, level, space.name, prompt=texts, seed=seed)
    return Latent(tensor, space.name, trained_sigma(pipe.scheduler, space, level), texts, seed)


def _unpacked(tokens: Tensor, space: LatentSpace, grid: tuple[int, int] | None) -> Tensor:
    if grid is None:
        raise LatentError(
            f"These {space.name} latents are {tokens.shape[1]} tokens in a row, which does not tell the image's "
            "shape. Give the height and width the pipeline ran at."
        )
    pixels = space.down * (2 if space.packing == "two_by_two" else 1)

    return unpack(tokens, space, grid[0] * pixels, grid[1] * pixels)


def statistics_of(pipe: Any) -> LatentStatistics | None:
    """Batch-norm statistics of the pipeline's own autoencoder; None for one that has none."""
    norm = getattr(getattr(pipe, "vae", None), "bn", None)
    if norm is None:
        return None
    return LatentStatistics(norm.running_mean.detach().float(), norm.running_var.detach().float())


def latent_from_pipeline(
    pipe: Any,
    out: Any,
    *,
    height: int | None = None,
    width: int | None = None,
    prompt: str | Sequence[str] | None = None,
    seed: int | None = None,
) -> Latent:
    """What a pipeline returned for `output_type="latent"`, as a Latent.

    Call it before the pipeline runs again: the noise level is read from the pipeline's scheduler.

    Args:
        pipe: The diffusers pipeline.
        out: What it returned.
        height: Height it was called with; needed where latents are packed, unless it ran at its default size.
        width: Width it was called with.
        prompt: One prompt for all latents, or one for each.
        seed: Seed to note in the latent.

    Returns:
        The latent, normalized, with its noise level.

    Raises:
        SettingError: There is no PiD decoder for this pipeline.
        LatentError: `out` holds no latents, or the size does not fit.
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
    space = space_of(pipe)
    grid = None
    if tensor.ndim == 3:
        pixels = space.down * (2 if space.packing == "two_by_two" else 1)
        if height is not None and width is not None:
            grid = (height // pixels, width // pixels)
        elif height is None and width is None:
            side = int(getattr(pipe, "default_sample_size", 0)) * int(getattr(pipe, "vae_scale_factor", 0)) // pixels
            grid = (side, side) if side * side == tensor.shape[1] else None
    texts = [prompt] * len(tensor) if isinstance(prompt, str) else prompt
    return latent_of(pipe, tensor, grid=grid, prompt=texts, seed=seed)


@torch.no_grad()
def decode_native(pipe: Any, latent: Latent) -> Tensor:
    """What the pipeline's own autoencoder makes of a latent: `[B, 3, H, W]` in [-1, 1], float32, on the CPU."""
    space, vae = latent.latent_space, pipe.vae
    raw = denormalize(latent.tensor.float(), space, statistics_of(pipe))
    narrow = vae.dtype == torch.float16 and bool(vae.config.get("force_upcast", False))
    if narrow:
        vae.to(torch.float32)
    try:
        device = getattr(pipe, "_execution_device", vae.device)
        images: Tensor = vae.decode(raw.to(device, vae.dtype), return_dict=False)[0]
    finally:
        if narrow:
            vae.to(torch.float16)
    images = images.squeeze(2) if images.ndim == 5 else images
    return images.float().clamp(-1, 1).cpu()


_CELLS = 4
"""Rows and columns of the latent that is decoded on trial."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at: whether it is well, and what was found or would mend it."""

    what: str
    works: bool
    because: str


def check_space(
    space: str,
    *,
    model: str | None = None,
    variant: str | None = None,
    encoder: str | None = None,
    device: str | torch.device | None = None,
) -> list[Check]:
    """Everything needed to decode one latent space, tried in order; nothing is downloaded.

    model: a decoder's name or file; default the official one of that space.
    encoder: the space's encoder, where it is not where `pidecode pull` puts it.
    Raises SettingError for a space there is not; everything else is a Check.
    """
    row = get_space(space)
    decoder, first = _attempt(
        "decoder",
        lambda: PixelDecoder.from_pretrained(
            model or REPOSITORY, space=row.name, variant=variant, device=device, encoder=encoder
        ),
        lambda made: (
            f"{made.name}, {_millions(made)} in {str(made.dtype).removeprefix('torch.')} on {made.device}; "
            "every tensor in its place"
        ),
    )
    checks = [first]
    if decoder is not None:
        states, more = _check_prompts(decoder)
        checks += more
        checks.append(_check_decode(decoder, row, states))
        checks += _check_encoder(decoder, row)
    return [*checks, *_check_pipelines(row)]


def _attempt(what: str, make: Callable[[], Any], tell: Callable[[Any], str]) -> tuple[Any, Check]:
    try:
        made = make()
        return made, Check(what, True, tell(made))
    except PidecodeError as fault:
        return None, Check(what, False, str(fault))


def _millions(decoder: PixelDecoder) -> str:
    return f"{sum(parameter.numel() for parameter in decoder.net.parameters()) / 1e6:.1f} M weights"


def _check_prompts(decoder: PixelDecoder) -> tuple[Tensor | None, list[Check]]:
    """States of the empty prompt, or zeros in their place, so that the decode can be tried all the same."""
    config = decoder.net.config
    if not config.has_text or decoder.text is None:
        return None, []
    text = decoder.text
    states, check = _attempt("prompts", lambda: text.encode(""), lambda made: f"states {list(made.shape)}")
    text.unload()
    return torch.zeros(1, config.text_length, config.text_dim) if states is None else states, [check]


def _check_decode(decoder: PixelDecoder, space: LatentSpace, states: Tensor | None) -> Check:
    noise = torch.randn(1, space.channels, _CELLS, _CELLS, generator=torch.Generator().manual_seed(0))
    settings: Any = {} if states is None else {"prompt_embeds": states}

    def run() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # so small an image is outside the sizes it was trained for
            made = decoder.decode(Latent(noise * 0.5, space.name), **settings).tensor
        assert isinstance(made, Tensor)
        return made

    return _attempt("one small decode", run, lambda made: f"{made.shape[-1]}x{made.shape[-2]} pixels, all finite")[1]


def _check_encoder(decoder: PixelDecoder, space: LatentSpace) -> Iterator[Check]:
    encoder = decoder.encoder
    if not isinstance(encoder, LazyImageEncoder | ImageEncoder):
        yield Check("encoder", False, f"not on this disk: pidecode pull {space.name}; latents decode without it")
        return
    side = space.fixed_input or 256
    ramp = torch.linspace(-0.9, 0.9, side).expand(1, 3, side, side).clone()
    ramp[:, 1] = ramp[:, 1].transpose(1, 2).clone()

    def run() -> Latent:
        with warnings.catch_warnings():
            warnings.simplefilter("error", NormalizationWarning)
            return Latent(encoder(ramp), space.name)

    try:
        latent, check = _attempt("encoder", run, lambda made: f"latent {list(made.tensor.shape)}, in the right frame")
    except NormalizationWarning as doubt:
        latent, check = None, Check("encoder", False, f"it is another space's, or damaged: {doubt}")
    yield check
    if latent is None:
        return
    if not encoder.can_decode:
        yield Check("native decoder", False, "this encoder came without one; only comparing and color_fix need it")
        return
    near = fidelity(encoder.decode(latent.tensor).to(ramp), ramp)[0]
    good = near.psnr > 20
    yield Check("native decoder", good, f"{near}" if good else f"there and back gives {near}: check both files")


def _check_pipelines(space: LatentSpace) -> Iterator[Check]:
    if find_spec("diffusers") is None:
        yield Check("pipelines", False, 'diffusers is not installed: pip install "pidecode[diffusers]"')
        return
    import diffusers

    for name, image_model in IMAGE_MODELS.items():
        if image_model.space != space.name:
            continue
        source = GENERATION[name].repository
        if not hasattr(diffusers, image_model.pipeline):
            because = f"diffusers {diffusers.__version__} has no {image_model.pipeline}; upgrade it"
            yield Check(f"pipeline {name}", False, because)
            continue
        there = HubCache().cached(source, "model_index.json") is not None
        yield Check(f"pipeline {name}", there, source if there else f"not on this disk: hf download {source}")
