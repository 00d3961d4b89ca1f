# SPDX-License-Identifier: Apache-2.0
"""Converting: any readable file becomes one that explains itself, and a failed conversion leaves nothing."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pidecode.errors import CheckpointError, FileError, SettingError
from pidecode.models.pid.network import PiDNet
from pidecode.registry.checkpoints import NSCL_V1
from pidecode.registry.configs import debug_config
from pidecode.weights.convert import convert, license_text
from pidecode.weights.detect import Overrides, detect
from pidecode.weights.load import build_network
from pidecode.weights.metadata import CheckpointMetadata
from pidecode.weights.read import read_weights
from pidecode.weights.safetensors import read_header, write_safetensors

CONFIG = debug_config(color_head=True)
OFFICIAL = "checkpoints/PiD_v1pt5_res2kto4k_sr4x_official_flux_undistilled/model_ema_bf16.pth"


def network(config=CONFIG):
    torch.manual_seed(0)
    net = PiDNet(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return net.eval().requires_grad_(False)


def image(net):
    generator = torch.Generator().manual_seed(1)
    x, latent = torch.randn(1, 3, 32, 32, generator=generator), torch.randn(1, 16, 1, 1, generator=generator)
    text = torch.randn(1, 10, 16, generator=generator)
    return net(x, torch.tensor([500.0]), text, latent, torch.tensor([0.1]))


@pytest.fixture
def official(tmp_path):
    path = tmp_path / OFFICIAL
    path.parent.mkdir(parents=True)
    torch.save({f"net.{name}": value for name, value in network().state_dict().items()}, path)
    return path


def test_a_converted_file_needs_no_further_argument(official, tmp_path):
    target = tmp_path / "flux teacher.safetensors"
    written = convert(official, target)
    file = read_weights(target)
    assert detect(file) == written
    assert (written.kind, written.space, written.variant) == ("teacher", "flux", "2kto4k_v1pt5")
    assert written.config == CONFIG
    again = build_network(file.tensors, written.config)
    torch.testing.assert_close(image(again), image(network()), atol=1e-6, rtol=1e-5)
    assert file.metadata["modelspec.title"] == "PiD flux 2kto4k_v1pt5 teacher"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "flux teacher.safetensors"]


@pytest.mark.parametrize(
    ("name", "dtype"), [("bfloat16", torch.bfloat16), ("float16", torch.float16), ("float32", torch.float32)]
)
def test_number_formats(official, tmp_path, name, dtype):
    target = tmp_path / "net.safetensors"
    convert(official, target, dtype=name)
    stored, original = load_file(target), network().state_dict()
    assert stored.keys() == original.keys()
    for key, value in stored.items():
        assert torch.equal(value, original[key].to(dtype))
    if name == "bfloat16":  # half the bytes, and a little for the header
        header = read_header(target)
        assert max(entry.end for entry in header.tensors.values()) == 2 * sum(v.numel() for v in original.values())


def test_a_file_without_its_color_head_says_so(official, tmp_path):
    state = {name: value for name, value in network().state_dict().items() if "lq_aux_rgb_head" not in name}
    headless = official.with_name("model.pth")
    torch.save(state, headless)
    assert convert(headless, tmp_path / "net.safetensors").config == CONFIG.without_color_head()


def test_converting_again_keeps_everything(tmp_path):
    config = debug_config(prediction="x0", rope_reference=(512, 512))
    identity = CheckpointMetadata(
        kind="student", config=config, space="flux2", times=(0.9, 0.5, 0.0), extra={"num_steps": 3}
    )
    config = identity.config
    save_file(network(config).state_dict(), tmp_path / "a.safetensors", metadata=identity.to_metadata())
    assert convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", dtype="bfloat16") == identity
    assert detect(read_weights(tmp_path / "b.safetensors")) == identity


def test_the_caller_settles_what_the_file_cannot(tmp_path):
    torch.save(network().state_dict(), tmp_path / "net.pth")
    with pytest.raises(SettingError, match="space="):
        convert(tmp_path / "net.pth", tmp_path / "net.safetensors", overrides=Overrides(kind="teacher"))
    convert(tmp_path / "net.pth", tmp_path / "net.safetensors", overrides=Overrides(space="sd3", kind="teacher"))
    assert detect(read_weights(tmp_path / "net.safetensors")).space == "sd3"


def test_a_license_that_is_not_free_stays_beside_the_file(tmp_path):
    config = debug_config()
    identity = CheckpointMetadata(kind="student", config=config, space="flux", license="NSCLv1")
    source = tmp_path / "repository" / "a.safetensors"
    source.parent.mkdir()
    save_file(network(config).state_dict(), source, metadata=identity.to_metadata())
    (source.parent / "LICENSE").write_text("MIT License, of something else")
    convert(source, tmp_path / "out.safetensors")
    beside = tmp_path / "out.LICENSE.txt"
    assert "does not allow commercial use" in beside.read_text()
    assert NSCL_V1.url in beside.read_text()
    (source.parent / "LICENSE").write_text("NVIDIA License, all of it")
    convert(source, tmp_path / "out.safetensors", overwrite=True)
    assert beside.read_text() == "NVIDIA License, all of it"
    convert(tmp_path / "out.safetensors", tmp_path / "second.safetensors")
    assert (tmp_path / "second.LICENSE.txt").read_text() == "NVIDIA License, all of it"
    assert "converted from x.pth" in license_text(tmp_path / "elsewhere" / "x.pth", NSCL_V1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"dtype": "int8"}, SettingError, "float32, bfloat16, float16"),
        ({"target": "net.pth"}, SettingError, "does not end in"),
        ({"target": "nowhere/net.safetensors"}, FileError, "does not exist"),
        ({"target": "there.safetensors"}, FileError, "exists already"),
        ({"source": "missing.pth"}, CheckpointError, "does not exist"),
        ({"source": "half.pth"}, CheckpointError, r"missing: patch_blocks\.1\.norm_x1"),
        ({"source": "large.pth", "dtype": "float16"}, CheckpointError, r"too large for float16; use bfloat16"),
    ],
)
def test_a_failed_conversion_leaves_nothing(tmp_path, change, error, message):
    state = network().state_dict()
    torch.save(state, tmp_path / "net.pth")
    torch.save(
        {name: value for name, value in state.items() if name != "patch_blocks.1.norm_x1.weight"}, tmp_path / "half.pth"
    )
    torch.save(state | {"final_layer.linear.bias": torch.full((3,), 1e6)}, tmp_path / "large.pth")
    (tmp_path / "there.safetensors").write_bytes(b"old")
    before = sorted(tmp_path.iterdir())
    source, target = tmp_path / change.pop("source", "net.pth"), tmp_path / change.pop("target", "net.safetensors")
    with pytest.raises(error, match=message):
        convert(source, target, overrides=Overrides(space="flux", kind="teacher"), **change)
    assert sorted(tmp_path.iterdir()) == before
    assert (tmp_path / "there.safetensors").read_bytes() == b"old"


def test_what_is_written_is_what_the_library_reads(tmp_path):
    tensors = {
        "scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "half": torch.randn(3).bfloat16(),
        "wide": torch.randn(2, 2, dtype=torch.float64), "turned": torch.randn(3, 4).T, "odd é name": torch.randn(1),
    }  # fmt: skip
    write_safetensors(tmp_path / "t.safetensors", tensors, {"key": "välue"})
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert file.metadata() == {"key": "välue"}
        for name, value in tensors.items():
            assert torch.equal(file.get_tensor(name), value)
            assert file.get_tensor(name).dtype == value.dtype
    assert read_header(tmp_path / "t.safetensors").shapes == {
        name: tuple(value.shape) for name, value in tensors.items()
    }
