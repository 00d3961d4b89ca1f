# SPDX-License-Identifier: Apache-2.0
"""Image encoders of the latent spaces: protocol, loading, and decoding by the space's own VAE."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pidecode.errors import LatentError, MissingDependencyError, SettingError, SizeError
from pidecode.latents.latent import Latent
from pidecode.latents.layout import LatentStatistics, denormalize, normalize
from pidecode.models.tiny import Reconstruct
from pidecode.registry.spaces import LatentSpace, get_space

PathLike = str | os.PathLike[str]
Encode = Callable[[Tensor], Tensor]
"""Images `[B, 3, H, W]` in [-1, 1] to normalized latents."""
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Native(Protocol):
    """What a space's own model does, in its raw frame; images are `[B, 3, H, W]` in [-1, 1].

    Tensors come in float32; the model casts them to its own number format, at the point where that is due.
    """

    @property
    def can_decode(self) -> bool:
        """Whether the way back is at hand."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """Raw latents: the mean, never a sample."""
        ...

    def decode(self, raw: Tensor) -> Tensor:
        """Images `[B, 3, H, W]`, not clamped."""
        ...

    def to(self, device: torch.device) -> None:
        """Move the weights."""
        ...


class ImageEncoder:
    """A latent space's own encoder: call it with images, get normalized latents.

    space: the row of its latent space.
    statistics: mean and variance from the encoder's own weights (flux2, dinov2); None where the space has none.
    dtype: number format the weights run in; frames are converted in float32 whatever it is.

    Made by `load_encoder`.
    """

    def __init__(
        self,
        native: Native,
        space: LatentSpace,
        *,
        statistics: LatentStatistics | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        already_normalized: bool = False,
    ) -> None:
        self.space = space
        self.statistics = statistics
        self.dtype = dtype
        self._native = native
        self._already_normalized = already_normalized
        self.device = torch.device("cpu")
        self.to(device)

    @property
    def can_decode(self) -> bool:
        """Whether `decode_native` is at hand."""
        return self._native.can_decode

    def to(self, device: torch.device | str) -> ImageEncoder:
        """Move the weights; returns itself."""
        self.device = torch.device(device)
        self._native.to(self.device)
        return self

    @torch.no_grad()
    def __call__(
        self, images: Tensor, reconstruct: Reconstruct | None = None, num_refinements: int | None = None
    ) -> Tensor:
        """Images `[B, 3, H, W]` in [-1, 1] to normalized latents `[B, C, H/down, W/down]`, float32.

        reconstruct: what the decoder to come makes of a latent, at the image's size. An encoder with a refiner
            corrects its latent by it, `num_refinements` times or as it was trained; to others it makes no difference.
        Sides must be multiples of the space's `input_multiple`; dinov2 and siglip take any size and see their own
        square (docs/architecture.md, Latent spaces). Raises SizeError for other sides, SettingError for other tensors,
        LatentError when the encoder answers with NaN.
        """
        check_images(images, self.space)
        given = images.to(self.device, torch.float32)
        raw = self._encode(given, reconstruct, num_refinements).float()
        latent = raw if self._already_normalized else normalize(raw, self.space, self.statistics)
        if not bool(torch.isfinite(latent).all()):
            raise LatentError(
                f"The {self.space.name} encoder answered with NaN or infinite values in {_plain(self.dtype)}; load it "
                "with dtype=torch.float32."
            )
        return latent

    def _encode(self, images: Tensor, reconstruct: Reconstruct | None, num_refinements: int | None) -> Tensor:
        from pidecode.encoders.tiny import TinyNative

        if isinstance(self._native, TinyNative):
            return self._native.encode(images, reconstruct, num_refinements)
        if num_refinements is not None:
            raise SettingError(
                f"num_refinements acts on the encoder of `tiny` only, and this is {self.space.name}'s; leave it out."
            )
        return self._native.encode(images)

    @torch.no_grad()
    def decode_native(self, latent: Tensor) -> Tensor:
        """Normalized latents `[B, C, h, w]` to what the space's own decoder makes of them.

        Returns `[B, 3, h down, w down]` in [-1, 1], float32. Noise in the latent stays in the image. Raises
        SettingError where the encoder came without its decoder.
        """
        if not self.can_decode:
            raise SettingError(
                f"This {self.space.name} encoder came without the space's own decoder, so there is no image to "
                "compare with. Load it from files that hold both (see the page of the space)."
            )
        wide = latent.to(self.device).float()
        raw = wide if self.space.statistics == "layer_norm" else denormalize(wide, self.space, self.statistics)
        return self._native.decode(raw).float().clamp(-1.0, 1.0)

    def __repr__(self) -> str:
        ways = "both ways" if self.can_decode else "images to latents only"
        return f"ImageEncoder({self.space.name}, {_plain(self.dtype)} on {self.device}, {ways})"


class LazyEncoder:
    """A ImageEncoder that is loaded when the first image comes; then it behaves as that does."""

    def __init__(self, space: str, path: PathLike, device: torch.device, dtype: torch.dtype) -> None:
        self._load = functools.partial(load_encoder, space, path, device=device, dtype=dtype)
        self._loaded: ImageEncoder | None = None

    @classmethod
    def of(
        cls, path: PathLike | None, space: str | None, device: torch.device, dtype: torch.dtype
    ) -> LazyEncoder | None:
        """One for the file or folder; None where there is neither that nor a space."""
        return None if path is None or space is None else cls(space, path, device, dtype)

    @property
    def loaded(self) -> ImageEncoder:
        """The encoder itself."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @property
    def can_decode(self) -> bool:
        """Whether `decode_native` is at hand."""
        return self.loaded.can_decode

    def __call__(
        self, images: Tensor, reconstruct: Reconstruct | None = None, num_refinements: int | None = None
    ) -> Tensor:
        """Images to normalized latents; see `ImageEncoder`."""
        return self.loaded(images, reconstruct, num_refinements)

    def decode_native(self, latent: Tensor) -> Tensor:
        """Normalized latents to the space's own images; see `ImageEncoder`."""
        return self.loaded.decode_native(latent)


def encode_for(encoder: Encode, images: Tensor, reconstruct: Reconstruct | None, num_refinements: int | None) -> Tensor:
    """Latents by `encoder`, which may be any function; one with a refiner corrects them by `reconstruct`."""
    if isinstance(encoder, (ImageEncoder, LazyEncoder)):
        return encoder(images, reconstruct, num_refinements)
    if num_refinements is not None:
        raise SettingError("num_refinements acts on the encoder of `tiny` only; leave it out.")
    return encoder(images)


@contextmanager
def visiting(encoder: object, device: torch.device | None) -> Iterator[None]:
    """Have an encoder's weights on the device within the block only; None leaves them where they are.

    An encoder that is just a function has no weights of ours to move.
    """
    own = encoder.loaded if isinstance(encoder, LazyEncoder) and device is not None else encoder
    if not isinstance(own, ImageEncoder) or device is None:
        yield
        return
    own.to(device)
    try:
        yield
    finally:
        own.to("cpu")


def native_reference(encoder: object, latent: Latent) -> Tensor:
    """What the space's own decoder makes of a clean latent, for holding colors to it, `[B, 3, h, w]` in [-1, 1].

    Raises SettingError when there is no such decoder at hand, or noise in the latent.
    """
    if bool((latent.sigmas > 0).any()):
        raise SettingError(
            f"Noise is in this latent (sigma {latent.sigmas.tolist()}), so the space's own decoder is no reference for "
            "its colors; pass reference=, or leave color_fix out."
        )
    if not isinstance(encoder, (ImageEncoder, LazyEncoder)) or not encoder.can_decode:
        raise SettingError(
            f"Holding colors needs the {latent.space} space's own decoder, and there is none here. Fetch it with "
            f"`pidecode pull {latent.space}`, pass reference=, or leave color_fix out."
        )
    return encoder.decode_native(latent.tensor)


def load_encoder(
    space: str,
    path: PathLike,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backbone: PathLike | None = None,
    statistics: PathLike | None = None,
    native_decoder: PathLike | None = None,
) -> ImageEncoder:
    """The encoder of a latent space, from files on this machine; nothing is downloaded.

    space: name or alias of a latent space.
    path: a diffusers folder (the autoencoder's own, or a whole pipeline's), or a single file: `ae.safetensors`,
        `sdxl_vae.safetensors`, `flux2_ae.safetensors`, `QwenImage_VAE_2d.pth`, or the small encoder that ships with
        `tiny`. For dinov2 and siglip a folder: the transformers model itself, or RAE's or Scale-RAE's collection.
    backbone, statistics, native_decoder: dinov2 and siglip only: the parts, where they do not lie in `path`.

    Raises CheckpointError for files that are not that space's encoder, SettingError for settings that cannot act,
    MissingDependencyError without diffusers or transformers.
    """
    row = get_space(space)
    if dtype not in DTYPES or (dtype == torch.float16 and row.name == "sdxl"):
        raise SettingError(f"The {row.name} encoder does not run in {_plain(dtype)}; use torch.float32 or bfloat16.")
    place = Path(path).expanduser()
    if row.fixed_input is not None:
        from pidecode.encoders.rae import load_representation

        native, found = load_representation(
            row, place, dtype=dtype, backbone=backbone, statistics=statistics, native_decoder=native_decoder
        )
        return ImageEncoder(native, row, statistics=found, device=device, dtype=dtype)
    if not backbone == statistics == native_decoder is None:
        raise SettingError(
            f"backbone, statistics and native_decoder act on dinov2 and siglip only; the {row.name} encoder is whole."
        )
    from pidecode.encoders.autoencoder_kl import load_autoencoder
    from pidecode.encoders.tiny import is_tiny_encoder, load_tiny_encoder

    if is_tiny_encoder(place):
        tiny = load_tiny_encoder(place, row, dtype)
        return ImageEncoder(tiny, row, device=device, dtype=dtype, already_normalized=True)
    autoencoder, found = load_autoencoder(row, place, dtype)
    return ImageEncoder(autoencoder, row, statistics=found, device=device, dtype=dtype)


def check_images(images: Tensor, space: LatentSpace) -> None:
    """Raises SettingError or SizeError unless these are images the space's encoder takes."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.shape[1] != 3:
        given = list(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise SettingError(f"The encoder takes images [B, 3, H, W] in [-1, 1]; got {given}.")
    if not images.is_floating_point():
        raise SettingError(f"The encoder takes images in [-1, 1]; got {_plain(images.dtype)}. Scale them first.")
    low, high = torch.aminmax(images)
    if not (float(low) >= -1.001 and float(high) <= 1.001):
        raise SettingError(
            f"Images must lie in [-1, 1]; these reach from {float(low):.3g} to {float(high):.3g}. Scale them first."
        )
    height, width = images.shape[-2:]
    multiple = space.input_multiple
    if space.fixed_input is None and (height % multiple or width % multiple or not height or not width):
        near = [max(multiple, round(side / multiple) * multiple) for side in (width, height)]
        raise SizeError(
            f"A {width}x{height} image does not divide into the {space.name} encoder's {multiple}-pixel cells; the "
            f"nearest that does is {near[0]}x{near[1]}. Crop or pad it."
        )


def need(package: str, extra: str) -> MissingDependencyError:
    """The error for an optional package that is not installed."""
    return MissingDependencyError(
        f'{package} is not installed, and this encoder is built with it; run `pip install "pidecode[{extra}]"`.'
    )


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
