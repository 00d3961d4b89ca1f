# SPDX-License-Identifier: Apache-2.0
"""Shapes of networks: PiDConfig with the released v1, v1.5 and backbone networks and a debug model; those of `tiny`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeVar, get_args

from pidecode.errors import SettingError

GateMode = Literal["per_token", "per_channel"]
Padding = Literal["zeros", "replicate", "reflect"]
RopeMode = Literal["original", "ntk_aware"]
Prediction = Literal["velocity", "x0"]

_CHOICES = {"gate": GateMode, "adapter_padding": Padding, "rope_mode": RopeMode, "prediction": Prediction}
_MAY_BE_ZERO = {"text_dim", "latent_channels", "adapter_blocks", "adapter_image_channels", "pixel_depth"}

MAX_WIDTH = 65536  # largest width or count in a network's configuration: files are configured by whoever wrote them
MAX_BLOCKS = 256  # most blocks a stage of a file's network may have
MAX_STAGES = 16  # most stages of another library's autoencoder
MAX_VALUE = 1 << 20  # largest whole number in another library's config.json: sizes and vocabularies


def _check_count(name: str, value: Any, *, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise SettingError(f"{name} is {value!r}; it must be a whole number from {least} to {most}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PiDConfig:
    """Everything needed to build a PiDNet (docs/architecture.md, Network and Adapter).

    Sizes are in channels, tokens or pixels. `text_dim=0` builds a network without a text stream;
    `latent_channels=0` one without an adapter (the bare text-to-image backbone).

    Raises:
        SettingError: The values do not fit together; the message names the field.
    """

    hidden_size: int = 1536  # width D of patch and prompt tokens
    num_heads: int = 24  # heads of the patch blocks' attention
    patch_depth: int = 14  # patch blocks
    patch_size: int = 16  # pixels of a patch, along each side
    pixel_hidden_size: int = 16  # width C of a pixel
    pixel_depth: int = 2  # pixel blocks
    pixel_attn_hidden_size: int = 1152  # width of the pixel blocks' attention, one token per patch
    pixel_num_heads: int = 16  # its heads
    text_dim: int = 2304  # width of prompt states; 0 builds no text stream
    text_length: int = 300  # most prompt tokens read
    text_rope: bool = True  # whether prompt tokens are rotated by their position
    text_rope_theta: float = 10000.0  # base of that rotation
    rope_mode: RopeMode = "ntk_aware"  # whether the image rotation's base follows the grid's size
    rope_reference: tuple[int, int] = (1024, 1024)  # height, width in pixels at which it equals the plain rotation
    latent_channels: int = 16  # channels of the normalized latent; 0 builds no adapter
    latent_down: int = 8  # pixels of the low-resolution image per latent cell, along each side
    latent_unpatchify: int = 1  # cells a latent cell is unpacked into, along each side
    scale: int = 4  # output pixels per pixel of the low-resolution image, along each side
    adapter_width: int = 512  # channels of the adapter's convolutions
    adapter_blocks: int = 4  # residual blocks of the adapter
    adapter_padding: Padding = "zeros"  # what the convolutions see beyond the edge
    adapter_image_channels: int = 0  # of a low-resolution image beside the latent; 0 in every released network
    gate: GateMode = "per_channel"  # whether a gate decides for each token, or for each channel of it
    inject_interval: int = 2  # the latent enters before every patch block whose index this divides
    inject_pixels: bool = False  # whether it enters before the pixel blocks as well
    color_head: bool = False  # whether the adapter predicts the low-resolution image, for the color loss of training
    color_head_tap: int = (
        -1
    )  # residual block, counted from one, whose output the color head reads; -1 the final features
    prediction: Prediction = "velocity"  # what the output is: noise minus image, or the image

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in get_args(choices):
                known = ", ".join(get_args(choices))
                raise SettingError(f"{name} is {getattr(self, name)!r}; it must be one of {known}.")
        self._check_positive()
        for size, heads in (("hidden_size", "num_heads"), ("pixel_attn_hidden_size", "pixel_num_heads")):
            width, count = getattr(self, size), getattr(self, heads)
            if width % count or (width // count) % 4:
                raise SettingError(
                    f"{size}={width} over {heads}={count} gives {width / count:g} channels a head; "
                    "the two-axis rotation needs a whole multiple of 4."
                )
        if self.pixel_hidden_size % 4:
            need = "the position table needs a multiple of 4"
            raise SettingError(f"pixel_hidden_size is {self.pixel_hidden_size}; {need}.")
        if self.has_adapter:
            self._check_adapter()

    def _check_positive(self) -> None:
        for field in fields(self):
            value, most = getattr(self, field.name), MAX_WIDTH
            if field.name.endswith(("_depth", "_blocks")):
                most = MAX_BLOCKS
            if type(value) is int and field.name != "color_head_tap":
                _check_count(field.name, value, least=int(field.name not in _MAY_BE_ZERO), most=most)
        if len(self.rope_reference) != 2 or min(self.rope_reference) < self.patch_size:
            raise SettingError(
                f"rope_reference is {self.rope_reference}; it must be two sides (height, width) in pixels, "
                f"each at least patch_size={self.patch_size}."
            )

    def _check_adapter(self) -> None:
        if self.adapter_width % 4:
            raise SettingError(f"adapter_width is {self.adapter_width}; GroupNorm of 4 groups needs a multiple of 4.")
        if self.latent_channels % self.latent_unpatchify**2:
            raise SettingError(
                f"latent_channels={self.latent_channels} cannot be unpatchified by {self.latent_unpatchify}: "
                f"it must be a multiple of {self.latent_unpatchify**2}."
            )
        if self.latent_down % self.latent_unpatchify:
            raise SettingError(
                f"latent_down={self.latent_down} is not a multiple of latent_unpatchify={self.latent_unpatchify}."
            )
        if self.patch_size % self.scale and self.color_head:
            raise SettingError(
                f"color_head needs patch_size ({self.patch_size}) to be a multiple of scale ({self.scale})."
            )
        ratio = self.latent_to_patch_ratio
        if self.latent_channels and ratio < 1 and not math.isclose(1 / ratio, round(1 / ratio)):
            raise SettingError(
                f"patch_size={self.patch_size} covers {1 / ratio:g} latent cells a side; it must be a whole number."
            )

    @property
    def has_text(self) -> bool:
        """Whether the network has a text stream."""
        return self.text_dim > 0

    @property
    def has_adapter(self) -> bool:
        """Whether the network takes a latent (or a low-resolution image)."""
        return self.latent_channels > 0 or self.adapter_image_channels > 0

    @property
    def latent_to_patch_ratio(self) -> float:
        """Patch-grid cells per (unpatchified) latent cell, along each side."""
        return self.scale * (self.latent_down / self.latent_unpatchify) / self.patch_size

    @property
    def num_injections(self) -> int:
        """Patch blocks that a set of latent tokens is injected before."""
        return math.ceil(self.patch_depth / self.inject_interval) if self.has_adapter else 0

    @property
    def mlp_width(self) -> int:
        """Inner width of the patch blocks' gated feed-forward."""
        return 2 * (4 * self.hidden_size) // 3

    @property
    def pixels_per_latent_cell(self) -> int:
        """Output pixels per latent cell, along each side."""
        return self.latent_down * self.scale

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return {**asdict(self), "rope_reference": list(self.rope_reference)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PiDConfig:
        """Inverse of `to_dict`. Raises SettingError for unknown names or values of the wrong type."""
        clean = dict(values)
        for field in fields(cls):
            value, expected = clean.get(field.name, field.default), type(field.default)
            if expected is tuple:
                if not isinstance(value, (list, tuple)) or not all(type(number) is int for number in value):
                    raise SettingError(f"{field.name} is {value!r}; it must be a list of whole numbers.")
                clean[field.name] = tuple(value)
            elif expected is float and type(value) is int:
                clean[field.name] = float(value)
            elif type(value) is not expected:
                raise SettingError(f"{field.name} is {value!r}; it must be of type {expected.__name__}.")
        return _from_dict(cls, clean)

    def without_color_head(self) -> PiDConfig:
        """The same network without its training-only color head."""
        return replace(self, color_head=False)


def v1(*, latent_channels: int, latent_down: int, scale: int = 4) -> PiDConfig:
    """The released v1 network ("2k" and "2kto4k") for one latent space."""
    return PiDConfig(latent_channels=latent_channels, latent_down=latent_down, scale=scale)


def v1pt5(*, latent_channels: int, latent_down: int, latent_unpatchify: int = 1, color_head: bool = False) -> PiDConfig:
    """The released v1.5 network ("2kto4k_v1pt5") for one latent space; its teacher keeps the color head."""
    return PiDConfig(
        latent_channels=latent_channels, latent_down=latent_down, latent_unpatchify=latent_unpatchify,
        adapter_width=1024, adapter_padding="replicate", gate="per_token", inject_pixels=True,
        rope_reference=(2048, 2048), color_head=color_head,
    )  # fmt: skip


def backbone() -> PiDConfig:
    """The text-to-image PixelDiT backbone that every released decoder grew from."""
    return PiDConfig(latent_channels=0, rope_reference=(2048, 2048))


PID_CONFIGS = {"v1": v1(latent_channels=16, latent_down=8), "v1.5": v1pt5(latent_channels=16, latent_down=8)}
"""By the version of the released PiD weights, for FLUX.1's latents; those of other spaces are less than 1 % larger."""


def debug_config(**changes: Any) -> PiDConfig:
    """A network of a few thousand parameters with every part of v1.5, for tests and dry runs."""
    base = PiDConfig(
        hidden_size=32, num_heads=2, patch_depth=3, patch_size=16,
        pixel_hidden_size=4, pixel_depth=1, pixel_attn_hidden_size=24, pixel_num_heads=3,
        text_dim=16, text_length=10, latent_channels=16, latent_down=8,
        adapter_width=8, adapter_blocks=1, adapter_padding="replicate", gate="per_token",
        inject_pixels=True, rope_reference=(2048, 2048),
    )  # fmt: skip
    return replace(base, **changes)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyDecoderConfig:
    """Shape of a `TinyDecoder`.

    Attributes:
        latent_channels: Channels of the latent.
        latent_unpatchify: Cells a latent cell is unpacked into, along each side.
        latent_down: Pixels of the low-resolution image per latent cell, along each side.
        scale: Output pixels per pixel of the low-resolution image, along each side.
        width: Channels of all convolutions.
        blocks: Residual blocks of each stage; each stage but the first doubles the grid.
        base_blocks: The same of a second network of the same width, which gives the low-resolution image alone, for
            the decoder to read and to correct low frequencies by; empty for none.
        base_weight: Share of the difference between that image and the result, reduced, that is added to the result;
            of mean colors all of it is.
        base_detail_weight: The same of what is finer than squares of two of that image's pixels.
        base_edge_weight: The same of it at edges.
        base_edge_gradient: Gradient of that image, in steps of 255 a pixel, at which the share is halfway between both.
        max_sigma: Highest noise level of a latent for which the decoder was found good.

    Raises:
        SettingError: A value is out of range, or the values do not fit together.
    """

    latent_channels: int = 128
    latent_unpatchify: int = 2
    latent_down: int = 16
    scale: int = 4
    width: int = 64
    blocks: tuple[int, ...] = (16, 8, 12, 4)
    base_blocks: tuple[int, ...] = (16, 8, 6, 2)
    base_weight: float = 1.0
    base_detail_weight: float = 0.0
    base_edge_weight: float = 1.0
    base_edge_gradient: float = 56.0
    max_sigma: float = 0.8

    def __post_init__(self) -> None:
        for name in ("latent_channels", "latent_unpatchify", "latent_down", "scale", "width"):
            _check_count(name, getattr(self, name), least=1, most=MAX_WIDTH)
        if not self.blocks:
            raise SettingError("blocks is empty; name the residual blocks of at least one stage.")
        for name in ("blocks", "base_blocks"):
            for count in getattr(self, name):
                _check_count(name, count, least=0, most=MAX_BLOCKS)
        if self.width % 4 or self.latent_channels % self.latent_unpatchify**2:
            raise SettingError(
                f"width={self.width} must be a multiple of 4 (its GroupNorm's groups), and latent_channels="
                f"{self.latent_channels} of {self.latent_unpatchify**2} (latent_unpatchify squared)."
            )
        if self.pixels_per_cell % (self.latent_unpatchify * 2 ** (len(self.blocks) - 1)):
            raise SettingError(
                f"{len(self.blocks)} stages do not divide the {self.pixels_per_cell} output pixels of a latent cell."
            )
        for name in ("base_weight", "base_detail_weight", "base_edge_weight", "max_sigma"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise SettingError(f"{name} is {getattr(self, name)}; it must be from 0 to 1.")
        if not 0.0 < self.base_edge_gradient < math.inf:
            raise SettingError(
                f"base_edge_gradient is {self.base_edge_gradient}; it must be finite and above 0: it divides edges "
                "from the rest."
            )
        finest = self.latent_unpatchify * 2 ** (len(self.blocks) - 1)  # cells per latent cell of the last stage
        if self.base is not None and self.latent_down % finest:  # the base itself is checked likewise
            raise SettingError(
                f"The {finest} cells that the last of {len(self.blocks)} stages makes of a latent cell do not divide "
                f"the {self.latent_down} pixels of the low-resolution image, which stages read with base_blocks="
                f"{self.base_blocks}; change blocks, or set base_blocks=()."
            )

    @property
    def base(self) -> TinyDecoderConfig | None:
        """Shape of the network that gives the low-resolution image alone."""
        return replace(self, scale=1, blocks=self.base_blocks, base_blocks=()) if self.base_blocks else None

    @property
    def pixels_per_cell(self) -> int:
        """Output pixels per latent cell, along each side."""
        return self.latent_down * self.scale

    @property
    def pixel_shuffle(self) -> int:
        """Output pixels per cell of the last grid, along each side."""
        return int(self.pixels_per_cell // (self.latent_unpatchify * 2 ** (len(self.blocks) - 1)))

    def low_res_unshuffle(self, stage: int) -> int:
        """Pixels of the low-resolution image per cell of a stage's grid, along each side."""
        return int(self.latent_down // (self.latent_unpatchify * 2**stage))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return {**asdict(self), "blocks": list(self.blocks), "base_blocks": list(self.base_blocks)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TinyDecoderConfig:
        """Inverse of `to_dict`.

        Raises:
            SettingError: A name is unknown, or a value has the wrong type.
        """
        clean = dict(values)
        for name in clean.keys() & {"blocks", "base_blocks"}:
            if not isinstance(clean[name], (list, tuple)):
                raise SettingError(f"{name} is {clean[name]!r}; it must be a list of whole numbers.")
            clean[name] = tuple(clean[name])
        if "base_weight" in clean:  # files of before there were two weights
            clean.setdefault("base_detail_weight", clean["base_weight"])
            clean.setdefault("base_edge_weight", clean["base_detail_weight"])  # and of before there were three
        return _from_dict(cls, clean)


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyEncoderConfig:
    """Widths and depths of a `TinyEncoder` at the image's own side, a half, a quarter and an eighth of it.

    Attributes:
        channels: Channels of the packed latent (128 for FLUX.2).

    Raises:
        SettingError: A value cannot be built.
    """

    full_width: int = 48
    full_blocks: int = 1
    half_width: int = 64
    half_blocks: int = 6
    quarter_width: int = 64
    quarter_blocks: int = 8
    eighth_width: int = 128
    eighth_blocks: int = 6
    channels: int = 128

    def __post_init__(self) -> None:
        for entry in fields(self):
            most = MAX_BLOCKS if entry.name.endswith("_blocks") else MAX_WIDTH
            _check_count(entry.name, getattr(self, entry.name), least=1, most=most)
        if self.channels % 4:
            raise SettingError(f"channels is {self.channels}; 2x2 cells are packed, so it must be a multiple of 4.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TinyEncoderConfig:
        """Inverse of `to_dict`. Raises SettingError for unknown names or values that are no whole number."""
        return _from_dict(cls, values)


Config = TypeVar("Config", PiDConfig, TinyDecoderConfig, TinyEncoderConfig)


def _from_dict(cls: type[Config], values: Mapping[str, Any]) -> Config:
    known = {entry.name for entry in fields(cls)}
    unknown = sorted(set(values) - known)
    if unknown:
        raise SettingError(f"Unknown fields {', '.join(unknown)}; {cls.__name__} has {', '.join(sorted(known))}.")
    return cls(**values)


def check_foreign_config(config: Mapping[str, Any], source: object) -> None:
    """Raises SettingError for a config.json that has another library build a network larger than any real one."""
    for name, value in config.items():
        if isinstance(value, dict):
            check_foreign_config(value, source)
            continue
        most = MAX_BLOCKS if name.endswith(("_blocks", "_layers", "_per_block")) else MAX_VALUE
        items = value if isinstance(value, list) else [value]
        if any(type(item) is int and item > most for item in items):
            raise SettingError(f"{name} of {source} is {str(value)[:40]}; at most {most} is built.")
        if len(items) > MAX_STAGES and ("block" in name or "mult" in name):
            raise SettingError(f"{name} of {source} has {len(items)} entries; at most {MAX_STAGES} are built.")


RELEASED_CONFIGS: dict[str, PiDConfig | TinyDecoderConfig] = {"tiny": TinyDecoderConfig(), **PID_CONFIGS}
"""Shapes of the weights that people have, by their names."""
