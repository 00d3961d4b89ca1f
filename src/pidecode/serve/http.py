# SPDX-License-Identifier: Apache-2.0
"""HTTP basics: authentication, bounded request bodies, error responses, sockets and the uvicorn server."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import math
import socket
import threading
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from types import FrameType
from typing import Any
from urllib.parse import parse_qs, urlsplit

import h11
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from pidecode.errors import (
    OUT_OF_MEMORY,
    BusyError,
    Cancelled,
    DoesNotFitError,
    FileError,
    LatentError,
    MissingDependencyError,
    PidecodeError,
    SettingError,
    is_out_of_memory,
)
from pidecode.serve.queue import DecodeJob, JobQueue
from pidecode.serve.schemas import RequestLimits

COOKIE = "pidecode_token"
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
RETRY_SECONDS = 5.0  # `Retry-After` where the queue has no better guess
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

_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"content-security-policy",
     (b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
     b"form-action 'none'; base-uri 'none'; frame-ancestors 'none'")),
)  # fmt: skip

_CORS_HEADERS = (
    (b"access-control-allow-methods", b"GET, POST, DELETE"),
    (b"access-control-allow-headers", b"Authorization, Content-Type"),
    (b"access-control-expose-headers", b"X-Pidecode-Seconds, X-Pidecode-Warnings, Retry-After"),
    (b"access-control-max-age", b"600"),
    (b"vary", b"Origin"),
)

# Status and code by class of error; the first match counts.
_STATUSES: tuple[tuple[type[PidecodeError], int, str], ...] = (
    (Cancelled, 503, "stopped"), (DoesNotFitError, 507, "does_not_fit"),
    (MissingDependencyError, 501, "not_installed"), (SettingError, 400, "bad_setting"),
    (LatentError, 400, "bad_latent"), (FileError, 400, "bad_file"),
)  # fmt: skip


class AuthMiddleware:
    """ASGI middleware that checks host, origin and token, and adds security headers to every response.

    Without a token only requests addressed to this machine by a loopback name are answered, so that a web site which
    resolves its own name to this address (DNS rebinding) gets nothing. Requests that a browser sends on behalf of
    another site are refused.

    Args:
        token: What a client must present (`Authorization: Bearer ...`, or the page's cookie). None admits everyone who
            reaches the address, which must then be a loopback address.
        open_paths: Paths that need no token.
        most_active: Requests handled at once; further ones with a good token are answered with 503.
        hosts: Names besides the loopback ones under which a server without a token may be addressed.
        origins: Web sites whose scripts may use the server (CORS), such as "https://example.org".
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        token: str | None = None,
        open_paths: frozenset[str] = frozenset(),
        most_active: int = MAX_CONNECTIONS,
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
    ) -> None:
        self.hosts = LOOPBACK.union(name.lower() for name in hosts)
        self.origins = frozenset(origin.lower().rstrip("/") for origin in origins)
        self.app = app
        self.token = token
        self.open_paths = open_paths
        self.most_active = most_active
        self.active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward or refuse one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}

        started = False
        cors: list[tuple[bytes, bytes]] = []
        if headers.get("origin", "").lower() in self.origins:
            cors = [(b"access-control-allow-origin", headers["origin"].encode("latin-1")), *_CORS_HEADERS]

        async def send_with_headers(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                given = {name.lower() for name, _ in message["headers"]}
                extra = [(name, value) for name, value in _HEADERS if name not in given]
                message["headers"] = [*message["headers"], *extra, *cors]
            await send(message)

        response: Response | None = self._refusal(scope, headers)
        if cors and scope["method"] == "OPTIONS":
            response = Response(status_code=204)
        if response is None and self.active >= self.most_active:
            response = error_response(
                503, "busy", "The server handles as many requests as it can. Retry later.", retry_after=RETRY_SECONDS
            )
        if response is not None:
            await response(scope, receive, send_with_headers)
            return
        self.active += 1
        try:
            await self.app(scope, receive, send_with_headers)
        except asyncio.CancelledError:  # the server was told twice to stop
            if not started:
                response = error_response(503, "stopped", "The server is stopping.", retry_after=RETRY_SECONDS)
                await response(scope, receive, send_with_headers)
        finally:
            self.active -= 1

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> JSONResponse | None:
        host = headers.get("host", "")
        if self.token is None and _hostname(host) not in self.hosts:
            return error_response(
                403,
                "wrong_host",
                f"This server answers to localhost only, and was addressed as {host[:80]!r}. To let it answer to that "
                "name, start it with --allowed-host NAME, or with a token.",
            )
        origin, own = headers.get("origin", "").lower(), (f"http://{host}".lower(), f"https://{host}".lower())
        foreign = (origin and origin not in own) or headers.get("sec-fetch-site") == "cross-site"
        if foreign and origin not in self.origins:
            return error_response(
                403,
                "wrong_origin",
                f"This server answers its own page and programs, not other web sites, and this comes from "
                f"{origin[:80] or 'another one'!r}. To let that site use it, start it with --cors ORIGIN; behind a "
                "proxy, let the proxy pass on the Host header.",
            )
        if self.token is None or scope["path"] in self.open_paths:
            return None
        presented = [token.encode("utf-8", "surrogateescape") for token in _tokens(scope, headers)]
        if any(hmac.compare_digest(one, self.token.encode()) for one in presented):
            return None
        refusal = error_response(
            401, "no_token", "The token is missing or wrong; send the header 'Authorization: Bearer TOKEN'."
        )
        refusal.headers["WWW-Authenticate"] = "Bearer"
        return refusal


class BodyReader:
    """Reads request bodies, for jobs of `queue`, within limits of length, time, rate, number and memory."""

    def __init__(self, queue: JobQueue, limits: RequestLimits) -> None:
        self.queue = queue
        self.limits = limits
        self.arriving: list[_Arrival] = []
        self.held = 0

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
        if declared.isdecimal() and int(declared[:18]) > self.limits.body_bytes:
            raise self._too_long()
        arrival, data = _Arrival(asyncio.get_running_loop().time()), bytearray()
        self.arriving.append(arrival)
        try:
            await self._read(request, data, arrival)
        finally:
            self.arriving.remove(arrival)
            self.held -= len(data)
        if not data:
            raise HTTPException(400, "The body is empty; send the file itself as the body.")
        return bytes(data)

    def _give_up_slowest(self) -> None:
        """Make room for a body by ending the slowest; BusyError if all of them came within the last second."""
        now = asyncio.get_running_loop().time()
        older = {
            one.received / (now - one.started): one.timeout
            for one in self.arriving
            if one.started < now - 1.0 and one.timeout is not None and not one.timeout.expired()
        }
        if not older:
            raise self.queue.refusal(f"{MAX_READERS} other requests are being received. Retry later.", 1.0)
        older[min(older)].reschedule(now)

    async def _read(self, request: Request, data: bytearray, arrival: _Arrival) -> None:
        loop = asyncio.get_running_loop()
        started, parts = arrival.started, request.stream()
        while True:
            slowest = started + min(self.limits.body_seconds, RATE_GRACE_SECONDS + len(data) / MIN_RATE)
            try:
                async with asyncio.timeout_at(slowest) as arrival.timeout:
                    part = await anext(parts, None)
            except TimeoutError:
                raise HTTPException(
                    408,
                    f"The body took too long to arrive: {len(data):,} bytes in {loop.time() - started:.0f} seconds. "
                    f"Send at least {MIN_RATE:,} bytes a second, and all within {self.limits.body_seconds:g} seconds.",
                ) from None
            if part is None:
                return
            data += part
            arrival.received = len(data)
            self.held += len(part)
            if len(data) > self.limits.body_bytes:
                raise self._too_long()
            if self.held > BODIES_HELD * self.limits.body_bytes:
                raise self.queue.refusal("Other large requests are being received. Retry later.", 1.0)

    def _too_long(self) -> HTTPException:
        return HTTPException(413, f"The body is longer than the {self.limits.body_bytes:,} bytes this server takes.")


@dataclass(slots=True, eq=False)
class _Arrival:
    """A body that is arriving."""

    started: float
    received: int = 0
    timeout: asyncio.Timeout | None = None  # that of its next part


async def result_of(request: Request, job: DecodeJob) -> Any:
    """Wait for the job's result, or cancel it with ClientDisconnect if the client disconnects, to free its slot."""
    gone = asyncio.ensure_future(disconnected(request))
    end = asyncio.ensure_future(job.finished())
    end.add_done_callback(lambda task: task.cancelled() or task.exception())  # retrieved, also where nobody waits
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


async def disconnected(request: Request) -> None:
    """Wait until the client disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def error_response(status: int, code: str, message: str, *, retry_after: float | None = None) -> JSONResponse:
    """An error in the form that OpenAI's clients expect: {"error": {"message", "type", "code"}}."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    headers = {} if retry_after is None else {"Retry-After": str(max(1, math.ceil(retry_after)))}
    return JSONResponse({"error": {"message": message, "type": kind, "code": code}}, status, headers)


def response_for(error: Exception) -> JSONResponse:
    """The response for an exception. Only pidecode's own errors show their message to the client."""
    if is_out_of_memory(error):
        return error_response(507, "does_not_fit", OUT_OF_MEMORY)
    if isinstance(error, BusyError):
        return error_response(503 if error.stopping else 429, "busy", str(error), retry_after=error.retry_after)
    for kind, status, code in _STATUSES:
        if isinstance(error, kind):
            message = error.message("http")
            return error_response(status, code, message, retry_after=RETRY_SECONDS if status == 503 else None)
    if isinstance(error, PidecodeError):
        return error_response(500, "failed", error.message("http"))
    return error_response(500, "internal", "Internal error of pidecode or its dependencies; see the server's log.")


def validation_message(errors: Sequence[Any], skip: int = 0, model: type[BaseModel] | None = None) -> str:
    """Pydantic's errors as sentences; `skip` leaves out first parts of their places, `model` describes its fields."""
    found = []
    for error in errors[:8]:
        place = error["loc"][skip:]
        field = model.model_fields.get(str(place[0])) if model is not None and place else None
        about = f" ({field.description.rstrip('.')})" if field is not None and field.description else ""
        found.append(f"{'.'.join(map(str, place)) or 'body'}: {error['msg']}{about}")
    return "; ".join(found) + "."


def add_error_handlers(app: FastAPI) -> None:
    """Let `app` answer every error in one form."""

    async def exception(_request: Request, error: Exception) -> JSONResponse:
        return response_for(error)

    async def http_exception(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        detail = str(error.detail)
        if detail == HTTPStatus.NOT_FOUND.phrase:  # of a path, by Starlette
            detail = f"There is no {request.url.path[:80]} here; /openapi.json lists the paths."
        response = error_response(error.status_code, f"http_{error.status_code}", detail)
        response.headers.update(error.headers or {})
        return response

    async def validation_error(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return error_response(422, "invalid", validation_message(error.errors(), skip=1))

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


def check_origin(origin: str) -> str:
    """The origin. Raises SettingError if it is no scheme and host, such as "https://example.org"."""
    parts = urlsplit(origin)
    if parts.scheme not in ("http", "https") or not parts.hostname or f"{parts.scheme}://{parts.netloc}" != origin:
        raise SettingError(f"The origin is {origin[:80]!r}; it must be scheme and host, such as https://example.org.")
    return origin


def check_token(host: str, token: str | None) -> None:
    """Raise SettingError if other machines can reach `host` and there is no token, or if it could be guessed."""
    if token is not None and (
        len(token) < MIN_TOKEN_LENGTH or not token.isascii() or not token.isprintable() or " " in token
    ):
        raise SettingError(
            f"The token must be at least {MIN_TOKEN_LENGTH} printable ASCII characters without spaces, so that it "
            "cannot be guessed; make one with: python -c 'import secrets; print(secrets.token_urlsafe())'"
        )
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        loopback = False
    if token is None and not loopback:
        raise SettingError(
            f"At {host} others can reach this server, so it needs a token: set PIDECODE_TOKEN, or give --token-file. "
            "Without one it binds to 127.0.0.1 only."
        )


def bound_socket(host: str, port: int) -> socket.socket:
    """A bound socket (port 0 takes any free port); SettingError if the address does not exist or is in use."""
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
            body = bytes(error_response(400, "bad_http", msg).body)
            headers = {"content-type": "application/json", "content-length": str(len(body)), "connection": "close"}
            start = h11.Response(status_code=400, headers=list(headers.items()))
            for event in (start, h11.Data(data=body), h11.EndOfMessage()):
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

    `stop` ends the jobs within the seconds given, and answers their requests.
    """

    def __init__(self, config: uvicorn.Config, stop: Callable[[float], None]) -> None:
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


def make_server(app: ASGIApp, *, stop: Callable[[float], None], grace: int = 2 * SHUTDOWN_SECONDS) -> StoppableServer:
    """Create the uvicorn server for `app`, which logs no requests; `grace` is given to open requests on shutdown."""
    config = uvicorn.Config(
        app, access_log=False, server_header=False, log_level="warning", ws="none", lifespan="on",
        timeout_keep_alive=5, timeout_graceful_shutdown=grace, h11_max_incomplete_event_size=16384,
        http=BoundedProtocol, proxy_headers=False,
    )  # fmt: skip
    return StoppableServer(config, stop)


def serve(
    app: ASGIApp, listener: socket.socket, *, stop: Callable[[float], None], ready: Callable[[str], None]
) -> None:
    """Serve on a socket from `bound_socket` until SIGINT or SIGTERM; `ready` is called with the URL before that."""
    server = make_server(app, stop=stop)
    listener.listen(128)  # from here on connections wait instead of being refused
    ready(address_of(listener))
    with listener:
        server.run(sockets=[listener])
