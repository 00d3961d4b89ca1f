# SPDX-License-Identifier: Apache-2.0
"""How much memory a recipe needs per GPU, counted from the network itself without allocating any of it.

The network runs once on tensors that have shapes but no storage; what autograd would keep is added up. Estimates
leave out the allocator's waste and the library's own workspace: leave a tenth free.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pidecode.models.pid.adapter import ResidualBlock
from pidecode.models.pid.blocks import PatchBlock, PixelBlock
from pidecode.models.pid.network import PiDNet
from pidecode.training.config import Recipe
from pidecode.training.denoiser import Evaluator, Example

GB = 1e9
_BLOCKS = (PatchBlock, PixelBlock, ResidualBlock)


@dataclass(frozen=True, slots=True)
class Need:
    """Bytes one process needs."""

    states: int
    """Weights, gradients, optimizer and average, with the cached bfloat16 copies."""
    activations: int
    """What the forward pass keeps for the backward pass."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.states + self.activations


@dataclass
class _Ledger:
    """Bytes autograd keeps, by the block they arise in (None: outside any)."""

    ignored: set[int]
    seen: set[int]
    kept: list[Any]
    by_block: dict[int | None, int]
    inputs: dict[int, int]
    block: int | None = None

    def pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.seen and key not in self.ignored:
            self.seen.add(key)
            self.kept.append(storage)  # so that no later storage can be mistaken for it
            self.by_block[self.block] = self.by_block.get(self.block, 0) + storage.nbytes()
        return tensor


def _watch(net: PiDNet, ledger: _Ledger) -> None:
    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ledger.block = id(module)
        # The image and caption streams are this block's own; the condition and tables are shared.
        ledger.inputs[id(module)] = sum(x.numel() * x.element_size() for x in args[:2] if isinstance(x, Tensor))

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        ledger.block = None

    for module in net.modules():
        if isinstance(module, _BLOCKS):
            module.register_forward_pre_hook(enter, with_kwargs=True)
            module.register_forward_hook(leave)


def activation_bytes(recipe: Recipe, size: tuple[int, int], batch: int) -> int:
    """Bytes the forward pass of the recipe's main network keeps for images of `size` (height, width)."""
    with FakeTensorMode():
        net = PiDNet(recipe.net)
        parameters = {p.untyped_storage()._cdata for p in net.parameters()}
        ledger = _Ledger(parameters, set(), [], {}, {})
        _watch(net, ledger)
        example, x_t = _blank_example(recipe, size, batch)
        hooks = torch.autograd.graph.saved_tensors_hooks(ledger.pack, lambda tensor: tensor)
        half = recipe.run.precision == "bfloat16"
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=half):
            Evaluator(net)(x_t, torch.zeros(batch), example, want_color=recipe.net.color_head)
    outside = ledger.by_block.pop(None, 0)
    if not recipe.run.recompute:
        return outside + sum(ledger.by_block.values())
    return outside + sum(ledger.inputs.values()) + max(ledger.by_block.values(), default=0)


def _blank_example(recipe: Recipe, size: tuple[int, int], batch: int) -> tuple[Example, Tensor]:
    net, (height, width) = recipe.net, size
    x_t = torch.zeros(batch, 3, height, width)
    text = torch.zeros(batch, net.text_length, net.text_dim) if net.has_text else None
    if recipe.space is None:
        return Example(image=x_t, text=text), x_t
    cell = recipe.space.pixels_per_cell
    latent = torch.zeros(batch, net.latent_channels, height // cell, width // cell)
    low = torch.zeros(batch, 3, height // net.scale, width // net.scale)
    return Example(image=x_t, low=low, text=text, latent=latent, sigma=torch.zeros(batch)), x_t


def state_bytes(recipe: Recipe, processes: int) -> int:
    """Bytes of weights and all that belongs to them, in one of `processes`."""
    with torch.device("meta"):
        net = PiDNet(recipe.net)
    count = sum(p.numel() for p in net.parameters())
    trained = count
    if recipe.only == "adapter":
        trained = sum(p.numel() for name, p in net.named_parameters() if name.startswith(("lq_proj.", "pit_lq_gate.")))
    if recipe.adapt.rank:
        trained = 0  # a few million at most, beside which nothing else counts
    per_trained = 4 + 8 + (0 if recipe.average.kind == "none" else 4)  # gradient, two moments, average
    total = 4 * count + per_trained * trained
    nets = 1
    if recipe.method == "student":
        nets = 3
        total += 4 * count + (4 + 4 + 8) * count  # the teacher; the fake score with gradient and moments
    if recipe.spread.weights == "sharded":
        block = max((sum(p.numel() for p in b.parameters()) for b in net.patch_blocks), default=0)
        rest = count - sum(p.numel() for b in (*net.patch_blocks, *net.pixel_blocks) for p in b.parameters())
        total = total // processes + nets * 4 * (2 * block + rest)  # two blocks at a time, and the root's own, whole
    return total + (2 * count * nets if recipe.run.precision == "bfloat16" else 0)


def need(recipe: Recipe, size: tuple[int, int], processes: int = 1) -> Need:
    """What one of `processes` needs for images of `size` (height, width).

    In a distillation the teacher's pass for the critic keeps about as much again as the student's own. Of processes
    that share an image, each keeps its share of the patch and pixel blocks.
    """
    once = activation_bytes(recipe, size, recipe.data.batch)
    passes = 2 if recipe.method == "student" and recipe.distil.gan_weight else 1
    return Need(state_bytes(recipe, processes), passes * once // recipe.spread.across)


def memory_table(recipe: Recipe, sizes: tuple[int, ...] = (2048, 4096)) -> str:
    """Lines of text: GB per GPU for square images, by how the work is spread."""
    rows = [f"{'GPUs':>4}  {'weights':8}  {'across':>6}  " + "  ".join(f"{side:>5} px" for side in sizes)]
    once = {side: activation_bytes(recipe, (side, side), recipe.data.batch) for side in sizes}
    passes = 2 if recipe.method == "student" and recipe.distil.gan_weight else 1
    for processes, weights, across in ((1, "copied", 1), (8, "sharded", 1), (8, "sharded", 8)):
        spread = replace(recipe.spread, weights=weights, across=across)  # type: ignore[arg-type]
        states = state_bytes(replace(recipe, spread=spread), processes)
        cells = [f"{(states + passes * once[side] // across) / GB:>5.0f} GB" for side in sizes]
        rows.append(f"{processes:>4}  {weights:8}  {across:>6}  " + "  ".join(cells))
    rows.append("Estimated from the network, not measured; leave a tenth free.")
    return "\n".join(rows)
