# SPDX-License-Identifier: Apache-2.0
"""PiD decoding in ComfyUI: the nodes themselves are in the package pidecode, which requirements.txt installs."""

from pidecode.integrations.comfyui import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
