# SPDX-License-Identifier: Apache-2.0
"""What is true of the world: architectures, latent spaces, checkpoints and sizes, as frozen data."""
