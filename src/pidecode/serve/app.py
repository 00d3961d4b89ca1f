# SPDX-License-Identifier: Apache-2.0
"""The FastAPI app: the page at /, decoding and OpenAI's image endpoints at /v1, health and metrics."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncGenerator, AsyncIterator, Collection, Iterable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser

from pidecode.errors import SettingError
from pidecode.serve import http, openai, prometheus, schemas
from pidecode.serve.queue import DecodeJob, JobStatus
from pidecode.serve.service import DecodeService, Result
from pidecode.strict_json import JSONError, parse_json
from pidecode.units import parse_size
from pidecode.version import __version__

NDJSON = "application/x-ndjson"
MAX_FORM_FILES = 17  # sixteen images and a mask, which OpenAI takes

_STATIC_TYPES = {
    "index.html": "text/html; charset=utf-8", "style.css": "text/css; charset=utf-8", "icon.svg": "image/svg+xml",
    **dict.fromkeys(("app.js", "http.js", "session.js", "viewer.js"), "text/javascript; charset=utf-8"),
}  # fmt: skip

_ERROR_DESCRIPTIONS = {
    400: "A file or option that cannot be used; the message says why and what to do.",
    401: "The token is missing or wrong.", 403: "Addressed by a foreign host name, or sent by a foreign web site.",
    404: "No such result.", 408: "The body took too long to arrive.", 413: "The body is too long.",
    422: "A parameter is of the wrong form.", 429: "The queue is full; Retry-After gives the seconds to wait.",
    500: "Internal error; see the server's log.", 501: "The server was started without what this needs.",
    503: "The job was stopped: it timed out, or the server is stopping.", 507: "It does not fit into memory.",
}  # fmt: skip
_AUTH_ERRORS = (401, 403)
_UPLOAD_ERRORS = (400, *_AUTH_ERRORS, 408, 413, 429, 500)
_JOB_ERRORS = (*_UPLOAD_ERRORS, 422, 501, 503, 507)


def create_app(
    service: DecodeService, *, token: str | None = None, hosts: Collection[str] = (), origins: Collection[str] = ()
) -> FastAPI:
    """Create the ASGI application; on shutdown it stops the service's queue.

    Token, hosts and origins are those of `AuthMiddleware`. The page is opened by `/?token=...` and then keeps the token
    as a cookie.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.stop, http.SHUTDOWN_SECONDS)

    app = FastAPI(
        title="pidecode", version=__version__, lifespan=lifespan,
        summary="Decode latents and upscale images with pixel diffusion decoders.",
        docs_url=None, redoc_url=None,  # FastAPI's own pages load scripts from other hosts
    )  # fmt: skip
    reader = http.BodyReader(service.queue, service.limits)
    stats = prometheus.ResponseStats()
    http.add_error_handlers(app)
    _add_page(app, token)
    _add_jobs(app, service, reader)
    _add_streamed_jobs(app, service)
    _add_queries(app, service, reader)
    _add_openai(app, service, reader)
    _add_monitoring(app, service, stats)
    paths = [getattr(route, "path", "") for route in app.routes]
    app.add_middleware(
        http.AuthMiddleware, token=token, most_active=http.MAX_READERS + 4 * (service.limits.waiting + 8),
        hosts=hosts, origins=origins,
    )  # fmt: skip
    app.add_middleware(prometheus.MetricsMiddleware, paths=paths, stats=stats)
    return app


def _responses(content: Mapping[str, Any], description: str, errors: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    """The responses of an operation: what 200 holds, by media type, and errors."""
    kinds = {kind: {"schema": schema} for kind, schema in content.items()}
    return {200: {"description": description, "content": kinds}, **_errors(errors)}


def _errors(statuses: Iterable[int]) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": openai.ErrorResponse, "description": _ERROR_DESCRIPTIONS[status]} for status in statuses}


def _body(media_type: str, schema: dict[str, Any], **about: str) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {media_type: {"schema": schema}}, **about}}


def _file_body(description: str) -> dict[str, Any]:
    return _body("application/octet-stream", _BINARY, description=description)


_BINARY = {"type": "string", "format": "binary"}
_IMAGES = dict.fromkeys(schemas.MEDIA_TYPES.values(), _BINARY)
_EVENTS = {NDJSON: schemas.JobEvent.model_json_schema()}
_JOB: dict[str, Any] = {
    "response_class": Response,
    "responses": _responses(
        {**_IMAGES, **_EVENTS},
        "The image with its metadata; X-Pidecode-Warnings is a JSON list of warnings. With stream=true, the job's "
        "progress as lines of JSON.",
        _JOB_ERRORS,
    ),
}
_NAME_ERRORS = (*_AUTH_ERRORS, 404, 422)


def _add_page(app: FastAPI, token: str | None) -> None:
    folder = files("pidecode.serve") / "static"
    content = {name: (folder / name).read_bytes() for name in _STATIC_TYPES}

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        page = Response(content["index.html"], media_type=_STATIC_TYPES["index.html"])
        if token is not None:
            page.set_cookie(http.COOKIE, token, httponly=True, samesite="strict")
        return page

    @app.get("/static/{name}", include_in_schema=False)
    async def static(name: str) -> Response:
        if name not in content:
            raise HTTPException(404, "There is no such file.")
        return Response(content[name], media_type=_STATIC_TYPES[name])


def _add_jobs(app: FastAPI, service: DecodeService, reader: http.BodyReader) -> None:
    latent, image = "A .safetensors file with one normalized latent.", "An image file: PNG, JPEG, WebP and others."
    schema = {"type": "string", "minLength": 1, "maxLength": schemas.MAX_PROMPT_LENGTH}
    prompt = _body("text/plain", schema, description="The prompt, in UTF-8.")

    @app.post("/v1/decode", summary="Decode a latent", openapi_extra=_file_body(latent), **_JOB)
    async def decode(request: Request, params: Annotated[schemas.DecodeParams, Query()]) -> Response:
        """A file written by `Latent.save` holds its space, noise level and prompt; others need `space`."""
        data = await reader.read(request)
        return await _respond(request, service, service.decode(data, params), params)

    @app.post("/v1/upscale", summary="Upscale an image", openapi_extra=_file_body(image), **_JOB)
    async def upscale(request: Request, params: Annotated[schemas.UpscaleParams, Query()]) -> Response:
        """The image is encoded to a latent and decoded; the result is exactly that many times its size."""
        data = await reader.read(request)
        return await _respond(request, service, service.upscale(data, params), params)

    @app.post("/v1/generate", summary="Generate an image from a prompt", openapi_extra=prompt, **_JOB)
    async def generate(request: Request, params: Annotated[schemas.GenerateParams, Query()]) -> Response:
        """Needs a pipeline on the server (--pipeline); its latent is decoded."""
        job = service.generate(_prompt(await reader.read(request)), (params.width, params.height), params)
        return await _respond(request, service, job, params)


def _add_streamed_jobs(app: FastAPI, service: DecodeService) -> None:
    @app.get(
        "/v1/results/{name}", summary="Fetch the result of a streamed job", response_class=Response,
        responses=_responses(_IMAGES, "The image with its metadata.", _NAME_ERRORS),
    )  # fmt: skip
    async def result(name: str) -> Response:
        """Each result can be fetched once, within five minutes."""
        found = service.streamed.get(name)
        if found is None or found.state != "done":
            raise HTTPException(404, "This result was fetched already, or is too old; run the job again.")
        return _file(service.streamed.pop(name).result())

    @app.get(
        "/v1/jobs/{name}", summary="Follow a streamed job again", response_class=Response,
        responses=_responses(_EVENTS, "The job's progress from now on, as lines of JSON.", _NAME_ERRORS),
    )  # fmt: skip
    async def job(request: Request, name: str) -> Response:
        """For a client that lost its connection within the job's `reconnect_seconds`."""
        return _progress(request, _streamed_job(service, name))

    @app.delete(
        "/v1/jobs/{name}", summary="Cancel a streamed job", status_code=204, response_model=None,
        responses=_errors(_NAME_ERRORS),
    )  # fmt: skip
    async def cancel(name: str) -> None:
        """Has no effect on a job that is over."""
        _streamed_job(service, name).cancel()


def _add_queries(app: FastAPI, service: DecodeService, reader: http.BodyReader) -> None:
    @app.get("/v1/server", summary="Version, device and limits", responses=_errors(_AUTH_ERRORS))
    async def server() -> schemas.ServerInfo:
        """The limits hold for every request."""
        return schemas.ServerInfo(
            version=__version__, device=str(service.decoder(None).device),
            limits=schemas.ServerLimits(**asdict(service.limits)), text_to_image=service.text_to_latent is not None,
        )  # fmt: skip

    @app.post(
        "/v1/inspect", summary="Inspect a file", responses=_errors((*_UPLOAD_ERRORS, 422)),
        openapi_extra=_file_body("An image or a .safetensors file with a latent."),
    )  # fmt: skip
    async def inspect(request: Request) -> schemas.FileInfo:
        """Tells whether the file is an image or a latent, its size and its metadata. Nothing is decoded."""
        return await _inspect(request, service, await reader.read(request, queued=False))

    @app.get("/v1/plan", summary="Estimate a decode", responses=_errors((400, *_AUTH_ERRORS, 422)))
    async def plan(params: Annotated[schemas.PlanParams, Query()]) -> schemas.DecodePlan:
        """The size of the result, the memory that its decode needs, and whether it is free."""
        file = schemas.FileInfo(kind=params.kind, width=params.width, height=params.height)
        return service.plan(params.model, file, params.output_size())


def _add_openai(app: FastAPI, service: DecodeService, reader: http.BodyReader) -> None:
    @app.get("/v1/models", summary="List the models", responses=_errors(_AUTH_ERRORS))
    async def models() -> openai.ModelList:
        """The first is the default."""
        return openai.ModelList(data=[_model_info(service, name) for name in service.decoders])

    @app.get("/v1/models/{name:path}", summary="Describe a model", responses=_errors((*_AUTH_ERRORS, 404)))
    async def model(name: str) -> openai.ModelInfo:
        """One of those listed."""
        if name not in service.decoders:
            raise HTTPException(404, f"There is no model {name[:80]!r} here; there are {', '.join(service.decoders)}.")
        return _model_info(service, name)

    @app.post(
        "/v1/images/generations", summary="Generate an image from a prompt (OpenAI)", responses=_errors(_JOB_ERRORS),
        openapi_extra=_body("application/json", openai.ImageGenerationRequest.model_json_schema()),
    )  # fmt: skip
    async def generations(request: Request) -> openai.ImagesResponse:
        """Needs a pipeline on the server (--pipeline)."""
        body = _validated(openai.ImageGenerationRequest, await reader.read(request))
        size = parse_size("2048x2048" if body.size == "auto" else body.size)
        jobs = body.jobs(schemas.GenerateParams, body.decoder_name(service.decoders))
        # One after another, so that other requests get their turn in between.
        results = [await http.result_of(request, service.generate(body.prompt, size, params)) for params in jobs]
        return openai.images_response(results, body.output_format, body.n)

    @app.post(
        "/v1/images/edits", summary="Upscale an image (OpenAI)", responses=_errors(_JOB_ERRORS),
        openapi_extra=_body("multipart/form-data", openai.ImageEditRequest.form_schema()),
    )  # fmt: skip
    async def edits(request: Request) -> openai.ImagesResponse:
        """The only edit is enlargement. A prompt describes the image, for models that read text; others ignore it."""
        image, fields = await _read_form(request, await reader.read(request))
        form = _validated(openai.ImageEditRequest, fields)
        decoder = service.decoder(name := form.decoder_name(service.decoders))
        if (await _inspect(request, service, image)).kind != "image":
            raise SettingError("The file is a latent; send it to /v1/decode.")
        prompt = {"prompt": form.prompt} if decoder.reads_text and form.prompt else {}
        size = {} if form.size == "auto" else dict(zip(("width", "height"), parse_size(form.size), strict=True))
        jobs = [
            params.model_copy(update=prompt | size) for params in form.jobs(schemas.UpscaleParams, name, decoder.kind)
        ]
        results = [await http.result_of(request, service.upscale(image, params, form.background)) for params in jobs]
        return openai.images_response(results, form.output_format, form.n)


def _add_monitoring(app: FastAPI, service: DecodeService, stats: prometheus.ResponseStats) -> None:
    @app.get(
        "/health", summary="State of the server", response_model=schemas.Health,
        responses={503: {"model": schemas.Health, "description": "The server is stopping."}},
    )  # fmt: skip
    async def health() -> JSONResponse:
        """Needs no token."""
        queue = service.queue
        state = schemas.Health(
            status="stopping" if queue.closed else "ok", waiting=queue.waiting, running=queue.running
        )
        return JSONResponse(state.model_dump(), 503 if queue.closed else 200)

    @app.get(
        "/metrics", summary="Metrics for Prometheus", response_class=Response,
        responses=_responses({"text/plain": {"type": "string"}}, "Metrics.", _AUTH_ERRORS),
    )  # fmt: skip
    async def metrics() -> Response:
        """Queue, jobs, responses and memory."""
        return Response(stats.text(service.queue), media_type=prometheus.CONTENT_TYPE)


async def _inspect(request: Request, service: DecodeService, data: bytes) -> schemas.FileInfo:
    """As `DecodeService.inspect`: beside the queue of decodes, one file at a time, and only a few waiting."""
    if not service.inspections.free_slots:
        raise service.inspections.refusal("Too many files are being inspected. Retry later.", 1.0)
    job = service.inspections.submit(lambda _: service.inspect(data))
    info: schemas.FileInfo = await http.result_of(request, job)
    return info


async def _respond(request: Request, service: DecodeService, job: DecodeJob, params: schemas.ResultParams) -> Response:
    """The job's result, or its progress as it runs."""
    if not params.stream:
        return _file(await http.result_of(request, job))
    job.reconnect_seconds = params.reconnect_seconds or 0.0
    service.keep_streamed(job)
    return _progress(request, job)


def _progress(request: Request, job: DecodeJob) -> Response:
    """A stream of the job's progress; the job is cancelled when the last client that follows it stays away."""

    def abandon() -> None:
        if not job.followers:
            job.cancel("The client disconnected.")

    def line(event: schemas.JobEvent) -> bytes:
        return event.model_dump_json(exclude_none=True).encode() + b"\n"

    async def lines() -> AsyncIterator[bytes]:
        last_preview: bytes | None = None
        try:
            async with aclosing(http.statuses(request, job)) as changes:
                async for status in changes:
                    new_preview = status.preview if status.preview is not last_preview else None
                    last_preview = status.preview or last_preview
                    if not job.over:
                        yield line(_progress_event(job, status, new_preview))
            if job.over:
                yield line(_final_event(job))
        finally:
            asyncio.get_running_loop().call_later(job.reconnect_seconds, abandon)

    return StreamingResponse(lines(), media_type=NDJSON, headers={"X-Accel-Buffering": "no"})  # nginx


def _progress_event(job: DecodeJob, status: JobStatus, preview: bytes | None) -> schemas.JobEvent:
    return schemas.JobEvent(
        id=job.id, state=status.state, position=status.position, step=status.step, num_steps=status.num_steps,
        activity=status.activity, done=round(status.done, 3), seconds=round(status.seconds, 2),
        seconds_left=None if status.seconds_left is None else round(status.seconds_left, 1),
        preview=None if preview is None else f"data:image/jpeg;base64,{base64.b64encode(preview).decode('ascii')}",
    )  # fmt: skip


def _final_event(job: DecodeJob) -> schemas.JobEvent:
    try:
        result: Result = job.result()
    except Exception as error:
        return schemas.JobEvent(
            id=job.id, state=job.state, error=json.loads(bytes(http.response_for(error).body))["error"]
        )
    return schemas.JobEvent(
        id=job.id, state=job.state, result=f"/v1/results/{job.id}", width=result.width, height=result.height,
        metadata=result.metadata, warnings=list(result.warnings), seconds=round(result.seconds, 2),
        bytes=len(result.data),
    )  # fmt: skip


def _file(result: Result) -> Response:
    headers = {"X-Pidecode-Seconds": f"{result.seconds:.3f}"}
    if result.warnings:
        headers["X-Pidecode-Warnings"] = json.dumps(list(result.warnings))  # plain ASCII on one line
    return Response(result.data, media_type=result.media_type, headers=headers)


def _model_info(service: DecodeService, name: str) -> openai.ModelInfo:
    decoder = service.decoders[name]
    return openai.ModelInfo(
        id=name, space=decoder.space.name, scale=decoder.scale, kind=decoder.kind,
        takes_images=decoder.encoder is not None, reads_text=decoder.reads_text, max_sigma=decoder.max_sigma,
        license=decoder.license,
    )  # fmt: skip


def _streamed_job(service: DecodeService, name: str) -> DecodeJob:
    job = service.streamed.get(name)
    if job is None:
        raise HTTPException(404, "There is no such job: it was stopped, or the server was restarted. Run it again.")
    return job


def _validated(model: type[openai.RequestT], data: bytes | dict[str, str]) -> openai.RequestT:
    """A body of JSON, or the fields of a form, as `model`; HTTP error 400 if it does not fit."""
    try:
        return model.model_validate(parse_json(data) if isinstance(data, bytes) else data)
    except JSONError as error:
        raise HTTPException(400, f"The body is not JSON that is accepted: {error}.") from None
    except ValidationError as error:
        raise HTTPException(400, http.validation_message(error.errors(), model=model)) from None


def _prompt(body: bytes) -> str:
    """The prompt of a body; HTTP error 400 if it is not UTF-8, or is too long."""
    try:
        prompt = body.decode("utf-8").strip()
    except UnicodeDecodeError:
        raise HTTPException(400, "The prompt must be UTF-8 text.") from None
    if not 1 <= len(prompt) <= schemas.MAX_PROMPT_LENGTH:
        raise HTTPException(
            400, f"The prompt has {len(prompt)} characters; it must have 1 to {schemas.MAX_PROMPT_LENGTH}."
        )
    return prompt


async def _read_form(request: Request, body: bytes) -> tuple[bytes, dict[str, str]]:
    """The image and the other, non-empty fields of a multipart body, parsed in memory; HTTP error 400 if it is none."""

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(400, "Send a multipart form with the image in the field 'image'.")
    parser = MultiPartParser(request.headers, stream(), max_files=MAX_FORM_FILES, max_fields=40)
    for limit in ("spool_max_size", "max_file_size"):  # newer and older Starlette: never on disk
        setattr(parser, limit, len(body) + 1)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise HTTPException(400, f"The form cannot be read: {getattr(error, 'message', error)}.") from None
    try:
        images = [*form.getlist("image"), *form.getlist("image[]")]
        if len(images) > 1:
            raise HTTPException(400, f"The form holds {len(images)} images; send one at a time.")
        if "mask" in form:
            raise HTTPException(400, "A mask cannot act: the only edit is enlarging the whole image. Leave it out.")
        if not images or not isinstance(image := images[0], UploadFile):
            raise HTTPException(400, "The form holds no file in the field 'image'.")
        fields = {name: value for name, value in form.multi_items() if isinstance(value, str) and value}
        return await image.read(), fields
    finally:
        await form.close()
