# SPDX-License-Identifier: Apache-2.0
"""Side-by-side crops to look at: enlarged without a latent, taef2 and Lanczos, a decoder, this held, the original.

    python benchmarks/sheet.py --teacher TAEF2 --out sheet.png [--data IMAGES] [--decoder tiny] [--crops 20] [--noise]

With --noise the columns are this decoder's images of its latents with noise of sigma 0, 0.2, 0.4 and 0.6 in them.

The crops are the busiest of the chosen images' middles by gradient, one an image, so nobody picks them by hand.
Without --data the images are free ones that scikit-image ships, and a page of type set here.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from quality import SIGMAS, enlarged, images, middle
from torch import Tensor

from pidecode import PixelDecoder
from pidecode.color_fix import apply_color_fix
from pidecode.images.tensors import to_pil

sys.path.append(str(Path(__file__).parent.parent / "recipes" / "tiny"))
from synthetic import synthetic_image
from taef2 import TinyAutoencoder

from data import crop_to_multiple, quarter, to_signed

COLUMNS = ("Lanczos 4x, no latent", "taef2, then Lanczos 4x", "this decoder", "the same, detail held", "original")
NOISY_COLUMNS = ("no noise", *(f"sigma {sigma}" for sigma in SIGMAS), "original")
TITLE = 18
"""Height of the line of titles, in pixels."""


def busiest(image: Tensor, side: int) -> tuple[int, int]:
    """Top left corner of the window of `side` pixels with the largest mean gradient, on a grid of half windows."""
    luma = image.mean(1, keepdim=True)
    across, down = luma.diff(dim=-1)[..., 1:, :].abs(), luma.diff(dim=-2)[..., 1:].abs()
    means = torch.nn.functional.avg_pool2d(across + down, side, stride=side // 2)[0, 0]
    row, column = divmod(int(means.argmax()), means.shape[1])
    return row * side // 2, column * side // 2


def free_images(side: int) -> Iterator[np.ndarray]:
    """Middles of at most `side` pixels of images that anyone may show, none of them used in training."""
    import skimage.data

    shown = (skimage.data.astronaut, skimage.data.chelsea, skimage.data.coffee, skimage.data.brick, skimage.data.camera)
    yield from (middle(crop_to_multiple(Image.fromarray(image())), side) for image in shown)
    yield synthetic_image("text_page", side, 4711)


def contenders(small: Tensor, decoder: PixelDecoder, teacher: TinyAutoencoder) -> tuple[Tensor, ...]:
    """An image enlarged in each of the ways to compare."""
    with torch.inference_mode():
        plain = teacher.decode(teacher.encode(small))
    ours = decoder.decode(decoder.encode(small), seed=0).tensor
    return enlarged(small), enlarged(plain), ours, apply_color_fix(ours, small, "detail")


def noisy(small: Tensor, decoder: PixelDecoder) -> tuple[Tensor, ...]:
    """What the decoder makes of its latent as it is, and with ever more noise in it."""
    latent = decoder.encode(small)
    latents = (latent, *(latent.noised(sigma, seed=1) for sigma in SIGMAS))
    return tuple(decoder.decode(one, seed=0).tensor for one in latents)


def strip(array: np.ndarray, shown_of: Callable[[Tensor], tuple[Tensor, ...]], side: int) -> Tensor:
    """One image's busiest window in every version and as it was, side by side: [1,3,side,n side]."""
    original, small = to_signed(array)[None], to_signed(quarter(array))[None]
    top, left = busiest(original, side)
    shown = (*shown_of(small), original)
    return torch.cat([one[..., top : top + side, left : left + side] for one in shown], dim=-1)


def main() -> None:
    """Make the sheet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of images, with manifest.jsonl if it has one")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the two taef2 files")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--decoder", default="tiny")
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--side", type=int, default=512, help="largest side of an image that is decoded, in pixels")
    parser.add_argument("--window", type=int, default=224, help="side of a crop, in pixels")
    parser.add_argument("--crops", type=int, default=20)
    parser.add_argument("--noise", action="store_true", help="show noisy latents in place of the rivals")
    given = parser.parse_args()
    decoder = PixelDecoder.from_pretrained(given.decoder, encoder=given.encoder, device="cpu")
    teacher = TinyAutoencoder.from_folder(given.teacher)
    if given.noise:
        columns, shown_of = NOISY_COLUMNS, functools.partial(noisy, decoder=decoder)
    else:
        columns, shown_of = COLUMNS, functools.partial(contenders, decoder=decoder, teacher=teacher)
    chosen = [array for _, array in images(given.data, given.side, 1)] if given.data else [*free_images(given.side)]
    step = max(1, len(chosen) // given.crops)
    rows = [strip(array, shown_of, given.window) for array in chosen[::step][: given.crops]]
    sheet = Image.new("RGB", (rows[0].shape[-1], TITLE + given.window * len(rows)), "white")
    for index, title in enumerate(columns):
        ImageDraw.Draw(sheet).text((index * given.window + 4, 3), title, fill="black")
    for index, row in enumerate(rows):
        sheet.paste(to_pil(row), (0, TITLE + index * given.window))
    sheet.save(given.out)


if __name__ == "__main__":
    main()
