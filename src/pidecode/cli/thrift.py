# SPDX-License-Identifier: Apache-2.0
"""The options that settle how a decode spends memory, and the plan that they and the sources make together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pidecode.planner import PRODUCTS, WEIGHTS, Machine, Plan, Products, Weights, parse_bytes, plan_decode

if TYPE_CHECKING:
    from pidecode.weights.identity import Identity



Job = tuple[int, int, int]
"""Width and height of a picture to make, in pixels, and how many at once."""


def weights_options(command: F) -> F:
    """Add --weights and --products."""
    command = click.option(
        "--products",
        type=click.Choice(PRODUCTS),
        help="Multiply eight-bit weights widened, or in eight bits where the device can; wide if not given.",
    )(command)
    return click.option(
        "--weights", type=click.Choice(WEIGHTS), help="Format weights are kept in; chosen to fit if not given."
    )(command)


def memory_option(command: F) -> F:
    """Add --memory."""
    text = "Plan the decode to need at most this much of the device's memory: 4GB. See `pidecode plan`."
    return click.option("--memory", metavar="BYTES", help=text)(command)


@dataclass(frozen=True, slots=True, kw_only=True)
class Thrift:
    """What was asked for; with nothing asked for there is no plan, and a decode runs as it always does."""

    memory: str | None = None
    weights: Weights | None = None
    products: Products | None = None

    @property
    def asked(self) -> bool:
        """Whether a plan is to be made."""
        return (self.memory, self.weights, self.products) != (None, None, None)

    def plan(self, config: Any, jobs: Sequence[Job], device: str | None, dtype: str | None) -> Plan:
        """The plan that the largest of the jobs needs, on this machine.

        Raises DoesNotFitError if there is none, SettingError for what the device cannot do.
        """
        from pidecode.measure.machine import this_machine

        machine: Machine = this_machine(device)
        if self.memory is not None:
            machine = replace(machine, memory=min(machine.memory, parse_bytes(self.memory)))
        width, height, batch = max(jobs, key=lambda job: job[0] * job[1] * job[2])
        return plan_decode(
            config, (width, height), machine, batch=batch, dtype=dtype, weights=self.weights, products=self.products
        )


def upscaled(pictures: Sequence[Any], identity: Identity) -> list[Job]:
    """What enlarging these pictures makes, before anything is cut off again."""
    from pidecode.facts.spaces import get_space
    from pidecode.images import load_image

    assert identity.config is not None
    assert identity.space is not None
    scale, space = identity.config.scale, get_space(identity.space)
    if space.fixed_input is not None:
        return [(space.fixed_input * scale, space.fixed_input * scale, 1)]
    step = space.input_multiple
    sizes = (load_image(picture).size for picture in pictures)
    return [(-(-width // step) * step * scale, -(-height // step) * step * scale, 1) for width, height in sizes]


def decoded(latents: Sequence[Any], space: str | None, size: tuple[int, int] | None) -> list[Job]:
    """What decoding these saved latents makes."""
    from pidecode.latents.latent import Latent

    read = [Latent.load(source, space=space) for source in latents]
    return [(*(size or (latent.output_size[1], latent.output_size[0])), len(latent)) for latent in read]
