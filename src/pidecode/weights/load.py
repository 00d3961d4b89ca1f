# SPDX-License-Identifier: Apache-2.0
"""Tensors to a network ready to run, and low-rank adapters."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pidecode.errors import CheckpointError, SettingError
from pidecode.models.pid.network import PiDNet
from pidecode.models.tiny import TinyDecoder
from pidecode.registry.configs import PiDConfig, TinyDecoderConfig
from pidecode.strict_json import parse_json, read_json
from pidecode.weights.detect import ADAPTER, COLOR_HEAD
from pidecode.weights.read import check_finite, check_formats, read_tensors
from pidecode.weights.safetensors import write_safetensors

_NAMED = 4  # tensors named in a message before it only counts


@torch.no_grad()
def build_network(
    tensors: MutableMapping[str, Tensor],
    config: PiDConfig | TinyDecoderConfig,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    source: str = "the file",
) -> PiDNet | TinyDecoder:
    """Build a network from tensors, in evaluation mode, without gradients and without the color head of training.

    Args:
        tensors: State dict. Emptied while loading, so that at most one tensor is in memory twice; where neither dtype
            nor device changes, the parameters share the file's memory.
        config: Shape of the network.
        dtype: Dtype of the parameters; None keeps that of the tensors, but float64 becomes float32.
        device: Device of the parameters.
        source: What error messages call the file.

    Raises:
        CheckpointError: Tensors are missing, unexpected or of another shape.
        SettingError: The dtype is not a floating-point one.
    """
    if dtype is not None and not dtype.is_floating_point:
        raise SettingError(f"dtype is {dtype}; a network runs in float32, bfloat16 or float16.")
    if isinstance(config, PiDConfig):
        config = config.without_color_head()
        for name in [name for name in tensors if name.startswith(COLOR_HEAD)]:
            del tensors[name]
    network = empty_network(config)
    check_complete(tensors, network.state_dict(), source)
    taken = {}
    for name in list(tensors):
        tensor = tensors.pop(name)
        narrow = torch.float32 if tensor.dtype == torch.float64 else tensor.dtype
        taken[name] = tensor.to(device=device, dtype=dtype or narrow)
    network.load_state_dict(taken, strict=True, assign=True)
    return network.requires_grad_(False).eval()


def empty_network(config: PiDConfig | TinyDecoderConfig) -> PiDNet | TinyDecoder:
    """A network whose parameters have shapes and no memory."""
    with torch.device("meta"):
        return TinyDecoder(config) if isinstance(config, TinyDecoderConfig) else PiDNet(config)


def load_state(model: nn.Module, tensors: Mapping[str, Tensor], source: object) -> None:
    """Load a complete state dict into a model built on the meta device. Raises CheckpointError as `check_complete`."""
    check_complete(tensors, model.state_dict(), source)
    # Copies, so that the model does not depend on a memory-mapped file that may be replaced.
    model.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, strict=True, assign=True)


def check_complete(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: object) -> None:
    """Raises CheckpointError unless names and shapes are exactly those expected."""
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    wrong = [name for name in expected if name in tensors and tensors[name].shape != expected[name].shape]
    faults = []
    adapter = {name for name in expected if name.startswith(ADAPTER)}
    if adapter and adapter <= set(missing):
        faults.append("the adapter is missing, so the image would ignore the latent")
        missing = [name for name in missing if name not in adapter]
    faults += [f"{what}: {_some(names)}" for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
    if wrong:
        name = wrong[0]
        shapes = f"{list(tensors[name].shape)}, expected {list(expected[name].shape)}"
        faults.append(f"wrong shape: {name} is {shapes}{f' (and {len(wrong) - 1} more)' if wrong[1:] else ''}")
    if faults:
        raise CheckpointError(
            f"{source} does not fit the network; {'; '.join(faults)}. "
            "Use a complete file of this network, or settings that fit the file."
        )


def _some(names: list[str]) -> str:
    rest = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {rest} more ({len(names)} in all)" if rest > 0 else "")


METADATA_KEY = "pidecode_lora"
LORA_FILES = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
# Names of layers as other programs write them begin with what they call the network.
_LORA_PREFIXES = (
    "diffusion_model.", "transformer.", "unet.", "net.", "lora_unet_", "lora_transformer_", "lora_net_", "lycoris_",
)  # fmt: skip
_LORA_NAME = re.compile(
    r"(?P<layer>.+?)(?:(?P<down>[._]lora(?:_A|_down|\.down|_linear_layer\.down))|"
    r"(?P<up>[._]lora(?:_B|_up|\.up|_linear_layer\.up)))(?:\.\w+)?\.weight|"
    r"(?P<layer_>.+?)(?P<alpha>\.(?:lora_)?alpha|\.network_alpha)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraMetadata:
    """What an adapter file says of itself."""

    rank: int
    alpha: float
    space: str | None = None  # latent space of the network it was trained on
    base: str | None = None  # what it was trained on, in words


def write_lora(path: str | Path, tensors: Mapping[str, Tensor], metadata: LoraMetadata) -> None:
    """Write adapters (`<layer>.lora_A.weight`, `<layer>.lora_B.weight`) as one .safetensors file."""
    file_metadata = {"format": "pt", METADATA_KEY: json.dumps({"format": 1, **asdict(metadata)})}
    write_safetensors(path, tensors, file_metadata, overwrite=True)


@torch.no_grad()
def apply_lora(net: nn.Module, path: str | Path, scale: float = 1.0) -> int:
    """Add an adapter's change, times `scale`, to the network's own weights; returns how many layers changed.

    `W + scale * alpha / rank * B A`, computed in float32. Applying the same file with the negated scale takes it
    back to rounding.

    Args:
        net: The network.
        path: A file of ours, peft's, diffusers', ComfyUI's or kohya's names, or a folder of peft or diffusers. Where
            nothing says alpha, it counts as the rank.
        scale: Strength.

    Raises:
        CheckpointError: The file is no adapter of this network, or holds what is not understood.
        SettingError: The scale is no number.
    """
    if not torch.isfinite(torch.tensor(float(scale))):
        raise SettingError(f"lora_scale is {scale}; it must be a finite number (1 is full strength).")
    path = Path(path)
    if os.path.isdir(path):  # of peft or diffusers
        found = [path / name for name in LORA_FILES if os.path.isfile(path / name)]
        if not found:
            raise CheckpointError(f"The folder {path} holds no adapter: there is no {' or '.join(LORA_FILES)} in it.")
        path = found[0]
    file = read_tensors(path)
    check_formats(file.tensors, path)
    check_finite(file.tensors, path)
    own = dict(net.named_parameters())
    halves, alphas = _lora_layers(file.tensors, own, path)
    strengths = _LoraStrengths(path, file.metadata, alphas)
    changes = []
    for layer, (down, up) in sorted(halves.items()):
        weight = own[f"{layer}.weight"]
        axes = {down.ndim, up.ndim} <= {2, weight.ndim} and down.numel() and up.numel()
        down, up = (half.float().reshape(len(half), -1) if axes else half for half in (down, up))
        if not axes or (up.shape[0], down.shape[1]) != weight.flatten(1).shape or up.shape[1] != down.shape[0]:
            raise CheckpointError(
                f"{path} adapts {layer}, of shape {list(weight.shape)} here, by halves of {list(up.shape)} and "
                f"{list(down.shape)}; it is of another network."
            )
        changes.append((layer, (weight, down, up, scale * strengths.of(layer, len(down)))))
    for layer, change in changes:
        if not torch.isfinite(_changed(*change)).all():
            raise CheckpointError(
                f"{path} makes {layer} NaN or infinite at strength {change[-1]:g}; the network was left as it was. "
                "Lower lora_scale, or export the adapter again."
            )
    for _, change in changes:  # computed again, so that no second copy of the weights is held
        change[0].copy_(_changed(*change))
    return len(changes)


def _changed(weight: Tensor, down: Tensor, up: Tensor, strength: float) -> Tensor:
    change = (up.to(weight.device) @ down.to(weight.device)).view_as(weight)
    return (weight.float() + strength * change).to(weight.dtype)


def lora_summary(path: Path, shapes: Mapping[str, tuple[int, ...]], metadata: Mapping[str, str]) -> dict[str, Any]:
    """What an adapter's file, and the configuration beside it, say of its layers and strength, as plain values."""
    found = [(match, shape) for name, shape in shapes.items() if (match := _LORA_NAME.fullmatch(name))]
    ranks = sorted({shape[0] for match, shape in found if match["down"] and shape})
    strengths = _LoraStrengths(path, metadata, {})
    known = {"layers": sum(bool(match["down"]) for match, _ in found), "rank": ranks[0] if len(ranks) == 1 else ranks}
    if strengths.alpha is None:
        each = any(match["alpha"] for match, _ in found)
        return known | {"alpha": "of each layer, in the file" if each else "not said; the rank is taken"}
    same = len(ranks) == 1 and not strengths.pattern
    return known | {"alpha": strengths.alpha} | ({"strength": strengths.of("", ranks[0])} if same else {})


def _lora_layers(
    tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path
) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, float]]:
    """The two halves of each layer, and the alphas in the file, by the network's own names of the layers."""
    layers = {name.removesuffix(".weight") for name, tensor in own.items() if tensor.ndim >= 2}
    underscored = {layer.replace(".", "_"): layer for layer in layers}
    halves: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    strange = []
    for name, tensor in tensors.items():
        match = _LORA_NAME.fullmatch(name)
        if match is None or (match["alpha"] and tensor.numel() != 1):
            strange.append(name)
            continue
        given = match["layer"] or match["layer_"]
        short = given.removeprefix("base_model.model.")
        short = next((short.removeprefix(prefix) for prefix in _LORA_PREFIXES if short.startswith(prefix)), short)
        layer = short if short in layers else underscored.get(short)
        if layer is None:
            raise CheckpointError(f"{path} adapts {given}, which this network lacks; it is of another network.")
        if match["alpha"]:
            alphas[layer] = float(tensor)
        else:
            halves.setdefault(layer, {})["down" if match["down"] else "up"] = tensor
    strange += [layer for layer, found in halves.items() if len(found) != 2]
    strange += alphas.keys() - halves.keys()
    if strange or not halves:
        raise CheckpointError(
            f"{path} is no adapter file that is understood here: pairs of lora_A and lora_B, or lora_down and lora_up, "
            f"with or without their alpha. It holds {_some(strange) or 'none'}."
        )
    return {layer: (found["down"], found["up"]) for layer, found in halves.items()}, alphas


class _LoraStrengths:
    """alpha / rank of the layers of an adapter: from the file's alphas, or from what describes it as peft does."""

    def __init__(self, path: Path, metadata: Mapping[str, str], alphas: Mapping[str, float]) -> None:
        self.alphas = alphas
        try:
            self.config = _lora_config(path, metadata)
            alpha = self.config.get("lora_alpha")
            self.alpha = None if alpha is None else float(alpha)
            patterns = self.config.get("alpha_pattern") or {}
            self.pattern = {_layer_pattern(key): float(value) for key, value in patterns.items()}
        except (OSError, re.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"The configuration of the adapter {path} cannot be read: {error}.") from error
        # What changes the computation beyond alpha and rank.
        odd = [key for key, value in self.config.items() if key.startswith("use_") and value and key != "use_rslora"]
        odd += [key for key in ("fan_in_fan_out", "modules_to_save", "lora_bias") if self.config.get(key)]
        odd += [] if self.config.get("peft_type") in (None, "LORA") else ["peft_type"]
        if odd:
            raise CheckpointError(
                f"{path} is an adapter with {_some(odd)}, which is not understood; export plain LoRA."
            )

    def of(self, layer: str, rank: int) -> float:
        """The strength of one layer."""
        named = (value for key, value in self.pattern.items() if key.fullmatch(layer))
        alpha = self.alphas.get(layer, next(named, self.alpha))
        divisor = math.sqrt(rank) if self.config.get("use_rslora") else rank
        return 1.0 if alpha is None else alpha / divisor


def _lora_config(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """An adapter's configuration by peft's names: from our metadata or diffusers', or from peft's file beside it."""
    beside = path.with_name("adapter_config.json")
    if METADATA_KEY in metadata:
        record = parse_json(metadata[METADATA_KEY])
        if not isinstance(record, dict) or record.get("format") != 1:
            raise ValueError("its format is unknown; export it again, or update pidecode")
        if type(alpha := record.get("alpha")) not in (int, float):
            raise ValueError(f"its alpha is {alpha!r}, and must be a number; export it again")
        return {"lora_alpha": alpha}
    if "lora_adapter_metadata" in metadata:  # diffusers: "transformer.lora_alpha" and so on
        config = parse_json(metadata["lora_adapter_metadata"])
        return {key.partition(".")[2]: value for key, value in config.items()}
    return {**read_json(beside)} if path.name in LORA_FILES and os.path.isfile(beside) else {}


def _layer_pattern(pattern: str) -> re.Pattern[str]:
    """A pattern of layers in peft's configuration; ValueError for one whose time could grow exponentially."""
    if re.search(r"\)[*+?{]", pattern) or len(re.findall("[*+{]", pattern)) > 3:
        raise ValueError(f"the pattern {pattern[:80]!r} is not plain enough")
    return re.compile(rf"(.*\.)?({pattern})")
