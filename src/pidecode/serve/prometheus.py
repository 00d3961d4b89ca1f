# SPDX-License-Identifier: Apache-2.0
"""Server metrics in the Prometheus text format."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pidecode.devices import resident_memory
from pidecode.serve.queue import JobQueue
from pidecode.version import __version__

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BUCKETS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the histogram's buckets, in seconds."""


class MetricsMiddleware:
    """ASGI middleware that records the status and duration of responses by path; unknown paths are counted together."""

    def __init__(self, app: ASGIApp, *, paths: Iterable[str], stats: ResponseStats) -> None:
        self.app = app
        self.paths = frozenset(paths)
        self.stats = stats

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Forward a request and record its response."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        started, status = time.monotonic(), 0

        async def recording_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, recording_send)
        finally:
            self.stats.record(path, status or 500, time.monotonic() - started)


class ResponseStats:
    """Responses by path and status since the server started."""

    def __init__(self) -> None:
        self.started = time.time()
        self.counts: Counter[tuple[str, int]] = Counter()
        self.buckets: dict[str, list[int]] = {}
        self.seconds: dict[str, float] = {}

    def record(self, path: str, status: int, seconds: float) -> None:
        """Count one response. Only 2xx responses enter the histogram of durations."""
        self.counts[path, status] += 1
        if 200 <= status < 300:
            self.buckets.setdefault(path, [0] * (len(BUCKETS) + 1))[bisect_left(BUCKETS, seconds)] += 1
            self.seconds[path] = self.seconds.get(path, 0.0) + seconds

    def text(self, queue: JobQueue) -> str:
        """All metrics, those of `queue` included, in the Prometheus text format."""
        stats = queue.stats
        outcomes = [("", f'outcome="{name}"', getattr(stats, name)) for name in ("done", "failed", "cancelled")]
        counts = [
            ("", f'path="{path}",status="{status}"', count) for (path, status), count in sorted(self.counts.items())
        ]
        resident = resident_memory()
        lines = [
            *_metric("info", "gauge", "Version of pidecode.", [("", f'version="{__version__}"', 1)]),
            *_scalar("start_time_seconds", "gauge", "Unix time at which the server started.", self.started),
            *_scalar("queue_waiting", "gauge", "Jobs waiting.", queue.waiting),
            *_scalar("queue_running", "gauge", "Jobs running, 0 or 1.", int(queue.running)),
            *_scalar("queue_capacity", "gauge", "Jobs that may wait.", queue.capacity),
            *_scalar("queue_refused_total", "counter", "Jobs refused because the queue was full.", stats.refused),
            *_metric("jobs_total", "counter", "Finished jobs by outcome.", outcomes),
            *_metric("responses_total", "counter", "Responses by path and status.", counts),
            *_metric(
                "response_seconds", "histogram", "Seconds from request to end of its 2xx response.", self._histogram()
            ),
        ]
        if resident is not None:
            lines += _scalar("resident_memory_bytes", "gauge", "Main memory the process holds.", resident)
        return "\n".join(lines) + "\n"

    def _histogram(self) -> list[tuple[str, str, float]]:
        samples: list[tuple[str, str, float]] = []
        for path, counts in sorted(self.buckets.items()):
            total = 0
            for bound, count in zip((*BUCKETS, "+Inf"), counts, strict=True):
                total += count
                samples.append(("_bucket", f'path="{path}",le="{bound}"', total))
            samples.append(("_sum", f'path="{path}"', self.seconds[path]))
            samples.append(("_count", f'path="{path}"', total))
        return samples


def _metric(name: str, kind: str, help_text: str, samples: Iterable[tuple[str, str, float]]) -> list[str]:
    """One metric with its samples: suffix of the name, labels, value."""
    full = f"pidecode_{name}"
    lines = [f"# HELP {full} {help_text}", f"# TYPE {full} {kind}"]
    for suffix, labels, value in samples:
        lines.append(
            f"{full}{suffix}{f'{{{labels}}}' if labels else ''} {value if isinstance(value, int) else round(value, 6)}"
        )
    return lines


def _scalar(name: str, kind: str, help_text: str, value: float) -> list[str]:
    return _metric(name, kind, help_text, [("", "", value)])
