# SPDX-License-Identifier: Apache-2.0
"""Images in and out: exact, upright, rounded, and back with their metadata."""

from __future__ import annotations

import io
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from safetensors.torch import load_file

from pidecode.errors import FileError, ImageError, SettingError, SizeError
from pidecode.images import (
    crop_back,
    image_size,
    load_image,
    load_tensor,
    read_image,
    read_metadata,
    resize,
    save_image,
    to_pil,
    to_tensor,
)
from pidecode.images.png import encode_png
from pidecode.images.tensors import center_crop, downsample, pad_to_multiple, to_array

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "inference_misc.safetensors"
METADATA = {"model": "tiny", "space": "flux2", "sigma": 0.25, "seed": 7, "prompt": 'Käse 猫 "quoted"', "size": [64, 96]}


def noise_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def smooth_image(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows % 256, columns % 256, (rows + columns) // 2 % 256], axis=-1).astype(np.uint8)


def bytes_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


# Against the reference


def test_downsample_agrees_with_the_reference() -> None:
    golden = load_file(GOLDEN)
    ours = downsample(golden["inputs.downsample4.image"], 4)
    torch.testing.assert_close(ours, golden["outputs.downsample4.lq"], rtol=0, atol=1e-5)


# Tensors


def test_tensor_round_trip_is_exact() -> None:
    array = noise_image(5, 7)
    array[0, :2] = [[0, 0, 0], [255, 255, 255]]
    tensor = to_tensor(Image.fromarray(array))
    assert tensor.shape == (1, 3, 5, 7)
    assert (tensor.min(), tensor.max()) == (-1.0, 1.0)
    assert np.array_equal(np.asarray(to_pil(tensor)), array)


def test_values_are_rounded_and_clamped() -> None:
    levels = torch.tensor([99.4, 99.6, -5.0, 300.0])
    image = (levels / 127.5 - 1).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    assert to_array(image)[..., 0].flatten().tolist() == [99, 100, 0, 255]


def test_sixteen_bits() -> None:
    image = torch.tensor([-1.0, 1.0, 0.5, 1e-4]).view(1, 1, 2, 2).expand(1, 3, 2, 2)
    array = to_array(image, bits=16)
    assert array.dtype == np.uint16
    assert array[..., 0].flatten().tolist() == [0, 65535, 49151, 32771]


def test_half_precision_is_widened_before_rounding() -> None:
    array = noise_image(8, 8)
    tensor = to_tensor(Image.fromarray(array)).half()
    assert np.array_equal(to_array(tensor), array)


def test_batches() -> None:
    assert [to_pil(image).size for image in torch.zeros(2, 3, 4, 6)] == [(6, 4), (6, 4)]


# Reading


def test_orientation() -> None:
    array = noise_image(4, 6)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it turned clockwise
    data = bytes_of(Image.fromarray(array), "PNG", exif=exif)
    assert np.array_equal(np.asarray(load_image(data)), np.rot90(array, -1))


def test_color_profile_to_srgb() -> None:
    array = np.full((4, 4, 3), 128, np.uint8)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    same = load_image(bytes_of(Image.fromarray(array), "PNG", icc_profile=srgb))
    assert np.abs(np.asarray(same).astype(int) - 128).max() <= 1
    # A profile that does not fit the image, and one that is no profile, are passed over.
    for profile in (lab, b"no profile at all"):
        kept = load_image(bytes_of(Image.fromarray(array), "PNG", icc_profile=profile))
        assert np.array_equal(np.asarray(kept), array)


def test_a_wide_color_space_changes_the_values() -> None:
    array = np.zeros((4, 4, 4), np.uint8)
    array[..., 0] = 200
    image = load_image(bytes_of(Image.fromarray(array, "CMYK"), "JPEG", quality=100))
    assert image.mode == "RGB"


def test_transparency_on_white() -> None:
    for mode, color in (("RGBA", (255, 0, 0, 0)), ("LA", (0, 0))):
        data = bytes_of(Image.new(mode, (3, 3), color), "PNG")
        assert np.asarray(load_image(data)).min() == 255
    half = np.asarray(load_image(bytes_of(Image.new("RGBA", (3, 3), (0, 0, 0, 128)), "PNG")))
    assert abs(int(half[0, 0, 0]) - 127) <= 1
    palette = Image.new("P", (3, 3), 0)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert load_image(bytes_of(palette, "PNG", transparency=0)).getpixel((0, 0)) == (255, 255, 255)
    assert load_image(bytes_of(palette, "PNG")).getpixel((0, 0)) == (10, 20, 30)


def test_gray_and_sixteen_bit_gray() -> None:
    gray = load_image(bytes_of(Image.new("L", (3, 3), 77), "PNG"))
    assert gray.getpixel((1, 1)) == (77, 77, 77)
    deep = np.array([[0, 65535], [32768, 257 * 100 + 120]], np.uint16)
    read = np.asarray(load_image(bytes_of(Image.fromarray(deep), "PNG")))
    assert read[..., 0].tolist() == [[0, 255], [128, 100]]
    assert load_image(bytes_of(Image.new("1", (3, 3), 1), "PNG")).getpixel((0, 0)) == (255, 255, 255)


def test_sources(tmp_path: Path) -> None:
    array = noise_image(4, 6)
    path = tmp_path / "a.png"
    Image.fromarray(array).save(path)
    tensor = to_tensor(Image.fromarray(array))
    used = io.BytesIO(path.read_bytes())
    used.read(7)  # from its start, wherever it stands
    whole = torch.from_numpy(array).permute(2, 0, 1)
    for source in (
        path, str(path), path.read_bytes(), bytearray(path.read_bytes()), used, Image.fromarray(array), tensor,
        tensor[0], array, array[None], whole, whole[None], read_image(tensor),
    ):  # fmt: skip
        assert np.array_equal(np.asarray(load_image(source)), array)
        torch.testing.assert_close(load_tensor(source), tensor)
    assert not used.closed
    with path.open("rb") as file:
        assert image_size(file) == load_image(file).size == (6, 4)
    with path.open() as text, pytest.raises(ImageError, match=r"open as text.*'rb'"):
        load_image(text)  # type: ignore[arg-type]


def test_arrays_and_tensors_of_every_depth_and_number_of_channels() -> None:
    deep = np.array([[[0, 65535, 32768, 65535]]], np.uint16)
    image = read_image(deep)
    assert image.alpha is not None
    assert image.alpha.flatten().tolist() == [1]
    torch.testing.assert_close(image.tensor.flatten(), torch.tensor([-1, 1, 2 * 32768 / 65535 - 1]))
    swapped = deep.astype(">u2")[:, ::-1]
    swapped.flags.writeable = False
    assert torch.equal(read_image(swapped).tensor, image.tensor)  # one pixel
    gray = read_image(np.full((2, 3), 255, np.uint8))
    assert gray.gray
    assert repr(gray) == "SourceImage(1 of 3x2, gray)"
    assert gray.tensor.shape == (1, 3, 2, 3)
    assert read_image(torch.zeros(1, 2, 3, dtype=torch.uint8)).gray
    half = read_image(np.full((2, 3, 4), 0.5, np.float16), value_range=(0, 1))
    assert half.tensor.abs().max() == 0
    assert half.alpha is not None
    assert half.alpha.unique().tolist() == [0.5]


@pytest.mark.parametrize("values", [np.random.default_rng(0).random((8, 9, 3), np.float32), torch.rand(2, 3, 8, 9)])
def test_values_from_0_to_1_are_not_taken_for_values_from_minus_1(values: Any) -> None:
    with pytest.raises(ImageError, match=r"may be in \[0, 1\], and \[-1, 1\] is expected.*value_range="):
        read_image(values)
    with pytest.raises(ImageError, match="may be in"):
        read_image(values - 0.02)  # a resize overshoots
    expected = load_tensor(values * 2 - 1)
    torch.testing.assert_close(read_image(values, value_range=(0, 1)).tensor, expected)
    torch.testing.assert_close(read_image(values * 255, value_range=(0, 255)).tensor, expected)
    assert read_image(values, value_range=(-1, 1)).tensor.min() >= 0  # a bright image, by choice


def test_a_value_range_that_cannot_act_is_refused(tmp_path: Path) -> None:
    for source in (np.zeros((2, 2), np.uint8), tmp_path / "a.png", Image.new("L", (2, 2))):
        with pytest.raises(SettingError, match="value_range"):
            read_image(source, value_range=(0, 1))
    with pytest.raises(SettingError, match=r"value_range is \(1, 0\)"):
        read_image(np.zeros((2, 2)), value_range=(1, 0))


@pytest.mark.parametrize(
    ("name", "what"), [("a.gif", "frames"), ("a.webp", "frames"), ("a.png", "frames"), ("a.tif", "pages")]
)
def test_several_frames_are_refused_with_their_number(tmp_path: Path, name: str, what: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue", "white")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.raises(ImageError, match=f"3 {what}"):
        load_image(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        image.seek(1)
        assert load_image(image.copy()).getpixel((0, 0))[2] > 200


# Sizes


def test_center_crop() -> None:
    image = torch.arange(3 * 35 * 50, dtype=torch.float32).view(1, 3, 35, 50)
    cropped = center_crop(image, 16)
    assert torch.equal(cropped, image[:, :, 1:33, 1:49])
    with pytest.raises(SizeError, match="at least 64x64"):
        center_crop(image, 64)
    with pytest.raises(SettingError, match="multiples of a positive number; got 0"):
        center_crop(image, 0)


@pytest.mark.parametrize(("height", "width"), [(35, 50), (3, 17), (1, 1), (32, 48)])
def test_pad_and_crop_back(height: int, width: int) -> None:
    image = torch.rand(1, 3, height, width)
    padded, padding = pad_to_multiple(image, 16)
    assert padded.shape[2] % 16 == padded.shape[3] % 16 == 0
    assert torch.equal(padded[..., :height, :width], image)
    enlarged = padded.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert crop_back(enlarged, padding, scale=4).shape[-2:] == (4 * height, 4 * width)


def test_resizing() -> None:
    flat = torch.full((2, 3, 9, 12), 0.25)
    for method in ("bicubic", "area", "lanczos"):
        sized = resize(flat, 5, 7, method=method)
        torch.testing.assert_close(sized, torch.full((2, 3, 5, 7), 0.25))
    image = torch.rand(1, 3, 8, 8) * 2 - 1
    exact = Image.fromarray(image[0, 0].numpy()).resize((32, 32), Image.Resampling.LANCZOS)
    torch.testing.assert_close(resize(image, 32, 32, method="lanczos")[0, 0], torch.from_numpy(np.array(exact)))
    with pytest.raises(SizeError, match="positive sides"):
        resize(flat, 0, 7)
    with pytest.raises(SettingError, match="not 'nearest'"):
        resize(flat, 5, 7, method="nearest")
    with pytest.raises(SizeError, match="cannot be cropped back to 8x8"):
        crop_back(flat[..., :4, :4], (8, 8))


# Writing


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (700, 1001), (1, 4000), (4000, 1)])
def test_png_is_exact(shape: tuple[int, int]) -> None:
    for array in (noise_image(*shape), smooth_image(*shape), np.zeros((*shape, 3), np.uint8)):
        data = b"".join(encode_png(array, {}))
        with Image.open(io.BytesIO(data)) as image:
            image.load()  # checks every checksum
            assert np.array_equal(np.asarray(image), array)


def test_pages_stay_small() -> None:
    """Flat surfaces with sharp marks, next to bands of noise, in one file."""
    page = np.full((1200, 900, 3), 250, np.uint8)
    page[::30, 50:850:7] = 10
    page[800:] = noise_image(400, 900)
    data = b"".join(encode_png(page[:800], {}))
    assert len(data) < 20_000
    mixed = b"".join(encode_png(page, {}))
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(mixed))), page)


def test_png_of_sixteen_bits_is_exact() -> None:
    """Pillow reads no 16-bit color, so gray shows that bytes and filters are right, and color its high bytes."""
    deep = np.random.default_rng(0).integers(0, 65536, (300, 500, 3), dtype=np.uint16)
    gray = Image.open(io.BytesIO(b"".join(encode_png(deep[..., :1], {}))))
    assert np.array_equal(np.asarray(gray), deep[..., 0])
    color = np.asarray(Image.open(io.BytesIO(b"".join(encode_png(deep, {})))))
    assert np.array_equal(color, (deep >> 8).astype(np.uint8))


def test_png_writer_leaves_no_threads_and_is_quicker_than_pillow(tmp_path: Path) -> None:
    array = np.asarray(Image.fromarray(noise_image(64, 64)).resize((1024, 1024), Image.Resampling.BICUBIC))
    array = np.clip(array.astype(np.int16) + noise_image(1024, 1024) % 5, 0, 255).astype(np.uint8)
    before = threading.active_count()
    start = time.process_time()
    save_image(tmp_path / "ours.png", array)
    ours = time.process_time() - start
    assert threading.active_count() == before
    start = time.process_time()
    Image.fromarray(array).save(tmp_path / "pillow.png")
    assert ours < time.process_time() - start
    assert (tmp_path / "ours.png").stat().st_size < 1.15 * (tmp_path / "pillow.png").stat().st_size


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.jpg", "a.JPEG"])
def test_recipe_round_trip(tmp_path: Path, name: str) -> None:
    path = save_image(tmp_path / name, Image.fromarray(smooth_image(40, 56)), metadata=METADATA)
    assert read_metadata(path) == METADATA
    assert load_image(path).size == (56, 40)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]
    bare = save_image(tmp_path / f"b{name}", Image.fromarray(smooth_image(40, 56)))
    assert read_metadata(bare) is None


def test_recipe_survives_pillow(tmp_path: Path) -> None:
    """A PNG that another tool has written anew, with its texts."""
    path = save_image(tmp_path / "a.png", Image.fromarray(smooth_image(8, 8)), metadata={"seed": 1})
    with Image.open(path) as image:
        assert image.text["pidecode"] == '{"seed": 1}'


def test_sixteen_bit_file(tmp_path: Path) -> None:
    image = torch.rand(1, 3, 20, 30) * 2 - 1
    path = save_image(tmp_path / "a.png", image, bits=16, metadata=METADATA)
    assert path.read_bytes()[24] == 16
    assert read_metadata(path) == METADATA
    assert np.abs(np.asarray(load_image(path)).astype(int) - to_array(image)).max() <= 1


def test_webp_of_quality_100_is_exact(tmp_path: Path) -> None:
    array = np.dstack([noise_image(24, 24), np.zeros((24, 24), np.uint8)])
    path = save_image(tmp_path / "a.webp", array, quality=100)
    assert np.array_equal(np.asarray(Image.open(path)), array)


def test_quality_acts(tmp_path: Path) -> None:
    image = Image.fromarray(smooth_image(64, 64))
    for name in ("a.jpg", "a.webp"):
        low = save_image(tmp_path / f"low{name}", image, quality=20)
        high = save_image(tmp_path / f"high{name}", image)
        assert low.stat().st_size < high.stat().st_size


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("a.bmp", {}, "choose one of these endings"),
        ("a.png", {"quality": 90}, "takes none"),
        ("a.jpg", {"quality": 101}, "1 to 100"),
        ("a.webp", {"bits": 16}, "needs a .png file"),
        ("a.png", {"bits": 12}, "8 or 16 bits"),
        ("a.png", {"metadata": {"x": float("nan")}}, "JSON cannot"),
        ("a.png", {"metadata": {"x": object()}}, "JSON cannot"),
        ("a.jpg", {"metadata": {"x": "y" * 70_000}}, "Write a .png"),
    ],
)
def test_settings_that_cannot_act_are_refused(tmp_path: Path, name: str, options: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        save_image(tmp_path / name, torch.zeros(1, 3, 8, 8), **options)
    assert not list(tmp_path.iterdir())


def test_sides_a_format_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(
        SizeError, match=r"WEBP holds sides up to 16,383 pixels, and this image has 16400x1; write a \.png"
    ):
        save_image(tmp_path / "a.webp", np.zeros((1, 16400, 3), np.uint8))
    save_image(tmp_path / "a.png", np.zeros((1, 16400, 3), np.uint8))


def test_existing_files_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"mine")
    with pytest.raises(FileError, match="overwrite=True"):
        save_image(path, torch.zeros(1, 3, 8, 8))
    assert path.read_bytes() == b"mine"
    save_image(path, torch.zeros(1, 3, 8, 8), overwrite=True)
    assert load_image(path).size == (8, 8)
