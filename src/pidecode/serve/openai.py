# SPDX-License-Identifier: Apache-2.0
"""The shapes of OpenAI's image interface, as far as they mean something here."""

from __future__ import annotations

import base64
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from pidecode.errors import SettingError
from pidecode.serve.schemas import LARGEST_SEED
from pidecode.serve.service import Made
from pidecode.units import parse_size

MOST_IMAGES = 4


class GenerationBody(BaseModel):
    """A prompt to paint. `seed` and `steps` go beyond OpenAI's own fields."""

    model_config = ConfigDict(extra="forbid")

    prompt: Annotated[str, Field(min_length=1, max_length=4000)]
    model: Annotated[str | None, Field(max_length=200)] = None
    n: Annotated[int, Field(ge=1, le=MOST_IMAGES, description="Images, with seeds counting up.")] = 1
    size: Annotated[str, Field(max_length=11, description="WIDTHxHEIGHT of the result, in pixels.")] = "2048x2048"
    response_format: Annotated[Literal["b64_json"], Field(description="Images come in the answer itself.")] = "b64_json"
    output_format: Literal["png", "webp", "jpeg"] = "png"
    user: Annotated[str | None, Field(max_length=200, description="Accepted for clients that send it; not kept.")] = (
        None
    )
    seed: Annotated[int, Field(ge=0, le=LARGEST_SEED)] = 0
    steps: Annotated[int | None, Field(ge=1, le=100, description="Of the decoder.")] = None


class Image(BaseModel):
    """One image, in the answer itself."""

    b64_json: str


class Images(BaseModel):
    """What both image endpoints answer."""

    created: int
    output_format: str
    size: str
    data: list[Image]


class Model(BaseModel):
    """One decoder that may be asked for."""

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


class Models(BaseModel):
    """The decoders there are."""

    object: Literal["list"] = "list"
    data: list[Model]


class Problem(BaseModel):
    """What went wrong, as a sentence."""

    message: str
    type: str
    code: str


class ProblemBody(BaseModel):
    """Every answer that is not 2xx."""

    error: Problem


def check_edit_size(size: str | None, made: tuple[int, int]) -> None:
    """Raise SettingError if an edit asks for another size than enlarging gives."""
    if size not in (None, "", "auto") and parse_size(str(size)) != made:
        raise SettingError(
            f"Editing enlarges, and this image becomes {made[0]}x{made[1]}; size cannot be {size}. Leave it out."
        )


def answer(images: list[Made], output_format: str) -> dict[str, Any]:
    """Finished files in OpenAI's form."""
    first = images[0]
    return {
        "created": int(time.time()),
        "output_format": output_format,
        "size": f"{first.width}x{first.height}",
        "data": [{"b64_json": base64.b64encode(made.data).decode("ascii")} for made in images],
    }
