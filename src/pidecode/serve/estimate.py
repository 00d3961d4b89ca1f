# SPDX-License-Identifier: Apache-2.0
"""What a decode will need before it runs: the size of its result, the memory it takes, and whether that is there."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from pidecode.decoder import PixelDecoder
from pidecode.devices import free_memory
from pidecode.errors import DoesNotFitError
from pidecode.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """An estimate for one decode. Bytes; `free` is None where the device does not tell."""

    width: int
    height: int
    weights: int
    """Already held."""
    working: int
    """Needed on top while it runs, as `planner.predict` has it."""
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
                f"A result of {self.width}x{self.height} pixels needs about {format_bytes(self.working)} of memory, "
                f"and {format_bytes(self.free)} are free. Use a smaller input, or end other programs."
            )


def plan(decoder: PixelDecoder, width: int, height: int, *, batch: int = 1) -> Plan:
    """Estimate the decode of a result of that size, run as this decoder would run it.

    A latent made from an image, or states made from a prompt, are made before: what that takes is not counted.
    """
    net = decoder.net
    return Plan(
        width=width,
        height=height,
        weights=sum(held.numel() * held.element_size() for held in (*net.parameters(), *net.buffers())),
        working=decoder.runner.plan_for((width, height), batch).working,
        free=free_memory(decoder.device),
    )


def resident_memory() -> int | None:
    """Bytes of main memory this process holds; None where the system does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except (OSError, ValueError, IndexError):
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
