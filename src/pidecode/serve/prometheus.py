# SPDX-License-Identifier: Apache-2.0
"""What the server counts, as Prometheus reads it."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, MutableMapping
from typing import Any

from pidecode import __version__
from pidecode.serve.estimate import resident_memory
from pidecode.serve.http import App, Receive, Scope, Send
from pidecode.serve.queue import JobQueue

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds, in seconds, of the histogram's buckets."""

Sample = tuple[str, str, float]
"""Suffix of the name, labels, value."""


class MetricsMiddleware:
    """ASGI middleware that counts answers by path and status, and times them."""

    def __init__(self, app: App, *, paths: Iterable[str], tally: Answers) -> None:
        self.app = app
        self.paths = frozenset(paths)
        self.tally = tally

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on and note its answer."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.paths else "other"
        began, status = time.monotonic(), 0

        async def noting(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, noting)
        finally:
            self.tally.note(path, status or 500, time.monotonic() - began)


class Answers:
    """Answers given so far."""

    def __init__(self) -> None:
        self.began = time.time()
        self.counts: Counter[tuple[str, int]] = Counter()
        self.buckets: dict[str, list[int]] = {}
        self.seconds: dict[str, float] = {}

    def note(self, path: str, status: int, seconds: float) -> None:
        """Count one answer. Only whole answers (2xx) enter the times."""
        self.counts[path, status] += 1
        if 200 <= status < 300:
            self.buckets.setdefault(path, [0] * (len(BOUNDS) + 1))[bisect_left(BOUNDS, seconds)] += 1
            self.seconds[path] = self.seconds.get(path, 0.0) + seconds

    def text(self, queue: JobQueue) -> str:
        """Everything in Prometheus' text format."""
        tally = queue.tally
        outcomes = [("", f'outcome="{name}"', getattr(tally, name)) for name in ("done", "failed", "cancelled")]
        counts = [
            ("", f'path="{path}",status="{status}"', count) for (path, status), count in sorted(self.counts.items())
        ]
        resident = resident_memory()
        lines = [
            *_family("info", "gauge", "Version of pidecode.", [("", f'version="{__version__}"', 1)]),
            *_one("start_time_seconds", "gauge", "When the server began, in seconds since 1970.", self.began),
            *_one("queue_waiting", "gauge", "Jobs that wait.", queue.waiting),
            *_one("queue_running", "gauge", "Jobs that run, 0 or 1.", int(queue.running)),
            *_one("queue_capacity", "gauge", "Jobs that may wait.", queue.capacity),
            *_one("queue_refused_total", "counter", "Jobs refused because the line was full.", tally.refused),
            *_family("jobs_total", "counter", "Jobs that ended, by outcome.", outcomes),
            *_family("answers_total", "counter", "Answers by path and status.", counts),
            *_family(
                "answer_seconds", "histogram", "From a request's head to the end of its 2xx answer.", self._times()
            ),
        ]
        if resident is not None:
            lines += _one("resident_memory_bytes", "gauge", "Main memory the process holds.", resident)
        return "\n".join(lines) + "\n"

    def _times(self) -> list[Sample]:
        samples: list[Sample] = []
        for path, counts in sorted(self.buckets.items()):
            total = 0
            for bound, count in zip((*BOUNDS, "+Inf"), counts, strict=True):
                total += count
                samples.append(("_bucket", f'path="{path}",le="{bound}"', total))
            samples.append(("_sum", f'path="{path}"', self.seconds[path]))
            samples.append(("_count", f'path="{path}"', total))
        return samples


def _family(name: str, kind: str, words: str, samples: Iterable[Sample]) -> list[str]:
    full = f"pidecode_{name}"
    lines = [f"# HELP {full} {words}", f"# TYPE {full} {kind}"]
    for suffix, labels, value in samples:
        lines.append(
            f"{full}{suffix}{f'{{{labels}}}' if labels else ''} {value if isinstance(value, int) else round(value, 6)}"
        )
    return lines


def _one(name: str, kind: str, words: str, value: float) -> list[str]:
    return _family(name, kind, words, [("", "", value)])
