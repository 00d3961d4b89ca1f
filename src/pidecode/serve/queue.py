# SPDX-License-Identifier: Apache-2.0
"""One device, one worker, a short line of jobs: bounded, cancellable, and stopped without losing anyone.

The queue knows nothing of images or of HTTP. Work is a function of its job, run on the queue's own thread; it
calls `job.check()` or `job.report()` now and then, which is where a cancelled job ends.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from pidecode.errors import BusyError, Cancelled, PidecodeError

log = logging.getLogger(__name__)

State = Literal["waiting", "running", "done", "failed", "cancelled"]
ENDED: tuple[State, ...] = ("done", "failed", "cancelled")
Work = Callable[["Job"], Any]

FIRST_GUESS = 5.0
"""Seconds a job is believed to take before any has been measured."""
REMEMBERED = 16
"""Recent jobs whose durations make the estimate."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """A job as it stands: its state, its place in the line (1 is next), and how far the work is."""

    state: State
    place: int = 0
    done: int = 0
    total: int = 0
    note: str = ""
    preview: bytes | None = None


class Job:
    """A piece of work in the line. Safe to use from any thread."""

    def __init__(self, work: Work, queue: JobQueue, *, limit: float | None) -> None:
        self.id = secrets.token_urlsafe(12)
        self.created = time.monotonic()
        self.started: float | None = None
        self.ended: float | None = None
        self.deadline = None if limit is None else self.created + limit
        self._work: Work | None = work
        self._queue = queue
        self._glimpse = JobStatus(state="waiting")
        self._reason: str | None = None
        self._result: Any = None
        self._error: BaseException | None = None
        self._listeners: list[Callable[[], None]] = []
        self._over = threading.Event()

    @property
    def state(self) -> State:
        """Where it stands; "done", "failed" and "cancelled" are final."""
        return self._glimpse.state

    @property
    def over(self) -> bool:
        """Whether it has ended, one way or another."""
        return self._over.is_set()

    @property
    def status(self) -> JobStatus:
        """State, place, progress and the newest preview."""
        return self._queue._look(self)

    @property
    def late(self) -> bool:
        """Whether its time is up."""
        return self.deadline is not None and time.monotonic() > self.deadline

    def cancel(self, reason: str = "The job was cancelled.") -> None:
        """Leave the line at once, or stop at the next check if running. Does nothing once it has ended."""
        self._queue._cancel(self, reason)

    def check(self) -> None:
        """Called by the work: raises Cancelled if the job is to stop."""
        if self.late and self._reason is None:
            self._reason = self._queue.too_late
        if self._reason is not None:
            raise Cancelled(self._reason)

    def report(self, *, done: int = 0, total: int = 0, note: str = "", preview: bytes | None = None) -> None:
        """Called by the work: say how far it is. Raises Cancelled if the job is to stop."""
        self.check()
        kept = preview if preview is not None else self._glimpse.preview
        self._glimpse = JobStatus(state="running", done=done, total=total, note=note, preview=kept)
        self._tell()

    def result(self) -> Any:
        """What the work returned. Raises what it raised, or Cancelled; only once it is over."""
        assert self.over, "the job has not ended"
        if self._error is not None:
            raise self._error
        return self._result

    def wait(self, timeout: float | None = None) -> bool:
        """Block until it is over; False if that took longer than `timeout` seconds."""
        return self._over.wait(timeout)

    async def changes(self) -> AsyncIterator[JobStatus]:
        """Its glimpses as they come, from now to the last. A slow reader misses some, never the last."""
        news, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the reader's loop is gone, and the reader with it
                loop.call_soon_threadsafe(news.set)

        self._listeners.append(wake)
        try:
            while True:
                news.clear()
                over, seen = self.over, self.status
                yield seen
                if over:
                    return
                left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
                try:
                    await asyncio.wait_for(news.wait(), left)
                except TimeoutError:
                    self.cancel(self._queue.too_late)
                    self.deadline = None  # told once; a running job now stops at its next check
        finally:
            self._listeners.remove(wake)

    async def finished(self) -> Any:
        """Wait for the end, then as `result`."""
        async for _ in self.changes():
            pass
        return self.result()

    def _tell(self) -> None:
        for listener in tuple(self._listeners):
            listener()

    def _end(self, state: State, *, result: Any = None, error: BaseException | None = None) -> None:
        self._result, self._error = result, error
        self._work = None  # it may hold an image; the queue keeps nothing of a finished job
        self.ended = time.monotonic()
        last = self._glimpse
        self._glimpse = JobStatus(state=state, done=last.done, total=last.total)
        self._over.set()
        self._tell()


@dataclass(slots=True)
class Tally:
    """What a queue has seen since it was made."""

    accepted: int = 0
    refused: int = 0
    done: int = 0
    failed: int = 0
    cancelled: int = 0
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=REMEMBERED))
    """Seconds that recent jobs ran."""


class JobQueue:
    """The line in front of one device.

    capacity: jobs that may wait besides the one that runs; what comes on top is refused with BusyError.
    limit: seconds a job may take from its arrival to its end, or None.
    """

    def __init__(self, capacity: int = 8, *, limit: float | None = None) -> None:
        self.capacity = capacity
        self.limit = limit
        self.tally = Tally()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._changed = threading.Condition()
        self._closed = False
        self._worker: threading.Thread | None = None

    @property
    def too_late(self) -> str:
        """The sentence for a job whose time is up."""
        return (
            f"The job took longer than the {self.limit or 0:g} seconds it may take, waiting included; it was stopped."
        )

    @property
    def waiting(self) -> int:
        """Jobs in the line, without the running one."""
        return len(self._waiting)

    @property
    def running(self) -> bool:
        """Whether the device is busy."""
        return self._running is not None

    @property
    def closed(self) -> bool:
        """Whether it takes no more jobs."""
        return self._closed

    @property
    def places(self) -> int:
        """Jobs that would be taken now."""
        return 0 if self._closed else self.capacity + 1 - len(self._waiting) - (self._running is not None)

    def estimate(self) -> float:
        """Seconds until a newcomer would have a place in the line, by the recent jobs."""
        recent = self.tally.recent
        return sum(recent) / len(recent) if recent else FIRST_GUESS

    def submit(self, work: Work) -> Job:
        """Put work at the end of the line. Raises BusyError if the line is full or closed."""
        with self._changed:
            if self._closed:
                self.tally.refused += 1
                raise BusyError("The server is stopping and takes no new jobs; ask again when it is back.", 10.0)
            if not self.places:
                self.tally.refused += 1
                raise BusyError(
                    f"The line is full: {len(self._waiting)} jobs wait and one runs. Ask again in a little while.",
                    self.estimate(),
                )
            job = Job(work, self, limit=self.limit)
            self._waiting.append(job)
            self.tally.accepted += 1
            if self._worker is None:
                self._worker = threading.Thread(target=self._run, name="pidecode-queue", daemon=True)
                self._worker.start()
            self._changed.notify_all()
        return job

    def stop(self, grace: float = 0.0) -> None:
        """Take no more jobs, cancel those waiting, give the running one `grace` seconds, then end the worker.

        Work that never checks its job is waited for: a device call cannot be broken off halfway.
        """
        with self._changed:
            self._closed = True
            left, running = list(self._waiting), self._running
            self._changed.notify_all()
        for job in left:
            job.cancel("The server is stopping; the job was not begun.")
        if running is not None and not running.wait(grace):
            running.cancel("The server is stopping; the job was broken off.")
        if self._worker is not None:
            self._worker.join()

    def _look(self, job: Job) -> JobStatus:
        seen = job._glimpse
        if seen.state != "waiting":
            return seen
        with self._changed:
            place = self._waiting.index(job) + 1 if job in self._waiting else 0
        return JobStatus(state="waiting", place=place)

    def _cancel(self, job: Job, reason: str) -> None:
        with self._changed:
            if job.over or job._reason is not None:
                return
            job._reason = reason
            if job not in self._waiting:
                return
            self._waiting.remove(job)
            self.tally.cancelled += 1
            behind = list(self._waiting)
        job._end("cancelled", error=Cancelled(reason))
        for other in behind:
            other._tell()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
                behind = list(self._waiting)
            for other in behind:
                other._tell()
            self._perform(job)
            del job, behind  # nothing of the job is kept while the thread sleeps

    def _perform(self, job: Job) -> None:
        assert job._work is not None
        job.started = time.monotonic()
        state: State = "done"
        result: Any = None
        error: BaseException | None = None
        try:
            job.report()
            result = job._work(job)
        except Cancelled as caught:
            state, error = "cancelled", caught
        except BaseException as caught:
            state, error = "failed", caught
            if not isinstance(caught, PidecodeError):
                log.exception("A job failed unexpectedly.")
        with self._changed:
            self._running = None
            setattr(self.tally, state, getattr(self.tally, state) + 1)
            if state == "done":
                self.tally.recent.append(time.monotonic() - job.started)
        if error is not None:
            error = error.with_traceback(None)  # frames would keep the job's tensors alive
        job._end(state, result=result, error=error)
