# SPDX-License-Identifier: Apache-2.0
"""`tiny`: a feed-forward decoder from FLUX.2 latents to images four times as large, and an encoder to those latents.

Both are plain convolutional networks. The decoder is not a PiD network: it takes no noise and no time, and forms the
image in one evaluation. `recipes/tiny` beside the package says how both are trained.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from pidecode.errors import LatentError, SizeError
from pidecode.registry.configs import TinyDecoderConfig, TinyEncoderConfig

ENCODER_STRIDE = 16  # input pixels per latent cell, along each side


class _Conv2d(nn.Conv2d):
    """A convolution that is not initialized on the meta device: a third of the time of building a network."""

    def reset_parameters(self) -> None:
        if not self.weight.is_meta:
            super().reset_parameters()


class DecoderBlock(nn.Module):
    """Two 3x3 convolutions, each behind a SiLU and an optional norm over the whole image, added to their input."""

    def __init__(self, width: int, *, normalized: bool) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(4, width) if normalized else nn.Identity()
        self.conv1 = _conv3x3(width, width)
        self.norm2 = nn.GroupNorm(4, width) if normalized else nn.Identity()
        self.conv2 = _conv3x3(width, width)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm2(self.conv1(functional.silu(self.norm1(x))))
        # Without gradients nothing else reads these buffers, and writing over them saves a pass through memory each.
        hidden = self.conv2(functional.silu(hidden, inplace=not torch.is_grad_enabled()))
        return hidden.add_(x)  # type: ignore[no-any-return]


class TinyDecoder(nn.Module):
    """Normalized latent `[B, 128, h, w]` to image `[B, 3, 64 h, 64 w]`, nominally in [-1, 1].

    The first stage works on the latent's own grid, where convolutions are cheap, and alone normalizes over the whole
    image; finer stages would lose the size of a faint detail by it. Each further stage doubles the grid. A last
    convolution gives the pixels of each cell, which are shuffled into place. `base`, if there is one, gives the
    low-resolution image: trained for nothing else, it knows it better than a network that also forms detail. Every
    stage but the first reads that image, so that detail follows its edges, and low frequencies are moved toward it.
    Where the low-resolution image is known, as it is when an image is enlarged, it takes the base's place.
    """

    def __init__(self, config: TinyDecoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TinyDecoderConfig()
        channels = config.latent_channels // config.latent_unpatchify**2
        self.stages = nn.ModuleList(
            nn.Sequential(
                _conv3x3(config.width if stage else channels, config.width),
                *(DecoderBlock(config.width, normalized=stage == 0) for _ in range(count)),
            )
            for stage, count in enumerate(config.blocks)
        )
        # One for each stage after the first, of the low-resolution image pixel-unshuffled to the stage's grid.
        self.low_res_inputs = nn.ModuleList(
            _conv3x3(3 * config.low_res_unshuffle(stage) ** 2, config.width)
            for stage in range(1, len(config.blocks) if config.base_blocks else 1)
        )
        for conv in self.low_res_inputs.children():
            nn.init.zeros_(cast(nn.Conv2d, conv).weight)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        self.to_pixels = _conv3x3(config.width, 3 * config.pixel_shuffle**2)
        self.base = None if config.base is None else TinyDecoder(config.base)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.to_pixels.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.to_pixels.weight.device

    def coarse(self, latent: Tensor) -> Tensor:
        """Features of the first stage, `[B, width, h u, w u]` with u = `latent_unpatchify`; they see the whole latent.

        Raises:
            LatentError: The latent is not `[B, latent_channels, h, w]`.
        """
        if latent.ndim != 4 or latent.shape[1] != self.config.latent_channels:
            raise LatentError(
                f"The latent has shape {list(latent.shape)}; this decoder takes "
                f"[batch, {self.config.latent_channels}, h, w]."
            )
        cells = functional.pixel_shuffle(latent, self.config.latent_unpatchify)
        return self.stages[0](cells.to(self.dtype))  # type: ignore[no-any-return]

    def pixels(self, padded: Tensor) -> Tensor:
        """Image `[B, 3, H, W]` of the last stage's features, or of some of their rows, with a border of one cell."""
        cells = functional.conv2d(padded, self.to_pixels.weight, self.to_pixels.bias)
        return functional.pixel_shuffle(cells, self.config.pixel_shuffle)

    def forward(self, latent: Tensor, low_res: Tensor | None = None) -> Tensor:
        """Decode.

        Args:
            latent: `[B, 128, h, w]`; one with noise has a clean one's scale (`Latent.unit_signal`).
            low_res: The low-resolution image `[B, 3, 16 h, 16 w]` in [-1, 1] if it is known; low frequencies are then
                left to the caller. By default the base computes it, and they are corrected. Ignored without a base.

        Returns:
            The image `[B, 3, 64 h, 64 w]`, not clamped.
        """
        estimate = self.base(latent) if self.base is not None and low_res is None else None
        low_res = low_res if estimate is None else estimate
        features = self.coarse(latent)
        for index, stage in enumerate([*self.stages][1:], start=1):
            conv, *blocks = cast(nn.Sequential, stage)
            features = conv(functional.interpolate(features, scale_factor=2, mode="nearest"))
            if self.base is not None and low_res is not None:
                cells = functional.pixel_unshuffle(low_res, self.config.low_res_unshuffle(index))
                features = features + self.low_res_inputs[index - 1](cells.to(features.dtype))
            for block in blocks:
                features = block(features)
        image = self.pixels(functional.pad(features, (1, 1, 1, 1), mode="replicate"))
        return image if estimate is None else self.corrected(image, estimate)

    def corrected(self, image: Tensor, low_res: Tensor) -> Tensor:
        """An image `[B, 3, s H, s W]` with its low frequencies moved toward those of `low_res`, `[B, 3, H, W]`."""
        correction = self.correction(image, low_res)
        return image + functional.interpolate(correction, scale_factor=self.config.scale, mode="bicubic")

    def correction(self, image: Tensor, low_res: Tensor) -> Tensor:
        """What `corrected` adds, `[B, 3, H, W]`: all of the difference of mean colors, of what is finer a share.

        Mean colors are those of a latent cell. The base knows them better than this network does; of finer structure it
        gives the blurred mean of what the latent leaves open, the more so the finer it is. An edge is an exception: the
        latent says where it is, so the base's share is larger there.
        """
        config = self.config
        difference = low_res - functional.avg_pool2d(image, config.scale)

        def means(side: int) -> Tensor:
            pooled = functional.avg_pool2d(difference, side)
            return functional.interpolate(pooled, scale_factor=side, mode="bilinear")

        structure = config.base_weight * (pairs := means(2)) + (1 - config.base_weight) * means(config.latent_down)
        share: float | Tensor = config.base_detail_weight
        if config.base_edge_weight != share:
            share = torch.lerp(
                low_res.new_tensor(share), low_res.new_tensor(config.base_edge_weight), self._edges(low_res)
            )
        return structure + share * (difference - pairs)

    def _edges(self, low_res: Tensor) -> Tensor:
        """How much of an edge there is, `[B, 1, H, W]` from 0 to 1, by the gradient of an image `[B, 3, H, W]`."""
        padded = functional.pad(low_res, (1, 1, 1, 1), mode="replicate")
        across = padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]
        down = padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]
        squared = (across.square() + down.square()).mean(1, keepdim=True) / 4
        squared = functional.avg_pool2d(functional.pad(squared, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        # The fourth power, so that strong edges count nearly in full and texture of half their gradient hardly at all.
        fourth = squared.square()
        return fourth / (fourth + (self.config.base_edge_gradient / 127.5) ** 4)


class EncoderBlock(nn.Module):
    """Two 3x3 convolutions behind ReLUs, added to their input; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = _Conv2d(width, width, 3, padding=1)
        self.conv2 = _Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        hidden = functional.relu(self.conv1(functional.relu(x)), inplace=not torch.is_grad_enabled())
        return self.conv2(hidden).add_(x)  # type: ignore[no-any-return]


class ContextBlock(EncoderBlock):
    """An `EncoderBlock` whose inner channels are scaled and shifted by the image's mean features.

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
    """Image `[B, 3, H, W]` in [-1, 1], sides multiples of 16, to FLUX.2's normalized latent `[B, 128, H/16, W/16]`.

    Channels of the latent are ordered (channel, row, column) of the 2x2 cells that FLUX.2 packs. The latent depends on
    the whole image: encode first, crop after.
    """

    def __init__(self, config: TinyEncoderConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or TinyEncoderConfig()
        self.stem = _Conv2d(3, config.full_width, 3, padding=1)
        self.at_full = nn.Sequential(*(EncoderBlock(config.full_width) for _ in range(config.full_blocks)))
        self.to_half = _Conv2d(config.full_width, config.half_width, 3, stride=2, padding=1)
        self.at_half = nn.Sequential(*(EncoderBlock(config.half_width) for _ in range(config.half_blocks)))
        self.to_quarter = _Conv2d(config.half_width, config.quarter_width, 3, stride=2, padding=1)
        self.at_quarter = nn.Sequential(*(EncoderBlock(config.quarter_width) for _ in range(config.quarter_blocks)))
        self.to_eighth = _Conv2d(config.quarter_width, config.eighth_width, 3, stride=2, padding=1)
        self.at_eighth = nn.Sequential(*(ContextBlock(config.eighth_width) for _ in range(config.eighth_blocks)))
        self.head = _Conv2d(config.eighth_width, config.channels // 4, 3, padding=1)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.stem.weight.dtype

    def forward(self, image: Tensor) -> Tensor:
        """Encode an image.

        Args:
            image: `[B, 3, H, W]` in [-1, 1].

        Returns:
            The latent `[B, channels, H/16, W/16]`.

        Raises:
            SizeError: The image has another shape, or sides that are no multiples of 16.
        """
        if image.ndim != 4 or image.shape[1] != 3:
            raise SizeError(f"The encoder takes images [B, 3, H, W]; this one is {list(image.shape)}.")
        height, width = image.shape[-2:]
        if height % ENCODER_STRIDE or width % ENCODER_STRIDE or not height or not width:
            raise SizeError(
                f"A {width}x{height} image does not divide into {ENCODER_STRIDE}-pixel cells; crop it to "
                f"{width // ENCODER_STRIDE * ENCODER_STRIDE}x{height // ENCODER_STRIDE * ENCODER_STRIDE}."
            )
        image = image.contiguous(memory_format=torch.channels_last)  # as convolutions on a CPU read it, without copies
        x = self.at_half(self.to_half(functional.relu(self.at_full(self.stem(image)))))
        x = self.at_eighth(self.to_eighth(self.at_quarter(self.to_quarter(x))))
        return functional.pixel_unshuffle(self.head(functional.relu(x)), 2)


def _conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the grid and repeats its border."""
    return _Conv2d(in_channels, out_channels, 3, padding=1, padding_mode="replicate")
