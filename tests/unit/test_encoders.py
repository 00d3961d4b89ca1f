# SPDX-License-Identifier: Apache-2.0
"""Every space's encoder, saved as users have it on disk and loaded back by `load_encoder`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

import tiny_models
from pidecode.encoders.base import ImageEncoder, load_encoder
from pidecode.errors import CheckpointError, DownloadError, SettingError, SizeError
from pidecode.latents.latent import Latent
from pidecode.registry.configs import check_foreign_config
from pidecode.registry.spaces import SPACES

VAES = ("flux", "sd3", "sdxl", "flux2", "qwenimage")


def images(seed: int = 0, batch: int = 2, height: int = 32, width: int = 48) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@torch.no_grad()
def by_hand(space: str, vae: Any, x: Tensor) -> Tensor:
    """Normalized latents with the arithmetic of diffusers' own pipelines, written out per family."""
    if space == "flux2":
        mean = vae.encode(x).latent_dist.mean
        b, c, h, w = mean.shape
        z = mean.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
        deviation = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps)
        return (z - vae.bn.running_mean.view(1, -1, 1, 1)) / deviation
    if space == "qwenimage":
        mean = vae.encode(x.unsqueeze(2)).latent_dist.mean.squeeze(2)
        shift, size = (torch.tensor(v).view(1, -1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
        return (mean - shift) / size
    return (vae.encode(x).latent_dist.mean - (vae.config.shift_factor or 0)) * vae.config.scaling_factor


@pytest.fixture(scope="module")
def vaes() -> dict[str, Any]:
    # 32 groups, as the released ones have: single files do not tell the number.
    return {name: tiny_models.autoencoder(name, *((32, 32) if name != "qwenimage" else ())) for name in VAES}


@pytest.mark.parametrize("space", VAES)
def test_a_diffusers_folder_gives_the_pipelines_own_latents(space: str, vaes: dict[str, Any], tmp_path: Path) -> None:
    vaes[space].save_pretrained(tmp_path / "pipe" / "vae")
    for place in (tmp_path / "pipe", tmp_path / "pipe" / "vae"):
        encoder = load_encoder(space, place)
        x = images()
        torch.testing.assert_close(encoder(x), by_hand(space, vaes[space], x), rtol=1e-4, atol=1e-4)
    row = SPACES[space]
    assert encoder(x).shape == (2, row.channels, 32 // row.down, 48 // row.down)


def single_file(space: str, vae: Any, folder: Path) -> Path:
    tensors = {name: tensor.clone() for name, tensor in vae.state_dict().items()}
    if space == "qwenimage":
        torch.save(tiny_models.as_wan_2d(tensors), folder / "QwenImage_VAE_2d.pth")
        return folder / "QwenImage_VAE_2d.pth"
    save_file(tiny_models.as_ldm(tensors), folder / f"{space}.safetensors")
    return folder / f"{space}.safetensors"


@pytest.mark.parametrize("space", VAES)
def test_an_official_single_file_is_the_same_encoder_both_ways(
    space: str, vaes: dict[str, Any], tmp_path: Path
) -> None:
    file = single_file(space, vaes[space], tmp_path)
    vaes[space].save_pretrained(tmp_path / "vae")
    folder, single = load_encoder(space, tmp_path / "vae"), load_encoder(space, file)
    x = images(1)
    z = folder(x)
    torch.testing.assert_close(single(x), z, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single.decode(z), folder.decode(z), rtol=1e-4, atol=1e-4)
    assert single.decode(z).shape == x.shape


@pytest.mark.parametrize("space", VAES)
def test_bfloat16_stays_near_float32_and_keeps_its_statistics(space: str, vaes: dict[str, Any], tmp_path: Path) -> None:
    vaes[space].save_pretrained(tmp_path / "vae")
    wide, narrow = (load_encoder(space, tmp_path / "vae", dtype=kind) for kind in (torch.float32, torch.bfloat16))
    x = images(2)
    a, b = wide(x), narrow(x)
    assert b.dtype == torch.float32
    assert float((a - b).std() / a.std()) < 0.05
    if space == "flux2":
        assert wide.statistics is not None and narrow.statistics is not None
        assert torch.equal(wide.statistics.variance, narrow.statistics.variance)


def test_decode_is_what_the_pipeline_decodes(vaes: dict[str, Any], tmp_path: Path) -> None:
    vaes["flux"].save_pretrained(tmp_path / "vae")
    encoder = load_encoder("zimage", tmp_path)
    z = torch.randn(1, 16, 4, 6, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = vaes["flux"].decode(z / 0.3611 + 0.1159, return_dict=False)[0].clamp(-1, 1)
    torch.testing.assert_close(encoder.decode(z), wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def rae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder laid out as RAE's collection, with the vision model beside it."""
    folder = tmp_path_factory.mktemp("rae")
    tiny_models.dinov2().save_pretrained(folder / "dinov2-with-registers-base")
    stat = folder / "stats/dinov2/wReg_base/imagenet1k_512/stat.pt"
    stat.parent.mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    mean = torch.randn(768, 32, 32, generator=generator) * 0.2
    torch.save({"mean": mean, "var": torch.rand(768, 32, 32, generator=generator) + 0.5}, stat)
    tiny_models.vit_decoder_file(folder / "decoders/dinov2/wReg_base/ViTXL_n08_i512/model.pt", 768, 32, 16)
    return folder


def test_dinov2_follows_rae_step_by_step(rae: Path) -> None:
    encoder = load_encoder("dinov2", rae)
    x = images(6, batch=1, height=512, width=512)
    model = tiny_models.dinov2()
    seen = functional.interpolate((x + 1) / 2, size=(448, 448), mode="bicubic", align_corners=False)
    seen = (seen - torch.tensor([0.485, 0.456, 0.406]).view(1, 3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        1, 3, 1, 1
    )
    model.layernorm.weight.data.fill_(1)
    model.layernorm.bias.data.zero_()
    with torch.no_grad():
        tokens = model(seen).last_hidden_state[:, 5:]
    stat = torch.load(rae / "stats/dinov2/wReg_base/imagenet1k_512/stat.pt", weights_only=True)
    wanted = (tokens.transpose(1, 2).reshape(1, 768, 32, 32) - stat["mean"]) / torch.sqrt(stat["var"] + 1e-5)
    torch.testing.assert_close(encoder(x), wanted, rtol=1e-4, atol=1e-4)
    image = encoder.decode(encoder(x))
    assert image.shape == (1, 3, 512, 512)
    assert float(image.abs().max()) <= 1
    # Any other square is brought to the model's own input without a step in between.
    assert encoder(images(6, batch=1, height=96, width=96)).shape == (1, 768, 32, 32)


def test_the_vit_decoder_equals_vit_maes(rae: Path) -> None:
    """The same weights in transformers' ViT-MAE layers, wired as RAE wires them, make the same image."""
    from transformers import ViTMAEConfig
    from transformers.models.vit_mae.modeling_vit_mae import ViTMAELayer

    from pidecode.models.vit_decoder import VitDecoder, VitDecoderConfig, sincos_position_embedding

    config = VitDecoderConfig(
        in_channels=24, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4, patch_size=4, grid_size=6
    )
    ours = tiny_models.shake(VitDecoder(config))
    ours.decoder_pos_embed.data.copy_(sincos_position_embedding(32, 6))
    hf = ViTMAEConfig(hidden_size=32, intermediate_size=48, num_attention_heads=4, layer_norm_eps=1e-12, qkv_bias=True)
    hf._attn_implementation = "sdpa"
    layers = [ViTMAELayer(hf).eval() for _ in range(2)]
    newer = {"attention.attention.query": "attention.q_proj", "attention.attention.key": "attention.k_proj",
             "attention.attention.value": "attention.v_proj", "attention.output.dense": "attention.o_proj",
             "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2"}  # fmt: skip
    for own, theirs in zip(ours.decoder_layers, layers, strict=True):
        given = dict(own.state_dict())
        if "mlp.fc1.weight" in theirs.state_dict():  # transformers 5 renamed them; the released files did not change
            for old, new in newer.items():
                given = {name.replace(old, new) if name.startswith(old) else name: t for name, t in given.items()}
        theirs.load_state_dict(given)
    tokens = torch.randn(2, 36, 24, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        x = ours.decoder_embed(tokens)
        x = torch.cat([ours.trainable_cls_token.expand(2, -1, -1), x], 1) + ours.decoder_pos_embed
        for layer in layers:
            out = layer(x)
            x = out[0] if isinstance(out, tuple) else out
        values = ours.decoder_pred(ours.decoder_norm(x))[:, 1:].reshape(2, 6, 6, 4, 4, 3)
        wanted = torch.einsum("nhwpqc->nchpwq", values).reshape(2, 3, 24, 24)
        torch.testing.assert_close(ours(tokens), wanted, rtol=1e-4, atol=1e-5)


def test_positions_are_those_of_masked_autoencoders() -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    from pidecode.models.vit_decoder import sincos_position_embedding

    config = ViTMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=20, patch_size=4,
        decoder_hidden_size=32, decoder_num_hidden_layers=1, decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
    )  # fmt: skip
    decoder = ViTMAEForPreTraining(config).decoder
    decoder.initialize_weights(25)
    wanted = decoder.decoder_pos_embed
    assert float(wanted.abs().max()) > 0.9
    torch.testing.assert_close(sincos_position_embedding(32, 5), wanted.detach(), rtol=0, atol=1e-6)


def test_siglip_follows_scale_rae_step_by_step(tmp_path: Path) -> None:
    model = tiny_models.siglip()
    model.save_pretrained(tmp_path / "siglip2-so400m-patch14-224")
    tiny_models.vit_decoder_file(tmp_path / "decoder/siglip2_sop14_i224_web73M_ganw3_decXL.pt", 1152, 16, 14)
    (tmp_path / "decoder/XL_decoder_config.json").write_text(json.dumps({"decoder_num_attention_heads": 4}))
    encoder = load_encoder("siglip", tmp_path)
    x = images(8, batch=2, height=256, width=256)
    seen = functional.interpolate((x + 1) / 2, size=(224, 224), mode="bicubic", align_corners=False, antialias=True)
    with torch.no_grad():
        hidden = model((seen - 0.5) / 0.5, output_hidden_states=True).hidden_states[-1]
    tokens = functional.layer_norm(hidden, (1152,), eps=1e-6)
    wanted = tokens.transpose(1, 2).reshape(2, 1152, 16, 16)
    torch.testing.assert_close(encoder(x), wanted, rtol=1e-4, atol=1e-4)
    assert encoder.decode(wanted).shape == (2, 3, 256, 256)
    narrow = load_encoder("siglip", tmp_path, dtype=torch.bfloat16)
    assert float((narrow(x) - wanted).std()) < 0.1
    assert Latent(encoder(x), "siglip").output_size == (2048, 2048)


def test_what_does_not_fit_is_named(vaes: dict[str, Any], rae: Path, tmp_path: Path) -> None:
    vaes["flux"].save_pretrained(tmp_path / "flux")
    vaes["flux2"].save_pretrained(tmp_path / "flux2")
    with pytest.raises(CheckpointError, match="scaling 0.3611 and shift 0.1159; the sd3 space has scaling 1.5305"):
        load_encoder("sd3", tmp_path / "flux")
    with pytest.raises(CheckpointError, match="AutoencoderKLFlux2; the encoder of flux is an AutoencoderKL"):
        load_encoder("flux", tmp_path / "flux2")
    vaes["qwenimage"].save_pretrained(tmp_path / "wan")
    config = tmp_path / "wan" / "config.json"
    config.write_text(config.read_text().replace("AutoencoderKLQwenImage", "AutoencoderKLWan"))
    with pytest.raises(CheckpointError, match="AutoencoderKLWan; the encoder of qwenimage is an AutoencoderKLQwenIm"):
        load_encoder("qwenimage", tmp_path / "wan")
    for content in ("{}", "[]", "3"):
        config.write_text(content)
        with pytest.raises(CheckpointError, match="describes no class of diffusers; the encoder of qwenimage"):
            load_encoder("qwenimage", tmp_path / "wan")
    with pytest.raises(CheckpointError, match="no config.json"):
        load_encoder("flux", tmp_path)
    with pytest.raises(SettingError, match="act on dinov2 and siglip only"):
        load_encoder("flux", tmp_path / "flux", statistics=tmp_path)
    with pytest.raises(SettingError, match="does not run in float16"):
        load_encoder("sdxl", tmp_path, dtype=torch.float16)
    tensors = tiny_models.as_ldm(vaes["flux"].state_dict())
    tensors.pop("encoder.conv_out.bias")
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "cut.safetensors")
    with pytest.raises(CheckpointError, match=r"missing: encoder\.conv_out\.bias"):
        load_encoder("flux", tmp_path / "cut.safetensors")
    tensors = tiny_models.as_ldm(vaes["flux"].state_dict()) | {"loss.logvar": torch.zeros(1)}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"holds loss\.logvar, which is not of an autoencoder"):
        load_encoder("flux", tmp_path / "more.safetensors")
    many = {f"encoder.down.{stage}.{half}": torch.zeros(1) for stage in range(10_000) for half in "ab"}
    save_file(many, tmp_path / "many.safetensors")
    with pytest.raises(CheckpointError, match="not a known autoencoder"):
        load_encoder("flux", tmp_path / "many.safetensors")
    for lost, words in (
        ("encoder.down.0.downsample.conv.bias", "has not the tensors"),
        ("decoder.up.1.upsample.conv.bias", "lacks"),
    ):
        tensors = tiny_models.as_ldm(vaes["flux"].state_dict())
        tensors.pop(lost)
        save_file({name: tensor.clone() for name, tensor in tensors.items()}, tmp_path / "lost.safetensors")
        with pytest.raises(CheckpointError, match=words):
            load_encoder("flux", tmp_path / "lost.safetensors")
    with pytest.raises(CheckpointError, match="is not a folder"):
        load_encoder("dinov2", tmp_path / "cut.safetensors")
    with pytest.raises(DownloadError, match="hf download facebook/dinov2-with-registers-base"):
        load_encoder("dinov2", tmp_path)
    with pytest.raises(CheckpointError, match=r"no stat\.pt"):
        load_encoder("dinov2", rae / "dinov2-with-registers-base")


def test_images_are_checked(vaes: dict[str, Any], tmp_path: Path) -> None:
    vaes["sdxl"].save_pretrained(tmp_path)
    encoder = load_encoder("sdxl", tmp_path)
    assert isinstance(encoder, ImageEncoder)
    with pytest.raises(SizeError, match="nearest size is 48x32"):
        encoder(torch.zeros(1, 3, 31, 50))
    with pytest.raises(SettingError, match=r"must lie in \[-1, 1\]; these reach from 0 to 255"):
        encoder(torch.linspace(0, 255, 3 * 16 * 16).view(1, 3, 16, 16))
    with pytest.raises(SettingError, match=r"takes images \[B, 3, H, W\]"):
        encoder(torch.zeros(3, 16, 16))


@pytest.mark.parametrize(
    "config",
    [
        {"layers_per_block": 10**9},
        {"vision_config": {"num_hidden_layers": 10**9}},
        {"block_out_channels": [32] * 10_000},
        {"block_out_channels": [10**12]},
        {"down_block_types": ["DownEncoderBlock2D"] * 10_000},
    ],
)
def test_configurations_no_model_has_are_refused(config: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match="at most"):
        check_foreign_config({"_class_name": "AutoencoderKL", "sample_size": 1024, **config}, "config.json")
