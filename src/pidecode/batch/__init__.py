# SPDX-License-Identifier: Apache-2.0
"""Batch processing: folders of latents and images, resumable, on one device or many."""
