# SPDX-License-Identifier: Apache-2.0
"""The network, in the order a latent walks it: adapter, patch blocks, pixel blocks, pixels."""
