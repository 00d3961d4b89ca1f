# SPDX-License-Identifier: Apache-2.0
"""The desk: takes files and options in, hands work to the queue, and gives finished files out."""

from __future__ import annotations

import io
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from PIL.Image import Image, Resampling
from torch import Tensor
from torch.nn import functional

from pidecode.decoder import PixelDecoder
from pidecode.errors import FileError, LatentError, SettingError
from pidecode.images import KEYWORD, encode_image, load_image, read_recipe, to_pil
from pidecode.latents import storage
from pidecode.latents.latent import Latent
from pidecode.sampling import Step
from pidecode.serve.estimate import Plan, plan
from pidecode.serve.queue import Job, JobQueue, Work
from pidecode.serve.schemas import MEDIA, DecodeOptions, Limits, Options, UpscaleOptions

PREVIEW_SIDE = 448
"""Longest side, in pixels, of a step preview."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A finished file, and what there is to say about it."""

    data: bytes
    media: str
    width: int
    height: int
    recipe: dict[str, Any]
    warnings: tuple[str, ...]
    seconds: float
    """Of work, the time in the line left out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileInfo:
    """What a file turned out to be. Sides are pixels of an image, cells of a latent."""

    kind: Literal["image", "latent"]
    width: int
    height: int
    space: str | None = None
    """Of a latent that says so."""
    sigma: float | None = None
    prompt: str | None = None
    recipe: dict[str, Any] | None = None


class TextToLatent(Protocol):
    """A diffusion pipeline, seen from the desk: a prompt becomes a latent of the decoder's space."""

    def __call__(
        self, prompt: str, *, width: int, height: int, seed: int, callback: Callable[[int, int], None]
    ) -> Latent:
        """width, height: pixels of the finished image. `callback(done, total)` may raise Cancelled."""


class DecodeService:
    """Decoders on one device behind one queue.

    decoders: by the name clients ask for; the first is the default. They must lie on the queue's one device.
    painter: makes latents from prompts, for the first decoder's space; None if there is no pipeline.
    """

    def __init__(
        self,
        decoders: Mapping[str, PixelDecoder],
        *,
        limits: Limits | None = None,
        painter: TextToLatent | None = None,
    ) -> None:
        if not decoders:
            raise SettingError("There is no model to serve; name at least one.")
        self.decoders = dict(decoders)
        self.limits = limits or Limits()
        self.queue = JobQueue(self.limits.waiting, limit=self.limits.seconds)
        self.painter = painter

    def pick(self, name: str | None) -> tuple[str, PixelDecoder]:
        """The decoder of that name, or the default. Raises SettingError with the names there are."""
        if name is None:
            name = next(iter(self.decoders))
        if name not in self.decoders:
            raise SettingError(f"There is no model {name[:80]!r} here; there are {', '.join(self.decoders)}.")
        return name, self.decoders[name]

    def look(self, data: bytes) -> FileInfo:
        """Say what a file is. Raises ImageError, FileError or LatentError if it is neither image nor latent."""
        if not looks_like_safetensors(data):
            image = load_image(data, max_pixels=self.limits.pixels)
            return FileInfo(kind="image", width=image.width, height=image.height, recipe=read_recipe(data))
        return _read_latent(data)

    def plan(self, name: str | None, looked: FileInfo, size: tuple[int, int] | None = None) -> Plan:
        """What a decode of such a file would need. Raises SizeError if it is larger than allowed."""
        _, decoder = self.pick(name)
        width, height = size or self._result_size(decoder, looked)
        self.limits.check_pixels(width, height)
        return plan(decoder, width, height)

    def _result_size(self, decoder: PixelDecoder, looked: FileInfo) -> tuple[int, int]:
        space = decoder.space
        if looked.kind == "latent":
            return looked.width * space.pixels_per_cell, looked.height * space.pixels_per_cell
        if space.fixed_input is not None:
            return space.fixed_input * decoder.scale, space.fixed_input * decoder.scale
        return looked.width * decoder.scale, looked.height * decoder.scale

    def decode(self, data: bytes, options: DecodeOptions, *, previews: bool = False) -> Job:
        """Put a latent file in the line; the job's result is a `Made`. Raises BusyError."""

        def work(job: Job) -> Made:
            _, decoder = self.pick(options.model)
            latent = parse_latent(data, options.space, decoder)
            settings = options.settings()
            height, width = latent.output_size
            self._check(decoder, *settings.get("size", (width, height)))
            return self._made(
                options, lambda: decoder.decode(latent, options.prompt, callback=_reporter(job, previews), **settings)
            )

        return self._submit(options, work)

    def upscale(self, data: bytes, options: UpscaleOptions, *, previews: bool = False) -> Job:
        """Put an image in the line; the job's result is a `Made`. Raises BusyError."""

        def work(job: Job) -> Made:
            _, decoder = self.pick(options.model)
            image = load_image(data, max_pixels=self.limits.pixels)
            looked = FileInfo(kind="image", width=image.width, height=image.height)
            self._check(decoder, *self._result_size(decoder, looked))
            scale = _checked_scale(decoder, options.scale)

            def make() -> Any:
                made = decoder.upscale(
                    image, options.prompt, fit=options.fit, callback=_reporter(job, previews), **options.settings()
                )
                assert isinstance(made, Image)
                return made if scale == decoder.scale else _reduced(made, scale, decoder.scale)

            return self._made(options, make)

        return self._submit(options, work)

    def generate(self, prompt: str, size: tuple[int, int], options: Options, *, previews: bool = False) -> Job:
        """Put a prompt in the line; size is that of the result, in pixels. Raises BusyError, SettingError."""
        painter = self.painter
        if painter is None:
            raise SettingError(
                "No image pipeline is set up here; start the server with --pipeline to paint from prompts."
            )

        def work(job: Job) -> Made:
            _, decoder = self.pick(options.model)
            self._check(decoder, *size)
            read = prompt if decoder.net.config.has_text else None

            def make() -> Any:
                latent = painter(
                    prompt,
                    width=size[0],
                    height=size[1],
                    seed=options.seed,
                    callback=lambda done, total: job.report(done=done, total=total, note="painting"),
                )
                return decoder.decode(latent, read, callback=_reporter(job, previews), **options.settings())

            return self._made(options, make)

        return self._submit(options, work)

    def stop(self, grace: float = 10.0) -> None:
        """End the queue: see `JobQueue.stop`."""
        self.queue.stop(grace)

    def _submit(self, options: Options, work: Work) -> Job:
        self.pick(options.model)
        options.settings()
        return self.queue.submit(work)

    def _check(self, decoder: PixelDecoder, width: int, height: int) -> None:
        self.limits.check_pixels(width, height)
        plan(decoder, width, height).require()

    def _made(self, options: Options, make: Callable[[], Any]) -> Made:
        began = time.perf_counter()
        # The queue's thread is the only one that decodes, so the warnings caught are this decode's.
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            image = make()
        if isinstance(image, list):
            raise SettingError(f"The file holds {len(image)} latents; send one at a time, or use `pidecode batch`.")
        recipe = image.info.get(KEYWORD)
        data = encode_image(image, options.format, recipe=recipe)
        told = dict.fromkeys(
            str(entry.message)
            for entry in caught
            if "pidecode" in entry.category.__module__ or entry.category is UserWarning
        )
        return Made(
            data=data,
            media=MEDIA[options.format],
            width=image.width,
            height=image.height,
            recipe=dict(recipe or {}),
            warnings=tuple(told),
            seconds=time.perf_counter() - began,
        )


def _checked_scale(decoder: PixelDecoder, scale: int | None) -> int:
    if scale is not None and scale > decoder.scale:
        raise SettingError(
            f"scale is {scale}; this model enlarges {decoder.scale} times, so it must be 1 to {decoder.scale}."
        )
    return decoder.scale if scale is None else scale


def _reduced(image: Image, scale: int, made_at: int) -> Image:
    """The image at `scale` instead of `made_at` times its origin's size; its recipe says so."""
    width, height = (max(1, round(side * scale / made_at)) for side in image.size)
    small = image.resize((width, height), Resampling.LANCZOS)
    recipe = image.info.get(KEYWORD)
    if recipe:
        small.info[KEYWORD] = {**recipe, "width": width, "height": height, "reduced_to_scale": scale}
    return small


def looks_like_safetensors(data: bytes) -> bool:
    """Whether the bytes begin as a .safetensors file does: a short header length, then a JSON object."""
    return data[8:9] == b"{" and int.from_bytes(data[:8], "little") < 1 << 32


def parse_latent(data: bytes, space: str | None, decoder: PixelDecoder) -> Latent:
    """The one latent in a file. Raises FileError or LatentError, SettingError for an unknown space.

    A file that does not say its space is refused unless `space` says it, even where one decoder alone would fit:
    two spaces may share a number of channels.
    """
    if not looks_like_safetensors(data):
        raise FileError("The body is no .safetensors file; send one that holds a latent, or an image to /v1/upscale.")
    latent = Latent.load(data, space=space)
    if len(latent) != 1:
        raise SettingError(f"The file holds {len(latent)} latents; send one at a time, or use `pidecode batch`.")
    return latent.to(decoder.device)


def _read_latent(data: bytes) -> FileInfo:
    stored = storage.read_latent(data)
    tensor, record = stored.tensor, stored.record
    if tensor.ndim != 4:
        raise LatentError(f"A latent is [1, channels, h, w]; the file holds {list(tensor.shape)}.")
    return FileInfo(
        kind="latent",
        width=tensor.shape[3],
        height=tensor.shape[2],
        space=record.space if record else None,
        sigma=record.sigma[0] if record else None,
        prompt=record.prompt[0] if record and record.prompt else None,
    )


def _reporter(job: Job, previews: bool) -> Callable[[Step], None]:
    """A step callback that passes progress on, with a small image if anyone looks."""

    def callback(step: Step) -> None:
        preview = small_image(step.image) if previews else None
        job.report(done=step.index, total=step.total, note="decoding", preview=preview)

    return callback


def small_image(pixels: Tensor, side: int = PREVIEW_SIDE) -> bytes:
    """`[B, 3, H, W]` in [-1, 1] as a small JPEG of its first image, for a look in passing."""
    height, width = pixels.shape[-2:]
    factor = max(1, math.ceil(max(height, width) / side))
    one = pixels[:1].float()
    if factor > 1:
        one = functional.avg_pool2d(one, factor, ceil_mode=True)
    buffer = io.BytesIO()
    to_pil(one.clamp(-1, 1)).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
