# SPDX-License-Identifier: Apache-2.0
"""`pidecode train`: run a recipe, list what there is, show what each setting means."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pidecode.cli.common import space_option, table
from pidecode.errors import SettingError

if TYPE_CHECKING:
    from pidecode.training.config import Recipe

OWN_WEIGHTS = {
    "tiny": "The small weights that ship with the package.",
    "small": "A deeper decoder, after those.",
}
"""Recipes with stages of their own, and what they do."""
_EVERY = 10.0
"""Seconds between progress lines where nobody watches a terminal."""


class _Line:
    """One line that renews itself on a terminal; now and then a new one elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._last = 0.0
        self._open = False

    def __call__(self, words: str) -> None:
        progress = words.startswith("step ")
        if self._terminal and progress:
            click.echo(f"\r\x1b[K{words}", nl=False, err=True)
            self._open = True
            return
        if progress and time.monotonic() - self._last < _EVERY:
            return
        self._last = time.monotonic() if progress else self._last
        click.echo(("\n" if self._open else "") + words, err=True)
        self._open = False


@click.command()
@click.argument("recipe", required=False)
@click.option("--data", metavar="PATH", help="Folder of images or WebDataset shards; the setting data.source.")
@click.option("--out", metavar="FOLDER", help="Where the run lives: checkpoints, samples, metrics, result.")
@click.option("--set", "settings", multiple=True, metavar="NAME=VALUE", help="Change one setting; repeatable.")
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint in --out.")
@click.option("--export", "export_only", is_flag=True, help="Only write the newest checkpoint's weights as a result.")
@click.option("--list", "list_recipes", is_flag=True, help="List the recipes.")
@click.option("--show", is_flag=True, help="Show every setting of the recipe, its value and its meaning.")
@click.option("--memory", is_flag=True, help="Estimate the memory the recipe needs per GPU, from its network.")
@space_option
def train(
    recipe: str | None,
    data: str | None,
    out: str | None,
    settings: tuple[str, ...],
    space: str | None,
    **flags: bool,
) -> None:
    """Train RECIPE (a name from --list, or my_recipe.py:function).

    Start it with torchrun for several GPUs or hosts: torchrun --nproc-per-node 8 -m pidecode train ...
    """
    if flags["list_recipes"]:
        _list()
        return
    if recipe is None:
        raise SettingError("Name a recipe; `pidecode train --list` shows them.")
    if recipe in OWN_WEIGHTS:
        _own_weights(recipe, data, out, settings)
        return
    chosen = _chosen(recipe, space, data, settings)
    if flags["show"]:
        _show(chosen)
        return
    if flags["memory"]:
        from pidecode.training.memory import memory_table

        click.echo(memory_table(chosen))
        return
    if out is None:
        raise SettingError("Say where the run is to live: --out runs/my-decoder.")
    if flags["export_only"]:
        from pidecode.training.trainer import export_newest

        click.echo(export_newest(chosen, out))
        return
    from pidecode.training.trainer import train as run

    click.echo(run(chosen, out, resume=flags["resume"], say=_Line()))


def _chosen(name: str, space: str | None, data: str | None, settings: tuple[str, ...]) -> Recipe:
    from pidecode.training.overrides import apply_settings
    from pidecode.training.recipes import get_recipe

    given = [f"data.source={data!r}"] if data is not None else []
    return apply_settings(get_recipe(name, space), [*given, *settings])


def _own_weights(name: str, data: str | None, out: str | None, settings: tuple[str, ...]) -> None:
    """This project's own weights have stages of their own; the same command runs or resumes them."""
    given = dict(text.partition("=")[::2] for text in settings)
    if data is None or out is None or "teacher" not in given or not set(given) <= {"teacher", "start", "device"}:
        raise SettingError(
            f"The recipe {name} takes --data, --out, --set teacher=FOLDER (the two taef2 files); to go on from "
            "released weights, --set start=tiny.safetensors (its encoder beside it); and, for a GPU, --set device=cuda."
        )
    from pidecode.devices import pick_device
    from pidecode.training.tiny.run import TinyRun, train_small, train_tiny

    start = Path(given["start"]) if "start" in given else None
    device = str(pick_device(given.get("device", "cpu")))
    run = TinyRun(data=Path(data), teacher=Path(given["teacher"]), folder=Path(out), start=start, device=device)
    train_own = train_tiny if name == "tiny" else train_small
    for path in train_own(run, _Line()):
        click.echo(path)


def _list() -> None:
    from pidecode.training.recipes import RECIPES, summary

    rows = [{"recipe": name, "what it does": summary(maker)} for name, maker in RECIPES.items()]
    rows += [{"recipe": name, "what it does": words} for name, words in OWN_WEIGHTS.items()]
    click.echo(table(rows))


def _show(recipe: Recipe) -> None:
    from pidecode.training.overrides import describe

    for name, value, words in describe(recipe):
        click.echo(f"{name} = {value!r}")
        click.echo(f"    {words}")
