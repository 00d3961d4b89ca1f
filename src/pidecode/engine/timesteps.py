# SPDX-License-Identifier: Apache-2.0
"""Timestep embeddings and AdaLN modulation: evaluated per step, precomputed for known times, stripped for inference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import SettingError
from pidecode.models.pid.network import PiDNet


@dataclass(frozen=True, slots=True)
class StepModulation:
    """Everything an evaluation derives from time alone, float32; B may be 1 for a batch at one time.

    The six vectors of a stream are shift, factor and gate of its attention, then of its feed-forward;
    a factor is `(1 + scale)` times the norm's weight.
    """

    embedding: Tensor  # `[B, 1, D]`
    image: tuple[Tensor, ...]  # per patch block `[B, 6, D]`
    text: tuple[Tensor, ...]  # per patch block `[B, 6, D]`, empty without a text stream

    def map(self, change: Callable[[Tensor], Tensor]) -> StepModulation:
        """The same with every tensor changed."""
        return StepModulation(change(self.embedding), tuple(map(change, self.image)), tuple(map(change, self.text)))


def _six_vectors(linear: nn.Module, condition_BD: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The six vectors `[B, 6, D]` of one stream in one block, its norms' weights merged into the factors."""
    vectors = linear(condition_BD).float().unflatten(-1, (6, -1))
    for index, weight in ((1, first), (4, second)):
        vectors[:, index] = (1 + vectors[:, index]) * weight.float()
    return vectors  # type: ignore[no-any-return]


def step_modulation(net: PiDNet, t_B: Tensor) -> StepModulation:
    """Evaluate the timestep embedder and every patch block's AdaLN modulation at flow times `[B]` times 1000.

    Raises:
        SettingError: The network was stripped for inference.
    """
    if is_stripped(net):
        raise SettingError(
            f"This network was stripped for inference at its distilled times; it has no modulation for {t_B.tolist()}. "
            "Load it again to run it at other times."
        )
    embedding, blocks = net.t_embedder(t_B.reshape(-1)), cast(Any, net.patch_blocks)
    with_text, t = blocks if net.config.has_text else (), F.silu(embedding)
    return StepModulation(
        embedding=embedding.float().unsqueeze(1),
        image=tuple(_six_vectors(b.adaLN_modulation_img, t, b.norm_x1.weight, b.norm_x2.weight) for b in blocks),
        text=tuple(_six_vectors(b.adaLN_modulation_txt, t, b.norm_y1.weight, b.norm_y2.weight) for b in with_text),
    )


@dataclass(frozen=True, slots=True)
class TimestepCache:
    """Precomputed modulation of a few known times."""

    times: tuple[float, ...]  # flow times multiplied by 1000, as float32 holds them
    modulation: StepModulation  # all times at once: the batch axis runs over `times`

    def to(self, device: torch.device | str) -> TimestepCache:
        """The same on another device."""
        return TimestepCache(self.times, self.modulation.map(lambda vectors: vectors.to(device)))

    def find(self, t_B: Tensor) -> StepModulation | None:
        """Modulation at flow times `[B]` times 1000, or None if one of them was not precomputed.

        On the CPU the look-up is free; on a device it synchronizes.
        """
        try:
            rows = [self.times.index(t) for t in t_B.reshape(-1).tolist()]
        except ValueError:
            return None
        if len(set(rows)) == 1:
            rows = rows[:1]

        def cut(vectors: Tensor) -> Tensor:
            # Slices, which are views: indexing with a list would wait for the device to read it.
            each = [vectors[row : row + 1] for row in rows]
            return each[0] if len(each) == 1 else torch.cat(each)

        return self.modulation.map(cut)


@torch.no_grad()
def precompute(net: PiDNet, times: Sequence[float]) -> TimestepCache:
    """The modulation of flow times in [0, 1]."""
    t = torch.tensor(sorted(set(times)), dtype=torch.float32) * 1000.0
    return TimestepCache(times=tuple(t.tolist()), modulation=step_modulation(net, t))


def is_stripped(net: PiDNet) -> bool:
    """Whether `strip_for_inference` was applied."""
    return isinstance(net.t_embedder, nn.Identity)


def strip_for_inference(net: PiDNet) -> None:
    """Free the weights that inference at precomputed times never reads.

    Removed are the timestep embedder and the patch blocks' modulation matrices (28 % of all parameters, whose
    products `precompute` holds), the last block's prompt output, and the color head. The network can then neither be
    saved nor run at other times.
    """
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
