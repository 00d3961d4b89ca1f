# SPDX-License-Identifier: Apache-2.0
"""From shapes to a configuration and from tensors to a network: nothing guessed, nothing missing, nothing copied."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from pidecode.errors import CheckpointError, SettingError
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import PiDConfig, backbone, debug_config, v1, v1pt5
from pidecode.weights.detect import COLOR_HEAD, infer_shape
from pidecode.weights.load import build_network
from pidecode.weights.metadata import CheckpointMetadata
from pidecode.weights.read import read_weights

GOLDEN = Path(__file__).parents[1] / "data" / "golden"

RELEASED = {
    "flux 2k": v1(latent_channels=16, latent_down=8),
    "sdxl": v1(latent_channels=4, latent_down=8),
    "flux2 2k": v1(latent_channels=128, latent_down=16),
    "siglip": v1(latent_channels=1152, latent_down=16, scale=8),
    "flux v1.5": v1pt5(latent_channels=16, latent_down=8),
    "flux2 v1.5": v1pt5(latent_channels=128, latent_down=16, latent_unpatchify=2),
    "flux2 v1.5 teacher": v1pt5(latent_channels=128, latent_down=16, latent_unpatchify=2, color_head=True),
    "backbone": backbone(),
}
SMALL = {
    "v1.5": debug_config(),
    "v1": debug_config(gate="per_channel", inject_pixels=False, adapter_padding="zeros", rope_reference=(1024, 1024)),
    "teacher": debug_config(color_head=True),
    "no text": debug_config(text_dim=0),
    "no pixel blocks": debug_config(pixel_depth=0),
    "no adapter": debug_config(latent_channels=0, gate="per_channel", inject_pixels=False),
    "every block": debug_config(inject_interval=1),
    "one injection": debug_config(inject_interval=3),
    "six blocks": debug_config(patch_depth=6, inject_interval=2),
    "flux2": debug_config(latent_channels=128, latent_down=16, latent_unpatchify=2),
    "folded latent": debug_config(latent_channels=4, latent_down=2),
    "image and latent": debug_config(adapter_image_channels=3),
    "image only": debug_config(latent_channels=0, adapter_image_channels=3, inject_pixels=True),
    "deeper adapter": debug_config(adapter_blocks=3, adapter_width=12),
    "patch 8": debug_config(patch_size=8, scale=2),
}


def network(config):
    torch.manual_seed(0)
    net = PiDNet(config)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return net


def shapes_of(config):
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in PiDNet(config).state_dict().items()}


@pytest.mark.parametrize("config", [*RELEASED.values(), *SMALL.values()], ids=[*RELEASED, *SMALL])
def test_shapes_show_what_they_can(config):
    structure = infer_shape(shapes_of(config))
    assert structure.difference_from(config) is None
    assert structure.values["hidden_size"] == config.hidden_size
    assert structure.values.get("color_head", False) == config.color_head
    assert structure.has_adapter == config.has_adapter
    if config.has_adapter and config.num_injections > 1:
        assert structure.values["inject_interval"] == config.inject_interval


@pytest.mark.parametrize("change", [
    {"hidden_size": 64}, {"num_heads": 4}, {"patch_size": 8}, {"pixel_hidden_size": 8}, {"pixel_num_heads": 2},
    {"text_dim": 20}, {"text_length": 7}, {"text_dim": 0}, {"adapter_width": 12}, {"adapter_blocks": 2},
    {"gate": "per_channel"}, {"inject_pixels": False}, {"inject_interval": 1}, {"latent_channels": 4}, {"scale": 1},
    {"pixel_depth": 2}, {"patch_depth": 4},
])  # fmt: skip
def test_each_disagreement_is_named(change):
    said = infer_shape(shapes_of(debug_config())).difference_from(debug_config(**change))
    assert said is not None
    assert next(iter(change)) in said


def test_generations():
    assert [infer_shape(shapes_of(RELEASED[n])).generation for n in ("flux 2k", "flux v1.5", "backbone")] == [
        "v1", "v1pt5", "backbone",
    ]  # fmt: skip
    assert infer_shape(shapes_of(debug_config(inject_pixels=False))).generation is None


def test_an_undecidable_interval_is_an_error_that_settles_it():
    shapes = shapes_of(debug_config(patch_depth=6, inject_interval=4))
    with pytest.raises(SettingError, match=r"3 or 4 or 5; .* its metadata"):
        infer_shape(shapes)
    assert infer_shape(shapes, interval=4).values["inject_interval"] == 4
    with pytest.raises(CheckpointError, match="no interval gives that"):
        infer_shape(shapes, interval=1)


def test_files_of_something_else_are_refused():
    with pytest.raises(
        CheckpointError, match=r"does not hold a PiD network: it lacks s_embedder\.proj\.weight .*decoder\.conv_in"
    ):
        infer_shape({"decoder.conv_in.weight": (4, 4, 3, 3)}, "vae.safetensors")
    shapes = shapes_of(debug_config())
    for name, shape, message in [
        ("s_embedder.proj.weight", (32, 700), "a patch has 233 pixels, no square"),
        ("s_embedder.proj.weight", (32,), "dimensions were expected"),
        ("patch_blocks.0.attn.q_norm_x.weight", (5,), "does not divide into heads"),
        ("patch_blocks.0.attn.q_norm_x.weight", (0,), "does not divide into heads"),
        ("pixel_blocks.0.adaLN_modulation.0.weight", (7, 32), "contradicts itself"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            infer_shape(shapes | {name: shape})
    gap = {name: shape for name, shape in shapes.items() if not name.startswith("patch_blocks.1.")}
    with pytest.raises(CheckpointError, match="lacks some of patch_blocks"):
        infer_shape(gap)
    cut = {name: shape for name, shape in shapes.items() if not name.startswith("lq_proj.")}
    with pytest.raises(CheckpointError, match=r"lacks lq_proj\.latent_proj"):
        infer_shape(cut)


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("v1.5", ".pth"), ("v1.5", ".safetensors"), ("v1", ".safetensors"), ("teacher", ".safetensors"),
     ("no text", ".safetensors"), ("image and latent", ".safetensors"), ("no adapter", ".safetensors")],
)  # fmt: skip
def test_a_network_comes_back_as_it_was(tmp_path, name, suffix):
    config = SMALL[name]
    original = network(config)
    path = tmp_path / f"net{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(original.state_dict(), path)
    tensors = read_weights(path).tensors
    places = {name: tensor.data_ptr() for name, tensor in tensors.items()}
    again = build_network(tensors, config)
    assert not tensors  # handed over, not kept beside the network
    kept = {name: value for name, value in original.state_dict().items() if not name.startswith(COLOR_HEAD)}
    assert set(kept) == set(again.state_dict())
    for name, value in kept.items():
        assert torch.equal(again.state_dict()[name], value)
        assert again.state_dict()[name].data_ptr() == places[name]  # the file's own memory, not a copy
    assert not again.training
    assert not any(parameter.requires_grad for parameter in again.parameters())


@pytest.mark.parametrize("name", ["net_v1", "net_v1pt5"])
def test_the_reference_networks_build_and_match_their_shapes(name):
    stored = load_file(GOLDEN / f"{name}.safetensors")
    tensors = {key.removeprefix("weights."): value for key, value in stored.items() if key.startswith("weights.")}
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        said = json.loads(file.metadata()["config"])["kwargs"]
    seen = infer_shape({key: tuple(value.shape) for key, value in tensors.items()}).values
    assert seen["hidden_size"] == said["hidden_size"]
    assert seen["num_heads"] == said["num_groups"]
    assert seen["patch_size"] == said["patch_size"]
    assert seen["inject_interval"] == said["lq_interval"]
    assert seen["adapter_blocks"] == said["lq_num_res_blocks"]
    assert seen["color_head"] == said["lq_aux_rgb_head"]
    unseen = {"latent_channels": 16, "latent_down": 8}
    build_network(tensors, PiDConfig(**seen | unseen))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, None])
def test_number_formats(dtype):
    tensors = {name: value.double() for name, value in network(debug_config()).state_dict().items()}
    built = build_network(tensors, debug_config(), dtype=dtype)
    assert {parameter.dtype for parameter in built.parameters()} == {dtype or torch.float32}
    with pytest.raises(SettingError, match="dtype is"):
        build_network({}, debug_config(), dtype=torch.int8)


def test_the_color_head_is_left_out():
    plain, head = debug_config(), debug_config(color_head=True)
    assert not hasattr(build_network(network(head).state_dict(), head).lq_proj, "lq_aux_rgb_head")
    assert not hasattr(build_network(network(head).state_dict(), plain).lq_proj, "lq_aux_rgb_head")
    assert not hasattr(build_network(network(plain).state_dict(), head).lq_proj, "lq_aux_rgb_head")


def test_a_missing_adapter_is_called_that():
    tensors = {n: v for n, v in network(debug_config()).state_dict().items() if not n.startswith(("lq_proj", "pit_lq"))}
    with pytest.raises(CheckpointError, match=r"the adapter is missing, so the image would ignore the latent\."):
        build_network(tensors, debug_config(), source="net.pth")


def test_missing_unexpected_and_wrong_tensors_are_named():
    tensors = network(debug_config()).state_dict()
    for name in [name for name in tensors if name.startswith("patch_blocks.1.")]:
        tensors[f"stray.{name}"] = tensors.pop(name)
    tensors["final_layer.linear.weight"] = torch.zeros(4, 4)
    with pytest.raises(CheckpointError) as fault:
        build_network(dict(tensors), debug_config(), source="net.pth")
    message = str(fault.value)
    assert "net.pth does not fit the network" in message
    assert "missing: patch_blocks.1." in message
    assert re.search(r" and (\d+) more \((\d+) in all\)", message)
    assert "unexpected: stray.patch_blocks.1." in message
    assert "wrong shape: final_layer.linear.weight is [4, 4], expected [3, 4]" in message
    assert "adapter" not in message


def test_our_own_metadata_round_trips():
    identity = CheckpointMetadata(
        kind="student", config=debug_config(prediction="x0"), space="flux2", variant="tiny", license="Apache-2.0",
        times=(0.999, 0.634, 0.0), extra={"steps_trained": 10},
    )  # fmt: skip
    assert CheckpointMetadata.from_metadata(identity.to_metadata()) == identity
    encoder = CheckpointMetadata(kind="encoder", config=None, space="flux2", extra={"config": {"width": 8}})
    assert CheckpointMetadata.from_metadata(encoder.to_metadata()) == encoder
    assert CheckpointMetadata.from_metadata({"format": "pt"}) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "update pidecode"),
        ({"kind": "wizard"}, "kind is 'wizard'"),
        ({"config": {"hidden_size": "big"}}, "hidden_size is 'big'"),
        ({"config": {"magic": 1}}, "magic"),
        ({"config": None}, "describes itself wrongly"),
        ({"prediction": "x0"}, "said twice"),
        ({"times": [0.5, 0.9]}, "do not fall"),
        ({"times": ["a"]}, "describes itself wrongly"),
        ({"space": 3}, "space is 3"),
    ],
)
def test_damaged_metadata_is_refused(change, message):
    record = json.loads(CheckpointMetadata(kind="student", config=debug_config()).to_metadata()["pidecode"])
    with pytest.raises(CheckpointError, match=message):
        CheckpointMetadata.from_metadata({"pidecode": json.dumps(record | change)}, "net.safetensors")


@pytest.mark.parametrize("text", ["", "[]", "{", "3"])
def test_metadata_that_is_no_record(text):
    with pytest.raises(CheckpointError, match="describes itself wrongly"):
        CheckpointMetadata.from_metadata({"pidecode": text})


def test_identity_checks_itself():
    with pytest.raises(SettingError, match="has no network configuration"):
        CheckpointMetadata(kind="encoder", config=replace(debug_config()))
    with pytest.raises(SettingError, match="needs a network configuration"):
        CheckpointMetadata(kind="student", config=None)
