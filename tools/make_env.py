# SPDX-License-Identifier: Apache-2.0
"""Make a virtual environment with pidecode in it, choosing the build of torch that fits the machine.

    python tools/make_env.py .venv dev          # the environment, and the extras to install

Only the standard library is used, so that a machine with nothing but Python can run it. torch goes
first: a plain `pip install torch` on Linux brings several gigabytes of CUDA libraries, which a machine
without an NVIDIA card has no use for. Set TORCH_INDEX to a package index to overrule the choice
(a ROCm build, say).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints" / "torch.txt"
LOCK = ROOT / "constraints" / "dev.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
OLDEST = (3, 11)


def has_nvidia() -> bool:
    """Whether an NVIDIA driver answers on this machine."""
    if Path("/proc/driver/nvidia/version").exists():
        return True
    smi = shutil.which("nvidia-smi") or shutil.which("/usr/lib/wsl/lib/nvidia-smi")
    return smi is not None and subprocess.run([smi], capture_output=True, check=False).returncode == 0


def torch_attempts(*, system: str, nvidia: bool, index: str) -> list[list[str]]:
    """Options for `pip install torch`, to be tried in order until one succeeds."""
    if index:
        return [["--index-url", index]]
    if system != "Linux" or nvidia:
        return [[]]  # PyPI's own build: CUDA on Linux, Metal on a Mac, CPU on Windows
    return [
        ["--no-index", "--no-deps"],  # a wheel that this machine's pip settings already point at
        ["--index-url", CPU_INDEX, "--no-deps", "--retries", "0", "--timeout", "20"],
        [],
    ]


def venv_python(venv: Path) -> Path:
    """The interpreter inside a virtual environment."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def make_venv(venv: Path) -> Path:
    """Create the environment unless it is there; returns its interpreter."""
    python = venv_python(venv)
    if python.exists():
        return python
    print(f"Making a virtual environment in {venv} ...", flush=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(venv)], check=False)
    if made.returncode:
        shutil.rmtree(venv, ignore_errors=True)
        sys.exit("Python's venv module does not work here; on Debian or Ubuntu: apt-get install python3-venv")
    return python


def torch_version(python: Path) -> str:
    """Version of the torch installed beside `python`, or an empty string."""
    code = "from importlib.metadata import version; print(version('torch'))"
    found = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    return found.stdout.strip() if found.returncode == 0 else ""


def install_torch(python: Path) -> None:
    """Install torch in the build this machine can use, unless one is there."""
    if torch_version(python):
        return
    print("Installing torch (once; some minutes on a slow line) ...", flush=True)
    attempts = torch_attempts(system=platform.system(), nvidia=has_nvidia(), index=os.environ.get("TORCH_INDEX", ""))
    for number, options in enumerate(attempts, start=1):
        last = number == len(attempts)
        command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), *options, "torch"]
        if subprocess.run(command, check=False, stderr=None if last else subprocess.DEVNULL).returncode == 0:
            return
        if not last and attempts[number] == []:
            print("PyTorch's CPU builds cannot be reached: taking PyPI's build, which is large.", flush=True)
    sys.exit("torch could not be installed; pip's message stands above.")


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit("usage: make_env.py VENV EXTRAS")
    if sys.version_info < OLDEST:
        sys.exit(
            f"Python {platform.python_version()} is too old for pidecode, which needs 3.11 to 3.13: "
            "name another, as in `make setup PYTHON=python3.12`."
        )
    venv, extras = Path(sys.argv[1]), sys.argv[2]
    python = make_venv(venv)
    install_torch(python)
    print(f"Installing pidecode[{extras}] beside torch {torch_version(python)} ...", flush=True)
    locked = ["-c", str(LOCK)] if extras == "dev" else []
    command = [str(python), "-m", "pip", "install", "--quiet", "-c", str(CONSTRAINTS), *locked]
    command += ["-e", f"{ROOT}[{extras}]"]
    if code := subprocess.run(command, check=False).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
