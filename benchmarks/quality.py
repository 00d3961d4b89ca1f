# SPDX-License-Identifier: Apache-2.0
"""How good a decoder's images are: held-out images, quarter size, encoded, decoded, compared with the originals.

    python benchmarks/quality.py --data IMAGES --teacher TAEF2 [--decoder tiny] [--side 1024] [--json out.json]

Beside the decoder stand two rivals: the tiny FLUX.2 autoencoder's decode enlarged by Lanczos, which sees a latent
too, and plain Lanczos of the quarter-size image, which never went through a latent. "Colors held" and "details
held" are `color_fix="fine"` and "detail": they read the quarter-size image beside the latent, as `upscale` with a
small decoder does by default. All in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pidecode import Latent, PixelDecoder
from pidecode.color_fix import apply_color_fix
from pidecode.metrics import channel_error, psnr, sharpness, ssim

sys.path.append(str(Path(__file__).parent.parent / "recipes" / "tiny"))
from taef2 import TinyAutoencoder

from data import crop_to_multiple, held_out, quarter, read_manifest, to_signed

SIGMAS = (0.2, 0.4, 0.6)


def images(folder: Path, side: int, every: int) -> Iterator[tuple[str, np.ndarray]]:
    """Held-out images by name, center-cropped to at most `side` pixels."""
    for name in sorted(held_out(read_manifest(folder)))[::every]:
        with Image.open(folder / name) as image:
            yield name, middle(crop_to_multiple(image), side)


def middle(array: np.ndarray, side: int) -> np.ndarray:
    """The middle of an image, at most `side` pixels a side and a multiple of 64."""
    height, width = (min(side, extent) // 64 * 64 for extent in array.shape[:2])
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    return array[top : top + height, left : left + width]


def enlarged(image: Tensor) -> Tensor:
    """Four times the size by Pillow's Lanczos, from eight bits: [1,3,h,w] in [-1,1]."""
    array = ((image[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    size = (4 * array.shape[1], 4 * array.shape[0])
    return to_signed(np.array(Image.fromarray(array).resize(size, Image.Resampling.LANCZOS)))[None]


def row(image: Tensor, original: Tensor) -> dict[str, float]:
    """All the numbers of one image."""
    red, green, blue = channel_error(image, original)[0].tolist()
    return {
        "psnr": psnr(image, original).item(),
        "ssim": ssim(image, original).item(),
        "red": red,
        "green": green,
        "blue": blue,
        "sharpness": sharpness(image).item(),
    }


def rows_of(
    array: np.ndarray, decoder: PixelDecoder, teacher: TinyAutoencoder, *, steps: int, noisy: bool
) -> dict[str, dict[str, float]]:
    """Every contender's numbers for one image."""
    original, small = to_signed(array)[None], to_signed(quarter(array))[None]
    with torch.inference_mode():
        cells = teacher.encode(small)
        plain = teacher.decode(cells)
    theirs = Latent(tensor=torch.nn.functional.pixel_unshuffle(cells, 2), space="flux2", sigma=0.0)
    latent = decoder.encode(small)
    started = time.perf_counter()
    ours = decoder.decode(latent, seed=0, steps=steps).tensor
    seconds = time.perf_counter() - started
    found = {
        "ours": row(ours, original) | {"seconds": seconds},
        "ours, colors held": row(apply_color_fix(ours, small, "full"), original),
        "ours, details held": row(apply_color_fix(ours, small, "detail"), original),
        "ours, teacher's latent": row(decoder.decode(theirs, seed=0, steps=steps).tensor, original),
        "taef2 + Lanczos": row(enlarged(plain), original),
        "taef2 + Lanczos, colors held": row(apply_color_fix(enlarged(plain), small, "full"), original),
        "taef2 + Lanczos, details held": row(apply_color_fix(enlarged(plain), small, "detail"), original),
        "Lanczos, no latent": row(enlarged(small), original),
        "original": row(original, original),
    }
    with torch.inference_mode():
        ours_cells = torch.nn.functional.pixel_shuffle(latent.tensor.float(), 2)
        imitation = teacher.decode(ours_cells)
    found["encoder"] = {
        "psnr": psnr(imitation, plain).item(),
        "relative": ((ours_cells - cells).norm() / cells.norm()).item(),
    }
    for sigma in SIGMAS if noisy else ():
        noisy_image = decoder.decode(latent.noised(sigma, seed=1), seed=0, steps=steps).tensor
        found[f"ours, sigma {sigma}"] = row(noisy_image, original)
    return found


def main() -> None:
    """Measure, print a table, and write every image's numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of images, with manifest.jsonl if it has one")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the two taef2 files")
    parser.add_argument("--decoder", default="tiny")
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--side", type=int, default=1024, help="largest side of an image, in pixels")
    parser.add_argument("--num-steps", type=int, default=4)
    parser.add_argument("--every", type=int, default=1, help="take every n-th held-out image")
    parser.add_argument("--noisy-every", type=int, default=3, help="noise the latent of every n-th of those")
    parser.add_argument("--json", type=Path, help="where to write every image's numbers")
    given = parser.parse_args()
    decoder = PixelDecoder.from_pretrained(given.decoder, encoder=given.encoder, device="cpu", dtype=torch.float32)
    teacher = TinyAutoencoder.from_folder(given.teacher)
    table: dict[str, dict[str, dict[str, float]]] = {}
    for index, (name, array) in enumerate(images(given.data, given.side, given.every)):
        found = rows_of(array, decoder, teacher, num_steps=given.num_steps, noisy=index % given.noisy_every == 0)
        table[name] = found
        print(name, {who: round(numbers["psnr"], 2) for who, numbers in found.items() if who != "original"}, flush=True)
        if given.json:
            given.json.write_text(json.dumps(table, indent=1))
    for who in dict.fromkeys(who for found in table.values() for who in found):
        rows = [found[who] for found in table.values() if who in found]
        means = {key: float(np.mean([numbers[key] for numbers in rows])) for key in rows[0]}
        print(f"| {who} | {len(rows)} | " + " | ".join(f"{key} {value:.4g}" for key, value in means.items()) + " |")


if __name__ == "__main__":
    main()
