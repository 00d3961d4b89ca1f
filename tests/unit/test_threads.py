# SPDX-License-Identifier: Apache-2.0
"""Threads and number formats that suit a CPU: cores and quotas are kept to, and what the user said goes first."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks.decode import main
from pidecode import devices
from pidecode.cli import app
from pidecode.cli.app import cli
from pidecode.cli.doctor import cpu
from pidecode.devices import container_quota, physical_cores, recommended_threads


@pytest.fixture
def system(tmp_path: Path) -> Path:
    """Eight logical processors on four cores, in a control group."""
    for number in range(8):
        place = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(f"{number % 4},{number % 4 + 4}\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/work/job\n")
    (tmp_path / "sys/fs/cgroup/work/job").mkdir(parents=True)
    return tmp_path


def test_two_logical_processors_of_one_core_count_once(system: Path) -> None:
    assert physical_cores(range(8), system) == 4
    assert physical_cores([0, 4, 1], system) == 2
    assert physical_cores([0, 1], system / "nowhere") == 2


def test_the_tightest_quota_of_all_groups_above_counts(system: Path) -> None:
    groups = system / "sys/fs/cgroup"
    assert container_quota(system) is None
    (groups / "work/job/cpu.max").write_text("max 100000\n")
    assert container_quota(system) is None
    (groups / "work/cpu.max").write_text("150000 100000\n")
    assert container_quota(system) == 1.5
    (groups / "cpu.max").write_text("50000 100000\n")
    assert container_quota(system) == 0.5


def test_free_memory_is_what_the_tightest_group_leaves(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (system / "proc/meminfo").write_text("MemTotal: 9 kB\nMemAvailable:    8000 kB\n")
    assert devices._free_host_memory(system) == 8000 * 1024
    group = system / "sys/fs/cgroup/work"
    (group / "job/memory.max").write_text("max\n")
    (group / "job/memory.current").write_text("1000\n")
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 5\ninactive_file 1000000\nactive_file 7\n")
    assert devices._free_host_memory(system) == 3_000_000
    (system / "proc/self/cgroup").write_text("4:memory:/a\n1:cpu:/\n0::/\n")
    older = system / "sys/fs/cgroup/memory/a"
    older.mkdir(parents=True)
    (older / "memory.limit_in_bytes").write_text("2000000\n")
    (older / "memory.usage_in_bytes").write_text("500000\n")
    (older / "memory.stat").write_text("inactive_file 1\ntotal_inactive_file 100000\n")
    assert devices._free_host_memory(system) == 1_600_000
    (system / "proc/self/statm").write_text("100 50 20 1 0 60 0\n")
    limit = 100 * resource.getpagesize() + 700_000  # what `ulimit -v` sets
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (limit, limit))
    assert devices._free_host_memory(system) == 700_000
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY,) * 2)
    assert devices._free_host_memory(system) == 1_600_000


def test_the_older_form_of_a_quota(tmp_path: Path) -> None:
    place = tmp_path / "sys/fs/cgroup/cpu"
    place.mkdir(parents=True)
    (place / "cpu.cfs_quota_us").write_text("-1\n")
    (place / "cpu.cfs_period_us").write_text("100000\n")
    assert container_quota(tmp_path) is None
    (place / "cpu.cfs_quota_us").write_text("300000\n")
    assert container_quota(tmp_path) == 3


def test_threads_keep_to_cores_and_quota(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    found = recommended_threads(8, {}, system)
    assert (found.count, found.reason) == (4, "this process may use 4 cores")
    (system / "sys/fs/cgroup/work/job/cpu.max").write_text("150000 100000\n")
    found = recommended_threads(8, {}, system)
    assert (found.count, found.reason) == (2, "the container's quota is 1.5 cores")
    assert recommended_threads(1, {}, system).count == 1


def test_what_the_user_set_goes_first(system: Path) -> None:
    found = recommended_threads(64, {"OMP_NUM_THREADS": "64"}, system)
    assert (found.count, found.reason) == (64, "OMP_NUM_THREADS is set")


def test_a_command_sets_the_threads_it_was_told(tmp_path: Path) -> None:
    before = torch.get_num_threads()
    try:
        done = CliRunner().invoke(main, ["--network", "debug", "--size", "64x64", "--repeats", "1", "--threads", "1"])
        assert done.exit_code == 0, done.output
        assert torch.get_num_threads() == 1
        assert "1 threads" in done.output
    finally:
        torch.set_num_threads(before)


def test_bfloat16_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert devices.default_dtype(cpu) == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert devices.default_dtype(cpu) == torch.bfloat16
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    assert devices.default_dtype(cpu) == torch.float32
    assert devices.default_dtype(torch.device("mps")) == torch.float32
    assert devices.default_dtype(torch.device("cuda")) == torch.bfloat16


def test_threads_that_cannot_act_are_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(cli, ["batch", str(tmp_path), str(tmp_path / "out"), "--engine", "ray", "--threads", "1"])
    assert done.exit_code == 2
    assert "other processes decode" in done.output


@pytest.mark.parametrize(("chosen", "expected"), [({}, "passive"), ({"OMP_WAIT_POLICY": "active"}, "active")])
def test_threads_wait_passively_unless_the_user_chose(
    chosen: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "environ", chosen)
    monkeypatch.setattr(app, "cli", lambda prog_name: None)
    app.main()
    assert cpu()["wait_policy"] == chosen["OMP_WAIT_POLICY"] == expected
