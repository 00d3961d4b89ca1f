# SPDX-License-Identifier: Apache-2.0
"""HTTP basics: authentication, bounded request bodies, error responses, sockets and the uvicorn server."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import socket
from collections.abc import Callable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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
from pidecode.serve.queue import DecodeJob, JobQueue
from pidecode.serve.schemas import RequestLimits

COOKIE = "pidecode_token"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
SHUTDOWN_SECONDS = 30
"""Seconds that open requests and the running job are given when the server stops."""
MIN_TOKEN_LENGTH = 16

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

# Status and code by class of error; the first match counts.
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
    """ASGI middleware that checks host, origin and token, and adds security headers to every response.

    Without a token only requests addressed to this machine by a loopback name are answered, so that a web site which
    resolves its own name to this address (DNS rebinding) gets nothing. Requests that a browser sends on behalf of
    another site are refused.

    Args:
        app: The application.
        token: What a client must present (`Authorization: Bearer ...`, or the page's cookie). None admits everyone who
            reaches the address, which must then be a loopback address.
        open_paths: Paths that need no token.
    """

    def __init__(self, app: ASGIApp, *, token: str | None = None, open_paths: frozenset[str] = frozenset()) -> None:
        self.app = app
        self.token = token
        self.open_paths = open_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward or refuse one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = {name.lower() for name, _ in message["headers"]}
                extra = [(name, value) for name, value in _HEADERS if name not in given]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await refusal(scope, receive, send_with_headers)
            return
        await self.app(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> JSONResponse | None:
        host = headers.get("host", "")
        if self.token is None and _hostname(host) not in LOOPBACK:
            return error_response(
                403, "wrong_host", f"This server answers to localhost only, and was addressed as {host[:80]!r}."
            )
        origin = headers.get("origin")
        foreign = origin is not None and origin.lower() not in (f"http://{host}".lower(), f"https://{host}".lower())
        if foreign or headers.get("sec-fetch-site") == "cross-site":
            return error_response(
                403, "wrong_origin", "This server answers its own page and programs, not other web sites."
            )
        if self.token is None or scope["path"] in self.open_paths:
            return None
        if any(_equal(presented, self.token) for presented in _tokens(scope, headers)):
            return None
        refusal = error_response(
            401, "no_token", "The token is missing or wrong; send the header 'Authorization: Bearer TOKEN'."
        )
        refusal.headers["WWW-Authenticate"] = "Bearer"
        return refusal


class BodyReader:
    """Reads request bodies: no more at once than the queue has free slots, none longer than the limit.

    Args:
        queue: The queue that the bodies' jobs will enter.
        limits: Longest body in bytes and in seconds.
    """

    def __init__(self, queue: JobQueue, limits: RequestLimits) -> None:
        self.queue = queue
        self.limits = limits
        self.reading = 0

    async def read(self, request: Request) -> bytes:
        """Return the whole body.

        Raises:
            BusyError: If the queue has no slot for its job; raised before the body is read.
            HTTPException: 400 for an empty body, 408 for a slow one, 413 for a long one.
        """
        if self.reading >= self.queue.free_slots:
            self.queue.stats.refused += 1
            raise BusyError("The queue is full. Retry later.", self.queue.retry_after())
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.limits.body_bytes:
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


async def result_of(request: Request, job: DecodeJob) -> Any:
    """Wait for the job's result and cancel the job if the client disconnects, so that its slot is free again.

    Raises:
        ClientDisconnect: If the client disconnected.
        Exception: Whatever `job.result` raises.
    """
    gone = asyncio.ensure_future(_disconnected(request))
    end = asyncio.ensure_future(job.finished())
    try:
        await asyncio.wait({gone, end}, return_when=asyncio.FIRST_COMPLETED)
        if end.done():
            return end.result()
        job.cancel("The client disconnected.")
        raise ClientDisconnect
    finally:
        job.cancel("The request was aborted.")
        gone.cancel()
        end.cancel()


def cancel_on_disconnect(request: Request, job: DecodeJob) -> asyncio.Future[None]:
    """Cancel the job if the client disconnects. Cancel the returned future once the job is over."""

    def cancel_job(watcher: asyncio.Future[None]) -> None:
        if not watcher.cancelled():
            job.cancel("The client disconnected.")

    watcher = asyncio.ensure_future(_disconnected(request))
    watcher.add_done_callback(cancel_job)
    return watcher


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_response(status: int, code: str, message: str) -> JSONResponse:
    """An error in the form that OpenAI's clients expect: {"error": {"message", "type", "code"}}."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status)


def response_for(error: Exception) -> JSONResponse:
    """The response for an exception. Only pidecode's own errors show their message to the client."""
    for kind, status, code in _STATUSES:
        if isinstance(error, kind):
            response = error_response(status, code, str(error))
            if isinstance(error, BusyError):
                response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
            return response
    if isinstance(error, PidecodeError):
        return error_response(500, "failed", str(error))
    if type(error).__name__ == "OutOfMemoryError":
        return error_response(507, "does_not_fit", "The device ran out of memory; use a smaller input.")
    return error_response(500, "internal", "Internal error of pidecode or its dependencies; see the server's log.")


def add_error_handlers(app: FastAPI) -> None:
    """Let `app` answer every error in one form."""

    async def exception(_request: Request, error: Exception) -> JSONResponse:
        return response_for(error)

    async def http_exception(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        response = error_response(error.status_code, f"http_{error.status_code}", str(error.detail))
        response.headers.update(error.headers or {})
        return response

    async def validation_error(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        found = [
            f"{'.'.join(str(part) for part in entry['loc'][1:]) or 'body'}: {entry['msg']}" for entry in error.errors()
        ]
        return error_response(422, "invalid", "; ".join(found[:8]) + ".")

    async def disconnected(_request: Request, _error: Exception) -> JSONResponse:
        return error_response(499, "disconnected", "The client disconnected.")  # only the metrics see it

    app.add_exception_handler(PidecodeError, exception)
    app.add_exception_handler(HTTPException, http_exception)
    app.add_exception_handler(RequestValidationError, validation_error)
    app.add_exception_handler(ClientDisconnect, disconnected)
    app.add_exception_handler(Exception, exception)


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _tokens(scope: Scope, headers: dict[str, str]) -> list[str]:
    """Every token in a request: the header, the page's cookie, or the query of the address that opens the page."""
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


def _equal(presented: str, token: str) -> bool:
    return hmac.compare_digest(presented.encode("utf-8", "surrogateescape"), token.encode("utf-8"))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach that address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_token(host: str, token: str | None) -> None:
    """Check that the token suits the address.

    Raises:
        SettingError: If other machines can reach `host` and there is no token, or if the token could be guessed.
    """
    if token is not None and (
        len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token
    ):
        raise SettingError(
            f"The token must be at least {MIN_TOKEN_LENGTH} printable ASCII characters without spaces, so that it "
            "cannot be guessed; make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    if token is None and not is_loopback(host):
        raise SettingError(
            f"At {host} others can reach this server, so it needs a token: set PIDECODE_TOKEN, or give --token-file. "
            "Without one it binds to 127.0.0.1 only."
        )


def bound_socket(host: str, port: int) -> socket.socket:
    """Return a bound socket; port 0 takes any free port.

    Raises:
        SettingError: If the address does not exist or is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise SettingError(f"{host} is not an address of this machine: {error.strerror or error}.") from error
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
    """The URL of a bound socket, such as http://127.0.0.1:8421."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: ASGIApp, *, connections: int, grace: int = SHUTDOWN_SECONDS) -> uvicorn.Server:
    """Create the uvicorn server for `app`. It logs no requests.

    Args:
        app: The ASGI application.
        connections: Most connections held at once; further ones are answered with 503.
        grace: Seconds that open requests are given on shutdown.
    """
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


def serve(app: ASGIApp, listener: socket.socket, *, connections: int, ready: Callable[[str], None]) -> None:
    """Serve until SIGINT or SIGTERM, then let open requests end within `SHUTDOWN_SECONDS`.

    Args:
        app: The ASGI application.
        listener: A socket from `bound_socket`; closed at the end.
        connections: As in `make_server`.
        ready: Called with the server's URL once connections are accepted.
    """
    server = make_server(app, connections=connections)
    listener.listen(128)  # from here on connections wait instead of being refused
    ready(address_of(listener))
    with listener:
        server.run(sockets=[listener])
