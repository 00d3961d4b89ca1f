# SPDX-License-Identifier: Apache-2.0
"""Decode options and runtime options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import TypedDict

from torch import Tensor

from pidecode.color_fix import Lock
from pidecode.errors import SettingError
from pidecode.registry.checkpoints import StudentKind

LARGEST_TRAINED_SIGMA = 0.8
"""Beyond this much noise the networks never saw a latent (SPEC.md section 7)."""


class DecodeSettings(TypedDict, total=False):
    """Keyword settings of `decode` and `upscale`; `Settings` says what each means."""

    seed: int | Sequence[int]
    steps: int
    sampler: StudentKind
    sigma: float
    size: tuple[int, int]
    guidance: float
    shift: float
    negative_prompt: str
    prompt_embeds: Tensor
    color_fix: Lock
    reference: Tensor


class RunSettings(TypedDict, total=False):
    """Keyword settings of `from_pretrained` and `PixelDecoder` for speed; rounding aside they change no image."""

    compile: bool
    """Run the sums around the matrix products as the framework compiles them: worth the wait for many images on an
    accelerator (docs/performance.md)."""
    graphs: bool
    """Record an evaluation once per image size and replay it; CUDA devices only."""


def checked_run_settings(given: RunSettings) -> RunSettings:
    """The same settings. Raises SettingError for a name that does not exist."""
    unknown = sorted(set(given) - set(RunSettings.__annotations__))
    if unknown:
        known = ", ".join(sorted(RunSettings.__annotations__))
        raise SettingError(f"There is no setting {', '.join(unknown)} of how a decoder runs; there are {known}.")
    return given


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a latent is decoded. None means the network's own default; a setting that cannot act is refused."""

    seed: int | Sequence[int] = 0
    """One seed (each further image of a batch gets the next number), or one per image."""
    steps: int | None = None
    """Student: 1 to 4, default 4. Teacher: default 25."""
    sampler: StudentKind | None = None
    """Student only: "sde" (default, fresh noise at every step) or "ode"."""
    sigma: float | None = None
    """Strength: noises a clean latent to this level, in [0, 0.8], and tells the network so."""
    size: tuple[int, int] | None = None
    """Width and height in pixels, where they should differ from the latent's natural size."""
    guidance: float | None = None
    """Teacher only: classifier-free guidance, default 5."""
    shift: float | None = None
    """Teacher only: flow shift; the default grows with the image as in training."""
    negative_prompt: str | None = None
    """Teacher only: what guidance leads away from."""
    prompt_embeds: Tensor | None = field(default=None, compare=False)
    """Ready-made text states `[B, tokens, text_dim]` instead of a prompt."""
    color_fix: Lock | None = None
    """Hold brightness and hue to a reference: "off", "soft" over wide areas, "full" down to a few pixels; "detail"
    holds all that the reference shows. Default "off"; "detail" where `upscale` enlarges with a small decoder that can
    be looked through, as `tiny` can, and no strength is asked for: such decoders lose detail that the image shows."""
    reference: Tensor | None = field(default=None, compare=False)
    """What `color_fix` holds to, `[B, 3, h, w]` in [-1, 1]; default the image being enlarged, or what the space's
    own decoder makes of the clean latent."""

    @classmethod
    def of(cls, given: DecodeSettings) -> Settings:
        """Check the names of keyword settings. Raises SettingError for one that does not exist."""
        known = {entry.name for entry in fields(cls)}
        unknown = sorted(set(given) - known)
        if unknown:
            raise SettingError(f"There is no setting {', '.join(unknown)}; there are {', '.join(sorted(known))}.")
        return cls(**given)

    def seeds(self, batch: int) -> list[int]:
        """One seed per image."""
        if isinstance(self.seed, int):
            return [self.seed + index for index in range(batch)]
        if len(self.seed) != batch:
            raise SettingError(f"There are {len(self.seed)} seeds for {batch} images; give one, or one for each.")
        return list(self.seed)
