# SPDX-License-Identifier: Apache-2.0
"""A folder of aligned (image, quarter-size image, latent) arrays: training reads crops and encodes nothing."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pidecode.errors import TrainingError

SCALE = 4
"""Output pixels per low-resolution pixel."""
CELL = 32
"""Output pixels per latent cell: 8 low-resolution pixels times SCALE."""
SIDE_MULTIPLE = 64
"""Cached sides are multiples of this many output pixels, so that 2x2 latent cells pack."""
VIEWS = ("as_is", "mirrored")
"""Each image is encoded as it is and mirrored: latents cannot simply be flipped."""

Encoder = Callable[[Tensor], Tensor]


def held_out(names_by_category: Mapping[str, Sequence[str]], fraction: float = 0.1) -> set[str]:
    """File names kept out of training: of each category, the first `fraction` by SHA-256 of the name (at least one).

    The rule depends on names only, so it picks the same images wherever it runs.
    """
    chosen: set[str] = set()
    for names in names_by_category.values():
        ranked = sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())
        chosen.update(ranked[: max(1, round(len(ranked) * fraction))])
    return chosen


def read_manifest(folder: Path) -> dict[str, list[str]]:
    """Image names by category from `manifest.jsonl`; without one, every image in the folder as one category."""
    manifest = folder / "manifest.jsonl"
    if not manifest.is_file():
        endings = {".webp", ".png", ".jpg", ".jpeg"}
        return {"images": sorted(p.name for p in folder.iterdir() if p.suffix.lower() in endings)}
    by_category: dict[str, list[str]] = {}
    for line in manifest.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_category.setdefault(row["category"], []).append(row["file"])
    return by_category


def crop_to_multiple(image: Image.Image, shrink: float = 1.0) -> NDArray[np.uint8]:
    """`image` shrunk (Lanczos) and center-cropped to sides of SIDE_MULTIPLE: uint8 [H,W,3]."""
    image = image.convert("RGB")
    if shrink != 1.0:
        size = (round(image.width * shrink), round(image.height * shrink))
        image = image.resize(size, Image.Resampling.LANCZOS)
    width, height = (side // SIDE_MULTIPLE * SIDE_MULTIPLE for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.array(image.crop((left, top, left + width, top + height)))


def quarter(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The low-resolution image: antialiased bicubic at a quarter of each side, rounded to eight bits."""
    floats = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.interpolate(floats, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    result: NDArray[np.uint8] = small[0].round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return result


def to_signed(image: NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 [...,H,W,3] to float [...,3,H,W] in [-1,1]."""
    tensor = torch.as_tensor(image).float() / 127.5 - 1
    return tensor.movedim(-1, -3).contiguous()


def add_image(folder: Path, name: str, image: NDArray[np.uint8], encoders: Mapping[str, Encoder]) -> None:
    """Write one image's arrays, latents last and each by rename, so that a killed run leaves nothing half-made.

    `encoders` map a label to a function from [1,3,h,w] in [-1,1] to latents [1,32,h/8,w/8]; a latent file that
    exists is left as it is, so that a second encoder can be added later.
    """
    folder.mkdir(parents=True, exist_ok=True)
    small = quarter(image)
    for kind, array in (("image", image), ("small", small)):
        _write(folder / f"{name}.{kind}.npy", array)
    for label, encode in encoders.items():
        path = folder / f"{name}.latent_{label}.npy"
        if path.exists():
            continue
        signed = to_signed(small)[None]
        with torch.inference_mode():
            views = [encode(view)[0] for view in (signed, signed.flip(-1))]
        _write(path, torch.stack(views).half().numpy())


def _write(path: Path, array: NDArray[np.generic]) -> None:
    if path.exists():
        return
    part = path.with_suffix(".part")
    with part.open("wb") as handle:
        np.save(handle, array)
    os.replace(part, path)


@dataclass(frozen=True, slots=True)
class CropBatch:
    """Aligned training crops."""

    target: Tensor
    """[B,3,S,S] in [-1,1]: what the decoder should give."""
    small: Tensor
    """[B,3,S/4,S/4] in [-1,1]: the low-resolution image behind the latent."""
    latent: Tensor
    """[B,128,S/64,S/64]: normalized FLUX.2 latent cut from that of the whole image."""

    def to(self, device: str) -> CropBatch:
        """The same crops on another device."""
        return CropBatch(self.target.to(device), self.small.to(device), self.latent.to(device))


class LatentCache:
    """Random crops from a folder written by `add_image`; arrays are memory-mapped, so the folder may exceed memory.

    `labels` are the encoders whose latents are drawn, with their shares.
    """

    def __init__(self, folder: Path | str, labels: Mapping[str, float], *, only: Iterable[str] | None = None) -> None:
        self.folder = Path(folder)
        names = sorted(p.name.removesuffix(".image.npy") for p in self.folder.glob("*.image.npy"))
        wanted = None if only is None else set(only)
        self.labels = list(labels)
        self.names = [
            name
            for name in names
            if (wanted is None or name in wanted)
            and all((self.folder / f"{name}.latent_{label}.npy").exists() for label in self.labels)
        ]
        if not self.names:
            raise TrainingError(f"No cached images with latents {self.labels} in {self.folder}; build the cache first.")
        self.shares = np.array([labels[label] for label in self.labels], dtype=np.float64)
        self.shares /= self.shares.sum()
        self.images = [np.load(self.folder / f"{name}.image.npy", mmap_mode="r") for name in self.names]
        self.smalls = [np.load(self.folder / f"{name}.small.npy", mmap_mode="r") for name in self.names]
        self.latents = [
            [np.load(self.folder / f"{name}.latent_{label}.npy", mmap_mode="r") for label in self.labels]
            for name in self.names
        ]
        areas = np.array([image.shape[0] * image.shape[1] for image in self.images], dtype=np.float64)
        self.weights = areas / areas.sum()

    def crops(self, count: int, side: int, random: np.random.Generator) -> CropBatch:
        """`count` crops of `side` x `side` output pixels (a multiple of SIDE_MULTIPLE), half of them mirrored."""
        if side % SIDE_MULTIPLE:
            raise TrainingError(f"A crop side of {side} does not pack; it must be a multiple of {SIDE_MULTIPLE}.")
        targets: list[Tensor] = []
        smalls: list[Tensor] = []
        latents: list[Tensor] = []
        cells, small_side = side // CELL, side // SCALE
        usable = self._usable(side)
        for index in random.choice(usable[0], size=count, p=usable[1]):
            image = self.images[index]
            row = int(random.integers(0, image.shape[0] // CELL - cells + 1))
            column = int(random.integers(0, image.shape[1] // CELL - cells + 1))
            mirrored = bool(random.integers(0, 2))
            views = self.latents[index][int(random.choice(len(self.labels), p=self.shares))]
            # A mirrored view counts its columns from the right.
            view_column = image.shape[1] // CELL - cells - column if mirrored else column
            latents.append(torch.from_numpy(
                np.array(views[int(mirrored), :, row : row + cells, view_column : view_column + cells])
            ).float())  # fmt: skip
            for array, out, unit, extent in (
                (image, targets, CELL, side),
                (self.smalls[index], smalls, CELL // SCALE, small_side),
            ):
                cut = array[row * unit : row * unit + extent, column * unit : column * unit + extent]
                out.append(torch.from_numpy(np.array(cut[:, ::-1] if mirrored else cut)))
        packed = torch.nn.functional.pixel_unshuffle(torch.stack(latents), 2)
        return CropBatch(to_signed(torch.stack(targets)), to_signed(torch.stack(smalls)), packed)

    def _usable(self, side: int) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
        fits = np.array([min(image.shape[:2]) >= side for image in self.images])
        if not fits.any():
            raise TrainingError(f"No cached image is {side} pixels on both sides; take smaller crops.")
        weights = np.where(fits, self.weights, 0.0)
        return np.arange(len(weights)), weights / weights.sum()
