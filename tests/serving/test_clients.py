# SPDX-License-Identifier: Apache-2.0
"""The server as real clients see it: OpenAI's Python client, curl, a reverse proxy, another web site's scripts."""

from __future__ import annotations

import base64
import io
import json
import shutil
import socket
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from serving_kit import LIMITS, NGINX, Proxy, Served, image_bytes, latent_bytes, running, small_decoder

from pidecode import PixelDecoder
from pidecode.errors import SettingError
from pidecode.images import read_metadata
from pidecode.serve.app import create_app
from pidecode.serve.http import check_origin
from pidecode.serve.service import DecodeService

SITE = "https://example.org"
TOKEN = "correct-horse-battery"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    decoders = {"small": small_decoder(), "tiny": PixelDecoder.from_pretrained("tiny", device="cpu")}
    service = DecodeService(decoders, limits=LIMITS)
    app = create_app(service, hosts=["images.lan"], origins=[SITE])
    with running(app, service) as served:
        yield served


@pytest.fixture
def openai_client(server: Served) -> Iterator[Any]:
    openai = pytest.importorskip("openai", reason="openai is not installed: pip install openai")
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def opened(response: Any, index: int = 0) -> tuple[Image.Image, dict[str, Any]]:
    data = base64.b64decode(response.data[index].b64_json)
    return Image.open(io.BytesIO(data)), read_metadata(data) or {}


def test_openais_client_edits_as_it_does_elsewhere(openai_client: Any) -> None:
    response = openai_client.images.edit(
        model="gpt-image-1", image=("photo.png", image_bytes(24, 16), "image/png"), prompt="make it larger",
        size="auto", n=2, quality="high", background="auto", input_fidelity="high", stream=False, user="somebody",
        output_format="webp", output_compression=80, extra_body={"num_steps": 1, "seed": 3},
    )  # fmt: skip
    assert (len(response.data), response.size, response.output_format) == (2, "96x64", "webp")
    image, metadata = opened(response)
    assert (image.format, image.size, metadata["seed"], metadata.get("prompt")) == ("WEBP", (96, 64), 3, None)


def test_openais_client_chooses_a_size_and_a_model(openai_client: Any) -> None:
    assert [model.id for model in openai_client.models.list()] == ["small", "tiny"]
    assert openai_client.models.retrieve("tiny").id == "tiny"
    response = openai_client.images.edit(
        model="tiny", image=image_bytes(16, 16), prompt="a cat", size="32x32", n=2, output_format="jpeg"
    )
    image, metadata = opened(response, 1)
    assert (image.format, image.size, metadata["downsampled_from"]) == ("JPEG", (32, 32), [64, 64])


def with_alpha(mode: str = "RGBA") -> bytes:
    buffer = io.BytesIO()
    image = Image.linear_gradient("L").resize((24, 16)).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((24, 16)))
    image.convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.filterwarnings("ignore:JPEG has no transparency")
def test_openais_client_keeps_transparency_or_puts_it_on_white(openai_client: Any) -> None:
    def edit(data: bytes = with_alpha(), **more: Any) -> Image.Image:
        response = openai_client.images.edit(model="tiny", image=data, prompt="", stream=False, **more)
        return opened(response)[0]

    more: dict[str, Any]
    for more in ({}, {"background": "transparent"}, {"output_format": "webp", "output_compression": 100, "n": 3}):
        image = edit(**more)
        assert (image.mode, image.size) == ("RGBA", (96, 64))
        low, high = np.ptp(np.asarray(image)[..., 3], axis=1).max(), np.ptp(np.asarray(image)[..., 3])
        assert (low <= 2, high > 230) == (True, True)  # a gradient from top to bottom
    assert edit(with_alpha("LA")).mode == "LA"
    for more in ({"background": "opaque"}, {"output_format": "jpeg", "output_compression": 60, "quality": "low"}):
        image = edit(**more)
        assert (image.mode, int(np.asarray(image)[0].min()) > 240) == ("RGB", True)
    half = edit(background="opaque", size="48x32", quality="auto")
    assert (half.mode, half.size) == ("RGB", (48, 32))


def test_openais_client_is_refused_in_one_sentence(openai_client: Any) -> None:
    import openai

    picture = image_bytes(16, 16)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"mask": with_alpha()}, "the only edit is enlarging the whole image"),
        ({"background": "transparent"}, "the image has no transparent parts; nothing is cut out. Leave it out."),
        ({"background": "transparent", "image": with_alpha(), "output_format": "jpeg"}, "jpeg holds no transparency"),
        ({"stream": True}, "stream: Input should be False (Events are at /v1/upscale?stream=true"),
        ({"n": 5}, "n: Input should be less than or equal to 4 (Number of images"),
        ({"output_compression": 101}, "less than or equal to 100 (Quality of WebP and JPEG"),
        ({"image": [picture, picture]}, "holds 2 images; send one at a time"),
        ({"size": "1024x1024"}, "size is 1024x1024, and small makes 64x64 of this"),
        ({"model": "nothing"}, "There is no model 'nothing' here; there are small, tiny."),
    ]
    for wrong, expected in refused:
        with pytest.raises(openai.BadRequestError) as caught:
            openai_client.images.edit(**{"image": picture, "prompt": "a cat"} | wrong)
        assert expected in caught.value.message
    with pytest.raises(openai.InternalServerError, match="--pipeline"):
        openai_client.images.generate(prompt="a cat", model="dall-e-3", size="1024x1024", style="vivid", quality="hd")
    with pytest.raises(openai.NotFoundError, match="there are small, tiny"):
        openai_client.models.retrieve("nothing")


def curl(*arguments: str, data: bytes | None = None) -> bytes:
    if shutil.which("curl") is None:
        pytest.skip("there is no curl on this machine")
    command = ["curl", "--silent", "--show-error", "--noproxy", "*", "--max-time", "60", *arguments]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def test_curl_decodes_upscales_and_streams(server: Served) -> None:
    for path, data in [("upscale?num_steps=1", image_bytes(16, 16)), ("decode?num_steps=1", latent_bytes())]:
        found = curl("--data-binary", "@-", f"{server.url}/v1/{path}", data=data)
        assert Image.open(io.BytesIO(found)).size == (64, 64)
        found = curl("-T", "-", "-X", "POST", f"{server.url}/v1/{path}", data=data)  # chunked, Expect: 100-continue
        assert Image.open(io.BytesIO(found)).size == (64, 64)
    lines = curl(
        "--no-buffer", "--data-binary", "@-", f"{server.url}/v1/upscale?stream=true&num_steps=2",
        data=image_bytes(16, 16),
    ).splitlines()  # fmt: skip
    events = [json.loads(line) for line in lines]
    assert events[-1]["state"] == "done"
    assert events[-1]["seconds"] >= 0


def test_scripts_of_an_allowed_site_may_use_the_server(server: Served) -> None:
    asked = {"Origin": SITE, "Sec-Fetch-Site": "cross-site"}
    before = server.ask("OPTIONS", "/v1/upscale", None, asked | {"Access-Control-Request-Method": "POST"})
    assert (before.status, before.headers["access-control-allow-origin"]) == (204, SITE)
    assert "Authorization" in before.headers["access-control-allow-headers"]
    answer = server.ask("GET", "/v1/models", None, asked)
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (200, SITE)
    other = server.ask("GET", "/v1/models", None, asked | {"Origin": "https://other.example"})
    assert (other.status, "--cors" in other.message) == (403, True)
    assert "access-control-allow-origin" not in other.headers
    assert "access-control-allow-origin" not in server.get("/v1/models").headers


def test_a_preflight_needs_no_token_and_gives_nothing_away() -> None:
    service = DecodeService({"small": small_decoder()}, limits=LIMITS)
    with running(create_app(service, token=TOKEN, origins=[SITE]), service) as served:
        assert served.ask("OPTIONS", "/v1/models", None, {"Origin": SITE}).status == 204
        assert served.ask("GET", "/v1/models", None, {"Origin": SITE}).status == 401


def test_an_allowed_host_is_answered(server: Served) -> None:
    assert server.get("/v1/models", Host="images.lan").status == 200
    refused = server.get("/v1/models", Host="evil.example")
    assert (refused.status, "--allowed-host" in refused.message) == (403, True)


@pytest.mark.parametrize("origin", ["example.org", "https://example.org/path", "*", "ftp://example.org"])
def test_an_origin_is_scheme_and_host(origin: str) -> None:
    with pytest.raises(SettingError, match="scheme and host"):
        check_origin(origin)


@pytest.fixture(scope="module")
def proxy(server: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if NGINX is None:
        pytest.skip("there is no nginx on this machine: apt-get install nginx")
    with Proxy(server, tmp_path_factory.mktemp("nginx")) as running_proxy:
        yield Served(running_proxy.port, server.service)


def test_the_server_works_behind_the_proxy_of_the_documentation(proxy: Served) -> None:
    host = {"Host": "images.lan", "Origin": "https://images.lan", "X-Forwarded-Proto": "https"}
    page = proxy.get("/pidecode/", **host)
    assert (page.status, b"static/app.js" in page.body) == (200, True)
    assert proxy.get("/pidecode/static/app.js", **host).status == 200
    answer = proxy.post("/pidecode/v1/upscale?num_steps=1", image_bytes(16, 16), **host)
    assert Image.open(io.BytesIO(answer.body)).size == (64, 64)
    foreign = proxy.post("/pidecode/v1/upscale", image_bytes(16, 16), **(host | {"Origin": "https://evil.example"}))
    assert (foreign.status, "Host header" in foreign.message) == (403, True)
    too_long = proxy.post("/pidecode/v1/upscale", b"x" * (LIMITS.body_bytes + 1), **host)
    assert too_long.status == 413


def test_the_proxy_passes_progress_on_at_once_and_hang_ups_too(proxy: Served) -> None:
    queue = proxy.service.queue
    before = queue.stats.cancelled
    with proxy.busy():
        connection = proxy.connect()
        connection.request("POST", "/pidecode/v1/decode?stream=true", latent_bytes(), {"Host": "images.lan"})
        response = connection.getresponse()
        assert json.loads(response.readline())["state"] == "waiting"
        connection.sock.shutdown(socket.SHUT_RDWR)
        connection.close()
        proxy.until(lambda: queue.stats.cancelled == before + 1)
