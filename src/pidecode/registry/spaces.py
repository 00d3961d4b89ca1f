# SPDX-License-Identifier: Apache-2.0
"""Latent spaces, the image models that use them, and how those models are called."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from pidecode.errors import SettingError, SizeError

Packing = Literal["none", "two_by_two", "patchified"]
Statistics = Literal["constants", "per_channel", "batch_norm", "per_position", "layer_norm"]
NoiseParametrization = Literal["flow", "variance_preserving"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpace:
    """A space of docs/architecture.md, Latent spaces: what a normalized latent `[B, channels, h, w]` of it means.

    A *normalized* latent is what the image model works with: about zero mean and unit standard deviation. A *raw*
    latent is the output of the space's own encoder and the input of its own decoder.
    """

    name: str  # short name
    title: str  # display name
    channels: int  # channels of the normalized latent
    down: int  # encoder-input pixels per latent cell, along each side
    scale: int = 4  # output pixels per encoder-input pixel, along each side
    packing: Packing = "none"  # how pipelines flatten it to tokens: not at all, 2x2 cells to a token, or one cell
    raw_patch: int = 1  # p raw cells per normalized cell a side: the raw latent is `[B, channels / p^2, p h, p w]`
    # What turns raw into normalized: two constants, a mean and deviation per channel, the autoencoder's batch-norm
    # statistics, a mean and variance per position, or a LayerNorm over channels without weights.
    statistics: Statistics
    scaling_factor: float = 1.0  # "constants": what raw minus shift is multiplied by
    shift_factor: float = 0.0  # "constants": taken from raw first
    mean: tuple[float, ...] = ()  # "per_channel": mean of each channel
    std: tuple[float, ...] = ()  # "per_channel": deviation of each channel
    epsilon: float = 0.0  # added to a variance before its root ("batch_norm", "per_position", "layer_norm")
    # A noised latent is `(1 - s) z + s e` ("flow") or `sqrt(1 - s^2) z + s e` ("variance_preserving").
    noise_parametrization: NoiseParametrization = "flow"
    input_multiple: int = 16  # sides of the encoder's input are cropped or padded to a multiple of this many pixels
    fixed_input: int | None = None  # the one square side, in pixels, the encoder takes; None where any multiple will do
    raw_std: float | None = None  # deviation of a raw latent whose normalized form has 1; None where it does not tell
    # Upper bound of the spread of a clean normalized latent: each channel's standard deviation over its cells,
    # root-mean-square over channels. Measured in FLUX.2's space on 94 photographs, drawings and pages: 0.58 to 0.90;
    # flat and test images less. Where raw latents are wider it lies between such values and the same times `raw_std`.
    spread_limit: float = 2.0

    @property
    def raw_channels(self) -> int:
        """Channels of the raw latent."""
        return self.channels // self.raw_patch**2

    @property
    def pixels_per_cell(self) -> int:
        """Output pixels per (normalized) latent cell, along each side."""
        return self.down * self.scale

    @property
    def token_channels(self) -> int | None:
        """Channels of a packed token; None where pipelines do not pack."""
        return {"none": None, "two_by_two": 4 * self.channels, "patchified": self.channels}[self.packing]

    @property
    def pixels_per_token(self) -> int:
        """Encoder-input pixels per packed token, along each side."""
        return self.down * (2 if self.packing == "two_by_two" else 1)


MIN_STEPS_TO_STOP_EARLY = 12  # in a shorter run the last steps each remove too much noise to be left out


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageModel:
    """A text-to-image model whose latents PiD decodes, and how its diffusers pipeline is called."""

    name: str  # as `--space` and `get_image_model` take it
    space: str  # its latent space
    pipeline: str  # class of its diffusers pipeline
    repository: str  # hub repository of that pipeline
    # Of the pipeline's call, beside prompt, size, steps and generator, by the model's own card or the official demo
    arguments: Mapping[str, float | str]
    num_steps: int  # denoising steps its authors use
    # Of those, the step after which PiD's authors recommend to stop (docs/architecture.md, Latent spaces); `num_steps`
    # itself where only the finished latent is recommended
    stop_step: int

    def recommended_stop(self, num_steps: int) -> int:
        """The step, counted from 1, to stop a run of `num_steps` after; `num_steps` itself for few-step runs."""
        if num_steps < MIN_STEPS_TO_STOP_EARLY:
            return num_steps
        return max(1, round(num_steps * self.stop_step / self.num_steps))


# The public class defaults of diffusers' AutoencoderKLQwenImage.
_QWEN_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
_QWEN_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

_ROWS = (
    LatentSpace(
        name="flux", title="FLUX.1 and Z-Image", channels=16, down=8, packing="two_by_two",
        statistics="constants", scaling_factor=0.3611, shift_factor=0.1159, raw_std=2.77, spread_limit=1.6,
    ),
    LatentSpace(
        name="sd3", title="Stable Diffusion 3", channels=16, down=8,
        statistics="constants", scaling_factor=1.5305, shift_factor=0.0609, raw_std=0.65,
    ),
    LatentSpace(
        name="sdxl", title="Stable Diffusion XL", channels=4, down=8, noise_parametrization="variance_preserving",
        statistics="constants", scaling_factor=0.13025, raw_std=7.68, spread_limit=2.5,
    ),
    LatentSpace(
        name="flux2", title="FLUX.2 and its klein siblings", channels=128, down=16, packing="patchified",
        raw_patch=2, statistics="batch_norm", epsilon=1e-4, raw_std=1.77, spread_limit=1.2,
    ),
    LatentSpace(
        name="qwenimage", title="Qwen-Image", channels=16, down=8, packing="two_by_two",
        statistics="per_channel", mean=_QWEN_MEAN, std=_QWEN_STD, raw_std=2.24, spread_limit=1.5,
    ),
    LatentSpace(
        name="dinov2", title="DINOv2 (RAE)", channels=768, down=16,
        statistics="per_position", epsilon=1e-5, fixed_input=512,
    ),
    LatentSpace(
        name="siglip", title="SigLIP 2 (Scale-RAE)", channels=1152, down=16, scale=8,
        statistics="layer_norm", epsilon=1e-6, fixed_input=256,
    ),
)  # fmt: skip

SPACES: Mapping[str, LatentSpace] = MappingProxyType({row.name: row for row in _ROWS})
"""Every latent space by its name."""

_LONG: dict[str, float | str] = {"max_sequence_length": 512}
_QWEN: dict[str, float | str] = {"true_cfg_scale": 4.0, "negative_prompt": " ", **_LONG}

_MODEL_ROWS: tuple[tuple[str, str, str, int, int, str, dict[str, float | str]], ...] = (
    ("flux", "flux", "Flux", 24, 28, "black-forest-labs/FLUX.1-dev", {"guidance_scale": 3.5, **_LONG}),
    ("flux2", "flux2", "Flux2", 46, 50, "black-forest-labs/FLUX.2-dev", {"guidance_scale": 4.0, **_LONG}),
    ("flux2-klein-4b", "flux2", "Flux2Klein", 4, 4, "black-forest-labs/FLUX.2-klein-4B",
     {"guidance_scale": 1.0, **_LONG}),
    ("flux2-klein-9b", "flux2", "Flux2Klein", 4, 4, "black-forest-labs/FLUX.2-klein-9B",
     {"guidance_scale": 1.0, **_LONG}),
    ("sd3", "sd3", "StableDiffusion3", 24, 28, "stabilityai/stable-diffusion-3-medium-diffusers",
     {"guidance_scale": 4.0}),
    ("sdxl", "sdxl", "StableDiffusionXL", 26, 30, "stabilityai/stable-diffusion-xl-base-1.0", {"guidance_scale": 7.5}),
    ("qwenimage", "qwenimage", "QwenImage", 44, 50, "Qwen/Qwen-Image", _QWEN),
    ("qwenimage-2512", "qwenimage", "QwenImage", 44, 50, "Qwen/Qwen-Image-2512", _QWEN),
    ("zimage", "flux", "ZImage", 46, 50, "Tongyi-MAI/Z-Image", {"guidance_scale": 5.0, **_LONG}),
    ("zimage-turbo", "flux", "ZImage", 9, 9, "Tongyi-MAI/Z-Image-Turbo", {"guidance_scale": 0.0, **_LONG}),
)  # fmt: skip

_MODELS = tuple(
    ImageModel(
        name=name, space=space, pipeline=f"{pipeline}Pipeline", stop_step=stop_step, num_steps=num_steps,
        repository=repository, arguments=MappingProxyType(arguments),
    )
    for name, space, pipeline, stop_step, num_steps, repository, arguments in _MODEL_ROWS
)  # fmt: skip

IMAGE_MODELS: Mapping[str, ImageModel] = MappingProxyType({model.name: model for model in _MODELS})
"""Every image model whose latents lie in one of the spaces, by name."""

# How the classes of an image model begin: of its diffusers pipelines and of its configuration in ComfyUI.
_CLASS_STEMS: Mapping[str, str] = MappingProxyType(
    {model.pipeline.removesuffix("Pipeline"): model.name for model in reversed(_MODELS)}
    | {"ZImage": "zimage", "SD3": "sd3", "SDXL": "sdxl", "Flux2Klein": "flux2-klein-9b"}
)


def has_stem(name: str, stem: str) -> bool:
    """Whether a class's name begins with a model family's; another version number makes another family."""
    return name.startswith(stem) and not name[len(stem) : len(stem) + 1].isdigit()


def recommended_stop(classes: Iterable[str], num_steps: int) -> int:
    """The step, counted from 1, after which PiD's authors recommend to stop a run of `num_steps`.

    Args:
        classes: Names of the classes of a diffusers pipeline or of a ComfyUI model, the most specific first.
        num_steps: Steps of the whole run.

    Raises:
        SettingError: No recommendation is known for that model.
    """
    names = list(classes)
    for name in names:
        stems = [stem for stem in _CLASS_STEMS if has_stem(name, stem)]
        if stems:
            return IMAGE_MODELS[_CLASS_STEMS[max(stems, key=len)]].recommended_stop(num_steps)
    raise SettingError(
        f"No early stop is recommended for {names[0]}; there are recommendations for "
        f"{', '.join(sorted(set(_CLASS_STEMS.values())))}. Name the step yourself."
    )


ALIASES: Mapping[str, str] = MappingProxyType(
    {model.name: model.space for model in _MODELS if model.name != model.space}
    # Models that `generate` does not call and that use the autoencoder of a space as it is. By ComfyUI's latent formats
    # (v0.33, comfy/supported_models.py: Flux, Flux2, SDXL, Wan21, which has Qwen-Image's statistics): Chroma, Lumina 2,
    # LongCat-Image, OmniGen 2, Kandinsky 5 Image, AuraFlow, PixArt-Sigma, Hunyuan-DiT, ERNIE-Image, Lens, Mage-Flow,
    # Krea 2, Anima, JoyImage. By their makers: Boogu (pid/_src/inference/from_ldm_boogu of nv-tlabs/PiD), HiDream
    # (https://github.com/HiDream-ai/HiDream-I1: the VAE of FLUX.1 [schnell]). By other ports of PiD: Ideogram 4
    # (mflux-cv, FLUX.2's), Kolors (SceneWorks, SDXL's). None has a known early stop.
    | {
        "boogu": "flux", "chroma": "flux", "hidream": "flux", "kandinsky-5-image": "flux", "longcat-image": "flux",
        "lumina-2": "flux", "omnigen-2": "flux", "auraflow": "sdxl", "hunyuan-dit": "sdxl", "kolors": "sdxl",
        "pixart-sigma": "sdxl", "ernie-image": "flux2", "ideogram-4": "flux2", "lens": "flux2", "mage-flow": "flux2",
        "anima": "qwenimage", "joyimage": "qwenimage", "krea-2": "qwenimage",
    }
)  # fmt: skip
"""Names of image models that stand for another model's space."""


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """End of an error message about an unknown name: the closest known names, then all of them."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name).lower(), names, n=2, cutoff=0.5)
    closest = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{closest} Known are {', '.join(names)}."


def get_space(name: str) -> LatentSpace:
    """The latent space of that name or alias. Raises SettingError for any other name."""
    key = name.lower() if isinstance(name, str) else name
    row = SPACES.get(ALIASES.get(key, key))
    if row is None:
        raise SettingError(f"There is no latent space {name!r}.{did_you_mean(name, [*SPACES, *ALIASES])}")
    return row


def list_spaces() -> list[dict[str, Any]]:
    """The latent spaces as plain records.

    Returns:
        One dict per space: name, title, aliases, channels, down (image pixels per latent cell, one side), scale
        (output pixels per image pixel, one side), noise_parametrization, image_models.
    """
    return [
        {
            "name": row.name, "title": row.title,
            "aliases": [alias for alias, name in ALIASES.items() if name == row.name], "channels": row.channels,
            "down": row.down, "scale": row.scale, "noise_parametrization": row.noise_parametrization,
            "image_models": [model.name for model in IMAGE_MODELS.values() if model.space == row.name],
        }
        for row in _ROWS
    ]  # fmt: skip


def get_image_model(name: str) -> ImageModel:
    """The image model of that name. Raises SettingError for any other name."""
    model = IMAGE_MODELS.get(name.lower())
    if model is None:
        raise SettingError(f"There is no image model {name!r}.{did_you_mean(name, IMAGE_MODELS)}")
    return model


def diffusion_size(model: str | ImageModel, width: int, height: int) -> tuple[int, int]:
    """Width and height the image model runs at for that output of PiD; SizeError where no such image exists."""
    row = get_image_model(model) if isinstance(model, str) else model
    scale = get_space(row.space).scale
    unit = 16 * scale
    if width < unit or height < unit or width % unit or height % unit:
        near = [max(unit, round(side / unit) * unit) for side in (width, height)]
        raise SizeError(
            f"{row.name} cannot make an image that decodes to {width}x{height}: both sides must be "
            f"multiples of {unit}. The nearest size that fits is {near[0]}x{near[1]}."
        )
    return width // scale, height // scale
