# SPDX-License-Identifier: Apache-2.0
"""Training images in an accelerator's own memory, cut there: a step then waits for no file and no processor."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pidecode.errors import TrainingError
from pidecode.training.tiny.augment import Chance
from pidecode.training.tiny.procedural import KINDS, procedural_image

SMALLEST = 256
"""Images with a shorter side are left out: no crop fits them."""


class ResidentImages:
    """Images uint8 [H,W,3] in one flat tensor, from which crops are drawn in proportion to their area."""

    def __init__(self, images: Iterable[Tensor], device: torch.device) -> None:
        kept = [image.to(device) for image in images if min(image.shape[:2]) >= SMALLEST]
        if not kept:
            raise TrainingError(f"There is no image of at least {SMALLEST} pixels on both sides; give larger ones.")
        self.pixels = torch.cat([image.reshape(-1, 3) for image in kept])
        sides = torch.tensor([image.shape[:2] for image in kept], device=device)
        self.heights, self.widths = sides.unbind(1)
        self.areas = (self.heights * self.widths).double()
        self.starts = (self.heights * self.widths).cumsum(0) - self.heights * self.widths
        self._cumulated: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.areas)

    def crops(self, count: int, side: int, generator: torch.Generator | None = None) -> Tensor:
        """`count` crops [count,3,side,side] in [-1,1], from images that are at least as large.

        Raises TrainingError where none is. Does not wait for the device, once `side` has been asked for.
        """
        weights = self._weights(side)
        chance = Chance(count, self.pixels.device, generator)
        which = torch.searchsorted(weights, chance.uniform(0, 1).double()).clamp(max=len(weights) - 1)
        heights, widths, starts = self.heights[which], self.widths[which], self.starts[which]
        top = (chance.uniform(0, 1) * (heights - side + 1)).long().minimum(heights - side)
        left = (chance.uniform(0, 1) * (widths - side + 1)).long().minimum(widths - side)
        along = torch.arange(side, device=self.pixels.device)
        rows = (top[:, None] + along)[:, :, None] * widths[:, None, None]
        places = starts[:, None, None] + rows + (left[:, None] + along)[:, None, :]
        return self.pixels[places].permute(0, 3, 1, 2).float() / 127.5 - 1

    def _weights(self, side: int) -> Tensor:
        """Cumulated shares of the images that a crop of this side fits."""
        if side not in self._cumulated:
            usable = torch.where(torch.minimum(self.heights, self.widths) >= side, self.areas, 0.0)
            if not usable.any():
                raise TrainingError(f"No image is {side} pixels on both sides; take smaller crops.")
            self._cumulated[side] = (usable / usable.sum()).cumsum(0)
        return self._cumulated[side]


def resident_images(
    paths: Sequence[Path], device: torch.device, *, shrinks: Sequence[float], procedural_seeds: int,
    procedural_side: int, fonts: Sequence[Path] = (),
) -> ResidentImages:  # fmt: skip
    """The images at `paths`, at each of the `shrinks`, and procedural ones of every kind, one for each seed."""
    tasks = [(kind, procedural_side, seed, tuple(fonts)) for seed in range(procedural_seeds) for kind in KINDS]
    processors = os.cpu_count() or 1
    with ThreadPoolExecutor(processors) as threads:
        photographs = threads.map(_opened, paths)
        with ProcessPoolExecutor(processors, multiprocessing.get_context("spawn")) as processes:
            drawn = processes.map(_drawn, tasks, chunksize=4) if tasks else iter(())
            return ResidentImages(_all_sizes(photographs, shrinks, drawn, device), device)


def _all_sizes(
    photographs: Iterable[NDArray[np.uint8]], shrinks: Sequence[float], drawn: Iterable[NDArray[np.uint8]],
    device: torch.device,
) -> Iterator[Tensor]:  # fmt: skip
    for array in photographs:
        image = torch.from_numpy(array).to(device)
        for shrink in shrinks:
            yield image if shrink == 1 else _shrunk(image, shrink)
    yield from map(torch.from_numpy, drawn)


def _shrunk(image: Tensor, shrink: float) -> Tensor:
    size = [round(side * shrink) for side in image.shape[:2]]
    planes = image.permute(2, 0, 1)[None].float()
    smaller = F.interpolate(planes, size=size, mode="bicubic", antialias=True)
    return smaller[0].round().clamp(0, 255).byte().permute(1, 2, 0)


def _opened(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def _drawn(task: tuple[str, int, int, Sequence[Path]]) -> NDArray[np.uint8]:
    return procedural_image(*task)
