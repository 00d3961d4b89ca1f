# SPDX-License-Identifier: Apache-2.0
"""What this machine offers a decode: free memory, and how fast it multiplies matrices."""

from __future__ import annotations

import time
from contextlib import suppress

import torch

from pidecode.devices import free_memory, pick_device, usual_dtype
from pidecode.engine.ops.quantize import WAYS, best_way
from pidecode.engine.plan import Machine, Weights
from pidecode.errors import SettingError


def this_machine(device: str | torch.device | None = None) -> Machine:
    """The device asked for, or the best there is, with what is free on it now and what it was seen to multiply.

    Raises SettingError for a device that is not there, or does not say what is free.
    """
    chosen = pick_device(device)
    free = free_memory(chosen)
    if free is None:
        raise SettingError(f"{chosen} does not say how much memory is free; name an amount.")
    products: list[Weights] = []
    for form in WAYS:
        with suppress(SettingError):
            best_way(form, usual_dtype(chosen), chosen)
            products.append(form)
    return Machine(memory=free, accelerator=chosen.type != "cpu", products=tuple(products))


def describe_device(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cpu":
        return f"processor, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if torch.version.cuda or torch.version.hip:
        return torch.cuda.get_device_name(device)
    return device.type


def wait_for(device: torch.device) -> None:
    """Return when everything queued on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(device: torch.device) -> float:
    """A clock for what has been done: of this process's own work on a processor, of the wall elsewhere.

    A processor may be shared; time this process did not get does not count.
    """
    wait_for(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()


@torch.no_grad()
def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Measured multiply-adds of a large square matrix product, in FLOP/s."""
    side, rounds = (1024, 4) if device.type == "cpu" else (8192, 10)
    a = torch.randn(side, side, device=device).to(dtype)
    out = a @ a
    start = seconds(device)
    for _ in range(rounds):
        torch.mm(a, a, out=out)
    return 2 * side**3 * rounds / (seconds(device) - start)
