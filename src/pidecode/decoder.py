# SPDX-License-Identifier: Apache-2.0
"""The waist: PixelDecoder knows all parts and joins them into one way from a latent to an image."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal, Unpack, cast

import torch
from PIL.Image import Image
from torch import Tensor

from pidecode import __version__
from pidecode.color_fix import HOLDING, LOCKS, apply_color_fix
from pidecode.devices import pick_device, usual_dtype
from pidecode.encoders.base import Encode, LazyEncoder, encode_for, native_reference, visiting
from pidecode.encoders.text import TextEncoder, TextStateCache, default_negative_prompt, ready_states
from pidecode.engine.plan import Plan
from pidecode.engine.runner import Runner
from pidecode.errors import LatentError, SettingError, SizeError
from pidecode.images import (
    KEYWORD,
    ImageSource,
    Padding,
    center_crop,
    crop_back,
    load_tensor,
    pad_to_multiple,
    resize,
    to_pils,
)
from pidecode.latents.latent import Latent
from pidecode.models.pid.network import Condition, PiDNet
from pidecode.options import LARGEST_TRAINED_SIGMA, DecodeSettings, RunSettings, Settings, checked_run_settings
from pidecode.registry.checkpoints import CHECKPOINTS, Checkpoint, FlowShift, size_advice
from pidecode.registry.spaces import LatentSpace, get_space
from pidecode.sampling import Callback, NoiseStream, guided, sample_student, sample_teacher
from pidecode.weights.detect import Overrides, detect
from pidecode.weights.load import apply_lora, build_network
from pidecode.weights.metadata import CheckpointMetadata
from pidecode.weights.read import read_weights
from pidecode.weights.resolve import encoder_here, locate

Output = Literal["pil", "pt", "pairs"]
Made = Image | list[Image] | Tensor | list[tuple[Tensor, dict[str, Any]]]
Fit = Literal["pad", "crop"]

DEFAULT_SHIFT = FlowShift(base=6.0, size=2048)
"""A teacher's flow shift where nothing else is known (SPEC.md section 3)."""

TEACHER_STEPS = 25
TEACHER_GUIDANCE = 5.0
STRENGTH_STREAM = 1 << 32
"""Added to the seed for the noise that `sigma=` puts into a clean latent: a stream of its own."""


class PixelDecoder:
    """A PiD network with everything around it: latents in, images out.

    net: the network, on its device and in its type.
    identity: what the weights are: student or teacher, and of which latent space.
    name: what to call it in messages and recipes.
    encoder: images to latents of that space, for `encode` and `upscale`; None if there is none at hand.
    text: the prompt encoder, for networks with a text stream; None needs `prompt_embeds`.
    running: `compile` and `graphs`, see `RunSettings`.

    A decoder is not safe to use from several threads at once; give each its own, or take turns.
    """

    def __init__(
        self,
        net: PiDNet,
        identity: CheckpointMetadata,
        *,
        name: str = "this decoder",
        encoder: Encode | None = None,
        text: TextEncoder | None = None,
        plan: Plan | None = None,
        **running: Unpack[RunSettings],
    ) -> None:
        if identity.kind not in ("student", "teacher") or identity.space is None:
            raise SettingError(
                f"{name} is a {identity.kind} of space {identity.space}; a decoder is a student or a teacher of one."
            )
        self.net = net
        self.identity = identity
        self.name = name
        self.space: LatentSpace = get_space(identity.space)
        self.encoder = encoder
        self.text = text
        self.runner = Runner(net, plan, distilled=identity.kind == "student", **checked_run_settings(running))
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
        kind: Literal["student", "teacher"] | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        encoder: str | PathLike[str] | None = None,
        plan: Plan | Callable[[CheckpointMetadata], Plan] | None = None,
        **running: Unpack[RunSettings],
    ) -> PixelDecoder:
        """Load a decoder that is on this machine; `pidecode pull` fetches the official ones.

        name_or_path: "tiny" (ships with the package), a file (.safetensors or official .pth), or the hub repository
            "nvidia/PiD" with `space` and, unless its default will do, `variant`.
        space, variant, kind: what the file itself cannot say; see `pidecode models`.
        device: the best there is, unless named. dtype: what suits the device (`devices.usual_dtype`), unless named.
        encoder: the space's own encoder, a file or folder, where it does not lie where `pidecode pull` puts it.
        plan: what `planner.plan_decode` made, or makes of what the weights are; it then settles the dtype.
        running: `compile=True`, `graphs=True`; see `RunSettings`.

        Raises SettingError when something must be named, CheckpointError when the file is not what it should be,
        DownloadError when it is not here, MissingDependencyError when it cannot compile.
        """
        chosen, running = pick_device(device), checked_run_settings(running)
        found = locate(str(name_or_path), space=space, variant=variant, kind=kind)
        file = read_weights(found.path)
        identity = detect(file, Overrides(space=found.space, variant=found.variant, kind=found.kind))
        assert identity.config is not None
        if callable(plan):
            plan = plan(identity)
        dtype = getattr(torch, plan.dtype) if plan is not None else dtype or usual_dtype(chosen)
        # A plan may keep parts of the network on the host, so it is built there.
        place = chosen if plan is None else "cpu"
        near = encoder or found.encoder or encoder_here(identity.space)
        read_at = "cpu" if plan is not None and plan.text_on_host else chosen
        net = build_network(file.tensors, identity.config, dtype=dtype, device=place, source=str(found.path))
        decoder = cls(
            net,
            identity,
            name=found.name,
            encoder=LazyEncoder.of(near, identity.space, chosen, dtype),
            text=TextEncoder(device=read_at, states=TextStateCache()) if net.config.has_text else None,
            plan=plan,
            **running,
        )
        decoder.runner.require(chosen)
        if plan is not None:
            decoder.runner.arrange(chosen)
        return decoder

    @property
    def checkpoint(self) -> Checkpoint | None:
        """The row of the released file it comes from, if it comes from one."""
        return CHECKPOINTS.get((self.space.name, self.identity.variant or "", cast(Any, self.identity.kind)))

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

    def load_lora(self, path: str | PathLike[str], scale: float = 1.0) -> None:
        """Add a low-rank adapter's change, times `scale`, to the weights; the negated scale takes it back.

        Raises CheckpointError for a file that is no adapter of this network.
        """
        self.runner.forget()
        apply_lora(self.net, Path(path), scale)
        self.name = f"{self.name} + {Path(path).stem} at {scale:g}"

    def encode(self, image: ImageSource, *, prompt: str | Sequence[str] | None = None, fit: Fit = "crop") -> Latent:
        """An image as a clean latent of this decoder's space, made for this decoder where the encoder can look.

        image: a path, bytes, a PIL image, or a tensor `[B, 3, H, W]` (or `[3, H, W]`) in [-1, 1].
        fit: "crop" center-crops the sides to the multiple the encoder needs, "pad" mirrors the edges out to it.
        Raises ImageError for what is no image, SizeError for one that is too small, SettingError without encoder.
        """
        tensor, _ = self._fit(load_tensor(image), fit)
        return self._encode(tensor, prompt)

    @torch.inference_mode()
    def decode(
        self,
        latent: Latent,
        prompt: str | Sequence[str] | None = None,
        *,
        output: Output = "pil",
        callback: Callback | None = None,
        **settings: Unpack[DecodeSettings],
    ) -> Made:
        """A latent as an image: nothing but the latent and the prompt informs it.

        latent: of this decoder's space, normalized.
        prompt: one for all, or one per latent; default the latent's own. Networks without text take none.
        output: "pil" for an image (a list if the batch holds more than one) that carries its recipe, "pt" for a
            float32 tensor `[B, 3, H, W]` in [-1, 1], "pairs" for a list of (tensor `[3, H, W]`, recipe), as
            `save_image` takes them for 16 bits.
        callback: called after each step with the current estimate; raise `errors.Cancelled` in it to stop.
        settings: see `Settings`.

        The same seed gives the same image on the same device and versions; on another device the noise is the
        same and the arithmetic differs by rounding. Raises LatentError, SettingError or SizeError for what does not
        fit, Cancelled if told to stop.
        """
        chosen = Settings.of(settings)
        if output not in ("pil", "pt", "pairs"):
            raise SettingError(f"output is {output!r}; it must be 'pil', 'pt' or 'pairs'.")
        clean, latent = latent, self._prompted(self._checked(latent, chosen), prompt)
        width, height = self._size(latent, chosen)
        reference = self._reference(clean, chosen)
        pixels = self._run(latent, (height, width), chosen, callback)
        if reference is not None:
            pixels = apply_color_fix(pixels, reference.to(pixels), chosen.color_fix or "off")
        return self._delivered(pixels, latent, chosen, output)

    def upscale(
        self,
        image: ImageSource,
        prompt: str | Sequence[str] | None = None,
        *,
        fit: Fit = "pad",
        output: Output = "pil",
        callback: Callback | None = None,
        **settings: Unpack[DecodeSettings],
    ) -> Made:
        """Encode an image and decode it `scale` times larger.

        fit: "pad" (default) mirrors the edges out to the encoder's multiple and cuts the result back, so that it
            is exactly `scale` times the image; "crop" center-crops instead, and the result is `scale` times that.
        By default a small decoder holds what the image shows (`Settings.color_fix`). See also `encode`, `decode`.
        """
        tensor, kept = self._fit(load_tensor(image), fit)
        if "size" in settings:
            raise SettingError(
                f"upscale makes {self.scale} times the image, so size cannot act; resize before or after."
            )
        latent = self._prompted(self._encode(tensor, None), prompt)
        if settings.get("color_fix") is None and self.runner.look is not None and not settings.get("sigma"):
            settings["color_fix"] = "detail"
        if settings.get("color_fix") in HOLDING:
            settings.setdefault("reference", tensor)
        pixels = self.decode(latent, output="pt", callback=callback, **settings)
        assert isinstance(pixels, Tensor)
        if kept is not None:
            pixels = crop_back(pixels, kept, scale=self.scale)
        return self._delivered(pixels, latent, Settings.of(settings), output)

    def _fit(self, tensor: Tensor, fit: Fit) -> tuple[Tensor, Padding | None]:
        """The image at a size the encoder takes, and what to cut off the result again, if anything."""
        space = self.space
        if fit not in ("pad", "crop"):
            raise SettingError(f"fit is {fit!r}; it must be 'pad' or 'crop'.")
        if space.fixed_input is not None:
            return resize(tensor, space.fixed_input, space.fixed_input).clamp(-1, 1), None
        if fit == "crop":
            return center_crop(tensor, space.input_multiple), None
        return pad_to_multiple(tensor, space.input_multiple)

    @torch.inference_mode()
    def _encode(self, tensor: Tensor, prompt: str | Sequence[str] | None) -> Latent:
        if self.encoder is None:
            raise SettingError(
                f"{self.name} came without an encoder, so it decodes latents but cannot take images. Fetch one "
                f"with `pidecode pull {self.space.name}`, or pass encoder= to from_pretrained()."
            )
        with visiting(self.encoder, self.device if self.runner.sets_aside("encoder") else None):
            cells = encode_for(self.runner.look, self.encoder, tensor.to(self.device))
        texts = prompt if prompt is None or isinstance(prompt, str) else tuple(prompt)
        return Latent(cells, self.space.name, 0.0, texts)

    def _checked(self, latent: Latent, chosen: Settings) -> Latent:
        if not isinstance(latent, Latent):
            raise LatentError(
                f"decode takes a Latent; got {type(latent).__name__}. Say what the tensor is: "
                f"pidecode.Latent(tensor, space={self.space.name!r}, sigma=0.0)."
            )
        if latent.space != self.space.name:
            raise LatentError(
                f"This decoder is for space {self.space.name}; the latent is of space {latent.space}. Load the decoder "
                f"for {latent.space}, or encode the image again with this one."
            )
        self._refuse_idle(chosen)
        latent = latent.to(self.device, torch.float32)
        if chosen.sigma is None:
            return latent
        if not 0.0 <= chosen.sigma <= LARGEST_TRAINED_SIGMA:
            raise SettingError(
                f"sigma is {chosen.sigma:g}; the networks were trained from 0 to {LARGEST_TRAINED_SIGMA}. To label "
                "a latent that already holds noise, give sigma to Latent() instead."
            )
        return latent.noised(chosen.sigma, seed=chosen.seeds(1)[0] + STRENGTH_STREAM) if chosen.sigma else latent

    def _refuse_idle(self, chosen: Settings) -> None:
        """A setting that cannot act is an error, not ignored."""
        student = self.identity.kind == "student"
        idle = ("guidance", "shift", "negative_prompt") if student else ("sampler",)
        for name in idle:
            if getattr(chosen, name) is not None:
                other = "teachers" if student else "students"
                raise SettingError(
                    f"{name} acts on {other} only, and {self.name} is a {self.identity.kind}; leave it out."
                )

    def _reference(self, latent: Latent, chosen: Settings) -> Tensor | None:
        """What colors are held to; None where they are free."""
        if chosen.color_fix not in (None, *LOCKS):
            raise SettingError(f"color_fix is {chosen.color_fix!r}; it must be one of {', '.join(LOCKS)}.")
        if chosen.color_fix in HOLDING:
            if chosen.reference is not None:
                return chosen.reference
            with visiting(self.encoder, self.device if self.runner.sets_aside("encoder") else None):
                return native_reference(self.encoder, latent)
        if chosen.reference is not None:
            raise SettingError(f"reference acts with a color_fix only; name one of {', '.join(HOLDING)}.")
        return None

    def _size(self, latent: Latent, chosen: Settings) -> tuple[int, int]:
        """Width and height of the output."""
        natural_height, natural_width = latent.output_size
        width, height = chosen.size or (natural_width, natural_height)
        self.net.grid_of(height, width)
        if not 0.5 <= (width * natural_height) / (height * natural_width) <= 2:
            raise SizeError(
                f"{width}x{height} stretches a {natural_width}x{natural_height} image more than twofold; "
                "choose a size of its shape."
            )
        advice = size_advice(self.checkpoint, height, width) if self.checkpoint else None
        if advice:
            warnings.warn(advice, stacklevel=4)
        return width, height

    def _run(self, latent: Latent, size: tuple[int, int], chosen: Settings, callback: Callback | None) -> Tensor:
        net, batch = self.net, len(latent)
        grid = net.grid_of(*size)
        draw = NoiseStream(chosen.seeds(batch), (3, *size), self.device)
        states = self._states(latent.prompts, chosen.prompt_embeds, batch)
        if self.text is not None and self.runner.sets_aside("text"):
            self.text.unload()
        condition = self.runner.prepare(grid, states, latent.tensor, latent.sigmas)
        prediction = net.config.prediction
        if self.identity.kind == "student":
            pixels = sample_student(
                self.runner.predict(condition),
                draw,
                steps=4 if chosen.steps is None else chosen.steps,
                kind=chosen.sampler or "sde",
                prediction=prediction,
                callback=callback,
            )
        else:
            pixels = self._run_teacher(latent, condition, draw(), chosen, callback)
        if not torch.isfinite(pixels).all():
            raise LatentError(
                "The network answered with NaN or infinite values. Decode in float32 (dtype=torch.float32); if that "
                "helps, this device's half-precision attention is at fault."
            )
        return pixels.clamp_(-1, 1)

    def _run_teacher(
        self, latent: Latent, condition: Condition, noise: Tensor, chosen: Settings, callback: Callback | None
    ) -> Tensor:
        guidance = TEACHER_GUIDANCE if chosen.guidance is None else chosen.guidance
        without = condition
        if guidance != 1.0:
            negative = default_negative_prompt() if chosen.negative_prompt is None else chosen.negative_prompt
            states = self._states((negative,) * len(latent), None, len(latent))
            without = self.runner.prepare(condition.grid, states, latent.tensor, latent.sigmas)
        shift = chosen.shift
        if shift is None:
            trained = self.checkpoint.shift if self.checkpoint else None
            shift = (trained or DEFAULT_SHIFT).at(*noise.shape[-2:])
        return sample_teacher(
            guided(self.runner.predict(condition), self.runner.predict(without), guidance),
            noise,
            steps=TEACHER_STEPS if chosen.steps is None else chosen.steps,
            shift=shift,
            prediction=self.net.config.prediction,
            callback=callback,
        )

    def _prompted(self, latent: Latent, prompt: str | Sequence[str] | None) -> Latent:
        """The latent with the prompt it is decoded with."""
        if prompt is None:
            return latent
        if not self.net.config.has_text:
            raise SettingError(f"{self.name} has no text stream, so a prompt cannot act; leave it out.")
        texts = prompt if isinstance(prompt, str) else tuple(prompt)
        return Latent(latent.tensor, latent.space, latent.sigma, texts, latent.seed)

    def _states(self, prompts: Sequence[str | None], ready: Tensor | None, batch: int) -> Tensor | None:
        """Text states `[batch, tokens, text_dim]`, or None for networks without text."""
        config = self.net.config
        if not config.has_text:
            if ready is not None:
                raise SettingError(f"{self.name} has no text stream, so prompt_embeds cannot act; leave them out.")
            return None
        if ready is not None:
            states = ready_states(ready, length=config.text_length, width=config.text_dim)
            if len(states) not in (1, batch):
                raise SettingError(f"There are prompt states for {len(states)} images, and {batch} latents.")
            return states.to(self.device).expand(batch, -1, -1)
        if self.text is None:
            raise SettingError(
                f"{self.name} reads prompts, and has no text encoder here. Fetch it with `pidecode pull "
                f"{self.space.name}`, pass text= to from_pretrained(), or pass ready-made prompt_embeds=."
            )
        return self.text.encode([prompt or "" for prompt in prompts]).to(self.device)

    def _delivered(self, pixels: Tensor, latent: Latent, chosen: Settings, output: Output) -> Made:
        """Pixels in the form asked for; images carry their recipe in `.info["pidecode"]`."""
        if output == "pt":
            return pixels
        if output == "pairs":
            size = (pixels.shape[-1], pixels.shape[-2])
            return [(one, self._recipe(latent[index], chosen, index, size)) for index, one in enumerate(pixels)]
        images = to_pils(pixels)
        for index, image in enumerate(images):
            image.info[KEYWORD] = self._recipe(latent[index], chosen, index, image.size)
        return images[0] if len(images) == 1 else images

    def _recipe(self, latent: Latent, chosen: Settings, index: int, size: tuple[int, int]) -> dict[str, Any]:
        """Everything needed to make this image again."""
        recipe: dict[str, Any] = {
            "model": self.name,
            "variant": self.identity.variant,
            "space": self.space.name,
            "license": self.identity.license,
            "kind": self.identity.kind,
            "sigma": float(latent.sigmas[0]) if chosen.sigma is None else chosen.sigma,
            "seed": chosen.seed + index if isinstance(chosen.seed, int) else chosen.seed[index],
            "width": size[0],
            "height": size[1],
            "latent_seed": latent.seed,
            "steps": chosen.steps or (4 if self.identity.kind == "student" else TEACHER_STEPS),
            "sampler": (chosen.sampler or "sde") if self.identity.kind == "student" else "dpm-solver++",
            "guidance": chosen.guidance,
            "color_fix": chosen.color_fix,
            "prompt": latent.prompts[0],
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": self.device.type,
            "versions": {"pidecode": __version__, "torch": torch.__version__},
        }
        return {key: value for key, value in recipe.items() if value is not None}
