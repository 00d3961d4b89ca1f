# SPDX-License-Identifier: Apache-2.0
"""SDXL: stop early in its Euler frame, keep the latent as a file, and decode the file again with another seed.

python examples/sdxl.py "a lighthouse in fog" --out lighthouse.png
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline

import pidecode


def main(argv: list[str] | None = None, **call: Any) -> None:
    """Run it; `call` goes to the pipeline, over what stands here."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("prompt")
    options.add_argument("--pipeline", default="stabilityai/stable-diffusion-xl-base-1.0")
    options.add_argument("--decoder", default="nvidia/PiD")
    options.add_argument("--out", type=Path, default=Path("sdxl.png"))
    given = options.parse_args(argv)

    decoder = pidecode.PixelDecoder.from_pretrained(given.decoder, space="sdxl")
    pipe = StableDiffusionXLPipeline.from_pretrained(given.pipeline, torch_dtype=decoder.dtype).to(decoder.device)
    call = {"height": 1024, "width": 1024, "num_inference_steps": 30, "stop_after": "recommended", **call}
    out = pidecode.attach(pipe, decoder)(given.prompt, generator=torch.Generator().manual_seed(0), **call)
    out.images[0].save(given.out)

    favorite = given.out.with_suffix(".safetensors")
    out.latents.save(favorite, overwrite=True)
    again = pidecode.Latent.load(favorite)  # it knows its space, its noise and its prompt
    decoder.decode(again, seed=7).save(given.out.with_stem(f"{given.out.stem}-again"))


if __name__ == "__main__":
    main()
