# SPDX-License-Identifier: Apache-2.0
"""The training loop: any modules with a loss, with EMA, checkpoints, metrics and samples.

A `TrainTask` owns the modules and says what they cost; a `TrainLoader` gives batches by number. `Trainer` does the
rest and knows neither. `pidecode.training.tasks` is the task of PiD networks, `recipes/tiny` that of `tiny`.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import AdamW, Optimizer

from pidecode.devices import default_dtype
from pidecode.errors import SettingError, TrainingError
from pidecode.files import FolderLock, atomic_write, remove_partial, writable_folder
from pidecode.training import distributed
from pidecode.training.checkpoint import TrainState, newest_checkpoint, restore, save_checkpoint
from pidecode.training.config import EMAConfig, OptimizerConfig, RunConfig, describe
from pidecode.training.distributed import DistEnv
from pidecode.training.ema import ExponentialMovingAverage
from pidecode.training.flow_matching import LossOutput
from pidecode.training.logger import MetricLogger, ProgressFn
from pidecode.training.muon import Muon, muon_groups
from pidecode.training.noise import RNG


class TrainTask(Protocol):
    """What is trained and how it is judged."""

    @property
    def title(self) -> str:
        """What is trained, in one line."""

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Trained modules by name; each has an optimizer of its own."""

    @property
    def averaged(self) -> tuple[str, ...]:
        """Names of modules with a moving average, which samples and exports use."""

    def trained_at(self, step: int) -> tuple[str, ...]:
        """Names of the modules that iteration `step`, counted from 0, trains."""

    def make_optimizer(self, name: str) -> Optimizer:
        """The optimizer of a module; its learning rates are the full ones, before warm-up and schedule."""

    def loss(self, step: int, batch: Any, rng: RNG) -> LossOutput:
        """The loss of one forward pass of iteration `step`."""

    def save_samples(self, folder: Path, step: int) -> None:
        """Write samples of the averaged weights; every process calls this, the first one writes."""

    def export(self, folder: Path, step: int) -> Path:
        """Write the averaged weights as a result; every process calls this, the first one writes."""

    def notes(self) -> Iterator[str]:
        """Lines to report before the first step."""


class TrainLoader(Protocol):
    """Batches by number: the same batch for the same number, whenever it is asked for."""

    @property
    def fingerprint(self) -> str:
        """Changes when the training data changes."""

    @property
    def skipped(self) -> Mapping[str, str]:
        """Unreadable files, with the reason."""

    def batch(self, number: int) -> tuple[Any, RNG, tuple[str, ...]]:
        """The batch of that number, the random numbers for the rest of its step, and its images' names."""

    def flush(self) -> None:
        """Write what is cached in memory."""

    def close(self) -> None:
        """Stop reading ahead."""


class LoopConfig(Protocol):
    """What the loop reads of a configuration, which is a dataclass."""

    @property
    def optimizer(self) -> OptimizerConfig:
        """Schedule, clipping and accumulation."""

    @property
    def ema(self) -> EMAConfig:
        """The moving average."""

    @property
    def run(self) -> RunConfig:
        """Length, precision and outputs."""


class Trainer:
    """One training run in this process.

    Args:
        task: Modules and losses.
        loader: Batches.
        folder: Where checkpoints, metrics, samples and the result go.
        config: Length, schedule and outputs; all of it is written to `folder/config.txt`.
        env: This process among all.
        resume: Continue from the newest checkpoint in `folder`; without one, start.
        progress: Called with a line of text now and then, in the first process only.

    The folder is locked until `run` ends or the trainer is gone: two runs in one folder would mix their checkpoints.

    Raises:
        SettingError: `folder` holds a run and `resume` is not set.
        FileError: `folder` cannot be written to, or another run is writing into it.
        CheckpointError: The checkpoint belongs to other modules, or all checkpoints are damaged.
    """

    def __init__(
        self,
        task: TrainTask,
        loader: TrainLoader,
        folder: str | Path,
        config: LoopConfig,
        env: DistEnv,
        *,
        resume: bool = False,
        progress: ProgressFn | None = None,
    ) -> None:
        self.task, self.loader, self.folder, self.env = task, loader, Path(folder), env
        self.optimizer_config, self.run_config = config.optimizer, config.run
        self.step = 0  # optimizer steps done
        self.images = 0  # images this process has seen since it began
        self.metrics: dict[str, float] = {}
        """Newest value of each metric; in a distillation the phases report different ones."""
        self._saved_step, self._saved_at = -1, time.monotonic()
        self._checkpoints = self.folder / "checkpoints"
        self._release: Callable[[], object] = lambda: None
        try:
            self._begin(config, resume=resume, progress=progress if env.is_first else None)
        except BaseException:
            self._release()
            raise

    def _begin(self, config: LoopConfig, *, resume: bool, progress: ProgressFn | None) -> None:
        """Lock the folder, read the checkpoint and report what is to be trained."""
        task, loader, env = self.task, self.loader, self.env
        if env.is_first:
            self._release = weakref.finalize(self, FolderLock(self.folder, "training").release)
        stored = newest_checkpoint(self._checkpoints, progress) if resume else None
        if not resume and any(self._checkpoints.glob("step-*")):
            raise SettingError(
                f"{self.folder} holds a run already; continue it with --resume, or choose another folder."
            )
        self.state = train_state(task, config.ema, env.device)
        if env.is_first:
            writable_folder(self._checkpoints)
            remove_partial(self._checkpoints)
            text = "".join(f"{name} = {value!r}\n" for name, value, _ in describe(config))
            with atomic_write(self.folder / "config.txt", overwrite=True) as file:
                file.write(text.encode())
        distributed.barrier(env)
        if stored is not None:
            self.step = self._saved_step = stored.step
        log_folder = self.folder if env.is_first else writable_folder(self.folder / f"process-{env.rank}")
        trackers = config.run.trackers if env.is_first else ()
        self.logger = MetricLogger(log_folder, trackers, config.run.steps, self.step, progress)
        if stored is not None:
            restore(stored, self.state)
            self.metrics = dict(stored.metadata.get("metrics", {}))
            self.logger.message(f"Resuming from step {self.step}.")
            if stored.metadata.get("images") != loader.fingerprint:
                self.logger.message("The images have changed since; the run continues, but not as it would have.")
        for name, reason in list(loader.skipped.items())[:10]:
            self.logger.message(f"Skipped {name}: {reason}")
        for note in task.notes():
            self.logger.message(note)
        emulated = env.device.type == "cpu" and default_dtype(env.device) is torch.float32
        if emulated and config.run.precision == "bfloat16":
            self.logger.message("This CPU emulates bfloat16, which is many times slower: set run.precision=float32.")

    def run(self) -> Path:
        """Train to the last step and export.

        Returns:
            The file `TrainTask.export` wrote.

        Raises:
            TrainingError: The run must stop: NaN, a full disk, unreadable data. What was saved is complete.
        """
        try:
            while self.step < self.run_config.steps:
                self._train_step()
            if self._saved_step != self.step:
                self._save()
            with averaged_weights(self.state):
                exported = self.task.export(self.folder, self.step)
            self.logger.message(f"Done: {exported}")
        finally:
            self.loader.close()
            self.logger.close()
            self._release()
        return exported

    def _train_step(self) -> None:
        """One optimizer step, and what is written after it."""
        names = self.task.trained_at(self.step)
        modules = [self.task.modules[name] for name in names]
        others = [module for name, module in self.task.modules.items() if name not in names]
        frozen = [p for module in others for p in module.parameters() if p.requires_grad]
        passes = self.optimizer_config.grad_accumulation
        for parameter in frozen:
            parameter.requires_grad_(False)
        for index in range(passes):
            self._forward_backward(self.step * passes + index, modules, last=index == passes - 1)
        for parameter in frozen:
            parameter.requires_grad_(True)
        distributed.reduce_unsharded_gradients(modules, self.env)
        run = self.run_config
        factor = lr_factor(self.optimizer_config, self.step, run.steps)
        self._update(names, factor)
        self.step += 1
        for name in self.state.emas.keys() & names:
            self.state.emas[name].update(self.task.modules[name], self.step)
        if self.step % run.log_every == 0 or self.step == run.steps:
            lr, skipped = self.optimizer_config.lr * factor, float(len(self.loader.skipped))
            self.logger.log(self.step, {**self.metrics, "lr": lr, "skipped": skipped}, self.images, self.env.device)
        if run.sample_every and self.step % run.sample_every == 0:
            with averaged_weights(self.state), torch.no_grad(), self._autocast():
                self.task.save_samples(self.folder / "samples", self.step)
        if self.step % run.checkpoint_every == 0 or (run.checkpoint_minutes > 0 and self._late_anywhere()):
            self._save()

    def _late_anywhere(self) -> bool:
        """Whether `checkpoint_minutes` have passed by any process's clock; each of them must ask."""
        late = float(time.monotonic() - self._saved_at >= 60 * self.run_config.checkpoint_minutes)
        return bool(distributed.mean_over_processes(torch.tensor(late, device=self.env.device), self.env) > 0)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.env.device.type, torch.bfloat16, enabled=self.run_config.precision == "bfloat16")

    def _forward_backward(self, number: int, modules: list[nn.Module], *, last: bool) -> None:
        passes = self.optimizer_config.grad_accumulation
        batch, rng, names = self.loader.batch(number)
        distributed.set_gradient_sync(modules, last)
        with self._autocast():
            output = self.task.loss(self.step, batch, rng)
        loss = distributed.mean_over_processes(output.loss.detach().float(), self.env)
        if not bool(torch.isfinite(loss)):
            self._stop_for_nan("loss", names)
        (output.loss / passes).backward()
        for name, value in {"loss": loss, **output.parts}.items():
            before = self.metrics.get(name, 0.0) if number % passes else 0.0
            self.metrics[name] = before + float(value) / passes
        self.images += len(names) * self.env.data_world_size

    def _stop_for_nan(self, what: str, names: tuple[str, ...]) -> None:
        complete = f"the checkpoint of step {self._saved_step} is complete"
        saved = complete if self._saved_step >= 0 else "nothing had been saved yet"
        raise TrainingError(
            f"The {what} became NaN or infinite at step {self.step + 1} (images here: {', '.join(names)}); {saved}. "
            "Lower the learning rate, lengthen optimizer.warmup_steps or set run.precision=float32, then start again "
            "with --resume."
        )

    def _update(self, names: tuple[str, ...], factor: float) -> None:
        """Clip gradients and step the optimizers of this iteration, at `factor` of their full learning rates."""
        for name in names:
            norm = distributed.clip_gradients(self.task.modules[name], self.optimizer_config.max_grad_norm)
            if not math.isfinite(norm):
                self._stop_for_nan(f"gradient of {name}", ())
            self.metrics[f"grad_norm_{name}"] = norm
        for name in names:
            for group in self.state.optimizers[name].param_groups:
                group["lr"] = group["initial_lr"] * factor
            self.state.optimizers[name].step()
        for optimizer in self.state.optimizers.values():
            optimizer.zero_grad()

    def _save(self) -> None:
        self.loader.flush()
        metadata = {
            "images": self.loader.fingerprint, "skipped": dict(list(self.loader.skipped.items())[:1000]),
            "title": self.task.title, "metrics": self.metrics,
        }  # fmt: skip
        save_checkpoint(self._checkpoints, self.step, self.state, metadata, self.env, self.run_config.keep)
        self._saved_step, self._saved_at = self.step, time.monotonic()


def train_state(task: TrainTask, ema: EMAConfig, device: torch.device) -> TrainState:
    """Modules, fresh optimizers and moving averages of a task: what a checkpoint stores."""
    optimizers = {name: task.make_optimizer(name) for name in task.modules}
    for optimizer in optimizers.values():
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
    names = () if ema.kind == "none" else task.averaged
    emas = {name: ExponentialMovingAverage(task.modules[name], ema) for name in names}
    return TrainState(task.modules, optimizers, emas, device)


def export_newest(task: TrainTask, ema: EMAConfig, folder: str | Path) -> Path:
    """Export the newest checkpoint of a run without training on."""
    folder = Path(folder)
    stored = newest_checkpoint(folder / "checkpoints")
    if stored is None:
        raise TrainingError(f"{folder} holds no checkpoint to export.")
    state = train_state(task, ema, torch.device("cpu"))
    restore(stored, state)
    with averaged_weights(state):
        return task.export(folder, stored.step)


@contextmanager
def averaged_weights(state: TrainState) -> Iterator[None]:
    """Put the averaged weights in place of the current ones, for the duration of the context."""

    def swap() -> None:
        for name, average in state.emas.items():
            average.swap(state.modules[name])

    swap()
    try:
        yield
    finally:
        swap()


def make_optimizer(module: nn.Module, config: OptimizerConfig, *, lr: float, weight_decay: float) -> Optimizer:
    """The optimizer of a configuration for the parameters of `module` that require gradients."""
    if config.name == "muon":
        named = ((name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad)
        return Muon(muon_groups(named), lr=lr, weight_decay=weight_decay)
    groups = distributed.by_sharding([parameter for parameter in module.parameters() if parameter.requires_grad])
    return AdamW([{"params": group} for group in groups], lr=lr, betas=config.betas, weight_decay=weight_decay)


def lr_factor(config: OptimizerConfig, step: int, steps: int) -> float:
    """Factor of the full learning rate at step `step`, counted from 0: linear warm-up, then the schedule."""
    factor = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    if config.lr_schedule == "cosine" and step >= config.warmup_steps:
        done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
        factor *= 0.5 * (1 + math.cos(math.pi * done))
    return factor
