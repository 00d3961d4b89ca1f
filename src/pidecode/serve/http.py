# SPDX-License-Identifier: Apache-2.0
"""HTTP basics: authentication, bounded request bodies, error responses, sockets and the uvicorn server."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import socket
import threading
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from http import HTTPStatus
from types import FrameType
from typing import Any
from urllib.parse import urlsplit

import h11
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from pidecode import errors
from pidecode.serve.queue import DecodeJob, JobQueue, JobStatus
from pidecode.serve.schemas import RequestLimits

COOKIE = "pidecode_token"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
OPEN_PATH = "/health"  # needs no token
RETRY_SECONDS = 5  # `Retry-After` where the queue has no better guess
SHUTDOWN_SECONDS = 30  # seconds that open requests and the running job are given when the server stops
MIN_TOKEN_LENGTH = 16
HEADER_SECONDS = 10.0
"""Time from a connection's opening, or from the end of its last response, to the end of the next request's headers."""
MAX_CONNECTIONS = 512  # connections held at once; beyond, the one that has sent no whole request for longest is closed
MAX_READERS, BODIES_HELD = 64, 4  # bodies read at once, and memory for unfinished ones in longest bodies
MIN_RATE, RATE_GRACE_SECONDS = 4096, 5.0
"""Bytes a second at which a body must arrive on average, after so many seconds, and a response be read."""
READ_SECONDS, UNREAD_BYTES = 30.0, 65536
"""Time over which that rate of reading is taken, and bytes that the kernel may hold of what has not left it."""
MAX_UNSENT = 512 * 2**20  # bytes of responses that clients have not read; beyond, the oldest such response is given up
SMALLEST_PIECE, PIECES_FREE = 64, 4096
"""Bytes that the pieces of a chunked body must have on average, beyond the first pieces."""

_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy":
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
        "form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
}  # fmt: skip

_CORS_HEADERS = {
    "access-control-allow-methods": "GET, POST, DELETE",
    "access-control-allow-headers": "Authorization, Content-Type",
    "access-control-expose-headers": "X-Pidecode-Seconds, X-Pidecode-Warnings, Retry-After",
    "access-control-max-age": "600",
    "vary": "Origin",
}

# Status and code by class of error; the first match counts.
_STATUSES: tuple[tuple[type[errors.PidecodeError], int, str], ...] = (
    (errors.Cancelled, 503, "stopped"), (errors.DoesNotFitError, 507, "does_not_fit"),
    (errors.MissingDependencyError, 501, "not_installed"), (errors.SettingError, 400, "bad_setting"),
    (errors.LatentError, 400, "bad_latent"), (errors.FileError, 400, "bad_file"), (errors.PidecodeError, 500, "failed"),
)  # fmt: skip


class AuthMiddleware:
    """ASGI middleware that checks host, origin and token, and adds security headers to every response.

    Without a token only requests addressed to this machine by a loopback name are answered, so that a web site which
    resolves its own name to this address (DNS rebinding) gets nothing. Requests that a browser sends on behalf of
    another site are refused.

    Args:
        token: What a client must present (`Authorization: Bearer ...`, or the page's cookie). None admits everyone who
            reaches the address, which must then be a loopback address.
        most_active: Requests handled at once; further ones with a good token are answered with 503.
        hosts: Names besides the loopback ones under which a server without a token may be addressed.
        origins: Web sites whose scripts may use the server (CORS), such as "https://example.org".
    """

    def __init__(
        self, app: ASGIApp, *, token: str | None, most_active: int, hosts: Collection[str], origins: Collection[str]
    ) -> None:
        self.app = app
        self.token = token
        self.most_active = most_active
        self.hosts = LOOPBACK.union(name.lower() for name in hosts)
        self.origins = frozenset(origin.lower().rstrip("/") for origin in origins)
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward or refuse one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request, started, extra = Request(scope), False, _HEADERS
        cors = request.headers.get("origin", "").lower() in self.origins
        if cors:
            extra = _HEADERS | _CORS_HEADERS | {"access-control-allow-origin": request.headers["origin"]}

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                for name, value in extra.items():
                    headers.setdefault(name, value)
            await send(message)

        response: Response | None = self._refusal(request)
        if cors and request.method == "OPTIONS":
            response = Response(status_code=204)
        if response is None and self.active >= self.most_active:
            response = error_response(503, "busy", "The server handles as many requests as it can. Retry later.")
        if response is not None:
            await response(scope, receive, send_with_headers)
            return
        self.active += 1
        try:
            await self.app(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # the server was told twice to stop
            if not started:
                response = error_response(503, "stopped", "The server is stopping.")
                await response(scope, receive, send_with_headers)
        finally:
            self.active -= 1

    def _refusal(self, request: Request) -> JSONResponse | None:
        host, origin = request.headers.get("host", ""), request.headers.get("origin", "").lower()
        if self.token is None and _hostname(host) not in self.hosts:
            return error_response(
                403,
                "wrong_host",
                f"This server answers to localhost only, and was addressed as {host[:80]!r}. To let it answer to that "
                "name, start it with --allowed-host NAME, or with a token.",
            )
        own = ("", f"http://{host}".lower(), f"https://{host}".lower())
        foreign = origin not in own or request.headers.get("sec-fetch-site") == "cross-site"
        if foreign and origin not in self.origins:
            return error_response(
                403,
                "wrong_origin",
                f"This server answers its own page and programs, not other web sites, and this comes from "
                f"{origin[:80] or 'another one'!r}. To let that site use it, start it with --cors ORIGIN; behind a "
                "proxy, let the proxy pass on the Host header.",
            )
        if self.token is None or request.scope["path"] == OPEN_PATH:
            return None
        presented = [token.encode("utf-8", "surrogateescape") for token in _tokens(request)]
        if any(hmac.compare_digest(one, self.token.encode()) for one in presented):
            return None
        message = "The token is missing or wrong; send the header 'Authorization: Bearer TOKEN'."
        return error_response(401, "no_token", message, {"WWW-Authenticate": "Bearer"})


@dataclass(slots=True, eq=False)
class _Arrival:
    """A body that is arriving."""

    started: float
    data: bytearray = field(default_factory=bytearray)
    timeout: asyncio.Timeout | None = None  # that of its next part


class BodyReader:
    """Reads request bodies, for jobs of `queue`, within limits of length, time, rate, number and memory."""

    def __init__(self, queue: JobQueue, limits: RequestLimits) -> None:
        self.queue = queue
        self.limits = limits
        self.arriving: list[_Arrival] = []

    async def read(self, request: Request, *, queued: bool = True) -> bytes:
        """The whole body of a request; `queued` says whether a job will be queued for it.

        Raises:
            BusyError: The queue has no slot for its job, or too many bodies are arriving; raised before it is read.
            HTTPException: 400 for an empty body, 408 for a slow one, 413 for a long one.
        """
        if queued and self.queue.free_slots <= 0:
            raise self.queue.refusal("The queue is full. Retry later.")
        if len(self.arriving) >= MAX_READERS:
            self._give_up_slowest()
        declared = request.headers.get("content-length", "")
        self._check_length(int(declared[:18]) if declared.isdecimal() else 0)
        arrival = _Arrival(asyncio.get_running_loop().time())
        self.arriving.append(arrival)
        try:
            await self._read(request, arrival)
        finally:
            self.arriving.remove(arrival)
        if not arrival.data:
            raise HTTPException(400, "The body is empty; send the file itself as the body.")
        return bytes(arrival.data)

    def _give_up_slowest(self) -> None:
        """Make room for a body by ending the slowest; BusyError if all of them came within the last second."""
        now = asyncio.get_running_loop().time()
        older = {
            len(one.data) / (now - one.started): one.timeout
            for one in self.arriving
            if one.started < now - 1.0 and one.timeout is not None and not one.timeout.expired()
        }
        if not older:
            raise self.queue.refusal(f"{MAX_READERS} other requests are being received. Retry later.", 1.0)
        older[min(older)].reschedule(now)

    async def _read(self, request: Request, arrival: _Arrival) -> None:
        started, data, parts = arrival.started, arrival.data, request.stream()
        while True:
            slowest = started + min(self.limits.body_seconds, RATE_GRACE_SECONDS + len(data) / MIN_RATE)
            try:
                async with asyncio.timeout_at(slowest) as arrival.timeout:
                    part = await anext(parts, None)
            except TimeoutError:
                taken = asyncio.get_running_loop().time() - started
                raise HTTPException(
                    408,
                    f"The body took too long to arrive: {len(data):,} bytes in {taken:.0f} seconds. "
                    f"Send at least {MIN_RATE:,} bytes a second, and all within {self.limits.body_seconds:g} seconds.",
                ) from None
            if part is None:
                return
            data += part
            self._check_length(len(data))
            if sum(len(one.data) for one in self.arriving) > BODIES_HELD * self.limits.body_bytes:
                raise self.queue.refusal("Other large requests are being received. Retry later.", 1.0)

    def _check_length(self, length: int) -> None:
        most = self.limits.body_bytes
        if length > most:
            raise HTTPException(413, f"The body is longer than the {most:,} bytes this server takes.")


async def statuses(request: Request, job: DecodeJob) -> AsyncGenerator[JobStatus]:
    """The job's status at each change, until it is over or the client disconnects."""
    gone = asyncio.ensure_future(_disconnected(request))
    gone.add_done_callback(lambda _: job.notify())
    try:
        async with aclosing(job.changes()) as changes:
            async for status in changes:
                if gone.done():
                    return
                yield status
    finally:
        gone.cancel()


async def result_of(request: Request, job: DecodeJob) -> Any:
    """Wait for the job's result, or cancel it with ClientDisconnect if the client disconnects, to free its slot."""
    try:
        async with aclosing(statuses(request, job)) as changes:
            async for _ in changes:
                pass
        if not job.over:
            raise ClientDisconnect
        return job.result()
    finally:
        job.cancel("The client disconnected.")


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_response(status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error in the form that OpenAI's clients expect: {"error": {"message", "type", "code"}}."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    retry = {"Retry-After": str(RETRY_SECONDS)} if status == 503 else {}
    error = {"message": message, "type": kind, "code": code}
    return JSONResponse({"error": error}, status, {**retry, **(headers or {})})


def response_for(error: Exception, path: str = "") -> JSONResponse:
    """The response for an exception, at a path. Only pidecode's own errors show their message to the client."""
    if isinstance(error, RequestValidationError):
        return error_response(422, "invalid", validation_message(error.errors(), skip=1))
    if isinstance(error, ClientDisconnect):
        return error_response(499, "disconnected", "The client disconnected.")  # only the metrics see it
    if isinstance(error, HTTPException):
        detail = str(error.detail)
        if detail == HTTPStatus.NOT_FOUND.phrase:  # of a path, by Starlette
            detail = f"There is no {path[:80]} here; /openapi.json lists the paths."
        return error_response(error.status_code, f"http_{error.status_code}", detail, error.headers)
    if errors.is_out_of_memory(error):
        return error_response(507, "does_not_fit", errors.OUT_OF_MEMORY)
    if isinstance(error, errors.BusyError):
        headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
        return error_response(503 if error.stopping else 429, "busy", str(error), headers)
    for kind, status, code in _STATUSES:
        if isinstance(error, kind):
            return error_response(status, code, error.message("http"))
    return error_response(500, "internal", "Internal error of pidecode or its dependencies; see the server's log.")


def validation_message(problems: Sequence[Any], skip: int = 0, model: type[BaseModel] | None = None) -> str:
    """Pydantic's errors as sentences; `skip` leaves out first parts of their places, `model` describes its fields."""
    found = []
    for problem in problems[:8]:
        place = problem["loc"][skip:]
        info = model.model_fields.get(str(place[0])) if model is not None and place else None
        about = f" ({info.description.rstrip('.')})" if info is not None and info.description else ""
        found.append(f"{'.'.join(map(str, place)) or 'body'}: {problem['msg']}{about}")
    return "; ".join(found) + "."


def add_error_handlers(app: FastAPI) -> None:
    """Let `app` answer every error in one form."""

    async def handle(request: Request, error: Exception) -> JSONResponse:
        return response_for(error, request.scope["path"])  # `url` is made of the Host header too

    for kind in (errors.PidecodeError, HTTPException, RequestValidationError, ClientDisconnect, Exception):
        app.add_exception_handler(kind, handle)


def _hostname(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _tokens(request: Request) -> list[str]:
    """Every token in a request: the header, the page's cookie, or the query of the address that opens the page."""
    scheme, _, value = request.headers.get("authorization", "").partition(" ")
    found = [value.strip()] if scheme.lower() == "bearer" else []
    found += [request.cookies[COOKIE]] if COOKIE in request.cookies else []
    return found + (request.query_params.getlist("token") if request.scope["path"] == "/" else [])


def check_origin(origin: str) -> str:
    """The origin. Raises SettingError if it is no scheme and host, such as "https://example.org"."""
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.hostname or f"{parts.scheme}://{parts.netloc}" != origin:
        raise errors.SettingError(
            f"The origin is {origin[:80]!r}; it must be scheme and host, such as https://example.org."
        )
    return origin


def check_token(host: str, token: str | None) -> None:
    """Raise SettingError if other machines can reach `host` and there is no token, or if it could be guessed."""
    if token is not None and (
        len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token
    ):
        raise errors.SettingError(
            f"The token must be at least {MIN_TOKEN_LENGTH} printable ASCII characters without spaces, so that it "
            "cannot be guessed; make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = False
    if token is None and not loopback:
        raise errors.SettingError(
            f"At {host} others can reach this server, so it needs a token: set PIDECODE_TOKEN, or give --token-file. "
            "Without one it binds to 127.0.0.1 only."
        )


def bound_socket(host: str, port: int) -> socket.socket:
    """A bound socket (port 0 takes any free port); SettingError if the address does not exist or is in use."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise errors.SettingError(f"{host} is not an address of this machine: {error.strerror or error}.") from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise errors.SettingError(
            f"{host}:{port} cannot be used: {error.strerror or error}. Choose another port with --port, or 0 for any."
        ) from error
    return listener


class _Connection(h11.Connection):
    """An HTTP/1.1 connection that refuses bodies in very many tiny pieces, each as costly as a large one."""

    pieces = 0
    received = 0

    def next_event(self) -> Any:
        """The next event, as h11's."""
        event = super().next_event()
        if isinstance(event, h11.Request):
            self.pieces = self.received = 0
        elif isinstance(event, h11.Data):
            self.pieces += 1
            self.received += len(event.data)
            if self.pieces > PIECES_FREE + self.received // SMALLEST_PIECE:
                raise h11.RemoteProtocolError("The body comes in too many small pieces; send larger ones.")
        return event


class BoundedProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with a deadline for headers, a rate for reading responses, and limits on what they hold."""

    def __init__(self, config: uvicorn.Config, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        self.conn = _Connection(h11.SERVER, config.h11_max_incomplete_event_size or 16384)
        self.timer: asyncio.TimerHandle | None = None
        self.unsent, self.paused_since = 0, 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline, and make room if there are too many connections."""
        super().connection_made(transport)
        if hasattr(socket, "TCP_NOTSENT_LOWAT"):  # else megabytes may leave the buffer here at once, after long pauses
            option = (socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT)
            transport.get_extra_info("socket").setsockopt(*option, UNREAD_BYTES)
        self._start_timer()
        if len(self.connections) > MAX_CONNECTIONS:
            timers = {other: getattr(other, "timer", None) for other in self.connections}
            waiting = {other: timer.when() for other, timer in timers.items() if timer is not None}
            min(waiting, key=lambda other: waiting[other]).transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the deadline."""
        self._stop_timer()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        """Stop the deadline once a request is there, unless the last response is still being read."""
        before = self.cycle
        super().handle_events()
        if self.cycle is not before and not self.cycle.response_complete and not self.flow.write_paused:
            self._stop_timer()

    def pause_writing(self) -> None:
        """Start the deadline for reading what was sent, and make room if too much waits to be read."""
        super().pause_writing()
        self.paused_since = self.loop.time()
        if self.timer is None:
            self._start_timer()
        paused = [other for other in self.connections if isinstance(other, BoundedProtocol) and other.paused_since]
        if sum(map(_unsent, paused)) > MAX_UNSENT:
            min(paused, key=lambda other: other.paused_since).transport.abort()

    def resume_writing(self) -> None:
        """Stop the deadline, unless it is that of the next request."""
        super().resume_writing()
        self.paused_since = 0.0
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()

    def on_response_complete(self) -> None:
        """Start the deadline for the next request; until then the rest of this one's body is read and dropped."""
        self._start_timer()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP, in the form of all errors."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = error_response(400, "bad_http", msg, {"connection": "close"})
            start = h11.Response(status_code=400, headers=response.raw_headers)
            for event in (start, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()

    def _start_timer(self) -> None:
        self._stop_timer()
        self.unsent = _unsent(self)
        self.timer = self.loop.call_later(READ_SECONDS if self.unsent else HEADER_SECONDS, self._time_up)

    def _time_up(self) -> None:
        """Close the connection, unless the client still reads its last response at MIN_RATE."""
        if self.unsent - _unsent(self) >= max(1, min(self.unsent, READ_SECONDS * MIN_RATE)):
            self._start_timer()
        else:
            self.transport.abort()

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


def _unsent(connection: BoundedProtocol) -> int:
    return int(connection.transport.get_write_buffer_size())


class StoppableServer(uvicorn.Server):
    """A server that lets its jobs end at the first signal, ends them at the second, and itself at the third.

    `stop` ends the jobs within the seconds given, and answers their requests; `grace` is given to open requests on
    shutdown. Requests are not logged.
    """

    def __init__(self, app: ASGIApp, *, stop: Callable[[float], None], grace: int = 2 * SHUTDOWN_SECONDS) -> None:
        config = uvicorn.Config(
            app, access_log=False, server_header=False, log_level="warning", ws="none", lifespan="on",
            timeout_keep_alive=5, timeout_graceful_shutdown=grace, h11_max_incomplete_event_size=16384,
            http=BoundedProtocol, proxy_headers=False,
        )  # fmt: skip
        super().__init__(config)
        self.stop = stop
        self.signals = 0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle SIGINT and SIGTERM."""
        self.signals += 1
        if self.signals > 2:
            self.force_exit = True
            return
        if self.signals == 1:
            super().handle_exit(sig, frame)
        grace = SHUTDOWN_SECONDS if self.signals == 1 else 0
        threading.Thread(target=self.stop, args=(grace,), name="pidecode-stop", daemon=True).start()


def serve(
    app: ASGIApp, listener: socket.socket, *, stop: Callable[[float], None], ready: Callable[[str], None]
) -> None:
    """Serve on a socket from `bound_socket` until SIGINT or SIGTERM; `ready` is called with the URL before that."""
    listener.listen(128)  # from here on connections wait instead of being refused
    host, port = listener.getsockname()[:2]
    ready(f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}")
    with listener:
        StoppableServer(app, stop=stop).run(sockets=[listener])
