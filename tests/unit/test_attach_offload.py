# SPDX-License-Identifier: Apache-2.0
"""A pipeline, a text encoder and a decoder that take turns on a GPU: what is on it when, by counted allocations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_pipelines as tiny
from pidecode import DecodeOptions, attach
from pidecode.encoders.text import PromptEmbedsCache, TextEncoder, TextOptions
from pidecode.engine.machine import Chunks
from pidecode.engine.plan import Plan
from pidecode.engine.runner import Runner
from pidecode.errors import Cancelled
from pidecode.integrations.diffusers import PipelineProgress
from pidecode.latents.latent import NormalizationWarning
from small_gpu import SmallGPU
from tiny_models import save_gemma

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{NormalizationWarning.__module__}.NormalizationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]


def test_the_small_gpu_counts_what_is_on_it() -> None:
    gpu = SmallGPU()
    with gpu.present():
        zeros = torch.zeros(4, 4, device="cuda")
        ones = zeros + 1
        assert (zeros.device.type, ones.device.type, gpu.live) == ("cuda", "cuda", 128)
        with pytest.raises(AssertionError, match="two devices"):
            ones + torch.ones(4, 4)
        assert ones.cpu().device.type == "cpu"
        del zeros, ones
        layer = torch.nn.Linear(4, 4).to("cuda")
        assert (gpu.live, gpu.modules_on(layer=layer)) == (80, {"layer"})
        layer.to("cpu")
        assert (gpu.live, gpu.modules_on(layer=layer)) == (0, set())


def size_of(module: torch.nn.Module) -> int:
    return sum(weight.nbytes for weight in module.parameters())


class Watched:
    """A FLUX pipeline and a decoder that reads text, and which of their parts were on the GPU while which one ran."""

    def __init__(self, folder: Path, gpu: SmallGPU, monkeypatch: pytest.MonkeyPatch, kind: str = "student") -> None:
        self.gpu, self.seen = gpu, {}
        self.pipe = tiny.build("flux")
        self.decoder = tiny.decoder_for("flux", text=True, text_dim=32, text_length=12)
        if kind == "teacher":
            self.decoder.kind = "teacher"
        self.decoder.runner.attention = "math"  # "auto" measures on the device
        options = TextOptions(model=str(save_gemma(folder)), length=12, instruction="", dtype="float32")
        self.decoder.text = TextEncoder(options, states=PromptEmbedsCache(folder / "states"))
        parts = ("text_encoder", "text_encoder_2", "transformer", "vae")
        for name in parts:
            part = getattr(self.pipe, name)
            part.register_forward_hook(lambda *_, name=name: self.note(name))
        compute = TextEncoder._compute

        def encode(encoder: TextEncoder, prompt: str) -> Any:
            states = compute(encoder, prompt)
            self.note("gemma")
            return states

        monkeypatch.setattr(TextEncoder, "_compute", encode)

    def note(self, name: str) -> None:
        modules = {**self.pipe.components, "decoder": self.decoder.net, "gemma": self.decoder.text._model}
        modules = {key: part for key, part in modules.items() if isinstance(part, torch.nn.Module)}
        self.seen.setdefault(name, set()).update(self.gpu.modules_on(**modules))

    def progress(self, at: PipelineProgress) -> None:
        if at.stage == "decoding":
            self.note("decoder")


@pytest.mark.slow
@pytest.mark.parametrize("where", ["offloaded", "whole"])
@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_one_network_is_on_the_gpu_at_a_time(
    where: str, home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SmallGPU()
    it = Watched(tmp_path, gpu, monkeypatch)
    with gpu.present():
        it.decoder.runner.place(torch.device(home))
        pipe = attach(it.pipe, it.decoder, offload=True, progress_callback=it.progress)
        pipe.enable_model_cpu_offload(device="cuda") if where == "offloaded" else pipe.to("cuda")
        out = pipe(**tiny.arguments("flux"))
        assert it.seen.pop("gemma") == {"gemma"}
        assert it.seen.pop("decoder") == {"decoder"}
        pipeline_parts = {"text_encoder", "text_encoder_2", "transformer", "vae"}
        for name, there in it.seen.items():
            assert there == ({name} if where == "offloaded" else pipeline_parts)
        weights = {name: size_of(getattr(it.pipe, name)) for name in pipeline_parts}
        left = 0 if where == "offloaded" else sum(weights.values())
        assert gpu.modules_on(decoder=it.decoder.net) == set()
        del out
        assert gpu.live - left < 10_000  # no weights of decoder or text encoder, nor an image


@pytest.mark.slow
def test_a_decode_needs_what_the_planner_says_and_is_released_when_it_is_cancelled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = SmallGPU()
    it = Watched(tmp_path, gpu, monkeypatch)
    peaks: list[int] = []
    parts: dict[str, int] = {}

    def note(at: PipelineProgress) -> None:
        if at.stage == "decoding" and at.step == 1:
            gpu.peak = 0
            parts.update(it.decoder.runner.plan_for((256, 128), 1).parts)
        elif at.stage == "decoding":
            peaks.append(gpu.peak)
            raise Cancelled("enough")

    with gpu.present():
        it.pipe.enable_model_cpu_offload(device="cuda")
        pipe = attach(it.pipe, it.decoder, offload=True, progress_callback=note)
        with pytest.raises(Cancelled):
            pipe(**tiny.arguments("flux"))
        assert gpu.modules_on(decoder=it.decoder.net, transformer=it.pipe.transformer) == set()
        assert it.decoder.device.type == "cpu"
        # Counted is what one decoding step held; the driver's own memory cannot be.
        assert peaks[0] == pytest.approx(sum(parts.values()) - parts["driver"], rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "offload"), [("flux", False), ("flux", True), ("sdxl", True)])
def test_a_sequentially_offloaded_pipeline_makes_the_same_image(name: str, offload: bool) -> None:
    """Each layer is on the GPU while it runs alone: those of the diffusion, and the VAE's for the color fix."""
    options = DecodeOptions(color_fix="auto")
    wanted = attach(tiny.build(name), tiny.decoder_for(name), options=options)(**tiny.arguments(name))
    gpu, pipe, decoder = SmallGPU(), tiny.build(name), tiny.decoder_for(name)
    decoder.runner.attention = "math"  # "auto" measures on the device
    with gpu.present():
        pipe.enable_sequential_cpu_offload(device="cuda")
        out = attach(pipe, decoder, offload=offload, options=options)(**tiny.arguments(name))
        assert gpu.modules_on(transformer=getattr(pipe, "transformer", None) or pipe.unet, decoder=decoder.net) == set()
        torch.testing.assert_close(out.latents.tensor.cpu(), wanted.latents.tensor)
    assert np.array_equal(np.asarray(out.images[0]), np.asarray(wanted.images[0]))


def test_what_a_plan_keeps_on_the_host_stays_there() -> None:
    gpu = SmallGPU()
    decoder = tiny.decoder_for("flux")
    runner = decoder.runner
    assert isinstance(runner, Runner)
    with gpu.present():
        runner.plan = Plan(size=(256, 128), dtype="float32", chunks=Chunks(), offload=("blocks",))
        runner.arrange(torch.device("cpu"))
        runner.place(gpu.device)
        assert gpu.modules_on(blocks=runner.net.patch_blocks, rest=runner.net.final_layer) == {"rest"}
        runner.place(torch.device("cpu"))
        assert gpu.live == 0
