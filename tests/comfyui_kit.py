# SPDX-License-Identifier: Apache-2.0
"""ComfyUI's modules for tests, and small decoders, models and latents.

With PIDECODE_COMFYUI=/path/to/ComfyUI the real comfy and comfy_api are used, else doubles of what they publish.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from pidecode import PixelDecoder
from pidecode.integrations import comfyui_latents
from pidecode.latents.latent import Latent
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import PiDConfig, debug_config
from pidecode.registry.spaces import SPACES
from pidecode.weights.metadata import CheckpointMetadata

COMFY = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "server")
ROOT = Path(__file__).resolve().parents[1]
FLUX2 = debug_config(text_dim=0, latent_channels=128, latent_down=16, latent_unpatchify=2, prediction="x0")
EVERY = ("flux", "sd3", "sdxl", "qwenimage", "flux2")
SAMPLING = {space: "EPS" if space == "sdxl" else "CONST" for space in EVERY}
CONFIG = {"flux": "Flux", "sd3": "SD3", "sdxl": "SDXL", "qwenimage": "QwenImage", "flux2": "Flux2"}
"""Class of each model's configuration in ComfyUI's supported_models."""
FORMAT = {space: name for name, space in comfyui_latents.SPACE_BY_FORMAT.items()}

needs_real = pytest.mark.skipif("PIDECODE_COMFYUI" not in os.environ, reason="compares with ComfyUI's own PiD")
needs_double = pytest.mark.skipif("PIDECODE_COMFYUI" in os.environ, reason="counts calls on the double")


@contextmanager
def imported_comfyui() -> Iterator[SimpleNamespace]:
    """The modules of ComfyUI, and our nodes."""
    real = os.environ.get("PIDECODE_COMFYUI")
    saved, arguments = list(sys.path), sys.argv
    sys.path.insert(0, real or str(ROOT / "tests" / "doubles" / "comfyui"))
    sys.argv = ["comfyui"]
    try:
        if real:
            import comfy.cli_args

            comfy.cli_args.args.cpu = True
            comfy.cli_args.args.preview_method = comfy.cli_args.LatentPreviewMethod.Latent2RGB
        import comfy.cli_args
        import comfy.latent_formats
        import comfy.model_management
        import comfy.model_sampling
        import comfy.utils
        import folder_paths
        import server

        # The package keeps a name of the module after it left sys.modules, so it is imported by its path.
        comfyui = importlib.import_module("pidecode.integrations.comfyui")

        yield SimpleNamespace(
            nodes=comfyui,
            formats=comfy.latent_formats,
            sampling=comfy.model_sampling,
            management=comfy.model_management,
            utils=comfy.utils,
            arguments=comfy.cli_args,
            folders=folder_paths,
            server=server,
        )
    finally:
        sys.path, sys.argv = saved, arguments
        for name in [name for name in sys.modules if name.partition(".")[0] in COMFY]:
            del sys.modules[name]
        sys.modules.pop("pidecode.integrations.comfyui", None)


def network(config: PiDConfig, std: float = 0.2) -> PiDNet:
    """A random network."""
    torch.manual_seed(0)
    net = PiDNet(config).requires_grad_(False).eval()
    for parameter in net.parameters():
        parameter.normal_(std=std) if parameter.ndim else parameter.fill_(1.0)
    return net


def small_decoder() -> PixelDecoder:
    """A student of FLUX.2's space that reads no text, with an encoder."""
    identity = CheckpointMetadata(kind="student", config=FLUX2, space="flux2", license="Apache-2.0")
    made = PixelDecoder(network(FLUX2), identity, name="small")
    made.encoder = lambda images: torch.nn.functional.avg_pool2d(images, 16).repeat(1, 43, 1, 1)[:, :128]
    return made


def model_of(comfy: SimpleNamespace, space: str, kind: str | None = None, sampling: str | None = None) -> Any:
    """A MODEL as the nodes see it: a latent format and a sampling, those of ComfyUI."""
    if not hasattr(comfy.formats, FORMAT[space]):
        pytest.skip(f"this ComfyUI knows no {FORMAT[space]}")
    latent_format = getattr(comfy.formats, FORMAT[space])()
    scaling = getattr(comfy.sampling, sampling or SAMPLING[space])()
    inner = SimpleNamespace(
        latent_format=latent_format,
        process_latent_in=latent_format.process_in,
        model_config=type(kind or CONFIG[space], (), {})(),
    )
    return SimpleNamespace(model=inner, get_model_object=lambda name: {"model_sampling": scaling}[name])


def latent_of(space: str, seed: int = 0) -> Tensor:
    """A normalized latent with the spread of a photograph's."""
    noise = torch.randn(2, SPACES[space].channels, 4, 6, generator=torch.Generator().manual_seed(seed))
    return 0.7 * noise


def as_comfy_has_it(z: Tensor, space: str) -> Tensor:
    """The LATENT of a normalized latent: raw, except for FLUX.2."""
    return z if space == "flux2" else Latent(z, space).to_raw()
