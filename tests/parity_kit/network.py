# SPDX-License-Identifier: Apache-2.0
"""The network's scenarios: forwards, intermediates, features, and both samplers on a real network."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from parity_kit.files import Case, Comparison
from pidecode.engine import inplace
from pidecode.engine.timesteps import step_modulation
from pidecode.models.pid.network import Condition, PiDNet
from pidecode.sampling import guided, sample_student, sample_teacher

FORWARD = 2e-5
SAMPLING = 1e-4


def _condition(net: PiDNet, case: Case, x: Tensor, *, text: str = "y", color: bool = False) -> Condition:
    return net.prepare(
        net.grid_of(*x.shape[-2:]),
        case.inputs.get(text),
        case.inputs.get("lq_latent"),
        case.inputs.get("sigma"),
        latent_mask=case.inputs.get("lq_mask"),
        want_color=color,
    )


def forward(case: Case) -> Iterator[Comparison]:
    """One evaluation of the network."""
    net, x = case.net(), case.inputs["x"]
    condition = _condition(net, case, x)
    yield Comparison("v", net.denoise(x, case.inputs["t"], condition), case.outputs["v"], FORWARD)
    in_place = inplace.denoise(net, x, step_modulation(net, case.inputs["t"]), condition)
    yield Comparison("v in place", in_place, case.outputs["v"], FORWARD)


def color(case: Case) -> Iterator[Comparison]:
    """The color head beside an unchanged prediction."""
    net, x = case.net(), case.inputs["x"]
    condition = _condition(net, case, x, color=True)
    assert condition.color is not None
    yield Comparison("v", net.denoise(x, case.inputs["t"], condition), case.outputs["v"], FORWARD)
    yield Comparison("pred_lq_rgb", condition.color, case.outputs["pred_lq_rgb"], FORWARD)


def features(case: Case) -> Iterator[Comparison]:
    """Image stream after named patch blocks, alone and beside the prediction."""
    net, x = case.net(), case.inputs["x"]
    indices = tuple(case.args["feature_indices"])
    condition = _condition(net, case, x)
    maps, v = net.features(x, case.inputs["t"], condition, indices, predict=True)
    early, nothing = net.features(x, case.inputs["t"], condition, indices)
    assert v is not None and nothing is None
    yield Comparison("v", v, case.outputs["v"], FORWARD)
    for index, tap, early_tap in zip(indices, maps, early, strict=True):
        yield Comparison(f"feature_block_{index}", tap, case.outputs[f"feature_block_{index}"], FORWARD)
        yield Comparison(f"feature_block_{index} early", early_tap, case.outputs[f"feature_block_{index}"], FORWARD)


class _Tape:
    """Records what goes into and comes out of named modules."""

    def __init__(self, net: PiDNet) -> None:
        self.into: dict[str, tuple[Any, ...]] = {}
        self.out: dict[str, Any] = {}
        for name, module in net.named_modules():
            module.register_forward_hook(self._keep(name))

    def _keep(self, name: str) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self.into[name], self.out[name] = args, output

        return hook


def intermediates(case: Case) -> Iterator[Comparison]:
    """Every recorded tensor inside one forward."""
    net, x, t = case.net(), case.inputs["x"], case.inputs["t"]
    tape = _Tape(net)
    condition = _condition(net, case, x)
    v = net.denoise(x, t, condition)
    seen = _seen(net, tape, condition) | {"v": v}
    for name, expected in case.outputs.items():
        size = max(1.0, float(expected.abs().max()))  # the stream grows from block to block, and its rounding with it
        yield Comparison(name, seen[name], expected, FORWARD * size)


def _seen(net: PiDNet, tape: _Tape, condition: Condition) -> dict[str, Tensor]:
    """The reference's names for what our modules carry."""
    last = net.config.patch_depth - 1
    t_emb = tape.out["t_embedder"]
    seen: dict[str, Tensor] = {
        "t_emb": t_emb,
        "condition": F.silu(t_emb).unsqueeze(1),
        "patches": tape.into["s_embedder"][0],
        "s0": tape.out["s_embedder"],
        "pixel_tokens_in": tape.into["pixel_blocks.0"][0].flatten(0, 1),
        "s_cond": tape.into["pixel_blocks.0"][1].flatten(0, 1),
        "final_tokens": tape.out["final_layer"].flatten(0, 1),
    }
    if condition.text is not None:
        seen["y_emb_in"] = condition.text
    for index in range(last + 1):
        x_in, *_ = tape.into[f"patch_blocks.{index}"]
        x_out, y_out = tape.out[f"patch_blocks.{index}"]
        seen |= {f"s_main_into_block_{index}": x_in, f"s_main_after_block_{index}": x_out}
        if index == last:  # computed only here: nothing reads it
            y_out = net.patch_blocks[last](*tape.into[f"patch_blocks.{last}"], want_text=True)[1]
        seen[f"y_emb_after_block_{index}"] = y_out
    for index in range(net.config.pixel_depth):
        seen[f"pixel_tokens_after_block_{index}"] = tape.out[f"pixel_blocks.{index}"].flatten(0, 1)
    if net.config.has_adapter:
        seen["lq_z_aligned"] = tape.into["lq_proj.latent_proj.0"][0]
        seen["lq_hidden"] = tape.out[f"lq_proj.latent_proj.{len(net.lq_proj.latent_proj) - 1}"]
        for index, injection in enumerate(condition.injections):
            seen[f"lq_feature_{index}"] = injection.read()[0]
            seen[f"gate_{index}"] = _gate_value(net.lq_proj.gate_modules[index], tape, f"lq_proj.gate_modules.{index}")
        if condition.pixel_injection is not None:
            seen["lq_feature_pit"] = condition.pixel_injection.read()[0]
            seen["gate_pit"] = _gate_value(net.pit_lq_gate, tape, "pit_lq_gate")
    return seen


def _gate_value(gate: Any, tape: _Tape, name: str) -> Tensor:
    x, _tokens, logits = tape.into[name]
    return gate.value(x, logits)  # type: ignore[no-any-return]


def student(case: Case) -> Iterator[Comparison]:
    """Few-step sampling with the recorded noise."""
    net = case.net()
    condition = _condition(net, case, case.inputs["noise"])
    for variant in case.args["variants"]:
        draws = iter(
            [case.inputs["noise"], *(case.inputs[key] for key in sorted(case.inputs) if key.startswith("eps_"))]
        )
        visited: list[tuple[Tensor, Tensor]] = []

        def predict(x: Tensor, t: Tensor, visited: list[tuple[Tensor, Tensor]] = visited) -> Tensor:
            visited.append((x, t))
            return net.denoise(x, t, condition)

        image = sample_student(
            predict,
            lambda draws=draws: next(draws),  # type: ignore[misc]
            num_steps=variant["steps"],
            sampler=variant["type"],
            prediction=variant.get("prediction_type", case.config.get("prediction_type", "velocity")),
        )
        name = variant["name"]
        yield Comparison(f"{name}.x0", image, case.outputs[f"{name}.x0"], SAMPLING)
        for index, (x, t) in enumerate(visited):
            if f"{name}.x_into_step_{index}" in case.outputs:
                yield Comparison(
                    f"{name}.x_into_step_{index}", x, case.outputs[f"{name}.x_into_step_{index}"], SAMPLING
                )
                yield Comparison(
                    f"{name}.t_into_step_{index}", t, case.outputs[f"{name}.t_into_step_{index}"], SAMPLING
                )


def teacher(case: Case) -> Iterator[Comparison]:
    """The undistilled sampler with guidance."""
    net, noise = case.net(), case.inputs["noise"]
    prompted = _condition(net, case, noise)
    unprompted = _condition(net, case, noise, text="null_y")
    for variant in case.args["variants"]:
        predict = guided(
            lambda x, t: net.denoise(x, t, prompted), lambda x, t: net.denoise(x, t, unprompted), variant["cfg"]
        )
        image = sample_teacher(predict, noise, num_steps=variant["steps"], shift=variant["shift"]).clamp(-1, 1)
        name = variant["name"]
        yield from with_own_rounding(case, image, f"{name}.image_clamped", SAMPLING)


def with_own_rounding(case: Case, image: Tensor, name: str, tolerance: float) -> Iterator[Comparison]:
    """Compare with the reference's high-precision run, and with its float32 run.

    The reference's float32 solver loses digits, so its own recorded distance from
    exact arithmetic is added to the tolerance of the second comparison, never of the first.
    """
    exact, single = case.outputs[f"{name}_hp"], case.outputs[name]
    yield Comparison(f"{name}_hp", image, exact, tolerance)
    yield Comparison(name, image, single, tolerance + (single - exact).abs().max().item())
