# SPDX-License-Identifier: Apache-2.0
"""Gather photographs with free licenses from Debian's wallpaper packages.

    pip install python-debian
    python recipes/tiny/photographs.py --out photographs

Downloads the packages with `apt-get` (needs Debian or a derivative), reads each one's copyright file, and keeps the
images that it puts under CC0, the public domain, CC-BY or CC-BY-SA. `OUT/manifest.jsonl` lists package, version, file,
license and author of each; `OUT/ATTRIBUTION.md` has the credits, which must travel with weights trained on them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from pidecode.files import atomic_write, writable_folder

PACKAGES = (
    "gnome-backgrounds", "lomiri-wallpapers-16.04", "lomiri-wallpapers-20.04", "mate-backgrounds",
    "plasma-workspace-wallpapers", "sway-backgrounds", "ukui-wallpapers",
)  # fmt: skip
FREE = re.compile(r"(CC0|CC-BY|CC-BY-SA)(-\d\.\d)?|public-domain", re.IGNORECASE)
ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".webp"})
MIN_SIDE, MAX_SIDE = 768, 1152  # the short side: smaller sources are left out, larger ones reduced


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


def gather(package: str, out: Path) -> Iterator[dict[str, Any]]:
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
            with Image.open(path) as image:
                if min(image.size) < MIN_SIDE:
                    continue
                pixels = image.convert("RGB")
            scale = MAX_SIDE / min(pixels.size)
            if scale < 1:
                size = (round(pixels.width * scale), round(pixels.height * scale))
                pixels = pixels.resize(size, Image.Resampling.LANCZOS)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            target = f"{package}_{path.stem}_{digest[:6]}.webp"
            with atomic_write(out / target, overwrite=True) as file:
                pixels.save(file, "WEBP", quality=92)
            source = path.relative_to(folder / package).as_posix()
            yield {"file": target, "category": "wallpaper", "package": package, "version": version, "source": source,
                   "sha256": digest, "license": match[1], "author": match[2]}  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the photographs")
    given = parser.parse_args()
    out = writable_folder(given.out)
    rows: dict[str, dict[str, Any]] = {}
    for package in PACKAGES:
        before = len(rows)
        try:
            for row in gather(package, out):
                rows.setdefault(row["sha256"], row)
        except (ValueError, subprocess.CalledProcessError) as fault:
            print(f"{package}: left out, {fault}", file=sys.stderr)
            continue
        print(f"{package}: {len(rows) - before} images")
    with atomic_write(out / "manifest.jsonl", overwrite=True) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows.values()).encode())
    credits_ = (
        f"- `{row['file']}`: {row['author']}. {row['license']}. Source: Debian {row['package']} {row['version']} "
        f"({row['source']}). Changes: resized, re-encoded as WebP.\n"
        for row in rows.values()
    )
    with atomic_write(out / "ATTRIBUTION.md", overwrite=True) as file:
        file.write(("# Attribution\n\n" + "".join(credits_)).encode())


if __name__ == "__main__":
    main()
