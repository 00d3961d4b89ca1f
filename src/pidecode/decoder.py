# SPDX-License-Identifier: Apache-2.0
"""PixelDecoder: a network with everything around it, from latents or images in to large images out."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pidecode import sampling
from pidecode.color_fix import corrected
from pidecode.devices import default_dtype, select_device
from pidecode.encoders.base import EncodeFunction, LazyImageEncoder, can_show, on_device, vae_reference
from pidecode.encoders.text import (
    PromptEmbedsCache,
    TextEncoder,
    TextOptions,
    default_negative_prompt,
    prompt_states,
    select_prompt_embeds,
)
from pidecode.engine.feed_forward import ENCODER_WORK, FeedForwardPlan, FeedForwardRunner
from pidecode.engine.plan import Plan
from pidecode.engine.runner import Runner, make_runner, require_memory
from pidecode.errors import LatentError, SettingError, naming
from pidecode.images import (
    DecodeOutput,
    ImageSource,
    SourceImage,
    crop_back,
    downsampled,
    fit_to_encoder,
    is_finite,
    load_tensor,
    read_images,
)
from pidecode.latents.latent import Latent, require_latent
from pidecode.models.pid.network import Grid, PiDNet
from pidecode.models.tiny import TinyDecoder
from pidecode.options import (
    MAX_SEED,
    MAX_SIGMA,
    SIGMA_ROUNDING,
    ColorFix,
    Command,
    DecodeOptions,
    DecoderKind,
    Fit,
    RuntimeOptions,
    Sides,
)
from pidecode.registry.checkpoints import CHECKPOINTS, V1PT5_SHIFT, Checkpoint, Sampler, size_warning
from pidecode.registry.spaces import LatentSpace, get_space
from pidecode.sampling import Callback, DecodeProgressCallback, Predict, Step, WorkTracker
from pidecode.units import parse_dtype
from pidecode.version import __version__
from pidecode.weights.detect import Overrides, detect
from pidecode.weights.load import apply_lora, build_network
from pidecode.weights.metadata import CheckpointMetadata
from pidecode.weights.read import read_weights
from pidecode.weights.resolve import default_encoder_path, resolve_checkpoint

SIGMA_SEED_OFFSET = 1 << 32  # added to the seed for the noise that `sigma=` puts into a clean latent
PromptEmbeds = Tensor | str | PathLike[str]


class PixelDecoder:
    """Decodes latents of one space to images.

    A decoder is not safe to use from several threads at once.

    Args:
        net: The network, on its device and in its number format.
        metadata: What the weights are: their kind, and the latent space they read.
        name: What to call it in messages and in the images' metadata.
        encoder: Images to latents of the space, for `encode` and `upscale`.
        text: The text encoder, for networks with a text stream; without it they need `prompt_embeds`.
        plan: How to run within limits of memory; see `pidecode.plan_decode`.
        runtime: How to run fast.

    Raises:
        SettingError: The weights are no decoder, or not of the space.
    """

    def __init__(
        self,
        net: PiDNet | TinyDecoder,
        metadata: CheckpointMetadata,
        *,
        name: str = "this decoder",
        encoder: EncodeFunction | None = None,
        text: TextEncoder | None = None,
        plan: Plan | FeedForwardPlan | None = None,
        runtime: RuntimeOptions | None = None,
    ) -> None:
        if metadata.kind not in ("feed-forward", "student", "teacher") or metadata.space is None:
            raise SettingError(
                f"{name} is a {metadata.kind} of space {metadata.space}; a decoder is feed-forward, a student or a "
                "teacher, and of one space."
            )
        self.net, self.metadata, self.name, self.encoder, self.text = net, metadata, name, encoder, text
        self.kind: DecoderKind = metadata.kind
        self.space: LatentSpace = get_space(metadata.space)
        self.runner = make_runner(net, plan, runtime or RuntimeOptions(), metadata.kind, name)
        if self.space.channels != net.config.latent_channels:
            raise SettingError(
                f"{name} takes latents of {net.config.latent_channels} channels, but those of space {self.space.name} "
                f"have {self.space.channels}. Name the right space when loading it."
            )

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | PathLike[str],
        *,
        space: str | None = None,
        variant: str | None = None,
        kind: DecoderKind | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | str | None = None,
        encoder: str | PathLike[str] | None = None,
        text_encoder: str | PathLike[str] | None = None,
        plan: Plan | FeedForwardPlan | Callable[[CheckpointMetadata], Plan | FeedForwardPlan] | None = None,
        runtime: RuntimeOptions | None = None,
    ) -> PixelDecoder:
        """Load a decoder that is on this machine; `pidecode pull` fetches the official ones.

        Args:
            name_or_path: "tiny" (ships with the package), a latent space ("flux2") or a name as `pidecode models`
                lists it ("flux2/2k") for a downloaded official file, or a file (.safetensors or official .pth).
            space: Latent space, where the file does not say it.
            variant: Release, as `pidecode models` lists them.
            kind: Student or teacher, where the file does not say it.
            device: By default the best there is.
            dtype: By default what suits the device; torch.bfloat16, "bfloat16" or "bf16".
            encoder: The space's encoder, a file or folder, where it does not lie where `pidecode pull` puts it.
            text_encoder: Likewise Gemma-2: a folder, or a single file as ComfyUI has it, in bf16 or fp8.
            plan: From `pidecode.plan_decode`, or a function that makes one of what the weights are; it settles dtype.
            runtime: Compilation, CUDA graphs and attention.

        Raises:
            SettingError: Something must be named, or cannot act.
            CheckpointError: The file is not what it should be.
            DownloadError: The file is not on this machine.
            MissingDependencyError: A compiler or package is missing.
        """
        chosen = select_device(device)
        resolved = resolve_checkpoint(str(name_or_path), space=space, variant=variant, kind=kind)
        file = read_weights(resolved.path)
        metadata = detect(file, Overrides(space=resolved.space, variant=resolved.variant, kind=resolved.kind))
        assert metadata.config is not None  # detect refuses encoders
        if callable(plan):
            plan = plan(metadata)
        if isinstance(dtype, str):
            dtype = cast(torch.dtype, getattr(torch, parse_dtype(dtype)))
        dtype = getattr(torch, plan.dtype) if plan is not None else dtype or default_dtype(chosen)
        # A plan may keep parts of the network on the host, so it is built there.
        place = "cpu" if isinstance(plan, Plan) else chosen
        text_device = "cpu" if isinstance(plan, Plan) and plan.text_on_host else chosen
        encoder = encoder or resolved.encoder or default_encoder_path(metadata.space)
        net = build_network(file.tensors, metadata.config, dtype=dtype, device=place, source=str(resolved.path))
        reads_text = isinstance(net, PiDNet) and net.config.has_text
        if text_encoder is not None and not reads_text:
            raise SettingError(f"{resolved.name} reads no text, so text_encoder cannot act; leave it out.")
        text = TextOptions() if text_encoder is None else TextOptions(model=os.fspath(text_encoder))
        decoder = cls(
            net, metadata, name=resolved.name,
            encoder=LazyImageEncoder.of(encoder, metadata.space, chosen, dtype),
            text=TextEncoder(text, device=text_device, states=PromptEmbedsCache()) if reads_text else None,
            plan=plan, runtime=runtime,
        )  # fmt: skip
        if isinstance(decoder.runner, Runner):
            decoder.runner.require(chosen)
            if plan is not None:
                decoder.runner.arrange(chosen)
        return decoder

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The registry's row of the released file it comes from, if it comes from one."""
        return CHECKPOINTS.get((self.space.name, self.metadata.variant or "", cast(Any, self.kind)))

    @property
    def scale(self) -> int:
        """Output pixels per pixel of the image the latent stands for, along each side."""
        return self.net.config.scale

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.net.device

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the weights."""
        return self.net.dtype

    @property
    def license(self) -> str:
        """Short name of the weights' license, "unknown" where the file does not say."""
        return self.metadata.license or "unknown"

    @property
    def reads_text(self) -> bool:
        """Whether a prompt acts on it."""
        return isinstance(self.net, PiDNet) and self.net.config.has_text

    def upscaled_size(self, size: tuple[int, int], options: DecodeOptions | None = None) -> tuple[int, int]:
        """Width and height of what `upscale` makes of an image of a size; SizeError for what it cannot make."""
        options, fixed = options or DecodeOptions(), self.space.fixed_input
        step = self.space.input_multiple if options.fit == "crop" else 1
        width, height = (fixed or side // step * step or side for side in size)
        return options.downsampled_size((width * self.scale, height * self.scale), self.scale, self.name)

    def decoded_size(self, natural: tuple[int, int], options: DecodeOptions) -> tuple[int, int]:
        """Width and height of what `decode` makes of a latent of a natural size; SizeError for what it cannot make."""
        if isinstance(self.net, PiDNet):
            return options.completed_size(natural, self.net.config.patch_size)
        return options.downsampled_size(natural, self.scale, self.name)

    @property
    def max_sigma(self) -> float:
        """Highest noise level of a latent that it decodes well."""
        return self.net.config.max_sigma if isinstance(self.net, TinyDecoder) else MAX_SIGMA

    def flow_shift(self, height: int, width: int) -> float:
        """A teacher's default flow shift for an output of that size in pixels."""
        return ((self.checkpoint and self.checkpoint.shift) or V1PT5_SHIFT).at(height, width)

    def memory_estimate(self, size: tuple[int, int], *, batch: int = 1) -> int:
        """Predicted peak of memory on the device, in bytes, of decoding to `size` (width, height), weights included."""
        return self.runner.plan_for(size, batch).peak

    def load_lora(self, path: str | PathLike[str], scale: float = 1.0) -> None:
        """Add a low-rank adapter's change, times `scale`, to the weights; the negated scale takes it back.

        Raises:
            CheckpointError: The file is no adapter of this network.
            SettingError: The decoder is feed-forward, or its weights can no longer be changed.
        """
        if not isinstance(self.net, PiDNet) or not isinstance(self.runner, Runner):
            raise SettingError(
                f"Adapters act on student and teacher decoders only, and {self.name} is feed-forward; load it without."
            )
        self.runner.forget()
        apply_lora(self.net, Path(path), scale)
        self.name = f"{self.name} + {Path(path).stem} at {scale:g}"

    def __repr__(self) -> str:
        reads = "text" if self.reads_text else "no text"
        return (
            f"PixelDecoder({self.name}, {self.kind}, space {self.space.name}, {self.scale}x, reads {reads}, "
            f"{str(self.dtype).removeprefix('torch.')} on {self.device}, license {self.license})"
        )

    def encode(self, image: ImageSource | Sequence[ImageSource], *, fit: Fit = "pad") -> Latent:
        """Encode an image, or a list of images of one size, to a clean latent of this decoder's space.

        Args:
            image: A path, the bytes of a file, an open file, a Pillow image, an array or tensor of uint8, of uint16 or
                of floats in [-1, 1], or what `pidecode.read_image` returned, which also takes floats in [0, 1].
            fit: For sides that the encoder cannot divide: "pad" by mirrored edges, or "crop" around the center.

        Raises:
            ImageError: It is no image; of a list, the index is named.
            LatentError: The images of a list have different sizes.
            SizeError: The image is too small.
            SettingError: There is no encoder, or an option cannot act.
        """
        multiple, fixed = self.space.input_multiple, self.space.fixed_input
        fitted = [fit_to_encoder(source.on_white(), fit, multiple, fixed)[0] for source in read_images(image)]
        return Latent.cat([self._encode(tensor, WorkTracker()) for tensor in fitted])

    def decode(
        self,
        latent: Latent | Sequence[Latent],
        *,
        options: DecodeOptions | None = None,
        seed: int | Sequence[int] | None = None,
        num_steps: int | None = None,
        sampler: Sampler | None = None,
        sigma: float | None = None,
        size: Sides | None = None,
        guidance_scale: float | None = None,
        shift: float | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        prompt_embeds: Tensor | str | PathLike[str] | None = None,
        color_fix: ColorFix | None = None,
        reference: ImageSource | None = None,
        callback: Callback | None = None,
        progress_callback: DecodeProgressCallback | None = None,
    ) -> DecodeOutput:
        """Decode a latent: only the latent and the prompt inform the image, unless a color fix adds a reference.

        The same seed gives the same image on the same device and versions; on another device the noise is the same
        and the arithmetic differs by rounding.

        Args:
            latent: Normalized, of this decoder's space; or a list of latents of any size, decoded one after another.
            options: All the following as one value; keywords given beside it take precedence.
            seed: One seed (each further image of a batch takes the next number, of a list the same), or one per image.
                Default 0.
            num_steps: Denoising steps. Student: 1 to 4, default 4. Teacher: default 25.
            sampler: Student only: "sde" (default) or "ode".
            sigma: Noise to add to a clean latent, from 0 to `max_sigma`.
            size: Width and height of the result in pixels; None for one keeps the shape. Students and teachers decode
                to that size; what a feed-forward decoder makes is downsampled to it.
            guidance_scale: Teacher only: classifier-free guidance, default 5.
            shift: Teacher only: flow shift.
            prompt: For decoders that read text: one for all, or one per latent; default the latent's own.
            negative_prompt: Teacher only.
            prompt_embeds: Text states `[B, tokens, text_dim]` in place of the text encoder, or a file that has them.
            color_fix: "off" (default), "auto", "coarse", "fine" or "back-projection": see `pidecode.color_fix`.
            reference: Image that the color fix and the drift report go by, as `encode` takes it; default the VAE's. A
                feed-forward decoder also reads it for back-projection, if it has the size the latent was made from.
            callback: Called after each step with the current estimate; raise `errors.Cancelled` in it to stop.
            progress_callback: Called before each piece of work with what it is and the share of the work done so far.

        Raises:
            LatentError: The latent is not of this decoder's space, or the network answered with NaN.
            SettingError: An option cannot act or is out of range.
            SizeError: The size does not fit the network or the latent.
            Cancelled: The callback asked to stop.
        """
        chosen = (options or DecodeOptions()).replace(
            seed=seed, num_steps=num_steps, sampler=sampler, sigma=sigma, size=size, guidance_scale=guidance_scale,
            shift=shift, prompt=prompt, negative_prompt=negative_prompt, prompt_embeds=prompt_embeds,
            color_fix=color_fix, reference=reference,
        )  # fmt: skip
        latents = latent if isinstance(latent, (list, tuple)) else [latent]
        run = partial(self._decode, command="decode", callback=callback)
        return self._one_by_one(run, latents, chosen, progress_callback)

    def upscale(  # noqa: D417 - most are those of `decode`
        self,
        image: ImageSource | Sequence[ImageSource],
        *,
        options: DecodeOptions | None = None,
        seed: int | Sequence[int] | None = None,
        num_steps: int | None = None,
        sampler: Sampler | None = None,
        sigma: float | None = None,
        size: Sides | None = None,
        scale: float | None = None,
        guidance_scale: float | None = None,
        shift: float | None = None,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | None = None,
        prompt_embeds: Tensor | str | PathLike[str] | None = None,
        color_fix: ColorFix | None = None,
        fidelity: float | None = None,
        reference: ImageSource | None = None,
        fit: Fit | None = None,
        callback: Callback | None = None,
        progress_callback: DecodeProgressCallback | None = None,
    ) -> DecodeOutput:
        """Encode an image and decode it larger, by default `self.scale` times.

        Args:
            image: As in `encode`; a list may hold images of any size, upscaled one after another. Alpha, gray, EXIF and
                texts go over to the result.
            options: All the following as one value; keywords given beside it take precedence.
            seed: See `decode`, as for all that is not named here.
            size: Width and height to which the result is downsampled; None for one of them keeps the shape.
            scale: Enlargement; below the decoder's own the result is downsampled.
            color_fix: Default "off"; "back-projection" for a feed-forward decoder unless `sigma` asks it to invent.
            fidelity: How much "back-projection" holds of the image, 0 to 1: see `pidecode.color_fix.apply_color_fix`.
            reference: Default the image itself.
            fit: "pad" (default) mirrors the edges out to the encoder's multiple and cuts the result back, so that it
                is exactly that many times the image; "crop" crops around the center instead.

        Raises:
            ImageError: It is no image; of a list, the index is named.
            SizeError: The image is too small, or the result would be enlarged further or stretched.
            SettingError: There is no encoder, or an option cannot act or is out of range.
            Cancelled: The callback asked to stop.
        """
        chosen = (options or DecodeOptions()).replace(
            seed=seed, num_steps=num_steps, sampler=sampler, sigma=sigma, size=size, scale=scale,
            guidance_scale=guidance_scale, shift=shift, prompt=prompt, negative_prompt=negative_prompt,
            prompt_embeds=prompt_embeds, color_fix=color_fix, fidelity=fidelity, reference=reference, fit=fit,
        )  # fmt: skip
        chosen.require_acting(self.kind, "upscale", self.name)
        chosen = chosen.with_upscale_defaults(self.kind)
        run = partial(self._upscale, callback=callback)
        return self._one_by_one(run, read_images(image), chosen, progress_callback, ENCODER_WORK)

    def _one_by_one(
        self,
        run: Callable[[Any, DecodeOptions, WorkTracker], DecodeOutput],
        sources: Sequence[Any],
        options: DecodeOptions,
        callback: DecodeProgressCallback | None,
        encoding: float = 0.0,
    ) -> DecodeOutput:
        """The output of `run` on every image or latent, each with its own options."""
        if not sources:
            raise SettingError("The list is empty; give at least one image or latent.")
        outputs, evaluations = [], self._num_steps(options)
        if self.kind == "teacher" and options.guidance_scale != 1.0:
            evaluations *= 2
        for index, source in enumerate(sources):
            tracker = WorkTracker(callback, evaluations, encoding, (index, len(sources)))
            with naming(f"Element {index} of the list") if len(sources) > 1 else nullcontext():
                outputs.append(run(source, options.of_image(index, len(sources)), tracker))
        return DecodeOutput.cat(outputs)

    def _upscale(
        self, source: SourceImage, options: DecodeOptions, tracker: WorkTracker, callback: Callback | None
    ) -> DecodeOutput:
        multiple, fixed = self.space.input_multiple, self.space.fixed_input
        tensor, padding = fit_to_encoder(source.tensor, options.fit or "pad", multiple, fixed)
        require_memory(self.runner, (tensor.shape[-1] * self.scale, tensor.shape[-2] * self.scale), len(tensor))
        result = self.upscaled_size((source.tensor.shape[-1], source.tensor.shape[-2]), options)
        options = options.at_natural_size()  # which the latent is decoded at
        latent = self._encode(tensor, tracker)
        if options.reference is None:
            options = options.replace(reference=SourceImage(tensor=tensor))
        output = self._decode(latent, options, tracker, "upscale", callback)
        pixels = output.tensor if padding is None else crop_back(output.tensor, padding, scale=self.scale)
        pixels, shown = downsampled(pixels, result)
        pixels, alpha = source.applied_to(pixels, multiple if options.fit == "crop" else None)
        count = len(pixels)
        return DecodeOutput(
            pixels.unbind(), [described | shown for described in output.metadata],
            [None] * count if alpha is None else alpha.unbind(), [source.gray] * count, [source.attributes] * count,
        )  # fmt: skip

    @torch.inference_mode()
    def _decode(
        self, latent: Latent, options: DecodeOptions, work: WorkTracker, command: Command, callback: Callback | None
    ) -> DecodeOutput:
        options.require_acting(self.kind, command, self.name)
        clean, latent = latent, self._with_prompt(self._checked(latent, options), options)
        size = latent.output_size[1], latent.output_size[0]
        result = self.decoded_size(size, options)
        if isinstance(self.net, PiDNet):
            size = width, height = result
            self.net.grid_of(height, width)
            if self.checkpoint and (advice := size_warning(self.checkpoint, height, width)):
                warnings.warn(advice, stacklevel=6)
        if command == "decode":  # `upscale` has checked, before it encoded
            require_memory(self.runner, size, len(latent))
        reference, seen = self._reference(clean, options), callback is not None
        if isinstance(self.runner, FeedForwardRunner):
            low_res, shape = None, (len(latent), 3, size[1] // self.scale, size[0] // self.scale)
            if options.color_fix == "back-projection" and reference is not None and reference.shape == shape:
                low_res = reference.to(self.device, torch.float32)  # which the reduced result will equal
            pixels = self.runner.decode(latent.unit_signal(), work.strips(), low_res=low_res)
            if callback is not None:
                callback(Step(1, 1, pixels))
        else:
            callback = work.steps(callback, self._num_steps(options))
            pixels = self._run_diffusion(self.runner, latent, size, options, callback)
        work.report("finishing")
        # What follows overwrites the pixels, and the last step's image may be kept by the callback.
        finite, pixels = is_finite(pixels), pixels.clamp(-1, 1) if seen else pixels.clamp_(-1, 1)
        fixed: list[dict[str, Any]] = [{}] * len(pixels)
        if finite and reference is not None:
            pixels, fixed = corrected(pixels, reference.to(pixels), options.color_fix, options.fidelity, stacklevel=8)
        if not (finite and is_finite(pixels)):
            raise LatentError(
                "The network answered with NaN or infinite values. Decode in float32 (dtype=torch.float32); if that "
                "helps, this device's half-precision arithmetic is at fault."
            )
        pixels, shown = downsampled(pixels, result)
        seeds = options.seeds(len(pixels))
        described = [
            self._describe(latent[index], options, seed) | fixed[index] | shown for index, seed in enumerate(seeds)
        ]
        return DecodeOutput(pixels.unbind(), described)

    @torch.inference_mode()
    def _encode(self, tensor: Tensor, tracker: WorkTracker) -> Latent:
        if self.encoder is None:
            raise SettingError(
                f"{self.name} came without an encoder, so it decodes latents but cannot take images. Fetch one "
                f"with `pidecode pull {self.space.name}`", python="or pass encoder= to from_pretrained().",
                cli="or name one: --encoder PATH.", http="on the server, or start it with another model.",
            )  # fmt: skip
        tracker.report("encoding")
        with self._encoder_on_device():
            cells = self.encoder(tensor.to(self.device))
        return Latent(cells, self.space.name, 0.0)

    def _encoder_on_device(self) -> AbstractContextManager[None]:
        offloads = isinstance(self.runner, Runner) and self.runner.offloads("encoder")
        return on_device(self.encoder, self.device if offloads else None)

    def _checked(self, latent: Latent, options: DecodeOptions) -> Latent:
        latent = require_latent(latent, self.space.name).to(self.device, torch.float32)
        level = float(latent.sigmas.max())
        if isinstance(self.net, TinyDecoder) and level > self.max_sigma + SIGMA_ROUNDING:
            raise SettingError(
                f"The latent's noise level is {level:.3g}; {self.name} decodes latents well up to {self.max_sigma:g}. "
                "Let the sampler run further before the latent is taken, or decode with a PiD checkpoint of "
                f"{self.space.name}, which takes more."
            )
        if not options.sigma:
            return latent
        if options.sigma > self.max_sigma:
            raise SettingError(
                f"sigma is {options.sigma:g}; {self.name} decodes latents well up to {self.max_sigma:g}. Add less "
                "noise."
            )
        seed = options.seeds(len(latent))[0]
        return latent.noised(options.sigma, seed=(seed + SIGMA_SEED_OFFSET) % MAX_SEED)

    def _reference(self, latent: Latent, options: DecodeOptions) -> Tensor | None:
        """What the color fix corrects against, and drift is reported against; None without one."""
        if options.reference is not None:
            with naming("reference"):
                return load_tensor(options.reference)
        if options.color_fix in (None, "off") and (options.size or not can_show(self.encoder, latent)):
            return None
        with self._encoder_on_device():
            return vae_reference(self.encoder, latent)

    def _num_steps(self, options: DecodeOptions) -> int:
        return options.num_steps or sampling.DEFAULT_STEPS[self.kind]

    def _run_diffusion(
        self, runner: Runner, latent: Latent, size: tuple[int, int], options: DecodeOptions, callback: Callback | None
    ) -> Tensor:
        (width, height), steps, prediction = size, self._num_steps(options), runner.net.config.prediction
        draws = steps if self.kind == "student" and options.sampler != "ode" else 1
        noise = sampling.NoiseStream(options.seeds(len(latent)), (3, height, width), self.device, draws)
        predict = self._predictor(runner, latent, runner.net.grid_of(height, width), options)
        if self.kind == "student":
            sampler = options.sampler or "sde"
            return sampling.sample_student(
                predict, noise, num_steps=steps, sampler=sampler, prediction=prediction, callback=callback
            )
        shift = self.flow_shift(height, width) if options.shift is None else options.shift
        return sampling.sample_teacher(
            predict, noise(), num_steps=steps, shift=shift, prediction=prediction, callback=callback
        )

    def _predictor(self, runner: Runner, latent: Latent, grid: Grid, options: DecodeOptions) -> Predict:
        """The network as a function of the noisy image and the time, with a teacher's guidance."""
        need = f"{self.name} reads text, and has no text encoder here. Fetch it with `pidecode pull {self.space.name}`"

        def prompted(prompts: Sequence[str | None], given: PromptEmbeds | None, *, exact: bool = False) -> Predict:
            states = None
            if self.reads_text:
                states = prompt_states(self.text, prompts, given, exact=exact, need=need, **self._text_shape)
                states = states.to(self.device)
            if self.text is not None and runner.offloads("text"):
                self.text.unload()
            return runner.predict(runner.prepare(grid, states, latent.tensor, latent.sigmas))

        predict = prompted(latent.prompts, options.prompt_embeds)
        scale = options.guidance_scale or sampling.TEACHER_GUIDANCE
        if self.kind != "teacher" or scale == 1.0:
            return predict
        negative = default_negative_prompt() if options.negative_prompt is None else options.negative_prompt
        file = None if isinstance(options.prompt_embeds, Tensor) else options.prompt_embeds
        return sampling.guided(predict, prompted((negative,) * len(latent), file, exact=True), scale)

    def _with_prompt(self, latent: Latent, options: DecodeOptions) -> Latent:
        """The latent with the prompt it is decoded with."""
        embeds, names = options.prompt_embeds, None
        if not self.reads_text and (embeds is not None or options.prompt is not None):
            given = "a prompt" if embeds is None else "prompt_embeds"
            raise SettingError(f"{self.name} has no text stream, so {given} cannot act; leave it out.")
        if options.prompt is not None:
            latent = latent.with_prompt(options.prompt)
        if isinstance(embeds, (str, PathLike)):
            names = select_prompt_embeds(embeds, latent.prompts, **self._text_shape)[1]
        return latent if names is None else latent.with_prompt(names)

    @property
    def _text_shape(self) -> dict[str, int]:
        config = cast(PiDNet, self.net).config
        return {"length": config.text_length, "width": config.text_dim}

    def _describe(self, latent: Latent, options: DecodeOptions, seed: int) -> dict[str, Any]:
        """Everything needed to make this image again; only options that acted."""
        described: dict[str, Any] = {
            "model": self.name, "variant": self.metadata.variant, "space": self.space.name,
            "license": self.metadata.license, "kind": self.kind,
            "sigma": float(latent.sigmas[0]) if options.sigma is None else options.sigma, "latent_seed": latent.seed,
            "color_fix": options.color_fix, "fidelity": options.fidelity, "attention": self.runner.changes_image,
            "prompt": latent.prompts[0],
            "dtype": str(self.dtype).removeprefix("torch."), "device": self.device.type,
            "versions": {"pidecode": __version__, "torch": torch.__version__},
        }  # fmt: skip
        if self.kind != "feed-forward":
            sampler = (options.sampler or "sde") if self.kind == "student" else "dpm-solver++"
            steps, guidance = self._num_steps(options), options.guidance_scale
            described |= {"seed": seed, "num_steps": steps, "sampler": sampler, "guidance_scale": guidance}
        return {key: value for key, value in described.items() if value is not None}
