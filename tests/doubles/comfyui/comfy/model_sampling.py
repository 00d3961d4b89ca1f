# SPDX-License-Identifier: Apache-2.0
"""How a latent is scaled when sampling begins and ends: flow matching, and noise prediction."""

from __future__ import annotations

from torch import Tensor


class CONST:
    """Flow matching: a latent at sigma is divided by (1 - sigma) when sampling ends."""

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        return sigma.view(-1, 1, 1, 1) * noise + (1 - sigma.view(-1, 1, 1, 1)) * latent

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent / (1 - sigma.view(-1, 1, 1, 1))


class EPS:
    """Noise prediction: noise is added on top."""

    def noise_scaling(self, sigma: Tensor, noise: Tensor, latent: Tensor, max_denoise: bool = False) -> Tensor:
        return noise * sigma.view(-1, 1, 1, 1) + latent

    def inverse_noise_scaling(self, sigma: Tensor, latent: Tensor) -> Tensor:
        return latent
