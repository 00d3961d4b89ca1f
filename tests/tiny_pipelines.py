# SPDX-License-Identifier: Apache-2.0
"""The supported diffusers pipelines, real classes with a few hundred thousand weights, and decoders for them."""

from __future__ import annotations

import string
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel

import tiny_models
from pidecode.decoder import PixelDecoder
from pidecode.registry.configs import debug_config
from pidecode.registry.spaces import get_space
from pidecode.weights.metadata import CheckpointMetadata
from random_networks import normal_net

MAX_TOKENS = 24
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def clip_tokenizer() -> Any:
    letters = sorted(ByteLevel.alphabet())
    names = ["<|startoftext|>", "<|pad|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
    return transformers.CLIPTokenizer(
        vocab={name: place for place, name in enumerate(names)}, merges=[], model_max_length=77
    )


def t5_tokenizer() -> Any:
    letters = ["\u2581", *string.ascii_letters, *string.digits, *string.punctuation]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((letter, -2.0) for letter in letters)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=512)


def qwen_tokenizer() -> Any:
    names = [*sorted(ByteLevel.alphabet()), "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = transformers.Qwen2Tokenizer(
        vocab={name: place for place, name in enumerate(names)},
        merges=[],
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
        model_max_length=2048,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def clip(projected: bool = False, width: int = 32) -> Any:
    config = transformers.CLIPTextConfig(
        hidden_size=width, intermediate_size=40, num_attention_heads=4, num_hidden_layers=3, vocab_size=600,
        projection_dim=width, bos_token_id=0, eos_token_id=2, pad_token_id=1,
    )  # fmt: skip
    kind = transformers.CLIPTextModelWithProjection if projected else transformers.CLIPTextModel
    return kind(config).eval()


def t5(width: int) -> Any:
    config = transformers.T5Config(vocab_size=128, d_model=width, d_kv=8, d_ff=40, num_layers=1, num_heads=4)
    return transformers.T5EncoderModel(config).eval()


def qwen3(kind: Any) -> Any:
    config = transformers.Qwen3Config(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        head_dim=8, vocab_size=300, max_position_embeddings=2048,
    )  # fmt: skip
    return kind(config).eval()


def flow(**settings: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**settings)


def flux_parts(**changes: Any) -> dict[str, Any]:
    shape = dict(
        patch_size=1, in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    return dict(
        transformer=diffusers.FluxTransformer2DModel(**{**shape, **changes}),
        scheduler=flow(use_dynamic_shifting=True, shift=3.0), vae=tiny_models.autoencoder("flux"),
        text_encoder=clip(), tokenizer=clip_tokenizer(), text_encoder_2=t5(32), tokenizer_2=t5_tokenizer(),
    )  # fmt: skip


def flux() -> Any:
    return diffusers.FluxPipeline(**flux_parts())


def flux_img2img() -> Any:
    return diffusers.FluxImg2ImgPipeline(**flux_parts())


def flux_kontext() -> Any:
    return diffusers.FluxKontextPipeline(**flux_parts())


def flux_fill() -> Any:
    return diffusers.FluxFillPipeline(**flux_parts(in_channels=384, out_channels=64))


def _flux2_transformer(guidance: bool) -> Any:
    return diffusers.Flux2Transformer2DModel(
        patch_size=1, in_channels=128, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance,
    )  # fmt: skip


def flux2() -> Any:
    text = dict(
        model_type="mistral", vocab_size=300, hidden_size=16, intermediate_size=32, max_position_embeddings=2048,
        num_attention_heads=4, num_hidden_layers=2, num_key_value_heads=2, sliding_window=None, bos_token_id=2,
        eos_token_id=3, pad_token_id=4,
    )  # fmt: skip
    vision = dict(
        model_type="pixtral", hidden_size=16, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32,
        image_size=30, patch_size=6, num_channels=3,
    )  # fmt: skip
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=1, vision_feature_layer=-1
    )
    return diffusers.Flux2Pipeline(
        scheduler=flow(use_dynamic_shifting=True, shift=3.0), vae=tiny_models.autoencoder("flux2"),
        text_encoder=transformers.Mistral3ForConditionalGeneration(config).eval(), tokenizer=qwen_tokenizer(),
        transformer=_flux2_transformer(True),
    )  # fmt: skip


def klein() -> Any:
    return diffusers.Flux2KleinPipeline(
        scheduler=flow(use_dynamic_shifting=True, shift=3.0), vae=tiny_models.autoencoder("flux2"),
        text_encoder=qwen3(transformers.Qwen3ForCausalLM), tokenizer=qwen_tokenizer(),
        transformer=_flux2_transformer(False), is_distilled=True,
    )  # fmt: skip


def sd3() -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=1, attention_head_dim=8,
        num_attention_heads=4, caption_projection_dim=32, joint_attention_dim=64, pooled_projection_dim=64,
        pos_embed_max_size=32,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, scheduler=flow(shift=3.0), vae=tiny_models.autoencoder("sd3"),
        text_encoder=clip(True), tokenizer=clip_tokenizer(), text_encoder_2=clip(True), tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(64), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def sdxl() -> Any:
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=8, transformer_layers_per_block=(1, 1), projection_class_embeddings_input_dim=80,
        cross_attention_dim=64, norm_num_groups=2,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    return diffusers.StableDiffusionXLPipeline(
        unet=unet, scheduler=scheduler, vae=tiny_models.autoencoder("sdxl"), text_encoder=clip(),
        tokenizer=clip_tokenizer(), text_encoder_2=clip(True), tokenizer_2=clip_tokenizer(), add_watermarker=False,
    )  # fmt: skip


def qwenimage() -> Any:
    text = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=300, max_position_embeddings=2048,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=16)
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config=vision,
        vision_start_token_id=1, vision_end_token_id=2, image_token_id=3, video_token_id=4,
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    return diffusers.QwenImagePipeline(
        scheduler=flow(use_dynamic_shifting=True), vae=tiny_models.autoencoder("qwenimage"), transformer=transformer,
        text_encoder=transformers.Qwen2_5_VLForConditionalGeneration(config).eval(), tokenizer=qwen_tokenizer(),
    )  # fmt: skip


def zimage() -> Any:
    transformer = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, rope_theta=256.0, axes_dims=[8, 4, 4], axes_lens=[512, 64, 64],
    )  # fmt: skip
    for token in (transformer.x_pad_token, transformer.cap_pad_token):
        torch.nn.init.ones_(token)  # the class leaves them uninitialized
    return diffusers.ZImagePipeline(
        scheduler=flow(shift=3.0), vae=tiny_models.autoencoder("flux"), text_encoder=qwen3(transformers.Qwen3Model),
        tokenizer=qwen_tokenizer(), transformer=transformer.eval(),
    )  # fmt: skip


PIPELINES: dict[str, Callable[[], Any]] = {
    "flux": flux, "flux2": flux2, "klein": klein, "sd3": sd3, "sdxl": sdxl, "qwenimage": qwenimage, "zimage": zimage,
}  # fmt: skip
SPACE = {"klein": "flux2", "zimage": "flux"}
_MISTRAL = dict(max_sequence_length=MAX_TOKENS * 2, text_encoder_out_layers=(1,))
CALL: dict[str, dict[str, Any]] = {
    "flux": dict(guidance_scale=3.5, max_sequence_length=MAX_TOKENS),
    "flux2": dict(guidance_scale=4.0, **_MISTRAL),
    "klein": dict(guidance_scale=1.0, **_MISTRAL),
    "sd3": dict(guidance_scale=1.0, max_sequence_length=MAX_TOKENS),
    "sdxl": dict(guidance_scale=1.0),
    "qwenimage": dict(true_cfg_scale=1.0, max_sequence_length=MAX_TOKENS * 2),
    "zimage": dict(guidance_scale=0.0, max_sequence_length=MAX_TOKENS),
}
HEIGHT, WIDTH, STEPS = 32, 64, 4


def build(name: str) -> Any:
    """One of the pipelines with seeded weights."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = PIPELINES[name]() if name in PIPELINES else globals()[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def arguments(name: str, **changes: Any) -> dict[str, Any]:
    """Call arguments for a quick, repeatable run."""
    own = dict(
        prompt="a cat", height=HEIGHT, width=WIDTH, num_inference_steps=STEPS,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    return {**own, **CALL.get(name, CALL["flux"]), **changes}


def decoder_for(space: str, *, text: bool = False, **changes: Any) -> PixelDecoder:
    """A PiD network with all of its parts and a hundred thousand weights, for one space."""
    row = get_space(space)
    config = debug_config(
        latent_channels=row.channels, latent_down=row.down, scale=row.scale, latent_unpatchify=row.raw_patch,
        **({} if text else {"text_dim": 0}), **changes,
    )  # fmt: skip
    metadata = CheckpointMetadata(kind="student", config=config, space=row.name)
    return PixelDecoder(normal_net(config, seed=1), metadata, name=f"tiny {row.name}")
