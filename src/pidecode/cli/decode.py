# SPDX-License-Identifier: Apache-2.0
"""`pidecode upscale` and `pidecode decode`: images or saved latents in, larger images out."""

from __future__ import annotations

import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from pidecode import files
from pidecode.cli import common
from pidecode.cli.weights import IMAGES
from pidecode.engine.machine import Quantization, this_machine
from pidecode.engine.plan import Plan, Scheme, plan_decode
from pidecode.errors import FileError, LatentError, PidecodeError, SettingError
from pidecode.options import Attention, DecodeOptions, FileFormat, SaveOptions, option_infos
from pidecode.units import MAX_PIXELS, parse_bytes
from pidecode.weights.safetensors import looks_like_safetensors, read_start

if TYPE_CHECKING:
    from PIL import Image

    from pidecode.decoder import PixelDecoder
    from pidecode.engine.feed_forward import FeedForwardPlan
    from pidecode.images import DecodeOutput, Frames, SourceImage
    from pidecode.latents.latent import Latent
    from pidecode.sampling import DecodeProgressCallback, Progress
    from pidecode.weights.metadata import CheckpointMetadata

BatchShape = tuple[int, int, int]  # width and height of an image in pixels, and how many are decoded at once
STREAM = "-"  # standard input as a source, standard output as --out
SUFFIXES = tuple(f".{choice}" for choice in option_infos(SaveOptions)["format"].choices)


@dataclass(frozen=True, slots=True)
class DecodeSource:
    """A file named on the command line, or what standard input holds."""

    path: Path
    data: bytes | None = None
    frames: Frames | None = None  # of an animation, or of the document that the page belongs to
    page: int | None = None  # number of a page of a document, counted from 0

    @property
    def content(self) -> Path | bytes:
        """What reads take."""
        return self.path if self.data is None else self.data

    @property
    def animation(self) -> Frames | None:
        """The frames of an animation."""
        return self.frames if self.page is None else None

    @property
    def frame(self) -> int | None:
        """Where the file has the page."""
        return None if self.page is None or self.frames is None else self.frames.indices[self.page]

    @property
    def named(self) -> Path:
        """The path that the image is named after, with the number of a page."""
        if self.page is None:
            return self.path
        return self.path.with_name(files.cut_name(self.path.stem, f"-{self.page + 1}{self.path.suffix}"))

    def start(self) -> bytes:
        """Its first bytes. Raises FileError if there is no such file."""
        if self.data is not None:
            return self.data[: files.HEAD_BYTES]
        files.require_file(self.path)
        return read_start(self.path, files.HEAD_BYTES)

    def __str__(self) -> str:
        name = "standard input" if self.data is not None else str(self.path)
        return name if self.page is None else f"{name}, page {self.page + 1}"


@dataclass(frozen=True, kw_only=True)
class DecodeArgs:
    """Arguments of both commands beside their files, by the names of their flags."""

    options: DecodeOptions
    sigmas: tuple[float, ...]  # several noise levels, each of which is decoded
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
    strip: bool = False  # this and what follows: of `upscale` alone
    keep_profile: bool = False
    max_pixels: int = MAX_PIXELS


def _arguments(given: dict[str, Any]) -> DecodeArgs:
    """The arguments from click's parameters."""
    sigmas = given.pop("sigma") if isinstance(given["sigma"], tuple) else ()
    args = DecodeArgs(options=common.take_decode_options(given), sigmas=sigmas, **given)
    if args.lora_scale is not None and args.lora is None:
        raise SettingError("--lora-scale is the strength of an adapter, and none was given; add --lora FILE.")
    return args


def _load_decoder(args: DecodeArgs, sizes: Callable[[CheckpointMetadata], list[BatchShape]]) -> PixelDecoder:
    """Load the decoder; `sizes` gives those that it will work at, where a memory plan needs them."""

    def make_plan(metadata: CheckpointMetadata) -> Plan | FeedForwardPlan:
        machine = this_machine(args.device)
        if args.memory is not None:
            machine = replace(machine, memory=min(machine.memory, parse_bytes(args.memory)))
        width, height, batch = max(sizes(metadata), key=math.prod)
        config: Any = metadata.config
        plan = plan_decode(
            config, (width, height), machine, batch=batch, dtype=args.dtype, quantization=args.quantization,
            scheme=args.scheme,
        )  # fmt: skip
        common.echo(plan.describe(), err=True)
        return plan

    limited = (args.memory, args.quantization, args.scheme) != (None, None, None)
    plan = make_plan if limited else None
    decoder = common.load_decoder(
        args.model, vars(args), encoder=args.encoder, text_encoder=args.text_encoder, plan=plan
    )
    if args.lora is not None:
        decoder.load_lora(args.lora, 1.0 if args.lora_scale is None else args.lora_scale)
    return decoder


_decoder_options = common.combined(
    click.option("-o", "--out", type=click.Path(),
                 help="File to write; folder, which ends in / if it is new; or - for stdout."),
    click.option("--keep-suffix", is_flag=True, help="Keep .jpg of cat.jpg in the names of the images."),
    common.save_options, common.model_options,
    click.option("--encoder", type=common.PATH,
                 help="Encoder of the model's space, if it is not where `pull` puts it."),
    common.text_encoder_option,
    click.option("--lora", type=common.PATH, metavar="FILE", help="Low-rank adapter to add to the weights."),
    click.option("--lora-scale", type=float, help="Its strength; 1 if not given."),
    click.option("--memory", metavar="BYTES",
                 help="Plan the decode to need at most this much of the device's memory: 4GB. See `pidecode plan`."),
    common.quantization_options, common.bits_option, common.threads_option, common.overwrite_option,
    common.json_option,
)  # fmt: skip


def target_paths(
    sources: Sequence[Path],
    out: files.PathLike | None,
    suffix: str,
    *,
    keep_suffix: bool = False,
    format: FileFormat | None = None,
    endings: Sequence[str] | None = None,
) -> list[Path]:
    """Where the image of each source goes: into the file or folder `out`, or beside the source with a suffix.

    `out` is a folder if it ends in a slash, exists as one or has no ending. The format is by default that of `endings`,
    .png if not given, or that of the ending of `out`.
    """
    folder, ending = None if out is None else Path(out), f".{format or 'png'}".replace("jpeg", "jpg")
    endings = [ending] * len(sources) if format or endings is None else endings
    if folder is not None and _names_file(out or ""):
        if folder.suffix.lower() not in (*SUFFIXES, *endings):
            raise FileError(
                f"{out} is not a format written here; its name must end in {', '.join(SUFFIXES)}, or in / for a folder."
            )
        if len(sources) > 1:
            raise SettingError(f"{len(sources)} images cannot all be written to {out}; name a folder with --out.")
        if keep_suffix:
            raise SettingError(f"--keep-suffix chooses names in a folder, and --out names the file {out}; drop one.")
        if format is not None and ending != folder.suffix.lower().replace("jpeg", "jpg"):
            raise SettingError(f"--format is {format}, and --out names the file {out}; drop one.")
        return [folder]
    paths: list[Path] = []
    owners: dict[str, tuple[object, Path]] = {}
    for source, own in zip(sources, endings, strict=True):
        name = files.cut_name(source.name if keep_suffix else source.stem, suffix + own)
        path = (folder or source.parent) / name
        files.claim(owners, path, source, otherwise="write them to two folders (--out)")
        paths.append(path)
    return paths


def _names_file(out: files.PathLike) -> bool:
    return bool(Path(out).suffix) and not os.fspath(out).endswith(("/", os.sep)) and not os.path.isdir(out)


@contextmanager
def _destinations(
    right: Sequence[DecodeSource], wrong: Sequence[DecodeSource], args: DecodeArgs, suffix: str
) -> Iterator[list[Path]]:
    """The files to write of the `right` sources, after all checks before the work; new folders left empty go again."""
    sources = [*right, *wrong]
    endings = [source.animation.suffix if source.animation else ".png" for source in sources]
    if args.out == STREAM:
        SaveOptions(format=args.format, quality=args.quality)
        with _standard_output(len(sources), args, endings[0]) as target:
            yield [target] if right else []
        return
    if args.out is None and any(source.data is not None for source in sources):
        raise SettingError(
            "Standard input has no name; say where its image goes: --out FILE, or --out - to pass it on."
        )
    document = len(sources) > 1 and not wrong and all(page.frames is right[0].frames is not None for page in right)
    places = partial(target_paths, suffix=suffix, keep_suffix=args.keep_suffix, format=args.format, endings=endings)
    if document and args.out is not None and _names_file(args.out):
        (target,) = places([right[0].path], args.out, endings=endings[:1])
        targets = files.numbered(target, len(right))
    else:
        targets = places([source.named for source in sources], args.out)[: len(right)]
    for source, target in zip(right, targets, strict=True):
        if source.animation:
            from pidecode.images.write import animated_format

            kind = animated_format(target)
            if args.quality is not None and kind != "WEBP":
                raise SettingError(f"--quality acts on animated webp files only, and {target} is {kind}; leave it out.")
        else:
            SaveOptions(format=target.suffix[1:].lower(), quality=args.quality)  # type: ignore[arg-type]
        if args.bits == "16" and (source.animation or target.suffix.lower() != ".png"):
            raise SettingError(f"Only .png files hold 16 bits a channel, of one image; {target} does not.")
    created: list[Path] = []
    try:
        for target in targets:
            created += [place for place in target.parents if not os.path.isdir(place)]
            files.writable_folder(target.parent)
            files.check_writable(target, overwrite=args.overwrite)
        yield targets
    finally:
        for place in created:
            with suppress(OSError):
                place.rmdir()


@contextmanager
def _standard_output(count: int, args: DecodeArgs, ending: str) -> Iterator[Path]:
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
        target = Path(folder) / (f"image.{args.format}" if args.format else f"image{ending}")
        yield target
        written = sorted(Path(folder).iterdir())
        if len(written) > 1:
            raise SettingError(f"{len(written)} images cannot all be written to standard output; use --out FOLDER/.")
        for file in written:
            sys.stdout.buffer.write(file.read_bytes())


def _run(paths: Sequence[Path], args: DecodeArgs, task: DecodeTask) -> None:
    """Run a task on one source after another, save the images and print what was written."""
    names = [os.fspath(path) for path in paths]
    if names.count(STREAM) > 1:
        raise SettingError("- stands for standard input, which can be read only once.")
    tasks = [replace(task, options=task.options.replace(sigma=level)) for level in args.sigmas] or [task]
    with common.WorkBar() as bar:
        failures = common.SourceFailures(len(paths))
        right: list[DecodeSource] = []
        wrong: list[DecodeSource] = []
        for name in names:
            source = DecodeSource(Path(name))
            if name == STREAM:
                source = DecodeSource(Path("stdin"), common.standard_input())
            with failures.kept(source):
                task.check(source)
                right += task.parts(source)
                continue
            wrong.append(source)
        written: list[dict[str, Any]] = []
        suffix = f"{task.suffix}-sigmas" if args.sigmas else task.suffix
        with _destinations(right, wrong, args, suffix) as targets:
            from pidecode.engine import sequence_parallel  # loads torch

            common.set_threads(args.threads)
            found: list[tuple[DecodeSource, Path, BatchShape]] = []
            for source, target in zip(right, targets, strict=True):
                with failures.kept(source):
                    found.append((source, target, task.natural_size(source)))
            if found:
                written = _decode_all(found, args, tasks, bar, failures)
            main = sequence_parallel.is_main_process()
            sequence_parallel.destroy_process_group()
    if not main:
        return
    if args.as_json:
        common.emit([*written, *failures], "", as_json=True)
    if failures:
        failed = ", ".join(failure["source"] for failure in failures)
        common.echo(f"{len(failures)} of {len(paths)} failed: {failed}", err=True)
        raise click.exceptions.Exit(PidecodeError.exit_code)


def _decode_all(
    found: list[tuple[DecodeSource, Path, BatchShape]],
    args: DecodeArgs,
    tasks: Sequence[DecodeTask],
    bar: common.WorkBar,
    failures: common.SourceFailures,
) -> list[dict[str, Any]]:
    """Load the decoder and decode what was found; returns what was written."""
    from pidecode.engine import sequence_parallel
    from pidecode.engine.runner import Runner
    from pidecode.images import check_format
    from pidecode.images.tensors import LABEL_HEIGHT

    task = tasks[0]
    parallel = sequence_parallel.init_process_group()  # under torchrun an image is sharded, and one process writes
    bar.show(f"loading {args.model}")
    decoder = _load_decoder(args, lambda metadata: [task.decoded_size(metadata, shape) for *_, shape in found])
    if parallel:
        if not isinstance(decoder.runner, Runner):
            raise SettingError(
                f"{decoder.name} is a feed-forward decoder, which runs in one process; leave torchrun out."
            )
        decoder.runner.sequence_parallel = True
    jobs = []
    for source, target, shape in found:  # before the first decode
        with failures.kept(source):
            width, height = task.result_size(decoder, shape)
            if args.sigmas:
                width, height = width * len(tasks), height * shape[2] + LABEL_HEIGHT
            check_format(target, width, height)
            frames = len(source.animation) if source.animation else 1
            jobs.append((source, target, math.prod(task.decoded_size(decoder.metadata, shape)) * frames))
    work = [pixels for _, _, pixels in jobs]
    encoded = isinstance(task, _UpscaleTask)
    bar.expect(work, common.predicted_seconds(decoder, sum(work), encoded=encoded) if bar.visible else None)
    written: list[dict[str, Any]] = []
    for index, (source, target, _) in enumerate(jobs):
        with failures.kept(source):
            bar.begin(index, source.path.name)
            began = time.perf_counter()
            outputs: list[Any] = []
            if isinstance(task, _UpscaleTask) and source.animation:
                outputs += task.upscaled_frames(decoder, source, source.animation, bar)
            else:
                outputs += [task.run(decoder, source, bar.report) for task in tasks]
                if args.sigmas:
                    outputs = [_contact_sheet(outputs, args.sigmas)]
            bar.show(f"writing {target.name}")
            if sequence_parallel.is_main_process():
                written += _save(outputs, source, target, args, began)
    return written


def _contact_sheet(outputs: Sequence[DecodeOutput], sigmas: Sequence[float]) -> DecodeOutput:
    """One image of the results at several noise levels; its rows are the images of the source."""
    from pidecode.images import DecodeOutput
    from pidecode.images.tensors import contact_sheet

    sheet = contact_sheet([output.tensors for output in outputs], [f"sigma {level:g}" for level in sigmas])
    size = {"width": sheet.shape[-1], "height": sheet.shape[-2], "sigma": list(sigmas)}
    return DecodeOutput([sheet], [dict(outputs[0].metadata[0]) | size])


def _save(
    outputs: Sequence[Any], source: DecodeSource, target: Path, args: DecodeArgs, began: float
) -> list[dict[str, Any]]:
    """Write the images of one source; returns, and without --json prints, what was written."""
    from pidecode.images import KEYWORD, Animation

    decoded = time.perf_counter()
    bits: Literal[8, 16] = 16 if args.bits == "16" else 8
    if source.animation is not None:
        output: Any = Animation(outputs, source.animation)
        tables = [outputs[0].info[KEYWORD] | {"frames": len(outputs)}]
    else:
        output, tables = outputs[0], outputs[0].metadata
    names = output.save(target, overwrite=args.overwrite, bits=bits, quality=args.quality)
    written: list[dict[str, Any]] = []
    for name, metadata in zip(names, tables, strict=True):
        shown: dict[str, Any] = {key: metadata[key] for key in ("width", "height", "frames", "seed") if key in metadata}
        written.append({"source": str(source), "image": str(name), **shown})
    timing = {"seconds": round(decoded - began, 2), "seconds_saving": round(time.perf_counter() - decoded, 2)}
    written[-1] |= timing
    if not args.as_json and args.out != STREAM:
        for line in written:
            frames = f", {line['frames']} frames" if "frames" in line else ""
            common.echo(f"{line['image']}  {line['width']}x{line['height']}{frames}  {timing['seconds']:.1f} s")
    return written


@dataclass(frozen=True, slots=True, kw_only=True)
class _UpscaleTask:
    options: DecodeOptions
    args: DecodeArgs
    suffix: str = "-upscaled"

    @property
    def _reading(self) -> dict[str, Any]:
        return {"max_pixels": self.args.max_pixels, "keep_profile": self.args.keep_profile}

    def check(self, source: DecodeSource) -> None:
        if os.path.isdir(source.path):
            raise FileError(f"{source} is a folder; enlarge what it holds by `pidecode batch {source} OUT`.")
        if looks_like_safetensors(source.start()):
            raise FileError(f"{source} is no image; if it is a latent, use `pidecode decode {source}`.")

    def natural_size(self, source: DecodeSource) -> BatchShape:
        """The image's, or that of a frame."""
        from pidecode.images import image_size

        if source.animation is not None:
            return (*source.animation.sizes[0], 1)
        return (*image_size(source.content, max_pixels=self.args.max_pixels, frame=source.frame), 1)

    def parts(self, source: DecodeSource) -> list[DecodeSource]:
        """The image or animation, or each page of a document."""
        if not files.may_hold_frames(source.start()):  # without torch, which takes its time
            return [source]
        from pidecode.images import frames_in

        frames = frames_in(source.content, max_pixels=self.args.max_pixels)
        if frames is None or frames.durations:
            return [replace(source, frames=frames)]
        return [replace(source, frames=frames, page=page) for page in range(len(frames))]

    def upscaled_frames(
        self, decoder: PixelDecoder, source: DecodeSource, frames: Frames, bar: common.WorkBar
    ) -> Iterator[Image.Image]:
        """The upscaled frames of an animation, each as an image of 8 bits."""
        from pidecode.images import read_frames

        for index, image in enumerate(read_frames(source.content, **self._reading)):

            def report(now: Progress, index: int = index) -> None:
                bar.report(now.of_part("frame", index, len(frames)))

            yield from self._upscale(decoder, image, report).images

    def decoded_size(self, metadata: CheckpointMetadata, natural: BatchShape) -> BatchShape:
        """That of the padded image, enlarged."""
        from pidecode.registry.spaces import get_space

        assert metadata.config is not None
        assert metadata.space is not None
        space, scale = get_space(metadata.space), metadata.config.scale
        step = space.input_multiple
        width, height = ((space.fixed_input or -(-side // step) * step) * scale for side in natural[:2])
        return width, height, 1

    def result_size(self, decoder: PixelDecoder, natural: BatchShape) -> tuple[int, int]:
        return decoder.upscaled_size(natural[:2], self.options)

    def run(self, decoder: PixelDecoder, source: DecodeSource, progress: DecodeProgressCallback) -> DecodeOutput:
        from pidecode.images import read_image

        return self._upscale(decoder, read_image(source.content, frame=source.frame, **self._reading), progress)

    def _upscale(self, decoder: PixelDecoder, image: SourceImage, progress: DecodeProgressCallback) -> DecodeOutput:
        image = image.stripped() if self.args.strip else image
        return decoder.upscale(image, options=self.options, progress_callback=progress)


@dataclass(frozen=True, slots=True, kw_only=True)
class _LatentTask:
    options: DecodeOptions
    args: DecodeArgs
    suffix: str = ""

    def check(self, source: DecodeSource) -> None:
        if source.start().startswith(IMAGES):
            raise LatentError(f"{source} is an image, and decode takes latents; use `pidecode upscale {source}`.")

    def parts(self, source: DecodeSource) -> list[DecodeSource]:
        return [source]

    def natural_size(self, source: DecodeSource) -> BatchShape:
        latent = self._latent(source)
        height, width = latent.output_size
        return width, height, len(latent)

    def decoded_size(self, metadata: CheckpointMetadata, natural: BatchShape) -> BatchShape:
        """By the option `size`, which feed-forward decoders act on later."""
        from pidecode.registry.configs import PiDConfig

        width, height, batch = natural
        if isinstance(metadata.config, PiDConfig):
            width, height = self.options.completed_size((width, height), metadata.config.patch_size)
        return width, height, batch

    def result_size(self, decoder: PixelDecoder, natural: BatchShape) -> tuple[int, int]:
        return decoder.decoded_size(natural[:2], self.options)

    def run(self, decoder: PixelDecoder, source: DecodeSource, progress: DecodeProgressCallback) -> DecodeOutput:
        return decoder.decode(self._latent(source), options=self.options, progress_callback=progress)

    def _latent(self, source: DecodeSource) -> Latent:
        from pidecode.latents.latent import Latent

        return Latent.load(source.content, space=self.args.space)


DecodeTask = _UpscaleTask | _LatentTask


@click.command(cls=common.GroupedCommand)
@click.argument("images", nargs=-1, required=True, type=common.PATH, callback=common.expand_patterns)
@common.decode_options("upscale")
@_decoder_options
@common.source_options
@click.pass_context
def upscale(ctx: click.Context, /, images: tuple[Path, ...], **given: Any) -> None:
    """Upscale IMAGES: encode each to a latent, and decode that to a larger image.

    Without --out, photo.jpg becomes photo-upscaled.png beside it; - reads standard input. Files that exist are kept
    unless --overwrite. One folder is a batch, by default into a folder beside it: see `pidecode batch --help`.
    Transparency, gray, 16 bits and what a file carries beside its pixels go over to the result. An animated GIF, WebP
    or PNG becomes one; the pages of a TIFF become numbered images.
    """
    if len(images) == 1 and os.path.isdir(images[0]):
        from pidecode.cli.batch import batch_folder

        batch_folder(ctx, images[0])
        return
    args = _arguments(given)
    _run(images, args, _UpscaleTask(options=args.options, args=args))


@click.command(cls=common.GroupedCommand)
@click.argument("latents", nargs=-1, required=True, type=common.PATH, callback=common.expand_patterns)
@common.decode_options("decode")
@_decoder_options
def decode(latents: tuple[Path, ...], **given: Any) -> None:
    """Decode saved LATENTS (.safetensors) to images.

    Several noise levels (--sigma 0,0.2,0.4) make one sheet of all results, cat-sigmas.png, to choose by eye.

    Without --out, cat.safetensors becomes cat.png beside it; - reads standard input. Files that exist are kept unless
    --overwrite.
    """
    args = _arguments(given)
    _run(latents, args, _LatentTask(options=args.options, args=args))
