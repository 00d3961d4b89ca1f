# SPDX-License-Identifier: Apache-2.0
"""ComfyUI nodes: load a decoder, decode a LATENT, stop a sampler early, upscale an IMAGE, feed ComfyUI's own samplers.

The repository's folder `comfyui/` imports this module inside ComfyUI; it uses the node API V3. The inputs that set
how to decode are made from `pidecode.options`.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.cli_args
import comfy.model_management
import comfy.model_patcher
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import ComfyExtension, io
from comfy_execution.graph_utils import ExecutionBlocker
from torch import Tensor

from pidecode.decoder import PixelDecoder
from pidecode.devices import default_dtype
from pidecode.encoders.base import on_device
from pidecode.engine.plan import TEXT_ENCODER
from pidecode.errors import CheckpointError, PidecodeError, SettingError
from pidecode.images import SourceImage, resize, to_pil
from pidecode.integrations import comfyui_latents
from pidecode.integrations.comfyui_latents import DEFAULT
from pidecode.latents.latent import Latent
from pidecode.options import MAX_SIGMA, SIGMA_ROUNDING, Command, DecodeOptions, OptionInfo, option_infos
from pidecode.registry.checkpoints import CHECKPOINTS, DECODERS, REPOSITORY
from pidecode.registry.spaces import SPACES
from pidecode.sampling import DEFAULT_STEPS, Callback, Progress, Step, student_times, teacher_times

DecoderType = io.Custom("PIDECODE_DECODER")

FROM_FILE = "as the file says"
"""Choice of a combo that leaves space or kind to the weights file."""
NO_LORA = "none"
MAX_PREVIEW_SIDE = 512
ENCODER_BYTES = 2000
"""Predicted bytes that encoding takes per pixel and byte of the number format, about as ComfyUI predicts."""

_NODE_WORDS = (
    ("load it without.", "set lora to none on the loader."),
    ("leave it out.", "set its widget to the default."),
    ("or leave fidelity out.", "or set fidelity to -1."),
    ("; leave them out.", "; disconnect it or clear the text."),
    ("pass reference=, or leave color_fix out", "connect a VAE, or set color_fix to default"),
    ("Decode in float32 (dtype=torch.float32)", "Set dtype to float32 on the loader"),
    ("load it with dtype=torch.float32", "set dtype to float32 on the loader"),
    ("or pass encoder= to from_pretrained()", "or connect a VAE"),
    ("Choose one: space=", "Choose one as space on the loader: "),
    ("Say kind='student' or kind='teacher'.", "Choose the kind on the loader."),
    ("pass reference=", "connect a VAE"),
    ("Use a smaller input, or end other programs.", "Set memory to low or windows, or make a smaller image."),
    ("or use ready-made states: `pidecode captions export` writes them where it is, and prompt_embeds= reads them.",
     "or connect a CONDITIONING from a CLIP of type pixeldit."),
    ("Or pass text= to PixelDecoder(), or prompt_embeds=.", "Or connect a CONDITIONING from a CLIP of type pixeldit."),
)  # fmt: skip
"""Ends of messages that speak of Python's arguments, and the same in the words of a node."""


@dataclass(frozen=True, slots=True)
class LoadedDecoder:
    """A decoder whose weights ComfyUI's model management moves between its devices."""

    decoder: PixelDecoder
    patcher: Any


class _Movable(torch.nn.Module):
    """Holds a network for a ModelPatcher, which sets `device` and other attributes on what it moves."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net
        self.device = torch.device("cpu")


def manage(decoder: PixelDecoder) -> LoadedDecoder:
    """Give a decoder on the CPU to ComfyUI's model management."""
    device, host = comfy.model_management.get_torch_device(), torch.device("cpu")
    patcher = comfy.model_patcher.ModelPatcher(_Movable(decoder.net), load_device=device, offload_device=host)
    return LoadedDecoder(decoder, patcher)


@contextmanager
def _on_gpu(
    loaded: LoadedDecoder, size: tuple[int, int], encoded_pixels: int = 0, memory: str = DEFAULT
) -> Iterator[PixelDecoder]:
    """Load a decoder as ComfyUI loads models: others make room for the predicted memory of `size` (width, height)."""
    decoder, device = loaded.decoder, loaded.patcher.load_device
    with comfyui_latents.in_less_memory(decoder, memory, size):
        working = decoder.runner.plan_for(size, 1).working
        encoding = ENCODER_BYTES * encoded_pixels * decoder.dtype.itemsize
        comfy.model_management.load_models_gpu(
            [loaded.patcher], memory_required=max(working, encoding), force_full_load=True
        )
        with on_device(decoder.encoder, device if encoded_pixels else None):
            yield decoder


def _with_states(decoder: PixelDecoder, options: DecodeOptions) -> DecodeOptions:
    """Options whose prompt is encoded already, by a text encoder that has left the device again."""
    if decoder.text is None or options.prompt_embeds is not None:
        return options
    device = comfy.model_management.get_torch_device()
    comfy.model_management.free_memory(TEXT_ENCODER, device)
    return options.replace(prompt_embeds=decoder.text.encode_and_unload(options.prompt or "", device))


@contextmanager
def _in_node_words() -> Iterator[None]:
    """Errors in the words of a node, and warnings of a decode where ComfyUI's log shows them."""
    from comfy_execution.utils import get_executing_context
    from server import PromptServer

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        except PidecodeError as error:
            message = str(error)
            for python, node in _NODE_WORDS:
                message = message.replace(python, node)
            raise type(error)(message) from error
    for warning in caught:
        logging.getLogger(__name__).warning("%s", warning.message)
        context = get_executing_context()
        if context is not None and PromptServer.instance is not None:  # text on the node that runs
            PromptServer.instance.send_progress_text(str(warning.message), context.node_id)


# The number that leaves an option to the decoder, where 0 is a choice of its own: widgets cannot be empty.
_UNSET = {"fidelity": -1}


def _option_input(name: str, info: OptionInfo) -> Any:
    """The widget of a decode option."""
    if name == "seed":
        text = f"{info.help} It has no effect on a feed-forward decoder such as tiny."
        return io.Int.Input(name, default=0, min=0, max=info.maximum, control_after_generate=True, tooltip=text)
    if info.choices:
        return io.Combo.Input(name, options=[DEFAULT, *info.choices], default=DEFAULT, optional=True, tooltip=info.help)
    if info.type is str:
        return io.String.Input(name, default="", multiline=True, optional=True, tooltip=info.help)
    unset = _UNSET.get(name, 0)
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
    memory = io.Combo.Input(
        "memory", options=[DEFAULT, "low", "windows"], default=DEFAULT, optional=True,
        tooltip="low is slower, with the same image; windows needs least and changes the image a little.",
    )  # fmt: skip
    return [*inputs, memory, io.Conditioning.Input("conditioning", optional=True, tooltip=text)]


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
            chosen[name] = None if value == _UNSET.get(name, 0) else value
    conditioning = values.get("conditioning")
    if conditioning is not None:
        if chosen["prompt"] is not None:
            raise SettingError("There are a prompt and a CONDITIONING; give one of them.")
        chosen["prompt_embeds"] = comfyui_latents.prompt_embeds_from_conditioning(conditioning, decoder)
    return DecodeOptions(**chosen)


def _released() -> list[str]:
    """The decoders that ship with the package, then every other released one as `space/variant`."""
    rows = sorted((row for row in CHECKPOINTS.values() if row.kind in DECODERS), key=lambda row: not row.bundled)
    return [row.variant if row.bundled else f"{row.space}/{row.variant}" for row in rows]


def _model_names() -> list[str]:
    """The released decoders, and the files in ComfyUI's folder."""
    return [*_released(), *folder_paths.get_filename_list("diffusion_models")]


def _weights_file(model: str, file: str) -> Path | None:
    """The file that the loader names; None where it names a released decoder."""
    typed = file.strip().strip("\"'").strip()
    if typed:
        return Path(typed).expanduser()
    return None if model in _released() else Path(folder_paths.get_full_path_or_raise("diffusion_models", model))


def _fingerprint(path: Path) -> str:
    """Digest of a file by its size, times and samples of its content, so that an overwritten file is another."""
    try:
        about = path.stat()
        digest = hashlib.sha256(f"{path}\0{about.st_size}\0{about.st_mtime_ns}".encode())
        with open(path, "rb") as stream:
            for part in range(64):
                stream.seek(about.st_size * part // 64)
                digest.update(stream.read(1 << 16))
    except OSError as fault:
        return f"{path}: {fault}"
    return digest.hexdigest()


def _schema(node: str, name: str, **rest: Any) -> io.Schema:
    return io.Schema(node_id=f"Pidecode{node}", display_name=f"{name} (pidecode)", category="pidecode", **rest)


class LoadDecoderNode(io.ComfyNode):
    """Loads a decoder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        spaces, kinds = [FROM_FILE, *SPACES], [FROM_FILE, "student", "teacher"]
        return _schema(
            "LoadDecoder",
            "Load PiD Decoder",
            description="A pixel decoder of one latent space. `pidecode pull` fetches the released ones.",
            inputs=[
                io.Combo.Input(
                    "model", options=_model_names(), default=_model_names()[0],
                    tooltip="A decoder that ships or was pulled, or a file in models/diffusion_models.",
                ),
                io.Combo.Input(
                    "dtype", options=["auto", "bfloat16", "float16", "float32"], default="auto",
                    tooltip="auto is bfloat16 on a GPU. If images come out black, take float32.",
                ),
                io.String.Input(
                    "file", default="", optional=True, tooltip="A weights file elsewhere, in place of the model above."
                ),
                io.Combo.Input(
                    "space", options=spaces, default=FROM_FILE, optional=True,
                    tooltip="Latent space of a file that was renamed and does not say it.",
                ),
                io.Combo.Input(
                    "kind", options=kinds, default=FROM_FILE, optional=True,
                    tooltip="Kind of a file that was renamed and does not say it.",
                ),
                io.Combo.Input(
                    "lora", options=[NO_LORA, *folder_paths.get_filename_list("loras")], default=NO_LORA,
                    optional=True, tooltip="A LoRA of the decoder (not of the image model), in models/loras.",
                ),
                io.Float.Input("lora_strength", default=1.0, min=-10.0, max=10.0, step=0.05, optional=True),
            ],
            outputs=[DecoderType.Output(display_name="decoder"), io.Model.Output(display_name="model")],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, model: str, file: str = "", lora: str = NO_LORA, **_others: Any) -> list[str]:
        """What ComfyUI compares to know whether to load again: the files' content."""
        path = _weights_file(model, file)
        files = [path] if path else []
        if lora != NO_LORA:
            files.append(Path(folder_paths.get_full_path_or_raise("loras", lora)))
        return [_fingerprint(entry) for entry in files]

    @classmethod
    def execute(
        cls, model: str, dtype: str = "auto", file: str = "", space: str = FROM_FILE, kind: str = FROM_FILE,
        lora: str = NO_LORA, lora_strength: float = 1.0,
    ) -> io.NodeOutput:  # fmt: skip
        """Load it into main memory; a node that decodes has ComfyUI move it to the device."""
        auto = default_dtype(comfy.model_management.get_torch_device())
        named: dict[str, Any] = {"device": "cpu", "dtype": auto if dtype == "auto" else getattr(torch, dtype)}
        told: dict[str, Any] = {name: value for name, value in (("space", space), ("kind", kind)) if value != FROM_FILE}
        path = _weights_file(model, file)
        with _in_node_words():
            if path is not None and not path.is_file():
                raise CheckpointError(f"{path} is no file on this machine; correct the loader's file.")
            if path is None and told:
                raise SettingError(
                    f"{model} says its space and kind itself; set both to {FROM_FILE!r}, they are for renamed files."
                )
            if path is None and "/" in model:
                own, _, variant = model.partition("/")
                decoder = PixelDecoder.from_pretrained(REPOSITORY, space=own, variant=variant, **named)
            else:
                decoder = PixelDecoder.from_pretrained(path or model, **named, **told)
            if lora != NO_LORA:
                decoder.load_lora(folder_paths.get_full_path_or_raise("loras", lora), lora_strength)
        try:
            model = comfyui_latents.core_model(decoder)
        except PidecodeError as error:  # said on a node that the output is connected to
            model = ExecutionBlocker(str(error))
        return io.NodeOutput(manage(decoder), model)


def _source_inputs() -> list[Any]:
    """Inputs that say what a LATENT holds."""
    return [
        io.Float.Input(
            "latent_sigma", default=0.0, min=0.0, max=100.0, step=0.0001, round=False, optional=True,
            tooltip="Noise that is in the latent, from PiD Early Stop; 0 for a finished latent.",
        ),
        io.Model.Input(
            "model", optional=True, tooltip="The model that made the latent: it tells how latent and noise are scaled."
        ),
    ]  # fmt: skip


def _latent_for(decoder: PixelDecoder, samples: Any, model: Any, sigma: float) -> Latent:
    """The LATENT as the decoder reads it; SettingError for more noise than the decoder was trained on."""
    latent = comfyui_latents.to_latent(samples, decoder.space, model=model, sigma=sigma)
    if (level := float(latent.sigmas.max())) > decoder.max_sigma + SIGMA_ROUNDING:
        raise SettingError(
            f"The latent's noise level is {level:.2f}; {decoder.name} was trained up to {decoder.max_sigma:g}. Let the "
            "sampler run further (PiD Early Stop, steps_left)."
        )
    return latent


class DecodeNode(io.ComfyNode):
    """Decodes latents to images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "Decode",
            "PiD Decode",
            description="A latent straight to an image four times (SigLIP: eight times) what VAE Decode makes of it.",
            inputs=[
                DecoderType.Input("decoder"),
                io.Latent.Input("samples"),
                *_option_inputs("decode"),
                *_source_inputs(),
                io.Vae.Input(
                    "vae", optional=True, tooltip="Decodes the reference of color_fix, in place of the decoder's own."
                ),
            ],
            outputs=[io.Image.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, decoder: LoadedDecoder, samples: Any, latent_sigma: float = 0.0, model: Any = None, vae: Any = None,
        memory: str = DEFAULT, **values: Any,
    ) -> io.NodeOutput:  # fmt: skip
        """Decode one latent after another; `values` are those of the option widgets."""
        own = decoder.decoder
        with _in_node_words():
            latent = _latent_for(own, samples, model, latent_sigma)
            given = _with_states(own, _decode_options(values, "decode", own))
            if vae is not None:
                given = _with_reference(given, vae, samples, latent_sigma)
            height, width = latent.output_size
            fixes = given.color_fix not in (None, "off") and given.reference is None
            encoded = height * width // own.scale**2 if fixes else 0
            show, moves = _callbacks(len(latent))
            with _on_gpu(decoder, (width, height), encoded, memory):
                outputs = [
                    own.decode(one, options=options, callback=show, progress_callback=moves(index))
                    for index, (one, options) in enumerate(
                        zip(latent, given.per_image(own.kind, len(latent)), strict=True)
                    )
                ]
        return io.NodeOutput(torch.cat([comfyui_latents.image_from_tensor(output.tensor) for output in outputs]))


def _with_reference(options: DecodeOptions, vae: Any, samples: Mapping[str, Any], sigma: float) -> DecodeOptions:
    """Options whose color fix corrects against a VAE's images of the latents."""
    if options.color_fix in (None, "off"):
        raise SettingError("The VAE acts with a color_fix only; choose one, or disconnect the VAE.")
    if sigma:
        raise SettingError(f"latent_sigma is {sigma:g}: the VAE's image of a noisy latent is no color reference.")
    images = vae.decode(samples["samples"])
    images = images.flatten(0, 1) if images.ndim == 5 else images
    return options.replace(
        reference=[SourceImage(tensor=image) for image in comfyui_latents.tensor_from_image(images)[:, None]]
    )


class UpscaleNode(io.ComfyNode):
    """Upscales images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        size = "{} of the result in pixels, up to four times the image's; 0 keeps the image's shape."
        return _schema(
            "Upscale",
            "PiD Upscale",
            description="An image to one four times as wide and high: encoded to a latent, decoded larger.",
            inputs=[
                DecoderType.Input("decoder"),
                io.Image.Input("image"),
                *_option_inputs("upscale"),
                *(
                    io.Int.Input(name, default=0, min=0, max=65535, optional=True, tooltip=size.format(name.title()))
                    for name in ("width", "height")
                ),
                io.Vae.Input(
                    "vae", optional=True,
                    tooltip="Encodes the image, in place of the decoder's own encoder: the VAE of its latent space.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="The image's transparency, enlarged with it."),
            ],
            outputs=[io.Image.Output(), io.Mask.Output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, decoder: LoadedDecoder, image: Tensor, vae: Any = None, mask: Any = None, width: int = 0, height: int = 0,
        memory: str = DEFAULT, **values: Any,
    ) -> io.NodeOutput:  # fmt: skip
        """Upscale one image after another; `values` are those of the option widgets."""
        own = copy.copy(decoder.decoder)
        with _in_node_words():
            images = comfyui_latents.tensor_from_image(image)
            alpha = comfyui_latents.alpha_of(image, mask)
            target = comfyui_latents.target_size(images, own.scale, width, height)
            if vae is not None:
                own.encoder = comfyui_latents.vae_encoder(vae, own)
            given = _with_states(own, _decode_options(values, "upscale", own))
            rows, columns = images.shape[-2:]
            multiple = own.space.input_multiple
            padded = (-(-columns // multiple) * multiple * own.scale, -(-rows // multiple) * multiple * own.scale)
            show, moves = _callbacks(len(images))
            enlarged = []
            with _on_gpu(replace(decoder, decoder=own), padded, rows * columns if vae is None else 0, memory):
                for index, options in enumerate(given.per_image(own.kind, len(images))):
                    one = SourceImage(tensor=images[index : index + 1])
                    output = own.upscale(one, options=options, callback=show, progress_callback=moves(index))
                    pixels = output.tensor.float().cpu()
                    if target is not None and target != pixels.shape[-2:]:
                        pixels = resize(pixels, *target, method="lanczos").clamp(-1, 1)
                    enlarged.append(pixels)
        pixels = comfyui_latents.image_from_tensor(torch.cat(enlarged))
        if bool((alpha == 1).all()):
            return io.NodeOutput(pixels, torch.zeros(pixels.shape[:3]))
        large = resize(alpha[:, None].expand(-1, 3, -1, -1) * 2 - 1, *pixels.shape[1:3])[:, 0]
        return io.NodeOutput(pixels, (0.5 - large / 2).clamp(0, 1))


class EarlyStopNode(io.ComfyNode):
    """Ends sampling early, and tells the decoder how much noise is left."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "EarlyStop",
            "PiD Early Stop",
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
                DecoderType.Input(
                    "decoder", optional=True, tooltip="Checked before sampling: its space, noise and memory."
                ),
                io.Latent.Input(
                    "samples", optional=True, tooltip="The latent that the sampler begins with: it tells the size."
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas"), io.Float.Output(display_name="latent_sigma")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, sigmas: Tensor, model: Any, steps_left: int = -1, decoder: LoadedDecoder | None = None, samples: Any = None
    ) -> io.NodeOutput:
        """Cut the sigmas, and return the one at which sampling will end."""
        with _in_node_words():
            most = MAX_SIGMA if decoder is None else decoder.decoder.max_sigma
            if samples is not None and decoder is None:
                raise SettingError(
                    "samples tell the size to a decoder's plan; connect the decoder, or disconnect them."
                )
            if decoder is not None:
                comfyui_latents.check_space(decoder.decoder.space, model)
            step = comfyui_latents.early_stop_step(sigmas, model, None if steps_left < 0 else steps_left, most)
            if decoder is not None and samples is not None:
                device = decoder.patcher.load_device
                comfyui_latents.require_memory(
                    decoder.decoder, samples, comfy.model_management.get_total_memory(device)
                )
        return io.NodeOutput(sigmas[: step + 1], float(sigmas[step]))


class ConditioningNode(io.ComfyNode):
    """Prepares what ComfyUI's own samplers need to run a decoder as a MODEL."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return _schema(
            "Conditioning",
            "PiD Conditioning",
            description=(
                "For a sampler that runs the loader's MODEL: CONDITIONING that carries the latent, scaled as the "
                "decoder was trained, an empty image of the right size, and the decoder's own SIGMAS. Decode the "
                "result with a VAE Loader's pixel_space."
            ),
            inputs=[
                DecoderType.Input("decoder"),
                io.Latent.Input("samples"),
                io.Conditioning.Input(
                    "positive", optional=True, tooltip="Gemma-2 text states, from a CLIP of type pixeldit."
                ),
                io.Conditioning.Input("negative", optional=True, tooltip="The same, of a teacher's negative prompt."),
                io.String.Input(
                    "prompt", default="", multiline=True, optional=True, tooltip="A text in place of positive."
                ),
                io.Int.Input(
                    "num_steps", default=0, min=0, max=1000, optional=True,
                    tooltip="Steps of the SIGMAS: 1 to 4 for a distilled decoder. 0 takes the default.",
                ),
                *_source_inputs(),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive"), io.Conditioning.Output(display_name="negative"),
                io.Latent.Output(display_name="image"), io.Sigmas.Output(display_name="sigmas"),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, decoder: LoadedDecoder, samples: Any, positive: Any = None, negative: Any = None, prompt: str = "",
        num_steps: int = 0, latent_sigma: float = 0.0, model: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        """Attach the latent to both CONDITIONINGs; where there is no negative one, the positive serves as such."""
        own = decoder.decoder
        with _in_node_words():
            latent = _latent_for(own, samples, model, latent_sigma)
            if positive is None:
                options = _with_states(own, DecodeOptions(prompt=prompt.strip() or None))
                if options.prompt_embeds is None:
                    raise SettingError(f"{own.name} reads no text encoder here; connect positive.")
                positive = [[options.prompt_embeds, {}]]
            elif prompt.strip():
                raise SettingError("There are a prompt and a CONDITIONING; give one of them.")
            given = (positive, negative or positive)
            states = [comfyui_latents.prompt_embeds_from_conditioning(conditioning, own) for conditioning in given]
            height, width = latent.output_size
            if own.kind == "student":
                sigmas = torch.tensor(student_times(num_steps or DEFAULT_STEPS["student"]))
            else:
                sigmas = teacher_times(num_steps or DEFAULT_STEPS["teacher"], own.flow_shift(height, width)).float()
        # What ComfyUI's PiD reads the latent and its noise level from.
        carried = {"lq_latent": latent.tensor, "degrade_sigma": latent.sigmas.float()}
        conditionings = [[[embeds, {**c[0][1], **carried}]] for embeds, c in zip(states, given, strict=True)]
        return io.NodeOutput(*conditionings, {"samples": torch.zeros(len(latent), 3, height, width)}, sigmas)


def _callbacks(batch: int) -> tuple[Callback | None, Callable[[int], Callable[[Progress], None]]]:
    """What moves ComfyUI's progress bar through a batch, shows estimates, and raises if the user pressed Cancel.

    A callback for steps (None where --preview-method is none), and a function of an image's index that makes its
    callback for progress.
    """
    total = 1000 * batch
    bar = comfy.utils.ProgressBar(total)
    done = 0

    def move(index: int) -> Callable[[Progress], None]:
        def report(progress: Progress) -> None:
            nonlocal done
            comfy.model_management.throw_exception_if_processing_interrupted()
            done = round(1000 * (index + progress.done))
            bar.update_absolute(done, total)

        return report

    def show(step: Step) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        stride = max(1, -(-max(step.image.shape[-2:]) // MAX_PREVIEW_SIDE))
        preview = step.image[:1, :, ::stride, ::stride].clamp(-1, 1).cpu()
        bar.update_absolute(done, total, ("JPEG", to_pil(preview), MAX_PREVIEW_SIDE))

    previews = getattr(comfy.cli_args.args.preview_method, "value", "none") != "none"
    return (show if previews else None), move


class PidecodeExtension(ComfyExtension):
    """What ComfyUI asks for the list of nodes."""

    async def get_node_list(self) -> list[type[Any]]:
        """All nodes."""
        return [LoadDecoderNode, DecodeNode, UpscaleNode, EarlyStopNode, ConditioningNode]


async def comfy_entrypoint() -> PidecodeExtension:
    """ComfyUI calls this when it loads the folder."""
    return PidecodeExtension()
