# SPDX-License-Identifier: Apache-2.0
"""Loss of teachers and text-to-image backbones: flow matching (https://arxiv.org/abs/2210.02747), color, alignment."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pidecode.sampling import shifted
from pidecode.training.config import TeacherLossConfig
from pidecode.training.denoiser import TrainBatch, pid_net, to_clean, to_velocity
from pidecode.training.losses import color_alignment, flow_matching
from pidecode.training.noise import RNG, logit_normal_times, mix


@dataclass(frozen=True, slots=True)
class LossOutput:
    """A loss to differentiate, and its parts to report."""

    loss: Tensor
    parts: dict[str, Tensor]


def teacher_loss(
    net: nn.Module, batch: TrainBatch, rng: RNG, config: TeacherLossConfig, alignment: nn.Module | None = None
) -> LossOutput:
    """Loss of one step of `net`, a `Denoiser`: velocity at a random time, whatever the network's own output is.

    `config` may add the color loss, and the loss of `alignment`, a `RepresentationAlignment`.
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
