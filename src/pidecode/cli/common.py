# SPDX-License-Identifier: Apache-2.0
"""Options and output formatting that several commands share."""

from __future__ import annotations

import gc
import glob
import json
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import click
from click.shell_completion import CompletionItem

from pidecode import units
from pidecode.engine.machine import QUANTIZATIONS
from pidecode.engine.plan import SCHEMES
from pidecode.errors import DoesNotFitError, FileError, LatentError, PidecodeError, SizeError
from pidecode.options import ATTENTIONS, Command, DecodeOptions, OptionInfo, RuntimeOptions, SaveOptions, option_infos
from pidecode.registry.checkpoints import CHECKPOINTS
from pidecode.registry.spaces import ALIASES, SPACES

if TYPE_CHECKING:
    import torch

    from pidecode.decoder import PixelDecoder
    from pidecode.sampling import Progress


_GROUPS: dict[str, tuple[str, ...]] = {
    "Result": (
        "out", "keep_suffix", "format", "quality", "bits", "size", "scale", "overwrite", "strip", "keep_profile",
        "max_pixels", "save_latents", "compare",
    ),
    "Model": (
        "model", "decoder", "space", "variant", "encoder", "lora", "lora_scale", "source", "pipeline",
        "pipeline_source", "network",
    ),
    "Machine": (
        "device", "dtype", "memory", "quantization", "scheme", "compile", "threads", "engine", "workers",
        "ray_address", "vram", "ram",
    ),
    "Other options": ("as_json", "debug", "help"),
}  # fmt: skip
MAX_INPUT = 1 << 30  # bytes of standard input that are read
_FEW_OPTIONS = 9  # so many are not divided into groups


_AS_ARGUMENT = "Files are named without an option: pidecode COMMAND FILE."
_OF_OTHERS = {
    "-i": _AS_ARGUMENT, "--input": _AS_ARGUMENT,
    "--output": "It is --out here.", "-s": "It is --scale here.", "--outscale": "It is --scale here.",
    "-n": "It is --model here.", "--model-name": "It is --model here.", "-f": "It is --format here.",
    "-g": "It is --device here, such as cuda:0.", "--gpu-id": "It is --device here, such as cuda:0.",
    "-t": "Pieces are chosen to fit the memory; --memory 4GB sets a limit.",
    "--tile": "Pieces are chosen to fit the memory; --memory 4GB sets a limit.",
    "--fp32": "It is --dtype float32 here.", "--half": "It is --dtype float16 here.",
}  # fmt: skip
"""What is said to options of other upscalers, where the command has the option that is named."""


class GroupedCommand(click.Command):
    """A command whose help shows its options in groups, and examples."""

    examples: tuple[str, ...] = ()  # whole command lines

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse the options; those that other upscalers have are answered with ours."""
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            hint = _OF_OTHERS.get(error.option_name, "")
            ours = {flag for parameter in self.params for flag in parameter.opts}
            if hint and all(word in ours for word in hint.split() if word.startswith("--")):
                raise click.NoSuchOption(error.option_name, f"{error.message} {hint}", ctx=error.ctx) from None
            raise

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; what an error says of keywords, it says of this command's options."""
        if not gc.isenabled():  # `main` turned it off while torch is loaded
            gc.freeze()
            gc.enable()
        try:
            return super().invoke(ctx)
        except PidecodeError as error:
            error.args, error.fixes = (in_flags(error.message("cli"), self),), dict.fromkeys(error.fixes, "")
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options of each group; first those of the command's own subject."""
        groups: dict[str, list[tuple[str, str]]] = {"Options": [], **{title: [] for title in _GROUPS}}
        parameters = [parameter for parameter in self.get_params(ctx) if isinstance(parameter, click.Option)]
        for parameter in parameters:
            record, name = parameter.get_help_record(ctx), "help" if "--help" in parameter.opts else parameter.name
            title = next((title for title, names in _GROUPS.items() if name in names), "Options")
            if record is not None:
                groups[title if len(parameters) > _FEW_OPTIONS else "Options"].append(record)
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the examples."""
        if self.examples:
            with formatter.section("Examples"):
                for line in self.examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")


_KEYWORD = re.compile(
    r"""(?<![\w./=-])(?P<name>[a-z]+(?:_[a-z]+)*)="""
    r"""(?:(?P<quote>['"])(?P<text>[^'"]*)(?P=quote)|\((?P<sides>\w+, \w+)\)|(?P<value>(?:\w[\w.]*)?\w|\.\.\.)?)"""
    r"""|(?<![\w./='"`-])(?P<alone>[a-z]+(?:_[a-z]+)+)(?![\w/='"`-]|\.\w)"""
)


def in_flags(message: str, command: click.Command) -> str:
    """A message in the words of the command line: `--name value` of the command for `name=value` and `two_words`."""
    options = {option.name: option for option in command.params if isinstance(option, click.Option)}

    def flag(found: re.Match[str]) -> str:
        option = options.get(found["name"] or found["alone"])
        if option is None:
            return found[0]
        value = found["text"] or (found["value"] or "").removeprefix("torch.").strip(".")
        if found["sides"]:
            value = found["sides"].replace(", ", "x").replace("None", "")
        return option.opts[-1] if option.is_flag or not value else f"{option.opts[-1]} {value}"

    return _KEYWORD.sub(flag, message)


def complete_models(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What the shell offers for a model: names, and files."""
    names = ["tiny", *SPACES, *ALIASES, *(row.name for row in CHECKPOINTS.values())]
    found = [CompletionItem(name) for name in dict.fromkeys(names) if name.startswith(incomplete)]
    return [*found, *([] if found and incomplete else [CompletionItem(incomplete, type="file")])]


def complete_variants(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """What the shell offers for a variant: those of the model or space that was named before, else all."""
    named = {str(ctx.params.get(name)) for name in ("model", "space")}
    spaces = {ALIASES.get(name, name) for name in named} & set(SPACES)
    rows = [row for row in CHECKPOINTS.values() if row.repository and (not spaces or row.space in spaces)]
    return [name for name in dict.fromkeys(str(row.variant) for row in rows) if name.startswith(incomplete)]


F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Check:
    """A capability of this machine."""

    name: str  # what may work
    ok: bool  # whether it works
    reason: str  # why it works, or what is missing and how to fix it


def combined(*options: Callable[[Any], Any]) -> Callable[[F], F]:
    """One decorator of several, whose options stand in this order in the help."""

    def add(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def parsed_by(parse: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str | None], Any]:
    """The callback of an option whose text `parse` reads."""
    return lambda _ctx, _param, text: None if text is None else parse(text)


PATH = click.Path(path_type=Path)


def expand_patterns(_ctx: click.Context, _param: click.Parameter, paths: tuple[Path, ...]) -> tuple[Path, ...]:
    """Paths, and the files of patterns that the shell left as they are, as on Windows."""
    found: list[Path] = []
    for path in paths:
        pattern = glob.has_magic(os.fspath(path)) and not os.path.lexists(path)
        matches = [Path(name) for name in sorted(glob.glob(os.fspath(path)))] if pattern else []
        found += matches or [path]
    return tuple(found)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace files that exist.")
space_option = click.option(
    "--space", type=click.Choice([*SPACES, *ALIASES]), metavar="NAME",
    help="Latent space, or an image model that uses it. Needed if the weights do not name it.",
)  # fmt: skip
variant_option = click.option(
    "--variant", metavar="NAME", shell_complete=complete_variants,
    help="Variant of a model that has several: 2k, 2kto4k, ...",
)  # fmt: skip
device_option = click.option(
    "--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; chosen automatically if not given."
)
_DTYPE: dict[str, Any] = {"metavar": f"[{'|'.join(units.DTYPES)}]", "callback": parsed_by(units.parse_dtype)}
dtype_option = click.option("--dtype", **_DTYPE, help="Number format; chosen for the device if not given.")
output_dtype_option = click.option("--dtype", **_DTYPE, help="Number format to write; the source's if not given.")
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024),
    help="CPU threads; if not given, chosen from cores and limits (`pidecode doctor`).",
)  # fmt: skip
text_encoder_option = click.option(
    "--text-encoder", type=PATH, metavar="PATH",
    help="Gemma-2, a folder or a single file as ComfyUI has it, if it is not where `pull` puts it.",
)  # fmt: skip
bits_option = click.option(
    "--bits", type=click.Choice(["8", "16"]), default="8", show_default=True,
    help="Bits per channel; 16 for .png files only.",
)  # fmt: skip
prompts_option = click.option(
    "--prompts", "prompt_file", type=PATH, help="File with one prompt per line; # begins a comment."
)
runtime_options = combined(
    click.option("--compile", is_flag=True,
                 help="Fused kernels and CUDA graphs, compiled at the first image (experimental)."),
    click.option("--attention", type=click.Choice(ATTENTIONS), default="auto", show_default=True,
                 help="Kernel; int8 multiplies in eight bits (experimental)."),
)  # fmt: skip
quantization_options = combined(
    click.option("--quantization", type=click.Choice(QUANTIZATIONS),
                 help="Format weights are stored in; chosen to fit if not given."),
    click.option("--scheme", type=click.Choice(SCHEMES),
                 help="How quantized weights are multiplied: dequantized (w8a16, the default), or in eight bits where "
                 "the device can (w8a8, experimental)."),
)  # fmt: skip
model_options = combined(
    click.option("-m", "--model", default="tiny", show_default=True, shell_complete=complete_models,
                 help="A model's name, file or folder."),
    space_option, variant_option, device_option, dtype_option, runtime_options,
)  # fmt: skip
# How image files are read.
source_options = combined(
    click.option("--strip", is_flag=True, help="Leave out what the source carries (EXIF, XMP, texts such as a prompt "
                 "or workflow, resolution)."),
    click.option("--keep-profile", is_flag=True,
                 help="Keep the source's colors and its ICC profile instead of converting to sRGB."),
    click.option("--max-pixels", type=click.IntRange(1, units.LARGEST_PIXELS), default=units.MAX_PIXELS,
                 show_default=True, help="Largest source read, in pixels."),
)  # fmt: skip


def set_threads(wanted: int | None) -> None:
    """Set torch's number of threads to the one given, or to a suitable one."""
    import torch

    from pidecode.devices import recommended_threads

    present = torch.get_num_threads()
    count = wanted or recommended_threads(present).count
    if count != present:
        torch.set_num_threads(count)


def emit(data: Any, text: str, *, as_json: bool) -> None:
    """Print `data` as JSON, or `text`."""
    if as_json:
        text = json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    echo(text, json_escapes=as_json)


def echo(text: str, *, err: bool = False, json_escapes: bool = False) -> None:
    """Print text that may hold names or metadata from outside; every command prints through this."""
    tqdm = sys.modules.get("tqdm")
    with tqdm.tqdm.external_write_mode() if tqdm else nullcontext():  # not into the line of a progress bar
        click.echo(units.printable(text, json_escapes=json_escapes), err=err)


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


_ONE_FILE = (FileError, LatentError, SizeError, DoesNotFitError)  # errors that do not stop the other sources


class SourceFailures(list[dict[str, Any]]):
    """Sources that failed; where there is but one source, its error ends the command."""

    def __init__(self, sources: int) -> None:
        super().__init__()
        self.alone = sources == 1

    @contextmanager
    def kept(self, source: object) -> Iterator[None]:
        """Keep an error of this source, so that the others go on."""
        try:
            yield
        except _ONE_FILE as error:
            if self.alone:
                raise
            message = in_flags(error.message("cli"), click.get_current_context().command)
            self.append({"source": str(source), "error": type(error).__name__, "message": message})
            echo(f"Failed: {message}", err=True)


class WorkBar:
    """A terminal's last line: what is being done, the share of the work done, the time, and the time left.

    It is there at once, before torch is loaded, and a thread draws it twice a second, so that it moves within long
    pieces of work. Nothing is drawn where standard error is no terminal.
    """

    def __init__(self, text: str = "loading") -> None:
        # One process of torchrun draws.
        self.visible = sys.stderr is not None and sys.stderr.isatty() and os.environ.get("RANK", "0") == "0"
        self._name, self._text = "", text
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._redraw, name="progress", daemon=True)
        self.expect([1.0])
        if self.visible:
            from tqdm import tqdm

            self._bar = tqdm(total=1.0, bar_format=_WITHOUT_BAR, file=sys.stderr, leave=False, dynamic_ncols=True)
            self._draw()
            self._thread.start()

    def __enter__(self) -> WorkBar:
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        if self.visible:
            self._thread.join()
            self._bar.close()

    def expect(self, work: Sequence[float], seconds: float | None = None) -> None:
        """Begin to measure: the work of each job in any unit, and the predicted time of all, if it is known."""
        self._shares = [done / (sum(work) or 1.0) for done in accumulate(work, initial=0.0)]  # done before each job
        self._job = self._shares[:2]  # done before and after this job
        self._began = self._reported = time.monotonic()
        self._predicted, self._share = seconds, 0.0

    def begin(self, index: int, name: str) -> None:
        """Begin a job, counted from 0."""
        jobs = len(self._shares) - 1
        number = f"{index + 1}/{jobs} " if jobs > 1 else ""
        self._job, self._name = self._shares[index : index + 2], f"{number}{name}: "
        self.show(self._text, 0.0)

    def show(self, text: str, share: float | None = None) -> None:
        """Say what is being done, and the share of the job that is done."""
        self._text = text
        if share is not None:
            before, after = self._job
            self._share, self._reported = before + share * (after - before), time.monotonic()
            if self.visible:
                self._bar.bar_format = _WITH_BAR
        self._draw()

    def report(self, now: Progress) -> None:
        """The callback of a decode."""
        self.show(str(now), now.done)

    def _redraw(self) -> None:
        while not self._ended.wait(0.5):
            self._draw()

    def _draw(self) -> None:
        if not self.visible:
            return
        now, total = time.monotonic(), None  # seconds of all the work
        if self._share >= TRUSTED_SHARE or (self._share and self._predicted is None):
            total = (self._reported - self._began) / self._share
        elif self._predicted is not None:
            total = self._reported - self._began + (1 - self._share) * self._predicted
        share = self._share if total is None else min(self._share + (now - self._reported) / max(total, 0.1), 0.99)
        left = "" if total is None else f"about {units.format_seconds(max(1.0, total * (1 - share)))} left"
        with self._bar.get_lock():  # type: ignore[no-untyped-call]
            self._bar.n = share
            self._bar.desc, self._bar.postfix = units.printable(self._name + self._text), left
            self._bar.refresh()


_WITHOUT_BAR = "{desc} ... {elapsed}"
_WITH_BAR = "{desc} {percentage:3.0f}%|{bar:20}| {elapsed}{postfix}"
TRUSTED_SHARE = 0.2  # share of the work from which on the time so far predicts the rest better than a quick measure


def predicted_seconds(decoder: PixelDecoder, pixels: int, *, encoded: bool = False) -> float | None:
    """Time to make so many pixels, `encoded` first or not, by a quick measure; None for decoders that draw noise."""
    from pidecode.engine.feed_forward import ENCODER_WORK, FeedForwardRunner

    if not isinstance(decoder.runner, FeedForwardRunner):
        return None
    return decoder.runner.seconds_per_pixel() * pixels * (1 + (ENCODER_WORK if encoded else 0.0))


def standard_input() -> bytes:
    """Standard input to its end; FileError if it holds more than MAX_INPUT bytes."""
    data = bytearray()
    while part := sys.stdin.buffer.read(1 << 20):
        data += part
        if len(data) > MAX_INPUT:
            limit = units.format_bytes(MAX_INPUT)
            raise FileError(f"Standard input holds more than {limit}; give such a file by its name.")
    return bytes(data)


def prompt_lines(file: Path | None) -> list[str]:
    """The prompts of a file, if one is named: one a line, without empty lines and those that begin with #."""
    lines = [] if file is None else map(str.strip, units.read_text(file).splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def decode_options(*commands: Command, exclude: Collection[str] = ()) -> Callable[[F], F]:
    """Flags for every decode option of the commands, except those that are taken in another way."""
    infos = option_infos(interface="cli").items()
    return combined(*(_flag(name, info) for name, info in infos
                      if name not in exclude and set(commands) & set(info.commands)))  # fmt: skip


def _flag(name: str, info: OptionInfo) -> Callable[[F], F]:
    given: dict[str, Any] = {"help": info.help}
    if info.type is tuple:
        given |= {"metavar": "[WIDTH]x[HEIGHT]", "callback": parsed_by(units.parse_sides)}
    elif info.choices:
        given["type"] = click.Choice(info.choices)
    elif info.type is int:
        low, high = (None if bound is None else int(bound) for bound in (info.minimum, info.maximum))
        given["type"] = click.IntRange(low, high)
    elif info.type is PathLike:
        given["type"] = PATH
    elif info.type is float:
        kind = {"sigma": SigmaParam, "scale": ScaleParam}.get(name, click.FloatRange)
        given["type"] = kind(info.minimum, info.maximum)
    return click.option(f"--{name.replace('_', '-')}", **given)


class ScaleParam(click.FloatRange):
    """An enlargement, also as 2x."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        return super().convert(value.strip("xX") if isinstance(value, str) else value, param, ctx)  # type: ignore[arg-type]


class SigmaParam(click.FloatRange):
    """A noise level, or several between commas."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """A number, or a tuple of them."""
        if not isinstance(value, str) or "," not in value:
            return super().convert(cast(float, value), param, ctx)
        one = super().convert
        levels = tuple(one(cast(float, level.strip()), param, ctx) for level in value.split(","))
        if len(set(levels)) < len(levels):
            self.fail(f"{value!r} has a noise level twice.", param, ctx)
        return levels


def take_decode_options(given: dict[str, Any], *, exclude: Collection[str] = ()) -> DecodeOptions:
    """Remove the values of the flags that `decode_options` added from a command's parameters, as `DecodeOptions`."""
    names = [name for name in option_infos(interface="cli") if name in given and name not in exclude]
    return DecodeOptions(**{name: given.pop(name) for name in names})


save_options = combined(*(_flag(name, info) for name, info in option_infos(SaveOptions, interface="cli").items()))


def torch_dtype(name: str | None) -> torch.dtype | None:
    """The number format with this name."""
    import torch

    return None if name is None else getattr(torch, name)


def load_decoder(source: str, given: Mapping[str, Any], **more: Any) -> PixelDecoder:
    """Load a decoder by the values of the flags in `model_options`, and more arguments of `from_pretrained`."""
    from pidecode.decoder import PixelDecoder

    return PixelDecoder.from_pretrained(
        source, space=given["space"], variant=given["variant"], device=given["device"],
        dtype=torch_dtype(given["dtype"]),
        runtime=RuntimeOptions(compile=given["compile"], attention=given["attention"]), **more,
    )  # fmt: skip


def pipeline_device(device: str | None, dtype: str | None) -> tuple[torch.device, torch.dtype]:
    """Where a diffusers pipeline runs and in which number format, by default float32 on a CPU, else bfloat16."""
    from pidecode.devices import select_device

    selected = select_device(device)
    chosen = torch_dtype(dtype or ("float32" if selected.type == "cpu" else "bfloat16"))
    assert chosen is not None
    return selected, chosen
