# SPDX-License-Identifier: Apache-2.0
"""Every pipeline, end to end at tiny size: attached, stopped early, captured, and read from its own output."""

from __future__ import annotations

import inspect
import json
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import callbacks
from PIL import Image

import tiny_models
import tiny_pipelines as tiny
from pidecode import DecodeOptions, Latent, PixelDecoder, attach, latent_from_pipeline
from pidecode.encoders.text import PromptEmbedsCache, TextEncoder, export_prompt_embeds
from pidecode.errors import Cancelled, LatentError, SettingError
from pidecode.integrations.diffusers import AttachedPipeline, PipelineProgress, _offload_pipeline, capture_latents
from pidecode.integrations.pipeline_latents import (
    pipeline_space,
    recommended_stop_step,
    scheduler_parametrization,
    scheduler_sigma,
    vae_decode,
)
from pidecode.latents.latent import NormalizationWarning

# The latents of random networks do not have the statistics of images.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{NormalizationWarning.__module__}.NormalizationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
NAMES = tuple(tiny.PIPELINES)


BUILT: dict[str, Any] = {}


def pipeline(name: str) -> Any:
    if name not in BUILT:
        BUILT[name] = tiny.build(name)
    return BUILT[name]


@cache
def decoder(name: str) -> PixelDecoder:
    return tiny.decoder_for(tiny.SPACE.get(name, name))


@pytest.fixture(autouse=True)
def _as_found() -> Any:
    yield
    for pipe in BUILT.values():
        assert not (pipe.transformer if hasattr(pipe, "transformer") else pipe.unet)._forward_pre_hooks


@pytest.mark.parametrize("name", NAMES)
def test_images_are_four_times_the_pipelines_and_of_the_same_latent(name: str) -> None:
    pipe = pipeline(name)
    out = attach(pipe, decoder(name), options=DecodeOptions(seed=3))(**tiny.arguments(name))
    (image,) = out.images
    assert image.size == (4 * tiny.WIDTH, 4 * tiny.HEIGHT)
    assert out.denoiser_calls == tiny.STEPS
    assert (out.latents.prompts, out.latents.sigma, out.latents.seed) == (("a cat",), 0.0, 0)
    assert image.info["pidecode"]["prompt"] == "a cat"
    assert image.info["pidecode"]["pipeline_num_steps"] == tiny.STEPS
    again = decoder(name).decode(out.latents, seed=3).image
    assert np.array_equal(np.asarray(image), np.asarray(again))
    # The typed latent, denormalized and decoded, is the pipeline's own image: normalization and layout are right.
    with torch.inference_mode():
        own = pipe(**tiny.arguments(name, output_type="pt")).images
    torch.testing.assert_close(vae_decode(pipe, out.latents), own * 2 - 1, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_stopping_early_ends_the_diffusion_and_labels_the_noise(name: str) -> None:
    pipe = pipeline(name)
    whole = capture_latents(pipe, tiny.arguments(name), capture_steps=(3, 4))
    counted = []
    network = pipe.transformer if hasattr(pipe, "transformer") else pipe.unet
    hook = network.register_forward_hook(lambda *_: counted.append(1))
    try:
        out = attach(pipe, decoder(name), stop_after=3)(**tiny.arguments(name))
    finally:
        hook.remove()
    assert len(counted) == out.denoiser_calls == out.num_steps == 3
    assert torch.equal(out.latents.tensor, whole.intermediate[3].tensor)
    level = float(pipe.scheduler.sigmas[3])
    wanted = level / (level**2 + 1) ** 0.5 if name == "sdxl" else level
    assert out.latents.sigma == pytest.approx(wanted, abs=1e-6)
    assert whole.intermediate[3].sigma == out.latents.sigma
    assert whole.intermediate[4].sigma == 0.0
    assert torch.equal(whole.intermediate[4].tensor, whole.latent.tensor)
    assert out.images[0].info["pidecode"]["sigma"] == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_a_pipelines_own_latents_are_read_whatever_their_form(name: str) -> None:
    pipe = pipeline(name)
    with torch.inference_mode():
        out = pipe(**tiny.arguments(name, output_type="latent"))
    latent = latent_from_pipeline(pipe, out, height=tiny.HEIGHT, width=tiny.WIDTH, prompt="a cat")
    typed = capture_latents(pipe, tiny.arguments(name)).latent
    torch.testing.assert_close(latent.tensor, typed.tensor, rtol=1e-4, atol=1e-4)  # klein's came back from raw
    assert (latent.space, latent.sigma, latent.prompts) == (typed.space, 0.0, ("a cat",))

    def stop(pipe: Any, index: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = index == 2
        return given

    with torch.inference_mode():
        out = pipe(**tiny.arguments(name, output_type="latent", callback_on_step_end=stop))
    early = latent_from_pipeline(pipe, out, height=tiny.HEIGHT, width=tiny.WIDTH)
    stopped = capture_latents(pipe, tiny.arguments(name), stop_after=3).latent
    torch.testing.assert_close(early.tensor, stopped.tensor, rtol=1e-4, atol=1e-4)
    assert early.sigma == stopped.sigma


def test_packed_latents_without_a_size_are_refused_unless_the_default_fits() -> None:
    pipe = pipeline("flux")
    with torch.inference_mode():
        out = pipe(**tiny.arguments("flux", output_type="latent"))
    with pytest.raises(LatentError, match="Give the height and width"):
        latent_from_pipeline(pipe, out)
    with pytest.raises(LatentError, match='call it with output_type="latent"'):
        latent_from_pipeline(pipe, [Image.new("RGB", (8, 8))])
    side = pipe.default_sample_size * pipe.vae_scale_factor // 16
    square = torch.zeros(1, side * side, 64)
    assert latent_from_pipeline(pipe, square).grid == (2 * side, 2 * side)


def test_batches_keep_prompt_and_image_together() -> None:
    pipe = attach(pipeline("zimage"), decoder("zimage"))
    out = pipe(**tiny.arguments("zimage", prompt=["a cat", "a dog"], num_images_per_prompt=2))
    assert len(out.images) == 4
    assert out.latents.prompts == ("a cat", "a cat", "a dog", "a dog")
    assert [image.info["pidecode"]["seed"] for image in out.images] == [0, 1, 2, 3]


@pytest.mark.parametrize("name", ["klein", "sd3"])
def test_the_prompt_may_come_first_whatever_the_pipeline_expects_there(name: str) -> None:
    call = tiny.arguments(name)
    assert attach(pipeline(name), decoder(name))(call.pop("prompt"), **call).latents.prompts == ("a cat",)


def test_a_bfloat16_pipeline_gives_float32_latents_near_its_own() -> None:
    pipe = tiny.build("flux").to(torch.bfloat16)
    out = attach(pipe, decoder("flux"), capture_steps=(3,))(**tiny.arguments("flux"))
    assert out.latents.tensor.dtype == out.captured[3].tensor.dtype == torch.float32
    with torch.inference_mode():
        own = pipe(**tiny.arguments("flux", output_type="pt")).images.float() * 2 - 1
    assert float((vae_decode(pipe, out.latents) - own).abs().mean()) < 0.02


def test_latents_and_prompts_of_several_runs_go_into_one_call() -> None:
    runs = [
        capture_latents(pipeline("sdxl"), tiny.arguments("sdxl", prompt=text), stop_after=stop).latent
        for text, stop in (("a cat", 3), ("a dog", None))
    ]
    prompted = tiny.decoder_for("sdxl", text=True)
    states = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(3))
    batch = Latent.cat(runs)
    assert batch.prompts == ("a cat", "a dog")
    together = prompted.decode(batch, prompt_embeds=states, seed=[5, 6]).tensor
    for index in range(2):
        alone = prompted.decode(runs[index], prompt_embeds=states[index : index + 1], seed=[5, 6][index]).tensor
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-3, atol=1e-3)


def test_all_output_types_and_the_tuple() -> None:
    pipe = attach(pipeline("sd3"), decoder("sd3"), options=DecodeOptions(seed=1))
    pil = pipe(**tiny.arguments("sd3")).images[0]
    pt = pipe(**tiny.arguments("sd3", output_type="pt")).images
    array = pipe(**tiny.arguments("sd3", output_type="np")).images
    (latent,) = pipe(**tiny.arguments("sd3", output_type="latent", return_dict=False))
    assert pt.shape == (1, 3, 128, 256)
    assert array.shape == (1, 128, 256, 3)
    assert 0 <= float(pt.min()) <= float(pt.max()) <= 1
    assert np.array_equal(array[0].transpose(2, 0, 1), pt[0].numpy())
    assert np.abs(np.asarray(pil).astype(float) - array[0] * 255).max() <= 0.51
    assert isinstance(latent, Latent)
    assert pipe(**tiny.arguments("sd3"))[0][0].size == pil.size


@pytest.mark.parametrize("kind", ["flux_img2img", "flux_kontext", "flux_fill"])
def test_relatives_that_share_the_path(kind: str) -> None:
    pipe = tiny.build(kind)
    given = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 64, 3), np.uint8))
    changes: dict[str, Any] = {"image": given}
    if kind == "flux_img2img":
        changes["strength"] = 0.5
    if kind == "flux_fill":
        changes["mask_image"] = Image.new("L", (64, 32), 255)
    if kind == "flux_kontext":  # it would enlarge the image to a megapixel
        changes |= {"max_area": 32 * 64, "_auto_resize": False}
    out = attach(pipe, decoder("flux"))(**tiny.arguments("flux", **changes))
    assert out.latents.grid == (4, 8)
    assert out.images[0].size == (256, 128)
    assert out.num_steps == (2 if kind == "flux_img2img" else tiny.STEPS)


def test_progress_and_cancelling_leave_the_pipeline_usable() -> None:
    reports: list[PipelineProgress] = []
    pipe = attach(pipeline("sdxl"), decoder("sdxl"), stop_after=2, progress_callback=reports.append)
    wanted = pipe(**tiny.arguments("sdxl")).latents
    assert reports[:2] == [PipelineProgress("diffusion", 1, 2), PipelineProgress("diffusion", 2, 2)]
    assert reports[2:] == [PipelineProgress("decoding", step, 4) for step in (1, 2, 3, 4)]

    def refuse(progress: PipelineProgress) -> None:
        if progress.step == 2:
            raise Cancelled("enough")

    for stage in ("diffusion", "decoding"):
        with pytest.raises(Cancelled):
            pipe(
                **tiny.arguments("sdxl"),
                progress_callback=lambda progress, stage=stage: refuse(progress) if progress.stage == stage else None,
            )
    assert torch.equal(pipe(**tiny.arguments("sdxl")).latents.tensor, wanted.tensor)


def test_the_callers_own_callback_still_runs_and_may_change_latents() -> None:
    seen: list[int] = []

    def halve(_pipe: Any, index: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(index)
        return {"latents": given["latents"] * (0.5 if index == 3 else 1)}

    plain = capture_latents(pipeline("flux"), tiny.arguments("flux")).latent
    halved = capture_latents(pipeline("flux"), tiny.arguments("flux", callback_on_step_end=halve)).latent
    assert seen == [0, 1, 2, 3]
    torch.testing.assert_close(halved.tensor, plain.tensor / 2)


def test_another_pipeline_can_be_made_of_an_attached_one() -> None:
    """Diffusers' from_pipe takes its components; what it makes is an ordinary pipeline, to be attached again."""
    pipe = attach(pipeline("flux"), decoder("flux"))
    assert isinstance(pipe, AttachedPipeline)
    assert isinstance(pipe, diffusers.FluxPipeline)
    for made in (diffusers.AutoPipelineForImage2Image.from_pipe(pipe), diffusers.FluxImg2ImgPipeline.from_pipe(pipe)):
        assert type(made) is diffusers.FluxImg2ImgPipeline
        assert made.transformer is pipe.transformer
        assert isinstance(attach(made, decoder("flux")), AttachedPipeline)


def test_the_color_fix_corrects_against_the_pipelines_own_vae() -> None:
    """Its VAE is at hand, so the decoder needs no encoder of its own; a noisy latent has no image to correct by."""
    pipe = attach(pipeline("sd3"), decoder("sd3"), options=DecodeOptions(color_fix="auto"))
    out = pipe(**tiny.arguments("sd3"))
    own = vae_decode(pipeline("sd3"), out.latents)
    wanted = decoder("sd3").decode(out.latents, color_fix="auto", reference=own)
    assert out.images[0].info["pidecode"]["color_drift"] == wanted.metadata[0]["color_drift"]
    with pytest.raises(SettingError, match="There is noise in this latent"):
        pipe(**tiny.arguments("sd3"), stop_after=3)


class _Halve(callbacks.PipelineCallback):
    """A callback object in diffusers' form, which names its tensors itself."""

    tensor_inputs = ("latents",)

    def callback_fn(self, _pipe: Any, index: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        return given | {"latents": given["latents"] * (0.5 if index == 3 else 1)}


@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_callback_objects_run_as_without_us(several: bool) -> None:
    """SDXL's cutoff of guidance needs three tensors beside the latents, and must not get those."""
    cutoff = callbacks.SDXLCFGCutoffCallback(cutoff_step_ratio=None, cutoff_step_index=1)
    callback = callbacks.MultiPipelineCallbacks([cutoff, _Halve()]) if several else cutoff

    def call(**changes: Any) -> dict[str, Any]:
        return tiny.arguments("sdxl", guidance_scale=5.0, **changes)

    wanted = pipeline("sdxl")(**call(callback_on_step_end=callback, output_type="latent")).images
    found = attach(pipeline("sdxl"), decoder("sdxl"))(**call(callback_on_step_end=callback))
    torch.testing.assert_close(found.latents.tensor, wanted.float())
    assert not torch.equal(wanted, pipeline("sdxl")(**call(output_type="latent")).images)


def test_a_function_gets_the_tensors_it_asked_for_alone() -> None:
    seen: list[set[str]] = []

    def note(_pipe: Any, _index: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(set(given))
        return {}

    names = ["prompt_embeds"]
    call = tiny.arguments("sdxl", callback_on_step_end=note, callback_on_step_end_tensor_inputs=names)
    attach(pipeline("sdxl"), decoder("sdxl"))(**call)
    assert seen == [{"prompt_embeds"}] * tiny.STEPS


def test_an_interrupt_of_the_callers_own_above_the_trained_noise_is_refused() -> None:
    def interrupt(pipe: Any, _index: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return given

    pipe = attach(pipeline("flux"), decoder("flux"))
    with pytest.raises(SettingError, match="interrupted after step 1 of 4, where sigma is 0.*trained up to 0.8"):
        pipe(**tiny.arguments("flux", callback_on_step_end=interrupt))
    latents = pipe(**tiny.arguments("flux", callback_on_step_end=interrupt), output_type="latent").latents
    assert latents.sigma > 0.8


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Flux3ModularPipeline", "does not work in a latent space that PiD decodes"),
        ("QwenImageModularPipeline", "is a modular pipeline"),
        ("FluxModularPipeline", "is a modular pipeline"),
        ("Flux3Pipeline", "does not work in a latent space that PiD decodes"),
        ("QwenImage21Pipeline", "does not work in a latent space that PiD decodes"),
    ],
)
def test_modular_pipelines_and_later_families_are_refused_before_any_work(name: str, words: str) -> None:
    kind = getattr(diffusers, name, None) or type(name, (), {})
    pipe = object.__new__(kind)
    with pytest.raises(SettingError, match=words):
        attach(pipe, decoder("flux"))


@pytest.mark.parametrize(
    ("name", "vae", "space"),
    [
        ("HiDreamImagePipeline", "flux", "flux"),
        ("Lumina2Pipeline", "flux", "flux"),
        ("OvisImagePipeline", "flux", "flux"),
        ("KolorsPipeline", "sdxl", "sdxl"),
        ("ErnieImagePipeline", "flux2", "flux2"),
        ("Krea2Pipeline", "qwenimage", "qwenimage"),
        ("NotYetWrittenPipeline", "sd3", "sd3"),
        ("Ideogram4Pipeline", "flux2", None),  # a token's channels are in another order
        ("Flux3Pipeline", "flux2", None),
        ("BriaFibo2Pipeline", "flux2", None),  # its latents are normalized and not patchified
        ("LongCatImagePipeline", "flux", "flux"),
        ("QwenImageLayeredPipeline", "qwenimage", None),
        ("NotYetWrittenPipeline", "other scale", None),
        ("NotYetWrittenPipeline", "other statistics", None),
    ],
)
def test_a_pipeline_that_is_not_listed_is_known_by_its_vae(name: str, vae: str, space: str | None) -> None:
    made = tiny_models.autoencoder({"other scale": "flux", "other statistics": "qwenimage"}.get(vae, vae))
    if vae == "other scale":
        made.register_to_config(scaling_factor=0.5)
    if vae == "other statistics":
        made.register_to_config(latents_mean=[0.0] * 16)
    pipe = object.__new__(type(name, (), {}))
    pipe.vae = made
    if space is not None:
        assert pipeline_space(pipe).name == space
        return
    with pytest.raises(SettingError, match="does not work in a latent space that PiD decodes"):
        pipeline_space(pipe)


def test_pipelines_that_cannot_be_followed_are_refused_at_once() -> None:
    parts = pipeline("sdxl").components
    adapter = diffusers.T2IAdapter(in_channels=3, channels=[8, 8], num_res_blocks=1, downscale_factor=8)
    wanted = inspect.signature(diffusers.StableDiffusionXLAdapterPipeline.__init__).parameters
    known = {key: part for key, part in parts.items() if key in wanted}
    pipe = diffusers.StableDiffusionXLAdapterPipeline(adapter=adapter, **known)
    with pytest.raises(SettingError, match="StableDiffusionXLAdapterPipeline takes no callback_on_step_end"):
        attach(pipe, decoder("sdxl"))
    inpaint = diffusers.FluxInpaintPipeline(**tiny.flux_parts())
    with pytest.raises(SettingError, match="pastes a crop"):
        attach(inpaint, decoder("flux"))(**tiny.arguments("flux"), padding_mask_crop=8)


def test_everything_else_is_the_pipelines_own(tmp_path: Path) -> None:
    inner = pipeline("sdxl")
    pipe = attach(inner, decoder("sdxl"))
    assert isinstance(pipe.to("cpu"), AttachedPipeline)
    assert pipe.vae is inner.vae
    before = inner.scheduler
    pipe.scheduler = diffusers.EulerAncestralDiscreteScheduler.from_config(before.config)
    try:
        assert type(inner.scheduler).__name__ == "EulerAncestralDiscreteScheduler"
        assert 0 < attach(inner, decoder("sdxl"), stop_after=3)(**tiny.arguments("sdxl")).latents.sigma < 1
    finally:
        pipe.scheduler = before
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLPipeline"
    assert index["vae"] == ["diffusers", "AutoencoderKL"]
    assert pipe.detach() is inner
    with pytest.raises(SettingError, match="attached already"):
        attach(pipe, decoder("sdxl"))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_sequentially_offloaded_pipeline_is_not_moved() -> None:
    """Diffusers refuses to move one; its layers leave the device by themselves."""
    pipe = tiny.build("flux")
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert _offload_pipeline(pipe) is None
    assert pipe.device.type == "meta"


def test_offloaded_networks_leave_the_device_before_decoding_and_after_a_cancelled_run() -> None:
    pipe = tiny.build("sd3")
    freed: list[str] = []
    free = pipe.maybe_free_model_hooks
    pipe.maybe_free_model_hooks = lambda: (freed.append("freed"), free())[1]

    def note(progress: PipelineProgress) -> None:
        if progress.stage == "decoding" and progress.step == 1:
            freed.append("decoding")

    attach(pipe, decoder("sd3"), progress_callback=note)(**tiny.arguments("sd3"))
    assert freed == ["freed", "decoding"]

    def stop(_progress: PipelineProgress) -> None:
        raise Cancelled("enough")

    with pytest.raises(Cancelled):
        attach(pipe, decoder("sd3"), progress_callback=stop)(**tiny.arguments("sd3"))
    assert freed == ["freed", "decoding", "freed"]


def test_prompts_come_from_the_call_or_are_asked_for_before_the_long_part(tmp_path: Path) -> None:
    prompted = tiny.decoder_for("sdxl", text=True)
    inner = pipeline("sdxl")
    states = torch.randn(1, 10, 16, generator=torch.Generator().manual_seed(2))
    embeddings = inner.encode_prompt("a cat", do_classifier_free_guidance=False)
    ready = dict(prompt=None, prompt_embeds=embeddings[0], pooled_prompt_embeds=embeddings[2])
    reports: list[PipelineProgress] = []
    pipe = attach(inner, prompted, progress_callback=reports.append)
    with pytest.raises(SettingError, match="this call has none; pass decode_options="):
        pipe(**tiny.arguments("sdxl", **ready))
    assert reports == []
    out = pipe(**tiny.arguments("sdxl", **ready), decode_options=DecodeOptions(prompt="a cat", prompt_embeds=states))
    # A file of states does as well, each image taking its own prompt's.
    file = tmp_path / "states.safetensors"
    cache = PromptEmbedsCache(tmp_path)
    encoder = TextEncoder(states=cache)
    for index, text in enumerate(("a dog", "a cat")):
        cache.put(text, encoder.options.identity(), states[0] + index - 1)
    export_prompt_embeds(file, ["a dog", "a cat"], encoder)
    two = attach(pipeline("sdxl"), prompted)(
        **tiny.arguments("sdxl", prompt=["a dog", "a cat"]), decode_options=DecodeOptions(prompt_embeds=str(file))
    )
    assert [image.info["pidecode"]["prompt"] for image in two.images] == ["a dog", "a cat"]
    for index, image in enumerate(two.images):
        own = prompted.decode(two.latents[index], prompt_embeds=states + index - 1, seed=index).image
        assert np.array_equal(np.asarray(image), np.asarray(own))
    assert out.latents.prompts == ("a cat",)


def test_what_cannot_be_done_is_refused_with_the_fix() -> None:
    flux, sdxl = pipeline("flux"), pipeline("sdxl")
    with pytest.raises(LatentError, match="works in space flux and tiny sdxl decodes sdxl"):
        attach(flux, decoder("sdxl"))
    with pytest.raises(SettingError, match="does not work in a latent space that PiD decodes"):
        attach(object(), decoder("flux"))
    with pytest.raises(SettingError, match="options are dict; give pidecode.DecodeOptions"):
        attach(flux, decoder("flux"), options={"seed": 1})  # type: ignore[arg-type]
    for options, words in (
        (DecodeOptions(guidance_scale=2.0), "guidance_scale acts on teacher decoders only"),
        (DecodeOptions(prompt="a cat"), "reads no text, so prompt and prompt_embeds cannot act"),
    ):
        with pytest.raises(SettingError, match=words):
            attach(flux, decoder("flux"), options=options)
    pipe = attach(flux, decoder("flux"))
    with pytest.raises(SettingError, match="There is no step 9: this run has 4"):
        pipe(**tiny.arguments("flux"), stop_after=9)
    with pytest.raises(SettingError, match="trained up to 0.8. Stop after step 2 or later"):
        pipe(**tiny.arguments("flux"), stop_after=1)
    with pytest.raises(SettingError, match="or 'recommended'"):
        pipe(**tiny.arguments("flux"), stop_after="late")
    with pytest.raises(SettingError, match="output_type is 'jpg'"):
        pipe(**tiny.arguments("flux", output_type="jpg"))
    with pytest.raises(SettingError, match="unexpected keyword argument 'promt'"):
        pipe(promt="a cat")
    before = sdxl.scheduler
    sdxl.scheduler = diffusers.PNDMScheduler.from_config(before.config)
    try:
        with pytest.raises(SettingError, match="noise level of PNDMScheduler's unfinished latents is not known"):
            attach(sdxl, decoder("sdxl"), stop_after=2)(**tiny.arguments("sdxl"))
    finally:
        sdxl.scheduler = before


def test_the_recommended_step_follows_the_registry() -> None:
    assert recommended_stop_step(pipeline("flux"), 28) == 24
    assert recommended_stop_step(pipeline("sdxl"), 30) == 26
    assert recommended_stop_step(pipeline("qwenimage"), 50) == 44
    assert recommended_stop_step(pipeline("zimage"), 50) == 46
    assert recommended_stop_step(pipeline("klein"), 4) == 4
    assert recommended_stop_step(pipeline("sd3"), 14) == 12
    for name, steps, stop in (("FluxKontext", 28, 24), ("ZImageImg2Img", 50, 46), ("Flux2KleinKV", 4, 4)):
        assert recommended_stop_step(object.__new__(getattr(diffusers, f"{name}Pipeline")), steps) == stop
    with pytest.raises(SettingError, match="No early stop is recommended for ChromaPipeline"):
        recommended_stop_step(object.__new__(diffusers.ChromaPipeline), 28)


@pytest.mark.parametrize("kind", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
def test_sdxl_schedulers_agree_in_the_variance_preserving_parametrization(kind: str) -> None:
    """A clean latent noised by the scheduler itself, read as after a step, has the network's noise parametrization."""
    pipe = pipeline("sdxl")
    before = pipe.scheduler
    scheduler = getattr(diffusers, kind).from_config(before.config)
    pipe.scheduler = scheduler
    try:
        scheduler.set_timesteps(10)
        generator = torch.Generator().manual_seed(4)
        clean, noise = (torch.randn(1, 4, 4, 4, generator=generator) for _ in range(2))
        mixed = scheduler.add_noise(clean, noise, scheduler.timesteps[6:7])
        scheduler._step_index = 6
        assert scheduler_parametrization(scheduler, pipeline_space(pipe)) in ("euler", "variance_preserving")
        assert scheduler_sigma(scheduler) == float(scheduler.sigmas[6])
        latent = latent_from_pipeline(pipe, mixed)
        signal = scheduler.alphas_cumprod[int(scheduler.timesteps[6])]
        torch.testing.assert_close(
            latent.tensor, signal.sqrt() * clean + (1 - signal).sqrt() * noise, rtol=1e-3, atol=1e-3
        )
        assert float(latent.sigma) == pytest.approx(float((1 - signal).sqrt()), abs=1e-3)
    finally:
        pipe.scheduler = before
