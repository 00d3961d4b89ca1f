# SPDX-License-Identifier: Apache-2.0
"""The page's own application: its files, and the few questions it asks while someone works with it.

Nothing is kept here but a finished file until the page has fetched it: what was dropped in, what was made and the
history of a session live in the page, and go when it is closed.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.resources import files
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Query, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from pidecode import __version__
from pidecode.serve.estimate import Plan
from pidecode.serve.http import COOKIE, AuthMiddleware, BodyReader, add_error_handlers, cancel_when_gone, describe
from pidecode.serve.queue import Job, JobStatus
from pidecode.serve.schemas import DecodeOptions, UpscaleOptions
from pidecode.serve.service import DecodeService, FileInfo, Made

GRACE = 5.0
"""Seconds a running job is given when the page's server stops."""

_KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}
_FILES = ("index.html", "app.js", "viewer.js", "style.css", "icon.svg")
_FINISHED_KEPT = 4
_LONGEST_PROMPT = 4000
_FINISHED_SECONDS = 300.0


class PlanQuery(BaseModel):
    """What the page wants to know before it starts a job."""

    model_config = ConfigDict(extra="forbid")

    kind: Literal["image", "latent"]
    width: Annotated[int, Field(ge=1, le=65536)]
    height: Annotated[int, Field(ge=1, le=65536)]
    model: str | None = None
    to_width: Annotated[int | None, Field(ge=16, le=65536)] = None
    to_height: Annotated[int | None, Field(ge=16, le=65536)] = None


class Finished:
    """Files that are made and not yet fetched; each can be fetched once, for a few minutes."""

    def __init__(self) -> None:
        self._made: dict[str, tuple[float, Made]] = {}

    def keep(self, job: Job, made: Made) -> str:
        """Keep a file, and say under which name."""
        now = time.monotonic()
        fresh = {name: entry for name, entry in self._made.items() if now - entry[0] < _FINISHED_SECONDS}
        self._made = dict(list(fresh.items())[1 - _FINISHED_KEPT :])
        self._made[job.id] = (now, made)
        return job.id

    def take(self, name: str) -> Made | None:
        """Hand a file out and forget it."""
        return self._made.pop(name, (0.0, None))[1]


def create_app(desk: DecodeService, *, token: str | None = None) -> FastAPI:
    """The page as an ASGI application; it stops the desk's queue when it is shut down.

    token: what opens the page (`/?token=...`, then kept as a cookie); None is for this machine alone.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(desk.stop, GRACE)

    app = FastAPI(
        title="pidecode page", version=__version__, docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan
    )
    add_error_handlers(app)
    _add_files(app, token)
    _add_questions(app, desk)
    _add_jobs(app, desk)
    app.add_middleware(AuthMiddleware, token=token)
    return app


def _add_files(app: FastAPI, token: str | None) -> None:
    folder = files("pidecode.serve") / "static"
    held = {name: (folder / name).read_bytes() for name in _FILES}

    def answer(name: str) -> Response:
        return Response(held[name], media_type=_KINDS[name[name.index(".") :]])

    @app.get("/")
    async def index() -> Response:
        page = answer("index.html")
        if token is not None:
            page.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        return page

    @app.get("/static/{name}")
    async def static(name: str) -> Response:
        if name not in held:
            raise HTTPException(404, "There is no such file.")
        return answer(name)


def _add_questions(app: FastAPI, desk: DecodeService) -> None:
    intake = BodyReader(desk.queue, desk.limits)

    @app.get("/api/about")
    async def about() -> dict[str, Any]:
        first = next(iter(desk.decoders.values()))
        return {
            "version": __version__,
            "device": str(first.device),
            "models": [_model(desk, name) for name in desk.decoders],
            "limits": asdict(desk.limits),
            "paints": desk.painter is not None,
        }

    @app.post("/api/look")
    async def look(request: Request) -> dict[str, Any]:
        data = await intake.body(request)
        return asdict(await asyncio.to_thread(desk.look, data))

    @app.get("/api/plan")
    async def plan(query: Annotated[PlanQuery, Query()]) -> dict[str, Any]:
        looked = FileInfo(kind=query.kind, width=query.width, height=query.height)
        size = (query.to_width, query.to_height) if query.to_width and query.to_height else None
        return _plan(desk.plan(query.model, looked, size))


def _add_jobs(app: FastAPI, desk: DecodeService) -> None:
    intake, finished = BodyReader(desk.queue, desk.limits), Finished()

    @app.post("/api/decode")
    async def decode(request: Request, options: Annotated[DecodeOptions, Query()]) -> Response:
        data = await intake.body(request)
        return _watched(request, desk.decode(data, options, previews=True), finished)

    @app.post("/api/upscale")
    async def upscale(request: Request, options: Annotated[UpscaleOptions, Query()]) -> Response:
        data = await intake.body(request)
        return _watched(request, desk.upscale(data, options, previews=True), finished)

    @app.post("/api/paint")
    async def paint(request: Request, options: Annotated[DecodeOptions, Query()]) -> Response:
        prompt = (await intake.body(request)).decode("utf-8", "replace")[:_LONGEST_PROMPT]
        size = (options.width or 2048, options.height or 2048)
        return _watched(request, desk.generate(prompt, size, options, previews=True), finished)

    @app.get("/api/finished/{name}")
    async def take(name: str) -> Response:
        made = finished.take(name)
        if made is None:
            raise HTTPException(404, "That file was fetched already, or is too old; decode again.")
        return Response(made.data, media_type=made.media)


def _watched(request: Request, job: Job, finished: Finished) -> StreamingResponse:
    """The job's story, a line of JSON for each change; when nobody reads it any more, the job is cancelled."""

    async def story() -> AsyncIterator[bytes]:
        gone = cancel_when_gone(request, job)
        shown: bytes | None = None
        try:
            async for status in job.changes():
                fresh = status.preview if status.preview is not shown else None
                shown = status.preview or shown
                if not job.over:
                    yield _line(_told(status, fresh))
            yield _line(_ending(job, finished))
        finally:
            gone.cancel()
            job.cancel("The page went away.")

    return StreamingResponse(story(), media_type="application/x-ndjson")


def _told(status: JobStatus, preview: bytes | None) -> dict[str, Any]:
    told: dict[str, Any] = {
        "state": status.state,
        "place": status.place,
        "done": status.done,
        "total": status.total,
        "note": status.note,
    }
    if preview is not None:
        told["preview"] = f"data:image/jpeg;base64,{base64.b64encode(preview).decode('ascii')}"
    return told


def _ending(job: Job, finished: Finished) -> dict[str, Any]:
    try:
        made: Made = job.result()
    except Exception as error:
        problem = json.loads(bytes(describe(error).body))["error"]
        return {"state": job.state, "message": problem["message"], "code": problem["code"]}
    return {
        "state": "done",
        "finished": f"api/finished/{finished.keep(job, made)}",
        "width": made.width,
        "height": made.height,
        "recipe": made.recipe,
        "warnings": made.warnings,
        "seconds": round(made.seconds, 2),
        "bytes": len(made.data),
    }


def _model(desk: DecodeService, name: str) -> dict[str, Any]:
    decoder = desk.decoders[name]
    return {
        "name": name,
        "space": decoder.space.name,
        "space_title": decoder.space.title,
        "scale": decoder.scale,
        "pixels_per_cell": decoder.space.pixels_per_cell,
        "kind": decoder.identity.kind,
        "takes_images": decoder.encoder is not None,
        "reads_text": decoder.net.config.has_text,
        "license": decoder.identity.license or "unknown",
    }


def _plan(plan: Plan) -> dict[str, Any]:
    return {**asdict(plan), "fits": plan.fits}


def _line(told: dict[str, Any]) -> bytes:
    return json.dumps(told).encode("ascii") + b"\n"
