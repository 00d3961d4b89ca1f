#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Each fused op against the eager one, attention and products in eight bits against plain ones, on this device.

    python -m benchmarks.kernels [--device cuda] [--repeats 20] [--json]
    python -m benchmarks.kernels --ahead

Shapes are those of v1.5 in bfloat16, one chunk or tile at a time. Time is the best of the repeats; bytes/s are those
that a pass has to move at the least, over that time. Without a GPU only the products are compared, in float32.

`--ahead` compiles the Triton kernels for GPUs that need not be there, with triton alone, and prints what they take.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed import describe_device, seconds
from pidecode.devices import select_device
from pidecode.engine.ops import elementwise
from pidecode.engine.ops.elementwise import CompiledOps
from pidecode.engine.ops.quantize import STORED, int8_kernels, quantize_rows, require_products, w8a8_linear
from pidecode.errors import SettingError
from pidecode.models.attention import MeasuredAttention, exact_kernels

TOKENS, HIDDEN, FEED, HEADS = 4096, 1536, 4096, 24
TILE, GROUP, PIXEL = 2048, 64, 16
GPUS: dict[str, tuple[str, int | str, int]] = {
    **{f"sm_{number}": ("cuda", number, 32) for number in (80, 86, 89, 90, 100, 120)}, "gfx942": ("hip", "gfx942", 64),
}  # fmt: skip
"""What `--ahead` compiles for, as Triton names a target."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One comparison. Seconds; `bytes` is what one pass must read and write."""

    what: str
    plain: float
    fast: float
    bytes: int

    def as_text(self) -> str:
        """A row of a table."""
        rates = " ".join(f"{self.bytes / t / 1e9:9.1f}" for t in (self.plain, self.fast))
        return f"{self.what:44s} {self.plain * 1e6:10.1f} {self.fast * 1e6:10.1f} {self.plain / self.fast:7.2f} {rates}"


def best(run: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Least seconds of one call, after one for warming up (and, in Triton, for compiling)."""
    run()
    times = []
    for _ in range(repeats):
        start = seconds(device)
        run()
        times.append(seconds(device) - start)
    return max(min(times), 1e-9)


def kernels(device: torch.device) -> dict[str, tuple[Callable[[], Any], int]]:
    """The fused ops by name, with the bytes that each must move."""
    dtype = torch.bfloat16

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    stream, branch, one = draw(TOKENS, HIDDEN, dtype=torch.float32), draw(TOKENS, HIDDEN), draw(HIDDEN)
    joint = draw(TOKENS, 3, HEADS, HIDDEN // HEADS)
    turns = torch.polar(torch.ones(TOKENS, 32, device=device), draw(TOKENS, 32, dtype=torch.float32))
    tile, expanded = draw(TILE, GROUP, PIXEL, dtype=torch.float32), draw(TILE, GROUP, PIXEL)
    vectors = draw(TILE, 4 * GROUP * PIXEL).mul_(0.1).chunk(4, dim=-1)
    shift, factor = (vector.view(tile.shape) for vector in vectors[:2])
    fc1 = torch.nn.Linear(PIXEL, 4 * PIXEL, device=device, dtype=dtype)
    fc2 = torch.nn.Linear(4 * PIXEL, PIXEL, device=device, dtype=dtype)
    logits, gate = draw(TOKENS, 1, dtype=torch.float32), draw(1, HIDDEN).mul_(0.01)
    tokens, pixels = TOKENS * HIDDEN, TILE * GROUP * PIXEL
    return {
        "norm and modulation, tokens": (lambda: elementwise.norm_modulate(stream, one, one, dtype), tokens * 6),
        "norm and modulation, pixels": (lambda: elementwise.norm_modulate(tile, shift, factor, dtype), pixels * 10),
        "gated addition": (lambda: elementwise.add_gated_(stream, branch, one), tokens * 10),
        "gate per token": (lambda: elementwise.gate_latent_(stream, branch, gate, logits), tokens * 10),
        "norm and RoPE of queries": (
            lambda: elementwise.norm_rotate_(joint[:, 0], one[: HIDDEN // HEADS], turns),
            tokens * 4 + TOKENS * 32 * 8,
        ),
        "pixel block after its large products": (
            lambda: elementwise.update_pixels_(tile, expanded, vectors, fc1, fc2),
            pixels * 18,
        ),
    }


def compare_kernels(device: torch.device, repeats: int) -> list[Comparison]:
    """Every fused op against the eager one, and attention in eight bits against the fastest exact one."""
    if device.type == "cpu":
        print("No GPU here, so fused ops were not timed.", file=sys.stderr)
        return []
    lines, ops = [], CompiledOps()
    for what, (run, size) in kernels(device).items():
        plain = best(run, device, repeats)
        with elementwise.compiled_ops(ops):
            lines.append(Comparison(what, plain, best(run, device, repeats), size))
    q, k, v = (torch.randn(1, HEADS, 4 * TOKENS, HIDDEN // HEADS, device=device).bfloat16() for _ in range(3))
    exact = MeasuredAttention(exact_kernels())
    plain = best(lambda: exact(q, k, v), device, repeats)
    for name, kernel in int8_kernels().items():
        fast = best(lambda kernel=kernel: kernel(q, k, v), device, repeats)
        lines.append(Comparison(f"attention, {name}", plain, fast, 4 * q.numel() * q.itemsize))
    return lines


def compare_products(device: torch.device, repeats: int) -> list[Comparison]:
    """Products in eight bits against those of plain weights."""
    dtype, tokens = (torch.float32, 128) if device.type == "cpu" else (torch.bfloat16, TOKENS)
    lines = []
    for inside, outside in ((HIDDEN, 3 * HIDDEN), (HIDDEN, FEED), (FEED, HIDDEN)):
        x = torch.randn(tokens, inside, device=device, dtype=dtype)
        weight = torch.randn(outside, inside, device=device, dtype=dtype)
        plain = best(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight), device, repeats)
        for format in STORED:
            try:
                require_products(format, dtype, device)
            except SettingError as fault:
                print(fault, file=sys.stderr)
                continue
            codes, scales = quantize_rows(weight, format)
            fast = best(lambda x=x, c=codes, s=scales: w8a8_linear(x, c, s), device, repeats)
            size = (tokens * (inside + outside) + inside * outside) * dtype.itemsize
            lines.append(Comparison(f"{format} product {tokens} x {inside} x {outside}", plain, fast, size))
    return lines


def compiled_ahead() -> Iterator[dict[str, Any]]:
    """Registers, shared memory and spills of every Triton kernel on every one of `GPUS`."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from pidecode.engine.ops import triton as source

    pixels = {"WIDTH": PIXEL, "HIDDEN": 4 * PIXEL, "ROWS": 64, "LANES": PIXEL, "INNER": 4 * PIXEL, "UPCAST": False}
    heads = {"WIDTH": HIDDEN // HEADS, "ROWS": source.QUERIES, "COLUMNS": source.KEYS, "UPCAST": False}
    keys = {"SMOOTH": True, "WIDTH": HIDDEN // HEADS, "BLOCK": source.KEYS}
    types = {"x_ptr": "*fp32", "codes_ptr": "*i8", "scales_ptr": "*fp32", "mean_ptr": "*fp32", "q_ptr": "*i8",
             "k_ptr": "*i8", "q_scale_ptr": "*fp32", "k_scale_ptr": "*fp32", "factor": "fp32"}  # fmt: skip
    for name, kernel, constants, own in (
        ("pixel block after its large products", source._update_pixels, pixels, {}),
        ("int8 attention, quantization", source._quantize_tokens, keys, {"x_ptr": "*bf16"}),
        ("int8 attention", source._int8_attention, heads, {}),
    ):
        names = kernel.arg_names
        signature = {
            arg: "constexpr" if arg in constants else own.get(arg, types.get(arg, "*bf16" if "ptr" in arg else "i32"))
            for arg in names
        }
        values = {(names.index(arg),): value for arg, value in constants.items()}
        # Pointers and strides are multiples of 16 as a launch finds them.
        aligned = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(names) if arg.endswith(("ptr", "stride"))}
        for gpu, target in GPUS.items():
            unit = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
            built = compile(unit, target=GPUTarget(*target), options={"num_stages": 3})
            yield {"kernel": name, "gpu": gpu, "shared": built.metadata.shared, **_resources(built)}


def _resources(built: Any) -> dict[str, int]:
    """Registers of a thread, and bytes it spills."""
    if "amdgcn" in built.asm:
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count|sgpr_spill_count): +(\d+)", built.asm["amdgcn"]))
        spills = 4 * (int(found["vgpr_spill_count"]) + int(found["sgpr_spill_count"]))
        return {"registers": int(found["vgpr_count"]), "spills": spills}
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.cubin")
        file.write_bytes(built.asm["cubin"])
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # What a thread holds in local memory, its stack, is what did not fit its registers.
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "spills": int(found["STACK"]) + int(found["LOCAL"])}


def main() -> None:
    """Compare, or compile ahead, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1; chosen if not given")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    parser.add_argument("--ahead", action="store_true", help="compile for GPUs that need not be there, time nothing")
    options = parser.parse_args()
    if options.ahead:
        found = list(compiled_ahead())
        rows = [f"| {r['kernel']} | {r['gpu']} | {r['registers']} | {r['shared']} | {r['spills']} |" for r in found]
        heading = "| kernel | GPU | registers | shared memory, bytes | spilled, bytes |\n|---|---|--:|--:|--:|"
        print(json.dumps(found, indent=2) if options.json else "\n".join([heading, *rows]))
        return
    device = select_device(options.device)
    with torch.inference_mode():
        lines = [*compare_kernels(device, options.repeats), *compare_products(device, options.repeats)]
    where = f"{describe_device(device)}; torch {torch.__version__}"
    if options.json:
        print(json.dumps({"device": where, "lines": [asdict(line) for line in lines]}, indent=2))
        return
    print(f"{'':44s} {'plain us':>10s} {'fast us':>10s} {'ratio':>7s} {'plain GB/s':>9s} {'fast GB/s':>9s}")
    print("\n".join([*(line.as_text() for line in lines), where]))


if __name__ == "__main__":
    main()
