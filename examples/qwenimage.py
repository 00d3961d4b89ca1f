# SPDX-License-Identifier: Apache-2.0
"""Qwen-Image: keep the latents of several steps of one run, and see what PiD makes of each.

python examples/qwenimage.py "a lighthouse in fog" --num-steps 40 44 50 --out-folder steps
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImagePipeline

import pidecode


def main(argv: list[str] | None = None, **call: Any) -> None:
    """Run it; `call` goes to the pipeline, over what stands here."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("prompt")
    options.add_argument("--pipeline", default="Qwen/Qwen-Image")
    options.add_argument("--decoder", default="nvidia/PiD")
    options.add_argument("--num-steps", type=int, nargs="+", default=[40, 44, 50])
    options.add_argument("--out-folder", type=Path, default=Path("steps"))
    given = options.parse_args(argv)

    decoder = pidecode.PixelDecoder.from_pretrained(given.decoder, space="qwenimage")
    pipe = QwenImagePipeline.from_pretrained(given.pipeline, torch_dtype=decoder.dtype).to(decoder.device)
    call = {"height": 1024, "width": 1024, "num_inference_steps": 50, "true_cfg_scale": 4.0, **call}
    call |= {"negative_prompt": " ", "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    out = pidecode.attach(pipe, decoder, capture_steps=given.steps)(given.prompt, **call)

    given.out_folder.mkdir(exist_ok=True)
    for step, latent in out.captured.items():
        decoder.decode(latent).save(given.out_folder / f"step-{step}-sigma-{latent.sigma:.3f}.png")


if __name__ == "__main__":
    main()
