# SPDX-License-Identifier: Apache-2.0
"""The HTTP API over real connections: results, refusals, load."""

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
from serving_kit import LIMITS, PATIENCE, HttpAnswer, Served, image_bytes, latent_bytes, running, small_decoder

from pidecode import PixelDecoder
from pidecode.images import read_metadata
from pidecode.options import Command, SaveOptions, option_infos
from pidecode.serve.app import create_app
from pidecode.serve.service import DecodeService


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    service = DecodeService({"small": small_decoder(), "second": small_decoder("second")}, limits=LIMITS)
    with running(create_app(service), service) as served:
        yield served


def opened(answer: HttpAnswer) -> Image.Image:
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


def test_a_latent_becomes_an_image_with_metadata(server: Served) -> None:
    answer = server.post("/v1/decode?seed=5&num_steps=2", latent_bytes(1, 2))
    assert opened(answer).size == (128, 64)
    assert answer.headers["content-type"] == "image/png"
    metadata = read_metadata(answer.body)
    assert metadata is not None
    assert {"seed": 5, "num_steps": 2, "model": "small", "space": "flux2", "latent_seed": 7}.items() <= metadata.items()
    again = server.post("/v1/decode?seed=5&num_steps=2", latent_bytes(1, 2))
    assert again.body == answer.body
    assert server.post("/v1/decode?seed=6&num_steps=2", latent_bytes(1, 2)).body != answer.body


@pytest.mark.parametrize(("kind", "name"), [("png", "PNG"), ("webp", "WEBP"), ("jpeg", "JPEG")])
def test_an_image_is_enlarged_in_the_format_asked_for(server: Served, kind: str, name: str) -> None:
    answer = server.post(f"/v1/upscale?num_steps=1&format={kind}", image_bytes(20, 33))
    image = opened(answer)
    assert (image.format, image.size) == (name, (80, 132))
    assert answer.headers["content-type"] == f"image/{kind}"
    assert (read_metadata(answer.body) or {})["num_steps"] == 1


def test_another_model_is_chosen_by_name(server: Served) -> None:
    assert (read_metadata(server.post("/v1/upscale?model=second&num_steps=1", image_bytes()).body) or {})[
        "model"
    ] == "second"
    refused = server.post("/v1/upscale?model=large", image_bytes())
    assert (refused.status, refused.message) == (400, "There is no model 'large' here; there are small, second.")


def test_models_are_described(server: Served) -> None:
    data = server.get("/v1/models").json()["data"]
    assert [model["id"] for model in data] == ["small", "second"]
    assert {"space": "flux2", "scale": 4, "takes_images": True, "reads_text": False}.items() <= data[0].items()


def test_a_foreign_latent_needs_its_space(server: Served) -> None:
    import safetensors.torch
    import torch

    foreign = safetensors.torch.save({"z": torch.randn(1, 128, 1, 1)})
    refused = server.post("/v1/decode", foreign)
    assert refused.status == 400
    assert "does not say which latent space" in refused.message
    assert opened(server.post("/v1/decode?space=flux2&num_steps=1", foreign)).size == (64, 64)


@pytest.mark.parametrize(
    ("path", "body", "status", "expected"),
    [
        ("/v1/decode", b"no file at all", 400, "no .safetensors file"),
        ("/v1/decode", latent_bytes()[:-9], 400, "truncated"),
        ("/v1/decode", latent_bytes(space="flux"), 400, "flux latent has 16 channels; got 128"),
        ("/v1/decode", latent_bytes(batch=2), 400, "holds 2 latents"),
        ("/v1/decode", latent_bytes(8, 8), 400, "this server makes at most 65,536"),
        ("/v1/decode", b"", 400, "body is empty"),
        ("/v1/decode", b"\x80\x04\x95csystem", 400, "no .safetensors file"),
        ("/v1/upscale", b"no image", 400, "not an image of a known format"),
        ("/v1/upscale", image_bytes()[:60], 400, "damaged or truncated"),
        ("/v1/upscale", image_bytes(128, 128), 400, "512x512"),
        ("/v1/upscale", image_bytes(4000, 4000), 400, "pixels"),
        ("/v1/decode?num_steps=9", latent_bytes(), 400, "num_steps is 9"),
        ("/v1/decode?prompt=a+cat", latent_bytes(), 400, "no text stream"),
        ("/v1/decode?guidance_scale=3", latent_bytes(), 400, "guidance_scale acts on teacher decoders only"),
        ("/v1/upscale?width=9000", image_bytes(), 400, "size is 9000x9000"),
        ("/v1/decode?sigma=0.9", latent_bytes(), 422, "sigma: Input should be less than or equal to 0.8"),
        ("/v1/decode?fit=pad", latent_bytes(), 422, "fit: Extra inputs are not permitted"),
        ("/v1/decode?seed=-1", latent_bytes(), 422, "seed"),
        ("/v1/decode?sede=1", latent_bytes(), 422, "sede: Extra inputs are not permitted"),
        ("/v1/upscale?fit=stretch", image_bytes(), 422, "'pad' or 'crop'"),
        ("/v1/decode?space=sdxx", latent_bytes(), 400, "sdxx"),
    ],
)
def test_errors_name_their_cause(server: Served, path: str, body: bytes, status: int, expected: str) -> None:
    answer = server.post(path, body)
    assert (answer.status, expected in answer.message) == (status, True), answer.message
    assert answer.json()["error"].keys() == {"message", "type", "code"}


def test_a_body_that_is_too_long_is_refused_declared_or_not(server: Served) -> None:
    long = b"x" * (LIMITS.body_bytes + 1)
    connection = server.connect()
    connection.putrequest("POST", "/v1/decode")
    connection.putheader("Content-Length", str(10**12))  # said, and never sent
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()
    chunked = server.ask("POST", "/v1/decode", iter([long[:100_000], long[100_000:]]), {"Transfer-Encoding": "chunked"})
    assert chunked.status == 413
    assert "longer than the 200,000 bytes" in chunked.message


def test_a_slow_body_times_out(server: Served) -> None:
    connection = server.connect()
    connection.putrequest("POST", "/v1/decode")
    connection.putheader("Content-Length", "1000")
    connection.endheaders(b"only this")
    assert connection.getresponse().status == 408
    connection.close()


def test_a_full_queue_answers_429_before_the_body_is_sent(server: Served) -> None:
    with server.busy():
        waiting = [server.service.queue.submit(lambda job: None) for _ in range(2)]
        connection = server.connect()
        connection.putrequest("POST", "/v1/decode")
        connection.putheader("Content-Length", "100000")
        connection.endheaders()  # no byte of the body
        response = connection.getresponse()
        assert response.status == 429
        assert int(response.headers["Retry-After"]) >= 1
        assert "queue is full" in json.loads(response.read())["error"]["message"]
        connection.close()
        for job in waiting:
            job.cancel()


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_client_that_goes_away_frees_its_place(server: Served, how: str) -> None:
    before = server.service.queue.stats.cancelled
    with server.busy():
        connection = server.connect()
        connection.request("POST", "/v1/decode", latent_bytes())
        server.until(lambda: server.service.queue.waiting == 1)
        if how == "reset":
            assert connection.sock is not None
            connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        connection.close()
        server.until(lambda: server.service.queue.waiting == 0)
    assert server.service.queue.stats.cancelled == before + 1


def test_health_and_metrics_report_the_queue(server: Served) -> None:
    with server.busy():
        assert server.get("/health").json() == {"status": "ok", "waiting": 0, "running": True}
        text = server.get("/metrics").body.decode()
    server.post("/v1/upscale?num_steps=1", image_bytes())
    after = server.get("/metrics").body.decode()
    assert "\npidecode_queue_running 1\n" in text
    assert 'pidecode_responses_total{path="/v1/upscale",status="200"}' in after
    samples = [line for line in after.splitlines() if not line.startswith("#")]
    values = {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in samples}
    assert len(values) == len(samples)
    counts = [values[key] for key in values if key.startswith('pidecode_response_seconds_bucket{path="/v1/upscale"')]
    assert counts == sorted(counts)
    assert counts[-1] == values['pidecode_response_seconds_count{path="/v1/upscale"}'] > 0
    assert values["pidecode_resident_memory_bytes"] > 1e7


def test_openai_edits_enlarge(server: Served) -> None:
    body, headers = form({"image": image_bytes(), "prompt": "", "n": 2, "size": "auto", "seed": 3, "num_steps": 1})
    answer = server.post("/v1/images/edits", body, **headers)
    assert answer.status == 200, answer.body
    assert answer.json()["size"] == "128x128"
    images = [base64.b64decode(entry["b64_json"]) for entry in answer.json()["data"]]
    assert [(read_metadata(data) or {})["seed"] for data in images] == [3, 4]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "x"}, "no file in the field 'image'"),
        ({"image": b"nothing"}, "not an image of a known format"),
        ({"image": latent_bytes()}, "send it to /v1/decode"),
        ({"image": image_bytes(), "size": "64x32"}, "give one side alone, or 64x64"),
        ({"image": image_bytes(), "size": "big"}, "size: String should match pattern"),
        ({"image": image_bytes(), "n": "9"}, "n: Input should be less than or equal to 4"),
        ({"image": image_bytes(), "response_format": "url"}, "response_format: Input should be 'b64_json'"),
        ({"image": image_bytes(), "mask": image_bytes()}, "the only edit is enlarging the whole image"),
        ({"image": image_bytes(), "image[]": image_bytes()}, "holds 2 images; send one at a time"),
        ({"image": image_bytes(), "background": "transparent"}, "the image has no transparent parts"),
        ({"image": image_bytes(), "background": "green"}, "'auto', 'opaque' or 'transparent' (auto keeps the transp"),
        ({"image": image_bytes(), "stream": "true"}, "stream: Input should be False (Events are at /v1/upscale?str"),
    ],
)
def test_openai_edits_refuse_wrong_fields(server: Served, fields: dict[str, Any], expected: str) -> None:
    body, headers = form(fields)
    answer = server.post("/v1/images/edits", body, **headers)
    assert (answer.status, expected in answer.message) == (400, True), answer.message


def test_a_broken_form_is_refused(server: Served) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=a"}
    assert server.post("/v1/images/edits", b"--b\r\nno", **headers).status == 400
    assert server.post("/v1/images/edits", b"{}", **{"Content-Type": "multipart/form-data"}).status == 400
    assert server.post("/v1/images/edits", {"image": "x"}).status == 400


def test_generation_without_a_pipeline_is_refused(server: Served) -> None:
    answer = server.post("/v1/images/generations", {"prompt": "a cat"})
    assert answer.status == 501
    assert "--pipeline" in answer.message
    assert server.post("/v1/generate", b"a cat").status == 501


def test_other_names_and_other_sites_are_refused(server: Served) -> None:
    assert server.get("/health", Host="evil.example").status == 403
    assert server.get("/health", Host="localhost").status == 200
    assert server.post("/v1/decode", b"x", Origin="http://evil.example").status == 403
    assert server.post("/v1/decode", b"x", **{"Sec-Fetch-Site": "cross-site"}).status == 403
    assert server.get("/health", Origin=server.url).status == 200


def test_the_openapi_document_lists_every_endpoint(server: Served) -> None:
    assert set(server.get("/openapi.json").json()["paths"]) == {
        "/v1/decode", "/v1/upscale", "/v1/generate", "/v1/results/{name}", "/v1/server", "/v1/inspect", "/v1/plan",
        "/v1/models", "/v1/models/{name}", "/v1/jobs/{name}", "/v1/images/generations", "/v1/images/edits", "/health",
        "/metrics",
    }  # fmt: skip
    assert (server.get("/nothing").status, "no /nothing here" in server.get("/nothing").message) == (404, True)


def test_parameters_are_the_decode_options_that_http_offers(server: Served) -> None:
    paths = server.get("/openapi.json").json()["paths"]
    commands: tuple[Command, ...] = ("decode", "upscale")
    for command in commands:
        found = {entry["name"]: entry for entry in paths[f"/v1/{command}"]["post"]["parameters"]}
        for name, info in option_infos(command=command, interface="http").items():
            if name == "size":
                assert {"width", "height"} <= found.keys()
                continue
            schema = found.pop(name)["schema"]
            assert schema["description"] == info.help
            assert tuple(schema["anyOf"][0].get("enum", ())) == info.choices
        for name, info in option_infos(SaveOptions, interface="http").items():
            assert found.pop(name)["schema"]["description"] == info.help
        rest = {"decode": {"space"}, "upscale": set[str]()}[command]
        assert found.keys() == {"model", "stream", "reconnect_seconds", "width", "height"} | rest


def test_a_token_is_required() -> None:
    service = DecodeService({"small": small_decoder()}, limits=LIMITS)
    token = "correct-horse-battery"
    with running(create_app(service, token=token), service) as served:
        assert served.get("/health").status == 200
        assert served.get("/v1/models").status == 401
        assert served.get("/metrics").headers["www-authenticate"] == "Bearer"
        assert served.get("/v1/models", Authorization="Bearer correct-horse").status == 401
        for host in ("box.lan/health?", f"box.lan/?token={token}&"):  # what a URL of host and path would show as a path
            assert served.get("/v1/models", Host=host).status == 401
        assert served.get("/v1/models", Authorization=f"Bearer {token}", Host="box.lan").status == 200
        assert served.post("/v1/upscale?num_steps=1", image_bytes(), Authorization=f"bearer {token}").status == 200


def test_a_stop_lets_the_running_request_end() -> None:
    service = DecodeService({"small": small_decoder()}, limits=LIMITS)
    answers: list[HttpAnswer] = []
    with running(create_app(service), service, grace=int(PATIENCE)) as served, served.busy():
        client = threading.Thread(target=lambda: answers.append(served.post("/v1/upscale?num_steps=1", image_bytes())))
        client.start()
        served.until(lambda: service.queue.waiting == 1)
        asked_to_stop = threading.Thread(target=service.stop, args=(PATIENCE,))
        asked_to_stop.start()  # as at the end of the shutdown: waiting jobs are cancelled, the running one may end
        client.join(PATIENCE)
    asked_to_stop.join(PATIENCE)
    assert answers[0].status == 503
    assert "not started" in answers[0].message
    assert service.queue.stats.done == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_prompt_is_generated_by_a_real_pipeline_and_decoded() -> None:
    tiny = pytest.importorskip("tiny_pipelines")
    from pidecode.integrations.text_to_image import text_to_latent
    from pidecode.serve.schemas import RequestLimits

    service = DecodeService(
        {"sdxl": tiny.decoder_for("sdxl")}, limits=RequestLimits(job_seconds=PATIENCE),
        text_to_latent=text_to_latent("sdxl", tiny.build("sdxl"), num_steps=2),
    )  # fmt: skip
    with running(create_app(service), service) as served:
        body = {"prompt": "a cat", "size": "128x64", "num_steps": 1, "seed": 2, "n": 2}
        answer = served.post("/v1/images/generations", body)
        assert answer.status == 200, answer.body
        images = [base64.b64decode(entry["b64_json"]) for entry in answer.json()["data"]]
        assert Image.open(io.BytesIO(images[0])).size == (128, 64)
        metadata = [read_metadata(data) or {} for data in images]
        assert [metadata["seed"] for metadata in metadata] == [2, 3]
        assert metadata[0]["prompt"] == "a cat"
        refused = served.post("/v1/images/generations", body | {"size": "130x64"})
        assert (refused.status, "multiples of 64" in refused.message) == (400, True)


def test_a_feed_forward_decoder_refuses_what_cannot_act() -> None:
    service = DecodeService({"tiny": PixelDecoder.from_pretrained("tiny", device="cpu")}, limits=LIMITS)
    with running(create_app(service), service) as served:
        assert served.get("/v1/models").json()["data"][0]["kind"] == "feed-forward"
        for option in ("seed=1", "num_steps=2", "sampler=ode", "guidance_scale=2"):
            refused = served.post(f"/v1/upscale?{option}", image_bytes(16, 16))
            assert (refused.status, option.split("=")[0] in refused.message) == (400, True), refused.body
        body, headers = form({"image": image_bytes(16, 16), "n": 2, "prompt": "a cat"})
        first, second = served.post("/v1/images/edits", body, **headers).json()["data"]
        assert first == second  # nothing is random
        body, headers = form({"image": image_bytes(16, 16)})
        assert served.post("/v1/images/edits", body, **headers).json()["size"] == "64x64"


def test_transparency_survives(server: Served) -> None:
    source = Image.radial_gradient("L").resize((24, 16)).convert("RGBA")
    source.putalpha(Image.linear_gradient("L").resize((24, 16)))
    buffer = io.BytesIO()
    source.save(buffer, "PNG")
    for scale, size in ((4, (96, 64)), (2, (48, 32))):
        image = opened(server.post(f"/v1/upscale?num_steps=1&scale={scale}", buffer.getvalue()))
        assert (image.mode, image.size) == ("RGBA", size)
        low, high = image.getchannel("A").getextrema()
        assert low < 20
        assert high > 235
