# SPDX-License-Identifier: Apache-2.0
"""The discriminator of `tiny`: learned heads on frozen features and on pixels, with hinge loss and R1.

Projected GANs, https://arxiv.org/abs/2111.01007; R1, https://arxiv.org/abs/1801.04406, every few steps as in
https://arxiv.org/abs/1912.04958.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from data import LUMA
from pidecode.training.losses import discriminator_hinge, r1_penalty

_FAINT = 3 / 127.5  # contrast that is as good as none, so that flat areas need no grain to look real


def _feature_head(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, width, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 1, 1),
    )


def _pixel_head(channels: int, width: int) -> nn.Sequential:
    """A logit per 4x4 pixels that sees 13x13 of them: fine grain, but no objects."""
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 1, 1),
    )


def contrast_normalized(image: Tensor) -> Tensor:
    """Luma of images `[B, 3, H, W]`, less its local mean and divided by its local contrast: `[B, 1, H, W]`.

    Faint texture counts as much as strong one. The window of 7x7 pixels is that of NIQE, which compares the statistics
    of such values (https://doi.org/10.1109/LSP.2012.2227726, section II-A).
    """
    with torch.autocast(image.device.type, enabled=False):  # bfloat16 rounds luma by as much as faint contrast
        weights = torch.exp(-torch.arange(-3.0, 4.0, device=image.device).square() / (2 * (7 / 6) ** 2))
        weights = weights / weights.sum()
        kernel = (weights[:, None] * weights).view(1, 1, 7, 7)
        luma = (image.float() * torch.tensor(LUMA, device=image.device).view(3, 1, 1)).sum(1, keepdim=True)
        difference = luma - F.conv2d(F.pad(luma, (3, 3, 3, 3), mode="replicate"), kernel)
        variance = F.conv2d(F.pad(difference.square(), (3, 3, 3, 3), mode="replicate"), kernel)
        return difference / ((variance + 1e-8).sqrt() + _FAINT)


class FeatureDiscriminator(nn.Module):
    """One head per layer of frozen features, and three on pixels: colors, and contrast-normalized luma of two sizes.

    Args:
        channels: Channels of the feature layers.
        layers: Indices of the layers that are read.
        width: Channels of the heads; half as many in those on pixels.
    """

    def __init__(self, channels: Sequence[int], layers: Sequence[int], *, width: int = 64) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.heads = nn.ModuleList(_feature_head(channels[layer], width) for layer in self.layers)
        self.pixel_heads = nn.ModuleList(_pixel_head(count, width // 2) for count in (3, 1, 1))

    def inputs(self, image: Tensor, features: Sequence[Tensor]) -> list[Tensor]:
        """What the heads read: the chosen features, pixels, and contrast-normalized luma at full and at half size."""
        chosen = [features[layer] for layer in self.layers]
        return [*chosen, image, contrast_normalized(image), contrast_normalized(F.avg_pool2d(image, 2))]

    def forward(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Logit maps `[B, 1, h, w]`, one per head; higher for what looks real."""
        heads = [*self.heads, *self.pixel_heads]
        return [head(x) for head, x in zip(heads, inputs, strict=True)]


def g_loss(logits: Sequence[Tensor]) -> Tensor:
    """Generator side of the hinge loss, averaged over heads."""
    return -torch.stack([x.float().mean() for x in logits]).mean()


def d_loss(fake: Sequence[Tensor], real: Sequence[Tensor]) -> Tensor:
    """Discriminator side of the hinge loss, averaged over heads."""
    losses = [discriminator_hinge(x.float(), y.float()) for x, y in zip(fake, real, strict=True)]
    return torch.stack(losses).mean()


def r1(discriminator: FeatureDiscriminator, inputs: Sequence[Tensor]) -> Tensor:
    """R1 with respect to what the heads read of real images, averaged over heads; in float32.

    Gradients do not run through the frozen features, which are fixed anyway. Logits are averaged over positions, so
    that the penalty does not depend on the size of the crop.
    """
    with torch.autocast(inputs[0].device.type, enabled=False):
        leaves = [x.detach().float().requires_grad_(True) for x in inputs]
        penalties = []
        for logits, leaf in zip(discriminator(leaves), leaves, strict=True):
            per_image = logits.flatten(1).mean(1)
            penalties.append(r1_penalty(per_image, leaf) * logits.shape[-1] * logits.shape[-2])
        return torch.stack(penalties).mean()
