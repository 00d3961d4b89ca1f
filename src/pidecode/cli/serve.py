# SPDX-License-Identifier: Apache-2.0
"""`pidecode web` and `pidecode serve`: the page and the HTTP interface, on this machine unless told otherwise."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pidecode.cli.common import space_option, threads_option
from pidecode.errors import FileError, MissingDependencyError, SettingError
from pidecode.registry.spaces import GENERATION

if TYPE_CHECKING:
    from pidecode.decoder import PixelDecoder
    from pidecode.integrations.text_to_image import PipelineTextToLatent
    from pidecode.serve.service import DecodeService

SERVER_PORT = 8421
PAGE_PORT = 8420
TOKEN_VARIABLE = "PIDECODE_TOKEN"
MEBIBYTE = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What both commands take."""

    model: tuple[str, ...]
    space: str | None
    variant: str | None
    device: str | None
    dtype: str | None
    compile: bool
    host: str
    port: int
    token_file: Path | None
    max_pixels: int
    max_body: int
    queue: int
    timeout: float
    pipeline: str | None
    pipeline_source: str | None

    def token(self) -> str | None:
        """The token from the file or the environment, None if there is none. Raises FileError."""
        if self.token_file is None:
            return os.environ.get(TOKEN_VARIABLE) or None
        try:
            return self.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise FileError(f"The token cannot be read from {self.token_file}: {error}.") from error

    def decoders(self) -> dict[str, PixelDecoder]:
        """Every model asked for, loaded, by the name clients use."""
        import torch

        from pidecode.decoder import PixelDecoder

        found: dict[str, PixelDecoder] = {}
        for wanted in self.model:
            decoder = PixelDecoder.from_pretrained(
                wanted,
                space=self.space,
                variant=self.variant,
                device=self.device,
                dtype=getattr(torch, self.dtype) if self.dtype else None,
                compile=self.compile,
            )
            name = Path(wanted).stem if Path(wanted).suffix else wanted
            if name in found:
                raise SettingError(f"Two models would be called {name!r}; rename one of the files.")
            found[name] = decoder
        return found

    def painter(self) -> PipelineTextToLatent | None:
        """The image model that paints from prompts, loaded; None where none is asked for."""
        if self.pipeline is None:
            if self.pipeline_source is not None:
                raise SettingError("--pipeline-source says where a pipeline lies; name it with --pipeline.")
            return None
        import torch

        from pidecode.devices import pick_device
        from pidecode.integrations.text_to_image import PipelineTextToLatent

        device = pick_device(self.device)
        kind = self.dtype or ("float32" if device.type == "cpu" else "bfloat16")
        return PipelineTextToLatent.from_pretrained(
            self.pipeline, self.pipeline_source, device=device, dtype=getattr(torch, kind)
        )


def _options(port: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add the options that `Wish` holds."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        options = [
            click.option(
                "-m", "--model", multiple=True, default=("tiny",), show_default=True,
                help="A model's name, file or folder. Give it again for more; the first is the default.",
            ),
            space_option,
            click.option("--variant", metavar="NAME", help="Variant of a model that has several: 2k, 2kto4k, ..."),
            click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; chosen for you if not given."),
            click.option("--dtype", type=click.Choice(["float32", "bfloat16", "float16"]), help="Number format."),
            click.option("--host", default="127.0.0.1", show_default=True, help="Address; others need a token."),
            click.option("--port", type=click.IntRange(0, 65535), default=port, show_default=True, help="0: any free."),
            click.option(
                "--token-file", type=click.Path(path_type=Path),
                help=f"File with the token that clients must show; or set {TOKEN_VARIABLE}.",
            ),
            click.option(
                "--max-pixels", type=click.IntRange(min=4096), default=4096 * 4096, show_default=True,
                help="Most pixels of a result.",
            ),
            click.option(
                "--pipeline", type=click.Choice(list(GENERATION)), metavar="NAME",
                help=f"Image model that paints from prompts: {', '.join(GENERATION)}.",
            ),
            click.option("--pipeline-source", metavar="PATH", help="Its folder or hub repository, if not its own."),
            click.option("--max-body", type=click.IntRange(1), default=64, show_default=True, help="MiB per upload."),
            click.option("--compile", is_flag=True, help="Compile sums with the first image, for those after it."),
            threads_option,
            click.option("--queue", type=click.IntRange(0), default=8, show_default=True, help="Jobs that may wait."),
            click.option(
                "--timeout", type=click.FloatRange(min=1), default=600, show_default=True,
                help="Seconds a job may take, waiting included.",
            ),
        ]  # fmt: skip
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _desk(wish: Wish) -> DecodeService:
    """The models behind one queue."""
    from pidecode.serve.schemas import Limits
    from pidecode.serve.service import DecodeService

    limits = Limits(
        body_bytes=wish.max_body * MEBIBYTE, pixels=wish.max_pixels, waiting=wish.queue, seconds=wish.timeout
    )
    return DecodeService(wish.decoders(), limits=limits, painter=wish.painter())


def _require(packages: Sequence[str], extra: str) -> None:
    from importlib.util import find_spec

    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise MissingDependencyError(
            f"This needs {' and '.join(missing)}, which are not installed: pip install 'pidecode[{extra}]'."
        )


def _run(wish: Wish, create: Callable[[DecodeService, str | None], Any], say: Callable[[str], str]) -> None:
    from pidecode.serve.http import bound_socket, check_token, serve

    token = wish.token()
    check_token(wish.host, token)
    listener = bound_socket(wish.host, wish.port)  # before the models are loaded: a taken port should not cost that
    with listener:
        app = create(_desk(wish), token)
        serve(app, listener, connections=4 * (wish.queue + 8), ready=lambda url: click.echo(say(url)))


@click.command()
@_options(SERVER_PORT)
def serve(**options: Any) -> None:
    """Offer decoding over HTTP, for scripts and other programs.

    The description of the interface is at /docs. Ctrl-C stops it once what runs is done.
    """
    _require(["fastapi", "uvicorn", "python_multipart"], "serve")

    def create(desk: DecodeService, token: str | None) -> Any:
        from pidecode.serve.app import create_app

        return create_app(desk, token=token)

    _run(Wish(**options), create, lambda url: f"Serving on {url} (description: {url}/docs). Ctrl-C stops it.")


@click.command()
@_options(PAGE_PORT)
@click.option("--browser/--no-browser", default=True, show_default=True, help="Open the page.")
def web(browser: bool, **options: Any) -> None:
    """Open a page for decoding by hand, on this machine alone.

    Nothing is sent anywhere else, and nothing is kept when the page is closed. Ctrl-C stops it.
    """
    _require(["fastapi", "uvicorn"], "web")
    wish = Wish(**options)

    def create(desk: DecodeService, token: str | None) -> Any:
        from pidecode.serve.page import create_app

        return create_app(desk, token=token)

    def say(url: str) -> str:
        address = f"{url}/?token={wish.token()}" if wish.token() else f"{url}/"
        if browser:
            import threading
            import webbrowser

            # A moment later, when the server answers.
            threading.Timer(0.5, webbrowser.open, [address]).start()
        return f"The page is at {address} Ctrl-C stops it."

    _run(wish, create, say)
