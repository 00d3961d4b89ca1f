# SPDX-License-Identifier: Apache-2.0
"""Synthetic images, rich in the edges, type and flat areas that photographs lack."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from pidecode.errors import SettingError

Pixels = NDArray[np.uint8]
Random = np.random.Generator

OVERSAMPLING = 2
"""Shapes are drawn this much larger and averaged down, so that edges are antialiased and targets stay clean."""

WORDS = [
    "light",
    "harbor",
    "window",
    "copper",
    "seven",
    "river",
    "paper",
    "quiet",
    "garden",
    "north",
    "engine",
    "lamp",
    "violet",
    "stone",
    "market",
    "winter",
    "bridge",
    "amber",
    "signal",
    "orchard",
    "velvet",
    "compass",
    "thunder",
    "ribbon",
    "meadow",
    "lantern",
    "cobalt",
    "pepper",
    "island",
    "Sphinx",
    "of",
    "black",
    "quartz",
    "judge",
    "my",
    "vow",
    "0123456789",
    "(42%)",
    "18.50",
    "A&B",
    "e.g.",
    "3/4",
    "17:45",
]
"""Words of text pages: letters of every kind, figures and signs."""


def _color(random: Random, *, muted: bool = False) -> tuple[int, int, int]:
    saturation = random.uniform(0, 0.35 if muted else 1.0)
    red, green, blue = colorsys.hsv_to_rgb(random.uniform(), saturation, random.uniform(0.05, 1.0))
    return round(255 * red), round(255 * green), round(255 * blue)


def _canvas(side: int, color: tuple[int, int, int]) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    image = Image.new("RGB", (side * OVERSAMPLING, side * OVERSAMPLING), color)
    return image, ImageDraw.Draw(image)


def _finish(image: Image.Image, side: int) -> Pixels:
    return np.array(image.resize((side, side), Image.Resampling.BOX))


def dead_leaves(side: int, random: Random) -> Pixels:
    """Overlapping discs, boxes and triangles with sizes from a power law: the statistics of natural occlusion."""
    image, draw = _canvas(side, _color(random))
    full = side * OVERSAMPLING
    for _ in range(int(random.integers(300, 1500))):
        radius = full * 0.004 / max(0.012, random.uniform()) ** random.uniform(0.6, 1.0)
        x, y, turn = random.uniform(0, full), random.uniform(0, full), random.uniform(0, math.tau)
        color = _color(random, muted=bool(random.uniform() < 0.6))
        kind = int(random.integers(0, 3))
        if kind == 0:
            draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
            continue
        corners = 4 if kind == 1 else 3
        turns = [turn + k * math.tau / corners for k in range(corners)]
        draw.polygon([(x + radius * math.cos(a), y + radius * math.sin(a)) for a in turns], fill=color)
    return _finish(image, side)


def gradients(side: int, random: Random) -> Pixels:
    """Smooth two-color ramps, bowls and waves, added up: flat areas, where a decoder must add no texture."""
    rows, columns = np.mgrid[0:side, 0:side] / side
    total = np.zeros((side, side, 3))
    for _ in range(int(random.integers(1, 4))):
        turn, center = random.uniform(0, math.tau), random.uniform(0, 1, 2)
        kind = int(random.integers(0, 3))
        along = columns * math.cos(turn) + rows * math.sin(turn)
        if kind == 1:
            along = np.hypot(columns - center[0], rows - center[1])
        elif kind == 2:
            along = 0.5 + 0.5 * np.sin(along * random.uniform(2, 20))
        share = np.clip((along - along.min()) / (np.ptp(along) + 1e-9), 0, 1)[..., None]
        total += np.array(_color(random)) * share + np.array(_color(random)) * (1 - share)
    total *= 255 / max(255.0, float(total.max()))
    dither = random.uniform(-0.5, 0.5, total.shape)
    return np.clip(np.round(total + dither), 0, 255).astype(np.uint8)


def line_art(side: int, random: Random) -> Pixels:
    """Strokes, arcs, grids and outlines of one to a dozen pixels on a plain ground, as drawings and plans have."""
    dark_on_light = bool(random.uniform() < 0.7)
    ground = (250, 248, 244) if dark_on_light else (18, 20, 26)
    image, draw = _canvas(side, ground)
    full = side * OVERSAMPLING
    for _ in range(int(random.integers(30, 160))):
        pen = int(random.integers(1, 13)) * OVERSAMPLING // 2
        color = _color(random) if random.uniform() < 0.4 else ((20, 20, 24) if dark_on_light else (235, 235, 230))
        kind = int(random.integers(0, 4))
        box = np.sort(random.uniform(0, full, (2, 2)), axis=0)
        if kind == 0:
            draw.line(
                [tuple(point) for point in random.uniform(0, full, (int(random.integers(2, 6)), 2))], color, max(1, pen)
            )
        elif kind == 1:
            draw.arc(tuple(box.flatten()), random.uniform(0, 360), random.uniform(0, 720), color, max(1, pen))
        elif kind == 2:
            draw.rectangle(tuple(box.flatten()), outline=color, width=max(1, pen))
        else:
            steps, gap = int(random.integers(3, 12)), random.uniform(6, 40) * OVERSAMPLING
            for k in range(steps):
                x = box[0, 0] + k * gap
                draw.line((x, box[0, 1], x, box[1, 1]), color, max(1, pen // 2))
    return _finish(image, side)


def fractal(side: int, random: Random) -> Pixels:
    """A window on a Julia set, colored smoothly: detail at every scale."""
    turn = random.uniform(0, math.tau)
    constant = 0.7885 * complex(math.cos(turn), math.sin(turn))
    span = random.uniform(0.6, 1.6)
    rows, columns = np.mgrid[0:side, 0:side] / side - 0.5
    z = (columns + 1j * rows) * 2 * span + complex(*random.uniform(-0.4, 0.4, 2))
    count = np.zeros(z.shape)
    for _ in range(60):
        inside = np.abs(z) < 8
        z = np.where(inside, z * z + constant, z)
        count += inside
    smooth = count - np.where(count < 60, np.log2(np.log2(np.maximum(np.abs(z), 2.0))), 0.0)
    phases, speeds = random.uniform(0, math.tau, 3), random.uniform(0.05, 0.35, 3)
    waves = 0.5 + 0.5 * np.sin(smooth[..., None] * speeds + phases)
    image: Pixels = np.round(255 * waves).astype(np.uint8)
    return image


def text_page(side: int, random: Random, fonts: Sequence[Path] = ()) -> Pixels:
    """Lines of words from 10 to 96 pixels high, some turned, in `fonts` or Pillow's own."""
    paper, ink = _color(random, muted=True), _color(random)
    if abs(sum(paper) - sum(ink)) < 240:
        paper, ink = ((252, 252, 250), (16, 16, 20)) if random.uniform() < 0.6 else ((14, 16, 22), (240, 240, 236))
    image, draw = _canvas(side, paper)
    full, y = side * OVERSAMPLING, 8.0 * OVERSAMPLING
    while y < full:
        height = float(np.exp(random.uniform(math.log(10), math.log(96)))) * OVERSAMPLING
        font = ImageFont.load_default(height)
        if fonts and random.uniform() < 0.8:
            font = ImageFont.truetype(str(fonts[int(random.integers(0, len(fonts)))]), height)
        color = ink if random.uniform() < 0.8 else _color(random)
        for _ in range(int(random.integers(1, 6))):
            words = random.choice(WORDS, size=max(2, int(2.2 * full / height / 5)))
            draw.text((random.uniform(4, 40) * OVERSAMPLING, y), " ".join(words), fill=color, font=font)
            y += height * random.uniform(1.1, 1.5)
            if y > full:
                break
    if random.uniform() < 0.3:
        image = image.rotate(random.uniform(-25, 25), Image.Resampling.BICUBIC, fillcolor=paper)
    return _finish(image, side)


KINDS: dict[str, Callable[[int, Random], Pixels]] = {
    "dead_leaves": dead_leaves,
    "gradients": gradients,
    "line_art": line_art,
    "fractal": fractal,
    "text_page": text_page,
}
"""Every kind of image, by name."""


def synthetic_image(kind: str, side: int, seed: int, fonts: Sequence[Path] = ()) -> Pixels:
    """An image uint8 `[side, side, 3]` of one of KINDS; the same arguments give the same pixels.

    `fonts` are TrueType files for text pages; without them Pillow's own is used.

    Raises:
        SettingError: The kind does not exist.
    """
    if kind not in KINDS:
        raise SettingError(f"There are no synthetic images of kind {kind!r}; known are {', '.join(KINDS)}.")
    random = np.random.default_rng([seed, list(KINDS).index(kind)])
    if kind == "text_page":
        return text_page(side, random, fonts)
    return KINDS[kind](side, random)
