# SPDX-License-Identifier: Apache-2.0
"""What came of a batch: one outcome per job, and the report over all of them, as sentences and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pidecode.units import format_seconds

State = Literal["done", "skipped", "failed"]
LISTED = 20
"""Failures that the sentences name; the JSON holds all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of one job: images made, "skipped" (done before), or an error and why, in seconds of its worker."""

    name: str
    state: State
    seconds: float
    images: int = 0
    megapixels: float = 0.0
    error: str | None = None
    why: str | None = None
    worker: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A finished or interrupted batch."""

    jobs: int
    """Jobs there were."""
    outcomes: tuple[Outcome, ...]
    """Those that came to an end."""
    seconds: float
    """Wall-clock time, loading included."""
    engine: str
    workers: int
    interrupted: bool = False
    lost_workers: int = 0
    """Workers that died and were replaced."""
    started: str = ""
    """ISO date and time in UTC."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """The model and the settings."""

    def count(self, state: State) -> int:
        """Jobs that ended in that state."""
        return sum(outcome.state == state for outcome in self.outcomes)

    @property
    def failures(self) -> list[Outcome]:
        """Jobs that failed, by name."""
        return sorted((item for item in self.outcomes if item.state == "failed"), key=lambda item: item.name)

    @property
    def images(self) -> int:
        """Images written."""
        return sum(outcome.images for outcome in self.outcomes)

    @property
    def complete(self) -> bool:
        """Whether every job is done."""
        return not self.interrupted and not self.failures and len(self.outcomes) == self.jobs

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON values."""
        megapixels = sum(outcome.megapixels for outcome in self.outcomes)
        seconds = max(self.seconds, 1e-9)
        return {
            "format": 1,
            "complete": self.complete,
            "interrupted": self.interrupted,
            "jobs": self.jobs,
            "done": self.count("done"),
            "skipped": self.count("skipped"),
            "failed": self.count("failed"),
            "left": self.jobs - len(self.outcomes),
            "images": self.images,
            "speed": {
                "seconds": round(self.seconds, 3),
                "images_per_minute": round(60 * self.images / seconds, 2),
                "megapixels_per_second": round(megapixels / seconds, 3),
            },
            "engine": self.engine,
            "workers": self.workers,
            "lost_workers": self.lost_workers,
            "started": self.started,
            **self.facts,
            "failures": [{"source": item.name, "error": item.error, "why": item.why} for item in self.failures],
            "outcomes": [_short(outcome) for outcome in sorted(self.outcomes, key=lambda item: item.name)],
        }

    def sentences(self) -> str:
        """The report for people: what was done, how fast, and what failed and why."""
        lines = [f"{self.count('done')} of {self.jobs} done, {_also(self)}."]
        if self.images:
            lines.append(
                f"{_many(self.images, 'image')} in {format_seconds(self.seconds)}: "
                f"{60 * self.images / max(self.seconds, 1e-9):.1f} a minute, "
                f"with {_many(self.workers, 'worker')} ({self.engine})."
            )
        if self.lost_workers:
            lines.append(f"{_many(self.lost_workers, 'worker')} died and had to be replaced; nothing was lost.")
        failures = self.failures
        lines += [f"Failed: {item.name}: {item.why}" for item in failures[:LISTED]]
        if len(failures) > LISTED:
            lines.append(f"... and {len(failures) - LISTED} more; the report file names all.")
        left = self.jobs - len(self.outcomes)
        if self.interrupted or left:
            lines.append(f"Stopped with {_many(left, 'job')} left; the same command goes on from here.")
        elif failures:
            lines.append("The same command tries again what failed.")
        return "\n".join(lines)


def _also(report: Report) -> str:
    return f"{report.count('skipped')} were done before, {report.count('failed')} failed"


def _short(outcome: Outcome) -> dict[str, Any]:
    values = {key: value for key, value in asdict(outcome).items() if value not in (None, 0, 0.0)}
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in values.items()}


def _many(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def merge(reports: Iterable[Report]) -> Report:
    """One report of the parts of a batch that several processes worked on; its time is that of the longest."""
    parts = list(reports)
    first = parts[0]
    return Report(
        jobs=sum(part.jobs for part in parts),
        outcomes=tuple(outcome for part in parts for outcome in part.outcomes),
        seconds=max(part.seconds for part in parts),
        engine=first.engine,
        workers=sum(part.workers for part in parts),
        interrupted=any(part.interrupted for part in parts),
        lost_workers=sum(part.lost_workers for part in parts),
        started=min(part.started for part in parts),
        facts=first.facts,
    )
