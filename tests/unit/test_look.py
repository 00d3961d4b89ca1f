# SPDX-License-Identifier: Apache-2.0
"""The quick look at what a latent decodes to, and the encoder that corrects its latent by it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pidecode import PixelDecoder
from pidecode.encoders.base import LazyEncoder
from pidecode.engine.timesteps import precompute, strip_for_inference
from pidecode.latents.latent import Latent
from pidecode.metrics import psnr
from pidecode.models.pid.network import PiDNet
from pidecode.models.regressor import look_through, shrunk
from pidecode.training.tiny.cache import quarter, to_signed
from pidecode.training.tiny.decoder_stage import tiny_config
from pidecode.training.tiny.procedural import procedural_image


@pytest.fixture
def shipped() -> PixelDecoder:
    return PixelDecoder.from_pretrained("tiny", device="cpu")


def small_image(kind: str = "dead_leaves") -> Tensor:
    """A quarter-size image [1,3,64,64] in [-1,1]."""
    return to_signed(quarter(procedural_image(kind, 256, 5)))[None]


def test_a_look_shows_what_would_be_decoded(shipped: PixelDecoder) -> None:
    look, latent = shipped.runner.look, shipped.encode(small_image())
    assert look is not None
    decoded = shipped.decode(latent, output="pt")
    assert isinstance(decoded, Tensor)
    assert (look(latent.tensor) - shrunk(decoded, shipped.scale)).abs().max() < 0.01


def test_a_look_outlives_what_inference_takes_out(shipped: PixelDecoder) -> None:
    latent = torch.randn(1, 128, 2, 3, generator=torch.Generator().manual_seed(0))
    look = look_through(shipped.net)
    assert look is not None
    before = look(latent)
    precompute(shipped.net, (0.999,))
    strip_for_inference(shipped.net)
    assert torch.equal(look(latent), before)
    assert look_through(shipped.net) is None  # what would tell is gone


def test_networks_that_make_more_of_a_latent_offer_no_look(shipped: PixelDecoder) -> None:
    assert look_through(PiDNet(replace(tiny_config(), adapter_stages=(), adapter_width=64))) is None
    torch.nn.init.normal_(shipped.net.pixel_embedder.proj.weight)
    assert look_through(shipped.net) is None


def test_weights_that_change_are_not_looked_through_by_what_they_were(shipped: PixelDecoder) -> None:
    shipped.runner.forget()
    assert shipped.runner.look is None
    latent = shipped.encode(small_image())
    assert isinstance(shipped.encoder, LazyEncoder)
    assert torch.equal(latent.tensor, shipped.encoder(small_image()))


@pytest.mark.parametrize("kind", ["dead_leaves", "line_art", "text_page"])
def test_corrected_latents_decode_nearer_to_the_image(shipped: PixelDecoder, kind: str) -> None:
    image = small_image(kind)
    assert shipped.encoder is not None
    first = Latent(shipped.encoder(image), "flux2", 0.0)

    def found(latent: Latent) -> float:
        decoded = shipped.decode(latent, output="pt")
        assert isinstance(decoded, Tensor)
        return psnr(shrunk(decoded, shipped.scale), image).item()

    assert found(shipped.encode(image)) > found(first) + 0.2
