# SPDX-License-Identifier: Apache-2.0
"""A diffusers pipeline whose images PiD decodes, four times as large as its VAE would.

    python examples/diffusers_pipeline.py "a lighthouse in fog" --model flux --stop-after recommended
    python examples/diffusers_pipeline.py "a lighthouse in fog" --model qwenimage --capture 40 44 50
    python examples/diffusers_pipeline.py "a lighthouse in fog" --model sd3 --color-fix fine

flux2 is FLUX.2 klein, and its decoder `tiny` ships with pidecode; `pidecode pull NAME` fetches the others'. Beside the
image it writes the latent, which `pidecode decode` decodes again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

import pidecode

# Model -> repository of the pipeline, decoder, and how its authors call it.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "flux": (
        "black-forest-labs/FLUX.1-dev",
        "nvidia/PiD",
        {"height": 512, "width": 512, "num_inference_steps": 28, "guidance_scale": 3.5},
    ),
    "flux2": (
        "black-forest-labs/FLUX.2-klein-4B",
        "tiny",
        {"height": 512, "width": 512, "num_inference_steps": 4, "guidance_scale": 1.0},
    ),
    "sd3": (
        "stabilityai/stable-diffusion-3-medium-diffusers",
        "nvidia/PiD",
        {"height": 512, "width": 512, "num_inference_steps": 28, "guidance_scale": 4.0},
    ),
    "sdxl": (
        "stabilityai/stable-diffusion-xl-base-1.0",
        "nvidia/PiD",
        {"height": 1024, "width": 1024, "num_inference_steps": 30, "guidance_scale": 7.5},
    ),
    "qwenimage": (
        "Qwen/Qwen-Image",
        "nvidia/PiD",
        {"height": 1024, "width": 1024, "num_inference_steps": 50, "true_cfg_scale": 4.0, "negative_prompt": " "},
    ),
    "zimage": (
        "Tongyi-MAI/Z-Image",
        "nvidia/PiD",
        {"height": 512, "width": 512, "num_inference_steps": 50, "guidance_scale": 5.0},
    ),
}


def main(argv: list[str] | None = None, **call: Any) -> None:
    """Run the example; `call` are more keywords of the pipeline's call."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--model", choices=list(MODELS), default="flux")
    parser.add_argument("--pipeline", help="folder or repository of the pipeline, if not the model's own")
    parser.add_argument("--decoder", help="name or file of the decoder, if not the model's own")
    parser.add_argument("--encoder", help="the space's encoder for --color-fix, if it was not pulled")
    parser.add_argument("--stop-after", metavar="STEP", help="end the diffusion after that step, or `recommended`")
    parser.add_argument("--capture", type=int, nargs="+", default=[], metavar="STEP", help="decode these steps too")
    parser.add_argument("--color-fix", choices=["coarse", "fine", "back-projection"], help="by the VAE's decode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("image.png"))
    args = parser.parse_args(argv)
    repository, decoder_name, defaults = MODELS[args.model]
    stop_after = int(args.stop_after) if args.stop_after and args.stop_after.isdigit() else args.stop_after

    decoder = pidecode.PixelDecoder.from_pretrained(
        args.decoder or decoder_name, space=args.model, encoder=args.encoder
    )
    pipe = DiffusionPipeline.from_pretrained(args.pipeline or repository, torch_dtype=decoder.dtype)
    pipe = pidecode.attach(
        pipe.to(decoder.device),
        decoder,
        stop_after=stop_after,
        capture_steps=args.capture,
        options=pidecode.DecodeOptions(color_fix=args.color_fix),
    )
    out = pipe(args.prompt, **{**defaults, "generator": torch.Generator().manual_seed(args.seed), **call})

    print(f"{out.num_steps} steps were run; sigma {out.latents.sigma:.3f} is left in the latent.")
    pidecode.save_image(args.out, out.images[0], overwrite=True)  # with its metadata, unlike image.save()
    out.latents.save(args.out.with_suffix(".safetensors"), overwrite=True)
    for step, latent in out.captured.items():
        path = args.out.with_stem(f"{args.out.stem}-step-{step}-sigma-{latent.sigma:.3f}")
        decoder.decode(latent).save(path, overwrite=True)


if __name__ == "__main__":
    main()
