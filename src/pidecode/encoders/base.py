# SPDX-License-Identifier: Apache-2.0
"""Image encoders of the latent spaces: protocol of their autoencoders, the encoder itself, and loading."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pidecode.encoders.autoencoder_kl import DiffusersAutoencoder, load_autoencoder
from pidecode.encoders.rae import RepresentationAutoencoder, load_representation_autoencoder
from pidecode.encoders.tiny import TinyImageEncoder, is_tiny_encoder, load_tiny_encoder
from pidecode.errors import LatentError, SettingError, SizeError
from pidecode.files import PathLike
from pidecode.latents.latent import Latent
from pidecode.latents.layout import LatentStatistics, denormalize, normalize
from pidecode.registry.spaces import LatentSpace, get_space

EncodeFunction = Callable[[Tensor], Tensor]  # images `[B, 3, H, W]` in [-1, 1] to normalized latents `[B, C, h, w]`

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


Autoencoder = DiffusersAutoencoder | RepresentationAutoencoder | TinyImageEncoder
"""From images `[B, 3, H, W]` in [-1, 1] to raw (not normalized) latents and back.

Raw latents are the mean of the posterior, never a sample of it; decoded images are about in [-1, 1], and not clamped.
Tensors are passed in float32; the autoencoder casts them to the dtype of its weights.
"""


class ImageEncoder:
    """The image encoder of one latent space. Call it with images to get normalized latents; see `load_encoder`.

    Latents are normalized in float32, by `statistics` where the space's are read from the weights (flux2, dinov2).
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        space: LatentSpace,
        *,
        statistics: LatentStatistics | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.space, self.statistics, self.dtype, self._autoencoder = space, statistics, dtype, autoencoder
        self.can_decode = autoencoder.can_decode
        self.to(device)

    def to(self, device: torch.device | str) -> ImageEncoder:
        """Move the weights to a device; returns this encoder."""
        self.device = torch.device(device)
        self._autoencoder.to(self.device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Encode images as normalized latents.

        Args:
            images: `[B, 3, H, W]` in [-1, 1]. Sides are multiples of the space's `input_multiple`; dinov2 and siglip
                take any size and resize it to their own square.

        Returns:
            Normalized latents `[B, C, h, w]`, float32.

        Raises:
            SizeError: A side is not a multiple of `input_multiple`.
            SettingError: The tensor is not a batch of images.
            LatentError: The encoder returned NaN or infinite values.
        """
        check_images(images, self.space)
        images = images.to(self.device, torch.float32)
        latent = self._autoencoder.encode(images).float()
        if not isinstance(self._autoencoder, TinyImageEncoder):  # whose latents are normalized already
            latent = normalize(latent, self.space, self.statistics)
        if not bool(torch.isfinite(latent).all()):
            raise LatentError(
                f"The {self.space.name} encoder returned NaN or infinite values in {_dtype_name(self.dtype)}; load it "
                "with dtype=torch.float32."
            )
        return latent

    @torch.no_grad()
    def decode(self, latent: Tensor) -> Tensor:
        """Decode normalized latents `[B, C, h, w]` with the space's own decoder (the VAE's, or the RAE's ViT).

        Returns images `[B, 3, h * down, w * down]` in [-1, 1], float32. Noise in a latent is decoded as it is.

        Raises:
            SettingError: The decoder half was not loaded.
        """
        if not self.can_decode:
            raise SettingError(
                f"This {self.space.name} encoder was loaded without the space's own decoder. Load it from files that "
                "hold both (see the page of the space in docs/spaces)."
            )
        latent = latent.to(self.device).float()
        # A LayerNorm without weights cannot be undone; Scale-RAE's decoder takes its output.
        raw = latent if self.space.statistics == "layer_norm" else denormalize(latent, self.space, self.statistics)
        return self._autoencoder.decode(raw).float().clamp(-1.0, 1.0)

    def __repr__(self) -> str:
        halves = "encoder and decoder" if self.can_decode else "encoder only"
        return f"ImageEncoder({self.space.name}, {_dtype_name(self.dtype)} on {self.device}, {halves})"


class LazyImageEncoder(ImageEncoder):
    """An ImageEncoder that `load_encoder` loads when one of its attributes is first used."""

    def __init__(self, space: str, path: PathLike, device: torch.device, dtype: torch.dtype) -> None:
        self._load = functools.partial(load_encoder, space, path, device=device, dtype=dtype)

    @classmethod
    def of(
        cls, path: PathLike | None, space: str | None, device: torch.device, dtype: torch.dtype
    ) -> LazyImageEncoder | None:
        """The encoder, or None if the path or the space is None."""
        return None if path is None or space is None else cls(space, path, device, dtype)

    def __getattr__(self, name: str) -> Any:
        if name not in ("space", "statistics", "dtype", "device", "can_decode", "_autoencoder"):
            raise AttributeError(name)
        vars(self).update(vars(self._load()) | vars(self))
        return vars(self)[name]

    def __repr__(self) -> str:
        return super().__repr__() if "_autoencoder" in vars(self) else "LazyImageEncoder(not loaded)"


@contextmanager
def on_device(encoder: object, device: torch.device | None) -> Iterator[None]:
    """Keep an ImageEncoder's weights on a device inside the block, and move them to the CPU after it.

    Nothing is moved for another function, or where the device is None.
    """
    if device is None or not isinstance(encoder, ImageEncoder):
        yield
        return
    encoder.to(device)
    try:
        yield
    finally:
        encoder.to("cpu")


def can_show(encoder: object, latent: Latent) -> bool:
    """Whether the space's own decoder is in memory and the latent has no noise, so that `vae_reference` is cheap."""
    if not isinstance(encoder, ImageEncoder) or "_autoencoder" not in vars(encoder):
        return False
    return encoder.can_decode and not bool((latent.sigmas > 0).any())


def vae_reference(encoder: object, latent: Latent) -> Tensor:
    """Images `[B, 3, H, W]` in [-1, 1] of a clean latent by the space's own decoder: the reference of the color fix."""
    if bool((latent.sigmas > 0).any()):
        raise SettingError(
            f"There is noise in this latent (sigma {latent.sigmas.tolist()}), so the VAE's image of it is no color "
            "reference;", python="pass reference=, or leave color_fix out.", cli="leave color_fix out.",
        )  # fmt: skip
    if not isinstance(encoder, ImageEncoder) or not encoder.can_decode:
        raise SettingError(
            f"color_fix needs the {latent.space} space's own decoder as a reference, and it is not loaded. Fetch it "
            f"with `pidecode pull {latent.space}`", python="pass reference=, or leave color_fix out.",
            cli="or leave color_fix out.",
        )  # fmt: skip
    return encoder.decode(latent.tensor)


def load_encoder(
    space: str,
    path: PathLike,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backbone: PathLike | None = None,
    statistics: PathLike | None = None,
    decoder: PathLike | None = None,
) -> ImageEncoder:
    """Load the image encoder of a latent space from local files; nothing is downloaded.

    Args:
        space: Name or alias of a latent space.
        path: A diffusers folder (of the autoencoder, or of a whole pipeline) or one file: `ae.safetensors`,
            `sdxl_vae.safetensors`, `flux2_ae.safetensors`, `QwenImage_VAE_2d.pth`, or the encoder of `tiny`.
            For dinov2 and siglip a folder: the transformers model, or the collection of RAE or Scale-RAE.
        device: Where the weights go.
        dtype: Dtype of the weights: float32, bfloat16, or float16 (not for sdxl, whose VAE overflows in it).
        backbone: dinov2 and siglip only: the vision model's folder, if it is not in `path`.
        statistics: dinov2 only: the file of normalization statistics, if it is not in `path`.
        decoder: dinov2 and siglip only: the ViT decoder's file, if it is not in `path`.

    Raises:
        CheckpointError: The files are not this space's encoder.
        SettingError: A setting cannot act, or the space is unknown.
        MissingDependencyError: diffusers or transformers is not installed.
    """
    row = get_space(space)
    if dtype not in DTYPES or (dtype == torch.float16 and row.name == "sdxl"):
        raise SettingError(
            f"The {row.name} encoder does not run in {_dtype_name(dtype)}; use torch.float32 or bfloat16."
        )
    path = Path(os.path.expanduser(path))
    autoencoder: Autoencoder
    latent_statistics = None
    if row.fixed_input is not None:
        autoencoder, latent_statistics = load_representation_autoencoder(
            row, path, dtype=dtype, backbone=backbone, statistics=statistics, decoder=decoder
        )
    elif not backbone == statistics == decoder is None:
        raise SettingError(
            f"backbone, statistics and decoder act on dinov2 and siglip only; the {row.name} encoder is one file."
        )
    elif is_tiny_encoder(path):
        autoencoder = load_tiny_encoder(path, row, dtype)
    else:
        autoencoder, latent_statistics = load_autoencoder(row, path, dtype)
    return ImageEncoder(autoencoder, row, statistics=latent_statistics, device=device, dtype=dtype)


def check_images(images: Tensor, space: LatentSpace) -> None:
    """Check that images `[B, 3, H, W]` in [-1, 1] can be encoded."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        given = f"{list(images.shape)} {images.dtype}" if isinstance(images, Tensor) else type(images).__name__
        raise SettingError(f"The encoder takes images [B, 3, H, W] in [-1, 1], floating point; got {given}.")
    low, high = torch.aminmax(images)
    if not (float(low) >= -1.001 and float(high) <= 1.001):
        raise SettingError(
            f"Images must lie in [-1, 1]; these reach from {float(low):.3g} to {float(high):.3g}. Scale them first."
        )
    height, width = images.shape[-2:]
    multiple = space.input_multiple
    if space.fixed_input is None and (height % multiple or width % multiple or not height or not width):
        nearest = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
        raise SizeError(
            f"The sides of an image for the {space.name} encoder must be multiples of {multiple} pixels; got "
            f"{width}x{height}. The nearest size is {nearest[0]}x{nearest[1]}: crop or pad the image."
        )


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
