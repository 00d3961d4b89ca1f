# SPDX-License-Identifier: Apache-2.0
"""The PiD network: latent adapter, patch blocks and pixel blocks."""
