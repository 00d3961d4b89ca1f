# SPDX-License-Identifier: Apache-2.0
"""Z-Image Turbo, in two moves: take the latent from the pipeline as it is, free the pipeline, decode.

python examples/zimage.py "a lighthouse in fog" --out lighthouse.png
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import ZImagePipeline

import pidecode


def main(argv: list[str] | None = None, **call: Any) -> None:
    """Run it; `call` goes to the pipeline, over what stands here."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("prompt")
    options.add_argument("--pipeline", default="Tongyi-MAI/Z-Image-Turbo")
    options.add_argument("--decoder", default="nvidia/PiD")
    options.add_argument("--out", default="zimage.png")
    given = options.parse_args(argv)

    pipe = ZImagePipeline.from_pretrained(given.pipeline, torch_dtype=torch.bfloat16)
    pipe.to("cuda" if torch.cuda.is_available() else "cpu")
    call = {"height": 512, "width": 512, "num_inference_steps": 9, "guidance_scale": 0.0, **call}
    out = pipe(given.prompt, output_type="latent", generator=torch.Generator().manual_seed(0), **call)
    latent = pidecode.latent_from_pipeline(pipe, out, height=call["height"], width=call["width"], prompt=given.prompt)
    del pipe  # its memory is the decoder's now

    decoder = pidecode.PixelDecoder.from_pretrained(given.decoder, space="zimage")
    decoder.decode(latent).save(given.out)


if __name__ == "__main__":
    main()
