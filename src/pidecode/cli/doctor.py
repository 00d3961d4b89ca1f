# SPDX-License-Identifier: Apache-2.0
"""`pidecode doctor`: what is on this machine, what will work, and why the rest will not."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from dataclasses import asdict
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import click

from pidecode.cli.common import Check, GroupedCommand, emit, json_option, space_option
from pidecode.errors import SettingError
from pidecode.units import format_bytes
from pidecode.version import __version__

PACKAGES = ("torch", "safetensors", "huggingface-hub", "numpy", "pillow", "diffusers", "transformers", "accelerate")

# Extra -> the modules that must be importable for it to count as installed.
EXTRAS: dict[str, tuple[str, ...]] = {
    "text": ("transformers", "sentencepiece"), "diffusers": ("diffusers", "transformers", "accelerate"),
    "demo": ("skimage",), "serve": ("fastapi", "uvicorn"), "train": ("tensorboard",), "ray": ("ray",),
}  # fmt: skip


def versions() -> dict[str, str | None]:
    """Versions of pidecode, Python and the packages it leans on; None where one is missing."""
    found: dict[str, str | None] = {"pidecode": __version__, "python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def extras() -> dict[str, list[str]]:
    """Every extra with the modules that are missing for it; an empty list means it is complete."""
    return {extra: [name for name in modules if find_spec(name) is None] for extra, modules in EXTRAS.items()}


def memory() -> dict[str, int | None]:
    """Main memory in bytes: all of it, and what is free for use now (None where the system does not say)."""
    found: dict[str, int | None] = {"total_bytes": None, "available_bytes": None}
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        found["total_bytes"] = page * os.sysconf("SC_PHYS_PAGES")
        found["available_bytes"] = page * os.sysconf("SC_AVPHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return found
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file)
        found["available_bytes"] = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass
    return found


def devices() -> list[dict[str, Any]]:
    """The devices torch can compute on here, the CPU first."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.processor() or platform.machine(), "cores": cores, **memory()}
    ]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            free, total = torch.cuda.mem_get_info(index)
            found.append(
                {
                    "device": f"cuda:{index}", "name": properties.name,
                    "capability": f"{properties.major}.{properties.minor}", "total_bytes": total,
                    "available_bytes": free,
                }
            )  # fmt: skip
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Metal", **memory()})
    return found


def build_of_torch() -> dict[str, Any]:
    """Which build of torch this is: what it was compiled for."""
    import torch

    return {"cuda": torch.version.cuda, "hip": torch.version.hip}


def cpu() -> dict[str, Any]:
    """How decodes run on the CPU: threads, number format, and whether elementwise ops can be compiled."""
    import torch

    from pidecode.devices import default_dtype, recommended_threads, require_compiler
    from pidecode.errors import MissingDependencyError

    cpu, threads, compiler = torch.device("cpu"), recommended_threads(torch.get_num_threads()), ""
    try:
        require_compiler(cpu)
    except MissingDependencyError as error:
        compiler = str(error)
    return {
        "threads": threads.count, "threads_because": threads.reason,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "OpenMP's own"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "dtype": str(default_dtype(cpu)).removeprefix("torch."), "compiler_missing": compiler or None,
    }  # fmt: skip


def attention() -> list[dict[str, Any]]:
    """The attention kernels that were measured on this machine to be the fastest, with the seconds of all."""
    from pidecode.models.attention import read_record, record_path

    return [
        {"where": where, "shape": shape, **entry}
        for where, shapes in read_record(record_path()).items() for shape, entry in shapes.items()
    ]  # fmt: skip


def _library_checks(missing: dict[str, list[str]]) -> Iterator[Check]:
    for extra, purpose in (
        ("text", "prompts for the released decoders"),
        ("diffusers", "images to latents with the image models' own encoders"),
    ):
        lacking = missing[extra]
        reason = f"{', '.join(lacking)} missing: pip install 'pidecode[{extra}]'" if lacking else "installed"
        yield Check(f"library for {purpose}", not lacking, reason)


def _torch_checks(build: dict[str, Any], found: list[dict[str, Any]]) -> Iterator[Check]:
    from shutil import which

    on_gpu = any(device["device"] != "cpu" for device in found)
    if on_gpu:
        yield Check("decoding on a GPU", True, ", ".join(d["name"] for d in found if d["device"] != "cpu"))
    elif which("nvidia-smi") and build["cuda"] is None:
        reason = "there is an NVIDIA driver, but this torch is a CPU build: install the CUDA build (README.md, Install)"
        yield Check("decoding on a GPU", False, reason)
    elif build["cuda"] or build["hip"]:
        yield Check("decoding on a GPU", False, "torch finds no usable GPU; is the driver running?")
    else:
        yield Check("decoding on a GPU", False, "no GPU; small images decode on the CPU")
    if find_spec("torchvision") is not None:
        yield _torchvision_check()


def _cpu_checks(found: dict[str, Any]) -> Iterator[Check]:
    narrow = found["dtype"] == "bfloat16"
    because = (
        "instructions for its products, so it is the default" if narrow else "no instructions for it: float32 is faster"
    )
    yield Check("bfloat16 on the CPU", narrow, because)
    missing = found["compiler_missing"]
    yield Check("compiling for the CPU (--compile)", missing is None, missing or "a C++ compiler is here")


def _torchvision_check() -> Check:
    what = "torchvision, which pidecode does not need"
    try:
        import_module("torchvision")
    except Exception as error:  # a mismatched build fails in many ways
        reason = f"does not fit this torch ({error}), and breaks transformers: pip uninstall torchvision"
        return Check(what, False, reason)
    return Check(what, True, "fits this torch")


def examine() -> dict[str, Any]:
    """Everything the command reports, as plain values."""
    from pidecode.cli.weights import checks, rows

    missing, build, found, own = extras(), build_of_torch(), devices(), cpu()
    known = rows()
    judged = [
        *_torch_checks(build, found), *_cpu_checks(own), *_library_checks(missing), *checks(known)
    ]  # fmt: skip
    return {
        "versions": versions(), "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "executable": sys.executable, "torch": build, "devices": found, "cpu": own, "attention": attention(),
        "extras": {extra: not lacking for extra, lacking in missing.items()}, "models": known,
        "checks": [asdict(check) for check in judged],
    }  # fmt: skip


def _device_line(device: dict[str, Any]) -> str:
    memory = f"{format_bytes(device['available_bytes'])} of {format_bytes(device['total_bytes'])} free"
    cores = f", {device['cores']} cores" if "cores" in device else ""
    return f"  {device['device']:8s} {device['name']}{cores}, {memory}"


def _report(findings: dict[str, Any]) -> str:
    lines = ["Versions"]
    lines += [f"  {name:16s} {version or 'not installed'}" for name, version in findings["versions"].items()]
    lines += [f"  {'system':16s} {findings['platform']}", "", "Devices"]
    lines += [_device_line(device) for device in findings["devices"]]
    own = findings["cpu"]
    threads = f"{own['threads']} threads ({own['threads_because']}; they wait {own['wait_policy']})"
    lines.append(f"  {'':8s} {threads}, {own['instructions']}, {own['dtype']}")
    for entry in findings["attention"]:
        times = ", ".join(f"{name} {seconds * 1e3:.2f} ms" for name, seconds in entry["seconds"].items())
        lines.append(f"  {'':8s} attention {entry['kernel']} on {entry['where']}, {entry['shape']} ({times})")
    lines += ["", "Extras"]
    lines += [
        f"  {'yes' if there else 'no ':4s} {extra}" + ("" if there else f"   pip install 'pidecode[{extra}]'")
        for extra, there in findings["extras"].items()
    ]
    lines += ["", "What works here"]
    return "\n".join([*lines, *_marks(findings["checks"])])


def _space_report(space: str, model: str | None, encoder: str | None) -> list[dict[str, Any]]:
    from pidecode.cli.space_check import check_space

    return [asdict(check) for check in check_space(space, model=model, encoder=encoder)]


def _marks(checks: list[dict[str, Any]]) -> list[str]:
    return [f"  {'yes' if one['ok'] else 'no ':4s} {one['name']}: {one['reason']}" for one in checks]


@click.command(cls=GroupedCommand)
@space_option
@click.option("-m", "--model", help="With --space: a decoder's name or file, if not the official one.")
@click.option("--encoder", help="With --space: the space's encoder, if it was not pulled.")
@json_option
def doctor(space: str | None, model: str | None, encoder: str | None, as_json: bool) -> None:
    """Say what will work on this machine, and why the rest will not.

    With --space, try one latent space instead: its files, their shapes, and one small decode.
    """
    if space is None:
        if model or encoder:
            raise SettingError("--model and --encoder act together with --space; name one.")
        findings = examine()
        emit(findings, lambda: _report(findings), as_json=as_json)
        return
    checks = _space_report(space, model, encoder)
    emit({"space": space, "checks": checks}, lambda: "\n".join([f"Space {space}", *_marks(checks)]), as_json=as_json)
