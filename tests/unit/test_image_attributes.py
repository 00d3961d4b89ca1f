# SPDX-License-Identifier: Apache-2.0
"""What an image file carries goes over to what is made of it: transparency, gray, 16 bits, EXIF, texts, colors."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms, PngImagePlugin

from pidecode import PixelDecoder, read_metadata
from pidecode.errors import ImageError, SettingError, SizeError
from pidecode.images import (
    Animation,
    check_format,
    frames_in,
    image_size,
    load_image,
    read_frames,
    read_image,
    save_image,
)
from pidecode.images.attributes import Attributes
from pidecode.images.png import encode_png
from pidecode.images.tensors import to_array


@pytest.fixture(scope="module")
def tiny() -> PixelDecoder:
    return PixelDecoder.from_pretrained("tiny", device="cpu")


def smooth(height: int = 24, width: int = 32) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // width, y * 255 // height, (x + y) * 255 // (height + width)], 2).astype(np.uint8)


def data_of(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def opened(path: Path) -> Image.Image:
    image = Image.open(io.BytesIO(path.read_bytes()))
    image.load()
    return image


def with_chunk(png: bytes, kind: bytes, data: bytes) -> bytes:
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return png[:33] + chunk + png[33:]


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_alpha_is_enlarged_without_a_fringe(tiny: PixelDecoder, tmp_path: Path, ending: str) -> None:
    pixels = np.zeros((24, 32, 4), np.uint8)  # black under the transparent pixels
    pixels[6:18, 8:24] = 255
    made = tiny.upscale(data_of(Image.fromarray(pixels), "PNG")).save(tmp_path / f"a.{ending}")[0]
    large = np.asarray(opened(made))
    assert large.shape == (96, 128, 4)
    assert large[40:56, 48:80, 3].min() == 255
    assert large[:12, :, 3].max() == 0
    assert large[large[..., 3] > 0][:, :3].min() > 235


def test_jpeg_says_that_alpha_was_composited(tiny: PixelDecoder, tmp_path: Path) -> None:
    source = data_of(Image.new("RGBA", (16, 16), (255, 0, 0, 0)), "PNG")
    with pytest.warns(UserWarning, match="JPEG has no transparency"):
        made = tiny.upscale(source).save(tmp_path / "a.jpg")[0]
    assert np.asarray(opened(made)).min() > 250


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_gray_stays_gray(tiny: PixelDecoder, tmp_path: Path, mode: str) -> None:
    source = data_of(Image.fromarray(smooth()[..., 0]).convert(mode), "PNG")
    output = tiny.upscale(source)
    assert output.image.mode == ("LA" if mode == "LA" else "L")
    assert opened(output.save(tmp_path / "a.png")[0]).mode == output.image.mode
    colors = np.asarray(opened(output.save(tmp_path / "a.webp")[0]).convert("RGB")).astype(int)
    assert np.ptp(colors, axis=2).max() <= 2


def test_exif_texts_and_resolution_go_over_to_every_format(tiny: PixelDecoder, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x8298], exif[0x010F] = 6, "(c) Jane Doe", "Cam"
    exif.get_ifd(0x8769)[0x9003] = "2020:01:02 03:04:05"
    source = data_of(Image.fromarray(smooth()), "JPEG", exif=exif, dpi=(300, 300), comment=b"seen")
    output = tiny.upscale(source)
    for ending in ("png", "webp", "jpg"):
        made = output.save(tmp_path / f"a.{ending}")[0]
        with opened(made) as image:
            image.load()
            assert image.size == (96, 128)  # upright
            found = image.getexif()
            assert 0x0112 not in found
            assert (found[0x8298], found[0x010F]) == ("(c) Jane Doe", "Cam")
            assert found.get_ifd(0x8769)[0x9003] == "2020:01:02 03:04:05"
            dpi = image.info["dpi"][0] if ending != "webp" else found[0x011A]
            assert float(dpi) == pytest.approx(300, abs=0.01)
        metadata = read_metadata(made)
        assert metadata is not None
        assert metadata["model"] == "tiny"
    assert opened(tmp_path / "a.jpg").info["comment"] == b"seen"
    bare = output.save(tmp_path / "b.jpg", strip=True)[0]
    assert 0x8298 not in opened(bare).getexif()
    assert read_metadata(bare) is not None


def test_parameters_and_workflow_go_over(tiny: PixelDecoder, tmp_path: Path) -> None:
    texts = PngImagePlugin.PngInfo()
    given = {"parameters": "a cät\nSteps: 20", "prompt": '{"3": {}}', "workflow": '{"nodes": []}'}
    for name, text in given.items():
        texts.add_itxt(name, text)
    output = tiny.upscale(data_of(Image.fromarray(smooth()), "PNG", pnginfo=texts))
    made = opened(output.save(tmp_path / "a.png")[0])
    assert {name: made.text[name] for name in given} == given
    exif = opened(output.save(tmp_path / "a.webp")[0]).getexif()
    assert (exif[0x0110], exif[0x010F]) == ("prompt:" + given["prompt"], "workflow:" + given["workflow"])
    comment = exif.get_ifd(0x8769)[0x9286]
    assert comment == b"UNICODE\0" + given["parameters"].encode("utf-16-be")
    assert (read_metadata(tmp_path / "a.webp") or {})["model"] == "tiny"  # beside them
    again = tiny.upscale(tmp_path / "a.webp").save(tmp_path / "again.webp")[0]
    assert (read_metadata(again) or {})["width"] == 512
    assert opened(again).getexif().get_ifd(0x8769)[0x9286] == comment


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_sixteen_bits_reach_the_encoder(channels: int) -> None:
    values = np.random.default_rng(0).integers(0, 65536, (9, 13, channels)).astype(np.uint16)
    if channels in (2, 4):
        values[..., -1] |= 0x8000
    read = read_image(b"".join(encode_png(values, {})))
    colors = (values[..., : 1 if channels < 3 else 3] / 65535 * 2 - 1).transpose(2, 0, 1)
    assert np.abs(read.tensor[0].numpy() - colors).max() < 1e-6
    if channels in (2, 4):
        assert read.alpha is not None
        assert np.abs(read.alpha[0, 0].numpy() - values[..., -1] / 65535).max() < 1e-6


def test_a_deep_gradient_stays_fine(tiny: PixelDecoder, tmp_path: Path) -> None:
    ramp = np.linspace(20000, 22000, 64).astype(np.uint16)[None, :, None].repeat(32, axis=0)
    made = tiny.upscale(b"".join(encode_png(ramp, {}))).save(tmp_path / "a.png", bits=16)[0]
    row = np.asarray(opened(made))[60]
    assert len(np.unique(row)) > 5 * len(np.unique(row >> 8))


def test_colors_by_gamma_and_primaries() -> None:
    plain = Image.fromarray(smooth())
    linear = np.asarray(load_image(with_chunk(data_of(plain, "PNG"), b"gAMA", struct.pack(">I", 100000))))
    x = smooth() / 255
    expected = np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055) * 255
    assert np.abs(linear - expected).max() <= 0.51
    same = load_image(with_chunk(data_of(plain, "PNG"), b"gAMA", struct.pack(">I", 45455)))
    assert np.array_equal(np.asarray(same), smooth())
    wide = load_image(
        with_chunk(data_of(Image.new("RGB", (4, 4), (200, 80, 80)), "PNG"), b"cICP", bytes((12, 13, 0, 1)))
    )
    red, green, _ = wide.getpixel((0, 0))
    assert red > 205
    assert green < 78
    white = load_image(with_chunk(data_of(Image.new("RGB", (4, 4), "white"), "PNG"), b"cICP", bytes((9, 13, 0, 1))))
    assert white.getpixel((0, 0)) == (255, 255, 255)


def test_adobe_rgb_by_exif() -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA001] = 0xFFFF
    image = Image.new("RGB", (16, 16), (60, 200, 60))
    plain = load_image(data_of(image, "JPEG", quality=100)).getpixel((8, 8))
    adobe = load_image(data_of(image, "JPEG", quality=100, exif=exif)).getpixel((8, 8))
    assert adobe[0] < plain[0] - 20


def test_a_profile_is_converted_or_kept(tiny: PixelDecoder, tmp_path: Path) -> None:
    # the sRGB profile with red and green swapped: an image that shows whether it was obeyed
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    at = srgb.index(b"rXYZ"), srgb.index(b"gXYZ")
    srgb[at[0] : at[0] + 4], srgb[at[1] : at[1] + 4] = b"gXYZ", b"rXYZ"
    odd = bytes(srgb).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    source = data_of(Image.new("RGB", (16, 16), (220, 40, 40)), "PNG", icc_profile=odd)
    converted = opened(tiny.upscale(source).save(tmp_path / "a.png")[0])
    assert converted.getpixel((30, 30))[1] > 200
    assert converted.info["icc_profile"] != odd
    kept = opened(tiny.upscale(read_image(source, keep_profile=True)).save(tmp_path / "b.png")[0])
    assert kept.getpixel((30, 30))[0] > 200
    assert kept.info["icc_profile"] == odd
    deep = b"".join(encode_png(np.full((4, 4, 3), (56000, 10000, 10000), np.uint16), {}, icc_profile=odd))
    assert np.argmax(read_image(deep).tensor[0, :, 0, 0].numpy()) == 1


@pytest.mark.parametrize(
    ("name", "data", "step"),
    [
        ("a.heic", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC.*heif-convert"),
        ("a.jxl", b"\xff\x0a" + bytes(40), "JPEG XL.*djxl"),
        ("a.nef", b"II*\0" + bytes(40), "raw file.*darktable-cli"),
        ("a.svg", b"<?xml version='1.0'?>\n<svg xmlns='x'/>", "SVG.*rsvg-convert"),
        ("a.pdf", b"%PDF-1.7\n", "PDF.*pdftoppm"),
        ("a.psd", b"8BPS\0\1", "Photoshop.*magick"),
        ("a.mp4", b"\0\0\0\x18ftypisom" + bytes(20), "video.*ffmpeg"),
    ],
)
def test_formats_that_are_not_read_are_named_with_the_step(tmp_path: Path, name: str, data: bytes, step: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ImageError, match=step):
        load_image(tmp_path / name)


def test_limits_are_told_before_the_decode() -> None:
    with pytest.raises(SizeError, match=r"16,383"):
        check_format("a.webp", 16384, 10)
    with pytest.raises(SizeError, match=r"65,535"):
        check_format(".jpg", 10, 65536)
    check_format("a.png", 100_000, 10)
    with pytest.raises(ImageError, match=r"allow so many: max_pixels=400\.$"):
        read_image(data_of(Image.new("L", (20, 20)), "PNG"), max_pixels=100)


def test_gray_and_alpha_arrays_are_written(tmp_path: Path) -> None:
    for channels, mode in ((1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")):
        array = np.random.default_rng(0).integers(0, 256, (5, 7, channels)).astype(np.uint8)
        made = save_image(tmp_path / f"{mode}.png", array)
        assert opened(made).mode == mode
        assert np.array_equal(np.asarray(opened(made)).reshape(array.shape), array)


def animated(kind: str, **options: Any) -> bytes:
    frames = [Image.fromarray(np.roll(smooth(), 4 * shift, axis=1)) for shift in range(3)]
    return data_of(frames[0], kind, save_all=True, append_images=frames[1:], **options)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_all_frames_of_an_animation_are_read_and_written(tmp_path: Path, kind: str) -> None:
    data = animated(kind, duration=[100, 200, 300], loop=2)
    frames = frames_in(data)
    assert frames is not None
    assert (len(frames), frames.durations, frames.loop) == (3, (100, 200, 300), 2)
    assert frames.suffix == f".{kind.lower()}"
    sources = list(read_frames(data))
    images = [Image.fromarray(to_array(source.tensor)) for source in sources]
    images[0].info["pidecode"] = {"model": "tiny"}
    (place,) = Animation(images, frames).save(tmp_path / f"a{frames.suffix}")
    assert frames_in(place) == frames
    assert read_metadata(place) == {"model": "tiny"}
    off = 0.1 if kind == "WEBP" else 0.02
    for given, written in zip(sources, read_frames(place), strict=True):
        assert float((given.tensor - written.tensor).abs().mean()) < off
    with pytest.raises(ImageError, match="3 frames of more than 2,000 pixels"):
        frames_in(data, max_pixels=2000)
    with pytest.raises(SettingError, match="animations are written as"):
        Animation(images, frames).save(tmp_path / "a.jpg")


def test_pages_are_read_one_by_one_without_reduced_copies() -> None:
    pages = [Image.fromarray(smooth()), Image.fromarray(smooth(8, 10)), Image.fromarray(smooth()).convert("L")]
    data = data_of(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    frames = frames_in(data)
    assert frames is not None
    assert (frames.sizes, frames.durations) == (((32, 24), (10, 8), (32, 24)), ())
    assert image_size(data, frame=1) == (10, 8)
    assert [source.gray for source in read_frames(data)] == [False, False, True]
    assert read_image(data, frame=1).tensor.shape == (1, 3, 8, 10)
    with pytest.raises(ImageError, match="3 pages, and one image is taken here.*read_frames") as caught:
        read_image(data)
    for interface, cure in [("cli", "`pidecode upscale`"), ("http", "Send one of the pages")]:
        assert cure in caught.value.message(interface)
        assert "read_frames" not in caught.value.message(interface)
    with pytest.raises(ImageError, match="there is no 3"):
        read_image(data, frame=3)
    with pytest.raises(ImageError, match="2 pages of more than 500 pixels"):
        frames_in(data_of(pages[1], "TIFF", save_all=True, append_images=[pages[0]]), max_pixels=500)
    pages[1].encoderinfo = {"tiffinfo": {254: 1}}  # a preview of the first page
    two = data_of(pages[0], "TIFF", save_all=True, append_images=[pages[1]])
    assert frames_in(two) is None
    assert read_image(two).tensor.shape == (1, 3, 24, 32)


def test_high_dynamic_range_is_tone_mapped_with_a_warning() -> None:
    gray = np.full((4, 6, 3), 1, np.uint8) * np.array([[[26], [94], [148], [180], [219], [255]]], np.uint8)[0]
    png = data_of(Image.fromarray(np.ascontiguousarray(gray)), "PNG")
    long = with_chunk(with_chunk(png, b"cICP", bytes([12, 16, 0, 1])), b"tEXt", b"Comment\0" + b"x" * 9000)
    with pytest.warns(UserWarning, match="high dynamic range .PQ.; it was tone-mapped"):
        values = (read_image(long).tensor[0, 0, 0] + 1) / 2
    assert bool((values.diff()[:4] > 0).all())
    assert float(values[1]) == pytest.approx(0.369, abs=0.005)  # 23 of the 203 cd/m² of diffuse white
    assert float(values[2]) == pytest.approx(0.95, abs=0.01)  # diffuse white: what is brighter needs room above it
    with pytest.warns(UserWarning, match="HLG"):
        read_image(with_chunk(png, b"cICP", bytes([9, 18, 0, 1])))
    with pytest.raises(ImageError, match="primaries 22 and transfer 13 of ITU-T H.273"):
        read_image(with_chunk(png, b"cICP", bytes([22, 13, 0, 1])))


def test_gamma_of_a_gray_file_and_a_transparent_color_of_a_deep_one() -> None:
    gray = data_of(Image.fromarray(smooth()[..., 0]), "PNG")
    assert float(read_image(with_chunk(gray, b"gAMA", struct.pack(">I", 100000))).tensor.mean()) > 0.2
    deep = b"".join(encode_png(smooth().astype(np.uint16) * 257, {}))
    source = read_image(with_chunk(deep, b"tRNS", struct.pack(">3H", 0, 0, 0)))
    assert source.alpha is not None
    assert float(source.alpha[0, 0, 0, 0]) == 0.0
    assert float(source.alpha.sum()) == 24 * 32 - 1


def test_a_turned_tiff_has_one_size() -> None:
    data = data_of(Image.fromarray(smooth()), "TIFF", tiffinfo={0x112: 6})
    assert image_size(data) == (24, 32)
    assert read_image(data).tensor.shape[-2:] == (32, 24)


@pytest.mark.parametrize("order", ["be", "le"])
def test_texts_of_other_programs_in_exif_become_texts(tmp_path: Path, order: str) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + "a café\nSteps: 20, Seed: 1".encode(f"utf-16-{order}")
    exif[0x010F], exif[0x0110] = 'workflow:{"nodes": []}', 'prompt:{"3": {}}'
    exif[0x8298] = "© Jörg".encode()
    source = read_image(data_of(Image.fromarray(smooth()), "WEBP", exif=exif))
    expected = {"parameters": "a café\nSteps: 20, Seed: 1", "workflow": '{"nodes": []}', "prompt": '{"3": {}}'}
    assert source.attributes.texts == expected
    for ending in ("png", "webp", "jpg"):
        place = save_image(tmp_path / f"a.{ending}", smooth(), metadata={"a": 1}, attributes=source.attributes)
        again = read_image(place).attributes
        assert again.texts == expected
        assert again.tags[0x8298].encode("latin-1").decode() == "© Jörg"
        assert read_metadata(place) == {"a": 1}
    assert opened(tmp_path / "a.png").text["workflow"] == '{"nodes": []}'  # where ComfyUI looks


def test_long_texts_fit_into_webp_and_are_told_for_jpeg(tmp_path: Path) -> None:
    attributes = Attributes(texts={"workflow": '{"größe": "' + "x" * 70_000 + '"}'}, comment="by hand")
    place = save_image(tmp_path / "a.webp", smooth(), attributes=attributes)
    exif = opened(place).getexif()
    assert json.loads(exif[0x010F].removeprefix("workflow:"))["größe"] == "x" * 70_000
    assert exif[0x9C9C].decode("utf-16-le") == "by hand\0"
    with pytest.warns(UserWarning, match="texts of the source do not fit into a JPEG"):
        save_image(tmp_path / "a.jpg", smooth(), attributes=attributes)
