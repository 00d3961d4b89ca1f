# SPDX-License-Identifier: Apache-2.0
"""`pidecode upscale` and `pidecode decode`: images or saved latents in, larger images out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pidecode.cli.common import (
    SHORT_DTYPES,
    Job,
    MemoryOptions,
    decoded,
    emit,
    json_option,
    memory_option,
    overwrite_option,
    progress,
    quantization_options,
    space_option,
    threads_option,
    upscaled,
)
from pidecode.engine.machine import GB, Machine, Quantization, this_machine
from pidecode.engine.plan import Plan, Scheme, plan_decode
from pidecode.errors import FileError, SettingError
from pidecode.options import COLOR_FIXES, RuntimeOptions
from pidecode.registry.configs import RELEASED_CONFIGS
from pidecode.units import parse_bytes, parse_size

if TYPE_CHECKING:
    from pidecode.decoder import DecodeOutput, PixelDecoder
    from pidecode.engine.feed_forward import FeedForwardPlan
    from pidecode.sampling import Callback, Step
    from pidecode.weights.metadata import CheckpointMetadata


SUFFIXES = (".png", ".webp", ".jpg", ".jpeg")
_PATH = click.Path(path_type=Path)

Make = Callable[["PixelDecoder", Path, "Callback"], "DecodeOutput"]
"""Decoder, source file and step callback to what the decoder gives for `Wish.output`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What both commands take beside their files."""

    out: Path | None
    model: str
    space: str | None
    variant: str | None
    encoder: Path | None
    device: str | None
    dtype: str | None
    prompt: str | None
    seed: int | None
    num_steps: int | None
    sigma: float | None
    sampler: str | None
    color_fix: str | None
    lora: Path | None
    lora_scale: float | None
    memory: str | None
    quantization: Quantization | None
    scheme: Scheme | None
    bits: str
    compile: bool
    overwrite: bool
    as_json: bool

    def decoder(self, jobs: Callable[[CheckpointMetadata], list[Job]]) -> PixelDecoder:
        """Load the decoder asked for; `jobs` says what it will make, should a plan be needed."""
        from pidecode.decoder import PixelDecoder
        from pidecode.weights.convert import DTYPES

        if self.lora_scale is not None and self.lora is None:
            raise SettingError("--lora-scale is the strength of an adapter, and none was named; add --lora FILE.")
        dtype = DTYPES[self.dtype] if self.dtype else None
        thrift = MemoryOptions(memory=self.memory, quantization=self.quantization, scheme=self.scheme)

        def planned(identity: CheckpointMetadata) -> Plan | FeedForwardPlan:
            wanted = None if dtype is None else str(dtype).removeprefix("torch.")
            plan = thrift.plan(identity.config, jobs(identity), self.device, wanted)
            click.echo(plan.describe(), err=True)
            return plan

        decoder = PixelDecoder.from_pretrained(
            self.model,
            space=self.space,
            variant=self.variant,
            encoder=self.encoder,
            device=self.device,
            dtype=dtype,
            plan=planned if thrift.asked else None,
            runtime=RuntimeOptions(compile=self.compile),
        )
        if self.lora is not None:
            decoder.load_lora(self.lora, 1.0 if self.lora_scale is None else self.lora_scale)
        return decoder

    def settings(self) -> dict[str, Any]:
        """Keywords for the decoder: those that were given."""
        names = ("prompt", "seed", "num_steps", "sigma", "sampler", "color_fix")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}


def _decoding_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that `Wish` holds."""
    options = [
        click.option("-o", "--out", type=_PATH, help="File to write, or folder for several."),
        click.option("-m", "--model", default="tiny", show_default=True, help="A model's name, file or folder."),
        space_option,
        click.option("--variant", metavar="NAME", help="Variant of a model that has several: 2k, 2kto4k, ..."),
        click.option("--encoder", type=_PATH, help="Encoder of the model's space, if it is not where `pull` puts it."),
        click.option("--device", metavar="NAME", help="cpu, cuda, cuda:1, mps; chosen for you if not given."),
        click.option(
            "--dtype",
            type=click.Choice(SHORT_DTYPES),
            help="Number format; chosen to fit the device if not given.",
        ),
        click.option("--prompt", help="What the image shows, for models that read prompts."),
        click.option("--seed", type=click.IntRange(min=0), help="Of the noise; 0 if not given."),
        click.option("--num-steps", type=click.IntRange(min=1), help="Steps; the model's own number if not given."),
        click.option("--sigma", type=click.FloatRange(0, 1), help="Strength: noise put in first, so more is invented."),
        click.option(
            "--sampler", type=click.Choice(["sde", "ode"]), help="How a few-step model walks; sde if not given."
        ),
        click.option(
            "--color-fix",
            type=click.Choice(COLOR_FIXES),
            help="Correct colors, or all detail, by the image (upscale; back-projection by default for tiny) or by the "
            "VAE's decode (decode).",
        ),
        click.option("--lora", type=_PATH, metavar="FILE", help="Low-rank adapter to add to the weights."),
        click.option("--lora-scale", type=float, help="Its strength; 1 if not given."),
        memory_option,
        quantization_options,
        click.option("--bits", type=click.Choice(["8", "16"]), default="8", show_default=True, help="Per channel."),
        click.option("--compile", is_flag=True, help="Compile elementwise ops at the first image (experimental)."),
        threads_option,
        overwrite_option,
        json_option,
    ]
    for option in reversed(options):
        command = option(command)
    return command


def destinations(sources: Sequence[Path], out: Path | None, ending: str) -> list[Path]:
    """Where each result goes: `out` if it names an image, else `name<ending>.png` in the folder `out`, or beside it.

    Raises SettingError when several results would go to one place, FileError for a kind not written here.
    """
    if out is not None and out.suffix and not out.is_dir():
        if out.suffix.lower() not in SUFFIXES:
            raise FileError(f"{out} is no kind of image written here; end its name in {', '.join(SUFFIXES)}.")
        if len(sources) > 1:
            raise SettingError(f"{len(sources)} images cannot all be written to {out}; name a folder with --out.")
        return [out]
    places = [(out or source.parent) / f"{source.stem}{ending}.png" for source in sources]
    twins = sorted({place for place in places if places.count(place) > 1})
    if twins:
        raise SettingError(f"Several sources would be written to {twins[0]}; give them different names.")
    return places


@contextmanager
def _steps(label: str) -> Iterator[Callback]:
    """A step callback that draws a bar."""
    with progress(0, label) as bar:

        def callback(step: Step) -> None:
            bar.total = step.total
            bar.update(step.index - bar.n)

        yield callback


def _run(
    sources: Sequence[Path], wish: Wish, ending: str, make: Make, jobs: Callable[[CheckpointMetadata], list[Job]]
) -> None:
    """Make and save the images of one source after another, then say what was written."""
    from pidecode.engine import sequence_parallel
    from pidecode.engine.runner import Runner
    from pidecode.files import check_writable

    places = destinations(sources, wish.out, ending)
    for source in sources:
        if not source.is_file():
            raise FileError(f"There is no file {source}.")
    for place in places:
        if place.parent.exists():
            check_writable(place, overwrite=wish.overwrite)
        if wish.bits == "16" and place.suffix.lower() != ".png":
            raise SettingError(f"Only .png files hold 16 bits a channel; {place} does not.")
    parallel = sequence_parallel.init_process_group()  # under torchrun: each image is sharded, one process writes it
    decoder = wish.decoder(jobs)
    if parallel:
        if not isinstance(decoder.runner, Runner):
            raise SettingError(
                f"{decoder.name} is a feed-forward decoder, which runs in one process; leave torchrun out."
            )
        decoder.runner.sequence_parallel = True
    written: list[dict[str, Any]] = []
    for source, place in zip(sources, places, strict=True):
        began = time.perf_counter()
        with _steps(source.name) as callback:
            made = make(decoder, source, callback)
        if not sequence_parallel.is_main_process():
            continue
        decoded = time.perf_counter()
        place.parent.mkdir(parents=True, exist_ok=True)
        names = made.save(place, overwrite=wish.overwrite, bits=16 if wish.bits == "16" else 8)
        for name, metadata in zip(names, made.metadata, strict=True):
            kept: dict[str, Any] = {key: metadata[key] for key in ("width", "height", "seed") if key in metadata}
            written.append({"source": str(source), "image": str(name), **kept})
        timing = {"seconds": round(decoded - began, 2), "seconds_saving": round(time.perf_counter() - decoded, 2)}
        written[-1] |= timing
        if not wish.as_json:
            for line in written[-len(names) :]:
                click.echo(f"{line['image']}  {line['width']}x{line['height']}  {timing['seconds']:.1f} s")
    if wish.as_json and sequence_parallel.is_main_process():
        emit(written, "", as_json=True)
    sequence_parallel.destroy_process_group()


@click.command()
@click.argument("images", nargs=-1, required=True, type=_PATH)
@click.option(
    "--fit", type=click.Choice(["pad", "crop"]), default="pad", show_default=True, help="For sides that do not divide."
)
@_decoding_options
def upscale(images: tuple[Path, ...], fit: str, **options: Any) -> None:
    """Enlarge IMAGES: encode each to a latent, and decode that larger.

    Without --out, photo.jpg becomes photo-upscaled.png beside it. Existing files are left alone unless --overwrite.
    """
    wish = Wish(**options)

    def make(decoder: PixelDecoder, source: Path, callback: Callback) -> DecodeOutput:
        return decoder.upscale(source, fit=fit, callback=callback, **wish.settings())  # type: ignore[arg-type]

    _run(images, wish, "-upscaled", make, lambda identity: upscaled(images, identity))


@click.command()
@click.argument("latents", nargs=-1, required=True, type=_PATH)
@click.option("--size", metavar="WIDTHxHEIGHT", help="Of the image, if not the latent's natural size.")
@_decoding_options
def decode(latents: tuple[Path, ...], size: str | None, **options: Any) -> None:
    """Turn saved LATENTS (.safetensors) into images.

    Without --out, cat.safetensors becomes cat.png beside it. Existing files are left alone unless --overwrite.
    """
    wish = Wish(**options)
    pixels = None if size is None else parse_size(size)

    def make(decoder: PixelDecoder, source: Path, callback: Callback) -> DecodeOutput:
        from pidecode.latents.latent import Latent

        settings = wish.settings()
        if pixels is not None:
            settings["size"] = pixels
        latent = Latent.load(source, space=wish.space)
        return decoder.decode(latent, callback=callback, **settings)

    _run(latents, wish, "", make, lambda _: decoded(latents, wish.space, pixels))


@click.command()
@click.option("--size", required=True, metavar="WxH", help="Image to make, in pixels: 4096x3072.")
@click.option("--vram", metavar="BYTES", help="Memory of an accelerator: 12GB. Without it, what is free here.")
@click.option("--ram", metavar="BYTES", help="Plan for a processor with this much memory instead.")
@click.option(
    "--network",
    type=click.Choice(list(RELEASED_CONFIGS)),
    default="v1.5",
    show_default=True,
    help="`tiny`, or the version of PiD's released weights.",
)
@click.option("--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Images at once.")
@click.option("--dtype", metavar="NAME", help="float32, bfloat16 or float16; chosen to fit if not given.")
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
    """Say how an image would be decoded in the memory there is, or that it does not fit and what would."""
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
