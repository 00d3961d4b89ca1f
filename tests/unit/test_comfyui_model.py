# SPDX-License-Identifier: Apache-2.0
"""A decoder as a MODEL of ComfyUI's own PiD, compared with it where its checkout is given."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfyui_kit import EVERY, as_comfy_has_it, imported_comfyui, latent_of, model_of, needs_double, needs_real, network
from pidecode import PixelDecoder
from pidecode.errors import MissingDependencyError, SettingError
from pidecode.integrations import comfyui_latents
from pidecode.latents.latent import Latent
from pidecode.registry.configs import PiDConfig, debug_config
from pidecode.registry.spaces import SPACES
from pidecode.sampling import NoiseStream, student_times, teacher_times
from pidecode.weights.metadata import CheckpointMetadata


@pytest.fixture(scope="module", name="comfy")
def _comfy() -> Iterator[SimpleNamespace]:
    with imported_comfyui() as modules:
        yield modules


def prompted_decoder(kind: str = "student", **changes: Any) -> PixelDecoder:
    config = debug_config(latent_channels=128, latent_down=16, latent_unpatchify=2, **changes)
    return PixelDecoder(network(config, 0.1), CheckpointMetadata(kind=kind, config=config, space="flux2"), name="small")


def test_equal_steps_of_the_share_are_the_references_times() -> None:
    for steps in (2, 4):
        share = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
        assert comfyui_latents.flow_times(share, None).tolist() == pytest.approx(student_times(steps))
    share = torch.arange(25, -1, -1, dtype=torch.float64) / 25
    assert torch.allclose(comfyui_latents.flow_times(share, 6.0), teacher_times(25, 6.0), atol=1e-12)


def test_conditioning_carries_latent_sigmas_and_an_empty_image(comfy: SimpleNamespace) -> None:
    own = prompted_decoder()
    assert isinstance(own.net.config, PiDConfig)
    states, node = torch.randn(1, own.net.config.text_length, own.net.config.text_dim), comfy.nodes.ConditioningNode
    z, loaded = latent_of("flux2"), comfy.nodes.manage(own)
    positive, negative, image, sigmas = node.execute(loaded, {"samples": z}, positive=[[states, {"a": 1}]]).result
    assert torch.equal(positive[0][1]["lq_latent"], z)
    assert positive[0][1]["degrade_sigma"].tolist() == [0.0, 0.0]
    assert positive[0][1]["a"] == 1
    assert torch.equal(negative[0][0], states)
    assert image["samples"].shape == (2, 3, 256, 384)
    assert sigmas.tolist() == pytest.approx([0.999, 0.866, 0.634, 0.342, 0.0])
    with pytest.raises(SettingError, match="There are a prompt and a CONDITIONING"):
        node.execute(loaded, {"samples": z}, positive=[[states, {}]], prompt="a cat")
    with pytest.raises(SettingError, match="connect positive"):
        node.execute(loaded, {"samples": z})


@needs_double
def test_a_comfyui_without_pid_says_so_where_the_model_is_used(comfy: SimpleNamespace) -> None:
    with pytest.raises(MissingDependencyError, match="This ComfyUI has no PiD of its own; update it"):
        comfyui_latents.core_model(prompted_decoder())


@needs_real
@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_comfyuis_own_pid_computes_what_ours_does(comfy: SimpleNamespace, prediction: str) -> None:
    """In float32: one evaluation within 1e-6, and its Euler at the reference's times from the reference's noise."""
    samplers, sample = (importlib.import_module(f"comfy.{name}") for name in ("samplers", "sample"))
    own = prompted_decoder(prediction=prediction)
    config = own.net.config
    assert isinstance(config, PiDConfig)
    model = comfyui_latents.core_model(own)
    z, states = latent_of("flux2")[:1], torch.randn(1, config.text_length, config.text_dim)
    noisy = torch.randn(1, 3, 256, 384)
    with torch.inference_mode():
        for t, sigma, side in ((999.0, 0.0, None), (342.0, 0.3, None), (999.0, 0.0, 1)):  # down to a latent of 16 px
            small, pixels = z[:, :, :side, :side], noisy[:, :, : side and 64, : side and 64]
            ours = own.net(pixels, torch.tensor([t]), states, small, sigma)
            core = model.model.diffusion_model(
                pixels, torch.tensor([t]), states, lq_latent=small, degrade_sigma=torch.tensor([sigma])
            )
            assert float((ours - core).abs().max()) <= 1e-6
    loaded = comfy.nodes.manage(own)
    positive, negative, image, sigmas = comfy.nodes.ConditioningNode.execute(
        loaded, {"samples": z}, positive=[[states, {}]]
    ).result  # fmt: skip
    assert torch.equal(sigmas, samplers.simple_scheduler(model.model.model_sampling, 4))
    noise = NoiseStream([3], (3, 256, 384), torch.device("cpu"))()
    sampler = samplers.sampler_object("euler")
    core = sample.sample_custom(
        model, noise, 1.0, sampler, sigmas, positive, negative, image["samples"], disable_pbar=True, seed=3
    )
    ours = own.decode(Latent(z, "flux2"), seed=3, sampler="ode", prompt_embeds=states).tensor
    assert torch.allclose(core.clamp(-1, 1), ours, atol=1e-6)


@needs_real
@pytest.mark.parametrize("space", EVERY)
def test_comfyuis_own_conditioning_is_exact_on_finished_latents_alone(comfy: SimpleNamespace, space: str) -> None:
    """ComfyUI's node takes what its sampler lets out as it is, which of a noisy latent is another scaling."""
    core = importlib.import_module("comfy_extras.nodes_pid").PiDConditioning
    row, model, z = SPACES[space], model_of(comfy, space), latent_of(space)[:1]
    shape = {"latent_channels": row.channels, "latent_down": row.down, "latent_unpatchify": row.raw_patch}
    net, sampling = network(debug_config(**shape), 0.1), model.get_model_object("model_sampling")
    states, noisy = torch.randn(1, 10, net.config.text_dim), torch.randn(1, 3, 256, 384)
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(9))

    def image(latent: torch.Tensor, sigma: float, t: float) -> torch.Tensor:
        with torch.inference_mode():
            return net(noisy, torch.tensor([t]), states, latent, sigma)

    def left_at(sigma: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
        """The latent that PiD was trained on; what ComfyUI's node and ours make of the LATENT; its noise level."""
        state = sampling.noise_scaling(torch.tensor([sigma]), noise.clone(), z)
        samples = {"samples": as_comfy_has_it(sampling.inverse_noise_scaling(torch.tensor([sigma]), state), space)}
        ours = comfyui_latents.to_latent(samples, row, model=model, sigma=sigma)
        form = {"flux2": "flux"}.get(space, space)
        (((_, theirs),),) = core.execute([[states, {}]], samples, form, sigma).result
        wanted = Latent.from_euler(z + sigma * noise, sigma, space) if space == "sdxl" else None
        wanted = wanted.tensor if wanted else (1 - sigma) * z + sigma * noise
        return wanted, theirs["lq_latent"], ours.tensor, float(ours.sigmas[0])

    for sigma in (0.0, 0.3, 0.6):
        wanted, theirs, ours, level = left_at(sigma)
        for t in (999.0, 342.0):
            reference, own = image(wanted, level, t), image(ours, level, t)
            assert float((own - reference).abs().max()) <= 1e-6
            apart = float((image(theirs, sigma, t) - reference).abs().max() / reference.abs().max())
            assert apart <= 1e-6 if sigma == 0 else apart > 1e-3
        assert float((ours - wanted).abs().max()) <= 1e-6
        apart = float((theirs - wanted).abs().max())
        assert apart <= 1e-6 if sigma == 0 else apart > 0.1
