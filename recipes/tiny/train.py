# SPDX-License-Identifier: Apache-2.0
"""Train `tiny`: distillation of taef2, fidelity (pixels), perception (features, discriminator, Real-ESRGAN's targets).

    python recipes/tiny/train.py --data PHOTOGRAPHS --taef2 FOLDER --out runs/tiny [--set fidelity.run.steps=2000]

The same command resumes after a stop, to the bit. `export.py` writes the weights files of the newest checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F  # noqa: N812
from discriminator import FeatureDiscriminator, d_loss, g_loss, r1
from losses import (
    PerceptualFeatures,
    back_projected,
    chroma_distance,
    contrast_distance,
    dists_distance,
    grid_distance,
    low_frequency_distance,
    lpips_distance,
    pixel_distance,
)
from safetensors.torch import load_file, save_file
from taef2 import TinyAutoencoder
from torch import Tensor, nn
from torch.optim import Optimizer

from data import CropBatch, CropLoader, TinyDataConfig, prepare_images, quarter, to_signed, validation_images
from pidecode.devices import select_device
from pidecode.errors import CheckpointError, PidecodeError, SettingError
from pidecode.files import FolderLock, atomic_path, atomic_write, writable_folder
from pidecode.metrics import psnr, sharpness
from pidecode.models.tiny import TinyDecoder, TinyEncoder
from pidecode.registry.configs import TinyDecoderConfig, TinyEncoderConfig
from pidecode.training.config import EMAConfig, OptimizerConfig, ParallelConfig, RunConfig, apply_settings, describe
from pidecode.training.distributed import DistEnv, barrier, init_distributed, parallelize, report_lost_processes, unwrap
from pidecode.training.flow_matching import LossOutput
from pidecode.training.logger import ProgressFn
from pidecode.training.noise import RNG, LatentNoiseConfig, per_sample, seed_of
from pidecode.training.tasks import save_grid
from pidecode.training.trainer import Trainer, make_optimizer

PHASES = ("distillation", "fidelity", "perception")
MODELS = ("decoder", "base", "encoder")


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyLossConfig:
    """Weights of the losses; what has weight 0 is not computed."""

    pixel: float = 1.0
    """Mean absolute difference of pixels."""
    low_frequency: float = 2.0
    """The same of the mean colors of squares."""
    taef2: float = 0.0
    """Mean absolute difference of the mean colors of squares from those that taef2 decodes from the latent without
    noise: a target without what no decoder can know. Smooth crops have none, because taef2 is less exact there."""
    real_esrgan: float = 0.0
    """Mean absolute difference of pixels from taef2's decode enlarged by Real-ESRGAN (`data.targets`)."""
    real_esrgan_features: float = 0.0
    """Share of `lpips`, `dists` and `contrast` that is taken to that image instead of the original, where there is
    one."""
    chroma: float = 0.0
    """Mean absolute difference of the colors beside gray."""
    lpips: float = 0.0
    """LPIPS-like distance of EfficientNet-Lite0 features."""
    dists: float = 0.0
    """DISTS-like distance of the same features."""
    contrast: float = 0.0
    """Mean absolute difference of the logarithm of local contrast, of structure of 4 to 16 pixels."""
    grid: float = 0.0
    """Unevenness of detail over the places of the decoder's patches."""
    gan: float = 0.0
    """Adversarial loss of the decoder; 0 trains without a discriminator."""
    gan_start: int = 0
    """Steps before the adversarial loss begins; the discriminator learns from the first step."""
    gan_warmup: int = 1000
    """Steps over which its weight grows from 0."""
    r1: float = 1.0
    """R1 penalty of the discriminator."""
    r1_every: int = 8
    """Steps between penalties, each of which counts this many times."""
    noise_scale: float = 0.3
    """A sample of noise level sigma counts `1 / (1 + (sigma / noise_scale)^2)`."""
    smooth_weight: float = 0.25
    """What a smooth crop counts (`data.smooth`). Its errors agree in sign over the whole area, so that at full weight
    their gradient leaves little to that of texture."""
    encoder: float = 1.0
    """Loss of the encoder: relative difference of latents, and four times that of what taef2 decodes from them."""
    base: float = 1.0
    """Loss of the decoder's base: root mean square difference from what taef2 decodes, also of its finest structure and
    of mean colors of squares. A smooth crop is its own target, because taef2 is less exact there."""
    base_low_res: float = 0.0
    """Share of the low-resolution image itself in what the base imitates; the rest is what taef2 decodes."""
    base_unevenness: float = 0.0
    """Weight, beside these differences, of how unevenly a smooth crop differs: without its mean color."""
    discriminator_steps: int = 0
    """First steps, in which the discriminator alone is trained. A fresh one else unteaches a decoder what an earlier
    one had taught it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseConfig:
    """One phase of training."""

    models: tuple[str, ...] = ("decoder",)
    """What is trained: "decoder" (without its base), "base" (of the decoder), "encoder", or several of them."""
    discriminator_lr: float = 2e-4
    """Learning rate of the discriminator."""
    discriminator_layers: tuple[int, ...] = (1, 2, 3)
    """Feature layers the discriminator reads: strides 2, 4, 8, 16 and 32 are 0 to 4."""
    discriminator_width: int = 64
    """Channels of its heads."""
    base_with_decoder: bool = False
    """Whether the decoder's base is trained with it, by the decoder's losses and its own (`loss.base`)."""
    upscale_share: float = 0.0
    """Share of the decoder's samples made as `upscale` makes them: from the encoder's latents, by a decoder that reads
    the low-resolution image, which then corrects the result."""
    encoder_share: float = 0.0
    """Share of the base's samples whose latent comes from the encoder instead of taef2."""
    validation_side: int = 384
    """Largest side of the held-out crops in samples."""
    data: TinyDataConfig = field(default_factory=TinyDataConfig)
    """Images and crops."""
    noise: LatentNoiseConfig = field(default_factory=lambda: LatentNoiseConfig(probability=0.25, sigma_max=0.5))
    """Noise on latents."""
    loss: TinyLossConfig = field(default_factory=TinyLossConfig)
    """Weights of the losses."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimizer of decoder and encoder, and the schedule of all."""
    ema: EMAConfig = field(default_factory=lambda: EMAConfig(kind="constant", decay=0.999))
    """Moving average of the weights."""
    run: RunConfig = field(default_factory=RunConfig)
    """Length and outputs."""

    def __post_init__(self) -> None:
        if not self.models or not set(self.models) <= set(MODELS):
            raise SettingError(f"models is {self.models}; it must name {', '.join(MODELS)}, or some of them.")
        if self.loss.gan and "decoder" not in self.models:
            raise SettingError("loss.gan acts on the decoder; add it to models or set loss.gan=0.")
        if self.data.targets and not (self.loss.real_esrgan and "decoder" in self.models):
            raise SettingError(
                "data.targets acts on the decoder by loss.real_esrgan; set that and add decoder to models, or leave "
                "data.targets empty."
            )
        if self.noise.sigma_max >= 1:
            raise SettingError(
                f"noise.sigma_max is {self.noise.sigma_max}; it must be below 1: the decoder takes latents at the "
                "scale of their signal, and pure noise has none."
            )
        if not 0 <= self.loss.real_esrgan_features <= 1:
            raise SettingError(
                f"loss.real_esrgan_features is {self.loss.real_esrgan_features}; it must be from 0 to 1."
            )
        if self.base_with_decoder and ("decoder" not in self.models or "base" in self.models):
            raise SettingError(
                f"base_with_decoder trains the base by the decoder's losses, and models is {self.models}; name decoder "
                "there and not base, or set base_with_decoder=False."
            )
        alone = self.loss.discriminator_steps
        if alone and not self.loss.gan:
            raise SettingError(
                f"loss.discriminator_steps is {alone}, and loss.gan is 0, which means no discriminator; set loss.gan, "
                "or loss.discriminator_steps=0."
            )
        if not 0 <= alone < self.run.steps:
            raise SettingError(
                f"loss.discriminator_steps is {alone}; it must be from 0 to below run.steps={self.run.steps}, or the "
                "decoder is never trained."
            )
        if not 0 <= self.upscale_share <= 1:
            raise SettingError(f"upscale_share is {self.upscale_share}; it must be from 0 to 1.")
        if self.upscale_share and self.models != ("decoder",):
            raise SettingError(
                "upscale_share trains the decoder for a finished encoder; set it to 0, or models to ('decoder',)."
            )
        if not 0 <= self.encoder_share <= 1:
            raise SettingError(f"encoder_share is {self.encoder_share}; it must be from 0 to 1.")
        if self.encoder_share and self.models != ("base",):
            raise SettingError(
                f"encoder_share trains the base for a finished encoder, and models is {self.models}; set it to 0, or "
                "models to ('base',)."
            )
        if not 0 <= self.loss.base_low_res <= 1:
            raise SettingError(f"loss.base_low_res is {self.loss.base_low_res}; it must be from 0 to 1.")
        for name in ("base_low_res", "base_unevenness"):
            if getattr(self.loss, name) and not (self.base_with_decoder or "base" in self.models):
                raise SettingError(
                    f"loss.{name} acts on the base, which this phase does not train; name base in models, or set it to "
                    "0."
                )
        if self.loss.base_unevenness and not self.data.smooth:
            raise SettingError(
                f"loss.base_unevenness is {self.loss.base_unevenness} and acts on smooth crops, of which there are "
                "none; set data.smooth, or loss.base_unevenness=0."
            )


def _run(steps: int) -> RunConfig:
    return RunConfig(
        steps=steps, checkpoint_every=1000, checkpoint_minutes=5.0, log_every=20, sample_every=500, num_samples=8
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyRecipe:
    """The phases and the shapes of the networks."""

    phases: tuple[str, ...] = PHASES
    """Phases to run, in order."""
    init_from: str = ""
    """Folder with `tiny.safetensors` and `tiny_encoder.safetensors` to start from; empty initializes randomly."""
    decoder: Any = field(default_factory=TinyDecoderConfig)
    """Shape of the decoder."""
    encoder: Any = field(default_factory=TinyEncoderConfig)
    """Shape of the encoder."""
    distillation: PhaseConfig = field(
        default_factory=lambda: PhaseConfig(
            models=("base", "encoder"),
            data=TinyDataConfig(
                reduction=1, crops=((128, 4, 0.6), (192, 2, 0.25), (256, 1, 0.15)), synthetic_share=0.15, smooth=0.1
            ),
            noise=LatentNoiseConfig(probability=0.3, sigma_max=0.5),
            loss=TinyLossConfig(base_low_res=0.5, base_unevenness=2.0),
            optimizer=OptimizerConfig(name="muon", lr=3e-4, max_grad_norm=1.0, warmup_steps=100, lr_schedule="cosine"),
            ema=EMAConfig(kind="constant", decay=0.998),
            run=_run(6_000),
        )
    )
    """Encoder and base imitate taef2's encoder and decoder."""
    fidelity: PhaseConfig = field(
        default_factory=lambda: PhaseConfig(
            optimizer=OptimizerConfig(name="muon", lr=1e-3, max_grad_norm=1.0, warmup_steps=100, lr_schedule="cosine"),
            run=_run(12_000),
        )
    )
    """Pixels and low frequencies."""
    perception: PhaseConfig = field(
        default_factory=lambda: PhaseConfig(
            models=("decoder",),
            base_with_decoder=True,
            upscale_share=0.2,
            data=TinyDataConfig(smooth=0.2),
            noise=LatentNoiseConfig(probability=0.3, sigma_max=0.5),
            loss=TinyLossConfig(
                pixel=4.0,
                low_frequency=2.0,
                taef2=3.0,
                chroma=3.0,
                lpips=2.5,
                dists=1.6,
                real_esrgan=16.0,
                real_esrgan_features=0.8,
                contrast=3.5,
                grid=0.5,
                gan=2.2,
                gan_start=500,
                r1=0.3,
                r1_every=16,
                noise_scale=0.4,
                smooth_weight=0.35,
                base=0.6,
            ),
            optimizer=OptimizerConfig(name="muon", lr=3e-4, max_grad_norm=1.0, warmup_steps=100, lr_schedule="cosine"),
            run=_run(12_000),
        )
    )
    """Features and the discriminator."""

    def __post_init__(self) -> None:
        if not self.phases or not set(self.phases) <= set(PHASES):
            raise SettingError(f"phases is {self.phases}; it must name {' or '.join(PHASES)}.")


class TinyTask:
    """Decoder, encoder and discriminator of one phase (a `TrainTask`).

    Args:
        config: The phase.
        modules: Decoder and encoder, as far as the phase trains them.
        autoencoder: taef2, frozen.
        cache: Folder of decoded images, for the held-out crops.
        env: This process among all.
        encoder: Frozen, for `upscale_share` and `encoder_share`.
    """

    def __init__(
        self,
        config: PhaseConfig,
        modules: dict[str, nn.Module],
        autoencoder: TinyAutoencoder,
        cache: Path,
        env: DistEnv,
        encoder: TinyEncoder | None = None,
    ) -> None:
        self.config, self.autoencoder, self.cache, self.env = config, autoencoder, cache, env
        self.encoder = None if encoder is None else encoder.to(env.device).eval().requires_grad_(False)
        loss = config.loss
        self.features: PerceptualFeatures | None = None
        if "decoder" in modules and (loss.lpips or loss.dists or loss.gan):
            self.features = PerceptualFeatures().to(env.device, memory_format=torch.channels_last)
        self.averaged = tuple(modules)
        self.modules = dict(modules)
        if loss.gan and self.features is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed_of(config.run.seed, "discriminator"))
                self.modules["discriminator"] = FeatureDiscriminator(
                    self.features.channels, config.discriminator_layers, width=config.discriminator_width
                )
        for name, module in self.modules.items():
            module = module.to(env.device, memory_format=torch.channels_last).train()
            self.modules[name] = parallelize(module, ParallelConfig(), env)
        self.title = f"tiny ({', '.join(self.modules)})"

    def trained_at(self, step: int) -> tuple[str, ...]:
        """All modules; in the first `discriminator_steps` the discriminator alone."""
        if "discriminator" in self.modules and step < self.config.loss.discriminator_steps:
            return ("discriminator",)
        return tuple(self.modules)

    def make_optimizer(self, name: str) -> Optimizer:
        """Adam without momentum for the discriminator, the configured optimizer for the others."""
        if name == "discriminator":
            config = OptimizerConfig(betas=(0.0, 0.99))
            return make_optimizer(self.modules[name], config, lr=self.config.discriminator_lr, weight_decay=0.0)
        config = self.config.optimizer
        return make_optimizer(self.modules[name], config, lr=config.lr, weight_decay=config.weight_decay)

    def loss(self, step: int, batch: CropBatch, rng: RNG) -> LossOutput:
        """The sum of all modules' losses; each reaches only its own module."""
        total = torch.zeros((), device=self.env.device)
        parts: dict[str, Tensor] = {}
        if "decoder" in self.modules:
            total = total + self._decoder_loss(step, batch, rng, parts)
        if "encoder" in self.modules:
            total = total + self.config.loss.encoder * self._encoder_loss(batch, parts)
        if "base" in self.modules:
            total = total + self.config.loss.base * self._base_loss(batch, rng, parts)
        return LossOutput(total, {name: value.detach() for name, value in parts.items()})

    def _decoder_loss(self, step: int, batch: CropBatch, rng: RNG, parts: dict[str, Tensor]) -> Tensor:
        config = self.config.loss
        image = batch.image.contiguous(memory_format=torch.channels_last)
        latent, sigma = batch.latent, batch.sigma
        upscaled = torch.zeros_like(sigma, dtype=torch.bool)
        if self.encoder is not None:
            upscaled = rng.uniform() < self.config.upscale_share
            with torch.no_grad():
                latent = torch.where(per_sample(upscaled), self.encoder(batch.low).float(), latent)
            sigma = sigma.masked_fill(upscaled, 0)
        decoder, low_res, estimate = cast(TinyDecoder, unwrap(self.modules["decoder"])), None, None
        if decoder.base is not None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self.config.base_with_decoder):
                estimate = decoder.base(latent).float()
            low_res = torch.where(per_sample(upscaled), batch.low, estimate)
        generated = self.modules["decoder"](latent, low_res).float().contiguous(memory_format=torch.channels_last)
        if low_res is not None:
            generated = torch.where(per_sample(upscaled), generated, decoder.corrected(generated, low_res))
        distilled = torch.zeros_like(sigma)
        if config.taef2 and (taught := ~upscaled & ~batch.smooth).any():
            with torch.no_grad():
                small = self.autoencoder.decoder_image(F.pixel_shuffle(batch.clean_latent[taught], 2)).float()
            sides = [side for side in (4, 16, 64) if side <= small.shape[-1]]
            distilled[taught] = low_frequency_distance(F.avg_pool2d(generated[taught], 4), small, sides)
        if upscaled.any():
            generated = torch.where(per_sample(upscaled), back_projected(generated, batch.low), generated)
        weight_B = 1 / (1 + (sigma / config.noise_scale).square())
        weight_B = torch.where(batch.smooth, config.smooth_weight * weight_B, weight_B)

        # Not divided by the sum of weights: a batch of noisy samples alone must count less as well.
        def add(name: str, weight: float, distance_B: Tensor) -> Tensor:
            parts[name] = (weight_B * distance_B).mean()
            return weight * parts[name]

        loss = add("pixel", config.pixel, pixel_distance(generated, image))
        if estimate is not None and self.config.base_with_decoder and config.base:
            loss = loss + add("base", config.base, self._base_distance(estimate, batch))
        loss = loss + add("low_frequency", config.low_frequency, low_frequency_distance(generated, image))
        if config.taef2:
            loss = loss + add("taef2", config.taef2, distilled)
        if config.real_esrgan and self.config.data.targets:
            difference = torch.zeros_like(sigma)
            if batch.target is not None:  # what `upscale` gives is held to the image, which is better than the target
                difference = torch.where(upscaled, 0.0, pixel_distance(generated, batch.target))
            loss = loss + add("real_esrgan", config.real_esrgan, difference)
        if config.chroma:
            loss = loss + add("chroma", config.chroma, chroma_distance(generated, image))
        share_B = config.real_esrgan_features * (~upscaled).float()  # as above, not of what `upscale` gives
        if config.contrast:
            distance_B = contrast_distance(generated, image)
            if batch.target is not None:
                distance_B = torch.lerp(distance_B, contrast_distance(generated, batch.target), share_B)
            loss = loss + add("contrast", config.contrast, distance_B)
        if config.grid:
            parts["grid"] = grid_distance(generated, image, 4 * unwrap(self.modules["decoder"]).config.pixel_shuffle)
            loss = loss + config.grid * parts["grid"]
        parts["mse"] = F.mse_loss(generated.detach(), image)
        if self.features is None:
            return loss
        window = random_window(image, rng)
        generated, image = generated[window], image[window]
        fake = self.features(generated)
        with torch.no_grad():
            real = self.features(image)
            enlarged = None
            if batch.target is not None and config.real_esrgan_features:
                enlarged = self.features(batch.target[window])
        for name, distance in (("lpips", lpips_distance), ("dists", dists_distance)):
            if not (weight := getattr(config, name)):
                continue
            distance_B = distance(fake, real)
            if enlarged is not None:
                distance_B = torch.lerp(distance_B, distance(fake, enlarged), share_B)
            loss = loss + add(name, weight, distance_B)
        if "discriminator" in self.modules:
            loss = loss + self._gan_loss(step, (generated, fake), (image, real), parts)
        return loss

    def _gan_loss(
        self,
        step: int,
        generated: tuple[Tensor, list[Tensor]],
        image: tuple[Tensor, list[Tensor]],
        parts: dict[str, Tensor],
    ) -> Tensor:
        """Losses of decoder and discriminator from (pixels, features) of generated and real images.

        For the decoder's part the discriminator is frozen, for its own the images are detached: so one backward pass
        gives each module its own gradient.
        """
        config = self.config.loss
        wrapped = self.modules["discriminator"]
        discriminator = unwrap(wrapped)
        assert isinstance(discriminator, FeatureDiscriminator)
        fake, real = discriminator.inputs(*generated), discriminator.inputs(*image)
        loss = torch.zeros((), device=self.env.device)
        ramp = min(1.0, max(0, step - config.gan_start) / max(1, config.gan_warmup))
        if ramp:
            discriminator.requires_grad_(False)
            parts["g_loss"] = g_loss(discriminator(fake))
            discriminator.requires_grad_(True)
            loss = loss + config.gan * ramp * parts["g_loss"]
        real = [x.detach() for x in real]
        parts["d_loss"] = d_loss(wrapped([x.detach() for x in fake]), wrapped(real))
        loss = loss + parts["d_loss"]
        if config.r1 and step % config.r1_every == 0:
            parts["r1"] = r1(discriminator, real)
            loss = loss + config.r1 * config.r1_every * parts["r1"]
        return loss

    def _encoder_loss(self, batch: CropBatch, parts: dict[str, Tensor]) -> Tensor:
        latent = self.modules["encoder"](batch.low).float()
        parts["latent"] = (_rms(latent - batch.clean_latent) / _rms(batch.clean_latent).clamp_min(0.2)).mean()
        parts["decoded"] = _rms(self._decoded(latent) - self._decoded(batch.clean_latent)).mean()
        return parts["latent"] + 4 * parts["decoded"]

    def _base_loss(self, batch: CropBatch, rng: RNG, parts: dict[str, Tensor]) -> Tensor:
        latent, sigma = batch.latent, batch.sigma
        if self.encoder is not None:
            encoded = rng.uniform() < self.config.encoder_share
            with torch.no_grad():
                latent = torch.where(per_sample(encoded), self.encoder(batch.low).float(), latent)
            sigma = sigma.masked_fill(encoded, 0)
        weight_B = 1 / (1 + (sigma / self.config.loss.noise_scale).square())
        distance_B = self._base_distance(self.modules["base"](latent).float(), batch)
        parts["base"] = (weight_B * distance_B).mean()
        return parts["base"]

    def _base_distance(self, estimate: Tensor, batch: CropBatch) -> Tensor:
        config = self.config.loss
        decoded = torch.lerp(self._decoded(batch.clean_latent), batch.low, config.base_low_res)
        error = estimate - torch.where(per_sample(batch.smooth), batch.low, decoded)
        mean = error.mean((2, 3), keepdim=True)
        colors = _rms(F.avg_pool2d(error, 8)) + 0.5 * _rms(F.avg_pool2d(error, min(32, *error.shape[-2:])))
        finest = _rms(error - F.interpolate(F.avg_pool2d(error, 2), scale_factor=2.0))
        distance_B = _rms(error) + finest + colors + 0.5 * _rms(mean)
        if config.base_unevenness:
            distance_B = distance_B + torch.where(batch.smooth, config.base_unevenness * _rms(error - mean), 0.0)
        return distance_B

    def _decoded(self, latent: Tensor) -> Tensor:
        """What taef2 decodes, nearly clamped: beyond black and white there is nothing to imitate."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and latent.requires_grad):
            return self.autoencoder.decoder_image(F.pixel_shuffle(latent, 2)).float().clamp(-1.05, 1.05)

    def save_samples(self, folder: Path, step: int) -> None:
        """Write held-out crops (low resolution, generated, original), and their mean measures to metrics.jsonl."""
        if not self.env.is_first:
            return
        modules = {name: unwrap(module) for name, module in self.modules.items()}
        rows, metrics = [], []
        images = validation_images(self.cache, self.config.run.num_samples, self.config.validation_side)
        for original in images:
            array = ((original[0].permute(1, 2, 0) + 1) * 127.5).round().byte().numpy()
            low = to_signed(quarter(array))[None].to(self.env.device)
            image = original.to(self.env.device)
            latent = F.pixel_unshuffle(self.autoencoder.encode(low).float(), 2)
            found: dict[str, Tensor] = {}
            if "encoder" in modules:
                own = modules["encoder"](low).float()
                found["encoder_psnr"] = psnr(self._decoded(own), self._decoded(latent)).mean()
                found["encoder_error"] = (own - latent).norm() / latent.norm()
            if "base" in modules:
                found["base_psnr"] = psnr(modules["base"](latent).float().clamp(-1, 1), self._decoded(latent)).mean()
            if self.config.base_with_decoder:
                base = cast(TinyDecoder, modules["decoder"]).base
                assert base is not None  # `build_models` saw to it
                found["base_psnr"] = psnr(base(latent).float().clamp(-1, 1), self._decoded(latent)).mean()
            if "decoder" in modules:
                generated = modules["decoder"](latent).float().clamp(-1, 1)
                rows.append((low, generated, image))
                found |= {"psnr": psnr(generated, image).mean(), "sharpness": sharpness(generated).mean()}
            if "decoder" in modules and self.features is not None:
                fake, real = self.features(generated), self.features(image)
                found |= {"lpips": lpips_distance(fake, real).mean(), "dists": dists_distance(fake, real).mean()}
            metrics.append(found)
        if not metrics:
            return
        writable_folder(folder)
        if rows:
            save_grid(folder / f"step-{step:08d}.png", rows)
        means = {name: float(torch.stack([found[name] for found in metrics]).mean()) for name in metrics[0]}
        with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **means}) + "\n")

    def export(self, folder: Path, step: int) -> Path:
        """Write a file of each trained module, such as `decoder.safetensors`, in float32."""
        path = folder
        for name in reversed(self.averaged):
            module = unwrap(self.modules[name])
            tensors = {key: value.detach().cpu().contiguous() for key, value in module.state_dict().items()}
            path = folder / f"{name}.safetensors"
            if self.env.is_first:
                with atomic_path(path, overwrite=True) as part:
                    save_file(tensors, part)
        return path

    def notes(self) -> Iterator[str]:
        """Sizes of the modules."""
        for name, module in self.modules.items():
            yield f"{name}: {sum(parameter.numel() for parameter in module.parameters()):,} parameters"


def build_models(recipe: TinyRecipe, phase: PhaseConfig, before: Sequence[Path]) -> dict[str, nn.Module]:
    """The networks that a phase trains: from an earlier phase, `init_from`, or random values.

    Raises:
        CheckpointError: The initial weights are of other shapes.
        SettingError: The phase trains the base of a decoder without one.
    """
    modules: dict[str, nn.Module] = {}
    if phase.base_with_decoder and recipe.decoder.base is None:
        raise SettingError(
            "base_with_decoder is set, and the decoder has no base; set it to False in that phase, or set "
            "decoder.base_blocks."
        )
    for name in phase.models:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(phase.run.seed, name))
            if name == "encoder":
                modules[name] = TinyEncoder(recipe.encoder)
            elif name == "decoder":
                modules[name] = TinyDecoder(recipe.decoder)
            elif recipe.decoder.base is None:
                raise SettingError("models names base, and the decoder has none; set decoder.base_blocks.")
            else:
                modules[name] = TinyDecoder(recipe.decoder.base)
        start_from(modules[name], name, recipe, before)
        if name == "decoder" and (base := cast(TinyDecoder, modules[name]).base) is not None:
            start_from(base, "base", recipe, before)
            base.requires_grad_(phase.base_with_decoder)
    return modules


def start_from(
    module: nn.Module, name: str, recipe: TinyRecipe, before: Sequence[Path], *, required: bool = False
) -> None:
    """Load the weights of the last earlier phase that trained a module, else those of `init_from`, else none.

    Raises:
        CheckpointError: The weights are of another shape, or `required` and there are none.
    """
    file_name = "tiny_encoder.safetensors" if name == "encoder" else "tiny.safetensors"
    places = [folder / f"{name}.safetensors" for folder in reversed(before)]
    places += [Path(recipe.init_from) / file_name] if recipe.init_from else []
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        if required:
            raise CheckpointError(f"This phase needs a trained {name}; set init_from to a folder with {file_name}.")
        return
    tensors, own = load_file(path), module.state_dict()
    if name == "base" and path.name == file_name:
        tensors = {key.removeprefix("base."): value for key, value in tensors.items() if key.startswith("base.")}
    shape = "encoder" if name == "encoder" else "decoder"
    odd = sorted(key for key in tensors.keys() | own.keys() if key not in own or key not in tensors)
    odd += [key for key, value in own.items() if key in tensors and tensors[key].shape != value.shape]
    if odd:
        raise CheckpointError(
            f"{path} does not fit the {name} that is to be trained: {len(odd)} tensors differ ({', '.join(odd[:3])}, "
            f"...); set {shape}.* to the shape it was made with, or train it from random values."
        )
    module.load_state_dict({key: value.float() for key, value in tensors.items()})


def run_phase(
    recipe: TinyRecipe,
    name: str,
    out: Path,
    autoencoder: TinyAutoencoder,
    env: DistEnv,
    progress: ProgressFn | None = None,
) -> Path:
    """Run or resume one phase in `out/name`; a finished one is left as it is.

    Returns:
        The exported weights.
    """
    phase: PhaseConfig = getattr(recipe, name)
    folder = out / name
    finished = folder / f"{phase.models[0]}.safetensors"
    if finished.is_file():
        return finished
    report = progress if progress is not None and env.is_first else (lambda text: None)
    cache = Path(phase.data.cache) if phase.data.cache else out / "images"
    skipped = prepare_images(phase.data, cache, phase.run.seed, report) if env.is_first else {}
    barrier(env)
    before = [out / earlier for earlier in PHASES[: PHASES.index(name)]]
    models = build_models(recipe, phase, before)
    encoder = None
    if phase.upscale_share or phase.encoder_share:
        encoder = TinyEncoder(recipe.encoder)
        start_from(encoder, "encoder", recipe, before, required=True)
    autoencoder = autoencoder.to(env.device, memory_format=torch.channels_last)
    task = TinyTask(phase, models, autoencoder, cache, env, encoder)
    loader = CropLoader(
        phase.data,
        phase.noise,
        cache,
        autoencoder.encode,
        device=env.device,
        seed=seed_of(phase.run.seed, name),
        rank=env.data_rank,
        world_size=env.data_world_size,
        skipped=skipped,
    )
    report(f"Phase {name}.")
    return Trainer(task, loader, folder, phase, env, resume=True, progress=progress).run()


def train_tiny(
    recipe: TinyRecipe, out: Path, taef2: Path, device: torch.device | None = None, progress: ProgressFn | None = None
) -> Path:
    """All phases in order; resumes what was begun. Returns the weights that the last one exported."""
    autoencoder = TinyAutoencoder.from_folder(taef2)
    with report_lost_processes(), init_distributed(ParallelConfig(), device) as env, contextlib.ExitStack() as stack:
        if env.is_first:
            stack.enter_context(FolderLock(out, "training"))
            shapes = {"decoder": recipe.decoder.to_dict(), "encoder": recipe.encoder.to_dict()}
            with atomic_write(out / "models.json", overwrite=True) as file:
                file.write(json.dumps(shapes, indent=1).encode())
        for name in recipe.phases:
            path = run_phase(recipe, name, out, autoencoder, env, progress)
    return path


def _rms(error: Tensor) -> Tensor:
    """Root mean square `[B]` of `[B, C, H, W]`."""
    return (error.square().mean((1, 2, 3)) + 1e-6).sqrt()


def random_window(image: Tensor, rng: RNG, margin: int = 32) -> tuple[Any, ...]:
    """Index of a random window of images `[B, 3, H, W]`, `margin` pixels smaller along each side.

    The strides of the feature network and of the discriminator (up to 32) otherwise meet the decoder's grid at the same
    place in every step, and the decoder learns a dotted pattern of that period which lowers their distances.
    """
    top, left = rng.common_choice(margin), rng.common_choice(margin)
    height, width = (side - margin for side in image.shape[-2:])
    return (..., slice(top, top + height), slice(left, left + width))


def parse_recipe(data: str, settings: list[str]) -> TinyRecipe:
    """The default recipe with a folder of photographs and changed settings."""
    sources = [f"{phase}.data.source={data!r}" for phase in PHASES]
    return apply_settings(TinyRecipe(), [*sources, *settings])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of photographs")
    parser.add_argument("--taef2", type=Path, help="folder of taef2_encoder.safetensors and taef2_decoder.safetensors")
    parser.add_argument("--out", type=Path, help="folder of the run")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="NAME=VALUE",
                        help="change a setting, for instance perception.loss.gan=0")  # fmt: skip
    parser.add_argument("--device", default=None, help="cpu, cuda, ...; by default the best one")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    parser.add_argument("--show", action="store_true", help="show every setting and end")
    given = parser.parse_args()
    try:
        recipe = parse_recipe(given.data, given.settings)
        if given.show:
            for name, value, text in describe(recipe):
                print(f"{name} = {value!r}\n    {text}")
            return
        if given.taef2 is None or given.out is None:
            parser.error("--taef2 and --out are needed")
        if given.threads:
            torch.set_num_threads(given.threads)
        device = None if given.device is None else select_device(given.device)
        print(train_tiny(recipe, given.out, given.taef2, device, lambda text: print(text, flush=True)))
    except PidecodeError as fault:
        sys.exit(str(fault))


if __name__ == "__main__":
    main()
