# SPDX-License-Identifier: Apache-2.0
"""Latency and peak memory of a decode, with the conditions they were measured under."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.flops import adapter_flops
from benchmarks.memory import LiveBytes, weight_bytes
from pidecode import __version__
from pidecode.engine.machine import Quantization, this_machine
from pidecode.engine.plan import Plan, Scheme, plan_decode, step_flops
from pidecode.engine.runner import Runner
from pidecode.models.pid.network import Condition, PiDNet
from pidecode.registry.configs import PiDConfig
from pidecode.sampling import sample_student

Mode = Literal["eager", "compile", "cuda-graphs"]
"""How a decode runs: eagerly, with compiled elementwise ops, or with its evaluations captured and replayed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """What to measure."""

    network: str
    config: PiDConfig
    size: tuple[int, int]
    dtype: torch.dtype
    device: torch.device
    steps: int = 4
    repeats: int = 2
    mode: Mode = "eager"
    quantization: Quantization | None = None
    scheme: Scheme | None = None

    def runner(self, net: PiDNet, plan: Plan | None = None) -> Runner:
        """What runs a network in this trial's mode."""
        return Runner(net, plan, distilled=True, compile=self.mode == "compile", cuda_graphs=self.mode == "cuda-graphs")

    def check(self) -> None:
        """Raise as `Runner.require` does where the device cannot run this mode."""
        with torch.device("meta"):
            self.runner(PiDNet(self.config)).require(self.device)

    def plan(self) -> Plan | None:
        """This machine's plan for the quantization that was asked for; None where none was."""
        if self.quantization is None and self.scheme is None:
            return None
        plan = plan_decode(
            self.config,
            self.size,
            this_machine(self.device),
            dtype=str(self.dtype).removeprefix("torch."),
            quantization=self.quantization,
            scheme=self.scheme,
        )
        assert isinstance(plan, Plan)
        return plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """One trial's figures. Times on a CPU are this process's CPU seconds, elsewhere wall seconds."""

    network: str
    size: tuple[int, int]
    dtype: str
    device: str
    mode: Mode
    attention: str
    quantization: str
    """Format and scheme of the weights, or "none"."""
    steps: int
    first: float | None
    """Wall seconds of the first decode where that compiled or captured, else None."""
    prepare: float
    """Seconds of what all steps share: the adapter and the prompt's projection."""
    step: float
    """Seconds of one denoising step, the best of all repeats."""
    whole: float
    """Seconds of a whole decode, the best of all repeats."""
    weights: int
    peak: int | None
    """Most bytes of tensors alive above the weights; None where they cannot be counted, as in compiled code on a
    CPU."""
    flops: int
    rate: float
    """FLOP/s of the whole decode."""
    share: float
    """The same as a part of the rate at which this device multiplies large matrices."""
    commit: str
    versions: dict[str, str]

    def row(self) -> dict[str, str]:
        """The figures as words."""
        return {
            "network": self.network,
            "size": "x".join(map(str, self.size)),
            "dtype": self.dtype,
            "mode": self.mode,
            "quantization": self.quantization,
            "first": "-" if self.first is None else f"{self.first:.1f} s",
            "step": f"{self.step:.3f} s",
            "whole": f"{self.whole:.3f} s",
            "peak": "-" if self.peak is None else f"{self.peak / 1e9:.3f} GB",
            "weights": f"{self.weights / 1e9:.3f} GB",
            "of matrix rate": f"{self.share:.0%}",
        }

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def describe_device(device: torch.device) -> str:
    """The device as a reader knows it."""
    if device.type == "cpu":
        return f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    if torch.version.cuda or torch.version.hip:
        return torch.cuda.get_device_name(device)
    return device.type


def wait_for(device: torch.device) -> None:
    """Return when everything queued on the device is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(device: torch.device) -> float:
    """A clock: this process's CPU time on a CPU, which may be shared, and wall time elsewhere."""
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


def _describe_quantization(plan: Plan | None) -> str:
    return "none" if plan is None or plan.quantization == "none" else f"{plan.quantization}, {plan.scheme}"


def random_network(config: PiDConfig, dtype: torch.dtype, device: torch.device) -> PiDNet:
    """A network with plausible random weights, none of them zero; its speed is that of a trained one."""
    with torch.device("meta"):
        net = PiDNet(config)
    net = net.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    for name, parameter in net.named_parameters():
        if parameter.ndim >= 2:
            parameter.uniform_(-1, 1).mul_(parameter[0].numel() ** -0.5)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.01)
    return net


def inputs(trial: Trial) -> tuple[list[Tensor], Tensor | None, Tensor]:
    """Noise for each step, prompt states and a latent, seeded."""
    config, (width, height), generator = trial.config, trial.size, torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(trial.device)

    cell = config.pixels_per_latent_cell
    noise = [draw(1, 3, height, width) for _ in range(trial.steps)]
    text = draw(1, config.text_length, config.text_dim) if config.has_text else None
    return noise, text, draw(1, config.latent_channels, height // cell, width // cell)


class Benchmark:
    """A network ready to be measured."""

    def __init__(self, trial: Trial) -> None:
        trial.check()
        self.trial = trial
        self.net = random_network(trial.config, trial.dtype, trial.device)
        self.runner = trial.runner(self.net, trial.plan())
        if self.runner.plan is not None:
            self.runner.arrange(trial.device)
        self.noise, self.text, self.latent = inputs(trial)
        self.prepare_times: list[float] = []
        self.step_times: list[float] = []

    @torch.inference_mode()
    def decode(self) -> Tensor:
        """One whole decode, its parts timed; returns the image."""
        trial, draws = self.trial, iter(self.noise)
        start = seconds(trial.device)
        predict = self.runner.predict(self._prepare())
        self.prepare_times.append(seconds(trial.device) - start)

        def timed(x: Tensor, t: Tensor) -> Tensor:
            start = seconds(trial.device)
            prediction = predict(x, t)
            self.step_times.append(seconds(trial.device) - start)
            return prediction

        kind = self.net.config.prediction
        return sample_student(timed, lambda: next(draws), num_steps=trial.steps, prediction=kind).clamp_(-1, 1)

    def _prepare(self) -> Condition:
        grid = self.net.grid_of(self.trial.size[1], self.trial.size[0])
        return self.runner.prepare(grid, self.text, self.latent, torch.zeros(1, device=self.trial.device))

    def peak(self) -> int | None:
        """Run a first decode; most bytes alive above weights and inputs: counted, or the allocator's own figure.

        None in compiled code on a CPU, which counting would keep from being compiled.
        """
        device = self.trial.device
        if not torch.cuda.is_available() or device.type == "cpu":
            if self.trial.mode == "compile":
                self.decode()
                return None
            with LiveBytes() as live:
                self.decode()
            peak: int = live.peak
            return peak
        with torch.inference_mode():
            self._prepare()  # a distilled network is stripped the first time
        given = (*self.noise, self.latent, *(() if self.text is None else (self.text,)))
        torch.cuda.reset_peak_memory_stats(device)
        self.decode()  # what is captured is held from here on, so this decode has the highest peak
        held = weight_bytes(self.net) + sum(t.numel() * t.element_size() for t in given)
        return int(torch.cuda.max_memory_allocated(device)) - int(held)


def clock(run: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds that `run` took, and its result."""
    start = seconds(device)
    result = run()
    return seconds(device) - start, result


def measure(trial: Trial) -> Measurement:
    """Run one trial: a warm-up that counts memory, then the timed repeats."""
    bench, start = Benchmark(trial), time.perf_counter()
    peak = bench.peak()
    first = None if trial.mode == "eager" else time.perf_counter() - start
    bench.prepare_times.clear()
    bench.step_times.clear()
    whole = min(clock(bench.decode, trial.device)[0] for _ in range(trial.repeats))
    flops = trial.steps * step_flops(trial.config, trial.size) + adapter_flops(trial.config, trial.size)
    return Measurement(
        network=trial.network,
        size=trial.size,
        dtype=str(trial.dtype).removeprefix("torch."),
        device=describe_device(trial.device),
        mode=trial.mode,
        attention=bench.runner.attention_in_use,
        quantization=_describe_quantization(bench.runner.plan),
        steps=trial.steps,
        first=first,
        prepare=min(bench.prepare_times),
        step=min(bench.step_times),
        whole=whole,
        weights=weight_bytes(bench.net),
        peak=peak,
        flops=flops,
        rate=flops / whole,
        share=flops / whole / matrix_rate(trial.device, trial.dtype),
        commit=commit(),
        versions={"pidecode": __version__, "torch": torch.__version__},
    )


def commit() -> str:
    """The commit of this checkout, or "unknown" where git cannot tell."""
    folder = Path(__file__).resolve().parent
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"
