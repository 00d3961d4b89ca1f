# SPDX-License-Identifier: Apache-2.0
"""Timestep embeddings and AdaLN modulation, precomputed for known times; stripping for inference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import SettingError

if TYPE_CHECKING:
    from pidecode.models.pid.network import PiDNet


@dataclass(frozen=True, slots=True)
class StepModulation:
    """One evaluation's share of time, float32; B may be 1 for a batch at one time.

    The six vectors of a stream are shift, factor, gate of its attention, then of its feed-forward;
    a factor is `(1 + scale)` times the norm's weight.
    """

    embedding: Tensor
    """`[B, 1, D]`"""
    image: tuple[Tensor, ...]
    """Per patch block `[B, 6, D]`."""
    text: tuple[Tensor, ...]
    """Per patch block `[B, 6, D]`, empty without a prompt stream."""


def _six(linear: nn.Module, condition_BD: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The six vectors of one stream in one block, its norms' weights merged into the factors."""
    vectors = linear(condition_BD).float().unflatten(-1, (6, -1))
    for index, weight in ((1, first), (4, second)):
        vectors[:, index] = (1 + vectors[:, index]) * weight.float()
    return vectors  # type: ignore[no-any-return]


def step_modulation(net: PiDNet, t_B: Tensor) -> StepModulation:
    """Evaluate everything that depends on time only. Raises SettingError if the network was stripped."""
    if net.stripped:
        raise SettingError(
            f"This network was stripped to its distilled times; it has no vectors for {t_B.tolist()}. "
            "Load it again without slimming to run it at other times."
        )
    embedding = net.t_embedder(t_B.reshape(-1))
    condition = F.silu(embedding)
    blocks: Any = net.patch_blocks
    return StepModulation(
        embedding=embedding.float().unsqueeze(1),
        image=tuple(_six(b.adaLN_modulation_img, condition, b.norm_x1.weight, b.norm_x2.weight) for b in blocks),
        text=tuple(
            _six(b.adaLN_modulation_txt, condition, b.norm_y1.weight, b.norm_y2.weight)
            for b in (blocks if net.config.has_text else ())
        ),
    )


@dataclass(frozen=True, slots=True)
class TimestepCache:
    """The vectors of a few known times, looked up instead of computed."""

    times: tuple[float, ...]
    """Flow times multiplied by 1000, as float32 holds them."""
    vectors: StepModulation
    """All times at once: the batch axis runs over `times`."""

    def find(self, t_B: Tensor) -> StepModulation | None:
        """Vectors of a batch's times, or None if one of them is not in the schedule.

        `t_B` on the host costs nothing to look up; one on a device has to be waited for.
        """
        try:
            rows = [self.times.index(t) for t in t_B.reshape(-1).tolist()]
        except ValueError:
            return None
        if len(set(rows)) == 1:
            rows = rows[:1]
        every = self.vectors
        return StepModulation(
            embedding=every.embedding[rows],
            image=tuple(vectors[rows] for vectors in every.image),
            text=tuple(vectors[rows] for vectors in every.text),
        )


@torch.no_grad()
def precompute(net: PiDNet, times: Sequence[float]) -> TimestepCache:
    """Vectors for flow times in [0, 1]; give the result to `PiDNet.denoise` through `Condition.schedule`."""
    t = torch.tensor(sorted(set(times)), dtype=torch.float32) * 1000.0
    return TimestepCache(times=tuple(t.tolist()), vectors=step_modulation(net, t))


def depends_on_noise(net: PiDNet) -> bool:
    """Whether the noisy image or the time can change what the network answers.

    They cannot where each of their ways in multiplies by zero, as in small networks of which only the adapter was
    trained: these give the same answer at every step, to the bit. Also True where the weights do not tell: without
    numbers, under adapters, and after `strip_for_inference`, which takes one of these ways out.
    """
    if net.stripped or net.plain or net.device.type == "meta":
        return True
    time: Any = net.t_embedder.mlp[-1]
    return any(bool(way.weight.any()) for way in (net.s_embedder.proj, net.pixel_embedder.proj, time))


def strip_for_inference(net: PiDNet) -> None:
    """Free, for inference at tabulated times, what such a network never reads again.

    Gone afterwards: the time embedder and the patch blocks' modulation matrices (28 % of all parameters, whose
    products `precompute` holds), the last block's prompt output, and the color head. The network can then neither be
    saved nor run at other times.
    """
    net.stripped = True
    net.t_embedder = nn.Identity()  # type: ignore[assignment]
    blocks: Any = net.patch_blocks
    for block in blocks:
        del block.adaLN_modulation_img
        if net.config.has_text:
            del block.adaLN_modulation_txt
    if net.config.has_text:
        last = blocks[-1]
        del last.attn.proj_y, last.attn.q_norm_y, last.norm_y2, last.mlp_y
    if net.config.has_adapter and net.config.color_head:
        del net.lq_proj.lq_aux_rgb_head
