# SPDX-License-Identifier: Apache-2.0
"""Hostile and broken images, latents and places to write: one clear error each, nothing left behind."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pidecode.errors import FileError, ImageError, LatentError, SettingError
from pidecode.files import atomic_write, check_writable
from pidecode.images import load_image, load_tensor, read_metadata, save_image
from pidecode.latents.latent import Latent
from pidecode.latents.layout import LatentStatistics


def png_bytes(width: int = 64, height: int = 64) -> bytes:
    buffer = io.BytesIO()
    array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header claims an image of any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")


# Images


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "GIF"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_cut_off_images(kind: str, share: float) -> None:
    buffer = io.BytesIO()
    Image.open(io.BytesIO(png_bytes())).save(buffer, kind)
    data = buffer.getvalue()
    with pytest.raises(ImageError):
        load_image(data[: int(len(data) * share)])


@pytest.mark.parametrize(
    "data",
    [b"", b"\0" * 100, b"GIF89a", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n",
     pickle.dumps({"a": 1}), b"\x89PNG\r\n\x1a\n" + b"\xff" * 64],
)  # fmt: skip
def test_what_is_no_image(data: bytes) -> None:
    with pytest.raises(ImageError):
        load_image(data)


@pytest.mark.parametrize("side", [8_300, 9_500, 60_000])
def test_image_bombs_are_refused_by_their_header(side: int) -> None:
    with pytest.raises(ImageError, match=r"the limit is 67,108,864|too large"):
        load_image(bomb(side, side))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (b"iVBORw0KGgoAAAANSUhEUg", "base64 text, not the image itself; decode it first"),
        (b"data:image/png;base64,iVBORw0KGgo", "base64 text, not the image itself"),
        (b'{"image": "iVBORw0KGgo"}', "is JSON text; give the image itself"),
    ],
)
def test_files_that_downloads_leave_are_named(data: bytes, said: str) -> None:
    with pytest.raises(ImageError, match=said):
        load_image(data)


def test_a_pillow_image_whose_file_is_closed_or_cut_off() -> None:
    closed = Image.open(io.BytesIO(png_bytes()))
    closed.close()
    cut = Image.open(io.BytesIO(png_bytes()[:-400]))
    for image in (closed, cut):
        with pytest.raises(ImageError, match="damaged or truncated"):
            load_image(image)


def test_the_limit_is_the_callers() -> None:
    with pytest.raises(ImageError, match="64x64 = 4,096 pixels; the limit is 4,095"):
        load_image(png_bytes(), max_pixels=4095)
    assert load_image(png_bytes(), max_pixels=4096).size == (64, 64)


def test_damaged_images_never_raise_anything_else() -> None:
    data = bytearray(png_bytes())
    generator = np.random.default_rng(1)
    for _ in range(60):
        broken = bytearray(data)
        for place in generator.integers(8, len(data), 6):
            broken[place] = int(generator.integers(0, 256))
        with contextlib.suppress(ImageError):
            load_image(bytes(broken))


def test_values_of_unknown_range() -> None:
    for array in (np.zeros((4, 4), np.float32), np.full((4, 4), -7, np.int32)):
        buffer = io.BytesIO()
        Image.fromarray(array).save(buffer, "TIFF")
        with pytest.raises(ImageError, match="range is unknown"):
            load_image(buffer.getvalue())


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="does not exist"):
        load_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)
    with pytest.raises(ImageError, match="could not be opened|does not exist"):
        load_image("a\0b.png")
    with pytest.raises(ImageError, match="got int"):
        load_image(3)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="An empty name is no file"):
        load_image("")
    with pytest.raises(ImageError, match="does not exist .*expanduser"):
        load_image("~/none.png")
    with pytest.raises(ImageError, match="is an address, and nothing is fetched"):
        load_image("https://example.com/a.png")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="not a file"):
        load_image(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.full((1, 3, 4, 4), float("nan")), "NaN"),
        (torch.full((1, 3, 4, 4), float("inf")), "NaN or infinite"),
        (torch.full((1, 3, 4, 4), 200.0), r"between 200 and 200, and \(-1, 1\) is black and white.*value_range="),
        (torch.zeros(8, 9, 3), r"\[C, H, W\].*got \[8, 9, 3\].*permute\(2, 0, 1\)"),
        (np.zeros((3, 8, 8)), r"\[H, W, C\].*got \[3, 8, 8\].*transpose\(1, 2, 0\)"),
        (torch.rand(1, 8, 9, 3), r"permute\(0, 3, 1, 2\)"),
        (np.zeros((8, 8, 5), np.uint8), r"got \[8, 8, 5\]\.$"),
        (torch.zeros(4, 4), r"\[C, H, W\]"),
        (torch.zeros(1, 3, 0, 4), r"\[C, H, W\]"),
        (torch.zeros(1, 3, 4, 4, dtype=torch.int64), "int64 values of an image have no known range"),
        (np.zeros((4, 4), object), "got object"),
    ],
)
def test_values_that_are_no_images(tensor: Any, message: str) -> None:
    with pytest.raises(ImageError, match=message):
        load_tensor(tensor)


def test_a_image_of_nan_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="NaN or infinite: the network overflowed"):
        save_image(tmp_path / "a.png", torch.full((1, 3, 4, 4), float("nan")))
    with pytest.raises(ImageError, match="batch of 2"):
        save_image(tmp_path / "a.png", torch.zeros(2, 3, 4, 4))
    with pytest.raises(ImageError, match="float64"):
        save_image(tmp_path / "a.png", np.zeros((4, 4, 3)))
    assert not list(tmp_path.iterdir())


# Recipes


def with_text(text: bytes, *, spoil: bool = False) -> bytes:
    data = png_bytes(8, 8)
    body = b"iTXtpidecode\0\0\0\0\0" + text
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body) ^ int(spoil))
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize("text", [b"{", b"[1, 2]", b"[" * 100_000, b"\xff\xfe"])
def test_damaged_recipes(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(with_text(text))
    with pytest.raises(ImageError, match="metadata in .* is damaged"):
        read_metadata(path)


def test_metadata_of_broken_files(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(with_text(b"{}", spoil=True))
    with pytest.raises(ImageError, match="checksum"):
        read_metadata(path)
    path.write_bytes(png_bytes()[:-20])
    with pytest.raises(ImageError, match="truncated"):
        read_metadata(path)
    path.write_bytes(b"hello")
    with pytest.raises(ImageError, match="not an image of a known format"):
        read_metadata(path)
    with pytest.raises(ImageError, match="is a folder"):
        read_metadata(tmp_path)


# Places to write


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="is a folder"):
        check_writable(tmp_path)
    with pytest.raises(FileError, match="create it first"):
        check_writable(tmp_path / "none" / "a.png")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="not a regular file"):
        check_writable(tmp_path / "pipe", overwrite=True)


def write_then(path: Path, act: Callable[[], object]) -> None:
    with atomic_write(path) as file:
        file.write(b"ours")
        act()


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_a_failed_write_leaves_nothing(tmp_path: Path, fault: type[BaseException]) -> None:
    def fail() -> None:
        raise fault

    with pytest.raises(fault):
        write_then(tmp_path / "a", fail)
    assert not list(tmp_path.iterdir())


def test_a_full_disk(tmp_path: Path) -> None:
    def fail() -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(FileError, match="could not be written: No space left"):
        write_then(tmp_path / "a", fail)
    assert not list(tmp_path.iterdir())


def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="created by another process"):
        write_then(tmp_path / "a", lambda: (tmp_path / "a").write_bytes(b"theirs"))
    assert (tmp_path / "a").read_bytes() == b"theirs"
    assert len(list(tmp_path.iterdir())) == 1


def test_overwriting_goes_through_links(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_write(tmp_path / "link", overwrite=True) as file:
        file.write(b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


# Latents in memory


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("tensor", "space", "message"),
    [
        (draw(1, 16, 24), "flux", r"unsqueeze\(0\)"),
        (draw(1, 24, 64), "flux", "from_packed"),
        (draw(1, 24, 128), "flux2", "from_packed"),
        (draw(1, 16, 1, 4, 4), "qwenimage", r"squeeze\(2\)"),
        (draw(16), "flux", "four-dimensional"),
        (draw(1, 4, 4, 4), "flux", "Latents of sdxl have that many"),
        (draw(1, 5, 4, 4), "flux", "has 16 channels; got 5"),
        (draw(1, 32, 4, 4), "flux2", "raw form: build it with Latent.from_raw"),
        (draw(0, 16, 4, 4), "flux", "empty"),
        (torch.full((1, 16, 4, 4), float("nan")), "flux", "256 of 256 values of the latent are NaN"),
        (torch.full((1, 16, 4, 4), float("-inf")), "flux", "NaN or infinite"),
        (torch.zeros(1, 16, 4, 4, dtype=torch.int64), "flux", r"Convert it with .float\(\)"),
        (np.zeros((1, 16, 4, 4)), "flux", "torch.as_tensor"),
    ],
)
def test_tensors_that_are_no_latents(tensor: Any, space: str, message: str) -> None:
    with pytest.raises(LatentError, match=message):
        Latent(tensor, space)


@pytest.mark.parametrize(
    ("sigma", "message"),
    [
        (-0.1, r"in \[0, 1\]; got -0.1"), (1.5, "divided by 1000"), (999.0, "divided by 1000"),
        (float("nan"), "got nan"), (torch.tensor([0.1, 1.1]), "got 1.1"), (torch.zeros(3), "3 values for 2"),
        ("0.5", "got '0.5'"), (True, "got True"), (None, "got None"), (["a", "b"], "one per sample"),
    ],
)  # fmt: skip
def test_sigmas_that_are_none(sigma: Any, message: str) -> None:
    with pytest.raises(LatentError, match=message):
        Latent(draw(2, 16, 4, 4), "flux", sigma)


@pytest.mark.parametrize(("prompt", "message"), [(["a"], "1 prompts for 2"), (7, "got 7"), ([1, 2], "one per sample")])
def test_prompts_that_are_none(prompt: Any, message: str) -> None:
    with pytest.raises(LatentError, match=message):
        Latent(draw(2, 16, 4, 4), "flux", prompt=prompt)


def test_seeds_and_spaces_that_are_none() -> None:
    with pytest.raises(LatentError, match="whole number"):
        Latent(draw(1, 16, 4, 4), "flux", seed=1.5)  # type: ignore[arg-type]
    with pytest.raises(SettingError, match="Did you mean flux"):
        Latent(draw(1, 16, 4, 4), "fluxx")


def test_raw_latents_that_do_not_fit() -> None:
    with pytest.raises(LatentError, match="pass them as statistics"):
        Latent.from_raw(draw(1, 32, 4, 4), "flux2")
    short = LatentStatistics(mean=torch.zeros(32), variance=torch.ones(32))
    with pytest.raises(LatentError, match=r"must be \[128\]; got \[32\]"):
        Latent.from_raw(draw(1, 32, 4, 4), "flux2", statistics=short)
    negative = LatentStatistics(mean=torch.zeros(128), variance=-torch.ones(128))
    with pytest.raises(LatentError, match="negative or NaN"):
        Latent.from_raw(draw(1, 32, 4, 4), "flux2", statistics=negative)
    with pytest.raises(LatentError, match="multiples of 2"):
        Latent.from_raw(draw(1, 32, 5, 4), "flux2", statistics=short)
    with pytest.raises(LatentError, match="as the space's own encoder returns it"):
        Latent.from_raw(draw(1, 4, 4, 4), "flux")
    with pytest.raises(LatentError, match=r"Convert it with .float\(\)"):
        Latent.from_raw(torch.zeros(1, 16, 4, 4, dtype=torch.uint8), "flux")


# Latent files


def write_safetensors(path: Path, header: Any, data: bytes = b"", *, length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {"format": 1, "space": "flux", "frame": "normalized", "sigma": [0.0], "prompt": None, "seed": None}


@pytest.mark.parametrize(
    ("header", "data", "length", "message"),
    [
        (b"", b"", None, "cut off"),
        (b"{}", b"", 1 << 62, "cut off"),
        (b" " * (1 << 21), b"", None, "at most 1,048,576"),
        (b"not json at all", b"", None, "no readable"),
        (b"\xff\xfe\xfd", b"", None, "not UTF-8"),
        (b"[" * 100_000, b"", None, "nested"),
        (b"[1, 2, 3]", b"", None, "not a JSON object"),
        ({"__metadata__": [1], "latent": entry([1], 0, 4)}, b"0000", None, "table of strings"),
        ({"latent": entry([1, 16, 4, 4], 0, 1024)}, b"0" * 1000, None, "is truncated"),
        ({"latent": entry([1, 16, 400, 400], 0, 1024)}, b"0" * 1024, None, "'latent' of shape"),
        ({"latent": entry([-1, 16], 0, 64)}, b"0" * 64, None, "not whole numbers"),
        ({"latent": entry([10**30, 0], 0, 64)}, b"0" * 64, None, "more than 20 digits"),
        ({"latent": {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]}}, b"0000", None, "not whole numbers"),
        ({"latent": 3}, b"", None, "not by a JSON object"),
    ],
)
def test_lying_headers(tmp_path: Path, header: Any, data: bytes, length: int | None, message: str) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", header, data, length=length)
    with pytest.raises(FileError, match=message):
        Latent.load(path, space="flux")


def test_pickles_are_not_opened(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "trapped"),)

    path = tmp_path / "a.safetensors"
    path.write_bytes(pickle.dumps(Trap()) + bytes(200))
    with pytest.raises(FileError):
        Latent.load(path, space="flux")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.99])
def test_cut_off_latents(tmp_path: Path, share: float) -> None:
    path = tmp_path / "a.safetensors"
    Latent(draw(1, 16, 4, 4), "flux").save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FileError):
        Latent.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 2}, "Update pidecode"),
        ({"space": "flux9"}, "says space 'flux9'; it must be one of flux"),
        ({"space": ["flux"]}, "must be one of"),
        ({"frame": "raw"}, "says frame 'raw'"),
        ({"sigma": [1.5]}, "says sigma"),
        ({"sigma": 0.0}, "says sigma"),
        ({"sigma": [0.0, 0.0]}, "contradicts itself"),
        ({"prompt": ["a", "b"]}, "must be a text per sample"),
        ({"seed": "x"}, "seed"),
        ({"space": "sdxl"}, "has 4 channels; got 16"),
    ],
)
def test_records_that_lie(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"latent": draw(1, 16, 4, 4)}, path, {"pidecode_latent": json.dumps({**GOOD, **changes})})
    with pytest.raises(LatentError, match=message):
        Latent.load(path)


def test_latent_files_of_other_makers(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"z": draw(1, 16, 4, 4)}, path)
    with pytest.raises(LatentError, match=r"Latent\.load\(path, space=\.\.\.\)") as caught:
        Latent.load(path)
    assert "Latent.load" not in caught.value.message("cli") + caught.value.message("http")
    assert "--space NAME" in caught.value.message("cli") and "space=NAME" in caught.value.message("http")
    assert Latent.load(path, space="flux", sigma=0.5).sigma == 0.5
    save_file({"a": draw(1, 16, 4, 4), "b": draw(1, 16, 4, 4)}, path)
    with pytest.raises(LatentError, match="must hold one tensor"):
        Latent.load(path, space="flux")
    save_file({"latent": torch.zeros(1, 16, 4, 4, dtype=torch.int32)}, path)
    with pytest.raises(LatentError, match="is I32"):
        Latent.load(path, space="flux")
    save_file({"latent": draw(1, 16, 4, 4)}, path, {"pidecode_latent": "{"})
    with pytest.raises(LatentError, match="cannot be read"):
        Latent.load(path)
    save_file({"latent": torch.full((1, 16, 4, 4), float("nan"))}, path, {"pidecode_latent": json.dumps(GOOD)})
    with pytest.raises(LatentError, match="NaN"):
        Latent.load(path)


def test_latent_paths_that_lead_nowhere(tmp_path: Path) -> None:
    for path in (tmp_path / "none", tmp_path, "a\0b"):
        with pytest.raises(FileError):
            Latent.load(path)
    with pytest.raises(FileError, match="create it first"):
        Latent(draw(1, 16, 4, 4), "flux").save(tmp_path / "none" / "a.safetensors")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data:image/png;base64," + "iVBO" * 9000, "is a data URL; give its bytes"),
        ("/9j/" + "4AAQ" * 9000, "is base64"),
    ],
)
def test_an_image_in_base64_is_named_without_being_printed(text: str, expected: str) -> None:
    with pytest.raises(ImageError, match=expected) as caught:
        load_image(text)
    assert len(str(caught.value)) < 200
