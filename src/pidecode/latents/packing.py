# SPDX-License-Identifier: Apache-2.0
"""Packed tokens to `[B, C, h, w]` and back, as Flux, FLUX.2 and Qwen-Image pipelines lay them out."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from pidecode.errors import LatentError, SettingError
from pidecode.facts.spaces import LatentSpace


def patchify(latent: Tensor, patch: int) -> Tensor:
    """`[B, C, p h, p w]` to `[B, C p^2, h, w]`; channel index = (c, dy, dx)."""
    if latent.shape[-1] % patch or latent.shape[-2] % patch:
        raise LatentError(
            f"A raw latent of {latent.shape[-2]}x{latent.shape[-1]} cells cannot be folded by {patch}: "
            f"both sides must be multiples of {patch}. Crop the picture before encoding it."
        )
    return pixel_unshuffle(latent, patch) if patch > 1 else latent


def unpatchify(latent: Tensor, patch: int) -> Tensor:
    """`[B, C p^2, h, w]` to `[B, C, p h, p w]`, the inverse of `patchify`."""
    return pixel_shuffle(latent, patch) if patch > 1 else latent


def packed_grid(space: LatentSpace, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of tokens for a picture of `height` x `width` pixels (the image model's, not PiD's).

    Sides that are no multiple of 16 are rounded down to one, as the pipelines do.
    Raises SettingError for a space whose latents are not packed.
    """
    if space.packing == "none":
        raise SettingError(
            f"Latents of space {space.name} are not packed into tokens; give the [B, {space.channels}, h, w] tensor."
        )
    pixels = space.down * (2 if space.packing == "two_by_two" else 1)
    if height < pixels or width < pixels:
        raise SettingError(f"A picture of {height}x{width} pixels is smaller than one token ({pixels}x{pixels}).")
    return height // pixels, width // pixels


def unpack(tokens: Tensor, space: LatentSpace, height: int, width: int) -> Tensor:
    """Packed tokens `[B, N, token channels]` of a `height` x `width` picture to a latent `[B, C, h, w]`.

    Values and frame stay as they are. Raises LatentError when the tokens do not fit that picture, and
    SettingError for a space that is not packed.
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
            f"A picture of {height}x{width} pixels has {rows}x{columns} = {rows * columns} {space.name} tokens; "
            f"got {tokens.shape[1]}. Give the height and width the image model ran at."
        )
    grid = tokens.transpose(1, 2).reshape(len(tokens), -1, rows, columns)
    return unpatchify(grid, 2 if space.packing == "two_by_two" else 1)


def pack(latent: Tensor, space: LatentSpace) -> Tensor:
    """A latent `[B, C, h, w]` to packed tokens `[B, N, token channels]`, the inverse of `unpack`."""
    if space.packing == "none":
        raise SettingError(f"Latents of space {space.name} are not packed into tokens.")
    return patchify(latent, 2 if space.packing == "two_by_two" else 1).flatten(2).transpose(1, 2)
