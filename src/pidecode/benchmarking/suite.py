# SPDX-License-Identifier: Apache-2.0
"""Which trials to run: what was named, or everything that can run on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import get_args

import torch

from pidecode.benchmarking.machine import this_machine
from pidecode.benchmarking.networks import NETWORKS
from pidecode.benchmarking.speed import Mode, Trial
from pidecode.devices import usual_dtype
from pidecode.engine.plan import Plan, Products, Weights, predict
from pidecode.errors import PidecodeError
from pidecode.units import format_bytes

MODES: tuple[Mode, ...] = get_args(Mode)
SIZES = ((1024, 1024), (2048, 2048), (2688, 1536), (4096, 4096))
"""Of the whole suite: square ones and the widest of the trained shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What to measure; an empty choice means one trial of each kind, or all there is with `suite`."""

    device: torch.device
    networks: Sequence[str] = ()
    sizes: Sequence[tuple[int, int]] = ()
    dtypes: Sequence[torch.dtype] = ()
    modes: Sequence[Mode] = ()
    steps: int = 4
    repeats: int = 2
    weights: Weights | None = None
    products: Products | None = None
    suite: bool = False

    def trials(self) -> Iterator[Trial]:
        """Every combination, quick ones first."""
        every = self.suite
        for name, size, dtype, mode in product(
            self.networks or (tuple(NETWORKS) if every else ("tiny",)),
            self.sizes or (SIZES if every else ((512, 512),)),
            self.dtypes or (usual_dtype(self.device),),
            self.modes or (MODES if every else ("eager",)),
        ):
            yield Trial(
                network=name,
                config=NETWORKS[name],
                size=size,
                dtype=dtype,
                device=self.device,
                steps=self.steps,
                repeats=self.repeats,
                mode=mode,
                weights=self.weights,
                products=self.products,
            )


def why_not(trial: Trial, memory: int | None = None) -> str | None:
    """Why a trial cannot run here, in words; None if it can, as far as can be told beforehand.

    memory: bytes free on the device; asked of it if not given.
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
