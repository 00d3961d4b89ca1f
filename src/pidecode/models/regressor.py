# SPDX-License-Identifier: Apache-2.0
"""The short way from latent to image: the adapter with one linear layer to pixels, and how a PiDNet carries it.

Nearly everything a small decoder knows sits in the adapter, and a pixel block costs several times as much as the
adapter. So the adapter is first trained alone; `into_pixelnet` then sets a PiDNet so that it computes the same
image, and what the rest of the network adds is learned from there. A network that has learned nothing further can be
looked through: `look_through`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from pidecode.errors import SettingError
from pidecode.models.pid.adapter import ClimbingTower, LatentAdapter
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import PiDConfig

GATE_BIAS = 4.0
"""Logit at which the pixel gate starts: 0.982 open, so that it still has a slope."""
GATE_LOG_ALPHA = -2.0
"""Start of the gates' dependence on noise: slight, since the adapter itself has seen noisy latents."""
CARRIER = 1000.0
"""Constant in the last pixel channel: it holds the norms' size still, so that they pass colors through."""
COLOR_GAIN = 10.0
"""Size of a color of 1 in the pixel channels; small beside CARRIER, large beside the position table."""
SHUT = (
    "adaLN_modulation", "s_embedder.proj", "t_embedder.mlp.2", "pixel_embedder.proj", "output_heads",
    "final_layer.linear",
)  # fmt: skip
"""Parts of names whose tensors start at zero, but for what carries colors through: the ways of noise and of time."""


class Regressor(nn.Module):
    """Latent [B,C,a,b] to image [B,3,H,W]: the adapter's features, a linear map to `hidden_size`, one to pixels."""

    def __init__(self, config: PiDConfig) -> None:
        super().__init__()
        if not config.inject_pixels or config.prediction != "x0" or config.has_text:
            raise SettingError("A regressor becomes a network with inject_pixels=True, prediction='x0' and text_dim=0.")
        if not config.adapter_stages:
            raise SettingError("A regressor needs adapter_stages.")
        self.config = config
        self.adapter = LatentAdapter(config)
        self.to_pixels = nn.Linear(config.hidden_size, 3 * config.patch_size**2)
        for name, parameter in self.adapter.latent_proj.named_parameters():
            if ".block.5." in name:  # residual blocks start as the identity
                nn.init.zeros_(parameter)

    def forward(self, latent: Tensor) -> Tensor:
        """The image, unclamped."""
        config = self.config
        reach = config.latent_down * config.scale // config.patch_size
        grid = (latent.shape[-2] * reach, latent.shape[-1] * reach)
        return self.image(self.adapter.features(grid, latent)[0])

    @property
    def tower(self) -> ClimbingTower:
        """The adapter's convolutions."""
        return cast(ClimbingTower, self.adapter.latent_proj)

    def image(self, features: Tensor) -> Tensor:
        """The adapter's features [B,width,h,w] to the image, unclamped."""
        tokens = self.adapter.pit_head(features.flatten(2).transpose(1, 2))
        return self.painted(tokens, (features.shape[-2], features.shape[-1]))

    def painted(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The adapter's tokens for the pixels [B,L,hidden_size] to the image, unclamped."""
        pixels: Tensor = self.to_pixels(tokens)
        return F.pixel_shuffle(pixels.transpose(1, 2).unflatten(2, grid), self.config.patch_size)

    def by_levels(self, cells: Tensor, given: Sequence[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        """What a teacher has features of at all levels of the tower but the last, coarsest first, and the image.

        cells: unpatchified latent. given: the teacher's features. With them every level is fed what the teacher had
        there instead of what the level before it made: shallow parts learn many times faster than the whole, and all
        at once.
        """
        made: list[Tensor] = []
        below = cells
        for level, layers in enumerate(cast("Iterable[nn.Sequential]", self.tower.levels)):
            made.append(layers(F.interpolate(below, scale_factor=2, mode="nearest") if level else below))
            below = made[-1] if given is None or level == len(given) else given[level]
        return made[:-1], self.image(F.pixel_unshuffle(below, self.tower.fold))

    @torch.no_grad()
    def start_from_patches(self, images: Tensor) -> None:
        """Set the way from features to pixels to the leading principal directions of patches of `images`.

        Each cell of the finest grid starts with a small patch of its own, and the whole patch with what `hidden_size`
        directions hold of it; the fourth root of each direction's variance evens features and pixels out half each.
        """
        config, fold = self.config, self.tower.fold
        side, width = config.patch_size // fold, config.adapter_width // fold**2
        variances, basis, small_mean = _principal(images, side, width)
        rank = len(variances)
        # Pixels are ordered (color, row, column) within the whole patch, features (channel, cell row, cell column).
        cells = torch.zeros(3, fold, side, fold, side, width, fold, fold)
        for row in range(fold):
            for column in range(fold):
                cells[:, row, :, column, :, :rank, row, column] = (basis * variances**0.25).view(3, side, side, rank)
        means = small_mean.view(3, 1, side, 1, side).expand(3, fold, side, fold, side).flatten()
        variances, basis, mean = _principal(images, config.patch_size, config.hidden_size)
        scale, rank = variances**0.25, len(variances)
        for layer in (self.to_pixels, self.adapter.pit_head):
            layer.weight.zero_()
            layer.bias.zero_()
        self.to_pixels.weight[:, :rank] = basis * scale
        self.to_pixels.bias.copy_(mean)
        self.adapter.pit_head.weight[:rank] = basis.T @ cells.view(len(mean), -1) / scale[:, None]
        self.adapter.pit_head.bias[:rank] = basis.T @ (means - mean) / scale


def _principal(images: Tensor, side: int, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of patches of `side` pixels: variances and directions [3 side^2, n] of the `most` leading components; mean."""
    patches = F.pixel_unshuffle(images, side).flatten(2).transpose(1, 2).flatten(0, 1)
    variances, basis = (part.flip(-1)[..., :most] for part in torch.linalg.eigh(torch.cov(patches.T)))
    return variances.clamp(min=1e-8), basis, patches.mean(0)


@torch.no_grad()
def into_pixelnet(regressor: Regressor) -> PiDNet:
    """A PiDNet that gives the regressor's image whatever the noisy image and the time, up to about 0.002.

    Three pixel channels carry color and the last a large constant. The first pixel block's shift holds the colors,
    its feed-forward passes them through (`gelu(x) - gelu(-x) = x`), and every other path starts shut, with a slope.
    """
    net = PiDNet(regressor.config).cpu()
    adapter = {f"lq_proj.{name}": value.cpu() for name, value in regressor.adapter.state_dict().items()}
    tensors = net.state_dict() | adapter
    net.load_state_dict(tensors | _settled(tensors, regressor.to_pixels, regressor.config))
    return net


@torch.no_grad()
def out_of_pixelnet(net: PiDNet) -> Regressor:
    """The regressor that `into_pixelnet` made a network of, so that training can go on from released weights.

    Raises SettingError for a network that was made otherwise, or has been trained since.
    """
    regressor = Regressor(net.config)
    regressor.to_pixels = _to_pixels_of(net)
    regressor.adapter.load_state_dict(net.lq_proj.state_dict())
    return regressor


def _settled(tensors: Mapping[str, Tensor], to_pixels: nn.Linear, config: PiDConfig) -> dict[str, Tensor]:
    """The tensors of a network that `into_pixelnet` sets, but for the adapter's own."""
    settled: dict[str, Tensor] = {}
    for name, value in tensors.items():
        if any(part in name for part in SHUT) or name.endswith("content_proj.weight"):
            settled[name] = torch.zeros_like(value)
        elif name.endswith("content_proj.bias"):
            settled[name] = torch.full_like(value, GATE_BIAS)
        elif name.endswith("log_alpha"):
            settled[name] = torch.full_like(value, GATE_LOG_ALPHA)
    size = CARRIER / config.pixel_hidden_size**0.5
    settled["pixel_embedder.proj.bias"][-1] = CARRIER
    settled["final_layer.linear.weight"][:, :3] = torch.eye(3) * size / COLOR_GAIN
    return settled | _first_pixel_block(to_pixels, config, size)


@torch.no_grad()
def _to_pixels_of(net: PiDNet) -> nn.Linear:
    """The map from `hidden_size` to pixels that the first pixel block's shift holds, float32, on the processor.

    Raises SettingError where the network is not as `into_pixelnet` made it.
    """
    config, tensors = net.config, {name: value.float().cpu() for name, value in net.state_dict().items()}
    to_pixels = nn.Linear(config.hidden_size, 3 * config.patch_size**2)
    opening = torch.sigmoid(torch.tensor(GATE_BIAS))
    for name, gain in (("weight", COLOR_GAIN / opening), ("bias", torch.tensor(COLOR_GAIN))):
        rows = tensors[f"pixel_blocks.0.adaLN_modulation.0.{name}"]
        colors = rows.unflatten(0, (config.patch_size**2, 6, config.pixel_hidden_size))[:, 3, :3] / gain
        getattr(to_pixels, name).copy_(colors.transpose(0, 1).flatten(0, 1))
    again = _settled(tensors, to_pixels, config)
    if any(not torch.allclose(tensors[name], value, atol=1e-3, rtol=1e-2) for name, value in again.items()):
        raise SettingError(
            "This network was not made from a regressor, or was trained since, so it cannot become one again."
        )
    return to_pixels


class ShortWay:
    """What `net` decodes latents to, by its adapter and one linear layer: up to rounding all that the rest of it adds.

    Follows the adapter's weights where they go.
    """

    def __init__(self, net: PiDNet, to_pixels: nn.Linear) -> None:
        self.net = net
        with torch.device("meta"):
            self.regressor = Regressor(net.config)
        self.regressor.adapter, self.regressor.to_pixels = net.lq_proj, to_pixels.requires_grad_(False)

    def image(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """The image [B,3,H,W], unclamped, of the adapter's tokens for the pixels [B,L,D]."""
        self.regressor.to_pixels.to(tokens.device, tokens.dtype)
        return self.regressor.painted(tokens, grid)

    @torch.no_grad()
    def __call__(self, latent: Tensor) -> Tensor:
        """What a normalized latent decodes to, within [-1, 1], shrunk to the size of the encoded image."""
        net = self.net
        self.regressor.to_pixels.to(net.device, net.dtype)
        return shrunk(self.regressor(latent.to(net.device)).float(), net.config.scale)


def look_through(net: PiDNet) -> ShortWay | None:
    """The network's short way from latent to image.

    None for a network that has none: one whose pixel blocks make more of it than what the adapter says, one whose
    weights are not there or no longer whole.
    """
    if not net.config.adapter_stages or isinstance(net.t_embedder, nn.Identity) or net.device.type == "meta":
        return None
    try:
        return ShortWay(net, _to_pixels_of(net))
    except SettingError:
        return None


def shrunk(image: Tensor, scale: int) -> Tensor:
    """A decoded image [B,3,H,W], clamped to [-1, 1], at the size of what was encoded: antialiased bicubic."""
    return F.interpolate(image.clamp(-1, 1), scale_factor=1 / scale, mode="bicubic", antialias=True)


def _first_pixel_block(to_pixels: nn.Linear, config: PiDConfig, size: float) -> dict[str, Tensor]:
    """The block's tensors that are not as they were: its modulation, its second norm and its feed-forward."""
    width, pixels = config.pixel_hidden_size, config.patch_size**2
    opening = torch.sigmoid(torch.tensor(GATE_BIAS))
    colors = {
        name: value.cpu().unflatten(0, (3, pixels)).transpose(0, 1) for name, value in to_pixels.named_parameters()
    }
    weight, bias = torch.zeros(pixels, 6, width, config.hidden_size), torch.zeros(pixels, 6, width)
    weight[:, 3, :3] = COLOR_GAIN * colors["weight"] / opening  # the second shift
    bias[:, 3, :3] = COLOR_GAIN * colors["bias"]
    bias[:, 5, :3] = 1.0  # the second gate
    both = torch.cat((torch.eye(width), -torch.eye(width)))
    rest = torch.zeros(2 * width, width)
    norm = torch.ones(width)
    norm[:3] = -size  # the norm turns the position table into itself over `size`; this takes it away again
    block = {
        "adaLN_modulation.0.weight": weight.flatten(0, 2), "adaLN_modulation.0.bias": bias.flatten(),
        "mlp.fc1.weight": torch.cat((both, rest)), "mlp.fc1.bias": torch.zeros(4 * width),
        "mlp.fc2.weight": torch.cat((both, rest)).T, "mlp.fc2.bias": torch.zeros(width),
        "norm2.weight": norm,
    }  # fmt: skip
    return {f"pixel_blocks.0.{name}": value for name, value in block.items()}
