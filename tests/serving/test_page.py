# SPDX-License-Identifier: Apache-2.0
"""The page's files, and the endpoints it uses: inspect, plan, streamed jobs, results."""

from __future__ import annotations

import base64
import json
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from serving_kit import LIMITS, Served, image_bytes, latent_bytes, running, small_decoder

import pidecode.serve.app
from pidecode.images import load_image, read_metadata
from pidecode.latents.latent import Latent
from pidecode.serve.app import create_app
from pidecode.serve.schemas import UpscaleParams
from pidecode.serve.service import DecodeService, Speeds

STATIC = Path(pidecode.serve.app.__file__).parent / "static"


@pytest.fixture(scope="module")
def page() -> Iterator[Served]:
    service = DecodeService({"small": small_decoder()}, limits=LIMITS)
    with running(create_app(service), service) as served:
        yield served


def stream(served: Served, path: str, body: bytes) -> list[dict[str, Any]]:
    answer = served.post(path, body)
    assert answer.status == 200, answer.body
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.body.splitlines()]


def test_the_page_and_its_files_refer_to_no_other_host(page: Served) -> None:
    index = page.get("/")
    assert b"pidecode" in index.body
    policy = index.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    named = set(re.findall(r'(?:src|href)="([^"]+)"', index.body.decode()))
    assert named == {"static/icon.svg", "static/style.css", "static/app.js"}
    for path in sorted(STATIC.iterdir()):
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"https?://[^\s\"'`)]+", text)) <= {"http://www.w3.org/2000/svg"}, path.name
        if path.name != "index.html":
            assert page.get(f"/static/{path.name}").body == path.read_bytes()
    assert page.get("/static/app.py").status == 404
    assert page.get("/static/..%2fapp.py").status == 404


def test_every_element_the_scripts_use_is_on_the_page() -> None:
    scripts = "".join((STATIC / name).read_text() for name in ("app.js", "viewer.js"))
    index = (STATIC / "index.html").read_text()
    wanted = set(re.findall(r'find\("([\w-]+)"\)', scripts))
    assert len(wanted) > 30
    assert wanted <= set(re.findall(r'id="([\w-]+)"', index))


def test_the_server_reports_its_limits(page: Served) -> None:
    server = page.get("/v1/server").json()
    assert server["text_to_image"] is False
    assert server["limits"]["body_bytes"] == LIMITS.body_bytes


def test_inspect_describes_a_file(page: Served) -> None:
    assert {"kind": "image", "width": 20, "height": 30}.items() <= page.post(
        "/v1/inspect", image_bytes(20, 30)
    ).json().items()
    latent = page.post("/v1/inspect", latent_bytes(2, 3)).json()
    assert {"kind": "latent", "width": 3, "height": 2, "space": "flux2", "sigma": 0.0}.items() <= latent.items()
    for shape in ((128, 2, 3), (1, 128, 1, 2, 3)):  # without its batch axis; one frame
        body = safetensors.torch.save({"latent": torch.zeros(shape)})
        assert {"kind": "latent", "width": 3, "height": 2}.items() <= page.post("/v1/inspect", body).json().items()
        assert page.post("/v1/decode?num_steps=1&space=flux2", body).status == 200
    bad = page.post("/v1/inspect", b"neither")
    assert (bad.status, "not an image of a known format" in bad.message) == (400, True)


def test_a_decode_is_estimated(page: Served) -> None:
    plan = page.get("/v1/plan?kind=image&width=20&height=30").json()
    assert (plan["width"], plan["height"], plan["fits"]) == (80, 120, True)
    assert plan["working"] > 0
    other = page.get("/v1/plan?kind=latent&width=1&height=1&output_width=80&output_height=64").json()
    assert (other["width"], other["height"]) == (80, 64)
    for query, message in (
        ("kind=image&output_width=64&output_height=64", "latents only"),
        ("kind=latent&output_width=64", "together"),
    ):
        refused = page.get(f"/v1/plan?width=1&height=1&{query}")
        assert (refused.status, message in refused.message) == (400, True)
    large = page.get("/v1/plan?kind=image&width=2000&height=2000")
    assert (large.status, "at most 65,536" in large.message) == (400, True)


def test_a_job_is_streamed_step_by_step_and_its_result_is_fetched_once(page: Served) -> None:
    events = stream(page, "/v1/upscale?stream=true&num_steps=3&seed=4", image_bytes(20, 33))
    previews = [line["preview"] for line in events if "preview" in line]
    assert previews
    for preview in previews:
        data = base64.b64decode(preview.removeprefix("data:image/jpeg;base64,"))
        assert load_image(data).size == (128, 192)  # the padded image, which is cut back only at the end
    last = events[-1]
    assert (last["state"], last["width"], last["height"], last["metadata"]["seed"]) == ("done", 80, 132, 4)
    fetched = page.get(last["result"])
    assert len(fetched.body) == last["bytes"]
    assert read_metadata(fetched.body) == last["metadata"]
    again = page.get(last["result"])
    assert (again.status, "fetched already" in again.message) == (404, True)


def test_a_small_image_teaches_no_time_of_large_ones() -> None:
    speeds = Speeds()
    speeds.learn("tiny", UpscaleParams(), (4, 4), 1.0)
    assert speeds.predict("tiny", UpscaleParams(), (64, 64)) == pytest.approx(1.0)
    assert speeds.predict("tiny", UpscaleParams(), (1024, 1024)) == pytest.approx(16.0)


def test_a_smaller_scale_is_downsampled(page: Served) -> None:
    last = stream(page, "/v1/upscale?stream=true&num_steps=1&scale=2", image_bytes(20, 33))[-1]
    assert (last["width"], last["height"], last["metadata"]["downsampled_from"]) == (40, 66, [80, 132])
    refused = stream(page, "/v1/upscale?stream=true&num_steps=1&scale=8", image_bytes())[-1]
    assert refused["state"] == "failed"
    assert "enlarges 4 times; give 1 to 4" in refused["error"]["message"]


def test_a_latent_is_decoded_and_a_bad_one_ends_in_an_error(page: Served) -> None:
    assert stream(page, "/v1/decode?stream=true&num_steps=1&format=webp", latent_bytes())[-1]["width"] == 64
    last = stream(page, "/v1/decode?stream=true&num_steps=1", latent_bytes()[:-8])[-1]
    assert (last["state"], "truncated" in last["error"]["message"]) == ("failed", True)


def test_a_full_queue_is_an_error_before_the_stream_begins(page: Served) -> None:
    with page.busy():
        waiting = [page.service.queue.submit(lambda job: None) for _ in range(2)]
        assert page.post("/v1/upscale?stream=true", image_bytes()).status == 429
        for job in waiting:
            job.cancel()


def test_leaving_the_page_cancels_its_job(page: Served) -> None:
    with page.busy():
        connection = page.connect()
        connection.request("POST", "/v1/upscale?stream=true", image_bytes())
        response = connection.getresponse()
        assert json.loads(response.readline())["state"] == "waiting"
        page.until(lambda: page.service.queue.waiting == 1)
        response.close()
        connection.close()
        page.until(lambda: page.service.queue.waiting == 0)


def test_a_job_goes_on_without_its_client_who_follows_it_again(page: Served) -> None:
    with page.busy():
        connection = page.connect()
        connection.request("POST", "/v1/upscale?stream=true&num_steps=1&reconnect_seconds=60", image_bytes(20, 33))
        response = connection.getresponse()
        job = json.loads(response.readline())["id"]
        response.close()
        connection.close()
        page.until(lambda: page.service.streamed.get(job).followers == 0)
    last = json.loads(page.get(f"/v1/jobs/{job}").body.splitlines()[-1])
    assert (last["id"], last["state"], last["width"]) == (job, "done", 80)
    assert len(page.get(last["result"]).body) == last["bytes"]
    gone = page.get(f"/v1/jobs/{job}")
    assert (gone.status, "Run it again" in gone.message) == (404, True)


def test_a_client_that_stays_away_or_cancels_ends_its_job(page: Served) -> None:
    with page.busy():
        for leaves in (True, False):
            connection = page.connect()
            connection.request("POST", "/v1/upscale?stream=true&reconnect_seconds=0.1", image_bytes())
            response = connection.getresponse()
            job = page.service.streamed.get(json.loads(response.readline())["id"])
            if not leaves:
                assert page.ask("DELETE", f"/v1/jobs/{job.id}").status == 204
                assert json.loads(response.read().splitlines()[-1])["state"] == "cancelled"
            response.close()
            connection.close()
            page.until(lambda job=job: job.state == "cancelled")
    refused = page.post("/v1/upscale?reconnect_seconds=1", image_bytes())
    assert (refused.status, "stream=true only" in refused.message) == (400, True)


def test_a_token_opens_the_page_and_stays_as_a_cookie() -> None:
    service = DecodeService({"small": small_decoder()}, limits=LIMITS)
    token = "correct-horse-battery"
    with running(create_app(service, token=token), service) as served:
        assert served.get("/").status == 401
        opened = served.get(f"/?token={token}")
        assert opened.status == 200
        cookie = opened.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert served.get("/v1/server").status == 401
        assert served.get("/v1/server", Cookie=cookie.split(";")[0]).status == 200
        assert served.get(f"/v1/server?token={token}").status == 401  # the query opens the page and nothing else


def test_a_latent_from_a_prompt_is_decoded() -> None:
    calls: list[tuple[str, int, int, int]] = []

    def text_to_latent(
        prompt: str, *, width: int, height: int, seed: int, callback: Callable[[int, int], None]
    ) -> Latent:
        calls.append((prompt, width, height, seed))
        callback(1, 2)
        time.sleep(0.1)
        return Latent(torch.zeros(1, 128, height // 64, width // 64), "flux2", 0.0)

    service = DecodeService({"small": small_decoder()}, limits=LIMITS, text_to_latent=text_to_latent)
    with running(create_app(service), service) as served:
        assert served.get("/v1/server").json()["text_to_image"] is True
        path = "/v1/generate?width=128&height=64&seed=3&num_steps=1"
        events = stream(served, f"{path}&stream=true", b"a cat")
        assert any(event.get("activity", "").startswith("generating, step") for event in events)
        assert (events[-1]["width"], events[-1]["height"], events[-1]["metadata"]["seed"]) == (128, 64, 3)
        body = {"prompt": "a cat", "size": "128x64", "seed": 3, "num_steps": 1, "n": 2}
        answer = served.post("/v1/images/generations", body)
        assert (answer.json()["size"], len(answer.json()["data"])) == ("128x64", 2)
        assert calls == [("a cat", 128, 64, 3), ("a cat", 128, 64, 3), ("a cat", 128, 64, 4)]
        assert served.post(path, b"\xff").message == "The prompt must be UTF-8 text."
        assert "has 4001 characters" in served.post(path, b"x" * 4001).message
        assert served.post(f"{path}&prompt=a", b"a").status == 422
