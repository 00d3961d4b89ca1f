# SPDX-License-Identifier: Apache-2.0
"""PiDNet: latent adapter, patch blocks, pixel blocks, final layer (PiD, PixelDiT).

Shapes: B batch, L = h w patch tokens, N prompt tokens, D hidden, P pixels of a patch, C pixel width.
Attribute names are those of the released checkpoints, which are a file format.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.engine import inplace as lean
from pidecode.engine.chunks import Chunks
from pidecode.engine.offload import BlockOffloader
from pidecode.engine.timesteps import StepModulation, TimestepCache, step_modulation
from pidecode.errors import LatentError, SettingError, SizeError
from pidecode.models.pid.adapter import Gate, Injection, LateInjection, LatentAdapter
from pidecode.models.pid.blocks import (
    FinalLayer,
    PatchBlock,
    PatchEmbedder,
    PixelBlock,
    PixelEmbedder,
    Rotation,
    TextEmbedder,
    TimestepEmbedder,
    from_patches,
    image_rotation,
    pixel_axis_table,
    text_rotation,
    to_patches,
)
from pidecode.registry.configs import PiDConfig

Grid = tuple[int, int]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class Condition:
    """Everything an image's denoising steps share: computed once, used at every step."""

    grid: Grid
    text: Tensor | None
    injections: tuple[Injection | LateInjection, ...]
    pixel_injection: Injection | LateInjection | None
    rotation: Rotation
    pixel_rotation: Rotation
    text_rotation: Rotation | None
    row_table: Tensor
    column_table: Tensor
    color: Tensor | None = None
    schedule: TimestepCache | None = None
    """Vectors of the times at which the image will be denoised, if they are known beforehand."""

    def window(self, rows: slice, columns: slice) -> Condition:
        """The condition of a window of the image, in patches: positions and latent tokens as in the whole."""
        (_, width), device = self.grid, self.row_table.device
        patch = len(self.column_table) // width
        across = torch.arange(columns.start, columns.stop, device=device)
        patches = (torch.arange(rows.start, rows.stop, device=device)[:, None] * width + across).flatten()
        return replace(
            self,
            grid=(rows.stop - rows.start, columns.stop - columns.start),
            injections=tuple(injection.window(patches) for injection in self.injections),
            pixel_injection=None if self.pixel_injection is None else self.pixel_injection.window(patches),
            rotation=(self.rotation[0][patches], self.rotation[1][patches]),
            pixel_rotation=(self.pixel_rotation[0][patches], self.pixel_rotation[1][patches]),
            row_table=self.row_table[rows.start * patch : rows.stop * patch],
            column_table=self.column_table[columns.start * patch : columns.stop * patch],
            color=None,
        )


@dataclass(frozen=True, slots=True)
class _Given:
    """What a caller tells about an image's latent."""

    grid: Grid
    latent: Tensor | None
    sigma: Tensor | float | None
    mask: Tensor | None
    want_color: bool
    keep_tokens: bool


class PiDNet(nn.Module):
    """PiD's conditional pixel diffusion network (SPEC.md sections 1 and 2).

    The output is a velocity `eps - x_0`, or `x_0` itself where `config.prediction` says so.
    """

    def __init__(self, config: PiDConfig) -> None:
        super().__init__()
        self.config = config
        self.chunks: Chunks | None = None
        """How much inference works on at once; None picks what suits the device."""
        self.offloader: BlockOffloader | None = None
        """Set where the patch blocks live on the host and only visit the device."""
        self.stripped = False
        """Whether `schedule.strip_for_inference` took away what only training and other times need."""
        self.plain = False
        """Whether layers always run their own forward, as those wrapped by adapters must."""
        D = config.hidden_size
        self.pixel_embedder = PixelEmbedder(config.pixel_hidden_size)
        self.s_embedder = PatchEmbedder(3 * config.patch_size**2, D)
        self.t_embedder = TimestepEmbedder(D)
        if config.has_text:
            self.y_embedder = TextEmbedder(config.text_dim, D)
            self.y_pos_embedding = nn.Parameter(torch.zeros(1, config.text_length, D))
        self.patch_blocks = nn.ModuleList(PatchBlock(config) for _ in range(config.patch_depth))
        self.pixel_blocks = nn.ModuleList(PixelBlock(config) for _ in range(config.pixel_depth))
        self.final_layer = FinalLayer(config.pixel_hidden_size)
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

    def chunks_for(self, device: torch.device) -> Chunks:
        """How much inference works on at once on a device."""
        return self.chunks or (Chunks() if device.type == "cpu" else Chunks.large(self.config.patch_size))

    def grid_of(self, height: int, width: int) -> Grid:
        """Rows and columns of patches in an image. Raises SizeError if the sides do not divide."""
        patch = self.config.patch_size
        if height % patch or width % patch or min(height, width) < patch:
            near = tuple(max(patch, round(side / patch) * patch) for side in (width, height))
            raise SizeError(
                f"An image of {width}x{height} pixels does not divide into {patch}-pixel patches; "
                f"the nearest size that does is {near[0]}x{near[1]}."
            )
        return height // patch, width // patch

    def prepare(
        self,
        grid: Grid,
        text: Tensor | None = None,
        latent: Tensor | None = None,
        sigma: Tensor | float | None = None,
        *,
        latent_mask: Tensor | None = None,
        want_color: bool = False,
        keep_tokens: bool = True,
        schedule: TimestepCache | None = None,
    ) -> Condition:
        """Compute what all steps share.

        text: prompt states `[B, N, text_dim]`; positions beyond `text_length` are cut.
        latent: normalized latent `[B, channels, a, b]`; None runs without any latent.
        sigma: noise left in the latent, one value or one per sample, in [0, 1].
        latent_mask: `[B]` of 0 or 1; 0 silences a sample's latent.
        keep_tokens: False makes the latent's tokens anew at each use: less memory, a hundredth more work.
        schedule: what `schedule.precompute` made of the times to come.
        Raises LatentError or SettingError when an input does not fit the network.
        """
        config, device = self.config, self.device
        given = _Given(grid, latent, sigma, latent_mask, want_color, keep_tokens)
        injections, pixel_injection, color = self._inject(given)
        tokens = self._embed_text(text)
        reference = None
        if config.rope_mode == "ntk_aware":
            reference = (config.rope_reference[0] / config.patch_size, config.rope_reference[1] / config.patch_size)
        head_dim = config.hidden_size // config.num_heads
        pixel_head_dim = config.pixel_attn_hidden_size // config.pixel_num_heads
        return Condition(
            grid=grid,
            text=tokens,
            injections=injections,
            pixel_injection=pixel_injection,
            rotation=image_rotation(grid, head_dim, reference_grid=reference, device=device),
            pixel_rotation=image_rotation(grid, pixel_head_dim, reference_grid=reference, device=device),
            text_rotation=(
                text_rotation(tokens.shape[1], head_dim, config.text_rope_theta, device=device)
                if tokens is not None and config.text_rope
                else None
            ),
            row_table=pixel_axis_table(grid[0] * config.patch_size, config.pixel_hidden_size // 2, device=device),
            column_table=pixel_axis_table(grid[1] * config.patch_size, config.pixel_hidden_size // 2, device=device),
            color=color,
            schedule=schedule,
        )

    def _embed_text(self, text: Tensor | None) -> Tensor | None:
        config = self.config
        if not config.has_text:
            if text is not None:
                raise SettingError("This network has no text stream, so a prompt cannot act; leave it out.")
            return None
        if text is None or text.ndim != 3 or text.shape[-1] != config.text_dim:
            came = "nothing" if text is None else f"shape {tuple(text.shape)}"
            raise SettingError(
                f"This network needs prompt states of shape [batch, tokens, {config.text_dim}]; {came} came."
            )
        text = text[:, : config.text_length]
        # float32 like the image stream, whatever the matrices are in.
        return (self.y_embedder(text) + self.y_pos_embedding[:, : text.shape[1]]).float()  # type: ignore[no-any-return]

    def _inject(
        self, given: _Given
    ) -> tuple[tuple[Injection | LateInjection, ...], Injection | LateInjection | None, Tensor | None]:
        if given.latent is None:
            if given.sigma is not None or given.mask is not None or given.want_color:
                raise SettingError("sigma, latent_mask and want_color act on a latent, and none was given.")
            return (), None, None
        if not self.config.has_adapter:
            raise SettingError("This network is a bare text-to-image backbone: it takes no latent.")
        if given.sigma is None:
            raise LatentError("A latent came without sigma; give the noise left in it (0 for a finished latent).")
        if given.want_color and not self.config.color_head:
            raise SettingError("This network has no color head, so it cannot predict the low-resolution image.")
        sigma_B = torch.as_tensor(given.sigma, dtype=torch.float32, device=given.latent.device).reshape(-1)
        if sigma_B.numel() not in (1, given.latent.shape[0]):
            raise LatentError(
                f"sigma has {sigma_B.numel()} values for {given.latent.shape[0]} latents; give one, or one each."
            )
        if given.want_color and not given.keep_tokens:
            raise SettingError("The color head needs keep_tokens=True; with it off, no head is run beforehand.")
        pixel_gate = self.pit_lq_gate if self.config.inject_pixels else None
        if not given.keep_tokens:
            return self.lq_proj.late(given.grid, given.latent, sigma_B, given.mask, pixel_gate)
        adapted = self.lq_proj(given.grid, given.latent, mask=given.mask, want_color=given.want_color)
        injections = tuple(
            Injection(tokens, gate.latent_logits(tokens, sigma_B))  # type: ignore[operator]
            for tokens, gate in zip(adapted.blocks, self.lq_proj.gate_modules, strict=True)
        )
        pixel_injection = None
        if pixel_gate is not None:
            pixel_injection = Injection(adapted.pixels, pixel_gate.latent_logits(adapted.pixels, sigma_B))
        return injections, pixel_injection, adapted.color

    def denoise(self, x_B3HW: Tensor, t_B: Tensor, condition: Condition) -> Tensor:
        """One evaluation: noisy image `[B, 3, H, W]` and flow time times 1000 `[B]` to the prediction, same shape.

        Without gradients it runs in place and in chunks (`engine/inplace.py`); times on the host are looked up
        in the condition's schedule without waiting for the device.
        """
        if self.runs_lean(x_B3HW.device):
            return lean.denoise(self, x_B3HW, self.modulation_at(t_B, condition), condition)
        tokens, patches, t_emb = self._embed(x_B3HW, t_B, condition.grid)
        tokens, _ = self._run_patch_blocks(tokens, t_emb, condition)
        return self._pixels(tokens, patches, t_emb, condition)

    def modulation_at(self, t_B: Tensor, condition: Condition) -> StepModulation:
        """What the network derives from the times alone: looked up if the condition's schedule has them."""
        known = None if condition.schedule is None else condition.schedule.find(t_B)
        return known or step_modulation(self, t_B)

    def runs_lean(self, device: torch.device) -> bool:
        """Whether `denoise` would run in place and in chunks as things are now."""
        # Autocast and sharded weights live in the modules' own forward, so they keep it.
        kind = device.type
        if self.plain or torch.is_grad_enabled():
            return False
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            return False
        return not hasattr(next(self.patch_blocks.parameters()), "device_mesh")

    def features(
        self, x_B3HW: Tensor, t_B: Tensor, condition: Condition, indices: tuple[int, ...], *, predict: bool = False
    ) -> tuple[list[Tensor], Tensor | None]:
        """Image stream after the named patch blocks (zero-based, ascending), each `[B, D, h, w]`.

        With `predict`, the prediction as well.
        """
        if not indices or min(indices) < 0 or max(indices) >= self.config.patch_depth:
            raise SettingError(f"Feature blocks {indices} are not among 0..{self.config.patch_depth - 1}.")
        tokens, patches, t_emb = self._embed(x_B3HW, t_B, condition.grid)
        stop = None if predict else max(indices)
        tokens, taps = self._run_patch_blocks(tokens, t_emb, condition, taps=frozenset(indices), stop=stop)
        maps = [tap.transpose(1, 2).unflatten(2, condition.grid) for tap in taps]
        return maps, self._pixels(tokens, patches, t_emb, condition) if predict else None

    def _embed(self, x_B3HW: Tensor, t_B: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
        patches_BLP3 = to_patches(x_B3HW, self.config.patch_size)
        # The patch embedding reads channel-major patches, the pixel path pixel-major ones.
        tokens = self.s_embedder(patches_BLP3.transpose(2, 3).flatten(2))
        return tokens.float(), patches_BLP3, self.t_embedder(t_B.reshape(-1)).unsqueeze(1)

    def _run_patch_blocks(
        self,
        x: Tensor,
        t_emb: Tensor,
        condition: Condition,
        taps: frozenset[int] = frozenset(),
        stop: int | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        silu_t, y, tapped = F.silu(t_emb), condition.text, []
        last = len(self.patch_blocks) - 1
        for index, block in enumerate(self.patch_blocks):
            if condition.injections and index % self.config.inject_interval == 0:
                which = index // self.config.inject_interval
                injection = condition.injections[which]
                x = self.lq_proj.gate_modules[which](x, injection.tokens, injection.gate_logits)
            x, y = block(x, y, silu_t, condition.rotation, condition.text_rotation, want_text=index < last)
            if index in taps:
                tapped.append(x)
            if index == stop:
                break
        return x, tapped

    def _pixels(self, tokens: Tensor, patches_BLP3: Tensor, t_emb: Tensor, condition: Condition) -> Tensor:
        patch_condition = F.silu(t_emb + tokens)
        if condition.pixel_injection is not None:
            injection = condition.pixel_injection
            patch_condition = self.pit_lq_gate(patch_condition, injection.tokens, injection.gate_logits)
        pixels = self._embed_pixels(patches_BLP3, condition)
        for block in self.pixel_blocks:
            pixels = block(pixels, patch_condition, condition.pixel_rotation)
        return from_patches(self.final_layer(pixels).float(), condition.grid, self.config.patch_size)

    def _embed_pixels(self, patches_BLP3: Tensor, condition: Condition) -> Tensor:
        """Colors to pixel tokens `[B, L, P, C]`, plus every pixel's place in the image."""
        (rows, columns), patch = condition.grid, self.config.patch_size
        half = self.config.pixel_hidden_size // 2
        shape = (rows, columns, patch, patch, half)
        across = condition.column_table.view(1, columns, 1, patch, half).expand(shape)
        down = condition.row_table.view(rows, 1, patch, 1, half).expand(shape)
        place = torch.cat((across, down), dim=-1).view(rows * columns, patch * patch, 2 * half)
        return self.pixel_embedder(patches_BLP3) + place  # type: ignore[no-any-return]

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
