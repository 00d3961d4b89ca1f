# SPDX-License-Identifier: Apache-2.0
"""The small convolutional critic of the distillation, which judges images by the teacher's features of them.

Two phases alternate. The student learns from the difference between the frozen teacher's and the fake score's idea
of its images, and from the critic. Between its updates, the fake score and the critic learn what it paints now.
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
from pidecode.training.denoiser import Example, clean_of, guide, velocity_of
from pidecode.training.flow_matching import Outcome
from pidecode.training.losses import (
    approximate_r1,
    discriminator_adversarial,
    distribution_matching,
    flow_matching,
    generator_adversarial,
)
from pidecode.training.noise import Draws, logit_normal_times, mix


def _groups(channels: int) -> int:
    if channels > 32:
        return next(count for count in range(32, 0, -1) if channels % count == 0)
    groups = max(1, channels // 4)
    if channels % groups:
        raise SettingError(f"A critic layer of {channels} channels does not divide into {groups} groups.")
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
    """One head per tapped block of the teacher (golden notes, section 9).

    blocks: zero-based patch blocks whose features it reads; empty means the middle one of `depth`.
    """

    def __init__(
        self, width: int, depth: int, blocks: tuple[int, ...] = (), *, layers: int = 2, per_patch: bool = False
    ) -> None:
        super().__init__()
        self.blocks = tuple(sorted(set(blocks))) or (depth // 2,)
        if self.blocks[0] < 0 or self.blocks[-1] >= depth:
            raise SettingError(f"The critic taps blocks {self.blocks}, but the teacher has blocks 0 to {depth - 1}.")
        if layers < 1:
            raise SettingError(f"The critic has {layers} layers; it needs at least 1.")
        self.cls_pred_heads = nn.ModuleList(_head(width, layers, per_patch) for _ in self.blocks)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Features `[B, D, h, w]` of each tapped block, ascending, to logits `[B, heads]` (or one per place)."""
        judged = [head(x) for head, x in zip(self.cls_pred_heads, features, strict=True)]
        return torch.cat(judged, dim=1)


StudentInput = Literal["teacher_forcing", "self_rollout"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """How a teacher is distilled."""

    student_every: int = 6
    """One iteration in this many trains the student; the others the fake score and the critic."""
    student_input: StudentInput = "teacher_forcing"
    """What the student starts from: a noised real image, or its own rollout from pure noise (as when decoding)."""
    guidance: float = 3.0
    """Classifier-free guidance of the teacher."""
    earliest: float = 0.02
    """Smallest time at which student images are noised for judging."""
    latest: float = 0.99
    """Largest such time."""
    gan_weight: float = 0.05
    """Weight of the critic's opinion in the student's loss; 0 trains without a critic."""
    gan_warmup: int = 100
    """Iterations over which that weight grows from 0."""
    r1_weight: float = 200.0
    """Weight of the critic's approximate R1 penalty."""
    r1_nudge: float = 0.1
    """Size of the noise by which real images are nudged for it."""
    critic_blocks: tuple[int, ...] = ()
    """Teacher blocks the critic reads; empty means the middle one."""
    critic_layers: int = 2
    """Convolutions in each head of the critic."""
    critic_per_patch: bool = False
    """Whether the critic judges places instead of whole images."""
    times: tuple[float, ...] = STUDENT_TIMES
    """Times of the student's steps, falling, with a final 0."""

    def __post_init__(self) -> None:
        if self.student_every < 1:
            raise SettingError(f"student_every is {self.student_every}; it must be at least 1.")
        if self.student_input not in ("teacher_forcing", "self_rollout"):
            raise SettingError(
                f"student_input is {self.student_input!r}; it must be 'teacher_forcing' or 'self_rollout'."
            )
        if not 0 < self.earliest < self.latest < 1:
            raise SettingError(
                f"Times run from {self.earliest} to {self.latest}; they must lie within 0 and 1, in order."
            )
        if len(self.times) < 2 or self.times[-1] != 0 or any(a <= b for a, b in pairwise(self.times)):
            raise SettingError(f"The student's times are {self.times}; they must fall and end in 0.")

    def is_student_turn(self, step: int) -> bool:
        """Whether iteration `step`, counted from 0, trains the student."""
        return step % self.student_every == 0

    def gan_weight_at(self, step: int) -> float:
        """The critic's weight at an iteration, growing linearly through the warm-up."""
        return self.gan_weight * min(1.0, step / self.gan_warmup) if self.gan_warmup else self.gan_weight


@dataclass(frozen=True, slots=True)
class Cast:
    """The networks of a distillation: three of one architecture, and the critic."""

    student: nn.Module
    teacher: nn.Module
    fake: nn.Module
    critic: nn.Module | None

    @property
    def taps(self) -> tuple[int, ...]:
        """Teacher blocks the critic reads."""
        if self.critic is None:
            return ()
        critic = getattr(self.critic, "module", self.critic)
        assert isinstance(critic, Discriminator)
        return critic.blocks


def _clean(net: nn.Module, x_t: Tensor, t_B: Tensor, example: Example) -> Tensor:
    return clean_of(net, net(x_t, t_B, example).prediction, x_t, t_B)


def paint(student: nn.Module, example: Example, draws: Draws, settings: Distillation) -> Tensor:
    """An image of the student's, `[B, 3, H, W]`, differentiable in its last step."""
    image = example.image.float()
    times = torch.tensor(settings.times[:-1], dtype=torch.float32, device=image.device)
    shape = tuple(image.shape[1:])
    if settings.student_input == "teacher_forcing":
        t_B = times[draws.choice(len(times)).to(times.device)]
        x_t = mix(image, draws.normal(shape), t_B)
        return _clean(student, x_t, t_B, example)
    last = draws.common_choice(len(times))
    x_t = draws.normal(shape)
    with torch.no_grad():
        for index in range(last):
            clean = _clean(student, x_t, times[index].expand(image.shape[0]), example)
            x_t = renoise(clean, draws.normal(shape), times[index + 1])
    return _clean(student, x_t, times[last].expand(image.shape[0]), example)


def _perturb(painted: Tensor, draws: Draws, settings: Distillation) -> tuple[Tensor, Tensor, Tensor]:
    """Time, noise and noisy image at which a painted image is judged."""
    t_B = logit_normal_times(draws).clamp(settings.earliest, settings.latest)
    noise = draws.normal(tuple(painted.shape[1:]))
    return t_B, noise, mix(painted, noise, t_B)


def student_loss(
    cast: Cast, example: Example, draws: Draws, settings: Distillation, gan_weight: float
) -> tuple[Outcome, dict[str, Tensor]]:
    """The student's phase: its loss, and the clean images that student, teacher and fake score saw.

    The critic's gradient runs through the frozen teacher's features into the student; the teacher's image is
    a constant.
    """
    painted = paint(cast.student, example, draws, settings)
    t_B, _, x_t = _perturb(painted, draws, settings)
    adversarial = cast.critic is not None and gan_weight > 0
    judged = x_t if adversarial else x_t.detach()
    with torch.set_grad_enabled(adversarial and torch.is_grad_enabled()):
        seen = cast.teacher(judged, t_B, example, taps=cast.taps if adversarial else ())
    with torch.no_grad():
        guided = guide(cast.teacher, seen.prediction, x_t.detach(), t_B, example, settings.guidance)
        taught = clean_of(cast.teacher, guided, x_t.detach(), t_B)
        faked = _clean(cast.fake, x_t.detach(), t_B, example)
    loss = distribution_matching(painted, taught, faked)
    parts = {"matching": loss.detach(), "clean_error": (painted.detach() - example.image).square().mean()}
    if adversarial and cast.critic is not None:
        fooled = generator_adversarial(cast.critic(seen.features))
        parts["fooling"] = fooled.detach()
        loss = loss + gan_weight * fooled
    return Outcome(loss, parts), {"student": painted.detach(), "teacher": taught, "fake": faked}


def critics_loss(cast: Cast, example: Example, draws: Draws, settings: Distillation) -> Outcome:
    """The other phase: the fake score learns the student's images, the critic to tell them from real ones."""
    with torch.no_grad():
        painted = paint(cast.student, example, draws, settings)
        t_B, noise, x_t = _perturb(painted, draws, settings)
    prediction = cast.fake(x_t, t_B, example).prediction
    loss = flow_matching(velocity_of(cast.fake, prediction, x_t, t_B), painted, noise)
    parts = {"fake": loss.detach()}
    if cast.critic is None:
        return Outcome(loss, parts)
    real = mix(example.image.float(), noise, t_B)
    with torch.no_grad():
        nudged = real + settings.r1_nudge * draws.normal(tuple(real.shape[1:]))
        fake_seen, real_seen, nudged_seen = (
            cast.teacher(x, t_B, example, taps=cast.taps, predict=False).features for x in (x_t, real, nudged)
        )
    fake_logits, real_logits = cast.critic(fake_seen), cast.critic(real_seen)
    telling = discriminator_adversarial(fake_logits, real_logits)
    steady = approximate_r1(real_logits, cast.critic(nudged_seen))
    parts |= {"telling": telling.detach(), "steady": steady.detach()}
    return Outcome(loss + telling + settings.r1_weight * steady, parts)
