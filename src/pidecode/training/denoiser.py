# SPDX-License-Identifier: Apache-2.0
"""One evaluation of a network in training, as one module call: what DDP, FSDP2 and sequence parallelism wrap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from pidecode.models.pid.network import Condition, PiDNet
from pidecode.sampling import TIMESCALE, clean_from_velocity, velocity_from_clean


class Evaluation(NamedTuple):
    """What one evaluation gave; empty where it was not asked for."""

    prediction: Tensor | None
    """The network's output `[B, 3, H, W]`: velocity or clean image, as its configuration says."""
    color: Tensor | None
    """The low-resolution image of the color head."""
    features: list[Tensor]
    """Image stream after the tapped patch blocks, each `[B, D, h, w]`."""


class Slice(Protocol):
    """How one image is spread over processes: each has a band of whole patch rows."""

    def condition(self, condition: Condition) -> Condition:
        """This process's part of what the steps share."""
        ...

    def rows(self, image: Tensor) -> Tensor:
        """This process's band of an image `[B, 3, H, W]`."""
        ...

    def join(self, band: Tensor) -> Tensor:
        """All bands together, along rows (the last axis but one)."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One batch as the losses see it; latents are already noised."""

    image: Tensor
    """`[B, 3, H, W]` in [-1, 1]."""
    low: Tensor | None = None
    """The low-resolution image `[B, 3, h, w]` in [-1, 1]."""
    text: Tensor | None = None
    """Caption states `[B, N, width]`."""
    null_text: Tensor | None = None
    """States of the caption that guidance leads away from, `[1 or B, N, width]`."""
    latent: Tensor | None = None
    sigma: Tensor | None = None
    keep: Tensor | None = None
    """`[B]` of 0 or 1: 0 where the latent was dropped (zeroed)."""

    def without_caption(self) -> Example:
        """The same with the null caption in place of every caption."""
        if self.null_text is None:
            return self
        return replace(self, text=self.null_text.expand(self.image.shape[0], -1, -1))


class Evaluator(nn.Module):
    """A PiDNet behind one call.

    Everything the loss needs leaves through `forward`, so wrappers that act on a module's call see all of it.
    """

    def __init__(self, net: PiDNet) -> None:
        super().__init__()
        self.net = net
        self.slice: Slice | None = None

    def forward(
        self,
        x_t: Tensor,
        t_B: Tensor,
        example: Example,
        *,
        taps: tuple[int, ...] = (),
        predict: bool = True,
        want_color: bool = False,
    ) -> Evaluation:
        """Evaluate at flow time `t_B` in (0, 1), with `example`'s caption and latent."""
        net = self.net
        text = example.text if net.config.has_text else None
        condition = net.prepare(
            net.grid_of(*x_t.shape[-2:]), text, example.latent, example.sigma, want_color=want_color
        )
        color = condition.color
        x_t = x_t.float()
        if self.slice is not None:
            condition, x_t = self.slice.condition(condition), self.slice.rows(x_t)
        t_B = t_B.float() * TIMESCALE
        if taps:
            features, prediction = net.features(x_t, t_B, condition, taps, predict=predict)
        else:
            features, prediction = [], net.denoise(x_t, t_B, condition)
        if self.slice is not None:
            features = [self.slice.join(tap) for tap in features]
            prediction = None if prediction is None else self.slice.join(prediction)
        return Evaluation(prediction, color, features)


def net_of(evaluator: nn.Module) -> PiDNet:
    """The network inside an Evaluator, however wrapped."""
    inner = getattr(evaluator, "module", evaluator)
    net = inner.net
    assert isinstance(net, PiDNet)
    return net


def clean_of(evaluator: nn.Module, prediction: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
    """The clean image a prediction stands for."""
    if net_of(evaluator).config.prediction == "x0":
        return prediction.float()
    return clean_from_velocity(x_t, prediction.float(), t_B)


def velocity_of(evaluator: nn.Module, prediction: Tensor, x_t: Tensor, t_B: Tensor) -> Tensor:
    """The velocity a prediction stands for."""
    if net_of(evaluator).config.prediction == "x0":
        return velocity_from_clean(x_t, prediction.float(), t_B)
    return prediction.float()


@torch.no_grad()
def guide(
    evaluator: nn.Module, captioned: Tensor, x_t: Tensor, t_B: Tensor, example: Example, guidance: float
) -> Tensor:
    """`u + g (c - u)` from a captioned prediction; the latent stays in both. Without a text stream there is no u."""
    if guidance == 1.0 or not net_of(evaluator).config.has_text:
        return captioned.detach()
    uncaptioned = evaluator(x_t, t_B, example.without_caption()).prediction
    guided: Tensor = uncaptioned + guidance * (captioned.detach() - uncaptioned)
    return guided
