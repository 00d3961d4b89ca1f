# SPDX-License-Identifier: Apache-2.0
"""Running an application on an address: who may reach it, and a stop that lets running work end."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable
from typing import Any

from pidecode.errors import SettingError

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
