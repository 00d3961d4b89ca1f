# SPDX-License-Identifier: Apache-2.0
"""What a decode will need before it runs: the size of its result, the memory it takes, and whether that is there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from pidecode.decoder import PixelDecoder
from pidecode.errors import DoesNotFitError

_FLOAT = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An estimate for one decode. Bytes; `free` is None where the device does not tell."""

    width: int
    height: int
    weights: int
    """Already held."""
    working: int
    """Needed on top while it runs, about."""
    free: int | None

    @property
    def fits(self) -> bool:
        """Whether the working memory is there, as far as one can know."""
        return self.free is None or self.working <= self.free

    def require(self) -> None:
        """Raise DoesNotFitError if it does not fit."""
        if not self.fits:
            assert self.free is not None
            raise DoesNotFitError(
                f"A result of {self.width}x{self.height} pixels needs about {_readable(self.working)} of memory, and "
                f"{_readable(self.free)} are free. Use a smaller input, or end other programs."
            )


def plan(decoder: PixelDecoder, width: int, height: int, *, batch: int = 1) -> Plan:
    """Estimate the decode of a result of that size.

    Counted are the pixel path (its hidden features, their modulation and the picture at each step), the image
    tokens with their keys, values and feed-forward, and the adapter's features; all as if nothing were chunked,
    so that the true peak lies below.
    """
    config, size = decoder.net.config, decoder.dtype.itemsize
    pixels = batch * width * height
    tokens = pixels // config.patch_size**2
    per_pixel = 6 * 3 * _FLOAT
    if config.pixel_depth:
        per_pixel += 17 * config.pixel_hidden_size * size
    injections = 1 + config.patch_depth // config.inject_interval if config.has_adapter else 0
    per_token = (14 + 2 * injections) * config.hidden_size * size
    latent_cells = pixels // (config.scale * max(1, config.latent_down // config.latent_unpatchify)) ** 2
    adapter = 4 * config.adapter_width * max(tokens, latent_cells) * size
    weights = sum(value.numel() * value.element_size() for value in decoder.net.parameters())
    return Plan(
        width=width,
        height=height,
        weights=weights,
        working=pixels * per_pixel + tokens * per_token + adapter,
        free=free_memory(decoder.device),
    )


def free_memory(device: torch.device) -> int | None:
    """Bytes that a new job may take on the device; None where neither it nor the system tells."""
    if device.type == "cpu":
        return _free_main_memory()
    module = torch.get_device_module(device)
    if not hasattr(module, "mem_get_info"):
        return _free_main_memory()
    free, _total = module.mem_get_info(device)
    cached = module.memory_reserved(device) - module.memory_allocated(device)
    return int(free) + int(cached)


def resident_memory() -> int | None:
    """Bytes of main memory this process holds; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _free_main_memory() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _readable(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
