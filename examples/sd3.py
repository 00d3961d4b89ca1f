# SPDX-License-Identifier: Apache-2.0
"""Stable Diffusion 3: several images in one call, with colors held to what SD3's own decoder would have drawn.

python examples/sd3.py "a lighthouse in fog" --out-folder images
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline

import pidecode


def main(argv: list[str] | None = None, **call: Any) -> None:
    """Run it; `call` goes to the pipeline, over what stands here."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("prompt")
    options.add_argument("--pipeline", default="stabilityai/stable-diffusion-3-medium-diffusers")
    options.add_argument("--decoder", default="nvidia/PiD")
    options.add_argument("--encoder", help="SD3's autoencoder, if `pidecode pull sd3` has not fetched it")
    options.add_argument("--out-folder", type=Path, default=Path("sd3"))
    given = options.parse_args(argv)

    decoder = pidecode.PixelDecoder.from_pretrained(given.decoder, space="sd3", encoder=given.encoder)
    pipe = StableDiffusion3Pipeline.from_pretrained(given.pipeline, torch_dtype=decoder.dtype).to(decoder.device)
    pipe = pidecode.attach(pipe, decoder, options=pidecode.DecodeOptions(color_fix="fine"))

    call = {"height": 512, "width": 512, "num_inference_steps": 28, "guidance_scale": 4.0, **call}
    out = pipe(given.prompt, num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), **call)
    given.out_folder.mkdir(exist_ok=True)
    for number, image in enumerate(out.images, 1):
        image.save(given.out_folder / f"{number}.png")


if __name__ == "__main__":
    main()
