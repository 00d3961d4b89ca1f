# SPDX-License-Identifier: Apache-2.0
"""Python keywords, CLI flags, the HTTP schema, batch manifests and ComfyUI inputs offer the same decode options."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from pidecode import PixelDecoder
from pidecode.batch.jobs import MANIFEST_OPTIONS
from pidecode.cli.app import cli
from pidecode.images import DecodeOutput
from pidecode.options import Command, SaveOptions, option_infos

DOUBLES = Path(__file__).resolve().parents[1] / "doubles" / "comfyui"
COMMANDS: tuple[Command, ...] = ("decode", "upscale")


def flags(name: str) -> dict[str, click.Parameter]:
    """Options of a command by the name of their parameter."""
    assert isinstance(cli, click.Group)
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    return {str(parameter.name): parameter for parameter in command.params}


@pytest.fixture
def comfyui(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of the ComfyUI nodes, on doubles of ComfyUI's own modules."""
    monkeypatch.syspath_prepend(str(DOUBLES))
    before = set(sys.modules)
    # The package keeps a name of the module after it left sys.modules, so it is imported by its path.
    comfyui = importlib.import_module("pidecode.integrations.comfyui")

    yield comfyui
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("comfy", "comfy_api") or name == "pidecode.integrations.comfyui":
            del sys.modules[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_python_keywords(command: Command) -> None:
    signature = inspect.signature(getattr(PixelDecoder, command)).parameters.values()
    keywords = [parameter for parameter in signature if parameter.kind is inspect.Parameter.KEYWORD_ONLY]
    own = [
        parameter.name for parameter in keywords if parameter.name not in ("options", "callback", "progress_callback")
    ]
    assert own == list(option_infos(command=command))
    assert all(parameter.default is None for parameter in keywords)


@pytest.mark.parametrize("command", COMMANDS)
def test_flags(command: Command) -> None:
    offered = option_infos(command=command, interface="cli")
    found = flags(command)
    assert set(found) & set(option_infos()) == set(offered)
    for name, info in offered.items():
        parameter = found[name]
        assert isinstance(parameter, click.Option)
        assert parameter.opts == [f"--{name.replace('_', '-')}"]
        assert parameter.help == info.help
        if info.choices:
            assert isinstance(parameter.type, click.Choice)
            assert tuple(parameter.type.choices) == info.choices
        elif info.type in (int, float):
            assert isinstance(parameter.type, click.IntRange | click.FloatRange)
            assert (parameter.type.min, parameter.type.max) == (info.minimum, info.maximum)


def test_flags_and_manifests_of_batch() -> None:
    assert set(flags("batch")) & set(option_infos()) == set(option_infos(interface="cli"))
    assert set(MANIFEST_OPTIONS) == set(option_infos(interface="batch"))


def test_flags_of_generate() -> None:
    offered = set(flags("generate")) & set(option_infos(interface="cli"))
    # The seeds and the size are those of the whole run, the prompts are arguments.
    assert offered | {"seed", "prompt"} == set(option_infos(command="decode", interface="cli"))


@pytest.mark.parametrize("command", ["decode", "upscale", "batch"])
def test_how_files_are_written(command: str) -> None:
    pytest.importorskip("fastapi")
    from pidecode.serve.schemas import ResultParams

    fields = ResultParams.model_json_schema()["properties"]
    for name, info in option_infos(SaveOptions).items():
        parameter = flags(command)[name]
        assert isinstance(parameter, click.Option)
        assert parameter.help == info.help == fields[name]["description"]
    assert tuple(fields["format"]["enum"]) == option_infos(SaveOptions)["format"].choices
    assert "quality" in inspect.signature(DecodeOutput.save).parameters


@pytest.mark.parametrize("command", COMMANDS)
def test_http_schema(command: Command) -> None:
    pytest.importorskip("fastapi")
    from pidecode.serve.schemas import DecodeParams, UpscaleParams

    properties = (DecodeParams if command == "decode" else UpscaleParams).model_json_schema()["properties"]
    offered = set(option_infos(command=command, interface="http"))
    # A form has no pairs: the size is two fields.
    sides = {"width", "height"} if "size" in offered else set()
    assert set(properties) & (set(option_infos()) | {"width", "height"}) == (offered - {"size"}) | sides


@pytest.mark.parametrize("command", COMMANDS)
def test_comfyui_inputs(comfyui: Any, command: Command) -> None:
    node = comfyui.DecodeNode if command == "decode" else comfyui.UpscaleNode
    inputs = {entry.id for entry in node.define_schema().inputs}
    assert inputs & set(option_infos()) == set(option_infos(command=command, interface="comfyui"))
