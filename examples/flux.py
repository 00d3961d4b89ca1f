# SPDX-License-Identifier: Apache-2.0
"""FLUX.1: end the diffusion at step 24 of 28 and let PiD draw the image from there, four times the size.

python examples/flux.py "a lighthouse in fog" --out lighthouse.png
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import FluxPipeline

import pidecode


def main(argv: list[str] | None = None, **call: Any) -> None:
    """Run it; `call` goes to the pipeline, over what stands here."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("prompt")
    options.add_argument("--pipeline", default="black-forest-labs/FLUX.1-dev")
    options.add_argument("--decoder", default="nvidia/PiD")
    options.add_argument("--out", default="flux.png")
    given = options.parse_args(argv)

    decoder = pidecode.PixelDecoder.from_pretrained(given.decoder, space="flux")
    pipe = FluxPipeline.from_pretrained(given.pipeline, torch_dtype=decoder.dtype).to(decoder.device)
    pipe = pidecode.attach(pipe, decoder, stop_after="recommended")

    call = {"height": 512, "width": 512, "num_inference_steps": 28, "guidance_scale": 3.5, **call}
    out = pipe(given.prompt, generator=torch.Generator().manual_seed(0), **call)
    print(f"{out.num_steps} steps were run; sigma {out.latents.sigma:.3f} was left in the latent.")
    out.images[0].save(given.out)


if __name__ == "__main__":
    main()
