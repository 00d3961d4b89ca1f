# SPDX-License-Identifier: Apache-2.0
"""The samplers beyond their goldens: seeds, steps, progress, and agreement with diffusers' solver."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pidecode.errors import Cancelled, SettingError
from pidecode.sampling import NoiseStream, Step, sample_student, sample_teacher, student_times

SHAPE = (3, 8, 8)


def stream(*seeds: int) -> NoiseStream:
    return NoiseStream(seeds, SHAPE, torch.device("cpu"))


def shrink(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.3 + torch.sin(t).view(-1, 1, 1, 1)


@pytest.mark.parametrize("steps", [0, 5, 25])
def test_step_counts_the_student_never_learned_are_refused(steps: int) -> None:
    with pytest.raises(SettingError, match=f"steps is {steps}.* 1 to 4"):
        student_times(steps)


@pytest.mark.parametrize("kind", ["sde", "ode"])
def test_a_seed_gives_the_same_image_alone_and_in_a_batch(kind: str) -> None:
    alone = sample_student(shrink, stream(7), sampler=kind)  # type: ignore[arg-type]
    again = sample_student(shrink, stream(7), sampler=kind)  # type: ignore[arg-type]
    batch = sample_student(shrink, stream(3, 7), sampler=kind)  # type: ignore[arg-type]
    assert torch.equal(alone, again)
    assert torch.equal(alone[0], batch[1])
    assert not torch.equal(batch[0], batch[1])


def test_the_sde_draws_once_per_step_and_the_ode_once() -> None:
    for kind, expected in (("sde", 4), ("ode", 1)):
        draws = []
        source = stream(0)

        def draw(draws: list[int] = draws, source: NoiseStream = source) -> Tensor:
            draws.append(1)
            return source()

        sample_student(shrink, draw, num_steps=4, sampler=kind)  # type: ignore[arg-type]
        assert len(draws) == expected


def test_progress_is_told_and_cancelling_stops_at_once() -> None:
    seen: list[Step] = []

    def stop_after_two(step: Step) -> None:
        seen.append(step)
        if step.index == 2:
            raise Cancelled("Stopped by the caller.")

    with pytest.raises(Cancelled):
        sample_student(shrink, stream(0), callback=stop_after_two)
    assert [(step.index, step.total) for step in seen] == [(1, 4), (2, 4)]
    assert seen[0].image.shape == (1, *SHAPE)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # from diffusers, with new numpy
@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (2, 3.0), (7, 6.0), (25, 6.0)])
def test_the_teacher_equals_diffusers_solver(steps: int, shift: float) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    scheduler = schedulers.DPMSolverMultistepScheduler(
        num_train_timesteps=1000, prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift,
        solver_order=min(2, steps), algorithm_type="dpmsolver++", solver_type="midpoint",
        lower_order_final=True, final_sigmas_type="zero",
    )  # fmt: skip
    noise = stream(1)()
    scheduler.set_timesteps(steps)
    x = noise.double()
    for index, timestep in enumerate(scheduler.timesteps):
        # Its own timesteps are rounded to integers, which the network must never see.
        t = torch.full((1,), float(scheduler.sigmas[index]) * 1000)
        x = scheduler.step(shrink(x.float(), t).double(), timestep, x, return_dict=False)[0]
    ours = sample_teacher(shrink, noise, num_steps=steps, shift=shift)
    assert (ours - x.float()).abs().max() < 2e-5 * max(1.0, x.abs().max().item())


def test_noise_drawn_ahead_is_the_noise_drawn_when_asked() -> None:
    ahead, plain = (NoiseStream((3, 7), SHAPE, torch.device(name), 3) for name in ("meta", "cpu"))
    made = []
    for _ in range(3):
        assert ahead._next is not None  # begun before it is asked for
        made.append(ahead._next.result())
        assert ahead().device.type == "meta"
    assert ahead._next is None
    assert all(torch.equal(each, plain()) for each in made)
    assert plain._next is None
