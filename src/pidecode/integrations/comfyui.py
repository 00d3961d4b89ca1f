# SPDX-License-Identifier: Apache-2.0
"""Nodes for ComfyUI: load a decoder, decode a LATENT, stop a sampler early, enlarge an IMAGE.

Imported by the folder `comfyui/` of the repository, inside ComfyUI, whose published node API (V3) it uses.
"""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import ComfyExtension, io
from torch import Tensor

from pidecode.decoder import PixelDecoder
from pidecode.errors import SettingError
from pidecode.images import to_pil
from pidecode.integrations.comfyui_latents import prompt_of, stopping_place, to_image, to_latent, to_pixels
from pidecode.options import MAX_SIGMA
from pidecode.registry.checkpoints import CHECKPOINTS, DECODERS, REPOSITORY
from pidecode.sampling import Callback, Step

DecoderType = io.Custom("PIDECODE_DECODER")

CATEGORY = "pidecode"
PREVIEW_SIDE = 512
LARGEST_SEED = 2**32 - 1


def _model_names() -> list[str]:
    """What the loader offers: our own small decoder, and every released one as `space/variant`."""
    rows = [row for row in CHECKPOINTS.values() if row.kind in DECODERS]
    bundled = [row.variant for row in rows if row.bundled]
    return bundled + [f"{row.space}/{row.variant}" for row in rows if not row.bundled]


def _seed() -> Any:
    return io.Int.Input(
        "seed", default=0, min=0, max=LARGEST_SEED, control_after_generate=True, tooltip="Of the noise."
    )


def _steps() -> Any:
    tip = "0 for the decoder's own number; a distilled one takes 1 to 4."
    return io.Int.Input("num_steps", default=0, min=0, max=100, tooltip=tip)


def _prompt() -> list[Any]:
    return [
        io.String.Input(
            "prompt",
            default="",
            multiline=True,
            optional=True,
            tooltip="What the image shows. Needs Gemma-2 on this machine; or connect a CONDITIONING made with it.",
        ),
        io.Conditioning.Input("conditioning", optional=True, tooltip="Gemma-2's states (CLIP type pixeldit)."),
    ]


class LoadDecoder(io.ComfyNode):
    """The node that loads a decoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="PidecodeLoadDecoder",
            display_name="Load PiD Decoder (pidecode)",
            category=CATEGORY,
            description="A pixel decoder of one latent space. `pidecode pull` fetches the released ones.",
            inputs=[
                io.Combo.Input("model", options=_model_names(), default=_model_names()[0]),
                io.Combo.Input(
                    "dtype", options=["auto", "bfloat16", "float16", "float32"], default="auto",
                    tooltip="auto is bfloat16 on a GPU. If images come out black, take float32.",
                ),
                io.String.Input("file", default="", optional=True, tooltip="A weights file instead of a named model."),
            ],
            outputs=[DecoderType.Output(display_name="decoder")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: str, dtype: str = "auto", file: str = "") -> io.NodeOutput:
        """Load it onto ComfyUI's device."""
        device = comfy.model_management.get_torch_device()
        chosen = None if dtype == "auto" else getattr(torch, dtype)
        if file.strip():
            return io.NodeOutput(PixelDecoder.from_pretrained(file.strip(), device=device, dtype=chosen))
        space, found, variant = model.partition("/")
        if not found:
            return io.NodeOutput(PixelDecoder.from_pretrained(model, device=device, dtype=chosen))
        decoder = PixelDecoder.from_pretrained(REPOSITORY, space=space, variant=variant, device=device, dtype=chosen)
        return io.NodeOutput(decoder)


class Decode(io.ComfyNode):
    """The node that makes images of latents."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="PidecodeDecode",
            display_name="PiD Decode (pidecode)",
            category=CATEGORY,
            description="A latent straight to an image four times (SigLIP: eight times) what VAE Decode makes of it.",
            inputs=[
                DecoderType.Input("decoder"),
                io.Latent.Input("samples"),
                _seed(),
                _steps(),
                io.Float.Input(
                    "sigma", default=0.0, min=0.0, max=100.0, step=0.0001, round=False,
                    tooltip="Noise still in the latent, from PiD Early Stop. 0 for a finished latent.",
                ),
                io.Model.Input("model", optional=True, tooltip="The model that made the latent: its frame is used."),
                *_prompt(),
            ],
            outputs=[io.Image.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, decoder: PixelDecoder, samples: Any, seed: int, num_steps: int = 0, **rest: Any) -> io.NodeOutput:
        """Decode one latent after another. `rest` holds sigma, model, prompt and conditioning, where given."""
        latent = to_latent(samples, decoder.space, model=rest.get("model"), sigma=rest.get("sigma", 0.0))
        told = prompt_of(decoder.net, rest.get("prompt") or "", rest.get("conditioning"))
        if num_steps:
            told["num_steps"] = num_steps
        callback = _progress(len(latent))
        made = [
            decoder.decode(one, callback=callback, **_seeded(decoder, seed + index), **told).tensor
            for index, one in enumerate(latent)
        ]
        return io.NodeOutput(_joined(made))


def _seeded(decoder: PixelDecoder, seed: int) -> dict[str, int]:
    """The seed, for decoders that draw noise."""
    return {} if decoder.kind == "feed-forward" else {"seed": seed}


class Upscale(io.ComfyNode):
    """The node that enlarges images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="PidecodeUpscale",
            display_name="PiD Upscale (pidecode)",
            category=CATEGORY,
            description="An image to one four times as wide and high: encoded to a latent, decoded larger.",
            inputs=[
                DecoderType.Input("decoder"),
                io.Image.Input("image"),
                _seed(),
                _steps(),
                io.Float.Input(
                    "strength", default=0.0, min=0.0, max=MAX_SIGMA, step=0.01,
                    tooltip="Noise put into the latent first: more is invented, less is kept.",
                ),
                *_prompt(),
            ],
            outputs=[io.Image.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, decoder: PixelDecoder, image: Tensor, seed: int, num_steps: int = 0, **rest: Any) -> io.NodeOutput:
        """Enlarge one image after another. `rest` holds strength, prompt and conditioning, where given."""
        images = to_pixels(image)
        told = prompt_of(decoder.net, rest.get("prompt") or "", rest.get("conditioning"))
        if num_steps:
            told["num_steps"] = num_steps
        if rest.get("strength"):
            told["sigma"] = rest["strength"]
        callback = _progress(len(images))
        made = [
            decoder.upscale(one[None], callback=callback, **_seeded(decoder, seed + index), **told).tensor
            for index, one in enumerate(images)
        ]
        return io.NodeOutput(_joined(made))


class EarlyStop(io.ComfyNode):
    """The node beside the sampler that lets it stop early, and tells the decoder how much noise is left."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="PidecodeEarlyStop",
            display_name="PiD Early Stop (pidecode)",
            category=CATEGORY,
            description=(
                "Put it between a scheduler and SamplerCustom(Advanced), take the sampler's first output (not the "
                "denoised one), and connect sigma and the model to PiD Decode."
            ),
            inputs=[
                io.Sigmas.Input("sigmas"),
                io.Model.Input("model"),
                io.Int.Input(
                    "steps_left", default=-1, min=-1, max=1000,
                    tooltip="Steps to leave out at the end; -1 for what is recommended for the model.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas"), io.Float.Output(display_name="sigma")],
        )  # fmt: skip

    @classmethod
    def execute(cls, sigmas: Tensor, model: Any, steps_left: int = -1) -> io.NodeOutput:
        """Cut the sigmas, and hand over the one at which sampling will end."""
        total = len(sigmas) - 1
        if total < 1:
            raise SettingError("There are no sigmas to cut; connect a scheduler.")
        stop = stopping_place(total, model, None if steps_left < 0 else steps_left)
        return io.NodeOutput(sigmas[: stop + 1], float(sigmas[stop]))


def _progress(images: int) -> Callback:
    """A step callback that moves ComfyUI's bar, shows the estimate, and heeds its interrupt."""
    bars: list[Any] = []
    done = 0

    def callback(step: Step) -> None:
        nonlocal done
        comfy.model_management.throw_exception_if_processing_interrupted()
        if not bars:
            bars.append(comfy.utils.ProgressBar(step.total * images))
        done += 1
        stride = max(1, -(-max(step.image.shape[-2:]) // PREVIEW_SIDE))
        small = step.image[:1, :, ::stride, ::stride].clamp(-1, 1).cpu()
        bars[0].update_absolute(done, step.total * images, ("JPEG", to_pil(small), PREVIEW_SIDE))

    return callback


def _joined(made: list[Any]) -> Tensor:
    return torch.cat([to_image(pixels) for pixels in made])


class Extension(ComfyExtension):
    """What ComfyUI asks for the list of nodes."""

    async def get_node_list(self) -> list[type[Any]]:
        """All nodes."""
        return [LoadDecoder, Decode, Upscale, EarlyStop]


async def comfy_entrypoint() -> Extension:
    """ComfyUI calls this when it loads the folder."""
    return Extension()
