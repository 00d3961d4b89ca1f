# SPDX-License-Identifier: Apache-2.0
"""The decode service: takes files and options, runs them as jobs of one queue, and returns finished files."""

from __future__ import annotations

import io
import math
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional

from pidecode import images
from pidecode.decoder import PixelDecoder
from pidecode.devices import free_memory
from pidecode.engine.runner import require_memory
from pidecode.errors import FileError, LatentError, MissingDependencyError, SettingError
from pidecode.latents import storage
from pidecode.latents.latent import Latent
from pidecode.sampling import Progress, Step
from pidecode.serve import schemas
from pidecode.serve.queue import DecodeJob, JobQueue
from pidecode.weights.safetensors import looks_like_safetensors

PREVIEW_SIDE = 448  # longest side of a preview, in pixels
WARM_UP_IMAGE = b"P6 96 96 255\n" + bytes(96 * 96 * 3)
LEAST_PIXELS = 256 * 256  # of a result whose time grows with its pixels; a smaller one takes as long
INSPECTIONS_WAITING = 7  # files that may wait to be inspected
RESULTS_KEPT = 4
RESULT_SECONDS = 300.0  # how long a streamed job's result can be fetched
MAX_SHOWN = 20_000  # characters of a text of another program that the page shows


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A finished image file."""

    data: bytes  # the file
    media_type: str  # its media type, such as "image/png"
    width: int  # in pixels
    height: int  # in pixels
    metadata: dict[str, Any]  # what is written into the file
    warnings: tuple[str, ...]  # messages of warnings raised by the decode
    seconds: float  # time the job ran, without waiting


class Speeds:
    """Seconds a pixel, by model and by the options that time depends on, from the newest job of each kind."""

    def __init__(self) -> None:
        self._speeds: dict[tuple[Any, ...], float] = {}

    def predict(self, name: str, params: schemas.ResultParams, size: tuple[int, int]) -> float | None:
        """Seconds that a result of that size will take; None where no such job was seen."""
        speed = self._speeds.get(self._key(name, params))
        return None if speed is None else speed * max(size[0] * size[1], LEAST_PIXELS)

    def learn(self, name: str, params: schemas.ResultParams, size: tuple[int, int], seconds: float) -> None:
        """Note what a job took."""
        self._speeds[self._key(name, params)] = seconds / max(size[0] * size[1], LEAST_PIXELS)

    def _key(self, name: str, params: schemas.ResultParams) -> tuple[Any, ...]:
        options = dict(params)  # an option that the endpoint does not have is not there
        return name, isinstance(params, schemas.UpscaleParams), options.get("num_steps"), options.get("guidance_scale")


class TextToLatent(Protocol):
    """A diffusion pipeline that makes a latent of the first decoder's space from a prompt."""

    def __call__(
        self, prompt: str, *, width: int, height: int, seed: int, callback: Callable[[int, int], None]
    ) -> Latent:
        """Generate one latent for a result of that size; called back with steps done and in total, which may raise."""


def _on_background(image: images.SourceImage, background: str, format: str) -> images.SourceImage:
    if background == "transparent" and (image.alpha is None or format not in ("png", "webp")):
        what = f"{format} holds no transparency" if image.alpha is not None else "the image has no transparent parts"
        raise SettingError(f"background is transparent, and {what}; nothing is cut out. Leave it out.")
    if background != "opaque" or image.alpha is None:
        return image
    return replace(image, tensor=image.on_white(), alpha=None)


class DecodeService:
    """Decoders on one device behind one queue.

    Args:
        decoders: By the name that clients use; the first is the default. All must be on one device.
        limits: Limits of requests and of the queue.
        text_to_latent: Makes latents of the first decoder's space from prompts, if there is a pipeline.
    """

    def __init__(
        self,
        decoders: Mapping[str, PixelDecoder],
        *,
        limits: schemas.RequestLimits | None = None,
        text_to_latent: TextToLatent | None = None,
    ) -> None:
        if not decoders:
            raise SettingError("There is no model to serve; name at least one.")
        self.decoders = dict(decoders)
        self.limits = limits or schemas.RequestLimits()
        self.queue = JobQueue(self.limits.waiting, timeout=self.limits.job_seconds)
        self.inspections = JobQueue(INSPECTIONS_WAITING)
        self.text_to_latent = text_to_latent
        # Streamed jobs by their id: those in the queue, and the newest finished ones until their result is fetched.
        self.streamed: dict[str, DecodeJob] = {}
        self.speeds = Speeds()

    def decoder(self, name: str | None) -> PixelDecoder:
        """The decoder of that name, or the first. Raises SettingError if there is none of that name."""
        if name is None:
            return next(iter(self.decoders.values()))
        if name not in self.decoders:
            raise SettingError(f"There is no model {name[:80]!r} here; there are {', '.join(self.decoders)}.")
        return self.decoders[name]

    def inspect(self, data: bytes) -> schemas.FileInfo:
        """What a file contains. Raises FileError or LatentError if it is no readable image or latent."""
        if not looks_like_safetensors(data):
            width, height = images.image_size(data, max_pixels=self.limits.pixels)
            texts: dict[str, str] = {}
            if width * height * self.decoder(None).scale ** 2 <= self.limits.pixels:  # else refused by its plan
                with warnings.catch_warnings():  # the job reports them
                    warnings.simplefilter("ignore")
                    known = images.read_image(data, max_pixels=self.limits.pixels).attributes  # so it is complete
                texts = {**known.texts, **({"Comment": known.comment} if known.comment else {})}
                texts = {name: text[:MAX_SHOWN] for name, text in texts.items()}
            return schemas.FileInfo(
                kind="image", width=width, height=height, metadata=images.read_metadata(data), texts=texts
            )
        stored = storage.read_latent(data)
        tensor, record = stored.tensor, stored.metadata
        if not 3 <= tensor.ndim <= 5:  # `Latent.load` adds a missing batch axis, and drops that of a single frame
            raise LatentError(f"A latent is [1, channels, h, w]; the file holds {list(tensor.shape)}.")
        return schemas.FileInfo(
            kind="latent", width=tensor.shape[-1], height=tensor.shape[-2], space=record.space if record else None,
            sigma=record.sigma[0] if record else None, prompt=record.prompt[0] if record and record.prompt else None,
        )  # fmt: skip

    def plan(self, name: str | None, file: schemas.FileInfo, size: tuple[int, int] | None = None) -> schemas.DecodePlan:
        """Estimate the decode of a file to its natural size or another; SizeError for a result that is too large.

        The memory for encoding an image or a prompt, which comes before, is not counted.
        """
        decoder = self.decoder(name)
        cell = decoder.space.pixels_per_cell
        natural, params = (file.width * cell, file.height * cell), schemas.ResultParams()
        if file.kind == "image":
            natural, params = decoder.upscaled_size((file.width, file.height)), schemas.UpscaleParams()
        width, height = size or natural
        self.limits.check_pixels(width, height)
        tensors = (*decoder.net.parameters(), *decoder.net.buffers())
        working = decoder.runner.plan_for(padded_size(decoder, width, height), 1).working
        free = free_memory(decoder.device)
        return schemas.DecodePlan(
            width=width, height=height, weights=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
            working=working, free=free, fits=free is None or working <= free,
            seconds=self.speeds.predict(name or next(iter(self.decoders)), params, (width, height)),
        )  # fmt: skip

    def warm_up(self) -> None:
        """Queue a small upscale by each feed-forward decoder: it loads the encoder and measures this machine."""
        for name, decoder in self.decoders.items():
            if decoder.kind == "feed-forward" and decoder.encoder is not None:
                for _ in range(min(2, self.queue.free_slots)):  # the first time it loads, the second it is measured
                    self.upscale(WARM_UP_IMAGE, schemas.UpscaleParams(model=name))

    def decode(self, data: bytes, params: schemas.DecodeParams) -> DecodeJob:
        """Queue the decode of a latent file; only errors of the options are raised here, the others by the job."""
        options, decoder = params.options(), self.decoder(params.model)

        def run(job: DecodeJob) -> Result:
            latent = load_latent(data, params.space, decoder)
            height, width = latent.output_size
            size = decoder.decoded_size((width, height), options)
            native = (width, height) if decoder.kind == "feed-forward" else size
            self._check_size(decoder, *native)
            images.check_format(f".{params.format}", *size)
            decode = partial(decoder.decode, latent, options=options, **_callbacks(job, params.stream))
            return self._timed_result(job, params, native, decode)

        return self.queue.submit(run)

    def upscale(self, data: bytes, params: schemas.UpscaleParams, background: str = "auto") -> DecodeJob:
        """Queue the enlargement of an image file, put on white if `background` is opaque; errors as of `decode`."""
        options, decoder = params.options(), self.decoder(params.model)

        def run(job: DecodeJob) -> Result:
            size = images.image_size(data, max_pixels=self.limits.pixels)
            native = decoder.upscaled_size(size)
            self._check_size(decoder, *native)  # before anything is decompressed
            images.check_format(f".{params.format}", *decoder.upscaled_size(size, options))
            image = _on_background(images.read_image(data, max_pixels=self.limits.pixels), background, params.format)
            upscale = partial(decoder.upscale, image, options=options, **_callbacks(job, params.stream))
            return self._timed_result(job, params, native, upscale)

        return self.queue.submit(run)

    def generate(self, prompt: str, size: tuple[int, int], params: schemas.ResultParams) -> DecodeJob:
        """Queue the generation of an image from a prompt. Raises MissingDependencyError if there is no pipeline."""
        options, decoder, text_to_latent = params.options(), self.decoder(params.model), self.text_to_latent
        if text_to_latent is None:
            raise MissingDependencyError(
                "This server has no text-to-image pipeline. Start it with --pipeline, or send a latent to /v1/decode "
                "or an image to /v1/upscale."
            )

        def run(job: DecodeJob) -> Result:
            self._check_size(decoder, *size)

            def report(step: int, num_steps: int) -> None:
                done = step / num_steps / 2  # how long the decode will take beside it is not known
                activity = f"generating, step {step} of {num_steps}"
                job.report(step=step, num_steps=num_steps, activity=activity, done=done)

            def generate() -> images.DecodeOutput:
                seed = options.seeds(1)[0]
                latent = text_to_latent(prompt, width=size[0], height=size[1], seed=seed, callback=report)
                used = replace(
                    options,
                    prompt=prompt if decoder.reads_text else None,
                    seed=None if decoder.kind == "feed-forward" else options.seed,  # it acted on the pipeline
                )
                return decoder.decode(latent, options=used, **_callbacks(job, params.stream, begin=0.5))

            return _result(params, generate)

        return self.queue.submit(run)

    def keep_streamed(self, job: DecodeJob) -> None:
        """Keep a streamed job, and forget those that failed, and results that are old or many."""
        old = time.monotonic() - RESULT_SECONDS
        done = [one for one in self.streamed.values() if one.state == "done" and (one.ended or 0.0) > old]
        kept = [one for one in self.streamed.values() if not one.over] + done[-RESULTS_KEPT:]
        self.streamed = {one.id: one for one in (*kept, job)}

    def stop(self, grace: float = 10.0) -> None:
        """Stop both queues: see `JobQueue.stop`."""
        self.queue.stop(grace)
        self.inspections.stop()  # last: it waits for the file that is being inspected

    def _timed_result(
        self,
        job: DecodeJob,
        params: schemas.ResultParams,
        size: tuple[int, int],
        decode: Callable[[], images.DecodeOutput],
    ) -> Result:
        """Run a decode with a prediction of its time, and learn from the time it took."""
        name = params.model or next(iter(self.decoders))
        job.expected_seconds = self.speeds.predict(name, params, size)
        result = _result(params, decode)
        self.speeds.learn(name, params, size, result.seconds)
        return result

    def _check_size(self, decoder: PixelDecoder, width: int, height: int) -> None:
        self.limits.check_pixels(width, height)
        require_memory(decoder.runner, padded_size(decoder, width, height), 1)


def padded_size(decoder: PixelDecoder, width: int, height: int) -> tuple[int, int]:
    """Size at which an image is decoded: padded to whole cells of the latent, and cut back only after the decode."""
    cell = decoder.space.pixels_per_cell
    return -(-width // cell) * cell, -(-height // cell) * cell


def load_latent(data: bytes, space: str | None, decoder: PixelDecoder) -> Latent:
    """Read the one latent of a file. Raises FileError, LatentError or SettingError for anything else."""
    if not looks_like_safetensors(data):
        raise FileError("The body is no .safetensors file; send one that holds a latent, or an image to /v1/upscale.")
    latent = Latent.load(data, space=space)  # the decoder's space is no guess: two may have the same channels
    if len(latent) != 1:
        raise SettingError(f"The file holds {len(latent)} latents; send one at a time, or use `pidecode batch`.")
    return latent.to(decoder.device)


def encode_preview(pixels: Tensor) -> bytes:
    """Encode the first image of `[B, 3, H, W]` in [-1, 1] as a JPEG with sides of at most `PREVIEW_SIDE` pixels."""
    factor = math.ceil(max(pixels.shape[-2:]) / PREVIEW_SIDE)
    first = functional.avg_pool2d(pixels[:1].float(), factor, ceil_mode=True)
    buffer = io.BytesIO()
    images.to_pil(first.clamp(-1, 1)).save(buffer, "JPEG", quality=82)
    return buffer.getvalue()


def _callbacks(job: DecodeJob, previews: bool, begin: float = 0.0) -> dict[str, Any]:
    """Callbacks of a decode that report progress from the share `begin` on, and a preview after each step if asked."""

    def step_done(step: Step) -> None:
        job.report(step=step.index, num_steps=step.total, preview=encode_preview(step.image) if previews else None)

    def progress(now: Progress) -> None:
        job.report(activity=str(now), done=begin + (1 - begin) * now.done)

    return {"callback": step_done, "progress_callback": progress}


def _result(params: schemas.ResultParams, decode: Callable[[], images.DecodeOutput]) -> Result:
    """Run a decode and encode its image as a file."""
    started = time.perf_counter()
    # Only the queue's thread decodes, so the warnings caught here are this decode's.
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        image = decode().image
    data = images.encode_image(image, params.format, quality=params.quality)
    messages = dict.fromkeys(
        str(entry.message)
        for entry in caught
        if "pidecode" in entry.category.__module__ or entry.category is UserWarning
    )
    return Result(
        data=data, media_type=schemas.MEDIA_TYPES[params.format], width=image.width, height=image.height,
        metadata=dict(image.info.get(images.KEYWORD) or {}), warnings=tuple(messages),
        seconds=time.perf_counter() - started,
    )  # fmt: skip
