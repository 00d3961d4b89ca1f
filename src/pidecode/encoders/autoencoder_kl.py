# SPDX-License-Identifier: Apache-2.0
"""The autoencoders of Flux, FLUX.2, SD3, SDXL and Qwen-Image: diffusers folders and single files.

Shapes are read from the weights themselves; the names of single files are translated by diffusers.
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

_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.", "bn.", "conv1.", "conv2.")  # of an autoencoder
_MOST_STAGES = 16  # the converter's work is the tensors times the stages, and a hostile file may have many of both


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

    Raises:
        CheckpointError: What the path names, a diffusers folder or a file, is no autoencoder, or another space's.
        MissingDependencyError: diffusers is not installed.
    """
    try:
        import diffusers
    except ImportError as fault:
        raise MissingDependencyError(
            'The autoencoders need diffusers, which is not installed; run `pip install "pidecode[diffusers]"`.'
        ) from fault
    wanted, folder_config = CLASSES.get(space.name, "AutoencoderKL"), dict[str, Any]()
    if os.path.isdir(path):
        path, folder_config = _read_folder(path, space, wanted)
    tensors = read_tensors(path).tensors
    tensors = {re.sub(r"^(first_stage_model\.)?(vae\.)?(model\.)?", "", name): x for name, x in tensors.items()}
    check_formats({name: tensor for name, tensor in tensors.items() if not name.endswith("num_batches_tracked")}, path)
    check_finite(tensors, path)
    try:
        tensors = _diffusers_names(tensors, path)
        family = _family(tensors, path)
        config = {**_infer_config(tensors, family), **folder_config}
    except (KeyError, ValueError, IndexError) as fault:
        raise CheckpointError(f"{path} lacks {fault}; it is not a complete autoencoder. Download it again.") from None
    if family != wanted:
        raise CheckpointError(
            f"{path} is an {family}; the encoder of {space.name} is an {wanted}. Give the right file."
        )
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
    try:
        check_foreign_config(config, path)
        with torch.device("meta"):
            model = getattr(diffusers, family)(**config)
    except (TypeError, ValueError) as fault:
        raise CheckpointError(f"diffusers cannot build an {family} as {path} describes it: {fault}.") from None
    load_state(model, _as_video_weights(model, cast), path)
    return DiffusersAutoencoder(model, space), statistics


def _read_folder(path: Path, space: LatentSpace, wanted: str) -> tuple[Path, dict[str, Any]]:
    """The weights file and the configuration of a diffusers folder, which must be of the wanted class."""
    folder = path / "vae" if (path / "vae" / "config.json").is_file() else path
    if not os.path.isfile(folder / "config.json"):
        raise CheckpointError(
            f"{path} holds no config.json, so it is not a diffusers autoencoder; give its folder, or one file."
        )
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"{folder / 'config.json'} cannot be read as JSON: {fault}. Download it again.") from None
    # Other classes can have the same tensors, as Wan's has those of Qwen-Image's.
    found = config.get("_class_name") if isinstance(config, dict) else None
    if found != wanted:
        raise CheckpointError(
            f"{folder / 'config.json'} describes {found or 'no class of diffusers'}; the encoder of {space.name} is an "
            f"{wanted}. Give the right folder."
        )
    weights = next((folder / name for name in WEIGHT_FILES if os.path.isfile(folder / name)), None)
    if weights is None:
        raise CheckpointError(f"{folder} has a config.json and no weights ({WEIGHT_FILES[0]}); download it again.")
    return weights, {name: value for name, value in config.items() if not name.startswith("_")}


def _diffusers_names(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors by diffusers' names, to which its own converters bring those of LDM and Wan."""
    from diffusers.loaders import single_file_utils

    stages = {name.split(".")[2] for name in tensors if name.startswith("encoder.down.")}
    renamed = tensors
    if any(name.startswith("encoder.downsamples.") for name in tensors):
        renamed = single_file_utils.convert_wan_vae_to_diffusers(tensors)
    elif 0 < len(stages) <= _MOST_STAGES:
        # FLUX.2's file has the small convolutions inside its halves, and a batch norm that the converter leaves out.
        tensors = {re.sub(r"^(en|de)coder\.(?=(post_)?quant_conv\.)", "", name): x for name, x in tensors.items()}
        blocks = {"down_block_types": stages, "up_block_types": stages}
        renamed = single_file_utils.convert_ldm_vae_checkpoint(tensors, blocks)
        renamed |= {name: x for name, x in tensors.items() if name.startswith("bn.")}
    if len(renamed) != len(tensors) or None in renamed.values():  # the converters pass over what they do not know
        other = next((name for name in tensors if not name.startswith(_PARTS)), None)
        why = "has not the tensors" if other is None else f"holds {other}, which is not"
        raise CheckpointError(f"{path} {why} of an autoencoder; give the encoder file of the space.")
    return renamed


def _family(tensors: Mapping[str, Tensor], path: Path) -> str:
    if any(name.endswith(".gamma") for name in tensors):
        return "AutoencoderKLQwenImage"
    if "bn.running_mean" in tensors:
        return "AutoencoderKLFlux2"
    if "encoder.conv_in.weight" in tensors and "decoder.conv_in.weight" in tensors:
        return "AutoencoderKL"
    some = ", ".join(sorted(tensors)[:3])
    raise CheckpointError(f"{path} holds {some} ...: not a known autoencoder. Give the encoder file of the space.")


def _infer_config(tensors: Mapping[str, Tensor], family: str) -> dict[str, Any]:
    """Constructor arguments, inferred from the shapes of the weights. Raises KeyError where one is missing."""
    if family != "AutoencoderKLQwenImage":
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
    base = tensors["encoder.conv_in.weight"].shape[0]
    groups: list[list[int]] = [[]]  # multiples of the base width of each stage's blocks; a downsampler ends a stage
    for index in range(_count(tensors, r"encoder\.down_blocks\.(\d+)\.")):
        conv = tensors.get(f"encoder.down_blocks.{index}.conv1.weight")
        if conv is None:
            groups.append([])
        else:
            groups[-1].append(conv.shape[0] // base)
    return {
        "base_dim": base, "z_dim": tensors["post_quant_conv.weight"].shape[0],
        "dim_mult": [group[-1] for group in groups], "num_res_blocks": len(groups[0]),
        "temperal_downsample": [False, *[True] * (len(groups) - 2)],
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
        elif target.ndim == 5 and target.shape[:2] + target.shape[3:] == tensor.shape:
            whole = tensor.new_zeros(target.shape)
            whole[:, :, -1] = tensor
            weights[name] = whole
    return weights
