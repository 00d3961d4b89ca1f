# SPDX-License-Identifier: Apache-2.0
"""Distribution matching distillation of a teacher into a few-step student (DMD2, https://arxiv.org/abs/2405.14867).

Two phases alternate. The student learns from the difference between the clean images that the frozen teacher and the
fake score predict for its noised samples, and from a discriminator on the teacher's features. Between its updates, the
fake score and the discriminator learn the student's current samples.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pidecode.errors import SettingError
from pidecode.sampling import renoise
from pidecode.training import losses
from pidecode.training.config import DistillationConfig
from pidecode.training.denoiser import TrainBatch, pid_net, to_clean, to_velocity
from pidecode.training.distributed import unwrap
from pidecode.training.flow_matching import LossOutput
from pidecode.training.noise import RNG, logit_normal_times, mix


def _head(width: int, layers: int, per_patch: bool) -> nn.Sequential:
    """Convolutions that halve the grid and the channels, then one logit."""
    parts: list[nn.Module] = []
    for index in range(layers - 1):
        narrower = width // 2 if index == 0 else max(width // 2, 64)
        most = 32 if narrower > 32 else max(1, narrower // 4)
        groups = next(count for count in range(most, 0, -1) if narrower % count == 0)
        parts += [nn.Conv2d(width, narrower, 4, 2, padding=1), nn.GroupNorm(groups, narrower), nn.LeakyReLU(0.2)]
        width = narrower
    pool = [] if per_patch else [nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*parts, nn.Conv2d(width, 1, 1), *pool, nn.Flatten(1))


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
        return torch.cat([head(x) for head, x in zip(self.cls_pred_heads, features, strict=True)], dim=1)


@dataclass(frozen=True, slots=True)
class DistillationModels:
    """The networks of a distillation: three of one architecture, and the discriminator.

    Those that a phase does not train are called without DDP's wrapping, which waits for their gradients.
    """

    student: nn.Module
    teacher: nn.Module
    fake: nn.Module
    discriminator: nn.Module | None

    @property
    def taps(self) -> tuple[int, ...]:
        """Teacher blocks the discriminator reads."""
        discriminator = None if self.discriminator is None else unwrap(self.discriminator)
        return discriminator.blocks if isinstance(discriminator, Discriminator) else ()


def _clean(net: nn.Module, x_t: Tensor, t_B: Tensor, batch: TrainBatch) -> Tensor:
    return to_clean(net, net(x_t, t_B, batch).prediction, x_t, t_B)


def generate(student: nn.Module, batch: TrainBatch, rng: RNG, config: DistillationConfig) -> Tensor:
    """A sample of the student `[B, 3, H, W]`, differentiable in its last step."""
    image = batch.image.float()
    times = torch.tensor(config.times[:-1], dtype=torch.float32, device=image.device)
    shape = tuple(image.shape[1:])
    if config.student_input == "teacher_forcing":
        t_B = times[rng.choice(len(times)).to(times.device)]
        return _clean(student, mix(image, rng.normal(shape), t_B), t_B, batch)
    last = rng.common_choice(len(times))
    x_t = rng.normal(shape)
    with torch.no_grad():
        for index in range(last):
            clean = _clean(student, x_t, times[index].expand(len(image)), batch)
            x_t = renoise(clean, rng.normal(shape), times[index + 1])
    return _clean(student, x_t, times[last].expand(len(image)), batch)


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
    x_t = x_t.detach()
    with torch.no_grad():
        guided = output_t.prediction.detach()
        if config.guidance_scale != 1.0 and pid_net(models.teacher).config.has_text:
            # Classifier-free guidance (https://arxiv.org/abs/2207.12598); the latent stays in both predictions.
            unconditional = models.teacher(x_t, t_B, batch.with_null_text()).prediction
            guided = unconditional + config.guidance_scale * (guided - unconditional)
        teacher_clean = to_clean(models.teacher, guided, x_t, t_B)
        fake_clean = _clean(unwrap(models.fake), x_t, t_B, batch)
    loss = losses.distribution_matching(generated, teacher_clean, fake_clean)
    parts = {"dmd": loss.detach(), "mse": (generated.detach() - batch.image).square().mean()}
    if adversarial and models.discriminator is not None:
        g_loss = losses.generator_adversarial(unwrap(models.discriminator)(output_t.features))
        parts["g_loss"] = g_loss.detach()
        loss = loss + gan_weight * g_loss
    return LossOutput(loss, parts), {"student": generated.detach(), "teacher": teacher_clean, "fake": fake_clean}


def fake_score_loss(models: DistillationModels, batch: TrainBatch, rng: RNG, config: DistillationConfig) -> LossOutput:
    """The other phase: the fake score learns the student's images, the discriminator to tell them from real ones."""
    with torch.no_grad():
        generated = generate(unwrap(models.student), batch, rng, config)
        t_B, noise, x_t = _perturb(generated, rng, config)
    prediction = models.fake(x_t, t_B, batch).prediction
    loss = losses.flow_matching(to_velocity(models.fake, prediction, x_t, t_B), generated, noise)
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
    d_loss = losses.discriminator_adversarial(fake_logits, real_logits)
    r1 = losses.approximate_r1(real_logits, models.discriminator(perturbed_features))
    parts |= {"d_loss": d_loss.detach(), "r1": r1.detach()}
    return LossOutput(loss + d_loss + config.r1_weight * r1, parts)
