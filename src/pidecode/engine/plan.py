# SPDX-License-Identifier: Apache-2.0
"""Memory prediction and decode plans: dtype, chunks, offload, quantization, tiling.

The peak is predicted from shapes alone; tests hold the prediction within a tenth of what is counted when the network
really runs. Exact means are taken before those that change the image.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from pidecode.engine.chunks import Chunks
from pidecode.errors import DoesNotFitError, SettingError
from pidecode.registry.configs import PiDConfig

GB = 10**9
DRIVER = 450_000_000
"""What an accelerator's context and kernels take besides tensors (the usual 0.3 to 0.5 GB)."""

Weights = Literal["plain", "int8", "fp8"]
Products = Literal["wide", "eight"]
WEIGHTS: tuple[Weights, ...] = ("plain", "int8", "fp8")
PRODUCTS: tuple[Products, ...] = ("wide", "eight")

TEXT_ENCODER = 5_230_000_000
"""Weights of the prompts' encoder (Gemma-2 2B) in bfloat16."""

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

CPU_CHUNKS = Chunks()
"""Those that suit a processor's caches."""

WINDOWS = (4096, 3072, 2048, 1536, 1024)
"""Sides of windows to try, largest first: the fewer, the more an image is one."""


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
    weights: Weights = "plain"
    products: Products = "wide"
    """Whether eight-bit weights are widened to be multiplied, or multiplied in eight bits."""
    offload: tuple[str, ...] = ()
    """What stays on the host and visits the device: "text", "encoder", "blocks"."""
    text_on_host: bool = False
    """The prompts' encoder does not visit: it is too large for the device and works on the host."""
    window: int | None = None
    """Side of the windows an image is cut into, in pixels; None decodes it whole."""
    parts: tuple[tuple[str, int], ...] = ()
    """What the peak consists of, in bytes."""

    def __post_init__(self) -> None:
        for name, known in (("dtype", tuple(DTYPE_BYTES)), ("weights", WEIGHTS), ("products", PRODUCTS)):
            if getattr(self, name) not in known:
                raise SettingError(f"{name} is {getattr(self, name)!r}; plans know {', '.join(known)}.")
        if self.products == "eight" and self.weights == "plain":
            raise SettingError(
                'products="eight" needs weights="int8" or "fp8": plain weights are multiplied as they are.'
            )

    @property
    def working(self) -> int:
        """Predicted bytes beyond a network that is loaded already; blocks that visit come on top of one."""
        held = {"patch blocks", "driver"} if "blocks" not in self.offload else {"driver"}
        return sum(size for name, size in self.parts if name not in held | {"pixel blocks", "adapter and embedders"})

    @property
    def peak(self) -> int:
        """Predicted bytes on the device, the driver's included."""
        return sum(size for _, size in self.parts)

    @property
    def exact(self) -> bool:
        """Whether the image is that of the plain network, up to rounding."""
        return self.weights == "plain" and self.window is None

    def describe(self) -> str:
        """The plan in a few lines."""
        (width, height), chunks = self.size, self.chunks
        how = [
            f"{width}x{height}, batch of {self.batch}, {self.dtype}",
            f"chunks of {chunks.tokens} patches; pixel tiles of {chunks.tile_tokens} patches x {chunks.tile_rows} rows",
            "latent tokens " + ("kept for all steps" if self.keep_tokens else "made anew at each use (exact)"),
            self._multiplied(),
            "on the host: " + (", ".join(self.offload) if self.offload else "nothing"),
            "prompts are read on the host: their encoder is too large for the device" if self.text_on_host else "",
            "whole image at once" if self.window is None else f"windows of {self.window} pixels fused at every step",
        ]
        share = [f"  {name:22s} {size / GB:6.2f} GB" for name, size in self.parts]
        return "\n".join([*filter(None, how), *share, f"  {'predicted peak':22s} {self.peak / GB:6.2f} GB"])

    def _multiplied(self) -> str:
        if self.weights == "plain":
            return "weights plain"
        how = "multiplied in eight bits" if self.products == "eight" else "widened to multiply"
        return f"weights {self.weights}, {how} (changes the image a little)"


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a decode may use."""

    memory: int
    """Bytes free on the device."""
    accelerator: bool = True
    """Whether the device is apart from the host, so that things can be offloaded and a driver takes its share."""
    products: tuple[Weights, ...] = ()
    """Formats it multiplies in eight bits, those that suit it best first."""


def parameters(config: PiDConfig, *, stripped: bool) -> tuple[int, int, int]:
    """Numbers of parameters: in patch blocks, elsewhere in large matrices, and the rest."""
    D, F, C, P = config.hidden_size, config.mlp_width, config.pixel_hidden_size, config.patch_size**2
    streams = 2 if config.has_text else 1
    stream = 4 * D * D + D + 3 * D * F + 2 * D + 2 * (D // config.num_heads)
    table = 0 if stripped else 6 * D * D + 6 * D
    blocks = config.patch_depth * streams * (stream + table)
    if stripped and config.has_text:
        blocks -= D * D + D + 3 * D * F + D + D // config.num_heads
    A = config.pixel_attn_hidden_size
    pixel = config.pixel_depth * (6 * C * P * (D + 1) + 2 * P * C * A + A + P * C + 4 * A * A + A + 8 * C * C)
    rest = 3 * P * D + D + (0 if stripped else 256 * D + D * D + 2 * D)
    if config.has_text:
        rest += config.text_dim * D + 2 * D + config.text_length * D
    if config.has_adapter:
        heads = config.num_injections + int(config.inject_pixels)
        gate = 2 * D * (D if config.gate == "per_channel" else 1)
        rest += _tower(config) + heads * (config.adapter_width * D + D + gate)
    return blocks, pixel, rest


def _tower(config: PiDConfig) -> int:
    """Parameters of the adapter's convolutions."""
    W, channels = config.adapter_width, config.latent_channels // config.latent_unpatchify**2
    if config.adapter_stages:  # a convolution to each level, two in each block
        W //= round(config.adapter_fold) ** 2
        convolutions = len(config.adapter_stages) - 1 + 2 * sum(config.adapter_stages)
    else:
        channels *= max(1, round(1 / config.latent_to_patch_ratio)) ** 2
        convolutions = 1 + 2 * config.adapter_blocks
    return 9 * W * (channels + W * convolutions) + W * (1 + convolutions)


def predict(plan: Plan, config: PiDConfig, *, accelerator: bool = True, stripped: bool = True) -> Plan:
    """The same plan with its parts filled in. The terms are named after what `model/lean.py` holds at each stage."""
    width, height = plan.size
    if plan.window is not None:
        width, height = min(width, plan.window), min(height, plan.window)
    parts = [*_weight_parts(plan, config, stripped=stripped), *_activation_parts(plan, config, (width, height))]
    if accelerator:
        parts.append(("driver", DRIVER))
    return replace(plan, parts=tuple(parts))


def _weight_parts(plan: Plan, config: PiDConfig, *, stripped: bool) -> Iterator[tuple[str, int]]:
    wide = DTYPE_BYTES[plan.dtype]
    _, pixel, rest = parameters(config, stripped=stripped)
    narrow = wide if plan.weights == "plain" else 1
    present = min(2, config.patch_depth) if "blocks" in plan.offload else config.patch_depth
    yield "patch blocks", present * _block_bytes(plan, config, stripped=stripped)
    yield "pixel blocks", pixel * narrow
    # Quantization spares the convolutions and small layers.
    yield "adapter and embedders", rest * wide


def _block_bytes(plan: Plan, config: PiDConfig, *, stripped: bool) -> int:
    """Of one patch block's weights."""
    narrow = DTYPE_BYTES[plan.dtype] if plan.weights == "plain" else 1
    return math.ceil(parameters(config, stripped=stripped)[0] / config.patch_depth) * narrow


def _activation_parts(plan: Plan, config: PiDConfig, size: tuple[int, int]) -> Iterator[tuple[str, int]]:
    """Bytes of what one evaluation holds, for a (window's) size; the canvas is that of the whole image."""
    from pidecode.sampling import FLOAT64_PIXELS  # loads torch, which importing this module must not

    (width, height), wide, B = size, DTYPE_BYTES[plan.dtype], plan.batch
    whole = plan.size[0] * plan.size[1]
    L = width * height // config.patch_size**2
    L_whole = whole // config.patch_size**2
    D, A = config.hidden_size, config.pixel_attn_hidden_size
    N = config.text_length if config.has_text else 0
    heads = config.num_injections + int(config.inject_pixels)
    gate = (D if config.gate == "per_channel" else 1) * 4
    tokens = heads * (D * wide + gate) if plan.keep_tokens else config.adapter_width * wide
    held = B * tokens * (L if plan.window is None else L_whole + L) if heads else 0  # a window's own cut beside all
    yield "latent tokens", held
    image = 3 * 4 * B
    images = whole * (2 if plan.window is not None else 1) + (width * height if plan.window is not None else 0)
    rotation = (D // config.num_heads + A // config.pixel_num_heads) * 4
    rotations = rotation * (L + L_whole if plan.window is not None else L)
    yield "canvas and positions", images * image + rotations + N * B * (D + config.text_dim) * 4
    patch_stage = B * (L * D * 4 + (L + N) * 3 * D * wide + (L + N) * D * wide + N * D * 4)
    patch_stage += _chunk_bytes(plan, L, D, config.mlp_width)
    pixel_stage = _pixel_stage(plan, config, (width, height))
    if "blocks" in plan.offload and config.patch_depth > 1:  # all but the one that comes first have left by then
        pixel_stage -= _block_bytes(plan, config, stripped=True)
    # Between evaluations: the clean image, noise and their sum beside the canvas. A velocity is an image more, of
    # which pieces are formed in float64 before there is noise. A window's own canvas, and the whole one that windows
    # are added up in, are free by then.
    between = 3 * image * whole
    if config.prediction == "velocity":
        between = max(4 * image * whole, 2 * image * whole + 4 * 2 * image * min(whole, FLOAT64_PIXELS))
    between -= image * (images - whole)
    # Before there are tokens: what a residual block takes, its activation, the same with edges and what it gives, and a
    # coarser level's features.
    adapter_stage = B * L_whole * config.adapter_width * wide * 17 // 4 - held if heads else 0
    yield "activations", max(patch_stage, pixel_stage, between, adapter_stage)


def _pixel_stage(plan: Plan, config: PiDConfig, size: tuple[int, int]) -> int:
    """Most bytes of the pixel path: of the attention between two sweeps, or of the tiles of a sweep.

    The first sweep fills the next block's summaries, the last the prediction.
    """
    (width, height), wide, B, chunks = size, DTYPE_BYTES[plan.dtype], plan.batch, plan.chunks
    D, A, C, patch = config.hidden_size, config.pixel_attn_hidden_size, config.pixel_hidden_size, config.patch_size
    L = width * height // patch**2
    several = config.pixel_depth > 1
    always = B * L * (D * wide + (C * 4 * patch**2 if several else 0) + A * wide)
    between = B * L * 3 * A * wide + max(B * L * A * wide, _qkv_bytes(plan, _run(L, chunks.tokens), A))
    columns = width // patch
    tile_tokens = columns * _run(height // patch, max(1, chunks.tile_tokens // columns))
    tile = tile_tokens * chunks.tile_rows * patch * C
    filled = max(width * height * 3 * 4 * B, B * L * A * 4 if several else 0)
    # The six vectors' rows of the modulation; those that are widened are copied twice.
    eight = plan.products == "eight"
    rows = C * chunks.tile_rows * patch * D * (6 if eight else (6 if plan.weights == "plain" else 8) * wide)
    inside = max(10 * wide, 4 * wide + _beside(plan, 0, 4)) if eight else 10 * wide
    fresh = 0 if several and tile_tokens == B * L else 4  # one tile is all that is kept, and needs no copy
    during = filled + rows + tile * (fresh + inside) + (tile_tokens * D if eight else 0)
    return always + max(between, during)


def _run(length: int, size: int) -> int:
    """Tokens of one chunk."""
    return math.ceil(length / max(1, math.ceil(length / size)))


def _beside(plan: Plan, inside: int, outside: int) -> int:
    """Bytes per token that a product in eight bits takes beside its operand and its result."""
    wide = DTYPE_BYTES[plan.dtype]
    if plan.weights == "fp8" and plan.dtype == "bfloat16":  # the kernel scales by itself
        return inside
    return inside + outside * (8 - wide)  # sums, and the same scaled, in four bytes each


def _product_bytes(plan: Plan, tokens: int, inside: int, outside: int) -> int:
    """Bytes that one linear layer takes beside operand and result: nothing, a widened weight, or codes and sums."""
    if plan.weights == "plain":
        return 0
    if plan.products == "wide":
        return inside * outside * DTYPE_BYTES[plan.dtype]
    return tokens * _beside(plan, inside, outside)


def _qkv_bytes(plan: Plan, tokens: int, D: int) -> int:
    """Bytes of one chunk on its way into the joint buffer: a result of its own if quantized, or its norm in float32."""
    wide = DTYPE_BYTES[plan.dtype]
    norm = tokens * D * 4 if wide < 4 else 0
    if plan.weights == "plain":
        return norm
    return max(norm, tokens * 3 * D * wide + _product_bytes(plan, tokens, D, 3 * D))


def _chunk_bytes(plan: Plan, L: int, D: int, F: int) -> int:
    """Bytes of one chunk of a patch block, at its projection or inside its feed-forward."""
    tokens, wide = _run(L, plan.chunks.tokens), DTYPE_BYTES[plan.dtype]
    hidden = tokens * 2 * F * wide + _product_bytes(plan, tokens, D, F)
    return tokens * D * wide + max(hidden, _qkv_bytes(plan, tokens, D))


def plan_decode(
    config: PiDConfig,
    size: tuple[int, int],
    machine: Machine,
    *,
    batch: int = 1,
    dtype: str | None = None,
    weights: Weights | None = None,
    products: Products | None = None,
) -> Plan:
    """The first way of decoding, from the fastest exact one to the sparest, that fits the machine.

    dtype, weights, products: settles what would be chosen to fit. Products in eight bits are never chosen, only asked
    for; without `weights` they are in the format that suits the machine.
    Raises DoesNotFitError saying what would fit, SettingError for a size that does not divide into patches and for
    what the machine cannot do.
    """
    if min(size) < config.patch_size or any(side % config.patch_size for side in size):
        raise SettingError(f"A size of {size[0]}x{size[1]} does not divide into patches of {config.patch_size} pixels.")
    if products == "eight":
        weights = _format_of_products(machine, weights)
    first = Plan(
        size=size,
        batch=batch,
        dtype=dtype or ("bfloat16" if machine.accelerator else "float32"),
        weights=weights or "plain",
        products=products or "wide",
        chunks=Chunks.large(config.patch_size) if machine.accelerator else CPU_CHUNKS,
        offload=_set_aside(config) if machine.accelerator else (),
    )
    sparest: Plan | None = None
    for way in _ways(first, machine, settled=weights is not None):
        candidate = predict(way, config, accelerator=machine.accelerator)
        if candidate.peak <= machine.memory:
            return replace(candidate, text_on_host=_text_is_too_large(candidate, machine))
        if sparest is None or candidate.peak < sparest.peak:
            sparest = candidate
    assert sparest is not None
    raise DoesNotFitError(_refusal(config, sparest, machine))


def _format_of_products(machine: Machine, weights: Weights | None) -> Weights:
    """The format of weights that are multiplied in eight bits."""
    if weights == "plain" or weights in machine.products or (weights is None and machine.products):
        return weights or machine.products[0]  # Plan itself refuses plain ones
    raise SettingError(
        f"This machine does not multiply in {weights or 'eight bits'}"
        + (f", only in {', '.join(machine.products)}" if machine.products else "")
        + '; leave products out, or "wide".'
    )


def _set_aside(config: PiDConfig) -> tuple[str, ...]:
    """What an accelerator need not hold while it decodes."""
    return (*(("text",) if config.has_text else ()), *(("encoder",) if config.has_adapter else ()))


def _text_is_too_large(plan: Plan, machine: Machine) -> bool:
    """Whether the prompts' encoder fits beside the network; the image's own memory is not taken by then."""
    if "text" not in plan.offload:
        return False
    return plan.peak - plan.working + TEXT_ENCODER > machine.memory


def _ways(first: Plan, machine: Machine, *, settled: bool) -> Iterator[Plan]:
    """Ever sparer ways from the fastest on; exact ones first, and no eight-bit weights where weights are `settled`."""
    late = replace(first, keep_tokens=False)
    small = late
    if machine.accelerator:
        small = replace(late, chunks=Chunks(tokens=1024, tile_tokens=512, tile_rows=1))
    visiting = (*first.offload, "blocks")
    yield from (first, late, small)
    if machine.accelerator:
        yield from (replace(plan, offload=visiting) for plan in (first, small))
    # int8 is the more exact of the two where weights are widened again.
    means = [small] if settled else [small, replace(small, weights="int8")]
    if machine.accelerator:
        means = [way for plan in means for way in (plan, replace(plan, offload=visiting))]
    yield from means
    for way in means:
        yield from (replace(way, window=side) for side in WINDOWS if side < max(first.size))


def _refusal(config: PiDConfig, sparest: Plan, machine: Machine) -> str:
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
