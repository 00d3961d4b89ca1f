# SPDX-License-Identifier: Apache-2.0
"""Commands that end in every way a command can, for the tests of the command tree."""

from __future__ import annotations

import warnings

import click

from pidecode import errors


@click.command()
@click.argument("name")
def probe(name: str) -> None:
    """End as NAME says: an error of ours, somebody else's, a warning, an interrupt, or well."""
    if name == "well":
        click.echo("done")
    elif name == "interrupt":
        raise KeyboardInterrupt
    elif name == "memory":
        raise MemoryError
    elif name == "unexpected":
        raise ZeroDivisionError("something else")
    elif name == "usage":
        raise click.UsageError("not like that")
    elif name == "warning":
        warnings.warn("mind the gap", errors_warning(), stacklevel=1)
    elif name == "foreign-warning":
        warnings.warn("deprecated elsewhere", DeprecationWarning, stacklevel=1)
    else:
        more = (1.0,) if name == "BusyError" else ()
        raise getattr(errors, name)(f"what came of {name}", *more)


def errors_warning() -> type[Warning]:
    """A warning of ours."""
    from pidecode.latents.latent import NormalizationWarning

    return NormalizationWarning
