# SPDX-License-Identifier: Apache-2.0
"""The teacher's training step, which is also the text-to-image backbone's: flow matching, color, alignment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pidecode.errors import SettingError
from pidecode.registry.checkpoints import FlowShift
from pidecode.sampling import shifted
from pidecode.training.denoiser import Example, clean_of, net_of, velocity_of
from pidecode.training.losses import color_alignment, flow_matching
from pidecode.training.noise import Draws, logit_normal_times, mix


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLoss:
    """What a teacher or backbone pays for."""

    shift: float = 6.0
    """Flow shift: moves training times toward noise, as large images need."""
    shift_base_size: int | None = 2048
    """Side in pixels at which `shift` holds; other sizes follow the square root of theirs. None: constant."""
    color_weight: float = 0.8
    """Weight of the color loss; acts only on networks with a color head."""
    align_weight: float = 0.0
    """Weight of the alignment with DINOv2; needs `align_with`."""
    align_block: int = 6
    """Patch block whose tokens are aligned."""
    align_with: str = ""
    """Folder of the DINOv2 to align with."""

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise SettingError(f"The flow shift is {self.shift}; it must be positive.")
        if self.align_weight and not self.align_with:
            raise SettingError("align_weight is set but align_with is not; name the folder of a DINOv2.")

    @property
    def flow_shift(self) -> FlowShift:
        """The shift as a rule of the image's size."""
        return FlowShift(base=self.shift, size=self.shift_base_size)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A step's loss to differentiate, and its parts to report."""

    loss: Tensor
    parts: dict[str, Tensor]


def teacher_loss(
    net: nn.Module, example: Example, draws: Draws, settings: TeacherLoss, alignment: nn.Module | None = None
) -> Outcome:
    """One step's loss: random time, noisy image, velocity error, and what `settings` add.

    The prediction is judged as a velocity whatever the network's own output is.
    alignment: a `repa.Alignment`, where tokens are held against DINOv2's.
    """
    image = example.image.float()
    height, width = image.shape[-2:]
    t_B = shifted(logit_normal_times(draws), settings.flow_shift.at(height, width))
    noise = draws.normal(tuple(image.shape[1:]))
    x_t = mix(image, noise, t_B)
    config = net_of(net).config
    want_color = settings.color_weight > 0 and config.color_head and example.low is not None
    taps = (min(settings.align_block, config.patch_depth - 1),) if alignment is not None else ()
    evaluation = net(x_t, t_B, example, taps=taps, want_color=want_color)
    loss = flow_matching(velocity_of(net, evaluation.prediction, x_t, t_B), image, noise)
    parts = {"flow": loss.detach()}
    if want_color and example.low is not None:
        color = color_alignment(evaluation.color, example.low, example.sigma, example.keep)
        parts["color"] = color.detach()
        loss = loss + settings.color_weight * color
    if alignment is not None:
        aligned = alignment(evaluation.features[0], image)
        parts["alignment"] = aligned.detach()
        loss = loss + settings.align_weight * aligned
    with torch.no_grad():
        clean = clean_of(net, evaluation.prediction, x_t, t_B)
        parts["clean_error"] = (clean - image).square().mean()
    return Outcome(loss, parts)
