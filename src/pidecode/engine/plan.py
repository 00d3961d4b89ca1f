# SPDX-License-Identifier: Apache-2.0
"""Memory prediction and decode plans: dtype, chunks, offload, quantization, tiling.

The peak is predicted from shapes alone; tests hold it within a tenth of what is counted when the network runs. What
leaves the image exact is tried before what changes it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

from pidecode.engine.machine import DRIVER, DTYPE_BYTES, GB, QUANTIZATIONS, Chunks, Machine, Quantization, this_machine
from pidecode.errors import DoesNotFitError, SettingError
from pidecode.registry.configs import RELEASED_CONFIGS, PiDConfig, TinyDecoderConfig

if TYPE_CHECKING:
    from pidecode.engine.feed_forward import FeedForwardPlan

Scheme = Literal["w8a16", "w8a8"]  # quantized weights are dequantized to multiply, or multiplied so (experimental)
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
TEXT_ENCODER = 5_230_000_000  # bytes of the text encoder (Gemma-2 2B) in bfloat16
CPU_CHUNKS = Chunks()  # those that suit a CPU's caches
WINDOWS = (4096, 3072, 2048, 1536, 1024)  # sides to try: fewer windows keep more of an image's global attention


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one decode runs, and the memory it is predicted to need.

    Raises:
        SettingError: A value is none of the choices, or the scheme cannot act.
    """

    size: tuple[int, int]  # width and height in pixels
    batch: int = 1  # images at once
    dtype: str = "bfloat16"  # number format of the weights
    chunks: Chunks = CPU_CHUNKS  # chunk sizes of the in-place forward
    keep_tokens: bool = True  # keep the latent's tokens for all steps, rather than recompute them at each use
    quantization: Quantization = "none"  # format that the weights of large linear layers are stored in
    scheme: Scheme = "w8a16"
    offload: tuple[str, ...] = ()  # what is on the device only while it runs: "text", "encoder", "blocks"
    text_on_host: bool = False  # the text encoder is too large for the device and runs on the host
    window: int | None = None  # side in pixels of the windows an image is cut into; None decodes it whole
    parts: tuple[tuple[str, int], ...] = ()  # what the peak consists of, in bytes

    def __post_init__(self) -> None:
        for name, known in (("dtype", tuple(DTYPE_BYTES)), ("quantization", QUANTIZATIONS), ("scheme", SCHEMES)):
            if getattr(self, name) not in known:
                raise SettingError(f"{name} is {getattr(self, name)!r}; plans know {', '.join(known)}.")
        if self.scheme == "w8a8" and self.quantization == "none":
            raise SettingError('scheme="w8a8" needs quantization="int8" or "fp8": it multiplies quantized weights.')

    @property
    def working(self) -> int:
        """Predicted bytes beyond a network that is loaded already; offloaded blocks count, since they are copied."""
        held = {"patch blocks", "driver"} if "blocks" not in self.offload else {"driver"}
        return sum(size for name, size in self.parts if name not in held | {"pixel blocks", "adapter and embedders"})

    @property
    def peak(self) -> int:
        """Predicted bytes on the device, the driver's included."""
        return sum(size for _, size in self.parts)

    @property
    def exact(self) -> bool:
        """Whether the image is that of the plain network, up to rounding."""
        return self.quantization == "none" and self.window is None

    def describe(self) -> str:
        """The plan in a few lines."""
        (width, height), chunks, weights = self.size, self.chunks, "weights not quantized"
        if self.quantization != "none":
            use = "multiplied in eight bits" if self.scheme == "w8a8" else "dequantized to multiply"
            weights = f"weights in {self.quantization}, {self.scheme}: {use} (changes the image a little)"
        how = [
            f"{width}x{height}, batch of {self.batch}, {self.dtype}",
            f"chunks of {chunks.tokens} patches; pixel tiles of {chunks.tile_tokens} patches x {chunks.tile_rows} rows",
            "latent tokens " + ("kept for all steps" if self.keep_tokens else "recomputed at each use (exact)"),
            weights,
            "on the host: " + (", ".join(map(_OFFLOADED.__getitem__, self.offload)) or "nothing"),
            "text encoder runs on the host: it is too large for the device" if self.text_on_host else "",
            "whole image at once" if self.window is None else f"windows of {self.window} pixels blended at every step",
        ]
        share = [f"  {name:22s} {size / GB:6.2f} GB" for name, size in self.parts]
        return "\n".join([*filter(None, how), *share, f"  {'predicted peak':22s} {self.peak / GB:6.2f} GB"])


_OFFLOADED = {"text": "text encoder", "encoder": "image encoder", "blocks": "patch blocks"}


@functools.cache
def parameters(config: PiDConfig, *, stripped: bool) -> tuple[int, int, int]:
    """Numbers of parameters: in patch blocks, in pixel blocks, and the rest."""
    import torch  # these load torch, which importing this module must not

    from pidecode.engine.timesteps import strip_for_inference
    from pidecode.models.pid.network import PiDNet

    with torch.device("meta"):
        net = PiDNet(config)
    if stripped:
        strip_for_inference(net)
    blocks, pixel, total = (
        sum(weight.numel() for weight in module.parameters()) for module in (net.patch_blocks, net.pixel_blocks, net)
    )
    return blocks, pixel, total - blocks - pixel


def step_flops(config: PiDConfig, size: tuple[int, int]) -> int:
    """FLOP of one denoising step of width x height pixels in the engine, without adapter and timestep embedding."""
    D, F, P = config.hidden_size, config.mlp_width, config.patch_size**2
    L = size[0] * size[1] // P
    N = config.text_length if config.has_text else 0
    linears, depth = 4 * D * D + 3 * D * F, config.patch_depth
    total = 2 * L * 3 * P * D + depth * 2 * (L + N) * linears + depth * 4 * (L + N) ** 2 * D
    if N:  # the last block's prompt gives keys and values only
        total -= 2 * N * (linears - 2 * D * D) + 4 * N * (L + N) * D
    gate = D if config.gate == "per_channel" else 1
    total += (config.num_injections + int(config.inject_pixels)) * 2 * L * D * gate
    C, A = config.pixel_hidden_size, config.pixel_attn_hidden_size
    block = 2 * L * (6 * D * P * C + 2 * P * C * A + 4 * A * A + P * 8 * C * C) + 4 * L * L * A
    return total + config.pixel_depth * block + 2 * L * P * 6 * C


def predict(plan: Plan, config: PiDConfig, *, accelerator: bool = True, stripped: bool = True) -> Plan:
    """The same plan with its parts filled in."""
    parts = tuple(_MemoryPrediction(plan, config, stripped).parts())
    return replace(plan, parts=(*parts, ("driver", DRIVER)) if accelerator else parts)


class _MemoryPrediction:
    """Bytes that a plan takes, following what `inplace` holds at each stage.

    B images, L patch tokens evaluated at once (of a window, if there are some), N prompt tokens, D hidden, A and C
    width of the pixel blocks' attention and of a pixel.
    """

    def __init__(self, plan: Plan, config: PiDConfig, stripped: bool) -> None:
        self.plan, self.config, self.itemsize, self.B = plan, config, DTYPE_BYTES[plan.dtype], plan.batch
        self.width, self.height = (side if plan.window is None else min(side, plan.window) for side in plan.size)
        self.L = self.width * self.height // config.patch_size**2
        self.N = config.text_length if config.has_text else 0
        self.D, self.A, self.C = config.hidden_size, config.pixel_attn_hidden_size, config.pixel_hidden_size
        self.exact, self.eight = plan.quantization == "none", plan.scheme == "w8a8"
        self.keeps_modulation = plan.chunks.keep_modulation and self.exact
        blocks, self.pixel_weights, self.other_weights = parameters(config, stripped=stripped)
        self.weight_bytes = self.itemsize if self.exact else 1
        self.block = math.ceil(blocks / config.patch_depth) * self.weight_bytes

    def parts(self) -> Iterator[tuple[str, int]]:
        """What the peak consists of; the noisy image is the whole one, even in windows."""
        plan, config, itemsize, B, D, L = self.plan, self.config, self.itemsize, self.B, self.D, self.L
        offloaded = "blocks" in plan.offload
        yield "patch blocks", self.block * (min(2, config.patch_depth) if offloaded else config.patch_depth)
        yield "pixel blocks", self.pixel_weights * self.weight_bytes
        yield "adapter and embedders", self.other_weights * itemsize  # convolutions and small layers: not quantized

        whole = plan.size[0] * plan.size[1]
        L_whole, windows = whole // config.patch_size**2, plan.window is not None
        heads = config.num_injections + int(config.inject_pixels)
        gate = (D if config.gate == "per_channel" else 1) * 4
        tokens = heads * (D * itemsize + gate) if plan.keep_tokens else config.adapter_width * itemsize
        held = B * tokens * (L_whole + L if windows else L) if heads else 0  # a window's own cut beside all
        yield "latent tokens", held
        image = 3 * 4 * B
        beside = whole + self.width * self.height if windows else 0  # what windows are blended in, and a window
        rotations = (D // config.num_heads + self.A // config.pixel_num_heads) * 4 * (L + L_whole if windows else L)
        yield "noisy image and positions", image * (whole + beside) + rotations + self.N * B * (D + config.text_dim) * 4
        if self.keeps_modulation:
            rows = 6 * self.C * config.patch_size**2 * (D + 1) * itemsize
            yield "pixel modulation", config.pixel_depth * rows
        pixel_stage = self.pixel_stage()
        if offloaded and config.patch_depth > 1:  # all but the one that comes first have left by then
            pixel_stage -= self.block
        # Before there are tokens: a residual block's input, its activation, the same padded, and its output.
        adapter_stage = B * L_whole * config.adapter_width * itemsize * 17 // 4 - held if heads else 0
        # A window's own image, and the one that windows are blended in, are free between evaluations.
        between = self.between(image * whole) - image * beside
        yield "activations", max(self.patch_stage(), pixel_stage, between, adapter_stage)

    def between(self, image: int) -> int:
        """Between evaluations: the clean image, noise and their sum beside the noisy image.

        A velocity is an image more, converted in float64 piece by piece before there is noise.
        """
        from pidecode.sampling import FLOAT64_PIXELS  # loads torch, which importing this module must not

        if self.config.prediction != "velocity":
            return 3 * image
        pieces = 4 * 2 * 3 * 4 * self.B * min(self.plan.size[0] * self.plan.size[1], FLOAT64_PIXELS)
        return max(4 * image, 2 * image + pieces)

    def patch_stage(self) -> int:
        """Most bytes of the patch blocks: both streams, the joint buffer, attention's output, and one chunk.

        A chunk is at its projection or inside its feed-forward. One of several samples that lie apart in the joint
        buffer is projected into a buffer of its own.
        """
        D, L, N, itemsize = self.D, self.L, self.N, self.itemsize
        streams = self.B * (L * D * 4 + (L + N) * 4 * D * itemsize + N * D * 4)
        tokens, F = _run(self.B, L, self.plan.chunks.tokens), self.config.mlp_width
        hidden = tokens * 2 * F * itemsize + self.product(tokens, D, F)
        projected = tokens * 3 * D * itemsize if N and tokens > L else 0
        return streams + tokens * D * itemsize + max(hidden, projected + self.qkv(tokens, D))

    def pixel_stage(self) -> int:
        """Most bytes of the pixel blocks: of the attention between two passes over the tiles, or of a pass.

        The first pass fills the next block's compressed patches, the last the prediction.
        """
        B, D, L, A, itemsize, chunks = self.B, self.D, self.L, self.A, self.itemsize, self.plan.chunks
        patch, several = self.config.patch_size, self.config.pixel_depth > 1
        always = B * L * (D * itemsize + (self.C * 4 * patch**2 if several else 0) + A * itemsize)
        between = B * L * 3 * A * itemsize + max(B * L * A * itemsize, self.qkv(_run(B, L, chunks.tokens), A))
        columns = self.width // patch
        tile_tokens = columns * _run(B, self.height // patch, max(1, chunks.tile_tokens // columns))
        tile = tile_tokens * chunks.tile_rows * patch * self.C
        filled = max(self.width * self.height * 3 * 4 * B, B * L * A * 4 if several else 0)
        # The six vectors' rows of the modulation; those that are dequantized as their codes first.
        row = 6 if self.eight else 6 * itemsize + (0 if self.exact else 2)
        rows = 0 if self.keeps_modulation else self.C * chunks.tile_rows * patch * D * row
        inside = max(10 * itemsize, 4 * itemsize + self.beside(0, 4)) if self.eight else 10 * itemsize
        fresh = 0 if several and tile_tokens == B * L else 4  # one tile is all that is kept, and needs no copy
        during = filled + rows + tile * (fresh + inside) + (tile_tokens * D if self.eight else 0)
        return always + max(between, during)

    def beside(self, inside: int, outside: int) -> int:
        """Bytes per token that a product in eight bits takes beside its operand and its result."""
        if self.plan.quantization == "fp8":  # the kernel scales by itself, and gives bfloat16
            return inside + (0 if self.plan.dtype == "bfloat16" else outside * 2)
        return inside + outside * (8 - self.itemsize)  # results, and the same scaled, in four bytes each

    def product(self, tokens: int, inside: int, outside: int) -> int:
        """Bytes of a linear layer beside operand and result: none, a dequantized weight, or codes and results."""
        if self.exact:
            return 0
        return tokens * self.beside(inside, outside) if self.eight else inside * outside * self.itemsize

    def qkv(self, tokens: int, D: int) -> int:
        """Bytes of a chunk on its way into the joint buffer: a result of its own if quantized, or its float32 norm."""
        norm = tokens * D * 4 if self.itemsize < 4 else 0
        return norm if self.exact else max(norm, tokens * 3 * D * self.itemsize + self.product(tokens, D, 3 * D))


def _run(batch: int, length: int, size: int) -> int:
    """Tokens of the longest of `elementwise.runs`."""
    if length > size // 2:
        return math.ceil(length / max(1, math.ceil(length / size)))
    return length * math.ceil(batch / math.ceil(batch / (size // length)))


def plan_decode(
    network: str | PiDConfig | TinyDecoderConfig,
    size: tuple[int, int],
    machine: Machine | None = None,
    *,
    memory: int | None = None,
    batch: int = 1,
    dtype: str | None = None,
    quantization: Quantization | None = None,
    scheme: Scheme | None = None,
) -> Plan | FeedForwardPlan:
    """The first plan, from the fastest exact one to the lowest-memory one, that fits the machine.

    Args:
        network: "tiny", "v1", "v1.5", or the shape of a network.
        size: Width and height in pixels.
        machine: What the decode may use; by default this machine's best device.
        memory: Bytes of an accelerator's memory, in place of a machine.
        batch: Images at once.
        dtype: Fixes the number format.
        quantization: Fixes the weights' format.
        scheme: "w8a8" is never chosen, only asked for; without `quantization` it takes the machine's best format.

    Raises:
        DoesNotFitError: No plan fits; the message says what would.
        SettingError: The size does not divide into patches, or the machine cannot do what was asked for.
    """
    if isinstance(network, str) and network not in RELEASED_CONFIGS:
        raise SettingError(f"There is no network {network!r}; there are {', '.join(RELEASED_CONFIGS)}.")
    if machine is not None and memory is not None:
        raise SettingError("machine and memory both say what a decode may use; give one.")
    config = RELEASED_CONFIGS[network] if isinstance(network, str) else network
    if machine is None:
        machine = this_machine() if memory is None else Machine(memory=memory)
    if isinstance(config, TinyDecoderConfig):
        if quantization not in (None, "none") or scheme is not None:
            raise SettingError("Eight-bit weights act on student and teacher decoders only; leave them out.")
        from pidecode.engine.feed_forward import plan_feed_forward  # needs torch, which planning PiD does not

        return plan_feed_forward(config, size, machine, batch=batch, dtype=dtype)
    (width, height), patch = size, config.patch_size
    if min(size) < patch or width % patch or height % patch:
        raise SettingError(f"A size of {width}x{height} does not divide into patches of {patch} pixels.")
    first = Plan(
        size=size, batch=batch, dtype=dtype or ("bfloat16" if machine.accelerator else "float32"),
        quantization=_w8a8_format(machine, quantization) if scheme == "w8a8" else quantization or "none",
        scheme=scheme or "w8a16", chunks=Chunks.whole(patch) if machine.accelerator else CPU_CHUNKS,
        offload=(*["text"] * config.has_text, *["encoder"] * config.has_adapter) if machine.accelerator else (),
    )  # fmt: skip
    candidates = _candidates(first, machine, fixed=scheme == "w8a8" or quantization is not None)
    plans = [predict(plan, config, accelerator=machine.accelerator) for plan in candidates]
    for plan in plans:
        if plan.peak <= machine.memory:
            # The image's memory is not allocated by the time that the text encoder runs.
            beside = plan.peak - plan.working + TEXT_ENCODER
            return replace(plan, text_on_host="text" in plan.offload and beside > machine.memory)
    raise DoesNotFitError(_refusal(config, min(plans, key=lambda plan: plan.peak), machine))


def _w8a8_format(machine: Machine, quantization: Quantization | None) -> Quantization:
    """The format of weights that are multiplied in eight bits."""
    if quantization == "none" or quantization in machine.w8a8 or (quantization is None and machine.w8a8):
        return quantization or machine.w8a8[0]  # Plan itself refuses "none"
    raise SettingError(
        f"This machine does not multiply in {quantization or 'eight bits'}"
        + (f", only in {', '.join(machine.w8a8)}" if machine.w8a8 else "")
        + '; leave scheme out, or "w8a16".'
    )


def _candidates(first: Plan, machine: Machine, *, fixed: bool) -> Iterator[Plan]:
    """Plans from the fastest to the lowest-memory one, exact ones first; quantized ones unless that is `fixed`."""
    yield first
    if not machine.accelerator:
        recomputed = replace(first, keep_tokens=False)
        yield recomputed
        # int8 is the more exact format where weights are dequantized.
        smallest = [recomputed] if fixed else [recomputed, replace(recomputed, quantization="int8")]
        yield from smallest[1:]
    else:
        large = replace(first, chunks=Chunks.large(first.chunks.tile_rows))
        small = replace(large, keep_tokens=False, chunks=Chunks(tokens=1024, tile_tokens=512, tile_rows=1))
        offload = (*first.offload, "blocks")
        yield from (large, replace(large, keep_tokens=False), small, replace(large, offload=offload))
        smallest = [small] if fixed else [small, replace(small, quantization="int8")]
        smallest = [each for plan in smallest for each in (plan, replace(plan, offload=offload))]
        yield from smallest[1:]
    for plan in smallest:
        yield from (replace(plan, window=side) for side in WINDOWS if side < max(first.size))


def _refusal(config: PiDConfig, lowest: Plan, machine: Machine) -> str:
    width, height = lowest.size
    need = f"{width}x{height} (batch of {lowest.batch}) needs {lowest.peak / GB:.2f} GB at the least"
    message = f"{need}, with all that saves memory; {machine.memory / GB:.2f} GB are free."
    shape, step = width / height, config.patch_size
    for long_side in range(max(width, height) - step, 0, -step):
        short = max(step, round(long_side / max(shape, 1 / shape) / step) * step)
        smaller = (long_side, short) if width >= height else (short, long_side)
        plan = predict(replace(lowest, size=smaller, batch=1), config, accelerator=machine.accelerator)
        if plan.peak <= machine.memory:
            return f"{message} {smaller[0]}x{smaller[1]} one at a time would fit, as would a device with the memory."
    return f"{message} No size fits: the weights alone are too large for it."
