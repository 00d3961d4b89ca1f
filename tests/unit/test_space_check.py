# SPDX-License-Identifier: Apache-2.0
"""`pidecode doctor --space`: what is there is tried, what is missing is named with its fix."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner
from safetensors.torch import save_file

import tiny_models
import tiny_pipelines as tiny
from pidecode.cli.app import cli
from pidecode.cli.space_check import check_space


def test_nothing_here_is_said_with_the_mend() -> None:
    checks = {check.name: check for check in check_space("flux")}
    assert not checks["decoder"].ok
    assert "pidecode pull flux" in checks["decoder"].reason or "hf download" in checks["decoder"].reason
    assert not checks["pipeline flux"].ok
    assert checks["pipeline zimage"].reason == "not on this disk: hf download Tongyi-MAI/Z-Image"


def test_what_is_here_is_tried(tmp_path: Path) -> None:
    decoder = tiny.decoder_for("sdxl")
    tensors = {name: tensor.clone() for name, tensor in decoder.net.state_dict().items()}
    save_file(tensors, tmp_path / "decoder.safetensors", decoder.metadata.to_metadata())
    tiny_models.autoencoder("sdxl").save_pretrained(tmp_path / "vae")
    own = ["-m", str(tmp_path / "decoder.safetensors"), "--encoder", str(tmp_path / "vae"), "--json"]
    done = CliRunner().invoke(cli, ["doctor", "--space", "sdxl", *own])
    assert done.exit_code == 0, done.output
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["decoder"]["ok"]
    assert checks["one small decode"] == {
        "name": "one small decode",
        "ok": True,
        "reason": "128x128 pixels, all finite",
    }
    assert "latent [1, 4, 32, 32]" in checks["encoder"]["reason"] or not checks["encoder"]["ok"]
    (tmp_path / "vae" / "config.json").unlink()
    done = CliRunner().invoke(cli, ["doctor", "--space", "sdxl", *own])
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert "holds no config.json" in checks["encoder"]["reason"]


def test_what_ships_is_tried_where_the_official_decoder_is_missing() -> None:
    checks = {check.name: check for check in check_space("flux2")}
    assert not checks["decoder"].ok
    assert checks["decoder tiny"].ok
    assert "`-m tiny`" in checks["decoder tiny"].reason
    assert checks["one small decode"].ok


def test_the_model_needs_its_space() -> None:
    done = CliRunner().invoke(cli, ["doctor", "--model", "x"])
    assert done.exit_code == 2
    assert "act together with --space" in done.output
