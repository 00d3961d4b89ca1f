# SPDX-License-Identifier: Apache-2.0
"""What clients can do to the server: bodies without end, slow headers, tiny pieces, hang-ups, signals."""

from __future__ import annotations

import gc
import http.client
import io
import json
import logging
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from serving_kit import LIMITS, PATIENCE, HttpAnswer, Served, image_bytes, latent_bytes, running, small_decoder

from pidecode.errors import BusyError, ImageError, is_out_of_memory
from pidecode.images import load_image, read_image, read_metadata
from pidecode.serve import http as serve_http
from pidecode.serve.app import create_app
from pidecode.serve.http import response_for
from pidecode.serve.service import DecodeService


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    service = DecodeService({"small": small_decoder()}, limits=LIMITS)
    with running(create_app(service), service) as served:
        yield served


def endless(piece: bytes = b"x" * 65536) -> Iterator[bytes]:
    for _ in range(10**6):
        yield piece


ROUTES = [
    "/v1/decode", "/v1/upscale", "/v1/generate", "/v1/inspect", "/v1/images/generations", "/v1/images/edits",
]  # fmt: skip


@pytest.mark.parametrize("path", ROUTES)
def test_an_endless_body_is_refused_on_every_route(server: Served, path: str) -> None:
    connection = server.connect()
    connection.putrequest("POST", path)
    connection.putheader("Transfer-Encoding", "chunked")
    connection.putheader("Content-Type", "application/json" if "generations" in path else "multipart/form-data")
    connection.endheaders()
    sent = 0
    try:
        for piece in endless():
            if sent > 3 * LIMITS.body_bytes:
                break
            connection.send(b"%x\r\n%s\r\n" % (len(piece), piece))
            sent += len(piece)
    except OSError:
        pass
    assert connection.getresponse().status == 413
    assert server.service.queue.waiting == 0
    connection.close()


@pytest.mark.parametrize("path", ["/v1/upscale", "/v1/images/generations"])
def test_a_dribbling_body_is_ended_and_blocks_nobody(server: Served, path: str) -> None:
    dribbling = [server.connect() for _ in range(6)]  # more than the queue has places
    for connection in dribbling:
        connection.putrequest("POST", path)
        connection.putheader("Content-Length", "1000")
        connection.endheaders(b"only this")
    assert server.post("/v1/upscale?num_steps=1", image_bytes(16, 16)).status == 200
    for connection in dribbling:
        response = connection.getresponse()
        assert response.status == 408
        assert "took too long to arrive: 9 bytes" in json.loads(response.read())["error"]["message"]
        connection.close()


def test_the_slowest_of_many_arriving_bodies_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_http, "MAX_READERS", 2)
    monkeypatch.setattr(serve_http, "RATE_GRACE_SECONDS", PATIENCE)
    service = DecodeService({"small": small_decoder()}, limits=replace(LIMITS, body_seconds=PATIENCE))
    with running(create_app(service), service) as served:
        faster, slower = served.connect(), served.connect()
        for connection, part in ((faster, b"x" * 5000), (slower, b"x")):
            connection.putrequest("POST", "/v1/upscale")
            connection.putheader("Content-Length", "10000")
            connection.endheaders(part)
        while (answer := served.post("/v1/upscale?num_steps=1", image_bytes(16, 16))).status == 429:
            time.sleep(0.1)  # both came within the last second
        assert answer.status == 200
        assert slower.getresponse().status == 408
        faster.send(b"x" * 5000)
        assert faster.getresponse().status == 400  # whole, and no image
        faster.close()
        slower.close()


def test_a_body_must_come_at_a_rate(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_http, "RATE_GRACE_SECONDS", 0.2)
    connection = server.connect()
    connection.putrequest("POST", "/v1/decode")
    connection.putheader("Content-Length", "100000")
    connection.endheaders(b"a")
    began = time.monotonic()
    assert connection.getresponse().status == 408
    assert time.monotonic() - began < LIMITS.body_seconds
    connection.close()


def test_unfinished_bodies_share_a_bounded_memory(server: Served) -> None:
    part = b"x" * (LIMITS.body_bytes - 1000)
    holding = []
    statuses = []
    for _ in range(serve_http.BODIES_HELD + 1):
        connection = server.connect()
        connection.putrequest("POST", "/v1/decode")
        connection.putheader("Content-Length", str(LIMITS.body_bytes))
        connection.endheaders(part)
        holding.append(connection)
    for connection in holding:
        response = connection.getresponse()
        statuses.append(response.status)
        connection.close()
    assert set(statuses) == {408, 429}


def test_slow_headers_take_nobodys_place(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_http, "HEADER_SECONDS", 1.0)
    monkeypatch.setattr(serve_http, "MAX_CONNECTIONS", 30)
    slow = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for connection in slow:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
    assert server.get("/health").status == 200
    assert server.post("/v1/upscale?num_steps=1", image_bytes(16, 16)).status == 200
    for connection in slow:
        connection.settimeout(PATIENCE)
        try:
            while connection.recv(100):
                pass
        except ConnectionResetError:
            pass
        connection.close()


LARGE = 4_000_000  # more than the buffers of sockets hold here


@pytest.fixture
def slow_readers(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Served, Callable[[], socket.socket]]]:
    """A server with a large response at /large, and a function that connects, asks for it and reads nothing."""
    from fastapi import Response  # not above: the lowest versions warn unless serving_kit comes first

    monkeypatch.setattr(serve_http, "HEADER_SECONDS", 0.3)
    monkeypatch.setattr(serve_http, "READ_SECONDS", 0.8)
    service = DecodeService({"small": small_decoder()}, limits=LIMITS)
    app = create_app(service)
    app.add_api_route("/large", lambda: Response(bytes(LARGE)))
    opened = []
    with running(app, service) as served:

        def ask() -> socket.socket:
            opened.append(connection := socket.socket())
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**18)
            connection.settimeout(PATIENCE)
            connection.connect(("127.0.0.1", served.port))
            connection.sendall(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return connection

        yield served, ask
        for connection in opened:
            connection.close()


def _until_it_comes(connection: socket.socket) -> socket.socket:
    while len(connection.recv(2**17, socket.MSG_PEEK)) < 2**17:
        time.sleep(0.005)
    return connection


def read_all(connection: socket.socket, pause: float = 0.0) -> int:
    """Read until the server closes the connection, a piece at a time; the number of bytes."""
    total = 0
    try:
        while part := connection.recv(2**18, socket.MSG_WAITALL):
            total += len(part)
            time.sleep(pause)
    except ConnectionResetError:
        pass
    return total


def test_who_reads_slowly_gets_all_and_who_reads_nothing_is_given_up(
    slow_readers: tuple[Served, Callable[[], socket.socket]],
) -> None:
    served, ask = slow_readers
    idle, steady = [ask() for _ in range(5)], ask()
    began = time.monotonic()
    assert read_all(steady, pause=0.1) > LARGE  # with headers
    assert time.monotonic() - began > 1.5 * serve_http.READ_SECONDS
    assert all(read_all(connection) < LARGE for connection in idle)
    assert served.get("/health").status == 200


def test_what_is_not_read_shares_a_bounded_memory(
    slow_readers: tuple[Served, Callable[[], socket.socket]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, ask = slow_readers
    monkeypatch.setattr(serve_http, "READ_SECONDS", PATIENCE)
    monkeypatch.setattr(serve_http, "MAX_UNSENT", 2 * LARGE)
    oldest, *others = [_until_it_comes(ask()) for _ in range(3)]
    assert read_all(oldest) < LARGE
    for connection in others:
        connection.shutdown(socket.SHUT_WR)
        assert read_all(connection) > LARGE


def test_too_many_requests_at_once_are_told_when_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    service = DecodeService({"small": small_decoder()}, limits=LIMITS)
    app = create_app(service, token="correct-horse-battery")
    for entry in app.user_middleware:
        if "most_active" in entry.kwargs:
            entry.kwargs["most_active"] = 0
    with running(app, service) as served:
        assert served.get("/v1/models").status == 401  # the token comes first
        busy = served.get("/v1/models", Authorization="Bearer correct-horse-battery")
        assert (busy.status, busy.headers["retry-after"], busy.json()["error"]["code"]) == (503, "5", "busy")


def test_a_body_of_tiny_pieces_is_refused(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(PATIENCE)
        connection.sendall(b"POST /v1/decode HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(b"1\r\nx\r\n" * (serve_http.PIECES_FREE + 200))
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert b'"code":"bad_http"' in answer


def png(*chunks: tuple[bytes, bytes]) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in chunks)


def test_an_image_of_tiny_chunks_is_refused_soon() -> None:
    head = struct.pack(">IIBBBBB", 16, 16, 8, 2, 0, 0, 0)
    many = png((b"IHDR", head), *[(b"abCd", b"")] * 100_000, (b"IEND", b""))
    began = time.process_time()
    for read in (load_image, read_metadata):
        with pytest.raises(ImageError, match="tiny pieces"):
            read(many)
    assert time.process_time() - began < 2
    buffer = io.BytesIO()
    Image.new("RGB", (500, 500)).save(buffer, "JPEG", progressive=True)
    scanned, last = buffer.getvalue()[:-2], buffer.getvalue().rindex(b"\xff\xda")
    with pytest.raises(ImageError, match="scans"):
        load_image(scanned + scanned[last:] * 20_000 + b"\xff\xd9")
    segments = b"\xff\xd8" + b"\xff\xe3\x00\x02" * 200_000
    with pytest.raises(ImageError, match="tiny pieces"):
        load_image(segments)


def test_inspection_decodes_one_image_at_a_time_and_none_too_large(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = threading.Semaphore(1)
    decoded: list[int] = []

    def decode(data: bytes, *, max_pixels: int) -> object:
        assert inside.acquire(blocking=False)
        time.sleep(0.05)
        inside.release()
        decoded.append(len(data))
        return read_image(data, max_pixels=max_pixels)

    monkeypatch.setattr("pidecode.images.read_image", decode)
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda _: server.post("/v1/inspect", image_bytes(32, 32)), range(16)))
    statuses = {answer.status for answer in answers}
    assert statuses <= {200, 429}
    refused = [answer for answer in answers if answer.status == 429]
    assert {(answer.message, answer.headers["retry-after"]) for answer in refused} <= {
        ("Too many files are being inspected. Retry later.", "1")
    }
    decoded.clear()
    assert server.post("/v1/inspect", image_bytes(250, 250)).json()["width"] == 250
    assert decoded == []  # its result would be larger than allowed


def test_what_is_too_large_is_refused_before_it_is_decompressed(
    server: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pidecode.images.read_image", lambda *_, **__: pytest.fail("it was decompressed"))
    answer = server.post("/v1/upscale", image_bytes(250, 250))
    assert (answer.status, "1000x1000" in answer.message) == (400, True)
    monkeypatch.setattr("pidecode.engine.runner.free_memory", lambda device: 1000)
    answer = server.post("/v1/upscale", image_bytes(64, 64))
    assert answer.status == 507 and "256x256 pixels needs about" in answer.message and "1.0 kB" in answer.message
    answer = server.post("/v1/decode?num_steps=1", latent_bytes())
    assert answer.status == 507 and "1.0 kB are free" in answer.message


def test_memory_that_runs_out_is_507(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**14)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("sizes do not match"))

    def fail(*_: object, **__: object) -> None:
        raise caught.value

    monkeypatch.setattr(server.service.decoder(None), "upscale", fail)
    answer = server.post("/v1/upscale", image_bytes(16, 16))
    assert (answer.status, "not enough memory" in answer.message) == (507, True)


def test_a_stopping_server_answers_503_and_when_to_come_back() -> None:
    answer = response_for(BusyError("The server is stopping.", 10.0, stopping=True))
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "10")


def test_hang_ups_log_nothing(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), server.busy():
        before = server.service.queue.stats.cancelled
        for index in range(2):
            connection = server.connect()
            connection.request("POST", "/v1/decode?num_steps=1" + "&stream=true" * index, latent_bytes())
            server.until(lambda: server.service.queue.waiting == 1)
            connection.sock.shutdown(socket.SHUT_RDWR)
            connection.close()
            server.until(lambda: server.service.queue.waiting == 0)
        server.until(lambda: server.service.queue.stats.cancelled == before + 2)
        gc.collect()
        time.sleep(0.2)
    assert caplog.records == []


@pytest.mark.slow
def test_hundreds_of_hang_ups_at_any_moment_log_nothing(server: Served, caplog: pytest.LogCaptureFixture) -> None:
    chance = random.Random(1)
    bad = [("/v1/upscale", image_bytes()[:60]), ("/v1/upscale?stream=true", image_bytes()[:60])]
    good = [("/v1/decode?num_steps=1", latent_bytes()), ("/v1/decode?num_steps=1&stream=true", latent_bytes())]
    with caplog.at_level(logging.WARNING):
        for _ in range(400):
            path, body = chance.choice(bad + good)
            connection = server.connect()
            connection.request("POST", path, body)
            time.sleep(0.02 * chance.random())
            connection.sock.close()
            connection.close()
        server.until(lambda: not server.service.queue.running)
        time.sleep(0.5)
        gc.collect()
    assert [record.getMessage() for record in caplog.records] == []


SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from serving_kit import small_decoder
from pidecode.serve.app import create_app
from pidecode.serve.http import bound_socket, serve
from pidecode.serve.schemas import RequestLimits
from pidecode.serve.service import DecodeService
service = DecodeService({{"small": small_decoder()}}, limits=RequestLimits(waiting=4))
{before}
serve(create_app(service), bound_socket("127.0.0.1", 0), stop=service.stop, ready=lambda url: print(url, flush=True))
"""
ENDLESS_JOB = """
def work(job):
    while True:
        job.check()
        time.sleep(0.01)
service.queue.submit(work)
"""


def started(before: str = "") -> tuple[subprocess.Popen[str], int]:
    script = SCRIPT.format(tests=os.path.dirname(__file__), before=before)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return process, int(process.stdout.readline().rsplit(":", 1)[1])


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_ten_times_its_queue_for_a_minute_leaves_memory_flat() -> None:
    process, port = started()
    served = Served(port, None)  # type: ignore[arg-type]
    end = time.monotonic() + 60
    bodies = [
        ("/v1/upscale?num_steps=1", image_bytes(64, 48)), ("/v1/decode?num_steps=1", latent_bytes(4, 4)),
        ("/v1/upscale?num_steps=1&format=jpeg", image_bytes(32, 90)),
    ]  # fmt: skip
    statuses: dict[int, int] = {}
    without_advice: list[int] = []
    lock = threading.Lock()

    def ask(client: int) -> None:
        turn = client
        while time.monotonic() < end:
            path, body = bodies[turn % len(bodies)]
            turn += 1
            answer = served.post(path, body)
            with lock:
                statuses[answer.status] = statuses.get(answer.status, 0) + 1
                if answer.status != 200 and "retry-after" not in answer.headers:
                    without_advice.append(answer.status)
            if answer.status != 200:
                time.sleep(0.2)  # less patient than it is told to be

    def resident() -> int:
        return int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])

    sizes = []
    try:
        with ThreadPoolExecutor(50) as pool:
            for client in range(50):
                pool.submit(ask, client)
            while time.monotonic() < end:
                time.sleep(1)
                sizes.append(resident())
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=PATIENCE)
    steady = sizes[len(sizes) // 4 :]
    print(statuses, f"memory {max(steady) / steady[0]:.3f} times that after {len(sizes) // 4} s")
    assert statuses.keys() <= {200, 429, 503}
    assert without_advice == []
    assert min(statuses[200], statuses[429]) > 50
    assert max(steady) <= 1.05 * steady[0]
    assert "Traceback" not in errors


def test_a_second_signal_ends_the_running_job_with_503() -> None:
    process, port = started(ENDLESS_JOB)
    answers: list[HttpAnswer] = []

    def ask() -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
        connection.request("POST", "/v1/upscale", image_bytes(16, 16))
        response = connection.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        answers.append(HttpAnswer(response.status, found, response.read()))
        connection.close()

    client = threading.Thread(target=ask)
    client.start()
    time.sleep(1.0)
    process.send_signal(signal.SIGINT)  # the waiting job is answered, the running one goes on
    client.join(PATIENCE)
    assert (answers[0].status, "not started" in answers[0].message) == (503, True)
    assert answers[0].headers["retry-after"] == "5"
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=PATIENCE)
    assert "ERROR" not in errors
    assert "CancelledError:" not in errors  # a KeyboardInterrupt is there, which the command line makes an exit code


def test_invalid_http_is_refused_in_the_form_of_all_errors(server: Served) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(PATIENCE)
        connection.sendall(b"NONSENSE\r\n\r\n")
        answer = b"".join(iter(lambda: connection.recv(1000), b""))
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "bad_http"
