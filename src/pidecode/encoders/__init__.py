# SPDX-License-Identifier: Apache-2.0
"""Encoders: image to latent, prompt to text states."""
