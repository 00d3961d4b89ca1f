# SPDX-License-Identifier: Apache-2.0
"""A network that heeds neither noise nor time is asked once for all steps, and gives the image it gave before."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pidecode import PixelDecoder
from pidecode.engine.plan import Plan
from pidecode.engine.runner import Runner
from pidecode.engine.timesteps import depends_on_noise, is_stripped, strip_for_inference
from pidecode.latents.latent import Latent
from pidecode.models.pid.network import Condition, PiDNet
from pidecode.registry.checkpoints import StudentKind
from pidecode.sampling import NoiseStream, Step, sample_student


@pytest.fixture
def shipped() -> PixelDecoder:
    """A decoder whose ways of noise and of time are shut, and which goes the long way all the same."""
    decoder = PixelDecoder.from_pretrained("tiny", device="cpu")
    decoder.runner.look = None
    return decoder


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Times at which any network is asked, as they come."""
    times: list[float] = []
    whole = Runner.denoise

    def counted(runner: Runner, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        times.append(float(t[0]))
        return whole(runner, x, t, condition)

    monkeypatch.setattr(Runner, "denoise", counted)
    return times


def latent() -> Latent:
    generator = torch.Generator().manual_seed(0)
    return Latent(torch.randn(1, 128, 2, 3, generator=generator), "flux2", 0.0)


def ways(net: PiDNet) -> dict[str, Any]:
    return {"image": net.s_embedder.proj, "pixels": net.pixel_embedder.proj, "time": net.t_embedder.mlp[2]}


@pytest.mark.parametrize("sampler", ["sde", "ode"])
def test_one_evaluation_gives_the_image_of_four(
    shipped: PixelDecoder, asked: list[float], sampler: StudentKind
) -> None:
    steps: list[Step] = []
    made = shipped.decode(latent(), seed=3, sampler=sampler, output="pt", callback=steps.append)
    assert len(asked) == 1
    assert [step.index for step in steps] == [1, 2, 3, 4]
    net, size = shipped.net, (3, 128, 192)
    with torch.inference_mode():
        condition = net.prepare((8, 12), None, latent().tensor, torch.zeros(1))
        draw = NoiseStream([3], size, torch.device("cpu"))
        every = sample_student(
            lambda x, t: shipped.runner.denoise(x, t, condition), draw, kind=sampler, prediction=net.config.prediction
        )
    assert len(asked) == 5
    assert isinstance(made, Tensor)
    assert torch.equal(made, every.clamp(-1, 1))


def test_the_short_way_gives_the_image_of_the_long_one_unasked(shipped: PixelDecoder, asked: list[float]) -> None:
    steps: list[Step] = []
    short = PixelDecoder.from_pretrained("tiny", device="cpu", dtype=torch.float32)
    made = short.decode(latent(), seed=3, output="pt", callback=steps.append)
    assert not asked
    assert [step.index for step in steps] == [1, 2, 3, 4]
    long = PixelDecoder.from_pretrained("tiny", device="cpu", dtype=torch.float32)
    long.runner.look = None
    wanted = long.decode(latent(), seed=3, output="pt")
    assert len(asked) == 1
    assert isinstance(made, Tensor)
    assert isinstance(wanted, Tensor)
    assert (made - wanted).abs().max() < 5e-3


def test_the_long_way_is_gone_where_something_asks_for_it(asked: list[float]) -> None:
    windows = Plan(size=(192, 128), batch=1, dtype="float32", window=128)
    for plan in (windows, replace(windows, window=None, quantization="int8")):
        decoder = PixelDecoder.from_pretrained("tiny", device="cpu", dtype=torch.float32)
        runner = Runner(decoder.net, plan)
        assert runner.look is not None
        with torch.inference_mode():
            condition = runner.net.prepare((8, 12), None, latent().tensor, torch.zeros(1))
            runner.predict(condition)(torch.randn(1, 3, 128, 192), torch.tensor([999.0]))
        assert asked
        asked.clear()
    for manner in ({"fused": True}, {"compile": True}, {"graphs": True}):
        assert Runner(decoder.net, **manner)._answers_shortly(condition) is None
    assert Runner(decoder.net)._answers_shortly(condition) is not None


@pytest.mark.parametrize("way", ["image", "pixels", "time"])
def test_any_open_way_has_it_asked_at_every_step(shipped: PixelDecoder, asked: list[float], way: str) -> None:
    shipped.runner.forget()
    nn.init.normal_(ways(shipped.net)[way].weight, std=0.01)
    assert depends_on_noise(shipped.net)
    shipped.decode(latent(), seed=3, output="pt")
    assert len(asked) == 4


def test_changed_weights_are_looked_at_again(shipped: PixelDecoder, asked: list[float]) -> None:
    shipped.decode(latent(), output="pt")
    shipped.runner.forget()  # as every change of weights does
    nn.init.normal_(shipped.net.s_embedder.proj.weight, std=0.01)
    shipped.decode(latent(), output="pt")
    assert len(asked) == 1 + 4


def test_what_was_slimmed_is_asked_at_every_step_unless_looked_at_before(
    shipped: PixelDecoder, asked: list[float]
) -> None:
    net = shipped.net
    runner = Runner(net, distilled=True)
    runner.look = None
    runner.precompute_timesteps()
    strip_for_inference(net)
    assert depends_on_noise(net)
    with torch.inference_mode():
        condition = net.prepare((8, 12), None, latent().tensor, torch.zeros(1))
        predict = runner.predict(condition)
        for _ in range(2):
            predict(torch.randn(1, 3, 128, 192), torch.tensor([999.0]))
    assert len(asked) == 2


def test_a_runner_looks_before_it_slims(shipped: PixelDecoder, asked: list[float]) -> None:
    shipped.runner.arrange(torch.device("cpu"))
    assert is_stripped(shipped.net)
    shipped.decode(latent(), output="pt")
    assert len(asked) == 1
