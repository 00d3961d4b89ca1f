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
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image

from pidecode.batch.jobs import BatchJob
from pidecode.batch.report import JobResult
from pidecode.decoder import PixelDecoder
from pidecode.errors import DoesNotFitError, FileError, PidecodeError, is_out_of_memory
from pidecode.images import (
    KEYWORD,
    MAX_PIXELS,
    Animation,
    DecodeOutput,
    Frames,
    check_format,
    frames_in,
    image_size,
    read_frames,
    read_image,
    read_metadata,
)
from pidecode.images.png import SIGNATURE
from pidecode.images.read import SourceImage
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
    max_pixels: int = MAX_PIXELS  # largest source read
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
            "weights": self.weights, "model": [self.space, self.variant],
            "bits": self.bits,
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
    """What a job writes and what of it is missing.

    Raises:
        FileError: The source cannot be read, or a file with another fingerprint is in the way and `config.overwrite`
            is False.
        PidecodeError: The job's own error.
    """
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
    missing = [
        index for index, path in enumerate(paths) if config.overwrite or _state(path, fingerprint, job) != "done"
    ]
    return JobOutputs(fingerprint=fingerprint, paths=paths, missing=missing)


def _state(path: Path, fingerprint: str, job: BatchJob) -> OutputState:
    """Whether an output exists, is whole, and was made of the source as it is now.

    A cut, empty or damaged file that a batch wrote counts as damaged: a power cut may leave one. One made with the same
    settings of the same source file, whose content has changed since, is outdated.

    Raises:
        FileError: Another file is there.
    """
    if not path.exists():
        return "missing"
    if not path.is_file():  # a pipe would block forever
        raise FileError(f"{path} is no regular file, and in the way. Remove it, or choose another output folder.")
    what = "was not made by a batch"
    try:
        metadata = read_metadata(path) if _is_complete(path) else None
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
        if start.startswith(b"GIF8"):
            file.seek(-1, 2)
            return file.read(1) == b";"
        if start.startswith(b"\xff\xd8"):
            file.seek(-2, 2)
            return file.read(2) == b"\xff\xd9"
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


def skip_done(jobs: Iterable[BatchJob], config: WorkerConfig) -> Iterator[tuple[BatchJob, JobResult | None]]:
    """Pair each job with its result if that is known without decoding: done before, or impossible; else with None."""
    for job in jobs:
        began = time.perf_counter()
        try:
            skipped = JobResult(name=job.name, state="skipped", seconds=0.0)
            yield job, None if job_outputs(job, config).missing else skipped
        except Exception as error:  # whatever a name or a file provokes stays with its job
            yield job, failed(job, error, time.perf_counter() - began)


def failed(job: BatchJob, error: BaseException, seconds: float) -> JobResult:
    """The result of a job that raised `error`."""
    if is_out_of_memory(error):
        error = DoesNotFitError("There was not enough memory for it. Decode it alone, smaller, or on a larger device.")
    if isinstance(error, PidecodeError):
        message = error.message("cli")
    else:
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return JobResult(name=job.name, state="failed", seconds=seconds, error=type(error).__name__, message=message)


@dataclass(slots=True, kw_only=True)
class _Decoded:
    """One job on its way from its source to its images, which wait to be written."""

    job: BatchJob
    began: float
    outputs: JobOutputs | None = None
    source: Latent | SourceImage | Frames | None = None
    images: list[tuple[Path, DecodeOutput | Animation]] = field(default_factory=list)
    written: int = 0
    pixels: int = 0
    error: BaseException | None = None

    @property
    def fingerprint(self) -> str:
        """Of the job; empty if it has failed before."""
        return self.outputs.fingerprint if self.outputs else ""

    def add(self, path: Path, output: DecodeOutput) -> None:
        """Keep the one image of `output` for `path`, with its source and fingerprint in its metadata."""
        self.images.append((path, replace(output, metadata=(self.identified(output.metadata[0]),))))

    def identified(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Metadata with what they tell a later batch: the fingerprint first, where a cut file still has it."""
        return {FINGERPRINT: self.fingerprint, **metadata, "source": printable(self.job.name)}


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
        written: deque[Future[JobResult]] = deque()

        def report(limit: int) -> None:
            while len(written) > limit:
                result = written[0].result()
                written.popleft()
                on_result(result)

        with ThreadPoolExecutor(1, "pidecode-reader") as reader, ThreadPoolExecutor(1, "pidecode-writer") as writer:
            try:
                for sources in _ahead(reader, self._read, jobs):
                    written.append(writer.submit(self._write, self._decode(sources)))
                    report(WRITE_QUEUE)
            finally:
                report(0)

    def _read(self, job: BatchJob) -> _Decoded:
        """Check what a job misses, and read its source."""
        decoded = _Decoded(job=job, began=time.perf_counter())
        try:
            decoded.outputs = job_outputs(job, self.config)
            if decoded.outputs.missing:
                decoded.source = self._load_source(job)
        except Exception as error:  # one failure must not stop the other jobs
            decoded.error = error
        return decoded

    def _load_source(self, job: BatchJob) -> Latent | SourceImage | Frames:
        """The source of a job; its image is within the limits of its file format."""
        if job.kind == "latent":
            latent = Latent.load(job.source, space=self.config.space)
            height, width = latent.output_size
            check_format(job.out, *self.decoder.decoded_size((width, height), self.config.options_of(job)))
            return latent
        limit = self.config.max_pixels
        frames = frames_in(job.source, max_pixels=limit)
        for size in frames.sizes if frames else [image_size(job.source, max_pixels=limit)]:
            check_format(job.out, *self.decoder.upscaled_size(size, self.config.options_of(job)))
        if frames is None:
            return self._stripped(read_image(job.source, max_pixels=limit, keep_profile=self.config.keep_profile))
        if frames.durations:
            animated_format(job.out)
        return frames

    def _stripped(self, image: SourceImage) -> SourceImage:
        return image.stripped() if self.config.strip else image

    def _decode(self, decoded: _Decoded) -> _Decoded:
        job, outputs = decoded.job, decoded.outputs
        if decoded.error is not None or outputs is None or not outputs.missing:  # a worker that died had finished it
            return decoded
        try:
            options, report = self.config.options_of(job), self.on_progress
            progress = None if report is None else partial(report, job)
            if isinstance(decoded.source, Frames):
                self._upscale_frames(decoded, decoded.source, outputs, options)
                return decoded
            if not isinstance(decoded.source, Latent):
                assert decoded.source is not None
                output = self.decoder.upscale(decoded.source, options=options, progress_callback=progress)
                decoded.add(outputs.paths[0], output)
                return decoded
            draws_noise = self.decoder.kind in option_infos()["seed"].kinds
            first_seed = options.seeds(1)[0] if draws_noise else None
            for index in outputs.missing:  # one by one: that one image fits in memory does not mean that all do
                if first_seed is not None:
                    options = replace(options, seed=first_seed + index)
                output = self.decoder.decode(decoded.source[index], options=options, progress_callback=progress)
                decoded.add(outputs.paths[index], output)
        except Exception as error:  # one failure must not stop the other jobs
            decoded.error = error
        return decoded

    def _upscale_frames(self, decoded: _Decoded, frames: Frames, outputs: JobOutputs, options: DecodeOptions) -> None:
        """Upscale an animation, or the pages of a document, which are written at once: all may not fit in memory."""
        job, limits = decoded.job, {"max_pixels": self.config.max_pixels, "keep_profile": self.config.keep_profile}
        images: list[Image.Image] = []
        for index, image in enumerate(read_frames(job.source, **limits)):  # type: ignore[arg-type]
            if not frames.durations and index not in outputs.missing:
                continue

            def progress(now: Progress, index: int = index) -> None:
                if self.on_progress is not None:
                    self.on_progress(job, now.of_part("frame" if frames.durations else "page", index, len(frames)))

            output = self.decoder.upscale(self._stripped(image), options=options, progress_callback=progress)
            if frames.durations:
                images += output.images
            else:
                decoded.add(outputs.paths[index], output)
                self._save(decoded)
        if images:
            images[0].info[KEYWORD] = decoded.identified(images[0].info[KEYWORD])
            decoded.images.append((outputs.paths[0], Animation(images, frames)))

    def _save(self, decoded: _Decoded) -> None:
        """Write the images that wait."""
        while decoded.images:
            path, output = decoded.images.pop(0)
            path.parent.mkdir(parents=True, exist_ok=True)
            state = "damaged" if self.config.overwrite else _state(path, decoded.fingerprint, decoded.job)
            if state != "done":  # else written by another run meanwhile
                bits, quality = cast(Literal[8, 16], self.config.bits), self.config.quality
                output.save(path, overwrite=state in ("damaged", "outdated"), bits=bits, quality=quality)
            decoded.written += 1
            decoded.pixels += output.num_pixels

    def _write(self, decoded: _Decoded) -> JobResult:
        try:
            self._save(decoded)
        except Exception as error:
            decoded.error = decoded.error or error
        seconds = time.perf_counter() - decoded.began
        if decoded.error is not None:
            return failed(decoded.job, decoded.error, seconds)
        return JobResult(
            name=decoded.job.name, state="done", seconds=seconds, images=decoded.written,
            megapixels=decoded.pixels / 1e6,
        )  # fmt: skip


def _ahead(
    pool: ThreadPoolExecutor, read: Callable[[BatchJob], _Decoded], jobs: Iterable[BatchJob]
) -> Iterator[_Decoded]:
    """What `read` makes of the jobs, in order; READ_QUEUE of them are read while the caller works on one."""
    waiting: deque[Future[_Decoded]] = deque()
    for job in jobs:
        waiting.append(pool.submit(read, job))
        if len(waiting) > READ_QUEUE:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
