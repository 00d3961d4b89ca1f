# SPDX-License-Identifier: Apache-2.0
"""What several commands share: options, checks, memory options."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pidecode.engine.machine import QUANTIZATIONS, Machine, Quantization, this_machine
from pidecode.engine.plan import SCHEMES, Plan, Scheme, plan_decode
from pidecode.registry.spaces import ALIASES, SPACES
from pidecode.units import parse_bytes

if TYPE_CHECKING:
    from pidecode.engine.feed_forward import FeedForwardPlan
    from pidecode.weights.metadata import CheckpointMetadata


SHORT_DTYPES = ("bf16", "fp16", "fp32")
"""Number formats by the names people type; `weights.convert.DTYPES` has torch's own."""

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Verdict:
    """One thing a person may want to do, whether it works here, and if not, what would mend it."""

    what: str
    works: bool
    because: str


def json_option(command: F) -> F:
    """Add --json (passed on as `as_json`)."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def overwrite_option(command: F) -> F:
    """Add --overwrite."""
    return click.option("--overwrite", is_flag=True, help="Replace files that exist.")(command)


def space_option(command: F) -> F:
    """Add --space, which takes a latent space or the name of an image model that uses one."""
    choice = click.Choice([*SPACES, *ALIASES])
    text = "Latent space, or an image model that uses one. Needed where the weights cannot tell."
    return click.option("--space", type=choice, metavar="NAME", help=text)(command)


def threads_option(command: F) -> F:
    """Add --threads, which is settled before the command begins and not passed on to it."""
    text = "Threads of the processor; if not given, as many as suit its cores and limits (`pidecode doctor`)."
    return click.option(
        "--threads", type=click.IntRange(min=1), expose_value=False, callback=_settle_threads, help=text
    )(command)


def _settle_threads(_ctx: click.Context, _option: click.Parameter, wanted: int | None) -> None:
    """Have the framework use as many threads as were asked for, or as suit this machine."""
    import torch

    from pidecode.devices import recommended_threads

    present = torch.get_num_threads()
    count = wanted or recommended_threads(present).count
    if count != present:
        torch.set_num_threads(count)


def emit(data: Any, sentences: str | Callable[[], str], *, as_json: bool) -> None:
    """Print `data` as JSON, or `sentences` for people."""
    if as_json:
        click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))
        return
    click.echo(sentences() if callable(sentences) else sentences)


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of equal keys as columns of equal width, under their names."""
    if not rows:
        return "(none)"
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    lines = [{key: key for key in widths}, *rows]
    return "\n".join("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip() for row in lines)


def progress(total: int, label: str, unit: str = "step") -> Any:
    """A bar on standard error, drawn only where a person is watching; bytes ("B") in kB, MB, GB."""
    from tqdm import tqdm

    return tqdm(
        total=total,
        desc=label,
        unit=unit,
        unit_scale=unit == "B",
        file=sys.stderr,
        disable=None,
        leave=False,
        dynamic_ncols=True,
    )


Job = tuple[int, int, int]
"""Width and height of an image to make, in pixels, and how many at once."""


def quantization_options(command: F) -> F:
    """Add --quantization and --scheme."""
    command = click.option(
        "--scheme",
        type=click.Choice(SCHEMES),
        help="How quantized weights are multiplied: dequantized (w8a16, the default), or in eight bits where the "
        "device can (w8a8, experimental).",
    )(command)
    return click.option(
        "--quantization",
        type=click.Choice(QUANTIZATIONS),
        help="Format weights are stored in; chosen to fit if not given.",
    )(command)


def memory_option(command: F) -> F:
    """Add --memory."""
    text = "Plan the decode to need at most this much of the device's memory: 4GB. See `pidecode plan`."
    return click.option("--memory", metavar="BYTES", help=text)(command)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """What was asked for; with nothing asked for there is no plan, and a decode runs as it always does."""

    memory: str | None = None
    quantization: Quantization | None = None
    scheme: Scheme | None = None

    @property
    def asked(self) -> bool:
        """Whether a plan is to be made."""
        return (self.memory, self.quantization, self.scheme) != (None, None, None)

    def plan(self, config: Any, jobs: Sequence[Job], device: str | None, dtype: str | None) -> Plan | FeedForwardPlan:
        """The plan that the largest of the jobs needs, on this machine.

        Raises DoesNotFitError if there is none, SettingError for what the device cannot do.
        """
        machine: Machine = this_machine(device)
        if self.memory is not None:
            machine = replace(machine, memory=min(machine.memory, parse_bytes(self.memory)))
        width, height, batch = max(jobs, key=lambda job: job[0] * job[1] * job[2])
        return plan_decode(
            config,
            (width, height),
            machine,
            batch=batch,
            dtype=dtype,
            quantization=self.quantization,
            scheme=self.scheme,
        )


def upscaled(images: Sequence[Any], identity: CheckpointMetadata) -> list[Job]:
    """What enlarging these images makes, before anything is cut off again."""
    from pidecode.images import load_image
    from pidecode.registry.spaces import get_space

    assert identity.config is not None
    assert identity.space is not None
    scale, space = identity.config.scale, get_space(identity.space)
    if space.fixed_input is not None:
        return [(space.fixed_input * scale, space.fixed_input * scale, 1)]
    step = space.input_multiple
    sizes = (load_image(image).size for image in images)
    return [(-(-width // step) * step * scale, -(-height // step) * step * scale, 1) for width, height in sizes]


def decoded(latents: Sequence[Any], space: str | None, size: tuple[int, int] | None) -> list[Job]:
    """What decoding these saved latents makes."""
    from pidecode.latents.latent import Latent

    read = [Latent.load(source, space=space) for source in latents]
    return [(*(size or (latent.output_size[1], latent.output_size[0])), len(latent)) for latent in read]
