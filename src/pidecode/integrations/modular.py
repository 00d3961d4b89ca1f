# SPDX-License-Identifier: Apache-2.0
"""PiD in diffusers' modular pipelines: a block in place of the decode block, with early stop.

pipe = pidecode.pid_blocks(FluxAutoBlocks()).init_pipeline("black-forest-labs/FLUX.1-dev")
pipe.load_components(torch_dtype=torch.bfloat16)
pipe.update_components(pixel_decoder=decoder)
(image,) = pipe(prompt="a lighthouse in fog", stop_after="recommended", output="images")
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from operator import attrgetter
from typing import Any

import torch

from pidecode.decoder import PixelDecoder
from pidecode.errors import MissingDependencyError, SettingError
from pidecode.integrations.diffusers import check_call, check_options, check_space, decode_images, image_prompts
from pidecode.integrations.pipeline_latents import check_stop_after, scheduler_sigma, stop_step, to_latent, token_grid
from pidecode.latents.latent import Latent
from pidecode.options import DecodeOptions

try:
    from diffusers import ModularPipelineBlocks
    from diffusers.modular_pipelines import ComponentSpec, InputParam, LoopSequentialPipelineBlocks, OutputParam
except ImportError as error:
    raise MissingDependencyError(
        'Modular pipelines need diffusers 0.36 or newer; run `pip install -U "pidecode[diffusers]"`.'
    ) from error

SUPPORTED_MODELS = (
    "flux", "flux-kontext", "flux2", "flux2-klein", "stable-diffusion-3", "stable-diffusion-xl", "qwenimage",
    "qwenimage-edit", "qwenimage-edit-plus", "z-image",
)  # fmt: skip
"""`model_name` of the blocks that were run with PiD."""


def pid_blocks(blocks: Any) -> Any:
    """Blocks of a modular pipeline whose images a PiD decoder makes, four times as large.

    The block `decode` becomes a `PiDDecodeStep`, the denoising loops take `stop_after`, and a first block checks the
    decoder and its settings before the work. The pipeline has `pixel_decoder` as one more component, set with
    `pipe.update_components(pixel_decoder=decoder)`, and needs no VAE unless it encodes images.

    Args:
        blocks: Such as `diffusers.FluxAutoBlocks()` or `pipe.blocks`, of the families in `SUPPORTED_MODELS`. They are
            not changed.

    Returns:
        Blocks of the same class, for `init_pipeline`.

    Raises:
        SettingError: PiD does not decode what these blocks make, or they have no block named `decode`.
    """
    name = getattr(blocks, "model_name", None)
    if name not in SUPPORTED_MODELS:
        raise SettingError(
            f"{type(blocks).__name__} are blocks of {name!r}, which PiD does not decode; known are "
            f"{', '.join(SUPPORTED_MODELS)}."
        )
    if "decode" not in blocks.sub_blocks:
        raise SettingError(
            f"{type(blocks).__name__} has the blocks {', '.join(blocks.sub_blocks) or 'none'} and none named 'decode' "
            "to replace; give the blocks of a whole pipeline."
        )
    blocks = deepcopy(blocks)
    for loop in _loops(blocks):
        last = next(reversed(loop.sub_blocks))
        for key, block in loop.sub_blocks.items():
            loop.sub_blocks[key] = PiDLoopStep(block, ends_step=key == last)
    blocks.sub_blocks["decode"] = PiDDecodeStep(name)
    blocks.sub_blocks.insert("check_decoder", PiDCheckStep(name), 0)
    return blocks


def _loops(blocks: Any) -> Iterator[Any]:
    for block in blocks.sub_blocks.values():
        if isinstance(block, LoopSequentialPipelineBlocks):
            yield block
        else:
            yield from _loops(block)


class _PiDStep(ModularPipelineBlocks):
    """Component and inputs that the check at the beginning and the decode at the end have in common."""

    def __init__(self, model_name: str | None = None) -> None:
        super().__init__()
        self.model_name = model_name

    @property
    def expected_components(self) -> list[Any]:
        return [ComponentSpec("pixel_decoder", PixelDecoder, description="The PiD decoder of the model's space.")]

    @property
    def inputs(self) -> list[Any]:
        return [
            InputParam("prompt", description="What the images show, for decoders that read text."),
            InputParam("output_type", default="pil", description="'pil', 'np', 'pt' or 'latent'."),
            InputParam("decode_options", type_hint=DecodeOptions, description="How to decode: seed, num_steps, ..."),
            InputParam("padding_mask_crop", description="Refused: PiD decodes whole images only."),
        ]

    def checked(self, components: Any, given: Any) -> tuple[PixelDecoder, DecodeOptions]:
        """Decoder and options of a call; SettingError or LatentError for what cannot act."""
        decoder = getattr(components, "pixel_decoder", None)
        if not isinstance(decoder, PixelDecoder):
            raise SettingError(
                f"The pipeline's component pixel_decoder is {type(decoder).__name__}; give it a decoder with "
                "pipe.update_components(pixel_decoder=pidecode.PixelDecoder.from_pretrained(...))."
            )
        check_space(components, decoder)
        options = DecodeOptions() if given.decode_options is None else given.decode_options
        check_options(options, decoder)
        call = {name: getattr(given, name) for name in ("output_type", "padding_mask_crop", "prompt")}
        check_call(decoder, call, options)
        return decoder, options


_STOP_AFTER = InputParam(
    "stop_after", description="Step to end the diffusion after, counted from 1, or 'recommended'; PiD decodes the rest."
)


class PiDCheckStep(_PiDStep):
    """First block: refuses what could not be decoded, before any work."""

    description = "Step that checks the PiD decoder and how it is asked to decode"

    @property
    def inputs(self) -> list[Any]:
        return [*super().inputs, _STOP_AFTER]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        given = self.get_block_state(state)
        self.checked(components, given)
        check_stop_after(given.stop_after)
        return components, state


class PiDLoopStep(ModularPipelineBlocks):
    """A block of a denoising loop that is skipped once the loop has made the steps asked for.

    Args:
        block: The block.
        ends_step: Whether it is the loop's last, after which a step is done.
    """

    def __init__(self, block: Any, ends_step: bool) -> None:
        super().__init__()
        self.block, self.ends_step, self.model_name = block, ends_step, block.model_name

    description = property(attrgetter("block.description"))
    expected_components = property(attrgetter("block.expected_components"))
    expected_configs = property(attrgetter("block.expected_configs"))
    intermediate_outputs = property(attrgetter("block.intermediate_outputs"))

    @property
    def inputs(self) -> list[Any]:
        return [*self.block.inputs, _STOP_AFTER]

    def __call__(self, components: Any, block_state: Any, i: int, t: Any) -> tuple[Any, Any]:
        last = getattr(block_state, "pid_stop_step", None)
        if last is not None and i >= last:
            return components, block_state
        components, block_state = self.block(components, block_state, i=i, t=t)
        if i == 0 and self.ends_step and block_state.stop_after is not None:
            max_sigma = components.pixel_decoder.max_sigma
            num_steps = len(block_state.timesteps)
            block_state.pid_stop_step = stop_step(components, block_state.stop_after, num_steps, max_sigma)
        return components, block_state


class PiDDecodeStep(_PiDStep):
    """The decode block: latents to images by the pipeline's `pixel_decoder`."""

    description = "Step that decodes finished or noisy latents into images, four times as large, with PiD"

    @property
    def inputs(self) -> list[Any]:
        latents = InputParam("latents", required=True, type_hint=torch.Tensor, description="From the denoising loop.")
        others = ("generator", "timesteps", "img_ids")  # img_ids tell the shape of packed tokens, as FLUX.1's are
        return [*super().inputs, latents, *(InputParam(name) for name in others)]

    @property
    def intermediate_outputs(self) -> list[Any]:
        return [
            OutputParam("images", description="PIL images, an array or a tensor, as `output_type` says."),
            OutputParam("pid_latent", type_hint=Latent, description="What was decoded, with its sigma and prompts."),
        ]

    def __call__(self, components: Any, state: Any) -> tuple[Any, Any]:
        given = self.get_block_state(state)
        decoder, options = self.checked(components, given)
        prompts = image_prompts(given.prompt if options.prompt is None else options.prompt, len(given.latents))
        scheduler = getattr(components, "scheduler", None)
        sigma = 0.0 if scheduler is None else scheduler_sigma(scheduler)
        seed = given.generator.initial_seed() if isinstance(given.generator, torch.Generator) else None
        packed = given.latents.ndim == 3
        grid = token_grid({"img_ids": given.img_ids}, given.latents.shape[1]) if packed else None
        latent = to_latent(components, given.latents, grid=grid, sigma=sigma, prompt=prompts, seed=seed)
        given.pid_latent = given.images = latent
        if given.output_type != "latent":
            planned = 0 if given.timesteps is None else len(given.timesteps)
            left = (
                0 if scheduler is None else sum(float(one) > 0 for one in scheduler.sigmas[scheduler.step_index or 0 :])
            )
            given.images = decode_images(
                decoder, latent, given.output_type, options, components, (planned - left, planned)
            )
        self.set_block_state(state, given)
        return components, state
