# SPDX-License-Identifier: Apache-2.0
"""A worker of a batch: processes one job at a time from its source to its image; a failure stays with its job."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import torch

from pidecode.batch.jobs import BatchJob
from pidecode.batch.report import JobResult
from pidecode.decoder import DecodeOutput, PixelDecoder
from pidecode.errors import FileError, PidecodeError
from pidecode.images import MAX_PIXELS, check_format, image_size, read_image, read_metadata
from pidecode.latents.latent import Latent
from pidecode.latents.storage import count_latents
from pidecode.options import DecodeOptions, RuntimeOptions, option_infos

FINGERPRINT = "batch"  # entry of an image's metadata that holds the fingerprint of its job

WRITE_QUEUE = 2  # decoded images that may wait to be written while the next are decoded


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What all jobs of a batch share; plain values, which are sent to other machines."""

    model: str = "tiny"  # A model's name, file or folder, as `PixelDecoder.from_pretrained` takes it
    space: str | None = None  # latent space, where the weights do not say
    variant: str | None = None  # variant of a model that has several
    device: str | None = None  # device, or None to choose
    dtype: str | None = None  # number format by torch's name, or None to choose
    compile: bool = False  # whether to compile elementwise operations
    # Decode options; a manifest may override them for a job.
    options: DecodeOptions = field(default_factory=DecodeOptions)
    bits: int = 8  # bits per channel of the images, 8 or 16
    overwrite: bool = False  # whether images with another fingerprint are replaced
    strip: bool = False  # whether what a source carries (EXIF, texts, resolution) is left out of its image
    keep_profile: bool = False  # whether a source's colors and profile are kept instead of converted to sRGB
    max_pixels: int = MAX_PIXELS  # largest source read

    def load_decoder(self) -> PixelDecoder:
        """Load the decoder; raises as `PixelDecoder.from_pretrained` does."""
        return PixelDecoder.from_pretrained(
            self.model, space=self.space, variant=self.variant, device=self.device,
            dtype=getattr(torch, self.dtype) if self.dtype else None, runtime=RuntimeOptions(compile=self.compile),
        )  # fmt: skip

    def options_of(self, job: BatchJob) -> DecodeOptions:
        """The decode options of one job: those of the batch that belong to its command, overridden by its own.

        A folder may hold images and latents, so an option of the batch for one of them is left out for the other; an
        option of the job itself that cannot act is refused by the decoder.
        """
        acting = option_infos(command=job.command)
        inherited = {name: getattr(self.options, name) for name in acting}
        return DecodeOptions(**{**inherited, **job.options})

    def fingerprint(self, job: BatchJob) -> str:
        """A hash of everything that determines a job's image: its source, the model and the decode options.

        The device and the number format are left out: a batch may be finished on another machine. Of the source,
        the name and size in bytes count, not its time, which copying changes.
        """
        identity = {
            "name": job.name, "bytes": job.source.stat().st_size, "model": [self.model, self.space, self.variant],
            "bits": self.bits,
            "source": [self.strip, self.keep_profile],
            "options": {name: value for name, value in asdict(self.options_of(job)).items() if value is not None},
        }  # fmt: skip
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]


def output_paths(job: BatchJob) -> list[Path]:
    """The files a job writes: one, or one per latent of a file with several.

    Raises:
        FileError: The source does not exist or cannot be read.
        LatentError: The source is not a latent.
    """
    if not job.source.is_file():
        raise FileError(f"There is no file {job.source}.")
    count = count_latents(job.source) if job.kind == "latent" else 1
    if count == 1:
        return [job.out]
    return [job.out.with_name(f"{job.out.stem}-{index}{job.out.suffix}") for index in range(1, count + 1)]


def missing_outputs(job: BatchJob, config: WorkerConfig) -> list[int]:
    """Indices in `output_paths` of a job's images that do not exist yet.

    Raises:
        FileError: A file with another fingerprint is in the way, and `config.overwrite` is False.
    """
    fingerprint = config.fingerprint(job)
    paths = output_paths(job)
    return [index for index, path in enumerate(paths) if not _is_done(path, fingerprint, overwrite=config.overwrite)]


def _is_done(path: Path, fingerprint: str, *, overwrite: bool) -> bool:
    if not path.exists():
        return False
    try:
        metadata = read_metadata(path)
    except PidecodeError:
        metadata = None
    found = (metadata or {}).get(FINGERPRINT)
    if found == fingerprint:
        return True
    if overwrite:
        return False
    what = "was not made by a batch" if found is None else "was made with other options or from another source"
    raise FileError(f"{path} exists and {what}. Replace it with --overwrite, or choose another output folder.")


def skip_done(jobs: Iterable[BatchJob], config: WorkerConfig) -> Iterator[tuple[BatchJob, JobResult | None]]:
    """Pair each job with its result if that is known without decoding: done before, or impossible; else with None."""
    for job in jobs:
        began = time.perf_counter()
        try:
            skipped = JobResult(name=job.name, state="skipped", seconds=0.0)
            yield job, None if missing_outputs(job, config) else skipped
        except (PidecodeError, OSError) as error:
            yield job, failed(job, error, time.perf_counter() - began)


def failed(job: BatchJob, error: BaseException, seconds: float) -> JobResult:
    """The result of a job that raised `error`."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        message = "There was not enough memory for it. Decode it alone, smaller, or on a larger device."
    elif isinstance(error, PidecodeError):
        message = str(error)
    else:
        message = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return JobResult(name=job.name, state="failed", seconds=seconds, error=type(error).__name__, message=message)


@dataclass(slots=True, kw_only=True)
class _Decoded:
    """Images of one job, waiting to be written."""

    job: BatchJob
    began: float
    fingerprint: str = ""
    images: list[tuple[Path, DecodeOutput]] = field(default_factory=list)
    error: BaseException | None = None

    def add(self, path: Path, output: DecodeOutput) -> None:
        """Keep the one image of `output` for `path`, with its source and fingerprint in its metadata."""
        (metadata,) = output.metadata
        metadata = {**metadata, "source": self.job.name, FINGERPRINT: self.fingerprint}
        self.images.append((path, replace(output, metadata=(metadata,))))


class Worker:
    """A decoder, given or loaded as the configuration says, that processes jobs one at a time."""

    def __init__(self, config: WorkerConfig, decoder: PixelDecoder | None = None) -> None:
        self.config = config
        self.decoder = decoder or config.load_decoder()

    def process(self, job: BatchJob) -> JobResult:
        """Process one job; an error becomes its result."""
        return self._write(self._decode(job))

    def process_all(self, jobs: Iterable[BatchJob]) -> Iterator[JobResult]:
        """Process jobs in order, writing images in a second thread while the next are decoded."""
        waiting: deque[Future[JobResult]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="pidecode-writer") as writer:
            for job in jobs:
                waiting.append(writer.submit(self._write, self._decode(job)))
                while len(waiting) > WRITE_QUEUE:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _decode(self, job: BatchJob) -> _Decoded:
        decoded = _Decoded(job=job, began=time.perf_counter())
        try:
            missing, paths = missing_outputs(job, self.config), output_paths(job)
            decoded.fingerprint = self.config.fingerprint(job)
            options = self.config.options_of(job)
            if not missing:  # a worker that died had finished it
                return decoded
            if job.kind == "image":
                size = image_size(job.source, max_pixels=self.config.max_pixels)
                check_format(paths[0], *self.decoder.upscaled_size(size))
                image = read_image(job.source, max_pixels=self.config.max_pixels, keep_profile=self.config.keep_profile)
                image = image.stripped() if self.config.strip else image
                decoded.add(paths[0], self.decoder.upscale(image, options=options))
                return decoded
            latent = Latent.load(job.source, space=self.config.space)
            height, width = latent.output_size
            check_format(paths[0], *(options.size or (width, height)))
            draws_noise = self.decoder.kind in option_infos()["seed"].kinds
            first_seed = options.seeds(1)[0] if draws_noise else None
            for index in missing:  # one by one: that one image fits in memory does not mean that all do
                if first_seed is not None:
                    options = replace(options, seed=first_seed + index)
                decoded.add(paths[index], self.decoder.decode(latent[index], options=options))
        except Exception as error:  # one failure must not stop the other jobs
            decoded.error = error
        return decoded

    def _write(self, decoded: _Decoded) -> JobResult:
        pixels = 0
        overwrite = self.config.overwrite
        try:
            for path, output in decoded.images:
                path.parent.mkdir(parents=True, exist_ok=True)
                if not _is_done(path, decoded.fingerprint, overwrite=overwrite):  # written by another run meanwhile
                    output.save(path, overwrite=overwrite, bits=cast(Literal[8, 16], self.config.bits))
                pixels += output.tensor.shape[2] * output.tensor.shape[3]
        except Exception as error:
            decoded.error = decoded.error or error
        seconds = time.perf_counter() - decoded.began
        if decoded.error is not None:
            return failed(decoded.job, decoded.error, seconds)
        return JobResult(
            name=decoded.job.name, state="done", seconds=seconds, images=len(decoded.images), megapixels=pixels / 1e6
        )
