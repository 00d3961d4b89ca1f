# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for, as one checked model, and the bounds a server sets to everyone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pidecode.color_fix import Lock
from pidecode.errors import SettingError, SizeError

Format = Literal["png", "webp", "jpeg"]
MEDIA: dict[str, str] = {"png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg"}

LARGEST_SEED = 2**53 - 1
"""The largest whole number that JSON carries through every language unharmed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Bounds that hold for every request."""

    body_bytes: int = 64 * 2**20
    """Longest body."""
    pixels: int = 4096 * 4096
    """Most pixels of a result; an image to enlarge has accordingly fewer."""
    waiting: int = 8
    """Jobs that may wait while one runs."""
    seconds: float = 600.0
    """Longest time from a job's arrival to its end, waiting included."""
    body_seconds: float = 60.0
    """Longest time a body may take to arrive."""

    def __post_init__(self) -> None:
        for name in ("body_bytes", "pixels", "seconds", "body_seconds"):
            if getattr(self, name) <= 0:
                raise SettingError(f"The limit {name} is {getattr(self, name)}; it must be positive.")
        if self.waiting < 0:
            raise SettingError(f"The limit waiting is {self.waiting}; it must be 0 or more.")

    def check_pixels(self, width: int, height: int) -> None:
        """Raise SizeError if a result of that size is larger than this server makes."""
        if width * height > self.pixels:
            raise SizeError(
                f"The result would have {width}x{height} = {width * height:,} pixels; this server makes at most "
                f"{self.pixels:,}. Use a smaller input, or start the server with a larger --max-pixels."
            )


class Options(BaseModel):
    """How to make the image. What is left out is the model's own choice; what cannot act is refused."""

    model_config = ConfigDict(extra="forbid")

    model: Annotated[
        str | None, Field(max_length=200, description="A name from /v1/models; the first if left out.")
    ] = None
    prompt: Annotated[
        str | None, Field(max_length=4000, description="What the image shows, for models that read prompts.")
    ] = None
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED, description="Of the noise.")] = 0
    steps: Annotated[int | None, Field(ge=1, le=100, description="Few-step models take 1 to 4.")] = None
    sampler: Annotated[Literal["sde", "ode"] | None, Field(description="How a few-step model walks.")] = None
    sigma: Annotated[
        float | None,
        Field(ge=0, le=0.8, description="Strength: noise put into a clean latent first, so more is invented."),
    ] = None
    guidance: Annotated[float | None, Field(ge=0, le=30, description="Of a many-step model.")] = None
    color_fix: Annotated[
        Lock | None,
        Field(
            description="Hold the image that is enlarged: not at all, its broad colors, all colors, or all it "
            "shows; the last is what small models do if left out."
        ),
    ] = None
    format: Annotated[Format, Field(description="Of the file that comes back.")] = "png"

    def settings(self) -> dict[str, Any]:
        """Keyword settings for the decoder: those that were given."""
        names = ("seed", "steps", "sampler", "sigma", "guidance", "color_fix")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class UpscaleOptions(Options):
    """How to enlarge an image."""

    scale: Annotated[
        int | None,
        Field(ge=1, le=8, description="Times the image's size; less than the model's own is made whole, then reduced."),
    ] = None

    fit: Annotated[
        Literal["pad", "crop"],
        Field(description="For sides that do not divide: mirror the edges and cut them off again, or crop first."),
    ] = "pad"


class DecodeOptions(Options):
    """How to decode a latent."""

    width: Annotated[int | None, Field(ge=16, le=65536, description="Of the result, with height; else natural.")] = None
    height: Annotated[int | None, Field(ge=16, le=65536, description="Of the result, with width; else natural.")] = None
    space: Annotated[
        str | None,
        Field(max_length=40, description="Latent space, for a file that does not say; it must be normalized."),
    ] = None

    def settings(self) -> dict[str, Any]:
        """Keyword settings for the decoder: those that were given. Raises SettingError for half a size."""
        given = super().settings()
        if (self.width is None) != (self.height is None):
            raise SettingError("Give width and height together, or neither.")
        if self.width is not None and self.height is not None:
            given["size"] = (self.width, self.height)
        return given
