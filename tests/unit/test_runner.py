# SPDX-License-Identifier: Apache-2.0
"""Runners and decoders under a plan: what is offloaded, what this machine offers, and attention that gives NaN."""

from __future__ import annotations

import json
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import pidecode
import recorded
from pidecode.cli.app import cli
from pidecode.devices import free_memory
from pidecode.encoders.base import ImageEncoder, LazyImageEncoder, on_device
from pidecode.engine.machine import this_machine
from pidecode.engine.plan import Plan
from pidecode.engine.runner import Runner
from pidecode.errors import SettingError
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import debug_config
from pidecode.registry.spaces import get_space
from pidecode.weights.metadata import CheckpointMetadata
from random_networks import random_net

CPU = torch.device("cpu")
CONFIG = debug_config(pixel_depth=2)


@pytest.fixture
def net() -> PiDNet:
    return random_net(CONFIG, std=0.03)


def first_step(runner: Runner, x: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    text, latent = torch.randn(1, 7, 16, generator=generator), torch.randn(1, 16, 2, 3, generator=generator)
    with torch.no_grad():
        condition = runner.prepare((4, 6), text, latent, torch.zeros(1))
        return runner.predict(condition)(x, torch.tensor([634.0]))


def nothing_finite(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return v.mean(2, keepdim=True).expand_as(q) * float("nan")


def test_attention_that_gives_nan_on_the_first_step_is_replaced(net: PiDNet) -> None:
    runner, x = Runner(net), torch.randn(1, 3, 64, 96)
    runner._kernels["auto", "cpu"] = nothing_finite  # as if its probe had passed
    with pytest.warns(UserWarning, match="Attention 'auto' gave NaN on cpu"):
        out = first_step(runner, x)
    assert torch.isfinite(out).all()
    assert runner.attention == "math"
    assert torch.equal(first_step(Runner(net, attention="math"), x), out)


def test_nan_in_the_input_does_not_change_the_attention(net: PiDNet) -> None:
    runner, x = Runner(net), torch.full((1, 3, 64, 96), float("nan"))
    runner._kernels["auto", "cpu"] = nothing_finite
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first_step(runner, x)
    assert runner.attention == "auto"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A PiD decoder of FLUX.2's space without text, as a file; its space's encoder is that of `tiny`."""
    path = tmp_path / "pid.safetensors"
    decoder = recorded.random_decoder("flux2", "student", text_dim=0)
    save_file(dict(decoder.net.state_dict()), path, decoder.metadata.to_metadata())
    return path


def load(path: Path, **more: Any) -> pidecode.PixelDecoder:
    return pidecode.PixelDecoder.from_pretrained(path, device="cpu", encoder=tiny_encoder(), **more)


def test_a_plan_may_be_made_from_what_the_weights_are(weights: Path) -> None:
    seen: list[CheckpointMetadata] = []

    def plan(identity: CheckpointMetadata) -> Plan:
        seen.append(identity)
        return Plan(size=(256, 256), dtype="float32", quantization="int8")

    decoder = load(weights, plan=plan)
    assert seen[0].space == "flux2" and seen[0].config == decoder.net.config
    assert decoder.runner.plan is not None and decoder.runner.plan.quantization == "int8"
    with pytest.raises(SettingError, match="cannot be changed any more"):
        decoder.runner.forget()


class _Native:
    """An encoder's model that remembers where it was."""

    can_decode = False

    def __init__(self) -> None:
        self.places: list[str] = []

    def to(self, device: torch.device) -> None:
        self.places.append(device.type)


def test_an_offloaded_encoder_returns_to_the_host_whatever_happens() -> None:
    native = _Native()
    encoder = ImageEncoder(native, get_space("flux2"))  # type: ignore[arg-type]
    with pytest.raises(KeyError), on_device(encoder, torch.device("meta")):
        raise KeyError
    assert native.places == ["cpu", "meta", "cpu"]
    with on_device(encoder, None), on_device(print, CPU):
        pass
    assert native.places == ["cpu", "meta", "cpu"]
    lazy = LazyImageEncoder("flux2", "nowhere", CPU, torch.float32)
    assert repr(lazy) == "LazyImageEncoder(not loaded)"  # which loads nothing
    lazy._load = lambda: encoder  # type: ignore[assignment]
    with on_device(lazy, torch.device("meta")):
        assert native.places[-1] == "meta"
    assert native.places[-1] == "cpu"


def test_a_plan_offloads_the_encoder(monkeypatch: pytest.MonkeyPatch, weights: Path) -> None:
    plan = Plan(size=(256, 256), dtype="float32", offload=("encoder",))
    decoder = load(weights, plan=plan)
    moves: list[str] = []
    real = ImageEncoder.to
    monkeypatch.setattr(ImageEncoder, "to", lambda self, device: (moves.append(str(device)), real(self, device))[1])
    decoder.encode(Image.new("RGB", (64, 64)))
    assert moves[-2:] == ["cpu", "cpu"]  # to where the network is, and home
    free = load(weights)
    free.encode(Image.new("RGB", (64, 64)))
    assert len(moves) == 4  # the last one was its loading only


def test_this_machine_says_what_it_has() -> None:
    machine = this_machine("cpu")
    assert not machine.accelerator and machine.w8a8 == ("int8",)
    free = free_memory(CPU)
    assert free is None or machine.memory == pytest.approx(free, rel=0.2)


def tiny_encoder() -> Path:
    return Path(str(resources.files("pidecode"))) / "assets" / "tiny_encoder.safetensors"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def test_the_command_line_plans_a_decode(tmp_path: Path, weights: Path) -> None:
    image = tmp_path / "one.png"
    Image.radial_gradient("L").resize((40, 24)).convert("RGB").save(image)
    common = ("upscale", image, "-m", weights, "--encoder", tiny_encoder(), "--num-steps", 1, "-o")
    plain = run(*common, tmp_path / "plain.png")
    assert plain.exit_code == 0 and "predicted peak" not in plain.stderr
    done = run(*common, tmp_path / "int8.png", "--quantization", "int8", "--memory", "1GB")
    assert done.exit_code == 0, done.output
    assert "192x128, batch of 1, float32" in done.stderr  # whole cells of the encoder, before it is cut back
    assert "weights in int8, w8a16: dequantized" in done.stderr
    with Image.open(tmp_path / "int8.png") as made:
        assert made.size == (160, 96)


def test_the_command_line_refuses_what_cannot_be(tmp_path: Path, weights: Path) -> None:
    latent = tmp_path / "one.safetensors"
    pidecode.Latent(torch.randn(2, 128, 1, 2), "flux2", 0.0).save(latent)
    tight = run("decode", latent, "-m", weights, "--memory", "1kB")
    assert tight.exit_code != 0 and "128x64 (batch of 2) needs" in tight.stderr
    fp8 = run("decode", latent, "-m", weights, "--quantization", "fp8", "--scheme", "w8a8")
    assert fp8.exit_code != 0 and "does not multiply in fp8" in fp8.stderr
    idle = run("decode", latent, "-m", weights, "--quantization", "none", "--scheme", "w8a8")
    assert idle.exit_code != 0 and "multiplies quantized weights" in idle.stderr


def test_plan_takes_quantization_and_scheme() -> None:
    done = run("plan", "--size", "2048x2048", "--vram", "4GB", "--scheme", "w8a8", "--json")
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert (data["quantization"], data["scheme"], data["exact"], data["text_on_host"]) == ("int8", "w8a8", False, True)
    fp8 = run("plan", "--size", "2048x2048", "--vram", "4GB", "--scheme", "w8a8", "--quantization", "fp8")
    assert "weights in fp8, w8a8: multiplied in eight bits" in fp8.output
