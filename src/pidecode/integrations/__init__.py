# SPDX-License-Identifier: Apache-2.0
"""Integrations: diffusers pipelines, text to image with them, and ComfyUI nodes."""
