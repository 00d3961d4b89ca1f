# SPDX-License-Identifier: Apache-2.0
"""Doors into other people's programs: diffusers pipelines, and generating images with them."""
