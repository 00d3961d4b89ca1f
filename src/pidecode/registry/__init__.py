# SPDX-License-Identifier: Apache-2.0
"""Registry: network configurations, latent spaces, released checkpoints. Standard library only."""
