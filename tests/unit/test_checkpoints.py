# SPDX-License-Identifier: Apache-2.0
"""The table of checkpoints agrees with the official configurations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pidecode.errors import SettingError
from pidecode.registry.checkpoints import (
    APACHE_2,
    CHECKPOINTS,
    ENCODERS,
    NSCL_V1,
    REPOSITORY,
    STUDENT_TIMES,
    Checkpoint,
    get_checkpoint,
    variants,
)
from pidecode.registry.configs import PiDConfig
from pidecode.registry.spaces import SPACES, get_space

OFFICIAL: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).parents[1] / "data" / "official_configs.json").read_text()
)["models"]

GATES = {"sigma_aware_per_token_per_dim": "per_channel", "sigma_aware_per_token": "per_token"}
NAMES = {
    "hidden_size": "hidden_size", "num_groups": "num_heads", "patch_depth": "patch_depth",
    "patch_size": "patch_size", "pixel_hidden_size": "pixel_hidden_size", "pixel_depth": "pixel_depth",
    "pixel_attn_hidden_size": "pixel_attn_hidden_size", "pixel_num_groups": "pixel_num_heads",
    "txt_embed_dim": "text_dim", "txt_max_length": "text_length", "use_text_rope": "text_rope",
    "text_rope_theta": "text_rope_theta", "rope_mode": "rope_mode", "lq_latent_channels": "latent_channels",
    "latent_spatial_down_factor": "latent_down", "lq_latent_unpatchify_factor": "latent_unpatchify",
    "sr_scale": "scale", "lq_hidden_dim": "adapter_width", "lq_num_res_blocks": "adapter_blocks",
    "lq_conv_padding_mode": "adapter_padding", "lq_in_channels": "adapter_image_channels",
    "lq_interval": "inject_interval", "pit_lq_inject": "inject_pixels", "lq_aux_rgb_head": "color_head",
    "lq_aux_rgb_head_latent_block_idx": "color_head_tap",
}  # fmt: skip


def row_of(name: str) -> Checkpoint:
    return next(row for row in CHECKPOINTS.values() if row.path == OFFICIAL[name]["file"])


def official_config(name: str) -> PiDConfig:
    args = OFFICIAL[name]["args"]
    values = {ours: args[theirs] for theirs, ours in NAMES.items() if theirs in args}
    values["rope_reference"] = [args["rope_ref_h"], args["rope_ref_w"]]
    values["prediction"] = OFFICIAL[name]["prediction"]
    if "lq_gate_type" in args:
        values["gate"] = GATES[args["lq_gate_type"]]
    else:
        values["latent_channels"] = 0
    return PiDConfig.from_dict(values)


@pytest.mark.parametrize("name", OFFICIAL)
def test_networks_are_the_official_ones(name: str) -> None:
    row, expected = row_of(name), official_config(name)
    if row.kind == "student":  # the color head is for training, and released students may lack it
        expected = expected.without_color_head()
    assert row.config == expected


@pytest.mark.parametrize("name", OFFICIAL)
def test_parameter_counts(name: str) -> None:
    official = OFFICIAL[name]
    row = row_of(name)
    student = official["parameters_without_training_only"] if row.kind == "student" else None
    assert row.parameters == (student or official["parameters"])
    if row.size_bytes is not None:  # two bytes each, and a little wrapping
        assert 0 < row.size_bytes - 2 * row.parameters < 1_000_000


@pytest.mark.parametrize("name", OFFICIAL)
def test_schedules(name: str) -> None:
    official, row = OFFICIAL[name], row_of(name)
    assert row.shift is not None
    dynamic = official["dynamic_shift"]
    if dynamic is None:
        assert (row.shift.base, row.shift.size) == (official["shift"], None)
    else:
        assert (row.shift.base, row.shift.size) == (
            dynamic["base_shift"], dynamic["base_image_size_for_shift_calc"]
        )  # fmt: skip
    if row.kind == "student":
        assert tuple(official["times"]) == STUDENT_TIMES
        assert (row.guidance_scale, row.num_steps) == (1.0, 4)
    else:
        assert row.guidance_scale == official["guidance"]


def test_every_official_row_is_checked() -> None:
    official = {row.path for row in CHECKPOINTS.values() if row.repository == REPOSITORY}
    assert official == {entry["file"] for entry in OFFICIAL.values()}
    assert len(official) == 14


def test_shift_at_a_size() -> None:
    teacher = get_checkpoint("flux", "2kto4k_v1pt5", "teacher")
    assert teacher.shift is not None
    assert teacher.shift.at(2048, 2048) == pytest.approx(6.0)
    assert teacher.shift.at(4096, 4096) == pytest.approx(6.0 * 2**0.5)
    constant = get_checkpoint("flux", "2k").shift
    assert constant is not None
    assert constant.at(4096, 4096) == 6.0


def test_variants_as_released() -> None:
    released = {space: [name for name in variants(space) if name != "tiny"] for space in SPACES}
    assert released == {
        "flux": ["2k", "2kto4k_v1pt5"], "sd3": ["2k", "2kto4k"], "sdxl": ["2kto4k"],
        "flux2": ["2k", "2kto4k_v1pt5"], "qwenimage": ["2kto4k_v1pt5"], "dinov2": ["2k"], "siglip": ["2k"],
    }  # fmt: skip
    assert {space for space in SPACES if variants(space, "teacher")} == {"flux", "flux2", "qwenimage"}


def test_look_up() -> None:
    assert get_checkpoint("flux").variant == "2k"
    assert get_checkpoint("zimage-turbo", "2kto4k_v1pt5").space == "flux"
    assert get_checkpoint("pixeldit").kind == "backbone"
    assert get_checkpoint("pixeldit").latent_space is None
    assert get_checkpoint("siglip").path.startswith("checkpoints/PiD_res2k_sr8x_official_siglip")
    assert get_checkpoint("siglip").latent_space is get_space("siglip")
    assert get_checkpoint("flux", "2kto4k_v1pt5", "teacher").name == "flux/2kto4k_v1pt5/teacher"


def test_tiny_is_ours_and_bundled() -> None:
    tiny = get_checkpoint("tiny")
    assert tiny is get_checkpoint("flux2", "tiny")
    assert tiny.bundled
    assert tiny.license is APACHE_2
    assert tiny.approximate_bytes is None
    assert all(row.license is NSCL_V1 and not row.bundled for row in CHECKPOINTS.values() if row is not tiny)


def test_sizes_in_bytes() -> None:
    assert get_checkpoint("flux", "2k").approximate_bytes == 2_724_842_961
    assert get_checkpoint("sd3", "2k").approximate_bytes == 2 * 1_362_348_170


@pytest.mark.parametrize(
    ("space", "variant", "kind", "message"),
    [
        ("sdxl", "2k", None, "There is no student '2k' for sdxl.*Did you mean 2kto4k"),
        ("flux", "v1pt5", None, "Known are 2k, 2kto4k_v1pt5"),
        ("sd3", None, "teacher", "Teachers exist for flux, flux2, qwenimage"),
        ("flx", None, None, "Did you mean .*flux"),
    ],
)
def test_what_there_is_not(space: str, variant: str | None, kind: Any, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        get_checkpoint(space, variant, kind)


def test_every_space_has_an_encoder() -> None:
    assert set(ENCODERS) == set(SPACES)
    assert ENCODERS["flux"].path == "checkpoints/ae.safetensors"
    assert [space for space, row in ENCODERS.items() if row.path.endswith("/")] == ["dinov2", "siglip"]
