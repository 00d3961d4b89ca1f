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
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar
from weakref import ref

import torch
from torch import Tensor

from pidecode.engine.timesteps import StepModulation
from pidecode.errors import SettingError
from pidecode.models.pid.network import Condition

Evaluate = Callable[[Tensor, StepModulation, Condition], Tensor]
Replay = Callable[[], Tensor]  # runs captured work on what its static inputs hold now; the same output tensor each time
Capture = Callable[[Callable[[], Tensor]], Replay]  # captures the work of a function; tests have one without a GPU

MAX_GRAPHS = 2  # graphs kept at once. Each holds its inputs, its output and the memory of one evaluation.
WARM_UPS = 2  # evaluations before one is captured, in which kernels are loaded, chosen and compiled

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything an evaluation reads beside the weights."""

    x: Tensor
    modulation: StepModulation
    condition: Condition


class GraphCache:
    """Captured evaluations of one network, least recently used sizes dropped first."""

    def __init__(self, evaluate: Evaluate, capture: Capture) -> None:
        self._evaluate, self._capture = evaluate, capture
        self._graphs: OrderedDict[Hashable, _CapturedGraph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def clear(self) -> None:
        """Drop all graphs, as is needed when weights move or change."""
        self._graphs.clear()

    def run(self, x: Tensor, modulation: StepModulation, condition: Condition, variant: Hashable = None) -> Tensor:
        """Evaluate these inputs, capturing a graph first if there is none for their shapes and the `variant`.

        The condition is the same object at each step of an image, so that it is copied once.
        """
        inputs = Inputs(x, modulation, replace(condition, color=None))
        key = (variant, shape_of(inputs))
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
            static = self.static = duplicate(inputs)
        self._replay = capture(lambda: evaluate(static.x, static.modulation, static.condition))
        self._condition: ref[Condition] | None = None

    def run(self, inputs: Inputs, source: Condition) -> Tensor:
        """Copy in what is new, replay, copy out."""
        _copy((self.static.x, self.static.modulation), (inputs.x, inputs.modulation))
        if self._condition is None or self._condition() is not source:
            _copy(self.static.condition, inputs.condition)
            self._condition = ref(source)
        return self._replay().clone()


def _copy(into: object, out_of: object) -> None:
    pairs = {id(a): (a, b) for a, b in zip(tensors_in(into), tensors_in(out_of), strict=True)}
    with torch.no_grad():
        for target, source in pairs.values():
            target.copy_(source)


def tensors_in(value: object) -> Iterator[Tensor]:
    """Tensors of a value made of dataclasses and tuples, in order; one that occurs twice comes twice."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def shape_of(value: object) -> Hashable:
    """A key equal for two values that differ in nothing but the numbers in their tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, tuple):
        return tuple(shape_of(item) for item in value)
    if is_dataclass(value):
        return type(value), tuple(shape_of(getattr(value, field.name)) for field in fields(value))
    return value if isinstance(value, int | float | str | None) else id(value)


def duplicate(value: T, seen: dict[int, Tensor] | None = None) -> T:
    """The same value with cloned tensors; one that occurs twice is cloned once."""
    seen = {} if seen is None else seen
    copy: Any = value
    if isinstance(value, Tensor):
        copy = seen.setdefault(id(value), value.clone())
    elif isinstance(value, tuple):
        copy = tuple(duplicate(item, seen) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        clones = {field.name: duplicate(getattr(value, field.name), seen) for field in fields(value)}
        copy = replace(value, **clones)
    return copy  # type: ignore[no-any-return]


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
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise SettingError(
                    f"One evaluation could not be captured as a CUDA graph on {device}: {first} Leave CUDA graphs out."
                ) from error

        def replay() -> Tensor:
            with torch.cuda.device(device):
                graph.replay()
            return output

        return replay

    return capture
