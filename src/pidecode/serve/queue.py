# SPDX-License-Identifier: Apache-2.0
"""A bounded job queue with one worker thread for one device: jobs can be cancelled, timed out and drained.

The queue knows nothing of images or of HTTP. A job is a function that runs on the worker thread and calls `job.check()`
or `job.report()` regularly; that is where a cancelled job ends.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent import futures
from contextlib import suppress
from dataclasses import dataclass, field, replace
from statistics import mean
from typing import Any, Literal

from pidecode.errors import OUT_OF_MEMORY, BusyError, Cancelled, DoesNotFitError, PidecodeError, is_out_of_memory

log = logging.getLogger(__name__)

DecodeJobState = Literal["waiting", "running", "done", "failed", "cancelled"]
JobFunction = Callable[["DecodeJob"], Any]

DEFAULT_JOB_SECONDS = 5.0  # assumed duration of a job before one has been measured
HEARTBEAT_SECONDS = 1.0  # A running job's status is told again after so long, with new times
MEASURABLE = 0.05  # share of a job that must be done before its time is predicted from it
DURATION_WINDOW = 16  # number of recent jobs whose durations are averaged for `Retry-After`


@dataclass(frozen=True, slots=True, kw_only=True)
class JobStatus:
    """State and progress of a job at one moment."""

    state: DecodeJobState
    position: int = 0  # position in the queue while waiting; 1 is next, 0 means not waiting
    step: int = 0  # steps finished
    num_steps: int = 0  # steps in total, 0 while unknown
    activity: str = ""  # what is being done, in words, such as "decoding, strip 3 of 8"; empty before the first
    done: float = 0.0  # share of the job's predicted work that is done, 0 to 1
    seconds: float = 0.0  # time the job has run, without waiting
    seconds_left: float | None = None  # predicted time to its end; None while nothing is known of it
    preview: bytes | None = None  # JPEG of the newest estimate, if previews were asked for


class DecodeJob:
    """A function in the queue, with its state and result. All methods are thread-safe.

    The function is called with the job on the worker thread; what it returns is the job's result.
    """

    def __init__(self, function: JobFunction, queue: JobQueue) -> None:
        self.id = secrets.token_urlsafe(12)
        self.started: float | None = None
        self.ended: float | None = None
        self.expected_seconds: float | None = None  # set by the function, where it can predict its time
        self.reconnect_seconds = 0.0  # how long it goes on when its last follower is gone
        self._measured: float | None = None
        self._function: JobFunction | None = function
        self._queue = queue
        self._status = JobStatus(state="waiting")
        self._cancel_reason: str | None = None
        self._timer: threading.Timer | None = None
        if queue.timeout is not None:
            reason = f"The job took longer than the {queue.timeout:g} seconds it may take, waiting included; it was "
            self._timer = threading.Timer(queue.timeout, self.cancel, [f"{reason}stopped."])
            self._timer.daemon = True
            self._timer.start()
        self._future: futures.Future[Any] = futures.Future()
        self._listeners: list[Callable[[], None]] = []

    @property
    def state(self) -> DecodeJobState:
        """Current state; "done", "failed" and "cancelled" are final."""
        return self._status.state

    @property
    def over(self) -> bool:
        """Whether the state is final."""
        return self._future.done()

    @property
    def followers(self) -> int:
        """How many are iterating over `changes`."""
        return len(self._listeners)

    @property
    def status(self) -> JobStatus:
        """Current state, queue position, progress and newest preview, with the times of this moment."""
        if self.state == "waiting":
            with self._queue._changed:
                waiting = self._queue._waiting
                return JobStatus(state="waiting", position=waiting.index(self) + 1 if self in waiting else 0)
        status, total = self._status, self.expected_seconds
        if self.started is None:
            return status
        ran = (self.ended or time.monotonic()) - self.started
        if status.done >= MEASURABLE and self._measured is not None:
            total = (self._measured - self.started) / status.done
        left = None if total is None or self.over else max(0.0, total - ran)
        return replace(status, seconds=ran, seconds_left=left)

    def cancel(self, reason: str = "The job was cancelled.") -> None:
        """Remove a waiting job from the queue, or stop a running one at its next check; no effect once it is over.

        The reason is the message of the `Cancelled` that `result` raises.
        """
        queue = self._queue
        with queue._changed:
            if self.over or self._cancel_reason is not None:
                return
            self._cancel_reason = reason
            if self not in queue._waiting:
                return
            queue._waiting.remove(self)
            queue.stats.cancelled += 1
        self._end("cancelled", error=Cancelled(reason))
        queue._notify_waiting()

    def check(self) -> None:
        """Called by the job's function between steps; Cancelled if the job was cancelled or its time is up."""
        if self._cancel_reason is not None:
            raise Cancelled(self._cancel_reason)

    def report(self, **changes: Any) -> None:
        """Called by the job's function to change fields of its `JobStatus`; Cancelled as by `check`."""
        self.check()
        if "done" in changes:
            self._measured = time.monotonic()
        self._status = replace(self._status, state="running", **changes)
        self.notify()

    def result(self) -> Any:
        """Return or raise what the job's function did, or Cancelled; call it only once the job is over."""
        assert self.over, "the job has not ended"
        return self._future.result()

    def wait(self, timeout: float | None = None) -> bool:
        """Block until the job is over; return False if that took longer than `timeout` seconds."""
        return bool(futures.wait([self._future], timeout).done)

    async def changes(self) -> AsyncGenerator[JobStatus]:
        """Yield the status now, after each change and each second. A slow reader never misses the final one."""
        changed, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake() -> None:
            with suppress(RuntimeError):  # the reader's event loop is closed
                loop.call_soon_threadsafe(changed.set)

        self._listeners.append(wake)
        try:
            while True:
                changed.clear()
                over, status = self.over, self.status
                yield status
                if over:
                    return
                with suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), HEARTBEAT_SECONDS)
        finally:
            self._listeners.remove(wake)

    def notify(self) -> None:
        """Wake all that iterate over `changes`."""
        for listener in tuple(self._listeners):
            listener()

    def _end(self, state: DecodeJobState, result: Any = None, error: BaseException | None = None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._function = None  # its closure may hold an image; the queue keeps nothing of a finished job
        self.ended = time.monotonic()
        last = self._status
        self._status = JobStatus(state=state, step=last.step, num_steps=last.num_steps)
        if error is None:
            self._future.set_result(result)
        else:
            self._future.set_exception(error.with_traceback(None))  # its frames would keep the job's tensors alive
        self.notify()


@dataclass(slots=True)
class QueueStats:
    """Counts of jobs since the queue was created."""

    accepted: int = 0  # jobs that entered the queue
    refused: int = 0  # jobs refused because the queue was full or closed
    done: int = 0  # jobs that returned
    failed: int = 0  # jobs that raised
    cancelled: int = 0  # jobs that were cancelled or timed out
    # Seconds that recent jobs ran.
    durations: deque[float] = field(default_factory=lambda: deque(maxlen=DURATION_WINDOW))


class JobQueue:
    """First-in-first-out queue in front of one device.

    Args:
        capacity: Jobs that may wait besides the running one; further ones are refused with `BusyError`.
        timeout: Seconds a job may take from submission to its end, or None.
    """

    def __init__(self, capacity: int = 8, *, timeout: float | None = None) -> None:
        self.capacity = capacity
        self.timeout = timeout
        self.stats = QueueStats()
        self._waiting: deque[DecodeJob] = deque()
        self._running: DecodeJob | None = None
        self._changed = threading.Condition()
        self.closed = False  # by `stop`, after which no job is accepted
        self._worker: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Jobs in the queue, without the running one."""
        return len(self._waiting)

    @property
    def running(self) -> bool:
        """Whether a job is running."""
        return self._running is not None

    @property
    def free_slots(self) -> int:
        """Jobs that would be accepted now."""
        return 0 if self.closed else self.capacity + 1 - len(self._waiting) - (self._running is not None)

    def submit(self, function: JobFunction) -> DecodeJob:
        """Append a job to the queue; BusyError if the queue is full or closed."""
        with self._changed:
            if not self.free_slots:
                raise self.refusal(
                    f"The queue is full: {len(self._waiting)} jobs are waiting and one is running. Retry later."
                )
            job = DecodeJob(function, self)
            self._waiting.append(job)
            self.stats.accepted += 1
            if self._worker is None:
                self._worker = threading.Thread(target=self._run, name="pidecode-queue", daemon=True)
                self._worker.start()
            self._changed.notify_all()
        return job

    def refusal(self, message: str, retry_after: float | None = None) -> BusyError:
        """The error for a job that is not taken, which it counts; a queue that is closed says that instead."""
        self.stats.refused += 1
        if self.closed:
            message = "The server is stopping and takes no new jobs; ask again when it is back."
            return BusyError(message, 10.0, stopping=True)
        if retry_after is None:  # a slot is likely to be free after the mean duration of recent jobs
            retry_after = mean(self.stats.durations or [DEFAULT_JOB_SECONDS])
        return BusyError(message, retry_after)

    def stop(self, grace: float = 0.0) -> None:
        """Close the queue: cancel waiting jobs, give the running one `grace` seconds, then join the worker.

        A function that never checks its job is waited for: a call on the device cannot be interrupted.
        """
        with self._changed:
            self.closed = True
            waiting, running = list(self._waiting), self._running
            self._changed.notify_all()
        for job in waiting:
            job.cancel("The server is stopping; the job was not started.")
        if running is not None and not running.wait(grace):
            running.cancel("The server is stopping; the job was interrupted.")
        if self._worker is not None:
            self._worker.join()

    def _notify_waiting(self) -> None:
        """Tell the jobs that wait that their positions have changed."""
        with self._changed:
            waiting = list(self._waiting)
        for job in waiting:
            job.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self.closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                job = self._running = self._waiting.popleft()
            self._notify_waiting()
            self._run_job(job)
            del job  # keep no reference to the job while the thread waits for the next one

    def _run_job(self, job: DecodeJob) -> None:
        assert job._function is not None
        job.started = time.monotonic()
        state: DecodeJobState = "done"
        result, error = None, None
        try:
            job.report()
            result = job._function(job)
        except BaseException as caught:
            error = DoesNotFitError(OUT_OF_MEMORY) if is_out_of_memory(caught) else caught
            state = "cancelled" if isinstance(error, Cancelled) else "failed"
            if not isinstance(error, PidecodeError):
                log.exception("A job failed unexpectedly.")
        with self._changed:
            self._running = None
            setattr(self.stats, state, getattr(self.stats, state) + 1)
            if state == "done":
                self.stats.durations.append(time.monotonic() - job.started)
        job._end(state, result, error)
