# SPDX-License-Identifier: Apache-2.0
"""Latent tokens recomputed where they are used, instead of kept for all injection points and steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn

from pidecode.models.pid.adapter import Gate, Injection, masked
from pidecode.models.pid.network import Condition, Grid, PiDNet


@dataclass(frozen=True, slots=True)
class RecomputedInjection:
    """An injection computed from the adapter's shared features each time it is read.

    A head and a gate cost a hundredth of a step; their output fills 50 MB per injection point for 2048 x 2048 pixels.
    """

    features: Tensor
    """`[B, L, adapter width]`"""
    head: nn.Module
    gate: Gate
    sigma: Tensor
    """`[B or 1]`"""
    mask: Tensor | None
    """`[B or 1]` of 0 or 1."""

    @property
    def tokens(self) -> Tensor:
        """Tokens `[B, L, D]`."""
        return masked(self.head(self.features), self.mask)

    @property
    def gate_logits(self) -> Tensor:
        """Gate logits `[B, L, D or 1]`."""
        return self.gate.latent_logits(self.tokens, self.sigma)

    def crop(self, patches: Tensor) -> RecomputedInjection:
        """The same for some patches only, given as indices."""
        return replace(self, features=self.features[:, patches])


def chunk_of(injection: Injection, sample: int, part: slice) -> tuple[Tensor, Tensor]:
    """Tokens `[T, D]` and gate logits `[T, D or 1]` of some of one sample's patches, computing no others."""
    if not isinstance(injection, RecomputedInjection):
        return injection.tokens[sample, part], injection.gate_logits[sample, part]
    one = slice(sample, sample + 1)
    sigma = injection.sigma if len(injection.sigma) == 1 else injection.sigma[one]
    mask = injection.mask if injection.mask is None or len(injection.mask) == 1 else injection.mask[one]
    tokens = masked(injection.head(injection.features[one, part]), mask)
    return tokens[0], injection.gate.latent_logits(tokens, sigma)[0]


def prepare_recomputed(
    net: PiDNet,
    grid: Grid,
    text: Tensor | None,
    latent: Tensor,
    sigma: Tensor | float | None,
    *,
    latent_mask: Tensor | None = None,
) -> Condition:
    """`PiDNet.prepare` with injections that are recomputed at each use: only the adapter's features are kept.

    Arguments and errors are those of `PiDNet.prepare`.
    """
    sigma_B = net.check_latent(latent, sigma)
    features = net.lq_proj.features(grid, latent)[0].flatten(2).transpose(1, 2)

    def injection(head: nn.Module, gate: nn.Module) -> RecomputedInjection:
        return RecomputedInjection(features, head, cast(Gate, gate), sigma_B, latent_mask)

    return replace(
        net.prepare(grid, text),
        injections=tuple(map(injection, net.lq_proj.output_heads, net.lq_proj.gate_modules)),
        pixel_injection=injection(net.lq_proj.pit_head, net.pit_lq_gate) if net.config.inject_pixels else None,
    )
