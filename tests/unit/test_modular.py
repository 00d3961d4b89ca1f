# SPDX-License-Identifier: Apache-2.0
"""Modular pipelines of diffusers at tiny size: PiD's block in place of the decode block, and early stop."""

from __future__ import annotations

from functools import cache
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.modular_pipelines.qwenimage import encoders
from PIL import Image

import pidecode
import tiny_pipelines as tiny
from pidecode import DecodeOptions, PixelDecoder, attach, pid_blocks
from pidecode.errors import LatentError, SettingError
from pidecode.integrations.modular import SUPPORTED_MODELS, PiDDecodeStep
from pidecode.integrations.pipeline_latents import to_latent, vae_decode
from pidecode.latents.latent import NormalizationWarning

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{NormalizationWarning.__module__}.NormalizationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
BLOCKS = {
    "flux": "FluxAutoBlocks", "flux2": "Flux2AutoBlocks", "klein": "Flux2KleinAutoBlocks",
    "sd3": "StableDiffusion3AutoBlocks", "sdxl": "StableDiffusionXLAutoBlocks", "qwenimage": "QwenImageAutoBlocks",
    "zimage": "ZImageAutoBlocks",
}  # fmt: skip


@cache
def parts(name: str) -> dict[str, Any]:
    return {key: part for key, part in tiny.build(name).components.items() if part is not None}


@cache
def decoder(name: str) -> PixelDecoder:
    return tiny.decoder_for(tiny.SPACE.get(name, name))


def pipeline(blocks: Any, name: str, **changes: Any) -> Any:
    pipe = blocks.init_pipeline()
    known = {key: part for key, part in (parts(name) | changes).items() if key in pipe._component_specs}
    pipe.update_components(**known)
    pipe.set_progress_bar_config(disable=True)
    if getattr(pipe, "guider", None) is not None:
        pipe.update_components(guider=diffusers.ClassifierFreeGuidance(guidance_scale=1.0))
    return pipe


def with_pid(name: str, **changes: Any) -> Any:
    blocks = getattr(diffusers, BLOCKS[name])()
    return pipeline(pid_blocks(blocks), name, pixel_decoder=decoder(name), **changes)


def arguments(name: str, **changes: Any) -> dict[str, Any]:
    call = tiny.arguments(name, **changes)
    return {key: value for key, value in call.items() if key not in ("true_cfg_scale", "guidance_scale")}


def image(height: int = tiny.HEIGHT) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, tiny.WIDTH, 3), np.uint8))


@pytest.mark.parametrize("name", BLOCKS)
def test_images_are_four_times_the_pipelines_and_of_the_same_latent(name: str) -> None:
    pipe = with_pid(name)
    call = arguments(name)
    out = pipe(**call, decode_options=DecodeOptions(seed=3), output=["images", "pid_latent"])
    (picture,), latent = out["images"], out["pid_latent"]
    assert picture.size == (4 * tiny.WIDTH, 4 * tiny.HEIGHT)
    assert (latent.sigma, latent.prompts, latent.seed) == (0.0, ("a cat",), 0)
    assert picture.info["pidecode"]["pipeline_num_steps"] == tiny.STEPS
    assert np.array_equal(np.asarray(picture), np.asarray(decoder(name).decode(latent, seed=3).image))
    own = pipeline(getattr(diffusers, BLOCKS[name])(), name)(**arguments(name, output_type="pt"), output="images")
    torch.testing.assert_close(vae_decode(pipe, latent), own * 2 - 1, rtol=0, atol=3e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_stopping_early_ends_the_diffusion_and_labels_the_noise(name: str) -> None:
    pipe = with_pid(name)
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    inputs: list[Any] = []
    hook = network.register_forward_pre_hook(lambda *_: inputs.append(1))
    try:
        out = pipe(**arguments(name), stop_after=3, output=["images", "pid_latent"])
    finally:
        hook.remove()
    assert len(inputs) == 3
    level = float(pipe.scheduler.sigmas[3])
    assert out["pid_latent"].sigma == pytest.approx(level / (level**2 + 1) ** 0.5 if name == "sdxl" else level)
    assert out["images"][0].info["pidecode"]["pipeline_num_steps"] == 3
    assert out["images"][0].info["pidecode"]["pipeline_num_steps_planned"] == tiny.STEPS
    # What the loop would have gone on with: the ordinary pipeline of the same parts, stopped there.
    ordinary = attach(tiny.build(name), decoder(name), stop_after=3)(**tiny.arguments(name), output_type="latent")
    torch.testing.assert_close(out["pid_latent"].tensor, ordinary.latents.tensor, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["flux", "sd3", "sdxl", "qwenimage", "zimage", "klein"])
def test_image_to_image(name: str) -> None:
    # klein edits by reference instead, of 64 pixels at least
    call = arguments(name, image=image(64)) if name == "klein" else arguments(name, image=image(), strength=0.5)
    out = with_pid(name)(**call, output=["images", "pid_latent"])
    assert out["images"][0].size == (4 * tiny.WIDTH, 4 * tiny.HEIGHT)
    assert out["images"][0].info["pidecode"]["pipeline_num_steps"] == (tiny.STEPS if name == "klein" else 2)


@pytest.mark.parametrize("name", ["sdxl", "qwenimage"])
def test_inpainting_keeps_the_noise_outside_the_mask_when_stopped(name: str) -> None:
    pipe, mask = with_pid(name), Image.new("L", (tiny.WIDTH, tiny.HEIGHT), 0)
    call = {"image": image(), "mask_image": mask, "strength": 1.0}
    out = pipe(**arguments(name, **call), stop_after=3, output="pid_latent")
    clean = pipe(**arguments(name, **call), output="pid_latent")
    # Nothing is painted: what is kept of the image holds the noise of its sigma, as the next step would need it.
    noise = out.tensor - (1 - out.sigma) * clean.tensor if name == "qwenimage" else out.tensor - clean.tensor
    assert 0.5 < float(noise.std()) / out.sigma < 1.5


EDITS = {
    "FluxKontextAutoBlocks": "flux", "QwenImageEditAutoBlocks": "qwenimage", "QwenImageEditPlusAutoBlocks": "qwenimage",
    "Flux2AutoBlocks": "flux2", "Flux2KleinAutoBlocks": "klein", "Flux2KleinBaseAutoBlocks": "klein",
}  # fmt: skip


@pytest.mark.parametrize("kind", EDITS)
def test_edits_of_an_image(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokens of the image that is edited are not the result's; whole and stopped, the latent is what the loop has.

    The text encoder block of Qwen-Image-Edit needs torchvision; its embeddings take its place.
    """
    area = encoders.calculate_dimensions  # Qwen-Image-Edit enlarges the image to a megapixel
    monkeypatch.setattr(encoders, "calculate_dimensions", lambda _area, ratio: area(64 * 64, ratio))
    base, qwen = EDITS[kind], kind.startswith("Qwen")
    call = arguments(base, image=image(64))
    if qwen:
        del call["max_sequence_length"]
        call |= {"prompt_embeds": torch.ones(1, 6, 16), "prompt_embeds_mask": torch.ones(1, 6).long()}
    if "Kontext" in kind:
        call |= {"max_area": tiny.HEIGHT * tiny.WIDTH, "_auto_resize": False}

    def made(pid: bool) -> Any:
        blocks = getattr(diffusers, kind)()
        if qwen:
            blocks.sub_blocks.pop("text_encoder")
        return pipeline(pid_blocks(blocks), base, pixel_decoder=decoder(base)) if pid else pipeline(blocks, base)

    def seeded(**changes: Any) -> dict[str, Any]:
        return {**call, "generator": torch.Generator().manual_seed(0), **changes}

    pipe = made(True)
    out = pipe(**seeded(), decode_options=DecodeOptions(seed=3), output=["images", "pid_latent"])
    assert out["images"][0].size == (4 * tiny.WIDTH, 4 * tiny.HEIGHT)
    assert (out["pid_latent"].sigma, out["pid_latent"].prompts) == (0.0, ("a cat",))
    plain = made(False)
    own = plain(**{k: v for k, v in seeded(output_type="pt").items() if k in plain.blocks.input_names}, output="images")
    torch.testing.assert_close(vae_decode(pipe, out["pid_latent"]), own * 2 - 1, rtol=0, atol=3e-5)
    inputs: list[Any] = []
    states: list[torch.Tensor] = []
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step", lambda *args, **keywords: _keep(states, step(*args, **keywords)))
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: inputs.append(1))
    try:
        early = pipe(**seeded(output_type="latent"), stop_after=3, output="images")
    finally:
        hook.remove()
    assert len(inputs) == 3
    assert early.sigma == pytest.approx(float(pipe.scheduler.sigmas[3]))
    wanted = to_latent(pipe, states[2], grid=(2, 4), sigma=early.sigma)
    torch.testing.assert_close(early.tensor, wanted.tensor)


def _keep(states: list[torch.Tensor], result: Any) -> Any:
    states.append(result[0].clone())
    return result


def test_an_edit_that_fills_a_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    area = encoders.calculate_dimensions
    monkeypatch.setattr(encoders, "calculate_dimensions", lambda _area, ratio: area(64 * 64, ratio))
    blocks = diffusers.QwenImageEditAutoBlocks()
    blocks.sub_blocks.pop("text_encoder")
    pipe = pipeline(pid_blocks(blocks), "qwenimage", pixel_decoder=decoder("qwenimage"))
    call = {"prompt_embeds": torch.ones(1, 6, 16), "prompt_embeds_mask": torch.ones(1, 6).long(), "height": 64}
    mask = Image.new("L", (tiny.WIDTH, 64), 255)
    call |= {"image": image(64), "mask_image": mask, "strength": 0.5}
    call = arguments("qwenimage", **call)
    del call["max_sequence_length"]
    assert pipe(**call, output="images")[0].size == (256, 256)
    with pytest.raises(SettingError, match="padding_mask_crop"):
        pipe(**call, padding_mask_crop=8)


def test_output_types_and_recommended_stop() -> None:
    pipe, call = with_pid("sd3"), {"decode_options": DecodeOptions(seed=1)}
    pt = pipe(**arguments("sd3", output_type="pt"), **call, output="images")
    array = pipe(**arguments("sd3", output_type="np"), **call, output="images")
    latent = pipe(**arguments("sd3", output_type="latent"), output="images")
    assert np.array_equal(array[0].transpose(2, 0, 1), pt[0].numpy())
    torch.testing.assert_close(pt, decoder("sd3").decode(latent, seed=1).tensor / 2 + 0.5)
    count = {"num_inference_steps": 14, "stop_after": "recommended"}
    early = pipe(**arguments("sd3", **count), output="images")[0]
    assert early.info["pidecode"]["pipeline_num_steps"] == 12  # 24 of 28


def test_a_text_to_image_pipeline_needs_no_vae() -> None:
    blocks = pid_blocks(diffusers.FluxAutoBlocks().get_workflow("text2image"))
    assert "vae" not in {spec.name for spec in blocks.expected_components}
    pipe = pipeline(blocks, "flux", pixel_decoder=decoder("flux"))
    assert pipe(**arguments("flux"), output="images")[0].size == (4 * tiny.WIDTH, 4 * tiny.HEIGHT)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "no decoder": ({"pixel_decoder": None}, {}, SettingError, "pixel_decoder is NoneType; give it a decoder"),
    "space": ({"pixel_decoder": "sd3"}, {}, LatentError, "works in space flux and tiny sd3 decodes sd3"),
    "output": ({}, {"output_type": "jpeg"}, SettingError, "output_type is 'jpeg'"),
    "stop": ({}, {"stop_after": 2.5}, SettingError, "stop_after is 2.5"),
    "options": ({}, {"decode_options": {"seed": 3}}, SettingError, "give pidecode.DecodeOptions"),
    "crop": ({}, {"padding_mask_crop": 8}, SettingError, "padding_mask_crop"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_decoded_is_refused_before_any_work(case: str) -> None:
    components, call, kind, words = REFUSED[case]
    if isinstance(components.get("pixel_decoder"), str):
        components = {"pixel_decoder": decoder("sd3")}
    pipe = with_pid("flux")
    pipe.update_components(**components)
    worked: list[Any] = []
    hook = pipe.text_encoder.register_forward_pre_hook(lambda *_: worked.append(1))
    try:
        with pytest.raises(kind, match=words):
            pipe(**arguments("flux"), **call)
    finally:
        hook.remove()
    assert worked == []


def test_steps_that_do_not_exist_or_leave_too_much_noise_are_refused_after_one_step() -> None:
    pipe = with_pid("flux")
    for step, words in ((9, "There is no step 9: this run has 4"), (1, "After step 1 of 4 the latent's sigma is 0.")):
        with pytest.raises(SettingError, match=words):
            pipe(**arguments("flux"), stop_after=step)


def test_blocks_of_other_models_and_parts_of_a_pipeline_are_refused() -> None:
    for name in ("Flux3AutoBlocks", "QwenImageLayeredAutoBlocks", "WanBlocks"):
        if hasattr(diffusers, name):
            with pytest.raises(SettingError, match="which PiD does not decode; known are flux, "):
                pid_blocks(getattr(diffusers, name)())
    with pytest.raises(SettingError, match="none named 'decode'"):
        pid_blocks(diffusers.FluxAutoBlocks().sub_blocks["denoise"])
    unchanged = diffusers.FluxAutoBlocks()
    pid_blocks(unchanged)
    assert type(unchanged.sub_blocks["decode"]).__name__ == "FluxDecodeStep"
    assert "check_decoder" not in diffusers.FluxAutoBlocks().sub_blocks


def test_attach_names_the_block() -> None:
    pipe = pipeline(diffusers.FluxAutoBlocks(), "flux")
    with pytest.raises(SettingError, match=r"is a modular pipeline.*pidecode.pid_blocks\(pipe.blocks\)"):
        attach(pipe, decoder("flux"))


def test_the_block_is_loaded_from_its_folder_as_custom_blocks_are(root: Any, monkeypatch: Any, tmp_path: Any) -> None:
    from diffusers.utils import dynamic_modules_utils

    monkeypatch.setattr(dynamic_modules_utils, "HF_MODULES_CACHE", str(tmp_path))
    block = diffusers.ModularPipelineBlocks.from_pretrained(str(root / "modular_block"), trust_remote_code=True)
    assert type(block) is PiDDecodeStep
    blocks = diffusers.FluxAutoBlocks()
    blocks.sub_blocks["decode"] = block
    pipe = pipeline(blocks, "flux", pixel_decoder=decoder("flux"))
    assert pipe(**arguments("flux"), output="images")[0].size == (4 * tiny.WIDTH, 4 * tiny.HEIGHT)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_lines_of_the_documentation_run(root: Any, monkeypatch: Any, tmp_path: Any) -> None:
    (text,) = [
        block.split("```")[0]
        for block in (root / "docs" / "diffusers.md").read_text(encoding="utf-8").split("```python\n")
        if "pid_blocks" in block.split("```")[0]
    ]
    tiny.build("flux").save_pretrained(tmp_path / "flux")
    monkeypatch.chdir(tmp_path)
    text = text.replace("black-forest-labs/FLUX.1-dev", str(tmp_path / "flux"))
    text = text.replace('stop_after="recommended"', "height=32, width=64, num_inference_steps=2")
    exec(text, {"pidecode": pidecode, "decoder": decoder("flux")})
    assert Image.open("lighthouse.png").size == (256, 128)


def test_every_supported_model_has_blocks_here() -> None:
    named = {getattr(diffusers, name)().model_name for name in (*BLOCKS.values(), *EDITS)}
    assert named == set(SUPPORTED_MODELS)
