# SPDX-License-Identifier: Apache-2.0
"""`pidecode plan`: what a decode of some size will need, and how it would be run, before anything is loaded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import click

from pidecode.cli.shared import emit, json_option
from pidecode.cli.thrift import weights_options
from pidecode.errors import SettingError
from pidecode.measure.networks import NETWORKS
from pidecode.planner import GB, Machine, Weights, parse_bytes, parse_size, plan_decode


@click.command()
@click.option("--size", required=True, metavar="WxH", help="Picture to make, in pixels: 4096x3072.")
@click.option("--vram", metavar="BYTES", help="Memory of an accelerator: 12GB. Without it, what is free here.")
@click.option("--ram", metavar="BYTES", help="Plan for a processor with this much memory instead.")
@click.option("--network", type=click.Choice(list(NETWORKS)), default="v1.5", show_default=True)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Pictures at once.")
@click.option("--dtype", metavar="NAME", help="float32, bfloat16 or float16; chosen to fit if not given.")
@weights_options
@json_option
def plan(
    size: str, vram: str | None, ram: str | None, network: str, as_json: bool, weights: Weights | None, **options: Any
) -> None:
    """Say how a picture would be decoded in the memory there is, or that it does not fit and what would."""
    if vram and ram:
        raise SettingError("--vram and --ram name two machines; give one.")
    given = vram or ram
    if given:
        # Of a card that is known by its memory alone, it is taken for granted that it multiplies as asked.
        products: tuple[Weights, ...] = ("fp8",) if weights == "fp8" else ("int8",)
        machine = Machine(memory=parse_bytes(given), accelerator=bool(vram), products=products)
    else:
        from pidecode.measure.machine import this_machine

        machine = this_machine()
    chosen = plan_decode(NETWORKS[network], parse_size(size), machine, weights=weights, **options)
    data = {**asdict(chosen), "peak": chosen.peak, "exact": chosen.exact, "memory": machine.memory}
    emit(data, f"{chosen.describe()}\n  {'free':22s} {machine.memory / GB:6.2f} GB", as_json=as_json)
