#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Everything a GPU has to settle, in one command of under nine minutes: each fast path checked, then timed.

Run `python -m benchmarks.gpu -o gpu.json` on a machine with torch and one GPU; nothing else is needed. It starts
with the cheapest row, saves after each, and leaves out what would not end within `--budget` seconds. Run again it
goes on with what is missing. `--table gpu.json` prints the rows for docs/benchmarks.md.

A decode is four steps in bfloat16 with random weights, from the seed to eight-bit pixels on the host: noise, adapter,
steps and conversion. Errors are of one evaluation, relative to the reference forward in float32.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.configs import CONFIGS
from benchmarks.speed import commit, describe_device, random_network, wait_for
from pidecode.devices import default_dtype, require_compiler, select_device, supports_cuda_graphs
from pidecode.engine.machine import Chunks, this_machine
from pidecode.engine.ops.compiled import CompiledOps
from pidecode.engine.plan import Plan, step_flops
from pidecode.engine.runner import Runner
from pidecode.errors import PidecodeError, SettingError
from pidecode.models.attention import BACKENDS
from pidecode.models.pid.network import Condition, PiDNet
from pidecode.registry.checkpoints import STUDENT_TIMES
from pidecode.sampling import TIMESCALE, NoiseStream, Predict, sample_student
from pidecode.units import parse_size

SIZES = ("1024x1024", "2048x2048", "2688x1536", "4096x4096")
REFERENCES = ("reference", "reference compiled")
FUSED = ("eager", "triton", "graphs", "triton graphs", "compile", "compile graphs")
EIGHT_BITS = ("int8", "fp8")
ATTENTION = tuple(f"attention {name}" for name in BACKENDS if name != "math")
MODES = ("eager", "reference", *ATTENTION, *FUSED[1:], *EIGHT_BITS, "reference compiled")
"""In the order they run at each size: what compiles for long comes last."""
CHECKED_SIZE = (256, 256)
STEPS, REPEATS = 4, 3
TOLERANCE = {"int8": 0.03, "fp8": 0.06}
"""Largest relative error of eight-bit products; other modes may be twice as far off as the reference in their type."""


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
    attention: str | None = None
    failure: str | None = None


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

    def select(self, mode: str) -> None:
        """Bring the network, the same random weights each time, into the form that a mode runs."""
        kind = mode if mode in EIGHT_BITS else "reference" if mode in REFERENCES else "fast"
        if kind != self.kind:
            self.prepare, self.net, self.runner = _nothing_selected, None, None
            gc.collect()
            self.kind = kind
            torch.manual_seed(0)
            self.net = random_network(self.config, self.dtype, self.device)
            self.runner = Runner(self.net, self._plan(kind), distilled=kind != "reference")
            if kind in EIGHT_BITS:
                self.runner.arrange(self.device)
        net, runner = self.net, self.runner
        assert net is not None
        assert runner is not None
        if mode in REFERENCES:
            denoise = torch.compile(net.denoise) if mode == "reference compiled" else net.denoise
            self.prepare = lambda *given: partial(_on_device, denoise, net.prepare(*given))
            return
        if "compile" in mode:
            require_compiler(self.device)
            self.compiled = self.compiled or CompiledOps()
        runner.compiled_ops = self.compiled if "compile" in mode else None
        runner.triton, runner.cuda_graphs, runner.graph_cache = "triton" in mode, "graphs" in mode, None
        runner.backend = mode.removeprefix("attention ") if mode in ATTENTION else None
        runner._checked = mode in ATTENTION  # a kernel that was named is not replaced where it gives NaN
        self.prepare = lambda *given: runner.predict(runner.prepare(*given))

    @property
    def attention(self) -> str:
        """The attention kernel in use."""
        return (self.runner.backend if self.runner is not None else None) or "torch's choice"

    def _plan(self, kind: str) -> Plan | None:
        if kind not in EIGHT_BITS:
            return None
        dtype, chunks = str(self.dtype).removeprefix("torch."), Chunks.whole(self.config.patch_size)
        return Plan(size=CHECKED_SIZE, dtype=dtype, quantization=kind, scheme="w8a8", chunks=chunks)  # type: ignore[arg-type]

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
        self.prepare = _nothing_selected
        return exact, relative(plain, exact)


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
    """Compare one evaluation with the reference."""
    subject.select(mode)
    error = relative(subject.evaluation(CHECKED_SIZE)(), truth[0])
    return Row("check", mode, CHECKED_SIZE, error=error, passed=error <= TOLERANCE.get(mode, max(2 * truth[1], 1e-5)))


def measure(subject: Subject, mode: str, size: tuple[int, int]) -> Row:
    """The first decode, later ones and one step."""
    device, cuda = subject.device, subject.device.type == "cuda"
    subject.select(mode)
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    first = timed(lambda: subject.decode(size), device)
    later = min(timed(lambda: subject.decode(size), device) for _ in range(REPEATS))
    peak = int(torch.cuda.max_memory_allocated(device)) if cuda else None
    evaluation = subject.evaluation(size)
    evaluation()
    step = min(timed(evaluation, device) for _ in range(REPEATS))
    return Row("time", mode, size, first=first, later=later, step=step, peak=peak, attention=subject.attention)


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


def why_not(mode: str, device: torch.device) -> str | None:
    """Why a mode cannot run on the device at all."""
    if "graphs" in mode and not supports_cuda_graphs(device):
        return "CUDA graphs need a CUDA device"
    if "triton" in mode and (device.type == "cpu" or find_spec("triton") is None):
        return "Triton kernels need a GPU and triton"
    if mode in EIGHT_BITS and mode not in this_machine(device).w8a8:
        return f"this device does not multiply in {mode}"
    return None


def rows(subject: Subject, record: Record, modes: Sequence[str], sizes: Sequence[tuple[int, int]]) -> Iterator[Any]:
    """What is missing, cheapest first: what, mode, size, and the function that makes the row."""
    truth: list[tuple[Tensor, float]] = []

    def checked(mode: str) -> Row:
        if not truth:
            truth.append(subject.truth())
        return check(subject, mode, truth[0])

    for mode in modes:
        yield "check", mode, CHECKED_SIZE, partial(checked, mode)
    for size in sorted(sizes, key=lambda size: size[0] * size[1]):
        for mode in modes:
            known = record.find("check", mode, CHECKED_SIZE)
            if known is not None and known["passed"]:
                yield "time", mode, size, partial(measure, subject, mode, size)


def expected_seconds(record: Record, subject: Subject, mode: str, size: tuple[int, int]) -> float:
    """Of a row, from the last one of the same mode: its first decode, and the later ones by their work."""
    known = [row for row in record.rows if row["what"] == "time" and row["mode"] == mode and row["later"]]
    if not known:
        return 0.0
    work = step_flops(subject.config, size) / step_flops(subject.config, tuple(known[-1]["size"]))
    compiling = max(0.0, known[-1]["first"] - known[-1]["later"])
    return float(compiling + (REPEATS + 2) * work * known[-1]["later"])


def run(subject: Subject, record: Record, modes: Sequence[str], sizes: Sequence[tuple[int, int]], end: float) -> None:
    """Make the missing rows until `end`, a time of `time.monotonic`."""
    for what, mode, size, make in rows(subject, record, modes, sizes):
        if record.find(what, mode, size) is not None:
            continue
        if time.monotonic() + expected_seconds(record, subject, mode, size) > end:
            print(f"left out, it would take longer than the budget: {mode} at {size[0]}x{size[1]}", flush=True)
            continue
        failure = why_not(mode, subject.device)
        try:
            record.add(Row(what, mode, size, failure=failure) if failure else make())
        except (PidecodeError, RuntimeError, ImportError) as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            record.add(Row(what, mode, size, failure=first))
            subject.kind = ""  # begin with a fresh network
            if "CUDA error" in str(error):  # after which nothing more runs in this process
                raise SystemExit("The device failed; run the command again to go on with the next row.") from None


def as_markdown(data: dict[str, Any]) -> str:
    """The table for docs/benchmarks.md."""
    lines = [", ".join(f"{name} {value}" for name, value in data["conditions"].items()), ""]
    lines += [
        "| image | mode | attention | first | later | step | peak | to eager |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    timed_rows = [row for row in data["rows"] if row["what"] == "time" and row["later"]]
    eager = {tuple(row["size"]): row["later"] for row in timed_rows if row["mode"] == "eager"}
    for row in timed_rows:
        size = tuple(row["size"])
        ratio = f"{eager[size] / row['later']:.2f}" if size in eager else ""
        peak = f"{row['peak'] / 1e9:.2f} GB" if row["peak"] else ""
        times = " | ".join(f"{row[name] * 1e3:.0f} ms" for name in ("first", "later", "step"))
        lines.append(f"| {size[0]} x {size[1]} | {row['mode']} | {row['attention']} | {times} | {peak} | {ratio} |")
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
    parser.add_argument("--budget", type=float, default=500, help="seconds in which rows may begin and end")
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
        with torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run(subject, record, options.modes or MODES, sizes, end)
    print(as_markdown(json.loads((options.table or options.out).read_text(encoding="utf-8"))))


if __name__ == "__main__":
    try:
        main()
    except PidecodeError as error:
        raise SystemExit(str(error)) from None
