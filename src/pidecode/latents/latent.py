# SPDX-License-Identifier: Apache-2.0
"""Latent: a normalized latent tensor with its space, noise level and prompt, and a check of its statistics."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from pidecode.errors import LatentError
from pidecode.latents import layout, storage
from pidecode.latents.layout import LatentStatistics, noise_weights
from pidecode.registry.spaces import SPACES, LatentSpace, get_space

__all__ = ["Latent", "LatentStatistics", "NormalizationWarning"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_DTYPE_NAMES = "float32, bfloat16, float16 or float64"
_MIN_CELLS = 16  # cells below which the spread is not judged
_SPREAD_TOLERANCE = 1.15  # factor on the upper bound: image models leave their schedule by some per cent
_MIN_NOISE_SHARE = 0.75  # of s that the spread of a latent at noise level s, which contains that noise, reaches
_MIN_UPPER_BOUND = 1.1  # of the spread at any sigma: a normalized latent has unit standard deviation by definition
_TOKEN_CHANNELS = {space.token_channels for space in SPACES.values()} - {None}  # of packed latents


class NormalizationWarning(UserWarning):
    """The statistics of a latent do not look like those of a normalized latent at its sigma."""


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Latent:
    """A batch of normalized latents of one space (docs/architecture.md, Latent spaces).

    Args:
        tensor: `[B, C, h, w]`, floating point, *normalized*: what diffusers returns for `output_type="latent"`,
            unpacked. For other layouts and normalizations see `from_packed`, `from_euler` and `from_raw`.
        space: Name or alias of the latent space; kept as the space's own name.
        sigma: Noise level in [0, 1] of the noise still in the latent; a number, or one per sample (kept as a float32
            tensor `[B]`).
        prompt: One prompt for all samples, or one per sample.
        seed: The seed it was made with; noted only.

    Raises:
        LatentError: The tensor, sigma or prompt is wrong; the message names the fix.
        SettingError: The space is unknown.

    Warns:
        NormalizationWarning: The statistics of the tensor do not fit a normalized latent.
    """

    tensor: Tensor
    space: str
    sigma: float | Tensor = 0.0
    prompt: str | tuple[str, ...] | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        row = get_space(self.space)
        object.__setattr__(self, "space", row.name)
        _check_tensor(self.tensor, row)
        object.__setattr__(self, "sigma", _checked_sigma(self.sigma, len(self.tensor), self.tensor.device))
        object.__setattr__(self, "prompt", _checked_prompt(self.prompt, len(self.tensor)))
        if self.seed is not None and type(self.seed) is not int:
            raise LatentError(f"The seed must be a whole number or None; got {self.seed!r}.")
        problem = normalization_problem(self.tensor, row, self.sigmas)
        if problem:
            warnings.warn(problem, NormalizationWarning, stacklevel=3)

    @classmethod
    def from_raw(
        cls,
        raw: Tensor,
        space: str,
        *,
        statistics: LatentStatistics | None = None,
        sigma: float | Tensor = 0.0,
        prompt: str | Sequence[str] | None = None,
        seed: int | None = None,
    ) -> Latent:
        """Build a latent from the raw output of the space's encoder (its mean, before scaling and shifting).

        Args:
            raw: `[B, raw_channels, h, w]`; see `layout.normalize` for each space.
            space: Name or alias of the latent space.
            statistics: Mean and variance from the encoder's weights, for flux2 and dinov2.
            sigma: Noise level, as in the class.
            prompt: As in the class.
            seed: As in the class.

        Raises:
            LatentError: The tensor does not fit, or statistics are missing.
        """
        row = get_space(space)
        _check_is_float(raw)
        return cls(layout.normalize(raw, row, statistics), row.name, sigma, _tuple(prompt), seed)

    @classmethod
    def from_packed(
        cls,
        tokens: Tensor,
        space: str,
        *,
        height: int,
        width: int,
        sigma: float | Tensor = 0.0,
        prompt: str | Sequence[str] | None = None,
        seed: int | None = None,
    ) -> Latent:
        """Build a latent from the packed tokens of a Flux, FLUX.2 or Qwen-Image pipeline.

        Args:
            tokens: `[B, N, token_channels]`, normalized.
            space: Name or alias of the latent space.
            height: Height in pixels of the image the image model ran at.
            width: Its width.
            sigma: Noise level, as in the class.
            prompt: As in the class.
            seed: As in the class.

        Raises:
            LatentError: The tokens do not fit the image size.
        """
        row = get_space(space)
        _check_is_float(tokens)
        return cls(layout.unpack(tokens, row, height, width), row.name, sigma, _tuple(prompt), seed)

    @classmethod
    def from_euler(
        cls,
        tensor: Tensor,
        sigma: float | Tensor,
        space: str = "sdxl",
        *,
        prompt: str | Sequence[str] | None = None,
        seed: int | None = None,
    ) -> Latent:
        """Build a latent from SDXL's Euler scheduler, `x_0 + s e` (variance exploding).

        Tensor and sigma are divided by sqrt(s^2 + 1), which gives the variance-preserving parametrization that the
        networks were trained with.

        Args:
            tensor: `[B, 4, h, w]`, normalized.
            sigma: The scheduler's sigma, 0 to about 14.6; a number, or one per sample.
            space: A space whose noise parametrization is variance preserving.
            prompt: As in the class.
            seed: As in the class.

        Raises:
            LatentError: The space is flow matching: its schedulers need no conversion.
        """
        row = get_space(space)
        if row.noise_parametrization != "variance_preserving":
            raise LatentError(
                f"Space {row.name} is flow-matching: pass the latent and the scheduler's sigma to Latent() unchanged."
            )
        _check_tensor(tensor, row)
        latent, level = layout.euler_to_variance_preserving(tensor, sigma)
        return cls(latent, row.name, level if level.numel() > 1 else float(level), _tuple(prompt), seed)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str] | bytes | BinaryIO,
        *,
        space: str | None = None,
        sigma: float | Tensor | None = None,
    ) -> Latent:
        """Read a latent file that `save` wrote, or one of another program.

        Those are ComfyUI's `.latent` (in the scaling that ComfyUI has it), and one normalized tensor in a .safetensors,
        a `.npy` or a `torch.save` file. A missing batch axis is added, and the axis of a single frame dropped.

        Args:
            path: The file, its bytes, or the open file.
            space: Space of a file that does not say it.
            sigma: Noise level of a file that does not say it.

        Raises:
            FileError: The file is damaged.
            LatentError: It holds no latent, or contradicts `space` or `sigma`.
        """
        if not isinstance(path, (str, os.PathLike, bytes)):
            path.seek(0)
            path = path.read()
        stored = storage.read_latent(path)
        path = storage.IN_MEMORY if isinstance(path, bytes) else path
        if stored.metadata is None:
            if space is None and stored.comfyui:  # its name for the tensor, and 128 channels, are FLUX.2's alone
                channels = stored.tensor.shape[-3] if stored.tensor.ndim >= 3 else 0
                space = "flux2" if channels == SPACES["flux2"].channels else None
            if space is None:
                name = f"one of {', '.join(SPACES)}"
                raise LatentError(
                    f"{path} does not say which latent space it is of.",
                    python=f"Name it, {name}: Latent.load(path, space=...); or, if the tensor is raw, read it yourself "
                    "and use Latent.from_raw().",
                    cli=f"Name it, {name}: --space NAME. The latent must be normalized as diffusers has it.",
                    http=f"Name it, {name}: space=NAME. The latent must be normalized as diffusers has it.",
                )
            row, level = get_space(space), 0.0 if sigma is None else sigma
            tensor = _batched(stored.tensor, row, path)
            if stored.comfyui and row.name != "flux2":
                return cls.from_raw(tensor, row.name, sigma=level)
            return cls(tensor, row.name, level)
        metadata = stored.metadata
        if space is not None and get_space(space).name != metadata.space:
            raise LatentError(f"{path} holds a latent of space {metadata.space}, not {get_space(space).name}.")
        file_sigma = _collapse(torch.tensor(metadata.sigma, dtype=torch.float32))
        latent = cls(stored.tensor, metadata.space, file_sigma, _tuple(metadata.prompt), metadata.seed)
        if sigma is not None:
            given_sigma = _per_sample(_checked_sigma(sigma, len(latent), latent.tensor.device), latent)
            if not torch.allclose(given_sigma, latent.sigmas, atol=1e-6):
                raise LatentError(f"{path} says sigma {metadata.sigma}; leave sigma out, or correct the file.")
        return latent

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a .safetensors file with the tensor, space, sigma, prompt and seed, completely or not at all.

        Args:
            path: The file.
            overwrite: Whether an existing file may be replaced.

        Raises:
            FileError: The file exists or cannot be written.
        """
        prompt = (self.prompt,) * len(self) if isinstance(self.prompt, str) else self.prompt
        sigma = tuple(self.sigmas.tolist())
        metadata = storage.LatentMetadata(space=self.space, sigma=sigma, prompt=prompt, seed=self.seed)
        storage.write_latent(path, self.tensor, metadata, overwrite=overwrite)

    @property
    def latent_space(self) -> LatentSpace:
        """The latent space, as the registry describes it."""
        return SPACES[self.space]

    @property
    def sigmas(self) -> Tensor:
        """Sigma per sample, `[B]` float32 on the tensor's device."""
        return _per_sample(self.sigma, self)

    @property
    def prompts(self) -> tuple[str, ...] | tuple[None, ...]:
        """The prompt of each sample; None for all where there is none."""
        if self.prompt is None:
            return (None,) * len(self)
        return (self.prompt,) * len(self) if isinstance(self.prompt, str) else self.prompt

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the latent, `(h, w)`."""
        return self.tensor.shape[2], self.tensor.shape[3]

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the image PiD decodes it to."""
        height, width = (side * self.latent_space.pixels_per_cell for side in self.grid)
        return height, width

    def to_raw(self, statistics: LatentStatistics | None = None) -> Tensor:
        """The raw latent, which the space's own decoder takes; see `layout.denormalize`."""
        return layout.denormalize(self.tensor, self.latent_space, statistics)

    def unit_signal(self) -> Tensor:
        """The tensor over the weight of its signal, which then has a clean latent's scale: `z + s / (1 - s) e` in flow.

        A latent of pure noise has no signal, and becomes infinite.
        """
        signal, _ = noise_weights(self.latent_space, self.sigmas)
        return self.tensor / signal.to(self.tensor.dtype).view(-1, 1, 1, 1)

    def noised(self, sigma: float | Tensor, *, seed: int = 0, noise: Tensor | None = None) -> Latent:
        """Add noise to this clean latent, in the parametrization of its space.

        Args:
            sigma: Noise level in [0, 1]; a number, or one per sample. 0 draws nothing.
            seed: Seed of the unit Gaussian noise, drawn on the CPU and so the same on every machine.
            noise: Noise of the latent's shape, used instead.

        Raises:
            LatentError: There is noise in the latent already.
        """
        if bool((self.sigmas > 0).any()):
            raise LatentError(f"Only a clean latent can be noised; this one has sigma {self.sigmas.tolist()} already.")
        level = _checked_sigma(sigma, len(self), self.tensor.device)
        if not bool((_per_sample(level, self) > 0).any()):
            return self
        if noise is None:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(self.tensor.shape, generator=generator).to(self.tensor.device)
        tensor = layout.add_noise(self.tensor, noise, level, self.latent_space)
        return self._with(tensor=tensor, sigma=level, seed=seed if self.seed is None else self.seed)

    def with_prompt(self, prompt: str | Sequence[str]) -> Latent:
        """The same latent with another prompt, one for all or one per image."""
        return self._with(prompt=_checked_prompt(_tuple(prompt), len(self)))

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Latent:
        """The same latent on another device or in another floating-point dtype; sigma stays float32."""
        if dtype is not None and dtype not in _DTYPES:
            raise LatentError(f"A latent can be {_DTYPE_NAMES}; not {dtype}.")
        sigma = self.sigma.to(device=device) if isinstance(self.sigma, Tensor) else self.sigma
        return self._with(tensor=self.tensor.to(device=device, dtype=dtype), sigma=sigma)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[Latent]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice) -> Latent:
        """One sample (as a batch of one) or a slice of the batch."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"The batch has {len(self)} latents; there is no index {index}.")
            index = slice(index % len(self), index % len(self) + 1)
        tensor = self.tensor[index]
        if not len(tensor):
            raise LatentError(f"{index} selects none of the {len(self)} latents.")
        sigma = _collapse(self.sigma[index]) if isinstance(self.sigma, Tensor) else self.sigma
        prompt = self.prompt if self.prompt is None or isinstance(self.prompt, str) else self.prompt[index]
        return self._with(tensor=tensor, sigma=sigma, prompt=_unify(prompt))

    @staticmethod
    def cat(latents: Sequence[Latent]) -> Latent:
        """Concatenate latents of the same space, grid, dtype and device.

        Args:
            latents: At least one. Samples without a prompt get the empty one if others have one.

        Returns:
            One batch; its seed is that of all latents, or None if they differ.

        Raises:
            LatentError: The list is empty, or the latents differ in one of these.
        """
        if not latents:
            raise LatentError("There are no latents to concatenate; give at least one.")
        first = latents[0]
        for other in latents[1:]:
            for what, a, b in (
                ("space", first.space, other.space), ("grid", first.grid, other.grid),
                ("dtype", first.tensor.dtype, other.tensor.dtype), ("device", first.tensor.device, other.tensor.device),
            ):  # fmt: skip
                if a != b:
                    raise LatentError(
                        f"Latents of one batch must share their {what}: {a} and {b}. Take them one by one, or convert "
                        "them first."
                    )
        prompts: tuple[str, ...] | None = None
        if any(latent.prompt is not None for latent in latents):
            prompts = tuple(text or "" for latent in latents for text in latent.prompts)
        seeds = {latent.seed for latent in latents}
        return first._with(
            tensor=torch.cat([latent.tensor for latent in latents]),
            sigma=_collapse(torch.cat([latent.sigmas for latent in latents])),
            prompt=_unify(prompts),
            seed=seeds.pop() if len(seeds) == 1 else None,
        )

    def __repr__(self) -> str:
        shape = "x".join(str(side) for side in self.tensor.shape)
        sigma = self.sigma.tolist() if isinstance(self.sigma, Tensor) else self.sigma
        kind = str(self.tensor.dtype).removeprefix("torch.")
        return (
            f"Latent({self.space}, {shape} {kind} on {self.tensor.device}, sigma={sigma}, prompt={self.prompt!r}, "
            f"seed={self.seed})"
        )

    def _with(self, **changes: Any) -> Latent:
        """A copy with changes that need no check."""
        new = object.__new__(Latent)
        for name in ("tensor", "space", "sigma", "prompt", "seed"):
            object.__setattr__(new, name, changes.get(name, getattr(self, name)))
        return new


def require_latent(latent: object, space: str) -> Latent:
    """The argument, if it is a latent that a decoder of the space decodes. Raises LatentError if not."""
    if not isinstance(latent, Latent):
        raise LatentError(
            f"decode takes a Latent; got {type(latent).__name__}. Say what a tensor is: pidecode.Latent(tensor, "
            f"space={space!r}, sigma=0.0), or read a file: Latent.load(path). An image goes to upscale()."
        )
    if latent.space != space:
        raise LatentError(
            f"This decoder is for space {space}; the latent is of space {latent.space}. Load the decoder for "
            f"{latent.space}, or encode the image again with this one."
        )
    return latent


def _check_is_float(tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        kind = type(tensor).__name__
        raise LatentError(f"A latent is a torch tensor; got {kind}. Convert it with torch.as_tensor().")
    if tensor.dtype not in _DTYPES:
        raise LatentError(f"A latent is {_DTYPE_NAMES}; got {tensor.dtype}. Convert it with .float().")


def _check_tensor(tensor: object, space: LatentSpace) -> None:
    _check_is_float(tensor)
    assert isinstance(tensor, Tensor)
    shape = list(tensor.shape)
    if tensor.ndim != 4:
        advice = "Give one four-dimensional tensor."
        if tensor.ndim == 5 and tensor.shape[2] == 1:
            advice = "Drop the time axis with tensor.squeeze(2)."
        elif tensor.ndim == 3 and tensor.shape[0] != space.channels and tensor.shape[2] in _TOKEN_CHANNELS:
            advice = "These are packed tokens: build it with Latent.from_packed(), giving height and width."
        elif tensor.ndim == 3:
            advice = "Add the batch axis with tensor.unsqueeze(0)."
        raise LatentError(f"A {space.name} latent is [B, {space.channels}, h, w]; got {shape}. {advice}")
    if tensor.shape[1] != space.channels:
        others = [row.name for row in SPACES.values() if row.channels == tensor.shape[1]]
        advice = f"Latents of {' and '.join(others)} have that many." if others else "Check the space."
        if tensor.shape[1] == space.raw_channels:
            advice = "That is its raw form: build it with Latent.from_raw()."
        raise LatentError(
            f"A {space.name} latent has {space.channels} channels; got {tensor.shape[1]} in {shape}. {advice}"
        )
    if not tensor.numel():
        raise LatentError(f"The latent is empty: {shape}.")
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise LatentError(
            f"{bad} of {tensor.numel()} values of the latent are NaN or infinite. If the image model ran in float16, "
            "run it in bfloat16 or float32."
        )


def _checked_sigma(sigma: object, batch: int, device: torch.device) -> float | Tensor:
    """A float, or `[B]` float32 where samples differ. Raises LatentError outside [0, 1]."""
    try:
        values = torch.as_tensor(sigma, dtype=torch.float32).detach().flatten()
    except (TypeError, ValueError, RuntimeError):
        values = torch.empty(0)
    if isinstance(sigma, bool) or not values.numel():
        raise LatentError(f"Sigma is a number in [0, 1] or one per sample; got {sigma!r}.")
    if values.numel() not in (1, batch):
        raise LatentError(f"Sigma has {values.numel()} values for {batch} latents; give one, or one for each.")
    wrong = [number for number in values.tolist() if not 0.0 <= number <= 1.0]
    if wrong:
        raise LatentError(
            f"Sigma is the noise level, in [0, 1]; got {wrong[0]:g}. A scheduler's timestep must be divided by 1000; "
            "SDXL's Euler sigma goes through Latent.from_euler()."
        )
    return float(sigma) if isinstance(sigma, (int, float)) else _collapse(values.to(device))


def _collapse(sigma: Tensor) -> float | Tensor:
    """A float if all samples have the same sigma."""
    first = float(sigma[0])
    return first if bool((sigma == sigma[0]).all()) else sigma


def _per_sample(sigma: float | Tensor, latent: Latent) -> Tensor:
    return torch.as_tensor(sigma, dtype=torch.float32, device=latent.tensor.device).flatten().expand(len(latent))


def _checked_prompt(prompt: object, batch: int) -> str | tuple[str, ...] | None:
    if prompt is None or isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(text, str) for text in prompt):
        raise LatentError(f"The prompt is a text, one per sample, or None; got {prompt!r}.")
    if len(prompt) != batch:
        raise LatentError(f"There are {len(prompt)} prompts for {batch} latents; give one, or one for each.")
    return _unify(tuple(prompt))


def _batched(tensor: Tensor, space: LatentSpace, path: object) -> Tensor:
    """A stored tensor as `[B, C, h, w]`: a missing batch axis added, the axis of a single frame dropped."""
    channels = (space.channels, space.raw_channels)
    if tensor.ndim == 5:
        if tensor.shape[1] == 1 and tensor.shape[2] in channels:  # the axis of frames before that of channels
            return tensor[:, 0]
        if (frames := tensor.shape[2]) != 1:
            raise LatentError(f"{path} holds a video of {frames} frames, {list(tensor.shape)}; save one of them.")
        return tensor[:, :, 0]
    if tensor.ndim == 4 and tensor.shape[1] == 1 and tensor.shape[0] in channels and tensor.shape[1] not in channels:
        return tensor[:, 0][None]  # one frame without a batch axis
    return tensor[None] if tensor.ndim == 3 and tensor.shape[0] in channels else tensor


def _unify(prompt: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    return prompt[0] if isinstance(prompt, tuple) and len(set(prompt)) == 1 else prompt


def _tuple(prompt: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    return prompt if prompt is None or isinstance(prompt, str) else tuple(prompt)


def normalization_problem(tensor: Tensor, space: LatentSpace, sigmas: Tensor) -> str | None:
    """Say what is wrong and how to fix it if a tensor does not look like a normalized latent, else None.

    The check is of the spread: each channel's standard deviation over its cells, root-mean-square over channels. It is
    small for flat images, so a small spread counts only against noisy latents. Raw sd3 latents are narrower than
    normalized ones and are not recognized without noise.
    """
    cells = tensor.shape[-2] * tensor.shape[-1]
    if cells < _MIN_CELLS:
        return None
    float_latent = tensor.detach().float()
    spreads = float_latent.var(dim=(2, 3)).mean(dim=1).sqrt()
    sigma = sigmas.to(spreads)
    signal, noise = noise_weights(space, sigma)
    margin = 1.0 + 4.0 / math.sqrt(2.0 * cells * tensor.shape[1])  # four standard errors of a deviation
    upper = ((signal * space.spread_limit) ** 2 + noise**2).sqrt() * _SPREAD_TOLERANCE
    upper = upper.clamp_min(_MIN_UPPER_BOUND) * margin
    lower = noise * _MIN_NOISE_SHARE / margin
    for index, (spread, high, low, level) in enumerate(torch.stack([spreads, upper, lower, sigma], dim=1).tolist()):
        which = f"Sample {index} of this" if tensor.shape[0] > 1 else "This"
        if spread > high:
            advice = "If noise is still in it, pass its sigma."
            if space.noise_parametrization != "flow":
                advice = "If it comes from an Euler scheduler before its last step, use Latent.from_euler()."
            if space.raw_std is not None and space.raw_std > 1:
                advice = (
                    f"A raw {space.name} latent is {space.raw_std:g} times wider than a normalized one: "
                    f"if it is raw, build it with Latent.from_raw(). {advice}"
                )
            return (
                f"{which} {space.name} latent has a spread of {spread:.2f} within its channels; a normalized one "
                f"at sigma {level:g} stays below {high:.2f} (photographs: 0.6 to 1 when clean). {advice}"
            )
        if spread < low:
            return (
                f"{which} {space.name} latent has a spread of {spread:.2f} within its channels, less than the noise "
                f"of sigma {level:g} alone gives. Check sigma, and that the latent was not scaled: a raw latent "
                "belongs in Latent.from_raw()."
            )
    return _feature_problem(float_latent, space, sigma)


def _feature_problem(float_latent: Tensor, space: LatentSpace, sigma: Tensor) -> str | None:
    """Clean RAE features show a missing or repeated normalization in their mean and deviation over channels."""
    if space.statistics not in ("per_position", "layer_norm") or bool((sigma > 0).any()):
        return None
    variance, mean = torch.var_mean(float_latent, dim=1, correction=0)
    off = torch.maximum(mean.abs(), (variance.sqrt() - 1).abs())
    if space.statistics == "per_position" and float(off.max()) < 0.01:
        return (
            f"Every cell of this {space.name} latent has mean 0 and deviation 1 over its channels: it is the output of "
            "the LayerNorm, before the statistics per position. Build it with Latent.from_raw(), giving those."
        )
    if space.statistics == "layer_norm" and float(off.median()) > 0.3:
        return (
            f"The cells of this {space.name} latent are {float(off.median()):.2f} away from mean 0 and deviation 1 "
            "over channels, which its LayerNorm gives. Build it with Latent.from_raw() if it is the encoder's hidden "
            "state."
        )
    return None
