# SPDX-License-Identifier: Apache-2.0
"""`pidecode serve` and `pidecode web`: start the HTTP server; `web` also opens its page in the browser."""

from __future__ import annotations

import os
import threading
import webbrowser
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pidecode.cli.common import (
    PATH,
    GroupedCommand,
    combined,
    complete_models,
    device_option,
    dtype_option,
    echo,
    pipeline_device,
    runtime_options,
    set_threads,
    space_option,
    threads_option,
    torch_dtype,
    variant_option,
)
from pidecode.errors import MissingDependencyError, SettingError
from pidecode.registry.spaces import IMAGE_MODELS
from pidecode.units import read_text

if TYPE_CHECKING:
    from pidecode.decoder import PixelDecoder
    from pidecode.integrations.text_to_image import PipelineTextToLatent
    from pidecode.options import Attention

PORT = 8420
TOKEN_VARIABLE = "PIDECODE_TOKEN"
MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """The options of both commands."""

    model: tuple[str, ...]
    space: str | None
    variant: str | None
    device: str | None
    dtype: str | None
    compile: bool
    attention: Attention
    host: str
    port: int
    token_file: Path | None
    allowed_host: tuple[str, ...]
    cors: tuple[str, ...]
    max_pixels: int
    max_body: int
    queue: int
    timeout: float
    pipeline: str | None
    pipeline_source: str | None
    threads: int | None

    def token(self) -> str | None:
        """The token from the file or the environment variable, if any."""
        if self.token_file is None:
            return os.environ.get(TOKEN_VARIABLE, "").strip("\ufeff\r\n\t ") or None  # as $(cat FILE) gives it
        return read_text(self.token_file).strip()

    def decoders(self) -> dict[str, PixelDecoder]:
        """Load every model, by the name that clients use."""
        from pidecode.decoder import PixelDecoder
        from pidecode.options import RuntimeOptions

        decoders: dict[str, PixelDecoder] = {}
        for source in self.model:
            decoder = PixelDecoder.from_pretrained(
                source, space=self.space, variant=self.variant, device=self.device, dtype=torch_dtype(self.dtype),
                runtime=RuntimeOptions(compile=self.compile, attention=self.attention),
            )  # fmt: skip
            name = Path(source).stem if Path(source).suffix else source
            if name in decoders:
                raise SettingError(f"Two models would be called {name!r}; rename one of the files.")
            decoders[name] = decoder
        return decoders

    def text_to_latent(self) -> PipelineTextToLatent | None:
        """Load the text-to-image pipeline, if one is named."""
        if self.pipeline is None:
            if self.pipeline_source is not None:
                raise SettingError("--pipeline-source says where a pipeline is; name the pipeline with --pipeline.")
            return None
        from pidecode.integrations.text_to_image import PipelineTextToLatent

        device, dtype = pipeline_device(self.device, self.dtype)
        return PipelineTextToLatent.from_pretrained(self.pipeline, self.pipeline_source, device=device, dtype=dtype)


# The options that `ServeOptions` holds.
serve_options = combined(
    click.option("-m", "--model", multiple=True, default=("tiny",), show_default=True, shell_complete=complete_models,
                 help="A model's name, file or folder. Give it again for more; the first is the default."),
    space_option, variant_option, device_option, dtype_option,
    click.option("--host", default="127.0.0.1", show_default=True, help="Address; others need a token."),
    click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: any free."),
    click.option("--token-file", type=PATH,
                 help=f"File with the token that clients must show; or set {TOKEN_VARIABLE}."),
    click.option("--allowed-host", multiple=True, metavar="NAME",
                 help="Name besides localhost that a server without a token answers to, as behind a proxy. "
                 "Repeatable."),
    click.option("--cors", multiple=True, metavar="ORIGIN",
                 help="Web site whose scripts may use the server, such as https://example.org. Repeatable."),
    click.option("--max-pixels", type=click.IntRange(min=4096), default=4096 * 4096, show_default=True,
                 help="Most pixels of a result."),
    click.option("--pipeline", type=click.Choice(list(IMAGE_MODELS)), metavar="NAME",
                 help=f"Text-to-image pipeline that makes latents from prompts: {', '.join(IMAGE_MODELS)}."),
    click.option("--pipeline-source", metavar="PATH", help="Folder or hub repository of the pipeline."),
    click.option("--max-body", type=click.IntRange(1), default=64, show_default=True, help="MiB per request."),
    runtime_options, threads_option,
    click.option("--queue", type=click.IntRange(0), default=8, show_default=True, help="Jobs that may wait."),
    click.option("--timeout", type=click.FloatRange(min=1), default=600, show_default=True,
                 help="Seconds a job may take, waiting included."),
)  # fmt: skip


def _require_packages() -> None:
    missing = [package for package in ("fastapi", "uvicorn", "python_multipart") if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"The server needs {' and '.join(missing)}: install them with `pip install 'pidecode[serve]'`."
        )


def _run(options: ServeOptions, ready: Callable[[str], None]) -> None:
    """Load the models and serve until a signal; `ready` is called with the URL."""
    from pidecode.serve.app import create_app
    from pidecode.serve.http import bound_socket, check_origin, check_token, serve
    from pidecode.serve.schemas import RequestLimits
    from pidecode.serve.service import DecodeService

    token = options.token()
    check_token(options.host, token)
    origins = [check_origin(origin) for origin in options.cors]
    set_threads(options.threads)
    listener = bound_socket(options.host, options.port)  # first: a port in use should not cost loading the models
    with listener:
        limits = RequestLimits(
            body_bytes=options.max_body * MEBIBYTE, pixels=options.max_pixels, waiting=options.queue,
            job_seconds=options.timeout,
        )  # fmt: skip
        service = DecodeService(options.decoders(), limits=limits, text_to_latent=options.text_to_latent())
        service.warm_up()
        app = create_app(service, token=token, hosts=options.allowed_host, origins=origins)
        serve(app, listener, stop=service.stop, ready=ready)


@click.command(cls=GroupedCommand)
@serve_options
def serve(**options: Any) -> None:
    """Serve decoding over HTTP to other programs.

    The page is at /, the API at /v1, its OpenAPI document at /openapi.json. Ctrl-C stops the server
    once the running job has ended.
    """
    _require_packages()
    _run(ServeOptions(**options), lambda url: echo(f"Serving on {url} (API: {url}/openapi.json). Ctrl-C stops."))


@click.command(cls=GroupedCommand)
@serve_options
@click.option("--browser/--no-browser", default=True, show_default=True, help="Open the page in the browser.")
def web(browser: bool, **options: Any) -> None:
    """Start the server and open its page in the browser.

    Nothing is sent to other hosts. Ctrl-C stops the server.
    """
    _require_packages()
    given = ServeOptions(**options)

    def ready(url: str) -> None:
        token = given.token()
        address = f"{url}/?token={token}" if token else f"{url}/"
        echo(f"The page is at {address} Ctrl-C stops.")
        if browser:
            threading.Timer(0.5, webbrowser.open, [address]).start()  # once the server accepts connections

    _run(given, ready)
