# SPDX-License-Identifier: Apache-2.0
"""A diffusers pipeline that stays loaded and makes one latent at a time, as page and server ask for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from pidecode.facts.generation import GENERATION, diffusion_size
from pidecode.facts.spaces import get_image_model
from pidecode.integrations.capture import Progress, run_for_latents
from pidecode.integrations.generate import load_pipeline
from pidecode.latents.latent import Latent


class PipelinePainter:
    """Prompts to latents.

    model: an image model's name. pipe: its pipeline, on its device. steps: of the diffusion; default the model's own.
    """

    def __init__(self, model: str, pipe: Any, *, steps: int | None = None) -> None:
        self.steps = steps or get_image_model(model).steps
        self.model = get_image_model(model).name
        self.space = get_image_model(model).space
        self.pipe = pipe

    @classmethod
    def from_pretrained(
        cls, model: str, source: str | None, *, device: torch.device, dtype: torch.dtype
    ) -> PipelinePainter:
        """Load the pipeline from this machine. Raises as `load_pipeline` does."""
        return cls(model, load_pipeline(model, source, device, dtype))

    def __call__(
        self, prompt: str, *, width: int, height: int, seed: int, on_step: Callable[[int, int], None]
    ) -> Latent:
        """The latent of a picture that PiD makes `width` x `height` pixels large; `on_step(done, total)` may stop it.

        Raises SizeError for a size the model cannot draw.
        """
        low_width, low_height = diffusion_size(self.model, width, height)

        def told(progress: Progress) -> None:
            on_step(progress.step, progress.steps)

        call = {
            **GENERATION[self.model].arguments,
            "prompt": prompt,
            "width": low_width,
            "height": low_height,
            "num_inference_steps": self.steps,
            "generator": torch.Generator().manual_seed(seed),
        }
        return run_for_latents(self.pipe, call, on_progress=told).latent
