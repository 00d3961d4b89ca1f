# SPDX-License-Identifier: Apache-2.0
"""Show what the decoder does to a photograph: quarter it, decode its latent at full size, and enlarge it.

    python tools/make_image.py                    # scikit-image's astronaut (NASA, public domain)
    python tools/make_image.py coffee             # or chelsea, both CC0
    python tools/make_image.py holiday.jpg --out shown

Writes four files into the folder: the quarter-size input, what its latent alone decodes to, what `upscale` makes of it,
and all of them side by side with the original. Nothing is downloaded: scikit-image carries its sample photographs,
pidecode its small decoder.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

import pidecode

SAMPLES = ("astronaut", "chelsea", "coffee")
QUARTER = 4
MULTIPLE = 64
"""Sides of the original are cropped to this, so that a quarter of them fits the latent grid (16 pixels a cell)."""
LONGEST = 1024
PROMPT_HEIGHT = 28
GAP = 12


def open_image(name: str) -> Image.Image:
    """A sample by its name, or a file of the user's, as RGB with its orientation applied."""
    if name in SAMPLES and not Path(name).exists():
        from skimage import data

        return Image.fromarray(getattr(data, name)())
    with Image.open(name) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def cropped(image: Image.Image) -> Image.Image:
    """The image, at most LONGEST a side, its middle cropped to multiples of MULTIPLE."""
    image.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
    width, height = (side // MULTIPLE * MULTIPLE for side in image.size)
    if not width or not height:
        sys.exit(f"The image is {image.width} x {image.height}; it must be at least {MULTIPLE} pixels a side.")
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def quartered(image: Image.Image) -> Image.Image:
    """The image at a quarter of its size along each side."""
    return image.resize((image.width // QUARTER, image.height // QUARTER), Image.Resampling.BICUBIC)


def side_by_side(panels: list[tuple[str, Image.Image]]) -> Image.Image:
    """Images of one size in a row, each under a line of words."""
    width, height = panels[0][1].size
    sheet = Image.new("RGB", (len(panels) * (width + GAP) + GAP, height + PROMPT_HEIGHT + 2 * GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    for index, (words, image) in enumerate(panels):
        left = GAP + index * (width + GAP)
        draw.text((left, GAP), words, fill="black", font=font)
        sheet.paste(image, (left, GAP + PROMPT_HEIGHT))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("image", nargs="?", default=SAMPLES[0], help="a file, or one of " + ", ".join(SAMPLES))
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write into")
    parser.add_argument("--model", default="tiny", help="a model's name, folder or file")
    wanted = parser.parse_args()

    original = cropped(open_image(wanted.image))
    small = quartered(original)
    decoder = pidecode.PixelDecoder.from_pretrained(wanted.model)
    began = time.perf_counter()
    enlarged = decoder.upscale(small).image
    seconds = time.perf_counter() - began
    latent = decoder.encode(small)
    decoded = decoder.decode(latent).image

    wanted.out.mkdir(parents=True, exist_ok=True)
    stem = Path(wanted.image).stem
    small.save(wanted.out / f"{stem}-before.png")
    decoded.save(wanted.out / f"{stem}-latent.png")
    enlarged.save(wanted.out / f"{stem}-after.png")
    before = small.resize(original.size, Image.Resampling.NEAREST)
    sheet = wanted.out / f"{stem}-before-after.png"
    side_by_side(
        [
            (f"before: {small.width} x {small.height}", before),
            ("its latent alone, decoded", decoded),
            (f"after: {enlarged.width} x {enlarged.height}, enlarged by pidecode", enlarged),
            ("the original, for comparison", original),
        ]
    ).save(sheet)
    channels, rows, columns = latent.tensor.shape[1:]
    print(
        f"{small.width} x {small.height} pixels -> a latent of {channels} x {rows} x {columns} "
        f"-> {enlarged.width} x {enlarged.height} pixels, in {seconds:.1f} s."
    )
    print(f"Before and after, side by side: {sheet.resolve()}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, pidecode.PidecodeError) as error:
        sys.exit(f"Error: {error}")
