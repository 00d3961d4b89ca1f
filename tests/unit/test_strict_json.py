# SPDX-License-Identifier: Apache-2.0
"""JSON from outside: what is refused, and that every reader refuses it as its own error."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pidecode.batch.jobs import OutputNaming, collect_jobs
from pidecode.errors import CheckpointError, FileError, LatentError, PidecodeError
from pidecode.images import read_metadata
from pidecode.latents.latent import Latent
from pidecode.latents.storage import count_latents
from pidecode.strict_json import JSONError, parse_json, read_json
from pidecode.weights.metadata import CheckpointMetadata
from pidecode.weights.safetensors import read_header, read_safetensors


def test_a_file_that_never_ends_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 1 << 40)  # no room on the disk is taken
    for name, message in (("pipe", "no"), ("zero", "not a regular file"), ("large", "longer than 4,194,304 bytes")):
        with pytest.raises(JSONError, match=message):
            read_json(tmp_path / name)
    (tmp_path / "good").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_json(tmp_path / "good") == {"a": 1}
    with pytest.raises(OSError, match="none"):
        read_json(tmp_path / "none")


HOSTILE = {
    "deep": "[" * 400 + "]" * 400,
    "very deep": "[" * 100_000,
    "digits": '{"seed": ' + "9" * 5000 + "}",
    "exponent": '{"seed": 1e999}',
    "surrogate": '{"space": "\\ud800"}',
    "surrogate name": '{"\\udfff": 1}',
    "NaN": '{"sigma": [NaN]}',
    "infinity": '{"sigma": [-Infinity]}',
    "twice": '{"format": 1, "format": 2}',
    "cut": '{"format": 1',
    "not text": "\x00",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_hostile_json_is_refused(text):
    for given in (text, text.encode()):
        with pytest.raises(JSONError):
            parse_json(given)


def test_ordinary_json_is_read():
    value = {"a": [1, -2.5, None, True, {"ü": "\U0001f600"}], "seed": 2**64 - 1}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(b"\xef\xbb\xbf" + json.dumps(value, ensure_ascii=False).encode()) == value
    assert parse_json("[" * 32 + "]" * 32) == parse_json("[" * 32 + "]" * 32)
    with pytest.raises(JSONError, match="longer than 10 bytes"):
        parse_json('"0123456789"', max_bytes=10)
    with pytest.raises(JSONError, match="not UTF-8"):
        parse_json(b"\xff\xfe[]")


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_every_reader_refuses_it_as_its_own_error(tmp_path, text):
    latent = tmp_path / "latent.safetensors"
    save_file({"latent": torch.zeros(1, 16, 4, 4)}, latent, {"pidecode_latent": text})
    with pytest.raises(LatentError):
        Latent.load(latent)
    with pytest.raises(CheckpointError):
        CheckpointMetadata.from_metadata({"pidecode": text})
    header = tmp_path / "header.safetensors"
    header.write_bytes(struct.pack("<Q", len(text.encode())) + text.encode())
    with pytest.raises(CheckpointError):
        read_header(header)
    manifest = tmp_path / "list.jsonl"
    manifest.write_text(text, encoding="utf-8")
    assert all(
        isinstance(job.error, PidecodeError) for job in collect_jobs(manifest, OutputNaming(out=tmp_path / "out"))
    )


def test_bounds_of_safetensors_headers(tmp_path):
    path = tmp_path / "liar.safetensors"

    def write(header: dict[str, object], data: bytes = b"") -> None:
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)

    entry = {"dtype": "I4", "shape": [1_000_000_000, 1, 1, 1], "data_offsets": [0, 0]}
    write({"x": entry})
    with pytest.raises(FileError, match="stores tensor 'x' as 'I4'"):
        count_latents(path)
    write({"x": entry | {"dtype": "F16", "shape": [1] * 9, "data_offsets": [0, 2]}}, b"00")
    with pytest.raises(FileError, match="more than 8 dimensions"):
        read_header(path)
    write({"x": entry | {"dtype": "F16", "shape": [70_000, 1, 1, 1], "data_offsets": [0, 140_000]}}, bytes(140_000))
    with pytest.raises(LatentError, match="70,000 latents"):
        count_latents(path)
    path.write_bytes(struct.pack("<Q", 100_000_000) + bytes(100))
    with pytest.raises(FileError, match="cut off"):
        read_header(path)
    with open(path, "r+b") as file:
        file.truncate(100_000_008)
    with pytest.raises(FileError, match="at most 4,194,304 are read"):
        read_header(path)


def test_reading_some_tensors(tmp_path):
    path = tmp_path / "two.safetensors"
    save_file({"a": torch.ones(2), "b": torch.zeros(3)}, path)
    header, tensors = read_safetensors(path, ["a"])
    assert set(header.tensors) == {"a", "b"}
    assert tensors["a"].tolist() == [1.0, 1.0]
    assert set(read_safetensors(path.read_bytes())[1]) == {"a", "b"}
    with pytest.raises(CheckpointError, match="could not be read"):
        read_safetensors(path, ["c"])


def test_metadata_of_an_image_that_is_hostile(tmp_path):
    from PIL import Image, PngImagePlugin

    from pidecode.errors import ImageError

    texts = PngImagePlugin.PngInfo()
    texts.add_text("pidecode", HOSTILE["digits"])
    Image.new("RGB", (2, 2)).save(tmp_path / "image.png", pnginfo=texts)
    with pytest.raises(ImageError, match="more than 20 digits"):
        read_metadata(tmp_path / "image.png")
