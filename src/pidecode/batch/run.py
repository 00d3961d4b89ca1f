# SPDX-License-Identifier: Apache-2.0
"""Running a batch: in this process, as one of several that torchrun started, or on the workers of a Ray cluster."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from pidecode.batch.jobs import REPORT_NAME, BatchJob
from pidecode.batch.report import BatchReport, JobResult, merge
from pidecode.batch.worker import JobProgressCallback, Worker, WorkerConfig, skip_done
from pidecode.decoder import PixelDecoder
from pidecode.devices import select_device
from pidecode.errors import PidecodeError, SettingError
from pidecode.files import FolderLock, atomic_write, remove_partial, writable_folder

BatchEngine = Literal["local", "torchrun", "ray"]
ResultCallback = Callable[[JobResult], None]  # called with every result as it comes, in the process with rank 0

ABANDONED_AFTER = 600.0  # seconds without a change after which an incomplete file cannot belong to a running process


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A whole batch."""

    jobs: Sequence[BatchJob]  # in order
    config: WorkerConfig  # the model and the options that all jobs share
    out: Path  # output folder; the report is written there
    engine: BatchEngine = "local"  # what runs the jobs
    workers: int | None = None  # Ray only: number of workers; by default one per GPU, or per machine without GPUs
    # Ray only: address of the cluster, "auto" for this machine's; by default RAY_ADDRESS, else a private one starts.
    address: str | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)  # files that are no jobs, by ending and number


def choose_engine(engine: BatchEngine | None) -> BatchEngine:
    """The engine asked for, or by default the one this process was started for."""
    under_torchrun = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if engine is None:
        return "torchrun" if under_torchrun else "local"
    if engine == "torchrun" and "LOCAL_RANK" not in os.environ:
        raise SettingError(
            "The engine torchrun needs torchrun to start the processes: "
            "torchrun --nproc-per-node=2 -m pidecode batch IN OUT."
        )
    if engine != "torchrun" and under_torchrun:
        raise SettingError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, and with --engine {engine} each would process the "
            "whole batch. Leave --engine out, or start the command without torchrun."
        )
    return engine


@dataclass(slots=True, kw_only=True)
class BatchProgress:
    """Results of a running batch as they come."""

    batch: Batch
    on_result: ResultCallback
    workers: int = 1
    lost_workers: int = 0
    interrupted: bool = False
    stopped: str | None = None  # why it could not go on
    results: list[JobResult] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def add(self, result: JobResult) -> None:
        """Record one more result and call `on_result`."""
        self.results.append(result)
        self.on_result(result)

    def pending(self) -> list[BatchJob]:
        """Record the jobs that need no decoding, and return the others."""
        pending = []
        for job, result in skip_done(self.batch.jobs, self.batch.config):
            if result is not None:
                self.add(result)
            else:
                pending.append(job)
        return pending

    def report(self) -> BatchReport:
        """The report so far."""
        return BatchReport(
            jobs=len(self.batch.jobs), results=tuple(self.results), seconds=time.perf_counter() - self.began,
            engine=self.batch.engine, workers=self.workers, interrupted=self.interrupted,
            lost_workers=self.lost_workers, started=self.started, settings=_given(asdict(self.batch.config)),
            left_out=self.batch.left_out, stopped=self.stopped,
        )  # fmt: skip


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The values that are not None, also in nested dictionaries."""
    return {
        name: _given(value) if isinstance(value, dict) else value for name, value in values.items() if value is not None
    }


def run_batch(
    batch: Batch,
    on_result: ResultCallback | None = None,
    *,
    decoder: PixelDecoder | None = None,
    on_progress: JobProgressCallback | None = None,
) -> BatchReport | None:
    """Process the jobs of a batch that are not done yet, and write the report into the output folder.

    Args:
        batch: Jobs, model and options.
        on_result: Called with every result as it comes.
        decoder: A decoder that is loaded already, for the local engine.
        on_progress: Called as each job goes on, but with Ray and in other processes than the first.

    Returns:
        The report, also after an interruption (Ctrl-C), which it records; None in processes of torchrun with another
        rank than 0.

    Raises:
        FileError: The output folder cannot be written to, or another batch is writing there.
        PidecodeError: The decoder cannot be loaded. An error of a single job becomes its result instead.
    """
    writable_folder(batch.out)
    batch = replace(batch, config=replace(batch.config, weights=batch.config.hash_weights()))
    callback = on_result or (lambda _: None)
    if batch.engine == "torchrun":
        report = run_torchrun(batch, callback, on_progress)
        return report if report is None else _write_report(batch.out, report)
    with FolderLock(batch.out, "batch"):
        remove_partial(batch.out, older_than=ABANDONED_AFTER)
        if batch.engine == "local":
            return _write_report(batch.out, run_local(batch, callback, decoder=decoder, on_progress=on_progress))
        from pidecode.batch.ray import run_ray

        return _write_report(batch.out, run_ray(batch, callback))


def _write_report(out: Path, report: BatchReport) -> BatchReport:
    """Write the report as JSON into the output folder, in place of an earlier one; a failure is noted in it."""
    text = json.dumps(report.to_dict(), indent=2, default=str)
    try:
        with atomic_write(out / REPORT_NAME, overwrite=True) as file:
            file.write(text.encode("ascii"))
    except (PidecodeError, OSError) as error:
        return replace(report, unwritten=f"The report could not be written: {error}")
    return report


def run_local(
    batch: Batch,
    on_result: ResultCallback,
    *,
    decoder: PixelDecoder | None = None,
    on_progress: JobProgressCallback | None = None,
) -> BatchReport:
    """Process the batch in this process, on one device."""
    progress = BatchProgress(batch=batch, on_result=on_result)
    try:
        pending = progress.pending()
        if pending:
            Worker(batch.config, decoder, on_progress).process_all(pending, progress.add)
    except KeyboardInterrupt:
        progress.interrupted = True
    return progress.report()


def run_torchrun(
    batch: Batch, on_result: ResultCallback, on_progress: JobProgressCallback | None = None
) -> BatchReport | None:
    """Process every n-th job in this one of n processes; rank 0 gathers the reports."""
    import torch.distributed as dist

    # Processes may end hours apart, and gathering must not time out meanwhile.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    lock: FolderLock | None = None
    try:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            lock = FolderLock(batch.out, "batch")
            remove_partial(batch.out, older_than=ABANDONED_AFTER)
        dist.barrier()
        config = replace(batch.config, device=batch.config.device or _local_device(int(os.environ["LOCAL_RANK"])))
        # Jobs are divided before any is skipped: which are done already may look different to each process.
        own = replace(batch, jobs=batch.jobs[rank::world_size], config=config)
        callback: ResultCallback = on_result if rank == 0 else lambda _: None
        report = run_local(own, callback, on_progress=on_progress if rank == 0 else None)
        parts: list[Any] | None = [None] * world_size if rank == 0 else None
        dist.gather_object(report, parts, dst=0)
        return merge(parts) if parts is not None else None
    finally:
        if lock is not None:
            lock.release()
        dist.destroy_process_group()


def _local_device(local_rank: int) -> str:
    """The device of the n-th process of a machine: one of its own where there are several."""
    kind = select_device(None).type
    count = torch.accelerator.device_count() if kind != "cpu" else 0
    return f"{kind}:{local_rank % count}" if count > 1 else kind
