# SPDX-License-Identifier: Apache-2.0
"""PiDNet, the conditional pixel diffusion network of PiD (https://arxiv.org/abs/2605.23902).

A latent adapter turns the latent into tokens of the patch grid; patch blocks denoise patch tokens jointly with prompt
tokens; pixel blocks refine every pixel under its patch's condition; a final layer gives the prediction. The backbone is
PixelDiT (https://arxiv.org/abs/2511.20645).

This is the plain forward: what training differentiates and what every path in `pidecode.engine` is tested against.

Shapes: B batch, h w grid of patches, L = h w patch tokens, N prompt tokens, D hidden, P pixels of a patch, C pixel
width. Attribute names are those of the released checkpoints, which are a file format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import LatentError, SettingError, SizeError
from pidecode.models.pid import blocks
from pidecode.models.pid.adapter import ComputedInjection, Gate, Injection, LatentAdapter
from pidecode.models.pid.blocks import Rotation
from pidecode.registry.configs import PiDConfig

Grid = tuple[int, int]  # rows and columns of patches


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Condition:
    """Everything the denoising steps of one image share: computed once by `PiDNet.prepare`, read at every step."""

    grid: Grid
    text: Tensor | None  # embedded prompt tokens `[B, N, D]`, float32; None without a text stream
    injections: tuple[Injection, ...]  # one per injected patch block; empty without a latent
    pixel_injection: Injection | None  # enters the pixel blocks' condition; None for networks that do not inject there
    rotation: Rotation  # rotary table of the patch blocks' image tokens
    pixel_rotation: Rotation  # rotary table of the pixel blocks' attention
    text_rotation: Rotation | None
    row_table: Tensor  # sin-cos table `[h * patch_size, C / 2]` of pixel rows
    column_table: Tensor  # sin-cos table `[w * patch_size, C / 2]` of pixel columns
    color: Tensor | None = None  # the color head's `[B, 3, h f, w f]`, f = patch_size / scale, if asked for

    def crop(self, rows: slice, columns: slice) -> Condition:
        """The condition of a part of the image, given as slices of patches with explicit start and stop.

        Positions and latent tokens stay those of the whole image.
        """
        (height, width), device = self.grid, self.row_table.device
        patch = len(self.column_table) // width
        patches = torch.arange(height * width, device=device).view(height, width)[rows, columns].flatten()
        return replace(
            self, grid=(rows.stop - rows.start, columns.stop - columns.start),
            injections=tuple(injection.crop((slice(None), patches)) for injection in self.injections),
            pixel_injection=self.pixel_injection and self.pixel_injection.crop((slice(None), patches)),
            rotation=(self.rotation[0][patches], self.rotation[1][patches]),
            pixel_rotation=(self.pixel_rotation[0][patches], self.pixel_rotation[1][patches]),
            row_table=self.row_table[rows.start * patch : rows.stop * patch],
            column_table=self.column_table[columns.start * patch : columns.stop * patch], color=None,
        )  # fmt: skip


class PiDNet(nn.Module):
    """PiD's conditional pixel diffusion network; weights are left as torch initializes them.

    The output is a velocity `eps - x_0`, or `x_0` itself where `config.prediction` says so; see docs/architecture.md.
    """

    def __init__(self, config: PiDConfig) -> None:
        super().__init__()
        self.config = config
        D = config.hidden_size
        self.pixel_embedder = blocks.Embedder(3, config.pixel_hidden_size)
        self.s_embedder = blocks.Embedder(3 * config.patch_size**2, D)
        self.t_embedder = blocks.TimestepEmbedder(D)
        if config.has_text:
            self.y_embedder = blocks.TextEmbedder(config.text_dim, D)
            self.y_pos_embedding = nn.Parameter(torch.zeros(1, config.text_length, D))
        self.patch_blocks = nn.ModuleList(blocks.PatchBlock(config) for _ in range(config.patch_depth))
        self.pixel_blocks = nn.ModuleList(blocks.PixelBlock(config) for _ in range(config.pixel_depth))
        self.final_layer = blocks.FinalLayer(config.pixel_hidden_size)
        if config.has_adapter:
            self.lq_proj = LatentAdapter(config)
            if config.inject_pixels:
                self.pit_lq_gate = Gate(D, config.gate == "per_channel")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.final_layer.linear.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.final_layer.linear.weight.device

    def grid_of(self, height: int, width: int) -> Grid:
        """Rows and columns of patches of an image. Raises SizeError unless patches divide its sides."""
        patch = self.config.patch_size
        if height % patch or width % patch or min(height, width) < patch:
            near = tuple(max(patch, round(side / patch) * patch) for side in (width, height))
            raise SizeError(
                f"An image of {width}x{height} pixels does not divide into {patch}-pixel patches; "
                f"the nearest size that does is {near[0]}x{near[1]}."
            )
        return height // patch, width // patch

    def forward(
        self,
        x_B3HW: Tensor,
        t_B: Tensor,
        text: Tensor | None = None,
        latent: Tensor | None = None,
        sigma: Tensor | float | None = None,
        latent_mask: Tensor | None = None,
    ) -> Tensor:
        """`prepare` and `denoise` in one; see there for shapes and errors."""
        grid = self.grid_of(*x_B3HW.shape[-2:])
        return self.denoise(x_B3HW, t_B, self.prepare(grid, text, latent, sigma, latent_mask=latent_mask))

    def prepare(
        self,
        grid: Grid,
        text: Tensor | None = None,
        latent: Tensor | None = None,
        sigma: Tensor | float | None = None,
        *,
        latent_mask: Tensor | None = None,
        want_color: bool = False,
    ) -> Condition:
        """Compute what all denoising steps of an image share: prompt tokens, latent tokens, positions.

        Args:
            grid: Rows and columns of patches of the image.
            text: Prompt states `[B, N, text_dim]`; positions beyond `text_length` are cut.
            latent: Normalized latent `[B, channels, a, b]`; None runs without any latent.
            sigma: Noise left in the latent, in [0, 1]: one value, or one per sample.
            latent_mask: `[B]` of 0 or 1; 0 silences a sample's latent.
            want_color: Also run the color head, into `Condition.color`.

        Raises:
            LatentError: The latent's shape or sigma does not fit the network.
            SettingError: The text does not fit, or an argument cannot act on this network.
        """
        config, device, patch = self.config, self.device, self.config.patch_size
        tokens = self._embed_text(text)
        injections, pixel_injection, color = self._inject(grid, latent, sigma, latent_mask, want_color)
        height, width = config.rope_reference
        reference = (height / patch, width / patch) if config.rope_mode == "ntk_aware" else None
        head_dim = config.hidden_size // config.num_heads
        pixel_head_dim = config.pixel_attn_hidden_size // config.pixel_num_heads
        text_table = None
        if tokens is not None and config.text_rope:
            text_table = blocks.text_rotation(tokens.shape[1], head_dim, config.text_rope_theta, device=device)
        half = config.pixel_hidden_size // 2
        return Condition(
            grid=grid, text=tokens, injections=injections, pixel_injection=pixel_injection,
            rotation=blocks.image_rotation(grid, head_dim, reference_grid=reference, device=device),
            pixel_rotation=blocks.image_rotation(grid, pixel_head_dim, reference_grid=reference, device=device),
            text_rotation=text_table, row_table=blocks.pixel_axis_table(grid[0] * patch, half, device=device),
            column_table=blocks.pixel_axis_table(grid[1] * patch, half, device=device), color=color,
        )  # fmt: skip

    def denoise(self, x_B3HW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """One evaluation of the network.

        Args:
            x_B3HW: Noisy image `[B, 3, H, W]`.
            t_B: Flow time times 1000, `[B]`, or `[1]` for all samples.
            condition: What `prepare` computed for the image.

        Returns:
            The prediction `[B, 3, H, W]`, float32.
        """
        tokens, patches, t_emb = self._embed(x_B3HW, t_B)
        tokens, _ = self._run_patch_blocks(tokens, t_emb, condition)
        return self._run_pixel_blocks(tokens, patches, t_emb, condition)

    def features(
        self, x_B3HW: Tensor, t_B: Tensor, condition: Condition, indices: tuple[int, ...], *, predict: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Image stream after the named patch blocks, as discriminators and representation alignment read it.

        Args:
            x_B3HW: Noisy image `[B, 3, H, W]`.
            t_B: Flow time times 1000, `[B]`.
            condition: What `prepare` computed for the image.
            indices: Patch blocks, zero-based and ascending.
            predict: Run the network to its end, for the prediction as well.

        Returns:
            Features `[B, D, h, w]` per index, and the prediction `[B, 3, H, W]` or None.

        Raises:
            SettingError: There is no such block.
        """
        if not indices or min(indices) < 0 or max(indices) >= self.config.patch_depth:
            raise SettingError(f"Feature blocks {indices} are not among 0..{self.config.patch_depth - 1}.")
        tokens, patches, t_emb = self._embed(x_B3HW, t_B)
        stop = None if predict else max(indices)
        tokens, taps = self._run_patch_blocks(tokens, t_emb, condition, indices, stop)
        maps = [tap.transpose(1, 2).unflatten(2, condition.grid) for tap in taps]
        return maps, self._run_pixel_blocks(tokens, patches, t_emb, condition) if predict else None

    # Parts of `prepare`.

    def _embed_text(self, text: Tensor | None) -> Tensor | None:
        config = self.config
        if not config.has_text:
            if text is not None:
                raise SettingError("This network has no text stream, so a prompt cannot act; leave it out.")
            return None
        if text is None or text.ndim != 3 or text.shape[-1] != config.text_dim:
            came = "nothing" if text is None else f"shape {tuple(text.shape)}"
            need = f"[batch, tokens, {config.text_dim}]"
            raise SettingError(f"This network needs prompt states of shape {need}; {came} came.")
        text = text[:, : config.text_length]
        # float32 like the image stream, whatever the type of the weights.
        return (self.y_embedder(text) + self.y_pos_embedding[:, : text.shape[1]]).float()  # type: ignore[no-any-return]

    def check_latent(self, latent: Tensor, sigma: Tensor | float | None) -> Tensor:
        """Noise levels `[B]` or `[1]`, float32. Raises LatentError for a wrong sigma, SettingError without adapter."""
        if not self.config.has_adapter:
            raise SettingError("This network is a bare text-to-image backbone: it takes no latent.")
        if sigma is None:
            raise LatentError("A latent came without sigma; give the noise left in it (0 for a finished latent).")
        sigma_B = torch.as_tensor(sigma, dtype=torch.float32, device=latent.device).reshape(-1)
        if sigma_B.numel() not in (1, latent.shape[0]):
            raise LatentError(f"sigma has {len(sigma_B)} values for {len(latent)} latents; give one, or one each.")
        return sigma_B

    def _inject(
        self, grid: Grid, latent: Tensor | None, sigma: Tensor | float | None, mask: Tensor | None, want_color: bool
    ) -> tuple[tuple[Injection, ...], Injection | None, Tensor | None]:
        if latent is None:
            if sigma is not None or mask is not None or want_color:
                raise SettingError("sigma, latent_mask and want_color act on a latent, and none was given.")
            return (), None, None
        sigma_B = self.check_latent(latent, sigma)
        if want_color and not self.config.color_head:
            raise SettingError("This network has no color head, so it cannot predict the low-resolution image.")
        adapted = self.lq_proj(grid, latent, mask=mask, want_color=want_color)

        def injection(tokens: Tensor, gate: Any) -> Injection:
            return ComputedInjection(tokens, gate.latent_logits(tokens, sigma_B))

        pixel_injection = None if adapted.pixels is None else injection(adapted.pixels, self.pit_lq_gate)
        return tuple(map(injection, adapted.blocks, self.lq_proj.gate_modules)), pixel_injection, adapted.color

    # Parts of `denoise`.

    def _embed(self, x_B3HW: Tensor, t_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patch tokens `[B, L, D]`, patches `[B, L, P, 3]`, timestep embedding `[B, 1, D]`."""
        patches_BLP3 = blocks.to_patches(x_B3HW, self.config.patch_size)
        # The patch embedding reads channel-major patches, the pixel blocks pixel-major ones.
        tokens = self.s_embedder(patches_BLP3.transpose(2, 3).flatten(2))
        return tokens.float(), patches_BLP3, self.t_embedder(t_B.reshape(-1)).unsqueeze(1)

    def _run_patch_blocks(
        self, x: Tensor, t_emb: Tensor, condition: Condition, taps: tuple[int, ...] = (), stop: int | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Image tokens `[B, L, D]` through the patch blocks, and the tokens after those in `taps`."""
        silu_t, y, tapped = F.silu(t_emb), condition.text, []
        last, rotations = len(self.patch_blocks) - 1, (condition.rotation, condition.text_rotation)
        for index, block in enumerate(self.patch_blocks):
            if condition.injections and index % self.config.inject_interval == 0:
                which = index // self.config.inject_interval
                x = self.lq_proj.gate_modules[which](x, *condition.injections[which].read())
            # The last block's prompt output is read by nothing.
            x, y = block(x, y, silu_t, rotations, want_text=index < last)
            if index in taps:
                tapped.append(x)
            if index == stop:
                break
        return x, tapped

    def _run_pixel_blocks(self, tokens: Tensor, patches_BLP3: Tensor, t_emb: Tensor, condition: Condition) -> Tensor:
        """Pixels through the pixel blocks, modulated by the patch tokens: the prediction `[B, 3, H, W]`."""
        patch_condition = F.silu(t_emb + tokens)
        if condition.pixel_injection is not None:
            patch_condition = self.pit_lq_gate(patch_condition, *condition.pixel_injection.read())
        pixels = self._embed_pixels(patches_BLP3, condition)
        for block in self.pixel_blocks:
            pixels = block(pixels, patch_condition, condition.pixel_rotation)
        return blocks.from_patches(self.final_layer(pixels).float(), condition.grid, self.config.patch_size)

    def _embed_pixels(self, patches_BLP3: Tensor, condition: Condition) -> Tensor:
        """Colors to pixel tokens `[B, L, P, C]`, plus the sin-cos position of every pixel in the image."""
        (rows, columns), patch, half = condition.grid, self.config.patch_size, self.config.pixel_hidden_size // 2
        shape = (rows, columns, patch, patch, half)
        x = condition.column_table.view(1, columns, 1, patch, half).expand(shape)
        y = condition.row_table.view(rows, 1, patch, 1, half).expand(shape)
        position = torch.cat((x, y), dim=-1).view(rows * columns, patch * patch, 2 * half)
        return self.pixel_embedder(patches_BLP3) + position  # type: ignore[no-any-return]
