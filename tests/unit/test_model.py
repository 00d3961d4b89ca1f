# SPDX-License-Identifier: Apache-2.0
"""The network beyond its goldens: types, grids, batches, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pidecode.errors import LatentError, SettingError, SizeError
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import PiDConfig, backbone, debug_config, v1, v1pt5
from random_networks import normal_net


def inputs(config: PiDConfig, batch: int = 1, cells: tuple[int, int] = (2, 3)) -> dict[str, Tensor]:
    side = config.pixels_per_latent_cell
    given = {
        "x_B3HW": torch.randn(batch, 3, cells[0] * side, cells[1] * side),
        "t_B": torch.linspace(999.0, 342.0, batch),
        "latent": torch.randn(batch, config.latent_channels, *cells),
        "sigma": torch.linspace(0.0, 0.5, batch),
    }
    if config.has_text:
        given["text"] = torch.randn(batch, config.text_length, config.text_dim)
    return given


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close_to_single(dtype: torch.dtype) -> None:
    config = debug_config()
    net, given = normal_net(config), inputs(config, batch=2)
    exact = net(**given)
    half = net.to(dtype)(**given)
    assert half.dtype == torch.float32
    relative = (half - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert relative < (0.03 if dtype == torch.bfloat16 else 0.004)


def test_a_batch_equals_its_members_alone() -> None:
    config = debug_config()
    net, given = normal_net(config), inputs(config, batch=3)
    together = net(**given)
    for index in range(3):
        alone = net(**{name: value[index : index + 1] for name, value in given.items()})
        assert torch.allclose(together[index : index + 1], alone, atol=1e-5)


def test_a_network_without_text_takes_no_prompt() -> None:
    config = debug_config(text_dim=0)
    net, given = normal_net(config), inputs(config)
    assert net(**given).shape == given["x_B3HW"].shape
    assert not any("_y" in name or "txt" in name for name in net.state_dict())
    with pytest.raises(SettingError, match="no text stream"):
        net(**given, text=torch.zeros(1, 10, 16))


def test_the_latent_reaches_the_image_and_sigma_shuts_it_out() -> None:
    config = debug_config()
    net, given = normal_net(config), inputs(config)
    base = net(**given)
    moved = net(**given | {"latent": given["latent"] + 1})
    assert (base - moved).abs().max() > 1e-4
    for gate in (*net.lq_proj.gate_modules, net.pit_lq_gate):
        gate.log_alpha.fill_(6.0)  # exp(6) * sigma swamps the content
    noisy = net(**given | {"sigma": torch.ones(1)})
    without = net(given["x_B3HW"], given["t_B"], given["text"])
    assert torch.allclose(noisy, without, atol=1e-6)


def test_gradients_reach_every_parameter_that_matters() -> None:
    config = debug_config(color_head=True)
    net, given = normal_net(config), inputs(config)
    net.requires_grad_(True).train()
    grid = net.grid_of(*given["x_B3HW"].shape[-2:])
    condition = net.prepare(grid, given["text"], given["latent"], given["sigma"], want_color=True)
    assert condition.color is not None
    (net.denoise(given["x_B3HW"], given["t_B"], condition).square().mean() + condition.color.square().mean()).backward()
    last = config.patch_depth - 1
    unread = tuple(f"patch_blocks.{last}.{part}" for part in ("attn.proj_y", "norm_y2", "mlp_y", "attn.q_norm_y"))
    for name, parameter in net.named_parameters():
        unused = parameter.grad is None or not parameter.grad.any()
        # The first position of a rotation leaves nothing unused; a gate of sigma 0 does not move log_alpha.
        assert unused == name.startswith(unread) or name.endswith("log_alpha"), name


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"latent": torch.zeros(1, 4, 2, 3)}, LatentError, r"\[batch, 16, h, w\]"),
        ({"sigma": None}, LatentError, "without sigma"),
        ({"sigma": torch.zeros(2)}, LatentError, "2 values for 1 latents"),
        ({"text": None}, SettingError, "needs prompt states"),
        ({"text": torch.zeros(1, 10, 3)}, SettingError, "prompt states of shape"),
        ({"x_B3HW": torch.zeros(1, 3, 60, 96)}, SizeError, "nearest size that does is 96x64"),
    ],
)
def test_what_does_not_fit_is_said(change: dict[str, Tensor | None], error: type[Exception], words: str) -> None:
    config = debug_config()
    net, given = normal_net(config), inputs(config)
    with pytest.raises(error, match=words):
        net(**given | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden_size": 30}, "hidden_size=30"),
        ({"gate": "per_pixel"}, "gate is 'per_pixel'"),
        ({"adapter_width": 10}, "adapter_width is 10"),
        ({"patch_depth": 0}, "patch_depth is 0"),
        ({"latent_unpatchify": 3}, "latent_channels=16 cannot be unpatchified by 3"),
        ({"rope_reference": (8, 8)}, "rope_reference"),
        ({"pixel_hidden_size": 6}, "pixel_hidden_size is 6"),
    ],
)
def test_a_config_that_cannot_be_names_the_field(change: dict[str, object], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        debug_config(**change)


def test_a_config_survives_a_file() -> None:
    config = v1pt5(latent_channels=128, latent_down=16, latent_unpatchify=2)
    assert PiDConfig.from_dict(config.to_dict()) == config
    with pytest.raises(SettingError, match="Unknown fields depth"):
        PiDConfig.from_dict({"depth": 3})
    with pytest.raises(SettingError, match="patch_depth is '14'"):
        PiDConfig.from_dict({"patch_depth": "14"})


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (v1(latent_channels=16, latent_down=8), 1_362_348_170),
        (v1(latent_channels=1152, latent_down=16, scale=8), 1_367_582_858),
        (v1pt5(latent_channels=128, latent_down=16, latent_unpatchify=2), 1_400_346_771),
        (v1pt5(latent_channels=16, latent_down=8, color_head=True), 1_401_300_163),
        (backbone(), 1_302_470_787),
    ],
)
def test_released_networks_have_the_released_size(config: PiDConfig, parameters: int) -> None:
    with torch.device("meta"):
        net = PiDNet(config)
    assert sum(parameter.numel() for parameter in net.parameters()) == parameters
