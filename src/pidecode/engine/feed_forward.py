# SPDX-License-Identifier: Apache-2.0
"""Running a `TinyDecoder`: whole, or in strips of rows, which need little memory and stay in a CPU's caches.

A strip is no tile with a margin: every convolution keeps the last two rows of its input for the next strip. So nothing
is computed twice, and the image is the whole network's, to rounding.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pidecode.devices import resident_memory
from pidecode.engine.machine import DRIVER, DTYPE_BYTES, GB, Machine
from pidecode.errors import DoesNotFitError, SettingError
from pidecode.models.tiny import DecoderBlock, TinyDecoder, TinyEncoder
from pidecode.registry.configs import TinyDecoderConfig, TinyEncoderConfig

HEAP = 40_000_000
"""Main memory that a first decode takes beside tensors: kernels' code, and what the allocator keeps."""
CPU_STRIP = 32_768
"""Cells of a stage's grid computed at once on a CPU. Larger tensors fall out of its caches, and those above 32 MB cost
page faults at every allocation."""
STRIPS = (1_048_576, 262_144, CPU_STRIP)
"""Cells at once to try on an accelerator whose memory does not hold the whole image, most first."""
ENCODER_WORK = 0.15  # of encoding an image, in evaluations of the decoder, for progress only

MEASURED_SIDE = 256  # pixels of the side of an image decoded to measure the speed

StripCallback = Callable[[int, int], None]  # called before each of several strips with the number done and of all


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForwardPlan:
    """How one feed-forward decode runs, and the memory it is predicted to need."""

    size: tuple[int, int]  # width and height of the image in pixels
    batch: int = 1  # images at once
    dtype: str = "float32"  # number format of the weights
    strip: int | None = None  # cells of a stage's grid that are computed at once; None decodes the image whole
    parts: tuple[tuple[str, int], ...] = ()  # what the peak consists of, in bytes

    @property
    def peak(self) -> int:
        """Predicted bytes on the device, the weights included."""
        return sum(size for _, size in self.parts)

    @property
    def working(self) -> int:
        """Predicted bytes beyond a network that is loaded already."""
        return dict(self.parts)["activations"]

    @property
    def exact(self) -> bool:
        """Whether the image is that of the whole network, to rounding."""
        return True

    def describe(self) -> str:
        """The plan in a few lines."""
        (width, height) = self.size
        lines = [
            f"{width}x{height}, batch of {self.batch}, {self.dtype}",
            "whole image at once" if self.strip is None else f"strips of {self.strip} cells",
            *(f"  {name:22s} {size / GB:6.2f} GB" for name, size in self.parts),
            f"  {'predicted peak':22s} {self.peak / GB:6.2f} GB",
        ]
        return "\n".join(lines)


@functools.lru_cache(maxsize=8)
def _parameters(config: TinyDecoderConfig | TinyEncoderConfig) -> int:
    """Number of parameters, without allocating any."""
    with torch.device("meta"):
        net = TinyDecoder(config) if isinstance(config, TinyDecoderConfig) else TinyEncoder(config)
    return sum(parameter.numel() for parameter in net.parameters())


def strip_rows(strip: int | None, batch: int, width: int, height: int) -> int:
    """Rows of a stage's output grid, `width` x `height` cells, in a strip: an even number, and at least two."""
    return 2 * height if strip is None else max(1, strip // (batch * width * 2)) * 2


def predict(
    plan: FeedForwardPlan, config: TinyDecoderConfig, *, accelerator: bool = False, resident: int = 0
) -> FeedForwardPlan:
    """The same plan with its parts filled in: of `upscale`, the encoder and the color fix included.

    Args:
        plan: How the decode runs.
        config: Shape of the decoder.
        accelerator: Whether the device has memory apart from the host's.
        resident: Bytes this process holds beside the weights, which count where the device is the CPU.
    """
    wide, (width, height), B = DTYPE_BYTES[plan.dtype], plan.size, plan.batch
    image, encoder = 3 * 4 * B * width * height, TinyEncoderConfig()
    decoding = _decode_memory(plan, config)
    if config.base is not None:
        small = replace(plan, size=(width // config.scale, height // config.scale))
        # The low-resolution image, and its copy with a border that the last stage reads.
        decoding = max(decoding, _decode_memory(small, config.base)) + image // config.scale**2 * (4 + wide) // 4
    if not accelerator:
        decoding += (
            image * wide * 15 // 100
        )  # measured: what the heap keeps between tensors of a strip and of the image
    # The encoder's widest block, at the source's size; the color fix: nine of the source's size, and two convolutions
    # of one plane, whose channels a CPU pads to sixteen.
    encoding = 3 * B * encoder.full_width * (width * height // config.scale**2) * wide
    fixing = image + 20 * image // config.scale**2
    parts = [
        ("weights", _parameters(config) * wide),
        ("encoder", _parameters(encoder) * wide),
        ("activations", max(decoding, encoding, fixing)),
    ]
    if accelerator:
        parts.append(("driver", DRIVER))
    elif resident:
        parts += [("libraries", resident), ("heap", HEAP)]
    return replace(plan, parts=tuple(parts))


def _decode_memory(plan: FeedForwardPlan, config: TinyDecoderConfig) -> int:
    """Bytes that the stages of a network and its image take, beside its weights."""
    wide, (width, height), B = DTYPE_BYTES[plan.dtype], plan.size, plan.batch
    last = config.pixel_shuffle  # output pixels per cell of the last grid
    columns, count = width // last, height // last
    # The first strip is longer, by the rows that the output is behind.
    rows = min(count, strip_rows(plan.strip, B, columns, count) + 2 * (1 + config.blocks[-1]))
    cells, features = B * columns * rows, B * config.width * columns * rows * wide
    # A block holds its input, an activation with repeated edges, and a convolution's result. The pixels follow, in
    # other sizes, for which the allocator takes new memory.
    tails = 0 if plan.strip is None else 6 * config.blocks[-1] * B * config.width * columns * wide
    stage = 5 * features + 3 * cells * last**2 * (wide + 4) + tails
    before = B * config.width * columns * count * wide // (4 if len(config.blocks) > 1 else 1)
    return before + stage + 3 * 4 * B * width * height


def plan_feed_forward(
    config: TinyDecoderConfig, size: tuple[int, int], machine: Machine, *, batch: int = 1, dtype: str | None = None
) -> FeedForwardPlan:
    """The first way that fits the machine: strips on a CPU; elsewhere whole, then in ever smaller strips.

    Args:
        config: Shape of the decoder.
        size: Width and height of the image in pixels.
        machine: What a decode may use.
        batch: Images at once.
        dtype: Number format; by default bfloat16 on an accelerator, else float32.

    Raises:
        SettingError: The size is no multiple of what a latent cell becomes.
        DoesNotFitError: No way fits.
    """
    cell = config.pixels_per_cell
    if min(size) < cell or any(side % cell for side in size):
        raise SettingError(f"A size of {size[0]}x{size[1]} is no multiple of the {cell} pixels of a latent cell.")
    dtype = dtype or ("bfloat16" if machine.accelerator else "float32")
    for strip in (None, *STRIPS) if machine.accelerator else (CPU_STRIP,):
        plan = predict(
            FeedForwardPlan(size=size, batch=batch, dtype=dtype, strip=strip), config,
            accelerator=machine.accelerator, resident=resident_memory() or 0,
        )  # fmt: skip
        if plan.peak <= machine.memory:
            return plan
    raise DoesNotFitError(
        f"{size[0]}x{size[1]} (batch of {batch}) needs {plan.peak / GB:.2f} GB at the least, and "
        f"{machine.memory / GB:.2f} GB are free. Decode a smaller image, or fewer at once."
    )


class _Memory:
    """Memory that the convolutions of a stage share, for their padded inputs and for the rows that each keeps.

    Tensors allocated one by one leave holes between those that are kept, which the allocator neither fills nor returns.
    """

    def __init__(self, kept: Tensor | None = None) -> None:
        self.kept = kept
        self.memory: Tensor | None = None

    def padded(self, like: Tensor, rows: int, columns: int) -> Tensor:
        """An input `[B, C, rows, columns]`, in place of the one before."""
        count = len(like) * like.shape[1] * rows * columns
        if self.memory is None or self.memory.numel() < count:
            self.memory = None  # freed before its successor is allocated
            self.memory = like.new_empty(count)
        return _channels_last(self.memory[:count], like, rows, columns)

    def keep(self, rows: Tensor, before: Tensor | None) -> Tensor:
        """A copy of some rows, in place of those kept before."""
        if before is None:
            if self.kept is None:
                return rows.clone()
            taken, self.kept = self.kept.tensor_split([rows.numel()])
            before = _channels_last(taken, rows, *rows.shape[2:])
        return before.copy_(rows)


def _channels_last(memory: Tensor, like: Tensor, rows: int, columns: int) -> Tensor:
    """Memory as `[B, C, rows, columns]`, with batch and channels of another tensor."""
    return memory.view(len(like), rows, columns, like.shape[1]).permute(0, 3, 1, 2)


class _Rows:
    """Input of a 3x3 convolution that comes in strips of rows, with repeated borders."""

    def __init__(self, memory: _Memory | None = None) -> None:
        self.memory = memory or _Memory()
        self.tail: Tensor | None = None  # the two last rows so far

    def padded(self, strip: Tensor, *, last: bool, silu: bool = False) -> Tensor:
        """The next rows `[B, C, n, W]` behind those kept, padded where a border is: `[B, C, rows, W + 2]`.

        The convolution gives two rows less. `silu` applies the activation on the way. The next call of any `_Rows` on
        this memory overwrites the result.
        """
        count, width = strip.shape[2:]
        top = 1 if self.tail is None else 2
        padded = self.memory.padded(strip, top + count + last, width + 2)
        inner = padded[:, :, top : top + count, 1:-1]
        if silu:
            torch.ops.aten.silu.out(strip, out=inner)
        else:
            inner.copy_(strip)
        rows = padded[:, :, top : top + count]
        rows[..., 0], rows[..., -1] = rows[..., 1], rows[..., -2]
        padded[:, :, :top] = padded[:, :, 1:2] if self.tail is None else self.tail
        if last:
            padded[:, :, -1] = padded[:, :, -2]
        else:
            self.tail = self.memory.keep(padded[:, :, -2:], self.tail)
        return padded


class _BlockRows:
    """A `DecoderBlock` without norms whose input comes in strips of rows; its output is two rows behind."""

    def __init__(self, block: DecoderBlock, memory: _Memory) -> None:
        self.block, self.memory, self.first, self.second = block, memory, _Rows(memory), _Rows(memory)
        self.tail: Tensor | None = None  # the two last rows of the input, to which no output was added yet

    def __call__(self, buffer: Tensor, begin: int, end: int, *, last: bool) -> tuple[int, int]:
        """Overwrite the rows of the buffer from `begin` to `end` by the output; returns where that begins and ends."""
        x = buffer[:, :, begin:end]
        hidden = _convolved(self.block.conv1, self.first.padded(x, last=last, silu=True))
        padded = self.second.padded(hidden, last=last, silu=True)
        del hidden  # freed before its successor is allocated
        hidden = _convolved(self.block.conv2, padded)
        if self.tail is not None:
            begin -= 2
            buffer[:, :, begin : begin + 2] = self.tail
        end = begin + hidden.shape[2]
        buffer[:, :, begin:end] += hidden
        if not last:
            self.tail = self.memory.keep(x[:, :, -2:], self.tail)
        return begin, end


def _convolved(conv: nn.Conv2d, padded: Tensor) -> Tensor:
    return functional.conv2d(padded, conv.weight, conv.bias)


def _doubled(conv: nn.Conv2d, padded: Tensor, out: Tensor) -> int:
    """A 3x3 convolution of the grid enlarged twofold by repetition, from the small grid, to the first rows of `out`.

    Returns the number of rows.

    Of the nine cells under the kernel, which lie on four of the small grid, each of the four is multiplied once.
    """
    weight = conv.weight.float()
    above, middle, below = weight.unbind(2)
    rows = torch.stack((above, middle + below, above + middle, below), dim=2).unflatten(2, (2, 2))
    left, center, right = rows.unbind(4)
    kernel = torch.stack((left, center + right, left + center, right), dim=4).unflatten(4, (2, 2))
    # [out, in, row parity, row, column parity, column] to one convolution with a channel per parity
    kernel = kernel.permute(2, 4, 0, 1, 3, 5).flatten(0, 2).to(padded).contiguous(memory_format=torch.channels_last)
    assert conv.bias is not None
    parts = functional.conv2d(padded, kernel, conv.bias.repeat(4)).chunk(4, dim=1)
    height, width = padded.shape[2] - 2, padded.shape[3] - 2
    out = out[:, :, : 2 * height]
    for part, (row, column) in zip(parts, itertools.product((0, 1), repeat=2), strict=True):
        out[:, :, row::2, column::2] = part[:, :, row : row + height, column : column + width]
    return 2 * height


def _stage_strips(
    stage: nn.Sequential, features: Tensor, rows: int, low_res_input: tuple[nn.Conv2d, Tensor] | None
) -> Iterator[Tensor]:
    """Output of a stage after the first, in strips of `rows` rows.

    Args:
        stage: The stage.
        features: Output of the stage before, `[B, C, H, W]`.
        rows: Rows of a strip.
        low_res_input: What the stage reads besides its features: a convolution, and its input with a border of one
            cell.

    Yields:
        The next rows, `[B, C, n, 2 W]`, which the next strip overwrites.
    """
    conv, blocks = cast(nn.Conv2d, stage[0]), cast(list[DecoderBlock], [*stage][1:])
    begin, height = 0, features.shape[2]
    batch, channels, _, width = features.shape
    tall = min(2 * height, rows + 2 + 2 * len(blocks)) + 2 * len(blocks)
    buffer = _channels_last(features.new_empty(batch * channels * tall * 2 * width), features, tall, 2 * width)
    memory = _Memory(features.new_empty(batch * channels * 2 * (2 * width + 2) * (1 + 3 * len(blocks))))
    first, streams, done = _Rows(memory), [_BlockRows(block, memory) for block in blocks], 0
    for end in _ends(height, rows, len(blocks)):
        last, top = end == height, 2 * len(blocks)  # each block may move the rows up by two
        count = _doubled(conv, first.padded(features[:, :, begin:end], last=last), buffer[:, :, top:])
        bottom = top + count
        if low_res_input is not None:
            low_res_conv, cells = low_res_input
            buffer[:, :, top:bottom] += _convolved(low_res_conv, cells[:, :, done : done + count + 2])
            done += count
        for stream in streams:
            top, bottom = stream(buffer, top, bottom, last=last)
        yield buffer[:, :, top:bottom]
        begin = end


def _ends(height: int, rows: int, blocks: int) -> list[int]:
    """Where the strips of a stage's input end, so that its output comes `rows` at a time.

    The output is behind by a row of the input for the first convolution, and by one (two of its own) per block.
    """
    return [*range(rows // 2 + 1 + blocks, height, rows // 2), height]


class FeedForwardRunner:
    """Decodes latents with a `TinyDecoder`.

    Args:
        net: The network, on its device and in its number format.
        plan: How to run it; by default in strips on a CPU, and whole elsewhere.
    """

    changes_image: str | None = None  # no option of how it runs does

    def __init__(self, net: TinyDecoder, plan: FeedForwardPlan | None = None) -> None:
        # Channels last, so that convolutions on a CPU need not reorder their inputs.
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net, self.plan = net, plan
        self.base = None if net.base is None else FeedForwardRunner(net.base, plan)

    def place(self, device: torch.device) -> None:
        """Move the network to a device."""
        self.net.to(device)

    @property
    def strip(self) -> int | None:
        """Cells computed at once, or None for whole images."""
        if self.plan is not None:
            return self.plan.strip
        return CPU_STRIP if self.net.device.type == "cpu" else None

    def plan_for(self, size: tuple[int, int], batch: int) -> FeedForwardPlan:
        """How width x height pixels are decoded here, with the memory that is predicted for it."""
        plan = FeedForwardPlan(
            size=size, batch=batch, dtype=str(self.net.dtype).removeprefix("torch."), strip=self.strip
        )
        weights = dict(predict(plan, self.net.config).parts)["weights"]  # loaded, hence resident already
        resident = max(0, (resident_memory() or 0) - weights)
        return predict(plan, self.net.config, accelerator=self.net.device.type != "cpu", resident=resident)

    @torch.no_grad()
    def decode(self, latent: Tensor, on_strip: StripCallback | None = None, *, low_res: Tensor | None = None) -> Tensor:
        """Normalized latent `[B, C, h, w]` to the image `[B, 3, H, W]`, float32, not clamped.

        `low_res` is the low-resolution image `[B, 3, H/scale, W/scale]` where it is known; low frequencies are then
        left to the caller. By default the base computes it, and they are corrected. It is ignored without a base.
        """
        if self.base is None or low_res is not None:
            return self._uncorrected(latent, None if self.base is None else low_res, on_strip)
        # The base first: the larger network then reuses its memory, the other way around the heap keeps holes.
        estimate = self.base.decode(latent)
        image = self._uncorrected(latent, estimate, on_strip)
        correction = self.net.correction(image, estimate)
        for channel in range(3):  # one at a time, to save memory
            part = correction[:, channel : channel + 1]
            image[:, channel : channel + 1] += functional.interpolate(
                part, scale_factor=self.net.config.scale, mode="bicubic"
            )
        return image

    def _uncorrected(self, latent: Tensor, low_res: Tensor | None, on_strip: StripCallback | None) -> Tensor:
        """The image without the correction of its low frequencies."""
        net = self.net
        features = net.coarse(latent)
        stages = list(enumerate(cast(list[nn.Sequential], [*net.stages][1:]), start=1))
        for index, stage in stages[:-1]:
            features = self._whole_stage(stage, features, self._low_res_input(index, low_res))
        head = _Rows()
        if not stages:
            return net.pixels(head.padded(features, last=True)).float()
        index, final = stages[-1]
        height, width = 2 * features.shape[2], 2 * features.shape[3]
        rows = strip_rows(self.strip, len(features), width, height)
        side = net.config.pixel_shuffle
        image = torch.empty(len(latent), 3, height * side, width * side, device=latent.device)
        count, done = len(_ends(features.shape[2], rows, len(final) - 1)), 0
        strips = _stage_strips(final, features, rows, self._low_res_input(index, low_res))
        for number in range(count):
            if on_strip is not None and count > 1:
                on_strip(number, count)
            pixels = net.pixels(head.padded(next(strips), last=number == count - 1))
            image[:, :, done : done + pixels.shape[2]] = pixels
            done += pixels.shape[2]
        return image

    def _low_res_input(self, stage: int, low_res: Tensor | None) -> tuple[nn.Conv2d, Tensor] | None:
        """The convolution by which a stage reads the low-resolution image, and its input with a border of one cell."""
        if low_res is None:
            return None
        cells = functional.pixel_unshuffle(low_res, self.net.config.low_res_unshuffle(stage)).to(self.net.dtype)
        padded = functional.pad(cells, (1, 1, 1, 1), mode="replicate")
        return cast(nn.Conv2d, self.net.low_res_inputs[stage - 1]), padded.contiguous(memory_format=torch.channels_last)

    def seconds_per_pixel(self) -> float:
        """Time per pixel of the image that a decode takes now, by a small one."""
        config = self.net.config
        for side in (1, MEASURED_SIDE // config.pixels_per_cell):  # a first decode also prepares kernels
            began = time.perf_counter()
            self.decode(torch.zeros(1, config.latent_channels, side, side, device=self.net.device)).sum().item()
        return (time.perf_counter() - began) / MEASURED_SIDE**2

    def _whole_stage(
        self, stage: nn.Sequential, features: Tensor, low_res_input: tuple[nn.Conv2d, Tensor] | None
    ) -> Tensor:
        """Output of a stage after the first, which is small beside the image: `[B, C, 2 H, 2 W]`."""
        batch, channels, height, width = features.shape
        rows = strip_rows(self.strip, batch, 2 * width, 2 * height)
        out = torch.empty(
            (batch, channels, 2 * height, 2 * width), dtype=features.dtype, device=features.device,
            memory_format=torch.channels_last,
        )  # fmt: skip
        done = 0
        for strip in _stage_strips(stage, features, rows, low_res_input):
            out[:, :, done : done + strip.shape[2]] = strip
            done += strip.shape[2]
        return out
