# SPDX-License-Identifier: Apache-2.0
"""Gather images with free licenses: those of `photographs.jsonl` from git repositories, or Debian's wallpaper packages.

    python recipes/tiny/photographs.py --out photographs
    pip install python-debian
    python recipes/tiny/photographs.py --out wallpapers --debian

`photographs.jsonl` names repository, commit, file, license and author of each image; the repositories are cloned with
`git`, without the files that are not wanted. For `--debian` (needs Debian or a derivative) packages are downloaded with
`apt-get`, each one's copyright file is read, and what it puts under CC0, the public domain, CC-BY or CC-BY-SA is kept.
`OUT/manifest.jsonl` then lists every image with its source; `OUT/ATTRIBUTION.md` has the credits, which must travel
with weights trained on them.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import io
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageOps

from pidecode.files import atomic_write, writable_folder

PACKAGES = (
    "gnome-backgrounds", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds",
    "plasma-workspace-wallpapers", "sway-backgrounds", "ukui-wallpapers",
)  # fmt: skip
FREE = re.compile(r"(CC0|CC-BY|CC-BY-SA)(-\d\.\d)?|public[- ]domain", re.IGNORECASE)
ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp"})
STRONG, LIGHT = 0.8, 1.5  # bits per pixel below which compression has left strong artifacts, and light ones
MIN_SIDE, MAX_SIDE = 512, 1152  # the short side: smaller sources are left out, larger ones reduced
REPOSITORIES = "https://github.com/"
LIST = Path(__file__).with_name("photographs.jsonl")


def resized(file: BinaryIO | Path, bits_per_pixel: float | None = None) -> Image.Image | None:
    """An image in RGB, reduced to MAX_SIDE and to an aspect of at most 2:1; None if it is smaller than MIN_SIDE.

    Strongly compressed files, those of few bits per pixel, are reduced further, and their artifacts with them.
    """
    with Image.open(file) as opened:
        image = ImageOps.exif_transpose(opened)
        if image.mode != "RGB":
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    side = min(image.size)
    limit = min(MAX_SIDE, side)
    if bits_per_pixel is not None and bits_per_pixel < LIGHT:
        limit = min(limit, round((0.6 if bits_per_pixel < STRONG else 0.8) * side))
    if limit < MIN_SIDE:
        return None
    if limit < side:
        size = (round(image.width * limit / side), round(image.height * limit / side))
        image = image.resize(size, Image.Resampling.LANCZOS)
    longest = 2 * min(image.size)
    return ImageOps.fit(image, (min(image.width, longest), min(image.height, longest)))


def from_repository(repository: str, rows: Iterable[dict[str, Any]], out: Path, base: str) -> Iterator[dict[str, Any]]:
    """Write the listed images of a repository to `out`; a manifest row for each."""
    with tempfile.TemporaryDirectory() as folder:
        clone = ["git", "clone", "--quiet", "--bare", "--filter=blob:none", f"{base}{repository}", folder]
        subprocess.run(clone, check=True)
        for row in rows:
            show = ["git", "--git-dir", folder, "show", f"{row['commit']}:{row['path']}"]
            content = subprocess.run(show, check=True, capture_output=True).stdout
            if (found := hashlib.sha256(content).hexdigest()) != row["sha256"]:
                raise ValueError(
                    f"{row['path']} has the SHA-256 {found}, and {LIST.name} names {row['sha256']}: it is another file "
                    "than the listed one; clone from a mirror that has it (--repositories), or delete its line"
                )
            with Image.open(io.BytesIO(content)) as image:
                bits = 8 * len(content) / (image.width * image.height) if image.format in ("JPEG", "WEBP") else None
            pixels = resized(io.BytesIO(content), bits)
            if pixels is None:
                continue
            with atomic_write(out / row["file"], overwrite=True) as file:
                pixels.save(file, "WEBP", quality=92)
            yield {**row, "category": "photograph", "repository": repository}


def unpack(package: str, folder: Path) -> str:
    """Download and unpack a package into `folder`; its version."""
    subprocess.run(["apt-get", "download", "-q", package], cwd=folder, check=True, capture_output=True)
    archive = next(folder.glob(f"{package}_*.deb"))
    subprocess.run(["dpkg-deb", "-x", archive, folder / package], check=True)
    query = ["dpkg-deb", "-f", str(archive), "Version"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()


def licenses(copyright_file: Path) -> list[tuple[re.Pattern[str], str, str]]:
    """(pattern of the files, license, holder) of each paragraph of a machine-readable copyright file, last one first.

    Raises:
        ValueError: The file is prose.
    """
    from debian.copyright import Copyright, NotMachineReadableError

    try:
        with open(copyright_file, encoding="utf-8") as file:
            parsed = Copyright(file, strict=False)
    except NotMachineReadableError:
        raise ValueError("its copyright file is prose") from None
    found = []
    for paragraph in parsed.all_files_paragraphs():
        # Paths are those of the source package; in the binary package the last part is what stays.
        names = [Path(name).name for name in paragraph.files if not name.startswith("debian/")]
        pattern = "|".join(re.escape(name).replace(r"\*", ".*").replace(r"\?", ".") for name in names)
        found.append((re.compile(pattern), paragraph.license.synopsis, " ".join(paragraph.copyright.split())))
    return found[::-1]


def from_package(package: str, out: Path) -> Iterator[dict[str, Any]]:
    """Write the free images of a package to `out`; a manifest row for each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        version = unpack(package, folder)
        paragraphs = licenses(folder / package / "usr/share/doc" / package / "copyright")
        for path in sorted((folder / package).rglob("*")):
            if path.suffix.lower() not in ENDINGS or path.is_symlink() or path.stem.startswith("screenshot"):
                continue
            match = next((row for row in paragraphs if row[0].fullmatch(path.name)), None)
            if match is None or not FREE.fullmatch(match[1]):
                continue
            pixels = resized(path)
            if pixels is None:
                continue
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            target = f"{package}_{path.stem}_{digest[:6]}.webp"
            with atomic_write(out / target, overwrite=True) as file:
                pixels.save(file, "WEBP", quality=92)
            source = path.relative_to(folder / package).as_posix()
            yield {"file": target, "category": "wallpaper", "package": package, "version": version, "source": source,
                   "sha256": digest, "license": match[1], "author": match[2]}  # fmt: skip


def attribution(rows: Iterable[dict[str, Any]]) -> str:
    """Credits in Markdown: those that a license requires, and of other images the sources."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if "package" in row:
            source, path = f"Debian {row['package']} {row['version']}", row["source"]
        else:
            source, path = f"{REPOSITORIES}{row['repository']}", row["path"]
        groups.setdefault((source, row["license"], row["author"]), []).append(path)
    required, others = [], collections.Counter[str]()
    for (source, license_name, author), paths in groups.items():
        if license_name.upper().startswith("CC-BY"):
            listed = ", ".join(f"`{path}`" for path in paths)
            required.append(f"- {author}. {license_name}. Source: {source}: {listed}\n")
        else:
            others[f"{source}, {license_name}"] += len(paths)
    return (
        "## Required (CC-BY, CC-BY-SA)\n\nChanges to all of them: resized or cropped, re-encoded as WebP.\n\n"
        + "".join(required)
        + "\n## Courtesy credits (CC0, public domain), with the number of images\n\n"
        + "".join(f"- {source}: {count}\n" for source, count in others.items())
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the photographs")
    parser.add_argument("--debian", action="store_true", help="from Debian's packages, not the listed repositories")
    parser.add_argument("--repositories", default=REPOSITORIES, help="what owner/name is appended to, for a mirror")
    given = parser.parse_args()
    out = writable_folder(given.out)
    listed = [] if given.debian else [json.loads(line) for line in LIST.read_text(encoding="utf-8").splitlines()]
    sources: list[tuple[str, Iterator[dict[str, Any]]]] = [
        (name, from_repository(name, list(rows), out, given.repositories))
        for name, rows in itertools.groupby(listed, key=lambda row: row["repository"])
    ]
    if given.debian:
        sources = [(package, from_package(package, out)) for package in PACKAGES]
    rows: dict[str, dict[str, Any]] = {}
    for name, images in sources:
        before = len(rows)
        try:
            for row in images:
                rows.setdefault(row["sha256"], row)
        except (ValueError, subprocess.CalledProcessError) as fault:
            print(f"{name}: stopped after {len(rows) - before} images, {fault}", file=sys.stderr)
            continue
        print(f"{name}: {len(rows) - before} images")
    with atomic_write(out / "manifest.jsonl", overwrite=True) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows.values()).encode())
    with atomic_write(out / "ATTRIBUTION.md", overwrite=True) as file:
        file.write(f"# Attribution\n\n{attribution(rows.values())}".encode())


if __name__ == "__main__":
    main()
