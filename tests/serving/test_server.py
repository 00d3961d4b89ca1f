# SPDX-License-Identifier: Apache-2.0
"""The HTTP interface, asked over real connections: what it makes, what it refuses, how it bears pressure."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from serving_kit import LIMITS, PATIENCE, Answer, Served, image_bytes, latent_bytes, running, small_decoder

from pidecode.images import read_recipe
from pidecode.serve.app import create_app
from pidecode.serve.service import DecodeService


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    desk = DecodeService({"small": small_decoder(), "twin": small_decoder("twin")}, limits=LIMITS)
    with running(create_app(desk), desk) as served:
        yield served


def opened(answer: Answer) -> Image.Image:
    assert answer.status == 200, answer.body
    return Image.open(io.BytesIO(answer.body))


def form(fields: dict[str, Any], boundary: str = "xyzzy") -> tuple[bytes, dict[str, str]]:
    parts = []
    for name, value in fields.items():
        file = '; filename="x.png"' if isinstance(value, bytes) else ""
        data = value if isinstance(value, bytes) else str(value).encode()
        parts.append(f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'.encode() + data)
    body = b"\r\n".join(parts) + f"\r\n--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def test_a_latent_becomes_a_image_that_carries_its_recipe(server: Served) -> None:
    answer = server.post("/v1/decode?seed=5&steps=2", latent_bytes(1, 2))
    assert opened(answer).size == (128, 64)
    assert answer.headers["content-type"] == "image/png"
    recipe = read_recipe(answer.body)
    assert recipe is not None
    assert {"seed": 5, "steps": 2, "model": "small", "space": "flux2", "latent_seed": 7}.items() <= recipe.items()
    again = server.post("/v1/decode?seed=5&steps=2", latent_bytes(1, 2))
    assert again.body == answer.body
    assert server.post("/v1/decode?seed=6&steps=2", latent_bytes(1, 2)).body != answer.body


@pytest.mark.parametrize(("kind", "name"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_a_image_is_enlarged_in_the_format_asked_for(server: Served, kind: str, name: str) -> None:
    answer = server.post(f"/v1/upscale?steps=1&format={kind}", image_bytes(20, 33))
    image = opened(answer)
    assert (image.format, image.size) == (name, (80, 132))
    assert answer.headers["content-type"] == f"image/{kind}"
    assert (read_recipe(answer.body) or {})["steps"] == 1


def test_another_model_is_chosen_by_name(server: Served) -> None:
    assert (read_recipe(server.post("/v1/upscale?model=twin&steps=1", image_bytes()).body) or {})["model"] == "twin"
    refused = server.post("/v1/upscale?model=large", image_bytes())
    assert (refused.status, refused.message) == (400, "There is no model 'large' here; there are small, twin.")


def test_models_say_what_they_can(server: Served) -> None:
    data = server.get("/v1/models").json()["data"]
    assert [model["id"] for model in data] == ["small", "twin"]
    assert {"space": "flux2", "scale": 4, "takes_images": True, "reads_text": False}.items() <= data[0].items()


def test_a_foreign_latent_needs_its_space(server: Served) -> None:
    import safetensors.torch
    import torch

    foreign = safetensors.torch.save({"z": torch.randn(1, 128, 1, 1)})
    refused = server.post("/v1/decode", foreign)
    assert refused.status == 400
    assert "does not say which latent space" in refused.message
    assert opened(server.post("/v1/decode?space=flux2&steps=1", foreign)).size == (64, 64)


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/decode", b"no file at all", 400, "no .safetensors file"),
        ("/v1/decode", latent_bytes()[:-9], 400, "cut off"),
        ("/v1/decode", latent_bytes(space="flux"), 400, "flux latent has 16 channels; got 128"),
        ("/v1/decode", latent_bytes(batch=2), 400, "holds 2 latents"),
        ("/v1/decode", latent_bytes(8, 8), 400, "this server makes at most 65,536"),
        ("/v1/decode", b"", 400, "body is empty"),
        ("/v1/decode", b"\x80\x04\x95csystem", 400, "no .safetensors file"),
        ("/v1/upscale", b"no image", 400, "no image of a known kind"),
        ("/v1/upscale", image_bytes()[:60], 400, "damaged or cut off"),
        ("/v1/upscale", image_bytes(128, 128), 400, "512x512"),
        ("/v1/upscale", image_bytes(4000, 4000), 400, "pixels"),
        ("/v1/decode?steps=9", latent_bytes(), 400, "steps is 9"),
        ("/v1/decode?prompt=a+cat", latent_bytes(), 400, "no text stream"),
        ("/v1/decode?guidance=3", latent_bytes(), 400, "guidance acts on teachers only"),
        ("/v1/decode?width=64", latent_bytes(), 400, "width and height together"),
        ("/v1/decode?sigma=0.9", latent_bytes(), 422, "sigma: Input should be less than or equal to 0.8"),
        ("/v1/decode?seed=-1", latent_bytes(), 422, "seed"),
        ("/v1/decode?sede=1", latent_bytes(), 422, "sede: Extra inputs are not permitted"),
        ("/v1/upscale?fit=stretch", image_bytes(), 422, "'pad' or 'crop'"),
        ("/v1/decode?space=sdxx", latent_bytes(), 400, "sdxx"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(server: Served, path: str, body: bytes, status: int, words: str) -> None:
    answer = server.post(path, body)
    assert (answer.status, words in answer.message) == (status, True), answer.message
    assert answer.json()["error"].keys() == {"message", "type", "code"}


def test_a_body_that_is_too_long_is_refused_told_or_not(server: Served) -> None:
    long = b"x" * (LIMITS.body_bytes + 1)
    connection = server.connect()
    connection.putrequest("POST", "/v1/decode")
    connection.putheader("Content-Length", str(10**12))  # said, and never sent
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    told = server.ask("POST", "/v1/decode", iter([long[:100_000], long[100_000:]]), {"Transfer-Encoding": "chunked"})
    assert told.status == 413
    assert "longer than the 200,000 bytes" in told.message


def test_a_body_that_dawdles_is_given_up(server: Served) -> None:
    connection = server.connect()
    connection.putrequest("POST", "/v1/decode")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"only this")
    assert connection.getresponse().status == 408
    connection.close()


def test_a_full_line_answers_429_before_the_body_is_sent(server: Served) -> None:
    with server.busy():
        waiting = [server.desk.queue.submit(lambda job: None) for _ in range(2)]
        connection = server.connect()
        connection.putrequest("POST", "/v1/decode")
        connection.putheader("Content-Length", "100000")
        connection.endheaders()  # no byte of the body
        response = connection.getresponse()
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert "line is full" in json.loads(response.read())["error"]["message"]
        connection.close()
        for job in waiting:
            job.cancel()


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_goes_away_frees_its_place(server: Served, how: str) -> None:
    before = server.desk.queue.tally.cancelled
    with server.busy():
        connection = server.connect()
        connection.request("POST", "/v1/decode", latent_bytes())
        server.until(lambda: server.desk.queue.waiting == 1)
        if how == "reset":
            assert connection.sock is not None
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        server.until(lambda: server.desk.queue.waiting == 0)
    assert server.desk.queue.tally.cancelled == before + 1


def test_health_and_metrics_tell_of_the_line(server: Served) -> None:
    with server.busy():
        assert server.get("/health").json() == {"status": "ok", "waiting": 0, "running": True}
        text = server.get("/metrics").body.decode()
    server.post("/v1/upscale?steps=1", image_bytes())
    after = server.get("/metrics").body.decode()
    assert "\npidecode_queue_running 1\n" in text
    assert 'pidecode_answers_total{path="/v1/upscale",status="200"}' in after
    samples = [line for line in after.splitlines() if not line.startswith("#")]
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in samples}
    assert len(values) == len(samples)
    counts = [values[key] for key in values if key.startswith('pidecode_answer_seconds_bucket{path="/v1/upscale"')]
    assert counts == sorted(counts)
    assert counts[-1] == values['pidecode_answer_seconds_count{path="/v1/upscale"}'] > 0
    assert values["pidecode_resident_memory_bytes"] > 1e7


def test_openai_edits_enlarge(server: Served) -> None:
    body, headers = form({"image": image_bytes(), "prompt": "", "n": 2, "size": "auto", "seed": 3, "steps": 1})
    answer = server.post("/v1/images/edits", body, **headers)
    assert answer.status == 200, answer.body
    assert answer.json()["size"] == "128x128"
    images = [base64.b64decode(entry["b64_json"]) for entry in answer.json()["data"]]
    assert [(read_recipe(data) or {})["seed"] for data in images] == [3, 4]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"prompt": "x"}, "no file in the field 'image'"),
        ({"image": b"nothing"}, "no image of a known kind"),
        ({"image": latent_bytes()}, "send it to /v1/decode"),
        ({"image": image_bytes(), "size": "64x64"}, "becomes 128x128; size cannot be 64x64"),
        ({"image": image_bytes(), "size": "big"}, "must be WIDTHxHEIGHT"),
        ({"image": image_bytes(), "n": "9"}, "it must be 1 to 4"),
        ({"image": image_bytes(), "response_format": "url"}, "must be b64_json"),
        ({"image": image_bytes(), "mask": "x"}, "mask: Extra inputs are not permitted"),
        ({"image": image_bytes(), "prompt": "a cat"}, "no text stream"),
    ],
)
def test_openai_edits_refuse_in_a_sentence(server: Served, fields: dict[str, Any], words: str) -> None:
    body, headers = form(fields)
    answer = server.post("/v1/images/edits", body, **headers)
    assert (answer.status, words in answer.message) == (400, True), answer.message


def test_a_broken_form_is_refused(server: Served) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=a"}
    assert server.post("/v1/images/edits", b"--b\r\nno", **headers).status == 400
    assert server.post("/v1/images/edits", b"{}", **{"Content-Type": "multipart/form-data"}).status == 400
    assert server.post("/v1/images/edits", {"image": "x"}).status == 400


def test_generations_without_a_pipeline_say_so(server: Served) -> None:
    answer = server.post("/v1/images/generations", {"prompt": "a cat"})
    assert answer.status == 501
    assert "--pipeline" in answer.message


def test_other_names_and_other_sites_are_refused(server: Served) -> None:
    assert server.get("/health", Host="evil.example").status == 403
    assert server.get("/health", Host="localhost").status == 200
    assert server.post("/v1/decode", b"x", Origin="http://evil.example").status == 403
    assert server.post("/v1/decode", b"x", **{"Sec-Fetch-Site": "cross-site"}).status == 403
    assert server.get("/health", Origin=server.url).status == 200


def test_the_description_is_one_page_that_asks_nobody_else(server: Served) -> None:
    page = server.get("/docs")
    text = page.body.decode()
    assert page.headers["content-type"].startswith("text/html")
    assert "POST /v1/decode" in text
    assert "integer, 0 to 9007199254740991" in text
    assert "http" not in text.replace("http_", "")
    assert "<script" not in text
    assert set(server.get("/openapi.json").json()["paths"]) == {
        "/v1/decode", "/v1/upscale", "/v1/models", "/v1/images/generations", "/v1/images/edits", "/health", "/metrics",
    }  # fmt: skip
    assert page.headers["content-security-policy"].startswith("default-src 'none'")
    assert server.get("/nothing").status == 404


def test_a_token_keeps_everyone_else_out() -> None:
    desk = DecodeService({"small": small_decoder()}, limits=LIMITS)
    token = "correct-horse-battery"
    with running(create_app(desk, token=token), desk) as served:
        assert served.get("/health").status == 200
        assert served.get("/v1/models").status == 401
        assert served.get("/metrics").headers["www-authenticate"] == "Bearer"
        assert served.get("/v1/models", Authorization="Bearer correct-horse").status == 401
        assert served.get("/v1/models", Authorization=f"Bearer {token}", Host="box.lan").status == 200
        assert served.post("/v1/upscale?steps=1", image_bytes(), Authorization=f"bearer {token}").status == 200


def test_a_stop_lets_the_running_request_end() -> None:
    desk = DecodeService({"small": small_decoder()}, limits=LIMITS)
    answers: list[Answer] = []
    with running(create_app(desk), desk, grace=int(PATIENCE)) as served, served.busy():
        client = threading.Thread(target=lambda: answers.append(served.post("/v1/upscale?steps=1", image_bytes())))
        client.start()
        served.until(lambda: desk.queue.waiting == 1)
        asked_to_stop = threading.Thread(target=desk.stop, args=(PATIENCE,))
        asked_to_stop.start()  # what the server does when its time is up: who waits is told, who runs may end
        client.join(PATIENCE)
    asked_to_stop.join(PATIENCE)
    assert answers[0].status == 503
    assert "not begun" in answers[0].message
    assert desk.queue.tally.done == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_prompt_is_painted_by_a_real_pipeline_and_decoded() -> None:
    tiny = pytest.importorskip("tiny_pipelines")
    from pidecode.integrations.text_to_image import PipelineTextToLatent
    from pidecode.serve.schemas import Limits

    painter = PipelineTextToLatent("sdxl", tiny.build("sdxl"), steps=2)
    desk = DecodeService({"sdxl": tiny.decoder_for("sdxl")}, limits=Limits(seconds=PATIENCE), painter=painter)
    with running(create_app(desk), desk) as served:
        wish = {"prompt": "a cat", "size": "128x64", "steps": 1, "seed": 2, "n": 2}
        answer = served.post("/v1/images/generations", wish)
        assert answer.status == 200, answer.body
        made = [base64.b64decode(entry["b64_json"]) for entry in answer.json()["data"]]
        assert Image.open(io.BytesIO(made[0])).size == (128, 64)
        recipes = [read_recipe(data) or {} for data in made]
        assert [recipe["seed"] for recipe in recipes] == [2, 3]
        assert recipes[0]["prompt"] == "a cat"
        refused = served.post("/v1/images/generations", wish | {"size": "130x64"})
        assert (refused.status, "multiples of 64" in refused.message) == (400, True)
