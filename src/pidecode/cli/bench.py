# SPDX-License-Identifier: Apache-2.0
"""`pidecode bench`: how fast a decode is here and how much memory it takes, with the conditions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from pidecode.cli.shared import SHORT_DTYPES, emit, json_option, table
from pidecode.cli.thrift import weights_options
from pidecode.measure.networks import NETWORKS
from pidecode.planner import parse_size


@click.command()
@click.option("--network", type=click.Choice(list(NETWORKS)), multiple=True, help="May be repeated; tiny if not given.")
@click.option("--size", "sizes", metavar="WxH", multiple=True, help="May be repeated; 512x512 if not given.")
@click.option("--dtype", "dtypes", type=click.Choice(SHORT_DTYPES), multiple=True, help="May be repeated.")
@click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; chosen for you if not given.")
@click.option("--steps", type=click.IntRange(1, 4), default=4, show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=2, show_default=True)
@click.option(
    "--threads", type=click.IntRange(min=1), help="Threads of a processor; the framework's choice if not given."
)
@weights_options
@click.option("--reference", type=click.Path(path_type=Path), help="Checkout of nv-tlabs/PiD to compare with.")
@click.option("--profile", is_flag=True, help="Say where the time goes instead.")
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write JSON to this file as well.")
@json_option
def bench(
    network: tuple[str, ...],
    sizes: tuple[str, ...],
    dtypes: tuple[str, ...],
    device: str | None,
    out: Path | None,
    as_json: bool,
    profile: bool,
    **options: Any,
) -> None:
    """Measure decodes with random weights: speed does not depend on what the weights are."""
    import torch

    from pidecode.devices import pick_device
    from pidecode.measure import speed
    from pidecode.weights.convert import DTYPES

    threads, reference = options.pop("threads"), options.pop("reference")
    if threads:
        torch.set_num_threads(threads)
    chosen = pick_device(device)
    default = "fp32" if chosen.type in ("cpu", "mps") else "bf16"
    trials = [
        speed.Trial(
            network=name,
            config=NETWORKS[name],
            size=parse_size(size),
            dtype=DTYPES[dtype],
            device=chosen,
            **options,
        )
        for name in network or ("tiny",)
        for size in sizes or ("512x512",)
        for dtype in dtypes or (default,)
    ]
    if profile:
        click.echo("\n".join(speed.profile(trial) for trial in trials))
        return
    results = [speed.measure(trial) for trial in trials]
    data: dict[str, Any] = {"results": [result.as_dict() for result in results]}
    text = table([result.row() for result in results])
    if reference is not None:
        from pidecode.measure.reference import compare

        comparisons = [compare(trial, reference) for trial in trials]
        data["comparisons"] = [comparison.as_dict() for comparison in comparisons]
        lines = [
            f"{trial.network} {trial.size[0]}x{trial.size[1]}: {c.speed:.2f} times the reference's speed, "
            f"{c.memory:.1f} times less memory, largest difference {c.difference:.1e}"
            for trial, c in zip(trials, comparisons, strict=True)
        ]
        text = "\n".join([text, *lines])
    first = results[0]
    text += f"\n{first.device}; commit {first.commit}; torch {first.versions['torch']}; attention: {first.attention}"
    if out is not None:
        out.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    emit(data, text, as_json=as_json)
