# SPDX-License-Identifier: Apache-2.0
"""A GPU for tests: tensors that say they are on "cuda" lie in main memory, and every allocation on it is counted."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

CPU = torch.device("cpu")
TRANSFERS = ("aten._to_copy", "aten._has_compatible", "aten.index", "aten.copy_", "aten.clone", "aten.detach")


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor)]


class SmallGPU:
    """Counts what is on it.

    Attributes:
        live: Bytes of its tensors now.
        peak: Highest `live` since it was last set.
    """

    device = torch.device("cuda", 0)

    def __init__(self, total: int = 1 << 40) -> None:
        self.total = total
        self.live = self.peak = 0
        self._held: dict[int, Any] = {}

    def holds(self, tensor: Tensor) -> bool:
        return id(tensor.untyped_storage()) in self._held

    def take(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = id(storage), storage.nbytes()
        if key in self._held:
            return

        def free(_reference: Any) -> None:
            if self._held.pop(key, None) is not None:
                self.live -= size

        self._held[key] = weakref.ref(storage, free)
        self.live += size
        self.peak = max(self.peak, self.live)

    def modules_on(self, **modules: Any) -> set[str]:
        """Names of those modules of which any weight is here."""
        return {
            name for name, module in modules.items()
            if module is not None and any(self.holds(weight) for weight in module.parameters())
        }  # fmt: skip

    @contextmanager
    def present(self) -> Iterator[SmallGPU]:
        """Let the device exist."""
        memory = {
            "mem_get_info": lambda _device=None: (self.total - self.live, self.total),
            "memory_reserved": lambda _device=None: self.live,
            "memory_allocated": lambda _device=None: self.live,
        }
        with ExitStack() as stack:
            for name, function in memory.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, function))
            stack.enter_context(mock.patch("pidecode.sampling.copies_from_pinned_memory", return_value=False))
            stack.enter_context(_Functions(self))
            stack.enter_context(_Allocations(self))
            yield self


class _Allocations(TorchDispatchMode):
    """What is computed from tensors on the device is on the device."""

    def __init__(self, gpu: SmallGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors_in((args, kwargs or {}))
        here = [tensor for tensor in given if self.gpu.holds(tensor)]
        if here and not str(func).startswith(TRANSFERS):
            elsewhere = [tensor for tensor in given if tensor.ndim and not self.gpu.holds(tensor)]
            assert not elsewhere, f"{func} has tensors on two devices: {[list(t.shape) for t in given]}"
        result = func(*args, **(kwargs or {}))
        if here and not (str(func).startswith("aten.copy_") and not self.gpu.holds(args[0])):
            for tensor in tensors_in(result):
                self.gpu.take(tensor)
        return result


class _Functions(TorchFunctionMode):
    """Devices named "cuda" in calls, and `Tensor.device`."""

    def __init__(self, gpu: SmallGPU) -> None:
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return self.gpu.device if self.gpu.holds(args[0]) else func(*args)
        if func is torch.Tensor.pin_memory:
            return args[0]
        kwargs.pop("pin_memory", None)
        if func is torch.Tensor.cpu:
            func, args = torch.Tensor.to, (args[0], CPU)
        if func is torch.Tensor.to:
            return self._moved(args, kwargs)
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return func(*args, **kwargs)
        result = func(*args, **kwargs | {"device": CPU})
        for tensor in tensors_in(result):
            self.gpu.take(tensor)
        return result

    def _moved(self, args: Any, kwargs: dict[str, Any]) -> Tensor:
        source, *rest = args
        target = None
        for index, value in enumerate([*rest, kwargs.get("device"), kwargs.get("other")]):
            if isinstance(value, Tensor):
                target = self.gpu.device if self.gpu.holds(value) else CPU
            elif isinstance(value, (str, torch.device)):
                target = torch.device(value)
            else:
                continue
            if index < len(rest) and not isinstance(value, Tensor):
                rest[index] = CPU
        if "device" in kwargs and kwargs["device"] is not None:
            kwargs["device"] = CPU
        was = self.gpu.holds(source)
        moves = target is not None and (target.type == "cuda") != was
        result = torch.Tensor.to(source, *rest, **kwargs)
        if not moves:
            if was:
                self.gpu.take(result)
            return result
        # A copy whose storage is of the other device.
        with torch._C._DisableTorchDispatch():
            result = result.detach().clone(memory_format=torch.preserve_format)
        if target.type == "cuda":
            self.gpu.take(result)
        return result
