# SPDX-License-Identifier: Apache-2.0
"""Memory-efficient forward of PiDNet: chunked, in place, without autograd.

It computes what `PiDNet.denoise`, the reference it is tested against, computes. Tokens pass through each block in
chunks and the residual stream is updated in place; only keys, values and attention see all tokens at once. The pixel
blocks run in tiles (`pixel_tiles`).

Shapes: B batch, L tokens, N prompt tokens, D hidden, P pixels of a patch, C pixel width, T tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.engine.machine import Chunks
from pidecode.engine.offload import BlockOffloader
from pidecode.engine.ops import elementwise as ops
from pidecode.engine.ops.quantize import slice_weight
from pidecode.engine.pixel_tiles import Halves, run_pixel_blocks
from pidecode.engine.timesteps import StepModulation
from pidecode.models.pid.adapter import Gate, Injection
from pidecode.models.pid.blocks import attend, split_heads
from pidecode.models.pid.network import Condition, Grid, PiDNet


def runs_in_place(net: PiDNet, device: torch.device) -> bool:
    """Whether this forward can stand for the network's own as things are now.

    Gradients, autocast, sharded weights and layers wrapped by adapters act in the modules' own forward.
    """
    if torch.is_grad_enabled():
        return False
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return False
    return not hasattr(next(net.patch_blocks.parameters()), "device_mesh") and not has_adapters(net)


def has_adapters(net: PiDNet) -> bool:
    """Whether a layer is wrapped, as peft wraps those it adapts: the wrapper's `forward` is more than its weight."""
    return any(hasattr(module, "base_layer") for module in net.modules())


def default_chunks(net: PiDNet, device: torch.device) -> Chunks:
    """Chunk sizes that suit a device."""
    return Chunks() if device.type == "cpu" else Chunks.large(net.config.patch_size)


@torch.no_grad()
def denoise(
    net: PiDNet,
    x_B3HW: Tensor,
    modulation: StepModulation,
    condition: Condition,
    *,
    chunks: Chunks | None = None,
    offloader: BlockOffloader | None = None,
    halves: Halves | None = None,
) -> Tensor:
    """One evaluation, as `PiDNet.denoise` gives it.

    Args:
        net: The network; its blocks may be quantized.
        x_B3HW: Noisy image `[B, 3, H, W]`; not altered.
        modulation: What the network derives from the time.
        condition: What `prepare` computed for the image.
        chunks: Chunk sizes; default those that suit the device.
        offloader: Holds the patch blocks, where they live on the host.
        halves: The pixel blocks' weights cut to tiles, kept between calls.

    Returns:
        The prediction `[B, 3, H, W]`, float32.
    """
    chunks = chunks or default_chunks(net, x_B3HW.device)
    tokens, text = _embed(net, x_B3HW, chunks), condition.text
    B, L, D = tokens.shape
    y = None if text is None else text.float().clone().expand(B, -1, -1).contiguous()
    joint = tokens.new_empty(B, L + (0 if y is None else y.shape[1]), 3 * D, dtype=net.dtype)
    rotation = torch.complex(*condition.rotation)
    text_rotation = None if condition.text_rotation is None else torch.complex(*condition.text_rotation)
    blocks: Any = net.patch_blocks
    for index, block in enumerate(blocks):
        if condition.injections and index % net.config.inject_interval == 0:
            which = index // net.config.inject_interval
            gate_(net.lq_proj.gate_modules[which], tokens, condition.injections[which], chunks)
        with nullcontext() if offloader is None else offloader.resident(index):
            text_modulation = None if y is None else modulation.text[index]
            block_pass = _BlockPass(block, joint, modulation.image[index], text_modulation, chunks)
            block_pass.run(tokens, y, rotation, text_rotation, want_text=index < len(blocks) - 1)
    del joint, block_pass, y, rotation  # their memory is taken again by the pixel blocks
    F.silu(tokens.add_(modulation.embedding), inplace=True)  # the pixel blocks' condition
    if condition.pixel_injection is not None:
        gate_(net.pit_lq_gate, tokens, condition.pixel_injection, chunks)
    tokens = tokens.to(net.dtype)
    return run_pixel_blocks(net, x_B3HW, tokens, condition, chunks, halves)


def _embed(net: PiDNet, x_B3HW: Tensor, chunks: Chunks) -> Tensor:
    """Patches to tokens `[B, L, D]`, float32, some rows of patches at a time."""
    (rows, columns), patch = net.grid_of(*x_B3HW.shape[-2:]), net.config.patch_size
    B, proj = x_B3HW.shape[0], net.s_embedder.proj
    tokens = x_B3HW.new_empty(B, rows * columns, net.config.hidden_size, dtype=torch.float32)
    grid = x_B3HW.unflatten(3, (columns, patch)).unflatten(2, (rows, patch))  # [B, 3, rows, patch, columns, patch]
    for part in ops.parts(rows, max(1, chunks.tokens // (B * columns))):
        patches = grid[:, :, part].permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        tokens[:, part.start * columns : part.stop * columns] = net.s_embedder(patches.to(proj.weight.dtype))
    return tokens


class _BlockPass:
    """One patch block in one evaluation. Both streams pass in runs of tokens, of several samples where they fit."""

    def __init__(self, block: Any, joint: Tensor, image: Tensor, text: Tensor | None, chunks: Chunks) -> None:
        self.block, self.joint, self.image, self.text, self.chunks = block, joint, image, text, chunks

    def run(
        self, x: Tensor, y: Tensor | None, rotation: Tensor, text_rotation: Tensor | None, *, want_text: bool
    ) -> None:
        """The image stream, and the prompt's if there is one; `want_text=False` leaves that as it was."""
        N = 0 if y is None else y.shape[1]
        self._project(x, self.image, rotation, N, "x")
        if y is not None and self.text is not None:
            self._project(y, self.text, text_rotation, 0, "y", want_query=want_text)
        q, k, v = split_heads(self.joint, self.block.attn.heads)
        if (gather := self.block.attn.gather) is not None:  # the image's tokens are sharded over processes
            k, v = (torch.cat((t[:, :N], gather(t[:, N:].contiguous())), dim=1) for t in (k, v))
        out = attend(q if want_text else q[:, N:], k, v)
        self._finish(x, self.image, out[:, out.shape[1] - x.shape[1] :], "x")
        if want_text and y is not None and self.text is not None:
            self._finish(y, self.text, out[:, :N], "y")

    def _runs(self, stream: Tensor, vectors: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Runs of a stream `[B, L, D]`, each with the six vectors of its time."""
        B, length = stream.shape[:2]
        size = self.chunks.tokens if len(vectors) == 1 else min(self.chunks.tokens, length)
        for run in ops.runs(B, length, size):
            yield run, vectors[run[0].start % len(vectors)]

    def _project(
        self, x: Tensor, vectors: Tensor, rotation: Tensor | None, offset: int, stream: str, *, want_query: bool = True
    ) -> None:
        """Queries, keys and values of a stream, written into the joint buffer from token `offset` on."""
        attn = self.block.attn
        qkv, k_norm = getattr(attn, f"qkv_{stream}"), getattr(attn, f"k_norm_{stream}")
        for run, (shift, factor, *_) in self._runs(x, vectors):
            samples, part = run
            tokens = ops.norm_modulate(ops.cut_run(x, run), shift, factor, self.joint.dtype)
            place = self.joint[samples, offset + part.start : offset + part.stop]
            # Several samples lie apart in the joint buffer, so their projection is written to one of its own first.
            flat = place[0] if len(place) == 1 else place.new_empty(len(tokens), place.shape[2])
            if want_query:
                ops.linear_into(qkv, tokens, flat)
            else:  # keys and values only: nothing reads the last block's prompt output
                flat[:, x.shape[2] :] = slice_weight(qkv, lambda t: t[x.shape[2] :])(tokens)
            turns = None if rotation is None else ops.cut_table(rotation, run)
            q, k, _ = split_heads(flat, attn.heads)
            if want_query:
                ops.norm_rotate_(q, getattr(attn, f"q_norm_{stream}").weight, turns)
            ops.norm_rotate_(k, k_norm.weight, turns)
            if len(place) > 1:
                place.copy_(flat.view_as(place))

    def _finish(self, x: Tensor, vectors: Tensor, out: Tensor, stream: str) -> None:
        """Output projection and feed-forward, added to a stream run by run."""
        proj, mlp = getattr(self.block.attn, f"proj_{stream}"), getattr(self.block, f"mlp_{stream}")
        for run, (_, _, gate1, shift2, factor2, gate2) in self._runs(x, vectors):
            tokens = ops.cut_run(x, run)
            attended = proj(out[run].flatten(0, 1))
            inner = ops.add_norm_modulate_(tokens, attended, gate1, shift2, factor2, self.joint.dtype)
            del attended  # its memory is taken again by the feed-forward
            ops.add_gated_(tokens, mlp.w2(ops.silu_times_(mlp.w1(inner), mlp.w3(inner))), gate2)


def gate_(gate: Any, x: Tensor, injection: Injection, chunks: Chunks) -> None:
    """`Gate.forward` on a stream `[B, L, D]`, in place."""
    for run in ops.runs(len(x), x.shape[1], chunks.tokens):
        tokens, logits = injection.crop(run).read()
        weight = gate.content_proj.weight[:, : x.shape[2]]
        ops.gate_latent_(ops.cut_run(x, run), tokens.flatten(0, 1), weight, logits.flatten(0, 1))


@dataclass(frozen=True, slots=True)
class RecomputedInjection:
    """An injection computed from the adapter's shared features each time it is read.

    A head and a gate cost a hundredth of a step; their output fills 50 MB per injection point for 2048 x 2048 pixels.
    """

    features: Tensor  # `[B, L, adapter width]`
    head: nn.Module
    gate: Gate
    sigma: Tensor  # `[B or 1]`

    def read(self) -> tuple[Tensor, Tensor]:
        """Tokens `[B, L, D]` and gate logits `[B, L, D or 1]`."""
        tokens = self.head(self.features)
        return tokens, self.gate.latent_logits(tokens, self.sigma)

    def crop(self, index: tuple[Any, Any]) -> RecomputedInjection:
        """The same for some samples and patches only."""
        sigma = self.sigma if len(self.sigma) == 1 else self.sigma[index[0]]
        return replace(self, features=self.features[index], sigma=sigma)


def prepare_recomputed(
    net: PiDNet, grid: Grid, text: Tensor | None, latent: Tensor, sigma: Tensor | float | None
) -> Condition:
    """`PiDNet.prepare` with injections that are recomputed at each use: only the adapter's features are kept.

    Arguments and errors are those of `PiDNet.prepare`.
    """
    sigma_B = net.check_latent(latent, sigma)
    features = net.lq_proj.features(grid, latent)[0].flatten(2).transpose(1, 2)

    def injection(head: nn.Module, gate: nn.Module) -> RecomputedInjection:
        return RecomputedInjection(features, head, cast(Gate, gate), sigma_B)

    return replace(
        net.prepare(grid, text),
        injections=tuple(map(injection, net.lq_proj.output_heads, net.lq_proj.gate_modules)),
        pixel_injection=injection(net.lq_proj.pit_head, net.pit_lq_gate) if net.config.inject_pixels else None,
    )
