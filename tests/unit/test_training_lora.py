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


LAYER = "patch_blocks.0.attn.proj_x"
UNDERSCORED = LAYER.replace(".", "_")


@pytest.mark.parametrize(
    ("down", "up", "alpha"),
    [
        (f"{LAYER}.lora_A.weight", f"{LAYER}.lora_B.weight", None),
        (f"base_model.model.{LAYER}.lora_A.default.weight", f"base_model.model.{LAYER}.lora_B.default.weight", None),
        (f"lora_unet_{UNDERSCORED}.lora_down.weight", f"lora_unet_{UNDERSCORED}.lora_up.weight",
         f"lora_unet_{UNDERSCORED}.alpha"),
        (f"diffusion_model.{LAYER}.lora_down.weight", f"diffusion_model.{LAYER}.lora_up.weight",
         f"diffusion_model.{LAYER}.alpha"),
        (f"transformer.{LAYER}.lora.down.weight", f"transformer.{LAYER}.lora.up.weight",
         f"transformer.{LAYER}.lora_alpha"),
    ],
)  # fmt: skip
def test_names_and_alphas_of_other_programs(down: str, up: str, alpha: str | None, tmp_path: Path) -> None:
    net = random_net(1)
    tensors = {down: torch.ones(2, 32), up: torch.ones(32, 2)}
    if alpha is not None:
        tensors[alpha] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "other.safetensors")
    before = net.get_parameter(f"{LAYER}.weight").clone()
    assert apply_lora(net, tmp_path / "other.safetensors") == 1
    expected = before + 2 * (1.5 if alpha else 1.0)
    assert torch.allclose(net.get_parameter(f"{LAYER}.weight"), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "strength"),
    [
        ({"lora_alpha": 16, "r": 4}, 8.0),
        ({"lora_alpha": 16, "use_rslora": True}, 16 / 2**0.5),
        ({"lora_alpha": 16, "alpha_pattern": {"proj_x": 5}}, 2.5),
        ({"r": 2}, 1.0),
    ],
)
@pytest.mark.parametrize("given", ["folder", "file", "diffusers"])
def test_the_configuration_of_an_adapter_counts(
    config: dict[str, object], strength: float, given: str, tmp_path: Path
) -> None:
    net = random_net(1)
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(2, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 2)}
    file = tmp_path / ("pytorch_lora_weights.safetensors" if given == "diffusers" else "adapter_model.safetensors")
    metadata = json.dumps({f"transformer.{key}": value for key, value in config.items()})
    save_file(tensors, file, {"lora_adapter_metadata": metadata} if given == "diffusers" else None)
    if given != "diffusers":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    before = net.get_parameter(f"{LAYER}.weight").clone()
    apply_lora(net, file if given == "file" else tmp_path)
    assert torch.allclose(net.get_parameter(f"{LAYER}.weight"), before + 2 * strength, atol=1e-4)


@pytest.mark.parametrize("pattern", ["(", r"([a-z_.0-9]+)+x", ".*.*.*.*_y"])
def test_a_pattern_of_layers_cannot_hang(pattern: str, tmp_path: Path) -> None:
    tensors = {f"{LAYER}.lora_A.weight": torch.ones(2, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 2)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "alpha_pattern": {pattern: 3}}))
    with pytest.raises(CheckpointError, match="configuration of the adapter"):
        apply_lora(random_net(1), tmp_path)


@pytest.mark.parametrize("alpha", [torch.ones(2), torch.zeros(0)])
def test_an_alpha_is_one_number(alpha: torch.Tensor, tmp_path: Path) -> None:
    name = f"lora_unet_{UNDERSCORED}"
    tensors = {f"{name}.lora_down.weight": torch.ones(2, 32), f"{name}.lora_up.weight": torch.ones(32, 2)}
    save_file({**tensors, f"{name}.alpha": alpha}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"no adapter file that is understood.*\.alpha"):
        apply_lora(random_net(1), tmp_path / "a.safetensors")


def test_adapters_that_compute_something_else_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no adapter.*adapter_model\.safetensors"):
        apply_lora(random_net(1), tmp_path)
    save_file(
        {f"{LAYER}.lora_A.weight": torch.ones(2, 32), f"{LAYER}.lora_B.weight": torch.ones(32, 2)},
        tmp_path / "adapter_model.safetensors",
    )
    for config, said in (({"use_dora": True}, "use_dora"), ({"peft_type": "LOHA"}, "peft_type")):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=f"with {said}, which is not understood"):
            apply_lora(random_net(1), tmp_path)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="configuration of the adapter"):
        apply_lora(random_net(1), tmp_path)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"patch_blocks.0.attn.proj_x.lora_A.weight": torch.ones(2, 32)}, "understood here.*proj_x"),
        ({"weight": torch.ones(2)}, "understood here.*holds weight"),
        ({"patch_blocks.0.attn.proj_x.dora_scale": torch.ones(2)}, "understood here.*dora_scale"),
        ({"lora_te_text_model.lora_up.weight": torch.ones(2, 2)}, "lora_te_text_model, which this network lacks"),
        ({"a.lora_A.weight": torch.ones(2, 4), "a.lora_B.weight": torch.ones(4, 2)}, "which this network lacks"),
        (
            {
                "patch_blocks.0.attn.proj_x.lora_A.weight": torch.ones(2, 8),
                "patch_blocks.0.attn.proj_x.lora_B.weight": torch.ones(8, 2),
            },
            "of another network",
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
    save_file(tensors, tmp_path / "y.safetensors", {"pidecode_lora": json.dumps({"format": 2, "rank": 2, "alpha": 1})})
    with pytest.raises(CheckpointError, match="configuration of the adapter .* its format is unknown"):
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
        ({}, {"format": 2}, "format is unknown"),
        ({}, {"alpha": [2]}, r"its alpha is \[2\], and must be a number; export it again"),
        ({}, {"alpha": None}, "its alpha is None"),
        (lambda t: t.reshape(-1), {}, "of another network"),
        (lambda t: t[..., None], {}, "of another network"),
        (lambda t: t[:0], {}, "of another network"),
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
