# SPDX-License-Identifier: Apache-2.0
"""Fill a folder with crops and what Real-ESRGAN makes of them, as targets of the decoder (`loss.real_esrgan`).

    pip install ncnn
    python recipes/tiny/targets.py --data PHOTOGRAPHS --taef2 FOLDER --models FOLDER --out runs/tiny/targets

A target is taef2's decode of the crop's latent, enlarged by Real-ESRGAN x4plus, with the decode's low frequencies: so
it holds nothing that the latent does not determine. The same command goes on where it was stopped; with `--part 1/2`
and `--part 2/2` two processes share the work. A crop takes a second of one CPU core, and 0.4 MB.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from losses import back_projected
from real_esrgan import X4PLUS, RealESRGAN
from taef2 import TinyAutoencoder

from data import CropLoader, TinyDataConfig, prepare_images
from pidecode.errors import PidecodeError, SettingError
from pidecode.files import atomic_write, writable_folder
from pidecode.images.tensors import to_array
from pidecode.training.noise import LatentNoiseConfig

BATCH = 4
"""Crops augmented together, so that one can be joined with another."""
CROPS = TinyDataConfig(crops=((256, BATCH, 1.0),), synthetic_share=0.15, recolor=0.25, join=0.07)
"""Size and augmentation of the crops."""


def fill(given: argparse.Namespace) -> int:
    """Make the crops that `given.out` lacks; returns how many."""
    enlarge, autoencoder = RealESRGAN(given.models, X4PLUS, given.threads), TinyAutoencoder.from_folder(given.taef2)
    writable_folder(given.out)
    config = replace(CROPS, source=str(given.data))
    cache = given.cache or given.out.parent / "images"
    for name, reason in prepare_images(config, cache, 0, print).items():
        print(f"Skipped {name}: {reason}")
    loader = CropLoader(
        config, LatentNoiseConfig(probability=0.0), cache, autoencoder.encode, device=torch.device("cpu"), seed=0
    )
    count, (part, parts) = 0, given.part
    for number in range(part - 1, -(-given.crops // BATCH), parts):
        paths = [given.out / f"{BATCH * number + index:06d}.npz" for index in range(BATCH)]
        if all(path.exists() for path in paths):
            continue
        batch, _, _ = loader.batch(number)
        small = autoencoder.decode(F.pixel_shuffle(batch.clean_latent, 2))
        for path, image, reduced in zip(paths, batch.image.split(1), small.split(1), strict=True):
            target = back_projected(enlarge(reduced), reduced)
            with atomic_write(path, overwrite=True) as file:
                np.savez(file, image=to_array(image), target=to_array(target))
        count += BATCH
        print(f"crop {BATCH * number + BATCH}, {given.crops} wanted", flush=True)
    return count


def parse_part(text: str) -> tuple[int, int]:
    """`2/3` as numbers.

    Raises:
        SettingError: It is no part of a whole.
    """
    part, _, parts = text.partition("/")
    if not (part.isdecimal() and parts.isdecimal() and 1 <= int(part) <= int(parts)):
        raise SettingError(f"--part is {text!r}; give a part of a whole, such as 1/2.")
    return int(part), int(parts)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of photographs")
    parser.add_argument("--taef2", type=Path, required=True, help="folder of taef2's two files")
    parser.add_argument("--models", type=Path, required=True, help=f"folder of {X4PLUS}.param and {X4PLUS}.bin")
    parser.add_argument("--out", type=Path, required=True, help="folder to fill")
    parser.add_argument("--cache", type=Path, help="folder of decoded images; by default `images` beside OUT")
    parser.add_argument("--crops", type=int, default=2400, help="crops in all; rounded up to a multiple of 4")
    parser.add_argument("--part", default="1/1", help="share of this process among several, such as 1/2")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    given = parser.parse_args(arguments)
    try:
        given.part = parse_part(given.part)
        torch.set_num_threads(given.threads)
        with torch.inference_mode():
            count = fill(given)
        print(f"{count} crops made; {len(list(given.out.glob('*.npz')))} are in {given.out}.")
    except PidecodeError as fault:
        sys.exit(str(fault))


if __name__ == "__main__":
    main()
