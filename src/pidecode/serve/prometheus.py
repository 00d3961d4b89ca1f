# SPDX-License-Identifier: Apache-2.0
"""Server metrics in the Prometheus text format."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

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
        outcomes = {f'{{outcome="{name}"}}': getattr(queue.stats, name) for name in ("done", "failed", "cancelled")}
        counts = {f'{{path="{path}",status="{code}"}}': n for (path, code), n in sorted(self.counts.items())}
        metrics: list[tuple[str, str, str, Any]] = [  # name, type, help, and a value or values by label
            ("info", "gauge", "Version of pidecode.", {f'{{version="{__version__}"}}': 1}),
            ("start_time_seconds", "gauge", "Unix time at which the server started.", self.started),
            ("queue_waiting", "gauge", "Jobs waiting.", queue.waiting),
            ("queue_running", "gauge", "Jobs running, 0 or 1.", int(queue.running)),
            ("queue_capacity", "gauge", "Jobs that may wait.", queue.capacity),
            ("queue_refused_total", "counter", "Jobs refused because the queue was full.", queue.stats.refused),
            ("jobs_total", "counter", "Finished jobs by outcome.", outcomes),
            ("responses_total", "counter", "Responses by path and status.", counts),
            ("response_seconds", "histogram", "Seconds from request to end of its 2xx response.", self._histogram()),
            ("resident_memory_bytes", "gauge", "Main memory the process holds.", resident_memory()),
        ]
        lines = []
        for name, kind, help_text, value in metrics:
            if value is None:  # not known on this system
                continue
            lines += [f"# HELP pidecode_{name} {help_text}", f"# TYPE pidecode_{name} {kind}"]
            for labels, number in value.items() if isinstance(value, dict) else [("", value)]:
                lines.append(f"pidecode_{name}{labels} {number if isinstance(number, int) else round(number, 6)}")
        return "\n".join(lines) + "\n"

    def _histogram(self) -> dict[str, float]:
        """Values of the histogram by the end of their name and their labels."""
        samples: dict[str, float] = {}
        for path, counts in sorted(self.buckets.items()):
            for bound, total in zip((*BUCKETS, "+Inf"), accumulate(counts), strict=True):
                samples[f'_bucket{{path="{path}",le="{bound}"}}'] = total
            samples[f'_sum{{path="{path}"}}'] = self.seconds[path]
            samples[f'_count{{path="{path}"}}'] = sum(counts)
        return samples
