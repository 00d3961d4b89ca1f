# SPDX-License-Identifier: Apache-2.0
"""Requests and responses of the HTTP API, and the limits that hold for every request."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, create_model

from pidecode.errors import SettingError, SizeError
from pidecode.options import MAX_SIDE, Command, DecodeOptions, FileFormat, OptionInfo, SaveOptions, option_infos

MEDIA_TYPES: dict[FileFormat, str] = {
    "png": "image/png", "webp": "image/webp", "jpeg": "image/jpeg", "jpg": "image/jpeg",
}  # fmt: skip
_SAVE = option_infos(SaveOptions, interface="http")

MAX_JSON_INTEGER = 2**53 - 1
"""The largest integer that every JSON parser reads exactly; JavaScript's numbers are 64-bit floats."""
MAX_PROMPT_LENGTH = 4000

ModelName = Annotated[str | None, Field(max_length=200, description="A name from /v1/models; by default the first.")]
ModelT = TypeVar("ModelT", bound=BaseModel)
Side = Annotated[int | None, Field(ge=16, le=MAX_SIDE)]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Limits that hold for every request."""

    body_bytes: int = 64 * 2**20  # longest request body
    pixels: int = 4096 * 4096  # most of a result; an image to upscale may have accordingly fewer
    waiting: int = 8  # jobs that may wait while one runs
    job_seconds: float = 600.0  # longest time from a job's submission to its end, waiting included
    body_seconds: float = 60.0  # longest time a body may take to arrive

    def __post_init__(self) -> None:
        for name in ("body_bytes", "pixels", "job_seconds", "body_seconds"):
            if getattr(self, name) <= 0:
                raise SettingError(f"The limit {name} is {getattr(self, name)}; it must be positive.")
        if self.waiting < 0:
            raise SettingError(f"The limit waiting is {self.waiting}; it must be 0 or more.")

    def check_pixels(self, width: int, height: int) -> None:
        """Raise SizeError for a result with more pixels than allowed."""
        if width * height > self.pixels:
            raise SizeError(
                f"The result would have {width}x{height} = {width * height:,} pixels; this server makes at most "
                f"{self.pixels:,}. Use a smaller input, or start the server with a larger --max-pixels."
            )


class ResultParams(BaseModel):
    """Parameters of every job. Decode options that are not given have the decoder's default."""

    model_config = ConfigDict(extra="forbid")
    option_names: ClassVar[tuple[str, ...]] = ()  # decode options among the fields; `size` stands for width and height

    model: ModelName = None
    format: FileFormat = Field(default="png", description=_SAVE["format"].help)
    quality: int | None = Field(default=None, ge=1, le=100, description=_SAVE["quality"].help)
    stream: bool = Field(
        default=False,
        description="Answer with the job's progress as lines of JSON, the last of which links to the file.",
    )
    reconnect_seconds: float | None = Field(default=None, ge=0.1, le=300, description=(
        "How long a streamed job goes on without its client, which can follow it again at /v1/jobs."
    ))  # fmt: skip

    def options(self) -> DecodeOptions:
        """The decode options that were given. Raises SettingError if one is out of range or cannot act."""
        values = dict(self)
        SaveOptions(format=self.format, quality=self.quality)
        if self.reconnect_seconds is not None and not self.stream:
            raise SettingError("reconnect_seconds acts with stream=true only; leave it out.")
        if "size" in self.option_names and (values["width"], values["height"]) != (None, None):
            values["size"] = values["width"], values["height"]
        return DecodeOptions(**{name: values.get(name) for name in self.option_names})


def with_decode_options(command: Command, *, exclude: Collection[str] = ()) -> Callable[[type[ModelT]], type[ModelT]]:
    """Class decorator: add a field for each decode option that HTTP offers for a command, with some exceptions."""

    def add(model: type[ModelT]) -> type[ModelT]:
        infos = option_infos(command=command, interface="http")
        names, fields = [name for name in infos if name not in exclude], dict[str, Any]()
        for name in names:
            info = infos[name]
            if name != "size":
                fields[name] = _field_type(info, info.type, info.help), None
                continue
            for side in ("width", "height"):
                text = f"{side.title()} of the result in pixels; alone, it keeps the shape."
                fields[side] = _field_type(info, int, text), None
        created = create_model(
            model.__name__, __base__=model, __doc__=model.__doc__, __module__=model.__module__, **fields
        )
        created.option_names = tuple(names)  # type: ignore[attr-defined]
        return created

    return add


def _field_type(info: OptionInfo, kind: type, description: str) -> Any:
    """The type of an option's field, with its bounds, choices and description."""
    if info.choices:
        return Annotated[Literal[info.choices] | None, Field(description=description)]
    if kind is str:
        return Annotated[str | None, Field(max_length=MAX_PROMPT_LENGTH, description=description)]
    maximum = info.maximum
    if kind is int and maximum is not None:
        maximum = min(int(maximum), MAX_JSON_INTEGER)
    return Annotated[kind | None, Field(ge=info.minimum, le=maximum, description=description)]


@with_decode_options("upscale")
class UpscaleParams(ResultParams):
    """Parameters for upscaling an image."""


@with_decode_options("decode")
class DecodeParams(ResultParams):
    """Parameters for decoding a latent."""

    space: str | None = Field(
        default=None, max_length=40, description="Latent space of a normalized latent whose file does not name it."
    )


@with_decode_options("decode", exclude=("size", "prompt"))
class GenerateParams(ResultParams):
    """Parameters for generating an image from a prompt."""

    width: int = Field(default=2048, ge=16, le=MAX_SIDE, description="Width of the result in pixels.")
    height: int = Field(default=2048, ge=16, le=MAX_SIDE, description="Height of the result in pixels.")


class PlanParams(BaseModel):
    """The input whose decode is to be estimated."""

    model_config = ConfigDict(extra="forbid")

    kind: Annotated[Literal["image", "latent"], Field(description="What the input is.")]
    width: Annotated[int, Field(ge=1, le=MAX_SIDE, description="Of the input, in pixels or latent cells.")]
    height: Annotated[int, Field(ge=1, le=MAX_SIDE, description="Of the input, in pixels or latent cells.")]
    model: ModelName = None
    output_width: Side = Field(default=None, description="Of the result, with output_height; for latents only.")
    output_height: Side = Field(default=None, description="Of the result, with output_width; for latents only.")

    def output_size(self) -> tuple[int, int] | None:
        """Width and height of the result, if given. Raises SettingError if only one is, or if they are for an image."""
        width, height = self.output_width, self.output_height
        if width is None and height is None:
            return None
        if width is None or height is None or self.kind == "image":
            raise SettingError("Give output_width and output_height together, and for latents only, or neither.")
        return width, height


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """What an uploaded file contains.

    Attributes:
        kind: "image" or "latent".
        width: In pixels of an image, cells of a latent.
        height: In pixels of an image, cells of a latent.
        space: Latent space, if the file names it.
        sigma: Noise level of a latent, if the file names it.
        prompt: Prompt of a latent, if the file holds it.
        metadata: What pidecode wrote into an image, if anything.
        texts: Texts of other programs in an image, which go over to the result: Automatic1111's `parameters`, ComfyUI's
            `prompt` and `workflow`, comments.
    """

    kind: Literal["image", "latent"]
    width: int
    height: int
    space: str | None = None
    sigma: float | None = None
    prompt: str | None = None
    metadata: dict[str, Any] | None = None
    texts: dict[str, str] = field(default_factory=dict)


class DecodePlan(BaseModel):
    """Size of a result and the memory its decode needs, in bytes."""

    width: int
    height: int
    weights: Annotated[int, Field(description="Held by the model's weights.")]
    working: Annotated[int, Field(description="Needed on top while the decode runs.")]
    free: Annotated[int | None, Field(description="Free memory; null where the device does not report it.")]
    fits: bool
    seconds: float | None = Field(default=None, description="Predicted time, from earlier jobs of this server.")


class ServerLimits(BaseModel):
    """The server's limits."""

    body_bytes: int
    pixels: int
    waiting: int
    job_seconds: float
    body_seconds: float


class ServerInfo(BaseModel):
    """Version, device, limits and abilities of the server."""

    version: str
    device: str
    limits: ServerLimits
    text_to_image: Annotated[bool, Field(description="Whether images can be generated from a prompt.")]


class JobEvent(BaseModel):
    """One line of a progress stream. The last one has a final state, and a result or an error."""

    id: Annotated[str, Field(description="Of the job, for /v1/jobs.")]
    state: Literal["waiting", "running", "done", "failed", "cancelled"]
    position: int | None = Field(default=None, description="Position in the queue while waiting; 1 is next.")
    step: int | None = None
    num_steps: int | None = Field(default=None, description="0 while unknown.")
    activity: str | None = Field(
        default=None, description="What is being done, in words, such as: decoding, strip 3 of 8."
    )
    done: float | None = Field(default=None, description="Share of the predicted work that is done, 0 to 1.")
    seconds_left: float | None = Field(default=None, description="Predicted time to the end, once it is known.")
    preview: str | None = Field(default=None, description="Newest estimate: a data URL with a small JPEG.")
    result: str | None = Field(
        default=None, description="Path of the finished file. It can be fetched once, within five minutes."
    )
    width: int | None = None
    height: int | None = None
    metadata: dict[str, Any] | None = Field(default=None, description="What is written into the file.")
    warnings: list[str] | None = None
    seconds: float | None = Field(default=None, description="Time the job has run, without waiting.")
    bytes: int | None = Field(default=None, description="Size of the finished file.")
    error: dict[str, str] | None = Field(
        default=None, description="message, type and code, as in every error response."
    )


class Health(BaseModel):
    """State of the server and its queue."""

    status: Literal["ok", "stopping"]
    waiting: int
    running: bool
