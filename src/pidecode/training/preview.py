# SPDX-License-Identifier: Apache-2.0
"""A grid of what the network paints now: for each picture the low-resolution input, the painting, the picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.images.tensors import to_pil
from pidecode.sampling import NoiseStream, guided, renoise, sample_teacher
from pidecode.training.evaluator import Example, clean_of, net_of
from pidecode.training.settings import Recipe

_EDGE = 4


@torch.no_grad()
def paint_example(net: nn.Module, example: Example, recipe: Recipe, seed: int = 0) -> Tensor:
    """A finished picture `[1, 3, H, W]` in [-1, 1], as a decoder would make it."""
    picture = example.picture
    shape = (3, picture.shape[-2], picture.shape[-1])
    draw = NoiseStream([seed], shape, picture.device)
    if recipe.method in ("student", "direct"):
        return few_steps(net, example, recipe.distil.times, draw)

    def predict(x: Tensor, t: Tensor, shown: Example = example) -> Tensor:
        prediction: Tensor = net(x, t / 1000.0, shown).prediction
        return prediction.float()

    def uncaptioned(x: Tensor, t: Tensor) -> Tensor:
        return predict(x, t, example.without_caption())

    guidance = recipe.run.sample_guidance if recipe.net.has_text else 1.0
    return sample_teacher(
        guided(predict, uncaptioned, guidance),
        draw(),
        steps=recipe.run.sample_steps,
        shift=recipe.teacher.flow_shift.at(*shape[1:]),
        prediction=net_of(net).config.prediction,
    ).clamp(-1, 1)


def few_steps(net: nn.Module, example: Example, times: Sequence[float], draw: NoiseStream) -> Tensor:
    """The student's loop over its own times."""
    x = draw()
    for t, t_next in pairwise(times):
        t_B = torch.full((x.shape[0],), t, device=x.device)
        clean = clean_of(net, net(x, t_B, example).prediction, x, t_B)
        x = renoise(clean, draw(), t_next) if t_next > 0 else clean
    return x.clamp(-1, 1)


def grid_of(rows: Sequence[tuple[Tensor | None, Tensor, Tensor]]) -> Tensor:
    """One picture `[3, H, W]` of rows (low resolution, painted, real), each `[1, 3, h, w]`, dark edges between."""
    height = max(row[2].shape[-2] for row in rows)
    width = max(row[2].shape[-1] for row in rows)
    bands = []
    for low, painted, real in rows:
        size = (real.shape[-2], real.shape[-1])
        first = torch.full_like(real, -1.0) if low is None else F.interpolate(low, size=size, mode="nearest")
        cells = [
            F.pad(cell[0].float().cpu(), (0, width - size[1] + _EDGE, 0, height - size[0] + _EDGE), value=-1.0)
            for cell in (first, painted, real)
        ]
        bands.append(torch.cat(cells, dim=-1))
    return torch.cat(bands, dim=-2)


def save_grid(path: Path, rows: Sequence[tuple[Tensor | None, Tensor, Tensor]]) -> None:
    """Write the grid as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    to_pil(grid_of(rows)).save(part, format="PNG")
    part.replace(path)
