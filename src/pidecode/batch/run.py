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

from pidecode.batch.jobs import Job
from pidecode.batch.report import Outcome, Report, merge
from pidecode.batch.worker import Work, Worker, sift
from pidecode.decoder import PixelDecoder
from pidecode.devices import select_device
from pidecode.errors import FileError, SettingError
from pidecode.files import atomic_write, remove_partial

Engine = Literal["local", "torchrun", "ray"]
Tell = Callable[[Outcome], None]
"""Called with every outcome as it comes, in the process that leads."""

ABANDONED = 600.0
"""Seconds after which an incomplete file cannot belong to a running process."""

REPORT = "pidecode-batch.json"
"""Name of the report in the folder of the results."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A whole batch: its jobs in order, what they share, where results go, and what does the work.

    workers, address: Ray only: how many workers (default one per GPU, else one per machine), and the cluster's
        address ("auto" for the one this machine belongs to; default RAY_ADDRESS, else a private one is started).
    """

    jobs: Sequence[Job]
    work: Work
    out: Path
    engine: Engine = "local"
    workers: int | None = None
    address: str | None = None


def engine_of(asked: Engine | None) -> Engine:
    """The engine asked for, or the one this process was started for.

    Raises SettingError where torchrun and the engine contradict each other.
    """
    under_torchrun = "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    if asked is None:
        return "torchrun" if under_torchrun else "local"
    if asked == "torchrun" and "LOCAL_RANK" not in os.environ:
        raise SettingError(
            "The engine torchrun needs torchrun to start the processes: "
            "torchrun --nproc-per-node=2 -m pidecode batch IN OUT."
        )
    if asked != "torchrun" and under_torchrun:
        raise SettingError(
            f"torchrun started {os.environ['WORLD_SIZE']} processes, and with --engine {asked} each would do all the "
            "work. Leave --engine out, or start the command without torchrun."
        )
    return asked


@dataclass(slots=True, kw_only=True)
class Tally:
    """Outcomes as they come, and the report they add up to."""

    batch: Batch
    tell: Tell
    workers: int = 1
    lost_workers: int = 0
    interrupted: bool = False
    outcomes: list[Outcome] = field(default_factory=list)
    began: float = field(default_factory=time.perf_counter)
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def add(self, outcome: Outcome) -> None:
        """Count one more outcome, and tell."""
        self.outcomes.append(outcome)
        self.tell(outcome)

    def sift(self) -> list[Job]:
        """The jobs that still need work; the others are counted at once."""
        pending = []
        for job, settled in sift(self.batch.jobs, self.batch.work):
            if settled is None:
                pending.append(job)
            else:
                self.add(settled)
        return pending

    def report(self) -> Report:
        """The report so far."""
        work = {name: value for name, value in asdict(self.batch.work).items() if value is not None}
        return Report(
            jobs=len(self.batch.jobs),
            outcomes=tuple(self.outcomes),
            seconds=time.perf_counter() - self.began,
            engine=self.batch.engine,
            workers=self.workers,
            interrupted=self.interrupted,
            lost_workers=self.lost_workers,
            started=self.started,
            facts={"work": work},
        )


def run(batch: Batch, tell: Tell, *, decoder: PixelDecoder | None = None) -> Report | None:
    """Do what is left of the batch and write its report into the results' folder.

    decoder: one that is loaded already, for the local engine. Returns the report; None in the processes of
    torchrun that do not lead. An interruption (Ctrl-C) ends in a report too, marked so.

    Raises what loading the decoder raises, and FileError when the folder cannot be written to. What is wrong
    with a single job is its outcome, not an error.
    """
    try:
        batch.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"The folder {batch.out} cannot be created: {error.strerror or error}.") from error
    report: Report | None
    match batch.engine:
        case "local":
            remove_partial(batch.out, older_than=ABANDONED)
            report = run_local(batch, tell, decoder=decoder)
        case "torchrun":
            report = run_striped(batch, tell)
        case "ray":
            from pidecode.batch.ray import run_ray

            remove_partial(batch.out, older_than=ABANDONED)
            report = run_ray(batch, tell)
    if report is not None:
        write_report(batch.out, report)
    return report


def write_report(out: Path, report: Report) -> None:
    """Write the report as JSON into the folder of the results, in place of an earlier one."""
    with atomic_write(out / REPORT, overwrite=True) as file:
        file.write(json.dumps(report.to_dict(), indent=2, ensure_ascii=False, default=str).encode())


def run_local(batch: Batch, tell: Tell, *, decoder: PixelDecoder | None = None) -> Report:
    """Do the batch in this process, on one device."""
    tally = Tally(batch=batch, tell=tell)
    try:
        pending = tally.sift()
        if pending:
            for outcome in Worker(batch.work, decoder).run(pending):
                tally.add(outcome)
    except KeyboardInterrupt:
        tally.interrupted = True
    return tally.report()


def run_striped(batch: Batch, tell: Tell) -> Report | None:
    """Do this process's share: every n-th job for n processes; the first gathers the reports."""
    import torch.distributed as dist

    # Shares may end hours apart, so the one who waits must be patient.
    dist.init_process_group("gloo", timeout=timedelta(days=30))
    try:
        rank, world = dist.get_rank(), dist.get_world_size()
        if rank == 0:
            remove_partial(batch.out, older_than=ABANDONED)
        stripes = batch.jobs[rank::world]
        work = replace(batch.work, device=batch.work.device or _device_of(int(os.environ["LOCAL_RANK"])))
        # Shares are cut from the whole list: what is done already may look different to each process.
        share = replace(batch, jobs=stripes, work=work)
        report = run_local(share, tell if rank == 0 else _ignore)
        parts: list[Any] | None = [None] * world if rank == 0 else None
        dist.gather_object(report, parts, dst=0)
        return merge(parts) if parts is not None else None
    finally:
        dist.destroy_process_group()


def _ignore(_: Outcome) -> None:
    pass


def _device_of(local_rank: int) -> str:
    """The device of the n-th process on a machine: its own where there are several."""
    kind = select_device(None).type
    count = torch.accelerator.device_count() if kind != "cpu" else 0
    return f"{kind}:{local_rank % count}" if count > 1 else kind
