# SPDX-License-Identifier: Apache-2.0
"""What a file is: shown by its shapes, its metadata, its official name or the caller, and never guessed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pidecode.errors import CheckpointError, SettingError
from pidecode.models.pid.network import PiDNet
from pidecode.registry.checkpoints import CHECKPOINTS
from pidecode.registry.configs import debug_config
from pidecode.weights.detect import Overrides, detect, official_name
from pidecode.weights.metadata import CheckpointMetadata
from pidecode.weights.read import WeightFile, check_formats
from pidecode.weights.resolve import resolve_checkpoint

RELEASED = [row for row in CHECKPOINTS.values() if row.config is not None]


def file_of(config, path="some/where/weights.pth", metadata=None):
    """A file as reading would give it, of any size, in no memory."""
    with torch.device("meta"):
        return WeightFile(Path(path), dict(PiDNet(config).state_dict()), metadata or {})


def without_head(file):
    tensors = {name: value for name, value in file.tensors.items() if "lq_aux_rgb_head" not in name}
    return WeightFile(file.path, tensors, file.metadata)


@pytest.mark.parametrize("row", RELEASED, ids=lambda row: row.name)
def test_every_released_file_is_known_by_its_official_name(row):
    found = detect(file_of(row.config, f"/cache/snapshots/abc/{row.path}"))
    assert found.config == row.config
    assert (found.kind, found.variant, found.license) == (row.kind, row.variant, "NSCLv1")
    assert found.space == (None if row.kind == "backbone" else row.space)


@pytest.mark.parametrize("row", RELEASED, ids=lambda row: row.name)
def test_every_released_file_is_known_to_a_caller_who_names_it(row):
    found = detect(file_of(row.config), Overrides(space=row.space, variant=row.variant, kind=row.kind))
    assert (found.config, found.kind, found.variant) == (row.config, row.kind, row.variant)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("pid_flux1_512_to_2048_4step_bf16.safetensors", ("flux", "2k", "student")),
        ("pid_sdxl_1024_to_4096_4step_bf16.safetensors", ("sdxl", "2kto4k", "student")),
        ("pid_flux2_1024_to_4096_4step_2606_bf16.safetensors", ("flux2", "2kto4k", "student")),
        ("pid_1.5_qwenimage_1024_to_4096_4step_bf16.safetensors", ("qwenimage", "2kto4k_v1pt5", "student")),
        ("pid_1.5_flux2_1024_to_4096_bf16.safetensors", ("flux2", "2kto4k_v1pt5", "teacher")),
        (
            "checkpoints_deprecated/PiD_res2kto4k_sr4x_official_flux_distill_4step/model.pth",
            ("flux", "2kto4k", "student"),
        ),
        ("PiD_v1pt5_res2kto4k_sr4x_official_flux_undistilled/model_ema_bf16.pth", ("flux", "2kto4k_v1pt5", "teacher")),
        ("PiD_res2k_sr8x_official_siglip_distill_4step.safetensors", ("siglip", "2k", "student")),
        ("PixelDiT_finetune_2kto4k/model_ema_bf16.pth", ("pixeldit", "2kto4k", "backbone")),
    ],
)
def test_official_names(name, expected):
    assert tuple(official_name(f"/x/{name}").values()) == expected


@pytest.mark.parametrize("name", ["flux.pth", "my_pid_flux1.safetensors", "pid_flux1.pth", "sd3/model_ema_bf16.pth"])
def test_other_names_say_nothing(name):
    assert official_name(name) == {}


def rows(**wanted):
    return next(row for row in RELEASED if all(getattr(row, name) == value for name, value in wanted.items()))


def test_look_alikes_must_be_told_apart():
    v1 = file_of(rows(space="flux", variant="2k").config)
    with pytest.raises(SettingError, match=r"may be for flux or sd3: .* space='flux'\.$"):
        detect(v1)
    assert detect(v1, Overrides(space="sd3")).space == "sd3"
    assert detect(v1, Overrides(space="sd3")).variant is None  # 2k and 2kto4k look alike too
    assert detect(v1, Overrides(space="zimage")).space == "flux"
    assert detect(v1, Overrides(variant="2kto4k")).space == "sd3"
    newer = file_of(rows(space="flux", variant="2kto4k_v1pt5", kind="student").config)
    with pytest.raises(SettingError, match="may be for flux or qwenimage"):
        detect(newer)


def test_what_the_channels_show_need_not_be_told():
    assert detect(file_of(rows(space="sdxl").config)).space == "sdxl"
    assert detect(file_of(rows(space="flux2", variant="2k").config)).space == "flux2"
    assert detect(file_of(rows(space="siglip").config)).config.scale == 8


def test_student_or_teacher_must_be_told():
    row = rows(space="flux2", variant="2kto4k_v1pt5", kind="teacher")
    with pytest.raises(SettingError, match=r"kind='student' or kind='teacher'"):
        detect(file_of(row.config))
    with pytest.raises(SettingError, match=r"kind='student'"):
        detect(file_of(row.config), Overrides(variant=row.variant))
    with pytest.raises(SettingError, match=r"kind='student'"):
        detect(without_head(file_of(row.config)))
    assert detect(without_head(file_of(row.config)), Overrides(variant=row.variant)).kind == "student"
    assert detect(file_of(row.config), Overrides(kind="teacher")).kind == "teacher"
    with pytest.raises(SettingError, match="kind is 'wizard'"):
        Overrides(kind="wizard")


def test_a_name_and_a_caller_who_disagree():
    row = rows(space="sd3", variant="2k")
    with pytest.raises(SettingError, match=r"space 'sd3' by its name, and space='flux' was given"):
        detect(file_of(row.config, row.path), Overrides(space="flux"))
    with pytest.raises(SettingError, match=r"kind 'student' by its name"):
        detect(file_of(row.config, row.path), Overrides(kind="teacher"))


def test_a_name_and_shapes_that_disagree():
    sd3 = rows(space="sd3", variant="2k")
    with pytest.raises(CheckpointError, match=r"not a network for sdxl: its adapter takes 16 channels, .* have 4"):
        detect(file_of(sd3.config, rows(space="sdxl").path))
    with pytest.raises(CheckpointError, match=r"no '2kto4k_v1pt5': by its tensors it is built like v1"):
        detect(file_of(sd3.config), Overrides(space="flux", variant="2kto4k_v1pt5"))


def test_a_missing_adapter_is_called_that():
    row = rows(space="flux", variant="2k")
    file = file_of(row.config, row.path)
    cut = {name: value for name, value in file.tensors.items() if not name.startswith("lq_proj.")}
    with pytest.raises(CheckpointError, match=r"has no adapter .* cannot decode latents of flux"):
        detect(WeightFile(file.path, cut))
    with pytest.raises(CheckpointError, match="has no adapter"):
        detect(WeightFile(Path("x.pth"), cut), Overrides(kind="student"))
    with pytest.raises(SettingError, match="space='pixeldit'"):
        detect(WeightFile(Path("x.pth"), cut))
    assert detect(WeightFile(Path("x.pth"), cut), Overrides(space="pixeldit")).kind == "backbone"
    with pytest.raises(CheckpointError, match="no backbone"):
        detect(WeightFile(Path("x.pth"), file.tensors), Overrides(kind="backbone"))


SMALL_V1 = debug_config(gate="per_channel", inject_pixels=False, adapter_padding="zeros", rope_reference=(1024, 1024))


@pytest.mark.parametrize("config", [debug_config(), SMALL_V1], ids=["v1.5", "v1"])
def test_networks_of_any_size_follow_their_generation(config):
    found = detect(file_of(config), Overrides(space="flux", kind="teacher"))
    assert found.config == config
    assert (found.kind, found.space, found.variant, found.license) == ("teacher", "flux", None, None)
    with pytest.raises(SettingError, match="flux or sd3 or qwenimage"):
        detect(file_of(config), Overrides(kind="student"))
    with pytest.raises(SettingError, match="kind="):
        detect(file_of(config), Overrides(space="flux"))


def test_a_small_network_with_flux2_latents_is_found_by_its_channels():
    config = debug_config(latent_channels=128, latent_down=16, latent_unpatchify=2)
    assert detect(file_of(config), Overrides(kind="student")).config == config
    whole = debug_config(latent_channels=128, latent_down=16)
    assert detect(file_of(whole), Overrides(kind="student")).config == whole


def test_networks_like_no_released_one_need_metadata():
    config = debug_config(latent_channels=6, latent_down=4, prediction="x0", scale=8)
    with pytest.raises(SettingError, match="latents of 6 channels, as no known latent space has; .* its metadata"):
        detect(file_of(config))
    with pytest.raises(SettingError, match=r"neither like v1 nor like v1\.5.* its metadata"):
        detect(file_of(debug_config(inject_pixels=False)), Overrides(space="flux", kind="student"))


def test_a_image_branch_is_counted_by_its_pixels():
    config = debug_config(adapter_image_channels=3)
    assert detect(file_of(config), Overrides(space="flux", kind="student")).config == config


def own(config, **changes):
    return CheckpointMetadata(
        **{"kind": "student", "config": config, "space": "flux", "license": "Apache-2.0"} | changes
    )


def test_our_own_metadata_needs_no_help():
    config = debug_config(prediction="x0", rope_reference=(512, 512), inject_interval=3, patch_depth=4)
    identity = own(config, variant="mine", times=(0.9, 0.0))
    assert detect(file_of(config, metadata=identity.to_metadata())) == identity
    headed = debug_config(color_head=True)
    assert detect(without_head(file_of(headed, metadata=own(headed).to_metadata()))).config == headed


def test_our_own_metadata_and_a_caller():
    metadata = own(debug_config(), variant=None).to_metadata()
    with pytest.raises(SettingError, match=r"space 'flux' by its metadata, and space='sd3' was given"):
        detect(file_of(debug_config(), metadata=metadata), Overrides(space="sd3"))
    assert (
        detect(file_of(debug_config(), metadata=metadata), Overrides(space="zimage", variant="mine")).variant == "mine"
    )


def test_metadata_that_lies_is_refused():
    metadata = own(debug_config(hidden_size=64)).to_metadata()
    with pytest.raises(CheckpointError, match="hidden_size is 32 by its tensors and 64"):
        detect(file_of(debug_config(), metadata=metadata))
    record = json.loads(metadata["pidecode"]) | {"kind": "encoder"}
    with pytest.raises(CheckpointError, match="an image encoder, not a decoder"):
        detect(file_of(debug_config(), metadata={"pidecode": json.dumps(record)}))


def test_a_file_of_something_else():
    with pytest.raises(CheckpointError, match="does not hold a PiD network"):
        detect(WeightFile(Path("vae.safetensors"), {"decoder.conv_in.weight": torch.zeros(1)}))


@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
def test_formats_of_comfyui_are_refused_by_name(format: str) -> None:
    note = torch.frombuffer(bytearray(f'{{"format": "{format}"}}', "utf-8"), dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=rf"is quantized \({format.upper()}: {format}"):
        check_formats({"blocks.0.weight": torch.zeros(2, 2, dtype=torch.uint8), "blocks.0.comfy_quant": note})


@pytest.mark.parametrize("where", ["checkpoints_deprecated/{}", "checkpoints/{}_2606", "{}", "checkpoints/{}"])
def test_official_files_are_found_where_they_were_moved(where: str, tmp_path: Path) -> None:
    folder = tmp_path / where.format("PiD_res2k_sr4x_official_flux_distill_4step")
    folder.mkdir(parents=True)
    file = folder / "model_ema_bf16.pth"
    file.write_bytes(b"weights")
    assert resolve_checkpoint(tmp_path, space="flux", variant="2k").path == file
