# SPDX-License-Identifier: Apache-2.0
"""The command tree: which command lives where, and how an error becomes a message and an exit code."""

from __future__ import annotations

import errno
import gc
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import click

from pidecode.errors import OUT_OF_MEMORY, DoesNotFitError, FileError, PidecodeError, is_out_of_memory
from pidecode.units import printable
from pidecode.version import __version__

UNEXPECTED = 70
INTERRUPTED = 130
_DEBUG = "pidecode.debug"
_OWN_FILES = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class Place(NamedTuple):
    """Where a command lives, its line in the list of commands, and examples for its help."""

    module: str
    line: str
    examples: tuple[str, ...] = ()


# The module of each holds a click command of the command's name.
COMMANDS: dict[str, Place] = {
    "upscale": Place("pidecode.cli.decode", "Enlarge images: encode each to a latent, decode it larger.", (
        "pidecode upscale photo.jpg", "pidecode upscale a.png b.png -o large/ --scale 2 --format webp --quality 90")),
    "decode": Place("pidecode.cli.decode", "Turn saved latents into images.", (
        "pidecode decode latent.safetensors -o image.png",
        "pidecode decode latents/*.safetensors -m flux2/2k --num-steps 4 -o images/")),
    "batch": Place("pidecode.cli.batch", "Decode or enlarge whole folders, and go on where it was stopped.", (
        "pidecode batch photos/ large/", "pidecode batch 'latents/**/*.safetensors' images/ --format webp")),
    "generate": Place("pidecode.cli.generate", "Draw images from prompts with a diffusers pipeline and decode them.", (
        'pidecode generate "a lighthouse in fog" --space flux2-klein-4b',
        "pidecode generate --prompts prompts.txt --space flux --stop-after recommended -o images/")),
    "web": Place("pidecode.cli.serve", "Open a page for decoding by hand, on this machine alone.", (
        "pidecode web", "pidecode web -m tiny -m flux2/2k --no-browser")),
    "serve": Place("pidecode.cli.serve", "Offer decoding over HTTP, for scripts and other programs.", (
        "pidecode serve", "pidecode serve --host 0.0.0.0 --token-file token.txt --max-pixels 8000000")),
    "models": Place("pidecode.cli.weights", "List the models there are, and which are on this disk.", (
        "pidecode models", "pidecode models --on-disk --json")),
    "pull": Place("pidecode.cli.weights", "Download a model with everything it needs.", (
        "pidecode pull flux --variant 2k", "pidecode pull sdxl --no-text --accept-license")),
    "captions": Place("pidecode.cli.weights", "Prompts' text states as files, for machines without the text encoder.", (
        "pidecode captions export 'a lighthouse in fog' -o fog.safetensors",
        "pidecode captions import fog.safetensors")),
    "convert": Place("pidecode.cli.weights", "Write weights as one self-describing .safetensors file.", (
        "pidecode convert model.pth model.safetensors --space flux",
        "pidecode convert model.safetensors small.safetensors --dtype bf16")),
    "info": Place("pidecode.cli.weights", "Say what an image, a latent or a weights file is.", (
        "pidecode info image.png", "pidecode info latent.safetensors --json")),
    "train": Place("pidecode.cli.train", "Train a decoder of your own: teacher, student, adapters.", (
        "pidecode train photographs --data photos/ --out runs/mine", "pidecode train student_lora --show")),
    "plan": Place("pidecode.cli.doctor", "Say what a size needs, and how it would be run, before anything runs.", (
        "pidecode plan --size 4096x3072 --vram 12GB", "pidecode plan --size 4096x4096 --network tiny")),
    "doctor": Place("pidecode.cli.doctor", "Say what will work on this machine, and why the rest will not.", (
        "pidecode doctor", "pidecode doctor --space flux2")),
}  # fmt: skip


def debug_option() -> click.Option:
    """The option --debug, which shows tracebacks."""

    def set_debug(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
        ctx.meta[_DEBUG] = value or ctx.meta.get(_DEBUG, False)

    return click.Option(
        ["--debug"], is_flag=True, expose_value=False, callback=set_debug, help="Show the full traceback of an error."
    )


class Commands(click.Group):
    """A group that imports a command's module only when the command is called."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """All names, in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command itself, its module loaded; None for a name that is not in the table."""
        from pidecode.cli.common import GroupedCommand

        place = COMMANDS.get(cmd_name)
        if place is None:
            return None
        command: click.Command = getattr(import_module(place.module), cmd_name)
        command.short_help = place.line
        if isinstance(command, GroupedCommand):
            command.examples = place.examples
        else:
            command.epilog = "\n".join(["\b", "Examples:", *(f"  {line}" for line in place.examples)])
        if not any(parameter.name == "debug" for parameter in command.params):
            command.params.append(debug_option())
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands from the table alone, so that --help imports none of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, place.line) for name, place in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; every failure ends as one message and the exit code of its class."""
        try:
            with warnings.catch_warnings():
                warnings.showwarning = _warning_shower(ctx)
                return super().invoke(ctx)
        except click.ClickException as error:
            error.message = printable(error.message)  # type: ignore[misc]
            raise
        except click.exceptions.Exit:
            raise
        except (KeyboardInterrupt, click.Abort):
            click.echo("Stopped.", err=True)
            ctx.exit(INTERRUPTED)
        except BrokenPipeError:
            _silence_output()  # whoever read it has enough
            ctx.exit(0)
        except Exception as error:
            message, code = _in_words(error)
            if ctx.meta.get(_DEBUG):
                click.echo(printable(traceback.format_exc()), err=True, nl=False)
            elif code == UNEXPECTED:
                message += "\nRun the command again with --debug for the details."
            click.echo(printable(message), err=True)
            ctx.exit(code)


def _in_words(error: Exception) -> tuple[str, int]:
    """What is said of an error, and the exit code."""
    if isinstance(error, PidecodeError):
        return f"Error: {error.message('cli')}", error.exit_code
    if is_out_of_memory(error):
        return f"Error: {OUT_OF_MEMORY}", DoesNotFitError.exit_code
    if isinstance(error, OSError) and error.filename is None:  # standard output and `getcwd` name none
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
            _silence_output()
            full = f"Error: The output could not be written: {error.strerror}. Send it to another place."
            return full, PidecodeError.exit_code
        if isinstance(error, FileNotFoundError):
            gone = "Error: The current folder does not exist any more; go to another one."
            return gone, FileError.exit_code
    what = f"{type(error).__name__}: {error}".removesuffix(": ")
    return f"Sorry, that is a fault of pidecode or of something below it: {what}", UNEXPECTED


def _warning_shower(ctx: click.Context) -> Callable[..., None]:
    """Show our own warnings as sentences; those of other packages only to who asked for --debug."""
    from pidecode.cli.common import echo, in_flags

    def show(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        if ctx.meta.get(_DEBUG):
            click.echo(printable(warnings.formatwarning(message, category, filename, lineno)), err=True, nl=False)
        elif category.__module__.startswith("pidecode.") or filename.startswith(_OWN_FILES):
            running = click.get_current_context(silent=True) or ctx
            echo(f"Warning: {in_flags(str(message), running.command)}", err=True)

    return show


_QUIET = {
    "TRANSFORMERS_VERBOSITY": "error", "DIFFUSERS_VERBOSITY": "error", "HF_HUB_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1", "TOKENIZERS_PARALLELISM": "false",
    "TORCH_CPP_LOG_LEVEL": "ERROR", "TF_CPP_MIN_LOG_LEVEL": "3",
}  # fmt: skip
"""Variables by which other libraries keep notices from a user's terminal; --debug shows them."""


def _silence_output() -> None:
    """Keep Python from failing again when it flushes standard output at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", package_name="pidecode", prog_name="pidecode")
def cli() -> None:
    """From a diffusion model's latent straight to an image four times the size."""


cli.params.append(debug_option())


def _open_standard_streams() -> None:
    """Point standard streams that the caller closed to the null device.

    Else the first file opened would take their number, and what a library prints would be written into it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - open as long as the process


def main() -> None:
    """Entry point of `pidecode` and of `python -m pidecode`."""
    _open_standard_streams()
    # OpenMP reads this when torch loads. Threads that spin while they wait take the time of those that work wherever
    # another program keeps a core busy: many times the seconds, against a few hundredths on a quiet machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    if "--debug" not in sys.argv:
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        handler = logging.StreamHandler()  # only for what this package logs; libraries' notices reach nobody
        handler.setLevel(logging.WARNING)
        handler.addFilter(logging.Filter("pidecode"))
        logging.lastResort = handler
    # Loading torch makes half a million objects that stay to the end. Collecting among them in vain, meanwhile and at
    # exit, takes a third of the time that loading and leaving torch takes. `GroupedCommand` turns it on again.
    gc.disable()
    try:
        cli(prog_name="pidecode")
    except OSError as error:  # while a command's arguments were read: --help
        message, code = _in_words(error)
        click.echo(printable(message), err=True)
        sys.exit(code)
    except KeyboardInterrupt:  # before a command had begun
        sys.exit(INTERRUPTED)
