# SPDX-License-Identifier: Apache-2.0
"""Latent adapter and gates: a latent to patch tokens for every injection point (docs/architecture.md, Adapter).

Only the gates read the noisy image, so an image needs the adapter once, whatever the number of steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import LatentError
from pidecode.registry.configs import Padding, PiDConfig


class Injection(Protocol):
    """Latent tokens of one injection point, with the part of their gate that no denoising step changes."""

    def read(self) -> tuple[Tensor, Tensor]: ...  # tokens `[B, L, D]` and gate logits `[B, L, D or 1]`

    def crop(self, index: tuple[Any, Any]) -> Injection: ...  # the same for some samples and patches only


@dataclass(frozen=True, slots=True)
class ComputedInjection:
    """An injection held in memory."""

    tokens: Tensor
    gate_logits: Tensor

    def read(self) -> tuple[Tensor, Tensor]:
        return self.tokens, self.gate_logits

    def crop(self, index: tuple[Any, Any]) -> ComputedInjection:
        return ComputedInjection(self.tokens[index], self.gate_logits[index])


def masked(x: Tensor, mask_B: Tensor | None) -> Tensor:
    """Tensor `[B, ...]` times a per-sample mask `[B]` of 0 or 1."""
    return x if mask_B is None else x * mask_B.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))


@dataclass(frozen=True, slots=True)
class LatentTokens:
    """The adapter's output: tokens `[B, L, D]` per injected patch block, and for the pixel blocks."""

    blocks: tuple[Tensor, ...]
    pixels: Tensor | None
    color: Tensor | None  # low-resolution image `[B, 3, h f, w f]`, f = patch_size / scale, if asked for


def conv3x3(in_channels: int, out_channels: int, padding: Padding) -> nn.Conv2d:
    """A 3x3 convolution that keeps height and width."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1, padding_mode=padding)


class ResidualBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, and a skip connection."""

    def __init__(self, width: int, padding: Padding) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(4, width), nn.SiLU(), conv3x3(width, width, padding),
            nn.GroupNorm(4, width), nn.SiLU(), conv3x3(width, width, padding),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(x)  # type: ignore[no-any-return]


def _resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return x if x.shape[-2:] == size else F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def _conv_stack(in_channels: int, width: int, blocks: int, padding: Padding) -> nn.Sequential:
    return nn.Sequential(
        conv3x3(in_channels, width, padding), nn.SiLU(), conv3x3(width, width, padding),
        *(ResidualBlock(width, padding) for _ in range(blocks)),
    )  # fmt: skip


class Gate(nn.Module):
    """Sigma-aware gate: adds latent tokens to the stream, fewer where the latent itself is noisy.

    `x + sigmoid(content_proj([x, latent]) - exp(log_alpha) * sigma) * latent`, with one gate per token or per channel.
    `latent_logits` is the part of the logits that no denoising step changes.
    """

    def __init__(self, width: int, per_channel: bool) -> None:
        super().__init__()
        self.content_proj = nn.Linear(2 * width, width if per_channel else 1)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(5.0)))

    def reset_parameters(self) -> None:
        """Start values: nearly open for a clean latent, nearly closed for noise."""
        nn.init.trunc_normal_(self.content_proj.weight, std=0.01)
        nn.init.constant_(self.content_proj.bias, 2.0)
        nn.init.constant_(self.log_alpha, math.log(5.0))

    def latent_logits(self, latent_BLD: Tensor, sigma_B: Tensor) -> Tensor:
        """The part of the logits that no denoising step changes, `[B, L, D or 1]`, float32."""
        weight = self.content_proj.weight[:, latent_BLD.shape[-1] :]
        logits = F.linear(latent_BLD.to(weight.dtype), weight, self.content_proj.bias)
        return logits - self.log_alpha.float().exp() * sigma_B.float().view(-1, 1, 1)

    def value(self, x_BLD: Tensor, logits: Tensor) -> Tensor:
        """The gate's value `[B, L, D or 1]` in (0, 1)."""
        weight = self.content_proj.weight[:, : x_BLD.shape[-1]]
        return torch.sigmoid(F.linear(x_BLD.to(weight.dtype), weight) + logits)

    def forward(self, x_BLD: Tensor, latent_BLD: Tensor, logits: Tensor) -> Tensor:
        return x_BLD + self.value(x_BLD, logits) * latent_BLD


class LatentAdapter(nn.Module):
    """Latent `[B, C, a, b]` to tokens of the patch grid for every injection point."""

    def __init__(self, config: PiDConfig) -> None:
        super().__init__()
        self.config = config
        width, padding = config.adapter_width, config.adapter_padding
        if config.adapter_image_channels:
            self.unshuffle = config.patch_size // config.scale
            self.image_conv = _conv_stack(
                config.adapter_image_channels * self.unshuffle**2, width, config.adapter_blocks, padding
            )
        if config.latent_channels:
            channels = config.latent_channels // config.latent_unpatchify**2
            if config.latent_to_patch_ratio < 1:
                channels *= round(1 / config.latent_to_patch_ratio) ** 2
            self.latent_proj = _conv_stack(channels, width, config.adapter_blocks, padding)
        if config.adapter_image_channels and config.latent_channels:
            self.merge = nn.Sequential(
                nn.Conv2d(2 * width, width, 1), nn.SiLU(),
                *(ResidualBlock(width, padding) for _ in range(config.adapter_blocks)),
            )  # fmt: skip
        self.output_heads = nn.ModuleList(nn.Linear(width, config.hidden_size) for _ in range(config.num_injections))
        if config.inject_pixels:
            self.pit_head = nn.Linear(width, config.hidden_size)
        if config.color_head:
            colors = 3 * (config.patch_size // config.scale) ** 2
            self.lq_aux_rgb_head = nn.Sequential(
                nn.LayerNorm(width), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, colors)
            )
        self.gate_modules = nn.ModuleList(
            Gate(config.hidden_size, config.gate == "per_channel") for _ in range(config.num_injections)
        )

    def align(self, latent: Tensor, grid: tuple[int, int]) -> Tensor:
        """A latent on the patch grid: unpatchified, resized or pixel-unshuffled. Raises LatentError for its shape."""
        config = self.config
        if latent.ndim != 4 or latent.shape[1] != config.latent_channels:
            expected = f"[batch, {config.latent_channels}, h, w]"
            raise LatentError(f"The latent has shape {tuple(latent.shape)}; this network expects {expected}.")
        if config.latent_unpatchify > 1:
            latent = F.pixel_shuffle(latent, config.latent_unpatchify)
        ratio = config.latent_to_patch_ratio
        if ratio > 1:
            return F.interpolate(latent, size=grid, mode="nearest")
        latent = _resize(latent, (round(grid[0] / ratio), round(grid[1] / ratio)))
        return F.pixel_unshuffle(latent, round(1 / ratio))

    def features(
        self, grid: tuple[int, int], latent: Tensor | None, image: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Features `[B, width, h, w]` that all heads share, and the color head's. Raises LatentError without input."""
        parts: list[Tensor] = []
        tapped: Tensor | None = None
        if self.config.adapter_image_channels and image is not None:
            image = _resize(image, (grid[0] * self.unshuffle, grid[1] * self.unshuffle))
            parts.append(self.image_conv(F.pixel_unshuffle(image, self.unshuffle)))
        if self.config.latent_channels and latent is not None:
            hidden = self.align(latent, grid).to(next(self.latent_proj.parameters()).dtype)
            for index, layer in enumerate(self.latent_proj):
                hidden = layer(hidden)
                if index > 2 and index - 2 == self.config.color_head_tap:  # residual blocks count from one
                    tapped = hidden
            parts.append(hidden)
        if not parts:
            raise LatentError("The adapter was given neither a latent nor a low-resolution image it can read.")
        shared = parts[0] if len(parts) == 1 else self.merge(torch.cat(parts, dim=1))
        return shared, shared if tapped is None else tapped

    def color(self, features: Tensor, grid: tuple[int, int]) -> Tensor:
        """Color head: features to the low-resolution image `[B, 3, h f, w f]`, not clamped."""
        side = self.config.patch_size // self.config.scale
        colors = self.lq_aux_rgb_head(features.flatten(2).transpose(1, 2))
        return F.pixel_shuffle(colors.transpose(1, 2).unflatten(2, grid), side)

    def forward(
        self,
        grid: tuple[int, int],
        latent: Tensor | None,
        *,
        image: Tensor | None = None,
        mask: Tensor | None = None,
        want_color: bool = False,
    ) -> LatentTokens:
        """Tokens for every injection point.

        Args:
            grid: Rows and columns of patches.
            latent: Normalized latent `[B, C, a, b]`.
            image: Low-resolution image `[B, 3, H, W]`, for adapters that read one.
            mask: `[B]` of 0 or 1; 0 silences a sample.
            want_color: Run the color head.
        """
        shared, tapped = self.features(grid, latent, image)
        tokens = shared.flatten(2).transpose(1, 2)
        return LatentTokens(
            blocks=tuple(masked(head(tokens), mask) for head in self.output_heads),
            pixels=masked(self.pit_head(tokens), mask) if self.config.inject_pixels else None,
            color=masked(self.color(tapped, grid), mask) if want_color else None,
        )
