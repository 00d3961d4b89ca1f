# SPDX-License-Identifier: Apache-2.0
"""A diffusers pipeline whose pictures come from PiD: attach, call as before, detach.

    pipe = attach(pipe, decoder, stop_after=24)
    picture = pipe("a lighthouse in fog").images[0]

Nothing in the pipeline is changed: the attached one owns it, asks it for latents and decodes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import wraps
from typing import Any, Literal, Unpack, cast

import torch
from torch import Tensor

from pidecode.decoder import PixelDecoder
from pidecode.errors import LatentError, SettingError
from pidecode.integrations.capture import (
    Captured,
    OnProgress,
    Progress,
    StopAfter,
    named_arguments,
    run_for_latents,
)
from pidecode.latents.latent import Latent
from pidecode.latents.pipelines import space_of
from pidecode.sampling import Step
from pidecode.settings import DecodeSettings, Settings

OutputType = Literal["pil", "np", "pt", "latent"]
_OUTPUTS = ("pil", "np", "pt", "latent")
_OWN = ("stop_after", "capture", "caption", "on_progress", "decode_settings")


@dataclass(frozen=True, slots=True)
class PixelOutput:
    """What an attached pipeline returns.

    images: a list of PIL images; an array `[B, H, W, 3]` in [0, 1] for "np"; a tensor `[B, 3, H, W]` in [0, 1] for
        "pt"; the Latent itself for "latent".
    latents: what was decoded, with its sigma and captions; save it to decode it again later.
    captured: the latents of the steps named by `capture=`, by step.
    steps: how many steps were run; calls: how often the denoiser was.
    """

    images: Any
    latents: Latent
    captured: Mapping[int, Latent]
    steps: int
    calls: int

    def __getitem__(self, index: int) -> Any:
        """`out[0]` are the pictures, as in diffusers."""
        return (self.images,)[index]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.images,))


class AttachedPipeline:
    """A diffusers pipeline with PiD behind it; see `attach`. Everything but the call is the pipeline's own."""

    def __init__(
        self,
        pipe: Any,
        decoder: PixelDecoder,
        *,
        stop_after: StopAfter,
        capture: Sequence[int],
        on_progress: OnProgress | None,
        offload: bool,
        settings: DecodeSettings,
    ) -> None:
        own = {"pipe": pipe, "decoder": decoder, "stop_after": stop_after, "capture": tuple(capture)}
        for name, value in {**own, "on_progress": on_progress, "offload": offload, "settings": settings}.items():
            object.__setattr__(self, f"_pid_{name}", value)

    def __getattr__(self, name: str) -> Any:
        pipe = object.__getattribute__(self, "_pid_pipe")
        value = getattr(pipe, name)
        if not callable(value) or getattr(value, "__self__", None) is not pipe:
            return value

        @wraps(value)
        def call(*args: Any, **keywords: Any) -> Any:
            result = value(*args, **keywords)
            return self if result is pipe else result  # `pipe = pipe.to(device)` stays attached

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._pid_pipe, name, value)

    def __repr__(self) -> str:
        return f"AttachedPipeline({type(self._pid_pipe).__name__}, decoder={self._pid_decoder.name!r})"

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Call the pipeline as before; its pictures are PiD's.

        Takes everything the pipeline takes, and besides, for this call only: stop_after, capture, on_progress,
        decode_settings (a table of `decode` settings), and caption where the call has no prompt.
        Returns a PixelOutput, or a tuple of the pictures for `return_dict=False`.
        """
        own = {name: keywords.pop(name) for name in _OWN if name in keywords}
        call = named_arguments(self._pid_pipe, args, keywords)
        output = call.get("output_type", "pil")
        if output not in _OUTPUTS:
            raise SettingError(f"output_type is {output!r}; it must be one of {', '.join(_OUTPUTS)}.")
        settings = cast(DecodeSettings, {**self._pid_settings, **own.get("decode_settings", {})})
        Settings.of(settings)
        self._refuse_captionless(call, own, settings, output)
        on_progress = own.get("on_progress", self._pid_on_progress)
        run = run_for_latents(
            self._pid_pipe,
            call,
            stop_after=own.get("stop_after", self._pid_stop_after),
            capture=own.get("capture", self._pid_capture),
            caption=own.get("caption"),
            on_progress=on_progress,
        )
        images = run.latent if output == "latent" else self._pictures(run, output, settings, on_progress)
        if not call.get("return_dict", True):
            return (images,)
        return PixelOutput(images, run.latent, run.captured, run.steps, run.calls)

    def _refuse_captionless(
        self, call: Mapping[str, Any], own: Mapping[str, Any], settings: DecodeSettings, output: str
    ) -> None:
        """Before the long part, not after it."""
        needs = self._pid_decoder.net.config.has_text and "caption_states" not in settings and output != "latent"
        if needs and call.get("prompt") is None and own.get("caption") is None:
            raise SettingError(
                f"{self._pid_decoder.name} reads captions and this call has no prompt; pass caption= beside the "
                'ready-made embeddings (an empty text "" is one).'
            )

    def _pictures(
        self, run: Captured, output: OutputType, settings: DecodeSettings, on_progress: OnProgress | None
    ) -> Any:
        pipe, decoder = self._pid_pipe, self._pid_decoder
        moved = _move_away(pipe) if self._pid_offload else None
        try:
            pictures = decode_each(decoder, run.latent, settings, on_progress, tensors=output != "pil")
        finally:
            if moved is not None:
                pipe.to(moved)
        if output == "pil":
            for picture in pictures:
                picture.info.get("pidecode", {}).update(
                    pipeline=type(pipe).__name__, pipeline_steps=run.steps, pipeline_steps_planned=run.steps_planned
                )
            return pictures
        stack = torch.cat(pictures).float().add(1).div(2)
        return stack if output == "pt" else stack.permute(0, 2, 3, 1).cpu().numpy()


def decode_each(
    decoder: PixelDecoder,
    latent: Latent,
    settings: DecodeSettings,
    on_progress: OnProgress | None = None,
    *,
    tensors: bool = False,
) -> list[Any]:
    """A batch decoded one by one, which needs the memory of one: PIL images, or tensors `[1, 3, H, W]` in [-1, 1]."""
    chosen = Settings.of(settings)
    seeds = chosen.seeds(len(latent))
    states = chosen.caption_states
    made: list[Any] = []
    for index, one in enumerate(latent):
        mine: DecodeSettings = {**settings, "seed": seeds[index]}
        if isinstance(states, Tensor) and states.ndim == 3 and len(states) == len(latent):
            mine["caption_states"] = states[index : index + 1]

        def tell(step: Step, index: int = index) -> None:
            if on_progress is not None:
                on_progress(Progress("decoding", index * step.total + step.index, len(latent) * step.total))

        made.append(decoder.decode(one, output="pt" if tensors else "pil", on_step=tell, **mine))
    return made


def _move_away(pipe: Any) -> Any:
    """Send a pipeline to the processor's memory; returns where it was, or None if it sees to that itself."""
    if getattr(pipe, "_all_hooks", None) or getattr(pipe, "hf_device_map", None):
        pipe.maybe_free_model_hooks()
        return None
    where = pipe.device
    if where.type == "cpu":
        return None
    pipe.to("cpu")
    if where.type != "meta" and hasattr(torch, where.type):
        getattr(torch, where.type).empty_cache()
    return where


def attach(
    pipe: Any,
    decoder: PixelDecoder,
    *,
    stop_after: StopAfter = None,
    capture: Sequence[int] = (),
    on_progress: OnProgress | None = None,
    offload: bool = False,
    **settings: Unpack[DecodeSettings],
) -> AttachedPipeline:
    """A diffusers pipeline whose pictures are PiD's, four times as large; the pipeline itself stays as it is.

    pipe: of the Flux, FLUX.2, Stable Diffusion 3, SDXL, Qwen-Image or Z-Image families; text to image, and the
        relatives that share their call (image to image, inpainting, Kontext, Fill, ControlNet).
    decoder: of the same latent space.
    stop_after: end the diffusion after that step (from 1; "recommended" for SPEC.md section 5's) and decode what
        there is, with the noise it holds.
    capture: steps whose latents are kept too, in `out.captured`, to compare them.
    on_progress: told of each step of both stages; raise `errors.Cancelled` in it to stop.
    offload: keep the pipeline in the processor's memory while PiD decodes, for small GPUs. Pipelines with
        `enable_model_cpu_offload()` do so anyway.
    settings: as for `decode`.

    The caption is the call's prompt. Raises LatentError when pipeline and decoder are of different spaces, SettingError
    for a pipeline without a decoder.
    """
    if isinstance(pipe, AttachedPipeline):
        raise SettingError("This pipeline is attached already; detach() it first.")
    space = space_of(pipe)
    if decoder.space.name != space.name:
        raise LatentError(
            f"A {type(pipe).__name__} works in space {space.name} and {decoder.name} decodes {decoder.space.name}. "
            f"Load the decoder of {space.name}."
        )
    Settings.of(settings)
    return AttachedPipeline(
        pipe, decoder, stop_after=stop_after, capture=capture, on_progress=on_progress, offload=offload,
        settings=settings,
    )  # fmt: skip


def detach(pipe: Any) -> Any:
    """The pipeline as it was before `attach`. Raises SettingError for one that is not attached."""
    if not isinstance(pipe, AttachedPipeline):
        raise SettingError(f"A {type(pipe).__name__} is not attached, so it cannot be detached.")
    return pipe._pid_pipe
