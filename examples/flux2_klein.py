# SPDX-License-Identifier: Apache-2.0
"""FLUX.2 klein with the small decoder that ships with pidecode: nothing of PiD's to download, one line to change.

python examples/flux2_klein.py "a lighthouse in fog" --out lighthouse.png
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from diffusers import Flux2KleinPipeline

import pidecode


def main(argv: list[str] | None = None, **call: Any) -> None:
    """Run it; `call` goes to the pipeline, over what stands here."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("prompt")
    options.add_argument("--pipeline", default="black-forest-labs/FLUX.2-klein-4B")
    options.add_argument("--decoder", default="tiny")
    options.add_argument("--out", default="klein.png")
    given = options.parse_args(argv)

    decoder = pidecode.PixelDecoder.from_pretrained(given.decoder)
    pipe = Flux2KleinPipeline.from_pretrained(given.pipeline, torch_dtype=decoder.dtype).to(decoder.device)

    call = {"height": 512, "width": 512, "num_inference_steps": 4, "guidance_scale": 1.0, **call}
    call["generator"] = torch.Generator().manual_seed(0)
    pipe(prompt=given.prompt, **call).images[0].save(f"{given.out}-native.png")

    attached = pidecode.attach(pipe, decoder)
    call["generator"] = torch.Generator().manual_seed(0)
    attached(given.prompt, **call).images[0].save(given.out)


if __name__ == "__main__":
    main()
