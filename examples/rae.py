# SPDX-License-Identifier: Apache-2.0
"""RAE (DINOv2) and Scale-RAE (SigLIP 2): what their projects' samplers leave, to an image 4 or 8 times the size.

    python examples/rae.py dinov2 sample.pt --out sample.png
    python examples/rae.py siglip features.pt --out sample.png

The file holds one tensor. RAE's sampler gives normalized latents [B, 768, 32, 32], or the whole trajectory of one
sample, whose step and time are then named with --step and --sigma. Scale-RAE gives tokens [B, 256, 1152], with a
class token in front or without, already normalized by the LayerNorm without weights.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

import pidecode


def grid_of(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [B, n or 1 + n, C] in reading order to a latent [B, C, side, side]."""
    side = int(tokens.shape[1] ** 0.5)
    return tokens[:, -side * side :].transpose(1, 2).unflatten(2, (side, side)).contiguous()


def main(argv: list[str] | None = None, **settings: Any) -> None:
    """Run it; `settings` go to the decoder."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("space", choices=["dinov2", "siglip"])
    options.add_argument("file")
    options.add_argument("--step", type=int, help="step of a trajectory, where the file holds one")
    options.add_argument("--sigma", type=float, default=0.0, help="the sampler's time at that step: 1 noise, 0 clean")
    options.add_argument("--prompt", default="")
    options.add_argument("--decoder", default="nvidia/PiD")
    options.add_argument("--out", default="rae.png")
    given = options.parse_args(argv)

    tensor = torch.load(given.file, map_location="cpu", weights_only=True).float()
    if given.step is not None:
        tensor = tensor[given.step : given.step + 1]
    latent = pidecode.Latent(
        grid_of(tensor) if tensor.ndim == 3 else tensor, given.space, sigma=given.sigma, prompt=given.prompt
    )
    decoder = pidecode.PixelDecoder.from_pretrained(given.decoder, space=given.space)
    images = decoder.decode(latent, **settings)
    (images if not isinstance(images, list) else images[0]).save(given.out)


if __name__ == "__main__":
    main()
