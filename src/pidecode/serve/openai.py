# SPDX-License-Identifier: Apache-2.0
"""Requests and responses of OpenAI's image API (https://platform.openai.com/docs/api-reference/images)."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pidecode.errors import SettingError
from pidecode.serve.schemas import (
    MAX_JSON_INTEGER,
    MAX_PROMPT_LENGTH,
    FileFormat,
    GenerateParams,
    ModelName,
    UpscaleParams,
)
from pidecode.serve.service import Result
from pidecode.units import parse_size

MAX_IMAGES = 4

_SIZE = "[1-9][0-9]{1,4}x[1-9][0-9]{1,4}"


class OpenAIRequest(BaseModel):
    """Fields of both image endpoints. `seed` and `num_steps` are additions to OpenAI's."""

    model_config = ConfigDict(extra="forbid")

    model: ModelName = None
    n: Annotated[int, Field(ge=1, le=MAX_IMAGES, description="Number of images, with consecutive seeds.")] = 1
    response_format: Annotated[
        Literal["b64_json"], Field(description="Images are in the response itself; the server keeps no files.")
    ] = "b64_json"
    output_format: FileFormat = "png"
    user: Annotated[str | None, Field(max_length=200, description="Accepted and ignored.")] = None
    seed: Annotated[int | None, Field(ge=0, le=MAX_JSON_INTEGER)] = None
    num_steps: Annotated[int | None, Field(ge=1, le=100, description="Steps of the decoder.")] = None

    def _job_options(self) -> Iterator[dict[str, Any]]:
        for index in range(self.n):
            seed = None if self.seed is None else self.seed + index
            yield {"model": self.model, "seed": seed, "num_steps": self.num_steps, "format": self.output_format}


class ImageGenerationRequest(OpenAIRequest):
    """Body of /v1/images/generations."""

    prompt: Annotated[str, Field(min_length=1, max_length=MAX_PROMPT_LENGTH)]
    size: Annotated[str, Field(pattern=f"^{_SIZE}$", description="WIDTHxHEIGHT of the result, in pixels.")] = (
        "2048x2048"
    )

    def result_size(self) -> tuple[int, int]:
        """Width and height of the result in pixels."""
        return parse_size(self.size)

    def generate_params(self) -> list[GenerateParams]:
        """Options of each image's job."""
        return [GenerateParams(**options) for options in self._job_options()]


class ImageEditRequest(OpenAIRequest):
    """Form fields of /v1/images/edits besides the image."""

    prompt: Annotated[str, Field(max_length=MAX_PROMPT_LENGTH, description="For models that read prompts.")] = ""
    size: Annotated[str, Field(pattern=f"^(auto|{_SIZE})$", description="auto, or exactly the enlarged size.")] = "auto"
    sigma: Annotated[float | None, Field(ge=0, le=0.8)] = None

    def upscale_params(self) -> list[UpscaleParams]:
        """Options of each image's job."""
        own: dict[str, Any] = {"prompt": self.prompt or None, "sigma": self.sigma}
        return [UpscaleParams(**own, **options) for options in self._job_options()]

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


def check_edit_size(size: str, result_size: tuple[int, int]) -> None:
    """Check that an edit asks for the size it will have.

    Raises:
        SettingError: If it asks for another size.
    """
    expected = f"{result_size[0]}x{result_size[1]}"
    if size not in ("auto", expected):
        raise SettingError(f"This image becomes {expected}; size cannot be {size}. Leave it out.")


def images_response(results: list[Result], output_format: FileFormat) -> ImagesResponse:
    """The response with these files, which all have one size."""
    return ImagesResponse(
        created=int(time.time()),
        output_format=output_format,
        size=f"{results[0].width}x{results[0].height}",
        data=[EncodedImage(b64_json=base64.b64encode(result.data).decode("ascii")) for result in results],
    )
