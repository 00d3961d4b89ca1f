# SPDX-License-Identifier: Apache-2.0
"""`pidecode upscale` and `pidecode decode`: images or saved latents in, larger images out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pidecode.cli.common import (
    BatchShape,
    MemoryOptions,
    bits_option,
    decode_options,
    decoded_sizes,
    dtype_option,
    echo,
    emit,
    json_option,
    memory_option,
    model_options,
    overwrite_option,
    progress,
    quantization_options,
    source_options,
    take_decode_options,
    text_encoder_option,
    threads_option,
    torch_dtype,
    upscaled_sizes,
)
from pidecode.engine.feed_forward import FeedForwardPlan
from pidecode.engine.machine import GB, Machine, Quantization, this_machine
from pidecode.engine.plan import Plan, Scheme, plan_decode
from pidecode.errors import FileError, SettingError
from pidecode.files import PathLike, check_writable, require_file, same_name, writable_folder
from pidecode.options import DecodeOptions, RuntimeOptions
from pidecode.registry.configs import RELEASED_CONFIGS
from pidecode.units import parse_bytes, parse_size

if TYPE_CHECKING:
    from pidecode.decoder import DecodeOutput, PixelDecoder
    from pidecode.sampling import Callback, Step
    from pidecode.weights.metadata import CheckpointMetadata


SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
_PATH = click.Path(path_type=Path)

Run = Callable[["PixelDecoder", Path, "Callback"], "DecodeOutput"]
"""Decoder, source file and step callback to the decoder's output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeArgs:
    """Arguments of both commands beside their files.

    `options` are those of the decode; the others have the names of their flags.
    """

    options: DecodeOptions
    out: str | None
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
    overwrite: bool
    as_json: bool

    @classmethod
    def parse(cls, given: dict[str, Any]) -> DecodeArgs:
        """The arguments from click's parameters."""
        return cls(options=take_decode_options(given), **given)

    def load_decoder(self, jobs: Callable[[CheckpointMetadata], list[BatchShape]]) -> PixelDecoder:
        """Load the decoder; `jobs` gives the images' sizes of the weights' metadata, where a memory plan needs them."""
        from pidecode.decoder import PixelDecoder

        if self.lora_scale is not None and self.lora is None:
            raise SettingError("--lora-scale is the strength of an adapter, and none was given; add --lora FILE.")
        dtype = torch_dtype(self.dtype)
        limits = MemoryOptions(memory=self.memory, quantization=self.quantization, scheme=self.scheme)

        def make_plan(metadata: CheckpointMetadata) -> Plan | FeedForwardPlan:
            plan = limits.plan(metadata.config, jobs(metadata), self.device, self.dtype)
            echo(plan.describe(), err=True)
            return plan

        decoder = PixelDecoder.from_pretrained(
            self.model, space=self.space, variant=self.variant, encoder=self.encoder,
            text_encoder=self.text_encoder, device=self.device, dtype=dtype,
            plan=make_plan if limits.asked else None, runtime=RuntimeOptions(compile=self.compile),
        )  # fmt: skip
        if self.lora is not None:
            decoder.load_lora(self.lora, 1.0 if self.lora_scale is None else self.lora_scale)
        return decoder


def _decoder_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the flags of `DecodeArgs` that are no decode options."""
    options = [
        click.option("-o", "--out", type=click.Path(), help="File to write; or folder, which ends in / if it is new."),
        click.option("--keep-suffix", is_flag=True, help="Keep .jpg of cat.jpg in the names of the images."),
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
    sources: Sequence[Path], out: PathLike | None, suffix: str, *, keep_suffix: bool = False
) -> list[Path]:
    """Where the image of each source goes: into the file or folder `out`, or beside the source with a suffix.

    Args:
        sources: The files to decode or upscale.
        out: An image file; a folder, which ends in a slash, exists or has no ending; or None.
        suffix: What is added to the name of each source.
        keep_suffix: Keep the sources' own endings in the names.

    Raises:
        SettingError: Several images would be written to one file, or `keep_suffix` cannot act.
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
        return [folder]
    names = [f"{source.name if keep_suffix else source.stem}{suffix}.png" for source in sources]
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


@contextmanager
def _destinations(sources: Sequence[Path], args: DecodeArgs, suffix: str) -> Iterator[list[Path]]:
    """The files to write, after every check that can be made before the work; new folders left empty are removed."""
    targets = target_paths(sources, args.out, suffix, keep_suffix=args.keep_suffix)
    for source in sources:
        require_file(source)
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
def _steps(label: str) -> Iterator[Callback]:
    """A step callback that draws a progress bar."""
    with progress(0, label) as bar:

        def callback(step: Step) -> None:
            bar.total = step.total
            bar.update(step.index - bar.n)

        yield callback


def _run(
    sources: Sequence[Path],
    args: DecodeArgs,
    suffix: str,
    run: Run,
    jobs: Callable[[CheckpointMetadata], list[BatchShape]],
    sizes: Callable[[PixelDecoder], list[tuple[int, int]]],
) -> None:
    """Decode one source after another, save the images and print what was written."""
    from pidecode.engine import sequence_parallel
    from pidecode.engine.runner import Runner
    from pidecode.images import check_format

    with _destinations(sources, args, suffix) as targets:
        parallel = sequence_parallel.init_process_group()  # under torchrun an image is sharded, and one process writes
        decoder = args.load_decoder(jobs)
        if parallel:
            if not isinstance(decoder.runner, Runner):
                raise SettingError(
                    f"{decoder.name} is a feed-forward decoder, which runs in one process; leave torchrun out."
                )
            decoder.runner.sequence_parallel = True
        for target, size in zip(targets, sizes(decoder), strict=True):  # before the first decode
            check_format(target, *size)
        written: list[dict[str, Any]] = []
        for source, target in zip(sources, targets, strict=True):
            began = time.perf_counter()
            with _steps(source.name) as callback:
                output = run(decoder, source, callback)
            if sequence_parallel.is_main_process():
                written += _save(output, source, target, args, began)
        if args.as_json and sequence_parallel.is_main_process():
            emit(written, "", as_json=True)
    sequence_parallel.destroy_process_group()


def _save(output: DecodeOutput, source: Path, target: Path, args: DecodeArgs, began: float) -> list[dict[str, Any]]:
    """Write the images of one source; returns, and without --json prints, what was written."""
    decoded = time.perf_counter()
    names = output.save(target, overwrite=args.overwrite, bits=16 if args.bits == "16" else 8)
    written: list[dict[str, Any]] = []
    for name, metadata in zip(names, output.metadata, strict=True):
        shown: dict[str, Any] = {key: metadata[key] for key in ("width", "height", "seed") if key in metadata}
        written.append({"source": str(source), "image": str(name), **shown})
    timing = {"seconds": round(decoded - began, 2), "seconds_saving": round(time.perf_counter() - decoded, 2)}
    written[-1] |= timing
    if not args.as_json:
        for line in written:
            echo(f"{line['image']}  {line['width']}x{line['height']}  {timing['seconds']:.1f} s")
    return written


@click.command()
@click.argument("images", nargs=-1, required=True, type=_PATH)
@decode_options("upscale")
@_decoder_options
@source_options
def upscale(images: tuple[Path, ...], strip: bool, keep_profile: bool, max_pixels: int, **given: Any) -> None:
    """Upscale IMAGES: encode each to a latent, and decode that to a larger image.

    Without --out, photo.jpg becomes photo-upscaled.png beside it. Files that exist are kept unless --overwrite.
    Transparency, gray, 16 bits and what a file carries beside its pixels go over to the result.
    """
    args = DecodeArgs.parse(given)

    def run(decoder: PixelDecoder, source: Path, callback: Callback) -> DecodeOutput:
        from pidecode.images import read_image

        image = read_image(source, max_pixels=max_pixels, keep_profile=keep_profile)
        return decoder.upscale(image.stripped() if strip else image, options=args.options, callback=callback)

    def sizes(decoder: PixelDecoder) -> list[tuple[int, int]]:
        from pidecode.images import image_size

        return [decoder.upscaled_size(image_size(image, max_pixels=max_pixels)) for image in images]

    _run(images, args, "-upscaled", run, lambda metadata: upscaled_sizes(images, metadata, max_pixels), sizes)


@click.command()
@click.argument("latents", nargs=-1, required=True, type=_PATH)
@decode_options("decode")
@_decoder_options
def decode(latents: tuple[Path, ...], **given: Any) -> None:
    """Decode saved LATENTS (.safetensors) to images.

    Without --out, cat.safetensors becomes cat.png beside it. Files that exist are kept unless --overwrite.
    """
    args = DecodeArgs.parse(given)

    def run(decoder: PixelDecoder, source: Path, callback: Callback) -> DecodeOutput:
        from pidecode.latents.latent import Latent

        return decoder.decode(Latent.load(source, space=args.space), options=args.options, callback=callback)

    def jobs(_: object = None) -> list[BatchShape]:
        return decoded_sizes(latents, args.space, args.options.size)

    _run(latents, args, "", run, jobs, lambda _: [(width, height) for width, height, _ in jobs()])


@click.command()
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
    """Show how an image would be decoded in the available memory, or which size would fit."""
    if vram and ram:
        raise SettingError("--vram and --ram name two machines; give one.")
    given = vram or ram
    if given:
        # A GPU known by its memory alone is assumed to multiply as asked.
        w8a8: tuple[Quantization, ...] = ("fp8",) if quantization == "fp8" else ("int8",)
        machine = Machine(memory=parse_bytes(given), accelerator=bool(vram), w8a8=w8a8)
    else:
        machine = this_machine()
    chosen = plan_decode(network, parse_size(size), machine, quantization=quantization, **options)
    data = {**asdict(chosen), "peak": chosen.peak, "exact": chosen.exact, "memory": machine.memory}
    emit(data, f"{chosen.describe()}\n  {'free':22s} {machine.memory / GB:6.2f} GB", as_json=as_json)
