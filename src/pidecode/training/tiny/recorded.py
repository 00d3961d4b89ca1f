# SPDX-License-Identifier: Apache-2.0
"""Steps recorded as CUDA graphs: thousands of small kernels then start without a processor asking for each."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WARM_UPS = 3
"""Runs before a record: compilers and libraries choose their kernels in these."""


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
