# SPDX-License-Identifier: Apache-2.0
"""The small convolutional critic of the distillation, which judges pictures by the teacher's features of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pidecode.errors import SettingError


def _groups(channels: int) -> int:
    if channels > 32:
        return next(count for count in range(32, 0, -1) if channels % count == 0)
    groups = max(1, channels // 4)
    if channels % groups:
        raise SettingError(f"A critic layer of {channels} channels does not divide into {groups} groups.")
    return groups


def _head(width: int, layers: int, per_patch: bool) -> nn.Sequential:
    """Convolutions that halve the grid and the channels, then one logit."""
    parts: list[nn.Module] = []
    for index in range(layers - 1):
        narrower = width // 2 if index == 0 else max(width // 2, 64)
        parts += [
            nn.Conv2d(width, narrower, 4, stride=2, padding=1),
            nn.GroupNorm(_groups(narrower), narrower),
            nn.LeakyReLU(0.2),
        ]
        width = narrower
    parts.append(nn.Conv2d(width, 1, 1))
    parts += [nn.Flatten(1)] if per_patch else [nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]
    return nn.Sequential(*parts)


class Discriminator(nn.Module):
    """One head per tapped block of the teacher (golden notes, section 9).

    blocks: zero-based patch blocks whose features it reads; empty means the middle one of `depth`.
    """

    def __init__(
        self, width: int, depth: int, blocks: tuple[int, ...] = (), *, layers: int = 2, per_patch: bool = False
    ) -> None:
        super().__init__()
        self.blocks = tuple(sorted(set(blocks))) or (depth // 2,)
        if self.blocks[0] < 0 or self.blocks[-1] >= depth:
            raise SettingError(f"The critic taps blocks {self.blocks}, but the teacher has blocks 0 to {depth - 1}.")
        if layers < 1:
            raise SettingError(f"The critic has {layers} layers; it needs at least 1.")
        self.cls_pred_heads = nn.ModuleList(_head(width, layers, per_patch) for _ in self.blocks)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features `[B, D, h, w]` of each tapped block, ascending, to logits `[B, heads]` (or one per place)."""
        judged = [head(x) for head, x in zip(self.cls_pred_heads, features, strict=True)]
        return torch.cat(judged, dim=1)
