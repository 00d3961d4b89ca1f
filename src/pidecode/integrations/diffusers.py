# SPDX-License-Identifier: Apache-2.0
"""Diffusers pipelines decoded by PiD: `attach`, early stop, and capture of latents during a run.

    pipe = pidecode.attach(pipe, decoder, stop_after="recommended")
    image = pipe("a lighthouse in fog").images[0]
    pipe = pipe.detach()

The pipeline object is not changed: `attach` wraps it, runs it to latents and decodes those.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import Any, Literal

import torch
from torch import Tensor

from pidecode.decoder import PixelDecoder
from pidecode.devices import empty_cache
from pidecode.encoders.text import default_negative_prompt
from pidecode.engine.plan import Plan
from pidecode.errors import LatentError, SettingError
from pidecode.images import SourceImage
from pidecode.integrations import pipeline_latents
from pidecode.integrations.pipeline_latents import StopAfter
from pidecode.latents.latent import Latent
from pidecode.latents.layout import packed_grid
from pidecode.options import MAX_SIGMA, DecodeOptions
from pidecode.sampling import Callback, Step

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass(frozen=True, slots=True)
class PipelineProgress:
    """How far a call is: `step` of `num_steps`, first of the diffusion, then of the decoding."""

    stage: Literal["diffusion", "decoding"]
    step: int
    num_steps: int


PipelineCallback = Callable[[PipelineProgress], None]  # called after every step; raise `errors.Cancelled` in it to stop


def step_report(
    callback: PipelineCallback | None, stage: Literal["diffusion", "decoding"], done: int, count: int
) -> Callback:
    """What a sampler calls after its steps for the image after `done` of `count`, to tell a PipelineCallback."""

    def report(step: Step) -> None:
        if callback is not None:
            callback(PipelineProgress(stage, done * step.total + step.index, count * step.total))

    return report


@dataclass(frozen=True, slots=True)
class CapturedLatents:
    """Latents of one run of a pipeline."""

    latent: Latent  # the last one, with its noise level and prompts
    intermediate: Mapping[int, Latent]  # those of the captured steps, by step, counted from 1
    num_steps: int  # steps that were run
    num_steps_planned: int  # steps of the whole schedule
    denoiser_calls: int  # forward passes of the pipeline's network


@dataclass(slots=True)
class _StepRecorder:
    """Follows a run through the pipeline's step callback and a forward pre-hook of its network."""

    pipe: Any
    stop_after: StopAfter
    capture_steps: Sequence[int]
    progress_callback: PipelineCallback | None
    step_callback: Callable[..., Any] | None
    tensor_inputs: Sequence[str]
    max_sigma: float
    denoiser_calls: int = 0
    grid_keywords: Mapping[str, Any] = field(default_factory=dict)
    step: int = 0
    num_steps: int = 0
    last: tuple[Tensor, float] | None = None
    kept: dict[int, tuple[Tensor, float]] = field(default_factory=dict)

    def before_denoiser(self, _module: Any, _args: Any, keywords: Mapping[str, Any]) -> None:
        """Forward pre-hook of the network; its first call tells the grid of packed tokens."""
        self.denoiser_calls += 1
        if not self.grid_keywords:
            self.grid_keywords = {name: keywords[name] for name in ("img_ids", "img_shapes") if name in keywords}

    def on_step_end(self, pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        """The pipeline's `callback_on_step_end`."""
        result = tensors
        if self.step_callback is not None:
            # It sees the tensors that it asked for, as without the recorder, and may return some of them changed.
            own = {name: tensors[name] for name in self.tensor_inputs}
            result = {**tensors, **(self.step_callback(pipe, index, timestep, own) or {})}
        latents = result["latents"]
        if not self.step:  # after the first step the schedule is known
            # ERNIE-Image's pipeline does not tell it.
            self.num_steps = int(getattr(self.pipe, "num_timesteps", 0)) or len(pipe.scheduler.timesteps)
            self.stop_after = pipeline_latents.stop_step(
                self.pipe, self.stop_after, self.num_steps, self.max_sigma, self.capture_steps
            )
        self.step = index + 1
        self.last = (latents.detach(), pipeline_latents.scheduler_sigma(pipe.scheduler))
        if self.step in self.capture_steps:
            self.kept[self.step] = (latents.detach().clone(), self.last[1])
        if self.progress_callback is not None:
            last_step = self.stop_after if isinstance(self.stop_after, int) else self.num_steps
            self.progress_callback(PipelineProgress("diffusion", self.step, last_step))
        if self.step == self.stop_after:
            pipe._interrupt = True  # the pipeline then skips the rest of its loop, forward passes included
        return result

    def latent(self, state: tuple[Tensor, float], size: tuple[int, int] | None, about: Mapping[str, Any]) -> Latent:
        """A recorded state, on which gradients may be taken: a copy made outside of inference mode."""
        tensor, sigma = state
        grid = pipeline_latents.token_grid(self.grid_keywords, tensor.shape[1] if tensor.ndim == 3 else 0)
        if grid is None and tensor.ndim == 3 and size is not None:
            grid = packed_grid(pipeline_latents.pipeline_space(self.pipe), *size)
        with torch.inference_mode(False):
            return pipeline_latents.to_latent(self.pipe, tensor.clone(), grid=grid, sigma=sigma, **about)


def capture_latents(
    pipe: Any,
    call: Mapping[str, Any],
    *,
    stop_after: StopAfter = None,
    capture_steps: Sequence[int] = (),
    prompt: str | Sequence[str] | None = None,
    progress_callback: PipelineCallback | None = None,
    max_sigma: float = MAX_SIGMA,
) -> CapturedLatents:
    """Call a diffusers pipeline with the keywords `call` for its latents instead of its images.

    A step callback of the caller's own still runs. `capture_steps` are counted from 1; `prompt`, one for all or one per
    image, says what the images show where `call` does not.

    Raises:
        SettingError: A step does not exist or leaves more noise than `max_sigma`, or the pipeline cannot be
            interrupted.
        LatentError: The pipeline ran without a step.
    """
    _check_pipeline(pipe, stop_after)
    # Some pipelines write their chat template into the list of prompts they are given: they get a copy.
    keywords = {name: list(value) if isinstance(value, list) else value for name, value in call.items()}
    step_callback = call.get("callback_on_step_end")
    # diffusers' callback objects name their tensors themselves.
    inputs = getattr(step_callback, "tensor_inputs", None) or keywords.get("callback_on_step_end_tensor_inputs")
    inputs = ["latents"] if inputs is None else list(inputs)
    recorder = _StepRecorder(
        pipe, stop_after, tuple(capture_steps), progress_callback, step_callback, inputs, max_sigma
    )
    keywords |= {
        "output_type": "latent",
        "return_dict": True,
        "callback_on_step_end": recorder.on_step_end,
        "callback_on_step_end_tensor_inputs": ["latents", *(name for name in inputs if name != "latents")],
    }
    hooks = [
        module.register_forward_pre_hook(recorder.before_denoiser, with_kwargs=True)
        for module in (getattr(pipe, "transformer", None), getattr(pipe, "unet", None))
        if isinstance(module, torch.nn.Module)
    ]
    finished = False
    try:
        with torch.inference_mode():
            pipe(**keywords)
        finished = True
    finally:
        for hook in hooks:
            hook.remove()
        if not finished and hasattr(pipe, "maybe_free_model_hooks"):
            pipe.maybe_free_model_hooks()  # a cancelled run must not leave an offloaded network on the device
    if recorder.last is None:
        raise LatentError("The pipeline ran without a single step, so there is no latent; raise num_inference_steps.")
    generator = call.get("generator")
    seed = int(generator.initial_seed()) if isinstance(generator, torch.Generator) else None
    prompts = image_prompts(call.get("prompt") if prompt is None else prompt, len(recorder.last[0]))
    size, about = _size_of_call(pipe, call), {"prompt": prompts, "seed": seed}
    return CapturedLatents(
        latent=recorder.latent(recorder.last, size, about),
        intermediate={step: recorder.latent(state, size, about) for step, state in sorted(recorder.kept.items())},
        num_steps=recorder.step, num_steps_planned=recorder.num_steps, denoiser_calls=recorder.denoiser_calls,
    )  # fmt: skip


def _size_of_call(pipe: Any, call: Mapping[str, Any]) -> tuple[int, int] | None:
    """Height and width of a call's images; a pipeline's default where it gives none."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    side = int(getattr(pipe, "default_sample_size", 0)) * int(getattr(pipe, "vae_scale_factor", 0))
    height, width = (
        call.get(name) or getattr(parameters.get(name), "default", None) or side for name in ("height", "width")
    )
    return (height, width) if isinstance(height, int) and isinstance(width, int) and height and width else None


def image_prompts(prompt: str | Sequence[str] | None, batch: int) -> list[str] | None:
    """The prompt of each image, in the order of pipelines: all images of the first prompt, then of the next."""
    if prompt is None:
        return None
    prompts = [prompt] if isinstance(prompt, str) else [str(text) for text in prompt]
    if not prompts or batch % len(prompts):
        raise SettingError(f"There are {len(prompts)} prompts for {batch} images; give one, or one for each.")
    return [text for text in prompts for _ in range(batch // len(prompts))]


@dataclass(frozen=True, slots=True)
class PipelineOutput:
    """What an attached pipeline returns; indexed or iterated, it has `images` alone, as in diffusers."""

    # PIL images; for "np" an array `[B, H, W, 3]` and for "pt" a tensor `[B, 3, H, W]` in [0, 1]; or the `Latent`
    images: Any
    latents: Latent  # what was decoded, with its noise level and prompts
    captured: Mapping[int, Latent]  # those of the captured steps, by step, counted from 1
    num_steps: int  # steps of diffusion that were run
    denoiser_calls: int  # forward passes of the pipeline's network

    def __getitem__(self, index: int) -> Any:
        return (self.images,)[index]

    def __iter__(self) -> Iterator[Any]:
        return iter((self.images,))


@dataclass(frozen=True, slots=True)
class _Attachment:
    """Everything an `AttachedPipeline` has of its own, as one value beside the wrapped pipeline's attributes."""

    pipe: Any
    decoder: PixelDecoder
    stop_after: StopAfter
    capture_steps: Sequence[int]
    progress_callback: PipelineCallback | None
    offload: bool
    options: DecodeOptions
    home: torch.device  # of the decoder when it was attached


class AttachedPipeline:
    """A diffusers pipeline whose images a `PixelDecoder` decodes; made by `attach`.

    All attributes but the call and `detach` are the pipeline's own.
    """

    _attachment: _Attachment

    def __init__(self, attachment: _Attachment) -> None:
        object.__setattr__(self, "_attachment", attachment)

    def __getattr__(self, name: str) -> Any:
        pipe = object.__getattribute__(self, "_attachment").pipe
        value = getattr(pipe, name)
        if not callable(value) or getattr(value, "__self__", None) is not pipe:
            return value

        @wraps(value)
        def call(*args: Any, **keywords: Any) -> Any:
            result = value(*args, **keywords)
            return self if result is pipe else result  # `pipe = pipe.to(device)` stays attached

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._attachment.pipe, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type[Any]:
        """The pipeline's class, by which diffusers' `from_pipe` finds the relatives of what it is given."""
        own = object.__getattribute__(self, "__dict__").get("_attachment")
        return AttachedPipeline if own is None else type(own.pipe)

    def __repr__(self) -> str:
        return f"AttachedPipeline({type(self._attachment.pipe).__name__}, decoder={self._attachment.decoder.name!r})"

    def detach(self) -> Any:
        """The pipeline as it was before `attach`."""
        return self._attachment.pipe

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Call the pipeline as before; its images are decoded by PiD.

        Args:
            args: Of the pipeline's call.
            keywords: Of the pipeline's call. For this call alone, `stop_after`, `capture_steps` and
                `progress_callback` replace what `attach` was given, and so do the options that are set in
                `decode_options` (a `DecodeOptions`). Their `prompt` is read in place of the call's own.

        Returns:
            A `PipelineOutput`; for `return_dict=False` a tuple of the images alone.

        Raises:
            SettingError: An argument is not one of the pipeline's, a step does not exist, a decoder that reads text
                got no prompt, or an option cannot act.
            Cancelled: The progress callback asked to stop.
        """
        for_call = {n: keywords.pop(n) for n in ("stop_after", "capture_steps", "progress_callback") if n in keywords}
        own, given = replace(self._attachment, **for_call), keywords.pop("decode_options", None)
        call = _named_arguments(own.pipe, args, keywords)
        output_type, options = call.get("output_type", "pil"), own.options
        if given is not None:
            check_options(given, own.decoder)
            options = options.replace(**{entry: getattr(given, entry) for entry in given.__dataclass_fields__})
        check_call(own.decoder, call, options)
        if (device := _shared_device(own)) is not None:
            _leave(own.decoder, device)
        run = capture_latents(
            own.pipe, call, stop_after=own.stop_after, capture_steps=own.capture_steps, prompt=options.prompt,
            progress_callback=own.progress_callback, max_sigma=own.decoder.max_sigma,
        )  # fmt: skip
        images = run.latent if output_type == "latent" else _decode_run(own, run, output_type, options)
        if not call.get("return_dict", True):
            return (images,)
        return PipelineOutput(images, run.latent, run.intermediate, run.num_steps, run.denoiser_calls)


def _decode_run(own: _Attachment, run: CapturedLatents, output_type: str, options: DecodeOptions) -> Any:
    """Decode the latents of a run, where pipeline and decoder take turns on a device in the decoder's turn."""
    pipe, decoder = own.pipe, own.decoder
    fixes = options.color_fix not in (None, "off") and options.reference is None
    if fixes and isinstance(getattr(pipe, "vae", None), torch.nn.Module) and not run.latent.sigmas.any():
        images = pipeline_latents.vae_decode(pipe, run.latent)  # the pipeline's VAE is at hand, so no other need be
        options = options.replace(reference=[SourceImage(tensor=image) for image in images.split(1)])
    shared, home = _shared_device(own), _offload_pipeline(pipe) if own.offload else None
    steps = (run.num_steps, run.num_steps_planned)
    try:
        if shared is not None:
            options = _with_states(decoder, run.latent, options, shared)
            decoder.runner.place(shared)
        return decode_images(decoder, run.latent, output_type, options, pipe, steps, own.progress_callback)
    finally:
        if shared is not None:
            _leave(decoder, shared)
        if home is not None:
            pipe.to(home)


def _named_arguments(pipe: Any, args: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """A pipeline call's arguments by name. Raises SettingError for what the pipeline does not take."""
    signature = inspect.signature(type(pipe).__call__)
    try:
        bound = signature.bind_partial(pipe, *args, **keywords)
    except TypeError as error:
        raise SettingError(f"{type(pipe).__name__}: {error}.") from None
    call = dict(bound.arguments)
    call.pop(next(iter(call)))  # the pipeline itself
    first = call["image"] if isinstance(call.get("image"), list) else [call.get("image")]
    if args and "prompt" not in call and first and all(isinstance(text, str) for text in first):
        call["prompt"] = call.pop("image")  # FLUX.2's pipelines take an image first
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            call |= call.pop(name, {})
    return call


def check_space(pipe: Any, decoder: PixelDecoder) -> None:
    """Raise LatentError for a decoder of another space than the pipeline's."""
    space = pipeline_latents.pipeline_space(pipe)
    if decoder.space.name != space.name:
        raise LatentError(
            f"A {type(pipe).__name__} works in space {space.name} and {decoder.name} decodes {decoder.space.name}. "
            f"Load the decoder of {space.name}."
        )


def _check_pipeline(pipe: Any, stop_after: StopAfter = None) -> None:
    """Raise SettingError for a pipeline that PiD does not decode, or whose steps cannot be followed or ended early."""
    pipeline_latents.pipeline_space(pipe)
    if any(kind.__name__ == "ModularPipeline" for kind in type(pipe).__mro__):
        raise SettingError(
            f"A {type(pipe).__name__} is a modular pipeline, which is not wrapped: put PiD's decode block into its "
            "blocks, pipe = pidecode.pid_blocks(pipe.blocks).init_pipeline(...), as docs/diffusers.md shows."
        )
    parameters = inspect.signature(type(pipe).__call__).parameters
    if not {"callback_on_step_end", "output_type"} <= set(parameters):
        raise SettingError(
            f"A {type(pipe).__name__} takes no callback_on_step_end, by which its latents are followed. Call it with "
            'output_type="latent", and decode what latent_from_pipeline makes of that.'
        )
    pipeline_latents.check_stop_after(stop_after)
    if stop_after is not None and not hasattr(type(pipe), "interrupt"):
        raise SettingError(f"A {type(pipe).__name__} cannot be interrupted; leave stop_after out, or capture steps.")
    if stop_after == "recommended":
        pipeline_latents.recommended_stop_step(pipe, 1)  # an error where there is none


def check_options(options: object, decoder: PixelDecoder) -> None:
    """Raise SettingError for options that cannot act on a decoder."""
    if not isinstance(options, DecodeOptions):
        raise SettingError(
            f"The decoder's options are {type(options).__name__}; give pidecode.DecodeOptions(seed=..., ...)."
        )
    options.require_acting(decoder.kind, "decode", decoder.name)
    if not decoder.reads_text and (options.prompt is not None or options.prompt_embeds is not None):
        raise SettingError(f"{decoder.name} reads no text, so prompt and prompt_embeds cannot act; leave them out.")


def check_call(decoder: PixelDecoder, call: Mapping[str, Any], options: DecodeOptions) -> None:
    """Raise SettingError, before the diffusion, for keywords of a pipeline's call that PiD cannot follow."""
    output_type = call.get("output_type", "pil")
    if call.get("padding_mask_crop") is not None:
        raise SettingError("padding_mask_crop pastes a crop into an image of the VAE's size; leave it out.")
    if output_type not in OUTPUT_TYPES:
        raise SettingError(f"output_type is {output_type!r}; it must be one of {', '.join(OUTPUT_TYPES)}.")
    given = (call.get("prompt"), options.prompt, options.prompt_embeds)
    if output_type != "latent" and decoder.reads_text and all(value is None for value in given):
        raise SettingError(
            f"{decoder.name} reads prompts and this call has none; pass decode_options=DecodeOptions(prompt=...) "
            'beside the ready-made embeddings (an empty text "" is a prompt).'
        )


def decode_images(
    decoder: PixelDecoder,
    latent: Latent,
    output_type: str,
    options: DecodeOptions,
    pipe: Any,
    steps: tuple[int, int],
    progress_callback: PipelineCallback | None = None,
) -> Any:
    """Decode a batch in the memory that one image needs, to what `PipelineOutput` has for an output type.

    Raises:
        SettingError: The `steps` that the pipeline ran, of those planned, left too much noise.
    """
    sigma = float(latent.sigmas.max())
    if sigma > decoder.max_sigma:
        raise SettingError(
            f"The diffusion was interrupted after step {steps[0]} of {steps[1]}, where sigma is "
            f"{sigma:.2f}; {decoder.name} was trained up to {decoder.max_sigma:g}. Interrupt later, or take the "
            'latent with output_type="latent".'
        )
    own = replace(options, prompt=None).per_image(decoder.kind, len(latent))  # the latent has the prompts
    outputs = [
        decoder.decode(one, options=own[i], callback=step_report(progress_callback, "decoding", i, len(latent)))
        for i, one in enumerate(latent)
    ]
    if output_type == "pil":
        for output in outputs:
            output.metadata[0].update(
                pipeline=type(pipe).__name__, pipeline_num_steps=steps[0], pipeline_num_steps_planned=steps[1]
            )
        return [output.image for output in outputs]
    images = torch.cat([output.tensor for output in outputs]).float().add(1).div(2)
    return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()


def _offload_pipeline(pipe: Any) -> Any:
    """Move a pipeline to the CPU; returns its device, or None if it was there or offloads itself."""
    if getattr(pipe, "_all_hooks", None) or getattr(pipe, "hf_device_map", None):
        pipe.maybe_free_model_hooks()
        return None
    if any(hasattr(part, "_hf_hook") for part in pipe.components.values()):
        return None  # enable_sequential_cpu_offload: each layer is on the device while it runs alone
    device = pipe.device
    if device.type == "cpu":
        return None
    pipe.to("cpu")
    empty_cache(device)
    return device


def _shared_device(own: _Attachment) -> torch.device | None:
    """The accelerator on which pipeline and decoder take turns; None where they do not."""
    device = own.home if own.home.type != "cpu" else torch.device(getattr(own.pipe, "_execution_device", "cpu"))
    return device if own.offload and device.type not in ("cpu", "meta") else None


def _leave(decoder: PixelDecoder, device: torch.device) -> None:
    decoder.runner.place(torch.device("cpu"))
    empty_cache(device)


def _with_states(decoder: PixelDecoder, latent: Latent, options: DecodeOptions, device: torch.device) -> DecodeOptions:
    """Options whose prompts are encoded already, by a text encoder that has left the device again."""
    if decoder.text is None:
        return options
    plan = decoder.runner.plan
    on_host = isinstance(plan, Plan) and plan.text_on_host
    prompts = [] if options.prompt_embeds is not None else [prompt or "" for prompt in latent.prompts]
    negative = default_negative_prompt() if options.negative_prompt is None else options.negative_prompt
    guided = decoder.kind == "teacher" and options.guidance_scale != 1.0
    if not prompts and not guided:
        return options
    # The negative prompt's states are then found in the cache.
    states = decoder.text.encode_and_unload([*prompts, *([negative] * guided)], None if on_host else device)
    return options.replace(prompt_embeds=states[: len(prompts)]) if prompts else options


def attach(
    pipe: Any,
    decoder: PixelDecoder,
    *,
    stop_after: StopAfter = None,
    capture_steps: Sequence[int] = (),
    progress_callback: PipelineCallback | None = None,
    offload: bool = False,
    options: DecodeOptions | None = None,
) -> AttachedPipeline:
    """Wrap a diffusers pipeline so that a PiD decoder makes its images, four times as large.

    The pipeline itself is not changed. A decoder that reads text reads the call's prompt.

    Args:
        pipe: A pipeline of the FLUX.1, FLUX.2, Stable Diffusion 3, SDXL, Qwen-Image or Z-Image families, text to
            image or a relative (image to image, inpainting, edits, Fill, ControlNet), or another with the VAE of one.
        decoder: A decoder of the pipeline's latent space.
        stop_after: End the diffusion after that step, counted from 1, and decode the noisy latent; "recommended" is
            what PiD's authors recommend (https://arxiv.org/abs/2605.23902), in proportion to the run's length.
        capture_steps: Steps whose latents are returned too, as `out.captured`.
        progress_callback: Called after each step of diffusion and decoding; raise `errors.Cancelled` in it to stop.
        offload: Pipeline, text encoder and decoder take turns on the device: each is in main memory while another
            runs, the decoder also between calls. A decoder on the CPU goes to the pipeline's device for its turn.
            Pipelines with `enable_model_cpu_offload()` leave by themselves; the decoder does so with this alone.
        options: How to decode.

    Returns:
        The wrapped pipeline; its `detach()` returns the pipeline.

    Raises:
        LatentError: Pipeline and decoder are of different latent spaces.
        SettingError: PiD has no decoder for the pipeline's space, the pipeline is attached already, or an option
            cannot act.
    """
    if isinstance(pipe, AttachedPipeline):
        raise SettingError("This pipeline is attached already; call its detach() first.")
    _check_pipeline(pipe, stop_after)
    check_space(pipe, decoder)
    options = options or DecodeOptions()
    check_options(options, decoder)
    return AttachedPipeline(
        _Attachment(
            pipe, decoder, stop_after, tuple(capture_steps), progress_callback, offload, options, decoder.device
        )
    )
