# SPDX-License-Identifier: Apache-2.0
"""A batch on the workers of a Ray cluster: each holds a decoder, and what a dying one held goes to another."""

from __future__ import annotations

import os
import secrets
import socket
import warnings
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pidecode.batch.jobs import Job
from pidecode.batch.report import Outcome, Report
from pidecode.batch.run import Batch, Tally, Tell
from pidecode.batch.worker import Work, Worker
from pidecode.errors import FileError, MissingDependencyError, PidecodeError, SettingError

MOST_ATTEMPTS = 3
"""Workers that may die over one job before it counts as failed."""

PATIENCE = 60.0
"""Seconds without a single worker before a warning says so."""

_STARTS = 3
"""Attempts to start a private cluster."""

_STORE_BYTES = 100 * 2**20  # only paths and outcomes travel


class Hand:
    """One worker: a process somewhere on the cluster, with a decoder of its own."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        self.worker: Worker | None = None

    def open(self, token: str) -> str:
        """Load the decoder; returns the worker's name. `token` is a file that only a shared folder can show."""
        if not Path(token).is_file():
            raise FileError(
                f"Worker {self.name} does not see {Path(token).parent}. With Ray, the sources and the results must "
                "lie in folders that all machines share under the same path."
            )
        self.worker = Worker(self.work)
        return self.name

    def do(self, job: Job) -> Outcome:
        """Do one job."""
        assert self.worker is not None
        return replace(self.worker.do(job), worker=self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """What each worker gets of the cluster."""

    workers: int
    cpus: int
    gpus: int


def run_ray(batch: Batch, tell: Tell) -> Report:
    """Do the batch on a Ray cluster.

    Every job is done once: a worker that dies takes nothing with it, because results appear whole, and its job
    is given to another, which looks first whether it was finished.

    Raises MissingDependencyError without Ray, SettingError for a cluster that cannot be reached or is too small,
    and what loading the decoder raises.
    """
    tally = Tally(batch=_absolute(batch), tell=tell)
    try:
        pending = tally.sift()
        if pending:
            ray = _ray()
            ours = not ray.is_initialized()
            if ours:
                _connect(ray, batch)
            try:
                share = _share(ray, batch, len(pending))
                _Crew(ray=ray, tally=tally, queue=deque(pending), share=share).run()
            finally:
                if ours:
                    ray.shutdown()
    except KeyboardInterrupt:
        tally.interrupted = True
    return tally.report()


def _absolute(batch: Batch) -> Batch:
    """The batch with paths that mean the same in every process; the marks in the images do not depend on them."""

    def whole(path: Path) -> Path:
        return Path(os.path.abspath(path))

    jobs = [replace(job, source=whole(job.source), out=whole(job.out)) for job in batch.jobs]
    return replace(batch, jobs=jobs, out=whole(batch.out))


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions  # noqa: F401  # an attribute of ray only when imported
    except ImportError as error:
        raise MissingDependencyError('Ray is not installed: pip install "pidecode[ray]" brings it.') from error
    return ray


def _connect(ray: Any, batch: Batch) -> None:
    """Join the cluster asked for, or start one on this machine that ends with the batch."""
    address = batch.address or os.environ.get("RAY_ADDRESS") or "local"
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": True}
    if address == "local":
        quiet |= {
            "num_cpus": max(batch.workers or 1, os.cpu_count() or 1),
            "include_dashboard": False,
            "object_store_memory": _STORE_BYTES,
        }
    else:
        _knock(address)
    for attempt in range(_STARTS, 0, -1):
        try:
            ray.init(address=address, **quiet)
            return
        except Exception as error:  # Ray raises plain Exception when its processes do not come up in time
            if attempt > 1 and address == "local":  # a busy machine may need longer than Ray's half minute
                ray.shutdown()
                continue
            raise _unreachable(address, (str(error).splitlines() or [type(error).__name__])[0]) from error


def _knock(address: str) -> None:
    """Find out in seconds that nobody is there; Ray itself would try for minutes, and may end the process."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():  # "auto", or a name that Ray must resolve
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except OSError as error:
        raise _unreachable(address, f"{error.strerror or error}.") from error


def _unreachable(address: str, why: str) -> SettingError:
    if address == "local":
        return SettingError(f"Ray could not start on this machine: {why} Is it very busy, or out of memory?")
    return SettingError(
        f"The Ray cluster {address!r} cannot be reached: {why} Start one with `ray start --head`, or leave the "
        "address out for a private one on this machine."
    )


def _share(ray: Any, batch: Batch, jobs: int) -> Share:
    """How many workers, and what each may use. Raises SettingError for more than the cluster has."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    on_gpu = batch.work.device is None or not batch.work.device.startswith("cpu")
    gpus = int(sum(node.get("GPU", 0) for node in nodes)) if on_gpu else 0
    workers = batch.workers or gpus or len(nodes)
    if gpus and workers > gpus:
        raise SettingError(
            f"{workers} workers were asked for, and the cluster has {gpus} GPUs. Ask for fewer, or name --device cpu."
        )
    cpus = [int(node.get("CPU", 0)) for node in nodes]
    if workers > sum(cpus):
        raise SettingError(
            f"{workers} workers were asked for, and the cluster has {sum(cpus)} CPU cores; ask for less."
        )
    each = 1 if gpus else max(1, max(cpus) // -(-workers // len(nodes)))
    return Share(workers=min(workers, jobs), cpus=each, gpus=1 if gpus else 0)


@dataclass(slots=True, kw_only=True)
class _Crew:
    """The workers of one batch, what each is doing, and what is left to do."""

    ray: Any
    tally: Tally
    queue: deque[Job]
    share: Share
    busy: dict[Any, tuple[Any, Job | None]] = field(default_factory=dict)
    """Promise of a result -> the worker, and its job (None while it loads)."""
    deaths: Counter[str] = field(default_factory=Counter)
    token: Path = field(init=False)

    def run(self) -> None:
        """Work until the queue is empty and every job has come back; who is still loading then is sent home."""
        self.token = (self.tally.batch.out / f".shared-{secrets.token_hex(8)}.part").resolve()
        self.token.touch()
        try:
            for _ in range(self.share.workers):
                self._hire()
            self.tally.workers = self.share.workers
            while self.queue or any(job is not None for _, job in self.busy.values()):
                ready, _ = self.ray.wait(list(self.busy), num_returns=1, timeout=PATIENCE)
                if not ready and all(job is None for _, job in self.busy.values()):
                    warnings.warn(
                        f"No worker could start within {PATIENCE:.0f} seconds; the cluster may be busy. Still waiting.",
                        stacklevel=2,
                    )
                for promise in ready:
                    self._receive(promise)
        finally:
            self.token.unlink(missing_ok=True)
            for hand, _ in self.busy.values():
                self.ray.kill(hand)

    def _hire(self) -> None:
        """Start one more worker."""
        options = {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus, "max_restarts": 0}
        hand = self.ray.remote(**options)(Hand).remote(self.tally.batch.work)
        self.busy[hand.open.remote(str(self.token))] = (hand, None)

    def _receive(self, promise: Any) -> None:
        """Take what a worker brings, and give it the next job, or see that it died."""
        hand, job = self.busy.pop(promise)
        try:
            brought = self.ray.get(promise)
        except self.ray.exceptions.RayTaskError as error:  # it could not load; nor could another
            cause = error.cause if isinstance(error.cause, PidecodeError) else error
            raise cause from None
        except self.ray.exceptions.RayError:
            self._bury(hand, job)
            return
        if job is not None:
            self.tally.add(brought)
        if self.queue:
            following = self.queue.popleft()
            self.busy[hand.do.remote(following)] = (hand, following)
        else:
            self.ray.kill(hand)

    def _bury(self, hand: Any, job: Job | None) -> None:
        """A worker died: its job goes back to the front, and a new one takes its place."""
        self.tally.lost_workers += 1
        who = "" if job is None else job.name
        self.deaths[who] += 1
        tired = self.deaths[who] >= MOST_ATTEMPTS
        if job is None and tired:
            raise PidecodeError(
                f"{MOST_ATTEMPTS} workers died while they loaded the model. Is there memory for "
                f"{self.share.workers} of them? Ask for fewer (--workers)."
            )
        if job is not None and tired:
            why = f"Its worker died {MOST_ATTEMPTS} times, perhaps for want of memory. Decode it alone to see why."
            self.tally.add(Outcome(name=job.name, state="failed", seconds=0.0, error="WorkerDied", why=why))
        elif job is not None:
            self.queue.appendleft(job)
        if self.queue:
            self._hire()
