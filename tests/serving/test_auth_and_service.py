# SPDX-License-Identifier: Apache-2.0
"""Addresses, tokens, limits, memory estimates, and the command line."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from serving_kit import PATIENCE, image_bytes, latent_bytes, small_decoder

from benchmarks.memory import LiveBytes
from pidecode.cli.app import cli
from pidecode.errors import BusyError, Cancelled, DoesNotFitError, FileError, ImageError, LatentError, SettingError
from pidecode.latents.latent import Latent
from pidecode.serve.http import bound_socket, check_token, response_for
from pidecode.serve.prometheus import resident_memory
from pidecode.serve.schemas import DecodePlan, FileInfo, RequestLimits
from pidecode.serve.service import DecodeService, encode_preview, looks_like_safetensors, require_memory


@pytest.mark.parametrize(
    ("host", "local"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("192.168.1.4", False), ("box.lan", False)],
)  # fmt: skip
def test_only_loopback_needs_no_token(host: str, local: bool) -> None:
    if not local:
        with pytest.raises(SettingError, match="needs a token: set PIDECODE_TOKEN"):
            check_token(host, None)
    else:
        check_token(host, None)
    check_token(host, "sixteen-letters!")


@pytest.mark.parametrize("token", ["short", "sixteen letters and", "sechzehn-zeichen-ü"])
def test_a_token_that_could_be_guessed_or_mangled_is_refused(token: str) -> None:
    with pytest.raises(SettingError, match="at least 16 printable ASCII"):
        check_token("127.0.0.1", token)


def test_a_port_in_use_and_a_foreign_address_are_errors() -> None:
    with bound_socket("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(SettingError, match="cannot be used: .* Choose another port"):
            bound_socket("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(SettingError, match="not an address of this machine"):
        bound_socket("256.1.1.1", 0)


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (BusyError("full", 1.2), 429),
        (Cancelled("late"), 503),
        (DoesNotFitError("large"), 507),
        (SettingError("no"), 400),
        (LatentError("no"), 400),
        (ImageError("no"), 400),
        (RuntimeError("secret path /home/me"), 500),
    ],
)
def test_every_error_has_its_status_and_unknown_ones_reveal_nothing(error: Exception, status: int) -> None:
    answer = response_for(error)
    assert answer.status_code == status
    assert b"/home/me" not in bytes(answer.body)
    if isinstance(error, BusyError):
        assert answer.headers["Retry-After"] == "2"


def test_limits_are_checked() -> None:
    with pytest.raises(SettingError, match="pixels is 0"):
        RequestLimits(pixels=0)
    with pytest.raises(SettingError, match="waiting is -1"):
        RequestLimits(waiting=-1)


def test_a_server_needs_a_model() -> None:
    with pytest.raises(SettingError, match="There is no model to serve"):
        DecodeService({})


def test_a_plan_grows_with_the_image_and_refuses_what_cannot_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = small_decoder()
    service = DecodeService({"small": decoder})

    def estimate(side: int) -> DecodePlan:
        return service.plan(None, FileInfo(kind="latent", width=1, height=1), (side, side))

    small, large = estimate(64), estimate(256)
    assert large.working > 10 * small.working
    assert large.working == decoder.runner.plan_for((256, 256), 1).working
    with LiveBytes() as live:
        decoder.decode(Latent(torch.zeros(1, 128, 4, 4), "flux2", 0.0), num_steps=2)
    assert large.working == pytest.approx(live.peak, rel=0.1)
    assert small.weights == sum(value.numel() * 4 for value in decoder.net.parameters())
    assert estimate(4).working == small.working  # a tiny image is padded
    assert small.fits
    require_memory(decoder.runner, (64, 64), 1)
    monkeypatch.setattr("pidecode.engine.runner.free_memory", lambda device: 1000)
    with pytest.raises(DoesNotFitError, match=r"256x256 pixels needs about .* and 1\.0 kB are free"):
        require_memory(decoder.runner, (256, 256), 1)
    resident = resident_memory()
    assert resident is None or resident > 10**7


def test_the_service_inspects_files() -> None:
    service = DecodeService({"small": small_decoder()})
    assert service.inspect(image_bytes(20, 30)) == FileInfo(kind="image", width=20, height=30)
    found = service.inspect(latent_bytes(2, 3, prompt=["a cat"]))
    assert found == FileInfo(kind="latent", width=3, height=2, space="flux2", sigma=0.0, prompt="a cat")
    assert (service.plan(None, found).width, service.plan(None, found).height) == (192, 128)
    assert service.plan(None, FileInfo(kind="image", width=20, height=30)).height == 120
    with pytest.raises(ImageError):
        service.inspect(b"nothing")
    with pytest.raises(FileError, match="truncated"):
        service.inspect(latent_bytes()[:-3])
    assert not looks_like_safetensors(b"")


def test_a_latent_is_read_from_bytes_as_from_a_file(tmp_path: Path) -> None:
    data = latent_bytes(2, 1, prompt=["a dog"])
    (tmp_path / "latent.safetensors").write_bytes(data)
    from_bytes, from_file = Latent.load(data), Latent.load(tmp_path / "latent.safetensors")
    assert torch.equal(from_bytes.tensor, from_file.tensor)
    assert (from_bytes.prompt, from_bytes.seed) == (from_file.prompt, from_file.seed) == ("a dog", 7)
    with pytest.raises(LatentError, match=r"The latent file holds a latent of space flux2, not sdxl\."):
        Latent.load(data, space="sdxl")
    with pytest.raises(FileError, match="is cut off"):
        Latent.load(data[:40])


def test_a_long_inspection_keeps_no_job_from_being_stopped() -> None:
    service, inspected = DecodeService({"small": small_decoder()}), threading.Event()
    service.inspections.submit(lambda _: inspected.wait(PATIENCE))
    stopping = threading.Thread(target=service.stop, args=(0,))
    stopping.start()
    until = time.monotonic() + 2
    while not service.queue.closed and time.monotonic() < until:
        time.sleep(0.01)
    closed = service.queue.closed
    inspected.set()
    stopping.join(PATIENCE)
    assert closed


def test_a_preview_is_a_small_jpeg() -> None:
    data = encode_preview(torch.rand(1, 3, 100, 896) * 2 - 1)
    assert data[:2] == b"\xff\xd8"
    assert DecodeService({"small": small_decoder()}).inspect(data).width == 448


def test_the_command_refuses_an_open_address_before_it_loads_anything() -> None:
    result = CliRunner(env={"PIDECODE_TOKEN": ""}).invoke(
        cli, ["serve", "--host", "0.0.0.0", "--model", "no such model"]
    )
    assert result.exit_code == 2
    assert "needs a token" in result.output


def test_the_command_refuses_a_missing_token_file(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["serve", "--token-file", str(tmp_path / "none")])
    assert result.exit_code == 4
    assert "cannot be read" in result.output


@pytest.mark.slow
def test_the_command_serves_and_stops_on_a_signal(tmp_path: Path) -> None:
    weights = tmp_path / "small.safetensors"
    _write_weights(weights)
    command = [sys.executable, "-m", "pidecode", "serve", "--port", "0", "--device", "cpu", "--model", str(weights)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("Serving on http://127.0.0.1:")
        url = line.split()[2]
        with urllib.request.urlopen(f"{url}/v1/models", timeout=PATIENCE) as answer:
            assert json.load(answer)["data"][0]["id"] == "small"
        request = urllib.request.Request(f"{url}/v1/decode?num_steps=1", latent_bytes(), method="POST")
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            assert answer.read(4) == b"\x89PNG"
        process.send_signal(signal.SIGTERM)
        process.wait(PATIENCE)
        with pytest.raises(OSError), socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), 1):
            pass
    finally:
        process.kill()
        process.communicate()


def _write_weights(path: Path) -> None:
    from safetensors.torch import save_file

    decoder = small_decoder()
    save_file(dict(decoder.net.state_dict()), str(path), decoder.metadata.to_metadata())


@pytest.mark.parametrize("written", [b"\xef\xbb\xbfsixteen-letters!\r\n", "sixteen-letters!\n".encode("utf-16")])
def test_a_token_as_windows_writes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: bytes) -> None:
    from pidecode.cli.serve import read_token

    file = tmp_path / "token.txt"
    file.write_bytes(written)
    assert read_token(file) == "sixteen-letters!"
    monkeypatch.setenv("PIDECODE_TOKEN", "\ufeffsixteen-letters!\r")
    assert read_token(None) == "sixteen-letters!"
