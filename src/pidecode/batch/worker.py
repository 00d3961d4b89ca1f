# SPDX-License-Identifier: Apache-2.0
"""One job from its source to its image: skipped if done, made, written whole, and never the end of the others."""

from __future__ import annotations

import hashlib
import json
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from pidecode.batch.jobs import Job
from pidecode.batch.report import Outcome
from pidecode.decoder import DecodeOutput, PixelDecoder
from pidecode.errors import FileError, PidecodeError
from pidecode.images import read_metadata, save_image
from pidecode.latents.latent import Latent
from pidecode.latents.storage import count_latents
from pidecode.options import RuntimeOptions
from pidecode.registry.checkpoints import Sampler

STAMP = "batch"
"""Entry of an image's recipe that says which job made it."""

WRITING_AHEAD = 2
"""Images that may wait to be written while the next are decoded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every job of a batch shares: the model and the settings; plain values that travel between machines."""

    model: str = "tiny"
    space: str | None = None
    variant: str | None = None
    device: str | None = None
    dtype: str | None = None
    prompt: str | None = None
    seed: int | None = None
    num_steps: int | None = None
    sigma: float | None = None
    sampler: Sampler | None = None
    fit: Literal["pad", "crop"] = "pad"
    bits: int = 8
    compile: bool = False
    overwrite: bool = False

    def decoder(self) -> PixelDecoder:
        """Load the decoder asked for; raises as `PixelDecoder.from_pretrained` does."""
        dtype = getattr(torch, self.dtype) if self.dtype else None
        return PixelDecoder.from_pretrained(
            self.model,
            space=self.space,
            variant=self.variant,
            device=self.device,
            dtype=dtype,
            runtime=RuntimeOptions(compile=self.compile),
        )

    def settings(self, job: Job) -> dict[str, Any]:
        """The settings of one job: the batch's, with its own in their place."""
        given = {name: getattr(self, name) for name in ("prompt", "seed", "num_steps", "sigma", "sampler")}
        return {name: value for name, value in {**given, **job.own}.items() if value is not None}

    def stamp(self, job: Job) -> str:
        """A mark of everything that decides a job's image: its source, the model, and the settings.

        The device and the number format are left out: a batch may be finished on another machine. Of the source
        its name and size in bytes count, not its time, which copying changes.
        """
        facts = {
            "name": job.name,
            "bytes": job.source.stat().st_size,
            "model": [self.model, self.space, self.variant],
            "fit": self.fit if job.kind == "image" else None,
            "bits": self.bits,
            "settings": self.settings(job),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def places(job: Job) -> list[Path]:
    """Every file a job writes: one, or one per latent of a batch. Raises FileError or LatentError as reading does."""
    if not job.source.is_file():
        raise FileError(f"There is no file {job.source}.")
    count = count_latents(job.source) if job.kind == "latent" else 1
    if count == 1:
        return [job.out]
    return [job.out.with_name(f"{job.out.stem}-{index}{job.out.suffix}") for index in range(1, count + 1)]


def missing(job: Job, work: Work) -> list[int]:
    """Which of a job's images are still to be made, by their place in `places`.

    Raises FileError for a place that holds something else, unless `work.overwrite`.
    """
    stamp = work.stamp(job)
    return [index for index, place in enumerate(places(job)) if not _is_done(place, stamp, overwrite=work.overwrite)]


def _is_done(place: Path, stamp: str, *, overwrite: bool) -> bool:
    if not place.exists():
        return False
    try:
        recipe = read_metadata(place)
    except PidecodeError:
        recipe = None
    found = (recipe or {}).get(STAMP)
    if found == stamp:
        return True
    if overwrite:
        return False
    what = "was not made by a batch" if found is None else "was made with other settings or from another source"
    raise FileError(f"{place} exists and {what}. --overwrite replaces it; or choose another folder for the results.")


def sift(jobs: Iterable[Job], work: Work) -> Iterator[tuple[Job, Outcome | None]]:
    """Each job with its outcome where that is settled without any work: done already, or impossible."""
    for job in jobs:
        began = time.perf_counter()
        try:
            yield job, None if missing(job, work) else Outcome(name=job.name, state="skipped", seconds=0.0)
        except (PidecodeError, OSError) as error:
            yield job, failure(job, error, time.perf_counter() - began)


def failure(job: Job, error: BaseException, seconds: float) -> Outcome:
    """The outcome of a job that went wrong, in one sentence."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        why = "There was not enough memory for it. Decode it alone, smaller, or on a larger device."
    elif isinstance(error, PidecodeError):
        why = str(error)
    else:
        why = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return Outcome(name=job.name, state="failed", seconds=seconds, error=type(error).__name__, why=why)


@dataclass(slots=True, kw_only=True)
class _Made:
    """Images of one job, waiting to be written."""

    job: Job
    began: float
    stamp: str = ""
    images: list[tuple[Path, Tensor, dict[str, Any]]] = field(default_factory=list)
    error: BaseException | None = None

    def add(self, place: Path, output: DecodeOutput) -> None:
        """Keep the one image of `output` for `place`; its metadata says which source and job it comes from."""
        (metadata,) = output.metadata
        self.images.append((place, output.tensor[0], {**metadata, "source": self.job.name, STAMP: self.stamp}))


class Worker:
    """A loaded decoder that does jobs, one at a time."""

    def __init__(self, work: Work, decoder: PixelDecoder | None = None) -> None:
        self.work = work
        self.decoder = decoder or work.decoder()

    def do(self, job: Job) -> Outcome:
        """Do one job; whatever is wrong with it becomes its outcome."""
        return self._write(self._make(job))

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Do the jobs in order, writing the last images while the next are decoded; the same files as `do`."""
        waiting: deque[Future[Outcome]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="pidecode-writer") as writer:
            for job in jobs:
                waiting.append(writer.submit(self._write, self._make(job)))
                while len(waiting) > WRITING_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _make(self, job: Job) -> _Made:
        made = _Made(job=job, began=time.perf_counter())
        try:
            left, targets = missing(job, self.work), places(job)
            made.stamp = self.work.stamp(job)
            settings = self.work.settings(job)
            if not left:  # a worker that died had finished it
                return made
            if job.kind == "image":
                made.add(targets[0], self.decoder.upscale(job.source, fit=self.work.fit, **settings))
                return made
            latent = Latent.load(job.source, space=self.work.space)
            first = settings.pop("seed", None)
            for index in left:  # one after another: a batch that fits is no promise that its images do
                if self.decoder.kind != "feed-forward" or first is not None:
                    settings["seed"] = (first or 0) + index
                made.add(targets[index], self.decoder.decode(latent[index], **settings))
        except Exception as error:  # one failure must not stop the rest
            made.error = error
        return made

    def _write(self, made: _Made) -> Outcome:
        pixels = 0
        try:
            for place, image, recipe in made.images:
                place.parent.mkdir(parents=True, exist_ok=True)
                if not _is_done(place, made.stamp, overwrite=self.work.overwrite):  # by another run meanwhile
                    save_image(place, image, metadata=recipe, overwrite=self.work.overwrite, bits=self.work.bits)
                pixels += image.shape[1] * image.shape[2]
        except Exception as error:
            made.error = made.error or error
        seconds = time.perf_counter() - made.began
        if made.error is not None:
            return failure(made.job, made.error, seconds)
        return Outcome(
            name=made.job.name, state="done", seconds=seconds, images=len(made.images), megapixels=pixels / 1e6
        )
