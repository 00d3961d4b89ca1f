# SPDX-License-Identifier: Apache-2.0
"""The parts of ComfyUI that the nodes use, by its published behavior."""
