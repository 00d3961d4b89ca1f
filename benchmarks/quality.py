# SPDX-License-Identifier: Apache-2.0
"""How good decoders' images are: held-out images, quarter size, encoded, decoded, compared with the originals.

    python benchmarks/quality.py --taef2 FOLDER --data IMAGES --decoder tiny --decoder new=weights/tiny.safetensors

From a latent alone stand beside each decoder taef2's decode enlarged by Lanczos and by Real-ESRGAN; beside `upscale`,
which has the small image at hand, stand the same enlargements of that image. Real-ESRGAN takes part where the package
`ncnn` is installed and --models names a folder of its .param and .bin files. All decoders run in float32.

Without --data the images are free ones that scikit-image ships, and a page of type, and NIQE is left out. --sheet
writes crops to look at, the busiest of each image by gradient, so that nobody picks them by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

sys.path.append(str(Path(__file__).parent.parent))
sys.path.append(str(Path(__file__).parent.parent / "recipes" / "tiny"))
from real_esrgan import X4PLUS, RealESRGAN
from synthetic import synthetic_image
from taef2 import TinyAutoencoder

from benchmarks.judges import BLOCK, FeatureJudge, Niqe
from data import crop_to_multiple, held_out, quarter, read_manifest, to_signed
from pidecode import Latent, PixelDecoder, read_image
from pidecode.errors import PidecodeError, SettingError
from pidecode.files import atomic_write
from pidecode.images.tensors import to_pil
from pidecode.metrics import channel_error, psnr, sharpness, ssim

ENLARGERS = {"Real-ESRGAN x4plus": X4PLUS, "realesr-animevideov3": "realesr-animevideov3-x4"}
"""Networks of Real-ESRGAN, and their files' names."""
ORIGINAL = "original"
COLUMNS = {
    "psnr": ("PSNR", ".2f"), "ssim": ("SSIM", ".3f"), "dists": ("DISTS-like", ".3f"), "lpips": ("LPIPS-like", ".3f"),
    "niqe": ("NIQE", ".2f"), "sharpness": ("sharpness", ".1f"), "color": ("color", ".2f"),
}  # fmt: skip
"""Numbers of a row: title and format. Color is the mean over channels of the error of the mean, in steps of 255."""
PRISTINE, PRISTINE_SIDE = 60, 768
"""Training images NIQE is fitted on, and the side of their middles."""
TITLE = 18
"""Height of a sheet's line of titles, in pixels."""


def middle(array: np.ndarray, side: int) -> np.ndarray:
    """The middle of an image, at most `side` pixels a side and a multiple of 64."""
    height, width = (min(side, extent) // 64 * 64 for extent in array.shape[:2])
    top, left = (array.shape[0] - height) // 2, (array.shape[1] - width) // 2
    return array[top : top + height, left : left + width]


def spread(names: Sequence[str], count: int) -> list[str]:
    """At most `count` names, evenly over all."""
    count = min(count, len(names))
    return [names[index * len(names) // count] for index in range(count)]


def read_middles(folder: Path, names: Sequence[str], side: int) -> Iterator[tuple[str, np.ndarray]]:
    """Images by name, center-cropped."""
    for name in names:
        with Image.open(folder / name) as image:
            yield name, middle(crop_to_multiple(image), side)


def free_images(side: int) -> Iterator[tuple[str, np.ndarray]]:
    """Middles of images that anyone may show, none of them used in training."""
    import skimage.data

    for name in ("astronaut", "chelsea", "coffee", "grass", "brick", "camera", "rocket"):
        yield name, middle(crop_to_multiple(Image.fromarray(getattr(skimage.data, name)())), side)
    for kind in ("text_page", "line_art", "gradients"):
        yield kind, synthetic_image(kind, side, 4711)


def rounded(image: Tensor) -> Tensor:
    """An image `[1, 3, H, W]` as a file of eight bits holds it, in [-1, 1]."""
    return ((image.float().clamp(-1, 1) + 1) * 127.5).round() / 127.5 - 1


def lanczos(image: Tensor) -> Tensor:
    """Four times the size by Pillow's Lanczos, from eight bits."""
    small = to_pil(rounded(image))
    size = (4 * small.width, 4 * small.height)
    return to_signed(np.array(small.resize(size, Image.Resampling.LANCZOS)))[None]


class Contenders:
    """All ways from a small image to a large one that are compared.

    Args:
        decoders: Decoders by the name they get in the table.
        autoencoder: taef2.
        enlargers: Networks of Real-ESRGAN by name.
        sigmas: Noise levels of latents that the decoders are shown as well.
    """

    def __init__(
        self,
        decoders: dict[str, PixelDecoder],
        autoencoder: TinyAutoencoder,
        enlargers: dict[str, RealESRGAN],
        sigmas: Sequence[float] = (),
    ) -> None:
        self.decoders, self.autoencoder, self.enlargers, self.sigmas = decoders, autoencoder, enlargers, sigmas

    def images(self, small: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Every contender's image `[1, 3, 4h, 4w]` of a small one `[1, 3, h, w]`, named."""
        with torch.inference_mode():
            raw = self.autoencoder.encode(small)
            decoded = self.autoencoder.decode(raw)
        latent = Latent(tensor=torch.nn.functional.pixel_unshuffle(raw, 2), space="flux2", sigma=0.0)
        for name, decoder in self.decoders.items():
            yield f"{name}, taef2's latent", _decode(decoder, latent)
            yield (
                f"{name}, its encoder's latent",
                _decode(decoder, decoder.encode(read_image(small, value_range=(-1, 1)))),
            )
        yield "taef2, Lanczos", lanczos(decoded)
        for title, enlarge in self.enlargers.items():
            yield f"taef2, {title}", enlarge(decoded)
        for name, decoder in self.decoders.items():
            yield f"{name} upscale", decoder.upscale(read_image(small, value_range=(-1, 1)), **_seed(decoder)).tensor
        for title, enlarge in self.enlargers.items():
            yield title, enlarge(small)
        yield "Lanczos", lanczos(small)
        for name, decoder in self.decoders.items():
            for sigma in self.sigmas:
                yield f"{name}, sigma {sigma:g}", _decode(decoder, latent.noised(sigma, seed=1))

    def encoder_error(self, decoder: PixelDecoder, small: Tensor) -> dict[str, float]:
        """How near a decoder's encoder comes to taef2: PSNR through taef2's decoder, and relative error of latents."""
        with torch.inference_mode():
            raw = self.autoencoder.encode(small)
            own = torch.nn.functional.pixel_shuffle(
                decoder.encode(read_image(small, value_range=(-1, 1))).tensor.float(), 2
            )
            found = psnr(self.autoencoder.decode(own), self.autoencoder.decode(raw)).item()
        return {"psnr": found, "relative": ((own - raw).norm() / raw.norm()).item()}


def _seed(decoder: PixelDecoder) -> dict[str, Any]:
    return {} if decoder.kind == "feed-forward" else {"seed": 0}


def _decode(decoder: PixelDecoder, latent: Latent) -> Tensor:
    return decoder.decode(latent, **_seed(decoder)).tensor


def measure(image: Tensor, original: Tensor, judge: FeatureJudge, niqe: Niqe | None) -> dict[str, float]:
    """All the numbers of one image."""
    numbers = {"sharpness": sharpness(image).item()}
    if niqe is not None and min(image.shape[-2:]) >= BLOCK:
        numbers["niqe"] = niqe(image)
    if image is not original:
        numbers |= {"psnr": psnr(image, original).item(), "ssim": ssim(image, original).item()}
        numbers |= judge.distances(image, original)
        numbers["color"] = channel_error(image, original).abs().mean().item()
    return numbers


Table = dict[str, dict[str, dict[str, float]]]
"""Numbers by image, contender and measure."""


def means(table: Table) -> dict[str, dict[str, float]]:
    """Means over images, by contender and measure."""
    result: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(name for found in table.values() for name in found):
        rows = [found[name] for found in table.values() if name in found]
        keys = dict.fromkeys(key for row in rows for key in row)
        result[name] = {key: float(np.nanmean([row[key] for row in rows if key in row])) for key in keys}
    return result


def format_table(table: Table) -> str:
    """The means as Markdown; of noisy latents also how far the DISTS-like distance lies above the clean latent's."""
    found = means(table)
    lines = [
        f"| {len(table)} images | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|---|" + "--:|" * len(COLUMNS),
    ]
    notes = []
    for name, row in found.items():
        if name.endswith("'s encoder"):
            notes.append(f"{name}: {row['psnr']:.2f} dB through taef2's decoder, relative error {row['relative']:.3f}")
            continue
        cells = (format(row[key], spec) if key in row else "" for key, (_, spec) in COLUMNS.items())
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        decoder, noisy, sigma = name.rpartition(", sigma ")
        if noisy:
            above = row["dists"] - found[f"{decoder}, taef2's latent"]["dists"]
            worst = max(rows[name]["color"] for rows in table.values())
            notes.append(
                f"{decoder} at sigma {sigma}: DISTS-like {above:+.3f} above the clean latent's; "
                f"color {row['color']:.2f}, at worst {worst:.2f}"
            )
    return "\n".join([*lines, "", *notes])


def busiest(image: Tensor, side: int) -> tuple[int, int]:
    """Top left corner of the window of `side` pixels with the largest mean gradient, on a grid of half windows."""
    luma = image.mean(1, keepdim=True)
    across, down = luma.diff(dim=-1)[..., 1:, :].abs(), luma.diff(dim=-2)[..., 1:].abs()
    gradients = torch.nn.functional.avg_pool2d(across + down, side, stride=side // 2)[0, 0]
    row, column = divmod(int(gradients.argmax()), gradients.shape[1])
    return row * side // 2, column * side // 2


class Sheet:
    """Crops side by side: a row an image, a column a contender.

    Args:
        window: Side of a crop, in pixels.
        columns: Contenders to show, in this order; by default all.
    """

    def __init__(self, window: int, columns: Sequence[str] = ()) -> None:
        self.window, self.columns = window, list(columns)
        self.rows: list[list[Tensor]] = []

    def add(self, shown: dict[str, Tensor]) -> None:
        """Add a row.

        Raises:
            SettingError: A column is no contender.
        """
        self.columns = self.columns or list(shown)
        unknown = [name for name in self.columns if name not in shown]
        if unknown:
            raise SettingError(f"--columns names {unknown[0]!r}; there are {', '.join(shown)}.")
        original = shown[ORIGINAL]
        window = min(self.window, original.shape[-2] - 1, original.shape[-1] - 1)
        top, left = busiest(original, window)
        self.rows.append([shown[name][..., top : top + window, left : left + window] for name in self.columns])

    def save(self, path: Path) -> None:
        """Write the sheet as PNG."""
        side = self.window
        sheet = Image.new("RGB", (side * len(self.columns), TITLE + side * len(self.rows)), "white")
        for column, title in enumerate(self.columns):
            ImageDraw.Draw(sheet).text((column * side + 4, 3), title, fill="black")
            for row, crops in enumerate(self.rows):
                sheet.paste(to_pil(crops[column]), (column * side, TITLE + row * side))
        with atomic_write(path, overwrite=True) as file:
            sheet.save(file, format="PNG")


def load_decoders(given: Sequence[str], encoder: Path | None) -> dict[str, PixelDecoder]:
    """Decoders by name, from "tiny", FILE or NAME=FILE."""
    found: dict[str, PixelDecoder] = {}
    for text in given:
        name, named, path = text.rpartition("=")
        decoder = PixelDecoder.from_pretrained(path, encoder=encoder, device="cpu", dtype=torch.float32)
        found[name if named else Path(path).stem] = decoder
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    line.add_argument("--taef2", type=Path, required=True, help="folder of taef2's two files")
    line.add_argument("--data", type=Path, help="folder of images, with manifest.jsonl if it has one")
    line.add_argument("--decoder", action="append", metavar="[NAME=]FILE", help="weights; repeatable; default tiny")
    line.add_argument("--encoder", type=Path, help="encoder of all decoders; by default the one that ships")
    line.add_argument("--models", type=Path, help="folder of Real-ESRGAN's .param and .bin files; needs ncnn")
    line.add_argument("--images", type=int, default=1000, help="at most this many held-out images, evenly over all")
    line.add_argument("--side", type=int, default=1024, help="largest side of an image, in pixels")
    line.add_argument("--sigma", type=float, nargs="*", default=(0.2, 0.4), help="noise levels of latents")
    line.add_argument("--json", type=Path, help="where to write every image's numbers")
    line.add_argument("--sheet", type=Path, help="where to write crops side by side, as PNG")
    line.add_argument("--columns", nargs="*", default=(), help="contenders on the sheet, by their names in the table")
    line.add_argument("--crops", type=int, default=20, help="rows of the sheet")
    line.add_argument("--window", type=int, default=224, help="side of a crop, in pixels")
    return line


def run(given: argparse.Namespace) -> Table:
    """Measure, and write what was asked for."""
    niqe = None
    chosen = free_images(given.side)
    if given.data is not None:
        categories = read_manifest(given.data)
        kept = held_out(categories)
        trained = sorted({name for group in categories.values() for name in group} - kept)
        chosen = read_middles(given.data, spread(sorted(kept), given.images), given.side)
        pristine = read_middles(given.data, spread(trained, PRISTINE), PRISTINE_SIDE)
        niqe = Niqe.fit(to_signed(array)[None] for _, array in pristine)
    enlargers = {title: RealESRGAN(given.models, name) for title, name in ENLARGERS.items()} if given.models else {}
    decoders = load_decoders(given.decoder or ["tiny"], given.encoder)
    contenders = Contenders(decoders, TinyAutoencoder.from_folder(given.taef2), enlargers, given.sigma)
    judge, table, sheet = FeatureJudge(), Table(), Sheet(given.window, given.columns)
    for name, array in chosen:
        started = time.monotonic()
        original, small = to_signed(array)[None], to_signed(quarter(array))[None]
        shown = {ORIGINAL: original} | {title: rounded(image) for title, image in contenders.images(small)}
        table[name] = {title: measure(image, original, judge, niqe) for title, image in shown.items()}
        for title, decoder in decoders.items():
            table[name][f"{title}'s encoder"] = contenders.encoder_error(decoder, small)
        print(f"{len(table)}. {name} {array.shape[1]}x{array.shape[0]}, {time.monotonic() - started:.0f} s", flush=True)
        if given.json is not None:
            with atomic_write(given.json, overwrite=True) as file:
                file.write(json.dumps(table, indent=1).encode())
        if given.sheet is not None and len(sheet.rows) < given.crops:
            sheet.add(shown)
            sheet.save(given.sheet)
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    try:
        print(format_table(run(parser().parse_args(arguments))))
    except PidecodeError as fault:
        sys.exit(str(fault))


if __name__ == "__main__":
    main()
