# SPDX-License-Identifier: Apache-2.0
"""Results of a batch: one per job, and the report over all of them, as text and as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

from pidecode.units import format_seconds

ResultState = Literal["done", "skipped", "failed"]
MAX_LISTED = 20  # failures that the text names; the JSON holds all


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """Result of one job."""

    name: str  # name of the source
    state: ResultState  # "done", "skipped" (its images existed already) or "failed"
    seconds: float  # time of the worker for this job
    images: int = 0  # images written
    megapixels: float = 0.0  # pixels written, in millions
    error: str | None = None  # class of the error, if it failed
    message: str | None = None  # message of the error
    worker: str | None = None  # host and process id of the worker, with Ray


@dataclass(slots=True, kw_only=True)
class BatchReport:
    """Report of a running, finished or interrupted batch."""

    jobs: int  # number of jobs in the batch
    engine: str  # what runs the batch: "local", "torchrun" or "ray"
    results: list[JobResult] = field(default_factory=list)  # results of the jobs that ended
    seconds: float = 0.0  # wall-clock time, loading included
    workers: int = 1  # number of workers
    interrupted: bool = False  # whether the batch was stopped before its end
    lost_workers: int = 0  # workers that died and were replaced
    # ISO date and time in UTC
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    settings: Mapping[str, Any] = field(default_factory=dict)  # model and decode options
    left_out: Mapping[str, int] = field(default_factory=dict)  # number of files by ending that are no jobs
    stopped: str | None = None  # why it could not go on
    unwritten: str | None = None  # why the report could not be written into the output folder

    def count(self, state: ResultState) -> int:
        """Number of jobs that ended in `state`."""
        return sum(result.state == state for result in self.results)

    @property
    def failures(self) -> list[JobResult]:
        """Jobs that failed, sorted by name."""
        return sorted((result for result in self.results if result.state == "failed"), key=lambda result: result.name)

    @property
    def images(self) -> int:
        """Number of images written."""
        return sum(result.images for result in self.results)

    @property
    def complete(self) -> bool:
        """Whether every image of every job exists, and the report."""
        ended = not self.interrupted and len(self.results) == self.jobs
        return ended and not self.failures and self.unwritten is None

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON values."""
        seconds = max(self.seconds, 1e-9)
        megapixels = sum(result.megapixels for result in self.results)
        failures = [{"source": one.name, "error": one.error, "message": one.message} for one in self.failures]
        return {
            "format": 1, "complete": self.complete, "interrupted": self.interrupted,
            **({"stopped": self.stopped} if self.stopped else {}),
            "jobs": self.jobs, "done": self.count("done"), "skipped": self.count("skipped"),
            "failed": self.count("failed"), "left": self.jobs - len(self.results), "images": self.images,
            "speed": {
                "seconds": round(self.seconds, 3), "images_per_minute": round(60 * self.images / seconds, 2),
                "megapixels_per_second": round(megapixels / seconds, 3),
            },
            "engine": self.engine, "workers": self.workers, "lost_workers": self.lost_workers, "started": self.started,
            "settings": dict(self.settings), "left_out": dict(self.left_out), "failures": failures,
            "results": [_without_defaults(result) for result in sorted(self.results, key=lambda result: result.name)],
        }  # fmt: skip

    def describe(self) -> str:
        """The report as text: what was done, how fast, and what failed and why."""
        done, skipped, failed = (self.count(state) for state in ("done", "skipped", "failed"))
        lines = [f"{done} of {self.jobs} done, {skipped} skipped (done before), {failed} failed."]
        if self.images:
            speed = f"{60 * self.images / max(self.seconds, 1e-9):.1f} per minute"
            time, workers = format_seconds(self.seconds), _plural(self.workers, "worker")
            lines.append(f"{_plural(self.images, 'image')} in {time}: {speed}, with {workers} ({self.engine}).")
        if self.lost_workers:
            lost = _plural(self.lost_workers, "worker")
            lines.append(f"{lost} died and had to be replaced; their jobs were repeated.")
        if self.left_out:
            lines.append(f"Left out, as no image and no latent: {describe_left_out(self.left_out)}.")
        failures = self.failures
        lines += [f"Failed: {result.name}: {result.message}" for result in failures[:MAX_LISTED]]
        if len(failures) > MAX_LISTED:
            lines.append(f"... and {len(failures) - MAX_LISTED} more; the report file names all.")
        if self.stopped:
            lines.append(self.stopped)
        left = self.jobs - len(self.results)
        if self.interrupted or left:
            lines.append(f"Stopped with {_plural(left, 'job')} left; the same command resumes.")
        elif failures:
            lines.append("The same command tries the failed jobs again.")
        if self.unwritten:
            lines.append(self.unwritten)
        return "\n".join(lines)


def describe_left_out(left_out: Mapping[str, int]) -> str:
    """Files that are not read, by ending and number: "3 .heic, 1 without an ending"."""
    return ", ".join(f"{count} {suffix or 'without an ending'}" for suffix, count in sorted(left_out.items()))


def _without_defaults(result: JobResult) -> dict[str, Any]:
    values = {key: value for key, value in asdict(result).items() if value not in (None, 0, 0.0)}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"


def merge(parts: Sequence[BatchReport]) -> BatchReport:
    """Merge the reports of several processes into one; its time is that of the slowest process."""
    return replace(
        parts[0], jobs=sum(part.jobs for part in parts),
        results=[result for part in parts for result in part.results],
        seconds=max(part.seconds for part in parts), workers=sum(part.workers for part in parts),
        interrupted=any(part.interrupted for part in parts), started=min(part.started for part in parts),
    )  # fmt: skip
