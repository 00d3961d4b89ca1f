# SPDX-License-Identifier: Apache-2.0
"""From noise to image: the student's few steps and the teacher's DPM-Solver, as functions of a network.

Time runs from 1 (noise) to 0 (image): `x_t = (1 - t) x_0 + t eps` (docs/architecture.md, Schedule and sampling).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from pidecode.devices import copies_from_pinned_memory
from pidecode.errors import SettingError
from pidecode.registry.checkpoints import STUDENT_TIMES, Sampler
from pidecode.registry.configs import Prediction

DEFAULT_STEPS, TEACHER_GUIDANCE = {"feed-forward": 1, "student": 4, "teacher": 25}, 5.0  # where a caller names none
SINGLE_STEP_TIME = 1.0  # one step alone starts from pure noise instead of the list's first entry
SMALLEST_DIVISOR = 0.05  # below this time a velocity is not recovered from x_0 by dividing by t, but by this
FLOAT64_PIXELS = 2**18  # pixels converted in float64 at once, so that no float64 copy of a whole image exists
TIMESCALE = 1000.0  # the network reads the flow time times this, never rounded: one unit is one radian
FINISHING_WORK = 0.02  # work of color fix and clamping as a part of the rest, for progress only

# Noisy image `[B, 3, H, W]` and flow time times 1000 `[B]` to the network's output, same shape as the image.
Predict = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Step:
    """What a progress callback learns after each step."""

    index: int  # steps done so far, from 1
    total: int
    image: Tensor  # the current estimate of the finished image `[B, 3, H, W]`, unclamped


Callback = Callable[[Step], None]  # called after each step; raise `errors.Cancelled` in it to stop

Phase = Literal["encoding", "decoding", "finishing"]


@dataclass(frozen=True, slots=True)
class Progress:
    """What one call of `decode` or `upscale` is doing at this moment."""

    phase: Phase  # "encoding" the image, "decoding" the latent, "finishing" the pixels
    done: float  # share of the whole call's predicted work that is done, 0 to 1; never falls within a call
    unit: str = ""  # what the phase is counted in: "step" or "strip"; empty where it is one piece
    index: int = 0  # unit that begins now, from 1; 0 before the first
    total: int = 0  # units of the phase
    part: str = ""  # what of several the call is about, such as "frame 2 of 3"; empty where it is all

    def __str__(self) -> str:
        """The phase in words, such as "decoding, strip 3 of 8"."""
        words = [self.part, self.phase, f"{self.unit} {self.index} of {self.total}" if self.index else ""]
        return ", ".join(filter(None, words))

    def of_part(self, name: str, index: int, count: int) -> Progress:
        """The same as progress of one of `count` equal parts, which is counted from 0."""
        return replace(self, done=(index + self.done) / count, part=f"{name} {index + 1} of {count}")


# Called before the first work and before each further unit; raise `errors.Cancelled` in it to stop.
DecodeProgressCallback = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class WorkTracker:
    """Reports progress as shares of a whole whose phases are of known size."""

    callback: DecodeProgressCallback | None = None  # called with all progress, if given
    decoding: float = 1.0  # predicted work of decoding, in any unit
    encoding: float = 0.0  # predicted work of encoding, in the same unit
    part: tuple[int, int] = (0, 1)  # index of the image, and number of images, of a call that runs one after another

    def report(self, phase: Phase, share: float = 0.0, unit: str = "", index: int = 0, total: int = 0) -> None:
        """Report that a share of a phase is done, and which unit begins now."""
        if self.callback is None:
            return
        finishing = FINISHING_WORK * (self.decoding + self.encoding)
        before, work = {
            "encoding": (0.0, self.encoding), "decoding": (self.encoding, self.decoding),
            "finishing": (self.encoding + self.decoding, finishing),
        }[phase]  # fmt: skip
        done = (before + share * work) / (self.encoding + self.decoding + finishing)
        self.callback(Progress(phase, (self.part[0] + min(1.0, done)) / self.part[1], unit, index, total))

    def strips(self) -> Callable[[int, int], None]:
        """A callback of the strips done and of all strips that reports the strip that begins; decoding begins now."""
        self.report("decoding")
        return lambda done, total: self.report("decoding", done / total, "strip", done + 1, total)

    def steps(self, callback: Callback | None, num_steps: int) -> Callback:
        """A step callback that also reports the step that begins next; the first is reported now."""
        self.report("decoding", 0.0, "step", 1, num_steps)

        def report(step: Step) -> None:
            if callback is not None:
                callback(step)
            if step.index < step.total:
                self.report("decoding", step.index / step.total, "step", step.index + 1, step.total)

        return report


def student_times(num_steps: int) -> tuple[float, ...]:
    """Times at which a student of 1 to 4 steps runs, ending in 0. Raises SettingError for other numbers."""
    longest = len(STUDENT_TIMES) - 1
    if not 1 <= num_steps <= longest:
        raise SettingError(
            f"num_steps is {num_steps}; a distilled decoder takes 1 to {longest}. It was trained at {longest} times "
            "only, so more steps would repeat some of them without adding anything."
        )
    if num_steps == 1:
        return (SINGLE_STEP_TIME, 0.0)
    return tuple(STUDENT_TIMES[round(longest * index / num_steps)] for index in range(num_steps + 1))


def _wide(device: torch.device) -> torch.dtype:
    """The type solver arithmetic runs in: float64 where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _in_pieces(rule: Callable[..., Tensor], x: Tensor, other: Tensor, scalar: Tensor | float) -> Tensor:
    """`rule(x, other, scalar)` elementwise in a wide type, as float32, without a wide copy of a whole image.

    With gradients the whole image goes at once, so that autograd sees one plain expression.
    """
    wide = _wide(x.device)
    if isinstance(scalar, Tensor):
        scalar = scalar.to(x.device, wide).view(-1, 1, 1, 1)
    if torch.is_grad_enabled() and (x.requires_grad or other.requires_grad):
        return rule(x.to(wide), other.to(wide), scalar).float()
    out = torch.empty_like(x, dtype=torch.float32, memory_format=torch.contiguous_format)
    rows = max(1, FLOAT64_PIXELS // max(1, x.shape[0] * x.shape[-1]))
    for start in range(0, x.shape[-2], rows):
        piece = (..., slice(start, start + rows), slice(None))
        out[piece] = rule(x[piece].to(wide), other[piece].to(wide), scalar)
    return out


def clean_from_velocity(x: Tensor, velocity: Tensor, t: Tensor | float) -> Tensor:
    """`x - t v`, in float64 where the device has it, rounded to float32."""
    return _in_pieces(lambda x, v, t: x - t * v, x, velocity, t)


def velocity_from_clean(x: Tensor, clean: Tensor, t: Tensor | float) -> Tensor:
    """`(x - x_0) / max(t, 0.05)`, in float64 where the device has it, rounded to float32."""
    divisor = t.clamp(min=SMALLEST_DIVISOR) if isinstance(t, Tensor) else max(t, SMALLEST_DIVISOR)
    return _in_pieces(lambda x, clean, divisor: (x - clean) / divisor, x, clean, divisor)


def renoise(clean: Tensor, noise: Tensor, t: Tensor | float) -> Tensor:
    """`(1 - t) x_0 + t eps`."""
    if isinstance(t, Tensor) or torch.is_grad_enabled():
        return (1 - t) * clean + t * noise
    return (noise * t).add_(clean, alpha=1 - t)


class NoiseStream:
    """Unit noise in the reference's order, from one seeded generator per image.

    Generators live on the CPU, so a seed draws the same noise whatever device decodes it, and an image in a batch gets
    the noise it would get alone. For another device each draw is made one ahead in a thread, while the device works,
    into pinned memory from which it is copied without waiting. On the CPU drawing ahead would take a core and an
    image's memory from the network, so each is drawn when it is asked for.

    Args:
        seeds: One per image.
        shape: Channels, height and width.
        device: Where the noise is used.
        count: How many draws will be asked for; no more are made ahead.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, int, int], device: torch.device, count: int = 1) -> None:
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._shape, self._device, self._ahead = shape, device, 0 if device.type == "cpu" else count
        self._thread = ThreadPoolExecutor(1, "noise") if self._ahead else None
        self._next: Future[Tensor] | None = None
        self._draw_ahead()

    def _draw_ahead(self) -> None:
        self._next = None
        if self._thread is not None and self._ahead > 0:
            self._ahead -= 1
            self._next = self._thread.submit(self._draw)
            if self._ahead == 0:
                self._thread.shutdown(wait=False)

    def _draw(self) -> Tensor:
        pinned = copies_from_pinned_memory(self._device)
        draws = torch.empty(len(self._generators), *self._shape, pin_memory=pinned)
        for draw, generator in zip(draws, self._generators, strict=True):
            torch.randn(self._shape, generator=generator, out=draw)
        return draws

    def __call__(self) -> Tensor:
        """The next draw `[B, *shape]`, float32."""
        draws = self._draw() if self._next is None else self._next.result()
        self._draw_ahead()
        return draws.to(self._device, non_blocking=True)


def sample_student(
    predict: Predict,
    draw: Callable[[], Tensor],
    *,
    num_steps: int = 4,
    sampler: Sampler = "sde",
    prediction: Prediction = "velocity",
    callback: Callback | None = None,
) -> Tensor:
    """Run a distilled decoder; returns the image `[B, 3, H, W]`, unclamped.

    `draw()` gives the starting noise, then ("sde" only) one fresh noise after each step but the last.

    Raises:
        SettingError: A student does not take that number of steps.
    """
    times = student_times(num_steps)
    x = draw()
    for index, (t, t_next) in enumerate(pairwise(times)):
        # The time stays on the host: a network that knows it beforehand need not wait to read it.
        output = predict(x, torch.full((x.shape[0],), t) * TIMESCALE).float()
        clean = output if prediction == "x0" else clean_from_velocity(x, output, t)
        if t_next == 0:
            x = clean
        elif sampler == "sde":
            x = renoise(clean, draw(), t_next)
        else:
            velocity = velocity_from_clean(x, output, t) if prediction == "x0" else output
            x = x + (t_next - t) * velocity
            del velocity
        if callback is not None:
            callback(Step(index + 1, num_steps, clean))
        del output, clean  # two images that the next evaluation would otherwise run beside
    return x


def shifted(t: Tensor, shift: float) -> Tensor:
    """`s t / (1 + (s - 1) t)`: moves times toward noise for large images."""
    return shift * t / (1 + (shift - 1) * t)


def teacher_times(num_steps: int, shift: float) -> Tensor:
    """The `num_steps + 1` times of the teacher's solver, float64, from just under 1 to exactly 0."""
    if num_steps < 1:
        raise SettingError(f"num_steps is {num_steps}; the teacher needs at least one.")
    return shifted(1 - torch.linspace(1.0, 0.001, num_steps + 1, dtype=torch.float64), shift).flip(0)


def guided(predict: Predict, predict_unprompted: Predict, guidance_scale: float) -> Predict:
    """Classifier-free guidance: `u + g (c - u)`; the latent stays in both branches."""
    if guidance_scale == 1.0:
        return predict

    def combined(x: Tensor, t: Tensor) -> Tensor:
        without = predict_unprompted(x, t)
        return without + guidance_scale * (predict(x, t) - without)

    return combined


def sample_teacher(
    predict: Predict,
    noise: Tensor,
    *,
    num_steps: int = 25,
    shift: float = 1.0,
    prediction: Prediction = "velocity",
    callback: Callback | None = None,
) -> Tensor:
    """DPM-Solver++, second-order multistep with the midpoint correction; returns the image, unclamped.

    The same algorithm as diffusers' DPMSolverMultistepScheduler on flow sigmas, but the network is fed unrounded times:
    rounding them costs up to 2e-2. The first and the last step are of first order. Solver arithmetic runs in float64
    where the device has it.
    """
    wide = _wide(noise.device)
    times = teacher_times(num_steps, shift).tolist()
    x, previous, previous_h = noise.to(wide), None, 0.0
    for index, (t, t_next) in enumerate(pairwise(times)):
        narrow = x.float()
        output = predict(narrow, torch.full((x.shape[0],), t, dtype=torch.float32) * TIMESCALE)
        clean = output.to(wide) if prediction == "x0" else x - t * output.to(wide)
        if t_next == 0:
            x = clean
        else:
            # h is the step in log((1 - t) / t); expm1(-h) = (t_next / t) (1 - t) / (1 - t_next) - 1.
            ratio = (t_next / t) * (1 - t) / (1 - t_next)
            h = -torch.tensor(ratio, dtype=torch.float64).log().item()
            toward = clean if previous is None else clean + 0.5 * (h / previous_h) * (clean - previous)
            x = (t_next / t) * x - (1 - t_next) * (ratio - 1) * toward
            previous, previous_h = clean, h
        if callback is not None:
            callback(Step(index + 1, num_steps, clean.float()))
    return x.float()
