# SPDX-License-Identifier: Apache-2.0
"""Load `pidecode serve` on loopback for a bounded number of requests, and say what was answered, refused and lost.

    python tools/load_test.py --clients 12 --requests 10

The server is a process of its own, with a network of the real classes at debug_config size and random weights: what is
measured is the server, not the network. A third of the clients are impatient: they hang up in the middle of every
third request. Prints JSON. Counts and ratios travel between machines; the seconds do not.
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


class Tally:
    """What the clients saw. `lost` is what may never happen: no answer, or a broken one, to a client that stayed."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.seen: Counter[str] = Counter()
        self.waits: list[float] = []

    def note(self, what: str, seconds: float | None = None) -> None:
        with self.lock:
            self.seen[what] += 1
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


def client(port: int, number: int, requests: int, body: bytes, tally: Tally) -> None:
    for turn in range(requests):
        while True:
            leaves = number % 3 == 0 and turn % 3 == 2
            try:
                again = _one(port, f"/v1/decode?space=flux2&steps=2&seed={number * 1000 + turn}", body, leaves, tally)
            except OSError as error:
                tally.note(f"lost: {type(error).__name__}")
                again = 0.0
            if not again:
                break
            time.sleep(again)


def _one(port: int, path: str, body: bytes, leaves: bool, tally: Tally) -> float:
    """One request; returns how long to wait before it is asked again, 0 if it need not be."""
    began = time.monotonic()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request("POST", path, body)
        if leaves:
            time.sleep(0.05)
            tally.note("left")
            return 0.0
        answer = connection.getresponse()
        data = answer.read()
        if answer.status == 429:
            tally.note("refused")
            return min(2.0, float(answer.headers["Retry-After"]))
        whole = answer.status == 200 and data.endswith(PNG_END)
        tally.note("answered" if whole else f"lost: status {answer.status}", time.monotonic() - began)
        return 0.0
    finally:
        connection.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--requests", type=int, default=10, help="per client and round")
    parser.add_argument("--rounds", type=int, default=3, help="memory is compared from the end of the first on")
    parser.add_argument("--queue", type=int, default=4)
    wish = parser.parse_args()
    body = save({"latent": torch.randn(1, 128, 1, 1)})
    with tempfile.TemporaryDirectory() as folder:
        weights = Path(folder) / "load.safetensors"
        write_weights(weights)
        command = [sys.executable, "-m", "pidecode", "serve", "--port", "0", "--device", "cpu", "--model", str(weights)]
        process = subprocess.Popen([*command, "--queue", str(wish.queue)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            port = int(re.search(r":(\d+) ", process.stdout.readline())[1])  # type: ignore[index]
            tally, resident = Tally(), []
            for _ in range(wish.rounds):
                threads = [
                    threading.Thread(target=client, args=(port, number, wish.requests, body, tally))
                    for number in range(wish.clients)
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
                resident.append(metrics(port)["pidecode_resident_memory_bytes"])
            told = metrics(port)
        finally:
            process.terminate()
            stopped = process.wait(60)
    print(json.dumps(report(wish, tally, told, resident, stopped), indent=2))


def report(
    wish: argparse.Namespace, tally: Tally, told: dict[str, float], resident: list[float], stopped: int
) -> dict[str, object]:
    seen = tally.seen
    return {
        "clients": wish.clients,
        "requests": wish.clients * wish.requests * wish.rounds,
        "waiting_places": wish.queue,
        "answered": seen["answered"],
        "left_by_the_client": seen["left"],
        "refused_with_429_and_asked_again": seen["refused"],
        "lost": {name: count for name, count in seen.items() if name.startswith("lost")},
        "jobs_cancelled": int(told['pidecode_jobs_total{outcome="cancelled"}']),
        "jobs_failed": int(told['pidecode_jobs_total{outcome="failed"}']),
        "longest_wait_in_mean_waits": round(max(tally.waits) / (sum(tally.waits) / len(tally.waits)), 1),
        "resident_memory_by_round": [round(one / resident[0], 3) for one in resident],
        "exit_status": stopped,
    }


if __name__ == "__main__":
    main()
