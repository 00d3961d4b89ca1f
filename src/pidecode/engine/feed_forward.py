# SPDX-License-Identifier: Apache-2.0
"""Running a `TinyDecoder`: whole, or in overlapping tiles where the image is large or memory is short."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from pidecode.devices import resident_memory
from pidecode.engine.machine import DRIVER, DTYPE_BYTES, GB, Machine
from pidecode.errors import DoesNotFitError, SettingError
from pidecode.models.tiny import TinyDecoder, TinyEncoder, downscaled
from pidecode.registry.configs import TinyDecoderConfig, TinyEncoderConfig
from pidecode.sampling import WorkTracker

HEAP = 40_000_000
"""Main memory that a first decode takes beside tensors: kernels' code, and what the allocator keeps."""
HALO = 6
"""Cells of the first stage's grid that a tile sees beyond its edges. Measured with the shipped weights on a photograph:
the largest difference to the whole image is 1.1/255 with 4, 0.03/255 with 6 and 0.0003/255 with 8."""
TILES = (64, 32, 16)
"""Sides of tiles to try, in cells of the first stage's grid, largest first: the larger, the less is computed twice."""
ENCODER_WORK = 0.15  # work of one pass of the encoder in evaluations of the decoder, for progress only

MEASURED_SIDE = 256  # pixels of the side of an image decoded to measure the speed

TileCallback = Callable[[int, int], None]  # called before each tile with the number of tiles done and of all tiles


@dataclass(frozen=True, slots=True, kw_only=True)
class FeedForwardPlan:
    """How one feed-forward decode runs, and the memory it is predicted to need."""

    size: tuple[int, int]  # width and height of the image in pixels
    batch: int = 1  # images at once
    dtype: str = "float32"  # number format of the weights
    tile: int | None = None  # side of the tiles in cells of the first stage's grid; None decodes the image whole
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
        """Whether the image is that of the whole network, to 1/255."""
        return True

    def describe(self) -> str:
        """The plan in a few lines."""
        (width, height) = self.size
        lines = [
            f"{width}x{height}, batch of {self.batch}, {self.dtype}",
            "whole image at once" if self.tile is None else f"tiles of {self.tile} cells, {HALO} more on each side",
            *(f"  {name:22s} {size / GB:6.2f} GB" for name, size in self.parts),
            f"  {'predicted peak':22s} {self.peak / GB:6.2f} GB",
        ]
        return "\n".join(lines)


def _parameters(make: Callable[[], nn.Module]) -> int:
    """Number of parameters, without allocating any."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in make().parameters())


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
    cell = config.pixels_per_cell // config.latent_unpatchify
    tile_width, tile_height = width, height
    if plan.tile is not None:
        tile_width, tile_height = (min(side, (plan.tile + 2 * HALO) * cell) for side in (width, height))
    last = cell // config.unshuffle_grid  # output pixels per cell of the last grid
    features = B * config.width * (tile_width // last) * (tile_height // last) * wide
    pixels = 3 * B * tile_width * tile_height * wide
    # A block holds its input, the activation, the same with repeated edges, and a convolution's result.
    stage = max(4 * features + features // 16, 2 * features, features + 2 * pixels)
    image, encoder = 3 * 4 * B * width * height, TinyEncoderConfig(num_refinements=1)
    coarse = B * config.width * (width // cell) * (height // cell) * wide
    decoding = coarse + stage + image * (1 if plan.tile is not None else 2)
    # The encoder's widest block, at the source's size; the color fix: the image, two more and six of the source's.
    encoding = 3 * B * encoder.full_width * (width * height // config.scale**2) * wide
    parts = [
        ("weights", _parameters(lambda: TinyDecoder(config)) * wide),
        ("encoder", _parameters(lambda: TinyEncoder(encoder)) * wide),
        ("activations", max(decoding, encoding, 3 * image + 6 * image // config.scale**2)),
    ]
    if accelerator:
        parts.append(("driver", DRIVER))
    elif resident:
        parts += [("libraries", resident), ("heap", HEAP)]
    return replace(plan, parts=tuple(parts))


def plan_feed_forward(
    config: TinyDecoderConfig, size: tuple[int, int], machine: Machine, *, batch: int = 1, dtype: str | None = None
) -> FeedForwardPlan:
    """The first way that fits the machine: whole up to the largest tile, then ever smaller tiles.

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
    first = FeedForwardPlan(
        size=size, batch=batch, dtype=dtype or ("bfloat16" if machine.accelerator else "float32"),
        tile=default_tile(config, size),
    )  # fmt: skip
    smallest = first
    for tile in (first.tile, *(side for side in TILES if first.tile is None or side < first.tile)):
        smallest = predict(
            replace(first, tile=tile), config, accelerator=machine.accelerator, resident=resident_memory() or 0
        )
        if smallest.peak <= machine.memory:
            return smallest
    raise DoesNotFitError(
        f"{size[0]}x{size[1]} (batch of {batch}) needs {smallest.peak / GB:.2f} GB at the least, and "
        f"{machine.memory / GB:.2f} GB are free. Decode a smaller image, or fewer at once."
    )


def default_tile(config: TinyDecoderConfig, size: tuple[int, int]) -> int | None:
    """Side of the tiles of an image in cells; None for one that is no larger than a tile with its halo."""
    longest = max(size) // (config.pixels_per_cell // config.latent_unpatchify)
    return TILES[0] if longest > TILES[0] + 2 * HALO else None


class FeedForwardRunner:
    """Decodes latents with a `TinyDecoder`.

    Args:
        net: The network, on its device and in its number format.
        plan: How to run it; by default whole, and in tiles beyond about 2400 pixels.
    """

    changes_image: str | None = None  # no option of how it runs does

    def __init__(self, net: TinyDecoder, plan: FeedForwardPlan | None = None) -> None:
        # Channels last, so that convolutions on a CPU need not reorder their inputs.
        net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.net, self.plan = net, plan

    def plan_for(self, size: tuple[int, int], batch: int) -> FeedForwardPlan:
        """How width x height pixels are decoded here, with the memory that is predicted for it."""
        plan = self.plan or FeedForwardPlan(size=size)
        dtype = str(self.net.dtype).removeprefix("torch.")
        tile = plan.tile or default_tile(self.net.config, size)
        plan = replace(plan, size=size, batch=batch, dtype=dtype, tile=tile)
        accelerator = self.net.device.type != "cpu"
        weights = dict(predict(plan, self.net.config).parts)["weights"]  # loaded, hence resident already
        resident = max(0, (resident_memory() or 0) - weights)
        return predict(plan, self.net.config, accelerator=accelerator, resident=resident)

    @torch.no_grad()
    def decode(self, latent: Tensor, on_tile: TileCallback | None = None) -> Tensor:
        """Normalized latent `[B, C, h, w]` to the image `[B, 3, H, W]`, float32, not clamped."""
        net = self.net
        features = net.coarse(latent)
        cell = net.config.pixels_per_cell // net.config.latent_unpatchify
        rows, columns = features.shape[-2:]
        tile = self.plan.tile if self.plan else default_tile(net.config, (columns * cell, rows * cell))
        if tile is None:
            return net.fine(features).float()
        image = torch.empty(len(latent), 3, rows * cell, columns * cell, device=latent.device)
        count = itertools.count()
        total = -(-rows // tile) * -(-columns // tile)
        for top, bottom, first, last in _spans(rows, tile):
            for left, right, start, end in _spans(columns, tile):
                if on_tile is not None:
                    on_tile(next(count), total)
                part = net.fine(features[..., first:last, start:end])
                inner = part[
                    ..., (top - first) * cell : (bottom - first) * cell, (left - start) * cell : (right - start) * cell
                ]
                image[..., top * cell : bottom * cell, left * cell : right * cell] = inner
        return image

    def seconds_per_pixel(self) -> float:
        """Time per pixel of the image that a decode takes now, by a small one."""
        config = self.net.config
        for side in (1, MEASURED_SIDE // config.pixels_per_cell):  # a first decode also prepares kernels
            began = time.perf_counter()
            self.decode(torch.zeros(1, config.latent_channels, side, side, device=self.net.device)).sum().item()
        return (time.perf_counter() - began) / MEASURED_SIDE**2

    def reconstruct(self, latent: Tensor, on_tile: TileCallback | None = None) -> Tensor:
        """What a latent decodes to, at the size of the image it encodes: `[B, 3, h down, w down]` in [-1, 1]."""
        return downscaled(self.decode(latent.to(self.net.device), on_tile), self.net.config.scale)

    def reporting(self, tracker: WorkTracker, count: int) -> Callable[[Tensor], Tensor]:
        """`reconstruct` for an encoder that calls it `count` times; each call reports its refinement."""
        begun = itertools.count(1)

        def reconstruct(latent: Tensor) -> Tensor:
            index = next(begun)

            def report(done: int, total: int) -> None:
                before = encoding_work(index) - 1 - ENCODER_WORK
                tracker.report("encoding", (before + done / total) / encoding_work(count), "refinement", index, count)

            report(0, 1)
            return self.reconstruct(latent, report)

        return reconstruct


def encoding_work(num_refinements: int) -> float:
    """Work of encoding with so many refinements, in evaluations of the decoder."""
    return num_refinements + ENCODER_WORK * (1 + 2 * num_refinements)


def _spans(length: int, tile: int) -> Iterator[tuple[int, int, int, int]]:
    """Begin and end of every tile, and of what it sees."""
    for begin in range(0, length, tile):
        end = min(begin + tile, length)
        yield begin, end, max(0, begin - HALO), min(length, end + HALO)
