# SPDX-License-Identifier: Apache-2.0
"""What every test lives with: two threads, no network but this machine's own addresses, hubs offline."""

from __future__ import annotations

import ipaddress
import os
import socket
from pathlib import Path
from typing import Any

import pytest

# Before torch or a hub client is imported, and inherited by every process a test starts.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """Top of the checkout, where README.md and pyproject.toml are."""
    return ROOT


def _stays_here(address: Any) -> bool:
    if not isinstance(address, tuple) or address[0] in ("localhost", ""):  # or a Unix socket's path
        return True
    try:
        host = ipaddress.ip_address(str(address[0]))
        with socket.socket(socket.AF_INET6 if host.version == 6 else socket.AF_INET) as probe:
            probe.bind((str(host), 0))  # only addresses of this machine can be bound to
    except (ValueError, OSError):
        return False
    return True


@pytest.fixture(autouse=True)
def _closed_network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse every connection that leaves this machine, unless the test is marked `network`."""
    if request.node.get_closest_marker("network") is None:
        for name in ("connect", "connect_ex"):
            real = getattr(socket.socket, name)

            def guarded(self: socket.socket, address: Any, real: Any = real) -> Any:
                if not _stays_here(address):
                    raise AssertionError(f"A test tried to reach {address}; mark it `network` if it must.")
                return real(self, address)

            monkeypatch.setattr(socket.socket, name, guarded)


@pytest.fixture(autouse=True)
def _private_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep tests away from the developer's own model cache, and it from them."""
    home = tmp_path_factory.getbasetemp() / "home"
    home.mkdir(exist_ok=True)
    monkeypatch.setenv("HF_HOME", str(home / "huggingface"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
