# SPDX-License-Identifier: Apache-2.0
"""The job queue: order, capacity, cancellation in every state, timeouts, previews and shutdown."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import Iterator

import pytest

from pidecode.errors import BusyError, Cancelled, SettingError
from pidecode.serve.queue import DecodeJob, JobQueue, JobStatus

PATIENCE = 10.0


@pytest.fixture
def queue() -> Iterator[JobQueue]:
    queue = JobQueue(capacity=2)
    yield queue
    queue.stop()


class Gate:
    """A job function that ends when opened, and checks its job as decoding does."""

    def __init__(self, answer: object = None) -> None:
        self.begun, self.open = threading.Event(), threading.Event()
        self.answer = answer

    def __call__(self, job: DecodeJob) -> object:
        self.begun.set()
        while not self.open.wait(0.005):
            job.check()
        return self.answer


async def finished(job: DecodeJob) -> object:
    async for _ in job.changes():
        pass
    return job.result()


def test_work_runs_in_order_on_one_thread_and_gives_its_result(queue: JobQueue) -> None:
    order: list[tuple[int, str]] = []
    jobs = [queue.submit(lambda job, n=n: order.append((n, threading.current_thread().name)) or n) for n in range(2)]
    assert [job.wait(PATIENCE) and job.result() for job in jobs] == [0, 1]
    assert [number for number, _ in order] == [0, 1]
    assert {name for _, name in order} == {"pidecode-queue"}
    assert queue.stats.done == 2


def test_the_queue_is_bounded_and_says_when_to_retry(queue: JobQueue) -> None:
    gate = Gate()
    running = queue.submit(gate)
    assert gate.begun.wait(PATIENCE)
    waiting = [queue.submit(lambda job: None) for _ in range(2)]
    assert [job.status.position for job in waiting] == [1, 2]
    with pytest.raises(BusyError, match="The queue is full: 2 jobs are waiting and one is running") as caught:
        queue.submit(lambda job: None)
    assert caught.value.retry_after > 0
    assert (queue.stats.refused, queue.waiting, queue.running) == (1, 2, True)
    gate.open.set()
    assert all(job.wait(PATIENCE) for job in (running, *waiting))
    assert not queue.running


def test_a_queue_of_capacity_zero_takes_one_job_when_idle() -> None:
    queue, gate = JobQueue(capacity=0), Gate()
    job = queue.submit(gate)
    assert gate.begun.wait(PATIENCE)
    with pytest.raises(BusyError):
        queue.submit(gate)
    gate.open.set()
    assert job.wait(PATIENCE)
    queue.stop()


def test_a_cancelled_waiting_job_frees_its_place_at_once_and_never_runs(queue: JobQueue) -> None:
    gate, ran = Gate(), []
    queue.submit(gate)
    assert gate.begun.wait(PATIENCE)
    first, second = queue.submit(ran.append), queue.submit(ran.append)
    first.cancel("Enough.")
    assert first.over
    assert second.status.position == 1
    with pytest.raises(Cancelled, match=r"Enough\."):
        first.result()
    third = queue.submit(lambda job: None)  # the place is free again
    gate.open.set()
    assert third.wait(PATIENCE)
    assert ran == [second]


def test_a_cancelled_running_job_stops_at_its_next_check(queue: JobQueue) -> None:
    gate = Gate()
    job = queue.submit(gate)
    assert gate.begun.wait(PATIENCE)
    job.cancel()
    assert job.wait(PATIENCE)
    assert job.state == "cancelled"
    assert queue.stats.cancelled == 1
    job.cancel("again")  # does nothing
    assert job.state == "cancelled"


def test_a_job_whose_time_is_up_is_stopped() -> None:
    queue = JobQueue(capacity=1, timeout=0.05)
    job = queue.submit(Gate())
    assert job.wait(PATIENCE)
    with pytest.raises(Cancelled, match=r"longer than the 0\.05 seconds"):
        job.result()
    queue.stop()


def test_a_waiting_job_whose_time_is_up_is_cancelled_without_being_run() -> None:
    queue = JobQueue(capacity=1)
    stubborn = threading.Event()
    queue.submit(lambda job: stubborn.wait(PATIENCE))  # never checks
    queue.timeout = 0.1
    waiting = queue.submit(lambda job: None)
    with pytest.raises(Cancelled, match=r"longer than the 0\.1 seconds"):
        asyncio.run(asyncio.wait_for(finished(waiting), PATIENCE))
    assert queue.waiting == 0
    stubborn.set()
    queue.stop()


def test_errors_come_back_as_they_were_and_the_worker_lives_on(queue: JobQueue) -> None:
    def fails(job: DecodeJob) -> None:
        raise SettingError("No such thing.")

    failed, fine = queue.submit(fails), queue.submit(lambda job: "fine")
    assert fine.wait(PATIENCE)
    with pytest.raises(SettingError, match=r"No such thing\."):
        failed.result()
    assert (fine.result(), queue.stats.failed) == ("fine", 1)


def test_progress_and_previews_reach_a_reader_who_sees_the_end(queue: JobQueue) -> None:
    seen_by_reader = threading.Semaphore(0)

    def work(job: DecodeJob) -> str:
        for step in range(1, 4):
            job.report(step=step, num_steps=3, preview=bytes([step]))
            assert seen_by_reader.acquire(timeout=PATIENCE), "the reader saw nothing"
        return "result"

    async def read() -> list[JobStatus]:
        job = queue.submit(work)
        seen = []
        async for status in job.changes():
            if status.preview and status.preview not in {one.preview for one in seen}:
                seen_by_reader.release()
            seen.append(status)
        assert job.result() == "result"
        return seen

    seen = asyncio.run(asyncio.wait_for(read(), PATIENCE))
    assert seen[0].state in ("waiting", "running")
    assert list(dict.fromkeys((status.step, status.preview) for status in seen if status.preview)) == [
        (1, b"\1"),
        (2, b"\2"),
        (3, b"\3"),
    ]
    assert seen[-1].state == "done"


def test_many_readers_and_a_reader_that_leaves(queue: JobQueue) -> None:
    async def scene() -> list[object]:
        gate = Gate("result")
        job = queue.submit(gate)
        readers = [asyncio.ensure_future(finished(job)) for _ in range(3)]
        await asyncio.sleep(0.02)
        readers[0].cancel()
        gate.open.set()
        return list(await asyncio.gather(*readers[1:]))

    assert asyncio.run(asyncio.wait_for(scene(), PATIENCE)) == ["result", "result"]


def test_stopping_cancels_who_waits_and_lets_the_running_job_end() -> None:
    queue, gate = JobQueue(capacity=2), Gate("result")
    running = queue.submit(gate)
    assert gate.begun.wait(PATIENCE)
    waiting = queue.submit(lambda job: None)
    threading.Timer(0.1, gate.open.set).start()
    queue.stop(grace=PATIENCE)
    assert running.result() == "result"
    with pytest.raises(Cancelled, match="not started"):
        waiting.result()
    with pytest.raises(BusyError, match="stopping"):
        queue.submit(lambda job: None)
    queue.stop()  # twice does no harm


def test_stopping_breaks_off_what_outlasts_the_grace() -> None:
    queue, gate = JobQueue(), Gate()
    job = queue.submit(gate)
    assert gate.begun.wait(PATIENCE)
    queue.stop(grace=0.01)
    with pytest.raises(Cancelled, match="interrupted"):
        job.result()


def test_nothing_of_a_finished_job_is_kept(queue: JobQueue) -> None:
    class Large:
        pass

    large = Large()
    kept = weakref.ref(large)
    job = queue.submit(lambda job, large=large: job.report(step=1, num_steps=1))
    assert job.wait(PATIENCE)
    del job, large
    for _ in range(200):  # the worker drops its last reference a moment after it has notified
        gc.collect()
        if kept() is None:
            break
        time.sleep(0.01)
    assert kept() is None


def test_many_threads_submit_and_cancel_and_every_job_ends_once() -> None:
    queue = JobQueue(capacity=5)
    ended: list[str] = []
    refused = []

    def client(number: int) -> None:
        for turn in range(40):
            try:
                job = queue.submit(lambda job: job.check())
            except BusyError:
                refused.append(1)
                continue
            if (number + turn) % 3 == 0:
                job.cancel()
            assert job.wait(PATIENCE)
            ended.append(job.state)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    queue.stop()
    stats = queue.stats
    assert len(ended) + len(refused) == 8 * 40
    assert stats.accepted == len(ended) == stats.done + stats.cancelled
    assert stats.refused == len(refused)
    assert stats.failed == 0
