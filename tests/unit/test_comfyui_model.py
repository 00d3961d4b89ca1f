# SPDX-License-Identifier: Apache-2.0
"""A decoder as a MODEL of ComfyUI's own PiD, compared with it where its checkout is given."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from comfyui_kit import imported_comfyui, latent_of, needs_double, needs_real, network
from pidecode import PixelDecoder
from pidecode.errors import MissingDependencyError, SettingError
from pidecode.integrations import comfyui_latents
from pidecode.latents.latent import Latent
from pidecode.registry.configs import PiDConfig, debug_config
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
        for t, sigma in ((999.0, 0.0), (342.0, 0.3)):
            ours = own.net(noisy, torch.tensor([t]), states, z, sigma)
            core = model.model.diffusion_model(
                noisy, torch.tensor([t]), states, lq_latent=z, degrade_sigma=torch.tensor([sigma])
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
