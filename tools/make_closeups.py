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

from make_image import SAMPLES, open_image, quartered, side_by_side
from PIL import Image, ImageDraw, ImageFont

import pidecode

FACE = (166, 70, 286, 150)
"""What is shown of the photograph: left, top, right, bottom in pixels."""
TYPE = (250, 164, 370, 212)
"""The same of the type."""
ENLARGED = 3
WORDS = "the night market after the thunder and the rain "


def typed(side: int = 512) -> Image.Image:
    """Lines of light type, a little tilted, on a dark ground."""
    lines = Image.new("RGB", (2 * side, 2 * side), (48, 58, 52))
    draw, font = ImageDraw.Draw(lines), ImageFont.load_default(34)
    for number, top in enumerate(range(0, 2 * side, 46)):
        draw.text((-60 * (number % 4), top), 2 * WORDS, fill=(205, 220, 240), font=font)
    tilted = lines.rotate(-7, Image.Resampling.BICUBIC)
    return tilted.crop((side // 2, side // 2, side // 2 + side, side // 2 + side))


def closeups(decoder: pidecode.PixelDecoder, original: Image.Image, box: tuple[int, int, int, int]) -> Image.Image:
    """The same part of an image, of its small image's latent decoded, and of the small image enlarged."""
    small = quartered(original)
    panels = [
        ("the original", original),
        ("from the latent alone", decoder.decode(decoder.encode(small)).image),
        ("upscale, with the small image", decoder.upscale(small).image),
    ]
    size = (ENLARGED * (box[2] - box[0]), ENLARGED * (box[3] - box[1]))
    return side_by_side([(words, image.crop(box).resize(size, Image.Resampling.BICUBIC)) for words, image in panels])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write into")
    parser.add_argument("--model", default="tiny", help="a model's name, folder or file")
    wanted = parser.parse_args()

    decoder = pidecode.PixelDecoder.from_pretrained(wanted.model)
    rows = closeups(decoder, open_image(SAMPLES[0]), FACE), closeups(decoder, typed(), TYPE)
    sheet = Image.new("RGB", (rows[0].width, sum(row.height for row in rows)))
    sheet.paste(rows[0], (0, 0))
    sheet.paste(rows[1], (0, rows[0].height))
    wanted.out.mkdir(parents=True, exist_ok=True)
    path = wanted.out / "latent-alone.webp"
    sheet.save(path, quality=85, method=6)
    print(f"Eyes and type, side by side: {path.resolve()}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, pidecode.PidecodeError) as error:
        sys.exit(f"Error: {error}")
