#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Each Triton kernel against the eager op, and w8a8 products against plain ones, on the device at hand.

    python -m benchmarks.kernels [--device cuda] [--repeats 20] [--json]

Shapes are those of v1.5 in bfloat16, one chunk or tile at a time. Time is the best of the repeats; bytes/s are those
that a pass has to move at the least, over that time. Without a GPU only
the products are compared, in float32.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks.speed import describe_device, seconds
from pidecode.devices import select_device
from pidecode.engine.ops import elementwise
from pidecode.engine.ops.quantize import KERNELS, best_kernel, quantize_rows, w8a8_linear
from pidecode.errors import MissingDependencyError, SettingError

TOKENS, HIDDEN, FEED, HEADS = 4096, 1536, 4096, 24
TILE, GROUP, PIXEL = 2048, 64, 16


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
    """Every kernel against the eager op; empty where Triton cannot run, with the reason on stderr."""
    if device.type == "cpu":
        print("No GPU here, so Triton kernels were not timed.", file=sys.stderr)
        return []
    lines = []
    for what, (run, size) in kernels(device).items():
        plain = best(run, device, repeats)
        try:
            with elementwise.triton_ops():
                fast = best(run, device, repeats)
        except MissingDependencyError as fault:
            print(fault, file=sys.stderr)
            return []
        lines.append(Comparison(what, plain, fast, size))
    return lines


def compare_products(device: torch.device, repeats: int) -> list[Comparison]:
    """Products in eight bits against those of plain weights."""
    dtype, tokens = (torch.float32, 128) if device.type == "cpu" else (torch.bfloat16, TOKENS)
    lines = []
    for inside, outside in ((HIDDEN, 3 * HIDDEN), (HIDDEN, FEED), (FEED, HIDDEN)):
        x = torch.randn(tokens, inside, device=device, dtype=dtype)
        weight = torch.randn(outside, inside, device=device, dtype=dtype)
        plain = best(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight), device, repeats)
        for format in KERNELS:
            try:
                kernel = best_kernel(format, dtype, device)
            except SettingError as fault:
                print(fault, file=sys.stderr)
                continue
            codes, scales = quantize_rows(weight, format)
            fast = best(lambda x=x, c=codes, s=scales, k=kernel: w8a8_linear(x, c, s, k), device, repeats)
            size = (tokens * (inside + outside) + inside * outside) * dtype.itemsize
            lines.append(Comparison(f"{kernel} product {tokens} x {inside} x {outside}", plain, fast, size))
    return lines


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="cpu, cuda, cuda:1; chosen if not given")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    options = parser.parse_args()
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
