# SPDX-License-Identifier: Apache-2.0
"""Show what a latent alone does not tell: eyes and a line of type, the original, decoded, and enlarged.

    python tools/make_closeups.py --out shown

Writes `latent-alone.webp`, the picture in the README. The photograph is scikit-image's astronaut (NASA, public domain);
the type is drawn.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from make_image import QUARTER, SAMPLES, open_image
from PIL import Image, ImageDraw, ImageFont

import pidecode

FACE = (166, 70, 286, 150)
TYPE = (250, 164, 370, 212)
"""What is shown of each image: left, top, right, bottom in pixels."""
ENLARGED = 3
GAP = 10
TITLE_HEIGHT = 26
TITLES = ("the original", "{model}, from the latent alone", "upscale, with the small image")
WORDS = "the night market after the thunder and the rain "


def typed(side: int = 512) -> Image.Image:
    """Lines of light type, a little tilted, on a dark ground."""
    lines = Image.new("RGB", (2 * side, 2 * side), (48, 58, 52))
    draw, font = ImageDraw.Draw(lines), ImageFont.load_default(34)
    for number, top in enumerate(range(0, 2 * side, 46)):
        draw.text((-60 * (number % 4), top), 2 * WORDS, fill=(205, 220, 240), font=font)
    tilted = lines.rotate(-7, Image.Resampling.BICUBIC)
    return tilted.crop((side // 2, side // 2, side // 2 + side, side // 2 + side))


def closeups(decoder: pidecode.PixelDecoder, original: Image.Image, box: tuple[int, ...]) -> list[Image.Image]:
    """The original, its small image's latent decoded, and the small image enlarged: a part of each."""
    small = original.resize((original.width // QUARTER, original.height // QUARTER), Image.Resampling.BICUBIC)
    images = original, decoder.decode(decoder.encode(small)).image, decoder.upscale(small).image
    size = tuple(ENLARGED * (box[axis + 2] - box[axis]) for axis in (0, 1))
    return [image.crop(box).resize(size, Image.Resampling.BICUBIC) for image in images]  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write into")
    parser.add_argument("--model", default="tiny", help="a model's name, folder or file")
    wanted = parser.parse_args()

    decoder = pidecode.PixelDecoder.from_pretrained(wanted.model)
    rows = [closeups(decoder, open_image(SAMPLES[0]), FACE), closeups(decoder, typed(), TYPE)]
    width = rows[0][0].width + GAP
    height = TITLE_HEIGHT + sum(row[0].height + GAP for row in rows)
    sheet = Image.new("RGB", (len(TITLES) * width + GAP, height), "white")
    draw, font, top = ImageDraw.Draw(sheet), ImageFont.load_default(15), TITLE_HEIGHT
    for column, title in enumerate(TITLES):
        draw.text((GAP + column * width, 5), title.format(model=Path(wanted.model).stem), fill="black", font=font)
    for row in rows:
        for column, image in enumerate(row):
            sheet.paste(image, (GAP + column * width, top))
        top += row[0].height + GAP
    wanted.out.mkdir(parents=True, exist_ok=True)
    path = wanted.out / "latent-alone.webp"
    sheet.save(path, quality=85, method=6)
    print(f"Eyes and type, side by side: {path.resolve()}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, pidecode.PidecodeError) as error:
        sys.exit(f"Error: {error}")
