# SPDX-License-Identifier: Apache-2.0
"""What one small network learns in the same time by each objective: x0 or velocity, direct or as a flow, then DMD2.

    python benchmarks/objectives.py --data IMAGES --teacher TAEF2 --seconds 720 --folder out [--device cuda]

The network is a whole PiDNet with attention and four steps, from nothing, on crops of 128 pixels and the tiny FLUX.2
autoencoder's latents. "direct" paints the image itself from each of the student's four times; "flow" is the
teacher's flow matching; "dmd2" distils a flow's network, with its critic. Each learns for `--seconds`; a result in
`--folder` is kept. Measured are the middles of the held-out images.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import numpy as np
import torch
from quality import images, middle
from torch import Tensor, nn

from pidecode.devices import pick_device
from pidecode.files import atomic_write
from pidecode.metrics import psnr, sharpness, ssim
from pidecode.models.pid.network import Condition
from pidecode.registry.configs import PiDConfig, Prediction
from pidecode.sampling import sample_student, sample_teacher
from pidecode.training.denoiser import Evaluator, Example
from pidecode.training.dmd import Cast, Discriminator, Distillation, critics_loss, paint, student_loss
from pidecode.training.flow_matching import TeacherLoss, teacher_loss
from pidecode.training.losses import clean_image
from pidecode.training.models import new_network
from pidecode.training.noise import SeededDraws
from pidecode.training.tiny.augment import varied
from pidecode.training.tiny.cache import held_out, quarter, read_manifest, to_signed
from pidecode.training.tiny.resident import ResidentImages, resident_images
from pidecode.training.tiny.stage import update_average
from pidecode.training.tiny.state import load_state, save_state
from pidecode.training.tiny.teacher import TeacherAutoencoder
from pidecode.training.tiny.unrolled_stage import UnrolledRecipe

SIDE, BATCH, WINDOW = 128, 8, 256
RATE, CRITIC_RATE, KEEP, CLIP = 1e-3, 1e-4, 0.998, 1.0
DISTILLATION = Distillation(student_every=5, student_input="self_rollout")
FLOW = TeacherLoss(shift=1.0, shift_base_size=None)


def network(prediction: Prediction, seed: int = 0) -> Evaluator:
    """A network of 3.7 million parameters from its start values."""
    config = PiDConfig(
        hidden_size=128, num_heads=4, patch_depth=3, patch_size=16, pixel_hidden_size=8, pixel_depth=1,
        pixel_attn_hidden_size=64, pixel_num_heads=4, text_dim=0, latent_channels=128, latent_down=16,
        latent_unpatchify=2, adapter_width=96, adapter_padding="replicate", gate="per_token", inject_pixels=True,
        rope_reference=(WINDOW, WINDOW), prediction=prediction,
    )  # fmt: skip
    return Evaluator(new_network(config, seed))


class Trainer:
    """Batches, updates with a rate that follows the time used, and an average of the weights."""

    def __init__(
        self, crops: ResidentImages, teacher: TeacherAutoencoder, device: torch.device, seconds: float
    ) -> None:
        self.crops, self.teacher, self.device = crops, teacher, device
        self.schedule = UnrolledRecipe(seconds=seconds, warmup_steps=100, decay_from=0.0)

    def batches(self) -> Iterator[tuple[Example, SeededDraws, float, int]]:
        """Examples with their draws, what rates are multiplied by, and their number; until the time is used."""
        torch.manual_seed(0)
        started, step = time.monotonic(), 0
        while (used := self.schedule.progress(step, time.monotonic() - started)) < 1:
            with torch.no_grad():
                image, small = varied(self.crops.crops(BATCH, SIDE), recolored=0.5, joined=0.0)
                latent = nn.functional.pixel_unshuffle(self.teacher.encode(small), 2)
            sigma = torch.zeros(BATCH, device=self.device)
            draws = SeededDraws(0, step, range(BATCH), self.device)
            yield (
                Example(image=image, low=small, latent=latent, sigma=sigma),
                draws,
                self.schedule.factor(used, step),
                step,
            )
            step += 1

    def update(self, loss: Tensor, modules: list[nn.Module], optimizer: torch.optim.Optimizer, rate: float) -> None:
        """One step of AdamW."""
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for module in modules:
            nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()

    def single(self, objective: str, prediction: Prediction) -> tuple[Evaluator, int]:
        """A network trained directly or as a flow; and how many steps that were."""
        net = network(prediction).to(self.device).train()
        average, optimizer, step = copy.deepcopy(net), torch.optim.AdamW(net.parameters(), weight_decay=0.0), 0
        for example, draws, factor, step in self.batches():
            if objective == "direct":
                loss = clean_image(paint(net, example, draws, Distillation()), example.image)[0]
            else:
                loss = teacher_loss(net, example, draws, FLOW).loss
            self.update(loss, [net], optimizer, RATE * factor)
            average_into(average, net, step)
        return average, step + 1

    def distilled(self, start: Evaluator) -> tuple[Evaluator, int]:
        """A student of four steps from a flow's network, with a fake score and a critic."""
        config = start.net.config
        student, fake, teacher = (copy.deepcopy(start).train() for _ in range(3))
        teacher.eval().requires_grad_(False)
        critic = Discriminator(config.hidden_size, config.patch_depth).to(self.device)
        average, step = copy.deepcopy(student), 0
        own = torch.optim.AdamW(student.parameters(), weight_decay=0.0)
        others = torch.optim.AdamW([*fake.parameters(), *critic.parameters()], weight_decay=0.0)
        cast = Cast(student, teacher, fake, critic)
        for example, draws, factor, step in self.batches():
            rate = CRITIC_RATE * factor
            if DISTILLATION.is_student_turn(step):
                outcome, _ = student_loss(cast, example, draws, DISTILLATION, DISTILLATION.gan_weight_at(step))
                self.update(outcome.loss, [student], own, rate)
                average_into(average, student, step // DISTILLATION.student_every)
            else:
                self.update(critics_loss(cast, example, draws, DISTILLATION).loss, [fake, critic], others, rate)
        return average, step + 1


def average_into(average: nn.Module, net: nn.Module, step: int) -> None:
    """Moving average of the weights, shorter at the start."""
    update_average(average, net, min(KEEP, (1 + step) / (10 + step)))


@torch.inference_mode()
def measured(
    net: Evaluator, shown: list[np.ndarray], teacher: TeacherAutoencoder, device: torch.device
) -> dict[str, dict[str, float]]:
    """Means over the images: four steps of a student, and 25 of a teacher, from the same noise."""
    net.eval()
    prediction = net.net.config.prediction
    rows: dict[str, list[tuple[float, float, float]]] = {"four steps": [], "25 steps": []}
    for array in shown:
        original, small = (to_signed(x)[None].to(device) for x in (array, quarter(array)))
        latent = nn.functional.pixel_unshuffle(teacher.encode(small), 2)
        condition = net.net.prepare(net.net.grid_of(*original.shape[-2:]), None, latent, torch.zeros(1, device=device))
        noise = torch.Generator().manual_seed(0)

        def draw(like: Tensor = original, noise: torch.Generator = noise) -> Tensor:
            return torch.randn(like.shape, generator=noise).to(like)

        def predict(x: Tensor, t: Tensor, condition: Condition = condition) -> Tensor:
            return net.net.denoise(x, t, condition)

        made = {
            "four steps": sample_student(predict, draw, prediction=prediction),
            "25 steps": sample_teacher(predict, draw(), prediction=prediction),
        }
        for name, image in made.items():
            image = image.clamp(-1, 1)
            found = psnr(image, original), ssim(image, original), sharpness(image)
            rows[name].append(tuple(x.item() for x in found))  # type: ignore[arg-type]
    return {
        name: dict(zip(("psnr", "ssim", "sharpness"), np.mean(found, 0).round(4).tolist(), strict=True))
        for name, found in rows.items()
    }


def main() -> None:
    """Train every arm, measure it, write it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of images, with manifest.jsonl")
    parser.add_argument("--teacher", type=Path, required=True, help="folder of the two taef2 files")
    parser.add_argument("--folder", type=Path, required=True, help="where results and weights go")
    parser.add_argument("--seconds", type=float, default=720, help="training time of each arm")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    device = pick_device(given.device)
    teacher = TeacherAutoencoder.from_folder(given.teacher).to(device)
    categories = read_manifest(given.data)
    names = sorted({name for kind in categories.values() for name in kind} - held_out(categories))
    crops = resident_images(
        [given.data / name for name in names], device, shrinks=(1.0, 0.5), procedural_seeds=0, procedural_side=SIDE
    )
    shown = [middle(array, WINDOW) for _, array in images(given.data, WINDOW, 1)]
    given.folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(crops, teacher, device, given.seconds)
    for objective, prediction in itertools.product(("direct", "flow", "dmd2"), get_args(Prediction)):
        path, weights = (given.folder / f"{objective}-{prediction}.{ending}" for ending in ("json", "pt"))
        if path.exists():
            continue
        if objective == "dmd2":
            start = network(prediction).to(device)
            start.load_state_dict(load_state(given.folder / f"flow-{prediction}.pt") or {})
            net, steps = trainer.distilled(start)
        else:
            net, steps = trainer.single(objective, prediction)
        found = {"steps": steps, "seconds": given.seconds, **measured(net, shown, teacher, device)}
        print(objective, prediction, json.dumps(found), flush=True)
        save_state(weights, net.state_dict())
        with atomic_write(path) as file:
            file.write(json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
