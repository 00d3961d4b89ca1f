# SPDX-License-Identifier: Apache-2.0
"""Sums about sizes: what a latent becomes, which latent a picture needs, how near it is to what was trained."""

from __future__ import annotations

import math

from pidecode.errors import SizeError
from pidecode.facts.checkpoints import Checkpoint, Size
from pidecode.facts.spaces import get_space

PATCH = 16
"""Side, in output pixels, of a patch of every released network; outputs are whole patches."""

# A range variant is judged trained up to these bounds: its buckets stop short of them by a few per cent.
_AREA_TOLERANCE = 0.05
_LONGEST_SIDE = 4096
_WIDEST_ASPECT = 1.8


def output_size(space: str, latent_height: int, latent_width: int) -> Size:
    """Height and width, in pixels, of what a latent of that many cells becomes. Raises SizeError for none."""
    if latent_height < 1 or latent_width < 1:
        raise SizeError(f"A latent needs at least one cell; got {latent_height}x{latent_width}.")
    factor = get_space(space).pixels_per_cell
    return latent_height * factor, latent_width * factor


def latent_grid(space: str, height: int, width: int) -> Size:
    """Rows and columns of the latent whose output is `height` x `width` pixels.

    Raises SizeError, naming the nearest sizes there are, if there is none.
    """
    check_output_size(space, height, width)
    factor = get_space(space).pixels_per_cell
    return height // factor, width // factor


def input_size(space: str, height: int, width: int) -> Size:
    """Height and width of the encoder's input for that output. Raises SizeError as `latent_grid` does."""
    rows, columns = latent_grid(space, height, width)
    down = get_space(space).down
    return rows * down, columns * down


def check_output_size(space: str, height: int, width: int) -> None:
    """Raise SizeError unless a latent of `space` can become exactly `height` x `width` pixels.

    Spaces with a fixed input have one output size; for the others both sides are multiples of
    `input_multiple * scale` pixels (64).
    """
    row = get_space(space)
    if row.fixed_input is not None:
        side = row.fixed_input * row.scale
        if (height, width) != (side, side):
            raise SizeError(f"Space {row.name} always gives {side}x{side} pixels; {height}x{width} cannot be had.")
        return
    step = math.lcm(row.input_multiple * row.scale, PATCH, row.pixels_per_cell)
    if height < step or width < step or height % step or width % step:
        raise SizeError(
            f"Space {row.name} cannot give {height}x{width} pixels: both sides must be multiples of {step}. "
            f"The nearest is {_nearest(height, step)}x{_nearest(width, step)}."
        )


def is_trained(checkpoint: Checkpoint, height: int, width: int) -> bool:
    """Whether the output size is among those the checkpoint was trained for (True where any size is as good)."""
    if not checkpoint.trained_sizes or (height, width) in checkpoint.trained_sizes:
        return True
    if checkpoint.trained_area is None:
        return False
    least, most = checkpoint.trained_area
    aspect = max(height, width) / max(1, min(height, width))
    return (
        least * (1 - _AREA_TOLERANCE) <= height * width <= most
        and max(height, width) <= _LONGEST_SIDE
        and aspect <= _WIDEST_ASPECT
    )


def nearest_trained(checkpoint: Checkpoint, height: int, width: int) -> Size | None:
    """The trained output size nearest in shape, then in area; the size itself if trained; None without such a list."""
    if height < 1 or width < 1:
        raise SizeError(f"A picture has positive sides; got {height}x{width}.")
    if not checkpoint.trained_sizes:
        return None
    if is_trained(checkpoint, height, width):
        return height, width

    def distance(size: Size) -> float:
        shape = abs(math.log(size[0] * width / (size[1] * height)))
        area = abs(math.log(size[0] * size[1] / (height * width)))
        return 2 * shape + area / 2

    return min(checkpoint.trained_sizes, key=distance)


def size_advice(checkpoint: Checkpoint, height: int, width: int) -> str | None:
    """A sentence to warn with when the output size is outside what the checkpoint was trained for, else None."""
    if is_trained(checkpoint, height, width):
        return None
    nearest = nearest_trained(checkpoint, height, width)
    assert nearest is not None
    return (
        f"{checkpoint.name} was not trained for {height}x{width} pixels (height x width): colors and textures may "
        f"suffer. The nearest trained size is {nearest[0]}x{nearest[1]}."
    )


def _nearest(side: int, step: int) -> int:
    return max(step, round(side / step) * step)
