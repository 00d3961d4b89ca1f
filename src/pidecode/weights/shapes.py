# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of tensors -> the part of a network's configuration that they show."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from pidecode.errors import CheckpointError, SettingError
from pidecode.facts.architecture import NetConfig

Shapes = Mapping[str, tuple[int, ...]]
Generation = Literal["v1", "v1pt5", "backbone"]

COLOR_HEAD = "lq_proj.lq_aux_rgb_head."
"""Names of the one part that only training uses; files may have it or not."""

ADAPTER = ("lq_proj.", "pit_lq_gate.")
"""Names of the parts that take the latent in."""

_COMMON_INTERVAL = 2
"""Every released network injects before every second block; taken where the shapes allow several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """What tensors show of their network.

    seen: values of NetConfig fields read from names and shapes.
    latent_in: channels the adapter's first convolution takes, after unpatchifying or folding; 0 without one.
    image_in: the same of the adapter's picture branch.
    color_out: outputs of the color head, `3 (patch_size / scale)^2`; 0 without one.
    """

    seen: Mapping[str, Any]
    latent_in: int = 0
    image_in: int = 0
    color_out: int = 0

    @property
    def has_adapter(self) -> bool:
        """Whether a latent or a picture enters the network."""
        return self.latent_in > 0 or self.image_in > 0

    @property
    def generation(self) -> Generation | None:
        """The released design this is built like, or None for a mixture of v1 and v1.5."""
        if not self.has_adapter:
            return "backbone"
        kinds: dict[tuple[str, bool], Generation] = {("per_channel", False): "v1", ("per_token", True): "v1pt5"}
        return kinds.get((self.seen["gate"], self.seen["inject_pixels"]))

    def disagreement(self, config: NetConfig) -> str | None:
        """The first thing a configuration says otherwise than the tensors, in words; None if there is none.

        The color head may be in a configuration and not in the file, or the other way round.
        """
        for name, value in self.seen.items():
            if name != "color_head" and getattr(config, name) != value:
                return f"{name} is {value} by its tensors and {getattr(config, name)} by the configuration"
        expected = (_latent_in(config), _image_in(config))
        if expected != (self.latent_in, self.image_in):
            return (
                f"its adapter takes {self.latent_in or self.image_in} channels, and latent_channels="
                f"{config.latent_channels}, latent_down={config.latent_down}, latent_unpatchify="
                f"{config.latent_unpatchify}, scale={config.scale} would make it {expected[0] or expected[1]}"
            )
        if self.color_out and self.color_out != 3 * (config.patch_size // config.scale) ** 2:
            return f"its color head has {self.color_out} outputs, which is not 3 (patch_size / {config.scale})^2"
        return None


def _latent_in(config: NetConfig) -> int:
    ratio = config.latent_to_patch_ratio
    fold = round(1 / ratio) if 0 < ratio < 1 and not config.adapter_levels else 1
    return config.latent_channels // config.latent_unpatchify**2 * fold**2


def _image_in(config: NetConfig) -> int:
    return config.adapter_image_channels * (config.patch_size // config.scale) ** 2


def read_structure(shapes: Shapes, source: str = "the file", interval: int | None = None) -> Structure:
    """Everything names and shapes show (SPEC.md sections 1 and 2), for a network of any size.

    interval: `inject_interval`, where it is known from elsewhere.
    Raises CheckpointError when the tensors are of no PiD network, or contradict each other.
    """
    look = _Look(shapes, source)
    seen: dict[str, Any] = {**_patch_path(look), **_pixel_path(look)}
    if "y_pos_embedding" in shapes:
        seen["text_dim"] = look("y_embedder.proj.weight")[1]
        seen["text_length"] = look("y_pos_embedding")[1]
    else:
        seen["text_dim"] = 0
    if not any(name.startswith(ADAPTER) for name in shapes):
        return Structure(seen=seen | {"latent_channels": 0, "adapter_image_channels": 0})
    return _adapter(look, seen, interval)


@dataclass(frozen=True, slots=True)
class _Look:
    """Shapes by name; a missing one is an error that says what the file lacks."""

    shapes: Shapes
    source: str

    def __call__(self, name: str, rank: int = 2) -> tuple[int, ...]:
        shape = self.shapes.get(name)
        if shape is None:
            some = ", ".join(list(self.shapes)[:3])
            raise CheckpointError(
                f"{self.source} holds no PiD network: it lacks {name} (it holds {some}, ...). "
                "Check that it is a decoder, not an autoencoder, text encoder or LoRA."
            )
        if len(shape) < min(rank, 3) and name != "y_pos_embedding":
            raise CheckpointError(f"{self.source}: {name} has shape {list(shape)}; {rank} sides were expected.")
        return shape

    def count(self, pattern: str) -> int:
        """How many numbered parts `pattern` (with one group) finds; they must run from its first without a gap."""
        numbers = sorted({int(found[1]) for name in self.shapes if (found := re.match(pattern, name))})
        if numbers and numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            raise CheckpointError(f"{self.source} lacks parts in the middle of {pattern.split(chr(92))[0]}: {numbers}.")
        return len(numbers)

    def root(self, area: int, what: str) -> int:
        side = math.isqrt(area) if area > 0 else 0
        if side == 0 or side * side != area:
            raise CheckpointError(f"{self.source}: {what} is {area}, which is no square; this is no PiD network.")
        return side

    def heads(self, width: int, head_dim: int, what: str) -> int:
        if head_dim == 0 or width % head_dim:
            raise CheckpointError(f"{self.source}: {what} {width} does not divide into heads of {head_dim}.")
        return width // head_dim


def _patch_path(look: _Look) -> dict[str, Any]:
    hidden, patch_inputs = look("s_embedder.proj.weight")[:2]
    head_dim = look("patch_blocks.0.attn.q_norm_x.weight", 1)[0]
    return {
        "hidden_size": hidden,
        "num_heads": look.heads(hidden, head_dim, "hidden size"),
        "patch_depth": look.count(r"patch_blocks\.(\d+)\."),
        "patch_size": look.root(patch_inputs // 3, "the number of pixels in a patch"),
    }


def _pixel_path(look: _Look) -> dict[str, Any]:
    width = look("pixel_embedder.proj.weight")[0]
    seen: dict[str, Any] = {"pixel_hidden_size": width, "pixel_depth": look.count(r"pixel_blocks\.(\d+)\.")}
    if seen["pixel_depth"]:
        attention, flat = look("pixel_blocks.0.compress_to_attn.weight")[:2]
        head_dim = look("pixel_blocks.0.attn.q_norm.weight", 1)[0]
        seen["pixel_attn_hidden_size"] = attention
        seen["pixel_num_heads"] = look.heads(attention, head_dim, "pixel attention width")
        pixels = look("s_embedder.proj.weight")[1] // 3
        modulated = look("pixel_blocks.0.adaLN_modulation.0.weight")[0]
        if flat != pixels * width or modulated != 6 * flat:
            raise CheckpointError(
                f"{look.source} contradicts itself: patches of {pixels} pixels, {width} channels a pixel, "
                f"but pixel blocks for {flat} values and {modulated} modulations."
            )
    return seen


def _adapter(look: _Look, seen: dict[str, Any], interval: int | None) -> Structure:
    shapes = look.shapes
    climbed = look.count(r"lq_proj\.latent_proj\.levels\.(\d+)\.")
    levels = [look.count(rf"lq_proj\.latent_proj\.levels\.{level}\.(\d+)\.block\.") for level in range(climbed)]
    first = {"latent_proj": "levels.0.0" if levels else "0", "image_conv": "0"}  # the convolutions that see the input
    starts = {tower: f"lq_proj.{tower}.{place}.weight" for tower, place in first.items()}
    towers = [tower for tower, start in starts.items() if start in shapes]
    if not towers:
        look("lq_proj.latent_proj.0.weight")
    heads = look.count(r"lq_proj\.output_heads\.(\d+)\.")
    color = COLOR_HEAD + "3.weight" in shapes
    gate_rows = look("lq_proj.gate_modules.0.content_proj.weight")[0]
    if levels:
        seen["adapter_levels"] = tuple(levels)
    else:
        seen["adapter_blocks"] = look.count(rf"lq_proj\.{towers[0]}\.(\d+)\.block\.")
    seen |= {
        "adapter_width": look("lq_proj.output_heads.0.weight")[1],
        "gate": "per_token" if gate_rows == 1 else "per_channel",
        "inject_pixels": "pit_lq_gate.log_alpha" in shapes,
        "inject_interval": _interval(look.source, seen["patch_depth"], heads, interval),
        "color_head": color,
    }
    inputs = {tower: look(starts[tower], 4)[1] for tower in towers}
    return Structure(
        seen=seen,
        latent_in=inputs.get("latent_proj", 0),
        image_in=inputs.get("image_conv", 0),
        color_out=look(COLOR_HEAD + "3.weight")[0] if color else 0,
    )


def _interval(source: str, depth: int, heads: int, known: int | None) -> int:
    """Blocks from one injection to the next, from their number: `ceil(depth / interval) == heads`."""
    fitting = [step for step in range(1, depth + 1) if math.ceil(depth / step) == heads]
    if known is not None and heads == math.ceil(depth / known):
        return known
    if not fitting or known is not None:
        raise CheckpointError(
            f"{source} has {heads} injection heads for {depth} patch blocks; no interval gives that"
            f"{f', nor does inject_interval={known}' if known else ''}. Parts of the adapter are missing."
        )
    if len(fitting) == 1 or _COMMON_INTERVAL in fitting:
        return fitting[0] if len(fitting) == 1 else _COMMON_INTERVAL
    if heads == 1:
        return depth
    raise SettingError(
        f"{source} has {heads} injection heads for {depth} patch blocks, which fits an interval of "
        f"{' or '.join(map(str, fitting))}; say which by overrides={{'inject_interval': ...}}."
    )
