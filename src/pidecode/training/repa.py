# SPDX-License-Identifier: Apache-2.0
"""Representation alignment with DINOv2 features (REPA, https://arxiv.org/abs/2410.06940), an optional loss."""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import MissingDependencyError
from pidecode.training.losses import feature_alignment

DINO_PATCH = 14
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def encoder_input(image: Tensor, tokens: int) -> Tensor:
    """An image in [-1, 1] `[B, 3, H, W]`, normalized as DINOv2 expects and sized to show it `tokens` patches."""
    mean = image.new_tensor(_MEAN).view(1, 3, 1, 1)
    std = image.new_tensor(_STD).view(1, 3, 1, 1)
    ratio = math.sqrt(tokens * DINO_PATCH**2 / (image.shape[-2] * image.shape[-1]))
    size = [round(side * ratio) for side in image.shape[-2:]]
    return F.interpolate(((image + 1) / 2 - mean) / std, size=size, mode="bicubic", align_corners=False)


def projector(width: int, encoder_width: int, layers: int = 2) -> nn.Sequential:
    """Projection of tokens to the encoder's width: Linear, SiLU, ..., Linear."""
    parts: list[nn.Module] = []
    for _ in range(layers - 1):
        parts += [nn.Linear(width, width), nn.SiLU()]
    return nn.Sequential(*parts, nn.Linear(width, encoder_width))


class RepresentationAlignment(nn.Module):
    """The projector and the frozen encoder whose features it predicts."""

    def __init__(self, width: int, encoder: nn.Module, encoder_width: int) -> None:
        super().__init__()
        self.projector = projector(width, encoder_width)
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
    """Alignment with the DINOv2 in `folder`: a transformers folder, or a hub name that is already downloaded.

    Raises:
        MissingDependencyError: transformers is not installed.
    """
    try:
        from transformers import AutoModel
    except ImportError:
        raise MissingDependencyError(
            "Representation alignment needs transformers; install it with: pip install 'pidecode[text]'."
        ) from None
    encoder = AutoModel.from_pretrained(str(folder), local_files_only=True)
    return RepresentationAlignment(width, encoder, encoder.config.hidden_size)
