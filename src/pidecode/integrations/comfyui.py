# SPDX-License-Identifier: Apache-2.0
"""ComfyUI nodes: load a decoder, decode a LATENT, stop a sampler early, upscale an IMAGE.

The repository's folder `comfyui/` imports this module inside ComfyUI; it uses the node API V3. The inputs that set
how to decode are made from `pidecode.options`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import comfy.model_management
import comfy.utils
import torch
from comfy_api.latest import ComfyExtension, io
from torch import Tensor

from pidecode.decoder import PixelDecoder
from pidecode.errors import SettingError
from pidecode.images import to_pil
from pidecode.integrations.comfyui_latents import (
    early_stop_step,
    image_from_tensor,
    prompt_embeds_from_conditioning,
    tensor_from_image,
    to_latent,
)
from pidecode.options import Command, DecodeOptions, OptionInfo, option_infos
from pidecode.registry.checkpoints import CHECKPOINTS, DECODERS, REPOSITORY
from pidecode.sampling import Callback, Step

DecoderType = io.Custom("PIDECODE_DECODER")

CATEGORY = "pidecode"
DEFAULT = "default"  # choice of a combo that leaves an option to the decoder
MAX_PREVIEW_SIDE = 512


def _unset_number(info: OptionInfo) -> int:
    """The number that leaves an option to the decoder: widgets cannot be empty."""
    return -1 if info.type is int and info.minimum == 0 else 0


def _option_input(name: str, info: OptionInfo) -> Any:
    """The widget of a decode option."""
    if name == "seed":
        text = f"{info.help} It has no effect on a feed-forward decoder such as tiny."
        return io.Int.Input(name, default=0, min=0, max=info.maximum, control_after_generate=True, tooltip=text)
    if info.choices:
        return io.Combo.Input(name, options=[DEFAULT, *info.choices], default=DEFAULT, optional=True, tooltip=info.help)
    if info.type is str:
        return io.String.Input(name, default="", multiline=True, optional=True, tooltip=info.help)
    unset = _unset_number(info)
    tooltip = f"{info.help} {unset} takes the default."
    if info.type is int:
        return io.Int.Input(name, default=unset, min=unset, max=info.maximum, optional=True, tooltip=tooltip)
    return io.Float.Input(
        name, default=float(unset), min=float(unset), max=info.maximum, step=0.01, optional=True, tooltip=tooltip
    )


def _option_inputs(command: Command) -> list[Any]:
    """Widgets of all decode options of a command, and the socket for prompts encoded in ComfyUI."""
    inputs = [_option_input(name, info) for name, info in option_infos(command=command, interface="comfyui").items()]
    text = "Gemma-2 text states in place of the prompt: from a CLIP of type pixeldit."
    return [*inputs, io.Conditioning.Input("conditioning", optional=True, tooltip=text)]


def _decode_options(values: Mapping[str, Any], command: Command, decoder: PixelDecoder) -> DecodeOptions:
    """The options that a node's widgets set; those left at their default are None."""
    chosen: dict[str, Any] = {}
    for name, info in option_infos(command=command, interface="comfyui").items():
        value = values.get(name)
        if name == "seed":
            # The widget always holds a number, so it cannot mean that a seed was asked for.
            chosen[name] = value if decoder.kind in info.kinds else None
        elif info.choices:
            chosen[name] = None if value == DEFAULT else value
        elif info.type is str:
            chosen[name] = (value or "").strip() or None
        else:
            chosen[name] = None if value == _unset_number(info) else value
    conditioning = values.get("conditioning")
    if conditioning is not None:
        if chosen["prompt"] is not None:
            raise SettingError("There are a prompt and a CONDITIONING; give one of them.")
        chosen["prompt_embeds"] = prompt_embeds_from_conditioning(conditioning, decoder)
    return DecodeOptions(**chosen)


def _per_image(options: DecodeOptions, batch: int) -> list[DecodeOptions]:
    """The options of each image: a batch is decoded one by one, in the memory that one image needs."""
    if options.seed is None:
        return [options] * batch
    return [replace(options, seed=seed) for seed in options.seeds(batch)]


def _model_names() -> list[str]:
    """What the loader offers: decoders that ship with the package, and every released one as `space/variant`."""
    rows = [row for row in CHECKPOINTS.values() if row.kind in DECODERS]
    bundled = [row.variant for row in rows if row.bundled]
    return bundled + [f"{row.space}/{row.variant}" for row in rows if not row.bundled]


class LoadDecoderNode(io.ComfyNode):
    """Loads a decoder."""

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
        number_format = None if dtype == "auto" else getattr(torch, dtype)
        space, found, variant = model.partition("/")
        if file.strip():
            decoder = PixelDecoder.from_pretrained(file.strip(), device=device, dtype=number_format)
        elif found:
            decoder = PixelDecoder.from_pretrained(
                REPOSITORY, space=space, variant=variant, device=device, dtype=number_format
            )
        else:
            decoder = PixelDecoder.from_pretrained(model, device=device, dtype=number_format)
        return io.NodeOutput(decoder)


class DecodeNode(io.ComfyNode):
    """Decodes latents to images."""

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
                *_option_inputs("decode"),
                io.Float.Input(
                    "latent_sigma", default=0.0, min=0.0, max=100.0, step=0.0001, round=False, optional=True,
                    tooltip="Noise that is in the latent, from PiD Early Stop; 0 for a finished latent.",
                ),
                io.Model.Input(
                    "model", optional=True,
                    tooltip="The model that made the latent: it tells how latent and noise are scaled.",
                ),
            ],
            outputs=[io.Image.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, decoder: PixelDecoder, samples: Any, latent_sigma: float = 0.0, model: Any = None, **values: Any
    ) -> io.NodeOutput:
        """Decode one latent after another; `values` are those of the option widgets."""
        latent = to_latent(samples, decoder.space, model=model, sigma=latent_sigma)
        options = _per_image(_decode_options(values, "decode", decoder), len(latent))
        callback = _progress_callback(len(latent))
        outputs = [
            decoder.decode(one, options=own, callback=callback) for one, own in zip(latent, options, strict=True)
        ]
        return io.NodeOutput(torch.cat([image_from_tensor(output.tensor) for output in outputs]))


class UpscaleNode(io.ComfyNode):
    """Upscales images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="PidecodeUpscale", display_name="PiD Upscale (pidecode)", category=CATEGORY,
            description="An image to one four times as wide and high: encoded to a latent, decoded larger.",
            inputs=[DecoderType.Input("decoder"), io.Image.Input("image"), *_option_inputs("upscale")],
            outputs=[io.Image.Output()],
        )  # fmt: skip

    @classmethod
    def execute(cls, decoder: PixelDecoder, image: Tensor, **values: Any) -> io.NodeOutput:
        """Upscale one image after another; `values` are those of the option widgets."""
        images = tensor_from_image(image)
        options = _per_image(_decode_options(values, "upscale", decoder), len(images))
        callback = _progress_callback(len(images))
        outputs = [
            decoder.upscale(one[None], options=own, callback=callback) for one, own in zip(images, options, strict=True)
        ]
        return io.NodeOutput(torch.cat([image_from_tensor(output.tensor) for output in outputs]))


class EarlyStopNode(io.ComfyNode):
    """Ends sampling early, and tells the decoder how much noise is left."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="PidecodeEarlyStop",
            display_name="PiD Early Stop (pidecode)",
            category=CATEGORY,
            description=(
                "Put it between a scheduler and SamplerCustom(Advanced), take the sampler's first output (not the "
                "denoised one), and connect latent_sigma and the model to PiD Decode."
            ),
            inputs=[
                io.Sigmas.Input("sigmas"),
                io.Model.Input("model"),
                io.Int.Input(
                    "steps_left", default=-1, min=-1, max=1000,
                    tooltip="Steps to leave out at the end; -1 for what is recommended for the model.",
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas"), io.Float.Output(display_name="latent_sigma")],
        )  # fmt: skip

    @classmethod
    def execute(cls, sigmas: Tensor, model: Any, steps_left: int = -1) -> io.NodeOutput:
        """Cut the sigmas, and return the one at which sampling will end."""
        num_steps = len(sigmas) - 1
        if num_steps < 1:
            raise SettingError("There are no sigmas to cut; connect a scheduler.")
        step = early_stop_step(num_steps, model, None if steps_left < 0 else steps_left)
        return io.NodeOutput(sigmas[: step + 1], float(sigmas[step]))


def _progress_callback(batch: int) -> Callback:
    """A callback that moves ComfyUI's progress bar, shows the estimate, and raises if the user pressed Cancel."""
    bar: Any = None
    done = 0

    def callback(step: Step) -> None:
        nonlocal bar, done
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar = bar or comfy.utils.ProgressBar(step.total * batch)
        done += 1
        stride = max(1, -(-max(step.image.shape[-2:]) // MAX_PREVIEW_SIDE))
        preview = step.image[:1, :, ::stride, ::stride].clamp(-1, 1).cpu()
        bar.update_absolute(done, step.total * batch, ("JPEG", to_pil(preview), MAX_PREVIEW_SIDE))

    return callback


class PidecodeExtension(ComfyExtension):
    """What ComfyUI asks for the list of nodes."""

    async def get_node_list(self) -> list[type[Any]]:
        """All nodes."""
        return [LoadDecoderNode, DecodeNode, UpscaleNode, EarlyStopNode]


async def comfy_entrypoint() -> PidecodeExtension:
    """ComfyUI calls this when it loads the folder."""
    return PidecodeExtension()
