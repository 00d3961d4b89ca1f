# SPDX-License-Identifier: Apache-2.0
"""`make attack`: its variants are seeded and hostile, and a fault is seen as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from attack import readers
from attack.mutate import hostile_json, mutated
from attack.run import KINDS, run_kind
from pidecode.errors import SettingError
from pidecode.strict_json import parse_json


def test_variants_are_seeded() -> None:
    value = {"a": [1, 2], "b": {"c": "d"}}
    for make in (lambda rng: mutated(rng, bytes(100)), lambda rng: hostile_json(rng, value)):
        assert [make(Random(seed)) for seed in range(20)] == [make(Random(seed)) for seed in range(20)]
        assert len({make(Random(seed)) for seed in range(20)}) > 10
    accepted = 0
    for seed in range(200):
        try:
            json.dumps(parse_json(hostile_json(Random(seed), value)), allow_nan=False).encode()
            accepted += 1
        except ValueError:
            continue
    assert 40 < accepted < 160


class Results:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, result: Any) -> None:
        self.sent.append(result)


def test_faults_are_told_from_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise SettingError("no")

    def fail() -> None:
        raise TypeError("oh")

    def trials(rng: Random, folder: Path) -> Iterator[readers.Trial]:
        yield [refuse, lambda: None]
        yield [refuse, fail]

    monkeypatch.setattr(readers, "manifests", trials)
    monkeypatch.setattr("torch.set_num_threads", lambda count: None)
    results = Results()
    run_kind("manifests", 0, 2, results)  # type: ignore[arg-type]
    faults = [result[1] for result in results.sent[:-1]]
    assert faults[0] is None
    assert faults[1].startswith("TypeError: oh (test_attack.py:")
    assert sum(count for _, _, count in KINDS.values()) >= 1000


@pytest.mark.slow
def test_a_few_of_each_kind() -> None:
    command = [sys.executable, str(Path(__file__).parents[1] / "attack" / "run.py"), "--count", "3", "--seed", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
