# SPDX-License-Identifier: Apache-2.0
"""Block offloading: patch blocks stay on the host and are prefetched to the device one ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn


class BlockOffloader:
    """Keeps blocks on the host and copies each to the device while it runs.

    Where the device has streams, the next block is copied while the present one computes: the cost is then whichever
    is longer, the block's computation or the copy of its weights.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.device = device
        self.blocks: list[nn.Module] = list(blocks)
        self.on_host: list[list[Tensor]] = []  # the tensors of each block
        pinned = device.type not in ("cpu", "meta")  # the meta device, where memory is only counted, is its own host
        for block in self.blocks:
            block.to("meta" if device.type == "meta" else "cpu")
            self.on_host.append([t.data.pin_memory() if pinned else t.data for t in _tensors(block)])
        self._stream = torch.Stream(device) if pinned else None
        self._resident: dict[int, tuple[list[Tensor], torch.Event | None]] = {}

    @contextmanager
    def resident(self, index: int) -> Iterator[None]:
        """Have block `index` on the device inside the `with`, while the one after it is prefetched."""
        self._prefetch(index)
        self._prefetch((index + 1) % len(self.blocks))
        tensors, event = self._resident[index]
        if event is not None:
            torch.accelerator.current_stream(self.device).wait_event(event)
        self._assign(index, tensors)
        try:
            yield
        finally:
            self._assign(index, self.on_host[index])
            del self._resident[index]

    def _prefetch(self, index: int) -> None:
        if index in self._resident:
            return
        host = self.on_host[index]
        if self._stream is None:
            self._resident[index] = [tensor.clone() for tensor in host], None
            return
        # The copy may overtake work that still reads memory it is given, so it waits for what is queued now.
        compute = torch.accelerator.current_stream(self.device)
        self._stream.wait_stream(compute)
        torch.accelerator.set_stream(self._stream)
        try:
            sent = [tensor.to(self.device, non_blocking=True) for tensor in host]
        finally:
            torch.accelerator.set_stream(compute)
        for tensor in sent:
            tensor.record_stream(compute)
        self._resident[index] = sent, self._stream.record_event()

    def _assign(self, index: int, values: list[Tensor]) -> None:
        for tensor, value in zip(_tensors(self.blocks[index]), values, strict=True):
            tensor.data = value


def _tensors(block: nn.Module) -> Iterator[Tensor]:
    return chain(block.parameters(), block.buffers())
