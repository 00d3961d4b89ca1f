# SPDX-License-Identifier: Apache-2.0
"""Random numbers of training, with a generator of its own for each sample.

A sample's generator is seeded by the run's seed, the step and the sample's index in the global batch. So its numbers do
not depend on how many processes share the batch, and a resumed run repeats them exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from pidecode.registry.spaces import NoiseParametrization
from pidecode.training.config import LatentNoiseConfig


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class PerSampleRNG:
    """Random numbers of one step for some samples of the global batch, given by their indices in it."""

    def __init__(self, seed: int, step: int, indices: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._each = [
            torch.Generator(device=device).manual_seed(seed_of(seed, step, "sample", index)) for index in indices
        ]
        self._common = torch.Generator().manual_seed(seed_of(seed, step, "common"))

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Unit normal numbers `[B, *shape]`, float32."""
        return torch.stack([torch.randn(shape, generator=each, device=self._device) for each in self._each])

    def uniform(self) -> Tensor:
        """One number in [0, 1) for each sample, `[B]`."""
        return torch.stack([torch.rand((), generator=each, device=self._device) for each in self._each])

    def choice(self, count: int) -> Tensor:
        """One whole number in 0..count-1 for each sample, `[B]`."""
        return torch.stack([torch.randint(count, (), generator=each, device=self._device) for each in self._each])

    def common_choice(self, count: int) -> int:
        """One whole number in 0..count-1, the same for every sample and process."""
        return int(torch.randint(count, (), generator=self._common).item())


RNG = PerSampleRNG  # what losses draw from; tests replay recorded numbers in its place


def logit_normal_times(rng: RNG) -> Tensor:
    """Flow times `sigmoid(normal)` in (0, 1), `[B]`."""
    return rng.normal(()).sigmoid()


def per_sample(value_B: Tensor) -> Tensor:
    """`[B]` as `[B, 1, 1, 1]`, to act on images or latents."""
    return value_B.view(-1, 1, 1, 1)


def mix(clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """`(1 - t) clean + t noise`."""
    return (1 - per_sample(t_B)) * clean + per_sample(t_B) * noise


def noise_latent(
    latent: Tensor,
    rng: RNG,
    config: LatentNoiseConfig,
    parametrization: NoiseParametrization,
    names: Sequence[str] = (),
) -> tuple[Tensor, Tensor]:
    """Noised latents `[B, C, h, w]` and the sigma `[B]` left in each (0 where it stayed clean), float32."""
    noised = rng.uniform() < config.probability
    if config.clean_probability > 0:
        noised = noised & ~(rng.uniform() < config.clean_probability)
    share = rng.uniform()  # drawn whether or not it is used, so that the sample's later random numbers do not shift
    usual = (config.sigma_min, config.sigma_max)
    ranges = [
        next(((low, high) for part, low, high in config.by_name if part in name), usual)
        for name in names or [""] * len(latent)
    ]
    low, high = share.new_tensor(ranges).unbind(1)
    sigma = torch.where(noised, low + (high - low) * share, torch.zeros_like(share))
    noise = rng.normal(tuple(latent.shape[1:])).to(latent.dtype)
    s = per_sample(sigma.to(latent.dtype))
    kept = torch.sqrt(1 - s * s) if parametrization == "variance_preserving" else 1 - s
    return torch.where(per_sample(noised), kept * latent + s * noise, latent), sigma
