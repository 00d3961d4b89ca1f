# SPDX-License-Identifier: Apache-2.0
"""Block offloading: patch blocks stay on the host and are prefetched to the device one ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class BlockOffloader:
    """Blocks whose tensors stay on the host; each is on the device while it works.

    Where the device has streams, the next block is copied while the present one computes: the cost is then whichever
    is longer, the block's work or the passage of its weights.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device) -> None:
        self.device = device
        self.blocks: list[nn.Module] = list(blocks)
        self.at_home: list[dict[str, Tensor]] = []
        travels = device.type not in ("cpu", "meta")  # where memory is only counted, home is on the meta device too
        for block in self.blocks:
            block.to("meta" if device.type == "meta" else "cpu")
            held = {name: tensor.data for name, tensor in _tensors(block)}
            self.at_home.append({name: t.pin_memory() if travels else t for name, t in held.items()})
        self._stream = torch.Stream(device) if travels else None
        self._arrived: dict[int, tuple[dict[str, Tensor], torch.Event | None]] = {}

    @contextmanager
    def resident(self, index: int) -> Iterator[None]:
        """Have block `index` on the device within the `with`, and the one after it on its way."""
        self._send(index)
        self._send((index + 1) % len(self.blocks))
        tensors, event = self._arrived[index]
        if event is not None:
            torch.accelerator.current_stream(self.device).wait_event(event)
        self._put(index, tensors)
        try:
            yield
        finally:
            self._put(index, self.at_home[index])
            del self._arrived[index]

    def _send(self, index: int) -> None:
        if index in self._arrived:
            return
        home = self.at_home[index]
        if self._stream is None:
            self._arrived[index] = {name: tensor.clone() for name, tensor in home.items()}, None
            return
        # The copy may overtake work that still reads memory it is given, so it waits for what is queued now.
        working = torch.accelerator.current_stream(self.device)
        self._stream.wait_stream(working)
        torch.accelerator.set_stream(self._stream)
        try:
            sent = {name: tensor.to(self.device, non_blocking=True) for name, tensor in home.items()}
        finally:
            torch.accelerator.set_stream(working)
        for tensor in sent.values():
            tensor.record_stream(working)
        self._arrived[index] = sent, self._stream.record_event()

    def _put(self, index: int, tensors: dict[str, Tensor]) -> None:
        for name, tensor in _tensors(self.blocks[index]):
            tensor.data = tensors[name]


def _tensors(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from block.named_parameters()
    yield from block.named_buffers()
