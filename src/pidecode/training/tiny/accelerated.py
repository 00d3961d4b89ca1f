# SPDX-License-Identifier: Apache-2.0
"""What makes a training step fast on an accelerator: fixed matrices, compiled blocks, steps recorded as CUDA graphs.

A step of the unrolled stage is thousands of small kernels; recorded, they start without a processor asking for each.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

import torch
import torch.fx.experimental._config
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.metrics import WINDOW, similarity, window_line
from pidecode.models import tiny as encoder
from pidecode.models.pid import adapter
from pidecode.training.tiny.cache import SCALE

WARM_UPS = 3
"""Runs before a record: compilers and libraries choose their kernels in these."""


class Matrices:
    """Shrinking and blurring as products with fixed matrices: many times faster on an accelerator than as they are."""

    def __init__(self, side: int, device: torch.device) -> None:
        unit = torch.eye(side, device=device)[None, None]
        self.shrinking = F.interpolate(unit, size=(side // SCALE, side), mode="bicubic", antialias=True)[0, 0]
        line = window_line(torch.float32, device)
        self.blurring = torch.zeros(side - WINDOW + 1, side, device=device)
        for offset in range(WINDOW):
            self.blurring.diagonal(offset).fill_(line[offset])

    def shrunk(self, image: Tensor) -> Tensor:
        """`model.regressor.shrunk` of square images."""
        return self.shrinking @ image.clamp(-1, 1) @ self.shrinking.mT

    def similarity(self, made: Tensor, wanted: Tensor) -> Tensor:
        """`measure.metrics.ssim` in float32; images in [-1,1]."""

        def blur(x: Tensor) -> Tensor:
            return self.blurring @ x @ self.blurring.mT

        return similarity((made + 1) / 2, (wanted + 1) / 2, blur)


def keep_exact(*modules: nn.Module) -> None:
    """Let these compute in float32 inside bfloat16 surroundings: what they give is a latent, or an image."""

    def exact(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return forward(x.float())

    for module in modules:
        module.forward = functools.partial(exact, module.forward)


def edged(x: Tensor) -> Tensor:
    """`x` [B,C,H,W] with its outermost rows and columns once more around it.

    The framework's own padding of this kind adds up its gradient place by place and in another order of memory.
    """
    x = torch.cat((x[:, :, :1], x, x[:, :, -1:]), dim=2)
    return torch.cat((x[..., :1], x, x[..., -1:]), dim=3)


def pad_by_joining(network: nn.Module) -> None:
    """Let every convolution that repeats its input's edges do so by `edged`."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and module.padding_mode == "replicate":
            module.forward = functools.partial(_convolved, module)  # type: ignore[method-assign]


def _convolved(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return F.conv2d(edged(x), conv.weight, conv.bias)


def compile_blocks(network: nn.Module) -> None:
    """Compile residual blocks one by one and for any size, when they first run: dozens of them, but few kinds."""
    for module in network.modules():
        if isinstance(module, (adapter.ResidualBlock, encoder.ResidualBlock)):
            module.compile(dynamic=True)


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """The compiler's settings while such blocks run, as they were afterwards; what was compiled before is forgotten.

    The blocks of the stage before would count toward the limit, and those of two stages are too many.
    """
    torch._dynamo.reset()
    # As many crops as a crop has pixels is a coincidence, not a shape.
    shapes = torch.fx.experimental._config.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    with torch._dynamo.config.patch(recompile_limit=64), shapes:
        yield


class Recorded:
    """A step that runs a few times as it is, is recorded, and from then on replayed; for each of its arguments apart.

    What it computes must follow from its arguments and from tensors that stay where they are, and must not wait for
    the device. All its runs are real ones: nothing is computed twice or thrown away, but recording runs nothing.
    """

    def __init__(self, step: Callable[..., Tensor]) -> None:
        self.step = step
        self.runs: dict[tuple[int, ...], int] = {}
        self.records: dict[tuple[int, ...], tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self.stream = torch.cuda.Stream()

    def __call__(self, *arguments: int) -> Tensor:
        """What the step returns; the same memory each time once it is recorded."""
        if arguments not in self.records:
            if self.runs.get(arguments, 0) < WARM_UPS:
                self.runs[arguments] = self.runs.get(arguments, 0) + 1
                return self._aside(arguments)
            self._record(arguments)
        graph, result = self.records[arguments]
        graph.replay()
        return result

    def _aside(self, arguments: tuple[int, ...]) -> Tensor:
        """A run on the stream that recording uses."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.step(*arguments)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def _record(self, arguments: tuple[int, ...]) -> None:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            result = self.step(*arguments)
        self.records[arguments] = (graph, result)
