# SPDX-License-Identifier: Apache-2.0
"""As much of ComfyUI as the nodes touch, by its published behavior; the real one takes its place if it is here."""
