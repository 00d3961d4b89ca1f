# SPDX-License-Identifier: Apache-2.0
"""What a decode will need, before anything runs: which type, how chunked, what offloaded, what cut into windows.

The peak is predicted from shapes alone; tests hold the prediction within a tenth of what is counted when the network
really runs. Exact means are taken before those that change the picture.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pidecode.errors import DoesNotFitError, SettingError
from pidecode.facts.architecture import NetConfig
from pidecode.kernels.chunks import Chunks

GB = 10**9
DRIVER = 450_000_000
"""What an accelerator's context and kernels take besides tensors (the usual 0.3 to 0.5 GB)."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}

CPU_CHUNKS = Chunks()

WINDOWS = (4096, 3072, 2048, 1536, 1024)
"""Sides of windows to try, largest first: the fewer, the more a picture is one."""


def parse_bytes(text: str) -> int:
    """ "12GB", "800 MB", "11.5GiB" to bytes. Raises SettingError for anything else."""
    match = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([kmgt]?)(i?)b?\s*", text.lower())
    if match is None:
        raise SettingError(f"{text!r} is no amount of memory; write it like 12GB, 800MB or 11.5GiB.")
    number, unit, binary = match.groups()
    factor = 1024 ** "kmgt".index(unit) * 1024 if binary and unit else _UNITS[unit]
    return int(float(number) * factor)


def parse_size(text: str) -> tuple[int, int]:
    """ "4096x3072" to width and height. Raises SettingError for anything else."""
    match = re.fullmatch(r"\s*(\d+)\s*[x×]\s*(\d+)\s*", text.lower())
    if match is None:
        raise SettingError(f"{text!r} is no size; write width x height, like 4096x3072.")
    return int(match[1]), int(match[2])


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one decode runs; `peak` is what it is predicted to need."""

    size: tuple[int, int]
    """Width and height in pixels."""
    batch: int = 1
    dtype: str = "bfloat16"
    chunks: Chunks = CPU_CHUNKS
    keep_tokens: bool = True
    """Keep the latent's tokens for every block, rather than make them at each use."""
    weights: Literal["plain", "int8", "fp8"] = "plain"
    offload: tuple[str, ...] = ()
    """What stays on the host and visits the device: "text", "encoder", "blocks"."""
    window: int | None = None
    """Side of the windows a picture is cut into, in pixels; None decodes it whole."""
    parts: tuple[tuple[str, int], ...] = ()
    """What the peak consists of, in bytes."""

    @property
    def peak(self) -> int:
        """Predicted bytes on the device, the driver's included."""
        return sum(size for _, size in self.parts)

    @property
    def exact(self) -> bool:
        """Whether the picture is that of the plain network, up to rounding."""
        return self.weights == "plain" and self.window is None

    def describe(self) -> str:
        """The plan in a few lines."""
        (width, height), chunks = self.size, self.chunks
        how = [
            f"{width}x{height}, batch of {self.batch}, {self.dtype}",
            f"chunks of {chunks.tokens} patches; pixel tiles of {chunks.tile_tokens} patches x {chunks.tile_rows} rows",
            "latent tokens " + ("kept for all steps" if self.keep_tokens else "made anew at each use (exact)"),
            f"weights {self.weights}" + ("" if self.weights == "plain" else " (changes the picture a little)"),
            "on the host: " + (", ".join(self.offload) if self.offload else "nothing"),
            "whole picture at once" if self.window is None else f"windows of {self.window} pixels fused at every step",
        ]
        share = [f"  {name:22s} {size / GB:6.2f} GB" for name, size in self.parts]
        return "\n".join([*how, *share, f"  {'predicted peak':22s} {self.peak / GB:6.2f} GB"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a decode may use."""

    memory: int
    """Bytes free on the device."""
    accelerator: bool = True
    """Whether the device is apart from the host, so that things can be offloaded and a driver takes its share."""
    fp8: bool = False
    """Whether it multiplies in eight-bit floats."""


def parameters(config: NetConfig, *, slimmed: bool) -> tuple[int, int, int]:
    """Numbers of parameters: in patch blocks, elsewhere in large matrices, and the rest."""
    D, F, C, P = config.hidden_size, config.mlp_width, config.pixel_hidden_size, config.patch_size**2
    streams = 2 if config.has_text else 1
    stream = 4 * D * D + D + 3 * D * F + 2 * D + 2 * (D // config.num_heads)
    table = 0 if slimmed else 6 * D * D + 6 * D
    blocks = config.patch_depth * streams * (stream + table)
    if slimmed and config.has_text:
        blocks -= D * D + D + 3 * D * F + D + D // config.num_heads
    A = config.pixel_attn_hidden_size
    pixel = config.pixel_depth * (6 * C * P * (D + 1) + 2 * P * C * A + A + P * C + 4 * A * A + A + 8 * C * C)
    rest = 3 * P * D + D + (0 if slimmed else 256 * D + D * D + 2 * D)
    if config.has_text:
        rest += config.text_dim * D + 2 * D + config.text_length * D
    if config.has_adapter:
        W = config.adapter_width
        channels = config.latent_channels / config.latent_unpatchify**2
        channels *= max(1, round(1 / config.latent_to_patch_ratio)) ** 2
        heads = config.num_injections + int(config.inject_pixels)
        gate = 2 * D * (D if config.gate == "per_channel" else 1)
        rest += int(9 * channels * W) + 9 * W * W * (1 + 2 * config.adapter_blocks) + heads * (W * D + D + gate)
    return blocks, pixel, rest


def predict(plan: Plan, config: NetConfig, *, accelerator: bool = True, slimmed: bool = True) -> Plan:
    """The same plan with its parts filled in. The terms are named after what `model/lean.py` holds at each stage."""
    width, height = plan.size
    if plan.window is not None:
        width, height = min(width, plan.window), min(height, plan.window)
    parts = [*_weight_parts(plan, config, slimmed=slimmed), *_activation_parts(plan, config, (width, height))]
    if accelerator:
        parts.append(("driver", DRIVER))
    return replace(plan, parts=tuple(parts))


def _weight_parts(plan: Plan, config: NetConfig, *, slimmed: bool) -> Iterator[tuple[str, int]]:
    wide = DTYPE_BYTES[plan.dtype]
    blocks, pixel, rest = parameters(config, slimmed=slimmed)
    narrow = wide if plan.weights == "plain" else 1
    if "blocks" in plan.offload:
        blocks = math.ceil(blocks / config.patch_depth) * min(2, config.patch_depth)
    yield "patch blocks", blocks * narrow
    yield "pixel blocks", pixel * narrow
    # Quantisation spares the convolutions and small layers.
    yield "adapter and embedders", rest * wide


def _activation_parts(plan: Plan, config: NetConfig, size: tuple[int, int]) -> Iterator[tuple[str, int]]:
    """Bytes of what one evaluation holds, for a (window's) size; the canvas is that of the whole picture."""
    (width, height), wide, B = size, DTYPE_BYTES[plan.dtype], plan.batch
    whole = plan.size[0] * plan.size[1]
    L = width * height // config.patch_size**2
    L_whole = whole // config.patch_size**2
    D, A, C = config.hidden_size, config.pixel_attn_hidden_size, config.pixel_hidden_size
    N = config.text_length if config.has_text else 0
    heads = config.num_injections + int(config.inject_pixels)
    gate = (D if config.gate == "per_channel" else 1) * 4
    tokens = heads * (D * wide + gate) if plan.keep_tokens else config.adapter_width * wide
    if plan.window is not None:  # the whole picture's, and the window's own cut
        yield "latent tokens", B * tokens * (L_whole + L) if heads else 0
    else:
        yield "latent tokens", B * tokens * L if heads else 0
    picture = 3 * 4 * B
    pictures = whole * (3 if plan.window is not None else 1) + (2 * width * height if plan.window is not None else 0)
    rotations = L * (D // config.num_heads + A // config.pixel_num_heads) * 4
    yield "canvas and positions", pictures * picture + rotations + N * B * (D + config.text_dim) * 4
    patch_stage = B * (L * D * 4 + (L + N) * 3 * D * wide + (L + N) * D * wide + N * D * 4)
    patch_stage += _chunk_bytes(plan.chunks.tokens, L, D, config.mlp_width, wide)
    tile_tokens = min(L, max(plan.chunks.tile_tokens, width // config.patch_size))
    tile = tile_tokens * plan.chunks.tile_rows * config.patch_size * C
    kept = C * 4 * config.patch_size**2 if config.pixel_depth > 1 else 0
    pixel_stage = B * L * (D * wide + kept + A * wide)
    # Either the attention between sweeps, or the tiles of a sweep: the first fills the next block's summaries, the
    # last the prediction.
    between = B * L * (3 * A + A) * wide
    rows = 6 * C * plan.chunks.tile_rows * config.patch_size * D * wide
    filled = max(width * height * picture, B * L * A * 4 if config.pixel_depth > 1 else 0)
    during = filled + rows + tile * (4 + 10 * wide)
    yield "activations", max(patch_stage, pixel_stage + max(between, during), 3 * picture * whole)


def _chunk_bytes(chunk: int, L: int, D: int, F: int, wide: int) -> int:
    tokens = math.ceil(L / max(1, math.ceil(L / chunk)))
    return tokens * (2 * F * wide + D * wide + D * 4)


def plan_decode(
    config: NetConfig, size: tuple[int, int], machine: Machine, *, batch: int = 1, dtype: str | None = None
) -> Plan:
    """The first way of decoding, from the fastest exact one to the sparest, that fits the machine.

    Raises DoesNotFitError saying what would fit, SettingError for a size that does not divide into patches.
    """
    if dtype is not None and dtype not in DTYPE_BYTES:
        raise SettingError(f"dtype is {dtype!r}; plans know {', '.join(DTYPE_BYTES)}.")
    if min(size) < config.patch_size or any(side % config.patch_size for side in size):
        raise SettingError(f"A size of {size[0]}x{size[1]} does not divide into patches of {config.patch_size} pixels.")
    sparest: Plan | None = None
    for candidate in _candidates(
        config, size, machine, batch, dtype or ("bfloat16" if machine.accelerator else "float32")
    ):
        if candidate.peak <= machine.memory:
            return candidate
        if sparest is None or candidate.peak < sparest.peak:
            sparest = candidate
    assert sparest is not None
    raise DoesNotFitError(_refusal(config, sparest, machine))


def _candidates(config: NetConfig, size: tuple[int, int], machine: Machine, batch: int, dtype: str) -> Iterator[Plan]:
    large = Chunks.large(config.patch_size) if machine.accelerator else Chunks()
    aside = ("text", "encoder") if machine.accelerator else ()
    plain = Plan(size=size, batch=batch, dtype=dtype, chunks=large)
    late = replace(plain, keep_tokens=False)
    small = replace(late, chunks=Chunks(tokens=1024, tile_tokens=512, tile_rows=1) if machine.accelerator else Chunks())
    eight: Literal["int8", "fp8"] = "fp8" if machine.fp8 else "int8"
    ways = [plain, late, small]
    if machine.accelerator:
        ways += [replace(plan, offload=(*aside, "blocks")) for plan in (plain, small)]
    ways.append(replace(small, weights=eight))
    if machine.accelerator:
        ways.append(replace(small, weights=eight, offload=(*aside, "blocks")))
    windows = [side for side in WINDOWS if side < max(size)]
    ways += [replace(small, window=side) for side in windows]
    ways += [replace(ways[-1] if not windows else small, weights=eight, window=side) for side in windows]
    if machine.accelerator:
        ways += [replace(small, weights=eight, offload=(*aside, "blocks"), window=side) for side in windows]
    for way in ways:
        if machine.accelerator and "text" not in way.offload:
            way = replace(way, offload=aside)
        yield predict(way, config, accelerator=machine.accelerator)


def _refusal(config: NetConfig, sparest: Plan, machine: Machine) -> str:
    width, height = sparest.size
    need = f"{width}x{height} (batch of {sparest.batch}) needs {sparest.peak / GB:.2f} GB at the least"
    message = f"{need}, with everything spared that can be; {machine.memory / GB:.2f} GB are free."
    shape, step = width / height, config.patch_size
    for long_side in range(max(width, height) - step, 0, -step):
        short = max(step, round(long_side / max(shape, 1 / shape) / step) * step)
        smaller = (long_side, short) if width >= height else (short, long_side)
        if (
            predict(replace(sparest, size=smaller, batch=1), config, accelerator=machine.accelerator).peak
            <= machine.memory
        ):
            return f"{message} {smaller[0]}x{smaller[1]} one at a time would fit, as would a device with the memory."
    return f"{message} No size fits: the weights alone are too large for it."
