# SPDX-License-Identifier: Apache-2.0
"""The HTTP interface: decode a latent, enlarge an image, OpenAI's image endpoints, health, metrics, a description."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from pidecode import __version__
from pidecode.serve import openai
from pidecode.serve.http import AuthMiddleware, BodyReader, add_error_handlers, outcome, problem, to_header
from pidecode.serve.prometheus import CONTENT_TYPE, Answers, MetricsMiddleware
from pidecode.serve.reference import reference_page
from pidecode.serve.schemas import DecodeOptions, Options, UpscaleOptions
from pidecode.serve.service import DecodeService, Made
from pidecode.units import parse_size

GRACE = 30.0
"""Seconds a running job is given when the server stops."""

_WORDS = {
    400: "Something in the request cannot act; the message says what, and the mend.",
    401: "No token, or a wrong one.",
    403: "Asked for under a foreign name, or by a foreign web site.",
    408: "The body took too long to arrive.",
    413: "The body is too long.",
    422: "A parameter has the wrong form.",
    429: "The line is full; Retry-After says when to ask again.",
    500: "A fault; the server's log has the details.",
    501: "Needs something that is not set up here.",
    503: "The job was stopped: its time was up, or the server is stopping.",
    507: "It does not fit into memory.",
}


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": openai.ProblemBody, "description": _WORDS[status]} for status in statuses}


_DOOR = (401, 403)
_WORK = (400, *_DOOR, 408, 413, 422, 429, 500, 501, 503, 507)
_BINARY: dict[str, Any] = {"schema": {"type": "string", "format": "binary"}}
_IMAGE: dict[str, Any] = {
    "description": "The image, with its recipe inside. X-Pidecode-Warnings is a JSON list of what there is to say.",
    "content": {"image/png": _BINARY, "image/webp": _BINARY, "image/jpeg": _BINARY},
}
_FORM: dict[str, Any] = {
    "type": "object",
    "required": ["image"],
    "additionalProperties": False,
    "properties": {
        "image": {"type": "string", "format": "binary"},
        "prompt": {"type": "string", "maxLength": 4000, "description": "For models that read prompts."},
        "model": {"type": "string", "maxLength": 200},
        "n": {"type": "integer", "minimum": 1, "maximum": openai.MOST_IMAGES},
        "size": {"type": "string", "enum": ["auto"], "description": "auto, or exactly the enlarged size."},
        "response_format": {"type": "string", "enum": ["b64_json"]},
        "output_format": {"type": "string", "enum": ["png", "webp", "jpeg"]},
        "user": {"type": "string", "maxLength": 200},
        "seed": {"type": "integer", "minimum": 0},
        "steps": {"type": "integer", "minimum": 1, "maximum": 4},
        "sigma": {"type": "number", "minimum": 0, "maximum": 0.8},
    },
}


def _body(kind: str, words: str) -> dict[str, Any]:
    return {"requestBody": {"required": True, "description": words, "content": {kind: _BINARY}}}


def create_app(desk: DecodeService, *, token: str | None = None) -> FastAPI:
    """The whole server as an ASGI application; it stops the desk's queue when it is shut down.

    token: what clients must show; None is for an address that only this machine reaches.
    """
    answers = Answers()

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(desk.stop, GRACE)

    app = FastAPI(
        title="pidecode",
        version=__version__,
        summary="Latents and images in, images four times the size out.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    add_error_handlers(app)
    _add_work(app, desk)
    _add_openai(app, desk)
    _add_state(app, desk, answers)
    paths = [getattr(route, "path", "") for route in app.routes]
    app.add_middleware(AuthMiddleware, token=token, open_paths=frozenset({"/health"}))
    app.add_middleware(MetricsMiddleware, paths=paths, tally=answers)
    return app


def _add_work(app: FastAPI, desk: DecodeService) -> None:
    intake = BodyReader(desk.queue, desk.limits)

    @app.post(
        "/v1/decode",
        summary="Decode a latent",
        response_class=Response,
        responses={200: _IMAGE, **_problems(*_WORK)},
        openapi_extra=_body("application/octet-stream", "A .safetensors file that holds one normalized latent."),
    )
    async def decode(request: Request, options: Annotated[DecodeOptions, Query()]) -> Response:
        """The file says its space, noise level and prompt if `Latent.save` wrote it; else name the space."""
        data = await intake.body(request)
        return _file(await outcome(request, desk.decode(data, options)))

    @app.post(
        "/v1/upscale",
        summary="Enlarge an image",
        response_class=Response,
        responses={200: _IMAGE, **_problems(*_WORK)},
        openapi_extra=_body("application/octet-stream", "An image file: PNG, JPEG, WebP and other kinds."),
    )
    async def upscale(request: Request, options: Annotated[UpscaleOptions, Query()]) -> Response:
        """The image is encoded to a latent and decoded larger; the result is exactly that many times its size."""
        data = await intake.body(request)
        return _file(await outcome(request, desk.upscale(data, options)))


def _add_openai(app: FastAPI, desk: DecodeService) -> None:
    intake = BodyReader(desk.queue, desk.limits)

    @app.get("/v1/models", summary="List the models", response_model=openai.Models, responses=_problems(*_DOOR))
    async def models() -> openai.Models:
        """The first is the one used where none is named."""
        return openai.Models(data=[_model(desk, name) for name in desk.decoders])

    @app.post(
        "/v1/images/generations",
        summary="Paint from a prompt (as OpenAI's)",
        response_model=openai.Images,
        responses=_problems(*_WORK),
    )
    async def generations(request: Request, body: openai.GenerationBody) -> Any:
        """Needs an image pipeline on the server (--pipeline); without one the answer is 501."""
        if desk.painter is None:
            return problem(
                501,
                "no_pipeline",
                "No image pipeline is set up here, so there is nothing to paint with. Start the server "
                "with --pipeline, or send a latent to /v1/decode or an image to /v1/upscale.",
            )
        size = parse_size(body.size)
        plans = [
            Options(model=body.model, seed=body.seed + index, steps=body.steps, format=body.output_format)
            for index in range(body.n)
        ]
        made = await _one_by_one(request, [lambda plan=plan: desk.generate(body.prompt, size, plan) for plan in plans])
        return openai.answer(made, body.output_format)

    @app.post(
        "/v1/images/edits",
        summary="Enlarge an image (as OpenAI's edits)",
        response_model=openai.Images,
        responses=_problems(*_WORK),
        openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}}},
    )
    async def edits(request: Request) -> Any:
        """The one edit there is: larger. A prompt is passed on as the prompt, where the model reads prompts."""
        image, fields = await _form(request, await intake.body(request))
        size, count = fields.pop("size", None), fields.pop("n", "1")
        if count not in {str(number) for number in range(1, openai.MOST_IMAGES + 1)}:
            raise HTTPException(400, f"n is {count[:20]!r}; it must be 1 to {openai.MOST_IMAGES}.")
        options = _edit_options(fields)
        looked = await asyncio.to_thread(desk.look, image)
        if looked.kind != "image":
            raise HTTPException(400, "The image is a latent file; send it to /v1/decode.")
        plan = desk.plan(options.model, looked)
        openai.check_edit_size(size, (plan.width, plan.height))
        wishes = [options.model_copy(update={"seed": options.seed + index}) for index in range(int(count))]
        made = await _one_by_one(request, [lambda wish=wish: desk.upscale(image, wish) for wish in wishes])
        return openai.answer(made, options.format)


def _add_state(app: FastAPI, desk: DecodeService, answers: Answers) -> None:
    @app.get("/health", summary="Is it well?", responses={503: {"description": "It is stopping."}})
    async def health() -> JSONResponse:
        """Needs no token, and tells nothing but this."""
        queue = desk.queue
        state = {"status": "stopping" if queue.closed else "ok", "waiting": queue.waiting, "running": queue.running}
        return JSONResponse(state, 503 if queue.closed else 200)

    @app.get(
        "/metrics",
        summary="Counts and times, as Prometheus reads them",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **_problems(*_DOOR)},
    )
    async def metrics() -> Response:
        """Queue, jobs, answers, memory."""
        return Response(answers.text(desk.queue), media_type=CONTENT_TYPE)

    @app.get("/", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()))


def _file(made: Made) -> Response:
    headers = {"X-Pidecode-Seconds": f"{made.seconds:.3f}"}
    if made.warnings:
        headers["X-Pidecode-Warnings"] = to_header(list(made.warnings))
    return Response(made.data, media_type=made.media, headers=headers)


def _model(desk: DecodeService, name: str) -> openai.Model:
    decoder = desk.decoders[name]
    return openai.Model(
        id=name,
        space=decoder.space.name,
        scale=decoder.scale,
        kind=str(decoder.identity.kind),
        takes_images=decoder.encoder is not None,
        reads_text=decoder.net.config.has_text,
        license=str(decoder.identity.license or "unknown"),
    )


async def _one_by_one(request: Request, submits: list[Any]) -> list[Made]:
    """Several jobs of one request, each put in the line when the one before it is done."""
    return [await outcome(request, submit()) for submit in submits]


async def _form(request: Request, body: bytes) -> tuple[bytes, dict[str, str]]:
    """The image and the other fields of a multipart body, parsed in memory. Raises HTTPException."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(400, "Send a multipart form with the image in the field 'image'.")
    parser = MultiPartParser(request.headers, stream(), max_files=1, max_fields=20)
    parser.spool_max_size = len(body) + 1  # never on disk
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise HTTPException(400, f"The form cannot be read: {getattr(error, 'message', error)}.") from None
    try:
        image = form.get("image", form.get("image[]"))
        if not isinstance(image, UploadFile):
            raise HTTPException(400, "The form holds no file in the field 'image'.")
        fields = {name: value for name, value in form.multi_items() if isinstance(value, str)}
        return await image.read(), fields
    finally:
        await form.close()


def _edit_options(fields: dict[str, str]) -> UpscaleOptions:
    """The form's other fields as options. Raises HTTPException for one that does not exist or cannot act."""
    fields.pop("user", None)
    if fields.pop("response_format", "b64_json") != "b64_json":
        raise HTTPException(400, "response_format must be b64_json: this server keeps no files to link to.")
    renamed = {"prompt": "prompt", "output_format": "format"}
    values = {renamed.get(name, name): value for name, value in fields.items() if value != ""}
    try:
        return UpscaleOptions.model_validate(values)
    except ValidationError as error:
        words = [f"{'.'.join(str(part) for part in entry['loc'])}: {entry['msg']}" for entry in error.errors()]
        raise HTTPException(400, "; ".join(words[:8]) + ".") from None
