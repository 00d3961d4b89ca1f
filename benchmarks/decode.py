# SPDX-License-Identifier: Apache-2.0
"""How fast a decode is here and how much memory it takes, with the conditions.

    python -m benchmarks.decode --network v1.5 --size 2048x2048 [--mode cuda-graphs] [--reference CHECKOUT] [--json]

Networks have random weights: speed does not depend on what the weights are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, get_args

import click
import torch

from benchmarks.configs import CONFIGS
from benchmarks.profiler import profile as run_profile
from benchmarks.reference import compare
from benchmarks.speed import Mode, Trial, measure
from pidecode.cli.common import combined, emit, json_option, quantization_options, set_threads, table, threads_option
from pidecode.devices import default_dtype, select_device
from pidecode.engine.machine import Quantization, this_machine
from pidecode.engine.plan import Plan, Scheme, predict
from pidecode.errors import PidecodeError, SettingError
from pidecode.units import DTYPES, format_bytes, parse_size

MODES: tuple[Mode, ...] = get_args(Mode)
SIZES = ((1024, 1024), (2048, 2048), (2688, 1536), (4096, 4096))
"""Of the whole suite: square ones and the widest of the trained shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What to measure; an empty choice means one trial of each kind, or all there is with `suite`."""

    device: torch.device
    networks: Sequence[str] = ()
    sizes: Sequence[tuple[int, int]] = ()
    dtypes: Sequence[torch.dtype] = ()
    modes: Sequence[Mode] = ()
    steps: int = 4
    repeats: int = 2
    quantization: Quantization | None = None
    scheme: Scheme | None = None
    suite: bool = False

    def trials(self) -> Iterator[Trial]:
        """Every combination, quick ones first."""
        every = self.suite
        for name, size, dtype, mode in product(
            self.networks or (tuple(CONFIGS) if every else ("v1.5-narrow",)),
            self.sizes or (SIZES if every else ((512, 512),)),
            self.dtypes or (default_dtype(self.device),),
            self.modes or (MODES if every else ("eager",)),
        ):
            yield Trial(
                network=name,
                config=CONFIGS[name],
                size=size,
                dtype=dtype,
                device=self.device,
                steps=self.steps,
                repeats=self.repeats,
                mode=mode,
                quantization=self.quantization,
                scheme=self.scheme,
            )


def why_not(trial: Trial, memory: int | None = None) -> str | None:
    """Why a trial cannot run here; None if it can, as far as can be told beforehand.

    Args:
        trial: What to run.
        memory: Bytes free on the device; read from it if not given.
    """
    machine = this_machine(trial.device)
    free = machine.memory if memory is None else memory
    plan = Plan(size=trial.size, dtype=str(trial.dtype).removeprefix("torch."))
    peak = predict(plan, trial.config, accelerator=machine.accelerator, stripped=machine.accelerator).peak
    if peak > free:
        return f"it needs about {format_bytes(peak)}, and {format_bytes(free)} are free"
    try:
        trial.check()
    except PidecodeError as error:
        return str(error)
    return None


_WHAT = (
    click.option(
        "--network", "networks", type=click.Choice(list(CONFIGS)), multiple=True, help="v1.5-narrow if not given."
    ),
    click.option("--size", "sizes", metavar="WxH", multiple=True, help="512x512 if not given."),
    click.option("--dtype", "dtypes", type=click.Choice(list(DTYPES)), multiple=True, help="As suits the device."),
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
    quantization_options,
    click.option("--reference", type=click.Path(path_type=Path), help="Checkout of nv-tlabs/PiD to compare with."),
    click.option("--profile", is_flag=True, help="Show where the time goes instead."),
    click.option("-o", "--out", type=click.Path(path_type=Path), help="Write JSON to this file as well."),
    json_option,
)


@click.command()
@combined(*_WHAT, *_HOW)
def main(reference: Path | None, profile: bool, out: Path | None, as_json: bool, **options: Any) -> None:
    """Measure decodes with random weights.

    --network, --size, --dtype and --mode may be given several times; every combination is measured.
    """
    set_threads(options.pop("threads"))
    trials, skipped = _trials(**options)
    data: dict[str, Any] = {"skipped": skipped}
    if reference is not None and (profile or any(trial.mode != "eager" for trial in trials)):
        raise SettingError("--reference compares the eager mode alone, without --profile; leave the others out.")
    if profile:
        profiles = [run_profile(trial) for trial in trials]
        data["profiles"] = [one.as_dict() for one in profiles]
        lines = [one.as_text() for one in profiles]
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
    wanted = Selection(
        device=select_device(device),
        dtypes=[getattr(torch, dtype) for dtype in dtypes],
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
    results = [measure(trial) for trial in trials]
    data["results"] = [result.as_dict() for result in results]
    yield table([result.row() for result in results])
    first = results[0]
    yield f"{first.device}; commit {first.commit}; torch {first.versions['torch']}; attention: {first.attention}"


def _compared(trials: Sequence[Trial], checkout: Path, data: dict[str, Any]) -> list[str]:
    """Each trial beside the reference."""
    comparisons = [compare(trial, checkout) for trial in trials]
    data["comparisons"] = [comparison.as_dict() for comparison in comparisons]
    return [
        f"{trial.network} {trial.size[0]}x{trial.size[1]}: {c.speed:.2f} times the reference's speed, "
        f"{c.memory:.1f} times less memory, largest difference {c.difference:.1e}"
        for trial, c in zip(trials, comparisons, strict=True)
    ]


if __name__ == "__main__":
    try:
        main()
    except PidecodeError as error:
        raise SystemExit(str(error)) from None
