# SPDX-License-Identifier: Apache-2.0
"""`pidecode bench`: how fast a decode is here and how much memory it takes, with the conditions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pidecode.benchmarking.networks import NETWORKS
from pidecode.cli.common import SHORT_DTYPES, emit, json_option, table, threads_option, weights_options
from pidecode.errors import SettingError
from pidecode.units import parse_size

if TYPE_CHECKING:
    from pidecode.benchmarking.speed import Trial


MODES = ("eager", "compiled", "graphs")

_WHAT = (
    click.option("--network", "networks", type=click.Choice(list(NETWORKS)), multiple=True, help="tiny if not given."),
    click.option("--size", "sizes", metavar="WxH", multiple=True, help="512x512 if not given."),
    click.option("--dtype", "dtypes", type=click.Choice(SHORT_DTYPES), multiple=True, help="As suits the device."),
    click.option("--mode", "modes", type=click.Choice(MODES), multiple=True, help="eager if not given."),
    click.option(
        "--suite", is_flag=True,
        help="All networks, modes and sizes from 1024 to 4096 that can run here, of those that are not named.",
    ),
)  # fmt: skip
_HOW = (
    click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; chosen for you if not given."),
    click.option("--steps", type=click.IntRange(1, 4), default=4, show_default=True),
    click.option("--repeats", type=click.IntRange(min=1), default=2, show_default=True),
    threads_option,
    weights_options,
    click.option("--reference", type=click.Path(path_type=Path), help="Checkout of nv-tlabs/PiD to compare with."),
    click.option("--profile", is_flag=True, help="Say where the time goes instead."),
    click.option("-o", "--out", type=click.Path(path_type=Path), help="Write JSON to this file as well."),
    json_option,
)


def _options(command: Any) -> Any:
    for option in reversed((*_WHAT, *_HOW)):
        command = option(command)
    return command


@click.command()
@_options
def bench(reference: Path | None, profile: bool, out: Path | None, as_json: bool, **options: Any) -> None:
    """Measure decodes with random weights: speed does not depend on what the weights are.

    --network, --size, --dtype and --mode may be given several times; every combination is measured.
    """
    from pidecode.benchmarking.profile import profile as take_apart

    trials, skipped = _trials(**options)
    data: dict[str, Any] = {"skipped": skipped}
    if reference is not None and (profile or any(trial.mode != "eager" for trial in trials)):
        raise SettingError("--reference compares the eager mode alone, without --profile; leave the others out.")
    if profile:
        profiles = [take_apart(trial) for trial in trials]
        data["profiles"] = [one.as_dict() for one in profiles]
        lines = [one.sentences() for one in profiles]
    else:
        lines = list(_measured(trials, data))
    if reference is not None:
        lines += _compared(trials, reference, data)
    lines += [f"left out: {name}: {why}" for name, why in skipped.items()]
    if out is not None:
        out.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    emit(data, "\n".join(lines), as_json=as_json)


def _trials(device: str | None, dtypes: Sequence[str], sizes: Sequence[str], **options: Any) -> Any:
    """What to measure, and what a suite leaves out with the reason."""
    from pidecode.benchmarking.suite import Wanted, why_not
    from pidecode.devices import pick_device
    from pidecode.weights.convert import DTYPES

    wanted = Wanted(
        device=pick_device(device),
        dtypes=[DTYPES[dtype] for dtype in dtypes],
        sizes=[parse_size(size) for size in sizes],
        **options,
    )
    trials, skipped = list(wanted.trials()), {}
    if wanted.suite:
        reasons = [(trial, why_not(trial)) for trial in trials]
        skipped = {f"{t.network} {t.size[0]}x{t.size[1]} {t.mode}": why for t, why in reasons if why is not None}
        trials = [trial for trial, why in reasons if why is None]
        if not trials:
            raise SettingError("Nothing of the suite can run here: " + "; ".join(skipped.values()))
    for trial in trials:
        trial.check()
    return trials, skipped


def _measured(trials: Sequence[Trial], data: dict[str, Any]) -> Iterator[str]:
    """The table and its conditions."""
    from pidecode.benchmarking.speed import measure

    results = [measure(trial) for trial in trials]
    data["results"] = [result.as_dict() for result in results]
    yield table([result.row() for result in results])
    first = results[0]
    yield f"{first.device}; commit {first.commit}; torch {first.versions['torch']}; attention: {first.attention}"


def _compared(trials: Sequence[Trial], checkout: Path, data: dict[str, Any]) -> list[str]:
    """Each trial beside the reference, in words."""
    from pidecode.benchmarking.reference import compare

    comparisons = [compare(trial, checkout) for trial in trials]
    data["comparisons"] = [comparison.as_dict() for comparison in comparisons]
    return [
        f"{trial.network} {trial.size[0]}x{trial.size[1]}: {c.speed:.2f} times the reference's speed, "
        f"{c.memory:.1f} times less memory, largest difference {c.difference:.1e}"
        for trial, c in zip(trials, comparisons, strict=True)
    ]
