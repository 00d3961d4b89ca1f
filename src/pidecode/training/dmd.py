# SPDX-License-Identifier: Apache-2.0
"""Distribution matching distillation of a teacher into a few-step student (DMD2, https://arxiv.org/abs/2405.14867).

Two phases alternate. The student learns from the difference between the clean images that the frozen teacher and the
fake score predict for its noised samples, and from a discriminator on the teacher's features. Between its updates, the
fake score and the discriminator learn the student's current samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn

from pidecode.errors import SettingError
from pidecode.registry.checkpoints import STUDENT_TIMES
from pidecode.sampling import renoise
from pidecode.training.denoiser import TrainBatch, apply_guidance, to_clean, to_velocity
from pidecode.training.flow_matching import LossOutput
from pidecode.training.losses import (
    approximate_r1,
    discriminator_adversarial,
    distribution_matching,
    flow_matching,
    generator_adversarial,
)
from pidecode.training.noise import RNG, logit_normal_times, mix


def _groups(channels: int) -> int:
    if channels > 32:
        return next(count for count in range(32, 0, -1) if channels % count == 0)
    groups = max(1, channels // 4)
    if channels % groups:
        raise SettingError(f"A discriminator layer of {channels} channels does not divide into {groups} groups.")
    return groups


def _head(width: int, layers: int, per_patch: bool) -> nn.Sequential:
    """Convolutions that halve the grid and the channels, then one logit."""
    parts: list[nn.Module] = []
    for index in range(layers - 1):
        narrower = width // 2 if index == 0 else max(width // 2, 64)
        parts += [
            nn.Conv2d(width, narrower, 4, stride=2, padding=1),
            nn.GroupNorm(_groups(narrower), narrower),
            nn.LeakyReLU(0.2),
        ]
        width = narrower
    parts.append(nn.Conv2d(width, 1, 1))
    parts += [nn.Flatten(1)] if per_patch else [nn.AdaptiveAvgPool2d(1), nn.Flatten(1)]
    return nn.Sequential(*parts)


class Discriminator(nn.Module):
    """Convolutional heads on the frozen teacher's features, one per tapped block (by default the middle one).

    A head has so many `layers` of convolutions and gives one logit per image, or per position.
    """

    def __init__(
        self, width: int, depth: int, blocks: tuple[int, ...] = (), *, layers: int = 2, per_patch: bool = False
    ) -> None:
        super().__init__()
        self.blocks = tuple(sorted(set(blocks))) or (depth // 2,)
        if self.blocks[0] < 0 or self.blocks[-1] >= depth:
            raise SettingError(
                f"The discriminator reads blocks {self.blocks}, but the teacher has blocks 0 to {depth - 1}."
            )
        if layers < 1:
            raise SettingError(f"The discriminator has {layers} layers; it needs at least 1.")
        self.cls_pred_heads = nn.ModuleList(_head(width, layers, per_patch) for _ in self.blocks)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features `[B, D, h, w]` of each tapped block, ascending, to logits `[B, heads]` (or one per place)."""
        judged = [head(x) for head, x in zip(self.cls_pred_heads, features, strict=True)]
        return torch.cat(judged, dim=1)


StudentInput = Literal["teacher_forcing", "self_rollout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationConfig:
    """How a teacher is distilled into a student."""

    student_every: int = 6
    """One iteration in this many trains the student; the others the fake score and the discriminator."""
    student_input: StudentInput = "teacher_forcing"
    """What the student starts from: a noised real image, or its own rollout from pure noise (as when decoding)."""
    guidance_scale: float = 3.0
    """Classifier-free guidance of the teacher."""
    min_time: float = 0.02
    """Smallest time at which student images are noised for judging."""
    max_time: float = 0.99
    """Largest such time."""
    fake_score_lr: float = 1e-5
    """Learning rate of fake score and discriminator."""
    fake_score_weight_decay: float = 1e-3
    """Weight decay of the fake score."""
    gan_weight: float = 0.05
    """Weight of the adversarial loss of the student; 0 trains without a discriminator."""
    gan_warmup: int = 100
    """Iterations over which that weight grows from 0."""
    r1_weight: float = 200.0
    """Weight of the discriminator's approximate R1 penalty."""
    r1_sigma: float = 0.1
    """Standard deviation of the perturbation of real images in it (https://arxiv.org/abs/2501.08316)."""
    discriminator_blocks: tuple[int, ...] = ()
    """Teacher blocks the discriminator reads; empty means the middle one."""
    discriminator_layers: int = 2
    """Convolutions in each head of the discriminator."""
    discriminator_per_patch: bool = False
    """Whether the discriminator judges positions instead of whole images."""
    times: tuple[float, ...] = STUDENT_TIMES
    """Times of the student's steps, decreasing, ending in 0."""

    def __post_init__(self) -> None:
        if self.student_every < 1:
            raise SettingError(f"student_every is {self.student_every}; it must be at least 1.")
        if self.student_input not in ("teacher_forcing", "self_rollout"):
            raise SettingError(
                f"student_input is {self.student_input!r}; it must be 'teacher_forcing' or 'self_rollout'."
            )
        if self.fake_score_lr <= 0:
            raise SettingError(f"fake_score_lr is {self.fake_score_lr}; it must be positive.")
        if not 0 < self.min_time < self.max_time < 1:
            raise SettingError(
                f"Times run from {self.min_time} to {self.max_time}; they must lie within 0 and 1, in order."
            )
        if len(self.times) < 2 or self.times[-1] != 0 or any(a <= b for a, b in pairwise(self.times)):
            raise SettingError(f"The student's times are {self.times}; they must decrease and end in 0.")

    def is_student_turn(self, step: int) -> bool:
        """Whether iteration `step`, counted from 0, trains the student."""
        return step % self.student_every == 0

    def gan_weight_at(self, step: int) -> float:
        """The discriminator's weight at an iteration, growing linearly through the warm-up."""
        return self.gan_weight * min(1.0, step / self.gan_warmup) if self.gan_warmup else self.gan_weight


@dataclass(frozen=True, slots=True)
class DistillationModels:
    """The networks of a distillation: three of one architecture, and the discriminator."""

    student: nn.Module
    teacher: nn.Module
    fake: nn.Module
    discriminator: nn.Module | None

    @property
    def taps(self) -> tuple[int, ...]:
        """Teacher blocks the discriminator reads."""
        if self.discriminator is None:
            return ()
        discriminator = getattr(self.discriminator, "module", self.discriminator)
        assert isinstance(discriminator, Discriminator)
        return discriminator.blocks


def _clean(net: nn.Module, x_t: Tensor, t_B: Tensor, batch: TrainBatch) -> Tensor:
    return to_clean(net, net(x_t, t_B, batch).prediction, x_t, t_B)


def generate(student: nn.Module, batch: TrainBatch, rng: RNG, config: DistillationConfig) -> Tensor:
    """A sample of the student `[B, 3, H, W]`, differentiable in its last step."""
    image = batch.image.float()
    times = torch.tensor(config.times[:-1], dtype=torch.float32, device=image.device)
    shape = tuple(image.shape[1:])
    if config.student_input == "teacher_forcing":
        t_B = times[rng.choice(len(times)).to(times.device)]
        x_t = mix(image, rng.normal(shape), t_B)
        return _clean(student, x_t, t_B, batch)
    last = rng.common_choice(len(times))
    x_t = rng.normal(shape)
    with torch.no_grad():
        for index in range(last):
            clean = _clean(student, x_t, times[index].expand(image.shape[0]), batch)
            x_t = renoise(clean, rng.normal(shape), times[index + 1])
    return _clean(student, x_t, times[last].expand(image.shape[0]), batch)


def _perturb(generated: Tensor, rng: RNG, config: DistillationConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Time, noise and noisy image at which a sample is judged."""
    t_B = logit_normal_times(rng).clamp(config.min_time, config.max_time)
    noise = rng.normal(tuple(generated.shape[1:]))
    return t_B, noise, mix(generated, noise, t_B)


def student_loss(
    models: DistillationModels, batch: TrainBatch, rng: RNG, config: DistillationConfig, gan_weight: float
) -> tuple[LossOutput, dict[str, Tensor]]:
    """The student's phase: its loss, and the clean images that student, teacher and fake score saw.

    The discriminator's gradient runs through the frozen teacher's features into the student; the teacher's image is
    a constant.
    """
    generated = generate(models.student, batch, rng, config)
    t_B, _, x_t = _perturb(generated, rng, config)
    adversarial = models.discriminator is not None and gan_weight > 0
    judged = x_t if adversarial else x_t.detach()
    with torch.set_grad_enabled(adversarial and torch.is_grad_enabled()):
        output_t = models.teacher(judged, t_B, batch, taps=models.taps if adversarial else ())
    with torch.no_grad():
        guided = apply_guidance(models.teacher, output_t.prediction, x_t.detach(), t_B, batch, config.guidance_scale)
        teacher_clean = to_clean(models.teacher, guided, x_t.detach(), t_B)
        fake_clean = _clean(models.fake, x_t.detach(), t_B, batch)
    loss = distribution_matching(generated, teacher_clean, fake_clean)
    parts = {"dmd": loss.detach(), "mse": (generated.detach() - batch.image).square().mean()}
    if adversarial and models.discriminator is not None:
        g_loss = generator_adversarial(models.discriminator(output_t.features))
        parts["g_loss"] = g_loss.detach()
        loss = loss + gan_weight * g_loss
    return LossOutput(loss, parts), {"student": generated.detach(), "teacher": teacher_clean, "fake": fake_clean}


def fake_score_loss(models: DistillationModels, batch: TrainBatch, rng: RNG, config: DistillationConfig) -> LossOutput:
    """The other phase: the fake score learns the student's images, the discriminator to tell them from real ones."""
    with torch.no_grad():
        generated = generate(models.student, batch, rng, config)
        t_B, noise, x_t = _perturb(generated, rng, config)
    prediction = models.fake(x_t, t_B, batch).prediction
    loss = flow_matching(to_velocity(models.fake, prediction, x_t, t_B), generated, noise)
    parts = {"fake": loss.detach()}
    if models.discriminator is None:
        return LossOutput(loss, parts)
    real = mix(batch.image.float(), noise, t_B)
    with torch.no_grad():
        perturbed = real + config.r1_sigma * rng.normal(tuple(real.shape[1:]))
        fake_seen, real_seen, perturbed_features = (
            models.teacher(x, t_B, batch, taps=models.taps, predict=False).features for x in (x_t, real, perturbed)
        )
    fake_logits, real_logits = models.discriminator(fake_seen), models.discriminator(real_seen)
    d_loss = discriminator_adversarial(fake_logits, real_logits)
    r1 = approximate_r1(real_logits, models.discriminator(perturbed_features))
    parts |= {"d_loss": d_loss.detach(), "r1": r1.detach()}
    return LossOutput(loss + d_loss + config.r1_weight * r1, parts)
