# SPDX-License-Identifier: Apache-2.0
"""Requests and responses of OpenAI's image API (https://platform.openai.com/docs/api-reference/images)."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pidecode.options import DecoderKind, FileFormat
from pidecode.serve.schemas import MAX_JSON_INTEGER, MAX_PROMPT_LENGTH, ResultParams, with_decode_options
from pidecode.serve.service import Result

MAX_IMAGES = 4

ParamsT = TypeVar("ParamsT", bound=ResultParams)

RequestT = TypeVar("RequestT", bound="OpenAIRequest")

IgnoredText = Annotated[str | None, Field(max_length=200, description="Accepted and ignored.")]
_OPENAI_MODELS = re.compile(r"(gpt-image|chatgpt-image|dall-e)-")
_SIZE = "^(auto|[1-9][0-9]{1,4}x[1-9][0-9]{1,4})$"


class OpenAIRequest(BaseModel):
    """Fields of both image endpoints. The decode options are additions to OpenAI's.

    What describes OpenAI's own models is accepted and has no effect, so that their clients work as they are.
    """

    model_config = ConfigDict(extra="forbid")
    option_names: ClassVar[tuple[str, ...]] = ()

    model: str | None = Field(
        default=None, max_length=200, description="A name from /v1/models; OpenAI's own names mean the first."
    )
    n: int = Field(default=1, ge=1, le=MAX_IMAGES, description="Number of images, with consecutive seeds.")
    response_format: Literal["b64_json"] = Field(
        default="b64_json", description="Images are in the response itself; the server keeps no files."
    )
    output_format: FileFormat = "png"
    output_compression: int | None = Field(
        default=None, ge=0, le=100, description="Quality of WebP and JPEG; no effect on PNG."
    )
    background: Literal["auto", "opaque", "transparent"] = Field(
        default="auto",
        description="auto keeps the transparency of the image, opaque puts it on white, transparent demands it.",
    )
    stream: Literal[False] | None = Field(
        default=None, description="Events are at /v1/upscale?stream=true and /v1/decode?stream=true."
    )
    quality: IgnoredText = None
    style: IgnoredText = None
    moderation: IgnoredText = None
    input_fidelity: IgnoredText = None
    partial_images: int | None = Field(default=None, ge=0, le=0, description="Only 0: there are none.")
    user: IgnoredText = None

    @field_validator("stream", mode="before")
    @classmethod
    def _form_boolean(cls, value: Any) -> Any:
        return False if value == "false" else value

    def decoder_name(self, names: Collection[str]) -> str | None:
        """The name of the decoder that is meant: None, for the first, where one of OpenAI's own models is named."""
        foreign = self.model is not None and self.model not in names and _OPENAI_MODELS.match(self.model)
        return None if foreign else self.model

    def jobs(self, params: type[ParamsT], decoder_name: str | None, kind: DecoderKind | None = None) -> list[ParamsT]:
        """The parameters of each image's job, of a class with the same decode options.

        There is a single one where all images would be equal, because a decoder of that `kind` takes no seed.
        """
        options = self.model_dump(include=set(self.option_names), exclude_none=True)
        options |= {"model": decoder_name, "format": self.output_format}
        if self.output_format != "png" and self.output_compression is not None:
            options["quality"] = max(1, self.output_compression)
        jobs = []
        for index in range(1 if kind == "feed-forward" else self.n):
            if index:
                options["seed"] = (options.get("seed", 0) + 1) % (MAX_JSON_INTEGER + 1)
            jobs.append(params(**options))
        return jobs


@with_decode_options("decode", exclude=("size", "prompt"))
class ImageGenerationRequest(OpenAIRequest):
    """Body of /v1/images/generations."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_LENGTH)]
    background: Literal["auto", "opaque"] = Field(default="auto", description="No effect; nothing is made transparent.")
    size: str = Field(
        default="auto", pattern=_SIZE, description="WIDTHxHEIGHT of the result in pixels; auto is 2048x2048."
    )


@with_decode_options("upscale", exclude=("size", "prompt"))
class ImageEditRequest(OpenAIRequest):
    """Form fields of /v1/images/edits besides the image."""

    prompt: str | None = Field(default=None, max_length=MAX_PROMPT_LENGTH, description=(
        "What the image shows, for decoders that read text; ignored by others."
    ))  # fmt: skip
    size: str = Field(default="auto", pattern=_SIZE, description=(
        "auto for the enlarged size, or a smaller size of the same shape in pixels."
    ))  # fmt: skip

    @classmethod
    def form_schema(cls) -> dict[str, Any]:
        """The schema of the whole form, the image included."""
        schema = cls.model_json_schema()
        schema["properties"]["image"] = {"type": "string", "format": "binary"}
        schema["required"] = ["image"]
        return schema


class EncodedImage(BaseModel):
    """One image file in base64."""

    b64_json: str


class ImagesResponse(BaseModel):
    """Response of both image endpoints."""

    created: int
    output_format: FileFormat
    size: str
    data: list[EncodedImage]


class ModelInfo(BaseModel):
    """One decoder. All but the first four fields are additions to OpenAI's."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "local"
    space: str
    scale: int
    kind: str
    takes_images: bool
    reads_text: bool
    max_sigma: Annotated[float, Field(description="Largest noise level of a latent.")]
    license: str


class ModelList(BaseModel):
    """The decoders that can be named as `model`."""

    object: Literal["list"] = "list"
    data: list[ModelInfo]


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    code: str


class ErrorResponse(BaseModel):
    """Body of every response that is not 2xx."""

    error: ErrorDetail


def images_response(results: list[Result], output_format: FileFormat, n: int) -> ImagesResponse:
    """The response with `n` files, which all have one size; a single result stands for all."""
    results = results * n if len(results) == 1 else results
    return ImagesResponse(
        created=int(time.time()), output_format=output_format, size=f"{results[0].width}x{results[0].height}",
        data=[EncodedImage(b64_json=base64.b64encode(result.data).decode("ascii")) for result in results],
    )  # fmt: skip
