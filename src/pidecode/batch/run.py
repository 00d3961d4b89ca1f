# SPDX-License-Identifier: Apache-2.0
"""Running a batch: in this process, as one of several that torchrun started, or on the workers of a Ray cluster."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from pidecode.batch.jobs import REPORT_NAME, BatchJob
from pidecode.batch.report import BatchReport, JobResult, merge
from pidecode.batch.worker import JobProgressCallback, Worker, WorkerConfig, result_without_decoding
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
        command = "torchrun --nproc-per-node=2 -m pidecode batch IN OUT"
        raise SettingError(f"The engine torchrun needs torchrun to start the processes: {command}.")
    if engine != "torchrun" and under_torchrun:
        raise SettingError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, and with --engine {engine} each would process the "
            "whole batch. Leave --engine out, or start the command without torchrun."
        )
    return engine


class BatchProgress:
    """A running batch, whose results come into its report."""

    def __init__(self, batch: Batch, on_result: ResultCallback) -> None:
        self.batch, self.on_result, self._began = batch, on_result, time.perf_counter()
        settings = _given(asdict(batch.config))
        self.report = BatchReport(jobs=len(batch.jobs), engine=batch.engine, settings=settings, left_out=batch.left_out)

    def add(self, result: JobResult) -> None:
        """Record one more result and call `on_result`."""
        self.report.results.append(result)
        self.on_result(result)

    def pending(self) -> list[BatchJob]:
        """Record the jobs that need no decoding, and return the others."""
        pending = []
        for job in self.batch.jobs:
            result = result_without_decoding(job, self.batch.config)
            if result is None:
                pending.append(job)
            else:
                self.add(result)
        return pending

    def end(self) -> BatchReport:
        """The report, with the time until now."""
        self.report.seconds = time.perf_counter() - self._began
        return self.report


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
        return _run_torchrun(batch, callback, on_progress)
    with _only_batch(batch.out):
        if batch.engine == "local":
            return _write_report(batch.out, _run_local(batch, callback, on_progress, decoder))
        from pidecode.batch.ray import run_ray

        return _write_report(batch.out, run_ray(batch, callback))


def _only_batch(out: Path) -> FolderLock:
    """The right to write into the output folder, which what a killed batch left is removed from."""
    lock = FolderLock(out, "batch")
    remove_partial(out, older_than=ABANDONED_AFTER)
    return lock


def _write_report(out: Path, report: BatchReport) -> BatchReport:
    """Write the report as JSON into the output folder, in place of an earlier one; a failure is noted in it."""
    text = json.dumps(report.to_dict(), indent=2, default=str)
    try:
        with atomic_write(out / REPORT_NAME, overwrite=True) as file:
            file.write(text.encode("ascii"))
    except (PidecodeError, OSError) as error:
        report.unwritten = f"The report could not be written: {error}"
    return report


def _run_local(
    batch: Batch,
    on_result: ResultCallback,
    on_progress: JobProgressCallback | None = None,
    decoder: PixelDecoder | None = None,
) -> BatchReport:
    """Process the batch in this process, on one device."""
    progress = BatchProgress(batch, on_result)
    try:
        if pending := progress.pending():
            Worker(batch.config, decoder, on_progress).process_all(pending, progress.add)
    except KeyboardInterrupt:
        progress.report.interrupted = True
    return progress.end()


def _run_torchrun(
    batch: Batch, on_result: ResultCallback, on_progress: JobProgressCallback | None
) -> BatchReport | None:
    """Process every n-th job in this one of n processes; rank 0 gathers the reports and writes that of all."""
    import torch.distributed as dist

    # Processes may end hours apart, and gathering must not time out meanwhile.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    rank, world_size = dist.get_rank(), dist.get_world_size()
    try:
        with _only_batch(batch.out) if rank == 0 else nullcontext():
            dist.barrier()
            config = replace(batch.config, device=batch.config.device or _local_device(int(os.environ["LOCAL_RANK"])))
            # Jobs are divided before any is skipped: which are done already may look different to each process.
            own = replace(batch, jobs=batch.jobs[rank::world_size], config=config)
            if rank != 0:
                dist.gather_object(_run_local(own, lambda _: None))
                return None
            parts: list[Any] = [None] * world_size
            dist.gather_object(_run_local(own, on_result, on_progress), parts)
            return _write_report(batch.out, merge(parts))
    finally:
        dist.destroy_process_group()


def _local_device(local_rank: int) -> str:
    """The device of the n-th process of a machine: one of its own where there are several."""
    kind = select_device(None).type
    count = torch.accelerator.device_count() if kind != "cpu" else 0
    return f"{kind}:{local_rank % count}" if count > 1 else kind
