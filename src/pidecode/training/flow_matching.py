# SPDX-License-Identifier: Apache-2.0
"""Loss of teachers and text-to-image backbones: flow matching (https://arxiv.org/abs/2210.02747), color, alignment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pidecode.errors import SettingError
from pidecode.registry.checkpoints import FlowShift
from pidecode.sampling import shifted
from pidecode.training.denoiser import TrainBatch, pid_net, to_clean, to_velocity
from pidecode.training.losses import color_alignment, flow_matching
from pidecode.training.noise import RNG, logit_normal_times, mix


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherLossConfig:
    """Loss of a teacher or backbone."""

    shift: float = 6.0
    """Flow shift: moves training times toward noise, as large images need."""
    shift_base_size: int | None = 2048
    """Side in pixels at which `shift` holds; it grows with the square root of the area. None: constant."""
    color_weight: float = 0.8
    """Weight of the color loss; acts only on networks with a color head."""
    repa_weight: float = 0.0
    """Weight of representation alignment (REPA); needs `repa_encoder`."""
    repa_block: int = 6
    """Patch block whose tokens are aligned."""
    repa_encoder: str = ""
    """Folder of the DINOv2 encoder."""

    def __post_init__(self) -> None:
        if self.shift <= 0:
            raise SettingError(f"The flow shift is {self.shift}; it must be positive.")
        if self.repa_weight and not self.repa_encoder:
            raise SettingError("repa_weight is set but repa_encoder is not; name the folder of a DINOv2.")

    @property
    def flow_shift(self) -> FlowShift:
        """The shift as a rule of the image's size."""
        return FlowShift(base=self.shift, size=self.shift_base_size)


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A loss to differentiate, and its parts to report."""

    loss: Tensor
    parts: dict[str, Tensor]


def teacher_loss(
    net: nn.Module, batch: TrainBatch, rng: RNG, config: TeacherLossConfig, alignment: nn.Module | None = None
) -> LossOutput:
    """One step's loss: random time, noisy image, velocity error, and what `settings` add.

    The loss is on the velocity whatever the network's own output is.

    Args:
        net: A `Denoiser`, possibly wrapped.
        batch: Images `[B, 3, H, W]` in [-1, 1] with their conditioning.
        rng: Random numbers of the step.
        config: Weights and flow shift.
        alignment: A `RepresentationAlignment`, or None.
    """
    image = batch.image.float()
    height, width = image.shape[-2:]
    t_B = shifted(logit_normal_times(rng), config.flow_shift.at(height, width))
    noise = rng.normal(tuple(image.shape[1:]))
    x_t = mix(image, noise, t_B)
    net_config = pid_net(net).config
    want_color = config.color_weight > 0 and net_config.color_head and batch.low is not None
    taps = (min(config.repa_block, net_config.patch_depth - 1),) if alignment is not None else ()
    output = net(x_t, t_B, batch, taps=taps, want_color=want_color)
    loss = flow_matching(to_velocity(net, output.prediction, x_t, t_B), image, noise)
    parts = {"flow": loss.detach()}
    if want_color and batch.low is not None:
        color = color_alignment(output.color, batch.low, batch.sigma, batch.keep)
        parts["color"] = color.detach()
        loss = loss + config.color_weight * color
    if alignment is not None:
        aligned = alignment(output.features[0], image)
        parts["alignment"] = aligned.detach()
        loss = loss + config.repa_weight * aligned
    with torch.no_grad():
        clean = to_clean(net, output.prediction, x_t, t_B)
        parts["mse"] = (clean - image).square().mean()
    return LossOutput(loss, parts)
