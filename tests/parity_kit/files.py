# SPDX-License-Identifier: Apache-2.0
"""Reading golden files: one `Case` per recorded scenario, with its inputs, outputs, weights and arguments."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import PiDConfig


@dataclass(frozen=True)
class Case:
    """One recorded scenario or block."""

    file: str
    name: str
    kind: str
    args: Mapping[str, Any]
    inputs: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]
    weights: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)

    def net(self, scale: float = 1.0, *, train: bool = False) -> PiDNet:
        """The network of a `net_*` file, its weights times `scale`."""
        net = PiDNet(net_config(self.config))
        net.load_state_dict({key: value * scale for key, value in self.weights.items()})
        return net.train(train).requires_grad_(train)

    def keyed(self, prefix: str) -> dict[str, Tensor]:
        """Outputs under `prefix.`, without it."""
        return {key[len(prefix) + 1 :]: value for key, value in self.outputs.items() if key.startswith(prefix + ".")}


@dataclass(frozen=True)
class Comparison:
    """One quantity: what was computed, what was recorded, and how far apart they may be."""

    name: str
    actual: Tensor
    expected: Tensor
    absolute: float
    relative: float = 0.0

    @property
    def errors(self) -> tuple[float, float]:
        """Largest absolute error, and that error relative to the largest recorded value."""
        if self.actual.shape != self.expected.shape:
            return float("inf"), float("inf")
        actual, expected = self.actual.detach().double(), self.expected.double()
        if not torch.isfinite(actual).all():
            return float("inf"), float("inf")
        largest = (actual - expected).abs().max().item() if expected.numel() else 0.0
        return largest, largest / max(expected.abs().max().item() if expected.numel() else 0.0, 1e-12)

    @property
    def agrees(self) -> bool:
        """Whether every element lies within the tolerance."""
        if self.actual.shape != self.expected.shape:
            return False
        return torch.allclose(
            self.actual.detach().double(), self.expected.double(), rtol=self.relative, atol=self.absolute
        )


def net_config(config: Mapping[str, Any]) -> PiDConfig:
    """A reference configuration `{cls, kwargs, prediction_type}` as ours."""
    return config_from_reference(config["kwargs"], bare=config["cls"] != "PidNet")


def config_from_reference(kwargs: Mapping[str, Any], *, bare: bool = False) -> PiDConfig:
    """The reference's constructor arguments as a PiDConfig."""
    reference_mode = "original" if bare else "ntk_aware"
    common = dict(
        hidden_size=kwargs["hidden_size"],
        num_heads=kwargs["num_groups"],
        patch_depth=kwargs["patch_depth"],
        patch_size=kwargs["patch_size"],
        pixel_hidden_size=kwargs["pixel_hidden_size"],
        pixel_depth=kwargs["pixel_depth"],
        pixel_attn_hidden_size=kwargs["pixel_attn_hidden_size"],
        pixel_num_heads=kwargs["pixel_num_groups"],
        text_dim=kwargs["txt_embed_dim"],
        text_length=kwargs["txt_max_length"],
        text_rope=kwargs.get("use_text_rope", True),
        text_rope_theta=kwargs.get("text_rope_theta", 10000.0),
        rope_mode=kwargs.get("rope_mode", reference_mode),
        rope_reference=(kwargs.get("rope_ref_h", 1024), kwargs.get("rope_ref_w", 1024)),
    )
    if bare:
        return PiDConfig(latent_channels=0, **common)
    return PiDConfig(
        latent_channels=kwargs["lq_latent_channels"],
        latent_down=kwargs["latent_spatial_down_factor"],
        latent_unpatchify=kwargs.get("lq_latent_unpatchify_factor", 1),
        scale=kwargs["sr_scale"],
        adapter_width=kwargs["lq_hidden_dim"],
        adapter_blocks=kwargs["lq_num_res_blocks"],
        adapter_padding=kwargs.get("lq_conv_padding_mode", "zeros"),
        adapter_image_channels=kwargs.get("lq_in_channels", 0),
        gate="per_channel" if kwargs["lq_gate_type"].endswith("per_dim") else "per_token",
        inject_interval=kwargs["lq_interval"],
        inject_pixels=kwargs.get("pit_lq_inject", False),
        color_head=kwargs.get("lq_aux_rgb_head", False),
        color_head_tap=kwargs.get("lq_aux_rgb_head_latent_block_idx", -1),
        **common,
    )


def read_cases(path: Path) -> Iterator[Case]:
    """Every scenario of one golden file, with shared inputs and borrowed trunk weights resolved."""
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["config"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    shared_weights = _network_weights(path, config, tensors) if "kwargs" in config else {}
    for entry in config.get("scenarios", config.get("blocks", [])):
        name = entry["name"]
        inputs = _under(tensors, f"inputs.{name}.")
        for own, other in entry.get("shared_inputs", {}).items():
            inputs[own] = tensors[f"inputs.{other}.{own}"]
        yield Case(
            file=path.name,
            name=name,
            kind=entry["kind"],
            args=entry["args"],
            inputs=inputs,
            outputs=_under(tensors, f"outputs.{name}."),
            weights=shared_weights or _under(tensors, f"weights.{name}."),
            config=config,
        )


def _network_weights(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    if config.get("base_weights"):
        with safe_open(path.parent / config["base_weights"], "pt") as base:
            for key in base.keys():  # noqa: SIM118
                if key.startswith("weights.") and not key.startswith(("weights.lq_proj.", "weights.pit_lq_gate.")):
                    weights[key.removeprefix("weights.")] = base.get_tensor(key)
    return weights | _under(tensors, "weights.")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
