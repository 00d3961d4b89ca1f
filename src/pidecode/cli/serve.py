# SPDX-License-Identifier: Apache-2.0
"""`pidecode serve` and `pidecode web`: start the HTTP server; `web` also opens its page in the browser."""

from __future__ import annotations

import os
import threading
import webbrowser
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pidecode.cli import common
from pidecode.errors import MissingDependencyError, SettingError
from pidecode.registry.spaces import IMAGE_MODELS
from pidecode.units import read_text

if TYPE_CHECKING:
    from pidecode.decoder import PixelDecoder
    from pidecode.serve.service import TextToLatent

PORT = 8420
TOKEN_VARIABLE = "PIDECODE_TOKEN"
MEBIBYTE = 2**20


def read_token(file: Path | None) -> str | None:
    """The token from a file or the environment variable, if any."""
    if file is None:
        return os.environ.get(TOKEN_VARIABLE, "").strip("\ufeff\r\n\t ") or None  # as $(cat FILE) gives it
    return read_text(file).strip()


def _load_decoders(options: dict[str, Any]) -> dict[str, PixelDecoder]:
    """Load every model, by the name that clients use."""
    decoders: dict[str, PixelDecoder] = {}
    for source in options["model"]:
        decoder = common.load_decoder(source, options)
        name = Path(source).stem if Path(source).suffix else source
        if name in decoders:
            raise SettingError(f"Two models would be called {name!r}; rename one of the files.")
        decoders[name] = decoder
    return decoders


def _load_pipeline(options: dict[str, Any]) -> TextToLatent | None:
    """Load the text-to-image pipeline, if one is named."""
    name, source = options["pipeline"], options["pipeline_source"]
    if name is None:
        if source is not None:
            raise SettingError("--pipeline-source says where a pipeline is; name the pipeline with --pipeline.")
        return None
    from pidecode.integrations.text_to_image import load_pipeline, text_to_latent

    device, dtype = common.pipeline_device(options["device"], options["dtype"])
    return text_to_latent(name, load_pipeline(name, source, device, dtype))


serve_options = common.combined(
    click.option("-m", "--model", multiple=True, default=("tiny",), show_default=True,
                 shell_complete=common.complete_models,
                 help="A model's name, file or folder. Give it again for more; the first is the default."),
    common.space_option, common.variant_option, common.device_option, common.dtype_option,
    click.option("--host", default="127.0.0.1", show_default=True, help="Address; others need a token."),
    click.option("--port", type=click.IntRange(0, 65535), default=PORT, show_default=True, help="0: any free."),
    click.option("--token-file", type=common.PATH,
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
    common.runtime_options, common.threads_option,
    click.option("--queue", type=click.IntRange(0), default=8, show_default=True, help="Jobs that may wait."),
    click.option("--timeout", type=click.FloatRange(1, 10**6), default=600, show_default=True,
                 help="Seconds a job may take, waiting included."),
)  # fmt: skip


def _run(options: dict[str, Any], ready: Callable[[str, str | None], None]) -> None:
    """Load the models and serve until a signal; `ready` is called with the URL and the token."""
    missing = [package for package in ("fastapi", "uvicorn", "python_multipart") if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"The server needs {' and '.join(missing)}: install them with `pip install 'pidecode[serve]'`."
        )
    from pidecode.serve.app import create_app
    from pidecode.serve.http import bound_socket, check_origin, check_token, serve
    from pidecode.serve.schemas import RequestLimits
    from pidecode.serve.service import DecodeService

    token = read_token(options["token_file"])
    check_token(options["host"], token)
    origins = [check_origin(origin) for origin in options["cors"]]
    common.set_threads(options["threads"])
    # The socket first: a port in use should not cost loading the models.
    with bound_socket(options["host"], options["port"]) as listener:
        limits = RequestLimits(
            body_bytes=options["max_body"] * MEBIBYTE, pixels=options["max_pixels"], waiting=options["queue"],
            job_seconds=options["timeout"],
        )  # fmt: skip
        service = DecodeService(_load_decoders(options), limits=limits, text_to_latent=_load_pipeline(options))
        service.warm_up()
        app = create_app(service, token=token, hosts=options["allowed_host"], origins=origins)
        serve(app, listener, stop=service.stop, ready=lambda url: ready(url, token))


@click.command(cls=common.GroupedCommand)
@serve_options
def serve(**options: Any) -> None:
    """Serve decoding over HTTP to other programs.

    The page is at /, the API at /v1, its OpenAPI document at /openapi.json. Ctrl-C stops the server
    once the running job has ended.
    """
    _run(options, lambda url, _: common.echo(f"Serving on {url} (API: {url}/openapi.json). Ctrl-C stops."))


@click.command(cls=common.GroupedCommand)
@serve_options
@click.option("--browser/--no-browser", default=True, show_default=True, help="Open the page in the browser.")
def web(browser: bool, **options: Any) -> None:
    """Start the server and open its page in the browser.

    Nothing is sent to other hosts. Ctrl-C stops the server.
    """

    def ready(url: str, token: str | None) -> None:
        address = f"{url}/?token={token}" if token else f"{url}/"
        common.echo(f"The page is at {address} Ctrl-C stops.")
        if browser:
            threading.Timer(0.5, webbrowser.open, [address]).start()  # once the server accepts connections

    _run(options, ready)
