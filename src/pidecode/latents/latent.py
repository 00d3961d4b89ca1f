# SPDX-License-Identifier: Apache-2.0
"""The typed latent: a tensor with its space, its noise level and its prompt, normalized by definition."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pidecode.errors import LatentError
from pidecode.latents import layout, storage
from pidecode.latents.layout import LatentStatistics, noise_weights
from pidecode.registry.spaces import SPACES, LatentSpace, get_space

__all__ = ["Latent", "LatentStatistics", "NormalizationWarning"]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Latent:
    """A batch of latents in the frame PiD was trained on (docs/architecture.md, Latent spaces).

    tensor: `[B, C, h, w]`, float, *normalized*: what diffusers gives for `output_type="latent"`, unpacked
        (but see `from_packed`, `from_euler` and `from_raw`; FLUX.2 klein's final latent is raw).
    space: name or alias of a latent space; kept as the space's own name.
    sigma: noise still in it, in [0, 1]; a number, or one per sample (kept as a float32 tensor `[B]`).
    prompt: a text for all samples, or one per sample.
    seed: the seed it was made with, for the metadata.

    Raises LatentError for anything else, naming the mend, and SettingError for an unknown space. Warns with
    NormalizationWarning when the tensor's statistics look like another frame.
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
        object.__setattr__(self, "sigma", _clean_sigma(self.sigma, len(self.tensor), self.tensor.device))
        object.__setattr__(self, "prompt", _clean_prompt(self.prompt, len(self.tensor)))
        if self.seed is not None and type(self.seed) is not int:
            raise LatentError(f"The seed must be a whole number or None; got {self.seed!r}.")
        evidence = normalization_problem(self.tensor, row, self.sigmas)
        if evidence:
            warnings.warn(evidence, NormalizationWarning, stacklevel=3)

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
        """From what the space's own encoder puts out (its mean, before scaling and shifting).

        raw: `[B, raw channels, h, w]`; see `layout.normalize` for each space. flux2 and dinov2 need the
        statistics that lie in the encoder's weights. Raises LatentError as the class does.
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
        """From the tokens `[B, N, channels]` a Flux, FLUX.2 or Qwen-Image pipeline works with (normalized).

        height, width: pixels of the image the image model ran at. Raises LatentError if they do not fit.
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
        """From SDXL's Euler scheduler, `x_0 + s e` with s >= 0 (0 to about 14.6), normalized otherwise.

        Tensor and sigma are divided by sqrt(s^2 + 1), the frame the network was trained in. Raises
        LatentError for the flow-matching spaces, whose schedulers need no change of frame.
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
        cls, path: str | os.PathLike[str] | bytes, *, space: str | None = None, sigma: float | Tensor | None = None
    ) -> Latent:
        """Read a latent that `save` wrote; a foreign .safetensors file of one tensor if `space` is given.

        path: of the file, or its bytes.

        space and sigma settle what a file does not say; where the file says otherwise, that is an error.
        A foreign tensor must be normalized. Raises FileError for a broken file, LatentError for its content.
        """
        stored = storage.read_latent(path)
        path = storage.IN_MEMORY if isinstance(path, bytes) else path
        if stored.metadata is None:
            if space is None:
                raise LatentError(
                    f"{path} does not say which latent space it is of. Name it: Latent.load(path, space=...), one of "
                    f"{', '.join(SPACES)}; or, if the tensor is raw, read it yourself and use Latent.from_raw()."
                )
            return cls(stored.tensor, space, 0.0 if sigma is None else sigma)
        metadata = stored.metadata
        if space is not None and get_space(space).name != metadata.space:
            raise LatentError(f"{path} holds a latent of space {metadata.space}, not {get_space(space).name}.")
        metadata_sigma = _collapse(torch.tensor(metadata.sigma, dtype=torch.float32))
        latent = cls(stored.tensor, metadata.space, metadata_sigma, _tuple(metadata.prompt), metadata.seed)
        if sigma is not None:
            asked = _column(_clean_sigma(sigma, len(latent), latent.tensor.device), latent)
            if not torch.allclose(asked, latent.sigmas, atol=1e-6):
                raise LatentError(f"{path} says sigma {metadata.sigma}; leave sigma out, or correct the file.")
        return latent

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a .safetensors file with the tensor, space, sigma, prompt and seed, whole or not at all.

        Raises FileError if the file exists (unless `overwrite`) or cannot be written.
        """
        metadata = storage.LatentMetadata(
            space=self.space,
            sigma=tuple(self.sigmas.tolist()),
            prompt=(self.prompt,) * len(self) if isinstance(self.prompt, str) else self.prompt,
            seed=self.seed,
        )
        storage.write_latent(path, self.tensor, metadata, overwrite=overwrite)

    @property
    def latent_space(self) -> LatentSpace:
        """The row of the latent's space."""
        return SPACES[self.space]

    @property
    def sigmas(self) -> Tensor:
        """Sigma per sample, `[B]` float32 on the tensor's device."""
        return _column(self.sigma, self)

    @property
    def prompts(self) -> tuple[str, ...] | tuple[None, ...]:
        """The prompt of each sample; None for all where there is none."""
        if self.prompt is None:
            return (None,) * len(self)
        return (self.prompt,) * len(self) if isinstance(self.prompt, str) else self.prompt

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of cells."""
        return self.tensor.shape[2], self.tensor.shape[3]

    @property
    def output_size(self) -> tuple[int, int]:
        """Height and width, in pixels, of the image PiD makes of it."""
        return self.grid[0] * self.latent_space.pixels_per_cell, self.grid[1] * self.latent_space.pixels_per_cell

    def to_raw(self, statistics: LatentStatistics | None = None) -> Tensor:
        """What the space's own decoder takes; see `layout.denormalize`. flux2 and dinov2 need statistics."""
        return layout.denormalize(self.tensor, self.latent_space, statistics)

    def to_packed(self) -> Tensor:
        """The tokens `[B, N, channels]` of the space's pipeline; SettingError where it does not pack."""
        return layout.pack(self.tensor, self.latent_space)

    def noised(self, sigma: float | Tensor, *, seed: int = 0, noise: Tensor | None = None) -> Latent:
        """This clean latent noised to sigma in [0, 1] in its space's frame, and labeled so.

        The noise is unit Gaussian from a CPU generator with that seed, the same on every machine, or is given
        (the latent's shape). Sigma 0 draws nothing. Raises LatentError if noise is in the latent already.
        """
        if bool((self.sigmas > 0).any()):
            raise LatentError(f"Only a clean latent can be noised; this one has sigma {self.sigmas.tolist()} already.")
        level = _clean_sigma(sigma, len(self), self.tensor.device)
        if not bool((_column(level, self) > 0).any()):
            return self
        if noise is None:
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(self.tensor.shape, generator=generator).to(self.tensor.device)
        tensor = layout.add_noise(self.tensor, noise, level, self.latent_space)
        return self._with(tensor=tensor, sigma=level, seed=seed if self.seed is None else self.seed)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Latent:
        """The same latent on another device or in another floating-point type; sigma stays float32."""
        if dtype is not None and dtype not in _DTYPES:
            raise LatentError(f"A latent can be {_names(_DTYPES)}; not {dtype}.")
        sigma = self.sigma.to(device=device) if isinstance(self.sigma, Tensor) else self.sigma
        return self._with(tensor=self.tensor.to(device=device, dtype=dtype), sigma=sigma)

    def __len__(self) -> int:
        return self.tensor.shape[0]

    def __iter__(self) -> Iterator[Latent]:
        return iter(self.split())

    def __getitem__(self, index: int | slice) -> Latent:
        """A sample (as a batch of one) or a slice of the batch."""
        if isinstance(index, int):
            if not -len(self) <= index < len(self):
                raise IndexError(f"The batch has {len(self)} latents; there is no number {index}.")
            index = slice(index % len(self), index % len(self) + 1)
        tensor = self.tensor[index]
        if not len(tensor):
            raise LatentError(f"{index} selects none of the {len(self)} latents.")
        sigma = _collapse(self.sigma[index]) if isinstance(self.sigma, Tensor) else self.sigma
        prompt = self.prompt if self.prompt is None or isinstance(self.prompt, str) else self.prompt[index]
        return self._with(tensor=tensor, sigma=sigma, prompt=_unify(prompt))

    def split(self, size: int = 1) -> list[Latent]:
        """Batches of at most `size` samples, in order."""
        if size < 1:
            raise LatentError(f"Parts must hold at least one latent; got size={size}.")
        return [self[start : start + size] for start in range(0, len(self), size)]

    @staticmethod
    def cat(latents: Sequence[Latent]) -> Latent:
        """One batch of several latents of the same space, grid, type and device.

        Samples without a prompt get the empty one if others have one. The seed is kept if all agree.
        """
        if not latents:
            raise LatentError("There is nothing to join; give at least one latent.")
        first = latents[0]
        for other in latents[1:]:
            for what, mine, theirs in (
                ("space", first.space, other.space),
                ("grid", first.grid, other.grid),
                ("dtype", first.tensor.dtype, other.tensor.dtype),
                ("device", first.tensor.device, other.tensor.device),
            ):
                if mine != theirs:
                    raise LatentError(
                        f"Latents of one batch must share their {what}: {mine} and {theirs}. Decode them one by one, "
                        "or convert them first."
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
        """A changed copy, unchecked: only for changes that cannot break what was checked."""
        new = object.__new__(Latent)
        for name in ("tensor", "space", "sigma", "prompt", "seed"):
            object.__setattr__(new, name, changes.get(name, getattr(self, name)))
        return new


def _check_is_float(tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise LatentError(
            f"A latent is a torch tensor; got {type(tensor).__name__}. Convert it with torch.as_tensor()."
        )
    if tensor.dtype not in _DTYPES:
        raise LatentError(f"A latent is {_names(_DTYPES)}; got {tensor.dtype}. Convert it with .float().")


def _check_tensor(tensor: object, space: LatentSpace) -> None:
    _check_is_float(tensor)
    assert isinstance(tensor, Tensor)
    shape = list(tensor.shape)
    if tensor.ndim != 4:
        raise LatentError(
            f"A {space.name} latent is [B, {space.channels}, h, w]; got {shape}. {_shape_mend(tensor, space)}"
        )
    if tensor.shape[1] != space.channels:
        others = [row.name for row in SPACES.values() if row.channels == tensor.shape[1]]
        mend = f"Latents of {' and '.join(others)} have that many." if others else "Check the space."
        if tensor.shape[1] == space.raw_channels:
            mend = "That is its raw form: build it with Latent.from_raw()."
        raise LatentError(
            f"A {space.name} latent has {space.channels} channels; got {tensor.shape[1]} in {shape}. {mend}"
        )
    if not tensor.numel():
        raise LatentError(f"The latent is empty: {shape}.")
    bad = int((~torch.isfinite(tensor)).sum())
    if bad:
        raise LatentError(
            f"{bad} of {tensor.numel()} values of the latent are NaN or infinite. If the image model ran in float16, "
            "run it in bfloat16 or float32."
        )


def _shape_mend(tensor: Tensor, space: LatentSpace) -> str:
    if tensor.ndim == 3 and space.token_channels == tensor.shape[2]:
        return "These are packed tokens: build it with Latent.from_packed(), giving height and width."
    if tensor.ndim == 3:
        return "Add the batch axis with tensor.unsqueeze(0)."
    if tensor.ndim == 5 and tensor.shape[2] == 1:
        return "Drop the frame axis with tensor.squeeze(2)."
    return "Give one four-dimensional tensor."


def _clean_sigma(sigma: object, batch: int, device: torch.device) -> float | Tensor:
    """A float, or `[B]` float32 where samples differ. Raises LatentError outside [0, 1]."""
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float, Tensor, list, tuple)):
        raise LatentError(f"Sigma is a number in [0, 1] or one per sample; got {sigma!r}.")
    try:
        values = torch.as_tensor(sigma, dtype=torch.float32).detach().flatten()
    except (TypeError, ValueError, RuntimeError) as error:
        raise LatentError(f"Sigma is a number in [0, 1] or one per sample; got {sigma!r}.") from error
    if values.numel() not in (1, batch):
        raise LatentError(f"Sigma has {values.numel()} values for {batch} latents; give one, or one for each.")
    numbers = values.tolist()
    if not all(0.0 <= number <= 1.0 for number in numbers):
        worst = next(number for number in numbers if not 0.0 <= number <= 1.0)
        raise LatentError(
            f"Sigma is the share of noise, in [0, 1]; got {worst:g}. A scheduler's timestep must be divided by 1000; "
            "SDXL's Euler sigma goes through Latent.from_euler()."
        )
    if isinstance(sigma, (int, float)):
        return float(sigma)
    return _collapse(values.to(device))


def _collapse(sigma: Tensor) -> float | Tensor:
    """One float where all samples share it."""
    first = float(sigma[0])
    return first if bool((sigma == sigma[0]).all()) else sigma


def _column(sigma: float | Tensor, latent: Latent) -> Tensor:
    return torch.as_tensor(sigma, dtype=torch.float32, device=latent.tensor.device).flatten().expand(len(latent))


def _clean_prompt(prompt: object, batch: int) -> str | tuple[str, ...] | None:
    if prompt is None or isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(text, str) for text in prompt):
        raise LatentError(f"The prompt is a text, one per sample, or None; got {prompt!r}.")
    if len(prompt) != batch:
        raise LatentError(f"There are {len(prompt)} prompts for {batch} latents; give one, or one for each.")
    return _unify(tuple(prompt))


def _unify(prompt: str | tuple[str, ...] | None) -> str | tuple[str, ...] | None:
    return prompt[0] if isinstance(prompt, tuple) and len(set(prompt)) == 1 else prompt


def _tuple(prompt: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    return prompt if prompt is None or isinstance(prompt, str) else tuple(prompt)


def _names(dtypes: Sequence[torch.dtype]) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    return f"{', '.join(names[:-1])} or {names[-1]}"


# Below this many cells a spread says too little.
_FEWEST_CELLS = 16
# Image models leave their schedule by some per cent; the bounds give way by as much.
_SLACK = 1.15
# A latent at noise level s holds that noise: a spread this far below s contradicts it.
_LEAST_NOISE = 0.75
# Unit deviation is what "normalized" means: it is never counted against a latent, whatever its sigma.
_UNIT = 1.1


class NormalizationWarning(UserWarning):
    """A latent whose statistics do not look like the normalized frame at its sigma."""


def normalization_problem(tensor: Tensor, space: LatentSpace, sigmas: Tensor) -> str | None:
    """What speaks against `tensor` `[B, C, h, w]` being a normalized latent of `space` at noise levels `[B]`.

    None when nothing does. Judged by the spread (each channel's standard deviation over its cells,
    root-mean-square over channels), which for flat images is small whatever the frame and so never
    counts against a clean latent; noise adds its own known share. Raw sd3 latents are narrower than
    normalized ones and cannot be told from flat images, unless noise is in them.
    """
    cells = tensor.shape[-2] * tensor.shape[-1]
    if cells < _FEWEST_CELLS:
        return None
    wide = tensor.detach().float()
    spreads = wide.var(dim=(2, 3)).mean(dim=1).sqrt()
    sigma = sigmas.to(spreads)
    signal, noise = noise_weights(space, sigma)
    doubt = 1.0 + 4.0 / math.sqrt(2.0 * cells * tensor.shape[1])  # four standard errors of a deviation
    most = (((signal * space.spread_limit) ** 2 + noise**2).sqrt() * _SLACK).clamp_min(_UNIT) * doubt
    least = noise * _LEAST_NOISE / doubt
    for index, (spread, high, low, level) in enumerate(torch.stack([spreads, most, least, sigma], dim=1).tolist()):
        which = f"Sample {index} of this" if tensor.shape[0] > 1 else "This"
        if spread > high:
            return (
                f"{which} {space.name} latent has a spread of {spread:.2f} within its channels; a normalized one "
                f"at sigma {level:g} stays below {high:.2f} (photographs: 0.6 to 1 when clean). {_wider(space)}"
            )
        if spread < low:
            return (
                f"{which} {space.name} latent has a spread of {spread:.2f} within its channels, less than the noise "
                f"of sigma {level:g} alone gives. Check sigma, and that the latent was not scaled: a raw latent "
                "belongs in Latent.from_raw()."
            )
    return _token_evidence(wide, space, sigma)


def _wider(space: LatentSpace) -> str:
    mends = []
    if space.raw_std is not None and space.raw_std > 1:
        mends.append(
            f"A raw {space.name} latent is {space.raw_std:g} times wider than a normalized one: "
            "if it is raw, build it with Latent.from_raw()."
        )
    if space.noise_parametrization == "variance_preserving":
        mends.append("If it comes from an Euler scheduler before its last step, use Latent.from_euler().")
    else:
        mends.append("If noise is still in it, pass its sigma.")
    return " ".join(mends)


def _token_evidence(wide: Tensor, space: LatentSpace, sigma: Tensor) -> str | None:
    """Clean RAE features betray a missing or a superfluous step by their mean and deviation over channels."""
    if space.statistics not in ("per_position", "layer_norm") or bool((sigma > 0).any()):
        return None
    variance, mean = torch.var_mean(wide, dim=1, correction=0)
    off = torch.maximum(mean.abs(), (variance.sqrt() - 1).abs())
    if space.statistics == "per_position" and float(off.max()) < 0.01:
        return (
            f"Every cell of this {space.name} latent has mean 0 and deviation 1 over its channels: it is the "
            "output of the LayerNorm, before the statistics per position. Build it with Latent.from_raw(), giving "
            "those."
        )
    if space.statistics == "layer_norm" and float(off.median()) > 0.3:
        return (
            f"The cells of this {space.name} latent are {float(off.median()):.2f} away from mean 0 and "
            "deviation 1 over "
            "channels, which its LayerNorm gives. Build it with Latent.from_raw() if it is the encoder's hidden state."
        )
    return None
