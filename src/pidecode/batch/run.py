# SPDX-License-Identifier: Apache-2.0
"""Running a batch: in this process, as one of several that torchrun started, or on the workers of a Ray cluster."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import torch

from pidecode.batch.jobs import BatchJob
from pidecode.batch.report import BatchReport, JobResult, merge
from pidecode.batch.worker import Worker, WorkerConfig, skip_done
from pidecode.decoder import PixelDecoder
from pidecode.devices import select_device
from pidecode.errors import FileError, SettingError
from pidecode.files import atomic_write, remove_partial

BatchEngine = Literal["local", "torchrun", "ray"]
ResultCallback = Callable[[JobResult], None]  # called with every result as it comes, in the process with rank 0

REPORT_NAME = "pidecode-batch.json"  # name of the report in the output folder

ABANDONED_AFTER = 600.0  # seconds without a change after which an incomplete file cannot belong to a running process


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A whole batch.

    Attributes:
        jobs: The jobs in order.
        config: The model and the options that all jobs share.
        out: Output folder; the report is written there.
        engine: What runs the jobs.
        workers: Ray only: number of workers; by default one per GPU, or one per machine without GPUs.
        address: Ray only: address of the cluster, or "auto" for the one this machine belongs to; by default
            RAY_ADDRESS, else a private cluster is started.
    """

    jobs: Sequence[BatchJob]
    config: WorkerConfig
    out: Path
    engine: BatchEngine = "local"
    workers: int | None = None
    address: str | None = None


def choose_engine(engine: BatchEngine | None) -> BatchEngine:
    """The engine asked for, or by default the one this process was started for.

    Raises:
        SettingError: The engine needs torchrun and was started without it, or the other way round.
    """
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
            if result is None:
                pending.append(job)
            else:
                self.add(result)
        return pending

    def report(self) -> BatchReport:
        """The report so far."""
        return BatchReport(
            jobs=len(self.batch.jobs), results=tuple(self.results), seconds=time.perf_counter() - self.began,
            engine=self.batch.engine, workers=self.workers, interrupted=self.interrupted,
            lost_workers=self.lost_workers, started=self.started, settings=_given(asdict(self.batch.config)),
        )  # fmt: skip


def _given(values: dict[str, Any]) -> dict[str, Any]:
    """The values that are not None, also in nested dictionaries."""
    return {
        name: _given(value) if isinstance(value, dict) else value for name, value in values.items() if value is not None
    }


def run_batch(
    batch: Batch, on_result: ResultCallback | None = None, *, decoder: PixelDecoder | None = None
) -> BatchReport | None:
    """Process the jobs of a batch that are not done yet, and write the report into the output folder.

    Args:
        batch: Jobs, model and options.
        on_result: Called with every result as it comes.
        decoder: A decoder that is loaded already, for the local engine.

    Returns:
        The report, also after an interruption (Ctrl-C), which it records; None in processes of torchrun with another
        rank than 0.

    Raises:
        FileError: The output folder cannot be written to.
        PidecodeError: The decoder cannot be loaded. An error of a single job becomes its result instead.
    """
    try:
        batch.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"The folder {batch.out} cannot be created: {error.strerror or error}.") from error
    callback = on_result or _ignore
    report: BatchReport | None
    match batch.engine:
        case "local":
            remove_partial(batch.out, older_than=ABANDONED_AFTER)
            report = run_local(batch, callback, decoder=decoder)
        case "torchrun":
            report = run_torchrun(batch, callback)
        case "ray":
            from pidecode.batch.ray import run_ray

            remove_partial(batch.out, older_than=ABANDONED_AFTER)
            report = run_ray(batch, callback)
    if report is not None:
        write_report(batch.out, report)
    return report


def write_report(out: Path, report: BatchReport) -> None:
    """Write the report as JSON into the output folder, in place of an earlier one."""
    with atomic_write(out / REPORT_NAME, overwrite=True) as file:
        file.write(json.dumps(report.to_dict(), indent=2, ensure_ascii=False, default=str).encode())


def run_local(batch: Batch, on_result: ResultCallback, *, decoder: PixelDecoder | None = None) -> BatchReport:
    """Process the batch in this process, on one device."""
    progress = BatchProgress(batch=batch, on_result=on_result)
    try:
        pending = progress.pending()
        if pending:
            for result in Worker(batch.config, decoder).process_all(pending):
                progress.add(result)
    except KeyboardInterrupt:
        progress.interrupted = True
    return progress.report()


def run_torchrun(batch: Batch, on_result: ResultCallback) -> BatchReport | None:
    """Process every n-th job in this one of n processes; rank 0 gathers the reports."""
    import torch.distributed as dist

    # Processes may end hours apart, and gathering must not time out meanwhile.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            remove_partial(batch.out, older_than=ABANDONED_AFTER)
        config = replace(batch.config, device=batch.config.device or _local_device(int(os.environ["LOCAL_RANK"])))
        # Jobs are divided before any is skipped: which are done already may look different to each process.
        own = replace(batch, jobs=batch.jobs[rank::world_size], config=config)
        report = run_local(own, on_result if rank == 0 else _ignore)
        parts: list[Any] | None = [None] * world_size if rank == 0 else None
        dist.gather_object(report, parts, dst=0)
        return merge(parts) if parts is not None else None
    finally:
        dist.destroy_process_group()


def _ignore(_: JobResult) -> None:
    pass


def _local_device(local_rank: int) -> str:
    """The device of the n-th process of a machine: one of its own where there are several."""
    kind = select_device(None).type
    count = torch.accelerator.device_count() if kind != "cpu" else 0
    return f"{kind}:{local_rank % count}" if count > 1 else kind
