# SPDX-License-Identifier: Apache-2.0
"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from safetensors.torch import save
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from pidecode.errors import FileError, SettingError, TrainingError
from pidecode.files import atomic_write, remove_partial
from pidecode.images.tensors import to_pil
from pidecode.sampling import NoiseStream, guided, renoise, sample_teacher
from pidecode.training.checkpoint import (
    Live,
    newest_checkpoint,
    restore,
    save_checkpoint,
)
from pidecode.training.config import Optimize, Recipe
from pidecode.training.dataloader import Feed, make_helpers
from pidecode.training.dataset import find_images
from pidecode.training.denoiser import Example, clean_of, net_of
from pidecode.training.distributed import (
    DistEnv,
    clip_gradients,
    finish_gradients,
    gradients_stay_here,
    lost_workers_named,
    mean_over_processes,
    parameter_groups,
    wait_for_all,
    whole,
    world,
)
from pidecode.training.ema import ExponentialMovingAverage
from pidecode.training.logger import Journal, Say
from pidecode.training.methods import MAIN, Method, build_method
from pidecode.training.models import adapter_tensors, base_tensors
from pidecode.training.overrides import describe
from pidecode.weights.load import LoraMetadata, write_lora
from pidecode.weights.metadata import CheckpointMetadata, Kind


@dataclass
class Training:
    """A run in progress in this process."""

    recipe: Recipe
    folder: Path
    here: DistEnv
    method: Method
    feed: Feed
    optimizers: dict[str, Optimizer]
    average: ExponentialMovingAverage | None
    journal: Journal
    step: int = 0
    """Optimizer steps done."""
    saved: int = -1
    """Step of the newest checkpoint; -1 before the first."""
    images: int = 0
    latest: dict[str, float] = field(default_factory=dict)
    """Newest value of each metric; in a distillation the phases report different ones."""

    @property
    def live(self) -> Live:
        """What checkpoints hold."""
        return Live(self.method.trained, self.optimizers, self.average, self.here.device)


def train(
    recipe: Recipe,
    folder: str | Path,
    *,
    resume: bool = False,
    say: Say | None = None,
    device: torch.device | None = None,
) -> Path:
    """Run a recipe to its end; returns the exported weights, `folder/decoder.safetensors` (or `adapter.safetensors`).

    resume: go on from the newest checkpoint in `folder`; without one, begin. Otherwise `folder` must hold no run.
    say: told a line now and then, in the first process only.

    Raises TrainingError when it must stop (no data, NaN, a full disk, a lost process); what was saved is whole.
    """
    folder = Path(folder)
    with lost_workers_named(), world(recipe.spread, device) as here:
        run = _begin(recipe, folder, here, resume, say if here.is_first else None)
        try:
            while run.step < recipe.run.steps:
                _advance(run)
            if run.saved != run.step:
                _save(run)
            with averaged(run):
                exported = export_network(recipe, run.method, folder, run.step, here)
            run.journal.say(f"Done: {exported}")
        finally:
            run.feed.close()
            run.journal.close()
    return exported


def export_newest(recipe: Recipe, folder: str | Path) -> Path:
    """Write the newest checkpoint of a run as a result, without training on. Raises TrainingError if there is none."""
    folder = Path(folder)
    here = DistEnv(torch.device("cpu"))
    stored = newest_checkpoint(folder / "checkpoints")
    if stored is None:
        raise TrainingError(f"{folder} holds no checkpoint to export.")
    method = build_method(recipe, here)
    average = None if recipe.average.kind == "none" else ExponentialMovingAverage(method.trained[MAIN], recipe.average)
    restore(stored, Live(method.trained, make_optimizers(recipe, method), average, here.device))
    if average is not None:
        average.swap(method.trained[MAIN])
    return export_network(recipe, method, folder, stored.step, here)


def _begin(recipe: Recipe, folder: Path, here: DistEnv, resume: bool, say: Say | None) -> Training:
    checkpoints = folder / "checkpoints"
    stored = newest_checkpoint(checkpoints, say) if resume else None
    if not resume and any(checkpoints.glob("step-*")):
        raise SettingError(f"{folder} holds a run already; go on with --resume, or choose another folder.")
    collection = find_images(recipe.data.source)
    method = build_method(recipe, here)
    feed = Feed(recipe, collection, make_helpers(recipe, here.device), here.device, here.place, here.places)
    average = None if recipe.average.kind == "none" else ExponentialMovingAverage(method.trained[MAIN], recipe.average)
    optimizers = make_optimizers(recipe, method)
    step = 0 if stored is None else stored.step
    if here.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        remove_partial(checkpoints)
        words = "\n".join(f"{name} = {value!r}" for name, value, _ in describe(recipe))
        (folder / "recipe.txt").write_text(words + "\n", encoding="utf-8")
    wait_for_all(here)
    journal_folder = folder if here.is_first else folder / f"process-{here.rank}"
    journal_folder.mkdir(parents=True, exist_ok=True)
    journal = Journal(journal_folder, recipe.run.track if here.is_first else (), recipe.run.steps, step, say)
    run = Training(recipe, folder, here, method, feed, optimizers, average, journal, step, step if stored else -1)
    if stored is not None:
        restore(stored, run.live)
        run.latest = dict(stored.facts.get("latest", {}))
        journal.say(f"Going on from step {step}.")
        if stored.facts.get("images") != collection.digest:
            journal.say("The images have changed since; the run goes on, but not as it would have.")
    for note in _opening(run):
        journal.say(note)
    return run


def _opening(run: Training) -> Iterator[str]:
    found, skipped = len(run.feed.collection.entries), run.feed.skipped
    parameters = sum(p.numel() for p in run.method.trained[MAIN].parameters() if p.requires_grad)
    yield f"{run.recipe.title}: {parameters:,} parameters, {found} images, {run.here.size} process(es)."
    for name, reason in list(skipped.items())[:10]:
        yield f"Skipped {name}: {reason}"
    if run.method.fresh:
        yield f"{len(run.method.fresh)} tensors are not in {run.recipe.start_from} and start from chance."


def make_optimizers(recipe: Recipe, method: Method) -> dict[str, Optimizer]:
    """An AdamW for each trained module."""
    settings = recipe.optimize
    made: dict[str, Optimizer] = {}
    for name, module in method.trained.items():
        critic = name in ("fake", "critic")
        made[name] = AdamW(
            parameter_groups(module),
            lr=settings.critic_rate if critic else settings.rate,
            betas=settings.betas,
            weight_decay={"fake": settings.fake_decay, "critic": 0.0}.get(name, settings.decay),
        )
        for group in made[name].param_groups:
            group["full_rate"] = group["lr"]
    return made


def rate_factor(settings: Optimize, step: int, steps: int) -> float:
    """Share of the full learning rate at step `step`, counted from 0."""
    factor = min(1.0, (step + 1) / settings.warmup) if settings.warmup else 1.0
    if settings.fall == "cosine" and step >= settings.warmup:
        done = (step - settings.warmup) / max(1, steps - settings.warmup)
        factor *= 0.5 * (1 + math.cos(math.pi * done))
    return factor


def _autocast(run: Training) -> Any:
    if run.recipe.run.precision == "float32":
        return nullcontext()
    return torch.autocast(run.here.device.type, torch.bfloat16)


def _advance(run: Training) -> None:
    """One optimizer step and what belongs to it."""
    recipe = run.recipe
    turn = run.method.turn(run.step)
    passes = recipe.optimize.accumulate
    modules = [run.method.trained[name] for name in turn]
    others = [module for name, module in run.method.trained.items() if name not in turn]
    with _set_aside(others):
        for index in range(passes):
            _one_pass(run, run.step * passes + index, modules, last=index == passes - 1)
    finish_gradients(modules, run.here)
    norms = _update(run, turn)
    run.step += 1
    if run.average is not None and MAIN in turn:
        run.average.update(run.method.trained[MAIN], run.step)
    for name, norm in norms.items():
        run.latest[f"gradient_{name}"] = norm
    settings = recipe.run
    if run.step % settings.log_every == 0 or run.step == settings.steps:
        _report(run)
    if settings.sample_every and run.step % settings.sample_every == 0:
        _sample(run)
    if run.step % settings.save_every == 0:
        _save(run)


@contextmanager
def _set_aside(modules: list[nn.Module]) -> Iterator[None]:
    """Spare modules that this iteration does not train their gradients."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _one_pass(run: Training, number: int, modules: list[nn.Module], *, last: bool) -> None:
    example, draws, names = run.feed.batch(number)
    with gradients_stay_here(modules, not last):
        with _autocast(run):
            outcome = run.method.outcome(run.step, example, draws)
        loss = mean_over_processes(outcome.loss.detach().float(), run.here)
        if not bool(torch.isfinite(loss)):
            _stop_for_nan(run, "loss", names)
        (outcome.loss / run.recipe.optimize.accumulate).backward()
    share = 1 / run.recipe.optimize.accumulate
    for name, value in {"loss": loss, **outcome.parts}.items():
        run.latest[name] = float(value) * share + (
            run.latest.get(name, 0.0) if number % run.recipe.optimize.accumulate else 0
        )
    run.images += run.recipe.data.batch * run.here.places


def _stop_for_nan(run: Training, what: str, names: tuple[str, ...]) -> None:
    saved = f"the checkpoint of step {run.saved} is whole" if run.saved >= 0 else "nothing had been saved yet"
    raise TrainingError(
        f"The {what} became NaN or infinite at step {run.step + 1} (images here: {', '.join(names)}); {saved}. "
        "Lower optimize.rate, lengthen optimize.warmup or set run.precision=float32, then start again with --resume."
    )


def _update(run: Training, turn: tuple[str, ...]) -> dict[str, float]:
    """Clip and step the optimizers of this iteration; the gradients' norms before clipping."""
    settings, norms = run.recipe.optimize, {}
    factor = rate_factor(settings, run.step, run.recipe.run.steps)
    for name in turn:
        norms[name] = clip_gradients(run.method.trained[name], settings.clip)
        if not math.isfinite(norms[name]):
            _stop_for_nan(run, f"gradient of {name}", ())
    for name in turn:
        optimizer = run.optimizers[name]
        for group in optimizer.param_groups:
            group["lr"] = group["full_rate"] * factor
        optimizer.step()
    for optimizer in run.optimizers.values():
        optimizer.zero_grad(set_to_none=True)
    return norms


def _report(run: Training) -> None:
    factor = rate_factor(run.recipe.optimize, run.step - 1, run.recipe.run.steps)
    values = {**run.latest, "rate": run.recipe.optimize.rate * factor, "skipped": float(len(run.feed.skipped))}
    run.journal.note(run.step, values, run.images, run.here.device)


@contextmanager
def averaged(run: Training) -> Iterator[None]:
    """The averaged weights in place of the current ones."""
    if run.average is None:
        yield
        return
    run.average.swap(run.method.trained[MAIN])
    try:
        yield
    finally:
        run.average.swap(run.method.trained[MAIN])


def _sample(run: Training) -> None:
    net = run.method.trained[MAIN]
    with averaged(run), torch.no_grad(), _autocast(run):
        rows = [
            (example.low, paint_example(net, example, run.recipe), example.image)
            for example in run.feed.preview(run.recipe.run.samples)
        ]
    if run.here.is_first:
        save_grid(run.folder / "samples" / f"step-{run.step:08d}.png", rows)


def _save(run: Training) -> None:
    if run.feed.helpers.cache is not None:
        run.feed.helpers.cache.flush()
    facts = {
        "images": run.feed.collection.digest,
        "skipped": dict(list(run.feed.skipped.items())[:1000]),
        "method": run.recipe.method,
        "title": run.recipe.title,
        "latest": run.latest,
    }
    checkpoints = run.folder / "checkpoints"
    save_checkpoint(checkpoints, run.step, run.live, facts, run.here, run.recipe.run.keep)
    run.saved = run.step


_KINDS: dict[str, Kind] = {"backbone": "backbone", "teacher": "teacher", "student": "student", "direct": "student"}


def export_network(recipe: Recipe, method: Method, folder: Path, step: int, here: DistEnv) -> Path:
    """Write the network as it stands; every process must call this, the first one writes."""
    net = method.main.net
    tensors: dict[str, Tensor] = {}
    for name, value in net.state_dict().items():
        full = whole(value.detach())
        if here.is_first:
            tensors[name] = full.to("cpu", copy=True).contiguous()
    path = folder / ("adapter.safetensors" if recipe.adapt.rank else "decoder.safetensors")
    if here.is_first:
        try:
            _write(path, recipe, method, tensors, step)
        except FileError as fault:
            raise TrainingError(f"The result could not be written: {fault} The last checkpoint is whole.") from fault
    return path


def _write(path: Path, recipe: Recipe, method: Method, tensors: dict[str, Tensor], step: int) -> None:
    space = None if recipe.space is None else recipe.space.name
    if recipe.adapt.rank:
        identity = LoraMetadata(
            rank=recipe.adapt.rank,
            alpha=recipe.adapt.alpha or recipe.adapt.rank,
            space=space,
            base=recipe.start_from or None,
        )
        write_lora(path, adapter_tensors(tensors), identity)
        return
    kind = _KINDS[recipe.method]
    config = method.main.net.config
    dtype = getattr(torch, recipe.run.export_as)
    content = save(
        {name: tensor.to(dtype).contiguous() for name, tensor in base_tensors(tensors).items()},
        CheckpointMetadata(
            kind=kind,
            config=config,
            space=space,
            times=recipe.distil.times if kind == "student" else (),
            extra={"trained": {"recipe": recipe.title, "steps": step, "started_from": recipe.start_from}},
        ).to_metadata(),
    )
    with atomic_write(path, overwrite=True) as file:
        file.write(content)


_EDGE = 4


@torch.no_grad()
def paint_example(net: nn.Module, example: Example, recipe: Recipe, seed: int = 0) -> Tensor:
    """A finished image `[1, 3, H, W]` in [-1, 1], as a decoder would make it."""
    image = example.image
    shape = (3, image.shape[-2], image.shape[-1])
    draw = NoiseStream([seed], shape, image.device)
    if recipe.method in ("student", "direct"):
        return few_steps(net, example, recipe.distil.times, draw)

    def predict(x: Tensor, t: Tensor, shown: Example = example) -> Tensor:
        prediction: Tensor = net(x, t / 1000.0, shown).prediction
        return prediction.float()

    def uncaptioned(x: Tensor, t: Tensor) -> Tensor:
        return predict(x, t, example.without_caption())

    guidance = recipe.run.sample_guidance if recipe.net.has_text else 1.0
    return sample_teacher(
        guided(predict, uncaptioned, guidance),
        draw(),
        num_steps=recipe.run.sample_steps,
        shift=recipe.teacher.flow_shift.at(*shape[1:]),
        prediction=net_of(net).config.prediction,
    ).clamp(-1, 1)


def few_steps(net: nn.Module, example: Example, times: Sequence[float], draw: NoiseStream) -> Tensor:
    """The student's loop over its own times."""
    x = draw()
    for t, t_next in pairwise(times):
        t_B = torch.full((x.shape[0],), t, device=x.device)
        clean = clean_of(net, net(x, t_B, example).prediction, x, t_B)
        x = renoise(clean, draw(), t_next) if t_next > 0 else clean
    return x.clamp(-1, 1)


def grid_of(rows: Sequence[tuple[Tensor | None, Tensor, Tensor]]) -> Tensor:
    """One image `[3, H, W]` of rows (low resolution, painted, real), each `[1, 3, h, w]`, dark edges between."""
    height = max(row[2].shape[-2] for row in rows)
    width = max(row[2].shape[-1] for row in rows)
    bands = []
    for low, painted, real in rows:
        size = (real.shape[-2], real.shape[-1])
        first = torch.full_like(real, -1.0) if low is None else F.interpolate(low, size=size, mode="nearest")
        cells = [
            F.pad(cell[0].float().cpu(), (0, width - size[1] + _EDGE, 0, height - size[0] + _EDGE), value=-1.0)
            for cell in (first, painted, real)
        ]
        bands.append(torch.cat(cells, dim=-1))
    return torch.cat(bands, dim=-2)


def save_grid(path: Path, rows: Sequence[tuple[Tensor | None, Tensor, Tensor]]) -> None:
    """Write the grid as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path, overwrite=True) as file:
        to_pil(grid_of(rows)).save(file, format="PNG")
