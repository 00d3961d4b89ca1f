# SPDX-License-Identifier: Apache-2.0
"""How much memory a configuration needs per GPU, counted from the network itself without allocating any of it.

The network runs once on tensors that have shapes but no storage; what autograd would keep is added up. Estimates
leave out fragmentation and the workspace of libraries: leave a tenth free.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pidecode.models.pid.adapter import ResidualBlock
from pidecode.models.pid.blocks import PatchBlock, PixelBlock
from pidecode.models.pid.network import PiDNet
from pidecode.training.config import TrainConfig
from pidecode.training.denoiser import Denoiser, TrainBatch
from pidecode.weights.detect import ADAPTER


class _SavedTensors:
    """Bytes autograd keeps in a forward pass of a network, by the block they arise in (None: outside any)."""

    def __init__(self, net: PiDNet) -> None:
        # Storages by address; they are kept, so that no later one can be mistaken for one of these.
        self.seen: dict[int, Any] = {p.untyped_storage()._cdata: p.untyped_storage() for p in net.parameters()}
        self.by_block: Counter[int | None] = Counter()
        self.inputs: dict[int, int] = {}
        self.block: int | None = None
        for module in net.modules():
            if isinstance(module, (PatchBlock, PixelBlock, ResidualBlock)):
                module.register_forward_pre_hook(self._enter)
                module.register_forward_hook(self._leave)

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen[storage._cdata] = storage
            self.by_block[self.block] += storage.nbytes()
        return tensor

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.block = id(module)
        # The image and caption streams are this block's own; the condition and tables are shared.
        self.inputs[id(module)] = sum(x.numel() * x.element_size() for x in args[:2] if isinstance(x, Tensor))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.block = None


def activation_bytes(config: TrainConfig, size: tuple[int, int], batch_size: int) -> int:
    """Bytes the forward pass of the main network keeps for images of `size` (height, width)."""
    (height, width), shape = size, config.net
    cell = 1 if config.space is None else config.space.pixels_per_cell
    with FakeTensorMode():
        net = PiDNet(shape)
        saved = _SavedTensors(net)
        latent = torch.zeros(batch_size, shape.latent_channels, height // cell, width // cell)
        batch = TrainBatch(
            image=torch.zeros(batch_size, 3, height, width),
            text=torch.zeros(batch_size, shape.text_length, shape.text_dim) if shape.has_text else None,
            latent=latent if shape.has_adapter else None,
            sigma=torch.zeros(batch_size) if shape.has_adapter else None,
        )
        hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor)
        half = config.run.precision == "bfloat16"
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
            Denoiser(net)(batch.image, torch.zeros(batch_size), batch, want_color=shape.color_head)
    if not config.run.activation_checkpointing:
        return saved.by_block.total()
    outside = saved.by_block.pop(None, 0)
    return outside + sum(saved.inputs.values()) + max(saved.by_block.values(), default=0)


def state_bytes(config: TrainConfig, processes: int) -> int:
    """Bytes of weights and all that belongs to them, in one of `processes`."""
    with torch.device("meta"):
        net = PiDNet(config.net)
    count = sum(p.numel() for p in net.parameters())
    trained = count
    if config.trainable == "adapter":
        trained = sum(p.numel() for name, p in net.named_parameters() if name.startswith(ADAPTER))
    if config.lora.rank:
        trained = 0  # a few million at most, beside which nothing else counts
    per_trained = 4 + 8 + (0 if config.ema.kind == "none" else 4)  # gradient, two moments, average
    total, nets = 4 * count + per_trained * trained, 1
    if config.method == "student":
        total, nets = total + 4 * count + (4 + 4 + 8) * count, 3  # teacher; fake score with gradient and moments
    if config.parallel.weights == "shard":
        block = max((sum(p.numel() for p in b.parameters()) for b in net.patch_blocks), default=0)
        rest = count - sum(p.numel() for b in (*net.patch_blocks, *net.pixel_blocks) for p in b.parameters())
        # Two blocks at a time and the parameters outside blocks are unsharded.
        total = total // processes + nets * 4 * (2 * block + rest)
    return total + (2 * count * nets if config.run.precision == "bfloat16" else 0)


def memory_table(config: TrainConfig, sizes: tuple[int, ...] = (2048, 4096)) -> str:
    """Lines of text: GB per GPU for square images, by parallelism.

    In a distillation the teacher's pass for the discriminator stores about as much again as the student's own. Of
    processes that share an image, each stores its part of the patch and pixel blocks.
    """
    rows = [f"{'GPUs':>4}  {'weights':8}  {'context':>7}  " + "  ".join(f"{side:>5} px" for side in sizes)]
    once = {side: activation_bytes(config, (side, side), config.data.batch_size) for side in sizes}
    passes = 2 if config.method == "student" and config.distillation.gan_weight else 1
    for processes, weights, context_parallel in ((1, "replicate", 1), (8, "shard", 1), (8, "shard", 8)):
        parallel = replace(config.parallel, weights=weights, context_parallel=context_parallel)  # type: ignore[arg-type]
        states = state_bytes(replace(config, parallel=parallel), processes)
        cells = [f"{(states + passes * once[side] // context_parallel) / 1e9:>5.0f} GB" for side in sizes]
        rows.append(f"{processes:>4}  {weights:8}  {context_parallel:>7}  " + "  ".join(cells))
    rows.append("Estimated from the network, not measured; leave a tenth free.")
    return "\n".join(rows)
