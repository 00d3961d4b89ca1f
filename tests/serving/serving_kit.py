# SPDX-License-Identifier: Apache-2.0
"""A small random decoder, and real servers on loopback."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

import safetensors.torch
import torch
from PIL import Image
from torch import Tensor

from pidecode import PixelDecoder
from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import debug_config
from pidecode.serve.http import StoppableServer, bound_socket
from pidecode.serve.queue import DecodeJob
from pidecode.serve.schemas import RequestLimits
from pidecode.serve.service import DecodeService
from pidecode.weights.metadata import CheckpointMetadata

FLUX2 = debug_config(text_dim=0, latent_channels=128, latent_down=16, latent_unpatchify=2, prediction="x0")
PATIENCE = 60.0


def block_means(images: Tensor) -> Tensor:
    """An encoder of FLUX.2's sizes: means of 16-pixel blocks, repeated over the channels."""
    return torch.nn.functional.avg_pool2d(images, 16).repeat(1, 43, 1, 1)[:, :128]


def small_decoder(name: str = "small") -> PixelDecoder:
    generator = torch.Generator().manual_seed(0)
    net = PiDNet(FLUX2).requires_grad_(False).eval()
    for parameter in net.parameters():
        parameter.normal_(std=0.2, generator=generator) if parameter.ndim else parameter.fill_(1.0)
    identity = CheckpointMetadata(kind="student", config=FLUX2, space="flux2", license="Apache-2.0")
    return PixelDecoder(net, identity, name=name, encoder=block_means)


def image_bytes(width: int = 32, height: int = 32, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image = Image.new("L", (width, height)) if width > 1000 else Image.radial_gradient("L").resize((width, height))
    image.convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def latent_bytes(rows: int = 1, columns: int = 1, channels: int = 128, *, batch: int = 1, **note: Any) -> bytes:
    tensor = torch.randn(batch, channels, rows, columns, generator=torch.Generator().manual_seed(1))
    record = {"format": 1, "space": "flux2", "frame": "normalized", "sigma": [0.0] * batch, "prompt": None, "seed": 7}
    return safetensors.torch.save({"latent": tensor}, {"pidecode_latent": json.dumps(record | note)})


@dataclass(frozen=True)
class HttpAnswer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return str(self.json()["error"]["message"])


@dataclass(frozen=True)
class Served:
    """A server that runs in a thread of this process."""

    port: int
    service: DecodeService

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def ask(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> HttpAnswer:
        connection = self.connect()
        try:
            connection.request(method, path, body, dict(headers or {}), encode_chunked=not isinstance(body, bytes))
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            return HttpAnswer(response.status, found, response.read())
        finally:
            connection.close()

    def get(self, path: str, **headers: str) -> HttpAnswer:
        return self.ask("GET", path, None, headers)

    def post(self, path: str, body: Any, **headers: str) -> HttpAnswer:
        if isinstance(body, dict):
            body, headers = json.dumps(body), {"Content-Type": "application/json", **headers}
        return self.ask("POST", path, body, headers)

    def until(self, holds: Callable[[], bool]) -> None:
        """Wait until the condition holds."""
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, "the condition never became true"
            time.sleep(0.005)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Keep the queue busy with a job that does not end by itself."""
        go = threading.Event()

        def work(job: DecodeJob) -> None:
            while not go.wait(0.005):
                job.check()

        job = self.service.queue.submit(work)
        self.until(lambda: job.state == "running")
        yield
        go.set()
        assert job.wait(PATIENCE)


@contextmanager
def running(app: Any, service: DecodeService, *, grace: int = 3) -> Iterator[Served]:
    """Serve `app` on a free port of this machine for as long as the block lasts."""
    listener = bound_socket("127.0.0.1", 0)
    server = StoppableServer(app, stop=service.stop, grace=grace)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        end = time.monotonic() + PATIENCE
        while not server.started:
            assert time.monotonic() < end, "the server did not start"
            assert thread.is_alive(), "the server ended at once"
            time.sleep(0.005)
        yield Served(listener.getsockname()[1], service)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        listener.close()
        assert not thread.is_alive()


LIMITS = RequestLimits(body_bytes=200_000, pixels=256 * 256, waiting=2, job_seconds=2 * PATIENCE, body_seconds=1.5)
"""Small, so that every limit can be reached."""

NGINX = next(filter(None, map(shutil.which, ("nginx", "/usr/sbin/nginx"))), None)
NGINX_CONFIGURATION = """
daemon off;
worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off;
  client_body_buffer_size 1m;  # its worker may not write here
  client_body_temp_path {folder}; proxy_temp_path {folder}; fastcgi_temp_path {folder};
  uwsgi_temp_path {folder}; scgi_temp_path {folder};
  server {{
    listen 127.0.0.1:{port};
{location}
  }}
}}
"""


class Proxy:
    """nginx in front of a server, with the `location` block that docs/server.md tells users to write."""

    def __init__(self, served: Served, folder: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        text = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
        location = text.partition("```nginx\n")[2].partition("```")[0]
        location = location.replace("127.0.0.1:8420", f"127.0.0.1:{served.port}")
        configuration = NGINX_CONFIGURATION.format(folder=folder, port=self.port, location=location)
        (folder / "nginx.conf").write_text(configuration)

    def start(self) -> None:
        assert NGINX is not None
        self.process = subprocess.Popen([NGINX, "-p", str(self.folder), "-c", str(self.folder / "nginx.conf")])
        end = time.monotonic() + PATIENCE
        while True:
            assert self.process.poll() is None, (self.folder / "error.log").read_text()
            assert time.monotonic() < end
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", self.port)):
                    return
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)

    def __enter__(self) -> Proxy:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
