# SPDX-License-Identifier: Apache-2.0
"""One output of a network in training, as one module call: what DDP, FSDP2 and sequence parallelism wrap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pidecode.models.pid.network import Condition, PiDNet
from pidecode.sampling import TIMESCALE, clean_from_velocity, velocity_from_clean


class DenoiserOutput(NamedTuple):
    """What one output gave; empty where it was not asked for."""

    prediction: Tensor | None  # the network's output `[B, 3, H, W]`: velocity or clean image, as its configuration says
    color: Tensor | None  # the low-resolution image of the color head
    features: list[Tensor]  # image stream after the tapped patch blocks, each `[B, D, h, w]`


class ImageSharding(Protocol):
    """How one image is sharded over processes: each has a range of whole patch rows."""

    def condition(self, condition: Condition) -> Condition:
        """This process's part of the conditioning."""

    def rows(self, image: Tensor) -> Tensor:
        """This process's rows of an image `[B, 3, H, W]`."""

    def gather(self, shard: Tensor) -> Tensor:
        """All shards, concatenated along rows (the last axis but one)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainBatch:
    """One batch for the losses; latents are already noised."""

    image: Tensor  # `[B, 3, H, W]` in [-1, 1]
    low: Tensor | None = None  # the low-resolution image `[B, 3, h, w]` in [-1, 1]
    text: Tensor | None = None  # caption states `[B, N, width]`
    null_text: Tensor | None = None  # states of the negative prompt, `[1 or B, N, width]`
    latent: Tensor | None = None
    sigma: Tensor | None = None
    keep: Tensor | None = None  # `[B]` of 0 or 1: 0 where the latent was dropped (zeroed)

    def with_null_text(self) -> TrainBatch:
        """The same batch with the negative prompt in place of every caption."""
        if self.null_text is None:
            return self
        return replace(self, text=self.null_text.expand(self.image.shape[0], -1, -1))


class Denoiser(nn.Module):
    """A PiDNet as one module call.

    Everything the loss needs leaves through `forward`, so wrappers that act on a module's call see all of it.
    """

    def __init__(self, net: PiDNet) -> None:
        super().__init__()
        self.net = net
        self.sharding: ImageSharding | None = None

    def forward(
        self,
        x_t: Tensor,
        t_B: Tensor,
        batch: TrainBatch,
        *,
        taps: tuple[int, ...] = (),
        predict: bool = True,
        want_color: bool = False,
    ) -> DenoiserOutput:
        """Evaluate at flow time `t_B` in (0, 1), with `batch`'s caption and latent."""
        net = self.net
        text = batch.text if net.config.has_text else None
        condition = net.prepare(net.grid_of(*x_t.shape[-2:]), text, batch.latent, batch.sigma, want_color=want_color)
        color = condition.color
        x_t = x_t.float()
        if self.sharding is not None:
            condition, x_t = self.sharding.condition(condition), self.sharding.rows(x_t)
        t_B = t_B.float() * TIMESCALE
        if taps:
            features, prediction = net.features(x_t, t_B, condition, taps, predict=predict)
        else:
            features, prediction = [], net.denoise(x_t, t_B, condition)
        if self.sharding is not None:
            features = [self.sharding.gather(tap) for tap in features]
            prediction = None if prediction is None else self.sharding.gather(prediction)
        return DenoiserOutput(prediction, color, features)


def pid_net(denoiser: nn.Module) -> PiDNet:
    """The network inside a Denoiser, however wrapped."""
    inner = getattr(denoiser, "module", denoiser)
    net = inner.net
    assert isinstance(net, PiDNet)
    return net


def to_clean(denoiser: nn.Module, prediction: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
    """The clean image a prediction stands for."""
    if pid_net(denoiser).config.prediction == "x0":
        return prediction.float()
    return clean_from_velocity(x_t, prediction.float(), t_B)


def to_velocity(denoiser: nn.Module, prediction: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
    """The velocity a prediction stands for."""
    if pid_net(denoiser).config.prediction == "x0":
        return velocity_from_clean(x_t, prediction.float(), t_B)
    return prediction.float()


@torch.no_grad()
def apply_guidance(
    denoiser: nn.Module, conditional: Tensor, x_t: Tensor, t_B: Tensor, batch: TrainBatch, guidance_scale: float
) -> Tensor:
    """Classifier-free guidance `u + g (c - u)` from a conditional prediction; the latent stays in both.

    Networks without a text stream have no unconditional prediction: theirs is returned as it is.
    (https://arxiv.org/abs/2207.12598)
    """
    if guidance_scale == 1.0 or not pid_net(denoiser).config.has_text:
        return conditional.detach()
    unconditional = denoiser(x_t, t_B, batch.with_null_text()).prediction
    guided: Tensor = unconditional + guidance_scale * (conditional.detach() - unconditional)
    return guided
