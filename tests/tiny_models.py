# SPDX-License-Identifier: Apache-2.0
"""The real model classes at tiny random sizes: what the spaces' own encoders look like on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderKLFlux2, AutoencoderKLQwenImage
from safetensors.torch import save_file
from torch import Tensor
from transformers import Dinov2WithRegistersConfig, Dinov2WithRegistersModel, SiglipVisionConfig, SiglipVisionModel

CONSTANTS = {"flux": (16, 0.3611, 0.1159), "sd3": (16, 1.5305, 0.0609), "sdxl": (4, 0.13025, None)}


def shake(model: torch.nn.Module, seed: int = 0) -> Any:
    """Random weights everywhere, also where classes start at ones and zeros, so that a swapped tensor shows."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if "running_var" in name:
                value.copy_(noise.abs() + 0.3)
            elif value.ndim > 1 and "gamma" not in name:
                value.copy_(noise / value[0].numel() ** 0.5)
            else:
                value.copy_(noise * 0.1 + (1.0 if "norm" in name and "bias" not in name else 0.0))
    return model.eval()


def autoencoder(space: str, width: int = 4, groups: int = 2) -> Any:
    """The autoencoder of a space, real in everything but its widths."""
    shape: dict[str, Any] = dict(
        sample_size=64, block_out_channels=(width, width, 2 * width, 2 * width), layers_per_block=1,
        norm_num_groups=groups,
    )  # fmt: skip
    if space == "flux2":
        return shake(AutoencoderKLFlux2(latent_channels=32, **shape))
    if space == "qwenimage":
        blocks = dict(base_dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2)
        return shake(AutoencoderKLQwenImage(**blocks, temperal_downsample=[False, True, True]))
    channels, scaling, shift = CONSTANTS[space]
    quant = space == "sdxl"
    shape |= dict(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)
    return shake(
        AutoencoderKL(
            latent_channels=channels, use_quant_conv=quant, use_post_quant_conv=quant,
            scaling_factor=scaling, shift_factor=shift, **shape,
        )
    )  # fmt: skip


def as_ldm(tensors: dict[str, Tensor], stages: int = 4) -> dict[str, Tensor]:
    """A diffusers autoencoder's tensors under the names, and in the shapes, of the official single files."""
    told = {}
    inside = "bn.running_mean" in tensors  # FLUX.2 keeps the two small convolutions inside its halves
    for name, tensor in tensors.items():
        parts = name.split(".")
        if parts[0] == "quant_conv" and inside:
            name = "encoder." + name
        elif parts[0] == "post_quant_conv" and inside:
            name = "decoder." + name
        elif len(parts) > 2 and parts[1] in ("down_blocks", "up_blocks"):
            stage = parts[2] if parts[1] == "down_blocks" else str(stages - 1 - int(parts[2]))
            kind = "down" if parts[1] == "down_blocks" else "up"
            rest = parts[4:] if parts[3] == "resnets" else parts[5:]
            middle = ["block"] if parts[3] == "resnets" else [f"{kind}sample"]
            name = ".".join([parts[0], kind, stage, *middle, *rest]).replace("conv_shortcut", "nin_shortcut")
        elif len(parts) > 2 and parts[1] == "mid_block" and parts[2] == "resnets":
            name = ".".join([parts[0], "mid", f"block_{int(parts[3]) + 1}", *parts[4:]])
        elif len(parts) > 2 and parts[1] == "mid_block":
            names = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out": "proj_out"}
            name = ".".join([parts[0], "mid", "attn_1", names[parts[4]], parts[-1]])
            tensor = tensor[..., None, None] if tensor.ndim == 2 else tensor
        else:
            name = name.replace("conv_norm_out", "norm_out")
        told[name] = tensor
    return told


def as_wan_2d(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A Qwen-Image autoencoder's tensors as QwenImage_VAE_2d.pth has them: one frame's worth, under Wan's names."""
    block = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6",
             "conv_shortcut": "shortcut"}  # fmt: skip
    told = {}
    for name, tensor in tensors.items():
        if "time_conv" in name:
            continue
        parts = name.split(".")
        if parts[0] in ("quant_conv", "post_quant_conv"):
            parts[0] = {"quant_conv": "conv1", "post_quant_conv": "conv2"}[parts[0]]
        elif parts[1] == "down_blocks":
            parts[1] = "downsamples"
            parts[3:4] = block.get(parts[3], parts[3]).split(".")
        elif parts[1] == "up_blocks":  # four blocks to a stage, as released: three residual ones, one that enlarges
            stage, kind, index = int(parts[2]), parts[3], int(parts[4])
            place = 4 * stage + (index if kind == "resnets" else 3)
            rest = parts[5:]
            if kind == "resnets":
                rest[0:1] = block[rest[0]].split(".")
            parts = [parts[0], "upsamples", str(place), *rest]
        elif parts[1] == "mid_block":
            place = {"resnets": 2 * int(parts[3]), "attentions": 1}[parts[2]]
            rest = parts[4:]
            rest[0:1] = block.get(rest[0], rest[0]).split(".")
            parts = [parts[0], "middle", str(place), *rest]
        else:
            parts[1:2] = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}[parts[1]].split(".")
        if tensor.ndim == 5:
            tensor = tensor[:, :, -1].contiguous()
        elif tensor.ndim == 4 and parts[-1] == "gamma":
            tensor = tensor[..., 0]
        told[".".join(parts)] = tensor
    return told


def dinov2() -> Any:
    """DINOv2 with registers, one layer of it, with the real 768 features and patches."""
    config = Dinov2WithRegistersConfig(
        hidden_size=768, num_hidden_layers=1, num_attention_heads=2, mlp_ratio=1, patch_size=14, image_size=518,
        num_register_tokens=4,
    )  # fmt: skip
    return shake(Dinov2WithRegistersModel(config))


def siglip() -> Any:
    """SigLIP's vision tower, one layer of it, with the real 1152 features and patches."""
    config = SiglipVisionConfig(
        hidden_size=1152, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, patch_size=14,
        image_size=224,
    )  # fmt: skip
    return shake(SiglipVisionModel(config))


def vit_decoder_file(path: Path, features: int, grid: int, patch: int, *, width: int = 32) -> dict[str, Tensor]:
    """A RAE decoder's file: ViT-MAE's names, one layer, positions as the projects compute them."""
    from pidecode.models.vit_decoder import VitDecoder, VitDecoderConfig, sincos_position_embedding

    config = VitDecoderConfig(
        in_channels=features, hidden_size=width, intermediate_size=48, num_layers=1, num_heads=16, patch_size=patch,
        grid_size=grid,
    )  # fmt: skip
    model = shake(VitDecoder(config))
    tensors = dict(model.state_dict()) | {"decoder_pos_embed": sincos_position_embedding(width, grid)}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save(tensors, path)
    return tensors


def save_gemma(folder: Path, width: int = 32, cap: float | None = None) -> Path:
    """A random Gemma-2 of the real class, 2 layers deep, with a character tokenizer built on the spot."""
    from tokenizers import Tokenizer, decoders, models, processors
    from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3}
    for code in range(32, 127):
        vocab[chr(code)] = len(vocab)
    vocab["\n"] = len(vocab)
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
    ).save_pretrained(folder)
    config = Gemma2Config(
        vocab_size=len(vocab), hidden_size=width, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8, sliding_window=4096,
        max_position_embeddings=8192, attn_logit_softcapping=cap,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)  # strong enough for soft-capping to show
    model.save_pretrained(folder)
    return folder
