# SPDX-License-Identifier: Apache-2.0
"""`pidecode upscale` and `pidecode decode`: images or saved latents in, larger images out."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import click

from pidecode.cli.common import (
    BatchShape,
    GroupedCommand,
    MemoryOptions,
    SigmaSeries,
    WorkBar,
    bits_option,
    decode_options,
    dtype_option,
    echo,
    emit,
    json_option,
    memory_option,
    model_options,
    overwrite_option,
    padded_size,
    predicted_seconds,
    quantization_options,
    save_options,
    set_threads,
    source_options,
    standard_input,
    take_decode_options,
    text_encoder_option,
    threads_option,
    torch_dtype,
)
from pidecode.cli.weights import IMAGES
from pidecode.engine.machine import GB, Machine, Quantization, this_machine
from pidecode.engine.plan import Plan, Scheme, plan_decode
from pidecode.errors import DoesNotFitError, FileError, LatentError, PidecodeError, SettingError, SizeError
from pidecode.files import PathLike, check_writable, require_file, same_name, writable_folder
from pidecode.options import Attention, DecodeOptions, FileFormat, RuntimeOptions, SaveOptions, option_infos
from pidecode.registry.configs import RELEASED_CONFIGS
from pidecode.units import format_seconds, parse_bytes, parse_size
from pidecode.weights.safetensors import looks_like_safetensors, read_start

if TYPE_CHECKING:
    from pidecode.decoder import PixelDecoder
    from pidecode.engine.feed_forward import FeedForwardPlan
    from pidecode.images import DecodeOutput
    from pidecode.sampling import DecodeProgressCallback
    from pidecode.weights.metadata import CheckpointMetadata

STREAM = "-"  # standard input as a source, standard output as --out
SUFFIXES = tuple(f".{choice}" for choice in option_infos(SaveOptions)["format"].choices)
_PATH = click.Path(path_type=Path)
_ONE_FILE = (FileError, LatentError, SizeError, DoesNotFitError)
"""Errors of one source, which do not stop the others."""


@dataclass(frozen=True, slots=True)
class DecodeSource:
    """A file named on the command line, or what standard input holds."""

    path: Path
    data: bytes | None = None

    @classmethod
    def read(cls, path: Path) -> DecodeSource:
        """The source of that name; "-" reads standard input to its end."""
        return cls(Path("stdin"), standard_input()) if os.fspath(path) == STREAM else cls(path)

    @property
    def content(self) -> Path | bytes:
        """What reads take."""
        return self.path if self.data is None else self.data

    def start(self) -> bytes:
        """Its first bytes. Raises FileError if there is no such file."""
        if self.data is not None:
            return self.data[:16]
        require_file(self.path)
        return read_start(self.path)

    def __str__(self) -> str:
        return "standard input" if self.data is not None else str(self.path)


class DecodeTask(Protocol):
    """What the two commands do with a source."""

    @property
    def suffix(self) -> str:
        """What is added to the names of results."""

    def check(self, source: DecodeSource) -> None:
        """Raise an error for what is no file of the right kind, by its first bytes."""

    def natural_size(self, source: DecodeSource) -> BatchShape:
        """What there is to decode, by reading as little as possible; the size is of the image, or of the decode."""

    def decoded_size(self, metadata: CheckpointMetadata, natural: BatchShape) -> BatchShape:
        """The size that the network works at."""

    def result_size(self, decoder: PixelDecoder, natural: BatchShape) -> tuple[int, int]:
        """The size of the result. Raises SizeError for one that cannot be had."""

    def run(self, decoder: PixelDecoder, source: DecodeSource, progress: DecodeProgressCallback) -> DecodeOutput:
        """Decode it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeArgs:
    """Arguments of both commands beside their files.

    `options` are those of the decode; the others have the names of their flags.
    """

    options: DecodeOptions
    out: str | None
    format: FileFormat | None
    quality: int | None
    threads: int | None
    keep_suffix: bool
    model: str
    space: str | None
    variant: str | None
    encoder: Path | None
    text_encoder: Path | None
    device: str | None
    dtype: str | None
    lora: Path | None
    lora_scale: float | None
    memory: str | None
    quantization: Quantization | None
    scheme: Scheme | None
    bits: str
    compile: bool
    attention: Attention
    overwrite: bool
    as_json: bool
    sigmas: tuple[float, ...] = ()

    @classmethod
    def parse(cls, given: dict[str, Any]) -> DecodeArgs:
        """The arguments from click's parameters."""
        sigmas = given.pop("sigma") if isinstance(given["sigma"], tuple) else ()
        args = cls(options=take_decode_options(given), sigmas=sigmas, **given)
        if args.lora_scale is not None and args.lora is None:
            raise SettingError("--lora-scale is the strength of an adapter, and none was given; add --lora FILE.")
        return args

    def load_decoder(self, sizes: Callable[[CheckpointMetadata], list[BatchShape]]) -> PixelDecoder:
        """Load the decoder; `sizes` gives those that it will work at, where a memory plan needs them."""
        from pidecode.decoder import PixelDecoder

        dtype = torch_dtype(self.dtype)
        limits = MemoryOptions(memory=self.memory, quantization=self.quantization, scheme=self.scheme)

        def make_plan(metadata: CheckpointMetadata) -> Plan | FeedForwardPlan:
            plan = limits.plan(metadata.config, sizes(metadata), self.device, self.dtype)
            echo(plan.describe(), err=True)
            return plan

        decoder = PixelDecoder.from_pretrained(
            self.model, space=self.space, variant=self.variant, encoder=self.encoder,
            text_encoder=self.text_encoder, device=self.device, dtype=dtype,
            plan=make_plan if limits.asked else None,
            runtime=RuntimeOptions(compile=self.compile, attention=self.attention),
        )  # fmt: skip
        if self.lora is not None:
            decoder.load_lora(self.lora, 1.0 if self.lora_scale is None else self.lora_scale)
        return decoder


def _decoder_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags of `DecodeArgs` that are no decode options."""
    options = [
        click.option(
            "-o",
            "--out",
            type=click.Path(),
            help="File to write; folder, which ends in / if it is new; or - for stdout.",
        ),
        click.option("--keep-suffix", is_flag=True, help="Keep .jpg of cat.jpg in the names of the images."),
        save_options,
        model_options,
        click.option("--encoder", type=_PATH, help="Encoder of the model's space, if it is not where `pull` puts it."),
        text_encoder_option,
        click.option("--lora", type=_PATH, metavar="FILE", help="Low-rank adapter to add to the weights."),
        click.option("--lora-scale", type=float, help="Its strength; 1 if not given."),
        memory_option,
        quantization_options,
        bits_option,
        threads_option,
        overwrite_option,
        json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def target_paths(
    sources: Sequence[Path],
    out: PathLike | None,
    suffix: str,
    *,
    keep_suffix: bool = False,
    format: FileFormat | None = None,
) -> list[Path]:
    """Where the image of each source goes: into the file or folder `out`, or beside the source with a suffix.

    Args:
        sources: The files to decode or upscale.
        out: An image file; a folder, which ends in a slash, exists or has no ending; or None.
        suffix: What is added to the name of each source.
        keep_suffix: Keep the sources' own endings in the names.
        format: The images' format, by default png or that of the ending of `out`.

    Raises:
        SettingError: Several images would be written to one file, or `keep_suffix` or `format` cannot act.
        FileError: `out` names a file format that is not written here.
    """
    folder = None if out is None else Path(out)
    is_folder = out is None or os.fspath(out).endswith(("/", os.sep)) or os.path.isdir(out)
    if folder is not None and folder.suffix and not is_folder:
        if folder.suffix.lower() not in SUFFIXES:
            raise FileError(
                f"{out} is not a format written here; its name must end in {', '.join(SUFFIXES)}, or in / for a folder."
            )
        if len(sources) > 1:
            raise SettingError(f"{len(sources)} images cannot all be written to {out}; name a folder with --out.")
        if keep_suffix:
            raise SettingError(f"--keep-suffix chooses names in a folder, and --out names the file {out}; drop one.")
        if format is not None and _same_format(format) != _same_format(folder.suffix[1:].lower()):
            raise SettingError(f"--format is {format}, and --out names the file {out}; drop one.")
        return [folder]
    names = [
        f"{source.name if keep_suffix else source.stem}{suffix}.{_same_format(format or 'png')}" for source in sources
    ]
    paths = [(folder or source.parent) / name for source, name in zip(sources, names, strict=True)]
    owners: dict[str, tuple[Path, Path]] = {}
    for source, path in zip(sources, paths, strict=True):
        other, place = owners.setdefault(same_name(path), (source, path))
        if place is not path:
            also = "" if place == path else f", which some file systems take for {place}"
            raise SettingError(
                f"{other} and {source} would both be written to {path}{also}. Keep their suffixes in the names "
                "(--keep-suffix), rename one, or write them to two folders (--out)."
            )
    return paths


def _same_format(name: str) -> str:
    return "jpg" if name == "jpeg" else name


@contextmanager
def _destinations(
    sources: Sequence[DecodeSource], right: Sequence[DecodeSource], args: DecodeArgs, suffix: str
) -> Iterator[list[Path]]:
    """The files to write of the `right` sources, after all checks before the work; new folders left empty go again."""
    if args.out == STREAM:
        SaveOptions(format=args.format, quality=args.quality)
        with _standard_output(len(sources), args) as target:
            yield [target] if right else []
        return
    if args.out is None and any(source.data is not None for source in sources):
        raise SettingError(
            "Standard input has no name; say where its image goes: --out FILE, or --out - to pass it on."
        )
    targets = target_paths(
        [source.path for source in sources], args.out, suffix, keep_suffix=args.keep_suffix, format=args.format
    )
    targets = [target for source, target in zip(sources, targets, strict=True) if source in right]
    for target in targets:
        SaveOptions(format=target.suffix[1:].lower(), quality=args.quality)  # type: ignore[arg-type]
    if args.bits == "16" and (others := [target for target in targets if target.suffix.lower() != ".png"]):
        raise SettingError(f"Only .png files hold 16 bits a channel; {others[0]} does not.")
    created: list[Path] = []
    try:
        for target in targets:
            missing = [place for place in target.parents if not os.path.isdir(place)]
            if missing:
                writable_folder(target.parent)
            created += missing
            check_writable(target, overwrite=args.overwrite)
        yield targets
    finally:
        for place in created:
            with suppress(OSError):
                place.rmdir()


@contextmanager
def _standard_output(count: int, args: DecodeArgs) -> Iterator[Path]:
    """A temporary file; what is written there goes to standard output at the end."""
    if count > 1:
        raise SettingError(f"{count} images cannot all be written to standard output; name a folder with --out.")
    if args.as_json:
        raise SettingError("--json and --out - both write to standard output; drop one.")
    if args.keep_suffix:
        raise SettingError("--keep-suffix chooses names in a folder, and --out - writes to none; drop one.")
    if sys.stdout.isatty():
        raise SettingError("--out - writes the bytes of an image, and standard output is a terminal; add > image.png.")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / f"image.{args.format or 'png'}"
        yield target
        written = sorted(Path(folder).iterdir())
        if len(written) > 1:
            raise SettingError(f"{len(written)} images cannot all be written to standard output; use --out FOLDER/.")
        for file in written:
            sys.stdout.buffer.write(file.read_bytes())


class _Failures(list[dict[str, Any]]):
    """Sources that failed; where there is but one source, its error ends the command."""

    def __init__(self, sources: int) -> None:
        super().__init__()
        self.alone = sources == 1

    @contextmanager
    def kept(self, source: DecodeSource) -> Iterator[None]:
        """Keep an error of this source, so that the others go on."""
        try:
            yield
        except _ONE_FILE as error:
            if self.alone:
                raise
            self.append({"source": str(source), "error": type(error).__name__, "message": str(error)})
            echo(f"Failed: {error}", err=True)


def _run(paths: Sequence[Path], args: DecodeArgs, task: Any) -> None:
    """Run a `DecodeTask` on one source after another, save the images and print what was written."""
    if sum(os.fspath(path) == STREAM for path in paths) > 1:
        raise SettingError("- stands for standard input, which can be read only once.")
    if args.sigmas:
        task = SigmaSeries(tasks={at: replace(task, options=task.options.replace(sigma=at)) for at in args.sigmas})
    with WorkBar() as bar:
        sources, failures = [DecodeSource.read(path) for path in paths], _Failures(len(paths))
        right = []
        for source in sources:
            with failures.kept(source):
                task.check(source)
                right.append(source)
        written: list[dict[str, Any]] = []
        with _destinations(sources, right, args, task.suffix) as targets:
            from pidecode.engine import sequence_parallel  # loads torch

            set_threads(args.threads)
            found: list[tuple[DecodeSource, Path, BatchShape]] = []
            for source, target in zip(right, targets, strict=True):
                with failures.kept(source):
                    found.append((source, target, task.natural_size(source)))
            if found:
                written = _decode_all(found, args, task, bar, failures)
            main = sequence_parallel.is_main_process()
            sequence_parallel.destroy_process_group()
    if not main:
        return
    if args.as_json:
        emit([*written, *failures], "", as_json=True)
    if failures:
        names = ", ".join(failure["source"] for failure in failures)
        echo(f"{len(failures)} of {len(paths)} failed: {names}", err=True)
        raise click.exceptions.Exit(PidecodeError.exit_code)


def _decode_all(
    found: list[tuple[DecodeSource, Path, BatchShape]],
    args: DecodeArgs,
    task: DecodeTask,
    bar: WorkBar,
    failures: _Failures,
) -> list[dict[str, Any]]:
    """Load the decoder and decode what was found; returns what was written."""
    from pidecode.engine import sequence_parallel
    from pidecode.engine.runner import Runner
    from pidecode.images import check_format

    parallel = sequence_parallel.init_process_group()  # under torchrun an image is sharded, and one process writes
    bar.show(f"loading {args.model}")
    decoder = args.load_decoder(lambda metadata: [task.decoded_size(metadata, shape) for *_, shape in found])
    if parallel:
        if not isinstance(decoder.runner, Runner):
            raise SettingError(
                f"{decoder.name} is a feed-forward decoder, which runs in one process; leave torchrun out."
            )
        decoder.runner.sequence_parallel = True
    jobs = []
    for source, target, shape in found:  # before the first decode
        with failures.kept(source):
            check_format(target, *task.result_size(decoder, shape))
            width, height, batch = task.decoded_size(decoder.metadata, shape)
            jobs.append((source, target, width * height * batch))
    work = [pixels for _, _, pixels in jobs]
    refinements = (task.options.num_refinements or 0) if isinstance(task, UpscaleTask) else None
    bar.expect(work, predicted_seconds(decoder, sum(work), refinements) if bar.visible else None)
    written: list[dict[str, Any]] = []
    for index, (source, target, _) in enumerate(jobs):
        with failures.kept(source):
            bar.begin(index, source.path.name)
            began = time.perf_counter()
            output = task.run(decoder, source, bar.report)
            bar.show(f"writing {target.name}")
            if sequence_parallel.is_main_process():
                written += _save(output, source, target, args, began)
    return written


def _save(
    output: DecodeOutput, source: DecodeSource, target: Path, args: DecodeArgs, began: float
) -> list[dict[str, Any]]:
    """Write the images of one source; returns, and without --json prints, what was written."""
    decoded = time.perf_counter()
    bits: Literal[8, 16] = 16 if args.bits == "16" else 8
    names = output.save(target, overwrite=args.overwrite, bits=bits, quality=args.quality)
    written: list[dict[str, Any]] = []
    for name, metadata in zip(names, output.metadata, strict=True):
        shown: dict[str, Any] = {key: metadata[key] for key in ("width", "height", "seed") if key in metadata}
        written.append({"source": str(source), "image": str(name), **shown})
    timing = {"seconds": round(decoded - began, 2), "seconds_saving": round(time.perf_counter() - decoded, 2)}
    written[-1] |= timing
    if not args.as_json and args.out != STREAM:
        for line in written:
            echo(f"{line['image']}  {line['width']}x{line['height']}  {timing['seconds']:.1f} s")
    return written


@dataclass(frozen=True, slots=True, kw_only=True)
class UpscaleTask:
    """`DecodeTask` of images."""

    options: DecodeOptions
    strip: bool
    keep_profile: bool
    max_pixels: int
    suffix: str = "-upscaled"

    def natural_size(self, source: DecodeSource) -> BatchShape:
        """The image's."""
        from pidecode.images import image_size

        return (*image_size(source.content, max_pixels=self.max_pixels), 1)

    def check(self, source: DecodeSource) -> None:
        """Name the command for folders and latents."""
        if os.path.isdir(source.path):
            raise FileError(f"{source} is a folder; enlarge what it holds by `pidecode batch {source} OUT`.")
        if looks_like_safetensors(source.start()):
            raise FileError(f"{source} is no image; if it is a latent, use `pidecode decode {source}`.")

    def decoded_size(self, metadata: CheckpointMetadata, natural: BatchShape) -> BatchShape:
        """That of the padded image, enlarged."""
        return padded_size(metadata, natural[:2])

    def result_size(self, decoder: PixelDecoder, natural: BatchShape) -> tuple[int, int]:
        """As the decoder says."""
        return decoder.upscaled_size(natural[:2], self.options)

    def run(self, decoder: PixelDecoder, source: DecodeSource, progress: DecodeProgressCallback) -> DecodeOutput:
        """Read and upscale it."""
        from pidecode.images import read_image

        image = read_image(source.content, max_pixels=self.max_pixels, keep_profile=self.keep_profile)
        image = image.stripped() if self.strip else image
        return decoder.upscale(image, options=self.options, progress_callback=progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentTask:
    """`DecodeTask` of latents."""

    options: DecodeOptions
    space: str | None
    suffix: str = ""

    def natural_size(self, source: DecodeSource) -> BatchShape:
        """The size at which the latents decode, and their number."""
        from pidecode.latents.latent import Latent

        latent = Latent.load(source.content, space=self.space)
        height, width = latent.output_size
        return width, height, len(latent)

    def check(self, source: DecodeSource) -> None:
        """Name the command for images."""
        if source.start().startswith(IMAGES):
            raise LatentError(f"{source} is an image, and decode takes latents; use `pidecode upscale {source}`.")

    def decoded_size(self, metadata: CheckpointMetadata, natural: BatchShape) -> BatchShape:
        """By the option `size`, which feed-forward decoders act on later."""
        from pidecode.registry.configs import PiDConfig

        width, height, batch = natural
        if isinstance(metadata.config, PiDConfig):
            width, height = self.options.completed_size((width, height), metadata.config.patch_size)
        return width, height, batch

    def result_size(self, decoder: PixelDecoder, natural: BatchShape) -> tuple[int, int]:
        """As the decoder says."""
        return decoder.decoded_size(natural[:2], self.options)

    def run(self, decoder: PixelDecoder, source: DecodeSource, progress: DecodeProgressCallback) -> DecodeOutput:
        """Load and decode it."""
        from pidecode.latents.latent import Latent

        latent = Latent.load(source.content, space=self.space)
        return decoder.decode(latent, options=self.options, progress_callback=progress)


@click.command(cls=GroupedCommand)
@click.argument("images", nargs=-1, required=True, type=_PATH)
@decode_options("upscale")
@_decoder_options
@source_options
@click.pass_context
def upscale(
    ctx: click.Context, /, images: tuple[Path, ...], strip: bool, keep_profile: bool, max_pixels: int, **given: Any
) -> None:
    """Upscale IMAGES: encode each to a latent, and decode that to a larger image.

    Without --out, photo.jpg becomes photo-upscaled.png beside it; - reads standard input. Files that exist are kept
    unless --overwrite. One folder is a batch, by default into a folder beside it: see `pidecode batch --help`.
    Transparency, gray, 16 bits and what a file carries beside its pixels go over to the result.
    """
    if len(images) == 1 and os.path.isdir(images[0]):
        _upscale_folder(ctx, images[0])
        return
    args = DecodeArgs.parse(given)
    task = UpscaleTask(options=args.options, strip=strip, keep_profile=keep_profile, max_pixels=max_pixels)
    _run(images, args, task)


def _upscale_folder(ctx: click.Context, folder: Path) -> None:
    """Run the command `batch` with the options given."""
    from pidecode.cli.batch import batch

    known = {parameter.name for parameter in batch.params}
    typed = {name for name in ctx.params if ctx.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE}
    if others := sorted(typed - known - {"images", "out"}):
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise SettingError(f"{folder} is a folder, and {flags} cannot act on a batch; leave it out, or name the files.")
    out = ctx.params["out"] or f"{os.path.abspath(folder)}-upscaled"
    if out == STREAM:
        raise SettingError(f"{folder} is a folder, and standard output holds one image; name a folder with --out.")
    ctx.invoke(batch, source=str(folder), out=Path(out), **{name: ctx.params[name] for name in typed & known - {"out"}})


@click.command(cls=GroupedCommand)
@click.argument("latents", nargs=-1, required=True, type=_PATH)
@decode_options("decode")
@_decoder_options
def decode(latents: tuple[Path, ...], **given: Any) -> None:
    """Decode saved LATENTS (.safetensors) to images.

    Several noise levels (--sigma 0,0.2,0.4) make one sheet of all results, cat-sigmas.png, to choose by eye.

    Without --out, cat.safetensors becomes cat.png beside it; - reads standard input. Files that exist are kept unless
    --overwrite.
    """
    args = DecodeArgs.parse(given)
    _run(latents, args, LatentTask(options=args.options, space=args.space))


@click.command(cls=GroupedCommand)
@click.option("--size", required=True, metavar="WxH", help="Image to make, in pixels: 4096x3072.")
@click.option("--vram", metavar="BYTES", help="Memory of an accelerator: 12GB. Without it, what is free here.")
@click.option("--ram", metavar="BYTES", help="Plan for a CPU with this much memory instead.")
@click.option(
    "--network",
    type=click.Choice(list(RELEASED_CONFIGS)),
    default="v1.5",
    show_default=True,
    help="`tiny`, or the version of PiD's released weights.",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images at once.")
@dtype_option
@quantization_options
@json_option
def plan(
    size: str,
    vram: str | None,
    ram: str | None,
    network: str,
    as_json: bool,
    quantization: Quantization | None,
    **options: Any,
) -> None:
    """Show how an image would be decoded in the available memory, or which size would fit.

    For this machine the time is predicted too, by a quick measure.
    """
    if vram and ram:
        raise SettingError("--vram and --ram name two machines; give one.")
    given = vram or ram
    with WorkBar("planning") as bar:
        if given:
            # A GPU known by its memory alone is assumed to multiply as asked.
            w8a8: tuple[Quantization, ...] = ("fp8",) if quantization == "fp8" else ("int8",)
            machine = Machine(memory=parse_bytes(given), accelerator=bool(vram), w8a8=w8a8)
        else:
            from pidecode.devices import default_dtype, select_device  # load torch

            machine = this_machine()
            options["dtype"] = options["dtype"] or str(default_dtype(select_device(None))).removeprefix("torch.")
        chosen = plan_decode(network, parse_size(size), machine, quantization=quantization, **options)
        bar.show("measuring the speed of this machine")
        seconds = {} if given else _predicted_times(network, chosen)
    data = {
        **asdict(chosen),
        "peak": chosen.peak,
        "exact": chosen.exact,
        "memory": machine.memory,
        "seconds": seconds or None,
    }
    times = [f"  {f'predicted {what}':22s} {format_seconds(time):>9s}" for what, time in seconds.items()]
    text = "\n".join([chosen.describe(), f"  {'free':22s} {machine.memory / GB:6.2f} GB", *times])
    emit(data, text, as_json=as_json)


def _predicted_times(network: str, plan: Plan | FeedForwardPlan) -> dict[str, float]:
    """Seconds to decode and, for feed-forward decoders, to upscale, by a quick measure of this machine."""
    from pidecode.decoder import PixelDecoder
    from pidecode.devices import select_device
    from pidecode.engine.feed_forward import encoding_work
    from pidecode.engine.runner import measured_step_seconds
    from pidecode.sampling import DEFAULT_STEPS

    set_threads(None)
    if isinstance(plan, Plan):
        step = measured_step_seconds(plan, RELEASED_CONFIGS[network], select_device(None))  # type: ignore[arg-type]
        steps = DEFAULT_STEPS["student"]
        return {f"time, {steps} steps": steps * step}
    decoder = PixelDecoder.from_pretrained(network, dtype=plan.dtype)
    decoding = predicted_seconds(decoder, plan.size[0] * plan.size[1] * plan.batch, None) or 0.0
    return {"time to decode": decoding, "time to upscale": decoding * (1 + encoding_work(0))}
