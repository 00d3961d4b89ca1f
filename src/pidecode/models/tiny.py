# SPDX-License-Identifier: Apache-2.0
"""The small image encoder that ships with `tiny`: an image to FLUX.2's normalized latent, without FLUX.2's own VAE."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pidecode.errors import SettingError, SizeError

STRIDE = 16
"""Input pixels per packed latent cell, along each side."""

MOST_ROUNDS = 16
"""Most corrections an encoder may ask for: each costs a look and an encoding, and a file decides over them."""

Look = Callable[[Tensor], Tensor]
"""From a normalized latent [B,128,h,w] to what a decoder makes of it, shrunk to the encoded image's size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderConfig:
    """Widths and depths of an TinyEncoder at the image's own side, a half, a quarter and an eighth of it.

    `channels` is that of the packed latent (128 for FLUX.2). `rounds`: how often the latent is corrected after a look
    at what it decodes to, at most MOST_ROUNDS; 0 builds an encoder without the part that does it. Raises SettingError
    for values that cannot be built.
    """

    full_width: int = 48
    full_blocks: int = 1
    half_width: int = 64
    half_blocks: int = 6
    quarter_width: int = 64
    quarter_blocks: int = 8
    eighth_width: int = 128
    eighth_blocks: int = 6
    channels: int = 128
    rounds: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 0 if field.name == "rounds" else 1
            if type(value) is not int or value < least:
                raise SettingError(f"{field.name} is {value!r}; it must be a whole number from {least} on.")
        if self.rounds > MOST_ROUNDS:
            raise SettingError(f"rounds is {self.rounds}; it must be at most {MOST_ROUNDS}.")
        if self.channels % 4:
            raise SettingError(f"channels is {self.channels}; 2x2 cells are packed, so it must be a multiple of 4.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EncoderConfig:
        """Inverse of `to_dict`. Raises SettingError for unknown names or values that are not whole numbers."""
        known = {field.name for field in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise SettingError(f"Unknown encoder settings {', '.join(unknown)}; known are {', '.join(sorted(known))}.")
        return cls(**values)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions behind ReLUs, added to their input; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(functional.relu(self.conv1(functional.relu(x))))  # type: ignore[no-any-return]


class ContextBlock(ResidualBlock):
    """A ResidualBlock whose inner channels are scaled and shifted by the image's mean features.

    The autoencoder it imitates normalizes over the whole image, so a purely local network cannot follow it.
    """

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.context = nn.Linear(width, 2 * width)
        nn.init.zeros_(self.context.weight)
        nn.init.zeros_(self.context.bias)

    def forward(self, x: Tensor) -> Tensor:
        shift, scale = self.context(x.mean((2, 3)))[..., None, None].chunk(2, dim=1)
        inner = self.conv1(functional.relu(x)) * (1 + scale) + shift
        return x + self.conv2(functional.relu(inner))  # type: ignore[no-any-return]


class TinyEncoder(nn.Module):
    """Image [B,3,H,W] in [-1,1], sides multiples of 16, to the normalized latent [B,128,H/16,W/16].

    The output is in the frame every latent of this project is in (SPEC.md section 5): FLUX.2's patchified 32
    channels, order (channel, row, column). It depends on the whole image: encode first, crop after.
    """

    def __init__(self, config: EncoderConfig | None = None, *, inputs: int = 3) -> None:
        super().__init__()
        self.config = config = config or EncoderConfig()
        self.stem = nn.Conv2d(inputs, config.full_width, 3, padding=1)
        self.at_full = nn.Sequential(*(ResidualBlock(config.full_width) for _ in range(config.full_blocks)))
        self.to_half = nn.Conv2d(config.full_width, config.half_width, 3, stride=2, padding=1)
        self.at_half = nn.Sequential(*(ResidualBlock(config.half_width) for _ in range(config.half_blocks)))
        self.to_quarter = nn.Conv2d(config.half_width, config.quarter_width, 3, stride=2, padding=1)
        self.at_quarter = nn.Sequential(*(ResidualBlock(config.quarter_width) for _ in range(config.quarter_blocks)))
        self.to_eighth = nn.Conv2d(config.quarter_width, config.eighth_width, 3, stride=2, padding=1)
        self.at_eighth = nn.Sequential(*(ContextBlock(config.eighth_width) for _ in range(config.eighth_blocks)))
        self.head = nn.Conv2d(config.eighth_width, config.channels // 4, 3, padding=1)
        if config.rounds:
            self.corrector = TinyEncoder(replace(config, rounds=0), inputs=2 * inputs)

    def half_features(self, image: Tensor) -> Tensor:
        """Features at half of the image's side."""
        x: Tensor = self.at_half(self.to_half(functional.relu(self.at_full(self.stem(image)))))
        return x

    def quarter_features(self, half: Tensor) -> Tensor:
        """Features at a quarter of it, from those at half."""
        x: Tensor = self.at_quarter(self.to_quarter(half))
        return x

    def cells_from(self, quarter: Tensor) -> Tensor:
        """The latent before patchifying, from features at a quarter: [B,channels/4,H/8,W/8]."""
        cells: Tensor = self.head(functional.relu(self.at_eighth(self.to_eighth(quarter))))
        return cells

    def cells(self, image: Tensor) -> Tensor:
        """The latent before patchifying: [B,channels/4,H/8,W/8]."""
        return self.cells_from(self.quarter_features(self.half_features(image)))

    def correction(self, image: Tensor, error: Tensor, unprompted: Tensor | None = None) -> Tensor:
        """What to add to the cells of a latent to which `error` is missing in what it decodes to; nothing for none.

        error: the image less what was decoded, at its size. unprompted: what the corrector says without an error,
        if that is at hand. Only an encoder with `rounds` can tell.
        """
        if unprompted is None:
            unprompted = self._prompted(image, torch.zeros_like(error))
        return self._prompted(image, error) - unprompted

    def _prompted(self, image: Tensor, error: Tensor) -> Tensor:
        return self.corrector.cells(torch.cat((image, error), dim=1))

    def corrected(self, image: Tensor, look: Look, rounds: int) -> Tensor:
        """The cells after so many corrections, each by what the latent before it still gets wrong."""
        cells = self.cells(image)
        if rounds:
            unprompted = self._prompted(image, torch.zeros_like(image))
        for _ in range(rounds):
            error = image - look(functional.pixel_unshuffle(cells, 2)).to(image)
            cells = cells + self.correction(image, error, unprompted)
        return cells

    def forward(self, image: Tensor, look: Look | None = None) -> Tensor:
        """The latent; with a `look`, one corrected for `config.rounds` times.

        Raises SizeError unless the image is [B,3,H,W] with sides that are multiples of 16.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise SizeError(f"The encoder takes images [B,3,H,W]; this one is {list(image.shape)}.")
        height, width = image.shape[-2:]
        if height % STRIDE or width % STRIDE or not height or not width:
            raise SizeError(
                f"A {width}x{height} image does not divide into {STRIDE}-pixel cells; "
                f"crop it to {width // STRIDE * STRIDE}x{height // STRIDE * STRIDE}."
            )
        cells = self.cells(image) if look is None else self.corrected(image, look, self.config.rounds)
        return functional.pixel_unshuffle(cells, 2)


def encoder_parameters(config: EncoderConfig) -> int:
    """Parameter count of an encoder of this shape, computed without allocating it."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in TinyEncoder(config).parameters())
