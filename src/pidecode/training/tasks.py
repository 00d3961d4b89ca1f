# SPDX-License-Identifier: Apache-2.0
"""Training of PiD networks: backbone, teacher, student and direct training as tasks of the training loop."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from pidecode.errors import FileError, SettingError, TrainingError
from pidecode.files import atomic_write, writable_folder
from pidecode.images.tensors import to_pil
from pidecode.models.pid.adapter import ResidualBlock
from pidecode.models.pid.blocks import PatchBlock, PixelBlock
from pidecode.models.pid.network import PiDNet
from pidecode.sampling import NoiseStream, guided, renoise, sample_teacher
from pidecode.training import distributed, models
from pidecode.training.config import TrainConfig
from pidecode.training.dataloader import DataLoader, make_encoders
from pidecode.training.dataset import find_images
from pidecode.training.denoiser import Denoiser, TrainBatch, pid_net, to_clean
from pidecode.training.distributed import DistEnv
from pidecode.training.dmd import Discriminator, DistillationModels, fake_score_loss, generate, student_loss
from pidecode.training.flow_matching import LossOutput, teacher_loss
from pidecode.training.logger import ProgressFn
from pidecode.training.losses import dinov2, reconstruction
from pidecode.training.noise import RNG
from pidecode.training.trainer import Trainer, export_newest, make_optimizer
from pidecode.weights.load import LoraMetadata, write_lora
from pidecode.weights.metadata import CheckpointMetadata
from pidecode.weights.safetensors import write_safetensors

MAIN = "net"  # name of the network that a run is about: averaged, sampled, exported
_GRID_GAP = 4


def train(
    config: TrainConfig,
    folder: str | Path,
    *,
    resume: bool = False,
    progress: ProgressFn | None = None,
    device: torch.device | None = None,
) -> Path:
    """Run a configuration to its end.

    Args:
        config: What is trained, on what and how.
        folder: Where checkpoints, metrics, samples and the result go.
        resume: Continue from the newest checkpoint in `folder`; without one, start. Otherwise `folder` must hold none.
        progress: Called with a line of text now and then, in the first process only.
        device: Where to compute; by default the best one.

    Returns:
        The exported weights, `folder/decoder.safetensors` (or `adapter.safetensors`).

    Raises:
        TrainingError: The run must stop: no data, NaN, a full disk, a lost process. What was saved is complete.
        SettingError: `folder` holds a run and `resume` is not set, or the settings do not fit the processes.
        FileError: `folder` cannot be written to, or another run is writing into it.
    """
    writable_folder(folder)  # before the networks are built
    with distributed.report_lost_processes(), distributed.init_distributed(config.parallel, device) as env:
        images = find_images(config.data.source)
        task = build_task(config, env)
        loader = DataLoader(config, images, make_encoders(config, env.device), env)
        trainer = Trainer(task, loader, folder, config, env, resume=resume, progress=progress)
        task.loader = loader
        return trainer.run()


def export(config: TrainConfig, folder: str | Path) -> Path:
    """Export the newest checkpoint of a run without training on."""
    return export_newest(build_task(config, DistEnv(torch.device("cpu"))), config.ema, folder)


@dataclass
class PiDTask:
    """Networks of a run, replicated or sharded over the processes, with their losses, samples and export."""

    config: TrainConfig
    env: DistEnv
    modules: dict[str, nn.Module] = field(default_factory=dict)  # trained modules; each has its own optimizer
    frozen: dict[str, nn.Module] = field(default_factory=dict)
    uninitialized: list[str] = field(default_factory=list)  # tensors that `init_from` lacks
    loader: DataLoader | None = None  # source of the images in a grid of samples
    averaged: tuple[str, ...] = (MAIN,)

    @property
    def title(self) -> str:
        """What is trained."""
        return self.config.title

    def trained_at(self, step: int) -> tuple[str, ...]:
        """Names of the modules that iteration `step`, counted from 0, trains."""
        if self.config.method != "student":
            return tuple(self.modules)
        student = self.config.distillation.is_student_turn(step)
        return tuple(name for name in self.modules if (name == MAIN) == student)

    def make_optimizer(self, name: str) -> Optimizer:
        """The optimizer of a module at full learning rate."""
        config, distillation = self.config.optimizer, self.config.distillation
        lr, decay = config.lr, config.weight_decay
        if name in ("fake_score", "discriminator"):
            lr = distillation.fake_score_lr
            decay = distillation.fake_score_weight_decay if name == "fake_score" else 0.0
        return make_optimizer(self.modules[name], config, lr=lr, weight_decay=decay)

    def loss(self, step: int, batch: TrainBatch, rng: RNG) -> LossOutput:
        """The loss of one forward pass of iteration `step`."""
        config = self.config
        if config.method == "direct":  # a student's sample should be the image itself; for small networks
            generated = generate(self.modules[MAIN], batch, rng, config.distillation)
            return LossOutput(*reconstruction(generated, batch.image.float()))
        if config.method != "student":
            return teacher_loss(self.modules[MAIN], batch, rng, config.teacher, self.modules.get("repa"))
        discriminator, teacher = self.modules.get("discriminator"), self.frozen["teacher"]
        nets = DistillationModels(self.modules[MAIN], teacher, self.modules["fake_score"], discriminator)
        if config.distillation.is_student_turn(step):
            weight = config.distillation.gan_weight_at(step)
            return student_loss(nets, batch, rng, config.distillation, weight)[0]
        return fake_score_loss(nets, batch, rng, config.distillation)

    def save_samples(self, folder: Path, step: int) -> None:
        """Write a grid of low-resolution input, sample and image for the first images."""
        if self.loader is None:
            return
        batches = self.loader.sample_batches(self.config.run.num_samples)
        rows = [(batch.low, sample(self.modules[MAIN], batch, self.config), batch.image) for batch in batches]
        if self.env.is_first:
            save_grid(folder / f"step-{step:08d}.png", rows)

    def export(self, folder: Path, step: int) -> Path:
        """Write the network as it stands; every process must call this, the first one writes."""
        tensors = distributed.full_tensors(pid_net(self.modules[MAIN]).state_dict().items(), self.env)
        path = folder / ("adapter.safetensors" if self.config.lora.rank else "decoder.safetensors")
        try:
            if self.env.is_first:
                self._write(path, tensors, step)
        except FileError as fault:
            raise TrainingError(f"The result could not be written: {fault} The last checkpoint is complete.") from fault
        return path

    def _write(self, path: Path, tensors: dict[str, Tensor], step: int) -> None:
        config = self.config
        space = None if config.space is None else config.space.name
        if config.lora.rank:
            alpha = config.lora.alpha or config.lora.rank
            metadata = LoraMetadata(rank=config.lora.rank, alpha=alpha, space=space, base=config.init_from or None)
            write_lora(path, models.adapter_tensors(tensors), metadata)
            return
        kind = "student" if config.method == "direct" else config.method
        about = CheckpointMetadata(
            kind=kind, config=pid_net(self.modules[MAIN]).config, space=space,
            times=config.distillation.times if kind == "student" else (),
            extra={"trained": {"recipe": config.title, "steps": step, "init_from": config.init_from}},
        )  # fmt: skip
        dtype = getattr(torch, config.run.export_dtype)
        write_safetensors(path, tensors, about.to_metadata(), dtype=dtype, overwrite=True)

    def notes(self) -> Iterator[str]:
        """Lines to report before the first step."""
        trainable = sum(p.numel() for p in self.modules[MAIN].parameters() if p.requires_grad)
        yield f"{self.title}: {trainable:,} parameters, {self.env.world_size} process(es)."
        if self.uninitialized:
            yield f"{len(self.uninitialized)} tensors are not in {self.config.init_from} and start from random values."


def build_task(config: TrainConfig, env: DistEnv) -> PiDTask:
    """Networks with their initial values, on this process's device, replicated or sharded."""
    if config.parallel.weights == "shard" and config.optimizer.name == "muon":
        raise SettingError("Muon needs whole matrices; set parallel.weights=replicate or optimizer.name=adamw.")
    task = PiDTask(config, env)
    weights = models.initial_weights(config.init_from) if config.init_from else None
    student, distillation = config.method == "student", config.distillation
    net_config = config.net.without_color_head() if student else config.net

    def denoiser(*, lora: bool = False) -> Denoiser:
        net = models.new_network(net_config, config.run.seed)
        if weights is not None:
            task.uninitialized = models.load_initial_weights(net, weights, config.init_from)
        color = config.method == "teacher" and config.teacher.color_weight > 0
        models.set_trainable(net, config.trainable, color=color)
        if lora:
            models.inject_lora(net, config.lora, config.run.seed)
        if config.run.activation_checkpointing:
            checkpoint_activations(net)
        return Denoiser(net.to(env.device).train())

    task.modules[MAIN] = denoiser(lora=config.lora.rank > 0)
    if student:
        task.modules["fake_score"] = denoiser()
        task.frozen["teacher"] = denoiser().requires_grad_(False).eval()
    if student and distillation.gan_weight > 0:
        with models.seeded(config.run.seed, "discriminator"):
            discriminator = Discriminator(
                net_config.hidden_size, net_config.patch_depth, distillation.discriminator_blocks,
                layers=distillation.discriminator_layers, per_patch=distillation.discriminator_per_patch,
            )  # fmt: skip
        task.modules["discriminator"] = discriminator.to(env.device)
    if config.teacher.repa_weight and config.method in ("teacher", "backbone"):
        with models.seeded(config.run.seed, "repa"):
            task.modules["repa"] = dinov2(config.teacher.repa_encoder, config.net.hidden_size).to(env.device)
    for modules in (task.modules, task.frozen):
        for name, module in modules.items():
            modules[name] = distributed.parallelize(module, config.parallel, env)
    return task


def checkpoint_activations(net: PiDNet) -> None:
    """Store each block's input only and recompute the rest in the backward pass."""
    for module in net.modules():
        if isinstance(module, (PatchBlock, PixelBlock, ResidualBlock)):
            module.forward = functools.partial(_checkpointed, module.forward)  # type: ignore[method-assign]


def _checkpointed(forward: Any, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, **kwargs)


@torch.no_grad()
def sample(net: nn.Module, batch: TrainBatch, config: TrainConfig, seed: int = 0) -> Tensor:
    """A finished image `[1, 3, H, W]` in [-1, 1], as a decoder would make it from the batch's latent."""
    height, width = batch.image.shape[-2:]
    noise = NoiseStream([seed], (3, height, width), batch.image.device)
    if config.method in ("student", "direct"):
        x = noise()
        for t, t_next in pairwise(config.distillation.times):
            t_B = torch.full((1,), t, device=x.device)
            clean = to_clean(net, net(x, t_B, batch).prediction, x, t_B)
            x = renoise(clean, noise(), t_next) if t_next > 0 else clean
        return x.clamp(-1, 1)

    def predict(given: TrainBatch, x: Tensor, t: Tensor) -> Tensor:
        prediction: Tensor = net(x, t / 1000.0, given).prediction
        return prediction.float()

    conditional, unconditional = (functools.partial(predict, given) for given in (batch, batch.with_null_text()))
    guidance_scale = config.run.sample_guidance if config.net.has_text else 1.0
    return sample_teacher(
        guided(conditional, unconditional, guidance_scale), noise(), num_steps=config.run.sample_steps,
        shift=config.teacher.flow_shift.at(height, width), prediction=pid_net(net).config.prediction,
    ).clamp(-1, 1)  # fmt: skip


def save_grid(path: Path, rows: Sequence[tuple[Tensor | None, Tensor, Tensor]]) -> None:
    """Write one PNG of rows (low resolution, sample, image), each `[1, 3, h, w]`, with dark gaps."""
    height, width = (max(row[2].shape[axis] for row in rows) for axis in (-2, -1))
    lines = []
    for low, generated, image in rows:
        size = (image.shape[-2], image.shape[-1])
        first = torch.full_like(image, -1.0) if low is None else F.interpolate(low, size=size, mode="nearest")
        cells = [
            F.pad(cell[0].float().cpu(), (0, width - size[1] + _GRID_GAP, 0, height - size[0] + _GRID_GAP), value=-1.0)
            for cell in (first, generated, image)
        ]
        lines.append(torch.cat(cells, dim=-1))
    writable_folder(path.parent)
    with atomic_write(path, overwrite=True) as file:
        to_pil(torch.cat(lines, dim=-2)).save(file, format="PNG")
