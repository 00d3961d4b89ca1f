# SPDX-License-Identifier: Apache-2.0
"""Batches of images, latents and captions: read ahead in threads, encoded, cropped, noised."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from pidecode.encoders.base import load_encoder
from pidecode.encoders.text import PromptEmbedsCache, TextEncoder
from pidecode.errors import ImageError, TrainingError
from pidecode.images.read import load_image
from pidecode.images.tensors import downsample, to_tensor
from pidecode.training.config import EncodeFn, EncodeTextFn, TrainConfig
from pidecode.training.dataset import BucketSampler, ImageDataset, ImageEntry, nearest_size
from pidecode.training.denoiser import TrainBatch
from pidecode.training.distributed import DistEnv
from pidecode.training.latent_cache import LatentShards
from pidecode.training.noise import PerSampleRNG, noise_latent, per_sample, seed_of
from pidecode.weights.resolve import default_encoder_path

_TRIES = 16


@dataclass(frozen=True, slots=True)
class LoadedImage:
    """One image, resized to its bucket; its latent if it is cached."""

    name: str
    cache_name: str
    image: Tensor
    low: Tensor
    latent: Tensor | None
    caption: str


@dataclass(frozen=True, slots=True)
class ConditionEncoders:
    """Encoders of images and captions; None where the network reads none."""

    encode: EncodeFn | None
    encode_text: EncodeTextFn | None
    cache: LatentShards | None = None


def read_image(entry: ImageEntry, size: tuple[int, int]) -> Tensor:
    """The image `[3, H, W]` in [-1, 1], resized to cover `size` (height, width) and center-cropped to it."""
    image = to_tensor(load_image(entry.image.read()))
    ratio = max(wanted / have for wanted, have in zip(size, image.shape[-2:], strict=True))
    covering = [max(wanted, round(have * ratio)) for wanted, have in zip(size, image.shape[-2:], strict=True)]
    if list(image.shape[-2:]) != covering:
        image = F.interpolate(image, size=covering, mode="bicubic", antialias=True).clamp(-1, 1)
    top, left = ((have - wanted) // 2 for have, wanted in zip(covering, size, strict=True))
    return image[0, :, top : top + size[0], left : left + size[1]].contiguous()


class DataLoader:
    """Batches by number, the same for the same number whenever it is asked for."""

    def __init__(self, config: TrainConfig, dataset: ImageDataset, encoders: ConditionEncoders, env: DistEnv) -> None:
        self.config, self.dataset, self.encoders, self.device = config, dataset, encoders, env.device
        data, first = config.data, env.data_rank * config.data.batch_size
        self._places = range(first, first + data.batch_size)  # this process's part of a global batch
        batch_size = data.batch_size * env.data_world_size
        self.sampler = BucketSampler(dataset.entries, data.sizes, batch_size, config.run.seed)
        self.skipped: dict[str, str] = dict(dataset.skipped)
        self.fingerprint = dataset.fingerprint
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(data.num_workers, thread_name_prefix="images")
        self._ahead: dict[int, list[Future[LoadedImage]]] = {}
        self._null: Tensor | None = None

    def flush(self) -> None:
        """Write latents that wait for the cache."""
        if self.encoders.cache is not None:
            self.encoders.cache.flush()

    def close(self) -> None:
        """Stop the readers and write latents that wait for the cache."""
        self._pool.shutdown(wait=True, cancel_futures=True)
        self.flush()

    def _read(self, index: int, size: tuple[int, int], seed_parts: tuple[int, int]) -> LoadedImage:
        """That entry; where it cannot be read, a random other one of its size."""
        members = self.sampler.members[size]
        rng = np.random.default_rng(seed_of(self.config.run.seed, "instead", *seed_parts))
        for _ in range(_TRIES):
            entry = self.dataset.entries[index]
            try:
                image = read_image(entry, size)
                low = downsample(image[None], self.config.net.scale)[0]
                cache, cache_name = self.encoders.cache, f"{entry.name}@{size[0]}x{size[1]}"
                latent = None if cache is None else cache.get(cache_name)
                return LoadedImage(entry.name, cache_name, image, low, latent, entry.read_caption())
            except (ImageError, OSError) as fault:
                with self._lock:
                    self.skipped.setdefault(entry.name, str(fault))
            index = members[int(rng.integers(len(members)))]
        raise TrainingError(
            f"{_TRIES} images in a row could not be read, the last being {entry.name}: {self.skipped[entry.name]}"
        )

    def batch(self, number: int) -> tuple[TrainBatch, PerSampleRNG, tuple[str, ...]]:
        """The batch of that number, noised; the random numbers for the rest of its step; the images' names."""
        for ahead in range(number, number + 3):
            if ahead not in self._ahead:
                chosen = self.sampler.batch(ahead)
                self._ahead[ahead] = [
                    self._pool.submit(self._read, chosen.entries[place], chosen.size, (ahead, place))
                    for place in self._places
                ]
        samples = [future.result() for future in self._ahead.pop(number)]
        self._ahead = {known: futures for known, futures in self._ahead.items() if known > number}
        rng = PerSampleRNG(self.config.run.seed, number, self._places, self.device)
        names = tuple(sample.name for sample in samples)
        batch, space = self._collate(samples, rng), self.config.space
        if batch.latent is not None and space is not None:
            latent, sigma = noise_latent(batch.latent, rng, self.config.noise, space.noise_parametrization, names)
            keep = (rng.uniform() >= self.config.data.latent_dropout).float()
            batch = replace(batch, latent=latent * per_sample(keep), sigma=sigma, keep=keep)
        return batch, rng, names

    def sample_batches(self, count: int) -> list[TrainBatch]:
        """The first images as batches of one, uncropped, with clean latents."""
        found = []
        for index, entry in enumerate(self.dataset.entries[:count]):
            batch = self._collate([self._read(index, nearest_size(entry, self.config.data.sizes), (-1, index))], None)
            found.append(replace(batch, sigma=None if batch.latent is None else torch.zeros(1, device=self.device)))
        return found

    def _collate(self, samples: Sequence[LoadedImage], rng: PerSampleRNG | None) -> TrainBatch:
        """Images, latents of whole images and captions on the device; cropped, with caption dropout."""
        config, device = self.config, self.device
        image = torch.stack([sample.image for sample in samples]).to(device)
        low = torch.stack([sample.low for sample in samples]).to(device)
        latent = self._latents(samples, low)
        captions = [sample.caption for sample in samples]
        if rng is not None and config.data.crop:
            image, low, latent = self._crop(image, low, latent, rng)
        if rng is not None and config.net.has_text:
            dropped = (rng.uniform() < config.data.caption_dropout).tolist()
            captions = ["" if drop else caption for drop, caption in zip(dropped, captions, strict=True)]
        text, encode_text = None, self.encoders.encode_text
        if encode_text is not None:
            text = encode_text(captions).to(device).float()
            if self._null is None:
                self._null = encode_text([config.negative_prompt]).to(device).float()
        return TrainBatch(image=image, low=low, text=text, null_text=self._null, latent=latent)

    @torch.no_grad()
    def _latents(self, samples: Sequence[LoadedImage], low: Tensor) -> Tensor | None:
        space = self.config.space
        if space is None:
            return None
        known = [sample.latent for sample in samples]
        missing = [index for index, latent in enumerate(known) if latent is None]
        if missing:
            if self.encoders.encode is None:
                raise TrainingError("An image has no latent in the cache, and there is no encoder to make it.")
            encoded = self.encoders.encode(low[missing]).float()
            wanted = (space.channels, low.shape[-2] // space.down, low.shape[-1] // space.down)
            if tuple(encoded.shape[1:]) != wanted:
                raise TrainingError(
                    f"The encoder gave latents of shape {tuple(encoded.shape[1:])} for images of "
                    f"{low.shape[-2]}x{low.shape[-1]}; space {space.name!r} has {wanted}."
                )
            cache = self.encoders.cache
            for index, latent in zip(missing, encoded, strict=True):
                known[index] = latent if cache is None else cache.put(samples[index].cache_name, latent)
        return torch.stack([latent.to(self.device) for latent in known if latent is not None])

    def _crop(
        self, image: Tensor, low: Tensor, latent: Tensor | None, rng: PerSampleRNG
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """A random square of each image and the same one of its latent, aligned to latent cells."""
        config = self.config
        unit, side = config.unit, config.data.crop
        tops, lefts = (
            [int(share * ((whole - side) // unit + 1)) * unit for share in rng.uniform().tolist()]
            for whole in image.shape[-2:]
        )

        def cut(whole: Tensor, shrink: int) -> Tensor:
            corners = [(top // shrink, left // shrink) for top, left in zip(tops, lefts, strict=True)]
            span = side // shrink
            return torch.stack(
                [each[:, y : y + span, x : x + span] for each, (y, x) in zip(whole, corners, strict=True)]
            )

        cell = 1 if config.space is None else config.space.pixels_per_cell
        return cut(image, 1), cut(low, config.net.scale), None if latent is None else cut(latent, cell)


def make_encoders(config: TrainConfig, device: torch.device) -> ConditionEncoders:
    """The configuration's own encoders, or the latent space's and Gemma-2; latents are cached in `data.cache`."""
    encode_text: EncodeTextFn | None = None
    if config.net.has_text:
        encode_text = config.encode_text or TextEncoder(device=device, states=PromptEmbedsCache()).encode
    if config.space is None:
        return ConditionEncoders(None, encode_text)
    encode, space = config.encode, config.space.name
    source = getattr(encode, "__qualname__", type(encode).__qualname__)  # the name under which latents are cached
    if encode is None:
        path = config.data.encoder or default_encoder_path(space)
        if not path:
            raise TrainingError(
                f"The encoder of space {space!r} is not installed; `pidecode pull {space}` fetches it, or "
                "set data.encoder to its file or folder."
            )
        source, encode = str(path), load_encoder(space, path, device=device)
    cache = LatentShards(config.data.cache, f"{space}/{source}") if config.data.cache else None
    return ConditionEncoders(encode, encode_text, cache)
