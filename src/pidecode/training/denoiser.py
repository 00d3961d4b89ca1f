# SPDX-License-Identifier: Apache-2.0
"""One output of a network in training, as one module call: what DDP, FSDP2 and sequence parallelism wrap."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pidecode.errors import SettingError
from pidecode.models.pid.blocks import JointAttention, PixelAttention
from pidecode.models.pid.network import Condition, PiDNet
from pidecode.sampling import TIMESCALE, clean_from_velocity, velocity_from_clean


class DenoiserOutput(NamedTuple):
    """What one output gave; empty where it was not asked for."""

    prediction: Tensor | None  # the network's output `[B, 3, H, W]`: velocity or clean image, as its configuration says
    color: Tensor | None  # the low-resolution image of the color head
    features: list[Tensor]  # image stream after the tapped patch blocks, each `[B, D, h, w]`


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


class _GatherRows(torch.autograd.Function):
    """All-gather along `dim` over a group; the backward pass sums the gradients of all uses of a shard."""

    @staticmethod
    def forward(ctx: Any, shard: Tensor, dim: int, group: Any) -> Tensor:
        ctx.dim, ctx.group, ctx.length = dim, group, shard.shape[dim]
        parts = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, shard.contiguous(), group=group)
        return torch.cat(parts, dim=dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        total = gradients[0].contiguous()
        dist.all_reduce(total, group=ctx.group)
        start = dist.get_rank(ctx.group) * ctx.length
        return total.narrow(ctx.dim, start, ctx.length), None, None


def gather_rows(shard: Tensor, dim: int, group: Any) -> Tensor:
    """Shards of all processes of a group, concatenated along `dim`, differentiable."""
    joined: Tensor = _GatherRows.apply(shard, dim, group)  # type: ignore[no-untyped-call]
    return joined


class RowSharding:
    """An image in shards of whole patch rows, one per process of a group."""

    def __init__(self, rank: int, count: int, group: Any) -> None:
        self._rank, self._count, self.group = rank, count, group

    def _span(self, rows: int, what: str) -> slice:
        share, rest = divmod(rows, self._count)
        if rest:
            raise SettingError(
                f"{rows} {what} rows do not divide over parallel.context_parallel={self._count} processes; "
                "change data.sizes."
            )
        return slice(self._rank * share, (self._rank + 1) * share)

    def condition(self, condition: Condition) -> Condition:
        """This process's tokens, positions and injections."""
        rows, columns = condition.grid
        return condition.crop(self._span(rows, "patch"), slice(0, columns))

    def rows(self, image: Tensor) -> Tensor:
        """This process's rows of `[B, 3, H, W]`."""
        return image[..., self._span(image.shape[-2], "pixel"), :]


class Denoiser(nn.Module):
    """A PiDNet as one module call.

    Everything the loss needs leaves through `forward`, so wrappers that act on a module's call see all of it.
    """

    def __init__(self, net: PiDNet) -> None:
        super().__init__()
        self.net = net
        self.sharding: RowSharding | None = None

    def shard(self, sharding: RowSharding) -> None:
        """Evaluate one shard of an image; every attention of the network sees the keys and values of all shards."""
        self.sharding = sharding
        for module in self.modules():
            if isinstance(module, (JointAttention, PixelAttention)):
                module.gather = functools.partial(gather_rows, dim=1, group=sharding.group)

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
        x_t, color = x_t.float(), condition.color
        if self.sharding is not None:
            condition, x_t = self.sharding.condition(condition), self.sharding.rows(x_t)
        t_B = t_B.float() * TIMESCALE
        if taps:
            features, prediction = net.features(x_t, t_B, condition, taps, predict=predict)
        else:
            features, prediction = [], net.denoise(x_t, t_B, condition)
        if self.sharding is not None:
            features = [gather_rows(tap, 2, self.sharding.group) for tap in features]
            prediction = None if prediction is None else gather_rows(prediction, 2, self.sharding.group)
        return DenoiserOutput(prediction, color, features)


def pid_net(denoiser: nn.Module) -> PiDNet:
    """The network inside a Denoiser, however wrapped."""
    net = getattr(denoiser, "module", denoiser).net
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
