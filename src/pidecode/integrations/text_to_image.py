# SPDX-License-Identifier: Apache-2.0
"""Text to image: load a diffusers pipeline, generate latents, decode them.

What the first stage makes is kept on disk as latents, so a run that was interrupted goes on where it stopped, and
favorites can be decoded again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pidecode.color_fix import fidelity
from pidecode.decoder import PixelDecoder
from pidecode.errors import DownloadError, FileError, MissingDependencyError, SettingError
from pidecode.files import atomic_write
from pidecode.images import KEYWORD, load_image, read_metadata, save_image, to_tensor
from pidecode.integrations.diffusers import OnProgress, Progress, StopAfter, run_for_latents
from pidecode.integrations.pipeline_latents import decode_native
from pidecode.latents.latent import Latent
from pidecode.registry.spaces import GENERATION, diffusion_size, get_image_model

JOB_FILE = "job.json"
SHEET_FILE = "contact-sheet.jpg"
LATENTS = "latents"
NATIVE = "native"
_THUMBNAIL = 384
_HEADROOM = 1.25
"""A pipeline needs about this many times its weights on a device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One run: every prompt with every seed.

    model: an image model's name. prompts, seeds: all pairs are made.
    size: width and height of the finished images, in pixels.
    source: the pipeline's folder or hub repository; default the model's own.
    steps: of the diffusion; default the model's. stop_after: see `attach`.
    compare: also put the native decode, enlarged by Lanczos, beside each image.
    keep_latents: leave the latents on disk when their images are written.
    arguments: of the pipeline's call, over the model's defaults.
    """

    model: str
    prompts: tuple[str, ...]
    out: Path
    seeds: tuple[int, ...] = (0,)
    size: tuple[int, int] = (2048, 2048)
    source: str | None = None
    steps: int | None = None
    stop_after: StopAfter = None
    compare: bool = False
    keep_latents: bool = False
    sheet: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts or not all(isinstance(prompt, str) for prompt in self.prompts):
            raise SettingError("There is no prompt; give one, or a file with one per line.")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise SettingError(f"The seeds are {list(self.seeds)}; give at least one, and each once.")
        get_image_model(self.model)
        diffusion_size(self.model, *self.size)

    @property
    def pieces(self) -> list[Piece]:
        """Every image to be made, in order: all seeds of the first prompt, then of the next."""
        return [
            Piece(prompt, seed, f"{place:04d}-{_slug(prompt)}-s{seed}")
            for place, prompt in enumerate(self.prompts, 1)
            for seed in self.seeds
        ]

    def record(self) -> dict[str, Any]:
        """What decides the latents, for telling whether a folder holds this run's."""
        return {
            "model": self.model, "source": self.source, "prompts": list(self.prompts), "seeds": list(self.seeds),
            "size": list(self.size), "steps": self.steps, "stop_after": self.stop_after, "compare": self.compare,
            "arguments": dict(self.arguments),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Piece:
    """One image of a run, and the name of its files."""

    prompt: str
    seed: int
    name: str


@dataclass(frozen=True, slots=True)
class Written:
    """One finished image: its file, its latent's file if kept, the comparison's, and how near it is to native."""

    image: Path
    latent: Path | None
    comparison: Path | None
    fidelity: str | None


Load = Callable[[], PixelDecoder]
"""Loads the decoder; called when the pipeline's memory is free again."""


def generate(
    job: Job,
    load_decoder: Load,
    *,
    device: torch.device,
    dtype: torch.dtype,
    settings: dict[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> list[Written]:
    """Make every image of a job; what an earlier, interrupted run of it has made is not made again.

    device, dtype: of the pipeline. On a device too small for it, its parts take turns there.
    Raises SettingError when the folder holds another job, DownloadError when the pipeline is not on this machine.
    """
    _begin(job)
    todo = [piece for piece in job.pieces if not _image(job, piece).is_file()]
    undrawn = [piece for piece in todo if not _has_latent(job, piece)]
    if undrawn:
        _draw(job, undrawn, device, dtype, on_progress)
    decoder = load_decoder() if todo else None
    if decoder is not None and decoder.space.name != get_image_model(job.model).space:
        raise SettingError(
            f"{job.model} draws in space {get_image_model(job.model).space} and {decoder.name} decodes "
            f"{decoder.space.name}. Name a decoder of that space; the latents are kept."
        )
    states = _prompt_embeds(decoder, todo) if decoder is not None else {}
    written = []
    for place, piece in enumerate(job.pieces):
        if piece in todo and decoder is not None:
            _decode(job, piece, decoder, {**(settings or {}), **states.get(piece.prompt, {})})
        if on_progress is not None:
            on_progress(Progress("decoding", place + 1, len(job.pieces)))
        written.append(_written(job, piece))
    if job.sheet and len(written) > 1:
        contact_sheet([entry.image for entry in written], job.out / SHEET_FILE)
    return written


def _begin(job: Job) -> None:
    """Make the folder this job's, or see that it is."""
    (job.out / LATENTS).mkdir(parents=True, exist_ok=True)
    file = job.out / JOB_FILE
    wanted = json.dumps(job.record(), indent=2, ensure_ascii=False)
    if not file.exists():
        with atomic_write(file) as handle:
            handle.write(wanted.encode())
        return
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise FileError(f"{file} cannot be read: {fault}. Name another folder.") from None
    if found != json.loads(wanted):
        keys = set(found) | set(json.loads(wanted)) if isinstance(found, dict) else set()
        other = sorted(key for key in keys if found.get(key) != json.loads(wanted).get(key))
        raise SettingError(
            f"{job.out} holds another run (it differs in {', '.join(other) or 'everything'}). Name another folder, or "
            "give the same settings to go on with it."
        )


def _slug(prompt: str) -> str:
    """A readable part of a file's name; unique enough together with its number."""
    words = "-".join(re.findall(r"[a-z0-9]+", prompt.lower()))[:40].strip("-")
    return words or hashlib.sha256(prompt.encode()).hexdigest()[:8]


def _image(job: Job, piece: Piece) -> Path:
    return job.out / f"{piece.name}.png"


def _latent(job: Job, piece: Piece) -> Path:
    return job.out / LATENTS / f"{piece.name}.safetensors"


def _native(job: Job, piece: Piece) -> Path:
    return job.out / NATIVE / f"{piece.name}.png"


def _comparison(job: Job, piece: Piece) -> Path:
    return job.out / f"{piece.name}-compare.png"


def _has_latent(job: Job, piece: Piece) -> bool:
    return _latent(job, piece).is_file() and (not job.compare or _native(job, piece).is_file())


def load_pipeline(model: str, source: str | None, device: torch.device, dtype: torch.dtype) -> Any:
    """An image model's diffusers pipeline from this machine, on `device` as far as it fits there.

    Raises DownloadError naming the command that fetches it, MissingDependencyError without diffusers.
    """
    try:
        import diffusers
    except ImportError as fault:
        raise MissingDependencyError(
            'diffusers is not installed, and generating needs it; run `pip install "pidecode[diffusers]"`.'
        ) from fault
    row, place = get_image_model(model), source or GENERATION[model].repository
    kind = getattr(diffusers, row.pipeline, None)
    if kind is None:
        raise MissingDependencyError(f"This diffusers ({diffusers.__version__}) has no {row.pipeline}; upgrade it.")
    try:
        pipe = kind.from_pretrained(place, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError) as fault:
        first = (str(fault).splitlines() or [""])[0]
        raise DownloadError(
            f"The pipeline {place} is not on this machine or not whole ({first[:160]}). Accept its license on its page "
            f"and fetch it with `hf download {GENERATION[model].repository}`, or name a folder."
        ) from None
    pipe.set_progress_bar_config(disable=True)
    return _placed(pipe, device)


def _placed(pipe: Any, device: torch.device) -> Any:
    """On the device, or, where it would not fit, with its parts taking turns there."""
    if device.type == "cpu":
        return pipe
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    needed = _HEADROOM * sum(p.numel() * p.element_size() for part in parts for p in part.parameters())
    memory = getattr(getattr(torch, device.type), "mem_get_info", None)
    if memory is not None and needed > memory(device)[0]:
        pipe.enable_model_cpu_offload(device=device)
        return pipe
    return pipe.to(device)


def _draw(
    job: Job, pieces: Sequence[Piece], device: torch.device, dtype: torch.dtype, on_progress: OnProgress | None
) -> None:
    """The first stage; when it returns, the pipeline is gone from memory."""
    pipe = load_pipeline(job.model, job.source, device, dtype)
    width, height = diffusion_size(job.model, *job.size)
    base = {
        **GENERATION[job.model].arguments, "width": width, "height": height,
        "num_inference_steps": job.steps or get_image_model(job.model).steps, **job.arguments,
    }  # fmt: skip

    def telling(done: int) -> OnProgress:
        def tell(progress: Progress) -> None:
            if on_progress is not None:
                steps = progress.steps * len(pieces)
                on_progress(Progress("diffusion", done * progress.steps + progress.step, steps))

        return tell

    for done, piece in enumerate(pieces):
        call = {**base, "prompt": piece.prompt, "generator": torch.Generator().manual_seed(piece.seed)}
        latent, native = _drawn(job, pipe, call, telling(done))
        if native is not None:
            _native(job, piece).parent.mkdir(exist_ok=True)
            save_image(_native(job, piece), native, overwrite=True)
        latent.save(_latent(job, piece), overwrite=True)
    del pipe
    gc.collect()
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


def _drawn(job: Job, pipe: Any, call: Mapping[str, Any], on_progress: OnProgress) -> tuple[Latent, Tensor | None]:
    """One latent, and the native decode `[3, h, w]` of the finished one if it is to be compared.

    A comparison lets the diffusion run to its end: the native decoder cannot read noise.
    """
    if not job.compare or job.stop_after is None:
        run = run_for_latents(pipe, call, stop_after=job.stop_after, on_progress=on_progress)
        return run.latent, decode_native(pipe, run.latent)[0] if job.compare else None
    if job.stop_after == "recommended":
        from pidecode.integrations.pipeline_latents import recommended_stop

        step = recommended_stop(pipe, int(call["num_inference_steps"]))
    else:
        step = int(job.stop_after)
    run = run_for_latents(pipe, call, capture=(step,), on_progress=on_progress)
    return run.captured[step], decode_native(pipe, run.latent)[0]


def _prompt_embeds(decoder: PixelDecoder, pieces: Sequence[Piece]) -> dict[str, dict[str, Any]]:
    """States of every prompt, so that the text encoder's memory is free before the images are decoded."""
    if not decoder.reads_text or decoder.text is None:
        return {}
    states: dict[str, dict[str, Any]] = {
        prompt: {"prompt_embeds": decoder.text.encode(prompt).cpu()} for prompt in {piece.prompt for piece in pieces}
    }
    decoder.text.unload()
    return states


def _decode(job: Job, piece: Piece, decoder: PixelDecoder, settings: Any) -> None:
    latent = Latent.load(_latent(job, piece))
    if decoder.kind != "feed-forward":
        settings.setdefault("seed", piece.seed)
    image = decoder.decode(latent, **settings).image
    recipe = image.info.get(KEYWORD, {})
    recipe |= {"image_model": job.model, "pipeline_steps": job.steps or get_image_model(job.model).steps}
    if job.compare:
        native = load_image(_native(job, piece))
        save_image(_comparison(job, piece), beside(image, native), metadata=recipe, overwrite=True)
        (report,) = fidelity(to_tensor(image), to_tensor(native))
        recipe["fidelity"] = str(report)
    save_image(_image(job, piece), image, metadata=recipe, overwrite=True)  # last: it marks the piece done
    if not job.keep_latents:
        _latent(job, piece).unlink()


def _written(job: Job, piece: Piece) -> Written:
    recipe = read_metadata(_image(job, piece)) or {}
    latent, comparison = _latent(job, piece), _comparison(job, piece)
    return Written(
        _image(job, piece),
        latent if latent.is_file() else None,
        comparison if comparison.is_file() else None,
        recipe.get("fidelity"),
    )


def beside(image: Image.Image, native: Image.Image) -> Image.Image:
    """The native decode, enlarged by Lanczos, on the left, and the image on the right."""
    sheet = Image.new("RGB", (2 * image.width, image.height))
    sheet.paste(native.convert("RGB").resize(image.size, Image.Resampling.LANCZOS), (0, 0))
    sheet.paste(image, (image.width, 0))
    return sheet


def contact_sheet(images: Sequence[Path], place: Path) -> None:
    """Small versions of all images on one sheet, in reading order."""
    columns = max(1, round(len(images) ** 0.5))
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * _THUMBNAIL, rows * _THUMBNAIL), (24, 24, 24))
    for index, path in enumerate(images):
        small = load_image(path).convert("RGB")
        small.thumbnail((_THUMBNAIL - 8, _THUMBNAIL - 8))
        left = index % columns * _THUMBNAIL + (_THUMBNAIL - small.width) // 2
        sheet.paste(small, (left, index // columns * _THUMBNAIL + (_THUMBNAIL - small.height) // 2))
    save_image(place, sheet, overwrite=True)


class PipelineTextToLatent:
    """Prompts to latents.

    model: an image model's name. pipe: its pipeline, on its device. steps: of the diffusion; default the model's own.
    """

    def __init__(self, model: str, pipe: Any, *, steps: int | None = None) -> None:
        self.steps = steps or get_image_model(model).steps
        self.model = get_image_model(model).name
        self.space = get_image_model(model).space
        self.pipe = pipe

    @classmethod
    def from_pretrained(
        cls, model: str, source: str | None, *, device: torch.device, dtype: torch.dtype
    ) -> PipelineTextToLatent:
        """Load the pipeline from this machine. Raises as `load_pipeline` does."""
        return cls(model, load_pipeline(model, source, device, dtype))

    def __call__(
        self, prompt: str, *, width: int, height: int, seed: int, callback: Callable[[int, int], None]
    ) -> Latent:
        """The latent of an image that PiD makes `width` x `height` pixels large; `callback(done, total)` may stop it.

        Raises SizeError for a size the model cannot draw.
        """
        low_width, low_height = diffusion_size(self.model, width, height)

        def told(progress: Progress) -> None:
            callback(progress.step, progress.steps)

        call = {
            **GENERATION[self.model].arguments,
            "prompt": prompt,
            "width": low_width,
            "height": low_height,
            "num_inference_steps": self.steps,
            "generator": torch.Generator().manual_seed(seed),
        }
        return run_for_latents(self.pipe, call, on_progress=told).latent
