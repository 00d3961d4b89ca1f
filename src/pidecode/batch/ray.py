# SPDX-License-Identifier: Apache-2.0
"""A batch on a Ray cluster: each worker holds a decoder, and the job of a worker that dies goes to another."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pidecode.batch.jobs import BatchJob
from pidecode.batch.report import BatchReport, JobResult
from pidecode.batch.run import Batch, BatchProgress, ResultCallback
from pidecode.batch.worker import Worker, WorkerConfig
from pidecode.errors import FileError, MissingDependencyError, PidecodeError, SettingError
from pidecode.files import PART

MAX_ATTEMPTS = 3  # workers that may die over one job before it counts as failed
START_WARNING_AFTER = 60.0  # seconds without a single worker before a warning says so

HEAD_CHECK, HEAD_TIMEOUT, LEAVE_TIMEOUT = 2.0, 30.0, 10.0
"""Seconds between looks at the cluster's head, without it until the batch ends, and to leave a cluster without it. Ray
ends the process after 60 seconds without its head; what is to be said must be said before."""

_START_ATTEMPTS = 3  # attempts to start a private cluster
_OBJECT_STORE_BYTES = 100 * 2**20  # only paths and results travel


class RayWorker:
    """A Ray actor: a process on the cluster with a decoder of its own."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.worker: Worker | None = None

    def load(self, token: str) -> str:
        """Load the decoder; returns the worker's name. `token` is a file that only a shared output folder has."""
        if not Path(token).is_file():
            raise FileError(
                f"Worker {self.name} does not see {Path(token).parent}. With Ray, sources and outputs must be in "
                "folders that all machines share under the same path."
            )
        self.worker = Worker(self.config)
        return self.name

    def process(self, job: BatchJob) -> JobResult:
        """Process one job."""
        assert self.worker is not None
        return replace(self.worker.process(job), worker=self.name)


def run_ray(batch: Batch, on_result: ResultCallback) -> BatchReport:
    """Process the batch on a Ray cluster.

    The job of a worker that dies is given to another one, which checks first whether it was finished. If the cluster's
    head is lost, also if another one takes its place, the report says so; the next run goes on.

    Raises:
        MissingDependencyError: Ray is not installed.
        SettingError: The cluster cannot be reached or is too small.
        PidecodeError: The decoder cannot be loaded.
    """
    # Paths that mean the same in every process; fingerprints do not depend on them.
    jobs = [replace(job, source=job.source.absolute(), out=job.out.absolute()) for job in batch.jobs]
    batch = replace(batch, jobs=jobs, out=batch.out.absolute())
    progress = BatchProgress(batch, on_result)
    try:
        if pending := progress.pending():
            ray = _import_ray()
            started_here = not ray.is_initialized()
            if started_here:
                _connect(ray, batch)
            try:
                workers, resources = _resources(ray, batch, len(pending))
                _WorkerPool(ray, progress, deque(pending), workers, resources).run()
            except Exception as error:
                of_ray = isinstance(error, ConnectionError) or type(error).__module__.partition(".")[0] == "ray"
                if isinstance(error, PidecodeError) or not of_ray:
                    raise
                why = (str(error).splitlines() or [""])[0].partition(". ")[0][:200]
                progress.report.stopped = f"The Ray cluster was lost ({why}). The images that were written are whole."
            finally:
                if started_here:
                    _leave(ray, lost=progress.report.stopped is not None)
    except KeyboardInterrupt:
        progress.report.interrupted = True
    return progress.end()


def _leave(ray: Any, *, lost: bool) -> None:
    """Disconnect; from a cluster that was lost in the background, as Ray may wait for its answer."""
    leaving = threading.Thread(target=ray.shutdown, name="ray-shutdown", daemon=True)
    leaving.start()
    leaving.join(LEAVE_TIMEOUT if lost else None)


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions  # noqa: F401  # an attribute of ray only when imported
    except ImportError as error:
        raise MissingDependencyError('Ray is not installed; install it with: pip install "pidecode[ray]".') from error
    return ray


def _connect(ray: Any, batch: Batch) -> None:
    """Join the cluster asked for, or start one on this machine that ends with the batch."""
    address = batch.address or os.environ.get("RAY_ADDRESS") or "local"
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address == "local":
        options |= {
            "num_cpus": max(batch.workers or 1, os.cpu_count() or 1), "include_dashboard": False,
            "object_store_memory": _OBJECT_STORE_BYTES,
        }  # fmt: skip
    elif why := _refusal(address):  # Ray itself would try for minutes, and may end the process
        raise _unreachable(address, why)
    for attempt in range(_START_ATTEMPTS, 0, -1):
        try:
            ray.init(address=address, **options)
            return
        except Exception as error:  # Ray raises plain Exception when its processes do not come up in time
            if attempt > 1 and address == "local":  # a busy machine may need longer than Ray's half minute
                ray.shutdown()
                continue
            raise _unreachable(address, (str(error).splitlines() or [type(error).__name__])[0]) from error


def _refusal(address: str) -> str | None:
    """Why nothing can be connected to at an address; None if something listens."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # "auto", or a name that Ray must resolve
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        return f"{error.strerror or error}."
    return None


def _unreachable(address: str, why: str) -> SettingError:
    if address == "local":
        return SettingError(f"Ray could not start on this machine: {why} Is it very busy, or out of memory?")
    return SettingError(
        f"The Ray cluster {address!r} cannot be reached: {why} Start one with `ray start --head`, or leave the "
        "address out for a private one on this machine."
    )


def _resources(ray: Any, batch: Batch, jobs: int) -> tuple[int, dict[str, int]]:
    """How many workers to start, and what each may use; SettingError for more than the cluster has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    on_gpu = batch.config.device is None or not batch.config.device.startswith("cpu")
    gpus = int(sum(node.get("GPU", 0) for node in nodes)) if on_gpu else 0
    workers = batch.workers or gpus or len(nodes)
    if gpus and workers > gpus:
        raise SettingError(
            f"{workers} workers were asked for, and the cluster has {gpus} GPUs. Ask for fewer, or use --device cpu."
        )
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if workers > sum(cpus):
        raise SettingError(
            f"{workers} workers were asked for, and the cluster has {sum(cpus)} CPU cores; ask for fewer."
        )
    each = 1 if gpus else max(1, max(cpus) // -(-workers // len(nodes)))
    return min(workers, jobs), {"num_cpus": each, "num_gpus": 1 if gpus else 0}


class _Head:
    """The head of the cluster as this process sees it."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.checked = self.answered = time.monotonic()

    def check(self) -> None:
        """Raise ConnectionError if nothing has answered there for HEAD_TIMEOUT; looks every HEAD_CHECK."""
        if time.monotonic() - self.checked < HEAD_CHECK:
            return
        there, self.checked = _refusal(self.address) is None, time.monotonic()
        if there:
            self.answered = self.checked
        elif self.checked - self.answered > HEAD_TIMEOUT:
            raise ConnectionError(f"nothing answers at {self.address}")

    def call(self, function: Callable[[], None]) -> None:
        """Call a function of Ray that waits for the head, without end if there is none; raises as `check` does."""
        result: Future[None] = Future()

        def run() -> None:
            try:
                function()
                result.set_result(None)
            except BaseException as error:
                result.set_exception(error)

        threading.Thread(target=run, name="ray-call", daemon=True).start()
        while not wait([result], timeout=HEAD_CHECK).done:
            self.check()
        result.result()


@dataclass(slots=True)
class _WorkerPool:
    """The workers of one batch, the job of each, and the queue."""

    ray: Any
    progress: BatchProgress
    queue: deque[BatchJob]
    workers: int
    resources: dict[str, int]  # of each worker, as Ray names them
    # Ray's future of a result -> the worker and its job (None while it loads its decoder).
    busy: dict[Any, tuple[Any, BatchJob | None]] = field(default_factory=dict)
    # Worker deaths by the name of the job they worked on, "" while they loaded.
    deaths: Counter[str] = field(default_factory=Counter)
    token: Path = field(init=False)  # file that shows a worker whether it sees the output folder
    head: _Head = field(init=False)

    def run(self) -> None:
        """Work until the queue is empty and every job has its result; workers that still load then are stopped."""
        self.token = (self.progress.batch.out / f".shared.{secrets.token_hex(4)}{PART}").resolve()
        self.token.touch()
        self.head = _Head(self.ray.get_runtime_context().gcs_address)
        try:
            for _ in range(self.workers):
                self._start_worker()
            self.progress.report.workers = self.workers
            began, warn_at = time.monotonic(), START_WARNING_AFTER
            while self.queue or any(job is not None for _, job in self.busy.values()):
                ready, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=HEAD_CHECK)
                loading = not ready and all(job is None for _, job in self.busy.values())
                if loading and time.monotonic() - began > warn_at:
                    why = f"No worker could start within {warn_at:.0f} seconds; the cluster may be busy. Still waiting."
                    warnings.warn(why, stacklevel=2)
                    warn_at += START_WARNING_AFTER
                self.head.check()
                for future in ready:
                    self._handle(future)
        finally:
            self.token.unlink(missing_ok=True)
            with suppress(Exception):  # of a cluster that was lost
                for worker, _ in self.busy.values():
                    self.ray.kill(worker)

    def _start_worker(self) -> None:
        def start() -> None:
            worker = self.ray.remote(**self.resources, max_restarts=0)(RayWorker).remote(self.progress.batch.config)
            self.busy[worker.load.remote(str(self.token))] = (worker, None)

        self.head.call(start)

    def _handle(self, future: Any) -> None:
        """Record the result of a worker and give it the next job; or replace it if it died."""
        worker, job = self.busy.pop(future)
        try:
            result = self.ray.get(future)
        except self.ray.exceptions.RayTaskError as error:  # it could not load the decoder; nor could another
            cause = error.cause if isinstance(error.cause, PidecodeError) else error
            raise cause from None
        except self.ray.exceptions.RayError:
            self._replace_worker(job)
            return
        if job is not None:
            self.progress.add(result)
        if self.queue:
            following = self.queue.popleft()
            self.busy[worker.process.remote(following)] = (worker, following)
        else:
            self.ray.kill(worker)

    def _replace_worker(self, job: BatchJob | None) -> None:
        """Put the job of a worker that died at the front of the queue, and start a new worker."""
        self.progress.report.lost_workers += 1
        name = "" if job is None else job.name
        self.deaths[name] += 1
        give_up = self.deaths[name] >= MAX_ATTEMPTS
        if job is None and give_up:
            raise PidecodeError(
                f"{MAX_ATTEMPTS} workers died while they loaded the model. Is there memory for "
                f"{self.workers} of them? Ask for fewer, workers=N."
            )
        if give_up:
            message = f"Its worker died {MAX_ATTEMPTS} times, perhaps out of memory. Decode it alone to see why."
            self.progress.add(JobResult(name=name, state="failed", seconds=0.0, error="WorkerDied", message=message))
        elif job is not None:
            self.queue.appendleft(job)
        if self.queue:
            self._start_worker()
