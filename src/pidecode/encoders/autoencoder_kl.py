# SPDX-License-Identifier: Apache-2.0
"""The autoencoders of Flux, FLUX.2, SD3, SDXL and Qwen-Image: diffusers folders and single files.

Shapes are read from the weights themselves; the names of single files are translated to the names diffusers uses.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pidecode.errors import CheckpointError, MissingDependencyError
from pidecode.latents.layout import LatentStatistics
from pidecode.registry.configs import check_foreign_config
from pidecode.registry.spaces import LatentSpace
from pidecode.strict_json import read_json
from pidecode.weights.load import load_state
from pidecode.weights.read import check_finite, check_formats, read_tensors

CLASSES = {"flux2": "AutoencoderKLFlux2", "qwenimage": "AutoencoderKLQwenImage"}
"""diffusers class of each space's autoencoder; all others are AutoencoderKL."""

WEIGHT_FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bf16.safetensors",
                "diffusion_pytorch_model.fp16.safetensors", "model.safetensors")  # fmt: skip

# LDM's names (flux, flux2, sd3 and sdxl single files) to diffusers' names, tried in this order.
_LDM_RULES = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"^(?:en|de)coder\.((?:post_)?quant_conv)\.", r"\1."), (r"\.mid\.block_([12])\.", r".mid_block.resnets.\1."),
        (r"\.mid\.attn_1\.norm\.", r".mid_block.attentions.0.group_norm."),
        (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
        (r"\.mid\.attn_1\.proj_out\.", r".mid_block.attentions.0.to_out.0."),
        (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
        (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
        (r"\.up\.(\d+)\.block\.", r".up_blocks.\1.resnets."),
        (r"\.up\.(\d+)\.upsample\.", r".up_blocks.\1.upsamplers.0."), (r"\.nin_shortcut\.", ".conv_shortcut."),
        (r"\.norm_out\.", ".conv_norm_out."),
    )
)  # fmt: skip
# The same for the Wan names of Qwen-Image's single files.
_WAN_BLOCK = {
    "residual.0.": "norm1.", "residual.2.": "conv1.", "residual.3.": "norm2.", "residual.6.": "conv2.",
    "shortcut.": "conv_shortcut.",
}  # fmt: skip
_WAN_TOP_LEVEL = {
    "middle.0.": "mid_block.resnets.0.", "middle.1.": "mid_block.attentions.0.", "middle.2.": "mid_block.resnets.1.",
    "head.0.": "norm_out.", "head.2.": "conv_out.", "conv1.": "conv_in.",
}  # fmt: skip


class DiffusersAutoencoder:
    """A frozen diffusers autoencoder (AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage) of raw latents."""

    can_decode = True

    def __init__(self, model: Any, space: LatentSpace) -> None:
        self.model = model.eval().requires_grad_(False)
        self._video = space.name == "qwenimage"

    def encode(self, images: Tensor) -> Tensor:
        """Encode images `[B, 3, H, W]` in [-1, 1] as the posterior's mean, `[B, raw_channels, h, w]`."""
        images = images.to(self.model.dtype)
        mean: Tensor = self.model.encode(images.unsqueeze(2) if self._video else images).latent_dist.mean
        return mean.squeeze(2) if self._video else mean

    def decode(self, raw: Tensor) -> Tensor:
        """Decode raw latents to images `[B, 3, H, W]`; qwenimage's are videos of one frame, `[B, 16, 1, h, w]`."""
        images: Tensor = self.model.decode(raw.to(self.model.dtype), return_dict=False)[0]
        return images.squeeze(2) if self._video else images

    def to(self, device: torch.device) -> None:
        """Move the weights to a device."""
        self.model.to(device)


def load_autoencoder(
    space: LatentSpace, path: Path, dtype: torch.dtype
) -> tuple[DiffusersAutoencoder, LatentStatistics | None]:
    """Load the autoencoder of a space, and the statistics of its latents (FLUX.2) or None.

    The path is a diffusers folder or a single file, also with the names of LDM or Wan.

    Raises:
        CheckpointError: The file is no autoencoder, or another space's.
        MissingDependencyError: diffusers is not installed.
    """
    config: dict[str, Any] = {}
    if os.path.isdir(path):
        path, config = _read_folder(path, space)
    tensors = read_tensors(path).tensors
    tensors = {re.sub(r"^(first_stage_model\.)?(vae\.)?(model\.)?", "", name): x for name, x in tensors.items()}
    check_formats({name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}, path)
    check_finite(tensors, path)
    if any(name.startswith("encoder.downsamples.") for name in tensors):
        tensors = _from_wan(tensors)
    elif any(name.startswith("encoder.down.") for name in tensors):
        tensors = _from_ldm(tensors)
    family = _family(tensors, path)
    if family != CLASSES.get(space.name, "AutoencoderKL"):
        raise CheckpointError(f"{path} is an {family}, not the autoencoder of {space.name}; give the right file.")
    config = {**_infer_config(tensors, family, path), **config}
    channels = config.get("latent_channels", config.get("z_dim"))
    if channels != space.raw_channels:
        raise CheckpointError(
            f"{path} has {channels} latent channels, and the {space.name} encoder {space.raw_channels}; give that file."
        )
    if space.statistics == "constants" and "scaling_factor" in config:  # flux and sd3 have the same shapes
        check_constants(config, space, path)
    statistics = None
    if family == "AutoencoderKLFlux2":  # kept in the precision of the file, whatever the weights run in
        statistics = LatentStatistics(tensors["bn.running_mean"].float(), tensors["bn.running_var"].float())
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    return DiffusersAutoencoder(_build(family, config, cast, path), space), statistics


def _read_folder(path: Path, space: LatentSpace) -> tuple[Path, dict[str, Any]]:
    folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
    if not os.path.isfile(folder / "config.json"):
        raise CheckpointError(
            f"{path} holds no config.json, so it is not a diffusers autoencoder; give its folder, or one file."
        )
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read as JSON: {fault}. Download it again.") from None
    wanted = CLASSES.get(space.name, "AutoencoderKL")
    if not isinstance(config, dict) or config.get("_class_name") != wanted:
        found = config.get("_class_name") if isinstance(config, dict) else type(config).__name__
        raise CheckpointError(f"{folder} holds a {found}; the encoder of {space.name} is an {wanted}.")
    weights = next((folder / name for name in WEIGHT_FILES if os.path.isfile(folder / name)), None)
    if weights is None:
        raise CheckpointError(f"{folder} has a config.json and no weights ({WEIGHT_FILES[0]}); download it again.")
    return weights, {name: value for name, value in config.items() if not name.startswith("_")}


def _from_ldm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename LDM's tensors to diffusers'. LDM counts the decoder's stages in reverse and attends by 1x1 convs."""
    stages = _count(tensors, r"decoder\.up\.(\d+)\.")
    renamed = {}
    for name, tensor in tensors.items():
        match = re.match(r"decoder\.up\.(\d+)\.", name)
        if match:
            name = f"decoder.up.{stages - 1 - int(match[1])}.{name[match.end() :]}"
        for pattern, replacement in _LDM_RULES:
            name = pattern.sub(replacement, name)
        name = re.sub(r"mid_block\.resnets\.([12])\.", lambda found: f"mid_block.resnets.{int(found[1]) - 1}.", name)
        renamed[name] = tensor.flatten(1) if ".attentions." in name and tensor.ndim == 4 else tensor
    return renamed


def _from_wan(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename Wan's tensors to diffusers', which groups the decoder's flat list of blocks by stage."""
    ups = sorted({int(m[1]) for name in tensors if (m := re.match(r"decoder\.upsamples\.(\d+)\.", name))})
    ends = [index for index in ups if f"decoder.upsamples.{index}.resample.1.weight" in tensors]
    renamed = {}
    for name, tensor in tensors.items():
        if name.startswith(("conv1.", "conv2.")):
            renamed[name.replace("conv1.", "quant_conv.").replace("conv2.", "post_quant_conv.")] = tensor
            continue
        module, _, rest = name.partition(".")
        found = re.match(r"(down|up)samples\.(\d+)\.(.*)", rest)
        if found and found[1] == "down":
            rest = f"down_blocks.{found[2]}.{_in_block(found[3])}"
        elif found:
            index = int(found[2])
            stage = sum(end < index for end in ends)
            first = ends[stage - 1] + 1 if stage else 0
            inside = f"upsamplers.0.{found[3]}" if index in ends else f"resnets.{index - first}.{_in_block(found[3])}"
            rest = f"up_blocks.{stage}.{inside}"
        else:
            start = next((old for old in _WAN_TOP_LEVEL if rest.startswith(old)), None)
            rest = _WAN_TOP_LEVEL[start] + _in_block(rest.removeprefix(start)) if start else rest
        renamed[f"{module}.{rest}"] = tensor
    return renamed


def _in_block(rest: str) -> str:
    start = next((old for old in _WAN_BLOCK if rest.startswith(old)), None)
    return _WAN_BLOCK[start] + rest.removeprefix(start) if start else rest


def _family(tensors: Mapping[str, Tensor], path: Path) -> str:
    if any(name.endswith(".gamma") for name in tensors):
        return "AutoencoderKLQwenImage"
    if "bn.running_mean" in tensors:
        return "AutoencoderKLFlux2"
    if "encoder.conv_in.weight" in tensors and "decoder.conv_in.weight" in tensors:
        return "AutoencoderKL"
    some = ", ".join(sorted(tensors)[:3])
    raise CheckpointError(f"{path} holds {some} ...: not a known autoencoder. Give the encoder file of the space.")


def _infer_config(tensors: Mapping[str, Tensor], family: str, path: Path) -> dict[str, Any]:
    """Constructor arguments, inferred from the shapes of the weights."""
    try:
        if family == "AutoencoderKLQwenImage":
            return _qwen_shape(tensors)
        stages = _count(tensors, r"encoder\.down_blocks\.(\d+)\.")
        widths = [tensors[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"].shape[0] for i in range(stages)]
        return {
            "block_out_channels": tuple(widths),
            "layers_per_block": _count(tensors, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
            "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
            "down_block_types": ("DownEncoderBlock2D",) * stages,
            "up_block_types": ("UpDecoderBlock2D",) * stages,
            "use_quant_conv": "quant_conv.weight" in tensors,
            "use_post_quant_conv": "post_quant_conv.weight" in tensors,
        }
    except (KeyError, ValueError, IndexError) as fault:
        raise CheckpointError(f"{path} lacks {fault}; it is not a complete autoencoder. Download it again.") from None


def _qwen_shape(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    base = tensors["encoder.conv_in.weight"].shape[0]
    stages: list[list[int]] = [[]]
    for index in range(_count(tensors, r"encoder\.down_blocks\.(\d+)\.")):
        conv = tensors.get(f"encoder.down_blocks.{index}.conv1.weight")
        if conv is None:
            stages.append([])
        else:
            stages[-1].append(conv.shape[0] // base)
    return {
        "base_dim": base, "z_dim": tensors["post_quant_conv.weight"].shape[0],
        "dim_mult": [stage[-1] for stage in stages], "num_res_blocks": len(stages[0]),
        "temperal_downsample": [False, *[True] * (len(stages) - 2)],
    }  # fmt: skip


def _count(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(match[1]) for name in tensors if (match := re.match(pattern, name))), default=-1)


def check_constants(config: Mapping[str, Any], space: LatentSpace, source: object) -> None:
    """Check the scaling and shift in an autoencoder's config, for spaces with `statistics == "constants"`."""
    found = (float(config.get("scaling_factor") or 1.0), float(config.get("shift_factor") or 0.0))
    wanted = (space.scaling_factor, space.shift_factor)
    own = config.get("latents_mean") or config.get("latents_std")
    if max(abs(a - b) for a, b in zip(found, wanted, strict=True)) > 1e-4 or own:
        says = "per-channel means and deviations" if own else f"scaling {found[0]:g} and shift {found[1]:g}"
        raise CheckpointError(
            f"{source} has {says}; the {space.name} space has scaling {wanted[0]:g} and shift {wanted[1]:g}. "
            "It is the autoencoder of another space."
        )


def _build(family: str, config: Mapping[str, Any], tensors: dict[str, Tensor], path: Path) -> Any:
    try:
        import diffusers
    except ImportError as fault:
        raise MissingDependencyError(
            'The autoencoders need diffusers, which is not installed; run `pip install "pidecode[diffusers]"`.'
        ) from fault
    try:
        check_foreign_config(config, path)
        with torch.device("meta"):
            model = getattr(diffusers, family)(**config)
    except (TypeError, ValueError) as fault:
        raise CheckpointError(f"diffusers cannot build an {family} as {path} describes it: {fault}.") from None
    load_state(model, _as_video_weights(model, tensors), path)
    return model


def _as_video_weights(model: torch.nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring the weights of a 2-D (image only) Qwen-Image file to the video model's shapes, and add missing buffers.

    A causal convolution over one frame sees only padding besides it, so only its last slice in time acts. The
    convolutions over time alone are not reached by a single frame.
    """
    weights, floating = dict(tensors), next(t.dtype for t in tensors.values() if t.is_floating_point())
    for name, target in model.state_dict().items():
        tensor = weights.get(name)
        if tensor is None:
            if ".time_conv." in name or name.endswith("num_batches_tracked"):
                dtype = floating if target.is_floating_point() else target.dtype
                weights[name] = torch.zeros(target.shape, dtype=dtype)
        elif tensor.numel() == target.numel():
            weights[name] = tensor.reshape(target.shape)
        elif target.ndim == 5 and tensor.ndim == 4 and target.shape[3:] == tensor.shape[2:]:
            whole = tensor.new_zeros(target.shape)
            whole[:, :, -1] = tensor
            weights[name] = whole
    return weights
