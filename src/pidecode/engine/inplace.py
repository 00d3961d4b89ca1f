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
from pidecode.engine.ops.quantize import weight_rows
from pidecode.engine.pixel_tiles import PixelHalves, run_pixel_blocks
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
    halves: PixelHalves | None = None,
) -> Tensor:
    """One evaluation, as `PiDNet.denoise` gives it.

    Args:
        net: The network; its blocks may be quantized.
        x_B3HW: Noisy image `[B, 3, H, W]`; not altered.
        modulation: What the network derives from the time.
        condition: What `prepare` computed for the image.
        chunks: Chunk sizes; default those that suit the device.
        offloader: Holds the patch blocks, where they live on the host.
        halves: The pixel blocks' weights cut to tiles, kept between calls where the chunks say so.

    Returns:
        The prediction `[B, 3, H, W]`, float32.
    """
    chunks = chunks or default_chunks(net, x_B3HW.device)
    tokens = _embed(net, x_B3HW, chunks)
    _run_patch_blocks(net, tokens, modulation, condition, chunks, offloader)
    _finish_tokens_(net, tokens, modulation, condition, chunks)
    dtype = net.final_layer.linear.weight.dtype
    if tokens.dtype != dtype:
        tokens = tokens.to(dtype)
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


def _run_patch_blocks(
    net: PiDNet,
    x: Tensor,
    modulation: StepModulation,
    condition: Condition,
    chunks: Chunks,
    offloader: BlockOffloader | None,
) -> None:
    """All patch blocks on the image stream `x` `[B, L, D]`, in place."""
    y = None if condition.text is None else condition.text.float().clone().expand(x.shape[0], -1, -1).contiguous()
    length = x.shape[1] + (0 if y is None else y.shape[1])
    dtype = net.final_layer.linear.weight.dtype
    joint = x.new_empty(x.shape[0], length, 3 * x.shape[2], dtype=dtype)
    rotation = torch.complex(*condition.rotation)
    text_rotation = None if condition.text_rotation is None else torch.complex(*condition.text_rotation)
    blocks: Any = net.patch_blocks
    for index, block in enumerate(blocks):
        if condition.injections and index % net.config.inject_interval == 0:
            which = index // net.config.inject_interval
            gate_(net.lq_proj.gate_modules[which], x, condition.injections[which], chunks)
        with nullcontext() if offloader is None else offloader.resident(index):
            text = None if y is None else modulation.text[index]
            block_pass = _BlockPass(block, joint, modulation.image[index], text, chunks)
            block_pass.run(x, y, rotation, text_rotation, want_text=index < len(blocks) - 1)


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
        out = attend(q if want_text else q[:, N:], *self._gathered(k, v, N))
        self._finish(x, self.image, out[:, out.shape[1] - x.shape[1] :], "x")
        if want_text and y is not None and self.text is not None:
            self._finish(y, self.text, out[:, :N], "y")

    def _runs(self, stream: Tensor, vectors: Tensor) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
        """Runs of a stream `[B, L, D]`, each with the six vectors of its time."""
        B, length = stream.shape[:2]
        size = self.chunks.tokens if len(vectors) == 1 else min(self.chunks.tokens, length)
        for run in ops.runs(B, length, size):
            yield run, vectors[run[0].start % len(vectors)]

    def _gathered(self, k: Tensor, v: Tensor, text_tokens: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the whole image, where its tokens are sharded over processes."""
        gather = self.block.attn.gather
        if gather is None:
            return k, v
        full = [torch.cat((t[:, :text_tokens], gather(t[:, text_tokens:].contiguous())), dim=1) for t in (k, v)]
        return full[0], full[1]

    def _project(
        self, x: Tensor, vectors: Tensor, rotation: Tensor | None, offset: int, stream: str, *, want_query: bool = True
    ) -> None:
        """Queries, keys and values of a stream, written into the joint buffer from token `offset` on."""
        attn = self.block.attn
        qkv, k_norm = getattr(attn, f"qkv_{stream}"), getattr(attn, f"k_norm_{stream}")
        for (samples, part), (shift, factor, *_) in self._runs(x, vectors):
            tokens = ops.norm_modulate(ops.cut_run(x, (samples, part)), shift, factor, self.joint.dtype)
            place = self.joint[samples, offset + part.start : offset + part.stop]
            # Several samples lie apart in the joint buffer, so their projection is written to one of its own first.
            count = len(place)
            flat = place[0] if count == 1 else place.new_empty(len(tokens), place.shape[2])
            if want_query:
                ops.linear_into(qkv, tokens, flat)
            else:  # keys and values only: nothing reads the last block's prompt output
                flat[:, x.shape[2] :] = weight_rows(qkv, slice(x.shape[2], None))(tokens)
            turns = None if rotation is None else rotation[part].repeat(count, 1) if count > 1 else rotation[part]
            q, k, _ = split_heads(flat, attn.heads)
            if want_query:
                ops.norm_rotate_(q, getattr(attn, f"q_norm_{stream}").weight, turns)
            ops.norm_rotate_(k, k_norm.weight, turns)
            if count > 1:
                place.copy_(flat.view_as(place))

    def _finish(self, x: Tensor, vectors: Tensor, out: Tensor, stream: str) -> None:
        """Output projection and feed-forward, added to a stream run by run."""
        proj, mlp = getattr(self.block.attn, f"proj_{stream}"), getattr(self.block, f"mlp_{stream}")
        for run, (_, _, gate1, shift2, factor2, gate2) in self._runs(x, vectors):
            tokens = ops.cut_run(x, run)
            inner = ops.add_norm_modulate_(
                tokens, proj(out[run].flatten(0, 1)), gate1, shift2, factor2, self.joint.dtype
            )
            ops.add_gated_(tokens, ops.gated_feed_forward(inner, mlp.w1, mlp.w3, mlp.w2), gate2)


def gate_(gate: Any, x: Tensor, injection: Injection, chunks: Chunks) -> None:
    """`Gate.forward` on a stream `[B, L, D]`, in place."""
    for run in ops.runs(len(x), x.shape[1], chunks.tokens):
        tokens, logits = chunk_of(injection, run)
        ops.gate_latent_(ops.cut_run(x, run), tokens, gate.content_proj.weight[:, : x.shape[2]], logits)


def _finish_tokens_(net: PiDNet, x: Tensor, modulation: StepModulation, condition: Condition, chunks: Chunks) -> None:
    """The pixel blocks' condition, in place: `silu(t_emb + x)`, then the pixel gate."""
    F.silu(x.add_(modulation.embedding), inplace=True)
    if condition.pixel_injection is not None:
        gate_(net.pit_lq_gate, x, condition.pixel_injection, chunks)


@dataclass(frozen=True, slots=True)
class RecomputedInjection:
    """An injection computed from the adapter's shared features each time it is read.

    A head and a gate cost a hundredth of a step; their output fills 50 MB per injection point for 2048 x 2048 pixels.
    """

    features: Tensor  # `[B, L, adapter width]`
    head: nn.Module
    gate: Gate
    sigma: Tensor  # `[B or 1]`

    @property
    def tokens(self) -> Tensor:
        """Tokens `[B, L, D]`."""
        return self.head(self.features)  # type: ignore[no-any-return]

    @property
    def gate_logits(self) -> Tensor:
        """Gate logits `[B, L, D or 1]`."""
        return self.gate.latent_logits(self.tokens, self.sigma)

    def crop(self, patches: Tensor) -> RecomputedInjection:
        """The same for some patches only, given as indices."""
        return replace(self, features=self.features[:, patches])


def chunk_of(injection: Injection, run: tuple[slice, slice]) -> tuple[Tensor, Tensor]:
    """Tokens `[T, D]` and gate logits `[T, D or 1]` of some samples' patches, computing no others."""
    if not isinstance(injection, RecomputedInjection):
        return injection.tokens[run].flatten(0, 1), injection.gate_logits[run].flatten(0, 1)
    samples = run[0]
    sigma = injection.sigma if len(injection.sigma) == 1 else injection.sigma[samples]
    tokens = injection.head(injection.features[run])
    return tokens.flatten(0, 1), injection.gate.latent_logits(tokens, sigma).flatten(0, 1)


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
