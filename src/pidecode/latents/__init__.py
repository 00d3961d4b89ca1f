# SPDX-License-Identifier: Apache-2.0
"""Latents: their values, frames and packings, and the encoders that make them from images."""
