# SPDX-License-Identifier: Apache-2.0
"""Trials of what runs: every endpoint of a server, a batch of hostile sources, and kill -9 of batches and trainings."""

from __future__ import annotations

import http.client
import json
import logging
import os
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from attack.mutate import hostile_json, mutated
from attack.readers import Trial, latent_bytes, weights_bytes
from pidecode.batch.jobs import OutputNaming, collect_jobs
from pidecode.batch.run import Batch, run_batch
from pidecode.batch.worker import WorkerConfig
from pidecode.files import remove_partial
from pidecode.latents.latent import Latent
from pidecode.options import DecodeOptions
from pidecode.serve.app import create_app
from pidecode.serve.service import DecodeService
from pidecode.training.config import apply_settings
from pidecode.training.recipes import get_recipe
from pidecode.training.tasks import train
from serving.serving_kit import LIMITS, Served, image_bytes, running, small_decoder

_VALUES = (
    "1", "0", "-1", "nan", "inf", "1e300", "9" * 5000, "", "%00", "%ff", "x" * 3000, "2x2", "tiny", "true", "png",
    "%ED%A0%80", "18446744073709551616", "../../etc/passwd", "%1b[2J", "64x64", "65536x65536",
)  # fmt: skip
_NAMES = (
    "seed", "num_steps", "sampler", "sigma", "size", "width", "height", "model", "space", "format", "prompt", "stream",
    "color_fix", "fit", "bits", "kind", "guidance_scale", "x",
)  # fmt: skip


def endpoints(rng: Random, folder: Path) -> Iterator[Trial]:
    """Requests to every endpoint; no answer is 500, and the server answers the next one."""
    logging.disable(logging.CRITICAL)  # the server's remarks on what it refuses
    service = DecodeService({"small": small_decoder()}, limits=LIMITS)
    with running(create_app(service), service) as served:
        while True:
            yield [lambda: _request(rng, served), lambda: _healthy(served)]


def _healthy(served: Served) -> None:
    assert served.get("/health").status == 200


def _request(rng: Random, served: Served) -> None:
    kind = rng.randrange(10)
    if kind == 0:
        _send_raw(rng, served)
        return
    query = "&".join(f"{rng.choice(_NAMES)}={rng.choice(_VALUES)}" for _ in range(rng.choice((0, 1, 2, 4))))
    latent = latent_bytes()[:]
    body: bytes | None = None
    headers = {}
    if kind <= 3:
        path = rng.choice(("/v1/decode", "/v1/upscale", "/v1/inspect", "/v1/generate"))
        body = rng.choice((latent, image_bytes(), b"a cat", b"", weights_bytes()[:3000]))
        body = mutated(rng, body) if rng.random() < 0.6 else body
    elif kind <= 5:
        path = "/v1/images/generations"
        fields = {"prompt": "a", "size": "64x64", "n": 1, "model": "small", "seed": 7, "output_format": "png"}
        body = hostile_json(rng, fields).encode("utf-8", "surrogatepass")
        headers["Content-Type"] = rng.choice(("application/json", "text/plain", "x"))
    elif kind <= 7:
        path = "/v1/images/edits"
        parts = [('name="image"; filename="a.png"', image_bytes()), ('name="size"', b"auto"), ('name="n"', b"1")]
        body = b"".join(
            b"--x\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n" % (name.encode(), value) for name, value in parts
        )
        body = mutated(rng, body + b"--x--\r\n") if rng.random() < 0.8 else body + b"--x--\r\n"
        headers["Content-Type"] = rng.choice(("multipart/form-data; boundary=x", "multipart/form-data", "text/plain"))
    else:
        path = rng.choice(("/v1/plan", "/v1/server", "/v1/models", "/metrics", "/", "/static/%2e%2e%2fapp.py", "/x%00"))
        path = rng.choice((path, f"/v1/results/{rng.choice(_VALUES)}"))
    status = _status(served, "GET" if body is None else "POST", f"{path}?{query}", body, headers)
    assert status in (200, 400, 401, 404, 405, 408, 411, 413, 415, 422, 429, 501, 503, 507), (
        f"{status} for {path}?{query}"
    )


def _status(served: Served, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=30)
    try:
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        response.read()
        return response.status
    except (http.client.RemoteDisconnected, BrokenPipeError, ConnectionResetError):
        return 400  # the server ended a connection whose request it refused
    finally:
        connection.close()


def _send_raw(rng: Random, served: Served) -> None:
    """A request that is no HTTP, is cut, or whose lengths lie."""
    start = b"POST /v1/decode HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % rng.choice((0, 5, 2**40, 2**70))
    chunks = b"POST /v1/inspect HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    data = rng.choice((start, chunks + b"ffffffffffff\r\nabc", chunks + b"-1\r\n", chunks + b"3\r\nabc\r\n0\r\n\r\n"))
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        connection.sendall(mutated(rng, data) if rng.random() < 0.5 else data)
        connection.settimeout(0.05)
        try:
            answer = connection.recv(4096)
        except (TimeoutError, ConnectionResetError):
            return
    assert not answer.startswith(b"HTTP/1.1 500"), answer[:300]


def _model(folder: Path) -> Path:
    path = folder / "model.safetensors"
    if not path.exists():
        path.write_bytes(weights_bytes())
    return path


def _run_batch(source: Path, out: Path, model: Path) -> Any:
    config = WorkerConfig(model=str(model), device="cpu", options=DecodeOptions(num_steps=1))
    jobs = collect_jobs(str(source), OutputNaming(out=out))
    return run_batch(Batch(jobs=jobs, config=config, out=out, engine="local"), lambda result: None)


def hostile_batches(rng: Random, folder: Path) -> Iterator[Trial]:
    """One hostile file among good ones: the good ones are decoded."""
    model, good, number = _model(folder), latent_bytes(), 0

    def trial(data: bytes, name: str) -> None:
        source, out = folder / f"in{number}", folder / f"out{number}"
        source.mkdir()
        (source / "a.safetensors").write_bytes(good)
        (source / "z.safetensors").write_bytes(good)
        (source / name).write_bytes(data)
        report = _run_batch(source, out, model)
        done = {path.name for path in out.glob("[az]-*.png")} | {path.name for path in out.glob("[az].png")}
        assert {name[0] for name in done} == {"a", "z"}, (sorted(done), report.to_dict())
        json.loads((out / "pidecode-batch.json").read_text(encoding="utf-8"), parse_constant=_no_constant)

    while True:
        number += 1
        kind = rng.choice((good, image_bytes()))
        name = rng.choice(("m\x1b[2J", "m ü", "m", "m" * 200)) + (".safetensors" if kind is good else ".png")
        yield [partial(trial, mutated(rng, kind), name)]


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} in JSON")


@contextmanager
def _child(work: Callable[[], object]) -> Iterator[int]:
    """A forked process that does the work; what is left of it is killed."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            if not os.environ.get("ATTACK_DEBUG"):
                os.dup2(null, 2)
            work()
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)
    try:
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _finish(work: Callable[[], object]) -> float:
    """Run the work in a child to its end; returns the seconds it took."""
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException as error:
            print(repr(error), file=sys.stderr)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, "a run that was left alone did not end well"
    return time.monotonic() - began


def _kill_after(work: Callable[[], object], seconds: float) -> None:
    with _child(work):
        time.sleep(seconds)


def _pixels(folder: Path) -> dict[str, bytes]:
    return {path.name: np.asarray(Image.open(path)).tobytes() for path in sorted(folder.glob("*.png"))}


def killed_batches(rng: Random, folder: Path) -> Iterator[Trial]:
    """Kill -9 of a batch at any moment: each image is whole or absent, and the next run makes the rest, bit for bit."""
    model, source, whole, out = _model(folder), folder / "in", folder / "whole", folder / "out"
    source.mkdir()
    for index in range(16):
        generator = torch.Generator().manual_seed(index)
        Latent(torch.randn(1, 128, 4, 4, generator=generator), "flux2").save(source / f"{index:02}.safetensors")
    seconds = _finish(lambda: _run_batch(source, whole, model))
    expected = _pixels(whole)
    assert len(expected) == 16

    def trial() -> None:
        _kill_after(lambda: _run_batch(source, out, model), rng.uniform(0.02, 0.8) * seconds)
        if out.is_dir():
            found = _pixels(out)
            assert all(expected[name] == value for name, value in found.items())
            if len(found) < len(expected) and rng.random() < 0.5:
                return  # the next trial kills the run that goes on from here
        _finish(lambda: _run_batch(source, out, model))
        found = _pixels(out)
        remove_partial(out)  # a batch leaves those of the last minutes, which may belong to another process
        left = list(out.rglob("*.part"))
        shutil.rmtree(out)
        assert found == expected
        assert not left

    while True:
        yield [trial]


def killed_trainings(rng: Random, folder: Path) -> Iterator[Trial]:
    """Kill -9 of a training at any moment: it resumes, and ends with the very weights of a run left alone."""
    images, whole, out = folder / "images", folder / "whole", folder / "out"
    images.mkdir()
    for index in range(2):
        Image.radial_gradient("L").resize((64, 64)).rotate(90 * index).convert("RGB").save(images / f"{index}.png")
    settings = ["data.sizes=((32, 32),)", "run.sample_every=0", "run.log_every=1", "run.checkpoint_every=2",
                "net.patch_depth=1", "run.steps=20"]  # fmt: skip
    config = apply_settings(get_recipe("debug_direct"), [f"data.source={str(images)!r}", *settings])
    cpu = torch.device("cpu")
    seconds = _finish(lambda: train(config, whole, device=cpu))
    expected = load_file(whole / "decoder.safetensors")

    def trial() -> None:
        _kill_after(lambda: train(config, out, resume=True, device=cpu), rng.uniform(0.02, 0.9) * seconds)
        if not (out / "decoder.safetensors").exists() and rng.random() < 0.5:
            return  # the next trial kills the run that goes on from here
        _finish(lambda: train(config, out, resume=True, device=cpu))
        found, left = load_file(out / "decoder.safetensors"), list(out.rglob("*.part"))
        found = {name: value.clone() for name, value in found.items()}
        shutil.rmtree(out)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
        assert not left

    while True:
        yield [trial]
