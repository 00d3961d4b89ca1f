# SPDX-License-Identifier: Apache-2.0
"""Latents of RAE (DINOv2) and Scale-RAE (SigLIP 2), as their projects' samplers save them, to large images.

    python examples/rae.py dinov2 sample.pt --out sample.png
    python examples/rae.py siglip features.pt --out sample.png

The file holds one tensor. RAE's sampler saves normalized latents [B, 768, 32, 32], or the trajectory of one sample,
for which --step and --sigma name the step and the sampler's time. Scale-RAE saves tokens [B, 256, 1152], normalized by
a LayerNorm without weights, with or without a class token in front.
"""

from __future__ import annotations

import argparse

import torch

import pidecode


def unflatten(tokens: torch.Tensor) -> torch.Tensor:
    """Tokens [B, N or 1 + N, C] in reading order to a latent [B, C, side, side]."""
    side = int(tokens.shape[1] ** 0.5)
    return tokens[:, -side * side :].transpose(1, 2).unflatten(2, (side, side)).contiguous()


def main(argv: list[str] | None = None) -> None:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("space", choices=["dinov2", "siglip"])
    parser.add_argument("file")
    parser.add_argument("--step", type=int, help="step of a trajectory, where the file holds one")
    parser.add_argument("--sigma", type=float, default=0.0, help="the sampler's time at that step: 1 noise, 0 clean")
    parser.add_argument("--prompt", help="what the image shows")
    parser.add_argument("--decoder", default="nvidia/PiD")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="rae.png")
    args = parser.parse_args(argv)

    tensor = torch.load(args.file, map_location="cpu", weights_only=True).float()
    if args.step is not None:
        tensor = tensor[args.step : args.step + 1]
    if tensor.ndim == 3:
        tensor = unflatten(tensor)
    latent = pidecode.Latent(tensor, args.space, sigma=args.sigma, prompt=args.prompt)
    decoder = pidecode.PixelDecoder.from_pretrained(args.decoder, space=args.space)
    decoder.decode(latent, seed=args.seed).save(args.out, overwrite=True)


if __name__ == "__main__":
    main()
