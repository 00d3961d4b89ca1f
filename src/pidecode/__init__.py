# SPDX-License-Identifier: Apache-2.0
"""PiD: decode diffusion latents straight to high-resolution images.

    import pidecode

    decoder = pidecode.PixelDecoder.from_pretrained("tiny")
    decoder.upscale("photo.jpg").save("large.png")

`import pidecode` loads neither torch nor any other large library; a public name is imported on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pidecode.version import __version__

if TYPE_CHECKING:
    from pidecode import errors
    from pidecode.decoder import PixelDecoder
    from pidecode.engine.machine import this_machine
    from pidecode.engine.plan import plan_decode
    from pidecode.errors import PidecodeError
    from pidecode.images.read import read_image
    from pidecode.images.write import DecodeOutput, read_metadata, save_image
    from pidecode.integrations.diffusers import attach
    from pidecode.integrations.modular import pid_blocks
    from pidecode.integrations.pipeline_latents import latent_from_pipeline
    from pidecode.latents.latent import Latent
    from pidecode.options import DecodeOptions, RuntimeOptions
    from pidecode.registry.checkpoints import list_checkpoints
    from pidecode.registry.spaces import list_spaces

__all__ = [
    "DecodeOptions", "DecodeOutput", "Latent", "PidecodeError", "PixelDecoder", "RuntimeOptions", "__version__",
    "attach", "errors", "latent_from_pipeline", "list_checkpoints", "list_spaces", "pid_blocks", "plan_decode",
    "read_image", "read_metadata", "save_image", "this_machine",
]  # fmt: skip

# Public name -> the module that defines it; the name of a module stands for the module.
_MODULES = {
    "DecodeOptions": "pidecode.options", "DecodeOutput": "pidecode.images.write", "Latent": "pidecode.latents.latent",
    "PidecodeError": "pidecode.errors", "PixelDecoder": "pidecode.decoder", "RuntimeOptions": "pidecode.options",
    "attach": "pidecode.integrations.diffusers", "errors": "pidecode.errors",
    "latent_from_pipeline": "pidecode.integrations.pipeline_latents",
    "list_checkpoints": "pidecode.registry.checkpoints", "list_spaces": "pidecode.registry.spaces",
    "pid_blocks": "pidecode.integrations.modular", "plan_decode": "pidecode.engine.plan",
    "read_image": "pidecode.images.read",
    "read_metadata": "pidecode.images.write", "save_image": "pidecode.images.write",
    "this_machine": "pidecode.engine.machine",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module 'pidecode' has no attribute {name!r}; it has {', '.join(__all__)}")
    module = import_module(_MODULES[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
