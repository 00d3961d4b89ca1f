# SPDX-License-Identifier: Apache-2.0
"""From the order of images to batches: read ahead in threads, encoded whole, cropped, captioned and noised."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.encoders.text import TextEncoder, TextStateCache, default_folder
from pidecode.errors import ImageError, TrainingError
from pidecode.images.read import load_image
from pidecode.images.tensors import downsample, to_tensor
from pidecode.training.config import Encode, EncodeText, Recipe
from pidecode.training.dataset import Collection, Entry, Order, nearest_size
from pidecode.training.denoiser import Example
from pidecode.training.latent_cache import LatentShards
from pidecode.training.noise import SeededDraws, noise_latent, per_sample, seed_of
from pidecode.weights.resolve import asset, encoder_path

_TRIES = 16


@dataclass(frozen=True, slots=True)
class Sample:
    """One image, read and brought to its size; its latent if it is already known."""

    name: str
    image: Tensor
    low: Tensor
    latent: Tensor | None
    caption: str


@dataclass(frozen=True, slots=True)
class Helpers:
    """What turns images and captions into what the network reads; None where the network reads none."""

    encode: Encode | None
    encode_text: EncodeText | None
    cache: LatentShards | None = None


def read_image(entry: Entry, size: tuple[int, int]) -> Tensor:
    """The image `[3, H, W]` in [-1, 1], scaled to cover `size` (height, width) and cut to it around its center."""
    image = to_tensor(load_image(entry.image.read()))
    ratio = max(wanted / have for wanted, have in zip(size, image.shape[-2:], strict=True))
    covering = [max(wanted, round(have * ratio)) for wanted, have in zip(size, image.shape[-2:], strict=True)]
    if list(image.shape[-2:]) != covering:
        image = F.interpolate(image, size=covering, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = ((have - wanted) // 2 for have, wanted in zip(covering, size, strict=True))
    return image[0, :, top : top + size[0], left : left + size[1]].contiguous()


class Feed:
    """Batches by number, the same for the same number whenever it is asked for.

    rank, ranks: this process's place among those that see different images.
    """

    def __init__(
        self, recipe: Recipe, collection: Collection, helpers: Helpers, device: torch.device, rank: int, ranks: int
    ) -> None:
        self.recipe, self.collection, self.helpers, self.device = recipe, collection, helpers, device
        data, self._first = recipe.data, rank * recipe.data.batch
        self.order = Order(collection.entries, data.sizes, data.batch * ranks, recipe.run.seed)
        self.skipped: dict[str, str] = dict(collection.skipped)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(data.workers, thread_name_prefix="images")
        self._ahead: dict[int, list[Future[Sample]]] = {}
        self._null: Tensor | None = None

    def close(self) -> None:
        """Stop the readers and write what the cache still holds."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        if self.helpers.cache is not None:
            self.helpers.cache.flush()

    def _request(self, number: int) -> None:
        if number in self._ahead:
            return
        sitting = self.order.sitting(number)
        mine = range(self._first, self._first + self.recipe.data.batch)
        self._ahead[number] = [
            self._pool.submit(self._read, sitting.entries[place], sitting.size, (number, place)) for place in mine
        ]

    def _read(self, index: int, size: tuple[int, int], moment: tuple[int, int] = (0, 0)) -> Sample:
        """That entry, or where it cannot be read, others of its size, chosen by chance that the moment decides."""
        members = self.order.members(size)
        chance = np.random.default_rng(seed_of(self.recipe.run.seed, "instead", *moment))
        for _ in range(_TRIES):
            entry = self.collection.entries[index]
            try:
                return self._sample(entry, size)
            except (ImageError, OSError) as fault:
                with self._lock:
                    self.skipped.setdefault(entry.name, str(fault))
            index = members[int(chance.integers(len(members)))]
        raise TrainingError(
            f"{_TRIES} images in a row could not be read, the last being {entry.name}: {self.skipped[entry.name]}"
        )

    def _sample(self, entry: Entry, size: tuple[int, int]) -> Sample:
        image = read_image(entry, size)
        low = downsample(image[None], self.recipe.net.scale)[0]
        cache = self.helpers.cache
        latent = None if cache is None else cache.get(self._cache_name(entry.name, size))
        return Sample(entry.name, image, low, latent, entry.read_caption())

    @staticmethod
    def _cache_name(name: str, size: tuple[int, int]) -> str:
        return f"{name}@{size[0]}x{size[1]}"

    def batch(self, number: int) -> tuple[Example, SeededDraws, tuple[str, ...]]:
        """The batch of that number, noised; the draws for the rest of its step; the images' names."""
        for ahead in range(number, number + 3):
            self._request(ahead)
        samples = [future.result() for future in self._ahead.pop(number)]
        for stale in [known for known in self._ahead if known < number]:
            del self._ahead[stale]
        places = range(self._first, self._first + len(samples))
        draws = SeededDraws(self.recipe.run.seed, number, places, self.device)
        return self._noised(self._assembled(samples, draws), draws, samples), draws, tuple(s.name for s in samples)

    def preview(self, count: int) -> list[Example]:
        """The first images as they are, one by one, with clean latents and whole."""
        found = []
        for index in range(min(count, len(self.collection.entries))):
            entry = self.collection.entries[index]
            size = nearest_size(entry, self.recipe.data.sizes)
            sample = self._read(index, size, (-1, index))
            example = self._assembled([sample], None)
            sigma = None if example.latent is None else torch.zeros(1, device=self.device)
            found.append(replace(example, sigma=sigma))
        return found

    def _assembled(self, samples: Sequence[Sample], draws: SeededDraws | None) -> Example:
        """Images, latents of whole images and captions on the device; cropped and dropped where chance says so."""
        recipe, device = self.recipe, self.device
        image = torch.stack([sample.image for sample in samples]).to(device)
        low = torch.stack([sample.low for sample in samples]).to(device)
        latent = self._latents(samples, low)
        captions = [sample.caption for sample in samples]
        if draws is not None and recipe.data.crop:
            image, low, latent = self._cropped(image, low, latent, draws)
        if draws is not None and recipe.net.has_text:
            dropped = (draws.uniform() < recipe.data.caption_drop).tolist()
            captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
        text = null = None
        if self.helpers.encode_text is not None:
            text = self.helpers.encode_text(captions).to(device).float()
            null = self._null_text()
        return Example(image=image, low=low, text=text, null_text=null, latent=latent)

    def _null_text(self) -> Tensor:
        if self._null is None:
            assert self.helpers.encode_text is not None
            self._null = self.helpers.encode_text([self.recipe.negative]).to(self.device).float()
        return self._null

    @torch.no_grad()
    def _latents(self, samples: Sequence[Sample], low: Tensor) -> Tensor | None:
        if self.recipe.space is None:
            return None
        known = [sample.latent for sample in samples]
        missing = [index for index, latent in enumerate(known) if latent is None]
        if missing:
            if self.helpers.encode is None:
                raise TrainingError("An image has no latent in the cache, and there is no encoder to make it.")
            made = self.helpers.encode(low[missing]).float()
            self._check_latents(made, low)
            for index, latent in zip(missing, made, strict=True):
                sample, cache = samples[index], self.helpers.cache
                size = (sample.image.shape[-2], sample.image.shape[-1])
                known[index] = latent if cache is None else cache.put(self._cache_name(sample.name, size), latent)
        return torch.stack([latent.to(self.device) for latent in known if latent is not None])

    def _check_latents(self, latents: Tensor, low: Tensor) -> None:
        space = self.recipe.space
        assert space is not None
        wanted = (space.channels, low.shape[-2] // space.down, low.shape[-1] // space.down)
        if tuple(latents.shape[1:]) != wanted:
            raise TrainingError(
                f"The encoder gave latents of shape {tuple(latents.shape[1:])} for images of "
                f"{low.shape[-2]}x{low.shape[-1]}; space {space.name!r} means {wanted}."
            )

    def _cropped(
        self, image: Tensor, low: Tensor, latent: Tensor | None, draws: SeededDraws
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The same square of each image and of its latent, on a latent cell's corner."""
        recipe = self.recipe
        unit, side, scale = recipe.unit, recipe.data.crop, recipe.net.scale
        height, width = image.shape[-2:]
        share_y, share_x = draws.uniform().tolist(), draws.uniform().tolist()
        tops = [int(share * ((height - side) // unit + 1)) * unit for share in share_y]
        lefts = [int(share * ((width - side) // unit + 1)) * unit for share in share_x]

        def cut(whole: Tensor, shrink: int) -> Tensor:
            span = side // shrink
            parts = [
                each[:, top // shrink : top // shrink + span, left // shrink : left // shrink + span]
                for each, top, left in zip(whole, tops, lefts, strict=True)
            ]
            return torch.stack(parts)

        cell = None if recipe.space is None else recipe.space.pixels_per_cell
        return cut(image, 1), cut(low, scale), latent if latent is None or cell is None else cut(latent, cell)

    def _noised(self, example: Example, draws: SeededDraws, samples: Sequence[Sample]) -> Example:
        if example.latent is None or self.recipe.space is None:
            return example
        names = [sample.name for sample in samples]
        latent, sigma = noise_latent(example.latent, draws, self.recipe.noise, self.recipe.space.noise_frame, names)
        keep = (draws.uniform() >= self.recipe.data.latent_drop).float()
        return replace(example, latent=latent * per_sample(keep), sigma=sigma, keep=keep)


def make_helpers(recipe: Recipe, device: torch.device) -> Helpers:
    """The recipe's own encoders, or the latent space's and Gemma-2; latents are kept where `data.cache` says."""
    encode_text: EncodeText | None = None
    if recipe.net.has_text:
        encode_text = recipe.encode_text or TextEncoder(device=device, states=TextStateCache(default_folder())).encode
    if recipe.space is None:
        return Helpers(None, encode_text)
    source, encode = _encoder(recipe, device)
    cache = LatentShards(recipe.data.cache, f"{recipe.space.name}/{source}") if recipe.data.cache else None
    return Helpers(encode, encode_text, cache)


def _encoder(recipe: Recipe, device: torch.device) -> tuple[str, Encode]:
    """The encoder, and a name that tells it from others in the cache."""
    space = recipe.space
    assert space is not None
    if recipe.encode is not None:
        made_by: Callable[..., Tensor] = recipe.encode
        return getattr(made_by, "__qualname__", type(made_by).__qualname__), recipe.encode
    path = recipe.data.encoder or encoder_path(space.name)
    if not path and space.name == "flux2":
        path = asset("tiny_encoder.safetensors")
    if not path:
        raise TrainingError(
            f"The encoder of space {space.name!r} is not on this disk; `pidecode pull {space.name}` fetches it, or "
            "set data.encoder to its file or folder."
        )
    from pidecode.encoders.base import load_encoder

    encoder = load_encoder(space.name, path, device=device)
    return str(path), encoder


class ByteStates:
    """A stand-in for a language model: a fixed random vector for each byte of a caption.

    Enough for dry runs, tests and small networks that learn their own reading of words; needs nothing downloaded.
    """

    def __init__(self, length: int, width: int) -> None:
        self.length, self.width = length, width
        chance = torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(b"bytes").digest()[:7], "little"))
        self._table = torch.randn(257, width, generator=chance)

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """States `[B, length, width]`; shorter captions are filled up with one more vector."""
        rows = torch.full((len(captions), self.length), 256)
        for row, caption in zip(rows, captions, strict=True):
            data = list(caption.encode("utf-8"))[: self.length]
            row[: len(data)] = torch.tensor(data, dtype=torch.long)
        return self._table[rows]
