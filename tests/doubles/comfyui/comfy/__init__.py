# SPDX-License-Identifier: Apache-2.0
"""As much of ComfyUI as the nodes touch, by its published behaviour; the real one takes its place if it is here."""
