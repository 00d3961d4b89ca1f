# SPDX-License-Identifier: Apache-2.0
"""Layout of latents: normalization, noise parametrization, packing.

Computed in float32 (float64 for float64 inputs) and returned in the input's dtype: in bfloat16 the arithmetic would
add an error as large as the rounding itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pidecode.errors import LatentError, SettingError
from pidecode.registry.spaces import LatentSpace


@dataclass(frozen=True, slots=True, eq=False)
class LatentStatistics:
    """Mean and variance of raw latents, from the encoder's weights.

    For flux2 the running statistics of the autoencoder's batch norm, each `[128]`; for dinov2 those of RAE
    (https://arxiv.org/abs/2510.11690), each `[768, 32, 32]`.
    """

    mean: Tensor
    variance: Tensor


def noise_weights(space: LatentSpace, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Weights of signal and noise at noise levels in [0, 1]: `z_s = signal * z + noise * e`."""
    if space.noise_parametrization == "flow":
        return 1.0 - sigma, sigma
    return (1.0 - sigma * sigma).clamp_min(0.0).sqrt(), sigma


def add_noise(latent: Tensor, noise: Tensor, sigma: float | Tensor, space: LatentSpace) -> Tensor:
    """Add unit noise to a clean latent, both `[B, C, h, w]`, at noise levels in [0, 1], one or `[B]`.

    `(1 - s) z + s e` for flow-matching spaces, `sqrt(1 - s^2) z + s e` for SDXL (docs/architecture.md, Latent spaces).

    Raises:
        LatentError: The shapes differ.
    """
    if latent.shape != noise.shape:
        raise LatentError(f"Noise must have the latent's shape {list(latent.shape)}; got {list(noise.shape)}.")
    value = _to_float(latent)
    signal, amount = noise_weights(space, _sigma_like(sigma, value))
    return (signal * value + amount * noise.to(value)).to(latent.dtype)


def euler_to_variance_preserving(latent: Tensor, sigma: float | Tensor) -> tuple[Tensor, Tensor]:
    """A latent `[B, C, h, w]` of an Euler scheduler, `x_0 + s e`, and its s >= 0 or `[B]`, as variance preserving.

    Both are divided by sqrt(s^2 + 1), which brings sigma into [0, 1).

    Raises:
        LatentError: Sigma is negative or not finite.
    """
    value = _to_float(latent)
    column = _sigma_like(sigma, value)
    if not bool((torch.isfinite(column) & (column >= 0)).all()):
        raise LatentError(f"An Euler scheduler's sigma is finite and not negative; got {column.flatten().tolist()}.")
    size = (column * column + 1.0).sqrt()
    return (value / size).to(latent.dtype), (column / size).flatten()


def normalize(raw: Tensor, space: LatentSpace, statistics: LatentStatistics | None = None) -> Tensor:
    """Normalize a raw latent to `[B, channels, h, w]` (docs/architecture.md, Latent spaces).

    Args:
        raw: `[B, raw_channels, h * p, w * p]`; for qwenimage also `[B, 16, 1, h, w]`, for flux2 also patchified
            `[B, 128, h, w]`; for dinov2 the features after the LayerNorm without weights, for siglip those before it.
        space: The latent space.
        statistics: Mean and variance, for flux2 and dinov2.

    Raises:
        LatentError: Another shape, or missing statistics.
    """
    raw = _raw_layout(raw, space)
    value = _to_float(raw)
    match space.statistics:
        case "constants":
            value = (value - space.shift_factor) * space.scaling_factor
        case "layer_norm":
            variance, mean = torch.var_mean(value, dim=1, keepdim=True, correction=0)
            value = (value - mean) / (variance + space.epsilon).sqrt()
        case _:
            mean, deviation = _affine(value, space, statistics)
            value = (value - mean) / deviation
    return value.to(raw.dtype)


def denormalize(latent: Tensor, space: LatentSpace, statistics: LatentStatistics | None = None) -> Tensor:
    """Undo `normalize`: the raw latent that the space's own decoder takes.

    Args:
        latent: Normalized, `[B, C, h, w]`.
        space: The latent space.
        statistics: Mean and variance, for flux2 and dinov2.

    Returns:
        The raw latent; unpatchified for flux2, `[B, 32, 2h, 2w]`; one frame of a video for qwenimage,
        `[B, 16, 1, h, w]`.

    Raises:
        LatentError: The LayerNorm of siglip cannot be undone, or statistics are missing.
    """
    value = _to_float(latent)
    match space.statistics:
        case "constants":
            value = value / space.scaling_factor + space.shift_factor
        case "layer_norm":
            raise LatentError(
                f"The raw form of a {space.name} latent cannot be computed: its LayerNorm cannot be undone. "
                "The space's own decoder takes the normalized latent."
            )
        case _:
            mean, deviation = _affine(value, space, statistics)
            value = value * deviation + mean
    raw = pixel_shuffle(value, space.raw_patch).to(latent.dtype)
    return raw.unsqueeze(2) if space.name == "qwenimage" else raw


def _raw_layout(raw: Tensor, space: LatentSpace) -> Tensor:
    if raw.ndim == 5 and raw.shape[2] == 1 and space.name == "qwenimage":
        raw = raw.squeeze(2)
    if raw.ndim != 4 or raw.shape[1] not in (space.raw_channels, space.channels):
        raise LatentError(
            f"A raw {space.name} latent is [B, {space.raw_channels}, h, w]; got {list(raw.shape)}. "
            "Pass the tensor as the space's own encoder returns it (its mean, not a sample)."
        )
    if raw.shape[1] == space.channels:
        return raw
    if raw.shape[-1] % space.raw_patch or raw.shape[-2] % space.raw_patch:
        raise LatentError(
            f"A raw latent of {raw.shape[-2]}x{raw.shape[-1]} cells cannot be patchified by {space.raw_patch}: "
            f"both sides must be multiples of {space.raw_patch}. Crop the image before encoding it."
        )
    return pixel_unshuffle(raw, space.raw_patch)  # channel index = (c, dy, dx)


def _affine(latent: Tensor, space: LatentSpace, statistics: LatentStatistics | None) -> tuple[Tensor, Tensor]:
    """Mean and deviation that broadcast over `latent`."""
    if space.statistics == "per_channel":
        given = latent.new_tensor([space.mean, space.std]).view(2, 1, -1, 1, 1)
        return given[0], given[1]
    if statistics is None:
        raise LatentError(
            f"Raw {space.name} latents are normalized with statistics from the encoder's weights: "
            "pass them as statistics=LatentStatistics(mean, variance)."
        )
    want = (space.channels, *latent.shape[2:]) if space.statistics == "per_position" else (space.channels,)
    for name in ("mean", "variance"):
        shape = tuple(getattr(statistics, name).shape)
        if shape != want:
            raise LatentError(f"The {name} of the {space.name} statistics must be {list(want)}; got {list(shape)}.")
    view = (1, space.channels, 1, 1) if space.statistics == "batch_norm" else (1, *want)
    mean, variance = (part.to(latent).view(view) for part in (statistics.mean, statistics.variance))
    if not bool((variance >= 0).all()):
        raise LatentError(f"The variance of the {space.name} statistics is negative or NaN somewhere.")
    return mean, (variance + space.epsilon).sqrt()


def _to_float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _sigma_like(sigma: float | Tensor, latent: Tensor) -> Tensor:
    """Sigma as `[1 or B, 1, 1, 1]` in the latent's dtype."""
    column = torch.as_tensor(sigma, dtype=latent.dtype, device=latent.device).flatten()
    if column.numel() not in (1, latent.shape[0]):
        raise LatentError(f"Sigma must be one number or one per sample ({latent.shape[0]}); got {column.numel()}.")
    return column.view(-1, *[1] * (latent.ndim - 1))


def packed_grid(space: LatentSpace, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens of an image model's image (not PiD's), rounded down. Raises SettingError for none."""
    if space.packing == "none":
        raise SettingError(
            f"Latents of space {space.name} are not packed into tokens; give the [B, {space.channels}, h, w] tensor."
        )
    pixels = space.pixels_per_token
    if height < pixels or width < pixels:
        raise SettingError(f"An image of {height}x{width} pixels is smaller than one token ({pixels}x{pixels}).")
    return height // pixels, width // pixels


def unpack(tokens: Tensor, space: LatentSpace, height: int, width: int) -> Tensor:
    """Unpack tokens `[B, N, token_channels]` of an image model's image of that size to a latent `[B, C, h, w]`.

    Raises:
        LatentError: The tokens do not fit the image.
        SettingError: The space's latents are not packed.
    """
    rows, columns = packed_grid(space, height, width)
    expected = space.token_channels
    if tokens.ndim != 3 or tokens.shape[2] != expected:
        raise LatentError(
            f"Packed {space.name} latents are [B, tokens, {expected}]; got {list(tokens.shape)}. "
            "A four-dimensional tensor is not packed: pass it to Latent() itself."
        )
    if tokens.shape[1] != rows * columns:
        raise LatentError(
            f"An image of {height}x{width} pixels has {rows}x{columns} = {rows * columns} {space.name} tokens; "
            f"got {tokens.shape[1]}. Give the height and width the image model ran at."
        )
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, rows, columns)
    return pixel_shuffle(grid, 2 if space.packing == "two_by_two" else 1)
