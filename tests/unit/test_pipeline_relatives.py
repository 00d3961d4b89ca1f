# SPDX-License-Identifier: Apache-2.0
"""Relatives of the supported pipelines, real classes at tiny size: each is decoded right, or refused at `attach`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

import tiny_models
import tiny_pipelines as tiny
from pidecode import attach, latent_from_pipeline
from pidecode.errors import SettingError
from pidecode.integrations.diffusers import _check_pipeline as check_pipeline
from pidecode.integrations.diffusers import _size_of_call as size_of_call
from pidecode.integrations.pipeline_latents import _SPACE_BY_CLASS as SPACE_BY_CLASS
from pidecode.integrations.pipeline_latents import scheduler_sigma, vae_decode
from pidecode.latents.latent import Latent, NormalizationWarning

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{NormalizationWarning.__module__}.NormalizationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
RELATIVES = {
    "FluxInpaintPipeline": "flux", "FluxKontextInpaintPipeline": "flux", "FluxControlPipeline": "flux",
    "FluxControlImg2ImgPipeline": "flux", "FluxControlInpaintPipeline": "flux", "FluxControlNetPipeline": "flux",
    "FluxControlNetImg2ImgPipeline": "flux", "FluxControlNetInpaintPipeline": "flux", "ChromaPipeline": "flux",
    "ChromaImg2ImgPipeline": "flux", "ChromaInpaintPipeline": "flux",
    "Flux2KleinInpaintPipeline": "klein", "Flux2KleinKVPipeline": "klein",
    "StableDiffusion3Img2ImgPipeline": "sd3", "StableDiffusion3InpaintPipeline": "sd3",
    "StableDiffusion3PAGPipeline": "sd3", "StableDiffusion3PAGImg2ImgPipeline": "sd3",
    "StableDiffusion3ControlNetPipeline": "sd3", "StableDiffusion3ControlNetInpaintingPipeline": "sd3",
    "StableDiffusionXLImg2ImgPipeline": "sdxl", "StableDiffusionXLInpaintPipeline": "sdxl",
    "StableDiffusionXLPAGPipeline": "sdxl", "StableDiffusionXLPAGImg2ImgPipeline": "sdxl",
    "StableDiffusionXLPAGInpaintPipeline": "sdxl", "StableDiffusionXLControlNetPipeline": "sdxl",
    "StableDiffusionXLControlNetImg2ImgPipeline": "sdxl", "StableDiffusionXLControlNetInpaintPipeline": "sdxl",
    "StableDiffusionXLControlNetPAGPipeline": "sdxl", "StableDiffusionXLControlNetPAGImg2ImgPipeline": "sdxl",
    "StableDiffusionXLControlNetUnionPipeline": "sdxl", "StableDiffusionXLControlNetUnionImg2ImgPipeline": "sdxl",
    "StableDiffusionXLControlNetUnionInpaintPipeline": "sdxl", "StableDiffusionXLControlNetXSPipeline": "sdxl",
    "QwenImageImg2ImgPipeline": "qwenimage", "QwenImageInpaintPipeline": "qwenimage",
    "QwenImageControlNetPipeline": "qwenimage", "QwenImageControlNetInpaintPipeline": "qwenimage",
    "QwenImageEditPipeline": "qwenimage", "QwenImageEditPlusPipeline": "qwenimage",
    "QwenImageEditInpaintPipeline": "qwenimage",
    "ZImageImg2ImgPipeline": "zimage", "ZImageInpaintPipeline": "zimage", "ZImageControlNetPipeline": "zimage",
    "ZImageControlNetInpaintPipeline": "zimage", "ZImageOmniPipeline": "zimage",
}  # fmt: skip
QUICK = ("Flux2KleinKVPipeline", "QwenImageEditPipeline")


def parts_of_relative(name: str, pipe: Any) -> dict[str, Any]:
    """What a relative has beside or in place of the components of its base."""
    small = dict(num_layers=1, attention_head_dim=16, num_attention_heads=2)
    if name.startswith("FluxControlNet"):
        made = diffusers.FluxControlNetModel.from_transformer(pipe.transformer, num_single_layers=1, **small)
        return {"controlnet": made}
    if name.startswith("FluxControl"):
        return {"transformer": tiny.flux_parts(in_channels=128, out_channels=64)["transformer"]}
    if name.startswith("Chroma"):
        return {"transformer": chroma(), "text_encoder": tiny.t5(32), "tokenizer": tiny.t5_tokenizer()}
    if "3PAG" in name:
        return {"pag_applied_layers": "blocks.0"}
    if "3ControlNet" in name:
        made = diffusers.SD3ControlNetModel.from_transformer(
            pipe.transformer, 1, 1 if "Inpainting" in name else 0, load_weights_from_transformer=False
        )
        return {"controlnet": made}
    if "ControlNetXS" in name:  # which knows two layers in a block only
        unet = diffusers.UNet2DConditionModel.from_config({**pipe.unet.config, "layers_per_block": 2})
        return {"unet": unet, "controlnet": diffusers.ControlNetXSAdapter.from_unet(unet, size_ratio=1.0)}
    if "ControlNetUnion" in name:
        known = inspect.signature(diffusers.ControlNetUnionModel.__init__).parameters
        config = {key: value for key, value in pipe.unet.config.items() if key in known}
        return {"controlnet": diffusers.ControlNetUnionModel(**config, num_trans_channel=8, num_proj_channel=8)}
    if "XLControlNet" in name:
        return {"controlnet": diffusers.ControlNetModel.from_unet(pipe.unet)}
    if name.startswith("QwenImageControlNet"):
        extra = 4 if "Inpaint" in name else 0
        made = diffusers.QwenImageControlNetModel.from_transformer(
            pipe.transformer, **small, extra_condition_channels=extra
        )
        return {"controlnet": made}
    if name.startswith("ZImageControlNet"):
        made = diffusers.ZImageControlNetModel(
            control_layers_places=[0], control_refiner_layers_places=[0], dim=32, n_refiner_layers=1, n_heads=2,
            n_kv_heads=2, control_in_dim=33 if "Inpaint" in name else 16, add_control_noise_refiner="control_layers",
        )  # fmt: skip
        return {"controlnet": made}
    if "Omni" in name:
        return {"siglip": None, "siglip_processor": None}  # only images that it combines are read by these
    # Qwen's processor needs torchvision; embeddings take the processor's place.
    return {"processor": None} if "Edit" in name else {}


def chroma() -> Any:
    transformer = diffusers.ChromaTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8), approximator_hidden_dim=32, approximator_layers=1,
        approximator_num_channels=16,
    )  # fmt: skip
    transformer.register_to_config(guidance_embeds=False)  # the inpainting pipeline asks for it
    return transformer


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in RELATIVES]
)
def test_relatives_of_every_family(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Image to image, inpainting and edits: their latent, decoded by their VAE, is the image they make themselves."""
    base, kind = RELATIVES[name], getattr(diffusers, name)
    module = inspect.getmodule(kind)
    if area := getattr(module, "calculate_dimensions", None):  # edits enlarge the image to a megapixel
        monkeypatch.setattr(module, "calculate_dimensions", lambda _area, ratio: area(64 * 64, ratio))
    wanted = inspect.signature(kind.__init__).parameters
    built = tiny.build(base)
    pipe = kind(
        **{key: part for key, part in built.components.items() if key in wanted} | parts_of_relative(name, built)
    )
    pipe.set_progress_bar_config(disable=True)
    given = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    extra = {
        "image": given, "mask_image": Image.new("L", (64, 64), 255), "strength": 0.75, "max_area": 64 * 64,
        "_auto_resize": False, "pag_applied_layers": "blocks.0", "control_mode": 0, "control_image": given,
        "control_mask": Image.new("L", (64, 64), 255),
    }  # fmt: skip
    if "Edit" in name:
        extra |= {
            "prompt": None, "prompt_embeds": torch.ones(1, 6, 16), "prompt_embeds_mask": torch.ones(1, 6).long(),
        }  # fmt: skip
    if "Omni" in name:
        extra["image"] = None
    takes = inspect.signature(kind.__call__).parameters

    def call(**changes: Any) -> dict[str, Any]:
        every = tiny.arguments(base, height=64, width=64, **extra) | changes
        return {key: value for key, value in every.items() if key in takes}

    out = attach(pipe, tiny.decoder_for(tiny.SPACE.get(base, base)))(**call())
    assert out.images[0].size == (256, 256)
    assert out.num_steps == (3 if "strength" in takes else tiny.STEPS)
    check_latent(name, pipe, out.latents, call)


def check_latent(name: str, pipe: Any, latent: Latent, call: Callable[..., dict[str, Any]]) -> None:
    """Decoded by the pipeline's VAE, a latent is the image that the pipeline makes itself; so is its own output."""
    with torch.inference_mode():
        own, raw = (pipe(**call(output_type=kind)) for kind in ("pt", "latent"))
    rows, columns = (side * latent.latent_space.down for side in latent.grid)
    found = latent_from_pipeline(pipe, raw, height=rows, width=columns)
    torch.testing.assert_close(found.tensor, latent.tensor, rtol=1e-3, atol=1e-3)
    decoded = vae_decode(pipe, latent)
    if name == "StableDiffusion3InpaintPipeline":  # which decodes without its VAE's shift
        raw = latent.tensor / pipe.vae.config.scaling_factor
        decoded = pipe.vae.decode(raw).sample.detach().clamp(-1, 1)
    tolerance = 1e-3 if name == "ErnieImagePipeline" else 3e-5  # which adds 1e-5 to the variances, FLUX.2 1e-4
    torch.testing.assert_close(decoded, own.images.float() * 2 - 1, rtol=0, atol=tolerance)


# Models of other families with the autoencoder of a space: components, and embeddings in place of the text encoders.
def ones(*shape: int) -> torch.Tensor:
    return torch.linspace(-1, 1, shape[-1]).expand(*shape).clone()


def auraflow() -> tuple[dict[str, Any], dict[str, Any]]:
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=32, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=32, out_channels=4,
        pos_embed_max_size=256,
    )  # fmt: skip
    call = {"prompt_embeds": ones(1, 6, 32), "prompt_attention_mask": torch.ones(1, 6), "guidance_scale": 1.0}
    return {"transformer": transformer, "scheduler": tiny.flow()}, call


def hunyuan_dit() -> tuple[dict[str, Any], dict[str, Any]]:
    transformer = diffusers.HunyuanDiT2DModel(
        sample_size=8, num_layers=2, patch_size=2, attention_head_dim=8, num_attention_heads=3, in_channels=4,
        cross_attention_dim=32, cross_attention_dim_t5=32, pooled_projection_dim=16, hidden_size=24,
        activation_fn="gelu-approximate",
    )  # fmt: skip
    call = {"use_resolution_binning": False, "guidance_scale": 1.0, "pag_scale": 0.0}
    for tail, tokens in (("", 77), ("_2", 256)):
        call |= {f"prompt_embeds{tail}": ones(1, tokens, 32), f"prompt_attention_mask{tail}": torch.ones(1, tokens)}
    return {
        "transformer": transformer.eval(), "scheduler": diffusers.DDPMScheduler(), "safety_checker": None,
        "feature_extractor": None, "requires_safety_checker": False,
    }, call  # fmt: skip


def kolors() -> tuple[dict[str, Any], dict[str, Any]]:
    base = tiny.build("sdxl")
    call = {"prompt_embeds": ones(1, 6, 64), "pooled_prompt_embeds": ones(1, 32), "guidance_scale": 1.0}
    call |= {"strength": 0.75, "image": Image.new("RGB", (64, 64), "gray")}
    return {"unet": base.unet, "scheduler": base.scheduler}, call


def lumina() -> tuple[dict[str, Any], dict[str, Any]]:
    transformer = diffusers.LuminaNextDiT2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=4, num_layers=2, num_attention_heads=1, num_kv_heads=1,
        multiple_of=16, learn_sigma=True, qk_norm=True, cross_attention_dim=8, scaling_factor=1.0,
    )  # fmt: skip
    call = {"prompt_embeds": ones(1, 6, 8), "prompt_attention_mask": torch.ones(1, 6), "guidance_scale": 1.0}
    return {"transformer": transformer.eval(), "scheduler": tiny.flow()}, call


def lumina2() -> tuple[dict[str, Any], dict[str, Any]]:
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=16, hidden_size=8, num_layers=1, num_attention_heads=1,
        num_kv_heads=1, multiple_of=16, scaling_factor=1.0, axes_dim_rope=[4, 2, 2], cap_feat_dim=8,
    )  # fmt: skip
    mask = torch.ones(1, 6).long()
    call = {"prompt_embeds": ones(1, 6, 8), "prompt_attention_mask": mask, "guidance_scale": 1.0}
    return {"transformer": transformer.eval(), "scheduler": tiny.flow()}, call


def omnigen() -> tuple[dict[str, Any], dict[str, Any]]:
    transformer = diffusers.OmniGenTransformer2DModel(
        hidden_size=16, num_attention_heads=4, num_key_value_heads=4, intermediate_size=32, num_layers=1,
        in_channels=4, time_step_dim=4, rope_scaling={"long_factor": [1, 2], "short_factor": [1, 2]},
    )  # fmt: skip
    scheduler = tiny.flow(invert_sigmas=True, num_train_timesteps=1)
    call = {"prompt": "a cat", "guidance_scale": 1.0, "img_guidance_scale": 1.0}
    return {"transformer": transformer.eval(), "scheduler": scheduler, "tokenizer": tiny.qwen_tokenizer()}, call


def hidream() -> tuple[dict[str, Any], dict[str, Any]]:
    transformer = diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_channels=[32, 16], text_emb_dim=64, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(4, 2, 2), max_resolution=(32, 32), llama_layers=(0, 1),
    )  # fmt: skip
    call = {
        "prompt_embeds_t5": ones(1, 8, 32), "prompt_embeds_llama3": ones(2, 1, 8, 16),
        "pooled_prompt_embeds": ones(1, 64), "guidance_scale": 1.0,
    }  # fmt: skip
    return {"transformer": transformer.eval(), "scheduler": tiny.flow()}, call


def ovis() -> tuple[dict[str, Any], dict[str, Any]]:
    transformer = diffusers.OvisImageTransformer2DModel(
        patch_size=1, in_channels=64, out_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    return {"transformer": transformer, "scheduler": tiny.flow()}, {
        "prompt_embeds": ones(1, 6, 32), "guidance_scale": 1.0, "max_sequence_length": 6,
    }  # fmt: skip


def krea2() -> tuple[dict[str, Any], dict[str, Any]]:
    transformer = diffusers.Krea2Transformer2DModel(
        in_channels=64, num_layers=1, attention_head_dim=8, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=32, timestep_embed_dim=8, text_hidden_dim=16, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=1, text_intermediate_size=16, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 2, 2), rope_theta=1000.0,
    )  # fmt: skip
    call = {"prompt_embeds": ones(1, 6, 3, 16), "prompt_embeds_mask": torch.ones(1, 6).bool(), "guidance_scale": 0.0}
    return {"transformer": transformer, "scheduler": tiny.flow(use_dynamic_shifting=True)}, call


def ernie() -> tuple[dict[str, Any], dict[str, Any]]:
    transformer = diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=32, text_in_dim=16,
        rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    torch.nn.init.normal_(transformer.final_linear.weight, std=0.2)
    call = {"prompt": None, "prompt_embeds": [ones(6, 16)], "guidance_scale": 1.0, "use_pe": False}
    return {"transformer": transformer, "scheduler": tiny.flow(), "pe": None, "pe_tokenizer": None}, call


def nucleus() -> tuple[dict[str, Any], dict[str, Any]]:
    transformer = diffusers.NucleusMoEImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4), moe_enabled=False, capacity_factors=[8.0],
    )  # fmt: skip
    call = {"prompt_embeds": ones(1, 6, 16), "prompt_embeds_mask": torch.ones(1, 6).long(), "guidance_scale": 1.0}
    return {"transformer": transformer, "scheduler": tiny.flow()}, call


OTHERS: dict[str, tuple[Callable[[], tuple[dict[str, Any], dict[str, Any]]], str]] = {
    "AuraFlowPipeline": (auraflow, "sdxl"), "HunyuanDiTPipeline": (hunyuan_dit, "sdxl"),
    "HunyuanDiTPAGPipeline": (hunyuan_dit, "sdxl"), "KolorsPipeline": (kolors, "sdxl"),
    "KolorsImg2ImgPipeline": (kolors, "sdxl"), "KolorsPAGPipeline": (kolors, "sdxl"),
    "LuminaPipeline": (lumina, "sdxl"), "OmniGenPipeline": (omnigen, "sdxl"), "Lumina2Pipeline": (lumina2, "flux"),
    "HiDreamImagePipeline": (hidream, "flux"), "OvisImagePipeline": (ovis, "flux"),
    "ErnieImagePipeline": (ernie, "flux2"), "Krea2Pipeline": (krea2, "qwenimage"),
    "NucleusMoEImagePipeline": (nucleus, "qwenimage"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("name", OTHERS)
def test_models_known_by_their_autoencoder(name: str) -> None:
    if name == "OmniGenPipeline":
        pytest.importorskip("torchvision", reason="OmniGen's processor needs torchvision")
    made, space = OTHERS[name]
    kind = getattr(diffusers, name)
    torch.manual_seed(0)
    parts, keywords = made()
    wanted = list(inspect.signature(kind.__init__).parameters)[1:]
    parts |= {"vae": tiny_models.autoencoder(space)}
    absent = {key: None for key in wanted if key.startswith(("text_encoder", "tokenizer", "processor", "image_enc"))}
    if name == "KolorsPAGPipeline":
        parts |= {"pag_applied_layers": "mid"}
    pipe = kind(**absent | {key: part for key, part in parts.items() if key in wanted})
    pipe.set_progress_bar_config(disable=True)
    if name == "HiDreamImagePipeline":
        pipe.default_sample_size = 6  # it makes every image as large as its default
    if name == "KolorsImg2ImgPipeline":  # which takes no ready-made embeddings, although it says so
        pipe.encode_prompt = lambda **_: (keywords["prompt_embeds"], None, keywords["pooled_prompt_embeds"], None)
    takes = inspect.signature(kind.__call__).parameters

    def call(**changes: Any) -> dict[str, Any]:
        own = {"height": 32, "width": 64, "num_inference_steps": tiny.STEPS, **keywords, **changes}
        own["generator"] = torch.Generator().manual_seed(0)
        return {key: value for key, value in own.items() if key in takes}

    out = attach(pipe, tiny.decoder_for(space))(**call())
    assert out.images[0].size == ((256, 256) if "Img2Img" in name else (256, 128))
    assert out.latents.sigma == 0.0
    check_latent(name, pipe, out.latents, call)


FOLLOWED = {
    "FluxPipeline", "FluxImg2ImgPipeline", "FluxKontextPipeline", "FluxFillPipeline", "Flux2Pipeline",
    "Flux2KleinPipeline", "StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "QwenImagePipeline",
    "ZImagePipeline",
}  # fmt: skip
"""Classes of `tiny_pipelines`, whose tests are in test_diffusers.py."""


@pytest.mark.slow
@pytest.mark.skipif(not diffusers.__version__.startswith("0.42."), reason="other versions have other classes")
def test_every_class_of_the_families_is_tested_or_refused() -> None:
    names = [name for name in dir(diffusers) if name.endswith("Pipeline") and "Modular" not in name]
    stems = tuple(stem for stem, space in SPACE_BY_CLASS if space)
    accepted = set()
    for name in names:
        if not name.startswith(stems) or name == "DiffusionPipeline":
            continue
        try:
            check_pipeline(object.__new__(getattr(diffusers, name)))
        except SettingError:
            continue
        accepted.add(name)
    assert accepted == FOLLOWED | set(RELATIVES)


@pytest.mark.parametrize(
    ("name", "space", "words"),
    [
        ("StableDiffusionXLAdapterPipeline", "sdxl", "takes no callback_on_step_end"),
        ("StableDiffusionXLInstructPix2PixPipeline", "sdxl", "takes no callback_on_step_end"),
        ("PixArtSigmaPipeline", "sdxl", "takes no callback_on_step_end"),  # it swallows unknown keywords
        ("PixArtSigmaPAGPipeline", "sdxl", "takes no callback_on_step_end"),
        ("LongCatImagePipeline", "flux", "takes no callback_on_step_end"),
        ("LongCatImageEditPipeline", "flux", "takes no callback_on_step_end"),
        ("FluxPriorReduxPipeline", "flux", "does not work in a latent space"),
        ("AnimateDiffSDXLPipeline", "sdxl", "does not work in a latent space"),
        ("BriaPipeline", "sdxl", "does not work in a latent space"),
        ("LEditsPPPipelineStableDiffusionXL", "sdxl", "does not work in a latent space"),
        ("StableDiffusionPipeline", "stable diffusion 1.5", "does not work in a latent space"),
    ],
)
def test_what_cannot_be_followed_is_refused_at_attach(name: str, space: str, words: str) -> None:
    """Before the diffusion, whose images would be lost."""
    pipe = object.__new__(getattr(diffusers, name))
    if space == "stable diffusion 1.5":
        pipe.vae = tiny_models.autoencoder("sdxl")
        pipe.vae.register_to_config(scaling_factor=0.18215)
    else:
        pipe.vae = tiny_models.autoencoder(space)
    with pytest.raises(SettingError, match=f"A {name} {words}"):
        attach(pipe, tiny.decoder_for("sdxl" if space.startswith("stable") else space))


def test_a_stop_that_cannot_be_made_is_refused_at_attach() -> None:
    pipe = object.__new__(diffusers.ChromaPipeline)
    with pytest.raises(SettingError, match="No early stop is recommended for ChromaPipeline"):
        attach(pipe, tiny.decoder_for("flux"), stop_after="recommended")
    with pytest.raises(SettingError, match="or 'recommended'"):
        attach(pipe, tiny.decoder_for("flux"), stop_after=2.5)  # type: ignore[arg-type]
    pipe = object.__new__(diffusers.Lumina2Pipeline)
    pipe.vae = tiny_models.autoencoder("flux")
    with pytest.raises(SettingError, match="A Lumina2Pipeline cannot be interrupted"):
        attach(pipe, tiny.decoder_for("flux"), stop_after=3)


def test_an_ip_adapter_changes_the_latent_alone() -> None:
    pipe = tiny.build("sdxl")
    plain = attach(pipe, tiny.decoder_for("sdxl"))(**tiny.arguments("sdxl"))
    weights: dict[str, torch.Tensor] = {}
    for place in range(sum(name.endswith("attn2.processor") for name in pipe.unet.attn_processors)):
        for kind in ("k", "v"):  # all blocks of the tiny network are eight wide
            weights[f"{2 * place + 1}.to_{kind}_ip.weight"] = torch.randn(8, 64)
    projection = {
        "proj.weight": torch.randn(4 * 64, 32), "proj.bias": torch.zeros(4 * 64),
        "norm.weight": torch.ones(64), "norm.bias": torch.zeros(64),
    }  # fmt: skip
    pipe.unet._load_ip_adapter_weights([{"image_proj": projection, "ip_adapter": weights}])
    embeds = [torch.randn(1, 1, 32, generator=torch.Generator().manual_seed(0))]

    def call(**changes: Any) -> dict[str, Any]:
        return tiny.arguments("sdxl", ip_adapter_image_embeds=embeds, **changes)

    out = attach(pipe, tiny.decoder_for("sdxl"), stop_after=3)(**call())
    assert 0 < out.latents.sigma < 0.8
    out = attach(pipe, tiny.decoder_for("sdxl"))(**call())
    assert not torch.equal(out.latents.tensor, plain.latents.tensor)
    check_latent("sdxl", pipe, out.latents, call)


def pixart() -> tuple[dict[str, Any], dict[str, Any]]:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=8, num_layers=1, patch_size=2, attention_head_dim=8, num_attention_heads=2, caption_channels=32,
        in_channels=4, out_channels=8, cross_attention_dim=16, use_additional_conditions=False,
    )  # fmt: skip
    call = {"prompt_embeds": ones(1, 6, 32), "prompt_attention_mask": torch.ones(1, 6), "guidance_scale": 1.0}
    call |= {"use_resolution_binning": False, "negative_prompt": None}
    return {"transformer": transformer, "scheduler": diffusers.DPMSolverMultistepScheduler()}, call


def longcat() -> tuple[dict[str, Any], dict[str, Any]]:
    transformer = diffusers.LongCatImageTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip
    call = {"prompt_embeds": ones(1, 6, 32), "guidance_scale": 1.0, "enable_prompt_rewrite": False}
    return {"transformer": transformer, "scheduler": tiny.flow(), "text_processor": None}, call


def pix2pix() -> tuple[dict[str, Any], dict[str, Any]]:
    parts = tiny.build("sdxl").components
    unet = diffusers.UNet2DConditionModel.from_config({**parts["unet"].config, "in_channels": 8})
    call = {"prompt": "a cat", "image": Image.new("RGB", (64, 32)), "guidance_scale": 1.0}
    return parts | {"unet": unet}, call


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "made", "space"),
    [
        ("PixArtSigmaPipeline", pixart, "sdxl"),
        ("LongCatImagePipeline", longcat, "flux"),
        ("StableDiffusionXLInstructPix2PixPipeline", pix2pix, "sdxl"),
    ],
)
def test_the_latents_of_refused_pipelines_are_read_as_the_error_says(
    name: str, made: Callable[[], tuple[dict[str, Any], dict[str, Any]]], space: str
) -> None:
    kind = getattr(diffusers, name)
    torch.manual_seed(0)
    parts, keywords = made()
    wanted = list(inspect.signature(kind.__init__).parameters)[1:]
    absent = {key: None for key in wanted if key.startswith(("text_encoder", "tokenizer"))}
    parts = {"vae": tiny_models.autoencoder(space), **absent, **parts}
    pipe = kind(**{key: part for key, part in parts.items() if key in wanted})
    pipe.set_progress_bar_config(disable=True)
    if name == "LongCatImagePipeline":  # which tokenizes the prompt even if its embeddings are given
        pipe.encode_prompt = lambda *_, **__: (keywords["prompt_embeds"], torch.zeros(6, 3))
    images, latents = (
        pipe(
            **keywords, height=32, width=64, num_inference_steps=3, output_type=output,
            generator=torch.Generator().manual_seed(0),
        ).images for output in ("pt", "latent")
    )  # fmt: skip
    latent = latent_from_pipeline(pipe, latents, height=32, width=64)
    assert latent.sigma == 0.0
    torch.testing.assert_close(vae_decode(pipe, latent), images.float() * 2 - 1, rtol=0, atol=3e-5)


def test_a_schedule_that_tells_the_image_in_place_of_the_noise_ends_clean() -> None:
    scheduler = tiny.flow(invert_sigmas=True, num_train_timesteps=1)  # OmniGen's
    scheduler.set_timesteps(4)
    assert scheduler_sigma(scheduler) == 0.0
    scheduler._step_index = 0
    assert scheduler_sigma(scheduler) == pytest.approx(1 - float(scheduler.sigmas[0]))


def test_the_size_of_a_call_is_the_pipelines_own_where_none_is_given() -> None:
    """Krea 2's transformer does not tell the grid of its tokens."""
    krea = object.__new__(diffusers.Krea2Pipeline)
    assert size_of_call(krea, {}) == (1024, 1024)
    assert size_of_call(krea, {"width": 512}) == (1024, 512)
    flux = object.__new__(diffusers.FluxPipeline)
    flux.default_sample_size, flux.vae_scale_factor = 128, 8
    assert size_of_call(flux, {"height": 512, "width": None}) == (512, 1024)
