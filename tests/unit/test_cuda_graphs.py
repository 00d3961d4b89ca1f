# SPDX-License-Identifier: Apache-2.0
"""Captured evaluations: replays for other images equal eager runs; few are kept; refused where they cannot be.

A CPU has no graphs, so a tape stands for one: it keeps the operations of one run with the very tensors they worked on,
and plays them again without any of the network's code, as a graph would.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import recorded
from pidecode.decoder import PixelDecoder
from pidecode.engine.cuda_graphs import MAX_GRAPHS, GraphCache, Replay, capture_on
from pidecode.engine.inplace import denoise, prepare_recomputed
from pidecode.engine.ops.elementwise import CompiledOps
from pidecode.engine.plan import Plan
from pidecode.engine.runner import Runner
from pidecode.engine.timesteps import step_modulation
from pidecode.errors import SettingError
from pidecode.models.pid.network import Condition, PiDNet
from pidecode.options import RuntimeOptions
from pidecode.registry.configs import debug_config
from pidecode.sampling import sample_student
from random_networks import random_net


class Tape(TorchDispatchMode):
    """Records operations and their tensors; `play` runs them again, into the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    @torch.inference_mode()  # in which any tensor may be written to, as by a graph
    def play(self) -> None:
        for func, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder:
    """Captures with tapes, and counts them."""

    def __init__(self) -> None:
        self.captures = 0

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        self.captures += 1
        tape = Tape()
        with tape:
            output = run()

        def replay() -> Tensor:
            tape.play()
            return output

        return replay


def inputs(net: PiDNet, grid: tuple[int, int], seed: int, *, recomputed: bool = False) -> tuple[Tensor, Condition]:
    config, generator, device = net.config, torch.Generator().manual_seed(seed), net.device
    x, text, latent = (
        torch.randn(*shape, generator=generator).to(device)
        for shape in (
            (1, 3, grid[0] * 16, grid[1] * 16),
            (1, 7, config.text_dim),
            (1, config.latent_channels, grid[0] // 2, grid[1] // 2),
        )
    )
    prepare = prepare_recomputed if recomputed else PiDNet.prepare
    return x, prepare(net, grid, text, latent, torch.rand(1, generator=generator).to(device))


@pytest.mark.parametrize("recomputed", [False, True])
@torch.no_grad()
def test_one_graph_serves_all_steps_and_images_of_a_size(recomputed: bool) -> None:
    net, recorder = random_net(debug_config(pixel_depth=2)), Recorder()
    runner, graphs = Runner(net), GraphCache(partial(denoise, net), recorder)
    x, first = inputs(net, (4, 6), 1, recomputed=recomputed)
    other_x, second = inputs(net, (4, 6), 2, recomputed=recomputed)
    for image, condition, time in (
        (x, first, 999.0), (other_x, first, 342.0), (other_x, second, 342.0), (x, first, 866.0)
    ):  # fmt: skip
        t = torch.tensor([time])
        expected = runner.denoise(image, t, condition)
        before = image.clone()
        assert torch.equal(graphs.run(image, runner.modulation_at(t), condition), expected)
        assert torch.equal(image, before)
    assert recorder.captures == 1


@torch.no_grad()
def test_a_prediction_has_memory_of_its_own() -> None:
    net = random_net(debug_config(pixel_depth=2))
    graphs = GraphCache(partial(denoise, net), Recorder())
    x, condition = inputs(net, (2, 2), 1)
    modulation = step_modulation(net, torch.tensor([999.0]))
    first = graphs.run(x, modulation, condition)
    kept = first.clone()
    graphs.run(x * 2, modulation, condition)
    assert torch.equal(first, kept)


@torch.no_grad()
def test_the_latest_sizes_are_kept() -> None:
    net, recorder = random_net(debug_config(pixel_depth=2)), Recorder()
    graphs = GraphCache(partial(denoise, net), recorder)

    def run(grid: tuple[int, int], variant: str = "") -> None:
        x, condition = inputs(net, grid, 1)
        graphs.run(x, step_modulation(net, torch.tensor([999.0])), condition, variant)

    for grid in ((2, 2), (2, 4), (2, 2)):
        run(grid)
    assert recorder.captures == 2
    run((4, 2))
    assert (recorder.captures, len(graphs)) == (3, MAX_GRAPHS)
    run((2, 2))  # used later than (2, 4), so it stayed
    assert recorder.captures == 3
    run((2, 2), "another attention kernel")
    assert recorder.captures == 4


def test_a_graph_does_not_keep_an_image_s_condition_alive() -> None:
    from weakref import ref

    net = random_net(debug_config(pixel_depth=2))
    graphs = GraphCache(partial(denoise, net), Recorder())
    with torch.inference_mode():
        x, condition = inputs(net, (2, 2), 1)
        graphs.run(x, step_modulation(net, torch.tensor([999.0])), condition)
        last = ref(condition)
        del condition
        assert last() is None
    with torch.no_grad():  # what was captured in inference mode may be used outside of it
        x, condition = inputs(net, (2, 2), 2)
        graphs.run(x, step_modulation(net, torch.tensor([999.0])), condition)


def test_the_runner_replays_and_forgets_with_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    net, recorder = random_net(debug_config(pixel_depth=2)), Recorder()
    runner, plain = Runner(net, distilled=True, cuda_graphs=True), Runner(net, distilled=True)
    monkeypatch.setattr("pidecode.engine.runner.supports_cuda_graphs", lambda device: True)
    monkeypatch.setattr("pidecode.engine.runner.capture_on", lambda device: recorder)
    noise = [torch.randn(1, 3, 32, 32) for _ in range(4)]
    images = []
    with torch.inference_mode():
        text, latent = torch.randn(1, 7, net.config.text_dim), torch.randn(1, net.config.latent_channels, 1, 1)
        for each in (runner, plain):
            draws = iter(noise)
            condition = each.prepare((2, 2), text, latent, torch.zeros(1))
            images.append(sample_student(each.predict(condition), lambda draws=draws: next(draws)))
    assert torch.equal(*images)
    assert recorder.captures == 2  # one to compare with, one for the image
    assert runner.graph_cache is not None
    runner.forget()
    assert runner.graph_cache is None


def test_graphs_are_refused_where_they_cannot_act(monkeypatch: pytest.MonkeyPatch) -> None:
    net = random_net(debug_config(pixel_depth=2))
    with pytest.raises(SettingError, match="need a CUDA device, and this decoder runs on cpu"):
        Runner(net, cuda_graphs=True).require(net.device)
    monkeypatch.setattr("pidecode.engine.runner.supports_cuda_graphs", lambda device: True)
    with pytest.raises(SettingError, match="windows"):
        Runner(net, Plan(size=(64, 64), window=32), cuda_graphs=True).require(net.device)
    with pytest.raises(SettingError, match="on the host"):
        Runner(net, Plan(size=(64, 64), offload=("blocks",)), cuda_graphs=True).require(net.device)
    runner = Runner(net, cuda_graphs=True)
    x, condition = inputs(net, (2, 2), 1)
    with pytest.raises(SettingError, match="inference_mode"):
        runner.predict(condition)(x, torch.tensor([999.0]))
    net.patch_blocks[0].attn.proj_x.base_layer = torch.nn.Identity()  # as peft wraps a layer
    with pytest.raises(SettingError, match="adapters"):
        runner.require(net.device)


def test_what_differs_or_fails_on_a_small_image_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    net = random_net(debug_config(pixel_depth=2))
    monkeypatch.setattr("pidecode.engine.runner.supports_cuda_graphs", lambda device: True)
    plain, (x, condition) = Runner(net), inputs(net, (2, 2), 1)
    with torch.inference_mode():
        expected = plain.denoise(x, torch.tensor([999.0]), condition)

    def broken(run: Callable[[], Tensor]) -> Replay:
        raise SettingError("no stream is capturing.")

    def stale(run: Callable[[], Tensor]) -> Replay:
        first = run()
        return lambda: first  # whatever its inputs hold now

    for capture, reason in ((broken, "no stream is capturing"), (stale, "the result is .* off")):
        monkeypatch.setattr("pidecode.engine.runner.capture_on", lambda device, capture=capture: capture)
        runner = Runner(net, cuda_graphs=True)
        with torch.inference_mode(), pytest.warns(UserWarning, match=f"CUDA graphs do not work on cpu: {reason}"):
            out = runner.predict(condition)(x, torch.tensor([999.0]))
        assert torch.equal(out, expected) and runner.cuda_graphs is False
        runner.predict(condition)  # warns once

    class WrongOps(CompiledOps):
        def run(self, body: Callable[..., Any], *arguments: Any) -> Any:
            return arguments[0].zero_() if body.__name__ == "_silu_times_" else super().run(body, *arguments)

    runner = Runner(net, compile=True)
    runner.compiled_ops = WrongOps("eager")
    with torch.inference_mode(), pytest.warns(UserWarning, match="Compiled ops do not work on cpu: the result is"):
        out = runner.predict(condition)(x, torch.tensor([999.0]))
    assert torch.equal(out, expected) and runner.compiled_ops is None


def test_compiling_brings_graphs_where_they_can_act(monkeypatch: pytest.MonkeyPatch) -> None:
    net = random_net(debug_config(pixel_depth=2))
    assert not Runner(net, cuda_graphs=None)._uses_graphs()
    monkeypatch.setattr("pidecode.engine.runner.supports_cuda_graphs", lambda device: True)
    assert Runner(net, cuda_graphs=None)._uses_graphs()
    assert not Runner(net, Plan(size=(64, 64)), cuda_graphs=None)._uses_graphs()


@pytest.mark.gpu
@pytest.mark.parametrize("compile", [False, True])
@torch.inference_mode()
def test_a_graph_equals_the_eager_path(compile: bool) -> None:
    net, device = random_net(debug_config(pixel_depth=2)).cuda(), torch.device("cuda")
    eager, graphs = Runner(net), GraphCache(partial(denoise, net), capture_on(device))
    for seed, time in ((1, 999.0), (1, 342.0), (2, 634.0)):
        x, condition = inputs(net, (4, 6), seed)
        t = torch.tensor([time])
        expected = eager.denoise(x, t, condition)
        actual = graphs.run(x, eager.modulation_at(t), condition)
        assert ((actual - expected).abs().max() / expected.abs().max()).item() < 5e-6
    runner = Runner(net, cuda_graphs=True, compile=compile)
    x, condition = inputs(net, (4, 6), 3)
    expected = eager.denoise(x, t, condition)
    predict = runner.predict(condition)
    for _ in range(2):
        assert ((predict(x, t) - expected).abs().max() / expected.abs().max()).item() < 5e-5


def test_a_decoder_takes_runtime_options_and_refuses_what_cannot_act(tmp_path: Path) -> None:
    path, random = tmp_path / "pid.safetensors", recorded.random_decoder("flux2", "student")
    save_file(dict(random.net.state_dict()), path, random.metadata.to_metadata())
    with pytest.raises(SettingError, match="need a CUDA device"):
        PixelDecoder.from_pretrained(path, device="cpu", runtime=RuntimeOptions(cuda_graphs=True))
    decoder = PixelDecoder.from_pretrained(path, device="cpu", runtime=RuntimeOptions(compile=True))
    assert isinstance(decoder.runner, Runner)
    assert decoder.runner.compiled_ops is not None and decoder.runner.cuda_graphs is None
    assert not decoder.runner._uses_graphs()
