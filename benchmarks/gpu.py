#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Everything a GPU has to settle, in one command of under nine minutes: each fast path checked, then timed.

Run `python -m benchmarks.gpu -o gpu.json` on a machine with torch and one GPU; nothing else is needed. It starts
with the cheapest rows, saves after each, leaves out what would not end within `--budget` seconds, and stops what does
not end then. Run again, it goes on with what is missing. `--table gpu.json` prints the rows for docs/benchmarks.md.

A decode is four steps in bfloat16 with random weights, from the seed to eight-bit pixels on the host: noise, adapter,
steps and conversion. Errors are of one evaluation, relative to the reference forward in float32; differences are of
the image, to the eager one of its size.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from benchmarks.configs import CONFIGS
from benchmarks.speed import commit, describe_device, random_network, wait_for
from pidecode.devices import default_dtype, require_compiler, select_device, supports_cuda_graphs
from pidecode.engine.machine import Chunks, this_machine
from pidecode.engine.ops.elementwise import CompiledOps
from pidecode.engine.plan import Plan, step_flops
from pidecode.engine.runner import Runner
from pidecode.errors import SettingError
from pidecode.models.attention import BACKENDS, PACKAGES
from pidecode.models.pid.network import Condition, PiDNet
from pidecode.registry.checkpoints import STUDENT_TIMES
from pidecode.sampling import TIMESCALE, NoiseStream, Predict, sample_student
from pidecode.units import parse_size

SIZES = ("1024x1024", "2048x2048", "2688x1536", "4096x4096")
CHECKED_SIZE = (256, 256)
STEPS, REPEATS, SECONDS = 4, 3, 4.0
"""Steps of a decode; most repeats of one, which end after some seconds."""

Kind = Literal["fast", "low memory", "int8", "fp8", "reference"]
"""How a network is brought into form: as by default, in the least memory without offloading, in eight bits, or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """A way to run a network."""

    kind: Kind = "fast"
    compile: bool = False
    graphs: bool = False
    attention: str = "auto"
    tolerance: float | None = None
    """Largest relative error; by default twice that of the reference in the type that is timed."""


MODES: dict[str, Mode] = {
    "eager": Mode(),
    "compile graphs": Mode(compile=True, graphs=True),
    "low memory": Mode(kind="low memory"),
    "int8 all": Mode(kind="int8", compile=True, graphs=True, attention="int8", tolerance=0.05),
    "fp8 all": Mode(kind="fp8", compile=True, graphs=True, attention="int8", tolerance=0.08),
    "reference": Mode(kind="reference"),
    "attention int8": Mode(attention="int8", tolerance=0.05),
    **{f"attention {name}": Mode(attention=name) for name in (*BACKENDS, *PACKAGES) if name != "math"},
    "graphs": Mode(graphs=True),
    "compile": Mode(compile=True),
    "int8": Mode(kind="int8", tolerance=0.03),
    "fp8": Mode(kind="fp8", tolerance=0.06),
    "reference compiled": Mode(kind="reference", compile=True),
}
FIRST = ("eager", "compile graphs", "low memory", "int8 all", "fp8 all", "reference")
"""Modes that the bars are about; the largest size has them before the others."""


@dataclass(frozen=True, slots=True)
class Row:
    """A mode's check, or its times at a size in seconds and bytes, or why there are none."""

    what: str
    """"check" or "time"."""
    mode: str
    size: tuple[int, int]
    error: float | None = None
    passed: bool | None = None
    first: float | None = None
    later: float | None = None
    step: float | None = None
    peak: int | None = None
    difference: tuple[float, int] | None = None
    """Mean and largest difference to the eager image, of 255."""
    attention: str | None = None
    failure: str | None = None


class OutOfTimeError(BaseException):
    """The budget ended within a row; no `except Exception` of a compiler may keep it."""


class Subject:
    """One network and the ways to run it."""

    def __init__(self, network: str, device: torch.device) -> None:
        self.config, self.device = CONFIGS[network], device
        self.dtype = torch.float32 if device.type == "cpu" else default_dtype(device)
        self.compiled: CompiledOps | None = None
        self.kind = ""
        self.net: PiDNet | None = None
        self.runner: Runner | None = None
        self.prepare: Callable[..., Predict] = _nothing_selected
        self._eager: dict[tuple[int, int], Tensor] = {}

    def drop(self) -> None:
        """Free the network."""
        self.prepare, self.net, self.runner, self.kind = _nothing_selected, None, None, ""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def select(self, name: str) -> None:
        """Bring the network, the same random weights each time, into the form that a mode runs."""
        mode = MODES[name]
        if mode.kind != self.kind:
            self.drop()
            torch.manual_seed(0)
            self.net = random_network(self.config, self.dtype, self.device)
            self.runner = Runner(self.net, self._plan(mode.kind), distilled=mode.kind != "reference")
            if mode.kind in ("int8", "fp8"):
                self.runner.arrange(self.device)
                self.runner.chunks = None  # as the free memory allows, like the other modes
            self.kind = mode.kind
        net, runner = self.net, self.runner
        assert net is not None
        assert runner is not None
        if mode.compile:
            require_compiler(self.device)
        if mode.kind == "reference":
            denoise = torch.compile(net.denoise) if mode.compile else net.denoise
            self.prepare = lambda *given: partial(_on_device, denoise, net.prepare(*given))
            return
        if mode.compile:
            self.compiled = self.compiled or CompiledOps()
        runner.compiled_ops = self.compiled if mode.compile else None
        runner.cuda_graphs, runner.graph_cache, runner.attention = mode.graphs, None, mode.attention
        # What fails is a row here, and never replaced by something else.
        runner._finite, runner._compared = mode.attention != "auto", True
        self.prepare = lambda *given: runner.predict(runner.prepare(*given))

    @property
    def attention(self) -> str:
        """The attention kernels in use."""
        return "torch's choice" if self.runner is None or self.kind == "reference" else self.runner.attention_in_use

    def _plan(self, kind: Kind) -> Plan | None:
        dtype, patch = str(self.dtype).removeprefix("torch."), self.config.patch_size
        if kind == "low memory":
            return Plan(size=CHECKED_SIZE, dtype=dtype, chunks=Chunks.large(patch), keep_tokens=False)
        if kind in ("fast", "reference"):
            return None
        chunks = Chunks.whole(patch)
        return Plan(size=CHECKED_SIZE, dtype=dtype, quantization=kind, scheme="w8a8", chunks=chunks)

    def inputs(self, size: tuple[int, int]) -> tuple[tuple[int, int], Tensor | None, Tensor, Tensor]:
        """Grid, prompt states, latent and sigma, seeded on the CPU."""
        config, (width, height) = self.config, size
        cell, patch = config.pixels_per_latent_cell, config.patch_size
        text = seeded(1, config.text_length, config.text_dim).to(self.device) if config.has_text else None
        latent = seeded(1, config.latent_channels, height // cell, width // cell).to(self.device)
        return (height // patch, width // patch), text, latent, torch.zeros(1, device=self.device)

    def decode(self, size: tuple[int, int]) -> Tensor:
        """Seed to eight-bit pixels on the host."""
        noise = NoiseStream([0], (3, size[1], size[0]), self.device, STEPS)
        predict = self.prepare(*self.inputs(size))
        image = sample_student(predict, noise, num_steps=STEPS, prediction=self.config.prediction).clamp_(-1, 1)
        return image.add_(1).mul_(127.5).round_().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu()

    def evaluation(self, size: tuple[int, int]) -> Callable[[], Tensor]:
        """One evaluation on seeded noise, ready to be called."""
        x, predict = seeded(1, 3, size[1], size[0]).to(self.device), self.prepare(*self.inputs(size))
        return lambda: predict(x, torch.full((1,), STUDENT_TIMES[1]) * TIMESCALE)

    def truth(self) -> tuple[Tensor, float]:
        """The reference's prediction in float32, and how far off it is in the type that is timed."""
        self.select("reference")
        plain = self.evaluation(CHECKED_SIZE)()
        net = copy.deepcopy(self.net).float()  # type: ignore[union-attr]
        self.prepare = lambda *given: partial(_on_device, net.denoise, net.prepare(*given))
        exact = self.evaluation(CHECKED_SIZE)().float()
        self.drop()
        return exact, relative(plain, exact)

    def eager_image(self, size: tuple[int, int]) -> Tensor:
        """What the eager mode decodes, kept from its row, or decoded where an earlier run made that."""
        if size not in self._eager:
            self.select("eager")
            self._eager = {size: self.decode(size)}
        return self._eager[size]


def _nothing_selected(*given: Any) -> Predict:
    raise SettingError("No mode was selected.")


def _on_device(denoise: Callable[..., Tensor], condition: Condition, x: Tensor, t: Tensor) -> Tensor:
    return denoise(x, t.to(x.device), condition)


def seeded(*shape: int) -> Tensor:
    """Unit noise, the same each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def relative(a: Tensor, b: Tensor) -> float:
    """Standard deviation of the difference, relative to b's."""
    return float((a.float() - b).std() / b.std())


def check(subject: Subject, mode: str, truth: tuple[Tensor, float]) -> Row:
    """Compare one evaluation, the second of two where the first captures a graph, with the reference."""
    subject.select(mode)
    evaluation = subject.evaluation(CHECKED_SIZE)
    error = max(relative(evaluation(), truth[0]) for _ in range(2))
    limit = MODES[mode].tolerance or max(2 * truth[1], 1e-5)
    return Row("check", mode, CHECKED_SIZE, error=error, passed=error <= limit, attention=subject.attention)


def measure(subject: Subject, mode: str, size: tuple[int, int]) -> Row:
    """The first decode, later ones and one step; how far the image is from the eager one."""
    device, cuda = subject.device, subject.device.type == "cuda"
    eager = None
    if mode != "eager":
        with suppress(RuntimeError):  # no memory for that one
            eager = subject.eager_image(size)
    subject.select(mode)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    image: list[Tensor] = []
    first = timed(lambda: image.append(subject.decode(size)), device)
    later = repeated(lambda: subject.decode(size), device)
    peak = int(torch.cuda.max_memory_allocated(device)) if cuda else None
    evaluation = subject.evaluation(size)
    step = repeated(evaluation, device)
    if mode == "eager":
        subject._eager = {size: image[0]}
    difference = None if eager is None else apart(image[0], eager)
    return Row(
        "time", mode, size, first=first, later=later, step=step, peak=peak, difference=difference,
        attention=subject.attention,
    )  # fmt: skip


def apart(image: Tensor, other: Tensor) -> tuple[float, int]:
    """Mean and largest difference of eight-bit images."""
    difference = (image.short() - other.short()).abs_()
    return difference.float().mean().item(), int(difference.max())


def repeated(run: Callable[[], Any], device: torch.device) -> float:
    """Wall seconds of the fastest of some calls."""
    times = [timed(run, device)]
    while len(times) < REPEATS and sum(times) + times[0] < SECONDS:
        times.append(timed(run, device))
    return min(times)


def timed(run: Callable[[], Any], device: torch.device) -> float:
    """Wall seconds of one call, all it queued included."""
    wait_for(device)
    start = time.perf_counter()
    run()
    wait_for(device)
    return time.perf_counter() - start


class Record:
    """Rows on disk, saved after each."""

    def __init__(self, path: Path, conditions: dict[str, str]) -> None:
        self.path, self.conditions, self.rows = path, conditions, list[dict[str, Any]]()
        if path.exists():
            held = json.loads(path.read_text(encoding="utf-8"))
            if held["conditions"] != conditions:
                raise SettingError(f"{path} holds figures of {held['conditions']}; name another file with -o.")
            self.rows = held["rows"]

    def find(self, what: str, mode: str, size: tuple[int, int]) -> dict[str, Any] | None:
        """The row that stands already, a failure's included."""
        key = what, mode, list(size)
        return next((row for row in self.rows if (row["what"], row["mode"], list(row["size"])) == key), None)

    def add(self, row: Row) -> None:
        """Append and save."""
        self.rows.append(asdict(row))
        partial_file = self.path.with_name(self.path.name + ".part")
        partial_file.write_text(json.dumps({"conditions": self.conditions, "rows": self.rows}, indent=1) + "\n")
        partial_file.replace(self.path)
        print(json.dumps(asdict(row)), flush=True)


def why_not(name: str, device: torch.device) -> str | None:
    """Why a mode cannot run on the device at all."""
    mode = MODES[name]
    if mode.graphs and not supports_cuda_graphs(device):
        return "CUDA graphs need a CUDA device"
    if mode.kind in ("int8", "fp8") and mode.kind not in this_machine(device).w8a8:
        return f"this device does not multiply in {mode.kind}"
    return None


def order(modes: Sequence[str], sizes: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str, tuple[int, int]]]:
    """What, mode and size of all rows: cheap ones first, what compiles for minutes or is large last."""
    quick = [mode for mode in modes if mode != "reference compiled"]
    yield from (("check", mode, CHECKED_SIZE) for mode in quick)
    *smaller, largest = sorted(sizes, key=lambda size: size[0] * size[1])
    yield from (("time", mode, size) for size in smaller for mode in quick)
    yield from (("time", mode, largest) for mode in quick if mode in FIRST)
    if "reference compiled" in modes:
        yield "time", "reference compiled", (smaller or [largest])[-1]
    yield from (("time", mode, largest) for mode in quick if mode not in FIRST)


def expected_seconds(record: Record, subject: Subject, mode: str, size: tuple[int, int]) -> float:
    """Of a row, from the last one of the same mode or of the eager one: its first decode, and the later ones."""
    known = [
        row for name in ("eager", mode) for row in record.rows
        if row["what"] == "time" and row["mode"] == name and row["later"]
    ]  # fmt: skip
    if not known:
        return 0.0
    work = step_flops(subject.config, size) / step_flops(subject.config, tuple(known[-1]["size"]))
    compiling = max(0.0, known[-1]["first"] - known[-1]["later"]) if known[-1]["mode"] == mode else 0.0
    one = work * known[-1]["later"]
    return float(compiling + 2 * one + max(one, min(REPEATS * one, SECONDS)))


def run(subject: Subject, record: Record, modes: Sequence[str], sizes: Sequence[tuple[int, int]], end: float) -> None:
    """Make the missing rows until `end`, a time of `time.monotonic`."""
    truth: list[tuple[Tensor, float]] = []
    for what, mode, size in order(modes, sizes):
        known = record.find("check", mode, CHECKED_SIZE)
        if record.find(what, mode, size) or (what == "time" and known and not known["passed"]):
            continue
        if time.monotonic() + (expected_seconds(record, subject, mode, size) if what == "time" else 0.0) > end:
            print(f"left out, it would take longer than the budget: {mode} at {size[0]}x{size[1]}", flush=True)
            continue
        failure = why_not(mode, subject.device)
        try:
            if failure is None and what == "check":
                truth = truth or [subject.truth()]
                record.add(check(subject, mode, truth[0]))
            else:
                record.add(Row(what, mode, size, failure=failure) if failure else measure(subject, mode, size))
        except OutOfTimeError:
            print(f"stopped at the end of the budget: {mode} at {size[0]}x{size[1]}", flush=True)
            if mode == "reference compiled":  # which may compile for longer than any budget, and is not tried again
                record.add(Row(what, mode, size, failure="not compiled within the budget"))
            return
        except Exception as error:  # compilers and drivers fail in many ways, and the next row may not
            record.add(Row(what, mode, size, failure=f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"))
            subject.drop()  # begin with a fresh network
            if "CUDA error" in str(error):  # after which nothing more runs in this process
                raise SystemExit("The device failed; run the command again to go on with the next row.") from None


def _end_of_time(number: int, frame: object) -> None:
    raise OutOfTimeError


def as_markdown(data: dict[str, Any]) -> str:
    """The table for docs/benchmarks.md."""
    lines = [", ".join(f"{name} {value}" for name, value in data["conditions"].items()), ""]
    lines += [
        "| image | mode | attention | first | later | step | peak | speed, to eager | mean, largest difference |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    timed_rows = [row for row in data["rows"] if row["what"] == "time" and row["later"]]
    eager = {tuple(row["size"]): row["later"] for row in timed_rows if row["mode"] == "eager"}
    for row in timed_rows:
        size = tuple(row["size"])
        ratio = f"{eager[size] / row['later']:.2f}" if size in eager else ""
        peak = f"{row['peak'] / 1e9:.2f} GB" if row["peak"] else ""
        times = " | ".join(f"{row[name] * 1e3:.0f} ms" for name in ("first", "later", "step"))
        apart = "{:.2f}, {} of 255".format(*row["difference"]) if row["difference"] else ""
        cells = (f"{size[0]} x {size[1]}", row["mode"], row["attention"], times, peak, ratio, apart)
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| mode | relative error of one evaluation |", "|---|--:|"]
    for row in data["rows"]:
        if row["what"] == "check" and row["error"] is not None:
            lines.append(f"| {row['mode']} | {row['error']:.1e}{'' if row['passed'] else ', **fails**'} |")
    failures = [row for row in data["rows"] if row["failure"]]
    lines += ["", *(f"- {r['mode']} at {r['size'][0]} x {r['size'][1]}: {r['failure']}" for r in failures)]
    return "\n".join(lines).rstrip()


def main(arguments: Sequence[str] | None = None) -> None:
    """Check, time, save and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--out", type=Path, default=Path("gpu.json"))
    parser.add_argument("--device", help="cuda, cuda:1, cpu; chosen if not given")
    parser.add_argument("--network", choices=CONFIGS, default="v1.5")
    parser.add_argument("--size", dest="sizes", action="append", metavar="WxH", help=f"default {', '.join(SIZES)}")
    parser.add_argument("--mode", dest="modes", action="append", choices=MODES, help="default all")
    parser.add_argument("--budget", type=float, default=500, help="seconds in which rows begin and end")
    parser.add_argument("--table", type=Path, help="print the table of a file that was written, and do nothing else")
    options = parser.parse_args(arguments)
    if options.table is None:
        end, device = time.monotonic() + options.budget, select_device(options.device)
        subject = Subject(options.network, device)
        record = Record(
            options.out,
            {
                "network": options.network,
                "device": describe_device(device),
                "torch": torch.__version__,
                "commit": commit(),
                "dtype": str(subject.dtype).removeprefix("torch."),
            },
        )
        sizes = [parse_size(text) for text in options.sizes or SIZES]
        if hasattr(signal, "SIGALRM"):
            signal.signal(signal.SIGALRM, _end_of_time)
            signal.alarm(max(1, int(options.budget) + 15))
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(subject, record, options.modes or list(MODES), sizes, end)
        if hasattr(signal, "SIGALRM"):
            signal.alarm(0)
    print(as_markdown(json.loads((options.table or options.out).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    try:
        main()
    except SettingError as error:
        raise SystemExit(str(error)) from None
