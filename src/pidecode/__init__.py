# SPDX-License-Identifier: Apache-2.0
"""From a diffusion model's latent straight to an image: the front door, which loads each room when it is asked for.

    import pidecode

    decoder = pidecode.PixelDecoder.from_pretrained("tiny")
    image = decoder.upscale("photo.jpg")

`import pidecode` alone loads neither torch nor anything else that is heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pidecode.version import __version__

if TYPE_CHECKING:
    from pidecode import errors
    from pidecode.decoder import PixelDecoder
    from pidecode.errors import PidecodeError
    from pidecode.integrations.diffusers import attach, detach
    from pidecode.latents.latent import Latent

__all__ = ["Latent", "PidecodeError", "PixelDecoder", "__version__", "attach", "detach", "errors"]

# Public name -> the module it lives in; the name of a module itself stands for that module.
_HOMES = {
    "Latent": "pidecode.latents.latent",
    "PidecodeError": "pidecode.errors",
    "PixelDecoder": "pidecode.decoder",
    "attach": "pidecode.integrations.diffusers",
    "detach": "pidecode.integrations.diffusers",
    "errors": "pidecode.errors",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'pidecode' has no attribute {name!r}; it offers {', '.join(__all__)}")
    home = import_module(_HOMES[name])
    value = home if home.__name__ == f"{__name__}.{name}" else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
