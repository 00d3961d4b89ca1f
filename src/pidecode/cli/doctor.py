# SPDX-License-Identifier: Apache-2.0
"""`pidecode doctor` and `pidecode plan`: what works on this machine, and what decoding to a size needs."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module, metadata
from importlib.util import find_spec
from shutil import which
from typing import TYPE_CHECKING, Any

import click

from pidecode.cli import common
from pidecode.engine.machine import GB, Machine, Quantization, this_machine
from pidecode.engine.plan import Plan, plan_decode
from pidecode.errors import MissingDependencyError, SettingError
from pidecode.registry.configs import RELEASED_CONFIGS
from pidecode.units import format_bytes, format_seconds, parse_bytes, parse_size
from pidecode.version import __version__

if TYPE_CHECKING:
    from pidecode.engine.feed_forward import FeedForwardPlan

PACKAGES = ("torch", "safetensors", "huggingface-hub", "numpy", "pillow", "diffusers", "transformers", "accelerate")

# Extra -> the modules that must be importable for it to count as installed.
EXTRAS: dict[str, tuple[str, ...]] = {
    "text": ("transformers", "sentencepiece"), "diffusers": ("diffusers", "transformers", "accelerate"),
    "demo": ("skimage",), "serve": ("fastapi", "uvicorn"), "train": ("tensorboard",), "ray": ("ray",),
}  # fmt: skip


def _version(package: str) -> str | None:
    with suppress(metadata.PackageNotFoundError):
        return metadata.version(package)
    return None


def devices() -> list[dict[str, Any]]:
    """The devices torch can compute on here, the CPU first; memory in bytes, None where the system does not say."""
    import torch

    from pidecode.devices import free_memory

    memory = {"total_bytes": None, "available_bytes": free_memory(torch.device("cpu"))}
    with suppress(AttributeError, OSError, ValueError):
        memory["total_bytes"] = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found: list[dict[str, Any]] = [
        {"device": "cpu", "name": platform.processor() or platform.machine(), "cores": cores, **memory}
    ]
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"device": f"cuda:{index}", "name": properties.name, "capability": capability,
                      "total_bytes": total, "available_bytes": free})  # fmt: skip
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Metal", **memory})
    return found


def cpu() -> dict[str, Any]:
    """How decodes run on the CPU: threads, number format, and whether elementwise ops can be compiled."""
    import torch

    from pidecode.devices import default_dtype, recommended_threads, require_compiler

    cpu, threads, compiler = torch.device("cpu"), recommended_threads(torch.get_num_threads()), None
    try:
        require_compiler(cpu)
    except MissingDependencyError as error:
        compiler = str(error)
    return {
        "threads": threads.count, "threads_because": threads.reason,
        "wait_policy": os.environ.get("OMP_WAIT_POLICY", "OpenMP's own"),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "dtype": str(default_dtype(cpu)).removeprefix("torch."), "compiler_missing": compiler,
    }  # fmt: skip


def attention() -> list[dict[str, Any]]:
    """The attention kernels that were measured on this machine to be the fastest, with the seconds of all."""
    from pidecode.models.attention import read_record, record_path

    return [
        {"where": where, "shape": shape, **entry}
        for where, shapes in read_record(record_path()).items() for shape, entry in shapes.items()
    ]  # fmt: skip


def _checks(build: dict[str, Any], found: list[dict[str, Any]], own: dict[str, Any]) -> Iterator[common.Check]:
    """What torch and the libraries allow, by what `devices` and `cpu` found."""
    gpus = ", ".join(device["name"] for device in found if device["device"] != "cpu")
    if not gpus and which("nvidia-smi") and build["cuda"] is None:
        gpu = "there is an NVIDIA driver, but this torch is a CPU build: install the CUDA build (README.md, Install)"
    elif build["cuda"] or build["hip"]:
        gpu = "torch finds no usable GPU; is the driver running?"
    else:
        gpu = "no GPU; small images decode on the CPU"
    yield common.Check("decoding on a GPU", bool(gpus), gpus or gpu)
    if find_spec("torchvision") is not None:
        what = "torchvision, which pidecode does not need"
        try:
            import_module("torchvision")
            yield common.Check(what, True, "fits this torch")
        except Exception as error:  # a mismatched build fails in many ways
            reason = f"does not fit this torch ({error}), and breaks transformers: pip uninstall torchvision"
            yield common.Check(what, False, reason)
    bfloat16, missing = own["dtype"] == "bfloat16", own["compiler_missing"]
    fast, slow = "instructions for its products, so it is the default", "no instructions for it: float32 is faster"
    yield common.Check("bfloat16 on the CPU", bfloat16, fast if bfloat16 else slow)
    yield common.Check("compiling for the CPU (--compile)", missing is None, missing or "a C++ compiler is here")


def examine() -> dict[str, Any]:
    """Everything the command reports, as plain values."""
    import torch

    from pidecode.cli.weights import checks, rows

    build, found, own, known = {"cuda": torch.version.cuda, "hip": torch.version.hip}, devices(), cpu(), rows()
    return {
        "versions": {"pidecode": __version__, "python": platform.python_version()}
        | {name: _version(name) for name in PACKAGES},
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}", "executable": sys.executable,
        "torch": build, "devices": found, "cpu": own, "attention": attention(),
        "extras": {extra: all(map(find_spec, names)) for extra, names in EXTRAS.items()}, "models": known,
        "checks": [asdict(check) for check in (*_checks(build, found, own), *checks(known))],
    }  # fmt: skip


def _report(findings: dict[str, Any]) -> str:
    lines = ["Versions"]
    lines += [f"  {name:16s} {version or 'not installed'}" for name, version in findings["versions"].items()]
    lines += [f"  {'system':16s} {findings['platform']}", "", "Devices"]
    for device in findings["devices"]:
        memory = f"{format_bytes(device['available_bytes'])} of {format_bytes(device['total_bytes'])} free"
        cores = f", {device['cores']} cores" if "cores" in device else ""
        lines.append(f"  {device['device']:8s} {device['name']}{cores}, {memory}")
    own = findings["cpu"]
    threads = f"{own['threads']} thread{'s' * (own['threads'] > 1)} ({own['threads_because']}; waiting: "
    lines.append(f"  {'':8s} {threads}{own['wait_policy']}), {own['instructions']}, {own['dtype']}")
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


def _marks(checks: list[dict[str, Any]]) -> list[str]:
    return [f"  {'yes' if one['ok'] else 'no ':4s} {one['name']}: {one['reason']}" for one in checks]


@click.command(cls=common.GroupedCommand)
@common.space_option
@click.option("-m", "--model", help="With --space: a decoder's name or file, if not the official one.")
@click.option("--encoder", help="With --space: the space's encoder, if it was not pulled.")
@common.json_option
def doctor(space: str | None, model: str | None, encoder: str | None, as_json: bool) -> None:
    """Say what will work on this machine, and why the rest will not.

    With --space, try one latent space instead: its files, their shapes, and one small decode.
    """
    if space is None:
        if model or encoder:
            raise SettingError("--model and --encoder act together with --space; name one.")
        with common.WorkBar("looking at this machine"):
            findings = examine()
        common.emit(findings, _report(findings), as_json=as_json)
        return
    with common.WorkBar(f"trying {space}"):
        from pidecode.cli.space_check import check_space

        checks = [asdict(check) for check in check_space(space, model=model, encoder=encoder)]
    text = "\n".join([f"Space {space}", *_marks(checks)])
    common.emit({"space": space, "checks": checks}, text, as_json=as_json)


@click.command(cls=common.GroupedCommand)
@click.option("--size", required=True, metavar="WxH", help="Image to make, in pixels: 4096x3072.")
@click.option("--vram", metavar="BYTES", help="Memory of an accelerator: 12GB. Without it, what is free here.")
@click.option("--ram", metavar="BYTES", help="Plan for a CPU with this much memory instead.")
@click.option("--network", type=click.Choice(list(RELEASED_CONFIGS)), default="v1.5", show_default=True,
              help="`tiny`, or the version of PiD's released weights.")  # fmt: skip
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images at once.")
@common.dtype_option
@common.quantization_options
@common.json_option
def plan(
    size: str, vram: str | None, ram: str | None, network: str, as_json: bool, quantization: Quantization | None,
    **options: Any,
) -> None:  # fmt: skip
    """Show how an image would be decoded in the available memory, or which size would fit.

    For this machine the time is predicted too, by a quick measure.
    """
    if vram and ram:
        raise SettingError("--vram and --ram name two machines; give one.")
    given = vram or ram
    with common.WorkBar("planning") as bar:
        if given:
            # A GPU known by its memory alone is assumed to multiply as asked.
            w8a8: tuple[Quantization, ...] = ("fp8",) if quantization == "fp8" else ("int8",)
            machine = Machine(memory=parse_bytes(given), accelerator=bool(vram), w8a8=w8a8)
        else:
            from pidecode.devices import default_dtype, select_device  # load torch

            machine = this_machine()
            options["dtype"] = options["dtype"] or str(default_dtype(select_device(None))).removeprefix("torch.")
        chosen = plan_decode(network, parse_size(size), machine, quantization=quantization, **options)
        bar.show("measuring the speed of this machine")
        seconds = {} if given else _predicted_times(network, chosen)
    data = asdict(chosen) | {
        "peak": chosen.peak, "exact": chosen.exact, "memory": machine.memory, "seconds": seconds or None
    }  # fmt: skip
    times = [f"  {f'predicted {what}':22s} {format_seconds(time):>9s}" for what, time in seconds.items()]
    text = "\n".join([f"network {network}", chosen.describe(), f"  {'free':22s} {machine.memory / GB:6.2f} GB", *times])
    common.emit(data, text, as_json=as_json)


def _predicted_times(network: str, plan: Plan | FeedForwardPlan) -> dict[str, float]:
    """Seconds to decode and, for feed-forward decoders, to upscale, by a quick measure of this machine."""
    from pidecode.decoder import PixelDecoder
    from pidecode.devices import select_device
    from pidecode.engine.feed_forward import ENCODER_WORK
    from pidecode.engine.runner import measured_step_seconds
    from pidecode.sampling import DEFAULT_STEPS

    common.set_threads(None)
    if isinstance(plan, Plan):
        step = measured_step_seconds(plan, RELEASED_CONFIGS[network], select_device(None))  # type: ignore[arg-type]
        steps = DEFAULT_STEPS["student"]
        return {f"time, {steps} steps": steps * step}
    decoder = PixelDecoder.from_pretrained(network, dtype=plan.dtype)
    decoding = common.predicted_seconds(decoder, plan.size[0] * plan.size[1] * plan.batch) or 0.0
    return {"time to decode": decoding, "time to upscale": decoding * (1 + ENCODER_WORK)}
