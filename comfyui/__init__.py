# SPDX-License-Identifier: Apache-2.0
"""PiD decoding in ComfyUI: the nodes themselves are in the package pidecode, which requirements.txt installs."""

from importlib.util import find_spec

if find_spec("pidecode") is None:
    raise ImportError(
        "The package pidecode is not installed in ComfyUI's Python. Run `python -m pip install -r requirements.txt` "
        "in this folder with that Python, and start ComfyUI again."
    )

from pidecode.integrations.comfyui import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
