# SPDX-License-Identifier: Apache-2.0
"""A worker of a batch: processes one job at a time from its source to its image; a failure stays with its job."""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image

from pidecode import images
from pidecode.batch.jobs import BatchJob
from pidecode.batch.report import JobResult
from pidecode.decoder import PixelDecoder
from pidecode.errors import DoesNotFitError, FileError, PidecodeError, is_out_of_memory
from pidecode.images.png import SIGNATURE
from pidecode.images.write import animated_format
from pidecode.latents.latent import Latent
from pidecode.options import Attention, DecodeOptions, RuntimeOptions, option_infos
from pidecode.sampling import Progress
from pidecode.units import printable
from pidecode.weights.resolve import default_encoder_path, resolve_checkpoint
from pidecode.weights.safetensors import sha256

FINGERPRINT = "batch"  # entry of an image's metadata that holds the fingerprint of its job

JobProgressCallback = Callable[[BatchJob, Progress], None]  # as `progress_callback` of a decode, with the job

# Characters of a fingerprint that hash the settings, then so many for the source's content; its place follows.
_SETTINGS, _JOB = 20, 40

BYTES_PER_PIXEL = 32  # that the file of a source may have for each of the most pixels read

READ_QUEUE, WRITE_QUEUE = 2, 2  # jobs read ahead, and decoded ones that may wait to be written


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What all jobs of a batch share; plain values, which are sent to other machines."""

    model: str = "tiny"  # A model's name, file or folder, as `PixelDecoder.from_pretrained` takes it
    space: str | None = None  # latent space, where the weights do not say
    variant: str | None = None  # variant of a model that has several
    device: str | None = None  # device, or None to choose
    dtype: str | None = None  # number format by torch's name, or None to choose
    compile: bool = False  # whether to run compiled
    attention: Attention = "auto"  # attention kernel
    # Decode options; a manifest may override them for a job.
    options: DecodeOptions = field(default_factory=DecodeOptions)
    bits: int = 8  # bits per channel of the images, 8 or 16
    quality: int | None = None  # quality of WebP and JPEG files
    overwrite: bool = False  # whether images that exist are made again
    strip: bool = False  # whether what a source carries (EXIF, texts, resolution) is left out of its image
    keep_profile: bool = False  # whether a source's colors and profile are kept instead of converted to sRGB
    max_pixels: int = images.MAX_PIXELS  # largest source read
    weights: str = ""  # content hash of the weights, from `hash_weights`

    def hash_weights(self) -> str:
        """A hash of the content of the weights, and of those of the encoder for images."""
        resolved = resolve_checkpoint(self.model, space=self.space, variant=self.variant)
        encoder = resolved.encoder or default_encoder_path(resolved.space)
        files = [resolved.path]
        if encoder is not None:
            files += sorted(path for path in encoder.rglob("*") if path.is_file()) if encoder.is_dir() else [encoder]
        return hashlib.sha256(" ".join(map(_content_hash, files)).encode()).hexdigest()

    def load_decoder(self) -> PixelDecoder:
        """Load the decoder; raises as `PixelDecoder.from_pretrained` does."""
        return PixelDecoder.from_pretrained(
            self.model, space=self.space, variant=self.variant, device=self.device,
            dtype=getattr(torch, self.dtype) if self.dtype else None,
            runtime=RuntimeOptions(compile=self.compile, attention=self.attention),
        )  # fmt: skip

    def options_of(self, job: BatchJob) -> DecodeOptions:
        """The decode options of one job: those of the batch that belong to its command, overridden by its own.

        A folder may hold images and latents, so an option of the batch for one of them is left out for the other; an
        option of the job itself that cannot act is refused by the decoder.
        """
        acting = set(option_infos(command=job.command))
        if {"size", "scale"} & set(job.options):  # a job's own size takes the place of the batch's scale
            acting -= {"size", "scale"}
        inherited = {name: getattr(self.options, name) for name in acting}
        return DecodeOptions(**{**inherited, **job.options})

    def fingerprint(self, job: BatchJob) -> str:
        """Hashes of what determines a job's image: of weights and decode options, of its source, and of where that is.

        The device and the number format are left out: a batch may be finished on another machine. Files among the
        options count by their content.
        """
        identity = {
            "weights": self.weights, "model": [self.space, self.variant], "bits": self.bits,
            "reading": [self.strip, self.keep_profile],
            "options": {name: value for name, value in asdict(self.options_of(job)).items() if value is not None},
        }  # fmt: skip
        if self.quality is not None:
            identity["quality"] = self.quality
        settings = hashlib.sha256(json.dumps(identity, sort_keys=True, default=sha256).encode()).hexdigest()
        place = hashlib.sha256(os.fsencode(os.path.realpath(job.source))).hexdigest()
        return settings[:_SETTINGS] + sha256(job.source)[: _JOB - _SETTINGS] + place[:8]


def _content_hash(path: Path) -> str:
    """SHA-256 of a file; the hub's cache names large files by it already."""
    blob = path.resolve()
    return blob.name if blob.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", blob.name) else sha256(path)


OutputState = Literal["missing", "done", "damaged", "outdated"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutputs:
    """The files of a job, and which of them are to be written."""

    fingerprint: str  # of the job
    paths: list[Path]  # all files
    missing: list[int]  # indices of those that are missing, damaged, outdated or, with `overwrite`, to be made again


def job_outputs(job: BatchJob, config: WorkerConfig) -> JobOutputs:
    """What a job writes and what of it is missing; PidecodeError for its own error, or another file in the way."""
    if job.error is not None:
        raise job.error
    paths = job.outputs()
    most = BYTES_PER_PIXEL * config.max_pixels
    if job.command == "upscale" and job.source.stat().st_size > most:  # it would be read whole to know its content
        raise FileError(
            f"{job.source} has more than {most:,} bytes, the most that are read with max_pixels={config.max_pixels}. "
            "Write it anew without what is not the image, or raise max_pixels."
        )
    fingerprint = config.fingerprint(job)
    states = ["missing" if config.overwrite else _state(path, fingerprint, job) for path in paths]
    missing = [index for index, state in enumerate(states) if state != "done"]
    return JobOutputs(fingerprint=fingerprint, paths=paths, missing=missing)


def _state(path: Path, fingerprint: str, job: BatchJob) -> OutputState:
    """Whether an output exists, is whole, and was made of the source as it is now; FileError for another file there."""
    # A file that a batch wrote is damaged if it is cut or empty, as after a power cut, and outdated if it was made with
    # the same settings of the same source file, whose content has changed since.
    if not path.exists():
        return "missing"
    if not path.is_file():  # a pipe would block forever
        raise FileError(f"{path} is no regular file, and in the way. Remove it, or choose another output folder.")
    what = "was not made by a batch"
    try:
        metadata = images.read_metadata(path) if _is_complete(path) else None
        found = str((metadata or {}).get(FINGERPRINT, ""))
        if found[:_JOB] == fingerprint[:_JOB]:
            return "done"
        if found:
            what = "was made with other options or weights"
        if metadata is not None and found[:_SETTINGS] == fingerprint[:_SETTINGS]:
            if found[_JOB:] == fingerprint[_JOB:]:
                return "outdated"
            what = f"was made of another source, {metadata.get('source')} in another place than {job.source}"
        if metadata is None and _is_remains(path):
            return "damaged"
    except (PidecodeError, OSError):
        if _is_remains(path, unreadable=True):
            return "damaged"
    raise FileError(f"{path} exists and {what}. Replace it with overwrite=True, or choose another output folder.")


def _is_remains(path: Path, *, unreadable: bool = False) -> bool:
    """Whether a damaged file is what is left of a batch's image; `unreadable` says that its metadata are damaged.

    Signs are its entry in the metadata, nothing but zeros, or a WebP that announces metadata, which are its last part.
    """
    with open(path, "rb") as file:
        start = file.read(1 << 16)
        file.seek(max(0, path.stat().st_size - (1 << 16)))
        ours = f'"{FINGERPRINT}": "'.encode() in start + file.read()
    announced = start[8:16] == b"WEBPVP8X" and len(start) > 20 and start[20] & 8
    return not any(start) or (ours and unreadable) or (bool(ours or announced) and not _is_complete(path))


def _is_complete(path: Path) -> bool:
    """Whether an image file has its end; a PNG also its chunks' checksums, a WebP all chunks and its EXIF."""
    with open(path, "rb") as file:
        start = file.read(12)
        if start.startswith(b"RIFF"):
            end, at = 8 + int.from_bytes(start[4:8], "little"), len(start)
            while at < end and len(head := file.read(8)) == 8 and head[:4].isalnum() | (head[3:4] == b" "):
                size = int.from_bytes(head[4:], "little")
                if head[:4] == b"EXIF" and not any(file.peek(size)[:size]):
                    return False
                at = file.seek(size + size % 2, 1)
            return at >= end and path.stat().st_size >= end
        for begin, last in ((b"GIF8", b";"), (b"\xff\xd8", b"\xff\xd9")):  # GIF, JPEG
            if start.startswith(begin):
                file.seek(-len(last), os.SEEK_END)
                return file.read() == last
        file.seek(len(SIGNATURE))
        left = path.stat().st_size - len(SIGNATURE)
        while start.startswith(SIGNATURE) and len(head := file.read(8)) == 8:
            size, kind = struct.unpack(">I4s", head)
            left -= size + 12
            data = b"" if left < 0 else file.read(size)
            if left < 0 or struct.pack(">I", zlib.crc32(kind + data)) != file.read(4):
                return False
            if kind == b"IEND":
                return True
    return False


def result_without_decoding(job: BatchJob, config: WorkerConfig) -> JobResult | None:
    """The result of a job that is done already, or impossible; None if it needs decoding."""
    began = time.perf_counter()
    try:
        return None if job_outputs(job, config).missing else JobResult(name=job.name, state="skipped", seconds=0.0)
    except Exception as error:  # whatever a name or a file provokes stays with its job
        return failed(job, error, time.perf_counter() - began)


def failed(job: BatchJob, error: Exception, seconds: float) -> JobResult:
    """The result of a job that raised `error`."""
    if is_out_of_memory(error):
        error = DoesNotFitError("There was not enough memory for it. Decode it alone, smaller, or on a larger device.")
    kind = type(error).__name__
    message = error.message("cli") if isinstance(error, PidecodeError) else f"{kind}: {error}".removesuffix(": ")
    return JobResult(name=job.name, state="failed", seconds=seconds, error=kind, message=message)


@dataclass(slots=True, kw_only=True)
class _Decoded:
    """One job on its way from its source to its images, which wait to be written."""

    job: BatchJob
    began: float
    outputs: JobOutputs | None = None
    source: Latent | images.SourceImage | images.Frames | None = None
    waiting: list[tuple[Path, images.DecodeOutput | images.Animation]] = field(default_factory=list)
    written: int = 0
    pixels: int = 0
    error: Exception | None = None

    @contextmanager
    def keeping_errors(self) -> Iterator[None]:
        """One failure must not stop the other jobs."""
        try:
            yield
        except Exception as error:
            self.error = self.error or error

    def add(self, path: Path, output: images.DecodeOutput) -> None:
        """Keep the one image of `output` for `path`, with its source and fingerprint in its metadata."""
        self.waiting.append((path, replace(output, metadata=(self.identified(output.metadata[0]),))))

    def identified(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Metadata with what they tell a later batch: the fingerprint first, where a cut file still has it."""
        assert self.outputs is not None
        return {FINGERPRINT: self.outputs.fingerprint, **metadata, "source": printable(self.job.name)}


class Worker:
    """A decoder, given or loaded as the configuration says, that processes jobs one at a time."""

    def __init__(
        self, config: WorkerConfig, decoder: PixelDecoder | None = None, on_progress: JobProgressCallback | None = None
    ) -> None:
        self.config, self.on_progress = config, on_progress
        self.decoder = decoder or config.load_decoder()

    def process(self, job: BatchJob) -> JobResult:
        """Process one job; an error becomes its result."""
        return self._write(self._decode(self._read(job)))

    def process_all(self, jobs: Iterable[BatchJob], on_result: Callable[[JobResult], None]) -> None:
        """Process jobs in order: one thread reads ahead and one writes while this one decodes.

        What is decoded when an exception (Ctrl-C) ends the work is written, and `on_result` called for it.
        """
        read: deque[Future[_Decoded]] = deque()
        written: deque[Future[JobResult]] = deque()

        def decode_next() -> None:
            written.append(writer.submit(self._write, self._decode(read.popleft().result())))
            report(WRITE_QUEUE)

        def report(limit: int) -> None:
            while len(written) > limit:
                result = written[0].result()
                written.popleft()
                on_result(result)

        with ThreadPoolExecutor(1, "pidecode-reader") as reader, ThreadPoolExecutor(1, "pidecode-writer") as writer:
            try:
                for job in jobs:
                    read.append(reader.submit(self._read, job))
                    if len(read) > READ_QUEUE:
                        decode_next()
                while read:
                    decode_next()
            finally:
                report(0)

    def _read(self, job: BatchJob) -> _Decoded:
        """Check what a job misses, and read its source."""
        decoded = _Decoded(job=job, began=time.perf_counter())
        with decoded.keeping_errors():
            decoded.outputs = job_outputs(job, self.config)
            if decoded.outputs.missing:
                decoded.source = self._load_source(job)
        return decoded

    def _load_source(self, job: BatchJob) -> Latent | images.SourceImage | images.Frames:
        """The source of a job; its image is within the limits of its file format."""
        options, limit = self.config.options_of(job), self.config.max_pixels
        if job.kind == "latent":
            latent = Latent.load(job.source, space=self.config.space)
            height, width = latent.output_size
            images.check_format(job.out, *self.decoder.decoded_size((width, height), options))
            return latent
        frames = images.frames_in(job.source, max_pixels=limit)
        for size in frames.sizes if frames else [images.image_size(job.source, max_pixels=limit)]:
            images.check_format(job.out, *self.decoder.upscaled_size(size, options))
        if frames is None:
            return images.read_image(job.source, max_pixels=limit, keep_profile=self.config.keep_profile)
        if frames.durations:
            animated_format(job.out)
        return frames

    def _upscale(self, decoded: _Decoded, image: images.SourceImage, progress: Any) -> images.DecodeOutput:
        image = image.stripped() if self.config.strip else image
        return self.decoder.upscale(image, options=self.config.options_of(decoded.job), progress_callback=progress)

    def _decode(self, decoded: _Decoded) -> _Decoded:
        outputs, source = decoded.outputs, decoded.source
        if outputs is None or source is None:  # it failed, or a worker that died had finished it
            return decoded
        with decoded.keeping_errors():
            options = self.config.options_of(decoded.job)
            progress = None if self.on_progress is None else partial(self.on_progress, decoded.job)
            if isinstance(source, images.Frames):
                self._upscale_frames(decoded, source, outputs)
            elif isinstance(source, images.SourceImage):
                decoded.add(outputs.paths[0], self._upscale(decoded, source, progress))
            else:
                draws_noise = self.decoder.kind in option_infos()["seed"].kinds
                first_seed = options.seeds(1)[0] if draws_noise else None
                for index in outputs.missing:  # one by one: that one image fits in memory does not mean that all do
                    if first_seed is not None:
                        options = replace(options, seed=first_seed + index)
                    output = self.decoder.decode(source[index], options=options, progress_callback=progress)
                    decoded.add(outputs.paths[index], output)
        return decoded

    def _upscale_frames(self, decoded: _Decoded, frames: images.Frames, outputs: JobOutputs) -> None:
        """Upscale an animation, or the pages of a document, which are written at once: all may not fit in memory."""
        config, what = self.config, "frame" if frames.durations else "page"
        read = images.read_frames(decoded.job.source, max_pixels=config.max_pixels, keep_profile=config.keep_profile)
        upscaled: list[Image.Image] = []
        for index, image in enumerate(read):
            if not frames.durations and index not in outputs.missing:
                continue

            def progress(now: Progress, index: int = index) -> None:
                if self.on_progress is not None:
                    self.on_progress(decoded.job, now.of_part(what, index, len(frames)))

            output = self._upscale(decoded, image, progress)
            if frames.durations:
                upscaled += output.images
            else:
                decoded.add(outputs.paths[index], output)
                self._save(decoded)
        if upscaled:
            upscaled[0].info[images.KEYWORD] = decoded.identified(upscaled[0].info[images.KEYWORD])
            decoded.waiting.append((outputs.paths[0], images.Animation(upscaled, frames)))

    def _save(self, decoded: _Decoded) -> None:
        """Write the images that wait."""
        while decoded.waiting:
            path, output = decoded.waiting.pop(0)
            path.parent.mkdir(parents=True, exist_ok=True)
            assert decoded.outputs is not None
            overwrite = self.config.overwrite
            state = "damaged" if overwrite else _state(path, decoded.outputs.fingerprint, decoded.job)
            if state != "done":  # else written by another run meanwhile
                bits, quality = cast(Literal[8, 16], self.config.bits), self.config.quality
                output.save(path, overwrite=state in ("damaged", "outdated"), bits=bits, quality=quality)
            decoded.written += 1
            decoded.pixels += output.num_pixels

    def _write(self, decoded: _Decoded) -> JobResult:
        with decoded.keeping_errors():
            self._save(decoded)
        seconds = time.perf_counter() - decoded.began
        if decoded.error is not None:
            return failed(decoded.job, decoded.error, seconds)
        done, megapixels = decoded.written, decoded.pixels / 1e6
        return JobResult(name=decoded.job.name, state="done", seconds=seconds, images=done, megapixels=megapixels)
