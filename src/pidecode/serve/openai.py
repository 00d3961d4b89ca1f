# SPDX-License-Identifier: Apache-2.0
"""Requests and responses of OpenAI's image API (https://platform.openai.com/docs/api-reference/images)."""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from pidecode.serve.schemas import (
    MAX_JSON_INTEGER,
    MAX_PROMPT_LENGTH,
    FileFormat,
    ModelName,
    ResultParams,
    with_decode_options,
)
from pidecode.serve.service import Result

MAX_IMAGES = 4

ParamsT = TypeVar("ParamsT", bound=ResultParams)

RequestT = TypeVar("RequestT", bound="OpenAIRequest")

_SIZE = "[1-9][0-9]{1,4}x[1-9][0-9]{1,4}"


class OpenAIRequest(BaseModel):
    """Fields of both image endpoints. The decode options are additions to OpenAI's."""

    model_config = ConfigDict(extra="forbid")
    option_names: ClassVar[tuple[str, ...]] = ()

    model: ModelName = None
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES, description="Number of images, with consecutive seeds.")] = 1
    response_format: Annotated[
        Literal["b64_json"], Field(description="Images are in the response itself; the server keeps no files.")
    ] = "b64_json"
    output_format: FileFormat = "png"
    user: Annotated[str | None, Field(max_length=200, description="Accepted and ignored.")] = None

    def jobs(self, params: type[ParamsT]) -> list[ParamsT]:
        """The parameters of each image's job, of a class with the same decode options."""
        options = self.model_dump(include=set(self.option_names), exclude_none=True)
        jobs = []
        for index in range(self.n):
            if index:
                options["seed"] = (options.get("seed", 0) + 1) % (MAX_JSON_INTEGER + 1)
            jobs.append(params(model=self.model, format=self.output_format, **options))
        return jobs


@with_decode_options("decode", exclude=("size", "prompt"))
class ImageGenerationRequest(OpenAIRequest):
    """Body of /v1/images/generations."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_LENGTH)]
    size: Annotated[str, Field(pattern=f"^{_SIZE}$", description="WIDTHxHEIGHT of the result, in pixels.")] = (
        "2048x2048"
    )


@with_decode_options("upscale")
class ImageEditRequest(OpenAIRequest):
    """Form fields of /v1/images/edits besides the image."""

    size: Annotated[str, Field(pattern=f"^(auto|{_SIZE})$", description="auto, or exactly the enlarged size.")] = "auto"

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


def images_response(results: list[Result], output_format: FileFormat) -> ImagesResponse:
    """The response with these files, which all have one size."""
    return ImagesResponse(
        created=int(time.time()),
        output_format=output_format,
        size=f"{results[0].width}x{results[0].height}",
        data=[EncodedImage(b64_json=base64.b64encode(result.data).decode("ascii")) for result in results],
    )
