# SPDX-License-Identifier: Apache-2.0
"""CUDA graph capture and replay of one evaluation.

A recording (a CUDA graph) knows addresses, not values. So all that differs from step to step or from image to
image of one size (the noisy image, the vectors of its time, what its latent and prompt became) is copied into
tensors of the recording's own before each replay, and the answer out of one afterwards. Random draws and everything
decided on the host happen outside, between evaluations. How work is recorded is a function, `cuda_graph` in earnest.
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
Replay = Callable[[], Tensor]
"""Does recorded work again on what the recording's tensors hold now; gives the same tensor each time."""
Record = Callable[[Callable[[], Tensor]], Replay]

MOST_KEPT = 2
"""GraphCache held at once. Each keeps its inputs, its answer and the memory of one evaluation."""
WARM_UPS = 2
"""Evaluations before one is recorded: kernels are loaded, chosen and compiled where that may still wait."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that an evaluation reads beside the weights."""

    x: Tensor
    vectors: StepModulation
    condition: Condition


class GraphCache:
    """Recorded evaluations of one network, the latest sizes kept."""

    def __init__(self, evaluate: Evaluate, record: Record) -> None:
        self._evaluate, self._record = evaluate, record
        self._kept: OrderedDict[Hashable, _CapturedGraph] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def clear(self) -> None:
        """Forget all, as must be when weights move or change."""
        self._kept.clear()

    def run(self, x: Tensor, vectors: StepModulation, condition: Condition, variant: Hashable = None) -> Tensor:
        """The evaluation of these inputs, recorded first if none of their shapes was. The answer is the caller's own.

        condition: the same object at each step of an image, so that it is copied once.
        variant: what else a recording depends on, such as the attention kernel.
        """
        inputs = Inputs(x, vectors, replace(condition, schedule=None, color=None))
        key = (variant, shape_of(inputs))
        if key in self._kept:
            self._kept.move_to_end(key)
        else:
            while len(self._kept) >= MOST_KEPT:
                self._kept.popitem(last=False)  # before the new one takes its memory
            self._kept[key] = _CapturedGraph(inputs, self._evaluate, self._record)
        return self._kept[key].run(inputs, condition)


class _CapturedGraph:
    """One recorded evaluation and the tensors it reads."""

    def __init__(self, inputs: Inputs, evaluate: Evaluate, record: Record) -> None:
        # Ordinary tensors even in inference mode: they outlive the image, and may be written to in any mode.
        with torch.inference_mode(False), torch.no_grad():
            held = self.held = duplicate(inputs)
        self._replay = record(lambda: evaluate(held.x, held.vectors, held.condition))
        self._holds: ref[Condition] | None = None

    def run(self, inputs: Inputs, source: Condition) -> Tensor:
        """Copy in what is new, replay, copy out."""
        _copy((self.held.x, self.held.vectors), (inputs.x, inputs.vectors))
        if self._holds is None or self._holds() is not source:
            _copy(self.held.condition, inputs.condition)
            self._holds = ref(source)
        return self._replay().clone()


def _copy(into: object, out_of: object) -> None:
    pairs = {id(a): (a, b) for a, b in zip(tensors_in(into), tensors_in(out_of), strict=True)}
    with torch.no_grad():
        for mine, given in pairs.values():
            mine.copy_(given)


def tensors_in(value: object) -> Iterator[Tensor]:
    """Tensors of a value made of dataclasses and tuples, in order; one that is held twice comes twice."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from tensors_in(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from tensors_in(getattr(value, field.name))


def shape_of(value: object) -> Hashable:
    """What two values have in common if one can take the other's place: all but the numbers in their tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype, value.device
    if isinstance(value, tuple):
        return tuple(shape_of(item) for item in value)
    if is_dataclass(value):
        return type(value), tuple(shape_of(getattr(value, field.name)) for field in fields(value))
    return value if isinstance(value, int | float | str | None) else id(value)


def duplicate(value: T, seen: dict[int, Tensor] | None = None) -> T:
    """The same value with tensors of its own; one that was held twice still is."""
    seen = {} if seen is None else seen
    copy: Any = value
    if isinstance(value, Tensor):
        copy = seen.setdefault(id(value), value.clone())
    elif isinstance(value, tuple):
        copy = tuple(duplicate(item, seen) for item in value)
    elif is_dataclass(value) and not isinstance(value, type):
        made = {field.name: duplicate(getattr(value, field.name), seen) for field in fields(value)}
        copy = replace(value, **made)
    return copy  # type: ignore[no-any-return]


def cuda_graph(device: torch.device) -> Record:
    """Record work on a CUDA device as a graph of its own.

    The recorder raises SettingError if something in the work cannot be recorded.
    """

    def record(run: Callable[[], Tensor]) -> Replay:
        with torch.cuda.device(device):
            apart, present = torch.cuda.Stream(), torch.cuda.current_stream()
            apart.wait_stream(present)
            with torch.cuda.stream(apart):
                for _ in range(WARM_UPS):
                    run()
            present.wait_stream(apart)
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph):
                    answer = run()
            except RuntimeError as error:
                first = (str(error).splitlines() or [type(error).__name__])[0]
                raise SettingError(
                    f"One evaluation could not be recorded as a graph on {device}: {first} Run without graphs."
                ) from error

        def replay() -> Tensor:
            with torch.cuda.device(device):
                graph.replay()
            return answer

        return replay

    return record
