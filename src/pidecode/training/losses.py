# SPDX-License-Identifier: Apache-2.0
"""Losses as functions of tensors, and REPA with its encoder (docs/architecture.md, "Training")."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import MissingDependencyError, SettingError

_TINY = 1e-6
_DINO_PATCH, _DINO_MEAN, _DINO_STD = 14, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# BT.601, the opponent space of JPEG: rows give Y, Cb and Cr from red, green and blue in [0, 1].
_YCBCR = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))


def flow_matching(velocity: Tensor, image: Tensor, noise: Tensor) -> Tensor:
    """Mean squared error between the network's velocity and `noise - image`, all `[B, 3, H, W]`."""
    return F.mse_loss(velocity, noise - image)


def distribution_matching(generated: Tensor, teacher: Tensor, fake: Tensor) -> Tensor:
    """Distribution matching: its gradient moves `generated` from the fake score's image to the teacher's (DMD2).

    All are clean images `[B, 3, H, W]`; gradients reach `generated` alone. Each sample's gradient is divided by its
    mean distance from the teacher. Computed in float64; where that is not finite, the gradient is 0.
    """
    wide = generated.double()
    with torch.no_grad():
        start, goal = wide.detach(), teacher.double()
        distance = (start - goal).abs().flatten(1).mean(1).view(-1, 1, 1, 1)
        gradient = ((fake.double() - goal) / (distance + _TINY)).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    return 0.5 * F.mse_loss(wide, start - gradient)


def generator_adversarial(fake_logits: Tensor) -> Tensor:
    """Non-saturating loss of the student for samples that the discriminator recognizes."""
    return F.softplus(-fake_logits).mean()


def discriminator_adversarial(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Logistic loss of the discriminator."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def approximate_r1(real_logits: Tensor, perturbed_logits: Tensor) -> Tensor:
    """Squared change of the logits when the real image is perturbed by a little noise; gradients flow into both.

    Approximates R1 without second derivatives (https://arxiv.org/abs/2501.08316).
    """
    return F.mse_loss(real_logits, perturbed_logits)


def to_ycbcr(rgb: Tensor) -> Tensor:
    """Red, green, blue in [0, 1] `[B, 3, H, W]` to luma and two color differences, same shape."""
    matrix = torch.tensor(_YCBCR, dtype=rgb.dtype, device=rgb.device)
    return torch.einsum("yc,bchw->byhw", matrix, rgb)


def color_alignment(
    predicted: Tensor,
    low: Tensor,
    sigma: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    sigma_power: float = 1.0,
    luma_weight: float = 0.25,
    softness: float = 1e-3,
) -> Tensor:
    """Color loss of the adapter's auxiliary head: Charbonnier distance in YCbCr, luma counted for less.

    Args:
        predicted: The head's image `[B, 3, h, w]` in [-1, 1].
        low: The low-resolution image, likewise.
        sigma: Noise left in each latent `[B]`; a noisier latent counts for `(1 - sigma) ** sigma_power`.
        keep: `[B]` of 0 or 1; 0 for samples whose latent was dropped. Blank targets do not count either.
        sigma_power: See `sigma`.
        luma_weight: Weight of the luma; that of each color is 1.
        softness: Where the distance turns from quadratic to linear.
    """
    predicted, low = predicted.float(), low.float()
    if low.shape[-2:] != predicted.shape[-2:]:
        low = F.interpolate(low, size=predicted.shape[-2:], mode="area")
    weight_B = (low.abs().flatten(1).mean(1) > _TINY).float()
    difference = to_ycbcr((predicted + 1) / 2) - to_ycbcr((low.clamp(-1, 1) + 1) / 2)
    difference = difference * difference.new_tensor([luma_weight, 1.0, 1.0]).view(1, 3, 1, 1)
    loss_B = (torch.sqrt(difference.square() + softness**2) - softness).flatten(1).mean(1)
    if keep is not None:
        weight_B = weight_B * (keep.float() > 0)
    if sigma is not None:
        weight_B = weight_B * (1 - sigma.float()).clamp(min=0) ** sigma_power
    return (loss_B * weight_B).sum() / weight_B.sum().clamp(min=_TINY)


def feature_alignment(projected: Tensor, reference: Tensor) -> Tensor:
    """One minus the mean cosine between projected network tokens and an encoder's, `[B, tokens, width]` (REPA).

    Where the counts differ, the larger of two square grids is resized (bilinear) to the smaller.

    Raises:
        SettingError: The counts differ and are not both square.
    """
    pair, counts = [projected.float(), reference.float()], [projected.shape[1], reference.shape[1]]
    if counts[0] != counts[1]:
        sides = [math.isqrt(count) for count in counts]
        if [side * side for side in sides] != counts:
            raise SettingError(
                f"{counts[0]} network tokens and {counts[1]} encoder tokens are not both square "
                "grids, so neither can be resized to the other; train on square images or switch this loss off."
            )
        larger, side = sides.index(max(sides)), max(sides)
        grid = pair[larger].transpose(1, 2).unflatten(2, (side, side))
        resized = F.interpolate(grid, size=min(sides), mode="bilinear", align_corners=False)
        pair[larger] = resized.flatten(2).transpose(1, 2)
    ours, theirs = (F.normalize(tokens, dim=-1) for tokens in pair)
    return 1 - F.cosine_similarity(ours, theirs, dim=2, eps=1e-5).mean()


def reconstruction(generated: Tensor, image: Tensor, *, edge_weight: float = 0.5) -> tuple[Tensor, dict[str, Tensor]]:
    """Charbonnier distance of images `[B, 3, H, W]` and of the differences of neighboring pixels; also both parts.

    The second part keeps a small network from blurring.
    """
    values = charbonnier(generated - image)
    along, across = (charbonnier(torch.diff(generated, dim=axis) - torch.diff(image, dim=axis)) for axis in (-2, -1))
    edges, mse = along + across, (generated.detach() - image).square().mean()
    return values + edge_weight * edges, {"image": values.detach(), "edges": edges.detach(), "mse": mse}


def charbonnier(difference: Tensor, softness: float = 1e-3) -> Tensor:
    """Mean of `sqrt(d^2 + softness^2) - softness`, a smooth L1."""
    return (torch.sqrt(difference.square() + softness**2) - softness).mean()


def discriminator_hinge(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Hinge loss of a discriminator: generated images below -1, real ones above 1 (https://arxiv.org/abs/1705.02894)."""
    return F.relu(1 + fake_logits).mean() + F.relu(1 - real_logits).mean()


def r1_penalty(real_logits: Tensor, real: Tensor) -> Tensor:
    """Squared gradient norm of the logits at real images `[B, ...]` (R1, https://arxiv.org/abs/1801.04406).

    Differentiable itself; `real` must require gradients.
    """
    (gradient,) = torch.autograd.grad(real_logits.float().sum(), real, create_graph=True)
    return gradient.float().square().flatten(1).sum(1).mean()


def encoder_input(image: Tensor, tokens: int) -> Tensor:
    """An image in [-1, 1] `[B, 3, H, W]`, normalized as DINOv2 expects and sized to show it `tokens` patches."""
    mean, std = (image.new_tensor(values).view(1, 3, 1, 1) for values in (_DINO_MEAN, _DINO_STD))
    ratio = math.sqrt(tokens * _DINO_PATCH**2 / (image.shape[-2] * image.shape[-1]))
    size = [round(side * ratio) for side in image.shape[-2:]]
    return F.interpolate(((image + 1) / 2 - mean) / std, size=size, mode="bicubic", align_corners=False)


class RepresentationAlignment(nn.Module):
    """Representation alignment with DINOv2 features (REPA, https://arxiv.org/abs/2410.06940).

    It holds the projector and the frozen encoder whose features the projector predicts.
    """

    def __init__(self, width: int, encoder: nn.Module, encoder_width: int) -> None:
        super().__init__()
        self.projector = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, encoder_width))
        # In a tuple, so that the frozen encoder is neither trained nor saved with us.
        self._encoder = (encoder.eval().requires_grad_(False),)

    def forward(self, features_BDhw: Tensor, image: Tensor) -> Tensor:
        """The loss for one tapped block's features and the clean image in [-1, 1]."""
        tokens = features_BDhw.flatten(2).transpose(1, 2).float()
        encoder = self._encoder[0].to(tokens.device)
        with torch.no_grad():
            seen = encoder(encoder_input(image.float(), tokens.shape[1]))
        reference = getattr(seen, "last_hidden_state", seen)[:, 1:]  # without the class token
        return feature_alignment(self.projector(tokens), reference)


def dinov2(folder: str | Path, width: int) -> RepresentationAlignment:
    """Alignment with the DINOv2 in `folder`: a transformers folder, or a hub name that is already downloaded."""
    try:
        from transformers import AutoModel
    except ImportError:
        raise MissingDependencyError(
            "Representation alignment needs transformers; install it with: pip install 'pidecode[text]'."
        ) from None
    encoder = AutoModel.from_pretrained(str(folder), local_files_only=True)
    return RepresentationAlignment(width, encoder, encoder.config.hidden_size)
