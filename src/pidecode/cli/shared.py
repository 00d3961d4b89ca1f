# SPDX-License-Identifier: Apache-2.0
"""What commands share: options of one spelling, JSON or sentences, a progress bar that is quiet in pipes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from pidecode.facts.spaces import ALIASES, SPACES

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

    from pidecode.threads import suitable_threads

    present = torch.get_num_threads()
    count = wanted or suitable_threads(present).count
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


def readable_size(count: int | None) -> str:
    """Bytes as people say them: 2.7 GB."""
    if count is None:
        return "?"
    size, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} {units[0]}" if units[0] == "B" or size >= 100 else f"{size:.1f} {units[0]}"


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
