# SPDX-License-Identifier: Apache-2.0
"""CUDA graph capture and replay of one evaluation. Experimental: no gain was measured on a GPU yet.

A graph holds addresses, not values. So all that differs from step to step, or between images of one size (the noisy
image, the modulation of its time, the condition made of its latent and prompt), is copied into tensors of the graph's
own before each replay, and the prediction out of one afterwards. Random draws and decisions on the host stay outside,
between evaluations. See https://pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from copy import deepcopy
from dataclasses import fields, is_dataclass, replace
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from pidecode.engine.timesteps import StepModulation
from pidecode.errors import SettingError
from pidecode.models.pid.network import Condition

Evaluate = Callable[[Tensor, StepModulation, Condition], Tensor]
Inputs = tuple[Tensor, StepModulation, Condition]  # everything an evaluation reads beside the weights
Replay = Callable[[], Tensor]  # runs captured work on what its static inputs hold now; the same output tensor each time
Capture = Callable[[Callable[[], Tensor]], Replay]  # captures the work of a function; tests have one without a GPU

MAX_GRAPHS = 2  # graphs kept at once. Each holds its inputs, its output and the memory of one evaluation.
WARM_UPS = 2  # evaluations before one is captured, in which kernels are loaded, chosen and compiled


class GraphCache:
    """Captured evaluations of one network, least recently used sizes dropped first."""

    def __init__(self, evaluate: Evaluate, capture: Capture) -> None:
        self._evaluate, self._capture = evaluate, capture
        self._graphs: OrderedDict[Hashable, _CapturedGraph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def run(self, x: Tensor, modulation: StepModulation, condition: Condition, variant: Hashable = None) -> Tensor:
        """Evaluate these inputs, capturing a graph first if there is none for their shapes and the `variant`.

        The condition is the same object at each step of an image, so that it is copied once.
        """
        inputs = x, modulation, replace(condition, color=None)
        key = (variant, *map(_key, _leaves(inputs)))
        if key in self._graphs:
            self._graphs.move_to_end(key)
        else:
            while len(self._graphs) >= MAX_GRAPHS:
                self._graphs.popitem(last=False)  # before the new one takes its memory
            self._graphs[key] = _CapturedGraph(inputs, self._evaluate, self._capture)
        return self._graphs[key].run(inputs, condition)


class _CapturedGraph:
    """One captured evaluation and its static input tensors."""

    def __init__(self, inputs: Inputs, evaluate: Evaluate, capture: Capture) -> None:
        # Ordinary tensors even in inference mode: they outlive the image, and may be written to in any mode.
        with torch.inference_mode(False), torch.no_grad():
            # Tensors are cloned, once each; what else there is, such as a gate's module, is shared.
            clones = {id(leaf): leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in _leaves(inputs)}
            static = self.static = deepcopy(inputs, clones)
        self._replay = capture(lambda: evaluate(*static))
        self._condition: ref[Condition] | None = None

    def run(self, inputs: Inputs, source: Condition) -> Tensor:
        """Copy in what is new, replay, copy out."""
        _copy(self.static[:2], inputs[:2])
        if self._condition is None or self._condition() is not source:
            _copy(self.static[2], inputs[2])
            self._condition = ref(source)
        return self._replay().clone()


def _copy(into: object, out_of: object) -> None:
    pairs = {id(a): (a, b) for a, b in zip(_leaves(into), _leaves(out_of), strict=True) if isinstance(a, Tensor)}
    with torch.no_grad():
        for target, source in pairs.values():
            target.copy_(source)


def _leaves(value: object) -> Iterator[Any]:
    """What a value made of dataclasses and tuples holds, in order; a tensor that occurs twice comes twice."""
    if isinstance(value, tuple):
        for item in value:
            yield from _leaves(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _leaves(getattr(value, field.name))
    else:
        yield value


def _key(leaf: Any) -> Hashable:
    """Equal for two leaves that differ in nothing but the numbers in a tensor."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.device
    return leaf if isinstance(leaf, int | float | str | None) else id(leaf)


def capture_on(device: torch.device) -> Capture:
    """Capture work on a CUDA device as a graph; the result raises SettingError if something in it cannot be."""

    def capture(run: Callable[[], Tensor]) -> Replay:
        with torch.cuda.device(device):
            side, current = torch.cuda.Stream(), torch.cuda.current_stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    run()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    output = run()
            except RuntimeError as error:
                first = str(error).partition("\n")[0] or type(error).__name__
                raise SettingError(
                    f"One evaluation could not be captured as a CUDA graph on {device}: {first} Leave CUDA graphs out."
                ) from error

        def replay() -> Tensor:
            with torch.cuda.device(device):
                graph.replay()
            return output

        return replay

    return capture
