# SPDX-License-Identifier: Apache-2.0
"""What is installed and what is built: few dependencies, none that is banned, a wheel with everything in it."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# Each of these drags in torchvision (whose compiled half must match torch's build exactly, or transformers
# and diffusers stop importing), replaces torch, or has a license that does not go with ours.
BANNED = {
    "torchvision", "torchaudio", "lpips", "timm", "spandrel", "open-clip-torch", "litdata", "pyiqa",
    "xformers", "flash-attn",
}  # fmt: skip


@pytest.fixture(scope="module")
def project(root: Path) -> dict[str, Any]:
    with (root / "pyproject.toml").open("rb") as file:
        return tomllib.load(file)["project"]


def requirements(project: dict[str, Any]) -> list[Requirement]:
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return [Requirement(line) for line in lines]


def closure(wanted: list[Requirement]) -> set[str]:
    """Names of every distribution that `wanted` brings along, as far as they are installed here."""
    seen: set[tuple[str, str]] = set()
    queue = [(canonicalize_name(item.name), extra) for item in wanted for extra in ("", *item.extras)]
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            lines = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue
        for line in lines:
            item = Requirement(line)
            if item.marker is None or item.marker.evaluate({"extra": extra}):
                queue += [(canonicalize_name(item.name), inner) for inner in ("", *item.extras)]
    return {name for name, _ in seen}


def test_nothing_banned_is_asked_for(project: dict[str, Any]) -> None:
    assert {canonicalize_name(item.name) for item in requirements(project)} & BANNED == set()


def test_nothing_banned_comes_along(project: dict[str, Any]) -> None:
    brought = closure([item for item in requirements(project) if item.name != "pidecode"])
    assert "torch" in brought
    assert "filelock" in brought  # the walk does go below the first level
    assert brought & BANNED == set()


def test_the_base_stays_small(project: dict[str, Any]) -> None:
    names = {Requirement(line).name for line in project["dependencies"]}
    assert names == {"torch", "safetensors", "huggingface-hub", "numpy", "pillow", "click", "filelock", "tqdm"}


def test_all_holds_every_extra_but_ray_and_dev(project: dict[str, Any]) -> None:
    extras = project["optional-dependencies"]
    (everything,) = (Requirement(line) for line in extras["all"])
    assert everything.extras == set(extras) - {"all", "dev", "ray"}


def test_the_package_does_not_pin_torch_but_the_constraint_does(project: dict[str, Any], root: Path) -> None:
    (asked,) = (item for item in requirements(project) if item.name == "torch")
    lines = (root / "constraints" / "torch.txt").read_text().splitlines()
    (pinned,) = (Requirement(line) for line in lines if not line.startswith("#"))
    assert str(asked.specifier) == ">=2.6"
    assert str(pinned.specifier).startswith("==")
    assert asked.specifier.contains(str(pinned.specifier).removeprefix("=="))


def make_env(root: Path) -> Any:
    spec = importlib.util.spec_from_file_location("make_env", root / "tools" / "make_env.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_build_of_torch_fits_the_machine(root: Path) -> None:
    choose = make_env(root).torch_attempts
    assert choose(system="Linux", nvidia=True, index="") == [[]]
    assert choose(system="Darwin", nvidia=False, index="") == [[]]
    assert choose(system="Linux", nvidia=False, index="https://rocm.example") == [
        ["--index-url", "https://rocm.example"]
    ]
    first, second, last = choose(system="Linux", nvidia=False, index="")
    assert "--no-index" in first
    assert second[:2] == ["--index-url", "https://download.pytorch.org/whl/cpu"]
    assert last == []


def test_the_wheel_holds_the_package_and_nothing_else(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    source = root / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "pidecode").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert names == expected
    assert "pidecode/py.typed" in names
    licenses = {Path(name).name for name in zipfile.ZipFile(wheel).namelist() if "/licenses/" in name}
    assert licenses == {"LICENSE", "NOTICE"}


def test_actions_are_pinned_by_commit(root: Path) -> None:
    used = re.findall(r"uses: (\S+)", "".join(path.read_text() for path in (root / ".github").rglob("*.yml")))
    assert used
    assert [name for name in used if not re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", name)] == []


def test_the_lock_holds_everything_development_needs(project: dict[str, Any], root: Path) -> None:
    lines = (root / "constraints" / "dev.txt").read_text().splitlines()
    locked = {Requirement(line).name: str(Requirement(line).specifier) for line in lines if not line.startswith("#")}
    assert all(version.startswith("==") for version in locked.values())
    assert "torch" not in locked  # constraints/torch.txt
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "ray"}
    dev = [Requirement(line) for lines in extras.values() for line in lines]
    named = {canonicalize_name(item.name) for item in dev} - {"pidecode"}
    assert named <= set(locked)
    for item in [*dev, *(Requirement(line) for line in project["dependencies"])]:
        name = canonicalize_name(item.name)
        if name in locked:
            assert item.specifier.contains(locked[name].removeprefix("==")), name


def test_the_sdist_holds_what_the_tests_read(root: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    kept = {"comfyui/README.md", ".github/workflows/check.yml", "constraints/dev.txt", "SECURITY.md", "zensical.toml"}
    assert kept <= names
    assert {path.relative_to(root).as_posix() for path in (root / "tests").rglob("*.py")} <= names


def test_the_lowest_versions_that_ci_runs_are_those_declared(root: Path, project: dict[str, Any]) -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (root / "constraints" / name).read_text(encoding="utf-8").splitlines()
        return dict(line.split("==") for line in lines if line and not line.startswith("#"))

    extras = pins("lowest-extras.txt")
    assert extras.pop("huggingface-hub") == "1.3.0"  # which transformers asks for, above our own bound
    pinned = pins("lowest.txt") | extras
    declared = {item.name: item.specifier for item in requirements(project)}
    for name, version in pinned.items():
        if name in declared:
            (bound,) = declared[name]
            assert bound.operator == ">="
            assert Version(bound.version) == Version(version), name
    assert pinned.keys() - declared.keys() == {"starlette"}  # fastapi's own
