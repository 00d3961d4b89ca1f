# SPDX-License-Identifier: Apache-2.0
"""The ComfyUI nodes: schemas, normalization of every family, early stop, prompts, previews and the interrupt."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from comfyui_kit import (
    EVERY,
    FLUX2,
    ROOT,
    as_comfy_has_it,
    imported_comfyui,
    latent_of,
    model_of,
    needs_double,
    network,
    small_decoder,
)
from pidecode import DecodeOptions, PixelDecoder
from pidecode.encoders.text import TextEncoder
from pidecode.errors import CheckpointError, DoesNotFitError, LatentError, SettingError
from pidecode.integrations import comfyui_latents
from pidecode.latents.latent import Latent
from pidecode.options import option_infos
from pidecode.registry.configs import debug_config
from pidecode.registry.spaces import SPACES
from pidecode.weights.metadata import CheckpointMetadata


@pytest.fixture(scope="module", name="comfy")
def _comfy() -> Iterator[SimpleNamespace]:
    with imported_comfyui() as modules:
        yield modules


@pytest.fixture(name="decoder")
def _decoder() -> PixelDecoder:
    return small_decoder()


def test_the_schemas_are_as_published(comfy: SimpleNamespace) -> None:
    nodes = asyncio.run(asyncio.run(comfy.nodes.comfy_entrypoint()).get_node_list())
    schemas = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in nodes}
    names = ("LoadDecoder", "Decode", "Upscale", "EarlyStop", "Conditioning")
    assert list(schemas) == [f"Pidecode{name}" for name in names]
    inputs = [(entry.id, str(entry.io_type), entry.optional) for entry in schemas["PidecodeDecode"].inputs]
    assert inputs == [
        ("decoder", "PIDECODE_DECODER", False), ("samples", "LATENT", False), ("seed", "INT", False),
        ("num_steps", "INT", True), ("sampler", "COMBO", True), ("sigma", "FLOAT", True),
        ("guidance_scale", "FLOAT", True), ("prompt", "STRING", True), ("color_fix", "COMBO", True),
        ("memory", "COMBO", True), ("conditioning", "CONDITIONING", True), ("latent_sigma", "FLOAT", True),
        ("model", "MODEL", True), ("vae", "VAE", True),
    ]  # fmt: skip
    for node, command in (("PidecodeDecode", "decode"), ("PidecodeUpscale", "upscale")):
        offered = {entry.id for entry in schemas[node].inputs}
        assert set(option_infos(command=command, interface="comfyui")) <= offered
    assert [str(entry.io_type) for entry in schemas["PidecodeEarlyStop"].outputs] == ["SIGMAS", "FLOAT"]
    for schema in schemas.values():
        assert schema.display_name.endswith("(pidecode)")
        assert schema.description.endswith(".")


@pytest.mark.parametrize("space", EVERY)
def test_latents_of_every_family_arrive_normalized(comfy: SimpleNamespace, space: str) -> None:
    z = latent_of(space)
    samples = {"samples": as_comfy_has_it(z, space)}
    with_model = comfyui_latents.to_latent(samples, SPACES[space], model=model_of(comfy, space))
    alone = comfyui_latents.to_latent(samples, SPACES[space])
    assert with_model.space == alone.space == space
    assert torch.allclose(with_model.tensor, z, atol=1e-4)
    assert torch.allclose(alone.tensor, z, atol=1e-4)


@pytest.mark.parametrize("space", EVERY)
def test_a_sampler_stopped_early_hands_over_its_state(comfy: SimpleNamespace, space: str) -> None:
    model, z, sigma = model_of(comfy, space), latent_of(space), 0.3
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    sampling = model.get_model_object("model_sampling")
    state = sampling.noise_scaling(torch.tensor([sigma]), noise.clone(), z)  # as a sampler holds it at that sigma
    leaving = sampling.inverse_noise_scaling(torch.tensor([sigma]), state)  # as ComfyUI lets it out
    latent = comfyui_latents.to_latent(
        {"samples": as_comfy_has_it(leaving, space)}, SPACES[space], model=model, sigma=sigma
    )
    if space == "sdxl":
        size = (1 + sigma**2) ** 0.5
        assert torch.allclose(latent.tensor, (z + sigma * noise) / size, atol=1e-4)
        assert latent.sigma == pytest.approx(sigma / size)
    else:
        assert torch.allclose(latent.tensor, (1 - sigma) * z + sigma * noise, atol=1e-4)
        assert latent.sigma == pytest.approx(sigma)


def test_what_does_not_go_together_is_said(comfy: SimpleNamespace) -> None:
    flux, sd3 = SPACES["flux"], model_of(comfy, "sd3")
    samples = {"samples": as_comfy_has_it(latent_of("flux"), "flux")}
    with pytest.raises(SettingError, match="connect the MODEL that made it"):
        comfyui_latents.to_latent(samples, flux, sigma=0.1)
    with pytest.raises(SettingError, match="decoder is for space flux, and the connected MODEL works in sd3"):
        comfyui_latents.to_latent(samples, flux, model=sd3)
    with pytest.raises(SettingError, match="stops between 0 and 1"):
        comfyui_latents.to_latent(samples, flux, model=model_of(comfy, "flux"), sigma=1.5)
    with pytest.raises(LatentError, match="a video of 3 frames"):
        comfyui_latents.to_latent({"samples": torch.zeros(1, 16, 3, 4, 4)}, SPACES["qwenimage"])
    other = SimpleNamespace(model=SimpleNamespace(latent_format=comfy.formats.Mochi()))
    with pytest.raises(SettingError, match="latent format Mochi, for which there is no decoder"):
        comfyui_latents.model_space(other)


def test_early_stop_cuts_where_it_is_recommended_or_told(comfy: SimpleNamespace) -> None:
    sigmas, model = torch.linspace(1, 0, 29), model_of(comfy, "flux")
    cut, sigma = comfy.nodes.EarlyStopNode.execute(sigmas, model).result
    assert len(cut) == 25
    assert sigma == pytest.approx(float(sigmas[24])) == pytest.approx(float(cut[-1]))
    cut, sigma = comfy.nodes.EarlyStopNode.execute(sigmas, model, 0).result
    assert (len(cut), sigma) == (29, 0.0)
    with pytest.raises(SettingError, match="steps_left is 28, and there are 28 steps; leave 0 to 27"):
        comfy.nodes.EarlyStopNode.execute(sigmas, model, 28)
    with pytest.raises(SettingError, match="no sigmas to cut"):
        comfy.nodes.EarlyStopNode.execute(torch.zeros(1), model)


@needs_double
def test_early_stop_checks_before_sampling_what_it_is_told(
    comfy: SimpleNamespace, decoder: PixelDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the decoder and the empty latent connected: its space, noise and memory, before the diffusion."""
    execute, sigmas = comfy.nodes.EarlyStopNode.execute, torch.linspace(1, 0, 21)
    model, loaded = model_of(comfy, "flux2"), comfy.nodes.manage(decoder)
    empty = {"samples": torch.zeros(1, 4, 128, 128), "downscale_ratio_spatial": 8}  # core's for all models
    assert execute(sigmas, model, 5, loaded, empty).result[1] == pytest.approx(0.25)
    with pytest.raises(SettingError, match="The decoder is for space flux2, and the connected MODEL works in flux"):
        execute(sigmas, model_of(comfy, "flux"), 5, loaded)
    with pytest.raises(SettingError, match="connect the decoder, or disconnect"):
        execute(sigmas, model, 5, None, empty)
    tiny = comfy.nodes.manage(PixelDecoder.from_pretrained("tiny", device="cpu", dtype=torch.float32))
    with pytest.raises(SettingError, match="noise level is 0.45; PiD was trained up to 0.4. Set steps_left to 8"):
        execute(sigmas, model, 9, tiny, empty)
    monkeypatch.setattr(comfy.management, "total_memory", 64 << 20)
    with pytest.raises(DoesNotFitError, match="A result of 4096x4096 pixels needs about .* Make a smaller image"):
        execute(sigmas, model, 5, loaded, empty)
    with pytest.raises(DoesNotFitError, match="A result of 4096x4096"):
        execute(sigmas, model, 2, tiny, empty)
    assert execute(sigmas, model, 5, loaded).result[1] == pytest.approx(0.25)


def test_decoding_gives_images_and_previews(comfy: SimpleNamespace, decoder: PixelDecoder) -> None:
    seen: list[tuple[Any, ...]] = []
    comfy.utils.set_progress_bar_global_hook(
        lambda value, total, preview, node_id=None: seen.append((value, total, preview and preview[1].size))
    )
    z = latent_of("flux2")[:, :, :1, :2]
    (image,) = comfy.nodes.DecodeNode.execute(comfy.nodes.manage(decoder), {"samples": z}, seed=5).result
    comfy.utils.set_progress_bar_global_hook(None)
    assert image.shape == (2, 64, 128, 3)
    assert image.dtype == torch.float32
    assert 0 <= float(image.min()) <= float(image.max()) <= 1
    expected = decoder.decode(Latent(z, "flux2"), seed=5).tensor
    assert isinstance(expected, Tensor)
    assert torch.allclose(image, (expected / 2 + 0.5).movedim(1, -1), atol=1e-5)
    done = [entry[0] for entry in seen]
    assert done[0] == 0
    assert done == sorted(done)
    assert {entry[1] for entry in seen} == {2000}
    assert {entry[2] for entry in seen} == {None, (128, 64)}


def test_cancel_is_heeded_at_the_next_step(comfy: SimpleNamespace, decoder: PixelDecoder) -> None:
    comfy.management.interrupt_current_processing(True)
    with pytest.raises(comfy.management.InterruptProcessingException):
        comfy.nodes.DecodeNode.execute(comfy.nodes.manage(decoder), {"samples": latent_of("flux2")}, seed=0)


def test_enlarging_takes_and_gives_images(comfy: SimpleNamespace, decoder: PixelDecoder) -> None:
    image = torch.rand(2, 20, 33, 3)
    large, _ = comfy.nodes.UpscaleNode.execute(comfy.nodes.manage(decoder), image, seed=0, num_steps=1).result
    assert large.shape == (2, 80, 132, 3)
    stronger, _ = comfy.nodes.UpscaleNode.execute(
        comfy.nodes.manage(decoder), image, seed=0, num_steps=1, sigma=0.5
    ).result
    assert not torch.equal(large, stronger)
    transparent = torch.cat([image, torch.zeros(2, 20, 33, 1)], dim=-1)
    assert torch.equal(comfyui_latents.tensor_from_image(transparent), comfyui_latents.tensor_from_image(image))
    with pytest.raises(SettingError, match=r"An IMAGE is \[B, H, W, 3\]"):
        comfyui_latents.tensor_from_image(torch.zeros(20, 33, 3))


def test_widgets_left_at_their_default_set_no_option(comfy: SimpleNamespace, decoder: PixelDecoder) -> None:
    for command, node in (("decode", comfy.nodes.DecodeNode), ("upscale", comfy.nodes.UpscaleNode)):
        entries = {entry.id: entry for entry in node.GET_SCHEMA().inputs}
        names = option_infos(command=command, interface="comfyui")
        values = {name: value_of(entries[name], "default") for name in names}
        assert comfy.nodes._decode_options(values, command, decoder) == DecodeOptions(seed=0)
    values |= {"seed": 7, "num_steps": 2, "sampler": "ode", "sigma": 0.25, "color_fix": "fine", "prompt": " a cat "}
    wanted = DecodeOptions(seed=7, num_steps=2, sampler="ode", sigma=0.25, color_fix="fine", prompt="a cat")
    assert comfy.nodes._decode_options(values, "upscale", decoder) == wanted
    assert comfy.nodes._decode_options(values | {"fidelity": 0.0}, "upscale", decoder).fidelity == 0


def value_of(entry: Any, name: str) -> Any:
    return entry.settings[name] if hasattr(entry, "settings") else getattr(entry, name)


def test_a_feed_forward_decoder_decodes_whatever_the_seed_widget_holds(comfy: SimpleNamespace) -> None:
    tiny = PixelDecoder.from_pretrained("tiny", device="cpu", dtype=torch.float32)
    samples = {"samples": latent_of("flux2")[:1]}
    (first,) = comfy.nodes.DecodeNode.execute(comfy.nodes.manage(tiny), samples, seed=1).result
    (second,) = comfy.nodes.DecodeNode.execute(comfy.nodes.manage(tiny), samples, seed=2).result
    assert first.shape == (1, 256, 384, 3)
    assert torch.equal(first, second)
    with pytest.raises(SettingError, match="num_steps acts on student decoders and teacher decoders only"):
        comfy.nodes.DecodeNode.execute(comfy.nodes.manage(tiny), samples, seed=1, num_steps=2)


def test_prompts_come_as_text_or_as_gemmas_states(comfy: SimpleNamespace, decoder: PixelDecoder) -> None:
    config = debug_config(
        latent_channels=FLUX2.latent_channels, latent_down=FLUX2.latent_down, latent_unpatchify=2, prediction="x0"
    )
    prompted = PixelDecoder(network(config), CheckpointMetadata(kind="student", config=config, space="flux2"))
    states = torch.randn(1, config.text_length, config.text_dim)
    options = comfy.nodes._decode_options({"seed": 0, "conditioning": [[states, {}]]}, "decode", prompted)
    assert options.prompt_embeds is not None
    assert torch.equal(options.prompt_embeds, states)
    (image,) = comfy.nodes.DecodeNode.execute(
        comfy.nodes.manage(prompted),
        {"samples": latent_of("flux2")[:, :, :1, :2]},
        seed=0,
        num_steps=1,
        conditioning=[[states, {}]],
    ).result
    assert image.shape == (2, 64, 128, 3)
    for asked, prompt, conditioning, words in (
        (prompted, "a cat", [[states, {}]], "give one of them"),
        (prompted, "", [[torch.zeros(1, 77, 768), {}]], "reads Gemma-2's states"),
        (prompted, "", [[states, {}], [states, {}]], "has 2 parts"),
        (decoder, "a cat", None, "no text stream, so a prompt cannot act"),
        (decoder, "", [[states, {}]], "so CONDITIONING cannot act"),
    ):
        with pytest.raises(SettingError, match=words):
            comfy.nodes.DecodeNode.execute(
                comfy.nodes.manage(asked),
                {"samples": latent_of("flux2")},
                seed=0,
                prompt=prompt,
                conditioning=conditioning,
            )


def test_recommended_stops_are_the_models_own(comfy: SimpleNamespace) -> None:
    """Few-step runs end where they end, Z-Image has a row of its own, and AuraFlow has none."""
    stop = comfyui_latents.early_stop_step
    flux, sigmas = model_of(comfy, "flux"), torch.linspace(1, 0, 51)
    for steps in (4, 8):
        assert stop(torch.linspace(1, 0, steps + 1), flux) == steps
    assert stop(sigmas, model_of(comfy, "flux", "ZImage")) == 46
    assert stop(sigmas, flux) == 43
    aura = model_of(comfy, "sdxl", "AuraFlow", "CONST")
    with pytest.raises(SettingError, match="No early stop is recommended for AuraFlow"):
        stop(sigmas, aura)
    assert stop(sigmas, aura, 10) == 40


def test_a_flow_model_in_sdxls_latents_is_read_as_flow(comfy: SimpleNamespace) -> None:
    aura, z, sigma = model_of(comfy, "sdxl", "AuraFlow", "CONST"), latent_of("sdxl"), 0.3
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))
    leaving = ((1 - sigma) * z + sigma * noise) / (1 - sigma)  # as ComfyUI lets it out
    latent = comfyui_latents.to_latent(
        {"samples": as_comfy_has_it(leaving, "sdxl")}, SPACES["sdxl"], model=aura, sigma=sigma
    )
    size = ((1 - sigma) ** 2 + sigma**2) ** 0.5
    assert torch.allclose(latent.tensor, ((1 - sigma) * z + sigma * noise) / size, atol=1e-4)
    assert latent.sigma == pytest.approx(sigma / size)
    model = model_of(comfy, "sdxl")
    model.get_model_object = lambda _name: object()
    with pytest.raises(SettingError, match="samples as object, whose noise is not known"):
        comfyui_latents.to_latent({"samples": leaving}, SPACES["sdxl"], model=model, sigma=sigma)


def test_more_noise_than_trained_is_refused(comfy: SimpleNamespace, decoder: PixelDecoder) -> None:
    model, sigmas = model_of(comfy, "flux"), torch.linspace(1, 0, 21)
    with pytest.raises(SettingError, match=r"noise level is 0.90; PiD was trained up to 0.8. Set steps_left to 16"):
        comfy.nodes.EarlyStopNode.execute(sigmas, model, 18)
    assert comfy.nodes.EarlyStopNode.execute(sigmas, model, 16).result[1] == pytest.approx(0.8)
    if not hasattr(comfy.formats, "Flux2"):
        pytest.skip("this ComfyUI knows no Flux2")
    with pytest.raises(SettingError, match="noise level is 0.90; small was trained up to 0.8"):
        comfy.nodes.DecodeNode.execute(
            comfy.nodes.manage(decoder), {"samples": latent_of("flux2")}, latent_sigma=0.9,
            model=model_of(comfy, "flux2"), seed=0,
        )  # fmt: skip


@needs_double
def test_weights_move_as_comfyui_manages_them(comfy: SimpleNamespace, decoder: PixelDecoder) -> None:
    """Each node asks for the room its own image needs; /free gets the memory back, and the next node loads again."""
    management = comfy.management
    management.calls.clear()
    management.loaded.clear()
    loaded = comfy.nodes.manage(decoder)
    moves: list[str] = []
    move = loaded.patcher.move
    loaded.patcher.move = lambda device: (moves.append(str(device)), move(device))
    small, large = latent_of("flux2")[:, :, :1, :1], latent_of("flux2")
    for samples in (small, large):
        comfy.nodes.DecodeNode.execute(loaded, {"samples": samples}, seed=0, num_steps=1)
    wanted = [decoder.runner.plan_for(size, 1).working for size in ((64, 64), (384, 256))]
    assert management.calls == [("load", bytes_) for bytes_ in wanted]
    assert wanted[0] < wanted[1]
    assert management.loaded == [loaded.patcher]
    management.unload_all_models()
    assert management.loaded == []
    comfy.nodes.UpscaleNode.execute(loaded, torch.rand(1, 16, 16, 3), seed=0, num_steps=1)
    assert management.loaded == [loaded.patcher]
    assert moves == ["cpu"] * 4
    assert loaded.patcher.size == 0  # left to ComfyUI to count


@needs_double
def test_the_text_encoder_leaves_before_the_decoder_runs(comfy: SimpleNamespace) -> None:
    events: list[str] = []
    config = debug_config(latent_channels=128, latent_down=16, latent_unpatchify=2, prediction="x0")
    metadata = CheckpointMetadata(kind="student", config=config, space="flux2")

    class Encoder(TextEncoder):
        def encode(self, prompts: Any) -> Tensor:
            events.append(prompts)
            return torch.zeros(1, config.text_length, config.text_dim)

        def unload(self) -> None:
            events.append("unloaded")

    text: Any = Encoder()
    prompted = PixelDecoder(network(config), metadata, text=text)
    comfy.management.calls.clear()
    for prompt in ("a cat", ""):
        comfy.nodes.DecodeNode.execute(
            comfy.nodes.manage(prompted), {"samples": latent_of("flux2")[:, :, :1, :1]}, seed=0, num_steps=1,
            prompt=prompt,
        )  # fmt: skip
    assert events == ["a cat", "unloaded", "", "unloaded"]
    assert [name for name, _ in comfy.management.calls] == ["free", "load"] * 2


def test_a_vae_takes_the_place_of_the_encoder(comfy: SimpleNamespace, decoder: PixelDecoder) -> None:
    encoder, decoder.encoder = decoder.encoder, None
    assert encoder is not None
    vae = SimpleNamespace(
        encode=lambda image: encoder(comfyui_latents.tensor_from_image(image)),
        decode=lambda samples: torch.full((len(samples), *(16 * side for side in samples.shape[2:]), 3), 0.5),
    )
    image, loaded = torch.rand(2, 20, 33, 3), comfy.nodes.manage(decoder)
    with pytest.raises(SettingError, match="or connect a VAE"):
        comfy.nodes.UpscaleNode.execute(loaded, image, seed=0)
    large, mask = comfy.nodes.UpscaleNode.execute(loaded, image, seed=0, num_steps=1, vae=vae).result
    assert large.shape == (2, 80, 132, 3)
    assert torch.equal(mask, torch.zeros(2, 80, 132))
    assert decoder.encoder is None
    sized, _ = comfy.nodes.UpscaleNode.execute(loaded, image, seed=0, num_steps=1, vae=vae, width=66).result
    assert sized.shape == (2, 40, 66, 3)
    with pytest.raises(SettingError, match="200x121 is more than 4 times the image of 33x20"):
        comfy.nodes.UpscaleNode.execute(loaded, image, seed=0, vae=vae, width=200)
    wrong = SimpleNamespace(encode=lambda image: torch.zeros(len(image), 4, 2, 3))
    with pytest.raises(SettingError, match="have 4 channels, and those of space flux2 128"):
        comfy.nodes.UpscaleNode.execute(loaded, image, seed=0, vae=wrong)
    samples = {"samples": latent_of("flux2")}
    plain = comfy.nodes.DecodeNode.execute(loaded, samples, seed=0, num_steps=1).result[0]
    fixed = comfy.nodes.DecodeNode.execute(loaded, samples, seed=0, num_steps=1, vae=vae, color_fix="coarse").result[0]
    assert abs(float(fixed.mean()) - 0.5) < abs(float(plain.mean()) - 0.5)
    with pytest.raises(SettingError, match="The VAE acts with a color_fix only"):
        comfy.nodes.DecodeNode.execute(loaded, samples, seed=0, vae=vae)


def test_transparency_goes_on_as_a_mask(comfy: SimpleNamespace, decoder: PixelDecoder) -> None:
    image, loaded = torch.rand(1, 16, 32, 4), comfy.nodes.manage(decoder)
    image[..., 3] = (torch.arange(32) >= 16).float()
    by_channel = comfy.nodes.UpscaleNode.execute(loaded, image, seed=0, num_steps=1).result
    by_mask = comfy.nodes.UpscaleNode.execute(
        loaded, image[..., :3], seed=0, num_steps=1, mask=1 - image[..., 3]
    ).result  # fmt: skip
    for colors, mask in (by_channel, by_mask):
        assert colors.shape == (1, 64, 128, 3)
        assert mask.shape == (1, 64, 128)
        assert float(mask[0, 0, 8]) == pytest.approx(1, abs=1e-6)
        assert float(mask[0, 0, -8]) == pytest.approx(0, abs=1e-6)
    assert torch.equal(by_channel[0], by_mask[0])
    with pytest.raises(SettingError, match="connect its own"):
        comfy.nodes.UpscaleNode.execute(loaded, image[..., :3], seed=0, mask=torch.zeros(1, 8, 8))


@needs_double
def test_previews_obey_the_command_line_and_warnings_reach_the_node(
    comfy: SimpleNamespace, decoder: PixelDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda _v, _t, preview, node_id=None: seen.append(preview))
    monkeypatch.setattr(
        comfy.arguments.args, "preview_method", comfy.arguments.LatentPreviewMethod.NoPreviews
    )  # fmt: skip
    size_warning = "small was not trained for this size"
    decode = decoder.decode
    monkeypatch.setattr(
        decoder, "decode", lambda *a, **k: (warnings.warn(size_warning, stacklevel=2), decode(*a, **k))[1]
    )
    comfy.nodes.DecodeNode.execute(comfy.nodes.manage(decoder), {"samples": latent_of("flux2")[:1]}, seed=0)
    assert seen
    assert set(seen) == {None}
    assert (size_warning, "7") in comfy.server.PromptServer.instance.texts


def test_messages_speak_of_widgets(comfy: SimpleNamespace) -> None:
    tiny = PixelDecoder.from_pretrained("tiny", device="cpu", dtype=torch.float32)
    with pytest.raises(SettingError, match="set its widget to the default") as caught:
        comfy.nodes.DecodeNode.execute(comfy.nodes.manage(tiny), {"samples": latent_of("flux2")[:1]}, num_steps=2)
    assert "leave it out" not in str(caught.value)


def test_what_a_node_says_otherwise_is_said_somewhere(comfy: SimpleNamespace, root: Path) -> None:
    """Words of Python's that messages no longer have would reach the node as they are."""
    files = (file for file in (root / "src").rglob("*.py") if not file.name.startswith("comfyui"))
    source = "".join(re.sub(r'"\s*\n\s*f?"', "", file.read_text(encoding="utf-8")) for file in files)
    assert [python for python, _ in comfy.nodes._NODE_WORDS if python not in source] == []


@needs_double
def test_the_loader_lists_comfyuis_own_folders(
    comfy: SimpleNamespace, decoder: PixelDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(comfy.folders.folders, "diffusion_models", tmp_path)
    path, load = tmp_path / "renamed.safetensors", comfy.nodes.LoadDecoderNode
    save_file(dict(decoder.net.state_dict()), path, metadata=decoder.metadata.to_metadata())
    assert "renamed.safetensors" in comfy.nodes._model_names()
    assert load.execute("renamed.safetensors", "float32").result[0].decoder.space.name == "flux2"
    quoted = load.execute("tiny", "float32", f'"{path}"', "flux2", "student").result[0]
    assert quoted.decoder.kind == "student"
    with pytest.raises(SettingError, match="they are for renamed files"):
        load.execute("tiny", space="flux2")
    with pytest.raises(CheckpointError, match="is no file on this machine; correct the loader's file"):
        load.execute("tiny", file=str(tmp_path / "absent.safetensors"))
    before, about = load.fingerprint_inputs("renamed.safetensors"), path.stat()
    assert before == load.fingerprint_inputs("renamed.safetensors", dtype="float32")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert load.fingerprint_inputs("renamed.safetensors") != before


def test_the_loader_takes_a_file(comfy: SimpleNamespace, decoder: PixelDecoder, tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    save_file(dict(decoder.net.state_dict()), path, metadata=decoder.metadata.to_metadata())
    loaded, model = comfy.nodes.LoadDecoderNode.execute("tiny", "float32", str(path)).result
    assert "small is no PiD network of ComfyUI's" in model.message.replace("mine", "small")  # it reads no text
    assert loaded.decoder.space.name == "flux2"
    options = comfy.nodes._model_names()
    assert options[0] == "tiny"
    assert "flux/2kto4k_v1pt5" in options


def test_the_folder_is_what_the_manager_expects(comfy: SimpleNamespace) -> None:
    folder = ROOT / "comfyui"
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert set(project["tool"]["comfy"]) == {"PublisherId", "DisplayName", "Icon", "requires-comfyui"}
    about = project["project"]
    assert "comfyui" not in about["name"].lower()
    assert set(about["license"]) in ({"file"}, {"text"})
    assert {"Operating System :: OS Independent", "Environment :: GPU :: NVIDIA CUDA"} <= set(about["classifiers"])
    home = about["urls"]["Repository"]
    icon = project["tool"]["comfy"]["Icon"]
    assert icon.startswith(home.replace("//github.com", "//raw.githubusercontent.com"))
    assert (ROOT / icon.partition("/main/")[2]).is_file()
    assert (folder / about["readme"]).is_file()
    # Until the package is published, both name the archive of this repository.
    asked = about["dependencies"] + (folder / "requirements.txt").read_text().splitlines()
    assert set(asked) == {f"pidecode @ {home}/archive/refs/heads/main.zip"}
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["name"] == "pidecode"


@pytest.mark.parametrize("path", sorted((ROOT / "comfyui" / "example_workflows").glob("*.json")), ids=lambda p: p.stem)
def test_example_workflows_fit_the_nodes(comfy: SimpleNamespace, path: Path) -> None:
    nodes = asyncio.run(asyncio.run(comfy.nodes.comfy_entrypoint()).get_node_list())
    schemas = {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in nodes}
    flow = json.loads(path.read_text())
    ends = {node["id"]: node for node in flow["nodes"]}
    for _, source, slot, target, entry, kind in flow["links"]:
        assert ends[source]["outputs"][slot]["type"] == kind
        assert ends[target]["inputs"][entry]["type"] == kind
    ours = [node for node in flow["nodes"] if node["type"].startswith("Pidecode")]
    assert ours
    for node in ours:
        schema = schemas[node["type"]]
        known = {entry.id: str(entry.io_type) for entry in schema.inputs}
        assert {entry["name"]: entry["type"] for entry in node["inputs"]}.items() <= known.items()
        widgets = [entry for entry in schema.inputs if str(entry.io_type) in ("INT", "FLOAT", "STRING", "COMBO")]
        widgets.sort(key=lambda entry: entry.optional)  # the window shows required inputs first
        values = list(node["widgets_values"])
        for entry in widgets:
            value = values.pop(0)
            if str(entry.io_type) == "COMBO":
                assert value in value_of(entry, "options")
            elif str(entry.io_type) in ("INT", "FLOAT"):
                assert value_of(entry, "min") <= value <= value_of(entry, "max")
            if entry.id == "seed":
                assert values.pop(0) == "fixed"  # what the seed does after a run has a widget of its own
        assert values == []


@pytest.mark.parametrize("path", sorted((ROOT / "comfyui" / "example_workflows").glob("*.json")), ids=lambda p: p.stem)
def test_no_node_of_an_example_hides_another(path: Path) -> None:
    """Each node has room for its widgets (28 pixels each) and its title, and none lies on another."""
    boxes = []
    for node in json.loads(path.read_text())["nodes"]:
        (left, top), (width, height) = node["pos"], node["size"]
        assert height >= 50 + 28 * len(node.get("widgets_values", []))
        boxes.append((left, top - 30, left + width, top + height))
    for first, second in itertools.combinations(boxes, 2):
        apart = first[2] <= second[0] or second[2] <= first[0] or first[3] <= second[1] or second[3] <= first[1]
        assert apart, (first, second)


def test_without_the_package_the_folder_says_how_to_install_it() -> None:
    """As ComfyUI imports it, with a Python that does not have pidecode."""
    folder = ROOT / "comfyui" / "__init__.py"
    command = [sys.executable, "-S", "-I", "-c", f"exec(open({str(folder)!r}).read())"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "ImportError: The package pidecode is not installed in ComfyUI's Python. Run" in done.stderr


def test_the_committed_workflows_are_those_that_the_script_makes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    script = importlib.import_module("make_workflows")
    committed = {path.name: path.read_text() for path in script.FOLDER.glob("*.json")}
    monkeypatch.setattr(script, "FOLDER", tmp_path)
    script.main()
    assert {path.name: path.read_text() for path in tmp_path.glob("*.json")} == committed


def test_less_memory_gives_the_same_image_or_windows(comfy: SimpleNamespace, decoder: PixelDecoder) -> None:
    loaded, samples, images = comfy.nodes.manage(decoder), {"samples": latent_of("flux2")[:1, :, :1, :3]}, {}
    comfyui_latents.WINDOW, kept = 64, comfyui_latents.WINDOW
    for memory in ("default", "low", "windows"):
        images[memory] = comfy.nodes.DecodeNode.execute(loaded, samples, seed=0, num_steps=1, memory=memory).result[0]
    comfyui_latents.WINDOW = kept
    assert torch.allclose(images["default"], images["low"], atol=1e-5)
    assert not torch.allclose(images["default"], images["windows"], atol=1e-3)
    assert decoder.runner.plan is None
    tiny = comfy.nodes.manage(PixelDecoder.from_pretrained("tiny", device="cpu", dtype=torch.float32))
    with pytest.raises(SettingError, match="memory acts on student and teacher decoders only; set it to default"):
        comfy.nodes.DecodeNode.execute(tiny, samples, memory="low")
