# SPDX-License-Identifier: Apache-2.0
"""Parts on their own: position tables, the adapter and its gates, and the teacher's solver on a known function."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from parity_kit.files import Case, Comparison
from parity_kit.network import with_own_rounding
from pidecode.encoders.text import select_positions
from pidecode.images.tensors import downsample
from pidecode.latents.layout import add_noise, euler_to_variance_preserving
from pidecode.models.pid.adapter import Gate, LatentAdapter
from pidecode.models.pid.blocks import image_rotation, pixel_axis_table, rotate, text_rotation, timestep_features
from pidecode.registry.checkpoints import STUDENT_TIMES
from pidecode.registry.configs import PiDConfig
from pidecode.registry.spaces import SPACES
from pidecode.sampling import (
    clean_from_velocity,
    guided,
    sample_teacher,
    student_times,
    teacher_times,
    velocity_from_clean,
)

TABLE = 1e-5
ANGLES = 1e-4  # angles reach 1000, where float32 has steps of 6e-5; CPUs round their exponentials differently
FORWARD = 2e-5
CPU = torch.device("cpu")


def image_rope(case: Case) -> Iterator[Comparison]:
    """Rotary tables of image tokens, also rows of full-size ones."""
    for entry in case.args["cases"]:
        name = entry["name"]
        reference = (entry["ref_h"], entry["ref_w"]) if entry["mode"] == "ntk_aware" else None
        tables = image_rotation((entry["H"], entry["W"]), entry["head_dim"], reference_grid=reference, device=CPU)
        for label, table in zip(("cos", "sin"), tables, strict=True):
            rows = case.inputs.get(f"{name}.rows")
            yield Comparison(
                f"{name}.{label}", table if rows is None else table[rows], case.outputs[f"{name}.{label}"], TABLE
            )


def text_rope(case: Case) -> Iterator[Comparison]:
    """Rotary tables of prompt tokens."""
    for entry in case.args["cases"]:
        tables = text_rotation(entry["length"], entry["head_dim"], entry["theta"], device=CPU)
        for label, table in zip(("cos", "sin"), tables, strict=True):
            yield Comparison(f"{entry['name']}.{label}", table, case.outputs[f"{entry['name']}.{label}"], TABLE)


def rope_rotation(case: Case) -> Iterator[Comparison]:
    """Applying a rotary table."""
    table = (case.inputs["cos"], case.inputs["sin"])
    for label in ("q", "k"):
        yield Comparison(label, rotate(case.inputs[label], table), case.outputs[label], TABLE)


def pixel_table(case: Case) -> Iterator[Comparison]:
    """The sine table of pixels, put together from its two axes."""
    for entry in case.args["cases"]:
        height, width, half = entry["H"], entry["W"], entry["dim"] // 2
        x_table = pixel_axis_table(width, half, device=CPU).expand(height, width, half)
        y_table = pixel_axis_table(height, half, device=CPU).unsqueeze(1).expand(height, width, half)
        table = torch.cat((x_table, y_table), dim=-1).flatten(0, 1)
        rows = case.inputs.get(f"{entry['name']}.rows")
        expected = case.outputs[f"{entry['name']}.table"]
        yield Comparison(f"{entry['name']}.table", table if rows is None else table[rows], expected, TABLE)


def timestep(case: Case) -> Iterator[Comparison]:
    """Timestep features."""
    for dim in case.args["dims"]:
        yield Comparison(f"dim{dim}", timestep_features(case.inputs["t"], dim), case.outputs[f"dim{dim}"], ANGLES)


def unpatchify(case: Case) -> Iterator[Comparison]:
    """FLUX.2's 2x2 unpacking, which the adapter does with pixel_shuffle."""
    yield Comparison("out", F.pixel_shuffle(case.inputs["latent"], 2), case.outputs["out"], TABLE)


def gate(case: Case) -> Iterator[Comparison]:
    """One gate."""
    module = Gate(case.args["dim"], case.args["gate"].endswith("per_dim"))
    module.load_state_dict(dict(case.weights))
    x, tokens = case.inputs["x"], case.inputs["lq"]
    logits = module.latent_logits(tokens, case.inputs["sigma"])
    yield Comparison("gate", module.value(x, logits), case.outputs["gate"], FORWARD)
    yield Comparison("out", module(x, tokens, logits), case.outputs["out"], FORWARD)


def adapter(case: Case) -> Iterator[Comparison]:
    """The adapter alone."""
    kwargs, grid = case.args["kwargs"], tuple(case.args["grid"])
    config = PiDConfig(
        hidden_size=kwargs["out_dim"],
        num_heads=1,
        patch_depth=kwargs["num_outputs"],
        inject_interval=kwargs["interval"],
        patch_size=kwargs["patch_size"],
        latent_channels=kwargs["latent_channels"],
        latent_down=kwargs["latent_spatial_down_factor"],
        latent_unpatchify=kwargs.get("latent_unpatchify_factor", 1),
        scale=kwargs["sr_scale"],
        adapter_width=kwargs["hidden_dim"],
        adapter_blocks=kwargs["num_res_blocks"],
        adapter_padding=kwargs.get("conv_padding_mode", "zeros"),
        adapter_image_channels=kwargs["in_channels"],
        gate="per_channel" if kwargs["gate_type"].endswith("per_dim") else "per_token",
        inject_pixels=kwargs.get("pit_output", False),
        color_head=kwargs.get("lq_aux_rgb_head", False),
        color_head_tap=kwargs.get("lq_aux_rgb_head_latent_block_idx", -1),
    )
    module = LatentAdapter(config)
    module.load_state_dict(dict(case.weights))
    latent = case.inputs.get("latent")
    tokens = module(grid, latent, image=case.inputs.get("image"), want_color=config.color_head)
    outputs = (*tokens.blocks, *(() if tokens.pixels is None else (tokens.pixels,)))
    for index, output in enumerate(outputs):
        yield Comparison(f"out_{index}", output, case.outputs[f"out_{index}"], FORWARD)
    if tokens.color is not None:
        yield Comparison("pred_lq_rgb", tokens.color, case.outputs["pred_lq_rgb"], FORWARD)
    if latent is not None:
        yield Comparison("z_aligned", module.align(latent, grid), case.outputs["z_aligned"], FORWARD)


def solver(case: Case) -> Iterator[Comparison]:
    """The teacher's solver on the analytic function of the file's description."""
    noise = case.inputs["noise"]
    for entry in case.args["cases"]:
        name, visited = entry["name"], []

        def model(x: Tensor, tau: Tensor, y: Tensor, visited: list[Tensor] = visited) -> Tensor:
            visited.append(tau[0])
            tau = tau.view(-1, 1, 1, 1)
            offset = y.mean((-1, -2)).view(-1, 1, 1, 1)
            return 0.7 * x + 0.4 * torch.sin(1.3 * x + 0.05 * tau) - 0.25 * torch.cos(0.003 * tau) + offset

        predict = guided(
            lambda x, t: model(x, t, case.inputs["cond"]),
            lambda x, t: model(x, t, case.inputs["uncond"], []),
            entry["cfg"],
        )
        image = sample_teacher(
            predict,
            noise,
            num_steps=entry["steps"],
            shift=entry["shift"],
            prediction="x0" if name.endswith("x0model") else "velocity",
        )
        times = teacher_times(entry["steps"], entry["shift"])
        yield Comparison(f"{name}.t_grid", times.float(), case.outputs[f"{name}.t_grid"], TABLE)
        yield Comparison(f"{name}.tau", torch.stack(visited), case.outputs[f"{name}.tau"], 2e-4)
        yield from with_own_rounding(case, image, f"{name}.x", 1e-4)


def student_schedule(case: Case) -> Iterator[Comparison]:
    """The times of the student, for the step counts it takes; a single step starts at 1 (golden notes, section 7)."""
    for steps in case.args["steps"]:
        if not 2 <= steps < len(STUDENT_TIMES):
            continue
        yield Comparison(f"steps_{steps}", torch.tensor(student_times(steps)), case.outputs[f"steps_{steps}"], TABLE)


def velocity(case: Case) -> Iterator[Comparison]:
    """Between velocity and clean image."""
    x, v, t = case.inputs["x"], case.inputs["v"], case.inputs["t"]
    yield Comparison("x0", clean_from_velocity(x, v, t), case.outputs["x0"], TABLE)
    yield Comparison("v_from_x0", velocity_from_clean(x, v, t), case.outputs["v_from_x0"], TABLE)


def euler_frame(case: Case) -> Iterator[Comparison]:
    """SDXL's Euler latents brought to the trained parametrization."""
    for index, sigma in enumerate(case.args["sigmas"]):
        latent, level = euler_to_variance_preserving(case.inputs["latent"], sigma)
        yield Comparison(f"sdxl_{index}.latent", latent, case.outputs[f"sdxl_{index}.latent"], TABLE)
        yield Comparison(f"sdxl_{index}.sigma", level.reshape(()), case.outputs[f"sdxl_{index}.sigma"], TABLE)


def noising(case: Case) -> Iterator[Comparison]:
    """Forward noising of a clean latent in both parametrizations."""
    latent, noise = case.inputs["latent"], case.inputs["noise"]
    for space in ("flux", "sdxl"):
        for index, sigma in enumerate(case.args["sigmas"]):
            noised = add_noise(latent, noise, sigma, SPACES[space])
            yield Comparison(f"{space}_{index}", noised, case.outputs[f"{space}_{index}"], TABLE)


def downsampling(case: Case) -> Iterator[Comparison]:
    """The low-quality image of training."""
    yield Comparison("lq", downsample(case.inputs["image"], int(case.args["downscale"])), case.outputs["lq"], TABLE)


def normalizing(case: Case) -> Iterator[Comparison]:
    """Images of any range brought to [-1, 1] as the official code guesses it; pidecode guesses no range."""
    for name, image in case.inputs.items():
        values = image.float()
        if not image.is_floating_point() or bool(values.max() > 1.0):
            values = values / 127.5 - 1.0
        elif bool(values.min() >= 0.0):
            values = values * 2.0 - 1.0
        yield Comparison(name, values, case.outputs[name], TABLE)


def caption_positions(case: Case) -> Iterator[Comparison]:
    """Which positions of the padded prompt are kept, and which of those hold text."""
    for entry in case.args["cases"]:
        name, kept = entry["name"], select_positions(entry["num_chi_tokens"], entry["model_max_length"])
        yield Comparison(f"{name}.indices", torch.tensor(kept), case.outputs[f"{name}.indices"], 0.0)
        mask = torch.tensor([[position < total for position in kept] for total in entry["total_tokens"]])
        yield Comparison(f"{name}.mask", mask.float(), case.outputs[f"{name}.mask"].float(), 0.0)
