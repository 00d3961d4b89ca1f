# SPDX-License-Identifier: Apache-2.0
"""Reading weights: what is accepted, under which names, and how each kind of bad file is refused."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import struct
import zipfile
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import save_file

from pidecode.errors import CheckpointError
from pidecode.latents.latent import Latent
from pidecode.latents.storage import count_latents
from pidecode.weights.read import read_tensors, read_weights, strip_prefixes
from pidecode.weights.safetensors import read_header, sha256


def tensors():
    generator = torch.Generator().manual_seed(0)
    return {
        "s_embedder.proj.weight": torch.randn(8, 12, generator=generator),
        "final_layer.linear.bias": torch.randn(3, generator=generator).bfloat16(),
        "lq_proj.gate_modules.0.log_alpha": torch.tensor(1.6),
    }


def write_raw(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def same(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_safetensors_round_trip_with_metadata(tmp_path):
    save_file(tensors(), tmp_path / "net.safetensors", metadata={"pidecode": "{}"})
    file = read_weights(tmp_path / "net.safetensors")
    same(file.tensors, tensors())
    assert file.metadata == {"pidecode": "{}"}
    assert read_header(tmp_path / "net.safetensors").shapes == file.shapes


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "wrap", [lambda t: t, lambda t: {"state_dict": t, "epoch": torch.tensor(3)}, lambda t: {"model": {"state_dict": t}}]
)
def test_pickle_of_tensors(tmp_path, legacy, wrap):
    path = tmp_path / "model_ema_bf16.pth"
    named = OrderedDict((f"net.{name}", tensor) for name, tensor in tensors().items())
    torch.save(wrap(named), path, _use_new_zipfile_serialization=not legacy)
    file = read_weights(path)
    same(file.tensors, tensors())


def test_content_not_suffix_decides(tmp_path):
    save_file(tensors(), tmp_path / "net.pth")
    torch.save(tensors(), tmp_path / "net.safetensors")
    same(read_weights(tmp_path / "net.pth").tensors, tensors())
    same(read_weights(tmp_path / "net.safetensors").tensors, tensors())


@pytest.mark.parametrize(
    "prefix", ["", "net.", "net_ema.", "core.", "net.core.", "model.diffusion_model.", "module.net."]
)
def test_prefixes_are_removed(prefix):
    strangers = {
        "fake_score.final_layer.linear.bias": torch.zeros(3),
        "discriminator.0.weight": torch.zeros(3),
        f"{prefix}pos_embed": torch.zeros(1),
        f"{prefix}_repa_projector.0.weight": torch.zeros(1),
        f"{prefix}patch_blocks.0.attn._extra_state": torch.zeros(0, dtype=torch.uint8),
    }
    same(strip_prefixes({prefix + name: value for name, value in tensors().items()} | strangers), tensors())


def test_averaged_weights_are_preferred():
    both = {f"net_ema.{name}": value for name, value in tensors().items()}
    both |= {f"net.{name}": value * 0 for name, value in tensors().items()}
    same(strip_prefixes(both), tensors())


def test_unknown_neighbors_keep_their_names():
    named = {f"net.{name}": value for name, value in tensors().items()} | {"lora.up": torch.zeros(1)}
    assert "lora.up" in strip_prefixes(named)


def test_one_name_twice_is_refused():
    with pytest.raises(CheckpointError, match="twice"):
        strip_prefixes({"net.a": torch.zeros(1), "a": torch.zeros(1)})


def test_tensors_are_views_of_the_file(tmp_path):
    big = {f"w{i}": torch.ones(64, 64) for i in range(4)}
    save_file(big, tmp_path / "a.safetensors")
    torch.save(big, tmp_path / "a.pth")
    for name in ("a.safetensors", "a.pth"):
        with open("/proc/self/maps") as maps:
            before = maps.read().count(str(tmp_path / name))
        file = read_tensors(tmp_path / name)
        with open("/proc/self/maps") as maps:
            assert maps.read().count(str(tmp_path / name)) > before
        del file


test_tensors_are_views_of_the_file = pytest.mark.skipif(
    not os.path.exists("/proc/self/maps"), reason="needs Linux to see mapped files"
)(test_tensors_are_views_of_the_file)


class Evil:
    def __reduce__(self):
        return os.system, ("echo should never run",)


@pytest.mark.parametrize("legacy", [False, True])
def test_pickle_with_code_is_named_and_not_run(tmp_path, legacy, capfd):
    path = tmp_path / "evil.pth"
    torch.save({"net.a": torch.zeros(1), "x": Evil()}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=r"run code \((posix|nt)\.system\).*nothing was run"):
        read_weights(path)
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(CheckpointError, match=r"evil\.pth"):
        read_weights(path)
    assert "should never run" not in capfd.readouterr().out


def test_whole_model_pickle_is_refused_by_class(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_weights(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds no tensors"),
        ({"epoch": 3, "lr": 0.1}, r"holds no tensors \(it holds epoch, lr\)"),
        ([torch.zeros(1)], "holds one list"),
        ({"a": torch.zeros(2, 2).to_sparse()}, "sparse"),
        ({"a": torch.zeros(1).expand(10**12)}, "claims 1,000,000,000,000 values"),
        ({"a": torch.arange(3)}, "stores a as int64"),
        ({"a": torch.zeros(2, dtype=torch.bool), "b": torch.zeros(2, dtype=torch.bool)}, "bool and 1 more"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, "complex64"),
        ({"a": torch.zeros(2).to(torch.float8_e4m3fn), "a.qweight": torch.zeros(1)}, "qweight"),
        (
            {"a.weight": torch.zeros(2, dtype=torch.int8), "a.comfy_quant": torch.zeros(2, dtype=torch.uint8)},
            r"quantized \(int8: int8\)",
        ),
        ({"a.weight": torch.zeros(2, dtype=torch.int8), "a.weight_scale": torch.zeros(3)}, r"a scale of shape \[3\]"),
        ({"a": torch.ones(3), "b": torch.tensor([1.0, float("nan")])}, r"NaN or infinite values in b \(of 2"),
        (
            {"a": torch.full((5,), float("inf"), dtype=torch.bfloat16), "b": torch.tensor([float("-inf")])},
            "in a and 1 more",
        ),
    ],
)
def test_bad_contents_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "bad.pth")
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "bad.pth")


def test_nan_search_may_be_left_out(tmp_path):
    save_file({"a": torch.tensor([float("nan")])}, tmp_path / "a.safetensors")
    assert read_weights(tmp_path / "a.safetensors", check_values=False).tensors["a"].isnan().all()
    with pytest.raises(CheckpointError, match="NaN"):
        read_weights(tmp_path / "a.safetensors")


def test_large_half_precision_values_are_fine(tmp_path):
    save_file({"a": torch.full((1000,), 60000.0, dtype=torch.float16)}, tmp_path / "a.safetensors")
    read_weights(tmp_path / "a.safetensors")


@pytest.mark.parametrize("marks", ["plain", "scaled_fp8", "comfy_quant", "metadata", "rows", "int8"])
def test_eight_bit_weights_of_comfyui_are_read(tmp_path, marks):
    """Each way it marks them; biases and norms stay as they are."""
    wanted = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    scale = wanted.abs().amax(dim=1, keepdim=True) if marks == "rows" else wanted.abs().amax()
    scale = torch.ones(()) if marks == "plain" else scale / (127 if marks == "int8" else 448)
    stored = (wanted / scale).round().to(torch.int8) if marks == "int8" else (wanted / scale).to(torch.float8_e4m3fn)
    tensors, metadata = {"a.weight": stored, "a.bias": torch.ones(6)}, None
    about = json.dumps({"format": "int8_tensorwise" if marks == "int8" else "float8_e4m3fn"})
    if marks == "scaled_fp8":
        tensors |= {
            "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
            "a.scale_weight": scale,
            "a.scale_input": scale.clone(),
        }
    elif marks == "metadata":
        tensors["a.weight_scale"] = scale
        metadata = {"_quantization_metadata": f'{{"layers": {{"a": {about}}}}}'}
    elif marks != "plain":
        quantization = torch.tensor(list(about.encode()), dtype=torch.uint8)
        tensors |= {"a.weight_scale": scale, "a.comfy_quant": quantization, "a.input_scale": torch.ones(())}
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    read = read_weights(tmp_path / "a.safetensors").tensors
    assert set(read) == {"a.weight", "a.bias"}
    assert read["a.weight"].dtype == torch.bfloat16
    assert torch.equal(read["a.weight"], (stored.float() * scale).to(torch.bfloat16))
    assert torch.allclose(read["a.weight"].float(), wanted, atol=0.2)
    assert read["a.bias"].dtype == torch.float32
    if marks == "plain":  # encoders and adapters are not quantized
        with pytest.raises(CheckpointError, match=r"quantized \(fp8: F8_E4M3\)"):
            read_tensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("about", "scale", "message"),
    [
        ({"format": "nvfp4"}, torch.ones(6, 2), "NVFP4"),
        ({"format": "mxfp8"}, torch.ones(6, 2), "MXFP8"),
        ({"format": "int8_tensorwise", "convrot": True}, torch.ones(6, 1), "convrot"),
        ({"format": "convrot_w4a4"}, torch.ones(6, 1), "convrot_w4a4"),
        ({"format": "float8_e4m3fn"}, torch.ones(3), r"fp8: float8_e4m3fn with a scale of shape \[3\]"),
    ],
)
def test_other_quantized_weights_are_refused_by_name(tmp_path, about, scale, message):
    quantization = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    weight = torch.zeros(6, 4, dtype=torch.int8 if "int8" in about["format"] else torch.float8_e4m3fn)
    tensors = {"a.weight": weight, "a.weight_scale": scale, "a.comfy_quant": quantization}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=message):
        read_weights(tmp_path / "a.safetensors")


def one(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"a": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (one(), bytes(4), "truncated: its tensors take 8 bytes, and the file holds 4"),
        (one(), bytes(12), "4 bytes that belong to no tensor"),
        (one(shape=(3,)), bytes(8), "contradicts itself: 'a'"),
        (one(shape=(1 << 40,), offsets=(0, 4 << 40)), bytes(8), "truncated"),
        (one(shape=(-2,)), bytes(8), "not whole numbers"),
        (one(shape=(2.0,)), bytes(8), "not whole numbers"),
        (one(offsets=(8, 0)), bytes(8), "contradicts itself"),
        (one(offsets=(4, 12)), bytes(12), "leaves a gap"),
        (one(dtype="F33"), bytes(8), "stores tensor 'a' as 'F33'"),
        (one(dtype=["F32"]), bytes(8), "stores tensor 'a' as"),
        (one() | {"b": one()["a"]}, bytes(8), "overlaps"),
        ({"a": 3}, b"", "by int"),
        ({"__metadata__": {"k": 3}} | one(), bytes(8), "is not a table of strings"),
        (b"[1, 2, 3]", b"", "is neither .safetensors nor written by torch.save"),
        (b'{"a": ', b"", "no readable"),
        (b"{" + b'"a":[' * 50_000, b"", "no readable"),
        (b'{"a": 1, "a": 2}', b"", "'a' twice in one object"),
        (b"{\xff\xfe}", b"", "not UTF-8"),
        ({}, b"", "holds no tensors"),
    ],
)  # fmt: skip
def test_lying_headers_are_refused(tmp_path, header, data, message):
    path = write_raw(tmp_path / "liar.bin", header, data)
    with pytest.raises(CheckpointError, match=message):
        read_weights(path)


@pytest.mark.parametrize("length", [3, 8, 2**40, 2**64 - 1])
def test_lying_header_length(tmp_path, length):
    path = tmp_path / "liar.safetensors"
    path.write_bytes(struct.pack("<Q", length) + b"{}")
    with pytest.raises(CheckpointError, match=r"liar\.safetensors"):
        read_weights(path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.02, 0.3, 0.7, 0.999])
def test_truncated_files_are_refused(tmp_path, suffix, share):
    path = tmp_path / f"net{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(tensors(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(CheckpointError, match="net"):
        read_weights(path)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "is an image, not tensors"),
        (b"\xff\xd8\xff\xe0" + bytes(100), "is an image, not tensors"),
        (b"\x1f\x8b\x08" + bytes(100), "is an archive; unpack it"),
        (b"\x93NUMPY\x01\x00" + bytes(100), "is a NumPy array"),
        (b"hello", "is a text, not tensors"),
        ("Gr\u00fc\u00dfe\n".encode("latin-1"), "is a text, not tensors"),
        ("hello\n".encode("utf-16"), "is a text, not tensors"),
        (b'{"a": 1}', "is a text, not tensors"),
        (b"\x08\x08\x12\x07pytorch", "neither .safetensors nor written by torch.save"),
    ],
)
def test_other_kinds_of_file_are_recognized(tmp_path, start, message):
    path = tmp_path / "net.pth"
    path.write_bytes(start)
    with pytest.raises(CheckpointError, match=message):
        read_weights(path)


def test_zip_traps_are_refused(tmp_path):
    torch.save(tensors(), tmp_path / "net.pth")
    with zipfile.ZipFile(tmp_path / "net.pth") as good:
        entries = {name: good.read(name) for name in good.namelist()}
    with zipfile.ZipFile(tmp_path / "packed.pth", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, data in entries.items():
            bomb.writestr(name, data)
    with pytest.raises(CheckpointError, match="compressed"):
        read_weights(tmp_path / "packed.pth")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as other:
        other.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="zip archive without weights"):
        read_weights(tmp_path / "other.zip")


def test_things_that_are_no_file_are_refused(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.pth").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe")
    for name, message in {
        "folder": "is a folder",
        "empty.pth": "is empty",
        "loop": "leads back to itself",
        "dangling": "symbolic link to nothing",
        "missing.pth": "does not exist",
        "empty.pth/x": "lies below a file",
        "pipe": "device or pipe",
    }.items():
        with pytest.raises(CheckpointError, match=message):
            read_weights(tmp_path / name)


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"pixels" * 1000)
    assert sha256(tmp_path / "a") == hashlib.sha256(b"pixels" * 1000).hexdigest()


def write_pickle(path, content, *, legacy=False):
    """A file as torch.save writes it, around a pickle of one's own."""
    if legacy:
        head = [pickle.dumps(value, protocol=2) for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path.write_bytes(b"".join([*head, content, pickle.dumps(["0"], protocol=2)]) + bytes(64))
        return path
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", b"3\n")
        archive.writestr("archive/data/0", bytes(16))
    return path


def storage(count, type_name="FloatStorage", key="0"):
    """Opcodes of `("storage", torch.FloatStorage, key, "cpu", count)` as a persistent id."""
    text = b"".join(b"X" + struct.pack("<I", len(word)) + word for word in (key.encode(), b"cpu"))
    return b"(X\x07\0\0\0storagectorch\n" + type_name.encode() + b"\n" + text + number(count) + b"tQ"


def number(value):
    data = pickle.encode_long(value)
    return b"\x8a" + bytes([len(data)]) + data


def tensor_of(stored, size):
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + b"K\0(" + number(size) + b"t(K\x01t\x89"
        b"ccollections\nOrderedDict\n)RtR"
    )


def named(value, name=b"X\x01\0\0\0a"):
    return b"\x80\x02}" + name + value + b"s."


SHARED_TUPLES = b"(K\x01tq\0" + b"".join(b"(h%ch%ctq%c" % (i, i, i + 1) for i in range(40))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (named(b"cbuiltins\nbytearray\n" + number(6_000_000_000) + b"\x85R"), "run code .builtins.bytearray."),
        (named(b"ctorch\nFloatTensor\n" + number(6_000_000_000) + b"\x85R"), "run code .torch.FloatTensor."),
        (named(b"cbuiltins\ngetattr\n(ttR"), "run code .builtins.getattr."),
        (named(b"ctorch\nFloatStorage\n" + number(6_000_000_000) + b"\x85R"), "no known function"),
        (named(tensor_of(storage(6_000_000_000), 4)), "claims 6,000,000,000 values for storage '0'"),
        (named(tensor_of(storage(-4), 4)), "claims -4 values"),
        (named(tensor_of(storage(4, "Storage"), 4)), "run code .torch.Storage."),
        (named(b"\x8e" + struct.pack("<Q", 1 << 40)), "no pickle of plain tensors"),
        (named(b"B" + struct.pack("<I", 4_000_000_000)), "no pickle of plain tensors"),
        (named(b"h\x07"), "does not hold"),
        (named(b"N", name=SHARED_TUPLES), "one tuple twice"),
        (named(b"N", name=b"(K\x01t"), "neither text nor a number"),
        (b"\x80\x02}(X\x01\0\0\0aNX\x01\0\0\0bu.", "neither text nor a number"),
        (b"\x80\x02" + b"]" * 100 + b"t.", "no pickle of plain tensors"),
        (b"\x80\x02}b.", "no pickle of plain tensors"),
    ],
)  # fmt: skip
def test_hostile_pickles_take_no_memory(tmp_path, content, message, legacy):
    path = write_pickle(tmp_path / "hostile.pth", content, legacy=legacy)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (read_weights, count_latents, Latent.load, lambda path: Latent.load(path.read_bytes())):
        with pytest.raises(CheckpointError, match=message):
            read(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def test_the_pickle_that_is_checked_is_the_one_that_is_read(tmp_path):
    bomb = write_pickle(tmp_path / "a.pth", named(b"cbuiltins\nbytearray\n" + number(10**9) + b"\x85R"), legacy=True)
    good = write_pickle(tmp_path / "good.pth", named(tensor_of(storage(4), 4)))
    bomb.write_bytes(bomb.read_bytes() + good.read_bytes())
    assert zipfile.is_zipfile(bomb)
    with pytest.raises(CheckpointError, match="run code .builtins.bytearray."):
        read_weights(bomb)


def test_the_pickle_those_tests_write_is_otherwise_right(tmp_path):
    path = write_pickle(tmp_path / "good.pth", named(tensor_of(storage(4), 4)))
    assert read_weights(path).tensors["a"].tolist() == [0.0] * 4


def test_storage_that_another_record_lacks(tmp_path):
    path = write_pickle(tmp_path / "short.pth", named(tensor_of(storage(5), 5)))
    with pytest.raises(CheckpointError, match="claims 5 values for storage '0', and the file has 16 bytes"):
        read_weights(path)
    path = write_pickle(tmp_path / "none.pth", named(tensor_of(storage(4, key="../x"), 4)))
    with pytest.raises(CheckpointError, match="the file has none"):
        read_weights(path)


def test_two_records_of_one_name(tmp_path):
    path = write_pickle(tmp_path / "two.pth", named(tensor_of(storage(4), 4)))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("archive/data.pkl", b"")
    with pytest.raises(CheckpointError, match="two files of one name"):
        read_weights(path)


def test_weights_of_other_upscalers_are_told_as_such(tmp_path):
    torch.save({"params_ema": {"conv_first.weight": torch.zeros(4, 3, 3, 3)}}, tmp_path / "x4plus.pth")
    with pytest.raises(CheckpointError, match="other upscalers, such as Real-ESRGAN, are not read"):
        read_weights(tmp_path / "x4plus.pth")
