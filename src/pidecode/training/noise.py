# SPDX-License-Identifier: Apache-2.0
"""What chance decides in training: times, noise, which latents are noised or dropped; every draw belongs to a sample.

A sample's draws come from its own generator, seeded by the run's seed, the step and the sample's place in the
global batch. So they do not depend on how many processes share the batch, and a resumed run repeats them exactly.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from pidecode.errors import SettingError
from pidecode.registry.spaces import NoiseFrame


class Draws(Protocol):
    """Where a step's random numbers come from."""

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        """Unit normal numbers `[B, *shape]`, float32."""
        ...

    def uniform(self) -> Tensor:
        """One number in [0, 1) for each sample, `[B]`."""
        ...

    def choice(self, count: int) -> Tensor:
        """One whole number in 0..count-1 for each sample, `[B]`."""
        ...

    def common_choice(self, count: int) -> int:
        """One whole number in 0..count-1, the same for every sample and process."""
        ...


def seed_of(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class SeededDraws:
    """Draws of one step for some samples of the global batch (see the module's first lines)."""

    def __init__(self, seed: int, step: int, places: Sequence[int], device: torch.device) -> None:
        self._device = device
        self._each = [
            torch.Generator(device=device).manual_seed(seed_of(seed, step, "sample", place)) for place in places
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


def logit_normal_times(draws: Draws) -> Tensor:
    """Flow times `sigmoid(normal)` in (0, 1), `[B]`."""
    return draws.normal(()).sigmoid()


def per_sample(value_B: Tensor) -> Tensor:
    """`[B]` as `[B, 1, 1, 1]`, to act on images or latents."""
    return value_B.view(-1, 1, 1, 1)


def mix(clean: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
    """`(1 - t) clean + t noise`."""
    return (1 - per_sample(t_B)) * clean + per_sample(t_B) * noise


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentNoise:
    """How latents are noised before the network sees them, so that it can read an unfinished one."""

    probability: float = 0.75
    """Share of samples that are noised at all."""
    clean_share: float = 0.0
    """Share of those that stay clean after all."""
    smallest: float = 0.0
    """Smallest sigma drawn."""
    largest: float = 0.8
    """Largest sigma drawn."""
    by_name: tuple[tuple[str, float, float], ...] = ()
    """Other ranges for some samples: (part of the sample's name, smallest, largest); the first that fits counts."""

    def __post_init__(self) -> None:
        ranges = (("", self.smallest, self.largest), *self.by_name)
        for part, low, high in ranges:
            if not 0 <= low <= high <= 1:
                of = f" for names with {part!r}" if part else ""
                raise SettingError(f"Latent noise{of} runs from {low} to {high}; it must lie within 0 and 1, in order.")
        for name in ("probability", "clean_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(f"Latent noise {name} is {getattr(self, name)}; it must lie within 0 and 1.")


def noise_latent(
    latent: Tensor, draws: Draws, settings: LatentNoise, frame: NoiseFrame, names: Sequence[str] = ()
) -> tuple[Tensor, Tensor]:
    """Noised latents `[B, C, h, w]` and the sigma `[B]` left in each (0 where it stayed clean), float32."""
    noised = draws.uniform() < settings.probability
    if settings.clean_share > 0:
        noised = noised & ~(draws.uniform() < settings.clean_share)
    share = draws.uniform()  # drawn whether or not it is used, so that a sample's later draws stay where they are
    low, high = _ranges(latent.shape[0], settings, names)
    low, high = low.to(share), high.to(share)
    sigma = torch.where(noised, low + (high - low) * share, torch.zeros_like(share))
    noise = draws.normal(tuple(latent.shape[1:])).to(latent.dtype)
    s = per_sample(sigma.to(latent.dtype))
    kept = torch.sqrt(1 - s * s) if frame == "variance_preserving" else 1 - s
    return torch.where(per_sample(noised), kept * latent + s * noise, latent), sigma


def _ranges(count: int, settings: LatentNoise, names: Sequence[str]) -> tuple[Tensor, Tensor]:
    chosen = [(settings.smallest, settings.largest)] * count
    for index, name in enumerate(names):
        for part, low, high in settings.by_name:
            if part in name:
                chosen[index] = (low, high)
                break
    table = torch.tensor(chosen, dtype=torch.float32)
    return table[:, 0], table[:, 1]
