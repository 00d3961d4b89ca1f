# SPDX-License-Identifier: Apache-2.0
"""attach() and detach(): a diffusers pipeline that decodes with PiD, and early stop.

    pipe = attach(pipe, decoder, stop_after=24)
    image = pipe("a lighthouse in fog").images[0]

Nothing in the pipeline is changed: the attached one owns it, asks it for latents and decodes them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor

from pidecode.decoder import PixelDecoder
from pidecode.errors import LatentError, SettingError
from pidecode.integrations.pipeline_latents import (
    frame_of,
    grid_of_call,
    latent_of,
    noise_level,
    recommended_stop,
    space_of,
    trained_sigma,
)
from pidecode.latents.latent import Latent
from pidecode.options import MAX_SIGMA, DecodeOptions, option_infos
from pidecode.sampling import Step

StopAfter = int | Literal["recommended"] | None


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a call has come: `step` of `steps` of the "diffusion" or the "decoding"."""

    stage: Literal["diffusion", "decoding"]
    step: int
    steps: int


OnProgress = Callable[[Progress], None]
"""Told after every step; raise `errors.Cancelled` in it to stop."""


@dataclass(frozen=True, slots=True)
class Captured:
    """What a run left: its last latent, those of the steps asked for, and how far it went.

    `captured` is keyed by step, counted from one. `calls` counts the denoiser's calls.
    """

    latent: Latent
    captured: Mapping[int, Latent]
    steps: int
    steps_planned: int
    calls: int


@dataclass(slots=True)
class _Watch:
    """The pipeline's state, followed from its step callback and its denoiser's calls."""

    pipe: Any
    stop_after: StopAfter
    capture: Sequence[int]
    on_progress: OnProgress | None
    users: Callable[..., Any] | None
    calls: int = 0
    keywords: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    planned: int = 0
    last: tuple[Tensor, float] | None = None
    kept: dict[int, tuple[Tensor, float]] = field(default_factory=dict)

    def before_call(self, _module: Any, _args: Any, keywords: Mapping[str, Any]) -> None:
        """Forward pre-hook of the denoiser: the first call tells the grid of a packed image."""
        self.calls += 1
        if not self.keywords:
            self.keywords = {name: keywords[name] for name in ("img_ids", "img_shapes") if name in keywords}

    def after_step(self, pipe: Any, index: int, timestep: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's `callback_on_step_end`."""
        result = given
        if self.users is not None:
            result = self.users(pipe, index, timestep, given) or given
        latents = result.get("latents", given.get("latents"))
        assert isinstance(latents, Tensor)
        if not self.step:
            self._settle()
        self.step = index + 1
        self.last = (latents.detach(), noise_level(pipe.scheduler))
        if self.step in self.capture:
            self.kept[self.step] = (latents.detach().clone(), self.last[1])
        if self.on_progress is not None:
            stop = self.stop_after if isinstance(self.stop_after, int) else self.planned
            self.on_progress(Progress("diffusion", self.step, stop))
        if self.step == self.stop_after:
            pipe._interrupt = True  # the pipeline then skips what remains of its loop, network calls included
        return result

    def _settle(self) -> None:
        """After the first step the schedule is known: refuse at once what cannot be done with it."""
        pipe = self.pipe
        self.planned = int(pipe.num_timesteps)
        if self.stop_after == "recommended":
            self.stop_after = recommended_stop(pipe, self.planned)
        wanted = [*self.capture, *([self.stop_after] if isinstance(self.stop_after, int) else [])]
        for step in wanted:
            if not 1 <= step <= self.planned:
                raise SettingError(f"There is no step {step}: this run has {self.planned}, counted from 1.")
        if any(step < self.planned for step in wanted):
            self._refuse_noisy(min(wanted))

    def _refuse_noisy(self, step: int) -> None:
        scheduler, space = self.pipe.scheduler, space_of(self.pipe)
        frame_of(scheduler, space)
        first = int(getattr(scheduler, "step_index", 1)) - 1
        levels = [trained_sigma(scheduler, space, float(level)) for level in scheduler.sigmas[first + 1 :]]
        if levels[step - 1] > MAX_SIGMA:
            fit = next((i + 1 for i, level in enumerate(levels) if level <= MAX_SIGMA), self.planned)
            raise SettingError(
                f"After step {step} of {self.planned} the latent's sigma is {levels[step - 1]:.2f}; PiD was trained up "
                f"to {MAX_SIGMA}. Stop after step {fit} or later."
            )


def run_for_latents(
    pipe: Any,
    arguments: Mapping[str, Any],
    *,
    stop_after: StopAfter = None,
    capture: Sequence[int] = (),
    prompt: str | Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
) -> Captured:
    """Call a diffusers pipeline and return its latents instead of its images.

    arguments: of the call, by name; `output_type`, `return_dict` and the step callback are handled here (a
        callback given by the caller still runs).
    stop_after: end the diffusion after that step, counted from 1; "recommended" is the space's own.
    capture: steps whose latents are kept besides.
    prompt: what the latents show, where the call has no prompt; one for all or one per image.

    Raises SettingError for steps there are not, for sigma above the trained 0.8, and for pipelines that cannot stop.
    """
    space_of(pipe)
    if isinstance(stop_after, bool) or (stop_after is not None and not isinstance(stop_after, int | str)):
        raise SettingError(f"stop_after is {stop_after!r}; it must be a step, counted from 1, or 'recommended'.")
    if isinstance(stop_after, str) and stop_after != "recommended":
        raise SettingError(f"stop_after is {stop_after!r}; it must be a step, counted from 1, or 'recommended'.")
    if stop_after is not None and not hasattr(type(pipe), "interrupt"):
        raise SettingError(f"A {type(pipe).__name__} cannot be interrupted; leave stop_after out and use capture.")
    # Some pipelines write their chat template into a list of prompts they are given: they get a copy.
    call = {name: list(value) if isinstance(value, list) else value for name, value in arguments.items()}
    watch = _Watch(pipe, stop_after, tuple(capture), on_progress, arguments.get("callback_on_step_end"))
    inputs = list(call.get("callback_on_step_end_tensor_inputs") or [])
    call |= {
        "output_type": "latent",
        "return_dict": True,
        "callback_on_step_end": watch.after_step,
        "callback_on_step_end_tensor_inputs": ["latents", *(name for name in inputs if name != "latents")],
    }
    hooks = [
        module.register_forward_pre_hook(watch.before_call, with_kwargs=True)
        for module in (getattr(pipe, "transformer", None), getattr(pipe, "unet", None))
        if isinstance(module, torch.nn.Module)
    ]
    finished = False
    try:
        with torch.inference_mode():
            pipe(**call)
        finished = True
    finally:
        for hook in hooks:
            hook.remove()
        if not finished and hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()  # a cancelled run must not leave an offloaded network on the device
    return _collected(watch, arguments, prompt)


def _collected(watch: _Watch, call: Mapping[str, Any], prompt: str | Sequence[str] | None) -> Captured:
    if watch.last is None:
        raise LatentError("The pipeline ran without a single step, so there is no latent; raise num_inference_steps.")
    generator = call.get("generator")
    seed = int(generator.initial_seed()) if isinstance(generator, torch.Generator) else None
    texts = prompts_of(call if prompt is None else {"prompt": prompt}, len(watch.last[0]))

    def typed(state: tuple[Tensor, float]) -> Latent:
        tokens = state[0].shape[1] if state[0].ndim == 3 else 0
        grid = grid_of_call(watch.keywords, tokens)
        # Inference tensors may not be used where gradients are; a latent is for keeping.
        with torch.inference_mode(False):
            return latent_of(watch.pipe, state[0].clone(), grid=grid, level=state[1], prompt=texts, seed=seed)

    return Captured(
        latent=typed(watch.last),
        captured={step: typed(state) for step, state in sorted(watch.kept.items())},
        steps=watch.step,
        steps_planned=watch.planned,
        calls=watch.calls,
    )


def prompts_of(call: Mapping[str, Any], batch: int) -> tuple[str, ...] | None:
    """The prompt of each image, in the order pipelines lay them out: all images of a prompt together."""
    prompt = call.get("prompt")
    if prompt is None:
        return None
    prompts = [prompt] if isinstance(prompt, str) else [str(text) for text in prompt]
    if not prompts or batch % len(prompts):
        raise SettingError(f"There are {len(prompts)} prompts for {batch} images; give one, or one for each.")
    return tuple(text for text in prompts for _ in range(batch // len(prompts)))


def _is_text(value: object) -> bool:
    return isinstance(value, str) or (
        isinstance(value, list) and bool(value) and all(isinstance(v, str) for v in value)
    )


def named_arguments(pipe: Any, args: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """A pipeline call's arguments by name. Raises SettingError for what the pipeline does not take."""
    try:
        bound = inspect.signature(type(pipe).__call__).bind_partial(pipe, *args, **keywords)
    except TypeError as fault:
        raise SettingError(f"{type(pipe).__name__}: {fault}.") from None
    given = dict(bound.arguments)
    given.pop(next(iter(given)))  # the pipeline itself
    texts = given.get("image")
    if args and "prompt" not in given and _is_text(texts):  # FLUX.2's pipelines take an image first
        given["prompt"] = given.pop("image")
    for name, parameter in inspect.signature(type(pipe).__call__).parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(name, {})
    return given


OutputType = Literal["pil", "np", "pt", "latent"]
_OUTPUTS = ("pil", "np", "pt", "latent")
_OWN = ("stop_after", "capture", "decoder_prompt", "on_progress", "decode_settings")


@dataclass(frozen=True, slots=True)
class PixelOutput:
    """What an attached pipeline returns.

    images: a list of PIL images; an array `[B, H, W, 3]` in [0, 1] for "np"; a tensor `[B, 3, H, W]` in [0, 1] for
        "pt"; the Latent itself for "latent".
    latents: what was decoded, with its sigma and prompts; save it to decode it again later.
    captured: the latents of the steps named by `capture=`, by step.
    steps: how many steps were run; calls: how often the denoiser was.
    """

    images: Any
    latents: Latent
    captured: Mapping[int, Latent]
    steps: int
    calls: int

    def __getitem__(self, index: int) -> Any:
        """`out[0]` are the images, as in diffusers."""
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
        settings: dict[str, Any],
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
        """Call the pipeline as before; its images are PiD's.

        Takes everything the pipeline takes, and besides, for this call only: stop_after, capture, on_progress,
        decode_settings (a table of `decode` settings), and decoder_prompt where the call has no prompt.
        Returns a PixelOutput, or a tuple of the images for `return_dict=False`.
        """
        own = {name: keywords.pop(name) for name in _OWN if name in keywords}
        call = named_arguments(self._pid_pipe, args, keywords)
        output = call.get("output_type", "pil")
        if output not in _OUTPUTS:
            raise SettingError(f"output_type is {output!r}; it must be one of {', '.join(_OUTPUTS)}.")
        settings = {**self._pid_settings, **own.get("decode_settings", {})}
        _decode_options(settings)
        self._refuse_promptless(call, own, settings, output)
        on_progress = own.get("on_progress", self._pid_on_progress)
        run = run_for_latents(
            self._pid_pipe,
            call,
            stop_after=own.get("stop_after", self._pid_stop_after),
            capture=own.get("capture", self._pid_capture),
            prompt=own.get("decoder_prompt"),
            on_progress=on_progress,
        )
        images = run.latent if output == "latent" else self._images(run, output, settings, on_progress)
        if not call.get("return_dict", True):
            return (images,)
        return PixelOutput(images, run.latent, run.captured, run.steps, run.calls)

    def _refuse_promptless(
        self, call: Mapping[str, Any], own: Mapping[str, Any], settings: dict[str, Any], output: str
    ) -> None:
        """Before the long part, not after it."""
        needs = self._pid_decoder.reads_text and "prompt_embeds" not in settings and output != "latent"
        if needs and call.get("prompt") is None and own.get("decoder_prompt") is None:
            raise SettingError(
                f"{self._pid_decoder.name} reads prompts and this call has no prompt; pass decoder_prompt= beside the "
                'ready-made embeddings (an empty text "" is one).'
            )

    def _images(
        self, run: Captured, output: OutputType, settings: dict[str, Any], on_progress: OnProgress | None
    ) -> Any:
        pipe, decoder = self._pid_pipe, self._pid_decoder
        moved = _move_away(pipe) if self._pid_offload else None
        try:
            images = decode_each(decoder, run.latent, settings, on_progress, tensors=output != "pil")
        finally:
            if moved is not None:
                pipe.to(moved)
        if output == "pil":
            for image in images:
                image.info.get("pidecode", {}).update(
                    pipeline=type(pipe).__name__, pipeline_steps=run.steps, pipeline_steps_planned=run.steps_planned
                )
            return images
        stack = torch.cat(images).float().add(1).div(2)
        return stack if output == "pt" else stack.permute(0, 2, 3, 1).cpu().numpy()


def _decode_options(settings: Mapping[str, Any]) -> DecodeOptions:
    """The keywords, checked. Raises SettingError for one that does not exist."""
    known = set(option_infos())
    unknown = sorted(set(settings) - known)
    if unknown:
        raise SettingError(f"There is no setting {', '.join(unknown)}; there are {', '.join(sorted(known))}.")
    return DecodeOptions(**settings)


def decode_each(
    decoder: PixelDecoder,
    latent: Latent,
    settings: dict[str, Any],
    on_progress: OnProgress | None = None,
    *,
    tensors: bool = False,
) -> list[Any]:
    """A batch decoded one by one, which needs the memory of one: PIL images, or tensors `[1, 3, H, W]` in [-1, 1]."""
    chosen = _decode_options(settings)
    seeds = chosen.seeds(len(latent))
    states = chosen.prompt_embeds
    made: list[Any] = []
    for index, one in enumerate(latent):
        mine = dict(settings)
        if decoder.kind != "feed-forward" or chosen.seed is not None:
            mine["seed"] = seeds[index]
        if isinstance(states, Tensor) and states.ndim == 3 and len(states) == len(latent):
            mine["prompt_embeds"] = states[index : index + 1]

        def tell(step: Step, index: int = index) -> None:
            if on_progress is not None:
                on_progress(Progress("decoding", index * step.total + step.index, len(latent) * step.total))

        output = decoder.decode(one, callback=tell, **mine)
        made.append(output.tensor if tensors else output.image)
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
    **settings: Any,
) -> AttachedPipeline:
    """A diffusers pipeline whose images are PiD's, four times as large; the pipeline itself stays as it is.

    pipe: of the Flux, FLUX.2, Stable Diffusion 3, SDXL, Qwen-Image or Z-Image families; text to image, and the
        relatives that share their call (image to image, inpainting, Kontext, Fill, ControlNet).
    decoder: of the same latent space.
    stop_after: end the diffusion after that step (from 1; "recommended" for the space's own) and decode what
        there is, with the noise it holds.
    capture: steps whose latents are kept too, in `out.captured`, to compare them.
    on_progress: told of each step of both stages; raise `errors.Cancelled` in it to stop.
    offload: keep the pipeline in the processor's memory while PiD decodes, for small GPUs. Pipelines with
        `enable_model_cpu_offload()` do so anyway.
    settings: keywords of `PixelDecoder.decode`.

    The prompt is the call's prompt. Raises LatentError when pipeline and decoder are of different spaces, SettingError
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
    _decode_options(settings)
    return AttachedPipeline(
        pipe, decoder, stop_after=stop_after, capture=capture, on_progress=on_progress, offload=offload,
        settings=settings,
    )  # fmt: skip


def detach(pipe: Any) -> Any:
    """The pipeline as it was before `attach`. Raises SettingError for one that is not attached."""
    if not isinstance(pipe, AttachedPipeline):
        raise SettingError(f"A {type(pipe).__name__} is not attached, so it cannot be detached.")
    return pipe._pid_pipe
