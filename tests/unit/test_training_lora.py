# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters: trained through peft, applied without it, at any strength, and refused where they do not fit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pidecode.errors import CheckpointError, SettingError
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import debug_config
from pidecode.training.config import LoRAConfig, apply_settings
from pidecode.training.recipes import get_recipe
from pidecode.weights.load import LoraMetadata, apply_lora, write_lora

pytest.importorskip("peft")

CPU = torch.device("cpu")
CONFIG = debug_config(patch_depth=1)


def random_net(seed: int) -> PiDNet:
    torch.manual_seed(seed)
    net = PiDNet(CONFIG).eval().requires_grad_(False)
    for parameter in net.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return net


def look(net: PiDNet) -> torch.Tensor:
    chance = torch.Generator().manual_seed(3)
    with torch.no_grad():
        image: torch.Tensor = net(
            torch.randn(1, 3, 32, 32, generator=chance), torch.tensor([600.0]),
            torch.randn(1, 10, 16, generator=chance), torch.randn(1, 16, 1, 1, generator=chance), 0.1,
        )  # fmt: skip
    return image


def test_an_applied_adapter_equals_the_injected_one(tmp_path: Path) -> None:
    from pidecode.training.models import adapter_tensors, inject_lora

    trained = random_net(1)
    inject_lora(trained, LoRAConfig(rank=3, alpha=6.0), seed=2)
    assert {name.split(".")[0] for name, p in trained.named_parameters() if p.requires_grad} == {
        "patch_blocks", "pixel_blocks"
    }  # fmt: skip
    assert torch.allclose(look(trained), look(random_net(1)), atol=1e-6)  # it begins by changing nothing
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    path = tmp_path / "adapter.safetensors"
    write_lora(path, adapter_tensors(trained.state_dict()), LoraMetadata(rank=3, alpha=6.0, space="block-dct"))
    merged = random_net(1)
    plain = look(merged)
    assert apply_lora(merged, path) == 7
    assert torch.allclose(look(merged), look(trained), atol=1e-5)
    assert not torch.allclose(look(merged), plain, atol=1e-3)
    apply_lora(merged, path, -1.0)
    assert torch.allclose(look(merged), plain, atol=1e-5)
    half, full = random_net(1), random_net(1)
    apply_lora(half, path, 0.5)
    apply_lora(half, path, 0.5)
    apply_lora(full, path, 1.0)
    assert torch.allclose(look(half), look(full), atol=1e-5)


def test_pefts_own_names_are_read(tmp_path: Path) -> None:
    net = random_net(1)
    layer = "patch_blocks.0.attn.proj_x"
    tensors = {f"base_model.model.{layer}.lora_A.weight": torch.ones(2, 32)}
    tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.ones(32, 2)
    save_file(tensors, tmp_path / "peft.safetensors")
    before = net.get_parameter(f"{layer}.weight").clone()
    apply_lora(net, tmp_path / "peft.safetensors", 0.25)
    assert torch.allclose(net.get_parameter(f"{layer}.weight"), before + 0.5)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.lora_A.weight": torch.ones(2, 4)}, "is no adapter file"),
        ({"weight": torch.ones(2)}, "is no adapter file"),
        ({"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(4, 2)}, "which this network lacks"),
        (
            {
                "patch_blocks.0.attn.proj_x.lora_A.weight": torch.ones(2, 8),
                "patch_blocks.0.attn.proj_x.lora_B.weight": torch.ones(8, 2),
            },
            "trained on another network",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_whole(
    tensors: dict[str, torch.Tensor], message: str, tmp_path: Path
) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    net = random_net(1)
    before = look(net)
    with pytest.raises(CheckpointError, match=message):
        apply_lora(net, tmp_path / "x.safetensors")
    assert torch.equal(look(net), before)


def test_bad_scales_and_metadata_are_refused(tmp_path: Path) -> None:
    layer = "patch_blocks.0.attn.proj_x"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, 32), f"{layer}.lora_B.weight": torch.ones(32, 2)}
    write_lora(tmp_path / "x.safetensors", tensors, LoraMetadata(rank=2, alpha=2.0))
    with pytest.raises(SettingError, match="must be a finite number"):
        apply_lora(random_net(1), tmp_path / "x.safetensors", float("nan"))
    save_file(tensors, tmp_path / "y.safetensors", {"pidecode_lora": json.dumps({"format": 1, "rank": 0, "alpha": 1})})
    with pytest.raises(CheckpointError, match="describes itself wrongly"):
        apply_lora(random_net(1), tmp_path / "y.safetensors")


def test_a_run_trains_adapters_only_and_the_file_changes_the_decoder(tmp_path: Path) -> None:
    from pidecode.training.tasks import train

    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(pixels).save(tmp_path / "images" / "a.png")
    common = [
        f"data.source={str(tmp_path / 'images')!r}", "data.sizes=((32, 32),)", "run.sample_every=0",
        "net.patch_depth=1", "run.checkpoint_every=2", "run.steps=3",
    ]  # fmt: skip
    base = train(apply_settings(get_recipe("debug_direct"), common), tmp_path / "base", device=CPU)
    recipe = apply_settings(get_recipe("debug_direct"), [*common, "lora.rank=2", "optimizer.lr=0.05"])
    recipe = replace(recipe, init_from=str(base))
    adapter = train(recipe, tmp_path / "run", device=CPU)
    assert adapter.name == "adapter.safetensors"
    assert all(".lora_" in name for name in load_file(adapter))
    net = PiDNet(CONFIG)
    net.load_state_dict(load_file(base))
    before = look(net)
    apply_lora(net, adapter, 1.0)
    assert not torch.allclose(look(net), before, atol=1e-4)
    longer = replace(recipe, run=replace(recipe.run, steps=4))
    train(longer, tmp_path / "run", resume=True, device=CPU)


HALVES = {
    "patch_blocks.0.attn.proj_x.lora_A.weight": torch.ones(2, 32),
    "patch_blocks.0.attn.proj_x.lora_B.weight": torch.ones(32, 2),
}


@pytest.mark.parametrize(
    ("change", "record", "said"),
    [
        ({}, {"alpha": float("nan")}, "NaN"),
        ({}, {"alpha": float("inf")}, "Infinity"),
        ({}, {"alpha": 1e300}, "NaN or infinite at strength"),
        ({}, {"alpha": 1e39}, "NaN or infinite at strength"),
        ({}, {"rank": 2.5}, "format or rank"),
        ({}, {"rank": True}, "format or rank"),
        (lambda t: t.reshape(-1), {}, "trained on another network"),
        (lambda t: t[..., None], {}, "trained on another network"),
        (lambda t: t.to(torch.complex64), {}, "complex64"),
        (lambda t: t.to(torch.uint8), {}, "uint8"),
        (lambda t: t * 1e30, {}, "NaN or infinite at strength"),
        (lambda t: t * float("nan"), {}, "NaN or infinite values"),
    ],
)
def test_hostile_adapters_leave_the_weights_as_they_were(tmp_path: Path, change, record, said: str) -> None:
    path = tmp_path / "hostile.safetensors"
    tensors = {name: change(value) if change else value for name, value in HALVES.items()}
    save_file(tensors, path, {"pidecode_lora": json.dumps({"format": 1, "rank": 2, "alpha": 2.0, **record})})
    net = random_net(1)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(CheckpointError, match=said):
        apply_lora(net, path)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
