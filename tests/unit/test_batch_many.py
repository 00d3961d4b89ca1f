# SPDX-License-Identifier: Apache-2.0
"""Batches on several processes: torchrun, and a real local Ray whose worker or head is killed midway."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from pidecode.batch.jobs import OutputNaming, collect_jobs
from pidecode.batch.report import BatchReport, JobResult
from pidecode.batch.run import Batch, run_batch
from pidecode.batch.worker import WorkerConfig
from pidecode.errors import CheckpointError, MissingDependencyError, SettingError
from pidecode.files import remove_partial
from pidecode.latents.latent import Latent
from pidecode.options import DecodeOptions
from pidecode.registry.configs import debug_config
from random_networks import save_student

FLUX2 = debug_config(text_dim=0, latent_channels=128, latent_down=16, latent_unpatchify=2, prediction="x0")
MANY = 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_student(FLUX2, tmp_path_factory.mktemp("model") / "small.safetensors", space="flux2")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of latents, one of them broken."""
    folder = tmp_path_factory.mktemp("latents")
    for index in range(MANY):
        noise = torch.randn(1, 128, 2, 2, generator=torch.Generator().manual_seed(index))
        Latent(noise, "flux2").save(folder / f"{index:02d}.safetensors")
    (folder / "broken.safetensors").write_bytes(b"nonsense")
    return folder


@pytest.fixture(scope="module")
def plain(source: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of them."""
    out = tmp_path_factory.mktemp("plain")
    run_batch(batch_of(source, out, model), lambda _: None)
    return out


def batch_of(source: Path, out: Path, model: Path) -> Batch:
    jobs = collect_jobs(source, OutputNaming(out=out))
    return Batch(
        jobs=jobs, config=WorkerConfig(model=str(model), device="cpu", options=DecodeOptions(num_steps=2)), out=out
    )


def assert_same_images(one: Path, other: Path) -> None:
    names = sorted(path.name for path in one.glob("*.png"))
    assert names == sorted(path.name for path in other.glob("*.png"))
    assert len(names) == MANY
    for name in names:
        with Image.open(one / name) as a, Image.open(other / name) as b:
            first, second = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in (a, b))
        assert (first - second).abs().max() <= 1, name


@pytest.mark.slow
def test_torchrun_divides_the_jobs_and_resumes(source: Path, model: Path, plain: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-addr=127.0.0.1",
        "--master-port=29613", "-m", "pidecode", "batch", str(source), str(out), "-m", str(model), "--device", "cpu",
        "--num-steps", "2", "--json",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "GLOO_SOCKET_IFNAME": "lo"}
    first = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert first.returncode == 1, first.stderr  # one latent is broken
    report = json.loads(first.stdout)
    assert (report["done"], report["failed"], report["left"], report["workers"]) == (MANY, 1, 0, 2)
    assert report["engine"] == "torchrun"
    assert_same_images(plain, out)
    (out / "03.png").unlink()
    again = json.loads(subprocess.run(command, capture_output=True, text=True, check=False, env=environment).stdout)
    assert (again["done"], again["skipped"], again["failed"]) == (1, MANY - 1, 1)


def ray_batch(source: Path, out: Path, model: Path, workers: int = 2) -> Batch:
    return replace(batch_of(source, out, model), engine="ray", workers=workers, address="local")


@pytest.fixture
def _quiet_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    for name, value in {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.mark.slow
@pytest.mark.usefixtures("_quiet_ray")
@pytest.mark.filterwarnings("default")
def test_ray_completes_every_job_once_when_a_worker_is_killed(
    source: Path, model: Path, plain: Path, tmp_path: Path
) -> None:
    import ray

    out = tmp_path / "out"
    pids: set[int] = set()
    killed: list[int] = []

    def on_result(result: JobResult) -> None:
        if result.worker is None:
            return
        own = int(result.worker.rpartition(":")[2])
        pids.add(own)
        others = pids - {own}
        if not killed and others:  # the other one is in the middle of a job
            killed.append(others.pop())
            os.kill(killed[0], signal.SIGKILL)

    report = run_batch(ray_batch(source, out, model), on_result)
    assert not ray.is_initialized()
    assert report is not None
    assert killed
    assert report.lost_workers == 1
    assert len(pids) >= 2  # the two, and perhaps the one that took the dead one's place: it may come too late
    names = Counter(result.name for result in report.results)
    assert set(names.values()) == {1}
    assert len(names) == MANY + 1
    assert [failure.name for failure in report.failures] == ["broken.safetensors"]
    assert_same_images(plain, out)
    assert not [path for path in out.iterdir() if path.name.startswith(".shared-")]
    again = run_batch(ray_batch(source, out, model), lambda _: None)
    assert again is not None
    assert (again.count("done"), again.count("skipped"), again.count("failed")) == (0, MANY, 1)


@pytest.mark.slow
@pytest.mark.usefixtures("_quiet_ray")
@pytest.mark.filterwarnings("default")
def test_ray_raises_the_error_of_a_model_that_cannot_load(source: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    save_file({"x": torch.zeros(1)}, bad)
    began = time.perf_counter()
    with pytest.raises(CheckpointError):
        run_batch(ray_batch(source, tmp_path / "out", bad, workers=1), lambda _: None)
    assert time.perf_counter() - began < 120


def test_ray_is_imported_only_when_there_is_work(
    source: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(MissingDependencyError, match=r"pidecode\[ray\]"):
        run_batch(ray_batch(source, tmp_path / "out", model), lambda _: None)
    only = replace(ray_batch(source, tmp_path / "o", model), jobs=[])
    report: BatchReport | None = run_batch(only, lambda _: None)
    assert report is not None
    assert report.complete


@pytest.mark.usefixtures("_quiet_ray")
@pytest.mark.filterwarnings("default")
def test_an_unreachable_cluster_is_named(source: Path, model: Path, tmp_path: Path) -> None:
    batch = replace(ray_batch(source, tmp_path / "out", model), address="127.0.0.1:1")
    with pytest.raises(SettingError, match="Ray cluster '127.0.0.1:1' cannot be reached"):
        run_batch(batch, lambda _: None)


def _processes_of(pid: int) -> list[int]:
    """A process and all below it, on Linux."""
    below = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii").split()
    return [pid, *(inner for child in below for inner in _processes_of(int(child)))]


def _listens(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


@contextmanager
def _ray_head(port: int) -> Iterator[None]:
    """The head of a Ray cluster on this machine, killed with kill -9 at the end."""
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={port}", "--num-cpus=2",
        "--include-dashboard=false", "--object-store-memory=100000000",
    ]  # fmt: skip
    head = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.monotonic() + 60
        while not _listens(port):
            assert head.poll() is None
            assert time.monotonic() < until, "Ray's head does not come up."
            time.sleep(0.2)
        yield
    finally:
        for pid in _processes_of(head.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        head.wait()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.usefixtures("_quiet_ray")
@pytest.mark.parametrize("restarted", [True, False])
def test_a_lost_head_ends_a_ray_batch_with_a_report_and_the_same_command_goes_on(
    *, source: Path, model: Path, plain: Path, tmp_path: Path, restarted: bool
) -> None:
    out = tmp_path / "out"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "pidecode", "batch", str(source), str(out), "-m", str(model), "--device", "cpu",
        "--num-steps", "2", "--engine", "ray", "--ray-address", f"127.0.0.1:{port}", "--workers", "2",
    ]  # fmt: skip
    with _ray_head(port):
        batch = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until = time.monotonic() + 150
        while not list(out.glob("*.png")):
            assert batch.poll() is None
            assert time.monotonic() < until, "No worker came up."
            time.sleep(0.1)
    with _ray_head(port) if restarted else nullcontext():
        text, errors = batch.communicate(timeout=90)
    assert batch.returncode == 1, errors
    assert "The Ray cluster was lost (" in text, errors
    assert "left; the same command resumes." in text
    assert "Traceback" not in errors
    assert json.loads((out / "pidecode-batch.json").read_bytes())["left"] > 0
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("*.png")}
    with _ray_head(port):
        again = subprocess.run(command, capture_output=True, text=True, check=False, timeout=180)
    assert again.returncode == 1, again.stderr  # one latent is broken
    assert f"{MANY - len(written)} of {MANY + 1} done, {len(written)} skipped" in again.stdout
    assert {name: (out / name).stat().st_mtime_ns for name in written} == written
    assert_same_images(plain, out)
    remove_partial(out)  # a batch leaves those of the last minutes, which may belong to another process
    assert not list(out.glob(".*.part"))
