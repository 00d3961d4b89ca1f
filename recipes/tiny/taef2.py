# SPDX-License-Identifier: Apache-2.0
"""The tiny FLUX.2 autoencoder ("taef2", MIT), frozen: latents to train on, and the baseline to beat.

Its weights are read from a folder and are not part of this project.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from pidecode.errors import CheckpointError

WIDTH = 64
"""Channels of every hidden layer of the published weights."""
CELLS = 32
"""Channels of a latent at an eighth of the image's side (four of them make one packed cell of 128)."""


class SoftClamp(nn.Module):
    """`3 tanh(x / 3)`, the published decoder's first step."""

    def forward(self, latent: Tensor) -> Tensor:
        """Same shape."""
        return torch.tanh(latent / 3) * 3


class TaesdBlock(nn.Module):
    """Three convolutions with a skip; with `pool`, first a mix whose norm sees the whole image."""

    def __init__(self, *, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(),
            nn.Conv2d(WIDTH, WIDTH, 3, padding=1),
        )  # fmt: skip
        if pool:
            self.pool = nn.Sequential(
                nn.Conv2d(WIDTH, 4 * WIDTH, 1, bias=False),
                nn.GroupNorm(4, 4 * WIDTH),
                nn.ReLU(),
                nn.Conv2d(4 * WIDTH, WIDTH, 1, bias=False),
            )
        self.has_pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        if self.has_pool:
            x = x + self.pool(x)
        return torch.relu(self.conv(x) + x)


def _stage(count: int, *, pool: bool = False) -> list[nn.Module]:
    return [TaesdBlock(pool=pool) for _ in range(count)]


def _plain(stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1, stride=stride, bias=False)


class TinyAutoencoder(nn.Module):
    """Image `[B, 3, H, W]` in [-1, 1] to FLUX.2's normalized latent before patchifying, `[B, 32, H/8, W/8]`, and back.

    The encoder's normalization is over the whole image: encode whole images, then crop latents.
    """

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, WIDTH, 3, padding=1), *_stage(1),
            _plain(2), *_stage(3),
            _plain(2), *_stage(3),
            _plain(2), *_stage(3, pool=True),
            nn.Conv2d(WIDTH, CELLS, 3, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            SoftClamp(), nn.Conv2d(CELLS, WIDTH, 3, padding=1), nn.ReLU(), *_stage(3, pool=True),
            nn.Upsample(scale_factor=2), _plain(), *_stage(3),
            nn.Upsample(scale_factor=2), _plain(), *_stage(3),
            nn.Upsample(scale_factor=2), _plain(), *_stage(1),
            nn.Conv2d(WIDTH, 3, 3, padding=1),
        )  # fmt: skip

    def encode(self, image: Tensor) -> Tensor:
        """Latent of a whole image whose sides are multiples of 8."""
        latent: Tensor = self.encoder((image + 1) / 2)
        return latent

    def decode(self, latent: Tensor) -> Tensor:
        """Image in [-1, 1] of a latent."""
        return self.decoder_image(latent).clamp(-1, 1)

    def decoder_image(self, latent: Tensor) -> Tensor:
        """The same without the clamp, which would hide gradients."""
        image: Tensor = self.decoder(latent)
        return image * 2 - 1

    @classmethod
    def from_folder(cls, folder: Path | str) -> TinyAutoencoder:
        """Read `taef2_encoder.safetensors` and `taef2_decoder.safetensors`; frozen, float32, on the CPU.

        Raises:
            CheckpointError: A file is absent or holds other tensors.
        """
        from safetensors.torch import load_file

        model = cls()
        for name, part in (("encoder", model.encoder), ("decoder", model.decoder)):
            path = Path(folder) / f"taef2_{name}.safetensors"
            if not path.is_file():
                raise CheckpointError(f"{path} does not exist; give the folder that holds the two taef2 files.")
            try:
                part.load_state_dict({key: value.float() for key, value in load_file(path).items()})
            except (RuntimeError, OSError) as error:
                raise CheckpointError(f"{path} does not hold the taef2 {name}: {error}") from error
        return model.eval().requires_grad_(False)
