# SPDX-License-Identifier: Apache-2.0
"""The command tree: every way a command can end becomes one message and one exit code."""

from __future__ import annotations

import ast
import inspect
import os
import pickle
import re
import subprocess
import sys
import warnings
from importlib import import_module
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

import pidecode
from pidecode import errors
from pidecode.cli.app import COMMANDS, Place, cli
from pidecode.cli.common import in_flags
from pidecode.cli.decode import upscale
from pidecode.errors import SettingError, naming

OURS = [
    name
    for name, value in inspect.getmembers(errors, inspect.isclass)
    if issubclass(value, errors.PidecodeError) and value.__module__ == errors.__name__
]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    """Run the real command tree with one more command, `probe`, in its table."""
    monkeypatch.setitem(COMMANDS, "probe", Place("probe_commands", "End in a given way."))

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(cli, list(arguments))

    return invoke


def test_a_command_that_ends_well(run) -> None:
    result = run("probe", "well")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "done\n", "")


@pytest.mark.parametrize("name", OURS)
def test_an_error_of_ours_is_one_line_and_its_own_code(run, name: str) -> None:
    result = run("probe", name)
    assert result.exit_code == getattr(errors, name).exit_code
    assert result.stderr == f"Error: what came of {name}\n"
    assert result.stdout == ""


@pytest.mark.parametrize("where", ["before", "after"])
def test_debug_shows_the_traceback_wherever_it_stands(run, where: str) -> None:
    arguments = ["--debug", "probe", "FileError"] if where == "before" else ["probe", "FileError", "--debug"]
    result = run(*arguments)
    assert result.exit_code == 4
    assert "Traceback (most recent call last)" in result.stderr
    assert result.stderr.endswith("Error: what came of FileError\n")


def test_the_unexpected_is_an_apology_with_a_hint(run) -> None:
    result = run("probe", "unexpected")
    assert result.exit_code == 70
    assert result.stderr == (
        "Sorry, that is a fault of pidecode or of something below it: ZeroDivisionError: something else\n"
        "Run the command again with --debug for the details.\n"
    )
    assert "Traceback" in run("--debug", "probe", "unexpected").stderr


def test_an_interrupt_is_130(run) -> None:
    result = run("probe", "interrupt")
    assert (result.exit_code, result.stderr) == (130, "Stopped.\n")


def test_too_little_memory_is_said_plainly(run) -> None:
    result = run("probe", "memory")
    assert result.exit_code == errors.DoesNotFitError.exit_code
    assert "not enough memory" in result.stderr


def test_wrong_use_is_2(run) -> None:
    assert run("probe", "usage").exit_code == 2
    assert run("probe").exit_code == 2
    nothing = run("upscael")
    assert nothing.exit_code == 2
    assert "No such command 'upscael'" in nothing.stderr


def test_warnings_of_ours_are_sentences_and_others_wait_for_debug(run) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert run("probe", "warning").stderr == "Warning: mind the gap\n"
        assert run("probe", "foreign-warning").stderr == ""
        assert "deprecated elsewhere" in run("--debug", "probe", "foreign-warning").stderr


@pytest.mark.parametrize("name", list(COMMANDS))
def test_every_command_is_where_the_table_says(name: str) -> None:
    command = cli.get_command(click.Context(cli), name)
    assert command is not None
    assert command.name == name
    assert command.help
    assert sum("--debug" in parameter.opts for parameter in command.params) == 1
    assert import_module(COMMANDS[name].module).__doc__


def test_help_lists_every_command() -> None:
    shown = " ".join(CliRunner().invoke(cli, ["--help"]).stdout.split())  # however the lines were broken
    for name, place in COMMANDS.items():
        assert f" {name} {place.line}" in shown


def test_notices_of_other_libraries_stay_away_from_the_terminal() -> None:
    code = (
        "import logging, os, sys; sys.argv = ['pidecode', *sys.argv[1:], '--version']\n"
        "from pidecode.cli.app import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "logging.getLogger('some.library').warning('a notice')\n"
        "logging.getLogger('pidecode.serve').warning('our own')\n"
        "print(os.environ.get('TRANSFORMERS_VERBOSITY'), os.environ.get('OMP_WAIT_POLICY'))"
    )
    own = ("TRANSFORMERS_VERBOSITY", "OMP_WAIT_POLICY")
    env = {name: value for name, value in os.environ.items() if name not in own}

    def run(*arguments: str) -> tuple[str, str]:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
        return done.stdout.splitlines()[-1], done.stderr

    assert run() == ("error passive", "our own\n")
    assert run("--debug") == ("None passive", "a notice\nour own\n")


@pytest.mark.skipif(os.name == "nt", reason="Windows keeps the current folder of a process")
def test_a_current_folder_that_was_removed(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, image = tmp_path / "gone", tmp_path / "a.png"
    image.write_bytes(b"")
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    result = CliRunner().invoke(cli, ["batch", str(image), "relative"])
    assert result.exit_code == 4
    assert result.stderr == "Error: The current folder does not exist any more; go to another one.\n"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Choose one: space='flux2'.", "Choose one: --space flux2."),
        ("Allow so many: max_pixels=99856.", "Allow so many: --max-pixels 99856."),
        ("Decode in float32 (dtype=torch.float32); or", "Decode in float32 (--dtype float32); or"),
        ("allow it with overwrite=True.", "allow it with --overwrite."),
        ("size=(2048, None) fits, encoder= too", "--size 2048x fits, --encoder too"),
        ("color_fix is 'x'.", "--color-fix is 'x'."),
        ('an entry "num_steps"; color_fix.png; a/space=b; stop_after=3', None),  # a name, files, another command's
    ],
)
def test_keywords_are_said_as_options_of_the_command(message: str, shown: str | None) -> None:
    assert in_flags(message, upscale) == (shown or message)


def test_each_surface_names_its_own_fix() -> None:
    def fail() -> None:
        with naming("a.png"):
            raise SettingError("No.", python="Pass encoder=.", cli="Add encoder= to it.", http="Start it anew.")

    with pytest.raises(SettingError) as caught:
        fail()
    copied = pickle.loads(pickle.dumps(caught.value))
    assert [copied.message(name) for name in ("python", "cli", "http")] == [
        "a.png: No. Pass encoder=.", "a.png: No. Add encoder= to it.", "a.png: No. Start it anew.",
    ]  # fmt: skip
    assert str(copied) == "a.png: No. Pass encoder=."
    assert in_flags(copied.message("cli"), upscale) == "a.png: No. Add --encoder to it."


def test_messages_leave_the_words_of_other_surfaces_out() -> None:
    """A message that a user of Python meets names no flag, except in a whole command or of another program."""
    for path in sorted(Path(pidecode.__file__).parent.rglob("*.py")):
        if path.parent.name in ("cli", "serve"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
                parts = [part.value for part in ast.walk(node.exc.args[0]) if isinstance(part, ast.Constant)]
                text = re.sub("`[^`]*`", "", "".join(map(str, parts)))
                assert not re.search(r"\(--|on the command line|in Python", text), f"{path}: {text}"
