# SPDX-License-Identifier: Apache-2.0
"""The official network from a checkout of nv-tlabs/PiD, run beside ours in one process: same weights, same noise."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.memory import LiveBytes
from benchmarks.speed import Benchmark, Trial, clock, wait_for
from pidecode.errors import FileError, MissingDependencyError
from pidecode.registry.configs import PiDConfig
from pidecode.sampling import TIMESCALE, student_times

ABSENT = ("pynvml", "megatron", "megatron.core", "megatron.core.parallel_state")
"""What the reference imports beside its network and never calls in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Ours against the reference, alternately, in one process."""

    speed: float
    """Reference's time over ours, for whole decodes: above 1, ours is faster."""
    speeds: tuple[float, ...]
    """The same for each pair of runs."""
    memory: float
    """Reference's peak above the weights over ours."""
    peak: int
    reference_peak: int
    difference: float
    """Largest difference between the two images, in [-1, 1]."""
    deviation: float
    """Standard deviation of the reference's image, to judge the difference by."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def reference_arguments(config: PiDConfig) -> dict[str, Any]:
    """Our shape as the reference's constructor arguments."""
    per_token = config.gate == "per_token"
    return {
        "in_channels": 3, "num_groups": config.num_heads, "hidden_size": config.hidden_size,
        "pixel_hidden_size": config.pixel_hidden_size, "pixel_attn_hidden_size": config.pixel_attn_hidden_size,
        "pixel_num_groups": config.pixel_num_heads, "patch_depth": config.patch_depth,
        "pixel_depth": config.pixel_depth, "patch_size": config.patch_size, "txt_embed_dim": config.text_dim,
        "txt_max_length": config.text_length, "use_text_rope": config.text_rope,
        "text_rope_theta": config.text_rope_theta, "rope_mode": config.rope_mode,
        "rope_ref_h": config.rope_reference[0], "rope_ref_w": config.rope_reference[1],
        "lq_in_channels": config.adapter_image_channels, "lq_latent_channels": config.latent_channels,
        "lq_hidden_dim": config.adapter_width, "lq_num_res_blocks": config.adapter_blocks,
        "lq_latent_unpatchify_factor": config.latent_unpatchify, "lq_aux_rgb_head": config.color_head,
        "lq_conv_padding_mode": config.adapter_padding,
        "lq_gate_type": "sigma_aware_per_token" if per_token else "sigma_aware_per_token_per_dim",
        "lq_interval": config.inject_interval, "sr_scale": config.scale,
        "latent_spatial_down_factor": config.latent_down, "pit_lq_inject": config.inject_pixels,
    }  # fmt: skip


@contextmanager
def _importable(checkout: Path) -> Iterator[None]:
    """Have the checkout's package importable, with empty stand-ins for what it imports and its network does not use."""
    stand_ins = {name: ModuleType(name) for name in ABSENT if name not in sys.modules}
    for name, module in stand_ins.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent in stand_ins:
            setattr(stand_ins[parent], child, module)
    sys.modules.update(stand_ins)
    sys.path.insert(0, str(checkout))
    try:
        yield
    finally:
        sys.path.remove(str(checkout))
        for name in stand_ins:
            sys.modules.pop(name, None)


def load_reference(checkout: Path, config: PiDConfig) -> Any:
    """The official network class, built from a checkout at the given shape, on the meta device.

    Raises FileError where there is no such checkout, MissingDependencyError for a package it needs.
    """
    if not (checkout / "pid" / "_src" / "networks" / "pid_net.py").is_file():
        raise FileError(
            f"{checkout} holds no pid/_src/networks/pid_net.py; give the top of a checkout of nv-tlabs/PiD."
        )
    with _importable(checkout):
        try:
            from pid._src.networks.pid_net import PidNet  # type: ignore[import-not-found]
        except ImportError as error:
            raise MissingDependencyError(
                f"The reference needs a package that is not here ({error}); install it (it wants loguru), or leave "
                "--reference out."
            ) from error
        with torch.device("meta"):
            return PidNet(**reference_arguments(config))


@torch.inference_mode()
def compare(trial: Trial, checkout: Path) -> Comparison:
    """Run reference and ours in turn, A B A B, with one set of weights.

    Ours runs as by default; the reference as its own sampler runs it, in its plain, eager form.
    """
    bench = Benchmark(trial)
    reference = load_reference(checkout, trial.config).eval().requires_grad_(False)
    reference.load_state_dict(dict(bench.net.state_dict()), assign=True)

    def run_reference() -> Tensor:
        x, times = bench.noise[0], student_times(trial.steps)
        for index, (t, t_next) in enumerate(pairwise(times)):
            time = torch.full((1,), t, device=trial.device) * TIMESCALE
            sigma = torch.zeros(1, device=trial.device)
            v = reference(x, time, bench.text, lq_latent=bench.latent, degrade_sigma=sigma)
            clean = (x.double() - t * v.double()).float()
            x = clean if t_next == 0 else (1 - t_next) * clean + t_next * bench.noise[index + 1]
        return x.clamp(-1, 1)

    wait_for(trial.device)
    with LiveBytes() as reference_live:
        expected = run_reference()
    with LiveBytes() as live:
        actual = bench.decode()
    pairs = [
        (clock(run_reference, trial.device)[0], clock(bench.decode, trial.device)[0]) for _ in range(trial.repeats)
    ]
    return Comparison(
        speed=sum(a for a, _ in pairs) / sum(b for _, b in pairs),
        speeds=tuple(a / b for a, b in pairs),
        memory=reference_live.peak / live.peak,
        peak=live.peak,
        reference_peak=reference_live.peak,
        difference=(actual - expected).abs().max().item(),
        deviation=expected.std().item(),
    )
