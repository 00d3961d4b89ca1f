# SPDX-License-Identifier: Apache-2.0
"""Compiled ops: equal to the eager ones, compiled once for all sizes, kept between processes, refused with a reason."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter

import recorded
from pidecode.cli.app import cli
from pidecode.devices import require_compiler
from pidecode.engine.inplace import denoise
from pidecode.engine.machine import Chunks
from pidecode.engine.ops import elementwise
from pidecode.engine.ops.elementwise import CompiledOps
from pidecode.engine.timesteps import step_modulation
from pidecode.errors import MissingDependencyError, SettingError
from pidecode.models.pid.network import Condition, PiDNet
from pidecode.registry.configs import debug_config
from random_networks import random_net


def inputs(net: PiDNet, grid: tuple[int, int]) -> tuple[Tensor, Condition]:
    config, generator = net.config, torch.Generator().manual_seed(1)
    x = torch.randn(1, 3, grid[0] * 16, grid[1] * 16, generator=generator)
    text = torch.randn(1, 7, config.text_dim, generator=generator)
    latent = torch.randn(1, config.latent_channels, grid[0] // 2, grid[1] // 2, generator=generator)
    return x, net.prepare(grid, text, latent, torch.zeros(1))


@torch.inference_mode()
def apart(net: PiDNet, grid: tuple[int, int], ops: CompiledOps) -> float:
    x, condition = inputs(net, grid)
    t = torch.tensor([634.0])
    chunks, modulation = Chunks(tokens=8, tile_tokens=8, tile_rows=4), step_modulation(net, t)
    eager = denoise(net, x, modulation, condition, chunks=chunks)
    with elementwise.compiled_ops(ops):
        compiled = denoise(net, x, modulation, condition, chunks=chunks)
    return ((compiled - eager).abs().max() / eager.abs().max()).item()


def test_a_image_of_another_size_compiles_nothing() -> None:
    counter = CompileCounter()  # type: ignore[no-untyped-call]
    ops, net = CompiledOps(counter), random_net(debug_config(pixel_depth=2))
    assert apart(net, (4, 6), ops) < 5e-6
    first = counter.frame_count
    assert first
    for grid in ((6, 6), (2, 8), (8, 4)):
        assert apart(net, grid, ops) < 5e-6
    assert counter.frame_count == first


def test_each_network_has_its_own_share_of_what_the_framework_compiles() -> None:
    # One more than the framework compiles of one piece of code.
    counters = [CompileCounter() for _ in range(9)]  # type: ignore[no-untyped-call]
    for width, counter in enumerate(counters, start=2):
        x = torch.ones(3, width)
        with elementwise.compiled_ops(CompiledOps(counter)):
            elementwise.add_gated_(x, torch.ones(3, width), torch.ones(width))
        assert x.eq(2).all()
        assert counter.frame_count == 1


def test_narrow_types_round_once() -> None:
    x, other = torch.randn(2, 5, 12).bfloat16()
    wide = torch.nn.functional.silu(x.float()) * other.float()
    with elementwise.compiled_ops(CompiledOps("eager")):
        assert torch.equal(elementwise.silu_times_(x, other), wide.bfloat16())
    stream, shift = torch.randn(5, 12), torch.randn(12)
    plain = elementwise.norm_modulate(stream, shift, shift, torch.bfloat16)
    with elementwise.compiled_ops(CompiledOps("eager")):
        fused = elementwise.norm_modulate(stream, shift, shift, torch.bfloat16)
    assert torch.allclose(fused.float(), plain.float(), rtol=1e-2)


def test_what_cannot_be_compiled_says_so() -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such instruction")

    said = pytest.raises(SettingError, match=r"add_gated for cpu failed: .*no such instruction.*Run without compiling")
    with said, elementwise.compiled_ops(CompiledOps(broken)):
        elementwise.add_gated_(torch.ones(2, 3), torch.ones(2, 3), torch.ones(3))


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(MissingDependencyError, match=r"no-such-compiler is not on this machine.*without compiling"):
        require_compiler(torch.device("cpu"))
    monkeypatch.setattr("pidecode.devices.find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"needs triton"):
        require_compiler(torch.device("cuda"))


def test_a_command_that_cannot_compile_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    path, random = tmp_path / "pid.safetensors", recorded.random_decoder("flux2", "student")
    save_file(dict(random.net.state_dict()), path, random.metadata.to_metadata())
    image = str(next((root / "docs/images").glob("*.png")))
    done = CliRunner().invoke(cli, ["upscale", image, "-m", str(path), "--compile", "--device", "cpu"])
    assert done.exit_code == MissingDependencyError.exit_code
    assert "no-such-compiler is not on this machine" in done.output


PROBE = """
import json, sys, torch
from torch._dynamo.utils import counters
from pidecode.engine.ops.elementwise import CompiledOps, add_gated_, compiled_ops
x = torch.arange(24.0).view(4, 6)
with compiled_ops(CompiledOps()):
    add_gated_(x, torch.ones(4, 6), torch.ones(6))
assert torch.equal(x, torch.arange(24.0).view(4, 6) + 1)
print(json.dumps({name: counters["inductor"][name] for name in ("fxgraph_cache_hit", "fxgraph_cache_miss")}))
"""


@pytest.mark.slow
def test_the_next_process_finds_what_was_compiled(tmp_path: Path) -> None:
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}

    def probe() -> dict[str, int]:
        done = subprocess.run(
            [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True
        )
        return dict(json.loads(done.stdout.splitlines()[-1]))

    assert probe()["fxgraph_cache_miss"] >= 1
    assert probe() == {"fxgraph_cache_hit": 1, "fxgraph_cache_miss": 0}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_the_framework_s_compiler_agrees() -> None:
    ops, net = CompiledOps(), random_net(debug_config(pixel_depth=2))
    assert apart(net, (4, 6), ops) < 5e-6
    assert apart(net, (6, 4), ops) < 5e-6
