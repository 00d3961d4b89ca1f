# SPDX-License-Identifier: Apache-2.0
"""Latents: values, normalization, packing and files."""
