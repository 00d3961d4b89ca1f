# SPDX-License-Identifier: Apache-2.0
"""HTTP as both doors speak it: who may come in, how much a body may hold, and errors as sentences."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import json
import math
import socket
from collections.abc import Awaitable, Callable, MutableMapping
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from pidecode.errors import (
    BusyError,
    Cancelled,
    DoesNotFitError,
    FileError,
    LatentError,
    MissingDependencyError,
    PidecodeError,
    SettingError,
)
from pidecode.serve.queue import Job, JobQueue
from pidecode.serve.schemas import Limits

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "pidecode_token"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (
        b"content-security-policy",
        (
            b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
            b"form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
        ),
    ),
)

# Statuses by class of error, the first that fits.
_STATUSES: tuple[tuple[type[Exception], int, str], ...] = (
    (BusyError, 429, "busy"),
    (Cancelled, 503, "stopped"),
    (DoesNotFitError, 507, "does_not_fit"),
    (MissingDependencyError, 501, "not_installed"),
    (SettingError, 400, "bad_setting"),
    (LatentError, 400, "bad_latent"),
    (FileError, 400, "bad_file"),
)


class AuthMiddleware:
    """ASGI middleware: knows who may come in, and sends every answer out with headers that keep it private.

    token: what a client must show (`Authorization: Bearer ...`, or the page's cookie); None lets everyone in who
        reaches the address, which is then meant to be this machine alone.
    open_paths: what may be asked without a token.

    Without a token only requests addressed to this machine by name are answered, so that a web site which points
    its own name here (DNS rebinding) gets nothing. Requests that a browser sends for another site are refused.
    """

    def __init__(self, app: App, *, token: str | None = None, open_paths: frozenset[str] = frozenset()) -> None:
        self.app = app
        self.token = token
        self.open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        async def dressed(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                extra = [(name, value) for name, value in _HEADERS if name not in given]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, dressed)
            return
        await self.app(scope, receive, dressed)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> Any:
        host = headers.get("host", "")
        if self.token is None and _hostname(host) not in LOOPBACK:
            return problem(
                403, "wrong_host", f"This server answers to localhost only, and was addressed as {host[:80]!r}."
            )
        origin = headers.get("origin")
        foreign = origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower())
        if foreign or headers.get("sec-fetch-site") == "cross-site":
            return problem(
                403, "wrong_origin", "This server answers to its own page and to programs, not to other web sites."
            )
        if self.token is None or scope["path"] in self.open_paths:
            return None
        if any(_same(shown, self.token) for shown in _tokens(scope, headers)):
            return None
        refusal = problem(401, "no_token", "Show the server's token: the header 'Authorization: Bearer TOKEN'.")
        refusal.headers["WWW-Authenticate"] = "Bearer"
        return refusal


class BodyReader:
    """Reads bodies, never more of them than the line has places, never longer than they may be."""

    def __init__(self, queue: JobQueue, limits: Limits) -> None:
        self.queue = queue
        self.limits = limits
        self.reading = 0

    async def body(self, request: Request) -> bytes:
        """The whole body. Raises BusyError before reading if its job has no place, HTTPException for a bad one."""
        if self.reading >= self.queue.places:
            self.queue.tally.refused += 1
            raise BusyError("The line is full. Ask again in a little while.", self.queue.estimate())
        told = request.headers.get("content-length", "")
        if told.isdecimal() and int(told) > self.limits.body_bytes:
            raise self._too_long()
        self.reading += 1
        try:
            return await asyncio.wait_for(self._read(request), self.limits.body_seconds)
        except TimeoutError:
            raise HTTPException(
                408, f"The body took longer than {self.limits.body_seconds:g} seconds to arrive."
            ) from None
        finally:
            self.reading -= 1

    async def _read(self, request: Request) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > self.limits.body_bytes:
                raise self._too_long()
            parts.append(part)
        if not size:
            raise HTTPException(400, "The body is empty; send the file itself as the body.")
        return b"".join(parts)

    def _too_long(self) -> HTTPException:
        return HTTPException(413, f"The body is longer than the {self.limits.body_bytes:,} bytes this server takes.")


async def outcome(request: Request, job: Job) -> Any:
    """The job's result; the job is cancelled when the client goes away, so that it frees its place."""
    gone = asyncio.ensure_future(_disconnected(request))
    end = asyncio.ensure_future(job.finished())
    try:
        await asyncio.wait({gone, end}, return_when=asyncio.FIRST_COMPLETED)
        if end.done():
            return end.result()
        job.cancel("The client went away.")
        raise ClientDisconnect
    finally:
        job.cancel("The request was broken off.")
        gone.cancel()
        end.cancel()


def cancel_when_gone(request: Request, job: Job) -> asyncio.Future[None]:
    """A watcher that cancels the job when the client goes away; cancel the watcher once the job is over."""

    def gone(watcher: asyncio.Future[None]) -> None:
        if not watcher.cancelled():
            job.cancel("The client went away.")

    watcher = asyncio.ensure_future(_disconnected(request))
    watcher.add_done_callback(gone)
    return watcher


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def problem(status: int, code: str, message: str) -> JSONResponse:
    """An error as OpenAI's clients expect it: {"error": {"message", "type", "code"}}."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status)


def describe(error: Exception) -> JSONResponse:
    """The answer for an error: its status, and what came, what was expected, and the mend."""
    for kind, status, code in _STATUSES:
        if isinstance(error, kind):
            answer = problem(status, code, str(error))
            if isinstance(error, BusyError):
                answer.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
            return answer
    if isinstance(error, PidecodeError):
        return problem(500, "failed", str(error))
    if type(error).__name__ == "OutOfMemoryError":
        return problem(507, "does_not_fit", "The device ran out of memory; use a smaller input.")
    return problem(
        500, "fault", "Sorry, that is a fault of pidecode or of something below it; the server's log has the details."
    )


def add_error_handlers(app: Any) -> None:
    """Let `app` answer every error in one shape."""

    async def known(_request: Request, error: Exception) -> JSONResponse:
        return describe(error)

    async def http(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        answer = problem(error.status_code, f"http_{error.status_code}", str(error.detail))
        answer.headers.update(error.headers or {})
        return answer

    async def invalid(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = [
            f"{'.'.join(str(part) for part in entry['loc'][1:]) or 'body'}: {entry['msg']}" for entry in error.errors()
        ]
        return problem(422, "invalid", "; ".join(found[:8]) + ".")

    async def gone(_request: Request, _error: Exception) -> JSONResponse:
        return problem(499, "gone", "The client went away.")  # nobody reads it; the metrics count it

    app.add_exception_handler(PidecodeError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, known)


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _tokens(scope: Scope, headers: dict[str, str]) -> list[str]:
    """Every token a request shows: as a header, as the page's cookie, or in the address that opens the page."""
    found = []
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        found.append(value.strip())
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        morsel = None
    if morsel is not None:
        found.append(morsel.value)
    if scope["path"] == "/":
        found += parse_qs(scope["query_string"].decode("latin-1")).get("token", [])
    return found


def _same(shown: str, token: str) -> bool:
    return hmac.compare_digest(shown.encode("utf-8", "surrogateescape"), token.encode("utf-8"))


def to_header(value: Any) -> str:
    """JSON that fits a header: plain ASCII on one line."""
    return json.dumps(value, ensure_ascii=True)


GRACE = 30
"""Seconds that open requests are given when the server is told to stop."""
SHORTEST_TOKEN = 16


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_token(host: str, token: str | None) -> None:
    """Raise SettingError for an address that others reach without a token, or for a token that could be guessed."""
    if token is not None and (
        len(token) < SHORTEST_TOKEN or not token.isascii() or not token.isprintable() or " " in token
    ):
        raise SettingError(
            f"The token must be at least {SHORTEST_TOKEN} printable ASCII characters without spaces, so that it cannot "
            "be guessed; make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    if token is None and not is_loopback(host):
        raise SettingError(
            f"At {host} others can reach this server, so it needs a token: set PIDECODE_TOKEN, or give --token-file. "
            "Without one it binds to 127.0.0.1 only."
        )


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises SettingError if the address cannot be had."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise SettingError(f"{host} is no address of this machine: {error.strerror or error}.") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise SettingError(
            f"{host}:{port} cannot be used: {error.strerror or error}. Choose another port with --port, or 0 for any."
        ) from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Where a browser finds it: http://127.0.0.1:8321."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: Any, *, connections: int, grace: int = GRACE) -> Any:
    """A uvicorn server for `app`, with nothing logged of who asked what.

    connections: most connections held at once; the next are told 503.
    """
    import uvicorn

    config = uvicorn.Config(
        app,
        access_log=False,
        server_header=False,
        log_level="warning",
        ws="none",
        lifespan="on",
        limit_concurrency=connections,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=grace,
        h11_max_incomplete_event_size=16384,
        http="h11",
    )
    return uvicorn.Server(config)


def serve(app: Any, listener: socket.socket, *, connections: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then finish what runs within `GRACE` seconds. `ready` is told the address."""
    server = make_server(app, connections=connections)
    listener.listen(128)  # from here on connections wait instead of being refused
    ready(address_of(listener))
    with listener:
        server.run(sockets=[listener])
