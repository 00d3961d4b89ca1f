# SPDX-License-Identifier: Apache-2.0
"""Decode options and runtime options: the one list that Python, command line, HTTP, batch and ComfyUI are made from.

Each field of `DecodeOptions` carries an `OptionInfo`: what it means, its range or choices, the kinds of decoder on
which it acts, the commands it belongs to and the interfaces that offer it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from numbers import Integral, Real
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, get_args

from pidecode.errors import SettingError, SizeError
from pidecode.registry.checkpoints import Sampler

if TYPE_CHECKING:
    from torch import Tensor

DecoderKind = Literal["feed-forward", "student", "teacher"]
"""How an image is formed: by one evaluation of a network, by a few distilled steps, or by many guided ones."""
ColorFix = Literal["off", "auto", "coarse", "fine", "back-projection"]
Fit = Literal["pad", "crop"]
Command = Literal["decode", "upscale"]
Interface = Literal["cli", "http", "batch", "comfyui"]
FileFormat = Literal["png", "webp", "jpeg", "jpg"]
Sides = tuple[int | None, int | None]  # width and height in pixels; None for one of them keeps the image's shape

COLOR_FIXES: tuple[ColorFix, ...] = get_args(ColorFix)
MAX_SEED = 2**64 - 1  # largest seed torch's generators take, and ComfyUI's largest
MAX_SIDE = 65_535  # largest side of an image, in pixels, that is worth asking for: the limit of JPEG
MAX_STRETCH = 0.02  # part of a side by which a result may be stretched to a size that was asked for
SIGMA_ROUNDING = 1e-6  # what a noise level may exceed its bound by: sigmas are float32
MAX_SIGMA = 0.8  # largest noise level of latents in PiD's training (https://arxiv.org/abs/2605.23902)

_PIXEL_DIFFUSION: tuple[DecoderKind, ...] = ("student", "teacher")


@dataclass(frozen=True, slots=True, kw_only=True)
class OptionInfo:
    """What interfaces need to know of an option."""

    help: str  # one or two plain sentences
    type: type  # of a single value; `tuple` for a size, `PathLike` for a file, `object` for what is Python only
    choices: tuple[str, ...] = ()  # the values there are, where they can be listed
    minimum: float | None = None  # included
    maximum: float | None = None  # included
    kinds: tuple[DecoderKind, ...] = get_args(DecoderKind)  # of decoders on which it acts; others refuse it
    commands: tuple[Command, ...] = get_args(Command)  # decoding a latent, enlarging an image, or both
    interfaces: tuple[Interface, ...] = get_args(Interface)  # who offers it besides Python


def _option(help: str, type: type, **rest: Any) -> Any:
    info = OptionInfo(help=help, type=type, **rest)
    return field(default=None, compare=type not in (object, PathLike), metadata={"option": info})


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions:
    """How a latent is decoded; None means the decoder's default, and an option that cannot act is refused.

    Raises:
        SettingError: A value has the wrong type, is out of range or is none of the choices.
    """

    seed: int | Sequence[int] | None = _option(
        "Seed of the noise; each further image of a batch takes the next number.",
        int, minimum=0, maximum=MAX_SEED, kinds=_PIXEL_DIFFUSION,
    )  # fmt: skip
    num_steps: int | None = _option(
        "Denoising steps: 1 to 4 for a distilled decoder (default 4); a teacher takes more (default 25).",
        int, minimum=1, maximum=1000, kinds=_PIXEL_DIFFUSION,
    )  # fmt: skip
    sampler: Sampler | None = _option(
        "Sampler of a distilled decoder: sde draws fresh noise at every step (default), ode does not.",
        str, choices=get_args(Sampler), kinds=("student",),
    )  # fmt: skip
    sigma: float | None = _option(
        "Noise level to add to a clean latent before decoding; more leaves more to the decoder.",
        float, minimum=0.0, maximum=MAX_SIGMA,
    )  # fmt: skip
    size: Sides | None = _option(
        "Width and height of the result in pixels; one alone keeps the shape. It is downsampled to that, but where "
        "students and teachers decode a latent they decode to that size.",
        tuple, minimum=16, maximum=MAX_SIDE, interfaces=("cli", "http", "batch"),
    )  # fmt: skip
    scale: float | None = _option(
        "Enlargement; below the decoder's own scale the result is downsampled.",
        float, minimum=1.0, maximum=8.0, commands=("upscale",), interfaces=("cli", "http", "batch"),
    )  # fmt: skip
    guidance_scale: float | None = _option(
        "Classifier-free guidance of a teacher (default 5).",
        float, minimum=1.0, maximum=100.0, kinds=("teacher",),
    )  # fmt: skip
    shift: float | None = _option(
        "Flow shift of a teacher's schedule; by default it grows with the image as in training.",
        float, minimum=0.01, maximum=100.0, kinds=("teacher",), interfaces=("cli", "http", "batch"),
    )  # fmt: skip
    prompt: str | Sequence[str] | None = _option(
        "What the image shows, for decoders that read text; by default the latent's own prompt.",
        str, kinds=_PIXEL_DIFFUSION,
    )  # fmt: skip
    negative_prompt: str | None = _option(
        "What a teacher's guidance leads away from.",
        str, kinds=("teacher",), interfaces=("cli", "http", "batch"),
    )  # fmt: skip
    prompt_embeds: Tensor | str | PathLike[str] | None = _option(
        "Ready-made states of the prompt in place of the text encoder: a file of `pidecode captions export`.",
        PathLike, kinds=_PIXEL_DIFFUSION, interfaces=("cli",),
    )  # fmt: skip
    color_fix: ColorFix | None = _option(
        "Correct the image against a smaller reference: coarse (brightness and hue over wide areas), fine (down to a "
        "few pixels) or back-projection (all that the reference shows); auto is coarse where colors drift far.",
        str, choices=COLOR_FIXES,
    )  # fmt: skip
    fidelity: float | None = _option(
        "How much back-projection holds of the image being enlarged: from 1 (all that it shows) to 0 (its colors; the "
        "rest is what the decoder makes of it).",
        float, minimum=0.0, maximum=1.0, commands=("upscale",),
    )  # fmt: skip
    reference: Any = _option(
        "Image that the color fix corrects against, and color drift is reported against; by default the image being "
        "enlarged, or the VAE's decode of the clean latent.",
        object, interfaces=(),
    )  # fmt: skip
    fit: Fit | None = _option(
        "For sides that the encoder cannot divide: pad by mirrored edges and cut back (default), or crop.",
        str, choices=get_args(Fit), commands=("upscale",),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, info in option_infos().items():
            value = _plain(getattr(self, name))
            object.__setattr__(self, name, value)
            if value is not None:
                _check(name, info, value)
        if self.size is not None and self.scale is not None:
            raise SettingError("size and scale both say how large the result is; give one.")

    def replace(self, **given: Any) -> DecodeOptions:
        """The same options with those given (not None) in place of their own."""
        return replace(self, **{name: value for name, value in given.items() if value is not None})

    def require_acting(self, kind: DecoderKind, command: Command, name: str) -> None:
        """Raise SettingError for a given option that has no effect on this kind of decoder, or in this command."""
        for option, info in option_infos().items():
            if getattr(self, option) is None:
                continue
            if kind not in info.kinds:
                acts = " and ".join(f"{other} decoders" for other in info.kinds)
                raise SettingError(f"{option} acts on {acts} only, and {name} is a {kind} decoder; leave it out.")
            if command not in info.commands:
                acts = " and ".join(info.commands)
                raise SettingError(f"{option} acts in {acts} only, and this is {command}; leave it out.")

    def with_upscale_defaults(self, kind: DecoderKind) -> DecodeOptions:
        """The same options with the color fix that `upscale` uses by default.

        A feed-forward decoder is held to the image, unless `sigma` asks it to invent.

        Raises:
            SettingError: `fidelity` has no effect with this color fix.
        """
        held = kind == "feed-forward" and not self.sigma
        chosen = self.replace(color_fix=self.color_fix or ("back-projection" if held else None))
        if chosen.fidelity is not None and chosen.color_fix != "back-projection":
            raise SettingError(
                f"fidelity acts with color_fix back-projection only, and color_fix is {chosen.color_fix or 'off'}; "
                "change one of them, or leave fidelity out."
            )
        return chosen

    def of_image(self, index: int, count: int) -> DecodeOptions:
        """The options of one of several images that are run one after another: its own seed, prompt and so on."""
        own: dict[str, Any] = {}
        for name, axes in {"seed": 1, "prompt": 1, "prompt_embeds": 3, "reference": 4}.items():
            value = getattr(self, name)
            if isinstance(value, (tuple, list)) and (count > 1 or len(value) == 1):
                if len(value) != count:
                    raise SettingError(f"{name} has {len(value)} values for {count} images; give one, or one for each.")
                own[name] = value[index]
            elif count > 1 and getattr(value, "ndim", 0) == axes and len(value) == count:
                own[name] = value[index : index + 1]
        return self.replace(**own)

    def per_image(self, kind: DecoderKind, count: int) -> list[DecodeOptions]:
        """The options of each image of a batch that is decoded one by one, with consecutive seeds."""
        seeds = [None] * count if kind == "feed-forward" else self.seeds(count)
        return [replace(self, seed=seed).of_image(index, count) for index, seed in enumerate(seeds)]

    def completed_size(self, natural: tuple[int, int], step: int = 1) -> tuple[int, int]:
        """`size` with both sides; one that was not given follows the natural shape, as a multiple of `step` pixels."""
        (width, height), (given_width, given_height) = natural, self.size or natural
        if given_width is None:
            given_width = max(1, round((given_height or 1) * width / height / step)) * step
        if given_height is None:
            given_height = max(1, round(given_width * height / width / step)) * step
        if not 0.5 <= (given_width * height) / (given_height * width) <= 2:
            raise SizeError(
                f"{given_width}x{given_height} stretches a {width}x{height} image more than twofold; choose a size of "
                "its shape, or give one side alone."
            )
        return given_width, given_height

    def at_natural_size(self) -> DecodeOptions:
        """The same options without `size` and `scale`."""
        return replace(self, size=None, scale=None)

    def downsampled_size(self, largest: tuple[int, int], scale: int, name: str) -> tuple[int, int]:
        """Width and height of the result, by `size` or `scale`, where a decoder makes `largest` at its own `scale`.

        Raises:
            SizeError: The result would be enlarged or stretched.
        """
        (width, height), (wanted_width, wanted_height) = largest, self.completed_size(largest)
        if self.scale is not None:
            if self.scale > scale:
                limit = f"{name} enlarges {scale} times; give 1 to {scale}, or enlarge the result once more"
                raise SizeError(f"scale is {self.scale:g}, and {limit}.")
            return max(1, round(width * self.scale / scale)), max(1, round(height * self.scale / scale))
        size = f"size is {wanted_width}x{wanted_height}"
        if wanted_width > width or wanted_height > height:
            limit = f"{name} makes {width}x{height} of this; ask for that or less, or enlarge the result once more"
            raise SizeError(f"{size}, and {limit}.")
        if abs(wanted_width * height - wanted_height * width) > MAX_STRETCH * wanted_width * height:
            fix = f"give one side alone, or {wanted_width}x{max(1, round(wanted_width * height / width))}"
            raise SizeError(f"{size}, which stretches an image that becomes {width}x{height}; {fix}.")
        return wanted_width, wanted_height

    def seeds(self, batch: int) -> list[int]:
        """One seed per image of a batch; SettingError for several that are not one for each."""
        if self.seed is None or isinstance(self.seed, int):
            return [((self.seed or 0) + index) % (MAX_SEED + 1) for index in range(batch)]
        if len(self.seed) != batch:
            raise SettingError(f"There are {len(self.seed)} seeds for {batch} images; give one, or one for each.")
        return list(self.seed)


Attention = Literal["auto", "cudnn", "flash", "flash-3", "flash-4", "efficient", "math", "int8"]
ATTENTIONS: tuple[Attention, ...] = get_args(Attention)


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """How an image is written.

    Raises:
        SettingError: A value is out of range, or cannot act.
    """

    format: FileFormat | None = _option(
        "File format of the result: png unless the name says otherwise.", str, choices=get_args(FileFormat)
    )
    quality: int | None = _option(
        "Quality of webp and jpeg files; 95 if not given. PNG is exact.", int, minimum=1, maximum=100
    )

    def __post_init__(self) -> None:
        for name, info in option_infos(SaveOptions).items():
            if getattr(self, name) is not None:
                _check(name, info, getattr(self, name))
        if self.quality is not None and self.format in (None, "png"):
            raise SettingError("quality acts on webp and jpeg only, and format is png; leave it out, or change format.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """How a network runs. All act on students and teachers only; none but "int8" changes more than rounding.

    Attributes:
        compile: Run fused kernels, and CUDA graphs where they can act; the first image waits for the compiler. What
            differs from the plain ops on a small image is left out, with a warning. Experimental.
        cuda_graphs: Capture one evaluation per image size and replay it, on CUDA devices; None with `compile` where
            that can act. Experimental.
        attention: "auto" takes the fastest kernel, as measured at the first use on an accelerator; "int8" multiplies
            queries and keys in eight bits, on GPUs with triton or sageattention (experimental); or an exact kernel.
    """

    compile: bool = False
    cuda_graphs: bool | None = None
    attention: Attention = "auto"

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise SettingError(f"attention is {self.attention!r}; it must be one of {', '.join(ATTENTIONS)}.")


def option_infos(
    options: type[DecodeOptions | SaveOptions] = DecodeOptions,
    *,
    command: Command | None = None,
    interface: Interface | None = None,
) -> dict[str, OptionInfo]:
    """Name and `OptionInfo` of every option, in order; only those of a command or an interface, if named."""
    infos: dict[str, OptionInfo] = {entry.name: entry.metadata["option"] for entry in fields(options)}
    if command is not None:
        infos = {name: info for name, info in infos.items() if command in info.commands}
    if interface is not None:
        infos = {name: info for name, info in infos.items() if interface in info.interfaces}
    return infos


def _plain(value: Any) -> Any:
    """Numbers of NumPy and single-valued tensors as Python's, which metadata can hold."""
    if hasattr(value, "item") and getattr(value, "ndim", 1) == 0:
        return value.item()
    if isinstance(value, (tuple, list)):
        return type(value)(_plain(one) for one in value)
    if isinstance(value, bool) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def _check(name: str, info: OptionInfo, value: Any) -> None:
    """Raise SettingError for a value of the wrong type, out of range or none of the choices."""
    kind, values, several = info.type, [value], isinstance(value, (tuple, list))
    if kind is object:
        return
    if kind is PathLike:
        if not isinstance(value, (str, PathLike)) and not hasattr(value, "shape"):
            raise SettingError(f"{name} is a {type(value).__name__}; it must be a tensor or a .safetensors file.")
        return
    if kind is tuple:
        kind, values = int, [side for side in value if side is not None] if several and len(value) == 2 else []
        if not values or not all(_is_a(int, side) for side in values):
            raise SettingError(
                f"{name} is {value!r:.40}; it must be width and height in pixels, such as (2048, 1536), or one of them "
                "and None."
            )
    elif kind in (int, str) and several:
        if name not in ("seed", "prompt"):
            raise SettingError(f"{name} is {value!r}; one value acts on all images.")
        values = list(value)
    for one in values:
        if not _is_a(kind, one):
            raise SettingError(f"{name} is {one!r}; it must be {_TYPES[kind]}.")
        if info.choices and one not in info.choices:
            raise SettingError(f"{name} is {one!r}; it must be one of {', '.join(info.choices)}.")
        low, high = info.minimum, info.maximum
        if low is not None and high is not None and not low <= one <= high:
            # Python refuses to write out thousands of digits.
            huge = isinstance(one, int) and one.bit_length() > 80
            shown = f"a number of {one.bit_length()} bits" if huge else str(one)
            largest = str(high) if isinstance(high, int) else f"{high:g}"
            raise SettingError(f"{name} is {shown}; it must be from {low:g} to {largest}.")


_TYPES = {int: "a whole number", float: "a number", str: "text"}


def _is_a(kind: type, value: Any) -> bool:
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, kind) and not isinstance(value, bool)
