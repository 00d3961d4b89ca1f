# SPDX-License-Identifier: Apache-2.0
"""What sampling does to a latent on its way in and out: flow matching, and the older noise prediction."""

from __future__ import annotations

from torch import Tensor


class CONST:
    """Flow matching: what is left at sigma is divided by (1 - sigma) on the way out."""

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
