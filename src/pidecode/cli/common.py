# SPDX-License-Identifier: Apache-2.0
"""Options and output formatting that several commands share."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pidecode.engine.machine import QUANTIZATIONS, Machine, Quantization, this_machine
from pidecode.engine.plan import SCHEMES, Plan, Scheme, plan_decode
from pidecode.errors import FileError, SettingError
from pidecode.options import Command, DecodeOptions, OptionInfo, option_infos
from pidecode.registry.spaces import ALIASES, SPACES
from pidecode.units import (
    DTYPES,
    LARGEST_PIXELS,
    MAX_PIXELS,
    decode_text,
    parse_bytes,
    parse_dtype,
    parse_size,
    printable,
)

if TYPE_CHECKING:
    import torch

    from pidecode.engine.feed_forward import FeedForwardPlan
    from pidecode.weights.metadata import CheckpointMetadata


class DtypeParam(click.ParamType):  # type: ignore[type-arg]
    """A number format by torch's name or its short one."""

    name = "dtype"

    def convert(self, value: str, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Torch's name."""
        try:
            return parse_dtype(value)
        except SettingError as error:
            self.fail(str(error), param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """The choices, for the help."""
        return f"[{'|'.join(DTYPES)}]"


F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Check:
    """A capability of this machine."""

    name: str  # what may work
    ok: bool  # whether it works
    reason: str  # why it works, or what is missing and how to fix it


def json_option(command: F) -> F:
    """Add --json (passed on as `as_json`)."""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")(command)


def overwrite_option(command: F) -> F:
    """Add --overwrite."""
    return click.option("--overwrite", is_flag=True, help="Replace files that exist.")(command)


def space_option(command: F) -> F:
    """Add --space, which takes a latent space or the name of an image model that uses one."""
    choice = click.Choice([*SPACES, *ALIASES])
    text = "Latent space, or an image model that uses it. Needed if the weights do not name it."
    return click.option("--space", type=choice, metavar="NAME", help=text)(command)


def threads_option(command: F) -> F:
    """Add --threads, which is applied before the command runs and not passed on to it."""
    text = "CPU threads; if not given, chosen from cores and limits (`pidecode doctor`)."
    return click.option("--threads", type=click.IntRange(min=1), expose_value=False, callback=_set_threads, help=text)(
        command
    )


def _set_threads(_ctx: click.Context, _option: click.Parameter, wanted: int | None) -> None:
    """Set torch's number of threads to the one given, or to a suitable one."""
    import torch

    from pidecode.devices import recommended_threads

    present = torch.get_num_threads()
    count = wanted or recommended_threads(present).count
    if count != present:
        torch.set_num_threads(count)


def emit(data: Any, text: str | Callable[[], str], *, as_json: bool) -> None:
    """Print `data` as JSON, or `text`."""
    if as_json:
        echo(json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False, default=str), json_escapes=True)
        return
    echo(text() if callable(text) else text)


def echo(text: str, *, err: bool = False, nl: bool = True, json_escapes: bool = False) -> None:
    """Print text that may hold names or metadata from outside; every command prints through this."""
    click.echo(printable(text, json_escapes=json_escapes), err=err, nl=nl)


def _finite(data: Any) -> Any:
    """Data as JSON has them: null for NaN and infinity."""
    if isinstance(data, float):
        return data if math.isfinite(data) else None
    if isinstance(data, Mapping):
        return {str(name): _finite(value) for name, value in data.items()}
    return [_finite(value) for value in data] if isinstance(data, (list, tuple)) else data


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Format rows with equal keys as a table with a header."""
    if not rows:
        return "(none)"
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    lines = [{key: key for key in widths}, *rows]
    return "\n".join("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip() for row in lines)


def progress(total: int, label: str, unit: str = "step") -> Any:
    """A progress bar on standard error, drawn only on a terminal; bytes ("B") in kB, MB, GB."""
    from tqdm import tqdm

    return tqdm(
        total=total, desc=printable(label), unit=unit, unit_scale=unit == "B", file=sys.stderr, disable=None,
        leave=False, dynamic_ncols=True,
    )  # fmt: skip


BatchShape = tuple[int, int, int]  # width and height of an image in pixels, and how many are decoded at once


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


def model_options(command: F) -> F:
    """Add --model, --space, --variant, --device, --dtype and --compile, which select and load a decoder."""
    options = (
        click.option("-m", "--model", default="tiny", show_default=True, help="A model's name, file or folder."),
        space_option,
        click.option("--variant", metavar="NAME", help="Variant of a model that has several: 2k, 2kto4k, ..."),
        device_option,
        dtype_option,
        click.option("--compile", is_flag=True, help="Compile elementwise ops at the first image (experimental)."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def text_encoder_option(command: F) -> F:
    """Add --text-encoder."""
    text = "Gemma-2, a folder or a single file as ComfyUI has it, if it is not where `pull` puts it."
    return click.option("--text-encoder", type=click.Path(path_type=Path), metavar="PATH", help=text)(command)


def prompt_lines(file: Path) -> list[str]:
    """The prompts of a file: one a line, without empty lines and those that begin with #.

    Raises:
        FileError: The file cannot be read as text.
    """
    try:
        lines = decode_text(file.read_bytes(), file).splitlines()
    except OSError as fault:
        raise FileError(f"{file} cannot be read as text: {fault}.") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def device_option(command: F) -> F:
    """Add --device."""
    text = "cpu, cuda, cuda:1, mps; chosen automatically if not given."
    return click.option("--device", metavar="NAME", help=text)(command)


def dtype_option(command: F) -> F:
    """Add --dtype, which takes torch's names."""
    text = "Number format; chosen for the device if not given."
    return click.option("--dtype", type=DtypeParam(), help=text)(command)


def bits_option(command: F) -> F:
    """Add --bits."""
    text = "Bits per channel; 16 for .png files only."
    return click.option("--bits", type=click.Choice(["8", "16"]), default="8", show_default=True, help=text)(command)


def source_options(command: F) -> F:
    """Add --strip, --keep-profile and --max-pixels, which say how image files are read."""
    options = (
        click.option(
            "--strip",
            is_flag=True,
            help="Leave out what the source carries (EXIF, XMP, texts such as a prompt or workflow, resolution).",
        ),
        click.option(
            "--keep-profile",
            is_flag=True,
            help="Keep the source's colors and its ICC profile instead of converting to sRGB.",
        ),
        click.option(
            "--max-pixels",
            type=click.IntRange(1, LARGEST_PIXELS),
            default=MAX_PIXELS,
            show_default=True,
            help="Largest source read, in pixels.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def decode_options(*commands: Command, exclude: Collection[str] = ()) -> Callable[[F], F]:
    """Add a flag for every decode option of the commands, except those that are taken in another way."""

    def add(command: F) -> F:
        for name, info in reversed(option_infos(interface="cli").items()):
            if name not in exclude and set(commands) & set(info.commands):
                command = _decode_option(name, info)(command)
        return command

    return add


def _decode_option(name: str, info: OptionInfo) -> Callable[[F], F]:
    flag = f"--{name.replace('_', '-')}"
    kind: Any = click.STRING
    if info.type is tuple:
        return click.option(flag, metavar="WIDTHxHEIGHT", callback=_size_from_text, help=info.help)
    if info.choices:
        kind = click.Choice(info.choices)
    elif info.type is int:
        low, high = (None if bound is None else int(bound) for bound in (info.minimum, info.maximum))
        kind = click.IntRange(low, high)
    elif info.type is PathLike:
        kind = click.Path(path_type=Path)
    elif info.type is float:
        kind = click.FloatRange(info.minimum, info.maximum)
    return click.option(flag, type=kind, help=info.help)


def _size_from_text(_ctx: click.Context, _option: click.Parameter, text: str | None) -> tuple[int, int] | None:
    return None if text is None else parse_size(text)


def take_decode_options(given: dict[str, Any], *, exclude: Collection[str] = ()) -> DecodeOptions:
    """Remove the values of the flags that `decode_options` added from a command's parameters, as `DecodeOptions`."""
    names = [name for name in option_infos(interface="cli") if name in given and name not in exclude]
    return DecodeOptions(**{name: given.pop(name) for name in names})


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The number format with this name."""
    import torch

    return None if name is None else getattr(torch, name)


def memory_option(command: F) -> F:
    """Add --memory."""
    text = "Plan the decode to need at most this much of the device's memory: 4GB. See `pidecode plan`."
    return click.option("--memory", metavar="BYTES", help=text)(command)


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryOptions:
    """Memory limit and quantization asked for; with none given no memory plan is made."""

    memory: str | None = None
    quantization: Quantization | None = None
    scheme: Scheme | None = None

    @property
    def asked(self) -> bool:
        """Whether a plan is to be made."""
        return (self.memory, self.quantization, self.scheme) != (None, None, None)

    def plan(
        self, config: Any, sizes: Sequence[BatchShape], device: str | None, dtype: str | None
    ) -> Plan | FeedForwardPlan:
        """Plan the decode of the largest of some images on a device; device and number format may be None, to choose.

        Raises:
            DoesNotFitError: No plan fits the memory.
            SettingError: The device does not support what was asked for.
        """
        machine: Machine = this_machine(device)
        if self.memory is not None:
            machine = replace(machine, memory=min(machine.memory, parse_bytes(self.memory)))
        width, height, batch = max(sizes, key=math.prod)
        return plan_decode(
            config, (width, height), machine, batch=batch, dtype=dtype, quantization=self.quantization,
            scheme=self.scheme,
        )  # fmt: skip


def upscaled_sizes(
    images: Sequence[Any], metadata: CheckpointMetadata, max_pixels: int = MAX_PIXELS
) -> list[BatchShape]:
    """Sizes to which these images are upscaled, before padding is cut off."""
    from pidecode.images import image_size
    from pidecode.registry.spaces import get_space

    assert metadata.config is not None
    assert metadata.space is not None
    scale, space = metadata.config.scale, get_space(metadata.space)
    if space.fixed_input is not None:
        return [(space.fixed_input * scale, space.fixed_input * scale, 1)]
    step = space.input_multiple
    sizes = (image_size(image, max_pixels=max_pixels) for image in images)
    return [(-(-width // step) * step * scale, -(-height // step) * step * scale, 1) for width, height in sizes]


def decoded_sizes(latents: Sequence[Any], space: str | None, size: tuple[int, int] | None) -> list[BatchShape]:
    """Sizes to which these latents are decoded."""
    from pidecode.latents.latent import Latent

    read = [Latent.load(source, space=space) for source in latents]
    return [(*(size or (latent.output_size[1], latent.output_size[0])), len(latent)) for latent in read]
