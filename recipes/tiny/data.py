# SPDX-License-Identifier: Apache-2.0
"""Training data of `tiny`: random crops of photographs and synthetic images, augmented, with taef2's latents.

Images are decoded once, at full, half and quarter scale, into a folder of memory-mapped arrays, so that a crop costs
nothing. A crop is encoded as if it were a whole image: a latent cut from that of a whole image does not determine its
own colors, because the autoencoder normalizes over the image.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from PIL import Image
from synthetic import KINDS, synthetic_image
from torch import Tensor

from pidecode.errors import SettingError, TrainingError
from pidecode.files import atomic_write, writable_folder
from pidecode.training.noise import LatentNoiseConfig, PerSampleRNG, noise_latent, per_sample, seed_of

SCALE = 4
"""Output pixels per pixel of the low-resolution image."""
SIDE_MULTIPLE = 64
"""Output pixels per latent cell of 128 channels."""
SCALES = (1.0, 0.5, 0.25)
"""Scales at which photographs are cropped, so that faces, hair and letters occur at many sizes."""
SYNTHETIC_SIDE = 512
IMAGE_ENDINGS = frozenset({".webp", ".png", ".jpg", ".jpeg"})
LUMA = (0.299, 0.587, 0.114)
_THIRD = 0.4307  # a normal value lies beyond it with a third's probability on either side


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyDataConfig:
    """Images, crops and augmentation."""

    source: str = ""
    """Folder of photographs, searched with its subfolders."""
    cache: str = ""
    """Folder of decoded images; empty uses `images` in the run's folder."""
    crops: tuple[tuple[int, int, float], ...] = ((256, 4, 0.75), (384, 2, 0.15), (512, 1, 0.1))
    """Crop side in pixels, crops per batch, and share of the batches."""
    reduction: int = SCALE
    """Pixels of a crop per pixel of the low-resolution image, along each side; 1 encodes the crops themselves."""
    synthetic_images: int = 160
    """Synthetic images that are generated."""
    synthetic_share: float = 0.2
    """Share of the crops taken from them."""
    recolor: float = 0.3
    """Share of crops with permuted channels, other saturation, brightness and contrast."""
    join: float = 0.1
    """Share of crops joined with another one, or a flat color, along a straight edge."""
    smooth: float = 0.0
    """Share of crops replaced by areas of one color, and smooth ones between four."""
    targets: str = ""
    """Folder that `targets.py` filled: crops with taef2's decode enlarged by Real-ESRGAN; empty for none."""
    targets_share: float = 0.4
    """Share of the batches taken from that folder; they are flipped and turned, and not recolored again."""
    targets_batch: int = 4
    """Crops in such a batch."""

    def __post_init__(self) -> None:
        if not self.crops or any(side % SIDE_MULTIPLE or side < SIDE_MULTIPLE for side, _, _ in self.crops):
            raise SettingError(f"data.crops is {self.crops}; sides must be multiples of {SIDE_MULTIPLE}.")
        if self.reduction not in (1, SCALE):
            raise SettingError(f"data.reduction is {self.reduction}; it must be 1 or {SCALE}.")
        if self.targets and (self.reduction != SCALE or self.targets_batch < 1):
            raise SettingError(
                f"data.targets needs data.reduction={SCALE} and at least one crop in data.targets_batch; got "
                f"{self.reduction} and {self.targets_batch}."
            )
        for name in ("synthetic_share", "recolor", "join", "smooth", "targets_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"data.{name} is {getattr(self, name)}; it must lie within 0 and 1.")


@dataclass(frozen=True, slots=True)
class CropBatch:
    """Crops with their latents."""

    image: Tensor
    """`[B, 3, S, S]` in [-1, 1]."""
    low: Tensor
    """`[B, 3, s, s]` in [-1, 1]: the low-resolution image behind the latent, s = S / reduction."""
    clean_latent: Tensor
    """`[B, 128, s/16, s/16]`: taef2's normalized latent of it."""
    latent: Tensor
    """The same with noise on part of the samples, divided by 1 - sigma as the decoder takes it."""
    sigma: Tensor
    """`[B]`: noise level of each latent."""
    smooth: Tensor
    """`[B]`: whether the crop was replaced by an area of one color, or a smooth one."""
    target: Tensor | None = None
    """`[B, 3, S, S]` in [-1, 1]: taef2's decode of the clean latent, enlarged by Real-ESRGAN, where it is known."""


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
    """Image names by category from `manifest.jsonl`; without one, every image of the folder as one category."""
    manifest = folder / "manifest.jsonl"
    if not manifest.is_file():
        paths = (path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_ENDINGS)
        return {"images": sorted(path.relative_to(folder).as_posix() for path in paths)}
    by_category: dict[str, list[str]] = {}
    for line in manifest.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        by_category.setdefault(row["category"], []).append(row["file"])
    return by_category


def crop_to_multiple(image: Image.Image, scale: float = 1.0) -> NDArray[np.uint8]:
    """An image resized (Lanczos) and center-cropped to sides of SIDE_MULTIPLE: uint8 `[H, W, 3]`."""
    image = image.convert("RGB")
    if scale != 1.0:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    width, height = (side // SIDE_MULTIPLE * SIDE_MULTIPLE for side in image.size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return np.array(image.crop((left, top, left + width, top + height)))


def quarter(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The low-resolution image: antialiased bicubic at a quarter of each side, rounded to eight bits."""
    floats = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    small = F.interpolate(floats, scale_factor=1 / SCALE, mode="bicubic", antialias=True)
    result: NDArray[np.uint8] = small[0].round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy()
    return result


def to_signed(image: NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 `[..., H, W, 3]` to float `[..., 3, H, W]` in [-1, 1]."""
    tensor = torch.as_tensor(image).float() / 127.5 - 1
    return tensor.movedim(-1, -3).contiguous()


def prepare_images(config: TinyDataConfig, cache: Path, seed: int, progress: Callable[[str], None]) -> dict[str, str]:
    """Decode photographs at every scale and generate synthetic images, into `cache`; what exists is kept.

    Returns:
        Unreadable files, with the reason.

    Raises:
        TrainingError: The folder holds no readable image.
    """
    folder = Path(config.source).expanduser()
    if not config.source or not folder.is_dir():
        raise TrainingError(f"There are no images at {config.source!r}; give a folder with --data.")
    writable_folder(cache)
    categories = read_manifest(folder)
    validation = held_out(categories)
    skipped: dict[str, str] = {}
    names = sorted({name for group in categories.values() for name in group})
    for index, name in enumerate(names):
        key = hashlib.sha256(name.encode()).hexdigest()[:16]
        part = "val" if name in validation else "train"
        if (cache / f"{part}-{key}.done").exists():
            continue
        try:
            with Image.open(folder / name) as image:
                arrays = [(scale, crop_to_multiple(image, scale)) for scale in (SCALES if part == "train" else (1.0,))]
        except Exception as fault:  # a damaged file can make a decoder raise nearly anything
            skipped[name] = str(fault) or type(fault).__name__
            continue
        for scale, array in arrays:
            if min(array.shape[:2]) >= SIDE_MULTIPLE:
                _save_array(cache / f"{part}-{key}-{scale}.npy", array)
        (cache / f"{part}-{key}.done").touch()
        if index % 50 == 49:
            progress(f"Decoded {index + 1} of {len(names)} images.")
    for index in range(config.synthetic_images):
        path = cache / f"synthetic-{index:04d}.npy"
        if not path.exists():
            kind = list(KINDS)[index % len(KINDS)]
            _save_array(path, synthetic_image(kind, SYNTHETIC_SIDE, seed_of(seed, "synthetic", index)))
    if not list(cache.glob("train-*.npy")):
        raise TrainingError(f"{folder} holds no readable image of at least {SIDE_MULTIPLE} pixels.")
    return skipped


def _save_array(path: Path, array: NDArray[np.uint8]) -> None:
    with atomic_write(path, overwrite=True) as file:
        np.save(file, array)


def validation_images(cache: Path, count: int, side: int) -> Iterator[Tensor]:
    """The middles `[1, 3, s, s]` in [-1, 1], at most `side` pixels a side, of images kept out of training."""
    for path in sorted(cache.glob("val-*.npy"))[:count]:
        array = np.load(path, mmap_mode="r")
        height, width = (min(side, extent) // SIDE_MULTIPLE * SIDE_MULTIPLE for extent in array.shape[:2])
        top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
        yield to_signed(np.array(array[top : top + height, left : left + width]))[None]


class CropLoader:
    """Batches of crops by number (a `TrainLoader`): every random number comes from the seed and the batch's number.

    Args:
        config: Crops and augmentation.
        noise: Noise on latents.
        cache: A folder filled by `prepare_images`.
        encode: taef2's encoder: images `[B, 3, h, w]` in [-1, 1] to latents `[B, 32, h/8, w/8]`.
        device: Where batches are put.
        seed: Seed of the run.
        rank: This process among all.
        world_size: Number of processes.
        skipped: Unreadable files, with the reason.
    """

    def __init__(  # noqa: PLR0913
        self,
        config: TinyDataConfig,
        noise: LatentNoiseConfig,
        cache: Path,
        encode: Callable[[Tensor], Tensor],
        *,
        device: torch.device,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        self.config, self.noise, self.encode, self.device = config, noise, encode, device
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.skipped = dict(skipped or {})
        paths = {kind: sorted(cache.glob(f"{kind}-*.npy")) for kind in ("train", "synthetic")}
        self._arrays = {kind: [np.load(path, mmap_mode="r") for path in found] for kind, found in paths.items()}
        self._targets = sorted(Path(config.targets).expanduser().glob("*.npz")) if config.targets else []
        if config.targets and not self._targets:
            raise TrainingError(f"{config.targets} holds no crops; fill it with targets.py first.")
        paths["targets"] = self._targets
        text = "\n".join(path.name for found in paths.values() for path in found)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]
        self._weights: dict[tuple[str, int], NDArray[np.float64]] = {}

    def batch(self, number: int) -> tuple[CropBatch, PerSampleRNG, tuple[str, ...]]:
        """The batch of that number, the random numbers for the rest of its step, and its samples' names."""
        generator = np.random.default_rng(seed_of(self.seed, "size", number))
        sides, counts, shares = zip(*self.config.crops, strict=True)
        pick = int(generator.choice(len(sides), p=np.array(shares) / sum(shares)))
        with_target = bool(self._targets) and generator.uniform() < self.config.targets_share
        count = self.config.targets_batch if with_target else int(counts[pick])
        indices = range(self.rank * count, (self.rank + 1) * count)
        generators = [np.random.default_rng(seed_of(self.seed, number, "crop", index)) for index in indices]
        rng = PerSampleRNG(self.seed, number, indices, self.device)
        target: Tensor | None = None
        if with_target:
            pairs = [self._crop_with_target(each) for each in generators]
            image, target = (to_signed(np.stack(crops)).to(self.device) for crops in zip(*pairs, strict=True))
            smooth = torch.zeros(count, dtype=torch.bool, device=self.device)
        else:
            image = to_signed(np.stack([self._crop(int(sides[pick]), each) for each in generators])).to(self.device)
            image = augment(image, rng, recolor=self.config.recolor, join=self.config.join)
            smooth = _happens(self.config.smooth, rng)
            image = torch.where(smooth, smooth_fields(image, rng), image)
        with torch.no_grad():
            low = image
            if self.config.reduction > 1:
                low = F.interpolate(image, scale_factor=1 / SCALE, mode="bicubic", antialias=True).clamp(-1, 1)
            clean = F.pixel_unshuffle(self.encode(low).float(), 2)
            latent, sigma = noise_latent(clean, rng, self.noise, "flow")
            latent = latent / (1 - per_sample(sigma))
        names = tuple(f"{number}/{index}" for index in indices)
        return CropBatch(image, low, clean, latent, sigma, smooth.flatten(), target), rng, names

    def _crop(self, side: int, rng: np.random.Generator) -> NDArray[np.uint8]:
        synthetic = bool(self._arrays["synthetic"]) and rng.uniform() < self.config.synthetic_share
        kind = "synthetic" if synthetic and side <= SYNTHETIC_SIDE else "train"
        array = self._arrays[kind][int(rng.choice(len(self._arrays[kind]), p=self._probabilities(kind, side)))]
        top, left = (int(rng.integers(0, extent - side + 1)) for extent in array.shape[:2])
        return np.array(array[top : top + side, left : left + side])

    def _crop_with_target(self, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        path = self._targets[int(rng.integers(len(self._targets)))]
        try:
            with open(path, "rb") as file, np.load(file) as arrays:
                pair = np.stack([arrays["image"], arrays["target"]])
        except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
            raise TrainingError(f"{path} is no file of targets.py; delete it and make it again: {error}") from error
        if rng.uniform() < 0.5:
            pair = pair.swapaxes(1, 2)
        for axis in (1, 2):
            if rng.uniform() < 0.5:
                pair = np.flip(pair, axis)
        return pair[0], pair[1]

    def _probabilities(self, kind: str, side: int) -> NDArray[np.float64]:
        if (kind, side) not in self._weights:
            # By side, not area: the smaller scales of an image would otherwise hardly occur.
            sides = [min(array.shape[:2]) for array in self._arrays[kind]]
            weights = np.array([extent if extent >= side else 0.0 for extent in sides], dtype=np.float64)
            if not weights.any():
                raise TrainingError(f"No image is {side} pixels on both sides; set smaller data.crops.")
            self._weights[kind, side] = weights / weights.sum()
        return self._weights[kind, side]

    def flush(self) -> None:
        """Nothing waits to be written."""

    def close(self) -> None:
        """Nothing is read ahead."""


def augment(images: Tensor, rng: PerSampleRNG, *, recolor: float, join: float) -> Tensor:
    """Squares `[B, 3, S, S]` in [-1, 1], flipped and turned at random; a share of them recolored, a share joined.

    Without recoloring a small decoder memorizes the colors of a few hundred photographs; without edges and flat areas
    it puts texture where there is none.
    """
    images = torch.where(_happens(0.5, rng), images.transpose(-1, -2), images)
    for axis in (-1, -2):
        images = torch.where(_happens(0.5, rng), images.flip(axis), images)
    images = torch.where(_happens(recolor, rng), recolored(images, rng), images)
    flat = (0.6 * rng.normal((3, 1, 1))).clamp(-1, 1).expand_as(images)
    other = torch.where(_happens(0.2, rng), flat, images.roll(1, 0))
    return torch.where(_happens(join, rng), joined(images, other, rng), images)


def _happens(share: float, rng: PerSampleRNG) -> Tensor:
    return per_sample(rng.uniform()) < share


def recolored(images: Tensor, rng: PerSampleRNG) -> Tensor:
    """Images `[B, 3, H, W]` with permuted channels, other saturation, and smoothly varying brightness and contrast."""
    identity = torch.eye(3, device=images.device)
    order = torch.where(_happens(0.5, rng)[..., 0], identity[rng.normal((3,)).argsort(1)], identity)
    gray = torch.stack([torch.full((3,), share, device=images.device) for share in LUMA], dim=1)
    saturation = 1.6 * per_sample(rng.uniform())[..., 0]
    mixed = (gray + saturation * (identity - gray)) @ order
    mixed = torch.where(_happens(0.1, rng)[..., 0], -mixed, mixed)

    def field(mean: float, spread: float) -> Tensor:
        points = mean + spread * (rng.normal((1, 1, 1)) + 0.5 * rng.normal((3, 1, 1)) + 0.3 * rng.normal((3, 4, 4)))
        return F.interpolate(points, size=images.shape[-2:], mode="bilinear", align_corners=True)

    colored = torch.einsum("bij,bjhw->bihw", mixed.to(images), images)
    return (colored * field(-0.1, 0.2).clamp(-0.7, 0.4).exp() + field(0.0, 0.15).clamp(-0.5, 0.5)).clamp(-1, 1)


def smooth_fields(images: Tensor, rng: PerSampleRNG) -> Tensor:
    """Instead of images `[B, 3, H, W]` areas of one color (six in ten), or between four; a third of them gray.

    Half of the colors have each channel at 0, at half or at full: the colors of drawings, which other random colors
    hardly ever come near, and the hardest.
    """
    corners = 0.9 * rng.normal((3, 2, 2))
    pure = rng.normal((3, 2, 2))
    pure = (pure > _THIRD).float() - (pure < -_THIRD).float()
    jitter = torch.where(_happens(0.4, rng), 0.12 * rng.normal((3, 2, 2)), torch.zeros_like(pure))
    corners = torch.where(_happens(0.5, rng), pure + jitter, corners)
    corners = torch.where(_happens(0.6, rng), corners[..., :1, :1], corners)
    corners = torch.where(_happens(1 / 3, rng), corners[:, :1], corners)
    return F.interpolate(corners.clamp(-1, 1), size=images.shape[-2:], mode="bilinear", align_corners=True)


def joined(images: Tensor, others: Tensor, rng: PerSampleRNG) -> Tensor:
    """`images` `[B, 3, H, W]` on one side of a straight line through each, `others` beyond it, antialiased."""
    height, width = images.shape[-2:]
    angle = 2 * math.pi * rng.uniform().view(-1, 1, 1)
    top, left = (0.25 + 0.5 * rng.uniform().view(-1, 1, 1) for _ in range(2))
    rows = torch.arange(height, device=images.device).view(-1, 1) - top * height
    columns = torch.arange(width, device=images.device) - left * width
    distance = rows * angle.sin() + columns * angle.cos()
    return torch.lerp(others, images, (distance + 0.5).clamp(0, 1)[:, None])
