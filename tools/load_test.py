# SPDX-License-Identifier: Apache-2.0
"""Load `pidecode serve` on loopback with a bounded number of requests, and report how they ended.

    python tools/load_test.py --clients 12 --requests 10

The server is a process of its own with a random debug-size network: the server is measured, not the network. A third
of the clients disconnect in the middle of every third request. Prints JSON. Counts and ratios can be compared between
machines; seconds cannot.
"""

from __future__ import annotations

import argparse
import http.client
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import torch
from safetensors.torch import save, save_file

from pidecode.models.pid.network import PiDNet
from pidecode.registry.configs import debug_config
from pidecode.weights.metadata import CheckpointMetadata

CONFIG = debug_config(text_dim=0, latent_channels=128, latent_down=16, latent_unpatchify=2, prediction="x0")
PNG_END = b"IEND\xaeB`\x82"


class ClientStats:
    """What the clients saw. `lost` must not happen: no response, or a broken one, to a client that stayed connected."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: Counter[str] = Counter()
        self.waits: list[float] = []

    def record(self, what: str, seconds: float | None = None) -> None:
        with self.lock:
            self.counts[what] += 1
            if seconds is not None:
                self.waits.append(seconds)


def write_weights(path: Path) -> None:
    torch.manual_seed(0)
    net = PiDNet(CONFIG)
    for parameter in net.parameters():
        parameter.data.normal_(std=0.2)
    identity = CheckpointMetadata(kind="student", config=CONFIG, space="flux2", license="Apache-2.0")
    save_file(dict(net.state_dict()), str(path), identity.to_metadata())


def metrics(port: int) -> dict[str, float]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    return {key: float(value) for key, value in re.findall(r"^(\w[^ ]*) ([0-9.e+]+)$", text, re.M)}


def client(port: int, number: int, requests: int, body: bytes, stats: ClientStats) -> None:
    for turn in range(requests):
        while True:
            disconnects = number % 3 == 0 and turn % 3 == 2
            try:
                again = _one(
                    port, f"/v1/decode?space=flux2&num_steps=2&seed={number * 1000 + turn}", body, disconnects, stats
                )
            except OSError as error:
                stats.record(f"lost: {type(error).__name__}")
                again = 0.0
            if not again:
                break
            time.sleep(again)


def _one(port: int, path: str, body: bytes, disconnects: bool, stats: ClientStats) -> float:
    """Send one request; return the seconds after which to retry it, 0 if it is finished."""
    started = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", path, body)
        if disconnects:
            time.sleep(0.05)
            stats.record("disconnected")
            return 0.0
        answer = connection.getresponse()
        data = answer.read()
        if answer.status == 429:
            stats.record("refused")
            return min(2.0, float(answer.headers["Retry-After"]))
        whole = answer.status == 200 and data.endswith(PNG_END)
        stats.record("answered" if whole else f"lost: status {answer.status}", time.monotonic() - started)
        return 0.0
    finally:
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--requests", type=int, default=10, help="per client and round")
    parser.add_argument("--rounds", type=int, default=3, help="memory is compared from the end of the first on")
    parser.add_argument("--queue", type=int, default=4)
    args = parser.parse_args()
    body = save({"latent": torch.randn(1, 128, 1, 1)})
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "load.safetensors"
        write_weights(weights)
        command = [sys.executable, "-m", "pidecode", "serve", "--port", "0", "--device", "cpu", "--model", str(weights)]
        process = subprocess.Popen([*command, "--queue", str(args.queue)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            port = int(re.search(r":(\d+) ", process.stdout.readline())[1])  # type: ignore[index]
            stats, resident = ClientStats(), []
            for _ in range(args.rounds):
                threads = [
                    threading.Thread(target=client, args=(port, number, args.requests, body, stats))
                    for number in range(args.clients)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                resident.append(metrics(port)["pidecode_resident_memory_bytes"])
            server_metrics = metrics(port)
        finally:
            process.terminate()
            stopped = process.wait(60)
    print(json.dumps(report(args, stats, server_metrics, resident, stopped), indent=2))


def report(
    args: argparse.Namespace, stats: ClientStats, server_metrics: dict[str, float], resident: list[float], stopped: int
) -> dict[str, object]:
    counts = stats.counts
    return {
        "clients": args.clients,
        "requests": args.clients * args.requests * args.rounds,
        "waiting_places": args.queue,
        "answered": counts["answered"],
        "disconnected": counts["disconnected"],
        "refused_with_429_and_retried": counts["refused"],
        "lost": {name: count for name, count in counts.items() if name.startswith("lost")},
        "jobs_cancelled": int(server_metrics['pidecode_jobs_total{outcome="cancelled"}']),
        "jobs_failed": int(server_metrics['pidecode_jobs_total{outcome="failed"}']),
        "longest_wait_over_mean_wait": round(max(stats.waits) / (sum(stats.waits) / len(stats.waits)), 1),
        "resident_memory_by_round": [round(one / resident[0], 3) for one in resident],
        "exit_status": stopped,
    }


if __name__ == "__main__":
    main()
