# SPDX-License-Identifier: Apache-2.0
"""What one small PiD network learns in the same steps by each objective: x0 or velocity, direct or as a flow, DMD2.

    python benchmarks/objectives.py --data IMAGES --taef2 TAEF2 --steps 1000 --folder out [--device cuda]

The network has attention and four steps, and learns from random values on crops of 128 pixels and taef2's latents.
"direct" reconstructs the image from each of the student's four times; "flow" is the teacher's flow matching; "dmd2"
distills a flow's network (https://arxiv.org/abs/2405.14867). A result in `--folder` is kept. Measured are the middles
of held-out images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from pidecode.devices import select_device
from pidecode.files import atomic_write
from pidecode.images.tensors import downsample
from pidecode.metrics import psnr, sharpness, ssim
from pidecode.registry.configs import PiDConfig, Prediction
from pidecode.registry.spaces import get_space
from pidecode.training.config import DataConfig, EMAConfig, OptimizerConfig, PiDRunConfig, TrainConfig
from pidecode.training.denoiser import TrainBatch
from pidecode.training.distributed import DistEnv
from pidecode.training.dmd import DistillationConfig
from pidecode.training.flow_matching import TeacherLossConfig
from pidecode.training.noise import LatentNoiseConfig, PerSampleRNG
from pidecode.training.tasks import MAIN, PiDTask, build_task, sample
from pidecode.training.trainer import Trainer, averaged_weights

sys.path.append(str(Path(__file__).parent.parent / "recipes" / "tiny"))
from taef2 import TinyAutoencoder

from data import CropLoader, TinyDataConfig, prepare_images, validation_images

SIDE, BATCH, WINDOW = 128, 8, 256
NO_NOISE = LatentNoiseConfig(probability=0.0)


def objective_config(objective: str, prediction: Prediction, steps: int, init_from: str) -> TrainConfig:
    """One objective on a network of 3.7 million parameters."""
    net = PiDConfig(
        hidden_size=128, num_heads=4, patch_depth=3, patch_size=16, pixel_hidden_size=8, pixel_depth=1,
        pixel_attn_hidden_size=64, pixel_num_heads=4, text_dim=0, latent_channels=128, latent_down=16,
        latent_unpatchify=2, adapter_width=96, adapter_padding="replicate", gate="per_token", inject_pixels=True,
        rope_reference=(WINDOW, WINDOW), prediction=prediction,
    )  # fmt: skip
    dmd2 = objective == "dmd2"
    return TrainConfig(
        title=f"{objective}, {prediction}",
        method={"direct": "direct", "flow": "teacher", "dmd2": "student"}[objective],  # type: ignore[arg-type]
        net=net,
        space=get_space("flux2"),
        init_from=init_from if dmd2 else "",
        data=DataConfig(sizes=((SIDE, SIDE),), batch_size=BATCH, latent_dropout=0.0),
        noise=NO_NOISE,
        teacher=TeacherLossConfig(shift=1.0, shift_base_size=None),
        distillation=DistillationConfig(
            student_every=5, student_input="self_rollout" if dmd2 else "teacher_forcing", fake_score_lr=1e-4
        ),
        optimizer=OptimizerConfig(lr=1e-4 if dmd2 else 1e-3, max_grad_norm=1.0, warmup_steps=100, lr_schedule="cosine"),
        ema=EMAConfig(kind="constant", decay=0.998),
        run=PiDRunConfig(
            steps=steps, precision="float32", activation_checkpointing=False, sample_every=0, export_dtype="float32"
        ),
    )


class TrainBatchLoader(CropLoader):
    """Crops of the recipe of `tiny` as batches of PiD networks."""

    def batch(self, number: int) -> tuple[TrainBatch, PerSampleRNG, tuple[str, ...]]:  # type: ignore[override]
        """The batch of that number, its random numbers and names."""
        crops, rng, names = super().batch(number)
        return TrainBatch(image=crops.image, low=crops.low, latent=crops.latent, sigma=crops.sigma), rng, names


@torch.inference_mode()
def measured(task: PiDTask, images: list[Tensor], autoencoder: TinyAutoencoder) -> dict[str, dict[str, float]]:
    """Means over the images: four steps of a student, and 25 of a teacher where one was trained."""
    direct, flow = replace(task.config, method="direct"), replace(task.config, method="teacher")
    samplers = {"four steps": direct, **({"25 steps": flow} if task.config.method == "teacher" else {})}
    rows: dict[str, list[Tensor]] = {name: [] for name in samplers}
    for image in (each.to(task.env.device) for each in images):
        low = downsample(image, 4)
        latent = torch.nn.functional.pixel_unshuffle(autoencoder.encode(low), 2)
        batch = TrainBatch(image=image, low=low, latent=latent, sigma=torch.zeros(1, device=image.device))
        for name, config in samplers.items():
            made = sample(task.modules[MAIN], batch, config)
            rows[name].append(
                torch.stack([metric.mean() for metric in (psnr(made, image), ssim(made, image), sharpness(made))])
            )
    return {
        name: dict(zip(("psnr", "ssim", "sharpness"), torch.stack(found).mean(0).tolist(), strict=True))
        for name, found in rows.items()
    }


def main() -> None:
    """Train every network, measure it, write the numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of photographs")
    parser.add_argument("--taef2", type=Path, required=True, help="folder of the two taef2 files")
    parser.add_argument("--folder", type=Path, required=True, help="where results and weights go")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each objective")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    env = DistEnv(select_device(given.device))
    autoencoder = TinyAutoencoder.from_folder(given.taef2).to(env.device)
    data = TinyDataConfig(source=given.data, crops=((SIDE, BATCH, 1.0),), recolor=0.5, join=0.0, synthetic_share=0.0)
    cache = given.folder / "images"
    prepare_images(data, cache, 0, print)
    images = list(validation_images(cache, 30, WINDOW))
    for objective, prediction in itertools.product(("direct", "flow", "dmd2"), get_args(Prediction)):
        folder, path = (given.folder / f"{objective}-{prediction}{ending}" for ending in ("", ".json"))
        if path.exists():
            continue
        flow = given.folder / f"flow-{prediction}" / "decoder.safetensors"
        task = build_task(objective_config(objective, prediction, given.steps, str(flow)), env)
        loader = TrainBatchLoader(data, NO_NOISE, cache, autoencoder.encode, device=env.device, seed=0)
        trainer = Trainer(task, loader, folder, task.config, env, resume=True, progress=print)
        trainer.run()
        with averaged_weights(trainer.state):
            found = {"steps": given.steps, **measured(task, images, autoencoder)}
        print(objective, prediction, json.dumps(found), flush=True)
        with atomic_write(path) as file:
            file.write(json.dumps(found, indent=1).encode())


if __name__ == "__main__":
    main()
