# SPDX-License-Identifier: Apache-2.0
"""Tables of what is known beforehand: network configs, latent spaces, released checkpoints. Standard library only."""
