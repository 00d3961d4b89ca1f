# SPDX-License-Identifier: Apache-2.0
"""`pidecode train`: run a recipe, list recipes, show settings."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import click

from pidecode.cli import common
from pidecode.errors import SettingError
from pidecode.units import printable

_EVERY = 10.0  # seconds between progress lines where standard error is no terminal


def _progress_line() -> Callable[[str], None]:
    """Print one line that is overwritten on a terminal; a new line every few seconds elsewhere."""
    terminal, last, is_open = sys.stderr.isatty(), 0.0, False

    def show(text: str) -> None:
        nonlocal last, is_open
        if text.startswith("step "):
            if terminal:
                click.echo(f"\r\x1b[K{printable(text)}", nl=False, err=True)
                is_open = True
                return
            if time.monotonic() - last < _EVERY:
                return
            last = time.monotonic()
        common.echo(f"\n{text}" if is_open else text, err=True)
        is_open = False

    return show


def _complete_recipes(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from pidecode.training.recipes import RECIPES

    return [name for name in RECIPES if name.startswith(incomplete)]


def _prepared(recipe: str | None, space: str | None, settings: Sequence[str], flags: Mapping[str, bool]) -> Any:
    """The configuration of a run, or the text that is to be printed instead."""
    from pidecode.training.config import apply_settings, describe
    from pidecode.training.recipes import RECIPES, get_recipe, summary

    if flags["list_recipes"]:
        return common.table([{"recipe": name, "what it does": summary(one)} for name, one in RECIPES.items()])
    if recipe is None:
        raise SettingError("Name a recipe; `pidecode train --list` shows them.")
    if recipe == "tiny":
        raise SettingError(
            "The recipe of tiny is no part of the package: it lies in the folder recipes/tiny of the repository, whose "
            "README.md has its settings, data and command (`python recipes/tiny/train.py --help`). "
            "`pidecode train photographs` makes a small decoder of your own images."
        )
    config = apply_settings(get_recipe(recipe, space), settings)
    if flags["show"]:
        return "\n".join(f"{name} = {value!r}\n    {about}" for name, value, about in describe(config))
    if flags["memory"]:
        from pidecode.training.memory import memory_table

        return memory_table(config)
    return config


@click.command(cls=common.GroupedCommand)
@click.argument("recipe", required=False, shell_complete=_complete_recipes)
@click.option("--data", metavar="PATH", help="Folder of images or WebDataset shards; the setting data.source.")
@click.option("--out", metavar="FOLDER", help="Folder of the run: checkpoints, samples, metrics, result.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change one setting; repeatable.")
@click.option("--resume", is_flag=True, help="Continue from the newest checkpoint in --out.")
@click.option("--export", "export_only", is_flag=True, help="Only export the newest checkpoint.")
@click.option("--list", "list_recipes", is_flag=True, help="List the recipes.")
@click.option("--show", is_flag=True, help="Show every setting of the recipe, its value and its meaning.")
@click.option("--memory", is_flag=True, help="Estimate the memory the recipe needs per GPU, from its network.")
@common.space_option
def train(
    recipe: str | None, data: str | None, out: str | None, settings: tuple[str, ...], space: str | None, **flags: bool
) -> None:
    """Train RECIPE (a name from --list, or my_recipe.py:function).

    Start it with torchrun for several GPUs or hosts: torchrun --nproc-per-node 8 -m pidecode train ...
    """
    given = [f"data.source={data!r}"] if data is not None else []
    with common.WorkBar():
        config = _prepared(recipe, space, [*given, *settings], flags)
    if isinstance(config, str):
        common.echo(config)
        return
    if out is None:
        raise SettingError("Name a folder for the run: --out runs/my-decoder.")
    if flags["export_only"]:
        from pidecode.training.tasks import export

        common.echo(str(export(config, out)))
        return
    line = _progress_line()
    with ExitStack() as waiting:
        waiting.enter_context(common.WorkBar("preparing the run"))
        from pidecode.training.tasks import train as run

        def progress(text: str) -> None:
            waiting.close()
            line(text)

        result = run(config, out, resume=flags["resume"], progress=progress)
    common.echo(str(result))
